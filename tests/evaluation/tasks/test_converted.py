"""Tables that kvpress converted: read as they are, and judged by the benchmark's own metric."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cachepress as cp
from cachepress.evaluation import EvaluationConfig
from cachepress.evaluation.registry import METRIC_REGISTRY, TASKS, check_metric, find_dataset
from cachepress.evaluation.samples import contexts_of, load_table
from cachepress.evaluation.tasks.converted import OFFICIAL
from cachepress.evaluation.tasks.files import load_file
from tests.tiny import tokenizer

COMMON = {"context": "A text.\n\n", "question": "Question: Who?\n", "answer_prefix": "Answer:"}
LONGBENCH = {**COMMON, "length": 5, "dataset": "x", "language": "en", "_id": "1"}


def table(path, *rows, **types):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    pq.write_table(pa.table({k: pa.array(v, types.get(k)) for k, v in columns.items()}), path)
    return load_file(path)


def judge(row, prediction):
    check_metric(row["metric"], row["answer"], row["choices"])
    return METRIC_REGISTRY[row["metric"]](prediction, row["answer"], row["choices"])


def test_ruler(tmp_path):
    limit = {"max_new_tokens": 32}
    rows = [
        {**COMMON, **limit, "task": "qa_1", "answer": ["Denver", "Denver Broncos", "The Broncos"]},
        {**COMMON, **limit, "task": "niah_multivalue", "answer": ["11", "22"]},
        {**COMMON, **limit, "task": "vt", "answer": ["AB", "CD"]},
    ]
    found = table(tmp_path / "4096" / "test-00000-of-00001.parquet", *rows)
    assert list(found["metric"]) == ["ruler_part", "ruler_all", "ruler_all"]
    assert list(found["task"]) == ["qa_1", "niah_multivalue", "vt"]
    assert list(found["max_new_tokens"]) == [32, 32, 32]
    assert [judge(found.iloc[0], text) for text in ("Denver", "denver!", "Boston")] == [1, 1, 0]
    assert judge(found.iloc[1], "11") == 0.5


@pytest.mark.parametrize(
    ("task", "answers", "prediction", "wanted"),
    [
        ("hotpotqa", ["Bob"], "the Bob.", 1),
        ("narrativeqa", ["a red ship", "blue"], "red", 2 / 3),
        ("gov_report", ["alpha beta"], "alpha beta", 1),
        ("passage_count", ["7"], "There are 7 or 8.", 0.5),
        ("passage_retrieval_en", ["Paragraph 12"], "Paragraph 12", 1),
        ("lcc", ["x = 1"], "# so\nx = 1\ny", 1),
        ("triviaqa", ["Bob"], "Bob\nAnother question", 1),
    ],
)
def test_longbench(tmp_path, task, answers, prediction, wanted):
    row = {**LONGBENCH, "task": task, "answers": answers, "all_classes": None, "max_new_tokens": 52}
    (_, found), *_ = table(tmp_path / "test.parquet", row).iterrows()
    assert (found["task"], found["answer"], found["choices"]) == (task, answers, [])
    assert judge(found, prediction) == pytest.approx(wanted, abs=1e-6)


def test_longbench_with_classes(tmp_path):
    classes = ["Food", "Number of something", "Distance"]
    row = {**LONGBENCH, "task": "trec", "answers": ["Food"], "all_classes": classes}
    found = table(tmp_path / "test.parquet", row).iloc[0]
    assert (found["metric"], found["choices"]) == ("longbench_classification", classes)
    assert [judge(found, text) for text in ("Food\nDistance", "Food or Distance")] == [1, 0.5]
    assert judge(found, "Distance") == 0


@pytest.mark.parametrize("number", [3999, 4000, 8000])
@pytest.mark.parametrize(
    ("folder", "name", "dataset", "task"),
    [
        ("x", "qasper_e", "qasper", "qasper"),
        ("qasper_e", "test", "qasper", "qasper"),
        ("x", "test", "qasper_e", "qasper"),
        ("x", "test", "qasper", "qasper-e"),
        ("x", "test", "qasper", "qasper_e"),
        ("x", "longbench-e", "qasper", "qasper"),
        ("LongBench_E", "test-00000-of-00001", "qasper", "qasper"),
    ],
)
def test_longbench_e_is_told_by_length(tmp_path, folder, name, dataset, task, number):
    row = {**LONGBENCH, "task": task, "dataset": dataset, "answers": ["yes"], "length": number}
    found = table(tmp_path / folder / f"{name}.parquet", row).iloc[0]
    bucket = {3999: "0-4k", 4000: "4-8k", 8000: "8k+"}[number]
    assert (found["task"], found["metric"]) == (f"qasper_e {bucket}", "qa_f1")


def test_longbench_e_that_is_told_by_length_already_stays_so(tmp_path):
    row = {**LONGBENCH, "task": "qasper_e 8k+", "answers": ["yes"], "length": 10}
    found = table(tmp_path / "t.parquet", row).iloc[0]
    assert (found["task"], found["metric"]) == ("qasper_e 8k+", "qa_f1")


def test_longbench_without_e_is_not_told_by_length(tmp_path):
    row = {**LONGBENCH, "task": "qasper", "dataset": "qasper", "answers": ["yes"]}
    assert table(tmp_path / "qasper.parquet", row)["task"][0] == "qasper"


def test_longbench_v2(tmp_path):
    options = {f"choice_{letter}": letter.lower() for letter in "ABCD"}
    about = {"domain": "Law", "difficulty": "hard", "length": "medium", "max_new_tokens": 16}
    row = {**COMMON, **options, **about, "answer": "A"}
    found = table(tmp_path / "0shot" / "test.parquet", row).iloc[0]
    assert (found["task"], found["metric"]) == ("hard-medium", "longbench_v2_choice")
    assert (found["length"], found["truncation"]) == (None, "middle")
    said = {"The correct answer is (B)": 0, "The correct answer is (A)": 1, "**A**": 0}
    assert [judge(found, text) for text in said] == list(said.values())


@pytest.mark.parametrize(
    ("task", "answer", "prediction", "wanted"),
    [
        ("passkey", ["71432"], "71432.", 1),
        ("kv_retrieval", ["0a-1b"], '"0a-1b"', 1),
        ("longdialogue_qa_eng", ["ACE"], "Ace", 1),
        ("longbook_choice_eng", ["C"], "C. Three", 1),
        ("longbook_choice_eng", ["C"], "Three", 1),
        ("longbook_choice_eng", ["C"], "A", 0),
        ("code_debug", ["B"], "B. two", 1),
        ("code_debug", ["B"], "The answer is: two", 1),
        ("code_debug", ["B"], "C. Three", 0),
        ("code_run", ["-7"], "It is -7", 1),
        ("math_find", ["3.5"], "3.5", 1),
        ("math_calc", ["1", "4", "8"], "[1, 4, 9]", 2 / 3),
    ],
)
def test_infinitebench(tmp_path, task, answer, prediction, wanted):
    question = "Which?\n\nOptions:\nA. One\nB. two\nC. Three\nD. Four"
    row = {**COMMON, "question": question, "task": task, "answer": answer, "max_new_tokens": 60}
    assert judge(table(tmp_path / "t.parquet", row).iloc[0], prediction) == wanted


def test_a_right_option_that_is_not_listed_is_refused_before_anything_is_asked(tmp_path):
    row = table(tmp_path / "t.parquet", {**COMMON, "task": "code_debug", "answer": ["B"]}).iloc[0]
    with pytest.raises(cp.CachepressError, match="wanted two texts, what the right option says"):
        check_metric(row["metric"], row["answer"], row["choices"])


def test_loogle(tmp_path):
    names = '{"<mask-0>": "Ada", "<mask-1>": "Mill Hill"}'
    rows = [
        {**COMMON, "task": "shortdep_cloze", "answer": names, "max_new_tokens": 50},
        {**COMMON, "task": "longdep_summarization", "answer": "A ship sails.", "question": ""},
        {**COMMON, "task": "longdep_qa", "answer": "A ship."},
    ]
    found = table(tmp_path / "t.parquet", *rows)
    assert [list(row) for row in found["answer"]] == [[names], ["A ship sails."], ["A ship."]]
    assert judge(found.iloc[0], "{'<mask-0>': 'Ada', '<mask-1>': 'x'}") == 0.5
    assert found["metric"][0] == "loogle_exact_match"
    assert list(found["truncation"]) == ["middle"] * 3
    assert found["metric"][1] == found["metric"][2] == OFFICIAL["longdep_qa"]
    assert judge(found.iloc[2], "A ship.") == pytest.approx(1)


def test_zero_scrolls(tmp_path):
    row = {**COMMON, "answer": "", "document_end_index": 8, "max_new_tokens": 128}
    rows = [
        {**row, "task": "qasper", "id": "a1"},
        {**row, "task": "qasper", "id": "a1"},
        {**row, "task": "gov_report", "id": "a1"},
    ]
    path = tmp_path / "t.parquet"
    found = table(path, *rows)
    assert list(found["metric"]) == ["unscored", "unscored"]
    assert list(found["answer"]) == [["a1"], ["a1"]]
    submit = find_dataset(str(path)).submit
    submit(found.assign(predicted_answer="x"), tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "gov_report.json",
        "qasper.json",
    ]


def test_zero_scrolls_is_cut_at_the_end_with_its_own_note(tmp_path):
    row = {**COMMON, "task": "qasper", "id": "a1", "answer": ""}
    row |= {"question": "\n\nQuestion: Who?", "truncation_seperator": "... [cut]\n\n"}
    found = table(tmp_path / "t.parquet", row, {**row, "id": "a2", "separator": "own"})
    assert list(found["truncation"]) == ["end", "end"]
    assert list(found["separator"]) == ["... [cut]", "own"]
    options = EvaluationConfig(dataset=str(tmp_path / "t.parquet"), truncation=True)
    (first, _) = contexts_of(load_table(options, tokenizer()))
    asked = first.prompt_options(options)
    assert (asked.truncation, asked.separator, asked.chat) == ("end", "... [cut]", True)


def test_zero_scrolls_without_ids_has_nothing_to_submit(tmp_path):
    path = tmp_path / "t.parquet"
    found = table(path, {**COMMON, "task": "quality", "answer": ""})
    assert list(found["answer"]) == [[]]
    find_dataset(str(path)).submit(found.assign(predicted_answer="x"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_answer_that_is_missing_among_others_is_no_private_answer(tmp_path):
    row = {**COMMON, "task": "qasper"}
    with pytest.raises(cp.CachepressError, match="row 1: the answer is empty"):
        table(tmp_path / "t.parquet", {**row, "answer": "yes"}, {**row, "answer": ""})


@pytest.mark.parametrize(
    "place", ["aime25.parquet", "datasets--someone--aime25/snapshots/0/data/test-00000.parquet"]
)
def test_aime25(tmp_path, place):
    row = {"context": "Solve.", "question": "", "answer_prefix": "", "answer": 70}
    found = table(tmp_path / place, {**row, "max_new_tokens": 32000}).iloc[0]
    assert found["answer"] == ["70"]
    assert found["metric"] == OFFICIAL["aime25"]
    assert [judge(found, rf"\boxed{{{n}}}") for n in ("70", "71")] == [1, 0]


@pytest.mark.parametrize("place", ["aime25/notes.parquet", "math500/data/my-facts.parquet"])
def test_files_with_names_of_their_own_are_no_benchmark_for_their_folder(tmp_path, place):
    found = table(tmp_path / place, {**COMMON, "answer": "Paris"}).iloc[0]
    assert (found["task"], found["metric"]) == (tmp_path.joinpath(place).stem, "string_match")


@pytest.mark.parametrize("name", ["test", "0000", "train-00000-of-00002", "data", "validation_1"])
def test_files_that_are_named_for_a_split_are_of_their_folder(tmp_path, name):
    path = tmp_path / "aime25" / "default" / f"{name}.parquet"
    found = table(path, {**COMMON, "answer": 70}).iloc[0]
    assert (found["task"], found["metric"]) == ("aime25", "boxed_integer")


@pytest.mark.parametrize("place", ["math500/data/test.parquet", "MATH-500.parquet", "x.parquet"])
def test_math500(tmp_path, place):
    about = {"subject": "Algebra", "level": 2, "unique_id": "test/1.json"}
    row = {**about, "context": "Solve.", "question": "", "answer_prefix": "", "answer": r"\frac12"}
    found = table(tmp_path / place, row).iloc[0]
    assert (found["task"], found["metric"]) == ("Algebra", "math_verify")
    assert [judge(found, rf"\boxed{{{n}}}") for n in ("0.5", "2")] == [1, 0]


def test_a_line_says_which_metric_is_official(tmp_path, caplog):
    caplog.set_level("INFO")
    row = {**COMMON, "answers": ["Bob"], "task": "hotpotqa"}
    table(tmp_path / "t.parquet", row, {**row, "task": "musique"})
    assert caplog.messages == [
        f"{tmp_path / 't.parquet'}: the official metric of hotpotqa, musique is qa_f1"
    ]


def test_a_metric_of_the_row_comes_before_the_official_one(tmp_path):
    rows = [
        {**COMMON, "task": "hotpotqa", "answer": "Bob", "metric": "string_match"},
        {**COMMON, "task": "hotpotqa", "answer": "Bob", "metric": None},
        {**COMMON, "task": "my own", "answer": "Bob", "metric": None},
    ]
    found = table(tmp_path / "t.parquet", *rows)
    assert list(found["metric"]) == ["string_match", "qa_f1", "string_match"]


def test_every_official_metric_is_one(caplog):
    assert set(OFFICIAL.values()) <= METRIC_REGISTRY.keys()
    for task in TASKS:
        assert set(task.fits) <= METRIC_REGISTRY.keys()
        assert set(task.official) <= OFFICIAL.keys()
