"""How rows of data become contexts and questions, and those become prompts."""

import json

import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.run import Run
from cachepress.evaluation.samples import contexts_of, load_table
from tests.tiny import tokenizer, words

LONGBENCH_ROW = {
    "input": "w5",
    "context": "w6 w7",
    "answers": ["w8"],
    "length": 2,
    "all_classes": ["w8", "w9"],
}
WITHOUT_CHAT = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
WITHOUT_CHAT_E = ["trec_e", "triviaqa_e", "samsum_e", "lcc_e", "repobench-p_e"]


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def contexts(dataset, folder=None, part=None, **options):
    config = EvaluationConfig(dataset=dataset, data_dir=part, data_path=folder, **options)
    return contexts_of(load_table(config, tokenizer()))


def options_of(dataset, folder=None, part=None, **options):
    (context,) = contexts(dataset, folder, part, **options)
    return context.prompt_options(EvaluationConfig(dataset=dataset, **options))


@pytest.mark.parametrize("task", WITHOUT_CHAT)
def test_longbench_asks_some_tasks_without_the_chat_template(tmp_path, task):
    save(tmp_path / f"{task}.jsonl", LONGBENCH_ROW)
    assert options_of("longbench", str(tmp_path), task).chat is False
    assert options_of("longbench", str(tmp_path), task, chat=True).chat is True


@pytest.mark.parametrize("task", WITHOUT_CHAT_E)
def test_longbench_e_as_well(tmp_path, task):
    save(tmp_path / f"{task}.jsonl", LONGBENCH_ROW)
    assert options_of("longbench-e", str(tmp_path), task).chat is False


def test_the_others_are_asked_in_the_chat_template(tmp_path):
    save(tmp_path / "qasper.jsonl", LONGBENCH_ROW)
    assert options_of("longbench", str(tmp_path), "qasper").chat is True
    assert options_of("longbench", str(tmp_path), "qasper", chat=False).chat is False


@pytest.mark.parametrize(
    ("task", "chat", "way"),
    [
        ("trec", False, "middle"),
        ("trec_e 0-4k", False, "middle"),
        ("repobench-p_e", False, "middle"),
        ("hotpotqa", True, "middle"),
        ("passkey", True, "middle"),
        ("shortdep_cloze", True, "middle"),
        ("scbench_repoqa_and_kv/scbench_kv", True, "middle"),
        ("a task of my own", True, "end"),
    ],
)
def test_a_local_table_is_asked_as_the_benchmark_of_its_task_asks(tmp_path, task, chat, way):
    path = tmp_path / "table.jsonl"
    row = {"context": "w6", "question": "w5", "answer": "w8", "metric": "string_match"}
    save(path, {**row, "task": task})
    options = options_of(str(path), truncation=True)
    assert (options.chat, options.truncation) == (chat, way)
    # What the table itself says comes first, and what the user says before that.
    own = {"chat": not chat, "truncation": "end", "separator": "..."}
    save(path, {**row, "task": task, **own})
    options = options_of(str(path), truncation=True)
    assert (options.chat, options.truncation, options.separator) == (not chat, "end", "...")
    options = options_of(str(path), truncation="middle", chat=chat)
    assert (options.chat, options.truncation) == (chat, "middle")


@pytest.mark.parametrize(("column", "value"), [("chat", "maybe"), ("truncation", "left")])
def test_a_table_that_says_nonsense_of_its_prompts_is_refused(tmp_path, column, value):
    path = tmp_path / "table.jsonl"
    save(path, {"context": "w6", "question": "w5", "answer": "w8", column: value})
    with pytest.raises(cp.CachepressError, match=f"table.jsonl: {column} of row 0 is '{value}'"):
        contexts(str(path))


def test_rows_of_one_text_that_are_asked_in_different_ways_are_different_contexts(tmp_path):
    path = tmp_path / "table.jsonl"
    row = {"context": "w6", "question": "w5", "answer": "w8"}
    save(path, row, {**row, "chat": False}, {**row, "question": "w4"})
    found = contexts(str(path))
    assert [(c.chat, [s.sample_id for s in c.samples]) for c in found] == [
        (True, [0, 2]),
        (False, [1]),
    ]


