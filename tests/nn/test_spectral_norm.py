"""Spectral norms of layers and of whole models do what torch's do, access by access."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import remove_spectral_norm as remove_hook
from torch.nn.utils import spectral_norm as add_hook

import fastgan
from fastgan import backend
from fastgan.nn import SpectralNorm
from fastgan.nn import spectral_norm as layers
from fastgan.nn.spectral_norm import _shares, norms

STOCK = {"parametrisation": parametrizations.spectral_norm, "hook": add_hook}


class Critic(nn.Module):
    """Every kind of layer; one is called twice, one only if asked, one is normalised otherwise."""

    def __init__(self, norm):
        super().__init__()
        self.first = norm(nn.Conv2d(3, 6, 3, padding=1))
        self.up = norm(nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1))
        self.shared = norm(nn.Conv2d(4, 4, 3, padding=1))
        self.rare = norm(nn.Linear(4, 4))
        self.twice = norm(nn.Linear(4, 5), n_power_iterations=2)
        self.plain = nn.Linear(5, 5)
        self.last = norm(nn.Linear(5, 1))

    def forward(self, x, rare=False):
        x = self.up(torch.tanh(self.first(x)))
        x = self.shared(torch.tanh(self.shared(x))).mean((2, 3))
        if rare:
            x = self.rare(x)
        return self.last(torch.tanh(self.plain(self.twice(x))))


def twins(kind="parametrisation", ours=fastgan.spectral_norm_all):
    """A critic as torch has it, the same one served by the operator, and an input, in float64."""
    stock = Critic(STOCK[kind]).double()
    return stock, ours(copy.deepcopy(stock)), torch.randn(2, 3, 5, 5, dtype=torch.float64)


def assert_same(stock, served):
    assert list(stock.state_dict()) == list(served.state_dict())
    torch.testing.assert_close(dict(served.state_dict()), dict(stock.state_dict()))
    for (name, a), (_, b) in zip(stock.named_parameters(), served.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, msg=lambda m, name=name: f"{name}: {m}")


def both(stock, served, *args, **kwargs):
    results = [model(*args, **kwargs) for model in (stock, served)]
    torch.testing.assert_close(*results[::-1])
    return results


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of the operator has had."""
    counts = []
    normalise = layers.normalise
    monkeypatch.setattr(layers, "normalise", lambda w, *args: (counts.append(len(w)), normalise(w, *args))[1])
    return counts


# ── One layer ────────────────────────────────────────────────────────────────────────────────────────────────────────

LAYERS = {
    "linear": lambda: nn.Linear(5, 7),
    "conv": lambda: nn.Conv2d(3, 4, 3),
    "conv, channels_last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "transposed conv": lambda: nn.ConvTranspose2d(3, 4, 4),
    "transposed conv, channels_last": lambda: nn.ConvTranspose2d(3, 4, 4).to(memory_format=torch.channels_last),
    "conv1d": lambda: nn.Conv1d(3, 4, 3),
    "embedding": lambda: nn.Embedding(6, 4),
}


@pytest.mark.parametrize(
    "settings", [{}, {"n_power_iterations": 3, "eps": 1e-3, "dim": -1}, {"name": "bias", "dim": 0}], ids=str
)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_torchs_in_every_access(layer, settings):
    name = settings.get("name", "weight")
    plain = LAYERS[layer]().double()
    if not hasattr(plain, name):
        pytest.skip("it has no bias")
    torch.manual_seed(1)
    stock = parametrizations.spectral_norm(copy.deepcopy(plain), **settings)
    torch.manual_seed(1)
    ours = fastgan.spectral_norm(plain, **settings)
    assert type(ours.parametrizations[name][0]) is SpectralNorm
    assert_same(stock, ours)  # also the random numbers, and the 15 iterations
    for training in (True, True, False):
        results = []
        for module in (stock, ours):
            module.train(training)
            weight = getattr(module, name)
            (first,) = torch.autograd.grad(
                weight.pow(3).sum(), module.parametrizations[name].original, create_graph=True
            )
            first.square().sum().backward()
            results.append((weight, first))
        torch.testing.assert_close(*results[::-1])
        assert results[0][0].stride() == results[1][0].stride()
        assert_same(stock, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_of_another_dtype_and_autocast(dtype):
    stock = parametrizations.spectral_norm(nn.Linear(40, 30)).to(dtype)
    ours = fastgan.spectral_norm_all(copy.deepcopy(stock))
    x = torch.randn(4, 40, dtype=dtype)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, expected = ours(x), stock(x)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)
        assert ours.weight.dtype == dtype


def test_complex_weights_are_torchs_affair():
    torch.manual_seed(1)
    stock = parametrizations.spectral_norm(nn.Linear(3, 4, dtype=torch.complex64))
    torch.manual_seed(1)
    ours = fastgan.spectral_norm(nn.Linear(3, 4, dtype=torch.complex64))
    ours.load_state_dict(stock.state_dict())
    torch.testing.assert_close(ours.weight, stock.weight)


