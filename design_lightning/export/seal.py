"""The seal of a file: a SHA-256 of all that it holds, in its own metadata. A file that was cut or edited no longer matches it.

It finds damage and mistakes. It is no signature: whoever edits a file can compute it anew.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "design_lightning.sha256"
EMPTY_SEAL = "0" * 64
"""What stands in an IR until `seal_openvino`."""
_IN_XML = re.compile(rb'<sha256 value="([0-9a-f]{64})"')


def seal_of_tensors(tensors: Mapping[str, Tensor], text: str) -> str:
    """The seal of a `.safetensors`: of its metadata, and of name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal_onnx(proto: Any) -> None:
    """Puts its seal into a `ModelProto`, in place of one that it has."""
    there = (entry for entry in proto.metadata_props if entry.key == KEY)
    entry = next(there, None) or proto.metadata_props.add()
    entry.key, entry.value = KEY, EMPTY_SEAL
    entry.value = hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()


def onnx_matches_seal(proto: Any) -> bool:
    """Whether a `ModelProto` is as it was when it was sealed. Its seal is emptied."""
    entry = next((entry for entry in proto.metadata_props if entry.key == KEY), None)
    if entry is None:
        return False
    seal, entry.value = entry.value, EMPTY_SEAL
    return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest() == seal


def seal_openvino(path: Path) -> None:
    """Puts its seal into an IR: of the `.xml` that holds an empty one, and its `.bin`."""
    text = path.read_bytes()
    if len(_IN_XML.findall(text)) != 1:
        raise ValueError(f"{str(path)!r} has no empty seal to fill")
    path.write_bytes(_IN_XML.sub(b'<sha256 value="' + _digest(text, path) + b'"', text))


def openvino_matches_seal(path: Path) -> bool:
    """Whether an IR is as it was when it was sealed."""
    text = path.read_bytes()
    found = _IN_XML.findall(text)
    if len(found) != 1:
        return False
    return _digest(_IN_XML.sub(b'<sha256 value="' + EMPTY_SEAL.encode() + b'"', text), path) == found[0]


def _digest(text: bytes, path: Path) -> bytes:
    digest = hashlib.sha256(text)
    digest.update(path.with_suffix(".bin").read_bytes())
    return digest.hexdigest().encode()
