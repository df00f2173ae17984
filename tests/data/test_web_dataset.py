"""Shards: made, indexed, checked, read from a folder and over HTTP, dealt to processes."""

import fcntl
import hashlib
import json
import os
import resource
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from design_lightning.data import ImageFolder, WebDataset
from design_lightning.data.batches import TensorBatches
from design_lightning.data.samples import TensorSamples, numbered
from design_lightning.data.shards.index import SampleTable, ShardIndex
from design_lightning.data.shards.making import damaged_files, index_shards, make_shards
from design_lightning.data.shards.sampler import ShardSampler
from design_lightning.data.shards.store import ShardStore, _locked

TREE = {"train": {"cat": 7, "dog": 6}, "val": {"cat": 2, "dog": 3}}


@pytest.fixture
def tree(make_tree) -> Path:
    return make_tree(TREE)


@pytest.fixture
def shards(tree, tmp_path) -> Path:
    """5 training shards of up to 3 images, and 2 validation shards."""
    make_shards(tree, tmp_path / "shards", images=3)
    return tmp_path / "shards"


def data_of(root: Path | str, **options) -> WebDataset:
    return WebDataset(str(root), **{"batch_size": 4, "num_workers": 0, "image_size": 24, **options})


def test_the_images_are_those_of_the_folder(tree, shards) -> None:
    data, folder = data_of(shards), ImageFolder(str(tree))
    assert data.class_names == folder.class_names == ("cat", "dog")
    for split in ("train", "val"):
        there, here = folder.samples(split), data.samples(split)
        expected = {
            Path(there.name(i)).relative_to(tree / split).with_suffix("").as_posix(): (
                there.pixels(i, 3),
                there.labels[i],
            )
            for i in range(len(there))
        }
        assert len(here) == len(expected)
        for i in range(len(here)):
            shard, _, key = here.name(i).partition("/")
            assert (shards / shard).is_file()
            pixels, label = expected.pop(key)
            assert torch.equal(here.pixels(i, 3), pixels)
            assert torch.equal(here.pixels(i, 1), here.pixels(i, 1))
            assert here.labels[i] == label
        assert expected == {}


def test_training_shards_mix_the_classes_and_every_byte_follows_from_the_seed(tree, shards, tmp_path) -> None:
    labels = data_of(shards).samples("train").labels
    assert len(labels[:7].unique()) == 2
    for seed, same in ((0, True), (1, False)):
        out = tmp_path / f"again{seed}"
        make_shards(tree, out, images=3, seed=seed)
        digests = [[hashlib.sha256(p.read_bytes()).digest() for p in sorted(d.glob("train*"))] for d in (shards, out)]
        assert (digests[0] == digests[1]) == same


def test_the_library_webdataset_reads_them(tree, shards) -> None:
    read = webdataset.WebDataset([str(path) for path in sorted(shards.glob("train*.tar"))], shardshuffle=False)
    samples = {sample["__key__"]: sample for sample in read}
    assert len(samples) == 13
    for key, sample in samples.items():
        assert sample["jpg"] == (tree / "train" / f"{key}.jpg").read_bytes()
        assert int(sample["cls"]) == ("cat", "dog").index(key.partition("/")[0])