def test_bad_input_gets_torchs_kind_of_error():
    with pytest.raises(ValueError, match="n_power_iterations to be positive"):
        fastgan.spectral_norm(nn.Linear(3, 4), n_power_iterations=0)
    with pytest.raises(ValueError, match="no parameter or buffer with name 'w'"):
        fastgan.spectral_norm(nn.Linear(3, 4), "w")
    with pytest.raises(IndexError, match="Dimension out of range"):
        fastgan.spectral_norm(nn.Linear(3, 4), dim=2)
    for first in (fastgan.spectral_norm, parametrizations.spectral_norm):
        with pytest.raises(RuntimeError, match="Cannot register two spectral"):
            fastgan.spectral_norm(first(nn.Linear(3, 4)))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, not int"):
        fastgan.spectral_norm_all(3)


# ── All layers ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", STOCK)
def test_training_is_torchs_and_one_call_serves_a_forward(kind, calls):
    stock, served, x = twins(kind)
    optimizers = [torch.optim.Adam(model.parameters()) for model in (stock, served)]
    for step in range(6):
        calls.clear()
        rare = step % 3 == 2
        for y, optimizer in zip(both(stock, served, x, rare=rare), optimizers, strict=True):
            optimizer.zero_grad()
            y.square().mean().backward()
            optimizer.step()
        assert_same(stock, served)
        # Five together; the one of two iterations alone, and a second access of the shared one.
        assert calls == [5, 1, 1]
    assert not _shares.waiting and not _shares.taken


@pytest.mark.parametrize("kind", STOCK)
def test_evaluation_iterates_nothing_and_follows_the_weights(kind):
    stock, served, x = twins(kind)
    both(stock, served, x)
    stock.eval(), served.eval()
    before = copy.deepcopy(served.state_dict())
    with torch.no_grad():
        both(stock, served, x)
    torch.testing.assert_close(dict(served.state_dict()), dict(before), rtol=0, atol=0)
    with torch.no_grad():
        for model in (stock, served):
            for parameter in model.parameters():
                parameter.mul_(1.5)
    both(stock, served, x)
    with torch.inference_mode():
        both(stock, served, x)


@pytest.mark.parametrize("kind", STOCK)
def test_real_then_fake_then_backward(kind):
    stock, served, real = twins(kind)
    fake = torch.randn_like(real)
    for model in (stock, served):
        (model(real).mean() - model(fake).mean()).backward()
    assert_same(stock, served)


@pytest.mark.parametrize("kind", STOCK)
def test_a_gradient_penalty(kind):
    stock, served, x = twins(kind)
    for model in (stock, served):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
        (model(x).mean() + (grad.flatten(1).norm(dim=1) - 1).square().mean()).backward()
    assert_same(stock, served)


@pytest.mark.parametrize("kind", STOCK)
def test_the_librarys_own_penalty(kind):
    stock, served, x = twins(kind)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(stock(leaf).sum(), leaf, create_graph=True)
    (5 * grad.square().flatten(1).sum(1).mean()).backward()
    fastgan.r1_penalty(served, x).backward()
    assert_same(stock, served)


@pytest.mark.parametrize("kind", STOCK)
def test_checkpoints_load_both_ways(kind):
    stock, served, x = twins(kind)
    for _ in range(3):
        served(x)
    stock.load_state_dict(served.state_dict())
    both(stock, served, x)
    for _ in range(3):
        stock(x)
    served.load_state_dict(stock.state_dict())
    both(stock, served, x)
    assert_same(stock, served)


def test_access_from_outside_computes_alone_as_torch_does():
    stock, served, x = twins()
    for model in (stock, served):
        model.first.weight  # noqa: B018  (iterates)
        model(x)
        model.first.weight  # noqa: B018
        model.first(x)
    assert_same(stock, served)


def test_a_forward_that_fails_leaves_what_torch_leaves():
    stock, served, x = twins()
    for model in (stock, served):
        handle = model.shared.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(x)
        handle.remove()
    assert not _shares.waiting
    assert_same(stock, served)
    both(stock, served, x)


def test_access_with_another_graph_or_mode_than_the_forwards_computes_anew():
    class Odd(Critic):
        def forward(self, x):
            with torch.no_grad():
                x = self.first(x)
            self.up.eval()
            x = self.up(x).mean((2, 3))
            with torch.enable_grad():
                return self.last(self.twice(x))

    stock = Odd(parametrizations.spectral_norm).double()
    served = fastgan.spectral_norm_all(copy.deepcopy(stock))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        results = both(stock, served, x)
    for y in (*results, *both(stock, served, x)):
        y.sum().backward()
    assert_same(stock, served)


