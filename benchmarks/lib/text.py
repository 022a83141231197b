"""Tables as aligned text."""

from __future__ import annotations

from collections.abc import Sequence


def align(lines: Sequence[Sequence[str]], left: Sequence[str]) -> str:
    """A table as text; the first line is the head, and the columns named in `left` are aligned left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, cell, width in zip(lines[0], line, widths, strict=True)
        ).rstrip()
        for line in lines
    )
