"""A chat whose earlier turns are not read again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Chat:
    """A chat over a store. The messages are all that has to be kept for another day: the store knows the rest.

    Args:
        reply_to: generates behind ids ``[1, T]`` and keeps all of it.
        flush: waits until what was kept is written.
        tokenizer: the tokenizer of the model, which has a chat template.
        messages: earlier messages.
        device: where the model reads ids.

    Attributes:
        messages: all messages, each with a ``role`` and a ``content``.
    """

    def __init__(
        self,
        reply_to: Callable[[torch.Tensor], torch.Tensor],
        flush: Callable[[], None],
        tokenizer: Any,
        messages: list[Any],
        device: torch.device,
    ) -> None:
        self._reply_to, self._flush, self._tokenizer, self._device = reply_to, flush, tokenizer, device
        self.messages = messages

    def send(self, text: str) -> str:
        """Say something, and return the reply."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids.to(self._device)
        reply = self._tokenizer.decode(self._reply_to(ids)[0, ids.shape[1] :], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": reply}]
        return reply

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()
