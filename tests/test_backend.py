"""Which implementation serves a device, and what `fastgan doctor` says of it."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastgan import backend, doctor
from fastgan.ops import batch_norm_act, conv2d
from fastgan.ops._kernels import register_kernels


def printed_report() -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.report())
    return console.export_text()


def test_the_reference_backend_is_stock_torch(use_backend):
    use_backend("reference")
    x = torch.randn(4, 3, 5, 5)
    stock = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
    assert torch.equal(batch_norm_act(x, None, None, training=True), stock)
    assert "FASTGAN_BACKEND=reference" in printed_report()


def test_an_unknown_backend_is_an_error(use_backend):
    use_backend("cuda")
    with pytest.raises(RuntimeError, match="FASTGAN_BACKEND=cuda: it must be auto, cpp, triton or reference"):
        batch_norm_act(torch.randn(4, 3, 5, 5), None, None, training=True)


def test_a_backend_asked_for_by_name_says_why_it_cannot_serve(use_backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    use_backend("triton")
    with pytest.raises(RuntimeError, match="FASTGAN_BACKEND=triton: the Triton kernels serve CUDA tensors, not cpu"):
        batch_norm_act(torch.randn(4, 3, 5, 5), None, None, training=True)


def test_without_the_built_module_everything_still_works(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastgan._C", None)
    backend.reset()
    try:
        x, weight = torch.randn(4, 3, 5, 5), torch.randn(6, 3, 3, 3)
        assert torch.equal(conv2d(x, weight), torch.nn.functional.conv2d(x, weight))
        report = printed_report()
        assert "plain torch" in report and "install a C++ compiler" in report
        monkeypatch.setenv("FASTGAN_BACKEND", "cpp")
        backend.reset()
        with pytest.raises(RuntimeError, match=r"FASTGAN_BACKEND=cpp: fastgan\._C is not there"):
            conv2d(x, weight)
    finally:
        monkeypatch.undo()
        backend.reset()


def test_the_report_names_versions_devices_and_the_instruction_set():
    report = printed_report()
    assert torch.__version__ in report
    if backend.serving("cpu") == "cpp":
        from fastgan import _C

        assert f"fastgan's C++ kernels use {_C.cpu_capability()}" in report


def test_importing_the_operators_imports_neither_triton_nor_training():
    code = "import sys, fastgan; assert not {'triton', 'fastgan.training', 'accelerate', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def operator_with_cuda_cpp():
    """Of an absent Triton kernel, which would raise."""
    torch.library.define("fastgan::probe_of_backends", "(Tensor x) -> Tensor")
    register_kernels("probe_of_backends", "absent", "absent", cpp=torch.clone, cuda_cpp=torch.neg)
    return torch.ops.fastgan.probe_of_backends


@pytest.mark.parametrize(("obstacle", "named"), [("", "auto"), ("no device", "auto"), ("", "triton")])
def test_an_automatic_choice_prefers_cuda_cpp_to_triton_where_it_can_run(
    operator_with_cuda_cpp, use_backend, monkeypatch, obstacle, named
):
    use_backend(named)
    monkeypatch.setattr(backend, "serving", lambda _: "triton")
    monkeypatch.setitem(sys.modules, "fastgan._cuda", SimpleNamespace(obstacle=lambda: obstacle))
    x = torch.randn(3)
    if obstacle or named != "auto":
        with pytest.raises(ModuleNotFoundError, match=r"fastgan_kernels\.absent"):
            operator_with_cuda_cpp(x)
        assert not obstacle or obstacle in printed_report()
    else:
        assert torch.equal(operator_with_cuda_cpp(x), -x)
        assert "CUDA C++" in printed_report()


def test_without_the_built_cuda_module_triton_serves_and_the_report_says_why(use_backend, monkeypatch):
    use_backend("auto")
    monkeypatch.setattr(backend, "serving", lambda _: "triton")
    monkeypatch.setitem(sys.modules, "fastgan._cuda", None)
    assert "put nvcc on the PATH" in backend.cuda_cpp_obstacle()
    assert "CUDA C++" not in printed_report()


def test_without_triton_the_definition_serves_cuda(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    backend.reset()
    try:
        assert backend.serving("cuda") == "reference"
        assert "pip install triton" in backend.obstacle("triton", "cuda")
    finally:
        monkeypatch.undo()
        backend.reset()
