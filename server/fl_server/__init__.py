"""The coordinator: enrols sites, launches runs through Flower, aggregates what sites release."""
