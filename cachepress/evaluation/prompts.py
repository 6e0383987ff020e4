"""Reads prompts from a user's file: a benchmark's published templates, or a table of texts."""

import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from string import Formatter

import pandas as pd

from cachepress.errors import CachepressError
from cachepress.limits import said

TABLES = (".csv", ".jsonl", ".parquet")
TEXTS = (".txt", ".md")
COLUMNS = ("prompt", "context", "question", "answer_prefix")
"""Columns of a table that hold texts of a prompt."""
EVERY_TASK = ""
"""The task of a template that is for all of them."""
_DOCUMENT = "$DOC$"
_DOLLARS = re.compile(r"\$(DOC|Q|C_[A-D]|RAG|COT)\$")
"""A placeholder in the style of LongBench v2."""
_SHOWN = 12


@dataclass(frozen=True)
class Template:
    """Prompt template of a task: the text around a document, with named placeholders.

    Attributes:
        origin: where it comes from, for errors.
        before: texts and the names that follow them.
        after: the same for what stands behind the document.
    """

    origin: str
    before: tuple[tuple[str, str | None], ...] = ()
    after: tuple[tuple[str, str | None], ...] = ()

    def around(self, document: str, fields: Mapping[str, object]) -> tuple[str, str]:
        """Fill the template: the text up to the document's end, and the question after it.

        Raises:
            CachepressError: if a name has nothing to fill it.
        """
        return self._filled(self.before, fields) + document, self._filled(self.after, fields)

    def _filled(self, parts: Sequence[tuple[str, str | None]], fields: Mapping[str, object]) -> str:
        for _, name in parts:
            if name is not None and name not in fields:
                known = ", ".join(f"{{{field}}}" for field in fields)
                wanted = f"one of {known}" if known else "no name but that of its text"
                raise CachepressError(f"{self.origin} names {{{name}}}: wanted {wanted}")
        return "".join(text + ("" if name is None else str(fields[name])) for text, name in parts)


@dataclass(frozen=True)
class Prompts:
    """Prompts of a user's file.

    Attributes:
        name: name of the file.
        digest: SHA-256 of what is in it.
        templates: by task; ``EVERY_TASK`` for one that is for all.
        rows: texts of the rows of a data set, in its order; empty where there are templates.
    """

    name: str
    digest: str
    templates: Mapping[str, str]
    rows: Sequence[Mapping[str, object]]

    @property
    def label(self) -> str:
        """Name and hash of the file, which results record."""
        return f"{self.name} sha256:{self.digest}"

    def template(
        self,
        tasks: Sequence[str],
        documents: Sequence[str] = ("context",),
        needs: Iterable[Sequence[str]] = (),
    ) -> Template:
        """Find and parse the template of a task.

        Args:
            tasks: names of the task; the first that has one counts.
            documents: names that its document may have in the template.
            needs: what it has to name besides; of each, one of several names.

        Raises:
            CachepressError: if there is none, or it does not name what it has to.
        """
        if self.rows:
            return Template(self.name)
        names = [task for task in (*tasks, EVERY_TASK) if task in self.templates]
        if not names:
            raise CachepressError(
                f"{self.name} has no prompt for the task {tasks[0]!r}: it has "
                f"{', '.join(self.templates) or 'none'}"
            )
        origin = f"{self.name}: the prompt of {tasks[0]}"
        parts = _parsed(self.templates[names[0]], origin)
        places = [place for place, (_, name) in enumerate(parts) if name in documents]
        if len(places) != 1:
            raise CachepressError(
                f"{origin} names {{{documents[0]}}} {len(places)} times, wanted once"
            )
        found = {name for _, name in parts}
        for alternatives in needs:
            if found.isdisjoint(alternatives):
                wanted = " or ".join(f"{{{name}}}" for name in alternatives)
                raise CachepressError(f"{origin} has no {wanted}: what is asked would be missing")
        (place,) = places
        last = (parts[place][0], None)
        return Template(origin, (*parts[:place], last), tuple(parts[place + 1 :]))

    def put_into(self, table: pd.DataFrame) -> pd.DataFrame:
        """Replace the prompts of a data set by the rows of this file; templates change nothing.

        Raises:
            CachepressError: if they are not of this table's rows.
        """
        if not self.rows:
            return table
        if len(self.rows) != len(table):
            raise CachepressError(
                f"{self.name} has {len(self.rows)} rows, and the data set has {len(table)}: wanted "
                "the prompt of each, in the same order"
            )
        documents = list(table["context"])
        asked = [self._asked(number, document) for number, document in enumerate(documents)]
        names = ["context", "question", "answer_prefix"]
        table = table.assign(**pd.DataFrame(asked, columns=names, index=table.index))
        if all("max_new_tokens" in row for row in self.rows):
            table = table.assign(max_new_tokens=[self._limit(row) for row in self.rows])
        return table

    def _limit(self, row: Mapping[str, object]) -> int:
        text = str(row["max_new_tokens"]).removesuffix(".0")
        if not re.fullmatch("0*[1-9][0-9]{0,11}", text):
            raise CachepressError(
                f"{self.name}: max_new_tokens is {text[:40]!r}, wanted a whole number above 0"
            )
        return int(text)

    def _asked(self, number: int, document: str) -> tuple[str, str, str]:
        """Split a row's prompt at the document: context, question, and beginning of the answer."""
        row = self.rows[number]
        whole = "prompt" in row
        text = _text(row["prompt"] if whole else row.get("context"))
        place = text.find(document.strip())
        if place < 0:
            column = "prompt" if whole else "context"
            raise CachepressError(
                f"{self.name}, row {number}: {column} does not hold the text of this row of the "
                "data set: wanted the same rows in the same order"
            )
        if not whole:
            return text, _text(row.get("question")), _text(row.get("answer_prefix"))
        end = place + len(document.strip())
        return text[:end], text[end:], ""


