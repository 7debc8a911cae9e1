"""Read a long text once, then ask several questions about it. Run it with `python examples/shared_prefix.py`."""

import torch

from hf_kvcache import QuantizedKVCache
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.sample_text import packaged_text

QUESTIONS = ("Who is the story about?", "Which animal did Alice run after?")

model, tokenizer = load_default_model()  # another: load_default_model("<hub id or path>")
story = packaged_text()[0][:6000]
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
