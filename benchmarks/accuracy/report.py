"""Tables and plots of the study's results, and whether its hypotheses hold: benchmarks/results/accuracy_PHASE.md and .png.

    python benchmarks/accuracy/report.py                 # of every phase that has results

A verdict is given when all runs of a phase are there, and not before.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
from designing import read_overrides
from intervals import Interval, interval, p_value, paired
from phases import IncompleteError, Phases
from results import Results
from run import PHASES
from study import STUDY, Arm, Network, Run, Study

SECONDARY = 4  # comparisons: two more arms on two networks, whose intervals share the 5 % (Bonferroni)


@dataclass(frozen=True)
class Comparison:
    """Two arms on one network over the seeds: the difference in points, pair by pair."""

    network: str
    arm: str
    other: str
    difference: Interval
    p: float

    @property
    def holds(self) -> bool:
        """Whether the whole interval is above 0."""
        return self.difference.low > 0


def screening(phases: Phases) -> tuple[str, dict[str, dict[str, float]]]:
    """The settings, and every arm: held-out accuracy and its difference to Sign. Also the differences by network and arm."""
    study, has = phases.study, phases.results.has
    rows = []
    for setting in study.settings:
        cells = [setting.name]
        for network in study.networks:
            for judge in study.judges:
                runs = phases.screened(setting, study.arms[judge], [network])
                done = all(map(has, runs))
                cells.append(f"{100 * phases.best(setting, study.arms[judge], network)[1]:.1f}" if done else "-")
        rows.append(cells)
    head = ["setting", *(f"{network.name}: {judge}" for network in study.networks for judge in study.judges)]
    text = [_table(head, rows)]
    try:
        setting = phases.setting
    except IncompleteError as error:
        return "\n\n".join([*text, f"Incomplete: {error}."]), {}
    text.append(f"Chosen for all that follows: `{setting.name}`.")
    arms = [*study.arms.values(), *_further_controls(phases)]
    figures: dict[str, dict[str, float]] = {network.name: {} for network in study.networks}
    cells_of: dict[str, list[str]] = {}
    for arm in arms:
        cells = []
        for network in study.networks:
            runs = phases.screened(setting, arm, [network])
            if network not in study.networks_of(arm) or not all(map(has, runs)):
                cells += ["-", "-", "-"]
                continue
            rate, top1 = phases.best(setting, arm, network)
            difference = 100 * (top1 - phases.best(setting, study.arms["sign"], network)[1])
            figures[network.name][arm.name] = difference
            cells += [f"{100 * top1:.1f}", f"{difference:+.1f}", f"{rate:g}"]
        cells_of[arm.name] = [arm.name, arm.kind, *cells]

    def mean(arm: Arm) -> float:
        known = [figures[n.name][arm.name] for n in study.networks_of(arm) if arm.name in figures[n.name]]
        return sum(known) / len(known) if known else float("-inf")

    ordered = sorted(arms, key=mean, reverse=True)
    head = ["arm", "kind", *(x for n in study.networks for x in (n.name, "- Sign", "rate"))]
    text.append(_table(head, [cells_of[arm.name] for arm in ordered]))
    text.append("Held-out top-1 in %, one seed, the better of two rates: a choice of what to confirm, no evidence.")
    try:
        names = ", ".join(f"`{arm.name}`" for arm in phases.ranking[:3])
        phases.confirmation()
        text.append(f"Confirmed: {names}; the controls of the first: {_controls(phases)}.")
    except IncompleteError as error:
        text.append(f"Incomplete: {error}.")
    return "\n\n".join(text), figures


def _further_controls(phases: Phases) -> list[Arm]:
    try:
        return list({run.arm.name: run.arm for run in phases.controls()}.values())
    except IncompleteError:
        return []


def _controls(phases: Phases) -> str:
    controls = {n.name: phases.control(phases.ranking[0], n).name for n in phases.study.networks}
    return ", ".join(f"`{control}` ({network})" for network, control in controls.items())


def repeated(phases: Phases, step: str) -> tuple[str, list[Comparison]]:
    """A phase over several seeds: means, differences, and the verdict. Also all differences.

    Raises:
        IncompleteError: if it is not known which runs it has.
    """
    runs: list[Run] = getattr(phases, step)()
    done = [run for run in runs if phases.results.has(run)]
    missing = len(runs) - len(done)
    best, control = phases.ranking[0], phases.control
    text, compared = [], []
    for network in phases.study.networks:
        arms = list(dict.fromkeys(run.arm.name for run in runs if run.network == network))
        seeds = _whole_seeds(runs, done, network)
        if not seeds:
            continue
        values = {arm: _values(phases, done, network, arm, seeds) for arm in arms}
        constant, rows = control(best, network).name, []
        for arm in arms:
            against = [other for other in ("sign", constant) if other != arm]
            found = {o: _comparison(network, arm, o, values) for o in dict.fromkeys(against)} if len(seeds) > 1 else {}
            compared += found.values()
            shown = [_signed(found[o].difference) if o in found else "" for o in ("sign", constant)]
            rows.append([arm, _plain(interval(values[arm])), *shown])
        text.append(f"{network.name}, {len(seeds)} seeds, setting `{phases.setting.name}`:")
        text.append(_table(["arm", "top-1, %", "- sign", f"- {constant}"], rows))
    text.append("Test top-1 after the last step; means with 95 % t-intervals over seeds, differences paired by seed.")
    if missing:
        return "\n\n".join(
            [*text, f"Incomplete: {missing} of {len(runs)} runs are missing, so there is no verdict."]
        ), []
    text.append(verdict(phases, compared))
    return "\n\n".join(text), compared


def _whole_seeds(runs: Sequence[Run], done: Sequence[Run], network: Network) -> list[int]:
    """The seeds with every arm."""
    missing = {run.seed for run in runs if run.network == network} & {
        run.seed for run in runs if run.network == network and run not in done
    }
    return sorted({run.seed for run in runs if run.network == network} - missing)


def _values(phases: Phases, done: Sequence[Run], network: Network, arm: str, seeds: Sequence[int]) -> list[float]:
    of = {r.seed: 100 * phases.results.top1(r) for r in done if (r.network, r.arm.name) == (network, arm)}
    return [of[seed] for seed in seeds]


def _comparison(
    network: Network, arm: str, other: str, values: dict[str, list[float]], confidence: float = 0.95
) -> Comparison:
    difference = paired(values[arm], values[other], confidence)
    p = p_value([a - b for a, b in zip(values[arm], values[other], strict=True)])
    return Comparison(network.name, arm, other, difference, p)


def verdict(phases: Phases, compared: Sequence[Comparison]) -> str:
    """Whether the hypotheses hold: the best arm is better than Sign, and than its constant, on both networks."""
    best = phases.ranking[0].name
    lines, primary = [], []
    for network in phases.study.networks:
        for other in dict.fromkeys(("sign", phases.control(phases.ranking[0], network).name)):
            found = next(c for c in compared if (c.network, c.arm, c.other) == (network.name, best, other))
            primary.append(found)
            says = "holds" if found.holds else "does not hold"
            figures = f"{_signed(found.difference)}, p = {found.p:.2g}"
            lines.append(f"- `{best}` is better than `{other}` on {network.name}: **{says}** ({figures})")
    whole = "holds" if all(c.holds for c in primary) else "does not hold"
    lines.append(f"- All of it, which is the claim: **{whole}**")
    return "\n".join(lines)


def secondary(phases: Phases) -> str:
    """The other confirmed arms against Sign, with intervals that are right together."""
    runs = phases.confirmation()
    lines = []
    for network in phases.study.networks:
        seeds = phases.study.seeds["confirmation"]
        arms = ["sign", *(arm.name for arm in phases.ranking[1:3])]
        values = {arm: _values(phases, runs, network, arm, seeds) for arm in arms}
        for arm in arms[1:]:
            found = _comparison(network, arm, "sign", values, 1 - 0.05 / SECONDARY)
            lines.append(f"- `{arm}` - `sign` on {network.name}: {_signed(found.difference)}")
    head = f"Secondary, with {100 * (1 - 0.05 / SECONDARY):.2f} % intervals, which hold together at 95 % (Bonferroni):"
    return "\n".join([head, "", *lines])


def _plain(found: Interval) -> str:
    return f"{found.mean:.2f} ± {found.half:.2f}"


def _signed(found: Interval) -> str:
    return f"{found.mean:+.2f} ± {found.half:.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines)


def draw_screening(figures: dict[str, dict[str, float]], path: Path) -> None:
    """Every arm's difference to Sign, a colour a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {arm for of in figures.values() for arm in of}
    ordered = sorted(names, key=lambda arm: _mean([of[arm] for of in figures.values() if arm in of]))
    figure, axes = pyplot.subplots(figsize=(7, 0.24 * len(ordered) + 1.2), layout="constrained")
    for (network, of), marker in zip(figures.items(), "os", strict=False):
        known = [(of[arm], i) for i, arm in enumerate(ordered) if arm in of]
        axes.plot(*zip(*known, strict=True), marker, label=network, markersize=5)
    axes.set_yticks(range(len(ordered)), ordered, fontsize=8)
    _finish(figure, axes, "held-out top-1 minus Sign, points (one seed)", path)


