"""Which forwards have a graph, what they depend on, and why others have none."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fusing import Asserts, assert_agree, batch, twins
from torch import nn

from fastgan.fuse import FusedForward, fuse, rewrite
from fastgan.tracing import MOST_TRACES, Traces, Untraceable, trace

SLOPE = 0.2
CALLS: list[int] = []


def halved(x):
    return x / 2


class Block(nn.Module):
    """What the forwards below are of. The residual addition is what there is to fuse."""

    gain = 1.0

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, 1, 1), nn.BatchNorm2d(4))
        self.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Tanh()])
        self.named = nn.ModuleDict({"act": nn.Tanh()})
        self.scale, self.calls, self.options, self.skip = 0.5, 0, {"scale": 2}, None

    def forward(self, x):
        return x + self.body(x)

    def scaled(self, x):
        return x * self.scale * self.gain

    def counted(self, x):
        self.calls += 1
        return x


# ── What has a graph ─────────────────────────────────────────────────────────────────────────────────────────────────


class Decides(Block):
    def forward(self, x, flag=False, *, skip=None, times: int = 2):
        if self.training and not flag:
            x = x * times
        if skip is not None:
            x = x + skip
        return {"images": x + self.body(x), "times": times}


class Loops(Block):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.named["act"](x) + self.body(x)


class Calls(Block):
    def forward(self, x):
        return F.leaky_relu(halved(self.scaled(x)), SLOPE) + self.body(x)


class Draws(Block):
    def forward(self, x):
        return torch.randn_like(x) + F.dropout(x, 0.5, self.training) + self.body(x)


class InPlace(Block):
    def forward(self, x):
        x = x * 2
        same = x
        x += 1
        out = self.body(x)
        out += same
        return out


class Optional(Block):
    def forward(self, x):
        if self.skip is not None:
            x = self.skip(x)
        return x + self.body(x)


class Truthful(Block):
    def forward(self, x):
        if self.skip:
            x = self.skip(x)
        if self.body and self.layers[1]:
            x = self.layers[1](x)
        return x + self.body(x)


class Documented(Block):
    def forward(self, x):
        """A block.

        Args:
            x: the images.
        """
        return x + self.body(x)


class Numbered(Block):
    def __init__(self):
        super().__init__()
        for i in range(len(self.layers)):
            setattr(self, f"layer{i}", self.layers[i])

    def forward(self, x):
        for i in range(len(self.layers)):
            x = getattr(self, "layer" + str(i))(x)
        return x + self.body(x)


class Libraries(Block):
    def forward(self, x):
        return torch.nn.functional.softplus(nn.functional.relu(x)) + self.body(x)


class KeepsFunctions(Block):
    def __init__(self):
        super().__init__()
        self.before, self.after, self.scale = F.softplus, torch.tanh, np.float64(0.3)

    def forward(self, x):
        return self.scale * self.after(self.before(x)) + self.body(x)


class MakesLayers(Block):
    def forward(self, x):
        softmax = torch.nn.Softmax(dim=1)
        return softmax(nn.LeakyReLU(0.2)(x)) + self.body(x)


class TurnsBack(Block):
    """On a way that is not gone there may be what has no graph."""

    def forward(self, x, y=None):
        if self.scale > 1:
            print(CALLS, np.sqrt(self.scale))
            raise NotImplementedError(f"{type(x)}")
        y = torch.zeros(1) if y is not None and self.skip else x
        return shown(y) + self.body(x)


def shown(x, show=False):
    return x.numpy() if show else x


TRACED = [
    Loops, Calls, Draws, InPlace, Optional, Truthful, Documented, Numbered, Libraries, KeepsFunctions, Asserts,
    MakesLayers, TurnsBack,
]  # fmt: skip


@pytest.mark.parametrize("kind", TRACED)
def test_a_traced_forward_computes_the_same(kind):
    stock, fused = twins(kind)
    assert isinstance(fused, FusedForward)
    assert_agree(stock, fused, batch())


@pytest.mark.parametrize("change", [lambda model: setattr(model, "scale", 1.0), lambda _: None], ids=["self", "tensor"])
def test_an_assertion_that_does_not_hold_is_stock_s_own_error(change):
    messages = []
    for model in twins(Asserts):
        model(batch())  # by a graph, when fused
        change(model)
        with pytest.raises(AssertionError) as raised:
            model(batch()[:, :3])
        messages.append(str(raised.value))
    assert messages[1] == messages[0]


def test_each_way_to_give_arguments_runs_its_own_way_through_the_code():
    stock, fused = twins(Decides)
    x = batch()
    for training in (True, False):
        for args, kwargs in [
            ((x,), {}),
            ((x, True), {}),
            ((x,), {"skip": x}),
            ((x,), {"times": 3}),
            ((x,), {"times": 3.0}),
            ((x, 1), {"skip": torch.tensor(2.0)}),
        ]:
            outputs = [model.train(training)(*args, **kwargs) for model in (stock, fused)]
            torch.testing.assert_close(outputs[1], outputs[0])
            assert type(outputs[1]["times"]) is type(outputs[0]["times"])


@pytest.mark.parametrize(
    ("args", "kwargs"), [((1,), {"x": 1}), ((), {}), ((1,), {"unknown": 1}), ((1, 2, 3), {})], ids=str
)
def test_arguments_that_do_not_fit_are_python_s_own_error(args, kwargs):
    messages = []
    for model in twins(Decides):
        with pytest.raises(TypeError) as raised:
            model(*args, **kwargs)
        messages.append(str(raised.value))
    assert messages[1] == messages[0]


# ── What may change after tracing ────────────────────────────────────────────────────────────────────────────────────


def append(model):
    model.layers.append(nn.Hardtanh())


def remove(model):
    del model.layers[1]


def take_away(model):
    model.skip = None


def put_in(model):
    torch.manual_seed(1)
    model.skip = nn.Conv2d(4, 4, 1).double()


def set_parameter(model):
    model.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))


def extend_the_chain(model):
    model.body.append(nn.ReLU())


def override_the_chain(model):
    model.body.forward = lambda x: 2 * x


CHANGES = {
    "a number": (Calls, lambda model: setattr(model, "scale", 3)),
    "a number to a parameter": (Calls, set_parameter),
    "what was the class's": (Calls, lambda model: setattr(model, "gain", 3.0)),
    "a method": (Calls, lambda model: setattr(model, "scaled", lambda x: 5 * x)),
    "a layer more": (Loops, append),
    "a layer less": (Loops, remove),
    "a layer where there was None": (Optional, put_in),
    "None where there was a layer": (Optional, lambda model: (put_in(model), model(batch()), take_away(model))),
    "the end of a chain": (Block, extend_the_chain),
    "the forward of a chain": (Block, override_the_chain),
    "the mode": (Draws, lambda model: model.eval()),
    "a layer where None was asked for": (Truthful, put_in),
    "a layer of another number": (Numbered, lambda model: setattr(model, "layer1", nn.Hardtanh())),
    "a function": (KeepsFunctions, lambda model: setattr(model, "before", torch.sin)),
    "a number of numpy's": (KeepsFunctions, lambda model: setattr(model, "scale", np.float64(0.7))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_a_call_holds_for_the_next(name):
    kind, change = CHANGES[name]
    models = twins(kind)
    for model in models:
        torch.manual_seed(0)
        model(torch.ones(2, 4, 3, 3, dtype=torch.float64))
        torch.manual_seed(0)
        change(model)
    assert_agree(*models, batch())


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (None, "SLOPE", 0.7),
        (None, "halved", lambda x: x / 3),
        (Calls, "scaled", lambda self, x: x * 7),
        (Calls, "forward", lambda self, x: x * 9),
    ],
    ids=["global", "function", "method", "forward"],
)
def test_what_is_replaced_outside_of_the_module_holds_too(owner, name, value, monkeypatch):
    stock, fused = twins(Calls)
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))
    monkeypatch.setitem(globals(), name, value) if owner is None else monkeypatch.setattr(owner, name, value)
    torch.testing.assert_close(fused(x), stock(x))


def test_a_forward_of_torch_s_that_is_replaced_holds_for_layers_that_are_made(monkeypatch):
    stock, fused = twins(MakesLayers)
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))
    monkeypatch.setattr(nn.Softmax, "forward", lambda self, x: x * 3)
    torch.testing.assert_close(fused(x), stock(x))


def test_parametrized_and_reparametrized_weights_are_recomputed():
    for parametrize in (nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm):
        models = twins(Equalised)
        for model in models:
            model(batch())
            torch.manual_seed(1)
            parametrize(model, "weight")
        assert_agree(*models, batch())


class Equalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(4, 4, 3, 3)), 0.1

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain)


def test_a_class_whose_attributes_always_change_is_traced_so_many_times(monkeypatch):
    stock, fused = twins(Calls)
    x = batch()
    for scale in range(MOST_TRACES + 2):
        stock.scale = fused.scale = float(scale)
        torch.testing.assert_close(fused(x), stock(x))
    assert fused._traces.count == MOST_TRACES


def test_tracing_disturbs_no_other_thread():
    model = fuse(nn.Sequential(*[Block() for _ in range(3)])).eval()
    x, errors, done = batch(torch.float32), [], threading.Event()
    expected = model(x)

    def use():
        while not done.is_set() and not errors:
            try:
                torch.testing.assert_close(model(x), expected)
            except Exception as error:
                errors.append(error)

    users = [threading.Thread(target=use) for _ in range(2)]
    for user in users:
        user.start()
    for _ in range(50):
        trace(Loops(), Loops.forward, ("x",), {}, {})
    done.set()
    for user in users:
        user.join()
    assert not errors


# ── What has none ────────────────────────────────────────────────────────────────────────────────────────────────────


class Counts(Block):
    def forward(self, x):
        return self.counted(x) + self.body(x)


class ReadsADictionary(Block):
    def forward(self, x):
        return x * self.options["scale"] + self.body(x)


class TakesAny(Block):
    def forward(self, *xs, **options):
        return xs[0] + self.body(xs[0])


class LooksAtValues(Block):
    def forward(self, x):
        return x + self.body(x) if x.mean() > 0 else x


class ChangesTheGradMode(Block):
    def forward(self, x):
        with torch.no_grad():
            y = x * 2
        return y + self.body(x)


class AsksForTheGradMode(Block):
    def forward(self, x):
        return x * torch.is_grad_enabled() + self.body(x)


class LooksIntoALayer(Block):
    def forward(self, x):
        first = self.layers[0]
        return x * first.kernel_size[0] + self.body(x)


class ChangesTheMode(Block):
    def forward(self, x):
        me = self
        me.eval()
        return x + self.body(x)


class KeepsAList(Block):
    def forward(self, x, seen=[]):  # noqa: B006
        seen.append(1)
        return x + self.body(x)


class DrawsANumber(Block):
    def forward(self, x):
        return x * float(torch.randn(1)) + self.body(x)


class MakesATensor(Block):
    def forward(self, x):
        return x * torch.ones(1) + self.body(x)


class Decorated(Block):
    @torch.no_grad()
    def forward(self, x):
        return x + self.body(x)


class Prints(Block):
    def forward(self, x):
        print("called")
        return x + self.body(x)


class AppendsOutside(Block):
    def forward(self, x):
        CALLS.append(1)
        return x + self.body(x)


class CallsTheBase(Block):
    def forward(self, x):
        return super().forward(x) + self.body(x)


class HasAProperty(Block):
    @property
    def twice(self):
        return 2 * self.scale

    def forward(self, x):
        return x * self.twice + self.body(x)


class Tries(Block):
    def forward(self, x):
        try:
            return x + self.body(x)
        except RuntimeError:
            return x


class Compares(Block):
    def forward(self, x, y):
        return x + self.body(x) if x is y else x


class Sets(Block):
    def forward(self, x):
        x[:, 0] = 0
        return x + self.body(x)


class Overloaded(nn.Tanh):
    def __len__(self):
        return len(CALLS)


class AsksALayer(Block):
    def __init__(self):
        super().__init__()
        self.skip = Overloaded()

    def forward(self, x):
        return x + self.body(x) if self.skip else x


class ReadsTheText(Block):
    def forward(self, x):
        return x * float(str(self.body)) + self.body(x)


class GetsFromALayer(Block):
    def forward(self, x):
        return x * getattr(self.body, "gain") + self.body(x)  # noqa: B009


class UsesAnother(Block):
    def forward(self, x):
        return x * np.sqrt(2) + self.body(x)


REFUSED = {
    AsksALayer: "its forward looks into skip",
    ReadsTheText: "its forward uses str",
    GetsFromALayer: "its forward uses getattr",
    UsesAnother: "its forward uses np.sqrt",
    Counts: "its forward changes what is not its own",
    ReadsADictionary: "its forward reads options, a dict",
    TakesAny: "its forward takes any arguments",
    LooksAtValues: "the way through its forward depends on tensors",
    ChangesTheGradMode: "its forward has a with",
    AsksForTheGradMode: "its forward uses torch.is_grad_enabled",
    LooksIntoALayer: "its forward looks into layers.0",
    ChangesTheMode: "its forward uses eval of nn.Module",
    KeepsAList: "its forward or what that calls has defaults that can change",
    DrawsANumber: "its forward uses torch.randn",
    MakesATensor: "its forward uses torch.ones",
    Decorated: "its forward or what that calls is no plain function",
    Prints: "its forward uses print",
    AppendsOutside: "its forward uses CALLS.append",
    CallsTheBase: "its forward or what that calls is no plain function",
    HasAProperty: "its forward reads twice, a property",
    Tries: "its forward has a try",
    Compares: "its forward compares objects",
    Sets: "its forward changes what is not its own",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_forward_that_is_not_certain_to_do_the_same_again_is_left_alone(kind):
    assert Traces(kind, rewrite).survey(kind()) == ([], REFUSED[kind])
    assert type(fuse(kind())) is kind
    assert not CALLS


def tripled(self, x):
    return 3 * x


def test_a_class_made_of_a_fused_one_may_have_other_methods():
    stock, fused = twins(Calls)
    assert_agree(stock, fused, batch())
    for model in (stock, fused):
        model.__class__ = type("Triples", (type(model),), {"scaled": tripled})
    assert_agree(stock, fused, batch())


def test_tracing_changes_nothing():
    model = Block()
    before = copy.deepcopy(model.__dict__)
    with pytest.raises(Untraceable):
        trace(model, Counts.forward, ("x",), {}, {})
    assert model.calls == 0 and model.__dict__.keys() == before.keys()


def test_source_that_was_edited_since_it_was_loaded_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "edited_block.py"
    file.write_text("def forward(self, x):\n    self.calls = 1\n    return x\n")
    import edited_block

    file.write_text("def forward(self, x):\n    return x\n")
    with pytest.raises(Untraceable, match="edited"):
        trace(Block(), edited_block.forward, ("x",), {}, {})
