"""A round's private training as a whole: model, data, engine and devices, on one rank or several."""
