"""Numbers as people read them on a terminal."""

from __future__ import annotations


def size(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits before the point: '4.7 MiB'."""
    value, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} B" if unit == "B" else f"{value:,.1f} {unit}"


def count(number: int) -> str:
    """A number of parameters: '4.4 M', '1.2 B'."""
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return str(number)
