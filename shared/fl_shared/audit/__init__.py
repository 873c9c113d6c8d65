"""What `fl-audit` does: read, check and explain privacy ledgers. Its verbs are in `cli`; nothing writes to a ledger."""
