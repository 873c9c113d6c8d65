"""`fl-admin runs watch`: every site's part in the round on a terminal, one line for each event otherwise."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fl_server.cli.show import event_json, run_plain, run_text
from fl_shared.errors import printable
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

FAILED = 18
QUIET = frozenset({"launched"})
_WORDS = {"site-asked": "at work", "order-lost": "off line", "reply-ok": "replied"}


def _line(event: pb.Event) -> str:
    where = f" {event.site}" if event.site else ""
    message = event.message or event.kind
    text = f"{event.run}:{where} {event.kind.removeprefix('reply-')}: {message}" if where else f"{event.run}: {message}"
    return printable(text)


@dataclass
class Sites:
    """What each site has done in the round that is under way, as far as the coordinator knows."""

    names: list[str]
    round: int = 0
    committed: int = 0
    done: dict[str, tuple[str, float]] = field(default_factory=dict)

    def take(self, event: pb.Event) -> None:
        """Follow one event."""
        if event.kind == "round-started":
            self.round, self.done = event.round, {}
        elif event.kind == "round-committed":
            self.committed = event.round
        elif event.site and (event.kind in _WORDS or event.kind.startswith("reply-")):
            word = _WORDS.get(event.kind, event.kind.removeprefix("reply-"))
            more = f": {event.message}" if event.message and event.kind.startswith("reply-") else ""
            self.done[event.site] = (printable(word + more), event.at)

    def rows(self, now: float) -> list[tuple[str, str, str]]:
        """Site, what it does, since when; a site without an order waits for one."""
        rows = []
        for name in self.names:
            word, at = self.done.get(name, ("not asked yet", 0.0))
            rows.append((name, word, f"{max(0.0, now - at):.0f} s" if at and word == "at work" else ""))
        return rows


def watch(stub: ControlStub, run: str, *, as_json: bool = False) -> pb.Run:
    """Print events as they come until the run has ended; the run as it is then. Ctrl-C leaves the run going."""
    view: pb.Run = stub.ShowRun(pb.RunRequest(run=run))
    events: Iterator[pb.Event] = stub.WatchRun(pb.WatchRunRequest(run=run, after=0))
    try:
        if as_json:
            for event in events:
                print(event_json(event), flush=True)
        elif sys.stdout.isatty():
            _live(events, view)
        else:
            for event in events:
                if event.kind not in QUIET:
                    print(_line(event), flush=True)
    except KeyboardInterrupt:
        print(f"\nno longer watching; run {run} goes on (`fl-admin runs stop {run}` ends it)", file=sys.stderr)
        raise
    ended: pb.Run = stub.ShowRun(pb.RunRequest(run=run))
    return ended


def follow(stub: ControlStub, run: str, *, as_json: bool = False) -> int:
    """Watch a run and print it as it ends; the exit code, `FAILED` when it did not complete."""
    ended = watch(stub, run, as_json=as_json)
    if as_json:
        print(json.dumps(run_plain(ended), sort_keys=True), flush=True)
    else:
        run_text(ended)
    return 0 if ended.state == "completed" else FAILED


def _live(events: Iterator[pb.Event], run: pb.Run) -> None:
    sites = Sites(list(run.sites))

    def picture() -> RenderableType:
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(run.rounds, sites.committed, width=30)
        head.add_row(run.run, bar, f"{sites.committed}/{run.rounds} rounds")
        table = Table.grid(padding=(0, 2))
        for row in sites.rows(time.time()):
            table.add_row("", *map(Text, row))
        return Group(head, table)

    with Live(get_renderable=picture, console=Console(), refresh_per_second=2, transient=True) as live:
        for event in events:
            sites.take(event)
            if event.kind not in QUIET and event.kind not in ("round-started", "site-asked", "reply-ok"):
                live.console.print(_line(event), markup=False)
