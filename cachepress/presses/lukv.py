"""LU-KV: learned budgets for the heads of the whole model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from cachepress.artefacts.kept import find_artefact
from cachepress.artefacts.reading import check_shapes, fitted_layers, load_artefact, sizes
from cachepress.budgets import PerLayer, Pyramid, TopK, apportion
from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.hf.types import PreTrainedModel
from cachepress.press import BasePress, WrapperPress
from cachepress.presses._checks import check_by_layer, counted, fill
from cachepress.presses.expected_attention import ExpectedAttentionPress
from cachepress.ranks import pin_sinks, pin_window
from cachepress.view import LayerView

KIND = "lukv"


@dataclass(frozen=True)
class _Shares(TopK):
    """Pairs by head, in proportion to a curve, the same in total.

    Attributes:
        curve: the file of the curve.
        layers: which of its layers; None for all.
    """

    curve: str = ""
    layers: tuple[int, ...] | None = None

    def count(self, view: LayerView) -> Tensor:
        """Pairs of each head, ``[B, H]``."""
        average = TopK(self.amount, scope="model").count(view)
        curve = load_artefact(self.curve, KIND, layers=self.layers)[KIND]
        sizes = zip(average.tolist(), view.n_seen.tolist(), strict=True)
        counts = [_counts(curve, int(n), int(seen))[view.depth] for n, seen in sizes]
        return torch.stack(counts).to(view.n_seen.device)


@dataclass(frozen=True)
class LUKVPress(WrapperPress, alias="lukv"):
    """Gives each head of the model its own budget, learned beforehand for the scores of a press.

    LU-KV, "Predicting Future Utility: Global Combinatorial Optimization for Task-Agnostic KV Cache
    Eviction" (arXiv:2602.08585). A curve says which fraction of its pairs a head keeps at each
    ratio, so that what is kept in the whole model receives the most attention from the text that
    follows; it is learned beforehand, ``cachepress train lukv --press PRESS``, or read from a
    published ``.npy`` file ``[99, layers, KV heads]``, whose numbers are the fractions that are
    evicted. Between two ratios fractions are interpolated; the total is exactly that of equal
    numbers, and no head has less than one pair. Needs what the inner press needs. Best for the
    press that its curve was learned for.

    Attributes:
        press: the press that scores; None for that of the published curve, expected attention with
            epsilon 0.02.
        sink: first tokens, which always stay.
        window: newest tokens, which always stay.
        curve: the file, its folder or a hub repository; None for the one trained on this machine.
        layers: which layers of the file are the model's full-attention layers; None to find out.
    """

    sink: int = 4
    window: int = 1
    curve: str | None = field(default=None, kw_only=True)
    layers: tuple[int, ...] | None = field(default=None, kw_only=True)

    def __init__(
        self,
        press: BasePress | None = None,
        sink: int = 4,
        window: int = 1,
        *,
        curve: str | None = None,
        layers: tuple[int, ...] | None = None,
        compression_ratio: float | None = None,
    ) -> None:
        """Take ``compression_ratio``, too, which sets the ratio of ``press``."""
        press = ExpectedAttentionPress(epsilon=0.02) if press is None else self._inner(press)
        if compression_ratio is not None:
            press = press.with_ratio(compression_ratio)
        values = {"press": press, "sink": sink, "window": window, "curve": curve, "layers": layers}
        fill(self, values)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "sink", least=0)
        check_count(self, "window", least=0)
        check_by_layer(self)
        if isinstance(counted(self).amount, PerLayer | Pyramid):
            raise CachepressError(
                f"LUKVPress shares out the pairs of the whole model, and {self.press!r} shares "
                "them in another way already: give it the press that scores"
            )

    @property
    def budget(self) -> TopK:
        """The inner amount, shared out by the curve."""
        inner = counted(self)
        if self.curve is None:
            return inner
        return _Shares(inner.amount, curve=self.curve, layers=self.layers)

    @property
    def learned(self) -> Mapping[str, str]:
        """The option that names the trained file, and the kind of file."""
        return {"curve": KIND}

    def for_model(self, model: PreTrainedModel) -> "LUKVPress":
        """Find the curve for a model, check that it fits, and make the inner press ready."""
        path = find_artefact(KIND, self.curve, model)
        layers, (n, h, *_) = fitted_layers(path, KIND, model), sizes(model)
        check_shapes(load_artefact(path, KIND, layers=layers), {KIND: (99, n, h)}, path)
        return replace(self, press=self.press.for_model(model), curve=path, layers=layers)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by the inner press, sinks and newest tokens above all, ``[B, H, T]``."""
        scores = pin_window(self.press.score(view), view, self.window)
        return pin_sinks(scores, view, self.sink)


@lru_cache(maxsize=1024)
def _counts(curve: Tensor, n: int, seen: int) -> Tensor:
    """Count the pairs of each head of each layer, ``[L, H]``, ``n`` on average.

    Curves are told apart as objects: a file that is written anew is another one.
    """
    curve = curve.double()
    whole, nothing = torch.ones_like(curve[:1]), torch.zeros_like(curve[:1])
    curve = torch.cat([whole, curve, nothing])  # Ratios 0 to 1.
    percent = 100 * (1 - n / max(seen, 1))
    below = min(int(percent), 99)
    shares = torch.lerp(curve[below], curve[below + 1], percent - below)
    least = 1 if seen else 0
    return apportion(shares.flatten(), n * shares.numel(), least, seen).view_as(shares)
