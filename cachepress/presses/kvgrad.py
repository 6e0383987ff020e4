"""KVgrad: effect of a token on the last hidden states in context reconstruction."""

from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.presses._reconstructing import _ReconstructionPress
from cachepress.reconstruction import Reconstruction, ReconstructionView


@dataclass(frozen=True)
class KVgradPress(_ReconstructionPress, alias="kvgrad"):
    """Keeps the tokens that change the last hidden states most while the model repeats its context.

    KVgrad (openreview.net/forum?id=cg1wTCJjjk). As in KVzip the context is repeated chunk by chunk;
    each attention on a token is multiplied by the norm of what its value adds to the output, and by
    the norm of the gradient of the summed squares of the last hidden states, before the final norm,
    with respect to what attention added at that query. Models are frozen for it. Needs the output
    projection, and one backward pass a chunk: two to four further prefills, and the activations of
    one chunk. Best for contexts that are compressed once, where time is no object.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first tokens, which always stay, as do those of the chat template before the
            context.
        chunk_size: tokens that are repeated in one forward.
    """

    chunk_size: int = 512

    @property
    def _reconstruction(self) -> Reconstruction:
        return replace(super()._reconstruction, weighs=True, gradient=True)

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Norms of the values' outputs, and of the gradients."""
        if view.gradient is None:
            raise TypeError("the context was repeated without gradients")
        return view.value_norms(), view.gradient
