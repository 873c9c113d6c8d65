"""The command `fl-client`: enrol a site, check it, run its agent, train alone, show its state, change its key."""

from __future__ import annotations

from collections.abc import Sequence

from fl_shared.cli.verbs import Command, Group
from fl_shared.runtime.offline import stay_offline
from fl_shared.runtime.private_files import create_privately

VERBS = {
    "fl_client.cli.client.run": "run the agent and the SuperNode (the default)",
    "fl_client.cli.client.enroll": "make the site's keys and get its certificate with a one-time token",
    "fl_client.cli.client.check": (
        "dry run: packages, config, data, model, policy, budget, server; each a pass or the fix"
    ),
    "fl_client.cli.client.resume": "take part again in a run that this site left after a failure",
    "fl_client.cli.client.status": "show enrolment, whether the agent runs, and what the ledger says",
    "fl_client.cli.client.train_alone": "train a run's spec at this site alone, charged like a federated run",
    "fl_client.cli.client.evaluate": (
        "evaluate an adapter on the private hold-out, with noise and an entry in the ledger"
    ),
    "fl_client.cli.client.schema": "print the JSON Schema of site.toml or of a run spec",
    "fl_client.cli.client.supernode": "run only the untrusted half, as another user (see deploy/)",
}

KEYS = {
    "fl_client.cli.client.keys.show": "print the site's public key, and write it to keys/signing.pub",
    "fl_client.cli.client.keys.rotate": "replace the site's signing key by a new one",
}

COMMAND = Command(
    name="fl-client",
    package="fl_client",
    description="The site's half of Concordat. Without a verb: run the agent.",
    verbs=[VERBS, Group("keys", "the key that signs the ledger and what leaves", KEYS)],
    examples="""
        fl-client enroll --site hospital-001 --server https://coordinator.example:9443 --token ct1....
        fl-client check --site hospital-001          # a dry run: each line a pass or the fix
        fl-client check --site hospital-001 --spec spec.toml     # and whether it could take part in this run
        fl-client --site hospital-001                # the agent (Ctrl-C or SIGTERM ends it in good order)
        fl-client status --site hospital-001 --json
        fl-client resume --site hospital-001 demo --by "A. Officer" --reason "the driver was updated"
        fl-client train-alone --site hospital-001 --spec spec.toml --out alone/
    """,
    exit_codes={
        10: "policy", 11: "budget", 12: "signature", 13: "ledger", 14: "model", 15: "data", 16: "transport",
        17: "enrolment", 18: "run", 19: "engine",
    },
    notes="environment: FL_SITE, FL_SERVER, FL_TOKEN and FL_CLIENT_HOME stand in for --site, --server, --token, "
    "--home;\n  FL_LOG_FORMAT=json makes the agent's output JSON lines, as in its log file",
    completes="verbs, options and sites",
    default="run",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-client`."""
    stay_offline()
    create_privately()
    return COMMAND.main(argv)
