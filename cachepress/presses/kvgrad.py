"""KVgrad: what a row does to the last hidden states when the context is repeated."""

from dataclasses import dataclass, replace

from torch import Tensor

from cachepress.presses._reconstructing import _ReplayPress
from cachepress.reconstruction import Reconstruction, ReconstructionView


@dataclass(frozen=True)
class KVgradPress(_ReplayPress, alias="kvgrad"):
    """Keeps the rows that move the model's last hidden states while it repeats its context.

    KVgrad (openreview.net/forum?id=cg1wTCJjjk). As in KVzip the context is repeated chunk by
    chunk; each attention on a row is multiplied by the size of what its value adds to the output,
    and by the size of the gradient of the summed squares of the last hidden states, before the
    final norm, with respect to what attention added at that query. Models are frozen for it.
    Needs the output projection, and one backward pass a chunk: two to four further prefills, and
    the activations of one chunk. Best for contexts that are compressed once, where time is no
    object.

    Attributes:
        layerwise: whether every layer gets the same share, so that only its heads compete.
        n_sink: first rows, which always stay, as do those of the chat template before the context.
        chunk_size: tokens that are repeated in one forward.
    """

    chunk_size: int = 512

    @property
    def _reconstruction(self) -> Reconstruction:
        return replace(super()._reconstruction, weighs=True, gradient=True)

    def weights(self, view: ReconstructionView) -> tuple[Tensor, Tensor]:
        """Sizes of the values, and of the gradients."""
        if view.gradient is None:
            raise TypeError("the context was repeated without gradients")
        return view.value_norms(), view.gradient
