"""Commands that make HTML pages: of results, and of the tokens that a press keeps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cachepress.cli.arguments import POSITIONAL, SWITCH, Command
from cachepress.cli.console import OnModel, log, say, warn_if_nothing_evicted
from cachepress.errors import CachepressError
from cachepress.files import read_text
from cachepress.options import Count, FileName, Place


@dataclass(frozen=True)
class Report(Command):
    """Make a page of results.

    It is one page of a folder of results that opens offline: quality against kept bytes and decode
    speed, a table of all that was measured, and every sample.

    Attributes:
        results: folder of results, such as ./results.
        output: where to write (default: the results).
        formats: html, png and svg for papers, md and latex for tables, csv for spreadsheets (html).
    """

    results: FileName = field(metadata=POSITIONAL)
    output: Annotated[str, Place("FOLDER")] | None = None
    formats: Sequence[str] = ("html",)

    def run(self) -> None:
        """Write it."""
        from cachepress.pages.report import write_report

        log()
        output = None if self.output is None else Path(self.output)
        for path in write_report(Path(self.results), output, self.formats):
            say(f"written: {path}")


@dataclass(frozen=True, kw_only=True)
class Inspect(OnModel):
    """Make a page that shows which tokens a press keeps.

    Each token of a context is shaded by how many heads kept it, with the answers of the whole and
    of the compressed cache.

    Attributes:
        press: an alias or a spelling (snapkv).
        compression_ratio: fraction of pairs removed, 0 to 1.
        context: the text.
        question: what is asked about it.
        query_aware: let the press see the question.
        chat: use the model's chat template (yes).
        storage: full, int8, int4 or int2 (full).
        output: the page (inspect.html).
        max_new_tokens: of an answer (50).
    """

    press: str = "snapkv"
    compression_ratio: float | None = None
    context: FileName
    question: str
    query_aware: bool = field(default=False, metadata=SWITCH)
    chat: bool = True
    storage: str = "full"
    output: FileName = "inspect.html"
    max_new_tokens: Count = 50

    def run(self) -> None:
        """Read the context with the press and without it, and write the page."""
        from cachepress.pages.inspect import write_inspection
        from cachepress.spec import parse

        log()
        press = parse(self.press)
        if press is None:
            raise CachepressError("no_press keeps every token: name a press to inspect")
        if self.compression_ratio is not None:
            press = press.with_ratio(self.compression_ratio)
        warn_if_nothing_evicted(press)
        context = read_text(self.context)
        model, tokenizer = self.loaded()
        path = write_inspection(
            model,
            tokenizer,
            press,
            context,
            self.question,
            Path(self.output),
            self.max_new_tokens,
            query_aware=self.query_aware,
            storage=self.storage,
            chat=self.chat,
        )
        say(f"written: {path}")
