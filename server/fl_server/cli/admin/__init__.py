"""The command `fl-admin`: invite sites, plan, launch and follow runs, promote adapters, read the record of it all."""

from __future__ import annotations

from collections.abc import Sequence

from fl_shared.cli.verbs import Command, Group

STATUS = {"fl_server.cli.admin.status": "whether the coordinator's parts run"}

SITES = {
    "fl_server.cli.admin.sites.invite": "print a one-time enrolment token",
    "fl_server.cli.admin.sites.list": "every site and its state",
    "fl_server.cli.admin.sites.show": (
        "one site: fingerprints, certificate, base model, runs, epsilon of its newest receipt"
    ),
    "fl_server.cli.admin.sites.revoke": "shut a site out from its next request on",
}

RUNS = {
    "fl_server.cli.admin.runs.plan": "ask the sites how many rounds of a spec they can afford, and who would refuse",
    "fl_server.cli.admin.runs.launch": "launch a run from a spec file",
    "fl_server.cli.admin.runs.list": "every run, the newest first",
    "fl_server.cli.admin.runs.show": "one run with every round and reply",
    "fl_server.cli.admin.runs.watch": "follow a run to its end",
    "fl_server.cli.admin.runs.logs": "what happened in a run: one line for each event",
    "fl_server.cli.admin.runs.stop": "end a run",
    "fl_server.cli.admin.runs.pause": "hold a run",
    "fl_server.cli.admin.runs.resume": "carry a paused, stopped or failed run on from its last committed round",
}

ADAPTERS = {
    "fl_server.cli.admin.adapters.list": "the adapters of a run, or without one what is promoted to which name",
    "fl_server.cli.admin.adapters.show": "one adapter: where it comes from, who took part, what it is promoted to",
    "fl_server.cli.admin.adapters.promote": "promote a committed adapter to a name",
    "fl_server.cli.admin.adapters.export": "write a committed adapter to a file",
}

RECEIPTS = {"fl_server.cli.admin.receipts.export": "write receipts to a file for an auditor"}

SCHEMA = {"fl_server.cli.admin.schema": "print the JSON Schema of a run spec or of server.toml"}

AUDIT = {
    "fl_server.cli.admin.audit.list": "every action of an admin, with its outcome",
    "fl_server.cli.admin.audit.verify": "check hashes, signatures, order and keys of the whole record",
}

COMMAND = Command(
    name="fl-admin",
    package="fl_server",
    description="Invite sites, plan, launch and follow runs, promote adapters, read the record of it all.",
    verbs=[
        STATUS,
        Group("sites", "who may take part", SITES),
        Group("runs", "plan, launch and follow runs", RUNS),
        Group("adapters", "the committed adapters and their promotions", ADAPTERS),
        Group("receipts", "what sites signed about their rounds", RECEIPTS),
        Group("audit", "the record of what admins did", AUDIT),
        SCHEMA,
    ],
    examples="""
        fl-admin sites invite hospital-001
        fl-admin runs plan hospital.toml
        fl-admin runs launch hospital.toml --watch
        fl-admin runs logs hospital-demo --follow
        fl-admin adapters promote hospital-demo --as production
        fl-admin receipts export --site hospital-001 --out receipts.json
        fl-admin audit verify
    """,
    exit_codes={
        1: "the certificate's role may not do this, or not every part is ready (status)",
        11: "a plan that a site would refuse",
        12: "a signature does not fit",
        13: "the admin log is not intact or cannot be written",
        16: "no coordinator answers, or a plan that a site has not answered",
        17: "the certificate is not valid (any more)",
        18: "a run cannot do this, or did not complete",
    },
    notes="environment: FL_ADMIN_PROFILE is used where --profile is not given; without both it is admin/admin.toml in "
    "the coordinator's home.",
    completes="verbs, options and names",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-admin`."""
    return COMMAND.main(argv)
