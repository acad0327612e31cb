"""Samples: rates of repetition by their definitions, articles, what is refused."""

import itertools
import json

import numpy as np
import pytest
import trained_run

from xlformer import compare, runs
from xlformer.instruments import repetition
from xlformer.scoring import texts


def words(text):
    return text.split()


def test_distinct_is_the_share_of_ngrams_that_were_not_there_before():
    rng = np.random.default_rng(0)
    for n, N in itertools.product((1, 2, 4), (4, 29)):
        items = rng.integers(0, 3, N).tolist()
        seen, new = [], 0
        for i in range(N - n + 1):
            new += items[i : i + n] not in seen
            seen.append(items[i : i + n])
        assert repetition.distinct(items, n) == new / (N - n + 1)
    assert repetition.distinct(words("a b c"), 4) is None
    assert repetition.shared(words("a b c d a b"), words("x a b c"), 2) == 3 / 5


def naive_longest(items):
    found = [
        size
        for size in range(1, len(items))
        for i, j in itertools.combinations(range(len(items) - size + 1), 2)
        if items[i : i + size] == items[j : j + size]
    ]
    return max(found, default=0)


def naive_looped(items, times):
    """The share that lies in some span of equal parts."""
    inside = set()
    for start, period in itertools.product(range(len(items)), range(1, len(items) + 1)):
        span = items[start : start + times * period]
        if len(span) == times * period and span == span[:period] * times:
            inside |= set(range(start, start + times * period))
    return len(inside) / len(items)


def test_longest_repeats_and_loops_are_the_naive_ones():
    rng = np.random.default_rng(1)
    for symbols, N in itertools.product((2, 3, 9), (1, 2, 5, 23)):
        items = rng.integers(0, symbols, N).tolist()
        assert repetition.longest_repeat(items) == naive_longest(items)
        for times in (2, 3):
            assert repetition.looped(items, times) == naive_looped(items, times)


def test_known_texts_have_known_rates():
    assert repetition.longest_repeat(words("to be or not to be that")) == 2
    assert repetition.longest_repeat(words("a a a a")) == 3
    assert repetition.longest_repeat([]) == 0 and repetition.looped([]) is None
    assert repetition.looped(words("x on and on and on and y")) == 6 / 8
    assert repetition.looped(words("a b a b")) == 0


@pytest.fixture(scope="module")
def articles(base, tmp_path_factory):
    """What is found of a run of characters; (the folder, the report)."""
    out = tmp_path_factory.mktemp("samples")
    flags = [
        f"--workdir={trained_run.trained(base)}",
        "--context=13",
        "--num_tokens=31",
    ]
    assert compare.main(["samples:tiny", f"--out={out}", *flags]) == 0
    return out, json.loads((out / "samples.json").read_text())


def test_the_first_three_articles_follow_each_other_in_the_test_split(articles, base):
    out, report = articles
    run = trained_run.loaded(base)
    tokens, _, _ = texts.read(run, "test", None)
    text = run.vocabulary.decode(tokens)
    assert report["size"] is None  # The run was given: nothing of it is tiny.
    assert report["sampling"] == {"temperature": 1.0, "top_k": 40, "top_p": 1.0}
    for number, found in enumerate(report["texts"]):
        start = number * 44
        assert found["context"] == text[start : start + 13]
        assert found["own"] == text[start + 13 : start + 44]
        assert len(found["drawn"]) == 31
        file = (out / f"samples/tiny-{number + 1}.txt").read_text()
        parts = (found["context"], found["drawn"], found["own"])
        assert all(part in file for part in parts)


def test_articles_are_measured_beside_the_corpus(articles):
    _, report = articles
    means, each = (table["rows"] for table in report["tables"])
    assert [row[:2] for row in means] == [["tiny", "tiny"], ["tiny", "the corpus"]]
    assert len(each) == 6
    found = report["articles"][1]
    assert found["text"] == "the corpus" and found["words"] == len(
        report["texts"][0]["own"].split()
    )
    least = min(len(x[k].split()) for x in report["texts"] for k in ("drawn", "own"))
    assert found["counted"] == least
    own = report["texts"][0]["own"].split()[:least]
    assert found["distinct-1"] == len(set(own)) / least


def test_a_seed_gives_its_articles_again(articles, base, tmp_path):
    flags = [
        f"--workdir={trained_run.trained(base)}",
        "--context=13",
        "--num_tokens=31",
    ]
    found = []
    for seed in (0, 1):
        argv = ["samples", f"--out={tmp_path}", *flags, f"--seed={seed}"]
        assert compare.main(argv) == 0
        found.append(json.loads((tmp_path / "samples.json").read_text())["texts"])
    assert found[0] == articles[1]["texts"] != found[1]


def test_a_model_of_its_own_is_trained_without_a_run(tmp_path):
    assert compare.main(["samples:tiny", f"--out={tmp_path}"]) == 0
    report = json.loads((tmp_path / "samples.json").read_text())
    assert (report["context"], report["num_tokens"]) == (24, 72)
    assert report["members"][0]["unit"] == "bytes"
    assert len(list((tmp_path / "samples").glob("*.txt"))) == 3
    assert "<svg" in (tmp_path / "samples.svg").read_text()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--num_tokens=0"], "--num_tokens=0 must be at least 1"),
        (["--context=-1"], "--context=-1 must be at least 1"),
        (["--seed=-1"], "--seed=-1 must be at least 0"),
        ([], "3 times --context=512 and --num_tokens=1000 need 4,536"),
        (["--workdir=/nowhere"], "--workdir=/nowhere holds no run"),
    ],
)
def test_bad_input_is_one_line(flags, line, base, tmp_path, capsys):
    run = f"--workdir={trained_run.trained(base)}"
    out = tmp_path / "out"
    assert compare.main(["samples", f"--out={out}", run, *flags]) == 2
    found, err = capsys.readouterr()
    assert (found, err.count("\n")) == ("", 1) and line in err


def test_what_cannot_be_continued_is_said_before_anything_is(base, tmp_path, capsys):
    workdir = trained_run.copy(base, tmp_path / "run")
    config = json.loads((workdir / runs.CONFIG).read_text())
    config["data"].update(corpus="text", path="")
    (workdir / runs.CONFIG).write_text(json.dumps(config))
    argv = ["samples", f"--out={tmp_path / 'out'}", f"--workdir={workdir}"]
    assert compare.main(argv) == 2
    assert "names no data" in capsys.readouterr().err
