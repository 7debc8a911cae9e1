"""Read a context that is longer than memory: its pages lie in files. `python examples/longer_than_memory.py [TOKENS]`

The process is held to LIMIT bytes more than the model takes (Linux). Without `offload`, reading stops with an error.
"""

import ctypes
import os
import resource
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache import KVCache

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
TEXT = files("hf_kvcache").joinpath("cli/data/alice.txt").read_text(encoding="utf-8")  # or a text of yours
LIMIT, CHUNK = 160 << 20, 128

# glibc keeps what was freed, and the limit counts that too: large blocks go back to the system at once.
libc = ctypes.CDLL(None)
libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD
libc.mallopt(-8, 1)  # M_ARENA_MAX

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
ids = tokenizer(TEXT * 20, return_tensors="pt").input_ids
ids = ids[:, : int(sys.argv[1]) if len(sys.argv) > 1 else 6144]

with torch.inference_mode():
    model(ids[:, :CHUNK], logits_to_keep=1)  # threads and buffers that the model needs whatever the cache
status = Path("/proc/self/status").read_text()
held = 1024 * int(status.split("VmData:")[1].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (held + LIMIT, held + LIMIT))

# The pages are files in a new folder below this one, which goes with the cache.
with tempfile.TemporaryDirectory() as folder:
    cache = KVCache(model.config, offload=folder)
    with torch.inference_mode():
        for chunk in ids.split(CHUNK, 1):
            logits = model(chunk, cache=cache, logits_to_keep=1).logits
        for _ in range(40):
            token = logits[:, -1].argmax(-1, keepdim=True)
            print(tokenizer.decode(token[0]), end="", flush=True)
            logits = model(token, cache=cache).logits
    print(f"\n{cache.get_seq_length()} tokens, with {LIMIT / 2**20:.0f} MiB of memory beside the model")
    print(cache.memory())
    del cache
