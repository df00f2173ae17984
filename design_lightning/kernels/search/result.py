"""What a search found: candidates with scores, standard errors and ranks, as a table, as JSON, and as a picture."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.search.scores import SCORES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from design_lightning.kernels.search.config import SearchConfig


@dataclass(frozen=True)
class Candidate:
    """One kernel, with what it scores.

    Args:
        kernel: its thresholds.
        pattern: its levels by their labels, row by row: `1 1; 0 3`, with ` | ` between the slices of a 3-D kernel.
        scores: by the names of `SCORES`.
        errors: one standard error of each over groups of images, by bootstrap; empty where there is one group. The filters,
            and the mean and deviation that standardise them, are held.
        unit_errors: one standard error of each over units, which are random filters, or layers; empty where there is one.
        ranks: 1 and the number of better candidates: among those kept or, if it is excluded itself, among all. Empty for a
            kernel of another shape than the search's.
        excluded: why it is, or empty.
    """

    kernel: ThresholdKernel
    pattern: str
    scores: dict[str, float]
    errors: dict[str, float]
    unit_errors: dict[str, float]
    ranks: dict[str, int]
    excluded: str = ""

    def shown(self, score: str) -> str:
        """A score with its standard error."""
        error = f" ± {self.errors[score]:.4f}" if self.errors else ""
        return f"{self.scores[score]:.4f}{error}"

    def to_dict(self) -> dict[str, Any]:
        """Plain texts, numbers, lists and dicts."""
        plain = dataclasses.asdict(self)
        return {**plain, "kernel": json.loads(self.kernel.to_json())}


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    Args:
        config: how it was made.
        images: how many.
        units: over which scores are averaged.
        candidates: how many there were.
        kept: how many of them have no entry that never switches.
        shares: [P][L], the share of ones that each level gives at each place.
        top: the best under `config.score`, best first. A kernel in several phases stands there once, in the best.
        best_by: the best under each score.
        published: the published kernels of this shape.
        others: the published kernels of other shapes, scored on the same maps.
        unscored: published kernels whose levels are none of the search's, or that are larger than a map.
        values: [S, n], every score (in the order of `SCORES`) of every candidate, float32.
        is_kept: [n].
    """

    config: "SearchConfig"
    images: int
    units: tuple[str, ...]
    candidates: int
    kept: int
    shares: tuple[tuple[float, ...], ...]
    top: tuple[Candidate, ...]
    best_by: dict[str, Candidate]
    published: tuple[Candidate, ...]
    others: tuple[Candidate, ...] = ()
    unscored: tuple[str, ...] = ()
    values: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)
    is_kept: Tensor = field(default_factory=lambda: torch.empty(0), repr=False, compare=False)

    @property
    def best(self) -> Candidate:
        """The best candidate; `best.kernel.to_json(path)` writes what `kernel: path` of a configuration reads."""
        return self.top[0]

    def curve(self, points: int = 401, score: str | None = None) -> list[tuple[int, float]]:
        """Rank and score of some of the candidates kept, the best first: dense at the best, where it matters."""
        name = score or self.config.score
        ordered = self.values[list(SCORES).index(name)][self.is_kept].sort(descending=SCORES[name].highest).values
        steps = torch.logspace(0, torch.log10(torch.tensor(float(len(ordered)))).item(), points)
        ranks = sorted({min(len(ordered), max(1, round(r))) for r in steps.tolist()})
        return [(rank, float(ordered[rank - 1])) for rank in ranks]

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything but the scores of all candidates, as JSON text, also written to `path` if one is given."""
        found = {
            "config": dataclasses.asdict(self.config),
            "images": self.images,
            "units": self.units,
            "candidates": self.candidates,
            "kept": self.kept,
            "shares": self.shares,
            "top": [candidate.to_dict() for candidate in self.top],
            "best_by": {name: candidate.to_dict() for name, candidate in self.best_by.items()},
            "published": {candidate.kernel.name: candidate.to_dict() for candidate in self.published},
            "others": {candidate.kernel.name: candidate.to_dict() for candidate in self.others},
            "unscored": self.unscored,
            "curve": self.curve(101),
        }
        text = json.dumps(found, indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def table(self) -> "RenderableType":
        """The ranking, the best under each score and the places of the published kernels, in 80 columns."""
        from design_lightning.kernels.search.tables import result_tables

        return result_tables(self)

    def draw(self, path: str | Path, image: Tensor) -> None:
        """Draws the top kernels, the score's curve, and a grey image [H, W] through ReLU, Sign and the kernels."""
        from design_lightning.kernels.search.figures import draw_result

        draw_result(self, image, path)
