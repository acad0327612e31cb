"""Sampling: what is drawn, from what, at which cost, and how it is printed."""

import dataclasses
import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trained_run
from training_runs import Bag, BagConfig

from xlformer import generate, models, sharding
from xlformer.data import documents, local
from xlformer.errors import UserError
from xlformer.generate import Sampling
from xlformer.generation import continuation, sampling

VOCAB_SIZE, MEMORY = 13, 7
PROMPTS = [[3], [1, 5, 2, 11, 7], list(np.random.default_rng(2).integers(0, 13, 83))]


@pytest.fixture(scope="module")
def made():
    """A model whose own window and extended context must not matter."""
    config = models.TransformerXLConfig(
        vocab_size=VOCAB_SIZE,
        n_layer=2,
        d_model=6,
        n_head=2,
        d_head=3,
        d_inner=11,
        memory_length=MEMORY,
        extended_length=3,
        scan_layers=True,
    )
    model = models.build(config)
    return model, trained_run.random_params(model)


def sample(made, prompts, num_tokens=19, **kwargs):
    return generate.generate(*made, prompts, num_tokens=num_tokens, **kwargs)


def main(capsys, workdir, *flags):
    """(return code, standard output, standard error)"""
    code = generate.main([f"--workdir={workdir}", *flags])
    return code, *capsys.readouterr()


class ShortBag(Bag):
    """As a model with learned positions, whose table ends."""

    longest_segment = 5

    def apply(self, params, inputs_BT, *arrays, **options):
        assert inputs_BT.shape[1] <= self.longest_segment
        return super().apply(params, inputs_BT, *arrays, **options)


def test_a_prompt_is_read_in_parts_that_the_model_takes():
    params = {**Bag(BagConfig()).init(jax.random.key(0)), "gain": jnp.ones(())}
    found, expected = (
        sample((kind(BagConfig()), params), PROMPTS, 3) for kind in (ShortBag, Bag)
    )
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5)


# Where rows lie --------------------------------------------------------------------


def test_any_mesh_draws_the_same_tokens(made):
    model, params = made
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = sharding.parameters(mesh, params, model.param_axes(params))
    expected, log_p = sample(made, PROMPTS)
    found, found_log_p = sample((model, jax.device_put(params, placed)), PROMPTS,
                                mesh=mesh)  # fmt: skip
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found_log_p, log_p, rtol=1e-5)


# What is drawn ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transformer_xl", "bag"])
def test_turns_are_one_long_text(made, kind):
    """What is read after a draw stands where one long prompt would have it."""
    if kind == "bag":
        model = Bag(BagConfig())
        made = model, {**model.init(jax.random.key(1)), "gain": jnp.float32(1)}
    greedy = {"sampling": Sampling(temperature=0)}
    text = continuation.Continuation(*made, 1, **greedy)
    path = []
    for number, part in enumerate((PROMPTS[2], PROMPTS[1], [4])):
        kept = text.draw(21)[0][0, : 5 + number].tolist() if path else []
        path += [*kept, *part]
        text.read([[*kept, *part]])
    found, log_p = text.draw(19)
    expected, expected_log_p = sample(made, [path], **greedy)
    np.testing.assert_array_equal(found, expected)
    # Other segments, other rounding: as where generating is compared with scoring.
    np.testing.assert_allclose(log_p, expected_log_p, atol=1e-4, rtol=0)


def test_a_block_that_ends_all_rows_is_the_last(made):
    blocks = []

    def on_tokens(block):
        blocks.append(block)
        return len(blocks) == 2

    tokens_RN, log_p_RN = sample(made, PROMPTS, 1000, on_tokens=on_tokens)
    assert tokens_RN.shape == log_p_RN.shape == (3, 2 * continuation.BLOCK)


def test_probabilities_that_are_not_numbers_are_said(made):
    model, params = made
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), params)
    with pytest.raises(UserError, match="NaN.*try checkpoint"):
        sample((model, broken), PROMPTS, 5)


