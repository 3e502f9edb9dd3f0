"""What else people do with a model in PyTorch, done with a fused one: with chains, residual blocks and a U-Net."""

import copy
import io
import shutil
import time

import pytest
import safetensors.torch
import torch
import two_processes
from fusing import assert_agree, batch, replicate, twins
from oracle import Errors
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from fastgan import backend
from fastgan.fuse import Fused, explain, fuse, unfuse
from fastgan.models import sngan

C = 4

pytestmark = pytest.mark.usefixtures("one_thread")


def chain():
    return nn.Sequential(
        nn.Conv2d(C, 6, 3, 1, 1), nn.BatchNorm2d(6), nn.ReLU(True), nn.ConvTranspose2d(6, C, 4, 2, 1), nn.BatchNorm2d(C),
        nn.LeakyReLU(0.2, True), nn.Conv2d(C, C, 3), nn.Tanh(),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return x + self.bn2(self.conv2(y))


class Residual(nn.Module):
    """A generator of residual blocks."""

    def __init__(self):
        super().__init__()
        self.head, self.blocks = nn.Conv2d(C, C, 3, 1, 1), nn.ModuleList([Block(), Block()])
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(C, C, 3, 1, 1), nn.BatchNorm2d(C), nn.ReLU())
        self.last = nn.Conv2d(C, 3, 3, 1, 1)

    def forward(self, x):
        x = torch.relu(self.head(x))
        for block in self.blocks:
            x = block(x)
        return torch.tanh(self.last(self.up(x)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(C, 6, 4, 2, 1)
        self.down2 = nn.Sequential(nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 2, 1), nn.BatchNorm2d(8))
        self.up2 = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.up1 = nn.ConvTranspose2d(12, 3, 4, 2, 1)

    def forward(self, x):
        skip = self.down1(x)
        inner = self.up2(self.down2(skip))
        return torch.tanh(self.up1(torch.relu(torch.cat([skip, inner], 1))))


def critic():
    """Of spectral norms."""
    return sngan.Discriminator(8, C, 4)


MODELS = {"chain": chain, "residual": Residual, "unet": UNet}
WITHOUT_CHANCE = {"chain": chain, "residual": Residual, "critic": critic}
NORMS = {"chain": 2, "residual": 5, "unet": 2}
of_each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
of_each_forward = pytest.mark.parametrize("make", [Residual, UNet])


def norms_of(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def convs_of(model):
    return [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))]


def step(model, x, run=None):
    """What a forward and a backward give and leave."""
    torch.manual_seed(0)
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **grads, **dict(model.named_buffers())}


# ── Compilers and transforms ─────────────────────────────────────────────────────────────────────────────────────────


@of_each_forward
def test_compiles_as_one_graph(make):
    torch.compiler.reset()
    stock, fused = twins(make)
    x = batch()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(fused, x, compiled), step(stock, x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("make", [chain, Residual])
def test_inductor_compiles_it_as_one_graph(make):
    torch.compiler.reset()
    stock, fused = twins(make)
    x = batch()
    torch.testing.assert_close(step(fused, x, torch.compile(fused, fullgraph=True)), step(stock, x))


@of_each_forward
def test_exports(make):
    stock, fused = (model.eval() for model in twins(make))
    x = batch()
    torch.testing.assert_close(torch.export.export(fused, (x,)).module()(x), stock(x))


TRANSFORMS = {
    "grad": lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
    "vmap": lambda model, x: torch.func.vmap(model)(torch.stack([x, 2 * x])),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    "functional_call": lambda model, x: torch.func.functional_call(
        model, {name: 2 * p for name, p in model.named_parameters()}, (x,)
    ),
    "gradients of an ensemble": lambda model, x: torch.func.vmap(
        torch.func.grad(lambda parameters: torch.func.functional_call(model, parameters, (x,)).square().sum())
    )({name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in model.named_parameters()}),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@of_each_forward
def test_function_transforms_give_what_they_give_for_stock(make, transform):
    stock, fused = (model.eval() for model in twins(make))
    x = batch()
    torch.testing.assert_close(transform(fused, x), transform(stock, x))


# ── Training ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@of_each_model
def test_autocast_with_a_scaler_trains_as_near_the_truth_as_stock(make):
    """Steps whose gradients overflow are skipped, and the scale halved, as in stock."""
    stock, fused = twins(make, torch.float32)
    truth, x = copy.deepcopy(stock).double(), batch(torch.float32, n=8)
    ends = []
    for model in (fused, stock, truth):
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.05), torch.amp.GradScaler("cpu", 2.0**10)
        before = copy.deepcopy(model.state_dict())
        for i in range(3):
            torch.manual_seed(i)
            with torch.autocast("cpu", torch.bfloat16, enabled=model is not truth):
                y = model(x.to(next(model.parameters()).dtype))
            loss = y.to(x.dtype if model is not truth else torch.float64).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss if i else loss * float("inf")).backward()
            scaler.step(optimizer)
            scaler.update()
            if i == 0:
                assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert scaler.get_scale() == 2.0**9
        ends.append([(after - before[name]).flatten() for name, after in model.named_parameters()])
    errors = Errors()
    errors.add(["weights"], *([torch.cat(end)] for end in ends))
    errors.check()


