"""The study of accuracy: the grid is the protocol's, its arms are what their names say, and its rule chooses as it was written."""

import csv
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import report
import results
import run as run_module
import timm
import torch
import yaml
from designing import designed_file, read_overrides
from intervals import interval, p_value, paired, t_quantile
from phases import IncompleteError, Phases
from results import Results
from run import PHASES, Runner
from study import ROOT, Arm, Network, Run, Study, constant
from torch import nn
from training import FailedError, read_metrics

import design_lightning as dl
import design_lightning.models
from design_lightning.binary import DeSign
from design_lightning.cli import main
from design_lightning.surgery.stages import binary_layers

STUDY = Study.read()
VGG, RESNET = STUDY.networks
DESIGN = [arm for arm in STUDY.arms.values() if "kernel" in arm.binary]
OVERRIDES = {
    "vgg_small": {"stages.0.conv2": {"kernel": [[[0.2, 0.6], [0.4, 0.8]]]}},
    "resnet20": {"layer1.0.conv1": {"kernel": [[[0.1, 0.3], [0.1, 0.3]]]}},
}
V1_MEAN = (0.31178307 + 2 * 0.63100557 + 0.96713846) / 4

Top1 = Callable[[Run], float]


def row(run: Run, top1: float) -> dict[str, str]:
    return {"name": run.name, "config": run.config, "top1": str(top1)}


def filled(top1: Top1, until: str = "", study: Study = STUDY) -> Phases:
    """The phases after all runs up to a step, each with a figure of a function."""
    rows: dict[str, dict[str, str]] = {}
    for phase in PHASES:
        for step in Phases(study, Results({}), OVERRIDES.get).steps(phase):
            if step == until:
                return Phases(study, Results(rows), OVERRIDES.get)
            runs = Phases(study, Results(rows), OVERRIDES.get).steps(phase)[step]()
            rows |= {run.name: row(run, top1(run)) for run in runs}
    return Phases(study, Results(rows), OVERRIDES.get)


def by_arm(**points: float) -> Top1:
    """A figure that depends on the arm alone: 50 % and what is given."""
    return lambda run: 0.5 + points.get(run.arm.name, 0.0) / 100


def hours(runs: Sequence[Run]) -> float:
    """On two cores."""
    return sum(run.budget.seconds(run.network) for run in runs) / 3600 / 2


class TestGrid:
    def test_the_runs_are_as_many_as_the_protocol_says_and_fit_its_hours(self) -> None:
        phases = filled(by_arm(channels4_positive=1))
        settings, grid, controls = phases.settings(), phases.grid(), phases.controls()
        assert (len(settings), len(grid), len(controls)) == (5 * 2 * 2 * 2, 30 * 4 + 2, 4)
        designing = [run for run in settings if run.arm.name == "sign" and run.rate == 0.003][:2]
        assert hours([*settings, *grid, *controls, *designing]) <= 4
        assert len(phases.confirmation()) == 5 * 8 * 2
        assert hours(phases.confirmation()) <= 8
        assert (len(phases.affine_rates()), len(phases.affine_off())) == (3 * 2 * 2, 3 * 8 * 2)
        assert hours([*phases.affine_rates(), *phases.affine_off()]) <= 5
        whole = [*settings, *grid, *controls, *phases.confirmation(), *phases.affine_rates(), *phases.affine_off()]
        assert len({run.name for run in whole}) == len(whole)

    def test_every_published_kernel_is_an_arm(self) -> None:
        published = {arm.name for arm in STUDY.arms.values() if arm.binary == {"kernel": arm.name}}
        assert published == set(dl.ThresholdKernel.names())

    def test_two_processes_that_take_turns_get_as_many_of_each_network(self) -> None:
        phases = filled(by_arm())
        for runs in (phases.settings(), phases.confirmation(), phases.affine_off()):
            first = [run.network for run in runs[::2]]
            assert first.count(VGG) == first.count(RESNET) == len(runs) // 4

    def test_screening_sees_held_out_images_and_the_others_the_test_images(self) -> None:
        phases = filled(by_arm())
        for runs, val_size in ((phases.grid(), 5000), (phases.affine_rates(), 5000), (phases.confirmation(), None)):
            for run in runs:
                assert run.options()["data.val_size"] == val_size
                assert run.budget.split == ("test" if val_size is None else "held-out")

    def test_seeds_are_never_used_twice(self) -> None:
        seeds = [seed for of in STUDY.seeds.values() for seed in of]
        assert len(seeds) == len(set(seeds)) == 17
        phases = filled(by_arm())
        for network in STUDY.networks:
            runs = [run for run in phases.confirmation() if run.network == network]
            of = {arm: [r.seed for r in runs if r.arm.name == arm] for arm in {r.arm.name for r in runs}}
            assert all(seeds == STUDY.seeds["confirmation"] for seeds in of.values())  # paired

    def test_the_hash_of_a_configuration_follows_what_a_run_does_and_not_where(self) -> None:
        run = filled(by_arm()).grid()[0]
        assert run.config == replace(run).config
        others = [
            replace(run, rate=0.1),
            replace(run, seed=5),
            replace(run, affine=False),
            replace(run, network=RESNET),
        ]
        assert len({run.config, *(other.config for other in others)}) == 5


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def build(network: Network, **binary: Any) -> tuple[nn.Module, dl.BinarizationReport]:
    given = network.base()["model"]["init_args"]
    model = timm.create_model(given["backbone"], num_classes=10, **given["backbone_args"])
    return model, dl.binarize_(model, dl.BinaryConfig(**{**given["binary"], "companion": "prelu", **binary}))


