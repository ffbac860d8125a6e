"""Flags of TensorRT-LLM's own scripts: those that are honoured, and those refused by name.

A flag with its default value asks for nothing and passes; with another value, one that is not
implemented is an error that names it. It knows argparse and nothing of conversion.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import Any

from llmserve.errors import ConfigError


class _Refuse(argparse.Action):
    """Takes the values under which a flag asks for nothing; any other is an error."""

    def __init__(self, *args: Any, neutral: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._neutral = neutral

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            raise ConfigError(f"{option_string} is not implemented")
        if str(values) not in self._neutral:
            allowed = f"; it may be {' or '.join(self._neutral)}" if self._neutral else ""
            raise ConfigError(f"{option_string} {values} is not implemented{allowed}")


def flag_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser that takes no abbreviations, so that every flag is refused under its own name."""
    return argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)


def refuse_values(parser: argparse.ArgumentParser, flags: Mapping[str, tuple[str, ...]]) -> None:
    """Add flags that take a value, each with the values that pass."""
    for flag, neutral in flags.items():
        parser.add_argument(
            flag, action=_Refuse, neutral=neutral, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def refuse_switches(parser: argparse.ArgumentParser, flags: Iterable[str]) -> None:
    """Add switches that are always refused."""
    for flag in flags:
        parser.add_argument(
            flag, action=_Refuse, nargs=0, dest=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def refuse_all_but(flag: str, value: str, implemented: Iterable[str]) -> None:
    """Raise ConfigError unless the value of an honoured flag is one that is implemented."""
    if value not in (known := tuple(implemented)):
        raise ConfigError(f"{flag} {value} is not implemented; these are: {', '.join(known)}")
