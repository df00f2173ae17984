"""The scale of DeSign's kernels as a function of training: from Sign to DeSign, or any other way."""

from collections.abc import Sequence

from lightning.pytorch import LightningModule
from torch import Tensor

from design_lightning.binary import DeSign
from design_lightning.training.annealing import Annealing
from design_lightning.training.annealing_path import Every, PathName


class KernelAnnealing(Annealing):
    """Anneals `DeSign.scale`: thresholds are unit * scale * kernel, so 0 is Sign and 1 is the kernel as it was designed.

    Logged as `kernel/scale`.

    Args:
        start: the scale at first.
        end: the scale at last.
        path: `linear`, `cosine`, `exponential`, `geometric`, or a list of scales at equal distances.
        begin: the share of training up to which the scale is `start`.
        until: the share of training from which the scale is `end`.
        every: whether it moves each optimizer `step` or each `epoch`.

    Raises:
        ValueError: if an argument is out of range, or the module has no DeSign.
    """

    logged_as = "kernel/scale"

    def __init__(
        self,
        start: float = 0.0,
        end: float = 1.0,
        path: PathName | Sequence[float] = "linear",
        begin: float = 0.0,
        until: float = 1.0,
        every: Every = "step",
    ) -> None:
        super().__init__(start, end, path, begin, until, every)

    def find_buffers(self, module: LightningModule) -> list[Tensor]:  # noqa: D102
        found = [part.scale for part in module.modules() if isinstance(part, DeSign)]
        if not found:
            raise ValueError("KernelAnnealing found no DeSign; use activation: design, or leave the callback out")
        return found
