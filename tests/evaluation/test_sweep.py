"""A sweep: the answers of separate runs, from one prefill of a context; resumed by sample."""

import csv
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cachepress as cp
from cachepress.catalogue import RECOMMENDED, own_presses, recommended
from cachepress.evaluation import EvaluationConfig, EvaluationRunner, executors
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.run import (
    METRICS,
    OTHER_FILES,
    PREDICTIONS,
    RECORDS,
    Run,
    allow_open_files,
)
from cachepress.evaluation.samples import contexts_of, load_table
from cachepress.evaluation.sweep import SweepConfig, load_sweep, run_sweep
from cachepress.generation.answering import generate
from cachepress.generation.prompt import make_prompt
from cachepress.hf.shared_prefill import SharedPrefill
from tests.bounds import EXACT, no_near_ties
from tests.tiny import exact_tiny, tiny, tokenizer, words
from tests.tiny_cache import forward

PRESSES = (
    "knorm",
    "SnapKVPress(window_size=6)",
    "AdaKVPress(SnapKVPress(0.5, window_size=6))",
    "KIVIPress(KnormPress(0.5), residual=5)",
    "KVzipPress(chunk_size=16)",
    "finch",
    "DecodingPress(KnormPress(), 2, 20)",
    "QuestPress(KnormPress(0.25), pages=1)",
    "think",
)


def sweep(model_dir, data_file, folder, **changes):
    options = {"output_dir": str(folder), "device": "cpu", **changes.pop("options", {})}
    config = {"presses": PRESSES, "ratios": (0.5, 0.75), "datasets": [data_file]}
    config |= {"models": [model_dir], "batch_size": 8, **changes}
    return SweepConfig(**config, options=options)


def rows_of(folder):
    return {
        path.parent.name: list(csv.DictReader(path.open()))
        for path in sorted(Path(folder).glob(f"*/{PREDICTIONS}"))
    }


def test_the_answers_are_those_of_separate_runs(model_dir, data_file, tmp_path, exact_models):
    results = run_sweep(sweep(model_dir, data_file, tmp_path / "sweep"), quiet=True)
    runs = [result.run for group in results for result in group]
    assert len(runs) == 1 + 2 * 8 + 1  # The decoding press has no ratio.
    for run in runs:
        config = {**vars(run.config), "output_dir": str(tmp_path / "apart")}
        metrics = EvaluationRunner(EvaluationConfig(**config), quiet=True).run_evaluation()
        ours = json.loads((run.folder / METRICS).read_text())
        assert ours["score"] == metrics["score"]
        for name in ("compression_ratio", "cache_bytes_after", "context_tokens", "query_aware"):
            assert ours[name] == metrics[name], (run.label, name)
    assert rows_of(tmp_path / "sweep") == rows_of(tmp_path / "apart")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_next"])
def test_models_with_other_layers_are_swept_too(name, data_file, tmp_path, exact_models):
    folder = tmp_path / name
    model = tiny(name)
    model.generation_config.suppress_tokens = [0, 1, 2, 96]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    config = sweep(str(folder), data_file, tmp_path / "sweep", presses=("knorm", "kvzip"), kl=True)
    (results,) = run_sweep(config, quiet=True)
    assert results[0].metrics.kl.mean == pytest.approx(0, abs=EXACT)
    for result in results:
        config = {**vars(result.run.config), "output_dir": str(tmp_path / "apart")}
        metrics = EvaluationRunner(EvaluationConfig(**config), quiet=True).run_evaluation()
        for key in ("score", "compression_ratio", "cache_bytes_after"):
            assert result.metrics.to_json()[key] == metrics[key]
    answers = [
        {run: [row["predicted_answer"] for row in rows] for run, rows in rows_of(place).items()}
        for place in (tmp_path / "sweep", tmp_path / "apart")
    ]
    assert answers[0] == answers[1]


def spy(monkeypatch, stop_after=None):
    """What is read, as (context, presses); stops after so many contexts."""
    seen, together = [], Answerer.together

    def spied(self, runs, context):
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append((context.number, [run.config.press_name for run in runs]))
        return together(self, runs, context)

    monkeypatch.setattr(Answerer, "together", spied)
    return seen


