"""`export_model`: a trained binary network as files of every format, each compared with the network before it is kept."""

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from design_lightning._names import did_you_mean, in_a_line
from design_lightning.export.checkpoint import load, save
from design_lightning.export.graph import Graph, cut, make_graph, require
from design_lightning.export.quantization import binary_names, check_one_bit, quantize_onnx, quantize_openvino
from design_lightning.export.report import Exported, Exports
from design_lightning.export.runtime import Run, onnx_session, open_exported, openvino_session
from design_lightning.export.to_onnx import to_onnx
from design_lightning.export.to_openvino import OpenVinoForm, to_openvino, write_openvino
from design_lightning.export.verification import (
    Agreement,
    agreement_of,
    judge_narrowed,
    judged,
    outputs_and_ties,
    random_images,
    verify,
)
from design_lightning.surgery import surgery_record


@dataclass(frozen=True)
class Request:
    """What a format is made of.

    Args:
        model: the trained network.
        network: a copy of it, float32, on the CPU, in eval mode.
        model_args: of `timm.create_model`.
        dtype: of the floats of a packed file.
        images: to compare with.
        labels: of the images, if they are known.
        graph: gives the network as a graph, made once for all formats.
    """

    model: nn.Module
    network: nn.Module
    model_args: Mapping[str, Any] | None
    dtype: torch.dtype
    images: Tensor
    labels: Tensor | None
    graph: Callable[[], Graph]


class Written(NamedTuple):
    """How a file that was just written agrees; the share of 1-bit operations, and what stays float, as in `Exported`."""

    agreement: Agreement
    one_bit: float
    stay_float: dict[str, str]


