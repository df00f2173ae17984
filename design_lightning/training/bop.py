"""`Bop`, the binary optimizer that has no latent weights."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from design_lightning.binary import sign
from design_lightning.training.groups import LATENT


class Bop(Optimizer):
    """Flips binary weights against a moving average of their gradients.

        m <- (1 - lr) * m + lr * gradient
        w <- -w where |m| > threshold and sign(m) = sign(w)

    The weights are +-1 from the start (the signs of what is there, with +1 for 0) and after every step. They go with a weight
    binarizer that keeps them as they are: `sign`, `xnor` (whose scale is then 1) or `learned`; `recu` and `irnet` subtract
    the mean of a channel. Give the norms and the float layers another optimizer: of the groups of `parameter_groups` this one
    takes `latent` alone, see `PerGroupOptimizer`.

    Helwegen et al., "Latent Weights Do Not Exist: Rethinking Binarized Neural Network Optimization", NeurIPS 2019,
    arXiv:1906.02107.

    Args:
        params: the weights, or parameter groups of them; float32 or float64.
        lr: the adaptivity rate (gamma of the paper), which schedulers see as the learning rate.
        threshold: how strong the average must be for a flip (tau of the paper).

    Raises:
        ValueError: if `lr` is not from 0 to 1, `threshold` is negative, a weight is of half precision, or a group has another
            name than `latent`.

    >>> w = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.0]))
    >>> optimizer = Bop([w], lr=0.5, threshold=0.1)
    >>> w.grad = torch.tensor([1.0, 1.0, 0.1])
    >>> optimizer.step()
    >>> w.tolist()
    [-1.0, -1.0, 1.0]
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-4, threshold: float = 1e-8) -> None:
        if not isinstance(params, Tensor):  # which torch refuses
            params = list(params)
            for group in params:
                _check_name(group)  # all of them, before the weights of the first become signs
        super().__init__(params, {"lr": lr, "threshold": threshold})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, whose weights become their signs."""
        _check_name(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not 0 <= group["lr"] <= 1:
            raise ValueError(f"lr is {group['lr']}; Bop averages gradients at a rate from 0 to 1, such as 1e-4")
        if group["threshold"] < 0:
            raise ValueError(
                f"threshold is {group['threshold']}; give 0 to flip at every agreement, or more, such as 1e-8"
            )
        for weight in group["params"]:
            if weight.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"Bop cannot average gradients at a rate of {group['lr']} in {weight.dtype}; keep the weights in "
                    "float32, as precision: bf16-mixed does"
                )
            with torch.no_grad():
                weight.copy_(sign(weight))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure`, if given, computes the gradients; returns its result."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._flip(weight, weight.grad, group["lr"], group["threshold"])
        return result

    def _flip(self, weight: Tensor, gradient: Tensor, lr: float, threshold: float) -> None:
        state = self.state[weight]
        if not state:
            state["average"] = torch.zeros_like(weight)
        average: Tensor = state["average"]
        average.mul_(1 - lr).add_(gradient * lr)
        signs = sign(weight)  # a step after foreign weights were loaded starts from their signs, too
        weight.copy_(torch.where(average * signs > threshold, -signs, signs))


def _check_name(group: Any) -> None:
    """Refuses the norms and float weights of `parameter_groups`; what has no name may be latent weights."""
    name = group.get("name", LATENT) if isinstance(group, dict) else LATENT
    if name != LATENT:
        raise ValueError(
            f"Bop would make the weights of group {name!r} +-1, but takes latent weights alone: use "
            "PerGroupOptimizer(latent: Bop, rest: another optimizer)"
        )
