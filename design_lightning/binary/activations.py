"""Binary activations: DeSign, plain Sign, and RSign with a learned shift per channel. Their output is exactly +-1.

All three are one comparison with a threshold; they differ in where the threshold comes from. A layout says which axis of
the input holds the channels:

    NCHW  [B, C, H, W], one image [C, H, W], or features [B, C]
    NHWC  [..., H, W, C], tokens [B, N, C], or features [B, C]
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from design_lightning.binary._float32 import Float32State
from design_lightning.binary.estimators import Estimator, make_estimator
from design_lightning.binary.functional import binarize
from design_lightning.binary.keeping import Keeping
from design_lightning.kernels import Alignment, ThresholdKernel, tile

Layout = Literal["NCHW", "NHWC"]


class BinaryActivation(Float32State, Keeping):
    """The base: compares its input with `threshold(x)`, and lets the gradient through by an estimator.

    Args:
        layout: which axis holds the channels; see the module's text.
        estimator: a name of `ESTIMATORS`, the dotted path of a class, or an `Estimator`.
        estimator_args: what its constructor takes.
    """

    def __init__(
        self,
        layout: Layout = "NCHW",
        estimator: str | Estimator = "approx_sign",
        estimator_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layout not in ("NCHW", "NHWC"):
            raise ValueError(f"unknown layout {layout!r}: use 'NCHW', or 'NHWC' for channels last and tokens")
        self.layout: Layout = layout
        self.estimator = make_estimator(estimator, **(estimator_args or {}))

    def threshold(self, x: Tensor) -> Tensor:
        """The threshold of each element of x: float32, broadcasts to x."""
        raise NotImplementedError(f"{type(self).__name__} lacks `threshold`")

    def forward(self, x: Tensor) -> Tensor:
        """+1 where x >= threshold, else -1; of the shape and type of x."""
        return binarize(x, self.threshold(x), self.estimator, self.keeps)

    @property
    def gives_bits(self) -> bool:
        """Whether the output is known to be +-1 alone: a subclass with a forward of its own may give anything."""
        return type(self).forward is BinaryActivation.forward

    def extra_repr(self) -> str:  # noqa: D102
        return f"layout={self.layout}"

    def _channels(self, x: Tensor) -> int:
        if x.dim() < 2:
            raise ValueError(f"a binary activation takes at least [B, C], not an input of shape {list(x.shape)}")
        channels_first = self.layout == "NCHW" and x.dim() > 2
        return x.shape[-3] if channels_first else x.shape[-1]

    def _per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """Shapes one value per channel [C] so that it broadcasts to x."""
        return values.view(-1, 1, 1) if self.layout == "NCHW" and x.dim() > 2 else values


class Sign(BinaryActivation):
    """The plain sign, with sign(0) = +1.

        y = +1 if x >= 0, else -1

    Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830.
    """

    def threshold(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros((), device=x.device)


class RSign(BinaryActivation):
    """The sign with a learned shift of each channel.

        y[b, c, i, j] = +1 if x[b, c, i, j] >= shift[c], else -1

    Liu et al., "ReActNet", ECCV 2020, arXiv:2003.03488 (with sign(0) = +1).

    Args:
        channels: C. The shifts start at 0.
        layout, estimator, estimator_args: as in `BinaryActivation`.
    """

    float32_state: ClassVar[tuple[str, ...]] = ("shift",)

    def __init__(
        self,
        channels: int,
        layout: Layout = "NCHW",
        estimator: str | Estimator = "approx_sign",
        estimator_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(layout, estimator, estimator_args)
        self.shift = nn.Parameter(torch.zeros(channels))

    def threshold(self, x: Tensor) -> Tensor:  # noqa: D102
        channels = self._channels(x)
        if channels != self.shift.numel():
            raise ValueError(f"RSign of {self.shift.numel()} channels got an input of {channels}: {list(x.shape)}")
        return self._per_channel(self.shift.float(), x)

    def extra_repr(self) -> str:  # noqa: D102
        return f"channels={self.shift.numel()}, {super().extra_repr()}"


class DeSign(BinaryActivation):
    """The designed dithering sign: a Sign whose threshold follows a small kernel, periodic over the image.

        y[b, c, i, j] = +1 if x[b, c, i, j] >= unit * scale * g[c] * K[c mod D, (i + oi) mod h, (j + oj) mod w], else -1

    Monroy et al., "Designed Dithering Sign Activation for Binary Neural Networks", IEEE JSTSP 2024, arXiv:2405.02220.

    Tokens [B, N, C] (layout NHWC) take the thresholds of the grid that they came from, if `grid` gives it: N =
    prefix_tokens + rows * columns, row by row; prefix tokens (a class token) have no place in the image, and threshold 0.
    Without a grid the kernel, read row by row, is periodic along N. Features [B, C] are an image of one pixel.

    The thresholds are meant in standard deviations of a batch-normalised input. Where the input has another size (behind an
    attention, say) the persistent 0-dim buffer `unit` holds that size; it is 1 until `binarize_` or you set it.

    Args:
        kernel: a `ThresholdKernel`, a published name such as `2x2_v1`, a kernel's JSON file, or levels [D, h, w].
        scale: factor of the whole kernel: 1 is the paper's activation, 0 is plain Sign. A persistent 0-dim buffer.
        align: `topleft` (the authors' PyTorch code) or `center` (their TensorFlow code); see `kernels.tile`.
        learn_kernel: train the levels; they are a parameter then, and `kernel` their start.
        gamma_from: the norm that feeds this activation, and it alone; its weight is g, so that the threshold follows the
            scale of the pre-activation. 1 if not given. The norm stays where it is: it is no submodule of this one.
        grid: (rows, columns) of the tokens' grid.
        prefix_tokens: how many tokens stand before the grid.
        layout, estimator, estimator_args: as in `BinaryActivation`.

    Raises:
        ValueError: if the kernel is unknown, its depth does not divide the input's channels, tokens do not fill the grid,
            or the norm has no weight.

    >>> activation = DeSign("2x2_v1")
    >>> activation(torch.full((1, 1, 2, 4), 0.7))[0, 0].tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]]
    """

    levels: Tensor
    scale: Tensor
    unit: Tensor
    float32_state: ClassVar[tuple[str, ...]] = ("levels", "scale", "unit")

    def __init__(
        self,
        kernel: ThresholdKernel | str | Path | Sequence[Any] | Tensor = "2x2_v1",
        scale: float = 1.0,
        align: Alignment = "topleft",
        learn_kernel: bool = False,
        gamma_from: nn.Module | None = None,
        grid: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        layout: Layout = "NCHW",
        estimator: str | Estimator = "approx_sign",
        estimator_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(layout, estimator, estimator_args)
        if align not in ("topleft", "center"):
            raise ValueError(f"unknown alignment {align!r}: use 'topleft' or 'center'")
        if gamma_from is not None and getattr(gamma_from, "weight", None) is None:
            raise ValueError(f"the norm {gamma_from} has no weight (affine=False?), so it cannot scale a threshold")
        self.kernel = ThresholdKernel.of(kernel)
        self.align: Alignment = align
        self.grid = grid
        self.prefix_tokens = prefix_tokens
        self._gamma_from = (gamma_from,)  # in a tuple, so that it is not registered as a submodule
        levels = self.kernel.tensor()
        if learn_kernel:
            self.levels = nn.Parameter(levels)
        else:
            self.register_buffer("levels", levels)
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("unit", torch.ones(()))
        self.start = {"levels": self.kernel.levels, "scale": float(scale)}

    def reset_parameters(self) -> None:  # noqa: D102
        super().reset_parameters()
        self.unit.fill_(1)

    @property
    def gamma_from(self) -> nn.Module | None:
        """The norm whose weight scales the thresholds, if any."""
        return self._gamma_from[0]

    @property
    def learn_kernel(self) -> bool:
        """Whether the levels are a parameter."""
        return isinstance(self.levels, nn.Parameter)

    def threshold(self, x: Tensor) -> Tensor:  # noqa: D102
        channels = self._channels(x)
        if self.gamma_from is None:
            levels = (self.unit * self.scale) * self.levels
        else:
            gamma = cast(Tensor, self.gamma_from.weight)
            depth = self.levels.shape[0]
            if gamma.numel() != channels or channels % depth:
                raise ValueError(
                    f"the norm that scales these thresholds has {gamma.numel()} channels and the kernel {depth}, "
                    f"but the input has {channels}: {list(x.shape)}"
                )
            levels = (self.unit * self.scale * gamma.float()).view(-1, 1, 1) * self.levels.repeat(
                channels // depth, 1, 1
            )
        if self.layout == "NCHW":
            return (
                tile(levels, channels, x.shape[-2], x.shape[-1], self.align)
                if x.dim() > 2
                else self._one_pixel(levels, channels)
            )
        if x.dim() == 2:
            return self._one_pixel(levels, channels)
        if x.dim() == 3:
            return self._tokens(levels, channels, x.shape[1])
        return tile(levels, channels, x.shape[-3], x.shape[-2], self.align).permute(1, 2, 0)

    def _one_pixel(self, levels: Tensor, channels: int) -> Tensor:
        return tile(levels, channels, 1, 1, self.align).flatten()

    def _tokens(self, levels: Tensor, channels: int, tokens: int) -> Tensor:
        if self.grid is None:
            return tile(levels.flatten(1).unsqueeze(1), channels, 1, tokens, self.align)[:, 0].t()
        rows, columns = self.grid
        if tokens != self.prefix_tokens + rows * columns:
            raise ValueError(
                f"{tokens} tokens are not {self.prefix_tokens} prefix tokens and a grid of {rows} x {columns}; "
                "for inputs of another size set the attributes `grid` and `prefix_tokens` of this DeSign; grid None makes the "
                "thresholds periodic along the tokens"
            )
        on_grid = tile(levels, channels, rows, columns, self.align).flatten(1).t()
        return torch.cat([on_grid.new_zeros(self.prefix_tokens, on_grid.shape[1]), on_grid])

    def extra_repr(self) -> str:  # noqa: D102
        parts = [f"kernel={self.kernel.name}", super().extra_repr()]
        if not self.scale.is_meta and self.scale.item() != 1:
            parts.append(f"scale={self.scale.item():g}")
        if not self.unit.is_meta and self.unit.item() != 1:
            parts.append(f"unit={self.unit.item():.3g}")
        if self.align != "topleft":
            parts.append(f"align={self.align}")
        if self.learn_kernel:
            parts.append("learn_kernel=True")
        if self.gamma_from is not None:
            parts.append("scaled by gamma")
        if self.grid is not None:
            parts.append(f"grid={self.grid}, prefix_tokens={self.prefix_tokens}")
        return ", ".join(parts)


OWN_ACTIVATIONS: dict[str, type[BinaryActivation]] = {"design": DeSign, "sign": Sign, "rsign": RSign}
"""Those whose thresholds an export knows."""
ACTIVATIONS = dict(OWN_ACTIVATIONS)
