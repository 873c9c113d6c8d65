"""Rows must fit: each typed row its entry's kind, each budget its data set, each reservation its budgets.

What SQL can say about the state machine, it says here: a program that skips the ledger's own checks is refused
by the database. What it cannot say (the ceiling itself) `verify` replays.
"""

# ruff: noqa: S608  # the SQL is put together from our own names

from __future__ import annotations

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Which kinds of entry may carry a row of the table.
KINDS = {
    "datasets": ("dataset",),
    "dataset_overlaps": ("overlap",),
    "budgets": ("budget",),
    "reservations": ("reservation",),
    "settlements": ("settlement",),
    "keys": ("key",),
    "tallies": ("reservation", "settlement"),
}

_UNIT = "(SELECT privacy_unit FROM datasets WHERE name = NEW.{} ORDER BY version DESC LIMIT 1)"
_CURRENT = (
    "b.version = (SELECT max(c.version) FROM budgets c WHERE c.dataset = b.dataset AND c.study = b.study) "
    "AND b.dataset = NEW.dataset AND b.study IN ('', NEW.study)"
)
_BEFORE = "(SELECT {} FROM tallies WHERE key = NEW.key ORDER BY version DESC LIMIT 1)"

# (what must not be, what the database says then), in words that both databases understand.
RULES = {
    "datasets": (
        (
            "NEW.version <> coalesce((SELECT max(version) FROM datasets WHERE name = NEW.name), 0) + 1 "
            f"OR NEW.privacy_unit <> coalesce({_UNIT.format('name')}, NEW.privacy_unit)"
        ),
        "a data set's version must follow, and its privacy unit must stay",
    ),
    "dataset_overlaps": (
        f"coalesce({_UNIT.format('first')}, '1') <> coalesce({_UNIT.format('second')}, '2')",
        "an overlap needs two registered data sets with one privacy unit",
    ),
    "budgets": (
        (
            "NOT coalesce(NEW.delta * (SELECT units FROM datasets WHERE name = NEW.dataset "
            "ORDER BY version DESC LIMIT 1) < 1, 1 = 0) OR NEW.version <> coalesce((SELECT max(version) "
            "FROM budgets WHERE dataset = NEW.dataset AND study = NEW.study), 0) + 1"
        ),
        "a budget needs a registered data set, a delta below 1/units and the next version",
    ),
    "reservations": (
        (
            "NEW.dataset <> coalesce((SELECT name FROM datasets WHERE seq = NEW.dataset_seq), '') "
            f"OR NOT EXISTS (SELECT 1 FROM budgets b WHERE {_CURRENT}) "
            "OR NOT EXISTS (SELECT 1 FROM budgets b WHERE b.dataset = NEW.dataset AND NEW.study IN ('', b.study)) "
            f"OR EXISTS (SELECT 1 FROM budgets b, entries e WHERE e.seq = NEW.seq AND {_CURRENT} "
            "AND (e.created_at < b.valid_from OR e.created_at >= b.valid_to))"
        ),
        "a reservation needs its data set and budgets in their period",
    ),
    "tallies": (
        (
            f"NEW.version <> coalesce({_BEFORE.format('version')}, 0) + 1 "
            f"OR NEW.spent < coalesce({_BEFORE.format('spent')}, 0)"
        ),
        "sums must follow and never fall",
    ),
}

FUNCTIONS = {
    "ledger_kind_fits": (
        "BEGIN IF NOT (SELECT kind FROM entries WHERE seq = NEW.seq) = ANY(TG_ARGV) THEN "
        "RAISE EXCEPTION 'a row of % needs an entry of its kind', TG_TABLE_NAME; END IF; RETURN NEW; END"
    )
} | {
    f"ledger_{table}_fit": f"BEGIN IF {wrong} THEN RAISE EXCEPTION '{message.replace(chr(39), chr(39) * 2)}'; END IF; "
    "RETURN NEW; END"
    for table, (wrong, message) in RULES.items()
}


def upgrade() -> None:
    """Add the triggers."""
    if op.get_bind().dialect.name == "postgresql":
        for name, body in FUNCTIONS.items():
            op.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
    for table, kinds in KINDS.items():
        words = ", ".join(f"'{kind}'" for kind in kinds)
        if op.get_bind().dialect.name == "postgresql":
            _trigger(f"{table}_of_its_kind", table, f"FOR EACH ROW EXECUTE FUNCTION ledger_kind_fits({words})")
        else:
            _trigger(
                f"{table}_of_its_kind",
                table,
                f"WHEN (SELECT kind FROM entries WHERE seq = NEW.seq) NOT IN ({words}) "
                f"BEGIN SELECT RAISE(ABORT, 'a row of {table} needs an entry of its kind'); END",
            )
    for table, (wrong, message) in RULES.items():
        if op.get_bind().dialect.name == "postgresql":
            _trigger(f"{table}_fit", table, f"FOR EACH ROW EXECUTE FUNCTION ledger_{table}_fit()")
        else:
            words = message.replace("'", "''")
            _trigger(f"{table}_fit", table, f"WHEN {wrong} BEGIN SELECT RAISE(ABORT, '{words}'); END")


def _trigger(name: str, table: str, action: str) -> None:
    op.execute(f"CREATE TRIGGER {name} BEFORE INSERT ON {table} {action}")


def downgrade() -> None:
    """Drop the triggers; rows stay as they are."""
    postgresql = op.get_bind().dialect.name == "postgresql"
    for name, table in [(f"{table}_of_its_kind", table) for table in KINDS] + [(f"{t}_fit", t) for t in RULES]:
        op.execute(f"DROP TRIGGER {name} ON {table}" if postgresql else f"DROP TRIGGER {name}")
    if postgresql:
        for name in FUNCTIONS:
            op.execute(f"DROP FUNCTION {name}()")
