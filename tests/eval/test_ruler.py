"""RULER's tasks: where a document is cut, what the mean is of, and that documents and scores are lm-eval's own."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.api.utils import requires_delimiter
from lm_eval.tasks.ruler import common_utils
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_kvcache.cli.models import default_model_folder
from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.protocol import Reader
from hf_kvcache_eval.ruler import TASKS, RulerTask
from hf_kvcache_eval.ruler.samples import Kind, _seeded, make_samples, score
from hf_kvcache_eval.suites import SIZES, entry
from hf_kvcache_eval.task import Bench
from tests.eval.retrieval_toys import bench, tokenizer

LENGTH = 512


def documents(*answers: str) -> Kind:
    """A kind whose documents all have the same answers, and contexts that are drawn."""

    def make(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:
        words = [" ".join(random.choices(("grass", "sky", "sun", "hill"), k=40)) for _ in range(count)]
        return [
            {"input": f"{text}.\nQuestion: is there\nQuestion: which?", "gen_prefix": "It is", "outputs": list(answers)}
            for text in words
        ]

    return Kind(make, 6, "\nQuestion:")


@pytest.fixture
def toys() -> Iterator[None]:
    """In place of RULER's tasks: one whose answers every output has, one with half of them, one with none."""
    before = dict(TASKS)
    TASKS.clear()
    # Every text has the empty one in it, and no output has room for the other.
    TASKS.update({"all": documents(""), "half": documents("", "m" * 99), "none": documents("m" * 99)})
    yield
    TASKS.clear()
    TASKS.update(before)


