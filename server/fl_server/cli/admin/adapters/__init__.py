"""`fl-admin adapters`: the committed adapters, and the names under which they are released."""
