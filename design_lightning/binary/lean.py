"""Float modules around binary layers that keep less for the backward pass than torch's own. What they compute is the same.

    BatchNorm2d   behind a binary convolution it reads whole numbers times a factor per channel: they are kept as int16;
                  elsewhere its backward pass goes through the channels in slices: on a CPU torch's makes its result twice
    MaxPool2d     a byte tells which pixel of a window was the largest; torch keeps the input, and eight bytes
    Pointwise     a strided 1x1 convolution reads one pixel of stride x stride: those are kept

`make_lean_` makes them of torch's own, in place, and `make_plain_` takes that back. Where nothing is recorded, a compiler is at
work, or somebody else decides what is kept (gradient checkpointing), they are torch's own.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from design_lightning.binary._indicator import is_eager_on_cpu
from design_lightning.binary.elementwise import PIECE, pieces
from design_lightning.binary.functional import records
from design_lightning.binary.keeping import Keeping, floats_needed, refuse_double_backward

_MOST = 32_767
"""What an int16 holds."""


def mark_counts(x: Tensor, scale: Tensor | None, fan_in: int) -> None:
    """Notes on a tensor that it holds whole numbers, of `fan_in` or less in size, times `scale` per channel (axis 1)."""
    if fan_in <= _MOST and x.dtype == torch.float32 and x.requires_grad and not torch.compiler.is_compiling():
        x._counts_of = (x._version, scale)  # type: ignore[attr-defined]


class BatchNorm2d(nn.BatchNorm2d, Keeping):
    """torch's, which keeps its input as int16 where that holds whole numbers times a factor; see the module's text."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if self.keeps == "floats" or not _decides(input, self.weight, self.bias):
            return super().forward(input)
        version, scale = getattr(input, "_counts_of", (None, None))
        holds_counts = version is not None and version == input._version
        if not holds_counts:
            return self._forward_of_floats(input)

        place, shape = input.data_ptr(), input.shape  # the hooks outlive the forward: they must not hold the input

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() != place or tensor.shape != shape:
                return tensor
            return _counts(tensor, scale), scale

        def unpack(kept: Any) -> Tensor:
            return kept if isinstance(kept, Tensor) else _floats(*kept)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return super().forward(input)

    def _forward_of_floats(self, input: Tensor) -> Tensor:
        if not self.training or not _goes_in_slices(input):
            return super().forward(input)
        y: Tensor = _BatchNorm.apply(input, self.weight, self.bias, self._moving_statistics(), self.eps)
        return y

    def _moving_statistics(self) -> tuple[Tensor | None, Tensor | None, float]:
        """The running mean and variance, which a forward in training moves, and by what share."""
        if not self.track_running_stats:
            return None, None, 0.0
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        return self.running_mean, self.running_var, share


