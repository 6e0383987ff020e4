"""Trains what presses need to know of a model, such as query statistics (``cachepress train``)."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data import topics

import torch
from torch import Tensor
from tqdm import tqdm

import cachepress
from cachepress.artefacts.kept import (
    checkpoint_of,
    class_of,
    default_path,
    model_name,
    save_artefact,
)
from cachepress.artefacts.reading import sizes
from cachepress.budgets import Ratio, TopK
from cachepress.errors import CachepressError
from cachepress.files import expanded
from cachepress.fits import budget_curve, fit_gate, fit_linear, fit_mlp
from cachepress.generation.prefill import prefill
from cachepress.hf.types import TRANSFORMERS_VERSION, PreTrainedModel, PreTrainedTokenizerBase
from cachepress.models.chat import encode
from cachepress.press import BasePress, WrapperPress
from cachepress.presses import fastkvzip, kvzap, lukv
from cachepress.presses._observing import _ObservingPress
from cachepress.presses.kvzip import KVzipPress
from cachepress.view import EVERY, LayerView, Needs

Tensors = dict[str, Tensor]
_SINKS = 4
_SHARES = 100
_MOST_ROWS = 1 << 15
"""Rows that a surrogate is fitted to at most, drawn from all that were read."""


@dataclass(frozen=True)
class Training:
    """Training data and settings: a model, texts, and options.

    Attributes:
        model: the model.
        windows: texts ``[1, n]`` of token ids, all of the same length.
        tokenizer: for what has to be asked in words.
        press: the press whose scores are judged, where one is.
        seed: for everything that is drawn.
        steps: steps of gradient descent, where there are any.
        quiet: whether to show no bar.
    """

    model: PreTrainedModel
    windows: Sequence[Tensor]
    tokenizer: PreTrainedTokenizerBase | None = None
    press: BasePress | None = None
    seed: int = 0
    steps: int = 300
    quiet: bool = False

    def read(self, press: BasePress) -> Iterator[None]:
        """Prefill each window of text under a press."""
        with torch.no_grad():
            for ids in tqdm(self.windows, unit="window", disable=self.quiet):
                prefill(self.model, ids, press, tokenizer=self.tokenizer)
                yield


def train(kind: str, training: Training, output: str | None = None) -> Path:
    """Train an artefact for a model, such as query statistics, and write it.

    Args:
        kind: one of ``KINDS``.
        training: what it is learned from.
        output: the file; None for where presses look for it.

    Returns:
        The file.

    Raises:
        CachepressError: if there is no such kind, or the file cannot be written.
    """
    if kind not in KINDS:
        raise CachepressError(f"kind: got {kind!r}, wanted one of {', '.join(KINDS)}")
    path = _target(kind, training.model, output)
    tensors = {name: x.float().cpu() for name, x in KINDS[kind](training).items()}
    made_from = {
        "model": model_name(training.model),
        "model_class": class_of(training.model),
        **checkpoint_of(training.model),
        "tokens": str(sum(ids.shape[1] for ids in training.windows)),
        "cachepress": cachepress.__version__,
        "transformers": TRANSFORMERS_VERSION,
    }
    save_artefact(path, kind, tensors, made_from)
    return path


def _target(kind: str, model: PreTrainedModel, output: str | None) -> Path:
    """Return the file of an artefact, and check first that it can be written."""
    path = default_path(kind, model) if output is None else Path(expanded(output))
    path = path / f"{kind}.safetensors" if path.is_dir() else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CachepressError(f"cannot write {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise CachepressError(f"cannot write {path}: the folder does not allow it")
    return path


def windows_of(
    tokenizer: PreTrainedTokenizerBase, text: str | None, tokens: int, length: int, seed: int
) -> list[Tensor]:
    """Cut a text into windows of token ids ``[1, n]``, shuffled by the seed.

    Where the tokenizer begins a text with a special token, every piece begins with it.

    Args:
        tokenizer: the model's tokenizer.
        text: the text; None for the built-in prose.
        tokens: of all pieces together, at most.
        length: of a piece.
        seed: which pieces, and in which order.

    Raises:
        CachepressError: if the text is shorter than one piece.
    """
    if text is None:
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids, begin = encode(tokenizer, text, special=False)[0], encode(tokenizer, "", special=True)
    begin = begin[:, :1] if begin[:, :1].tolist() == [[tokenizer.bos_token_id]] else begin[:, :0]
    pieces = ids[: len(ids) // length * length].view(-1, 1, length)
    if not len(pieces) or tokens < length:
        raise CachepressError(
            f"the text has {len(ids)} tokens, of which {tokens} are read: wanted at least one "
            f"window of {length}: give a longer text, more --tokens or a smaller --window"
        )
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [torch.cat([begin, pieces[i]], dim=1) for i in order[: tokens // length].tolist()]


def _query_stats(training: Training) -> Tensors:
    """Compute mean and covariance of each head's queries before RoPE, sinks left out."""
    if (length := training.windows[0].shape[1]) <= _SINKS:
        raise CachepressError(f"window: got {length}, wanted more than the {_SINKS} sinks")
    layers, h, g, d, _ = sizes(training.model)
    mean, square = torch.zeros(layers, h, g, d), torch.zeros(layers, h, g, d, d)

    def observe(view: LayerView) -> None:
        assert view.moments is not None
        own, spread = (x[0].cpu() for x in (view.moments.mean, view.moments.covariance))
        mean[view.depth] += own
        square[view.depth] += spread + own.unsqueeze(-1) * own.unsqueeze(-2)

    n = sum(1 for _ in training.read(_ObservingPress(Needs(moments_after=_SINKS), observe)))
    mean, square = mean / n, square / n
    return {"mean": mean, "covariance": square - mean.unsqueeze(-1) * mean.unsqueeze(-2)}


