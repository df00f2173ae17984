"""The study of accuracy: DeSign beside Sign and beside a mere shift, through `design-train fit`; protocol.md says what and why.

    python -m zipfile -e ../shared/data/cifar10-imagefolder.zip data/
    python benchmarks/accuracy/run.py screening      # start it once a core: they share the work, and go on where it stopped
    python benchmarks/accuracy/run.py confirmation
    python benchmarks/accuracy/run.py affine_off
    python benchmarks/accuracy/report.py             # tables and plots of what there is

    python benchmarks/accuracy/run.py screening --dry_run      # what would run, for how long, and each command
    python benchmarks/accuracy/run.py screening --only '*/vgg_small/*/rsign/*'

Writes a row a run to benchmarks/results/accuracy_PHASE.csv, with the command that makes it anew: paste it into a shell at the
repository's root. A run counts as done if its row has the configuration that it has now. A process may be killed at any time: the
run that it was at is begun anew. Processes on several machines take a `--shard` each, and need each other's rows in their tables
for the next step. The exit code is 1 if a run failed, 2 if what a phase needs is missing.
"""

import argparse
import fnmatch
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import results
from designing import commands, make_overrides, read_overrides
from phases import IncompleteError, Phases
from results import Results
from study import ROOT, STUDY, Run, Study
from training import FailedError, shown, train

PHASES = ("screening", "confirmation", "affine_off")


@dataclass(frozen=True)
class Runner:
    """Does the runs of a phase.

    Args:
        study: the grid.
        folder: of the results.
        data: the folder of CIFAR-10, as the commands name it.
        only: a glob over names of runs.
        shard: I and N: each N-th run, from the I-th.
    """

    study: Study
    folder: Path = results.FOLDER
    data: str = "data/cifar10"
    only: str = "*"
    shard: tuple[int, int] = (1, 1)

    def phases(self) -> Phases:
        """The phases, with all results there are now."""
        overrides = {network.name: read_overrides(self.folder, network.name) for network in self.study.networks}
        return Phases(self.study, Results.of(self.folder, PHASES), overrides.get)

    def do(self, phase: str) -> int:
        """Does all steps of a phase; gives how many runs failed.

        Raises:
            IncompleteError: if what the phase, or its next step, needs is missing.
        """
        failed: set[str] = set()
        for step in self.phases().steps(phase):
            runs = self.mine(self.phases().steps(phase)[step]())
            # First what nobody does; then what others began, and did not end.
            for wait in (False, True):
                for i, run in enumerate(runs, start=1):
                    if run.name not in failed and not self.once(run, phase, f"{step} {i}/{len(runs)}", wait):
                        failed.add(run.name)
            if failed:
                return len(failed)
        return 0

    def mine(self, runs: Sequence[Run]) -> list[Run]:
        """Those that this process is asked for."""
        index, count = self.shard
        return [run for run in runs[index - 1 :: count] if fnmatch.fnmatchcase(run.name, self.only)]

    def once(self, run: Run, phase: str, place: str, wait: bool) -> bool:
        """Does a run that is not done, if no other process does; whether it did not fail."""
        with results.claim(self.folder, run.name, wait) as claim:
            if claim is None:
                return True
            try:
                run = self.designed(run)
                if self.phases().results.has(run):
                    return True
                row = train(run, phase, self.data, claim)
            except FailedError as error:
                print(f"{place} {run.name}: failed, {error}", file=sys.stderr, flush=True)
                return False
            results.add(results.table(self.folder, phase), row)
        print(f"{place} {run.name}: {100 * row.top1:.2f}% in {row.seconds:.0f} s", flush=True)
        return True

    def designed(self, run: Run) -> Run:
        """A run with its designed kernels in it, which are made where they are not there."""
        if not run.arm.designed:
            return run
        with results.claim(self.folder, f"designed_{run.network.name}", wait=True) as claim:
            if read_overrides(self.folder, run.network.name) is None:
                make_overrides(self.sign(run), self.data, self.folder, claim)
        arm = self.phases().resolved(run.arm, run.network)
        return replace(run, arm=arm)

    def sign(self, run: Run) -> Run:
        """Sign's screening run at its better rate, on the network and in the setting of another."""
        phases, sign = self.phases(), self.study.arms["sign"]
        rate = phases.best(run.setting, sign, run.network)[0]
        return next(r for r in phases.screened(run.setting, sign, [run.network]) if r.rate == rate)

    def show(self, phase: str) -> None:
        """Prints what is to run, as far as it is known, and how long it takes on two cores."""
        for step in self.phases().steps(phase):
            try:
                runs = self.phases().steps(phase)[step]()
            except IncompleteError as error:
                print(f"{step}: {error}")
                return
            missing = self.mine(self.phases().results.missing(runs))
            hours = sum(run.budget.seconds(run.network) for run in missing) / 3600 / 2
            print(f"{step}: {len(missing)} of {len(runs)} runs to do, {hours:.1f} h on two cores")
            for run in missing:
                made = commands(self.sign(run), self.data) if run.arm.designed else []
                print(f"\n{run.name}", *map(shown, [*made, run.command(self.data)]), sep="\n  ")


def shard(text: str) -> tuple[int, int]:
    """I and N of `I/N`."""
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/2") from None
    if not 1 <= index <= count:
        raise argparse.ArgumentTypeError(f"{text!r}: I is one of 1 to N")
    return index, count


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help="each N-th run, from the I-th")
    parser.add_argument("--only", default="*", metavar="GLOB", help="runs whose name matches")
    parser.add_argument("--data", default="data/cifar10", metavar="DIR", help="CIFAR-10; default: %(default)s")
    parser.add_argument("--dry_run", action="store_true", help="print the runs, their time and their commands")
    parser.add_argument("--study", type=Path, default=STUDY, help="another grid than study.yaml")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="DIR", help="where the tables are")
    given = parser.parse_args(arguments)
    if not (ROOT / given.data / "train").is_dir():
        parser.error(f"no class folders in {given.data!r}: {given.data}/train is missing; see the top of this file")
    runner = Runner(Study.read(given.study), given.out, given.data, given.only, given.shard)
    signal.signal(signal.SIGTERM, _leave)
    try:
        if given.dry_run:
            runner.show(given.phase)
            return 0
        return int(runner.do(given.phase) > 0)
    except IncompleteError as error:
        print(f"{given.phase}: {error}", file=sys.stderr)
        return 2


def _leave(number: int, frame: FrameType | None) -> None:
    """Ends this process by an exception, which ends the training with it."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
