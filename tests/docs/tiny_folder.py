"""A folder with a tiny random model and a tokenizer of words, for programs that load a model by its path."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_kvcache.cli.sample_text import packaged_text

#: One token a message: the template says where a message begins and what is asked for, as those of chat models do.
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)
_SPECIAL = ("<|im_end|>", "<|im_start|>", "?unknown?", "assistant", "user", "system")


def write_tiny_model(folder: Path) -> Path:
    """Write the model and the tokenizer of its 400 words into ``folder``, as ``from_pretrained`` reads them."""
    split = pre_tokenizers.Whitespace()
    words = Counter(word for word, _ in split.pre_tokenize_str(packaged_text()[0]))
    vocabulary = [*_SPECIAL, *(word for word, _ in words.most_common(394))]
    backend = Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate(vocabulary)}, unk_token="?unknown?"))
    backend.pre_tokenizer = split
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|im_end|>", additional_special_tokens=list(_SPECIAL[:2])
    )
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(folder)
    # As many query and KV heads as SmolLM2-135M has, which an example groups by three.
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=72,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=16,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder
