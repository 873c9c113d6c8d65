"""`fl-client keys`: the key that signs the ledger and what leaves."""
