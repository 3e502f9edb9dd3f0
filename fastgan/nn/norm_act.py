"""`BatchNormAct2d`, and what every fused layer asks of an `nn.BatchNorm2d` and of an activation."""

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastgan import ops
from fastgan.ops._autograd import is_transformed
from fastgan.ops._norm import check_act
from fastgan.ops._tensors import accumulation_dtype, check_count, check_is_tensor, check_number
from fastgan.ops._types import Act, FixedAct

BatchNorm = nn.BatchNorm2d | nn.SyncBatchNorm


class Activation(NamedTuple):
    """An activation, as the arguments of the operators."""

    act: Act
    negative_slope: float
    prelu_weight: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module | None) -> "Activation":
        """What computes the same as `module`, where None is the identity."""
        if module is None:
            return cls("none", 0.0)
        if isinstance(module, nn.LeakyReLU):
            return cls("leaky_relu", module.negative_slope)
        if isinstance(module, nn.ReLU):
            return cls("relu", 0.0)
        if isinstance(module, nn.PReLU):
            return cls("prelu", 0.0, module.weight)
        raise TypeError(f"act must be nn.ReLU, nn.LeakyReLU, nn.PReLU or None, not {type(module).__name__}")

    @classmethod
    def named(cls, act: Act, negative_slope: float, acts: Any = FixedAct) -> "Activation":
        """`acts`: the type of setting that `act` is of."""
        check_act(act, acts)
        check_number("negative_slope", negative_slope)
        return cls(act, negative_slope)

    @property
    def fixed(self) -> dict[str, Any]:
        """What operators are given that take no parameters of an activation."""
        return {"act": self.act, "negative_slope": self.negative_slope}

    def __str__(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.act == "leaky_relu" else ""
        return f"act={self.act}{slope}"


# What a layer's forward is made of; code in use replaces them on an instance, to pad in circles, say.
_METHODS = ("forward", "_conv_forward", "_check_input_dim", "_output_padding")


def attachment(module: nn.Module) -> str | None:
    """What would also run when `module` is called, besides its class's forward: such a module must be called."""
    own = module.__dict__
    for name in _METHODS:
        if name in own:
            return f"a {name} of its own"
    if module._forward_pre_hooks:
        return "a forward pre-hook"
    if module._forward_hooks:
        return "a forward hook"
    if module._backward_hooks or module._backward_pre_hooks:
        return "a backward hook"
    return None


_has_global_hooks = getattr(torch_module, "_has_any_global_hook", bool)  # private to torch


def is_observed() -> bool:
    """Whether someone follows or transforms each layer: hooks on all modules, a tracer, `torch.func`, forward AD."""
    if torch.compiler.is_compiling():
        return False
    return _has_global_hooks() or torch.jit.is_tracing() or is_transformed()


class Statistics(NamedTuple):
    """What a batch norm normalises one batch by: the operators' arguments of the same names."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float | Tensor


def next_statistics(norm: BatchNorm) -> Statistics:
    """Begin a forward pass as `nn.BatchNorm2d.forward` does: in training a tracked batch is counted.

    With `momentum=None` the running statistics are the plain mean over the batches so far, which is a momentum of
    1 / num_batches_tracked. It stays a tensor, so that nobody waits for the device.
    """
    tracks = norm.training and norm.track_running_stats
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    if tracks and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None and norm.running_mean is not None:
            dtype = norm.running_mean.dtype
            momentum = norm.num_batches_tracked.to(accumulation_dtype(dtype)).reciprocal().to(dtype)
    uses_running = tracks or not norm.training
    return Statistics(
        norm.running_mean if uses_running else None,
        norm.running_var if uses_running else None,
        norm.training or (norm.running_mean is None and norm.running_var is None),
        momentum,
    )


def is_distributed() -> bool:
    """Whether processes have been told of each other."""
    return dist.is_available() and dist.is_initialized()


def waits_for_others(norm: BatchNorm) -> TypeGuard[nn.SyncBatchNorm]:
    """Whether a norm's next forward pass is about the batches of several processes."""
    is_synchronised = isinstance(norm, nn.SyncBatchNorm) and norm.training and is_distributed()
    return is_synchronised and dist.get_world_size(_process_group(norm)) > 1


def _process_group(norm: Any) -> "dist.ProcessGroup | None":
    return norm.process_group


def batch_norm_act(x: Tensor, norm: BatchNorm, activation: Activation, residual: Tensor | None = None) -> Tensor:
    """act(norm(x) + residual) by the operator, with all that `norm` does in a forward pass."""
    running_mean, running_var, training, momentum = next_statistics(norm)
    if waits_for_others(norm):
        return ops.sync_batch_norm_act(
            x, running_mean, running_var, norm.weight, norm.bias, momentum, norm.eps,
            process_group=_process_group(norm), **activation._asdict(), residual=residual,
        )  # fmt: skip
    return ops.batch_norm_act(
        x, running_mean, running_var, norm.weight, norm.bias, training, momentum, norm.eps,
        **activation._asdict(), residual=residual,
    )  # fmt: skip


def new_prelu_weight(act: Act, count: int, init: float, like: Tensor | None) -> nn.Parameter | None:
    """What a layer has for `prelu_weight`, on the device and in the dtype of `like`."""
    if act != "prelu":
        return None
    count = check_count("num_parameters", count)
    check_number("init", init)
    like = torch.empty(0) if like is None else like
    return nn.Parameter(torch.full((count,), init, device=like.device, dtype=like.dtype))


class BatchNormAct2d(nn.BatchNorm2d):
    """y = act(batch_norm(x) + residual), by `fastgan.ops.batch_norm_act`.

    Takes the arguments of `nn.BatchNorm2d`, and by keyword:

    Args:
        act: "none", "relu", "leaky_relu" or "prelu".
        negative_slope: of "leaky_relu".
        num_parameters, init: of "prelu", as in `nn.PReLU`: 1 or the number of channels, and what they begin as. They are the
            parameter `prelu_weight`, which is None otherwise.

    All else of parameters, buffers, state_dict and what training and evaluation do with them is `nn.BatchNorm2d`'s.
    `nn.SyncBatchNorm.convert_sync_batchnorm` replaces this layer by a norm without activation: use it on plain layers,
    before or after `fastgan.fuse`.

    Raises:
        ValueError: `act` is unknown, x has not 4 dimensions, or what `fastgan.ops.batch_norm_act` raises.
    """

    def __init__(
        self,
        *args: Any,
        act: Act = "relu",
        negative_slope: float = 0.01,
        num_parameters: int = 1,
        init: float = 0.25,
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.activation = Activation.named(act, negative_slope, Act)
        self.prelu_weight = new_prelu_weight(act, num_parameters, init, self.weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        check_is_tensor("x", x)
        self._check_input_dim(x)
        return batch_norm_act(x, self, self.activation._replace(prelu_weight=self.prelu_weight), residual)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.activation}"
