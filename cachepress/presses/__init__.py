"""The methods, one file each."""

from cachepress.presses.adakv import AdaKVPress
from cachepress.presses.base import BasePress, ScorerPress, WrapperPress
from cachepress.presses.block import BlockPress
from cachepress.presses.chunk import ChunkPress
from cachepress.presses.composed import ComposedPress
from cachepress.presses.critical import CriticalAdaKVPress, CriticalKVPress
from cachepress.presses.decoding import CompressionRatioDecodingPress, DecodingPress
from cachepress.presses.expected_attention import ExpectedAttentionPress
from cachepress.presses.key_rerotation import KeyRerotationPress
from cachepress.presses.keydiff import KeyDiffPress
from cachepress.presses.knorm import KnormPress
from cachepress.presses.observed_attention import ObservedAttentionPress
from cachepress.presses.per_layer import PerLayerCompressionPress
from cachepress.presses.prefill_decoding import PrefillDecodingPress
from cachepress.presses.pyramidkv import PyramidKVPress
from cachepress.presses.random import RandomPress
from cachepress.presses.snapkv import SnapKVPress
from cachepress.presses.streaming_llm import StreamingLLMPress
from cachepress.presses.tova import TOVAPress

__all__ = [
    "AdaKVPress",
    "BasePress",
    "BlockPress",
    "ChunkPress",
    "ComposedPress",
    "CompressionRatioDecodingPress",
    "CriticalAdaKVPress",
    "CriticalKVPress",
    "DecodingPress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KeyRerotationPress",
    "KnormPress",
    "ObservedAttentionPress",
    "PerLayerCompressionPress",
    "PrefillDecodingPress",
    "PyramidKVPress",
    "RandomPress",
    "ScorerPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "WrapperPress",
]
