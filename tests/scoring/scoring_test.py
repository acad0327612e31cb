"""Every target once, and the same score however many rows the text is cut into."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
import trained_run

from xlformer import models, scoring
from xlformer.errors import UserError
from xlformer.scoring import evaluator as evaluator_lib
from xlformer.scoring import rows as rows_lib

VOCAB_SIZE, TOKENS, SEGMENT, MEMORY, LAYERS = 17, 307, 5, 7, 3
BASE = {
    "vocab_size": VOCAB_SIZE,
    "n_layer": LAYERS,
    "d_model": 14,
    "n_head": 2,
    "d_head": 7,
    "d_inner": 23,
    "memory_length": MEMORY,
    "scan_layers": True,
    "untie_r": True,
}
DOCUMENTS = np.array([0, 3, 17, 61, 62, 211])
CASES = {
    "plain": {},
    "documents, window": {"window": 6},
    "extended": {"extended_length": 3},
    "extended, documents": {"extended_length": 3},
    "extended by segments": {"extended_length": 2 * SEGMENT},
    "same_length, clamp": {"same_length": True, "clamp_length": 3},
    "attended zeros": {"attend_zero_memory": True},
}
LONG = {"memory_length": 22, "same_length": True}
ROWS = {"plain": (3, 7), "extended": (3, 7)}  # else 3
ACCURACY = 1e-5  # relative, of the summed nll


@pytest.fixture(autouse=True)
def small_calls(monkeypatch):
    """Several calls for this text, each of a few segments."""
    monkeypatch.setattr(evaluator_lib, "TOKENS_PER_CALL", 7 * SEGMENT)


@functools.cache
def text():
    return np.random.default_rng(13).integers(0, VOCAB_SIZE, TOKENS).astype(np.uint8)


@functools.cache
def made(case):
    model = models.build(models.TransformerXLConfig(**BASE | CASES[case]))
    return model, trained_run.random_params(model)


@functools.cache
def long_memory():
    model = models.build(models.TransformerXLConfig(**BASE | LONG))
    return model, trained_run.random_params(model)


def documents_of(case):
    return DOCUMENTS if "documents" in case else None


@functools.cache
def evaluator(case, rows):
    model, _ = made(case)
    return scoring.Evaluator(model, batch_size=rows, segment_length=SEGMENT)


def planned(case, rows, warmup, tokens=TOKENS):
    return scoring.cut_rows(
        tokens,
        batch_size=rows,
        segment_length=SEGMENT,
        memory_length=scoring.reach(made(case)[0]),
        n_layer=LAYERS,
        warmup=warmup,
    )


@functools.cache
def nats(case, rows, warmup):
    plan = planned(case, rows, warmup)
    assert len(plan.start_B) == rows
    params = made(case)[1]
    documents = documents_of(case)
    score = evaluator(case, rows).score(params, text(), plan, documents=documents)
    assert score.targets == plan.targets
    return score.nats


def how_often_scored(plan, tokens):
    """For each target, from the very arrays that the model is given."""
    counts = np.zeros(tokens, int)
    ids = np.arange(tokens)
    for step in range(plan.steps):
        batch = rows_lib.batch(plan, ids, None, step, 0)
        _, scored_BT = rows_lib.targets_at(plan, step)
        np.testing.assert_array_equal(
            batch["targets_BT"][scored_BT], batch["inputs_BT"][scored_BT] + 1
        )
        np.add.at(counts, batch["targets_BT"][scored_BT], 1)
    return counts


@pytest.mark.parametrize("warmup", ["exact", "fill", "none"])
def test_every_target_is_scored_once(warmup):
    sizes = itertools.product(
        (2, 3, 5, 7, 31, 97), (1, 2, 3, 7, 31), (1, 3, 5, 101), (0, 1, 7, 23), (1, 3)
    )
    for tokens, rows, segment, memory, layers in sizes:
        plan = scoring.cut_rows(
            tokens,
            batch_size=rows,
            segment_length=segment,
            memory_length=memory,
            n_layer=layers,
            warmup=warmup,
        )
        where = (tokens, rows, segment, memory, layers)
        counts = how_often_scored(plan, tokens)
        assert counts.max() == 1 and counts[0] == 0, where
        B = len(plan.start_B)
        assert B <= rows, where
        expected = B * (tokens // B - 1) if warmup == "none" else tokens - 1
        assert counts.sum() == plan.targets == expected, where
        if warmup == "none":
            assert B == min(rows, tokens // 2), where
        else:
            # Segments begin where those of the one-row stream do.
            assert not (plan.start_B % plan.segment_length).any(), where


def test_warmup_replays_what_it_says():
    steps = {w: planned("plain", 3, w).steps for w in ("exact", "fill", "none")}
    each = -(-((TOKENS - 1) // SEGMENT + 1) // 3)
    segments = -(-MEMORY // SEGMENT)
    assert steps["fill"] == each + segments
    assert steps["exact"] == each + LAYERS * segments
    assert steps["none"] == -(-(TOKENS // 3 - 1) // SEGMENT)


@pytest.mark.parametrize(("each", "expected"), [(24, "fill"), (25, "exact")])
def test_exact_is_the_default_below_a_quarter_more_work(each, expected):
    tokens = 3 * each * SEGMENT + 1
    plan = planned("plain", 3, "auto", tokens)
    replayed = LAYERS * -(-MEMORY // SEGMENT)  # 6: a quarter of 24
    assert (plan.warmup, replayed) == (expected, 6)
    assert planned("plain", 1, "auto", tokens).warmup == "exact"


def test_unlimited_reach_is_exact_in_one_row_only():
    settings = {"segment_length": 5, "memory_length": None, "n_layer": 3}
    assert scoring.cut_rows(97, batch_size=3, **settings).warmup == "none"
    assert scoring.cut_rows(97, batch_size=1, **settings).warmup == "exact"
    for warmup in ("exact", "fill"):
        with pytest.raises(UserError, match="batch_size=3.*without limit"):
            scoring.cut_rows(97, batch_size=3, warmup=warmup, **settings)


def test_a_bounded_memory_of_unknown_depth_is_exact_in_one_row_only():
    """Layers reach back through layers, and nothing says through how many."""
    unknown = made("plain")[0]
    kind = type("Unknown", (type(unknown),), {"replay": models.Model.replay})
    settings = {"segment_length": SEGMENT, "batch_size": 3}
    found = [
        scoring.cut_rows_for(kind(unknown.config), 10**4, **settings | changes).warmup
        for changes in ({}, {"warmup": "fill"}, {"batch_size": 1})
    ]
    assert found == ["fill", "fill", "exact"]
    with pytest.raises(UserError, match="warmup='exact' with batch_size=3"):
        scoring.cut_rows_for(kind(unknown.config), TOKENS, **settings, warmup="exact")
    assert scoring.cut_rows_for(unknown, 10**4, **settings).warmup == "exact"


def test_what_a_model_says_that_one_row_would_carry():
    for fields, expected in (
        ({}, 3 * 2),
        ({"memory_length": 0}, 0),
        ({"memory_length": 0, "extended_length": 11}, 3),
        ({"extended_length": 3}, 2 * 2 + 2),
        ({"extended_length": 4}, 2 * 2 + 3),
    ):
        model = models.build(models.TransformerXLConfig(**BASE | fields))
        assert model.replay(SEGMENT) == expected, fields


@pytest.mark.parametrize("case", CASES)
def test_exact_warmup_gives_the_score_of_one_row(case):
    expected = nats(case, 1, "exact")
    assert np.isfinite(expected)
    for rows in ROWS.get(case, (3,)):
        assert nats(case, rows, "exact") == pytest.approx(expected, rel=ACCURACY)


# With a window a token depends little on what is that far back.
@pytest.mark.parametrize("case", ["plain", "extended", "attended zeros"])
def test_fill_and_none_do_not(case):
    expected = nats(case, 1, "exact")
    for rows in ROWS.get(case, (3,)):
        assert abs(nats(case, rows, "fill") / expected - 1) > 10 * ACCURACY, rows
    plan = planned(case, 3, "none")
    per_token = nats(case, 3, "none") / plan.targets
    assert abs(per_token / (expected / (TOKENS - 1)) - 1) > 10 * ACCURACY


@pytest.mark.parametrize("case", ["extended", "extended by segments"])
def test_rows_without_warmup_are_texts_of_their_own(case):
    model, params = made(case)
    rows = text()[: 3 * (TOKENS // 3)].reshape(3, -1)
    alone = planned(case, 1, "exact", TOKENS // 3)
    one = evaluator(case, 1)
    expected = sum(one.score(params, row, alone).nats for row in rows)
    assert nats(case, 3, "none") == pytest.approx(expected, rel=ACCURACY)


@pytest.mark.parametrize(("attn_type", "extended"), [(2, 0), (3, 3)])
def test_positions_from_the_end_end_with_the_text(attn_type, extended):
    """The last segment of each row is shorter: as the original, and no padding."""
    fields = {"attn_type": attn_type, "memory_length": 0, "table_length": 6}
    fields |= {"n_layer": 1, "d_head": 7, "extended_length": extended}
    model = models.build(models.TransformerXLConfig(**BASE | fields))
    params, apply = trained_run.random_params(model), jax.jit(model.apply)
    settings = {"batch_size": 3, "segment_length": SEGMENT}
    mine = scoring.Evaluator(model, **settings)
    mine.compile(params)
    for tokens, warmup in ((53, "none"), (53, "exact"), (22, "none")):
        plan = scoring.cut_rows_for(model, tokens, warmup=warmup, **settings)
        found = mine.score(params, text()[:tokens], plan)
        expected = 0.0
        spans = zip(plan.first_B, plan.last_B, strict=True)
        for first, last in [(0, tokens - 1)] if warmup == "exact" else spans:
            for start in range(first, last, SEGMENT):
                stop = min(start + SEGMENT, last)
                inputs_BT = text()[None, max(first, start - extended) : stop]
                targets_BT = text()[None, start + 1 : stop + 1].astype(int)
                empty = model.init_state(1)
                nll_BT, _, _ = apply(params, inputs_BT.astype(int), targets_BT, empty)
                expected += float(nll_BT.sum())
        assert found.nats == pytest.approx(expected, rel=ACCURACY), (tokens, warmup)


@pytest.mark.parametrize("case", ["plain", "extended, documents"])
def test_equals_a_loop_over_the_text(case):
    """One row, one segment after the other, nothing padded at the end."""
    model, params = made(case)
    apply = jax.jit(model.apply)
    state, E = model.init_state(1), model.extended_length
    starts = [0] if documents_of(case) is None else DOCUMENTS.tolist()
    total = 0.0
    for start in range(0, TOKENS - 1, SEGMENT):
        stop = min(start + SEGMENT, TOKENS - 1)
        index = np.arange(start - E, stop)
        inputs_BT = text()[np.maximum(index, 0)][None].astype(np.int32)
        targets_BT = text()[start + 1 : stop + 1][None].astype(np.int32)
        resets_BT = np.isin(index, starts)[None]
        nll_BT, state, _ = apply(
            params, inputs_BT, targets_BT, state, resets_BT=resets_BT
        )
        total += float(nll_BT.sum())
    assert nats(case, 1, "exact") == pytest.approx(total, rel=ACCURACY)


@pytest.mark.parametrize("warmup", ["exact", "none"])
def test_longer_segments_are_taken_where_the_score_is_the_same(warmup):
    model, params = long_memory()
    short = scoring.cut_rows_for(
        model, TOKENS, batch_size=3, segment_length=SEGMENT, warmup=warmup
    )
    plan = rows_lib.faster(short, model, TOKENS, batch_size=3)
    assert (plan.segment_length, plan.warmup) == (11, warmup)
    found, expected = (
        scoring.Evaluator.of(model, p, None).score(params, text(), p)
        for p in (plan, short)
    )
    assert found.targets == expected.targets
    assert found.nats == pytest.approx(expected.nats, rel=ACCURACY)


@pytest.mark.parametrize(
    ("changes", "warmup"),
    [
        ({}, "fill"),  # one segment more of another past
        ({"window": 23}, "exact"),  # a token that sees more than the memory holds
        ({"same_length": False}, "exact"),
        ({"extended_length": 3}, "exact"),
        ({"memory_length": 11}, "exact"),  # of which a half is no more than a segment
    ],
)
def test_segments_stay_where_the_score_depends_on_them(changes, warmup):
    config = models.TransformerXLConfig(**BASE | LONG | changes)
    plan = scoring.cut_rows(
        3001,
        batch_size=3,
        segment_length=SEGMENT,
        memory_length=config.memory_length,
        n_layer=LAYERS,
        warmup=warmup,
    )
    assert rows_lib.faster(plan, models.build(config), 3001, batch_size=3) is plan


def test_segments_stay_where_rounding_would_read_more():
    model, _ = long_memory()
    plan = scoring.cut_rows_for(model, 41, batch_size=8, segment_length=SEGMENT)
    assert rows_lib.faster(plan, model, 41, batch_size=8) is plan


def test_documents_change_the_score():
    with_documents = nats("extended, documents", 1, "exact")
    assert abs(with_documents / nats("extended", 1, "exact") - 1) > 1e-3


def test_length_of_a_call_changes_nothing(monkeypatch):
    model, params = made("plain")
    plan = planned("plain", 3, "exact")
    for tokens in (1, 10**6):
        monkeypatch.setattr(evaluator_lib, "TOKENS_PER_CALL", tokens)
        whole = scoring.Evaluator(
            model, batch_size=3, segment_length=SEGMENT, steps=plan.steps
        )
        score = whole.score(params, text(), plan)
        assert score.nats == pytest.approx(nats("plain", 3, "exact"), rel=1e-6)


@pytest.mark.parametrize("case", ["documents, window", "attended zeros"])
def test_compile_leaves_nothing_to_compile(case):
    model, params = made(case)
    mine = scoring.Evaluator(model, batch_size=3, segment_length=SEGMENT)
    mine.compile(params)
    (before,) = mine._compiled
    plan = planned(case, 3, "exact")
    mine.score(params, text(), plan, documents=documents_of(case))
    assert list(mine._compiled) == [before]


def test_progress_is_told_the_fraction_and_may_give_up():
    _, params = made("plain")
    plan, seen = planned("plain", 3, "exact"), []
    mine = evaluator("plain", 3)
    assert mine.score(params, text(), plan, progress=lambda x: seen.append(x))
    assert seen == sorted(seen) and seen[-1] == 1 and len(seen) > 3

    def stop_at_second(fraction):
        seen.append(fraction)
        return len(seen) == 2

    seen.clear()
    assert mine.score(params, text(), plan, progress=stop_at_second) is None
    assert len(seen) == 2


def test_segment_longer_than_the_text_is_the_text():
    plan = scoring.cut_rows(
        7, batch_size=3, segment_length=10**12, memory_length=5, n_layer=2
    )
    assert (plan.segment_length, len(plan.start_B), plan.targets) == (6, 1, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": "exactly"}, "warmup='exactly' is none of auto, exact, fill, none"),
        ({"tokens": 1}, "the text has 1 tokens; at least 2"),
        ({"batch_size": 0}, "batch_size=0 and segment_length=5 must be at least 1"),
        ({"segment_length": -3}, "segment_length=-3 must be at least 1"),
    ],
)
def test_refuses(changes, message):
    settings = {"tokens": 97, "batch_size": 3, "segment_length": 5}
    settings |= {"memory_length": 7, "n_layer": 3} | changes
    with pytest.raises(UserError, match=message):
        scoring.cut_rows(settings.pop("tokens"), **settings)


def test_unigram_entropy_of_literal_tokens():
    tokens = np.array([0, 0, 1, 3], np.uint8)
    assert scoring.unigram_entropy(tokens, 5) == pytest.approx(1.5 * np.log(2))


def test_reach_is_memory_and_extended_context():
    model, _ = made("extended")
    assert scoring.reach(model) == 10
    unlimited = dataclasses.make_dataclass("M", ["memory_length"])(None)
    assert scoring.reach(unlimited) is None
