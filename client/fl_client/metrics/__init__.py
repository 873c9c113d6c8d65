"""What a site measures for its own Prometheus: rounds, budget, GPU."""
