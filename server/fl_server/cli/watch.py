"""`fl-admin runs watch`: a live line on a terminal, one line for each event otherwise."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

QUIET = frozenset({"launched", "reply-ok"})


def _line(event: pb.Event) -> str:
    where = f" {event.site}" if event.site else ""
    what = event.message or event.kind
    return f"{event.run}:{where} {event.kind.removeprefix('reply-')}: {what}" if where else f"{event.run}: {what}"


def watch(stub: ControlStub, run: str, *, quiet: bool = False) -> pb.Run:
    """Print events (unless `quiet`) until the run has ended; the run as it is then. Ctrl-C leaves the run going."""
    shown: pb.Run = stub.ShowRun(pb.RunRequest(run=run))
    events: Iterator[pb.Event] = stub.WatchRun(pb.WatchRunRequest(run=run, after=0))
    try:
        if quiet:
            for _event in events:
                pass
        elif sys.stdout.isatty():
            _live(events, shown)
        else:
            for event in events:
                if event.kind not in QUIET:
                    print(_line(event), flush=True)
    except KeyboardInterrupt:
        print(f"\nno longer watching; run {run} goes on (`fl-admin runs stop {run}` ends it)", file=sys.stderr)
        raise
    ended: pb.Run = stub.ShowRun(pb.RunRequest(run=run))
    return ended


def _live(events: Iterator[pb.Event], run: pb.Run) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console()) as progress:
        task = progress.add_task(run.run, total=run.rounds)
        answered: set[str] = set()
        for event in events:
            if event.kind == "round-started":
                answered.clear()
            elif event.kind.startswith("reply-"):
                answered.add(event.site)
            if event.kind == "round-committed":
                progress.update(task, completed=event.round)
            elif event.kind not in QUIET and event.kind != "round-started":
                progress.console.print(_line(event), markup=False)
            progress.update(task, description=f"{run.run}  {len(answered)} of {len(run.sites)} sites")
