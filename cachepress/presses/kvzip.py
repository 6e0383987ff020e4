"""KVzip: what the model reads when it repeats its context."""

from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.ops import wide
from cachepress.presses._reconstructing import _ReplayPress
from cachepress.reconstruction import Reconstruction, ReconstructionView


@dataclass(frozen=True)
class KVzipPress(_ReplayPress, alias="kvzip"):
    """Keeps the rows that the model reads to repeat the whole context, chunk by chunk.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    (arXiv:2505.23416). When the prompt is read, each chunk of it is fed once more after a request
    to repeat it; a row's score is the most attention that any of those queries gives it, among the
    chunk, the sinks and the replay itself. As in the paper, what the chat template puts before the
    context (with its system prompt) is not repeated and never dropped; it stands for the sinks.
    KVzip+ (Jegou and Jeblick, arXiv:2601.07891) weighs
    each attention by the size of what the value adds to the output over that of the query's hidden
    state, here the one that attention reads. Heads and layers compete, each with its own number of
    rows. Costs one to two further prefills. Rows of an earlier turn keep their scores. Best for
    contexts that are compressed once and asked many things.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first rows, which always stay, as do those of the chat template before the context.
        chunk_size: tokens that are repeated in one forward.
        kvzip_plus_normalization: whether attentions are weighed; needs the output projection.
    """

    kvzip_plus_normalization: bool = False

    @property
    def _reconstruction(self) -> Reconstruction:
        return replace(super()._reconstruction, weighs=self.kvzip_plus_normalization)

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Sizes of the values, and one over those of the hidden states, for KVzip+."""
        if not self.kvzip_plus_normalization or view.hidden is None:
            return super().weights(view)
        return view.value_norms(), 1 / wide(view.hidden).norm(dim=-1).clamp(min=1e-9)
