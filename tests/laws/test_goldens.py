from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import cachepress as cp
from cachepress.cache import stores
from tests.tiny_cache import pressed

GOLDEN = Path(__file__).parents[1] / "golden"
PRESSES = {
    "expected_attention": cp.ExpectedAttentionPress(0.5),
    "keydiff": cp.KeyDiffPress(0.5),
    "knorm": cp.KnormPress(0.5),
    "observed_attention": cp.ObservedAttentionPress(0.5),
    "snapkv": cp.SnapKVPress(0.5, window_size=32),
    "streaming_llm": cp.StreamingLLMPress(0.5),
    "tova": cp.TOVAPress(0.5),
}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_model").eval()


@pytest.mark.parametrize("name", PRESSES)
def test_keeps_the_rows_of_the_reference(model, name):
    ids = torch.from_numpy(np.load(GOLDEN / "ids.npy")).view(1, -1)
    golden = np.load(GOLDEN / f"{name}_0.5.npz")
    cache = pressed(model, PRESSES[name], ids)
    for layer, store in enumerate(stores(cache)):
        mask = torch.zeros(1, 2, 256).scatter_(-1, store.positions.long(), 1).numpy()
        wanted = np.unpackbits(golden[f"mask_{layer}"], axis=-1)
        np.testing.assert_array_equal(mask, wanted, err_msg=f"layer {layer}")
    assert len(stores(cache)) == 4
