"""The layers and networks on which every speed claim is made, and which of them a command asks for.

``layers.tsv`` beside this file has the layers: of well-known networks, with batch sizes for a CPU and for a GPU.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from convkit.bench import BenchError
from convkit.bench.problems import DTYPES, LAYOUTS, BatchNormProblem, ConvProblem

__all__ = ["PASSES", "SUITES", "Case", "Layer", "Net", "cases", "family", "layers", "parse", "words"]

SUITES = ("dense", "depthwise", "batch-norm", "nets")
FAMILY_PASSES = {
    "dense": ("fprop", "dgrad", "wgrad"),
    "depthwise": ("fprop", "dgrad", "wgrad"),
    "batch-norm": ("forward", "backward", "evaluation"),
    "nets": ("training", "inference"),
}
PASSES = tuple(dict.fromkeys(pass_ for passes in FAMILY_PASSES.values() for pass_ in passes))

# What --quick measures: of each suite some layers that take milliseconds, of different networks and filter sizes.
QUICK = {
    "dense": ("r50_3x3_256", "r50_1x1_1024_256", "r50_down_256_512", "lenet_20_50", "cifar_256"),
    "depthwise": ("dw3_256_28", "dw5_240_28", "dw3_256_8"),
    "batch-norm": ("bn_1024_14", "bn_256_8"),
    "nets": ("simplenet", "cifar_mobilenet"),
}

# Floating-point operations an element, additions and multiplications one each. Forward: the two sums of the statistics
# 3, scale and shift 2, ReLU 1; backward: normalised input 2, mask 1, the two sums 3, the linear form of the result 4.
BATCH_NORM_FLOPS = {"forward": 6, "backward": 10, "evaluation": 3}


@dataclass(frozen=True)
class Layer:
    """A row of layers.tsv: the problem has float32 and nchw. ``source``: the network that it is from."""

    suite: str
    name: str
    problem: ConvProblem | BatchNormProblem
    source: str


@dataclass(frozen=True)
class Net:
    """A network: a function without arguments, as ``module:function``, and the shape (N, C, H, W) of its batches."""

    name: str
    factory: str
    shape: tuple[int, int, int, int]

    def __str__(self) -> str:
        return "x".join(map(str, self.shape))


NETS = (
    # name, (C, H, W), batch on a CPU, on a GPU: all in the lab's registry
    ("cifar_baseline", (3, 32, 32), 32, 512),
    ("cifar_mobilenet", (3, 32, 32), 64, 512),
    ("simplenet", (1, 28, 28), 128, 512),
    ("resnet18", (3, 224, 224), 8, 256),
)


@dataclass(frozen=True)
class Case:
    """One row to measure."""

    suite: str
    family: str
    name: str
    problem: ConvProblem | BatchNormProblem | Net
    pass_: str
    dtype: str
    """As in the problem, or tf32: float32 tensors, products on tensor cores rounded to 10 bits."""
    layouts: tuple[str, ...]
    """Of convkit."""

    @property
    def text(self) -> str:
        """The problem's text form without its layout: a row has all of them."""
        return re.sub("_(nchw|nhwc)", "", str(self.problem))

    @property
    def key(self) -> tuple[str, ...]:
        """That of its row in the results."""
        return self.family, self.name, self.text, self.pass_, self.dtype

    @property
    def flops(self) -> int | None:
        if isinstance(self.problem, ConvProblem):
            return self.problem.flops
        if isinstance(self.problem, BatchNormProblem):
            n, c, h, w = self.problem.shape
            residual = self.problem.residual and self.pass_ != "backward"
            return (BATCH_NORM_FLOPS[self.pass_] + residual) * n * c * h * w
        return None

    @property
    def bytes(self) -> int | None:
        if isinstance(self.problem, ConvProblem):
            return self.problem.bytes
        if isinstance(self.problem, BatchNormProblem):
            return self.problem.backward_bytes if self.pass_ == "backward" else self.problem.forward_bytes
        return None


def family(problem: ConvProblem | BatchNormProblem) -> str:
    """dense, depthwise or batch-norm. A picture of one channel is dense: it has one group like any other."""
    if isinstance(problem, BatchNormProblem):
        return "batch-norm"
    return "depthwise" if problem.is_depthwise and problem.groups > 1 else "dense"


def layers(device: str = "cpu") -> list[Layer]:
    """layers.tsv with the batch sizes for a device; a batch norm twice, without and with a residual."""
    found = []
    for line in importlib.resources.files(__package__).joinpath("layers.tsv").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, sizes, cpu, cuda, source = line.split("\t")
        n, values = int(cuda if device == "cuda" else cpu), [int(value) for value in sizes.split()]
        if len(values) == 3:
            plain = BatchNormProblem(n, *values)
            found += [Layer("batch-norm", name, plain, source)]
            found += [Layer("batch-norm", f"{name}+res", plain.replace(residual=True), source)]
        else:
            c, h, w, k, r, s, stride, pad, groups = values
            problem = ConvProblem(n, c, h, w, k, r, s, (stride, stride), (pad,) * 4, (1, 1), groups)
            found.append(Layer(family(problem), name, problem, source))
    return found


