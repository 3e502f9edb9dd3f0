"""What is measured once stays chosen, in this process and the next; and where nothing may be measured."""

import json

import pytest
import torch

from fastgan.ops import _autotune

CPU = torch.device("cpu")
KEY = ("torch.bfloat16", (64, 128, 16, 16), True)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTGAN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "1")
    _autotune.reset()
    yield tmp_path / "cache" / "choices.json"
    _autotune.reset()


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds of each candidate, which the test sets, and the names of those that were timed."""

    class Clock(dict):
        def __init__(self, **times):
            super().__init__(times)
            self.timed = []

    clock = Clock(vendor=2.0, small=1.0, large=3.0)

    def milliseconds(run, calls, device):
        clock.timed.append(run.candidate)
        return clock[run.candidate]

    monkeypatch.setattr(_autotune, "_milliseconds", milliseconds)
    return clock


def candidate(name, result=1.0):
    def run():
        if isinstance(result, Exception):
            raise result
        return torch.full((2,), result)

    run.candidate = name
    return run


def choose(*names, key=KEY, **results):
    names = names or ("vendor", "small", "large")
    return _autotune.choose(
        "convolution", CPU, key, lambda: {name: candidate(name, results.get(name, 1.0)) for name in names}
    )


def test_the_fastest_is_chosen_and_measured_once(clock):
    assert choose() == "small"
    timed = len(clock.timed)
    clock["large"] = 0.5
    assert choose() == "small"
    assert len(clock.timed) == timed


def test_another_shape_is_measured_by_itself(clock):
    assert choose() == "small"
    clock["large"] = 0.5
    assert choose(key=(*KEY, 1)) == "large"


def test_the_next_process_reads_what_this_one_measured(clock, cache):
    choose()
    ((operator, times),) = _autotune.chosen()
    assert (operator, list(times.items())) == ("convolution", [("small", 1.0), ("vendor", 2.0), ("large", 3.0)])
    _autotune.reset()
    clock.timed.clear()
    assert choose() == "small"
    assert not clock.timed


def test_what_was_measured_with_another_version_is_measured_again(clock, cache):
    choose()
    ((environment, choices),) = json.loads(cache.read_text()).items()
    assert torch.__version__ in environment
    cache.write_text(json.dumps({environment + " of next year": choices}))
    _autotune.reset()
    clock["large"] = 0.5
    assert choose() == "large"
    assert len(json.loads(cache.read_text())) == 2


def test_a_winner_that_is_no_candidate_any_more_is_measured_again(clock):
    choose()
    _autotune.reset()
    assert choose("vendor", "large") == "vendor"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"gpu": 3}', '{"gpu": {"key": {"small": "fast"}}}', "\x00"])
def test_a_broken_file_is_replaced(clock, cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    assert choose() == "small"
    _autotune.reset()
    clock.timed.clear()
    assert choose() == "small"
    assert not clock.timed


def test_a_folder_that_cannot_be_written_costs_only_the_next_process(clock, cache):
    cache.parent.write_text("a file in its place")
    assert choose() == choose() == "small"


def test_no_half_written_file_is_left(clock, cache):
    choose()
    assert [path.name for path in cache.parent.iterdir()] == ["choices.json"]


def test_autotune_0_takes_the_first_and_touches_nothing(clock, cache, monkeypatch):
    monkeypatch.setenv("FASTGAN_AUTOTUNE", "0")
    assert choose() == "vendor"
    assert not clock.timed and not cache.exists()


def test_nothing_is_measured_while_a_graph_is_captured_and_it_is_later(clock, monkeypatch):
    monkeypatch.setattr(_autotune, "_is_capturing", lambda device: True)
    assert choose() == "vendor"
    assert not clock.timed
    monkeypatch.setattr(_autotune, "_is_capturing", lambda device: False)
    assert choose() == "small"


def test_what_computes_something_else_or_fails_is_never_chosen(clock):
    assert choose(small=1.1) == "vendor"
    assert choose(key=(*KEY, 1), small=RuntimeError("out of shared memory")) == "vendor"
    with pytest.raises(RuntimeError, match="no memory"):
        choose(key=(*KEY, 2), vendor=RuntimeError("no memory"))


def test_shapes_without_end_are_not_measured_without_end(clock, monkeypatch):
    monkeypatch.setattr(_autotune, "_MOST", 3)
    assert [choose(key=(i,)) for i in range(5)] == ["small"] * 3 + ["vendor"] * 2
