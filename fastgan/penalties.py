"""Gradient penalties of any critic, by lean double backward."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastgan.lean import lean_double_backward
from fastgan.ops._tensors import accumulation_dtype, check_flag, check_input, check_is_tensor, check_number
from fastgan.ops.penalty import sample_norms, sample_squares

Critic = Callable[..., Any]


def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    *args: Any,
    weight: float = 10.0,
    center: float = 1.0,
    one_sided: bool = False,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    **kwargs: Any,
) -> Tensor:
    """weight · E (‖∇D(x̂)‖ − center)², x̂ = real + t · (fake − real), t uniform in [0, 1) for each sample: WGAN-GP (Gulrajani
    et al. 2017, equation 3).

    Args:
        critic: D, any callable: a module, fused, spectrally normalised, in DistributedDataParallel, under autocast; what
            torch.compile has compiled in it runs eagerly, as few backends have a double backward. It is called once, as
            critic(x̂, \\*args, \\*\\*kwargs), in whatever mode it is in, and is not modified. Of several outputs (a tuple or
            list) the first counts; the gradient is that of the sum of all its elements. To choose another, pass a function
            that does.
        real, fake: (N, \\*), of one floating-point dtype. Constants: the penalty trains the critic alone.
        args, kwargs: further arguments of the critic: classes, say.
        one_sided: only norms above `center` count (WGAN-LP, Petzka et al. 2018).
        generator: draws t.
        create_graph: without it the penalty is a number to look at, which cannot be differentiated.

    The norm is that of each sample over all its other axes, with 1e-12 added in the root, so that a critic that does not
    depend on some sample has a finite gradient. The critic runs inside `lean_double_backward`, which says what that does;
    parameters get gradients where stock autograd gives them some, zeros included. Returns a scalar, float32 (float64 for
    float64).

    Raises:
        TypeError: real or fake is no floating-point tensor, the critic does not return one, or a setting is of another kind.
        ValueError: real and fake differ in shape, dtype or device; the critic's output does not depend on its input; or
            gradients are switched off, by `torch.no_grad` for instance.
    """
    _check_images("real", real)
    _check_images("fake", fake)
    switches = {"one_sided": one_sided, "create_graph": create_graph, "generator": generator}
    _check_settings(real.device, weight=weight, center=center, **switches)
    for name in ("shape", "dtype", "device"):
        if getattr(real, name) != getattr(fake, name):
            raise ValueError(f"fake must have real's {name} {getattr(real, name)}, not {getattr(fake, name)}")
    between = torch.lerp(real.detach(), fake.detach(), _uniform(real, generator))
    norms = sample_norms(_input_gradient(critic, between, args, kwargs, create_graph))
    return weight * _distance(norms, center, one_sided)


def dragan_penalty(
    critic: Critic,
    real: Tensor,
    *args: Any,
    weight: float = 10.0,
    center: float = 1.0,
    one_sided: bool = False,
    spread: float = 0.5,
    generator: torch.Generator | None = None,
    create_graph: bool = True,
    **kwargs: Any,
) -> Tensor:
    """weight · E (‖∇D(x̂)‖ − center)² around the data: DRAGAN (Kodali et al. 2017).

    x̂ = real + t · spread · σ · u, with σ the standard deviation of all elements of `real`, u uniform in [0, 1) for each
    element and t for each sample, as in its authors' code. All else is as in `gradient_penalty`.
    """
    _check_images("real", real)
    switches = {"one_sided": one_sided, "create_graph": create_graph, "generator": generator}
    _check_settings(real.device, weight=weight, center=center, spread=spread, **switches)
    real = real.detach()
    noise = torch.rand(real.shape, generator=generator, dtype=real.dtype, device=real.device)
    around = torch.addcmul(real, noise, spread * real.std(correction=0) * _uniform(real, generator))
    norms = sample_norms(_input_gradient(critic, around, args, kwargs, create_graph))
    return weight * _distance(norms, center, one_sided)


def r1_penalty(
    critic: Critic, real: Tensor, *args: Any, gamma: float = 10.0, create_graph: bool = True, **kwargs: Any
) -> Tensor:
    """gamma/2 · E ‖∇D(real)‖²: R1 (Mescheder et al. 2018). All else is as in `gradient_penalty`."""
    _check_images("real", real)
    _check_settings(real.device, gamma=gamma, create_graph=create_graph)
    gradient = _input_gradient(critic, real.detach(), args, kwargs, create_graph)
    return gamma / 2 * sample_squares(gradient).mean()


def r2_penalty(
    critic: Critic, fake: Tensor, *args: Any, gamma: float = 10.0, create_graph: bool = True, **kwargs: Any
) -> Tensor:
    """gamma/2 · E ‖∇D(fake)‖²: R2 (Mescheder et al. 2018). All else is as in `gradient_penalty`."""
    _check_images("fake", fake)
    _check_settings(fake.device, gamma=gamma, create_graph=create_graph)
    gradient = _input_gradient(critic, fake.detach(), args, kwargs, create_graph)
    return gamma / 2 * sample_squares(gradient).mean()


def path_length_penalty(
    generator_output: Tensor,
    latents: Tensor,
    mean: Tensor,
    *,
    weight: float = 2.0,
    decay: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """weight · E (‖Jᵀy‖ − a)², J = ∂generator_output/∂latents, y normal: path length regularisation of StyleGAN2 (Karras
    et al. 2020, equation 4).

    Args:
        generator_output: images (N, C, H, W) that were computed from `latents`: inside `lean_double_backward`, for speed.
            y has the standard deviation 1/√(H·W).
        latents: (N, D), or (N, L, D) where each of L layers has its own: then the square under the root is averaged over L.
        mean: a, a tensor of one number, 0 at the start. It moves towards the mean length of the batch by `decay` in
            place, before the penalty is taken.
        generator: draws y.

    Returns a scalar.

    Raises:
        TypeError: a tensor is not floating point, or a setting is of another kind.
        ValueError: shapes that do not fit; generator_output does not depend on latents; or gradients are switched off.
    """
    _check_gradients_are_on()
    _check_images("generator_output", generator_output)
    _check_images("latents", latents)
    _check_settings(latents.device, weight=weight, decay=decay, generator=generator)
    check_input(mean, "mean")
    if generator_output.dim() != 4:
        raise ValueError(f"generator_output must have shape (N, C, H, W), not {tuple(generator_output.shape)}")
    if latents.dim() not in (2, 3) or latents.shape[0] != generator_output.shape[0]:
        n = generator_output.shape[0]
        raise ValueError(f"latents must have shape ({n}, D) or ({n}, L, D), not {tuple(latents.shape)}")
    if mean.numel() != 1:
        raise ValueError(f"mean must be one number, not of shape {tuple(mean.shape)}")
    if mean.device != latents.device:
        raise ValueError(f"mean is on {mean.device}, latents on {latents.device}")
    shape, dtype, device = generator_output.shape, generator_output.dtype, generator_output.device
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=device) / (shape[2] * shape[3]) ** 0.5
    gradient = _gradient(generator_output, latents, noise, True, "generator_output", "latents")
    layers = latents.shape[1] if latents.dim() == 3 else 1
    lengths = (sample_squares(gradient) / layers + 1e-12).sqrt()
    moved = mean.detach().to(lengths.dtype, copy=True).reshape(()).lerp(lengths.mean(), decay)
    with torch.no_grad():
        mean.copy_(moved.reshape(mean.shape))
    return weight * (lengths - moved).square().mean()


# ── Their parts ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _input_gradient(critic: Critic, x: Tensor, args: tuple, kwargs: dict, create_graph: bool) -> Tensor:
    """The gradient of the critic's output in its input, which must not require gradients yet."""
    if not callable(critic):
        raise TypeError(f"critic must be callable, not {type(critic).__name__}")
    _check_gradients_are_on()
    x = x.requires_grad_()
    with lean_double_backward(), _without_compiled_code():
        output = critic(x, *args, **kwargs)
    score = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(score, Tensor) or not score.is_floating_point():
        found = score.dtype if isinstance(score, Tensor) else type(score).__name__
        raise TypeError(f"critic must return a floating-point tensor, or several in a tuple, not {found}")
    return _gradient(score, x, torch.ones_like(score), create_graph, "critic's output", "its input")