class _BatchNorm(torch.autograd.Function):
    """Of the statistics of the batch: float32 planes on a CPU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        moving: tuple[Tensor | None, Tensor | None, float],
        eps: float,
    ) -> Tensor:
        y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, moving[0], moving[1], True, moving[2], eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, inverse_std)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        x, weight, mean, inverse_std = ctx.saved_tensors
        to_x, to_weight, to_bias = torch.empty_like(x), torch.empty_like(mean), torch.empty_like(mean)
        for some in _slices(x):
            to_x[:, some], to_weight[some], to_bias[some] = torch.ops.aten.native_batch_norm_backward(
                *(gradient[:, some].contiguous(), x[:, some].contiguous(), None if weight is None else weight[some]),
                *(None, None, mean[some], inverse_std[some], True, ctx.eps, [True, True, True]),
            )
        needs = ctx.needs_input_grad
        return to_x, to_weight if needs[1] else None, to_bias if needs[2] else None, None, None


def _goes_in_slices(x: Tensor) -> bool:
    return (
        is_eager_on_cpu(x) and x.dtype == torch.float32 and x.dim() == 4 and x.is_contiguous() and len(_slices(x)) > 1
    )


def _slices(x: Tensor) -> list[slice]:
    """Parts of the channels, whose numbers stay in a CPU's cache; each thread has a channel to work on."""
    channels = x.shape[1]
    some = max(torch.get_num_threads(), PIECE * channels // max(x.numel(), 1))
    return [slice(start, start + some) for start in range(0, channels, some)]


def _counts(x: Tensor, scale: Tensor | None) -> Tensor:
    counts = torch.empty_like(x, dtype=torch.int16)
    # A channel whose scale is 0 holds nothing else.
    factor = None if scale is None else (1 / scale).nan_to_num(0, 0, 0).view(-1, 1, 1)
    for rows in _pieces(x):
        counts[rows] = x[rows] if factor is None else (x[rows] * factor).round_()
    return counts


def _floats(counts: Tensor, scale: Tensor | None) -> Tensor:
    x = torch.empty_like(counts, dtype=torch.float32)
    factor = None if scale is None else scale.view(-1, 1, 1)
    for rows in _pieces(counts):
        x[rows] = counts[rows]
        if factor is not None:
            x[rows] *= factor
    return x


def _pieces(x: Tensor) -> Iterable[slice]:
    return pieces(x) if is_eager_on_cpu(x) else [slice(None)]


class MaxPool2d(nn.MaxPool2d, Keeping):
    """torch's, which keeps where in its window the largest pixel was; see the module's text."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if self.keeps == "floats" or self.return_indices or input.dim() != 4 or not _decides(input):
            return super().forward(input)
        stride = self.kernel_size if self.stride is None else self.stride
        pairs = [_pair(value) for value in (self.kernel_size, stride, self.padding, self.dilation)]
        y: Tensor = _MaxPool.apply(input, *pairs, self.ceil_mode)
        return y


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Tensor:
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        ctx.settings, ctx.shape = (kernel, stride, padding, dilation, ceil), x.shape
        ctx.first = _first_of_windows(y, x.shape[-1], stride, padding)
        last = (kernel[0] - 1) * dilation[0] * x.shape[-1] + (kernel[1] - 1) * dilation[1]
        dtype = torch.uint8 if last < 256 else torch.int16 if last <= _MOST else torch.int32
        offsets = torch.empty_like(indices, dtype=dtype)
        for rows in _pieces(indices):
            offsets[rows] = indices[rows] - ctx.first
        ctx.save_for_backward(offsets)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (offsets,) = ctx.saved_tensors
        indices = torch.empty_like(offsets, dtype=torch.int64)
        for rows in _pieces(offsets):
            indices[rows] = offsets[rows]
            indices[rows] += ctx.first
        x = gradient.new_empty(1).expand(ctx.shape)  # whose values nobody reads; it takes no memory
        to_x = torch.ops.aten.max_pool2d_with_indices_backward(gradient, x, *ctx.settings, indices)
        return to_x, None, None, None, None, None


def _first_of_windows(y: Tensor, width: int, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """Where in its plane, in pixels, the window of each output begins (before it, by the padding): [H', W']."""
    rows = torch.arange(y.shape[-2], device=y.device) * stride[0] - padding[0]
    columns = torch.arange(y.shape[-1], device=y.device) * stride[1] - padding[1]
    return rows[:, None] * width + columns


class Pointwise(nn.Conv2d, Keeping):
    """A strided 1x1 convolution, which keeps the pixels that it reads; see the module's text."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if self.keeps == "floats" or input.dim() != 4 or not _decides(input, self.weight):
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        y: Tensor = _Pointwise.apply(input, self.weight, self.bias, self.stride)
        return y


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.stride = x.shape, stride
        ctx.save_for_backward(x[:, :, :: stride[0], :: stride[1]].clone(), weight)
        return F.conv2d(x, weight, bias, stride)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        refuse_double_backward()
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        to_pixels, to_weight, to_bias = torch.ops.aten.convolution_backward(
            *(gradient, x, weight, [weight.shape[0]] if needed[2] else None),
            *((1, 1), (0, 0), (1, 1), False, (0, 0), 1, needed),
        )
        to_x = None
        if needed[0]:
            to_x = x.new_zeros(ctx.shape)
            to_x[:, :, :: ctx.stride[0], :: ctx.stride[1]] = to_pixels
        return to_x, to_weight, to_bias, None


def _pair(value: Any) -> tuple[int, int]:
    vertical, horizontal = value if isinstance(value, tuple | list) else (value, value)
    return vertical, horizontal


def _decides(*tensors: Tensor) -> bool:
    """Whether a module may decide itself what is kept of these: eager mode, recorded, and nobody else does."""
    if torch.compiler.is_compiling() or floats_needed() or not records(*tensors):
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def _is_strided_pointwise(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "valid")
    )


_LEAN: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: BatchNorm2d, nn.MaxPool2d: MaxPool2d}


def make_lean_(model: nn.Module) -> None:
    """Makes torch's batch norms, max pools and strided 1x1 convolutions the lean ones: the same objects, of another class."""
    for module in model.modules():
        lean: type[nn.Module] | None = Pointwise if _is_strided_pointwise(module) else _LEAN.get(type(module))
        if lean is not None:
            module.__class__ = lean


def make_plain_(model: nn.Module) -> None:
    """Makes the lean modules torch's own again."""
    plain: dict[type[nn.Module], type[nn.Module]] = {lean: own for own, lean in _LEAN.items()}
    plain[Pointwise] = nn.Conv2d
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
            module.__dict__.pop("keeps", None)
