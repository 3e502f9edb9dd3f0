"""`fastgan bench`: what a run writes, what has changed since another, and what it refuses."""

import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_case import make_case, make_row, scaled_relu
from typer.testing import CliRunner

from benchmarks import RESULTS
from fastgan import models
from fastgan.bench import changes, page, results, suite
from fastgan.bench.changes import Comparison
from fastgan.bench.op import Contender
from fastgan.cli import app

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    """The suite has one headline case and one other in each part."""
    monkeypatch.setattr(suite, "MAX_SECONDS", 0.0)  # five rounds
    contenders = make_case().contenders | {"compile": Contender(scaled_relu)}
    headline = make_case(headline=True, work="forward", contenders=contenders)
    found = [headline, replace(headline, headline=False, shape="other")]
    monkeypatch.setattr(
        suite, "cases", lambda part, _, text="": [replace(case, part=part) for case in found if text in case.name]
    )


@pytest.fixture
def bench(tiny, tmp_path):
    def run(*options):
        result = CliRunner().invoke(
            app, ["bench", "--device", "cpu", "--minutes", "99", "--out", str(tmp_path / "out"), *map(str, options)]
        )
        assert result.exit_code == 0, result.output
        return result.output

    return run


def written(folder):
    (table,) = folder.glob("*.csv")
    return results.read(table), table.with_suffix(".html").read_text()


# ── A run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_writes_a_table_and_a_page_for_the_device(bench, tmp_path):
    output = bench("--op", "bias_act", "--model", "wgan-gp")
    rows, html = written(tmp_path / "out")
    assert sorted({row.part for row in rows}) == ["bias_act", "wgan_gp"]
    assert all(row.peers.keys() == {"NCHW", "compile"} for row in rows) and len(rows) == 4
    assert (tmp_path / "out" / results.results_path(CPU, Path()).name).exists()
    assert results.device_name(CPU) in html and rows[0].date in html and "A quick run" not in html
    assert all(f"{row.speedup}×" in html for row in rows)
    assert str(tmp_path / "out") in output and "4 rows" in output


def test_the_page_needs_nothing_else(bench, tmp_path):
    bench("--op", "bias_act")
    _, html = written(tmp_path / "out")
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script", html)


def test_a_quick_run_is_of_headlines_without_torch_compile_and_does_not_spoil_better_results(bench, tmp_path):
    bench("--op", "bias_act")
    slow = results.results_path(CPU, tmp_path / "out").read_bytes()
    bench("--op", "bias_act", "--quick")
    assert results.results_path(CPU, tmp_path / "out").read_bytes() == slow
    quick = results.results_path(CPU, tmp_path / "out", quick=True)
    (row,) = results.read(quick)
    assert row.headline and row.peers.keys() == {"NCHW"}
    assert "A quick run" in quick.with_suffix(".html").read_text()


def test_a_quick_run_of_everything_is_of_one_case_with_gradients_of_each_operator():
    works = [("a", "forward"), ("a", "forward+backward"), ("a", "second order"), ("b", "penalty+backward")]
    selected = [make_case(op=op, work=work, shape=shape) for op, work in works for shape in ("first", "other")]
    found = [(case.op, case.work, case.shape) for case in suite.one_of_each(selected)]
    assert found == [("a", "forward+backward", "first"), ("b", "penalty+backward", "first")]
    measured = [case.op for part in suite.PARTS for case in suite.one_of_each(suite.quick_cases(part, CPU))]
    assert len(measured) == len(set(measured)) and {"batch_norm_act", "DCGAN"} <= set(measured)


def test_what_there_is_no_time_for_is_said_and_listed_as_not_measured(bench, tmp_path):
    output = bench("--op", "bias_act", "--op", "adain", "--minutes", 0)
    rows, html = written(tmp_path / "out")
    assert rows == [] and output.count("not measured, the minutes are over: scaled_relu") == 4
    assert f"<b>{2 * len(suite.PARTS)} of {2 * len(suite.PARTS)}</b>" in html


