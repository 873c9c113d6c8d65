"""Base models: building, quantising, inspecting and loading them."""