# From what -------------------------------------------------------------------------


def test_same_seed_same_tokens(made):
    first, again = sample(made, PROMPTS, seed=5), sample(made, PROMPTS, seed=5)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    other, _ = sample(made, PROMPTS, seed=11)
    assert (other != first[0]).any(axis=1).all()


def test_equal_prompts_differ_in_their_rows(made):
    tokens_RN, _ = sample(made, [PROMPTS[1]] * 3)
    assert len({tuple(row) for row in tokens_RN.tolist()}) == 3


@pytest.mark.parametrize("segment_length", [1, 5])
def test_log_probabilities_are_those_of_scoring(made, segment_length):
    """segment_length 1, or window = memory_length: tokens see what generation shows."""
    model, params = made
    window = None if segment_length == 1 else MEMORY
    config = dataclasses.replace(model.config, extended_length=0, window=window)
    tokens_RN, log_p_RN = sample(made, PROMPTS)
    nll_BT = jax.jit(models.build(config).apply)
    for prompt, tokens, log_p in zip(PROMPTS, tokens_RN, log_p_RN, strict=True):
        path = np.array([*prompt, *tokens], np.int32)
        inputs, targets = path[:-1], path[1:]
        state, found = models.build(config).init_state(1), []
        padding = -len(inputs) % segment_length
        for x, y in zip(
            np.pad(inputs, (0, padding)).reshape(-1, 1, segment_length),
            np.pad(targets, (0, padding)).reshape(-1, 1, segment_length),
            strict=True,
        ):
            nll, state, _ = nll_BT(params, x, y, state)
            found += np.asarray(nll)[0].tolist()
        found = found[len(prompt) - 1 : len(inputs)]
        np.testing.assert_allclose(log_p, -np.array(found), atol=1e-4, rtol=0)


def test_uneven_prompts_are_each_as_alone(made):
    greedy = Sampling(temperature=0)
    together, log_p_RN = sample(made, PROMPTS, sampling=greedy)
    for row, prompt in enumerate(PROMPTS):
        alone, log_p = sample(made, [prompt], sampling=greedy)
        np.testing.assert_array_equal(together[row], alone[0])
        np.testing.assert_allclose(log_p_RN[row], log_p[0], atol=1e-5, rtol=0)
    # The first row's key is the same too.
    first_RN, alone_RN = sample(made, PROMPTS)[0], sample(made, PROMPTS[:1])[0]
    np.testing.assert_array_equal(first_RN[0], alone_RN[0])


def test_memory_reaches_back_n_layer_times_and_no_farther(made):
    greedy, prompt = Sampling(temperature=0), list(PROMPTS[2])
    _, expected = sample(made, [prompt], 1, sampling=greedy)
    for back, changes in ((MEMORY + 3, True), (2 * MEMORY + 1, False)):
        other = list(prompt)
        other[-1 - back] = (other[-1 - back] + 1) % VOCAB_SIZE
        _, found = sample(made, [other], 1, sampling=greedy)
        assert (found[0, 0] != expected[0, 0]) == changes, back


def test_cost_of_a_token_does_not_grow(made, monkeypatch):
    """Structure, not time: one program of BLOCK steps, a state of one shape."""
    mesh = sharding.make_mesh({"data": 1})
    programs = continuation.Programs(made[0].for_generation(), mesh, 1)
    monkeypatch.setattr(continuation, "programs", lambda *_: programs)
    blocks = []
    sample(made, [PROMPTS[1]], 3 * continuation.BLOCK + 1, on_tokens=blocks.append)
    assert programs.block._cache_size() == 1
    assert [b.shape[1] for b in blocks] == [continuation.BLOCK] * 3 + [1]
    sample(made, [PROMPTS[1]], 101, seed=3)
    assert programs.block._cache_size() == 1
    model = generate.for_generation(made[0])
    state = model.to_cache(made[1], model.init_state(1))
    _, after = jax.eval_shape(model.log_probs, made[1], jnp.zeros((1, 1), int), state)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, state, after)
    assert all(jax.tree.leaves(same))


