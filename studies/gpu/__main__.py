"""`python -m studies.gpu BENCHMARK`: measure, print a table, and with --json keep all that was measured."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from harness.errors import HarnessError
from studies.gpu import depth as depth_benchmark
from studies.gpu import everything, imagenet, predictions, steps, train
from studies.gpu.place import device_named
from studies.gpu.results import Result
from studies.gpu.runners import Sizes

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
FAILED, BAD_INPUT = 1, 2

DeviceOption = Annotated[str, typer.Option("--device", help="cuda, or cpu to see the benchmark itself run.")]
SmallOption = Annotated[bool, typer.Option("--small", help="Tiny sizes, which say nothing but that it runs.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write everything measured here.")]
ComputeOption = Annotated[str, typer.Option(help="fp32, tf32 or bf16.")]


@app.command("steps")
def steps_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    json_path: JsonOption = None,
    compute: ComputeOption = "bf16",
    rounds: Annotated[int, typer.Option(min=1, help="Each runs one step of everyone.")] = 50,
) -> None:
    """RevNet-110 at batch 128: a step of each activations, eager and as one graph, beside memcnn and RevTorch."""
    place = device_named(device)
    result = steps.measure(place, steps.SMALL if small else Sizes(), compute, 3 if small else rounds)
    _show(steps.as_text, result, json_path, place, small)


@app.command("measures")
def measures_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    json_path: JsonOption = None,
    compute: ComputeOption = "bf16",
    batch_size: Annotated[int, typer.Option(min=1)] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Each runs one step of everyone.")] = 50,
) -> None:
    """What may make a step of RevNet-110 faster, one by one: channels last, rebuilding ahead, compiled F and G."""
    place = device_named(device)
    sizes = steps.SMALL if small else Sizes(batch_size=batch_size)
    result = steps.measure_measures(place, sizes, compute, 3 if small else rounds)
    _show(steps.as_text, result, json_path, place, small)


@app.command("imagenet")
def imagenet_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    json_path: JsonOption = None,
    compute: ComputeOption = "fp32",
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    measured: Annotated[int, typer.Option(min=1, help="Timed steps of each.")] = 50,
) -> None:
    """ResNet-101 against RevNet-104 at 224 px: activation peak and images per second."""
    place = device_named(device)
    sizes = imagenet.SMALL if small else imagenet.ImageSizes(batch_size=batch_size)
    result = imagenet.measure(place, sizes, compute, 2 if small else measured)
    _show(imagenet.as_text, result, json_path, place, small)


@app.command("depth")
def depth_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    json_path: JsonOption = None,
    memory: Annotated[str, typer.Option(help="What the deepest network has to fit into.")] = "32GiB",
) -> None:
    """RevNets of 1,000 and 10,000 layers train a step; and the deepest that fits, stored and reconstructed."""
    place = device_named(device)
    asked = depth_benchmark.SMALL if small else depth_benchmark.Question(memory=memory)
    result = depth_benchmark.measure(place, asked, lambda so_far: so_far.write(json_path, place) if json_path else None)
    _show(depth_benchmark.as_text, result, json_path, place, small)


@app.command("predictions")
def predictions_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    json_path: JsonOption = None,
    compute: ComputeOption = "fp32",
    minutes: Annotated[float, typer.Option(help="Stop asking for more after so long.")] = 5,
) -> None:
    """The prediction of a step's memory against what the allocator counted, over a table of networks."""
    place = device_named(device)
    result = predictions.measure(place, compute, small=small, seconds=60 * minutes)
    _show(predictions.as_text, result, json_path, place, small)


@app.command("train")
def train_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    out: Annotated[Path, typer.Option(help="Checkpoints, the curve and the result; goes on where it was.")] = Path(
        "runs/train"
    ),
    model: Annotated[str, typer.Option(help=f"One of {', '.join(train.MODELS)}.")] = "revnet38",
    data: Annotated[str | None, typer.Option(help="The folder of CIFAR-10; without it the shipped sample.")] = None,
    steps_in_all: Annotated[int, typer.Option("--steps", min=1, help="Of the whole schedule.")] = 80_000,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long, with a checkpoint.")] = None,
    shorten: Annotated[bool, typer.Option(help="Fit the whole schedule into --minutes.")] = False,
    compute: ComputeOption = "fp32",
    every: Annotated[int, typer.Option(min=1, help="Steps from one test error to the next.")] = 2000,
) -> None:
    """RevNet-38 or ResNet-32 on all of CIFAR-10 with the paper's schedule, each step one graph."""
    place = device_named(device)
    plan = train.Plan(
        model=model,
        data=data,
        steps=steps_in_all,
        compute=compute,
        every=every,
        seconds=None if minutes is None else 60 * minutes,
        shorten=shorten,
    )
    result = train.run(place, train.small(plan) if small else plan, out)
    _show(train.as_text, result, out / "train.json", place, small)


@app.command("study")
def study_command(
    study: Annotated[str, typer.Argument(help="A study file, or the name of a shipped study.")],
    out: Annotated[Path, typer.Option(help="The run directory.")],
    minutes: Annotated[float, typer.Option(help="Start no trial after so long.")] = 60,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many trials, of different strategies.")] = None,
) -> None:
    """A study's trials one after another on this machine, without Ray; again, it runs what has no record."""
    # Here, so that the benchmarks run without what reads a study.
    from studies.gpu.trials import run_study

    finished, planned, failed = run_study(study, out, seconds=60 * minutes, limit=limit)
    typer.echo("\n".join([*failed, f"{finished} of {planned} trials have a record in {out}"]))
    sys.exit(FAILED if failed else 0)


@app.command("all")
def all_command(
    device: DeviceOption = "cuda",
    small: SmallOption = False,
    out: Annotated[Path, typer.Option(help="Below it a folder for this device and day.")] = Path("docs/results"),
    minutes: Annotated[float, typer.Option(help="For everything together.")] = 12,
    data: Annotated[str | None, typer.Option(help="The folder of CIFAR-10.")] = None,
) -> None:
    """The GPU tests, all benchmarks and studies in order of worth, and a summary; what `make gpu` runs."""
    sys.exit(everything.run(device_named(device), out, 60 * minutes, small=small, data=data))


def _show(
    as_text: Callable[[Result], str], result: Result, json_path: Path | None, device: torch.device, small: bool
) -> None:
    if small:
        result.targets = [replace(target, figure=None, reason="tiny sizes") for target in result.targets]
    typer.echo(as_text(result))
    if json_path:
        result.write(json_path, device)


def main() -> None:
    try:
        app()
    except HarnessError as error:
        typer.echo(str(error), err=True)
        sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
