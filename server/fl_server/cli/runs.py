"""`fl-admin runs`: launch and follow runs. `plan` has a file of its own."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fl_server.cli import complete, plan
from fl_server.cli.show import event_json, event_text, moment, print_json, run_plain, run_text
from fl_server.cli.verbs import Handler, add_group, add_verb, argument
from fl_server.cli.watch import watch
from fl_shared.cli.console import command, table
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

_FAILED = 18


def add(groups: Any) -> None:
    """Add the group."""
    verbs = add_group(groups, "runs", "plan, launch and follow runs")
    plan.add(verbs)
    launch = add_verb(
        verbs, "launch", _launch, "launch a run from a spec file",
        more="Refused when the spec does not fit the base model that a site has announced (`sites list --json`). A "
        "site that has announced none yet is named in a warning; it refuses by itself what does not fit.",
        examples="fl-admin runs launch hospital.toml\nfl-admin runs launch hospital.toml --watch\n"
        "fl-admin runs launch hospital.toml --force",
    )  # fmt: skip
    argument(launch, "spec", metavar="SPEC.toml", completer=complete.specs, help="the run spec (docs/architecture.md)")
    launch.add_argument("--watch", action="store_true", help="follow it to its end")
    launch.add_argument("--force", action="store_true", help="launch though the spec does not fit a site's base model")
    add_verb(verbs, "list", _list, "every run, the newest first", examples="fl-admin runs list")

    def on_run(name: str, handler: Handler, summary: str, examples: str, more: str = "") -> argparse.ArgumentParser:
        made = add_verb(verbs, name, handler, summary, examples=examples, more=more)
        argument(made, "run", metavar="RUN", completer=complete.runs)
        return made

    on_run("show", _show, "one run with every round and reply", "fl-admin runs show demo --json")
    on_run(
        "watch", _watch, "follow a run to its end", "fl-admin runs watch demo",
        "Ctrl-C leaves the run going. Exit code 18 when it does not complete. With --json one JSON object a line as it "
        "happens; the last is the run (`state`, and no `kind`).",
    )  # fmt: skip
    logs = on_run(
        "logs", _logs, "what happened in a run: one line for each event",
        "fl-admin runs logs demo\nfl-admin runs logs demo --site hospital-001 --json\nfl-admin runs logs demo --follow",
        "With --json one JSON object a line.",
    )  # fmt: skip
    logs.add_argument("--follow", action="store_true", help="go on until the run has ended")
    argument(logs, "--site", metavar="SITE", default="", completer=complete.sites, help="only what concerns this site")
    on_run("stop", _stop, "end a run", "fl-admin runs stop demo", "Its committed rounds stay; it can be resumed.")
    on_run("pause", _pause, "hold a run", "fl-admin runs pause demo", "A round under way is done again on resume.")
    on_run(
        "resume", _resume, "carry a paused, stopped or failed run on from its last committed round",
        "fl-admin runs resume demo",
    )  # fmt: skip


def _launch(stub: ControlStub, arguments: argparse.Namespace) -> int:
    run = stub.LaunchRun(pb.LaunchRunRequest(spec_toml=plan.spec_text(arguments.spec), force=arguments.force))
    for warning in run.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if arguments.watch:
        return _watched(stub, run.run, arguments.json)
    if arguments.json:
        print_json(run_plain(run))
    else:
        print(f"launched {run.run}: {run.rounds} rounds with {len(run.sites)} sites")
        print(f"next: {command('fl-admin', 'runs', 'watch', run.run)}")
    return 0


def _list(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.ListRuns(pb.ListRunsRequest())
    if arguments.json:
        print_json({"runs": [run_plain(run) for run in reply.runs]})
        return 0
    table(
        ["run", "state", "rounds", "sites", "launched", "reason"],
        [
            [each.run, each.state, f"{each.rounds_committed}/{each.rounds}", str(len(each.sites)),
             moment(each.created_at), each.reason]
            for each in reply.runs
        ],
    )  # fmt: skip
    return 0


def _print(run: pb.Run, as_json: bool) -> int:
    if as_json:
        print_json(run_plain(run))
    else:
        run_text(run)
    return 0


def _show(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print(stub.ShowRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _watched(stub: ControlStub, run: str, as_json: bool) -> int:
    ended = watch(stub, run, as_json=as_json)
    if as_json:
        print(json.dumps(run_plain(ended), sort_keys=True), flush=True)
    else:
        run_text(ended)
    return 0 if ended.state == "completed" else _FAILED


def _watch(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _watched(stub, arguments.run, arguments.json)


def _logs(stub: ControlStub, arguments: argparse.Namespace) -> int:
    request = pb.WatchRunRequest(run=arguments.run, until_now=not arguments.follow, site=arguments.site)
    for event in stub.WatchRun(request):
        print(event_json(event) if arguments.json else event_text(event), flush=True)
    return 0


def _stop(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print(stub.StopRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _pause(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print(stub.PauseRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _resume(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print(stub.ResumeRun(pb.RunRequest(run=arguments.run)), arguments.json)
