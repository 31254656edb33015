from __future__ import annotations

import unicodedata

import pytest

from bitrans_hf.data import DataError
from bitrans_hf.data.common import check_classes, is_background, tidy_name


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("  dog ", "dog"),
        ("\u00a0polar\u00a0 bear\u2003", "polar bear"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffdog\u200b", "dog"),
        ("\u0645\u06cc\u200c\u0631\u0648\u0645", "\u0645\u06cc\u200c\u0631\u0648\u0645"),  # the joiner is spelling
    ],
)
def test_a_name_has_one_form(written: str, name: str) -> None:
    assert tidy_name(written) == name


@pytest.mark.parametrize("name", ["background", "Background", "BACKGROUND ", "_background_", "__background__", "bg"])
def test_background_is_known_in_every_spelling(name: str) -> None:
    assert is_background(name)


@pytest.mark.parametrize("name", ["back", "background noise", "fore-ground", "b"])
def test_other_names_are_no_background(name: str) -> None:
    assert not is_background(name)


def test_background_at_the_head_of_a_list_is_left_out_since_its_id_is_0_anyway() -> None:
    assert check_classes(["_Background_", "cat", " dog "], "the list") == ["cat", "dog"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "background"], "the list names 'background' among the classes, .* label id 0"),
        (["background", "bg", "cat"], "names 'bg' among the classes"),
        (["background"], "names no class"),
        (["cat", " cat"], "names 'cat' more than once"),
        (["cafe\u0301", "caf\u00e9"], "names 'caf\u00e9' more than once"),
        (["Cat", "dog", "cat"], "names 'Cat' and 'cat', which look alike"),
        (["\uff43at", "cat"], "which look alike"),
        (["stra\u00dfe", "STRASSE"], "which look alike"),
        (["cat", " "], "holds ' ', expected class names"),
        ([1, 2], "holds 1, expected class names; write numbers in quotes"),
        ("cat", "is the text 'cat', expected a list"),
    ],
)
def test_a_list_that_cannot_number_the_classes_is_refused(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=unicodedata.normalize("NFC", message)):
        check_classes(names, "the list")
