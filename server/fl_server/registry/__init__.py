"""Committed adapters under names: promotions."""
