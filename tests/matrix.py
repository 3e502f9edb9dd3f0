"""The tests with one built wheel under other versions: `python tests/matrix.py`, what follows goes to pytest.

The wheel is built where no torch is to be seen. One thing is changed at a time: under the Python that runs this each version
of torch below and, with the newest of those, each of numpy; under the other Pythons that are found the newest of both. For
each an environment is made, the wheel installed, and the tests run against it. What cannot be installed is said, with the
reason. Where pip finds no CPU build of torch it takes the one for CUDA: 3 GB to download, and 8 GB of disk for the time.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TORCHES = [f"torch==2.{minor}.*" for minor in (15, 14, 13, 12, 11, 10)]
NUMPYS = [f"numpy=={version}.*" for version in ("2.2", "2.0", "1.26")]
# A CPU build of torch brings none.
TRITON = "triton==3.6.0"
# What the suite needs besides the package's own requirements.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "build", "safetensors", "markdown-it-py")


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


def interpreter(version: str) -> str | None:
    """Its path, where it runs: pyenv's shims are on the PATH for versions that it does not give."""
    with contextlib.suppress(FileNotFoundError, NotThere):
        return said(f"python{version}", "-c", "import sys; print(sys.executable)").strip()
    return None


def environment(python: str, pins: list[str], folder: Path) -> Path:
    """Its interpreter."""
    said(python, "-m", "venv", folder)
    own = folder / "bin" / "python"
    install = (own, "-m", "pip", "install", "--quiet", "--no-compile")
    said(*install, "torch", "numpy", *pins, *TOOLS)
    if said(own, "-c", "import importlib.util as u; print(u.find_spec('triton'))").strip() == "None":
        said(*install, TRITON)
    return own


def outcome(own: Path, wheel: Path, pins: list[str], folder: Path, arguments: list[str]) -> str:
    said(own, "-m", "pip", "install", "--quiet", "--no-compile", wheel, *pins)  # or what it needs would replace them
    versions = "import torch, numpy; print('torch', torch.__version__, 'and numpy', numpy.__version__)"
    # From another folder, so that the package is the installed one. The benchmarks are no part of it.
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks")
    tests = arguments or [str(ROOT / "tests")]
    options = [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}", "-p", "no:cacheprovider"]
    at_once = ["--numprocesses", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]  # as `make test` does
    run = subprocess.run(
        [own, "-m", "pytest", *options, *at_once, *tests], cwd=folder, env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print("    " + line)
    return f"{said(own, '-c', versions).strip()}: {lines[-1]}"


def tried(python: str, pins: list[str], wheel: Path, arguments: list[str]) -> bool:
    """Prints what came of a case; whether it could be installed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            print(f"  {outcome(environment(python, pins, folder), wheel, pins, folder, arguments)}", flush=True)
        except NotThere as error:
            print(f"  {' and '.join(pins)} not installed: {error}", flush=True)
            return False
    return True


def main(arguments: list[str]) -> None:
    arguments = [str(Path(word).resolve()) if Path(word.split("::")[0]).exists() else word for word in arguments]
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    for version in (here, *(python for python in PYTHONS if python != here)):
        python = sys.executable if version == here else interpreter(version)
        if python is None:
            print(f"Python {version}: none that runs on the PATH")
            continue
        with tempfile.TemporaryDirectory() as place:
            try:
                said(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", place, ROOT, FASTGAN_NVCC="")
            except NotThere as error:
                print(f"Python {version}: no wheel: {error}", flush=True)
                continue
            (wheel,) = Path(place).glob("*.whl")
            print(f"Python {version}: {wheel.name}", flush=True)
            if version != here:
                tried(python, [], wheel, arguments)
                continue
            installed = [pin for pin in TORCHES if tried(python, [pin], wheel, arguments)]
            for pin in NUMPYS:
                tried(python, [*installed[:1], pin], wheel, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
