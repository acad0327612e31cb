"""Checkpoints: what is kept, where it can be restored, and a full disk."""

import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_states import (
    CONFIG,
    abstract_state,
    assert_equal,
    make_state,
    on_mesh,
    save_all,
    sharded_state,
)
from quick import xla_flags

from xlformer.errors import UserError
from xlformer.runs import integrity
from xlformer.runs.checkpoints import Checkpoints

pytest_plugins = ["saved_checkpoints"]

# Saving and keeping -----------------------------------------------------------------


def test_a_state_comes_back_as_it_was(copied):
    with Checkpoints(copied) as checkpoints:
        step, state, config = checkpoints.restore(abstract_state())
    assert (step, config) == (2, CONFIG)
    assert_equal(state, make_state(2))


def test_the_latest_and_the_best_are_kept(tmp_path):
    metrics = {1: 3.0, 2: 1.5, 3: 1.0, 4: 1.2, 5: None, 6: float("nan"), 7: 2.0}
    save_all(tmp_path / "c", metrics, metrics, keep=2)
    for read_only in (False, True):
        with Checkpoints(tmp_path / "c", keep=2, read_only=read_only) as checkpoints:
            assert checkpoints.steps() == [3, 6, 7]
            assert checkpoints.latest() == 7
            assert checkpoints.best() == 3
    # The best is known to a process that did not save it, and survives more saves.
    save_all(tmp_path / "c", [8, 9], {9: 1.1}, keep=2)
    assert Checkpoints(tmp_path / "c", read_only=True).steps() == [3, 8, 9]


def test_without_metrics_only_the_latest_are_kept(tmp_path):
    save_all(tmp_path, [1, 2, 3], keep=1)
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert (checkpoints.steps(), checkpoints.best()) == ([3], None)


def test_the_step_saved_or_restored_last_is_not_saved_again(copied):
    with Checkpoints(copied) as checkpoints:
        checkpoints.restore(abstract_state())
        assert not checkpoints.save(2, make_state(99), config=CONFIG)
        assert checkpoints.save(3, make_state(3), config=CONFIG)
        assert not checkpoints.save(3, make_state(99), config=CONFIG)
        assert_equal(checkpoints.restore(abstract_state())[1], make_state(3))


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    overwrite = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
    )
    shape = (4_000_000,)
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        for step in range(1, 4):
            state = {"x": jnp.full(shape, step, jnp.float32).block_until_ready()}
            checkpoints.save(step, state, config=CONFIG)
            for _ in range(3):
                state = overwrite(state)
            jax.block_until_ready(state)
        abstract = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
        for step in range(1, 4):
            state = checkpoints.restore(abstract, step)[1]
            assert (np.asarray(state["x"]) == step).all()


def test_leftovers_of_a_killed_writer_are_removed_by_the_next_writer_only(copied):
    leftover = copied / "9.orbax-checkpoint-tmp" / "state"
    leftover.mkdir(parents=True)
    reader = Checkpoints(copied, read_only=True)
    assert reader.steps() == [1, 2] and leftover.exists()
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, make_state(3), config=CONFIG)
    assert not leftover.exists()
    assert reader.latest() == 3


# Refused steps ----------------------------------------------------------------------


def empty_config(directory, step):
    path = directory / str(step) / "config" / "metadata"
    path.write_bytes(b"")
    return path


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_a_refused_step_is_set_aside_once_an_older_one_is_restored(copied, caplog):
    empty_config(copied, 2)
    reader = Checkpoints(copied, read_only=True)
    assert reader.restore(abstract_state())[0] == 1
    assert names(copied) == ["1", "2"]
    for other in ("2.corrupt", "2.corrupt1"):
        with Checkpoints(copied) as checkpoints:
            assert checkpoints.restore(abstract_state())[0] == 1
            assert f"step 2 is set aside: {copied / other}" in caplog.text
            assert checkpoints.steps() == [1] and "2" not in names(copied)
            checkpoints.save(2, make_state(22), config=CONFIG)
        assert_equal(reader.restore(abstract_state())[1], make_state(22))
        empty_config(copied, 2)
    assert names(copied) == ["1", "2", "2.corrupt", "2.corrupt1"]
    assert (copied / "2.corrupt" / "config" / "metadata").read_bytes() == b""


def test_where_nothing_is_intact_nothing_is_set_aside(copied):
    for step in (1, 2):
        empty_config(copied, step)
    with Checkpoints(copied) as checkpoints:
        with pytest.raises(UserError, match="no intact checkpoint"):
            checkpoints.restore(abstract_state())
        with pytest.raises(UserError, match="no intact checkpoint"):
            checkpoints.restore(abstract_state(), 2)
    assert names(copied) == ["1", "2"]