@pytest.fixture(scope="module")
def sign_costs() -> dict[str, tuple[int, int, int]]:
    built = {network.name: build(network, activation="sign")[1] for network in STUDY.networks}
    return {name: (of.binary_macs, of.total_macs, of.binary_parameters) for name, of in built.items()}


@pytest.mark.filterwarnings("ignore:thresholds above 1", "ignore:.*binarizers saw")
@pytest.mark.parametrize("network", STUDY.networks, ids=lambda network: network.name)
@pytest.mark.parametrize("name", STUDY.arms)
def test_every_arm_builds_the_network_with_its_thresholds_at_the_cost_of_sign(
    name: str, network: Network, sign_costs: dict[str, tuple[int, int, int]]
) -> None:
    arm = STUDY.arms[name]
    if network not in STUDY.networks_of(arm):
        with pytest.raises(ValueError, match="scale_by_gamma needs one norm that feeds this layer alone"):
            build(network, **arm.binary)
        return
    model, summary = build(network, **Phases(STUDY, Results({}), OVERRIDES.get).resolved(arm, network).binary)
    layers = {key: layer.activation for key, layer in binary_layers(model).items()}
    assert len(layers) == {"vgg_small": 5, "resnet20": 18}[network.name]
    kinds = {type(activation).__name__ for activation in layers.values()}
    assert kinds == {{"sign": "Sign", "rsign": "RSign"}.get(arm.binary.get("activation", ""), "DeSign")}
    for key, activation in layers.items():
        if isinstance(activation, DeSign):
            own = OVERRIDES[network.name].get(key, arm.binary) if arm.designed else arm.binary
            torch.testing.assert_close(activation.levels.detach(), dl.ThresholdKernel.of(own["kernel"]).tensor())
            assert activation.scale.item() == arm.binary.get("scale", 1.0)
            assert activation.learn_kernel == arm.binary.get("learn_kernel", False)
            assert (activation.gamma_from is not None) == arm.binary.get("scale_by_gamma", False)
    # What is learned of thresholds is a constant at inference: RSign's shifts and learned levels are not counted as operations.
    costs = sign_costs[network.name]
    assert (summary.binary_macs, summary.total_macs, summary.binary_parameters) == costs


EACH_ON_ITS_OWN = [pytest.param(name, True, marks=pytest.mark.slow) for name in STUDY.arms]


