"""What becomes of every operator's kernels on GPUs that need not be there: `compiled.csv` beside their tests says it."""

import importlib
from pathlib import Path

import ahead_of_time
import pytest

SHARED = ("_norm", "_units")
# They read whole tensors, and do little else.
STREAMING = ("adain", "bias_act", "group_norm_act", "norm_act", "penalty")
SMALL = ("_combine_kernel", "_add_kernel")
# A mean is taken apart into two float32 numbers.
SPLITTING = ("adain", "group_norm_act")


OPERATORS = sorted(
    path.stem.removeprefix("test_")
    for path in (Path(__file__).parent / "kernels").glob("test_*.py")
    if "def compiled_cases(" in path.read_text()
)

NOW = "sm_90, now"
of_every_gpu = pytest.mark.parametrize("gpu", [NOW, *ahead_of_time.GPUS])
# AMD's has to be compiled for, and nobody has tuned for it.
of_tuned_gpus = pytest.mark.parametrize("gpu", [NOW, *(gpu for gpu in ahead_of_time.GPUS if gpu.startswith("sm_"))])


@pytest.fixture(scope="module")
def rows():
    """By GPU: what the table says, and of the cases that do not take long what the compiler says."""
    _, table = ahead_of_time.read_table()
    rows = {gpu: [row for row in table if row["gpu"] == gpu] for gpu in ahead_of_time.GPUS}
    return rows | {NOW: ahead_of_time.compile_apart("sm_90", few=True)}


def of_operator(rows, operator):
    return [row for row in rows if row["operator"] == operator]


def kernels_of(name):
    return {name for name in vars(importlib.import_module(f"fastgan_kernels.{name}")) if name.endswith("_kernel")}


def test_the_table_is_of_these_kernels():
    digest, _ = ahead_of_time.read_table()
    assert digest == ahead_of_time.digest(), "the kernels have changed: `make kernels` compiles them for every GPU"


@of_every_gpu
def test_every_kernel_is_compiled(rows, gpu):
    for operator in OPERATORS:
        names = {row["kernel"] for row in of_operator(rows[gpu], operator)}
        assert kernels_of(operator) <= names <= kernels_of(operator).union(*map(kernels_of, SHARED))
    assert set().union(*map(kernels_of, SHARED)) <= {row["kernel"] for row in rows[gpu]}


@of_tuned_gpus
def test_no_kernel_spills(rows, gpu):
    assert rows[gpu] and not [row for row in rows[gpu] if row["bytes spilled"] != "0"]


@of_every_gpu
def test_only_data_in_float64_are_computed_in_float64(rows, gpu):
    for operator in OPERATORS:
        allowed = {"add", "sub"} if operator in SPLITTING else set()
        assert not [row for row in of_operator(rows[gpu], operator) if set(row["float64"].split()) - allowed]


@of_tuned_gpus
def test_streams_are_read_16_bytes_at_a_time(rows, gpu):
    for operator in STREAMING:
        streams = [row for row in of_operator(rows[gpu], operator) if row["kernel"] not in SMALL]
        assert streams and not [row for row in streams if not row["16-byte loads"]]
