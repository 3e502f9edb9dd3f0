"""The shape of the house: which way imports point, one name at every level, and what the wheel holds."""

import ast
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fastgan.dynamo import compile_graph

ROOT = Path(__file__).parents[1]

# A package may import those further down only, and itself.
LAYERS = [
    "cli", "bench", "doctor", "training", "penalties", "lean", "dynamo", "fuse", "graph_patterns", "layer_functions",
    "chains", "little_work", "tracing", "models", "nn", "compat", "ops", "backend", "_C", "_cuda",
]  # fmt: skip
BESIDE = {("training", "models"), ("fuse", "models")}


def modules():
    return sorted((ROOT / "fastgan").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every dotted name that a file imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    "path", [p for p in modules() if p.parent != ROOT / "fastgan" or p.stem != "__init__"], ids=str
)
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "fastgan").parts[0].removesuffix(".py")
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "fastgan" and rest and rest[0] in LAYERS:
            assert LAYERS.index(rest[0]) >= LAYERS.index(own), f"{path.name} in {own} imports {name}"


def test_models_know_nothing_of_the_library():
    for path in (ROOT / "fastgan" / "models").glob("*.py"):
        outside = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
        assert all(name.startswith(("torch", "fastgan.models")) for name in outside)


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "fastgan_kernels"}, path
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_torch_header_in_csrc():
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r'#include\s*[<"](torch|ATen|c10)', path.read_text()), path


# Where an operator's name has to stand besides `ops/`, and which operators need not stand there. conv is called through
# conv_norm_act's modules and benchmarks, conv_norm_act is made of the kernels of the other two, and resampled_conv of conv
# (`fuse` calls it, and no module does); the lean activations and pools are stock arithmetic with other gradients, which
# penalties use and measure; composites are stock arithmetic; a reversal computes nothing that torch's matrix product does
# not; a layout is part of what others do.
LEAN = {"activation", "avg_pool"}
COMPOSITE = {"minibatch_stddev", "pixel_norm", "sync_batch_norm_act"}
MADE_OF_OTHERS = {"conv_norm_act", "gradient_reversal", "resampled_conv"}
LEVELS = {
    "fastgan/nn/{}.py": {"bias_act", "conv", "layout", "penalty", "resampled_conv"} | LEAN | COMPOSITE,
    "kernels/fastgan_kernels/{}.py": {"layout"} | MADE_OF_OTHERS | LEAN | COMPOSITE,
    "csrc/cpu/{}.h": MADE_OF_OTHERS | LEAN | COMPOSITE,
    "tests/ops/test_{}.py": {"avg_pool"},  # among the activations' cases
    "fastgan/bench/bench_{}.py": {"conv", "layout"} | LEAN | COMPOSITE,
    "docs/ops/{}.md": {"layout"},
}
SHARED = {
    "_layers", "_norm", "_units", "kernels", "simd", "slices", "tiles", "conv_tiles", "products", "winograd", "avx2",
    "avx512", "baseline", "__init__", "dcgan", "wgan_gp", "sngan", "stylegan", "cyclegan", "srgan", "equalized", "index",
}  # fmt: skip


def operators() -> set[str]:
    return {path.stem for path in (ROOT / "fastgan" / "ops").glob("[a-z]*.py")}


@pytest.mark.parametrize("place", LEVELS)
def test_an_operator_has_one_name_at_every_level(place):
    for name in operators() - LEVELS[place]:
        assert (ROOT / place.format(name)).is_file(), f"{place} lacks {name}"


@pytest.mark.parametrize("place", LEVELS)
def test_no_level_has_a_name_of_its_own(place):
    before, after = place.split("{}")
    for path in ROOT.glob(place.format("*")):
        name = path.relative_to(ROOT).as_posix().removeprefix(before).removesuffix(after)
        assert name in operators() | SHARED, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built as pip builds it, in an isolated environment without torch."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_two_packages_and_the_built_modules(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fastgan", "fastgan_kernels"}
    assert any(re.fullmatch(r"fastgan/_C\..*(so|pyd)", name) for name in names)
    assert not shutil.which("nvcc") or any(re.fullmatch(r"fastgan/_cuda\..*(so|pyd)", name) for name in names)
    assert {"fastgan/py.typed", "fastgan/ops/norm_act.py", "fastgan_kernels/norm_act.py"} <= set(names)
    assert {f"fastgan/bench/{name}" for name in ("command.py", "page.html", "bench_norm_act.py")} <= set(names)


def test_the_wheel_names_the_backend_of_torch_compile(wheel):
    points = configparser.ConfigParser()
    points.read_string(
        wheel.read(next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))).decode()
    )
    ((name, value),) = points["torch_dynamo_backends"].items()
    assert name == "fastgan"
    assert EntryPoint(name, value, "torch_dynamo_backends").load() is compile_graph


def test_the_wheel_asks_for_no_particular_torch(wheel):
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("METADATA"))).decode()
    assert re.findall(r"Requires-Dist: torch\b(.*)", metadata) == [">=2.10"]