def draw_repeated(compared: Sequence[Comparison], path: Path) -> None:
    """Every paired difference with its interval, a panel a network."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f"{c.arm} - {c.other}" for c in compared))[::-1]
    figure, axes = pyplot.subplots(figsize=(7, 0.3 * len(labels) + 1.2), layout="constrained")
    networks = list(dict.fromkeys(c.network for c in compared))
    for shift, network in zip((0.12, -0.12), networks, strict=False):
        of = [c for c in compared if c.network == network]
        places = [labels.index(f"{c.arm} - {c.other}") + shift for c in of]
        axes.errorbar(
            [c.difference.mean for c in of], places, xerr=[c.difference.half for c in of], fmt="o", label=network
        )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    _finish(figure, axes, "test top-1, paired difference, points (95 %)", path)


def _finish(figure: Any, axes: Any, label: str, path: Path) -> None:
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(label)
    axes.legend()
    figure.savefig(path, dpi=110)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(phases: Phases, phase: str, folder: Path) -> str:
    """Writes the table and the plot of a phase; gives the table.

    Raises:
        IncompleteError: if it is not known which runs the phase has.
    """
    path = folder / f"accuracy_{phase}.png"
    if phase == "screening":
        text, figures = screening(phases)
        if any(figures.values()):
            draw_screening(figures, path)
    else:
        text, compared = repeated(phases, phase)
        if compared:
            draw_repeated(compared, path)
            text += "\n\n" + secondary(phases) if phase == "confirmation" else ""
    rows = results.read(results.table(folder, phase)).values()
    facts = [_some({row[key] for row in rows}) for key in ("machine", "torch", "design_lightning", "commit")]
    made = "{}, one thread a run, torch {}, design-lightning {} at commit {}".format(*facts)
    first = f"# Accuracy: {phase.replace('_', ' ')}\n\n`python benchmarks/accuracy/run.py {phase}`, {made}.\n\n"
    (folder / f"accuracy_{phase}.md").write_text(first + text + "\n", encoding="utf-8")
    return text


def _some(values: set[str]) -> str:
    return ", ".join(sorted(values))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=STUDY, help="another grid than study.yaml")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="where the tables are")
    given = parser.parse_args(arguments)
    study = Study.read(given.study)
    overrides = {network.name: read_overrides(given.out, network.name) for network in study.networks}
    phases = Phases(study, Results.of(given.out, PHASES), overrides.get)
    there = [phase for phase in PHASES if results.table(given.out, phase).exists()]
    if not there:
        parser.error(f"no results in {str(given.out)!r}; run: python benchmarks/accuracy/run.py screening")
    for phase in there:
        print(f"{phase}\n\n{report(phases, phase, given.out)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
