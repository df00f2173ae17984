import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from design_lightning.data import CIFAR10, CIFAR100
from design_lightning.data.batches import TensorBatches
from design_lightning.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES
from design_lightning.data.image_folder import ImageFolder


def write_batch(path: Path, first: int, count: int, label_key: str, classes: int) -> None:
    """Images whose pixels are all their own number, in the format of the archive: rows of 3072 bytes, channel after channel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(first, first + count)
    data = np.repeat(numbers[:, None], 3072, axis=1).astype(np.uint8)
    data[:, :1024] = 255
    path.write_bytes(pickle.dumps({"data": data, label_key: [int(n) % classes for n in numbers]}, protocol=2))


@pytest.fixture
def cifar10(tmp_path):
    for batch in range(5):
        write_batch(tmp_path / "cifar-10-batches-py" / f"data_batch_{batch + 1}", 20 * batch, 20, "labels", 10)
    write_batch(tmp_path / "cifar-10-batches-py" / "test_batch", 0, 30, "labels", 10)
    return CIFAR10(str(tmp_path), batch_size=10, num_workers=0)


def test_the_pickles_of_cifar10_are_read_in_order(cifar10):
    train = cifar10.samples("train")
    assert train.images.shape == (100, 3, 32, 32)
    assert train.images[57, :, 3, 4].tolist() == [255, 57, 57], "channels first, red first"
    assert train.labels.tolist() == [number % 10 for number in range(100)]
    assert train.image(57).getpixel((4, 3)) == (255, 57, 57)


def test_without_a_validation_size_the_test_images_validate(cifar10):
    assert cifar10.samples("val") is cifar10.samples("test")
    assert len(cifar10.samples("val")) == 30
    images, labels = next(iter(cifar10.val_dataloader()))
    assert images[7, :, 0, 0].tolist() == [255, 7, 7]
    expected = (torch.tensor([255.0, 7.0, 7.0]) / 255 - torch.tensor(cifar10.mean)) / torch.tensor(cifar10.std)
    torch.testing.assert_close(cifar10.normalize(images)[7, :, 0, 0], expected)
    assert labels.tolist() == list(range(10))


def test_with_one_validation_is_carved_from_training_and_the_test_images_stay_apart(cifar10):
    cifar10.val_size = 20
    assert len(cifar10.samples("train")) == 80
    assert torch.bincount(cifar10.samples("val").labels).tolist() == [2] * 10
    assert cifar10.samples("val").name(0).startswith("train/")
    assert len(cifar10.samples("test")) == 30


def test_predictions_are_named_by_number(cifar10):
    names = [name for _, batch in cifar10.predict_dataloader() for name in batch]
    assert names == [f"test/{index:06d}" for index in range(30)]


def test_cifar100_reads_the_fine_labels(tmp_path):
    write_batch(tmp_path / "cifar-100-python" / "train", 0, 200, "fine_labels", 100)
    write_batch(tmp_path / "cifar-100-python" / "test", 0, 50, "fine_labels", 100)
    data = CIFAR100(str(tmp_path), num_workers=0)
    data.setup()
    assert data.num_classes == len(set(data.class_names)) == 100
    assert int(data.samples("train").labels.max()) == 99


@pytest.mark.parametrize(("data_set", "classes"), [(CIFAR10, CIFAR10_CLASSES), (CIFAR100, CIFAR100_CLASSES)])
def test_class_folders_are_decoded_into_memory(make_tree, data_set, classes):
    tree = {"train": dict.fromkeys(classes, 2), "val": dict.fromkeys(classes, 1)}
    root = make_tree(tree, size=(32, 32))
    data = data_set(str(root), num_workers=0, batch_size=4)
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.dataset.batches, TensorBatches)
    assert next(iter(loader))[0].shape == (4, 3, 32, 32)
    assert data.samples("val").name(0) == str(root / "val" / classes[0] / "0.jpg")
    files = ImageFolder(str(root)).samples("val")
    assert torch.equal(data.samples("val").labels, files.labels)
    assert np.array_equal(np.asarray(data.samples("val").image(3)), np.asarray(files.image(3)))


def test_class_folders_may_have_a_test_split_too(make_tree):
    sizes = {"train": 2, "val": 1, "test": 3}
    root = make_tree({split: dict.fromkeys(CIFAR10_CLASSES, count) for split, count in sizes.items()}, size=(32, 32))
    data = CIFAR10(str(root))
    assert [len(data.samples(split)) for split in sizes] == [20, 10, 30]


def test_missing_files_are_named_with_the_way_to_get_them(tmp_path):
    data = CIFAR10(str(tmp_path / "nowhere"))
    assert data.class_names == CIFAR10_CLASSES
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"no CIFAR10 in '.*nowhere'.*cifar-10-batches-py/.*download=True"):
        data.setup("fit")


def test_a_download_is_torchvisions(tmp_path, monkeypatch, cifar10):
    calls = []
    fetch = staticmethod(lambda root, download: calls.append((root, download)))
    monkeypatch.setattr(CIFAR10, "torchvision_class", fetch)
    CIFAR10(cifar10.root, download=True).prepare_data()
    assert calls == [], "what is there is not fetched again"
    CIFAR10(str(tmp_path / "nowhere"), download=True).prepare_data()
    assert calls == [(str(tmp_path / "nowhere"), True)]


def test_a_missing_batch_is_named(cifar10):
    path = Path(cifar10.root) / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_3' is missing"):
        cifar10.setup("fit")


def test_a_pickle_that_could_run_code_is_refused(cifar10):
    path = Path(cifar10.root) / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({"data": print}))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print"):
        cifar10.setup("test")


def test_a_pickle_of_python_2_is_read(cifar10):
    """What the archive holds: strings of bytes, arrays whose content is such a string."""
    path = Path(cifar10.root) / "cifar-10-batches-py" / "test_batch"
    data = bytes(range(256)) * 12
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T\x00\x0c\x00\x00" + data + b"tbU\x06labels](K\x07eu."
    )
    path.write_bytes(content)
    test = cifar10.samples("test")
    assert test.images.flatten().tolist() == list(data)
    assert test.labels.tolist() == [7]


def test_folders_of_other_classes_and_images_of_other_sizes_are_sent_to_image_folder(make_tree):
    with pytest.raises(ValueError, match=r"differ from the 10 classes: it lacks 'airplane'.*; it also has 'plane'"):
        CIFAR10(str(make_tree({"train": {"plane": 1}}))).setup("fit")
    large = make_tree({"train": dict.fromkeys(CIFAR10_CLASSES, 1)}, size=(40, 32), name="large")
    with pytest.raises(ValueError, match=r"0\.jpg is 40x32, where this data set has 32x32: use ImageFolder"):
        CIFAR10(str(large)).setup("fit")


def test_labels_out_of_range_are_counted(cifar10):
    write_batch(Path(cifar10.root) / "cifar-10-batches-py" / "test_batch", 0, 30, "labels", 12)
    with pytest.raises(ValueError, match=r"4 labels of the test split are not in 0\.\.9, for example 1[01]"):
        cifar10.setup("test")


def test_a_class_without_a_training_image_is_named(cifar10):
    for batch in range(5):
        write_batch(Path(cifar10.root) / "cifar-10-batches-py" / f"data_batch_{batch + 1}", 0, 9, "labels", 9)
    with pytest.raises(ValueError, match="no training image of class 'truck'"):
        cifar10.setup("fit")
