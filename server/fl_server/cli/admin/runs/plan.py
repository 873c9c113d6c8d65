"""`fl-admin runs plan`: ask the sites how many rounds of a spec they can afford, and who would refuse.

Nothing is launched or spent. A site that has announced a base model which the spec does not fit is shown as refused at
once. Exit code 0 when every site would take part in every round, 11 when one would refuse, 16 when none would but one
has not answered.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected
from fl_server.cli.admin.runs.spec import spec_text
from fl_server.cli.show import moment, plain
from fl_shared.cli.output import print_json, table
from fl_shared.cli.verbs import argument
from fl_shared.documents.plan import AFFORDABLE, NOT_ENROLLED, NOT_ONLINE, REFUSED, SILENT, WAIT_S
from fl_shared.documents.spec import RunSpec
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub

EXAMPLES = """
fl-admin runs plan hospital.toml
fl-admin runs plan hospital.toml --wait 60 --json
"""
WOULD_REFUSE, UNKNOWN = 11, 16
_WORDS = {
    SILENT: "is online and has not answered: busy, older than plans, or [policy] answer_plans = false",
    NOT_ONLINE: "has not been heard of",
    NOT_ENROLLED: "is not enrolled",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "spec", metavar="SPEC.toml", completer=complete.specs, help="the run spec, as for `runs launch`")
    parser.add_argument("--wait", type=float, default=WAIT_S, metavar="S", help="seconds to wait, default %(default)g")


def run(arguments: argparse.Namespace) -> int:
    """Ask, print, and say by the exit code whether all is affordable."""
    with connected(arguments) as stub:
        return _ask(stub, arguments)


def _ask(stub: ControlStub, arguments: argparse.Namespace) -> int:
    spec = RunSpec.from_toml(Path(arguments.spec))
    say = not arguments.json and sys.stderr.isatty()
    if say:
        print(f"asking {len(spec.run.sites)} sites, at most {arguments.wait:g} s", file=sys.stderr)
    plans: list[pb.SitePlan] = []
    for plan in stub.PlanRun(pb.PlanRunRequest(spec_toml=spec_text(arguments.spec), wait_s=arguments.wait)):
        plans.append(plan)
        if say:
            print(f"  {plan.site}: {plan.status}", file=sys.stderr)
    plans.sort(key=lambda plan: spec.run.sites.index(plan.site))
    everywhere, with_quorum = _rounds(plans, spec)
    if arguments.json:
        print_json(
            {
                "run": spec.run.name,
                "rounds": spec.run.rounds,
                "quorum": spec.run.quorum,
                "affordable": all(plan.status == AFFORDABLE for plan in plans),
                "rounds_everywhere": everywhere,
                "rounds_with_quorum": with_quorum,
                "sites": [_plain(plan) for plan in plans],
            }
        )
    else:
        _print(plans, spec, everywhere, with_quorum)
    if any(plan.status == REFUSED for plan in plans):
        return WOULD_REFUSE
    return 0 if all(plan.status == AFFORDABLE for plan in plans) else UNKNOWN


def _granted(plan: pb.SitePlan) -> int:
    """Rounds in which the site would take part: none when it is silent, or when more than the budget objects."""
    answered = plan.status in (AFFORDABLE, REFUSED)
    only_budget = all(text.startswith("budget-exhausted: ") for text in plan.objections)
    return min(plan.rounds_affordable, plan.rounds_asked) if answered and only_budget else 0


def _rounds(plans: Sequence[pb.SitePlan], spec: RunSpec) -> tuple[int, int]:
    """Rounds that every site affords, and rounds that at least the quorum of sites affords."""
    granted = sorted((_granted(plan) for plan in plans), reverse=True)
    return granted[-1], granted[spec.run.quorum - 1]


def _plain(plan: pb.SitePlan) -> dict[str, Any]:
    document = plain(plan)
    document["answer"] = json.loads(document.pop("document_json") or "null")
    return document


def _print(plans: Sequence[pb.SitePlan], spec: RunSpec, everywhere: int, with_quorum: int) -> None:
    rows = []
    for plan in plans:
        answered = plan.status in (AFFORDABLE, REFUSED)
        why = "\n".join(plan.objections) or _WORDS.get(plan.status, "")
        if plan.status == NOT_ONLINE and plan.last_seen_at:
            why += f" since {moment(plan.last_seen_at)}"
        if plan.noise_that_fits:
            why += f"\nnoise {plan.noise_that_fits:.3f} would fit all rounds"
        rows.append([plan.site, plan.status, str(plan.rounds_affordable) if answered else "-", why])
    table(["site", "answer", "rounds affordable", "why"], rows)
    asked = spec.run.rounds
    if all(plan.status == AFFORDABLE for plan in plans):
        print(f"all {asked} rounds of {spec.run.name} are affordable at every site")
    else:
        print(f"of {asked} rounds {everywhere} with every site, {with_quorum} with the quorum of {spec.run.quorum}")
