"""Retrieval heads: those that look far back into a text, found on the model itself or read."""

import io
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cachepress.errors import CachepressError
from cachepress.files import expanded
from cachepress.hf import check_model
from cachepress.hf.wiring import full_attention
from cachepress.ops.attention import attention_weights
from cachepress.presses._looking import _LookingPress
from cachepress.view import EVERY, LayerView, Needs

Scores = tuple[tuple[float, ...], ...]
"""A number for each KV head of each layer that is compressed."""

PATTERN = "full_attention_heads.tsv"
_PASSAGE = 256
_MOST = 1e30
_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Scores]] = WeakKeyDictionary()


def copying_scores(model: PreTrainedModel) -> Scores:
    """How much each head attends to what the model would copy next, when a passage comes back.

    The attention that a query in the second copy pays to the row after its own in the first copy,
    averaged over the queries and over the query heads of a KV head. It is found once for a model.
    """
    return _found(model, ("copying",), _PASSAGE, _copying)


def far_scores(model: PreTrainedModel, n_sink: int, n_recent: int) -> Scores:
    """How much each head attends to rows that are neither the first nor the newest.

    The attention that the queries in the second copy of a passage pay to rows outside of the first
    ``n_sink`` and the newest ``n_recent``, averaged like that of ``copying_scores``.
    """
    passage = max(_PASSAGE, n_sink, n_recent)
    return _found(model, ("far", n_sink, n_recent), passage, partial(_far, n_sink, n_recent))


def read_scores(path: str, name: str, least: float = 0.0) -> Scores:
    """Scores in a file: a row for each layer, a number for each of its heads.

    Either numbers with tabs between them, a line for each layer; or a JSON list of lists; or a JSON
    object of a number or a list of samples by "layer-head", as HeadKV publishes it; or a ``.npy``.

    Args:
        path: the file, or the folder with a ``full_attention_heads.tsv``.
        name: what the user calls it.
        least: see ``checked``.

    Raises:
        CachepressError: if there is no such file, or it holds something else.
    """
    try:
        rows = _rows(pattern_file(path).read_bytes())
    except OSError as error:
        raise CachepressError(
            f"{name}: got {path!r}, wanted a file like {PATTERN} or its folder: {error.strerror}"
        ) from error
    except (ValueError, TypeError, OverflowError, EOFError, RecursionError, MemoryError) as error:
        raise CachepressError(
            f"{name}: {path!r} is no table of numbers: wanted a line for each layer, with a number "
            f"for each KV head and tabs between them ({' '.join(str(error).split())[:200]})"
        ) from error
    return checked(rows, name, least)


