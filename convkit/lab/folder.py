"""Folders of JPEG and PNG files, a sub-folder a class, read and decoded by worker processes while they are used.

Either the folder's sub-folders are the classes, or they are ``train`` and, if there are, ``val`` (or ``valid``,
``validation``) and ``test``, and the classes are in these. A class's own sub-folders belong to it.

Every picture is scaled so that its shorter side has 256 pixels, and the middle 256x256 of it are kept (Krizhevsky,
Sutskever and Hinton, NIPS 2012, section 2). Augmentation sees these; what is larger than 224x224 after it, or without
it, is cut to the middle 224x224. So ``crop:224`` in training and nothing in evaluation is that paper's scheme.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from convkit.lab import DataError, require

__all__ = ["CROP", "RESIZE", "Pictures", "read"]

RESIZE, CROP = 256, 224
EXTENSIONS = (".jpg", ".jpeg", ".png")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
WORKERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
CHUNK = 16  # pictures that a worker decodes at a time: 3 MB, of which each has two on the way


@dataclasses.dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures in files, with as much of the interface of a uint8 tensor (N, 3, 224, 224) as a Split needs."""

    root: Path
    names: tuple[str, ...]
    """Paths below ``root``."""
    device: torch.device = torch.device("cpu")
    """Where decoded pictures go."""
    workers: int = WORKERS
    """Processes that decode; 0: this one does."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self.names), 3, CROP, CROP

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device | str) -> Pictures:
        return dataclasses.replace(self, device=torch.device(device))

    def __getitem__(self, index: Tensor | slice) -> Pictures:
        return dataclasses.replace(self, names=tuple(self.names[i] for i in self._places(index)))

    def _places(self, index: Tensor | slice) -> Sequence[int]:
        return range(len(self))[index] if isinstance(index, slice) else index.tolist()

    def read(self, parts: Sequence[Tensor | slice]) -> Iterator[Tensor]:
        """The pictures of each part in turn, uint8 (B, 3, 256, 256).

        DataError naming the file if one cannot be decoded.
        """
        require("PIL")
        parts = [self._places(part) for part in parts]
        places = [place for part in parts for place in part]
        loader = DataLoader(
            _Decoder(self),
            batch_size=CHUNK,
            sampler=places,
            num_workers=min(self.workers, len(places) // CHUNK),
            pin_memory=self.device.type == "cuda",
            collate_fn=_collate,
            worker_init_fn=_ignore_ctrl_c,
            generator=torch.Generator(),  # else it draws from the global one, and a resumed run would not be the same
        )
        waiting = torch.empty(0, 3, RESIZE, RESIZE, dtype=torch.uint8, device=self.device)
        chunks = iter(loader)
        try:
            for part in parts:
                pieces, count = [waiting], len(waiting)
                while count < len(part):
                    chunk = next(chunks)
                    if isinstance(chunk, str):
                        raise DataError(chunk)
                    pieces.append(chunk.to(self.device, non_blocking=True))
                    count += len(chunk)
                together = torch.cat(pieces)
                waiting = together[len(part) :]
                yield together[: len(part)]
        finally:
            del chunks  # stops the workers; with a traceback that keeps it, they would wait for the garbage collector

    def identity(self) -> bytes:
        """Names and sizes of the files, for a fingerprint."""
        return "\n".join(f"{name} {(self.root / name).stat().st_size}" for name in self.names).encode()


class _Decoder:
    """What a DataLoader asks for pictures. Errors are returned as text: those raised in a worker come out wrapped."""

    def __init__(self, pictures: Pictures):
        self.pictures = pictures

    def __getitem__(self, place: int) -> Tensor | str:
        try:
            return decode(self.pictures.root / self.pictures.names[place])
        except DataError as error:
            return str(error)


def _ignore_ctrl_c(_: int) -> None:
    """A terminal sends the signal to the workers too; this process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(items: list[Tensor | str]) -> Tensor | str:
    errors = [item for item in items if isinstance(item, str)]
    return errors[0] if errors else torch.stack(items)


def decode(path: Path) -> Tensor:
    """The picture in ``path``, scaled to a shorter side of 256 pixels, its middle alone: uint8 (3, 256, 256), RGB."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.draft("RGB", (RESIZE, RESIZE))  # a large JPEG is decoded at a half, quarter or eighth of its size
            image = ImageOps.exif_transpose(image)  # as cameras mean it to be looked at
            if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion cuts off above 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.fit(image.convert("RGB"), (RESIZE, RESIZE), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except FileNotFoundError:
        raise DataError(f"{path}: no longer there; it was when the folder was listed") from None
    except Exception as error:  # Pillow raises many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: not a whole JPEG or PNG picture ({reason}); replace or delete it") from error


def read(root: Path) -> tuple[dict[str, tuple[Pictures, list[int]]], tuple[str, ...]]:
    """({split: (pictures, labels)}, classes) of a folder; the splits are train and those of val and test that it has.

    Classes are numbered in the order of their names. DataError if it is no such folder.
    """
    if not root.is_dir():
        raise DataError(f"folder:{root}: no such folder")
    names = _subfolders(root)
    if "train" in names and set(names) <= set(SPLITS):
        parts = {SPLITS[name]: root / name for name in names}
        if len(parts) < len(names):
            raise DataError(
                f"folder:{root}: {', '.join(n for n in names if SPLITS[n] == 'val')} mean the same; keep one"
            )
    else:
        parts = {"train": root}
    classes = _subfolders(parts["train"])
    if len(classes) < 2:
        raise DataError(
            f"folder:{root}: {parts['train']} has {len(classes)} sub-folders; expected one a class, two at least"
        )
    found = {}
    least = 4 - len(parts)  # so that every split gets one of each class
    for split, place in parts.items():
        if split != "train" and _subfolders(place) != classes:
            different = set(classes) ^ set(_subfolders(place))
            raise DataError(
                f"folder:{root}: train and {place.name} differ in the classes {', '.join(sorted(different))}"
            )
        names, labels = [], []
        for label, name in enumerate(classes):
            files = _files(place / name)
            needed = least if split == "train" else 1
            if len(files) < needed:
                raise DataError(
                    f"{place / name}: {len(files)} JPEG or PNG files, {needed} needed; add some, or delete the folder"
                )
            names += [os.path.relpath(file, root) for file in files]
            labels += [label] * len(files)
        found[split] = Pictures(root, tuple(names)), labels
    return found, tuple(classes)


def _subfolders(place: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))


def _files(place: Path) -> list[str]:
    """All pictures below a folder, without hidden files, in the order of their paths."""
    return sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(place, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )
