"""A CSV of predictions: path, label, probability."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn


class PredictionWriter(BasePredictionWriter):
    """During `predict`, writes one row an image, in the order of the data: its path, the label, and its probability.

    The LightningModule's `predict_step` gives `{"paths": [...], "probabilities": [B, K]}`, and may have `class_names`.
    With several processes each writes a file of its own, which the first one joins.

    Args:
        path: of the CSV; `predictions.csv` in the log folder of the run if null.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._written = 0
        self._target: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._written = 0
        # Asks the other processes, so it is done once here: later a process may have fewer batches than another.
        folder = trainer.log_dir or trainer.default_root_dir
        target = Path(trainer.strategy.broadcast(self.path or str(Path(folder) / "predictions.csv")))
        self._target = target
        target.parent.mkdir(parents=True, exist_ok=True)
        self._part(target, trainer.global_rank).write_text("", encoding="utf-8")

    def write_on_batch_end(  # noqa: D102
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        if self._target is None:
            return
        if not (isinstance(prediction, Mapping) and {"paths", "probabilities"} <= prediction.keys()):
            rank_zero_warn(
                f"no {self._target.name} is written: predict_step of {type(pl_module).__name__} does not give "
                '{"paths": [...], "probabilities": [B, K]}'
            )
            self._part(self._target, trainer.global_rank).unlink(missing_ok=True)
            self._target = None
            return
        names = getattr(pl_module, "class_names", None)
        probabilities, labels = prediction["probabilities"].max(-1)
        with self._part(self._target, trainer.global_rank).open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            for path, label, probability in zip(
                prediction["paths"], labels.tolist(), probabilities.tolist(), strict=True
            ):
                # Lightning deals the images to the processes in turn.
                place = self._written * trainer.world_size + trainer.global_rank
                writer.writerow([place, path, names[label] if names else label, f"{probability:.6f}"])
                self._written += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        trainer.strategy.barrier("predictions")
        target = self._target
        if target is None or not trainer.is_global_zero:
            return
        rows: list[list[str]] = []
        for rank in range(trainer.world_size):
            part = self._part(target, rank)
            with part.open(newline="", encoding="utf-8") as file:
                rows.extend(csv.reader(file))
            part.unlink()
        rows.sort(key=lambda row: int(row[0]))
        with target.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "probability"])
            writer.writerows(row[1:] for row in rows)
        print(f"written: {target} ({len(rows)} images)")

    @staticmethod
    def _part(target: Path, rank: int) -> Path:
        return target.with_name(f"{target.name}.rank{rank}")
