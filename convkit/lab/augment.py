"""Augmentation: batches of pictures changed at random, on the device where they are.

``parse(["pad_crop:4", "flip"])`` makes an :class:`Augment`. It maps pictures, float32 (B, C, H, W) in [0, 1], to
pictures in [0, 1]; :data:`FORMS` lists what it can be made of. Each step takes a fixed number of uniform random numbers
a picture, and what becomes of a picture depends on the picture and its own random numbers alone: not on the other
pictures of the batch, on its size or on the device.

Angles are in degrees, counter-clockwise as seen; shifts are parts of height and width.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convkit.lab import LabError

__all__ = ["FORMS", "Augment", "Step", "parse", "rotate90"]


@dataclasses.dataclass(frozen=True)
class Step:
    """One kind of change."""

    draws: int
    """Random numbers that it takes a picture."""
    apply: Callable[[Tensor, Tensor], Tensor]
    """apply(pictures (B, C, H, W), random numbers (B, draws) in [0, 1)) -> pictures."""


@dataclasses.dataclass(frozen=True)
class Augment:
    """Steps one after another. Equal to another one if the text forms are."""

    specs: tuple[str, ...]
    steps: tuple[Step, ...] = dataclasses.field(compare=False, repr=False)

    @property
    def draws(self) -> int:
        """Random numbers that all steps together take a picture."""
        return sum(step.draws for step in self.steps)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changes a batch (B, C, H, W) with random numbers from ``generator``, which may be on another device."""
        numbers = torch.rand(len(images), self.draws, generator=generator, device=generator.device)
        return self.apply(images, numbers)

    def apply(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Changes a batch (B, C, H, W) with given random numbers, float32 (B, draws) in [0, 1), a row a picture."""
        numbers = numbers.to(images.device)
        for step, mine in zip(self.steps, numbers.split([step.draws for step in self.steps], dim=1), strict=True):
            images = step.apply(images, mine)
        return images


_BUILDERS: dict[str, Callable[..., Step]] = {}
FORMS: dict[str, str] = {}
"""Of each step by name, how it is written."""


def _form(form: str):
    def enter(builder: Callable[..., Step]) -> Callable[..., Step]:
        name = form.split(":")[0].split("[")[0]
        _BUILDERS[name], FORMS[name] = builder, form
        return builder

    return enter


def parse(specs: str | Sequence[str]) -> Augment:
    """The augmentation that ``specs`` write down, such as ``["pad_crop:4", "flip"]`` or ``"pad_crop:4 flip"``.

    LabError naming the spec, what is wrong with it and what is known.
    """
    specs = tuple(specs.split() if isinstance(specs, str) else specs)
    return Augment(specs, tuple(_parse_step(spec) for spec in specs))


def _parse_step(spec: str) -> Step:
    name, colon, rest = spec.partition(":")
    if name not in _BUILDERS:
        near = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f"did you mean {FORMS[near[0]]}? " if near else ""
        raise LabError(f"augment {spec!r}: no such step; {hint}(known: {', '.join(FORMS.values())})")
    builder = _BUILDERS[name]
    try:
        return builder(*_convert(builder, rest.split(",") if colon else []))
    except ValueError as error:
        raise LabError(f"augment {spec!r}: {error}; it is written {FORMS[name]}") from None


def _convert(builder: Callable[..., Step], texts: list[str]) -> list[int | float | str]:
    """The arguments in the types that the builder is annotated with."""
    parameters = list(inspect.signature(builder, eval_str=True).parameters.values())
    least = sum(p.default is p.empty for p in parameters)
    if not least <= len(texts) <= len(parameters):
        wanted = f"{least}" if least == len(parameters) else f"{least} to {len(parameters)}"
        raise ValueError(f"got {len(texts)} values where it takes {wanted}")
    values = []
    for parameter, text in zip(parameters, texts, strict=False):
        try:
            values.append(parameter.annotation(text.strip()))
        except ValueError:
            kind = "a whole number" if parameter.annotation is int else "a number"
            raise ValueError(f"{parameter.name} must be {kind}, got {text!r}") from None
    return values


def _check(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # also false for NaN
        accepted = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise ValueError(f"{name} must be {accepted}, got {value:g}")


# ------------------------------------------------------------------------------------------------------------ geometry


@_form("pad_crop:PIXELS[,reflect]")
def _pad_crop(pixels: int, border: str = "zeros") -> Step:
    """Black pixels (or mirrored ones) on all sides, then a crop of the old size at a random place."""
    _check("pixels", pixels, 1, math.inf)
    if border not in ("zeros", "reflect"):
        raise ValueError(f"border must be zeros or reflect, got {border!r}")
    mode = "constant" if border == "zeros" else "reflect"

    def apply(images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if mode == "reflect" and pixels >= min(height, width):
            raise LabError(
                f"augment pad_crop:{pixels},reflect: pictures of {height}x{width} have too few pixels to mirror; "
                f"use at most {min(height, width) - 1}, or zeros"
            )
        return _crop_at_random(F.pad(images, (pixels,) * 4, mode=mode), height, width, numbers)

    return Step(2, apply)


@_form("crop:SIZE")
def _crop(size: int) -> Step:
    """A square of SIZE pixels at a random place, without padding."""
    _check("size", size, 1, math.inf)

    def apply(images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if size > min(height, width):
            raise LabError(f"augment crop:{size}: larger than the pictures, which have {height}x{width} pixels")
        return _crop_at_random(images, size, size, numbers)

    return Step(2, apply)


def _crop_at_random(images: Tensor, height: int, width: int, numbers: Tensor) -> Tensor:
    windows = images.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, rows, columns, height, width)
    row = _whole(numbers[:, 0], windows.shape[2])
    column = _whole(numbers[:, 1], windows.shape[3])
    return windows[torch.arange(len(images), device=images.device), :, row, column]


def _whole(numbers: Tensor, count: int) -> Tensor:
    """Whole numbers 0…count-1, equally likely, from numbers in [0, 1)."""
    return (numbers * count).long()  # the largest float32 below 1, times count, rounds to below count


@_form("flip")
def _flip() -> Step:
    """Left and right exchanged in half of the pictures."""
    return Step(1, lambda images, numbers: _where(numbers[:, 0] < 0.5, images.flip(3), images))


def _where(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(condition.view(-1, 1, 1, 1), yes, no)


@_form("rotate90")
def _rotate90() -> Step:
    """A quarter turn none to three times."""
    return Step(1, lambda images, numbers: rotate90(images, _whole(numbers[:, 0], 4)))


def rotate90(images: Tensor, turns: Tensor) -> Tensor:
    """Turns each of (B, C, S, S) counter-clockwise by 90° times its number in ``turns`` (int64 (B,), 0…3), exactly."""
    if images.shape[2] != images.shape[3]:
        raise LabError(f"rotations by 90° need square pictures, got {images.shape[2]}x{images.shape[3]} pixels")
    once, twice = turns % 2 == 1, turns >= 2
    images = _where(twice, images.flip(2, 3), images)
    return _where(once, images.rot90(1, (2, 3)), images)


@_form("affine:SHIFT,SCALE,DEGREES[,reflect]")
def _affine(shift: float, scale: float, degrees: float, reflect: str = "") -> Step:
    """Shifted by up to ± SHIFT of the size, scaled by 1 ± SCALE, rotated by up to ± DEGREES, half of them mirrored.

    Bilinear; black where there was no picture.
    """
    _check("shift", shift, 0, 1)
    _check("scale", scale, 0, 0.95)
    _check("degrees", degrees, 0, 180)
    if reflect not in ("", "reflect"):
        raise ValueError(f"the fourth value can only be reflect, got {reflect!r}")

    def apply(images: Tensor, numbers: Tensor) -> Tensor:
        height, width = images.shape[2:]
        right, up, zoom, turn = (2 * numbers[:, :4, None, None] - 1).unbind(1)
        # Where each pixel of the result comes from. Coordinates are those of grid_sample: x to the right, y downwards,
        # -1 to 1 from edge to edge, so that a turn also stretches unless the picture is square.
        x = _centres(width, images).view(1, 1, width) - 2 * shift * right
        y = _centres(height, images).view(1, height, 1) + 2 * shift * up
        angle, factor = turn * math.radians(degrees), 1 / (1 + scale * zoom)
        cosine, sine = angle.cos() * factor, angle.sin() * factor
        from_x = cosine * x - sine * (height / width) * y
        from_y = sine * (width / height) * x + cosine * y
        if reflect:
            from_x = torch.where(numbers[:, 4, None, None] < 0.5, -from_x, from_x)
        grid = torch.stack([from_x, from_y], 3)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    return Step(5 if reflect else 4, apply)


def _centres(size: int, like: Tensor) -> Tensor:
    """Of ``size`` pixels between -1 and 1."""
    return (2 * torch.arange(size, dtype=like.dtype, device=like.device) + 1) / size - 1


@_form("cutout:SIZE")
def _cutout(size: int) -> Step:
    """A square of SIZE pixels around a random pixel, cut off at the edges, filled with the picture's mean colour.

    DeVries and Taylor, arXiv:1708.04552; there the mean colour is that of the data set.
    """
    _check("size", size, 1, math.inf)

    def apply(images: Tensor, numbers: Tensor) -> Tensor:
        inside = []
        for dimension in (2, 3):
            length = images.shape[dimension]
            first = _whole(numbers[:, dimension - 2], length).unsqueeze(1) - size // 2
            place = torch.arange(length, device=images.device)
            inside.append((place >= first) & (place < first + size))
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(square, images.mean((2, 3), keepdim=True), images)

    return Step(2, apply)


# -------------------------------------------------------------------------------------------------------------- colour


@_form("jitter:BRIGHTNESS,CONTRAST,SATURATION[,HUE]")
def _jitter(brightness: float, contrast: float, saturation: float, hue: float = 0) -> Step:
    """Three factors, each drawn from 1 ± its value, and a turn of ± HUE, one after another, values cut off at 0 and 1.

    Brightness multiplies all values; contrast, their distance from the picture's mean grey; saturation, that from the
    pixel's own grey. Grey is 0.299 R + 0.587 G + 0.114 B. HUE is a part of the colour circle, up to 0.5. The last two
    change nothing in pictures of one channel.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
    for name, strength in strengths.items():
        _check(name, strength, 0, 1)
    _check("hue", hue, 0, 0.5)

    def apply(images: Tensor, numbers: Tensor) -> Tensor:
        symmetric = 2 * numbers - 1
        factors = 1 + symmetric[:, :3] * numbers.new_tensor(list(strengths.values()))
        bright, contrasting, colourful = factors.view(-1, 3, 1, 1, 1).unbind(1)
        images = (images * bright).clamp(0, 1)
        images = torch.lerp(_grey(images).mean((2, 3), keepdim=True), images, contrasting).clamp(0, 1)
        images = torch.lerp(_grey(images), images, colourful).clamp(0, 1)
        return _turn_hue(images, hue * symmetric[:, 3]) if hue and images.shape[1] == 3 else images

    return Step(4 if hue else 3, apply)


def _turn_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Moves every pixel of (B, 3, H, W) along the colour circle of HSV by the ``turns`` (B,) of its picture.

    Smith, "Color Gamut Transform Pairs", 1978; back from hue h in 0…6 each channel is V - C · min(k, 4 - k) cut off at
    0 and 1, with k = n + h modulo 6 and n = 5, 3, 1 for R, G, B.
    """
    value, first = images.max(1)
    chroma = value - images.amin(1)
    red, green, blue = images.unbind(1)
    differences = torch.stack([green - blue, blue - red, red - green], 1).gather(1, first.unsqueeze(1)).squeeze(1)
    hue = differences / torch.where(chroma > 0, chroma, 1.0) + 2 * first + 6 * turns.view(-1, 1, 1)
    k = (hue.unsqueeze(1) + hue.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, C, H, W)."""
    if images.shape[1] != 3:
        return images.mean(1, keepdim=True)
    weights = images.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)
