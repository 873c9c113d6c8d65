"""Flower's half of a site and what keeps it away: SuperNode, tunnel, sandbox, system call filter, probe."""
