"""Runs: launch, rounds, replies, events."""
