"""What a CUDA graph could not hold is found on tensors without contents, and named; what looks like it is let pass."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet_core import AdditiveCoupling, CaptureError, Guard, Obstacle, ReversibleSequence, find_obstacles
from revnet_core.capture_rules import reason_against
from revnet_core.obstacles import ObstacleWatch, raise_for
from revnet_core.without_contents import blank
from tests.core.capture_cases import (
    CASES,
    Acting,
    Action,
    Momentum,
    Reading,
    ReadsGradient,
    changes_in_place,
    counts,
    keeps_a_list,
    keeps_another_view,
    keeps_its_output,
    plain,
    replaces_attribute,
    replaces_buffer,
    replaces_data,
    replaces_parameter,
)


def found(
    action: Action, optimizer: Callable[..., torch.optim.Optimizer] | None = None, loss: Any = F.mse_loss
) -> list[Obstacle]:
    model = nn.Sequential(nn.Linear(4, 4), Acting(action))
    return find_obstacles(model, loss, (torch.zeros(3, 4), torch.zeros(3, 4)), optimizer)


@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("case", CASES)
def test_what_a_graph_cannot_hold_is_named(case: str) -> None:
    action, operation, _ = CASES[case]
    obstacle = next(o for o in found(action) if o.operation == operation)
    assert obstacle.module == "1 (Acting)"
    assert obstacle.phase == "forward"
    assert obstacle.source is not None
    assert obstacle.source.startswith("capture_cases.py:")
    assert obstacle.why
    assert obstacle.remedy


@pytest.mark.parametrize("case", CASES)
def test_what_looks_like_it_can_be_captured(case: str) -> None:
    assert found(CASES[case][2]) == []


@pytest.mark.parametrize(
    ("action", "operation"),
    [
        (replaces_buffer, "self.mean = ..."),
        (replaces_attribute, "self.hidden = ..."),
        (replaces_data, "self.mean = ..."),
        (replaces_parameter, "self.weight = ..."),
        (counts, "self.calls = ..."),
        (keeps_a_list, "self.past's length = ..."),
    ],
)
def test_state_that_a_replay_would_not_carry_on(action: Action, operation: str) -> None:
    (obstacle,) = found(action)
    assert (obstacle.operation, obstacle.module) == (operation, "1 (Acting)")


@pytest.mark.parametrize("action", [changes_in_place, keeps_its_output, keeps_another_view])
def test_state_that_each_replay_changes_or_writes(action: Action) -> None:
    assert found(action) == []


@pytest.mark.parametrize(
    ("optimizer", "operations", "remedy"),
    [
        (torch.optim.Adam, {"aten._local_scalar_dense"}, r"Adam(..., capturable=True)"),
        (torch.optim.AdamW, {"aten._local_scalar_dense"}, r"AdamW(..., capturable=True)"),
        (lambda p: torch.optim.Adam(p, fused=True), {"Adam.step"}, "capturable=True"),
        (torch.optim.RMSprop, {"RMSprop.step"}, "RMSprop(..., capturable=True)"),
        (torch.optim.Adagrad, {"aten._local_scalar_dense"}, "such as SGD"),
        (lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)), {"aten._local_scalar_dense"}, "floats, not tensors"),
        (Momentum, {"Momentum.state[...]['steps'] = ...", "Momentum.state[...]['velocity'] = ..."}, "in place"),
    ],
)
def test_an_optimizer_that_keeps_state_on_the_host(optimizer: Any, operations: set[str], remedy: str) -> None:
    obstacles = found(plain, optimizer)
    assert {o.operation for o in obstacles} == operations
    assert {(o.phase, o.module) for o in obstacles} == {("optimizer", None)}
    assert all(remedy in o.remedy for o in obstacles)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, capturable=True),
        lambda p: torch.optim.Adam(p, torch.tensor(0.1, device="meta"), capturable=True),
        lambda p: torch.optim.RMSprop(p, capturable=True),
        lambda p: torch.optim.AdamW(p, capturable=True, fused=True),
    ],
)
def test_an_optimizer_that_can_be_captured(optimizer: Any) -> None:
    assert found(plain, optimizer) == []


@pytest.mark.parametrize(
    ("func", "indices"),
    [(torch.ops.aten.fill_.Tensor, ()), (torch.ops.aten.index_put_.default, ([torch.ones(4) > 0],))],
)
def test_a_number_that_torch_puts_on_the_host_itself_is_no_obstacle(func: Any, indices: Any) -> None:
    """As it does on a GPU, and not on meta."""
    meta = torch.device("meta")
    args = torch.ones(4, device=meta), *blank(indices), torch.tensor(1.0)
    assert reason_against(func, args, {}, meta, of_number=True) is None
    assert "constant" in str(reason_against(func, args, {}, meta))


def test_a_copy_from_pinned_memory_for_which_nothing_waits_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = torch.device("meta")
    args = torch.ones(4, device=meta), torch.ones(4)
    copy_ = torch.ops.aten.copy_.default
    assert reason_against(copy_, (*args, True), {}, meta)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: True)
    assert reason_against(copy_, (*args, True), {}, meta) is None
    assert reason_against(copy_, args, {}, meta)


def test_the_loss_is_outside_of_any_module() -> None:
    (obstacle,) = found(plain, loss=lambda y, target: (y - target).sum() * y.sum().item())
    assert obstacle.module is None
    assert "in <lambda>" in (obstacle.source or "")


def test_a_backward_is_looked_at_as_well() -> None:
    (obstacle,) = found(lambda m, x: ReadsGradient.apply(x))  # pyright: ignore[reportArgumentType]
    assert (obstacle.phase, obstacle.module) == ("backward", None)
    assert (obstacle.source or "").endswith("in backward")


@pytest.mark.parametrize("activations", ["checkpointed", "reconstructed"])
def test_a_recompute_names_the_module_that_it_runs(activations: str) -> None:
    couplings = [AdditiveCoupling(nn.Linear(2, 2), Reading()) for _ in range(2)]
    chain = ReversibleSequence(couplings, activations=activations)
    obstacles = find_obstacles(chain, F.mse_loss, (torch.zeros(3, 4), torch.zeros(3, 4)))
    assert {(o.phase, o.module) for o in obstacles} == {
        (phase, f"couplings.{index}.g (Reading)") for phase in ("forward", "backward") for index in (0, 1)
    }


def test_offloaded_activations_and_a_guard_are_named() -> None:
    def chain() -> ReversibleSequence:
        return ReversibleSequence([AdditiveCoupling(nn.Linear(2, 2), nn.Linear(2, 2))])

    model = nn.Sequential(chain(), chain(), chain())
    batch = torch.zeros(3, 4), torch.zeros(3, 4)
    assert find_obstacles(model, F.mse_loss, batch) == []
    model[0].activations = "offloaded"  # pyright: ignore[reportArgumentType]
    guard = Guard().attach(model[2])
    offloaded, guarded = sorted(find_obstacles(model, F.mse_loss, batch), key=lambda o: str(o.module))
    assert (offloaded.module, guarded.module) == ("0 (ReversibleSequence)", "2 (ReversibleSequence)")
    assert "reconstructed" in offloaded.remedy
    assert "detach()" in guarded.remedy
    guard.detach()


def test_the_error_lists_every_obstacle() -> None:
    raise_for([])
    obstacles = found(lambda m, x: x * x.sum().item() * m.host.item())
    assert len({o.why for o in obstacles}) == 2
    with pytest.raises(CaptureError) as error:
        raise_for(obstacles)
    for obstacle in obstacles:
        for part in (obstacle.operation, obstacle.module, obstacle.source, obstacle.why, obstacle.remedy):
            assert str(part) in str(error.value)


def test_an_error_of_the_step_is_raised_unless_an_obstacle_explains_it() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        found(lambda m, x: x.view(5, 5))
    assert [o.operation for o in found(lambda m, x: x.view(int(x.sum()), 5))] == ["aten._local_scalar_dense"]


def test_model_random_state_and_torch_are_as_before() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Acting(replaces_buffer), nn.Dropout())
    weights, own, state = copy.deepcopy(model.state_dict()), dict(vars(model[1])), torch.get_rng_state()
    calls = Tensor.tolist, Tensor.__repr__, Tensor.__getitem__, torch.manual_seed, torch.cuda.synchronize
    find_obstacles(model, lambda y, t: (torch.manual_seed(3), F.mse_loss(y, t))[1], (torch.zeros(2, 4),) * 2)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    assert {name: id(value) for name, value in vars(model[1]).items()} == {n: id(v) for n, v in own.items()}
    assert all(p.grad is None and p.device.type == "cpu" for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == (Tensor.tolist, Tensor.__repr__, Tensor.__getitem__, torch.manual_seed, torch.cuda.synchronize)
    assert "tolist" not in vars(Tensor)


class Deep(torch.autograd.Function):
    """Backward within backward, until autograd goes on in a thread of its own, where it reads a value."""

    threads: set[int]

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int) -> Tensor:
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        Deep.threads.add(threading.get_ident())
        if ctx.depth:
            with torch.enable_grad():
                inner: Any = Deep.apply(torch.ones(2, requires_grad=True), ctx.depth - 1)
                total = inner.sum()
            total.backward()
        else:
            grads[0].sum().tolist()
        return grads[0], None


def test_threads_of_autograd_are_watched_and_others_are_not() -> None:
    Deep.threads = set()
    with ObstacleWatch(nn.Linear(2, 2), "cpu") as watch:
        out: Any = Deep.apply(torch.ones(2, requires_grad=True), 70)
        other = threading.Thread(target=lambda: torch.ones(2).sum().item())
        other.start()
        other.join()
        watch.phase = "backward"
        out.sum().backward()
    assert len(Deep.threads) == 2
    assert [(o.operation, o.phase) for o in watch.obstacles] == [("Tensor.tolist", "backward")]


# As they are written they can run on meta only; and whether torch's inverse can be captured depends on its backend.
NOT_ON_A_GPU = ("own generator", "event", "numpy", "checked inverse")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")
@pytest.mark.parametrize("case", [case for case in CASES if case not in NOT_ON_A_GPU])
def test_on_a_gpu_the_same_is_found_and_the_rest_is_captured(case: str) -> None:
    action, operation, alike = CASES[case]
    x, target = torch.rand(3, 4, device="cuda"), torch.rand(3, 4, device="cuda")

    def watched(action: Action) -> tuple[Callable[[], None], list[Obstacle]]:
        model = nn.Sequential(nn.Linear(4, 4), Acting(action)).cuda()

        def step() -> None:
            model.zero_grad()
            F.mse_loss(model(x).float(), target).backward()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            with ObstacleWatch(model, "cuda") as watch:
                step()
        torch.cuda.current_stream().wait_stream(side)
        model.zero_grad()
        return step, watch.obstacles

    assert operation in {o.operation for o in watched(action)[1]}
    step, obstacles = watched(alike)
    assert obstacles == []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    torch.cuda.synchronize()
