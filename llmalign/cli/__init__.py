"""The command line: a module for each family of commands, which adds its parsers and runs them."""

from llmalign.cli.entry import build_parser, main

__all__ = ["build_parser", "main"]
