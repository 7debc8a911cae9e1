"""A chat that goes on after a restart without reading its earlier turns. `python examples/chat_restart.py`

Run it twice: the messages are in chat.json, and what the model has read of them is in the folder prompts.
"""

import json
import os
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import QuantizedKVCache
from hf_kvcache.prompts import PromptStore

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
SAVED = Path("chat.json")
TURNS = ("My name is Ada, and I like long walks.", "What is my name?")

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
messages = json.loads(SAVED.read_text()) if SAVED.exists() else []

with (
    PromptStore(lambda: QuantizedKVCache(model.config, bits=4), directory="prompts", model=model) as store,
    store.chat(model, tokenizer, messages, max_new_tokens=30, do_sample=False) as chat,
):
    for said in TURNS:
        print(f"> {said}\n{chat.send(said)}")
    SAVED.write_text(json.dumps(chat.messages))
    print(f"{store.stats().tokens_saved} of {store.stats().tokens_requested} tokens were not read again")
