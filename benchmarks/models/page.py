"""Writes the tables of model types in ``docs/models.md`` from what was found."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from tabulate import tabulate

from benchmarks.models.tiny import EXCEPTIONS, NO_WINDOW

DOCS = Path(__file__).parents[2] / "docs"
PAGE, DATA = DOCS / "models.md", DOCS / "models.json"
MARK = "<!-- What follows is written by `make models`. -->\n"
STATES = {
    "works": "work",
    "in part": "work in part",
    "refused": "are refused",
    "cannot be built": "cannot be built",
    "wrong": "are wrong",
}
"""What a type may be, and how several are said to be it."""
ITSELF = "not without a press either"
Found = Mapping[str, object]

INTRODUCTION = """
## Every model type

Every causal model type of transformers {transformers} was built tiny, with random weights, and
tried by `make models`: {counts}.

A type **works** if it passes seven checks against the model itself: ratio 0 is no press; decoding
after eviction is that of the uncompressed model with the evicted pairs masked, head by head; a
sequence of a padded batch is that sequence alone; a prompt in chunks is the prompt in one forward;
a saved and loaded cache, a fork and beams give the same. What a type does not do without a press
either is named. A type that is **refused** raises `UnsupportedError` when `with press(model)` is
entered, with the line that stands here. What is tried is the class that `AutoModelForCausalLM`
makes: of `bart`, `whisper` and other encoder-decoders that is the decoder by itself.
"""


def counts_of(types: Mapping[str, Found]) -> Counter[str]:
    """Count the types in each state."""
    return Counter(str(found["status"]) for found in types.values())


def sentence_of(types: Mapping[str, Found]) -> str:
    """Say in words how many types are in each state."""
    counts = counts_of(types)
    told = [f"{counts[state]} {words}" for state, words in STATES.items() if counts[state]]
    return f"of {len(types)} types {', '.join(told[:-1])} and {told[-1]}"


def page(text: str, data: Mapping[str, object]) -> str:
    """Write the page's tables anew; what stands before the mark stays."""
    types: Mapping[str, Found] = data["types"]  # type: ignore
    counts = sentence_of(types)
    parts = [INTRODUCTION.format(transformers=data["transformers"], counts=counts)]
    rows = [[f"`{kind}`", _notes(kind, found)] for kind, found in types.items() if _ok(found)]
    parts.append("### Works\n\n" + _table(rows, ["type", "notes"]))
    for state in list(STATES)[1:]:
        rows = [
            [f"`{kind}`", _escaped(str(found["reason"]))]
            for kind, found in types.items()
            if found["status"] == state
        ]
        if rows:
            parts.append(f"### {state.capitalize()}\n\n" + _table(rows, ["type", "why"]))
    return text.partition(MARK)[0] + MARK + "\n".join(parts)


def _ok(found: Found) -> bool:
    return found["status"] == "works"


def _notes(kind: str, found: Found) -> str:
    """Say what a type that works does not do by itself, and under which options it works."""
    checks: Mapping[str, str] = found["checks"]  # type: ignore
    own = [name for name, line in checks.items() if line == ITSELF]
    notes = [f"{', '.join(own)}: {ITSELF}"] if own else []
    if EXCEPTIONS.get(kind) is NO_WINDOW:
        notes.append(
            "without a sliding window; with one in every layer there is nothing to compress"
        )
    return "; ".join(notes)


def _table(rows: list[list[str]], headers: list[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
