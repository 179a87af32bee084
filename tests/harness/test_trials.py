"""Ids depend on content alone; a study expands to exactly the combinations that it writes down."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import StudyError
from harness.expansion import expand
from harness.study import Study
from harness.trials import TrialSpec

AXIS_VALUES: dict[str, st.SearchStrategy[Any]] = {
    "depth": st.none() | st.integers(1, 500),
    "batch_size": st.integers(1, 512),
    "activations": st.sampled_from(["stored", "checkpointed", "reconstructed"]),
    "compute": st.sampled_from(["fp32", "tf32", "bf16", "fp16"]),
    "zero_stage": st.integers(0, 3),
    "compile": st.booleans(),
    "cuda_graph": st.booleans(),
    "guard_every": st.integers(0, 3),
    "guard_tolerance": st.floats(0, 1),
    "guard_action": st.sampled_from(["stop", "warn", "store"]),
    "learning_rate": st.floats(0, 10),
}
AXES = st.fixed_dictionaries(
    {}, optional={key: st.lists(values, min_size=1, max_size=3, unique=True) for key, values in AXIS_VALUES.items()}
)
SPECS = st.fixed_dictionaries({"model": st.from_regex(r"\A[A-Za-z0-9_][A-Za-z0-9_.:-]{0,4}\Z")}, optional=AXIS_VALUES)


def trials_of(**keys: Any) -> list[TrialSpec]:
    return expand(Study.model_validate({"name": "x", "model": "revnet", **keys}))


def shuffled(value: Any, order: random.Random) -> Any:
    if not isinstance(value, dict):
        return value
    keys = list(value)
    order.shuffle(keys)
    return {key: shuffled(value[key], order) for key in keys}


@given(spec=SPECS, order=st.randoms(use_true_random=False))
def test_the_id_depends_on_content_and_not_on_the_order_of_keys(spec: dict[str, Any], order: random.Random) -> None:
    trial = TrialSpec.model_validate(spec)
    again = TrialSpec.from_json(json.dumps(shuffled(trial.model_dump(mode="json"), order)))
    assert again == trial
    assert again.id == trial.id
    assert len(trial.id) == 12
    assert set(trial.id) <= set("0123456789abcdef")


@given(one=SPECS, other=SPECS)
def test_ids_are_equal_exactly_when_specs_are(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = TrialSpec.model_validate(one), TrialSpec.model_validate(other)
    assert (first.id == second.id) == (first == second)


def test_the_id_of_a_known_spec_stays_what_it_is() -> None:
    # A changed id makes every finished trial of every run run again.
    assert TrialSpec(model="revnet").id == "f7c62b101152"
    assert TrialSpec(model="revnet", learning_rate=1).id == TrialSpec(model="revnet", learning_rate=1.0).id


def test_the_id_does_not_depend_on_where_a_study_gives_the_data_set() -> None:
    section = {"data": {"name": "synthetic", "image_size": 64}}
    named = {"data.name": "synthetic", "data.image_size": 64}
    listed = {key: [value] for key, value in named.items()}
    places = [
        section,
        {"fixed": named},
        {"grid": listed},
        {"zip": [listed]},
        {"when": [{"if": {"depth": 38}, "grid": listed}]},
        section | {"data": {"name": "synthetic"}, "fixed": {"data.image_size": 64}},
        {"data": {"name": "cifar10"}, "grid": listed},
    ]
    assert [[trial.id for trial in trials_of(**place)] for place in places] == [["d3fcef80aa42"]] * len(places)


def test_the_spec_has_the_keys_of_the_contract() -> None:
    assert TrialSpec(model="revnet").model_dump(mode="json") == {
        "model": "revnet", "depth": 38, "channels": None, "log_scale_gain": None,
        "data": {"name": "cifar10", "path": None, "image_size": 32}, "batch_size": 32,
        "activations": "reconstructed", "budget_bytes": None, "compute": "fp32", "reconstruction": "fp32",
        "zero_stage": 0, "workers": 1,
        "warmup_steps": 2, "measured_steps": 5, "audit_batch_size": 16, "amplification": False,
        "drift_steps": 0, "drift_audits": 11, "learning_rate": 0.1, "seed": 0,
        "resources": {"gpus_per_worker": None, "cpus_per_worker": 1, "memory_bytes": None}, "deepspeed": {},
    }  # fmt: skip


def test_a_guard_is_in_the_spec_where_a_field_of_it_is_given() -> None:
    guards = [{"guard_every": 50}, {"guard_tolerance": 0.5}, {"guard_action": "warn"}]
    usual = {"guard_every": 0, "guard_tolerance": 1e-3, "guard_action": "stop"}
    for guard in guards:
        plain = TrialSpec.model_validate({"model": "revnet", **guard}).model_dump(mode="json")
        assert {name: plain[name] for name in usual} == usual | guard
    assert TrialSpec.model_validate({"model": "revnet", **usual}).id == TrialSpec(model="revnet").id
    assert len({trial.id for trial in trials_of(grid={"guard_every": [0, 50], "guard_action": ["stop", "warn"]})}) == 4


def test_how_a_step_is_executed_is_in_the_spec_where_it_is_not_as_written() -> None:
    assert TrialSpec(model="revnet", compile=False, cuda_graph=False).id == "f7c62b101152"
    modes = [{"compile": True}, {"cuda_graph": True}, {"compile": True, "cuda_graph": True}]
    for mode in modes:
        trial = TrialSpec.model_validate({"model": "revnet", **mode})
        said = trial.model_dump(mode="json")
        assert {name: said[name] for name in said if name in ("compile", "cuda_graph")} == mode
        assert TrialSpec.from_json(trial.canonical_json()) == trial
    assert len({trial.id for trial in trials_of(grid={"compile": [False, True], "cuda_graph": [False, True]})}) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "spec.json: not JSON"),
        ("[]", "spec.json: .*it has to be a mapping"),
        ('{"model": "a", "dept": 3}', "spec.json: unknown key 'dept'; did you mean 'depth'"),
        ('{"model": "a", "depth": 0}', "spec.json: depth = 0; a depth is at least 1"),
        ('{"depth": 38}', "spec.json: model is missing"),
        ('{"model": "a", "deepspeed": {"fp16": {}}}', "spec.json: deepspeed.fp16 = {}; the harness sets this key"),
        ('{"model": "a", "learning_rate": NaN}', "spec.json: learning_rate = NaN; "),
        ('{"model": "a", "activations": "budgeted"}', "spec.json: budget_bytes belongs to activations 'budgeted'"),
        ('{"model": "a", "compile": true, "warmup_steps": 0}', "spec.json: warmup_steps = 0; with compile true"),
        ('{"model": "a", "compile": 1}', "spec.json: compile = 1; it has to be true or false"),
        ('{"model": "a", "budget_bytes": 64}', "spec.json: budget_bytes belongs to activations 'budgeted'"),
        ('{"model": "a", "deepspeed": {"x": [1, Infinity]}}', "spec.json: deepspeed"),
    ],
)
def test_a_spec_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(StudyError, match=f"^{message}"):
        TrialSpec.from_json(text, source="spec.json")


@given(grid=AXES, pairs=st.integers(0, 3), repeats=st.integers(1, 3))
def test_a_study_expands_to_the_product_of_its_axes(grid: dict[str, list[Any]], pairs: int, repeats: int) -> None:
    zipped = [{"workers": list(range(1, pairs + 1)), "measured_steps": list(range(11, pairs + 11))}] if pairs else []
    trials = trials_of(grid=grid, zip=zipped, repeats=repeats)
    assert len(trials) == math.prod(map(len, grid.values())) * max(pairs, 1) * repeats
    assert len({trial.id for trial in trials}) == len(trials)
    for key, values in grid.items():
        assert {getattr(trial, key) for trial in trials} == set(values)
    if pairs:
        assert {trial.measured_steps - trial.workers for trial in trials} == {10}


def test_the_order_is_as_written_with_seeds_innermost() -> None:
    trials = trials_of(
        grid={"depth": [62, 38], "batch_size": [8, 4]},
        zip=[{"compute": ["fp32", "bf16"]}],
        when=[{"if": {"depth": 38}, "grid": {"activations": ["stored", "checkpointed"]}}],
        repeats=2,
    )
    rows = [(t.depth, t.batch_size, t.compute, t.activations, t.seed) for t in trials]
    expected = [
        (depth, batch_size, compute, activations, seed)
        for depth in (62, 38)
        for batch_size in (8, 4)
        for compute in ("fp32", "bf16")
        for activations in (("stored", "checkpointed") if depth == 38 else ("reconstructed",))
        for seed in (0, 1)
    ]
    assert rows == expected


def test_a_trial_that_comes_up_twice_is_kept_where_it_came_first() -> None:
    assert [trial.depth for trial in trials_of(grid={"depth": [62, 38, 62]})] == [62, 38]


def test_axes_go_above_fixed_and_fixed_above_defaults() -> None:
    trials = trials_of(
        grid={"depth": [38, 62]},
        fixed={"reconstruction": "bf16"},
        when=[{"if": {"depth": 62}, "grid": {"reconstruction": ["exact"]}}],
    )
    assert [(trial.depth, trial.reconstruction) for trial in trials] == [(38, "bf16"), (62, "exact")]


def test_sections_of_the_study_reach_every_trial() -> None:
    (trial,) = trials_of(
        data={"name": "synthetic", "image_size": 64},
        resources={"gpus_per_worker": 1, "cpus_per_worker": 2, "memory": "2GiB", "timeout_s": 5},
        deepspeed={"gradient_clipping": 0.0},
    )
    assert trial.data.model_dump() == {"name": "synthetic", "path": None, "image_size": 64}
    assert trial.resources.model_dump() == {"gpus_per_worker": 1, "cpus_per_worker": 2, "memory_bytes": 2**31}
    assert trial.deepspeed == {"gradient_clipping": 0.0}


def test_how_long_one_is_willing_to_wait_does_not_change_the_id() -> None:
    (patient,), (hasty,) = trials_of(resources={"timeout_s": 900}), trials_of(resources={"timeout_s": 1})
    assert patient.id == hasty.id


def test_the_data_set_can_differ_between_trials() -> None:
    trials = trials_of(
        grid={"depth": [38, 62]},
        when=[
            {"if": {"depth": 62}, "grid": {"data.image_size": [32, 64]}},
            {"if": {"data.image_size": 64}, "grid": {"data.name": ["synthetic"]}},
        ],
    )
    rows = [(trial.depth, trial.data.name, trial.data.image_size) for trial in trials]
    assert rows == [(38, "cifar10", 32), (62, "cifar10", 32), (62, "synthetic", 64)]


GRID = {"depth": [38, 62], "data.image_size": [32, 64], "activations": ["stored", "reconstructed"]}


@given(condition=st.fixed_dictionaries({}, optional={key: st.sampled_from(GRID[key]) for key in GRID}).filter(bool))
def test_exclude_drops_the_combinations_that_match_every_key(condition: dict[str, Any]) -> None:
    everything = trials_of(grid=GRID)
    matching = [t for t in everything if all(t.value(key) == value for key, value in condition.items())]
    assert matching
    assert trials_of(grid=GRID, exclude=[condition]) == [trial for trial in everything if trial not in matching]


@given(condition=st.fixed_dictionaries({}, optional={key: st.sampled_from(GRID[key]) for key in GRID}).filter(bool))
def test_when_multiplies_only_the_combinations_that_match_every_key(condition: dict[str, Any]) -> None:
    trials = trials_of(grid=GRID, when=[{"if": condition, "grid": {"reconstruction": ["fp64", "exact"]}}])
    for trial in trials:
        matches = all(trial.value(key) == value for key, value in condition.items())
        assert (trial.reconstruction in ("fp64", "exact")) == matches
    assert len(trials) == 8 + 8 // 2 ** len(condition)


def test_a_when_may_follow_from_another_and_from_what_is_fixed() -> None:
    trials = trials_of(
        fixed={"workers": 2},
        when=[
            {"if": {"workers": 2}, "grid": {"activations": ["stored", "reconstructed"]}},
            {"if": {"activations": "reconstructed"}, "grid": {"reconstruction": ["fp32", "exact"]}},
        ],
    )
    rows = [(trial.activations, trial.reconstruction) for trial in trials]
    assert rows == [("stored", "fp32"), ("reconstructed", "fp32"), ("reconstructed", "exact")]


def test_two_whens_may_set_one_key_where_they_exclude_each_other() -> None:
    whens = [{"if": {"depth": depth}, "grid": {"batch_size": [depth]}} for depth in (38, 62)]
    assert [trial.batch_size for trial in trials_of(grid={"depth": [38, 62]}, when=whens)] == [38, 62]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "exclude:\n- {depth: 38}\n- {depth: 110}\n",
            "x.yaml:6: exclude[1].depth = 110; no combination has it: depth is 38, 62. Correct the value",
        ),
        (
            "exclude:\n- {depth: 38, batch_size: 8}\n",
            "x.yaml:5: exclude[0].batch_size = 8; no combination has it: batch_size is 32.",
        ),
        (
            "when:\n- if: {depth: 38}\n  grid: {workers: [2]}\n- if: {depth: 62, workers: 2}\n  grid: {seed: [1]}\n",
            "x.yaml:7: when[1].if; no combination has all of these at once.",
        ),
        (
            "when:\n- if: {activations: stored}\n  grid: {workers: [2]}\n",
            "x.yaml:5: when[0].if.activations = 'stored'; no combination has it: activations is 'reconstructed'.",
        ),
        (
            "when:\n- if: {depth: 38}\n  grid: {seed: [1]}\n- if: {workers: 1}\n  grid:\n    seed: [2]\n",
            "x.yaml:9: when[1].grid.seed; when[0] sets seed for some of the same combinations.",
        ),
        ("exclude: [{workers: 1}]\n", "x.yaml:4: exclude; it drops every combination, so that no trial is left."),
    ],
)
def test_what_matches_nothing_or_leaves_nothing_is_refused(keys: str, message: str) -> None:
    study = Study.from_yaml("name: x\nmodel: revnet\ngrid: {depth: [38, 62]}\n" + keys, "x.yaml")
    with pytest.raises(StudyError) as caught:
        expand(study)
    assert str(caught.value).startswith(message)


def test_overlapping_excludes_are_allowed() -> None:
    trials = trials_of(grid=GRID, exclude=[{"depth": 38}, {"depth": 38, "activations": "stored"}])
    assert {trial.depth for trial in trials} == {62}
