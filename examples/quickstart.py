"""Generate with a 4-bit KV cache, and print what it holds. Run it with `python examples/quickstart.py`."""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
messages = [{"role": "user", "content": "Explain in three sentences why the sky is blue."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

cache = QuantizedKVCache(model.config, bits=4)
output = model.generate(**inputs, cache=cache, max_new_tokens=200, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.memory())  # bytes held, bytes a bf16 DynamicCache would hold, ratio, by part
