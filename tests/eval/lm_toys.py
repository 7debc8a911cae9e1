"""A tiny model with a tokenizer of one token a character, as lm-eval takes them, and requests as it makes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_kvcache_eval.lm import KVCacheLM

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:\n0123456789?'"
#: Such that contexts of the tests have pages packed.
SMALL: dict[str, int] = {"sink_length": 2, "tail_length": 8, "page_size": 16}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; 0 pads and 2 ends a text."""
    names = ["<pad>", "<unk>", "<eos>", *LETTERS]
    inner = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )


def lm(model: PreTrainedModel, cache: str = "full", **arguments: Any) -> KVCacheLM:
    """The model under test around ``model``."""
    return KVCacheLM(model, cache, tokenizer=tokenizer(), max_length=512, **{**SMALL, "batch_size": 4, **arguments})


def text(length: int, seed: int) -> str:
    """Random letters."""
    return "".join(random.Random(seed).choices(LETTERS[:26], k=length))


def instance(kind: str, *arguments: Any) -> Instance:
    """A request of lm-eval."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def questions() -> list[Instance]:
    """Eight contexts of unequal length, most with several continuations, in an order that is nobody's."""
    pairs = [
        (text(length, seed), text(2 + (3 * choice + seed) % 7, 100 * seed + choice))
        for seed, length in enumerate([70, 41, 1, 93, 70, 2, 55, 1])
        for choice in range(1 + seed % 4)
    ]
    random.Random(0).shuffle(pairs)
    return [instance("loglikelihood", *pair) for pair in pairs]


def close(a: list[tuple[float, bool]], b: list[tuple[float, bool]], tolerance: float) -> None:
    """The same answers, within ``tolerance`` in each log-likelihood."""
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=tolerance)
    assert [greedy for _, greedy in a] == [greedy for _, greedy in b]


def write_data(folder: Path) -> Path:
    """A folder of local data with made-up documents for some of the tasks."""
    sets: dict[str, list[dict[str, Any]]] = {
        "lambada_openai/test": [{"text": f"{text(50 + 3 * n, n)} {text(4, n)}"} for n in range(7)],
        "arc_easy/validation": [_question(n) for n in range(6)],
        "arc_easy/test": [_question(n + 10) for n in range(5)],
        "wikitext2/test_pages": [{"page": f" = {text(5, n)} = \n {text(60 + n, n)} "} for n in range(4)],
        "longctx/passkey_512": [
            {"input": text(80, n), "gen_prefix": "The pass key is", "outputs": ["1234"]} for n in range(3)
        ],
    }
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def _question(seed: int) -> dict[str, Any]:
    choices = {"text": [text(3 + n, seed * 7 + n) for n in range(4)], "label": list("ABCD")}
    return {"question": text(40 + seed, seed), "choices": choices, "answerKey": "ABCD"[seed % 4]}
