"""Generation with DeepSeek V4: what DynamicCache gives, and what plain decoding gives where DynamicCache cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_kvcache import CompressedKVCache, unbind
from hf_kvcache.integration.versions import CACHE_ARGUMENT
from hf_kvcache.layers.compressed_reads import CompressedReads
from hf_kvcache.storage.packed_rows import PackedRows
from tests.compressed.models import CHOSEN, VOCABULARY, WINDOW, build, ids, read, steps


def generate(model: Any, prompt: torch.Tensor, held: Any, count: int, **others: Any) -> Any:
    arguments = {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(prompt, **{CACHE_ARGUMENT: held}, **arguments, **others)


@pytest.mark.parametrize(("length", "count"), [(26, 24), pytest.param(9, 300, marks=pytest.mark.slow)])
def test_greedy_is_that_of_dynamic_cache(length: int, count: int) -> None:
    """Two sequences through many windows of compression. The steps compute nothing dense."""
    model, prompt = build(), ids(2, length)
    expected = generate(model, prompt, DynamicCache(config=model.config), count)
    found = generate(model, prompt, CompressedKVCache(model.config), count)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def test_steps_read_the_window_and_the_chosen_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step asks for no dense tensor, and of the sparse layer it reads only the chosen entries."""
    model, held = build(), CompressedKVCache(build().config)
    read(model, ids(2, 60), held)
    rows: list[int] = []
    decode = PackedRows._decode

    def counted(self: PackedRows, records: torch.Tensor, packed_basis: bool) -> torch.Tensor:
        rows.append(records.shape[1])
        return decode(self, records, packed_basis)

    monkeypatch.setattr(PackedRows, "_decode", counted)
    monkeypatch.setattr(CompressedReads, "dense_side", None)
    read(model, ids(2, 1, 1), held)
    # The window of each layer; all 20 entries of the indexer, and the chosen ones; all 7 entries of the other layer.
    assert sorted(rows) == sorted([WINDOW] * 3 + [20, CHOSEN, 7])


@pytest.mark.parametrize("bits", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_prompt_lookup_is_plain_decoding(bits: int | None) -> None:
    """Drafts are accepted and rejected across windows, and leave no trace."""
    model, prompt = build(), ids(1, 7, 3).repeat(1, 5)
    plain = generate(model, prompt, CompressedKVCache(model.config, bits), 30).sequences
    held = CompressedKVCache(model.config, bits)
    assert torch.equal(generate(model, prompt, held, 30, prompt_lookup_num_tokens=6).sequences, plain)
    assert held.get_seq_length() == plain.shape[1] - 1
    held.integrity()


def test_drafts_are_allowed_with_this_cache_only() -> None:
    """Other caches of a bound model are still refused, and so is a draft where this cache only runs beside it."""
    model, prompt = build(), ids(1, 20)
    held, theirs = CompressedKVCache(model.config), DynamicCache(config=model.config)
    refused: list[bool] = []

    def beside(step: Any, scores: Any) -> Any:
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, prompt, theirs, 4, prompt_lookup_num_tokens=3)
        refused.append(model._is_stateful)
        return scores

    generate(model, prompt, held, 3, prompt_lookup_num_tokens=3, logits_processor=[beside])
    assert refused and not any(refused) and model._is_stateful
    kind: Any = type(model)
    unbind(model.config)
    assert "generate" not in vars(kind) and "_is_stateful" not in vars(model)
    assert next(vars(cls)["_is_stateful"] for cls in kind.__mro__ if "_is_stateful" in vars(cls)) is True
    with pytest.raises(ValueError, match="not supported with stateful models"):
        generate(model, prompt, held, 4, prompt_lookup_num_tokens=3)


@pytest.mark.slow
def test_assisted_decoding_is_plain_decoding() -> None:
    model, prompt = build(), ids(1, 20)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, pad_token_id=0, **shape)).eval()
    plain = generate(model, prompt, CompressedKVCache(model.config), 40).sequences
    found = generate(model, prompt, CompressedKVCache(model.config), 40, assistant_model=assistant)
    assert torch.equal(found.sequences, plain)


@pytest.mark.slow
def test_beams_are_those_of_dynamic_cache() -> None:
    model, prompt = build(), ids(2, 20)
    expected = generate(model, prompt, DynamicCache(config=model.config), 30, num_beams=3).sequences
    found = generate(model, prompt, CompressedKVCache(model.config), 30, num_beams=3).sequences
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("bits", "share", "spread"), [pytest.param(8, 0.75, 0.1, marks=pytest.mark.slow), (4, 0.55, 0.5)]
)
def test_few_bits_are_close_and_take_less(bits: int, share: float, spread: float) -> None:
    """Close in units of the spread of the logits; bytes as a share of what transformers' layers hold in bfloat16.

    Of the width that real models have, since a record of a narrow row is mostly alignment.
    """
    model = build(torch.bfloat16, head_dim=512, partial_rotary_factor=0.125, index_head_dim=128)
    prompt, more = ids(1, 400), ids(1, 12, 1)
    exact, held = CompressedKVCache(model.config), CompressedKVCache(model.config, bits)
    read(model, prompt, exact), read(model, prompt, held)
    expected, found = steps(model, more, exact).float(), steps(model, more, held).float()
    assert float((found - expected).abs().mean() / expected.std()) < spread
    theirs = DynamicCache(config=model.config)
    read(model, torch.cat([prompt, more], 1), theirs)
    entries = [
        held.layers[i].compressions[name].entries for i, name in ((1, "compressor"), (1, "indexer"), (2, "compressor"))
    ]
    packed = sum(sum(rows.bytes_by_part().values()) for rows in entries)
    assert packed < share * sum(
        x.numel() * x.element_size() for layer in theirs.layers[1:] for x in layer.compressed_kv.values()
    )
    assert held.memory().total < exact.memory().total


def test_an_unbound_model_reads_dense_tensors() -> None:
    model, prompt, more = build(), ids(2, 30), ids(2, 20, 1)
    bound, other = CompressedKVCache(model.config), CompressedKVCache(model.config)
    read(model, prompt, bound), read(model, prompt, other)
    expected = steps(model, more, bound)
    unbind(model.config)
    torch.testing.assert_close(steps(model, more, other), expected, rtol=0, atol=1e-4)


def test_attention_weights_and_gradients() -> None:
    """Both come from dense tensors, in the first pass and behind it."""
    model, prompt = build(), ids(1, 30)
    held, theirs = CompressedKVCache(model.config), DynamicCache(config=model.config)
    for part in (prompt[:, :20], prompt[:, 20:25]):
        expected = model(part, **{CACHE_ARGUMENT: theirs}, output_attentions=True)
        found = model(part, **{CACHE_ARGUMENT: held}, output_attentions=True)
        for a, b in zip(found.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    ours, other = (
        torch.autograd.grad(
            model(prompt, **{CACHE_ARGUMENT: c}).logits.sum(), model.model.layers[1].self_attn.kv_proj.weight
        )[0]
        for c in (CompressedKVCache(model.config), DynamicCache(config=model.config))
    )
    torch.testing.assert_close(ours, other)
