"""State that stays in float32 whatever precision the module is cast to.

Thresholds are compared in float32 in every precision, so rounding them to bfloat16 once (`model.bfloat16()`, Lightning's
`bf16-true`) would move them for good; an annealed value in bfloat16 would no longer change in small steps.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class Float32State(nn.Module):
    """A module whose tensors named in `float32_state` follow it between devices, but never change their type."""

    float32_state: ClassVar[tuple[str, ...]] = ()
    start: dict[str, Any]
    """What the named tensors that are constants start from; `reset_parameters` sets them, as after `to_empty`."""

    def __init__(self) -> None:
        super().__init__()
        self.start = {}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the constants of `start` again: a module built on `meta` and given memory by `to_empty` needs it."""
        for name, value in self.start.items():
            tensor: Tensor = getattr(self, name)
            tensor.copy_(torch.as_tensor(value, dtype=tensor.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept: dict[str, Tensor] = {name: getattr(self, name) for name in self.float32_state}
        values = {name: tensor.detach() for name, tensor in kept.items()}
        gradients = {name: tensor.grad.detach() for name, tensor in kept.items() if tensor.grad is not None}
        super()._apply(fn, recurse)
        for name, before in values.items():
            after: Tensor = getattr(self, name)
            if after.dtype != torch.float32:
                after.data = before.to(after.device)
                if name in gradients:
                    after.grad = gradients[name].to(after.device)
        return self
