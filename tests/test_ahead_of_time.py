"""What becomes of every operator's kernels on GPUs that need not be there."""

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
of_every_operator = pytest.mark.parametrize("operator", OPERATORS)


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    with ahead_of_time.compilers(tmp_path_factory.mktemp("triton")) as started:
        yield started


@pytest.fixture(scope="module", params=ahead_of_time.CAPABILITIES, ids="sm_{}".format)
def everything(request, compilers):
    return ahead_of_time.compiled_by(compilers[request.param])


@pytest.fixture
def compiled(everything, operator):
    return [c for c in everything if c["operator"] == operator]


def kernels_of(name):
    return {name for name in vars(importlib.import_module(f"fastgan_kernels.{name}")) if name.endswith("_kernel")}


@of_every_operator
def test_every_kernel_is_compiled(compiled, operator):
    names = {c["kernel"] for c in compiled}
    assert kernels_of(operator) <= names <= kernels_of(operator).union(*map(kernels_of, SHARED))


def test_every_shared_kernel_is_compiled(everything):
    assert set().union(*map(kernels_of, SHARED)) <= {c["kernel"] for c in everything}


@of_every_operator
def test_no_kernel_spills(compiled):
    assert not [c for c in compiled if c["bytes spilled"]]


@of_every_operator
def test_only_data_in_float64_are_computed_in_float64(compiled, operator):
    allowed = {"add", "sub"} if operator in SPLITTING else set()
    assert not [c for c in compiled if set(c["float64"]) - allowed and "float64" not in c["case"]]


@pytest.mark.parametrize("operator", STREAMING)
def test_streams_are_read_16_bytes_at_a_time(compiled):
    streams = [c for c in compiled if c["kernel"] not in SMALL and "bare" not in c["case"]]
    assert streams and not [c for c in streams if not c["16-byte loads"]]
