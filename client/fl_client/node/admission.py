"""Accept connections up to a limit: further ones wait, and use up nobody's descriptors."""

from __future__ import annotations

import asyncio
import resource
import socket
from collections.abc import Awaitable, Callable

_PAUSE_S = 0.5


def raise_file_limit() -> None:
    """Let the keeper have as many descriptors as the system allows it; it imports nothing of `fl_shared`."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def admit(listener: socket.socket, most: int, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Accept for ever, at most `most` at a time; `serve` has a connection until it returns, and closes it.

    Further ones wait in the kernel's queue. asyncio's own servers take all that come, and fill the log when no
    descriptor is left.
    """
    slots = asyncio.Semaphore(most)
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    serving: set[asyncio.Task[None]] = set()

    async def serve_one(arrived: socket.socket) -> None:
        try:
            await serve(arrived)
        except* OSError:
            pass  # a connection that breaks is over
        finally:
            slots.release()

    while True:
        await slots.acquire()
        try:
            arrived, _ = await loop.sock_accept(listener)
        except OSError:
            if listener.fileno() < 0:
                raise
            slots.release()
            await asyncio.sleep(_PAUSE_S)
            continue
        task = asyncio.create_task(serve_one(arrived))
        serving.add(task)
        task.add_done_callback(serving.discard)
