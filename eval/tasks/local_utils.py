"""What the ``local_*`` tasks share: loading JSON lines from a folder, and metrics of the long-context sets.

The prompts of the tasks that exist upstream come from lm-eval itself.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks.hellaswag.utils import process_docs
from lm_eval.tasks.wikitext.preprocess_wikitext import process_results as wikitext_results
from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer as wikitext_page
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_choice as winogrande_choice
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_target as winogrande_target
from lm_eval.tasks.winogrande.preprocess_winogrande import doc_to_text as winogrande_text

__all__ = [
    "load",
    "load_hellaswag",
    "quote",
    "recall",
    "wikitext_page",
    "wikitext_results",
    "winogrande_choice",
    "winogrande_target",
    "winogrande_text",
]

#: Environment variable that names the folder of the data.
VARIABLE = "HF_KVCACHE_EVAL_DATA"


def load(
    data_root: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    **_: Any,
) -> dict[str, datasets.Dataset]:
    """The splits of a task.

    Args:
        data_root: folder of the data; the environment variable's if None.
        train: JSON lines file of the split in it; likewise ``validation`` and ``test``.

    Raises:
        ValueError: if the folder is not said or has no such file.
    """
    files = {"train": train, "validation": validation, "test": test}
    return {split: datasets.Dataset.from_list(_rows(data_root, name)) for split, name in files.items() if name}


def load_hellaswag(**options: Any) -> dict[str, datasets.Dataset]:
    """HellaSwag with upstream's text processing done once: as ``process_docs`` it would be repeated several times."""
    return {split: process_docs(documents) for split, documents in load(**options).items()}


def recall(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """``recall``: every answer is in the text; ``exact_first``: the first number in it is the answer."""
    text = results[0]
    numbers = re.findall(r"\d+", text)
    return {
        "recall": float(all(answer in text for answer in doc["outputs"])),
        "exact_first": float(numbers[:1] == doc["outputs"][:1]),
    }


def quote(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """``word_nll``: nats per word of the quotation; ``acc``: greedy decoding would have quoted it."""
    log_likelihood, greedy = results[0] if isinstance(results[0], tuple) else results
    return {"word_nll": -log_likelihood / len(doc["outputs"][0].split()), "acc": float(greedy)}


def _rows(data_root: str | None, name: str) -> list[dict[str, Any]]:
    root = data_root or os.environ.get(VARIABLE)
    if not root:
        raise ValueError(f"{VARIABLE} is not set; set it to the folder that holds {name}")
    path = Path(root).expanduser() / name
    if not path.is_file():
        raise ValueError(f"{VARIABLE}={root}: no file {name} in this folder")
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
