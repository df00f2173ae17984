"""`DesignClassifier`: a timm backbone, binarized, as a LightningModule."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, ReduceLROnPlateau
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from design_lightning.surgery import BinarizationReport, BinaryConfig, binarize_, set_stage_
from design_lightning.training.backbone import create_backbone, load_weights_
from design_lightning.training.groups import parameter_groups
from design_lightning.training.schedules import CosineDecay, with_warm_up

FORMAT_VERSION = 1
Split = Literal["val", "test"]


class DesignClassifier(LightningModule):
    """Trains a binarized timm network on images [B, C, H, W] with labels [B].

    Labels below 0 are padding of an evaluation sampler and count nowhere. Logged: `train/loss`, `train/top1`; `val/loss`,
    `val/top1`, `val/top5` (with more than five classes); `test/` alike.

    A checkpoint holds what rebuilds the network (`load_from_checkpoint(path)` needs nothing else, and downloads no
    weights); optimizer and scheduler are rebuilt from the configuration that `design-train` saves beside it.

    Args:
        backbone: the name of a network of timm, or of `design_lightning.models`.
        num_classes: K; comes from the data if there is one.
        binary: how to binarize the backbone; null leaves it float.
        weights: a checkpoint of the same network whose weights are the start, as stage two starts from stage one; the stage is
            that of `binary`.
        pretrained: start from timm's pretrained weights, which become the latent weights.
        backbone_args: what else `timm.create_model` takes, such as `{drop_path_rate: 0.1}`.
        input_size: (C, H, W) of the images; comes from the data if there is one.
        class_names: one for each class; comes from the data if there is one.
        mean: of the input normalisation, a value a channel; kept for export.
        std: of the input normalisation, a value a channel; kept for export.
        loss: of logits [B, K] and labels [B]; cross entropy if not given.
        optimizer: from parameter groups to an optimizer. Its `weight_decay` does not apply to norms, biases and scales.
        scheduler: from an optimizer to a scheduler, or null for a constant rate.
        scheduler_interval: whether the scheduler goes by optimizer `step` or `epoch`.
        warmup_steps: optimizer steps over which the learning rate rises linearly.
        warmup_epochs: the same in epochs, which may be fractions; use one of the two.
        latent_weight_decay: of the latent weights; the optimizer's where null.
        channels_last: keep images and weights in the channels-last memory format.
        compile: compile the backbone with `torch.compile`.

    Raises:
        ValueError: if the backbone is unknown (names the nearest), the arguments contradict each other, or `binarize_` does.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 1000,
        binary: BinaryConfig | None = BinaryConfig(),  # noqa: B008  a frozen value
        weights: str | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        loss: nn.Module | None = None,
        optimizer: OptimizerCallable = lambda groups: torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-5),
        scheduler: LRSchedulerCallable | None = CosineDecay,
        scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        latent_weight_decay: float | None = 0.0,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(binary, Mapping):  # as a checkpoint stores it
            binary = BinaryConfig.from_dict(binary)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier tells at least two classes apart")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"num_classes is {num_classes}, but there are {len(class_names)} class names")
        if warmup_steps and warmup_epochs:
            raise ValueError(f"warmup_steps is {warmup_steps} and warmup_epochs {warmup_epochs}; set one of the two")
        if (warmup_steps or warmup_epochs) and scheduler is not None and scheduler_interval == "epoch":
            raise ValueError("a warm-up goes by optimizer steps, so it needs scheduler_interval: step")
        self.save_hyperparameters(
            {
                "format_version": FORMAT_VERSION,
                "backbone": backbone,
                "num_classes": num_classes,
                "binary": None if binary is None else binary.to_dict(),
                "pretrained": False,
                # The checkpoint holds the weights; a file that they once came from may be gone.
                "backbone_args": {k: v for k, v in (backbone_args or {}).items() if k != "checkpoint_path"},
                "input_size": None if input_size is None else list(input_size),
                "class_names": None if class_names is None else list(class_names),
                "mean": None if mean is None else list(mean),
                "std": None if std is None else list(std),
                "channels_last": channels_last,
            }
        )
        self.class_names = None if class_names is None else tuple(class_names)
        self.num_classes = num_classes
        self.binary_config = binary
        self.loss = nn.CrossEntropyLoss() if loss is None else loss
        self.channels_last = channels_last
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self._scheduler_interval = scheduler_interval
        self._warmup_steps = warmup_steps
        self._warmup_epochs = warmup_epochs
        self._latent_weight_decay = latent_weight_decay
        self._compile = compile
        self.backbone = create_backbone(backbone, num_classes, pretrained, backbone_args, input_size)
        shape = None if input_size is None else (2, *input_size)
        self.report: BinarizationReport | None = None if binary is None else binarize_(self.backbone, binary, shape)
        if weights is not None:
            self._load_weights(weights)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        self._configure_metrics()

    def _load_weights(self, path: str) -> None:
        """Starts from the backbone of a checkpoint; this module's configuration decides the stage."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"weights {path!r} is no file; give the checkpoint of an earlier run")
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ValueError(
                f"weights {path!r} is no checkpoint of an earlier run: {type(error).__name__}: {reason}"
            ) from error
        if not isinstance(stored, dict) or "state_dict" not in stored:
            raise ValueError(f"weights {path!r} is no checkpoint of an earlier run: it has no state_dict")
        load_weights_(self.backbone, stored["state_dict"], path)
        if self.binary_config is not None:
            set_stage_(self.backbone, self.binary_config.stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the state of a loss (class weights) from a checkpoint only where this module has the same loss."""
        own = self.state_dict().keys()
        for key in [k for k in checkpoint["state_dict"] if k.startswith("loss.") and k not in own]:
            del checkpoint["state_dict"][key]

    def _configure_metrics(self) -> None:
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

    def setup(self, stage: str) -> None:
        """Compiles the backbone, if that is asked for: after surgery, and after a callback copied the module."""
        if self._compile and stage == "fit" and self.backbone._compiled_call_impl is None:
            self.backbone.compile()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.backbone(images)
        return logits

    # Input

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuses NaN, infinity and labels out of range, while the batch is still on the CPU and outside any graph.

        A NaN compares false, so a binarizer would make it -1 and train on in silence.
        """
        if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Tensor):
            self._check_batch(batch[0], batch[1] if len(batch) > 1 else None)
        return batch

    def _check_batch(self, images: Tensor, labels: Any) -> None:
        stage = self._trainer.state.stage if self._trainer else None
        training = self._trainer is not None and self.trainer.training
        where = (f"{stage.value} batch" if stage else "batch") + (
            f" at step {self.trainer.global_step}" if training else ""
        )
        # One sum costs a small part of isfinite().all(), and is finite only if everything is (or nearly overflows).
        if images.is_floating_point() and images.numel() and not bool(torch.isfinite(images.float().sum())):
            bad = (~torch.isfinite(images)).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"NaN or infinity in {len(bad)} of {len(images)} images of the {where}: numbers {bad[:8]} of the batch; "
                    "look for a division by a zero std, or a damaged file"
                )
        if training and isinstance(labels, Tensor) and labels.numel() and int(labels.min()) < 0:
            raise ValueError(f"label {int(labels.min())} in the {where}; only evaluation pads with labels below 0")
        if isinstance(labels, Tensor) and labels.numel() and int(labels.max()) >= self.num_classes:
            raise ValueError(
                f"label {int(labels.max())} in the {where}, but the model has {self.num_classes} classes, 0 to "
                f"{self.num_classes - 1}; set num_classes, or look at the labels"
            )

    # Steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        logits = self(images)
        loss: Tensor = self.loss(logits, labels)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.train_accuracy.update(logits.detach(), labels)
        self.log_dict(self.train_accuracy, on_step=False, on_epoch=True)
        return loss

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
        return {"paths": list(paths), "probabilities": self(images).float().softmax(-1)}

    # Optimization

    def configure_optimizers(self) -> Any:
        """One optimizer over three parameter groups, and one scheduler that goes by optimizer steps."""
        groups = parameter_groups(self.backbone, self._latent_weight_decay)
        groups[-1]["params"] += [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        optimizer: Optimizer = self._make_optimizer(groups)
        if self._latent_weight_decay and "weight_decay" not in optimizer.defaults:
            raise ValueError(
                f"latent_weight_decay is {self._latent_weight_decay}, but {type(optimizer).__name__} has no weight decay; "
                "set it to null"
            )
        if self._make_scheduler is None and not (self._warmup_steps or self._warmup_epochs):
            return optimizer
        make = self._make_scheduler or partial(ConstantLR, factor=1.0)
        scheduler = make(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            if self._warmup_steps or self._warmup_epochs:
                raise ValueError(
                    "ReduceLROnPlateau goes by epochs and has no warm-up; leave warmup_steps and warmup_epochs out"
                )
            monitor = getattr(scheduler, "monitor", "val/loss")
            return [optimizer], [{"scheduler": scheduler, "monitor": monitor, "interval": "epoch"}]
        scheduler = with_warm_up(scheduler, self._count_warm_up(), self._count_steps())
        return [optimizer], [{"scheduler": scheduler, "interval": self._scheduler_interval}]

    def _count_steps(self) -> int | float:
        """How often the scheduler will step; infinite for training without an end."""
        if self._scheduler_interval == "step":
            return self.trainer.estimated_stepping_batches
        epochs = self.trainer.max_epochs
        return math.inf if epochs is None or epochs < 0 else epochs

    def _count_warm_up(self) -> int:
        if not self._warmup_epochs:
            return self._warmup_steps
        assert self.trainer.estimated_stepping_batches  # which loads the data that is counted below
        epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return round(self._warmup_epochs * epoch)
