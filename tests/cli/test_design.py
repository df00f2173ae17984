"""`design-train design` and `gallery`: what they print and write, how their files are used, and how they fail."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import timm
import yaml
from PIL import Image

import design_lightning as dl
from design_lightning.cli import main
from design_lightning.commands import design as design_command
from design_lightning.data.idx import read_idx
from design_lightning.kernels import PUBLISHED
from design_lightning.kernels.search import SCORES

TINY = shlex.split(
    "--config quickstart --trainer.accelerator cpu --model.backbone resnet20_cifar --model.backbone_args '{width: 0.25}' "
    "--data.batch_size 16 --trainer.max_steps 2 --trainer.limit_val_batches 1 --model.warmup_epochs 0"
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures of clothes as files."""
    folder = tmp_path_factory.mktemp("pictures")
    source = resources.files("design_lightning.data") / "fashion_mnist_subset"
    for i, image in enumerate(read_idx(source / "t10k-images-idx3-ubyte.gz")[:40]):
        Image.fromarray(image).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checkpoint of a short training."""
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(folder)
        main(["fit", *TINY])
    return str(folder / "runs" / "quickstart" / "version_0" / "checkpoints" / "last.ckpt")


def design(pictures: Path, *options: str) -> None:
    main(["design", "--images", str(pictures), "--filters", "2", *options])


@pytest.mark.parametrize(
    "options",
    [
        (),
        *(
            pytest.param(options, marks=pytest.mark.slow)
            for options in (
                ("--levels", "published", "--family", "shift", "--min_share", "0.001"),
                *[
                    (
                        "--size",
                        "3x3",
                        "--symmetric",
                        "--score",
                        "mutual_information",
                        "--reference",
                        "grey",
                        "--ties",
                        "off",
                    )
                ],
                ("--size", "1x3", "--levels", "0.3,0.6,1.2", "--seeds", "2"),
            )
        ),
    ],
    ids=" ".join,
)
def test_prints_tables_of_eighty_columns_and_writes_the_best(
    pictures: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    design(pictures, *options, "--figure", "found.png")
    output, error = capsys.readouterr()
    assert max(map(len, output.splitlines())) <= 80
    assert error == ""
    kernel = dl.ThresholdKernel.from_json("kernel.json")
    size = options[options.index("--size") + 1] if "--size" in options else "2x2"
    assert kernel.shape == (4 if "shift" in options else 1, *map(int, size.split("x")))
    for score in SCORES.values():
        assert score.title in output
        assert re.search(rf"\b{score.short}\b", output)
    ranks, scores = output.partition("scores of all published kernels")[::2]
    for name in PUBLISHED:
        assert (name in ranks) == (dl.ThresholdKernel.named(name).shape == kernel.shape)
        assert name in scores
    assert "written: kernel.json and found.png" in output
    with Image.open("found.png") as picture:
        assert picture.size[0] > 1000


def test_prints_json_if_asked(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    design(pictures, "--json", "--limit", "30", "--keep", "3", "--out", "sub/best.json")
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 30
    assert len(found["top"]) == 3
    best = dl.ThresholdKernel.from_json(json.dumps(found["top"][0]["kernel"]))
    assert dl.ThresholdKernel.from_json("sub/best.json") == best
    assert set(found["published"]) == {"2x2_v1", "2x2_v2"}


@pytest.mark.slow
def test_the_same_command_gives_the_same_numbers(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        design(pictures, "--json", "--limit", "20")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_the_file_is_a_kernel_wherever_a_name_is_one(pictures: Path) -> None:
    design(pictures, "--levels", "published")
    kernel = dl.ThresholdKernel.from_json("kernel.json")
    model = timm.create_model("resnet18", num_classes=3)
    dl.binarize_(model, dl.BinaryConfig.from_yaml("kernel: kernel.json"))
    assert model.layer1[0].conv1.activation.kernel == kernel
    model = timm.create_model("resnet18", num_classes=3)
    dl.binarize_(model, dl.BinaryConfig.from_yaml("overrides: {layer2.*: {kernel: kernel.json}}"))
    assert model.layer2[0].conv1.activation.kernel == kernel
    assert model.layer1[0].conv1.activation.kernel.name == "2x2_v1"
    Path("mine.yaml").write_text("model: {init_args: {binary: {kernel: kernel.json}}}\n")
    main(["fit", *TINY, "--config", "mine.yaml"])
    Path("kernel.json").unlink()
    again = dl.load(next(Path("runs").rglob("*.ckpt")))
    assert all(m.kernel == kernel for m in again.modules() if isinstance(m, dl.DeSign))


class TestOfAModel:
    def test_takes_the_preactivations_of_a_checkpoint(
        self, pictures: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--limit", "8", "--checkpoint", checkpoint, "--model", "resnet20_cifar", "--figure", "found.png")
        design(pictures, *options)
        output, error = capsys.readouterr()
        assert "8 images, 18 layers; reference relu, levels published" in " ".join(output.split())
        assert "random weights" not in error
        assert dl.ThresholdKernel.from_json("kernel.json").shape == (1, 2, 2)
        saved = dl.save(dl.load(checkpoint), "net.safetensors", {"width": 0.25})
        design(pictures, "--limit", "8", "--checkpoint", str(saved), "--image_size", "32", "--json")
        assert json.loads(capsys.readouterr().out)["units"] == list(names_of(checkpoint))

    @pytest.mark.slow
    def test_designs_a_kernel_per_layer_as_overrides_that_train(
        self, pictures: Path, checkpoint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        design(pictures, "--limit", "8", "--checkpoint", checkpoint, "--per_layer", "--size", "1x2")
        output = capsys.readouterr().out
        assert max(map(len, output.splitlines())) <= 80
        found = yaml.safe_load(Path("overrides.yaml").read_text())
        assert list(found["overrides"]) == list(names_of(checkpoint))
        Path("more.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"binary": found}}}))
        main(["fit", *TINY, "--config", "more.yaml"])
        again = dl.load(next(Path("runs").rglob("*.ckpt")))
        for name, override in found["overrides"].items():
            kernel = again.get_submodule(name).activation.kernel
            assert kernel.levels == dl.ThresholdKernel(override["kernel"]).levels

    def test_says_that_weights_are_random(self, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
        design(pictures, "--limit", "2", "--model", "resnet20_cifar", "--min_share", "0")
        output, error = capsys.readouterr()
        assert "no --checkpoint given, so the network has random weights" in error
        assert "2 images, 18 layers" in output

    def test_layers_too_small_are_named(self, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--limit", "2", "--model", "resnet20_cifar", "--image_size", "8", "--size", "3x3", "--symmetric")
        design(pictures, *options, "--min_share", "0")
        assert "layer3.0.conv2 is left out: its maps are 2x2, smaller than the kernel" in capsys.readouterr().err


def names_of(checkpoint: str) -> list[str]:
    from design_lightning.surgery.stages import binary_layers

    return list(binary_layers(dl.load(checkpoint)))


@pytest.mark.parametrize("options", [(), ("--kernel", "mine.json")], ids=["published", "mine"])
def test_gallery_draws_every_published_kernel(
    pictures: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    dl.ThresholdKernel([[0.2, 0.9]], name="mine").to_json("mine.json")
    main(["gallery", "--image", str(pictures / "3.png"), "--out", "all.svg", *options])
    assert capsys.readouterr().out == "written: all.svg\n"
    assert Path("all.svg").read_text().count("<image") == 3 + len(PUBLISHED) + bool(options)


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("design", 2, "the following arguments are required: --images"),
        ("design --imges x", 2, "required: --images"),
        ("design --images PICTURES --sise 2x2", 2, "unknown option '--sise': did you mean '--size'?"),
        ("design --images PICTURES --score tvv", 2, "argument --score: invalid choice: 'tvv' (choose from"),
        ("design --images nowhere", 1, "no image folder 'nowhere'"),
        ("design --images PICTURES --size 5x5", 1, "size 5x5 with 6 levels has"),
        ("design --images PICTURES --limit 0", 1, "limit is 0, but there must be at least 1 image"),
        ("design --images PICTURES --levels coded", 1, "unknown levels 'coded'"),
        ("design --images PICTURES --levels 1,b", 1, "--levels '1,b': give numbers with commas between"),
        ("design --images PICTURES --out kernel.yaml", 1, "--out is 'kernel.yaml', but what is written is a .json"),
        ("design --images PICTURES --figure x.gif", 1, "figure 'x.gif': use a name that ends in .png, .pdf or .svg"),
        ("design --images PICTURES --image x.png", 1, "--image is what --figure shows: give --figure, too"),
        ("design --images PICTURES --per_layer", 1, "--per_layer goes with --model or --checkpoint"),
        ("design --images PICTURES --image_size 8", 1, "--image_size goes with --model or --checkpoint"),
        ("design --images PICTURES --out FOLDER.json", 1, "--out 'FOLDER.json' is a folder: give the name of a file"),
        ("design --images PICTURES --out FILE/kernel.json", 1, "FILE' is no folder that one may write to"),
        ("design --images PICTURES --out /proc/no/kernel.json", 1, "--out '/proc/no/kernel.json' cannot be written"),
        ("design --images PICTURES --figure FOLDER.png", 1, "figure 'FOLDER.png' is a folder: give the name of a file"),
        ("design --images PICTURES --seed -1", 1, "seed is -1, but must be at least 0"),
        ("design --images PICTURES --checkpoint FILE", 1, "'FILE' is not readable as safetensors, cut off perhaps"),
        ("design --images PICTURES --device cuda:99", 1, "device 'cuda:99'"),
        ("design --images PICTURES --model resnet81", 1, "unknown model 'resnet81': did you mean 'resnet18'"),
        ("design --images PICTURES --model resnet18 --reference grey", 1, "--reference grey goes with simulated maps"),
        ("design --images PICTURES --model resnet18 --levels codes", 1, "--levels codes goes with simulated maps"),
        ("design --images PICTURES --model resnet18 --image_size 4", 1, "image_size is 4"),
        ("design --images PICTURES --model resnet18 --checkpoint no.ckpt", 1, "'no.ckpt' is no file"),
        ("design --images PICTURES --checkpoint CHECKPOINT --model resnet18", 1, "holds a 'resnet20_cifar'"),
        ("design --images PICTURES --checkpoint CHECKPOINT --per_layer --figure x.png", 1, "leave out --per_layer"),
        ("gallery", 2, "the following arguments are required: --image"),
        ("gallery --image no.png", 1, "no image file 'no.png'"),
        ("gallery --image PICTURES/3.png --out no/x.png", 1, "there is no folder 'no'"),
        ("gallery --image PICTURES/3.png --out FOLDER.png", 1, "figure 'FOLDER.png' is a folder"),
        ("gallery --image PICTURES/3.png --max_side -3", 1, "max_side is -3, but an image needs at least 8 pixels"),
        ("gallery --image PICTURES/3.png --kernel 2x2_v9", 1, "unknown kernel '2x2_v9': did you mean"),
    ],
)
def test_a_wrong_word_ends_in_one_clear_line(
    pictures: Path, checkpoint: str, capsys: pytest.CaptureFixture[str], command: str, code: int, message: str
) -> None:
    args = command.replace("PICTURES", str(pictures)).replace("CHECKPOINT", checkpoint).split()
    Path("FILE").write_text("neither a folder nor a checkpoint")
    for folder in ("FOLDER.json", "FOLDER.png"):
        Path(folder).mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(args)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code
    assert error[-1].startswith("design-train: error: ")
    assert message in error[-1]
    assert not Path("kernel.json").exists()


@pytest.mark.parametrize("command", ["design", "gallery"])
def test_help_needs_no_torch(command: str) -> None:
    code = (
        f"import sys; from design_lightning.cli import main\ntry: main(['{command}', '--help'])\n"
        "except SystemExit as e: print('EXIT', e.code, [m for m in ('torch', 'timm', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "EXIT 0 []"
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_scores_of_the_command_are_those_of_the_search() -> None:
    assert tuple(SCORES) == design_command.SCORES
