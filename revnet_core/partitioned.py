"""Parameters that an engine partitions (ZeRO-3), and that get a gradient from more than one evaluation.

Such an engine takes a parameter's gradient away as soon as its hook fires, and expects that once a backward. A chain's
backward evaluates its nets one by one, so a net that is used twice would be taken twice, and one share lost. DeepSpeed
has a flag for this, `ds_grad_is_ready`: while it is False the shares add up in `.grad`.
"""

import weakref
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.autograd.graph import Node, get_gradient_edge

from revnet_core.errors import UnsupportedError
from revnet_core.walk import modules_of, trained_parameters

# Those of forwards whose graph is alive.
_open: "weakref.WeakSet[Uses]" = weakref.WeakSet()
# The chains whose backward runs, the outermost first.
_running: "list[Uses]" = []


def is_partitioned(parameter: nn.Parameter) -> bool:
    """DeepSpeed marks a parameter so; its shape is [0] while its contents are elsewhere."""
    return hasattr(parameter, "ds_id")


def in_order_of_arrival(parameter: nn.Parameter) -> bool:
    """ZeRO 1 and 2 number it so; they put gradients into the buckets that ranks reduce as they come."""
    return hasattr(parameter, "param_idx_in_group")


class Uses:
    """How often the parameters of one chain's nets still get a gradient in the backward that runs."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        self._counts = Counter(p for net in nets for p in trained_parameters(modules_of(net)))
        # A chain within the recompute of another is walked back at once.
        self._left = Counter(self._counts) if _running else Counter[nn.Parameter]()
        self._node: weakref.ref[Node] | None = None
        self._finished_backward: int | None = None
        _open.add(self)

    def belong_to(self, node: Node) -> None:
        """The node of autograd's graph whose backward walks the chain."""
        self._node = weakref.ref(node)

    def start(self) -> None:
        """At the start of the chain's backward. Raises UnsupportedError when a parameter gets a gradient outside of
        chains too."""
        if not _running:
            self._refuse_uses_outside()
            for other in _open:
                other._left = Counter(other._counts if other._will_run() else ())
        self._left = Counter(self._counts)
        _running.append(self)

    def finish(self) -> None:
        """At its end, whatever came of it; again, it does nothing."""
        if self not in _running:
            return
        _running.remove(self)
        self._left.clear()
        self._finished_backward = _backward_id()
        for parameter in self._counts if not _running else ():
            parameter.ds_grad_is_ready = True  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Before one evaluation of a net with these parameters hands their gradients over."""
        for parameter in parameters:
            self._left[parameter] -= 1
            ready = not any(other._left[parameter] for other in _open)
            parameter.ds_grad_is_ready = ready  # pyright: ignore[reportAttributeAccessIssue]

    def _will_run(self) -> bool:
        node = self._node() if self._node and self._finished_backward != _backward_id() else None
        return node is not None and torch._C._will_engine_execute_node(node)  # pyright: ignore[reportAttributeAccessIssue]

    def _refuse_uses_outside(self) -> None:
        for parameter in self._counts:
            if torch._C._will_engine_execute_node(get_gradient_edge(parameter).node):  # pyright: ignore[reportAttributeAccessIssue]
                raise UnsupportedError(
                    f"a parameter of shape {tuple(getattr(parameter, 'ds_shape', parameter.shape))} is used in a "
                    "reversible sequence and outside of all, and ZeRO-3 would lose one of its two gradients. Set "
                    "activations='stored' or 'checkpointed' for this sequence, or use ZeRO 0 to 2."
                )


def _backward_id() -> int:
    return torch._C._current_graph_task_id()  # pyright: ignore[reportAttributeAccessIssue]
