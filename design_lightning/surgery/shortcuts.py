"""Real-valued shortcuts around binary convolutions: norm(conv(sign(x))) + x.

What a binary convolution loses of its input, the shortcut carries past it. Liu et al., "Bi-Real Net", ECCV 2018,
arXiv:1808.00278. The addition stands behind the norm that follows the convolution, as there.
"""

import threading
from typing import Any, Self

from torch import Tensor, nn

from design_lightning.surgery.probe import Probe
from design_lightning.surgery.record import surgery_record


class _Slot(threading.local):
    """What is on its way past a layer, for each thread that runs the network. A copy of it is empty."""

    input: Tensor | None = None
    lost: int = 0

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class RealShortcut:
    """Hooks that add a layer's real-valued input to its output, or to that of the norm behind it. No module, no parameter."""

    def __init__(self) -> None:
        self._slot = _Slot()

    def attach(self, layer: nn.Module, end: nn.Module) -> None:
        """Puts the shortcut around `layer` and `end`, which may be the layer; in a norm with an activation, in front of that."""
        layer.register_forward_pre_hook(self._remember, with_kwargs=True)
        self.attach_end(end)

    def attach_end(self, end: nn.Module) -> None:
        """Hooks on where the shortcut ends."""
        self._slot = _Slot()
        act = getattr(end, "act", None)
        if isinstance(act, nn.Module):
            act.register_forward_pre_hook(self._add_before)
        else:
            end.register_forward_hook(self._add_after)

    def _remember(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        slot = self._slot
        slot.lost += slot.input is not None
        if slot.lost > 1:  # once, a forward may have been interrupted
            slot.input, slot.lost = None, 0
            raise RuntimeError(
                "the shortcut around a binary convolution was never added: the norm behind it was replaced after binarize_ (by "
                "SyncBatchNorm?); call design_lightning.surgery.reattach_shortcuts_(model)"
            )
        slot.input = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))

    def _take(self) -> Tensor:
        slot = self._slot
        x, slot.input, slot.lost = slot.input, None, 0  # so that no activation outlives its forward
        if x is None:
            raise RuntimeError("the norm of a shortcut ran before its convolution")
        return x

    def _add_before(self, act: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return (inputs[0] + self._take(), *inputs[1:])

    def _add_after(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self._take()


def reattach_shortcuts_(model: nn.Module) -> None:
    """Hooks shortcuts on norms again that replaced those of the surgery, as `SyncBatchNorm.convert_sync_batchnorm` does."""
    record = surgery_record(model)
    for name, end in (record.shortcuts if record else {}).items():
        shortcut = next(s for s in map(_shortcut_of, model.get_submodule(name)._forward_pre_hooks.values()) if s)
        target = model.get_submodule(end)
        inner = getattr(target, "act", None)
        hooks = inner._forward_pre_hooks if isinstance(inner, nn.Module) else target._forward_hooks
        if not any(_shortcut_of(hook) is shortcut for hook in hooks.values()):
            shortcut.attach_end(target)


def _shortcut_of(hook: Any) -> RealShortcut | None:
    owner = getattr(hook, "__self__", None)
    return owner if isinstance(owner, RealShortcut) else None


def remove_shortcuts_(model: nn.Module) -> None:
    """Removes every `RealShortcut` of a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if _shortcut_of(hook)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def shortcut_place(name: str, probe: Probe | None) -> tuple[str | None, str]:
    """The module behind which a layer's shortcut would end, its norm or itself, or None; and why there is none."""
    if probe is None:
        return None, "no shortcut: no probing forward went through"
    if name in probe.findings.with_shortcut:
        return None, "has a shortcut of its own"
    before, after = probe.layers[name].input_shape, probe.layers[name].output_shape
    if before != after:
        return None, f"no shortcut: {list(before[1:])} becomes {list(after[1:])}"
    norm = probe.findings.norms.get(name)
    if norm is None:
        return name, "shortcut (no norm follows)"
    if list(probe.findings.norms.values()).count(norm) > 1:
        return None, "no shortcut: other layers share the norm that follows"
    if name in probe.findings.rearranged:
        return None, "no shortcut: in the norm that follows its output is arranged otherwise"
    return norm, "shortcut"
