"""Tasks: what they ask, how a set is taught, what a call finds and finds again."""

import json

import jax
import numpy as np
import pytest
from training_runs import bag, blanks, refusal

from xlformer import compare
from xlformer.instruments import fitting, learnt, lessons, sequences, tasks
from xlformer.instruments.instrument import Request
from xlformer.models import VanillaConfig, VanillaTransformer


def test_digits_are_copied_reversed_and_added():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7):
        question, answer = sequences.copy(rng, n)
        assert question == [*answer[:-1], sequences.EQUALS] and len(question) == n + 1
        question, answer = sequences.reverse(rng, n)
        assert question[:-1] == answer[-2::-1] and answer[-1] == sequences.END
        question, answer = sequences.addition(rng, n)
        assert question[n] == sequences.PLUS and question[-1] == sequences.EQUALS
        first, second = question[:n], question[n + 1 : -1]
        assert number(answer[:-1]) == number(first) + number(second)
        assert len(answer) == n + 2 and answer[-1] == sequences.END


def number(digits):
    """Of digits of which the least significant comes first."""
    return int("".join(map(str, digits[::-1])))


def parsed(words):
    """(front, subject, modifiers): the numbers of their nouns, by the grammar."""
    words = list(words)

    def number(base, many):
        index = words.pop(0) - base
        assert 0 <= index < 2 * many
        return index // many

    def preposition():
        return 0 <= words[0] - sequences.PREPOSITION < sequences.PREPOSITIONS

    def noun():
        assert words.pop(0) == sequences.THE
        return number(sequences.NOUN, sequences.NOUNS)

    front, modifiers = None, []
    if preposition():
        words.pop(0)
        front = noun()
        assert words.pop(0) == sequences.COMMA
    subject = noun()
    while words[0] != sequences.EQUALS:
        clause = not preposition()
        assert words.pop(0) == sequences.THAT or not clause
        modifiers.append(noun())
        # A verb inside agrees with its own subject.
        if clause:
            assert number(sequences.VERB, sequences.VERBS) == modifiers[-1]
    return front, subject, modifiers


@pytest.mark.parametrize("attractors", [0, 1, 5])
def test_the_number_of_the_verb_is_the_subjects(attractors):
    rng, fronts, last, more = np.random.default_rng(1), [], [], []
    for _ in range(300):
        question, (answer,) = sequences.agreement(rng, attractors)
        assert len(question) < sequences.TASKS["agreement"].longest(attractors)
        front, subject, modifiers = parsed(question)
        assert answer == (sequences.SINGULAR, sequences.PLURAL)[subject]
        assert modifiers.count(1 - subject) == attractors
        fronts += [] if front is None else [front == subject]
        last += [modifiers[-1] == subject] if modifiers else []
        more += [2 * modifiers.count(1 - subject) > len(modifiers) + 1]
    # No noun gives the answer away by its place.
    assert 0.3 < np.mean(fronts) < 0.7
    assert attractors == 0 or 0.05 < np.mean(last) < 0.6
    # Nor do all of them by their number, but where they are many.
    assert attractors == 5 or not np.mean(more) == 1


def test_a_row_holds_its_sequence_where_it_begins():
    pairs = [([1, 2, 3], [7, 8]), ([4], [5, 6, 9])]
    batch, weights_BT = sequences.rows(pairs, 7, [0, 2])
    N = sequences.NOTHING
    assert batch["inputs_BT"].tolist() == [[1, 2, 3, 7, 8, N, N], [N, N, 4, 5, 6, 9, N]]
    assert batch["lengths_B"].tolist() == [4, 5] and "resets_BT" not in batch
    rows = zip(batch["targets_BT"], weights_BT, strict=True)
    scored = [targets_T[w_T > 0].tolist() for targets_T, w_T in rows]
    assert scored == [[7, 8], [5, 6, 9]]
    assert sequences.rows(pairs, 5)[0]["inputs_BT"][1].tolist() == [4, 5, 6, 9, N]


def test_a_sequence_is_right_where_all_of_it_is(monkeypatch):
    weights_BT = np.array([[0, 1, 1, 0], [0, 1, 1, 0]])
    right_BT = np.array([[False, True, True, False], [True, True, False, True]])
    monkeypatch.setattr(fitting, "right", lambda *_: right_BT)
    assert fitting.accuracies(None, None, None, weights_BT) == (0.75, 0.5)


def test_what_is_no_number_is_never_right():
    """Its argmax is 0, a digit."""
    model = bag(vocab_size=sequences.SYMBOLS)
    batch, weights_BT = sequences.rows([([0, sequences.EQUALS], [0, 0])], 5)
    params = jax.tree.map(
        lambda x: np.full_like(x, np.nan), model.init(jax.random.key(0))
    )
    assert fitting.accuracies(model, params, batch, weights_BT) == (0.0, 0.0)


def test_a_set_is_taught_in_epochs_and_now_and_then_anywhere():
    settings = lessons.Settings(batch_size=12, every=3)
    pairs = [([n], [n, 10 + n]) for n in range(4)]
    stream = lessons.batches(pairs, "copy", settings, np.random.default_rng(0))
    short, long = settings.room(sequences.TASKS["copy"]), settings.longest()
    # 5 digits twice, a mark and the end, without the last; 50 digits are added.
    assert (short, long) == (11, 153)
    found = [next(stream) for _ in range(30)]
    for number, (batch, weights_BT) in enumerate(found, 1):
        rows, room = batch["inputs_BT"].shape
        assert (rows, room) == ((1, long) if number % 3 == 0 else (12, short))
        assert (weights_BT.sum(1) == 2).all()
    first = [x for batch, _ in found[:2] for x in batch["inputs_BT"][:, 0].tolist()]
    assert all(sorted(first[i : i + 4]) == [0, 1, 2, 3] for i in range(0, 24, 4))
    places = [weights_BT.argmax() for batch, weights_BT in found[2::3]]
    assert max(places) > 100 and len(set(places)) > 5


