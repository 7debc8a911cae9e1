"""Keep a quarter of a long prompt, other tokens in each head, in 4 bits. `python examples/heavy_hitters.py`"""

import os
from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import HeavyHitterCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
story = TEXT[:8000]
question = f"{story}\n\nWhat was the label on the little bottle that Alice found on the table?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)

# SnapKV: what the last 64 tokens of the prompt attend to. Every 128 generated tokens it evicts again.
cache = HeavyHitterCache(model.config, budget=0.25, policy="snapkv", bits=4)
output = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
kept = (cache.layers[0].kept_positions()[0, 0] >= 0).sum()
print(f"{cache.get_seq_length()} tokens seen, {kept} kept in the first head")
print(cache.memory())
