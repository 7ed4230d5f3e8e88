"""The ``convkit`` command. What a user can put right is one line on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import sys
from typing import Annotated

from convkit.bench import BenchError
from convkit.lab import LabError, require

try:
    import typer
except ModuleNotFoundError:  # main() says what to install
    typer = None

__all__ = ["app", "main"]


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="One epoch on a few hundred pictures.")] = False,
    data: Annotated[
        str | None,
        typer.Option(help="digits5k or mnist. Default: mnist if the folder CONVKIT_DATA has it, else digits5k."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the run folders.")] = "runs",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the data, instead of each recipe's own.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws initial weights and the order of the pictures.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Train three networks on real digits with convkit's kernels, and time them against PyTorch's."""
    from convkit.lab.demo import run_demo

    run_demo(quick=quick, choice=data, out=out, epochs=epochs, seed=seed, threads=threads)


def info() -> None:
    """Print versions, instruction sets and how convkit was built, for a bug report."""
    from convkit import info as facts

    print(facts.text())


def models(
    glob: Annotated[str, typer.Argument(help="Names to list, with * and ?: 'resnet*'.")] = "*",
    json: Annotated[bool, typer.Option("--json", help="As JSON, with everything that is known.")] = False,
) -> None:
    """List the networks: parameters, multiply-adds for one picture, source, claimed accuracy."""
    from convkit.lab.models.describe import list_models

    list_models(glob, as_json=json)


