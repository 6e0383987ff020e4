"""Perplexity of how a text goes on, given its compressed beginning.

No question is asked, and no chat template used: a text's first part is read and compressed, and
the next part is put into the model's mouth.
"""

import re
from pydoc_data import topics

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.tasks.base import PERPLEXITY as METRIC
from cachepress.evaluation.tasks.base import Size, Task, normalise, whole_number
from cachepress.files import read_text
from cachepress.hf.types import PreTrainedTokenizerBase

DEFAULT = "1000-128x20"
"""Tokens that are read, tokens that go on, and windows."""


def load_perplexity(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """Load a sample for each window of a text.

    ``data_dir`` is the tokens that are read and those that go on, and the number of windows, such
    as "1000-128x20". ``data_path`` is a text file; without it the text is the documentation that
    Python ships. Windows are spread evenly over the text and do not overlap.

    Raises:
        CachepressError: if the numbers are misspelt, or the text is missing or too short.
    """
    read, more, windows = _numbers(config.data_dir)
    if (path := config.data_path) is None:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
    else:
        text = read_text(path)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    step = len(ids) // windows
    if step < read + more:
        raise CachepressError(
            f"perplexity: the text has {len(ids)} tokens, and {windows} windows of {read + more} "
            f"need {windows * (read + more)}: ask for fewer or shorter ones"
        )
    rows = []
    for start in range(0, windows * step, step):
        middle, end = start + read, start + read + more
        context, goes_on = tokenizer.decode(ids[start:middle]), tokenizer.decode(ids[middle:end])
        rows.append({"context": context, "question": "", "answer": [goes_on], "length": read})
    table = pd.DataFrame(rows).assign(metric=METRIC, max_new_tokens=1)
    return normalise(table, task="perplexity", origin="perplexity")


def _numbers(data_dir: str | None) -> tuple[int, int, int]:
    """Parse the part of the data: tokens of context, tokens that are scored, and windows."""
    found = re.fullmatch(r"([0-9]+)-([0-9]+)x([0-9]+)", data_dir or DEFAULT)
    read, more, windows = map(whole_number, found.groups()) if found else (0, 0, 0)
    if not (read and more and windows):
        raise CachepressError(
            f"perplexity: got data_dir={data_dir!r}, wanted tokens read, tokens that go on and "
            f"windows, such as {DEFAULT}"
        )
    return read, more, windows


def _size(config: EvaluationConfig) -> Size:
    read, more, windows = _numbers(config.data_dir)
    # What is read lends its last token, so that there is one for the next to follow.
    return Size(read, windows * (read + more), max(more, config.max_new_tokens or 1), read)


PERPLEXITY = Task(
    name="perplexity",
    about="of any text that goes on after a compressed one",
    load=load_perplexity,
    size=_size,
)
