"""What `design-train benchmark inference` measures: the variants of a network, and exported files.

Variants of a network; its weights are random, for its speed does not depend on them:

    float_pytorch        the float network in PyTorch
    float_onnx           in ONNX Runtime
    float_onnx_int8      in ONNX Runtime, quantized as a whole by `quantize_static`, QDQ, a scale for each output channel
    float_openvino       in OpenVINO
    float_openvino_int8  in OpenVINO, quantized as a whole by NNCF
    packed, onnx, openvino, onnx_int8, openvino_int8
                         the binary network, as the formats of `export_model`
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import timm
import torch
from torch import Tensor, nn

import design_lightning as dl
from design_lightning.export.checkpoint import load
from design_lightning.export.formats import FORMATS, export_model
from design_lightning.export.graph import trace
from design_lightning.export.quantization import quantize_onnx, quantize_openvino
from design_lightning.export.runtime import onnx_session, open_exported, openvino_session
from design_lightning.export.to_openvino import one_bit_layers, settings
from design_lightning.export.verification import agreement_of, random_images

if TYPE_CHECKING:
    from design_lightning.export.inference_benchmark import InferenceConfig

VARIANTS = (
    "float_pytorch",
    "float_onnx",
    "float_onnx_int8",
    "float_openvino",
    "float_openvino_int8",
    "packed",
    "onnx",
    "onnx_int8",
    "openvino",
    "openvino_int8",
)
TWINS = tuple(variant for variant in VARIANTS if variant.startswith("float_"))
IMAGES = 16
"""Images that int8 is calibrated with, and every variant is compared on."""
SETTLING = 5
"""Forward passes of 8 images that give batch norms statistics."""


@dataclass(frozen=True)
class Subject:
    """One row.

    Args:
        name: of the variant or the file.
        open: from a number of threads to what runs it once for an image [1, C, H, W] and gives its outputs; of PyTorch's networks
            the number is the process's own.
        image: that it is timed with.
        bytes, primitives, difference, top1: of `InferenceResult`.
    """

    name: str
    open: Callable[[int], Callable[[Tensor], Tensor]]
    image: Tensor
    bytes: int
    primitives: tuple[str, ...] = ()
    difference: float | None = None
    top1: float | None = None


def of_model(config: "InferenceConfig", folder: Path, progress: Callable[[str], None]) -> Iterator[Subject]:
    """Makes a network, its binary twin, and the files of every variant."""
    if config.model is None:
        return
    progress(f"making {config.model}")
    twin, binary, images = _networks(config, config.model)
    expected = _outputs(_pytorch(twin), images)
    files = _FloatFiles(twin, images, folder)
    for variant in config.variants:
        progress(f"making {variant}")
        if variant == "float_pytorch":
            size = sum(tensor.nbytes for tensor in twin.state_dict().values())
            yield Subject(variant, lambda threads: _pytorch(twin), images[:1], size, (), 0.0, 1.0)
            continue
        if variant in TWINS:
            path = files.write(variant)
            agreement = agreement_of(expected, _outputs(_open(path, 1), images))
        else:
            (exported,) = export_model(binary, folder / config.model, [variant], images).files
            path, agreement = exported.path, exported.agreement
        difference = max(d for d in (agreement.difference, agreement.difference_with_ties) if d is not None)
        opener = partial(_open, path)
        yield Subject(variant, opener, images[:1], _size(path), _primitives(path), difference, agreement.top1)


def of_files(config: "InferenceConfig", progress: Callable[[str], None]) -> Iterator[Subject]:
    """Opens exported files; their names are their rows', their paths where two are called the same."""
    names = [Path(file).name for file in config.files]
    for file, name in zip(config.files, names, strict=True):
        progress(f"opening {file}")
        path = Path(file)
        shape = open_exported(path).input_shape
        if shape is None:
            if config.size is None:
                raise ValueError(f"{file!r} does not say for which size of images it is: give --size")
            shape = (3, config.size, config.size)
        if config.model is not None and shape != (own := _input_shape(config, config.model)):
            takes = f"{file} takes images of {'x'.join(map(str, shape))}, {config.model} of {'x'.join(map(str, own))}"
            progress(f"{takes}: these are different networks, which the ratios of its row compare")
        unique = name if names.count(name) == 1 else file
        yield Subject(unique, partial(_open, path), random_images(shape, 1), _size(path), _primitives(path))


