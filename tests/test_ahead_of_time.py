"""What becomes of every operator's kernels on GPUs that need not be there."""

import importlib

import ahead_of_time
import pytest

SHARED = ("_norm", "_units")
# They read whole tensors, and do little else.
STREAMING = {"adain", "bias_act", "group_norm_act", "norm_act", "penalty"}
SMALL = {"_combine_kernel", "_add_kernel"}
# A mean is taken apart into two float32 numbers.
SPLITTING = {"adain", "group_norm_act"}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory):
    with ahead_of_time.compilers(tmp_path_factory.mktemp("triton")) as started:
        yield started


@pytest.fixture(scope="module", params=ahead_of_time.CAPABILITIES, ids="sm_{}".format)
def compiled(request, compilers):
    return ahead_of_time.compiled_by(compilers[request.param])


def kernels_of(name):
    return {name for name in vars(importlib.import_module(f"fastgan_kernels.{name}")) if name.endswith("_kernel")}


def test_every_kernel_is_compiled(compiled):
    shared = set().union(*map(kernels_of, SHARED))
    for operator in {c["operator"] for c in compiled}:
        names = {c["kernel"] for c in compiled if c["operator"] == operator}
        assert kernels_of(operator) <= names <= kernels_of(operator) | shared
    assert shared <= {c["kernel"] for c in compiled}


def test_no_kernel_spills(compiled):
    assert not [c for c in compiled if c["bytes spilled"]]


def test_only_data_in_float64_are_computed_in_float64(compiled):
    narrow = [c for c in compiled if "float64" not in c["case"]]
    assert not [c for c in narrow if set(c["float64"]) - ({"add", "sub"} if c["operator"] in SPLITTING else set())]


def test_streams_are_read_16_bytes_at_a_time(compiled):
    streams = [c for c in compiled if c["operator"] in STREAMING and c["kernel"] not in SMALL]
    assert {c["operator"] for c in streams} == STREAMING
    assert not [c for c in streams if "bare" not in c["case"] and not c["16-byte loads"]]
