"""Errors of the reversible core. Each message names the block and says what to do instead."""


class ReversibleError(RuntimeError):
    """Something that a reversible sequence cannot do, or found broken."""


class ShapeError(ReversibleError, ValueError):
    """F or G changed the shape of its stream, or the input does not split in two equal streams."""


class PrecisionError(ReversibleError, ValueError):
    """A precision that does not exist, or that would silently narrow the input."""


class InPlaceError(ReversibleError):
    """F or G changed its input in place in one call and not in another."""


class DoubleBackwardError(ReversibleError):
    """A gradient of a gradient was asked of reconstructed activations."""


class OutsideTensorError(ReversibleError):
    """F or G uses a tensor that needs a gradient and is neither its parameter, its input nor a side input."""


class ReconstructionError(ReversibleError):
    """The exact reconstruction did not give the input back bit for bit."""


class DriftError(ReversibleError):
    """A guard found a rebuilt input further from what the forward saw than it tolerates."""


class CaptureError(ReversibleError):
    """A step cannot be captured as a CUDA graph, or a replay would not do what the step does."""


class ChangedStateError(ReversibleError):
    """A parameter or buffer that a recompute needs was changed or replaced after the forward."""


class UnsupportedError(ReversibleError, ValueError):
    """The network has no such mode; a harness records this as a result."""


class DepthError(ReversibleError, ValueError):
    """The family has no network of this depth."""


class UnknownModelError(ReversibleError, KeyError):
    """No such family."""

    def __str__(self) -> str:
        return str(self.args[0])


class located:
    """A context that puts where it happened in front of the message of a ReversibleError."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ReversibleError):
            raise type(error)(f"{self._prefix}{error}") from None
