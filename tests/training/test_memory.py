"""`keep_freed_memory`, in processes of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from fastgan.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.set_num_threads(1)
def step():
    tensors = [torch.ones(1 << 22) for _ in range(4)]  # 16 MiB each
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_asked_for(how):
    return int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again_without_asking_the_system():
    usual = pages_asked_for("as usual")
    if usual < 100:
        pytest.skip("this malloc keeps what is freed anyway")
    assert pages_asked_for("keep") < usual / 10
