"""Every study that comes with the harness can be run as it is."""

from collections import Counter, defaultdict

import pytest

from harness.expansion import expand
from harness.study import SHIPPED, check_trials, load_study, shipped_studies
from revnet_core.networks.families import find_family


def test_the_studies_are_shipped() -> None:
    assert {"quickstart", "depth", "batch", "precision", "zero", "budget", "paper", "limit", "explode"} <= set(
        shipped_studies()
    )


@pytest.mark.parametrize("name", shipped_studies())
def test_a_shipped_study_says_what_it_asks_and_expands(name: str) -> None:
    study = load_study(name)
    trials = expand(study)
    check_trials(study, trials)
    assert study.name == name.replace("/", "-")
    assert study.question.endswith("?")
    assert study.predict
    assert (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").startswith(f"# {len(trials)} trials")


@pytest.mark.parametrize("name", sorted(set(shipped_studies()) - {"paper"}))
def test_networks_of_several_depths_are_equally_wide(name: str) -> None:
    """Else the growth with depth would be one with width as well: published networks differ in both."""
    widths: dict[str, set[tuple[int, ...]]] = defaultdict(set)
    for trial in expand(load_study(name)):
        family = find_family(trial.model)
        units = family.units(trial.depth or 0)
        assert units
        widths[trial.model].add(trial.channels or family.channels(units))
    assert all(len(of_model) == 1 for of_model in widths.values()), widths


def test_the_quickstart_compares_resnet_and_revnet_in_36_trials() -> None:
    trials = expand(load_study("quickstart"))
    assert Counter(trial.model for trial in trials) == {"resnet": 12, "revnet": 24}
    assert Counter((trial.activations, trial.reconstruction) for trial in trials) == {
        ("stored", "fp32"): 12,
        ("checkpointed", "fp32"): 12,
        ("reconstructed", "fp32"): 6,
        ("reconstructed", "exact"): 6,
    }
    assert {trial.depth for trial in trials} == {26, 38, 50}
    assert {trial.batch_size for trial in trials} == {16, 32}
    assert {(trial.warmup_steps, trial.measured_steps, trial.audit_batch_size) for trial in trials} == {(1, 3, 8)}


def test_zero_covers_every_stage_on_two_workers() -> None:
    trials = expand(load_study("zero"))
    assert {trial.zero_stage for trial in trials} == {0, 1, 2, 3}
    assert {trial.workers for trial in trials} == {2}