def test_a_stopped_sweep_goes_on_where_it_was(model_dir, data_file, tmp_path, monkeypatch):
    """Every context is answered whole, in the same shapes: to the last bit."""
    config = sweep(model_dir, data_file, tmp_path / "stopped", presses=("knorm", "kvzip"))
    seen = spy(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(config, quiet=True)
    torn = next((tmp_path / "stopped").glob(f"*knorm*/{RECORDS}"))
    torn.write_bytes(torn.read_bytes() + b'{"key": "half a li')
    monkeypatch.undo()
    seen = spy(monkeypatch)
    run_sweep(config, quiet=True)
    assert [number for number, _ in seen] == [2, 3]
    run_sweep(config, quiet=True)
    assert len(seen) == 2
    whole = sweep(model_dir, data_file, tmp_path / "whole", presses=("knorm", "kvzip"))
    run_sweep(whole, quiet=True)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")


def test_there_is_room_for_a_lock_of_each_evaluation():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OTHER_FILES, hard))
        allow_open_files(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (OTHER_FILES + 10, hard)
        allow_open_files(3)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (OTHER_FILES + 10, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_evaluations_than_files_may_be_open_are_refused(
    model_dir, data_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (OTHER_FILES, OTHER_FILES + 2))
    config = sweep(model_dir, data_file, tmp_path / "out", presses=("knorm",))
    with pytest.raises(cp.CachepressError, match="got 3 evaluations.*ulimit -n 259"):
        run_sweep(config, quiet=True)
    assert not (tmp_path / "out").exists()


def test_only_what_is_missing_is_computed(model_dir, data_file, tmp_path, monkeypatch):
    run_sweep(sweep(model_dir, data_file, tmp_path, presses=("knorm",)), quiet=True)
    seen = spy(monkeypatch)
    run_sweep(sweep(model_dir, data_file, tmp_path, presses=("knorm", "keydiff")), quiet=True)
    assert seen == [(number, ["keydiff", "keydiff"]) for number in range(4)]
    lines = (next(tmp_path.glob(f"*keydiff*/{RECORDS}"))).read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys)) == 8


def test_a_context_is_read_once_for_all_that_share(model_dir, data_file, tmp_path, monkeypatch):
    read, real = [], SharedPrefill.read

    def spied(self, ids, chunk_size=None):
        read.append(ids.shape[1])
        real(self, ids, chunk_size)

    monkeypatch.setattr(SharedPrefill, "read", spied)
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm", "snapkv", "kvzip"), kl=True)
    run_sweep(config, quiet=True)
    assert [n for n in read if n > 8] == [42] * 4  # Presses are tried on a few words before.


def test_the_divergence_is_that_of_single_steps(model_dir, data_file, tmp_path, exact_models):
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm",), ratios=(0.0, 0.5), kl=True)
    (results,) = run_sweep(config, quiet=True)
    none, zero, half = (result.metrics.kl.mean for result in results)
    assert none == pytest.approx(0, abs=EXACT) and zero == pytest.approx(0, abs=EXACT)
    model, run = exact_tiny(), results[2].run
    model.generation_config.suppress_tokens = [0, 1, 2, 96]
    values = []
    for context in contexts_of(load_table(run.config, tokenizer())):
        prompt = make_prompt(tokenizer(), model, context.text, context.prompt_options(run.config))
        whole = cp.prefill(model, prompt.context_ids, cp.KnormPress(0.0))
        pressed = cp.prefill(model, prompt.context_ids, cp.KnormPress(0.5))
        for ids, sample in zip(prompt.question_ids, context.samples, strict=True):
            limit = sample.max_new_tokens
            said = generate(model, tokenizer(), cp.fork(whole), [ids], limit, {}).tokens[0]
            text = torch.cat([ids, torch.tensor([said], dtype=torch.long)], dim=1)
            p, q = (expected(model, cache, text, len(said) + 1) for cache in (whole, pressed))
            values.append((p.exp() * (p - q)).sum(-1).mean().item())
    assert half == pytest.approx(sum(values) / len(values), rel=EXACT)
    assert half > 0.01


def expected(model, cache, text, n):
    branch = cp.fork(cache)
    steps = [forward(model, branch, input_ids=token).logits[0, -1] for token in text.split(1, 1)]
    return torch.stack(steps[-n:]).log_softmax(-1)


