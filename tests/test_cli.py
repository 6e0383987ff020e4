"""The command line: what works, and one line with exit code 2 for what does not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from cachepress.cli import main
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.run import METRICS, PREDICTIONS, RECORDS
from tests.tiny import words


@pytest.fixture
def arguments(model_dir, data_file, tmp_path):
    return [
        "evaluate",
        f"--dataset={data_file}",
        f"--model={model_dir}",
        "--device=cpu",
        f"--output-dir={tmp_path / 'out'}",
    ]


def test_evaluate_prints_tables_and_the_place(arguments, capsys):
    assert main([*arguments, "--press", "snapkv(window_size=8)", "--compression-ratio=0.5"]) == 0
    out = capsys.readouterr().out
    assert "easy" in out and "hard" in out
    assert "facts__tiny-llama__snapkv-window_size=8__0.50" in out
    assert "0.500" in out


@pytest.mark.parametrize(
    ("press", "warns"),
    [
        ("knorm", True),
        ("adakv(knorm)", True),
        ("knorm(0.5)", False),
        ("knorm(n_kept=20)", False),
        ("dms(knorm, -17)", False),
        ("no_press", False),
    ],
)
def test_a_press_without_a_ratio_is_seldom_what_was_meant(arguments, caplog, press, warns):
    assert main([*arguments, "--press", press]) == 0
    assert ("evicts nothing: give --compression-ratio" in caplog.text) == warns


@pytest.mark.parametrize("way", ["--truncation", "--truncation=middle", "--no-truncation"])
def test_what_was_cut_stands_on_the_screen(arguments, capsys, way):
    more = ["--no-chat", "--max-context-length=30", way]
    assert main([*arguments, *more]) == (2 if way == "--no-truncation" else 0)
    printed = capsys.readouterr()
    if way == "--no-truncation":
        assert "the context has 40 tokens, but there is room for 30" in printed.err
        return
    assert "4 contexts cut, 40 tokens in all" in printed.out
    assert "no chat template" in printed.out


def test_config_file_and_press_name(arguments, tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("press_name: knorm\ncompression_ratio: 0.25\n")
    assert main([*arguments, "--config", str(path), "--compression-ratio=0.75"]) == 0
    assert "facts__tiny-llama__knorm__0.75" in capsys.readouterr().out


def _write(path, text):
    if text is not None:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--press=nope"], "unknown press 'nope'"),
        (["--press=knorm", "--compression-ratio=1.0"], "got 1.0"),
        (["--press=knorm", "--compression-ratio=-0.1"], "got -0.1"),
        (["--press=knorm", "--compression-ratio=abc"], "invalid float value: 'abc'"),
        (["--prss=knorm"], "unrecognized arguments: --prss=knorm"),
        (["--dataset=nowhere"], "unknown dataset 'nowhere'"),
        (["--dataset=nowhere.csv"], "data file nowhere.csv does not exist"),
        (["--dataset={empty}"], "has no rows"),
        (["--dataset={lacking}"], "has no column 'answer'"),
        (["--dataset={blank}"], "row 0: the context is empty"),
        (["--dataset={judged}"], "unknown metric 'rogue'"),
        (["--device=nowhere"], "device: got 'nowhere'"),
        (["--model-kwargs={{nonsense: 1}}"], "could not load the model"),
        (["--config={broken}"], "is not YAML"),
        (["--config=missing.yaml"], "missing.yaml: No such file or directory"),
        (["--model=no/such-model"], "'no/such-model'"),
        (["--max-context-length=10"], "the context has 42 tokens"),
        (["--truncation=left"], "truncation: got 'left', wanted one of middle, end, or true"),
        (
            ["--dataset=perplexity", "--data-dir=90-5x2", "--chat"],
            "in no chat template: leave --chat out",
        ),
        (["--output-dir={file}/out"], "Not a directory"),
        (["--model-kwargs=[1]"], "is not a mapping"),
        (["--dtype=float99"], "float99"),
        (["--dataset=builtin", "--data-dir=nothing-9"], "builtin: got data_dir='nothing-9'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, tmp_path, capsys, options, message):
    files = {
        "empty": _write(tmp_path / "empty.csv", "context,question,answer\n"),
        "lacking": _write(tmp_path / "lacking.csv", "context,question\na,b\n"),
        "blank": _write(tmp_path / "blank.csv", "context,question,answer\n ,b,c\n"),
        "judged": _write(tmp_path / "j.csv", "context,question,answer,metric\na,b,c,rogue\n"),
        "broken": _write(tmp_path / "broken.yaml", "press: ["),
        "file": _write(tmp_path / "file", ""),
    }
    try:
        code = main([*arguments, *(option.format(**files) for option in options)])
    except SystemExit as stopped:
        code = stopped.code
    err = capsys.readouterr().err.strip()
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err


def test_a_full_disk_is_one_line_and_loses_nothing(arguments, tmp_path, capsys, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert main(arguments) == 2
    assert "No space left on device; nothing that was computed is lost" in capsys.readouterr().err
    monkeypatch.undo()
    folder = next((tmp_path / "out").iterdir())
    assert len((folder / RECORDS).read_text().splitlines()) == 2  # The first context
    assert main(arguments) == 0
    assert len((folder / RECORDS).read_text().splitlines()) == 8


def test_ctrl_c_is_one_line_and_the_same_command_goes_on(arguments, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "alone", interrupt)
    assert main(arguments) == 130
    assert "interrupted: every finished context is on disk" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(arguments) == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_out_of_memory_is_one_line_and_keeps_the_records(
    arguments, tmp_path, capsys, monkeypatch, error
):
    real, calls = Answerer.alone, []

    def full(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return real(*args)

    monkeypatch.setattr(Answerer, "alone", full)
    assert main(arguments) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("cachepress: error: out of memory: ")
    assert err.endswith("or a smaller model or dtype; nothing that was computed is lost")
    folder = next((tmp_path / "out").iterdir())
    assert len((folder / RECORDS).read_text().splitlines()) == 2
    monkeypatch.undo()
    assert main(arguments) == 0
    assert len((folder / RECORDS).read_text().splitlines()) == 8
    place = "cachepress.models.loading.AutoModelForCausalLM.from_pretrained"
    monkeypatch.setattr(place, raiser(error))
    assert main([*arguments, "--overwrite"]) == 2
    assert "error: out of memory: " in capsys.readouterr().err


def raiser(error):
    def raises(*args, **kwargs):
        raise error

    return raises


@pytest.fixture
def own_code(model_dir, tmp_path):
    """A model whose repository brings code, which leaves a file where it runs."""
    folder, ran = tmp_path / "own", tmp_path / "ran"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": names}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(ran)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return str(folder), ran


def test_code_of_a_model_runs_only_if_it_is_trusted(arguments, own_code, tmp_path, capsys):
    model, ran = own_code
    run = [*arguments, f"--model={model}"]
    context = tmp_path / "context.txt"
    context.write_text(words(40, seed=1))
    commands = [
        run,
        ["sweep", f"--datasets={arguments[1].partition('=')[2]}", f"--models={model}"],
        ["inspect", f"--model={model}", f"--context={context}", "--question=w3"],
        ["bench", f"--model={model}", "--lengths=8"],
        ["train", "q_filters", f"--model={model}"],
    ]
    for command in commands:
        assert main(command) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert "it brings code of its own" in err and "--trust-remote-code" in err
        assert not ran.exists()
    assert main([*run, "--trust-remote-code"]) == 0
    assert ran.exists()


def test_a_perplexity_of_one_window_has_no_interval(arguments, tmp_path, capsys):
    data = tmp_path / "one.jsonl"
    row = {"context": words(20, seed=1), "question": "", "answer": [words(4, seed=2)]}
    data.write_text(json.dumps({**row, "metric": "perplexity"}) + "\n")
    own = [f"--dataset={data}", "--press=knorm", "--compression-ratio=0.5"]
    assert main([*arguments, *own]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("knorm")]
    assert re.match(r"knorm +0.[0-9]+ +ppl [0-9.]+ +[0-9.]+ MiB", line)
    assert main(["score", str(tmp_path / "out")]) == 0
    assert main(["report", str(tmp_path / "out"), "--formats", "md"]) == 0
    found = json.loads(next((tmp_path / "out").glob(f"*/{METRICS}")).read_text())["perplexity"]
    assert found["mean"] > 1 and found["high"] is None and found["samples"] == 1


def test_names_are_shown_and_not_obeyed(arguments, data_file, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(data_file).read_text().splitlines()]
    evil = tmp_path / "evil.jsonl"
    evil.write_text("".join(json.dumps({**r, "task": "\x1b[2Jred\x07"}) + "\n" for r in rows))
    assert main([*arguments, f"--dataset={evil}"]) == 0
    assert main([*arguments, "--dataset=\x1b]0;title\x07\udcff.csv"]) == 2
    with pytest.raises(SystemExit):
        main(["\x1b[31m"])
    out, err = capsys.readouterr()
    assert r"\x1b[2Jred\x07" in out and r"\x1b]0;title\x07\udcff.csv" in err
    assert not {"\x1b", "\x07"} & {*out, *err}


def test_kill_9_in_the_middle_loses_and_doubles_nothing(arguments, tmp_path):
    """A real process, killed for real, and the same command again.

    Every context is answered by itself, in the same shapes and by one thread: to the last bit.
    """
    rows = [
        {
            "context": " ".join(f"w{3 + (i * j) % 90}" for j in range(1, 60)),
            "question": "w9",
            "answer": "w8",
            "max_new_tokens": 60,
        }
        for i in range(1, 41)
    ]
    data = tmp_path / "many.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "cachepress", *arguments, f"--dataset={data}"]
    folder = tmp_path / "out" / "many__tiny-llama__no_press__0.00"
    alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=alone, **nowhere)
    deadline = time.monotonic() + 120
    while lines(folder / RECORDS) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= lines(folder / RECORDS) < 40
    assert not (folder / METRICS).exists()
    before = (folder / RECORDS).read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    subprocess.run(command, check=True, capture_output=True, env=alone)
    after = (folder / RECORDS).read_bytes()
    assert after.startswith(before)
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)) == 40
    undisturbed = [*command[:-2], f"--output-dir={tmp_path / 'other'}", command[-1]]
    subprocess.run(undisturbed, check=True, capture_output=True, env=alone)
    other = tmp_path / "other" / folder.name
    assert (folder / PREDICTIONS).read_bytes() == (other / PREDICTIONS).read_bytes()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_models_and_presses_are_listed(capsys):
    assert main(["models"]) == 0
    assert (
        "smollm2-135m: SmolLM2-135M-Instruct, Apache-2.0, context 8192" in capsys.readouterr().out
    )
    assert main(["presses"]) == 0
    out = capsys.readouterr().out
    assert "SnapKVPress(compression_ratio=0.0, window_size=64, kernel_size=5)" in out


def test_models_are_removed_with_what_an_interrupted_fetch_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path / "home"))
    assert main(["models", "--remove"]) == 0
    assert "smollm2-135m: nothing was there" in capsys.readouterr().out
    for name in ("smollm2-135m", "smollm2-135m.tmp-1", "learned", "other"):
        (tmp_path / "home" / name).mkdir(parents=True)
        (tmp_path / "home" / name / "x").write_bytes(bytes(1_000_000))
    assert main(["models", "--remove"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m: removed, 2 MB" in out and f"still in {tmp_path / 'home'}" in out
    left = {path.name for path in (tmp_path / "home").iterdir() if path.is_dir()}
    assert left == {"learned", "other"}
    assert main(["models", "--remove", "--fetch"]) == 2
    assert "both --fetch and --remove" in capsys.readouterr().err


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for option in ("--dataset", "--press", "--compression-ratio", "--query-aware", "--overwrite"):
        assert option in out


@pytest.fixture
def swept(arguments, data_file, model_dir, tmp_path):
    """A sweep's arguments, and its folder."""
    options = ["--datasets", data_file, "--models", model_dir, "--device=cpu"]
    return ["sweep", *options, f"--output-dir={tmp_path / 'out'}"], tmp_path / "out"


