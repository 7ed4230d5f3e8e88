"""Objectives: what a network is trained to do with a batch, and how its answers are scored.

An objective is called with the network in training, and its ``evaluate`` in validation and test. Both return an
:class:`Outcome`. Pictures are float (N, C, H, W) in [0, 1], labels int64 (N,) unless an objective says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Classify", "Distill", "Joint", "Objective", "Outcome", "Regress", "Rotate", "rotations", "topk_errors"]


class Outcome(NamedTuple):
    """What an objective makes of one batch."""

    loss: Tensor
    """Mean over the answers, scalar."""
    score: Tensor
    """Sum over the answers of the metric, scalar: of "accuracy", the number of right ones."""
    count: int
    """Number of answers."""


class Objective:
    """What every objective offers; also plain classification by its default :meth:`evaluate`."""

    metric = "accuracy"
    """Name of ``score / count``. Larger is better."""
    views = 1
    """How many differently augmented forms of each training picture it is called with."""

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        """The training loss; ``more_views`` are the same pictures, augmented again, ``views - 1`` times."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Outcome:
        """The loss and the score on pictures that are not augmented, in evaluation mode."""
        return _cross_entropy(model(images), labels)


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Outcome:
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return Outcome(loss, (logits.argmax(1) == labels).sum(), len(labels))


def _weighted_logits(model: nn.Module, images: Tensor) -> list[tuple[Tensor, float]]:
    """The logits in training with their weights in the loss: several in a network with auxiliary heads."""
    outputs = getattr(model, "training_logits", None)
    return [(model(images), 1.0)] if outputs is None else outputs(images)


@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """Cross entropy with the labels.

    ``label_smoothing`` ε moves that much of the target's mass evenly to all classes (Szegedy et al., 2015,
    arXiv:1512.00567, section 7), in training alone.
    """

    label_smoothing: float = 0.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        (logits, weight), *auxiliary = _weighted_logits(model, images)
        outcome = _cross_entropy(logits, labels, self.label_smoothing)
        loss = weight * outcome.loss
        for logits, weight in auxiliary:
            loss = loss + weight * F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return outcome._replace(loss=loss)


@dataclasses.dataclass(frozen=True)
class Distill(Objective):
    """CE(labels, s) + T² · CE(softmax(t / T), s / T), with the logits t of a teacher and s of the student.

    Hinton et al., 2015, arXiv:1503.02531; T² keeps the size of the second term's gradient whatever T is. The teacher is
    in evaluation mode, and no gradient reaches it. ``same_crops=False``: it sees the pictures augmented another time.
    """

    teacher: nn.Module
    temperature: float = 5.0
    same_crops: bool = True

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)

    @property
    def views(self) -> int:
        return 1 if self.same_crops else 2

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        with torch.no_grad():
            targets = (self.teacher(images if self.same_crops else more_views[0]) / self.temperature).softmax(1)
        logits = model(images)
        outcome = _cross_entropy(logits, labels)
        soft = F.cross_entropy(logits / self.temperature, targets)
        return outcome._replace(loss=outcome.loss + self.temperature**2 * soft)


def rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """All four rotations of every square picture: (4N, C, H, W), first all as they are, then by 90°, 180°, 270°
    counter-clockwise; and the number of quarter turns, int64 (4N,).

    ValueError if the pictures are not square.
    """
    if images.shape[-1] != images.shape[-2]:
        raise ValueError(f"images must be square to be rotated by 90°, got {tuple(images.shape)}")
    turned = torch.cat([images.rot90(turns, (2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


@dataclasses.dataclass(frozen=True)
class Rotate(Objective):
    """Tells by how many quarter turns a picture was rotated; the labels are not looked at.

    Gidaris et al., 2018, arXiv:1803.07728: all four rotations of every picture are in the batch, so a batch of N gives
    4N answers. The network has four outputs.
    """

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        return self.evaluate(model, images, labels)

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Outcome:
        turned, turns = rotations(images)
        return _cross_entropy(model(turned), turns)


@dataclasses.dataclass(frozen=True)
class Joint(Objective):
    """Labels and rotations at once: CE(labels) + weight · CE(rotations), with two heads on one embedding.

    The network has, beside ``head``, a ``rotation_head`` with four outputs. The score is that of the labels.
    """

    weight: float = 1.0

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        turned, turns = rotations(images)
        embedded = model.embed(turned)
        outcome = _cross_entropy(model.head(embedded[: len(images)]), labels)
        rotation = F.cross_entropy(model.rotation_head(embedded), turns)
        return outcome._replace(loss=outcome.loss + self.weight * rotation)


@dataclasses.dataclass(frozen=True)
class Regress(Objective):
    """Mean squared error of targets (N,) or (N, D), float, standardised to mean 0 and standard deviation 1.

    The network has D outputs and learns the standardised targets; :meth:`predict` gives the original units. The score
    is R², the part of the targets' variance that is explained: 1 is perfect, 0 is no better than their mean.
    """

    mean: Tensor
    std: Tensor
    metric = "r2"

    @classmethod
    def of(cls, targets: Tensor) -> Regress:
        """Standardises by the mean and the standard deviation of ``targets``, those of the training set."""
        table = targets.reshape(len(targets), -1).double()
        std = table.std(0, correction=0)
        return cls(table.mean(0).float(), torch.where(std > 0, std, 1.0).float())

    def standardize(self, targets: Tensor) -> Tensor:
        """(N,) or (N, D) in original units to (N, D), float32."""
        return (targets.reshape(len(targets), -1).float() - self.mean.to(targets.device)) / self.std.to(targets.device)

    def invert(self, outputs: Tensor) -> Tensor:
        """(N, D) of the network to (N, D) in original units."""
        return outputs * self.std.to(outputs.device) + self.mean.to(outputs.device)

    def predict(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, D) in original units."""
        return self.invert(model(images).float())

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *more_views: Tensor) -> Outcome:
        return self.evaluate(model, images, labels)

    def evaluate(self, model: nn.Module, images: Tensor, labels: Tensor) -> Outcome:
        targets = self.standardize(labels)
        errors = F.mse_loss(model(images).float(), targets, reduction="none").mean(1)
        return Outcome(errors.mean(), (1 - errors).sum().detach(), len(targets))


def topk_errors(logits: Tensor, labels: Tensor, up_to: int = 5) -> list[float]:
    """Top-k errors (0…1) for k = 1 … ``up_to``: the part of the pictures whose label is not among the k likeliest.

    ``logits`` (N, classes), ``labels`` int64 (N,). Of equal logits, those of lower classes are taken as likelier.
    """
    order = logits.argsort(dim=1, descending=True, stable=True)
    rank = (order == labels[:, None]).int().argmax(1)
    return [(rank >= k).double().mean().item() for k in range(1, up_to + 1)]
