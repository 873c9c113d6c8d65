"""Records as token ids, grouped by unit, packed into micro-batches."""
