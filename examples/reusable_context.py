"""Read a context once, keep a fifth of it, and ask it several questions. `python examples/reusable_context.py`"""

import os
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import HeavyHitterCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours
QUESTIONS = ("What is the secret number of the garden?", "Who is the story about?")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
story = f"{TEXT[:3000]}\nThe secret number of the garden is 48213.\n{TEXT[3000:6000]}"
context = tokenizer(f"<|im_start|>user\n{story}\n\n", return_tensors="pt").input_ids
repeat = tokenizer("\n\nRepeat the previous context exactly.\n", return_tensors="pt").input_ids[0]

# KVzip: the model reads the context a second time, and what it needs to repeat it is kept, whatever is asked later.
kept = HeavyHitterCache(model.config, budget=0.2, policy="kvzip", tail_length=4)
with torch.inference_mode():
    model(context, cache=kept, logits_to_keep=1)
    kept.compress(model, context, prompt_ids=repeat)
print(kept.memory())

for question in QUESTIONS:
    turn = tokenizer(f"{question}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt").input_ids
    ids = torch.cat([context, turn], 1)
    output = model.generate(ids, cache=kept.fork(), max_new_tokens=30, do_sample=False)
    print(f"{question}\n  {tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}")
