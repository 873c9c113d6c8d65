"""Which orders a site reads, and the nonce of an order whose document is not stored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns: no site has said that it reads the new orders, and every stored order is whole."""
    op.add_column("sites", sa.Column("orders", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("manifests", sa.Column("nonce", sa.String(32), nullable=False, server_default=""))


def downgrade() -> None:
    """Drop them."""
    op.drop_column("manifests", "nonce")
    op.drop_column("sites", "orders")
