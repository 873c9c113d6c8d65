"""Keep a coordinator alive: set-up, supervision of its processes, metrics, backups."""
