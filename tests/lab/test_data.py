"""Data: real digits, stratified disjoint splits, shuffles and augmented batches that can be had again."""

import itertools

import numpy as np
import pytest
import torch

from convkit.lab import DataError, augment, data

STEPS = augment.parse("pad_crop:3 flip affine:0.1,0.1,20 jitter:0.3,0.3,0.3")


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
    again = data.load("digits5k")
    assert torch.equal(again.train.images, digits5k.train.images) and torch.equal(
        again.test.labels, digits5k.test.labels
    )


def test_take_is_stratified_and_never_more_than_there_is(digits5k):
    few = digits5k.take(200, 60, 10**6)
    assert few.train.labels.bincount().tolist() == [20] * 10
    assert few.val.labels.bincount().tolist() == [6] * 10
    assert len(few.test) == 1000
    assert rows(few.train) <= rows(digits5k.train)


def test_a_smaller_validation_share_is_within_a_larger_one(digits5k):
    small = data.load("digits5k", validation=0.05)
    assert (len(small.train), len(small.val)) == (3800, 200)
    assert rows(small.val) < rows(digits5k.val) and rows(digits5k.train) < rows(small.train)
    assert torch.equal(small.test.images, digits5k.test.images)


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


def augmented(split, size, order, seed=(0, 1), **options):
    return list(split.batches(size, order, augment=STEPS, seed=seed, **options))


def test_augmented_batches_start_anywhere_and_have_any_size(few):
    order = data.epoch_order(200, seed=5, epoch=2)
    state = torch.get_rng_state()
    whole = augmented(few.train, 64, order)
    assert torch.equal(torch.get_rng_state(), state)
    pictures, labels = (torch.cat(part) for part in zip(*whole, strict=True))
    assert torch.equal(labels, few.train.labels[order])
    assert not torch.equal(pictures, torch.cat([images for images, _ in few.train.batches(64, order)]))
    for size in (1, 7, 64, 500):
        assert torch.equal(torch.cat([images for images, _ in augmented(few.train, size, order)]), pictures)
    for start in range(6):  # there are four batches
        later = augmented(few.train, 64, order, start=start)
        assert len(later) == max(4 - start, 0)
        for again, batch in zip(later, whole[start:], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(again, batch, strict=True))


def test_the_parts_of_several_processes_are_the_batches_of_one(few):
    order = data.epoch_order(200, seed=5, epoch=2)
    whole = augmented(few.train, 33, order, start=1)
    for processes in (1, 2, 5, 8):
        ranks = [augmented(few.train, 33, order, start=1, shard=(rank, processes)) for rank in range(processes)]
        for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
            together = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(batch, together, strict=True))
            assert max(len(p[1]) for p in parts) - min(len(p[1]) for p in parts) <= 1


def test_seeds_make_different_pictures(few):
    order = torch.arange(50)
    seeds = [0, 1, (0, 1), (1, 0), (0, 0, 1), 2**43 - 1]
    seen = [augmented(few.train, 50, order, seed=seed)[0][0] for seed in seeds]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert torch.equal(augmented(few.train, 50, order, seed=[0, 1])[0][0], seen[2])
    with pytest.raises(ValueError, match="augment needs a seed"):
        next(few.train.batches(10, augment=STEPS))


def test_crops_are_smaller_than_the_stored_pictures(few):
    images, _ = next(few.train.batches(10, augment=augment.parse("crop:20"), seed=0))
    assert images.shape == (10, 1, 20, 20)


def test_moments_against_float64():
    images = torch.randint(0, 256, (1234, 3, 5, 4), dtype=torch.uint8)
    images[:, 1] //= 3
    split = data.Split(images, torch.zeros(1234, dtype=torch.int64))
    found = data.Data("x", split, split, split, ("a",), "here")
    expected = images.double().numpy() / 255
    np.testing.assert_allclose(found.mean, expected.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, expected.std((0, 2, 3)), rtol=1e-12)


def test_fingerprint_is_of_what_training_sees(digits5k):
    first = digits5k.fingerprint()
    assert first == data.load("digits5k").fingerprint() and len(first) == 16
    assert first != digits5k.take(200, 600, 1000).fingerprint()
    assert first != digits5k.take(3400, 60, 1000).fingerprint()
    assert first == digits5k.take(3400, 600, 10).fingerprint()
    other = digits5k.train.labels.clone()
    other[7] = (other[7] + 1) % 10
    relabelled = data.Split(digits5k.train.images, other)
    assert first != data.dataclasses.replace(digits5k, train=relabelled).fingerprint()


def test_the_whole_set_moves_to_a_device(few):
    moved = few.to("meta")
    assert moved.train.images.device.type == moved.test.labels.device.type == "meta"
    assert moved.shape == (1, 28, 28) and moved.describe() == few.describe()


def test_the_default_is_digits5k(tmp_path, monkeypatch):
    assert data.load().name == "digits5k"
    monkeypatch.setenv("CONVKIT_DATA", str(tmp_path))
    assert data.load().name == "digits5k"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar", r"data 'cifar': no such set; did you mean cifar10\? \(known: digits5k, mnist, .*, folder:PATH\)"),
        ("imagenet", r"data 'imagenet': no such set; \(known: digits5k"),
        ("", r"data '': no such set"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(DataError, match=message):
        data.load(name)


def test_a_data_folder_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("CONVKIT_DATA", "/there/is/no/such/folder")
    for name in (None, "mnist", "cifar10"):
        with pytest.raises(DataError, match="CONVKIT_DATA=/there/is/no/such/folder: no such folder; make it"):
            data.load(name)
