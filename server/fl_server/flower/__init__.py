"""Flower's SuperLink: its process, its nodes, its runs."""
