"""The grid of needles: exact lengths and depths, one fresh needle a sample, and its two metrics."""

import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.tasks.needle import INTRODUCTION, NEEDLE, rouge_1_recall
from tests.evaluation.tasks.test_builtin import TOKENIZERS, WORDS, tokens

ESSAY = "One line, and more of it. A second line!\nA title\n\nDoes a third one follow? It does. "


def table(data_dir=None, tokenizer=WORDS, seed=0, folder=None):
    config = EvaluationConfig(
        dataset="needle",
        data_dir=data_dir,
        seed=seed,
        data_path=None if folder is None else str(folder),
    )
    return NEEDLE.table(config, tokenizer)


def parts(row):
    """What stands before the needle, the needle, and what stands after it."""
    hay = row.context.removeprefix(INTRODUCTION)
    assert hay != row.context
    before, start, after = hay.partition(row.answer_prefix)
    assert start
    rest, dot, after = after.partition(".")
    return before, start + rest + dot, after


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_sample_has_exactly_its_length_and_depth(name):
    grid = table("900,1301x4", TOKENIZERS[name])
    assert list(grid["length"]) == [900] * 4 + [1301] * 4
    assert list(grid["depth"]) == [0, 1 / 3, 2 / 3, 1] * 2
    for row in grid.itertuples():
        assert tokens(TOKENIZERS[name], row.context) == row.length
        before, needle, after = parts(row)
        assert all(key in needle for key in row.answer)
        hay = len(before.strip()) + len(after.strip())
        # Half of a sentence at most: the longest has about 300 characters.
        assert abs(len(before) - row.depth * hay) <= 150
        assert before == "" if row.depth == 0 else before.rstrip()[-1] == "."
        assert (after == "") == (row.depth == 1)


def test_the_default_grid_is_for_8k_positions():
    grid = table()
    assert list(dict.fromkeys(grid["length"])) == [1000, 2000, 4000, 7000]
    assert list(dict.fromkeys(grid["depth"])) == [0, 0.25, 0.5, 0.75, 1]
    assert len(grid) == 20
    assert set(grid["task"]) == {"needle-sentence"}
    assert set(grid["metric"]) == {"string_match"}


def test_one_haystack_and_a_fresh_needle_for_each_depth():
    grid = table("400x5")
    needles = [parts(row)[1] for row in grid.itertuples()]
    assert len(set(needles)) == 5
    hays = [
        row.context.replace(needle, "").split()
        for row, needle in zip(grid.itertuples(), needles, strict=True)
    ]
    for hay in hays:
        assert hay[-300:] == hays[0][-300:]
    assert not any(character.isdigit() for character in "".join(grid["context"]))


def test_a_seed_says_everything_and_another_seed_something_else():
    one, again, other = table("300x3"), table("300x3"), table("300x3", seed=1)
    assert one.equals(again)
    assert not set(one["context"]) & set(other["context"])
    assert [parts(row)[1] for row in one.itertuples()] != [
        parts(row)[1] for row in other.itertuples()
    ]
    assert list(table("300,600x3")["context"][:3]) == list(one["context"])


def test_a_number_is_asked_for_by_its_owner():
    grid = table("number-300x2")
    for row in grid.itertuples():
        (number,) = row.answer
        assert number.isdigit() and len(number) == 7
        assert row.context.count(f"{row.answer_prefix} {number}.") == 1
        owner = row.answer_prefix.removeprefix("The secret number of the ").removesuffix(" is")
        assert f"the secret number of the {owner}?" in row.question
        assert number not in row.question
        assert NEEDLE.metrics[row.metric](f"it is {number}", row.answer, []) == 1


def test_rouge_judges_the_rest_of_the_sentence():
    grid = table("rouge-300x1")
    assert list(grid["depth"]) == [0.5]
    row = next(grid.itertuples())
    assert row.metric == "rouge_1_recall"
    assert row.context.count(f"{row.answer_prefix} {row.answer[0]}") == 1
    assert NEEDLE.metrics["rouge_1_recall"](row.answer[0], row.answer, []) == 1


def test_a_kind_alone_takes_the_default_grid():
    assert len(table("number")) == 20


def test_the_score_is_the_share_of_key_words():
    score = NEEDLE.metrics["string_match"]
    keys = ["scarlet", "teapot", "sofa"]
    assert score("a Scarlet teapot under the sofa", keys, []) == 1
    assert score("some teapot, I think", keys, []) == 1 / 3


def test_rouge_1_recall_counts_stems():
    # Of "a scarlet teapot under the sofa" these are a, teapot(s), the and sofa: 4 of 6.
    assert rouge_1_recall("A lot of teapots on the sofa", ["a scarlet teapot under the sofa."]) == (
        pytest.approx(4 / 6)
    )
    assert rouge_1_recall("", ["a kettle"]) == 0
    assert rouge_1_recall("a kettle", ["no match", "a kettle"]) == 1


def test_the_haystack_may_be_a_folder_of_texts(tmp_path):
    (tmp_path / "b.txt").write_text("The last essay ends here.")
    (tmp_path / "a.txt").write_text(ESSAY)
    (tmp_path / "c.md").write_text("Never read.")
    grid = table("200x3", TOKENIZERS["pieces"], folder=tmp_path)
    endless = " ".join(f"{ESSAY} The last essay ends here. ".split() * 9)
    for row in grid.itertuples():
        before, _, after = parts(row)
        assert tokens(TOKENIZERS["pieces"], row.context) == 200
        assert " ".join(f"{before} {after}".split()) in endless
        assert before == "" if row.depth == 0 else before.rstrip()[-1] in ".!?e"


@pytest.mark.parametrize(
    ("data_dir", "message"),
    [
        ("1000", "got data_dir='1000', wanted lengths x number of depths"),
        ("1000x0", "wanted lengths"),
        ("word-1000x2", "wanted lengths"),
        ("1000,x2", "wanted lengths"),
        ("20x2", "got length 20, wanted at least"),
    ],
)
def test_a_grid_that_cannot_be_is_one_clear_line(data_dir, message):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        table(data_dir)
    assert "\n" not in str(caught.value)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(cp.CachepressError, match="has no .txt file with text"):
        table("100x1", folder=tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(cp.CachepressError, match="a .txt file cannot be read"):
        table("100x1", folder=tmp_path)
