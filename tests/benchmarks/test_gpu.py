"""The GPU run: it needs little, goes on where it ended, and survives what a case does to it."""

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_case import make_case, make_row

from benchmarks import gpu, measure
from fastgan.bench import results, suite
from fastgan.bench.prediction import H200, predictions
from fastgan.ops import _autotune

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
ABSENT = ("hypothesis", "rich", "typer", "accelerate", "datasets", "torchmetrics", "tensorboard", "sklearn", "xdist")


def test_nothing_is_imported_that_a_bare_machine_lacks():
    parts = ", ".join(f"fastgan.bench.bench_{part}" for part in suite.PARTS)
    code = f"import sys; sys.modules |= dict.fromkeys({ABSENT}); import benchmarks.gpu, benchmarks.share, {parts}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.fixture
def few(monkeypatch):
    """The suite has a headline case and another one in each part."""
    headline = make_case(headline=True, work="forward")
    both = (headline, replace(headline, headline=False, shape="b"))
    monkeypatch.setattr(suite, "cases", lambda part, *_: [replace(case, part=part) for case in both])


def test_headlines_come_first_and_quickly_then_all_carefully(few, tmp_path):
    cases = list(measure.left(["adain", "bias_act"], CPU, tmp_path / "none.csv"))
    found = [(case.part, case.headline, case.quick) for case in cases]
    assert found[:2] == [("adain", True, True), ("bias_act", True, True)]
    assert found[2:] == [(part, headline, False) for headline in (True, False) for part in ("adain", "bias_act")]


def test_a_run_goes_on_where_the_last_one_ended(few, tmp_path, monkeypatch, capsys):
    def run(*options):
        options = ["bias_act", "--device", "cpu", "--out", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", ["measure", *options])
        measure.main()
        return capsys.readouterr().out

    counts = iter(range(99))
    with monkeypatch.context() as patch:  # time for one case
        patch.setattr(time, "monotonic", lambda: float(next(counts)))
        assert run("--seconds", "1.5").count("scaled_relu") == 1
    (table,) = tmp_path.glob("*.csv")
    assert [results.QUICK in row.note for row in results.read(table)] == [True]
    assert run("--seconds", "60").count("quickly") == 0
    assert [results.QUICK in row.note for row in results.read(table)] == [False, False]
    assert run("--seconds", "60") == ""


def test_a_case_that_killed_the_process_is_noted_and_not_tried_again(few, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["measure", "bias_act", "--device=cpu", f"--out={tmp_path}", "--seconds=60"])
    name = suite.cases("bias_act", CPU)[1].name
    (tmp_path / measure.RUNNING).write_text("\n".join([name] * measure.TRIES))
    measure.main()
    (table,) = tmp_path.glob("*.csv")
    assert sorted((row.headline, row.note, bool(row.speedup)) for row in results.read(table)) == [
        ("", "did not return", False), ("yes", "", True),
    ]  # fmt: skip
    assert not (tmp_path / measure.RUNNING).exists()


def test_compiling_ahead_runs_every_form_and_leaves_no_choice(few, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(_autotune, "_measure", None)
    monkeypatch.setattr(type(make_case()), "prepare", lambda case, device: ran.append(case.part))
    cases = measure.left(["adain", "bias_act", "norm_act"], CPU, tmp_path / "none.csv")
    measure.compile_share(cases, CPU, 1, 2)
    assert ran == ["bias_act"], "every other headline case, and no careful one"
    forms = {"first": lambda: ran.append("first"), "no memory": lambda: 1 / 0, "last": lambda: ran.append("last")}
    assert _autotune._measure(forms, CPU) == {"first": 0.0} and ran[1:] == ["first", "last"]


def test_commands_end_done_failed_or_out_of_time(tmp_path):
    def run(*codes, seconds=60.0):
        logs = [tmp_path / str(i) for i in range(len(codes))]
        return gpu.run([["-c", code] for code in codes], logs, time.monotonic() + seconds)

    assert run("print('fine')").startswith("done, ")
    assert "failed: boom" in run("print('fine')", "raise SystemExit('boom')")
    assert "out of time" in run("import time; time.sleep(60)", seconds=0.1)


def test_shares_run_every_test_once_and_none_that_has_passed(tmp_path):
    of_five = "import pytest\n\n@pytest.mark.parametrize('i', range(5))\ndef test_it(i): assert i != 3\n"
    (tmp_path / "test_it.py").write_text(of_five)

    def share(index):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.share", f"--share={index}/2"]
        command += [f"--passed={tmp_path / 'passed.txt'}", "-p", "no:cacheprovider", str(tmp_path / "test_it.py")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout

    assert "3 passed" in share(0)  # of 0, 2 and 4
    assert "1 passed" in share(0)  # of 1 and 3 that are left the first
    left = share(0)
    assert "1 failed" in left and "passed" not in left


def test_the_table_has_steps_operators_and_what_has_no_time():
    step = replace(make_row(fastgan=1e-3, NCHW=4e-3), part="dcgan", op="DCGAN", work="training step", headline="yes")
    fast, slow = make_row(fastgan=1e-3, NCHW=2e-3), replace(make_row(fastgan=4e-3, NCHW=2e-3), shape="b")
    text = "\n".join(gpu.lines([step, fast, slow, replace(make_row("off by much"), op="wrong")]))
    assert "DCGAN training step" in text and "4.00" in text
    assert "0.50" in text and "1.25" in text, "the slowest and the median"
    assert "no time: wrong" in text and "off by much" in text


def test_a_prediction_is_the_longer_of_bytes_and_operations(monkeypatch):
    monkeypatch.setattr(suite, "OPERATORS", ["conv_norm_act"])
    case, moved, flops, ms = next(predictions())
    contest = make_case().prepare(CPU)
    assert make_case().least_work() == (contest.bytes_moved, contest.flops)
    assert ms == pytest.approx(1e3 * max(moved / H200.bytes, flops / H200.flops[case.dtype]))
