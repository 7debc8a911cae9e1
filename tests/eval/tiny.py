"""A tokenizer small enough for the tiny models of the tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.families import VOCABULARY


class LetterTokenizer:
    """One token a character, folded into the tiny vocabulary; token 0 is not used."""

    eos_token_id = None
    pad_token_id = 0

    def __call__(self, text: str, return_tensors: str | None = None, **options: Any) -> Any:
        ids = [1 + ord(letter) % (VOCABULARY - 1) for letter in text]
        return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors == "pt" else ids)
