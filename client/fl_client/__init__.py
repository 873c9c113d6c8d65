"""The site's half of Concordat: the agent that holds data, model, policy and ledger, and its command line."""
