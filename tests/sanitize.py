"""The operators' tests with C++ kernels that are built for the sanitizers: `python tests/sanitize.py`. What follows chooses:
`memory` for AddressSanitizer and UndefinedBehaviorSanitizer, `thread` for ThreadSanitizer, files of tests. Takes long; what
has passed is not run again until a source or a test changes, so that it may be stopped and go on later. Needs Linux and GCC.

The extension is built, not a driver of the kernels: torch takes the memory of its tensors from malloc, which the sanitizer
fences, and so all that the tests call with their dtypes, layouts, odd shapes and views is checked as users call it. What is
read in torch itself is not seen. Before the tests faults are committed on purpose, each of which must be reported.

Left out are tests that call no kernel in a way of their own: those of the schemas, of torch.compile and of Triton. With the
other instruction sets than the first run the files in `EVERY_SET`: two that call every operator, with all dtypes, layouts,
orders and odd shapes, and those of kernels that have forms of their own for a set.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "sanitize"
INSTRUCTION_SETS = ("avx512", "avx2", "default")
FLAGS = {
    "memory": ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
LIBRARIES = {"memory": "libasan.so", "thread": "libtsan.so"}
# Python and torch keep what they have until the process ends, which counts as a leak. Of what they do, who are not built for
# it, ThreadSanitizer sees the mutexes only.
OPTIONS = {
    "ASAN": "log_path={} detect_leaks=0",
    "UBSAN": "print_stacktrace=1",
    "TSAN": "log_path={} halt_on_error=1 ignore_noninstrumented_modules=1 report_thread_leaks=0 detect_deadlocks=0",
}
FAULT = """
import threading, torch
from fastgan import _C
count = 1 << 22
samples, x = _C.Samples(0, 1, count), torch.ones(count)
"""
FAULTS = {
    "memory": [
        "_C.sample_scale(samples, x.data_ptr(), x.data_ptr(), torch.empty(count - 1).data_ptr())",
        "_C.sample_scale(_C.Samples(0, -(2**62), 4), 0, 0, 0)",
    ],
    "thread": [
        """
threads = [threading.Thread(target=_C.sample_scale, args=(samples, *[x.data_ptr()] * 3)) for _ in range(2)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
"""
    ],
}
OPERATORS = sorted((ROOT / "tests" / "ops").glob("test_*.py"))
OPERATORS += sorted((ROOT / "tests" / "nn").glob("test_*.py"))
OPERATORS += [ROOT / "tests" / "test_bad_input.py", ROOT / "tests" / "test_same_bits.py"]
EVERY_SET = {"test_bad_input", "test_same_bits", "test_conv", "test_upfirdn2d"}
# Not the workers of a DataLoader: ThreadSanitizer ends a process that was forked beside threads at its own first one, or,
# with die_after_fork=0, at the first that has the id of one of the parent's.
THREADS = [path for path in OPERATORS if re.search(r"def test\w*threads", path.read_text())]
TESTS = {"memory": (OPERATORS, "not (opcheck or compile or triton)"), "thread": (THREADS, "threads")}


def cases(kind: str) -> Iterator[tuple[str, Path, str]]:
    """Instruction set, file, and which of its tests."""
    files, chosen = TESTS[kind]
    for instruction_set in INSTRUCTION_SETS:
        for file in files:
            if instruction_set == INSTRUCTION_SETS[0] or file.stem in EVERY_SET:
                yield instruction_set, file, chosen


def newest(*paths: Path) -> float:
    """When the last of the files in them was changed."""
    files = [file for path in paths for file in (path.rglob("*.*") if path.is_dir() else [path])]
    return max(file.stat().st_mtime for file in files if file.suffix in {".py", ".cpp", ".h", ".inc"})


def build(kind: str) -> None:
    """The package, with kernels built for the sanitizer."""
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
        link = ["-Wl,--wrap=GOMP_parallel,--wrap=GOMP_barrier,--wrap=GOMP_loop_end"]
    changed = newest(ROOT / "csrc", *sources, Path(__file__))

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < changed:
            subprocess.run(["g++", *flags, *includes, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    target = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", *flags, "-shared", *objects, *link, "-o", target], check=True)


def run(kind: str, instruction_set: str, reports: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Python with the package that `build` made. The folder of the reports is emptied before."""
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    # AddressSanitizer looks for C++'s throw when it starts, and Python is no C++ program.
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip()
        for name in (LIBRARIES[kind], "libstdc++.so.6")
    ]
    environment = {
        **os.environ,
        **{f"{name}_OPTIONS": options.format(reports / name) for name, options in OPTIONS.items()},
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": os.pathsep.join(map(str, (FOLDER / kind / "package", ROOT / "kernels"))),
        "ATEN_CPU_CAPABILITY": instruction_set,
        "OMP_NUM_THREADS": "4" if kind == "thread" else "2",
        "OMP_WAIT_POLICY": "passive",
    }
    # Without random addresses: those of newer kernels are not where GCC's ThreadSanitizer expects them.
    command = ["setarch", "--addr-no-randomize", sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=FOLDER / kind)
    # Beside AddressSanitizer, whose function it calls to choose a file, UndefinedBehaviorSanitizer has none of its own.
    if "runtime error: " in result.stderr:
        (reports / "UBSAN").write_text(result.stderr)
    return result


def passed(kind: str, instruction_set: str, file: Path, chosen: str) -> int:
    """The number of its tests, or 0 if one fails or something is reported. It is remembered until a file changes."""
    folder = FOLDER / kind / instruction_set / file.relative_to(ROOT).with_suffix("")
    count = folder / "passed"
    if count.exists() and count.stat().st_mtime > newest(ROOT / "csrc", ROOT / "fastgan" / "ops", file):
        return int(count.read_text())
    start = time.time()
    pytest = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider", "-s"]
    result = run(kind, instruction_set, folder, "-m", "pytest", *pytest, file, "-k", chosen)
    reports = sorted(folder.iterdir())
    outcome = (result.stdout + result.stderr).rstrip().rpartition("\n")[2]
    print(f"{kind}, {instruction_set}, {file.relative_to(ROOT)}: {outcome}, {len(reports)} reports", flush=True)
    for report in reports:
        print(report.read_text()[:4000])
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-4000:])
    elif not reports:
        count.write_text(outcome.split(" passed")[0])
        os.utime(count, (start, start))
        return int(count.read_text())
    return 0


def main(arguments: list[str]) -> int:
    chosen = {Path(argument).resolve() for argument in arguments if argument not in FLAGS}
    all_pass = True
    for kind in [argument for argument in arguments if argument in FLAGS] or FLAGS:
        build(kind)
        for fault in FAULTS[kind]:
            reports = FOLDER / kind / "fault"
            run(kind, INSTRUCTION_SETS[0], reports, "-c", FAULT + fault)
            assert any(reports.iterdir()), f"a fault that was committed on purpose is not reported: {fault}"
        todo = [case for case in cases(kind) if not chosen or case[1] in chosen]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            counts = list(pool.map(lambda case, kind=kind: passed(kind, *case), todo))
        all_pass &= all(counts)
        clean = f"{sum(map(bool, counts))} of {len(todo)} runs of a file with an instruction set"
        print(f"{kind}: {clean} without a failure or a report, {sum(counts)} tests", flush=True)
    return int(not all_pass)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
