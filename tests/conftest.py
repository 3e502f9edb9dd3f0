import functools
import os
import sys
from pathlib import Path

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shapes that a test has made up are not worth measuring, nor remembering.
os.environ["FASTGAN_AUTOTUNE"] = "0"

# After the installed package: the benchmarks are only in the checkout.
sys.path.append(str(Path(__file__).parents[1]))

from fastgan import backend, ops

# Files that take minutes. They begin first, so that no process is left alone with one at the end.
LONG = ("test_ahead_of_time.py", "test_instruction_sets.py", "test_run.py", "test_cli.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def _interpreter_patches_its_language_once():
    """It does so again in every helper that a kernel calls, which takes half of all its time."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    @functools.cache
    def languages(kernel):
        return [module for module in (tl, tl.core) if any(value is module for value in kernel.__globals__.values())]

    def patch_once(kernel):
        is_patched = not any(tl.core.is_builtin(module.load) for module in languages(kernel))
        return interpreter._LangPatchScope() if is_patched else patch_language(kernel)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _kernels_serve_small_tensors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are quick to test, but stock torch is faster at them: an automatic choice would test only that."""
    monkeypatch.setattr(backend, "is_automatic", functools.cache(lambda: False))


@pytest.fixture
def one_thread():
    """Tensors this small are slower on several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written is NaN, so an element that a kernel leaves out is seen."""

    def poison(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def use_backend(monkeypatch: pytest.MonkeyPatch):
    """use_backend("triton") serves every device with that backend until the test ends."""

    def use(name: str) -> None:
        monkeypatch.setenv("FASTGAN_BACKEND", name)
        backend.reset()

    yield use
    monkeypatch.undo()
    backend.reset()


@pytest.fixture
def ran(monkeypatch):
    """The names of the operators, as they run."""
    names = []

    def noting(name, op):
        return lambda *args, **kwargs: (names.append(name), op(*args, **kwargs))[1]

    for name in ops.__all__:
        monkeypatch.setattr(ops, name, noting(name, getattr(ops, name)))
    return names
