"""Measure the engine from outside: canaries, one-run auditing (Steinke et al. 2023), distribution tests."""
