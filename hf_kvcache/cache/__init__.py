"""The caches that users build.

The classes of caches:

- ``contract``: the methods that transformers calls, over the layers of a model.
- ``base``: ``KVCache``, with ``fork``, ``memory``, ``state_dict`` and ``compress``. All other caches are subclasses.
- ``quantized``: ``QuantizedKVCache``, which stores keys and values in few bits.
- ``evicting``: ``HeavyHitterCache`` and ``SlidingWindowCache``, which keep some of the tokens.
- ``sparse``: ``SparseReadCache``, which keeps all tokens and reads some of them.
- ``latent``: ``LatentKVCache``, for latents and low-rank coefficients.
- ``compressed``: ``CompressedKVCache``, for DeepSeek V4, which compresses its tokens.

What these classes use:

- ``compressed_config``: which layers such a model has.
- ``model_config``: which layers a model's config asks for, and which models are refused.
- ``forward_pass``: how far a forward pass has come, and how an interrupted one is undone.
- ``model_checks``: errors and warnings for a model that does not read the cache, or drops it.
- ``other_states``: calls of the model to transformers' own layers (convolutions and recurrences of hybrid models).
- ``other_layers``: saving such layers.
- ``anchors``: which layers choose pages for others, found by reading a text.
- ``replay``: a second reading of the context, which some eviction policies need.
- ``serialization``: a cache as a dictionary of tensors.
- ``memory``: the report of the bytes that a cache holds.
"""
