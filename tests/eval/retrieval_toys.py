"""A tokenizer and a model for the tests of retrieval: real enough to read prose, small enough to be made at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache_eval.protocol import Protocol
from hf_kvcache_eval.task import Bench

VOCABULARY = 700


@cache
def tokenizer() -> Any:
    """Byte-level BPE, trained on the text that the package ships; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([packaged_text()[0]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def bench(**protocol: int) -> Bench:
    """A tiny random model whose cache packs short contexts."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=600,
        initializer_range=0.25,  # the usual one gives a model that hardly looks at its context
        eos_token_id=0,
        bos_token_id=None,
    )

    def load(dtype: torch.dtype) -> tuple[Any, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config)
        return model.to(dtype).eval(), tokenizer()

    return Bench(load, Protocol(**{"tail_length": 16, "page_size": 16, **protocol}))
