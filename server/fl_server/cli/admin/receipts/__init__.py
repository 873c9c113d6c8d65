"""`fl-admin receipts`: what sites signed about their rounds."""
