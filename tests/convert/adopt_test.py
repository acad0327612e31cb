"""python -m xlformer.convert: other programs' weights become a run that evaluates."""

import dataclasses
import json
import shutil
import subprocess
import sys
from unittest import mock

import golden_weights
import jax
import numpy as np
import pytest
import safetensors.numpy
import trained_run
from golden_weights import FOLDER
from own_trunk import Recurrent, RecurrentConfig

from xlformer import convert, evaluate, generate, models, runs
from xlformer.convert import __main__ as command_module
from xlformer.convert import adopt
from xlformer.convert.__main__ import main as command
from xlformer.data.vocabulary import ByteVocabulary, CharVocabulary, WordVocabulary
from xlformer.errors import UserError

NPZ, HF = FOLDER / "attn0_adaptive_div1.npz", FOLDER / "hf_transfo_xl_div1"
SYMBOLS = {60: [chr(0x430 + i) for i in range(60)]}  # one character each
SYMBOLS[120] = ["<eos>", *(f"w{i}" for i in range(119))]


@pytest.fixture
def vocab(tmp_path):
    def write(symbols):
        path = tmp_path / "vocab.txt"
        path.write_text("".join(f"{s}\n" for s in symbols), encoding="utf-8")
        return path

    return write


@pytest.fixture
def text(tmp_path):
    """105 tokens in the symbols of 60 characters."""
    ids = np.random.default_rng(11).integers(0, 60, 105)
    path = tmp_path / "text.txt"
    path.write_text("".join(SYMBOLS[60][i] for i in ids), encoding="utf-8")
    return path


def main(source, workdir, *flags, format="original"):
    required = [f"--source={source}", f"--format={format}", f"--workdir={workdir}"]
    return command([*required, "--config.model.scan_layers=true", *flags])


def refused(capsys, workdir, code):
    """The one line; nothing was written."""
    captured = capsys.readouterr()
    assert code == 2 and captured.err.startswith("error: "), captured
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not workdir.exists() or not any(workdir.iterdir())
    return captured.err


def scored_by_hand(model, params, vocabulary, path, segment_length):
    ids = vocabulary.encode(path.read_text(encoding="utf-8")).astype(np.int32)
    apply, state, total = jax.jit(model.apply), model.init_state(1), 0.0
    for start in range(0, len(ids) - 1, segment_length):
        part = ids[None, start : start + segment_length + 1]
        nll_BT, state, _ = apply(params, part[:, :-1], part[:, 1:], state)
        total += float(nll_BT.sum())
    return total


def test_npz_evaluates_and_generates_at_once(tmp_path, vocab, text, capsys):
    workdir = tmp_path / "run"
    flags = (f"--vocab={vocab(SYMBOLS[60])}", f"--probe={text}")
    assert main(NPZ, workdir, *flags) == 0
    captured = capsys.readouterr()
    # Which words there are is said by the weights: each word of a text is looked up.
    assert runs.read_config(workdir).data.min_count == 1
    assert captured.out.startswith("probe: ") and '"vocab_size": 60' in captured.out
    # Random weights on random characters are worse than frequencies alone.
    assert "warning: the loss" in captured.err and "vocabulary order" in captured.err
    flags = (f"--workdir={workdir}", f"--text={text}", "--warmup=exact")
    assert evaluate.main(flags) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    state, hparams = golden_weights.read(NPZ)
    config, params = convert.from_original(state, hparams)
    model = models.build(dataclasses.replace(config, scan_layers=True))
    vocabulary = CharVocabulary(SYMBOLS[60], [0] * 60)
    expected = scored_by_hand(model, params, vocabulary, text, 8)
    assert card["nats"] == pytest.approx(expected, rel=1e-5)
    assert card["segment_length"] == card["memory_length"] == 8
    assert (card["step"], card["params"], card["run"]) == (0, "raw", "converted")
    assert (
        generate.main([f"--workdir={workdir}", "--prompt=абв", "--num_tokens=3"]) == 0
    )
    assert capsys.readouterr().out.startswith("абв")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_safetensors_with_hparams_beside_or_named(tmp_path, vocab, text, dtype):
    state, hparams = golden_weights.read(NPZ)
    state = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in state.items()}
    safetensors.numpy.save_file(state, tmp_path / "w.safetensors")
    (tmp_path / "hparams.json").write_text(json.dumps(hparams))
    source, flag = tmp_path / "w.safetensors", f"--vocab={vocab(SYMBOLS[60])}"
    assert main(source, tmp_path / "run", flag) == 0
    loaded = runs.load(tmp_path / "run")
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"float32"}
    back = convert.to_original(loaded.model.config, loaded.params)
    for name, x in state.items():
        np.testing.assert_array_equal(back[name], x.astype(np.float32), err_msg=name)
    (tmp_path / "hparams.json").rename(tmp_path / "other.json")
    flags = (flag, f"--hparams={tmp_path / 'other.json'}")
    assert main(source, tmp_path / "again", *flags) == 0


