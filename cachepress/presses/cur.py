"""CurDKV: leverage of keys and values in a CUR decomposition of the cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cachepress.checks import check_count
from cachepress.errors import CachepressError
from cachepress.ops import by_token, norms, wide
from cachepress.press import ScorerPress
from cachepress.presses.leverage import gaussian
from cachepress.ranks import pin_sinks
from cachepress.view import LayerView

_TYPES = ("key", "value", "kv_avg", "kv_product")
_RANDOM_SIZE = 20


@dataclass(frozen=True)
class CURPress(ScorerPress, alias="cur"):
    """Keeps the tokens whose keys and values have the highest leverage, estimated by squared norms.

    Sengupta et al., "Value-Guided KV Compression for LLMs via Approximated CUR Decomposition"
    (CurDKV, arXiv:2509.15038). Needs nothing but keys and values.

    Chosen where the paper says nothing: windows are counted from the start of the text, a window
    that is not full (the last one, or one that was compressed before) is measured by the tokens
    that it holds, and the random projections, one for keys and one for values, are drawn anew for
    each layer and head and are the same in every run.
    Best for one cheap pass over texts whose values differ much in size.

    Attributes:
        num_sinks: first tokens, which always stay.
        leverage_type: "key", "value", their mean "kv_avg" or their product "kv_product".
        use_random_leverage: whether norms are those of a Gaussian projection to 20 channels.
        use_local_approximation: whether a token is measured by its share of a window of the text.
        local_window_size: tokens of a window.
    """

    num_sinks: int = 4
    leverage_type: str = "kv_product"
    use_random_leverage: bool = False
    use_local_approximation: bool = True
    local_window_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "num_sinks", least=0)
        check_count(self, "local_window_size")
        if self.leverage_type not in _TYPES:
            raise CachepressError(
                f"leverage_type: got {self.leverage_type!r}, wanted one of {', '.join(_TYPES)}"
            )
        for name in ("use_random_leverage", "use_local_approximation"):
            if not isinstance(getattr(self, name), bool):
                raise CachepressError(f"{name}: got {getattr(self, name)!r}, wanted True or False")

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by their share in the leverage of their head, ``[B, H, T]``."""
        key, value = self._leverage(view, view.keys, 0), self._leverage(view, view.values, 1)
        if self.leverage_type == "kv_avg":
            scores = (key + value) / 2
        elif self.leverage_type == "kv_product":
            scores = key * value
        else:
            scores = key if self.leverage_type == "key" else value
        return pin_sinks(_shares(scores, torch.zeros_like(view.index)), view, self.num_sinks)

    def _leverage(self, view: LayerView, x: Tensor, seed: int) -> Tensor:
        """Squared norms of ``x [B, H, T, D]``, or their shares in their window, ``[B, H, T]``."""
        if self.use_random_leverage:
            matrix = gaussian(view, x.shape[-1], _RANDOM_SIZE, seed)
            size = by_token(lambda part: (wide(part) @ matrix).square().sum(-1), x)
        else:
            size = norms(x).square()
        size = size.masked_fill(~view.valid, 0)
        if not self.use_local_approximation:
            return size
        return _shares(size, view.index.clamp(min=0) // self.local_window_size)


def _shares(x: Tensor, group: Tensor) -> Tensor:
    """Divide ``x [B, H, T]`` by its sum in each of the groups ``[B, H, T]`` of a head.

    In doubles, so that the result does not depend on the order of the sum. Tokens of a group stand
    together: counted along the text, groups are no more than tokens, however long the text was.
    """
    size = x.double()
    group = (group.diff(dim=-1, prepend=group[..., :1]) != 0).cumsum(-1)
    sums = torch.zeros_like(size).scatter_add(-1, group, size)
    return (size / sums.gather(-1, group).clamp(min=torch.finfo(torch.float32).tiny)).to(x.dtype)
