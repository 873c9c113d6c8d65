"""`fl-admin runs`: plan, launch and follow runs."""
