"""lm-eval through compressed caches, from Python: LAMBADA with the full cache, with 4 bits and with 2.

pip install -e ".[eval]"
python examples/lm_eval_comparison.py                  # from the hub
python examples/lm_eval_comparison.py FOLDER           # from local data: FOLDER/lambada_openai/test.jsonl
"""

import os
import sys

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvcache_eval.lm import KVCacheLM, tasks_folder

MODEL = os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct")  # hub id or folder
task = "lambada_openai"
if len(sys.argv) > 1:
    os.environ["HF_KVCACHE_EVAL_DATA"] = sys.argv[1]
    task = f"local_{task}"

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
tasks = TaskManager(include_path=str(tasks_folder()))
for cache in ("full", "quantized:bits=4", "quantized:bits=2"):
    # LAMBADA's contexts are some 80 tokens: with the usual tail of 128 nothing would be compressed.
    lm = KVCacheLM(model, cache, tokenizer=tokenizer, batch_size=8, tail_length=8, page_size=16, block=8)
    results = simple_evaluate(lm, tasks=[task], task_manager=tasks, limit=50, bootstrap_iters=0)
    found = results["results"][task]
    print(f"{cache:18} accuracy {found['acc,none']:.3f}  perplexity {found['perplexity,none']:.2f}")
