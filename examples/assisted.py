"""A small model drafts, a large one checks, and the caches of both are compressed. `python examples/assisted.py`

The text is the one that the large model writes alone. Both models must have the same tokenizer. With the same model for
MODEL and DRAFT nearly every draft is right, and nothing is gained.
"""

import os
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-1.7B-Instruct")  # hub id or folder
DRAFT = os.environ.get("DRAFT", "HuggingFaceTB/SmolLM2-135M-Instruct")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
draft = AutoModelForCausalLM.from_pretrained(DRAFT, dtype="float32")
generate = draft.generate


def generate_draft(*args, cache=None, **kwargs):
    """Give the draft a cache in 2 bits. transformers would make it a DynamicCache, and takes no other one for it."""
    if cache is None:  # the first draft of a text; the later ones bring the cache of the first
        cache = QuantizedKVCache(draft.config, bits=2)
        cache.activate_past_recording()  # what is not accepted will be taken back
    return generate(*args, cache=cache, **kwargs)


draft.generate = generate_draft

facts = "Ada lives in Turin. Bob lives in Oslo. Cleo lives in Lima. Dan lives in Kyoto. " * 12
question = f"{facts}\n\nWrite a long letter to Ada about these people and the places where they live."
ids = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
).input_ids

passes, texts = [], []
model.register_forward_hook(lambda *_: passes.append(1))
for name, helper in (("alone", {}), ("with drafts", {"assistant_model": draft})):
    passes.clear()
    start = time.perf_counter()
    cache = QuantizedKVCache(model.config, bits=8)
    output = model.generate(ids, cache=cache, max_new_tokens=60, do_sample=False, **helper)
    seconds = time.perf_counter() - start
    texts.append(output[0, ids.shape[1] :])
    print(f"{name}: {len(texts[-1])} tokens in {len(passes)} passes of the large model, {seconds:.1f} s")
print(tokenizer.decode(texts[0], skip_special_tokens=True))
print(
    "the same text" if torch.equal(*texts) else "another text: a sum was rounded otherwise where two tokens are level"
)
