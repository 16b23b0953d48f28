"""The address that a server listens on, and the names that it goes by."""

from __future__ import annotations

import ipaddress
import re
import socket

from tap_eval.mistake import Mistake


class PortMistake(Mistake):
    """An address that cannot be listened on."""

    kind = "port"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, at a free port for port 0; raises `PortMistake`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]
        raise PortMistake(
            f"{host}:{port} cannot be listened on ({reason}): give another --port, 0 for a free one, or another --host."
        ) from error


def name_of(host: str) -> str:
    """The name or address in a `Host` header, without its port; empty where it holds anything else."""
    found = re.fullmatch(r"(\[[\da-f:.]+\]|[\w.-]+)(:\d*)?", host, re.ASCII | re.IGNORECASE)
    return found[1].strip("[]").lower() if found else ""


def is_address(host: str) -> bool:
    """Whether it is an IP address rather than a name, which somebody else may let resolve to this machine."""
    try:
        return bool(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own, which no other machine reaches."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
