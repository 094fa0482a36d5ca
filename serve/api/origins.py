"""Who may ask a server without keys: pages in a browser come from anywhere, and reach 127.0.0.1.

A foreign page can send a POST that needs no preflight; a name that leads to 127.0.0.1 (DNS
rebinding) makes its requests those of the server's own page. A key stops both.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import Scope

from serve.api.errors import ApiError, shortened


def require_own_page(scope: Scope, host: str | None, origins: Sequence[str]) -> None:
    """Let a request pass that no foreign page can have sent.

    ApiError: another Host (403) where `host`, at which we listen, is this machine's own; another
    Origin (403) than ours and `origins`; a page's POST without JSON's content type (415).
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    given = headers.get(b"host", "").lower()
    name = _name(given)
    is_ours = not given or name == (host or "").lower() or is_loopback(name)
    if host is not None and is_loopback(host) and not is_ours:
        came = f"Host is {shortened(given)}"
        raise ApiError(403, f"{came}; expected localhost or {host}, or keys (--api_key_file)")
    origin = headers.get(b"origin")
    if origin is None:
        return
    if origin not in origins and "*" not in origins and _place(origin) != given:
        came = f"Origin is {shortened(origin)}"
        raise ApiError(403, f"{came}; expected this server's own or one of --cors_origins")
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and kind != "application/json":
        raise ApiError(415, f"Content-Type is {shortened(kind)}; expected application/json")


def is_loopback(name: str) -> bool:
    """Whether it is a name or an address that leads to this machine alone."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def _name(host: str) -> str:
    """A Host without its port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str | None:
    """The Host that a page of this origin would have; None: it has none."""
    try:
        parts = urlsplit(origin.lower())
    except ValueError:
        return None
    return parts.netloc if parts.scheme in ("http", "https") and parts.netloc else None
