"""Alembic's entry point: run the migrations on the connection that the caller holds, in its transaction."""

from __future__ import annotations

from alembic import context

from fl_shared.ledger.models import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
context.run_migrations()
