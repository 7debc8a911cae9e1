"""The harness with models of other kinds: sliding layers, biased keys, one KV head, recurrent layers."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from hf_kvcache_eval.caches import Method
from hf_kvcache_eval.drift import Drift
from hf_kvcache_eval.prefills import Prefills
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.task import Bench
from tests import families
from tests.eval.tiny import LetterTokenizer
from tests.running import ROUNDING

ONE_HEAD = "one KV head"
KINDS = ["gemma3", "qwen2", ONE_HEAD, *(pytest.param(name, marks=pytest.mark.slow) for name in families.RECURRENT)]
#: Methods and whether they lose nothing.
METHODS = {"full": True, "none": True, "int4": False, "snapkv@0.5": False}


@pytest.fixture(params=KINDS)
def bench(request: pytest.FixtureRequest) -> Bench:
    model = _one_head() if request.param == ONE_HEAD else families.build(request.param)
    return Bench(lambda dtype: (model, LetterTokenizer()), Protocol(2, 8, 16, block=4), prefills=Prefills(True))


def _one_head() -> PreTrainedModel:
    config = transformers.LlamaConfig(**families._shape(head_dim=16, num_key_value_heads=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_every_sort_of_cache(bench: Bench) -> None:
    """The reference reads blocks where the cache reads tokens, so a layer that cannot do both would show in `full`."""
    found = {spec: Drift(40, 12, 2, 2).run(bench, Method(spec)) for spec in METHODS}
    for spec, lossless in METHODS.items():
        kl = found[spec].metrics["kl"].value
        assert kl == pytest.approx(0, abs=1e-6) if lossless else kl > 1e-6, spec
    sizes = {spec: outcome.memory.bytes_bf16 for spec, outcome in found.items() if outcome.memory}
    assert len(sizes) == len(METHODS)
    # Sliding layers hold their window, and recurrent ones their states, whatever the cache.
    assert max(sizes.values()) <= 1.001 * min(sizes.values())


def test_recurrent_layers_decode_token_by_token() -> None:
    """Jamba's begin anew with a block."""
    model = families.build("jamba")
    reader = Bench(lambda dtype: (model, LetterTokenizer()), Protocol(2, 8, 16, block=4)).reader(Method("none"))
    tokens = torch.randint(1, families.VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0))
    reader.prefill(tokens[:, :12].tolist())
    found = torch.cat(list(reader.logits(tokens[:, 12:], skip=3)), 1)
    with torch.inference_mode():
        expected = model(tokens, use_cache=False).logits[:, 15:]
    assert torch.allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize("spec", [pytest.param("full", marks=pytest.mark.slow), "int4"])
def test_padded_rows_and_forks_score_as_alone(bench: Bench, spec: str) -> None:
    drawn = torch.randint(1, families.VOCABULARY, (3, 60), generator=torch.Generator().manual_seed(0))
    contexts = [drawn[0, :45].tolist(), drawn[1, :33].tolist()]
    tokens, targets = drawn[:, 45:54], drawn[:, 46:55]

    def scores(rows: list[list[int]], counts: list[int], which: list[int]) -> torch.Tensor:
        reader = bench.reader(Method(spec))
        reader.prefill(rows)
        reader.fork(counts)
        return reader.score(tokens[which], targets[which])[0]

    together = scores(contexts, [2, 1], [0, 1, 2])
    alone = torch.cat([scores(contexts[:1], [1], [0]), scores(contexts[:1], [1], [1]), scores(contexts[1:], [1], [2])])
    assert torch.allclose(together, alone, atol=ROUNDING)
