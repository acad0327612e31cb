"""The ablation: what is read at which attention length, its tables, and the command."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import trained_run
from training_runs import bag, blanks

from xlformer import compare, models, runs
from xlformer.errors import UserError
from xlformer.instruments import ablation, ablation_tables, library_text
from xlformer.instruments import attention_lengths as lengths_lib
from xlformer.instruments.ablation_kinds import KINDS
from xlformer.instruments.attention_lengths import Reading, Scores
from xlformer.instruments.members import Member
from xlformer.scoring import evaluation, results, rows


def build(**fields):
    sizes = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_inner": 8}
    config = models.default_config("transformer_xl", **sizes, **fields)
    return models.build(config, 11)


def test_a_memory_is_read_at_any_length_in_quarters_of_a_segment():
    found = lengths_lib.at_length(build(memory_length=12), 37, segment=12)
    assert (found.model.memory_length, found.segment) == (37, 3)
    assert found.model.extended_length == 0


def test_without_a_memory_a_window_is_read_again():
    model = build(memory_length=0)
    found = lengths_lib.at_length(model, 37, segment=12)
    assert (found.model.memory_length, found.model.extended_length) == (0, 37)
    assert found.segment == 3
    # That of training is the whole window that training had.
    assert lengths_lib.trained_length(model, 12) == 9


def test_positions_that_count_in_the_segment_keep_whole_segments():
    model = build(memory_length=12, attn_type=2, allow_incoherent_positions=True)
    assert lengths_lib.at_length(model, 24, segment=12).segment == 12
    assert lengths_lib.trained_length(model, 12) == 12


def test_a_state_without_bound_and_a_short_table_have_no_such_length():
    assert lengths_lib.at_length(bag(), 8, segment=12) is None
    assert lengths_lib.trained_length(bag(), 12) is None
    sizes = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_inner": 8}
    table = models.default_config("vanilla", **sizes, context_length=12)
    vanilla = models.build(table, 11)
    assert lengths_lib.at_length(vanilla, 9, segment=12).model.extended_length == 9
    assert lengths_lib.at_length(vanilla, 10, segment=12) is None


@pytest.mark.parametrize(("warmup", "T"), [("exact", 5), ("none", 7)])
def test_losses_are_counted_at_their_place_in_the_segment(warmup, T):
    """Against a loop over what each step of the plan scores."""
    plan = rows.cut_rows(
        97, batch_size=3, segment_length=T, memory_length=T, n_layer=2, warmup=warmup
    )
    found, expected = results.ByPlace(plan), np.zeros(T)
    for step in range(plan.steps):
        index_BT, scored_BT = rows.targets_at(plan, step)
        nll_BT = np.sqrt(np.arange(3 * T).reshape(3, T) + 17 * step)
        # The place of the target is that of its input, plus one.
        ids = np.zeros(scored_BT.sum(), int)
        scored = results.Scored(index_BT[scored_BT] + 1, ids, nll_BT[scored_BT])
        found.add(scored)
        expected += np.where(scored_BT, nll_BT, 0).sum(0)
    np.testing.assert_allclose(found.nats_T, expected, rtol=1e-12)
    assert found.targets_T.sum() == found.targets == plan.targets


def test_the_best_is_the_shortest_length_that_is_as_good():
    by_length = {8: [2.0, 2.2], 16: [1.9, 2.1], 32: [1.8994, 2.1], 64: [1.99, 2.1]}
    assert lengths_lib.best(by_length) == (16, pytest.approx(2.0))
    assert lengths_lib.spread([1.0, 2.0, 4.5]) == pytest.approx(np.sqrt(3.25))
    assert lengths_lib.spread([1.0]) is None


def test_what_the_memory_gains_is_a_difference_by_place():
    def scores(*nats):
        return Scores([1.0], [list(nats), list(nats)], {}, 4)

    log2 = np.log(2)
    found = {KINDS[0]: scores(log2, 0.0), KINDS[4]: scores(3 * log2, log2 / 2)}
    assert ablation_tables.memory_gain(found) == pytest.approx([2.0, 0.5])
    assert ablation_tables.memory_gain({KINDS[0]: scores(1.0)}) is None
    # Of others nothing is mixed in.
    more = found | {kind: scores(9.0, 9.0) for kind in (KINDS[1], KINDS[3], KINDS[5])}
    assert ablation_tables.memory_gain(more) == pytest.approx([2.0, 0.5])


def test_every_kind_is_a_model_of_its_own(tmp_path):
    made = [build(**kind.model(16)) for kind in KINDS]
    assert len({kind.folder for kind in KINDS}) == len(KINDS)
    for kind, model in zip(KINDS, made, strict=True):
        assert model.memory_length == (16 if kind.memory else 0)
        absolute = kind.positions in ("Vaswani", "Al-Rfou")
        assert model.positions_from_end == absolute
        config = ablation._config(kind, ablation.TINY, tmp_path / "x", 3)
        assert (config.seed, config.train.half_loss) == (3, kind.half)
    # The paper's argument needs the one that its table leaves out.
    assert any(k.positions == "Vaswani" and k.memory for k in KINDS)


def test_shuffled_lines_are_the_same_lines():
    """Empty ones too, and what only looks like an end of one: bits per byte compare."""
    text = "".join(f"line {i}\x0c\u2028\n\n" for i in range(50)) + "cut"
    found = library_text.shuffled(text)
    assert sorted(found.split("\n")) == sorted(text.split("\n")) and found != text
    assert len(found) == len(text) and found == library_text.shuffled(text)


def test_the_head_of_the_library_is_what_stdlib_trains_on():
    found = library_text.head(1000)
    assert len(found.encode()) == 1000 and "\n" in found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command's folder, and what it has written."""
    out = tmp_path_factory.mktemp("ablation")
    assert compare.main(["ablation:tiny", f"--out={out}"]) == 0
    return out, json.loads((out / "ablation.json").read_text())


