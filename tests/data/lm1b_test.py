"""One Billion Word, on a made archive of its form."""

import dataclasses
import io
import logging
import tarfile

import numpy as np
import pytest
from training_runs import bag

from xlformer import config, prepare
from xlformer.data import lm1b, sources
from xlformer.data.stream import Stream
from xlformer.errors import UserError
from xlformer.scoring import units
from xlformer.train import train

NAME = "1-billion-word-language-modeling-benchmark-r13output"
TRAIN = "training-monolingual.tokenized.shuffled/news.en-{:05}-of-00100"
HELDOUT = "heldout-monolingual.tokenized.shuffled/news.en.heldout-{:05}-of-00050"
# Not in the order of their names, as in the archive of 2013.
FILES = {
    "README": "No sentence .\n",
    TRAIN.format(0): "held out\n",
    HELDOUT.format(1): "never read\n",
    TRAIN.format(2): "b a b \u00e9\n a b a\n",
    HELDOUT.format(0): "a new word\n\nb a\n",
    TRAIN.format(3): "a <S> a",
    TRAIN.format(1): "once a a\n",
}
WORDS = {
    "train": "<S> once a a <S> b a b \u00e9 <S> a b a <S> a <S> a <S>",
    "validation": "<S> a new word <S> <S> b a <S>",
}


def packed(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name, text in files.items():
            member = tarfile.TarInfo(f"{NAME}/{name}")
            data = text.encode("utf-8", "surrogateescape")
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(folder, files=FILES):
    for name, text in files.items():
        path = folder / NAME / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))


def data_config(folder, **fields):
    data = config.default_config().data
    data.update(corpus="lm1b", manual_dir=str(folder), **fields)
    return data


def prepared(folder, **fields):
    return prepare.prepare(data_config(folder, **fields), directory=folder / "out")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm1b")
    (folder / lm1b.CORPUS.archive.file).write_bytes(packed(FILES))
    return prepared(folder)


def test_sentences_end_in_a_symbol_and_a_text_begins_with_it(found):
    vocabulary = found.vocabulary
    assert vocabulary.symbols == ("<S>", "</S>", "<UNK>", "a", "b")
    # As counted in train: of five <S> that end sentences one is in the text.
    assert vocabulary.counts_V.tolist() == [6, 0, 2, 7, 3]
    for split, text in WORDS.items():
        expected = [w if w in vocabulary.symbols else "<UNK>" for w in text.split()]
        got = [vocabulary.symbols[i] for i in found.tokens[split][:]]
        assert got == expected
        assert found.card["splits"][split]["words"] == len(expected) - 1
    prompt = vocabulary.encode("b", close_line=False)
    assert vocabulary.decode(prompt) == "\nb"


def test_validation_is_test_and_the_card_says_so(found):
    card = found.card
    assert card["splits"]["validation"] == card["splits"]["test"]
    assert card["protocol"].startswith("validation is test")
    assert card["training_files"] == "3 of 99" and card["min_count"] == 3
    assert card["unpinned"] == list(card["files_sha256"]) == [f"{NAME}.tar.gz"]
    assert card["words_are"] == "between white space, and <S> of each line"
    assert card["splits"]["train"]["unknown_share"] == round(2 / 18, 6)
    assert card["splits"]["test"]["unknown_share"] == round(2 / 9, 6)


def test_memory_runs_on_over_sentences(found):
    stream = Stream(found.tokens["train"], batch_size=2, segment_length=3)
    assert found.documents["train"] is None
    resets = [stream.at(k)["resets_BT"].any() for k in range(stream.steps_per_epoch)]
    assert resets == [True, False]


@pytest.mark.parametrize("span", [(1, 9), (5, 9)])
def test_scored_words_are_those_of_sentences(found, span):
    about = found.card["splits"]["test"]
    whole = units.Count(about["bytes"], about["words"])
    tokens = found.tokens["test"][:]
    got = units.scored(found.vocabulary, tokens, [span], whole, lines=True)
    assert got.words == span[1] - span[0]
    # What <UNK> stands for is known of the whole text alone.
    assert got.bytes == (whole.bytes if span == (1, 9) else None)