def test_hugging_face_directory(tmp_path, vocab, capsys):
    workdir = tmp_path / "run"
    flags = (f"--vocab={vocab(SYMBOLS[120])}", "--config.eval.segment_length=11")
    assert main(HF, workdir, *flags, format="hf") == 0
    assert "no probe" in capsys.readouterr().out
    loaded = runs.load(workdir)
    assert loaded.model.config.attend_zero_memory and loaded.config.data.path == ""
    assert isinstance(loaded.vocabulary, WordVocabulary)
    path = tmp_path / "text.txt"
    path.write_text("w3 w5 w7\nw11 w13 w17\nw19\n")
    card = evaluate.evaluate(workdir, text=str(path))
    assert (card["words"], card["tokens_scored"], card["segment_length"]) == (10, 9, 9)
    _, params = convert.from_hf(HF)
    model = models.build(loaded.model.config)
    expected = scored_by_hand(model, params, loaded.vocabulary, path, 9)
    assert card["nats"] == pytest.approx(expected, rel=1e-5)


def test_awd_lstm_needs_no_hparams_and_takes_its_bptt_for_segments(
    tmp_path, vocab, text, capsys
):
    """Tied or not is in the arrays, and rates are only for training."""
    config = models.LSTMConfig(vocab_size=60, n_layer=2, d_model=7, d_hidden=11)
    params = trained_run.random_params(models.build(config))
    state = convert.to_awd_lstm(config, params)
    source, vocabulary = tmp_path / "w.npz", f"--vocab={vocab(SYMBOLS[60])}"
    np.savez(source, **state)
    flags = ["--format=awd_lstm", f"--source={source}", vocabulary, f"--probe={text}"]
    assert command([*flags, f"--workdir={tmp_path / 'run'}"]) == 0
    assert "probe: " in capsys.readouterr().out
    loaded = runs.load(tmp_path / "run")
    assert loaded.config.model.name == "lstm" and loaded.config.eval.batch_size > 1
    for name, x in convert.to_awd_lstm(loaded.model.config, loaded.params).items():
        np.testing.assert_array_equal(x, state[name].astype(np.float32), err_msg=name)
    (tmp_path / "hparams.json").write_text(json.dumps({"bptt": 13, "dropouth": 0.25}))
    assert command([*flags, f"--workdir={tmp_path / 'again'}"]) == 0
    written = runs.read_config(tmp_path / "again")
    assert (written.eval.segment_length, written.model.hidden_dropout) == (13, 0.25)
    capsys.readouterr()
    card = evaluate.evaluate(tmp_path / "again", text=str(text), batch_size=2)
    assert card["warmup"] == "none" and "equal number of rows" in card["note"]
    assert evaluate.main([f"--workdir={tmp_path / 'again'}", "--clamp_length=3"]) == 2
    assert "--clamp_length=3: LSTM has no clamp_length" in capsys.readouterr().err
    (tmp_path / "hparams.json").write_text(json.dumps({"bptt": "x"}))
    code = command([*flags, f"--workdir={tmp_path / 'bad'}"])
    line = "hparams: bptt='x' is no whole number"
    assert line in refused(capsys, tmp_path / "bad", code)


