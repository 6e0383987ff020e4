"""The command line (``cachepress --help``), with a module for each group of commands."""

from cachepress.cli.program import main

__all__ = ["main"]
