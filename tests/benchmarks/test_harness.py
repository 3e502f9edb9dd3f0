"""The harness: what it compares, what it writes, and what it refuses."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from tiny_case import make_case, make_row, scaled_relu

from benchmarks import RESULTS, samples
from benchmarks.readme import END, START, markdown, rewrite, steps
from fastgan.bench import command, results, suite, timing
from fastgan.bench.case import OURS
from fastgan.bench.memory import peak_bytes, saved_bytes
from fastgan.bench.op import Contender, gate
from fastgan.bench.timing import interleave

CPU = torch.device("cpu")


# ── Ratios ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_ratio_is_to_the_best_peer_and_the_floor_to_the_copy():
    row = make_row(fastgan=2e-3, NCHW=7e-3, compile=5e-3)
    assert (row.fastgan_ms, row.best_stock, row.best_stock_ms) == ("2.000", "compile", "5.000")
    assert (row.speedup, row.over_first, row.copies, row.of_floor) == ("2.50", "3.50", "2.00", "0.75")
    assert row.peers == {"NCHW": 7, "compile": 5}


def test_no_speed_where_the_gate_is_red():
    row = make_row("wrong", fastgan=2e-3, NCHW=7e-3, compile=5e-3)
    assert row.gate == "wrong"
    assert row.fastgan_ms == row.speedup == row.over_first == row.copies == row.of_floor == ""
    assert "wrong" in markdown([row])


@pytest.mark.parametrize(
    "value, text", [(123456.0, "123456"), (99.996, "100.00"), (1.5, "1.500"), (0.01234567, "0.01235"), (0, "0")]
)
def test_numbers_have_four_digits_and_no_exponent(value, text):
    assert results._number(value) == text


def test_slower_rows_are_listed_the_worst_first():
    rows = [make_row(fastgan=t, NCHW=1e-3, compile=1e-3) for t in (0.5e-3, 2e-3, 4e-3)]
    assert [row.speedup for row in results.slower(rows)] == ["0.25", "0.50"]


# ── Timing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_contenders_are_called_in_turn_and_begin_in_turn(monkeypatch):
    monkeypatch.setattr("fastgan.bench.timing.BLOCK_SECONDS", 0.0)  # one call in each turn
    called = []
    runs = {name: lambda name=name: called.append(name) for name in "abc"}
    assert interleave(runs, 0, CPU, captured=False).keys() == runs.keys()
    assert "".join(called[6:]) == "abcbcacababcbca", "after two calls of each to warm up"


def test_what_cannot_be_captured_has_no_time_and_spoils_no_other(monkeypatch):
    def sampler(run, device, captured):
        if run is None:
            raise timing.NotCaptured
        return lambda: [1.0]

    monkeypatch.setattr(timing, "_sampler", sampler)
    assert interleave({"waits": None, "runs": print}, 0, CPU, captured=True) == {"runs": 1.0}
    assert make_row(NCHW=4e-3).fastgan_ms == ""


def test_calls_that_outlast_all_patience_are_measured_once(monkeypatch):
    samples = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(timing, "_sampler", lambda *_: lambda: [next(samples)])
    assert interleave({"slow": print}, 0, CPU, captured=False, patience=0.0) == {"slow": 1.0}


def test_medians_tell_fast_from_slow():
    small, large = torch.randn(8, 8), torch.randn(500, 500)
    seconds = interleave({"small": lambda: small @ small, "large": lambda: large @ large}, 0.05, CPU, captured=False)
    assert 0 < seconds["small"] < seconds["large"]


# ── The gate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("work", ["eval forward", "forward", "forward+backward", "second order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_passes_what_computes_the_same(work, dtype):
    assert make_case(work=work, dtype=dtype).prepare(CPU).gate == ""


@pytest.mark.parametrize("wrong", [lambda x, w: F.relu(x * w) * 1.001, lambda x, w: F.relu(x * w.detach()) + 0 * w])
def test_the_gate_refuses_wrong_values_and_wrong_gradients(wrong):
    assert "off by" in make_case(wrong, work="forward+backward").prepare(CPU).gate


def test_the_gate_refuses_wrong_second_gradients():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.relu(x * w)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            g = g * (x * w > 0)
            return g * w, (g * x).sum((0, 2, 3), keepdim=True)

    assert make_case(Once.apply, work="forward+backward").prepare(CPU).gate == ""
    assert "off by" in make_case(Once.apply).prepare(CPU).gate


def test_the_gradient_is_zero_near_kinks_and_nowhere_else():
    case = make_case()
    data = case._draw(CPU)
    near = (data.x.detach() * data.parameters[0]).abs() < 1e-3
    assert torch.equal(data.grad_y == 0, near) and not near.all()


def test_the_gate_refuses_nan_and_allows_twice_the_error_of_stock_and_one_step():
    expected = [torch.ones(4, dtype=torch.float64)]
    stock, step = [[torch.full((4,), 1.001)]], torch.finfo(torch.float32).eps
    assert gate([torch.full((4,), 1.00199)], stock, expected) == ""
    assert gate([torch.full((4,), 1.0021)], stock, expected)
    assert gate([torch.ones(4) + step], [[torch.ones(4)]], expected) == ""
    assert gate([torch.ones(4) + 3 * step], [[torch.ones(4)]], expected)
    assert gate([torch.full((4,), torch.nan)], stock, expected)
    assert gate([torch.full((4,), 1.00199)], [[torch.ones(4)], *stock], expected) == "", "the worst of eager counts"


def test_a_peer_that_fails_is_noted_and_ours_that_fails_is_a_row_without_speed():
    def fails(x, weight):
        raise NotImplementedError("not today")

    contenders = {**make_case().contenders, "broken": Contender(fails)}
    contest = make_case(contenders=contenders).prepare(CPU)
    assert contest.notes == ["broken: NotImplementedError: not today"]
    assert contest.contenders.keys() == {OURS, "NCHW"}
    (row,) = suite.measure([make_case(fails)], CPU, seconds=0.1)
    assert row.gate == "NotImplementedError: not today" and row.peers == {} and row.speedup == ""
    assert "not today" in markdown([row])


def test_cold_calls_take_other_tensors_of_the_same_layout(monkeypatch):
    seen = []

    def ours(x, weight):
        seen.append(x)
        return scaled_relu(x, weight)

    run = make_case(ours, cache="cold", work="forward").prepare(CPU).contenders[OURS]
    seen.clear()
    for _ in range(3):
        run()
    assert len({x.data_ptr() for x in seen}) == 3
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    assert torch.equal(seen[0], seen[1])


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_saved_bytes_counts_a_storage_once_and_no_parameter():
    x, w = torch.randn(10, 10, requires_grad=True), torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: x * w, [w]) == 400
    assert saved_bytes(lambda: (x * 2).exp() * x.view(100).view(10, 10), []) == 800, "the exponential, and x"


def test_peak_bytes_is_the_most_at_once():
    x = torch.randn(1000)

    def run():
        for _ in range(3):
            x.exp()
        return x + 1, x + 2

    assert 8000 <= peak_bytes(run, CPU) < 9000


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_merging_replaces_rows_of_the_same_key_and_keeps_others(tmp_path):
    path = tmp_path / "deep" / "device.csv"
    old, other = make_row(fastgan=2e-3, NCHW=4e-3), make_row(fastgan=1e-3, NCHW=4e-3)
    other.part = "other"
    results.merge(path, [old, other])
    new = make_row(fastgan=1e-3, NCHW=4e-3)
    results.merge(path, [new])
    assert sorted(results.read(path), key=lambda row: row.part) == [other, new]
    new.shape = "another"
    results.merge(path, [new], drop_part="part")
    assert sorted(results.read(path), key=lambda row: row.part) == [other, new]
    assert [file.name for file in path.parent.iterdir()] == ["device.csv"]


def test_the_region_of_the_readme_is_rewritten_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{START}\nold \\1\n{END}\nafter\n")
    for text in ("| a \\d |", "new"):
        rewrite(path, text)
    assert path.read_text() == f"before\n{START}\nnew\n{END}\nafter\n"
    path.write_text("nothing marked\n")
    with pytest.raises(typer.BadParameter, match="no region"):
        rewrite(path, "new")


def test_markdown_shows_headlines_and_owns_up_to_slower_rows():
    fast, slow = make_row(fastgan=1e-3, NCHW=4e-3), make_row(fastgan=4e-3, NCHW=1e-3)
    fast.headline, slow.shape = "yes", "elsewhere"
    text = markdown([fast, slow])
    assert (
        "| 4.00 |" in text and "1 are at least as fast" in text and "0.25×: scaled_relu second order, elsewhere" in text
    )
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(results.TITLES) + 1}


def test_the_readme_has_the_tables_and_bars_of_the_results():
    checkout = Path(__file__).parents[2]
    devices = [results.read(path) for path in sorted(RESULTS.glob("*.csv"))]
    tables = "\n\n".join(map(markdown, devices))
    assert f"{START}\n{tables}\n{END}" in (checkout / "README.md").read_text(encoding="utf-8")
    assert (checkout / "docs" / "steps.svg").read_text(encoding="utf-8") == steps(devices)


def test_bars_are_as_long_as_a_step_takes():
    slow, fast = make_row(fastgan=1e-3, NCHW=4e-3), make_row(fastgan=4e-3, NCHW=1e-3)
    for row in (slow, fast):
        row.work, row.headline = "training step", "yes"
    slow.date, fast.date = "2026-01-01", "2026-01-02"
    older, newer = (
        re.findall(r'class="(stock|ours)" x="226" y="\d+" width="([\d.]+)"', steps([[row]])) for row in (slow, fast)
    )
    assert older == [("stock", "350.0"), ("ours", "87.5")] and newer == [("stock", "87.5"), ("ours", "350.0")]
    assert steps([[slow], [fast]]) == steps([[fast]]), "of the device that was measured last"


def test_samples_are_drawn_shade_by_shade():
    drawn = samples.drawn(np.array([[0, 255, 255, 0], [255, 0, 0, 28]], np.uint8))
    strokes = dict(re.findall(r'stroke="hsl\(0 0% (\d+)%\)" d="([^"]*)"', drawn))
    assert len(strokes) == samples.GRAYS - 1
    assert {shade: path for shade, path in strokes.items() if path} == {"100": "m1 0h2m-3 1h1", "11": "m3 1h1"}


# ── The suite ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", suite.PARTS)
def test_every_part_names_its_cases_once_and_starts_with_a_headline(part):
    found = suite.cases(part, CPU)
    assert found[0].headline or found[0].work == "eval forward"
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert suite.cases(part, CPU, "no such case") == []


def test_a_case_becomes_a_row_and_what_there_is_no_time_for_does_not():
    rows = list(suite.measure([make_case()], CPU, seconds=0.2))
    assert [row.gate for row in rows] == ["passed"]
    assert float(rows[0].speedup) > 0 and rows[0].saved_mb and rows[0].peak_mb
    assert len(list(itertools.islice(suite.measure([make_case()] * 3, CPU, seconds=0.0), 3))) <= 1


def test_table_has_a_line_for_each_row():
    assert command.table("part", [make_row(fastgan=1e-3, NCHW=4e-3)] * 3).row_count == 3
