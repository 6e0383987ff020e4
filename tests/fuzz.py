"""Damages what a user can hand over, and counts what does not end in one line.

``python -m tests.fuzz --seconds 60 --seed 0`` tries every kind for its share of the time, at least
one round of each, and exits with 1 if anything was raw. A case is a kind and a number: what is
printed of a failure repeats it.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import string
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import transformers
from safetensors.torch import save
from transformers.cache_utils import Cache

import cachepress as cp
from cachepress.artefacts.kept import save_artefact
from cachepress.artefacts.published import GATES
from cachepress.artefacts.reading import load_artefact
from cachepress.cli import main
from cachepress.evaluation.config import load_config
from cachepress.evaluation.prompts import read_prompts
from cachepress.evaluation.sweep import load_sweep
from cachepress.evaluation.tasks.files import load_file
from cachepress.kvpress_names import PREFIX, SPELLINGS
from cachepress.spec import aliases
from tests.forging import forge, forge_tensor, made, rewritten, use
from tests.published import good
from tests.scratch import scratch
from tests.tiny import tiny, tokenizer, tokens, words

SLOW = 20.0
"""Seconds that no case may take: what hangs is as bad as what is raw."""
Case = Callable[[random.Random], None]
ODD = [
    *("", "null", "true", "-1", "0", "1e999", "-1e999", "NaN", "0.5", "2001-99-99", "1:60:60"),
    *("9" * 30, "9" * 5000, "0x" + "f" * 99, "a" * 20_000, "[]", "{}", '""', '"x"', "[[]]"),
    *("[" * 3000, "{" * 3000, "[" * 200 + "]" * 200, "[1, 2]", '{"a": 1}', "- &a [*a, *a]"),
    *("é", "\0", "\ufffd", "\u202e", "\x1b[2J", "*a", "&a [*a]", "? :", "<<: 1", "%YAML 9", "---"),
    *("!!python/object:os.system", "!!binary x", "!!set {a}", "!!timestamp 1"),
]
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)
)


KINDS = {
    "results": "results",
    "data": "data_file",
    "yaml": "yaml_file",
    "prompts": "prompts",
    "spelling": "spelling",
    "number": "number",
    "artefact": "artefact",
    "learned": "learned",
    "cache": "cache",
    "forged": "forged",
}
"""The kinds of cases, and the methods that try one."""
LEARNED = {
    "q_filters": "QFilterPress(0.5, filters={!r})",
    "query_stats": "ExpectedAttentionStatsPress(0.5, stats={!r})",
    "fastkvzip": "FastKVzipPress(0.5, gates={!r})",
    "kvzap_linear": "KVzapPress(0.5, 'linear', surrogate={!r})",
    "kvzap_mlp": "KVzapPress(0.5, surrogate={!r})",
    "lukv": "LUKVPress(KnormPress(0.5), curve={!r})",
}
"""The kinds of what is learned, and a press that reads it."""
THEIRS = {"filters": "q_filters", "mean": "query_mean", "covariance": "query_cov"}
THEIRS |= {ours: theirs for theirs, ours in GATES.items()}
"""What the authors call the tensors of what is learned."""


class Fuzz:
    """The cases of every kind, on a tiny model in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, tiny()
        self.model_dir = str(folder / "model")
        self.model.save_pretrained(self.model_dir)
        tokenizer().save_pretrained(self.model_dir)
        rows = [
            {"context": words(30, seed=i), "question": "w5", "answer": "w6", "max_new_tokens": 2}
            for i in range(2)
        ]
        self.data = folder / "data.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.out = folder / "out"
        self.evaluate = ["evaluate", f"--dataset={self.data}", f"--model={self.model_dir}"]
        self.evaluate += ["--press=knorm", "--compression-ratio=0.5", f"--output-dir={self.out}"]
        assert main(self.evaluate) == 0
        (self.cell,) = self.out.iterdir()
        self.good = {path.name: path.read_bytes() for path in self.cell.iterdir() if path.is_file()}
        self.own: dict[str, Path] = {}
        self.forms: dict[str, tuple[transformers.PreTrainedModel, Cache]] = {}
        self.artefacts = self._artefacts(folder)

    def results(self, draw: random.Random) -> None:
        """A folder of results with one damaged file, under each command that reads it."""
        name = draw.choice([n for n in self.good if not n.startswith(".")])
        for other, content in self.good.items():
            self._put(self.cell / other, content)
        self._put(self.cell / name, None if draw.random() < 0.02 else self._damaged(draw, name))
        report = ["report", str(self.out), f"--output={self.folder / 'page'}", "--formats", "md"]
        command = draw.choice([self.evaluate, report, ["score", str(self.out)]])
        again = draw.random() < 0.1 and command is self.evaluate
        code = main([*command, *(["--overwrite"] if again else [])])
        assert code in (0, 2), f"exit code {code}"

    def data_file(self, draw: random.Random) -> None:
        """A data file with damage."""
        text = self.data.read_text()
        suffix = draw.choice([".jsonl", ".csv"])
        if suffix == ".csv":
            row = lambda: ",".join(draw.choice([*ODD, "w1 w2", "w3"]) for _ in range(3))  # noqa: E731
            text = "context,question,answer\n" + "".join(f"{row()}\n" for _ in range(3))
        path = self.folder / f"fuzzed{suffix}"
        path.write_bytes(_mutated(draw, text.encode("utf-8", "surrogatepass")))
        load_file(path)

    def yaml_file(self, draw: random.Random) -> None:
        """A file of options for evaluate or sweep."""
        path = self.folder / "options.yaml"
        names = ["press", "presses", "ratios", "seed", "fraction", "dataset", "model", "workers"]
        names += ["model_kwargs", "compression_ratio", "max_new_tokens", "press_name", "storage"]
        lines = [f"{draw.choice(names)}: {draw.choice(ODD)}\n" for _ in range(draw.randint(1, 3))]
        text = draw.choice([BOMB, "".join(lines), "".join(lines), draw.choice(ODD)])
        raw = text.encode("utf-8", "surrogatepass")
        path.write_bytes(_mutated(draw, raw) if draw.random() < 0.5 else raw)
        draw.choice([load_config, load_sweep])(str(path), {})

    def prompts(self, draw: random.Random) -> None:
        """A file of prompts, and what it makes of a task."""
        path = self.folder / f"prompts{draw.choice(['.json', '.txt', '.csv', '.jsonl'])}"
        parts = ["{context}", "{input}", "{", "}", "{a.b[0]!r:>9}", "$DOC$", "$Q$", "text", *ODD]
        template = "".join(draw.choice(parts) for _ in range(draw.randint(1, 5)))
        text = {
            ".json": json.dumps({"qasper": template, "other": draw.choice(["{context}", 5, None])}),
            ".txt": template,
            ".csv": f"prompt,task\n{draw.choice(parts)},{draw.choice(parts)}\n",
            ".jsonl": json.dumps({draw.choice(["prompt", "context", "x"]): template}) + "\n",
        }[path.suffix]
        raw = text.encode("utf-8", "surrogatepass")
        path.write_bytes(_mutated(draw, raw) if draw.random() < 0.5 else raw)
        found = read_prompts(str(path)).template(["qasper"])
        found.around("document", {"input": "question", "context": "document"})

    def spelling(self, draw: random.Random) -> None:
        """A text that may be a press."""
        names = [*aliases(), "ScorerPress", "AdaKVPress", "nothing", "restorekv"]
        names += [f"{PREFIX}{name}" for name in ("nothing", *SPELLINGS)]
        text = draw.choice(names)
        for _ in range(draw.choice([0, 1, 2, 5, 30, 2000])):
            inner = draw.choice([text, draw.choice(ODD), f"{text}, {draw.choice(ODD)}"])
            text = f"{draw.choice(names)}({inner})"
        raw = _mutated(draw, text.encode("utf-8", "surrogatepass"))
        text = draw.choice([text, raw.decode("utf-8", "surrogateescape")])
        press = cp.parse(text)
        assert press is None or cp.parse(repr(press)) == press, "repr does not give it back"

    def number(self, draw: random.Random) -> None:
        """Numbers far out in the options of a press that is then used."""
        far = [10**30, 2**63, 2**63 - 1, 2**64, 2**31, 2**31 - 1, 10**9, -1, 0, 1, 10**6 + 1]
        far += [1e308, float("inf"), float("nan"), 1e-320, 10**5000]
        kind = draw.choice([k for k in aliases().values() if issubclass(k, cp.ScorerPress)])
        names = [f.name for f in fields(kind) if f.type in ("int", "float", int, float)]
        names += ["n_kept", "max_bytes"]
        options = {name: draw.choice(far) for name in draw.sample(names, 1)}
        press = kind(**options)
        press = press.with_ratio(0.5) if "n_kept" not in options else press
        asked = {"question": 2} if press.needs.question else {}
        cache = cp.prefill(self.model, tokens(40), press, tokenizer=tokenizer(), **asked)
        with torch.no_grad():
            self.model(tokens(1), past_key_values=cache)

    def artefact(self, draw: random.Random) -> None:
        """A damaged file of what a press has learned."""
        spelling, path = draw.choice(self.artefacts)
        damaged = self.folder / f"damaged{path.suffix}"
        damaged.write_bytes(_mutated(draw, path.read_bytes()))
        self._press(spelling.format(str(damaged)))

    def learned(self, draw: random.Random) -> None:
        """A whole file of what a press has learned, with other numbers, types, shapes or names."""
        kind = draw.choice(list(LEARNED))
        tensors = dict(load_artefact(str(self.own[kind]), kind))
        for _ in range(draw.choice([0, 1, 1, 2])):
            if tensors:
                forge_tensor(draw, tensors)
        if draw.random() < 0.2:
            tensors[draw.choice([*LEARNED, "layers.9.weight", "b", ""])] = torch.ones(2)
        path = self.folder / "forged.safetensors"
        if draw.random() < 0.5:
            told = {draw.choice(["files", "dtypes", "model_class", "weights_float32"]): "x"}
            save_artefact(path, kind, tensors, draw.choice([{}, {}, told]))
        else:
            path.write_bytes(_as_published(draw, kind, tensors))
        self._press(LEARNED[kind].format(str(path)))

    def cache(self, draw: random.Random) -> None:
        """A saved cache whose header is damaged; whatever loads has to be the cache."""
        path, damaged = self.folder / "cache.safetensors", self.folder / "damaged.safetensors"
        if not path.exists():
            cache = cp.prefill(self.model, tokens(40), cp.SnapKVPress(0.5, window_size=4))
            cp.save_cache(cache, path, self.model)
            with torch.no_grad():
                self.wanted = self.model(tokens(2), past_key_values=cache).logits
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        damaged.write_bytes(_mutated(draw, raw[:end]) + raw[end:])
        cache = cp.load_cache(damaged, self.model)
        with torch.no_grad():
            got = self.model(tokens(2), past_key_values=cache).logits
        assert torch.equal(got, self.wanted), "a damaged file loaded as another cache"

    def forged(self, draw: random.Random) -> None:
        """A saved cache of another content, whose checksum is right: refused, or of use."""
        if not self.forms:
            self.forms |= made()
        model, cache = self.forms[draw.choice(list(self.forms))]
        path = self.folder / "forged"
        cp.save_cache(cache, path, model)
        rewritten(path, lambda layers, tensors: forge(draw, layers, tensors))
        use(model, cp.load_cache(path, model), self.folder)

    def _press(self, spelling: str) -> None:
        """Press a prompt."""
        cp.prefill(self.model, tokens(40), cp.parse(spelling), tokenizer=tokenizer())

    def _artefacts(self, folder: Path) -> list[tuple[str, Path]]:
        """Spellings of presses, with a file that each can read: ours, and as they are published."""
        duo, heads = folder / "duo.tsv", folder / "heads.json"
        duo.write_text("\n".join("\t".join(["0.5", "0.9"]) for _ in range(4)))
        heads.write_text(json.dumps({f"{i}-{j}": [0.5, 0.6] for i in range(4) for j in range(4)}))
        found = [
            ("DuoAttentionPress(0.5, {!r})", duo),
            ("HeadKVPress(KnormPress(0.5), {!r})", heads),
        ]
        for kind, spelling in LEARNED.items():
            (folder / kind).mkdir()
            theirs, ours = good(kind, folder / kind), folder / f"{kind}.safetensors"
            save_artefact(ours, kind, load_artefact(str(theirs), kind), {})
            self.own[kind] = ours
            found += [(spelling, ours), (spelling, theirs)]
        return found

    def _damaged(self, draw: random.Random, name: str) -> bytes:
        """A file of results with one value replaced, or with damaged bytes."""
        raw = self.good[name]
        if draw.random() < 0.5 or not name.endswith((".json", ".jsonl", ".yaml")):
            return _mutated(draw, raw)
        lines = raw.decode().split("\n")
        at = [i for i, line in enumerate(lines) if ":" in line]
        i = draw.choice(at)
        parts = lines[i].split(":")
        j = draw.randrange(1, len(parts))
        parts[j] = f" {draw.choice(ODD)}" + ("," if parts[j].endswith(",") else "")
        lines[i] = ":".join(parts)
        return "\n".join(lines).encode("utf-8", "surrogatepass")

    @staticmethod
    def _put(path: Path, content: bytes | None) -> None:
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        if content is None:
            path.mkdir()
        else:
            path.write_bytes(content)


