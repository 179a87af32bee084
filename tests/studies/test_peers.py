"""The comparison with other libraries: same network, same gradients, a row for everyone, and a wrong one is seen."""

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from revnet_core import audit_gradients
from studies.peers.contenders import CONTENDERS, STORED, Contender, Pair, PlainChain, reconstructed
from studies.peers.measure import Comparison, Figures, compare, interleaved, quartiles
from studies.peers.table import as_text
from studies.peers.workload import Model, Parts, Workload, gradients_of, loss_of, relative_error

ROOT = Path(__file__).resolve().parents[2]
TINY = Workload(blocks=2, channels=8, batch_size=3, image_size=6)
BY_NAME = {contender.name: contender for contender in CONTENDERS}
OURS = "ours: reconstructed"
EXACT = BY_NAME["ours: exact"]
PEERS = [contender for contender in CONTENDERS if contender.package]
MISSING = [c.package for c in PEERS if c.package and importlib.util.find_spec(c.package) is None]
needs_peers = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; `make peers` installs them")


def parameters() -> list[object]:
    reason = "not installed; `make peers` installs it"
    return [
        pytest.param(c, id=c.name, marks=pytest.mark.skipif(c.package in MISSING, reason=f"{c.package} is {reason}"))
        for c in CONTENDERS
    ]


def parts_and_batch(dtype: torch.dtype) -> tuple[Parts, tuple[Tensor, Tensor]]:
    images, labels = TINY.batch()
    return TINY.parts().to(dtype), (images.to(dtype), labels)


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model)(images)


@pytest.mark.parametrize("contender", parameters())
def test_forward_and_gradients_are_those_of_stored(contender: Contender) -> None:
    # The grid of `exact` is one of fp32 numbers; there the bits are equal.
    dtype, limit = (torch.float32, 0.0) if contender == EXACT else (torch.float64, 1e-13)
    parts, batch = parts_and_batch(dtype)
    model, reference = Model(parts, contender.build), Model(parts, contender.reference)
    torch.testing.assert_close(output_of(model, batch[0]), output_of(reference, batch[0]), rtol=limit, atol=limit)
    expected = gradients_of(reference, batch)
    assert all(gradient.norm() > 0 for gradient in expected.values())
    assert relative_error(gradients_of(model, batch), expected) <= limit
    # Again, since some decide things in their first call.
    assert relative_error(gradients_of(model, batch), expected) <= limit


@pytest.mark.parametrize("contender", parameters())
def test_the_chain_has_the_given_weights_and_no_others(contender: Contender) -> None:
    parts = TINY.parts()
    names = {f"parts.{name}" for name, _ in parts.named_parameters()}
    assert {name for name, _ in Model(parts, contender.build).named_parameters()} == names


def test_the_error_is_that_of_the_audit() -> None:
    parts, batch = parts_and_batch(torch.float32)
    model = Model(parts, reconstructed)
    stored_twin = Model(parts, reconstructed)
    stored_twin.chain.activations = "stored"  # pyright: ignore[reportAttributeAccessIssue,reportArgumentType]
    images, labels = batch
    wide = gradients_of(Model(copy.deepcopy(parts).double(), STORED.build), (images.double(), labels))
    parity = audit_gradients(model, nn.functional.cross_entropy, batch)
    gradients = gradients_of(model, batch)
    assert parity.rel > 0
    assert relative_error(gradients, gradients_of(stored_twin, batch)) == pytest.approx(parity.rel, rel=1e-6)
    assert relative_error(gradients, wide) == pytest.approx(parity.reference_rel, rel=1e-3)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return 1.1 * grads[0]


