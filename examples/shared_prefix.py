"""Read a long text once, then ask several questions about it. Run it with `python examples/shared_prefix.py`."""

import os
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours
QUESTIONS = ("Who is the story about?", "Which animal did Alice run after?")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
story = TEXT[:6000]
opening = tokenizer.apply_chat_template(
    [{"role": "user", "content": story}], add_generation_prompt=False, return_tensors="pt", return_dict=True
).input_ids

prefix = QuantizedKVCache(model.config, bits=4)
with torch.inference_mode():
    model(opening, cache=prefix, logits_to_keep=1)

for question in QUESTIONS:
    turn = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.cat([opening, tokenizer(turn, add_special_tokens=False, return_tensors="pt").input_ids], 1)
    cache = prefix.fork()  # shares the packed pages of the story
    output = model.generate(ids, cache=cache, max_new_tokens=40, do_sample=False)
    print(f"{question}\n  {tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)}")