def words(option: str, text: str | None, accepted: Sequence[str], default: Sequence[str], **groups) -> tuple[str, ...]:
    """A comma-separated list of words out of ``accepted`` (or of names of ``groups`` of them), each once.

    BenchError names the option, the word and what is accepted.
    """
    if text is None:
        return tuple(default)
    chosen: list[str] = []
    for word in text.split(","):
        word = word.strip()
        if word not in accepted and word not in groups:
            raise BenchError(
                f"{option}: got '{word}'; accepts {', '.join([*accepted, *groups])}, or several with commas"
            )
        chosen += groups.get(word, (word,))
    return tuple(dict.fromkeys(chosen))


def cases(
    *,
    suites: Iterable[str] = SUITES,
    device: str = "cpu",
    dtypes: Sequence[str] = ("f32",),
    layouts: Sequence[str] = tuple(LAYOUTS),
    passes: Sequence[str] = PASSES,
    filter: str = "*",
    quick: bool = False,
    problems: Iterable[str] = (),
    models: Iterable[str] = (),
) -> list[Case]:
    """What to measure, in order: the suites' layers whose name matches ``filter``, then ``problems`` and ``models``.

    A problem whose text names a dtype or a layout is measured in these, else in ``dtypes`` and ``layouts``; its
    batch norm or convolution is known by its letters. A model is ``module:function@NxCxHxW``.

    BenchError: a malformed problem or model, with the part that is wrong; nothing left to measure.
    """
    found = []
    for suite in suites:
        for name, problem in _members(suite, device):
            if quick and isinstance(problem, Net):
                problem = dataclasses.replace(problem, shape=(max(1, problem.shape[0] // 4), *problem.shape[1:]))
            if fnmatch.fnmatchcase(name, filter) and not (quick and name.removesuffix("+res") not in QUICK[suite]):
                found += _rows(suite, suite, name, problem, dtypes, layouts, passes)
    for text in problems:
        problem = parse(text)
        own_dtypes = [problem.dtype] if re.search(f"_({'|'.join(DTYPES)})", text) else dtypes
        own_layouts = [problem.layout] if re.search(f"_({'|'.join(LAYOUTS)})", text) else layouts
        found += _rows("problem", family(problem), text, problem, own_dtypes, own_layouts, passes)
    for text in models:
        found += _rows("model", "nets", text.partition("@")[0], _net(text, device), dtypes, layouts, passes)
    if not found:
        raise BenchError(
            f"nothing to measure: no {' or '.join(passes)} of {', '.join(suites) or 'the problems'} has a name like "
            f"'{filter}'{' in the quick selection' if quick else ''}; names are those of {', '.join(_some_names())} …"
        )
    return list(dict.fromkeys(found))


def _members(suite: str, device: str) -> Iterator[tuple[str, ConvProblem | BatchNormProblem | Net]]:
    if suite == "nets":
        for name, shape, cpu, cuda in NETS:
            yield name, Net(name, f"convkit.lab.models:{name}", (cuda if device == "cuda" else cpu, *shape))
    for layer in layers(device):
        if layer.suite == suite:
            yield layer.name, layer.problem


def _some_names() -> list[str]:
    return [next(_members(suite, "cpu"))[0] for suite in SUITES]


def _rows(suite, family, name, problem, dtypes, layouts, passes) -> Iterator[Case]:
    for dtype in dtypes:
        for pass_ in FAMILY_PASSES[family]:
            if pass_ in passes:
                one = problem if isinstance(problem, Net) else problem.replace(dtype=dtype.replace("tf32", "f32"))
                yield Case(suite, family, name, one, pass_, dtype, tuple(layouts))


def parse(text: str) -> ConvProblem | BatchNormProblem:
    """A problem of either kind. BenchError names the part that is wrong and what is accepted."""
    kind = ConvProblem if re.search(r"[kr]\d", text) else BatchNormProblem
    try:
        return kind.parse(text)
    except ValueError as error:
        raise BenchError(f"--problem: {error}") from None


def _net(text: str, device: str) -> Net:
    factory, _, sizes = text.partition("@")
    if not re.fullmatch(r"[\w.]+:[\w.]+", factory):
        raise BenchError(f"--model: got '{text}'; accepts module:function@NxCxHxW, as in my.nets:small@8x3x224x224")
    if not sizes:
        sizes = f"{64 if device == 'cuda' else 8}x3x224x224"
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", sizes):
        raise BenchError(f"--model: '{text}': got '{sizes}' after @; accepts four sizes NxCxHxW, as in 8x3x224x224")
    return Net(factory, factory, tuple(int(size) for size in sizes.split("x")))
