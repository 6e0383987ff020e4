"""StreamingLLM: attention sinks and the newest tokens."""

from dataclasses import dataclass

from torch import Tensor

from cachepress.checks import check_count
from cachepress.press import ScorerPress
from cachepress.ranks import pin_sinks
from cachepress.view import LayerView


@dataclass(frozen=True)
class StreamingLLMPress(ScorerPress, alias="streaming_llm"):
    """Keeps the first tokens of the text, the attention sinks, and the newest ones.

    Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv:2309.17453).
    Needs nothing but positions. Best for endless streams of which only the end matters.

    Attributes:
        n_sink: tokens at the beginning that always stay.
    """

    n_sink: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "n_sink", least=0)

    def score(self, view: LayerView) -> Tensor:
        """Score pairs by index, sinks above all, ``[B, H, T]``."""
        return pin_sinks(view.index.float(), view, self.n_sink)
