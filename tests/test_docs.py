"""The pages' code runs as it stands there, their commands are real ones, their links lead somewhere, and all that is public
has a page."""

import ast
import contextlib
import doctest
import importlib
import importlib.metadata
import itertools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import typer
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from markdown_it import MarkdownIt
from torch import nn
from typer.testing import CliRunner

import fastgan
from benchmarks import RESULTS, gpu
from fastgan import backend, compat
from fastgan.bench import suite
from fastgan.bench.results import read
from fastgan.cli import app
from fastgan.training import run

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
}


class Block(NamedTuple):
    page: str
    section: int
    line: int
    language: str
    code: str


def blocks(page: str) -> list[Block]:
    found, section = [], 0
    for token in MarkdownIt().parse(PAGES[page]):
        section += token.type == "heading_open" and token.tag == "h2"
        if token.type in ("fence", "code_block"):
            found.append(Block(page, section, token.map[0] + 1, token.info, token.content))
    return found


# ── What a reader has before the first line of a section ─────────────────────────────────────────────────────────────


def critic():
    return nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4 * 16 * 16, 1))


def images():
    return torch.rand(2, 3, 32, 32)


def residual_net(*_):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.InstanceNorm2d(4), nn.ReLU(True), nn.Conv2d(4, 3, 3, 1, 1))


def names() -> dict[str, Any]:
    generators = {name: residual_net() for name in ("model", "generator", "netG_A", "netG_B")}
    critics = {name: critic() for name in ("discriminator", "critic", "D", "netD_A", "netD_B")}
    batches = {name: images() for name in ("real", "fake", "real_imgs", "fake_imgs", "real_images")}
    return {
        "fastgan": fastgan, "torch": torch, "nn": nn, **generators, **critics, **batches,
        "Generator": residual_net, "Discriminator": lambda *_: critic(), "ngpu": 1, "weights_init": lambda module: None,
        "styled_generator": nn.Sequential(nn.Linear(16, 48), nn.Unflatten(1, (3, 4, 4))),
        "images": images().requires_grad_(), "x": images(), "b": torch.zeros(3), "layer": nn.Linear(4, 4),
        "batches": [images()], "train_on_batch": lambda real: {"loss": real.mean()}, "adam_g": None, "adam_d": None,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def a_reader_s_machine(tmp_path, monkeypatch):
    """An empty folder, the names of NVIDIA's code, and no interpreter of kernels."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_utils", compat)
    monkeypatch.setitem(sys.modules, "torch_utils.ops", compat)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(run, "COMPARE_SECONDS", {False: 0.01, True: 0.1})
    yield
    monkeypatch.undo()
    backend.reset()


# ── Blocks ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_python(block: Block, known: dict[str, Any]) -> None:
    exec(compile("\n" * block.line + block.code, block.page, "exec"), known)


def run_session(block: Block, known: dict[str, Any]) -> None:
    """What is typed at Python's prompt, and what it prints."""
    session = doctest.DocTestParser().get_doctest(block.code, known, block.page, block.page, block.line)
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(session, out=report.append, clear_globs=False)
    assert session.examples and not runner.failures, "".join(report)


def run_console(block: Block, known: dict[str, Any]) -> None:
    """What is typed at a shell's prompt, and what it prints."""
    _, *typed = re.split(r"^\$ ", block.code, flags=re.MULTILINE)
    for command, _, expected in (each.partition("\n") for each in typed):
        environment, program, arguments = words(command)
        assert program == "fastgan"
        printed = invoke(arguments, environment).output
        assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), printed


def check_shell(block: Block, known: dict[str, Any]) -> None:
    for line in block.code.splitlines():
        for command in line.split(" && "):
            check_command(command)


def check_listing(block: Block, known: dict[str, Any]) -> None:
    """Paths, and behind two spaces what they hold; <op> stands for any operator."""
    for line in block.code.splitlines():
        for path in line.split("  ")[0].split(", "):
            assert list(ROOT.glob(path.replace("<op>", "*"))), path


