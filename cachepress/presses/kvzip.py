"""KVzip: tokens that the model attends to in context reconstruction."""

from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.ops import wide
from cachepress.presses._reconstructing import _ReconstructionPress
from cachepress.reconstruction import Reconstruction, ReconstructionView


@dataclass(frozen=True)
class KVzipPress(_ReconstructionPress, alias="kvzip"):
    """Keeps the tokens that the model attends to while it repeats its whole context.

    Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    (arXiv:2505.23416). After the prompt, each chunk of it is fed once more behind a request to
    repeat it; a token's score is the most attention that any of those queries pays it, among the
    chunk, the sinks and the repetition itself. As in the paper, what the chat template puts before
    the context (with its system prompt) is not repeated and never evicted; it stands for the sinks.
    KVzip+ (Jegou and Jeblick, arXiv:2601.07891) weighs each attention by the norm of what the value
    adds to the output over that of the query's hidden state, here the one that attention reads.
    Heads and layers compete, each with its own number of pairs. Costs one to two further prefills.
    Tokens of an earlier prompt keep their scores. Best for contexts that are compressed once and
    asked many things.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first tokens, which always stay, as do those of the chat template before the
            context.
        chunk_size: tokens that are repeated in one forward.
        kvzip_plus_normalization: whether attentions are weighted; needs the output projection.
    """

    kvzip_plus_normalization: bool = False

    @property
    def _reconstruction(self) -> Reconstruction:
        return replace(super()._reconstruction, weighs=self.kvzip_plus_normalization)

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Norms of the values' outputs, and one over those of the hidden states, for KVzip+."""
        if not self.kvzip_plus_normalization or view.hidden is None:
            return super().weights(view)
        return view.value_norms(), 1 / wide(view.hidden).norm(dim=-1).clamp(min=1e-9)
