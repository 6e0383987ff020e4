"""What an operation takes of memory, found as it is dispatched, on any device."""

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Records the largest new piece of memory, and the most of it that lived at one time.

    Memory that was there before does not count, nor what a fused operation takes for itself and
    gives back before it returns.

    Attributes:
        largest: bytes of the largest piece.
        maker: the operation that made it.
        peak: bytes of all pieces that lived at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.peak = 0
        self.maker = ""
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and _storage(x) not in given]
        for x in made:
            storage = x.untyped_storage()
            self._alive[_storage(x)] = StorageWeakRef(storage), storage.nbytes()
            if storage.nbytes() > self.largest:
                self.largest, self.maker = storage.nbytes(), str(operation)
        if made:
            self.peak = max(self.peak, self.living())
        return out

    def living(self) -> int:
        """Count the bytes of the pieces that live now."""
        self._alive = {key: x for key, x in self._alive.items() if not x[0].expired()}
        return sum(n for _, n in self._alive.values())


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