def test_differences_are_on_the_same_samples(model_dir, data_file, tmp_path):
    (results,) = run_sweep(sweep(model_dir, data_file, tmp_path, presses=("random",)), quiet=True)
    base, rows = (rows_of(tmp_path)[result.run.folder.name] for result in results[:2])
    differences = [float(a["score"]) - float(b["score"]) for a, b in zip(rows, base, strict=True)]
    compared = results[1].paired
    assert results[0].paired is None
    assert compared.difference.mean == pytest.approx(sum(differences) / 8)
    assert compared.difference.contexts == 4
    same = [a["predicted_answer"] == b["predicted_answer"] for a, b in zip(rows, base, strict=True)]
    assert compared.same == sum(same) / 8


def test_the_plan_says_what_is_shared(model_dir, data_file, tmp_path, capsys):
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm", "kvzip", "finch"))
    assert run_sweep(config, quiet=True, only_plan=True) == []
    plan = capsys.readouterr().out
    assert "7 runs, 4 contexts, 8 samples; 56 of 56 answers are left" in plan
    assert "one prefill of a context for 5 runs" in plan
    assert "one reconstruction of it for: kvzip" in plan
    assert "a prefill of their own for: finch" in plan
    assert list(tmp_path.iterdir()) == []


def test_a_plan_to_start_over_removes_nothing(model_dir, data_file, tmp_path, capsys):
    how = {"presses": ("knorm",), "ratios": (0.5,)}
    run_sweep(sweep(model_dir, data_file, tmp_path, **how), quiet=True)
    before = n_lines(tmp_path)
    again = sweep(model_dir, data_file, tmp_path, **how, options={"overwrite": True})
    run_sweep(again, quiet=True, only_plan=True)
    assert "16 of 16 answers are left" in capsys.readouterr().out
    assert n_lines(tmp_path) == before == 16
    run_sweep(sweep(model_dir, data_file, tmp_path, **how), quiet=True, only_plan=True)
    assert "0 of 16 answers are left" in capsys.readouterr().out


def test_an_error_in_the_middle_loses_no_answer(model_dir, data_file, tmp_path, monkeypatch):
    alone = Answerer.alone

    def failing(self, run, context, reference=None):
        if context.number == 1:
            raise cp.CachepressError("no more")
        return alone(self, run, context, reference)

    monkeypatch.setattr(Answerer, "alone", failing)
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm", "finch"), ratios=(0.5,))
    with pytest.raises(cp.CachepressError, match="no more"):
        run_sweep(config, quiet=True)
    counts = {
        path.parent.name.split("__")[2]: len(path.read_text().splitlines())
        for path in tmp_path.glob(f"*/{RECORDS}")
    }
    assert counts == {"no_press": 4, "knorm": 4, "finch": 2}


