"""The phases of the study: which runs each has, and the rule that chooses what goes on. protocol.md says the same in prose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from statistics import fmean
from typing import Any

from results import Results
from study import Arm, Network, Run, Setting, Study

CONFIRMED = 3  # DeSign arms
Overrides = Callable[[str], dict[str, Any] | None]


class IncompleteError(Exception):
    """What a phase needs has not run."""


@dataclass(frozen=True)
class Phases:
    """The runs of each phase, as far as the results say which they are.

    Args:
        study: the grid.
        results: what has run.
        overrides: of a network, those of its designed kernels; None before they are made.
    """

    study: Study
    results: Results
    overrides: Overrides = lambda network: None

    def steps(self, phase: str) -> dict[str, Callable[[], list[Run]]]:
        """The steps of a phase by name, in order; each says its runs once those before it are done.

        Calling a step raises `IncompleteError` if what it needs has not run.
        """
        return {
            "screening": {"settings": self.settings, "grid": self.grid, "controls": self.controls},
            "confirmation": {"confirmation": self.confirmation},
            "affine_off": {"rates": self.affine_rates, "affine_off": self.affine_off},
        }[phase]

    # Screening

    def settings(self) -> list[Run]:
        """The judges in every setting."""
        return [
            run
            for setting in self.study.settings
            for judge in self.study.judges
            for run in self.screened(setting, self.study.arms[judge])
        ]

    def grid(self) -> list[Run]:
        """All other arms in the setting that was chosen."""
        others = [arm for name, arm in self.study.arms.items() if name not in self.study.judges]
        return [run for arm in others for run in self.screened(self.setting, arm)]

    def controls(self) -> list[Run]:
        """The constants of the best arm, where the grid has no such arm."""
        best = self.ranking[0]
        return [
            run
            for network in self.study.networks
            if (control := self.control(best, network)).name not in self.study.arms
            for run in self.screened(self.setting, control, [network])
        ]

    def screened(self, setting: Setting, arm: Arm, networks: Sequence[Network] = ()) -> list[Run]:
        """The screening runs of an arm. Two processes that take every other one get as many of each network."""
        first, *others = networks or self.study.networks_of(arm)
        pairs = [(first, rate) for rate in self.study.rates[:1]]
        pairs += [(network, rate) for network in others for rate in self.study.rates]
        pairs += [(first, rate) for rate in self.study.rates[1:]]
        budget = self.study.budgets["screening"]
        return [
            Run("screening", network, setting, self.resolved(arm, network), rate, seed, budget)
            for seed in self.study.seeds["screening"]
            for network, rate in pairs
        ]

    # The rule

    @cached_property
    def setting(self) -> Setting:
        """The setting with the highest held-out accuracy over networks and judges, each at its better rate."""
        self._need("screening", "settings", self.settings())
        judges = [self.study.arms[name] for name in self.study.judges]

        def score(setting: Setting) -> float:
            return fmean(self.best(setting, arm, network)[1] for arm in judges for network in self.study.networks)

        return max(self.study.settings, key=score)

    @cached_property
    def ranking(self) -> list[Arm]:
        """The DeSign arms that ran on every network, best first, by the mean over networks of their held-out accuracy."""
        self._need("screening", "grid", self.grid())
        arms = [a for a in self.study.arms.values() if a.kind == "design" and not a.networks]
        return sorted(arms, key=self.score, reverse=True)  # of equals the first stays first

    def score(self, arm: Arm) -> float:
        """The mean over networks of an arm's held-out accuracy at its better rate, in the chosen setting."""
        return fmean(self.best(self.setting, arm, network)[1] for network in self.study.networks_of(arm))

    def best(self, setting: Setting, arm: Arm, network: Network) -> tuple[float, float]:
        """The better rate of an arm on a network, and its held-out accuracy; of equals the lower rate."""
        return self._better(self.screened(setting, arm, [network]))

    def _better(self, runs: Sequence[Run]) -> tuple[float, float]:
        run = max(sorted(runs, key=lambda run: run.rate), key=self.results.top1)
        return run.rate, self.results.top1(run)

    def control(self, arm: Arm, network: Network) -> Arm:
        """The constant kernel of an arm's mean, by the name of the grid where the grid has it."""
        control = self.resolved(arm, network).control()
        return next((known for known in self.study.arms.values() if control.does_as(known)), control)

    def resolved(self, arm: Arm, network: Network) -> Arm:
        """An arm with its designed kernels in it, once they are made."""
        overrides = self.overrides(network.name) if arm.designed else None
        return arm if overrides is None else replace(arm, designed=False, binary={**arm.binary, "overrides": overrides})

    # What follows from it

    def confirmed(self, network: Network) -> list[Arm]:
        """Sign, the best DeSign arms, and the constant of the best."""
        best = self.ranking[:CONFIRMED]
        return _without_repetition([self.study.arms["sign"], *best, self.control(best[0], network)])

    def confirmation(self) -> list[Run]:
        """Those on new seeds, paired, each at the rate that it was better with; seed by seed, all arms."""
        self._need("screening", "controls", self.controls())
        return self._repeated("confirmation", self.confirmed, lambda n, arm: self.best(self.setting, arm, n)[0])

    def without_affine(self, network: Network) -> list[Arm]:
        """Sign, the best DeSign arm and its constant."""
        best = self.ranking[0]
        return _without_repetition([self.study.arms["sign"], best, self.control(best, network)])

    def affine_rates(self) -> list[Run]:
        """Both rates, as in screening, with batch norm's scale and shift off."""
        self._need("screening", "controls", self.controls())
        return [
            replace(run, step="affine_rates", affine=False)
            for network in self.study.networks
            for arm in self.without_affine(network)
            for run in self.screened(self.setting, arm, [network])
        ]

    def affine_off(self) -> list[Run]:
        """The long runs with batch norm's scale and shift off, each at its better rate."""
        rates = self.affine_rates()
        self._need("affine_off", "rates", rates)

        def rate(network: Network, arm: Arm) -> float:
            return self._better([run for run in rates if (run.network, run.arm.name) == (network, arm.name)])[0]

        return [replace(run, affine=False) for run in self._repeated("affine_off", self.without_affine, rate)]

    def _repeated(
        self, step: str, arms: Callable[[Network], list[Arm]], rate: Callable[[Network, Arm], float]
    ) -> list[Run]:
        budget, setting = self.study.budgets["confirmation"], self.setting
        per_network = [[(network, arm, rate(network, arm)) for arm in arms(network)] for network in self.study.networks]
        runs = []
        for i, seed in enumerate(self.study.seeds[step]):
            # Turned round with every seed and arm, so that of two processes each gets as many of both networks.
            for j, row in enumerate(zip_longest(*per_network)):
                for network, arm, lr in filter(None, row[:: -1 if (i + j) % 2 else 1]):
                    runs.append(Run(step, network, setting, self.resolved(arm, network), lr, seed, budget))
        return runs

    def _need(self, phase: str, step: str, runs: Sequence[Run]) -> None:
        missing = self.results.missing(runs)
        if missing:
            raise IncompleteError(
                f"{len(missing)} of {len(runs)} runs of {phase}, step {step}, are missing, the first {missing[0].name}; "
                f"run: python benchmarks/accuracy/run.py {phase}"
            )


def _without_repetition(arms: Sequence[Arm]) -> list[Arm]:
    return list({arm.name: arm for arm in arms}.values())
