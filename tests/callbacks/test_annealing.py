"""`KernelAnnealing` and `EstimatorAnnealing`: the value at each step of a real run, its resume, and one compiled graph."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.callbacks import EstimatorAnnealing, KernelAnnealing
from design_lightning.training.annealing_path import AnnealingPath


class Net(LightningModule):
    """Somebody's own module with one binary layer between two float ones."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2))
        dl.binarize_(self.net, dl.BinaryConfig(**options), example_input=torch.randn(64, 6))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Record(Callback):
    """The value of a buffer in each step."""

    def __init__(self, name: str) -> None:
        self.name, self.values, self.logged = name, [], []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.values.append(pl_module.net[1].get_buffer(self.name).item())
        self.logged.append(trainer.callback_metrics)


def fit(
    tmp_path: Path, module: Net, *callbacks: Callback, epochs: int = 2, ckpt: Path | None = None, **options: Any
) -> Trainer:
    loader = DataLoader(TensorDataset(torch.randn(40, 6)), 8)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    limits: dict[str, Any] = {"max_epochs": epochs, **options}
    trainer = Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), accelerator="cpu", **quiet, **limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader, ckpt_path=ckpt)
    return trainer


def test_from_sign_to_design_along_a_line(tmp_path: Path) -> None:
    record = Record("activation.scale")
    trainer = fit(tmp_path, Net(), KernelAnnealing(), record)
    assert record.values == pytest.approx([step / 9 for step in range(10)])
    assert float(trainer.callback_metrics["kernel/scale"]) == 1


PATHS: dict[str, Any] = {
    "linear": lambda x: 1 + 2 * x,
    "cosine": lambda x: 1 + 2 * (1 - math.cos(math.pi * x)) / 2,
    "exponential": lambda x: 1 + 2 * (math.exp(x) - 1) / (math.e - 1),
    "geometric": lambda x: 3**x,
}


@pytest.mark.parametrize("path", PATHS)
def test_paths(path: Any) -> None:
    way = AnnealingPath(1.0, 3.0, path)
    for x in (0.0, 0.1, 0.5, 0.99, 1.0):
        assert way.value(x) == pytest.approx(PATHS[path](x))


def test_a_path_of_points() -> None:
    way = AnnealingPath(0, 0, [0.0, 1.0, 0.5])
    assert [way.value(x) for x in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 0.75, 0.5])


def test_recus_tau_is_that_of_the_authors(tmp_path: Path) -> None:
    """tau = A e^x + B with A = (0.99 - 0.85) / (e - 1) and B = 0.85 - A."""
    record = Record("weight_binarizer.tau")
    callback = EstimatorAnnealing("tau", 0.85, 0.99, "exponential", every="epoch")
    fit(tmp_path, Net(weight="recu"), callback, record, epochs=3)
    a = (0.99 - 0.85) / (math.e - 1)
    expected = [a * math.exp(epoch / 2) + 0.85 - a for epoch in range(3) for _ in range(5)]
    assert record.values == pytest.approx(expected)


def test_irnets_temperature_of_activations_and_of_weights(tmp_path: Path) -> None:
    records = Record("activation.estimator.temperature"), Record("weight_binarizer.estimator.temperature")
    callbacks = (
        EstimatorAnnealing("temperature", 0.1, 10.0, "geometric", of="activations"),
        EstimatorAnnealing("temperature", 1.0, 2.0, of="weights"),
    )
    trainer = fit(tmp_path, Net(estimator="ede", weight="irnet"), *callbacks, *records)
    assert records[0].values == pytest.approx([10 ** (-1 + 2 * step / 9) for step in range(10)])
    assert records[1].values == pytest.approx([1 + step / 9 for step in range(10)])
    assert {"estimator/activations_temperature", "estimator/weights_temperature"} <= set(trainer.callback_metrics)
    both = EstimatorAnnealing("temperature", 0.5, 0.5)
    fit(tmp_path, module := Net(estimator="ede", weight="irnet"), both)
    assert module.net[1].activation.estimator.temperature == module.net[1].weight_binarizer.estimator.temperature == 0.5


def test_begin_and_until(tmp_path: Path) -> None:
    record = Record("activation.scale")
    fit(tmp_path, Net(), KernelAnnealing(2.0, 1.0, begin=0.2, until=0.6), record)
    assert record.values == pytest.approx([2 - min(max((s / 9 - 0.2) / 0.4, 0), 1) for s in range(10)])


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    record = Record("activation.scale")
    fit(tmp_path, Net(), KernelAnnealing(), record, epochs=1, accumulate_grad_batches=2)
    assert record.values == pytest.approx([0, 0, 0.5, 0.5, 1])


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = Record("activation.scale")
    fit(tmp_path, reference := Net(), KernelAnnealing(path="cosine"), whole, epochs=4)
    trainer = fit(tmp_path, Net(), KernelAnnealing(path="cosine"), epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    rest = Record("activation.scale")
    fit(tmp_path, resumed := Net(), KernelAnnealing(path="cosine"), rest, epochs=4, ckpt=tmp_path / "two.ckpt")
    assert rest.values == whole.values[10:]
    assert resumed.net[1].activation.scale == reference.net[1].activation.scale


def test_one_compiled_graph_whatever_the_value(tmp_path: Path) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module = Net(estimator="ede", weight="recu")
    module.net.compile(backend=backend, fullgraph=True)
    record = Record("activation.scale")
    callbacks = (
        KernelAnnealing(),
        EstimatorAnnealing("temperature", 0.1, 10, "geometric"),
        EstimatorAnnealing("tau", 0.85, 0.99),
    )
    fit(tmp_path, module, *callbacks, record)
    assert len(set(record.values)) == 10
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KernelAnnealing(begin=0.6, until=0.5), "begin=0.6 and until=0.5"),
        (lambda: KernelAnnealing(path="straight"), "unknown path 'straight'"),
        (lambda: KernelAnnealing(path=[1.0]), "needs two values"),
        (lambda: KernelAnnealing(0.0, 1.0, "geometric"), "ends above 0"),
        (lambda: KernelAnnealing(every="batch"), "every='batch'"),
        (lambda: EstimatorAnnealing("taw", 0.85, 0.99), "unknown name 'taw'"),
        (lambda: EstimatorAnnealing("tau", 0.4, 0.99), "tau must stay above 0.5"),
        (lambda: EstimatorAnnealing("temperature", 0, 0, [1.0, 0.0]), "temperature must stay above 0"),
        (lambda: EstimatorAnnealing("temperature", 1, 2, of="layers"), "unknown of='layers'"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_nothing_to_anneal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="found no DeSign"):
        fit(tmp_path, Net(activation="sign"), KernelAnnealing())
    with pytest.raises(ValueError, match="found no tau"):
        fit(tmp_path, Net(), EstimatorAnnealing("tau", 0.85, 0.99))
    with pytest.raises(ValueError, match=r"no temperature \(of weights\)"):
        fit(tmp_path, Net(estimator="ede"), EstimatorAnnealing("temperature", 1, 2, of="weights"))
    with pytest.raises(ValueError, match="training has no end"):
        fit(tmp_path, Net(), KernelAnnealing(), max_epochs=-1, max_steps=-1)
