"""ONNX of standard operators: a binary layer is a comparison, +-1, and a convolution by weights that are unpacked in the graph.

A runtime unpacks them once, when it loads the file, and computes in float32: the file is small, the execution is float.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from design_lightning.export.graph import DOMAIN, Graph, facts_of
from design_lightning.export.seal import seal_onnx


def to_onnx(graph: Graph) -> Any:
    """The `onnx.ModelProto`, of opset 18."""
    import onnx
    from onnx import numpy_helper

    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    stored = {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    shapes = {each.output: each.shape for each in graph.nodes}
    lowered = _Lowered(stored)
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            lowered.add(node, shapes[node.output[0]])
        else:
            lowered.nodes.append(node)
    used = {name for node in lowered.nodes for name in node.input}
    kept = [e for e in proto.graph.initializer if e.name in used and e.name not in lowered.constants]
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(lowered.nodes)
    proto.graph.initializer.extend([*kept, *lowered.constants.values()])
    opsets = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(opsets)
    proto.producer_name = DOMAIN
    for name, value in facts_of(graph).items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = f"{DOMAIN}.{name}", value
    onnx.checker.check_model(proto, full_check=True)
    seal_onnx(proto)
    return proto


class _Lowered:
    """The nodes and constants of the standard form."""

    def __init__(self, stored: dict[str, NDArray[Any]]) -> None:
        self.stored = stored
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, node: Any, shape: tuple[int, ...]) -> None:
        """Adds the standard form of a node of ours, whose input has that shape without its batch."""
        from onnx import helper

        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        call = attributes["call"].decode()
        x, levels, signs = node.input
        threshold = self._thresholds(call, levels, shape)
        is_above = self._node("GreaterOrEqual", [x, threshold], f"{call}.is_above")
        bits = self._node("Where", [is_above, self._float(1.0), self._float(-1.0)], f"{call}.bits")
        weight = self._weight(signs)
        if node.op_type == "BinaryLinear":
            transposed = self._node("Transpose", [weight], f"{call}.transposed", perm=[1, 0])
            self._node("MatMul", [bits, transposed], node.output[0])
            return
        top, left, bottom, right = pads = attributes["pads"]
        if attributes["pad_value"]:
            border = self._int64([0, 0, top, left, 0, 0, bottom, right])
            bits = self._node("Pad", [bits, border, self._float(float(attributes["pad_value"]))], f"{call}.padded")
            pads = [0, 0, 0, 0]
        self._node(
            "Conv",
            [bits, weight],
            node.output[0],
            strides=attributes["strides"],
            dilations=attributes["dilations"],
            group=attributes["group"],
            pads=pads,
        )

    def _thresholds(self, call: str, levels: str, shape: tuple[int, ...]) -> str:
        """The levels, repeated along each axis over an input of that shape."""
        block = self.stored[levels]
        self._constant(levels, block)
        repeats = [1 if period == 1 else -(-size // period) for size, period in zip(shape, block.shape, strict=True)]
        if all(repeat == 1 for repeat in repeats):
            return levels
        tiled = self._node("Tile", [levels, self._int64(repeats)], f"{call}.tiled")
        ends = [1 if period == 1 else size for size, period in zip(shape, block.shape, strict=True)]
        if all(end == period * repeat for end, period, repeat in zip(ends, block.shape, repeats, strict=True)):
            return tiled
        starts = self._int64([0] * len(ends))
        return self._node("Slice", [tiled, starts, self._int64(ends)], f"{call}.thresholds")

    def _weight(self, signs: str) -> str:
        """The weights, +-1 float32, from eight to a byte, the first in the lowest bit."""
        weight = f"{signs}.weight"
        if any(weight in node.output for node in self.nodes):
            return weight
        values = self.stored[signs]
        packed = np.packbits(values.reshape(-1) > 0, bitorder="little")
        bits = self._constant(f"{signs}.bits", packed[:, None])
        shifts = self._constant("eight_shifts", np.arange(8, dtype=np.uint8)[None])
        shifted = self._node("BitShift", [bits, shifts], f"{signs}.shifted", direction="RIGHT")
        lowest = self._node("BitwiseAnd", [shifted, self._constant("one_bit", np.uint8(1))], f"{signs}.lowest")
        row = self._node("Reshape", [lowest, self._int64([-1])], f"{signs}.row")
        if packed.size * 8 != values.size:
            row = self._node("Slice", [row, self._int64([0]), self._int64([values.size])], f"{signs}.cut")
        shaped = self._node("Reshape", [row, self._int64(list(values.shape))], f"{signs}.shaped")
        is_plus = self._node("Cast", [shaped], f"{signs}.is_plus", to=9)  # BOOL
        return self._node("Where", [is_plus, self._float(1.0), self._float(-1.0)], weight)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _float(self, value: float) -> str:
        return self._constant(f"float_{value:g}", np.float32(value))

    def _int64(self, values: list[int]) -> str:
        return self._constant(f"int64_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def _constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name
