"""What Triton makes of the kernels on GPUs that need not be there.

`python tests/ahead_of_time.py` compiles every case of every operator for every GPU, which takes some minutes, and writes
`kernels/compiled.csv` beside this file. With a GPU's name it prints that GPU's rows. The tests of an operator's kernels name
its cases: `compiled_cases` there gives (name, launch).
"""

import csv
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

import fastgan_kernels
import torch
import triton
from triton.backends.compiler import GPUTarget

GPUS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TABLE = Path(__file__).parent / "kernels" / "compiled.csv"
# Cases with these words in their names are left out where `few` are enough: all of them take as long as the other tests.
LEFT_OUT = ("float64", "bfloat16", "rows")

Cases = Iterable[tuple[str, Callable[[], object]]]
Row = dict[str, str]


def digest() -> str:
    """Of the kernels' sources."""
    sources = sorted(Path(fastgan_kernels.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def read_table() -> tuple[str, list[Row]]:
    """The digest of the sources that the table is of, and its rows."""
    with TABLE.open() as file:
        head = file.readline()
        return head.split()[-1], list(csv.DictReader(file))


def write_table() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for of_gpu in pool.map(compile_apart, GPUS) for row in of_gpu]
    with TABLE.open("w", newline="") as file:
        file.write(f"# made by Triton {triton.__version__} of kernels {digest()}\n")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def compile_apart(gpu: str, few: bool = False) -> list[Row]:
    """The GPU's rows, from a process of its own: Triton has one driver in each."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [str(Path(fastgan_kernels.__file__).parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    command = [sys.executable, __file__, gpu, *["few"] * few]
    with TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        return json.loads(
            subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout
        )


def compile_here(gpu: str, few: bool) -> list[Row]:
    """A row for each kernel of each operator, of all its cases."""
    compiled: list[dict] = []
    _compile_where_launched(GPUS[gpu], compiled)
    rows = []
    for operator, cases in _cases_of_every_operator():
        compiled.clear()
        for case, launch_everything in cases:
            if few and any(word in case for word in LEFT_OUT):
                continue
            before = len(compiled)
            launch_everything()
            for properties in compiled[before:]:
                properties["case"] = case
        for kernel in sorted({properties["kernel"] for properties in compiled}):
            rows.append(_row(gpu, operator, kernel, [p for p in compiled if p["kernel"] == kernel]))
    return rows


def _row(gpu: str, operator: str, kernel: str, compiled: list[dict]) -> Row:
    in_float64 = {instruction for p in compiled if "float64" not in p["case"] for instruction in p["float64"]}
    numbers = {name: max(p[name] for p in compiled) for name in ("registers", "bytes spilled", "bytes shared")}
    return {
        "gpu": gpu,
        "operator": operator,
        "kernel": kernel,
        "cases": str(len(compiled)),
        **{name: str(most) for name, most in numbers.items()},
        "float64": " ".join(sorted(in_float64)),  # of other data
        "16-byte loads": "yes" if all(p["16-byte loads"] for p in compiled if "bare" not in p["case"]) else "",
    }


def _compile_where_launched(target: GPUTarget, compiled: list[dict]) -> None:
    class Driver:
        get_current_device = get_current_stream = staticmethod(lambda *_: 0)
        get_current_target = staticmethod(lambda: target)

    def compile_instead(kernel, grid):
        def launch(*args, **options):
            with redirect_stdout(StringIO()) as log:
                binary = kernel.run(*args, grid=grid, warmup=True, **options)
            if id(binary) not in seen:
                seen[id(binary)] = binary
                found = _on_nvidia(binary.asm, log.getvalue()) if target.backend == "cuda" else _on_amd(binary.asm)
                compiled.append({"kernel": kernel.__name__, "bytes shared": binary.metadata.shared, **found})

        return launch

    seen: dict[int, object] = {}
    if target.backend == "hip":
        torch.version.hip = "of the compiler alone"
        triton.knobs.amd.use_buffer_ops = False  # a pass of theirs in Triton 3.6 fails an assertion at adain
    triton.runtime.driver.set_active(Driver())
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    triton.runtime.jit.KernelInterface.__getitem__ = compile_instead


def _on_nvidia(asm: dict, log: str) -> dict:
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "bytes spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
        "float64": re.findall(r"\b(add|sub|mul|fma|div|sqrt|rsqrt)\S*\.f64", asm["ptx"]),
        "16-byte loads": bool(re.search(r"ld\.global\S*\.(v4\.b32|v2\.b64)", asm["ptx"])),
    }


def _on_amd(asm: dict) -> dict:
    code = asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", code)[1]),
        "bytes spilled": 4 * sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", code))),
        "float64": re.findall(r"\bv_(?:pk_)?(add|mul|fma|div|sqrt|rsq)\w*_f64", code),
        "16-byte loads": bool(re.search(r"(global|buffer)_load_dwordx4", code)),
    }


def _cases_of_every_operator() -> Iterator[tuple[str, Cases]]:
    for path in sorted((Path(__file__).parent / "kernels").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        tests = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = tests  # where dataclasses look for their names
        spec.loader.exec_module(tests)
        if hasattr(tests, "compiled_cases"):
            yield path.stem.removeprefix("test_"), tests.compiled_cases()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        write_table()
    else:
        print(json.dumps(compile_here(sys.argv[1], few="few" in sys.argv[2:])))
