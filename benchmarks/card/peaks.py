"""Prefill: what every press adds in seconds and peak memory, and how long all layers take."""

from collections.abc import Callable
from functools import partial

from transformers.cache_utils import Cache

import cachepress as cp
from benchmarks.card.lab import ADA_90, DYNAMIC, KVZIP, QUEST, Cells, Kind, Lab, press_options
from benchmarks.card.records import Values
from cachepress.measure import Stopwatch, peak_memory

MIB = 2**20
NONE = "none"
PRESSES: dict[str, str] = {
    "snapkv": "SnapKVPress(0.5)",
    "adakv": "AdaKVPress(SnapKVPress(0.5))",
    "knorm": "KnormPress(0.5)",
    "keydiff": "KeyDiffPress(0.5)",
    "tova": "TOVAPress(0.5)",
    "streaming_llm": "StreamingLLMPress(0.5)",
    "expected_attention": "ExpectedAttentionPress(0.5)",
    "quest": "QuestPress()",
    "kivi": "KIVIPress(KnormPress(0.0))",
    "critical": "CriticalKVPress(SnapKVPress(0.5))",
    "critical_adakv": "CriticalAdaKVPress(SnapKVPress(0.5))",
    "pyramidkv": "PyramidKVPress(0.5)",
    "headkv": "HeadKVPress(SnapKVPress(0.5), {heads})",
    "duo_attention": "DuoAttentionPress(0.5, {heads})",
    "lagkv": "LagKVPress(0.5)",
    "cur": "CURPress(0.5)",
    "leverage": "LeverageScorePress(0.5)",
    "triattention": "TriAttentionPress(0.5)",
    "cap": "CapPress(0.5)",
    "compactor": "CompactorPress(0.5)",
    "noncausal": "NonCausalAttnPress(0.5)",
    "observed_attention": "ObservedAttentionPress(0.5)",
    "h2o": "H2OPress(0.5)",
    "defensivekv": "DefensiveKVPress(0.5)",
    "finch": "FinchPress(0.5)",
    "rkv": "RKVPress(0.5)",
    "kvcompose": "KVComposePress(0.5)",
    "chunkkv": "ChunkKVPress(SnapKVPress(0.5))",
    "entropy_gated_chunkkv": "EntropyGatedChunkKVPress(SnapKVPress(0.5))",
    "chunk": "ChunkPress(SnapKVPress(0.5))",
    "block": "BlockPress(KeyDiffPress(0.5))",
    "merging": "MergingPress(SnapKVPress(0.5))",
    "key_rerotation": "KeyRerotationPress(SnapKVPress(0.5))",
    "think": "ThinKPress(0.5)",
    "simlayerkv": "SimLayerKVPress(0.9)",
    "per_layer": "PerLayerCompressionPress(SnapKVPress(0.5), {layers})",
    "composed": "ComposedPress([SnapKVPress(0.3), KnormPress(0.3)])",
    "dms": "DMSPress(KnormPress(0.5), -17)",
    "decoding": "DecodingPress(SnapKVPress(0.5), target_size=1024)",
    "compression_ratio_decoding": "CompressionRatioDecodingPress(SnapKVPress(0.5))",
    "prefill_decoding": "PrefillDecodingPress(SnapKVPress(0.5), DecodingPress(KnormPress()))",
    "cam": "CAMPress(SnapKVPress(0.5), target_size=1024)",
    "random": "RandomPress(0.5)",
    "kvzip": "KVzipPress(0.5)",
    "kvgrad": "KVgradPress(0.5)",
}
"""Every press that needs not to be told of the model; those with a target come first."""
UNTAUGHT = ("expected_attention_stats", "fastkvzip", "kvzap", "lukv", "qfilter")
"""Presses that read what was learned of a model, which there is nothing of for random weights."""
TARGETED = tuple(PRESSES)[:7]
WHOLE_MODEL = (
    DYNAMIC,
    Kind("SnapKV 0.5", "SnapKVPress(0.5)"),
    ADA_90,
    Kind("SnapKV 0.5, int4", "SnapKVPress(0.5)", "int4"),
    QUEST,
    KVZIP,
)
REPEATS = 3
"""Prefills after the first one of which the best is taken, where little time is what is wanted."""
SLOW, ENOUGH = 6.0, 1.5
"""Seconds of one prefill, and of several, after which there is no other."""


def peaks(lab: Lab) -> Cells:
    """Give the cells of prefills: the targets, all layers, and then every other press."""
    few, sizes = lab.sizes.few_layers, lab.sizes
    for name in (NONE, *TARGETED):
        for length in (sizes.long, sizes.short):
            yield f"{name}, {few} layers, {length}", partial(of_press, lab, name, length, REPEATS)
    for length in (sizes.short, sizes.long):
        for kind in WHOLE_MODEL:
            yield f"{kind.name}, all layers, {length}", partial(of_model, lab, kind, length)
    for name in list(PRESSES)[len(TARGETED) :]:
        yield f"{name}, {few} layers, {sizes.long}", partial(of_press, lab, name, sizes.long)


def spelled(name: str, layers: int, heads: int) -> str | None:
    """Spell a press for a model; None for no press."""
    each = [[0.2, 0.8] * (heads // 2)] * layers
    some = [0.4, 0.6] * (layers // 2)
    return PRESSES[name].format(heads=each, layers=some) if name in PRESSES else None


def of_press(lab: Lab, name: str, length: int, repeats: int = 1) -> Values:
    """Measure a prefill of few layers under a press."""
    layers = lab.sizes.few_layers
    model, ids = lab.model(layers), lab.ids(length)
    text = spelled(name, layers, model.config.num_key_value_heads)
    options = {} if text is None else press_options(cp.parse(text))
    found = prefilled(lab, lambda: cp.prefill(model, ids, **options), repeats)
    return {"press": name, "layers": layers, "length": length, **found}


def of_model(lab: Lab, kind: Kind, length: int) -> Values:
    """Measure a prefill of the whole model."""
    found = prefilled(lab, lambda: lab.prefill(kind, length), 1)
    return {"press": kind.name, "layers": lab.sizes.layers, "length": length, **found}


def prefilled(lab: Lab, work: Callable[[], Cache], repeats: int) -> Values:
    """Measure prefills: the seconds of the best, and the most memory that one needed above."""
    seconds, most = [], 0
    lab.tidy()
    for _ in range(repeats + 1):  # The first one also loads, compiles and asks for memory.
        with peak_memory(lab.device) as peak, Stopwatch(lab.device) as stopwatch:
            work()
        seconds.append(stopwatch.seconds)
        most = max(most, peak[0])
        if stopwatch.seconds > SLOW or (len(seconds) > 1 and sum(seconds) > ENOUGH):
            break
    return {"seconds": min(seconds), "peak_mib": most / MIB}
