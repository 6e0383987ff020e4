"""The presses, one file each: a new method is a file, and a line here."""

from cachepress.press import BasePress as BasePress
from cachepress.press import ScorerPress as ScorerPress
from cachepress.press import WrapperPress as WrapperPress
from cachepress.presses.adakv import AdaKVPress as AdaKVPress
from cachepress.presses.block import BlockPress as BlockPress
from cachepress.presses.cam import CAMPress as CAMPress
from cachepress.presses.cap import CapPress as CapPress
from cachepress.presses.chunk import ChunkPress as ChunkPress
from cachepress.presses.chunkkv import ChunkKVPress as ChunkKVPress
from cachepress.presses.compactor import CompactorPress as CompactorPress
from cachepress.presses.composed import ComposedPress as ComposedPress
from cachepress.presses.critical import CriticalAdaKVPress as CriticalAdaKVPress
from cachepress.presses.critical import CriticalKVPress as CriticalKVPress
from cachepress.presses.cur import CURPress as CURPress
from cachepress.presses.decoding import (
    CompressionRatioDecodingPress as CompressionRatioDecodingPress,
)
from cachepress.presses.decoding import DecodingPress as DecodingPress
from cachepress.presses.defensivekv import DefensiveKVPress as DefensiveKVPress
from cachepress.presses.dms import DMSPress as DMSPress
from cachepress.presses.duo_attention import DuoAttentionPress as DuoAttentionPress
from cachepress.presses.entropy_chunkkv import EntropyGatedChunkKVPress as EntropyGatedChunkKVPress
from cachepress.presses.expected_attention import ExpectedAttentionPress as ExpectedAttentionPress
from cachepress.presses.expected_attention_stats import (
    ExpectedAttentionStatsPress as ExpectedAttentionStatsPress,
)
from cachepress.presses.fastkvzip import FastKVzipPress as FastKVzipPress
from cachepress.presses.finch import FinchPress as FinchPress
from cachepress.presses.h2o import H2OPress as H2OPress
from cachepress.presses.headkv import HeadKVPress as HeadKVPress
from cachepress.presses.key_rerotation import KeyRerotationPress as KeyRerotationPress
from cachepress.presses.keydiff import KeyDiffPress as KeyDiffPress
from cachepress.presses.kivi import KIVIPress as KIVIPress
from cachepress.presses.knorm import KnormPress as KnormPress
from cachepress.presses.kvcompose import KVComposePress as KVComposePress
from cachepress.presses.kvgrad import KVgradPress as KVgradPress
from cachepress.presses.kvzap import KVzapPress as KVzapPress
from cachepress.presses.kvzip import KVzipPress as KVzipPress
from cachepress.presses.lagkv import LagKVPress as LagKVPress
from cachepress.presses.leverage import LeverageScorePress as LeverageScorePress
from cachepress.presses.lukv import LUKVPress as LUKVPress
from cachepress.presses.merging import MergingPress as MergingPress
from cachepress.presses.noncausal import NonCausalAttnPress as NonCausalAttnPress
from cachepress.presses.observed_attention import ObservedAttentionPress as ObservedAttentionPress
from cachepress.presses.per_layer import PerLayerCompressionPress as PerLayerCompressionPress
from cachepress.presses.prefill_decoding import PrefillDecodingPress as PrefillDecodingPress
from cachepress.presses.pyramidkv import PyramidKVPress as PyramidKVPress
from cachepress.presses.qfilter import QFilterPress as QFilterPress
from cachepress.presses.quest import QuestPress as QuestPress
from cachepress.presses.random import RandomPress as RandomPress
from cachepress.presses.restorekv import RestoreKVPress as RestoreKVPress
from cachepress.presses.rkv import RKVPress as RKVPress
from cachepress.presses.simlayerkv import SimLayerKVPress as SimLayerKVPress
from cachepress.presses.snapkv import SnapKVPress as SnapKVPress
from cachepress.presses.streaming_llm import StreamingLLMPress as StreamingLLMPress
from cachepress.presses.think import ThinKPress as ThinKPress
from cachepress.presses.tova import TOVAPress as TOVAPress
from cachepress.presses.triattention import TriAttentionPress as TriAttentionPress

__all__ = [name for name in dir() if name.endswith("Press")]  # pyright: ignore[reportUnsupportedDunderAll]
