"""Log-likelihoods of requests against one pass over each text, and against evaluate."""

import dataclasses
import functools
import itertools

import harness_runs
import jax
import numpy as np
import pytest
import trained_run
from harness_runs import CHARS, LINE, SEGMENT, WORDS, Request, requests
from training_runs import refusal

from xlformer import evaluate, runs, sharding
from xlformer.errors import UserError
from xlformer.harness import Answerer
from xlformer.scoring import EvalSettings

ONE = sharding.make_mesh({"data": 1})
# Both shorter and longer than a segment, than the memory, than all of a stack's reach.
PAIRS = [
    ("", "the cat"),
    ("", LINE * 2),
    ("the c", "a"),
    ("the cat sat", ""),
    (LINE, "the dog sat"),
    (LINE * 2, "on"),
    ("o", LINE * 2),
    ("the cat sat on a", " mat"),
    ("the cat sat on a ", "mat"),
]
# Wider than any text here: segments are one pass then.
WIDE, LONG = 131, 37
TOLERANCE = {"rel": 2e-5, "abs": 2e-5}


@functools.cache
def answerer(rows=3, prefix=True, vocabulary=CHARS, segment=None, **fields):
    run = harness_runs.run(vocabulary, **fields)
    settings = EvalSettings(batch_size=rows, segment_length=segment)
    return Answerer(run, settings, mesh=ONE, prefix=prefix)


@functools.cache
def step(model):
    return jax.jit(model.log_probs)


def naive(run, ids, first, segment=None):
    """log p and whether all were the most probable, by log_probs of one text alone."""
    targets = ids[first:]
    log_p_NV = log_probs(run, ids[:-1], segment)[first - 1 :]
    log_p = log_p_NV[np.arange(len(targets)), targets].sum()
    return log_p, bool((log_p_NV.argmax(-1) == targets).all())


def log_probs(run, ids, segment=None):
    """Of what follows each token; segments None: one pass over the text."""
    segment = segment or WIDE
    state, parts = run.model.init_state(1), []
    for start in range(0, len(ids), segment):
        part = np.zeros((1, segment), np.int32)  # Nothing depends on what is behind.
        size = len(ids[start : start + segment])
        part[0, :size] = ids[start : start + segment]
        log_p, state = step(run.model)(run.params, part, state)
        parts.append(np.asarray(log_p[0, :size], np.float64))
    return np.concatenate(parts)


def expected_of(run, pairs, segment=None):
    for context, continuation in pairs:
        before, after = (CHARS.encode(x) for x in ("\n" + context, continuation))
        ids = np.concatenate([before, after])
        yield naive(run, ids, len(before), segment)


def agree(found, expected):
    assert [said for _, said in found] == [said for _, said in expected]
    for (a, _), (b, _) in zip(found, expected, strict=True):
        assert a == pytest.approx(b, **TOLERANCE)


def test_segments_within_the_memory_are_one_pass():
    run = harness_runs.run(memory_length=WIDE)
    # Greedy continuations too, which chance would not bring.
    pairs = [*PAIRS, *greedy_pairs(run)]
    expected = [*expected_of(run, pairs)]
    assert {said for _, said in expected} == {True, False}
    # Short texts are read in shorter segments, long ones in several.
    for segment in (SEGMENT, LONG):
        one = answerer(memory_length=WIDE, segment=segment)
        agree(one.loglikelihood(requests(*pairs)), expected)
    assert {T for T, _, _ in one._likelihoods._evaluators} == {16, 32, LONG}


def test_any_number_of_rows_gives_what_each_text_alone_gives():
    run = harness_runs.run()
    pairs = [*PAIRS, *greedy_pairs(run, SEGMENT)]
    expected = [*expected_of(run, pairs, SEGMENT)]
    for rows in (1, 3):
        found = answerer(rows).loglikelihood(requests(*pairs))
        agree(found, expected)
    assert answerer().loglikelihood(requests(*pairs)) == found
    # In whatever company: these programs have one shape.
    assert answerer().loglikelihood(requests(*pairs[::-1])) == found[::-1]
    assert answerer().loglikelihood(requests(*pairs[5:8])) == found[5:8]


def greedy_pairs(run, segment=None):
    """What the model itself says next, and that with another last token."""
    text = "\n" + PAIRS[4][0]
    ids = CHARS.encode(text).tolist()
    for _ in range(3):
        ids.append(int(log_probs(run, ids, segment)[-1].argmax()))
    said = CHARS.decode(ids[-3:])
    other = next(c for c in "abc" if c != said[-1])
    text = text[1:]
    return [(text, said), (text, said[:2] + other), (text + said[0], said[1])]


def test_the_sum_over_parts_is_the_whole():
    one = answerer()
    text = LINE + "the dog"
    cuts = [0, 1, 5, 6, 30, len(LINE), len(text)]
    parts = [(text[:a], text[a:b]) for a, b in itertools.pairwise(cuts)]
    whole, *found = one.loglikelihood(requests(("", text), *parts))
    assert sum(a for a, _ in found) == pytest.approx(whole[0], **TOLERANCE)