def test_keys_stay_different_where_names_have_dots(make_tree, tmp_path) -> None:
    root = make_tree({"train": {"cat": 1}})
    image = (root / "train/cat/0.jpg").read_bytes()
    for name in ("a.b.jpg", "a_b.jpg", "a_b.JPEG"):
        (root / "train/cat" / name).write_bytes(image)
    make_shards(root, tmp_path / "out")
    samples = data_of(tmp_path / "out").samples("train")
    keys = {samples.name(i) for i in range(4)}
    assert keys == {f"train-000000.tar/cat/{stem}" for stem in ("0", "a_b", "a_b-2", "a_b-3")}
    assert len(list(webdataset.WebDataset(str(tmp_path / "out/train-000000.tar"), shardshuffle=False))) == 4


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 2), st.randoms())
def test_every_sample_once_an_epoch_and_equally_many_a_process(world, count, size, window, epoch, random) -> None:
    numbers = np.repeat(np.arange(count), [random.randint(1, size) for _ in range(count)])
    total = len(numbers)
    dataset = TensorBatches(TensorSamples(torch.zeros(total, 1, 1, 1), torch.zeros(total), numbered("train", total)))

    def sampler(rank: int) -> ShardSampler:
        sampler = ShardSampler(dataset, world, rank, 7, numbers, window)
        sampler.set_epoch(epoch)
        return sampler

    orders = [[place - epoch * total for place in sampler(rank)] for rank in range(world)]
    assert {len(order) for order in orders} == {-(-total // world)}
    seen = Counter(index for order in orders for index in order)
    assert set(seen) == set(range(total))
    assert sum(seen.values()) - total < world
    assert orders == [[place - epoch * total for place in sampler(rank)] for rank in range(world)]
    resumed = sampler(0)
    resumed.start = len(orders[0]) // 2
    assert [place - epoch * total for place in resumed] == orders[0][len(orders[0]) // 2 :]


def test_a_process_reads_few_shards_at_a_time_and_each_once() -> None:
    numbers = np.repeat(np.arange(40), 25)
    dataset = TensorBatches(TensorSamples(torch.zeros(1000, 1, 1, 1), torch.zeros(1000), numbered("train", 1000)))
    orders = []
    for epoch in range(3):
        for rank in range(2):
            sampler = ShardSampler(dataset, 2, rank, 0, numbers, 4)
            sampler.set_epoch(epoch)
            order = np.array(sampler.order())
            orders.append(order.tolist())
            used = numbers[order]
            assert len(set(used)) == 20, "half of the shards are of this process alone"
            spans = [np.flatnonzero(used == shard) for shard in set(used)]
            assert max(span[-1] - span[0] for span in spans) < 6 * 25
            assert min(len(set(used[i : i + 50])) for i in range(100, 400)) >= 3, "neighbours come of several shards"
    assert len({tuple(order) for order in orders}) == 6


def test_a_start_within_the_epoch_gives_the_rest_of_it(shards) -> None:
    whole = [(images, labels) for images, labels in data_of(shards).train_dataloader()]
    assert len(whole) == 3
    data = data_of(shards)
    data.load_state_dict({"batches": 1, "images": 13, "processes": 1, "batch_size": 4})
    for (images, labels), expected in zip(data.train_dataloader(), whole[1:], strict=True):
        assert torch.equal(images, expected[0])
        assert torch.equal(labels, expected[1])


def test_a_validation_split_can_be_carved_from_the_shards(shards) -> None:
    data = data_of(shards, val_size=4)
    assert (len(data.samples("train")), len(data.samples("val"))) == (9, 4)
    names = [{s.name(i) for i in range(len(s))} for s in (data.samples("train"), data.samples("val"))]
    assert not names[0] & names[1]
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 8


# Making


def test_what_was_stopped_goes_on_with_the_shards_that_are_missing(tree, tmp_path) -> None:
    out, last = tmp_path / "out", tree / "val/dog/2.jpg"
    contents = last.read_bytes()
    last.unlink()
    last.symlink_to(tmp_path / "away.jpg")  # found, and not to be read
    with pytest.raises(FileNotFoundError, match=r"2\.jpg"):
        make_shards(tree, out, images=3)
    made = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(made) == 6
    assert not (out / "index.json").exists()
    with pytest.raises(ValueError, match="has unfinished shards of other images"):
        make_shards(tree, out, images=4)
    (out / "train-000002.tar").unlink()
    last.unlink()
    last.write_bytes(contents)
    steps = []
    make_shards(tree, out, images=3, advance=lambda done, of: steps.append((done, of)))
    assert steps == [(n, 7) for n in range(1, 8)]
    again = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(again) == 7
    assert [name for name in made if made[name] != again[name]] == ["train-000002.tar"]
    assert sorted(path.name for path in out.iterdir() if path.suffix != ".tar") == [
        "index.json",
        "train.npz",
        "val.npz",
    ]
    assert damaged_files(ShardStore(str(out))) == []
    before = (out / "index.json").stat().st_mtime_ns
    assert make_shards(tree, out, images=3).class_names == ("cat", "dog")
    assert (out / "index.json").stat().st_mtime_ns == before, "a finished set is left alone"
    (out / "train-000001.tar").unlink()
    with pytest.raises(
        OSError, match=r"1 of 5 train shards .* train-000001\.tar; copy them again, or remove index\.json"
    ):
        make_shards(tree, out, images=3)
    (tree / "train/cat/new.jpg").write_bytes(contents)
    with pytest.raises(ValueError, match="has shards of other images"):
        make_shards(tree, out, images=3)


@pytest.mark.slow
def test_several_processes_make_the_same(tree, shards, tmp_path) -> None:
    make_shards(tree, tmp_path / "two", images=3, workers=2)
    for path in shards.iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_a_check_names_what_changed(shards) -> None:
    changed = bytearray((shards / "train-000001.tar").read_bytes())
    changed[700] ^= 1
    (shards / "train-000001.tar").write_bytes(changed)
    (shards / "val-000001.tar").unlink()
    assert damaged_files(ShardStore(str(shards))) == ["train-000001.tar", "val-000001.tar"]


def test_shards_of_others_are_indexed_where_they_are(tree, tmp_path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    image = (tree / "train/cat/0.jpg").read_bytes()
    with webdataset.ShardWriter(f"{folder}/part-%02d.tar", maxcount=3, verbose=0) as writer:
        for number in range(8):
            label = {"cls": str(number % 3)} if number % 2 else {"json": {"label": number % 3, "width": 40}}
            writer.write({"__key__": f"s{number}", "jpg": image, "txt": "a caption", **label})
    tars = [str(folder / f"part-{n:02d}.tar") for n in range(3)]
    index_shards({"train": tars}, tmp_path / "index")
    data = data_of(tmp_path / "index", val_size=3)
    assert data.class_names == ("0", "1", "2")
    assert len(data.samples("train")) == 5
    assert sorted([*data.samples("train").labels.tolist(), *data.samples("val").labels.tolist()]) == sorted(
        n % 3 for n in range(8)
    )
    assert (data.samples("val").encoded(0) == np.frombuffer(image, np.uint8)).all()
    index_shards({"train": tars}, tmp_path / "named", ["a", "b", "c"])
    assert data_of(tmp_path / "named").class_names == ("a", "b", "c")
    with pytest.raises(ValueError, match="has label 2, which is none of 2 class names"):
        index_shards({"train": tars}, tmp_path / "few", ["a", "b"])


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({"a.jpg": b"x"}, "'a' has no label"),
        ({"a.cls": b"1"}, "'a' has no image"),
        ({"a.jpg": b"x", "a.cls": b"cat"}, "'a' has no label"),
        ({"a.jpg": b"x", "a.json": b"{"}, "'a' has no label"),
        ({"a.jpg": b"x", "a.json": b'{"label": Infinity}'}, "'a' has no label"),
        ({"a.jpg": b"x", "a.cls": b"9" * 30}, "'a' has no label"),
        ({"readme": b"x"}, "it has none"),
    ],
)
def test_tars_without_labelled_images_are_refused(members, error, tmp_path) -> None:
    import io
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, contents in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(contents)
            tar.addfile(member, io.BytesIO(contents))
    with pytest.raises(ValueError, match=f"x.tar: expected samples of KEY.jpg and KEY.cls, but {error}"):
        index_shards({"train": [str(tmp_path / "x.tar")]}, tmp_path / "out")


def test_a_tar_that_is_cut_is_refused(shards, tmp_path) -> None:
    tar = shards / "train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"train-000000.tar is no whole, uncompressed tar file"):
        index_shards({"train": [str(tar)]}, tmp_path / "out")


def test_an_index_whose_shards_have_changed_since_is_not_taken_for_done(tree, tmp_path) -> None:
    image = (tree / "train/cat/0.jpg").read_bytes()
    tars = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    out = tmp_path / "index"

    def pack(tar: str, count: int) -> None:
        with webdataset.TarWriter(tar) as writer:
            for number in range(count):
                writer.write({"__key__": f"s{number}", "jpg": image, "cls": str(number % 2)})

    pack(tars[0], 2)
    with pytest.raises(FileNotFoundError, match=r"b\.tar"):
        index_shards({"train": tars}, out)
    pack(tars[0], 40)
    pack(tars[1], 3)
    index_shards({"train": tars}, out)
    assert len(data_of(out).samples("train")) == 43
    pack(tars[0], 80)
    with pytest.raises(OSError, match=r"1 of 2 train shards .*a\.tar; copy them again, or remove index\.json"):
        index_shards({"train": tars}, out)


# Damage


def test_missing_and_cut_shards_are_named_at_the_start(shards) -> None:
    (shards / "train-000003.tar").unlink()
    os.truncate(shards / "train-000001.tar", 512)
    with pytest.raises(OSError, match=r"2 of 5 train shards .* train-000001\.tar, train-000003\.tar; copy them again"):
        data_of(shards).samples("train")
    assert len(data_of(shards).samples("val")) == 5


def test_a_shard_that_is_cut_later_is_named_with_the_image(shards) -> None:
    samples = data_of(shards).samples("train")
    os.truncate(shards / "train-000000.tar", 512)
    with pytest.raises(
        OSError, match=r"cannot read the image train-000000\.tar/\w+/\d: its shard ends .* bytes before"
    ):
        samples.pixels(0, 3)


def test_a_damaged_table_is_refused(shards) -> None:
    table = shards / "train.npz"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"train\.npz is damaged: its SHA-256"):
        data_of(shards).samples("train")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("", "Expecting value"),
        ("[]", "is no index of shards"),
        ("{}", "'format' is missing"),
        ('{"format": "other"}', "its format is 'other'"),
        ('{"format": "design-lightning shards", "format_version": 9}', "its format version is 9"),
        ("[" * 100_000, "is no index of shards"),
    ],
)
def test_a_damaged_index_is_refused(text, error, shards) -> None:
    (shards / "index.json").write_text(text)
    with pytest.raises(ValueError, match=error):
        _ = data_of(shards).num_classes


