"""From moments to a result: all candidates scored, the best ones with standard errors, and where the published ones stand."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from design_lightning.kernels.kernel import ThresholdKernel
from design_lightning.kernels.search.alphabet import Codes
from design_lightning.kernels.search.config import SearchConfig
from design_lightning.kernels.search.moments import Moments
from design_lightning.kernels.search.result import Candidate, SearchResult
from design_lightning.kernels.search.scores import SCORES, Scorer

Progress = Callable[[str, int, int], None]
CHUNK = 1 << 16
"""How many candidates are scored in one go."""


def rank_candidates(
    moments: Moments,
    config: SearchConfig,
    units: Sequence[str],
    image_count: int,
    progress: Progress | None = None,
) -> SearchResult:
    """The search itself, from moments alone; `search_kernels` gathers them."""
    scorer = Scorer(moments, config.alphabet, config.rows, config.columns, config.device)
    values, kept = _score_all(scorer, config, progress)
    ranking = _Ranking(moments, scorer, config, values, kept)
    if not bool(kept.any()):
        raise ValueError(
            f"each of the {len(kept):,} candidates has an entry that gives one bit on all but {config.min_share:.2%} of its "
            "pixels; use a smaller min_share (0 excludes none), other levels ('published'), or other images"
        )
    top = ranking.describe([ranking.codes(number) for number in ranking.top(config.score, config.keep)])
    best = ranking.describe([ranking.codes(ranking.top(name, 1)[0]) for name in SCORES])
    codes = {kernel.name: config.alphabet.codes_of(kernel) for kernel in config.published}
    known = {name: found for name, found in codes.items() if found is not None}
    published = ranking.describe(list(known.values()), list(known))
    return SearchResult(
        config=config,
        images=image_count,
        units=tuple(units),
        candidates=len(kept),
        kept=int(kept.sum()),
        shares=tuple(map(tuple, scorer.shares[:, : config.candidates.levels].tolist())),
        top=tuple(top),
        best_by=dict(zip(SCORES, best, strict=True)),
        published=tuple(published),
        unscored=tuple(name for name, found in codes.items() if found is None),
        values=values,
        is_kept=kept,
    )


def _score_all(scorer: Scorer, config: SearchConfig, progress: Progress | None) -> tuple[Tensor, Tensor]:
    """The scores [S, n] of all candidates, float32, and which are kept [n], on the CPU."""
    space = config.candidates
    values = torch.empty(len(SCORES), len(space))
    kept = torch.empty(len(space), dtype=torch.bool)
    for numbers in space.chunks(CHUNK, config.device):
        codes = space.codes(numbers)
        here = slice(int(numbers[0]), int(numbers[-1]) + 1)
        values[:, here] = scorer(codes).t().float().cpu()
        kept[here] = switches(scorer.shares, codes, config.min_share).cpu()
        if progress is not None:
            progress("candidates", here.stop, len(space))
    return values, kept


def switches(shares: Tensor, codes: Tensor, min_share: float) -> Tensor:
    """Whether every entry of kernels [n, D, P] gives either bit on at least `min_share` of its pixels; shares: [P, L]."""
    at_entries = shares[torch.arange(codes.shape[-1], device=codes.device), codes]
    return ((at_entries >= min_share) & (at_entries <= 1 - min_share)).flatten(1).all(1)


class _Ranking:
    """Finds and describes candidates among the scores of all."""

    def __init__(self, moments: Moments, scorer: Scorer, config: SearchConfig, values: Tensor, kept: Tensor) -> None:
        self.config, self.scorer, self.values, self.kept = config, scorer, values, kept
        self.names = list(SCORES)
        self.signs = torch.tensor([1.0 if score.highest else -1.0 for score in SCORES.values()])
        self.alphabet, self.space = config.alphabet, config.candidates
        self.resampled = [
            Scorer(moments.total(weights), self.alphabet, config.rows, config.columns, config.device)
            for weights in _bootstrap(len(moments.cells), config)
        ]
        count = moments.cells.shape[1]
        self.by_unit = [
            Scorer(moments.unit(u), self.alphabet, config.rows, config.columns, config.device)
            for u in (range(count) if count > 1 else ())
        ]

    def codes(self, number: int) -> Codes:
        """The levels of a candidate."""
        return tuple(map(tuple, self.space.codes(torch.tensor([number]))[0].tolist()))

    def top(self, score: str, count: int) -> list[int]:
        """The numbers of the best candidates kept, one for each kernel whatever its phase; of equal ones the first."""
        s = self.names.index(score)
        goodness = torch.where(self.kept, self.values[s] * self.signs[s], float("-inf"))
        take = min(4 * count * self.space.places, int(self.kept.sum()))
        least = goodness.topk(take).values[-1]
        numbers = (goodness >= least).nonzero().flatten()
        order = goodness[numbers].sort(descending=True, stable=True).indices
        found: list[int] = []
        seen: set[tuple[int, ...]] = set()
        for number in numbers[order].tolist():
            first = self.codes(number)[0]
            if first not in seen:
                found.append(number)
                seen |= self.space.translations(first)
            if len(found) == count:
                break
        return found

    def describe(self, kernels: list[Codes], names: list[str] | None = None) -> list[Candidate]:
        """Scores, standard errors and ranks of kernels."""
        if not kernels:
            return []
        codes = torch.tensor(kernels, device=self.config.device)
        scores = self.scorer(codes).cpu()
        errors = _spread([scorer(codes).cpu() for scorer in self.resampled])
        unit_errors = _spread([scorer(codes).cpu() for scorer in self.by_unit]) / max(1, len(self.by_unit)) ** 0.5
        kept = switches(self.scorer.shares, codes, self.config.min_share).tolist()
        return [
            Candidate(
                kernel=self._kernel(codes_of_one, names[i] if names else None),
                pattern=" | ".join(self.alphabet.pattern(plane, self.config.columns) for plane in codes_of_one),
                scores=dict(zip(self.names, scores[i].tolist(), strict=True)),
                errors=dict(zip(self.names, errors[i].tolist(), strict=True)) if len(errors) else {},
                unit_errors=dict(zip(self.names, unit_errors[i].tolist(), strict=True)) if len(unit_errors) else {},
                ranks=self._ranks(scores[i], self.kept if kept[i] else None),
                excluded="" if kept[i] else self._reason(codes_of_one),
            )
            for i, codes_of_one in enumerate(kernels)
        ]

    def _kernel(self, codes: Codes, published: str | None) -> ThresholdKernel:
        if published is not None:
            return ThresholdKernel.named(published)
        config = self.config
        text = ".".join("_".join(self.alphabet.labels[i] for i in plane) for plane in codes)
        provenance = (
            f"design_lightning.kernels.search: {config.score}, reference {config.reference}, levels {self.alphabet.name}, "
            f"ties {config.ties}, min_share {config.min_share:g}, seed {config.seed}"
        )
        return self.alphabet.kernel(codes, config.columns, f"designed_{config.size}_{text}", provenance)

    def _ranks(self, scores: Tensor, among: Tensor | None) -> dict[str, int]:
        """1 and the number of better candidates, under each score; among all where the kernel is not kept itself."""
        ranks = {}
        for s, name in enumerate(self.names):
            better = self.values[s] * self.signs[s] > scores[s].float() * self.signs[s]
            ranks[name] = 1 + int((better if among is None else better & among).sum())
        return ranks

    def _reason(self, codes: Codes) -> str:
        """Which entry never switches, and how often it is on."""
        for plane in codes:
            for place, level in enumerate(plane):
                share = float(self.scorer.shares[place, level])
                if not self.config.min_share <= share <= 1 - self.config.min_share:
                    row, column = divmod(place, self.config.columns)
                    where = f"level {self.alphabet.labels[level]} at row {row + 1}, column {column + 1}"
                    return f"{where} is on in {share:.2%} of its pixels"
        return ""


def _bootstrap(groups: int, config: SearchConfig) -> list[Tensor]:
    """How often each resample holds each group: none where there is one group."""
    if groups < 2:
        return []
    generator = torch.Generator().manual_seed(config.seed)
    drawn = torch.randint(0, groups, (config.resamples, groups), generator=generator)
    return [torch.bincount(row, minlength=groups).double() for row in drawn]


def _spread(samples: list[Tensor]) -> Tensor:
    """The standard deviation over samples; empty where there are fewer than two."""
    return torch.stack(samples).std(0) if len(samples) > 1 else torch.empty(0)