def test_two_kinds_are_trained_and_read(tiny):
    out, found = tiny
    table, gains = found["tables"]
    assert [row[:3] for row in table["rows"]] == [
        ["relative", "yes", "full"],
        ["relative", "no", "full"],
    ]
    members = found["members"]
    assert [list(m["by_attention_length"]) for m in members] == [["8"], ["6", "8"]]
    for row, member in zip(table["rows"], members, strict=True):
        first = str(member["trained_attention_length"])
        values = member["by_attention_length"][first]
        assert len(values) == len(member["runs"]) == found["seeds"] == 2
        assert row[3] == pytest.approx(np.mean(values))
        assert row[4] == pytest.approx(np.std(values, ddof=1)) and row[4] > 0
        assert len(member["nats_by_place"][0]) == found["segment_length"]
    assert [row[0] for row in gains["rows"]] == ["1-2", "3-4", "5-6", "7-8", "all"]
    assert "<svg" in (out / "ablation.svg").read_text()


def test_given_runs_are_read_at_lengths_of_their_own(base, tmp_path):
    """A length is that memory, in segments of a quarter: the card of `evaluate`."""
    workdir = trained_run.trained(base)
    argv = ["ablation", f"--workdir={workdir}", "--lengths=7", f"--out={tmp_path}"]
    assert compare.main(argv) == 0
    found = json.loads((tmp_path / "ablation.json").read_text())
    (row,) = found["tables"][0]["rows"]
    (member,) = found["members"]
    # 7 is the run's own memory, which is read whatever is asked for.
    assert list(member["by_attention_length"]) == ["7"]
    assert row[:2] == ["tiny", "transformer_xl"] and row[3] == 7
    # What stands beside each other is of the same tokens: both of the shorter text.
    at_7 = member["by_attention_length"]["7"]
    assert row[4:] == [*at_7, *at_7, 7, *member["as_trained"]]
    card = evaluation.evaluate(
        workdir, memory_length=7, segment_length=1, warmup="exact", batch_size=16
    )
    expected = pytest.approx(card["bpc"], rel=1e-5)
    assert member["by_attention_length"]["7"] == [expected]
    assert member["text"]["tokens_read"] == card["tokens_scored"] + 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ablation:tiny", "--lengths=8,999"], "--lengths=8,999: 999 is not shorter"),
        (["ablation:tiny", "--lengths=0"], "--lengths: '0' is no whole number"),
        (["ablation:tiny", "--lengths=a"], "--lengths: 'a' is no whole number"),
        (["ablation:tiny", "--steps=0"], "--steps: '0' is no whole number"),
        (["ablation:tiny", "--seeds=1"], "--seeds=1 shows no spread"),
        (["ablation", "--workdir=/dev/null/x"], "holds no run"),
        (
            ["ablation", "--workdir={run}", "--steps=3"],
            "--steps=3 with --workdir: what",
        ),
        (
            ["ablation", "--workdir={run}", "--seeds=3"],
            "--seeds=3 with --workdir: runs",
        ),
    ],
)
def test_bad_input_is_one_line(base, tmp_path, capsys, argv, message):
    out = tmp_path / "out"
    argv = [item.format(run=trained_run.trained(base)) for item in argv]
    assert compare.main([*argv, f"--out={out}"]) == 2
    stdout, err = capsys.readouterr()
    assert (stdout, err.count("\n")) == ("", 1) and message in err
    assert not (out / "runs").exists()


def test_a_model_that_looks_ahead_is_refused(base):
    run = runs.load(trained_run.trained(base))
    ahead = dataclasses.replace(run, model=blanks(11))
    with pytest.raises(UserError, match="sees what comes after a token"):
        lengths_lib.check(Member("x", ahead))


def test_a_memory_that_cannot_be_changed_is_refused(base):
    class Fixed(type(bag())):
        memory_length = 5

    run = runs.load(trained_run.trained(base))
    fixed = dataclasses.replace(run, model=Fixed(bag().config))
    with pytest.raises(UserError, match="memory_length=1: Fixed has no memory_length"):
        lengths_lib.check(Member("x", fixed))


def test_a_text_shorter_than_a_segment_is_refused():
    with pytest.raises(UserError, match="12 tokens are longer than the text, of 12"):
        lengths_lib.Reader(Reading(bag(), 12), np.zeros(12, np.uint8))


def test_lengths_are_numbers():
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        ablation._lengths("3,")
