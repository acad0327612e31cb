"""Files of torch.save, read without PyTorch: its numbers, and what strangers make.

PyTorch 2.13 wrote torch_files/; tests/extras compares with torch.load on more.
"""

import pathlib
import shutil
import warnings
import zipfile

import damaged_weights
import numpy as np
import pytest

from xlformer.convert import torch_file
from xlformer.convert.files import read_state
from xlformer.convert.torch_file import TorchFile
from xlformer.errors import UserError

FILES = pathlib.Path(__file__).parent / "torch_files"
BIG = np.arange(12, dtype=np.float32).reshape(3, 4)
WHOLE = "int64 int32 int16 int8 uint8 bool".split()
EXPECTED = {
    "weight": BIG,
    "transposed": BIG.T,
    "row": BIG[1],
    "part": BIG[:, 1:3],
    "thirds": BIG.reshape(-1)[::3],
    "tied": BIG,
    "half": np.float32([1.5, -2]),
    "bfloat16": np.float32([1.5, -3]),
    "scalar": np.float64(3.25),
    "empty": np.zeros((0, 3), np.float32),
    "parameter": np.float32([[7.5]]),  # with requires_grad
    **{name: np.array([1, 0, 3]).astype(name) for name in WHOLE},
}
NEW = {"uint16": np.uint16([1, 0, 3]), "float8_e5m2": np.float32([0.5, -2])}


@pytest.mark.parametrize("name", ["state", "legacy"])
def test_numbers_of_torch_save(name, tmp_path):
    # The name that Hugging Face's weights have.
    shutil.copy(FILES / f"{name}.pt", tmp_path / "pytorch_model.bin")
    found, hparams = read_state(tmp_path / "pytorch_model.bin")
    expected = EXPECTED | (NEW if name == "state" else {})
    assert found.keys() == expected.keys() and hparams is None
    for key, x in expected.items():
        assert (found[key].dtype, found[key].shape) == (x.dtype, x.shape), key
        np.testing.assert_array_equal(found[key], x, err_msg=key)
    assert np.shares_memory(found["tied"], found["weight"])


@pytest.mark.parametrize("name", ["module", "module_legacy"])
def test_a_pickled_module_is_refused_with_what_to_do(name):
    line = refusal(FILES / f"{name}.pt")
    assert "is not a state dict, and a pickled module could run any code" in line
    assert "torch.save(model.state_dict(), 'state.pt')" in line
    assert "it names 'torch.nn.modules.linear.Linear'" in line


def refusal(path):
    with pytest.raises(UserError) as raised:
        read_state(path)
    line = str(raised.value)
    assert "\n" not in line and line.startswith(str(path)) and len(line) < 500, line
    return line


# Made by hand ------------------------------------------------------------------------


class Named(str):
    """'module name', as a pickle has a class or a function."""


class Called(tuple):
    """(Named, arguments)."""


class Outside(tuple):
    """The id of an object outside of the pickle."""


def pickled(x) -> bytes:
    """Of protocol 2, for what torch.save would not write."""
    if isinstance(x, Named):
        return b"c" + x.replace(" ", "\n").encode() + b"\n"
    if isinstance(x, str):
        return b"X" + len(x).to_bytes(4, "little") + x.encode()
    if isinstance(x, Called):
        return pickled(x[0]) + pickled(x[1]) + b"R"
    if isinstance(x, tuple):
        end = b"tQ" if isinstance(x, Outside) else b"t"
        return b"(" + b"".join(map(pickled, x)) + end
    if isinstance(x, dict):
        return b"}(" + b"".join(pickled(k) + pickled(v) for k, v in x.items()) + b"u"
    if isinstance(x, bool) or x is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[x]
    if isinstance(x, float):
        return b"F" + repr(x).encode() + b"\n"
    return b"\x8a\x10" + x.to_bytes(16, "little", signed=True)


HOOKS = Called((Named("collections OrderedDict"), ()))
FLOATS = Named("torch FloatStorage")


