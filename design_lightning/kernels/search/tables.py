"""The result of a search as tables of 80 columns."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from design_lightning.kernels.search.scores import SCORES

if TYPE_CHECKING:
    from design_lightning.kernels.search.result import Candidate, SearchResult


def result_tables(found: "SearchResult") -> RenderableType:
    """What was searched, the best, the best under each score, and the places of the published kernels."""
    name = found.config.score
    parts: list[RenderableType] = [
        Text(summary(found)),
        Text(f"\nbest under {SCORES[name].title}", style="bold"),
        _top(found),
        Text(f"\nbest under each score, and its rank under {SCORES[name].short}", style="bold"),
        _best_by(found),
    ]
    if found.published:
        parts += [Text("\nranks of the published kernels", style="bold"), _published(found)]
    if found.published or found.others:
        parts += [Text("\nscores of all published kernels, of any shape", style="bold"), _scores(found)]
    parts += [Text(f"\n{note}", style="dim") for note in notes(found)]
    return Group(*parts)


def layer_table(found: Mapping[str, "SearchResult"]) -> RenderableType:
    """The best kernel of each layer."""
    first = next(iter(found.values()))
    name = first.config.score
    table = _table("layer", "kernel", SCORES[name].short, "kept", left=2)
    for layer, result in found.items():
        table.add_row(Text(layer), _pattern(result.best), result.best.shown(name), f"{result.kept:,}")
    over = "\n±: one standard error over groups of images" if first.best.errors else ""
    text = f"best of {first.candidates:,} kernels of {first.config.size} for each layer, on {first.images:,} images{over}\n"
    return Group(Text(text), table)


def summary(found: "SearchResult") -> str:
    """What was searched, in three lines."""
    config = found.config
    kind = {"none": "", "complement": ", each with its complement", "shift": ", each with three shifts"}[config.family]
    symmetric = " symmetric" if config.symmetric else ""
    levels = config.levels if isinstance(config.levels, str) else "given"
    units = (
        f"{len(found.units)} {'random filters' if _simulated(found) else 'layers'}"
        if len(found.units) > 1
        else found.units[0]
    )
    rule = f" (min_share {config.min_share:g})" if config.min_share else ""
    return (
        f"{found.candidates:,}{symmetric} kernels of {config.size}{kind}\n"
        f"{found.kept:,} of them without an entry that never switches{rule}\n"
        f"{found.images:,} images, {units}; reference {config.reference}, levels {levels}, ties {config.ties}"
    )


def notes(found: "SearchResult") -> list[str]:
    """What a reader should know of errors, phases and exclusions."""
    name = found.config.score
    lines = []
    if found.best.errors:
        over = ""
        if found.best.unit_errors:
            units = "filters" if _simulated(found) else "layers"
            over = f"; over {units} the best has ±{found.best.unit_errors[name]:.4f}"
        lines.append(f"±: one standard error over groups of images{over}")
    lines.append("rank: every phase of a kernel has its own; the first table shows the best phase alone")
    lines += [
        f"excluded, its ranks in brackets among all {found.candidates:,}: {c.kernel.name}, since its {c.excluded}"
        for c in found.published
        if c.excluded
    ]
    if any(c.excluded for c in (*found.published, *found.others)):
        lines.append("scores in brackets: the kernel has an entry that never switches")
    if found.unscored:
        lines.append(
            f"not scored, having levels that the search lacks, or no place in a map: {', '.join(found.unscored)}"
        )
    return lines


def _simulated(found: "SearchResult") -> bool:
    return found.units[0].startswith("seed ")


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i >= left, overflow="fold")
    return table


def _top(found: "SearchResult") -> Table:
    name = found.config.score
    table = _table("kernel", "rank", *(SCORES[score].short for score in _score_columns(name)))
    for candidate in found.top:
        table.add_row(_pattern(candidate), f"{candidate.ranks[name]:,}", candidate.shown(name), *_rest(candidate, name))
    return table


def _scores(found: "SearchResult") -> Table:
    name = found.config.score
    table = _table("kernel", *(SCORES[score].short for score in _score_columns(name)))
    for candidate in (*found.published, *found.others):
        shown = f"({candidate.shown(name)})" if candidate.excluded else candidate.shown(name)
        table.add_row(candidate.kernel.name, shown, *_rest(candidate, name))
    return table


def _score_columns(first: str) -> list[str]:
    return [first, *(score for score in SCORES if score != first)]


def _rest(candidate: "Candidate", first: str) -> list[str]:
    """The scores but the one that ranks."""
    return [_number(candidate.scores[score]) for score in _score_columns(first)[1:]]


def _best_by(found: "SearchResult") -> Table:
    table = _table("score", "kernel", "value", "rank", left=2)
    for name, candidate in found.best_by.items():
        title = f"{SCORES[name].title}, {'highest' if SCORES[name].highest else 'lowest'}"
        table.add_row(title, _pattern(candidate), candidate.shown(name), f"{candidate.ranks[found.config.score]:,}")
    return table


def _published(found: "SearchResult") -> Table:
    """A row a kernel where its ranks fit, else a row a score."""
    table = _table("kernel", *(score.short for score in SCORES.values()))
    for candidate in found.published:
        table.add_row(candidate.kernel.name, *(_rank(candidate, name) for name in SCORES))
    if found.candidates < 1_000_000:
        return table
    table = _table("", *(candidate.kernel.name for candidate in found.published))
    for name, score in SCORES.items():
        table.add_row(score.short, *(_rank(candidate, name) for candidate in found.published))
    return table


def _rank(candidate: "Candidate", score: str) -> str:
    rank = f"{candidate.ranks[score]:,}"
    return f"({rank})" if candidate.excluded else rank


def _pattern(candidate: "Candidate") -> str:
    """The first slice; a family's others follow from it."""
    return candidate.pattern.partition(" | ")[0]


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"
