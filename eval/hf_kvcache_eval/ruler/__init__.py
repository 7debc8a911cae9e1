"""RULER (arXiv:2404.06654) by lm-eval's generators and scores, with the question asked after compression."""

from hf_kvcache_eval.ruler.samples import TASKS
from hf_kvcache_eval.ruler.task import ALL, RulerTask

__all__ = ["ALL", "TASKS", "RulerTask"]
