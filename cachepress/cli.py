"""The command line: ``cachepress --help`` lists the commands."""

import argparse
import logging
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from cachepress import __version__
from cachepress.errors import CachepressError, out_of_memory
from cachepress.files import expanded
from cachepress.interrupts import WORDS, Interrupts
from cachepress.limits import (
    MOST,
    MOST_SEED,
    MOST_TOKENS,
    is_out_of_memory,
    is_whole,
    shown,
    visible,
    wanted,
)

if TYPE_CHECKING:
    from cachepress.hf.types import PreTrainedModel, PreTrainedTokenizerBase
    from cachepress.presses import BasePress

logger = logging.getLogger(__name__)
FAILED, CLOSED_PIPE = 2, 128 + signal.SIGPIPE
Command = Callable[[dict[str, object]], None]
_FILE: dict[str, Any] = {"type": expanded, "metavar": "FILE"}
_FOLDER: dict[str, Any] = {"type": expanded, "metavar": "FOLDER"}
_TRAINABLE = ("query_stats", "q_filters", "kvzap_linear", "kvzap_mlp", "fastkvzip", "lukv")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog}: error: {visible(message)} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 2 after one line on stderr for anything that the user can mend; 130 or 143 after SIGINT
        or SIGTERM, and 141 where nobody reads the output any more.
    """
    command: Command | None = None
    with Interrupts() as interrupts:
        try:
            options = vars(_parser().parse_args(arguments))
            command = options.pop("command")
            command(options)
            code = 0
        except BaseException as error:
            code = _ended(error, interrupts, command)
        return code if _flushed() or code else CLOSED_PIPE


def _ended(error: BaseException, interrupts: Interrupts, command: Command | None) -> int:
    """Say in one line why a command ended early.

    Raises:
        BaseException: the error itself, if it is no fault of the user's.
    """
    if interrupts.number is not None or isinstance(error, KeyboardInterrupt):
        number = interrupts.number or signal.SIGINT
        hint = f": {_KEPT[command]}" if command in _KEPT else ""
        _fail(f"{WORDS[number]}{hint}")
        return 128 + number
    # argparse, whose way out is SystemExit, says nothing of a broken pipe.
    ends_quietly = isinstance(error, BrokenPipeError | SystemExit)
    if ends_quietly and (not _flushed() or _nobody_reads()):
        return CLOSED_PIPE
    message = _explanation(error)
    if message is None:
        raise error
    return _fail(message)


def _explanation(error: BaseException) -> str | None:
    if isinstance(error, CachepressError):
        return str(error)
    if is_out_of_memory(error):
        return str(out_of_memory(error))
    if isinstance(error, RecursionError):
        return "the input is nested too deeply"
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}; nothing that was computed is lost"
    if isinstance(error, ImportError):
        return f'{error}: install it with pip install "cachepress[eval]"'
    return None


class _Visible(logging.Formatter):
    """Log lines that a terminal does not obey."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _say(text: str = "") -> None:
    print(visible(text))


def _fail(message: str) -> int:
    with suppress(BrokenPipeError):
        print(f"cachepress: error: {visible(' '.join(message.split()))}", file=sys.stderr)
    return FAILED


