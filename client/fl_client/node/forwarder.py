"""Carry connections out of the untrusted half's namespaces: to the tunnel, to the agent, and nowhere else.

The keeper runs it outside. It gets sockets that listen inside, each with the one address that it leads to; what the
other side says chooses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading

from fl_client.node.admission import admit

MAX_CONNECTIONS = 100
"""For each listener; each takes two descriptors, and a process often has no more than 1024."""
_BLOCK = 1 << 16

Target = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


def forward(listeners: list[tuple[socket.socket, Target]]) -> None:
    """Serve the listeners in a thread of their own until the process ends.

    Whatever ends the thread ends the process, too, by SIGTERM: whoever keeps it starts the next.
    """

    def serve() -> None:
        try:
            asyncio.run(_serve(listeners))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the doors are shut from now on
            print(f"the connections to tunnel and agent ended: {error}", file=sys.stderr, flush=True)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=serve, name="forwarder", daemon=True).start()


async def _serve(listeners: list[tuple[socket.socket, Target]]) -> None:
    async with asyncio.TaskGroup() as group:
        for listener, target in listeners:
            group.create_task(_forward(listener, target))


async def _forward(listener: socket.socket, target: Target) -> None:
    await admit(listener, MAX_CONNECTIONS, lambda arrived: _carry(arrived, target))


async def _carry(arrived: socket.socket, target: Target) -> None:
    reader, writer = await asyncio.open_connection(sock=arrived)
    try:
        if isinstance(target, str):
            far_reader, far_writer = await asyncio.open_unix_connection(target)
        else:
            far_reader, far_writer = await asyncio.open_connection(*target)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(_pump(reader, far_writer))
                both.create_task(_pump(far_reader, writer))
        finally:
            far_writer.close()
    finally:
        writer.close()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Pass bytes on until the source ends, and then the end."""
    while block := await source.read(_BLOCK):
        sink.write(block)
        await sink.drain()
    with contextlib.suppress(OSError):
        sink.write_eof()
