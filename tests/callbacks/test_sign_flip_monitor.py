import csv
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.binary import BinaryConv2d, BinaryLinear, DeSign, Sign
from design_lightning.callbacks import SignFlipMonitor
from design_lightning.callbacks._figures import log_figure, take_figures
from design_lightning.callbacks.sign_flip_monitor import draw_maps, weight_signs
from design_lightning.surgery import binary_layers, set_stage_

IMAGES = torch.randn(24, 4, 12, 12, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(24) % 2


class Small(LightningModule):
    """Somebody's module whose first binary layer sees the images themselves."""

    def __init__(self, lr: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr = lr
        self.network = nn.Sequential(
            BinaryConv2d(4, 4, 3, activation=Sign(), weight="sign"),
            nn.BatchNorm2d(4),
            nn.Dropout(0.2),
            BinaryConv2d(4, 8, 3, activation=DeSign("2x2_v1"), weight="recu"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            BinaryLinear(8, 2, activation=Sign(layout="NHWC")),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def data(images: Tensor = IMAGES, same: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    images = images[:4].repeat(6, 1, 1, 1) if same else images
    return DataLoader(TensorDataset(images, LABELS), batch_size=4)


class ByHand(Callback):
    """The signs after each optimizer step, and what the monitor, which stands before it, had last seen by then."""

    def __init__(self, monitor: SignFlipMonitor) -> None:
        self.monitor = monitor
        self.signs: dict[int, dict[str, Tensor]] = {}
        self.metrics: dict[int, dict[str, float]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.keep(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.keep(trainer, pl_module)

    def keep(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = binary_layers(pl_module).items()
        self.signs[trainer.global_step] = {
            name: layer.weight_binarizer.signs(layer.weight.detach()).sign() for name, layer in layers
        }
        self.metrics[trainer.global_step] = dict(self.monitor.metrics)


def flips(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    shares = {f"flips/{name}": float((before[name] != after[name]).float().mean()) for name in before}
    return {**shares, "flips/mean": sum(shares.values()) / len(shares)}


def of_kind(metrics: dict[str, float], kind: str) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith(f"{kind}/")}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_flips_are_the_share_of_signs_that_differ_from_the_last_look(
    accumulate: int, trainer: Callable[..., Trainer]
) -> None:
    monitor = SignFlipMonitor(every_n_steps=2)
    by_hand = ByHand(monitor)
    trainer(monitor, by_hand, max_epochs=2, accumulate_grad_batches=accumulate).fit(Small(), data())
    steps = 12 // accumulate
    assert max(by_hand.signs) == steps
    for step in range(2, steps + 1, 2):
        expected = flips(by_hand.signs[step - 2], by_hand.signs[step])
        assert of_kind(by_hand.metrics[step], "flips") == pytest.approx(expected)
        assert expected["flips/mean"] > 0
        assert by_hand.metrics[step + 1 if step < steps else step] == by_hand.metrics[step]


def test_activations_are_counted_as_they_are(trainer: Callable[..., Trainer]) -> None:
    images = torch.empty(24, 4, 12, 12)
    images[:, 0], images[:, 1] = 1.0, -1.0  # two channels that never change
    images[:, 2] = torch.where(torch.arange(12) % 4 == 0, 1.0, -1.0)
    images[:, 3] = IMAGES[:, 3]
    monitor = SignFlipMonitor(every_n_steps=6)
    trainer(monitor).fit(Small(lr=0.0), data(images))
    last = images[20:, 3]
    expected = (1 + 0 + 0.25 + float((last >= 0).float().mean())) / 4
    assert monitor.metrics["positive/network.0"] == pytest.approx(expected)
    assert monitor.metrics["dead/network.0"] == 0.5
    assert of_kind(monitor.metrics, "flips") == {
        f"flips/{n}": 0.0 for n in ("network.0", "network.3", "network.6", "mean")
    }
    for kind in ("positive", "dead"):
        shares = of_kind(monitor.metrics, kind)
        mean = shares.pop(f"{kind}/mean")
        assert shares.keys() == {f"{kind}/network.{i}" for i in (0, 3, 6)}
        assert mean == pytest.approx(sum(shares.values()) / 3)


def test_the_logger_gets_them_at_the_step_of_the_look(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    monitor = SignFlipMonitor(every_n_steps=3)
    by_hand = ByHand(monitor)
    trainer(monitor, by_hand, logger=CSVLogger(tmp_path), log_every_n_steps=100).fit(Small(), data())
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(newline="", encoding="utf-8") as file:
        rows = {int(row.pop("step")): row for row in csv.DictReader(file)}
    assert rows.keys() == {3, 6}
    for step, row in rows.items():
        assert {name: float(value) for name, value in row.items()} == pytest.approx(by_hand.metrics[step])


@pytest.mark.parametrize("stage", ["activations", "float"])
def test_stages_without_binary_weights_or_activations(stage: Any, trainer: Callable[..., Trainer]) -> None:
    monitor, model = SignFlipMonitor(every_n_steps=2), Small()
    set_stage_(model, stage)
    trainer(monitor).fit(model, data())
    assert monitor.metrics["flips/mean"] > 0
    assert bool(of_kind(monitor.metrics, "positive")) == (stage == "activations")


def test_training_is_bit_for_bit_that_without_it(trainer: Callable[..., Trainer]) -> None:
    def run(*callbacks: Callback) -> Small:
        model = Small()
        torch.manual_seed(4)
        trainer(*callbacks, max_epochs=2).fit(
            model, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True)
        )
        return model

    without, with_it = run(), run(SignFlipMonitor(every_n_steps=1))
    assert all(torch.equal(a, b) for a, b in zip(without.parameters(), with_it.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(without.buffers(), with_it.buffers(), strict=True))


def test_between_two_looks_there_is_no_hook_and_no_further_forward(trainer: Callable[..., Trainer]) -> None:
    class Counts(Small):
        modes: tuple[bool, ...] = ()

        def forward(self, images: Tensor) -> Tensor:
            self.modes += (self.training,)
            hooks = [bool(m._forward_hooks) for m in self.modules()]
            assert any(hooks) == (not self.training)
            assert torch.is_grad_enabled() == self.training
            return super().forward(images)

    model = Counts()
    trainer(SignFlipMonitor(every_n_steps=3)).fit(model, data())
    assert model.modes == (True, True, True, False, True, True, True, False)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


def test_a_compiled_network_is_looked_at_uncompiled_and_compiled_once(trainer: Callable[..., Trainer]) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled, eager = SignFlipMonitor(every_n_steps=2), SignFlipMonitor(every_n_steps=2)
    models = Small(), Small()
    models[0].network.compile(backend=backend)
    for monitor, model in zip((compiled, eager), models, strict=True):
        torch.manual_seed(4)
        trainer(monitor, max_epochs=2).fit(model, data())
    assert len(graphs) == 1
    assert compiled.metrics == pytest.approx(eager.metrics)
    assert len(compiled.metrics) == 12


def test_the_last_signs_survive_a_resume(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "5.ckpt")

    def monitors() -> list[Callback]:
        return [SignFlipMonitor(every_n_steps=4), SignFlipMonitor(every_n_steps=4, layers="network.3")]

    whole, resumed = monitors(), monitors()
    torch.manual_seed(4)
    trainer(*whole, Save(), max_epochs=2).fit(Small(), data(same=True))
    stored = torch.load(tmp_path / "5.ckpt", weights_only=True)["callbacks"]
    states = [state for key, state in stored.items() if key.startswith("SignFlipMonitor")]
    assert [len(state["signs"]) for state in states] == [3, 1]
    assert states[1]["signs"]["network.3"].dtype == torch.uint8
    assert states[1]["signs"]["network.3"].numel() == 8 * 4 * 9 // 8
    by_hand = ByHand(resumed[0])  # type: ignore[arg-type]
    trainer(*resumed, by_hand, max_steps=8, max_epochs=2).fit(Small(), data(same=True), ckpt_path=tmp_path / "5.ckpt")
    at_four = {name: torch.from_numpy(_bits(states[0], name)) for name in states[0]["signs"]}
    expected = flips(at_four, {name: (signs > 0) for name, signs in by_hand.signs[8].items()})
    assert of_kind(by_hand.metrics[8], "flips") == pytest.approx(expected)


def _bits(state: dict[str, Any], name: str) -> Any:
    import numpy as np

    shape = state["shapes"][name]
    return np.unpackbits(state["signs"][name].numpy()).astype(bool)[: int(np.prod(shape))].reshape(shape)


@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_log_once_and_stay_the_same(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    monitor = SignFlipMonitor(every_n_steps=1)

    class Keep(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save([monitor.metrics, pl_module.state_dict()], tmp_path / f"{trainer.global_rank}.pt")

    options = {"devices": 2, "strategy": "ddp_fork", "logger": CSVLogger(tmp_path), "max_epochs": 2}
    trainer(monitor, Keep(), **options).fit(Small(), data())
    (first, one), (second, two) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(first) == 12
    assert second == {}
    assert all(torch.equal(one[name], two[name]) for name, _ in Small().named_parameters())
    assert len(list(tmp_path.rglob("metrics.csv"))) == 1


def test_tensorboard_gets_pictures_of_maps(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    monitor = SignFlipMonitor(every_n_steps=3, images=2, channels=3)
    trainer(monitor, logger=TensorBoardLogger(tmp_path)).fit(Small(), data())
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["maps/network.0", "maps/network.3"]  # the last layer's input has no places
    assert "flips/mean" in events.Tags()["scalars"]
    pictures = events.Images("maps/network.0")
    assert [picture.step for picture in pictures] == [3, 6]
    with Image.open(io.BytesIO(pictures[0].encoded_image_string)) as picture:
        assert 400 <= picture.width <= 2000
        assert 150 <= picture.height <= 1500
        colors = picture.convert("RGB").getcolors(picture.width * picture.height)
        assert colors is not None
        assert len(colors) > 100, "the picture is empty"


@pytest.mark.parametrize(("images", "count"), [(0, 0), (1, 2)])
def test_no_pictures_where_none_are_wanted(
    images: int, count: int, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer(SignFlipMonitor(2, images), logger=TensorBoardLogger(tmp_path)).fit(Small(), data())
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert len(events.Tags()["images"]) == count


def test_drawn_layers_are_spread_over_the_depth(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Deep(Small):
        def __init__(self) -> None:
            super().__init__()
            blocks = [BinaryConv2d(4, 4, 3, padding=1, activation=Sign()) for _ in range(7)]
            self.network = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    trainer(SignFlipMonitor(6, drawn_layers=3), logger=TensorBoardLogger(tmp_path)).fit(Deep(), data())
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent))
    events.Reload()
    assert events.Tags()["images"] == ["maps/network.0", "maps/network.3", "maps/network.6"]


def test_tokens_of_a_grid_are_drawn_as_maps(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Tokens(Small):
        def __init__(self) -> None:
            super().__init__()
            design = DeSign("2x2_v1", grid=(3, 5), prefix_tokens=1, layout="NHWC")
            self.network = nn.Sequential(BinaryLinear(36, 2, activation=design))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.network(images.reshape(-1, 16, 36)).mean(1)
            return logits

    drawn: list[tuple[int, ...]] = []
    monitor = SignFlipMonitor(6)
    cut = monitor._cut
    monitor._cut = lambda *arguments: drawn.append(tuple(cut(*arguments)[0].shape)) or cut(*arguments)  # type: ignore
    trainer(monitor, logger=TensorBoardLogger(tmp_path)).fit(Tokens(), data())
    assert drawn == [(4, 4, 3, 5)]


def test_the_drawn_bits_are_the_thresholded_map() -> None:
    real = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    binary = torch.where(real >= 0.3, 1.0, -1.0)
    figure = draw_maps(real, binary, "layer$1")
    left, right = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert left.shape == (2 * 4, 3 * 5)
    assert torch.equal(torch.from_numpy(left[4:8, 5:10].data), real[1, 1])
    assert torch.equal(torch.from_numpy(right[4:8, 5:10].data), binary[1, 1])


def test_signs_are_those_that_the_binarizer_gives() -> None:
    layer = BinaryConv2d(4, 8, 3, activation=Sign(), weight="recu")
    assert torch.equal(
        weight_signs(layer), layer.stage_weight().sign() * layer.weight_binarizer.alpha.sign().view(-1, 1, 1, 1) > 0
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, not 0"),
        ({"images": -1}, "images must be at least 0, not -1"),
        ({"channels": 0}, "channels must be at least 1, not 0"),
        ({"drawn_layers": 0}, "drawn_layers must be at least 1, not 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SignFlipMonitor(**arguments)


def test_nothing_to_look_at_is_an_error(
    trainer: Callable[..., Trainer], plain: Callable[[nn.Module], LightningModule]
) -> None:
    with pytest.raises(ValueError, match="SignFlipMonitor needs binary layers, and Plain has none"):
        trainer(SignFlipMonitor()).fit(plain(nn.Linear(2, 2)), data())
    with pytest.raises(ValueError, match="no binary layer matches layers='conv1'"):
        trainer(SignFlipMonitor(layers="conv1")).fit(Small(), data())
    with pytest.raises(ValueError, match=r"Plain has no forward\(images\)"):
        trainer(SignFlipMonitor(1)).fit(plain(Small().network), data())


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None]) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0")
    run_with_yaml("fit", "SignFlipMonitor", *options, every_n_steps=1)


def test_wandb_and_mlflow_get_the_same_pictures() -> None:
    # Neither package is needed: what Lightning's loggers hand on is looked at.
    handed: list[tuple[Any, ...]] = []

    class Wandb(WandbLogger):
        def __init__(self) -> None:
            pass

        def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
            handed.append((key, images, step))

    class MLFlow(MLFlowLogger):
        def __init__(self) -> None:
            pass

        run_id = "run"

        @property
        def experiment(self) -> Any:
            return SimpleNamespace(log_figure=lambda *args: handed.append(args))

    figure = Figure()
    for logger in take_figures([Wandb(), CSVLogger("."), MLFlow()]):
        log_figure(logger, "maps/layer", figure, 7)
    assert handed == [("maps/layer", [figure], 7), ("run", figure, "maps/layer/7.png")]
    with pytest.raises(TypeError, match="CSVLogger takes no pictures"):
        log_figure(CSVLogger("."), "maps/layer", figure, 7)