RUN: dict[str, Callable[[Block, dict[str, Any]], None]] = {
    "python": run_python,
    "pycon": run_session,
    "console": run_console,
    "sh": check_shell,
    "text": check_listing,
}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_all_code_of_a_page_runs(page):
    for _, section in itertools.groupby(blocks(page), key=lambda block: block.section):
        known = names()
        for block in section:
            assert block.language in RUN, f"{page}:{block.line}: nobody runs {block.language or 'what has no language'}"
            with contextlib.redirect_stdout(None):
                RUN[block.language](block, known)


def test_both_penalties_of_the_migration_page_are_stock_s():
    code = [block.code for block in blocks("docs/migrating.md") if block.code.startswith("def compute")]
    penalties, net, real, fake = [], critic(), images(), images()
    for text in code:
        known = names()
        exec(text, known)
        torch.manual_seed(0)
        penalties.append(known["compute_gradient_penalty"](net, real, fake))
    stock, lean = penalties
    torch.testing.assert_close(stock, lean)


def test_messages_of_the_troubleshooting_page_are_the_library_s():
    said = "\n".join(text for path in ROOT.glob("fastgan/**/*.py") for text in texts(path))
    first = re.findall(r"^(?:\| )?(`[^|\n]*)", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    messages = [message for cell in first for message in re.findall("`([^`]+)`", cell)]
    assert messages
    for message in messages:
        parts = message.replace("the forward of …", "its forward").split("…")
        assert all(part in said for part in parts), message


def texts(path: Path) -> list[str]:
    """The strings in a file, with … for what is filled in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
    return found


# ── Commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_command(line: str) -> None:
    """Raises unless the command, its options and their values exist; a dry run is made."""
    environment, program, arguments = words(line)
    if program == "fastgan" and "--dry-run" in arguments:
        result = invoke(arguments, environment)
        assert result.exit_code == 0, result.output
    elif program:
        assert program in PROGRAMS, f"nobody checks {program}"
        PROGRAMS[program](arguments)


def words(line: str) -> tuple[dict[str, str], str, list[str]]:
    """The variables that a command sets, its program, and the arguments; without the comment."""
    typed = shlex.split(line, comments=True)
    environment = dict(word.split("=", 1) for word in itertools.takewhile(re.compile(r"\w+=").match, typed))
    readers = [path.read_text() for path in [*ROOT.glob("fastgan/*.py"), *ROOT.glob("tests/*.py")]]
    for name in environment:
        assert any(f'"{name}"' in text for text in readers), f"nobody reads {name}"
    program, *arguments = typed[len(environment) :] or [""]
    return environment, program, arguments


def invoke(arguments: list[str], environment: dict[str, str]) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    backend.reset()
    result = CliRunner().invoke(app, arguments, env=environment)
    backend.reset()
    return result


def parsed(application: typer.Typer, arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that the words call, and its parameters."""
    command: Any = typer.main.get_command(application)
    context = command.make_context("", list(arguments))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context.info_name, context.params


def check_fastgan(arguments: list[str]) -> None:
    system, given = parsed(app, arguments)
    if arguments[0] == "train":
        kind = run.SYSTEMS[system].settings_type
        known = {
            name: value for name, value in given.items() if value is not None and name in kind.__dataclass_fields__
        }
        kind(**known).check()
    elif system == "bench":
        assert {name.replace("-", "_") for name in given["op"] or ()} <= set(suite.OPERATORS)
        assert {name.replace("-", "_") for name in given["model"] or ()} <= set(suite.MODELS)


def check_python(arguments: list[str]) -> None:
    option, module, *rest = arguments
    assert option == "-m"
    if module == "benchmarks":
        return check_fastgan(["bench", *rest])
    if module == "benchmarks.gpu":
        gpu.parser().parse_args(rest)
    else:
        parsed(importlib.import_module(module).app, rest)


def check_accelerate(arguments: list[str]) -> None:
    assert arguments[0] == "launch"
    given = launch_command_parser().parse_args(arguments[1:])
    assert given.no_python
    PROGRAMS[given.training_script](given.training_script_args)


def check_pip(arguments: list[str]) -> None:
    extras = importlib.metadata.metadata("fastgan").get_all("Provides-Extra", [])
    assert arguments[0] == "install"
    for word in arguments[1:]:
        local = re.fullmatch(r"\.(?:\[(.+)\])?", word)
        assert local or word in ("torch", "--editable", "--force-reinstall", "--no-deps"), word
        assert not local or not local[1] or set(local[1].split(",")) <= set(extras), word


def check_make(arguments: list[str]) -> None:
    assert all(re.search(rf"^{word}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for word in arguments)


def check_pytest(arguments: list[str]) -> None:
    assert all((ROOT / word).exists() for word in arguments)


def check_git(arguments: list[str]) -> None:
    assert arguments[0] == "clone"


def check_cd(arguments: list[str]) -> None:
    assert arguments == ["fastgan"]


PROGRAMS = {
    "fastgan": check_fastgan,
    "python": check_python,
    "accelerate": check_accelerate,
    "pip": check_pip,
    "make": check_make,
    "pytest": check_pytest,
    "git": check_git,
    "cd": check_cd,
}


@pytest.mark.parametrize(
    "line",
    [
        "fastgan dance", "fastgan train dcgan --gamma 1", "fastgan train dcgan --image-size 33", "make love",
        "pip install .[tests]", "python -m benchmarks --op norm", "pytest tests/test_nothing.py",
        "FASTGAN_BACKENDS=cpp pytest",
        "ninja", "accelerate launch --no_python fastgan dance", "fastgan train dcgan --data nothing --dry-run",
    ],
)  # fmt: skip
def test_a_command_that_is_wrong_is_found(line):
    with pytest.raises((AssertionError, ValueError, typer.BadParameter.__base__)):  # type: ignore[arg-type]
        check_command(line)


# ── Names ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def described() -> set[str]:
    """The full names of all that pages describe."""
    texts = "\n".join(PAGES.values())
    return {full_name(resolve(name)) for name in re.findall(r"^::: (\S+)$", texts, re.MULTILINE)}


def resolve(name: str) -> Any:
    """What a full name stands for: `fastgan.ops.adain.adain`, or a module."""
    package, _, last = name.rpartition(".")
    with contextlib.suppress(ImportError):
        return getattr(importlib.import_module(package), last)
    return importlib.import_module(name)


def full_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else thing.__name__


MODULES = [fastgan, fastgan.ops, fastgan.nn, importlib.import_module("fastgan.training")]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_all_that_is_public_has_a_page(module):
    public = [getattr(module, name) for name in module.__all__]
    missing = [thing for thing in public if hasattr(thing, "__qualname__") and full_name(thing) not in described()]
    assert public and not missing


def test_nvidia_s_names_have_a_page():
    nvidia_s = ["bias_act", "upfirdn2d", "setup_filter", "filter2d", "upsample2d", "downsample2d"]
    found = [getattr(module, name) for module in (compat.bias_act, compat.upfirdn2d) for name in nvidia_s
             if hasattr(module, name)]  # fmt: skip
    assert len(found) == len(nvidia_s) and {full_name(thing) for thing in found} <= described()


def test_all_networks_have_a_page():
    models = {f"fastgan.models.{path.stem}" for path in (ROOT / "fastgan" / "models").glob("[a-z]*.py")}
    assert models and models <= described()


def test_all_systems_have_their_options_on_a_page():
    assert set(re.findall(r"<!-- options: train (.+) -->", PAGES["docs/training.md"])) == set(run.SYSTEMS)


def test_all_that_was_measured_of_an_operator_is_on_a_page():
    shown = {op for text in PAGES.values() for marked in re.findall("<!-- figures: (.+) -->", text)
             for op in marked.split(", ")}  # fmt: skip
    operators = {path.stem for path in (ROOT / "fastgan" / "ops").glob("[a-z]*.py")}
    measured = {row.op for path in RESULTS.glob("*.csv") for row in read(path) if row.part in operators}
    assert measured and measured <= shown


# ── Links. Those of the pages in docs/ are checked where the site is built. ──────────────────────────────────────────


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target in links(page):
        path, _, anchor = target.partition("#")
        assert not path or (ROOT / path).exists(), target
        assert not anchor or anchor in anchors(path or page), target


def links(page: str) -> list[str]:
    inline = [token for token in MarkdownIt().parse(PAGES[page]) if token.type == "inline"]
    found = [child.attrs["href"] for token in inline for child in token.children if child.type == "link_open"]
    return [str(target) for target in found if not str(target).startswith(("http://", "https://"))]


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings."""
    tokens = MarkdownIt().parse(PAGES[page])
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