@pytest.mark.parametrize(
    ("name", "affine"), [("sign", False), ("2x2_v1_annealed", True), ("designed", True), *EACH_ON_ITS_OWN]
)
def test_its_command_says_the_same_to_design_train(name: str, affine: bool, capsys: pytest.CaptureFixture[str]) -> None:
    phases, arm, setting = Phases(STUDY, Results({}), OVERRIDES.get), STUDY.arms[name], STUDY.settings[-1]
    run = replace(phases.screened(setting, arm, [VGG])[1], affine=affine)
    with pytest.raises(SystemExit) as ended:
        main([*run.command("data/cifar10")[1:], "--print_config"])
    assert not ended.value.code
    config = yaml.safe_load(capsys.readouterr().out)
    given = config["model"]["init_args"]
    expected = {**VGG.base()["model"]["init_args"]["binary"], **setting.binary, **run.arm.binary}
    assert {key: given["binary"][key] for key in expected} == expected
    assert given["optimizer"]["init_args"]["lr"] == 0.01
    assert given["backbone_args"] == {"width": 0.25, "norm_affine": affine}
    callbacks = config["trainer"]["callbacks"] or []
    assert [c["class_path"].rpartition(".")[2] for c in callbacks] == [c["class_path"] for c in arm.callbacks]
    assert [c["init_args"]["until"] for c in callbacks] == [0.5 for _ in arm.callbacks]
    assert (config["trainer"]["max_epochs"], config["trainer"]["limit_train_batches"]) == (1, 660)
    assert (config["data"]["init_args"]["val_size"], config["data"]["init_args"]["seed"]) == (5000, 0)


class TestArms:
    def test_means(self) -> None:
        def mean(name: str) -> float:
            return dl.ThresholdKernel.of(STUDY.arms[name].binary["kernel"]).mean()

        for name in ("constant_v1", "constant_learned", "2x2x4_v1_turned", "2x2_v1_annealed", "2x2_v1_learned"):
            assert mean(name) == pytest.approx(V1_MEAN, abs=1e-6)
        for name in ("2x2_v1_zero_mean", "channels4_zero"):
            assert mean(name) == pytest.approx(0, abs=1e-6)
        for name in ("channels4_positive", "latin4_positive", "spatial4_positive"):
            assert mean(name) == pytest.approx(0.65)

    def test_2x2_v1_less_its_mean_keeps_its_pattern(self) -> None:
        less = dl.ThresholdKernel.of(STUDY.arms["2x2_v1_zero_mean"].binary["kernel"]).tensor()
        torch.testing.assert_close(less, dl.ThresholdKernel.named("2x2_v1").tensor() - V1_MEAN, atol=1e-6, rtol=0)

    def test_the_latin_arrangement_has_each_level_once_in_a_channel_and_once_at_a_pixel(self) -> None:
        levels = dl.ThresholdKernel.of(STUDY.arms["latin4_positive"].binary["kernel"]).tensor().flatten(1)
        ordered = torch.tensor([0.05, 0.45, 0.85, 1.25])
        assert all(torch.equal(values.sort().values, ordered) for values in [*levels, *levels.t()])

    def test_each_channel_of_the_turned_kernel_is_the_last_one_a_quarter_turn_on(self) -> None:
        levels = dl.ThresholdKernel.of(STUDY.arms["2x2x4_v1_turned"].binary["kernel"]).tensor()
        assert torch.equal(levels[0], dl.ThresholdKernel.named("2x2_v1").tensor()[0])
        for before, after in itertools.pairwise(levels):
            assert torch.equal(after, before.rot90(-1))

    def test_annealed_arms_start_as_sign(self) -> None:
        annealed = [arm for arm in STUDY.arms.values() if arm.callbacks]
        assert len(annealed) == 2
        for arm in annealed:
            assert arm.binary["scale"] == arm.callbacks[0]["init_args"]["start"] == 0

    def test_settings_differ_in_what_is_no_threshold(self) -> None:
        for setting in STUDY.settings:
            assert set(setting.binary) <= {"estimator", "estimator_args", "companion"}
            dl.BinaryConfig(activation="sign", **setting.binary)

    @pytest.mark.parametrize("arm", DESIGN, ids=lambda arm: arm.name)
    def test_a_control_is_constant_with_the_same_mean_and_differs_in_nothing_else(self, arm: Arm) -> None:
        control = arm.control()
        levels = dl.ThresholdKernel.of(control.binary["kernel"]).levels
        assert levels[0][0][0] == pytest.approx(dl.ThresholdKernel.of(arm.binary["kernel"]).mean(), abs=1e-6)
        assert dl.ThresholdKernel.of(control.binary["kernel"]).shape == (1, 1, 1)
        assert {**control.binary, "kernel": 0} == {**arm.binary, "kernel": 0}
        assert control.callbacks == arm.callbacks

    def test_the_control_of_designed_kernels_has_the_mean_of_each_layer(self) -> None:
        phases = filled(by_arm())
        control = phases.control(STUDY.arms["designed"], VGG)
        assert control.binary["overrides"] == {"stages.0.conv2": {"kernel": [[[0.5]]]}}
        assert phases.control(STUDY.arms["designed"], RESNET).binary["overrides"] == {
            "layer1.0.conv1": {"kernel": [[[0.2]]]}
        }

    def test_a_control_that_the_grid_has_is_that_arm(self) -> None:
        phases = filled(by_arm())
        names = {
            name: phases.control(STUDY.arms[name], VGG).name for name in STUDY.arms if name in {a.name for a in DESIGN}
        }
        assert names["2x2_v1"] == names["2x2x4_v1_turned"] == "constant_v1"
        assert names["channels4_zero"] == names["2x2_v1_zero_mean"] == "sign"
        assert names["channels4_low"] == "constant_low"
        assert names["2x2_v1_annealed"] == "constant_of_2x2_v1_annealed"
        assert constant("2x2_v1") == STUDY.arms["constant_v1"].binary["kernel"]


