"""Gradients by the parameters of F and G and by the side inputs, summed over one coupling."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from revnet_core.errors import OutsideTensorError
from revnet_core.partitioned import Uses


class Gradients:
    """The sums so far.

    side: leaves that stand for the side inputs.

    With `uses` the parameters belong to an engine that partitions them (ZeRO-3): its own hooks must see
    each gradient arrive, so backward runs inside and accumulates in .grad, and nothing is returned.
    """

    def __init__(self, side: Sequence[Tensor], uses: Uses | None) -> None:
        self._all_side = side
        self._side = [tensor for tensor in side if tensor.requires_grad]
        self._uses = uses
        self._sums: dict[Tensor, Tensor] = {}

    def of_parameter(self, parameter: nn.Parameter) -> Tensor | None:
        """None where no evaluation used it. Its hooks fire even so, and one that runs after the accumulation reads
        `.grad`, so it then gets zeros."""
        found = self._sums.get(parameter)
        if found is None and parameter.grad is None and getattr(parameter, "_post_accumulate_grad_hooks", None):
            return torch.zeros_like(parameter)
        return found

    def found(self) -> list[Tensor]:
        """The sums themselves."""
        return list(self._sums.values())

    def by_side(self) -> list[Tensor | None]:
        """Of each side input; None for one that needs none or was not used."""
        if not self._uses:
            return [self._sums.get(tensor) for tensor in self._all_side]
        found = [tensor.grad for tensor in self._all_side]
        for tensor in self._all_side:
            tensor.grad = None
        return found

    def collect(
        self,
        net: nn.Module,
        parameters: list[nn.Parameter],
        leaf: Tensor,
        root: "Tensor | GradientEdge",
        d_out: Tensor,
    ) -> Tensor | None:
        """Add the gradients of one evaluation of `net`, whose output is `root`; returns the one by `leaf`."""
        if self._uses:
            self._uses.take(parameters)
            torch.autograd.backward(root, d_out)
            return leaf.grad
        refuse_outside_tensors(net, root, {leaf, *parameters, *self._side})
        with _without_hooks(parameters):
            d_leaf, *rest = torch.autograd.grad(root, [leaf, *parameters, *self._side], d_out, allow_unused=True)
        for tensor, gradient in zip([*parameters, *self._side], rest, strict=True):
            if gradient is None:
                continue
            if tensor in self._sums:
                self._sums[tensor] = self._sums[tensor] + gradient
            else:
                # A gradient may be d_out itself (of a bias of full shape), which is overwritten next.
                shares = gradient.untyped_storage()._cdata == d_out.untyped_storage()._cdata
                self._sums[tensor] = gradient.clone() if shares else gradient
        return d_leaf


def root_of(out: Tensor) -> "Tensor | GradientEdge | None":
    """Where the graph of `out` begins, without its values, so that these can be freed; None where there is no graph."""
    if not out.requires_grad:
        return None
    return out if out.is_leaf else get_gradient_edge(out)


@contextlib.contextmanager
def _without_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters' own hooks see what arrives in the end, and not each share of it."""
    hooked = [(p, p._backward_hooks) for p in parameters if p._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks


def refuse_outside_tensors(net: nn.Module, root: "Tensor | GradientEdge", known: Iterable[Tensor]) -> None:
    """Raise OutsideTensorError when the graph ends in a tensor whose gradient nobody would get."""
    known_ids = {id(tensor) for tensor in known}
    # Of a leaf, the node that accumulates its gradient.
    first = (get_gradient_edge(root) if isinstance(root, Tensor) else root).node
    todo: list[Node | None] = [first]
    seen: set[Node | None] = {None, first}
    while todo:
        node = todo.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known_ids:
            raise OutsideTensorError(
                f"{type(net).__name__} uses a tensor of shape {tuple(variable.shape)} that needs a gradient and is "
                "neither its parameter nor an input. Register it as a parameter of the module, pass it as a side input "
                "(sequence(x, name=tensor)), or detach it."
            )
        children = {child for child, _ in getattr(node, "next_functions", ())} - seen
        seen |= children
        todo.extend(children)
