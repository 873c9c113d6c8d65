"""The small app that Flower ships: a ServerApp that drives a run, a ClientApp that only forwards bytes."""
