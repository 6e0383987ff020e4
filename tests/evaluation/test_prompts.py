"""Prompts in a user's own file: templates as benchmarks publish them, and texts of tables."""

import hashlib
import json

import pandas as pd
import pytest
import yaml

import cachepress as cp
from cachepress.cli import main
from cachepress.evaluation import EvaluationConfig, EvaluationRunner
from cachepress.evaluation.prompts import read_prompts
from cachepress.evaluation.run import CONFIG, RECORDS, Run
from cachepress.evaluation.samples import contexts_of, load_table
from cachepress.pages.report import write_report
from tests.pages.results import Page
from tests.tiny import tokenizer

LONGBENCH = {
    "input": "Who {wrote} it?",
    "context": "By {Ada}.",
    "answers": ["Ada"],
    "length": 2,
    "language": "en",
    "all_classes": ["x"],
}
V2 = {f"choice_{letter}": f" option {letter}" for letter in "ABCD"} | {
    "question": " Why? ",
    "context": " The text. ",
    "answer": "A",
    "difficulty": "easy",
    "length": "short",
}
DOLLARS = "Look: $DOC$\n\n{Not a name} $Q$ A $C_A$ B $C_B$ C $C_C$ D $C_D$."


def save(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(folder, dataset, part, prompts, **options):
    config = EvaluationConfig(
        dataset=dataset, data_dir=part, data_path=str(folder), prompts=str(prompts), **options
    )
    table = load_table(config, tokenizer())
    names = ["context", "question", "answer_prefix"]
    return [tuple(row) for row in table[names].itertuples(index=False)]


def templates(folder, found, name="own.json"):
    (folder / name).write_text(found if isinstance(found, str) else json.dumps(found))
    return folder / name


@pytest.mark.parametrize("task", ["hotpotqa", "trec"])
def test_longbench_s_templates(tmp_path, task):
    save(tmp_path / f"{task}.jsonl", LONGBENCH)
    own = templates(tmp_path, {task: "First {{x}} {language}: {context}\n\nQ: {input} ->"})
    wanted = ("First {x} en: By {Ada}.", "\n\nQ: Who {wrote} it? ->", "")
    assert rows_of(tmp_path, "longbench", task, own) == [wanted]


def test_longbench_e_has_the_templates_of_longbench(tmp_path):
    save(tmp_path / "qasper_e.jsonl", LONGBENCH)
    own = templates(tmp_path, {"qasper": "{context}?{input}"})
    asked = ("By {Ada}.", "?Who {wrote} it?", "")
    assert rows_of(tmp_path, "longbench-e", "qasper_e", own) == [asked]
    own = templates(tmp_path, {"qasper": "{context}?{input}", "qasper_e": "{context}!{input}"})
    asked = ("By {Ada}.", "!Who {wrote} it?", "")
    assert rows_of(tmp_path, "longbench-e", "qasper_e", own) == [asked]


def test_a_task_without_a_question_needs_none(tmp_path):
    save(tmp_path / "gov_report.jsonl", LONGBENCH)
    own = templates(tmp_path, {"gov_report": "Read {context} and sum it up."})
    asked = ("Read By {Ada}.", " and sum it up.", "")
    assert rows_of(tmp_path, "longbench", "gov_report", own) == [asked]


@pytest.mark.parametrize("braces", [False, True])
def test_longbench_v2_s_text(tmp_path, braces):
    (tmp_path / "data.json").write_text(json.dumps([V2]))
    text = DOLLARS
    if braces:
        text = "Look: {context}\n\n{{Not a name}} {question} A {A} B {B} C {choice_C} D {D}."
    own = templates(tmp_path, text, "0shot.txt")
    asked = "\n\n{Not a name} Why? A option A B option B C option C D option D."
    assert rows_of(tmp_path, "longbench-v2", None, own) == [("Look: The text.", asked, "")]


@pytest.mark.parametrize(
    ("task", "row", "template", "wanted"),
    [
        ("passkey", {}, "Find {context} then {input} is", ("Find T", " then W is")),
        ("longbook_qa_eng", {}, "{context} Q {question}", ("T", " Q W")),
        (
            "longbook_choice_eng",
            {"options": ["a", "b", "c", "d"], "answer": "b"},
            "{context} {question}: {OPTION_A}{OPTION_B}{OPTION_C}{OPTION_D}",
            ("T", " W: abcd"),
        ),
        (
            "code_run",
            {"input": "What is func_3(-7)?"},
            "In {func}: {context} {func_call} is",
            ("In func_3: T", " func_3(-7) is"),
        ),
        (
            "math_find",
            {"input": "The largest number is", "answer": 3},
            "Find {target}: {context} {input}",
            ("Find the largest number: T", " The largest number is"),
        ),
    ],
)
def test_infinitebench_s_templates(tmp_path, task, row, template, wanted):
    save(tmp_path / f"{task}.jsonl", {"context": "T", "input": "W", "answer": "1", **row})
    own = templates(tmp_path, {task: template})
    assert rows_of(tmp_path, "infinitebench", task, own) == [(*wanted, "")]


def test_templates_in_a_module_are_read_and_never_run(tmp_path):
    save(tmp_path / "passkey.jsonl", {"context": "T", "input": "W", "answer": "1"})
    text = f"""\ufeff
import nothing_that_exists
paths = {{"passkey": "passkey.jsonl"}}
open({str(tmp_path / "ran")!r}, "w")
long = {{"passkey": "One: {{context}} "  # A remark.
        "and {{input}}", "other": "x" + y}}
short: dict[str, str] = {{"passkey": "Two: " + "{{context}}" + "{{input}}"}}
"""
    own = templates(tmp_path, text, "prompt.py")
    for name, wanted in (("long", ("One: T", " and W")), ("short", ("Two: T", "W"))):
        assert rows_of(tmp_path, "infinitebench", "passkey", f"{own}:{name}") == [(*wanted, "")]
    with pytest.raises(cp.CachepressError, match="templates long, short: say which, such as"):
        read_prompts(str(own))
    with pytest.raises(cp.CachepressError, match=r"say which, such as prompt\.py:long"):
        read_prompts(f"{own}:none")
    assert not (tmp_path / "ran").exists()
    assert read_prompts(f"{own}:short").name == "prompt.py:short"


def test_loogle_s_templates(tmp_path):
    row = {"context": "T", "question": "W", "answer": "x"}
    save(tmp_path / "longdep_qa.jsonl", row)
    save(tmp_path / "longdep_summarization.jsonl", row)
    own = templates(
        tmp_path, {"longdep_qa": "On {input}: {Q}", "longdep_summarization": "Sum up {input}!"}
    )
    assert rows_of(tmp_path, "loogle", "longdep_qa", own) == [("On T", ": W", "")]
    assert rows_of(tmp_path, "loogle", "summarization", own) == [("Sum up T", "!", "")]


def test_scbench_s_templates_ask_every_turn(tmp_path):
    turns = [{"input": "A", "answer": "b"}, {"input": "C", "answer": "d"}]
    save(tmp_path / "scbench_kv.jsonl", {"context": "T", "multi_turns": turns})
    own = templates(tmp_path, {"scbench_kv": "See {context}\n\nKey {input}:"})
    found = rows_of(tmp_path, "scbench", "scbench_kv", own, chat=False)
    assert found == [
        ("See T", "\n\nKey A:", ""),
        ("See T", "\n\nKey A:b\n\nKey C:", ""),
    ]
    save(tmp_path / "own.jsonl", {"context": "See T"}, {"context": "See T"})
    with pytest.raises(cp.CachepressError, match="scbench: got the table own.jsonl"):
        rows_of(tmp_path, "scbench", "scbench_kv", tmp_path / "own.jsonl")


@pytest.mark.parametrize("dataset", ["aime25", "math500"])
def test_mathematics_is_one_text(tmp_path, dataset):
    save(tmp_path / f"{dataset}.jsonl", {"problem": " 1+1? ", "answer": "2", "subject": "s"})
    own = templates(tmp_path, "Solve {problem} in \\boxed{{}}.", "own.txt")
    assert rows_of(tmp_path, dataset, None, own) == [("Solve 1+1? in \\boxed{}.", "", "")]
    own = templates(tmp_path, {dataset: "Do {problem}"})
    assert rows_of(tmp_path, dataset, None, own) == [("Do 1+1?", "", "")]


@pytest.mark.parametrize("suffix", [".txt", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, suffix):
    save(tmp_path / "qasper.jsonl", LONGBENCH)
    text = {
        ".txt": "See {context}\r\n{input}",
        ".json": json.dumps({"qasper": "See {context}\r\n{input}"}),
        ".csv": 'context,question\nSee By {Ada}.,"\r\nWho {wrote} it?"\n',
    }[suffix]
    (tmp_path / f"own{suffix}").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = rows_of(tmp_path, "longbench", "qasper", tmp_path / f"own{suffix}")
    assert found == [("See By {Ada}.", "\r\nWho {wrote} it?", "")]


def test_rows_of_a_local_file_in_the_templates_of_their_tasks(tmp_path):
    path = tmp_path / "t.jsonl"
    row = {"context": "T", "question": "W", "answer": "x", "answer_prefix": "So"}
    save(path, {**row, "task": "a"}, {**row, "task": "b_e 0-4k"})
    own = templates(tmp_path, {"a": "A {context}{question}", "b": "B {context} {input}"})
    found = rows_of(tmp_path, str(path), None, own)
    assert found == [("A T", "W", ""), ("B T", " W", "")]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_the_columns_of_a_converted_table(tmp_path, suffix):
    save(tmp_path / "qasper.jsonl", LONGBENCH, {**LONGBENCH, "context": "By {Bob}."})
    rows = pd.DataFrame(
        {
            "context": ["Read By {Ada}. Now", "Read By {Bob}. Now"],
            "question": ["Q1", "Q2"],
            "answer_prefix": ["A:", ""],
            "max_new_tokens": [148, 149],
        }
    )
    own = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        rows.to_parquet(own)
    elif suffix == ".csv":
        rows.to_csv(own, index=False)
    else:
        rows.to_json(own, orient="records", lines=True)
    found = rows_of(tmp_path, "longbench", "qasper", own)
    assert found == [("Read By {Ada}. Now", "Q1", "A:"), ("Read By {Bob}. Now", "Q2", "")]
    config = EvaluationConfig(
        dataset="longbench", data_dir="qasper", data_path=str(tmp_path), prompts=str(own)
    )
    assert list(load_table(config, tokenizer())["max_new_tokens"]) == [148, 149]


def test_the_prompt_column_of_a_table_is_split_behind_the_document(tmp_path):
    path = tmp_path / "t.parquet"
    whole = {"prompt": ["Read T. Then say W:", "See U. W?"]}
    pd.DataFrame({"context": ["T.", "U."], "question": "W", "answer": "x", **whole}).to_parquet(
        path
    )
    found = rows_of(tmp_path, str(path), None, path)
    assert found == [("Read T.", " Then say W:", ""), ("See U.", " W?", "")]


GOOD = "{context} {input}"
BAD = [
    ("own.json", {"trec": GOOD}, "own.json has no prompt for the task 'qasper': it has trec"),
    ("own.json", {"qasper": "{input}"}, r"prompt of qasper names \{context\} 0 times, wanted once"),
    ("own.json", {"qasper": GOOD + "{context}"}, r"names \{context\} 2 times"),
    ("own.json", {"qasper": "{context}"}, r"has no \{input\}: what is asked would be missing"),
    ("own.json", {"qasper": GOOD + "{who}"}, r"names \{who\}: wanted one of \{input\}"),
    ("own.json", {"qasper": GOOD + "{"}, "prompt of qasper: .* a brace is written twice"),
    ("own.json", {"qasper": GOOD + "{input.x}"}, r"got \{input.x\}, wanted a plain name"),
    ("own.json", {"qasper": GOOD + "{input!r:>9}"}, r"got \{input!r:>9\}, wanted a plain name"),
    ("own.json", {"qasper": GOOD + "{}"}, r"got \{\}, wanted a plain name"),
    ("own.json", {"qasper": 128}, "the prompt of 'qasper' is '128', wanted a text"),
    ("own.json", {}, r"holds no mapping from tasks to templates"),
    ("own.json", "[1]", r"holds no mapping from tasks to templates"),
    ("own.json", "{broken", "own.json is not JSON"),
    ("own.json", "[" * 100_000, "own.json is not JSON"),
    ("own.py", "a = {", "own.py is not Python"),
    (
        "own.py",
        "a = 3",
        r"^prompts: \S+own.py has the templates nothing: say which, such as own.py:",
    ),
    (
        "own.yaml",
        "qasper: x",
        r"^prompts: got \S+own.yaml: wanted \{task: template\} in .json or .py, a template in .txt",
    ),
    ("own.csv", "a,b\n1,2\n", "has no column 'prompt' or 'context': it has a, b"),
    ("own.csv", "prompt\nx By {Ada}. y\nz\n", "own.csv has 2 rows, and the data set has 1"),
    ("own.csv", "context\nanother\n", "own.csv, row 0: context does not hold the text"),
    ("own.csv", "prompt\nanother\n", "own.csv, row 0: prompt does not hold the text"),
    ("own.csv", "context,max_new_tokens\nBy {Ada}.,many\n", "max_new_tokens is 'many'"),
    ("own.csv", "context,max_new_tokens\nBy {Ada}.,²\n", "max_new_tokens is '²'"),
    ("own.csv", f"context,max_new_tokens\nBy {{Ada}}.,{'9' * 5000}\n", "is '9{40}', wanted"),
    ("own.jsonl", '{"prompt": ["By {Ada}.", "x"]}', r"own.jsonl, row 0: prompt is a list, wanted"),
    ("own.jsonl", '{"context": "By {Ada}.", "question": 3}', "row 0: question is a int, wanted"),
    ("own.json", {"qasper": GOOD + "{answers}"}, r"names \{answers\}: wanted one of \{input\}"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_a_bad_file_is_one_clear_line(tmp_path, name, text, message):
    save(tmp_path / "qasper.jsonl", LONGBENCH)
    own = templates(tmp_path, text, name)
    with pytest.raises(cp.CachepressError, match=message) as caught:
        rows_of(tmp_path, "longbench", "qasper", own)
    assert "\n" not in str(caught.value) and "LongBench's format" not in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "part", "row", "template"),
    [
        ("longbench-v2", None, V2, DOLLARS + "$RAG$"),
        ("infinitebench", "passkey", {"context": "T", "input": "W", "answer": "1"}, GOOD),
        ("loogle", "longdep_qa", {"context": "T", "question": "W", "answer": "1"}, "{input} {Q}"),
        (
            "scbench",
            "scbench_kv",
            {"context": "T", "multi_turns": [{"input": "A", "answer": "b"}]},
            GOOD,
        ),
        ("math500", None, {"problem": "T", "answer": "1", "subject": "s"}, "{problem}"),
    ],
)
def test_a_name_that_nothing_fills_is_one_clear_line(tmp_path, dataset, part, row, template):
    files = {"longbench-v2": "data.json", "math500": "math500.jsonl"}
    save(tmp_path / files.get(dataset, f"{part}.jsonl"), row)
    if dataset == "longbench-v2":
        (tmp_path / "data.json").write_text(json.dumps([row]))
    own = templates(tmp_path, template + "{who}" * (dataset != "longbench-v2"), "own.txt")
    message = r"own.txt: the prompt of [a-z0-9_-]+ names \{(who|RAG)\}: wanted "
    with pytest.raises(cp.CachepressError, match=f"^{message}"):
        rows_of(tmp_path, dataset, part, own, chat=False)


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path):
    with pytest.raises(cp.CachepressError, match="none.json: No such file"):
        read_prompts(str(tmp_path / "none.json"))
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(cp.CachepressError, match="own.txt is not a text in UTF-8"):
        read_prompts(str(tmp_path / "own.txt"))
    with pytest.raises(cp.CachepressError, match="prompts"):
        read_prompts(str(tmp_path))


@pytest.mark.parametrize("dataset", ["ruler", "zero_scrolls", "builtin", "needle", "perplexity"])
def test_a_benchmark_that_holds_its_prompts_takes_no_others(tmp_path, dataset):
    own = templates(tmp_path, {"vt": GOOD})
    part = {"zero_scrolls": "qasper", "ruler": "vt"}.get(dataset)
    with pytest.raises(cp.CachepressError, match=f"{dataset} has its prompts in its data: leave"):
        rows_of(tmp_path, dataset, part, own)


@pytest.fixture
def evaluation(model_dir, data_file, tmp_path):
    own = templates(tmp_path, "w3 {context} w4 {question} w5", "own.txt")
    options = {"dataset": data_file, "model": model_dir, "device": "cpu", "prompts": str(own)}
    return {**options, "output_dir": str(tmp_path / "out")}, own


def test_name_and_hash_are_in_the_record_and_on_every_page(evaluation, tmp_path, capsys):
    options, own = evaluation
    digest = hashlib.sha256(own.read_bytes()).hexdigest()
    runner = EvaluationRunner(EvaluationConfig(**options), quiet=True)
    metrics = runner.run_evaluation()
    assert metrics["context_tokens"] == 43
    assert runner.results_dir.name.endswith(f"__0.00__prompts-own-{digest[:8]}")
    lines = (runner.results_dir / RECORDS).read_text().splitlines()
    assert {json.loads(line)["prompts"] for line in lines} == {f"own.txt sha256:{digest}"}
    saved = yaml.safe_load((runner.results_dir / CONFIG).read_text())
    assert saved["prompts"] == f"own.txt sha256:{digest}"
    (path,) = write_report(tmp_path / "out")
    assert f"prompts: own.txt sha256:{digest}" in Page(path.read_text()).texts
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert main(["evaluate", *arguments]) == 0
    assert f"prompts of own.txt sha256:{digest[:12]}" in capsys.readouterr().out
    data, model = options.pop("dataset"), options.pop("model")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    markdown = tmp_path / "table.md"
    more = ["--presses=knorm", "--ratios=0.5", f"--datasets={data}", f"--models={model}"]
    assert main(["sweep", *arguments, *more, f"--markdown={markdown}"]) == 0
    for text in (capsys.readouterr().out, markdown.read_text()):
        assert f"8 samples, prompts of own.txt sha256:{digest[:12]}" in text


def test_other_prompts_are_other_records_and_the_same_are_the_same(evaluation, tmp_path):
    options, own = evaluation

    def key(**changes):
        config = EvaluationConfig(**{**options, **changes})
        (context, *_) = contexts_of(load_table(config, tokenizer()))
        run = Run(config)
        run.identify({}, config.model)
        return run.key(context, context.samples[0]), config.get_results_dir()

    first = key()
    (tmp_path / "copy").mkdir()
    copy = templates(tmp_path / "copy", own.read_text(), "own.txt")
    assert key(prompts=str(copy)) == first
    copy.write_text("w6 {context} w4 {question} w5")
    others = [key(prompts=str(copy)), key(prompts=None)]
    assert len({*others, first}) == 3 == len({folder for _, folder in [*others, first]})
    assert "prompts" not in EvaluationConfig(**{**options, "prompts": None}).identity()


def test_a_link_is_the_file_that_it_leads_to_unless_only_the_link_has_a_suffix(tmp_path):
    own = templates(tmp_path, {"qasper": GOOD})
    (tmp_path / "link.json").symlink_to(own)
    assert read_prompts(str(tmp_path / "link.json")) == read_prompts(str(own))
    own.rename(tmp_path / "0a1b2c")
    (tmp_path / "hub.json").symlink_to(tmp_path / "0a1b2c")
    assert read_prompts(str(tmp_path / "hub.json")).name == "hub.json"


def test_a_converted_file_has_the_user_s_prompts(tmp_path, model_dir):
    save(tmp_path / "trec.jsonl", LONGBENCH)
    own, output = templates(tmp_path, {"trec": "A {context} B {input} C"}), tmp_path / "t.parquet"
    options = [f"--data-path={tmp_path}", "--data-dir=trec", f"--model={model_dir}"]
    more = [f"--output={output}", f"--prompts={own}"]
    assert main(["data", "convert", "longbench", *options, *more]) == 0
    (row,) = pd.read_parquet(output).to_dict("records")
    assert (row["context"], row["question"]) == ("A By {Ada}.", " B Who {wrote} it? C")
    assert (row["chat"], row["truncation"]) == (False, "middle")
    (context,) = contexts_of(load_table(EvaluationConfig(dataset=str(output)), tokenizer()))
    assert (context.chat, context.truncation) == (False, "middle")


def test_a_table_of_prompts_that_is_nested_too_deeply_is_refused_in_one_line(tmp_path):
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": ' + "[" * 100_000 + "\n")
    with pytest.raises(cp.CachepressError, match="deep.jsonl.*it is nested too deeply") as caught:
        read_prompts(str(path))
    assert "\n" not in str(caught.value)