class TestRule:
    def test_each_arm_keeps_its_better_rate(self) -> None:
        def top1(run: Run) -> float:
            better = 0.01 if run.arm.name == "2x2_v2" else 0.003
            return 0.5 + 0.1 * (run.rate == better) + 0.01 * (run.arm.name == "2x2_v2")

        phases = filled(top1)
        assert phases.best(phases.setting, STUDY.arms["2x2_v2"], VGG) == (0.01, pytest.approx(0.61))
        rates = {run.arm.name: run.rate for run in phases.confirmation()}
        assert rates["2x2_v2"] == 0.01
        assert rates["sign"] == 0.003

    def test_the_setting_is_the_best_of_the_judges_and_not_of_one_of_them(self) -> None:
        def top1(run: Run) -> float:
            good = {("approx_prelu", "sign"): 0.04, ("ste_hardtanh", "sign"): 0.03, ("ste_hardtanh", "2x2_v1"): 0.03}
            return 0.5 + good.get((run.setting.name, run.arm.name), 0)

        phases = filled(top1)
        assert phases.setting.name == "ste_hardtanh"
        assert {run.setting.name for run in [*phases.grid(), *phases.confirmation(), *phases.affine_off()]} == {
            "ste_hardtanh"
        }

    def test_the_three_best_design_arms_go_on_with_sign_and_the_constant_of_the_best(self) -> None:
        points = {"constant_v1": 9, "rsign": 8, "2x2_v1_gamma": 7, "2x2_v2": 3, "channels4_zero": 2, "2x2_v1_half": 1}
        phases = filled(by_arm(**points))
        for network in STUDY.networks:
            arms = [arm.name for arm in phases.confirmed(network)]
            assert arms == ["sign", "2x2_v2", "channels4_zero", "2x2_v1_half", "constant_of_2x2_v2"]
            assert [arm.name for arm in phases.without_affine(network)] == ["sign", "2x2_v2", "constant_of_2x2_v2"]
        assert {run.arm.name for run in phases.controls()} == {"constant_of_2x2_v2"}

    def test_arms_are_ranked_by_the_mean_over_networks(self) -> None:
        def top1(run: Run) -> float:
            points = {("2x2_v2", "vgg_small"): 6, ("2x2_v1_half", "vgg_small"): 4, ("2x2_v1_half", "resnet20"): 4}
            return 0.5 + points.get((run.arm.name, run.network.name), 0) / 100

        assert [arm.name for arm in filled(top1).ranking[:2]] == ["2x2_v1_half", "2x2_v2"]

    def test_a_best_arm_of_mean_zero_has_sign_as_its_control(self) -> None:
        phases = filled(by_arm(channels4_zero=1))
        assert phases.controls() == []
        assert [arm.name for arm in phases.without_affine(VGG)] == ["sign", "channels4_zero"]

    def test_designed_kernels_may_win(self) -> None:
        phases = filled(by_arm(designed=1))
        confirmed = {run.network.name: run.arm for run in phases.confirmation() if run.arm.name == "designed"}
        assert {name: arm.binary["overrides"] for name, arm in confirmed.items()} == OVERRIDES
        assert len(phases.controls()) == 4

    @pytest.mark.parametrize("until", ["settings", "grid", "controls"])
    def test_later_phases_refuse_while_screening_is_incomplete(self, until: str) -> None:
        phases = filled(by_arm(channels4_positive=1), until)
        for later in (phases.confirmation, phases.affine_rates, phases.affine_off):
            with pytest.raises(IncompleteError, match=rf"runs of screening, step {until}, are missing.*run: python"):
                later()

    def test_a_row_of_another_configuration_does_not_count(self) -> None:
        phases = filled(by_arm())
        name = phases.grid()[5].name
        phases.results.rows[name]["config"] = "0" * 12
        with pytest.raises(
            IncompleteError, match=f"1 of 122 runs of screening, step grid, are missing, the first {name}"
        ):
            Phases(STUDY, phases.results, OVERRIDES.get).confirmation()


