"""A binarized timm network in one `.safetensors` file, with no pickle: its tensors, and in the header what rebuilds it."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from design_lightning.binary._float32 import Float32State
from design_lightning.export.about import About
from design_lightning.export.comparison import check_rebuilds
from design_lightning.export.metadata import Metadata, classifiers, refuse_foreign_classes
from design_lightning.export.seal import KEY as SEAL
from design_lightning.export.seal import seal_of_tensors
from design_lightning.export.state import load_state_
from design_lightning.surgery import reattach_shortcuts_
from design_lightning.surgery.packing import pack_layers_, packed_layers

_KEY = "design_lightning"


def save(
    model: nn.Module,
    path: str | Path,
    model_args: Mapping[str, Any] | None = None,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a binarized timm network so that `load(path)` rebuilds it: latent weights and all, or packed, one bit a binary weight.

    Before that it is rebuilt, and compared with the model in its modules and in its outputs for one batch. The layout of a packed
    file is described in docs/format.md.

    Args:
        model: what `binarize_` made of a timm network. Its classifier may have been replaced since (`reset_classifier`).
        path: the file; `.safetensors` by custom. It appears when it is complete, its folder with it.
        model_args: what `timm.create_model` got beside the name, `num_classes` and `in_chans`, such as `{"img_size": 64}`.
            Where weights came from (`pretrained`, `pretrained_cfg`, `pretrained_cfg_overlay`, `checkpoint_path`,
            `cache_dir`) is left out: the file holds them.
        packed: whether the signs of binary weights are written in place of latent weights. Such a file is to predict with, or to
            train another classifier on; its binary weights can no longer be trained. The model itself stays as it is.
        dtype: of the floats of a packed file (scales, float layers): float32, float16 or bfloat16. Thresholds are float32 always.
            A warning names a tensor in which a value becomes 0 by that.

    Returns:
        The path.

    Raises:
        ValueError: if the model is not binarized, has no values, is no network of timm, or differs from what its name and
            `model_args` build; says what differs first. If it is to be packed and a layer is not in stage `both`, or a value
            is more than `dtype` holds, names it.
    """
    if packed or packed_layers(model):
        model = _packed_copy(model, dtype)
    elif dtype != torch.float32:
        raise ValueError(
            f"dtype={dtype} is of packed files; latent weights are saved as they are: pass packed=True, too"
        )
    metadata = Metadata.of(model, model_args)
    reattach_shortcuts_(model)  # which batch norms lose where synchronised ones take their places
    state = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError(f"the {metadata.architecture} is on meta and has no values; load weights before you save it")
    text = metadata.to_text()
    check_rebuilds(model, Metadata.from_text(text, trust=True))
    if metadata.packed is not None:
        state = {key: tensor.to(dtype) if _is_narrowed(model, key, tensor) else tensor for key, tensor in state.items()}
    # Copies, for tied tensors must not share memory in a file; on the CPU at once, and row by row.
    tensors = {k: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, t in state.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        aside.touch()
        mode = aside.stat().st_mode  # safetensors would let nobody else read the file
        safetensors.torch.save_file(tensors, aside, {_KEY: text, SEAL: seal_of_tensors(tensors, text)})
        aside.chmod(mode)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def _packed_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with packed layers, whose floats are what they will be when they come back from the file."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; floats of a packed file are float32, float16 or bfloat16")
    model = copy.deepcopy(model).float()
    if not packed_layers(model):
        pack_layers_(model)
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and _is_narrowed(model, key, tensor) and not tensor.is_meta:
            narrow = tensor.to(dtype)
            if not narrow.isfinite().all() and tensor.isfinite().all():
                raise ValueError(
                    f"{key!r} holds {tensor.abs().max():g}, more than {dtype} can; save it with dtype=torch.float32"
                )
            tensor.copy_(narrow)
    return model


def _is_narrowed(model: nn.Module, key: str, tensor: Tensor) -> bool:
    owner = model.get_submodule(key.rpartition(".")[0])
    return tensor.dtype == torch.float32 and not isinstance(owner, Float32State)


def load(path: str | Path, num_classes: int | None = None, trust: bool = False) -> nn.Module:
    """A network from a file of `save`, or from a checkpoint of `design-train fit`; in eval mode, on the CPU.

    Every tensor of a `.safetensors` has the type that it was saved with; those of a packed one and of a `.ckpt` come as float32.

    A file names the network, and may name classes of the user by dotted path, which are imported: code that runs. Such a file
    is refused, unless you say that you trust it. Do so only if you know where it comes from.

    Args:
        path: `.safetensors`, or Lightning's `.ckpt`.
        num_classes: another number of classes than the file's gives a new, float classifier, as for fine-tuning.
        trust: whether classes outside design_lightning may be imported; of a `.ckpt` also, whether its pickle may hold other
            things than tensors and plain values, and its network come from a hub or a folder.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither, or of a newer format, its tensors do not fit, or it needs trust.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is no file; give one that dl.save or design-train fit wrote")
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes is {num_classes}; give 0 for no classifier, or None for that of the file")
    model = _read_checkpoint(path, trust) if path.suffix == ".ckpt" else _read_safetensors(path, trust)
    if num_classes is not None and num_classes != getattr(model, "num_classes", None):
        _replace_classifier_(model, num_classes)
    return model.eval()


def _read_safetensors(path: Path, trust: bool) -> nn.Module:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no mapping
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not readable as safetensors, cut off perhaps: {error}") from error
    text = header.get(_KEY)
    if text is None:
        raise ValueError(f"{str(path)!r} holds no binarized network: its metadata has no {_KEY!r}; dl.save writes it")
    try:
        if header.get(SEAL) != seal_of_tensors(tensors, text):
            raise ValueError("it was edited or damaged since it was written: its SHA-256 is another one")
        metadata = Metadata.from_text(text, trust)
        about = About.from_dict(metadata.about)
        if metadata.packed is not None:
            tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        model = metadata.build()
        about.describe_(model)
        load_state_(model, {**tensors, **metadata.extra_state})
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be rebuilt with timm {timm.__version__}: {error}") from error
    return model


def _read_checkpoint(path: Path, trust: bool) -> nn.Module:
    from design_lightning.training import DesignClassifier  # Lightning is not needed for the other format
    from design_lightning.training.checkpoint_files import read_checkpoint

    arguments = read_checkpoint(str(path), "path", weights_only=not trust).get("hyper_parameters")
    if not isinstance(arguments, Mapping) or not {"backbone", "binary"} <= arguments.keys():
        raise ValueError(
            f"{str(path)!r} is the checkpoint of another module than DesignClassifier; use that one's class"
        )
    try:
        if not trust:
            _refuse_hubs(str(arguments["backbone"]))
            refuse_foreign_classes(arguments["binary"] or {})
        module = DesignClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # whatever a constructor may raise
        raise ValueError(
            f"{str(path)!r} cannot be rebuilt with timm {timm.__version__}: {' '.join(str(error).split())}"
        ) from error
    return module.backbone


def _refuse_hubs(name: str) -> None:
    if ":" in name:
        raise ValueError(f"its network {name!r} is of a hub or a folder; if you trust the file, pass trust=True")


def _replace_classifier_(model: nn.Module, num_classes: int) -> None:
    if not hasattr(model, "reset_classifier"):
        raise ValueError(f"{type(model).__name__} has no classifier, so num_classes={num_classes} cannot be set")
    cast(Any, model).reset_classifier(num_classes)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for head in classifiers(model):
        head.to(dtype)
