"""lm-eval's model: batches, forks and padding change nothing, and what is scored has gone through the cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.lm import KVCacheLM
from hf_kvcache_eval.protocol import Protocol
from tests.eval.lm_toys import LETTERS, SMALL, close, instance, lm, questions, text, tokenizer
from tests.running import as_cache

#: Of a sum of up to eight log-probabilities, between two orders of summation in float32.
ROUNDING = 2e-4


def plain(model: PreTrainedModel) -> HFLM:
    return HFLM(model, tokenizer=tokenizer(), max_length=512, batch_size=4)


def score(model: KVCacheLM, requests: Any = None) -> list[tuple[float, bool]]:
    return model.loglikelihood(questions() if requests is None else requests, disable_tqdm=True)


def test_full_is_lm_evals_own_model(model: PreTrainedModel) -> None:
    expected = score(plain(model))
    close(score(lm(model)), expected, 0)
    close(score(lm(model, single_pass=False)), expected, ROUNDING)
    close(score(lm(model, single_pass=False, block=3)), expected, ROUNDING)


@pytest.mark.parametrize("spec", ["int4", "unbiased2", "window@20", "random@0.5"])
def test_it_is_the_protocol_written_as_a_plain_loop(model: PreTrainedModel, spec: str) -> None:
    """Prefill all but the context's last token into a new cache, then feed token by token."""
    requests = questions()
    method, encode = Method(spec), tokenizer().encode
    expected = []
    for request in requests:
        context, continuation = (encode(part) for part in request.args)
        cache = method.make(model.config, Protocol(**SMALL))
        total, greedy = 0.0, True
        with torch.inference_mode():
            if context[:-1]:
                model(torch.tensor([context[:-1]]), **as_cache(cache))
                if method.kind.after_prefill:
                    cache.compress()
            for token, target in zip([context[-1], *continuation], continuation, strict=False):
                logits = model(torch.tensor([[token]]), **as_cache(cache)).logits[0, -1]
                total += logits.log_softmax(-1)[target].item()
                greedy = greedy and logits.argmax().item() == target
        expected.append((total, greedy))
    close(score(lm(model, spec), requests), expected, ROUNDING)
    full = score(lm(model), requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(full, expected, strict=True)) > 0.05, "nothing was compressed"


@pytest.mark.parametrize("spec", ["int4", "none"])
@pytest.mark.parametrize("batch_size", [3, 64])
def test_a_batch_is_what_each_request_is_alone(model: PreTrainedModel, spec: str, batch_size: int) -> None:
    alone = [score(lm(model, spec, batch_size=1), [request])[0] for request in questions()]
    close(score(lm(model, spec, batch_size=batch_size)), alone, ROUNDING)
    if spec == "none":
        close(alone, score(lm(model)), ROUNDING)


def test_blocks_change_nothing_unless_a_page_is_packed_within_one(model: PreTrainedModel) -> None:
    # 2 sinks, a page of 16 and 8 of the tail are prefilled: the next page is due 16 tokens later.
    requests = [instance("loglikelihood", text(27, seed), text(9, seed + 50)) for seed in range(3)]
    coarse = lm(model, "int2", block=4)
    close(score(coarse, requests), score(lm(model, "int2"), requests), ROUNDING)
    assert coarse.prefilled.share == pytest.approx(16 / 26)


def test_one_prefill_serves_all_continuations(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[tuple[int, ...]] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **kwargs: fed.append(tuple(ids.shape)) or forward(ids, **kwargs))
    context = text(60, 0)
    score(lm(model, "int4"), [instance("loglikelihood", context, text(4, seed)) for seed in range(4)])
    assert fed == [(1, 59)] + [(4, 1)] * 4


def test_long_contexts_lose_their_first_tokens_as_in_lm_eval(model: PreTrainedModel) -> None:
    requests = [instance("loglikelihood", text(90, 1), text(n, n)) for n in (3, 5)]
    ours, theirs = lm(model, single_pass=False), plain(model)
    ours._max_length = theirs._max_length = 40
    close(score(ours, requests), score(theirs, requests), ROUNDING)


def test_rolling_windows(model: PreTrainedModel) -> None:
    texts = [instance("loglikelihood_rolling", text(n, n)) for n in (100, 30, 41, 3)]
    ours, theirs = lm(model, single_pass=False, block=5), plain(model)
    ours._max_length = theirs._max_length = 40
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)
    coarse = lm(model, "int2")
    got = coarse.loglikelihood_rolling(texts, disable_tqdm=True)
    assert abs(got[0] - theirs.loglikelihood_rolling(texts[:1], disable_tqdm=True)[0]) > 0.05
    assert coarse.prefilled.share > 0.3


