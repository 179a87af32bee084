"""A study file is read strictly: what it says is kept, and what it says wrongly is refused at its line."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import StudyError
from harness.expansion import expand
from harness.sizes import parse_memory
from harness.store import RunStore
from harness.study import Study, check_trials, load_study
from harness.trials import DEEPSPEED_SET_BY_HARNESS, TrialSpec

HEAD = "name: x\nmodel: revnet\n"


def fault_of(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        Study.from_yaml(text, "x.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # The file as YAML
        ("", "x.yaml: is empty; a study has the keys name,"),
        ("[1]", "x.yaml: is no mapping; a study has the keys name,"),
        ("name: x\ngrid: {depth: [38}\n", "x.yaml:2: not YAML: "),
        ("name: x\n---\nname: y\n", "x.yaml:2: not YAML: "),
        ("name: x\x00y", "x.yaml: not YAML: "),
        (HEAD + "name: y\n", "x.yaml:3: name is given twice, first on line 1. Keep one of them."),
        (HEAD + "grid:\n  depth: [38]\n  depth: [62]\n", "x.yaml:5: grid.depth is given twice, first on line 4."),
        (HEAD + "grid: &a {}\nfixed: *a\n", "x.yaml:4: *a; a study has no aliases."),
        (HEAD + "1: 2\n", "x.yaml:3: the key 1 is not text;"),
        (HEAD + "question: 2020-01-01\n", "x.yaml:3: question is of type !!timestamp; allowed are text,"),
        (HEAD + "repeats: !!int many\n", "x.yaml:3: repeats = 'many' is no !!int."),
        (HEAD + "fixed: {learning_rate: .nan}\n", "x.yaml:3: fixed.learning_rate = .nan; a number is finite."),
        # Keys
        (HEAD + "\ngrids: {}\n", "x.yaml:4: unknown key 'grids'; did you mean 'grid'? Allowed: name, question,"),
        (HEAD + "color: red\n", "x.yaml:3: unknown key 'color'; remove it. Allowed: name,"),
        (HEAD + "data:\n  nam: cifar10\n", "x.yaml:4: unknown key 'nam' in data; did you mean 'name'? Allowed: name,"),
        (HEAD + "when: [{iff: {}, grid: {}}]\n", "unknown key 'iff' in when[0]; did you mean 'if'? Allowed: if, grid."),
        ("model: revnet\n", "x.yaml: name is missing. Add it."),
        ("name: x\n", "x.yaml: model = null; a study has a model, or an axis `model`. Add one."),
        (HEAD + "when:\n  - if: {depth: 38}\n", "x.yaml:4: when[0].grid is missing. Add it."),
        # Axes
        (HEAD + "grid:\n  depth:\n  - 38\n  - 62\n  - 0\n", "x.yaml:7: grid.depth[2] = 0; a depth is at least 1."),
        (HEAD + "grid: {depth: []}\n", "x.yaml:3: grid.depth = []; it may not be empty."),
        (HEAD + "grid: {depth: 38}\n", "x.yaml:3: grid.depth = 38; a list is needed here. Write [38]."),
        (HEAD + "grid: {dept: [38]}\n", "x.yaml:3: grid.dept = [38]; 'dept' is no field of a trial; did you mean"),
        (HEAD + "grid: {deepspeed: [a]}\n", "grid.deepspeed = [\"a\"]; deepspeed is the same for all trials. Move"),
        (HEAD + "grid: {data: [a]}\n", "grid.data = [\"a\"]; what differs between trials is given field by field:"),
        (HEAD + "grid: {image_size: [32]}\n", "'image_size' is no field of a trial; did you mean 'data.image_size' or"),
        (HEAD + "zip:\n- depth: [38, 62]\n  seed: [1]\n", "x.yaml:5: zip[0].seed = [1]; axes that move together are"),
        (HEAD + "zip: [{}]\n", "x.yaml:3: zip[0] = {}; it may not be empty."),
        # Values
        (HEAD + "fixed: {batch_size: 0}\n", "x.yaml:3: fixed.batch_size = 0; a batch size is at least 1. Correct"),
        (HEAD + "fixed: {workers: 0}\n", "fixed.workers = 0; workers are at least 1."),
        (HEAD + "fixed: {warmup_steps: -1}\n", "fixed.warmup_steps = -1; warmup steps are at least 0."),
        (HEAD + "fixed: {measured_steps: 0}\n", "fixed.measured_steps = 0; measured steps are at least 1."),
        (HEAD + "fixed: {zero_stage: 4}\n", "fixed.zero_stage = 4; a zero stage is at most 3."),
        (HEAD + "fixed: {batch_size: 1.5}\n", "fixed.batch_size = 1.5; it has to be a whole number."),
        (HEAD + "fixed: {batch_size: true}\n", "fixed.batch_size = true; it has to be a whole number."),
        (HEAD + "grid: {compile: [false, 1]}\n", "x.yaml:3: grid.compile[1] = 1; it has to be true or false."),
        (HEAD + "fixed: {cuda_graph: yes}\n", "x.yaml:3: fixed.cuda_graph = 'yes'; it has to be true or false."),
        (HEAD + "grid: {activations: [storred]}\n", "grid.activations[0] = 'storred'; did you mean 'stored'?"),
        (HEAD + "fixed: {compute: int4}\n", "fixed.compute = 'int4'; use one of fp32, tf32, bf16, fp16."),
        (HEAD + "fixed: {reconstruction: tf64}\n", "x.yaml:3: fixed.reconstruction = 'tf64'; did you mean 'fp64'"),
        (HEAD + "fixed: {activations: rebuilt}\n", "fixed.activations = 'rebuilt'; use one of stored, checkpointed,"),
        (HEAD + "fixed: {budget_bytes: 64MB}\n", "fixed.budget_bytes = '64MB'; allowed: a number of bytes"),
        (HEAD + "repeats: 0\n", "x.yaml:3: repeats = 0; repeats are at least 1."),
        ("model: m\nname: ../x\n", "x.yaml:2: name = '../x'; a name is 1 to 64 letters, digits,"),
        (HEAD + "data: {image_size: 0}\n", "x.yaml:3: data.image_size = 0; an image size is at least 1."),
        (HEAD + "resources:\n  timeout_s: 0\n", "x.yaml:4: resources.timeout_s = 0; a timeout is more than 0"),
        (HEAD + "resources: {memory: 2GB}\n", "x.yaml:3: resources.memory = '2GB'; allowed: a number of bytes,"),
        (HEAD + "grid:\n  data.image_size: [9, 0]\n", "x.yaml:4: grid.data.image_size[1] = 0; an image size is at"),
        (HEAD + "fixed: {data.image_size: x}\n", "x.yaml:3: fixed.data.image_size = 'x'; it has to be a whole number."),
        (HEAD + "grid: {data.name: ['']}\n", "x.yaml:3: grid.data.name[0] = ''; it may not be empty."),
        (HEAD + "exclude: [{data.path: 3}]\n", "x.yaml:3: exclude[0].data.path = 3; it has to be text."),
        (HEAD + "when: [{if: {data.nam: a}, grid: {seed: [1]}}]\n", "when[0].if.data.nam = 'a'; 'data.nam' is no"),
        (HEAD + "exclude: [{depth: 0}]\n", "x.yaml:3: exclude[0].depth = 0; a depth is at least 1."),
        (HEAD + "exclude: [{}]\n", "x.yaml:3: exclude[0] = {}; it may not be empty."),
        (HEAD + "when: [{if: {}, grid: {depth: [38]}}]\n", "x.yaml:3: when[0].if = {}; it may not be empty."),
        # One key in two places
        (HEAD + "grid: {model: [a]}\n", "x.yaml:3: grid.model = [\"a\"]; also given in the top. Keep one."),
        (HEAD + "fixed: {model: a}\n", "x.yaml:3: fixed.model = 'a'; the model is given at the top, or as"),
        (HEAD + "grid: {depth: [38]}\nzip: [{depth: [62]}]\n", "x.yaml:4: zip[0].depth = [62]; also given in grid."),
        (HEAD + "zip: [{seed: [1]},\n  {seed: [2]}]\n", "x.yaml:4: zip[1].seed = [2]; also given in zip[0]."),
        (HEAD + "grid: {seed: [1]}\nwhen: [{if: {depth: 38}, grid: {seed: [2]}}]\n", "when[0].grid.seed = [2]; also"),
        (HEAD + "grid: {seed: [1, 2]}\nrepeats: 2\n", "x.yaml:3: grid.seed = [1, 2]; also given in repeats."),
        (HEAD + "fixed: {seed: 1}\nrepeats: 2\n", "x.yaml:3: fixed.seed = 1; also given in repeats."),
        (
            HEAD + "data: {image_size: 32}\nfixed:\n  data.image_size: 64\n",
            "x.yaml:5: fixed.data.image_size = 64; also given in the section data. Keep one.",
        ),
        (
            HEAD + "when:\n- if: {depth: 38}\n  grid: {seed: [1]}\n- if: {seed: 1}\n  grid: {depth: [38]}\n",
            "x.yaml:4: when[0].if.depth = 38; this `when` or a later one sets it, so it is not decided yet.",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_refused_at_its_line(text: str, message: str) -> None:
    assert message in fault_of(text)


@pytest.mark.parametrize("keys", DEEPSPEED_SET_BY_HARNESS, ids=".".join)
def test_a_deepspeed_key_that_the_harness_sets_is_refused(keys: tuple[str, ...]) -> None:
    config = "deepspeed:\n" + "".join(f"{'  ' * depth}{key}:\n" for depth, key in enumerate(keys, start=1))
    message = f"x.yaml:{3 + len(keys)}: deepspeed.{'.'.join(keys)} = null; the harness sets this key from the trial."
    assert message in fault_of(HEAD + config)


def test_other_deepspeed_keys_pass_through_to_the_trials() -> None:
    config = "deepspeed: {zero_optimization: {reduce_bucket_size: 1000}, gradient_clipping: 0.0}\n"
    (trial,) = expand(Study.from_yaml(HEAD + config, "x.yaml"))
    assert trial.deepspeed == {"zero_optimization": {"reduce_bucket_size": 1000}, "gradient_clipping": 0.0}


def test_all_faults_are_told_at_once_in_the_order_of_the_file() -> None:
    lines = fault_of("name: x\nrepeats: 0\nfixed: {workers: 0}\ngrids: {}\nmodel: revnet\nquestion: 3\n").splitlines()
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "6"]


def test_a_python_tag_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    text = f"name: x\nmodel: !!python/object/apply:os.mkdir [{canary}]\n"
    assert "x.yaml:2: model is of type !!python/object/apply:os.mkdir; allowed are text," in fault_of(text)
    assert not canary.exists()


def test_yaml_1_2_words_are_text() -> None:
    study = Study.from_yaml("name: on\nmodel: yes\nquestion: no\n", "x.yaml")
    assert (study.name, study.model, study.question) == ("on", "yes", "no")


@pytest.mark.parametrize(
    ("given", "expected_bytes"),
    [
        (None, None),
        (4096, 4096),
        ("1KiB", 2**10),
        ("512 MiB", 2**29),
        ("2GiB", 2**31),
        ("1.5GiB", 3 * 2**29),
        ("1TiB", 2**40),
    ],
)
def test_memory_is_read_as_bytes(given: object, expected_bytes: int | None) -> None:
    assert parse_memory(given) == expected_bytes


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("2GB", "write 2GiB"),
        ("2 gib", "write 2GiB"),
        ("5M", "write 5MiB"),
        ("7", "give the unit"),
        ("7 parsec", "give the unit"),
        ("much", "such as 2GiB"),
        (0, "at least 1"),
        (-1, "at least 1"),
        (True, "such as"),
        (1.5, "such as"),
        ("0.3KiB", "whole"),
    ],
)
def test_other_amounts_of_memory_are_refused_with_a_hint(given: object, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        parse_memory(given)


# Of what a study may hold: no control characters, and none that turn the text around.
TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CHARACTERS = st.characters(codec="utf-8", exclude_categories=("Cs", "Cc"), exclude_characters=TURNS)
TEXTS = st.text(CHARACTERS, max_size=40)
STUDIES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "model": st.sampled_from(["revnet", "1e3", "null"]),
    },
    optional={
        "question": TEXTS,
        "predict": TEXTS,
        "data": st.fixed_dictionaries({"name": st.just("synthetic"), "image_size": st.integers(1, 64)}),
        "grid": st.fixed_dictionaries(
            {"depth": st.lists(st.integers(1, 99) | st.none(), min_size=1, max_size=3)},
            optional={"data.image_size": st.lists(st.integers(1, 99), min_size=1, max_size=3)},
        ),
        "zip": st.just([{"compute": ["fp32", "bf16"], "learning_rate": [0.1, 1]}]),
        "when": st.just([{"if": {"compute": "fp32"}, "grid": {"reconstruction": ["exact", "fp32"]}}]),
        "exclude": st.just([{"reconstruction": "fp32"}]),
        "fixed": st.fixed_dictionaries(
            {"learning_rate": st.floats(0, 1e6), "compute": st.just("fp32")}, optional={"data.path": st.just("folder")}
        ),
        "repeats": st.integers(1, 3),
        "resources": st.fixed_dictionaries({"memory": st.sampled_from(["1GiB", 5, None])}),
        "deepspeed": st.dictionaries(
            st.from_regex(r"my_[a-z0-9_.-]{0,9}", fullmatch=True), st.integers(-(2**63), 2**63 - 1) | TEXTS, max_size=2
        ),
    },
)


@given(data=STUDIES.filter(lambda data: "when" in data or "exclude" not in data))
def test_a_resolved_study_reads_back_as_itself(data: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    study = Study.model_validate(data)
    ids = [trial.id for trial in expand(study)]
    run = tmp_path_factory.mktemp("run")
    RunStore(run).open_for(study.resolved(), ids)
    again = load_study(run / "study.yaml")
    assert again == study
    assert again.resolved() == study.resolved()
    assert [trial.id for trial in expand(again)] == ids


def test_studies_that_differ_are_not_equal() -> None:
    assert Study.from_yaml(HEAD, "x.yaml") != Study.from_yaml(HEAD + "repeats: 2\n", "x.yaml")


def test_defaults_are_filled_in_but_not_under_an_axis() -> None:
    fixed = Study.from_yaml(HEAD + "grid: {batch_size: [8]}\nfixed: {workers: 2}\n", "x.yaml").resolved()["fixed"]
    assert "batch_size" not in fixed
    assert (fixed["workers"], fixed["depth"], fixed["activations"]) == (2, 38, "reconstructed")


def test_where_names_the_entry_that_a_value_comes_from() -> None:
    text = (
        "name: x\nmodel: revnet\ndata: {name: synthetic}\nfixed: {workers: 2}\ngrid:\n  depth:\n  - 38\n  - 62\n"
        "zip:\n- batch_size: [8,\n    16]\nwhen:\n- if: {depth: 38}\n  grid: {compute: [bf16]}\n"
        "- if: {depth: 62}\n  grid: {compute: [bf16]}\n- if: {batch_size: 8}\n  grid: {data.image_size: [64]}\n"
    )
    study = Study.from_yaml(text, "x.yaml")
    places = [
        ("model", "revnet", "x.yaml:2: model"),
        ("data.name", "synthetic", "x.yaml:3: data.name"),
        ("workers", 2, "x.yaml:4: fixed.workers"),
        ("depth", 62, "x.yaml:8: grid.depth[1]"),
        ("batch_size", 16, "x.yaml:11: zip[0].batch_size[1]"),
        ("compute", "bf16", "x.yaml:14: when[0].grid.compute[0]"),
        ("zero_stage", 0, "x.yaml"),
        ("data.image_size", 64, "x.yaml:18: when[2].grid.data.image_size[0]"),
    ]
    assert [study.where(key, value) for key, value, _ in places] == [place for *_, place in places]
    last = expand(study)[-1]
    assert study.where("compute", "bf16", last) == "x.yaml:16: when[1].grid.compute[0]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nmodel: revnett\n", "x.yaml:2: model: unknown model 'revnett'"),
        ("name: x\nmodel: revnet\ngrid:\n  depth: [38,\n    40]\n", "x.yaml:5: grid.depth[1] = 40; "),
        ("name: x\nmodel: revnet\nfixed:\n  depth: null\n", "x.yaml:4: fixed.depth: revnet needs a depth"),
        ("name: x\nmodel: no_such_module:make\n", "x.yaml:2: model: cannot import the model 'no_such_module:make'"),
        (HEAD + "data:\n  name: cifar01\n", "x.yaml:4: data.name = 'cifar01'; "),
        (HEAD + "data:\n  path: nowhere\n", "x.yaml:4: data.path = "),
        (HEAD + "grid:\n  data.image_size:\n  - 32\n  - 224\n", "x.yaml:6: grid.data.image_size[1] = 224; the "),
        (HEAD + "fixed:\n  data.path: nowhere\n", "x.yaml:4: fixed.data.path = 'nowhere' does not exist"),
        (
            "name: x\nmodel: revnet\nzip:\n- data.image_size: [32, 224]\n  data.name: [cifar10,\n    imagenet]\n",
            "x.yaml:6: zip[0].data.name[1] = 'imagenet'; ",
        ),
    ],
)
def test_a_model_or_data_set_that_does_not_exist_is_told_at_its_place(text: str, message: str) -> None:
    study = Study.from_yaml(text, "x.yaml")
    with pytest.raises(StudyError) as caught:
        check_trials(study, expand(study))
    assert str(caught.value).startswith(message)
    assert str(caught.value).count("\n") == 0


def test_models_and_data_sets_that_exist_pass() -> None:
    study = Study.from_yaml("name: x\ngrid: {model: [revnet, resnet]}\nfixed: {activations: stored}\n", "x.yaml")
    check_trials(study, expand(study))


def test_a_study_file_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(HEAD + "repeats: 0\n", encoding="utf-8")
    with pytest.raises(StudyError, match=r"^my\.yaml:3: repeats = 0"):
        load_study("my.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("qickstart", r"^qickstart: no such file or shipped study; did you mean 'quickstart'\? Give a YAML file"),
        ("dir", r"^dir: is a directory\."),
        ("no/depht.yaml", "did you mean 'depth'"),
        ("latin.yaml", "^latin.yaml: cannot be read as UTF-8 text"),
    ],
)
def test_a_study_that_cannot_be_found_or_read_is_refused(
    given: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(StudyError, match=message):
        load_study(given)


def test_reading_a_study_loads_no_heavy_library() -> None:
    code = (
        "import sys, harness.study; harness.study.load_study('quickstart'); "
        "print(sorted({'torch', 'numpy', 'ray', 'deepspeed', 'pandas'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_a_trial_spec_survives_as_json() -> None:
    (trial,) = expand(Study.from_yaml(HEAD, "x.yaml"))
    assert TrialSpec.from_json(trial.canonical_json()) == trial


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "grid: {activations: [stored, budgeted]}",
            r"x.yaml:3: grid.activations\[1\] = 'budgeted'; it needs budget_bytes",
        ),
        ("fixed: {budget_bytes: 64MiB}", r"x.yaml:3: fixed.budget_bytes = 67108864; .*'reconstructed', which have no"),
    ],
)
def test_a_budget_belongs_to_budgeted_activations(text: str, message: str) -> None:
    with pytest.raises(StudyError, match=message):
        expand(Study.from_yaml(HEAD + text + "\n", "x.yaml"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("fixed: {warmup_steps: 0}\ngrid: {compile: [false, true]}", "x.yaml:3: fixed.warmup_steps = 0; "),
        ("grid:\n  compile: [true]\n  warmup_steps: [2, 0]", r"x.yaml:5: grid.warmup_steps\[1\] = 0; "),
    ],
)
def test_what_compiling_takes_is_not_measured(text: str, line: str) -> None:
    with pytest.raises(StudyError, match=f"^{line}with compile true the first step compiles"):
        expand(Study.from_yaml(HEAD + text + "\n", "x.yaml"))
    excluded = HEAD + text + "\nexclude: [{compile: true, warmup_steps: 0}]\n"
    if "grid: {" in text:
        assert [trial.compile for trial in expand(Study.from_yaml(excluded, "x.yaml"))] == [False]


def test_how_a_step_is_executed_is_an_axis_like_any_other() -> None:
    text = "grid: {compile: [false, true]}\nzip: [{cuda_graph: [false, true], depth: [38, 62]}]\n"
    text += "when: [{if: {compile: true}, grid: {seed: [1, 2]}}]\nexclude: [{compile: true, cuda_graph: true}]\n"
    trials = expand(Study.from_yaml(HEAD + text, "x.yaml"))
    found = [(trial.compile, trial.cuda_graph, trial.depth, trial.seed) for trial in trials]
    assert found == [(False, False, 38, 0), (False, True, 62, 0), (True, False, 38, 1), (True, False, 38, 2)]


def test_a_budget_is_an_axis_in_any_unit() -> None:
    text = HEAD + "grid: {activations: [reconstructed, budgeted]}\nwhen:\n- if: {activations: budgeted}\n"
    trials = expand(Study.from_yaml(text + "  grid: {budget_bytes: [1MiB, 2 GiB, 7]}\n", "x.yaml"))
    assert [trial.budget_bytes for trial in trials] == [None, 2**20, 2**31, 7]
