"""Rows of cells as lines of text."""

from xlformer.tables import aligned


def test_words_begin_and_numbers_end_in_one_place():
    rows = [("", "ms", "tokens"), ("xla", "1.25", "7,949"), ("blocked", "", "16,583")]
    assert aligned(rows) == [
        "           ms  tokens",
        "xla      1.25   7,949",
        "blocked        16,583",
    ]
    assert aligned([("step", "3"), ("loss", "")], left=2) == ["step  3", "loss"]
