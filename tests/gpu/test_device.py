"""What the core and the harness do on a GPU besides graphs: pinned copies, findings read late, counters, keys."""

import pytest
import torch
from torch import Tensor

from harness.inverses.baseline import machine_key
from harness.inverses.measurement import arguments
from harness.measure.memory import measure_memory
from harness.models import create, loss_of
from harness.predict import Device, step_memory
from harness.trials import TrialSpec
from revnet_core import Guard, Precision, ReconstructionError, offload, singular_values
from revnet_core.exactness import Verdict
from revnet_core.norms import NormReplay
from tests.core.graph_cases import exact_beyond_its_range, square, tokens
from tests.core.nets import KINDS, sequence_of, twin_of

pytestmark = pytest.mark.gpu
MIB = 2**20
SAVED_ERROR = 0.03


def gradients(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def host_copies(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    made: list[Tensor] = []
    empty_strided = torch.empty_strided

    def noted(*args: object, **options: object) -> Tensor:
        out = empty_strided(*args, **options)  # pyright: ignore[reportArgumentType,reportCallIssue]
        if "pin_memory" in options:
            made.append(out)
        return out

    monkeypatch.setattr(offload.torch, "empty_strided", noted)
    return made


def test_offloaded_activations_lie_in_pinned_memory(device: torch.device, host_copies: list[Tensor]) -> None:
    shape = (16, *KINDS["conv_bn"].shape[1:])
    model = sequence_of("conv_bn", 3, activations="stored").double().to(device).train()
    x = torch.randn(shape, dtype=torch.float64, device=device)
    expected = gradients(twin_of(model, "stored"), x)
    assert not host_copies
    found = gradients(twin_of(model, "offloaded"), x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if device.type == "cuda":
        assert host_copies
        assert all(copy.is_pinned() for copy in host_copies)


def test_a_guard_s_finding_is_read_without_waiting(device: torch.device) -> None:
    model = sequence_of("conv_bn", 3).double().to(device).train()
    guard = Guard(every=1, tolerance=1e-6).attach(model)
    x = torch.randn(KINDS["conv_bn"].shape, dtype=torch.float64, device=device)
    for _ in range(6):
        model(x).square().mean().backward()
    guard.settle()
    assert [report.step for report in guard.history] == [1, 2, 3, 4, 5, 6]
    assert all(report.rel < 1e-6 for report in guard.history)


def test_a_verdict_waits_for_its_own_event_only(gpu: torch.device) -> None:
    """Queued behind a kernel that takes long, it is not ready; waited for, it is."""
    torch.cuda._sleep(500_000_000)
    verdict = Verdict(
        torch.ones((), dtype=torch.bool, device=gpu), torch.zeros(2, device=gpu), Precision("fp32", "exact")
    )
    assert not verdict.is_ready()
    verdict.wait()
    assert verdict.is_ready()
    with pytest.raises(ReconstructionError):
        verdict.raise_if_failed()


def test_an_inexact_reconstruction_is_told_of(device: torch.device) -> None:
    model, grows = exact_beyond_its_range()
    model.to(device)
    x, target = tokens(device)

    def rebuild() -> None:
        square(model(x), target).backward()
        # On the host itself, where nothing waits, the backward has asked already.
        model.raise_if_inexact()

    rebuild()
    with torch.no_grad():
        grows.weight.mul_(1e4)
    with pytest.raises(ReconstructionError, match=r"couplings\[1\]"):
        rebuild()


def test_singular_values_are_those_of_the_cpu(device: torch.device) -> None:
    coupling = sequence_of("norm_mlp", 1).double().eval().couplings[0]
    x1, x2 = torch.randn((2, 1, 1, 6), dtype=torch.float64)
    expected = singular_values(coupling, x1, x2)
    found = singular_values(coupling.to(device), x1.to(device), x2.to(device))
    assert found.largest == pytest.approx(expected.largest, rel=1e-4)
    assert found.smallest == pytest.approx(expected.smallest, rel=1e-4)


@pytest.mark.parametrize("activations", ["stored", "checkpointed", "reconstructed"])
def test_the_allocator_counts_what_is_predicted(device: torch.device, activations: str) -> None:
    spec = TrialSpec.model_validate({"model": "revnet", "depth": 38, "batch_size": 16, "activations": activations})
    model = create(spec).to(device)
    x, labels = torch.randn(16, 3, 32, 32, device=device), torch.zeros(16, dtype=torch.long, device=device)
    loss_of(model(x), labels).backward()
    use = measure_memory(device, lambda: loss_of(model(x), labels), lambda loss: loss.backward())
    step = step_memory(spec, Device("cuda" if device.type == "cuda" else "cpu", torch.get_num_threads()))
    assert use.activation_saved_bytes == pytest.approx(step.saved_bytes, rel=SAVED_ERROR)
    # cuDNN takes workspaces that no prediction knows of; how far the peak is off is for `python -m studies.gpu` to say.
    assert use.activation_peak_bytes >= (1 - SAVED_ERROR) * step.peak_bytes


def test_a_known_allocation_is_counted(gpu: torch.device) -> None:
    """The calibration of the test above."""
    weight = torch.ones((), device=gpu, requires_grad=True)

    def forward() -> Tensor:
        held = torch.empty(64 * MIB, dtype=torch.uint8, device=gpu)
        del held
        return (torch.ones(2 * MIB, device=gpu) * weight).square().sum()

    use = measure_memory(gpu, forward, lambda loss: loss.backward())
    # The square saves its operand, the product the ones.
    assert use.activation_saved_bytes == pytest.approx(16 * MIB, abs=MIB)
    assert 64 * MIB <= use.activation_peak_bytes < 66 * MIB


def test_a_baseline_is_of_this_device(device: torch.device) -> None:
    key = machine_key(device, "fp32")
    other = machine_key(torch.device("cpu"), "fp32")
    if device.type == "cuda":
        assert key.startswith(torch.cuda.get_device_name(device))
        assert key != other
    assert key.endswith(", fp32")
    model = sequence_of("norm_mlp", 2).double().to(device)
    x = torch.randn(KINDS["norm_mlp"].shape, dtype=torch.float64, device=device)
    assert model(*arguments(model, (x,))).shape == x.shape


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_by_known_statistics_is_the_norm(
    device: torch.device, dtype: torch.dtype, layout: torch.memory_format, affine: bool
) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = torch.nn.BatchNorm2d(6, affine=affine, device=device, dtype=wide)
    if affine:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x = (3 * torch.randn(5, 6, 7, 9, device=device) + 2).to(dtype).contiguous(memory_format=layout)
    replay = NormReplay.of([norm])
    assert replay
    found: list[tuple[Tensor, Tensor]] = []
    for context in (replay.recording, replay.replaying):
        leaf = x.detach().requires_grad_()
        with context():
            out = norm(leaf)
        assert out.dtype == dtype
        assert out.is_contiguous(memory_format=layout)
        (gradient,) = torch.autograd.grad(out.float().square().sum() + out.float().sin().sum(), leaf)
        found.append((out, gradient))
    error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for again, first in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(again, first, rtol=error, atol=error)
