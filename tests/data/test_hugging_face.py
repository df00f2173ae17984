import sys

import numpy as np
import pytest
import torch
from PIL import Image

from design_lightning.data import HuggingFace

hf = pytest.importorskip("datasets")
NAMES = ["cat", "dog"]


def table(count: int, labels=None, image: str = "image", label: str = "label", feature=None):
    rng = np.random.default_rng(count)
    images = [Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)) for _ in range(count)]
    labels = [index % 2 for index in range(count)] if labels is None else labels
    features = hf.Features(
        {image: hf.Image(), label: hf.ClassLabel(names=NAMES) if feature is None else hf.Value(feature)}
    )
    return hf.Dataset.from_dict({image: images, label: labels}, features=features)


@pytest.fixture
def save(tmp_path):
    def save_splits(**tables) -> str:
        hf.DatasetDict(tables).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save_splits


def data(dataset: str, **options) -> HuggingFace:
    return HuggingFace(dataset, **{"batch_size": 4, "num_workers": 0, "image_size": 16, **options})


def test_a_saved_data_set_is_read(save):
    module = data(save(train=table(10), validation=table(6), test=table(2)))
    module.prepare_data()
    module.setup()
    assert module.class_names == ("cat", "dog")
    assert [len(module.samples(split)) for split in ("train", "val", "test")] == [10, 6, 2]
    images, labels = next(iter(module.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert labels.dtype == torch.int64
    assert torch.cat([labels for _, labels in module.val_dataloader()]).tolist() == [0, 1, 0, 1, 0, 1]


def test_workers_read_it_too(save):
    module = data(save(train=table(10), test=table(6)), num_workers=1)
    assert sum(len(images) for images, _ in module.val_dataloader()) == 6


def test_one_held_out_split_validates_and_tests(save):
    module = data(save(train=table(10), test=table(6)))
    assert len(module.samples("val")) == len(module.samples("test")) == 6


def test_predictions_are_named_by_split_and_row(save):
    module = data(save(train=table(10), validation=table(5)))
    assert [name for _, batch in module.predict_dataloader() for name in batch] == [f"val/{i:06d}" for i in range(5)]
    carved = data(module.dataset, val_size=4)
    rows = [int(name.removeprefix("train/")) for _, batch in carved.predict_dataloader() for name in batch]
    assert carved.samples("val").labels.tolist() == [row % 2 for row in rows]


def test_a_single_table_is_the_training_split(tmp_path):
    table(10).save_to_disk(tmp_path / "one")
    module = data(str(tmp_path / "one"), val_size=4)
    module.setup("fit")
    assert len(module.samples("train")) == 6


def test_a_folder_of_parquet_files_is_read(tmp_path):
    for split, count in (("train", 8), ("test", 4)):
        table(count).to_parquet(str(tmp_path / "tables" / f"{split}-0.parquet"))
    module = data(str(tmp_path / "tables"), cache_dir=str(tmp_path / "cache"))
    module.setup("fit")
    assert module.class_names == ("cat", "dog")
    assert module.samples("train").image(0).size == (24, 20)


def test_a_folder_of_images_is_read(tmp_path, make_tree):
    root = make_tree({"train": {"cat": 3, "dog": 3}, "validation": {"cat": 1, "dog": 1}})
    module = data(str(root), cache_dir=str(tmp_path / "cache"))
    assert module.class_names == ("cat", "dog")
    assert module.samples("val").labels.tolist() == [0, 1]


def test_columns_may_have_the_usual_names_or_be_named(save):
    module = data(save(train=table(6, image="img", label="fine_label"), test=table(4, image="img", label="fine_label")))
    assert module.num_classes == 2
    module.setup("fit")
    odd = data(
        save(train=table(6, image="x", label="y"), test=table(4, image="x", label="y")),
        image_column="x",
        label_column="y",
    )
    odd.setup("fit")
    assert len(odd.samples("train")) == 6


def test_strings_become_sorted_classes(save):
    names = ["owl", "bat", "owl", "bat"]
    module = data(save(train=table(4, names, feature="string"), test=table(2, ["bat", "owl"], feature="string")))
    assert module.class_names == ("bat", "owl")
    assert module.samples("train").labels.tolist() == [1, 0, 1, 0]


def test_numbers_become_classes_named_by_number(save):
    module = data(save(train=table(4, [2, 0, 1, 2], feature="int64"), test=table(2, [0, 1], feature="int64")))
    assert module.class_names == ("0", "1", "2")


def test_images_may_be_arrays_of_bytes(save):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 9, 9), dtype=np.uint8)
    features = hf.Features({"image": hf.Array2D((9, 9), "uint8"), "label": hf.ClassLabel(names=NAMES)})
    arrays = hf.Dataset.from_dict({"image": pixels, "label": [0, 1, 0, 1]}, features=features)
    module = data(save(train=arrays, test=arrays))
    assert np.array_equal(np.asarray(module.samples("train").image(1)), pixels[1])
    assert next(iter(module.val_dataloader()))[0].shape == (4, 3, 16, 16)


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "design-lightning\[data\]"'):
        HuggingFace("anything")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        _ = data(str(tmp_path / "nowhere")).num_classes


def test_a_missing_split_is_named_with_those_there_are(save):
    with pytest.raises(ValueError, match=r"no split 'validation' or .*, only 'train'; .*val_split; set val_size"):
        data(save(train=table(4))).setup("fit")
    with pytest.raises(ValueError, match="no split 'held_out', only 'train'"):
        data(save(train=table(4)), test_split="held_out").setup("test")


def test_a_missing_column_is_named_with_those_there_are(save):
    path = save(train=table(4, image="x", label="y"), test=table(4, image="x", label="y"))
    with pytest.raises(ValueError, match=r"no column label or .*, only x, y; name it with label_column"):
        _ = data(path).num_classes
    with pytest.raises(ValueError, match=r"image_column='imgae' is no column of .*: known are x, y"):
        data(path, label_column="y", image_column="imgae").setup("fit")


def test_hidden_and_unknown_labels_are_named(save):
    hidden = save(train=table(4), test=table(3, [-1, -1, -1]))
    with pytest.raises(ValueError, match=r"3 labels of the test split are not in 0\.\.1, for example -1"):
        data(hidden).setup("test")
    unknown = save(train=table(2, ["a", "b"], feature="string"), test=table(2, ["a", "c"], feature="string"))
    with pytest.raises(ValueError, match=r"the val split of .* has labels that training lacks: 'c'"):
        data(unknown).setup("fit")
