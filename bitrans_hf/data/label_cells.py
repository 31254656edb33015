"""What a cell of a label table says: separated names, a Python, numpy or JSON list, or an object from a label tool."""

from __future__ import annotations

import ast
import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..hub.errors import InputError
from .common import folded_name, is_background, tidy_name

SEPARATORS = (";", "|", "\n", ",")
"""Possible separators of class names, from most to least certain; spaces come last, since names contain them."""

_LABEL_KEYS = frozenset(
    {"choices", "label", "class", "classes", "category", "categories", "category_name", "class_name", "tag", "tags"}
)
"""Keys under which label tools put the names, besides every key that ends in "labels", such as `rectanglelabels`."""

_CONTAINER_KEYS = frozenset(
    {"value", "result", "annotations", "shapes", "objects", "regions", "region_attributes", "file_attributes"}
)
"""Keys under which they put the objects that contain such a key."""

_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_MISSING = frozenset({"nan", "NaN", "None", "null", "NULL", "<NA>", "NaT"})

_QUOTED = r"\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"
_TOKENS = re.compile(rf"(?P<quoted>{_QUOTED})|(?P<word>[A-Za-z_]\w*)|(?P<other>.)", re.DOTALL)
_CALL = re.compile(
    r"(?:np\.|numpy\.|pd\.)?(?:array|set|frozenset|tuple|list|Index)\((?P<inside>.*?)(?:,\s*dtype=[^()]*)?\)",
    re.DOTALL,
)
_NUMPY_TEXT = re.compile(rf"(?:np\.|numpy\.)?str_\(({_QUOTED})\)")
_WORDS = {"nan": "None", "NaN": "None", "null": "None", "true": "True", "false": "False"}


_ENTITY = re.compile(r"&(?:[A-Za-z]+|#\d+|#x[0-9A-Fa-f]+);")
_CURLY_QUOTED = re.compile("(?<![^\\s;|,\\[({])[\u2018\u201a\u201b]([^\u2019;|,]*)\u2019(?![^\\s;|,\\])}])")
_CURLY_DOUBLE = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'))


class UnclearCellError(InputError):
    """A cell that looks like a list or an object and cannot be read as one."""


def is_missing(cell: Any) -> bool:
    """Return whether a cell is empty, or what pandas and Python write for an empty one: None, `nan`, "<NA>"."""
    if isinstance(cell, str):
        return not tidy_name(cell) or tidy_name(cell) in _MISSING
    return cell is None or (isinstance(cell, float) and math.isnan(cell))


def plain_text(text: str) -> str:
    """Return a cell's text as its writer meant it, before it is parsed.

    HTML entities become characters, since their ";" separates nothing; the curly quotes that word processors make of
    straight ones become straight; and a whole number that pandas or a spreadsheet wrote as a float is one again.

    >>> plain_text("salt &amp; pepper;dog"), plain_text("\u201cdog\u201d"), plain_text("3.0")
    ('salt & pepper;dog', '"dog"', '3')
    """
    if "&" in text:
        text = _ENTITY.sub(lambda match: html.unescape(match[0]), text)
    text = _CURLY_QUOTED.sub(r"'\1'", text.translate(_CURLY_DOUBLE))
    return re.sub(r"^\s*(\d+)\.0+\s*$", r"\1", text)


def literal_names(cell: Any) -> list[str | int] | None:
    """Return the class names, or class ids, in a cell that is a list or an object, or the text of one.

    Args:
        cell: Any value of a CSV, JSONL or Parquet table.

    Returns:
        Names in their one form (`tidy_name`), or ids; None where `cell` is text that is neither list nor object.

    Raises:
        UnclearCellError: it is a list or an object of something else, or is truncated.
    """
    if isinstance(cell, str):
        if not _looks_literal(cell):
            return None
        cell = _parsed(cell)
    if isinstance(cell, int | float) and not is_missing(cell):
        raise UnclearCellError("it is a single number")
    found = _names_in(cell)
    if len({type(name) for name in found}) > 1:
        raise UnclearCellError("it mixes names and numbers")
    return found


def split_text(text: str, separator: str) -> list[str]:
    """Return the names in a text with a separator, without the quotes around them; quoted names may hold it.

    >>> split_text('dog; "cat; black" ;', ";")
    ['dog', 'cat; black']
    """
    end = rf"\s*(?:{re.escape(separator)}|$)"
    pieces, position = [], 0
    while position < len(text):
        match = re.compile(rf"\s*({_QUOTED}){end}").match(text, position)
        if match:
            piece = match[1][1:-1]
            position = match.end()
        else:
            stop = text.find(separator, position)
            stop = len(text) if stop < 0 else stop
            piece = text[position:stop]
            position = stop + len(separator)
        pieces.append(piece)
    return [name for piece in pieces if (name := tidy_name(piece))]


