"""Adapters in the forms that other software reads."""
