"""The training loop.

``fit(model, data, objective, recipe)`` trains on ``data.train``, keeps the weights that do best on ``data.val``, and
never looks at ``data.test``: that is for :mod:`convkit.lab.evaluate`.

What a run comes to is decided by the recipe alone: the order of the pictures and their augmentation follow from the
seed and the epoch, everything else that is drawn (dropout) from a state that is in every checkpoint. So a run that was
killed at any moment goes on from last.pt and ends bitwise as if it had not been.

With several processes (torchrun) each takes its part of every batch, and DistributedDataParallel adds up the gradients:
the result is that of one process with the same batches, to rounding. The exceptions are what is not a sum over the
pictures: batch norm's statistics, each process's own unless the recipe says ``sync_batch_norm``, and dropout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from convkit.bench.timing import heap_kept
from convkit.lab import LabError
from convkit.lab.augment import parse as parse_augment
from convkit.lab.data import Data, Split, epoch_order
from convkit.lab.distributed import SyncBatchNorm, add_up, from_first, processes
from convkit.lab.models import count_parameters
from convkit.lab.objectives import Objective, Outcome
from convkit.lab.recipes import Recipe
from convkit.lab.runs import Display, Log, Run, environment, load_checkpoint, save_checkpoint

__all__ = [
    "Interrupted",
    "NonFiniteLoss",
    "evaluate",
    "fit",
    "make_optimizer",
    "make_schedule",
]

SAVE_SECONDS = 60.0
"""How often last.pt is written within an epoch; at the end of an epoch it always is."""

STEPS_UNREAD = {"cpu": 1, "cuda": 16}
"""After how many steps their losses are read: on a GPU, who reads one waits until all that was asked for is done."""


class NonFiniteLoss(LabError):
    """The loss became NaN or infinite; the checkpoint from before is kept."""

    exit_code = 1


class Interrupted(LabError):
    """Ctrl-C; the run folder holds everything up to the last step, or with several processes, checkpoint."""

    exit_code = 130


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters of the model that are to be trained."""
    decay = recipe.weight_decay
    betas = (recipe.momentum, 0.999)
    # fused: one kernel for all parameters instead of some ten a parameter, which small networks feel
    makers = {
        "sgd": lambda p, lr: torch.optim.SGD(p, lr, weight_decay=decay, fused=True),
        "momentum": lambda p, lr: torch.optim.SGD(p, lr, recipe.momentum, weight_decay=decay, fused=True),
        "nesterov": lambda p, lr: torch.optim.SGD(
            p, lr, recipe.momentum, weight_decay=decay, nesterov=True, fused=True
        ),
        "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr, weight_decay=decay, fused=True),
        "adadelta": lambda p, lr: torch.optim.Adadelta(p, lr, weight_decay=decay),
        "adam": lambda p, lr: torch.optim.Adam(p, lr, betas, weight_decay=decay, fused=True),
        "adamw": lambda p, lr: torch.optim.AdamW(p, lr, betas, weight_decay=decay, fused=True),
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise LabError(f"{recipe.name}: nothing to train: no parameter of the network requires a gradient")
    return makers[recipe.optimizer](parameters, recipe.learning_rate)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, batches: int) -> lr_scheduler.LRScheduler:
    """The recipe's schedule, to be stepped after each of the ``batches`` steps of an epoch; plateau once an epoch, with
    the validation metric."""
    steps = recipe.epochs * batches
    makers = {
        "constant": lambda: lr_scheduler.LambdaLR(optimizer, lambda t: 1.0),
        "step": lambda: lr_scheduler.MultiStepLR(
            optimizer, [round(epochs * batches) for epochs in recipe.milestones], recipe.gamma
        ),
        "inverse_time": lambda: lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + recipe.decay * t)),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", factor=recipe.gamma, patience=recipe.plateau_patience
        ),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, steps),
        "one_cycle": lambda: lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, steps, pct_start=recipe.warm_up, cycle_momentum=False
        ),
    }
    return makers[recipe.schedule]()


