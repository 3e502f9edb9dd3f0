"""fastgan against stock PyTorch, measured: `python -m benchmarks`, from a checkout."""
