# SPDX-License-Identifier: Apache-2.0
"""The command ``cofire``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from cofire.names import near_matches

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Fast kernels for efficient deep learning on PyTorch, and the training methods that stand on them.",
)

SUPPORT_TABLE = ("<!-- support table: make readme -->", "<!-- end of support table -->")


def _fail(message: str) -> typer.Exit:
    typer.echo(message, err=True)
    return typer.Exit(2)


def _choose(kind: str, name: str, known: list[str]) -> str:
    if name in known:
        return name
    raise _fail(f"cofire: no {kind} is called {name!r}{near_matches(name, known)}")


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    readme: Annotated[Path | None, typer.Option(help="Write the support table into this markdown file.")] = None,
) -> None:
    """Which kernel serves which operator here, and why a faster one does not."""
    from cofire.files import fill
    from cofire.info import info as facts
    from cofire.info import markdown_table, print_table

    if readme is not None:
        changed = _sentences(fill, readme, SUPPORT_TABLE, markdown_table().rstrip())
        typer.echo(f"{readme}: {'written' if changed else 'already fresh'}")
    elif as_json:
        typer.echo(json.dumps(facts(), indent=2))
    else:
        print_table()


@app.command()
def bench(
    names: Annotated[list[str] | None, typer.Argument(metavar="[FAMILY]...", help="As --family.")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated (default: all).")] = None,
    quick: Annotated[bool, typer.Option(help="Every operator once, with fewer repeats: a few minutes.")] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this operator; may be repeated.")] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name contains this; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    providers: Annotated[list[str] | None, typer.Option(help="Only this provider; may be repeated.")] = None,
    peer: Annotated[list[Path] | None, typer.Option(help="Compare with the peer of this Python file too.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch (default: its own choice).")] = None,
    pin: Annotated[bool, typer.Option(help="Stay on as many cores as there are threads.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with a run that was stopped.")] = False,
    out: Annotated[Path | None, typer.Option(help="Results file (default: benchmarks/results/<device>.json).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON, without a progress bar.")] = False,
) -> None:
    """Time the operators against the strongest plain torch, each answer checked first.

    A run that is stopped keeps what it has measured; the same command goes on from there.
    """
    from cofire import bench as suite

    families = [_choose("family", f, suite.families()) for f in [*(names or []), *(family or [])]]
    if device not in ("cpu", "cuda"):
        raise _fail(f"cofire: --device must be cpu or cuda, got {device!r}")
    with _stoppable():
        results = _sentences(
            suite.run,
            *(list(dict.fromkeys(families)) or None, quick, op, case, device, providers),
            out=out,
            progress=not as_json,
            peers=peer or (),
            threads=threads,
            pin=pin,
            fresh=fresh,
            announce=lambda text: typer.echo(f"cofire: {text}.", err=True),
        )
    typer.echo(json.dumps(results.to_json(), indent=2) if as_json else results.summary())
    _refused("no number, because cofire's own answer was wrong or the case could not be measured", results.refused)


def _refused(why: str, lines: Sequence[str]) -> None:
    """Say what of a run has no number, and end with exit code 1 if anything has none."""
    if lines:
        typer.echo("\n  ".join([f"cofire: {why}:", *lines]), err=True)
        raise typer.Exit(1)


@app.command("bench-agree")
def bench_agree(
    first: Annotated[Path, typer.Argument(help="A results file.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same machine.")],
    within: Annotated[float, typer.Option(help="Per cent that two times may differ by.")] = 10,
    worst: Annotated[int, typer.Option(help="How many of the rows that differ most to show.")] = 10,
    out: Annotated[Path | None, typer.Option(help="Keep it: benchmarks/results/agreement/<device>.json, say.")] = None,
) -> None:
    """Say how many rows of two runs agree; exit code 1 where it is fewer than nine in ten, or too few were undisturbed."""
    from cofire import bench as suite

    if out is not None and out.resolve() in (first.resolve(), second.resolve()):
        raise _fail(f"cofire: --out must be another file than the two that are compared, got {str(out)!r}")
    both = [_sentences(suite.Results.load, path) for path in (first, second)]
    found = _sentences(suite.agreement, *both, within=within / 100)
    typer.echo(found.text(worst))
    if out is not None:
        typer.echo(f"{_sentences(found.save, out)}: written")
    if not found.enough:
        raise typer.Exit(1)


@app.command("bench-memory")
def bench_memory(
    method: Annotated[list[str] | None, typer.Argument(help="Methods to measure (default: all).")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Results file (default: benchmarks/results/memory/<device>.json).")
    ] = None,
) -> None:
    """Measure the memory of one step of differentiable k-means, each method in a process of its own."""
    from cofire.bench import memory

    with _stoppable():
        found = _sentences(memory.run, method or None, out, announce=lambda text: typer.echo(text, err=True))
    typer.echo(memory.memory_table(found))
    _refused("not measured, because of an error", found.get("refused", ()))


@app.command("bench-growth")
def bench_growth(
    family: Annotated[list[str] | None, typer.Option(help="Only these families.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="Only these operators.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only these methods.")] = None,
    quick: Annotated[bool, typer.Option(help="Only the three smallest sizes of each.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    fresh: Annotated[bool, typer.Option(help="Measure again what the file holds already.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Results file (default: benchmarks/results/growth/<device>.json).")
    ] = None,
) -> None:
    """Measure how time and memory of operators and methods grow with size; a run that was stopped goes on."""
    from cofire.bench import growth

    only = {"families": family, "ops": op, "methods": method}
    options = {"quick": quick, "device": device, "fresh": fresh, "announce": lambda text: typer.echo(text, err=True)}
    with _stoppable():
        found = _sentences(growth.run, out, **only, **options)
    headings, lines = growth.growth_table(found)
    widths = [max(map(len, column)) for column in zip(headings, *lines)]
    for line in (headings, *lines):
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    _refused("not measured, because of an error", found.refused)


@app.command("bench-networks")
def bench_networks(
    family: Annotated[list[str] | None, typer.Option(help="Only the networks of these families.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="A tenth of the training, and fewer rounds.")] = False,
    again: Annotated[bool, typer.Option(help="Measure also what the file holds already.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Results file (default: benchmarks/results/end_to_end/<device>.json).")
    ] = None,
) -> None:
    """Train, convert and time a network for each family: latency, throughput, memory and accuracy."""
    from cofire.bench import end_to_end

    options = {"out": out, "again": again, "announce": lambda text: typer.echo(text, err=True)}
    with _stoppable():
        found = _sentences(end_to_end.run, family or None, device, quick, **options)
    typer.echo(end_to_end.summary(found))
    _refused("not measured, because of an error", found.refused)


@app.command()
def report(
    results: Annotated[list[Path] | None, typer.Argument(help="Results files (default: all that are there).")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, tables and plots.")] = Path("report"),
    readme: Annotated[Path | None, typer.Option(help="Write the summary into this markdown file.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Instead: two files of one machine side by side, the older first.")
    ] = None,
) -> None:
    """Draw tables, plots and a page from results files."""
    from cofire import bench as suite

    for path in _sentences(suite.report, results or suite.results_files(), out, readme, compare):
        typer.echo(path)


@app.command("gpu-check")
def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder of all that is found.")] = Path("gpu-check"),
    seconds: Annotated[float, typer.Option(help="Of this call; the next one goes on.")] = 540.0,
    part: Annotated[list[str] | None, typer.Option(help="Only these parts (--list names them).")] = None,
    family: Annotated[list[str] | None, typer.Option(help="Only these families of operators.")] = None,
    list_parts: Annotated[bool, typer.Option("--list", help="Say what there is to do, and do nothing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Everything but the launches; needs no GPU.")] = False,
    all_kernels: Annotated[
        bool, typer.Option("--all-kernels", help="A dry run compiles every Triton kernel, not a few.")
    ] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Do again what failed, hung or crashed.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what was done in this folder.")] = False,
    archive: Annotated[Path | None, typer.Option(help="Pack the folder into this .tar.gz at the end.")] = None,
) -> None:
    """Build, test, tune and measure on an NVIDIA GPU, in parts bounded in time."""
    from cofire.gpu_check.command import run

    raise typer.Exit(
        run(
            list=list_parts,
            out=out,
            seconds=seconds,
            parts=part,
            families=family,
            dry_run=dry_run,
            all_kernels=all_kernels,
            retry=retry,
            fresh=fresh,
            archive=archive,
        )
    )


@app.command()
def tune(device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda") -> None:
    """Measure this device and keep what is best: tiles of a GPU, on a CPU when sparse layers take which product."""
    from cofire import bench as suite

    typer.echo(_sentences(suite.tune, device, progress=True))


@app.command()
def train(
    method: Annotated[
        str,
        typer.Argument(
            help="What to run: dsnot, dynamicllava, edkm, ftwt, lococo, ofq, qlora, quantize, or shiftaddvit."
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="digits, text (dsnot, edkm, lococo, qlora, quantize), or a folder of images (default: the experiment's own)."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The network (default: one that fits the data).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from.")] = None,
    seeds: Annotated[int, typer.Option(help="Repeats with different seeds.")] = 3,
    epochs: Annotated[int | None, typer.Option(help="Epochs per run (default: the experiment's).")] = None,
    head_lr: Annotated[
        float | None, typer.Option(help="Learning rate of the heads (default: the experiment's).")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of the second training (default: the experiment's).")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Score on a share of the training images, not on the test images.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for results, tables and plots.")] = Path("runs"),
) -> None:
    """Run a method's experiment against its controls, and say which criteria it meets."""
    from cofire.experiments import EXPERIMENTS

    run = EXPERIMENTS[_choose("method", method, sorted(EXPERIMENTS))]
    chosen = {} if data is None else {"data": data}
    _sentences(
        run,
        **chosen,
        model=model,
        weights=weights,
        seeds=seeds,
        epochs=epochs,
        head_lr=head_lr,
        lr=lr,
        validate=validate,
        out=out,
    )


