"""The commands `fl-server` and `fl-admin`."""
