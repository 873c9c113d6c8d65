"""The coordinator's home: its folders, its settings (server.toml), durable writes into it."""