@pytest.mark.parametrize("middle", ["longbench", "longbench-e", "longbench-v2", "infinitebench"])
def test_where_benchmarks_cut_by_themselves(tmp_path, middle):
    part = {"longbench": "qasper", "longbench-e": "qasper_e", "infinitebench": "passkey"}
    if middle == "longbench-v2":
        row = {f"choice_{letter}": "w5" for letter in "ABCD"}
        row |= {"difficulty": "easy", "length": "short", "answer": "A", "question": "w5"}
        (tmp_path / "data.json").write_text(json.dumps([{**row, "context": "w6"}]))
    else:
        row = {**LONGBENCH_ROW, "answer": ["8"]}
        save(tmp_path / f"{part[middle]}.jsonl", row)
    one = (middle, str(tmp_path), part.get(middle))
    assert options_of(*one, truncation=True).truncation == "middle"
    assert options_of(*one, truncation="end").truncation == "end"
    assert options_of(*one).truncation is False


def test_zero_scrolls_cuts_the_end_and_says_so_before_its_question(tmp_path):
    document, query = "w1 w2 w3", "\n\nQuestion:\nw5?"
    row = {
        "id": "a",
        "input": document + query + "\n\nAnswer:\n",
        "document_end_index": len(document),
        "query_start_index": len(document) + 2,
        "query_end_index": len(document + query),
        "truncation_seperator": "... [cut]\n\n",
    }
    (tmp_path / "qasper").mkdir()
    save(tmp_path / "qasper" / "test.jsonl", row)
    options = options_of("zero_scrolls", str(tmp_path), "qasper", truncation=True)
    assert (options.truncation, options.separator) == ("end", "... [cut]")
    assert options.asked == [f"{query}\n\n"]


def test_query_aware_joins_text_and_question_as_they_are(tmp_path):
    path = tmp_path / "table.jsonl"
    row = {"context": "w6 w7.\n\n", "answer": "w8", "answer_prefix": "w9"}
    save(path, {**row, "question": "w5?"}, {**row, "question": "w4?"})
    found = contexts(str(path), query_aware=True)
    assert [context.text for context in found] == ["w6 w7.\n\nw5?", "w6 w7.\n\nw4?"]
    assert [context.suffix for context in found] == ["w5?", "w4?"]
    assert [sample.question for context in found for sample in context.samples] == ["", ""]


def test_the_same_texts_are_drawn_whether_or_not_the_press_sees_the_question(data_file):
    plain = load_table(EvaluationConfig(dataset=data_file, fraction=0.5, seed=3), tokenizer())
    config = EvaluationConfig(dataset=data_file, fraction=0.5, seed=3, query_aware=True)
    aware = load_table(config, tokenizer())
    assert list(plain.index) == list(aware.index)
    assert len(plain) == 4


def test_scbench_without_chat_joins_its_turns_as_plain_text(tmp_path):
    turns = [{"input": "w5", "answer": "w6"}, {"input": "w7", "answer": "w8"}]
    save(tmp_path / "scbench_kv.jsonl", {"context": "w9", "multi_turns": turns})
    (context,) = contexts("scbench", str(tmp_path), "scbench_kv", chat=False)
    assert [s.question for s in context.samples] == ["\n\nw5", "\n\nw5w6\n\nw7"]
    assert context.chat is False


def test_perplexity_has_no_chat_template(tmp_path):
    (tmp_path / "text.txt").write_text(words(30))
    given = ("perplexity", str(tmp_path / "text.txt"), "5-3x2")
    assert [context.chat for context in contexts(*given)] == [False, False]
    with pytest.raises(cp.CachepressError, match="in no chat template: leave --chat out"):
        contexts(*given, chat=True)


def test_how_a_text_is_asked_is_in_the_key_of_its_records(tmp_path):
    path = tmp_path / "table.jsonl"
    row = {"context": "w6 w7", "question": "w5", "answer": "w8"}
    save(path, row)

    def key(table, **options):
        save(path, *table)
        config = EvaluationConfig(dataset=str(path), **options)
        (context,) = contexts_of(load_table(config, tokenizer()))
        run = Run(config)
        run.identify({}, config.model)
        return run.key(context, context.samples[0]), context.departures(config)

    plain, nothing = key([row])
    assert nothing == {}
    assert key([{**row, "truncation": "middle", "separator": "..."}]) == (plain, {})
    cut, nothing = key([row], truncation=True)
    assert nothing == {}
    other, said = key([{**row, "truncation": "middle", "separator": "..."}], truncation=True)
    assert said == {"truncation": "middle", "separator": "..."}
    bare, chat = key([{**row, "chat": False}])
    assert chat == {"chat": False}
    assert len({plain, cut, other, bare}) == 4
