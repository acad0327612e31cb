"""The evaluate command: what its card says, and that it only reads."""

import hashlib
import json
import math
import shutil

import jax
import numpy as np
import pytest
import trained_run

import xlformer
from xlformer import config as config_lib
from xlformer import evaluate, runs, sharding
from xlformer.data.vocabulary import CharVocabulary, WordVocabulary
from xlformer.errors import UserError
from xlformer.runs.checkpoints import Checkpoints
from xlformer.scoring import results, texts

# What every result must say of itself.
FIELDS = {
    "corpus", "payload_sha256", "unit", "newline", "split", "tokens_scored", "bytes",
    "words", "words_are", "bytes_scored", "words_scored", "documents", "dtype",
    "segment_length", "memory_length", "extended_length", "clamp_length", "window",
    "batch_rows", "warmup", "parameters", "params", "step", "seed", "device", "nats",
    "nats_per_token", "bpc", "ppl", "bits_per_byte", "word_ppl", "run", "workdir",
    "xlformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "python",
    "date", "seconds", "tokens_per_s",
}  # fmt: skip


@pytest.fixture(scope="session")
def workdir(base):
    """A directory of one's own, whose cards nobody else writes."""
    return trained_run.copy(base, base / "evaluated")


@pytest.fixture
def card(workdir, capsys):
    """Runs the command; returns what it printed as JSON."""

    def run(*flags, directory=workdir):
        assert evaluate.main([f"--workdir={directory}", *flags]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def files(directory):
    return {
        p.relative_to(directory): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and "evaluation" not in str(p.relative_to(directory))
    }


def test_card_says_everything_as_table_and_json(workdir, capsys):
    assert evaluate.main([f"--workdir={workdir}", "--split=test"]) == 0
    *table, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert set(found) - {"warning"} == FIELDS
    assert found["xlformer"] == xlformer.__version__  # of what ran, if not installed
    stored = (workdir / "evaluation-test.json").read_text()
    assert json.loads(stored) == found
    assert (workdir / "evaluation-test.txt").read_text() == "\n".join(table) + "\n"
    entry = json.loads((workdir / "evaluations" / "index.json").read_text())[-1]
    archived = (workdir / "evaluations" / entry["file"]).read_text()
    assert json.loads(archived) == found
    assert entry["nats_per_token"] == found["nats_per_token"]
    shown = dict(row.split(maxsplit=1) for row in table)
    assert set(shown) == FIELDS
    assert shown["split"] == "test" and shown["bpc"] == f"{found['bpc']:.4f}"


def test_numbers_by_hand(card, workdir):
    found = card("--split=test")
    run = runs.load(workdir)
    text = trained_run.TEXT * trained_run.LINES
    length = len(text) - len(text) * 95 // 100  # 90/5/5 of the characters
    split = text[-length:]
    assert found["tokens_scored"] == length - 1
    assert found["bytes"] == len(split.encode())
    assert found["words"] == len(split.split())
    payload = hashlib.sha256(text.encode()).hexdigest()
    assert found["payload_sha256"] == payload
    nats = naive_nats(run, split)
    assert found["nats"] == pytest.approx(nats, rel=1e-2)  # 3 rows, fill
    assert found["nats_per_token"] == found["nats"] / (length - 1)
    assert found["bpc"] == pytest.approx(found["nats_per_token"] / math.log(2))
    assert found["ppl"] == pytest.approx(math.exp(found["nats_per_token"]))
    # The first character is not scored, nor the word that begins with it.
    assert not split[0].isspace()
    size, words = len(split[1:].encode()), len(split.split()) - 1
    assert (found["bytes_scored"], found["words_scored"]) == (size, words)
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / math.log(2) / size)
    assert found["word_ppl"] == pytest.approx(math.exp(found["nats"] / words))
    assert found["step"] == run.step and found["params"] == "ema"
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(run.params))
    exact = card("--split=test", "--warmup=exact")
    assert exact["nats"] == pytest.approx(nats, rel=1e-5)


def naive_nats(run, text):
    ids = run.vocabulary.encode(text).astype(np.int32)
    apply, state, total = jax.jit(run.model.apply), run.model.init_state(1), 0.0
    for start in range(0, len(ids) - 1, 5):
        part = ids[None, start : start + 6]
        nll, state, _ = apply(run.params, part[:, :-1], part[:, 1:], state)
        total += float(nll.sum())
    return total


def test_list_of_memory_lengths(card, workdir):
    cards = card("--memory_length=0,3", "--same_length=false", "--clamp_length=2")
    assert [c["memory_length"] for c in cards] == [0, 3]
    assert len({c["nats"] for c in cards}) == 2
    assert {c["clamp_length"] for c in cards} == {2}
    rows = (workdir / "evaluation-validation.txt").read_text().splitlines()
    assert ["memory_length", "0", "3"] in [row.split() for row in rows]


