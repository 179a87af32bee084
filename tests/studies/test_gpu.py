"""The benchmarks for a GPU, as far as a CPU can run them; their arithmetic, and what becomes of what fails."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from harness.errors import HarnessError
from revnet_core import TrainingStep, graphs
from studies.gpu import depth, everything, imagenet, predictions, steps, train
from studies.gpu.pictures import BORDER, Pictures, augmented, load, shifted
from studies.gpu.place import device_named, set_compute
from studies.gpu.results import Result, Target, markdown
from studies.gpu.runners import measures_of, runners_of
from studies.gpu.summary import Ran, summary
from tests.core.tape import CpuGraphs

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_each_step_is_measured_or_says_why_not() -> None:
    result = steps.measure(CPU, steps.SMALL, "bf16", 2)
    rows = {row["name"]: row for row in result.rows}
    assert list(rows) == [runner.name for runner in runners_of(steps.SMALL, "bf16")]
    for name, row in rows.items():
        if name.endswith("graph"):
            assert "a CUDA graph is of a CUDA device" in row["reason"]
        elif row["package"] is None:
            assert len(row["step_s"]) == 2
        else:
            assert "step_s" in row or "is not installed" in row["reason"]
    assert rows["stored, eager"]["ratio to stored, eager"] == (1, 1, 1)
    assert [target.outcome for target in result.targets] == ["not run", "not run"]
    assert all(name in steps.as_text(result) for name in rows)


def test_each_measure_is_of_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tape, without what a compiler makes of it."""
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    monkeypatch.setattr(steps, "_why_not", lambda runner, device: "left out" if "compiled" in runner.name else None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    result = steps.measure_measures(CPU, steps.SMALL, "fp32", 1)
    measured = [row["name"] for row in result.rows if "step_s" in row]
    assert [row["name"] for row in result.rows if "reason" in row] == [
        "stored, F and G compiled, graph",
        "reconstructed, F and G compiled, graph",
    ]
    x = steps.SMALL.batch(CPU)[0]
    built = {runner.name: runner.build() for runner in measures_of(steps.SMALL, "fp32") if runner.name in measured}
    outputs = [model(x) for name, model in built.items() if not name.startswith("exact")]
    assert len(outputs) == 8
    assert all(torch.allclose(out, outputs[0], atol=1e-5) for out in outputs)


def test_the_networks_of_the_peers_are_ours_with_other_chains() -> None:
    built = {runner.name: runner.build() for runner in runners_of(steps.SMALL, "fp32") if not runner.package}
    x = steps.SMALL.batch(CPU)[0]
    stored, rebuilt = (built[f"{name}, eager"](x) for name in ("stored", "reconstructed"))
    assert torch.allclose(stored, rebuilt, atol=1e-5)
    for runner in runners_of(steps.SMALL, "fp32"):
        if runner.package and not steps._why_not(runner, CPU):
            assert torch.allclose(runner.build()(x), stored, atol=1e-5)


def test_captured_steps_are_compared_with_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tape, which takes longer than the step: the aims are missed, and both figures are there."""
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    monkeypatch.setattr(steps, "_why_not", lambda runner, device: "left out" if runner.package else None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    result = steps.measure(CPU, steps.SMALL, "bf16", 1)
    rows = {row["name"]: row for row in result.rows}
    assert rows[steps.OURS]["pool_bytes"] == 0
    assert all(target.figure is not None and target.outcome in ("met", "missed") for target in result.targets)


def test_the_networks_for_imagenet_are_measured() -> None:
    result = imagenet.measure(CPU, imagenet.SMALL, "fp32", 1)
    assert all(row["activation_peak_bytes"] > 0 and row["images_per_s_eager"] > 0 for row in result.rows)
    stored, rebuilt = result.rows
    assert [target.figure for target in result.targets] == [
        rebuilt[name] / stored[name] for name in ("activation_peak_bytes", "activation_saved_bytes")
    ]
    assert "RevNet-20, reconstructed" in imagenet.as_text(result)


def test_the_prediction_is_held_against_the_allocator() -> None:
    result = predictions.measure(CPU, "fp32", small=True, seconds=60)
    assert [target.outcome for target in result.targets] == ["met", "met"]
    result.rows[0]["peak_error"] = -0.2
    assert predictions._target(result.rows, "peak").outcome == "missed"
    assert not predictions.measure(CPU, "fp32", small=True, seconds=-1).rows


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        # Predicted to end at 602: right; too much, once and for good; too little.
        (602, (602, 614)),
        (590, (590, 602)),
        (10, (None, 482)),
        (640, (638, 650)),
        (10**6, (650, None)),
    ],
)
def test_the_deepest_is_found_from_its_prediction(most: int, expected: tuple[int | None, int | None]) -> None:
    tried: list[int] = []

    def fits(value: int) -> bool:
        tried.append(value)
        return value <= most

    found, too_deep = depth.deepest(range(14, 100_001, 12), lambda value: value, 605, fits)
    assert found is None or found <= most
    assert too_deep is None or too_deep > most
    assert (found, too_deep) == expected, tried


def test_bytes_are_affine_in_depth() -> None:
    tiny = depth.Question(channels=(4, 8, 8), batch_size=2, image_size=8)
    needed = depth.affine(CPU, tiny, "stored")
    assert needed(38) - needed(26) == needed(50) - needed(38) > 0


def test_networks_of_many_layers_train_a_step() -> None:
    asked = depth.Question(
        memory="1MiB", layers=(26,), layer_channels=(2, 2, 2), channels=(4, 8, 8), batch_size=1, image_size=8
    )
    result = depth.measure(CPU, asked)
    assert result.rows[0]["depth"] == 26
    stored, rebuilt = result.rows[1:]
    assert stored["predicted_bytes"] <= 2**20 < stored["predicted_bytes"] * 2
    assert rebuilt["depth"] >= stored["depth"]
    assert "fits 1.0 MiB" in depth.as_text(result)


def test_a_learning_rate_drops_twice() -> None:
    rates = [train.rate_at(step, 80_000) for step in (0, 39_999, 40_000, 59_999, 60_000, 79_999)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def tiny_plan(**changes: object) -> train.Plan:
    return train.Plan(**(vars(train.small(train.Plan())) | changes))  # pyright: ignore[reportArgumentType]


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = train.run(CPU, tiny_plan(every=2, seconds=-1.0), tmp_path)
    assert first.settings["steps_done"] == 2
    assert "the same command goes on" in first.unmeasured["4 of 6 steps"]
    assert train.run(CPU, tiny_plan(every=2), tmp_path).settings["steps_done"] == 6
    with (tmp_path / "curve.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "4", "6"]
    with pytest.raises(HarnessError, match="is of revnet38"):
        train.run(CPU, tiny_plan(model="resnet32"), tmp_path)


def test_only_weights_of_convolutions_and_the_linear_layer_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    decaying, others = train._groups(network)
    assert [p.ndim for p in decaying["params"]] == [4, 2]
    assert [p.ndim for p in others["params"]] == [1, 1, 1, 1]
    assert (decaying["weight_decay"], others["weight_decay"]) == (2e-4, 0)


def test_a_schedule_is_shortened_to_the_time(tmp_path: Path) -> None:
    split = load(None, CPU)
    trainer = train.Trainer(CPU, tiny_plan(steps=1000, seconds=100.0, shorten=True), *split, tmp_path)
    trainer.state.step, trainer.state.seconds = 400, 40.0
    assert trainer._fitted(0.2) == 400 + int(0.85 * 60 / 0.2)
    assert trainer._fitted(0.001) == 1000
    assert trainer._fitted(1e6) == 401
    with pytest.raises(HarnessError, match="--shorten"):
        train.run(CPU, tiny_plan(shorten=True), tmp_path)


def test_images_are_shifted_and_mirrored() -> None:
    images = torch.arange(2 * 3 * 6 * 6.0).view(2, 3, 6, 6) + 1
    still = torch.full((2, 1, 1, 1), BORDER)
    off, on = torch.tensor([False, False]).view(2, 1, 1, 1), torch.tensor([False, True]).view(2, 1, 1, 1)
    assert torch.equal(shifted(images, still, still, off, (6, 6)), images)
    mirrored = shifted(images, still, still, on, (6, 6))
    assert torch.equal(mirrored[0], images[0])
    assert torch.equal(mirrored[1], images[1].flip(-1))
    moved = shifted(images, still - 1, still + 2, off, (6, 6))
    assert torch.equal(moved[:, :, 1:, :4], images[:, :, :5, 2:])
    assert not moved[:, :, 0].any()
    assert not moved[:, :, :, 4:].any()
    with torch.random.fork_rng(devices=[]):
        assert augmented(images).shape == images.shape


def test_a_captured_step_draws_other_images_in_each_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.GRAPHS, "cpu", CpuGraphs)
    images, places = torch.randn(5, 3, 8, 8), torch.arange(5)
    model = Pictures(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = TrainingStep(model, nn.functional.cross_entropy, optimizer, (places, places % 2))
        losses = torch.stack([step((places, places % 2)) for _ in range(8)])
    assert losses.unique().numel() == 8
    assert not any("images" in name for name in model.state_dict())


def test_targets_are_met_missed_or_not_run() -> None:
    assert Target(what="a", most=0.5, figure=0.5).outcome == "met"
    assert Target(what="a", most=0.5, figure=0.51).outcome == "missed"
    assert Target(what="a", most=0.5, reason="no time").in_words == "a: not run: no time"
    assert markdown(["a", "bcd"], [["xyz", "1"]]) == "| a   | bcd |\n| --- | --: |\n| xyz |   1 |"


def test_what_fails_ends_nothing_else_and_stands_in_the_summary(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "results").mkdir()

    def item(name: str, code: str, most_s: float = 60, needs: tuple[str, ...] = ()) -> everything.Item:
        return everything.Item(name=name, arguments=("-c", code), most_s=most_s, needs=needs)

    result = Result(benchmark="b", settings={}, targets=[Target(what="a | b", most=1, figure=2)])
    result.write(tmp_path / "results" / "b.json", CPU)
    items = [
        item("fails", "raise SystemExit('no such kernel')"),
        item("lacks", "pass", needs=("no_such_package",)),
        item("hangs", "import threading; threading.Event().wait()", most_s=1),
        item("works", "print('| table |')"),
    ]
    ran = [everything.run_item(one, 60, tmp_path, CPU) for one in items]
    ran.append(everything.run_item(items[0], 5, tmp_path, CPU))
    assert [one.failed for one in ran] == [True, False, False, False, False]
    outcomes = [one.outcome for one in ran]
    assert outcomes[0] == "failed: no such kernel"
    assert outcomes[1] == "not run: not installed: no_such_package"
    assert outcomes[2].startswith("not run to its end: ended after 1 s")
    assert outcomes[3:] == ["done", "not run: not started: the time was over"]
    machine = json.loads((tmp_path / "results" / "b.json").read_text())
    text = summary(tmp_path, machine, [*ran, Ran("x", "done")], small=True)
    assert "| a \\| b | 2 (at most 1) | missed |" in text
    assert "| fails | 0 | failed: no such kernel |" in text
    assert "no figure in it means anything" in text


def test_everything_is_run_in_order_of_worth(tmp_path: Path) -> None:
    whole = everything.items(tmp_path, torch.device("cuda"), small=False, data="cifar", seconds=3600)
    assert [item.name for item in whole][:3] == ["tests", "steps-bf16", "imagenet-fp32"]
    assert any("cifar" in item.arguments for item in whole)
    without = everything.items(tmp_path, torch.device("cuda"), small=False, data=None, seconds=720)
    assert not any(item.name.startswith("train") for item in without)


def test_without_cuda_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(HarnessError, match=r"--device cuda: PyTorch .*Give --device cpu"):
        device_named("cuda")
    with pytest.raises(HarnessError, match="allowed: cuda, cpu"):
        device_named("tpu")
    with pytest.raises(HarnessError, match="tf32 is a mode of NVIDIA GPUs"):
        set_compute("tf32", CPU)
    command = [sys.executable, "-m", "studies.gpu", "steps", "--device", "tpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "--device tpu; allowed: cuda, cpu.\n"
