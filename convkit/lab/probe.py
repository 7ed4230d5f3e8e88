"""Weights from elsewhere, and what frozen features are good for: transfer and probes.

A trunk that was trained on one task is used for another in two ways. Fine-tuning loads its weights and trains them all,
with a small learning rate. Probing freezes it and trains a new head on its features: what that head reaches says how
good the features are, above all with few labels (Gidaris et al., 2018, arXiv:1803.07728, section 4).

A frozen trunk must be in evaluation mode. In training mode its batch norms would normalise by the statistics of each
batch and move their running statistics, although no weight changes; ``batch_norm="train"`` shows what comes of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from convkit.lab import LabError, runs
from convkit.lab.augment import Augment
from convkit.lab.data import Data, Split
from convkit.lab.models import Network
from convkit.lab.recipes import nearest

__all__ = ["Features", "Frozen", "load_trunk", "of_layer", "with_features"]

MLP_WIDTH = 200


class Frozen(Network):
    """A frozen ``trunk`` and a new, trainable ``head`` on the output of one of its layers.

    It takes pictures (N, C, H, W), or vectors (N, D) that ``embed`` gave before: training a head does not need the
    trunk again in every epoch. They are standardised, by constants that :func:`with_features` sets.

    ``layer``: a module of the trunk, whose output is flattened; empty for the trunk's own ``embed``. ``shape``:
    (C, H, W) of the pictures. ``batch_norm``: "eval", or "train" to see what goes wrong.
    """

    head_name = "classifier"

    def __init__(
        self,
        trunk: Network,
        classes: int,
        shape: tuple[int, int, int],
        *,
        head: str = "linear",
        layer: str = "",
        batch_norm: str = "eval",
    ) -> None:
        super().__init__(shape, classes)
        self.trunk, self.layer, self.batch_norm = trunk.requires_grad_(False), layer, batch_norm
        self.trunk.eval()
        width = self.features(torch.zeros(1, *shape, device=next(trunk.parameters()).device)).numel()
        # Features of different layers differ in size by orders of magnitude; one learning rate must do for all.
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        hidden = [nn.Linear(width, MLP_WIDTH), nn.ReLU()] if head == "mlp" else []
        self.classifier = nn.Sequential(*hidden, nn.Linear(MLP_WIDTH if hidden else width, classes))
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        if self.batch_norm == "eval":
            self.trunk.eval()
        return self

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return of_layer(self.trunk, self.layer, x)

    def embed(self, x: Tensor) -> Tensor:
        return x if x.dim() == 2 else (self.features(x).flatten(1) - self.mean) / self.std


def of_layer(model: Network, layer: str, images: Tensor) -> Tensor:
    """The output of the module called ``layer`` in ``model``, for pictures (N, C, H, W); of ``embed`` if it is empty.

    LabError if there is no such module, or if the network does not call it.
    """
    if not layer:
        return model.embed(images)
    modules = dict(model.named_modules())
    if layer not in modules:
        top = [name for name, _ in model.named_children()]
        raise LabError(f"layer {layer!r}: no such module; {nearest(layer, modules) or 'there are ' + ', '.join(top)}")
    outputs: list[Tensor] = []
    handle = modules[layer].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        model.embed(images)
    finally:
        handle.remove()
    if not outputs:
        raise LabError(f"layer {layer!r}: embed does not call it as a module; name the one around it")
    return outputs[-1]


@dataclasses.dataclass(frozen=True)
class Features(Split):
    """Vectors in the place of pictures: ``images`` float32 (N, D)."""

    def batches(
        self,
        size: int,
        order: Tensor | None = None,
        *,
        augment: Augment | None = None,
        seed: object = None,
        start: int = 0,
        shard: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As of a :class:`~convkit.lab.data.Split`, without augmentation: that is for pictures."""
        if augment is not None:
            raise ValueError("features cannot be augmented; augment the pictures that they are of")
        order = torch.arange(len(self)) if order is None else order
        rank, processes = shard
        for batch in order.to(self.images.device).split(size)[start:]:
            index = batch[len(batch) * rank // processes : len(batch) * (rank + 1) // processes]
            yield self.images[index], self.labels[index]


@torch.no_grad()
def with_features(model: Frozen, data: Data, batch_size: int = 250) -> Data:
    """``data`` with what ``model.embed`` gives, in evaluation mode, in the place of its train and val pictures.

    The features are standardised by mean and deviation of the training pictures', which ``model`` keeps.
    """
    was_training = model.training
    model.eval()

    def extract(split: Split) -> Tensor:
        return torch.cat([model.features(images).flatten(1) for images, _ in split.batches(batch_size)])

    features = extract(data.train)
    model.mean.copy_(features.mean(0))
    deviation = features.std(0, correction=0)
    model.std.copy_(torch.where(deviation > 0, deviation, 1.0))
    # in place: there can be gigabytes of them
    train = Features(features.sub_(model.mean).div_(model.std), data.train.labels)
    val = Features(extract(data.val).sub_(model.mean).div_(model.std), data.val.labels)
    model.train(was_training)
    return dataclasses.replace(data, train=train, val=val)


def load_trunk(network: Network, source: str, out: str | os.PathLike[str] = "runs") -> None:
    """Loads weights into ``network``; its head keeps its own where the other one's does not fit or is not there.

    ``source``: a run (see :func:`convkit.lab.runs.find`; the best weights), or a file with a state_dict, such as those
    that torchvision publishes. Everything but the head must fit. LabError if it does not, naming what.
    """
    path = Path(source)
    state = _read_state(path) if path.is_file() else runs.load_checkpoint(runs.find(source, out).folder / "best.pt")
    state = state["model"] if state.get("format") == runs.CHECKPOINT_FORMAT else state
    own = network.state_dict()
    of_head = {name for name in (*own, *state) if name.startswith((f"{network.head_name}.", "rotation_head."))}
    fitting = {
        name: value
        for name, value in state.items()
        if name not in of_head or (name in own and own[name].shape == value.shape)
    }
    try:
        missing, unexpected = network.load_state_dict(fitting, strict=False)
    except RuntimeError as error:  # shapes
        raise LabError(f"{source}: weights of another network: {_first_line(error)}") from None
    wrong = sorted(set(missing) - of_head) + sorted(unexpected)
    if wrong:
        what = "lacks" if wrong[0] in own else "has"
        raise LabError(f"{source}: weights of another network: it {what} {wrong[0]} (one of {len(wrong)} such)")


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise LabError(f"{path}: damaged, or not a file of weights ({reason})") from error
    for key in ("state_dict", "model_state_dict"):  # what training scripts wrap them in
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise LabError(f"{path}: not a state_dict: a {type(state).__name__}")
    return state


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n")]
    return lines[1] if len(lines) > 1 else lines[0]
