import json
import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # Read when triton is first imported, which other libraries do as well.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets what it starts in the background ignore it, and every process that is started
    # from there would: commands that tests interrupt are to be as in a terminal.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import transformers

from cachepress.evaluation import executors
from cachepress.hf import recording, steps
from tests.bounds import no_close_answers
from tests.exact import doubled
from tests.tiny import tiny, tokenizer, words


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def clear_answers():
    """No token of an answer of a float64 model hangs on rounding."""
    with no_close_answers():
        yield


@pytest.fixture
def replays(monkeypatch):
    """The steps that were replayed, while they are recorded on this processor."""
    found, real = [], recording.Recording.step

    def step(self, asked):
        found.append(len(asked.ids))
        return real(self, asked)

    monkeypatch.setattr(recording.Recording, "step", step)
    monkeypatch.setattr(steps, "records_on", lambda device: True)
    monkeypatch.setattr(steps, "_LATEST", type(steps._LATEST)())
    return found


@pytest.fixture
def exact_models(monkeypatch, clear_answers):
    """Evaluations of this process compute in float64."""
    load = executors.load

    def exactly(*args, **options):
        model, made = load(*args, **options)
        return doubled(model), made

    monkeypatch.setattr(executors, "load", exactly)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny model and its tokenizer, saved as a user would have them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = tiny()
    model.generation_config.suppress_tokens = [0, 1, 2, 96]
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    transformers.logging.set_verbosity_error()
    return str(folder)


@pytest.fixture(scope="session")
def data_file(tmp_path_factory):
    """Four contexts with two questions each."""
    path = tmp_path_factory.mktemp("data") / "facts.jsonl"
    rows = [
        {
            "context": words(40, seed=context),
            "question": words(3, seed=10 * context + question),
            "answer": [f"w{10 + question}", "w7"],
            "answer_prefix": f"w{9 + question}",
            "max_new_tokens": 4 + question,
            "task": ["easy", "hard"][question],
        }
        for context in range(4)
        for question in range(2)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
