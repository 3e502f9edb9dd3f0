"""The forms that a convolution takes on the CPU, and which is fast where. All read and write channels_last.

- The vendor's: oneDNN, which is hard to beat where images are large.
- Patches: one matrix product over a matrix of patches, where the weight is large beside the image (oneDNN reorders all of
  it at every call) or the image has few channels.
- Few: sums for each of up to four channels that come out, in C++: an image, or a score, leaves the vendor's lanes empty.
- Winograd: of 3×3 taps at every pixel, and 4×4 at every other, with fewer products; C++.
- Tiles: C++ on the CPU's matrix unit (AMX). For float32 it is faster than float32 lanes can be, at the same precision.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastgan import backend
from fastgan.ops._kernels import tell_openmp
from fastgan.ops._tensors import DTYPES, address, dense, in_layout, is_channels_last

Form = Literal["vendor", "patches", "few", "tiles", "winograd"]
Result = Literal["positions", "image", "weight"]


class Geometry(NamedTuple):
    """Where a kernel meets an image. `conv2d` goes from the image to the positions, `conv_transpose2d` the other way."""

    dtype: torch.dtype
    image: tuple[int, int, int, int]  # (N, C, H, W)
    positions: tuple[int, int, int, int]  # (N, O, OH, OW)
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def patches(self) -> int:
        return self.positions[0] * self.positions[2] * self.positions[3]

    @property
    def patch(self) -> int:
        """Elements of one patch."""
        return self.kernel[0] * self.kernel[1] * self.image[1]

    @property
    def image_is_patch(self) -> bool:
        """Whether each image is one patch: a convolution to or from 1×1."""
        return self.positions[2:] == (1, 1) and self.kernel == self.image[2:] and not any(self.padding)

    def every_tap_meets(self) -> bool:
        """Whether every element of the kernel lies on the image at some position."""
        return all(
            any(
                0 <= position * self.stride[i] - self.padding[i] + tap * self.dilation[i] < self.image[2 + i]
                for position in range(self.positions[2 + i])
            )
            for i in range(2)
            for tap in range(self.kernel[i])
        )


def _kernel(compute: Callable) -> Callable:
    """On as many threads as torch; and without autocast, which would have the products of float32 matrices in 16 bits, which
    C++ takes for float32."""

    @functools.wraps(compute)
    def run(*args):
        tell_openmp()
        if not torch.is_autocast_enabled("cpu"):
            return compute(*args)
        with torch.autocast("cpu", enabled=False):
            return compute(*args)

    return run


@_kernel
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple) -> Tensor:
    """`fastgan::convolution`."""
    x = dense(x, channels_last=True)
    if not vendor_takes(x.dtype):
        return convolution(x.float(), weight.float(), None if bias is None else bias.float(), settings).to(x.dtype)
    geometry, form, is_turned = _plan(x.dtype, x.shape, weight.shape, *map(_hashable, settings))
    transposed = settings[3] and not is_turned
    if is_turned:
        weight = _turned(weight)
    if form == "few":
        return _positions_of_few(geometry, x, weight, bias)
    if form in ("tiles", "winograd"):
        compute = _convolution_by_tiles if form == "tiles" else _convolution_by_winograd
        y = compute(geometry, x, weight, bias, transposed)
        if y is not None:
            return y
    if form == "patches":
        y = _image_of(geometry, x, weight) if transposed else _positions_of(geometry, x, weight)
        return y if bias is None else y.add_(bias.view(-1, 1, 1))
    x = in_layout(x, channels_last=True)  # of one channel torch would give NCHW
    return dense(torch.convolution(x, weight, bias, *settings), channels_last=True)


@functools.cache
def vendor_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves these elements on this CPU. Where it does not, torch's own sums take twenty times as long as
    float32's: for bfloat16 without AVX-512, and for float16 without its instructions."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


class _Plan(NamedTuple):
    geometry: Geometry
    form: Form
    is_turned: bool  # of a convolution that goes the other way


def _plan(dtype: torch.dtype, x_shape: torch.Size, weight_shape: torch.Size, *settings: Any) -> _Plan:
    return _plan_for(backend.serving("cpu"), dtype, x_shape, weight_shape, *settings)


@functools.lru_cache(maxsize=4096)
def _plan_for(
    _serving: str, dtype: torch.dtype, x_shape: torch.Size, weight_shape: torch.Size, *settings: Any
) -> _Plan:
    size = output_shape(x_shape, weight_shape, *settings)
    transposed = settings[3]
    geometry = _geometry(dtype, x_shape, weight_shape, size, settings)
    form = choose_form(geometry, "image" if transposed else "positions")
    if transposed and form != "tiles" and _turns(weight_shape, settings):
        shape = (weight_shape[1], weight_shape[0], *weight_shape[2:])
        turned = _geometry(dtype, x_shape, shape, size, _turned_settings(weight_shape, settings, transposed=False))
        if choose_form(turned, "positions") == "few":
            return _Plan(turned, "few", True)
    return _Plan(geometry, form, False)


def _hashable(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, list) else setting


@_kernel
def weight_grad(grad_y: Tensor, x: Tensor, weight_shape: Sequence[int], settings: tuple) -> Tensor:
    """`fastgan::convolution_weight_grad`."""
    grad_y, x = dense(grad_y, channels_last=True), dense(x, channels_last=True)
    if not vendor_takes(x.dtype):
        return weight_grad(grad_y.float(), x.float(), weight_shape, settings).to(x.dtype)
    if _is_summed_turned(x.dtype, weight_shape, settings):
        outputs, inputs, *taps = weight_shape
        turned = _turned_settings(weight_shape, settings, transposed=False)
        return _turned(weight_grad(x, grad_y, (inputs, outputs, *taps), turned)).contiguous()
    image, positions = (grad_y, x) if settings[3] else (x, grad_y)
    weight = x.new_empty(weight_shape)
    geometry = _geometry(x.dtype, x.shape, weight.shape, grad_y.shape, settings)
    form = choose_form(geometry, "weight")
    if form == "tiles" and _weight_grad_by_tiles(geometry, positions, image, weight):
        return weight
    if form == "winograd" and _weight_grad_by_winograd(geometry, positions, image, weight):
        return weight
    if form == "patches":
        grad = _weight_grad_by_patches(geometry, positions, image)
        return grad.view(weight_shape[0], *geometry.kernel, weight_shape[1]).permute(0, 3, 1, 2).contiguous()
    # oneDNN leaves the 16-bit gradient of a tap that only ever meets padding unwritten; the float32 one it zeroes.
    wide = x.dtype.itemsize == 2 and not geometry.every_tap_meets()
    dtype = torch.float32 if wide else x.dtype
    mask = [False, True, False]
    grad = torch.ops.aten.convolution_backward(grad_y.to(dtype), x.to(dtype), weight, None, *settings, mask)[1]
    return grad.to(x.dtype).contiguous()


@_kernel
def backward(grad_y: Tensor, x: Tensor, weight: Tensor, settings: tuple) -> tuple[Tensor, Tensor]:
    """`fastgan::convolution_backward`."""
    grad_y, x = dense(grad_y, channels_last=True), dense(x, channels_last=True)
    if _backward_is_vendor_s(x.dtype, x.shape, grad_y.shape, weight.shape, *map(_hashable, settings)):
        grad_y, x = in_layout(grad_y, channels_last=True), in_layout(x, channels_last=True)
        mask = [True, True, False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(grad_y, x, weight, None, *settings, mask)
        return dense(grad_x, channels_last=True), grad_weight.contiguous()
    of_input = settings_of_input_grad(grad_y.shape, weight.shape, x.shape[2:], settings)
    return convolution(grad_y, weight, None, of_input), weight_grad(grad_y, x, weight.shape, settings)


def _backward_is_vendor_s(dtype: torch.dtype, *shapes_and_settings: Any) -> bool:
    return vendor_takes(dtype) and _plan_backward(backend.serving("cpu"), dtype, *shapes_and_settings)


@functools.lru_cache(maxsize=4096)
def _plan_backward(_serving: str, dtype: torch.dtype, *shapes_and_settings: Any) -> bool:
    """Whether the vendor's form is the one for both gradients."""
    x_shape, y_shape, weight_shape, settings = *shapes_and_settings[:3], shapes_and_settings[3:]
    geometry = _geometry(dtype, x_shape, weight_shape, y_shape, settings)
    return (
        forms_of_passes(dtype, x_shape, weight_shape, *settings)[1:] == ("vendor", "vendor")
        and not _is_summed_turned(dtype, weight_shape, settings)
        and (dtype.itemsize > 2 or geometry.every_tap_meets())  # see `weight_grad`
    )


