"""A site's home, its settings (site.toml), its address, its locks: what every other room may know of it."""
