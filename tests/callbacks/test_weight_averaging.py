import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from design_lightning.binary import EDE, BinaryConv2d, DeSign, RSign
from design_lightning.callbacks import BinaryWeightAveraging, LatentWeightClipping
from design_lightning.surgery import binary_layers, set_stage_
from design_lightning.training.batch_norm import recalibrate_batch_norm_

DECAY = 0.6
IMAGES = torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 + 1
LABELS = torch.arange(24) % 2


class Small(LightningModule):
    """Somebody's module with everything that an average must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            BinaryConv2d(4, 8, 3, activation=DeSign("2x2_v1", learn_kernel=True, estimator="ede"), weight="recu"),
            nn.BatchNorm2d(8),
            BinaryConv2d(8, 8, 3, activation=RSign(8), weight="learned"),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        self.register_buffer("counter", torch.tensor(0))
        self.validated: list[dict[str, Tensor]] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.counter += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(tensors(self))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Annealing(Callback):
    """Moves every annealed value with the steps, as the callbacks that anneal do."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        value = 1 / (1 + trainer.global_step)
        pl_module.network[2].activation.scale.fill_(value)
        pl_module.network[2].activation.estimator.temperature.fill_(1 + value)
        pl_module.network[2].weight_binarizer.tau.fill_(0.9 + value / 20)


class ByHand(Callback):
    """The average of every parameter, written out, and what the buffers are after each step."""

    def __init__(self, first_step: int = 1, every: int = 1) -> None:
        self.average: dict[str, Tensor] = {}
        self.steps = 0
        self.first_step, self.every = first_step, every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return
        self.steps = trainer.global_step
        if self.steps < self.first_step or (self.steps - 1) % self.every:
            return
        for name, parameter in pl_module.named_parameters():
            now = parameter.detach().clone()
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * now if name in self.average else now


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def data(same: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    images = IMAGES[:4].repeat(6, 1, 1, 1) if same else IMAGES
    return DataLoader(TensorDataset(images, LABELS), batch_size=4)


def statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "running" in name}


def recalibrated(module: Small, state: dict[str, Tensor], batches: int) -> dict[str, Tensor]:
    """The batch-norm statistics of the signs of a state."""
    model = copy.deepcopy(module)
    model.load_state_dict(state, strict=False)
    recalibrate_batch_norm_(model, IMAGES.split(4)[:batches])
    return statistics(tensors(model))


