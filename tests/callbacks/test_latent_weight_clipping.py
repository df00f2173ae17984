from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.binary import BinaryConv2d, BinaryLayer, DeSign
from design_lightning.callbacks import BinaryWeightAveraging, LatentWeightClipping
from design_lightning.surgery import set_stage_

BOUND = 0.05


class Small(LightningModule):
    """Somebody's module with two binary layers, whose weights go far with each step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            BinaryConv2d(4, 8, 3, activation=DeSign("2x2_v1"), weight="sign"),
            nn.BatchNorm2d(8),
            BinaryConv2d(8, 8, 3, activation=DeSign("2x2_v1"), weight="recu"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0, momentum=0.9)

    @property
    def latent(self) -> list[Tensor]:
        return [m.weight.detach() for m in self.modules() if isinstance(m, BinaryLayer)]


def data(batches: int = 6, same: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(4 * batches, 3, 12, 12, generator=generator), torch.arange(4 * batches) % 2
    if same:  # so that a run that is resumed within an epoch sees what an undisturbed one sees
        images = images[:4].repeat(batches, 1, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=4)


class Probe(Callback):
    """Notes the largest latent weight after each batch, before and after the callbacks in front of it."""

    def __init__(self) -> None:
        self.sizes: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.sizes.append(max(float(weight.abs().max()) for weight in pl_module.latent))


def by_hand(accumulate: int, epochs: int) -> Small:
    """The same training, written out."""
    model = Small().train()
    optimizer = model.configure_optimizers()
    clip(model)
    for _ in range(epochs):
        for i, batch in enumerate(data()):
            (model.training_step(batch, i) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                clip(model)
    return model


def clip(model: Small) -> None:
    with torch.no_grad():
        for weight in model.latent:
            weight.copy_(weight.clamp(-BOUND, BOUND))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_is_bit_for_bit_that_with_a_clamp_after_each_step(
    accumulate: int, trainer: Callable[..., Trainer]
) -> None:
    model = Small()
    trainer(LatentWeightClipping(BOUND), max_epochs=2, accumulate_grad_batches=accumulate).fit(model, data())
    expected = by_hand(accumulate, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert all(float(weight.abs().max()) == pytest.approx(BOUND) for weight in model.latent)


def test_micro_batches_of_an_accumulation_are_not_clipped_after(trainer: Callable[..., Trainer]) -> None:
    class Outsider(Callback):
        """Moves the weights between two micro-batches, as nothing should."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                pl_module.latent[0].fill_(5.0)

    probe = Probe()
    callbacks = (Outsider(), LatentWeightClipping(BOUND), probe)
    trainer(*callbacks, accumulate_grad_batches=3).fit(Small(), data())
    assert [size > BOUND * 1.01 for size in probe.sizes] == [True, True, False, True, True, False]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_weights_are_within_the_bound_after_each_step_in_low_precision(
    precision: Any, trainer: Callable[..., Trainer]
) -> None:
    free, clipped = Probe(), Probe()
    trainer(free, precision=precision).fit(Small(), data())
    trainer(LatentWeightClipping(BOUND), clipped, precision=precision).fit(Small(), data())
    assert max(free.sizes) > BOUND * 1.01
    assert max(clipped.sizes) <= BOUND * 1.005  # BOUND in bfloat16 is a little above it


def test_a_checkpoint_between_a_step_and_its_clipping_goes_on_as_if_nothing_had_happened(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Signal(Callback):
        """Saves at once after the third optimizer step, before the weights are clipped."""

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "signal.ckpt")

    whole, resumed = Small(), Small()
    trainer(Signal(), LatentWeightClipping(BOUND)).fit(whole, data(same=True))
    stored = torch.load(tmp_path / "signal.ckpt", weights_only=True)["state_dict"]
    assert stored["network.2.weight"].abs().max() > BOUND * 1.01
    trainer(LatentWeightClipping(BOUND)).fit(resumed, data(same=True), ckpt_path=tmp_path / "signal.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_have_the_same_clipped_weights(
    accumulate: int, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            torch.save(pl_module.latent, tmp_path / f"{trainer.global_rank}.pt")

    options = {"devices": 2, "strategy": "ddp_fork", "accumulate_grad_batches": accumulate}
    trainer(LatentWeightClipping(BOUND), Keep(), **options).fit(Small(), data())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one, two)
        assert float(one.abs().max()) == pytest.approx(BOUND)


@pytest.mark.slow
def test_a_compiled_network_is_compiled_once(trainer: Callable[..., Trainer]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = Small()
    model.network.compile(backend=backend)
    trainer(LatentWeightClipping(BOUND), max_epochs=2).fit(model, data())
    assert len(graphs) == 1
    assert all(float(weight.abs().max()) == pytest.approx(BOUND) for weight in model.latent)


def test_weights_that_are_real_in_this_stage_are_left_alone(trainer: Callable[..., Trainer]) -> None:
    free, probed = Small(), Small()
    for model in (free, probed):
        set_stage_(model, "activations")
    trainer().fit(free, data())
    trainer(LatentWeightClipping(BOUND)).fit(probed, data())
    assert all(torch.equal(a, b) for a, b in zip(free.parameters(), probed.parameters(), strict=True))


@pytest.mark.parametrize("pattern", ["network.2", "*.2", r"re:network\.[0-3]"])
def test_a_pattern_chooses_layers(pattern: str, trainer: Callable[..., Trainer]) -> None:
    model = Small()
    trainer(LatentWeightClipping(BOUND, layers=pattern)).fit(model, data())
    first, second = (float(weight.abs().max()) for weight in model.latent)
    assert first == pytest.approx(BOUND)
    assert second > BOUND * 1.01


def test_two_bounds_for_two_layers(trainer: Callable[..., Trainer]) -> None:
    model = Small()
    callbacks = (LatentWeightClipping(BOUND, "*.2"), LatentWeightClipping(2 * BOUND, "*.4"))
    trainer(*callbacks).fit(model, data())
    assert [float(weight.abs().max()) for weight in model.latent] == pytest.approx([BOUND, 2 * BOUND])
    assert callbacks[0].state_key != callbacks[1].state_key


@pytest.mark.parametrize("bound", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_an_error(bound: float) -> None:
    with pytest.raises(ValueError, match="bound must be positive, not"):
        LatentWeightClipping(bound)


def test_nothing_to_clip_is_an_error(
    trainer: Callable[..., Trainer], plain: Callable[[nn.Module], LightningModule]
) -> None:
    with pytest.raises(ValueError, match="Plain has none: binarize it"):
        trainer(LatentWeightClipping()).fit(plain(nn.Linear(2, 2)), data())
    with pytest.raises(ValueError, match=r"no binary layer matches layers='conv1'; they are network\.2, network\.4"):
        trainer(LatentWeightClipping(layers="conv1")).fit(Small(), data())


def test_averaging_before_clipping_is_an_error(trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="BinaryWeightAveraging stands before LatentWeightClipping"):
        trainer(BinaryWeightAveraging(), LatentWeightClipping()).fit(Small(), data())


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None]) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0")
    run_with_yaml("fit", "LatentWeightClipping", *options, bound=1.25)