def test_cached_weights_are_computed_once(calls):
    stock, served, x = twins()
    for model in (stock, served):
        with parametrize.cached():
            (model(x).mean() - model(2 * x).mean()).backward()
    assert_same(stock, served)
    assert calls == [5, 1]


def test_models_in_models():
    stock = nn.Sequential(*[Critic(parametrizations.spectral_norm) for _ in range(2)]).double()
    served = copy.deepcopy(stock)
    for part in (*served, served):
        fastgan.spectral_norm_all(part)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for model in (stock, served):
        (model[0](x) + model[1](x)).sum().backward()
    stock.forward, served.forward = (lambda x, m=m: m[0](x) * m[1](x) for m in (stock, served))
    for y in both(stock, served, x):
        y.sum().backward()
    assert_same(stock, served)


@pytest.mark.parametrize("kind", STOCK)
def test_copies_are_served_and_independent(kind, calls):
    stock, served, x = twins(kind)
    copied, pristine = copy.deepcopy(served), copy.deepcopy(served.state_dict())
    calls.clear()
    both(stock, copied, x)
    assert calls == [5, 1, 1]
    torch.testing.assert_close(dict(served.state_dict()), dict(pristine), rtol=0, atol=0)


def test_a_model_with_hooks_is_pickled():
    stock, served, x = twins("hook")
    both(stock, pickle.loads(pickle.dumps(served)), x)


@pytest.mark.parametrize("kind", STOCK)
def test_removal(kind):
    stock, x = Critic(STOCK[kind]).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    served = fastgan.spectral_norm_all(Critic(STOCK[kind]).double())  # torch removes from the class that copies share
    served.load_state_dict(stock.state_dict())
    both(stock, served, x)
    for model in (stock, served):
        if kind == "hook":
            remove_hook(model.first)
        else:
            parametrize.remove_parametrizations(model.first, "weight")
    assert_same(stock, served)
    assert type(served.first) is nn.Conv2d
    both(stock, served, x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations(reentrant):
    class Checkpointed(Critic):
        def forward(self, x):
            up = torch.utils.checkpoint.checkpoint(self.up, self.first(x), use_reentrant=reentrant)
            return self.last(self.twice(up.mean((2, 3))))

    stock = Checkpointed(parametrizations.spectral_norm).double()
    served = fastgan.spectral_norm_all(copy.deepcopy(stock))
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for y in both(stock, served, x):
        y.sum().backward()
    torch.testing.assert_close(dict(served.state_dict()), dict(stock.state_dict()))
    torch.testing.assert_close(served.last.bias.grad, stock.last.bias.grad)


def test_replicas_write_the_buffers_of_their_model():
    """As DataParallel makes them, here all on the CPU."""
    stock, served, x = twins()
    for model in (stock, served):
        replicas = []
        for _ in range(2):
            copies = {id(m): m._replicate_for_data_parallel() for m in model.modules()}
            for m in model.modules():
                copy_of = copies[id(m)]
                copy_of._former_parameters = {}
                for name, child in m._modules.items():
                    copy_of._modules[name] = copies[id(child)]
                    setattr(copy_of, name, copies[id(child)])
                for name, parameter in m._parameters.items():
                    setattr(copy_of, name, parameter * 1)
                    copy_of._former_parameters[name] = parameter
                for name, buffer in m._buffers.items():
                    copy_of._buffers[name] = buffer
            replicas.append(copies[id(model)])
        results = torch.cat([replica(x) for replica in replicas])
        results.sum().backward()
    assert_same(stock, served)


def test_functional_call_uses_the_given_tensors():
    stock, served, x = twins()
    given = {name: torch.randn_like(t) for name, t in stock.state_dict().items()}
    results = [
        torch.func.functional_call(model, {k: t.clone() for k, t in given.items()}, x) for model in (stock, served)
    ]
    torch.testing.assert_close(*results[::-1])
    assert_same(stock, served)


def test_function_transforms():
    stock, served, x = twins()
    stock.eval(), served.eval()
    results = [torch.func.vmap(torch.func.grad(lambda x, m=m: m(x[None]).sum()))(x) for m in (stock, served)]
    torch.testing.assert_close(*results[::-1])


def test_compiled_models_train_as_torchs():
    stock, served, x = (part.float() for part in twins())
    compiled = torch.compile(served, backend="aot_eager")
    for y in (stock(x), compiled(x)):
        y.sum().backward()
    torch.testing.assert_close(dict(served.state_dict()), dict(stock.state_dict()))
    torch.testing.assert_close(served.last.bias.grad, stock.last.bias.grad)
    torch.testing.assert_close(
        served.first.parametrizations.weight.original.grad, stock.first.parametrizations.weight.original.grad
    )


def test_a_model_without_spectral_norms_gets_them_on_every_layer_with_a_matrix():
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.Linear(8, 4), nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.GroupNorm(1, 2),
        nn.ConvTranspose1d(2, 3, 2), parametrizations.weight_norm(nn.Conv1d(3, 1, 1)),
    )  # fmt: skip
    assert fastgan.spectral_norm_all(model) is model
    assert [norm.layer for norm in norms(model)] == [model[i] for i in (0, 1, 3, 5)]
    model(torch.arange(4))
    for layer in (model[0], model[1], model[3]):
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.1)


