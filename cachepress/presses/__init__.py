"""The methods, one file each: a new one is a file, and a line here."""

from cachepress.presses.adakv import AdaKVPress as AdaKVPress
from cachepress.presses.base import BasePress as BasePress
from cachepress.presses.base import ScorerPress as ScorerPress
from cachepress.presses.base import WrapperPress as WrapperPress
from cachepress.presses.block import BlockPress as BlockPress
from cachepress.presses.chunk import ChunkPress as ChunkPress
from cachepress.presses.composed import ComposedPress as ComposedPress
from cachepress.presses.critical import CriticalAdaKVPress as CriticalAdaKVPress
from cachepress.presses.critical import CriticalKVPress as CriticalKVPress
from cachepress.presses.decoding import (
    CompressionRatioDecodingPress as CompressionRatioDecodingPress,
)
from cachepress.presses.decoding import DecodingPress as DecodingPress
from cachepress.presses.expected_attention import ExpectedAttentionPress as ExpectedAttentionPress
from cachepress.presses.finch import FinchPress as FinchPress
from cachepress.presses.key_rerotation import KeyRerotationPress as KeyRerotationPress
from cachepress.presses.keydiff import KeyDiffPress as KeyDiffPress
from cachepress.presses.knorm import KnormPress as KnormPress
from cachepress.presses.kvgrad import KVgradPress as KVgradPress
from cachepress.presses.kvzip import KVzipPress as KVzipPress
from cachepress.presses.observed_attention import ObservedAttentionPress as ObservedAttentionPress
from cachepress.presses.per_layer import PerLayerCompressionPress as PerLayerCompressionPress
from cachepress.presses.prefill_decoding import PrefillDecodingPress as PrefillDecodingPress
from cachepress.presses.pyramidkv import PyramidKVPress as PyramidKVPress
from cachepress.presses.random import RandomPress as RandomPress
from cachepress.presses.snapkv import SnapKVPress as SnapKVPress
from cachepress.presses.streaming_llm import StreamingLLMPress as StreamingLLMPress
from cachepress.presses.tova import TOVAPress as TOVAPress

__all__ = [name for name in dir() if name.endswith("Press")]  # pyright: ignore[reportUnsupportedDunderAll]
