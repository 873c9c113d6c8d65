"""What a trained adapter answers."""
