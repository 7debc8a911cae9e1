"""RULER's samples from lm-eval's own generators, cut into a context and a question.

The generators take their tokenizer by name and make 500 samples a task. So not the tasks are called but what they call,
with the arguments that they have; a test compares both.
"""

from __future__ import annotations

import importlib
import io
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_kvcache_eval.retrieval.sample import Sample

#: Below this the generators find no sample that is short enough, and some of them go on for ever.
LEAST = 512
#: How much longer than one drawn at random a sample of the same parts may be.
_MARGIN = 1.1
_PACKAGE = "lm_eval.tasks.ruler"

Document = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A task of RULER that needs no data.

    Attributes:
        make: makes documents from a length in tokens, their number and a tokenizer.
        new_tokens: tokens that an output may have.
        question: what the question begins with, behind the context.
        delimiter: what stands between a document's text and the beginning of the answer.
    """

    make: Callable[[int, int, Any], list[Document]]
    new_tokens: int
    question: str
    delimiter: str = " "


def make_samples(task: str, length: int, count: int, seed: int, tokenizer: Any) -> list[Sample]:
    """Samples of one task; a longer set begins with the shorter one.

    Args:
        task: one of ``TASKS``.
        length: tokens of a prompt and its output, at most.
        count: samples.
        seed: another seed gives other samples.
        tokenizer: counts the tokens.

    Raises:
        ValueError: for an unknown task, or a length that leaves no room for a sample.
        ImportError: naming the package that a generator needs and that is not installed.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r}; accepted: {', '.join(TASKS)}")
    kind = TASKS[task]
    if length < LEAST:
        raise ValueError(f"length={length!r} of task={task!r}; accepted: whole numbers from {LEAST}")
    with _missing_packages(task), _seeded(seed), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        documents = kind.make(length, count, tokenizer)
    if len(documents) < count:
        raise ValueError(f"length={length!r} of task={task!r} left room for {len(documents)} samples of {count}")
    return [_sample(document, kind, index) for index, document in enumerate(documents)]


def score(outputs: str, answers: tuple[str, ...]) -> float:
    """RULER's score of one output: the share of the answers that stand in it, upper or lower case."""
    common = importlib.import_module(f"{_PACKAGE}.common_utils")
    return common.string_match_all(common.postprocess_pred([outputs]), [list(answers)])


def _sample(document: Document, kind: Kind, index: int) -> Sample:
    """A document as lm-eval puts it to a model, cut in front of its question."""
    text, begun = document["input"], document["gen_prefix"]
    at = text.rindex(kind.question)
    between = "" if text[-1].isspace() or begun[:1].isspace() else kind.delimiter
    question = f"{text[at:]}{between}{begun}"
    # The samples of these tasks have no depth: what is asked is in several places, or anywhere.
    return Sample(text[:at], question, tuple(map(str, document["outputs"])), 0.0, index)


def _niah(haystack: str, key: str, value: str) -> Callable[[int, int, Any], list[Document]]:
    def make(length: int, count: int, tokenizer: Any) -> list[Document]:
        with _no_download():
            needles = importlib.import_module(f"{_PACKAGE}.niah_utils")
        return needles.generate_samples(
            needles.get_haystack(type_haystack=haystack),
            max_seq_length=length,
            template=needles.TEMPLATE,
            type_haystack=haystack,
            type_needle_k=key,
            type_needle_v=value,
            num_samples=count,
            TOKENIZER=tokenizer,
        )

    return make


def _variable_tracking(length: int, count: int, tokenizer: Any) -> list[Document]:
    tracking = importlib.import_module(f"{_PACKAGE}.vt_utils")
    with _seeded(0):
        solved = tracking.generate_input_output(5, 1, 4, is_icl=True)[0]
        least = tracking.generate_input_output(10, 1, 4)[0]
    # In front of each question stands a solved one of up to 500 tokens, with at least five pieces of filler.
    _check_room("ruler_vt", _tokens(solved, tokenizer) + 30, 500)
    example = tracking.sys_vartrack_w_noise_random(
        tokenizer=tokenizer, num_samples=1, max_seq_length=500, incremental=5
    )[0]
    first = f"{example['input']} {' '.join(example['outputs'])}"
    _check_room("ruler_vt", _tokens(least, tokenizer) + 30 + _tokens(first, tokenizer), length)
    return tracking.sys_vartrack_w_noise_random(
        tokenizer=tokenizer, num_samples=count, max_seq_length=length, icl_example=example
    )


def _common_words(length: int, count: int, tokenizer: Any) -> list[Document]:
    words = importlib.import_module(f"{_PACKAGE}.cwe_utils")
    with _seeded(0):
        least = words.generate_input_output(10, length)[1]
    _check_room("ruler_cwe", _tokens(least, tokenizer) + 120, length)
    # Besides the global random numbers the module has some of its own, which go on from call to call.
    words.RNG.seed(random.getrandbits(63))
    return words.sys_word_pair_random(num_samples=count, max_seq_length=length, tokenizer=tokenizer)


def _frequent_words(length: int, count: int, tokenizer: Any) -> list[Document]:
    words = importlib.import_module(f"{_PACKAGE}.fwe_utils")
    return words.sys_kwext(tokenizer=tokenizer, max_seq_length=length, num_samples=count)


#: lm-eval's names of RULER's tasks that need no data, and what of them the evaluation has to know.
TASKS = {
    "niah_single_1": Kind(_niah("repeat", "words", "numbers"), 128, "\nWhat is the special magic"),
    "niah_multikey_2": Kind(_niah("needle", "words", "numbers"), 128, "\nWhat is the special magic"),
    "niah_multikey_3": Kind(_niah("needle", "uuids", "uuids"), 128, "\nWhat is the special magic"),
    "ruler_vt": Kind(_variable_tracking, 30, "\nQuestion:"),
    "ruler_cwe": Kind(_common_words, 120, "\nQuestion:", "\n\n"),
    "ruler_fwe": Kind(_frequent_words, 50, "\nQuestion:"),
}


def _tokens(text: str, tokenizer: Any) -> int:
    return len(tokenizer(text).input_ids)


def _check_room(task: str, least: int, length: int) -> None:
    """ValueError if the smallest sample may be longer than ``length``, for which its generator would look for ever."""
    if least * _MARGIN > length:
        raise ValueError(f"task={task!r}: its smallest sample has {least} tokens, which {length} have no room for")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random numbers that the generators use, from ``seed``; those of the caller go on behind it."""
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextmanager
def _no_download() -> Iterator[None]:
    """Keep nltk from downloading a model of sentences, which only haystacks of essays need."""
    nltk: Any = importlib.import_module("nltk")
    download, nltk.download = nltk.download, lambda *names, **options: False
    try:
        yield
    finally:
        nltk.download = download


@contextmanager
def _missing_packages(task: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = getattr(error.__cause__ or error, "name", None) or str(error).partition("\n")[0]
        raise ImportError(
            f"task={task!r} needs the package {package.partition('.')[0]}, which is not installed; "
            'pip install "hf-kvcache[eval]"'
        ) from error