class TestIntervals:
    def test_quantiles_are_those_of_the_tables(self) -> None:
        for degrees, value in {1: 12.7062, 2: 4.3027, 7: 2.3646, 15: 2.1314, 120: 1.9799}.items():
            assert t_quantile(0.975, degrees) == pytest.approx(value, abs=5e-5)
        assert t_quantile(0.995, 7) == pytest.approx(3.4995, abs=5e-5)

    def test_a_paired_interval_by_hand(self) -> None:
        # Differences 1, 2, 3: mean 2, standard deviation 1, t(0.975, 2) = 4.3027, half width 4.3027 / sqrt(3).
        found = paired([3.0, 5.0, 7.0], [2.0, 3.0, 4.0])
        assert (found.mean, found.n) == (2, 3)
        assert found.half == pytest.approx(2.48414, abs=1e-4)
        assert (found.low, found.high) == (pytest.approx(-0.48414, abs=1e-4), pytest.approx(4.48414, abs=1e-4))

    def test_pairs_take_out_what_the_seeds_share(self) -> None:
        shared = [10.0, 50.0, 30.0, 70.0]
        assert paired([x + 1 for x in shared], shared).half == pytest.approx(0, abs=1e-9)

    def test_the_p_value_by_hand(self) -> None:
        # t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
        assert p_value([1.0, 2.0, 3.0]) == pytest.approx(1 - 12**0.5 / 14**0.5, abs=1e-9)

    def test_one_value_says_nothing_of_its_spread(self) -> None:
        assert interval([3.0]).low == float("-inf")
        with pytest.raises(ValueError, match="at least one value"):
            interval([])
        with pytest.raises(ValueError, match="zip"):
            paired([1.0, 2.0], [1.0])


