"""Exports six kinds of networks, and compares each file with PyTorch on real images: benchmarks/results/export_agreement.csv.

    python benchmarks/export_agreement.py --images data/cifar10/val --count 100

The images are scaled to each network's size. The weights are random; the batch norms have the statistics of other images of the
folder, so that every layer sees both signs. A file that disagrees ends the run with an error and is not written.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor

import design_lightning as dl
import design_lightning.models
from design_lightning.export import export_model
from design_lightning.surgery import binary_layers
from design_lightning.training.batch_norm import recalibrate_batch_norm_

NETWORKS = {
    "resnet18": 224,
    "resnet20_cifar": 32,
    "vgg_small": 32,
    "mobilenetv3_small_100": 224,
    "regnetx_002": 224,
    "vit_tiny_patch16_224": 224,
}
CALIBRATION = 32
"""Images that batch norm is estimated on."""
RESULTS = Path(__file__).parent / "results" / "export_agreement.csv"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description="compare exported files with PyTorch on real images")
    parser.add_argument("--images", type=Path, required=True, help="a folder of images, in any depth")
    parser.add_argument("--count", type=int, default=100, help="images that are compared (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the table (%(default)s)")
    given = parser.parse_args()
    paths = sorted(path for path in given.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    needed = CALIBRATION + given.count
    if len(paths) < needed:
        raise SystemExit(f"{given.images} has {len(paths)} images, but {needed} are needed")
    paths = paths[:: len(paths) // needed][:needed]
    rows = [row for name, size in NETWORKS.items() for row in check(name, size, paths)]
    with given.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written: {given.out}")


def check(name: str, size: int, paths: list[Path]) -> list[dict[str, object]]:
    """A row for each format of a network."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    dl.binarize_(model, dl.BinaryConfig(), (2, 3, size, size))
    images = torch.stack([read(path, size) for path in paths])
    if any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        recalibrate_batch_norm_(model, [images[:CALIBRATION]])
    with tempfile.TemporaryDirectory() as folder:
        exports = export_model(
            model.eval(), Path(folder) / name, ("packed", "onnx", "openvino"), images[CALIBRATION:], runs=0
        )
    print(f"{name}, {size} pixels, {len(binary_layers(model))} binary layers\n{exports}", flush=True)
    return [
        {
            "network": name,
            "size": size,
            "format": each.format,
            "megabytes": round(each.bytes / 1e6, 3),
            "binary_layers": len(binary_layers(model)),
            "run_as_float": len(each.stay_float),
            "one_bit_operations": round(each.one_bit, 4),
            "images": each.agreement.images,
            "images_with_ties": each.agreement.images_with_ties,
            "difference": each.agreement.difference,
            "difference_with_ties": each.agreement.difference_with_ties,
            "top1_agreement": each.agreement.top1,
            "sums_differing_by_ties": each.agreement.differing,
        }
        for each in exports.files
    ]


def read(path: Path, size: int) -> Tensor:
    """An image, [3, size, size], normalised."""
    with Image.open(path) as image:
        pixels = pil_to_tensor(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)).float() / 255
    return normalize(pixels, timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)


if __name__ == "__main__":
    main()
