"""What generation prints, as it grows: whole characters, up to a stop text."""

import numpy as np
import pytest

from xlformer.data.vocabulary import ByteVocabulary, CharVocabulary, WordVocabulary
from xlformer.generation.printing import Printer, Row


def printed(capsys, vocabulary, prompt, blocks, stops=()):
    """What stands on the terminal after each block, and at the end."""
    printer, shown = Printer([Row(vocabulary, prompt, stops)]), ""
    seen = []
    for block in blocks:
        printer(np.array([block]))
        shown += capsys.readouterr().out
        seen.append(shown)
    printer.finish()
    return [*seen, shown + capsys.readouterr().out]


def test_characters_of_several_bytes_are_not_broken(capsys):
    vocabulary = ByteVocabulary(list(range(256)), [0] * 256)
    ids = list("é日x".encode())
    seen = printed(capsys, vocabulary, ids[:1], [ids[1:3], ids[3:5], ids[5:]])
    assert seen == ["", "é日", "é日x", "é日x\n"]
    # Half a character at the end is shown as such, and nothing is lost.
    seen = printed(capsys, vocabulary, ids[:2], [ids[2:3], [255], [98], [195]])
    assert seen[-1] == "é\ufffd\ufffdb\ufffd\n"


def test_words_stand_apart_across_blocks(capsys):
    words = WordVocabulary(["<eos>", "a", "bc"], [0] * 3)
    seen = printed(capsys, words, [1, 2], [[1], [0, 2], [2]])
    assert seen == ["a bc a", "a bc a\nbc", "a bc a\nbc bc", "a bc a\nbc bc\n"]


@pytest.mark.parametrize("unit", ["bytes", "chars"])
@pytest.mark.parametrize("size", [1, 2, 5])  # of blocks
@pytest.mark.parametrize(
    ("stops", "expected"),
    [
        (["xx"], "a日b日c"),
        (["日c"], "a日b"),
        (["b日", "日b"], "a"),  # the one that begins first, whatever their order
        (["日cd", "xxx"], "a日b日cxx"),  # held back, and written at the end
        (["a日b日cxx"], ""),
        (["p"], "a日b日cxx"),  # of the prompt
    ],
)
def test_a_row_ends_before_a_stop_text(capsys, unit, size, stops, expected):
    text = "a日b日cxx"
    if unit == "bytes":
        vocabulary = ByteVocabulary(list(range(256)), [0] * 256)
    else:
        vocabulary = CharVocabulary("abcdxp日", [0] * 7)
    ids = vocabulary.encode(text).tolist()
    blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
    seen = printed(capsys, vocabulary, vocabulary.encode("p"), blocks, stops)
    assert seen[-1] == f"p{expected}\n"
    assert all(f"p{expected}".startswith(part) for part in seen[:-1])
    row = Row(vocabulary, vocabulary.encode("p"), stops)
    for block in blocks:
        row.add(block)
    assert row.stopped == (expected != text)
    if stops == ["b日", "日b"]:  # with the token that completed it
        assert text.encode()[: row.tokens] == "a日b".encode() or row.tokens == 3


def test_stop_texts_across_words(capsys):
    words = WordVocabulary(["<eos>", "a", "bc"], [0] * 3)
    blocks = [[1], [0, 2], [2]]
    assert printed(capsys, words, [1, 2], blocks, ["c bc"])[-1] == "a bc a\nb\n"
    assert printed(capsys, words, [1, 2], blocks, ["\n"])[-1] == "a bc a\n"


def test_characters_follow_each_other(capsys):
    seen = printed(capsys, CharVocabulary("aé日", [0] * 3), [0], [[1], [2, 2]])
    assert seen == ["aé", "aé日日", "aé日日\n"]