def test_sweep_prints_a_table_and_writes_it(swept, tmp_path, capsys):
    arguments, folder = swept
    markdown = tmp_path / "table.md"
    sheet = tmp_path / "table.csv"
    more = ["--presses", "knorm", "tova", "--ratios", "0.5", "--kl", f"--markdown={markdown}"]
    more += [f"--csv={sheet}"]
    assert main([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert "query-agnostic, 4 contexts, 8 samples" in out
    for text in (out, markdown.read_text()):
        assert [name in text for name in ("no_press", "knorm", "tova", "flips", "KL")] == [True] * 5
    assert len(list(folder.glob(f"*/{METRICS}"))) == 3
    table = pd.read_csv(sheet)
    assert table["press"].tolist() == ["no_press", "knorm", "tova"]
    assert table["nominal ratio"].tolist()[1:] == [0.5, 0.5]
    scores = [json.loads(path.read_text())["score"] for path in sorted(folder.glob(f"*/{METRICS}"))]
    assert sorted(table["score"]) == sorted(score["mean"] for score in scores)
    assert main([*arguments, *more]) == 0


def test_a_sweep_says_on_the_screen_what_was_cut(swept, capsys, caplog):
    arguments, _ = swept
    more = ["--presses=knorm", "--ratios=0.5", "--max-context-length=30", "--truncation"]
    assert main([*arguments, *more]) == 0
    out = capsys.readouterr().out
    assert "query-agnostic, 4 contexts, 8 samples, 4 contexts cut, 48 tokens in all" in out
    assert "4 of 4 contexts are cut, by 48 tokens in all" in caplog.text


def test_a_dry_run_does_nothing(swept, capsys):
    arguments, folder = swept
    assert main([*arguments, "--presses", "knorm", "--ratios", "0.5", "--dry-run"]) == 0
    assert "2 runs, 4 contexts, 8 samples; 16 of 16 answers are left" in capsys.readouterr().out
    assert not list(folder.glob(f"*/{RECORDS}"))


def test_ctrl_c_in_a_sweep_is_one_line(swept, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "together", interrupt)
    assert main([*swept[0], "--presses", "knorm", "--ratios", "0.5"]) == 130
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("cachepress: error: interrupted: every finished context is on disk")


def test_answers_can_be_scored_again_without_the_model(arguments, tmp_path, capsys):
    assert main([*arguments, "--press=knorm", "--compression-ratio=0.5"]) == 0
    (folder,) = (tmp_path / "out").iterdir()
    before = [(folder / name).read_text() for name in (METRICS, PREDICTIONS)]
    assert main(["score", str(tmp_path / "out")]) == 0
    again = [(folder / name).read_text() for name in (METRICS, PREDICTIONS)]
    assert json.loads(again[0]) == json.loads(before[0])
    assert again[1] == before[1]
    assert main(["score", str(folder), "--metric", "qa_f1"]) == 0
    other = json.loads((folder / METRICS).read_text())
    assert other["metrics"] == ["qa_f1"]
    assert other["score"]["mean"] != json.loads(before[0])["score"]["mean"]
    assert other["cache_bytes_after"] == json.loads(before[0])["cache_bytes_after"]
    assert main(["score", str(folder), "--metric", "rogue"]) == 2
    assert "unknown metric 'rogue'" in capsys.readouterr().err
    for text in ("[]", "{}", "[" * 100_000, json.dumps({**other, "perplexity": 3})):
        (folder / METRICS).write_text(text)
        assert main(["score", str(folder)]) == 2
        assert f"error: {folder / METRICS}" in capsys.readouterr().err
    (folder / PREDICTIONS).write_text("context_id\nx\n")
    assert main(["score", str(folder)]) == 2
    assert f"{folder / PREDICTIONS} is damaged" in capsys.readouterr().err


def test_data_is_listed_and_converted(tmp_path, data_file, model_dir, capsys):
    assert main(["data", "list"]) == 0
    out = capsys.readouterr().out
    assert "ruler " in out and "--data-dir narrativeqa, qasper" in out
    target = tmp_path / "facts.parquet"
    convert = ["data", "convert", data_file, "--model", model_dir, "--output"]
    assert main([*convert, str(target)]) == 0
    assert "8 samples of 4 contexts" in capsys.readouterr().out
    run = ["evaluate", f"--model={model_dir}", "--device=cpu"]
    for name, data in (("a", data_file), ("b", str(target))):
        assert main([*run, f"--dataset={data}", f"--output-dir={tmp_path / name}"]) == 0
    a, b = (next(tmp_path.glob(f"{name}/*/{PREDICTIONS}")).read_text() for name in "ab")
    assert a == b
    assert main([*convert, str(tmp_path / "facts.xml")]) == 2
    assert "wanted a file that ends in .parquet" in capsys.readouterr().err


def test_report_makes_a_page_of_results(swept, tmp_path, capsys):
    arguments, folder = swept
    assert main([*arguments, "--presses", "knorm", "--ratios", "0.5", "0.75"]) == 0
    assert main(["report", str(folder), "--formats", "html", "md"]) == 0
    assert f"written: {folder / 'report.html'}" in capsys.readouterr().out
    page, table = ((folder / name).read_text() for name in ("report.html", "table.md"))
    assert "knorm" in page and "http-equiv" not in page
    assert table.count("knorm") == 2
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert main(["report", str(folder), "--formats", "pdf"]) == 2
    assert "pdf" in capsys.readouterr().err


def test_inspect_makes_a_page_of_a_context(tmp_path, model_dir, capsys):
    context = tmp_path / "context.txt"
    context.write_text(words(40, seed=1))
    page = tmp_path / "page.html"
    run = ["inspect", f"--model={model_dir}", "--device=cpu", f"--context={context}"]
    run += ["--question=w9", f"--output={page}", "--max-new-tokens=3", "--press=knorm"]
    assert main([*run, "--compression-ratio=0.5"]) == 0
    assert f"written: {page}" in capsys.readouterr().out
    assert words(40, seed=1).split()[0] in page.read_text()
    assert main([*run, "--press=no_press"]) == 2
    assert "name a press to inspect" in capsys.readouterr().err
    context.write_bytes(b"\xff\xfe\x00")
    assert main(run) == 2
    assert "is not a text in UTF-8" in capsys.readouterr().err
    context.unlink()
    assert main(run) == 2
    assert "No such file or directory" in capsys.readouterr().err
