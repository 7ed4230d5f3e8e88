"""The training loop, and the run folder that it writes.

``fit(model, data, objective, recipe)`` trains on ``data.train``, keeps the weights that do best on ``data.val``, and
never looks at ``data.test``; :func:`evaluate_test` does, once, with the best weights.

A run folder ``runs/<recipe>-<n>/`` holds

config.json   the recipe, the network and the data
env.json      versions, device, git revision, backend, threads
metrics.csv   one row an epoch
log.txt       the lines that were printed
last.pt       the state after the last whole epoch: weights, optimizer, epoch, random states, history
best.pt       the same of the epoch with the best validation accuracy (of equals, the one with the lower loss)
curves.png    loss and accuracy over the epochs
result.json   how the run ended: status, best epoch, validation and test error, seconds

Files are replaced atomically: whoever reads one, or comes after a crash, finds a whole one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import convkit
from convkit.info import cpu_name, git_revision
from convkit.lab import LabError, plots
from convkit.lab.data import Data, Split, epoch_order
from convkit.lab.models import count_parameters
from convkit.lab.recipes import Recipe

__all__ = [
    "Interrupted",
    "NonFiniteLoss",
    "Outcome",
    "Run",
    "classify",
    "environment",
    "evaluate",
    "evaluate_test",
    "fit",
    "load_checkpoint",
    "make_optimizer",
    "save_checkpoint",
    "write_atomically",
]

CHECKPOINT_FORMAT = 1


class NonFiniteLoss(LabError):
    """The loss became NaN or infinite; the checkpoint from before is kept."""

    exit_code = 1


class Interrupted(LabError):
    """Ctrl-C; the run folder holds everything up to the last whole epoch."""

    exit_code = 130


class Outcome(NamedTuple):
    """What an objective makes of one batch."""

    loss: Tensor
    """Mean over the batch, scalar."""
    correct: Tensor
    """Number of right answers, integer scalar."""
    count: int
    """Number of answers."""


Objective = Callable[[nn.Module, Tensor, Tensor], Outcome]
"""objective(model, pictures in [0, 1] (N, C, H, W), labels (N,)) -> Outcome, in training and evaluation alike."""


def classify(model: nn.Module, images: Tensor, labels: Tensor) -> Outcome:
    """Cross entropy of the logits with the labels."""
    logits = model(images)
    return Outcome(F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum(), len(labels))


@dataclasses.dataclass
class Run:
    """A training run and its folder."""

    folder: Path
    recipe: Recipe
    parameters: int
    history: list[dict[str, float]]
    """One row an epoch, the columns of metrics.csv."""
    result: dict[str, Any]
    """The contents of result.json."""

    @property
    def seconds(self) -> float:
        """Time spent in whole epochs, validation included."""
        return sum(row["seconds"] for row in self.history)

    def save_result(self, **more: Any) -> None:
        """Adds to the result and writes result.json."""
        self.result |= more
        _write_json(self.folder / "result.json", self.result)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over all parameters of the model."""
    makers = {"adam": torch.optim.Adam}
    if recipe.optimizer not in makers:
        raise LabError(f"{recipe.name}: optimizer must be one of {', '.join(makers)}, got {recipe.optimizer!r}")
    maker = makers[recipe.optimizer]
    # fused: one kernel for all parameters instead of some ten a parameter, which small networks feel
    return maker(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, objective: Objective, batch_size: int = 500) -> tuple[float, float]:
    """(mean loss, accuracy in 0…1) of the model in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    loss = correct = count = 0.0
    for images, labels in split.batches(batch_size):
        outcome = objective(model, images, labels)
        loss += outcome.loss.item() * outcome.count
        correct += outcome.correct.item()
        count += outcome.count
    model.train(was_training)
    return loss / count, correct / count


def fit(
    model: nn.Module,
    data: Data,
    objective: Objective,
    recipe: Recipe,
    *,
    out: str | os.PathLike[str] = "runs",
    console: Any = None,
) -> Run:
    """Trains ``model`` in place by ``recipe`` and writes a run folder under ``out``.

    ``model`` and ``data`` are on the same device. ``console`` is a rich Console (a new one if absent): in a terminal it
    shows a live progress bar, elsewhere one line an epoch.

    Raises NonFiniteLoss, or Interrupted on Ctrl-C; either way the folder is complete up to the last whole epoch, and
    result.json says what happened.
    """
    if console is None:
        from rich.console import Console

        console = Console()
    optimizer = make_optimizer(model, recipe)
    run = Run(_new_folder(Path(out), recipe.name), recipe, count_parameters(model), [], {})
    network = {"name": recipe.model, "class": type(model).__name__, "parameters": run.parameters}
    config = {"recipe": dataclasses.asdict(recipe), "network": network, "data": data.describe()}
    _write_json(run.folder / "config.json", config)
    _write_json(run.folder / "env.json", environment(recipe.backend, next(model.parameters()).device))

    with _Log(run.folder / "log.txt", console) as log, _Display(console, log, recipe, len(data.train)) as display:
        # So that there is a checkpoint from before, whatever happens in the first epoch.
        save_checkpoint(run.folder / "last.pt", _state(model, optimizer, recipe, []))
        try:
            for epoch in range(1, recipe.epochs + 1):
                row = _train_epoch(model, data, objective, recipe, optimizer, epoch, display)
                history = [*run.history, row]
                state = _state(model, optimizer, recipe, history)
                if _best(history) is row:
                    save_checkpoint(run.folder / "best.pt", state)
                save_checkpoint(run.folder / "last.pt", state)
                run.history = history  # an epoch counts once last.pt has it, even if Ctrl-C comes in between
                _write_metrics(run)
                display.epoch(row)
        except KeyboardInterrupt:
            display.stop()
            message = (
                f"interrupted in epoch {len(run.history) + 1} of {recipe.epochs}; the {len(run.history)} whole epochs "
                f"before it are in {run.folder}"
            )
            log.write(message)
            _finish(run, "interrupted", message=message)
            raise Interrupted(message) from None
        except NonFiniteLoss as error:
            display.stop()
            message = f"{error}; {run.folder / 'last.pt'} holds the state after epoch {len(run.history)}, before that"
            log.write(message)
            _finish(run, "non-finite loss", message=message)
            raise NonFiniteLoss(message) from None
    _finish(run, "finished")
    return run


def _train_epoch(
    model: nn.Module,
    data: Data,
    objective: Objective,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    display: _Display,
) -> dict[str, float]:
    """One pass over ``data.train`` and one over ``data.val``: a row of metrics.csv.

    Loss and accuracy of training are means over the epoch, taken while the weights move.
    """
    size = recipe.batch_size
    step = (epoch - 1) * math.ceil(len(data.train) / size)  # number of steps done
    learning_rate = optimizer.param_groups[0]["lr"]
    loss = correct = count = 0.0
    started = time.perf_counter()
    model.train()
    for images, labels in data.train.batches(size, epoch_order(len(data.train), recipe.seed, epoch)):
        step += 1
        optimizer.zero_grad(set_to_none=True)
        outcome = objective(model, images, labels)
        value = outcome.loss.item()
        _check_finite(value, "loss", step, learning_rate)  # before the step, which would ruin the weights
        outcome.loss.backward()
        optimizer.step()
        loss += value * outcome.count
        correct += outcome.correct.item()
        count += outcome.count
        display.step(len(labels), value)
    trained = time.perf_counter()
    val_loss, val_accuracy = evaluate(model, data.val, objective)
    _check_finite(val_loss, "validation loss", step, learning_rate)
    return {
        "epoch": epoch,
        "step": step,
        "learning_rate": learning_rate,
        "train_loss": loss / count,
        "train_accuracy": correct / count,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "seconds": time.perf_counter() - started,
        "images_per_second": len(data.train) / (trained - started),
    }


def _check_finite(value: float, what: str, step: int, learning_rate: float) -> None:
    if not math.isfinite(value):
        raise NonFiniteLoss(
            f"the {what} became {value} at step {step} with learning rate {learning_rate:g}; try a smaller one"
        )


def _best(history: list[dict[str, float]]) -> dict[str, float]:
    """The row with the best validation accuracy; of equals the one with the lower loss, then the earlier one."""
    return max(history, key=lambda row: (row["val_accuracy"], -row["val_loss"]))


def _finish(run: Run, status: str, **more: Any) -> None:
    """Draws the curves and writes result.json."""
    run.result = {
        "status": status,
        "recipe": run.recipe.name,
        "model": run.recipe.model,
        "parameters": run.parameters,
        "epochs": len(run.history),
        "seconds": round(run.seconds, 3),
        **more,
    }
    if run.history:
        best = _best(run.history)
        run.result["best_epoch"] = best["epoch"]
        run.result["val_error_percent"] = round(100 * (1 - best["val_accuracy"]), 4)
        _draw(run)
    run.save_result()


def _draw(run: Run) -> None:
    title = f"{run.folder.name}: {run.parameters:,} parameters"
    error = run.result.get("test_error_percent")
    png = plots.curves(run.history, title, best_epoch=run.result["best_epoch"], test_error=error)
    write_atomically(run.folder / "curves.png", lambda file: file.write(png))


def evaluate_test(run: Run, model: nn.Module, data: Data, objective: Objective) -> float:
    """Test error in percent of the run's best weights, which are loaded into ``model``.

    Adds it to result.json and curves.png. This is the one place where ``data.test`` is read.
    """
    checkpoint = load_checkpoint(run.folder / "best.pt")
    model.load_state_dict(checkpoint["model"])
    loss, accuracy = evaluate(model, data.test, objective)
    error = round(100 * (1 - accuracy), 4)
    run.save_result(
        test_error_percent=error,
        test_loss=loss,
        test_images=len(data.test),
        claimed_error_percent=run.recipe.claimed_error,
    )
    _draw(run)
    return error


# ------------------------------------------------------------------------------------------------ checkpoints, files


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, history: list[dict[str, float]]
) -> dict[str, Any]:
    """Everything that going on from here needs. The order of the pictures follows from seed and epoch alone."""
    rng = {"cpu": torch.get_rng_state()}
    device = next(model.parameters()).device
    if device.type == "cuda":
        rng["cuda"] = torch.cuda.get_rng_state(device)
    return {
        "format": CHECKPOINT_FORMAT,
        "convkit": convkit.__version__,
        "recipe": dataclasses.asdict(recipe),
        "epoch": len(history),
        "history": history,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": rng,
    }


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values (numbers, strings, lists, dicts) atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what :func:`save_checkpoint` wrote, onto the CPU, executing no code from the file.

    LabError if the file is missing, damaged or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise LabError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many types: zip, pickle, end of file, runtime
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise LabError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise LabError(f"{path}: not a convkit checkpoint of format {CHECKPOINT_FORMAT}")
    return state


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls ``write(file)`` on a temporary file beside ``path``, then puts it in the place of ``path`` in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # else a power cut can leave the new name with no contents
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _write_metrics(run: Run) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(run.history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.history)
    write_atomically(run.folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))


def _new_folder(out: Path, name: str) -> Path:
    """Makes ``out/<name>-<n>`` with the next free n."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        while True:  # again if another process takes the number between looking and making
            taken = [path.name[len(name) + 1 :] for path in out.glob(f"{name}-*")]
            number = 1 + max((int(n) for n in taken if n.isdecimal()), default=0)
            folder = out / f"{name}-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        reason = error.strerror or error
        raise LabError(f"cannot make a run folder in {out}: {reason}; choose another place for it") from error


