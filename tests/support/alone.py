"""Runs a test in a process of its own, which a server forks that has imported everything already."""

import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path

import pytest

SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["pytest", "timm", "design_lightning.commands.lightning", "design_lightning.callbacks"])


def run_alone(test: str, root: Path) -> str:
    """What a test prints that fails; empty if it passes.

    Args:
        test: its node id.
        root: the folder that the id is relative to.
    """
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = SERVER.Process(target=_run, args=(test, root, log.name))
        process.start()
        process.join()
        printed = Path(log.name).read_text(encoding="utf-8", errors="replace")
        return f"ended with {process.exitcode}\n{printed[-8000:]}" if process.exitcode else ""


def _run(test: str, root: Path, log: str) -> None:
    file = os.open(log, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(root)
    os.environ["OWN_PROCESS"] = "1"
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    sys.exit(pytest.main(["-q", "--numprocesses", "0", "-m", "own_process", test]))
