"""RevNet-38 and ResNet-32 (the paper's layers) on all of CIFAR-10 with the paper's schedule, each step one graph.

80,000 steps of batch 100, SGD with momentum 0.9, learning rate 0.1, a tenth from 40,000 and a hundredth from 60,000 on,
weight decay 2e-4 on weights of convolutions and the linear layer only, images shifted and mirrored. A shorter schedule
has its changes at the same shares. After a stop the same command goes on from the last checkpoint; its draws are others
than would have come.
Source: Gomez et al. 2017, arXiv:1707.04585, and its code.
"""

import csv
import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import HarnessError
from harness.models import loss_of
from revnet_core import Precision, TrainingStep, create_model
from studies.gpu.pictures import Pictures, Split, load
from studies.gpu.place import NO_GRAPHS, set_compute
from studies.gpu.results import Result, Target, markdown

BATCH_SIZE, RATE, MOMENTUM, DECAY = 100, 0.1, 0.9, 2e-4
PUBLISHED_STEPS = 80_000
# Shares of the schedule at which the learning rate becomes a tenth of what it was.
DROPS = (0.5, 0.75)
TEST_BATCH = 500
# So often the host waits for the device, looks at the loss and at the clock.
LOOK = 100
# Steps, behind the first LOOK, whose pace a shortened schedule is fitted to; the share of the time that is theirs.
PACE_STEPS, SPARE = 300, 0.85
# By name: family, depth, published test error in percent; a run's own chance moves the error by a few tenths.
MODELS = {"revnet38": ("gomez_revnet", 38, 7.24), "resnet32": ("gomez_resnet", 32, 7.14)}
CHANCE = 0.4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """steps    of the whole schedule
    every    steps from one test error to the next
    seconds  after which this run stops; None: never
    shorten  fit the schedule into the seconds
    """

    model: str = "revnet38"
    data: str | None = None
    steps: int = PUBLISHED_STEPS
    compute: str = "fp32"
    every: int = 2000
    seconds: float | None = None
    shorten: bool = False
    batch_size: int = BATCH_SIZE
    channels: tuple[int, ...] | None = None


@dataclass
class State:
    """What a checkpoint holds besides the weights; a point of the curve is (step, seconds, rate, loss, error in %)."""

    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float, float, float, float]] = field(default_factory=list)


COLUMNS = ("step", "seconds", "learning_rate", "train_loss", "test_error_percent")


def small(plan: Plan) -> Plan:
    """A handful of steps of a narrow network."""
    return replace(plan, steps=6, every=3, batch_size=4, channels=(4, 8, 8))


def rate_at(step: int, steps: int) -> float:
    return RATE * 0.1 ** sum(step >= share * steps for share in DROPS)


def run(device: torch.device, plan: Plan, out: Path) -> Result:
    """Train until the schedule or the time ends. Raises HarnessError, and DataError for data that is not there."""
    if plan.model not in MODELS:
        raise HarnessError(f"--model {plan.model}; allowed: {', '.join(MODELS)}.")
    if plan.shorten and plan.seconds is None:
        raise HarnessError("--shorten fits the schedule into --minutes. Give those.")
    set_compute(plan.compute, device)
    train, test = load(plan.data, device)
    trainer = Trainer(device, plan, train, test, out)
    reason = trainer.train()
    state = trainer.state
    result = Result(benchmark=f"train-{plan.model}", settings={**asdict(plan), "device": device.type})
    result.rows = [dict(zip(COLUMNS, point, strict=True)) for point in state.curve]
    result.settings |= {"steps_planned": state.steps, "steps_done": state.step, "seconds": state.seconds}
    if device.type != "cuda":
        result.unmeasured["graph"] = NO_GRAPHS
    if reason:
        result.unmeasured[f"{state.steps - state.step} of {state.steps} steps"] = reason
    result.targets = [_target(plan, state, reason)]
    return result


def as_text(result: Result) -> str:
    cells = [
        [
            *(str(row["step"]), f"{row['seconds']:.0f}", f"{row['learning_rate']:g}"),
            *(f"{row['train_loss']:.4f}", f"{row['test_error_percent']:.2f}"),
        ]
        for row in result.rows
    ]
    headings = ["step", "s", "rate", "train loss", "test error %"]
    return "\n".join([markdown(headings, cells), "", *result.closing_lines()])


