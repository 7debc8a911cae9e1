"""A model and its caches of all prompts. The server that starts worker processes imports this once for all of them."""

from __future__ import annotations

import torch

from tests import families
from tests.prompts.toys import read
from tests.prompts.working import PROMPTS, asked

# A process with threads of torch must not be forked.
torch.set_num_threads(1)

MODEL = families.build("llama")
FRESH = {number: read(MODEL, asked(number)) for number in range(PROMPTS)}