def _rows(data: bytes) -> object:
    """What should be rows of numbers, of a file of any of the known layouts."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False).tolist()
    text = data.decode("utf-8-sig")
    if text.lstrip()[:1] in ("[", "{"):
        found = json.loads(text)
        return _by_name(found) if isinstance(found, dict) else found
    return [[float(x) for x in line.split("\t")] for line in text.splitlines() if line.strip()]


def _by_name(found: dict[str, object]) -> list[list[float]]:
    """Rows of scores that are named "layer-head"; of several samples of a head, their mean."""
    table: dict[int, dict[int, float]] = {}
    for name, value in found.items():
        match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", name)
        samples = value if isinstance(value, list) else [value]
        numbers = [float(x) for x in samples if isinstance(x, int | float)]
        if match is None or not numbers or len(numbers) < len(samples):
            raise ValueError(f"{name!r} is no layer-head with a number")
        layer, head = int(match[1]), int(match[2])
        table.setdefault(layer, {})[head] = sum(numbers) / len(numbers)
    rows = [[x for _, x in sorted(row.items())] for _, row in sorted(table.items())]
    if sorted(table) != list(range(len(table))) or any(
        sorted(row) != list(range(len(row))) for row in table.values()
    ):
        raise ValueError("some layers or heads are missing")
    return rows


def pattern_file(path: str) -> Path:
    """The file of a pattern that is named by its file or its folder."""
    found = Path(expanded(path))
    return found / PATTERN if found.is_dir() else found


def checked(scores: object, name: str, least: float = 0.0) -> Scores:
    """Scores as tuples.

    Args:
        scores: what the user gave.
        name: what the user calls it.
        least: the lowest number that is taken; what is below 0 counts as 0.

    Raises:
        CachepressError: unless they are a table of finite numbers, none below ``least``.
    """
    rows = scores if isinstance(scores, list | tuple) else ()
    table = tuple(tuple(row) if isinstance(row, list | tuple) else () for row in rows)
    numbers = [x for row in table for x in row]
    good = all(isinstance(x, int | float) and least <= x <= _MOST for x in numbers)
    if not good or not all(table) or not table:
        raise CachepressError(
            f"{name}: wanted a number of at least {least:g} for each KV head of each layer, "
            "such as ((0.1, 0.9), (0.5, 0.0)), or the path of a file"
        )
    return tuple(tuple(max(x, 0.0) for x in row) for row in table)


def fitted(scores: Scores, model: PreTrainedModel, name: str, by_query: bool = False) -> Scores:
    """Scores of the KV heads of the full-attention layers of a model.

    Args:
        scores: for these layers, or for all layers of the model.
        model: the model.
        name: what the user calls them.
        by_query: whether they may be those of query heads, which are then averaged.

    Raises:
        CachepressError: unless there is a score for each head of each layer.
    """
    wanted = [len(row) for row in _found(model, ("heads",), 1, _nothing)]
    config = model.get_decoder().config
    full, queries = full_attention(config), config.num_attention_heads
    if len(scores) == len(full):
        scores = tuple(row for row, is_full in zip(scores, full, strict=True) if is_full)
    got = [len(row) for row in scores]
    if by_query and got == [queries] * len(wanted) != wanted:
        scores = tuple(_averaged_rows(row, n) for row, n in zip(scores, wanted, strict=True))
        got = wanted
    if got != wanted:
        raise CachepressError(
            f"{name}: got scores of {_size(got)}, and {type(model).__name__} has {_size(wanted)} "
            "with full attention"
        )
    return scores


def _averaged_rows(row: tuple[float, ...], n: int) -> tuple[float, ...]:
    """A score for each of ``n`` KV heads, of those of their query heads."""
    size = len(row) // n
    return tuple(sum(row[i * size : (i + 1) * size]) / size for i in range(n))


def _size(heads: list[int]) -> str:
    each = f"{heads[0]}" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)}"
    return f"{len(heads)} layers of {each} KV heads"


def _found(
    model: PreTrainedModel,
    key: tuple[object, ...],
    passage: int,
    measure: Callable[[LayerView], Tensor],
) -> Scores:
    """Measures of a model that reads a text with a repeat; remembered while the model lives."""
    check_model(model)
    decoder = model.get_decoder()
    known = _FOUND.setdefault(decoder, {})
    if key not in known:
        found: dict[int, list[float]] = {}

        def look(view: LayerView) -> None:
            found[view.depth] = measure(view).tolist()

        with torch.no_grad(), _LookingPress(Needs(queries=EVERY), look)(model):
            decoder(input_ids=_text(decoder, passage).to(model.device), use_cache=True)
        known[key] = tuple(tuple(found[depth]) for depth in sorted(found))
    return known[key]


def _text(decoder: PreTrainedModel, passage: int) -> Tensor:
    """Random tokens ``[1, T]`` in four quarters, of which the last repeats the second.

    A quarter has ``passage`` tokens, fewer in a model that cannot read so much. The tokens are the
    same for each model with the same vocabulary, and differ from each other where there are
    enough of them.
    """
    config, generator = decoder.config, torch.Generator().manual_seed(0)
    quarter = min(passage, (getattr(config, "max_position_embeddings", None) or 4 * passage) // 4)
    bos, *others = (getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
    special = {bos, *(i for x in others for i in (x if isinstance(x, list) else [x]))}
    words = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    order = torch.randperm(len(words), generator=generator)
    if len(words) < 3 * quarter:
        order = torch.randint(len(words), (3 * quarter,), generator=generator)
    ids = words[order[: 3 * quarter]]
    ids = torch.cat([ids, ids[quarter : 2 * quarter]])
    if isinstance(bos, int):
        ids[0] = bos
    return ids.unsqueeze(0)


def _nothing(view: LayerView) -> Tensor:
    """A zero for each head, ``[H]``."""
    return torch.zeros(view.keys.shape[1])


def _copying(view: LayerView) -> Tensor:
    """Attention of the last quarter's queries to what they would copy, ``[H]``."""

    def weigh(weights: Tensor, own: Tensor) -> Tensor:
        # The last token of the passage was followed by another one the first time.
        column = (own - view.keys.shape[2] // 2 + 1)[own + 1 < view.keys.shape[2]]
        query = torch.arange(len(column), device=own.device)
        return weights[..., query, column].sum(-1)

    return _averaged(view, weigh, view.keys.shape[2] // 4 - 1)


def _far(n_sink: int, n_recent: int, view: LayerView) -> Tensor:
    """Attention of the last quarter's queries to rows between the sinks and the newest, ``[H]``.

    Both are at most a quarter of the text.
    """
    quarter = view.keys.shape[2] // 4
    n_sink, n_recent = min(n_sink, quarter), min(n_recent, quarter)

    def weigh(weights: Tensor, own: Tensor) -> Tensor:
        row = torch.arange(weights.shape[-1], device=own.device)
        far = (row >= n_sink) & (row <= own[:, None] - n_recent)
        return (weights * far).sum((-2, -1))

    return _averaged(view, weigh, quarter)


def _averaged(view: LayerView, weigh: Callable[[Tensor, Tensor], Tensor], queries: int) -> Tensor:
    """What is weighed of the last quarter's queries, averaged over them and their heads, ``[H]``.

    ``weigh`` gets weights ``[1, H, G, q, t]`` and the rows ``[q]`` of the queries.
    """
    t = view.keys.shape[2]
    own = torch.arange(t - t // 4, t, device=view.keys.device)
    table = (view.last_queries(t // 4), view.keys, view.valid, view.rule)
    total = sum(weigh(weights, own[some]) for some, weights in attention_weights(*table))
    assert isinstance(total, Tensor)
    return total[0].mean(-1) / queries