def forms_of_passes(
    dtype: torch.dtype, x_shape: Sequence[int], weight_shape: Sequence[int], *settings: Any
) -> tuple[Form, Form, Form]:
    """Of a convolution, and of its gradients in x and the weight. One that leaves no output is the vendor's, to refuse."""
    size = output_shape(x_shape, weight_shape, *settings)
    if min(size) < 1:
        return "vendor", "vendor", "vendor"
    of_input = settings_of_input_grad(size, weight_shape, x_shape[2:], settings)
    return (
        _plan(dtype, torch.Size(x_shape), torch.Size(weight_shape), *settings).form,
        _plan(dtype, torch.Size(size), torch.Size(weight_shape), *of_input).form,
        choose_form(_geometry(dtype, x_shape, weight_shape, size, settings), "weight"),
    )


def settings_of_input_grad(
    grad_shape: Sequence[int], weight_shape: Sequence[int], input_size: Sequence[int], settings: tuple
) -> tuple:
    """Of the convolution that goes the other way."""
    stride, padding, dilation, transposed, _, groups = settings
    output_padding = (0, 0)
    if not transposed:
        output_padding = tuple(
            input_size[i]
            - ((grad_shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight_shape[2 + i] - 1) + 1)
            for i in range(2)
        )
    return stride, padding, dilation, not transposed, output_padding, groups