def _input_shape(config: "InferenceConfig", name: str) -> tuple[int, ...]:
    """Of an image of a network of timm, or as `size` says."""
    if config.size is not None:
        return (3, config.size, config.size)
    known = timm.get_pretrained_cfg(name)
    return tuple(known.input_size) if known is not None else (3, 224, 224)


def _networks(config: "InferenceConfig", name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The float network, its binary twin, both in eval mode with statistics of noise, and images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = timm.create_model(name, num_classes=config.classes)
        size = config.size or network.pretrained_cfg["input_size"][-1]
        twin = copy.deepcopy(network)
        dl.binarize_(network, dl.BinaryConfig(**config.binary), (2, 3, size, size))
        for each in (twin, network):
            each.train()
            with torch.no_grad():
                for _ in range(SETTLING):
                    each(torch.randn(8, 3, size, size))
            each.eval().requires_grad_(False)
    return twin, network, random_images((3, size, size), IMAGES)


class _FloatFiles:
    """The float network as files of the engines."""

    def __init__(self, network: nn.Module, images: Tensor, folder: Path) -> None:
        self.network, self.images, self.folder = network, images, folder
        self._proto: Any = None

    def write(self, variant: str) -> Path:
        """Writes the file of a variant."""
        engine, is_int8 = variant.removeprefix("float_").removesuffix("_int8"), variant.endswith("_int8")
        path = self.folder / f"{variant}{'.onnx' if engine == 'onnx' else '.xml'}"
        if self._proto is None:
            self._proto = trace(self.network, self.images.shape[1:])
        if engine == "onnx":
            self._write_onnx(path, is_int8)
        else:
            self._write_openvino(path, is_int8)
        return path

    def _write_onnx(self, path: Path, is_int8: bool) -> None:
        import onnx

        onnx.save(quantize_onnx(self._proto, self.images) if is_int8 else self._proto, path)

    def _write_openvino(self, path: Path, is_int8: bool) -> None:
        import onnx
        import openvino as ov

        source = path.with_suffix(".source.onnx")
        onnx.save(self._proto, source)
        model = ov.Core().read_model(source)
        model.reshape([1, *self.images.shape[1:]])
        model = quantize_openvino(model, self.images) if is_int8 else model
        ov.save_model(model, path, compress_to_fp16=False)


def _open(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """A file as what runs it for an image; every variant is called this way."""
    if path.suffix not in (".onnx", ".xml"):
        return _pytorch(load(path))
    run = (onnx_session if path.suffix == ".onnx" else openvino_session)(str(path), threads)
    return lambda image: torch.from_numpy(run({"input": image.numpy()})["output"])


def _pytorch(network: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(image: Tensor) -> Tensor:
        with torch.inference_mode():
            return cast(Tensor, network(image))

    return forward


def _outputs(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([forward(image).clone() for image in images.split(1)])


def _size(path: Path) -> int:
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)


def _primitives(path: Path) -> tuple[str, ...]:
    """Of each layer that OpenVINO runs as 1-bit, what computes it; nothing for another engine."""
    if path.suffix != ".xml":
        return ()
    import openvino as ov

    return tuple(one_bit_layers(ov.Core().compile_model(str(path), "CPU", settings(1))).values())


def needed_packages(variant: str) -> tuple[str, ...]:
    """The packages of a variant."""
    if variant in FORMATS:
        return FORMATS[variant].packages
    twin = variant.removeprefix("float_")
    return FORMATS[twin].packages if twin in FORMATS else ()
