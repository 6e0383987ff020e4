import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cachepress.errors import CachepressError
from cachepress.evaluation.tasks.builtin import COLUMNS, DEFAULT_TASKS, TASKS, generate
from cachepress.evaluation.tasks.builtin_text import (
    NOUNS,
    REPEATED,
    distinct_nouns,
    ordinary_words,
    prose_paragraphs,
)

PHONE = re.compile(r"Phone number of the (\w+): (\d+)\.")
PUT = re.compile(r"Put (\w+) into (\w+)\.")
PHONE_TASKS = ["single_repeat", "single_prose", "multi_key", "multi_value", "multi_query"]
SINGLE_QUESTION = ["single_repeat", "single_prose", "multi_value", "common_words", "frequent_words"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    backend.train_from_iterator((" ".join(p) for p in prose_paragraphs()), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


TOKENIZERS = {
    "words": words_tokenizer(),
    "bytes": bytes_tokenizer(),
    "pieces": pieces_tokenizer(),
}
WORDS = TOKENIZERS["words"]


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def minimum(tokenizer: PreTrainedTokenizerFast, task: str, questions: int) -> int:
    with pytest.raises(CachepressError) as caught:
        generate(tokenizer, tasks=[task], length=1, contexts=2, questions=questions)
    return int(re.search(r"at least (\d+) tokens", str(caught.value))[1])


def test_table_has_the_columns_of_a_data_set():
    table = generate(WORDS, tasks=list(TASKS), length=400, contexts=2, questions=3)
    assert list(table.columns) == [
        "context",
        "question",
        "answer",
        "answer_prefix",
        "max_new_tokens",
        "task",
        "length",
        "depth",
    ]
    assert tuple(table.columns) == COLUMNS
    assert list(table.index) == list(range(len(table)))
    assert list(dict.fromkeys(table["task"])) == list(TASKS)
    assert all(type(answer) is list and answer for answer in table["answer"])
    assert all(type(text) is str for answer in table["answer"] for text in answer)
    assert all(depth is None or 0 <= depth <= 1 for depth in table["depth"])


def test_default_is_ten_contexts_of_the_default_tasks():
    table = generate(WORDS)
    assert set(DEFAULT_TASKS) <= set(TASKS)
    assert dict(table.groupby("task")["context"].nunique()) == dict.fromkeys(DEFAULT_TASKS, 10)


@pytest.mark.parametrize("task", TASKS)
def test_number_of_questions(task):
    table = generate(WORDS, tasks=[task], length=600, contexts=3, questions=5)
    asked = 1 if task in SINGLE_QUESTION else 5
    assert table.groupby("context", sort=False).size().tolist() == [asked] * 3
    assert len(set(zip(table["context"], table["question"], strict=True))) == 3 * asked
    changes = sum(before != after for before, after in pairwise(table["context"]))
    assert changes == 2


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("task", TASKS)
def test_length_is_nearly_what_was_asked_for(task, name):
    tokenizer = TOKENIZERS[name]
    least = minimum(tokenizer, task, questions=4)
    for length in (least, least + 1, least * 2 + 7, 3000):
        table = generate(tokenizer, tasks=[task], length=length, contexts=2)
        for context, given_length in zip(table["context"], table["length"], strict=True):
            assert given_length == tokens(tokenizer, context)
            assert 0.95 * length <= given_length <= length


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    task=st.sampled_from(list(TASKS)),
    length=st.integers(1, 4000),
    questions=st.integers(1, 8),
    seed=st.integers(),
)
def test_any_length_fits_or_is_refused(name, task, length, questions, seed):
    tokenizer = TOKENIZERS[name]
    options = {"tasks": [task], "contexts": 1, "questions": questions, "seed": seed}
    try:
        table = generate(tokenizer, length=length, **options)
    except CachepressError as error:
        least = int(re.search(r"at least (\d+) tokens", str(error))[1])
        assert length < least
        table, length = generate(tokenizer, length=least, **options), least
    assert 0.95 * length <= tokens(tokenizer, table["context"][0]) <= length
    assert set(table["length"]) == {tokens(tokenizer, table["context"][0])}


def test_minimum_is_exact():
    least = minimum(WORDS, "multi_key", questions=4)
    options = {"tasks": ["multi_key"], "contexts": 2}
    assert len(generate(WORDS, length=least, **options)) == 8
    with pytest.raises(CachepressError, match=f"got {least - 1}, wanted at least {least} tokens"):
        generate(WORDS, length=least - 1, **options)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_table_other_seed_other_table(task):
    options = {"tasks": [task], "length": 500, "contexts": 2}
    table = generate(WORDS, **options, seed=3)
    assert table.equals(generate(WORDS, **options, seed=3))
    other = generate(WORDS, **options, seed=4)
    assert not set(table["context"]) & set(other["context"])
    assert table["answer"].tolist() != other["answer"].tolist()


def test_a_context_does_not_depend_on_other_tasks_or_contexts():
    alone = generate(WORDS, tasks=["multi_query"], length=500, contexts=2)
    among = generate(WORDS, tasks=list(TASKS)[::-1], length=500, contexts=5)
    same = among[among["task"] == "multi_query"].head(len(alone)).reset_index(drop=True)
    assert same.equals(alone)
    assert among["context"].nunique() == 5 * len(TASKS)


def test_needles_are_the_same_at_every_length():
    short, long = (generate(WORDS, tasks=["multi_key"], length=n) for n in (300, 900))
    assert short["question"].tolist() == long["question"].tolist()
    assert short["answer"].tolist() == long["answer"].tolist()


@pytest.mark.parametrize("task", PHONE_TASKS)
def test_answers_are_the_numbers_of_what_is_asked_for(task):
    table = generate(WORDS, tasks=[task], length=500, contexts=6)
    for row in table.itertuples():
        book = PHONE.findall(row.context)
        asked = re.findall(r"of the (\w+)", row.question)
        assert row.answer == [number for noun in asked for key, number in book if key == noun]
        assert len(asked) == (2 if task == "multi_query" else 1)
        for number in row.answer:
            assert row.context.count(number) == 1
            assert re.fullmatch(r"\d{7}", number)
            assert number not in row.question + row.answer_prefix


@pytest.mark.parametrize(
    ("task", "nouns", "numbers"),
    [
        ("single_repeat", 1, 1),
        ("single_prose", 1, 1),
        ("multi_key", 5, 5),
        ("multi_value", 1, 4),
        ("multi_query", 5, 5),
    ],
)
def test_number_of_needles(task, nouns, numbers):
    for context in set(generate(WORDS, tasks=[task], length=500, questions=5)["context"]):
        book = PHONE.findall(context)
        assert len({noun for noun, _ in book}) == nouns
        assert len({number for _, number in book}) == len(book) == numbers


def test_one_question_still_has_distractors():
    (context,) = generate(WORDS, tasks=["multi_key"], contexts=1, questions=1)["context"]
    assert len(PHONE.findall(context)) == 4


@pytest.mark.parametrize("task", PHONE_TASKS)
def test_an_answer_continues_its_prefix(task):
    for row in generate(WORDS, tasks=[task], length=500, contexts=4).itertuples():
        noun = re.findall(r"of the (\w+)", row.answer_prefix)[-1]
        assert noun == re.findall(r"of the (\w+)", row.question)[0]
        assert row.answer_prefix.endswith(("1.", f"{noun}:"))


def run(context: str) -> dict[str, str]:
    """Execute the assignments of a context."""
    held: dict[str, str] = {}
    for source, target in PUT.findall(context):
        assert target not in held
        held[target] = source if source.isdigit() else held[source]
    return held


@pytest.mark.parametrize("questions", [1, 4])
def test_chains_hold_what_the_answer_says(questions):
    options = {"tasks": ["variable_tracking"], "length": 500, "questions": questions}
    for row in generate(WORDS, **options).itertuples():
        held = run(row.context)
        (number,) = re.findall(r"\d{7}", row.question)
        assert sorted(row.answer) == sorted(name for name in held if held[name] == number)
        assert len(row.answer) == 3
        assert len(held) == 3 * max(2, questions)
        assert row.answer_prefix == f"Put {number} into"
        first = row.context.index(f"Put {number} into {row.answer[0]}.")
        second = row.context.index(f"Put {row.answer[0]} into {row.answer[1]}.")
        third = row.context.index(f"Put {row.answer[1]} into {row.answer[2]}.")
        assert first < second < third
        for name in row.answer:
            assert row.context.lower().count(name.lower()) == (1 if name == row.answer[2] else 2)


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
@pytest.mark.parametrize("length", [350, 2000, 20_000])
def test_answer_is_the_three_words_that_occur_most(task, length):
    if length == 350:
        length = max(length, minimum(WORDS, task, 1))
    for row in generate(WORDS, tasks=[task], length=length, contexts=3).itertuples():
        intro, listed = row.context.split("\n\n", 1)
        counts = Counter(listed.split())
        ranked = counts.most_common()
        assert sorted(word for word, _ in ranked[:3]) == sorted(row.answer)
        assert ranked[2][1] > ranked[3][1]
        assert not any(word in intro for word in row.answer)
        for word in row.answer:
            assert [other for other in counts if word in other] == [word]
        if task == "common_words":
            assert {counts[word] for word in row.answer} == {len(listed.split()) // 8}
        else:
            assert row.answer == [word for word, _ in ranked[:3]]


def test_frequency_falls_with_the_rank_like_a_power():
    (context,) = generate(WORDS, tasks=["frequent_words"], length=20_000, contexts=1)["context"]
    counts = sorted(Counter(context.split("\n\n", 1)[1].split()).values(), reverse=True)
    assert len(counts) == 50
    for rank in (2, 3, 10, 40):
        assert counts[rank - 1] / counts[0] == pytest.approx(rank**-1.5, rel=0.05)


@pytest.mark.parametrize("task", ["single_repeat", "single_prose", "multi_key"])
@pytest.mark.parametrize("contexts", [5, 10, 40])
def test_depths_spread_evenly_and_are_where_the_needles_are(task, contexts):
    table = generate(WORDS, tasks=[task], length=2000, contexts=contexts)
    for row in table.itertuples():
        place = row.context.index(row.answer[0]) / len(row.context)
        assert row.depth == pytest.approx(place, abs=0.01)
    depths = sorted(table["depth"])
    gaps = [after - before for before, after in pairwise([0.0, *depths, 1.0])]
    assert max(gaps) < 2.5 / contexts


@pytest.mark.parametrize(
    "task", sorted(set(TASKS) - {"single_repeat", "single_prose", "multi_key"})
)
def test_no_depth_where_the_answer_is_in_several_places(task):
    table = generate(WORDS, tasks=[task], length=500, contexts=2)
    assert table["depth"].tolist() == [None] * len(table)


def test_several_needles_lie_one_in_each_part():
    for context in set(generate(WORDS, tasks=["multi_value"], length=2000)["context"]):
        places = [match.start() / len(context) for match in PHONE.finditer(context)]
        gaps = [after - before for before, after in pairwise(places)]
        assert gaps == pytest.approx([0.25] * 3, abs=0.03)


def test_max_new_tokens_is_enough_for_a_perfect_answer_and_little_more():
    table = generate(TOKENIZERS["bytes"], tasks=["single_repeat", "multi_value"], contexts=1)
    one, four = table["max_new_tokens"]
    assert one == len(" 1234567.") * 5 // 4 + 2
    assert four == len(" 1234567\n2. 1234567\n3. 1234567\n4. 1234567") * 5 // 4 + 2


def test_contexts_end_apart_from_the_question():
    for row in generate(WORDS, tasks=list(TASKS), length=500, contexts=1).itertuples():
        assert row.context.endswith("\n\n")
        assert row.question.endswith(("?", "?" + " List them in order."))
        assert row.context.startswith(("Read the text", "In the text", "Below is"))


def test_filler_of_the_repeating_task_is_only_its_sentences():
    (context,) = generate(WORDS, tasks=["single_repeat"], contexts=1)["context"]
    body = PHONE.sub("", context.split("\n\n", 1)[1])
    sentences = re.findall(r"[^.]+\.", body)
    assert {" ".join(sentence.split()) for sentence in sentences} == set(REPEATED)


def test_prose_is_plain_and_never_repeats():
    sentences = [sentence for paragraph in prose_paragraphs() for sentence in paragraph]
    assert len(sentences) == len(set(sentences)) > 1000
    assert sum(map(len, sentences)) > 100_000
    for sentence in sentences:
        assert sentence[0].isupper()
        assert sentence.endswith(".")
        assert not re.search(r"[\d`\"*=\n]|  ", sentence)


def test_vocabulary():
    assert len(NOUNS) == len(set(NOUNS)) >= 70
    assert len(ordinary_words()) > 1000
    assert all(re.fullmatch("[a-z]{4,9}", word) for word in ordinary_words())
    assert len(distinct_nouns()) > 50
    assert not set(distinct_nouns()) & set(ordinary_words())
    assert [noun for noun in NOUNS if noun in " ".join(REPEATED)] == []


def test_longest_context_repeats_the_prose_instead_of_running_out():
    table = generate(WORDS, tasks=["single_prose"], length=60_000, contexts=1)
    assert 57_000 <= table["length"][0] <= 60_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["multi_key", "nothing"]}, "unknown task 'nothing': wanted one of single_rep"),
        ({"tasks": "multi_key"}, "tasks: got 'multi_key', wanted a list of names"),
        ({"tasks": []}, "tasks: got [], wanted a list of names"),
        ({"contexts": 0}, "contexts: got 0, wanted at least 1"),
        ({"questions": 0}, "questions: got 0, wanted 1 to "),
        ({"questions": 1000}, "questions: got 1000, wanted 1 to "),
        ({"length": 0}, "length: got 0, wanted at least "),
        ({"length": -5}, "length: got -5, wanted at least "),
    ],
)
def test_errors_are_one_clear_line(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        generate(WORDS, **options)
    assert "\n" not in str(caught.value)


def test_most_questions_work():
    table = generate(WORDS, tasks=list(TASKS), length=9000, contexts=1, questions=len(NOUNS))
    assert len(table) == 5 + 3 * len(NOUNS)


def test_every_task_says_what_it_is():
    for draft in TASKS.values():
        assert re.fullmatch(r"[A-Z][^\n]+\.", draft.__doc__)