class TestReport:
    def noisy(self, gain: float) -> Top1:
        """2x2_v2 is better than Sign by a gain, and its constant by 0.5 points; seeds differ alike for all, and a little each."""

        def top1(run: Run) -> float:
            points = {"2x2_v2": gain, "constant_of_2x2_v2": 0.5}.get(run.arm.name, 0.0)
            noise = 0.1 * ((run.seed * (3 + len(run.arm.name))) % 5 - 2) + run.seed % 7
            return (50 + points + noise) / 100

        return top1

    def test_the_hypotheses_hold_where_all_intervals_are_above_zero(self) -> None:
        text, compared = report.repeated(filled(self.noisy(2.0)), "confirmation")
        assert "`2x2_v2` is better than `sign` on vgg_small: **holds** (+2." in text
        assert "`2x2_v2` is better than `constant_of_2x2_v2` on resnet20: **holds**" in text
        assert "which is the claim: **holds**" in text
        assert len(compared) == 2 * (1 + 3 * 2 + 1)

    def test_the_claim_fails_where_the_gain_is_that_of_the_shift(self) -> None:
        text, _ = report.repeated(filled(self.noisy(0.5)), "affine_off")
        assert "`2x2_v2` is better than `constant_of_2x2_v2` on vgg_small: **does not hold**" in text
        assert "which is the claim: **does not hold**" in text

    def test_there_is_no_verdict_before_all_runs_are_there(self) -> None:
        phases = filled(self.noisy(2.0))
        del phases.results.rows[phases.confirmation()[-1].name]
        text, compared = report.repeated(Phases(STUDY, phases.results, OVERRIDES.get), "confirmation")
        assert "Incomplete: 1 of 80 runs are missing, so there is no verdict." in text
        assert "holds" not in text
        assert compared == []

    def test_screening_shows_every_arm_with_its_difference_to_sign(self) -> None:
        text, figures = report.screening(filled(by_arm(**{"2x2_v2": 1.5, "rsign": -2})))
        lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
        assert set(STUDY.arms) <= set(lines)
        assert [part.strip() for part in lines["2x2_v2"].split("|")[2:-1]] == ["design", *["51.5", "+1.5", "0.003"] * 2]
        assert "48.0" in lines["rsign"]
        assert figures["vgg_small"]["2x2_v2"] == pytest.approx(1.5)
        assert "Confirmed: `2x2_v2`" in text

    def test_files(self, tmp_path: Path) -> None:
        phases = filled(self.noisy(2.0))
        for phase in PHASES:
            steps = [run for step in phases.steps(phase).values() for run in step()]
            path = results.table(tmp_path, phase)
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, results.COLUMNS)
                writer.writeheader()
                writer.writerows(row(run, phases.results.top1(run)) | {"machine": "a processor"} for run in steps)
        for name, overrides in OVERRIDES.items():
            designed_file(tmp_path, name).write_text(json.dumps({"overrides": overrides}), encoding="utf-8")
        assert report.main(["--out", str(tmp_path)]) == 0
        for phase in PHASES:
            assert (tmp_path / f"accuracy_{phase}.png").stat().st_size > 10_000
            text = (tmp_path / f"accuracy_{phase}.md").read_text(encoding="utf-8")
            assert f"`python benchmarks/accuracy/run.py {phase}`, a processor" in text
        assert "98.75 % intervals" in (tmp_path / "accuracy_confirmation.md").read_text(encoding="utf-8")

    def test_without_results_it_says_what_to_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            report.main(["--out", str(tmp_path)])
        assert "no results" in capsys.readouterr().err


