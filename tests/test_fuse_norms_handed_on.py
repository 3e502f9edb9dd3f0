"""Chains in which a layer leaves its batch norm to the next one's convolution, as on CUDA where that is faster."""

import pytest
import torch
from fusing import assert_agree, batch, twins
from needs import needs_cpp
from torch import nn

from fastgan import chains
from fastgan.ops import conv_norm_act
from fastgan.ops._kernels import KERNELS
from fastgan.ops._tensors import in_layout

pytestmark = needs_cpp

CHAINS = {
    "ConvT, BN, ReLU, ConvT, BN": lambda: [
        nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 5, 4, 2, 1), nn.BatchNorm2d(5),
    ],
    "three, and a last one alone": lambda: [
        nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, bias=False), nn.BatchNorm2d(6), nn.LeakyReLU(0.2),
        nn.Conv2d(6, 5, 4, 2, 1), nn.BatchNorm2d(5, affine=False), nn.PReLU(),
        nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4, 0.8, momentum=None), nn.ReLU(),
        nn.Conv2d(4, 3, 3), nn.Tanh(),
    ],
    "no activation, no running statistics": lambda: [
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
    ],
    "a convolution that pads by itself": lambda: [
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(5), nn.ReLU(),
    ],
}  # fmt: skip
TAKEN_IN = {  # of as many batch norms behind others
    "ConvT, BN, ReLU, ConvT, BN": 1, "three, and a last one alone": 2, "no activation, no running statistics": 1,
    "a convolution that pads by itself": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def taken_in(monkeypatch):
    """Every norm is left to the next convolution that can take it. The names of those that were, in backward as well."""
    names = []
    monkeypatch.setattr(chains, "_loads_by_kernels", lambda x: True)
    monkeypatch.setattr(
        conv_norm_act, "_fastest_form", lambda _, before, *__: conv_norm_act._Form("any", before is not None)
    )
    for name in ("convolution_behind_norm", "convolution_weight_grad_behind_norm"):
        definition = getattr(conv_norm_act, f"_{name.removeprefix('convolution_')}_by_definition")
        noting = lambda *args, name=name, definition=definition: (names.append(name), definition(*args))[1]  # noqa: E731
        monkeypatch.setitem(KERNELS[name], "cpu", noting)
    return names


@pytest.mark.parametrize("layers", CHAINS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_outputs_both_gradients_and_statistics_are_the_chain_s(layers, channels_last, taken_in):
    stock, fused = twins(lambda: nn.Sequential(*CHAINS[layers]()))
    x = in_layout(batch(), channels_last)
    assert_agree(stock, fused, x)
    assert taken_in.count("convolution_behind_norm") == 4 * TAKEN_IN[layers], "two forwards for each of two batches"


def test_a_first_gradient_recomputes_what_it_needs_as_it_loads(taken_in):
    stock, fused = twins(lambda: nn.Sequential(*CHAINS["three, and a last one alone"]()))
    x = batch()
    for model in (stock, fused):
        model(x).square().sum().backward()
    for (name, expected), found in zip(stock.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-7, atol=1e-9, msg=f"{name}: {{}}".format)
    assert taken_in.count("convolution_weight_grad_behind_norm") == 2


def test_second_derivatives_are_exact_with_respect_to_everything():
    _, fused = twins(lambda: nn.Sequential(*CHAINS["ConvT, BN, ReLU, ConvT, BN"]()))
    leaves = [batch(n=2, size=2).requires_grad_(), *fused.parameters()]
    names = [name for name, _ in fused.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(fused, dict(zip(names, parameters, strict=True)), x)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_the_normalised_tensor_is_not_kept_for_backward(taken_in):
    """What is: the input of the chain, and what each convolution gave."""
    _, fused = twins(lambda: nn.Sequential(*CHAINS["ConvT, BN, ReLU, ConvT, BN"]()))
    kept = set()

    def pack(tensor):
        if tensor.dim() == 4 and not isinstance(tensor, nn.Parameter):
            kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = fused(in_layout(batch(), True))
    assert len(kept - {p.untyped_storage().data_ptr() for p in fused.parameters()}) == 3
    y.sum().backward()


@pytest.mark.parametrize("refusal", ["a hook on the norm", "a hook on the next convolution", "evaluation"])
def test_who_looks_between_the_layers_sees_what_stock_shows(refusal, taken_in):
    stock, fused = twins(lambda: nn.Sequential(*CHAINS["ConvT, BN, ReLU, ConvT, BN"]()))
    seen = []
    for model in (stock, fused):
        if refusal == "evaluation":
            model.eval()
        elif refusal == "a hook on the norm":
            model[1].register_forward_hook(lambda _, __, y: seen.append(y))
        else:
            model[3].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = batch()
    torch.testing.assert_close(fused(x), stock(x))
    assert not taken_in
    if seen:
        torch.testing.assert_close(seen[0], seen[1])


def test_a_block_s_last_norm_adds_the_residual_itself(taken_in):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(4, 6, 3, padding=1),
                nn.BatchNorm2d(6),
                nn.ReLU(),
                nn.Conv2d(6, 4, 3, padding=1),
                nn.BatchNorm2d(4),
            )

        def forward(self, x):
            return x + self.body(x)

    assert_agree(*twins(Block), batch())
