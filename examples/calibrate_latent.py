"""Find low-rank bases for a model's keys and values, and generate with half of the numbers in each.

`python examples/calibrate_latent.py [TEXT FILE]`; a few megabytes of the text that the model will read are better than
the 22 kB that come with the package. `hf-kvcache calibrate --help` does the same from the command line.
"""

import sys
from pathlib import Path

from hf_kvcache import LatentKVCache
from hf_kvcache.cli.models import load_default_model
from hf_kvcache.cli.sample_text import packaged_text
from hf_kvcache.lowrank import calibrate

model, tokenizer = load_default_model()  # another: load_default_model("<hub id or path>")
text = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else packaged_text()[0]

# Keys as their queries read them, values as the output projection does; 3 KV heads share a basis.
projection = calibrate(model, [text], tokenizer, method="kq_svd", group=3, before_rope=True, tokens=30_000)
projection.save("smollm2-latent.safetensors")

question = f"{packaged_text()[0][:4000]}\n\nWhat did the Rabbit take out of its waistcoat-pocket?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
cache = LatentKVCache(model.config, projection="smollm2-latent.safetensors", ratio=0.5)
output = model.generate(**inputs, cache=cache, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(cache.memory())
