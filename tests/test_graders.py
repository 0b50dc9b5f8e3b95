"""Graders: every score worked out by hand."""

from __future__ import annotations

import difflib

import pytest

from lccp_interp.schema import LccpError
from lccp_interp.scoring.graders import GRADERS, exact, mrcr, string_match_all, string_match_part

HASH = "aYooSG8CQg"


@pytest.mark.parametrize(
    ("generated", "references", "score"),
    [
        (" 7412093", ["7412093"], 1.0),
        ("7412093 and 55", ["7412093", "8", "55", "6"], 0.5),
        ("8412093", ["7412093"], 0.0),
        ("174120935", ["7412093"], 1.0),  # containment, as in RULER: inside a longer number too
        ("", ["7"], 0.0),
        ("Amber-RIVER", ["amber-river"], 1.0),
        ("one", ["one", "one", "two"], 2 / 3),  # repeated references count each time
        ("ÉTIENNE", ["étienne"], 1.0),
        ("E\u0301tienne", ["étienne"], 0.0),  # no normal form is taken: RULER compares lower-cased text
        ("在奥斯陆", ["奥斯陆"], 1.0),
        ("a\nb", ["a\nb"], 1.0),
    ],
)
def test_string_match_all(generated, references, score):
    assert string_match_all(generated, references) == pytest.approx(score)


@pytest.mark.parametrize(
    ("generated", "references", "score"),
    [
        (" It is oslo.", ["Lima", "Oslo"], 1.0),
        ("Lima and Oslo", ["Lima", "Oslo"], 1.0),
        ("Os lo", ["Oslo"], 0.0),
        ("", ["Oslo", "Lima"], 0.0),
    ],
)
def test_string_match_part(generated, references, score):
    assert string_match_part(generated, references) == score


@pytest.mark.parametrize(
    ("generated", "reference", "score"),
    [
        (f"{HASH}abcd", f"{HASH}abcd", 1.0),
        (f" \n{HASH}abcd", f"{HASH}abcd", 1.0),  # blanks in front do not count
        (f"{HASH}bcde", f"{HASH}abcd", 2 * 3 / 8),  # bcd matches: 2M / T
        (f"{HASH}abcd ", f"{HASH}abcd", 2 * 4 / 9),  # blanks behind do
        (f"{HASH}", f"{HASH}abcd", 0.0),
        (f"{HASH}", f"{HASH}", 1.0),  # two empty texts
        ("abcd", f"{HASH}abcd", 0.0),  # no hash
        (f"Sure: {HASH}abcd", f"{HASH}abcd", 0.0),  # not in front
        (f"{HASH.lower()}abcd", f"{HASH}abcd", 0.0),  # case counts
        (f"{HASH}{HASH}abcd", f"{HASH}abcd", 2 * 4 / 18),  # only one hash is taken off
        (f"{HASH}é", f"{HASH}é", 1.0),
        ("", f"{HASH}abcd", 0.0),
    ],
)
def test_mrcr(generated, reference, score):
    assert mrcr(generated, [reference]) == pytest.approx(score)


def test_mrcr_compares_in_the_published_order():
    written, answer = "tide", "diet"
    forward = difflib.SequenceMatcher(None, written, answer).ratio()
    backward = difflib.SequenceMatcher(None, answer, written).ratio()
    assert forward != backward
    assert mrcr(HASH + written, [HASH + answer]) == forward


def test_mrcr_takes_the_best_of_several_answers():
    assert mrcr(f"{HASH}abcd", [f"{HASH}wxyz", f"{HASH}abcd", "another-hash"]) == 1.0


@pytest.mark.parametrize(
    ("generated", "references", "score"),
    [
        (" Oslo.", ["oslo"], 1.0),
        ("University\tof \n Oslo", ["University of Oslo."], 1.0),
        ("Oslo..", ["Oslo"], 0.0),  # one full stop, not two
        ("Oslo .", ["Oslo"], 1.0),
        ("the Oslo", ["Oslo"], 0.0),  # articles count
        ("E\u0301TIENNE", ["Étienne"], 1.0),
        ("STRASSE", ["Straße"], 1.0),
        ("Lima", ["Oslo", "Lima"], 1.0),
        ("", ["Oslo"], 0.0),
    ],
)
def test_exact(generated, references, score):
    assert exact(generated, references) == score


@pytest.mark.parametrize("name", GRADERS)
@pytest.mark.parametrize("references", ["aYooSG8CQgabcd", []])
def test_references_are_a_list(name, references):
    with pytest.raises(LccpError, match=r"needs a list of at least one reference, got .*; write \['Oslo'\]"):
        GRADERS[name]("Oslo", references)


def test_a_reference_without_room_for_its_hash():
    with pytest.raises(LccpError, match="begins with a hash of 10 characters, got 'short'"):
        mrcr("short", ["short"])


def test_the_names_that_items_carry():
    assert set(GRADERS) == {"string_match_all", "string_match_part", "mrcr", "exact"}
