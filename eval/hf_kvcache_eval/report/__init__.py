"""A comparison as a CSV file, as Markdown, as one HTML page, and as pictures."""

from hf_kvcache_eval.report.published import publish, write_page
from hf_kvcache_eval.report.write import write_report

__all__ = ["publish", "write_page", "write_report"]
