"""int8 for what stays float (stem, downsampling, classifier), by each engine's own quantizer; binary layers stay as they are.

Both quantizers run calibration images through the network to find the range of each value that they round. They are kept off
everything but the weights and inputs of float convolutions and linear layers: rounded in front of a binarizer, a value may fall
on the other side of its threshold. Left to its own choice, NNCF rounds residuals and thresholds, too, and OpenVINO then takes all
that is binary for constants, without a word (measured with NNCF 3.4 and OpenVINO 2026.4).

    OpenVINO      NNCF's `quantize`. The outputs of float layers stay float32.
    ONNX Runtime  `quantize_static`. A convolution's output is rounded as well, for only then it runs as int8.

Without a choice of layers they quantize a float network as a whole, by their own defaults.
"""

import io
import logging
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

from design_lightning.export.graph import DOMAIN, Graph, require
from design_lightning.export.seal import seal_onnx
from design_lightning.export.to_openvino import one_bit_layers, settings
from design_lightning.export.verification import DisagreementError

CALIBRATION_IMAGES = 300
"""How many images the quantizers see at most."""
_ONNX_PRODUCTS = ("Conv", "Gemm", "MatMul")
_OPENVINO_PRODUCTS = ("Convolution", "GroupConvolution", "MatMul")
_NOT_TO_IGNORE = ("Constant", "Parameter", "Result", *_OPENVINO_PRODUCTS)


def quantize_openvino(model: Any, images: Tensor, binary: Collection[str] | None = None) -> Any:
    """A quantized copy of an `openvino.Model` for one image at a time.

    Args:
        model: of one input.
        images: [N, C, H, W], normalised, to calibrate with: the first 300.
        binary: names of its operations that compute a binary layer in float. With them, even if there are none, only
            convolutions and linear layers are quantized; if None, whatever the quantizer chooses.

    Raises:
        ImportError: if nncf is missing.
    """
    require("nncf", what="int8 for OpenVINO")
    with _quiet():
        import nncf

        dataset = nncf.Dataset([image.numpy() for image in _calibration(images)])
        if binary is None:
            return nncf.quantize(model, dataset, subset_size=CALIBRATION_IMAGES)
        ignored = sorted({op.get_type_name() for op in model.get_ops()} - set(_NOT_TO_IGNORE))
        scope = nncf.IgnoredScope(names=sorted(binary), types=ignored, validate=False)
        return nncf.quantize(model, dataset, subset_size=CALIBRATION_IMAGES, ignored_scope=scope)


def quantize_onnx(proto: Any, images: Tensor, binary: Collection[str] | None = None) -> Any:
    """A quantized copy of an `onnx.ModelProto` with one input, `input`; with metadata of ours it is sealed anew.

    Args:
        proto: the network.
        images: as in `quantize_openvino`.
        binary: names of the nodes that compute a binary layer in float; None as there.

    Raises:
        ImportError: if onnx or onnxruntime are missing.
    """
    require("onnx", "onnxruntime", what="int8 for ONNX Runtime")
    import onnx

    products = [node.name for node in proto.graph.node if node.op_type in _ONNX_PRODUCTS]
    choice: dict[str, Any] = {}
    if binary is not None:
        choice["op_types_to_quantize"] = list(_ONNX_PRODUCTS)
        choice["nodes_to_quantize"] = [name for name in products if name not in binary]
        # Classes are to be told apart by more than 256 values.
        choice["extra_options"] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(proto, source)
        if binary is None:  # ours would unpack its bits
            quant_pre_process(source, source, skip_symbolic_shape=True)
        reader = _reader(quantization.CalibrationDataReader, images)
        quantization.quantize_static(
            source,
            target,
            reader,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            **choice,
        )
        quantized = onnx.load(target)
    kept = [entry for entry in quantized.metadata_props if entry.key.startswith(f"{DOMAIN}.")]
    quantized.ClearField("metadata_props")
    quantized.metadata_props.extend(kept)
    if kept:
        quantized.producer_name = proto.producer_name
        seal_onnx(quantized)
    return quantized


def check_one_bit(before: Any, after: Any) -> None:
    """Compares two models for OpenVINO, or the paths of them, by the 1-bit layers that the engine runs.

    Raises:
        DisagreementError: if the second has others.
    """
    import openvino as ov

    ran = [
        sorted(one_bit_layers(ov.Core().compile_model(model, "CPU", settings())).values()) for model in (before, after)
    ]
    if ran[0] != ran[1]:
        raise DisagreementError(
            f"with int8 for its float layers the engine runs {len(ran[1])} of {len(ran[0])} binary layers as 1-bit; use the "
            "format 'openvino'"
        )


def binary_names(graph: Graph) -> frozenset[str]:
    """What the products of binary layers are called in the forms of a graph: by its nodes in OpenVINO, by their outputs in ONNX."""
    nodes = [node for node in graph.proto.graph.node if node.domain == DOMAIN]
    return frozenset({node.name for node in nodes} | {node.output[0] for node in nodes})


def _calibration(images: Tensor) -> tuple[Tensor, ...]:
    return images[:CALIBRATION_IMAGES].float().split(1)


def _reader(kind: Any, images: Tensor) -> Any:
    """ONNX Runtime's iterator over calibration images, whose class is imported late."""

    class Reader(kind):
        def __init__(self) -> None:
            self.left = iter(_calibration(images))

        def get_next(self) -> Any:
            image = next(self.left, None)
            return None if image is None else {"input": image.numpy()}

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantizers' messages and progress bars, and without NNCF's statistics of use, which it would send home."""
    os.environ.setdefault("NNCF_CI", "1")
    root, disabled, handler = logging.getLogger(), logging.root.manager.disable, logging.NullHandler()
    root.addHandler(handler)  # else `logging.warning` would set one up that stays
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
