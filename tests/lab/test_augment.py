"""Augmentation: every step against its geometry, its distribution, and bad input."""

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch

from convkit.lab import LabError, augment

EXAMPLES = [
    "pad_crop:3",
    "pad_crop:3,reflect",
    "crop:5",
    "flip",
    "rotate90",
    "affine:0.2,0.3,40",
    "affine:0.2,0.3,40,reflect",
    "cutout:4",
    "jitter:0.4,0.5,0.6",
    "jitter:0.4,0.5,0.6,0.2",
]


def change(spec: str, images: torch.Tensor, *numbers: float) -> torch.Tensor:
    """The step's result when every picture draws ``numbers``."""
    return augment.parse([spec]).apply(images, torch.tensor([numbers]).expand(len(images), -1))


def marked(height: int, width: int) -> torch.Tensor:
    """A batch of one black picture for each pixel, which is white in it."""
    return torch.eye(height * width).view(-1, 1, height, width)


def draw(spec: str, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return augment.parse([spec])(images, torch.Generator().manual_seed(seed))


def assert_equally_likely(counts: torch.Tensor) -> None:
    """Within five standard deviations of a binomial distribution, for draws that are the same in every run."""
    total, share = counts.sum().item(), 1 / counts.numel()
    assert (counts - total * share).abs().max() < 5 * math.sqrt(total * share * (1 - share))


# ------------------------------------------------------------------------------------------------------------ geometry


@pytest.mark.parametrize("border", ["", ",reflect"])
def test_pad_crop_is_the_window_at_the_drawn_place(border):
    images = torch.rand(3, 2, 5, 7)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect" if border else "constant")
    for down in range(5):
        for right in range(5):
            moved = change(f"pad_crop:2{border}", images, (down + 0.5) / 5, (right + 0.5) / 5)
            assert np.array_equal(moved, padded[:, :, down : down + 5, right : right + 7])
    centre = change(f"pad_crop:2{border}", images, 0.5, 0.5)
    assert torch.equal(centre, images)


def test_pad_crop_places_are_equally_likely():
    images = torch.zeros(20_000, 1, 5, 5)
    images[:, 0, 2, 2] = 1  # seen wherever it goes
    places = draw("pad_crop:2", images).flatten(1).argmax(1)
    assert_equally_likely(places.bincount(minlength=25))


def test_crop_is_the_window_at_the_drawn_place():
    images = torch.rand(3, 2, 6, 8)
    for down in range(3):
        for right in range(5):
            cut = change("crop:4", images, (down + 0.5) / 3, (right + 0.5) / 5)
            assert torch.equal(cut, images[:, :, down : down + 4, right : right + 4])
    corner = torch.zeros(20_000, 1, 5, 5)
    corner[:, 0] = torch.arange(25).view(5, 5)
    assert_equally_likely(draw("crop:3", corner)[:, 0, 0, 0].long().bincount()[[0, 1, 2, 5, 6, 7, 10, 11, 12]])
    with pytest.raises(LabError, match="crop:9: larger than the pictures, which have 6x8 pixels"):
        change("crop:9", images, 0, 0)


def test_a_number_just_below_one_is_the_last_place():
    images = torch.arange(300.0).expand(1, 1, 300, 300)
    almost_one = torch.tensor(1.0).nextafter(torch.tensor(0.0)).item()
    for size in range(1, 301):
        assert change(f"crop:{size}", images, almost_one, almost_one)[0, 0, 0, -1] == 299
        assert change(f"crop:{size}", images, 0.0, 0.0)[0, 0, 0, 0] == 0


def test_flip_is_a_mirror_image_or_nothing():
    images = torch.rand(4, 3, 5, 6)
    assert torch.equal(change("flip", images, 0.49), images.flip(3))
    assert torch.equal(change("flip", images, 0.5), images)
    many = torch.tensor([0.0, 1.0]).expand(10_000, 1, 1, 2)
    assert_equally_likely(draw("flip", many)[:, 0, 0, 0].long().bincount())


def test_rotate90_is_exact():
    images = torch.rand(4, 3, 6, 6)
    for turns in range(4):
        assert torch.equal(change("rotate90", images, (turns + 0.5) / 4), images.rot90(turns, (2, 3)))
    each = augment.rotate90(images, torch.arange(4))
    assert all(torch.equal(each[turns], images[turns].rot90(turns, (1, 2))) for turns in range(4))
    corner = marked(2, 2)[:1].expand(10_000, -1, -1, -1)
    assert_equally_likely(draw("rotate90", corner).flatten(1).argmax(1).bincount())
    with pytest.raises(LabError, match="need square pictures, got 5x6 pixels"):
        change("rotate90", torch.rand(1, 1, 5, 6), 0.5)


def test_affine_without_strength_is_the_identity():
    images = torch.rand(2, 3, 9, 14)
    torch.testing.assert_close(draw("affine:0,0,0", images), images, rtol=0, atol=2e-6)
    torch.testing.assert_close(change("affine:0,0,0,reflect", images, *[0.5] * 5), images, rtol=0, atol=2e-6)
    mirrored = change("affine:0,0,0,reflect", images, 0.5, 0.5, 0.5, 0.5, 0.4)
    torch.testing.assert_close(mirrored, images.flip(3), rtol=0, atol=2e-6)


def test_affine_moves_a_pixel_to_the_right_and_up():
    images = marked(8, 12)
    moved = change("affine:0.25,0,0", images, 1.0, 1.0, 0.5, 0.5)  # by 3 columns and 2 rows
    expected = torch.zeros_like(images)
    expected[:, :, :-2, 3:] = images[:, :, 2:, :-3]
    torch.testing.assert_close(moved, expected, rtol=0, atol=5e-6)


def test_affine_turns_counter_clockwise():
    images = torch.rand(2, 3, 8, 8)
    turned = change("affine:0,0,90", images, 0.5, 0.5, 0.5, 1.0)
    torch.testing.assert_close(turned, images.rot90(1, (2, 3)), rtol=0, atol=5e-6)


def test_affine_enlarges_about_the_centre():
    image = torch.zeros(1, 1, 12, 12)
    image[:, :, 4:8, 4:8] = 1
    larger = change("affine:0,0.5,0", image, 0.5, 0.5, 1.0, 0.5)
    assert larger.sum().item() == pytest.approx(6 * 6, abs=1e-3)
    smaller = change("affine:0,0.5,0", image, 0.5, 0.5, 0.0, 0.5)
    assert smaller[0, 0, 5:7, 5:7].min() == pytest.approx(1) and smaller[0, 0, :5].max() == pytest.approx(0)


def affine_by_hand(image: np.ndarray, right: float, up: float, scale: float, angle: float, mirror: bool) -> np.ndarray:
    """Mirrored, scaled, turned and shifted (in pixels, radians), in float64, pixel by pixel."""
    height, width = image.shape
    result = np.zeros_like(image)
    for row, column in np.ndindex(height, width):
        x, y = column - (width - 1) / 2 - right, (height - 1) / 2 - row - up  # y upwards, from the centre
        x, y = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
        x, y = (-x if mirror else x) / scale, y / scale
        x, y = x + (width - 1) / 2, (height - 1) / 2 - y
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < height and 0 <= j < width:
                    result[row, column] += image[i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return result


@pytest.mark.parametrize("size", [(9, 9), (7, 12), (10, 5)])
def test_affine_against_float64(size):
    numbers = torch.rand(6, 5)
    images = torch.rand(6, 1, *size)
    got = augment.parse(["affine:0.2,0.4,50,reflect"]).apply(images, numbers)
    for i in range(6):
        right, up, zoom, turn = (2 * numbers[i, :4].double() - 1).tolist()
        expected = affine_by_hand(
            images[i, 0].double().numpy(),
            right=0.2 * size[1] * right,
            up=0.2 * size[0] * up,
            scale=1 + 0.4 * zoom,
            angle=math.radians(50 * turn),
            mirror=numbers[i, 4].item() < 0.5,
        )
        np.testing.assert_allclose(got[i, 0].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_cutout_fills_a_square_with_the_mean_colour(size):
    height, width = 8, 10
    images = torch.rand(height * width, 3, height, width) * 0.5
    rows, columns = torch.arange(height * width) // width, torch.arange(height * width) % width
    numbers = torch.stack([(rows + 0.5) / height, (columns + 0.5) / width], 1)
    cut = augment.parse([f"cutout:{size}"]).apply(images, numbers)
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        top, left = row - size // 2, column - size // 2
        expected = images[i].clone()
        expected[:, max(top, 0) : top + size, max(left, 0) : left + size] = images[i].mean((1, 2)).view(3, 1, 1)
        torch.testing.assert_close(cut[i], expected)
    inside = (cut != images).any(1).sum((1, 2)).max().item()
    assert inside == min(size, height) * min(size, width)


# -------------------------------------------------------------------------------------------------------------- colour


def test_jitter_stays_in_range_and_depends_on_its_strengths():
    images = torch.rand(500, 3, 6, 6)
    changed = draw("jitter:1,1,1", images)
    assert changed.min() >= 0 and changed.max() <= 1 and not torch.equal(changed, images)
    torch.testing.assert_close(draw("jitter:0,0,0", images), images, rtol=0, atol=0)


def test_jitter_brightness():
    images = torch.rand(4, 3, 6, 6)
    torch.testing.assert_close(change("jitter:0.5,0,0", images, 1.0, 0.5, 0.5), (images * 1.5).clamp(max=1))
    torch.testing.assert_close(change("jitter:0.5,0,0", images, 0.0, 0.5, 0.5), images * 0.5)
    factors = draw("jitter:0.4,0,0", torch.full((5000, 1, 1, 1), 0.5)).flatten() / 0.5
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.02


def test_jitter_contrast_and_saturation():
    images = torch.rand(4, 3, 6, 6)
    grey = (0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]).unsqueeze(1)
    flat = change("jitter:0,1,0", images, 0.5, 0.0, 0.5)
    torch.testing.assert_close(flat, grey.mean((1, 2, 3)).view(4, 1, 1, 1).expand_as(images))
    stronger = change("jitter:0,1,0", images, 0.5, 0.75, 0.5)
    mean = grey.mean((1, 2, 3)).view(4, 1, 1, 1)
    torch.testing.assert_close(stronger, (mean + 1.5 * (images - mean)).clamp(0, 1))
    torch.testing.assert_close(change("jitter:0,0,1", images, 0.5, 0.5, 0.0), grey.expand_as(images))
    one_channel = torch.rand(4, 1, 6, 6)
    torch.testing.assert_close(change("jitter:0,0,1", one_channel, 0.5, 0.5, 0.9), one_channel)


def test_jitter_hue_turns_the_colour_circle():
    images = torch.rand(4, 3, 6, 6)
    images[0, :, 0, 0] = 0.3  # grey has no hue
    images[1, :, 0, 0] = torch.tensor([1.0, 0, 0])
    images[2, :, 0, 0] = torch.tensor([0.5, 0.5, 0])
    turned = change("jitter:0,0,0,0.5", images, 0.5, 0.5, 0.5, 0.8)  # by 0.3 of the circle
    for i, y, x in itertools.product(range(4), range(6), range(6)):
        hue, saturation, value = colorsys.rgb_to_hsv(*images[i, :, y, x].tolist())
        expected = colorsys.hsv_to_rgb((hue + 0.3) % 1, saturation, value)
        torch.testing.assert_close(turned[i, :, y, x], torch.tensor(expected), rtol=0, atol=1e-5)
    grey = torch.rand(4, 1, 6, 6)
    assert torch.equal(draw("jitter:0,0,0,0.5", grey), grey)


# ----------------------------------------------------------------------------------------------- all steps, and parsing


@pytest.mark.parametrize("spec", [*EXAMPLES, " ".join(EXAMPLES)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_depends_on_its_own_numbers_alone(spec, channels):
    steps = augment.parse(spec)
    images, numbers = torch.rand(33, channels, 8, 8), torch.rand(33, steps.draws)
    together = steps.apply(images, numbers)
    assert together.min() >= 0 and together.max() <= 1 + 1e-6 and together.dtype == torch.float32
    for i in range(33):
        assert torch.equal(steps.apply(images[i : i + 1], numbers[i : i + 1])[0], together[i])
    assert torch.equal(steps.apply(images[5:23].contiguous(), numbers[5:23]), together[5:23])
    assert steps.apply(images[:0], numbers[:0]).shape == (0, *together.shape[1:])


@pytest.mark.parametrize("spec", EXAMPLES)
def test_the_generator_decides(spec):
    images = torch.rand(20, 3, 8, 8)
    before, state = images.clone(), torch.get_rng_state()
    first = draw(spec, images, seed=3)
    assert torch.equal(first, draw(spec, images, seed=3)) and not torch.equal(first, draw(spec, images, seed=4))
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


def test_steps_follow_each_other():
    images = torch.rand(10, 3, 8, 8)
    both = augment.parse("flip crop:5")
    assert both == augment.parse(["flip", "crop:5"]) != augment.parse(["crop:5", "flip"])
    assert both.specs == ("flip", "crop:5") and both.draws == 3
    numbers = torch.rand(10, 3)
    one_by_one = augment.parse("crop:5").apply(augment.parse("flip").apply(images, numbers[:, :1]), numbers[:, 1:])
    assert torch.equal(both.apply(images, numbers), one_by_one)
    assert torch.equal(augment.parse([])(images, torch.Generator()), images)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "flop",
            r"augment 'flop': no such step; did you mean flip\? \(known: pad_crop:PIXELS\[,reflect\], crop:SIZE, ",
        ),
        ("nonsense", r"augment 'nonsense': no such step; \(known: pad_crop"),
        ("", r"augment '': no such step; \(known: "),
        ("flip:1", "got 1 values where it takes 0; it is written flip"),
        ("pad_crop", r"got 0 values where it takes 1 to 2; it is written pad_crop:PIXELS\[,reflect\]"),
        ("pad_crop:", "pixels must be a whole number, got ''"),
        ("pad_crop:4.5", "pixels must be a whole number, got '4.5'"),
        ("pad_crop:0", "pixels must be at least 1, got 0"),
        ("pad_crop:4,mirror", "border must be zeros or reflect, got 'mirror'"),
        ("crop:-1", "size must be at least 1, got -1"),
        ("cutout:0", "size must be at least 1, got 0"),
        ("affine:0.1,0.1", "got 2 values where it takes 3 to 4"),
        ("affine:0.1,1,0", "scale must be from 0 to 0.95, got 1"),
        ("affine:nan,0,0", "shift must be from 0 to 1, got nan"),
        ("affine:0,0,181", "degrees must be from 0 to 180, got 181"),
        ("affine:0,0,0,flip", "the fourth value can only be reflect, got 'flip'"),
        ("jitter:1.5,0,0", "brightness must be from 0 to 1, got 1.5"),
        ("jitter:a,0,0", "brightness must be a number, got 'a'"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(LabError, match=message):
        augment.parse(["flip", spec])


def test_mirrored_padding_needs_enough_pixels():
    with pytest.raises(
        LabError, match="pad_crop:4,reflect: pictures of 4x6 have too few pixels to mirror; use at most 3"
    ):
        change("pad_crop:4,reflect", torch.rand(1, 1, 4, 6), 0.5, 0.5)
