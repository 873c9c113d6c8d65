"""Pulls replies from Flower without waiting for one that never becomes complete.

Flower hands a reply over as soon as it is announced, and then waits for all of its parts: three minutes for a
SuperNode that died while it was sending, hours for one that dawdles on purpose. Neither may hold up the other
sites or the deadline, so such a wait goes on in a thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

STALL_S = 3.0  # a SuperNode that comes back is off line for 6 s, which the round must not miss
GROUPS = 32


class _Pull(threading.Thread):
    """One request for the replies to some orders."""

    def __init__(self, grid: Grid, orders: Sequence[str]) -> None:
        super().__init__(daemon=True)
        self.orders = frozenset(orders)
        self._grid = grid
        self._found: list[Message] = []
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._found = list(self._grid.pull_messages(list(self.orders)))
        except Exception as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error

    def result(self) -> Iterator[Message]:
        """The replies, each let go of as it is handed out; raises what the request raised."""
        if self._error is not None:
            raise self._error
        while self._found:
            yield self._found.pop(0)


class Inbox:
    """Replies to orders, as they become whole; requests go out one after another, so memory stays that of one."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._stalled: list[_Pull] = []

    def take(self, orders: Sequence[str], most: int = 1) -> Iterator[Message]:
        """What has come in reply to these orders, at most `most` in one request.

        Waits `STALL_S` for a request; one that takes longer goes on by itself, and its replies come with a
        later call. Until then nothing else of that request comes, so requests stay small.
        """
        for pull in [pull for pull in self._stalled if not pull.is_alive()]:
            self._stalled.remove(pull)
            yield from pull.result()
        waiting = frozenset().union(*(pull.orders for pull in self._stalled))
        free = [order for order in orders if order not in waiting]
        size = max(1, min(most, len(free) // GROUPS))
        for start in range(0, len(free), size):
            pull = _Pull(self._grid, free[start : start + size])
            pull.start()
            pull.join(STALL_S)
            if pull.is_alive():
                self._stalled.append(pull)
            else:
                yield from pull.result()