@pytest.mark.parametrize("use_reentrant", [True, False])
@of_each_model
def test_checkpointing_recomputes_the_same(make, use_reentrant):
    stock, fused = twins(make)
    x = batch()
    found, expected = (
        step(model, x, lambda x, model=model: checkpoint(model, x, use_reentrant=use_reentrant))
        for model in (fused, stock)
    )
    torch.testing.assert_close(found, expected)


def test_checkpointing_parts_of_a_chain_recomputes_the_same():
    stock, fused = twins(chain)
    x = batch()
    found, expected = (
        step(model, x, lambda x, model=model: checkpoint_sequential(model, 2, x, use_reentrant=False))
        for model in (fused, stock)
    )
    torch.testing.assert_close(found, expected)


@of_each_model
def test_an_optimizer_made_before_fusing_trains_the_fused_model(make):
    models = [twins(make)[0] for _ in range(2)]
    optimizers = [torch.optim.Adam(model.parameters(), 0.01) for model in models]
    fuse(models[1])
    for _ in range(2):
        x = batch()
        for model, optimizer in zip(models, optimizers, strict=True):
            model.zero_grad()
            step(model, x)
            optimizer.step()
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict())


def weights_init(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.1)


@of_each_model
def test_weights_are_initialised_after_fusing(make):
    stock, fused = twins(make)
    for model in (stock, fused):
        torch.manual_seed(3)
        model.apply(weights_init)
    torch.testing.assert_close(fused.state_dict(), stock.state_dict(), rtol=0, atol=0)
    assert_agree(stock, fused, batch(), steps=1)


CHANGES = {
    "norms in evaluation": lambda model: [norm.eval() for norm in norms_of(model)],
    "frozen norms": lambda model: [norm.eval().requires_grad_(False) for norm in norms_of(model)],
    "frozen convolutions": lambda model: [conv.requires_grad_(False) for conv in convs_of(model)],
    "eps and momentum": lambda model: [norm.__dict__.update(eps=0.3, momentum=0.7) for norm in norms_of(model)],
    "cumulative averages": lambda model: [setattr(norm, "momentum", None) for norm in norms_of(model)],
    "weight norm": lambda model: [parametrizations.weight_norm(conv) for conv in convs_of(model)],
    "spectral norm": lambda model: [parametrizations.spectral_norm(conv) for conv in convs_of(model)[:2]],
    "older weight norm": lambda model: [torch.nn.utils.weight_norm(conv) for conv in convs_of(model)],
    "older spectral norm": lambda model: [torch.nn.utils.spectral_norm(conv) for conv in convs_of(model)[:2]],
    "in evaluation": lambda model: model.eval(),
}


@pytest.mark.filterwarnings("ignore")  # one of the weight norms is deprecated
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@of_each_model
def test_what_is_changed_after_fusing_holds(make, change):
    stock, fused = twins(make)
    assert_agree(stock, fused, batch(), steps=1)
    for model in (stock, fused):
        torch.manual_seed(5)
        change(model)
    assert list(fused.state_dict()) == list(stock.state_dict())
    assert_agree(stock, fused, batch(), steps=2)


@of_each_model
def test_a_parametrization_that_is_removed_leaves_a_fused_layer(make, ran):
    _, fused = twins(make)
    fused(batch())
    before = ran[:]
    for conv in convs_of(fused):
        parametrizations.weight_norm(conv)
    for conv in convs_of(fused):
        parametrize.remove_parametrizations(conv, "weight")
    ran.clear()
    fused(batch())
    assert ran == before


