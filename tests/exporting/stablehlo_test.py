"""--format=stablehlo: the programs say what the model says, where xlformer is not."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys

import exported_runs
import jax
import numpy as np
import pytest
import training_runs
from exported_runs import VOCABULARY, T, run_of
from jax import export as jax_export

from xlformer import export, runs
from xlformer.convert.adopt import adopt
from xlformer.errors import UserError
from xlformer.exporting import programs, stablehlo
from xlformer.generation.continuation import generate
from xlformer.generation.sampling import Sampling
from xlformer.models import Model

IDS = np.random.default_rng(3).integers(VOCABULARY.size, size=(2, T + 1))
B = len(IDS)


@pytest.fixture
def written(tmp_path):
    """Exports a run: (manifest, program by name, memory by name)."""

    def write(run, **options):
        said = []
        manifest = stablehlo.write(run, tmp_path, say=said.append, **options)
        assert manifest == json.loads((tmp_path / "manifest.json").read_text())

        def load(name):
            file = tmp_path / manifest["programs"][name]["file"]
            exported = jax_export.deserialize(bytearray(file.read_bytes()))
            assert exported.platforms == stablehlo.PLATFORMS
            assert not exported.disabled_safety_checks
            return jax.jit(exported.call)

        def memory(of):
            return {
                name: np.broadcast_to(
                    np.full(*x["initial"]),
                    [B if n == "b" else n for n in x["shape"]],
                )
                for name, x in manifest["memory"][of].items()
            }

        return manifest, load, memory, said

    return write


@functools.cache
def compiled(model):
    return jax.jit(model.apply)


def scored(run, ids):
    """nats of each of ids[1:], by the model itself, in segments of T."""
    model = programs.fit(run.model, None)
    state, nll, apply = model.init_state(1), [], compiled(model)
    padded, N = np.pad(ids, (0, T)), len(ids) - 1
    for at in range(0, N, T):
        inputs_BT, targets_BT = padded[None, at : at + T], padded[None, at + 1 :][:, :T]
        found_BT, state, _ = apply(
            run.params,
            inputs_BT,
            targets_BT,
            state,
            lengths_B=np.int32([min(T, N - at)]),
            step=np.int32(run.step),
        )
        nll += found_BT[0].tolist()
    return nll


# Transformer-XL is what runs in a process of its own, below.
@pytest.mark.parametrize("name", sorted({*exported_runs.SYSTEMS} - {"transformer_xl"}))
def test_the_programs_of_every_system(name, written, tmp_path):
    """For any number of rows; a token read, then asked for, is as if it was scored."""
    run = run_of(name)
    manifest, load, memory, said = written(run)
    assert said == [] and manifest["batch"] == "b" and manifest["step"] == run.step
    assert manifest["dtype"] == "float32"
    with np.load(tmp_path / "params.npz", allow_pickle=False) as file:
        params = dict(file)
    rest = np.int32([T, T - 2]), np.zeros((B, manifest["resets"]), bool)
    score = load("score")
    nll_BT, _ = score(params, memory("score"), IDS[:, :-1], IDS[:, 1:], *rest)
    for row, length in enumerate(rest[0]):
        expected = scored(run, IDS[row, : length + 1])[:length]
        np.testing.assert_allclose(nll_BT[row, :length], expected, rtol=1e-5)
    assert not np.any(nll_BT[1, -2:])
    P = manifest["prompt_length"]
    part = np.pad(IDS[:, :1], ((0, 0), (0, P - 1))), np.int32([1, 1])
    state = load("read")(params, memory("read"), *part)
    cache, step = load("start")(params, state), load("next")
    for t in range(1, 3):
        log_probs_BV, cache = step(params, cache, IDS[:, t])
        found_B = -np.asarray(log_probs_BV)[:, : VOCABULARY.size][
            range(B), IDS[:, t + 1]
        ]
        np.testing.assert_allclose(found_B, nll_BT[:, t], rtol=1e-4, atol=1e-5)


BLOCK = "import sys, runpy; sys.modules['xlformer'] = None; sys.argv.pop(0); "


def test_a_process_with_jax_alone_scores_and_writes_the_same_text(tmp_path, capsys):
    """A ring that is full, prompts of two parts, an adaptive softmax, both draws."""
    run = run_of("transformer_xl", cutoffs=(5, 11), div_val=2)
    workdir, out = tmp_path / "run", tmp_path / "out"
    options = {"vocabulary": VOCABULARY, "segment_length": T, "step": run.step}
    adopt(run.model.config, run.params, workdir, **options)
    flags = [f"--workdir={workdir}", "--format=stablehlo", f"--out={out}"]
    assert export.main(flags) == 0
    ids = np.random.default_rng(5).integers(VOCABULARY.size, size=71)
    (tmp_path / "ids").write_text(" ".join(map(str, ids)))
    calls = ["ids"], ["ids", "13", "0", "0"], ["ids", "13", "0.7", "11"]
    code = BLOCK + "".join(
        f"sys.argv[1:] = {call}; runpy.run_path(sys.argv[0], run_name='__main__'); "
        for call in calls
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(out / "run_exported.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr
    nats, greedy, drawn = found.stdout.splitlines()
    assert float(nats) == pytest.approx(sum(scored(run, ids)[: len(ids) - 1]), rel=1e-6)
    for line, sampling in ((greedy, Sampling(0.0)), (drawn, Sampling(0.7))):
        seed = 11 if sampling.temperature else 0
        tokens, _ = generate(
            run.model,
            runs.load(workdir).params,
            [ids],
            num_tokens=13,
            seed=seed,
            sampling=sampling,
            step=run.step,
        )
        assert line.split() == [str(i) for i in tokens[0]]
    assert greedy != drawn


def test_context_that_is_read_again_and_rows_of_a_fixed_number(tmp_path):
    run = run_of("transformer_xl", extended_length=3, memory_length=0)
    said = []
    manifest = stablehlo.write(run, tmp_path, batch_size=2, say=said.append)
    assert manifest["rows"] == manifest["batch"] == 2 and set(manifest["memory"]) == {
        "score"
    }
    (line,) = said
    assert line.startswith("scoring only: a memory of 0 carries nothing from token to")
    ids = np.random.default_rng(5).integers(VOCABULARY.size, size=11)
    # As evaluate cuts it: each segment with the three tokens before it.
    model, expected = programs.fit(run.model, None), 0.0
    apply = jax.jit(model.apply)
    for at in range(0, 10, T):
        start, end = max(0, at - 3), at + T
        both = ids[None, start:end], ids[None, at + 1 : end + 1]
        nll_BT, _, _ = apply(run.params, *both, model.init_state(1))
        expected += float(nll_BT.sum())
    assert exported_runs.script(tmp_path).score(ids) == pytest.approx(
        expected, rel=1e-5
    )


def test_masked_models_are_scored_only(written):
    config = ("train.objective=masked",)
    fields = {"causal": False, "mechanism": "identity"}
    manifest, _, _, said = written(run_of("performer", config=config, **fields))
    assert set(manifest["programs"]) == {"score"} and manifest["objective"] == "masked"
    assert "sees what comes after a token (causal=False)" in said[0]
    assert manifest["vocabulary"]["ids"] == VOCABULARY.size + 1


class Counting(training_runs.Bag):
    """It has to know the number of rows."""

    def apply(self, params, inputs_BT, *rest, **options):
        np.zeros(inputs_BT.shape[0])
        return super().apply(params, inputs_BT, *rest, **options)


def test_models_of_ones_own(written, tmp_path):
    own = Counting(training_runs.BagConfig(VOCABULARY.size))
    run = run_of("lstm", own=own)
    run.config.own_model = "Counting"
    manifest, load, _, said = written(run)
    assert manifest["batch"] == 1 and said[0].startswith(
        "for one row alone, JAX cannot"
    )
    assert manifest["memory"]["score"]["seen_VB"]["axes"] == ["vocab", "batch"]
    script = exported_runs.script(tmp_path)
    assert script.score(IDS[0]) == pytest.approx(sum(scored(run, IDS[0])), rel=1e-5)
    silent = type("Silent", (Counting,), {"log_probs": Model.log_probs})
    said = written(dataclasses.replace(run, model=silent(own.config)))[-1]
    assert said[-1] == "scoring only: Silent has no log_probs: it cannot generate"


def test_what_is_computed_in(written):
    """'auto' would be what the machine likes that exports."""
    manifest, *_ = written(run_of("lstm"), dtype="bfloat16")
    assert manifest["dtype"] == "bfloat16"
    dtypes = {x["dtype"] for x in manifest["memory"]["score"].values()}
    assert dtypes == {"bfloat16", "float32"}
    with pytest.raises(UserError, match="segment_length=14 is more than the 13 tokens"):
        written(run_of("vanilla"), segment_length=14)


def test_no_flatbuffers_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match=r"pip install 'xlformer\[export\]'"):
        stablehlo.write(run_of("lstm"), tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_script_is_short():
    path = pathlib.Path(stablehlo.__file__).with_name(stablehlo.SCRIPT)
    code = path.read_text().partition('"""\n\n')[2].splitlines()
    assert sum(bool(line.strip()) for line in code) <= 40
