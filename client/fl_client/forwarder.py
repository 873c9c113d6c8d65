"""Carry connections out of the untrusted half's namespaces: to the tunnel, to the agent, and nowhere else.

The keeper runs it outside. It gets sockets that listen inside, each with the one address that it leads to; what the
other side says chooses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

MAX_CONNECTIONS = 256
_BLOCK = 1 << 16

Target = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


def forward(listeners: list[tuple[socket.socket, Target]]) -> None:
    """Serve the listeners in a thread of their own until the process ends."""
    threading.Thread(target=lambda: asyncio.run(_serve(listeners)), name="forwarder", daemon=True).start()


async def _serve(listeners: list[tuple[socket.socket, Target]]) -> None:
    places = asyncio.Semaphore(MAX_CONNECTIONS)

    def handler(target: Target):  # type: ignore[no-untyped-def]  # a coroutine function of asyncio's own form
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async with places:
                with contextlib.suppress(OSError):
                    await _carry(reader, writer, target)
            writer.close()

        return connected

    for listener, target in listeners:
        start = asyncio.start_unix_server if isinstance(target, str) else asyncio.start_server
        await start(handler(target), sock=listener)
    await asyncio.Event().wait()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target) -> None:
    if isinstance(target, str):
        far_reader, far_writer = await asyncio.open_unix_connection(target)
    else:
        far_reader, far_writer = await asyncio.open_connection(*target)
    try:
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
    finally:
        far_writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass bytes on until the source ends, and then the end."""
    while block := await source.read(_BLOCK):
        sink.write(block)
        await sink.drain()
    with contextlib.suppress(OSError):
        sink.write_eof()
