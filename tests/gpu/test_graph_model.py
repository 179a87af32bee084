"""graph_model: the gradients of eager steps, under DDP and DeepSpeed too, and nothing of the model's changed."""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revnet_core import CaptureError, Precision, ReconstructionError, ShapeError
from tests.core.graph_cases import assert_equal_states, exact_beyond_its_range, square, tokens
from tests.core.nets import sequence_of
from tests.gpu.conftest import CHOSEN, Graphed
from tests.gpu.test_training_step import EXACT_BF16, images, network

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group, one for all tests here: DeepSpeed keeps what it has once found of it."""
    if CHOSEN == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rendezvous = tmp_path_factory.mktemp("ranks") / "rendezvous"
    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed looks for these, and for MPI where they are not set.
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        backend = "gloo" if CHOSEN == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def take_steps(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for x, labels in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("precision", [Precision("fp32"), Precision("bf16"), EXACT_BF16], ids=str)
@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_it_trains_as_an_eager_model(
    device: torch.device, graphed: Graphed, activations: str, precision: Precision
) -> None:
    model = network(device, activations, precision)
    twin = copy.deepcopy(model)
    batches = images(device, 4)
    expected = take_steps(model, batches)
    with graphed(twin, batches[0][0]) as graph:
        assert torch.equal(take_steps(twin, batches), expected)
        assert graph.pool_bytes > 0 or device.type == "cpu"
    assert_equal_states(twin, model)


def test_entering_leaves_buffers_gradients_and_the_random_state(device: torch.device, graphed: Graphed) -> None:
    model = network(device, "reconstructed", Precision())
    before = copy.deepcopy(model.state_dict())
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    with graphed(model, images(device, 1)[0][0]):
        pass
    after = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    if device.type == "cuda":
        assert torch.equal(state, after)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in vars(model)


def test_evaluation_is_eager_and_of_any_batch(device: torch.device, graphed: Graphed) -> None:
    model = network(device, "reconstructed", Precision())
    twin = copy.deepcopy(model).eval()
    x = images(device, 1)[0][0]
    with graphed(model, x):
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x[:3]), twin(x[:3]))
        model.train()
        with pytest.raises(ShapeError, match="Leave out a last batch that is smaller"):
            model(x[:3])


def test_parameters_that_moved_are_refused(device: torch.device, graphed: Graphed) -> None:
    model = network(device, "reconstructed", Precision())
    x = images(device, 1)[0][0]
    with graphed(model, x):
        parameter = next(model.parameters())
        parameter.data = parameter.data.clone()
        with pytest.raises(CaptureError, match="lie elsewhere"):
            model(x)


def test_draws_that_have_to_be_repeated_are_refused(device: torch.device, graphed: Graphed) -> None:
    model = sequence_of("dropout", 2).double().to(device).train()
    x = tokens(device)[0].double()
    with pytest.raises(CaptureError, match="Capture the whole step with TrainingStep"), graphed(model, x):
        pass


def test_an_inexact_reconstruction_is_told_of(gpu: torch.device, graphed: Graphed) -> None:
    model, grows = exact_beyond_its_range()
    model.to(gpu)
    x, target = tokens(gpu)
    with graphed(model, x) as graph:
        square(model(x), target).backward()
        graph.raise_if_inexact()
        with torch.no_grad():
            grows.weight.mul_(1e4)
        square(model(x), target).backward()
        with pytest.raises(ReconstructionError, match=r"couplings\[1\]"):
            graph.raise_if_inexact()


@pytest.mark.usefixtures("one_rank")
def test_under_ddp(device: torch.device, graphed: Graphed) -> None:
    model = network(device, "reconstructed", Precision("bf16"))
    twin = copy.deepcopy(model)
    batches = images(device, 3)
    expected = take_steps(model, batches)
    ids = [device.index] if device.type == "cuda" else None
    with graphed(twin, batches[0][0]):
        assert torch.equal(take_steps(DistributedDataParallel(twin, device_ids=ids), batches), expected)
    # DDP's gradients are views of its buckets, and equal.
    assert_equal_states(twin, model)


@contextlib.contextmanager
def engine_of(model: nn.Module, stage: int, batch_size: int) -> Iterator[Any]:
    from harness.engine import TrainingEngine

    engine = TrainingEngine(
        model, batch_size=batch_size, compute="fp32", zero_stage=stage, learning_rate=0.05, extra_config={}
    )
    try:
        yield engine
    finally:
        engine.close()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_under_deepspeed(device: torch.device, graphed: Graphed, stage: int) -> None:
    """Entered behind the engine's start, which moves the parameters in the stages 1 and 2."""
    batches = images(device, 3)
    model = network(device, "reconstructed", Precision("fp32"))
    twin = copy.deepcopy(model)
    losses: list[list[Tensor]] = []
    for one, enter in ((model, None), (twin, graphed)):
        with (
            engine_of(one, stage, len(batches[0][0])) as engine,
            enter(one, batches[0][0]) if enter else contextlib.nullcontext(),
        ):
            losses.append([])
            for x, labels in batches:
                loss = nn.functional.cross_entropy(engine.forward(x), labels)
                engine.backward(loss)
                engine.step()
                losses[-1].append(loss.detach())
    assert torch.equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
