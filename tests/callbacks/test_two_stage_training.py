"""`TwoStageTraining`: what each stage sets, and that a run that was stopped anywhere ends with the same weights."""

import contextlib
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.callbacks import (
    BatchNormRecalibration,
    BinaryWeightAveraging,
    KernelAnnealing,
    LatentWeightClipping,
    RandomStates,
    TwoStageTraining,
)
from design_lightning.data import FashionMNISTSubset
from design_lightning.surgery import binary_layers
from design_lightning.training import CosineDecay, LinearDecay
from design_lightning.training.stages import TrainingStage

STEPS = 4
"""Optimizer steps of an epoch."""


class FewImages(FashionMNISTSubset):
    """Four batches, shuffled and augmented."""

    def _load(self, split: str) -> Any:
        samples = super()._load(split)
        return samples.subset(torch.arange(len(samples))[:: len(samples) // 64][:64])


def data(**options: Any) -> FewImages:
    return FewImages(batch_size=16, image_size=28, **{"num_workers": 0, "drop_last": True, **options})


def classifier(**options: Any) -> dl.DesignClassifier:
    seed_everything(3, verbose=False)
    options.setdefault("optimizer", lambda groups: torch.optim.Adam(groups, lr=1e-2, weight_decay=1e-3))
    options.setdefault("backbone_args", {"drop_rate": 0.2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dl.DesignClassifier("test_resnet", num_classes=10, input_size=(1, 28, 28), **options)


def trainer(tmp_path: Path, *callbacks: Callback, epochs: int = 4, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    options.setdefault("limit_val_batches", 0)
    options.setdefault("num_sanity_val_steps", 0)
    return Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=list(callbacks), **{**quiet, **options})


class Record(Callback):
    """What each optimizer step used."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        stages = {layer.stage for layer in binary_layers(pl_module).values()}
        assert len(stages) == 1
        groups = {group["name"]: group for group in optimizer.param_groups}
        first = next(iter(binary_layers(pl_module).values()))
        self.steps.append(
            {
                "stage": stages.pop(),
                "lr": groups["latent"]["lr"],
                "decay": (groups["latent"]["weight_decay"], groups["no_decay"]["weight_decay"]),
                "momenta": len(optimizer.state),
                "estimator": first.activation.estimator,
                "scale": float(first.activation.scale),
            }
        )

    def of(self, name: str) -> list[Any]:
        return [step[name] for step in self.steps]


def test_two_stages_by_default(tmp_path: Path) -> None:
    record = Record()
    module = classifier(scheduler=LinearDecay)
    trainer(tmp_path, TwoStageTraining(), record).fit(module, data())
    half = 2 * STEPS
    assert record.of("stage") == ["activations"] * half + ["both"] * half
    rise = [1e-2 * (1 - step / half) for step in range(half)]
    assert record.of("lr") == pytest.approx(rise + rise)
    assert record.of("decay") == [(0.0, 0.0)] * 2 * half
    assert [bool(n) for n in record.of("momenta")] == ([False] + [True] * (half - 1)) * 2


def test_a_list_of_stages_with_settings_of_their_own(tmp_path: Path) -> None:
    record = Record()
    stages = [
        TrainingStage("float", until=1, weight_decay=0.5, scale=0.0),
        TrainingStage(
            "activations", until=0.5, lr=1e-3, weight_decay=0.25, estimator="ste", estimator_args={"clip": 1.25}
        ),
        TrainingStage("both", scale=1.0, reset_optimizer=False, restart_schedule=False),
    ]
    trainer(tmp_path, TwoStageTraining(stages), record).fit(classifier(scheduler=CosineDecay), data())
    assert record.of("stage") == ["float"] * 4 + ["activations"] * 4 + ["both"] * 8
    assert record.of("decay") == [(0.5, 0.0)] * 4 + [(0.25, 0.0)] * 4 + [(0.0, 0.0)] * 8
    assert record.of("scale") == [0.0] * 8 + [1.0] * 8
    assert [type(e).__name__ for e in record.of("estimator")] == ["ApproxSign"] * 4 + ["STE"] * 12
    assert record.of("estimator")[-1].clip == 1.25

    def cosine(peak: float, steps: int) -> list[float]:
        return [peak * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps)]

    assert record.of("lr") == pytest.approx(cosine(1e-2, 4) + cosine(1e-3, 12), rel=1e-5)
    assert all(record.of("momenta")[5:])
    assert record.of("momenta")[4] == 0


def test_without_a_scheduler_the_rate_is_the_stages(tmp_path: Path) -> None:
    record = Record()
    stages = [TrainingStage("activations", until=3), TrainingStage("both", lr=1e-4)]
    trainer(tmp_path, TwoStageTraining(stages), record).fit(classifier(scheduler=None), data())
    assert record.of("lr") == [1e-2] * 12 + [1e-4] * 4


def test_a_warm_up_belongs_to_the_first_stage(tmp_path: Path) -> None:
    record = Record()
    trainer(tmp_path, TwoStageTraining(switch=2), record).fit(
        classifier(scheduler=LinearDecay, warmup_epochs=0.5), data()
    )
    first = [1e-2 / 3, 2e-2 / 3, *(1e-2 * (1 - s / 6) for s in range(6))]
    assert record.of("lr") == pytest.approx(first + [1e-2 * (1 - s / 8) for s in range(8)])


def test_a_stage_within_the_warm_up_cuts_it_off_and_says_so(tmp_path: Path) -> None:
    def fit(*callbacks: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
        module = classifier(scheduler=LinearDecay, warmup_steps=12)
        stages = TwoStageTraining(switch=2)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer(tmp_path, stages, RandomStates(), *callbacks).fit(module, data(), ckpt_path=ckpt)
        return weights(module)

    record = Record()
    with pytest.warns(
        UserWarning, match="stage 2 begins at step 8, within the warm-up of 12 steps, which is cut off there"
    ):
        whole = fit(record)
    assert record.of("lr") == pytest.approx(
        [1e-2 * (s + 1) / 13 for s in range(8)] + [1e-2 * (1 - s / 8) for s in range(8)]
    )
    for step in (5, 11):
        fit(StopAt(step, tmp_path / f"{step}.ckpt"))
        resumed = fit(ckpt=tmp_path / f"{step}.ckpt")
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_accumulation_switches_between_optimizer_steps(tmp_path: Path) -> None:
    record = Record()
    trainer(tmp_path, TwoStageTraining(switch=0.5), record, epochs=2, accumulate_grad_batches=2).fit(
        classifier(), data()
    )
    assert record.of("stage") == ["activations"] * 2 + ["both"] * 2


def test_shares_of_a_short_run_are_at_least_a_step_each(tmp_path: Path) -> None:
    stages = [TrainingStage("float", until=0.2), TrainingStage("activations", until=0.4), TrainingStage("both")]
    for steps, expected in ((1, ["float"]), (3, ["float", "activations", "both"])):
        record = Record()
        trainer(tmp_path, TwoStageTraining(stages), record, epochs=1, max_steps=steps).fit(classifier(), data())
        assert record.of("stage") == expected
    record = Record()
    stages = [TrainingStage("float", until=1), TrainingStage("activations", until=0.5), TrainingStage("both")]
    trainer(tmp_path, TwoStageTraining(stages), record, fast_dev_run=3).fit(classifier(), data())
    assert record.of("stage") == ["float"] * 3


def test_the_log_says_where_a_run_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    best = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{stage:.0f}", auto_insert_metric_name=False)
    stages = [TrainingStage("activations", until=0.5, weight_decay=1e-4), TrainingStage("both", lr=1e-3)]

    def fit(*callbacks: Callback, ckpt: Path | None = None) -> str:
        caplog.clear()
        with caplog.at_level("INFO"), contextlib.suppress(KeyboardInterrupt, SystemExit):
            trainer(tmp_path, TwoStageTraining(stages), *callbacks, limit_val_batches=1).fit(
                classifier(), data(), ckpt_path=ckpt
            )
        return caplog.text

    log = fit(Scores([0.25, 0.5, 0.1, 0.2]), best)
    assert "stage 1 of 2: activations, from step 0 to 8, learning rate 0.01, weight decay 0.0001" in log
    assert f"best score of stage 1: 0.5, {tmp_path / '1.ckpt'}" in log
    assert "stage 2 of 2: both, from step 8 to 16, learning rate 0.001, weight decay 0" in log
    assert Path(best.best_model_path).name == "2.ckpt"
    fit(StopAt(10, tmp_path / "stopped.ckpt"))
    log = fit(ckpt=tmp_path / "stopped.ckpt")
    assert "stage 2 of 2: both, resumed at step 10 to 16, learning rate 0.000854, weight decay 0" in log
    waits = TwoStageTraining(switch="plateau", monitor="score", patience=9)
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="training ended in stage 1"):
        trainer(tmp_path, Scores([0.1]), waits, epochs=1, limit_val_batches=1).fit(classifier(), data())
    assert "from step 0 to a plateau of score" in caplog.text


class Scores(Callback):
    """Logs given values as the validation's accuracy."""

    def __init__(self, values: list[float]) -> None:
        self.values = iter(values)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", next(self.values))


def test_a_plateau_ends_a_stage(tmp_path: Path) -> None:
    record = Record()
    callback = TwoStageTraining(switch="plateau", monitor="score", patience=2)
    scores = Scores([0.1, 0.3, 0.2, 0.3, 0.1, 0.1])
    trainer(tmp_path, scores, callback, record, epochs=6, limit_val_batches=1).fit(
        classifier(scheduler=LinearDecay), data()
    )
    assert record.of("stage") == ["activations"] * 16 + ["both"] * 8
    assert record.of("lr")[16] == pytest.approx(1e-2)
    assert record.of("lr")[23] == pytest.approx(1e-2 / 8)


def test_the_best_checkpoint_is_one_of_the_last_stage(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="score", mode="max", filename="{epoch}")
    early = EarlyStopping("score", mode="max", patience=2)
    scores = Scores([0.8, 0.9, 0.3, 0.4, 0.35])
    trainer(tmp_path, scores, TwoStageTraining(switch=2), best, early, epochs=5, limit_val_batches=1).fit(
        classifier(), data()
    )
    assert Path(best.best_model_path).name == "epoch=3.ckpt"
    assert float(best.best_model_score) == pytest.approx(0.4)
    assert (tmp_path / "epoch=1.ckpt").exists()
    assert early.stopped_epoch == 0


def test_a_plateau_of_what_is_not_logged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"plateau of 'nothing', which is not logged; logged: .*val/top1"):
        trainer(tmp_path, TwoStageTraining(switch="plateau", monitor="nothing"), limit_val_batches=1).fit(
            classifier(), data()
        )


class StopAt(Callback):
    """Saves a checkpoint after a step, and ends the run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.limit_train_batches = 0
            raise KeyboardInterrupt


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in module.state_dict().items() if isinstance(t, Tensor) and n.startswith("backbone.")}


def run(
    tmp_path: Path, *callbacks: Callback, ckpt: Path | None = None, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    loader = data(num_workers=options.pop("num_workers", 0))
    module = classifier(**options)
    torch.manual_seed(seed)
    torch.rand(seed)
    stages = [
        TrainingStage("activations", until=2, weight_decay=1e-2),
        TrainingStage("both", lr=5e-3, scale=0.5),
    ]
    try:
        trainer(tmp_path, TwoStageTraining(stages), RandomStates(), *callbacks).fit(module, loader, ckpt_path=ckpt)
    except (KeyboardInterrupt, SystemExit):
        return {}
    return weights(module)


CONFIGS: dict[str, dict[str, Any]] = {
    "xnor": {},
    "learned": {"binary": dl.BinaryConfig(weight="learned", learn_kernel=True)},
    "recu": {"binary": dl.BinaryConfig(weight="recu", activation="rsign", companion="rprelu")},
}


@pytest.mark.parametrize("step", [1, 3, 4, 7, 8, 9, 14])
def test_stopped_at_any_step_and_resumed_gives_the_same_weights(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path, scheduler=LinearDecay)
    path = tmp_path / "stopped.ckpt"
    run(tmp_path, StopAt(step, path), scheduler=LinearDecay)
    resumed = run(tmp_path, ckpt=path, seed=9, scheduler=LinearDecay)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.slow
def test_other_binarizers_resume_as_exactly(tmp_path: Path, config: str) -> None:
    whole = run(tmp_path, **CONFIGS[config])
    for step in (6, 10):
        path = tmp_path / f"{step}.ckpt"
        run(tmp_path, StopAt(step, path), **CONFIGS[config])
        resumed = run(tmp_path, ckpt=path, seed=9, **CONFIGS[config])
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


class StopWithin(StopAt):
    """The same, before the step's backward pass."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        pass

    def on_before_backward(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


def test_a_stop_within_a_step_repeats_that_step(tmp_path: Path) -> None:
    whole = run(tmp_path)
    # The forward before the stop counted in the running statistics of batch norm, which training does not read.
    trained = [name for name in whole if "running" not in name and "num_batches" not in name]
    for step in (5, 8):
        run(tmp_path, StopWithin(step, tmp_path / f"{step}.ckpt"))
        resumed = run(tmp_path, ckpt=tmp_path / f"{step}.ckpt", seed=9)
        assert all(torch.equal(whole[name], resumed[name]) for name in trained)


class StopBefore(Callback):
    """Ends the run before an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


def with_everything(
    tmp_path: Path, epochs: int, ckpt: str | None = None, **options: Any
) -> tuple[dict[str, Tensor], str]:
    """Four epochs, or fewer, with validations, averaging, clipping and re-estimation; the weights, and the last checkpoint."""
    module = classifier(scheduler=CosineDecay, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2))
    last = ModelCheckpoint(tmp_path, monitor="val/top1", mode="max", save_last=True, filename=f"best{epochs}")
    callbacks = [
        TwoStageTraining([TrainingStage("activations", until=2, estimator="ste"), TrainingStage("both")]),
        LatentWeightClipping(0.5),
        BatchNormRecalibration(2),
        BinaryWeightAveraging(0.9, recalibration_batches=2),
        RandomStates(),
        StopBefore(epochs),
        last,
    ]
    options = {"limit_val_batches": 1, **options}
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer(tmp_path, *callbacks, epochs=4, **options).fit(module, data(), ckpt_path=ckpt)
    return weights(module), last.last_model_path


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2}])
@pytest.mark.slow
def test_the_last_checkpoint_of_a_run_with_everything(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, _ = with_everything(tmp_path, 4, **options)
    for epochs in (1, 3):
        (tmp_path / str(epochs)).mkdir()
        _, path = with_everything(tmp_path / str(epochs), epochs, **options)
        resumed, _ = with_everything(tmp_path / str(epochs), 4, path, **options)
        differing = [name for name, value in whole.items() if not torch.equal(value, resumed[name])]
        assert differing == []


def test_workers_change_nothing(tmp_path: Path) -> None:
    whole = run(tmp_path)
    path = tmp_path / "stopped.ckpt"
    run(tmp_path, StopAt(6, path), num_workers=1)
    resumed = run(tmp_path, ckpt=path, seed=9, num_workers=2)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def without_decay(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=1e-2)


def two_stages(tmp_path: Path, *callbacks: Callback, epochs: int = 4, ckpt: str | None = None) -> dict[str, Tensor]:
    module = classifier(scheduler=LinearDecay)
    staged = trainer(tmp_path, TwoStageTraining(switch=2), RandomStates(), *callbacks, epochs=epochs)
    staged.fit(module, data(), ckpt_path=ckpt)
    return weights(module)


@pytest.mark.filterwarnings("ignore:training ended in stage 1")
@pytest.mark.parametrize("knows_of_stages", [True, False])
def test_stage_two_from_the_checkpoint_of_stage_one_by_hand(tmp_path: Path, knows_of_stages: bool) -> None:
    """Stage one as a run of its own, of its own number of epochs; then stage two from its last checkpoint, as `ckpt_path`."""
    last = ModelCheckpoint(tmp_path / "one", save_last=True)
    if knows_of_stages:
        two_stages(tmp_path, last, epochs=2)
    else:
        module = classifier(scheduler=LinearDecay, binary=dl.BinaryConfig(stage="activations"))
        trainer(tmp_path, RandomStates(), last, epochs=2).fit(module, data())
    by_hand = two_stages(tmp_path, ckpt=last.last_model_path)
    for name, value in two_stages(tmp_path).items():
        assert torch.equal(value, by_hand[name]), name


class ImagesOfStageTwo(FewImages):
    """In the order of the epochs from the third on."""

    def train_dataloader(self) -> Any:
        loader: Any = super().train_dataloader()
        set_epoch = loader.sampler.set_epoch
        loader.sampler.set_epoch = lambda epoch: set_epoch(epoch + 2)
        return loader


@pytest.mark.filterwarnings("ignore:training ended in stage 1")
@pytest.mark.parametrize("stopped", [0, 3])
def test_stage_two_as_a_run_of_its_own_from_the_weights_of_stage_one(tmp_path: Path, stopped: int) -> None:
    """`weights` begin a new run: with the images and random numbers of stage two, what comes out is that of one run, too."""
    last = ModelCheckpoint(tmp_path / "one", save_last=True)
    two_stages(tmp_path, last, epochs=2)
    states = torch.load(last.last_model_path, weights_only=True)["callbacks"]["RandomStates"]

    def stage_two(*callbacks: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
        module = classifier(scheduler=LinearDecay, optimizer=without_decay, weights=last.last_model_path)
        random = RandomStates()
        random.load_state_dict(states)
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            images = ImagesOfStageTwo(batch_size=16, image_size=28, num_workers=0)
            trainer(tmp_path, random, *callbacks, epochs=2).fit(module, images, ckpt_path=ckpt)
        return weights(module)

    if stopped:
        stage_two(StopAt(stopped, tmp_path / "stopped.ckpt"))
    by_hand = stage_two(ckpt=tmp_path / "stopped.ckpt" if stopped else None)
    for name, value in two_stages(tmp_path).items():
        assert torch.equal(value, by_hand[name]), name


def test_a_changed_list_of_stages_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "stopped.ckpt"
    run(tmp_path, StopAt(10, path))
    one = TwoStageTraining([TrainingStage("both")])
    with pytest.raises(ValueError, match="checkpoint is of stage 2, this run has 1"):
        trainer(tmp_path, one).fit(classifier(), data(), ckpt_path=path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stage": "binary"}, "unknown stage 'binary'"),
        ({"stage": "both", "until": "soon"}, "until='soon' must be epochs"),
        ({"stage": "both", "until": 0}, "until=0 must be at least 1 epoch"),
        ({"stage": "both", "until": 1.5}, "until=1.5"),
        ({"stage": "both", "lr": -1.0}, "lr=-1.0 must not be negative"),
        ({"stage": "both", "estimator": "ede"}, "'ede' has a state in the checkpoint"),
        ({"stage": "both", "estimator": "stee"}, "unknown estimator 'stee'"),
        ({"stage": "both", "estimator_args": {"clip": 2}}, "need an estimator"),
        ({"stage": "both", "lr": 1e-3, "restart_schedule": False}, "lr=0.001 needs restart_schedule"),
    ],
)
def test_wrong_stages_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingStage(**arguments)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([TrainingStage("both", until=3)], "the last stage lasts to the end"),
        ([TrainingStage("float"), TrainingStage("both")], "stage 1 of 2 has no end"),
    ],
)
def test_wrong_lists_are_refused(stages: list[TrainingStage], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TwoStageTraining(stages)


def test_what_does_not_fit_the_run_is_refused(tmp_path: Path) -> None:
    stages = [TrainingStage("float", until=3), TrainingStage("activations", until=0.25), TrainingStage("both")]
    with pytest.raises(
        ValueError,
        match=r"stage 2 ends at step 4 \(until 0.25\), not after the stage before it, at step 12; let `until` rise",
    ):
        trainer(tmp_path, TwoStageTraining(stages)).fit(classifier(), data())
    torchs = partial(torch.optim.lr_scheduler.StepLR, step_size=5)
    with pytest.raises(ValueError, match="cannot start anew with StepLR"):
        trainer(tmp_path, TwoStageTraining()).fit(classifier(scheduler=torchs), data())
    with pytest.raises(ValueError, match="found no binary layer"):
        trainer(tmp_path, TwoStageTraining()).fit(classifier(binary=None), data())
    stateful = dl.BinaryConfig(estimator="ede")
    stages = [TrainingStage("activations", until=1), TrainingStage("both", estimator="ste")]
    with pytest.raises(ValueError, match="the activations have EDE, which has a state"):
        trainer(tmp_path, TwoStageTraining(stages)).fit(classifier(binary=stateful), data())


def test_errors_of_later_stages_come_before_the_first_step(tmp_path: Path) -> None:
    def refused(message: str, *stages: TrainingStage, callbacks: tuple[Callback, ...] = (), **options: Any) -> None:
        record = Record()
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, TwoStageTraining(list(stages)), record, *callbacks).fit(classifier(**options), data())
        assert record.steps == []

    first = TrainingStage("activations", until=2)
    rates = lambda groups: torch.optim.SGD([{**g, "lr": 0.1 / (i + 1)} for i, g in enumerate(groups)], lr=0.1)  # noqa: E731
    refused("groups have rates of their own", first, TrainingStage("both", lr=1e-3), optimizer=rates, scheduler=None)
    decay = TrainingStage("both", weight_decay=0.1)
    refused(
        "weight_decay=0.1, but the optimizer has none", first, decay, optimizer=lambda g: torch.optim.Rprop(g, lr=0.1)
    )
    refused("KernelAnnealing moves", first, TrainingStage("both", scale=1.0), callbacks=(KernelAnnealing(),))
    refused("there is no validation", TrainingStage("activations", until="plateau"), TrainingStage("both"))
    with pytest.raises(ValueError, match="switch=3 is of the two default stages"):
        TwoStageTraining([TrainingStage("both")], switch=3)


def test_a_run_that_ends_in_an_early_stage_says_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="training ended in stage 1 of 2, 'activations'"):
        trainer(tmp_path, TwoStageTraining(switch=3), epochs=1).fit(classifier(), data())


def test_weights_are_clipped_before_the_first_step_with_them(tmp_path: Path) -> None:
    class Largest(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[str, float]] = []

        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            layer = next(iter(binary_layers(pl_module).values()))
            self.seen.append((layer.stage, float(layer.weight.abs().max())))

    largest = Largest()
    module = classifier(binary=dl.BinaryConfig(weight="learned"))
    trainer(tmp_path, TwoStageTraining(), LatentWeightClipping(0.02), largest, epochs=2).fit(module, data())
    assert max(size for stage, size in largest.seen if stage == "activations") > 0.1
    assert max(size for stage, size in largest.seen if stage == "both") <= 0.02 + 1e-6
    with pytest.raises(ValueError, match="TwoStageTraining stands behind LatentWeightClipping"):
        trainer(tmp_path, LatentWeightClipping(), TwoStageTraining()).fit(classifier(), data())


def test_a_run_that_ends_before_the_switch_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, TwoStageTraining(switch=9), epochs=1).fit(classifier(), data())
    assert "the next never begins" in caplog.text


class Plain(LightningModule):
    """Somebody's own module, with an optimizer that knows nothing of parameter groups."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.Linear(32, 32), nn.Linear(32, 10))
        dl.binarize_(self.net, example_input=(2, 1, 28, 28))
        self.seen: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(self.net[2].stage)
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_it_works_in_anybodys_trainer(tmp_path: Path) -> None:
    module = Plain()
    trainer(tmp_path, TwoStageTraining(), epochs=2).fit(module, data())
    assert module.seen == ["activations"] * 4 + ["both"] * 4


@pytest.mark.slow
def test_compiled_networks_recompile_once_a_stage(tmp_path: Path) -> None:
    module = classifier()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module.backbone.compile(backend=backend)
    trainer(tmp_path, TwoStageTraining(), epochs=2).fit(module, data())
    assert len(graphs) == 2
