"""What can be checked: chains of anybody's invertible modules, measured alike and left as they were."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from harness.inverses import Invertible
from harness.inverses.chain import SubjectError
from harness.inverses.check import Verdict, check_inverse
from harness.inverses.measurement import measure
from harness.inverses.precisions import own_precision
from revnet_core import AdditiveCoupling, Precision, PrecisionError, ReversibleSequence, create_model
from tests.harness.invertible_blocks import CHANNELS, Additive, chain, inputs, residual

ROUNDING = 1e-14


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def sequence(precision: Precision | None = None, *, split_dim: int | None = 1) -> ReversibleSequence:
    torch.manual_seed(0)
    couplings = [AdditiveCoupling(residual(0.1), residual()) for _ in range(3)]
    return ReversibleSequence(couplings, precision=precision or Precision(), split_dim=split_dim)


def check(module: nn.Module, *given: Tensor, path: Path, precisions: tuple[str, ...] | None = None) -> Verdict:
    """Twice: the first writes the baseline."""
    for _ in range(2):
        verdict = check_inverse(module, *given, path=path / "a.json", test="a", precisions=precisions)
    return verdict  # pyright: ignore[reportPossiblyUnboundVariable]


def errors(verdict: Verdict) -> list[float]:
    return [block.figures[name] for block in verdict.figures["fp64"].blocks for name in ("inverse_rel", "drift_rel")]


@pytest.mark.parametrize(
    ("module", "given", "names"),
    [
        (chain(), inputs(), ["0 Additive", "1 Additive", "2 Additive", "3 Additive"]),
        (Additive(), inputs(), ["0 Additive"]),
        (sequence(), (torch.cat(inputs(), 1),), ["0 AdditiveCoupling", "1 AdditiveCoupling", "2 AdditiveCoupling"]),
        (sequence(split_dim=None), inputs(), ["0 AdditiveCoupling", "1 AdditiveCoupling", "2 AdditiveCoupling"]),
    ],
    ids=["chain", "one block", "sequence", "pair of streams"],
)
def test_each_block_is_named_and_inverted(
    tmp_path: Path, module: nn.Module, given: tuple[Tensor, ...], names: list[str]
) -> None:
    verdict = check(module, *given, path=tmp_path)
    assert verdict.outcome == "passed", verdict.message
    assert [block.name for block in verdict.figures["fp64"].blocks] == names
    assert max(errors(verdict)) < ROUNDING


def test_a_whole_network_is_checked_in_its_sequences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = create_model("revnet", num_classes=10, depth=26)
    verdict = check(net, images(), path=tmp_path, precisions=("fp32/fp32", "bf16/exact", "fp64"))
    assert verdict.outcome == "passed", verdict.message
    reversible = net.get_submodule("").reversible_blocks
    assert len(verdict.figures["fp64"].blocks) == reversible
    exact = verdict.figures["bf16/exact"]
    assert {block.figures["drift_rel"] for block in exact.blocks} == {0.0}
    assert exact.gradient["gradient_rel"] == 0.0
    assert max(errors(verdict)) < ROUNDING


@pytest.mark.parametrize("name", ["irevnet", "revnet_affine"])
def test_blocks_of_other_kinds_are_checked(tmp_path: Path, name: str) -> None:
    """One rearranges pixels and has no weights, the other divides."""
    torch.manual_seed(0)
    net = create_model(name, num_classes=10, depth=20 if name == "irevnet" else 14)
    assert check(net, images(), path=tmp_path, precisions=("fp64",)).outcome == "passed"
    with torch.no_grad():
        next(iter(net.parameters())).mul_(1.5)
    verdict = check(net, images(), path=tmp_path, precisions=("fp64",))
    assert verdict.outcome == "failed"
    assert "the weights before block 0" in verdict.message if name == "revnet_affine" else "block 0" in verdict.message


def test_other_names_take_a_wrapper(tmp_path: Path) -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log = nn.Parameter(torch.ones(()))

        def encode(self, x: Tensor) -> Tensor:
            return x * self.log.exp()

        def decode(self, y: Tensor) -> Tensor:
            return y * (-self.log).exp()

    wrapped = Invertible(Doubling(), lambda module, x: module.encode(x), lambda module, y: module.decode(y))
    verdict = check(wrapped, inputs()[0], path=tmp_path)
    assert verdict.outcome == "passed", verdict.message
    assert max(errors(verdict)) < ROUNDING
    with pytest.raises(SubjectError, match=r"Doubling has no inverse.*harness\.inverses\.Invertible"):
        check(Doubling(), inputs()[0], path=tmp_path)


def test_memcnn_s_modules_are_checked_as_they_are(tmp_path: Path) -> None:
    memcnn = pytest.importorskip("memcnn", reason="memcnn is not installed; `make peers` installs it")
    torch.manual_seed(0)
    coupling = memcnn.AdditiveCoupling(nn.Conv2d(CHANNELS // 2, CHANNELS // 2, 3, padding=1))
    # This wrapper empties its input, and refuses torch.autograd.grad.
    net = nn.Sequential(memcnn.InvertibleModuleWrapper(coupling, keep_input=False))
    verdict = check(net, inputs()[0], path=tmp_path)
    assert verdict.outcome == "passed", verdict.message
    assert max(errors(verdict)) < ROUNDING
    assert verdict.figures["fp64"].gradient["gradient_difference_rel"] < 1e-6


def test_freia_s_modules_are_checked_as_they_are(tmp_path: Path) -> None:
    reason = "FrEIA is not installed; `make peers` installs it"
    framework = pytest.importorskip("FrEIA.framework", reason=reason)
    modules = pytest.importorskip("FrEIA.modules", reason=reason)
    torch.manual_seed(0)

    def subnet(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, out))

    sequence = framework.SequenceINN(6)
    for _ in range(3):
        sequence.append(modules.AllInOneBlock, subnet_constructor=subnet)
    nodes = [framework.InputNode(6)]
    nodes.append(framework.Node(nodes[-1], modules.GLOWCouplingBlock, {"subnet_constructor": subnet}))
    graph = framework.GraphINN([*nodes, framework.OutputNode(nodes[-1])])
    x = torch.randn(4, 6)
    for name, net, block_count in (("sequence", sequence, 3), ("graph", graph, 1)):
        verdict = check(net, x, path=tmp_path / name)
        assert verdict.outcome == "passed", verdict.message
        assert len(verdict.figures["fp64"].blocks) == block_count
        assert max(errors(verdict)) < ROUNDING


def test_wide_streams_over_narrow_nets_are_a_precision_of_their_own(tmp_path: Path) -> None:
    net = sequence(Precision(reconstruction="fp64"))
    assert own_precision(net) == "fp32/fp64"
    assert own_precision(net.double()) == "fp64"
    verdict = check(sequence(Precision(reconstruction="fp64")), torch.cat(inputs(), 1), path=tmp_path)
    assert verdict.outcome == "passed", verdict.message
    assert verdict.figures.keys() == {"fp32/fp64", "fp64"}


def test_nothing_given_is_changed(tmp_path: Path) -> None:
    for module, given in ((chain(), inputs()), (sequence(), (torch.cat(inputs(), 1),))):
        weights, values = copy.deepcopy(module.state_dict()), [t.clone() for t in given]
        state = torch.get_rng_state()
        measure(module, given, own_precision(module))
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
        assert all(torch.equal(t, value) for t, value in zip(given, values, strict=True))
        assert all(p.grad is None for p in module.parameters())
        assert not any(part._forward_pre_hooks for part in module.modules())


def test_a_wrong_backward_is_found_though_the_inverse_is_right(tmp_path: Path) -> None:
    class Scaled(torch.autograd.Function):
        factor = 1.0

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return grads[0] * Scaled.factor

    class Passing(Additive):
        def forward(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
            y1, y2 = super().forward(x1, x2)
            return Scaled.apply(y1), y2  # pyright: ignore[reportReturnType]

    torch.manual_seed(0)
    module = Passing()
    assert check(module, *inputs(), path=tmp_path).outcome == "passed"
    Scaled.factor = 1.01
    verdict = check(module, *inputs(), path=tmp_path)
    assert verdict.outcome == "failed"
    assert "look at the module's backward" in verdict.message
    assert "gradient, fp64: gradient_difference_rel" in verdict.message


@pytest.mark.parametrize(
    ("given", "message"),
    [((), "inputs: nothing"), ((torch.zeros(2, dtype=torch.long),), "torch.int64"), (("a",), "str")],
)
def test_inputs_that_are_none_are_refused(tmp_path: Path, given: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(SubjectError, match=message):
        check(chain(), *given, path=tmp_path)


def test_a_precision_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrecisionError, match="'fp8' is none for a Sequential; give some of fp64, fp32, bf16, fp16"):
        check(chain(), *inputs(), path=tmp_path, precisions=("fp8",))
    with pytest.raises(PrecisionError, match="reconstruction = 'fp8'"):
        check(sequence(), torch.cat(inputs(), 1), path=tmp_path, precisions=("fp32/fp8",))


def test_what_is_not_finite_is_neither_written_nor_passed(tmp_path: Path) -> None:
    net = chain()
    nn.init.constant_(net.get_submodule("1.f.2").get_parameter("weight"), float("inf"))
    verdict = check(net, *inputs(), path=tmp_path)
    assert verdict.outcome == "failed"
    assert "block 1 Additive" in verdict.message
    assert not (tmp_path / "a.json").exists()
