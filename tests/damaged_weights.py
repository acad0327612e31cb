"""Weights and vocabularies of strangers, damaged at random: what reads them then?

A class of files (CLASSES) has a folder, the file of it that is damaged, and a function
that reads the folder to plain values. `outcome` says how a damaged one ended.
"""

from __future__ import annotations

import functools
import pathlib
import shutil

import numpy as np

from xlformer.convert import (
    entries,
    hugging_face,
    leveldb,
    nvidia,
    tensor_bundle,
    tensorflow_vocabulary,
    transformer_xl,
)
from xlformer.convert.crc32c import crc32c, masked
from xlformer.convert.files import read_sharded, read_state
from xlformer.errors import UserError

HERE = pathlib.Path(__file__).parent
SHARDED = HERE / "convert" / "tf_sharded"
ARRAYS = HERE / "convert" / "arrays"
TORCH = HERE / "convert" / "torch_files"
NVIDIA = HERE / "golden" / "nvidia_wt103_base"
HUGGING_FACE = HERE / "golden" / "hf_transfo_xl_div4"
INDEX_OF_SHARDS = "model.safetensors.index.json"
CACHES = HERE / "golden" / "tf_vocabulary"
# Numbers that arithmetic may go wrong on, as bytes and as varints.
NUMBERS = [n.to_bytes(k, "little") for n in (0, 1, 127, 255) for k in (1, 4, 8)]
NUMBERS += [b"\xff" * k for k in (2, 4, 8, 9)] + [b"\xff" * 9 + b"\x01", b"\x80" * 10]


def mutated(data: bytes, draw: np.random.Generator) -> bytes:
    """The bytes after one to three changes: flips, cuts, insertions, copies."""
    for _ in range(draw.integers(1, 4)):
        at, other = (int(draw.integers(0, len(data) + 1)) for _ in range(2))
        low, high = sorted((at, other))
        size = min(high - low, int(draw.integers(1, 64)))
        change = draw.integers(0, 7)
        if change <= 1 and at < len(data):
            flipped = data[at] ^ 1 << int(draw.integers(0, 8))
            data = data[:at] + bytes([flipped]) + data[at + 1 :]
        elif change == 2:
            data = data[:at] if draw.integers(0, 4) == 0 else data[:-1]
        elif change == 3:
            data = data[:low] + data[low + size :]
        elif change == 4:
            data = data[:at] + data[low : low + size] + data[at:]
        else:
            number = NUMBERS[draw.integers(0, len(NUMBERS))]
            kept = at if change == 5 else at + len(number)
            data = data[:at] + number + data[kept:]
    return data


def resealed(data: bytes) -> bytes:
    """An index with true checksums again, wherever its blocks can still be found."""
    found = bytearray(data)
    try:
        at = len(data) - leveldb.FOOTER
        _, _, at = leveldb.handle(data, at, len(data) - 8)
        start, size, _ = leveldb.handle(data, at, len(data) - 8)
        # The blocks lie one behind another, the filters' before the index's.
        blocks = [(start, size)]
        for _, handle in leveldb.entries(data[start : start + size], 1 << 20):
            blocks.append(leveldb.handle(handle, 0, len(handle))[:2])
    except (ValueError, IndexError):
        blocks = []
    for start, size in blocks:
        end = start + size
        if end + 5 <= len(data) - leveldb.FOOTER:
            crc = masked(crc32c(data[start : end + 1]))
            found[end + 1 : end + 5] = crc.to_bytes(4, "little")
    return bytes(found)


def read_bundle(folder: pathlib.Path):
    bundle = tensor_bundle.open_bundle(folder / "model.ckpt-4000")
    return {name: bundle.read(name) for name in sorted(bundle.variables)}


def read_cache(folder: pathlib.Path):
    # Counts come from the file, whose digits carry no checksum.
    return tensorflow_vocabulary.read(folder / "cache.pkl").symbols


def read_arrays(name: str):
    return lambda folder: read_state(folder / name)[0]


def read_index(folder: pathlib.Path):
    return read_sharded(folder / INDEX_OF_SHARDS)


def read_checkpoint(folder: pathlib.Path):
    return nvidia.load(folder)[0]


@functools.cache
def _hugging_faces() -> dict:
    state = read_state(HUGGING_FACE / "model.safetensors")[0]
    return {name.removeprefix(hugging_face.PREFIX): x for name, x in state.items()}


def read_settings(folder: pathlib.Path):
    """What from_hf does before it makes anything: its shapes against the config's."""
    try:
        config = hugging_face.config_of(hugging_face.settings(folder))
        found = transformer_xl.entries(config, reverse_clusters=False)
        entries.check(_hugging_faces(), found, "the hparams say")
        return config
    except UserError as error:  # from_hf names the folder.
        raise UserError(f"{folder}: {error}") from error


