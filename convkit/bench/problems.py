"""One description of a problem for tests, benches, plans and error reports, its text form, and the tests' table.

The text form of a convolution is a letter and a number for each size, then dtype and layout::

    n32c64h56w56k128r3s3u1p1d1g1_bf16_nhwc

n images, c channels in, h and w input height and width, k channels out, r and s filter height and width, u stride,
p zero padding, d dilation, g groups. u and d may be a pair (``u2x1``: height, width), p a pair or one number a side
(``p0x1x0x1``: top, bottom, left, right). u, p, d, g, the dtype and the layout may be left out: ``u1p0d1g1_f32_nchw``.
A max pool is ``n8c64h112w112r3s3u2p1d1_f32_nhwc``, with ``+ceil`` at the end in PyTorch's ceil_mode.
A batch norm + ReLU is ``n8c64h56w56_f32_nhwc``, with ``+res`` at the end where a residual is added before the ReLU.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Self

import torch

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}

_EXAMPLE = "n32c64h56w56k128r3s3u1p1d1g1_bf16_nhwc"
_BATCH_NORM_EXAMPLE = "n8c64h56w56_f32_nhwc+res"


class _Reader:
    """Walks over the text form; every complaint says which part is wrong, where it stands and what is accepted."""

    def __init__(self, text: str, example: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"a problem is a string like {example}, but got {type(text).__name__}")
        self.text, self.example, self.at = text, example, 0

    def fail(self, why: str) -> ValueError:
        return ValueError(
            f"problem '{self.text}', character {self.at + 1}: {why} (a problem reads like {self.example})"
        )

    def numbers(self, letter: str, what: str, lengths: tuple[int, ...], default: int | None = None) -> tuple[int, ...]:
        """The numbers after `letter`, as many as one of `lengths`; `default` where the letter was left out."""
        if not self.text.startswith(letter, self.at):
            if default is not None:
                return (default,)
            raise self.fail(f"expected '{letter}' ({what}) and a number, but got '{self.text[self.at :] or 'the end'}'")
        found = re.compile(r"[0-9]+(?:x[0-9]+)*").match(self.text, self.at + 1)
        if found is None:
            got = self.text[self.at + 1 :] or "the end"
            raise self.fail(f"expected a number after '{letter}' ({what}), but got '{got}'")
        values = tuple(int(value) for value in found[0].split("x"))
        if len(values) not in lengths:
            accepted = " or ".join(str(length) for length in lengths)
            raise self.fail(f"'{letter}' ({what}) takes {accepted} numbers, but got {len(values)}: '{found[0]}'")
        self.at = found.end()
        return values

    def word(self, what: str, accepted: dict[str, object], default: str) -> str:
        """`_` and a word out of `accepted`, or `default` at the end of the text."""
        if self.at == len(self.text) or self.text[self.at] != "_":
            return default
        found = re.compile(r"_([^_+]*)").match(self.text, self.at)
        if found[1] not in accepted:
            raise self.fail(f"{what} '{found[1]}' is not known; accepted: {', '.join(accepted)}")
        self.at = found.end()
        return found[1]

    def flag(self, text: str) -> bool:
        if found := self.text.startswith(text, self.at):
            self.at += len(text)
        return found

    def end(self) -> None:
        if self.at != len(self.text):
            raise self.fail(f"'{self.text[self.at :]}' is left over: a part twice, unknown or out of order")


def _joined(letter: str, values: tuple[int, ...]) -> str:
    return letter + (str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values)))


def _check_names(dtype: str, layout: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype '{dtype}' is not known; accepted: {', '.join(DTYPES)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout '{layout}' is not known; accepted: {', '.join(LAYOUTS)}")


def _random(
    shape: tuple[int, ...], dtype: str, layout: str, generator: torch.Generator | None, device: str
) -> torch.Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    return values.to(device=device, dtype=DTYPES[dtype]).to(memory_format=LAYOUTS[layout])


class _Problem:
    """What every problem offers beside its sizes; a frozen dataclass with these two and more."""

    dtype: str
    layout: str

    def replace(self, **changes: object) -> Self:
        """The same problem with other values for some fields."""
        return dataclasses.replace(self, **changes)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def memory_format(self) -> torch.memory_format:
        return LAYOUTS[self.layout]


@dataclass(frozen=True)
class ConvProblem(_Problem):
    """A convolution x (n, c, h, w) * weight (k, c / groups, r, s) -> y (n, k, P, Q), immutable and hashable.

    stride and dilation are (height, width), padding is (top, bottom, left, right). `str()` gives the text form and
    `parse` reads it. ValueError where the sizes don't make a convolution: it names the part.
    """

    n: int
    c: int
    h: int
    w: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    dtype: str = "f32"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        sizes = {name: (getattr(self, name),) for name in ("n", "c", "h", "w", "k", "r", "s")}
        sizes |= {"u (stride)": self.stride, "d (dilation)": self.dilation, "g (groups)": (self.groups,)}
        for name, values in sizes.items():
            if min(values) < 1:
                raise ValueError(f"{name} must be at least 1, but got {'x'.join(map(str, values))}")
        if min(self.padding) < 0:
            raise ValueError(f"p (padding) must not be negative, but got {'x'.join(map(str, self.padding))}")
        for name in ("c", "k"):
            if getattr(self, name) % self.groups:
                raise ValueError(f"{name}={getattr(self, name)} is not divisible by g={self.groups} (groups)")
        _check_names(self.dtype, self.layout)
        for name, size in zip("hw", self.output_size, strict=True):
            if size < 1:
                sizes = f"padded input {self._padded}, filter {self._extent} with its dilation"
                raise ValueError(f"the filter is larger than the padded input along {name}: {sizes}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text form. ValueError names the part that is wrong and what is accepted there."""
        reader = _Reader(text, _EXAMPLE)
        names = {
            "n": "images",
            "c": "channels in",
            "h": "height",
            "w": "width",
            "k": "channels out",
            "r": "filter height",
            "s": "filter width",
        }
        sizes = [reader.numbers(letter, what, (1,))[0] for letter, what in names.items()]
        stride = reader.numbers("u", "stride", (1, 2), 1)
        padding = reader.numbers("p", "padding", (1, 2, 4), 0)
        dilation = reader.numbers("d", "dilation", (1, 2), 1)
        (groups,) = reader.numbers("g", "groups", (1,), 1)
        dtype, layout = reader.word("dtype", DTYPES, "f32"), reader.word("layout", LAYOUTS, "nchw")
        reader.end()
        if len(padding) < 4:
            padding = (padding[0], padding[0], padding[-1], padding[-1])
        try:
            return cls(*sizes, (stride[0], stride[-1]), padding, (dilation[0], dilation[-1]), groups, dtype, layout)
        except ValueError as error:
            raise ValueError(f"problem '{text}': {error}") from None

    def __str__(self) -> str:
        top, bottom, left, right = self.padding
        padding = (top, left) if top == bottom and left == right else self.padding
        sizes = "".join(f"{name}{getattr(self, name)}" for name in ("n", "c", "h", "w", "k", "r", "s"))
        options = _joined("u", self.stride) + _joined("p", padding) + _joined("d", self.dilation)
        return f"{sizes}{options}g{self.groups}_{self.dtype}_{self.layout}"

    @property
    def _padded(self) -> tuple[int, int]:
        return self.h + self.padding[0] + self.padding[1], self.w + self.padding[2] + self.padding[3]

    @property
    def _extent(self) -> tuple[int, int]:
        return self.dilation[0] * (self.r - 1) + 1, self.dilation[1] * (self.s - 1) + 1

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q): height and width of the output."""
        return tuple((a - b) // u + 1 for a, b, u in zip(self._padded, self._extent, self.stride, strict=True))

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.k, self.c // self.groups, self.r, self.s

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.k, *self.output_size

    @property
    def is_depthwise(self) -> bool:
        """One input channel a group; k / c filters each (the multiplier)."""
        return self.groups == self.c

    @property
    def flops(self) -> int:
        """Floating-point operations of a pass (the same for all three), padding counted as if it were data."""
        p, q = self.output_size
        return 2 * self.n * p * q * self.k * (self.c // self.groups) * self.r * self.s

    @property
    def bytes(self) -> int:
        """Bytes that any one pass must move: of x, weight and y, two are read once and the third is written once."""
        p, q = self.output_size
        elements = (
            self.n * self.c * self.h * self.w
            + self.n * self.k * p * q
            + self.k * (self.c // self.groups) * self.r * self.s
        )
        return elements * self.torch_dtype.itemsize

    @property
    def torch_padding(self) -> tuple[int, int] | None:
        """The padding as `torch.nn.functional.conv2d` takes it, or None where the two sides differ."""
        top, bottom, left, right = self.padding
        return (top, left) if top == bottom and left == right else None

    @property
    def transposed_output_padding(self) -> tuple[int, int] | None:
        """The output_padding with which the transposed convolution leads from y's size to x's; None if none does."""
        if self.torch_padding is None:
            return None
        rest = tuple(
            size - ((out - 1) * u - 2 * p + e)
            for size, out, u, p, e in zip(
                (self.h, self.w), self.output_size, self.stride, self.torch_padding, self._extent, strict=True
            )
        )
        fits = all(0 <= a < max(u, d) for a, u, d in zip(rest, self.stride, self.dilation, strict=True))
        return rest if fits else None

    def tensors(
        self, generator: torch.Generator | None = None, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normally distributed x, weight, bias and gradient of y, in the problem's dtype and layout."""
        shapes = self.input_shape, self.weight_shape, self.output_shape
        x, weight, grad = (_random(shape, self.dtype, self.layout, generator, device) for shape in shapes)
        return x, weight, _random((self.k,), self.dtype, "nchw", generator, device), grad