class _WrongF(nn.Module):
    """F, but for its gradient, which is a tenth too large."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(self.f(x))  # pyright: ignore[reportReturnType]


def wrong(pairs: Sequence[Pair]) -> nn.Module:
    return STORED.build([(_WrongF(f), g) for f, g in pairs])


def fails(pairs: Sequence[Pair]) -> nn.Module:
    def refuse(coupling: nn.Module, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no such kernel")

    return PlainChain(pairs, refuse)


def absent(pairs: Sequence[Pair]) -> nn.Module:
    raise ImportError("No module named 'absent'")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    others = (Contender("wrong", wrong), Contender("fails", fails), Contender("absent", absent, package="no-such-peer"))
    return compare(TINY, rounds=2, contenders=(*CONTENDERS, *others))


def figures_of(comparison: Comparison, name: str) -> Figures:
    figures = next(row.figures for row in comparison.rows if row.name == name)
    assert figures is not None
    return figures


def test_the_table_has_a_row_for_each_contender(comparison: Comparison) -> None:
    names = [*BY_NAME, "wrong", "fails", "absent"]
    assert [row.name for row in comparison.rows] == names
    lines = [line for line in as_text(comparison).splitlines() if line.startswith("| ")]
    assert [next(name for name in names if line[2:].startswith(name)) for line in lines[1:]] == names
    measured = [row.name for row in comparison.rows if row.figures]
    assert measured == [*(c.name for c in CONTENDERS if c.package not in MISSING), "wrong"]
    assert all(len(figures_of(comparison, name).step_s) == 2 for name in measured)


def test_page_faults_are_reported_when_they_are_many(comparison: Comparison) -> None:
    def with_faults(count: int) -> Comparison:
        figures = dataclasses.replace(figures_of(comparison, OURS), page_faults=[count, count])
        rows = [dataclasses.replace(row, figures=figures) if row.name == OURS else row for row in comparison.rows]
        return dataclasses.replace(comparison, rows=rows)

    assert f"Page faults a step: {OURS} 70000." in as_text(with_faults(70000))
    assert "Page faults" not in as_text(with_faults(3))


def test_what_cannot_run_is_named_with_its_reason(comparison: Comparison) -> None:
    text = as_text(comparison)
    assert "fails: not measured; RuntimeError: no such kernel" in text
    assert "absent: not measured; ImportError: No module named 'absent'" in text


def test_a_wrong_gradient_is_seen_and_a_right_one_is_not(comparison: Comparison) -> None:
    errors = {row.name: row.figures.gradient_rel for row in comparison.rows if row.figures}
    assert errors.pop("wrong") > 1e-2
    assert errors[EXACT.name] == errors[STORED.name] == 0
    assert max(errors.values()) < 1e-5
    wrong_row = next(line for line in as_text(comparison).splitlines() if line.startswith("| wrong"))
    assert f"{figures_of(comparison, 'wrong').gradient_rel:.1e}" in wrong_row


def test_stored_grows_by_its_activations_and_reconstructed_by_its_batch_statistics() -> None:
    # Large enough that the kernels' scratch, which is that of one block, decides nothing.
    load = Workload(blocks=4, channels=8, batch_size=4, image_size=16)
    measured = compare(load, rounds=1, contenders=(STORED, BY_NAME[OURS]))
    stream_bytes = load.batch_size * load.channels // 2 * load.image_size**2 * 4
    # Per F and per G: the inputs of two norms and of two convolutions, the first of which is the stream itself. One
    # block's streams are the next one's inputs.
    slope = figures_of(measured, STORED.name).slope_bytes_per_block
    assert slope == pytest.approx(2 * 4 * stream_bytes, rel=0.05)
    # Of each of four batch norms the mean and the deviation of half of the channels, in fp32.
    slope = figures_of(measured, OURS).slope_bytes_per_block
    assert 0 <= slope <= 4 * 2 * 4 * load.channels // 2


def test_ratios_are_within_rounds(comparison: Comparison) -> None:
    assert comparison.ratios(STORED.name, STORED.name) == [1, 1]
    ours, stored = figures_of(comparison, OURS).step_s, figures_of(comparison, STORED.name).step_s
    assert comparison.ratios(OURS, STORED.name) == [ours[0] / stored[0], ours[1] / stored[1]]
    assert comparison.ratios("fails", STORED.name) is None
    assert quartiles([3.0]) == (3, 3, 3)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_each_contender_runs_once_a_round_and_at_every_place_as_often(count: int) -> None:
    names = [f"contender {i}" for i in range(count)]
    orders = [interleaved(names, round_) for round_ in range(2 * count)]
    assert all(sorted(order) == names for order in orders)
    places = Counter((name, place) for order in orders for place, name in enumerate(order))
    assert set(places.values()) == {2}
    assert len(places) == count**2


def test_each_peer_is_pinned_and_installed_without_its_dependencies() -> None:
    # The last one's inverses are checked, its steps are not measured.
    packages = [*(contender.package for contender in PEERS), "FrEIA"]
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["peers"]
    assert [requirement.split("==")[0] for requirement in declared] == packages
    assert set(declared) <= set((ROOT / "constraints.txt").read_text().split())
    assert f"--no-deps {' '.join(map(str, packages))}\n" in (ROOT / "Makefile").read_text()


@needs_peers
def test_what_the_documentation_says_of_the_peers_statistics() -> None:
    parts, batch = parts_and_batch(torch.float32)
    updates: dict[str, int] = {}
    for contender in CONTENDERS:
        model = Model(parts, contender.build)
        loss_of(model, batch).backward()
        counts = {int(b) for name, b in model.named_buffers() if ".f." in name and name.endswith("tracked")}
        (updates[contender.name],) = counts
    once = dict.fromkeys(BY_NAME, 1)
    assert updates == once | {"torch checkpoint": 2, "RevTorch": 2, "memcnn": 3}


@needs_peers
def test_what_the_documentation_says_of_memcnn_behind_a_relu() -> None:
    parts, batch = parts_and_batch(torch.float32)
    behind_relu = copy.deepcopy(parts)
    behind_relu.stem = nn.Sequential(parts.stem, nn.ReLU())  # pyright: ignore[reportAttributeAccessIssue]
    expected = gradients_of(Model(behind_relu, STORED.build), batch)
    for name in ("torch checkpoint", "RevTorch", OURS):
        assert relative_error(gradients_of(Model(behind_relu, BY_NAME[name].build), batch), expected) < 1e-5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss_of(Model(behind_relu, BY_NAME["memcnn"].build), batch).backward()


@needs_peers
def test_what_the_documentation_says_of_an_f_whose_first_operation_is_in_place() -> None:
    apart, batch = parts_and_batch(torch.float32)
    apart.f = nn.ModuleList(nn.Sequential(nn.ReLU(), f) for f in apart.f)
    in_place = copy.deepcopy(apart)
    for f in in_place.f:
        f[0].inplace = True  # pyright: ignore[reportIndexIssue]
    expected = gradients_of(Model(apart, STORED.build), batch)
    assert relative_error(gradients_of(Model(in_place, BY_NAME[OURS].build), batch), expected) < 1e-5
    # Another network, without a word: the stream itself went through the ReLU.
    assert relative_error(gradients_of(Model(in_place, BY_NAME["memcnn"].build), batch), expected) > 1e-2
    for name in ("RevTorch", STORED.name, "torch checkpoint"):
        with pytest.raises(RuntimeError, match=r"in-?place"):
            gradients_of(Model(in_place, BY_NAME[name].build), batch)


def test_the_command_prints_the_table_and_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    sizes = ["--blocks", "2", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "studies.peers", *sizes, "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == list(BY_NAME)
    assert written["threads"] == written["machine"]["threads"] == 1
    assert "torch" in written["versions"]
    assert all(name in done.stdout for name in BY_NAME)
