"""Command lines: `fl-client` and `fl-model`."""
