"""A batch whose prompts begin alike: what they share is read and held once. `python examples/shared_prefix_batch.py`"""

import os

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache
from hf_kvcache.prompts import PromptStore

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
RULES = "You answer in one short sentence. You never make up facts. You are polite to everyone. " * 8
QUESTIONS = ("What is the capital of France?", "How many legs has a spider?", "Name a color of the rainbow, please.")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tokenizer.padding_side = "left"
chats = [[{"role": "system", "content": RULES}, {"role": "user", "content": question}] for question in QUESTIONS]
batch = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
)

store = PromptStore(lambda: QuantizedKVCache(model.config, bits=4), model=model)
rules = tokenizer.apply_chat_template(chats[0][:1], return_tensors="pt", return_dict=True).input_ids
store.generate(model, rules, max_new_tokens=1)  # the rules are read, and kept

output = store.generate(model, batch.input_ids, batch.attention_mask, max_new_tokens=25, do_sample=False)
for question, reply in zip(QUESTIONS, output[:, batch.input_ids.shape[1] :], strict=True):
    print(f"{question}\n  {tokenizer.decode(reply, skip_special_tokens=True)}")
stats = store.stats()
print(f"{stats.tokens_saved} of {stats.tokens_requested} tokens were not read again")
