"""Damaged checkpoints: refused, loudly, and the previous one used; digests."""

import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    CONFIG,
    abstract_state,
    assert_equal,
    data,
    make_state,
    save_all,
    sharded_state,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xlformer.errors import UserError
from xlformer.runs import checkpoints as checkpoints_lib
from xlformer.runs import leaves
from xlformer.runs.checkpoints import Checkpoints

pytest_plugins = ["saved_checkpoints"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("complaints_stay_here"),
]


# Damage -----------------------------------------------------------------------------


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def damages(path):
    n_bits = 8 * path.stat().st_size
    for bit in {0, n_bits // 3, n_bits // 2 + 3, n_bits - 1} if n_bits else ():
        yield f"bit {bit}", lambda p, bit=bit: flip(p, bit)
    yield "truncated", lambda p: p.write_bytes(p.read_bytes()[: n_bits // 16])
    yield "deleted", lambda p: p.unlink()


def test_damage_to_any_file_is_refused_or_harmless(copied):
    """Every file of the newest step, one at a time; the previous step is the net."""
    files = sorted(p for p in (copied / "2").rglob("*") if p.is_file())
    assert len(files) > 8
    fell_back = 0
    for file in files:
        content = file.read_bytes()
        for what, damage in damages(file):
            damage(file)
            reader = Checkpoints(copied, read_only=True)
            step, state, config = reader.restore(abstract_state())
            where = f"{file.relative_to(copied)}: {what}"
            assert config == CONFIG, where
            assert_equal(state, make_state(step))
            fell_back += step == 1
            file.write_bytes(content)
    assert fell_back > 20


@pytest.mark.parametrize("item", ["digest", "config", "state"])
def test_a_pipe_in_a_step_is_not_waited_for(item, copied):
    path = next(p for p in (copied / "2" / item).rglob("*") if p.is_file())
    path.unlink()
    os.mkfifo(path)
    reader = Checkpoints(copied, read_only=True)
    assert reader.best() == 1
    assert reader.restore(abstract_state())[0] == 1
    name = path.relative_to(copied / "2")
    with pytest.raises(UserError, match=f"step 2: {name} is a pipe or a device"):
        reader.config(2)


@pytest.mark.parametrize(
    "content",
    [
        "7",
        '{"metrics": 7}',
        "[" * 100_000,
        f'{{"commit_timestamp_nsecs": 1{"0" * 400}}}',
    ],
    ids=["7", "metrics", "deep", "late"],
)
def test_what_orbax_notes_of_a_step_is_read_by_the_writer_alone(content, copied):
    (copied / "2" / "_CHECKPOINT_METADATA").write_text(content)
    with pytest.raises(UserError, match="cannot be opened: ") as e:
        Checkpoints(copied)
    assert str(copied) in str(e.value) and "\n" not in str(e.value)
    assert Checkpoints(copied, read_only=True).restore(abstract_state())[0] == 2


def data_files(step_directory):
    found = [p for p in (step_directory / "state").rglob("d/*") if p.is_file()]
    assert found
    return found


def test_a_flipped_bit_is_reported_and_the_previous_step_used(copied, caplog):
    biggest = max(data_files(copied / "2"), key=lambda p: p.stat().st_size)
    flip(biggest, 4 * biggest.stat().st_size)
    with Checkpoints(copied) as checkpoints, caplog.at_level(logging.ERROR):
        assert checkpoints.restore(abstract_state())[0] == 1
        assert "step 2: state: params/layers/kernel does not match" in caplog.text
        assert "fell back to the checkpoint of step 1" in caplog.text
        # The damaged step is in the way of the run that goes on from step 1.
        assert checkpoints.save(2, make_state(22), config=CONFIG)
        assert_equal(checkpoints.restore(abstract_state())[1], make_state(22))


def test_steps_after_a_rewind_are_replaced(tmp_path):
    save_all(tmp_path, [10, 20, 30], keep=3)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(abstract_state(), step=10)[0] == 10
        checkpoints.save(15, make_state(15), config=CONFIG)
    assert Checkpoints(tmp_path, read_only=True).steps() == [10, 15]


def test_when_all_steps_are_damaged_each_is_named(copied):
    for step in "1", "2":
        for path in data_files(copied / step):
            path.write_bytes(b"")
    with pytest.raises(UserError) as error:
        Checkpoints(copied, read_only=True).restore(abstract_state())
    message = str(error.value)
    assert str(copied) in message and "step 1: " in message and "step 2: " in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    "intact, damaged", [('token": 1.0', 'token": 1.5'), ("{", "["), ("61]", "62]")]
)
def test_a_damaged_digest_is_damage_and_never_another_model(copied, intact, damaged):
    path = copied / "2" / "digest" / "metadata"
    text = path.read_text()
    assert intact in text
    path.write_text(text.replace(intact, damaged, 1))
    reader = Checkpoints(copied, read_only=True)
    assert reader.best() == 1  # its metric is not believed
    assert reader.restore(abstract_state())[0] == 1


def test_a_step_that_is_asked_for_has_no_substitute(copied):
    checkpoints = Checkpoints(copied, read_only=True)
    (copied / "2" / "config" / "metadata").write_text(json.dumps({"other": 1}))
    with pytest.raises(UserError, match="config does not match"):
        checkpoints.restore(abstract_state(), 2)
    with pytest.raises(
        UserError, match="no checkpoint of step 3; there are steps 1, 2"
    ):
        checkpoints.restore(abstract_state(), 3)


def test_params_only_are_verified_too(copied):
    biggest = max(data_files(copied / "2"), key=lambda p: p.stat().st_size)
    flip(biggest, 4 * biggest.stat().st_size)
    part = {"params": abstract_state().params}
    reader = Checkpoints(copied, read_only=True)
    assert "bias" in reader.restore_params(1, part)["params"]
    with pytest.raises(UserError, match="step 2: .*kernel does not match"):
        reader.restore_params(2, part)


@pytest.mark.parametrize("before", [[], [False]], ids=["the seal", "the config"])
def test_arrays_are_not_read_of_what_another_host_refuses(before, copied, monkeypatch):
    answers, read = iter([*before, True, *[False] * 3]), []
    real = checkpoints_lib.read_state

    def noted(path, *arguments, **options):
        read.append(path.name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(checkpoints_lib, "on_any_host", lambda _: next(answers))
    monkeypatch.setattr(checkpoints_lib, "read_state", noted)
    assert Checkpoints(copied, read_only=True).restore(abstract_state())[0] == 1
    assert read == ["1"]


# Digests ----


def test_digests_do_not_depend_on_the_layout_and_match_numpy():
    plain, sharded = (leaves.flatten(f(5)) for f in (make_state, sharded_state))
    kernel = sharded["params/layers/kernel"]
    assert len(kernel.addressable_shards[0].data) == 3
    assert kernel.addressable_shards[0].data.shape[1] == 2
    expected = {k: leaves.numpy_digest(np.asarray(data(x))) for k, x in plain.items()}
    expected = {k: v for k, v in expected.items() if plain[k].size}
    stored = leaves.to_disk(sharded)
    assert leaves.digests(stored) == expected
    # What an accelerator runs.
    values = leaves._stacked(list(stored.values())).tolist()
    assert values == list(expected.values())


@pytest.mark.parametrize("block", [1, 7, 1 << 16])
@pytest.mark.parametrize("split", ["", "a", "b", "c", "ab", "ac", "bc", "abc"])
def test_a_digest_is_the_sum_over_parts_whichever_axes_are_split(
    split, block, monkeypatch
):
    """Where an axis of the mesh splits none, shards have copies, which count once."""
    monkeypatch.setattr(leaves, "BLOCK", block)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    names = [name if name in split else None for name in "abc"]
    x = np.random.default_rng(5).integers(0, 1 << 32, (4, 6, 2, 3), np.uint32)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*names)))
    weight = np.arange(x.size, dtype=np.uint32) * np.uint32(leaves.GOLDEN)
    expected = int(np.sum(x.reshape(-1) * (weight | 1), dtype=np.uint32))
    assert leaves.digests({"x": sharded, "y": x}) == {"x": expected, "y": expected}