def test_the_checkouts_command_is_the_same_one(tiny, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()}
    options = ["--op", "bias_act", "--minutes", "99", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *options])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("benchmarks", run_name="__main__")
    assert exited.value.code == 0 and len(written(tmp_path)[0]) == 2
    assert {path: path.stat().st_mtime_ns for path in RESULTS.iterdir()} == before


def test_quick_cases_are_the_first_of_each_part_then_the_second():
    a, b = ([make_case(part=part, shape=str(i)) for i in range(count)] for part, count in (("a", 3), ("b", 1)))
    assert [case.part + case.shape for case in suite.in_turn([a, b])] == ["a0", "b0", "a1", "a2"]


def test_a_part_with_the_name_of_a_model_is_one():
    (folder,) = models.__path__
    assert set(suite.MODELS) == {part for part in suite.PARTS if Path(folder, f"{part}.py").exists()}


# ── What has changed ─────────────────────────────────────────────────────────────────────────────────────────────────


def rows_of(ours, stock=(5, 5, 5), **changed):
    """Three cases, of which stock takes `stock` milliseconds and ours `ours`; None where it is refused."""
    rows = []
    for i, (mine, peer) in enumerate(zip(ours, stock, strict=True)):
        gate = "off" if mine is None else ""
        row = make_row(gate, fastgan=(mine or 1) / 1e3, NCHW=peer / 1e3, compile=2 * peer / 1e3)
        rows.append(replace(row, shape=str(i), **changed))
    return rows


def verdicts(comparison):
    return [(change.now.shape, comparison.verdict(change)) for change in comparison.changes]


def test_changes_are_sorted_by_their_size_and_small_ones_are_noise():
    comparison = Comparison(rows_of([1, 4, 2]), rows_of([1.05, 1, 4.2]))
    assert verdicts(comparison) == [("1", "4.00× faster"), ("2", "2.10× slower"), ("0", "noise")]
    assert comparison.summary == "1 faster, 1 slower, 1 within noise"
    assert comparison.noise == changes.LEAST_NOISE and "milliseconds are compared" in comparison.basis


def test_noise_is_what_stock_times_themselves_differ_by():
    comparison = Comparison(rows_of([1, 1, 1]), rows_of([1.4, 1.4, 3], stock=(7.5, 7.5, 7.5)))
    assert comparison.noise == pytest.approx(1.5)
    assert verdicts(comparison) == [("2", "3.00× slower"), ("0", "noise"), ("1", "noise")]
    assert "1.50×" in comparison.basis


def test_between_machines_ratios_to_the_peers_of_both_are_compared():
    then, now = rows_of([1, 1, 1], device="old"), rows_of([2, 2, 2], stock=(10, 20, 5))
    for row in now:
        row.stock_ms = re.sub(r"NCHW=[^;]*; ", "", row.stock_ms)  # compile alone is left: twice as long
    comparison = Comparison(then, now)
    assert [change.ratios for change in comparison.changes] == [(10, 20), (10, 5), (10, 10)]
    assert verdicts(comparison) == [("1", "2.00× better"), ("2", "2.00× worse"), ("0", "noise")]
    assert "Another machine: old then" in comparison.basis


def test_what_has_lost_its_time_comes_first_and_what_never_had_one_not_at_all():
    comparison = Comparison(rows_of([1, None, 1]), [*rows_of([9, None, None]), make_row(fastgan=1e-3, NCHW=1e-3)])
    assert verdicts(comparison) == [("2", "no time now"), ("0", "9.00× slower")]
    assert "1 not to be compared, 1 not in the earlier file" in comparison.summary


