"""Trains again and again, each time in a process that is killed by SIGKILL at a random moment, and resumes; for test_killed.py.

    python killing.py FOLDER TIMES

Processes are forked, since an import of torch takes longer than all that they do. FOLDER gets `kills`, a line of JSON for each: the
steps that were done, and those that the checkpoint holds.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from design_lightning.cli import main

HERE = Path(__file__).parent


class Killing(Callback):
    """Notes every step that is done, and has its own process killed somewhere after a random one, the writing of files included.

    Args:
        seed: of the moment; null for none.
        file: gets a line a step.
    """

    def __init__(self, file: str, seed: int | None = None) -> None:
        chance = random.Random(seed)
        self.after = -1 if seed is None else chance.randint(1, 5)
        self.share = 2 * chance.random()
        self.file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        os.write(self.file, f"{trainer.global_step}\n".encode())
        self.after -= 1
        if self.after == 0:
            step, self.began = time.monotonic() - self.began, time.monotonic()
            threading.Thread(target=self._kill, args=(self.share * step,), daemon=True).start()
        else:
            self.began = time.monotonic()

    @staticmethod
    def _kill(wait: float) -> None:
        time.sleep(wait)
        os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, seed: int | None) -> int:
    """One process until its end; returns how it ended, as `os.waitstatus_to_exitcode` says it."""
    process = os.fork()
    if process == 0:
        try:
            sys.stdout = sys.stderr = open(folder / "log", "a")  # noqa: SIM115
            arguments = ["fit", "--config", str(HERE / "two_stages.yaml"), "--trainer.max_epochs", "40"]
            arguments += ["--trainer.default_root_dir", str(folder), "--trainer.logger", "false"]
            arguments += ["--trainer.accelerator", "cpu", "--data.num_workers", "0"]
            arguments += ["--trainer.callbacks+=killing.Killing", f"--trainer.callbacks.file={folder / 'steps'}"]
            if seed is not None:
                arguments.append(f"--trainer.callbacks.seed={seed}")
            if (folder / "hpc_ckpt_1.ckpt").is_file():
                arguments += ["--ckpt_path", "hpc"]
            main(arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, times = Path(sys.argv[1]), int(sys.argv[2])
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    assert train(folder / "whole", None) == 0, (folder / "whole" / "log").read_text()
    killed = folder / "killed"
    for seed in range(times):
        code = train(killed, seed)
        assert code == -signal.SIGKILL, f"ended with {code}: {(killed / 'log').read_text()}"
        done = int((killed / "steps").read_text().split()[-1])
        stored = {
            file.name: torch.load(file, weights_only=True)["global_step"]  # all that is there can be read
            for file in killed.rglob("*.ckpt")
        }
        with (folder / "kills").open("a") as kills:
            kills.write(json.dumps({"done": done, "stored": stored}) + "\n")
    assert train(killed, None) == 0, (killed / "log").read_text()
