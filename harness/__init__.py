"""From a study to records. In a notebook, `harness.open_run(path)` gives a run as frames and figures."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.notebook import Run as Run
    from harness.notebook import open_run as open_run


def __getattr__(name: str) -> Any:
    # Only when asked for: whatever imports harness.store or harness.record passes through here.
    if name in ("Run", "open_run"):
        import harness.notebook

        return getattr(harness.notebook, name)
    raise AttributeError(f"module 'harness' has no attribute {name!r}")
