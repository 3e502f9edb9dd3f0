"""Training reference systems: one loop for all, one module per system."""