@dataclass(frozen=True)
class MaxPoolProblem(_Problem):
    """Max pooling of x (n, c, h, w) by windows of r x s pixels -> y (n, c, P, Q), as PyTorch's max_pool2d.

    stride, padding and dilation are (height, width). `str()` gives the text form, ``n8c64h112w112r3s3u2p1d1_f32_nhwc``.
    """

    n: int
    c: int
    h: int
    w: int
    r: int
    s: int
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False
    dtype: str = "f32"
    layout: str = "nchw"

    def __str__(self) -> str:
        sizes = "".join(f"{name}{getattr(self, name)}" for name in ("n", "c", "h", "w", "r", "s"))
        options = _joined("u", self.stride) + _joined("p", self.padding) + _joined("d", self.dilation)
        return f"{sizes}{options}_{self.dtype}_{self.layout}{'+ceil' if self.ceil_mode else ''}"

    @property
    def output_size(self) -> tuple[int, int]:
        """(P, Q): height and width of the output."""
        size = []
        for i, length in enumerate((self.h, self.w)):
            room = length + 2 * self.padding[i] - self.dilation[i] * ((self.r, self.s)[i] - 1) - 1
            count = (room + (self.stride[i] - 1 if self.ceil_mode else 0)) // self.stride[i] + 1
            last = (length + self.padding[i] - 1) // self.stride[i] + 1  # the last window begins in the image or before
            size.append(min(count, last) if self.ceil_mode else count)
        return tuple(size)

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, *self.output_size

    @property
    def forward_bytes(self) -> int:
        """Bytes that a pass must move: x (or its gradient), y (or its), and for each of y a byte, which tap it was."""
        p, q = self.output_size
        outputs = self.n * self.c * p * q
        return self.n * self.c * self.h * self.w * self.torch_dtype.itemsize + outputs * (self.torch_dtype.itemsize + 1)

    backward_bytes = forward_bytes

    def tensors(
        self, generator: torch.Generator | None = None, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normally distributed x and gradient of y, in the problem's dtype and layout."""
        shapes = self.input_shape, self.output_shape
        x, grad = (_random(shape, self.dtype, self.layout, generator, device) for shape in shapes)
        return x, grad


@dataclass(frozen=True)
class BatchNormProblem(_Problem):
    """Batch norm + ReLU of x (n, c, h, w), with a residual of the same shape added before the ReLU where `residual`.

    `str()` gives the text form (``n8c64h56w56_f32_nhwc+res``) and `parse` reads it.
    """

    n: int
    c: int
    h: int
    w: int
    dtype: str = "f32"
    layout: str = "nchw"
    residual: bool = False

    def __post_init__(self) -> None:
        for name in ("n", "c", "h", "w"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but got {getattr(self, name)}")
        _check_names(self.dtype, self.layout)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text form. ValueError names the part that is wrong and what is accepted there."""
        reader = _Reader(text, _BATCH_NORM_EXAMPLE)
        names = {"n": "images", "c": "channels", "h": "height", "w": "width"}
        sizes = [reader.numbers(letter, what, (1,))[0] for letter, what in names.items()]
        dtype, layout = reader.word("dtype", DTYPES, "f32"), reader.word("layout", LAYOUTS, "nchw")
        residual = reader.flag("+res")
        reader.end()
        try:
            return cls(*sizes, dtype, layout, residual)
        except ValueError as error:
            raise ValueError(f"problem '{text}': {error}") from None

    def __str__(self) -> str:
        return f"n{self.n}c{self.c}h{self.h}w{self.w}_{self.dtype}_{self.layout}{'+res' if self.residual else ''}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c, self.h, self.w

    @property
    def _pass_bytes(self) -> int:
        return self.n * self.c * self.h * self.w * self.torch_dtype.itemsize

    @property
    def forward_bytes(self) -> int:
        """Bytes that the forward pass must move if all between stays on chip: read x (and the residual), write y."""
        return (3 if self.residual else 2) * self._pass_bytes

    @property
    def backward_bytes(self) -> int:
        """The same of the backward pass: read x and the gradient of y, write that of x (and that of the residual)."""
        return (4 if self.residual else 3) * self._pass_bytes

    def tensors(
        self, generator: torch.Generator | None = None, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normally distributed x (a mean and scale for each channel), residual or None, weight, bias, gradient of y."""
        x, residual, grad = (_random(self.shape, self.dtype, self.layout, generator, device) for _ in range(3))
        weight, bias, mean, scale = (_random((self.c,), self.dtype, "nchw", generator, device) for _ in range(4))
        x = (x * (scale.abs() + 0.5).view(-1, 1, 1) + mean.view(-1, 1, 1)).to(memory_format=self.memory_format)
        return x, residual if self.residual else None, weight, bias, grad


# The tests' table of convolutions. The CPU kernels work in vectors of 2, 4, 8 or 16 lanes, in register tiles of 1 to 4
# vectors of channels (16, 32, 48, 64 columns at the widest) by 5, 6, 7, 9, 10, 12 or 14 pixels, and take a depthwise
# filter in runs of 16 rows: sizes stand below, at and above each, dividing and not. All are tiny: they run for every
# dtype, layout, pass and instruction set. Add a row where a bug was found.
_AROUND_TILES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70)

TEST_PROBLEMS: tuple[ConvProblem, ...] = tuple(
    ConvProblem.parse(text)
    for text in (
        # filters, then channels, around vectors and column tiles
        *(f"n1c5h4w5k{k}r3s3p1" for k in _AROUND_TILES),
        *(f"n2c{c}h4w3k6r3s3p1" for c in _AROUND_TILES),
        *(
            f"n1c{c}h3w3k{k}r1s1"
            for c, k in ((1, 1), (3, 64), (8, 8), (16, 16), (17, 33), (33, 17), (64, 3), (65, 66), (96, 97))
        ),
        "n1c256h4w4k320r1s1",
        "n1c260h3w3k257r3s3p1",
        # pixels around row tiles: width alone, then images x height x width
        *(f"n1c4h2w{w}k9r3s3p1" for w in (1, 2, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 27, 28, 29)),
        *(f"n1c8h{h}w1k17r1s1" for h in (5, 6, 7, 9, 10, 11, 12, 13, 14, 15)),
        "n3c4h5w7k8r3s3p1",
        "n7c6h2w2k8r1s1",
        # more pixels than a task takes at once
        "n1c3h19w31k5r3s3p1",
        "n2c17h17w16k18r1s1",
        # many small images
        "n33c3h4w4k8r3s3p1",
        "n16c17h7w7k16r3s3p1",
        "n40c8h1w1k12r1s1",
        # few channels in or out
        "n2c1h9w9k6r5s5",
        "n2c3h9w11k16r7s7u2p3",
        "n1c3h23w23k12r11s11u4p2",
        "n2c1h6w6k1r3s3p1",
        "n1c16h6w6k1r3s3p1",
        "n1c24h5w6k3r3s3p1",
        "n2c4h8w8k32r3s3u2p1",
        # few planes, interleaved a vector of pixels at a time: around one, two and four vectors
        *(f"n1c3h3w{w}k20r3s3p1" for w in (7, 8, 9, 15, 16, 17, 33)),
        "n2c2h4w35k18r3s3p1",
        "n2c8h4w19k40r3s3p1g2",
        "n1c16h4w37k48r3s3p1g2",
        # panels of one, two and three vectors of pixels
        *(f"n1c16h{h}w8k9r1s1" for h in (2, 3, 5, 7, 9, 13)),
        # blocks of pixels that end in another image
        "n5c20h5w5k40r3s3p1",
        # filter shapes
        "n1c6h7w9k8r2s2",
        "n1c6h5w11k8r1s7p0x3",
        "n1c6h11w5k8r7s1p3x0",
        "n1c3h19w2k4r17s1p1x0",
        "n1c5h8w8k7r5s5p2",
        "n1c5h4w4k7r4s4p2",
        # stride, with rows and columns left over, and larger than the filter
        "n2c6h9w8k10r3s3u2p1",
        "n2c6h8w9k10r3s3u2",
        "n1c5h11w12k7r3s3u3p1",
        "n1c7h10w11k9r1s1u2",
        "n3c37h9w7k40r1s1u2",
        "n2c33h8w9k66r1s1u2x3g3",
        "n1c520h3w3k530r1s1",  # a weight gradient in parts
        "n1c7h9w11k9r2s2u3",
        "n1c6h9w9k8r3s3u1x2p1",
        "n1c6h9w9k8r3s3u3x1p1",
        "n1c6h12w7k16r5s5u2p2",
        "n1c6h7w7k9r3s3u5p1",
        # one pixel of many images, without the taps in the padding
        "n15c6h4w4k8r4s4u2p1",
        "n17c18h3w3k20r3s3u2p1",
        "n15c8h3w4k10r5s4p2x1g2",
        # dilation, alone, with stride, rectangular
        "n1c6h9w9k8r3s3p2d2",
        "n1c6h11w9k8r3s3d3",
        "n1c6h9w10k8r3s3p2x1d2x1",
        "n1c6h9w10k8r3s3u2p2d2",
        "n1c6h13w12k8r3s3u2x3p3d3x2",
        "n1c6h13w13k8r2s3u3p3d2",
        # padding: rectangular, larger than the filter, one-sided, image smaller than the filter
        "n1c6h6w5k8r3s3p0x2",
        "n1c6h4w3k8r3s3p5",
        "n1c6h3w3k8r1s1p2",
        "n1c6h3w4k8r2s2u2p3x4",
        "n1c6h6w5k8r3s3p0x1x0x1",
        "n1c6h6w5k8r2s2p1x0x0x0",
        "n2c6h7w6k8r3s3u2p0x1x1x2",
        "n1c6h5w5k8r4s4p1x2x1x2",
        "n1c6h2w2k8r5s5p2",
        "n1c6h1w1k8r3s3p1",
        "n1c6h1w2k8r7s7p3",
        "n2c6h9w1k8r3s3p1",
        "n2c6h1w9k8r3s3p1",
        # groups: channels of a group around vectors, in and out
        "n2c6h5w4k4r3s3p1g2",
        "n1c6h5w4k9r3s3p1g3",
        "n1c16h4w4k32r3s3p1g2",
        "n1c34h3w4k30r3s3p1g2",
        "n1c32h4w4k32r3s3p1g8",
        "n1c33h4w4k66r1s1g3",
        "n1c12h5w5k6r3s3u2p1g6",
        "n1c12h7w7k12r3s3p2d2g4",
        "n1c6h5w5k12r2s2p0x1x1x0g2",
        # groups of 4 to 32 channels to as many: pixels around tiles, a vector's groups, and what other kernels take
        *(f"n1c32h3w{w}k32r3s3p1g{g}" for g in (8, 4, 2) for w in (3, 7, 8, 14)),
        "n1c16h3w29k16r3s3p1g4",
        "n2c48h4w6k48r3s3p1g6",
        "n1c48h4w1k48r3s3p1g3",
        *(f"n1c32h7w6k32r3s3p{p}g4" for p in ("0", "2", "0x1x2x0", "5x1")),
        "n1c32h11w5k32r5s3p4x1d2x1g4",
        "n2c32h5w4k32r1s3p0x1g2",
        "n3c16h19w8k16r3s3p1g4",
        "n1c20h5w6k20r3s3p1g5",
        "n1c32h6w9k32r3s3u1x2p1g4",
        *(f"n1c32h5w{w}k32r3s3u2p1g{g}" for g in (8, 4, 2) for w in (5, 11, 13, 16, 27)),
        *(f"n1c64h4w{w}k64r3s3u{u}p1g2" for u, w in ((1, 4), (1, 7), (2, 13))),
        *(f"n1c32h8w9k32r3s3u2p{p}g4" for p in ("0", "2", "0x1x2x0", "5x1")),
        "n2c32h7w6k32r1s3u2p0x1g4",
        "n1c32h12w7k32r5s3u2p2x1g8",
        "n3c16h35w6k16r3s3u2p1g2",
        # contiguous groups, as many at a time as fill a vector
        "n9c24h5w5k36r3s3p1g6",
        "n2c40h4w4k60r3s3p1g20",
        # depthwise: channels around vectors, then multiplier, filter, stride, dilation, padding
        *(f"n2c{c}h5w6k{c}r3s3p1g{c}" for c in _AROUND_TILES),
        *(f"n1c{c}h7w5k{c}r3s3u2p1g{c}" for c in (3, 16, 17, 40)),
        *(f"n1c{c}h5w5k{c * m}r3s3p1g{c}" for c in (2, 5, 16, 17) for m in (2, 3)),
        "n1c8h9w20k8r3s3p1g8",
        "n1c5h3w37k5r3s3p1g5",
        "n1c20h8w8k20r5s5p2g20",
        "n1c19h9w9k19r7s7p3g19",
        "n1c6h9w9k12r5s5u2p2g6",
        "n1c6h4w12k6r1s7p0x3g6",
        "n1c6h12w4k6r7s1p3x0g6",
        "n1c3h20w3k3r17s2p2x1g3",
        "n1c18h9w9k18r3s3p2d2g18",
        "n1c18h9w9k18r3s3u2p2d2g18",
        "n1c10h11w10k10r3s3u3x2p1g10",
        "n1c9h6w6k9r3s3p0x1x0x1g9",
        "n1c9h2w2k9r5s5p2g9",
        "n1c9h3w3k9r3s3p4g9",
        "n1c9h6w6k9r1s1g9",
        "n1c9h6w7k9r1s1u2g9",
        "n1c9h1w1k9r3s3p1g9",
        "n1c9h8w8k9r2s2g9",
        "n9c17h4w4k17r3s3p1g17",
    )
)

# The same for batch norm + ReLU: channels around vectors, values of a channel from 1 (eval) and 2 to some thousand.
TEST_BATCH_NORM_PROBLEMS: tuple[BatchNormProblem, ...] = tuple(
    BatchNormProblem.parse(text)
    for text in (
        *(f"n3c{c}h3w5" for c in _AROUND_TILES),
        "n2c5h1w1",
        "n1c5h1w2",
        "n1c17h1w16",
        "n1c6h7w7",
        "n64c9h1w1",
        "n33c3h4w4",
        "n2c3h32w33",
        "n1c1h61w67",
        "n4c16h8w8",
        "n2c130h3w3",
    )
)

# Windows of one vector of outputs and of several, that overlap, touch and leave gaps, that reach into the padding on
# either side, whose taps all lie in it, of all of the image, of more than 255 taps.
TEST_MAX_POOL_PROBLEMS: tuple[MaxPoolProblem, ...] = (
    MaxPoolProblem(2, 20, 24, 24, 2, 2, (2, 2)),
    MaxPoolProblem(2, 50, 8, 8, 2, 2, (2, 2)),
    MaxPoolProblem(2, 7, 15, 13, 3, 3, (2, 2), (1, 1)),
    MaxPoolProblem(1, 33, 9, 11, 3, 3, (2, 2), ceil_mode=True),
    MaxPoolProblem(2, 16, 7, 9, 3, 3, (1, 1), (1, 1)),
    MaxPoolProblem(1, 3, 61, 70, 3, 3, (2, 2), (1, 1)),
    MaxPoolProblem(3, 4, 9, 10, 2, 3, (3, 4), (1, 1), (2, 3), True),
    MaxPoolProblem(1, 5, 11, 12, 1, 2, (3, 1), (0, 1)),
    MaxPoolProblem(1, 17, 6, 5, 6, 5, (6, 5)),
    MaxPoolProblem(2, 3, 20, 19, 16, 17, (3, 2), (8, 8)),
    MaxPoolProblem(1, 2, 1, 4, 2, 2, (1, 1), (1, 1), (1, 4)),
    MaxPoolProblem(1, 9, 2, 3, 2, 2, (5, 5), (1, 1), (1, 2), True),
    MaxPoolProblem(1, 1, 130, 140, 2, 2, (2, 2)),
)
