"""What Triton and ptxas make of kernels on GPUs that need not be there.

`python ahead_of_time.py CAPABILITY` prints it, a line of JSON for each kernel that a case launches. The tests of an
operator's kernels name its cases: `compiled_cases` there gives (name, launch).
"""

import importlib.util
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
# The one for which all cases are compiled. For the others those with these words in their names are not: all of them take
# as long as the other tests.
WHOLE_CAPABILITY = 90
LEFT_OUT = ("float64", "bfloat16", "rows")

Cases = Iterable[tuple[str, Callable[[], object]]]


def compile_every_kernel(operator: str, cases: Cases, capability: int) -> None:
    """Print what ptxas makes of the kernels that each case would launch on such a GPU."""

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
        if capability != WHOLE_CAPABILITY and any(word in case for word in LEFT_OUT):
            continue
        compiled.clear()
        launch_everything()
        for properties in compiled:
            print(json.dumps({"operator": operator, "case": case, **properties}))


def cases_of_every_operator() -> Iterator[tuple[str, Cases]]:
    for path in sorted((Path(__file__).parent / "kernels").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        tests = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = tests  # where dataclasses look for their names
        spec.loader.exec_module(tests)
        if hasattr(tests, "compiled_cases"):
            yield path.stem.removeprefix("test_"), tests.compiled_cases()


@contextmanager
def compilers(cache: Path) -> Iterator[dict[int, subprocess.Popen]]:
    """A compiler for each capability, at work."""
    path = [str(Path(fastgan_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    started = {
        capability: subprocess.Popen(
            [sys.executable, __file__, str(capability)], env=environment, stdout=subprocess.PIPE, text=True
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


if __name__ == "__main__":
    for operator, cases in cases_of_every_operator():
        compile_every_kernel(operator, cases, int(sys.argv[1]))
