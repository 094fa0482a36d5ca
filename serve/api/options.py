"""Options of serve.api: the command line is made from this class."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen_ds.errors import UserError
from qwen_ds.recipe.ranges import NonNegativeInt, PathText, PositiveFloat, PositiveInt
from serve.options import LoadOptions

MAX_PORT = 65535
_OF_A_CERTIFICATE = (
    "ssl_keyfile", "ssl_keyfile_password", "ssl_keyfile_password_file", "ssl_ca_certs"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ApiOptions(LoadOptions):
    """Options of serve.api."""

    model: PathText
    """Folder or hub id of a Qwen checkpoint."""
    served_model_name: list[str] = field(default_factory=list)
    """Names by which clients ask for the model; unset: the name of its folder."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for all of the machine's."""
    port: NonNegativeInt = 8044
    """Port to listen at; 0: any that is free, which is said."""
    engines: PositiveInt | None = None
    """Engines, each in a process of its own, behind the one port; unset: one for each GPU."""
    slots: PositiveInt = 32
    """Answers that an engine works on together."""
    prefill_tokens: PositiveInt = 256
    """Tokens of prompts in one step at most; fewer on a CPU while other rows decode."""
    memory_gb: PositiveFloat | None = None
    """Memory for keys and values of each engine, in GB (10^9 bytes); unset: most of what is free
    once the model is loaded."""
    max_queue: NonNegativeInt = 256
    """Answers that may wait for a slot; beyond them requests get 503 with Retry-After."""
    api_key: list[str] = field(default_factory=list)
    """Keys of clients; a process list shows them, so better api_key_file."""
    api_key_file: PathText | None = None
    """File with a key of a client on each line; / and /health need none."""
    max_body_mb: PositiveFloat = 8.0
    """Largest body of a request, in MB (10^6 bytes)."""
    body_seconds: PositiveFloat = 60.0
    """Time that a client has to send a body."""
    request_seconds: PositiveFloat = 600.0
    """Time that an answer may take."""
    drain_seconds: PositiveFloat = 30.0
    """Time that answers under way have to end after SIGTERM."""
    log_text: bool = False
    """Put prompts and answers into the log, too."""
    cors_origins: list[str] = field(default_factory=list)
    """Origins of pages that may call this API from a browser; * for all."""
    ssl_certfile: PathText | None = None
    """Certificate for https, as PEM."""
    ssl_keyfile: PathText | None = None
    """Key of the certificate; unset: it is in the certificate's file."""
    ssl_keyfile_password: str | None = None
    """Password of the key; a process list shows it, so better ssl_keyfile_password_file."""
    ssl_keyfile_password_file: PathText | None = None
    """File whose first line is the password of the key."""
    ssl_ca_certs: PathText | None = None
    """Certificates of authorities, as PEM: clients must show a certificate of one of them."""

    def __post_init__(self) -> None:
        if self.port > MAX_PORT:
            raise UserError(f"--port is {self.port}; expected 0 to {MAX_PORT}")
        if self.ssl_certfile is None:
            for name in _OF_A_CERTIFICATE:
                if self.__dict__[name] is not None:
                    raise UserError(f"--{name} is given without --ssl_certfile; expected both")
        if self.ssl_keyfile_password is not None and self.ssl_keyfile_password_file is not None:
            came = "--ssl_keyfile_password and --ssl_keyfile_password_file"
            raise UserError(f"{came} are given; expected one of them")
        names = self.served_model_name
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"--served_model_name is {names}; expected different names")
