"""Alembic's environment for the coordinator's database."""
