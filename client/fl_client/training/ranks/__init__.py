"""Several processes of one site that train together, one per GPU, under torchrun."""
