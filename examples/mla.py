"""Decode a latent-attention model without expanding its latents. `python examples/mla.py [--model HUB_ID]`

Without --model: two layers with DeepSeek-V2-Lite's attention and random weights, which say nothing but take its time.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, DynamicCache

from hf_kvcache import LatentKVCache

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="for example deepseek-ai/DeepSeek-V2-Lite-Chat")
parser.add_argument("--prompt-tokens", type=int, default=2048)
args = parser.parse_args()

torch.manual_seed(0)
if args.model:
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
else:
    config = DeepseekV2Config(
        vocab_size=1024,
        hidden_size=2048,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=None,
        first_k_dense_replace=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
prompt = torch.randint(model.config.vocab_size, (1, args.prompt_tokens))

caches = {
    "DynamicCache": DynamicCache(config=model.config),
    "LatentKVCache": LatentKVCache(model.config),
    "LatentKVCache, 8 bits": LatentKVCache(model.config, bits=8),
    "LatentKVCache, 4 bits": LatentKVCache(model.config, bits=4),
}
for name, cache in caches.items():
    with torch.inference_mode():
        token = model(prompt, cache=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
        start, tokens = time.perf_counter(), []
        for _ in range(16):
            tokens.append(token.item())
            token = model(token, cache=cache).logits.argmax(-1)
    milliseconds = (time.perf_counter() - start) / len(tokens) * 1e3
    if isinstance(cache, LatentKVCache):
        size = cache.memory().total
    else:
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    print(f"{name:22} {milliseconds:7.1f} ms a token, {size / 1e6:6.2f} MB held, tokens {tokens[:6]}")