class Trainer:
    def __init__(self, device: torch.device, plan: Plan, train: Split, test: Split, out: Path) -> None:
        self._device, self._plan, self._train, self._test, self._out = device, plan, train, test, out
        self.state = State(steps=plan.steps)
        family, depth, _ = MODELS[plan.model]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._network = create_model(
                family, num_classes=10, depth=depth, channels=plan.channels, precision=Precision(plan.compute)
            ).to(device)
        self._optimizer = torch.optim.SGD(_groups(self._network), lr=RATE, momentum=MOMENTUM)
        self._resume()
        self._batches = len(train.labels_N) // plan.batch_size
        example = torch.zeros(plan.batch_size, dtype=torch.long, device=device)
        model = Pictures(self._network, train.images_NCHW).train()
        graph = device.type == "cuda"
        self._step = TrainingStep(model, loss_of, self._optimizer, (example, example), cuda_graph=graph)

    def train(self) -> str | None:
        """Until the end, or for the reason that is returned."""
        plan, state = self._plan, self.state
        start_s, before_s = time.perf_counter(), state.seconds
        order, epoch = torch.empty(0), -1
        labels = self._train.labels_N
        shortened, paced_s = not plan.shorten or state.step > 0, 0.0
        first = state.step
        self._network.train()
        while state.step < state.steps:
            if state.step // self._batches != epoch:
                epoch = state.step // self._batches
                order = self._order(epoch)
            places = order[state.step % self._batches]
            for group in self._optimizer.param_groups:
                group["lr"] = rate_at(state.step, state.steps)
            loss = self._step((places, labels[places]))
            state.step += 1
            ends = state.step % plan.every == 0 or state.step == state.steps
            if not ends and state.step % LOOK:
                continue
            value = loss.item()
            state.seconds = before_s + time.perf_counter() - start_s
            if not math.isfinite(value):
                return f"the loss of step {state.step} is {value}"
            over = plan.seconds is not None and state.seconds - before_s > plan.seconds
            if ends or over:
                self._keep(value, start_s, before_s)
            if over and state.step < state.steps:
                return f"{plan.seconds:.0f} s were over; the same command goes on"
            if state.step == first + LOOK:
                paced_s = state.seconds
            if not shortened and state.step == first + LOOK + PACE_STEPS:
                shortened = True
                state.steps = self._fitted((state.seconds - paced_s) / PACE_STEPS)
        return None

    def _fitted(self, step_s: float) -> int:
        assert self._plan.seconds is not None
        left = int(SPARE * (self._plan.seconds - self.state.seconds) / step_s)
        return max(self.state.step + 1, min(self._plan.steps, self.state.step + left))

    def _order(self, epoch: int) -> Tensor:
        """Places in the training set, a row for each batch; what does not fill one is left for other epochs."""
        draws = torch.Generator().manual_seed(epoch)
        count = self._batches * self._plan.batch_size
        order = torch.randperm(len(self._train.labels_N), generator=draws)[:count]
        return order.view(self._batches, -1).to(self._device)

    def _keep(self, loss: float, start_s: float, before_s: float) -> None:
        self._step.raise_if_inexact()
        error = 100 * self.test_error()
        state = self.state
        state.seconds = before_s + time.perf_counter() - start_s
        state.curve.append((state.step, state.seconds, rate_at(state.step - 1, state.steps), loss, error))
        self._out.mkdir(parents=True, exist_ok=True)
        with (self._out / "curve.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *state.curve])
        checkpoint = {
            "model": self._plan.model,
            "compute": self._plan.compute,
            "state": asdict(state),
            "network": self._network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(checkpoint, self._out / "checkpoint.new")
        (self._out / "checkpoint.new").replace(self._out / "checkpoint.pt")

    def test_error(self) -> float:
        """Of all test images, as a share."""
        self._network.eval()
        wrong = torch.zeros((), dtype=torch.long, device=self._device)
        with torch.no_grad():
            for x, labels in zip(*(part.split(TEST_BATCH) for part in self._test), strict=True):
                wrong += (self._network(x).argmax(1) != labels).sum()
        self._network.train()
        return wrong.item() / len(self._test.labels_N)

    def _resume(self) -> None:
        path = self._out / "checkpoint.pt"
        if not path.exists():
            return
        saved: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
        asked = (self._plan.model, self._plan.compute)
        if (saved["model"], saved["compute"]) != asked:
            raise HarnessError(f"{path}: is of {saved['model']} in {saved['compute']}. Give another --out.")
        self._network.load_state_dict(saved["network"])
        self._optimizer.load_state_dict(saved["optimizer"])
        state = State(**saved["state"])
        # A shortened schedule stays as it was fitted.
        self.state = state if self._plan.shorten else replace(state, steps=self._plan.steps)


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    weights = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    decaying = set(map(id, weights))
    others = [p for p in network.parameters() if id(p) not in decaying]
    return [{"params": weights, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]


def _target(plan: Plan, state: State, reason: str | None) -> Target:
    published = MODELS[plan.model][2]
    what = f"test error of {plan.model} in percent (published: {published})"
    most = published + CHANCE
    if reason is None and plan.data is None:
        reason = "trained on the shipped sample of test images; give --data"
    elif reason is None and state.steps < PUBLISHED_STEPS:
        reason = f"the schedule had {state.steps} steps; the error was {state.curve[-1][-1]:.2f}"
    return Target(what=what, most=most, reason=reason, figure=None if reason else state.curve[-1][-1])
