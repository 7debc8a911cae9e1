"""Retrieval from long contexts: a generator of samples, and the task that asks a compressed cache for the answers."""

from hf_kvcache_eval.retrieval.generator import samples, write_jsonl
from hf_kvcache_eval.retrieval.registry import kinds
from hf_kvcache_eval.retrieval.sample import Sample
from hf_kvcache_eval.retrieval.task import RetrievalTask

__all__ = ["RetrievalTask", "Sample", "kinds", "samples", "write_jsonl"]
