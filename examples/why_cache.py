"""Why generation needs a cache: time of a token without one and with two. `python examples/why_cache.py [TOKENS]`

Without a cache each token takes a pass over the whole text before it, so a text takes quadratic time. With one, a token
takes a pass over itself, so a text takes nearly linear time. With matplotlib, both curves are drawn into why_cache.png.
"""

import os
import sys
import time
from importlib.resources import files
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hf_kvcache import QuantizedKVCache, unbind

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours
LONGEST = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
STEPS = 5
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
text = tokenizer(TEXT, return_tensors="pt").input_ids[:, :LONGEST]


@torch.inference_mode()
def milliseconds(ids, cache=None):
    """The time of a forward pass that gives the next token."""
    start = time.perf_counter()
    model(ids, cache=cache, use_cache=cache is not None, logits_to_keep=1)
    return 1e3 * (time.perf_counter() - start)


def token_times(ids, cache):
    """Milliseconds to read the text `ids`, and of the median token behind it."""
    if cache is None:  # each token takes a pass over all of them
        return milliseconds(ids), median(milliseconds(ids) for _ in range(3))
    prompt = milliseconds(ids, cache)
    return prompt, median(milliseconds(ids[:, -1:], cache) for _ in range(STEPS))


def four_bits():
    return QuantizedKVCache(model.config, bits=4)


ways = {"no cache": lambda: None, "DynamicCache": lambda: DynamicCache(config=model.config), "4 bits": four_bits}
lengths = [length for length in (32 << n for n in range(20)) if length <= text.shape[1]]
token_times(text[:, :32], None)  # the first pass of a process takes longer
found = {way: [] for way in ways}
print(f"{'tokens':>8}  {'way':14}{'prompt, ms':>12}{'token, ms':>12}{'whole text, s':>16}")
for length in lengths:
    for way, make in ways.items():
        unbind(model.config)  # building one of our caches binds the model to our attention
        prompt, token = token_times(text[:, :length], make())
        # A text of this length: the last one, and the tokens since then, whose times lie between both measured ones.
        before, last, total = found[way][-1] if found[way] else (length, token, prompt / 1e3)
        total += (length - before) * (last + token) / 2e3
        found[way].append((length, token, total))
        print(f"{length:8,}  {way:14}{prompt:12.0f}{token:12.1f}{total:16.1f}")

try:
    from matplotlib import pyplot
except ModuleNotFoundError:
    sys.exit()
figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
for way, points in found.items():
    tokens, times, totals = zip(*points, strict=True)
    axes[0].plot(tokens, times, marker="o", label=way)
    axes[1].plot(tokens, totals, marker="o", label=way)
axes[0].set(xlabel="tokens before it", ylabel="ms", title="time of a token")
axes[1].set(xlabel="tokens", ylabel="s", title="time of a whole text")
axes[0].legend()
figure.savefig("why_cache.png")