def _as_published(draw: random.Random, kind: str, tensors: dict[str, torch.Tensor]) -> bytes:
    """Tensors under the names and in one of the forms that others write files in."""
    found = {THEIRS.get(name, name): x.contiguous().clone() for name, x in tensors.items()}
    out, first = io.BytesIO(), next(iter(found.values()), torch.ones(1))
    layers = min((len(x) for x in found.values() if x.ndim), default=0)
    gates = [{k: x[i] for k, x in found.items() if x.ndim} for i in range(layers)]
    forms = {"lukv": ["array"], "fastkvzip": ["gates"]}.get(kind, ["tensors", "torch"])
    form = draw.choice([*forms, *forms, "tensors", "torch", "gates", "array", "odd"])
    if form == "tensors":
        return save(found)
    if form == "array":
        np.save(out, first.double().numpy())
        return out.getvalue()
    contents = {"torch": found, "gates": {"module": gates, "loss": [1.0]}, "odd": [first, None, 5]}
    torch.save(contents[form], out)
    return out.getvalue()


def _mutated(draw: random.Random, raw: bytes) -> bytes:
    """Bytes with one to four small changes."""
    found = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(found) + 1)
        odd = draw.choice(ODD).encode("utf-8", "surrogatepass")
        other = bytes(draw.choice(string.printable.encode()) for _ in range(draw.randint(1, 4)))
        way = draw.randrange(6)
        if way == 0 and at < len(found):
            found[at] ^= 1 << draw.randrange(8)
        elif way == 1:
            del found[at : at + draw.choice([1, 4, 50, len(found)])]
        elif way == 2:
            found[at:at] = odd
        elif way == 3:
            found[at:at] = other
        elif way == 4:
            found[at:at] = found[: draw.randint(0, 200)]
        elif at < len(found):
            found[at] = draw.randrange(256)
    return bytes(found)


