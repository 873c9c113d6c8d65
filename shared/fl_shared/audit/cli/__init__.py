"""The command `fl-audit`: read, check and explain the privacy ledger of a site; never write an entry to one."""

from __future__ import annotations

from collections.abc import Sequence

from fl_shared.cli.verbs import Command, EntryPoints

MORE_VERBS = "concordat.audit_verbs"
"""Entry points of verbs that need more than the auditor's install."""

VERBS = {
    "fl_shared.audit.cli.budgets": "ceilings, and what is spent and left of them",
    "fl_shared.audit.cli.spends": "what was done to the data, round by round",
    "fl_shared.audit.cli.runs": "what each run cost",
    "fl_shared.audit.cli.forecast": "rounds left, noise that fits, burn-down curve",
    "fl_shared.audit.cli.plan": "what a run would cost, before it is launched",
    "fl_shared.audit.cli.verify": "is the record intact?",
    "fl_shared.audit.cli.reconcile": "does the coordinator's copy agree?",
    "fl_shared.audit.cli.export": "a bundle for an outside auditor",
    "fl_shared.audit.cli.statement": "a signed privacy statement (PDF, HTML, JSON)",
    "fl_shared.audit.cli.roles": "rights for agent and auditor on PostgreSQL",
}

COMMAND = Command(
    name="fl-audit",
    package="fl_shared",
    description="Read, check and explain the privacy ledger of a site.",
    verbs=[VERBS, EntryPoints(MORE_VERBS, "fl_client")],
    examples="""
        fl-audit budgets   --site hospital-001
        fl-audit spends    --site hospital-001 --run demo --json
        fl-audit runs      --site hospital-001 --csv > runs.csv
        fl-audit plan      --site hospital-001 --spec next.toml
        fl-audit forecast  --site hospital-001 --rounds 20 --out burn-down.svg
        fl-audit verify    --site hospital-001 --public-key KEY --receipts receipts.json
        fl-audit reconcile --site hospital-001 --receipts receipts.json
        fl-audit export    --site hospital-001 --receipts receipts.json --out hospital-001.zip
        fl-audit verify    hospital-001.zip --public-key KEY
        fl-audit statement --site hospital-001 --out statements
        fl-audit canaries  --site hospital-001 --spec run.toml
    """,
    exit_codes={
        0: "all is well",
        11: "a plan that would be refused",
        12: "a signature does not fit",
        13: "the ledger cannot be read or trusted, or two copies diverge",
        14: "model",
        19: "the engine is accused",
    },
    notes="environment: FL_CLIENT_HOME is used where --home is not given.",
    completes="verbs, options and sites",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-audit`."""
    return COMMAND.main(argv)
