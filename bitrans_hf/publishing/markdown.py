"""Text that Markdown shows literally: names chosen by users, in cards and tables."""

from __future__ import annotations

import re

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"[\\`*\[\]|~$&<>]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is none
_AT_THE_START = re.compile(r"(?:[#+\-=:]|\d+(?=[.)]))")


def literal(text: str) -> str:
    r"""Escape a text, so that a Markdown paragraph or table cell shows it literally, on one line.

    Example:
        >>> literal("<b>a|b</b>"), literal("hot dog")
        ('&lt;b&gt;a\\|b&lt;/b&gt;', 'hot dog')
    """
    escaped = _SPECIAL.sub(lambda sign: _ENTITIES.get(sign[0], f"\\{sign[0]}"), " ".join(text.split()))
    if start := _AT_THE_START.match(escaped):
        end = start.end()
        escaped = f"\\{escaped}" if not escaped[0].isdigit() else f"{escaped[:end]}\\{escaped[end:]}"
    return escaped
