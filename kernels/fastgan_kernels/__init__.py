"""Triton kernels of fastgan, one module per operator: tensors in, tensors out, and nothing of autograd."""
