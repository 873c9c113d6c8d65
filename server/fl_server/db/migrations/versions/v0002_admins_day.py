"""The admin log (append-only, chained), promoted adapters, and the questions of a plan."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None

# PostgreSQL's trigger functions. SQLite's triggers say the same.
FUNCTIONS = {
    "admin_log_refuse": "BEGIN RAISE EXCEPTION 'append-only: % on % refused', TG_OP, TG_TABLE_NAME; END",
    "admin_log_follows": (
        "BEGIN IF NEW.seq <> coalesce((SELECT max(seq) FROM admin_log), 0) + 1 OR NEW.prev_hash <> coalesce("
        "(SELECT hash FROM admin_log ORDER BY seq DESC LIMIT 1), repeat('0', 64)) THEN "
        "RAISE EXCEPTION 'an entry must follow the last one'; END IF; RETURN NEW; END"
    ),
}


def _text(name: str, length: int | None = None, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False, primary_key=key)


def _time(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Float(), nullable=False)


def upgrade() -> None:
    """Make the tables and the triggers that let the log only grow."""
    op.create_table(
        "admin_log",
        sa.Column("seq", sa.BigInteger(), primary_key=True, autoincrement=False),
        _text("kind", 16), _text("body"), _text("prev_hash", 64), _text("hash", 64), _text("signature", 128),
        _text("created_at", 27),
        sa.UniqueConstraint("hash", name="admin_log_hash"),
        sa.CheckConstraint("seq >= 1", name="admin_log_seq"),
        sa.CheckConstraint("kind IN ('genesis', 'key', 'action', 'outcome')", name="admin_log_kind"),
        sa.CheckConstraint("length(hash) = 64 AND length(prev_hash) = 64", name="admin_log_hash_length"),
        sa.CheckConstraint("length(signature) = 128", name="admin_log_signature_length"),
    )  # fmt: skip
    op.create_table(
        "promotions",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True, nullable=False),
        _text("name", 63), sa.Column("run", sa.String(63), sa.ForeignKey("runs.run"), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False), _text("adapter_digest", 71), _text("promoted_by", 80),
        _time("promoted_at"),
    )  # fmt: skip
    op.create_index("ix_promotions_name", "promotions", ["name"])
    op.create_table(
        "questions",
        _text("question", 32, key=True), _text("plan", 32), _text("site", 63), _text("document_json"),
        _time("issued_at"), _time("expires_at"), _text("answer_json"), _time("answered_at"),
    )  # fmt: skip
    op.create_index("ix_questions_plan", "questions", ["plan"])
    op.create_index("questions_of_site", "questions", ["site", "expires_at"])
    if op.get_bind().dialect.name == "postgresql":
        _postgresql_triggers()
    else:
        _sqlite_triggers()


def _sqlite_triggers() -> None:
    for action in ("UPDATE", "DELETE"):
        op.execute(
            f"CREATE TRIGGER admin_log_refuse_{action.lower()} BEFORE {action} ON admin_log "
            f"BEGIN SELECT RAISE(ABORT, 'append-only: {action} on admin_log refused'); END"
        )
    # INSERT OR REPLACE deletes without firing the DELETE trigger; what does not follow is refused before.
    op.execute(
        "CREATE TRIGGER admin_log_follow BEFORE INSERT ON admin_log "
        "WHEN NEW.seq <> coalesce((SELECT max(seq) FROM admin_log), 0) + 1 OR NEW.prev_hash <> coalesce("
        "(SELECT hash FROM admin_log ORDER BY seq DESC LIMIT 1), printf('%064d', 0)) "
        "OR EXISTS (SELECT 1 FROM admin_log WHERE hash = NEW.hash) "
        "BEGIN SELECT RAISE(ABORT, 'an entry must follow the last one'); END"
    )


def _postgresql_triggers() -> None:
    for name, body in FUNCTIONS.items():
        op.execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
    op.execute(
        "CREATE TRIGGER admin_log_refuse_change BEFORE UPDATE OR DELETE ON admin_log "
        "FOR EACH ROW EXECUTE FUNCTION admin_log_refuse()"
    )
    op.execute(
        "CREATE TRIGGER admin_log_refuse_truncate BEFORE TRUNCATE ON admin_log "
        "FOR EACH STATEMENT EXECUTE FUNCTION admin_log_refuse()"
    )
    op.execute(
        "CREATE TRIGGER admin_log_follow BEFORE INSERT ON admin_log FOR EACH ROW EXECUTE FUNCTION admin_log_follows()"
    )


def downgrade() -> None:
    """Drop the tables, with their triggers."""
    for table in ("questions", "promotions", "admin_log"):
        op.drop_table(table)
    if op.get_bind().dialect.name == "postgresql":
        for function in FUNCTIONS:
            op.execute(f"DROP FUNCTION {function}()")