def test_library_refuses(made):
    for prompts, num_tokens, message in (
        ([[3, 13]], 5, "token id out of range: 13 of 13 symbols"),
        ([[-1]], 5, "token id out of range: -1"),
        ([[]], 5, "empty"),
        ([], 5, "empty"),
        ([3, 5], 5, "prompts are rows of token ids, .* not 3"),
        (["the"], 5, "prompts are rows of token ids, .* not 'the'"),
        ([[0.5]], 5, "prompts are rows of token ids"),
        ([[3]], 0, "num_tokens=0 must be at least 1"),
        ([[3]], 1 << 31, "num_tokens=2147483648 must be at least 1 and at most"),
    ):
        with pytest.raises(UserError, match=message):
            sample(made, prompts, num_tokens)


# The command -----------------------------------------------------------------------


def test_command_continues_the_prompt(capsys, base):
    workdir, flags = trained_run.trained(base), ("--prompt=the na", "--num_tokens=23")
    code, first, _ = main(capsys, workdir, *flags)
    assert code == 0 and first.startswith("the na") and len(first) == 6 + 23 + 1
    assert main(capsys, workdir, *flags)[1] == first
    other = main(capsys, workdir, *flags, "--seed=3")[1]
    assert other != first and other.startswith("the na")
    raw = main(capsys, workdir, *flags, "--params=raw", "--checkpoint=1")[1]
    assert raw != first


def test_without_a_prompt_it_continues_the_test_split(capsys, base):
    code, out, _ = main(capsys, trained_run.trained(base), "--num_tokens=7")
    text = trained_run.TEXT * trained_run.LINES
    length = len(text) - len(text) * 95 // 100
    assert code == 0 and out.startswith(text[-length:][: generate.OPENING])
    assert len(out) == generate.OPENING + 7 + 1


