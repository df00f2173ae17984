"""From moments to a result: all candidates scored, the best ones with standard errors, and where the published ones stand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

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
    others: Mapping[tuple[int, int], Moments] | None = None,
) -> SearchResult:
    """The search itself, from moments alone; `search_kernels` gathers them.

    Args:
        moments: of maps, for kernels of the search's rows and columns.
        config: how to search.
        units: the name of each unit.
        image_count: how many images there were.
        progress: called with a stage, how much of it is done, and how much there is.
        others: moments by other (rows, columns), to score the published kernels that have those.
    """
    scorer = Scorer(moments, config.alphabet, config.rows, config.columns, config.device, config.candidates.levels)
    values, kept = _score_all(scorer, config, progress)
    with _one_thread():
        return _result(moments, config, units, image_count, scorer, values, kept, others or {})


def _result(
    moments: Moments,
    config: SearchConfig,
    units: Sequence[str],
    image_count: int,
    scorer: Scorer,
    values: Tensor,
    kept: Tensor,
    others: Mapping[tuple[int, int], Moments],
) -> SearchResult:
    """What follows from the scores of all candidates."""
    measure = _Measure(moments, config, config.rows, config.columns)
    ranking = _Ranking(measure, config, values, kept)
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
    measures = {(config.rows, config.columns): measure}
    measures |= {shape: _Measure(part, config, *shape) for shape, part in others.items()}
    scored, unscored = _score_others(measures, config)
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
        others=tuple(scored),
        unscored=(*(name for name, found in codes.items() if found is None), *unscored),
        values=values,
        is_kept=kept,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The bootstrap is thousands of steps on small tables: threads that wait for each other on busy cores take ten times longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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


class _Measure:
    """Scores kernels of some rows and columns, with standard errors."""

    def __init__(self, moments: Moments, config: SearchConfig, rows: int, columns: int) -> None:
        self.config, self.columns = config, columns

        def scorer(part: Moments) -> Scorer:
            return Scorer(part, config.alphabet, rows, columns, config.device)

        self.scorer = scorer(moments)
        self.resampled = [scorer(moments.total(weights)) for weights in _bootstrap(len(moments.cells), config)]
        count = moments.cells.shape[1]
        self.by_unit = [scorer(moments.unit(u)) for u in (range(count) if count > 1 else ())]

    def describe(self, kernels: list[Codes], names: list[str] | None = None) -> list[Candidate]:
        """Scores and standard errors of kernels of one depth; published ones have names."""
        if not kernels:
            return []
        codes, alphabet = torch.tensor(kernels, device=self.config.device), self.config.alphabet
        scores = self.scorer(codes).cpu()
        errors = _spread([scorer(codes).cpu() for scorer in self.resampled])
        unit_errors = _spread([scorer(codes).cpu() for scorer in self.by_unit]) / max(1, len(self.by_unit)) ** 0.5
        kept = switches(self.scorer.shares, codes, self.config.min_share).tolist()
        return [
            Candidate(
                kernel=ThresholdKernel.named(names[i]) if names else self._designed(codes_of_one),
                pattern=" | ".join(alphabet.pattern(plane, self.columns) for plane in codes_of_one),
                scores=_by_name(scores[i]),
                errors=_by_name(errors[i]) if len(errors) else {},
                unit_errors=_by_name(unit_errors[i]) if len(unit_errors) else {},
                ranks={},
                excluded="" if kept[i] else self._reason(codes_of_one),
            )
            for i, codes_of_one in enumerate(kernels)
        ]

    def _designed(self, codes: Codes) -> ThresholdKernel:
        config, alphabet = self.config, self.config.alphabet
        text = ".".join("_".join(alphabet.labels[i] for i in plane) for plane in codes)
        provenance = (
            f"design_lightning.kernels.search: {config.score}, reference {config.reference}, levels {alphabet.name}, "
            f"ties {config.ties}, min_share {config.min_share:g}, seed {config.seed}"
        )
        return alphabet.kernel(codes, self.columns, f"designed_{config.size}_{text}", provenance)

    def _reason(self, codes: Codes) -> str:
        """Which entry never switches, and how often it is on."""
        for plane in codes:
            for place, level in enumerate(plane):
                share = float(self.scorer.shares[place, level])
                if not self.config.min_share <= share <= 1 - self.config.min_share:
                    row, column = divmod(place, self.columns)
                    where = f"level {self.config.alphabet.labels[level]} at row {row + 1}, column {column + 1}"
                    return f"{where} is on in {share:.2%} of its pixels"
        return ""


class _Ranking:
    """Finds and ranks candidates among the scores of all."""

    def __init__(self, measure: _Measure, config: SearchConfig, values: Tensor, kept: Tensor) -> None:
        self.measure, self.space, self.values, self.kept = measure, config.candidates, values, kept
        self.names = list(SCORES)
        self.signs = torch.tensor([1.0 if score.highest else -1.0 for score in SCORES.values()])

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
        """Scores, standard errors and ranks of kernels of the search's shape."""
        return [replace(found, ranks=self._ranks(found)) for found in self.measure.describe(kernels, names)]

    def _ranks(self, found: Candidate) -> dict[str, int]:
        """1 and the number of better candidates, under each score; among all where the kernel is not kept itself."""
        ranks = {}
        for s, name in enumerate(self.names):
            own = torch.tensor(found.scores[name], dtype=torch.float64).float()
            better = self.values[s] * self.signs[s] > own * self.signs[s]
            ranks[name] = 1 + int((better if found.excluded else better & self.kept).sum())
        return ranks


def _score_others(
    measures: Mapping[tuple[int, int], _Measure], config: SearchConfig
) -> tuple[list[Candidate], list[str]]:
    """The published kernels of other shapes: those that can be scored, and the names of the rest."""
    found: dict[str, Candidate] = {}
    for kernel in config.others:
        codes, measure = config.alphabet.codes_of(kernel), measures.get(kernel.shape[1:])
        if codes is not None and measure is not None:
            found[kernel.name] = measure.describe([codes], [kernel.name])[0]
    return list(found.values()), [kernel.name for kernel in config.others if kernel.name not in found]


def _by_name(scores: Tensor) -> dict[str, float]:
    return dict(zip(SCORES, scores.tolist(), strict=True))


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
