"""The methods, one file each."""

from cachepress.presses.base import BasePress, ScorerPress, WrapperPress
from cachepress.presses.expected_attention import ExpectedAttentionPress
from cachepress.presses.keydiff import KeyDiffPress
from cachepress.presses.knorm import KnormPress
from cachepress.presses.observed_attention import ObservedAttentionPress
from cachepress.presses.random import RandomPress
from cachepress.presses.snapkv import SnapKVPress
from cachepress.presses.streaming_llm import StreamingLLMPress
from cachepress.presses.tova import TOVAPress

__all__ = [
    "BasePress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KnormPress",
    "ObservedAttentionPress",
    "RandomPress",
    "ScorerPress",
    "SnapKVPress",
    "StreamingLLMPress",
    "TOVAPress",
    "WrapperPress",
]
