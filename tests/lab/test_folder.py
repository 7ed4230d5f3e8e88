"""Folders of pictures: found, split, decoded as they should be, and what is wrong with those that cannot be used."""

import dataclasses
import itertools
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from convkit.lab import DataError, augment, data, folder

STEPS = augment.parse("crop:224 flip")


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A few coloured blocks, enough to tell one from another."""
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)


def fill(place, counts: dict[str, int], suffixes=(".png", ".jpg", ".JPEG")) -> None:
    """A sub-folder for each class with that many pictures, the same wherever `place` lies."""
    number = itertools.count(zlib.crc32(place.name.encode()))
    for name, count in counts.items():
        (place / name).mkdir(parents=True)
        for i in range(count):
            picture(next(number)).save(place / name / f"{i:02}{suffixes[i % len(suffixes)]}")


def read_with(split: data.Split, workers: int) -> data.Split:
    return data.Split(dataclasses.replace(split.images, workers=workers), split.labels)


@pytest.fixture
def pets(tmp_path):
    fill(tmp_path / "pets", {"dog": 24, "cat": 20})
    (tmp_path / "pets" / ".hidden").mkdir()
    (tmp_path / "pets" / "notes.txt").write_text("no class")
    (tmp_path / "pets" / "cat" / "Thumbs.db").write_text("no picture")
    (tmp_path / "pets" / "cat" / "._00.png").write_text("no picture either")
    return tmp_path / "pets"


def names(split: data.Split) -> set[str]:
    return set(split.images.names)


def test_a_folder_of_classes_is_split(pets):
    found = data.load(f"folder:{pets}")
    assert found.classes == ("cat", "dog") and found.shape == (3, 224, 224) and str(pets) in found.summary()
    assert found.test.labels.bincount().tolist() == [4, 5]
    assert found.val.labels.bincount().tolist() == [2, 3]
    assert found.train.labels.bincount().tolist() == [14, 16]
    together = [names(split) for split in (found.train, found.val, found.test)]
    assert sum(map(len, together)) == len(set.union(*together)) == 44
    for name, label in zip(found.train.images.names, found.train.labels.tolist(), strict=True):
        assert name.startswith(found.classes[label])
    again = data.load(f"folder:{pets}")
    fingerprint = found.fingerprint()
    assert again.fingerprint() == fingerprint and names(again.val) == names(found.val)
    picture(0, 400, 99).save(pets / next(iter(names(found.val))))
    assert again.fingerprint() != fingerprint


def test_splits_that_a_folder_has_are_kept(tmp_path):
    fill(tmp_path / "train", {"a": 10, "b": 10})
    fill(tmp_path / "validation", {"a": 3, "b": 1})
    found = data.load(f"folder:{tmp_path}")
    assert [len(split) for split in (found.train, found.val, found.test)] == [16, 4, 4]
    assert all(name.startswith("validation") for name in names(found.val))
    fill(tmp_path / "test", {"a": 1, "b": 1})
    found = data.load(f"folder:{tmp_path}")
    assert [len(split) for split in (found.train, found.val, found.test)] == [20, 4, 2]


def test_pictures_in_sub_folders_of_a_class_belong_to_it(tmp_path):
    fill(tmp_path, {"a/first": 2, "a/second": 2, "b": 4})
    found = data.load(f"folder:{tmp_path}")
    assert found.classes == ("a", "b") and len(found.train) + len(found.val) + len(found.test) == 8


# ------------------------------------------------------------------------------------------------------------- batches


def test_without_augmentation_the_middle_is_seen(pets):
    split = read_with(data.load(f"folder:{pets}").train, workers=0)
    images, labels = next(split.batches(5))
    assert images.shape == (5, 3, 224, 224) and images.dtype == torch.float32 and images.is_contiguous()
    assert torch.equal(labels, split.labels[:5])
    for i in range(5):
        with Image.open(pets / split.images.names[i]) as image:
            scaled = image.convert("RGB").resize((341, 256), Image.Resampling.BILINEAR)
        expected = np.asarray(scaled)[16:240, 58:282].transpose(2, 0, 1) / 255
        # To a fraction of a pixel, as 40 x 30 is not 341 x 256; around what JPEG leaves of edges, to a level.
        difference = np.abs(images[i].numpy() - expected)
        level = 0 if split.images.names[i].endswith(".png") else 1 / 255
        assert np.median(difference) < level + 1e-6 and difference.mean() < 0.005


def test_augmentation_sees_256_and_crops_reach_all_of_it(tmp_path):
    places = np.stack([*np.indices((256, 256)), np.zeros((256, 256))], 2).astype(np.uint8)  # red: row, green: column
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(4):
            Image.fromarray(places).save(tmp_path / name / f"{i}.png")
    split = read_with(data.load(f"folder:{tmp_path}").train, workers=0)
    index = torch.zeros(64, dtype=torch.int64)
    images, _ = next(split.batches(64, index, augment=augment.parse("crop:224"), seed=3))
    corners = (images[:, :2, 0, 0] * 255).round().long()
    whole = torch.from_numpy(places).permute(2, 0, 1)
    for image, (row, column) in zip(images, corners.tolist(), strict=True):
        assert torch.equal((image * 255).round().byte(), whole[:, row : row + 224, column : column + 224])
    assert corners.min() < 3 and corners.max() > 29  # of 0 to 32
    middle, _ = next(split.batches(2, augment=augment.parse("flip"), seed=0))
    assert ((middle[:, 0, 0] * 255).round() == 16).all()
    smaller, _ = next(split.batches(2, index[:2], augment=augment.parse("crop:100"), seed=0))
    assert smaller.shape == (2, 3, 100, 100)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_size_and_start_change_nothing(pets, workers):
    train = data.load(f"folder:{pets}").train
    order = data.epoch_order(len(train), 0, 1)
    reference = list(read_with(train, 0).batches(30, order, augment=STEPS, seed=(0, 1)))
    state = torch.get_rng_state()
    split = read_with(train, workers)
    for size, start in ((30, 0), (7, 2), (4, 7)):
        batches = list(split.batches(size, order, augment=STEPS, seed=(0, 1), start=start))
        images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        assert torch.equal(images, reference[0][0][size * start :])
        assert torch.equal(labels, train.labels[order][size * start :])
    parts = [next(split.batches(30, order, augment=STEPS, seed=(0, 1), shard=(rank, 2)))[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), reference[0][0])
    assert torch.equal(torch.get_rng_state(), state)  # a resumed run draws the same numbers elsewhere


def test_moments_of_a_folder(pets):
    found = data.load(f"folder:{pets}")
    pixels = torch.cat([images for images, _ in found.train.batches(50)]).double()
    torch.testing.assert_close(torch.tensor(found.mean, dtype=torch.float64), pixels.mean((0, 2, 3)))
    torch.testing.assert_close(torch.tensor(found.std, dtype=torch.float64), pixels.std((0, 2, 3), correction=0))


# ------------------------------------------------------------------------------------------------------------ decoding


def test_decoding_scales_the_shorter_side(tmp_path):
    for size in ((512, 256), (256, 700), (1024, 768)):
        image = Image.new("RGB", size, (10, 200, 30))
        middle = (size[0] // 2 - 2, size[1] // 2 - 2, size[0] // 2 + 2, size[1] // 2 + 2)
        image.paste((250, 0, 0), middle)
        image.save(tmp_path / "x.png")
        decoded = folder.decode(tmp_path / "x.png").float()
        assert decoded.shape == (3, 256, 256)
        scale = 256 / min(size)
        red = decoded[0] - 10
        assert red.sum().item() / 240 == pytest.approx((4 * scale) ** 2, rel=0.05)
        rows, columns = torch.arange(256.0), torch.arange(256.0)
        assert (red.sum(1) @ rows / red.sum()).item() == pytest.approx(127.5, abs=0.6)
        assert (red.sum(0) @ columns / red.sum()).item() == pytest.approx(127.5, abs=0.6)


def test_a_large_jpeg_is_decoded_small(tmp_path):
    picture(1, 2048, 1536).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image.crop((256, 0, 1792, 1536)).resize((256, 256), Image.Resampling.BOX))
    difference = np.abs(folder.decode(tmp_path / "x.jpg").permute(1, 2, 0).numpy().astype(float) - expected)
    assert difference.mean() < 2


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_modes_become_rgb(tmp_path, mode):
    level = 160
    if mode == "I;16":
        image = Image.fromarray(np.full((300, 300), level * 257, np.uint16))
    else:
        image = Image.new("RGB", (300, 300), (level,) * 3).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(path)
    decoded = folder.decode(path).float()
    expected = level if mode != "1" else image.convert("L").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert decoded.mean().item() == pytest.approx(expected, abs=3)
    assert mode == "P" or (decoded[0] == decoded[1]).all()  # a palette has been dithered


def test_a_turned_photograph_is_put_upright(tmp_path):
    image = Image.new("RGB", (256, 256))
    image.paste((255, 255, 255), (0, 0, 256, 128))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by 90° for looking at it: white on the right
    image.save(tmp_path / "x.jpg", exif=exif)
    decoded = folder.decode(tmp_path / "x.jpg").float()
    assert decoded[:, :, 140:].mean() > 240 and decoded[:, :, :116].mean() < 15


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"<html>not found</html>",
        lambda raw: raw[:40] + bytes(50) + raw[90:],
    ],
)
def test_a_damaged_picture_is_named(pets, damage, workers):
    split = read_with(data.load(f"folder:{pets}").train, workers)
    for name in [next(n for n in split.images.names if n.endswith(suffix)) for suffix in (".png", ".jpg")]:
        whole = (pets / name).read_bytes()
        (pets / name).write_bytes(damage(whole))
        if damage(whole)[:40] == whole[:40] and len(damage(whole)) == len(whole) and name.endswith("jpg"):
            (pets / name).write_bytes(b"\xff\xd8" + whole[200:])
        with pytest.raises(DataError, match=f"{pets / name}: not a whole JPEG or PNG picture .*; replace or") as error:
            list(split.batches(50))
        assert "\n" not in str(error.value)
        (pets / name).write_bytes(whole)


def test_a_picture_that_went_away(pets):
    split = read_with(data.load(f"folder:{pets}").train, workers=0)
    (pets / split.images.names[3]).unlink()
    with pytest.raises(DataError, match=f"{pets / split.images.names[3]}: no longer there"):
        list(split.batches(50))


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=f"folder:{tmp_path / 'x'}: no such folder"):
        data.load(f"folder:{tmp_path / 'x'}")


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({}, "{0} has 0 sub-folders; expected one a class, two at least"),
        ({"a": 5}, "{0} has 1 sub-folders; expected one a class"),
        ({"a": 5, "b": 0}, "{0}/b: 0 JPEG or PNG files, 3 needed; add some, or delete the folder"),
        ({"a": 5, "b": 2}, "{0}/b: 2 JPEG or PNG files, 3 needed"),
        ({"train/a": 5, "train/b": 1}, "{0}/train/b: 1 JPEG or PNG files, 3 needed"),
        ({"train/a": 5, "train/b": 5, "test/a": 1}, "train and test differ in the classes b"),
        ({"train/a": 5, "train/b": 5, "val/a": 1, "val/b": 0}, "{0}/val/b: 0 JPEG or PNG files, 1 needed"),
        ({"train/a": 5, "train/b": 5, "val/a": 1, "valid/a": 1}, "val, valid mean the same; keep one"),
        ({"train": 5}, "{0}/train has 0 sub-folders"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, places, message):
    fill(tmp_path, places)
    with pytest.raises(DataError, match=message.format(tmp_path)):
        data.load(f"folder:{tmp_path}")
