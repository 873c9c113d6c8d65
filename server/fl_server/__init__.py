"""The coordinator: enrols sites, launches runs through Flower, aggregates what sites release."""

__version__ = "0.1.0"
