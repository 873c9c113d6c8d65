"""What every process of ours needs to run: logs, threads, children, locks, signals, metrics, limits, private files."""
