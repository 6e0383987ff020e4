"""DuoAttention: retrieval heads keep the whole text, streaming heads sinks and newest tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cachepress.budgets import CHOSEN, Ratio, Threshold, TopK, check_fraction
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.hf.types import PreTrainedModel
from cachepress.ops import on_device
from cachepress.press import BasePress
from cachepress.presses._heads import (
    Scores,
    checked,
    far_scores,
    fitted,
    pattern_file,
    read_scores,
)
from cachepress.ranks import choose
from cachepress.structured import parse_json
from cachepress.view import LayerView

_SIZES = {"sink_size": 128, "recent_size": 256}
_LEAST = -1.0
"""Trained scores are meant to be from 0 to 1, and end a little below 0 where a head streams."""


@dataclass(frozen=True)
class DuoAttentionPress(BasePress, alias="duo_attention"):
    """Keeps every token in retrieval heads, and the first and newest tokens in streaming heads.

    Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming
    Heads" (arXiv:2410.10819). The KV heads with the lowest scores in the whole model stream. The
    authors train the scores and publish them for some models: give the file as ``pattern``. Without
    one they are estimated when the press first meets a model, from one random text in which a
    passage is repeated: the attention that a head pays there to tokens outside of its sinks and
    newest tokens, averaged over the query heads of a KV head. Of equal scores, heads of the first
    layers stream. How many tokens stay depends on the length of the text. Needs nothing but
    positions.
    Best for long contexts under a published pattern.

    Attributes:
        head_compression_ratio: fraction of the KV heads that stream, rounded down. This is the
            ratio that ``with_ratio`` sets.
        pattern: a score for each KV head of each full-attention layer, or the path of a
            ``full_attention_heads.tsv`` or its folder, where what is below 0 counts as 0; None to
            estimate them.
        sink_size: first tokens that a streaming head keeps; None for what the ``config.json``
            beside the pattern says, or 128.
        recent_size: newest tokens that a streaming head keeps; None likewise, or 256.
        on_the_fly_scoring: False to ask for a pattern where none is given instead of estimating it.
    """

    head_compression_ratio: float = 0.0
    pattern: str | Scores | None = None
    sink_size: int | None = None
    recent_size: int | None = None
    on_the_fly_scoring: bool | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_fraction(self.head_compression_ratio, "head_compression_ratio")
        for name, least in (("sink_size", 0), ("recent_size", 1)):
            if getattr(self, name) is not None:
                check_count(self, name, least)
        if self.pattern is not None and not isinstance(self.pattern, str):
            object.__setattr__(self, "pattern", checked(self.pattern, "pattern", _LEAST))

    @property
    def budget(self) -> TopK | Threshold:
        """The pairs that the score chooses."""
        return CHOSEN if self.head_compression_ratio else TopK(Ratio(0.0))

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by index, those kept above all others, ``[B, H, T]``."""
        sink, recent = self.sink_size, self.recent_size
        if not isinstance(self.pattern, tuple) or sink is None or recent is None:
            raise TypeError("the press was not made ready for the model")
        streaming = _streaming(self.pattern, self.head_compression_ratio)[view.depth]
        whole = ~on_device(torch.tensor(streaming), view.valid.device)[:, None]  # [H, 1]
        newest = view.index >= view.n_seen[:, None, None] - recent
        return choose(view.index.float(), view.valid & (whole | newest | (view.index < sink)))

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the file of the scores, if they are in one, and its kind."""
        return {"pattern": "pattern"} if isinstance(self.pattern, str) else {}

    def files(self, model: str) -> Mapping[str, Sequence[Path]]:
        """The file of the scores, and the sizes beside it."""
        if not isinstance(self.pattern, str):
            return {}
        path = pattern_file(self.pattern)
        beside = path.with_name("config.json")
        return {"pattern": [path, beside] if beside.is_file() else [path]}

    def for_model(self, model: PreTrainedModel) -> Self:
        """Find the scores of a model's heads, and how many tokens its streaming heads keep."""
        sizes = dict(_SIZES)
        if isinstance(self.pattern, str):
            sizes |= _published_sizes(self.pattern)
        sizes |= {k: getattr(self, k) for k in sizes if getattr(self, k) is not None}
        pattern = self.pattern
        if isinstance(pattern, str):
            pattern = read_scores(pattern, "pattern", _LEAST)
        if pattern is not None:
            pattern = fitted(pattern, model, "pattern")
        elif self.head_compression_ratio and self.on_the_fly_scoring is False:
            raise CachepressError(
                "DuoAttentionPress has no pattern, and on_the_fly_scoring=False: give one as "
                "pattern, such as a folder of attn_patterns in the repository of its authors "
                "(mit-han-lab/duo-attention), or on_the_fly_scoring=True"
            )
        elif self.head_compression_ratio:
            pattern = far_scores(model, sizes["sink_size"], sizes["recent_size"])
        return replace(self, pattern=pattern, **sizes)

    def with_ratio(self, ratio: float) -> Self:
        """Return the press at another fraction of streaming heads."""
        return replace(self, head_compression_ratio=ratio)


def _streaming(scores: Scores, ratio: float) -> list[list[bool]]:
    """Find the heads that stream, by layer."""
    heads = [(score, depth, h) for depth, own in enumerate(scores) for h, score in enumerate(own)]
    lowest = set(sorted(heads)[: floor(len(heads) * Fraction(str(ratio)))])
    return [
        [(score, depth, h) in lowest for h, score in enumerate(own)]
        for depth, own in enumerate(scores)
    ]


def _published_sizes(path: str) -> dict[str, int]:
    """Read the sizes in the ``config.json`` beside a pattern, if there is one."""
    file = pattern_file(path).with_name("config.json")
    try:
        config = parse_json(file.read_text())
        sizes = {name: config[name] for name in _SIZES if name in config}  # type: ignore
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CachepressError(f"pattern: {file} cannot be read: {error}") from error
    if not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise CachepressError(f"pattern: {file} has {sizes}, wanted numbers of tokens")
    return sizes
