"""Re-estimated batch-norm statistics, against those of all inputs put together."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from design_lightning.binary import BinaryConv2d, DeSign
from design_lightning.training.batch_norm import recalibrate_batch_norm_, running_batch_norms


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        BinaryConv2d(4, 8, 3, activation=DeSign("2x2_v1")),
        BatchNormAct2d(8, act_layer=nn.Hardtanh),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8, momentum=None),
        nn.Linear(8, 2),
    )


def batches(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 3, 12, 12, generator=generator) * (1 + i) + i for i, n in enumerate(sizes)]


def statistics(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    norms = running_batch_norms(model)
    return {n: (norm.running_mean.clone(), norm.running_var.clone()) for n, norm in norms.items()}  # type: ignore[union-attr]


def expected(model: nn.Module, data: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and unbiased variance of everything that each norm gets, when each batch is normalised by itself."""
    seen: dict[str, list[Tensor]] = {name: [] for name in running_batch_norms(model)}
    handles = []
    model.eval()
    for name, norm in running_batch_norms(model).items():
        norm.training = True

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            seen[name].append(inputs[0].detach().double().transpose(0, 1).flatten(1))

        handles.append(norm.register_forward_pre_hook(keep))
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    values = {name: torch.cat(each, 1) for name, each in seen.items()}
    return {name: (each.mean(1).float(), each.var(1).float()) for name, each in values.items()}


def test_statistics_are_those_of_all_values_together_whatever_the_size_of_a_batch() -> None:
    data = batches(5, 2, 7)
    reference = network()
    model = network()
    model.load_state_dict(reference.state_dict())
    recalibrate_batch_norm_(model, data)
    found = statistics(model)
    assert found.keys() == {"1", "3", "7"}
    for name, (mean, var) in expected(reference, data).items():
        torch.testing.assert_close(found[name][0], mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[name][1], var, rtol=1e-5, atol=1e-5)


def test_the_first_norm_has_the_moments_of_its_input() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    data = batches(3, 1, 8)
    recalibrate_batch_norm_(model, data)
    values = torch.cat(data).transpose(0, 1).flatten(1)
    mean, var = statistics(model)["0"]
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(var, values.var(1))


def test_a_mean_far_from_zero_leaves_the_variance_exact() -> None:
    model = nn.Sequential(nn.BatchNorm1d(1))
    data = [1e4 + torch.randn(64, 1, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    recalibrate_batch_norm_(model, data)
    torch.testing.assert_close(statistics(model)["0"][1], torch.cat(data).double().var(0).float(), rtol=1e-4, atol=0)


def test_modes_counters_parameters_and_random_numbers_stay() -> None:
    model = network()
    model.train()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    random = torch.get_rng_state()
    recalibrate_batch_norm_(model, batches(4, 4))
    assert [module.training for module in model.modules()] == modes
    assert all(norm.track_running_stats for norm in running_batch_norms(model).values())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    changed = {n for n, v in model.state_dict().items() if isinstance(v, Tensor) and not torch.equal(v, before[n])}
    assert changed == {f"{norm}.running_{kind}" for norm in ("1", "3", "7") for kind in ("mean", "var")}


def test_sums_of_two_processes_give_the_statistics_of_both_shares() -> None:
    one, two, all_at_once = network(), network(), network()
    for model in (two, all_at_once):
        model.load_state_dict(one.state_dict())
    data = batches(5, 2, 7)
    shares: list[Tensor] = []

    def note(total: Tensor) -> Tensor:
        shares.append(total)
        return total

    recalibrate_batch_norm_(two, data[1:], note)
    recalibrate_batch_norm_(one, data[:1], lambda total: total + shares[0])
    recalibrate_batch_norm_(all_at_once, data)
    assert len(shares) == 1
    for name, found in statistics(one).items():
        torch.testing.assert_close(found, statistics(all_at_once)[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3)).to(dtype)
    data = [batch.to(dtype) for batch in batches(8, 8)]
    recalibrate_batch_norm_(model, data)
    values = torch.cat(data).double().transpose(0, 1).flatten(1)
    found = statistics(model)["0"]
    torch.testing.assert_close(found, (values.mean(1).to(dtype), values.var(1).to(dtype)))


def test_a_failure_leaves_everything_as_it_was() -> None:
    model = network().train()
    before = statistics(model)
    with pytest.raises(RuntimeError):
        recalibrate_batch_norm_(model, [*batches(4), torch.zeros(2, 5, 12, 12)])
    assert all(module.training for module in model.modules())
    assert all(norm.track_running_stats for norm in running_batch_norms(model).values())
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("make", "data", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), [torch.zeros(2, 2)], "Sequential has no batch norm"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)), [torch.zeros(2, 2)], "no batch norm"),
        (lambda: nn.Sequential(nn.BatchNorm1d(2)), [], "at least one batch"),
    ],
)
def test_nothing_to_estimate_is_an_error(make: Callable[[], nn.Module], data: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recalibrate_batch_norm_(make(), data)


def test_a_norm_that_sees_no_batch_keeps_its_statistics_with_a_warning() -> None:
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.auxiliary = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.auxiliary(self.norm(x)) if self.training else self.norm(x)

    model = WithHead()
    with pytest.warns(UserWarning, match="1 batch norms saw no batch and keep their statistics, among them auxiliary"):
        recalibrate_batch_norm_(model, [torch.randn(8, 2) + 3])
    assert torch.equal(statistics(model)["auxiliary"][0], torch.zeros(2))
    assert statistics(model)["norm"][0].min() > 1
