"""torch.compile takes a whole binary layer in one graph, and annealing does not compile it again."""

from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.compiled_autograd
import torch._dynamo.testing
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.binary import (
    ACTIVATIONS,
    ESTIMATORS,
    WEIGHT_BINARIZERS,
    BinaryConv2d,
    BinaryLinear,
    DeSign,
    RSign,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(module: nn.Module, call: Any, x: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    y = call(x)
    return y.detach(), *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])


def assert_compiles(module: nn.Module, x: Tensor) -> None:
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(module, compiled, x), gradients(module, module, x))


@pytest.mark.parametrize("weight", WEIGHT_BINARIZERS)
def test_a_convolution_with_every_weight_binarizer(weight: str) -> None:
    layer = BinaryConv2d(4, 6, 3, padding=1, activation=DeSign("2x2_v1"), weight=weight, padding_value=-1)
    assert_compiles(layer, torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator(estimator: str) -> None:
    assert_compiles(DeSign("2x2x4_baseline", learn_kernel=True, estimator=estimator), torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    arguments: dict[str, Any] = {"channels": 4} if name == "rsign" else {}
    assert_compiles(ACTIVATIONS[name](**arguments), torch.randn(2, 4, 5, 6))


def test_a_linear_layer_on_a_grid_of_tokens() -> None:
    activation = DeSign("2x2_v1", grid=(2, 3), prefix_tokens=1, layout="NHWC", align="center")
    assert_compiles(BinaryLinear(4, 6, activation=activation), torch.randn(2, 7, 4))


def test_thresholds_that_follow_a_norm() -> None:
    norm = nn.BatchNorm2d(4).eval()
    norm.weight.data.uniform_(0.5, 1.5)
    layer = BinaryConv2d(4, 6, 3, padding=1, activation=DeSign("2x2_v1", gamma_from=norm))
    assert_compiles(nn.Sequential(norm, layer), torch.randn(2, 4, 5, 6))


@pytest.mark.parametrize("batch", [3, 8, 24])
@pytest.mark.parametrize("estimator", ["ste", "approx_sign"])
def test_batches_whose_images_share_bytes(batch: int, estimator: str) -> None:
    """A compiler packs along the batch where that is a multiple of 8."""
    layer = BinaryConv2d(4, 6, 3, padding=1, activation=DeSign("2x2_v1", estimator=estimator))
    assert_compiles(layer, torch.randn(batch, 4, 5, 6))


@pytest.mark.parametrize("estimator", ["ste", "approx_sign"])
def test_an_eager_forward_may_have_a_compiled_backward(estimator: str) -> None:
    """Each of the two would pack along another axis."""
    layer = BinaryConv2d(16, 6, 3, padding=1, activation=DeSign("2x2_v1", estimator=estimator))
    x = torch.randn(8, 16, 5, 6)
    expected = gradients(layer, layer, x)[1:]
    x.requires_grad_()
    loss = layer(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss.backward()
    torch.testing.assert_close((x.grad, *(parameter.grad for parameter in layer.parameters())), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "test_vit", "mobilenetv3_small_050"])
def test_a_whole_network_is_one_frame(name: str) -> None:
    model = timm.create_model(name)
    dl.binarize_(model, dl.BinaryConfig(policy="everything"))
    model.train()
    for module in model.modules():  # whose statistics the two runs would move one after the other
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)  # raises where the graph would break
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    torch.testing.assert_close(gradients(model, compiled, x), gradients(model, model, x), rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 1


def test_annealing_does_not_compile_again() -> None:
    activation = DeSign("2x2_v1", scale=0.0, estimator="ede")
    layers = nn.Sequential(
        BinaryConv2d(4, 4, 3, padding=1, activation=activation, weight="recu"),
        BinaryConv2d(4, 4, 3, padding=1, activation=RSign(4, estimator="reste"), weight="irnet"),
    )
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layers, fullgraph=True, backend=counter)
    x = torch.randn(2, 4, 5, 6)
    outputs = []
    for step in (0.25, 0.5, 1.0):
        for name, buffer in layers.named_buffers():
            key = name.split(".")[-1]
            if key in ("scale", "temperature", "tau"):
                buffer.fill_(0.5 + step / 3 if key == "tau" else 1 + step if key == "temperature" else step)
        result = gradients(layers, compiled, x)
        torch.testing.assert_close(result, gradients(layers, layers, x))
        outputs.append(result[1])
    assert counter.frame_count == 1
    assert not outputs[0].equal(outputs[1])  # the annealed values were not burnt into the graph
