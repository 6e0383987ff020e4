"""Options of commands are read off dataclasses: none is lost, each is explained and typed."""

import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from typing import get_args

import pytest

from cachepress.cli import main
from cachepress.cli.arguments import Command, Parser, add_command, given
from cachepress.cli.measure import Kind, Train
from cachepress.cli.program import COMMANDS, command_of
from cachepress.evaluation import EvaluationConfig
from cachepress.options import EvaluationFields, bounds_of
from cachepress.train import KINDS

OF_EVALUATIONS = (
    "beyond-trained-length chat data-path device dtype fraction log-level max-context-length "
    "max-new-tokens metric model-kwargs no-beyond-trained-length no-chat no-overwrite "
    "no-truncation no-trust-remote-code output-dir overwrite prefill-chunk-size prefill-mode "
    "prompts query-aware seed storage truncation trust-remote-code config"
)
OPTIONS = {
    "evaluate": f"{OF_EVALUATIONS} compression-ratio data-dir dataset model no-query-aware press "
    "press-name",
    "sweep": f"{OF_EVALUATIONS} batch-size csv datasets dry-run executor kl markdown models no-kl "
    "presses ratios workers",
    "report": "formats output",
    "score": "metric",
    "data list": "",
    "data convert": "data-dir data-path model no-trust-remote-code output prompts seed "
    "trust-remote-code",
    "inspect": "chat compression-ratio context device dtype max-new-tokens model no-chat "
    "no-trust-remote-code output press query-aware question storage trust-remote-code",
    "demo": "output-dir",
    "models": "fetch remove",
    "bench": "baseline batch-sizes beyond-trained-length config device dtype forks json layers "
    "lengths model no-baseline no-beyond-trained-length no-trust-remote-code prefill-chunk-size "
    "prefill-mode presses ratios repeats steps storage trust-remote-code",
    "presses": "length page repeats steps",
    "train": "device dtype model no-trust-remote-code output press seed steps text tokens "
    "trust-remote-code window",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_options_and_explains_them(command, capsys):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    listed = capsys.readouterr().out.partition("\noptions:")[2]
    entries = re.split(r"\n  (?=-)", listed)[1:]
    found = {flag for entry in entries for flag in re.findall(r"--([a-z-]+)", entry.split("  ")[0])}
    assert found - {"help"} == set(OPTIONS[command].split())
    silent = [entry.strip() for entry in entries if not re.search(r"\S\s\s+\S", entry)]
    assert silent in ([], ["--no-truncation"])


def test_what_is_given_of_an_evaluation_is_all_that_is_told():
    told = command_of(["evaluate", "--no-truncation", "--press-name=knorm", "--chat", "--seed=-3"])
    assert told.options == {"truncation": False, "press": "knorm", "chat": True, "seed": -3}
    assert told.config is None
    told = command_of(["evaluate", "--truncation", "--model-kwargs={a: 1}", "--config", "c.yaml"])
    assert (told.options, told.config) == ({"truncation": True, "model_kwargs": {"a": 1}}, "c.yaml")
    assert command_of(["evaluate", "--truncation", "end"]).options == {"truncation": "end"}


def test_a_field_of_a_sweep_comes_before_one_of_its_evaluations():
    told = command_of(["sweep", "--query-aware", "both", "--ratios", "0.5", "1", "--kl", "--csv=t"])
    assert told.options == {"query_aware": "both", "ratios": [0.5, 1.0], "kl": True}
    assert (told.csv, told.markdown, told.dry_run) == ("t", None, False)


def test_a_command_of_its_own_has_the_defaults_of_its_fields():
    told = command_of(["train", "lukv", "--window=10"])
    assert told == Train(kind="lukv", window=10)
    assert (told.tokens, told.model, told.trust_remote_code) == (20000, "smollm2-135m", False)
    assert get_args(Kind) == tuple(KINDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "argument kind: invalid choice: 'nothing'"),
        (["evaluate", "--max-new-tokens=0"], "got '0', wanted a whole number of at least 1"),
        (["bench", "--lengths", "5", "x"], "argument --lengths: got 'x', wanted a whole number"),
        (["evaluate", "--seed=4294967296"], "at most 4294967295"),
        (["inspect", "--question=q"], "the following arguments are required: --context"),
        (["evaluate", "--model-kwargs=["], "is not YAML"),
        (["data"], "the following arguments are required: action"),
    ],
)
def test_what_is_wrong_is_one_line_that_says_where_help_is(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert message in line and line.endswith(" --help)")


def test_an_option_is_a_field_and_its_line():
    @dataclass(frozen=True)
    class Count(Command):
        """Count to a number. Or further.

        Attributes:
            to: the number, 100 % of it,
                or more.
        """

        to: float = 3.0
        options: dict[str, object] = field(default_factory=dict, metadata=given(EvaluationFields))

    parser = Parser()
    add_command(parser.add_subparsers(), "count", Count)
    values = vars(parser.parse_args(["count", "--to=2", "--press=tova"]))
    assert values.pop("command")(values) == Count(2.0, {"press": "tova"})


def test_bounds_are_those_of_the_fields():
    bounds = bounds_of(EvaluationFields)
    assert bounds == bounds_of(EvaluationConfig)
    assert bounds["max_new_tokens"] == (1, 10**7) and bounds["seed"] == (1 - 2**32, 2**32 - 1)
    assert bounds["prefill_chunk_size"] == bounds["max_context_length"] == (1, 2**31 - 1)
    assert {f.name for f in fields(EvaluationFields)} == {f.name for f in fields(EvaluationConfig)}


def test_help_without_docstrings_still_lists_the_options():
    command = [sys.executable, "-OO", "-m", "cachepress", "bench", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and "--batch-sizes" in done.stdout
