"""What a run teaches: one file for each kind of `[task]`, behind one protocol."""