def tensor(*, key="0", kind=FLOATS, size=6, offset=0, shape=(2,), strides=(1,), **more):
    storage = Outside(("storage", kind, key, "cpu", size))
    given = storage, offset, shape, strides, False, HOOKS, *more.values()
    return Called((Named("torch._utils _rebuild_tensor_v2"), given))


def saved(path, found, *, change=None, **entries):
    """A zip with one storage of six floats, "0", and what `entries` changes of it."""
    numbers = np.arange(6, dtype=np.float32).tobytes()
    all_of_it = {"data.pkl": b"\x80\x02" + pickled(found) + b".", "data/0": numbers}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (all_of_it | {"byteorder": b"little"} | entries).items():
            # Sizes of 64 bits, as PyTorch writes them of what is large.
            with archive.open(f"w/{name}", "w", force_zip64=True) as entry:
                entry.write(data)
        if change:
            change(archive)
    return path


def test_views_begin_and_step_where_they_say(tmp_path):
    tensors = {
        "view": tensor(offset=1, shape=(2, 2), strides=(1, 3)),
        "all": tensor(shape=(6,)),
        "one": tensor(shape=(1, 2), strides=(10**30, 1)),
        "scalar": tensor(offset=5, shape=(), strides=()),
    }
    found, _ = read_state(saved(tmp_path / "w.pt", tensors))
    np.testing.assert_array_equal(found["view"], [[1, 4], [2, 5]])
    np.testing.assert_array_equal(found["all"], np.arange(6))
    np.testing.assert_array_equal(found["one"], [[0, 1]])
    assert found["scalar"] == 5 and np.shares_memory(found["all"], found["one"])


def test_a_storage_stands_for_few_tensors(tmp_path):
    """Each would become an array of its own, as soon as it is a parameter."""
    path, zeros = tmp_path / "w.pt", bytes(40_000)
    for count, good in ((6, True), (60, False)):
        named = {str(i): tensor(size=10_000, shape=(10_000,)) for i in range(count)}
        saved(path, named, **{"data/0": zeros})
        if good:
            assert len(read_state(path)[0]) == 6
        else:
            assert "2400000 bytes of tensors that share storages" in refusal(path)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (tensor(shape=(10**9,), strides=(0,)), "a tensor of 1000000000 elements"),
        (tensor(shape=(7,), strides=(0,)), "a tensor of 7 elements"),
        (tensor(offset=5), "number 6, where its storage has 6"),
        (tensor(offset=-1), "a shape or strides that are none"),
        (tensor(strides=(-1,)), "a shape or strides that are none"),
        (tensor(shape=(2.0,)), "a shape or strides that are none"),
        (tensor(shape=(True,)), "a shape or strides that are none"),
        (tensor(shape=(2, 2)), "a shape of 2 axes, strides of 1"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "a shape of 65 axes"),
        (tensor(shape=(0, 1 << 99), strides=(1, 1)), "no plain arrays"),
        (tensor(size=7), "storage '0' has 24 bytes, not 7 elements of float32"),
        (tensor(kind=Named("torch LongStorage")), "24 bytes, not 6 elements of int64"),
        (tensor(key="7"), "data/7"),
        (tensor(key="../0"), r"data/../0"),
        (tensor(key=0), "an object outside of it that is no storage"),
        (tensor(size=-6), "an object outside of it that is no storage"),
        (tensor(kind=Named("torch float32")), "an object outside of it that is no"),
        (tensor(metadata={"conj": True}), "a tensor with attributes"),
        (Called((Named("torch._utils _rebuild_tensor_v2"), (1, 2))), "no plain arrays"),
        ((3,), "holds no state dict"),
        ({"x": tensor()}, "holds no state dict"),
        (3.5, "holds no state dict"),
        (Called((Named("os system"), ("false",))), "it names 'os.system'"),
        (Named("torch.hub load"), "it names 'torch.hub.load'"),
        (tensor(kind=Named("builtins exec")), "it names 'builtins.exec'"),
    ],
)
def test_what_is_no_tensor_is_refused_in_a_line(found, line, tmp_path):
    assert line in refusal(saved(tmp_path / "w.pt", {"w": found}))


