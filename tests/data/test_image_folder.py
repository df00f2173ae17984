from pathlib import Path

import pytest
import torch

from design_lightning.data import ImageFolder

TREE = {"train": {"cat": 6, "dog": 4}, "val": {"cat": 2, "dog": 3}}


def folder(root: Path, **options) -> ImageFolder:
    return ImageFolder(str(root), **{"batch_size": 4, "num_workers": 0, "image_size": 24, **options})


def test_what_a_model_needs_to_know_is_there_before_any_image_is_opened(make_tree):
    root = make_tree(TREE)
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"no image")
    data = folder(root)
    assert data.num_classes == 2
    assert data.class_names == ("cat", "dog")
    assert data.input_size == (3, 24, 24)
    assert len(data.mean) == len(data.std) == 3


def test_batches_are_bytes_and_int64_labels(make_tree):
    data = folder(make_tree(TREE))
    data.setup("fit")
    (images, labels), *rest = list(data.train_dataloader())
    assert images.shape == (4, 3, 24, 24)
    assert images.dtype == torch.uint8
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    assert len(rest) == 1, "the incomplete third batch is left out"
    val_labels = torch.cat([labels for _, labels in data.val_dataloader()])
    assert val_labels.tolist() == [0, 0, 1, 1, 1]


def test_workers_load_what_the_main_process_would(make_tree):
    root = make_tree(TREE)
    for here, there in zip(folder(root).val_dataloader(), folder(root, num_workers=1).val_dataloader(), strict=True):
        assert torch.equal(here[0], there[0])
        assert torch.equal(here[1], there[1])


def test_training_with_workers_is_reproducible_by_the_seed(make_tree):
    root = make_tree(TREE)
    first, again, other = (list(folder(root, num_workers=1, seed=seed).train_dataloader()) for seed in (3, 3, 4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"interpolation": "random"},
        {"padding": 4, "color_jitter": 0.0},
        {"auto_augment": "rand-m9-mstd0.5", "re_prob": 0.5},
    ],
)
def test_workers_augment_as_the_main_process_does_whatever_else_draws(make_tree, options):
    root = make_tree(TREE)
    here = list(folder(root, **options).train_dataloader())
    torch.manual_seed(99)
    there = list(folder(root, num_workers=2, **options).train_dataloader())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(here, there, strict=True))


def test_epochs_differ_in_order_and_can_be_repeated(make_tree):
    data = folder(make_tree(TREE), drop_last=False)
    loader = data.train_dataloader()

    def order(epoch: int) -> list[int]:
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert sorted(order(0)) == list(range(10))
    assert order(0) != order(1)
    assert order(0) == order(0)


def test_a_test_folder_is_used_where_there_is_one_and_the_validation_folder_else(make_tree):
    without = folder(make_tree(TREE))
    assert without.samples("test").name(0) == without.samples("val").name(0)
    with_test = folder(make_tree({**TREE, "test": {"cat": 1, "dog": 1}}, name="with_test"))
    assert len(with_test.samples("test")) == 2
    assert len(with_test.samples("val")) == 5


def test_the_folder_may_be_called_validation(make_tree):
    data = folder(make_tree({"train": TREE["train"], "validation": TREE["val"]}))
    assert len(data.samples("val")) == 5


def test_validation_images_can_be_carved_from_training(make_tree):
    data = folder(make_tree({"train": {"cat": 6, "dog": 4}}), val_size=5)
    train, val = data.samples("train"), data.samples("val")
    assert torch.bincount(val.labels).tolist() == [3, 2]
    names = {split.name(i) for split in (train, val) for i in range(len(split))}
    assert len(names) == 10


def test_predict_names_the_validation_images(make_tree):
    root = make_tree(TREE)
    names = [name for _, batch in folder(root).predict_dataloader() for name in batch]
    assert names[0] == str(root / "val" / "cat" / "0.jpg")
    assert len(names) == 5


def test_predict_finds_images_at_any_depth_of_a_folder(make_tree):
    root = make_tree(TREE)
    (root / "train" / "cat" / ".hidden.jpg").write_bytes(b"no image")
    data = folder(root, predict_root=str(root / "train"))
    names = [name for _, batch in data.predict_dataloader() for name in batch]
    assert len(names) == 10
    assert all(Path(name).is_file() for name in names)


def test_a_data_set_without_training_images_can_be_evaluated(make_tree):
    data = folder(make_tree({"val": TREE["val"]}))
    data.setup("validate")
    assert data.num_classes == 2


def test_a_missing_data_folder_is_named_with_how_to_get_the_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder '.*nowhere'.*image-net\.org"):
        _ = folder(tmp_path / "nowhere").num_classes


def test_a_missing_validation_folder_is_named_with_the_way_out(make_tree):
    with pytest.raises(FileNotFoundError, match=r"val/ or validation/ or test/.*set val_size"):
        folder(make_tree({"train": TREE["train"]})).setup("fit")


def test_a_folder_without_class_folders_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        _ = folder(tmp_path).num_classes


def test_an_empty_class_is_named(make_tree):
    data = folder(make_tree({**TREE, "train": {"cat": 6, "dog": 0}}))
    with pytest.raises(ValueError, match="class 'dog' is empty"):
        data.setup("fit")


def test_classes_that_differ_between_splits_are_named(make_tree):
    data = folder(make_tree({**TREE, "val": {"cat": 1, "bird": 1}}))
    with pytest.raises(ValueError, match="lacks 'dog'; it also has 'bird'"):
        data.setup("fit")


def test_a_missing_or_empty_folder_to_predict_is_named(make_tree, tmp_path):
    root = make_tree(TREE)
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere' to predict"):
        folder(root, predict_root=str(tmp_path / "nowhere")).predict_dataloader()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images below '.*empty'"):
        folder(root, predict_root=str(tmp_path / "empty")).predict_dataloader()
