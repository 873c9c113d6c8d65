"""The one open port: TLS connections, limits, the HTTP routes for sites, and the passage to gRPC."""
