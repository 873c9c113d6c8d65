"""`fl-admin sites`: who may take part."""
