"""What Triton and ptxas make of kernels on GPUs that need not be there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path

import fastgan_kernels
import triton
from triton.backends.compiler import GPUTarget

CAPABILITIES = (80, 90, 100)


def compile_every_kernel(cases: Iterable[tuple[str, Callable]], capability: int) -> None:
    """Print, a line of JSON each, what ptxas makes of the kernels that each case would launch on such a GPU."""

    class Driver:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    compiled = []

    def compile_instead(kernel, grid):
        def launch(*args, **options):
            with redirect_stdout(StringIO()) as log:
                ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
            if log.getvalue():
                compiled.append({
                    "kernel": kernel.__name__,
                    "bytes spilled": int(re.search(r"(\d+) bytes spill stores", log.getvalue())[1]),
                    "registers": int(re.search(r"Used (\d+) registers", log.getvalue())[1]),
                    "float64": sorted(set(re.findall(r"\b(add|sub|mul|fma|div|sqrt|rsqrt)\S*\.f64", ptx))),
                    "16-byte loads": bool(re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", ptx)),
                })  # fmt: skip

        return launch

    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    triton.runtime.jit.KernelInterface.__getitem__ = compile_instead
    for case, launch_everything in cases:
        compiled.clear()
        launch_everything()
        for properties in compiled:
            print(json.dumps({"case": case, **properties}))


@contextmanager
def compilers(script: str, cache: Path) -> Iterator[dict[int, subprocess.Popen]]:
    """Compilers that run beside the other tests, as they take as long: `script`, with a capability as its argument."""
    path = [
        str(Path(fastgan_kernels.__file__).parents[1]),
        str(Path(__file__).parent),
        os.environ.get("PYTHONPATH", ""),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    started = {
        capability: subprocess.Popen(
            [sys.executable, script, str(capability)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for capability in CAPABILITIES
    }
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()
            process.stdout.close()


def compiled_by(process: subprocess.Popen) -> list[dict]:
    output, _ = process.communicate()
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def kernels_of(module) -> set[str]:
    return {name for name in vars(module) if name.endswith("_kernel")}