def test_a_storage_is_of_one_kind(tmp_path):
    found = {"a": tensor(), "b": tensor(kind=Named("torch IntStorage"))}
    assert "'0' is of two kinds" in refusal(saved(tmp_path / "w.pt", found))
    function, untyped = (
        "torch._utils _rebuild_tensor_v3",
        "torch.storage UntypedStorage",
    )
    found = {}
    for dtype in ("uint16", "float8_e5m2"):
        _, given = tensor(kind=Named(untyped), size=24)
        given = *given, Named(f"torch {dtype}"), None
        found[dtype] = Called((Named(function), given))
    assert "'0' is of two dtypes" in refusal(saved(tmp_path / "w.pt", found))
    assert "holds no state dict" in refusal(saved(tmp_path / "w.pt", {3: tensor()}))
    assert "holds no state dict" in refusal(saved(tmp_path / "w.pt", tensor()))


def again(archive):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("w/data/0", b"other")


def overlapped(archive):
    """All storages are where "0" is."""
    twin = archive.getinfo("w/data/0")
    for i in range(1, 100):
        made = zipfile.ZipInfo(f"w/data/{i}")
        for name in ("file_size", "compress_size", "CRC", "header_offset"):
            setattr(made, name, getattr(twin, name))
        archive.filelist.append(made)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda x: x.writestr("w/z", b"0" * 99, zipfile.ZIP_DEFLATED), "is compressed"),
        (lambda x: x.writestr("v/data/1", b""), "not those of one NAME/data.pkl"),
        (lambda x: x.writestr("../data/1", b""), "not those of one NAME/data.pkl"),
        (again, "not those of one NAME/data.pkl"),
        (overlapped, "its entries have more than its"),
    ],
    ids=["deflated", "two folders", "a path", "twice", "overlapped"],
)
def test_zips_that_torch_does_not_write(change, line, tmp_path):
    keys = [str(i) for i in range(100 if change is overlapped else 1)]
    found = {key: tensor(key=key, size=1000) for key in keys}
    zeros = {"data/0": bytes(4000)}
    assert line in refusal(saved(tmp_path / "w.pt", found, change=change, **zeros))


def test_bytes_are_in_their_order_and_checked(tmp_path):
    path = saved(tmp_path / "w.pt", {"w": tensor()}, byteorder=b"big")
    assert "its byteorder is b'big', not little" in refusal(path)
    data = saved(path, {"w": tensor()}).read_bytes()
    at = data.index(np.arange(6, dtype=np.float32).tobytes())
    path.write_bytes(data[: at + 5] + b"\1" + data[at + 6 :])
    assert "Bad CRC-32" in refusal(path)
    path.write_bytes(data[:-30])
    assert "is not a readable file of torch.save" in refusal(path)
    for content in (b"", b"x", b"PK\x03\x04", b"\x80\x02."):
        path.write_bytes(content)
        assert "is not a readable file of torch.save" in refusal(path)
    with pytest.raises(UserError, match="no such file"):
        TorchFile(tmp_path)


def test_names_are_a_closed_list():
    """None of them is a function that a file could misuse, and none is imported."""
    source = pathlib.Path(torch_file.__file__).read_text()
    assert "import torch" not in source and "import_module" not in source
    functions = {name for name, role in torch_file.ROLES.items() if role == "call"}
    assert functions == {
        *(
            f"torch._utils._rebuild_{x}"
            for x in ("tensor_v2", "tensor_v3", "parameter")
        ),
        "torch.Size",
        "torch.device",
    }


@pytest.mark.parametrize("name", ["torch zip", "torch legacy", "checkpoint of nvidia"])
def test_damage_is_refused_in_a_line_or_reads(name, tmp_path):
    folder = damaged_weights.copy(name, tmp_path / "copy")
    draw = np.random.default_rng(len(name))
    outcomes = [damaged_weights.outcome(name, folder, draw) for _ in range(500)]
    assert outcomes.count("refused") > 150
    # A zip has checksums; pickles of before, and padding, have none.
    assert name not in damaged_weights.KEPT or "changed" not in outcomes
