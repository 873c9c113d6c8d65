"""`fl-admin adapters`: the committed adapters, and the names that they are promoted to."""
