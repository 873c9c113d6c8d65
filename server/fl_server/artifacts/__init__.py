"""Where the bytes of committed rounds lie, by their digest: adapters, and the states of server optimizers."""