def test_a_part_beyond_the_last_place_of_32_bits_has_its_share_modulo_2_to_the_32():
    x, first = np.array([[3, 5, 7]], np.uint32), 2**32
    index = (slice(1, 2), slice(first, first + 3))
    weights = [(first + 3 + first + i) * leaves.GOLDEN % 2**32 | 1 for i in range(3)]
    expected = sum(a * b for a, b in zip([3, 5, 7], weights, strict=True)) % 2**32
    assert leaves.numpy_digest(x, index, (2, first + 3)) == expected


@pytest.mark.parametrize(
    "dtype", ["float64", "int64", "uint8", "bool", "complex64", "float16"]
)
def test_digests_notice_one_bit_in_every_dtype(dtype):
    with jax.enable_x64(True):
        x = np.asarray(jax.random.bits(jax.random.key(0), (7, 3), "uint32") % 200)
        x = (x % 2 if dtype == "bool" else x).astype(dtype)
        changed = x.copy()
        changed[4, 1] = not changed[4, 1] if dtype == "bool" else changed[4, 1] + 1
        values = [leaves.digests({"x": jnp.asarray(v)})["x"] for v in (x, changed)]
        assert values == [int(leaves.digest(jnp.asarray(v))) for v in (x, changed)]
        assert values[0] != values[1]