def failure_of(case: Case, seed: str) -> str | None:
    """How a case ended, if neither well nor in one line."""
    start, out = time.monotonic(), io.StringIO()
    signal.setitimer(signal.ITIMER_REAL, 2 * SLOW)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            case(random.Random(seed))
    except cp.CachepressError:
        pass
    except SystemExit as stopped:
        if stopped.code not in (0, 2):
            return f"exit code {stopped.code}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__} in {Path(place.filename).name}:{place.lineno}: {error!s:.150}"
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.monotonic() - start
    return f"it took {seconds:.0f} s" if seconds > SLOW else None


def hangs(number: int, frame: object) -> None:
    """What the timer calls."""
    raise TimeoutError(f"no end after {2 * SLOW:.0f} s")


def numbers(only: int | None) -> Iterator[int]:
    """The numbers of cases: all of them, or one."""
    yield from [only] if only is not None else iter(range(sys.maxsize))


def run(arguments: list[str] | None = None) -> int:
    """Try until the time is over; 1 if any case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--case", type=int, help="only this one")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, hangs)
    failed = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        fuzz = Fuzz(scratch())
    chosen = options.kinds or list(KINDS)
    for kind in chosen:
        end, tried, raw = time.monotonic() + options.seconds / len(chosen), 0, {}
        for number in numbers(options.case):
            tried += 1
            what = failure_of(getattr(fuzz, KINDS[kind]), f"{options.seed} {kind} {number}")
            if what is not None:
                raw.setdefault(what, []).append(number)
            if time.monotonic() > end:
                break
        failed += len(raw)
        print(f"{kind:10} {tried:6} cases, {sum(map(len, raw.values()))} raw", flush=True)
        for what, at in raw.items():
            again = f"python -m tests.fuzz --seed {options.seed} --kinds {kind} --case {at[0]}"
            print(f"    {len(at)} times: {what}\n        {again}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run())
