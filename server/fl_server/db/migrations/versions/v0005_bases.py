"""The base model that each site has announced."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns, empty: nobody has announced anything yet."""
    op.add_column("sites", sa.Column("base_model", sa.String(71), nullable=False, server_default=""))
    op.add_column("sites", sa.Column("base_targets", sa.Text(), nullable=False, server_default=""))
    op.add_column("sites", sa.Column("base_announced_at", sa.Float(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Drop them."""
    for name in ("base_announced_at", "base_targets", "base_model"):
        op.drop_column("sites", name)
