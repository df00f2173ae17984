"""Lightning data modules: image folders, WebDataset shards, CIFAR, STL-10, Fashion-MNIST (a subset is embedded), Hugging Face."""

from typing import TYPE_CHECKING

from design_lightning._lazy import lazy_attributes

if TYPE_CHECKING:
    from design_lightning.data.base import ImageData
    from design_lightning.data.cifar import CIFAR10, CIFAR100
    from design_lightning.data.fashion_mnist import FashionMNIST, FashionMNISTSubset
    from design_lightning.data.hugging_face import HuggingFace
    from design_lightning.data.image_folder import ImageFolder
    from design_lightning.data.sampling import IGNORE_LABEL, PaddedEvalSampler
    from design_lightning.data.stl10 import STL10
    from design_lightning.data.web_dataset import WebDataset

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "IGNORE_LABEL",
    "STL10",
    "FashionMNIST",
    "FashionMNISTSubset",
    "HuggingFace",
    "ImageData",
    "ImageFolder",
    "PaddedEvalSampler",
    "WebDataset",
]

_HOMES = {
    "CIFAR10": ".cifar",
    "CIFAR100": ".cifar",
    "FashionMNIST": ".fashion_mnist",
    "FashionMNISTSubset": ".fashion_mnist",
    "HuggingFace": ".hugging_face",
    "IGNORE_LABEL": ".sampling",
    "ImageData": ".base",
    "ImageFolder": ".image_folder",
    "PaddedEvalSampler": ".sampling",
    "STL10": ".stl10",
    "WebDataset": ".web_dataset",
}

__getattr__, __dir__ = lazy_attributes(__name__, _HOMES)
