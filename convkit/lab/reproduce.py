"""``convkit reproduce``: what others and this package claim, run again, with a verdict.

A claim is data: the recipes it is about, over how many seeds, what is claimed, and the check. Its runs are ordinary run
folders. Those that are finished are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from convkit.lab import LabError, evaluate, experiment, recipes, require, runs
from convkit.lab.commands import print_table, say
from convkit.lab.recipes import Recipe
from convkit.lab.train import Interrupted

__all__ = ["CLAIMS", "Arm", "Claim", "list_claims", "run_reproduce", "table"]

Errors = Mapping[str, Sequence[float]]
"""Of each arm, the test errors in percent of its seeds."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One line of a claim's result."""

    recipe: Recipe
    """``init`` or ``teacher`` can be ``@name``: the run of that arm with the same seed."""
    claimed: float | None = None
    """Test error in percent."""
    measured: bool = True
    """Whether its test error is of interest, or it is there for other arms to build on."""
    one_seed: bool = False
    """Trained once, whatever the number of seeds."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """Something that can turn out false."""

    name: str
    text: str
    source: str
    arms: Mapping[str, Arm]
    check: Callable[[Errors], bool]
    seeds: int = 3
    quick: bool = True


def _mean(errors: Sequence[float]) -> float:
    return experiment.mean_and_std(errors)[0]


def descending(*arms: str) -> Callable[[Errors], bool]:
    """The mean error falls from each arm to the next."""
    return lambda errors: all(_mean(errors[a]) > _mean(errors[b]) for a, b in zip(arms, arms[1:], strict=False))


def at_most(factor: float, arm: str, other: str) -> Callable[[Errors], bool]:
    """The mean error of ``arm`` is at most ``factor`` times that of ``other``."""
    return lambda errors: _mean(errors[arm]) <= factor * _mean(errors[other])


def reaches(limits: Mapping[str, float]) -> Callable[[Errors], bool]:
    """The mean error of every arm is at most so many percent."""
    return lambda errors: all(_mean(errors[arm]) <= limit for arm, limit in limits.items())


def _arm(name: str, recipe: str, *changes: str, claimed: float | None = None, **options: Any) -> Arm:
    """The arm with a recipe under the name of its run folders."""
    changed = recipes.override(recipes.recipe(recipe), changes)
    return Arm(dataclasses.replace(changed, name=name, claimed_error=claimed), claimed, **options)


def _digits_order() -> Claim:
    names = {"FC64": "fc64", "FC256-FC256": "fc256-fc256", "SimpLeNet": "simplenet"}
    arms = {
        title: _arm(f"digits-{name}", f"{name}-digits5k", claimed=recipes.RECIPES[f"{name}-digits5k"].claimed_error)
        for title, name in names.items()
    }
    text = "On 5,000 digits, more layers err less, and convolutions least"
    return Claim("digits-order", text, "measured on the same digits", arms, descending(*names))


def _distillation() -> Claim:
    common = (
        "images=4000 validation_images=1000 epochs=6 batch_size=64 learning_rate=0.05 augment=crop:24+flip"
    ).split()
    student = "cifar-mobilenet-modern"
    arms = {
        "teacher": _arm("distillation-teacher", "cifar-baseline-modern", *common, one_seed=True),
        "plain": _arm("distillation-plain", student, *common),
        "distilled": _arm(
            "distillation-distilled", student, *common, "objective=distill", "teacher=@teacher", "temperature=5"
        ),
    }
    text = "Under one recipe, a MobileNet taught by the baseline errs less than one taught by labels alone"
    return Claim("distillation", text, "TMLSS 2018, vision tutorial", arms, descending("plain", "distilled"), seeds=2)


def _rotation_features() -> Claim:
    arms = {
        "pretext": _arm("rotation-pretext", "small-resnet-digits5k-rotation", measured=False),
        "random": _arm("rotation-random", "small-resnet-digits5k-probe", "init=", claimed=6.6),
        "rotation": _arm("rotation-features", "small-resnet-digits5k-probe", "init=@pretext", claimed=2.9),
        "supervised": _arm("rotation-supervised", "small-resnet-digits5k", claimed=2.4),
    }
    text = "A linear classifier on features that learnt to tell rotations errs at most half as often as on random ones"
    check = at_most(0.5, "rotation", "random")
    return Claim("rotation-features", text, "Gidaris et al., 2018", arms, check, seeds=2)


def _transfer() -> Claim:
    few = "high-digits-finetune"
    arms = {
        "trunk": _arm("transfer-trunk", "low-digits", measured=False),
        "from scratch": _arm("transfer-scratch", few, "init=", "learning_rate=1e-3"),
        "frozen trunk": _arm("transfer-frozen", few, "init=@trunk", "freeze=yes", "learning_rate=1e-3"),
        "fine-tuned": _arm("transfer-finetuned", few, "init=@trunk"),
    }
    text = "With 10 labels a class, a trunk trained on the digits 0 to 4 is ahead of training from scratch on 5 to 9"
    check = descending("from scratch", "fine-tuned")
    return Claim("transfer", text, "Keras, mnist_transfer_cnn", arms, check)


def _mnist() -> Claim:
    names = {"FC64": "fc64", "FC256-FC256": "fc256-fc256", "SimpLeNet": "simplenet"}
    arms = {
        title: _arm(f"mnist-{name}", f"{name}-mnist", claimed=recipes.RECIPES[f"{name}-mnist"].claimed_error)
        for title, name in names.items()
    }
    limits = {"FC64": 3.1, "FC256-FC256": 2.1, "SimpLeNet": 1.0}
    text = "On MNIST the three networks reach the course's errors, to a quarter of a percent"
    return Claim("mnist", text, "UEA CMP-6035B, 2022", arms, reaches(limits), quick=False)


def _chain() -> Claim:
    arms = {
        "baseline": _arm("chain-baseline", "cifar-baseline-modern", claimed=6.0),
        "plain": _arm("chain-mobilenet", "cifar-mobilenet-modern", claimed=13.0),
        "distilled": _arm("chain-distilled", "cifar-mobilenet-distilled-modern", "teacher=@baseline", claimed=8.0),
    }
    text = "On all of CIFAR-10, distilling brings the MobileNet most of the way to the baseline"
    check = descending("plain", "distilled", "baseline")
    return Claim("cifar-chain", text, "TMLSS 2018, vision tutorial", arms, check, seeds=1, quick=False)


def _wide_resnet() -> Claim:
    arms = {"wide shrunk ResNet": _arm("wide-resnet", "wide-resnet-cifar10")}
    text = "A small ResNet reaches 90 % on CIFAR-10, on two cores within an hour"
    check = reaches({"wide shrunk ResNet": 10})
    return Claim("wide-resnet", text, "a mark to beat", arms, check, seeds=1, quick=False)


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        _digits_order(),
        _rotation_features(),
        _transfer(),
        _distillation(),
        _mnist(),
        _wide_resnet(),
        _chain(),
    )
}


def run_reproduce(
    names: Sequence[str] = (),
    *,
    full: bool = False,
    seeds: int | None = None,
    out: str | os.PathLike[str] = "runs/reproduce",
    device: str | None = None,
    threads: int | None = None,
    console: Any = None,
) -> list[dict[str, Any]]:
    """Tries the claims called ``names``, or all quick ones, or with ``full`` all; prints and writes the verdicts.

    Writes ``reproduce.md`` and ``reproduce.json`` into ``out`` after each claim. ``seeds``: instead of each claim's
    own. LabError with exit status 1 at the end if a claim did not hold or could not be run.
    """
    require("rich", "matplotlib")
    from rich.console import Console

    console = console or Console()
    if threads is not None:
        torch.set_num_threads(threads)
    command = " ".join(["convkit reproduce", *(names or ["--full" if full else "--quick"])])
    command += f" --seeds {seeds}" * (seeds is not None) + f" --threads {threads}" * (threads is not None)
    for name in names:
        if name not in CLAIMS:
            hint = recipes.nearest(name, CLAIMS) or f"there are {', '.join(CLAIMS)}"
            raise LabError(f"no claim {name!r}: {hint}")
    chosen = [CLAIMS[name] for name in names] or [claim for claim in CLAIMS.values() if full or claim.quick]
    place = experiment.pick_device(device)
    Path(out).mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for claim in chosen:
        say(console, f"{claim.name}: {claim.text}.")
        results.append(_judged(claim, seeds or claim.seeds, place, Path(out), console))
        _write(results, Path(out), command)
    _print(console, results)
    say(console, f"{Path(out) / 'reproduce.md'}, reproduce.json")
    failed = [result["name"] for result in results if result["verdict"] != "holds"]
    if failed:
        error = LabError(f"{len(failed)} of {len(results)} claims did not hold or were not run: {', '.join(failed)}")
        error.exit_code = 1
        raise error
    return results


def _judged(claim: Claim, seeds: int, device: torch.device, out: Path, console: Any) -> dict[str, Any]:
    """Trains and tests what is not there yet; the entry of reproduce.json."""
    from rich.console import Console

    started = time.perf_counter()
    progress = console if console.is_terminal else Console(quiet=True)  # else hundreds of lines, which log.txt has
    found: dict[str, list[runs.Run]] = {name: [] for name in claim.arms}
    result = {"name": claim.name, "claim": claim.text, "source": claim.source, "seeds": seeds}
    try:
        for seed in range(seeds):
            for name, arm in claim.arms.items():
                if arm.one_seed and seed:
                    continue
                recipe = _with_runs(dataclasses.replace(arm.recipe, seed=seed), found)
                run = experiment.train_recipe(recipe, device, out=out, keep=True, console=progress)
                if arm.measured:
                    error = experiment.test_error(run, device, again=False)
                    say(console, f"  {name}, seed {seed}: test error {error:.2f} %")
                found[name].append(run)
    except Interrupted:
        raise
    except LabError as error:
        say(console, f"  not run: {error}")
        return {**result, "verdict": f"not run: {error}", "arms": {}}
    errors = {
        name: [run.result["test_error_percent"] for run in found[name]]
        for name, arm in claim.arms.items()
        if arm.measured
    }
    arms = {}
    for name, values in errors.items():
        mean, std = experiment.mean_and_std(values)
        arms[name] = {
            "claimed_error_percent": claim.arms[name].claimed,
            "test_errors_percent": values,
            "mean": round(mean, 4),
            "std": round(std, 4) if len(values) > 1 else None,
            "parameters": found[name][0].parameters,
            "training_seconds": [round(run.seconds, 1) for run in found[name]],
            "runs": [run.folder.name for run in found[name]],
            "recipe": _portable(found[name][0].recipe),
        }
    trained = {run.folder: run for group in found.values() for run in group}
    # Of the runs and not of this process: some may have been there before.
    environments = [json.loads((folder / "env.json").read_text(encoding="utf-8")) for folder in trained]
    verdict = "holds" if claim.check(errors) else "does not hold"
    return {
        **result,
        "verdict": verdict,
        "training_seconds": round(sum(run.seconds for run in trained.values()), 1),
        "seconds": round(time.perf_counter() - started, 1),
        "environments": [env for number, env in enumerate(environments) if env not in environments[:number]],
        "arms": arms,
    }


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe's fields, with the runs that it builds on by the names of their folders, wherever these are."""
    fields = dataclasses.asdict(recipe)
    return fields | {field: Path(fields[field]).name for field in ("init", "teacher")}


