"""Pages of other origins cannot use a server without keys."""

from __future__ import annotations

from typing import Any

import pytest

from serve.api.errors import ApiError
from serve.api.origins import require_own_page

JSON = {"content-type": "application/json; charset=utf-8"}
OWN = ["127.0.0.1:8044", "localhost:8044", "LOCALHOST", "[::1]:8044", "a.localhost", "127.9.9.9"]


def status(at: str | None, origins: list[str], headers: dict[str, str]) -> int:
    """The status by which a POST with these headers is refused, or 200."""
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope: dict[str, Any] = {"headers": raw, "method": "POST"}
    try:
        require_own_page(scope, at, origins)
    except ApiError as error:
        assert "expected" in error.message and len(error.message) < 300
        return error.status
    return 200


@pytest.mark.parametrize("host", OWN)
def test_its_own_page_and_clients_that_are_no_page_are_let_in(host: str) -> None:
    assert status("127.0.0.1", [], {"host": host}) == 200
    assert status("::1", [], {"host": host, "origin": f"http://{host.lower()}", **JSON}) == 200


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:8045", "file://", "http://[", "x" * 9999],
)
def test_pages_of_other_origins_are_let_in_by_name_alone(origin: str) -> None:
    headers = {"host": "127.0.0.1:8044", "origin": origin, **JSON}
    assert status("127.0.0.1", [], headers) == 403
    assert status("127.0.0.1", ["http://other.example"], headers) == 403
    assert status("127.0.0.1", [origin], headers) == status("127.0.0.1", ["*"], headers) == 200


@pytest.mark.parametrize("host", ["evil.example:8044", "127.0.0.1.evil.example", "10.0.0.1", "["])
def test_a_foreign_name_that_leads_to_this_machine_is_refused(host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", **JSON}
    for at in ("127.0.0.1", "::1", "localhost"):
        assert status(at, [], headers) == 403


def test_where_others_are_served_any_name_will_do_and_the_given_one_does() -> None:
    assert status("0.0.0.0", [], {"host": "gpu01:8044"}) == 200
    assert status(None, [], {"host": "gpu01:8044"}) == 200
    assert status("Localhost", [], {"host": "localhost:1"}) == 200


@pytest.mark.parametrize("kind", [{}, {"content-type": "text/plain"}])
def test_a_page_must_send_json_which_needs_a_preflight(kind: dict[str, str]) -> None:
    headers = {"host": "localhost", "origin": "http://localhost", **kind}
    assert status("127.0.0.1", [], headers) == 415
    del headers["origin"]
    assert status("127.0.0.1", [], headers) == 200
