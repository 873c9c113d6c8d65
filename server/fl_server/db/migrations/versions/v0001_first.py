"""Sites, invitations, runs, rounds, replies, manifests, events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def _text(name: str, length: int | None = None, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False, primary_key=key)


def _time(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Float(), nullable=False)


def _number(name: str, *, key: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.Integer(), nullable=False, primary_key=key)


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "sites",
        _text("site", 63, key=True), _text("state", 16), _text("signing_key", 64), _text("node_public_key"),
        _text("node_key_fingerprint", 80), _text("node_id", 32), _text("certificate_fingerprint", 64),
        _time("certificate_expires_at"), _time("invited_at"), _time("enrolled_at"), _time("revoked_at"),
        _time("last_seen_at"),
        sa.CheckConstraint("state IN ('invited', 'enrolled', 'revoked')", name="site_state"),
    )  # fmt: skip
    op.create_index("ix_sites_certificate_fingerprint", "sites", ["certificate_fingerprint"])
    op.create_table(
        "invitations",
        sa.Column("secret_hash", sa.LargeBinary(32), primary_key=True, nullable=False),
        sa.Column("site", sa.String(63), sa.ForeignKey("sites.site"), nullable=False),
        _time("created_at"), _time("expires_at"), _time("used_at"),
    )  # fmt: skip
    op.create_index("ix_invitations_site", "invitations", ["site"])
    op.create_table(
        "runs",
        _text("run", 63, key=True), _text("state", 16), _text("reason"), _text("spec_json"),
        _text("spec_digest", 71), _number("rounds"), _text("flower_run", 32),
        _text("attempt", 32), _time("beat_at"), _number("restarts"),
        _time("created_at"), _time("updated_at"),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'paused', 'stopped', 'failed', 'completed')", name="run_state"
        ),
    )  # fmt: skip
    op.create_index("ix_runs_state", "runs", ["state"])
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(63), sa.ForeignKey("runs.run"), primary_key=True, nullable=False),
        _number("round", key=True), _text("state", 16), _text("adapter_digest", 71),
        sa.Column("adapter_bytes", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        _time("seconds"), _time("committed_at"),
        sa.CheckConstraint("state IN ('committed', 'failed')", name="round_state"),
    )  # fmt: skip
    op.create_table(
        "replies",
        sa.Column("run", sa.String(63), sa.ForeignKey("runs.run"), primary_key=True, nullable=False),
        _number("round", key=True), _text("site", 63, key=True), _text("status", 16), _text("code", 64),
        _text("message"), _time("epsilon_spent_total"), _time("delta"), _text("document_json"),
        _time("received_at"),
        sa.CheckConstraint(
            "status IN ('ok', 'refused', 'failed', 'late', 'missing', 'invalid')", name="reply_status"
        ),
    )  # fmt: skip
    op.create_table(
        "manifests",
        _text("digest", 71, key=True),
        sa.Column("run", sa.String(63), sa.ForeignKey("runs.run"), nullable=False),
        _number("round"), _text("site", 63), _text("adapter_digest", 71), _text("document_json"),
        _time("issued_at"), _time("expires_at"),
    )  # fmt: skip
    op.create_index("manifests_of_round", "manifests", ["run", "round", "site"])
    op.create_table(
        "events",
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=True, nullable=False),
        _text("run", 63), _time("at"), _text("kind", 32), _number("round"), _text("site", 63),
        _text("message"), _text("data_json"),
    )  # fmt: skip
    op.create_index("ix_events_run", "events", ["run"])


def downgrade() -> None:
    """Drop every table."""
    for table in ("events", "manifests", "replies", "rounds", "runs", "invitations", "sites"):
        op.drop_table(table)
