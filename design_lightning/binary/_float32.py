"""State that stays in float32 whatever precision the module is cast to.

Thresholds are compared in float32 in every precision, so rounding them to bfloat16 once (`model.bfloat16()`, Lightning's
`bf16-true`) would move them for good; an annealed value in bfloat16 would no longer change in small steps.
"""

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class Float32State(nn.Module):
    """A module whose tensors named in `float32_state` follow it between devices, but never change their type."""

    float32_state: ClassVar[tuple[str, ...]] = ()

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