@dataclass(frozen=True)
class Format:
    """A format of files.

    Args:
        suffix: of its file.
        packages: that it needs, of the extra `export`.
        write: from a request and the path of a file to what came of it.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[Request, Path], Written]


def export_model(
    model: nn.Module,
    path: str | Path,
    formats: Sequence[str] = ("packed", "onnx", "openvino"),
    images: Tensor | None = None,
    input_shape: Sequence[int] | None = None,
    model_args: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    labels: Tensor | None = None,
    runs: int = 20,
    report: Callable[[str], None] = lambda text: None,
) -> Exports:
    """Writes a binarized network as files, each of which is read back and compared with it before it is kept.

    The comparison is layer by layer, each fed with PyTorch's inputs, and end to end; see `verify`. The network stays as it is.
    Nothing is written before every format agrees.

        safetensors    that of `dl.save`: latent weights and all, to train on
        packed         `.packed.safetensors`: one bit a binary weight; `dl.load` reads it, docs/format.md describes it
        onnx           `.onnx` of standard operators; binary weights take a bit in the file, and run as float
        openvino       `.xml` and `.bin`: binary layers run as 1-bit convolutions; for one image at a time
        onnx_int8      `.int8.onnx`: as `onnx`, with int8 for the float layers
        openvino_int8  `.int8.xml` and `.int8.bin`: as `openvino`, with int8 for the float layers

    With a narrower dtype of a packed file rounding must leave 95% of the bits of each
    layer and the class of 90% of the images as they were, each layer fed with the same bits; see `judge_narrowed`. What it costs
    end to end is reported.

    The ranges of int8 are found with the images, so give some that the network is for. What int8 costs is reported, not judged:
    the outputs alone are compared.

    Args:
        model: what `binarize_` made, in stage `both`.
        path: of the files, to which each format adds its suffix.
        formats: names of formats; each is written once.
        images: [N, C, H, W], normalised, to compare with; 16 of noise if not given.
        input_shape: [C, H, W] of the engines' input; that of the images, or of the surgery's probe, if not given.
        model_args: what `timm.create_model` got, for `safetensors` and `packed`.
        dtype: of the floats of a packed file: float32, float16 or bfloat16.
        labels: [N], of the images, for the accuracy of each file.
        runs: how often each file is run to time it; 0 for no timing.
        report: is told what is done next.

    Returns:
        What was written.

    Raises:
        ValueError: if a format is unknown, the network cannot be exported or does not take the images, no size of input is known,
            or another argument is out of range.
        OSError: if no files can be at that path, for a folder is there, or a file in place of their folder.
        DisagreementError: a `ValueError`, if a file computes something else. Nothing is written.
        ImportError: if a format's package is missing; says what to install.
    """
    if isinstance(formats, str) or not formats:
        raise ValueError(f"formats is {formats!r}; give a list of names, some of {', '.join(FORMATS)}")
    formats = tuple(dict.fromkeys(formats))
    for name in formats:
        check_format(name)
    if runs < 0:
        raise ValueError(f"runs is {runs}; give how often each file is run to time it, or 0 for no timing")
    targets = _targets(Path(path), formats)
    if images is not None and not images.isfinite().all():
        raise ValueError("images hold NaN or infinity, with which no outputs can be compared")
    shape = _input_shape(model, images, input_shape)
    what = "16 images of noise" if images is None else "1 image" if len(images) == 1 else f"{len(images)} images"
    images = random_images(shape, 16) if images is None else images.detach().float().cpu()
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [N], one for each of the {len(images)} images, not {list(labels.shape)}")
    network = _checked_copy(model, images)
    made: list[Graph] = []

    def graph() -> Graph:
        if not made:
            report("making the graph")
            made.append(make_graph(model, shape))
        return made[0]

    request = Request(model, network, model_args, dtype, images, labels, graph)
    accuracy = None if labels is None else _accuracy(network, images, labels)
    folder = Path(path).parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{Path(path).name}.") as aside:
        files = tuple(_export(name, target, Path(aside), request, runs, report) for name, target in targets.items())
        names = {target.name for target in targets.values()}
        # What is opened by name comes last.
        for file in sorted(Path(aside).iterdir(), key=lambda file: file.name in names):
            file.replace(folder / file.name)
    return Exports(files, what, accuracy)


def check_format(name: str) -> None:
    """Refuses a format that is unknown, or whose packages are missing."""
    if name not in FORMATS:
        raise ValueError(f"unknown export format {name!r}: {did_you_mean(name, FORMATS)}")
    require(*FORMATS[name].packages, what=f"export format {name!r}")


def _targets(path: Path, formats: Sequence[str]) -> dict[str, Path]:
    """The file of each format; refuses a path at which they cannot be."""
    if not path.name:
        raise ValueError(
            f"path is {str(path)!r}; give the name of the files behind their folder, such as {str(path / 'model')!r}"
        )
    for folder in path.parents:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(
                f"{str(folder)!r} is a file, so {str(path)!r} cannot be below it; give another path"
            )
    targets: dict[str, Path] = {}
    for name in formats:
        suffix = FORMATS[name].suffix
        target = path if path.name.endswith(suffix) else path.with_name(path.name + suffix)
        if target in targets.values():
            raise ValueError(f"several of {', '.join(formats)} would be {str(target)!r}; give a path without a suffix")
        for file in (target, *((target.with_suffix(".bin"),) if target.suffix == ".xml" else ())):
            if file.is_dir():
                raise IsADirectoryError(f"{str(file)!r} is a folder, where {name} is to be written; give another path")
        targets[name] = target
    return targets


@torch.no_grad()
def _checked_copy(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy, float32, on the CPU, in eval mode, that takes the images and gives one tensor."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} is on meta and has no values; load weights before you export it")
    network = copy.deepcopy(model).float().cpu().eval()
    try:
        outputs = network(images[:1])
    except Exception as error:  # whatever a forward may raise
        raise ValueError(
            f"{type(model).__name__} does not take images of {list(images.shape[1:])}: {in_a_line(error)}; give images, or "
            "input_shape=(C, H, W), of the size that it was made for"
        ) from error
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"{type(model).__name__} cannot be exported: its outputs are a {type(outputs).__name__}; a file gives one tensor, "
            "such as logits"
        )
    return network


def _export(
    name: str, target: Path, folder: Path, request: Request, runs: int, report: Callable[[str], None]
) -> Exported:
    """Writes into a folder aside, and compares."""
    before = set(folder.iterdir())
    aside = folder / target.name
    report(f"writing and comparing {name}")
    written = FORMATS[name].write(request, aside)
    milliseconds = _time(aside, request.images[:1], runs) if runs else None
    labels = request.labels
    accuracy = None if labels is None else _accuracy(open_exported(aside), request.images, labels)
    size = sum(file.stat().st_size for file in set(folder.iterdir()) - before)
    return Exported(name, target, size, written.agreement, written.one_bit, milliseconds, accuracy, written.stay_float)


def _input_shape(model: nn.Module, images: Tensor | None, given: Sequence[int] | None) -> tuple[int, ...]:
    if images is not None:
        if images.dim() != 4 or not len(images):
            raise ValueError(f"images must be [N, C, H, W] with N at least 1, not {list(images.shape)}")
        if given is not None and tuple(given) != tuple(images.shape[1:]):
            raise ValueError(f"input_shape is {list(given)}, but the images are {list(images.shape[1:])}")
        return tuple(images.shape[1:])
    if given is not None:
        return tuple(given)
    record = surgery_record(model)
    if record is None:
        raise ValueError(
            f"{type(model).__name__} has no record of a surgery; call binarize_(model) on the whole network, or pass "
            "input_shape=(C, H, W), or images"
        )
    if record.input_shape is None:
        raise ValueError(f"no size of input is known for {type(model).__name__}; pass input_shape=(C, H, W), or images")
    return tuple(record.input_shape[1:])


@torch.no_grad()
def _accuracy(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """The share of images whose label has the highest logit."""
    classes = torch.cat([network(image).argmax(1) for image in images.split(1)])
    return (classes == labels.cpu()).float().mean().item()


def _time(path: Path, image: Tensor, runs: int) -> float:
    """Milliseconds that one image takes on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        network = open_exported(path, threads=1)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            network(image)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return 1e3 * statistics.median(times)


