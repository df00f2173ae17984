"""Real-valued shortcuts around binary convolutions: norm(conv(sign(x))) + x.

What a binary convolution loses of its input, the shortcut carries past it. Liu et al., "Bi-Real Net", ECCV 2018,
arXiv:1808.00278. The addition stands behind the norm that follows the convolution, as there.
"""

from typing import Any

from torch import Tensor, nn

from design_lightning.surgery.probe import Probe


class RealShortcut:
    """Hooks that add a layer's real-valued input to the output of the norm behind it. No module, no parameter, no key."""

    def __init__(self) -> None:
        self._input: Tensor | None = None

    def attach(self, layer: nn.Module, norm: nn.Module) -> None:
        """Puts the shortcut around `layer` and `norm`; in a norm with an activation inside, in front of the activation."""
        layer.register_forward_pre_hook(self._remember, with_kwargs=True)
        act = getattr(norm, "act", None)
        if isinstance(act, nn.Module):
            act.register_forward_pre_hook(self._add_before)
        else:
            norm.register_forward_hook(self._add_after)

    def _remember(self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._input = next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor))

    def _take(self) -> Tensor:
        x, self._input = self._input, None  # so that no activation outlives its forward
        assert x is not None, "the norm of a shortcut ran before its convolution"
        return x

    def _add_before(self, act: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
        return (inputs[0] + self._take(), *inputs[1:])

    def _add_after(self, norm: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self._take()


def remove_shortcuts_(model: nn.Module) -> None:
    """Removes every `RealShortcut` of a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), RealShortcut)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def shortcut_place(name: str, probe: Probe | None) -> tuple[str | None, str]:
    """The norm behind which a layer's shortcut would end, or None; and why there is none."""
    if probe is None:
        return None, "no shortcut: no probing forward went through"
    if name in probe.findings.with_shortcut:
        return None, "has a shortcut of its own"
    if name not in probe.findings.norms:
        return None, "no shortcut: no norm follows"
    norm, shape = probe.findings.norms[name]
    if shape != probe.layers[name].input_shape:
        return None, f"no shortcut: {list(probe.layers[name].input_shape[1:])} becomes {list(shape[1:])}"
    return norm, "shortcut"