def test_words_are_parted_at_spaces_on_either_side():
    one = answerer(vocabulary=WORDS)
    pairs = [("the cat", " sat on"), ("the cat ", "sat on"), ("the cat  ", " sat  on")]
    found = one.loglikelihood(requests(*pairs))
    assert found[1:] == found[:1] * 2
    ids = [WORDS.eos_id, *WORDS.encode("the cat sat on", close_line=False)]
    expected = naive(harness_runs.run(WORDS), ids, 3, SEGMENT)
    assert found[0] == (pytest.approx(expected[0], **TOLERANCE), expected[1])
    text = "the cat sat\non a mat; zebra\n"
    cuts = [0, 3, 8, 12, 15, len(text)]
    parts = [(text[:a], text[a:b]) for a, b in itertools.pairwise(cuts)]
    whole, *parted = one.loglikelihood(requests(("", text), *parts))
    assert sum(a for a, _ in parted) == pytest.approx(whole[0], **TOLERANCE)
    # Of the word that it completes the continuation has all.
    (within,) = one.loglikelihood(requests(("the c", "at")))
    (all_of_it,) = one.loglikelihood(requests(("the ", "cat")))
    assert within == all_of_it


def test_many_rows_of_a_large_vocabulary_are_read_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr("xlformer.harness.likelihoods.NUMBERS", 2 * 5 * CHARS.size)
    one = Answerer(harness_runs.run(), EvalSettings(batch_size=3), mesh=ONE)
    assert one._likelihoods._fitting_rows(SEGMENT, greedy=True) == 2
    assert one._likelihoods._fitting_rows(SEGMENT, greedy=False) == 3
    assert one._likelihoods._fitting_rows(SEGMENT * 7, greedy=True) == 1


# Without memory -----------------------------------------------------------------------


def test_a_model_without_memory_reads_with_a_window_that_slides():
    run = harness_runs.run(memory_length=0)
    one = answerer(memory_length=0)
    assert (one.settings.segment_length, one.settings.stride) == (5, 2)

    def next_of(ids):  # The last two of each window are scored.
        start = (len(ids) - 1) // 2 * 2
        return log_probs(run, ids[max(0, start - 3) :])[-1]

    pair = LINE[:11], LINE[11:19]
    ids = CHARS.encode("\n" + "".join(pair))
    first = 1 + len(pair[0])
    expected = sum(next_of(ids[:i])[ids[i]] for i in range(first, len(ids)))
    # What the model itself says at both places of a window.
    said = [
        (text, CHARS.decode([next_of(CHARS.encode("\n" + text)).argmax()]))
        for text in ("".join(pair), "".join(pair)[:-1])
    ]
    found, *greedy = one.loglikelihood(requests(pair, *said))
    assert found == (pytest.approx(expected, **TOLERANCE), False)
    assert [is_greedy for _, is_greedy in greedy] == [True, True]
    plain = Answerer(run, EvalSettings(stride=0), mesh=ONE)
    assert plain.loglikelihood(requests(pair))[0][0] != found[0]
    with pytest.raises(UserError, match="a memory of 0 carries nothing"):
        one.generate_until(requests(("the", {})))


# As evaluate --------------------------------------------------------------------------


def test_a_document_has_the_nats_of_evaluate(base, tmp_path):
    """With the line end that a text follows, and without."""
    workdir, path = trained_run.trained(base), tmp_path / "text.txt"
    mesh = sharding.make_mesh({"data": 2})
    run = runs.load(workdir, mesh=mesh)
    for prefix, before in ((False, ""), (True, "\n")):
        one = Answerer(run, mesh=mesh, prefix=prefix)
        path.write_text(before + trained_run.TEXT[:-1] * 2, encoding="utf-8")
        card = evaluate.evaluate(workdir, text=str(path), batch_size=1, mesh=ONE)
        documents = trained_run.TEXT[:-1] * 2, "а", trained_run.TEXT
        found = one.loglikelihood_rolling(requests(*((x,) for x in documents)))
        assert found[0] == pytest.approx(-card["nats"], rel=1e-5)
        assert (found[1] == 0) != prefix
        found = one.loglikelihood(requests(("", documents[0]))) if prefix else []
        assert all(a == pytest.approx(-card["nats"], rel=1e-5) for a, _ in found)


def test_a_document_of_words_ends_its_last_line(base):
    one = answerer(vocabulary=WORDS)
    closed, open_ = one.loglikelihood_rolling(requests(("a cat\n",), ("a cat",)))
    assert closed == open_
    ((as_parts, _),) = one.loglikelihood(requests(("", "a cat\n")))
    assert as_parts == pytest.approx(closed, **TOLERANCE)


# What cannot be -----------------------------------------------------------------------


def refused(ask, *found):
    return refusal(ask, [Request(args, "mine", 4) for args in found])


def test_what_cannot_be_encoded_is_one_line():
    one, words = answerer(), answerer(vocabulary=WORDS, prefix=False)
    where = "task mine, document 4: "
    line = f"{where}not in the vocabulary of {CHARS.size} chars: 'X', 'Y'"
    assert refused(one.loglikelihood, ("the", " cat"), ("a X", "Y")) == line
    assert refused(one.loglikelihood_rolling, ("a XY",)) == line
    assert refused(one.generate_until, ("XY", {})) == line
    unlucky = Request(("aX", "b"))
    with pytest.raises(UserError, match="^request 0: not in the vocabulary"):
        one.loglikelihood([unlucky])
    assert words.loglikelihood(requests(("the", "  "))) == [(0.0, True)]
    line = refused(words.loglikelihood, ("", "cat sat"))
    assert line.startswith(f"{where}'cat sat' has nothing before it")
    line = refused(words.generate_until, ("", {}))
    assert line.startswith(f"{where}nothing to continue")


def test_a_model_whose_numbers_are_not_finite_is_said():
    run = harness_runs.run()
    bad = jax.tree.map(lambda x: x * np.nan, run.params)
    one = Answerer(dataclasses.replace(run, params=bad), mesh=ONE)
    line = refused(one.loglikelihood_rolling, (LINE,))
    assert line.startswith("the model gives no probabilities but NaN")
