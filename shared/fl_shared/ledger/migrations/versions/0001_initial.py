"""The first schema: the chain, its typed tables, the cache of sums, and the triggers that refuse changes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "entries",
    "datasets",
    "dataset_overlaps",
    "budgets",
    "reservations",
    "settlements",
    "tally_keys",
    "tallies",
    "merkle_nodes",
    "keys",
)
# Columns of each primary key, for the trigger against INSERT OR REPLACE.
PRIMARY_KEYS = {"tally_keys": ("id",), "merkle_nodes": ("level", "position")}

# PostgreSQL's trigger functions; `schema` holds the database's copies against them.
FUNCTIONS = {
    "ledger_refuse": "BEGIN RAISE EXCEPTION 'append-only: % on % refused', TG_OP, TG_TABLE_NAME; END",
    "ledger_entry_follows": (
        "BEGIN IF NEW.seq <> coalesce((SELECT max(seq) FROM entries), 0) + 1 OR NEW.prev_hash <> coalesce("
        "(SELECT hash FROM entries ORDER BY seq DESC LIMIT 1), repeat('0', 64)) THEN "
        "RAISE EXCEPTION 'an entry must follow the last one'; END IF; RETURN NEW; END"
    ),
    "ledger_settlement_fits": (
        "BEGIN IF NEW.steps > (SELECT steps FROM reservations WHERE seq = NEW.reservation) "
        "OR (NEW.outcome = 'in-doubt' AND NEW.steps <> "
        "(SELECT steps FROM reservations WHERE seq = NEW.reservation)) THEN "
        "RAISE EXCEPTION 'a settlement must fit its reservation'; END IF; RETURN NEW; END"
    ),
}


def _seq() -> sa.Column[int]:
    return sa.Column(
        "seq",
        sa.BigInteger,
        sa.ForeignKey("entries.seq", name="entry"),
        primary_key=True,
        autoincrement=False,
    )


def _name(column: str, length: int = 200) -> sa.Column[str]:
    return sa.Column(column, sa.String(length), nullable=False)


def _count(column: str) -> sa.Column[int]:
    return sa.Column(column, sa.BigInteger, nullable=False)


def _real(column: str) -> sa.Column[float]:
    return sa.Column(column, sa.Float, nullable=False)


def upgrade() -> None:
    """Make every table, index and trigger."""
    op.create_table(
        "entries",
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        _name("kind", 16),
        sa.Column("body", sa.Text, nullable=False),
        _name("prev_hash", 64),
        _name("hash", 64),
        _name("signature", 128),
        _name("created_at", 27),
        sa.UniqueConstraint("hash", name="entries_hash"),
        sa.CheckConstraint("seq >= 1", name="entries_seq"),
        sa.CheckConstraint(
            "kind IN ('genesis', 'dataset', 'overlap', 'budget', 'reservation', 'settlement', 'witness', 'key')",
            name="entries_kind",
        ),
        sa.CheckConstraint("length(hash) = 64 AND length(prev_hash) = 64", name="entries_hash_length"),
        sa.CheckConstraint("length(signature) = 128", name="entries_signature_length"),
    )
    op.create_table(
        "datasets",
        _seq(),
        _name("name"),
        sa.Column("version", sa.Integer, nullable=False),
        _name("fingerprint"),
        _name("privacy_unit", 64),
        _count("units"),
        sa.Column("bound_per_unit", sa.Integer, nullable=False),
        sa.UniqueConstraint("name", "version", name="datasets_version"),
        sa.CheckConstraint("units >= 1 AND bound_per_unit >= 1 AND version >= 1", name="datasets_positive"),
    )
    op.create_table(
        "dataset_overlaps",
        _seq(),
        _name("first"),
        _name("second"),
        sa.Column("reason", sa.Text, nullable=False),
        sa.UniqueConstraint("first", "second", name="dataset_overlaps_pair"),
        sa.CheckConstraint("first < second", name="dataset_overlaps_order"),
    )
    op.create_table(
        "budgets",
        _seq(),
        _name("dataset"),
        _name("study"),
        sa.Column("version", sa.Integer, nullable=False),
        _real("epsilon"),
        _real("delta"),
        _real("filter_order"),
        sa.Column("valid_from", sa.String(27)),
        sa.Column("valid_to", sa.String(27)),
        _name("approver"),
        sa.UniqueConstraint("dataset", "study", "version", name="budgets_version"),
        sa.CheckConstraint("epsilon > 0 AND epsilon < 1e6", name="budgets_epsilon"),
        sa.CheckConstraint("delta > 0 AND delta < 1", name="budgets_delta"),
        sa.CheckConstraint("filter_order > 1 AND filter_order < 1e6", name="budgets_order"),
        sa.CheckConstraint("valid_from IS NULL OR valid_to IS NULL OR valid_from < valid_to", name="budgets_period"),
        sa.CheckConstraint("length(approver) >= 1 AND version >= 1", name="budgets_approver"),
    )
    op.create_table(
        "reservations",
        _seq(),
        _name("dataset"),
        sa.Column(
            "dataset_seq",
            sa.BigInteger,
            sa.ForeignKey("datasets.seq", name="reservation_dataset"),
            nullable=False,
        ),
        _name("study"),
        _name("run"),
        sa.Column("round", sa.Integer, nullable=False),
        _name("purpose", 64),
        sa.Column("attempt", sa.Integer, nullable=False),
        _name("kind", 64),
        _name("neighbouring", 64),
        _real("noise_multiplier"),
        _real("sampling_probability"),
        _count("steps"),
        _real("clipping_norm"),
        sa.UniqueConstraint("run", "round", "dataset", "purpose", "attempt", name="reservations_once"),
        sa.CheckConstraint("noise_multiplier > 0 AND noise_multiplier < 1e9", name="reservations_noise"),
        sa.CheckConstraint("sampling_probability > 0 AND sampling_probability <= 1", name="reservations_sampling"),
        sa.CheckConstraint("steps >= 1 AND attempt >= 1 AND round >= 0", name="reservations_counts"),
        sa.CheckConstraint("clipping_norm > 0 AND clipping_norm <= 1e12", name="reservations_clipping"),
    )
    op.create_table(
        "settlements",
        _seq(),
        sa.Column("reservation", sa.BigInteger, sa.ForeignKey("reservations.seq", name="settled"), nullable=False),
        _name("outcome", 16),
        _count("steps"),
        sa.Column("release_digest", sa.String(200)),
        sa.Column("reason", sa.Text, nullable=False),
        sa.UniqueConstraint("reservation", name="settlements_once"),
        sa.CheckConstraint("outcome IN ('settled', 'released', 'in-doubt')", name="settlements_outcome"),
        sa.CheckConstraint("steps >= 0", name="settlements_steps"),
        sa.CheckConstraint("(outcome = 'released') = (steps = 0)", name="settlements_released"),
        sa.CheckConstraint("(outcome = 'settled') = (release_digest IS NOT NULL)", name="settlements_digest"),
        sa.CheckConstraint("outcome = 'settled' OR length(reason) >= 1", name="settlements_reason"),
    )
    op.create_table(
        "tally_keys",
        sa.Column("id", sa.Integer, primary_key=True),
        _name("dataset"),
        _name("study"),
        _name("kind", 64),
        _name("neighbouring", 64),
        _real("noise_multiplier"),
        _real("sampling_probability"),
        sa.UniqueConstraint(
            "dataset",
            "study",
            "kind",
            "neighbouring",
            "noise_multiplier",
            "sampling_probability",
            name="tally_keys_once",
        ),
    )
    op.create_table(
        "tallies",
        _seq(),
        sa.Column("key", sa.Integer, sa.ForeignKey("tally_keys.id", name="tally_key"), nullable=False),
        _count("version"),
        _count("held"),
        _count("spent"),
        sa.UniqueConstraint("key", "version", name="tallies_version"),
        sa.CheckConstraint("held >= 0 AND spent >= 0", name="tallies_positive"),
    )
    op.create_table(
        "merkle_nodes",
        sa.Column("level", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("position", sa.BigInteger, primary_key=True, autoincrement=False),
        _name("hash", 64),
        sa.CheckConstraint("level >= 1 AND position >= 0", name="merkle_nodes_place"),
    )
    op.create_table(
        "keys",
        _seq(),
        _name("public_key", 64),
        _name("replaces", 64),
        _name("approver"),
        sa.Column("reason", sa.Text, nullable=False),
        _name("proof", 128),
    )
    op.create_index("reservations_by_dataset", "reservations", ["dataset", "seq"])
    op.create_index("reservations_by_run", "reservations", ["run", "round"])
    if op.get_bind().dialect.name == "postgresql":
        _postgresql_triggers()
    else:
        _sqlite_triggers()


def downgrade() -> None:
    """Drop every table, with its triggers."""
    for table in reversed(TABLES):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for function in FUNCTIONS:
            op.execute(f"DROP FUNCTION {function}()")


def _sqlite_triggers() -> None:
    for table in TABLES:
        same = " AND ".join(f"{key} = NEW.{key}" for key in PRIMARY_KEYS.get(table, ("seq",)))
        for action in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_refuse_{action.lower()} BEFORE {action} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, 'append-only: {action} on {table} refused'); END"
            )
        # INSERT OR REPLACE deletes without firing the DELETE trigger; this one fires first.
        op.execute(
            f"CREATE TRIGGER {table}_refuse_replace BEFORE INSERT ON {table} "  # noqa: S608  # our own names
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same}) "
            f"BEGIN SELECT RAISE(ABORT, 'append-only: REPLACE on {table} refused'); END"
        )
    op.execute(
        "CREATE TRIGGER entries_follow BEFORE INSERT ON entries "
        "WHEN NEW.seq <> coalesce((SELECT max(seq) FROM entries), 0) + 1 OR NEW.prev_hash <> coalesce("
        "(SELECT hash FROM entries ORDER BY seq DESC LIMIT 1), printf('%064d', 0)) "
        "BEGIN SELECT RAISE(ABORT, 'an entry must follow the last one'); END"
    )
    op.execute(
        "CREATE TRIGGER settlements_fit BEFORE INSERT ON settlements "
        "WHEN NEW.steps > (SELECT steps FROM reservations WHERE seq = NEW.reservation) "
        "OR (NEW.outcome = 'in-doubt' AND NEW.steps <> "
        "(SELECT steps FROM reservations WHERE seq = NEW.reservation)) "
        "BEGIN SELECT RAISE(ABORT, 'a settlement must fit its reservation'); END"
    )


def _postgresql_triggers() -> None:
    for name, body in FUNCTIONS.items():
        op.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
    for table in TABLES:
        op.execute(
            f"CREATE TRIGGER {table}_refuse_change BEFORE UPDATE OR DELETE ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION ledger_refuse()"
        )
        op.execute(
            f"CREATE TRIGGER {table}_refuse_truncate BEFORE TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()"
        )
    op.execute(
        "CREATE TRIGGER entries_follow BEFORE INSERT ON entries FOR EACH ROW EXECUTE FUNCTION ledger_entry_follows()"
    )
    op.execute(
        "CREATE TRIGGER settlements_fit BEFORE INSERT ON settlements "
        "FOR EACH ROW EXECUTE FUNCTION ledger_settlement_fits()"
    )