def separators_in(text: str) -> list[str]:
    """Return those of `SEPARATORS` that a text uses outside of quotes."""
    outside = re.sub(rf"(?:(?<=^)|(?<=[\s;|,]))(?:{_QUOTED})(?=\s*(?:[;|,]|$))", "", text.strip())
    return [separator for separator in SEPARATORS if separator in outside]


def readings_with(text: str, known: Mapping[str, str], separators: Sequence[str]) -> list[list[str]]:
    """Return the ways, at most two, to split a text into known names and separators.

    Args:
        text: Of a cell.
        known: Folded name -> name, see `folded_name`.
        separators: Possible separators between names; one text may use several.
    """
    ends = [match.span() for match in re.finditer("|".join(re.escape(sign) for sign in separators), text)]
    starts = [0, *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), len(text)]
    # ways[i]: readings of what comes before the i-th start.
    ways: list[list[list[str]]] = [[[]], *([] for _ in stops)]
    for first, start in enumerate(starts):
        for last in range(first, len(stops)):
            piece = _unquoted(text[start : stops[last]])
            name = known.get(folded_name(piece), piece if is_background(piece) else None)
            if piece and name is None:
                continue
            names = [name] if name else []
            for way in ways[first]:
                if (longer := [*way, *names]) not in ways[last + 1] and len(ways[last + 1]) < 2:
                    ways[last + 1].append(longer)
    return ways[-1]


# ---- Lists and objects.


def _looks_literal(text: str) -> bool:
    text = text.strip()
    if _CALL.fullmatch(text) or (text[:1], text[-1:]) in (("[", "]"), ("{", "}")):
        return True
    has_quote = '"' in text or "'" in text
    if text[:1] == "(" and text[-1:] == ")":
        return has_quote or text == "()" or ("," in text and "(" not in text[1:])
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return _looks_literal(text[1:-1])
    return has_quote and any(text.count(opening) != text.count(closing) for opening, closing in ("[]", "{}"))


def _parsed(text: str) -> Any:
    text = text.strip()
    try:
        value = json.loads(text)
    except ValueError:
        if text[:1] in "\"'" and text[:1] == text[-1:] and _looks_literal(text[1:-1]):
            return _parsed(text[1:-1].replace(text[0] * 2, text[0]))
        value = _python_value(text)
    return _parsed(value) if isinstance(value, str) and _looks_literal(value) else value


def _python_value(text: str) -> Any:
    """Return the value of a text that Python or numpy wrote: `['a' 'b']`, `{'a'}`, `array(['a'], dtype=object)`."""
    if call := _CALL.fullmatch(text):
        text = call["inside"].strip() or "[]"
    text = _NUMPY_TEXT.sub(r"\1", text)
    written = ""
    after_quoted = False
    for token in _TOKENS.finditer(text):
        # numpy writes no commas, and to Python 'a' 'b' is the one text 'ab'.
        written += ("," if after_quoted and token["quoted"] else "") + _WORDS.get(token[0], token[0])
        after_quoted = bool(token["quoted"]) or (after_quoted and token[0].isspace())
    if re.fullmatch(r"\[\s*\d+(?:\s+\d+)*\s*\]", written):
        written = re.sub(r"(?<=\d)\s+(?=\d)", ",", written)
    try:
        return ast.literal_eval(written)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError) as error:
        inside = text[1:-1]
        if text[:1] in "[{(" and not any(sign in inside for sign in "[]{}()\"':"):
            return [name for name in inside.split(",") if name.strip()]
        raise UnclearCellError("it is no complete list or object") from error


def _names_in(value: Any) -> list[str | int]:
    if is_missing(value):
        return []
    if isinstance(value, str):
        return [tidy_name(value)]
    if isinstance(value, Mapping):
        return _names_in_object(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [name for item in items for name in _names_in(item)]
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    raise UnclearCellError(f"{value!r} is no class name")


def _names_in_object(value: Mapping[Any, Any]) -> list[str | int]:
    if not value:
        return []
    keys = {key: str(key).strip().lower() for key in value}
    for wanted in (
        [key for key, plain in keys.items() if plain in _LABEL_KEYS or plain.endswith("labels")],
        [key for key, plain in keys.items() if plain in _CONTAINER_KEYS],
    ):
        if len(wanted) == 1 and not isinstance(value[wanted[0]], bool):
            return _names_in(value[wanted[0]])
    flags = {key: _FLAGS.get(str(flag).strip().lower()) for key, flag in value.items()}
    if None not in flags.values():
        return [tidy_name(str(key)) for key, flag in flags.items() if flag]
    if len(value) == 1:
        return _names_in(next(iter(value.values())))
    raise UnclearCellError(f"which of {', '.join(map(str, value))} holds the class is not clear")


def _unquoted(text: str) -> str:
    stripped = text.strip()
    if len(stripped) > 1 and stripped[0] == stripped[-1] and stripped[0] in "\"'":
        return tidy_name(stripped[1:-1])
    return tidy_name(text)
