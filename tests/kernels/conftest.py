import pytest


def cut_into_small_tiles(monkeypatch) -> None:
    """No unit held whole, several programs to a unit, each with several tiles, on tensors that the interpreter can cover."""
    from fastgan_kernels import _units  # which imports Triton, and whether that interprets is decided before

    monkeypatch.setattr(_units, "_WHOLE", dict.fromkeys(_units._WHOLE, 0))
    monkeypatch.setattr(_units, "_TILE", 16)
    monkeypatch.setattr(_units, "_ELEMENT_TILE", 32)
    monkeypatch.setattr(_units, "ROW_CHANNELS", 2)
    monkeypatch.setattr(_units, "PROGRAMS", 10)
    monkeypatch.setattr(_units, "_SUMMING_PROGRAMS", 6)
    monkeypatch.setattr(_units, "_cached_plan", _units.Plan)


@pytest.fixture
def several_programs(monkeypatch):
    cut_into_small_tiles(monkeypatch)


@pytest.fixture(params=["whole units", "several programs"])
def programs(request, monkeypatch):
    if request.param == "several programs":
        cut_into_small_tiles(monkeypatch)
    return request.param
