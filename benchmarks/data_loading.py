"""Images a second, and the CPU time of an image, of the training loaders: benchmarks/results/data_loading.json.

    python benchmarks/data_loading.py --images data/cifar10/train

The ways take turns, epoch by epoch, so that whatever else the machine does meets them alike; figures are medians.

    pillow      as it was before: decoded by Pillow, transformed by timm, normalized floats
    bytes       as it is: decoded and transformed by torchvision, bytes, which the device normalizes
    normalized  as `bytes`, and normalized on this CPU, as a run without an accelerator does
    shards      as `bytes`, out of WebDataset shards

No photographs come with this project. The files are JPEGs of 500x375 pixels made for the occasion: mosaics of 48 images of the
given folder, each enlarged to 64 pixels, with noise. How large they are stands in the results: a JPEG of ImageNet has about
110 kB, and takes longer to decode.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from design_lightning.data import ImageFolder, WebDataset
from design_lightning.data.batches import Batches, Seeds
from design_lightning.data.folders import unlabelled_images
from design_lightning.data.samples import Samples
from design_lightning.data.shards.making import make_shards
from design_lightning.training.step_benchmark import machine

WIDTH, HEIGHT, TILE = 500, 375, 64
COLUMNS, ROWS = -(-WIDTH // TILE), -(-HEIGHT // TILE)
NOISE, QUALITY = 6.0, 90
"""The standard deviation of the noise, in levels of 255, and the quality of the JPEGs."""
SIZE, BATCH = 224, 64
RESULTS = Path(__file__).parent / "results" / "data_loading.json"


class PillowBatches(Batches):
    """Images as they were loaded before: Pillow, timm, floats `[B, 3, 224, 224]`."""

    def __init__(self, samples: Samples, data: ImageFolder) -> None:
        super().__init__(samples)
        jitter = data.augmentation.color_jitter or None
        self.transform = create_transform(SIZE, is_training=True, color_jitter=jitter, interpolation="bilinear")

    def images(self, indices: Sequence[int], seeds: Seeds | None = None) -> tuple[Tensor, Tensor]:
        images = [self.transform(self.samples.image(index).convert("RGB")) for index in indices]
        return torch.stack(images), torch.as_tensor(indices)


class Loading:
    """One way to load an epoch, and what each epoch took."""

    def __init__(self, way: str, root: Path, workers: int, color_jitter: float) -> None:
        self.way, self.workers, self.color_jitter = way, workers, color_jitter
        kind = WebDataset if way == "shards" else ImageFolder
        self.data = kind(str(root), batch_size=BATCH, num_workers=workers, color_jitter=color_jitter)
        self.loader: Any = self.data.train_dataloader()
        if way == "pillow":
            self.loader.dataset.batches = PillowBatches(self.data.samples("train"), self.data)
        self.rates: list[float] = []
        self.milliseconds: list[float] = []

    def epoch(self, timed: bool) -> None:
        before, start, images = cpu_seconds(), time.perf_counter(), 0
        for batch in self.loader:
            if self.way == "normalized":
                batch = self.data.on_after_batch_transfer(batch, 0)
            images += len(batch[0])
        wall = time.perf_counter() - start
        if timed:
            self.rates.append(images / wall)
            self.milliseconds.append(1000 * (cpu_seconds() - before) / images)

    def result(self, first: "Loading") -> dict[str, object]:
        return {
            "way": self.way,
            "workers": self.workers,
            "color_jitter": self.color_jitter,
            "images_per_second": round(statistics.median(self.rates), 1),
            "cpu_milliseconds_an_image": round(statistics.median(self.milliseconds), 3),
            "times_as_fast": round(statistics.median(a / b for a, b in zip(self.rates, first.rates, strict=True)), 2),
        }


def cpu_seconds() -> float:
    """What this process and its workers have used; the workers live on between epochs."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def make_files(folder: Path, source: Path, count: int) -> float:
    """Writes `train/` and `val/` with one class each; gives the mean size of a file, in kB."""
    tiles = unlabelled_images(source)
    generator = np.random.default_rng(0)
    sizes = []
    for index in range(count + 1):
        mosaic = Image.new("RGB", (WIDTH, HEIGHT))
        for place, tile in enumerate(generator.integers(0, len(tiles), COLUMNS * ROWS)):
            image = tiles.image(int(tile)).convert("RGB").resize((TILE, TILE), Image.Resampling.BICUBIC)
            mosaic.paste(image, (place % COLUMNS * TILE, place // COLUMNS * TILE))
        pixels = np.asarray(mosaic) + generator.normal(0, NOISE, (HEIGHT, WIDTH, 3))
        path = folder / ("train" if index < count else "val") / "mosaic" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=QUALITY)
        sizes.append(path.stat().st_size / 1000)
    return statistics.mean(sizes)


def main() -> None:
    """Measures, prints a table and writes it."""
    parser = argparse.ArgumentParser(description="measure the training loader before and now")
    parser.add_argument("--images", type=Path, required=True, help="a folder of small images, in any depth")
    parser.add_argument("--count", type=int, default=512, help="files of an epoch (%(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=7, help="epochs of each, after one that is not timed (%(default)s)"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of workers (%(default)s)")
    parser.add_argument("--color_jitter", type=float, nargs="+", default=[0.4, 0.0], help="strengths (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the results (%(default)s)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = make_files(Path(folder), given.images, given.count)
        shards = Path(folder) / "shards"
        make_shards(Path(folder), shards, images=32)
        print(f"{given.count} JPEGs of {WIDTH}x{HEIGHT} pixels, {kilobytes:.0f} kB each", flush=True)
        for workers in given.workers:
            for jitter in given.color_jitter:
                ways = [Loading(way, Path(folder), workers, jitter) for way in ("pillow", "bytes", "normalized")]
                ways.append(Loading("shards", shards, workers, jitter))
                for number in range(given.rounds + 1):
                    for way in ways:
                        way.epoch(timed=number > 0)
                for way in ways:
                    results.append(way.result(ways[0]))
                    print(results[-1], flush=True)
    files = {"count": given.count, "width": WIDTH, "height": HEIGHT, "mean_kilobytes": round(kilobytes, 1)}
    config = {"files": files, "size": SIZE, "batch": BATCH, "rounds": given.rounds}
    where = machine("cpu", 1) | {
        "cores": os.cpu_count(),
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
    }
    given.out.write_text(json.dumps({"config": config, "machine": where, "results": results}, indent=2) + "\n")
    print(f"written: {given.out}")


if __name__ == "__main__":
    main()