def _without_compiled_code() -> AbstractContextManager:
    """Nothing is compiled before torch has imported its compiler, which takes seconds."""
    if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _gradient(y: Tensor, x: Tensor, grad_y: Tensor, create_graph: bool, name_y: str, name_x: str) -> Tensor:
    gradient = None
    # Under autocast the forward has cast what it casts; its gradient must not be cast once more.
    with _without_autocast(y.device.type):
        if y.requires_grad and x.requires_grad:
            (gradient,) = torch.autograd.grad(y, x, grad_y, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name_y} does not depend on {name_x}: there is no gradient to penalise")
    return gradient


def _without_autocast(device_type: str) -> AbstractContextManager:
    """There is none to switch off for meta tensors, say."""
    if device_type == "meta":
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _distance(norms: Tensor, center: float, one_sided: bool) -> Tensor:
    distance = norms - center
    return (distance.clamp(min=0) if one_sided else distance).square().mean()


def _uniform(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A number for each sample of x, of as many axes as x."""
    shape = (x.shape[0], *[1] * (x.dim() - 1))
    numbers = torch.rand(shape, generator=generator, dtype=accumulation_dtype(x.dtype), device=x.device)
    return numbers.to(x.dtype)


def _check_settings(device: torch.device, **given: Any) -> None:
    """Raise of a setting that is of another kind. Numbers may be tensors of one: a schedule on the device, say, or a scalar
    on the CPU."""
    for name, value in given.items():
        if name == "generator":
            if not isinstance(value, torch.Generator | None):
                raise TypeError(f"generator must be a torch.Generator, not {type(value).__name__}")
        elif name in ("one_sided", "create_graph"):
            check_flag(name, value)
        elif isinstance(value, bool):
            raise TypeError(f"{name} must be a number, not {value}")
        elif isinstance(value, Tensor):
            check_is_tensor(name, value)
            if value.is_complex():
                raise TypeError(f"{name} must be a real number, not {value.dtype}")
            if value.numel() != 1:
                raise ValueError(f"{name} must be one number, not a tensor of shape {tuple(value.shape)}")
            if value.device != device and (value.dim() > 0 or value.device.type != "cpu"):
                raise ValueError(f"{name} is on {value.device}, the images on {device}")
        else:
            check_number(name, value, "a number, or a tensor of one")


def _check_images(name: str, images: Tensor) -> None:
    check_input(images, name)
    if images.dim() < 2:
        raise ValueError(f"{name} must have shape (N, *), not {tuple(images.shape)}")


def _check_gradients_are_on() -> None:
    if not torch.is_grad_enabled():
        raise ValueError(
            "a gradient penalty needs gradients, which torch.no_grad or inference_mode has switched off here"
        )