def _write_latent(request: Request, path: Path) -> Written:
    save(request.model, path, request.model_args)
    return _compare_loaded(request, path, torch.float32)


def _write_packed(request: Request, path: Path) -> Written:
    save(request.model, path, request.model_args, packed=True, dtype=request.dtype)
    return _compare_loaded(request, path, request.dtype)


@torch.no_grad()
def _compare_loaded(request: Request, path: Path, dtype: torch.dtype) -> Written:
    """The outputs of a file of ours, whose floats are of a type, beside the model's."""
    loaded = load(path).float()
    theirs = torch.cat([loaded(image) for image in request.images.split(1)])
    ours, has_tie = outputs_and_ties(request.network, request.images)
    agreement = agreement_of(ours, theirs, has_tie)
    if dtype == torch.float32:
        return Written(judged(agreement), 0.0, {})
    judge_narrowed(request.network, loaded, request.images)
    return Written(agreement, 0.0, {})


@torch.no_grad()
def _compare_outputs(request: Request, run: Run) -> Agreement:
    """An engine's outputs for one image at a time beside the model's."""
    ours = torch.cat([request.graph().model(image) for image in request.images.split(1)])
    theirs = [torch.from_numpy(run({"input": image.numpy()})["output"]) for image in request.images.split(1)]
    return agreement_of(ours, torch.cat(theirs))


def _write_onnx(request: Request, path: Path) -> Written:
    import onnx

    graph = request.graph()
    onnx.save(to_onnx(graph), path)
    run_cut = onnx_session(to_onnx(cut(graph)).SerializeToString())
    agreement = verify(graph, run_cut, onnx_session(str(path)), request.images, batch=2)
    return Written(agreement, 0.0, {})


def _write_openvino(request: Request, path: Path) -> Written:
    graph = request.graph()
    form = to_openvino(graph)
    write_openvino(form, path)
    run_cut = openvino_session(to_openvino(cut(graph), form.stay_float).model)
    agreement = verify(graph, run_cut, openvino_session(str(path)), request.images, batch=1)
    return _with_share(graph, form, agreement)


def _write_onnx_int8(request: Request, path: Path) -> Written:
    import onnx

    graph = request.graph()
    onnx.save(quantize_onnx(to_onnx(graph), request.images, binary_names(graph)), path)
    return Written(_compare_outputs(request, onnx_session(str(path))), 0.0, {})


def _write_openvino_int8(request: Request, path: Path) -> Written:
    graph = request.graph()
    form = to_openvino(graph)
    write_openvino(replace(form, model=quantize_openvino(form.model, request.images, binary_names(graph))), path)
    check_one_bit(form.model, str(path))
    return _with_share(graph, form, _compare_outputs(request, openvino_session(str(path))))


def _with_share(graph: Graph, form: OpenVinoForm, agreement: Agreement) -> Written:
    operations = {node.key: node.operations for node in graph.nodes}
    one_bit = sum(count for key, count in operations.items() if key not in form.stay_float)
    return Written(agreement, one_bit / max(1, sum(operations.values())), {**form.stay_float, **graph.kept})


FORMATS = {
    "safetensors": Format(".safetensors", (), _write_latent),
    "packed": Format(".packed.safetensors", (), _write_packed),
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino"), _write_openvino),
    "onnx_int8": Format(".int8.onnx", ("onnx", "onnxscript", "onnxruntime"), _write_onnx_int8),
    "openvino_int8": Format(".int8.xml", ("onnx", "onnxscript", "openvino", "nncf"), _write_openvino_int8),
}
