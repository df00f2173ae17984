"""A loss that is NaN or infinite ends the run: says where it comes from, and keeps the last good checkpoint."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from design_lightning.callbacks._forward import images_of
from design_lightning.training.batch_norm import running_batch_norms
from design_lightning.training.checkpoint_files import PREEMPTED
from design_lightning.training.sharding import is_sharded

NAMED = 3
"""How many images or weights an error names."""
WEIGHTS = -1
"""The place of weights that are not finite: before all layers."""


@dataclass(frozen=True)
class _Cause:
    """What a process knows of its loss, and, over all processes, what comes first in the forward pass."""

    place: float
    rank: int
    loss: float
    text: str


class TerminateOnNaN(Callback):
    """Ends the run at the first training loss that is NaN or infinite, before the optimizer makes NaN of all weights.

    And at the first step that begins with a weight that is NaN: behind a binarizer the loss is finite all the same.

    The error names the epoch, step, batch and process, the weights that are not finite, or else the first layer in forward order
    whose output is not, and the images; and the last good checkpoint. The batch goes forward once more for that, in training mode,
    eagerly, with hooks on the layers. No checkpoint is written from then on, nor one of weights that are not finite, whatever made
    them so. Gradients do not count: a GradScaler skips infinite ones by itself.

    Costs a flag a backward pass: it is computed behind the forward, agreed on by all processes, and copied while the backward
    pass is in the queue of the GPU, so that reading it before the optimizer step waits for the forward alone, and the GPU does not
    run dry. Each step costs a norm of all weights as well, and a checkpoint a look at each of them.

    A `ModelCheckpoint` with `save_weights_only` asks no callback, so what the last step made NaN may be in its file.

    Where no process holds the whole weights (FSDP, DeepSpeed) neither the layer is looked for nor the weights.

    Raises:
        ValueError: on all processes, as above.
    """

    def __init__(self) -> None:
        self._error: ValueError | None = None
        self._batch: Any = None
        self._batch_idx = 0
        self._loss = torch.zeros(())
        self._is_bad = torch.zeros((), dtype=torch.int32)
        self._copied: torch.cuda.Event | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        self._error = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: D102
        self._batch, self._batch_idx = batch, batch_idx

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self._batch = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:  # noqa: D102
        self._loss = loss.detach()
        # A GradScaler may have scaled a loss of 16 bits to infinity, and will notice.
        is_good = (~self._loss.isnan() if loss.dtype == torch.float16 else self._loss.isfinite()).all()
        if not is_sharded(trainer):
            is_good &= ~_norm(pl_module).isnan()
        is_bad = (~is_good).to(torch.int32)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(is_bad, torch.distributed.ReduceOp.MAX)
        self._is_bad = is_bad.to("cpu", non_blocking=True)
        if is_bad.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        if self._copied is not None:
            self._copied.synchronize()
        if self._is_bad:
            cause = self._first_cause(trainer, pl_module)
            at = f"epoch {trainer.current_epoch}, step {trainer.global_step}, batch {self._batch_idx}"
            process = f", process {cause.rank}" if trainer.world_size > 1 else ""
            self._error = ValueError(
                f"the training loss is {cause.loss} in {at}{process}: {cause.text}. {_last_good(trainer)}. {_way_out(trainer)}"
            )
            raise self._error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raises rather than have a checkpoint written that nothing can go on from."""
        if self._error is not None:
            raise self._error
        if is_sharded(trainer):
            return
        names = _not_finite(checkpoint["state_dict"], pl_module)
        if trainer.strategy.reduce_boolean_decision(bool(names), all=False):
            which = _some(names) if names else "weights of another process"
            self._error = ValueError(
                f"the checkpoint of epoch {trainer.current_epoch}, step {trainer.global_step} is not written, for though no loss "
                f"was NaN these weights are not finite: {which}. {_last_good(trainer)}. {_way_out(trainer)}"
            )
            raise self._error

    def _first_cause(self, trainer: Trainer, pl_module: LightningModule) -> _Cause:
        """The cause, as all processes agree on it; all of them go forward again, since layers may wait for each other."""
        found = None if is_sharded(trainer) else self._search(trainer, pl_module)
        own: _Cause | None = None
        if not self._loss.isfinite().all() or (found and found[0] == WEIGHTS):
            place, text = (float("inf"), "the layer is not known") if found is None else found
            own = _Cause(place, trainer.global_rank, float(self._loss.sum()), text)
        causes: list[_Cause | None] = [own]
        if trainer.world_size > 1:
            causes = [None] * trainer.world_size
            torch.distributed.all_gather_object(causes, own)
        return min((cause for cause in causes if cause is not None), key=lambda cause: (cause.place, cause.rank))

    def _search(self, trainer: Trainer, pl_module: LightningModule) -> tuple[float, str]:
        """What is not finite, and its place in the forward pass; weights come before all layers."""
        weights = [name for name, weight in pl_module.named_parameters() if not weight.isfinite().all()]
        search = _Search(self._batch)
        try:
            with _forward_again(trainer, pl_module, search):
                pl_module.training_step(self._batch, self._batch_idx)
        except Exception as error:  # the loss stays what is to be told
            failure = f"the batch cannot go forward again ({' '.join(str(error).split())})"
            return (WEIGHTS, _weights(weights)) if weights else (float("inf"), failure)
        if weights:
            return WEIGHTS, _weights(weights)
        where = f"the weights and the outputs of all layers are finite, so look at the loss itself{self._images(trainer, [])}"
        return search.place, where if not search.layer else search.layer + self._images(trainer, search.rows)

    def _images(self, trainer: Trainer, rows: Sequence[int]) -> str:
        """The images of the batch, or those of some of its rows."""
        names_of = getattr(getattr(trainer, "datamodule", None), "training_names", None)
        names = [] if names_of is None else names_of(self._batch_idx)
        count = len(images_of(self._batch)) if rows else 0
        if rows and len(names) == count:
            return f", for {len(rows)} of {count} images: {_some([names[row] for row in rows])}"
        if rows:
            return f", for {len(rows)} of {count} images: numbers {_some(rows)} of the batch"
        return f", for the images {_some(names)}" if names else ""


