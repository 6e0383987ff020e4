"""The pages are true: what is refused, the presses, the modules, and what snippets print."""

import json
import re
from pathlib import Path

import pytest

import cachepress as cp
from cachepress.catalogue import own_presses, page
from cachepress.spec import aliases
from tests.laws.presses import UNSUPPORTED
from tests.snippets import printed, snippets

DOCS = Path(__file__).parents[1] / "docs"
ROOT = Path(cp.__file__).parent
TEXT = (DOCS / "combinations.md").read_text()
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


def test_families_name_presses_that_there_are():
    table = (DOCS / "choose.md").read_text().partition("| family | presses |")[2]
    named = set(re.findall(r"`([a-z0-9_]+)`", table))
    assert len(named) >= 50
    assert named <= {name for name, kind in aliases().items() if _ours(kind)}


def test_the_figures_of_the_decision_table_are_those_of_the_other_pages():
    ranked = (DOCS / "leaderboard.md").read_text().split("query-agnostic")[1].split("Everything")[0]
    costs = _cells((DOCS / "presses.md").read_text().split("## Measured")[1])
    scores, rows = _cells(ranked), _cells((DOCS / "choose.md").read_text().split("## ")[0])[1:]
    assert len(rows) >= 9
    for _, _, name, half, tenth, cost in rows:
        (found,) = (row for row in scores if row[0] == name.strip("`"))
        (spent,) = (row for row in costs if row[0] == name)
        assert [half, tenth] == [cell.split(" ")[0] for cell in found[1:3]], name
        assert cost == spent[2], name


def _cells(text):
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    return [row for row in rows if row and not set(row[0]) <= {"-", " "}]


def _ours(kind):
    return kind.__module__.startswith("cachepress.")


def test_the_page_of_presses_says_what_the_classes_say_and_what_was_measured():
    """A press that is not on the page yet fails nothing; all that is on it is true."""
    measured = json.loads((DOCS / "presses.json").read_text())
    said, true = (
        {re.sub(r"[ -]+", " ", line) for line in text.splitlines()}
        for text in ((DOCS / "presses.md").read_text(), page(measured))
    )
    assert said - true == set()
    on_page = [*measured["aliases"], *measured["left_out"]]
    assert [alias for alias in own_presses() if alias in on_page] == on_page
    new = {alias for alias in own_presses() if alias not in on_page}
    assert all(any(f"`{alias}`" in line for alias in new) for line in true - said)


def test_the_page_of_examples_includes_every_script():
    scripts = sorted(path.name for path in (DOCS.parent / "examples").glob("*.py"))
    included = re.findall(r'^--8<-- "examples/(.*)"$', (DOCS / "examples.md").read_text(), re.M)
    assert sorted(included) == scripts


@pytest.mark.builtin_model
def test_the_snippets_of_the_start_print_what_stands_beside_them():
    asked, weighed, continued = printed(snippets(DOCS / "start.md"))
    assert asked == "The ship is Aurora."
    assert weighed == "15.9 MiB before, 4.7 MiB after"
    assert continued == "Aurora."
    text = (DOCS / "start.md").read_text()
    for line in (asked, weighed, continued):
        assert f"`{line}`" in text


@pytest.mark.builtin_model
def test_the_loop_of_the_page_of_caches_prints_what_stands_beside_it():
    (code,) = (code for code in snippets(DOCS / "caches.md") if "cp.decode" in code)
    _, out = printed([snippets(DOCS / "start.md")[0], code])
    assert f"`{out}`" in (DOCS / "caches.md").read_text()
    assert out == "[' Aurora. The', ' morning. The']"


@pytest.mark.builtin_model
def test_offloading_on_the_page_of_caches_prints_what_stands_beside_it():
    (code,) = (code for code in snippets(DOCS / "caches.md") if "bytes_offloaded" in code)
    _, out = printed([snippets(DOCS / "start.md")[0], code])
    text = (DOCS / "caches.md").read_text()
    assert out.splitlines() == ["100% in host memory", "The ship is Aurora."]
    assert all(f"`{line}`" in text for line in out.splitlines())


@pytest.mark.builtin_model
@pytest.mark.parametrize("name", ["concepts", "architecture", "models"])
def test_the_snippets_of_a_page_run(name):
    assert "".join(printed(snippets(DOCS / f"{name}.md"))) == (
        "21 52% removed" if name == "models" else ""
    )


@pytest.mark.builtin_model
def test_the_new_press_of_the_page_is_scored_kept_and_tested_as_it_says():
    names: dict[str, object] = {"__name__": "new_press"}
    out = printed(snippets(DOCS / "new_press.md"), names)
    assert re.findall(r"(\w+) (\d+)% removed", out[1]) == [
        ("outlier_values", "50"),
        ("adakv", "50"),
    ]
    names["test_outlier_values_is_the_distance_to_the_mean_of_real_tokens"]()
    voted = names["VotedValuesPress"](0.5)
    assert voted.needs == cp.Needs(queries=32)
    assert cp.parse(repr(voted)) == voted
    cache = cp.prefill(names["model"], names["ids"], voted)
    assert 0.5 <= cp.size_of(cache).ratio < 0.51


@pytest.mark.parametrize(
    "path", [p for p in ROOT.rglob("*.py") if p.parent.name not in ("presses", "tasks")]
)
def test_the_architecture_names_every_module(path):
    named = re.findall(r"`([\w/]+)`", (DOCS / "architecture.md").read_text())
    names = {part for name in named for part in (name, *name.strip("/").split("/"))}
    assert (path.parent if path.stem == "__init__" else path).stem in {*names, "cachepress"}
