"""Recipes: everything that a training run depends on, its source and the number to expect, in frozen dataclasses."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from convkit.lab import LabError
from convkit.lab.data import VALIDATION

__all__ = ["CHOICES", "RECIPES", "Recipe", "from_json", "nearest", "override", "recipe"]

CHOICES: dict[str, tuple[str, ...]] = {
    "objective": ("classify", "distill", "rotate", "joint"),
    "optimizer": ("sgd", "momentum", "nesterov", "adagrad", "adadelta", "adam", "adamw"),
    "schedule": ("constant", "step", "inverse_time", "plateau", "cosine", "one_cycle"),
    "precision": ("f32", "bf16", "f16"),
    "backend": ("convkit", "torch"),
    "head": ("linear", "mlp"),
    "trunk_batch_norm": ("eval", "train"),
}
"""The fields of a recipe that take one of a few words."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training run, complete: the same recipe gives the same weights on the same machine and number of threads.

    A value that its comment does not say to be off at zero is used as it is.
    """

    name: str
    model: str
    """A name of :data:`convkit.lab.models.MODELS`."""
    data: str
    """A data set, as :func:`convkit.lab.data.load` takes it."""
    epochs: int
    """Passes over the training pictures."""
    batch_size: int
    """Of all processes together. Up to half a batch at the end of an epoch is left out, other pictures in each."""
    learning_rate: float
    """The largest of the schedule."""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the network's builder; ``model.norm=group`` on the command line."""

    optimizer: str = "adam"
    momentum: float = 0.9
    """Of momentum and nesterov; the first beta of adam and adamw."""
    weight_decay: float = 0.0
    """Added to the gradient; in adamw, taken off the weights."""
    clip_norm: float = 0.0
    """The gradient of all parameters together is scaled down to this L2 norm; 0 for off."""

    schedule: str = "constant"
    milestones: tuple[float, ...] = ()
    """step: after how many epochs the learning rate is multiplied by ``gamma``; fractions are allowed."""
    gamma: float = 0.1
    """step, plateau: the factor."""
    plateau_patience: int = 1
    """plateau: epochs without a better validation metric before the learning rate falls."""
    decay: float = 0.0
    """inverse_time: learning_rate / (1 + decay · t) after t steps."""
    warm_up: float = 0.3
    """one_cycle: the part of the run in which the learning rate rises."""

    precision: str = "f32"
    """f32, or autocast to bf16 or f16 (with loss scaling)."""
    channels_last: bool = False
    """Pictures and weights in NHWC order: the same numbers to rounding, other kernels."""
    sync_batch_norm: bool = False
    """With several processes: batch norms take the statistics of the pictures of all; needs backend=torch."""
    ema: float = 0.0
    """Decay a step of the exponential moving average of the weights that is validated and kept; 0 for off."""
    patience: int = 0
    """Stop after so many epochs without a better validation metric; 0 for never."""
    dropout: float = 0.0
    """Part of the embedding that is set to zero before the last layer, in training."""
    classes: tuple[int, ...] = ()
    """Only the pictures of these classes, which are numbered anew; empty for all."""
    validation_share: float = VALIDATION
    """Part of the training pictures that is held out to validate on. A run that goes on from another's weights has to
    hold out as much, or it validates on pictures that those have seen."""
    images: int = 0
    """Train on so many pictures, drawn in the proportion of the classes; 0 for all."""
    validation_images: int = 0
    """Validate on so many; 0 for all."""
    augment: tuple[str, ...] = ()
    """What :func:`convkit.lab.augment.parse` takes: pad_crop:4, flip, ..."""

    objective: str = "classify"
    label_smoothing: float = 0.0
    teacher: str = ""
    """distill: the teacher's run folder, or the recipe whose newest finished run it is."""
    temperature: float = 5.0
    """distill: T of softmax(t / T)."""
    same_crops: bool = True
    """distill: teacher and student see the same augmented picture, or each its own."""
    rotation_weight: float = 1.0
    """joint: what the rotation loss is multiplied by."""

    init: str = ""
    """Where the trunk's weights come from: a run folder, the recipe whose newest finished run it is, a file with a
    state_dict; empty for randomly drawn ones."""
    freeze: bool = False
    """Train a new head alone, on the features of a trunk that stays as it is."""
    layer: str = ""
    """freeze: the module whose output the head gets, flattened; empty for what ``embed`` gives."""
    head: str = "linear"
    """freeze: a linear head, or one hidden layer of 200 with batch norm and ReLU (mlp)."""
    trunk_batch_norm: str = "eval"
    """freeze: mode of the frozen trunk's batch norms. "train" shows what goes wrong: the running statistics move though
    the weights stand still, and training sees other features than evaluation."""

    seed: int = 0
    """Draws the initial weights, the order of the pictures and their augmentation; at least 0."""
    backend: str = "convkit"
    source: str = ""
    claimed_error: float | None = None
    """Test error in percent to expect, from ``source``."""

    def __post_init__(self) -> None:
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                self._refuse(name, f"one of {', '.join(accepted)}", near=accepted)
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1")
        for name in ("patience", "plateau_patience", "images", "validation_images"):
            if getattr(self, name) < 0:
                self._refuse(name, "zero or positive")
        for name in ("learning_rate", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                self._refuse(name, "positive and finite")
        for name in ("weight_decay", "clip_norm", "decay", "rotation_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                self._refuse(name, "zero or positive and finite")
        for name in ("momentum", "ema", "label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                self._refuse(name, "from 0 to below 1")
        for name in ("gamma", "warm_up", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                self._refuse(name, "between 0 and 1")
        if list(self.milestones) != sorted(m for m in self.milestones if m > 0):
            self._refuse("milestones", "positive numbers of epochs in ascending order")
        if self.schedule == "step" and not self.milestones:
            self._refuse("milestones", "given for schedule=step, such as milestones=20,30")
        if len(set(self.classes)) < len(self.classes) or min(self.classes, default=0) < 0 or len(self.classes) == 1:
            self._refuse("classes", "several different classes, numbered from 0")
        if self.sync_batch_norm and self.backend != "torch":  # convkit's are fused with what follows them
            self._refuse("sync_batch_norm", "false, or the backend torch")
        if not 0 <= self.seed < 2**43:  # data.epoch_order packs seed and epoch into 63 bits
            self._refuse("seed", "from 0 to 2^43 - 1")

    def _refuse(self, field: str, accepted: str, near: Iterable[str] = ()) -> None:
        value = getattr(self, field)
        raise LabError(f"{self.name}: {field} must be {accepted}, got {value!r}{nearest(value, near, prefix='; ')}")


FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
TYPES = typing.get_type_hints(Recipe)


def nearest(word: Any, known: Iterable[str], *, prefix: str = "") -> str:
    """``did you mean x?``, or nothing if no known word is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f"{prefix}did you mean {near[0]}?" if near else ""


def from_json(values: Mapping[str, Any]) -> Recipe:
    """The recipe that ``dataclasses.asdict`` gave, back from JSON.

    A field that was not there yet when it was written has its default, with which everything was as before. LabError if
    it has one that this version does not know.
    """
    unknown = sorted(set(values) - set(FIELDS))
    needed = {name for name, field in FIELDS.items() if _has_no_default(field)}
    missing = sorted(needed - set(values))
    if unknown or missing:
        what = f"does not know {', '.join(unknown)}" if unknown else f"misses {', '.join(missing)}"
        raise LabError(f"recipe {values.get('name')!r} was written by another version of convkit: this one {what}")
    return Recipe(**_tuples(values))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return {name: _tuples(value) if isinstance(value, dict) else value for name, value in fields.items()}


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def override(recipe: Recipe, changes: Iterable[str]) -> Recipe:
    """The recipe with ``field=value`` texts applied; ``model.OPTION=value`` sets an argument of the network's builder.

    Values are read as the field's type: whole numbers, numbers, true or false, words; several numbers with commas
    (milestones=20,30), several words with + (augment=pad_crop:4+flip), nothing for none. LabError names the field and
    what it takes, or the nearest field.
    """
    values: dict[str, Any] = {}
    options = dict(recipe.options)
    for change in changes:
        name, equals, text = change.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise LabError(f"{change!r} is not of the form field=value, such as epochs=20")
        if name.startswith("model."):
            options[name.removeprefix("model.")] = _literal(text)
        elif name not in TYPES or name in ("name", "options"):
            settable = [known for known in TYPES if known not in ("name", "options")]
            hint = nearest(name, settable) or f"there are {', '.join(settable)}"
            raise LabError(f"{recipe.name}: no field {name!r}: {hint}")
        else:
            values[name] = _read(f"{recipe.name}: {name}", text.strip(), TYPES[name])
    if "model" in values and values["model"] != recipe.model:  # the options were meant for the other network
        options = {name: value for name, value in options.items() if name not in recipe.options}
    return dataclasses.replace(recipe, options=options, **values)


_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _read(what: str, text: str, kind: Any) -> Any:
    """``text`` as a value of the annotation ``kind``."""
    if isinstance(kind, types.UnionType):  # float | None
        return None if text.lower() in ("", "none") else _read(what, text, typing.get_args(kind)[0])
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        parts = text.replace("+", " ").split() if item is str else text.split(",")
        return tuple(_read(what, part.strip(), item) for part in parts if part.strip())
    if kind is bool:
        if text.lower() not in _WORDS:
            raise LabError(f"{what} must be true or false, got {text!r}")
        return _WORDS[text.lower()]
    if kind is str:
        return text
    try:
        return kind(text)
    except ValueError:
        article = "a whole number" if kind is int else "a number"
        raise LabError(f"{what} must be {article}, got {text!r}") from None


def _literal(text: str) -> Any:
    """A builder's argument: a whole number, a number, true, false, none, several of them with commas, else a word."""
    if "," in text:
        return tuple(_literal(part) for part in text.split(",") if part)
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_COURSE = "UEA CMP-6035B Computer Vision, lecture slides, 2022"
_COURSE_300 = f"{_COURSE} (300 passes)"
_DIGITS5K = "mean of 3 seeds of Adam on a 4,000/1,000 split of the same digits"
_LECUN = "LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998"
_CHAIN = "TMLSS 2018, vision tutorial (its steps counted in epochs of 50,000 pictures)"
_MODERN = "the chain of the TMLSS 2018 vision tutorial, with padded crops, one-cycle and weight decay"
_HE = "He et al., 2015, arXiv:1512.03385, section 4.2"
_GIDARIS = "Gidaris et al., 2018, arXiv:1803.07728"
_SMALL_ROTATION = f"{_GIDARIS}, on a small ResNet"

_KERAS = "Keras, mnist_transfer_cnn: learn the digits 0 to 4, then 5 to 9 from few of them"

_DIGITS = (
    Recipe("fc64-digits5k", "fc64", "digits5k", 20, 32, 1e-3, source=_DIGITS5K, claimed_error=6.9),
    Recipe("fc256-fc256-digits5k", "fc256_fc256", "digits5k", 15, 16, 1e-3, source=_DIGITS5K, claimed_error=5.1),
    Recipe("simplenet-digits5k", "simplenet", "digits5k", 12, 32, 1e-3, source=_DIGITS5K, claimed_error=2.7),
    Recipe("fc64-mnist", "fc64", "mnist", 10, 64, 1e-3, source=_COURSE, claimed_error=2.85),
    Recipe("fc256-fc256-mnist", "fc256_fc256", "mnist", 20, 128, 5e-4, source=_COURSE, claimed_error=1.83),
    Recipe("simplenet-mnist", "simplenet", "mnist", 6, 64, 1e-3, source=_COURSE_300, claimed_error=0.79),
    Recipe("lenet5-mnist", "lenet5", "mnist", 12, 64, 1e-3, source=_LECUN, claimed_error=0.95),
    Recipe("low-digits", "simplenet", "digits5k", 8, 32, 1e-3, classes=(0, 1, 2, 3, 4), source=_KERAS),
    Recipe(
        "high-digits-finetune",
        "simplenet",
        "digits5k",
        60,
        10,
        3e-4,
        classes=(5, 6, 7, 8, 9),
        images=50,
        init="low-digits",
        source=_KERAS,
    ),
    Recipe(
        "lenet5-sigmoid-mnist",
        "lenet5",
        "mnist",
        20,
        64,
        2e-3,
        options={"activation": "sigmoid"},
        source=_LECUN,
        claimed_error=0.95,
    ),
)


def _variant(base: Recipe, name: str, **changes: Any) -> Recipe:
    """Another recipe, with what it claims of its own alone."""
    return dataclasses.replace(base, name=name, **{"claimed_error": None, **changes})


_ORIGINAL = Recipe(
    "cifar-baseline",
    "cifar_baseline",
    "cifar10",
    epochs=58,
    batch_size=32,
    learning_rate=0.1,
    optimizer="momentum",
    schedule="step",
    milestones=(25.6, 38.4, 51.2),
    augment=("crop:24", "flip"),
    channels_last=True,
    source=_CHAIN,
    claimed_error=6.0,
)
_BASELINE_MODERN = Recipe(
    "cifar-baseline-modern",
    "cifar_baseline",
    "cifar10",
    epochs=30,
    batch_size=128,
    learning_rate=0.1,
    optimizer="nesterov",
    weight_decay=5e-4,
    schedule="one_cycle",
    augment=("pad_crop:4", "flip"),
    channels_last=True,
    source=_MODERN,
)
_STUDENT = {"model": "cifar_mobilenet", "batch_size": 64}
_TAUGHT = {**_STUDENT, "objective": "distill", "temperature": 5.0}
_CIFAR = (
    _ORIGINAL,
    _variant(_ORIGINAL, "cifar-mobilenet", epochs=116, milestones=(51.2, 76.8, 102.4), claimed_error=13.0, **_STUDENT),
    _variant(
        _ORIGINAL,
        "cifar-mobilenet-distilled",
        epochs=154,
        milestones=(102.4, 128.0, 140.8),
        learning_rate=0.01,
        teacher="cifar-baseline",
        claimed_error=8.0,
        **_TAUGHT,
    ),
    _BASELINE_MODERN,
    _variant(_BASELINE_MODERN, "cifar-mobilenet-modern", **{**_STUDENT, "batch_size": 128}),
    _variant(
        _BASELINE_MODERN,
        "cifar-mobilenet-distilled-modern",
        teacher="cifar-baseline-modern",
        **{**_TAUGHT, "batch_size": 128},
    ),
    Recipe(
        "resnet20-cifar10",
        "cifar_resnet20",
        "cifar10",
        epochs=164,
        batch_size=128,
        learning_rate=0.1,
        optimizer="momentum",
        weight_decay=1e-4,
        schedule="step",
        milestones=(82.0, 123.0),
        augment=("pad_crop:4", "flip"),
        channels_last=True,
        source=_HE,
        claimed_error=8.75,
    ),
    _variant(
        _BASELINE_MODERN,
        "resnet18-cifar10",
        model="cifar_resnet18",
        epochs=60,
        precision="bf16",
        source="kuangliu/pytorch-cifar",
        claimed_error=6.98,
    ),
)

_RESNET = _variant(
    _BASELINE_MODERN,
    "small-resnet-cifar10",
    model="shrunk_resnet",
    epochs=20,
    learning_rate=0.2,
    source="the small ResNet, with labels",
)
_RESNET_WIDE = _variant(
    _RESNET,
    "wide-resnet-cifar10",
    options={"width": 48, "blocks": (1, 1, 1)},
    epochs=28,
    learning_rate=0.1,
    label_smoothing=0.1,
    validation_share=0.05,
    source="Zagoruyko and Komodakis, 2016, arXiv:1605.07146: fewer, wider blocks, which a CPU computes faster",
)
_RESNET_DIGITS = _variant(
    _RESNET,
    "small-resnet-digits5k",
    data="digits5k",
    options={"width": 32},
    epochs=6,
    batch_size=64,
    learning_rate=0.1,
    augment=(),
)
_PROBE = {
    "epochs": 30,
    "optimizer": "adamw",
    "schedule": "cosine",
    "weight_decay": 1e-3,
    "augment": (),
    "freeze": True,
    "channels_last": True,
}
_NIN = Recipe(
    "nin-rotation-cifar10",
    "rotation_nin",
    "cifar10",
    epochs=200,
    batch_size=128,
    learning_rate=0.1,
    optimizer="nesterov",
    weight_decay=5e-4,
    schedule="step",
    milestones=(60.0, 120.0, 160.0),
    gamma=0.2,
    augment=("flip",),
    objective="rotate",
    channels_last=True,
    source=_GIDARIS,
    claimed_error=6.35,
)
_SELF_SUPERVISED = (
    _RESNET,
    _RESNET_WIDE,
    _variant(_RESNET, "small-resnet-cifar10-rotation", objective="rotate", source=_SMALL_ROTATION),
    _variant(_RESNET, "small-resnet-cifar10-joint", objective="joint", source=_SMALL_ROTATION),
    *(
        _variant(
            _RESNET,
            f"small-resnet-cifar10-probe-{name}",
            init="small-resnet-cifar10-rotation",
            layer="layer2",
            source=f"a {head} head on frozen features of rotations{of}",
            **{**_PROBE, "learning_rate": 3e-3, "head": head, **few},
        )
        for name, head, few, of in (
            ("linear", "linear", {}, ""),
            ("mlp", "mlp", {}, ""),
            ("few", "linear", {"images": 500}, ", 50 labels a class"),
        )
    ),
    _RESNET_DIGITS,
    _variant(_RESNET_DIGITS, "small-resnet-digits5k-rotation", epochs=4, objective="rotate", source=_SMALL_ROTATION),
    _variant(
        _RESNET_DIGITS,
        "small-resnet-digits5k-probe",
        init="small-resnet-digits5k-rotation",
        layer="layer3",
        source="a linear head on frozen features of rotations",
        claimed_error=2.9,
        **{**_PROBE, "epochs": 20, "learning_rate": 1e-3},
    ),
    _NIN,
    _variant(
        _NIN,
        "nin-probe-cifar10",
        source=f"{_GIDARIS}, a non-linear probe on block 2 (2 GB of features)",
        init="nin-rotation-cifar10",
        layer="trunk.block2",
        claimed_error=10.94,
        objective="classify",
        milestones=(),
        **{**_PROBE, "learning_rate": 1e-3, "head": "mlp"},
    ),
)

_VGG_WEIGHTS = "vgg16-397923af.pth"
_RESNET_WEIGHTS = "resnet18-f37072fd.pth"
_FINE = Recipe(
    "vgg16-finetune-cifar10",
    "vgg16",
    "cifar10",
    epochs=10,
    batch_size=16,
    learning_rate=1e-4,
    augment=("pad_crop:4", "flip"),
    init=_VGG_WEIGHTS,
    source=f"{_COURSE}; the weights are the file that torchvision publishes",
)
_HEAD = {"freeze": True, "augment": (), "epochs": 20, "learning_rate": 1e-3, "batch_size": 64}
_FINE_RESNET = _variant(_FINE, "resnet18-finetune-cifar10", model="resnet18", init=_RESNET_WEIGHTS)
_TRANSFER = (
    _FINE,
    _variant(_FINE, "vgg16-head-cifar10", **_HEAD),
    _FINE_RESNET,
    _variant(_FINE_RESNET, "resnet18-head-cifar10", **_HEAD),
    _variant(
        _FINE_RESNET,
        "resnet18-head-cifar10-wrong",
        **{**_HEAD, "trunk_batch_norm": "train"},
        source="what goes wrong when the frozen trunk's batch norms are in training mode",
    ),
)

RECIPES: dict[str, Recipe] = {r.name: r for r in (*_DIGITS, *_CIFAR, *_SELF_SUPERVISED, *_TRANSFER)}


def recipe(name: str) -> Recipe:
    """The recipe called ``name``; LabError with the nearest name if there is none."""
    if name not in RECIPES:
        hint = nearest(name, RECIPES)
        raise LabError(f"unknown recipe {name!r}: {hint + ' ' if hint else ''}(known: {', '.join(RECIPES)})")
    return RECIPES[name]
