"""One planted fault at a time: each is noticed, in the right block, with its cause. Unchanged code is never accused."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.inverses.check import Verdict, check_inverse
from revnet_core import AdditiveCoupling, ReversibleSequence
from revnet_core.replay import Replay
from tests.harness import invertible_blocks as blocks
from tests.harness.invertible_blocks import BLOCKS, CHANNELS, FAULTY, chain, inputs, planted, residual

Check = Callable[..., Verdict]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Against a baseline of the same test, which the first call writes."""

    def call(module: nn.Module, *given: Any, **options: Any) -> Verdict:
        return check_inverse(module, *given, path=tmp_path / "a.json", test="a", **options)

    return call


@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (blocks.with_other_epsilon, "is made otherwise: it was f.0 BatchNorm2d(4, eps=1e-05"),
        (blocks.with_f_and_g_exchanged, "f and g changed places"),
        (blocks.with_other_weights, "the weights of g are others"),
        (blocks.in_eval_mode, "in eval mode"),
        (planted("other order"), "its forward runs g f; it ran f g"),
        (planted("order of the inverse"), "its inverse runs f, g; to undo f, g it has to run g, f"),
        (planted("eval in the inverse"), "BatchNorm2d g.0 runs in eval mode in the inverse, in training mode before"),
        (planted("bf16 in the inverse"), "`sub` is computed in bfloat16, and the streams are float64"),
        (planted("epsilon of the inverse"), "its inverse is not that of its forward: in float64 too it is off by"),
        (planted("scale"), "stream 1 comes back 1.001 times what it was"),
        (blocks.with_dropout, "it is f.3 Dropout(p=0.3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_planted_fault_is_named_with_its_block(
    check: Check, plant: Callable[[nn.Sequential], None], cause: str
) -> None:
    check(chain(), *inputs())
    faulty = chain()
    plant(faulty)
    verdict = check(faulty, *inputs())
    assert verdict.outcome == "failed"
    first = verdict.message.splitlines()[0]
    assert f"block {FAULTY} Additive" in first
    assert cause in first
    # No earlier block's own inverse is accused.
    assert not [
        line for line in verdict.message.splitlines() if "inverse_rel" in line and f"block {FAULTY}" not in line
    ]


# In the recompute of this project's own backward


def sequence(dropout: float) -> ReversibleSequence:
    torch.manual_seed(0)
    couplings = [AdditiveCoupling(residual(dropout), residual(dropout)) for _ in range(BLOCKS)]
    setattr(couplings[FAULTY].f, "faulty", True)  # noqa: B010 - an attribute of a module, to a type checker a tensor
    return ReversibleSequence(couplings)


@pytest.mark.parametrize("fault", ["not replayed", "eval"])
def test_a_fault_in_our_recompute_is_named_with_its_block(
    check: Check, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    x = torch.randn(2, 2 * CHANNELS, 6, 6, generator=torch.Generator().manual_seed(1))
    dropout = 0.2 if fault == "not replayed" else 0.0
    check(sequence(dropout), x)
    assert check(sequence(dropout), x).outcome == "passed"
    replaying = Replay.replaying

    @contextlib.contextmanager
    def faulty(self: Replay, **options: bool) -> Iterator[None]:
        net = self._net
        if not getattr(net, "faulty", False):
            with replaying(self, **options):
                yield
            return
        if fault == "eval":
            net.eval()
        yield
        if fault == "eval":
            net.train()

    monkeypatch.setattr(Replay, "replaying", faulty)
    verdict = check(sequence(dropout), x)
    assert verdict.outcome == "failed"
    first = verdict.message.splitlines()[0]
    assert f"block {FAULTY} AdditiveCoupling" in first
    assert {"not replayed": "Dropout f.3 draws anew", "eval": "BatchNorm2d f.0 runs in eval mode"}[fault] in first


def test_unchanged_code_is_never_accused(check: Check) -> None:
    check(chain(), *inputs())
    threads = torch.get_num_threads()
    try:
        for run in range(20):
            torch.set_num_threads(1 + run % 2)
            torch.manual_seed(run)  # which a check does not depend on
            verdict = check(chain(), *inputs())
            assert verdict.outcome == "passed", verdict.message
    finally:
        torch.set_num_threads(threads)


def test_inputs_of_another_seed_are_said_to_be_so(check: Check) -> None:
    check(chain(), *inputs())
    x1, x2 = inputs()
    assert "the inputs are others" in check(chain(), x1, x2 + 1).message


def test_a_first_baseline_of_what_is_no_inverse_says_so(check: Check) -> None:
    faulty = chain()
    blocks.with_dropout(faulty)
    message = check(faulty, *inputs()).message
    assert f"block {FAULTY} Additive is not inverted" in message
    assert "Dropout f.3" in message
