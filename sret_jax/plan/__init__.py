"""What a training step takes on devices that need not be there: compiled for them, compared with published rates."""
