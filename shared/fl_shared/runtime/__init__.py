"""What every process of ours needs to run: logs, threads, signals, metrics, limits, offline settings, private files."""