def _with_runs(recipe: Recipe, found: Mapping[str, Sequence[runs.Run]]) -> Recipe:
    """The recipe with ``@arm`` replaced by that arm's latest run, which has the same seed, or is its only one."""
    changes = {
        field: str(found[value[1:]][-1].folder)
        for field in ("init", "teacher")
        if (value := getattr(recipe, field)).startswith("@")
    }
    return dataclasses.replace(recipe, **changes)


def table(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The ``claims`` of a reproduce.json as a table: heads, then a row a network, claims in their order."""
    rows = [["Claim", "Network", "Claimed error %", "Got", "Seeds", "Verdict", "Training seconds"]]
    for result in results:
        head = [result["verdict"], f"{result.get('training_seconds', '')}"]
        if not result["arms"]:
            rows.append([result["name"], "", "", "", "", *head])
        for name, arm in result["arms"].items():
            claimed = "" if arm["claimed_error_percent"] is None else f"{arm['claimed_error_percent']:g}"
            got = f"{arm['mean']:.2f}" + ("" if arm["std"] is None else f" ± {arm['std']:.2f}")
            first = name == next(iter(result["arms"]))
            count = str(len(arm["test_errors_percent"]))
            rows.append([result["name"] if first else "", name, claimed, got, count, *(head if first else ("", ""))])
    return rows


def _write(results: Sequence[Mapping[str, Any]], out: Path, command: str) -> None:
    head = {"command": command, "date": datetime.date.today().isoformat()}
    runs.write_json(out / "reproduce.json", head | {"claims": list(results)})
    heads, *rows = table(results)
    evaluate.write_table(out / "reproduce.md", heads, rows)


def list_claims(console: Any = None) -> None:
    """Prints the claims."""
    from rich.console import Console

    rows = [
        [claim.name, "quick" if claim.quick else "full", str(claim.seeds), f"{claim.text} ({claim.source})"]
        for claim in CLAIMS.values()
    ]
    print_table(console or Console(), ["Claim", "Part of", "Seeds", "What is claimed, source"], rows, right=(2,))


def _print(console: Any, results: Sequence[Mapping[str, Any]]) -> None:
    heads, *rows = table(results)
    print_table(console, [head.replace(" ", "\n", 1) for head in heads], rows, right=(2, 3, 4, 6))
