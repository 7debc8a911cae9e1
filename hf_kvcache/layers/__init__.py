"""The layers of a cache: one class for each kind of attention layer, in transformers' layer contract.

A plain layer, :class:`~hf_kvcache.layers.base.KVCacheLayer`, is built from a chain of base classes. Each file adds one
task to the file before it:

1. ``state``: the stored tokens, the new tokens and the counters.
2. ``dense_reads``: reading the keys and values as dense tensors.
3. ``attention``: attention over the pages and the full-precision tokens.
4. ``decode_step``: plain decoding, one token at a time, by prepared calls.
5. ``saved_state``: saving a layer and restoring it.
6. ``base``: the methods that transformers calls (``update``, ``crop``, ``reorder_cache``, ...).

Layers that evict tokens add ``gate_scores`` (what a policy gives tokens as they come), ``evicting_attention``
(attention that an eviction policy observes), ``evicting_rollback`` (how drafts are undone) and ``evicting`` (when
tokens are dropped).

``sparse`` adds to either kind that steps read only the pages that a selector picks.

The other kinds of layers are ``mla`` (latents that the model caches itself), ``evicting_mla`` (the same with eviction),
``low_rank`` (coefficients in a calibrated basis), ``indexed`` (keys and values, and the keys of an indexer) and
``cross_attention`` (states of an image).

Layers of DeepSeek V4 hold rows in place of pages, and are built from ``compression`` (what one compressor leaves),
``compressed_state`` (window and compressors), ``compressed_saved``, ``compressed_reads`` (with
``compressed_attention``) and ``compressed`` (the methods that the model calls).

Layers with a fixed maximum length are built from other parts, on tensors whose addresses never change:
``static_tensors`` (the state), ``static_contents`` (reading it), ``static_storage`` (storing tokens), ``static_steps``
(prepared calls), ``static_masks``, ``static_reads``, ``static_ops`` (the operators), ``static_attention``, ``static``.

Their parts are ``options`` (the settings that all layers of a cache share), ``new_tokens`` (the tokens of the latest
update), ``rollback`` (tokens that a ``crop`` may remove), ``drafts`` (updates that an evicting layer can repeat) and
``indexer_keys`` (the keys of a sparse-attention indexer).
"""
