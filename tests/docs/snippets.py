"""The Python code of a Markdown page, and running it.

A page's blocks run in their order and in one namespace, as a reader would paste them. The namespace begins with
`model`, `tokenizer` and `inputs`. `from_pretrained` gives a tiny random model whatever its name, so that no network is
needed.

An HTML comment before a block changes that: `<!-- snippet: slow -->` leaves the block to the test that loads the real
model, and `<!-- snippet: skip, because ... -->` leaves it out.

    python -m tests.docs.snippets docs/extending/codec.md     run one page in a process of its own
"""

from __future__ import annotations

import os
import re
import string
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests import families

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
TEXT = "The sky is blue because the air scatters the light of the sun. " * 8

_BLOCK = re.compile(
    r"^(?:<!-- snippet: (?P<mark>slow|skip)[^>]*-->\s*\n)?```python[^\n]*\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Snippet:
    """A block of Python in a page: its code, its mark or None, and the line at which the code begins."""

    code: str
    mark: str | None
    line: int


def snippets(page: Path) -> list[Snippet]:
    """The blocks of a page, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(found["code"], found["mark"], text.count("\n", 0, found.start("code")) + 1)
        for found in _BLOCK.finditer(text)
    ]


def run(page: Path, marks: tuple[str | None, ...], namespace: dict[str, Any]) -> None:
    """Run those blocks of a page that have one of these marks, in a folder that is removed afterwards."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for snippet in snippets(page):
                if snippet.mark in marks:
                    # Blank lines in front, so that a traceback names the line of the page.
                    exec(compile("\n" * (snippet.line - 1) + snippet.code, str(page), "exec"), namespace)
        finally:
            os.chdir(here)


def run_with_tiny_models(page: Path) -> None:
    """Run the unmarked blocks of a page with tiny random models."""
    with tiny_models():
        run(page, (None,), prepared("llama"))


def prepared(name: str) -> dict[str, Any]:
    """What is there before the first block of a page."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    return {
        "__name__": "snippet",
        "torch": torch,
        "model": model,
        "tokenizer": tokenizer,
        "inputs": tokenizer(TEXT, return_tensors="pt"),
    }


@contextmanager
def tiny_models() -> Iterator[None]:
    """`from_pretrained` gives a tiny random model, with latent attention where the name says DeepSeek."""

    def model(name: str, **_: Any) -> Any:
        return families.build("deepseek_v3" if "deepseek" in name.lower() else "llama")

    with (
        patch.object(AutoModelForCausalLM, "from_pretrained", model),
        patch.object(AutoTokenizer, "from_pretrained", lambda *_, **__: spelling_tokenizer()),
    ):
        yield


def spelling_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single characters, no more of them than the tiny models know."""
    vocabulary = {sign: number for number, sign in enumerate(string.printable[:100])}
    assert len(vocabulary) < families.VOCABULARY
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="0", padding_side="left")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_with_tiny_models(Path(sys.argv[1]))