def read_prompts(file: str) -> Prompts:
    """Read a file of prompts: ``{task: template}`` in JSON, one template as text, or a table.

    A module in Python that holds such mappings is read too, never run; ``FILE.py:NAME`` says which
    of them is meant.

    Raises:
        CachepressError: if it is missing, or in none of these formats.
    """
    path, _, name = file.rpartition(":") if re.search(r"\.py:\w+$", file) else (file, "", "")
    place = Path(path)
    try:
        state = place.stat()
    except OSError as error:
        raise CachepressError(f"prompts: {path}: {error.strerror or error}") from error
    target = place.resolve()
    # A link without a suffix, as the hub's cache has them, says nothing of what is in its target.
    real = target if target.suffix == place.suffix else place.absolute()
    return _read(str(real), name, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _read(path: str, name: str, changed: int, size: int) -> Prompts:
    place = Path(path)
    try:
        raw = place.read_bytes()
    except OSError as error:
        raise CachepressError(f"prompts: {path}: {error.strerror or error}") from error
    templates, rows = {}, []
    if place.suffix in TABLES:
        rows = _rows(place)
    else:
        templates = _templates(place, raw, name)
    called = f"{place.name}:{name}" if name else place.name
    return Prompts(called, hashlib.sha256(raw).hexdigest(), templates, rows)


def _rows(path: Path) -> list[dict]:
    from cachepress.evaluation.tasks.sources import read_rows

    rows = read_rows(str(path.parent), [path.name])
    for number, row in enumerate(rows):
        if "prompt" not in row and "context" not in row:
            raise CachepressError(
                f"prompts: {path}, row {number} has no column 'prompt' or 'context': it has "
                f"{', '.join(row)}"
            )
        for column in COLUMNS:
            if not (isinstance(row.get(column), str) or _is_empty(row.get(column))):
                raise CachepressError(
                    f"prompts: {path}, row {number}: {column} is a {type(row[column]).__name__}, "
                    "wanted a text"
                )
    return rows


def _is_empty(value: object) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _text(value: object) -> str:
    """Convert a cell to text; an empty one to ""."""
    return "" if _is_empty(value) else str(value)


def _templates(path: Path, raw: bytes, name: str) -> dict[str, str]:
    wanted = (
        f"wanted {{task: template}} in .json or .py, a template in {' or '.join(TEXTS)}, or a "
        f"table in {', '.join(TABLES)}"
    )
    try:
        text = raw.decode("utf-8-sig")
        if path.suffix in TEXTS:
            return {EVERY_TASK: text}
        if path.suffix == ".py":
            found = _assigned(text, name, str(path))
        elif path.suffix == ".json":
            found = json.loads(text)
        else:
            raise CachepressError(f"prompts: got {path}: {wanted}")
    except CachepressError:
        raise
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        kind = "Python" if path.suffix == ".py" else "JSON"
        kind = "a text in UTF-8" if isinstance(error, UnicodeDecodeError) else kind
        raise CachepressError(f"prompts: {path} is not {kind}: {said(error)}") from error
    if not isinstance(found, dict) or not found:
        raise CachepressError(f"prompts: {path} holds no mapping from tasks to templates: {wanted}")
    for task, template in found.items():
        if not isinstance(template, str):
            raise CachepressError(
                f"prompts: {path}: the prompt of {task!r} is {str(template)[:40]!r}, wanted a text"
            )
    return found


def _assigned(text: str, name: str, path: str) -> dict[str, str]:
    """Find the templates that a Python module assigns to a name, or the only ones in it."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            texts = _texts(node.value)
            names = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any("{" in text or _DOCUMENT in text for text in texts.values()):
                found |= {one.id: texts for one in names if isinstance(one, ast.Name)}
    if name in found:
        return found[name]
    if not name and len(found) == 1:
        return next(iter(found.values()))
    raise CachepressError(
        f"prompts: {path} has the templates {', '.join(found) or 'nothing'}: say which, such as "
        f"{Path(path).name}:{next(iter(found), 'NAME')}"
    )


def _texts(mapping: ast.Dict) -> dict[str, str]:
    """Evaluate entries of a mapping whose key and value are string literals, or sums of them."""
    pairs = zip(map(_plain, mapping.keys), map(_plain, mapping.values), strict=True)
    return {key: value for key, value in pairs if key is not None and value is not None}


def _plain(node: ast.expr | None) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _plain(node.left), _plain(node.right)
        return None if left is None or right is None else left + right
    return None


def _parsed(template: str, origin: str) -> list[tuple[str, str | None]]:
    """Parse a template to texts, each with the placeholder that follows it, or None."""
    if _DOCUMENT in template:
        pieces = _DOLLARS.split(template)
        names: list[str | None] = [*pieces[1::2], None]
        return list(zip(pieces[::2], names, strict=True))
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise CachepressError(f"{origin}: {error}; a brace is written twice: {{{{") from error
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise CachepressError(
                f"{origin}: got {{{name}{'!' if conversion else ''}{conversion or ''}"
                f"{':' if form else ''}{form}}}, wanted a plain name such as {{context}}"
            )
    return [(text, name) for text, name, _, _ in parsed]


def shortened(label: str) -> str:
    """Shorten the hash in a label."""
    name, _, digest = label.rpartition(":")
    return f"{name}:{digest[:_SHOWN]}"
