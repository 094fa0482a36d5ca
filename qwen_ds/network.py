"""The network interface by which this machine reaches the others.

A machine has more interfaces than the one that leads to its peers: loopback, docker0, the bridges
of virtual machines. gloo takes the one that the machine's own name resolves to, which on Debian is
loopback, and NCCL any that has no name of docker's.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface
# Documentation's own addresses (RFC 5737, RFC 3849): the way out of this machine, if it has one.
_OUT = ("203.0.113.1", "2001:db8::1")


def interface_to(host: str) -> str | None:
    """The interface that leads to `host`, or the one of the default route where that is loopback or
    none; None where nothing leads out."""
    interfaces = addresses()
    for target in (host, *_OUT):
        address = local_address_to(target)
        if address and (name := interfaces.get(address)) and name != "lo":
            return name
    return None


def local_address_to(host: str) -> str | None:
    """This machine's own address on the way to `host`, by its routes: nothing is sent."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, _, _, place in found:
        try:
            with socket.socket(family, kind) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
        except OSError:  # no route
            continue
    return None


def addresses() -> dict[str, str]:
    """The interface of each address of this machine."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has none
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    table = Path("/proc/net/if_inet6")
    for line in table.read_text(encoding="ascii").splitlines() if table.is_file() else ():
        digits, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found
