"""Differentially private LoRA training of quantised Mixture-of-Experts models, exact per privacy unit."""
