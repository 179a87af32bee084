"""Backward without stored activations: one autograd function over a whole chain of blocks.

The forward keeps the chain's output and nothing else; the backward walks from the last block to the first.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet_core.chain import ChainRun, Derivative, Evaluator, buffers, derivatives
from revnet_core.errors import DoubleBackwardError
from revnet_core.exactness import Verdict
from revnet_core.gradients import Gradients
from revnet_core.partitioned import Uses, is_partitioned
from revnet_core.walk import modules_of, trained_parameters


def backpropagate(
    run: ChainRun,
    inputs: tuple[Tensor, ...],
    *,
    split_dim: int,
    join: bool,
    judge: Callable[[Verdict], None],
    evaluate: Evaluator | None = None,
) -> tuple[Tensor, ...]:
    """Run the chain so that backward rebuilds what it needs.

    inputs  a tensor that holds both streams in its halves along `split_dim`, or the two streams; in the streams' dtype
    join    whether the output is one tensor or the two streams
    judge   gets the verdict on each exact reconstruction

    Raises DoubleBackwardError, OutsideTensorError and what `judge` raises in the backward.
    """
    side = {name: value for name, value in run.side.items() if isinstance(value, Tensor)}
    parameters = trained_parameters(modules_of(*run.blocks))
    # A partitioned parameter cannot be a function's input.
    uses = Uses(run.nets()) if any(map(is_partitioned, parameters)) else None
    call = _Call(run, split_dim, len(inputs), join, list(side), [] if uses else parameters, uses, judge, evaluate)
    # Without parameters among its inputs the function needs something else to be differentiated by.
    anchor = torch.empty((), device=inputs[0].device, requires_grad=True) if uses else None
    outputs: Any = _Chain.apply(call, *inputs, anchor, *side.values(), *call.parameters)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if uses:
        uses.belong_to(outputs[0].grad_fn)
    return outputs


class _Call(NamedTuple):
    run: ChainRun
    split_dim: int
    inputs: int
    join: bool
    side_names: list[str]
    parameters: list[nn.Parameter]
    uses: Uses | None
    judge: Callable[[Verdict], None]
    evaluate: Evaluator | None


class _Chain(torch.autograd.Function):
    # The gradients come in a list that the backward empties: they would live until its end otherwise.
    boxed_grads_call = True

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Any:
        given, side = list(tensors[: call.inputs]), tensors[call.inputs + 1 :][: len(call.side_names)]
        outputs = call.run.forward(buffers(given, call.split_dim), evaluate=call.evaluate)
        if call.join:
            outputs = (torch.cat(outputs, dim=call.split_dim),)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # Also for autograd's check that nobody changed them before the backward.
        ctx.save_for_backward(*outputs, *side)
        for name in call.side_names:
            del call.run.side[name]
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                "a gradient of a gradient (create_graph=True) cannot pass reconstructed activations. "
                "Set activations='stored' or 'checkpointed' for this sequence."
            )
        call: _Call = ctx.call
        grads: list[Tensor | None] = grad_outputs[0] if isinstance(grad_outputs[0], list) else list(grad_outputs)
        saved = list(ctx.saved_tensors)
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            ctx.maybe_clear_saved_tensors()
        outputs, saved_side = saved[: len(grads)], saved[len(grads) :]
        del saved
        needs_inputs = ctx.needs_input_grad[1 : 1 + call.inputs]
        side = {
            name: tensor.detach().requires_grad_(need)
            for name, tensor, need in zip(
                call.side_names, saved_side, ctx.needs_input_grad[2 + call.inputs :], strict=False
            )
        }
        gradients = Gradients(side.values(), call.uses)
        d1, d2 = derivatives(grads, call.split_dim)
        with call.uses.running() if call.uses else contextlib.nullcontext():
            verdict = call.run.with_side(side).backward(buffers(outputs, call.split_dim), (d1, d2), gradients)
        if verdict is not None:
            call.judge(verdict)
        by_inputs: tuple[Tensor | None, ...] = d1.value, d2.value
        if call.inputs == 1:
            by_inputs = (_joined(d1, d2, call.split_dim) if needs_inputs[0] else None,)
        by_side, by_parameters = map(gradients.of_side, side.values()), map(gradients.of_parameter, call.parameters)
        return None, *by_inputs, None, *by_side, *by_parameters


def _joined(d1: Derivative, d2: Derivative, dim: int) -> Tensor | None:
    known = d1.value if d1.value is not None else d2.value
    if known is None:
        return None
    return torch.cat([torch.zeros_like(known) if d.value is None else d.value for d in (d1, d2)], dim=dim)
