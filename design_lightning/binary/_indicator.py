"""Comparisons whose result is 0 or 1 in the type of their operands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_eager_on_cpu(x: Any) -> bool:
    """Whether work on x runs operation by operation on a CPU: no compiler, no tensor that stands for another."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def indicator(compare: Callable[..., Tensor], x: Tensor, other: Tensor | float) -> Tensor:
    """1 where `compare(x, other)`, else 0; of the type of x, float32 or float64, without a gradient.

    On a CPU torch's vector code for it writes floats: a boolean result takes three times as long, and its conversion eight times.
    """
    x = x.detach()
    if not is_eager_on_cpu(x):
        return compare(x, other).to(x.dtype)
    shape = x.shape if not isinstance(other, Tensor) else torch.broadcast_shapes(x.shape, other.shape)
    # Laid out as x is; a result of another shape is torch's to lay out.
    result = torch.empty_like(x) if shape == x.shape else x.new_empty(0)
    return compare(x, other.detach() if isinstance(other, Tensor) else other, out=result)
