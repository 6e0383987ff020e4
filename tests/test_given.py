"""Wherever a press is taken: a press, its spelling, or one line that says what to write."""

import copy
import pickle

import pytest
from transformers import DynamicCache, pipeline

import cachepress as cp
from cachepress.bench import BenchOptions
from cachepress.cache.batch import compressed_layers
from cachepress.evaluation.config import EvaluationConfig
from cachepress.evaluation.sweep import SweepConfig
from cachepress.given import example, press_of
from cachepress.pages.inspect import write_inspection
from cachepress.spec import aliases
from tests.tiny import tiny, tokenizer, tokens, words

IN_CLASS = (
    "press: got the class SnapKVPress, wanted a press made of it, such as "
    "SnapKVPress(compression_ratio=0.5)"
)
WRAPPERS = [kind for kind in aliases().values() if issubclass(kind, cp.WrapperPress)]


def piped(press):
    pipe = pipeline("kv-press-text-generation", model=tiny(), tokenizer=tokenizer())
    cache = DynamicCache()
    pipe(words(20), question="w9", press=press, cache=cache, max_new_tokens=1)
    return cache


def prefilled(press):
    return cp.prefill(tiny(), tokens(20), press)


def inspected(press, tmp_path):
    pytest.importorskip("jinja2")
    page = tmp_path / "page.html"
    write_inspection(tiny(), tokenizer(), press, words(20), "w9", page, 1)
    return page.read_text()


@pytest.mark.parametrize("read", [prefilled, piped])
def test_a_spelling_is_accepted_where_a_press_is(read):
    found, wanted = read("snapkv(0.5, window_size=4)"), read(cp.SnapKVPress(0.5, window_size=4))
    for layer, other in zip(compressed_layers(found), compressed_layers(wanted), strict=True):
        assert layer.positions.tolist() == other.positions.tolist()
    assert compressed_layers(found)[0].lengths.tolist() == [[10 + (read is piped)] * 2]
    assert not compressed_layers(read("no_press"))


@pytest.mark.parametrize("read", [prefilled, piped])
def test_a_class_is_refused_with_what_to_write(read):
    with pytest.raises(cp.CachepressError) as error:
        read(cp.SnapKVPress)
    assert str(error.value) == IN_CLASS


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (cp.SnapKVPress, IN_CLASS),
        (
            cp.AdaKVPress,
            "press: got the class AdaKVPress, wanted a press made of it, such as "
            "AdaKVPress(SnapKVPress(compression_ratio=0.5))",
        ),
        (
            DynamicCache,
            "press: got the class DynamicCache, wanted a press, such as "
            "SnapKVPress(compression_ratio=0.5), or its spelling",
        ),
        (
            0.5,
            "press: got 0.5, wanted a press, such as SnapKVPress(compression_ratio=0.5), or its "
            "spelling",
        ),
    ],
)
def test_what_is_no_press_is_refused_with_what_to_write(given, said):
    with pytest.raises(cp.CachepressError) as error:
        press_of(given)
    assert str(error.value) == said


def test_configs_spell_a_press_that_is_given_by_itself():
    press = cp.AdaKVPress(cp.SnapKVPress(0.5))
    assert EvaluationConfig(press=press) == EvaluationConfig(press=repr(press))
    assert SweepConfig(presses=[press, "knorm"]).presses == [repr(press), "knorm"]
    assert BenchOptions(presses=[press]).made() == [press]
    for make in (EvaluationConfig, lambda press: BenchOptions(presses=[press])):
        with pytest.raises(cp.CachepressError, match="got the class SnapKVPress, wanted a press"):
            make(press=cp.SnapKVPress)
    with pytest.raises(cp.CachepressError, match="presses: got the class SnapKVPress"):
        SweepConfig(presses=[cp.SnapKVPress])
    with pytest.raises(cp.CachepressError, match="presses: got 'snapkv', wanted a list"):
        BenchOptions(presses="snapkv")


