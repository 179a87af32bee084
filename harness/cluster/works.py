"""What the steps of many trials ask of a device.

Every figure is affine in the batch size and in the depth, so few steps tell of all; see harness/surface.py.
"""

from collections.abc import Sequence

from harness.errors import HarnessError
from harness.forecast import Group, figures_of, groups_of, point_of, shape_of, solve_all
from harness.measure.fakes import first_line
from harness.measure.flops import UncountedError
from harness.measure.work import StepWork, step_work
from harness.models import check_model
from harness.predict import Device
from harness.surface import Figures, Point
from harness.trials import TrialSpec
from revnet_core import UnsupportedError

# Shapes that differ only by their device ask for the same.
_ANY_DEVICE = Device("cuda")


def works_of(trials: Sequence[TrialSpec], *, processes: int | None = None) -> dict[str, StepWork | str]:
    """By id; or why it is not known."""
    groups = groups_of(trials, lambda _: _ANY_DEVICE)
    found = dict(zip((group.shape for group in groups), solve_all(groups, _solve, processes), strict=True))
    works: dict[str, StepWork | str] = {}
    for trial in trials:
        of_shape = found[shape_of(trial, _ANY_DEVICE)]
        works[trial.id] = of_shape if isinstance(of_shape, str) else of_shape[point_of(trial)]
    return works


def _solve(group: Group) -> dict[Point, StepWork] | str:
    def at(trial: TrialSpec) -> Figures:
        return Figures((), step_work(trial))

    example = group.example
    try:
        check_model(example.model, example.depth, example.channels, example.log_scale_gain)
        known = figures_of(group, at)
    except (HarnessError, UnsupportedError, UncountedError) as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - without contents a model may fail in any way; its trial may not
        return f"the model does not run on tensors without contents: {first_line(error)}"
    return {point: StepWork(*known[point].numbers) for point in group.points}
