"""A study that is made to harm: refused at its line before it costs anything, or text like any other."""

from pathlib import Path

import pytest

from harness.errors import StudyError
from harness.expansion import expand
from harness.study import Study, load_study
from harness.yaml_lines import MOST_BYTES

HEAD = "name: hostile\nmodel: revnet\n"


def refusal(text: str) -> str:
    with pytest.raises(StudyError) as refused:
        expand(Study.from_yaml(HEAD + text, "study.yaml"))
    # A value that is too long is cut, so that what is wrong can be read.
    assert max(map(len, str(refused.value).splitlines())) < 400
    return str(refused.value)


@pytest.mark.parametrize(
    "name", ["../elsewhere", "a/b", "/etc/passwd", ".hidden", "..", "a\\0b", "s3://bucket", "a" * 65, "", "-rf"]
)
def test_a_name_cannot_leave_the_run_folder(name: str) -> None:
    with pytest.raises(StudyError, match=r"study\.yaml:1: name"):
        Study.from_yaml(f'name: "{name}"\nmodel: revnet\n', "study.yaml")


@pytest.mark.parametrize(
    "value",
    ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!!binary aGk=", "!Study {a: 1}"],
)
def test_a_tag_makes_no_object(value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(f"question: {value}\n")
    assert said.startswith("study.yaml:3: question is of type !")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"fixed: {{depth: 1{'0' * 400}}}", "study.yaml:3: fixed.depth = 1000"),
        (f"fixed: {{depth: 1{'0' * 5000}}}", "study.yaml:3: fixed.depth = '1000"),
        (f"fixed: {{depth: 0x{'f' * 5000}}}", "study.yaml:3: fixed.depth = 0xfff"),
        (f"deepspeed: {{a: 1{'0' * 400}}}", "study.yaml:3: deepspeed.a = 1000"),
        ("fixed: {learning_rate: 1e400}", "fixed.learning_rate = 1e400; a number is finite"),
        ("fixed: {learning_rate: .nan}", "fixed.learning_rate = .nan; a number is finite"),
        ("fixed: {depth: 100001}", "fixed.depth = 100001; a depth is at most 100000"),
        ("fixed: {batch_size: 16777217}", "a batch size is at most 16777216"),
        ("fixed: {workers: 65537}", "workers are at most 65536"),
        ("fixed: {measured_steps: 10000001}", "measured steps are at most 10000000"),
        ("fixed: {channels: [1048577, 1, 1]}", "study.yaml:3: fixed.channels"),
        ("data: {name: synthetic, image_size: 16385}", "an image size is at most 16384"),
        ("resources: {timeout_s: 1.0e+300}", "a timeout is at most 31536000"),
        ("resources: {max_attempts: 1001}", "max attempts are at most 1000"),
        ("resources: {cpus_per_worker: 4097}", "cpus per worker are at most 4096"),
        ("repeats: 100001", "study.yaml:3: repeats = 100001; repeats are at most 100000"),
    ],
)
def test_a_huge_number_is_refused_at_its_line(text: str, says: str) -> None:
    assert says in refusal(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            f"grid: {{seed: {list(range(400))}, batch_size: {list(range(1, 400))}}}",
            "study.yaml:3: grid; 159600 combinations, and at most 100000 are allowed",
        ),
        (
            f"when: [{{if: {{model: revnet}}, grid: {{seed: {list(range(400))}, batch_size: {list(range(1, 400))}}}}}]",
            "study.yaml:3: when[0].grid; 159600 combinations",
        ),
        (f"grid: {{batch_size: {list(range(1, 400))}}}\nrepeats: 1000", "study.yaml:4: repeats; 399000 combinations"),
    ],
)
def test_too_many_combinations_are_counted_and_not_made(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr("harness.expansion._trial", made.append)
    assert says in refusal(text)
    assert made == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"grid: {'[' * 3000}{']' * 3000}", "study.yaml:3: nested 17 levels deep; a study has at most 16"),
        (f"deepspeed: {'{a: ' * 2000}1{'}' * 2000}", "study.yaml:3: nested 17 levels deep"),
        ("grid: &all {depth: [14]}\nfixed: *all", "study.yaml:4: *all; a study has no aliases"),
        (f"question: {'a' * MOST_BYTES}", "study.yaml: larger than 262144 bytes"),
        ('question: "\\e[2J"', "study.yaml:3: question holds \\x1b; text has no control characters"),
        ('data: {path: "a\\0b"}', "study.yaml:3: data.path holds \\x00"),
        ('"a\\u202eb": 1', "study.yaml:3: a key holds \\u202e"),
    ],
)
def test_what_would_grow_or_deceive_is_refused(text: str, says: str) -> None:
    assert says in refusal(text)


def test_a_file_is_read_no_further_than_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "endless.yaml"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StudyError, match="larger than 262144 bytes"):
        load_study(path)


def test_what_is_large_and_allowed_is_a_study() -> None:
    text = f"grid: {{seed: {list(range(300))}}}\nfixed: {{depth: 99998, batch_size: 16777216, workers: 65536}}\n"
    question = "question: <script>alert(1)</script> ../../etc, é, 日本語, 🙂\n"
    study = Study.from_yaml(
        HEAD + question + text + "deepspeed: {a: {b: [[1], [9223372036854775807]]}}\n", "study.yaml"
    )
    assert len(expand(study)) == 300
    assert study.question == "<script>alert(1)</script> ../../etc, é, 日本語, 🙂"
