"""Every key that a site has proved, so that a revoked one is known for ever; when a site's node last got through."""

from __future__ import annotations

import base64
import hashlib
import time

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the column and the table, with the keys that the sites' rows hold."""
    op.add_column("sites", sa.Column("node_seen_at", sa.Float(), nullable=False, server_default="0"))
    keys = op.create_table(
        "site_keys",
        sa.Column("fingerprint", sa.String(64), primary_key=True, nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("site", sa.String(63), sa.ForeignKey("sites.site"), nullable=False),
        sa.Column("proved_at", sa.Float(), nullable=False),
        sa.Column("retired_at", sa.Float(), nullable=False),
        sa.CheckConstraint("kind IN ('signing', 'node', 'tls')", name="site_key_kind"),
    )
    op.create_index("ix_site_keys_site", "site_keys", ["site"])
    sites = sa.table(
        "sites", sa.column("site"), sa.column("state"), sa.column("signing_key"), sa.column("node_public_key"),
        sa.column("enrolled_at"),
    )  # fmt: skip
    for row in op.get_bind().execute(sa.select(sites)).mappings().all():
        public_keys = {}
        if row["signing_key"]:
            public_keys["signing"] = bytes.fromhex(row["signing_key"])
        if row["node_public_key"]:
            public_keys["node"] = base64.b64decode(row["node_public_key"].split()[1])
        for kind, data in public_keys.items():
            retired = time.time() if row["state"] == "revoked" and kind != "signing" else 0.0
            op.bulk_insert(
                keys,
                [
                    {
                        "fingerprint": hashlib.sha256(data).hexdigest(), "kind": kind, "site": row["site"],
                        "proved_at": row["enrolled_at"], "retired_at": retired,
                    }
                ],
            )  # fmt: skip


def downgrade() -> None:
    """Drop them."""
    op.drop_table("site_keys")
    op.drop_column("sites", "node_seen_at")
