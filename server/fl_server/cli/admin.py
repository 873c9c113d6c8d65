"""`fl-admin`: invite sites, launch and follow runs, fetch adapters."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fl_server import __version__
from fl_server.cli.connection import Profile, control
from fl_server.cli.show import moment, plain, print_json, run_plain, run_text, table
from fl_server.cli.watch import watch
from fl_server.files import write_durably
from fl_shared.adapter import digest
from fl_shared.errors import ConfigError, TransportError, cli_main
from fl_shared.manifest import RunSpec
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

EXAMPLES = """examples:
  fl-admin sites invite hospital-001
  fl-admin runs launch hospital.toml --watch
  fl-admin runs show hospital-demo --json
  fl-admin adapters export hospital-demo --out hospital.safetensors

$FL_ADMIN_PROFILE stands for --profile; without both it is admin/admin.toml in the coordinator's home.
"""
_FAILED = 18
_DAY_S = 86_400.0

Handler = Callable[[ControlStub, argparse.Namespace], int]


def _invite(stub: ControlStub, arguments: argparse.Namespace) -> int:
    made = stub.InviteSite(pb.InviteSiteRequest(site=arguments.site, ttl_s=arguments.days * _DAY_S))
    if arguments.json:
        print_json(plain(made))
    else:
        print(made.token)
        print(f"valid once, until {moment(made.expires_at)}; hand it to {made.site} by a safe way", file=sys.stderr)
    return 0


def _sites(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.ListSites(pb.ListSitesRequest())
    if arguments.json:
        print_json({"sites": [plain(site) for site in reply.sites]})
        return 0
    table(
        ["site", "state", "online", "last seen", "certificate until"],
        [
            [each.site, each.state, "yes" if each.online else "no", moment(each.last_seen_at),
             moment(each.certificate_expires_at)]
            for each in reply.sites
        ],
    )  # fmt: skip
    return 0


def _print_site(site: pb.Site, as_json: bool) -> int:
    if as_json:
        print_json(plain(site))
    else:
        for name, value in plain(site).items():
            print(f"{name:<24} {moment(float(value)) if name.endswith('_at') else value}")
    return 0


def _show_site(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_site(stub.ShowSite(pb.SiteRequest(site=arguments.site)), arguments.json)


def _revoke(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_site(stub.RevokeSite(pb.SiteRequest(site=arguments.site)), arguments.json)


def _launch(stub: ControlStub, arguments: argparse.Namespace) -> int:
    RunSpec.from_toml(arguments.spec)  # names the file in its errors; the coordinator checks again
    run = stub.LaunchRun(pb.LaunchRunRequest(spec_toml=arguments.spec.read_text("utf-8")))
    if arguments.watch:
        return _watched(stub, run.run, arguments.json)
    if arguments.json:
        print_json(run_plain(run))
    else:
        print(f"launched {run.run}: {run.rounds} rounds with {len(run.sites)} sites")
        print(f"next: fl-admin runs watch {run.run}")
    return 0


def _runs(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.ListRuns(pb.ListRunsRequest())
    if arguments.json:
        print_json({"runs": [run_plain(run) for run in reply.runs]})
        return 0
    table(
        ["run", "state", "rounds", "sites", "launched", "reason"],
        [
            [each.run, each.state, f"{each.rounds_committed}/{each.rounds}", str(len(each.sites)),
             moment(each.created_at), each.reason[:80]]
            for each in reply.runs
        ],
    )  # fmt: skip
    return 0


def _print_run(run: pb.Run, as_json: bool) -> int:
    if as_json:
        print_json(run_plain(run))
    else:
        run_text(run)
    return 0


def _show_run(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_run(stub.ShowRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _watched(stub: ControlStub, run: str, as_json: bool) -> int:
    ended = watch(stub, run)
    _print_run(ended, as_json)
    return 0 if ended.state == "completed" else _FAILED


def _watch(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _watched(stub, arguments.run, arguments.json)


def _stop(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_run(stub.StopRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _pause(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_run(stub.PauseRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _resume(stub: ControlStub, arguments: argparse.Namespace) -> int:
    return _print_run(stub.ResumeRun(pb.RunRequest(run=arguments.run)), arguments.json)


def _adapters(stub: ControlStub, arguments: argparse.Namespace) -> int:
    reply = stub.ListAdapters(pb.ListAdaptersRequest(run=arguments.run))
    if arguments.json:
        print_json({"adapters": [plain(each) for each in reply.adapters]})
        return 0
    table(
        ["round", "bytes", "committed", "digest"],
        [[str(a.round), str(a.bytes), moment(a.committed_at), a.digest] for a in reply.adapters],
    )
    return 0


def _export(stub: ControlStub, arguments: argparse.Namespace) -> int:
    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f"{out} exists", fix="choose another --out, or add --force")
    described = pb.Adapter()
    data = bytearray()
    for chunk in stub.GetAdapter(pb.GetAdapterRequest(run=arguments.run, round=arguments.round)):
        if chunk.HasField("adapter"):
            described.CopyFrom(chunk.adapter)
        data += chunk.data
    if digest(bytes(data)) != described.digest:
        raise TransportError("the adapter did not arrive whole", fix="export it again")
    try:
        write_durably(out, bytes(data), mode=0o644)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}", fix="choose another --out") from error
    if arguments.json:
        print_json(plain(described) | {"file": str(out)})
    else:
        print(f"wrote {out}: round {described.round} of {described.run}, {described.bytes} bytes")
        print(described.digest)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fl-admin", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"concordat {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--profile", type=Path, default=None, help="the admin profile (admin.toml)")
    common.add_argument("--json", action="store_true", help="print one JSON object")
    groups = parser.add_subparsers(dest="group", required=True, metavar="sites|runs|adapters")

    def verbs(group: str, text: str) -> Callable[..., argparse.ArgumentParser]:
        made = groups.add_parser(group, help=text)
        inner = made.add_subparsers(dest="verb", required=True, metavar="VERB")

        def add(name: str, handler: Handler, text: str, *names: str) -> argparse.ArgumentParser:
            verb = inner.add_parser(name, parents=[common], help=text, description=text)
            for each in names:
                verb.add_argument(each)
            verb.set_defaults(handler=handler)
            return verb

        return add

    sites = verbs("sites", "who may take part")
    invite = sites("invite", _invite, "print a one-time enrolment token", "site")
    invite.add_argument("--days", type=float, default=7.0, help="how long the token is valid")
    sites("list", _sites, "every site and its state")
    sites("show", _show_site, "one site with its fingerprints", "site")
    sites("revoke", _revoke, "shut a site out from its next request on", "site")
    runs = verbs("runs", "launch and follow runs")
    launch = runs("launch", _launch, "launch a run from a spec file")
    launch.add_argument("spec", type=Path, help="the run spec, a TOML file")
    launch.add_argument("--watch", action="store_true", help="follow it to its end")
    runs("list", _runs, "every run, the newest first")
    runs("show", _show_run, "one run with every round and reply", "run")
    runs("watch", _watch, "follow a run; Ctrl-C leaves it going", "run")
    runs("stop", _stop, "end a run; its committed rounds stay", "run")
    runs("pause", _pause, "hold a run; the round under way is taken up again on resume", "run")
    runs("resume", _resume, "carry a paused, stopped or failed run on from its last committed round", "run")
    adapters = verbs("adapters", "the committed adapters")
    adapters("list", _adapters, "the adapters of a run", "run")
    export = adapters("export", _export, "write a committed adapter to a file", "run")
    export.add_argument("--out", type=Path, required=True, help="the file to write (safetensors)")
    export.add_argument("--round", type=int, default=0, help="the round; the last committed one by default")
    export.add_argument("--force", action="store_true", help="replace the file")
    return parser


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    handler: Handler = arguments.handler
    with control(Profile.find(arguments.profile)) as stub:
        return handler(stub, arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-admin`."""
    return cli_main(_run, argv)


if __name__ == "__main__":
    sys.exit(main())
