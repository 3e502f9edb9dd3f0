"""What some tests need of the machine."""

import pytest

from fastgan import backend

needs_cpp = pytest.mark.skipif(backend.serving("cpu") != "cpp", reason="the C++ kernels do not serve the CPU")
