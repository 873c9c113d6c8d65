"""Fresh places in the PostgreSQL server that the tests start."""

from __future__ import annotations

import itertools

import sqlalchemy as sa

_numbers = itertools.count(1)


def fresh_schema(address: sa.engine.URL) -> str:
    """Make a schema, and return the address at which it is the only one in sight."""
    name = f"ledger_{next(_numbers)}"
    engine = sa.create_engine(address, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sa.text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return address.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)
