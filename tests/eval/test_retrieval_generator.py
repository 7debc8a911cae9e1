"""The generator of retrieval samples: the same everywhere, of the wanted length, with the right answers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest

from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache_eval.retrieval import Sample, kinds, samples, write_jsonl
from hf_kvcache_eval.retrieval.generator import depth
from hf_kvcache_eval.retrieval.haystack import Haystack
from hf_kvcache_eval.retrieval.ready import read_ready
from tests.eval.retrieval_toys import tokenizer

LENGTH = 400
KINDS = ["multikey", "needle", "passkey", "quote", "vartrack"]
#: Answers of the second sample of seed 0.
RECORDED = {"multikey": ("8411703",), "needle": ("1371666",), "passkey": ("89245",), "vartrack": ("PLL", "AYK")}


@pytest.fixture(scope="module")
def made() -> dict[str, list[Sample]]:
    """Sixteen samples of each kind."""
    return {kind: samples(kind, LENGTH, 16, 3, tokenizer()) for kind in KINDS}


def tokens(sample: Sample) -> int:
    """Tokens of context, question and answers."""
    texts = [sample.context, sample.question, ", ".join(sample.answers)]
    return sum(len(ids) for ids in tokenizer()(texts)["input_ids"])


def test_kinds_are_found_by_their_files() -> None:
    assert list(kinds()) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_same_arguments_same_samples(kind: str, made: dict[str, list[Sample]]) -> None:
    assert samples(kind, LENGTH, 16, 3, tokenizer()) == made[kind]
    assert samples(kind, LENGTH, 5, 3, tokenizer()) == made[kind][:5], "a sample depends on how many there are"


@pytest.mark.parametrize("kind", KINDS)
def test_other_seed_other_samples(kind: str, made: dict[str, list[Sample]]) -> None:
    other = samples(kind, LENGTH, 16, 4, tokenizer())
    assert all(a.context != b.context and a.answers != b.answers for a, b in zip(made[kind], other, strict=True))


def test_samples_of_a_set_differ(made: dict[str, list[Sample]]) -> None:
    for kind in KINDS:
        assert len({sample.context for sample in made[kind]}) == 16
        assert len({sample.answers for sample in made[kind]}) == 16


def test_recorded_samples() -> None:
    """Fails where another version of Python or of this code draws otherwise: then VERSION has to be raised."""
    for kind, answers in RECORDED.items():
        assert samples(kind, LENGTH, 2, 0, tokenizer())[1].answers == answers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [300, 512, 2048, 8000])
def test_length(kind: str, length: int) -> None:
    for sample in samples(kind, length, 4, 0, tokenizer()):
        assert length - 40 <= tokens(sample) <= length


def test_answers_stand_in_the_context_and_not_in_the_question(made: dict[str, list[Sample]]) -> None:
    for kind in KINDS:
        for sample in made[kind]:
            assert all(answer in sample.context and answer not in sample.question for answer in sample.answers)


def test_depths_are_even() -> None:
    assert sorted(depth(index) for index in range(16)) == [(2 * i + 1) / 32 for i in range(16)]
    assert len({depth(index) for index in range(1000)}) == 1000


@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_stands_at_the_depth(kind: str) -> None:
    for sample in samples(kind, 2048, 8, 0, tokenizer()):
        found = sample.context.index(sample.answer) / len(sample.context)
        assert abs(found - depth(sample.index)) < 0.05


def test_only_one_needle_and_several_keys(made: dict[str, list[Sample]]) -> None:
    for kind, count in (("needle", 1), ("multikey", 4)):
        for sample in made[kind]:
            said = dict(re.findall(r"The magic number of the (\S+) is (\d{7})\.", sample.context))
            asked = re.findall(r"of the ([a-z]+-[a-z]+)", sample.question)
            assert len(said) == count
            assert sample.answers == (said[asked[0]],)


def test_variables_by_brute_force(made: dict[str, list[Sample]]) -> None:
    """Follow every assignment in the order of the text."""
    for sample in made["vartrack"]:
        values: dict[str, str] = {}
        for name, right in re.findall(r"VAR (\w+) = (VAR \w+|\d+)\.", sample.context):
            values[name] = values[right.removeprefix("VAR ")] if right.startswith("VAR") else right
        asked = re.findall(r"\d{5}", sample.question)[-1]
        assert {name for name, value in values.items() if value == asked} == set(sample.answers)
        assert len(set(values.values())) > 1 or len(values) == len(sample.answers)


def test_quotes_are_literal(made: dict[str, list[Sample]]) -> None:
    for sample in made["quote"]:
        cue = sample.question.removeprefix("\n\n")
        assert cue + sample.answer in sample.context
        assert sample.context.count(cue) == 1


def test_the_haystack_starts_elsewhere_each_time() -> None:
    haystack = Haystack(*packaged_text(), tokenizer())
    count = len(haystack.sentences)
    assert len({haystack.start(5, index) for index in range(count)}) == count


def test_haystack_leaves_little_unused() -> None:
    haystack = Haystack(*packaged_text(), tokenizer())
    cost = dict(zip(haystack.sentences, haystack.costs, strict=True))
    rng = Random(0)
    for _ in range(50):
        start, budget = rng.randrange(len(cost)), rng.randrange(100, 9000)
        used = sum(cost[sentence] for sentence in haystack.take(start, budget))
        assert budget - 20 <= used <= budget


def test_write(tmp_path: Path, made: dict[str, list[Sample]]) -> None:
    path = tmp_path / "set.jsonl"
    write_jsonl(path, "multikey", LENGTH, 3, 3, tokenizer())
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["context"] for row in rows] == [sample.context for sample in made["multikey"][:3]]
    assert [tuple(row["answers"]) for row in rows] == [sample.answers for sample in made["multikey"][:3]]
    assert {(row["kind"], row["length"]) for row in rows} == {("multikey", LENGTH)}


def test_ready_sets(tmp_path: Path) -> None:
    (tmp_path / "longctx").mkdir()
    rows = {
        "passkey": {"input": "Intro.\nThe key is 5.\nWhat is it?", "gen_prefix": "It is", "outputs": ["5"]},
        "quote": {"input": "One two three.\n\nOne two", "gen_prefix": "", "outputs": ["three."]},
    }
    for name, row in rows.items():
        text = json.dumps({**row, "depth": 0.5, "index": 0}) + "\n"
        (tmp_path / "longctx" / f"{name}_512.jsonl").write_text(text, encoding="utf-8")
    found = {name: read_ready(tmp_path, f"longctx_{name}", 512, 1)[0][0] for name in rows}
    assert found["passkey"] == Sample("Intro.\nThe key is 5.", "\nWhat is it? It is", ("5",), 0.5, 0)
    assert found["quote"] == Sample("One two three.", "\n\nOne two", (" three.",), 0.5, 0)
    with pytest.raises(ValueError, match=r"length=1024: no .*passkey_512.jsonl"):
        read_ready(tmp_path, "longctx_passkey", 1024, 1)
    with pytest.raises(ValueError, match=r"samples=2; .* has 1"):
        read_ready(tmp_path, "longctx_passkey", 512, 2)
    with pytest.raises(ValueError, match="no data folder was given"):
        read_ready(None, "longctx_passkey", 512, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pass", 512, 1, 0), "kind='pass'; accepted: multikey, needle, passkey, quote, vartrack"),
        (("needle", 0, 1, 0), "length=0; accepted"),
        (("needle", 512, True, 0), "count=True; accepted"),
        (("needle", 512, 1, 0.5), "seed=0.5; accepted"),
        (("needle", 30, 1, 0), "length=30; accepted: more than"),
        (("quote", 30, 1, 0), "length=30; accepted: more than"),
    ],
)
def test_bad_arguments(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        samples(*arguments, tokenizer())


def test_a_text_without_sentences() -> None:
    with pytest.raises(ValueError, match="'empty' has no sentence"):
        Haystack("A heading\n", "empty", tokenizer())
