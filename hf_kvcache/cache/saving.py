"""A cache that can be saved and restored: as a dictionary of tensors, or as a file."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedConfig

from hf_kvcache.cache.contract import CacheContract
from hf_kvcache.cache.files import read_about
from hf_kvcache.cache.loading import read_cache, write_cache
from hf_kvcache.cache.serialization import export_state, import_state


class SavableCache(CacheContract):
    """A cache that can be saved and restored. Saving does not change the cache."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The content of the cache as a flat dictionary of tensors, ready for safetensors. Pages stay packed.

        Raises:
            RuntimeError: if a forward pass ended in the middle.
            ValueError: if a layer of transformers' own holds something that cannot be saved, or the cache has a
                maximum length.
        """
        self.refuse_static("state_dict()")
        self.check_complete()
        return export_state(self.layers, self.options)

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device | str | None = None) -> None:
        """Replace the content of the cache by a saved one.

        Args:
            state: what :meth:`state_dict` of a cache with the same settings returned. All tensors are checked before
                the cache is changed.
            device: the device for the cache. Without it the tensors stay where they are. The layers of this package
                then move to the device of the model with the first update; transformers' own layers do not.

        Raises:
            ValueError: if the state was saved with other settings or is damaged. The error names the difference, and
                the cache is not changed.
        """
        self._replace_content(state, device, False)

    def take_state(self, state: dict[str, torch.Tensor], device: torch.device | str | None = None) -> None:
        """:meth:`load_state_dict` of tensors that nobody else has: they are kept, and written to, uncopied."""
        self._replace_content(state, device, True)

    @torch.inference_mode(False)  # what is moved to another device is written to outside of that mode too
    def _replace_content(self, state: dict[str, torch.Tensor], device: torch.device | str | None, owned: bool) -> None:
        self.refuse_static("load_state_dict()")
        in_every_pass = {layer.index for layer in self._pass.in_every_pass(self.layers)}
        self.layers = import_state(self.layers, self.options, in_every_pass, state, device, owned)
        self._pass.end()

    def save(self, path: str | PathLike[str], input_ids: torch.Tensor | None = None, *, private: bool = False) -> None:
        """Write the cache to a safetensors file. Pages are written as they are packed.

        A file of that name is replaced once the new one is complete.

        Args:
            path: of the file.
            input_ids: the tokens that the cache has seen, ``[B, n]`` or ``[n]``, to be written too.
            private: whether only a digest of the tokens is written. Whoever can run the model may still be able to
                tell the tokens from the keys and values.

        Raises:
            ValueError: if ``input_ids`` are not as many as the cache has seen, or the cache holds what cannot be saved.
            RuntimeError: if a forward pass ended in the middle, or drafts are not confirmed.
        """
        self.refuse_static("save()")
        write_cache(self, path, input_ids, private)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        config: PreTrainedConfig,
        *,
        input_ids: torch.Tensor | None = None,
        empty: SavableCache | None = None,
        device: torch.device | str | None = None,
        check_model: bool = True,
        bind: bool = True,
        offload: str | PathLike[str] | None = None,
    ) -> Any:
        """The cache in a file of :meth:`save`.

        The file is mapped into memory. On a CPU nothing of it is copied, and what is packed is read where it lies in
        the file. The file itself is never changed. Otherwise the cache moves to the device of the model with the first
        update.

        Args:
            path: of the file.
            config: the config of the model that is to go on with the cache.
            input_ids: the tokens that the file must be of, ``[B, n]`` or ``[n]``.
            empty: an empty cache with the settings of the saved one, which is filled. It is needed where a setting is
                an object that a file cannot describe, such as a policy with a calibration.
            device: the device for the cache.
            check_model: whether the config must name the model and the revision that the cache was filled by. What the
                shapes depend on is always checked.
            bind: as in the constructor.
            offload: as in the constructor. Pages are then copied to where they are to lie.

        Returns:
            A cache of the class that was saved.

        Raises:
            ValueError: if the file is missing, damaged, of another kind, model, class or settings, or of a newer
                version of the format. The error says what differs.
        """
        return read_cache(cls, path, config, input_ids, empty, device, check_model, bind, offload)

    @staticmethod
    def about_file(path: str | PathLike[str]) -> dict[str, Any]:
        """What a file of :meth:`save` says of its cache, its content unread.

        Returns:
            ``model``, ``dtype``, ``class``, ``codec`` and ``policy``; ``seen``, the number of tokens; ``tokens``, their
            ids ``[B, n]`` if they were saved; ``tokens_digest``; and what the cache is built from.

        Raises:
            ValueError: if the file is missing, damaged, of another kind or of a newer version.
        """
        return read_about(path)

    def refuse_static(self, what: str) -> None:
        """Raise ValueError if the cache has a maximum length, with which it does not have the method ``what``."""
        if self.options.max_length is not None:
            raise ValueError(
                f"{what} of a cache with max_length={self.options.max_length!r}; accepted: max_length=None"
            )
