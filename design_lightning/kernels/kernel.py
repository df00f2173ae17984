"""`ThresholdKernel`: a small periodic pattern of thresholds, as an immutable value.

Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from design_lightning._names import did_you_mean
from design_lightning.kernels.published import PUBLISHED, PUBLISHED_LEVELS, Levels
from design_lightning.kernels.tiling import Alignment, tile

FORMAT = "design-lightning/threshold-kernel"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ThresholdKernel:
    """Thresholds [D, h, w] that DeSign repeats over channels, rows and columns, in standard deviations of its input.

    Args:
        levels: [D, h, w], or [h, w] for a kernel of one channel: nested sequences, an array or a tensor of finite numbers.
        name: what reports and files call it.
        provenance: where it comes from: a paper, or the search that found it.

    Raises:
        ValueError: if `levels` is empty, ragged, of another rank, or holds a value that is not finite.

    >>> kernel = ThresholdKernel.named("2x2_v1")
    >>> kernel.shape
    (1, 2, 2)
    >>> kernel.complement().levels[0]
    ((1.76555877, 1.76555877), (2.34193425, 1.33518974))
    """

    levels: Levels
    name: str = "custom"
    provenance: str = field(default="", compare=False)

    def __init__(self, levels: Any, name: str = "custom", provenance: str = "") -> None:
        object.__setattr__(self, "levels", _as_levels(levels))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "provenance", provenance)

    @classmethod
    def named(cls, name: str) -> Self:
        """A published kernel by its slug, such as `2x2_v1` (`ThresholdKernel.names()` lists them), or one that was registered.

        Raises:
            ValueError: if no kernel has that name; names the nearest.
        """
        if (found := cls.find(name)) is None:
            known = [*PUBLISHED, *REGISTERED]
            raise ValueError(f"unknown kernel {name!r}: {did_you_mean(name, known)} (or give a kernel's JSON file)")
        return cls(found.levels, found.name, found.provenance)

    @classmethod
    def find(cls, name: str) -> "ThresholdKernel | None":
        """The kernel of that name, published or registered, if there is one."""
        if name in PUBLISHED:
            return cls(PUBLISHED[name], name=name, provenance="published by Monroy et al. 2024, arXiv:2405.02220")
        return REGISTERED.get(name)

    @staticmethod
    def names() -> tuple[str, ...]:
        """The slugs of the published kernels."""
        return tuple(PUBLISHED)

    @classmethod
    def of(cls, kernel: "ThresholdKernel | str | Path | Sequence[Any] | Tensor") -> "ThresholdKernel":
        """A kernel from whatever a configuration may hold: a kernel, a slug, a JSON file's path, or levels.

        A text that ends in `.json` is a file; any other text is a slug.
        """
        if isinstance(kernel, ThresholdKernel):
            return kernel
        if isinstance(kernel, Path) or (isinstance(kernel, str) and kernel.endswith(".json")):
            return cls.from_json(kernel)
        if isinstance(kernel, str):
            return cls.named(kernel)
        return cls(kernel)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w): channel phases, rows, columns."""
        return len(self.levels), len(self.levels[0]), len(self.levels[0][0])

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """The levels as a float32 tensor [D, h, w]."""
        return torch.tensor(self.levels, dtype=torch.float32, device=device)

    def tile(self, channels: int, height: int, width: int, align: Alignment = "topleft") -> Tensor:
        """The threshold of every element of one image: [channels, height, width], float32.

        Raises:
            ValueError: if the kernel's depth does not divide `channels`.
        """
        return tile(self.tensor(), channels, height, width, align).expand(channels, height, width)

    def mean(self) -> float:
        """The mean threshold: how far the kernel shifts Sign, apart from its pattern."""
        values = [level for plane in self.levels for row in plane for level in row]
        return math.fsum(values) / len(values)

    def complement(self, alphabet: Sequence[float] | None = None) -> "ThresholdKernel":
        """Each level replaced by its mirror image in the alphabet: the lowest by the highest, and so on.

        Args:
            alphabet: all the levels there are, in any order. By default the published six, if they hold every level here.

        Raises:
            ValueError: if a level is not in the alphabet.
        """
        ordered = self._alphabet(alphabet)
        mirror = dict(zip(ordered, reversed(ordered), strict=True))
        return self._map(mirror, f"{self.name}_complement")

    def shift(self, steps: int = 1, alphabet: Sequence[float] | None = None) -> "ThresholdKernel":
        """Each level replaced by the one `steps` up in the alphabet, circularly: above the highest comes the lowest.

        Args:
            steps: how many levels up; negative is down.
            alphabet: as in `complement`.
        """
        ordered = self._alphabet(alphabet)
        moved = {level: ordered[(i + steps) % len(ordered)] for i, level in enumerate(ordered)}
        return self._map(moved, f"{self.name}_shift{steps:+d}")

    def _alphabet(self, alphabet: Sequence[float] | None) -> list[float]:
        ordered = sorted(set(PUBLISHED_LEVELS.values() if alphabet is None else alphabet))
        for plane in self.levels:
            for row in plane:
                for level in row:
                    if level not in ordered:
                        source = "the published levels" if alphabet is None else "the given alphabet"
                        raise ValueError(
                            f"kernel {self.name!r} has the level {level}, which is not one of {source} {ordered}; "
                            "pass `alphabet` with every level there is"
                        )
        return ordered

    def _map(self, table: dict[float, float], name: str) -> "ThresholdKernel":
        levels = [[[table[level] for level in row] for row in plane] for plane in self.levels]
        return ThresholdKernel(
            levels, name=name, provenance=f"derived from {self.name}: {self.provenance}".rstrip(": ")
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """The kernel as JSON text, also written to `path` if one is given."""
        text = json.dumps(
            {
                "format": FORMAT,
                "version": FORMAT_VERSION,
                "name": self.name,
                "provenance": self.provenance,
                "levels": self.levels,
            },
            indent=2,
        )
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Self:
        """A kernel from a JSON file, or from the JSON text itself (a text that starts with `{`).

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not the JSON of a kernel, or of a newer format.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        where = "the JSON text" if is_text else f"kernel file {str(source)!r}"
        if not is_text and not Path(source).is_file():
            raise FileNotFoundError(f"{where} does not exist; write one with ThresholdKernel.to_json")
        try:
            stored = json.loads(source if is_text else Path(source).read_text(encoding="utf-8"))  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from error
        if not isinstance(stored, dict) or stored.get("format") != FORMAT or "levels" not in stored:
            raise ValueError(f'{where} is not a threshold kernel: it lacks \'"format": "{FORMAT}"\' or its levels')
        if stored.get("version") != FORMAT_VERSION:
            raise ValueError(
                f"{where} has format version {stored.get('version')}, but this release reads {FORMAT_VERSION}; "
                "update design-lightning"
            )
        return cls(stored["levels"], name=stored.get("name", "custom"), provenance=stored.get("provenance", ""))


REGISTERED: dict[str, ThresholdKernel] = {}
"""The kernels of `dl.register`, by name."""


def _device_of_numbers(levels: Any) -> torch.device:
    """Where a tensor is; for plain numbers the CPU, also where `torch.device("meta")` is in force, which holds no numbers."""
    return levels.device if isinstance(levels, torch.Tensor) else torch.device("cpu")


def _as_levels(levels: Any) -> Levels:
    try:
        values = torch.as_tensor(levels, dtype=torch.float64, device=_device_of_numbers(levels))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"a kernel's levels must be a regular array of numbers, not {levels!r}: {error}") from error
    if values.dim() == 2:
        values = values.unsqueeze(0)
    if values.dim() != 3 or values.numel() == 0:
        raise ValueError(f"a kernel's levels have shape [D, h, w] or [h, w], all at least 1, not {list(values.shape)}")
    if not bool(torch.isfinite(values.float()).all()):
        raise ValueError(f"a kernel's levels must be finite in float32, not {values.tolist()}")
    return tuple(tuple(tuple(row) for row in plane) for plane in values.tolist())
