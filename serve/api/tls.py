"""https: the server's certificate and key, and the authorities of its clients' certificates."""

from __future__ import annotations

import ssl
from pathlib import Path

from qwen_ds.disk.read import read_bytes, read_text
from qwen_ds.errors import UserError
from serve.api.options import ApiOptions

_PEM_BYTES = 1 << 20
_EXPECTED = "a file in PEM"
_MOST_PASSWORD_BYTES = 1024  # OpenSSL's own limit


def tls_context(options: ApiOptions) -> ssl.SSLContext | None:
    """The settings of https; None: the server speaks plain HTTP.

    UserError: the option and the file that is to blame. Nobody is asked for a password.
    """
    if options.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _require_certificates("--ssl_certfile", options.ssl_certfile)
    _load_key(context, options, options.ssl_certfile)
    if options.ssl_ca_certs is not None:
        _require_certificates("--ssl_ca_certs", options.ssl_ca_certs)
        context.load_verify_locations(options.ssl_ca_certs)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _require_certificates(option: str, file: str) -> None:
    _require_readable(option, file)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:  # an ssl.SSLError is one
        raise UserError(f"{option} {file}: {_why(error)}; expected certificates in PEM") from None


def _load_key(context: ssl.SSLContext, options: ApiOptions, certificate: str) -> None:
    file, place = options.ssl_keyfile, f"--ssl_keyfile {options.ssl_keyfile}"
    if file is None:
        file, place = certificate, f"--ssl_certfile {certificate}"
    else:
        _require_readable("--ssl_keyfile", file)
    given, is_asked_for = _password(options), False

    def password() -> bytes:
        nonlocal is_asked_for
        is_asked_for = True
        return given or b""

    try:
        context.load_cert_chain(certificate, file, password)
    except OSError as error:
        if isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH":
            why = f"not the key of {certificate}"
        elif is_asked_for and given is None:
            why = "the key is encrypted; expected --ssl_keyfile_password_file"
        elif is_asked_for:
            why = "the password does not open the key; expected its own"
        else:
            why = f"{_why(error)}; expected the certificate's private key in PEM"
        raise UserError(f"{place}: {why}") from None


def _password(options: ApiOptions) -> bytes | None:
    place, given = "--ssl_keyfile_password", options.ssl_keyfile_password
    if options.ssl_keyfile_password_file is not None:
        place = f"--ssl_keyfile_password_file {options.ssl_keyfile_password_file}"
        text = read_text(Path(options.ssl_keyfile_password_file), _PEM_BYTES)
        given = text.removeprefix("\ufeff").partition("\n")[0].rstrip("\r")
    if given is None:
        return None
    if not 0 < len(given.encode()) <= _MOST_PASSWORD_BYTES:
        came = f"{len(given.encode()):,} bytes"
        raise UserError(f"{place}: {came}; expected 1 to {_MOST_PASSWORD_BYTES:,}")
    return given.encode()


def _require_readable(option: str, file: str) -> None:
    try:
        read_bytes(Path(file), _PEM_BYTES, _EXPECTED)
    except UserError as error:
        raise UserError(f"{option} {error}") from None


def _why(error: Exception) -> str:
    """An error of OpenSSL without its place in OpenSSL's source."""
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return (reason or str(error)).replace("_", " ").lower()
