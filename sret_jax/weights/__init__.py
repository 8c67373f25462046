"""Variables in and out: official PyTorch names and layouts."""
