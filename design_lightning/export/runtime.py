"""Exported files as networks that run: `open_exported(path)`, whatever the format."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from design_lightning._names import in_a_line
from design_lightning.export.about import About
from design_lightning.export.checkpoint import load
from design_lightning.export.graph import DOMAIN, require
from design_lightning.export.metadata import FORMAT_VERSION, read_json
from design_lightning.export.seal import onnx_matches_seal, openvino_matches_seal
from design_lightning.export.to_openvino import settings
from design_lightning.surgery import surgery_record

Run = Callable[[Mapping[str, NDArray[Any]]], dict[str, NDArray[Any]]]
"""An engine with a model: from inputs by name to outputs by name."""

_IN_XML = b"<format_version value="
SUFFIXES = (".onnx", ".xml", ".safetensors", ".ckpt")


class ExportedNetwork:
    """A network of a file, ready to run on the CPU.

    Args:
        path: the file.
        engine: what runs it: `ONNX Runtime`, `OpenVINO` or `PyTorch`.
        forward: from images [N, C, H, W], normalised, to outputs.
        about: labels, normalisation, provenance.
        input_shape: [C, H, W]; None where the file leaves it open.
    """

    def __init__(
        self,
        path: Path,
        engine: str,
        forward: Callable[[Tensor], Tensor],
        about: About,
        input_shape: tuple[int, ...] | None,
    ) -> None:
        self.path = path
        self.engine = engine
        self.about = about
        self.input_shape = input_shape
        self._forward = forward

    def __call__(self, images: Tensor) -> Tensor:
        """The outputs of images [N, C, H, W], float32, normalised as `about` says.

        Raises:
            ValueError: if the images are of another size than the file's.
        """
        if self.input_shape is not None and tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(f"{self.path.name} takes images of {list(self.input_shape)}, not {list(images.shape[1:])}")
        with torch.no_grad():
            return self._forward(images)


def open_exported(path: str | Path, threads: int | None = None) -> ExportedNetwork:
    """The network of a file that this project wrote: `.onnx`, OpenVINO's `.xml`, `.safetensors`, or a `.ckpt` of `fit`.

    Nothing of a file is run or unpickled. PyTorch's number of threads is the process's own.

    Args:
        path: the file.
        threads: of ONNX Runtime and OpenVINO; their choice if not given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off, edited, of another origin, or of a newer format.
        ImportError: if its engine is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file; give one that design-train export or dl.save wrote")
    if path.suffix == ".onnx":
        return _open_onnx(path, threads)
    if path.suffix == ".xml":
        return _open_openvino(path, threads)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is of no known format: its suffix must be one of {', '.join(SUFFIXES)}")
    model = load(path)
    return ExportedNetwork(path, "PyTorch", model, About.of(model), _shape_of(model))


def onnx_session(source: bytes | str, threads: int | None = None) -> Run:
    """ONNX Runtime on the CPU, with a file or its bytes."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every constant that it folds
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, dict(inputs)), strict=True))


def openvino_session(model: Any, threads: int | None = None) -> Run:
    """OpenVINO on the CPU, with a model or the path of one."""
    require("openvino")
    import openvino as ov

    compiled = ov.Core().compile_model(model, "CPU", settings(threads))
    names = [(name, output) for output in compiled.outputs for name in output.get_names()]

    def run(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        results = compiled(dict(inputs))
        return {name: results[output] for name, output in names}

    return run


def _open_onnx(path: Path, threads: int | None) -> ExportedNetwork:
    require("onnx", "onnxruntime")
    import onnx

    try:
        proto = onnx.load(path)
    except Exception as error:  # protobuf's own
        raise ValueError(f"{str(path)!r} is not readable as ONNX, cut off perhaps: {in_a_line(error)}") from error
    prefix = f"{DOMAIN}."
    facts = {e.key.removeprefix(prefix): e.value for e in proto.metadata_props if e.key.startswith(prefix)}
    if not proto.ByteSize():
        raise ValueError(f"{str(path)!r} is empty: it was cut off")
    if "format_version" not in facts:
        raise ValueError(_of_others(path))
    if not onnx_matches_seal(proto):
        raise ValueError(_edited(path))
    about, shape = _read_facts(path, facts)
    run = onnx_session(str(path), threads)
    return ExportedNetwork(
        path, "ONNX Runtime", lambda x: torch.from_numpy(run({"input": x.numpy()})["output"]), about, shape
    )


def _open_openvino(path: Path, threads: int | None) -> ExportedNetwork:
    require("openvino")
    import openvino as ov

    text = path.read_bytes()
    if _IN_XML not in text:
        is_whole = b"<net" in text and text.rstrip().endswith(b"</net>")
        raise ValueError(
            _of_others(path) if is_whole else f"{str(path)!r} is not readable as OpenVINO IR, cut off perhaps"
        )
    if not path.with_suffix(".bin").is_file():
        raise FileNotFoundError(f"{str(path)!r} lacks its weights: {path.with_suffix('.bin').name} must lie beside it")
    if not openvino_matches_seal(path):  # before it is read, for what the engine says of a damaged file helps nobody
        raise ValueError(_edited(path))
    model = ov.Core().read_model(path)
    names = model.get_rt_info([DOMAIN]).astype(dict)
    about, shape = _read_facts(path, {name: model.get_rt_info([DOMAIN, name]).astype(str) for name in names})
    run = openvino_session(model, threads)

    def forward(images: Tensor) -> Tensor:
        return torch.cat([torch.from_numpy(run({"input": x.numpy()})["output"].copy()) for x in images.split(1)])

    return ExportedNetwork(path, "OpenVINO", forward, about, shape)


def _read_facts(path: Path, facts: Mapping[str, str]) -> tuple[About, tuple[int, ...]]:
    """What an engine's file says of its network."""
    try:
        stored = {name: read_json(value) for name, value in facts.items() if name != "sha256"}
    except ValueError as error:
        raise ValueError(_edited(path)) from error
    version = stored["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format version {version}, but this release reads {FORMAT_VERSION}; update design-lightning"
        )
    try:
        return About.from_dict(stored), tuple(stored["input_shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(_edited(path)) from error


def _of_others(path: Path) -> str:
    return f"{str(path)!r} is of another origin: its metadata has no {DOMAIN}.format_version"


def _edited(path: Path) -> str:
    return f"{str(path)!r} was edited or damaged since it was written: its SHA-256 is another one"


def _shape_of(model: nn.Module) -> tuple[int, ...] | None:
    record = surgery_record(model)
    if record is None or record.input_shape is None:
        return None
    return tuple(record.input_shape[1:])