def test_derived_window_moves_with_the_memory(card):
    """And its score is that of longer segments, unless a flag says their length."""
    options = "--memory_length=14", "--batch_size=1", "--mesh=data=1"
    found, plain = card(*options, "--same_length"), card(*options)
    assert (found["window"], plain["window"]) == (13, None)
    assert found["nats"] != plain["nats"]
    told = card(*options, "--same_length", "--segment_length=5")
    lengths = [one["segment_length"] for one in (found, plain, told)]
    assert lengths == [7, 5, 5]
    assert "than with 5" in found["segment_chosen"]
    assert "segment_chosen" not in plain and "segment_chosen" not in told
    assert found["nats"] == pytest.approx(told["nats"], rel=1e-5)


def test_lengths_of_rows_and_segments(card):
    found = card("--segment_length=11", "--batch_size=2", "--warmup=none")
    assert (found["segment_length"], found["batch_rows"]) == (11, 2)
    split = card("--batch_size=1")
    assert (split["batch_rows"], split["warmup"]) == (1, "exact")
    assert found["tokens_scored"] == 2 * ((split["tokens_scored"] + 1) // 2 - 1)


def test_checkpoints_and_averages_differ(card, workdir):
    best = Checkpoints(workdir / runs.CHECKPOINTS, read_only=True).best()
    found = {which: card(f"--checkpoint={which}") for which in ("best", "1", "2")}
    assert found["best"]["step"] == best
    assert found["1"]["nats"] != found["2"]["nats"]
    assert card("--checkpoint=latest")["nats"] == found["2"]["nats"]
    raw = card("--params=raw", "--checkpoint=2")
    assert raw["params"] == "raw" and raw["nats"] != found["2"]["nats"]


def test_following_scores_every_checkpoint_and_ends_with_the_run(workdir, capsys):
    before = files(workdir)
    assert evaluate.main([f"--workdir={workdir}", "--follow", "--batch_size=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    assert [card["step"] for card in found] == [1, 2]
    index = json.loads((workdir / "evaluations" / "index.json").read_text())[-2:]
    archived = [workdir / "evaluations" / entry["file"] for entry in index]
    assert [json.loads(path.read_text()) for path in archived] == found
    for card in found:
        alone = evaluate.evaluate(workdir, checkpoint=str(card["step"]), batch_size=2)
        assert alone["nats"] == card["nats"]
    assert files(workdir) == before


def test_following_ends_with_ctrl_c(workdir, capsys, monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.following, "follow", interrupt)
    assert evaluate.main([f"--workdir={workdir}", "--follow"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_touches_nothing_of_the_training(card, workdir):
    before = files(workdir)
    card("--split=train")
    assert files(workdir) == before


def test_text_of_ones_own(card, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("the café 17\nб в", encoding="utf-8")
    content = path.read_bytes()
    found = card(f"--text={path}")
    assert set(found) - {"warning"} == FIELDS
    assert found["split"] == "text" and found["corpus"] == str(path)
    assert found["payload_sha256"] == hashlib.sha256(content).hexdigest()
    assert (found["bytes"], found["words"]) == (len(content), 5)
    assert found["tokens_scored"] == len(content.decode()) - 1


def test_words_of_a_text_are_counted_as_in_preparation(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a\u00a0bc\nbc", encoding="utf-8")  # white space of two bytes
    words = WordVocabulary(["<eos>", "a", "bc"], [0] * 3)
    _, _, facts = texts.own_text(words, str(path))
    assert facts["words"] == 5 and facts["words_are"].endswith("<eos> of each line")
    spaced = WordVocabulary(["<eos>", "a", "b", "_"], [0] * 4, unit="chars")
    path.write_text("a b _ b\n")
    assert texts.own_text(spaced, str(path))[2]["words"] == 3
    chars = CharVocabulary("ab \n", [0] * 4)
    path.write_text("a b\nab\n")
    assert texts.own_text(chars, str(path))[2]["words"] == 3


def test_ids_of_another_order_are_translated(card, workdir, tmp_path):
    """As converted weights may have them."""
    target = shutil.copytree(workdir, tmp_path / "run")
    run = runs.load(target)
    order = np.random.default_rng(3).permutation(run.vocabulary.size)
    symbols = [run.vocabulary.symbols[i] for i in order]
    other = CharVocabulary(symbols, [0] * len(symbols))
    (target / runs.VOCABULARY).write_text(other.to_json())
    params = jax.tree.map(np.asarray, run.params)
    params["embedding"]["table"] = params["embedding"]["table"][order]
    params["softmax"]["bias"] = params["softmax"]["bias"][order]
    shutil.rmtree(target / runs.CHECKPOINTS)
    with Checkpoints(target / runs.CHECKPOINTS) as checkpoints:
        checkpoints.save(3, {"ema": params}, config=config_lib.to_dict(run.config))
    found = card("--split=test", directory=target)
    assert found["step"] == 3
    assert found["nats"] == pytest.approx(card("--split=test")["nats"], rel=1e-5)


def test_restores_on_one_device_what_eight_saved(card, workdir, tmp_path):
    target = shutil.copytree(workdir, tmp_path / "run")
    run = runs.load(target)
    shutil.rmtree(target / runs.CHECKPOINTS)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))

    def place(x):
        axes = ["data" if size == 8 else None for size in x.shape]
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    wide = {"ema": jax.tree.map(place, run.params)}
    sharded = wide["ema"]["trunk"]["layers"]["attention"]["qkv"]
    assert sharded.addressable_shards[0].data.size == sharded.size // 8
    with Checkpoints(target / runs.CHECKPOINTS) as checkpoints:
        checkpoints.save(5, wide, config=config_lib.to_dict(run.config))
    again = runs.load(target)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(again.params))
    assert card(directory=target)["nats"] == card()["nats"]


def test_warns_when_worse_than_no_context_at_all(card, workdir, monkeypatch, capsys):
    found = card()
    monkeypatch.setattr(results, "unigram_entropy", lambda *_: 1e3)
    assert "warning" not in card()
    monkeypatch.setattr(results, "unigram_entropy", lambda *_: 1e-3)
    assert evaluate.main([f"--workdir={workdir}"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("warning: the loss ")
    message = f"{found['nats_per_token']:.4f} exceeds the unigram entropy 0.0010"
    assert message in captured.err
    assert "warning" in json.loads(captured.out.splitlines()[-1])


def test_numbers_that_json_lacks_are_null(card, monkeypatch):
    found = {"split": "x", "nats": math.nan, "ppl": math.inf, "bpc": 1.5}
    monkeypatch.setattr(evaluate.Scorer, "card", lambda *_: found)
    assert card() == {"split": "x", "nats": None, "ppl": None, "bpc": 1.5}


def test_a_metric_of_single_tokens_is_one_place(workdir, monkeypatch):
    """What Tally.add collects and Tally.results names is on the card."""

    class Worst(results.Tally):
        seen = []

        def add(self, scored):
            super().add(scored)
            found = scored.index_N, scored.ids_N, scored.nll_N
            self.seen += zip(*map(np.ndarray.tolist, found), strict=True)

        def results(self, size, words):
            worst = max(self.seen, key=lambda one: one[2])
            return super().results(size, words) | {"worst": worst}

    monkeypatch.setattr(results, "Tally", Worst)
    found = evaluate.evaluate(workdir, max_tokens=31)
    text = trained_run.TEXT * trained_run.LINES
    ids = runs.load(workdir).vocabulary.encode(text[len(text) * 90 // 100 :])
    assert sorted(index for index, _, _ in Worst.seen) == [*range(1, 31)]
    assert all(ids[index] == token for index, token, _ in Worst.seen)
    nll = [nats for _, _, nats in Worst.seen]
    assert sum(nll) == pytest.approx(found["nats"]) and found["worst"][2] == max(nll)


def test_settings_by_name_or_as_one_object(workdir):
    settings = evaluate.EvalSettings(max_tokens=7, split="test")
    found = evaluate.evaluate(workdir, settings, max_tokens=31)
    assert (found["tokens_scored"], found["split"]) == (30, "test")
    with pytest.raises(UserError, match="no setting 'splt', did you mean 'split'"):
        evaluate.evaluate(workdir, splt="test")
    with pytest.raises(UserError, match="text='a' with split='test'"):
        evaluate.evaluate(workdir, text="a", split="test")
    for name, value in (("segment_length", "5"), ("batch_size", 2.5)):
        with pytest.raises(UserError, match=f"{name}={value!r} is not a whole number"):
            evaluate.EvalSettings(**{name: value})
    assert evaluate.EvalSettings(batch_size=np.int64(3)).batch_size == 3


def test_beginning_of_a_text(workdir):
    found = evaluate.evaluate(workdir, max_tokens=31)
    text = trained_run.TEXT * trained_run.LINES
    start = text[len(text) * 90 // 100 :][:31]
    assert found["tokens_scored"] == 30
    assert found["bytes_scored"] == len(start[1:].encode()) > 30
    assert found["words_scored"] == len(start.split()) - (not start[0].isspace())
    assert found["bits_per_byte"] < found["bpc"]


@pytest.mark.parametrize("sizes", ["data=4,fsdp=2", "data=2,tensor=2"])
def test_any_mesh_gives_the_same_score(card, sizes):
    found = card(f"--mesh={sizes}", "--batch_size=3")
    devices = math.prod(sharding.parse_mesh(sizes).values())
    assert found["device"].endswith(f" x{devices}")
    assert found["nats"] == pytest.approx(card("--batch_size=3")["nats"], rel=1e-5)
    assert found["batch_rows"] == 3


def test_a_mesh_that_does_not_fit_is_one_line(workdir, capsys):
    assert evaluate.main([f"--workdir={workdir}", "--mesh=data=16"]) == 2
    assert "--mesh: data=16" in capsys.readouterr().err
