"""Whatever an option of the command line is given: what was asked for is done, or one line names the option.

`FASTGAN_FUZZ=1000 pytest tests/test_cli_fuzz.py` draws so many values for each command.
"""

import os
from pathlib import Path

import pytest
import typer
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fastgan.cli import app
from fastgan.training import run

EXAMPLES = int(os.environ.get("FASTGAN_FUZZ", "12"))
COMMANDS = typer.main.get_command(app).commands
SYSTEMS = COMMANDS["train"].commands

SMALL = {"image-size": 8, "batch-size": 4, "features": 2, "steps": 1, "device": "cpu"}
OWN = {
    "stylegan": {"latent-dim": 3, "w-dim": 3, "mapping-layers": 1},
    "cyclegan": {"image-size": 24, "blocks": 1, "batch-size": 1, "data-a": "digits", "data-b": "few"},
    "srgan": {"image-size": 32, "blocks": 1, "pretrain-steps": 1, "batch-size": 2, "scale": 2, "data": "few"},
    "dann": {"image-size": 16},
}
"""What makes a run small."""

NUMBERS = (
    "0", "-1", "1", "2", "7", "0.5", "-0.0", "1e-300", "1e300", "nan", "inf", "-inf", "1e999", str(2**31), str(2**63),
    "9" * 40,
)  # fmt: skip
WORDS = (
    "", " ", "x", "1,2", "0x10", "²", "true", "-", "--", "a\nb", "ü", "\udcff", "none", "auto", "cpu", "cpu:1", "digits:2",
    "photos:",
)  # fmt: skip
PATHS = (
    "file", "file/below", "empty", "few", "few/0.png", "broken", "/dev/null", "/dev/full", "/proc/nothing", "~", "a" * 300,
    "a/" * 3000,
)  # fmt: skip
VALUES = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(WORDS)
    | st.sampled_from(PATHS)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)
)


@pytest.fixture(autouse=True)
def _in_a_folder_of_bad_files(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "COMPARE_SECONDS", {False: 0.01, True: 0.01})
    Path("file").write_text("no image")
    Path("empty").mkdir()
    Path("few").mkdir()
    for number in range(3):
        Image.effect_noise((160, 160), 50).save(f"few/{number}.png")
    Path("broken").mkdir()
    Path("broken/1.png").write_bytes(b"no image")
    Path("broken/2.gif").write_bytes(b"GIF89a")


def options_of(command):
    return sorted(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))


def small(system):
    known, sizes = options_of(SYSTEMS[system]), SMALL | OWN.get(system, {})
    return [f"--{name}={value}" for name, value in sizes.items() if f"--{name}" in known]


def fastgan(*arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    return CliRunner().invoke(app, arguments)


def check_values_of_options(command, arguments):
    @given(st.sampled_from(options_of(command)), VALUES)
    @settings(
        max_examples=EXAMPLES, derandomize=EXAMPLES < 1000, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(option, value):
        result = fastgan(*arguments, f"{option}={value}")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code in (0, 1, 2)
        if result.exit_code:
            assert result.stderr.startswith("fastgan: ") and result.stderr.count("\n") == 1, result.stderr
        if result.exit_code == 2:
            assert result.stdout == "" and option in result.stderr, result.output

    check()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_value_that_does_not_fit_a_training_is_one_line_that_names_its_option(system):
    check_values_of_options(SYSTEMS[system], ["train", system, *small(system), "--dry-run", "--no-fuse"])


@pytest.mark.parametrize("system", ["dcgan", "stylegan", "cyclegan", "srgan"])
def test_a_value_that_does_not_fit_a_generation_is_one_line_that_names_its_option(system):
    assert fastgan("train", system, *small(system), "--no-fuse", "--out=run").exit_code == 0
    source = ["--input=few"] if system in {"cyclegan", "srgan"} else []
    check_values_of_options(COMMANDS["generate"], ["generate", "run", *source])
