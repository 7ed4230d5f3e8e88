"""``convkit explain``: a network by name, an input by its sizes, and what convkit.explain says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from convkit.bench import BenchError
from convkit.bench.nets import factory
from convkit.bench.problems import DTYPES, LAYOUTS
from convkit.bench.timing import short
from convkit.explain import Explanation, explain
from convkit.measure import Task

__all__ = ["run_explain"]

_DEVICES = ("cpu", "cuda")


def run_explain(
    model: str,
    inputs: Sequence[str],
    *,
    device: str = "cpu",
    dtype: str = "f32",
    layout: str = "nchw",
    evaluation: bool = False,
    json_file: str | None = None,
    threads: int | None = None,
) -> Explanation:
    """Explains the network called ``model`` (``module:function``), prints the result, and writes it as JSON if asked.

    ``inputs``: sizes of the tensors that its forward takes, ``8x3x224x224`` each. BenchError for what the person at
    the keyboard can put right, before anything is measured.
    """
    from rich.console import Console

    sizes = [_sizes(text) for text in inputs]
    for option, value, accepted in (
        ("dtype", dtype, DTYPES),
        ("layout", layout, LAYOUTS),
        ("device", device, _DEVICES),
    ):
        if value not in accepted:
            raise BenchError(f"--{option}: got '{value}'; accepts {', '.join(accepted)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: cuda: PyTorch finds no GPU here; take --device cpu")
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise BenchError(f"--json: no folder {Path(json_file).absolute().parent}; make it first")
    if json_file is not None and Path(json_file).is_dir():
        raise BenchError(f"--json: {json_file} is a folder; name a file")
    if threads is not None:
        torch.set_num_threads(threads)
    network = _network(model).train(not evaluation).to(device, DTYPES[dtype], memory_format=LAYOUTS[layout])
    tensors = tuple(_random(size, device, DTYPES[dtype], LAYOUTS[layout]) for size in sizes)

    console = Console(stderr=True)
    with console.status("calling the network …") as status:

        def progress(task: Task) -> None:
            status.update(f"timing {task}".replace("[", r"\["))

        try:
            found = explain(network, tensors, progress=progress)
        except Exception as error:
            if not getattr(error, "__notes__", None):  # the network's own have one, which says what it was called with
                raise
            raise BenchError(f"{model} does not take {' and '.join(inputs)}: {short(error)}") from None
    print(found)
    if json_file is not None:
        Path(json_file).write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found


def _sizes(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", text):
        raise BenchError(f"--input: got '{text}'; accepts sizes of at least 1 with x between them, as in 8x3x224x224")
    return tuple(int(size) for size in text.split("x"))


def _network(text: str) -> nn.Module:
    if not re.fullmatch(r"[\w.]+:[\w.]+", text):
        raise BenchError(f"MODULE:FACTORY: got '{text}'; accepts the like of convkit.lab.models:simplenet")
    made = factory(text)
    if not isinstance(made, nn.Module):
        try:
            made = made()
        except Exception as error:  # the function is the user's and may raise anything
            raise BenchError(f"{text}() failed: {short(error)}") from None
    if not isinstance(made, nn.Module):
        raise BenchError(f"{text}() gave a {type(made).__name__}, not a torch.nn.Module")
    return made


def _random(size: tuple[int, ...], device: str, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    try:
        values = torch.randn(size, generator=torch.Generator().manual_seed(0))
    except (RuntimeError, TypeError) as error:  # sizes beyond any memory, beyond 64 bits
        raise BenchError(f"--input: {'x'.join(map(str, size))}: {short(error)}") from None
    # Other tensors than images have one layout.
    return values.to(device, dtype).to(memory_format=layout if values.dim() == 4 else torch.contiguous_format)