def _make_average(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of parameters and buffers, with a shorter memory in the first steps.

    Without that, a short run would end with an average of which the first weights are a good part.
    """

    @torch.no_grad()
    def average(averages: list[Tensor], current: list[Tensor], updates: Tensor | int) -> None:
        keep = min(decay, (1 + int(updates)) / (10 + int(updates)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, current, 1 - keep)
        else:  # a count of batches
            torch._foreach_copy_(averages, current)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    objective: Objective,
    batch_size: int | None = None,
    *,
    precision: str = "f32",
    shard: tuple[int, int] = (0, 1),
    each_batch: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """(mean loss, mean score) of the model in evaluation mode; the model's mode is restored.

    ``shard``: (rank, processes), if the pictures are shared out; every process gets the same result. ``each_batch`` is
    called after each batch.
    """
    was_training = model.training
    model.eval()
    device = _device(model)
    sums = torch.zeros(3, dtype=torch.float64)
    if batch_size is None:  # as many numbers as 500 pictures of 3x32x32, so that large pictures need no more memory
        batch_size = max(1, min(500, 500 * 3 * 1024 // math.prod(split.shape)))
    for images, labels in split.batches(batch_size, shard=shard):
        if len(labels):
            with _autocast(device, precision):
                outcome = objective.evaluate(model, _like(images, model), labels)
            parts = [outcome.loss.item() * outcome.count, outcome.score.item(), outcome.count]
            sums += torch.tensor(parts, dtype=torch.float64)
        each_batch()
    model.train(was_training)
    loss, score, count = add_up(sums, device).tolist()
    return loss / count, score / count


def fit(
    model: nn.Module,
    data: Data,
    objective: Objective,
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] = "runs",
    resume: Run | None = None,
    console: Any = None,
    tensorboard: bool = False,
    save_seconds: float = SAVE_SECONDS,
) -> Run:
    """Trains ``model`` in place by ``recipe`` and writes a run folder under ``out``.

    ``model`` and ``data`` are on the same device. ``resume``: a run that did not end, to go on with in its folder.
    ``console`` is a rich Console (a new one if absent): in a terminal it shows a live progress bar, elsewhere one line
    an epoch. ``tensorboard``: writes an event file into the folder as well. ``save_seconds``: how often last.pt is
    written within an epoch.

    The state of torch's random number generators is set from the recipe's seed. Raises NonFiniteLoss, or Interrupted on
    Ctrl-C; either way the folder is whole, and result.json says what happened.
    """
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise LabError("--tensorboard: the tensorboard package is not installed: type  pip install tensorboard")
    rank, world = processes()
    augment = parse_augment(recipe.augment) if recipe.augment else None
    training = _Training(model, data, objective, recipe, augment)
    if resume is None:
        network = {"name": recipe.model, "class": type(model).__name__, "parameters": count_parameters(model)}
        env = environment(recipe.backend, training.device, world)
        facts = {**data.describe(), "fingerprint": data.fingerprint()}
        run = from_first(lambda: Run.create(Path(out), recipe, network, facts, env, objective.metric))
    else:
        run = resume
        if run.result.get("status") == "finished":
            raise LabError(f"{run.folder}: that run is finished: nothing to go on with")
        if (run.folder / "last.pt").exists():  # else it was killed before the first checkpoint: from the start
            training.load(load_checkpoint(run.folder / "last.pt"), run)
    if console is None or rank:
        from rich.console import Console

        console = Console(quiet=bool(rank))

    with contextlib.ExitStack() as stack:
        if training.device.type == "cpu":
            stack.enter_context(heap_kept())
        log = stack.enter_context(Log(run.folder / "log.txt", console) if rank == 0 else contextlib.nullcontext())
        display = _Silent()
        if rank == 0:
            for left in run.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            done = training.epoch * training.batches + training.batch
            display = stack.enter_context(Display(console, log, run, training.batches, done))
            if resume is not None:
                log.write(f"resumed in epoch {training.epoch + 1}, after {training.batch} of its batches")
                if run.history:  # killed between last.pt and metrics.csv, the latter is an epoch behind
                    run.save_history()
            elif training.own_batch_norms:
                log.line(f"{recipe.name}: batch norms take the statistics of each of the {world} processes' pictures")
        board = stack.enter_context(_tensorboard(run, training)) if tensorboard and rank == 0 else None

        def save(name: str, state: dict[str, Any]) -> None:
            if rank == 0:
                save_checkpoint(run.folder / name, state)

        def stop(status: str, message: str, error: type[LabError]) -> LabError:
            display.stop()
            if rank == 0:
                log.write(message)
                run.finish(status, message=message)
            return error(message)

        try:
            with _interruptible() as check:
                if not (run.folder / "last.pt").exists():
                    # So that there is a checkpoint from before, whatever happens in the first epoch.
                    save("last.pt", training.state(run.history))
                while training.epoch < recipe.epochs and not _stopped_early(run):
                    row = training.run_epoch(
                        display, save_seconds, lambda: save("last.pt", training.state(run.history)), check
                    )
                    history = [*run.history, row]
                    ahead = dataclasses.replace(run, history=history)
                    if ahead.best() is row:
                        save("best.pt", {"recipe": dataclasses.asdict(recipe), **training.best_state()})
                    save("last.pt", training.state(history))
                    run.history = history  # an epoch counts once last.pt has it, whatever happens in between
                    if rank == 0:
                        run.save_history()
                        display.epoch(row)
                    if board is not None:
                        for name, value in row.items():
                            split, _, what = name.partition("_")
                            tag = f"{split}/{what}" if split in ("train", "val") else name
                            board.add_scalar(tag, value, row["epoch"])
        except KeyboardInterrupt:
            message = (
                f"interrupted in epoch {len(run.history) + 1} of {recipe.epochs}; {run.folder} holds the "
                f"{len(run.history)} whole epochs before it and {training.saved} of its {training.batches} batches; "
                f"go on with  convkit train --resume {run.folder}"
            )
            raise stop("interrupted", message, Interrupted) from None
        except NonFiniteLoss as error:
            message = f"{error}; {run.folder / 'last.pt'} holds the state after epoch {len(run.history)}, before that"
            raise stop("non-finite loss", message, NonFiniteLoss) from None
    if rank == 0:
        early = {"stopped_early": True} if len(run.history) < recipe.epochs else {}
        run.finish("finished", **early)
    if world > 1:
        dist.barrier()
    return run


def _stopped_early(run: Run) -> bool:
    """Whether the validation metric has not risen for the recipe's ``patience`` epochs."""
    if not run.recipe.patience or not run.history:
        return False
    values = [row[f"val_{run.metric}"] for row in run.history]
    return len(values) - 1 - values.index(max(values)) >= run.recipe.patience


@contextlib.contextmanager
def _interruptible() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until the function that this yields is called, which then raises KeyboardInterrupt.

    Raised wherever it comes in it could be lost, as Python discards what is raised in destructors and in callbacks of
    weak references. A second Ctrl-C does not wait. Outside of the main thread, or where a program has its own handler
    of the signal, nothing changes.
    """
    waiting = False

    def note(*_: Any) -> None:
        nonlocal waiting
        if waiting:
            raise KeyboardInterrupt
        waiting = True

    def check() -> None:
        if waiting:
            raise KeyboardInterrupt

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield check
        check()
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class _Training:
    """The loop's moving parts, and their state."""

    def __init__(self, model: nn.Module, data: Data, objective: Objective, recipe: Recipe, augment: Any) -> None:
        self.model, self.data, self.objective, self.recipe, self.augment = model, data, objective, recipe, augment
        self.rank, self.world = processes()
        self.device = _device(model)
        # Up to half a batch at an epoch's end is left out: its gradient is a step as long as any and says less, and
        # batch norm's running statistics, which validation uses next, would lean on a handful of pictures.
        self.images, rest = len(data.train), len(data.train) % recipe.batch_size
        if rest < self.images and 2 * rest <= recipe.batch_size:
            self.images -= rest
        self.batches = math.ceil(self.images / recipe.batch_size)
        smallest = self.images % recipe.batch_size or recipe.batch_size
        if smallest < self.world:
            raise LabError(
                f"{recipe.name}: {self.world} processes cannot share a batch of {smallest}, such as "
                f"batch_size={recipe.batch_size} makes of {len(data.train)} pictures: choose another or fewer processes"
            )
        torch.manual_seed(recipe.seed + (self.rank << 44))  # processes draw different dropout
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        if recipe.sync_batch_norm and self.world > 1:
            SyncBatchNorm.convert(model)
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.own_batch_norms = self.world > 1 and not all(isinstance(norm, SyncBatchNorm) for norm in norms)
        self.optimizer = make_optimizer(model, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.batches)
        self.average = _make_average(model, recipe.ema) if recipe.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "f16")
        self.network: nn.Module = _Loss(model, objective)
        if self.world > 1:
            self.network = nn.parallel.DistributedDataParallel(self.network)
        self.epoch = 0  # whole epochs done
        self.batch = 0  # batches done of the next
        self.saved = 0  # of them, those that last.pt has
        self.sums = torch.zeros(3, dtype=torch.float64)  # of them, over all processes: loss, score, answers
        self.learning_rate = math.nan  # of the last of them
        self.seconds = 0.0  # of them
        self.unread: list[tuple[int, float, Tensor]] = []  # steps that are not in sums: number, learning rate, parts
        self.loss = math.nan  # the last one that was read

    # ------------------------------------------------------------------------------------------------------- state

    def state(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """Everything that going on from here needs. Collective: all processes call it."""
        generators = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.device)
        everybodys = [generators]
        if self.world > 1:
            everybodys = [None] * self.world
            dist.all_gather_object(everybodys, generators)
        return {
            "recipe": dataclasses.asdict(self.recipe),
            "epoch": len(history),
            "history": history,
            "batch": self.batch,
            "sums": self.sums,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "scaler": self.scaler.state_dict(),
            "rng": everybodys,
        }

    def load(self, state: dict[str, Any], run: Run) -> None:
        """Puts everything back to where ``state`` was taken."""
        if self.data.fingerprint() != run.data.get("fingerprint"):
            raise LabError(f"{run.folder}: the data are not those that the run started with; see its config.json")
        if len(state["rng"]) != self.world:
            raise LabError(
                f"{run.folder}: the run had {len(state['rng'])} processes and cannot go on exactly with {self.world}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.batch = state["epoch"], state["batch"]
        self.saved = self.batch
        self.sums, self.learning_rate, self.seconds = state["sums"], state["learning_rate"], state["seconds"]
        run.history = state["history"]
        torch.set_rng_state(state["rng"][self.rank]["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"][self.rank]["cuda"], self.device)

    def best_state(self) -> dict[str, Any]:
        """The weights that were validated: the averaged ones, if there are."""
        return {"epoch": self.epoch, "model": self.validated.state_dict()}

    @property
    def validated(self) -> nn.Module:
        return self.average.module if self.average else self.model

    # -------------------------------------------------------------------------------------------------------- loop

    def run_epoch(self, display: Any, save_seconds: float, save: Any, check: Callable[[], None]) -> dict[str, float]:
        """What is left of one pass over ``data.train``, and one over ``data.val``: a row of metrics.csv.

        ``check`` is called after each batch. If it raises KeyboardInterrupt, the state is saved first.
        Loss and score of training are means over the epoch, taken while the weights move.
        """
        number = self.epoch + 1
        before = self.seconds
        started = saved = time.perf_counter()
        stopped = False
        self.model.train()
        for views, labels in self._batches(number):
            self.learning_rate = self.optimizer.param_groups[0]["lr"]
            due = self._step(views, labels, time.perf_counter() - saved > save_seconds)
            display.step(self.loss)
            try:
                check()
            except KeyboardInterrupt:
                if self.world > 1:  # the others may be a batch further or behind
                    raise
                self._read()
                due = stopped = True
            if due:
                self.seconds = before + time.perf_counter() - started
                save()
                self.saved, saved = self.batch, time.perf_counter()
            if stopped:
                raise KeyboardInterrupt
        self._read()
        trained = before + time.perf_counter() - started
        if self.world > 1:  # each has its own running statistics by now; the first one's count, as in every step
            for buffer in self.validated.buffers():
                dist.broadcast(buffer, 0)
        val_loss, val_score = evaluate(
            self.validated,
            self.data.val,
            self.objective,
            precision=self.recipe.precision,
            shard=(self.rank, self.world),
            each_batch=check,
        )
        step = number * self.batches
        _check_finite(val_loss, "validation loss", step, self.learning_rate)
        if isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau):
            self.schedule.step(val_score)
        loss, score, count = self.sums.tolist()
        metric = self.objective.metric
        row = {
            "epoch": number,
            "step": step,
            "learning_rate": self.learning_rate,
            "train_loss": loss / count,
            f"train_{metric}": score / count,
            "val_loss": val_loss,
            f"val_{metric}": val_score,
            "seconds": before + time.perf_counter() - started,
            "images_per_second": self.images / trained,
        }
        self.epoch, self.batch, self.saved, self.sums, self.seconds = number, 0, 0, torch.zeros_like(self.sums), 0.0
        return row

    def _batches(self, number: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """This process's part of the batches of epoch ``number`` that are left: (views of the pictures, labels)."""
        recipe, train = self.recipe, self.data.train
        order = epoch_order(len(train), recipe.seed, number)[: self.images]
        common = {"augment": self.augment, "start": self.batch, "shard": (self.rank, self.world)}
        views = [
            train.batches(recipe.batch_size, order, seed=(recipe.seed, number, view), **common)
            for view in range(self.objective.views)
        ]
        for parts in zip(*views, strict=True):
            yield [_like(images, self.model) for images, _ in parts], parts[0][1]

    def _step(self, views: list[Tensor], labels: Tensor, save: bool) -> bool:
        """One step of the optimizer. Returns whether a process wants to ``save``, and the state now can be."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with _autocast(self.device, self.recipe.precision):
                outcome = Outcome(*self.network(views[0], labels, *views[1:]))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise LabError(
                f"{self.recipe.name}: batch norm cannot work on one picture a process: choose a larger batch_size than "
                f"{self.recipe.batch_size}"
            ) from None
        count = int(outcome.count)
        loss, score = (value.detach().double() for value in (outcome.loss, outcome.score))
        parts = torch.stack([loss * count, score, torch.full_like(loss, count)])
        self.unread.append((self.epoch * self.batches + self.batch + 1, self.learning_rate, parts))
        due = False
        if len(self.unread) >= STEPS_UNREAD[self.device.type]:  # before the step, which a bad loss would ruin
            due = self._read(save)
        # DistributedDataParallel takes the mean over the processes, whose parts can differ by a picture.
        batch = min(self.recipe.batch_size, self.images - self.batch * self.recipe.batch_size)
        self.scaler.scale(outcome.loss * (self.world * len(labels) / batch)).backward()
        if self.recipe.clip_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not isinstance(self.schedule, lr_scheduler.ReduceLROnPlateau):
            self.schedule.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.batch += 1
        return due

    def _read(self, save: bool = False) -> bool:
        """Adds the unread steps of all processes to ``sums``; whether a process wants to ``save``. Collective.

        Raises NonFiniteLoss at the first step whose loss is not finite.
        """
        if not self.unread:
            return False
        mine = torch.stack([parts for *_, parts in self.unread]).flatten().cpu()
        *values, wanted = add_up(torch.cat([mine, torch.tensor([save], dtype=torch.float64)]), self.device)
        for (step, learning_rate, _), parts in zip(self.unread, torch.stack(values).view(-1, 3), strict=True):
            self.loss = (parts[0] / parts[2]).item()
            _check_finite(self.loss, "loss", step, learning_rate)
            self.sums += parts
        self.unread.clear()
        return wanted > 0


class _Loss(nn.Module):
    """Network and objective as one module: DistributedDataParallel watches what goes through its forward alone."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, images: Tensor, labels: Tensor, *more_views: Tensor) -> tuple[Tensor, Tensor, int]:
        return tuple(self.objective(self.model, images, labels, *more_views))


class _Silent:
    """The display of the processes that are not the first."""

    def step(self, loss: float) -> None: ...

    def stop(self) -> None: ...


def _check_finite(value: float, what: str, step: int, learning_rate: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the {what} became {value} at step {step} with learning rate {learning_rate:g}; try a smaller one"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _autocast(device: torch.device, precision: str) -> Any:
    dtype = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def _like(images: Tensor, model: nn.Module) -> Tensor:
    """The pictures in the memory format of the model's convolutions."""
    weights = (p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1)
    if images.dim() == 4 and any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
        return images.contiguous(memory_format=torch.channels_last)
    return images


@contextlib.contextmanager
def _tensorboard(run: Run, training: _Training) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=training.epoch + 1)
    try:
        yield writer
    finally:
        writer.close()
