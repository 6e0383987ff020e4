"""Scores of retrieval heads, which attend far back: measured on the model, or read from a file."""

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

from cachepress.errors import CachepressError
from cachepress.files import expanded
from cachepress.hf import check_model
from cachepress.hf.types import PreTrainedModel
from cachepress.hf.wiring import full_attention, text_decoder
from cachepress.ops.attention import attention_weights
from cachepress.presses._observing import _ObservingPress
from cachepress.view import EVERY, LayerView, Needs

Scores = tuple[tuple[float, ...], ...]
"""A number for each KV head of each layer that is compressed."""

PATTERN = "full_attention_heads.tsv"
_PASSAGE = 256
_MOST = 1e30
_FOUND: WeakKeyDictionary[nn.Module, dict[tuple[object, ...], Scores]] = WeakKeyDictionary()


def copying_scores(model: PreTrainedModel) -> Scores:
    """Measure how much each head attends to the token to copy next when a passage is repeated.

    The attention that a query in the second copy pays to the token after its own in the first copy,
    averaged over the queries and over the query heads of a KV head. Measured once for a model.
    """
    return _found(model, ("copying",), _PASSAGE, _copying)


def far_scores(model: PreTrainedModel, n_sink: int, n_recent: int) -> Scores:
    """Measure how much each head attends to tokens that are neither the first nor the newest.

    The attention that the queries in the second copy of a passage pay to tokens outside of the
    first ``n_sink`` and the newest ``n_recent``, averaged like that of ``copying_scores``.
    """
    passage = max(_PASSAGE, n_sink, n_recent)
    return _found(model, ("far", n_sink, n_recent), passage, partial(_far, n_sink, n_recent))


def read_scores(path: str, name: str, least: float = 0.0) -> Scores:
    """Read scores from a file: a list for each layer, with a number for each of its heads.

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
        scores = _parsed(pattern_file(path).read_bytes())
    except OSError as error:
        raise CachepressError(
            f"{name}: got {path!r}, wanted a file like {PATTERN} or its folder: {error.strerror}"
        ) from error
    except (ValueError, TypeError, OverflowError, EOFError, RecursionError, MemoryError) as error:
        raise CachepressError(
            f"{name}: {path!r} is no table of numbers: wanted a line for each layer, with a number "
            f"for each KV head and tabs between them ({' '.join(str(error).split())[:200]})"
        ) from error
    return checked(scores, name, least)


def _parsed(data: bytes) -> object:
    """Parse a file of any supported layout into a list for each layer, not checked yet."""
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False).tolist()
    text = data.decode("utf-8-sig")
    if text.lstrip()[:1] in ("[", "{"):
        found = json.loads(text)
        return _by_name(found) if isinstance(found, dict) else found
    return [[float(x) for x in line.split("\t")] for line in text.splitlines() if line.strip()]


def _by_name(found: dict[str, object]) -> list[list[float]]:
    """Sort scores named "layer-head" by layer; of several samples of a head, their mean."""
    layers: dict[int, dict[int, float]] = {}
    for name, value in found.items():
        match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", name)
        samples = value if isinstance(value, list) else [value]
        numbers = [float(x) for x in samples if isinstance(x, int | float)]
        if match is None or not numbers or len(numbers) < len(samples):
            raise ValueError(f"{name!r} is no layer-head with a number")
        layer, head = int(match[1]), int(match[2])
        layers.setdefault(layer, {})[head] = sum(numbers) / len(numbers)
    if sorted(layers) != list(range(len(layers))) or any(
        sorted(heads) != list(range(len(heads))) for heads in layers.values()
    ):
        raise ValueError("some layers or heads are missing")
    return [[x for _, x in sorted(heads.items())] for _, heads in sorted(layers.items())]


def pattern_file(path: str) -> Path:
    """Return the file of a pattern that is named by its file or its folder."""
    found = Path(expanded(path))
    return found / PATTERN if found.is_dir() else found


def checked(scores: object, name: str, least: float = 0.0) -> Scores:
    """Check scores, and return them as tuples.

    Args:
        scores: what the user gave.
        name: what the user calls it.
        least: the lowest number that is taken; what is below 0 counts as 0.

    Raises:
        CachepressError: unless they are finite numbers for each head of each layer, none below
            ``least``.
    """
    given = scores if isinstance(scores, list | tuple) else ()
    layers = tuple(tuple(heads) if isinstance(heads, list | tuple) else () for heads in given)
    numbers = [x for heads in layers for x in heads]
    good = all(isinstance(x, int | float) and least <= x <= _MOST for x in numbers)
    if not good or not all(layers) or not layers:
        raise CachepressError(
            f"{name}: wanted a number of at least {least:g} for each KV head of each layer, "
            "such as ((0.1, 0.9), (0.5, 0.0)), or the path of a file"
        )
    return tuple(tuple(max(x, 0.0) for x in heads) for heads in layers)


def fitted(scores: Scores, model: PreTrainedModel, name: str, by_query: bool = False) -> Scores:
    """Fit scores to the KV heads of the full-attention layers of a model.

    Args:
        scores: for these layers, or for all layers of the model.
        model: the model.
        name: what the user calls them.
        by_query: whether they may be those of query heads, which are then averaged.

    Raises:
        CachepressError: unless there is a score for each head of each layer.
    """
    wanted = [len(heads) for heads in _found(model, ("heads",), 1, _nothing)]
    config = text_decoder(model).config
    full, queries = full_attention(config), config.num_attention_heads
    if len(scores) == len(full):
        scores = tuple(heads for heads, is_full in zip(scores, full, strict=True) if is_full)
    got = [len(heads) for heads in scores]
    if by_query and got == [queries] * len(wanted) != wanted:
        scores = tuple(_by_kv_head(heads, n) for heads, n in zip(scores, wanted, strict=True))
        got = wanted
    if got != wanted:
        raise CachepressError(
            f"{name}: got scores of {_size(got)}, and {type(model).__name__} has {_size(wanted)} "
            "with full attention"
        )
    return scores


def _by_kv_head(scores: tuple[float, ...], n: int) -> tuple[float, ...]:
    """Average the scores of query heads over the group of each of ``n`` KV heads."""
    size = len(scores) // n
    return tuple(sum(scores[i * size : (i + 1) * size]) / size for i in range(n))


def _size(heads: list[int]) -> str:
    each = f"{heads[0]}" if len(set(heads)) == 1 else f"{min(heads)} to {max(heads)}"
    return f"{len(heads)} layers of {each} KV heads"


def _found(
    model: PreTrainedModel,
    key: tuple[object, ...],
    passage: int,
    measure: Callable[[LayerView], Tensor],
) -> Scores:
    """Measure a model on a text with a repeated passage; remembered while the model lives."""
    check_model(model)
    decoder = text_decoder(model)
    measured = _FOUND.setdefault(decoder, {})
    if key not in measured:
        found: dict[int, list[float]] = {}

        def observe(view: LayerView) -> None:
            found[view.depth] = measure(view).tolist()

        with torch.no_grad(), _ObservingPress(Needs(queries=EVERY), observe)(model):
            decoder(input_ids=_text(decoder, passage).to(model.device), use_cache=True)
        measured[key] = tuple(tuple(found[depth]) for depth in sorted(found))
    return measured[key]


def _text(decoder: PreTrainedModel, passage: int) -> Tensor:
    """Draw random tokens ``[1, T]`` in four quarters, of which the last repeats the second.

    A quarter has ``passage`` tokens, fewer in a model whose context is shorter. The tokens are the
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
    """Return zero for each head, ``[H]``: only their number is wanted."""
    return torch.zeros(view.keys.shape[1])


