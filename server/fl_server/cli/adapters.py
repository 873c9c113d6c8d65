"""`fl-admin adapters`: the committed adapters, and the names under which they are released."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fl_server.cli import complete
from fl_server.cli.show import moment, plain, print_json
from fl_server.cli.verbs import add_group, add_verb, argument
from fl_shared.adapters.safetensors import digest
from fl_shared.cli.console import table, working
from fl_shared.cli.parsers import add_quiet, path
from fl_shared.errors import ConfigError, TransportError
from fl_shared.files import write_durably
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub


def add(groups: Any) -> None:
    """Add the group."""
    verbs = add_group(groups, "adapters", "the committed adapters and their releases")
    listed = add_verb(
        verbs, "list", _list, "the adapters of a run, or without one what is released under which name",
        examples="fl-admin adapters list\nfl-admin adapters list demo\nfl-admin adapters list --history",
    )  # fmt: skip
    argument(listed, "run", metavar="RUN", nargs="?", default="", completer=complete.runs)
    listed.add_argument("--history", action="store_true", help="also releases that another one has followed")
    shown = add_verb(
        verbs, "show", _show, "one adapter: where it comes from, who took part, what it is released as",
        examples="fl-admin adapters show demo --round 3\nfl-admin adapters show --released production",
    )  # fmt: skip
    _which(shown)
    promote = add_verb(
        verbs, "promote", _promote, "release a committed adapter under a name",
        more="The newest promotion of a name counts. The adapter stays where it is; earlier promotions stay known.",
        examples="fl-admin adapters promote demo --round 3 --as production",
    )  # fmt: skip
    argument(promote, "run", metavar="RUN", completer=complete.runs)
    argument(promote, "--round", type=int, default=0, metavar="N", completer=complete.rounds, help=_ROUND)
    argument(promote, "--as", dest="name", metavar="NAME", required=True, completer=complete.releases,
             help="lower-case letters, digits, hyphens")  # fmt: skip
    export = add_verb(
        verbs, "export", _export, "write a committed adapter to a file",
        examples="fl-admin adapters export demo --out demo.safetensors\n"
        "fl-admin adapters export --released production --out production.safetensors",
    )  # fmt: skip
    _which(export)
    argument(export, "--out", type=path, required=True, metavar="FILE", completer=complete.files,
             help="the file to write (safetensors)")  # fmt: skip
    export.add_argument("--force", action="store_true", help="replace the file")
    add_quiet(export)


_ROUND = "the round; the last committed one by default"


def _which(parser: argparse.ArgumentParser) -> None:
    argument(parser, "run", metavar="RUN", nargs="?", default="", completer=complete.runs)
    argument(parser, "--round", type=int, default=0, metavar="N", completer=complete.rounds, help=_ROUND)
    argument(parser, "--released", default="", metavar="NAME", completer=complete.releases,
             help="what is released under this name, instead of RUN")  # fmt: skip


def _named(arguments: argparse.Namespace) -> None:
    if bool(arguments.run) == bool(arguments.released) or (arguments.released and arguments.round):
        raise ConfigError("one adapter must be named", fix="give RUN and --round N, or --released NAME alone")


def _list(stub: ControlStub, arguments: argparse.Namespace) -> int:
    if arguments.run:
        return _list_run(stub, arguments)
    releases = stub.ListReleases(pb.ListReleasesRequest(history=arguments.history)).releases
    if arguments.json:
        print_json({"releases": [plain(each) for each in releases]})
        return 0
    table(
        ["name", "run", "round", "promoted", "by", "current", "digest"],
        [
            [each.name, each.adapter.run, str(each.adapter.round), moment(each.promoted_at), each.promoted_by,
             "yes" if each.current else "no", each.adapter.digest]
            for each in releases
        ],
    )  # fmt: skip
    return 0


def _list_run(stub: ControlStub, arguments: argparse.Namespace) -> int:
    adapters = stub.ListAdapters(pb.ListAdaptersRequest(run=arguments.run)).adapters
    if arguments.json:
        print_json({"adapters": [plain(each) for each in adapters]})
        return 0
    table(
        ["round", "bytes", "committed", "released as", "digest"],
        [[str(a.round), str(a.bytes), moment(a.committed_at), ", ".join(a.released_as), a.digest] for a in adapters],
    )
    return 0


def _show(stub: ControlStub, arguments: argparse.Namespace) -> int:
    _named(arguments)
    run, number = arguments.run, arguments.round
    if arguments.released:
        found = stub.ListReleases(pb.ListReleasesRequest(name=arguments.released)).releases
        if not found:
            raise ConfigError(f"nothing was released as {arguments.released!r}", fix="see `fl-admin adapters list`")
        run, number = found[0].adapter.run, found[0].adapter.round
    adapters = {each.round: each for each in stub.ListAdapters(pb.ListAdaptersRequest(run=run)).adapters}
    number = number or max(adapters, default=0)
    if number not in adapters:
        raise ConfigError(f"run {run} has no committed round {number or 'yet'}", fix=f"see `fl-admin runs show {run}`")
    shown = stub.ShowRun(pb.RunRequest(run=run))
    history = [each for each in shown.history if each.round == number]
    replies = [reply for each in history for reply in each.replies]
    if arguments.json:
        print_json(
            plain(adapters[number])
            | {
                "spec": json.loads(shown.spec_json),
                "spec_digest": shown.spec_digest,
                "replies": [plain(reply) for reply in replies],
            }
        )
        return 0
    one = adapters[number]
    for name, value in (
        ("run", f"{run}, round {number} of {shown.rounds}"),
        ("digest", one.digest),
        ("bytes", str(one.bytes)),
        ("committed", moment(one.committed_at)),
        ("released as", ", ".join(one.released_as) or "-"),
        ("base model", json.loads(shown.spec_json)["run"]["base_model"]),
        ("spec", shown.spec_digest),
        ("sites", ", ".join(reply.site for reply in replies if reply.status == "ok")),
    ):
        print(f"{name:<12} {value}")
    return 0


def _promote(stub: ControlStub, arguments: argparse.Namespace) -> int:
    request = pb.PromoteAdapterRequest(run=arguments.run, round=arguments.round, name=arguments.name)
    made = stub.PromoteAdapter(request)
    if arguments.json:
        print_json(plain(made))
    else:
        print(f"{made.name} is round {made.adapter.round} of {made.adapter.run} since {moment(made.promoted_at)}")
        print(made.adapter.digest)
    return 0


def _export(stub: ControlStub, arguments: argparse.Namespace) -> int:
    _named(arguments)
    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f"{out} exists", fix="choose another --out, or add --force")
    described = pb.Adapter()
    data = bytearray()
    request = pb.GetAdapterRequest(run=arguments.run, round=arguments.round, released_as=arguments.released)
    with working("fetching the adapter", quiet=arguments.quiet, json=arguments.json) as say:
        for chunk in stub.GetAdapter(request):
            if chunk.HasField("adapter"):
                described.CopyFrom(chunk.adapter)
            data += chunk.data
            say("fetching the adapter", len(data), described.bytes)
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
