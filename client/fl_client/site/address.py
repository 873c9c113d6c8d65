"""The coordinator's address as a person writes it: `https://HOST:PORT`, and what is wrong with anything else."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from fl_shared.errors import ConfigError, EnrolmentError, shown
from fl_shared.wire.hosts import host_and_port, host_name

EXAMPLE = "https://coordinator.example:9443"


def server_url(text: str) -> str:
    """Return `https://HOST:PORT`, the host in lower case; EnrolmentError names what is wrong with another form."""
    if not text or text != text.strip() or not text.isprintable():
        raise _wrong(text, "is empty, or holds a space or a control character")
    scheme, mark, rest = text.partition("://")
    if not mark:
        raise _wrong(text, "does not begin with https://", f"https://{text}")
    if scheme.lower() != "https":
        raise _wrong(text, f"begins with {scheme}://, and the gateway speaks TLS alone", f"https://{rest}")
    place, slash, path = re.sub(r"[?#]", r"/\g<0>", rest, count=1).partition("/")
    if "@" in place:
        raise _wrong(text, "names a user; a site is known by its certificate alone", f"https://{place.split('@')[-1]}")
    if slash and path:
        raise _wrong(text, f"goes on after the port: {shown('/' + path)}", f"https://{place}")
    host, port = _parts(text, place)
    return f"https://{host_and_port(host, port)}"


def _parts(text: str, place: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`."""
    if place.count(":") > 1 and not place.startswith("["):
        raise _wrong(text, "holds an IPv6 address without brackets", "https://[2001:db8::1]:9443")
    try:
        parts = urlsplit(f"https://{place}")
        host = parts.hostname or ""
    except ValueError:
        raise _wrong(text, "holds brackets that enclose no IPv6 address", "https://[2001:db8::1]:9443") from None
    if not host:
        raise _wrong(text, "names no host")
    host = _check_host(text, host)
    try:
        port = parts.port
    except ValueError:
        raise _wrong(text, "has a port that is no number from 1 to 65535") from None
    if port is None:
        raise _wrong(text, "names no port; the gateway's is 9443 unless its administrator chose another",
                     f"https://{place.rstrip(':')}:9443")  # fmt: skip
    if port == 0:
        raise _wrong(text, "has a port that is no number from 1 to 65535")
    return host, port


def _check_host(text: str, host: str) -> str:
    """The host as `host_name` writes it; the forms that a certificate cannot name have a fault of their own."""
    if "%" in host:
        raise _wrong(text, "holds an IPv6 address with a zone, which no certificate can name")
    if host and not host.isascii():
        raise EnrolmentError(
            f"server {shown(text)} holds {shown(host)}, whose letters may be taken for others",
            fix="write the name in its ASCII form (xn--…), as the coordinator's certificate has it",
        )
    try:
        return host_name(host)
    except ConfigError as error:
        raise EnrolmentError(f"server {shown(text)}: {error.message}", fix=error.fix) from None


def _wrong(text: str, why: str, better: str = EXAMPLE) -> EnrolmentError:
    """What to raise; the fix shows `better` when that is an address, and an example otherwise."""
    text = re.sub(r"[^/]*@", "…@", text)  # what comes before the @ may be a password
    if better != EXAMPLE:
        try:
            better = server_url(better)
        except EnrolmentError:
            better = EXAMPLE
    return EnrolmentError(
        f"server {shown(text)} {why}: it is not an address of the form https://HOST:PORT",
        fix=f"give the coordinator's gateway, e.g. --server {better}",
    )
