"""Text from elsewhere in terminals, pages and spreadsheets."""

import csv
import io
import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmem.text import cell, printable, table


@given(st.text(st.characters(exclude_categories=())))
def test_printable_text_holds_nothing_that_hides(text):
    shown = printable(text)
    shown.encode("utf-8")
    kinds = {unicodedata.category(letter) for letter in shown if letter not in "\u200c\u200d"}
    assert not kinds & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["img 1.png", "naïve 猫.png", "σ = 0.5 – 1", "👩\u200d💻", "עברית", "C:\\images"])
def test_words_of_all_languages_stay(text):
    assert printable(text) == text


def test_escapes():
    assert printable(os.fsdecode(b"\xff\xe9")) == "\\xff\\xe9"
    assert printable("a\u202eb\x1b\n\x85\u2028\ufeff\U000e0041") == "a\\u202eb\\x1b\\n\\x85\\u2028\\ufeff\\U000e0041"
    assert printable("a\nb\tc\r", keep="\n\t") == "a\nb\tc\\r"


@pytest.mark.parametrize(
    "text", ["=1+1", "+A1", "-A1", "@SUM(A1)", "\t=1", "\r=1", "-1+1", "\n=1", "=", "  =1", "+1_0"]
)
def test_formulas_become_text(text):
    assert cell(text)[0] == "'"


@pytest.mark.parametrize("value", [-1, -0.5, "-1.5", "+3", "-1e-07", "-inf", "", "a=b", "img-1.png", None])
def test_numbers_and_plain_text_stay(value):
    assert cell(value) == value


def test_tables_are_read_back():
    rows = [["a,b", 'say "x"', -1.5], ["c", "", 2]]
    assert list(csv.reader(io.StringIO(table(["=name", "b", "c"], rows)))) == [
        ["'=name", "b", "c"], ["a,b", 'say "x"', "-1.5"], ["c", "", "2"],
    ]  # fmt: skip