@pytest.mark.parametrize("spec", ["full", "none", "int4", "window@8", "hf-fp8"])
def test_generated_rows_are_the_solo_ones(model: PreTrainedModel, spec: str) -> None:
    requests = [
        instance("generate_until", text(n, n), {"until": ["\n"], "max_gen_toks": 12, "do_sample": False})
        for n in (90, 33, 64, 2)
    ]
    together = lm(model, spec, single_pass=False).generate_until(requests, disable_tqdm=True)
    alone = [lm(model, spec, batch_size=1).generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert together == alone
    theirs = plain(model).generate_until(requests, disable_tqdm=True)
    assert (together == theirs) == (spec in ("full", "none"))


def test_the_first_generated_token_reads_the_cache(model: PreTrainedModel) -> None:
    """Else one-token answers would be scored as if every cache were lossless."""
    requests = [
        instance("generate_until", text(90, seed), {"until": ["\n"], "max_gen_toks": 1, "do_sample": False})
        for seed in range(8)
    ]
    got = lm(model, "window@3").generate_until(requests, disable_tqdm=True)
    assert got != plain(model).generate_until(requests, disable_tqdm=True)


def test_answers_reach_lm_evals_store_and_are_counted(model: PreTrainedModel) -> None:
    kept: dict[Any, Any] = {}
    ours = lm(model, "int4")
    ours.set_cache_hook(type("Hook", (), {"add_partial": lambda self, kind, key, answer: kept.update({key: answer})})())
    requests = questions()
    answers = score(ours, requests)
    assert [kept[request.args] for request in requests] == answers
    assert 0.2 < ours.prefilled.share < 0.9
    short = lm(model, "int4", tail_length=128)
    score(short, requests)
    assert short.prefilled.share == 0


def test_the_share_does_not_count_padding(model: PreTrainedModel) -> None:
    contexts = [instance("loglikelihood", text(n, n), "ab") for n in (93, 60, 41)]
    together, alone = lm(model, "int4"), lm(model, "int4", batch_size=1)
    score(together, contexts)
    score(alone, contexts)
    assert together.prefilled.share == pytest.approx(alone.prefilled.share)
    assert together.prefilled.tokens == alone.prefilled.tokens == 92 + 59 + 40
    dropped = lm(model, "window@10")
    score(dropped, contexts)
    assert dropped.prefilled.share == pytest.approx(1 - 30 / (92 + 59 + 40))


def test_results_say_the_cache_and_the_protocol(model: PreTrainedModel) -> None:
    info = lm(model, "rotated", bits=3, block=2).get_model_info()
    assert info["cache"] == "rotated:bits=3"
    assert info["cache_protocol"]["block"] == 2 and info["cache_protocol"]["tail_length"] == SMALL["tail_length"]
    assert info["cache_protocol"]["single_pass"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cache": "qantized"}, "no cache 'qantized'"),
        ({"cache": 4}, "cache=4"),
        ({"cache": "quantized", "bitz": 4}, "bitz"),
        ({"cache": "full", "bits": 4}, "bits"),
        ({"cache": "quantized:bits=4", "bits": 3}, "bits=3 beside"),
        ({"cache": "quantized", "codec": [4]}, r"codec=\[4\]"),
        ({"cache": "window"}, "window needs"),
        ({"cache": "window@8", "budget": 4}, "budget=4 beside"),
        ({"cache": "int4", "budget": 0.3}, "takes no budget"),
        ({"block": 0}, "block=0"),
        ({"tail_length": -1}, "tail_length=-1"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"cache": "int4", "single_pass": True}, "single_pass=True"),
        ({"single_pass": "maybe"}, "single_pass='maybe'"),
        ({"cache": "full:dtype=bfloat16"}, "dtype=torch.float32 beside"),
    ],
)
def test_bad_arguments(model: PreTrainedModel, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lm(model, **arguments)


def test_bad_options_are_found_before_the_weights_are_loaded(
    model: PreTrainedModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.config.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    for arguments, said in (({"cache": "int4", "bitz": 4}, "bitz"), ({"cache": "nought"}, "nought")):
        with pytest.raises(ValueError, match=said):
            KVCacheLM(str(tmp_path), **arguments)
    with pytest.raises(OSError):  # good ones get to the weights, which are not there
        KVCacheLM(str(tmp_path), cache="int4", group_size=8)


def test_bad_requests(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="cache='window@8' compresses what a prefill brought"):
        lm(model, "window", budget=8).loglikelihood_rolling([instance("loglikelihood_rolling", "abc")])
    with pytest.raises(ValueError, match="has 0 tokens; accepted: 1 to 512"):
        lm(model, "int4")._loglikelihood_tokens([(None, [1, 2], [])])
    with pytest.raises(ValueError, match="request 0 has no context"):
        lm(model, "int4")._loglikelihood_tokens([(None, [], [1])])
    beams = {"num_beams": 2, "max_gen_toks": 2, "until": []}
    with pytest.raises(ValueError, match="num_beams=2"):
        lm(model, "int4").generate_until([instance("generate_until", LETTERS, beams)], disable_tqdm=True)
