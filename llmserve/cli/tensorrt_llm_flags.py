"""Flags of TensorRT-LLM's own scripts: those that are honoured, and those refused by name.

A flag with its default value asks for nothing and passes; with another value, one that is not
implemented is an error that names it. It knows argparse and nothing of conversion.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmserve.config import CalibrationConfig, ConvertConfig
from llmserve.errors import ConfigError

# The names under which TensorRT-LLM's scripts fetch a dataset, their defaults; here they stand for
# the text that llmserve has of its own.
_DEFAULT_DATASETS = ("ccdv/cnn_dailymail", "cnn_dailymail")


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


def add_calibration_flags(parser: argparse.ArgumentParser, *, length: str) -> None:
    """Add what calibrated formats run on; ``length`` names the flag for a sample's tokens."""
    default = CalibrationConfig()
    parser.add_argument(
        "--calib_dataset",
        default=_DEFAULT_DATASETS[0],
        metavar="TEXT",
        help="your own .jsonl or .txt file, or a directory of these (llmserve's own text)",
    )
    parser.add_argument("--calib_size", type=int, default=default.samples, help="most samples")
    parser.add_argument(
        length, dest="calib_seq_len", type=int, default=default.seq_len, help="tokens of a sample"
    )


def calibration_of(args: argparse.Namespace, settings: ConvertConfig) -> CalibrationConfig | None:
    """The settings that ``add_calibration_flags`` has read; None where nothing is calibrated.

    Raises:
        ConfigError: One is given and nothing is calibrated, or a dataset to be fetched.
    """
    named = None if args.calib_dataset in _DEFAULT_DATASETS else Path(args.calib_dataset)
    default = CalibrationConfig()
    asked = CalibrationConfig(
        path=named,
        samples=args.calib_size,
        seq_len=args.calib_seq_len,
        seed=getattr(args, "seed", default.seed),
    )
    if not settings.calibrated:
        if asked != default:
            flags = ("path", "--calib_dataset"), ("samples", "--calib_size"), ("seed", "--seed")
            changed = (f for name, f in flags if getattr(asked, name) != getattr(default, name))
            raise ConfigError(
                f"{next(changed, '--calib_max_seq_length')} is given and nothing is calibrated; "
                "leave it out"
            )
        return None
    if named is not None and not named.expanduser().exists():
        raise ConfigError(
            f"--calib_dataset {named}: there is no such file or directory, and datasets are not "
            "fetched; name a .jsonl or .txt file of your own"
        )
    return asked


def one_of(flags: Mapping[str, tuple[str, bool]], *, default: str) -> str:
    """The value of the flag that is set; ``default`` if none is.

    Raises:
        ConfigError: Two are.
    """
    given = [(flag, value) for flag, (value, is_set) in flags.items() if is_set]
    if len(given) > 1:
        raise ConfigError(f"{given[0][0]} and {given[1][0]} exclude each other")
    return given[0][1] if given else default
