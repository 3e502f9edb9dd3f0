"""The operators' tests with C++ kernels that are built for the sanitizers: `python tests/sanitize.py`, or with `memory` for
AddressSanitizer and UndefinedBehaviorSanitizer alone, or `thread` for ThreadSanitizer. Takes long; what has passed is not
run again until a source or a test changes, so that it may be stopped and go on later. Needs Linux and GCC.

The extension is built, not a driver of the kernels: torch takes the memory of its tensors from malloc, which the sanitizer
fences, and so all that the tests call with their dtypes, layouts, odd shapes and views is checked as users call it. What is
read in torch itself is not seen. Before the tests faults are committed on purpose, each of which must be reported.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
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
FOLDERS = [ROOT / "tests" / "ops", ROOT / "tests" / "nn"]
OTHERS = [ROOT / "tests" / "test_bad_input.py", ROOT / "tests" / "test_same_bits.py"]
OPERATORS = [[path] for folder in FOLDERS for path in sorted(folder.glob("test_*.py"))] + [[path] for path in OTHERS]
# Not the workers of a DataLoader: ThreadSanitizer ends a process that was forked beside threads at its own first one, or,
# with die_after_fork=0, at the first that has the id of one of the parent's.
THREADS = [[path, "-k", "threads"] for (path,) in OPERATORS if re.search(r"def test\w*threads", path.read_text())]
TESTS = {"memory": OPERATORS, "thread": THREADS}


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
        "OMP_NUM_THREADS": "4",
        "OMP_WAIT_POLICY": "passive",
    }
    # Without random addresses: those of newer kernels are not where GCC's ThreadSanitizer expects them.
    command = ["setarch", "--addr-no-randomize", sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=FOLDER / kind)
    # Beside AddressSanitizer, whose function it calls to choose a file, UndefinedBehaviorSanitizer has none of its own.
    if "runtime error: " in result.stderr:
        (reports / "UBSAN").write_text(result.stderr)
    return result


def passes(kind: str, instruction_set: str, tests: list[Path | str]) -> bool:
    """Whether a file's tests pass and nothing is reported. What has passed is remembered until a file changes."""
    file = Path(tests[0])
    folder = FOLDER / kind / instruction_set / file.relative_to(ROOT).with_suffix("")
    passed = folder / "passed"
    if passed.exists() and passed.stat().st_mtime > newest(ROOT / "csrc", ROOT / "fastgan" / "ops", file):
        return True
    start = time.time()
    pytest = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider", "-s"]
    result = run(kind, instruction_set, folder, "-m", "pytest", *pytest, *tests)
    reports = sorted(folder.iterdir())
    outcome = (result.stdout + result.stderr).rstrip().rpartition("\n")[2]
    print(f"{kind}, {instruction_set}, {file.relative_to(ROOT)}: {outcome}, {len(reports)} reports", flush=True)
    for report in reports:
        print(report.read_text()[:4000])
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-4000:])
    elif not reports:
        passed.touch()
        os.utime(passed, (start, start))
    return passed.exists()


def main(kinds: list[str]) -> int:
    all_pass = True
    for kind in kinds:
        build(kind)
        for fault in FAULTS[kind]:
            reports = FOLDER / kind / "fault"
            run(kind, INSTRUCTION_SETS[0], reports, "-c", FAULT + fault)
            assert any(reports.iterdir()), f"a fault that was committed on purpose is not reported: {fault}"
        cases = [(instruction_set, tests) for instruction_set in INSTRUCTION_SETS for tests in TESTS[kind]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            all_pass &= all(list(pool.map(lambda case, kind=kind: passes(kind, *case), cases)))
    return int(not all_pass)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(FLAGS)))
