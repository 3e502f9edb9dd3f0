"""The operators' tests with C++ kernels that are built for AddressSanitizer, for UndefinedBehaviorSanitizer and for
ThreadSanitizer: `python tests/sanitize.py`, or with `address`, `undefined` or `thread` one of them. Takes long; needs Linux
and GCC.

The extension is built, not a driver of the kernels: torch takes the memory of its tensors from malloc, which the sanitizer
fences, and so all that the tests call with their dtypes, layouts, odd shapes and views is checked as users call it. What is
read in torch itself is not seen. Before the tests a fault is committed on purpose, which must be reported.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitize"
INSTRUCTION_SETS = ("default", "avx2", "avx512")
FLAGS = {
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer"],
    "undefined": ["-fsanitize=undefined"],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"address": "libasan.so", "undefined": "libubsan.so", "thread": "libtsan.so"}
# Python and torch keep what they have until the process ends, which counts as a leak. Of what they do, who are not built for
# it, ThreadSanitizer sees the mutexes only.
OPTIONS = {
    "address": ("ASAN_OPTIONS", "detect_leaks=0"),
    "undefined": ("UBSAN_OPTIONS", "halt_on_error=1 print_stacktrace=1"),
    "thread": (
        "TSAN_OPTIONS",
        "halt_on_error=1 ignore_noninstrumented_modules=1 report_thread_leaks=0 detect_deadlocks=0",
    ),
}
FAULTS = {
    "address": "_C.sample_scale(samples, x.data_ptr(), x.data_ptr(), torch.empty(count - 1).data_ptr())",
    "undefined": "_C.sample_scale(_C.Samples(0, -(2**62), 4), 0, 0, 0)",
    "thread": """
threads = [threading.Thread(target=_C.sample_scale, args=(samples, *[x.data_ptr()] * 3)) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
""",
}
FAULT = """
import threading, torch
from fastgan import _C
count = 1 << 22
samples, x = _C.Samples(0, 1, count), torch.ones(count)
"""
OPERATORS = [["tests/ops", "tests/nn", "tests/test_bad_input.py", "tests/test_same_bits.py"]]
TESTS = {
    "address": OPERATORS,
    "undefined": OPERATORS,
    "thread": [["tests/test_same_bits.py"], ["tests/ops", "-k", "threads"]],
}


def build(kind: str) -> Path:
    """Where the package lies, with kernels built for the sanitizer."""
    folder = FOLDER / kind
    package = folder / "package" / "fastgan"
    shutil.copytree(ROOT / "fastgan", package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    headers = folder / "headers"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", headers, "pybind11"]
    subprocess.run(install, check=True)
    # Little optimised: the code is the same, and takes a fraction of the time to compile.
    flags = [*FLAGS[kind], "-g1", "-O1", "-std=c++17", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
    includes = [f"-I{headers / 'pybind11' / 'include'}", f"-I{sysconfig.get_path('include')}"]
    sources = [ROOT / "csrc" / "bindings.cpp", *(ROOT / "csrc" / "cpu").glob("*.cpp")]
    link = []
    if kind == "thread":
        sources.append(ROOT / "tests" / "openmp_for_tsan.cpp")
        link = ["-Wl,--wrap=GOMP_parallel,--wrap=GOMP_barrier"]
    newest = max(path.stat().st_mtime for path in (*sources, *(ROOT / "csrc").rglob("*.[hi]*"), Path(__file__)))

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < newest:
            subprocess.run(["g++", *flags, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", *flags, "-shared", *objects, *link, "-o", target], check=True)
    return package.parent


def run(kind: str, instruction_set: str, package: Path, *arguments: str) -> tuple[int, list[Path]]:
    """Exit status, and the reports."""
    reports = FOLDER / kind / f"reports-{instruction_set}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    # AddressSanitizer looks for C++'s throw when it starts, and Python is no C++ program.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in (LIBRARIES[kind], "libstdc++.so.6")
    ]
    variable, options = OPTIONS[kind]
    environment = {
        **os.environ,
        variable: f"log_path={reports / 'report'} {options}",
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join(map(str, (package, ROOT / "kernels"))),
        "ATEN_CPU_CAPABILITY": instruction_set,
        "OMP_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "passive",
    }
    # Without random addresses: those of newer kernels are not where GCC's ThreadSanitizer expects them.
    command = ["setarch", "--addr-no-randomize", sys.executable, *arguments]
    status = subprocess.run(command, check=False, env=environment, cwd=FOLDER / kind).returncode
    return status, sorted(reports.iterdir())


def main(kinds: list[str]) -> int:
    failed = False
    for kind in kinds:
        package = build(kind)
        _, reports = run(kind, "avx512", package, "-c", FAULT + FAULTS[kind])
        assert reports, "a fault that was committed on purpose is not reported"
        for instruction_set in INSTRUCTION_SETS:
            for selection in TESTS[kind]:
                tests = [str(ROOT / word) if word.startswith("tests/") else word for word in selection]
                pytest = [
                    "-m",
                    "pytest",
                    f"--rootdir={ROOT}",
                    f"--config-file={ROOT / 'pyproject.toml'}",
                    "-p",
                    "no:cacheprovider",
                ]
                status, reports = run(kind, instruction_set, package, *pytest, *tests)
                print(f"{kind}, {instruction_set}, {' '.join(selection)}: exit status {status}, {len(reports)} reports")
                for report in reports:
                    print(report.read_text()[:4000])
                failed |= bool(status or reports)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FLAGS)))
