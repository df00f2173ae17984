"""Distillation: its formulas by hand, and its effect on real training of a tiny network."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import lightning
import numpy as np
import pytest
import timm
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.training import DesignClassifier, Distillation
from design_lightning.training.distillation import attention_distance, divergence

SMALL: dict[str, Any] = {"backbone": "resnet20_cifar", "backbone_args": {"width": 0.25}, "num_classes": 10}
GREY: dict[str, Any] = {**SMALL, "input_size": (1, 16, 16), "mean": [0.5], "std": [0.25]}


def trainer(folder: Path, *callbacks: Any, **arguments: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "max_epochs": 1,
    }
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**quiet, **arguments})


def batches(count: int = 16, batch_size: int = 4) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(count) % 10), batch_size=batch_size)


def sgd(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.1)


@pytest.fixture
def teacher_file(tmp_path: Path) -> str:
    """A checkpoint of a float network, whose logits say something."""
    torch.manual_seed(7)
    model = DesignClassifier(**GREY, binary=None)
    model.backbone.fc.weight.data.mul_(20)  # type: ignore[union-attr,operator]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
    trainer_ = trainer(tmp_path, max_steps=0)
    trainer_.fit(model, batches())
    trainer_.save_checkpoint(tmp_path / "teacher.ckpt")
    return str(tmp_path / "teacher.ckpt")


class Watch(lightning.Callback):
    """What is only there while the student trains."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.teacher = pl_module._distiller.teacher
        self.before = copy.deepcopy(self.teacher.network.state_dict())

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_that_of_a_slow_reference(temperature: float) -> None:
    logits, other = torch.randn(5, 7), 3 * torch.randn(5, 7)
    expected = 0.0
    for mine, its in zip(logits.double().numpy() / temperature, other.double().numpy() / temperature, strict=True):
        q, p = np.exp(mine) / np.exp(mine).sum(), np.exp(its) / np.exp(its).sum()
        expected += sum(p[k] * np.log(p[k] / q[k]) for k in range(7)) / 5
    assert float(divergence(logits, other, temperature)) == pytest.approx(temperature**2 * expected, rel=1e-5)
    assert float(divergence(logits, logits, temperature)) == pytest.approx(0, abs=1e-6)


def test_divergence_has_the_gradient_of_the_cross_entropy_with_soft_labels() -> None:
    logits, other = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    (gradient,) = torch.autograd.grad(divergence(logits, other), logits)
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, other.softmax(1)), logits)
    torch.testing.assert_close(gradient, expected)


def test_attention_distance_is_that_of_a_slow_reference() -> None:
    mine, its = torch.randn(3, 4, 2, 5), torch.randn(3, 6, 2, 5)
    expected = 0.0
    for a, b in zip(mine.double().numpy(), its.double().numpy(), strict=True):
        first, second = (np.array([[(x[:, i, j] ** 2).mean() for j in range(5)] for i in range(2)]) for x in (a, b))
        expected += float(np.linalg.norm(first / np.linalg.norm(first) - second / np.linalg.norm(second))) / 3
    assert float(attention_distance(mine, its)) == pytest.approx(expected, rel=1e-5)
    assert float(attention_distance(mine, 3 * mine)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("weight", "temperature", "attention"), [(1.0, 1.0, 0.0), (0.5, 2.0, 0.0), (0.75, 4.0, 3.0), (0.0, 1.0, 0.5)]
)
def test_one_step_is_that_of_the_loss_by_hand(
    tmp_path: Path, teacher_file: str, weight: float, temperature: float, attention: float
) -> None:
    teach = Distillation(teacher_file, weight=weight, temperature=temperature, attention=attention)
    student = DesignClassifier(**GREY, distillation=teach, optimizer=sgd, scheduler=None, latent_weight_decay=None)
    twin, teacher = copy.deepcopy(student).train(), dl.load(teacher_file)
    watch = Watch()
    trainer(tmp_path, watch, max_steps=1).fit(student, batches())
    images, labels = next(iter(batches()))

    def features(network: Any) -> list[Tensor]:
        maps = [network.act1(network.bn1(network.conv1(images)))]
        for stage in (network.layer1, network.layer2, network.layer3):
            maps.append(stage(maps[-1]))
        return maps[1:]

    maps = features(twin.backbone)
    logits = twin.backbone.forward_head(maps[-1])  # type: ignore[operator]
    p = (teacher(images) / temperature).softmax(1)
    kl = (p * (p.log() - (logits / temperature).log_softmax(1))).sum(1).mean()
    distance = sum(attention_distance(a, b) for a, b in zip(maps, features(teacher), strict=True))
    loss = (1 - weight) * F.cross_entropy(logits, labels) + weight * temperature**2 * kl + attention * distance
    loss.backward()
    expected = {name: p.detach() - 0.1 * p.grad for name, p in twin.named_parameters() if p.grad is not None}
    assert len(expected) > 50
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)
    assert watch.logged[0]["train/loss"] == pytest.approx(float(loss), rel=1e-4)
    assert ("train/distillation" in watch.logged[0]) == (weight > 0)
    assert ("train/attention" in watch.logged[0]) == (attention > 0)
    if weight:
        assert watch.logged[0]["train/distillation"] == pytest.approx(temperature**2 * float(kl), rel=1e-4)
    if attention:
        assert watch.logged[0]["train/attention"] == pytest.approx(float(distance), rel=1e-4)


