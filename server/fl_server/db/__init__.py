"""The coordinator's SQL: sites, invitations, runs, rounds, replies, manifests, events."""
