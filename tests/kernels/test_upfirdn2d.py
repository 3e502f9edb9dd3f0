"""The kernel of upfirdn2d against its definition, and compiled ahead of time."""

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import triton
from fastgan_kernels import upfirdn2d as kernels
from fastgan_kernels.upfirdn2d import upfirdn2d
from triton.backends.compiler import GPUTarget

# The interpreter computes masked elements too: NumPy's warnings say nothing.
pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
FILTERS = {"binomial": (4, 4), "separable": (5,), "ragged": (3, 4), "one tap": (1, 1), "long": (12,)}
RESAMPLINGS = [
    ([1, 1], [1, 1], [6, 6, 6, 6]),
    ([2, 2], [1, 1], [6, 5, 6, 5]),
    ([1, 1], [2, 2], [5, 5, 5, 5]),
    ([3, 1], [2, 3], [-2, 11, 10, -1]),
    ([1, 5], [3, 4], [9, 3, -7, 12]),
]


def problem(shape, filter_size, layout="planes", dtype=torch.float64):
    x = torch.randn(shape, dtype=torch.float64, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout]), torch.rand(filter_size, device=DEVICE) + 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("filter_name", FILTERS)
@pytest.mark.parametrize(("up", "down", "padding"), RESAMPLINGS, ids=str)
def test_values_are_those_of_the_definition(up, down, padding, filter_name, layout):
    from fastgan.ops.upfirdn2d import reference

    for shape, flip in itertools.product([(2, 3, 6, 7), (1, 70, 5, 4), (2, 1, 40, 35)], (False, True)):
        x, f = problem(shape, FILTERS[filter_name], layout)
        y = upfirdn2d(x, f, up, down, padding, flip, 1.7)
        torch.testing.assert_close(y, reference(x, f, up, down, padding, flip, 1.7))
        assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_float32(layout, dtype):
    x, f = problem((2, 3, 9, 8), (6, 6), layout, dtype)
    found = upfirdn2d(x, f, [2, 2], [1, 1], [5, 5, 5, 5], False, 1.0)
    exact = upfirdn2d(x.double(), f, [2, 2], [1, 1], [5, 5, 5, 5], False, 1.0)
    assert found.dtype == dtype
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=step, atol=10 * torch.finfo(torch.float32).eps)


def test_views_and_empty_batches():
    x, f = problem((4, 6, 5, 7), (4, 4))
    arguments = (f, [2, 2], [1, 1], [2, 1, 2, 1], False, 4.0)
    for view in (x.mT, x[::2], x[:, :1].expand(4, 6, 5, 7), x[..., 1:4, ::2]):
        torch.testing.assert_close(upfirdn2d(view, *arguments), upfirdn2d(view.clone(), *arguments))
    assert upfirdn2d(x[:0], *arguments).shape == (0, 6, 10, 14)


# ── Ahead of time ────────────────────────────────────────────────────────────────────────────────────────────────────

CAPABILITIES = (80, 90, 100)


def compile_every_case(capability: int) -> None:
    """Print, a line of JSON each, what ptxas makes of the kernels that the operator would launch on such a GPU."""

    class Driver:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    def compile_instead(kernel, grid):
        def launch(*args, **options):
            with redirect_stdout(StringIO()) as log:
                ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
            if log.getvalue():
                compiled.append({
                    "bytes spilled": int(re.search(r"(\d+) bytes spill stores", log.getvalue())[1]),
                    "float64": bool(re.search(r"\b(add|sub|mul|fma|div)\S*\.f64", ptx)),
                })  # fmt: skip

        return launch

    compiled: list[dict] = []
    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    triton.runtime.jit.KernelInterface.__getitem__ = compile_instead
    for dtype, layout, (up, down, padding), size in itertools.product(
        (torch.float32, torch.bfloat16, torch.float64), LAYOUTS, RESAMPLINGS[:3], ((4, 4), (12,))
    ):
        compiled.clear()
        x, f = problem((2, 64, 32, 32), size, layout, dtype)
        upfirdn2d(x, f, up, down, padding, False, 1.0)
        for properties in compiled:
            print(json.dumps({"case": f"{dtype} {layout} {up} {down} {size}", **properties}))


@pytest.fixture(scope="module", autouse=True)
def compilations(tmp_path_factory) -> Iterator[dict[int, subprocess.Popen]]:
    """Compilers that run beside the other tests, as they take as long."""
    path = os.pathsep.join([str(Path(kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    started = {
        capability: subprocess.Popen(
            [sys.executable, __file__, str(capability)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for capability in CAPABILITIES
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_case_compiles_without_spilling(compilations, capability):
    output, _ = compilations[capability].communicate()
    assert compilations[capability].returncode == 0
    compiled = [json.loads(line) for line in output.splitlines()]
    assert len({c["case"] for c in compiled}) == 36
    assert not [c for c in compiled if c["bytes spilled"]]
    assert not [c for c in compiled if c["float64"] and "float64" not in c["case"]]


if __name__ == "__main__":
    compile_every_case(int(sys.argv[1]))
