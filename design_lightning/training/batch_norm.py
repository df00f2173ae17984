"""Batch-norm statistics, estimated anew on given batches.

The running statistics of training trail behind weights whose signs flip: a flip moves a pre-activation by twice its input.
An evaluation with frozen signs needs the statistics of exactly these signs.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle


def running_batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norms of a model that keep running statistics, by name; timm's `BatchNormAct2d` is one of them."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


@torch.no_grad()
def recalibrate_batch_norm_(
    model: nn.Module, batches: Iterable[Tensor], reduce: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Sets the running mean and variance of every batch norm to those of its inputs over the given batches.

    Each batch is normalised by its own statistics, as in training; everything else (dropout, say) runs as in evaluation. Of
    a channel with n_b values in batch b, of mean m_b and biased variance v_b,

        n    = sum n_b
        mean = sum n_b m_b / n
        var  = (sum n_b (v_b + m_b^2) / n - mean^2) * n / (n - 1)

    over all batches of all processes: the mean and the unbiased variance of all values together, whatever the size of a
    batch, in float64 where the device has it. Modes and counters stay as they were, and until the last batch is through the
    statistics do, too.

    Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, arXiv:2105.07576 (precise BatchNorm).

    Args:
        model: is called with each batch, on its device.
        batches: inputs of the model.
        reduce: the sum of a tensor over processes, each of which calls this function; called once.

    Raises:
        ValueError: if the model has no batch norm with running statistics, or there is no batch.
    """
    norms = running_batch_norms(model)
    if not norms:
        raise ValueError(
            f"{type(model).__name__} has no batch norm with running statistics, so there is none to estimate"
        )
    sums = {name: _Sums(norm) for name, norm in norms.items()}
    modes = [(module, module.training) for module in model.modules()]
    tracking = [(norm, norm.track_running_stats) for norm in norms.values()]
    handles: list[RemovableHandle] = []
    try:
        model.eval()
        for name, norm in norms.items():
            # The flag alone: `train()` would reach an activation or a dropout inside the norm.
            norm.training, norm.track_running_stats = True, False
            handles.append(norm.register_forward_pre_hook(sums[name]))
        for batch in batches:
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm, tracks in tracking:
            norm.track_running_stats = tracks
        for module, mode in modes:
            module.training = mode
    total = torch.cat([each.total for each in sums.values()])
    total = total if reduce is None else reduce(total)
    parts = dict(zip(norms, total.split([each.total.numel() for each in sums.values()]), strict=True))
    unseen = [name for name, part in parts.items() if not part[0]]
    if len(unseen) == len(norms):
        raise ValueError("batch-norm statistics need at least one batch that passes a batch norm, and there was none")
    if unseen:
        rank_zero_warn(
            f"{len(unseen)} batch norms saw no batch and keep their statistics, among them {', '.join(unseen[:3])}; "
            "a part of the network that runs in training alone has them"
        )
    for name, norm in norms.items():
        if name not in unseen:
            _set(norm, parts[name])


class _Sums:
    """What a batch norm's inputs [B, C, ...] add up to: `total` is n, then n m and n (v + m^2) of each channel."""

    def __init__(self, norm: _BatchNorm) -> None:
        mean = cast(Tensor, norm.running_mean)
        precision = torch.float32 if mean.device.type == "mps" else torch.float64
        self.total = torch.zeros(1 + 2 * mean.numel(), dtype=precision, device=mean.device)

    def __call__(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].detach()
        wide = x if x.dtype == torch.float64 else x.float()
        var, mean = torch.var_mean(wide, [axis for axis in range(x.dim()) if axis != 1], correction=0)
        var, mean = var.to(self.total.dtype), mean.to(self.total.dtype)
        n = x.numel() // x.shape[1]
        self.total += n * torch.cat([torch.ones_like(self.total[:1]), mean, var + mean.square()])


def _set(norm: _BatchNorm, total: Tensor) -> None:
    n = total[0]
    mean, square = (total[1:] / n).chunk(2)
    var = (square - mean.square()).clamp_min(0) * n / (n - 1).clamp_min(1)
    cast(Tensor, norm.running_mean).copy_(mean)
    cast(Tensor, norm.running_var).copy_(var)
