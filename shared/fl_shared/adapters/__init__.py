"""Adapters as bytes: strict safetensors, and the rounded forms in which updates travel."""