def test_a_refused_step_that_cannot_be_renamed_is_replaced(copied, caplog, monkeypatch):
    def rename(path, target):
        raise PermissionError(13, "Permission denied", str(path))

    empty_config(copied, 2)
    with Checkpoints(copied) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints.directory), "rename", rename)
            assert checkpoints.restore(abstract_state())[0] == 1
        assert "step 2 stays: PermissionError: " in caplog.text
        checkpoints.save(2, make_state(22), config=CONFIG)
        assert_equal(checkpoints.restore(abstract_state())[1], make_state(22))
    assert names(copied) == ["1", "2"]


# Other shapes, other devices, other directories --------------------------------------


def test_another_model_is_an_error_and_no_damage(copied, caplog):
    other = abstract_state()
    other.params["layers"]["kernel"] = jax.ShapeDtypeStruct((3, 8, 7), jnp.float32)
    with pytest.raises(UserError) as error:
        Checkpoints(copied, read_only=True).restore(other)
    message = str(error.value)
    assert "params/layers/kernel" in message
    assert "float32[3,8,61]" in message and "float32[3,8,7]" in message
    assert not caplog.records

    other = abstract_state()
    other.params["new"] = jax.ShapeDtypeStruct((3,), jnp.float32)
    with pytest.raises(UserError, match="params/new as nothing"):
        Checkpoints(copied, read_only=True).restore(other)

    other = abstract_state()._replace(opt_state=(None, (), ()))  # adam, and then sgd
    with pytest.raises(UserError, match="has opt_state/1/mu .1 in all."):
        Checkpoints(copied, read_only=True).restore(other)

    other = abstract_state()  # a cast would be silent
    other.params["bias"] = jax.ShapeDtypeStruct((8,), jnp.float32)
    with pytest.raises(UserError, match=r"bfloat16\[8\]"):
        Checkpoints(copied, read_only=True).restore(other)


def test_no_directory_an_empty_and_a_foreign_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign" / "photos").mkdir(parents=True)
    (tmp_path / "foreign" / "5.txt").write_text("x")
    for name in "missing", "empty", "foreign":
        reader = Checkpoints(tmp_path / name, read_only=True)
        assert (reader.steps(), reader.latest(), reader.best()) == ([], None, None)
        for call in (
            lambda r=reader: r.restore(abstract_state()),
            lambda r=reader: r.restore_params(None, {}),
            lambda r=reader: r.config(),
        ):
            with pytest.raises(UserError, match=f"{name}: there is no checkpoint"):
                call()
    assert not (tmp_path / "missing").exists()
    (tmp_path / "foreign" / "7").mkdir()  # looks like a step, holds nothing
    with pytest.raises(UserError, match="step 7"):
        Checkpoints(tmp_path / "foreign", read_only=True).restore(abstract_state())


ELSEWHERE = """
    import numpy as np, jax, sys
    from xlformer.runs.checkpoints import Checkpoints
    assert jax.device_count() == 1
    reader = Checkpoints(sys.argv[1], read_only=True)
    params = {
        "layers": {"kernel": jax.ShapeDtypeStruct((3, 8, 61), "float32")},
        "bias": jax.ShapeDtypeStruct((8,), "bfloat16"),
    }
    found = reader.restore_params(None, {"params": params})["params"]
    assert isinstance(found["bias"], np.ndarray)
    print(float(np.sum(found["layers"]["kernel"], dtype=np.float64)))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params["bias"] = jax.ShapeDtypeStruct((8,), "bfloat16", sharding=one)
    found = reader.restore_params(None, {"params": {"bias": params["bias"]}})
    print(float(found["params"]["bias"].astype("float32").sum()))
    print(reader.config()["name"])
"""


def run_python(program, *args):
    env = os.environ | {"XLA_FLAGS": xla_flags(devices=1)}
    root = pathlib.Path(__file__).parents[2]
    return subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            textwrap.dedent(program),
            *map(str, args),
        ],
        env=env | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_eight_devices_save_and_one_that_saw_nothing_else_reads_params(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, sharded_state(4), config=CONFIG)
    result = run_python(ELSEWHERE, tmp_path)
    assert result.returncode == 0, result.stderr
    kernel_sum, bias_sum, name = result.stdout.split()
    expected = make_state(4).params
    kernel = np.asarray(expected["layers"]["kernel"])
    assert float(kernel_sum) == kernel.sum(dtype=np.float64)
    assert float(bias_sum) == sum(range(8)) + 8 * 4 and name == CONFIG["name"]


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (2, 4)])
def test_another_mesh_reads_the_whole_state(tmp_path, shape):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, sharded_state(6), config=CONFIG)
    wanted = on_mesh(abstract_state(), shape, ("data", "fsdp"))
    _, state, _ = Checkpoints(tmp_path, read_only=True).restore(wanted)
    assert_equal(state, make_state(6))
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(like.sharding, x.ndim)