# A convolution at every pixel goes the other way just as well, its taps turned around: what it takes for the image is then
# what it gives.


def _turns(weight_shape: Sequence[int], settings: tuple) -> bool:
    stride, padding, dilation, _, _, groups = settings
    is_plain = groups == 1 and all(step == 1 for step in (*stride, *dilation))
    return is_plain and all(p < tap for p, tap in zip(padding, weight_shape[2:], strict=True))


def _is_summed_turned(dtype: torch.dtype, weight_shape: Sequence[int], settings: tuple) -> bool:
    """Whether the gradient of a weight to few channels is computed as of the convolution that goes the other way."""
    outputs, inputs, *taps = weight_shape
    is_few = outputs <= FEW_CHANNELS < inputs and max(taps) > 1 and dtype == torch.float32
    return is_few and not settings[3] and _turns(weight_shape, settings) and backend.serving("cpu") == "cpp"


def _turned(weight: Tensor) -> Tensor:
    return weight.flip(2, 3).transpose(0, 1)


def _turned_settings(weight_shape: Sequence[int], settings: tuple, transposed: bool) -> tuple:
    stride, padding, dilation, _, output_padding, groups = settings
    turned = tuple(tap - 1 - p for tap, p in zip(weight_shape[2:], padding, strict=True))
    return stride, turned, dilation, transposed, output_padding, groups


