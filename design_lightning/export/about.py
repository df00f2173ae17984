"""What goes with a network into every file of it: its labels, how its input is normalised, and where it comes from."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from torch import nn

_NAME = "_about"


@dataclass(frozen=True)
class About:
    """Facts of a network that its tensors do not hold.

    Args:
        labels: the name of each class.
        mean: of the input normalisation, a value a channel: the network takes (x - mean) / std, for x from 0 to 1.
        std: the same.
        training: plain values that say how the network was trained: data, epochs, accuracy, versions.
    """

    labels: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """What is known of a model: what `describe_` said, or nothing."""
        known = model.__dict__.get(_NAME)
        return known if isinstance(known, cls) else cls()

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """From plain values.

        Raises:
            ValueError: if a value is none that `to_dict` gives.
        """
        for name, kind in (("labels", str), ("mean", int | float), ("std", int | float)):
            values = stored.get(name)
            if values is not None and not (
                isinstance(values, list | tuple) and all(isinstance(v, kind) for v in values)
            ):
                raise ValueError(f"{name!r} of a network must be a list of values, not {values!r}")
        if not isinstance(stored.get("training", {}), dict):
            raise ValueError(f"'training' of a network must be an object, not {stored['training']!r}")
        lists = {name: None if stored.get(name) is None else tuple(stored[name]) for name in ("labels", "mean", "std")}
        return cls(**lists, training=dict(stored.get("training", {})))

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def describe_(self, model: nn.Module) -> None:
        """Leaves these facts on a model, for the files that are written of it."""
        model.__dict__[_NAME] = self