@pytest.mark.usefixtures("toys")
def test_a_document_is_cut_in_front_of_its_question() -> None:
    made = make_samples("half", LENGTH, 3, 0, None)
    assert all(sample.question == "\nQuestion: which? It is" for sample in made)
    assert all(sample.context.endswith(".\nQuestion: is there") for sample in made)
    assert [sample.answers for sample in made] == [("", "m" * 99)] * 3 and [sample.index for sample in made] == [
        0,
        1,
        2,
    ]
    state = random.getstate()
    assert make_samples("half", LENGTH, 2, 0, None) == made[:2] and random.getstate() == state
    assert make_samples("half", LENGTH, 2, 1, None) != made[:2]


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize("aware", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_mean_is_over_tasks_and_outputs_end_when_all_is_found(aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    generate, prefill, prefilled = Reader.generate, Reader.prefill, []

    def noted(reader: Reader, *arguments: Any) -> list[list[int]]:
        out = generate(reader, *arguments)
        lengths.extend(map(len, out))
        return out

    def seen(reader: Reader, contexts: Sequence[Sequence[int]]) -> Any:
        prefilled.extend(tokenizer().batch_decode([list(context) for context in contexts]))
        return prefill(reader, contexts)

    monkeypatch.setattr(Reader, "generate", noted)
    monkeypatch.setattr(Reader, "prefill", seen)
    task = RulerTask("ruler", LENGTH, 3, aware, batch=2)
    outcome = task.run(bench(), Method("int4"))
    values = {name: metric.value for name, metric in outcome.metrics.items()}
    assert values == {"recall": 0.5, "all": 1, "half": 0.5, "none": 0}
    assert outcome.metrics["recall"].samples == [0.5] * 3 and outcome.metrics["none"].samples == [0] * 3
    assert lengths == [1] * 3 + [6] * 6
    assert all(("which?" in text) == aware for text in prefilled) and len(prefilled) == 9
    assert outcome.memory is not None and list(RulerTask("half", LENGTH, 2).run(bench(), Method("full")).metrics) == [
        "recall"
    ]


def test_a_score_is_the_share_of_answers_that_are_said() -> None:
    assert score("It is ABC\nand 12", ("abc", "12", "99", "d\n")) == pytest.approx(2 / 4)
    assert score("", ("a",)) == 0


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wonderwords", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils", raising=False)
    with pytest.raises(ImportError, match=r"task='ruler_cwe' needs the package wonderwords, .* pip install"):
        make_samples("ruler_cwe", 1024, 1, 0, tokenizer())


def test_names_and_what_is_refused() -> None:
    task = entry("ruler@4096:aware", SIZES["standard"]).task
    assert isinstance(task, RulerTask) and task.name == "ruler@4096:aware" and task.tasks == list(TASKS)
    assert RulerTask("ruler_vt", 1024).tasks == ["ruler_vt"]
    with pytest.raises(ValueError, match=r"task='ruler@4096:forced'; accepted"):
        entry("ruler@4096:forced", SIZES["standard"])
    with pytest.raises(ValueError, match="kind='ruler_qa'; accepted: ruler, niah_single_1"):
        RulerTask("ruler_qa")
    with pytest.raises(ValueError, match="samples=0; accepted"):
        RulerTask("ruler", samples=0)
    with pytest.raises(ValueError, match="length=511 of task='ruler_vt'; accepted: whole numbers from 512"):
        make_samples("ruler_vt", 511, 1, 0, tokenizer())
    with pytest.raises(ValueError, match=r"task='ruler_vt': its smallest sample has \d+ tokens"):
        make_samples("ruler_vt", 512, 1, 0, tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores_are_lm_evals(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    length, count = 1024, 4
    folder = default_model_folder()
    mine = make_samples(name, length, count, 3, AutoTokenizer.from_pretrained(folder))
    module, config = _lm_eval_task(name)
    for generator in ("generate_samples", "sys_vartrack_w_noise_random", "sys_word_pair_random", "sys_kwext"):
        if hasattr(module, generator):
            monkeypatch.setattr(module, generator, _shortened(getattr(module, generator), count))
    with _seeded(3):
        if name == "ruler_cwe":
            module.RNG.seed(random.getrandbits(63))
        make = getattr(module, config["custom_dataset"].partition(".")[2])
        documents = make(tokenizer=str(folder), max_seq_lengths=[length])["test"]
    for sample, document in zip(mine, documents, strict=True):
        text, begun, between = document["input"], document["gen_prefix"], config["target_delimiter"]
        prompt = text + (between if requires_delimiter(text, begun) else "") + begun
        assert sample.context + sample.question == prompt
        assert list(sample.answers) == document["outputs"]
        assert sample.answers[0] not in sample.question and sample.answers[0] in sample.context
        said = f"x {document['outputs'][0].upper()}\ty"
        assert score(said, sample.answers) == common_utils.process_results(document, [said])[str(length)]
    assert TASKS[name].new_tokens == config["generation_kwargs"]["max_gen_toks"]
    assert config["generation_kwargs"]["until"] == [] and config["process_results"] == "common_utils.process_results"


def _lm_eval_task(name: str) -> tuple[Any, dict[str, Any]]:
    """The module that makes the documents of a task of lm-eval, and what its file says, functions by their names."""
    folder = Path(common_utils.__file__).parent
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda _, node: node.value)

    def read(file: str) -> dict[str, Any]:
        found = yaml.load((folder / file).read_text(), loader)
        return (read(found["include"]) if "include" in found else {}) | found

    config = read(f"{name.removeprefix('ruler_')}.yaml")
    assert config["task"] == name
    return importlib.import_module(f"lm_eval.tasks.ruler.{config['custom_dataset'].partition('.')[0]}"), config


def _shortened(generator: Callable[..., Any], count: int) -> Callable[..., Any]:
    """The same with ``count`` documents in place of 500."""
    return lambda *places, num_samples=500, **options: generator(
        *places, num_samples=min(num_samples, count), **options
    )


@pytest.mark.slow
def test_ruler_on_a_tiny_model() -> None:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    words = AutoTokenizer.from_pretrained(default_model_folder())
    made = Bench(lambda dtype: (LlamaForCausalLM(config).eval(), words))
    outcome = RulerTask("ruler", 1024, 1).run(made, Method("int4"))
    assert list(outcome.metrics) == ["recall", *TASKS] and 0 <= outcome.metrics["recall"].value < 1
    with pytest.raises(ValueError, match=r"samples take up to \d+ tokens, and the model has 600 positions"):
        RulerTask("niah_multikey_2", 2048, 1).run(bench(), Method("full"))