def output_shape(
    x_shape: Sequence[int], weight_shape: Sequence[int], stride, padding, dilation, transposed: bool, output_padding,
    groups: int,
) -> tuple[int, int, int, int]:  # fmt: skip
    reach = [dilation[i] * (weight_shape[2 + i] - 1) + 1 for i in range(2)]
    if transposed:
        h, w = ((x_shape[2 + i] - 1) * stride[i] - 2 * padding[i] + reach[i] + output_padding[i] for i in range(2))
        return x_shape[0], weight_shape[1] * groups, h, w
    h, w = ((x_shape[2 + i] + 2 * padding[i] - reach[i]) // stride[i] + 1 for i in range(2))
    return x_shape[0], weight_shape[0], h, w


def _geometry(
    dtype: torch.dtype, x_shape: Sequence[int], weight_shape: Sequence[int], size: Sequence[int], settings: tuple
) -> Geometry:
    stride, padding, dilation, transposed, _, groups = settings
    ends = (size, x_shape) if transposed else (x_shape, size)
    sizes = map(tuple, (*ends, weight_shape[2:], stride, padding, dilation))
    return Geometry._make([dtype, *sizes, groups])


# ── Choice ───────────────────────────────────────────────────────────────────────────────────────────────────────────
# The limits were found on a CPU with AMX, where oneDNN's float32 convolution is as fast as a float32 matrix product.

# Multiplications of a thread: in fewer of them an operator's call in Python is felt, or is all that is. (With AVX2 it is
# felt longer; but an image that is not in channels_last gains from being laid out anew.)
_SMALL, _SMALL_NARROW, _SMALL_FEW, _TINY = 1 << 25, 1 << 27, 1 << 22, 1 << 20


def stock_is_faster(x: Tensor, weight: Tensor, size: Sequence[int], settings: tuple) -> bool:
    """Whether the work is so little that nothing should stand before the vendor's form, where that is the fastest."""
    if torch.compiler.is_compiling() or not backend.is_automatic():
        return False
    c, h, w = weight.shape[1:]
    products = (x.numel() if settings[3] else math.prod(size)) * c * h * w
    if not vendor_takes(x.dtype):
        return products < _TINY
    threads = torch.get_num_threads()
    small = _SMALL if backend.has_wide_lanes() or not is_channels_last(x) else _SMALL_NARROW
    if min(weight.shape[:2]) <= FEW_CHANNELS:
        small = _SMALL_FEW
    if products >= small * threads or products < _TINY * threads:
        return products < _TINY * threads
    return _plan(x.dtype, x.shape, weight.shape, *settings).form in ("vendor", "few")


def stays_in_planes(dtype: torch.dtype, x_shape: torch.Size, weight_shape: torch.Size, *settings: Any) -> bool:
    """Whether an image in NCHW had better stay there for a convolution whose output is to be in NCHW: with AVX2, where
    oneDNN is as fast as in channels_last and no other form makes up for two changes of the layout."""
    if backend.has_wide_lanes() or backend.serving("cpu") != "cpp":
        return False
    return _plan(dtype, x_shape, weight_shape, *settings).form == "vendor"


def copies_weights(dtype: torch.dtype, forms: Sequence[Form]) -> bool:
    """Whether every form lays a weight, or its gradient, out anew. Stock's convolutions in NCHW do so faster, where float32
    lanes are wide and there is no matrix unit."""
    if dtype != torch.float32 or not backend.has_wide_lanes() or backend.serving("cpu") != "cpp":
        return False
    from fastgan import _C

    return not _C.has_matrix_unit() and {"vendor", "patches"}.issuperset(forms)


# Patches pay where the matrix of them has at most this many times the elements of the weight. Above, writing it costs more
# than oneDNN's reordering of the weight.
_PATCHES_PER_WEIGHT = {torch.float32: 3.0, torch.bfloat16: 6.0}
_PATCHES_PER_WEIGHT_GRAD = {torch.float32: 3.0, torch.bfloat16: 32.0}
# … where float32 lanes are wide and there is no matrix unit: oneDNN fills them better than MKL does on AMD's CPUs.
_PATCHES_PER_WEIGHT_WITHOUT_TILES = 0.5
_FEW_PRODUCTS = 1 << 27  # so little work that a product of two matrices does not outrun its patches
# Multiplications with one element that pay for its packing into tiles. With one tap nothing is read twice from the L2.
_PRODUCTS_PER_PACKED = {True: 128, False: 400}
_FEW_PATCHES = 256  # for a weight's gradient: a weight as large as the work is better summed by one product
_FILL = 0.75  # part of the tiles that has to be real
_PATCH_OF_PHASE = (
    192  # elements of a patch, on average over the phases of a transposed convolution: their sums are read back
)
FEW_CHANNELS = 4  # images for which the transposed convolution of oneDNN leaves most vector lanes empty


def choose_form(geometry: Geometry, result: Result) -> Form:
    """The fastest form for what is computed: the positions, the image, or the gradient of the weight."""
    if geometry.groups != 1 or 0 in (*geometry.image, *geometry.positions, *geometry.kernel):
        return "vendor"
    if geometry.image_is_patch:
        return "patches"
    return _fastest(geometry, result) if backend.serving("cpu") == "cpp" else "vendor"


@functools.lru_cache(maxsize=4096)
def _fastest(geometry: Geometry, result: Result) -> Form:
    from fastgan import _C

    if result == "positions" and _is_few(geometry):
        return "few"
    if _winograd_pays(geometry, result):
        return "winograd"
    if _tiles_pay(geometry, result):
        return "tiles"
    if result == "image" and geometry.image[1] <= FEW_CHANNELS and geometry.patch <= 3 * geometry.positions[1]:
        return "patches"
    if result != "weight" and math.prod(geometry.positions) * geometry.patch < _FEW_PRODUCTS:
        return "vendor"
    if result == "weight" and _vendor_sums_slowly(geometry):
        return "patches"
    limits = _PATCHES_PER_WEIGHT_GRAD if result == "weight" else _PATCHES_PER_WEIGHT
    limit = limits.get(geometry.dtype, limits[torch.float32])
    if geometry.dtype == torch.float32 and backend.has_wide_lanes() and not _C.has_matrix_unit():
        limit = _PATCHES_PER_WEIGHT_WITHOUT_TILES
    return "patches" if geometry.patches <= limit * geometry.positions[1] else "vendor"


def _is_few(geometry: Geometry) -> bool:
    few, many = geometry.positions[1], geometry.image[1]
    return few <= FEW_CHANNELS and many >= _LANES and geometry.dtype == torch.float32 and geometry.dilation[1] == 1


_LANES = 16  # of a vector, at most
_MANY_CHANNELS, _VERY_MANY_CHANNELS = 64, 256
_HEAVY_WEIGHT = 1 << 19  # elements: too many for oneDNN to sum in the cache
_LARGE_IMAGE, _PATCH_PER_CHANNEL = 24 * 24, 16


def _vendor_sums_slowly(geometry: Geometry) -> bool:
    """Whether a float32 weight's gradient is faster as a matrix product, and more exact: with AVX2, oneDNN's sums reach half
    the speed of its convolutions where the weight or the image is large, and products of matrices three quarters. Each
    element of a patch is written once, and is to be multiplied with many channels."""
    if backend.has_wide_lanes() or geometry.dtype != torch.float32:
        return False
    (_, outputs, *size), inputs = geometry.positions, geometry.image[1]
    if min(inputs, outputs) < _LANES:
        return False
    is_large = min(inputs, outputs) >= _MANY_CHANNELS and math.prod(size) >= _LARGE_IMAGE
    return (
        outputs >= _VERY_MANY_CHANNELS
        or outputs * geometry.patch >= _HEAVY_WEIGHT
        or (is_large and geometry.patch <= _PATCH_PER_CHANNEL * outputs)
    )


# Channels, and tiles of 2×2 positions, with which Winograd's form pays: below, the transforms cost more than the products
# that it saves. The matrix unit has products for less.
_WINOGRAD_CHANNELS, _WINOGRAD_CHANNELS_OF_WEIGHT, _WINOGRAD_TILES = 32, 64, 64
_WINOGRAD_CHANNELS_BESIDE_TILES, _WINOGRAD_TILES_BESIDE_TILES = 192, 256


def _winograd_pays(geometry: Geometry, result: Result) -> bool:
    from fastgan import _C

    if geometry.dtype != torch.float32 or geometry.dilation != (1, 1):
        return False
    (_, inputs, _, _), (n, outputs, *size) = geometry.image, geometry.positions
    channels, tiles = min(inputs, outputs), n * math.prod(-(-length // 2) for length in size)
    if (geometry.kernel, geometry.stride) == ((3, 3), (1, 1)):
        if max(geometry.padding) > 2:
            return False
        if _C.has_matrix_unit():
            is_large = channels >= _WINOGRAD_CHANNELS_BESIDE_TILES and tiles >= _WINOGRAD_TILES_BESIDE_TILES
            return is_large and result != "weight"
    elif (geometry.kernel, geometry.stride) != ((4, 4), (2, 2)) or max(geometry.padding) > 3 or _C.has_matrix_unit():
        return False
    least = _WINOGRAD_CHANNELS_OF_WEIGHT if result == "weight" else _WINOGRAD_CHANNELS
    return channels >= least and tiles >= _WINOGRAD_TILES


def _tiles_pay(geometry: Geometry, result: Result) -> bool:
    from fastgan import _C

    if not _C.has_matrix_unit() or geometry.dtype not in (torch.float32, torch.bfloat16):
        return False
    # Packing touches every element once, and must be little beside the multiplications with it.
    image, positions = math.prod(geometry.image), math.prod(geometry.positions)
    packed = {"positions": image, "image": positions, "weight": image + positions}[result]
    several_taps = geometry.kernel != (1, 1)
    if positions * geometry.patch < _PRODUCTS_PER_PACKED[several_taps] * packed:
        return False
    if _tiles(geometry).fill(result == "image", result == "weight") < _FILL:
        return False
    if result == "image" and geometry.patch < _PATCH_OF_PHASE * math.prod(geometry.stride):
        return False
    weight = geometry.positions[1] * geometry.patch
    short_lines = geometry.patches <= 64 * geometry.image[0]
    if result == "weight":
        if geometry.dtype == torch.bfloat16 and weight < (1 << 15 if short_lines else 1 << 17):
            return False
        return geometry.patches >= _FEW_PATCHES
    # oneDNN fills its own bfloat16 tiles with the positions of one line of an image: short lines leave them half empty.
    return geometry.dtype == torch.float32 or (short_lines and weight >= 1 << 18)


# ── Tiles ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _patches(geometry: Geometry):
    from fastgan import _C

    (n, c, h, w), (_, _, *positions) = geometry.image, geometry.positions
    spacing = (geometry.stride, geometry.padding, geometry.dilation)
    return _C.Patches(DTYPES[geometry.dtype], (n, h, w, c), positions, geometry.kernel, *spacing)


def _tiles(geometry: Geometry, contiguous: bool = True):
    """The convolution with a weight (O, C, kh, kw) that is contiguous, or else channels_last."""
    from fastgan import _C

    taps, c = math.prod(geometry.kernel), geometry.image[1]
    strides = (c * taps, taps, 1) if contiguous else (taps * c, 1, c)
    return _C.Convolution(_patches(geometry), geometry.positions[1], strides)


def _convolution_by_tiles(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor | None:
    """None where x or the weight holds float32 numbers that are no sums of bfloat16: infinities, NaN, only tiny ones."""
    from fastgan import _C

    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _new_image(x, geometry.image if transposed else geometry.positions)
    kernel = _C.positions_to_image if transposed else _C.image_to_positions
    addresses = (x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr())
    return y if kernel(_tiles(geometry, weight.is_contiguous()), *addresses) else None


def _weight_grad_by_tiles(geometry: Geometry, positions: Tensor, image: Tensor, grad_weight: Tensor) -> bool:
    from fastgan import _C

    return _C.weight_grad(_tiles(geometry), positions.data_ptr(), image.data_ptr(), grad_weight.data_ptr())


# ── Winograd ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _winograd(geometry: Geometry, contiguous: bool = True, turned: bool = False):
    """The convolution with a weight (O, C, kh, kw) that is contiguous, or else channels_last; or `turned`, of k3 s1, the one
    that goes the other way."""
    from fastgan import _C

    (n, c, h, w), (_, o, *size) = geometry.image, geometry.positions
    taps = math.prod(geometry.kernel)
    image, positions, padding = [h, w, c], [*size, o], geometry.padding
    of_o, of_c, of_tap = (c * taps, taps, 1) if contiguous else (taps * c, 1, c)
    if turned:
        image, positions, of_o, of_c = positions, image, of_c, of_o
        padding = (2 - padding[0], 2 - padding[1])
    return _C.Winograd(geometry.kernel[0], [n, *image], positions, padding, (of_o, of_c, of_tap), turned)


def _convolution_by_winograd(
    geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool
) -> Tensor | None:
    """None where the result is not finite: stock's is not finite in fewer places, or finite after all."""
    from fastgan import _C

    if not weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = _new_image(x, geometry.image if transposed else geometry.positions)
    if transposed and geometry.kernel == (4, 4):
        call = _winograd(geometry, weight.is_contiguous())
        finite = _C.winograd_positions_to_image(call, x.data_ptr(), weight.data_ptr(), y.data_ptr())
        return None if not finite else y if bias is None else y.add_(bias.view(-1, 1, 1))
    call = _winograd(geometry, weight.is_contiguous(), turned=transposed)
    addresses = (x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr())
    return y if _C.winograd_image_to_positions(call, *addresses) else None


def _weight_grad_by_winograd(geometry: Geometry, positions: Tensor, image: Tensor, grad_weight: Tensor) -> bool:
    """Whether the result is finite."""
    from fastgan import _C

    addresses = (positions.data_ptr(), image.data_ptr(), grad_weight.data_ptr())
    return _C.winograd_weight_grad(_winograd(geometry), *addresses)


# ── Patches ──────────────────────────────────────────────────────────────────────────────────────────────────────────
# A row for each position of the kernel, a column for each element under it: (N·OH·OW, kh·kw·C).

_PATCH_ELEMENTS = 1 << 21  # of a weight's gradient at a time: what malloc does not ask the system for at every call


def _positions_of(geometry: Geometry, image: Tensor, weight: Tensor) -> Tensor:
    y = _new_image(image, geometry.positions)
    torch.mm(_patches_of(geometry, image), _matrix_of_weight(weight).t(), out=_rows(y))
    return y


def _positions_of_few(geometry: Geometry, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from fastgan import _C

    y = _new_image(image, geometry.positions)
    matrix, bias = _matrix_of_weight(weight).contiguous(), None if bias is None else bias.contiguous()
    addresses = (matrix.data_ptr(), len(matrix), address(bias), y.data_ptr())
    _C.image_to_few(_patches(geometry), image.data_ptr(), *addresses)
    return y


def _image_of(geometry: Geometry, positions: Tensor, weight: Tensor) -> Tensor:
    """The image whose patches are positions · weight; where they overlap they add up."""
    image = _new_image(positions, geometry.image)
    left, right = _rows(positions), _matrix_of_weight(weight)
    if geometry.image_is_patch:
        torch.mm(left, right, out=image.permute(0, 2, 3, 1).view(geometry.patches, geometry.patch))
    else:
        from fastgan import _C

        patches = left @ right
        _C.patches_to_image(_patches(geometry), patches.data_ptr(), image.data_ptr())
    return image


def _patches_of(geometry: Geometry, image: Tensor) -> Tensor:
    if geometry.image_is_patch:
        return image.permute(0, 2, 3, 1).reshape(geometry.patches, geometry.patch)
    from fastgan import _C

    patches = image.new_empty(geometry.patches, geometry.patch)
    _C.image_to_patches(_patches(geometry), image.data_ptr(), patches.data_ptr())
    return patches


def _weight_grad_by_patches(geometry: Geometry, positions: Tensor, image: Tensor) -> Tensor:
    """(O, kh·kw·C)"""
    images = max(1, _PATCH_ELEMENTS * geometry.image[0] // max(geometry.patches * geometry.patch, 1))
    grad = None
    for some, of_image in zip(positions.split(images), image.split(images), strict=True):
        part = geometry._replace(image=(len(some), *geometry.image[1:]), positions=(len(some), *geometry.positions[1:]))
        left, right = _rows(some).t(), _patches_of(part, of_image)
        grad = left @ right if grad is None else grad.addmm_(left, right)
    assert grad is not None
    return grad


def _new_image(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W), channels_last -> (N·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _matrix_of_weight(weight: Tensor) -> Tensor:
    """(O, C, kh, kw) -> (O, kh·kw·C), the order of the columns of patches."""
    return dense(weight, channels_last=True).permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
