"""Attention over pages: decoding of page records and the online softmax that reads them chunk by chunk."""

from hf_kvcache.kernels.decode.reference import OnlineSoftmax, decode_side

__all__ = ["OnlineSoftmax", "decode_side"]
