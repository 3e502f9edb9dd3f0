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


@pytest.fixture(scope="session", autouse=True)
def _interpreter_counts_and_multiplies():
    """What Triton 3.6's own cannot: a loop to a number that is computed, with NumPy 2.4, and a product of bfloat16."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def wide(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None).view("float32")
        return interpreter.TensorHandle(data, tl.float32)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
        monkeypatch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *args: create_dot(self, wide(a), wide(b), *args),
        )
        yield
