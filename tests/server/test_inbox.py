"""Replies that never become whole hold up nobody else."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any, cast

import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from fl_server.rounds import inbox
from helpers.flower_messages import reply


class Slow:
    """Stands for Flower: a request that names a reply in `parts_missing` waits until that is whole."""

    def __init__(self, *nodes: int) -> None:
        self.replies = {f"order-{node}": reply({}, node) for node in nodes}
        self.parts_missing: dict[str, threading.Event] = {}
        self.requests: list[list[str]] = []

    def pull_messages(self, orders: Iterable[str]) -> list[Message]:
        asked = list(orders)
        self.requests.append(asked)
        found = [self.replies.pop(order) for order in asked if order in self.replies]
        for order in asked:
            if order in self.parts_missing:
                assert self.parts_missing[order].wait(30)
        return found


def _taken(box: inbox.Inbox, *orders: str, **more: Any) -> list[str]:
    return [message.metadata.reply_to_message_id for message in box.take(orders, **more)]


def test_a_reply_that_does_not_become_whole_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others come at once; the stalled one is not asked for twice, and comes when it is whole."""
    monkeypatch.setattr(inbox, "STALL_S", 0.2)
    grid = Slow(1, 2, 3)
    whole = grid.parts_missing["order-1"] = threading.Event()
    box = inbox.Inbox(cast(Grid, grid))
    assert _taken(box, "order-1", "order-2", "order-3") == ["order-2", "order-3"]
    assert _taken(box, "order-1") == []
    assert grid.requests.count(["order-1"]) == 1
    whole.set()
    box._stalled[0].join(30)
    assert _taken(box, "order-1") == ["order-1"]
    assert _taken(box, "order-1") == []


def test_requests_stay_small_and_within_what_memory_allows() -> None:
    """With many sites a request names several orders, but no more than asked for."""
    grid = Slow()
    box = inbox.Inbox(cast(Grid, grid))
    orders = [f"order-{number}" for number in range(320)]
    assert _taken(box, *orders, most=1000) == []
    assert [len(each) for each in grid.requests] == [10] * 32
    grid.requests.clear()
    assert _taken(box, *orders, most=4) == []
    assert {len(each) for each in grid.requests} == {4}


def test_what_a_request_raises_is_raised() -> None:
    """A SuperLink that is gone ends the ServerApp, as before."""

    class Gone:
        def pull_messages(self, _orders: Iterable[str]) -> list[Message]:
            raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        _taken(inbox.Inbox(cast(Grid, Gone())), "order-1")