# ── Two processes ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What two processes have found, of each the outcomes of the cases in `two_processes`."""
    return two_processes.run(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("case", two_processes.CASES)
@pytest.mark.parametrize("kind", MODELS)
def test_two_processes_compute_what_they_do_in_stock(kind, case, found):
    for outcomes in found:
        stock, fused, ran = outcomes[kind, case]
        if isinstance(stock, str):
            pytest.skip(f"stock cannot: {stock}")
        torch.testing.assert_close(fused, stock)
        fused_norms = sum("batch_norm_act" in name for name in ran)
        assert fused_norms == {"distributed": 2}.get(case, 1) * NORMS[kind]  # in each forward


@pytest.mark.parametrize("kind", MODELS)
def test_synchronised_norms_raise_stock_s_error_in_training_on_the_cpu(kind, found):
    stock, fused, _ = found[0][kind, "refused"]
    assert fused == stock and "SyncBatchNorm" in stock


def test_two_processes_train_a_critic_of_spectral_norms_as_in_stock(found):
    for stock, fused, _ in (outcomes["critic", "distributed"] for outcomes in found):
        torch.testing.assert_close(fused, stock)


@pytest.mark.parametrize("make", WITHOUT_CHANCE.values(), ids=WITHOUT_CHANCE)
def test_two_processes_compute_what_one_does_with_the_batches_of_both(make, found):
    stock, _ = twins(make)
    stock(two_processes.whole_batch()).square().mean().backward()
    expected = [*(p.grad for p in stock.parameters()), *stock.buffers()]
    kind = next(name for name, other in WITHOUT_CHANCE.items() if other is make)
    for outcomes in found:
        torch.testing.assert_close(outcomes[kind, "half"], expected)


# ── Copies and files ─────────────────────────────────────────────────────────────────────────────────────────────────


@of_each_model
def test_a_model_is_saved_and_loaded_whole(make, ran):
    stock, fused = twins(make)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(fused)
    assert_agree(stock, loaded, batch())
    assert ran
    assert type(unfuse(loaded)) is type(stock)


@of_each_model
def test_safetensors_load_both_ways(make, tmp_path):
    stock, fused = twins(make)
    path = tmp_path / "model.safetensors"
    step(fused, batch())
    for giver, taker in ((fused, stock), (stock, fused)):
        safetensors.torch.save_model(giver, path)
        for parameter in taker.parameters():
            nn.init.zeros_(parameter)
        safetensors.torch.load_model(taker, path)
        torch.testing.assert_close(taker.state_dict(), giver.state_dict(), rtol=0, atol=0)
    assert_agree(stock, fused, batch(), steps=1)


@of_each_model
def test_averages_of_weights_are_stock_s(make, ran):
    outputs = []
    for model in twins(make):
        copied = copy.deepcopy(model)
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        )
        ran.clear()
        for i in range(2):
            torch.manual_seed(i)
            with torch.no_grad():
                for parameter, average in zip(model.parameters(), copied.parameters(), strict=True):
                    parameter.add_(torch.randn_like(parameter))
                    average.lerp_(parameter, 0.5)
            averaged.update_parameters(model)
        torch.manual_seed(7)
        x = batch()
        outputs.append([average.eval()(x) for average in (copied, averaged, model)])
    assert ran
    torch.testing.assert_close(outputs[1], outputs[0])


@of_each_model
def test_replicas_of_data_parallel_compute_the_same(make, ran):
    stock, fused = twins(make)
    x = batch()
    found, expected = step(fused, x, replicate(fused)), step(stock, x, replicate(stock))
    torch.testing.assert_close(found, expected)
    assert ran


# ── Hooks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward"])
@of_each_forward
def test_hooks_on_any_module_see_what_they_would_in_stock(make, kind):
    """Hooks on one module after the other, so that all else stays fused."""
    stock, fused = twins(make)
    for model in (stock, fused):
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # stock refuses it behind a backward hook
    x = batch()
    for name, _ in stock.named_modules():
        sightings = []
        for model in (stock, fused):
            seen = []
            register = getattr(model.get_submodule(name), f"register_{kind}_hook")
            handle = register(lambda module, *tensors, seen=seen: seen.extend(_clones(tensors)))
            step(model, x)
            handle.remove()
            sightings.append(seen)
        assert sightings[0] or isinstance(stock.get_submodule(name), nn.ModuleList)
        torch.testing.assert_close(sightings[1], sightings[0], msg=f"{name}: {{}}".format)


def _clones(tensors):
    flat = [t for part in tensors for t in (part if isinstance(part, tuple) else (part,))]
    return [t.detach().clone() for t in flat if t is not None]


# ── Cost ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_of_30_million_parameters_is_fused_within_two_seconds():
    with torch.device("meta"):
        model = nn.Sequential(*[Wide() for _ in range(8)])
    assert sum(p.numel() for p in model.parameters()) > 30e6
    start = time.process_time()
    fuse(model)
    assert time.process_time() - start < 2
    assert isinstance(model, Fused) and all(row.fused for row in explain(model))


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            *[layer for _ in range(3) for layer in (nn.Conv2d(384, 384, 3, 1, 1), nn.BatchNorm2d(384), nn.ReLU())]
        )
        self.last = nn.BatchNorm2d(384)

    def forward(self, x):
        return x + self.last(self.body(x))


@of_each_model
def test_little_layers_are_called_and_no_operator_asked(make, ran, monkeypatch):
    """An operator that leaves small tensors to stock has checked its arguments for nothing."""
    monkeypatch.setattr(backend, "is_automatic", lambda: True)
    stock, fused = twins(make)
    assert_agree(stock, fused, batch(size=4))
    assert ran == []
