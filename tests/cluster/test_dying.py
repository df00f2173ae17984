"""A process that dies ends the whole run, with its cause and a code that is not 0; none is left behind."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLED = r"process 1 of 2 \(pid \d+\) was killed by SIGKILL, as the system does where memory runs out"
ORPHANED = r"process 1 of .* ends, for the first one is gone without a word: it was killed, as the system does where .*"
ENDED = r"process 1 of 2 \(pid \d+\) ended with the code {}; what it said stands above"
UNFORESEEN = r"process {} of 2: KeyError: 'what nobody foresaw'"
REFUSED = r"process {} of 2: the images are torch\.uint8, where a network takes normalized floats: .*"

LOST = "process 0 of 2 lost the connection to another process, which says why"


def running(mark: Path) -> list[str]:
    """The numbers of the processes that have a path on their command line, which have some seconds to go."""
    for _ in range(100):
        lines = subprocess.run(
            ["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        found = [line.split()[0] for line in lines if str(mark) in line]
        if not found:
            break
        time.sleep(0.3)
    return found


def fit(folder: Path, rank: int | None, how: str, when: str, *launcher: str) -> tuple[int, list[str], str]:
    """Two processes, of which one dies; the code, the errors of `design-train`, and all that was said."""
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [*launcher, sys.executable, "-m", "design_lightning", "fit", "--config", str(HERE / "two_stages.yaml")]
    command += ["--trainer.default_root_dir", str(folder), "--trainer.logger.init_args.save_dir", str(folder)]
    command += ["--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    command += ["--trainer.callbacks+=dying.Dying", f"--trainer.callbacks.rank={'null' if rank is None else rank}"]
    command += [f"--trainer.callbacks.how={how}", f"--trainer.callbacks.when={when}"]
    log = folder / "said"
    with log.open("w") as file:  # not a pipe, which a process that is left behind would keep open
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=240)
    assert running(folder) == []
    said = log.read_text()
    return done.returncode, re.findall(r"^design-train: error: (.*)$", said, re.MULTILINE), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "how", "when", "code", "errors"),
    [
        (1, "killed", "step", 137, [KILLED]),
        (1, "exits", "step", 7, [ENDED.format(7)]),
        (1, "leaves", "step", 1, [ENDED.format(0)]),
        (1, "raises", "step", 1, [UNFORESEEN.format(1), ENDED.format(1)]),
        (1, "refuses", "setup", 1, [REFUSED.format(1), ENDED.format(1)]),
        (1, "hangs", "step", 137, [KILLED]),
        (0, "killed", "step", -9, [ORPHANED]),
        (0, "raises", "setup", 1, [UNFORESEEN.format(0)]),
        (0, "hangs", "step", -9, [ORPHANED]),
    ],
)
def test_a_process_that_dies_ends_all_and_says_why(
    tmp_path: Path, rank: int, how: str, when: str, code: int, errors: list[str]
) -> None:
    ended, said, everything = fit(tmp_path, rank, how, when)
    assert ended == code, everything
    assert len(said) == len(errors), everything
    for line, pattern in zip(said, errors, strict=True):
        assert re.fullmatch(pattern, line), everything
    # The only traceback is that of the error which nobody foresaw.
    assert everything.count("Traceback (most recent call last)") == (how == "raises"), everything


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tmp_path: Path) -> None:
    code, said, everything = fit(tmp_path, None, "refuses", "step")
    assert code == 1
    assert len(said) == 1, everything
    assert re.fullmatch(REFUSED.format(0), said[0]), everything


@pytest.mark.slow
@pytest.mark.parametrize(("how", "reason"), [("killed", "SIGKILL"), ("refuses", REFUSED.format(1))])
def test_torchrun_ends_all_processes(tmp_path: Path, how: str, reason: str) -> None:
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--no-python"]
    code, said, everything = fit(tmp_path, 1, how, "step", *torchrun)
    assert code == 1
    assert re.search(reason, everything), everything
    assert re.search(r"Root Cause[^=]* rank +: 1 ", everything), everything
    assert set(said) <= {line for line in said if re.fullmatch(reason, line)} | {LOST}, everything
    assert "pair.cc" not in everything  # of gloo's own words nothing