def test_vocabulary_files(tmp_path, vocab):
    read = adopt.read_vocabulary
    numbers = read(str(vocab([98, 10, 97])))
    assert isinstance(numbers, ByteVocabulary) and numbers.newline == "keep"
    assert numbers.encode("ab\n").tolist() == [2, 0, 1]
    dropped = read(str(vocab([98, 97])))
    assert dropped.newline == "drop" and dropped.encode("a\nb").tolist() == [1, 0]
    words = read(str(vocab(["<eos>", "the", "<unk>"])))
    assert words.encode("the x\n").tolist() == [1, 2, 0]
    chars = read(str(vocab("日é_")))
    assert isinstance(chars, CharVocabulary) and chars.encode("é日").tolist() == [1, 0]
    digits = read(str(vocab("3102")))  # of one digit each: characters
    assert isinstance(digits, CharVocabulary) and digits.encode("01").tolist() == [2, 1]
    assert isinstance(read(str(vocab("\u0663\u0661\u0660"))), CharVocabulary)
    assert read(str(vocab(["1", "<eos>", "17"]))).encode("17\n").tolist() == [2, 1]
    assert read(str(vocab(["\ufeffa", "b"]))).encode("a").tolist() == [0]
    (tmp_path / "own.json").write_text(words.to_json())
    assert read(str(tmp_path / "own.json")).symbols == words.symbols


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\n", "cannot be read"),
        (b"", "not a list of symbols"),
        (b"the\nof\n", "not a list of symbols: a symbol is not one character"),
        (b"98\n010\n97\n", "a symbol is not one character; .* byte values .0 to 255"),
        (b"98\n10\n98\n", "a symbol is not one character; .*"),
        (b"98\n256\n", "a symbol is not one character; .*"),
        (b"a\nb\na\n", "not a list of symbols: symbols are missing or repeated"),
        (b"<eos>\na b\n", "not a list of symbols: a symbol is not one word"),
    ],
)
def test_vocabulary_files_that_are_none(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        adopt.read_vocabulary(str(tmp_path / "vocab.txt"))


def test_without_a_vocabulary_the_data_must_be_named(tmp_path, text, capsys):
    workdir = tmp_path / "run"
    assert main(NPZ, workdir) == 0
    capsys.readouterr()
    assert evaluate.main([f"--workdir={workdir}", f"--text={text}"]) == 2
    assert "has no vocabulary.json" in capsys.readouterr().err
    other = tmp_path / "other"
    flags = (f"--config.data.path={text}", "--config.data.unit=chars")
    data = tmp_path / "prepared"
    code = main(NPZ, other, *flags, f"--config.data.directory={data}")
    assert code == 2 and not other.exists()
    line = capsys.readouterr().err.splitlines()[-1]  # TFDS wrote some before.
    assert line.startswith("error: the data has ") and "weights have 60" in line


def test_refusals_write_nothing(tmp_path, vocab, text, capsys):
    good, workdir = f"--vocab={vocab(SYMBOLS[60])}", tmp_path / "run"
    state, hparams = golden_weights.read(NPZ)
    bad_hparams = tmp_path / "hparams.json"
    bad_hparams.write_text(json.dumps(hparams | {"d_model": 34}))
    unknown = tmp_path / "unknown.txt"
    unknown.write_text("xyz")
    nan = tmp_path / "nan.npz"
    arrays = {f"params/{name}": np.float64(x) for name, x in state.items()}
    arrays["params/r_w_bias"][2, :2] = np.nan, 1e300
    config = np.frombuffer(json.dumps(hparams).encode(), np.uint8)
    np.savez(nan, config=config, **arrays)
    for source, flags, message in (
        (tmp_path / "no.npz", (good,), "no such file"),
        (NPZ, ("--vocab=/nowhere/vocab.txt",), "cannot be read"),
        (NPZ, ("--vocab=/nowhere/vocab.json",), "cannot read the vocabulary"),
        (NPZ, (good, "--hparams=/nowhere/h.json"), "no such file"),
        (NPZ, (good, f"--hparams={bad_hparams}"), f"error: --source={NPZ}: "),
        (NPZ, (good, f"--hparams={bad_hparams}"), "the hparams say"),
        (nan, (good,), "of trunk/u are no numbers of float32: 2 of 32"),
        (NPZ, (good, "--probe=/nowhere/text"), "cannot read the text"),
        (NPZ, (good, "--probe=/dev/stdin"), "is read twice, a pipe only once"),
        (NPZ, (good, f"--probe={tmp_path}"), "cannot read the text: Is a directory"),
        (NPZ, (good, f"--probe={unknown}"), "not in the vocabulary of 60 chars"),
        (NPZ, (f"--probe={text}",), "needs --vocab"),
        (HF, (good, "--format=hf", "--hparams=x"), "--format=hf, which has config"),
        (HF, (good, "--format=xlformer", "--hparams=x"), "which has its config"),
        (HF, (good, "--format=safetensors", "--hparams=x"), "which has config.json"),
        (NPZ, (good, "--config.model.n_layer=5"), "another shape than the weights"),
        (NPZ, (good, "--config.model.gate=gru"), "another shape than the weights"),
        (NPZ, (good, "--config.model.n_layr=5"), "did you mean 'n_layer'?"),
        (NPZ, (good, "--config.seed"), "--config.seed needs a value"),
        (NPZ, (good, "--vocabulary=x"), "did you mean '--vocab'?"),
    ):
        assert message in refused(capsys, workdir, main(source, workdir, *flags))
    short = f"--vocab={vocab(SYMBOLS[60][:59])}"
    expected = "--vocab has 59 symbols, the weights have 60"
    assert expected in refused(capsys, workdir, main(NPZ, workdir, short))
    code = main(NPZ, workdir, format="hff")
    assert "invalid choice: 'hff'" in refused(capsys, workdir, code)
    lone = shutil.copy(HF / "model.safetensors", tmp_path / "lone.safetensors")
    bad_hparams.unlink()
    code = main(lone, workdir)
    assert "carries no hparams: pass --hparams" in refused(capsys, workdir, code)


def test_workdir_must_be_new_or_empty(tmp_path, vocab, text, capsys):
    flag = f"--vocab={vocab(SYMBOLS[60])}"
    assert main(NPZ, tmp_path, flag) == 2  # It holds the vocabulary.
    assert "is not empty" in capsys.readouterr().err
    assert main(NPZ, tmp_path / "vocab.txt", flag) == 2
    assert "not a directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    # It may be a file system of its own, over which nothing can be renamed.
    number = (tmp_path / "empty").stat().st_ino
    assert main(NPZ, tmp_path / "empty", flag) == 0
    assert (tmp_path / "empty").stat().st_ino == number
    assert evaluate.evaluate(tmp_path / "empty", text=text)["tokens_scored"] == 104


@pytest.mark.parametrize("there", [True, False])
def test_a_conversion_that_ends_in_the_middle_leaves_nothing(
    there, tmp_path, vocab, capsys, monkeypatch
):
    def full(file, text):
        assert (file.parent / runs.CHECKPOINTS).is_dir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adopt.storage, "write", full)
    workdir = tmp_path / "new" / "run"
    if there:
        workdir.mkdir(parents=True)
    assert main(NPZ, workdir, f"--vocab={vocab(SYMBOLS[60])}") == 2
    line = f"error: --workdir={workdir}: cannot be written: No space left on device\n"
    assert capsys.readouterr().err == line
    assert not any(workdir.parent.iterdir()) or there and not any(workdir.iterdir())
    monkeypatch.setattr(adopt.storage.shutil, "disk_usage", lambda _: mock.Mock(free=9))
    assert main(NPZ, workdir, f"--vocab={vocab(SYMBOLS[60])}") == 2
    assert f"{workdir}: no room for the weights" in capsys.readouterr().err


