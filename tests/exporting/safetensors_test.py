"""--format=safetensors: what is exported comes back bit by bit, or is refused."""

import dataclasses
import json
import pathlib

import exported_runs
import jax
import numpy as np
import pytest
import safetensors.numpy
import trained_run
from exported_runs import VOCABULARY, run_of
from golden import check

from xlformer import export, runs
from xlformer.convert import __main__ as convert
from xlformer.convert import portable
from xlformer.errors import UserError

VARIANTS = {name: (name, {}, ()) for name in exported_runs.SYSTEMS}
VARIANTS |= {
    "documents": ("transformer_xl", {}, ("data.documents=true",)),
    "adaptive": ("transformer_xl", {"cutoffs": (5, 11), "div_val": 2}, ()),
    "masked": (
        "performer",
        {"causal": False},
        ("train.objective=masked", "train.mask_rate=0.3"),
    ),
    "awd": ("lstm", {"word_dropout": 0.25}, ("train.ema_decay=0.5",)),
}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_system_comes_back_bit_by_bit(variant, tmp_path):
    name, fields, config = VARIANTS[variant]
    run = run_of(name, config=config, **fields)
    # What a rounding, or a detour over text, would lose.
    odd = np.array([-0.0, np.nan, np.inf, 1e-45, 1 + 2**-23], np.float32)
    params = jax.tree.map(lambda x: np.resize([*odd, *x.flat], x.shape), run.params)
    portable.write(dataclasses.replace(run, params=params), tmp_path)
    found = portable.read(tmp_path)
    same(found.params, params)
    assert found.model_config == run.model.config and found.step == exported_runs.STEP
    assert found.vocabulary.to_json() == VOCABULARY.to_json()
    for section in ("data", "eval"):
        assert found.config[section] == run.config[section]
    for field in ("segment_length", "objective", "mask_rate"):
        assert found.config.train[field] == run.config.train[field]
    assert (found.config.name, found.config.seed) == ("tiny", 29)


