"""A comparison as Markdown, as one HTML page, and as pictures."""

from hf_kvcache_eval.report.write import write_report

__all__ = ["write_report"]
