"""The table of what is refused names what the library refuses."""

import json
import re
from pathlib import Path

import pytest

import cachepress as cp
from cachepress.catalogue import own_presses, page
from cachepress.spec import aliases
from tests.laws.presses import UNSUPPORTED

TEXT = (Path(__file__).parents[1] / "docs" / "combinations.md").read_text()
MODEL_WIDE = cp.AdaKVPress(cp.KnormPress(), scope="model")
DECODING = cp.DecodingPress(cp.KnormPress())


def test_every_refused_pair_of_the_laws_is_in_the_table():
    for scorer, wrapper in UNSUPPORTED:
        rows = [line for line in TEXT.splitlines() if line.startswith("| ") and wrapper in line]
        assert any(f"`{getattr(cp, scorer).alias}`" in row for row in rows), (scorer, wrapper)


@pytest.mark.parametrize(
    "build",
    [
        lambda: cp.BlockPress(cp.PyramidKVPress()),
        lambda: cp.CriticalKVPress(MODEL_WIDE),
        lambda: cp.ChunkPress(MODEL_WIDE),
        lambda: cp.BlockPress(MODEL_WIDE),
        lambda: cp.ComposedPress([MODEL_WIDE]),
        lambda: cp.DecodingPress(DECODING),
        lambda: cp.CompressionRatioDecodingPress(cp.PrefillDecodingPress(None, DECODING)),
        lambda: cp.ComposedPress([DECODING]),
        lambda: cp.ComposedPress([cp.KeyRerotationPress(cp.KnormPress()), cp.KnormPress()]),
        lambda: cp.PrefillDecodingPress(prefilling_press=DECODING),
        lambda: cp.PrefillDecodingPress(decoding_press=cp.KnormPress()),
        lambda: cp.ComposedPress(
            [cp.ExpectedAttentionPress(n_sink=2), cp.ExpectedAttentionPress(n_sink=4)]
        ),
        lambda: cp.KnormPress(n_kept=3, max_bytes="1MB"),
    ],
)
def test_every_row_of_the_first_table_is_refused_when_it_is_built(build):
    with pytest.raises(cp.CachepressError) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_the_readme_names_every_press():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = readme.partition("| family | presses |")[2].partition("Wrappers go around")[0]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert named == {name for name, kind in aliases().items() if _ours(kind)}


def _ours(kind):
    return kind.__module__.startswith("cachepress.")


def test_the_page_of_presses_says_what_the_classes_say_and_what_was_measured():
    docs = Path(__file__).parents[1] / "docs"
    measured = json.loads((docs / "presses.json").read_text())
    assert (docs / "presses.md").read_text() == page(measured)
    assert measured["aliases"] + list(measured["left_out"]) == list(own_presses())
