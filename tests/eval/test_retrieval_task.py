"""The retrieval task: both orders of question and compression, batches, scores, and what the real model retrieves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.protocol import Reader
from hf_kvcache_eval.retrieval import RetrievalTask, samples
from hf_kvcache_eval.retrieval.prompts import Prompt, batches, tokenized
from hf_kvcache_eval.retrieval.task import recall_of, scores_of
from hf_kvcache_eval.task import Bench
from tests.eval.retrieval_toys import bench, tokenizer
from tests.running import as_cache

LENGTH = 300
ROUNDING = 1e-4
METHODS = ("full", "int4", "window@8")


@pytest.fixture(scope="module")
def shared() -> Bench:
    return bench()


def task(kind: str = "quote", query_aware: bool = False, batch: int = 3, count: int = 5) -> RetrievalTask:
    return RetrievalTask(kind, LENGTH, count, query_aware, batch)


def nll(shared: Bench, method: str, query_aware: bool = False, batch: int = 3) -> list[float]:
    return task("quote", query_aware, batch).run(shared, Method(method)).metrics["nll"].samples


def test_names() -> None:
    assert task("needle").name == "needle@300"
    assert task("needle", query_aware=True).name == "needle@300:aware"
    assert RetrievalTask("needle", 300, forced=True).name == "needle@300:forced"
    assert RetrievalTask("needle", 300, query_aware=True, forced=True).name == "needle@300:aware:forced"


@pytest.mark.parametrize(
    ("kind", "method", "query_aware"),
    [
        *((kind, "int4", False) for kind in ("multikey", "passkey", "vartrack")),
        *((kind, method, aware) for kind in ("needle", "quote") for method in METHODS for aware in (False, True)),
    ],
)
def test_runs(shared: Bench, kind: str, method: str, query_aware: bool) -> None:
    shares: list[float] = []
    shared.advance = shares.append
    outcome = task(kind, query_aware, batch=2, count=3).run(shared, Method(method))
    assert list(outcome.metrics) == (["nll", "exact", "greedy"] if kind == "quote" else ["recall"])
    assert all(len(metric.samples) == 3 for metric in outcome.metrics.values())
    assert outcome.metrics["nll" if kind == "quote" else "recall"].higher_is_better == (kind != "quote")
    assert shares == sorted(shares) and shares[-1] == 1
    assert outcome.memory is not None and (outcome.memory.bytes < outcome.memory.bytes_bf16 or method == "full")
    assert outcome.protocol["query_aware"] is query_aware and outcome.protocol["text"] == "alice.txt"


def test_the_full_cache_cannot_tell_the_orders_apart(shared: Bench) -> None:
    assert nll(shared, "full") == pytest.approx(nll(shared, "full", query_aware=True), abs=ROUNDING)


def test_a_compressed_cache_is_read(shared: Bench) -> None:
    for method in ("int2", "window@8"):
        apart = [abs(a - b) for a, b in zip(nll(shared, method), nll(shared, "full"), strict=True)]
        assert min(apart) > 10 * ROUNDING, method


@pytest.mark.parametrize("method", ["full", "int2"])
@pytest.mark.parametrize("query_aware", [False, True])
def test_rows_of_a_batch_score_as_alone(shared: Bench, method: str, query_aware: bool) -> None:
    assert nll(shared, method, query_aware, 1) == pytest.approx(nll(shared, method, query_aware, 5), abs=ROUNDING)


@pytest.mark.parametrize("query_aware", [False, True])
def test_rows_of_a_batch_generate_as_alone(shared: Bench, query_aware: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(batch: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        asked: list[list[Prompt]] = []
        generate = Reader.generate

        def noted(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
            for rows in batches(prompts, size):
                asked.append(rows)
                yield rows

        def recorded(self: Reader, *args: Any) -> list[list[int]]:
            out = generate(self, *args)
            found.update(zip((prompt.sample.context for prompt in asked[-1]), out, strict=True))
            return out

        with monkeypatch.context() as patch:
            patch.setattr("hf_kvcache_eval.retrieval.task.batches", noted)
            patch.setattr(Reader, "generate", recorded)
            task("needle", query_aware, batch).run(shared, Method("int4"))
        return found

    alone, together = outputs(1), outputs(5)
    assert len(alone) == 5 and alone == together
    assert any(alone.values()), "nothing was generated: the test is vacuous"


def test_nll_is_that_of_one_forward_pass(shared: Bench) -> None:
    model = shared.model()
    wanted = []
    for sample in samples("quote", LENGTH, 5, 0, tokenizer()):
        prompt = tokenized(sample, tokenizer(), literal=True, query_aware=False)
        ids, answer = prompt.prefilled + prompt.asked + prompt.answer, torch.tensor(prompt.answer)
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), **as_cache(DynamicCache(config=model.config))).logits[0]
        log_probs = logits[-len(answer) - 1 : -1].log_softmax(-1)
        wanted.append(-log_probs.gather(1, answer[:, None]).mean().item())
    assert nll(shared, "full") == pytest.approx(wanted, abs=ROUNDING)


@pytest.mark.parametrize("method", ["full", "window@30", "h2o@0.3"])
@pytest.mark.parametrize("query_aware", [False, True])
def test_a_given_answer_in_one_block_scores_as_token_by_token(shared: Bench, method: str, query_aware: bool) -> None:
    """Where nothing is packed: neither is what one block read in full precision."""
    forced = RetrievalTask("quote", LENGTH, 5, query_aware, 3, forced=True).run(shared, Method(method)).metrics
    assert forced["nll"].samples == pytest.approx(nll(shared, method, query_aware), abs=ROUNDING)


def test_a_given_answer_is_exact_where_every_token_would_have_been_chosen(shared: Bench) -> None:
    forced = RetrievalTask("needle", LENGTH, 6, forced=True, batch=4)
    assert "every token of the answer" in forced._what()
    found = forced.run(shared, Method("full")).metrics
    assert list(found) == ["exact", "nll", "greedy"]
    model, exact, log_probs = shared.model(), [], []
    for sample in samples("needle", LENGTH, 6, 0, tokenizer()):
        prompt = tokenized(sample, tokenizer(), literal=False, query_aware=False)
        ids, answer = prompt.prefilled + prompt.asked + prompt.answer, torch.tensor(prompt.answer)
        with torch.inference_mode():
            logits = model(torch.tensor([ids]), **as_cache(DynamicCache(config=model.config))).logits[0]
        said = logits[-len(answer) - 1 : -1]
        exact.append(float((said.argmax(-1) == answer).all()))
        log_probs.append(-said.log_softmax(-1).gather(1, answer[:, None]).mean().item())
    assert found["exact"].samples == exact
    assert found["nll"].samples == pytest.approx(log_probs, abs=ROUNDING)


def test_scores_of_an_answer() -> None:
    log_probs = torch.tensor([-1.0, -2.0, -3.0])
    scores = scores_of(log_probs, torch.tensor([True, True, False]))
    assert scores == {"exact": 0.0, "nll": pytest.approx(2.0), "greedy": pytest.approx(2 / 3)}
    assert scores_of(log_probs, torch.ones(3, dtype=torch.bool))["exact"] == 1.0


@pytest.mark.parametrize("method", ["full", "window@8"])
def test_blocks_change_nothing_but_time(shared: Bench, method: str) -> None:
    assert nll(bench(block=8), method) == pytest.approx(nll(shared, method), abs=ROUNDING)


def test_both_orders_read_the_same_tokens() -> None:
    for sample in samples("vartrack", LENGTH, 4, 0, tokenizer()):
        agnostic, aware = (tokenized(sample, tokenizer(), False, query_aware) for query_aware in (False, True))
        assert agnostic.prefilled + agnostic.asked == aware.prefilled + aware.asked
        assert len(aware.asked) == 1
        assert tokenizer().decode(agnostic.prefilled) == sample.context


def test_batches_hold_questions_of_one_length() -> None:
    prompts = [tokenized(s, tokenizer(), True, False) for s in samples("quote", LENGTH, 20, 0, tokenizer())]
    made = list(batches(prompts, 3))
    assert sorted(prompt.sample.index for rows in made for prompt in rows) == list(range(20))
    assert all(len(rows) <= 3 and len({len(prompt.asked) for prompt in rows}) == 1 for rows in made)


@pytest.mark.parametrize(
    ("answers", "output", "share"),
    [
        (("123",), " 123.", 1),
        (("123",), " 1234", 0),
        (("AB", "CD"), " AB and ABCD", 0.5),
        (("AB", "CD"), " CD, AB", 1),
        (("1",), "", 0),
    ],
)
def test_recall(answers: tuple[str, ...], output: str, share: float) -> None:
    assert recall_of(answers, output) == share


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "pass"}, "kind='pass'; accepted: multikey, needle, .*longctx_passkey"),
        ({"length": -1}, "length=-1; accepted"),
        ({"samples": 0}, "samples=0; accepted"),
        ({"batch": 1.5}, "batch=1.5; accepted"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RetrievalTask(**{"kind": "needle", **arguments})  # type: ignore[arg-type]


def test_more_tokens_than_positions(shared: Bench) -> None:
    with pytest.raises(ValueError, match="the model has 600 positions"):
        RetrievalTask("needle", 1000, 1).run(shared, Method("full"))


def test_a_ready_set_without_data(shared: Bench) -> None:
    with pytest.raises(ValueError, match="no data folder was given"):
        RetrievalTask("longctx_passkey", 512, 1).run(shared, Method("full"))


@pytest.mark.slow
def test_the_real_model_finds_the_pass_key_unless_it_is_evicted() -> None:
    from hf_kvcache.cli.models import load_default_model

    real = Bench(lambda dtype: load_default_model(dtype=dtype))
    passkey = RetrievalTask("passkey", 512, 8)
    assert passkey.run(real, Method("full")).metrics["recall"].value >= 0.8
    assert passkey.run(real, Method("window@8")).metrics["recall"].value <= 0.1
