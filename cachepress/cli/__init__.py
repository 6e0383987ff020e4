"""The command line: ``cachepress --help`` lists the commands; each group of them has a module."""

from cachepress.cli.program import main

__all__ = ["main"]
