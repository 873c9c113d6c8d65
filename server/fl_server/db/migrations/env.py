"""Alembic runs this: it migrates over the connection that `fl_server.db.store` hands it."""

from __future__ import annotations

from alembic import context

from fl_server.db.models import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