def test_inspect_takes_a_spelling_and_needs_a_press(tmp_path):
    page = inspected("knorm(0.5)", tmp_path)
    assert "KnormPress(compression_ratio=0.5)" in page
    with pytest.raises(cp.CachepressError, match="press: got none, and without one every token"):
        inspected("no_press", tmp_path)


@pytest.mark.parametrize("kind", WRAPPERS, ids=lambda kind: kind.__name__)
def test_a_wrapper_without_a_press_says_what_to_write(kind):
    name, alias = kind.__name__, kind.alias
    if kind in (cp.QuestPress, cp.LUKVPress):
        assert isinstance(kind().press, cp.BasePress)
        return
    inner = "KeyDiff" if kind is cp.BlockPress else "SnapKV"
    said = (
        f"{name} wraps a press: got none, wanted for example "
        f"{name}({inner}Press(compression_ratio=0.5)), spelled {alias}({inner.lower()}(0.5))"
    )
    for make in (kind, lambda: kind(press=None), lambda: cp.parse(f"{alias}()")):
        with pytest.raises(cp.CachepressError) as error:
            make()
        assert str(error.value) == said


def test_a_wrapper_takes_a_spelling_and_no_class():
    assert cp.AdaKVPress("snapkv(0.5)") == cp.AdaKVPress(cp.SnapKVPress(0.5))
    assert cp.LUKVPress("knorm", compression_ratio=0.5).press == cp.KnormPress(0.5)
    assert cp.DecodingPress(base_press="knorm") == cp.DecodingPress(cp.KnormPress())
    with pytest.raises(cp.CachepressError) as error:
        cp.AdaKVPress(cp.KnormPress)
    assert str(error.value) == (
        "AdaKVPress wraps a press: got the class KnormPress, wanted for example "
        "AdaKVPress(KnormPress(compression_ratio=0.5)), spelled adakv(snapkv(0.5))"
    )
    with pytest.raises(cp.CachepressError, match="AdaKVPress wraps a press: got 'no_press'"):
        cp.AdaKVPress("no_press")
    with pytest.raises(cp.CachepressError, match="did you mean 'snapkv'?"):
        cp.AdaKVPress("snapvk")


def test_several_presses_are_given_as_presses_or_spelled():
    both = cp.ComposedPress([cp.SnapKVPress(0.5), cp.ThinKPress(0.5)])
    assert cp.ComposedPress(["snapkv(0.5)", "think(0.5)"]) == both
    for given in (lambda: cp.ComposedPress([]), lambda: cp.ComposedPress("snapkv")):
        with pytest.raises(cp.CachepressError, match=r"ComposedPress\(\[SnapKVPress\(0.5\), "):
            given()
    with pytest.raises(cp.CachepressError, match="presses: got the class SnapKVPress"):
        cp.ComposedPress([cp.SnapKVPress])
    with pytest.raises(cp.CachepressError, match="presses: got no press in the list"):
        cp.ComposedPress(["knorm", "no_press"])
    spelled = cp.PrefillDecodingPress("knorm(0.5)", "decoding(knorm)")
    assert spelled.prefilling_press == cp.KnormPress(0.5)
    assert spelled.decoding_press == cp.DecodingPress(cp.KnormPress())
    with pytest.raises(cp.CachepressError, match="decoding_press: got the class DecodingPress"):
        cp.PrefillDecodingPress(decoding_press=cp.DecodingPress)


@pytest.mark.parametrize("kind", aliases().values(), ids=lambda kind: kind.__name__)
def test_what_an_error_says_to_write_is_a_press(kind):
    if "..." in example(kind) or kind is cp.PerLayerCompressionPress:
        return
    assert isinstance(cp.parse(example(kind)), kind)


def test_a_wrapper_is_copied_and_pickled_with_its_press():
    press = cp.AdaKVPress(cp.SnapKVPress(0.5), alpha_safeguard=0.1)
    copies = (copy.copy(press), copy.deepcopy(press), pickle.loads(pickle.dumps(press)))
    assert all(one == press and type(one) is cp.AdaKVPress for one in copies)


def test_only_a_text_is_parsed():
    with pytest.raises(cp.SpecError, match="press: got 3, wanted its spelling, a text"):
        cp.parse(3)
