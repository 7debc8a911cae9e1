"""lm-eval's requests get the same answers in every batch: beside prompts of one token, in any order, at any size."""

from __future__ import annotations

import logging

import pytest
from lm_eval.api.instance import Instance
from transformers import PreTrainedModel

from tests.eval.lm_toys import close, instance, lm, questions, text

#: Tokens of the prompts.
LENGTHS = (60, 1, 33, 1, 2)


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[Instance]:
    wanted = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    return [instance("generate_until", text(length, seed), wanted) for seed, length in enumerate(lengths)]


def generated(model: PreTrainedModel, spec: str, batch_size: int, requests: list[Instance]) -> list[str]:
    return lm(model, spec, batch_size=batch_size).generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("spec", ["int2", "snapkv@0.3", "window@8"])
def test_a_prompt_of_one_token_keeps_no_other_from_being_compressed(model: PreTrainedModel, spec: str) -> None:
    alone = [generated(model, spec, 1, [request])[0] for request in prompts()]
    assert generated(model, spec, 2, prompts()[::-1]) == alone[::-1]
    assert generated(model, spec, len(LENGTHS), prompts()) == alone
    assert alone != generated(model, "full", 1, prompts()), "nothing was compressed"


@pytest.mark.parametrize("spec", ["int2", "snapkv@0.3"])
def test_what_was_compressed_is_counted_whatever_the_batch(model: PreTrainedModel, spec: str) -> None:
    shares = []
    for batch_size in (1, len(LENGTHS)):
        ours = lm(model, spec, batch_size=batch_size)
        ours.generate_until(prompts(), disable_tqdm=True)
        assert ours.prefilled.tokens == sum(LENGTHS) - len(LENGTHS)
        assert ours.prefilled.empty == 2
        shares.append(ours.prefilled.share)
    assert shares[0] == pytest.approx(shares[1])
    assert shares[0] > 0.3


def test_what_was_not_compressed_is_said(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        generated(model, "int2", 8, prompts((40, 1, 1)))
        assert "'int2' compressed nothing before the first scored or generated token of 2 sequences" in caplog.text
        caplog.clear()
        lm(model, "snapkv@0.3").loglikelihood([instance("loglikelihood", "a", "bc")], disable_tqdm=True)
        assert "of 1 sequences" in caplog.text
        caplog.clear()
        generated(model, "int2", 8, prompts((40, 30)))
        assert "compressed nothing" not in caplog.text


def test_a_prompt_without_a_token_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="a prompt has no token; accepted: at least one"):
        generated(model, "int4", 2, [*prompts((5,)), instance("generate_until", "", prompts((5,))[0].args[1])])


@pytest.mark.parametrize("spec", ["snapkv@0.4", "random@0.4", "ada-expected@0.4"])
def test_scores_do_not_depend_on_the_batch(model: PreTrainedModel, spec: str) -> None:
    alone = lm(model, spec, batch_size=1).loglikelihood(questions(), disable_tqdm=True)
    together = lm(model, spec, batch_size=64).loglikelihood(questions()[::-1], disable_tqdm=True)
    close(together[::-1], alone, 2e-4)
