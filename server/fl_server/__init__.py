"""The coordinator: enrols sites, launches runs through Flower, aggregates the updates that sites release."""