def parameters_of(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    return {name: state[name] for name, _ in module.named_parameters()}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_final_weights_are_the_average_with_statistics_of_its_own_signs(
    accumulate: int, trainer: Callable[..., Trainer]
) -> None:
    model, by_hand = Small(), ByHand()
    callbacks = (Annealing(), BinaryWeightAveraging(DECAY, recalibration_batches=3), by_hand)
    trainer(*callbacks, max_epochs=2, accumulate_grad_batches=accumulate).fit(model, data())
    final = tensors(model)
    assert by_hand.steps == 12 // accumulate
    torch.testing.assert_close(parameters_of(final, model), by_hand.average)
    torch.testing.assert_close(statistics(final), recalibrated(model, final, 3))


def test_buffers_are_those_of_the_current_model(trainer: Callable[..., Trainer]) -> None:
    class Last(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            self.buffers = {name: value.clone() for name, value in pl_module.named_buffers() if "running" not in name}

    model, last = Small(), Last()
    trainer(Annealing(), BinaryWeightAveraging(DECAY), last, max_epochs=2).fit(model, data())
    final = tensors(model)
    assert last.buffers["counter"] == 12
    assert {
        "network.2.activation.scale",
        "network.2.weight_binarizer.tau",
        "network.1.num_batches_tracked",
    } <= last.buffers.keys()
    assert all(torch.equal(final[name], value) for name, value in last.buffers.items())


def test_the_average_is_validated_and_the_current_weights_go_on(trainer: Callable[..., Trainer]) -> None:
    class Around(Callback):
        """The weights right before and right after each validation."""

        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.states.append(tensors(pl_module))

        on_validation_end = on_validation_start

    model, by_hand, around = Small(), ByHand(), Around()
    callbacks = (Annealing(), BinaryWeightAveraging(DECAY, recalibration_batches=2), by_hand, around)
    trainer(*callbacks, num_sanity_val_steps=0).fit(model, data(), data())
    (validated,) = model.validated
    torch.testing.assert_close(parameters_of(validated, model), by_hand.average)
    torch.testing.assert_close(statistics(validated), recalibrated(model, validated, 2))
    before, after = around.states
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not torch.equal(before["network.2.weight"], validated["network.2.weight"])


def test_training_is_bit_for_bit_that_without_an_average(trainer: Callable[..., Trainer]) -> None:
    class Keep(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.state = tensors(pl_module)

    def run(*callbacks: Callback) -> dict[str, Tensor]:
        keep = Keep()
        torch.manual_seed(4)
        shuffled = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True)
        trainer(*callbacks, keep, max_epochs=2, val_check_interval=2).fit(Small(), shuffled, data())
        return keep.state

    without, with_it = run(), run(BinaryWeightAveraging(DECAY, recalibration_batches=2))
    assert all(torch.equal(with_it[name], value) for name, value in without.items())


@pytest.mark.parametrize("batches", [0, 3])
def test_a_checkpoint_has_the_average_and_resumes_bit_for_bit(
    batches: int, trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    def callbacks() -> list[Callback]:
        return [Annealing(), BinaryWeightAveraging(DECAY, recalibration_batches=batches)]

    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                self.current = tensors(pl_module)

    whole, resumed, save, by_hand = Small(), Small(), Save(), ByHand()
    trainer(*callbacks(), save, max_epochs=2).fit(whole, data(same=True), data())
    stored = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    current = {name: value for name, value in stored["current_model_state"].items() if isinstance(value, Tensor)}
    assert all(torch.equal(current[name], value) for name, value in save.current.items())
    trainer(*callbacks(), by_hand, max_steps=8, max_epochs=2).fit(Small(), data(same=True), data())
    torch.testing.assert_close(parameters_of(stored["state_dict"], whole), by_hand.average)
    trainer(*callbacks(), max_epochs=2).fit(resumed, data(same=True), data(), ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(whole.buffers(), resumed.buffers(), strict=True))


def test_a_checkpoint_without_a_validation_has_statistics_of_its_own_signs(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    model = Small()
    averaging = BinaryWeightAveraging(DECAY, recalibration_batches=2)
    trainer(averaging, enable_checkpointing=True).fit(model, data())
    (path,) = tmp_path.rglob("*.ckpt")
    stored = torch.load(path, weights_only=True)["state_dict"]
    torch.testing.assert_close(statistics(stored), recalibrated(model, stored, 2))


def test_without_recalibration_the_running_statistics_are_averaged(trainer: Callable[..., Trainer]) -> None:
    class Running(ByHand):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            for name, now in statistics(tensors(pl_module)).items():
                self.average[name] = DECAY * self.average[name] + (1 - DECAY) * now if name in self.average else now

    model, running = Small(), Running()
    trainer(BinaryWeightAveraging(DECAY, recalibration_batches=0), running).fit(model, data())
    torch.testing.assert_close(statistics(tensors(model)), running.average)


def test_a_checkpoint_in_the_middle_of_a_validation_has_both_in_their_places(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Signal(Callback):
        def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / "signal.ckpt")

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.current = tensors(pl_module)

    model, signal = Small(), Signal()
    trainer(Annealing(), BinaryWeightAveraging(DECAY), signal).fit(model, data(), data())
    stored = torch.load(tmp_path / "signal.ckpt", weights_only=True)
    for kept, expected in (("state_dict", model.validated[-1]), ("current_model_state", signal.current)):
        assert all(torch.equal(stored[kept][name], value) for name, value in expected.items())


def test_a_failure_in_a_validation_leaves_the_current_weights(trainer: Callable[..., Trainer]) -> None:
    class Fails(Callback):
        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.current = tensors(pl_module)

        def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            raise RuntimeError("out of memory")

    model, fails = Small(), Fails()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer(BinaryWeightAveraging(DECAY), fails, num_sanity_val_steps=0).fit(model, data(), data())
    assert all(torch.equal(tensors(model)[name], value) for name, value in fails.current.items())


def test_stages_and_estimators_follow_and_a_learned_scale_starts_anew(
    trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    class Switch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                set_stage_(pl_module, "both")
                pl_module.network[4].activation.estimator = EDE(2.0)

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step in (3, 4):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    model = Small()
    set_stage_(model, "activations")
    trainer(BinaryWeightAveraging(DECAY), Switch()).fit(model, data())
    before, after = (torch.load(tmp_path / f"{step}.ckpt", weights_only=True) for step in (3, 4))
    assert before["state_dict"]["network.2._extra_state"] == {"stage": "activations"}
    assert after["state_dict"]["network.2._extra_state"] == {"stage": "both"}
    assert after["state_dict"]["network.4.activation.estimator.temperature"] == 2
    start = before["state_dict"]["network.4.weight"].abs().flatten(1).mean(1)
    expected = DECAY * start + (1 - DECAY) * after["current_model_state"]["network.4.weight_binarizer.alpha"]
    torch.testing.assert_close(after["state_dict"]["network.4.weight_binarizer.alpha"], expected)
    assert {layer.stage for layer in binary_layers(model).values()} == {"both"}


def test_before_the_first_update_the_average_is_the_current_model(trainer: Callable[..., Trainer]) -> None:
    class Current(Callback):
        def __init__(self) -> None:
            self.states: list[dict[str, Tensor]] = []

        def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.states.append(tensors(pl_module))

    model, by_hand, current = Small(), ByHand(first_step=10), Current()
    averaging = BinaryWeightAveraging(DECAY, update_starting_at_step=9)
    trainer(averaging, by_hand, current, max_epochs=2, num_sanity_val_steps=0).fit(model, data(), data())
    first = model.validated[0]
    assert all(torch.equal(first[name], value) for name, value in current.states[0].items())
    torch.testing.assert_close(parameters_of(model.validated[1], model), by_hand.average)


def test_updates_every_few_steps(trainer: Callable[..., Trainer]) -> None:
    model, by_hand = Small(), ByHand(every=4)
    trainer(BinaryWeightAveraging(DECAY, update_every_n_steps=4), by_hand, max_epochs=2).fit(model, data())
    torch.testing.assert_close(parameters_of(tensors(model), model), by_hand.average)


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_outside_of_fit_the_weights_of_the_model_are_evaluated(verb: str, trainer: Callable[..., Trainer]) -> None:
    model, other = Small(), Small()
    runner = trainer(BinaryWeightAveraging(DECAY))
    runner.fit(model, data())
    with torch.no_grad():
        other.network[2].weight.fill_(0.5)
    getattr(runner, verb)(other, data(), verbose=False)
    assert torch.equal(other.validated[0]["network.2.weight"], torch.full((8, 4, 3, 3), 0.5))


def test_clipped_weights_have_an_average_within_the_bound(trainer: Callable[..., Trainer]) -> None:
    model = Small()
    trainer(LatentWeightClipping(0.05), BinaryWeightAveraging(DECAY)).fit(model, data())
    assert all(float(layer.weight.detach().abs().max()) <= 0.05 * (1 + 1e-6) for layer in binary_layers(model).values())


@pytest.mark.own_process
@pytest.mark.slow
def test_two_processes_have_the_same_average(trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    class Keep(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.save(pl_module.state_dict(), tmp_path / f"{trainer.global_rank}.pt")

    by_hand = ByHand()

    class Compare(Callback):
        def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            torch.testing.assert_close(parameters_of(tensors(pl_module), pl_module), by_hand.average)

    options = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 2}
    callbacks = (Annealing(), BinaryWeightAveraging(DECAY, recalibration_batches=2), by_hand, Compare(), Keep())
    trainer(*callbacks, **options).fit(Small(), data(), data())
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same = {name for name, value in first.items() if isinstance(value, Tensor) and torch.equal(value, second[name])}
    assert same >= {n for n, _ in Small().named_parameters()} | {n for n in first if "running" in n}


def test_a_compiled_network_is_compiled_no_oftener(trainer: Callable[..., Trainer]) -> None:
    def graphs(*callbacks: Callback) -> int:
        found = []

        def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            found.append(graph)
            return graph

        class Compile(Callback):
            """Compiles when the average has been copied, as `DesignClassifier` does."""

            def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
                pl_module.network.compile(backend=backend)

        torch._dynamo.reset()
        trainer(*callbacks, Compile(), max_epochs=2).fit(Small(), data(), data())
        return len(found)

    assert graphs(Annealing(), BinaryWeightAveraging(DECAY)) == graphs()


def test_a_network_without_batch_norm(trainer: Callable[..., Trainer], plain: Callable[..., LightningModule]) -> None:
    by_hand = ByHand()
    model = plain(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)))
    trainer(BinaryWeightAveraging(DECAY), by_hand).fit(model, data())
    torch.testing.assert_close(parameters_of(tensors(model), model), by_hand.average)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "decay must be at least 0 and below 1, not 1.0"),
        ({"decay": -0.1}, "decay must be"),
        ({"update_every_n_steps": 0}, "update_every_n_steps must be at least 1, not 0"),
        ({"recalibration_batches": -1}, "recalibration_batches must be at least 0, not -1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryWeightAveraging(**arguments)


def test_yaml_finds_it_by_its_bare_name(run_with_yaml: Callable[..., None]) -> None:
    options = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1")
    run_with_yaml("fit", "BinaryWeightAveraging", *options, decay=0.9, recalibration_batches=2)
