"""The interface to the other machines, among those that lead nowhere."""

from __future__ import annotations

import pytest

from qwen_ds import network

# A machine with docker and a bridge for virtual machines, 10.0.0.0/24 on one cable.
INTERFACES = {
    "127.0.0.1": "lo", "172.17.0.1": "docker0", "192.168.122.1": "virbr0", "10.0.0.7": "ens3f0",
    "198.51.100.7": "eno1",
}  # fmt: skip
ROUTES = {"gpu08": "10.0.0.7", "gpu07": "127.0.0.1", "203.0.113.1": "198.51.100.7"}


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This machine's own address on the way to each host that it can reach."""
    found = dict(ROUTES)
    monkeypatch.setattr(network, "addresses", lambda: INTERFACES)
    monkeypatch.setattr(network, "local_address_to", found.get)
    return found


def test_the_interface_is_that_of_the_route(routes: dict[str, str]) -> None:
    assert network.interface_to("gpu08") == "ens3f0"
    # Debian gives a machine's own name a loopback address.
    for host in ("gpu07", "unknown"):
        assert network.interface_to(host) == "eno1", "that of the default route"
    del routes["203.0.113.1"]
    assert network.interface_to("gpu07") is None


def test_addresses_and_routes_are_those_of_the_kernel() -> None:
    """Loopback is what every machine has."""
    assert network.addresses()["127.0.0.1"] == "lo"
    assert network.local_address_to("127.0.0.1") == "127.0.0.1"
    assert network.local_address_to("no-such-host.invalid") is None
