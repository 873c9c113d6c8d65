"""Random numbers of the mechanism: Poisson sampling and discrete Gaussian noise from the operating system."""