@pytest.mark.parametrize("name", ["../secret", "a/../../b"])
def test_an_index_names_no_file_outside_its_folder(name, shards) -> None:
    stored = json.loads((shards / "index.json").read_text())
    stored["splits"]["train"]["shards"][0]["name"] = name
    with pytest.raises(ValueError, match="leaves the folder of the index"):
        ShardIndex.from_json(json.dumps(stored), "index.json")


def test_a_missing_index_and_a_missing_split_say_the_way_out(shards, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no index\.json in .*design-train shard"):
        _ = data_of(tmp_path / "nothing").num_classes
    stored = json.loads((shards / "index.json").read_text())
    del stored["splits"]["val"]
    (shards / "index.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="no val split, only train; set val_size"):
        data_of(shards).samples("val")


def test_tables_survive_a_round_trip() -> None:
    table = SampleTable.of([(0, 512, 9, 1, "a/ä"), (0, 2048, 3, 0, "b")])
    joined = SampleTable.from_bytes(SampleTable.joined([table, table.rows(np.array([1]))]).to_bytes(), "x.npz")
    assert joined.shard.tolist() == [0, 0, 1]
    assert joined.offset.tolist() == [512, 2048, 2048]
    assert [key.decode() for key in joined.key] == ["a/ä", "b", "b"]
    with pytest.raises(ValueError, match=r"x\.npz is no table of samples"):
        SampleTable.from_bytes(b"PK", "x.npz")


# At a URL


class Server:
    """A real HTTP server over a folder, which counts what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked[self.path.rpartition("/")[2]] += 1
                super().do_GET()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.server.shutdown()


@pytest.mark.own_process
def test_shards_at_a_url_are_copied_once_and_give_the_same_batches(shards, server, tmp_path) -> None:
    local = list(data_of(shards).train_dataloader())
    for workers in (0, 2):
        data = data_of(f"{server.url}/shards", cache=str(tmp_path / "cache"), num_workers=workers)
        for here, there in zip(data.train_dataloader(), local, strict=True):
            assert torch.equal(here[0], there[0])
            assert torch.equal(here[1], there[1])
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 5
    assert server.asked["index.json"] == 2
    assert {name: n for name, n in server.asked.items() if name != "index.json"} == {
        path.name: 1 for path in shards.iterdir() if path.name != "index.json"
    }


def test_the_cache_keeps_to_its_limit(shards, server, tmp_path) -> None:
    sizes = [path.stat().st_size for path in shards.glob("train*.tar")]
    cache = tmp_path / "cache"
    limit = 4.5 * max(sizes) / 1e9
    with pytest.raises(ValueError, match=r"cache_gb=.* is too small: 1 processes of this machine read 8 shards"):
        data_of(f"{server.url}/shards", cache=str(cache), cache_gb=limit).train_dataloader()
    data = data_of(f"{server.url}/shards", cache=str(cache), cache_gb=limit, window=1, val_size=4)
    samples = data.samples("train")
    for epoch in range(2):
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert sum(len(labels) for _, labels in loader) == 8
    for index in range(len(samples)):
        samples.pixels(index, 3)
    kept = sum(path.stat().st_size for path in cache.glob("*.tar"))
    assert 0 < kept <= limit * 1e9


@pytest.mark.own_process
@pytest.mark.slow
def test_a_server_that_goes_away_ends_the_epoch_with_its_name_and_no_image_is_blamed(
    shards, server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("design_lightning.data.shards.store.ATTEMPTS", 1)
    cache = str(tmp_path / "cache")
    sets = [data_of(f"{server.url}/shards", cache=cache, num_workers=n, max_damaged=1.0) for n in (0, 1)]
    loaders = [data.train_dataloader() for data in sets]
    server.server.shutdown()
    server.server.server_close()
    for data, loader in zip(sets, loaders, strict=True):
        with pytest.raises(ConnectionError, match=r"^http://127\.0\.0\.1:\d+/shards/train-\d+\.tar [^\n]*$"):
            list(loader)
        assert data.readers["train"].count == 0


@pytest.mark.parametrize("damage", ["changed", "cut", "missing"])
def test_a_shard_that_is_not_what_the_index_says_is_named(damage, shards, server, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("design_lightning.data.shards.store.time.sleep", lambda seconds: None)
    shard = shards / "train-000000.tar"
    contents = bytearray(shard.read_bytes())
    contents[600] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(contents if damage == "changed" else contents[:-10])
    samples = data_of(f"{server.url}/shards", cache=str(tmp_path / "cache")).samples("train")
    expected = {"changed": "its SHA-256 differs", "cut": "bytes of", "missing": "does not exist"}[damage]
    with pytest.raises(ConnectionError, match=rf"http://127.*/train-000000\.tar .*{expected}"):
        samples.encoded(0)
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert [name.partition("-")[2] for name in left] == ["train.npz"]
    assert server.asked["train-000000.tar"] == (1 if damage == "missing" else 3)


def test_a_copy_that_is_damaged_is_copied_again_or_named(shards, server, tmp_path) -> None:
    def samples():
        return data_of(f"{server.url}/shards", cache=str(tmp_path / "cache")).samples("train")

    samples().fetch(0)
    tar, table = (next((tmp_path / "cache").glob(f"*{name}")) for name in ("train-000000.tar", "train.npz"))
    os.truncate(tar, 512)
    assert (samples().encoded(0) == data_of(shards).samples("train").encoded(0)).all()
    assert server.asked["train-000000.tar"] == 2
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"{table} is damaged: its SHA-256 .* delete it, and it is copied anew"):
        samples()


def test_a_full_disk_under_the_cache_is_named_and_no_image_is_blamed(shards, server, tmp_path) -> None:
    cache = tmp_path / "cache"
    data = data_of(f"{server.url}/shards", cache=str(cache), max_damaged=1.0)
    loader = data.train_dataloader()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            ConnectionError,
            match=rf"^{server.url}/shards/train-\d+\.tar cannot be copied to the cache {cache}: .*too large.*; make",
        ):
            list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert data.readers["train"].count == 0
    assert max(server.asked.values()) <= 2, "ahead of its use and then, and not again at once"
    for path in cache.glob("*.lock"):  # nor is a cache to be written to
        path.unlink()
        path.mkdir()
    with pytest.raises(ConnectionError, match=r"cannot be copied to the cache .*Is a directory"):
        list(data.train_dataloader())
    assert data.readers["train"].count == 0


@pytest.mark.own_process
def test_a_process_that_is_forked_keeps_no_lock(tmp_path) -> None:
    place = tmp_path / ".limit.lock"
    end, start = os.pipe()
    with _locked(place):
        child = os.fork()
        if child == 0:
            os.close(start)
            os.read(end, 1)
            os._exit(0)
    with place.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where it is held
    os.close(start)
    assert os.waitpid(child, 0)[1] == 0


def test_a_url_without_a_server_is_named(tmp_path) -> None:
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/x/index\.json"):
        _ = data_of("http://127.0.0.1:9/x", cache=str(tmp_path)).num_classes
    with pytest.raises(OSError, match=r"ftpx://host/index\.json cannot be read: .*ftpx"):
        _ = data_of("ftpx://host", cache=str(tmp_path)).num_classes
    with pytest.raises(ImportError, match=r"s3://bucket/index\.json cannot be read: .*s3fs"):
        _ = data_of("s3://bucket", cache=str(tmp_path)).num_classes


def test_shards_of_others_are_indexed_over_http(shards, server, tmp_path) -> None:
    urls = [f"{server.url}/shards/train-{n:06d}.tar?signature={'0' * 300}" for n in range(5)]
    index_shards({"train": urls, "val": [str(shards / "val-000000.tar")]}, tmp_path / "index")
    data = data_of(tmp_path / "index", cache=str(tmp_path / "cache"))
    assert torch.equal(data.samples("train").labels, data_of(shards).samples("train").labels)
    assert torch.equal(data.samples("train").pixels(4, 3), data_of(shards).samples("train").pixels(4, 3))
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1, "the local shard is read where it is"


@pytest.mark.parametrize(
    ("options", "error"),
    [({"window": 0}, "window=0"), ({"cache_gb": 0}, "cache_gb=0"), ({"cache_gb": float("nan")}, "cache_gb=nan")],
)
def test_wrong_options_are_refused(options, error) -> None:
    with pytest.raises(ValueError, match=error):
        data_of("x", **options)