def environment(backend: str, device: torch.device) -> dict[str, Any]:
    """What of the machine and the software can change a result: the contents of env.json."""
    env = {
        "convkit": convkit.__version__,
        "git": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "backend": backend,
    }
    if backend == "convkit":
        from convkit import _C

        env["kernels"] = _C.isa()
    return env


# ----------------------------------------------------------------------------------------------------------- display


class _Log(contextlib.AbstractContextManager):
    """log.txt, line by line; ``line`` prints as well."""

    def __init__(self, path: Path, console: Any) -> None:
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        self.console = console

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> None:
        self.file.write(text + "\n")

    def line(self, text: str) -> None:
        self.write(text)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Display(contextlib.AbstractContextManager):
    """Progress of one run: a live bar in a terminal, one line an epoch elsewhere; log.txt gets the lines either way."""

    def __init__(self, console: Any, log: _Log, recipe: Recipe, images: int) -> None:
        self.log, self.recipe = log, recipe
        self.bar = None
        if console.is_terminal:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}", style="bold"),
                progress.BarColumn(bar_width=min(max(console.width - 68, 8), 30)),
                progress.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                progress.TextColumn("loss {task.fields[loss]:.3f}{task.fields[status]}"),
                progress.TimeElapsedColumn(),
                console=console,
            )
            fields = {"epoch": 1, "epochs": recipe.epochs, "loss": math.nan, "status": ""}
            self.task = self.bar.add_task(recipe.name, total=images * recipe.epochs, **fields)
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, images: int, loss: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=images, loss=loss)

    def epoch(self, row: dict[str, float]) -> None:
        text = (
            f"{self.recipe.name}: epoch {row['epoch']:2d}/{self.recipe.epochs}  "
            f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
            f"validation loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}  "
            f"{row['seconds']:.2f} s  {row['images_per_second']:,.0f} images/s"
        )
        if self.bar is None:
            self.log.line(text)
            return
        self.log.write(text)
        status = f", validation {row['val_accuracy']:.1%}"
        epoch = min(row["epoch"] + 1, self.recipe.epochs)
        self.bar.update(self.task, epoch=epoch, loss=row["train_loss"], status=status)
