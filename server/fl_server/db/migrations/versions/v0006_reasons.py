"""The typed reason of a run's state beside its words, and the digest of the server optimizer's state of a round."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision: str | None = "0005"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns, empty for what happened before: an adapter's metadata name its state's digest all the same."""
    op.add_column("runs", sa.Column("reason_code", sa.String(64), nullable=False, server_default=""))
    op.add_column("rounds", sa.Column("state_digest", sa.String(71), nullable=False, server_default=""))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("rounds", "state_digest")
    op.drop_column("runs", "reason_code")
