"""Messages between the agent and its ranks over a Unix socket: a JSON head and a payload of tensors.

Nothing is pickled: a rank runs no code that a message brings.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

from fl_shared.errors import EngineError

_SIZES = struct.Struct(">QQ")
_MOST_TEXT, _MOST = 64 << 20, 1 << 36
_BLOCK = 1 << 20


def send(channel: socket.socket, head: dict[str, Any], payload: bytes = b"") -> None:
    """Send one message; OSError when the other side is gone."""
    text = json.dumps(head, allow_nan=False).encode("utf-8")
    channel.sendall(_SIZES.pack(len(text), len(payload)) + text)
    channel.sendall(payload)


def receive(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
    """The next message; EOFError when the other side is gone, EngineError when it speaks something else."""
    text, payload = _SIZES.unpack(_exactly(channel, _SIZES.size))
    malformed = EngineError("a message between agent and ranks is malformed", fix="report this defect")
    if text > _MOST_TEXT or payload > _MOST:
        raise malformed
    try:
        head = json.loads(_exactly(channel, text))
    except (ValueError, RecursionError):
        raise malformed from None
    if not isinstance(head, dict):
        raise malformed
    return head, _exactly(channel, payload)


def _exactly(channel: socket.socket, size: int) -> bytes:
    content = bytearray()
    while len(content) < size:
        try:
            block = channel.recv(min(_BLOCK, size - len(content)))
        except ConnectionResetError as error:
            raise EOFError from error
        if not block:
            raise EOFError
        content += block
    return bytes(content)