def test_command_prints_every_sample_of_every_prompt(capsys, base, tmp_path):
    prompt_file = tmp_path / "prompt.txt"
    prompt_file.write_text("日本\n", encoding="utf-8")
    code, out, _ = main(
        capsys,
        trained_run.trained(base),
        "--prompt=the naïve café — déjà vu",  # longer than the memory
        "--prompt=а",
        f"--prompt_file={prompt_file}",
        "--num_samples=2",
        "--num_tokens=5",
    )
    assert code == 0
    texts = [
        part.split("\n", 1)[1] if i else part
        for i, part in enumerate(out.split("\n---")[:6])
    ]
    beginnings = ["the naïve café — déjà vu", "а", "日本\n"]
    for i, text in enumerate(texts):
        start = beginnings[i // 2]
        assert text.startswith(start) and len(text.rstrip("\n")) <= len(start) + 5
    assert len(texts) == 6 and len(set(texts)) == 6
    assert "--- 2 of 6\n" in out and "--- 6 of 6\n" in out


def test_command_ends_rows_before_stop_texts(capsys, base):
    workdir = trained_run.trained(base)
    flags = ("--prompt=the", "--num_samples=2", "--num_tokens=83")
    rows = main(capsys, workdir, *flags)[1].removesuffix("\n").split("\n--- 2 of 2\n")
    assert [row[:3] for row in rows] == ["the", "the"]
    stop = rows[0][40:42]
    code, out, _ = main(capsys, workdir, *flags, f"--stop={stop}", "--stop=~~")
    ends = [3 + row[3:].index(stop) if stop in row[3:] else None for row in rows]
    assert code == 0 and ends[0] <= 40
    cut = [row[:end] for row, end in zip(rows, ends, strict=True)]
    assert out == "\n--- 2 of 2\n".join(cut) + "\n"


def type_lines(monkeypatch, text):
    typed = io.BytesIO(text.encode(errors="surrogateescape"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, encoding="ascii"))


def test_command_talks_with_one_memory(capsys, base, monkeypatch):
    workdir, flags = trained_run.trained(base), ("--temperature=0", "--num_tokens=21")
    type_lines(monkeypatch, "\nthe na\nvu: ☃\n\udcff\n17\r\n\n")
    code, out, err = main(capsys, workdir, "--interactive", *flags)
    *answers, end = _answers(out, 21)
    assert code == 0 and end == ""
    assert "type a beginning" in err and "'☃'" in err and r"'\udcff'" in err
    path = ""
    for said, answer in zip(("the na", "17", ""), answers, strict=False):
        path += said
        expected = main(capsys, workdir, f"--prompt={path}", *flags)[1]
        assert expected == f"{path}{answer}\n"
        path += answer


def test_a_conversation_ends_with_ctrl_c(capsys, base, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    type_lines(monkeypatch, "")
    monkeypatch.setattr(sys.stdin, "readline", interrupt, raising=False)
    code, out, err = main(capsys, trained_run.trained(base), "--interactive")
    assert (code, out, err) == (0, "\n", "")


def _answers(out, size):
    """Cut by length, as the answers may have line ends of their own."""
    parts = [out[i * (size + 1) :][:size] for i in range(3)]
    return [*parts, out[3 * (size + 1) :]]


def test_command_reads_standard_input_once(capsys, base, monkeypatch):
    workdir, flags = trained_run.trained(base), ("--num_tokens=7", "--temperature=0")
    said = ["the n\u2603", "the na"]
    monkeypatch.setattr(
        local, "open_text", lambda *_: documents.of_bytes(said.pop(0).encode())
    )
    code, _, err = main(capsys, workdir, "--prompt_file=-", *flags)
    assert code == 2 and "--prompt_file=-" in err  # no such characters
    code, out, _ = main(capsys, workdir, "--prompt_file=-", *flags)
    assert code == 0 and out == main(capsys, workdir, "--prompt=the na", *flags)[1]


def test_paper_preset(capsys, base, monkeypatch):
    seen = {}

    def fake(model, params, prompts, **kwargs):
        seen.update(kwargs, lengths=[len(p) for p in prompts])
        return np.zeros((len(prompts), 1), int), None

    monkeypatch.setattr(generate, "generate", fake)
    workdir, prompt = trained_run.trained(base), "the" * 401
    main(capsys, workdir, f"--prompt={prompt}", "--preset=paper")
    assert seen["num_tokens"] == 1000 and seen["lengths"] == [512]
    assert seen["sampling"] == Sampling(top_k=40)
    main(capsys, workdir, f"--prompt={prompt}")
    assert seen["num_tokens"] == 256 and seen["lengths"] == [1203]
    assert seen["sampling"] == Sampling()
    flags = ("--preset=paper", "--top_k=3", "--num_tokens=7", "--temperature=0.5")
    main(capsys, workdir, "--prompt=the", *flags)
    assert seen["num_tokens"] == 7
    assert seen["sampling"] == Sampling(temperature=0.5, top_k=3)


def test_a_rule_of_sampling_is_a_field_and_so_a_flag(capsys, base, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class More(Sampling):
        min_p: float = sampling._rule(0.0, "at least so much of the largest (0)")

    seen = {}
    monkeypatch.setattr(sampling, "Sampling", More)
    monkeypatch.setattr(generate, "PLAIN", More())
    monkeypatch.setattr(generate, "generate", lambda *_, **kwargs: seen.update(kwargs))
    flags = ("--prompt=the", "--min_p=0.25", "--top_p=0.5")
    assert main(capsys, trained_run.trained(base), *flags)[0] == 0
    assert seen["sampling"] == More(top_p=0.5, min_p=0.25)
