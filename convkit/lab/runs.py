"""Run folders: what a training run leaves behind, and what it goes on from.

``runs/<recipe>-<n>/`` holds

config.json   the recipe, the network and the data
env.json      versions, device, git revision, backend, threads, processes
metrics.csv   one row an epoch
log.txt       the lines that were printed
last.pt       the whole state after the last step that was saved: what going on bitwise needs
best.pt       the weights of the epoch with the best validation metric (of equals, the one with the lower loss)
curves.png    loss and metric over the epochs
result.json   how the run ended: status, best epoch, validation and test error, seconds

Files are replaced atomically: whoever reads one, or comes after a crash or a power cut, finds a whole one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

import convkit
from convkit.info import cpu_name, git_revision
from convkit.lab import LabError, plots, recipes
from convkit.lab.recipes import Recipe

__all__ = [
    "Display",
    "Log",
    "Run",
    "environment",
    "find",
    "load_checkpoint",
    "save_checkpoint",
    "write_atomically",
    "write_json",
]

CHECKPOINT_FORMAT = 2


@dataclasses.dataclass
class Run:
    """A training run and its folder."""

    folder: Path
    recipe: Recipe
    parameters: int
    data: dict[str, Any]
    """What config.json says about the data: name, sizes, fingerprint."""
    metric: str = "accuracy"
    """Name of the objective's score; metrics.csv has it as train_… and val_…."""
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)
    """One row an epoch, the columns of metrics.csv."""
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The contents of result.json; empty while the run is not over."""

    @classmethod
    def create(cls, out: Path, recipe: Recipe, network: dict, data: dict, env: dict, metric: str) -> Run:
        """Makes the folder ``out/<recipe>-<n>`` with the next free n, config.json and env.json."""
        run = cls(_new_folder(out, recipe.name), recipe, network["parameters"], data, metric)
        config = {"recipe": dataclasses.asdict(recipe), "network": network, "data": data, "metric": metric}
        write_json(run.folder / "config.json", config)
        write_json(run.folder / "env.json", env)
        return run

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Run:
        """The run in a folder. LabError if it is none, or one of another version."""
        folder = Path(folder)
        config = _read_json(folder / "config.json")
        result = _read_json(folder / "result.json") if (folder / "result.json").exists() else {}
        try:
            recipe = recipes.from_json(config["recipe"])
            run = cls(folder, recipe, config["network"]["parameters"], config["data"], config["metric"], result=result)
        except (KeyError, TypeError) as error:
            raise LabError(f"{folder / 'config.json'}: not the config of a convkit run ({error!r})") from None
        if (folder / "metrics.csv").exists():
            with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    run.history.append({name: float(value) for name, value in row.items()})
        for row in run.history:
            row.update(epoch=int(row["epoch"]), step=int(row["step"]))
        return run

    @property
    def seconds(self) -> float:
        """Time spent in whole epochs, validation included."""
        return sum(row["seconds"] for row in self.history)

    def best(self) -> dict[str, float]:
        """The row with the best validation metric; of equals the one with the lower loss, then the earlier one."""
        return max(self.history, key=lambda row: (row[f"val_{self.metric}"], -row["val_loss"]))

    def save_history(self) -> None:
        """Writes metrics.csv."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=list(self.history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / "metrics.csv", lambda file: file.write(text.getvalue().encode()))

    def finish(self, status: str, **more: Any) -> None:
        """Draws the curves and writes result.json."""
        self.result = {
            "status": status,
            "recipe": self.recipe.name,
            "model": self.recipe.model,
            "parameters": self.parameters,
            "epochs": len(self.history),
            "seconds": round(self.seconds, 3),
            **more,
        }
        if self.history:
            best = self.best()
            self.result["best_epoch"] = best["epoch"]
            if self.metric == "accuracy":
                self.result["val_error_percent"] = round(100 * (1 - best["val_accuracy"]), 4)
            else:
                self.result[f"val_{self.metric}"] = best[f"val_{self.metric}"]
            self.draw()
        self.save_result()

    def save_result(self, **more: Any) -> None:
        """Adds to the result and writes result.json."""
        self.result |= more
        write_json(self.folder / "result.json", self.result)

    def save_test(self, error: float, loss: float, images: int, **more: Any) -> None:
        """Adds the test error in percent to the result and to the curves."""
        claimed = self.recipe.claimed_error
        self.save_result(
            test_error_percent=error, test_loss=loss, test_images=images, claimed_error_percent=claimed, **more
        )
        self.draw()

    def draw(self) -> None:
        """Writes curves.png, with the test error if there is one."""
        title = f"{self.folder.name}: {self.parameters:,} parameters"
        error = self.result.get("test_error_percent")
        best = self.result["best_epoch"]
        png = plots.curves(self.history, title, metric=self.metric, best_epoch=best, test_error=error)
        write_atomically(self.folder / "curves.png", lambda file: file.write(png))


