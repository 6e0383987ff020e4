"""A sample of transformers' model types, one of each kind: none is silently wrong.

All of them: ``make models``. What it found is in ``docs/models.json``.
"""

import json

import pytest
import transformers

from benchmarks.models.checks import CHECKS, ITSELF, RIGHT, record_of
from benchmarks.models.page import DATA
from benchmarks.models.tiny import types

FOUND = json.loads(DATA.read_text(encoding="utf-8"))
KINDS = (
    *("bamba", "bert", "blt", "bloom", "deepseek_v3", "deepseek_v32", "diffllama", "dory"),
    *("falcon_h1", "gemma3n_text", "gemma4_text", "gpt_bigcode", "inkling_text", "llama4_text"),
    *("minimax", "mllama", "modernbert-decoder", "musicgen", "opt", "phi", "recurrent_gemma"),
    *("reformer", "rwkv", "xlstm", "zaya"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_type_is_right_or_refused_at_once_by_name(kind):
    if kind not in types():
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    found = record_of(kind)
    assert found["status"] in ("works", "refused"), found
    if found["status"] == "works":
        assert list(found["checks"]) == list(CHECKS)
        assert set(found["checks"].values()) <= {RIGHT, ITSELF}
        assert found["checks"]["ratio 0"] == found["checks"]["masked reference"] == RIGHT
    else:
        assert found["reason"].split()[0].endswith(("ForCausalLM", "WithLMHead"))
    if transformers.__version__ == FOUND["transformers"]:
        assert found == FOUND["types"][kind]
