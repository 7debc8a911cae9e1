"""Ask many questions about a document that is read once. Run it with `python examples/document_questions.py`.

A second run finds the document in the folder, and begins with the questions.
"""

import os
import time
from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache
from hf_kvcache.prompts import PromptStore

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours
QUESTIONS = ("Who is the story about?", "Which animal did Alice run after?", "Who is Dinah?")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
document = TEXT[:6000]

with PromptStore(lambda: QuantizedKVCache(model.config, bits=4), directory="prompts", model=model) as store:
    for question in QUESTIONS:
        text = f"<|im_start|>user\n{document}\n\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(text, return_tensors="pt").input_ids
        started = time.perf_counter()
        store.generate(model, ids, max_new_tokens=1, do_sample=False)
        first = time.perf_counter() - started
        output = store.generate(model, ids, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"{question} (first token after {first:.2f} s)\n  {answer}")
    print(store.stats())