def _copying(view: LayerView) -> Tensor:
    """Average the last quarter's attention to the token to copy next, ``[H]``."""

    def weigh(weights: Tensor, own: Tensor) -> Tensor:
        # The last token of the passage was followed by another one the first time.
        column = (own - view.keys.shape[2] // 2 + 1)[own + 1 < view.keys.shape[2]]
        query = torch.arange(len(column), device=own.device)
        return weights[..., query, column].sum(-1)

    return _averaged(view, weigh, view.keys.shape[2] // 4 - 1)


def _far(n_sink: int, n_recent: int, view: LayerView) -> Tensor:
    """Average the last quarter's attention to tokens between sinks and newest, ``[H]``.

    Both are at most a quarter of the text.
    """
    quarter = view.keys.shape[2] // 4
    n_sink, n_recent = min(n_sink, quarter), min(n_recent, quarter)

    def weigh(weights: Tensor, own: Tensor) -> Tensor:
        key = torch.arange(weights.shape[-1], device=own.device)
        far = (key >= n_sink) & (key <= own[:, None] - n_recent)
        return (weights * far).sum((-2, -1))

    return _averaged(view, weigh, quarter)


def _averaged(view: LayerView, weigh: Callable[[Tensor, Tensor], Tensor], queries: int) -> Tensor:
    """Average ``weigh`` of the last quarter's attention over queries and query heads, ``[H]``.

    ``weigh`` gets weights ``[1, H, G, q, t]`` and the queries' own places ``[q]`` among the keys.
    """
    t = view.keys.shape[2]
    own = torch.arange(t - t // 4, t, device=view.keys.device)
    inputs = (view.last_queries(t // 4), view.keys, view.valid, view.rule)
    total = sum(weigh(weights, own[some]) for some, weights in attention_weights(*inputs))
    assert isinstance(total, Tensor)
    return total[0].mean(-1) / queries
