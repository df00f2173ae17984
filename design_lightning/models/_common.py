"""What the networks for small images share: their data, and the width factor."""

from typing import Any

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)


def cifar_cfg(first_conv: str, pool_size: tuple[int, int], **overrides: Any) -> dict[str, Any]:
    """What timm keeps about a network for CIFAR-10, as `pretrained_cfg`; there is no address of weights in it."""
    return {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": pool_size,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR10_MEAN,
        "std": CIFAR10_STD,
        "first_conv": first_conv,
        "classifier": "fc",
        **overrides,
    }


def scaled(channels: int, width: float) -> int:
    """So many channels times the width factor, as a multiple of 4, since threshold kernels are up to 4 channels deep.

    Raises:
        ValueError: if the factor is not positive.

    >>> scaled(128, 0.25), scaled(16, 0.25), scaled(16, 0.1)
    (32, 4, 4)
    """
    if not width > 0:
        raise ValueError(
            f"width must be positive, not {width}; 1 is the network of the paper, 0.25 a quarter of its channels"
        )
    return max(4, round(channels * width / 4) * 4)
