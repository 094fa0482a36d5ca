"""https: answers come, no idle client holds up the end, and a mistake names its file."""

from __future__ import annotations

import ssl
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from qwen_ds.errors import UserError
from qwen_ds.recipe.parser import parse_options
from serve.api.options import ApiOptions
from serve.api.tls import tls_context
from tests.serve.api.running import running


def openssl(*words: str) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def pair(folder: Path, name: str, *more: str) -> tuple[str, str]:
    """A certificate that signs itself, and its key."""
    certificate, key = folder / f"{name}.pem", folder / f"{name}-key.pem"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    openssl(
        "req", "-x509", *curve, "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        "-keyout", str(key), "-out", str(certificate), *(more or ("-nodes",)),
    )  # fmt: skip
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    found = {}
    for name in ("ours", "other"):
        found[name], found[f"{name}-key"] = pair(folder, name)
    found["locked"], found["locked-key"] = pair(folder, "locked", "-passout", "pass:open sesame")
    texts = {
        "both": "".join(Path(found[name]).read_text() for name in ("ours", "ours-key")),
        "text": "no PEM\n",
        "password": "open sesame\n",
        "wrong": "open barley\n",
        "empty": "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        found[name] = str(folder / name)
    found["none"] = str(folder / "none")
    return found


def context(files: dict[str, str], *words: str) -> ssl.SSLContext | None:
    """The context for options whose values are names of the files."""
    given = [files.get(word, word) for word in words]
    return tls_context(parse_options(ApiOptions, "", ["--model", "m", *given]))


def test_certificates_and_keys_are_taken_as_they_come(files: dict[str, str]) -> None:
    assert context(files) is None
    locked = ("--ssl_certfile", "locked", "--ssl_keyfile", "locked-key")
    for words in (
        ("--ssl_certfile", "ours", "--ssl_keyfile", "ours-key"),
        ("--ssl_certfile", "both"),
        (*locked, "--ssl_keyfile_password", "open sesame"),
        (*locked, "--ssl_keyfile_password_file", "password"),
    ):
        found = context(files, *words)
        assert found is not None and found.verify_mode == ssl.CERT_NONE
    found = context(files, "--ssl_certfile", "both", "--ssl_ca_certs", "other")
    assert found is not None and found.verify_mode == ssl.CERT_REQUIRED
    assert len(found.get_ca_certs()) == 1


@pytest.mark.parametrize(
    ("words", "option", "blamed", "why"),
    [
        ("--ssl_certfile none --ssl_keyfile ours-key", "--ssl_certfile", "none", "No such file"),
        ("--ssl_certfile ours --ssl_keyfile none", "--ssl_keyfile", "none", "No such file"),
        ("--ssl_certfile text --ssl_keyfile ours-key", "--ssl_certfile", "text", "certificates in"),
        ("--ssl_certfile ours --ssl_keyfile text", "--ssl_keyfile", "text", "private key in PEM"),
        ("--ssl_certfile ours --ssl_keyfile ours", "--ssl_keyfile", "ours", "private key in PEM"),
        ("--ssl_certfile ours-key", "--ssl_certfile", "ours-key", "certificates in PEM"),
        ("--ssl_certfile ours", "--ssl_certfile", "ours", "private key in PEM"),
        ("--ssl_certfile ours --ssl_keyfile other-key", "--ssl_keyfile", "other-key",
         "not the key"),
        ("--ssl_certfile locked --ssl_keyfile locked-key", "--ssl_keyfile", "locked-key",
         "encrypted; expected --ssl_keyfile_password_file"),
        ("--ssl_certfile locked --ssl_keyfile locked-key --ssl_keyfile_password_file wrong",
         "--ssl_keyfile", "locked-key", "does not open"),
        ("--ssl_certfile locked --ssl_keyfile locked-key --ssl_keyfile_password_file empty",
         "--ssl_keyfile_password_file", "empty", "0 bytes; expected 1 to 1,024"),
        ("--ssl_certfile both --ssl_ca_certs text", "--ssl_ca_certs", "text", "certificates in"),
        ("--ssl_certfile both --ssl_ca_certs none", "--ssl_ca_certs", "none", "No such file"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_option_and_the_file_to_blame(
    files: dict[str, str], words: str, option: str, blamed: str, why: str
) -> None:
    with pytest.raises(UserError, match=why) as error:
        context(files, *words.split())
    assert str(error.value).startswith(f"{option} {files[blamed]}: ")
    assert "\n" not in str(error.value) and "sesame" not in str(error.value)


@pytest.mark.job
def test_clients_show_a_certificate_where_one_is_asked_for_and_idle_ones_do_not_hold_up_the_end(
    small_dir: Path, files: dict[str, str]
) -> None:
    words = ["--model", str(small_dir), "--ssl_certfile", files["locked"]]
    words += ["--ssl_keyfile", files["locked-key"], "--ssl_ca_certs", files["other"]]
    words += ["--ssl_keyfile_password_file", files["password"], "--memory_gb", "0.1"]
    with running(*words) as server:
        assert server.url.startswith("https://")
        with pytest.raises(httpx.TransportError):
            server.client.get("/health")
        trusting = ssl.create_default_context(cafile=files["locked"])
        trusting.load_cert_chain(files["other"], files["other-key"])
        with httpx.Client(base_url=server.url, verify=trusting, timeout=60) as client:
            assert client.get("/health").status_code == 200  # its connection stays
            server.process.terminate()
            began = time.monotonic()
            assert server.process.wait(60) == 0
            # asyncio waits 30 s for the good-bye of each.
            assert time.monotonic() - began < 25