def test_a_model_with_some_spectral_norms_keeps_to_these():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    assert [norm.layer for norm in norms(fastgan.spectral_norm_all(model))] == [model[0]]


def test_layers_that_come_and_go(calls):
    stock, served, x = twins()
    fresh = parametrizations.spectral_norm(nn.Linear(5, 1)).double()
    for model in (stock, served):
        model.last = copy.deepcopy(fresh)
        model(x)
    assert calls == [5, 1, 1]  # the layer that has gone, too
    calls.clear()
    both(stock, fastgan.spectral_norm_all(served), x)
    assert calls == [5, 1, 1]
    served.last = nn.Identity()
    served(x), calls.clear(), served(x)
    assert calls == [4, 1, 1]


@pytest.fixture
def automatic(monkeypatch):
    monkeypatch.setattr(backend, "is_automatic", lambda: True)


def test_an_automatic_choice_leaves_to_torch_what_it_is_faster_at(calls, automatic):
    stock, served, x = twins()
    both(stock, served, x)
    assert not calls
    large = fastgan.spectral_norm_all(nn.Sequential(*[nn.Linear(256, 256) for _ in range(2)]))
    large(torch.randn(1, 256))
    assert calls == [2]
    large.eval()
    for grad, frozen in ((False, False), (True, True)):
        large.requires_grad_(not frozen)
        with torch.set_grad_enabled(grad):
            large(torch.randn(1, 256))
    assert calls == [2]
    large.requires_grad_(True)(torch.randn(1, 256))
    assert calls == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", STOCK)
def test_what_is_left_to_torch_is_torchs_to_the_bit(kind, dtype, automatic):
    stock, served, x = twins(kind)
    stock, served, real, fake = stock.to(dtype), served.to(dtype), x.to(dtype), x.flip(0).to(dtype)
    optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (stock, served)]
    for step in range(6):
        for model, optimizer in zip((stock, served), optimizers, strict=True):
            model.train(step % 3 < 2)
            optimizer.zero_grad()
            with torch.no_grad():
                model(real)
            leaf = real.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=step == 1):
                (grad,) = torch.autograd.grad(model(leaf).sum(), leaf, create_graph=True)
                loss = model(real).mean() - model(fake).mean() + grad.square().sum()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(dict(served.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)
        assert_same(stock, served)
    assert not _shares.waiting and not _shares.taken


@pytest.mark.parametrize("kind", STOCK)
def test_transforms_and_traces_see_torchs_own_operations(kind, automatic):
    stock, served, x = twins(kind)
    results = []
    for model in (stock, served):
        parameters, buffers = dict(model.named_parameters()), {k: b.clone() for k, b in model.named_buffers()}
        loss = lambda p, m=model, b=buffers: torch.func.functional_call(m, (p, b), (x,)).sum()  # noqa: E731
        results.append((torch.func.grad(loss)(parameters), buffers))
    torch.testing.assert_close(*results[::-1])
    served.eval()
    torch.testing.assert_close(torch.jit.trace(served, x)(2 * x), served(2 * x))  # traces twice, and compares


@pytest.mark.parametrize("kind", STOCK)
def test_a_small_norm_among_large_ones_and_one_that_is_gone(kind, calls, automatic):
    class Mixed(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.small, self.large = norm(nn.Linear(3, 300)), norm(nn.Linear(300, 300))
            self.end = norm(nn.Linear(300, 2))

        def forward(self, x):
            return self.end(self.large(torch.tanh(self.small(x)))) + self.end(self.small(x))

    stock = Mixed(STOCK[kind]).double()
    served, x = fastgan.spectral_norm_all(copy.deepcopy(stock)), torch.randn(2, 3, dtype=torch.float64)
    for y in both(stock, served, x):
        y.sum().backward()
    assert calls == [3]
    assert_same(stock, served)
    for model in (stock, served):
        model.small = nn.Linear(3, 300).double()
        torch.nn.init.ones_(model.small.weight), torch.nn.init.zeros_(model.small.bias)
        if kind == "hook":
            remove_hook(model.end)
    for _ in range(2):
        both(stock, served, x)
    assert_same(stock, served)


def test_one_forward_hook_however_often_it_is_called():
    _, served, _ = twins()
    hooks = len(served._forward_pre_hooks)
    assert len(fastgan.spectral_norm_all(served)._forward_pre_hooks) == hooks == 1