def test_perplexity_is_not_said_of_a_press_that_acts_on_what_is_decoded(model_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(words(120, seed=5))
    config = sweep(
        model_dir,
        "perplexity:40-8x2",
        tmp_path / "out",
        presses=("knorm", "DecodingPress(KnormPress(), 2, 20)"),
        ratios=(0.5,),
        options={"data_path": str(text)},
    )
    (results,) = run_sweep(config, quiet=True)
    found = [result.metrics.perplexity for result in results]
    assert found[0].mean > 0 and found[1].mean != found[0].mean
    assert found[2] is None


def test_a_press_that_needs_questions_is_refused_where_there_are_none(model_dir, tmp_path):
    config = sweep(model_dir, "perplexity:40-8x2", tmp_path, presses=("finch",), ratios=(0.5,))
    with pytest.raises(cp.CachepressError, match="chooses by the question, and there is none"):
        run_sweep(config, quiet=True)


def test_two_data_sets_of_one_name_are_refused(model_dir, data_file, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    copied = other / Path(data_file).name
    copied.write_text(Path(data_file).read_text())
    config = sweep(model_dir, data_file, tmp_path, datasets=[data_file, str(copied)])
    with pytest.raises(cp.CachepressError, match="two models or data sets would write to"):
        run_sweep(config, quiet=True)


@pytest.fixture
def threads_of_a_worker():
    """As many threads as each of two workers has: sums are in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(executors._threads(2))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("executor", ["process", "ray"])
def test_several_workers_answer_as_one(
    model_dir, data_file, tmp_path, executor, monkeypatch, threads_of_a_worker
):
    """A worker does with a context what one process does, in the same shapes: to the last bit."""
    presses = ("knorm", "SnapKVPress(window_size=6)", "kvzip")
    run_sweep(sweep(model_dir, data_file, tmp_path / "serial", presses=presses), quiet=True)
    config = sweep(
        model_dir, data_file, tmp_path / executor, presses=presses, executor=executor, workers=2
    )
    killed = kill_a_worker(monkeypatch, executor)
    results = run_sweep(config, quiet=True)
    assert len(killed) == 1
    assert rows_of(tmp_path / executor) == rows_of(tmp_path / "serial")
    for result in results[0]:
        lines = (result.run.folder / RECORDS).read_text().splitlines()
        assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 8
        serial = tmp_path / "serial" / result.run.folder.name / METRICS
        wanted = json.loads(serial.read_text())
        for name in ("score", "tasks", "compression_ratio", "cache_bytes_after"):
            assert result.metrics.to_json()[name] == wanted[name]


def kill_a_worker(monkeypatch, executor):
    """After the first context that is done, a worker is killed while others are at work."""
    killed, real = [], Run.save

    def save(self, context, answers):
        real(self, context, answers)
        if not killed:
            killed.append(worker_pids(executor)[0])
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr(Run, "save", save)
    return killed


def worker_pids(executor):
    if executor == "process":
        return [child.pid for child in multiprocessing.active_children()]
    found = Path("/proc").glob("[0-9]*/cmdline")
    return [int(path.parent.name) for path in found if b"ray::Worker" in path.read_bytes()]


def test_sigkill_at_ten_moments_loses_and_doubles_nothing(model_dir, tmp_path, exact_models):
    """Real processes, killed for real; what is left of a context is answered in other shapes."""
    data = tmp_path / "many.jsonl"
    rows = [
        {"context": text, "question": "w9", "answer": ["w5"], "max_new_tokens": 3}
        for text in unlike(60, 40)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = sweep(model_dir, str(data), tmp_path / "whole", presses=("knorm", "snapkv"))
    with no_near_ties():
        run_sweep(config, quiet=True)
    killed = tmp_path / "killed"
    again = sweep(model_dir, str(data), killed, presses=("knorm", "snapkv"))
    # Forked, because ten starts of Python and its libraries take minutes.
    start = multiprocessing.get_context("fork").Process
    draw = random.Random(0)
    for moment in range(10):
        run = start(target=run_alone, args=(again,))
        run.start()
        lines, more = n_lines(killed), draw.randrange(1, 8)
        deadline = time.monotonic() + 120
        while n_lines(killed) < lines + more and run.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(draw.random() / 20)
        assert run.is_alive(), f"it was done before kill {moment}"
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
    run_sweep(again, quiet=True)
    assert rows_of(killed) == rows_of(tmp_path / "whole")
    for path in killed.glob(f"*/{RECORDS}"):
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert len(keys) == len(set(keys)) == 40


def unlike(n, texts):
    """Texts of ``n`` words, none of which comes twice, in the template neither."""
    draw = random.Random(0)
    return [" ".join(f"w{i}" for i in draw.sample(range(10, 96), n)) for _ in range(texts)]


def run_alone(config):
    """A sweep in a forked process, which inherits no threads to compute with."""
    torch.set_num_threads(1)
    run_sweep(config, quiet=True)


def n_lines(folder):
    return sum(path.read_bytes().count(b"\n") for path in Path(folder).glob(f"*/{RECORDS}"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"presses": ("nope",)}, "unknown press 'nope'"),
        ({"presses": "knorm"}, "presses: got 'knorm', wanted a list"),
        ({"ratios": (1.2,)}, "got 1.2"),
        ({"ratios": ()}, "ratios: got \\(\\), wanted a list"),
        ({"datasets": ["rulr:4096"]}, "unknown dataset 'rulr'"),
        ({"query_aware": "maybe"}, "query_aware: got 'maybe', wanted one of no, yes, both"),
        ({"executor": "slurm"}, "executor: got 'slurm', wanted one of serial, process, ray"),
        ({"workers": 0}, "workers: got 0"),
        ({"kl": "no"}, "kl: got 'no'"),
        ({"query_aware": ["no"]}, "query_aware: got \\['no'\\]"),
        ({"models": ["/nowhere"]}, "could not load the tokenizer of '/nowhere'"),
        ({"options": {"fraction": 2.0}}, "fraction: got 2.0"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(
    model_dir, data_file, tmp_path, changes, message
):
    with pytest.raises(cp.CachepressError, match=message) as caught:
        run_sweep(sweep(model_dir, data_file, tmp_path, **changes), quiet=True)
    assert "\n" not in str(caught.value)
    assert not rows_of(tmp_path)


def test_a_press_that_does_not_fit_the_model_is_refused_before_any_work(
    model_dir, data_file, tmp_path
):
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm", "qfilter"))
    with pytest.raises(cp.CachepressError, match="cachepress train q_filters"):
        run_sweep(config, quiet=True)
    assert not n_lines(tmp_path)


def test_damaged_records_are_named(model_dir, data_file, tmp_path):
    config = sweep(model_dir, data_file, tmp_path, presses=("knorm",))
    run_sweep(config, quiet=True)
    path = next(tmp_path.glob(f"*knorm*/{RECORDS}"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "rubbish", *lines[1:]]) + "\n")
    with pytest.raises(cp.CachepressError, match="records.jsonl line 2 is damaged"):
        run_sweep(config, quiet=True)


def test_the_file_that_comes_with_the_project():
    config = load_sweep("evaluation/sweep_config.yaml", {})
    groups = config.groups()
    assert [group.config.query_aware for group in groups] == [False, True]
    names = [run.config.press_name for run in groups[0].runs]
    assert names == ["no_press", "knorm", "knorm", "snapkv", "snapkv", *["adakv(snapkv)"] * 2]


def test_a_file_of_options(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("presses: [knorm, tova]\nratios: [0.5]\nseed: 3\nkl: true\n")
    config = load_sweep(str(path), {"ratios": [0.9]})
    assert (config.presses, config.ratios, config.kl) == (["knorm", "tova"], [0.9], True)
    assert config.options == {"seed": 3}
    with pytest.raises(cp.CachepressError, match="unknown option 'press'"):
        load_sweep(str(path), {"press": "knorm"})


def test_all_presses_are_swept_in_the_form_that_their_authors_recommend():
    spellings = SweepConfig(presses=["all"])._spellings()
    assert len(spellings) == len(own_presses())
    presses = {repr(cp.parse(text)) for text in spellings}
    for text in (
        "AdaKVPress(ExpectedAttentionPress(0.5, epsilon=0.01))",
        "AdaKVPress(DefensiveKVPress(0.5), scope='model')",
        "KVzipPress(0.5)",
        "SnapKVPress(0.5)",
    ):
        assert repr(cp.parse(text)) in presses
    # Where heads can compete for a score, they do.
    for alias in ("kvzip", "defensivekv", "expected_attention", "critical", "fastkvzip"):
        assert recommended(own_presses()[alias], 0.5).budget.scope in ("layer", "model")
    for alias in RECOMMENDED:
        at = [recommended(own_presses()[alias], ratio).compression_ratio for ratio in (0.5, 0.9)]
        assert at == [0.5, 0.9]


def test_workers_take_the_gpus_in_turns_and_make_them_their_own(monkeypatch):
    loaded, chosen = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def load(name, device, **options):
        loaded.append(device)
        return tiny(), tokenizer()

    monkeypatch.setattr(executors, "load", load)
    config = EvaluationConfig(dataset="builtin:multi_key-500", model="a-model")
    for device in (None, "cuda", "cuda:1", "cpu"):
        for rank in range(5):
            worker = executors.Worker(executors.WorkerOptions(workers=5), rank)
            worker._answerer(replace(config, device=device))
    in_turns = [f"cuda:{i}" for i in (0, 1, 2, 0, 1)]
    assert loaded == [*in_turns, *in_turns, *5 * ["cuda:1"], *5 * ["cpu"]]
    assert chosen == 2 * [0, 1, 2, 0, 1]


def test_workers_are_numbered_as_they_start(monkeypatch):
    rank = multiprocessing.get_context("spawn").Value("i", 0)
    options, ranks = executors.WorkerOptions(workers=2), []
    monkeypatch.setattr(executors, "_WORKER", None)
    monkeypatch.setattr(executors, "be_quiet", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    for _ in range(3):
        executors._start(options, rank)
        ranks.append(executors._WORKER._rank)
    assert ranks == [0, 1, 2]
