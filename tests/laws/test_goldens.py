from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cachepress as cp
from cachepress.cache.batch import compressed_layers
from tests.bounds import near
from tests.exact import doubled
from tests.tiny_cache import pressed

GOLDEN = Path(__file__).parents[1] / "golden"
SNAPKV = cp.SnapKVPress(0.5, window_size=32)
PRESSES = {
    "adakv_expected_attention": cp.AdaKVPress(cp.ExpectedAttentionPress(0.5, epsilon=1e-2)),
    "adakv_snapkv": cp.AdaKVPress(SNAPKV),
    "block_keydiff": cp.BlockPress(cp.KeyDiffPress(0.5), block_size=64),
    "chunk_knorm": cp.ChunkPress(cp.KnormPress(0.5), chunk_length=64),
    "composed_snap_think": cp.ComposedPress([SNAPKV, cp.ThinKPress(0.5, window_size=32)]),
    "critical_adakv_snapkv": cp.CriticalAdaKVPress(SNAPKV),
    "critical_snapkv": cp.CriticalKVPress(SNAPKV),
    "key_rerotation_knorm": cp.KeyRerotationPress(cp.KnormPress(0.5)),
    "cur": cp.CURPress(0.5),
    "merging_snapkv": cp.MergingPress(SNAPKV),
    "noncausal": cp.NonCausalAttnPress(0.5),
    "per_layer_snapkv": cp.PerLayerCompressionPress(SNAPKV, [0.1, 0.3, 0.6, 0.8]),
    "pyramidkv": cp.PyramidKVPress(0.5, window_size=16, beta=4),
    "expected_attention": cp.ExpectedAttentionPress(0.5),
    "keydiff": cp.KeyDiffPress(0.5),
    "knorm": cp.KnormPress(0.5),
    "observed_attention": cp.ObservedAttentionPress(0.5),
    "snapkv": SNAPKV,
    "streaming_llm": cp.StreamingLLMPress(0.5),
    "think": cp.ThinKPress(0.5, window_size=32),
    "tova": cp.TOVAPress(0.5),
}
OTHER = {"key_rerotation_knorm": {"keys"}}
"""Columns that a law wants otherwise: our kept keys end at the last position seen."""


TERMS = 2 * 64 + 8 + 2 * 256 + 64 + 64 + 128
"""What a layer of the model sums: norms, a query with a key, a softmax and its values, and the
matrices. The reference did so in float32."""


@pytest.fixture(scope="module")
def model():
    return doubled(AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model"))


@pytest.mark.parametrize("name", PRESSES)
def test_keeps_the_pairs_of_the_reference(model, name):
    ids = torch.from_numpy(np.load(GOLDEN / "ids.npy")).view(1, -1)
    golden = np.load(next(GOLDEN.glob(f"{name}*.npz")))
    cache = pressed(model, PRESSES[name], ids)
    for layer, store in enumerate(compressed_layers(cache)):
        mask = np.zeros((1, 2, 256))
        for head, row in zip(mask[0], store.positions[0].tolist(), strict=True):
            head[[p for p in row if p >= 0]] = 1
        wanted = np.unpackbits(golden[f"mask_{layer}"], axis=-1)
        np.testing.assert_array_equal(mask, wanted, err_msg=f"layer {layer}")
        rows = store.snapshot.rows()
        for column in {"keys", "values"} - OTHER.get(name, set()):
            if f"{column}_{layer}" in golden:
                ours, wanted = getattr(rows, column).numpy(), golden[f"{column}_{layer}"]
                near(ours, wanted, torch.float32, TERMS, depth=4)
                np.testing.assert_array_equal(ours == 0, wanted == 0)
    assert len(compressed_layers(cache)) == 4
