"""`PreemptionCheckpoint`: whenever the signal comes, the run goes on elsewhere and ends as it would have ended."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.callbacks import (
    KernelAnnealing,
    LatentWeightClipping,
    PreemptionCheckpoint,
    RandomStates,
    TwoStageTraining,
)
from design_lightning.data import FashionMNISTSubset

EPOCHS, BATCHES = 3, 4


class Few(FashionMNISTSubset):
    """Four batches of eight images."""

    def _load(self, split: str) -> Any:
        samples = super()._load(split)
        return samples.subset(torch.arange(8 * BATCHES) * 50) if split == "train" else samples


class Net(LightningModule):
    """Batch norm, dropout, a learned scale and a kernel that is annealed: all that a resume may forget."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 16), nn.Linear(16, 10)
        )
        dl.binarize_(self.net, dl.BinaryConfig(weight="learned"), example_input=(2, 1, 28, 28))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class Lines(Logger):
    """Keeps what is logged, with its step."""

    name, version = "lines", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step or 0, {name: float(value) for name, value in metrics.items()}))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass


class SignalAt(Callback):
    """Sends a signal to its own process within a certain training or validation batch."""

    def __init__(self, batch: int, number: int = signal.SIGUSR1, where: str = "train") -> None:
        self.batch, self.number, self.where, self.seen = batch, number, where, 0

    def _count(self, where: str) -> None:
        if where == self.where:
            if self.seen == self.batch:
                os.kill(os.getpid(), self.number)
            self.seen += 1

    def on_before_backward(self, *_: Any) -> None:
        self._count("train")

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._count("validation")


def fit(
    root: Path, *others: Callback, resume: bool = False, every: int | None = None, **options: Any
) -> tuple[Net, list[Any], Trainer]:
    module, lines = Net(), Lines()
    torch.manual_seed(9 if resume else 0)
    own = [TwoStageTraining(switch=0.5), LatentWeightClipping(0.05), KernelAnnealing(), RandomStates()]
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=1,
        default_root_dir=root,
        callbacks=[PreemptionCheckpoint(every), *own, *others],
        logger=lines,
        log_every_n_steps=1,
        limit_val_batches=2,
        num_sanity_val_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    data = Few(batch_size=8, num_workers=0, image_size=28)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    try:
        trainer.fit(module, data, ckpt_path="hpc" if resume else None)
    except SystemExit as ended:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        lines.lines.append((-1, {"code": float(str(ended.code))}))
    return module, lines.lines, trainer


def equal(one: Net, other: Net) -> bool:
    mine, others = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], others[name]) for name in mine if isinstance(mine[name], Tensor))


@pytest.mark.parametrize(
    "options", [{}, {"val_check_interval": 2}, {"accumulate_grad_batches": 2}, {"check_val_every_n_epoch": 2}], ids=str
)
def test_at_whatever_batch_the_signal_comes(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, logged, _ = fit(tmp_path / "whole", **options)
    for batch in range(EPOCHS * BATCHES - 1):
        root = tmp_path / str(batch)
        _, before, _ = fit(root, SignalAt(batch), every=3, **options)
        assert before.pop() == (-1, {"code": 138.0})
        resumed, after, _ = fit(root, resume=(root / "hpc_ckpt_1.ckpt").is_file(), **options)
        assert equal(resumed, whole), f"batch {batch}"
        assert logged[: len(before)] == before, f"batch {batch}"
        assert logged[len(logged) - len(after) :] == after, f"batch {batch}"
        step = options.get("accumulate_grad_batches", 1)
        if (batch // step * step + step) % options.get("val_check_interval", BATCHES):  # else within a validation
            assert len(before) + len(after) == len(logged), f"batch {batch} was done twice"


@pytest.mark.parametrize("batch", [0, 2, 5])
def test_a_signal_within_a_validation_costs_the_steps_since_the_last_file(tmp_path: Path, batch: int) -> None:
    whole, _, _ = fit(tmp_path / "whole")
    _, before, trainer = fit(tmp_path, SignalAt(batch, where="validation"), every=3)
    epochs = 1 + batch // 2
    assert trainer.global_step == epochs * BATCHES
    if batch % 2:  # the last batch of a validation, which is done then
        expected = min(epochs * BATCHES, EPOCHS * BATCHES)
    else:
        expected = epochs * BATCHES // 3 * 3
        assert before[-1] == (-1, {"code": 138.0})
    stored = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    assert stored == (expected if batch < 5 else 9)
    resumed, _, _ = fit(tmp_path, resume=True)
    assert equal(resumed, whole)


def test_preempted_again_at_the_first_batch(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path / "whole")
    fit(tmp_path, SignalAt(4))

    class AtOnce(Callback):
        def on_train_start(self, *_: Any) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    for _ in range(2):
        _, lines, _ = fit(tmp_path, AtOnce(), resume=True)
        assert lines == [(-1, {"code": 138.0})]
    assert equal(fit(tmp_path, resume=True)[0], whole)


def test_sigterm_saves_and_ends_with_its_own_code(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    _, lines, _ = fit(tmp_path, SignalAt(4, signal.SIGTERM))
    assert lines[-1] == (-1, {"code": 143.0})
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 5
    fit(tmp_path, resume=True)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]


def test_the_best_checkpoint_is_known_again(tmp_path: Path) -> None:
    keep = {"enable_checkpointing": True}
    fit(tmp_path, ModelCheckpoint(monitor="val", filename="best"), SignalAt(5), **keep)
    best = ModelCheckpoint(monitor="val", filename="best")
    fit(tmp_path, best, resume=True, **keep)
    whole = ModelCheckpoint(monitor="val", filename="best")
    fit(tmp_path / "whole", whole, **keep)
    assert best.dirpath == str(tmp_path / "checkpoints")
    assert best.best_model_score == whole.best_model_score
    assert Path(best.best_model_path).is_file()
    assert best.best_k_models.keys() == {best.best_model_path}


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="every_n_steps=0 must be at least 1"):
        PreemptionCheckpoint(0)
    (tmp_path / "hpc_ckpt_7.ckpt").touch()
    with pytest.raises(ValueError, match=r"hpc_ckpt_7\.ckpt, which is not of this run"):
        fit(tmp_path)
    trainer = Trainer(callbacks=[RandomStates(), PreemptionCheckpoint()], logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="RandomStates stands before PreemptionCheckpoint"):
        trainer.fit(Net(), Few(batch_size=8, num_workers=0, image_size=28))
