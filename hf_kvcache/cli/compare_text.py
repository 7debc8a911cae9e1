"""The windows of a text on which ``hf-kvcache compare`` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_kvcache.cli.sample_text import packaged_text


def read_text(path: str | None) -> tuple[str, str]:
    """A text and the name of its file; the text that comes with the package if ``path`` is None.

    Raises:
        ValueError: if the file is not UTF-8 text.
        OSError: if it cannot be read.
    """
    if path is None:
        return packaged_text()
    if not Path(path).is_file():
        raise ValueError(f"--text={path!r}: there is no such file")
    try:
        return Path(path).read_text(encoding="utf-8"), Path(path).name
    except UnicodeDecodeError as error:
        raise ValueError(f"--text={path!r} is not UTF-8 text: {error}") from error


def cut_windows(tokenizer: Any, text: str, prefix: int, suffix: int, windows: int) -> torch.Tensor:
    """Windows of a text, spread over it evenly and not overlapping, ``[n, prefix + suffix]`` with ``n <= windows``.

    Each begins with the tokenizer's beginning-of-text token, if it puts one before texts.

    Raises:
        ValueError: if the text is too short for one window.
    """
    read = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    ids = torch.tensor(read, dtype=torch.long, device="cpu")
    begin = tokenizer.bos_token_id
    if begin is None or tokenizer("a", verbose=False).input_ids[:1] != [begin]:
        head = ids[:0]
    else:
        head = torch.tensor([begin], device="cpu")
    length = prefix + suffix - len(head)
    if len(ids) < length:
        raise ValueError(
            f"the text has {len(ids):,} tokens, prefix={prefix} and suffix={suffix} take {length:,}; give a longer "
            "text, or a shorter prefix"
        )
    count = min(windows, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count, device="cpu").long().tolist()
    return torch.stack([torch.cat([head, ids[start : start + length]]) for start in starts])
