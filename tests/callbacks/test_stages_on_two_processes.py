"""Stages, annealing and random states on two processes (gloo): a stopped and resumed run equals an undisturbed one there, too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import logging, sys, warnings
logging.disable(logging.INFO)
warnings.simplefilter("ignore")
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
import design_lightning as dl
from design_lightning.callbacks import KernelAnnealing, RandomStates, TwoStageTraining
from design_lightning.data import FashionMNISTSubset
from design_lightning.surgery import binary_layers

torch.set_num_threads(1)
stop, ckpt = int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None

class Few(FashionMNISTSubset):
    def _load(self, split):
        samples = super()._load(split)
        return samples.subset(torch.arange(64) * 50) if split == "train" else samples

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Linear(16, 10))
        dl.binarize_(self.net, dl.BinaryConfig(weight="learned", learn_kernel=True), example_input=(2, 1, 28, 28))
        self.stages = []
    def training_step(self, batch, batch_idx):
        self.stages.append((self.net[3].stage, round(self.net[3].activation.scale.item(), 4)))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == stop:
            trainer.save_checkpoint("stopped.ckpt")
            trainer.should_stop = True
            trainer.limit_train_batches = 0
            sys.exit(0)

if __name__ == "__main__":
    module = Net()
    torch.manual_seed(0 if ckpt is None else 9)
    callbacks = [TwoStageTraining(switch=0.5), KernelAnnealing(), RandomStates(), Stop()]
    trainer = Trainer(max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
    trainer.fit(module, Few(batch_size=8, num_workers=0, image_size=28), ckpt_path=ckpt)
    torch.save([module.state_dict(), module.stages], f"rank{trainer.global_rank}.pt")
"""


def run(folder: Path, *arguments: str) -> list[list]:
    for old in folder.glob("rank*.pt"):
        old.unlink()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1) if (folder / f"rank{rank}.pt").exists()]


@pytest.mark.slow
def test_two_processes_stop_and_resume_exactly(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    whole = run(tmp_path, "-1")
    (first, stages), (second, _) = whole
    assert [stage for stage, _ in stages] == ["activations"] * 6 + ["both"] * 6
    assert [scale for _, scale in stages] == [round(step / 11, 4) for step in range(12)]
    assert all(torch.equal(value, second[name]) for name, value in first.items() if isinstance(value, torch.Tensor))
    run(tmp_path, "5")
    resumed = run(tmp_path, "-1", "stopped.ckpt")
    for rank in (0, 1):
        for name, value in whole[rank][0].items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, resumed[rank][0][name]), name
        assert resumed[rank][1] == whole[rank][1][5:]
