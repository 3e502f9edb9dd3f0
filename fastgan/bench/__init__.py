"""fastgan against stock PyTorch, measured: what `fastgan bench` runs. `bench_<part>.py` has the cases of one operator or
model."""