def test_against_shows_on_the_screen_and_on_the_page_what_has_changed(bench, tmp_path):
    bench("--op", "bias_act", "-k", "other")
    (table,) = (tmp_path / "out").glob("*.csv")
    (row,) = results.read(table)
    results.merge(table, [replace(row, fastgan_ms=f"{1000 * float(row.fastgan_ms):.4f}")])
    output = bench("--op", "bias_act", "-k", "other", "--against", table)  # the file that the run will overwrite
    for shown in (output, written(tmp_path / "out")[1]):
        assert re.search(r"\d{3,}\.\d+× faster", shown) and "1 faster, 0 slower" in shown


# ── The page ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_owns_up_to_what_is_slower_refused_and_not_measured(tmp_path):
    fast, slow, _ = rows_of([1, 20, 1])
    (refused, *_) = rows_of([None, 1, 1], op="refused")
    waits = replace(make_row(NCHW=4e-3), op="<waits>", note="fastgan: not timed")
    known = [make_case(op="never").key, fast.key]
    html = page.write(tmp_path / "page.html", [fast, slow, refused, waits], known).read_text()
    assert "1 case of 2 is slower" in html and "0.25×" in html
    assert "no speed: off" in html
    assert "&lt;waits&gt;, second order" in html and "fastgan: not timed" in html and "never, second order" in html
    assert "<b>2 of 5</b>" in html


def test_values_beyond_an_axis_stand_at_its_edge():
    assert [page.RATIO.at(value) for value in (0.01, 0.25, 2, 16, 99)] == [0, 0, 0.5, 1, 1]
    assert [page.FLOOR.at(value) for value in (0, 0.75, 3)] == [0, 0.5, 1]


def test_dots_of_a_swarm_do_not_cover_each_other():
    row = make_row(fastgan=1e-3, NCHW=4e-3)
    dots = page.swarm([(x, row) for x in (0.0, 1.0, 1.0, 50.0)])
    distances = [abs(complex(a.x - b.x, a.y - b.y)) for a in dots for b in dots if a is not b]
    assert min(distances) >= 1.98 * page.DOT and dots[-1].y == 0


# ── Bad input ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--op", "nothing"], ["--op", "nothing", "bias_act, conv_norm_act"]),
        (["--op", "dcgan"], ["--op", "dcgan", "bias_act"]),
        (["--model", "bias_act"], ["--model", "dcgan, wgan_gp"]),
        (["--device", "abacus"], ["--device", "abacus", "auto, cpu"]),
        (["--minutes", "-1"], ["--minutes"]),
        (["-k", "nothing like it"], ["-k", "nothing like it"]),
        (["--against", "absent.csv"], ["--against", "absent.csv"]),
        (["--against", "."], ["--against", "cannot read"]),
        (["--against", "words.csv"], ["--against", "words.csv", "columns"]),
        (["--against", "bytes.csv"], ["--against", "bytes.csv"]),
        (["--against", "short.csv"], ["--against", "line 2", "cells"]),
        (["--against", "letters.csv"], ["--against", "line 2", "numbers"]),
        (["--against", "empty.csv"], ["--against", "no rows"]),
        (["--out", "words.csv"], ["--out", "words.csv"]),
    ],
)
def test_bad_options_are_one_line_that_names_them(tiny, tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    row = make_row(fastgan=1e-3, NCHW=4e-3)
    Path("words.csv").write_text("once,upon\na,time\n")
    Path("bytes.csv").write_bytes(bytes(range(256)))
    results.merge(Path("empty.csv"), [])
    results.merge(Path("short.csv"), [row])
    Path("short.csv").write_text(Path("short.csv").read_text().rsplit(",", 3)[0] + "\n")
    results.merge(Path("letters.csv"), [replace(row, fastgan_ms="soon")])
    result = CliRunner().invoke(app, ["bench", "--device", "cpu", *options])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("fastgan: ") and result.stderr.count("\n") == 1, result.stderr
    for part in parts:
        assert part in result.stderr
    assert not list(tmp_path.glob("runs/bench/*.html"))
