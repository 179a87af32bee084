"""A trial that shares its cores and its GPU with others: which of its figures are then not its own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.training import Result

# Besides those whose name ends in `_s`: what is reckoned from times, and what a GPU says of all who use it.
_OF_TIMES = ("mfu", "hfu", "measuring_time_ratio")
_OF_THE_DEVICE = ("device_used_bytes",)
# The maker's, not measured.
_CONSTANT = ("device_peak_flops_per_s",)
_TIMES_IN_TRACE = ("step_s", "communication_s")


def withhold_shared(result: "Result", trials_per_device: int) -> None:
    """Take out of a trial's result what others have a part in, and say why. Nothing, of one that shares nothing."""
    if trials_per_device == 1:
        return
    which = f"resources.trials_per_device is {trials_per_device}"
    reason = f"{which}: other trials may have run on the same cores and GPU meanwhile"
    others = _OF_TIMES + (_OF_THE_DEVICE if result.device.type == "cuda" else ())
    for name in list(result.metrics):
        if (name.endswith("_s") and name not in _CONSTANT) or name in others:
            del result.metrics[name]
            result.unmeasured[name] = reason
    result.trace[:] = [row for row in result.trace if row.name not in _TIMES_IN_TRACE]
