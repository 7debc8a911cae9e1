"""Find low-rank bases for a model's keys and values, and generate with half of the numbers in each.

`python examples/calibrate_latent.py [TEXT FILE]`; a few megabytes of the text that the model will read are better than
the 22 kB that come with the package. `hf-kvcache calibrate --help` does the same from the command line.
"""

import os
import sys
from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import LatentKVCache
from hf_kvcache.lowrank import calibrate

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else TEXT

# Keys as their queries read them, values as the output projection does; 3 KV heads share a basis.
projection = calibrate(model, [text], tokenizer, method="kq_svd", group=3, before_rope=True, tokens=30_000)
projection.save("smollm2-latent.safetensors")

question = f"{TEXT[:4000]}\n\nWhat did the Rabbit take out of its waistcoat-pocket?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
cache = LatentKVCache(model.config, projection="smollm2-latent.safetensors", ratio=0.5)
output = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.memory())
