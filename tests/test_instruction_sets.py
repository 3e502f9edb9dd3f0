"""What is marked `instruction_sets` holds with the kernels of lesser CPUs than this one too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_cpp

LESSER = ("DEFAULT", "AVX2")


@needs_cpp
@pytest.mark.parametrize("capability", [c for c in LESSER if c != torch.backends.cpu.get_cpu_capability()])
def test_every_instruction_set_passes_the_same_checks(capability):
    """torch's own variable chooses the kernels of a lesser CPU."""
    command = [sys.executable, "-m", "pytest", "-m", "instruction_sets", "-k", "not float64 and not bfloat16"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    run = subprocess.run(
        [*command, str(Path(__file__).parent / "ops")], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:]
