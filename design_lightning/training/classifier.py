"""`DesignClassifier`: a timm backbone, binarized, as a LightningModule."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from design_lightning.binary.weights import WEIGHT_BINARIZERS, IRNetWeight, ReCUWeight
from design_lightning.surgery import (
    BinarizationReport,
    BinaryConfig,
    binarize_,
    binary_layers,
    reattach_shortcuts_,
    set_stage_,
)
from design_lightning.surgery.probe import ProbeError, probe
from design_lightning.training.backbone import create_backbone, load_weights_
from design_lightning.training.batch_checks import check_floats
from design_lightning.training.bop import Bop
from design_lightning.training.checkpoint_files import read_checkpoint
from design_lightning.training.distillation import Distillation, Distiller
from design_lightning.training.gradient_checkpointing import batch_norm_statistics_kept, set_gradient_checkpointing_
from design_lightning.training.groups import parameter_groups
from design_lightning.training.image_classifier import ImageClassifier
from design_lightning.training.mixing import MixupCutmix
from design_lightning.training.per_group import PerGroupOptimizer
from design_lightning.training.processes import mean_over_processes
from design_lightning.training.rate import LearningRate
from design_lightning.training.schedules import CosineDecay
from design_lightning.training.sharding import check_strategy, is_sharded, shard_, take_buffers_of_first_process_

FORMAT_VERSION = 1


class DesignClassifier(ImageClassifier):
    """Trains a binarized timm network on images [B, C, H, W] with labels [B].

    Logged, over all processes: `train/loss`, `train/top1`, and what `ImageClassifier` logs. With a teacher also the terms of
    `train/loss` before they are weighted, `train/distillation` and `train/attention`. Of a mixed image `train/top1` counts the
    class with the larger share.

    A checkpoint holds what rebuilds the network (`load_from_checkpoint(path)` needs nothing else, and downloads no
    weights); optimizer and scheduler are rebuilt from the configuration that `design-train` saves beside it.

    Args:
        backbone: the name of a network of timm, or of `design_lightning.models`.
        num_classes: K; comes from the data if there is one.
        binary: how to binarize the backbone; null leaves it float.
        weights: a checkpoint of the same network whose weights are the start, as stage two starts from stage one; the stage is
            that of `binary`. All else begins anew: optimizer, schedule, random numbers, the order of the images. To go on as
            one run of both stages would, resume with `ckpt_path` and `TwoStageTraining`.
        pretrained: start from timm's pretrained weights, which become the latent weights.
        backbone_args: what else `timm.create_model` takes, such as `{drop_path_rate: 0.1}`.
        input_size: (C, H, W) of the images; comes from the data if there is one.
        class_names: one for each class; comes from the data if there is one.
        mean: of the input normalisation, a value a channel; kept for export, and for a teacher that learned with another.
        std: the same.
        loss: of logits [B, K] and labels [B] (soft ones [B, K] with `mixing`); cross entropy if not given.
        distillation: a teacher, whose outputs are learned in place of the labels or beside them; the loss of evaluation stays
            that of the labels. A checkpoint holds nothing of it.
        mixing: mixup and cutmix of training images.
        optimizer: from parameter groups to an optimizer; one that a YAML names without `weight_decay` has none. Its
            `weight_decay` does not apply to norms, biases and scales.
        scheduler: from an optimizer to a scheduler, or null for a constant rate.
        scheduler_interval: whether the scheduler goes by optimizer `step` or `epoch`.
        warmup_steps: optimizer steps over which the learning rate rises linearly.
        warmup_epochs: the same in epochs, which may be fractions; use one of the two.
        latent_weight_decay: of the latent weights; the optimizer's where null.
        channels_last: keep images and weights in the channels-last memory format.
        compile: compile the backbone with `torch.compile`.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them, by timm.

    Raises:
        ValueError: if the backbone is unknown (names the nearest), the arguments contradict each other, or `binarize_` does.
    """

    def __init__(
        self,
        backbone: str = "resnet18",
        num_classes: int = 1000,
        binary: BinaryConfig | None = {},  # type: ignore[assignment]  # noqa: B006  so that options find no field set
        weights: str | None = None,
        pretrained: bool = False,
        backbone_args: dict[str, Any] | None = None,
        input_size: tuple[int, int, int] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        loss: nn.Module | None = None,
        distillation: Distillation | None = None,
        mixing: MixupCutmix | None = None,
        optimizer: OptimizerCallable = lambda groups: torch.optim.Adam(groups, lr=1e-3),
        scheduler: LRSchedulerCallable | None = CosineDecay,
        scheduler_interval: Literal["step", "epoch"] = "step",
        warmup_steps: int = 0,
        warmup_epochs: float = 0.0,
        latent_weight_decay: float | None = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__(num_classes, class_names, nn.CrossEntropyLoss() if loss is None else loss)
        if isinstance(binary, Mapping):  # as a checkpoint stores it
            binary = BinaryConfig.from_dict(binary)
        if mixing is not None:
            mixing.check_loss(loss)
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
        self._learning_rate = LearningRate(scheduler, scheduler_interval, warmup_steps, warmup_epochs)
        self.binary_config = binary
        self.channels_last = channels_last
        self.distillation = distillation
        self.mixing = mixing
        self._distiller: Distiller | None = None  # no module, so that the teacher is in no checkpoint and no copy
        self._input_size = input_size
        self._normalisation = None if mean is None or std is None else (mean, std)
        self._make_optimizer = optimizer
        self._latent_weight_decay = latent_weight_decay
        self._compile = compile
        self._gradient_checkpointing = gradient_checkpointing
        self.backbone = create_backbone(backbone, num_classes, pretrained, backbone_args, input_size)
        shape = None if input_size is None else (2, *input_size)
        try:
            if binary is None and shape is not None:
                probe(self.backbone, shape)
            self.report: BinarizationReport | None = None if binary is None else binarize_(self.backbone, binary, shape)
        except (ProbeError, ValueError) as error:
            if shape is None or not isinstance(reason := error.__cause__ or error, ProbeError):
                raise
            raise ValueError(
                f"{backbone} cannot take images of {'x'.join(map(str, shape[1:]))}: give the data another image_size, or the "
                f"network its own with backbone_args, such as img_size of a vision transformer. Its forward says: {reason}"
            ) from error
        if weights is not None:
            self._load_weights(weights)
        if gradient_checkpointing:
            set_gradient_checkpointing_(self.backbone)
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)

    def _load_weights(self, path: str) -> None:
        """Starts from the backbone of a checkpoint; this module's configuration decides the stage."""
        stored = read_checkpoint(path, "weights")
        load_weights_(self.backbone, stored["state_dict"], path)
        if self.binary_config is not None:
            set_stage_(self.backbone, self.binary_config.stage)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the state of a loss (class weights) from a checkpoint only where this module has the same loss."""
        own = self.state_dict().keys()
        weights = checkpoint.get("state_dict", {})  # none where the strategy loads them itself
        for key in [k for k in weights if k.startswith("loss.") and k not in own]:
            del weights[key]

    def setup(self, stage: str) -> None:
        """Loads the teacher and compiles the backbone, where asked for: after surgery, and after a callback copied the module."""
        if self.distillation is not None and stage == "fit":
            self._let_go_of_teacher()
            self._distiller = Distiller(
                self.distillation,
                self.backbone,
                self.num_classes,
                self._input_size,
                self._normalisation,
                self.channels_last,
            )
        if self._compile and stage == "fit" and self.backbone._compiled_call_impl is None:
            self.backbone.compile()

    def configure_model(self) -> None:
        """Shards the weights, where the strategy is `ModelParallelStrategy`.

        Raises:
            ValueError: with a strategy in which binary layers do not work; names those that do.
        """
        if self._trainer is None:
            return
        check_strategy(self.trainer)
        if is_sharded(self.trainer):
            shard_(self.backbone, cast(ModelParallelStrategy, self.trainer.strategy))
            if any(True for _ in self.loss.parameters()):
                shard_(self.loss, cast(ModelParallelStrategy, self.trainer.strategy))

    def on_validation_start(self) -> None:
        """Has all processes validate one network, where each has batch-norm statistics of its own images."""
        if is_sharded(self.trainer):
            take_buffers_of_first_process_(self.backbone)

    on_test_start = on_validation_start

    def teardown(self, stage: str) -> None:
        """Lets go of the teacher."""
        if stage == "fit":
            self._let_go_of_teacher()

    def _let_go_of_teacher(self) -> None:
        if self._distiller is not None:
            self._distiller.remove()
            self._distiller = None

    def on_fit_start(self) -> None:
        """Keeps shortcuts where the strategy replaced batch norms by synchronised ones."""
        reattach_shortcuts_(self.backbone)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W]."""
        check_floats(images)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.backbone(images)
        return logits

    # Training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        targets = labels
        if self.mixing is not None:
            images, targets = self.mixing(images, labels, self.num_classes, self.current_epoch)
            labels = targets.argmax(-1)
        terms: dict[str, Tensor] = {}
        if self._distiller is None:
            logits = self(images)
            loss: Tensor = self.loss(logits, targets)
        else:
            logits, terms = self._distiller(self, images)
            loss = self._distiller.weigh(terms, lambda: self.loss(logits, targets))
        logged = {"loss": loss, **terms}
        means = mean_over_processes(torch.stack([value.detach() for value in logged.values()]))
        for name, value in zip(logged, means.unbind(), strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss")
        self.train_accuracy.update(logits.detach(), labels)
        self.log_dict(self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The backward pass; batch norms count no batch twice where it computes activations again."""
        with batch_norm_statistics_kept(self.backbone) if self._gradient_checkpointing else nullcontext():
            super().backward(loss, *args, **kwargs)

    def configure_optimizers(self) -> Any:
        """One optimizer over three parameter groups, and one scheduler that goes by optimizer steps.

        Raises:
            ValueError: if the optimizer does not suit the latent weights, or the scheduler the trainer.
        """
        groups = parameter_groups(self.backbone, self._latent_weight_decay)
        groups[-1]["params"] += [parameter for parameter in self.loss.parameters() if parameter.requires_grad]
        try:
            optimizer: Optimizer = self._make_optimizer(groups)
        except ValueError as error:
            raise ValueError(f"the optimizer refuses its arguments: {error}") from error
        latent = optimizer.latent if isinstance(optimizer, PerGroupOptimizer) else optimizer
        if self._latent_weight_decay and "weight_decay" not in latent.defaults:
            raise ValueError(
                f"latent_weight_decay is {self._latent_weight_decay}, but {type(latent).__name__} has no weight decay; "
                "set it to null"
            )
        if isinstance(latent, Bop):
            self._check_weights_for_bop()
        return self._learning_rate.configure(optimizer, self.trainer)

    def _check_weights_for_bop(self) -> None:
        for name, layer in binary_layers(self.backbone).items():
            if isinstance(layer.weight_binarizer, ReCUWeight | IRNetWeight):
                kind = next(k for k, cls in WEIGHT_BINARIZERS.items() if type(layer.weight_binarizer) is cls)
                raise ValueError(
                    f"Bop trains the signs of weights, but {name} has weight: {kind}, which standardises them first, so that "
                    "others are binarized: use sign, xnor or learned"
                )
