"""`fl-audit`: read, check and explain privacy ledgers. One file per verb; nothing here writes to a ledger."""
