"""Interrupts (Ctrl-C, and Ray's cancelling of a task) that come only where they leave nothing half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def kept_interrupts() -> Iterator[Callable[[], None]]:
    """Within the block SIGINT interrupts nothing. Who calls what is yielded gets the KeyboardInterrupt of one that came
    meanwhile; of one that nobody asked for it is raised at the end. In another than the main thread, where none is
    ever raised, this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = False

    def keep(*_: object) -> None:
        nonlocal came
        came = True

    def give() -> None:
        nonlocal came
        if came:
            came = False
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, keep)
    try:
        yield give
    finally:
        signal.signal(signal.SIGINT, before)
    give()