def test_student_comes_nearer_to_its_teacher_which_stays_as_it_was(tmp_path: Path, teacher_file: str) -> None:
    teach = Distillation(teacher_file, attention=1.0)
    student = DesignClassifier(
        **GREY, distillation=teach, scheduler=None, optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2)
    )
    watch = Watch()
    trainer(tmp_path, watch, max_epochs=30).fit(student, batches(8, 8))
    assert watch.logged[-1]["train/distillation"] < 0.5 * watch.logged[0]["train/distillation"]
    assert watch.logged[-1]["train/attention"] < watch.logged[0]["train/attention"]
    network = watch.teacher.network
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())
    for name, value in network.state_dict().items():
        assert torch.equal(value, watch.before[name]), name
    assert student._distiller is None
    assert not any(module._forward_hooks for module in student.backbone.modules())


def test_teacher_is_in_no_checkpoint_no_module_and_no_copy(tmp_path: Path, teacher_file: str) -> None:
    class Seen(EMAWeightAveraging):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            own = DesignClassifier(**GREY)
            assert pl_module.state_dict().keys() == own.state_dict().keys()
            assert [n for n, _ in pl_module.named_parameters()] == [n for n, _ in own.named_parameters()]
            assert [n for n, _ in pl_module.named_buffers()] == [n for n, _ in own.named_buffers()]
            held = {id(module) for module in pl_module._distiller.teacher.network.modules()}
            assert not held & {id(module) for module in pl_module.modules()}
            assert self._average_model is not None
            assert self._average_model.module._distiller is None
            assert copy.deepcopy(pl_module)._distiller.teacher is pl_module._distiller.teacher

    run = trainer(tmp_path, Seen(), max_steps=2)
    student = DesignClassifier(**GREY, distillation=Distillation(teacher_file, attention=1.0))
    run.fit(student, batches())
    run.save_checkpoint(tmp_path / "student.ckpt")
    plain = trainer(tmp_path, EMAWeightAveraging(), max_steps=2)
    plain.fit(DesignClassifier(**GREY), batches())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    sizes = [(tmp_path / name).stat().st_size for name in ("student.ckpt", "plain.ckpt")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
    stored = torch.load(tmp_path / "student.ckpt", weights_only=True)["hyper_parameters"]
    assert "distillation" not in stored
    Path(teacher_file).unlink()
    again = DesignClassifier.load_from_checkpoint(tmp_path / "student.ckpt", weights_only=True)
    assert again.distillation is None
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.eval()(x), student.eval()(x))


def test_resumed_distillation_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, teacher_file: str) -> None:
    def make() -> DesignClassifier:
        torch.manual_seed(0)
        return DesignClassifier(**GREY, distillation=Distillation(teacher_file, weight=0.5, attention=1.0))

    whole = make()
    trainer(tmp_path, max_epochs=4).fit(whole, batches())

    class StopAfterTwo(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 1

    first = trainer(tmp_path, StopAfterTwo(), max_epochs=4)
    first.fit(make(), batches())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make()
    trainer(tmp_path, max_epochs=4).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    other = resumed.state_dict()
    for key, value in whole.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[key]), key


