"""How an annealed value goes from its start to its end, as a function of the share of its way."""

import math
from collections.abc import Sequence
from typing import Literal, get_args

PathName = Literal["linear", "cosine", "exponential", "geometric"]
Every = Literal["step", "epoch"]


class AnnealingPath:
    """The value at each share x of the way, from 0 to 1.

        linear       start + (end - start) x
        cosine       start + (end - start) (1 - cos(pi x)) / 2
        exponential  start + (end - start) (e^x - 1) / (e - 1)       ReCU's tau, arXiv:2103.12369
        geometric    start (end / start)^x                           IR-Net's temperature, arXiv:1909.10788
        a list       its values at equal distances, straight lines between

    Args:
        start: the value at 0; unused by a list.
        end: the value at 1; unused by a list.
        path: one of the names, or the list.

    Raises:
        ValueError: if the name is unknown, the list has fewer than two values, or a geometric path has an end that is not
            positive.
    """

    def __init__(self, start: float, end: float, path: PathName | Sequence[float]) -> None:
        if isinstance(path, str):
            if path not in get_args(PathName):
                raise ValueError(f"unknown path {path!r}: use {', '.join(get_args(PathName))}, or a list of values")
            if path == "geometric" and not (start > 0 and end > 0):
                raise ValueError(f"a geometric path needs ends above 0, not {start} and {end}; use linear")
        elif len(path) < 2:
            raise ValueError(f"path {list(path)} needs two values or more")
        self.start, self.end, self.path = start, end, path

    def value(self, share: float) -> float:
        """The value at a share of the way."""
        if not isinstance(self.path, str):
            place = share * (len(self.path) - 1)
            index = min(int(place), len(self.path) - 2)
            return self.path[index] + (self.path[index + 1] - self.path[index]) * (place - index)
        if self.path == "geometric":
            return float(self.start * (self.end / self.start) ** share)
        walked = {
            "linear": share,
            "cosine": (1 - math.cos(math.pi * share)) / 2,
            "exponential": math.expm1(share) / math.expm1(1),
        }[self.path]
        return self.start + (self.end - self.start) * walked
