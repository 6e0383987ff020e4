"""What an import of the package does, and does not: each in a process of its own."""

import resource
import subprocess
import sys

import pytest

import cachepress as cp
from cachepress import presses
from cachepress.cli import main

TASK = "kv-press-text-generation"
KNOWN = f"""
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY
print(PIPELINE_REGISTRY.check_task({TASK!r})[1]["impl"].__name__)
"""
USED = f"""
from tests.tiny import tiny, tokenizer
pipe = pipeline({TASK!r}, model=tiny(), tokenizer=tokenizer())
print(list(pipe("w1 w2 w3", question="w4", max_new_tokens=2)))
"""


FORKED = """
import os, sys, torch
for code in sys.argv[1:]:
    if not (child := os.fork()):
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
"""Runs each code as if in a process of its own that has imported torch, which takes long."""


def run(*codes: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", FORKED, *codes], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_pipeline_is_known_whichever_library_came_first():
    orders = (
        "import cachepress, importlib.util; importlib.util.find_spec('transformers.pipelines')",
        "import transformers, cachepress",
        "from transformers import pipeline; from cachepress import *",
    )
    names = ["KVPressTextGenerationPipeline"] * 3
    assert run(f"{orders[0]}{KNOWN}{USED}", *(f"{order}{KNOWN}" for order in orders[1:])) == [
        names[0],
        "['answer']",
        *names[1:],
    ]


def test_a_bare_import_loads_nothing_heavy_and_modules_hide_no_name():
    code = (
        "import importlib, pkgutil, sys, cachepress\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'yaml'}\n"
        "print(heavy & {*sys.modules}, cachepress.__version__)\n"
        "print(cachepress.SnapKVPress.alias, cachepress.spec.parse('knorm'))\n"
        "for found in pkgutil.iter_modules(cachepress.__path__):\n"
        "    found.name == '__main__' or importlib.import_module(f'cachepress.{found.name}')\n"
        "modules = {found.name for found in pkgutil.iter_modules(cachepress.__path__)}\n"
        "print(modules & {*cachepress.__all__}, callable(cachepress.prefill))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.stderr, done.stdout.splitlines()) == (
        "",
        [f"set() {cp.__version__}", "snapkv KnormPress(compression_ratio=0.0)", "set() True"],
    )


def test_every_public_name_is_there():
    assert cp.__all__ == [*cp._HOMES, *presses.__all__]
    assert len(cp.__all__) == len(set(cp.__all__)) > 60
    assert {*cp.__all__} <= {*dir(cp)}
    space = {}
    exec("from cachepress import *", space)
    assert {*cp.__all__} <= {*space}
    assert space["prefill"] is cp.prefill is cp.generation.prefill.prefill
    assert space["AdaKVPress"] is presses.AdaKVPress
    for name in ("Nothing", "NothingPress", "_nothing", "nothing"):
        with pytest.raises(AttributeError, match=f"module 'cachepress' has no attribute '{name}'"):
            getattr(cp, name)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["evalute"], 2),
        (["evaluate", "--prss=knorm"], 2),
        (["train", "nothing"], 2),
    ],
)
def test_what_needs_no_model_answers_at_once(arguments, code):
    command = [sys.executable, "-X", "importtime", "-m", "cachepress", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "numpy", "pandas"}
    # Seconds of the processor, of which a busy machine gives as many as a quiet one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_every_command_helps_without_a_model():
    code = (
        "import sys\n"
        "from contextlib import redirect_stdout, suppress\n"
        "from io import StringIO\n"
        "from cachepress.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    with suppress(SystemExit), redirect_stdout(StringIO()):\n"
        "        main([*command.split(), '--help'])\n"
        "print({'torch', 'transformers'} & {*sys.modules})\n"
    )
    names = ["evaluate", "sweep", "report", "score", "data list", "data convert", "inspect"]
    names += ["demo", "models", "bench", "presses", "train"]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


@pytest.mark.parametrize("arguments", ["--help", "models"])
def test_a_closed_pipe_ends_a_command_silently(arguments):
    command = f"{sys.executable} -m cachepress {arguments}"
    script = f"({command}; echo code $? >&2) | (exec <&-; sleep 10) & wait $!"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stderr == "code 141\n"


def test_main_in_a_thread_leaves_signals_alone():
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor() as pool:
        assert pool.submit(main, ["models"]).result() == 0