def _q_filters(training: Training) -> Tensors:
    """Compute the first right singular vector of each head's queries, averaged by group."""
    layers, h, g, d, _ = sizes(training.model)
    mean, square = torch.zeros(layers, h, g, d), torch.zeros(layers, h, g, d, d)

    def observe(view: LayerView) -> None:
        queries = view.last_queries(EVERY).float()[0].cpu()  # [H, G, Q, D]
        mean[view.depth] += queries.sum(-2)
        square[view.depth] += queries.mT @ queries

    for _ in training.read(_ObservingPress(Needs(queries=EVERY), observe)):
        pass
    first = torch.linalg.eigh(square).eigenvectors[..., -1]
    sign = (first * mean).sum(-1, keepdim=True).sign()
    return {"filters": (first * torch.where(sign == 0, 1.0, sign)).mean(2)}


@dataclass(frozen=True, repr=False)
class _LabelPress(KVzipPress):
    """KVzip press that collects hidden states and scores, to train surrogates on.

    Attributes:
        hidden: hidden states ``[n, M]`` of the window, by depth.
        scores: scores ``[n, H]``, by depth.
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """What KVzip needs, and the hidden states."""
        return super().needs | Needs(hidden=self._observe_hidden)

    def score(self, view: LayerView) -> Tensor:
        """Collect and return the scores of the reconstruction, ``[B, H, T]``."""
        self.scores[view.depth] = self.token_state(view)[0].mT.float().cpu()
        return super().score(view)

    def _observe_hidden(self, hidden: Tensor, depth: int) -> Tensor:
        self.hidden[depth] = hidden[0].float().cpu()
        # What the reconstruction collects takes the place of this.
        return hidden.new_zeros(1, 1, hidden.shape[1])


def _labelled(training: Training, plus: bool) -> list[tuple[Tensor, Tensor]]:
    """Collect hidden states ``[N, M]`` and KVzip scores ``[N, H]`` of sampled tokens, by layer."""
    length = training.windows[0].shape[1]
    most = max(1, _MOST_ROWS // len(training.windows))
    generator = torch.Generator().manual_seed(training.seed)
    rows: list[tuple[list[Tensor], list[Tensor]]] = [
        ([], []) for _ in range(sizes(training.model)[0])
    ]
    press = _LabelPress(0.01, layerwise=True, kvzip_plus_normalization=plus)
    for _ in training.read(press):
        some = torch.randperm(length, generator=generator)[:most]
        for depth, (hidden, scores) in enumerate(rows):
            hidden.append(press.hidden[depth][some])
            scores.append(press.scores[depth][some])
        press.hidden.clear()
        press.scores.clear()
    return [(torch.cat(hidden), torch.cat(scores)) for hidden, scores in rows]


def _kvzap(training: Training, model_type: str) -> Tensors:
    """Train the KVzap surrogate of every layer on the logarithms of KVzip+ scores."""
    learned: Tensors = {}
    for i, (hidden, scores) in enumerate(_labelled(training, plus=True)):
        targets = scores.clamp(min=1e-12).log()
        if model_type == "linear":
            found = fit_linear(hidden, targets)
        else:
            found = fit_mlp(hidden, targets, training.steps, training.seed)
        learned |= {f"layers.{i}.{name}": x for name, x in found.items()}
    return learned


def _fastkvzip(training: Training) -> Tensors:
    """Train the Fast KVzip gate of every layer on KVzip scores."""
    groups = sizes(training.model)[2]
    gates = [
        fit_gate(hidden, scores.clamp(0, 1), groups, training.steps, training.seed)
        for hidden, scores in _labelled(training, plus=False)
    ]
    return {name: torch.stack([gate[name] for gate in gates]) for name in gates[0]}


@dataclass(frozen=True, repr=False)
class _ScoredPress(WrapperPress):
    """Wrapper that keeps every pair, and collects the scores of the inner press.

    Attributes:
        scores: scores ``[H, T]``, by depth.
    """

    scores: dict[int, Tensor] = field(default_factory=dict)

    @property
    def budget(self) -> TopK:
        """All pairs."""
        return TopK(Ratio(0.0))

    @property
    def needs(self) -> Needs:
        """What the inner press needs, in every layer although no pair is evicted."""
        return replace(self.press.needs, rewrites=True)

    def score(self, view: LayerView) -> Tensor:
        """Collect and return the inner scores, ``[B, H, T]``."""
        scores = self.press.score(view)
        self.scores[view.depth] = scores[0].float().cpu()
        return scores


def _lukv(training: Training) -> Tensors:
    """Compute how much each head should keep at each ratio, for the scores of a press (LU-KV).

    Each window is read in two parts. What a token is worth is the attention that it receives from
    the second part; the scores of the press for the tokens of the first one say in which order they
    would go. The best shares of the tokens are given to the heads that gain most by them.
    """
    if training.press is None:
        raise CachepressError("lukv learns for the scores of a press: give --press")
    press = training.press
    with suppress(CachepressError):
        # Presses that reconstruct the context do so only where pairs are to be evicted.
        press = press.with_ratio(0.01)
    press = press.for_model(training.model)
    layers, h = sizes(training.model)[:2]
    gains = torch.zeros(layers, h, _SHARES)

    def observe(view: LayerView) -> None:
        assert view.attention_sums is not None
        received = view.attention_sums[0].mean(1).float().cpu()
        order = scored.scores[view.depth].argsort(dim=-1, descending=True, stable=True)
        worth = received[:, : order.shape[-1]].gather(-1, order)
        share = torch.arange(order.shape[-1]) * _SHARES // order.shape[-1]
        gains[view.depth].index_add_(1, share, worth)

    scored, observing = _ScoredPress(press), _ObservingPress(Needs(attention_sums=True), observe)
    with torch.no_grad():
        for ids in tqdm(training.windows, unit="window", disable=training.quiet):
            n = ids.shape[1] * 3 // 4
            cache = prefill(training.model, ids[:, :n], scored, tokenizer=training.tokenizer)
            prefill(training.model, ids[:, n:], observing, cache)
    return {"lukv": budget_curve(gains)}


KINDS: dict[str, Callable[[Training], Tensors]] = {
    "query_stats": _query_stats,
    "q_filters": _q_filters,
    **{f"kvzap_{t}": (lambda training, t=t: _kvzap(training, t)) for t in kvzap.TYPES},
    fastkvzip.KIND: _fastkvzip,
    lukv.KIND: _lukv,
}
"""What can be learned of a model, by the name that its press knows it by."""
