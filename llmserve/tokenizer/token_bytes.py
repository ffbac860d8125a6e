"""The bytes that a token stands for, read from the ``decoder`` of tokenizer.json.

Every tokenizer served here turns tokens into text by joining the tokens' bytes and reading them as
UTF-8. Knowing the bytes, text can be made one token at a time, without decoding a window of tokens
again and again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmserve.errors import UnsupportedCheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """How token strings become bytes.

    Attributes:
        byte_level: Characters of a token are GPT-2's stand-ins for bytes.
        byte_fallback: A token written ``<0x0A>`` is that byte.
        replacements: Substrings of a token and what they stand for, such as ``▁`` for a space.
        strip_left: Characters at the very start of a text that belong to the encoding, not to the
            text, as a tuple of (character, most times).
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip_left: tuple[str, int] = ("", 0)

    @classmethod
    def from_decoder(cls, decoder: Mapping[str, Any] | None) -> TokenBytes:
        """Read the ``decoder`` object of a tokenizer.json.

        Raises:
            UnsupportedCheckpointError: A decoder that does more than join bytes, or none.
        """
        if decoder is None:
            raise UnsupportedCheckpointError("tokenizer.json has no decoder; one is needed")
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        byte_level, byte_fallback = False, False
        replacements: list[tuple[str, str]] = []
        strip_left = ("", 0)
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if len(steps) == 1:
                    byte_level = True
                case {"type": "ByteFallback"}:
                    byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    replacements.append((old, new))
                case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0}:
                    strip_left = (char, start)
                case {"type": "Metaspace", "replacement": str(char)}:
                    replacements.append((char, " "))
                    if step.get("prepend_scheme", "always") != "never":
                        strip_left = (" ", 1)
                case _:
                    raise UnsupportedCheckpointError(
                        f"tokenizer.json has a decoder that is not implemented: {step}"
                    )
        return cls(byte_level, byte_fallback, tuple(replacements), strip_left)

    def __call__(self, token: str) -> bytes:
        """The bytes of one token."""
        if self.byte_level:
            try:
                return bytes(map(_ALPHABET.__getitem__, token))
            except KeyError:
                # Added tokens are written as they are.
                return token.encode()
        for old, new in self.replacements:
            token = token.replace(old, new)
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()


_ALPHABET = _byte_level_alphabet()