DISK_FULL = """
    import resource, signal, sys
    import jax
    from xlformer.errors import UserError
    from xlformer.runs.checkpoints import Checkpoints
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes fail instead, with EFBIG
    state = lambda i: {"x": jax.random.normal(jax.random.key(i), (300_000,))}
    checkpoints = Checkpoints(sys.argv[1], keep=1)
    checkpoints.save(1, state(1), config={})
    checkpoints.wait()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    for finish in (checkpoints.wait, lambda: checkpoints.save(3, state(3), config={})):
        try:
            checkpoints.save(2, state(2), config={})
            finish()
            print("no error")
        except UserError as error:
            print(error)
        print(checkpoints.steps())
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    abstract = jax.eval_shape(lambda: state(0))
    step, found, _ = checkpoints.restore(abstract)
    assert step == 1 and (found["x"] == state(1)["x"]).all()
    checkpoints.save(2, state(2), config={})
    checkpoints.close()
    print(checkpoints.restore(abstract)[0], checkpoints.steps())
"""


def test_a_full_disk_is_an_error_and_costs_no_earlier_checkpoint(tmp_path):
    result = run_python(DISK_FULL, tmp_path)
    assert result.returncode == 0, result.stderr
    first, left, second, left_again, end = result.stdout.splitlines()
    for line in first, second:
        assert str(tmp_path) in line and "the latest checkpoint is step 1" in line
    assert left == left_again == "[1]"
    assert end == "2 [2]"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2"]


# What is compared, and what other releases and machines wrote -----------------------


def test_best_is_among_those_that_were_measured_alike(tmp_path):
    def save(checkpoints, step, metric, **settings):
        config = {**CONFIG, "eval": settings}
        checkpoints.save(step, make_state(step), config=config, metric=metric)

    with Checkpoints(tmp_path, keep=5) as checkpoints:
        save(checkpoints, 1, 1.0, split="train", cutoffs=(1, 2))
        assert checkpoints.best() == 1
        save(checkpoints, 2, 4.0, split="validation")
        save(checkpoints, 3, 3.0, split="validation")
        save(checkpoints, 4, None, split="train")  # not measured: says nothing
        assert checkpoints.best() == 3
    assert Checkpoints(tmp_path, read_only=True).best() == 3
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        save(checkpoints, 5, 2.0, split="train", cutoffs=(1, 2))
        assert checkpoints.best() == 1
    # Who changes the settings back finds what was best by them.
    assert Checkpoints(tmp_path, read_only=True).steps() == [1, 3, 5]


def test_a_carried_state_takes_the_dtype_of_this_machine(tmp_path, caplog):
    def make(dtype):
        memory = jnp.arange(6, dtype=dtype).reshape(2, 3) / 2
        return {"carried": {"m": memory}, "params": {"w": jnp.ones(3)}}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(jnp.bfloat16), config=CONFIG)
    reader = Checkpoints(tmp_path, read_only=True)
    for wanted in (make(jnp.float32), on_mesh(make(jnp.float32), (2,), ("data",))):
        _, found, _ = reader.restore(wanted)
        assert found["carried"]["m"].dtype == jnp.float32
        np.testing.assert_array_equal(
            found["carried"]["m"], make("float32")["carried"]["m"]
        )
    assert "carried/m was bfloat16 when it was saved, here it is float32" in caplog.text
    lower = make(jnp.float32)
    lower["params"]["w"] = lower["params"]["w"].astype(jnp.bfloat16)
    with pytest.raises(UserError, match=r"params/w as float32\[3\], here it is bfloat"):
        reader.restore(lower)


def test_doubles_that_jax_would_halve_are_not_called_damaged(tmp_path):
    state = {"carried": {"m": np.arange(6.0).reshape(2, 3)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, config=CONFIG)
        wanted = {"carried": {"m": jnp.ones((2, 3))}}
        with pytest.raises(UserError, match="m is float64, .*JAX_ENABLE_X64=1"):
            checkpoints.restore(wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("JsonCheckpointHandler", PermissionError(13, "Permission denied")),
        ("PyTreeCheckpointHandler", ValueError("...: Permission denied [source='")),
    ],
)
def test_what_may_not_be_read_is_not_called_damaged(part, error, copied, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    before = sorted(path.name for path in copied.iterdir())
    with Checkpoints(copied) as checkpoints:
        monkeypatch.setattr(getattr(integrity.ocp, part), "restore", refuse)
        with pytest.raises(UserError, match="cannot be read: .*Permission denied"):
            checkpoints.restore(abstract_state())
    assert sorted(path.name for path in copied.iterdir()) == before


def test_a_checkpoint_of_a_later_release_is_named_and_no_older_one_taken(
    copied, monkeypatch
):
    monkeypatch.setattr(integrity, "FORMAT", 3)
    with Checkpoints(copied) as checkpoints:
        checkpoints.save(3, make_state(3), config=CONFIG)
    monkeypatch.undo()
    reader = Checkpoints(copied, read_only=True)
    with pytest.raises(UserError, match="has format 3, this xlformer reads 1 to 2"):
        reader.restore(abstract_state())