@app.command()
def prune(
    data: Annotated[str, typer.Option(help="digits, text, or a folder of images.")] = "digits",
    model: Annotated[str | None, typer.Option(help="The network (default: one that fits the data).")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights to start the training from.")] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Share of the weights to prune; may be repeated (default: several).")
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(help="N:M: keep N of each M columns (at most N of fewer at the end).")
    ] = None,
    initial: Annotated[str, typer.Option(help="The first mask: wanda, magnitude or sparsegpt.")] = "wanda",
    refine: Annotated[str, typer.Option(help="How it is refined: swap1, dsnot or none.")] = "swap1",
    stop: Annotated[str, typer.Option(help="Of dsnot: decrease, or official (the released loop).")] = "decrease",
    bias_correct: Annotated[bool, typer.Option(help="Correct biases by the mean of the inputs.")] = True,
    seeds: Annotated[int, typer.Option(help="Repeats with different seeds.")] = 1,
    epochs: Annotated[
        int | None, typer.Option(help="Epochs of the dense training (default: the experiment's).")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for results, table and plot.")] = Path("runs"),
) -> None:
    """Prune a trained network without training it again, beside magnitude and Wanda."""
    from cofire.experiments import dsnot

    _sentences(
        dsnot.prune,
        data=data,
        model=model,
        weights=weights,
        sparsities=sparsity or (),
        pattern=pattern,
        initial=initial,
        refine=refine,
        stop=stop,
        bias_correct=bias_correct,
        seeds=seeds,
        epochs=epochs,
        out=out,
    )


@app.command()
def demo(out: Annotated[Path, typer.Option(help="Folder for the page and plots.")] = Path("report")) -> None:
    """Train, gate and time a network on this machine, in about three minutes."""
    from cofire.demo import main as run

    _sentences(run, out)


def _sentences(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Run, and turn the errors of a user's input into a sentence and exit code 2."""
    try:
        return function(*args, **kwargs)
    except FileNotFoundError as error:  # the system's own has a file name, ours has a sentence
        sentence = str(error) if error.filename is None else f"no file {str(error.filename)!r}"
        raise _fail(f"cofire: {sentence}") from error
    except (ValueError, ModuleNotFoundError) as error:
        raise _fail(f"cofire: {error}") from error


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the command with the exit code that shells expect; what runs has said what it leaves."""
    from cofire.bench import resume

    with resume.stoppable():
        try:
            yield
        except KeyboardInterrupt as error:
            raise typer.Exit(resume.stopped(error)[1]) from None


def main() -> None:
    app()


if __name__ == "__main__":
    main()
