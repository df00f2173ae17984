"""The annealed values of estimators and weight binarizers: EDE's and ReSTE's temperature, ReCU's tau."""

from collections.abc import Sequence
from typing import Literal, get_args

from lightning.pytorch import LightningModule
from torch import Tensor

from design_lightning.binary import WeightBinarizer
from design_lightning.binary.estimators import AnnealedEstimator
from design_lightning.binary.weights import ReCUWeight
from design_lightning.training.annealing import Annealing
from design_lightning.training.annealing_path import Every, PathName

AnnealedName = Literal["temperature", "tau"]
Of = Literal["activations", "weights", "all"]


class EstimatorAnnealing(Annealing):
    """Anneals the `temperature` of estimators, or the `tau` of ReCU's weights.

        IR-Net (EDE)   name: temperature, start: 0.1,  end: 10,   path: geometric
        ReSTE          name: temperature, start: 1,    end: 3,    path: linear
        ReCU           name: tau,         start: 0.85, end: 0.99, path: exponential, every: epoch

    The last step, or epoch, has the value `end`; the authors of IR-Net and ReCU go by epoch / epochs, and stop short of it.

    Logged as `estimator/temperature` or `estimator/tau`. Two of them, for activations and for weights, may run side by side.

    Args:
        name: `temperature` or `tau`.
        start: the value at first.
        end: the value at last.
        path: `linear`, `cosine`, `exponential`, `geometric`, or a list of values at equal distances.
        begin: the share of training up to which the value is `start`.
        until: the share of training from which the value is `end`.
        every: whether it moves each optimizer `step` or each `epoch`.
        of: the temperatures of `activations`, of `weights` (IR-Net's), or of `all`.

    Raises:
        ValueError: if an argument is out of range, or the module has no such value.
    """

    def __init__(
        self,
        name: AnnealedName,
        start: float,
        end: float,
        path: PathName | Sequence[float] = "linear",
        begin: float = 0.0,
        until: float = 1.0,
        every: Every = "step",
        of: Of = "all",
    ) -> None:
        super().__init__(start, end, path, begin, until, every)
        if name not in get_args(AnnealedName):
            raise ValueError(f"unknown name {name!r}: use {' or '.join(get_args(AnnealedName))}")
        if of not in get_args(Of):
            raise ValueError(f"unknown of={of!r}: use {', '.join(get_args(Of))}")
        values = [start, end] if isinstance(path, str) else list(path)
        if name == "tau" and not all(0.5 < value < 1 for value in values):
            raise ValueError(f"tau must stay above 0.5 and below 1, not go through {values}")
        if name == "temperature" and not all(value > 0 for value in values):
            raise ValueError(f"temperature must stay above 0, not go through {values}")
        self.name: AnnealedName = name
        self.of: Of = of
        self.logged_as = f"estimator/{name}" if of == "all" else f"estimator/{of}_{name}"

    @property
    def state_key(self) -> str:  # noqa: D102
        return self._generate_state_key(name=self.name, of=self.of)

    def find_buffers(self, module: LightningModule) -> list[Tensor]:  # noqa: D102
        if self.name == "tau":
            found = [part.tau for part in module.modules() if isinstance(part, ReCUWeight)]
            where = "weight: recu"
        else:
            of_weights = {
                inner for part in module.modules() if isinstance(part, WeightBinarizer) for inner in part.modules()
            }
            found = [
                part.temperature
                for part in module.modules()
                if isinstance(part, AnnealedEstimator)
                and (self.of == "all" or (part in of_weights) == (self.of == "weights"))
            ]
            where = "estimator: ede or reste, or weight: irnet"
        if not found:
            raise ValueError(
                f"EstimatorAnnealing found no {self.name} (of {self.of}); use {where}, or leave the callback out"
            )
        return found