def describe(
    name: Annotated[str, typer.Argument(help="A network of convkit models.")],
    input: Annotated[
        str | None, typer.Option(metavar="CxHxW", help="Picture, as 3x64x64. Default: what it was designed for.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Show a network layer by layer: shape, parameters and how they come about, multiply-adds, im2col's blow-up."""
    from convkit.lab.models.describe import describe_model

    describe_model(name, input, as_json=json)


def data(
    name: Annotated[
        str,
        typer.Argument(help="digits5k, mnist, fashion_mnist, cifar10, cifar100, or folder:PATH, a sub-folder a class."),
    ],
    augment: Annotated[
        str | None,
        typer.Option(metavar="STEPS", help="For the gallery, as 'pad_crop:4 flip'. Default: each known step alone."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder for the galleries.")] = "gallery",
) -> None:
    """Show what is in a data set (fetched if it is not at hand), and draw pictures of it, plain and augmented."""
    from convkit.lab.data_command import run_data

    run_data(name, augmentation=augment, out=out)


def bench(
    suite: Annotated[
        str | None,
        typer.Option(help="dense, depthwise, batch-norm, nets or all, or several with commas. Default: all."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda if convkit has kernels for it.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="f32, bf16, f16, f64, tf32 (GPU), or several with commas. Default: f32, on a GPU bf16."),
    ] = None,
    layout: Annotated[str | None, typer.Option(help="convkit's: nchw, nhwc, or both (default).")] = None,
    passes: Annotated[
        str | None,
        typer.Option(
            help="fprop, dgrad, wgrad; forward, backward, evaluation (batch norm); training, inference (nets); "
            "several with commas. Default: all."
        ),
    ] = None,
    filter: Annotated[str, typer.Option(help="Names of layers, with * and ?: 'r50_3x3*'.")] = "*",
    problem: Annotated[
        list[str] | None,
        typer.Option(help="A problem of your own, as n8c64h56w56k64r3s3p1; can be given again.", show_default=False),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A network of your own: module:function@NxCxHxW (without @…: 8x3x224x224); can be given again.",
            show_default=False,
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="torch, native (depthwise without oneDNN or cuDNN), compile (torch.compile: seconds a row), im2col, "
            "all, or several with commas. Default: torch, on a GPU with native."
        ),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(help="File for every sample, written after each row. The same command goes on where it stopped."),
    ] = None,
    report: Annotated[str | None, typer.Option(help="Folder for a page with plots and tables.")] = None,
    compare: Annotated[str | None, typer.Option(help="A --json file of before, to show old/new for each row.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few layers of each suite, a few calls each.")] = False,
    in_cache: Annotated[bool, typer.Option("--in-cache", help="Every call on the same memory.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Measure convkit against PyTorch, layer by layer and as whole networks."""
    from convkit.bench.run import run_bench

    run_bench(
        suite=suite,
        device=device,
        dtype=dtype,
        layout=layout,
        passes=passes,
        filter=filter,
        problems=problem or (),
        models=model or (),
        peer_names=peers,
        json=json,
        report=report,
        compare=compare,
        quick=quick,
        in_cache=in_cache,
        threads=threads,
    )


def explain(
    model: Annotated[
        str,
        typer.Argument(metavar="MODULE:FACTORY", help="A function that returns the network; or the network itself."),
    ],
    input: Annotated[
        list[str],
        typer.Option(
            metavar="SIZES",
            help="Its input, random numbers, as 8x3x224x224; again for a second one.",
            show_default=False,
        ),
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of parameters and input: f64, f32, bf16 or f16.")] = "f32",
    layout: Annotated[str, typer.Option(help="Of parameters and input: nchw, or nhwc (channels_last).")] = "nchw",
    evaluation: Annotated[bool, typer.Option("--eval", help="In evaluation mode: forward alone.")] = False,
    json: Annotated[str | None, typer.Option(help="File for all that was found.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Say layer by layer what a network's time goes into, with convkit and with PyTorch."""
    from convkit.explain_command import run_explain

    run_explain(
        model,
        input,
        device=device,
        dtype=dtype,
        layout=layout,
        evaluation=evaluation,
        json_file=json,
        threads=threads,
    )


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe's name; --list shows them.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Other values of its fields: epochs=5 model.norm=group ..."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the recipes; with RECIPE, its fields.")] = False,
    resume: Annotated[str | None, typer.Option(metavar="RUN", help="Go on with a run that did not end.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train so often, with seed, seed + 1, ...")] = 1,
    out: Annotated[str, typer.Option(help="Folder for the run folders.")] = "runs",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write event files as well.")] = False,
) -> None:
    """Train a network by a recipe. Under torchrun, in several processes."""
    from convkit.lab.commands import run_train

    run_train(
        recipe,
        changes or (),
        show=list_,
        resume=resume,
        seeds=seeds,
        out=out,
        device=device,
        threads=threads,
        tensorboard=tensorboard,
    )


def sweep(
    name: Annotated[str, typer.Argument(help="A sweep (learning-rate, optimizer, ...), or a recipe.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FIELD=VALUE]...", help="Of a recipe, one with several: 'batch_size=16|64|256'."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train each so often, with seed, seed + 1, ...")] = 1,
    out: Annotated[str, typer.Option(help="Folder for the run folders.")] = "runs",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Train a recipe with several values of one field; one plot and one table."""
    from convkit.lab.commands import run_sweep

    run_sweep(name, changes or (), seeds=seeds, out=out, device=device, threads=threads)


def eval_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, or recipes: their newest run.")],
    out: Annotated[str, typer.Option(help="Folder in which runs are looked for.")] = "runs",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Test runs: top-1 and top-5 error, confusion matrix, predictions."""
    from convkit.lab.commands import run_eval

    run_eval(runs, out=out, device=device, threads=threads)


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Run folders, or recipes.")],
    out: Annotated[str, typer.Option(help="Folder in which runs are looked for.")] = "runs",
    to: Annotated[str, typer.Option(help="Folder for comparison.png, .csv and .md.")] = "comparison",
) -> None:
    """Put runs side by side: curves, parameters, errors, speed."""
    from convkit.lab.commands import run_compare

    run_compare(runs, out=out, to=to)


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Claims; --list shows them.")] = None,
    full: Annotated[bool, typer.Option("--full/--quick", help="All of them (hours), or the quick ones.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the claims.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Instead of each claim's own number.")] = None,
    out: Annotated[str, typer.Option(help="Folder for the runs and for reproduce.md, .json.")] = "runs/reproduce",
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: as many as torch takes.")] = None,
) -> None:
    """Try what is claimed: claimed, got, verdict. Stopped, the same command goes on where it was."""
    from convkit.lab.reproduce import list_claims, run_reproduce

    if list_:
        list_claims()
    else:
        run_reproduce(names or (), full=full, seeds=seeds, out=out, device=device, threads=threads)


def app() -> typer.Typer:
    """The command with its sub-commands."""
    command = typer.Typer(
        help="Convolution kernels for PyTorch, and a lab of small vision networks on them.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for function in (demo, bench, data, explain, info, models, describe, train, sweep, eval_, compare, reproduce):
        command.command(function.__name__.strip("_"))(function)
    return command


def main(arguments: list[str] | None = None) -> None:
    """Runs the command and exits: 0, 1 for a failed run, 2 for wrong options or data, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without ± or × shows ? instead of failing
    try:
        require("typer", "rich")
        status = typer.main.get_command(app())(args=arguments, prog_name="convkit", standalone_mode=False)
    except (LabError, BenchError) as error:
        _exit(str(error), error.exit_code)
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except OSError as error:  # a full disk, no permission
        _exit(str(error), 1)
    except Exception as error:
        # typer's usage errors; their base class moved from click into typer, the method stayed
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if not message:  # no sub-command: the help has been printed
            sys.exit(2)
        _exit(message, 2)
    sys.exit(status if isinstance(status, int) else 0)


def _exit(message: str, status: int) -> None:
    line = " ".join(message.split("\n"))
    print(f"convkit: {line}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
