"""A network namespace of one's own in which every packet that leaves loopback is seen and goes nowhere.

`enter` is called in a process that `unshare --net --mount` has started: it brings loopback up, sends every other
address into a TUN device, and names a resolver there. A name that is looked up or an address that is dialled
becomes a packet that `Recorder` writes down. The addresses are those that documentation may use (RFC 5737, 3849).
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_TRANSPORT = {6: "tcp", 17: "udp"}
RESOLVER = "192.0.2.53"
ELSEWHERE = ("192.0.2.7", "2001:db8::7")


@dataclass
class Recorder:
    """Reads the device; `seen` holds `tcp 192.0.2.7:443` and the like, in order."""

    device: int
    seen: list[str] = field(default_factory=list)

    def start(self) -> None:
        """Read in a thread until the process ends."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            found = described(os.read(self.device, 65536))
            if found:
                self.seen.append(found)


def described(packet: bytes) -> str:
    """Protocol, address and port of a TCP or UDP packet; "" for what the kernel itself says (ICMPv6)."""
    if packet[0] >> 4 == 4:
        kind, at = packet[9], (packet[0] & 15) * 4
        to = str(ipaddress.IPv4Address(packet[16:20]))
    else:
        kind, at = packet[6], 40
        to = f"[{ipaddress.IPv6Address(packet[24:40])}]"
    if kind not in _TRANSPORT:
        return ""
    port = struct.unpack("!H", packet[at + 2 : at + 4])[0]
    return f"{_TRANSPORT[kind]} {to}:{port}"


def enter(folder: Path) -> Recorder:
    """Set the namespace up and start recording; subprocess.CalledProcessError when the kernel will not."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"out0", _IFF_TUN | _IFF_NO_PI))
    resolver = folder / "resolv.conf"
    resolver.write_text(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
    for line in (
        "ip link set lo up",
        "ip address add 192.0.2.1/24 dev out0",
        "ip link set out0 up",
        "ip route add default dev out0",
        "ip -6 address add 2001:db8::1/64 dev out0 nodad",
        "ip -6 route add default dev out0",
        "mount --make-rprivate /",
        f"mount --bind {resolver} /etc/resolv.conf",
    ):
        subprocess.run(line.split(), check=True, capture_output=True)
    recorder = Recorder(device)
    recorder.start()
    return recorder


def misbehave() -> None:
    """Look up a name and dial out, once each: what the recorder must see."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo("a-name.example", 443)
    for address in ELSEWHERE:
        with contextlib.suppress(OSError):
            socket.create_connection((address, 443), timeout=0.3)


if __name__ == "__main__":
    misbehave()