def find(run: str, out: str | os.PathLike[str] = "runs") -> Run:
    """The finished run that ``run`` names: its folder, that folder's name in ``out``, or the recipe whose newest it is.

    LabError, saying what to type, if there is none.
    """
    for folder in (Path(run), Path(out) / run):
        if (folder / "config.json").exists():
            return Run.open(folder)
    numbered = [(int(n), path) for path in Path(out).glob(f"{run}-*") if (n := path.name[len(run) + 1 :]).isdecimal()]
    for _, folder in sorted(numbered, reverse=True):
        if (folder / "result.json").exists() and _read_json(folder / "result.json").get("status") == "finished":
            return Run.open(folder)
    if run in recipes.RECIPES:
        raise LabError(f"no finished run of {run} in {out}: train it first: convkit train {run}")
    if Path(run).suffix in (".pt", ".pth"):
        raise LabError(f"{run!r}: no such file of weights; name one that is there")
    near = recipes.nearest(run, [path.name for path in Path(out).glob("*-*")] + list(recipes.RECIPES))
    raise LabError(f"{run!r} is neither a run folder nor a recipe with a finished run in {out}{near and '; ' + near}")


# ------------------------------------------------------------------------------------------------ checkpoints, files


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes tensors and plain values (numbers, strings, lists, dicts) atomically."""
    write_atomically(path, lambda file: torch.save({"format": CHECKPOINT_FORMAT, **state}, file))


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


def write_json(path: Path, value: Any) -> None:
    """Writes ``value`` atomically, to be read by people too."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LabError(f"{path.parent}: not a run folder: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise LabError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(value, dict):
        raise LabError(f"{path}: not what convkit writes there")
    return value


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


def environment(backend: str, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What of the machine and the software can change a result: the contents of env.json."""
    env = {
        "convkit": convkit.__version__,
        "git": git_revision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "backend": backend,
    }
    if backend == "convkit":
        from convkit import _C

        env["kernels"] = _C.isa()
    return env


# ----------------------------------------------------------------------------------------------------------- display


class Log(contextlib.AbstractContextManager):
    """log.txt, line by line; ``line`` prints as well.

    While it is open the run folder is taken: LabError if another process is writing to it.
    """

    def __init__(self, path: Path, console: Any) -> None:
        self.file = open(path, "a", encoding="utf-8", buffering=1)
        self.console = console
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise LabError(f"{path.parent}: another process is training this run") from None

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> None:
        self.file.write(text + "\n")

    def line(self, text: str) -> None:
        self.write(text)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Display(contextlib.AbstractContextManager):
    """Progress of one run: a live bar in a terminal, one line an epoch elsewhere; log.txt gets the lines either way."""

    def __init__(self, console: Any, log: Log, run: Run, batches: int, done: int) -> None:
        self.log, self.run, self.epochs = log, run, run.recipe.epochs
        self.bar = None
        if console.is_terminal and not console.quiet:
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description}", style="bold"),
                progress.BarColumn(bar_width=min(max(console.width - 68, 8), 30)),
                progress.TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
                progress.TextColumn("loss {task.fields[loss]:.3f}{task.fields[status]}"),
                progress.TimeElapsedColumn(),
                console=console,
            )
            fields = {"epoch": done // batches + 1, "epochs": self.epochs, "loss": math.nan, "status": ""}
            self.task = self.bar.add_task(run.recipe.name, total=batches * self.epochs, completed=done, **fields)
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(self, loss: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, advance=1, loss=loss)

    def epoch(self, row: dict[str, float]) -> None:
        metric = self.run.metric
        shown = (lambda value: f"{value:.2%}") if metric == "accuracy" else (lambda value: f"{value:.4f}")
        text = (
            f"{self.run.recipe.name}: epoch {row['epoch']:2d}/{self.epochs}  "
            f"train loss {row['train_loss']:.4f} {metric} {shown(row[f'train_{metric}'])}  "
            f"validation loss {row['val_loss']:.4f} {metric} {shown(row[f'val_{metric}'])}  "
            f"{row['seconds']:.2f} s  {row['images_per_second']:,.0f} images/s"
        )
        if self.bar is None:
            self.log.line(text)
            return
        self.log.write(text)
        status = f", validation {shown(row[f'val_{metric}'])}"
        epoch = min(row["epoch"] + 1, self.epochs)
        self.bar.update(self.task, epoch=epoch, loss=row["train_loss"], status=status)