def test_unpacked_files_are_the_same_text(found, tmp_path, caplog, capsys):
    unpacked(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = prepared(tmp_path)
    assert again.card["payload_sha256"] == found.card["payload_sha256"]
    assert again.card["splits"] == found.card["splits"]
    assert again.card["unpinned"] == ["unpacked files"]
    line = f"lm1b: these are 3 of its 99 training files: delete {again.directory}"
    assert line in capsys.readouterr().err
    # Also where it is found prepared: there may be more of them by now.
    prepared(tmp_path)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("where", ["archive", "folder"])
def test_a_wrong_byte_is_said_by_its_file(where, tmp_path):
    files = FILES | {TRAIN.format(2): "b \u00e9 \udcff a\n"}
    if where == "archive":
        (tmp_path / lm1b.CORPUS.archive.file).write_bytes(packed(files))
    else:
        unpacked(tmp_path, files)
    line = f"lm1b: {TRAIN.format(2)}: byte 0xff at offset 5 is not valid UTF-8"
    with pytest.raises(UserError, match=line):
        prepared(tmp_path)


def test_a_part_of_the_files_is_not_taken_for_all_of_them(tmp_path, monkeypatch):
    unpacked(tmp_path, without(TRAIN.format(2), TRAIN.format(3)))
    few = prepared(tmp_path)
    assert few.card["training_files"] == "1 of 99" and len(few.tokens["train"]) == 5
    unpacked(tmp_path)
    more = prepared(tmp_path)
    assert more.card["training_files"] == "3 of 99" and len(more.tokens["train"]) == 18
    # All of them are the published text, whether unpacked or not.
    monkeypatch.setattr(lm1b, "_SHARDS", 3)
    assert not lm1b.part(str(tmp_path)) and not lm1b.part(str(tmp_path / "gone"))


def test_a_sentence_does_not_go_on_in_the_next_file(found, tmp_path):
    unpacked(tmp_path, FILES | {TRAIN.format(1): "once a a"})
    again = prepared(tmp_path)
    assert again.card["splits"]["train"] == found.card["splits"]["train"]


def test_a_list_gives_the_words_and_their_order(found, tmp_path):
    unpacked(tmp_path)
    path = tmp_path / "words.txt"
    text = "\ufeff<S> 61\nword\u00a09\n\u2003\na 8\n<UNK> 0\na 1\n"
    path.write_text(text, encoding="utf-8")
    listed = prepared(tmp_path, vocab_file=str(path))
    assert listed.vocabulary.symbols == ("<S>", "word", "a", "<UNK>")
    assert listed.vocabulary.counts_V.tolist() == [6, 0, 7, 5]
    assert listed.tokens["test"][:].tolist() == [0, 2, 3, 1, 0, 0, 3, 2, 0]
    assert listed.directory.name != found.directory.name
    for text, line in [("<S>\na\n", "<UNK> is not among its 2"), (b"\xff", "no UTF-8")]:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"vocab_file=.*words.txt: .*{line}"):
            prepared(tmp_path, vocab_file=str(path))
    data = data_config(tmp_path, vocab_file=str(path))
    data.tokenizer = "tokenizers:300"
    with pytest.raises(UserError, match="lm1b, not with .*tokenizer=tokenizers:300"):
        prepare.prepare(data, directory=tmp_path)
    data.update(corpus="penn", tokenizer="")
    with pytest.raises(UserError, match="is for the words of lm1b"):
        prepare.prepare(data, directory=tmp_path)


def without(*names, **changed):
    return {k: v for k, v in FILES.items() if k not in names}


CUT = packed(FILES)[:-40]
BAD = {
    "cut": (CUT, "not a whole archive: Compressed file ended before"),
    "none": (b"no archive", "not a whole archive: "),
    "empty": (b"", "not a whole archive: "),
    "a gap": (packed(without(TRAIN.format(2))), f"no {TRAIN.format(2)}"),
    "no train": (packed(without(*map(TRAIN.format, (1, 2, 3)))), f"no {TRAIN[:9]}"),
    "no test": (packed(without(HELDOUT.format(0))), f"no {HELDOUT.format(0)}"),
    "an empty one": (packed(FILES | {TRAIN.format(2): ""}), "00002-of-00100 is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_archives_are_one_line(case, tmp_path, capfd):
    data, expected = BAD[case]
    (tmp_path / f"{NAME}.tar.gz").write_bytes(data)
    command = ["--config=lm1b_base", f"--manual_dir={tmp_path}"]
    assert prepare.main([*command, f"--directory={tmp_path / 'out'}"]) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "checksum" not in x]
    assert expected in line and f"put {NAME}.tar.gz (unpinned)" in line
    assert not [p for p in (tmp_path / "out").rglob("*") if "incomplete" in p.name]


def test_a_wrong_checksum_is_said(tmp_path, monkeypatch):
    pinned = lm1b.Archive(f"{NAME}.tar.gz", (), "0" * 64)
    corpus = dataclasses.replace(lm1b.CORPUS, archives=(pinned,))
    monkeypatch.setitem(sources.CORPORA, "lm1b", corpus)
    monkeypatch.setattr(lm1b, "CORPUS", corpus)
    (tmp_path / f"{NAME}.tar.gz").write_bytes(packed(FILES))
    with pytest.raises(UserError, match="wrong checksum of .*expected sha256 0000"):
        prepared(tmp_path)
    (tmp_path / f"{NAME}.tar.gz").unlink()
    with pytest.raises(UserError, match=f"lm1b: .* has neither {NAME}.tar.gz nor"):
        prepared(tmp_path)


def test_its_configs_train_on_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XLFORMER_DATA", str(tmp_path))
    draw = np.random.default_rng(5)
    lines = [" ".join(draw.choice([*"abcdefgh"], 5)) + "\n" for _ in range(20)]
    text = "".join(lines)
    unpacked(tmp_path, {TRAIN.format(1): text, HELDOUT.format(0): text})
    loaded = config.load("lm1b_base:debug")
    for other in ("lm1b_base_paper", "lm1b_large"):
        assert config.load(f"{other}:debug").data == loaded.data
    loaded.data.manual_dir = str(tmp_path)
    # The model that is trained here has no memory; these configs' own are tried on
    # other words, once for all configs.
    loaded.eval.update(memory_length=-1, same_length=False)
    assert train(loaded, tmp_path / "run", model=bag(vocab_size=11))["step"] == 2
