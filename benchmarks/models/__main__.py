"""Tries every causal model type of transformers under a press, and writes docs/models.md.

python -m benchmarks.models                # all types that have no record yet, some minutes
python -m benchmarks.models llama gemma2   # these types, again
python -m benchmarks.models --page         # nothing is run, the page is written again
"""

import argparse
import json
from collections.abc import Sequence

from benchmarks.models.page import DATA, PAGE, page
from benchmarks.models.records import check_all
from benchmarks.models.tiny import types
from cachepress.evaluation.records import write_atomically


def main(arguments: Sequence[str] | None = None) -> None:
    """Check types, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("types", nargs="*", help="model types (default: all without a record)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    unknown = [kind for kind in options.types if kind not in types()]
    if unknown:
        parser.error(f"unknown model type {unknown[0]!r}: wanted one of transformers' causal types")
    if not options.page:
        check_all(options.types)
    found = json.loads(DATA.read_text())
    write_atomically(PAGE, page(PAGE.read_text(encoding="utf-8"), found))


if __name__ == "__main__":
    main()
