"""Predictions of a trained adapter."""
