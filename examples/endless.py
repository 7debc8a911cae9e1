"""Generate without end at constant memory. Run it with `python examples/endless.py [tokens]`."""

import os
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import SlidingWindowCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids

# Four sinks and the newest 256 tokens; the sinks move along, so that no distance is longer than the window.
cache = SlidingWindowCache(model.config, window=256, sinks=4, reindex=True)
torch.manual_seed(0)
started = time.perf_counter()
for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
    with torch.inference_mode():
        logits = model(ids, cache=cache).logits[:, -1]
    ids = torch.multinomial((logits / 0.8).softmax(-1), 1)
    print(tokenizer.decode(ids[0]), end="", flush=True)
    if number % 250 == 249:
        rate = 250 / (time.perf_counter() - started)
        print(f"\n[{cache.get_seq_length()} tokens, {cache.memory().total / 2**20:.2f} MiB, {rate:.1f} tokens/s]")
        started = time.perf_counter()
