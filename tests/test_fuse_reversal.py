"""fuse folds a gradient reversal into the linear layer that follows it, and nobody else notices."""

import copy
import pickle

import pytest
import torch
from fusing import assert_agree, twins
from torch import nn

from fastgan.fuse import explain, fuse, unfuse
from fastgan.nn import GradientReversal, WarmStartGradientReversal


def head(reversal=GradientReversal):
    return nn.Sequential(reversal(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


HEADS = {
    "reversal": head,
    "no bias": lambda: nn.Sequential(GradientReversal(0.5), nn.Linear(6, 5, bias=False)),
    "tensor": lambda: head(lambda coeff: GradientReversal(torch.tensor(coeff))),
    "warm start": lambda: head(lambda coeff: WarmStartGradientReversal(hi=coeff, max_iters=4, auto_step=True)),
    "twice": lambda: nn.Sequential(nn.Linear(6, 6), GradientReversal(0.5), nn.Linear(6, 6), *head()),
    "after convolutions": lambda: nn.Sequential(nn.Conv2d(4, 4, 3), GradientReversal(0.5), nn.Linear(6, 5)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_fused_head_computes_the_same(name, ran):
    stock, fused = twins(HEADS[name])
    x = torch.randn(3, 4, 5, 8, dtype=torch.float64) if name == "after convolutions" else torch.randn(7, 6).double()
    assert_agree(stock, fused, x)
    assert ran.count("reversed_linear") == 4 * (2 if name == "twice" else 1)  # two forwards in each of two steps


def test_samples_and_features_of_any_shape_fit(ran):
    _, fused = twins(head, torch.float32)
    for shape in ((6,), (2, 3, 6), (0, 6)):
        assert fused(torch.randn(shape)).shape == (*shape[:-1], 1)
    assert ran.count("reversed_linear") == 3


def test_a_schedule_goes_on_once_a_forward_and_is_read_at_each():
    model = fuse(head(lambda coeff: WarmStartGradientReversal(10.0, hi=coeff, max_iters=4, auto_step=True)))
    x = torch.randn(2, 6, requires_grad=True)
    sizes = [torch.autograd.grad(model(x).sum(), x)[0].norm().item() for _ in range(3)]
    assert sizes[0] == 0 < sizes[1] < sizes[2]
    assert model[0].iter_num == 3
    model[0] = GradientReversal(0.0)
    assert not torch.autograd.grad(model(x).sum(), x)[0].any()


def test_what_is_attached_to_either_layer_is_called(ran):
    for place in (0, 1):
        stock, fused = twins(head, torch.float32)
        called = []
        fused[place].register_forward_hook(lambda *_, called=called: called.append(True))
        x = torch.randn(2, 6)
        torch.testing.assert_close(fused(x), stock(x))
        assert called == [True] and "reversed_linear" not in ran
    model = fuse(nn.Sequential(GradientReversal(), nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5))))
    model(torch.randn(2, 6))
    assert "reversed_linear" not in ran


def test_the_model_is_what_it_was():
    model = head()
    layers, parameters, state = list(model), list(model.parameters()), model.state_dict()
    assert fuse(model) is model
    assert all(a is b for a, b in zip(model, layers, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == list(state)
    head().load_state_dict(model.state_dict())
    assert isinstance(model[0], GradientReversal) and type(model[1]) is nn.Linear
    x = torch.randn(2, 6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model) and torch.equal(twin(x), model(x))
    assert type(unfuse(model)) is nn.Sequential


def test_autocast_computes_the_same():
    stock, fused = twins(head, torch.float32)
    results = []
    for model in (stock, fused):
        x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        results.append([y, *torch.autograd.grad(y.float().sum(), [x, *model.parameters()])])
    assert results[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_a_fused_head_compiles_as_one_graph():
    _, fused = twins(head, torch.float32)
    x = torch.randn(3, 6, requires_grad=True)
    results = []
    for model in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        y = model(x)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    torch.testing.assert_close(*results)


def test_what_the_operator_does_not_take_goes_through_the_layers(ran):
    fuse(nn.Sequential(GradientReversal(), nn.Linear(6, 5, dtype=torch.complex64)))(torch.randn(2, 6) * 1j)
    assert "reversed_linear" not in ran
    for bad in (torch.randn(2, 5), torch.randn(2, 6, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as stock_error:
            head()(bad)
        with pytest.raises(RuntimeError) as error:
            fuse(head())(bad)
        assert str(error.value) == str(stock_error.value)


def test_explain_names_the_pattern_and_what_is_in_none():
    model = nn.Module()
    model.head = head()
    model.bare = nn.Sequential(nn.Linear(6, 6), GradientReversal(), nn.Flatten(), nn.Linear(6, 5))
    model.alone = WarmStartGradientReversal()
    assert list(explain(fuse(model))) == [
        ("alone", "WarmStartGradientReversal", False, "it is in Module, not in an nn.Sequential"),
        ("head.0–1", "GradientReversal → Linear", True, ""),
        ("bare.1", "GradientReversal", False, "no plain nn.Linear follows it"),
    ]
    assert "fused (0–1): GradientReversal → Linear" in repr(model.head)