class _Search:
    """A forward hook that keeps the first layer whose output is not finite."""

    def __init__(self, batch: Any) -> None:
        self.place = 0.0
        self.layer = ""
        self.rows: list[int] = []
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        self._count = len(images) if isinstance(images, Tensor) and images.ndim else None

    def __call__(self, name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self.layer:
            return
        self.place += 1
        bad = _bad(output)
        if bad is None:
            return
        self.layer = f"the first output that is not finite is that of {name} ({type(layer).__name__})"
        if _bad(inputs) is not None:
            self.layer += ", whose input is not either"
        if bad.ndim > 1 and len(bad) == self._count:
            rows = (~bad.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            self.rows = rows if len(rows) < self._count else []


@contextmanager
def _forward_again(trainer: Trainer, pl_module: LightningModule, search: _Search) -> Iterator[None]:
    """Inside, a training step logs nothing, needs no gradient, runs eagerly in the run's precision, and its layers are searched."""
    buffers = [(buffer, buffer.clone()) for buffer in pl_module.buffers()]
    logging = {name: lambda *_, **__: None for name in ("log", "log_dict")}
    with ExitStack() as stack:
        for name, module in pl_module.named_modules():
            if module is not pl_module:
                stack.callback(module.register_forward_hook(partial(search, name)).remove)
        stack.enter_context(isolate_rng())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(trainer.precision_plugin.forward_context())
        pl_module.__dict__.update(logging)
        try:
            yield
        finally:
            for name in logging:
                del pl_module.__dict__[name]
            for buffer, before in buffers:
                buffer.copy_(before)


def _bad(values: Any) -> Tensor | None:
    """The first tensor among values that is not finite."""
    tensors = (value for value in tree_leaves(values) if isinstance(value, Tensor) and value.is_floating_point())
    return next((tensor for tensor in tensors if not tensor.isfinite().all()), None)


def _not_finite(state: dict[str, Any], pl_module: LightningModule) -> list[str]:
    """The parameters and running statistics of batch norm of a state dict that are not finite. (Other buffers may be infinite.)"""
    norms = running_batch_norms(pl_module)
    statistics = [f"{norm}.{statistic}" for norm in norms for statistic in ("running_mean", "running_var")]
    names = [*(name for name, _ in pl_module.named_parameters()), *statistics]
    return [name for name in names if isinstance(state.get(name), Tensor) and not state[name].isfinite().all()]


def _norm(pl_module: LightningModule) -> Tensor:
    """The norm of all trained weights, NaN if one of them is: a sign of NaN is a finite -1, so the loss may not tell."""
    with torch.no_grad():
        return torch.nn.utils.get_total_norm([weight for weight in pl_module.parameters() if weight.requires_grad])


def _weights(names: Sequence[str]) -> str:
    return f"the weights of {_some(names)} are not finite since the step before"


def _some(things: Sequence[Any]) -> str:
    more = f" and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return ", ".join(str(thing) for thing in things[:NAMED]) + more


def _last_good(trainer: Trainer) -> str:
    """Names the newest checkpoint of the run; all of them are good."""
    paths = [Path(trainer.default_root_dir) / PREEMPTED]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # the Trainer sets it in a connector
        if isinstance(callback, ModelCheckpoint):
            paths += [Path(path) for path in (callback.last_model_path, callback.best_model_path) if path]
    there = [path for path in paths if path.is_file()]
    if not there:
        return "No checkpoint had been saved"
    return f"The last good checkpoint is {max(there, key=lambda path: path.stat().st_mtime)}"


def _way_out(trainer: Trainer) -> str:
    if str(trainer.precision).startswith("16"):
        return "Try trainer.precision bf16-mixed, since float16 ends at 65504, or a lower learning rate"
    return "Try a lower learning rate, a longer warm-up, or trainer.gradient_clip_val"
