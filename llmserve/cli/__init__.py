"""The ``llmserve`` command: one file per subcommand, imported only when it is the one called.

A command's file exports ``add_parser(subparsers)`` and ``run(args) -> int``, and imports whatever
is heavy inside ``run``. An error that llmserve raises on purpose is one line on stderr and exit
code 1; wrong usage is argparse's, exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from llmserve.errors import LlmserveError

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    Subparsers = _SubParsersAction[argparse.ArgumentParser]
else:
    Subparsers = Any

COMMANDS = {
    "convert": "Hugging Face checkpoint -> TensorRT-LLM checkpoint, quantised",
    "build": "TensorRT-LLM checkpoint -> engine",
    "serve": "serve a model through an OpenAI-compatible API",
    "batch": "run OpenAI batch files, resumably",
    "quality": "what a model lost by quantisation, on held-out text",
    "inspect": "what a checkpoint or an engine is, with its tensors",
    "plan": "whether a model fits a memory, and what it can serve there",
}


class Command(Protocol):
    """What each file of this package exports, as module-level names."""

    def add_parser(self, subparsers: Subparsers) -> None:
        """Add this command's parser, under its name in ``COMMANDS``."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None takes sys.argv's.

    Returns:
        The exit code: 0, 1 for an error, 130 after Ctrl-C. Wrong usage raises SystemExit(2).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        prog="llmserve", description="Converts, builds and serves large language models."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((arg for arg in argv if not arg.startswith("-")), None)
    command: Command | None = None
    for name, summary in COMMANDS.items():
        if name == called:
            command = cast(Command, importlib.import_module(f"llmserve.cli.{name}"))
            command.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    args = parser.parse_args(argv)
    assert command is not None  # argparse has refused anything that is no command
    return run_reporting(lambda: command.run(args))


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"llmserve {version('llmserve')}")
        parser.exit()


def run_reporting(action: Callable[[], int]) -> int:
    """Run ``action() -> int``; turn the errors below into one line and exit code 1.

    These are what llmserve raises on purpose, and what the operating system refuses: a port in
    use, a file that may not be read. Anything else is a bug and shows its traceback.
    """
    try:
        return action()
    except (LlmserveError, OSError) as error:
        print(f"llmserve: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("llmserve: interrupted", file=sys.stderr)
        return 130
