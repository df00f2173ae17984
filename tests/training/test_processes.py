"""Two processes, and one that accumulates two batches, train as one with the same images a step: `benchmarks/ddp_parity.py`."""

import ddp_parity
import pytest
import torch
from ddp_parity import BATCH, NORMS_ON_CPU, STEPS, Norm, Run, agreement, train

from design_lightning.training.processes import mean_over_processes


def check(norm: Norm, ways: tuple[ddp_parity.Way, ...]) -> Run:
    one = train("one", norm, "64-true")
    assert one.stages == [1] * (STEPS // 2) + [2] * (STEPS // 2)
    sizes = [weight.abs() for weight in one.latent.values()]
    assert {weight.dtype for weight in sizes} == {torch.float64}
    assert all(0.02 < float((weight == 0.04).double().mean()) < 0.6 and weight.max() == 0.04 for weight in sizes)
    values = {name.rpartition(".")[2]: round(float(value), 6) for name, value in one.annealed.items()}
    assert values == {"scale": 1.0, "temperature": 10.0, "tau": 0.99}
    assert {f"{name} at step {STEPS - 1}" for name in ("train/loss", "train/top1", "val/loss", "val/top1")} <= set(
        one.metrics
    )
    for way in ways:
        found = agreement(norm, "64-true", way, train(way, norm, "64-true"), one)
        assert found.latent < 1e-8, found
        assert found.other < 1e-8, found
        assert found.annealed == 0, found
        assert found.metrics < 1e-6, found  # torchmetrics counts in float32
        assert found.signs_differ == 0, found
        assert found.of_signs == sum(weight.numel() for weight in sizes)
    return one


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS_ON_CPU)
def test_two_processes_accumulation_and_shards_train_as_one_process(norm: Norm) -> None:
    check(norm, ("two", "accumulate", "sharded"))


@pytest.mark.slow
def test_other_images_a_step_make_another_network() -> None:
    first, second = train("one", "group", "64-true"), train("one", "group", "64-true", batch_size=BATCH // 2)
    found = agreement("group", "64-true", "one", second, first)
    assert found.latent > 1e-3
    assert found.signs_differ > 100


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="torch's SyncBatchNorm needs a CUDA device for each of two processes"
)
def test_synchronised_batch_norm_trains_two_processes_as_one() -> None:
    check("synchronised", ("two",))


def test_the_mean_over_one_process_is_its_own() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(mean_over_processes(values), values)
