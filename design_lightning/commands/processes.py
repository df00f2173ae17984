"""The processes of a run share one fate: where one fails, all end, with its cause and a code that is not 0."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from design_lightning.cli import DEBUG, users_error

GRACE = 15.0
"""Seconds that a process has to end by itself, once another one has failed."""
PATIENCE = 3.0
"""Seconds that another process than the first waits before it says its error: where all fail alike, the first says it alone."""
LOST_ANOTHER = 77
"""The code of a process that failed only because another one did."""
STARTED_BY = "DESIGN_TRAIN_STARTED_BY"
"""The environment variable with the number of the process that started this one."""
ORPHANED = "ends, for the first one is gone without a word: it was killed, as the system does where memory runs out"

_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|was likely closed|failed to recv|remote process exit",
    re.I,
)


class WatchedLauncher(_SubprocessScriptLauncher):
    """Starts the other processes of a machine, as Lightning does, and keeps watch over them.

    Lightning's own watch kills all at once, process 0 included, and tells no signal; and it says nothing where process 0 has an
    error of its own by then, that of a lost connection. This one leaves that process time to end, and then ends it.
    """

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Starts the processes if nobody else did, and calls the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            os.environ[STARTED_BY] = str(os.getpid())
            self._call_children_scripts()
            _in_background(self._watch)
        elif os.environ.get(STARTED_BY) == str(os.getppid()):
            _in_background(_watch_parent)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _watch(self) -> None:
        while (failed := self.failed()) is None:
            time.sleep(0.5)
        time.sleep(GRACE)
        _say(self.cause(failed))
        self.end(failed[1].returncode)

    def failed(self, or_left: bool = False) -> tuple[int, subprocess.Popen] | None:
        """The rank and the process of one that failed, or also left with the code 0; rather one that failed by itself."""
        first = self.cluster_environment.node_rank() * self.num_processes
        failed = [
            (first + i, process)
            for i, process in enumerate(self.procs, start=1)
            if process.poll() or (or_left and process.poll() == 0)
        ]
        return min(failed, key=lambda each: each[1].returncode == LOST_ANOTHER, default=None)

    def cause(self, failed: tuple[int, subprocess.Popen]) -> str:
        """One line on how a process ended."""
        rank, process = failed
        which = f"process {rank} of {self.num_processes * self.num_nodes} (pid {process.pid})"
        if process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            memory = ", as the system does where memory runs out" if name == "SIGKILL" else ""
            return f"{which} was killed by {name}{memory}"
        return f"{which} ended with the code {process.returncode}; what it said stands above"

    def end(self, code: int) -> NoReturn:
        """Ends this process and those that it started; a negative code is a signal's."""
        self.kill(signal.SIGKILL)
        _end(code if code > 0 else 128 - code)


def watch_(trainer: Trainer) -> None:
    """Has a trainer that starts its processes itself watch over them."""
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = WatchedLauncher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )


@contextmanager
def one_fate(trainer: Trainer) -> Iterator[None]:
    """Inside, an error ends all processes of a run. The process that failed says why; one that only lost it says at most a line.

    At the end process 0 waits for those that it started, and takes over the code of one that failed.
    """
    try:
        yield
    except SIGTERMException:
        raise
    except Exception as error:
        if trainer.world_size == 1:
            raise
        started = _that_started_others(trainer)
        if _is_lost_connection(error):
            _end_after_another(trainer, started)
        if trainer.global_rank:
            time.sleep(PATIENCE)
        own = error if isinstance(error, MisconfigurationException) else users_error(error)
        if own is None or os.environ.get(DEBUG):
            traceback.print_exception(error)
        reason = f"{type(error).__name__}: {error}" if own is None else str(own)
        _say(f"process {trainer.global_rank} of {trainer.world_size}: {reason}")
        if started is not None:
            started.end(1)
        _end(1)
    if launcher := _that_started_others(trainer):
        _within(GRACE, lambda: all(process.poll() is not None for process in launcher.procs) or None)
        if failed := launcher.failed():
            _say(launcher.cause(failed))
            launcher.end(failed[1].returncode)


def _that_started_others(trainer: Trainer) -> WatchedLauncher | None:
    launcher = trainer.strategy.launcher
    return launcher if isinstance(launcher, WatchedLauncher) and launcher.procs else None


def _end_after_another(trainer: Trainer, launcher: WatchedLauncher | None) -> NoReturn:
    """Ends this process, which lost the connection to another one; names that one where this process can know it."""
    this = f"process {trainer.global_rank} of {trainer.world_size}"
    if launcher is not None:
        if failed := _within(PATIENCE, launcher.failed) or launcher.failed(or_left=True):
            _say(launcher.cause(failed))
            launcher.end(failed[1].returncode or 1)
        _say(f"{this} lost the connection to a process of another machine, which says why")
        launcher.end(1)
    if parent := os.environ.get(STARTED_BY):
        if _within(PATIENCE, lambda: str(os.getppid()) != parent or None):
            _say(f"{this} {ORPHANED}")
    else:
        _say(f"{this} lost the connection to another process, which says why")
    _end(LOST_ANOTHER)


def _watch_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
    time.sleep(GRACE)
    _say(f"process {os.environ['LOCAL_RANK']} of this machine {ORPHANED}")
    _end(LOST_ANOTHER)


def _within(seconds: float, look: Callable[[], Any]) -> Any:
    """What a look finds, as soon as it does; None if it does not in time."""
    deadline = time.monotonic() + seconds
    while (found := look()) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _is_lost_connection(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that of a collective whose other side is gone."""
    while error is not None:
        if isinstance(error, RuntimeError) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _end(code: int) -> NoReturn:
    """Ends this process at once: an orderly end would wait for collectives that nobody answers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _say(message: str) -> None:
    """One line on standard error, in one piece: other processes may write there, too."""
    sys.stderr.write(f"design-train: error: {' '.join(message.split())}\n")
    sys.stderr.flush()


def _in_background(watch: Callable[[], None]) -> None:
    threading.Thread(target=watch, daemon=True, name="watch over processes").start()
