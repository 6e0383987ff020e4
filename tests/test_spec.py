import pytest

import cachepress as cp
from cachepress.catalogue import example
from cachepress.press import ScorerPress, WrapperPress, all_presses
from cachepress.spec import aliases, brief, known_names


def test_aliases_name_every_press_of_the_package_once():
    kinds = {k for k in all_presses() if k.__module__.startswith("cachepress.")}
    named = {k for k in kinds - {ScorerPress, WrapperPress} if not k.__name__.startswith("_")}
    assert set(aliases().values()) >= named
    assert len({k.alias for k in named}) == len(named)


@pytest.mark.parametrize(
    ("text", "press"),
    [
        ("snapkv", cp.SnapKVPress()),
        (" snapkv(compression_ratio=0.5) ", cp.SnapKVPress(0.5)),
        ("SnapKVPress(0.25, window_size=8)", cp.SnapKVPress(0.25, window_size=8)),
        ("random(seed=3)", cp.RandomPress(seed=3)),
        ("expected_attention(use_vnorm=False)", cp.ExpectedAttentionPress(use_vnorm=False)),
        ("adakv(knorm(0.5))", cp.AdaKVPress(cp.KnormPress(0.5))),
        ("no_press", None),
    ],
)
def test_spellings(text, press):
    assert cp.parse(text) == press


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapk", "unknown press 'snapk': did you mean 'snapkv'?"),
        ("snapkv(", "cannot be read"),
        ("", "cannot be read"),
        ("snapkv(size=1)", "has no option 'size': it has compression_ratio, n_kept"),
        ("snapkv(1, 2, 3, 4)", "wanted a number|positional"),
        ("snapkv(window_size=0)", "window_size: got 0"),
        ("snapkv(kernel_size=4)", "kernel_size: got 4, wanted an odd number"),
        ("snapkv(window_size=open('x'))", "unknown press 'open'"),
        ("__import__('os')", "unknown press '__import__'"),
        ("().__class__", "neither a literal nor a press"),
        ("3", "is not a press"),
        ("RestoreKVPress(0.5)", "keeps pairs that are no tokens of the text.*use KVzipPress"),
        ("snapkv(compression_ratio=1.0)", "got 1.0"),
        ("expected_attention(epsilon=-1)", "epsilon: got -1"),
        ("random(seed=-1)", "seed: got -1"),
    ],
)
def test_what_is_no_press_is_one_clear_line(text, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        cp.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("press", "text"),
    [
        (cp.SnapKVPress(0.5), "snapkv"),
        (cp.SnapKVPress(0.5, window_size=8), "snapkv(window_size=8)"),
        (cp.AdaKVPress(cp.SnapKVPress(0.5)), "adakv(snapkv)"),
        (cp.AdaKVPress(cp.SnapKVPress(0.25)), "adakv(snapkv(compression_ratio=0.25))"),
        (cp.DMSPress(cp.KnormPress(0.5), -17), "dms(knorm, -17)"),
        (cp.ThinKPress(0.5), "think"),
        (cp.ThinKPress(0.25), "think(key_channel_compression_ratio=0.25)"),
        (
            cp.ComposedPress([cp.KnormPress(0.5), cp.KnormPress()]),
            "composed([knorm, knorm(compression_ratio=0.0)])",
        ),
    ],
)
def test_the_shortest_spelling_of_a_press_at_a_ratio(press, text):
    assert brief(press, 0.5) == text


@pytest.mark.parametrize("kind", aliases().values(), ids=lambda kind: str(kind.alias))
def test_the_shortest_spelling_reads_back(kind):
    press = example(kind, 0.5)
    assert cp.parse(brief(press, 0.125)) == press


def test_known_names_are_listed_for_the_user():
    assert known_names()[0] == "no_press"
    assert "SnapKVPress" in known_names()
    assert "WrapperPress" not in known_names()