# The folder, the file, the reader, and what may be done to a damaged file.
INDEX, DATA = "model.ckpt-4000.index", "model.ckpt-4000.data-00002-of-00003"
CLASSES = {
    "index": (SHARDED, INDEX, read_bundle, bytes),
    "resealed index": (SHARDED, INDEX, read_bundle, resealed),
    "data": (SHARDED, DATA, read_bundle, bytes),
    "npz": (ARRAYS, "w.npz", read_arrays("w.npz"), bytes),
    "npz compressed": (ARRAYS, "z.npz", read_arrays("z.npz"), bytes),
    "safetensors": (ARRAYS, "w.safetensors", read_arrays("w.safetensors"), bytes),
    "torch zip": (TORCH, "state.pt", read_arrays("state.pt"), bytes),
    "torch legacy": (TORCH, "legacy.pt", read_arrays("legacy.pt"), bytes),
    "checkpoint of nvidia": (NVIDIA, "checkpoint_last.pt", read_checkpoint, bytes),
    "index of shards": (ARRAYS, INDEX_OF_SHARDS, read_index, bytes),
    "config.json": (HUGGING_FACE, "config.json", read_settings, bytes),
    "pickle of words": (CACHES / "wt103", "cache.pkl", read_cache, bytes),
    "pickle of bytes": (CACHES / "enwik8", "cache.pkl", read_cache, bytes),
}
# Checksums keep the values; a pickle has none, so that it may say something else.
KEPT = ("index", "data", "npz", "npz compressed", "torch zip", "checkpoint of nvidia")


def copy(name: str, target: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(CLASSES[name][0], target)


def outcome(name: str, folder: pathlib.Path, draw) -> str:
    """Damages the file of a copy, reads it, and mends it again.

    Returns:
      refused (a UserError of one line), same, or changed (read to other values). Any
      other exception is raised.
    """
    source, file, read, after = CLASSES[name]
    whole = (source / file).read_bytes()
    (folder / file).write_bytes(after(mutated(whole, draw)))
    try:
        found = read(folder)
    except UserError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        return "refused"
    finally:
        (folder / file).write_bytes(whole)
    return "same" if _equal(found, _undamaged(name)) else "changed"


@functools.cache
def _undamaged(name: str):
    source, _, read, _ = CLASSES[name]
    return read(source)


def _equal(a, b) -> bool:
    if not isinstance(a, dict):
        return a == b
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def python_2(vocab: dict[bytes, object], dataset: bytes) -> bytes:
    """A corpus as Python 2 pickled it in protocol 2: byte strings, pairs in lists."""

    def of(x) -> bytes:
        if isinstance(x, bytes):
            return b"U" + bytes([len(x)]) + x
        if isinstance(x, bool) or x is None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[x]
        if isinstance(x, int):
            return b"J" + x.to_bytes(4, "little", signed=True)
        if isinstance(x, list):
            return b"](" + b"".join(map(of, x)) + b"e"
        return b"}(" + b"".join(of(k) + of(v) for k, v in x.items()) + b"u"

    pairs = [[symbol, i] for i, symbol in enumerate(vocab[b"idx2sym"])]
    state = b"".join(of(k) + of(v) for k, v in vocab.items() if k != b"counter")
    counter = b"ccollections\nCounter\n" + of(vocab[b"counter"]) + b"\x85R"
    state += of(b"counter") + counter
    state += of(b"sym2idx") + b"ccollections\nOrderedDict\n" + of(pairs) + b"\x85R"
    made = b"cvocabulary\nVocab\n)\x81}(" + state + b"ub"
    corpus = of(b"dataset") + of(dataset) + of(b"vocab") + made
    return b"\x80\x02cdata_utils\nCorpus\n)\x81}(" + corpus + b"ub."


def bombs(n: int) -> dict[str, bytes]:
    """Pickles of a few bytes times n that stand for large things, or for deep ones."""

    def text(x: bytes) -> bytes:
        return b"X" + len(x).to_bytes(4, "little") + x

    twice = b")" + b"2\x86" * n  # A tuple of two times the tuple before.
    symbol = b"]" + text(b"a") + b"a"
    fields = text(b"idx2sym") + symbol + text(b"sym2idx") + b"}" + text(b"a")
    counter = b"ccollections\nCounter\nq\x01"
    encode = b"c_codecs\nencode\nq\x01(" + text(b"a" * 0xF000) + text(b"latin1")
    return {
        "twice and again": twice + b".",
        "deep": b")" + b"\x85" * n + b".",
        "deep lists": b"]" * n + b"a" * (n - 1) + b".",
        "a list in itself": b"]q\x00" + b"h\x00a" * n + b".",
        "lists": b"]" * 10 * n + b".",
        "marks": b"(" * n + b".",
        "equal keys": b"}(" + b"K\x01K\x01" * n + b"u.",
        "a counter again and again": b"}q\x00(" + b"NN" * 1000 + b"u" + counter
        + b"h\x01h\x00\x85R" * n + b".",
        "text again and again": encode + b"tq\x02" + b"h\x01h\x02R" * n + b".",
        "a number that is none": b"cvocabulary\nVocab\n)\x81}(" + fields + twice
        + b"sub.",
    }  # fmt: skip
