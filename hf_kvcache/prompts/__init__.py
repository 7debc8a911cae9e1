"""Prompts that are read once: a store that shares their caches between requests, processes and machines."""

from hf_kvcache.prompts.chat import Chat
from hf_kvcache.prompts.stats import StoreStats
from hf_kvcache.prompts.store import PromptStore

__all__ = ["Chat", "PromptStore", "StoreStats"]