def test_the_commands_to_and_fro(base, tmp_path, capsys):
    """Of a trained run with an average: that is what is exported, as plain weights."""
    workdir, out = trained_run.trained(base), tmp_path / "weights"
    flags = [f"--workdir={workdir}", "--format=safetensors", f"--out={out}"]
    assert export.main([*flags, "--checkpoint=2"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"out": str(out), "format": "safetensors", "step": 2}
    assert {p.name for p in out.iterdir()} == {
        "model.safetensors",
        "config.json",
        "vocabulary.json",
    }
    # The library would write weights that only their owner can read.
    assert len({p.stat().st_mode for p in out.iterdir()}) == 1
    # Nothing but the weights and what they mean leaves the machine.
    for path in ("text.txt", str(tmp_path.parent), str(base)):
        assert path not in (out / "config.json").read_text()
    back = tmp_path / "run"
    flags = ["--format=safetensors", f"--source={out}", f"--workdir={back}"]
    assert convert.main([*flags, "--config.eval.batch_size=5"]) == 0
    expected, found = runs.load(workdir, checkpoint=2), runs.load(back)
    same(found.params, expected.params)
    assert (found.step, found.averaged, expected.averaged) == (2, False, True)
    assert found.model.config == expected.model.config
    assert found.config.eval.segment_length == expected.config.eval.segment_length
    assert found.config.eval.batch_size == 5
    raw = tmp_path / "raw"
    flags = [f"--workdir={workdir}", "--format=safetensors", f"--out={raw}"]
    assert export.main([*flags, "--checkpoint=2", "--params=raw"]) == 0
    same(
        portable.read(raw).params, runs.load(workdir, checkpoint=2, params="raw").params
    )


def rewrite(folder, **arrays):
    """Other arrays in model.safetensors; None leaves one out."""
    path = folder / "model.safetensors"
    found = safetensors.numpy.load_file(path) | arrays
    found = {name: x for name, x in found.items() if x is not None}
    safetensors.numpy.save_file(found, path)


def test_what_is_no_such_directory_is_refused(tmp_path):
    run = run_of("lstm")
    portable.write(run, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    config, weights, vocabulary = (
        tmp_path / name
        for name in ("config.json", "model.safetensors", "vocabulary.json")
    )
    name = "embedding/table"
    table = run.params["embedding"]["table"]

    def edit(**changes):
        config.write_text(json.dumps(json.loads(files[config]) | changes))

    for damage, line in (
        (lambda: config.unlink(), "config.json: no such file"),
        (lambda: config.write_text("{"), "config.json is not JSON"),
        (lambda: config.write_text("[]"), "holds a JSON list"),
        (lambda: edit(exported=None), "exported=None has no step"),
        (lambda: edit(exported={"step": -1}), "has no step"),
        (lambda: edit(exported={"step": True}), "has no step"),
        (lambda: edit(model={"name": "lstmm"}), "did you mean 'lstm'"),
        (
            lambda: edit(model=json.loads(files[config])["model"] | {"n_layer": 3}),
            "lacks",
        ),
        (lambda: edit(own_model="Mine"), "config.own_model='Mine'"),
        (lambda: edit(format=99), "format 99"),
        (lambda: weights.unlink(), "model.safetensors: no such file"),
        (
            lambda: weights.write_bytes(files[weights][:-3]),
            "no readable|not a readable",
        ),
        (lambda: rewrite(tmp_path, **{name: None}), f"lacks {name}"),
        (lambda: rewrite(tmp_path, other=table), "the model has no other"),
        (lambda: rewrite(tmp_path, **{name: table[1:]}), "the model has float32"),
        (lambda: rewrite(tmp_path, **{name: table.astype(int)}), "is int64"),
        (lambda: vocabulary.unlink(), "cannot read the vocabulary"),
        (lambda: vocabulary.write_text("{}"), "not a stored vocabulary"),
    ):
        damage()
        with pytest.raises(UserError, match=line):
            portable.read(tmp_path)
        for path, content in files.items():
            path.write_bytes(content)
    portable.read(tmp_path)


def test_one_line_and_nothing_half_written(base, tmp_path, capsys):
    workdir, full = trained_run.trained(base), tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("")
    file = tmp_path / "file"
    file.write_text("")
    before = sorted(tmp_path.rglob("*"))
    good = {"workdir": workdir, "format": "safetensors", "out": tmp_path / "new"}
    for changes, line in (
        ({"out": full}, f"--out={full} is not empty"),
        ({"out": file}, f"--out={file} is not a directory"),
        ({"out": file / "x"}, "is not a directory"),
        ({"out": "gs://bucket/x"}, "a local directory is needed"),
        ({"out": "/proc/x"}, "--out=/proc/x: "),
        ({"workdir": full}, "holds no run"),
        ({"checkpoint": "newest"}, "--checkpoint=newest is neither best, latest"),
        ({"params": "mean"}, "--params=mean is neither raw nor ema"),
        ({"segment_length": 3}, "--segment_length=3 is of --format=stablehlo, not of"),
        ({"format": "stablehlo", "batch_size": 0}, "--batch_size=0 must be at least 1"),
        ({"format": "stablehlo", "segment_length": 10**11}, "at most 262144"),
        ({"format": "tflite"}, "invalid choice: 'tflite'"),
        ({"wrkdir": full}, "did you mean '--workdir'?"),
    ):
        flags = [f"--{name}={value}" for name, value in (good | changes).items()]
        assert export.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        assert line in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_in_the_middle_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    def full(arrays, path, metadata):
        path.write_text("half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    out = tmp_path / "new"
    flags = [f"--workdir={trained_run.trained(base)}", "--format=safetensors"]
    assert export.main([*flags, f"--out={out}"]) == 2
    assert capsys.readouterr().err == (
        f"error: --out={out}: cannot be written: No space left on device\n"
    )
    assert not any(tmp_path.iterdir())


HF = pathlib.Path(check.__file__).parent / "hf_transfo_xl_div4"


def test_what_the_originals_load(tmp_path, capsys):
    """The files themselves are tested where they are written."""
    run, vocabulary = tmp_path / "run", tmp_path / "vocab.txt"
    size = json.loads((HF / "config.json").read_text())["vocab_size"]
    vocabulary.write_text("<eos>\n" + "".join(f"w{i}\n" for i in range(1, size)))
    flags = [f"--source={HF}", f"--workdir={run}", f"--vocab={vocabulary}"]
    assert convert.main(["--format=hf", *flags]) == 0
    out = tmp_path / "hf"
    flags = [f"--workdir={run}", f"--out={out}"]
    assert export.main([*flags, "--format=hf"]) == 0
    found = safetensors.numpy.load_file(out / "model.safetensors")
    expected = safetensors.numpy.load_file(HF / "model.safetensors")
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    capsys.readouterr()
    flags = [f"--workdir={run}", f"--out={tmp_path / 'original'}"]
    assert export.main([*flags, "--format=original"]) == 2
    # Hugging Face's memory begins as zeros that are seen, the PyTorch original's not.
    error = capsys.readouterr().err
    assert error.startswith("error: config.model.attend_zero_memory=True")
    assert not (tmp_path / "original").exists()
