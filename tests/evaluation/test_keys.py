"""What a key holds: other weights, tokenizers and artefacts are other answers, versions are not.

No answer is compared with one that was computed again: ``answered`` says which were.
"""

import csv
import json
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.cli import main
from cachepress.evaluation import EvaluationConfig, EvaluationRunner
from cachepress.evaluation import run as run_module
from cachepress.evaluation.answering import Answerer
from cachepress.evaluation.run import CONFIG, METRICS, PREDICTIONS, RECORDS
from cachepress.evaluation.sweep import SweepConfig, run_sweep
from tests.tiny import tokenizer, tokens

EARLIER = Path(__file__).parents[1] / "golden" / "version_0.1.0"
GOLDEN = EARLIER.parent / "llama_model"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model and data, in which runs are done."""
    monkeypatch.setenv("CACHEPRESS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN, tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    shutil.copy(EARLIER / "facts.jsonl", tmp_path)
    return tmp_path


CONFIGURED = {
    "dataset": "facts.jsonl",
    "model": "model",
    "press": "knorm",
    "compression_ratio": 0.5,
    "output_dir": "results",
    "device": "cpu",
}


@pytest.fixture
def answered(monkeypatch):
    """The contexts that are answered, by number."""
    found, answer = [], Answerer.alone

    def spied(self, run, context, reference=None):
        found.append(context.number)
        return answer(self, run, context, reference)

    monkeypatch.setattr(Answerer, "alone", spied)
    return found


def run(loaded=None, /, **options):
    config = EvaluationConfig(**{**CONFIGURED, **options})
    runner = EvaluationRunner(config, loaded, quiet=True)
    runner.run_evaluation()
    return runner.results_dir


def records(folder):
    return [json.loads(line) for line in (folder / RECORDS).read_text().splitlines()]


def predicted(folder):
    with (folder / PREDICTIONS).open(newline="") as file:
        return [(row["sample_id"], row["predicted_answer"]) for row in csv.DictReader(file)]


def changed(path, sign=-1):
    """Other weights of the same size under the same name."""
    tensors = load_file(path)
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = sign * tensors[name]
    save_file(tensors, path, {"format": "pt"})


def test_other_weights_under_the_same_path_are_computed_anew_in_the_same_folder(work, answered):
    folder = run()
    first, views = records(folder), (folder / PREDICTIONS).read_text()
    assert answered == [0, 1]
    weights = work / "model" / "model.safetensors"
    old = weights.read_bytes()
    changed(weights)
    assert run() == folder
    assert answered == [0, 1, 0, 1]
    both = records(folder)
    assert both[:4] == first and len(both) == 8
    assert len({record["key"] for record in both}) == 8
    shown = (folder / PREDICTIONS).read_text()
    assert shown != views
    assert [r["predicted_answer"] for r in both[4:]] != [r["predicted_answer"] for r in first]
    weights.write_bytes(old)
    run()
    assert len(answered) == 4 and (folder / PREDICTIONS).read_text() == views


def test_views_of_other_weights_are_gone_when_a_run_stops(work, answered, monkeypatch):
    folder = run()
    changed(work / "model" / "model.safetensors")

    def stopped(self, run, context, reference=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(Answerer, "alone", stopped)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not (folder / PREDICTIONS).exists() and not (folder / METRICS).exists()


def test_another_tokenizer_is_another_key(work, answered):
    run()
    path = work / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("w5", "w11"))
    run()
    assert answered == [0, 1, 0, 1]
    for name in ("README.md", "trainer_state.json", "optimizer.pt", ".notes.json"):
        (work / "model" / name).write_text("{}")
    run()
    assert len(answered) == 4


@pytest.mark.parametrize(
    ("spelling", "ratio"),
    [
        ("qfilter(filters={})", 0.5),
        ("adakv(qfilter(filters={}))", 0.5),
        ("composed([knorm(0.1), key_rerotation(qfilter(0.5, filters={}))])", None),
    ],
)
def test_an_artefact_that_is_learned_anew_is_another_key(work, answered, spelling, ratio):
    import torch

    filters = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    save_artefact(work / "f.safetensors", "q_filters", {"filters": filters}, {})
    press = spelling.format("'f.safetensors'")
    folder = run(press=press, compression_ratio=ratio)
    save_artefact(work / "f.safetensors", "q_filters", {"filters": -filters}, {})
    assert run(press=press, compression_ratio=ratio) == folder
    assert answered == [0, 1, 0, 1]
    (work / "link").symlink_to(work / "f.safetensors")
    for other in (f"'{work / 'f.safetensors'}'", "'./f.safetensors'", "'link'"):
        assert run(press=spelling.format(other), compression_ratio=ratio) == folder
    assert len(answered) == 4


def test_the_artefact_that_a_press_finds_by_itself_counts(work, answered):
    import torch

    from cachepress.artefacts.kept import locate_artefact
    from cachepress.train import Training, train

    def learn(seed):
        model = AutoModelForCausalLM.from_pretrained("model")
        windows = [tokens(20, seed=seed)]
        return train("q_filters", Training(model, windows, tokenizer(), quiet=True))

    path = learn(0)
    assert str(path) == locate_artefact("q_filters", None, "model")
    run(press="qfilter")
    run(press="qfilter")
    assert answered == [0, 1]
    learn(1)
    run(press="qfilter")
    assert answered == [0, 1, 0, 1]
    assert torch.is_tensor(load_file(path)["filters"])


def test_a_table_of_scores_counts(work, answered):
    (work / "pattern.tsv").write_text("0.1\t0.9\n" * 4)
    run(press="DuoAttentionPress(0.5, pattern='pattern.tsv')", compression_ratio=None)
    (work / "pattern.tsv").write_text("0.9\t0.1\n" * 4)
    run(press="DuoAttentionPress(0.5, pattern='pattern.tsv')", compression_ratio=None)
    (work / "config.json").write_text('{"sink_size": 2, "recent_size": 3}')
    run(press="DuoAttentionPress(0.5, pattern='pattern.tsv')", compression_ratio=None)
    assert answered == [0, 1] * 3


def test_a_model_in_memory_counts_by_its_weights(work, answered):
    model = AutoModelForCausalLM.from_pretrained("model").eval()
    pair = (model, AutoTokenizer.from_pretrained("model"))
    folder = run(pair)
    run(pair)
    assert answered == [0, 1]
    model.model.layers[1].self_attn.k_proj.weight.data.mul_(-1)
    assert run(pair) == folder
    assert answered == [0, 1, 0, 1]
    told = tokenizer()
    told.chat_template = "w9 {{ messages[0]['content'] }} w6 "
    run((model, told))
    assert len(answered) == 6
    run()
    assert len(answered) == 8


def test_other_versions_are_said_and_kept(work, answered, monkeypatch, caplog):
    folder = run()
    assert {r["versions"]["cachepress_version"] for r in records(folder)} == {cp.__version__}
    assert {r["schema"] for r in records(folder)} == {1}
    assert json.loads((folder / METRICS).read_text())["schema"] == 1
    now = {**run_module.versions(), "torch_version": "9.9"}
    monkeypatch.setattr(run_module, "versions", lambda: now)
    with caplog.at_level("WARNING"):
        run()
    assert answered == [0, 1]
    said = [r.message for r in caplog.records if "--overwrite computes them anew" in r.message]
    assert len(said) == 1 and "(now 9.9)" in said[0] and "transformers" not in said[0]
    run(overwrite=True)
    assert len(answered) == 4
    assert {r["versions"]["torch_version"] for r in records(folder)} == {"9.9"}


@pytest.fixture
def earlier(work):
    """The same run, done by version 0.1.0."""
    folder = work / "results" / "facts__model__knorm__0.50"
    shutil.copytree(EARLIER / folder.name, folder)
    return folder


def test_answers_of_0_1_0_are_recognised(earlier, answered, caplog):
    old = predicted(earlier)
    with caplog.at_level("WARNING"):
        assert run().resolve() == earlier
    assert answered == [] and predicted(earlier) == old and len(old) == 4
    its = yaml.safe_load((EARLIER / earlier.name / CONFIG).read_text())
    taken = records(earlier)[4:]
    assert len(taken) == 4
    assert {r["versions"]["torch_version"] for r in taken} == {its["torch_version"]}
    run()
    assert answered == [] and len(records(earlier)) == 8


def test_answers_of_0_1_0_are_not_those_of_later_weights(work, earlier, answered):
    run()
    changed(work / "model" / "model.safetensors")
    run()
    assert answered == [0, 1]


def test_a_sweep_and_its_plan_recognise_them_too(work, earlier, answered, capsys):
    options = {k: v for k, v in CONFIGURED.items() if k in ("output_dir", "device")}
    config = SweepConfig(
        presses=["knorm"],
        ratios=[0.5],
        datasets=["facts.jsonl", str(work / "facts.jsonl")],
        models=["model", "./model"],
        options=options,
    )
    before = (earlier / RECORDS).read_bytes()
    run_sweep(config, only_plan=True)
    assert "4 of 8 answers are left" in capsys.readouterr().out
    assert (earlier / RECORDS).read_bytes() == before
    assert not (work / "results" / "facts__model__no_press__0.00").exists()
    (results,) = run_sweep(config, quiet=True)
    assert [result.run.config.press for result in results] == ["no_press", "knorm"]
    assert len(records(earlier)) == 8


def test_a_press_around_a_link_of_0_1_0_keeps_its_folder(work):
    (work / "other").symlink_to(work / "model")
    folder = work / "results" / "facts__other__knorm__0.50"
    shutil.copytree(EARLIER / "facts__model__knorm__0.50", folder)
    path = folder / CONFIG
    path.write_text(path.read_text().replace("model: model", "model: other"))
    config = EvaluationConfig(**{**CONFIGURED, "model": "other"})
    assert config.get_results_dir().resolve() == folder
    named = replace(config, model="model").get_results_dir()
    assert named.name == "facts__model__knorm__0.50"


def test_paths_that_name_the_same_file_are_the_same_run(work, answered):
    (work / "linked").symlink_to(work / "model")
    (work / "link.jsonl").symlink_to(work / "facts.jsonl")
    folder = run()
    for model in (str(work / "model"), "./model/", "linked", "model/../model"):
        assert run(model=model) == folder
    for dataset in (str(work / "facts.jsonl"), "./facts.jsonl", "link.jsonl"):
        assert run(dataset=dataset) == folder
    assert answered == [0, 1]
    assert run(model=str(work / "model"), output_dir=str(work / "results")).samefile(folder)
    assert answered == [0, 1]


def test_names_that_differ_in_other_letters_are_different_runs(work):
    names = ["données.jsonl", "donnèes.jsonl", "数据.jsonl", "資料.jsonl", "donn-es.jsonl"]
    folders = [EvaluationConfig(dataset=name).get_results_dir() for name in names]
    assert len(set(folders)) == len(names)
    assert all(folder.name.isascii() for folder in folders)
    long = [EvaluationConfig(dataset="x" * 100 + c + ".csv").get_results_dir() for c in "éè"]
    assert len(set(long)) == 2


def test_a_disk_without_capitals_has_a_folder_for_each_name(work, monkeypatch):
    def folder(name):
        return EvaluationConfig(dataset=name).get_results_dir()

    taken = folder("Facts.jsonl")
    taken.mkdir(parents=True)
    assert folder("Facts.jsonl") == taken and folder("facts.jsonl") != taken
    exists = Path.exists

    def without_capitals(self):
        names = [p.name.lower() for p in self.parent.iterdir()] if exists(self.parent) else []
        return self.name.lower() in names

    monkeypatch.setattr(Path, "exists", without_capitals)
    assert folder("Facts.jsonl") == taken
    other = folder("facts.jsonl")
    assert other.name.lower() != taken.name.lower()
    other.mkdir()
    assert folder("facts.jsonl") == other and folder("Facts.jsonl") == taken


@pytest.mark.parametrize(
    "options",
    [
        {"max_context_length": 5},
        {"press": "qfilter"},
        {"model": "nowhere/nothing"},
        {"dataset": "gone.jsonl"},
        {"dataset": "gone"},
    ],
)
def test_a_refused_run_leaves_no_folder(work, options, monkeypatch):
    monkeypatch.setattr("cachepress.models.loading.hub_answers", lambda name: False)
    with pytest.raises(cp.CachepressError):
        run(**options)
    assert not (work / "results").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, cp.CachepressError("no")])
def test_a_run_that_ends_before_its_first_answer_leaves_no_folder(work, error, monkeypatch):
    answer, stop = Answerer.alone, [0]

    def stopped(self, run, context, reference=None):
        if context.number == stop[0]:
            raise error
        return answer(self, run, context, reference)

    monkeypatch.setattr(Answerer, "alone", stopped)
    (work / "there").mkdir()
    for output in ("deep/er/results", "there"):
        with pytest.raises(type(error) if isinstance(error, Exception) else error):
            run(output_dir=output)
    assert not (work / "deep").exists() and list((work / "there").iterdir()) == []
    stop[0] = 1
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        run()
    (folder,) = (work / "results").iterdir()
    assert len(records(folder)) == 2 and (folder / CONFIG).exists()
    stop[0] = 0
    (work / "facts.jsonl").write_text((work / "facts.jsonl").read_text().replace("w", "v", 1))
    with pytest.raises(type(error) if isinstance(error, Exception) else error):
        run()
    assert len(records(folder)) == 2 and (folder / CONFIG).exists()


def test_a_press_that_is_refused_at_work_leaves_no_folder(work, monkeypatch):
    with pytest.raises(cp.CachepressError, match="max_bytes: got 3"):
        run(press="knorm(max_bytes=3)", compression_ratio=None)
    assert not (work / "results").exists()
    together = Answerer.together

    def refused(self, runs, context, *rest):
        for i, found in enumerate(together(self, runs, context, *rest)):
            if i == 2:
                raise cp.CachepressError("no more")
            yield found

    monkeypatch.setattr(Answerer, "together", refused)
    config = SweepConfig(
        presses=["knorm"],
        ratios=[0.25, 0.5, 0.75],
        datasets=["facts.jsonl"],
        models=["model"],
        options={"output_dir": "deep/er", "device": "cpu"},
    )
    with pytest.raises(cp.CachepressError, match="no more"):
        run_sweep(config, quiet=True)
    left = sorted((work / "deep" / "er").iterdir())
    assert len(left) == 2 and all(len(records(folder)) == 2 for folder in left)


def test_a_name_that_no_disk_takes_leaves_no_folder(work):
    with pytest.raises(OSError, match="too long"):
        run(output_dir="deep/" + "x" * 300)
    assert not (work / "deep").exists()


def test_files_follow_the_umask(work):
    before = os.umask(0o027)
    try:
        folder = run()
        save_artefact(folder / "a.safetensors", "x", load_file("model/model.safetensors"), {})
    finally:
        os.umask(before)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in folder.iterdir()}
    modes.pop(".lock")
    assert set(modes) == {RECORDS, PREDICTIONS, METRICS, CONFIG, "a.safetensors"}
    assert set(modes.values()) == {"0o640"}


def test_prompts_are_those_of_the_file_however_it_is_named(work):
    (work / "prompts.json").write_text(json.dumps({"qasper": "{context} Say: {input}"}))
    (work / "link.json").symlink_to(work / "prompts.json")
    names = ("prompts.json", "./prompts.json", "link.json", str(work / "prompts.json"))
    configs = [EvaluationConfig(dataset="longbench", prompts=name) for name in names]
    assert len({str(config.identity()) for config in configs}) == 1
    assert len({config.get_results_dir() for config in configs}) == 1


def test_a_refused_sweep_leaves_no_folder_and_one_left_out_none_either(work, answered):
    options = {k: v for k, v in CONFIGURED.items() if k in ("output_dir", "device")}
    config = SweepConfig(
        presses=["knorm"], ratios=[0.5], datasets=["facts.jsonl"], models=["model"], options=options
    )
    with pytest.raises(cp.CachepressError, match="there is room for"):
        run_sweep(replace(config, options={**options, "max_context_length": 5}), quiet=True)
    assert not (work / "results").exists()
    with pytest.raises(cp.CachepressError, match="nothing was learned"):
        run_sweep(replace(config, presses=["knorm", "qfilter"]), quiet=True)
    assert not (work / "results").exists()
    run_sweep(config, quiet=True)
    assert len(list((work / "results").iterdir())) == 2


@pytest.fixture
def at_home(work, monkeypatch):
    monkeypatch.setenv("HOME", str(work))
    return work


def test_a_tilde_is_the_home_folder_and_the_same_run(at_home, answered):
    folder = run(output_dir=str(at_home / "results"))
    assert answered == [0, 1]
    tilde = {"dataset": "~/facts.jsonl", "model": "~/model", "output_dir": "~/results"}
    assert run(**tilde) == folder and run(**tilde, data_path="~") == folder
    (at_home / "options.yaml").write_text(yaml.safe_dump({**CONFIGURED, **tilde}))
    assert main(["evaluate", "--config=~/options.yaml"]) == 0
    given = [
        f"--{name.replace('_', '-')}={value}" for name, value in {**CONFIGURED, **tilde}.items()
    ]
    assert main(["evaluate", *given]) == 0
    run_sweep(
        SweepConfig(
            presses=["knorm"],
            ratios=[0.5],
            datasets=[tilde["dataset"]],
            models=[tilde["model"], str(at_home / "model")],
            options={"output_dir": "~/results", "device": "cpu"},
        ),
        quiet=True,
    )
    assert answered == [0, 1]
    assert len(records(folder)) == 4 and len(list((at_home / "results").iterdir())) == 2
    assert not (at_home / "~").exists()
    assert main(["report", "~/results", "--output=~/page", "--formats=md"]) == 0
    assert (at_home / "page").is_dir()


def test_a_tilde_in_a_press_is_the_home_folder(at_home, answered):
    (at_home / "heads.json").write_text(
        json.dumps({f"{i}-{j}": [0.5] for i in range(4) for j in range(2)})
    )
    folder = run(press="HeadKVPress(KnormPress(0.5), '~/heads.json')")
    assert run(press=f"HeadKVPress(KnormPress(0.5), '{at_home}/heads.json')") == folder
    assert answered == [0, 1]


@pytest.mark.parametrize("name", ["org/model", "org/~model", "a~b", "~nobody-has-this-name/x"])
def test_names_on_the_hub_are_no_paths(at_home, name):
    config = EvaluationConfig(model=name, data_path=None)
    assert config.model == name and config.identity()["model"] == name


IDLE = [
    {"cache_dir": "relative"},
    {"cache_dir": "~/relative"},
    {"local_files_only": True, "token": "hf_secret", "force_download": False},
    {"device_map": "cpu", "low_cpu_mem_usage": True, "max_memory": {"cpu": "9GB"}},
]


def test_arguments_that_change_no_answer_are_the_same_run(work, answered):
    folder = run()
    for idle in [*IDLE, {"cache_dir": str(work / "relative")}]:
        assert run(model_kwargs=idle) == folder
    assert answered == [0, 1]
    assert "hf_secret" not in "".join(p.read_text() for p in folder.iterdir())
    other = run(model_kwargs={"attn_implementation": "eager", "cache_dir": "relative"})
    assert other != folder and answered == [0, 1, 0, 1]
    assert run(model_kwargs={"attn_implementation": "eager"}) == other and len(answered) == 4


def test_idle_arguments_of_0_1_0_are_no_difference():
    config = EvaluationConfig(**CONFIGURED)
    saved = {**config.identity(), "model_kwargs": {"cache_dir": "elsewhere", "token": "x"}}
    assert config.difference(saved) is None
    assert config.difference({**saved, "model_kwargs": {"revision": "x"}}) == "model_kwargs"
