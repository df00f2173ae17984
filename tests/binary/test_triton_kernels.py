"""Runs `kernels_against_torch`: on a CPU in Triton's interpreter, which must be chosen before Triton is imported, and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def run(environment: dict[str, str]) -> str:
    tests = Path(__file__).with_name("kernels_against_torch.py")
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses", "0", str(tests)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_in_the_interpreter() -> None:
    assert "29 passed" in run({"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    assert "29 passed" in run({"TRITON_INTERPRET": "0"})
