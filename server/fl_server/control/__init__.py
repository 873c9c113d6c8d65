"""The gRPC service behind `fl-admin` and `fl-audit`."""
