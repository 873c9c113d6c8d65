"""The trusted half of a site: checks each round, charges the ledger, trains, and releases the update."""
