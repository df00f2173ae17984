"""Hooks of a module that go with it when another takes its place: timm's `FeatureHookNet` hangs on hooks of activations."""

from torch import nn

_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    "_is_full_backward_hook",
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


def share_hooks(module: nn.Module, replacement: nn.Module) -> None:
    """Gives a replacement the very hooks of a module, so that the handles of those that are there still remove them."""
    for name in _HOOKS:
        setattr(replacement, name, getattr(module, name))
