"""`kill -9` at random moments, each followed by a resume: few steps are lost, no checkpoint is broken, the weights are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TIMES, EVERY = 20, 4


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "killing.py"), str(tmp_path), str(TIMES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in (tmp_path / "kills").read_text().splitlines()]
    assert len(kills) == TIMES
    for kill in kills:
        saved = kill["stored"].get("hpc_ckpt_1.ckpt", 0)
        # Steps EVERY, 2 * EVERY, ... are saved before the next begins: one more may be done when the process is killed in between.
        assert 0 <= kill["done"] - saved <= EVERY, kill
    whole, killed = (
        torch.load(tmp_path / name / "checkpoints" / "final.ckpt", weights_only=True) for name in ("whole", "killed")
    )
    assert whole["global_step"] == killed["global_step"] == 240
    for name, value in whole["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, killed["state_dict"][name]), name
