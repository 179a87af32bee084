"""Steps that a CUDA graph could not hold, and beside each one what looks like it and can be captured."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Action = Callable[["Acting", Tensor], Tensor]


class Acting(nn.Module):
    """Does what it is told, with things of every kind at hand."""

    mask: Tensor
    indices: Tensor
    mean: Tensor
    last: Tensor

    def __init__(self, action: Action) -> None:
        super().__init__()
        self.action = action
        self.weight = nn.Parameter(torch.ones(4))
        self.host = torch.tensor(0.5)
        self.hidden = torch.zeros(4, device="meta")
        self.calls = 0
        self.past: list[Tensor] = []
        self.register_buffer("mask", torch.ones(4, dtype=torch.bool))
        self.register_buffer("indices", torch.ones(4, dtype=torch.long))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.action(self, x_NC * self.weight)


def and_then(value: Any, x: Tensor) -> Tensor:
    return x


def in_place(change: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    changed = x.clone()
    change(changed)
    return changed


# What is done, the operation by which it is known, and what looks like it and can be captured.
CASES: dict[str, tuple[Action, str, Action]] = {
    "item": (lambda m, x: x * x.sum().item(), "aten._local_scalar_dense", lambda m, x: x * x.sum()),
    "float": (lambda m, x: x * float(x.detach().sum()), "aten._local_scalar_dense", lambda m, x: x * float(x.shape[0])),
    "branch": (
        lambda m, x: x if x.sum() > 0 else -x,
        "aten._local_scalar_dense",
        lambda m, x: torch.where(x.sum() > 0, x, -x),
    ),
    "python branch": (
        lambda m, x: x if bool(m.mask.all()) else -x,
        "aten._local_scalar_dense",
        lambda m, x: x if x.shape[0] > 0 and m.training else -x,
    ),
    "contains": (lambda m, x: x * (1.0 in x), "aten._local_scalar_dense", lambda m, x: x * (x == 1.0).any()),
    "is_nonzero": (
        lambda m, x: x * torch.is_nonzero(x.sum()),
        "aten._local_scalar_dense",
        lambda m, x: x * (x.sum() != 0),
    ),
    "equal": (lambda m, x: x * torch.equal(x, x), "aten.equal", lambda m, x: x * x.eq(x)),
    "allclose": (lambda m, x: x * torch.allclose(x, x), "aten.allclose", lambda m, x: x * torch.isclose(x, x)),
    "checked inverse": (
        lambda m, x: x @ torch.linalg.inv(x.T @ x),
        "aten._linalg_check_errors",
        lambda m, x: x @ torch.linalg.inv_ex(x.T @ x).inverse,
    ),
    "nonzero": (
        lambda m, x: x + x.nonzero().sum(),
        "aten.nonzero",
        lambda m, x: x + torch.nonzero_static(x, size=3).sum(),
    ),
    "masked_select": (
        lambda m, x: x + torch.masked_select(x, m.mask).sum(),
        "aten.masked_select",
        lambda m, x: x + x.masked_fill(~m.mask, 0.0).sum(),
    ),
    "unique": (lambda m, x: x + x.unique().sum(), "aten._unique2", lambda m, x: x + x.sort().values),
    "boolean mask": (lambda m, x: x + x[:, m.mask].sum(), "aten.index", lambda m, x: x[:, m.indices]),
    "uint8 mask": (
        lambda m, x: x + x[:, m.mask.to(torch.uint8)].sum(),
        "aten.index",
        lambda m, x: x.gather(1, m.indices.expand_as(x)),
    ),
    "set by mask": (
        lambda m, x: in_place(lambda c: c.__setitem__(x > 0, x[x > 0]), x),
        "aten.index_put_",
        lambda m, x: in_place(lambda c: c.__setitem__(x > 0, 0.0), x),
    ),
    "set by mask to a tensor": (
        lambda m, x: in_place(lambda c: c.__setitem__(x > 0, x.sum()), x),
        "aten.index_put_",
        lambda m, x: x.masked_fill(x > 0, 1.0) + torch.where(x > 0, x.sum(), x),
    ),
    "set by indices": (
        lambda m, x: in_place(lambda c: c.__setitem__((0, m.indices), 1.0), x),
        "aten.index_put_",
        lambda m, x: in_place(lambda c: c.__setitem__((0, m.indices), x[1]), x).index_fill(1, m.indices, 1.0),
    ),
    "set one element": (
        lambda m, x: in_place(lambda c: c.__setitem__((0, 0), 1.0), x),
        "aten.copy_",
        lambda m, x: in_place(lambda c: (c.__setitem__(0, 1.0), c.__setitem__((0, 0), x[1, 1])), x),
    ),
    "repeat_interleave": (
        lambda m, x: x + x.repeat_interleave(m.indices, dim=1).sum(),
        "aten.repeat_interleave",
        lambda m, x: x + x.repeat_interleave(m.indices, dim=1, output_size=4),
    ),
    "one_hot": (
        lambda m, x: x + F.one_hot(m.indices).sum(),
        "aten._local_scalar_dense",
        lambda m, x: x + F.one_hot(m.indices, 4).sum(),
    ),
    "cpu": (lambda m, x: and_then(x.detach().cpu(), x), "aten._to_copy", lambda m, x: x.detach().clone() + x),
    "to cpu": (lambda m, x: and_then(x.to("cpu"), x), "aten._to_copy", lambda m, x: x.to(torch.float64).float()),
    "copied to host": (
        lambda m, x: and_then(torch.empty(3, 4).copy_(x.detach()), x),
        "aten.copy_",
        lambda m, x: torch.empty_like(x).copy_(x),
    ),
    "numpy": (lambda m, x: and_then(x.detach().numpy(), x), "Tensor.numpy", lambda m, x: x.detach() + x),
    "tolist": (lambda m, x: x * x.sum(1).tolist()[0], "Tensor.tolist", lambda m, x: x * x.sum(1)[0]),
    "printed": (lambda m, x: and_then(f"{x.sum()}", x), "Tensor.__format__", lambda m, x: and_then(f"{x.shape}", x)),
    "repr": (lambda m, x: and_then(repr(x), x), "Tensor.__repr__", lambda m, x: and_then(repr(m), x)),
    "host tensor": (
        lambda m, x: x + torch.arange(4).to(x.device),
        "aten._to_copy",
        lambda m, x: x + torch.arange(4, device=x.device),
    ),
    "from numbers": (
        lambda m, x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
        "torch.tensor",
        lambda m, x: and_then(torch.tensor([1.0]), x + torch.full((4,), 2.0, device=x.device)),
    ),
    "new_tensor": (lambda m, x: x + x.new_tensor(2.0), "Tensor.new_tensor", lambda m, x: x + x.new_ones(4)),
    "list of indices": (
        lambda m, x: x[:, [0, 1, 2, 3]],
        "Tensor.__getitem__ with a list",
        lambda m, x: x[:, 0:4] + x[:, 1, None],
    ),
    "host indices": (lambda m, x: x[:, torch.arange(4)], "aten.index", lambda m, x: x.index_select(1, m.indices)),
    "pinned": (
        lambda m, x: and_then(torch.empty(4, pin_memory=True), x),
        "aten.empty",
        lambda m, x: and_then(torch.empty(4), x),
    ),
    "host constant": (lambda m, x: x * m.host, "aten.mul", lambda m, x: x * 0.5),
    "host value": (lambda m, x: x * m.host.item(), "aten._local_scalar_dense", lambda m, x: x * len(m.past)),
    "draw on the host": (
        lambda m, x: and_then(torch.rand(4), x),
        "aten.rand",
        lambda m, x: F.dropout(x + torch.randn_like(x) + torch.rand(4, device=x.device)),
    ),
    "permutation on the host": (
        lambda m, x: and_then(torch.randperm(4), x),
        "aten.randperm",
        lambda m, x: x[:, torch.randperm(4, device=x.device)],
    ),
    "own generator": (
        lambda m, x: x + torch.rand(4, device=x.device, generator=torch.Generator()),
        "aten.rand",
        lambda m, x: x + torch.rand(4, device=x.device, generator=torch.default_generator),
    ),
    "seed": (lambda m, x: and_then(torch.manual_seed(1), x), "torch.manual_seed", lambda m, x: x),
    "cuda state": (
        lambda m, x: and_then(torch.cuda.set_rng_state(torch.cuda.get_rng_state()), x),
        "torch.cuda.set_rng_state",
        lambda m, x: and_then(torch.cuda.is_available(), x),
    ),
    "random checkpoint": (
        lambda m, x: checkpoint(torch.sin, x, use_reentrant=False),
        "torch.get_rng_state",
        lambda m, x: checkpoint(torch.sin, x, use_reentrant=False, preserve_rng_state=False),
    ),
    "synchronize": (lambda m, x: and_then(torch.cuda.synchronize(), x), "torch.cuda.synchronize", lambda m, x: x),
    "event": (
        lambda m, x: and_then(torch.cuda.Event.query(object.__new__(torch.cuda.Event)), x),
        "torch.cuda.Event.query",
        lambda m, x: x,
    ),
}


def replaces_buffer(m: Acting, x: Tensor) -> Tensor:
    m.mean = 0.9 * m.mean + 0.1 * x.detach().mean(0)
    return x


def replaces_attribute(m: Acting, x: Tensor) -> Tensor:
    m.hidden = torch.tanh(m.hidden + x.detach().mean(0))
    return x + m.hidden


def replaces_data(m: Acting, x: Tensor) -> Tensor:
    m.mean = (0.9 * m.mean.data).detach()
    return x


def replaces_parameter(m: Acting, x: Tensor) -> Tensor:
    m.weight = nn.Parameter(0.9 * m.weight.detach())
    return x


def counts(m: Acting, x: Tensor) -> Tensor:
    m.calls += 1
    return x


def keeps_a_list(m: Acting, x: Tensor) -> Tensor:
    m.past.append(x.detach().mean(0))
    return x


def changes_in_place(m: Acting, x: Tensor) -> Tensor:
    m.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
    m.hidden.copy_(torch.tanh(m.hidden + x.detach().mean(0)))
    return x + m.hidden


def keeps_its_output(m: Acting, x: Tensor) -> Tensor:
    m.last = x.detach().mean(0)
    m.calls = 7
    return x + m.last


def keeps_another_view(m: Acting, x: Tensor) -> Tensor:
    m.mean.mul_(0.9)
    m.mean = m.mean.view(4)
    return x + m.mean


def plain(m: Acting, x: Tensor) -> Tensor:
    return x


class Momentum(torch.optim.Optimizer):
    """Keeps its velocity, and how many steps it took, as it should not."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                state["velocity"] = 0.9 * state.get("velocity", 0.0) + p.grad
                p.sub_(state["velocity"])


class ReadsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * grads[0].sum().item()


class Reading(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * x.sum().item())