TINY = """
short: &short {data.batch_size: 10, trainer.limit_train_batches: 2, trainer.log_every_n_steps: 1}
networks:
  tiny: {config: vgg_small.yaml, images_per_second: 225}
rates: [0.003, 0.01]
budgets:
  screening:
    split: held-out
    options: {data.val_size: 10, trainer.max_epochs: 1, <<: *short}
    evaluated: 10
  confirmation:
    split: test
    options: {data.val_size: null, trainer.max_epochs: 2, <<: *short}
    evaluated: 10
seeds: {screening: [0], confirmation: [101, 102], affine_off: [201]}
judges: [sign]
settings: {approx_hardtanh: {estimator: approx_sign, companion: hardtanh}}
arms:
  sign: {kind: baseline, binary: {activation: sign}}
  2x2_v1: {kind: design, binary: {kernel: 2x2_v1}}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A grid of a few runs of seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def trained(run: Run, phase: str, data: str, claim: Any = None) -> results.Row:
    """A row as of a training."""
    known = dict.fromkeys(results.COLUMNS, "-")
    known |= {"name": run.name, "phase": phase, "config": run.config, "top1": 0.5, "seconds": 1.0, "arm": run.arm.name}
    return results.Row(**known)  # type: ignore[arg-type]


class TestRunner:
    @pytest.fixture
    def done(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """The names of the runs that were trained, where nothing is."""
        names: list[str] = []

        def train(run: Run, *others: Any) -> results.Row:
            names.append(run.name)
            return trained(run, *others)

        monkeypatch.setattr(run_module, "train", train)
        return names

    def test_a_phase_goes_on_where_it_stopped(self, tiny: Path, tmp_path: Path, done: list[str]) -> None:
        runner = Runner(Study.read(tiny), tmp_path, only="*sign*")
        with pytest.raises(IncompleteError, match="screening/tiny/approx_hardtanh/2x2_v1"):
            runner.do("screening")
        assert [name.split("/")[3] for name in done] == ["sign", "sign"]
        assert replace(runner, only="*").do("screening") == 0
        arms = [name.split("/")[3] for name in done]
        assert arms == ["sign"] * 2 + ["2x2_v1"] * 2 + ["constant_of_2x2_v1"] * 2
        assert replace(runner, only="*").do("screening") == 0
        assert len(done) == 6
        assert replace(runner, only="*").do("confirmation") == 0
        assert len(done) == 6 + 3 * 2
        assert replace(runner, only="*").do("affine_off") == 0
        assert len(done) == 6 + 3 * 2 + 3 * 2 + 3
        assert len(results.read(results.table(tmp_path, "affine_off"))) == 9

    def test_a_row_of_another_configuration_is_made_anew(self, tiny: Path, tmp_path: Path, done: list[str]) -> None:
        runner = Runner(Study.read(tiny), tmp_path)
        runner.do("screening")
        tiny.write_text(TINY.replace("rates: [0.003, 0.01]", "rates: [0.003, 0.02]"), encoding="utf-8")
        del done[:]
        replace(runner, study=Study.read(tiny)).do("screening")
        assert [name.split("/")[4] for name in done] == ["lr0.02"] * 3

    def test_shards_share_the_runs(self, tiny: Path, tmp_path: Path, done: list[str]) -> None:
        runner = Runner(Study.read(tiny), tmp_path)
        runs = runner.phases().settings()
        halves = [replace(runner, shard=(i, 2)).mine(runs) for i in (1, 2)]
        assert sorted(run.name for half in halves for run in half) == sorted(run.name for run in runs)
        with pytest.raises(IncompleteError):
            replace(runner, shard=(1, 2)).do("screening")
        assert done == [halves[0][0].name]

    def test_a_run_that_another_process_does_is_left_to_it(self, tiny: Path, tmp_path: Path, done: list[str]) -> None:
        runner = Runner(Study.read(tiny), tmp_path)
        first = runner.phases().settings()[0]
        with results.claim(tmp_path, first.name) as claim:
            assert claim is not None
            assert runner.once(first, "screening", "", wait=False)
        assert done == []
        assert runner.once(first, "screening", "", wait=True)
        assert done == [first.name]

    def test_a_run_stays_claimed_while_its_training_outlives_a_killed_runner(self, tmp_path: Path) -> None:
        runner = (
            "import os, subprocess, sys; from pathlib import Path; import results\n"
            "with results.claim(Path(sys.argv[1]), 'run') as claim:\n"
            "    training = subprocess.Popen(['sleep', '60'], pass_fds=[claim.fileno()], stdout=-3, stderr=-3)\n"
            "    print(training.pid, flush=True)\n"
            "    os.kill(os.getpid(), 9)\n"
        )
        path = os.pathsep.join(["benchmarks/accuracy", os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-c", runner, str(tmp_path)]
        killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        with results.claim(tmp_path, "run") as claim:
            assert claim is None
        os.kill(int(killed.stdout), signal.SIGKILL)
        with results.claim(tmp_path, "run", wait=True) as claim:
            assert claim is not None

    def test_a_failure_is_told_and_ends_the_phase_behind_the_step(
        self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def train(run: Run, *others: Any) -> results.Row:
            if run.rate == 0.01:
                raise FailedError("exit code 1: no space")
            return trained(run, *others)

        monkeypatch.setattr(run_module, "train", train)
        assert Runner(Study.read(tiny), tmp_path).do("screening") == 1
        assert "sign/lr0.01/seed0: failed, exit code 1: no space" in capsys.readouterr().err
        assert len(results.read(results.table(tmp_path, "screening"))) == 1

    def test_dry_run_prints_commands_and_trains_nothing(
        self, tiny: Path, tmp_path: Path, done: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        Runner(Study.read(tiny), tmp_path).show("screening")
        shown = capsys.readouterr().out
        assert "settings: 2 of 2 runs to do, 0.0 h on two cores" in shown
        assert (
            "OMP_NUM_THREADS=1 design-train fit --config benchmarks/accuracy/vgg_small.yaml --seed_everything 0"
            in shown
        )
        assert "grid: 2 of 2 runs of screening, step settings, are missing" in shown
        assert done == []

    def test_data_that_is_not_there_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run_module.main(["screening", "--data", "nowhere", "--out", str(tmp_path)])
        assert "nowhere/train is missing" in capsys.readouterr().err

    @pytest.mark.parametrize("text", ["3/2", "0/2", "2", "a/b"])
    def test_a_shard_that_is_none_is_named(self, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            run_module.main(["screening", "--shard", text])
        assert text in capsys.readouterr().err


def write_logs(folder: Path, metrics: str) -> Path:
    (folder / "metrics.csv").write_text(metrics, encoding="utf-8")
    (folder / "config.yaml").write_text("data: {init_args: {batch_size: 50}}", encoding="utf-8")
    return folder


def test_figures_are_those_of_the_last_epoch(tmp_path: Path) -> None:
    losses = "".join(f"{i // 10},{10 * i + 9},{20 - i}.0,\n" for i in range(20))
    logs = write_logs(tmp_path, f"epoch,step,train/loss,val/top1\n{losses}1,199,,0.625\n")
    assert read_metrics(logs, epochs=2) == {"top1": 0.625, "train_loss": 1.5, "epochs": 2, "images": 10_000}


@pytest.mark.parametrize("measured", ["", "0,99,,0.5\n", "0,99,,0.5\n1,199,,0.6\n"])
def test_a_training_that_was_not_measured_once_at_its_end_is_refused(tmp_path: Path, measured: str) -> None:
    logs = write_logs(tmp_path, f"epoch,step,train/loss,val/top1\n0,9,1.0,\n{measured}")
    with pytest.raises(FailedError, match=r"measured \d times, not once after epoch 1"):
        read_metrics(logs, epochs=2)


DESIGNED = "designed: {kind: design, designed: true, binary"


@pytest.mark.slow
def test_screening_and_confirmation_on_a_handful_of_images(tiny: Path, tmp_path: Path, cifar10_tree: Path) -> None:
    """Real trainings through `design-train fit`, the designed kernels, a row made anew by its own command, and the report."""
    study = TINY.replace("rates: [0.003, 0.01]", "rates: [0.01]").replace("2x2_v1: {kind: design, binary", DESIGNED)
    tiny.write_text(study, encoding="utf-8")
    command = [sys.executable, "benchmarks/accuracy/run.py"]
    options = ["--study", str(tiny), "--data", str(cifar10_tree), "--out", str(tmp_path)]
    for phase in PHASES[:2]:
        ran = subprocess.run([*command, phase, *options], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    rows = [row for phase in PHASES for row in results.read(results.table(tmp_path, phase)).values()]
    assert [row["arm"] for row in rows] == [*(arms := ["sign", "designed", "constant_of_designed"]), *arms, *arms]
    assert set(read_overrides(tmp_path, "tiny") or {}) <= set(OVERRIDES["vgg_small"]) | {
        "stages.1.conv1",
        "stages.1.conv2",
        "stages.2.conv1",
        "stages.2.conv2",
    }
    for row in rows:
        assert 0 <= float(row["top1"]) <= 1
        assert int(row["images"]) == (20 if row["split"] == "held-out" else 40)
        assert (row["diverged"], row["torch"]) == ("False", version("torch"))
    last = next(row for row in rows if row["step"] == "confirmation" and row["arm"] == "sign")
    variables, *arguments = shlex.split(last["command"])
    again = subprocess.run(
        [sys.executable, "-m", "design_lightning", *arguments[1:]],
        cwd=ROOT,
        env=os.environ | dict([variables.split("=")]),
        capture_output=True,
        text=True,
    )
    assert f"last val/top1: {100 * float(last['top1']):.2f}%" in again.stdout
    assert report.main(["--study", str(tiny), "--out", str(tmp_path)]) == 0
