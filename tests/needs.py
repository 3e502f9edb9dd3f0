"""What some tests need of the machine."""

import pytest
import torch

from fastgan import backend

needs_cpp = pytest.mark.skipif(backend.serving("cpu") != "cpp", reason="the C++ kernels do not serve the CPU")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
