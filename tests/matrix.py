"""The tests with one built wheel under other versions: `python tests/matrix.py`, what follows goes to pytest.

For each Python found, one wheel is built, which does not see torch. Then, for each version of torch and of numpy below, an
environment is made, the wheel installed, and the tests run against it. What cannot be installed is said, with the reason.
Builds of torch that bring CUDA are left alone, as those are gigabytes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.15", "2.14", "2.13", "2.12", "2.11", "2.10")
NUMPYS = ("1.26", "2.0", "2.2", "2.4")
# What the suite needs besides the package's own requirements.
TOOLS = ("triton==3.6.0", "pytest", "pytest-xdist", "hypothesis", "build", "safetensors", "markdown-it-py")


class NotThere(Exception):
    """Something cannot be installed; the message is the last that was said of it."""


def said(*command: object, **environment: str) -> str:
    run = subprocess.run(
        list(map(str, command)), env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    if run.returncode:
        lines = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("ERROR")]
        raise NotThere(lines[-1] if lines else (run.stderr or run.stdout).strip().splitlines()[-1])
    return run.stdout


def cpu_build(own: Path, torch: str) -> str:
    """The version of torch's latest build without CUDA."""
    listed = said(own, "-m", "pip", "index", "versions", "torch").split("Available versions: ")[1].splitlines()[0]
    for version in listed.split(", "):
        if version.startswith(f"{torch}.") and version.endswith("+cpu"):
            return version
    raise NotThere("pip finds no CPU build (+cpu) of it")


def environment(python: str, torch: str, numpy: str, folder: Path) -> Path:
    """Its interpreter."""
    said(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    said(own, "-m", "pip", "install", "--quiet", f"torch=={cpu_build(own, torch)}", f"numpy=={numpy}.*", *TOOLS)
    return own


def outcome(own: Path, wheel: Path, folder: Path, arguments: list[str]) -> str:
    said(own, "-m", "pip", "install", "--quiet", wheel)
    # From another folder, so that the package is the installed one. The benchmarks are no part of it.
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    tests = arguments or [str(ROOT / "tests")]
    options = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [own, "-m", "pytest", *options, *tests], cwd=folder, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print("    " + line)
    return lines[-1]


def tried(python: str, torch: str, numpy: str, wheel: Path, arguments: list[str]) -> bool:
    """Prints what came of a case; whether it could be installed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found, there = (
                outcome(environment(python, torch, numpy, Path(folder)), wheel, Path(folder), arguments),
                True,
            )
        except NotThere as error:
            found, there = f"not installed: {error}", False
    print(f"  torch {torch}, numpy {numpy}: {found}", flush=True)
    return there


def main(arguments: list[str]) -> None:
    arguments = [str(Path(word).resolve()) if Path(word.split("::")[0]).exists() else word for word in arguments]
    for version in PYTHONS:
        python = shutil.which(f"python{version}")
        if python is None:
            print(f"Python {version}: not on the PATH")
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                said(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT, FASTGAN_NVCC="")
            except NotThere as error:
                print(f"Python {version}: no wheel: {error}", flush=True)
                continue
            (wheel,) = Path(place).glob("*.whl")
            print(f"Python {version}: {wheel.name}", flush=True)
            there = [torch for torch in TORCHES if tried(python, torch, NUMPYS[-1], wheel, arguments)]
            for numpy in NUMPYS[:-1]:
                if there:
                    tried(python, there[0], numpy, wheel, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
