"""A site's renewed certificate that was not used yet, and the certificates of admins and auditors."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns and the table."""
    op.add_column("sites", sa.Column("next_fingerprint", sa.String(64), nullable=False, server_default=""))
    op.add_column("sites", sa.Column("next_expires_at", sa.Float(), nullable=False, server_default="0"))
    op.create_table(
        "operators",
        sa.Column("fingerprint", sa.String(64), primary_key=True, nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("issued_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=False),
        sa.CheckConstraint("role IN ('admin', 'auditor')", name="operator_role"),
    )


def downgrade() -> None:
    """Drop them."""
    op.drop_table("operators")
    op.drop_column("sites", "next_expires_at")
    op.drop_column("sites", "next_fingerprint")
