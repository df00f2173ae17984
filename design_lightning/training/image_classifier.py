"""`ImageClassifier`: what is measured of a network that classifies images, and what it predicts, as a LightningModule."""

from collections.abc import Sequence
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from design_lightning.training.batch_checks import check_batch

Split = Literal["val", "test"]


class ImageClassifier(LightningModule):
    """The base: validates, tests and predicts; a subclass has `forward`, from images [B, C, H, W] to logits [B, K].

    Labels below 0 are padding of an evaluation sampler and count nowhere. Logged: `val/loss`, `val/top1`, `val/top5` (with more
    than five classes); `test/` alike.

    Args:
        num_classes: K.
        class_names: one for each class.
        loss: of logits [B, K] and labels [B].

    Raises:
        ValueError: if there are fewer than two classes, or not as many names.
    """

    def __init__(self, num_classes: int, class_names: Sequence[str] | None, loss: nn.Module) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier tells at least two classes apart")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but there are {len(class_names)} class names")
        self.class_names = None if class_names is None else tuple(class_names)
        self.num_classes = num_classes
        self.loss = loss

        def accuracies(prefix: str, *top: int) -> MetricCollection:
            micro = {f"top{k}": MulticlassAccuracy(self.num_classes, top_k=k, average="micro") for k in top}
            return MetricCollection(dict(micro), prefix=prefix)

        top = (1, 5) if self.num_classes > 5 else (1,)
        self.train_accuracy = accuracies("train/", 1)
        self.accuracy = nn.ModuleDict({split: accuracies(f"{split}/", *top) for split in ("val", "test")})
        self.mean_loss = nn.ModuleDict({split: MeanMetric() for split in ("val", "test")})
        self.confusion = MulticlassConfusionMatrix(self.num_classes)
        self.test_confusion: Tensor | None = None
        """[K, K]: images of the row's class that were taken for the column's, after `test`."""

    # Input

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuses NaN, infinity and labels out of range, while the batch is still on the CPU and outside any graph."""
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            stage = self._trainer.state.stage if self._trainer else None
            training = self._trainer is not None and self.trainer.training
            where = (f"{stage.value} batch" if stage else "batch") + (
                f" at step {self.trainer.global_step}" if training else ""
            )
            check_batch(batch[0], batch[1] if len(batch) > 1 else None, self.num_classes, where, training)
        return batch

    # Steps

    def on_validation_epoch_start(self) -> None:
        """Starts the metrics anew."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Starts the metrics anew."""
        self._reset("test")
        self.confusion.reset()

    def _reset(self, split: Split) -> None:
        # Lightning resets metrics in the inference mode of the last evaluation; the next one may run outside of it.
        cast(MeanMetric, self.mean_loss[split]).reset()
        cast(MetricCollection, self.accuracy[split]).reset()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Adds a batch to the test metrics and the confusion matrix."""
        logits, labels = self._evaluate("test", batch)
        self.confusion.update(logits, labels)

    def _evaluate(self, split: Split, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = batch
        logits = self(images)
        mean_loss, accuracy = cast(MeanMetric, self.mean_loss[split]), cast(MetricCollection, self.accuracy[split])
        real = labels >= 0
        logits, labels = logits[real], labels[real]
        if len(labels):
            mean_loss.update(self.loss(logits, labels), weight=len(labels))
            accuracy.update(logits, labels)
        self.log(f"{split}/loss", mean_loss)
        for name, metric in accuracy.items(keep_base=False, copy_state=False):
            self.log(str(name), metric, prog_bar=str(name).endswith("top1"))
        return logits, labels

    def on_test_epoch_end(self) -> None:
        """Keeps the confusion matrix over all processes."""
        self.test_confusion = self.confusion.compute().cpu()

    def predict_step(self, batch: tuple[Tensor, Sequence[str]], batch_idx: int) -> dict[str, Any]:
        """`paths`, as the data gives them (numbers where it gives none), and `probabilities` [B, K], float32."""
        images, paths = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
        if not (isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths)):
            paths = [f"batch {batch_idx}, image {i}" for i in range(len(images))]
        # A batch of damaged images alone is empty, which not every network takes.
        logits = self(images) if len(images) else images.new_zeros(0, self.num_classes)
        return {"paths": list(paths), "probabilities": logits.float().softmax(-1)}
