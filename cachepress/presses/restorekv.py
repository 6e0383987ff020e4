"""RestoreKV: not implemented, and the reason."""

from cachepress.errors import CachepressError

REASON = (
    "RestoreKV (arXiv:2608.01247) keeps pairs that are no tokens of the text, made by "
    "a trained adapter of the model's own weights; a cache of ours holds tokens of the text only, "
    "and no weights are changed: use KVzipPress, which it starts from"
)


class RestoreKVPress:
    """Placeholder for a press of kvpress: making one raises an error with the reason."""

    def __init__(
        self,
        compression_ratio: float = 0.0,
        layerwise: bool = False,
        n_sink: int = 4,
        kvzip_plus_normalization: bool = False,
        chunk_size: int = 2048,
    ) -> None:
        raise CachepressError(f"RestoreKVPress: {REASON}")
