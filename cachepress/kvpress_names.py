"""The press names of kvpress's evaluation, and the spelling of the same press here.

``parse("kvpress:NAME")`` returns the press that kvpress 0.5.5 runs under a name; a name that is no
alias here means the same without the prefix. This module is data for compatibility, and no more.
"""

PREFIX = "kvpress:"

SPELLINGS = {
    "adakv_compactor": "AdaKVPress(CompactorPress())",
    "adakv_snapkv": "AdaKVPress(SnapKVPress())",
    "block_keydiff": "BlockPress(KeyDiffPress(), block_size=128)",
    "cam_adakv_snapkv": "CAMPress(AdaKVPress(SnapKVPress()))",
    "cam_knorm": "CAMPress(KnormPress())",
    "cam_streaming_llm": "CAMPress(StreamingLLMPress())",
    "cam_tova": "CAMPress(TOVAPress())",
    "chunkkv": "ChunkKVPress(SnapKVPress(), chunk_length=20)",
    "compactor": "CompactorPress()",
    "critical_adakv_expected_attention": "CriticalAdaKVPress("
    "ExpectedAttentionPress(use_vnorm=False))",
    "critical_adakv_snapkv": "CriticalAdaKVPress(SnapKVPress())",
    "critical_expected_attention": "CriticalKVPress(ExpectedAttentionPress(use_vnorm=False))",
    "critical_snapkv": "CriticalKVPress(SnapKVPress())",
    "cur": "CURPress()",
    "decoding_adakv_expected_attention_e2": "DecodingPress("
    "AdaKVPress(ExpectedAttentionPress(epsilon=0.01)))",
    "decoding_adakv_snapkv": "DecodingPress(AdaKVPress(SnapKVPress()))",
    "decoding_keydiff": "DecodingPress(KeyDiffPress())",
    "decoding_knorm": "DecodingPress(KnormPress())",
    "decoding_qfilter": "DecodingPress(QFilterPress())",
    "decoding_streaming_llm": "DecodingPress(StreamingLLMPress())",
    "decoding_tova": "DecodingPress(TOVAPress())",
    "duo_attention": "DuoAttentionPress(on_the_fly_scoring=False)",
    "duo_attention_on_the_fly": "DuoAttentionPress(on_the_fly_scoring=True)",
    "expected_attention": "AdaKVPress(ExpectedAttentionPress(epsilon=0.01))",
    "fastkvzip": "FastKVzipPress()",
    "finch": "FinchPress()",
    "keydiff": "KeyDiffPress()",
    "knorm": "KnormPress()",
    "kvcompose": "KVComposePress()",
    "kvcompose_unstructured": "KVComposePress(structured=False)",
    "kvzap_linear": "DMSPress(KVzapPress(model_type='linear'))",
    "kvzap_mlp": "DMSPress(KVzapPress(model_type='mlp'))",
    "kvzap_mlp_head": "KVzapPress(model_type='mlp')",
    "kvzap_mlp_layer": "AdaKVPress(KVzapPress(model_type='mlp'))",
    "kvzip": "KVzipPress()",
    "kvzip_plus": "KVzipPress(kvzip_plus_normalization=True)",
    "lagkv": "LagKVPress()",
    "lukv": "LUKVPress(ExpectedAttentionPress(epsilon=0.02), sink=4, window=1)",
    "merging_expected_attention": "MergingPress(ExpectedAttentionPress(epsilon=0.01))",
    "merging_knorm": "MergingPress(KnormPress())",
    "merging_kvzap_mlp": "MergingPress(KVzapPress(model_type='mlp'))",
    "merging_snapkv": "MergingPress(SnapKVPress())",
    "no_press": "no_press",
    "observed_attention": "ObservedAttentionPress()",
    "pyramidkv": "PyramidKVPress()",
    "qfilter": "QFilterPress()",
    "random": "RandomPress()",
    "RestoreKV": "RestoreKVPress()",
    "RestoreKV_plus": "RestoreKVPress(kvzip_plus_normalization=True)",
    "snap_think": "ComposedPress([SnapKVPress(), ThinKPress(0.0)])",
    "snapkv": "SnapKVPress()",
    "streaming_llm": "StreamingLLMPress()",
    "think": "ThinKPress(0.0)",
    "tova": "TOVAPress()",
}
"""The spelling of the press of each name."""
