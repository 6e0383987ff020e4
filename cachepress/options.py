"""Options of evaluations, sweeps and benchmarks: names, types, defaults and descriptions.

The dataclasses here only hold fields: what checks and uses them derives from them, and the command
line reads its options off them, the help from their docstrings. So nothing here loads torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, get_args, get_origin, get_type_hints

from cachepress.limits import MOST, MOST_SEED, MOST_TOKENS

BUILTIN = "smollm2-135m"
"""The model that is built in."""


class Whole(NamedTuple):
    """Type annotation of a whole number: the least and the most that it may be."""

    least: int = 1
    most: int = MOST


class Place(NamedTuple):
    """Type annotation of a text that names a file or a folder."""

    metavar: str = "FILE"


Count = Annotated[int, Whole()]
Tokens = Annotated[int, Whole(1, MOST_TOKENS)]
"""A number that is only compared with tokens."""
Seed = Annotated[int, Whole(-MOST_SEED, MOST_SEED)]
FileName = Annotated[str, Place()]


def bounds_of(kind: type) -> dict[str, Whole]:
    """Return the bounds of each whole number among the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    marks = {name: _marks(hint) for name, hint in hints.items()}
    return {n: mark for n, found in marks.items() for mark in found if isinstance(mark, Whole)}


def _marks(hint: object) -> list[object]:
    """Find the annotations of a type, or of the one that it has beside None or in a sequence."""
    parts = get_args(hint)
    if get_origin(hint) is Annotated:
        return list(parts[1:])
    return [mark for part in parts for mark in _marks(part)]


@dataclass(frozen=True)
class EvaluationFields:
    """Options of an evaluation: what is evaluated, and how.

    Attributes:
        dataset: a benchmark's name, or a .csv, .jsonl or .parquet file.
        data_dir: part of the data set, such as multi_key-1000 of builtin.
        data_path: folder with a benchmark's original files (default: the hub).
        model: smollm2-135m, a local folder, or a hub name.
        device: torch device (default: a GPU if there is one).
        dtype: torch dtype (default: float32 on CPU).
        press: an alias, or "SnapKVPress(window_size=32)"; no_press for none.
        compression_ratio: fraction of pairs removed, 0 to 1 (default: what the press says).
        fraction: fraction of the contexts to evaluate.
        seed: seed of data and sampling.
        metric: what judges all answers (default: each sample's own).
        trust_remote_code: run the code that a model's repository brings, having read it.
        query_aware: let the press see the question: it is put into the context.
        max_new_tokens: most tokens of an answer, instead of the data's own column.
        max_context_length: most tokens of a context (default: what the model has room for).
        chat: use the model's chat template (default: the data's own rule).
        prompts: prompts in the benchmark's published format, or those of a table, instead of ours.
        truncation: cut longer contexts instead of refusing them: middle, end, or nothing for where
            the benchmark itself cuts.
        beyond_trained_length: allow contexts longer than the model was trained for; answers are not
            to be trusted.
        prefill_chunk_size: tokens of a context computed at once (default: all).
        prefill_mode: exact: compress after the last chunk; online: after each.
        storage: how kept pairs are stored: full, int8, int4 or int2.
        output_dir: where results go (default: ./results).
        model_kwargs: YAML or JSON mapping for from_pretrained.
        log_level: DEBUG, INFO, WARNING or ERROR.
        overwrite: do a finished run, or another one in its place, again.
    """

    dataset: str = "builtin"
    data_dir: str | None = None
    data_path: str | None = None
    model: str = BUILTIN
    device: str | None = None
    dtype: str | None = None
    press: str = "no_press"
    compression_ratio: float | None = None
    fraction: float = 1.0
    seed: Seed = 0
    metric: str | None = None
    trust_remote_code: bool = False
    query_aware: bool = False
    max_new_tokens: Count | None = None
    max_context_length: Tokens | None = None
    chat: bool | None = None
    prompts: FileName | None = None
    truncation: bool | str = False
    beyond_trained_length: bool = False
    prefill_chunk_size: Tokens | None = None
    prefill_mode: str = "exact"
    storage: str = "full"
    output_dir: str = "./results"
    model_kwargs: dict[str, object] = field(default_factory=dict)
    log_level: str = "INFO"
    overwrite: bool = False


@dataclass(frozen=True)
class SweepFields:
    """Options of a sweep, besides those of each evaluation.

    Attributes:
        presses: aliases or spellings, or all for every press as its authors recommend it (default:
            snapkv knorm); no press is always there.
        ratios: for each press that has one (default: 0.25 0.5 0.75 0.9).
        datasets: names with a part, such as builtin:multi_key-1000 (builtin).
        models: built-in names, local folders or hub names (default: smollm2-135m).
        query_aware: no, yes or both: let presses see the question (no).
        executor: serial, process or ray (serial).
        workers: workers of process and ray (1).
        batch_size: most answers decoded at once (128).
        kl: measure the divergence from what the uncompressed model expects (no).
    """

    presses: Sequence[str] = ("snapkv", "knorm")
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9)
    datasets: Sequence[str] = ("builtin",)
    models: Sequence[str] = (BUILTIN,)
    query_aware: str = "no"
    executor: str = "serial"
    workers: Count = 1
    batch_size: Count = 128
    kl: bool = False


@dataclass(frozen=True)
class BenchFields:
    """Options of a benchmark of seconds and bytes.

    Attributes:
        presses: aliases or spellings (default: snapkv).
        ratios: ratios for each press (default: those in the spellings).
        lengths: tokens of context (default: 4096).
        batch_sizes: contexts read at once (default: 1).
        forks: continuations of a context that are decoded at once (default: 1).
        baseline: time transformers' own cache, too (default: yes).
        steps: tokens decoded in each repeat (default: 32).
        repeats: of everything (default: 3).
        model: smollm2-135m, a local folder, or a hub name.
        config: random weights of a shape instead of a model: llama-3.1-8b, qwen3-4b, a folder.
        layers: layers of that shape (default: all).
        dtype: torch dtype (default: float32 on CPU).
        device: torch device (default: a GPU if there is one).
        prefill_chunk_size: tokens of a context computed at once.
        prefill_mode: exact or online.
        storage: full, int8, int4 or int2.
        beyond_trained_length: allow lengths that the model was not trained for; times and bytes
            mean what they say, answers would not.
        trust_remote_code: run the code that a model's repository brings, having read it.
    """

    presses: Sequence[str] = ("snapkv",)
    ratios: Sequence[float] = ()
    lengths: Sequence[Count] = (4096,)
    batch_sizes: Sequence[Count] = (1,)
    forks: Sequence[Count] = (1,)
    baseline: bool = True
    steps: Count = 32
    repeats: Count = 3
    model: str = BUILTIN
    config: Annotated[str, Place("CONFIG")] | None = None
    layers: Count | None = None
    dtype: str | None = None
    device: str | None = None
    prefill_chunk_size: Tokens | None = None
    prefill_mode: str = "exact"
    storage: str = "full"
    beyond_trained_length: bool = False
    trust_remote_code: bool = False