def test_a_second_fit_of_the_same_student_has_a_teacher_again(tmp_path: Path, teacher_file: str) -> None:
    student = DesignClassifier(**GREY, distillation=Distillation(teacher_file, attention=1.0))
    for _ in range(2):
        watch = Watch()
        trainer(tmp_path, watch, EMAWeightAveraging(), max_steps=1).fit(student, batches())
        assert watch.logged[0]["train/attention"] > 0


def test_evaluation_measures_the_labels_and_needs_no_teacher(tmp_path: Path) -> None:
    student = DesignClassifier(**GREY, distillation=Distillation("none.ckpt"))
    images, labels = next(iter(batches()))
    result = trainer(tmp_path).validate(student, DataLoader(TensorDataset(images, labels), 4), verbose=False)[0]
    expected = F.cross_entropy(student.eval()(images), labels)
    assert result["val/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_images_are_renormalised_for_the_teacher(tmp_path: Path, teacher_file: str) -> None:
    pixels = torch.rand(4, 1, 16, 16)
    expected = dl.load(teacher_file)((pixels - 0.5) / 0.25)
    for stated in ({}, {"mean": [0.5], "std": [0.25]}):
        student = DesignClassifier(
            **{**GREY, "mean": [0.2], "std": [0.8]},
            distillation=Distillation(teacher_file, **stated),  # type: ignore[arg-type]
        )
        watch = Watch()
        trainer(tmp_path, watch, max_steps=1).fit(student, batches())
        torch.testing.assert_close(watch.teacher((pixels - 0.2) / 0.8), expected, rtol=1e-4, atol=1e-4)
    same = DesignClassifier(**GREY, distillation=Distillation(teacher_file))
    watch = Watch()
    trainer(tmp_path, watch, max_steps=1).fit(same, batches())
    assert torch.equal(watch.teacher((pixels - 0.5) / 0.25), expected)


def test_teacher_may_be_a_binarized_network_or_one_of_timm_with_weights_of_a_file(tmp_path: Path) -> None:
    network = timm.create_model("resnet20_cifar", width=0.25, in_chans=1)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    binary = copy.deepcopy(network)
    dl.binarize_(binary, example_input=(2, 1, 16, 16))
    path = dl.save(binary, tmp_path / "binary.safetensors", {"width": 0.25})
    x = torch.randn(2, 1, 16, 16)
    arguments = {"width": 0.25, "checkpoint_path": str(tmp_path / "timm.pth")}
    for teach, expected in (
        (Distillation(str(path)), binary),
        (Distillation("resnet20_cifar", pretrained=False, teacher_args=arguments), network),
    ):
        watch = Watch()
        trainer(tmp_path, watch, max_steps=1).fit(DesignClassifier(**GREY, distillation=teach), batches())
        assert torch.equal(watch.teacher(x), expected.eval()(x))


def test_teacher_has_its_own_precision(tmp_path: Path, teacher_file: str) -> None:
    x = torch.randn(4, 1, 16, 16)
    exact = dl.load(teacher_file)(x)
    seen: dict[str, Tensor] = {}
    for precision in ("float32", "bfloat16", "float16"):
        watch = Watch()
        student = DesignClassifier(**GREY, distillation=Distillation(teacher_file, precision=precision))
        trainer(tmp_path, watch, max_steps=1, precision="bf16-mixed").fit(student, batches())
        with torch.autocast("cpu", torch.bfloat16):  # as in the student's step
            seen[precision] = watch.teacher(x)
        assert {p.dtype for p in watch.teacher.network.parameters()} == {torch.float32}
    assert torch.equal(seen["float32"], exact)
    assert seen["bfloat16"].dtype == torch.bfloat16
    assert seen["float16"].dtype == torch.float16
    torch.testing.assert_close(seen["bfloat16"].float(), exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("options", "backend", "arguments"),
    [
        ({}, None, {"accumulate_grad_batches": 2}),
        ({"channels_last": True}, None, {"precision": "bf16-mixed"}),
        ({}, "eager", {}),
        pytest.param({}, "aot_eager", {"precision": "bf16-mixed"}, marks=pytest.mark.slow),
    ],
)
def test_distillation_goes_with_other_options(
    tmp_path: Path, teacher_file: str, options: dict[str, Any], backend: str | None, arguments: dict[str, Any]
) -> None:
    torch._dynamo.reset()

    def train(compiled: bool) -> list[dict[str, float]]:
        torch.manual_seed(0)
        teach = Distillation(teacher_file, weight=0.5, attention=1.0)
        student = DesignClassifier(**GREY, distillation=teach, **options)
        if compiled:
            student.backbone.compile(backend=backend)
        watch = Watch()
        trainer(tmp_path, watch, **arguments).fit(student, batches())
        assert len(watch.logged) == 4
        return watch.logged

    logged = train(backend is not None)
    assert all(np.isfinite(value) for step in logged for value in step.values())
    if backend is not None:
        first, expected = logged[0], train(False)[0]
        assert first == pytest.approx(expected, rel=0.05 if arguments else 1e-4)


@pytest.mark.slow
def test_compiled_student_is_compiled_once(tmp_path: Path, teacher_file: str) -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    student = DesignClassifier(**GREY, distillation=Distillation(teacher_file, attention=1.0))
    student.backbone.compile(backend=graphs)
    trainer(tmp_path, max_epochs=2).fit(student, batches())
    assert graphs.frame_count == 1


DDP = """
import sys
import lightning, torch
from torch.utils.data import DataLoader, TensorDataset
from design_lightning.training import Bop, DesignClassifier, Distillation, MixupCutmix, PerGroupOptimizer

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DesignClassifier(
        "test_resnet", num_classes=10, input_size=(3, 32, 32),
        mixing=MixupCutmix(mixup=0.2, cutmix=1.0),
        distillation=Distillation(
            "test_resnet", pretrained=False, attention=1.0, teacher_args={"num_classes": 10, "checkpoint_path": sys.argv[1]}
        ),
        gradient_checkpointing=True,
        optimizer=lambda groups: PerGroupOptimizer(
            groups, lambda latent: Bop(latent, lr=0.1, threshold=1e-6), lambda rest: torch.optim.SGD(rest, lr=0.1)
        ),
    )
    images = DataLoader(TensorDataset(torch.randn(24, 3, 32, 32), torch.arange(24) % 10), batch_size=3)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, images)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    torch.save(weights, f"{sys.argv[2]}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "teacher.pth")
    script = tmp_path / "train.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "teacher.pth"), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert not bool(torch.isnan(first).any())


def test_attention_at_named_layers_and_at_stages_of_another_network(tmp_path: Path, teacher_file: str) -> None:
    """`resnet18_cifar` has the same three reductions and one more."""
    student = {**GREY, "backbone": "resnet18_cifar", "backbone_args": {"width": 0.125}}
    for layers, expected in (
        (None, [("layer1", "layer1"), ("layer2", "layer2"), ("layer3", "layer3")]),
        (["layer2"], [("layer2", "layer2")]),
    ):
        model = DesignClassifier(
            **student, distillation=Distillation(teacher_file, attention=1.0, attention_layers=layers)
        )

        class Stages(lightning.Callback):
            seen: ClassVar[list[tuple[str, str]]] = []

            def on_train_start(self, trainer: Any, pl_module: Any) -> None:
                Stages.seen = pl_module._distiller.stages

        trainer(tmp_path, Stages(), max_steps=1).fit(model, batches())
        assert Stages.seen == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_layers": ["layer9"]}, r"CifarResNet has no layer 'layer9': did you mean 'layer"),
        ({"attention_layers": ["fc"]}, r"attention transfer at 'fc': the student's features are \[4, 10\]"),
        (
            {"teacher": "test_vit", "pretrained": False, "teacher_args": {"num_classes": 10, "img_size": 16}},
            "no stages of the same reduction in CifarResNet and the teacher 'test_vit'",
        ),
    ],
)
def test_attention_that_does_not_fit_is_refused(
    tmp_path: Path, teacher_file: str, arguments: dict[str, Any], message: str
) -> None:
    teach = Distillation(**{"teacher": teacher_file, "attention": 1.0, **arguments})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(DesignClassifier(**GREY, distillation=teach), batches())


def test_attention_that_reaches_no_weight_is_refused(tmp_path: Path, teacher_file: str) -> None:
    student = DesignClassifier(**GREY, distillation=Distillation(teacher_file, attention=1.0))
    student.backbone.requires_grad_(False)
    student.backbone.fc.requires_grad_(True)
    with pytest.raises(ValueError, match="no gradient reaches the student there"):
        trainer(tmp_path).fit(student, batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 1.5}, r"weight is 1.5; it is the teacher's share of the loss, from 0 to 1"),
        ({"weight": 0.0}, "the teacher would teach nothing"),
        ({"attention": -1.0}, "attention is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0; it divides logits"),
        ({"attention_layers": ["layer1"]}, r"attention_layers is \['layer1'\] and attention 0.0"),
        ({"precision": "int8"}, "unknown precision 'int8': use one of float32, bfloat16, float16"),
        ({"mean": [0.5]}, "give both, or neither"),
        ({"teacher": "resnet81"}, r"unknown teacher 'resnet81': did you mean 'resnet18'"),
        ({"teacher": "a.ckpt", "teacher_args": {"width": 1}}, "is a file, which holds its arguments"),
    ],
)
def test_wrong_values_are_refused_before_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Distillation(**{"teacher": "resnet18", **arguments})


def test_teacher_that_does_not_fit_is_refused_at_the_start_of_training(tmp_path: Path, teacher_file: str) -> None:
    def fit(match: str, error: type[Exception] = ValueError, **arguments: Any) -> None:
        with pytest.raises(error, match=match):
            trainer(tmp_path).fit(DesignClassifier(**{**GREY, **arguments}), batches())

    fit("teacher .* tells 10 classes apart, the student 12", num_classes=12, distillation=Distillation(teacher_file))
    fit("the teacher 'none.ckpt' is no file: train it first", FileNotFoundError, distillation=Distillation("none.ckpt"))
    pooled = Distillation("resnet20_cifar", pretrained=False, mean=[0.5, 0.5, 0.5], std=[1.0, 1.0, 1.0])
    fit("the data has 1 channels; give the distillation a mean and std", distillation=pooled)
    fit("are unknown; give the model its mean and std", mean=None, std=None, distillation=pooled)
    fit("there are no pretrained weights of 'resnet20_cifar'", distillation=Distillation("resnet20_cifar"))


def test_weights_that_cannot_be_downloaded_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    options = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu"]
    for option, place in (("--model.distillation.teacher", "teacher_args"), ("--model.backbone", "backbone_args")):
        pretrained = ["--model.pretrained", "true", "--model.backbone_args", "null"] if place == "backbone_args" else []
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", "quickstart", option, "resnet10t.c3_in1k", *pretrained, *options])
        assert stopped.value.code == 1
        printed = capsys.readouterr().err
        assert "design-train: error: the weights of 'resnet10t.c3_in1k' were not to be had: " in printed
        assert f"pretrained: false and {place}: {{checkpoint_path: FILE}}" in printed
        assert "Traceback" not in printed


def test_teacher_of_other_data_is_not_taken_in_silence(tmp_path: Path, teacher_file: str) -> None:
    student = DesignClassifier(**{**GREY, "mean": None, "std": None}, distillation=Distillation(teacher_file))
    with pytest.warns(UserWarning, match="those of the data are unknown: it gets the images as they are"):
        trainer(tmp_path, max_steps=1).fit(student, batches())


def test_teacher_with_random_weights_is_not_taken_in_silence(tmp_path: Path) -> None:
    student = DesignClassifier(**GREY, distillation=Distillation("resnet20_cifar", pretrained=False))
    with pytest.warns(UserWarning, match="teacher 'resnet20_cifar' has random weights"):
        trainer(tmp_path, max_steps=1).fit(student, batches())


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "mine.yaml"


def test_distillation_of_a_yaml(quick: Path, teacher_file: str) -> None:
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_train_batches": 2,
            "limit_val_batches": 1,
            "log_every_n_steps": 1,
        },
        "model": {
            "init_args": {
                "backbone_args": {"width": 0.125},
                "warmup_epochs": 0,
                "distillation": {"teacher": teacher_file, "weight": 0.5, "attention": 1.0},
            }
        },
        "data": {"init_args": {"batch_size": 4}},
    }
    quick.write_text(yaml.safe_dump(config))
    main(["fit", "--config", "quickstart", "--config", quick.name])
    (metrics,) = quick.parent.rglob("metrics.csv")
    assert {"train/loss", "train/distillation", "train/attention"} <= set(
        metrics.read_text().splitlines()[0].split(",")
    )
    (saved,) = quick.parent.rglob("config.yaml")
    assert yaml.safe_load(saved.read_text())["model"]["init_args"]["distillation"]["teacher"] == teacher_file