def _flushed() -> bool:
    """Whether all that was printed got out; what did not is forgotten."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes once more when it exits, and would say that it could not.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _nobody_reads() -> bool:
    """Whether the reader of what is printed is gone; a pipe to a worker can break as well."""
    gone = select.POLLERR | select.POLLHUP
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # It is none of the system's.
            poll.register(stream.fileno(), gone)
    return any(event & gone for _, event in poll.poll(0))


def _evaluate(options: dict[str, object]) -> None:
    from cachepress.evaluation.config import load_config
    from cachepress.evaluation.runner import EvaluationRunner
    from cachepress.evaluation.summary import notes_of, results_table, task_table

    config = load_config(options.pop("config", None), options)
    _log(config.log_level)
    _warn_of_nothing_dropped(config.make_press())
    runner = EvaluationRunner(config)
    metrics = runner.evaluate()
    _say(task_table(metrics))
    _say()
    _say(results_table([(config.press, metrics)]))
    for note in notes_of(config, metrics):
        _say(f"\n{note}")
    _say(f"\nresults: {runner.results_dir}")


def _sweep(options: dict[str, object]) -> None:
    from cachepress.evaluation.records import write_atomically
    from cachepress.evaluation.summary import sweep_page, sweep_sheet, sweep_text
    from cachepress.evaluation.sweep import load_sweep, run_sweep

    markdown, sheet = options.pop("markdown", None), options.pop("csv", None)
    dry = options.pop("dry_run", False)
    config = load_sweep(options.pop("config", None), options)
    _log(str(config.options.get("log_level", "INFO")))
    results = run_sweep(config, only_plan=dry)
    if dry:
        return
    _say(sweep_text(results))
    if markdown is not None:
        command = f"cachepress {shlex.join(sys.argv[1:])}"
        write_atomically(Path(markdown), sweep_page(results, command))
    if sheet is not None:
        write_atomically(Path(sheet), sweep_sheet(results))
    _say(f"\nresults: {config.output_dir}")


def _score(options: dict[str, object]) -> None:
    from cachepress.evaluation.rescore import score_again
    from cachepress.evaluation.summary import results_table

    _log("INFO")
    found = score_again(Path(options["results"]), options["metric"])
    _say(results_table([(folder.name, metrics) for folder, metrics in found]))


def _data(options: dict[str, object]) -> None:
    from cachepress.evaluation.config import EvaluationConfig
    from cachepress.evaluation.registry import DATASET_REGISTRY
    from cachepress.evaluation.samples import load_table
    from cachepress.evaluation.tasks.base import COLUMNS
    from cachepress.models.loading import load_tokenizer

    _log("INFO")
    output = options.pop("output")
    if options["dataset"] is None:
        for task in DATASET_REGISTRY.values():
            _say(f"{task.name:14} {task.about}")
            if task.parts:
                _say(f"{'':14} --data-dir {', '.join(task.parts)}")
        return
    if output is None or Path(output).suffix != ".parquet":
        raise CachepressError(f"--output: got {output!r}, wanted a file that ends in .parquet")
    config = EvaluationConfig(**options)
    table = load_table(config, load_tokenizer(config.model, config.loading))
    table[list(COLUMNS)].to_parquet(output)
    _say(f"written: {output}, {len(table)} samples of {table['context'].nunique()} contexts")


def _report(options: dict[str, object]) -> None:
    from cachepress.pages.report import write_report

    _log("INFO")
    output = None if options["output"] is None else Path(options["output"])
    for path in write_report(Path(options["results"]), output, options["formats"]):
        _say(f"written: {path}")


def _inspect(options: dict[str, object]) -> None:
    from cachepress.pages.inspect import write_inspection
    from cachepress.spec import parse

    _log("INFO")
    press = parse(options["press"])
    if press is None:
        raise CachepressError("no_press keeps every token: name a press to inspect")
    if options["compression_ratio"] is not None:
        press = press.with_ratio(options["compression_ratio"])
    _warn_of_nothing_dropped(press)
    try:
        context = Path(options["context"]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CachepressError(f"{options['context']} is not a text in UTF-8: {error}") from error
    model, tokenizer = _loaded(options)
    names = ("max_new_tokens", "query_aware", "storage", "chat")
    path = write_inspection(
        model,
        tokenizer,
        press,
        context,
        options["question"],
        Path(options["output"]),
        **{name: options[name] for name in names},
    )
    _say(f"written: {path}")


def _demo(options: dict[str, object]) -> None:
    from cachepress.evaluation.demo import run_demo

    _log("INFO")
    _say(run_demo(**options))


def _models(options: dict[str, object]) -> None:
    from cachepress.models.builtin import BUILTIN_MODELS, describe
    from cachepress.models.loading import resolve

    if options.pop("fetch"):
        for name in BUILTIN_MODELS:
            resolve(name)
    for model in describe():
        place = model.path or "not fetched yet: the first use fetches it"
        _say(f"{model.name}: {model.title}, {model.licence}, context {model.context_length}")
        _say(f"  {place}" + (f" ({model.bytes_on_disk / 1e6:.0f} MB)" if model.path else ""))
    _say("any other name is a local folder or a hub name, and goes to transformers as it is")


def _presses(options: dict[str, object]) -> None:
    from cachepress.presses import ScorerPress
    from cachepress.spec import aliases

    path, length = options.pop("page"), options.pop("length")
    if path is not None:
        from cachepress.bench import BenchOptions
        from cachepress.catalogue import measure, write_page

        _log("INFO")
        write_page(path, measure(BenchOptions(lengths=(length,), **options), 0.5))
        return
    known = list(aliases().values())
    for kind in (k for k in known if issubclass(k, ScorerPress)):
        _print_press(kind)
    _say("\nwith budgets of their own, or around any of them and around each other:")
    for kind in (k for k in known if not issubclass(k, ScorerPress)):
        _print_press(kind)


def _print_press(kind: "type[BasePress]") -> None:
    summary = (kind.__doc__ or "").strip().splitlines()[0]
    _say(f"{kind.alias:28} {kind.__name__}{_options_of(kind)}\n{'':28} {summary}")


def _options_of(kind: type) -> str:
    """The options of a press class as it would be written, with their defaults."""
    parts = [
        f.name if f.default is MISSING else f"{f.name}={f.default!r}"
        for f in fields(kind)
        if not f.kw_only
    ]
    return f"({', '.join(parts)})"


def _bench(options: dict[str, object]) -> None:
    from cachepress.bench import BenchOptions, bench_table, run_bench, write_json

    _log("INFO")
    path = options.pop("json", None)
    result = run_bench(BenchOptions(**options))
    _say(bench_table(result))
    if path is not None:
        write_json(result, path)


def _train(options: dict[str, object]) -> None:
    from cachepress.spec import parse
    from cachepress.train import Lesson, train, windows_of

    _log("INFO")
    path = options["text"]
    try:
        text = None if path is None else Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CachepressError(f"{path} is not a text in UTF-8: {error}") from error
    model, tokenizer = _loaded(options)
    model.config.name_or_path = model.config.name_or_path or options["model"]
    windows = windows_of(tokenizer, text, options["tokens"], options["window"], options["seed"])
    press = None if options["press"] is None else parse(options["press"])
    how = {name: options[name] for name in ("seed", "steps")}
    lesson = Lesson(model, windows, tokenizer, press, **how)
    _say(f"written: {train(options['kind'], lesson, options['output'])}")


_GOES_ON = "every finished context is on disk, the same command goes on"
_KEPT = {
    **dict.fromkeys((_evaluate, _sweep, _demo), _GOES_ON),
    _train: "nothing was written, and nothing is lost",
}
"""What is left of the commands that take long, when they are interrupted."""


def _loaded(options: dict[str, object]) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from cachepress.models.loading import load

    return load(
        str(options["model"]),
        dtype=options["dtype"],  # type: ignore
        device=options["device"],  # type: ignore
        model_kwargs={"trust_remote_code": options["trust_remote_code"]},
    )


def _add_trust(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run the code that a model's repository brings, having read it",
        **({} if p.argument_default is argparse.SUPPRESS else {"default": False}),
    )


def _warn_of_nothing_dropped(press: "BasePress | None") -> None:
    """A press named without a ratio keeps all, which is seldom what was meant."""
    try:
        nothing = press is not None and press.with_ratio(0.0) == press
    except CachepressError:
        return  # It has no ratio.
    if nothing:
        logger.warning("%r drops nothing: give --compression-ratio, such as 0.5", press)


def _log(level: str) -> None:
    from cachepress.models.loading import be_quiet

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    be_quiet()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(levelname)s: %(message)s"))
    logging.basicConfig(handlers=[handler])
    logging.getLogger("cachepress").setLevel(level.upper())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cachepress", description="KV-cache compression: press, answer, measure.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    _evaluate_parser(commands)
    _sweep_parser(commands)
    _result_parsers(commands)
    _data_parser(commands)
    _inspect_parser(commands)
    demo = commands.add_parser("demo", help="compare presses on the built-in model and data")
    demo.add_argument("--output-dir", type=expanded, default="./results", help="default: ./results")
    demo.set_defaults(command=_demo)
    models = commands.add_parser("models", help="say which models are built in, and where")
    models.add_argument("--fetch", action="store_true", help="fetch what is not there yet")
    models.set_defaults(command=_models)
    _bench_parser(commands)
    _presses_parser(commands)
    _train_parser(commands)
    return parser


def _train_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "train",
        help="learn what a press has to know of a model",
        description="Learn what a press has to know of a model, from any text, and leave it where "
        "that press looks for it.",
    )
    p.add_argument("kind", choices=_TRAINABLE, metavar="kind", help=", ".join(_TRAINABLE))
    p.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    p.add_argument("--press", help="the press whose scores are judged (for lukv)")
    p.add_argument("--text", **_FILE, help="text to learn from (default: built-in prose)")
    p.add_argument("--tokens", type=_count, default=20000, help="tokens to read (20000)")
    p.add_argument("--window", type=_count, default=1000, help="tokens of one context (1000)")
    p.add_argument("--steps", type=_count, default=300, help="steps of descent (300)")
    p.add_argument("--seed", type=_seed, default=0, help="for what is drawn (0)")
    p.add_argument("--output", **_FILE, help="where to write (default: where presses look)")
    p.add_argument("--dtype", help="torch dtype by name")
    p.add_argument("--device", help="torch device")
    _add_trust(p)
    p.set_defaults(command=_train)


def _count(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, -MOST_SEED, MOST_SEED)


def _tokens(text: str) -> int:
    """A number that is only compared with tokens."""
    return _whole(text, 1, MOST_TOKENS)


def _whole(text: str, least: int, most: int = MOST) -> int:
    number = int(text) if re.fullmatch("-?[0-9]{1,18}", text) else None
    if not is_whole(number, least, most):
        raise argparse.ArgumentTypeError(f"got {shown(text)}, wanted {wanted(least, most)}")
    return int(text)


def _presses_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser("presses", help="list the presses with their options")
    p.add_argument("--page", **_FILE, help="write the page of all presses (Markdown)")
    p.add_argument("--length", type=_count, default=2048, help="tokens to measure with (2048)")
    p.add_argument("--steps", type=_count, default=20, help="tokens to decode (20)")
    p.add_argument("--repeats", type=_count, default=3, help="repeats of everything (3)")
    p.set_defaults(command=_presses)


def _evaluate_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "evaluate",
        help="evaluate a press on a data set",
        description="Evaluate a press on a data set. Options come before the config file, and "
        "that comes before the defaults: no_press with the built-in model and data, offline.",
        argument_default=argparse.SUPPRESS,
    )
    p.add_argument("--config", **_FILE, help="YAML file with any of these options")
    p.add_argument("--dataset", help="a benchmark's name, or a .csv, .jsonl or .parquet file")
    p.add_argument("--data-dir", help="part of the data set, such as multi_key-1000 of builtin")
    p.add_argument("--model", help="smollm2-135m, a local folder, or a hub name")
    p.add_argument(
        "--press", "--press-name", dest="press", help='an alias, or "SnapKVPress(window_size=32)"'
    )
    p.add_argument("--compression-ratio", type=float, help="fraction of pairs removed, 0 to 1")
    flag = argparse.BooleanOptionalAction
    p.add_argument("--query-aware", action=flag, help="let the press see the question")
    _add_evaluation_options(p)
    p.set_defaults(command=_evaluate)


def _sweep_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "sweep",
        help="evaluate presses at ratios on data sets, with one prefill of a context for all",
        description="Evaluate presses at ratios on data sets. A context is read once for all "
        "presses that can share a reading; the plan says which cannot. Options come before the "
        "config file. Every finished context is on disk; the same command goes on.",
        argument_default=argparse.SUPPRESS,
    )
    many = {"nargs": "+"}
    p.add_argument("--config", **_FILE, help="YAML file with any of these options")
    p.add_argument("--presses", **many, help="aliases or spellings, or all (default: snapkv knorm)")
    p.add_argument(
        "--ratios", type=float, **many, help="for each press (default: 0.25 0.5 0.75 0.9)"
    )
    p.add_argument(
        "--datasets", **many, help="names with a part, such as builtin:multi_key-1000 (builtin)"
    )
    p.add_argument("--models", **many, help="default: smollm2-135m")
    p.add_argument("--query-aware", help="no, yes or both: let presses see the question (no)")
    p.add_argument("--executor", help="serial, process or ray (serial)")
    p.add_argument("--workers", type=_count, help="workers of process and ray (1)")
    p.add_argument("--batch-size", type=_count, help="most answers decoded at once (128)")
    p.add_argument(
        "--kl",
        action=argparse.BooleanOptionalAction,
        help="measure the divergence from what the uncompressed model expects (no)",
    )
    p.add_argument("--markdown", **_FILE, help="write the tables to a file, too")
    p.add_argument("--csv", **_FILE, help="write a table for spreadsheets, too")
    p.add_argument("--dry-run", action="store_true", help="print the plan, and do nothing")
    _add_evaluation_options(p)
    p.set_defaults(command=_sweep)


def _result_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "report",
        help="make a page of results",
        description="Make one page of a folder of results that opens offline: quality against "
        "kept bytes and decode speed, a table of all that was measured, and every sample.",
    )
    p.add_argument("results", type=expanded, help="folder of results, such as ./results")
    p.add_argument("--output", **_FOLDER, help="where to write (default: the results)")
    p.add_argument(
        "--formats",
        nargs="+",
        default=["html"],
        help="html, png and svg for papers, md and latex for tables, csv for spreadsheets (html)",
    )
    p.set_defaults(command=_report)
    p = commands.add_parser(
        "score",
        help="score answers again, without the model",
        description="Score the answers of finished runs again, by their own metric or another.",
    )
    p.add_argument("results", type=expanded, help="folder of results, such as ./results")
    p.add_argument("--metric", help="a metric for all samples (default: each sample's own)")
    p.set_defaults(command=_score)


def _data_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser("data", help="list benchmarks, or convert one to a file")
    actions = p.add_subparsers(required=True, metavar="action")
    listed = actions.add_parser("list", help="say which benchmarks there are, and their parts")
    listed.set_defaults(command=_data, dataset=None, output=None)
    p = actions.add_parser(
        "convert",
        help="write a benchmark's rows to a Parquet file",
        description="Write a benchmark's rows to a Parquet file, which --dataset takes.",
    )
    p.add_argument("dataset", help="name of a benchmark")
    p.add_argument("--data-dir", help="part of it")
    p.add_argument("--data-path", help="folder with its original files (default: the hub)")
    p.add_argument("--prompts", **_FILE, help="prompts instead of ours, as for evaluate")
    p.add_argument("--model", default="smollm2-135m", help="whose tokenizer counts (smollm2-135m)")
    p.add_argument("--seed", type=_seed, default=0, help="seed of what is generated (0)")
    p.add_argument("--output", required=True, **_FILE, help="the Parquet file")
    _add_trust(p)
    p.set_defaults(command=_data)


def _inspect_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "inspect",
        help="make a page that shows which tokens a press keeps",
        description="Make a page of a context, each token shaded by how many heads kept it, with "
        "the answers of the whole and of the compressed cache.",
    )
    p.add_argument("--press", default="snapkv", help="an alias or a spelling (snapkv)")
    p.add_argument("--compression-ratio", type=float, help="fraction of pairs removed, 0 to 1")
    p.add_argument("--context", required=True, **_FILE, help="the text")
    p.add_argument("--question", required=True, help="what is asked about it")
    p.add_argument("--query-aware", action="store_true", help="let the press see the question")
    p.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the model's chat template (yes)",
    )
    p.add_argument("--storage", default="full", help="full, int8, int4 or int2 (full)")
    p.add_argument("--model", default="smollm2-135m", help="default: smollm2-135m")
    p.add_argument("--output", **_FILE, default="inspect.html", help="(inspect.html)")
    p.add_argument("--max-new-tokens", type=_count, default=50, help="of an answer (50)")
    p.add_argument("--dtype", help="torch dtype by name")
    p.add_argument("--device", help="torch device")
    _add_trust(p)
    p.set_defaults(command=_inspect)


def _add_evaluation_options(p: argparse.ArgumentParser) -> None:
    """Options that an evaluation and a sweep have in common."""
    p.add_argument("--data-path", help="folder with a benchmark's original files")
    p.add_argument("--device", help="torch device (default: a GPU if there is one)")
    p.add_argument("--dtype", help="torch dtype (default: float32 on CPU)")
    p.add_argument("--metric", help="what judges all answers (default: each sample's own)")
    p.add_argument("--fraction", type=float, help="fraction of the contexts to evaluate")
    p.add_argument("--seed", type=_seed, help="seed of data and sampling")
    p.add_argument("--max-new-tokens", type=_count, help="instead of the data's own column")
    p.add_argument("--max-context-length", type=_tokens, help="most tokens of a context")
    p.add_argument(
        "--prefill-chunk-size", type=_tokens, help="tokens of a context computed at once"
    )
    p.add_argument(
        "--prefill-mode", help="exact: compress after the last chunk; online: after each"
    )
    p.add_argument("--storage", help="how kept rows are stored: full, int8, int4 or int2")
    p.add_argument("--output-dir", help="where results go (default: ./results)")
    p.add_argument("--model-kwargs", type=_mapping, help="YAML or JSON mapping for from_pretrained")
    _add_trust(p)
    p.add_argument("--log-level", help="DEBUG, INFO, WARNING or ERROR")
    flag = argparse.BooleanOptionalAction
    p.add_argument(
        "--prompts",
        **_FILE,
        help="prompts in the benchmark's published format, or those of a table, instead of ours",
    )
    p.add_argument(
        "--chat", action=flag, help="use the model's chat template (default: the data's own rule)"
    )
    p.add_argument(
        "--truncation",
        nargs="?",
        const=True,
        metavar="PLACE",
        help="cut longer contexts instead of refusing them: middle, end, or nothing for where the "
        "benchmark itself cuts",
    )
    p.add_argument("--no-truncation", dest="truncation", action="store_false")
    p.add_argument(
        "--beyond-trained-length",
        action=flag,
        help="allow contexts longer than the model was trained for; answers are not to be trusted",
    )
    p.add_argument("--overwrite", action=flag, help="do a finished run again")


def _bench_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    p = commands.add_parser(
        "bench",
        help="time presses: prefill, decoding, bytes",
        description="Time presses against transformers' own cache: seconds of prefill, the share "
        "of it that the press takes, ms of a decoding step, bytes held after prefill and the peak "
        "of it. Runs are interleaved and repeated; medians are shown.",
        argument_default=argparse.SUPPRESS,
    )
    many = {"nargs": "+"}
    p.add_argument("--presses", **many, help="aliases or spellings (default: snapkv)")
    p.add_argument("--ratios", type=float, **many, help="ratios for each press")
    p.add_argument("--lengths", type=_count, **many, help="tokens of context (default: 4096)")
    p.add_argument("--batch-sizes", type=_count, **many, help="contexts read at once (default: 1)")
    p.add_argument("--forks", type=_count, **many, help="continuations of a context (default: 1)")
    p.add_argument(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        help="time transformers' own cache, too (default: yes)",
    )
    p.add_argument("--steps", type=_count, help="tokens decoded in each repeat (default: 32)")
    p.add_argument("--repeats", type=_count, help="of everything (default: 3)")
    p.add_argument("--model", help="smollm2-135m, a local folder, or a hub name")
    p.add_argument(
        "--config",
        type=expanded,
        help="random weights of a shape: llama-3.1-8b, qwen3-4b, a folder",
    )
    p.add_argument("--layers", type=_count, help="layers of that shape (default: all)")
    p.add_argument("--dtype", help="torch dtype (default: float32 on CPU)")
    p.add_argument("--device", help="torch device (default: a GPU if there is one)")
    p.add_argument(
        "--prefill-chunk-size", type=_tokens, help="tokens of a context computed at once"
    )
    p.add_argument("--prefill-mode", help="exact or online")
    p.add_argument("--storage", help="full, int8, int4 or int2")
    p.add_argument(
        "--beyond-trained-length",
        action=argparse.BooleanOptionalAction,
        help="allow lengths that the model was not trained for",
    )
    p.add_argument("--json", **_FILE, help="write every timing to a file")
    _add_trust(p)
    p.set_defaults(command=_bench)


def _mapping(text: str) -> dict[str, object]:
    from cachepress.structured import parse_yaml

    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a mapping such as '{{key: value}}'")
    return values