def test_sets_of_a_seed_have_the_difficulties_of_the_training():
    settings = lessons.Settings(sets=(20, 2000))
    pairs = lessons.taught("agreement", 0, settings)
    found = np.array([parsed(question)[1:] for question, _ in pairs], object)
    attractors = [others.count(1 - subject) for subject, others in found]
    shares = np.bincount(attractors) / len(pairs)
    np.testing.assert_allclose(shares, np.array([1, 0.3, 0.09]) / 1.39, atol=0.03)
    copied = lessons.taught("copy", 0, settings)
    digits = [len(answer) - 1 for _, answer in copied]
    np.testing.assert_allclose(np.bincount(digits)[1:] / 2000, 0.2, atol=0.03)
    assert lessons.taught("copy", 1, settings)[:3] != copied[:3]


def test_what_is_asked_was_not_seen():
    settings = lessons.Settings(asked=(("digits", (1, 2)),), questions=20)
    seen = [([a, b, sequences.EQUALS], []) for a in range(10) for b in range(9)]
    one, two = lessons.asked("copy", 3, settings, seen)
    assert {len(question) for question, _ in one} == {2}
    # Only the numbers that end in 9 are left.
    assert {question[1] for question, _ in two} == {9}


def test_a_table_says_how_far_the_seeds_are_apart():
    settings = {"task": "copy", "member": "m", "set": 5, "hardest": 2, "asked": [2, 4]}
    found = [
        {
            "settings": {**settings, "seed": seed},
            "parameters": 1000,
            "by_difficulty": [
                {"characters": x, "sequences": y, "steps": None}
                for x, y in ((1.0, 1.0), (0.5, 0.2 * seed))
            ],
        }
        for seed in (0, 1)
    ]
    by_difficulty, by_set = learnt.result(found).tables
    assert by_difficulty.columns == ("model", "parameters", "2*", "4")
    (row,) = by_difficulty.rows
    assert row == ("m", "1,000", "100±0", "50±0/10±14")
    assert by_set.rows == [("copy", "m", "100±0")]
    # Of one seed nobody knows it.
    one = learnt.result(found[1:])
    assert one.tables[0].rows == [("m", "1,000", "100", "50/20")]
    assert "±" not in one.notes[0] and "one seed, which shows no spread" in one.notes[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("tasks")
    assert compare.main(["tasks:tiny", f"--out={out}"]) == 0
    return out


def test_each_run_is_kept_with_its_settings_and_found_again(found, capsys):
    runs = sorted((found / "runs/tiny").glob("*.json"))
    assert len(runs) == 8  # 2 models, 2 sets, 2 seeds
    report = json.loads((found / "tasks.json").read_text())
    assert report["runs"][0] == json.loads(
        (found / "runs/tiny/copy-universal_ACT-30-0.json").read_text()
    )
    steps = [level["steps"] for level in report["runs"][0]["by_difficulty"]]
    assert all(1 <= n <= 2 for n in steps)
    assert "<svg" in (found / "tasks.svg").read_text()
    # One number is changed by hand, and one run's settings are of another program.
    kept = json.loads(runs[0].read_text())
    runs[0].write_text(json.dumps({**kept, "loss": 77.0}))
    other = json.loads(runs[1].read_text())
    settings = {**other["settings"], "steps": 999}
    runs[1].write_text(json.dumps({**other, "settings": settings}))
    capsys.readouterr()
    assert compare.main(["tasks:tiny", f"--out={found}"]) == 0
    assert capsys.readouterr().err.count("\n") == 1
    assert json.loads(runs[0].read_text())["loss"] == 77.0
    again = json.loads(runs[1].read_text())
    assert {**again, "seconds": 0} == {**other, "seconds": 0}


def test_members_are_about_equally_large():
    counts = []
    for model, _ in tasks._members(lessons.Settings(), "small").values():
        shapes = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        counts.append(sum(np.prod(x.shape) for x in shapes))
    assert max(counts) < 1.1 * min(counts)


def test_a_model_of_ones_own_is_asked_and_what_it_cannot_is_said_first(tmp_path):
    request = Request("tiny", tmp_path, seeds=2)
    result = tasks.measure(request, own={"bag": bag(vocab_size=sequences.SYMBOLS)})
    (row,) = result.tables[0].rows
    assert row[:2] == ("bag", f"{sequences.SYMBOLS**2 + 1:,}")
    assert len(result.facts["runs"]) == 4
    for model, line in (
        (bag(vocab_size=5), "bag knows 5 ids, the tasks have"),
        (blanks(sequences.SYMBOLS), "bag sees what comes after a token"),
        (VanillaTransformer(VanillaConfig(sequences.SYMBOLS, 1, 8, context_length=9)),
         "bag: a segment of 23 tokens, but config.model.context_length=9"),
    ):  # fmt: skip
        assert line in refusal(tasks.measure, request, own={"bag": model})


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--task=cpoy"], "no task 'cpoy', did you mean 'copy'?"),
        (["--task=copy", "--task=copy"], "--task=copy is given twice"),
        (["--task=copy", "--task=copy", "--task=reverse"], "--task=copy is given"),
        (["--steps=0"], "--steps=0 must be at least 1"),
        (["--seeds=1"], "--seeds=1 shows no spread"),
        (["--workdir=x"], "unknown argument --workdir: tasks measures no runs"),
    ],
)
def test_bad_input_is_one_line(flags, line, tmp_path, capsys):
    assert compare.main(["tasks:tiny", f"--out={tmp_path / 'out'}", *flags]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and line in err
