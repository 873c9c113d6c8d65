"""Host names and addresses as people write them: checked once, here; and which of them no proxy may stand before."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from fl_shared.errors import ConfigError, shown

_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


def host_name(value: object, *, to_listen: bool = False) -> str:
    """A DNS name in lower case, or an IPv4 or IPv6 address without brackets.

    Args:
        value: what was written.
        to_listen: whether it may stand for every address (`0.0.0.0`, `::`).

    Raises:
        ConfigError: anything else, with the part that has to go.
    """
    text = value if isinstance(value, str) else ""
    bare = text.removeprefix("[").removesuffix("]") if text.startswith("[") and text.endswith("]") else text
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        address = None
    if address is not None and "%" not in bare:
        if address.is_unspecified and not to_listen:
            raise ConfigError(
                f"host {shown(value)} is an address to listen on, and none that anybody can reach",
                fix="write the name that sites use; --listen takes the address to listen on",
            )
        return str(address)
    name = text.lower()
    labels = name.split(".")
    if len(name) <= 253 and all(_LABEL.fullmatch(label) for label in labels) and not labels[-1].isdigit():
        return name
    raise ConfigError(f"host {shown(value)} is neither a name nor an address", fix=_what_to_write(text))


def _what_to_write(text: str) -> str:
    plain = "write a name such as coordinator.example, or an IP address"
    if not text.strip():
        return plain
    if not text.isascii():
        try:
            return f"write it in ASCII: {text.encode('idna').decode('ascii')}"
        except UnicodeError:
            return plain
    for sign, word in (("/", "the host alone, without https:// and path"), ("@", "the host alone, without a user")):
        if sign in text:
            return f"write {word}"
    if ":" in text:
        return "write the host alone; the port has an option and a field of its own"
    if text.endswith("."):
        return f"write it without the dot at the end: {text.rstrip('.')}"
    if "_" in text:
        return "write another name: host names have letters, digits and hyphens, no underscore"
    return plain


def host_and_port(host: str, port: int) -> str:
    """`host:port`, with brackets about an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether this host is this machine by its very name: localhost, 127.0.0.0/8 or ::1."""
    bare = host.removeprefix("[").removesuffix("]").partition("%")[0]
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return bare.lower().rstrip(".") == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def by_proxy(url: str) -> bool:
    """Whether a call to this address may go by the environment's proxy: never to this machine itself."""
    return not is_loopback(urlsplit(url).hostname or "localhost")


def is_proxy_variable(name: str) -> bool:
    """Whether an environment variable names a proxy, or an exception from one."""
    return name.lower().endswith("_proxy")