def test_a_format_is_a_row_of_the_table_and_its_model_any_model(
    tmp_path, vocab, capsys, monkeypatch
):
    """With the program's own word for the length of a segment."""
    monkeypatch.setitem(models.MODELS, "recurrent", Recurrent)

    def read(state, hparams):
        assert set(state) == {"weight"} and hparams["n"] == 7
        config = RecurrentConfig(vocab_size=60, d_model=7)
        shapes = jax.eval_shape(models.build(config).init, jax.random.key(0))
        weight = state["weight"]
        params = jax.tree.map(lambda x: np.resize(weight, x.shape), shapes)
        return config, params

    format = command_module.Format(command_module._state_dict(read), "bptt", "another")
    monkeypatch.setitem(command_module.FORMATS, "own", format)
    source, hparams = tmp_path / "w.npz", tmp_path / "hparams.json"
    np.savez(source, weight=np.arange(11.0))
    hparams.write_text(json.dumps({"n": 7, "bptt": 13}))
    required = [f"--source={source}", "--format=own", f"--vocab={vocab(SYMBOLS[60])}"]
    assert command([*required, f"--workdir={tmp_path / 'run'}"]) == 0
    loaded = runs.load(tmp_path / "run")
    assert loaded.config.model.name == "recurrent" and loaded.model.width == 7
    assert loaded.config.train.segment_length == loaded.config.eval.segment_length == 13
    table = loaded.params["embedding"]["table"]
    np.testing.assert_array_equal(table, np.resize(np.arange(11.0), (60, 7)))
    hparams.write_text(json.dumps({"n": 7}))
    assert command([*required, f"--workdir={tmp_path / 'again'}"]) == 0
    assert runs.read_config(tmp_path / "again").eval.segment_length == 64
    capsys.readouterr()
    with pytest.raises(SystemExit):
        command(["--help"])
    assert "own: another" in capsys.readouterr().out


def test_runs_as_the_convert_module(tmp_path):
    found = subprocess.run(
        [sys.executable, "-m", "xlformer.convert", "--source=no.npz"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 2 and found.stderr.startswith("error: the following arg")
