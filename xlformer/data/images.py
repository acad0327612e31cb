"""ImageNet64, the 'small' ImageNet of van den Oord et al. 2016, as bytes of its pixels.

Each image is 12,288 bytes: rows from the top, pixels from the left, red, green, blue.
TFDS calls it downsampled_imagenet/64x64; counts and sums are those of its catalogue and
of its checksums.tsv (tensorflow-datasets 4.9.10).
"""

from __future__ import annotations

import dataclasses
import io
import struct
from collections.abc import Callable, Iterator

from etils import epath

from xlformer.data import archives, documents
from xlformer.data.archives import Archive, Origin
from xlformer.data.corpus import Corpus
from xlformer.data.documents import BLOCK, Document, Source, Text
from xlformer.errors import UserError, reason

SIDE = 64
RECORD = SIDE * SIDE * 3
URL = "http://image-net.org/small"
# Of each split: its archive, and the folder with the same files.
ARCHIVES = {
    "train": (
        Archive(
            "train_64x64.tar",
            (f"{URL}/train_64x64.tar",),
            "e2a2c1947a748d0d256e98e6d82800d855441dc9e4de2e71a773f1324c4524d7",
        ),
        "train_64x64",
    ),
    "validation": (
        Archive(
            "valid_64x64.tar",
            (f"{URL}/valid_64x64.tar",),
            "eeac03ec4f585baf871d2b4cb9c974bfe345e74878a74e5820fe6eb1041629cd",
        ),
        "valid_64x64",
    ),
}
IMAGES = {"train": 1_281_149, "validation": 49_999}
PROTOCOL = (
    "bits per dimension, of each of an image's 64 x 64 x 3 bytes given those before"
    " it (Choromanski et al. 2020: sequences of 12,288): `bits_per_dim`. There is no"
    " test split: validation is the test, and both names give it. Ours: images in the"
    " archive's order; rows begin with images; an image's first byte is said from the"
    " image before it, of which a model that carries a state knows more unless"
    " config.data.documents"
)
SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of a split, decoded one after the other whenever they are iterated.

    members: yields (name, document) of their files, in their order.
    """

    where: str
    count: int
    members: Callable[[], Iterator[tuple[str, Document]]]

    def __iter__(self) -> Iterator[Document]:
        for name, document in self.members():
            where = f"{self.where}: {name}"
            # No image of 12,288 bytes has a file of a megabyte.
            if len(document) > BLOCK:
                raise UserError(f"{where} has {len(document):,} bytes: no such image")
            yield documents.of_bytes(pixels(document.read(), where), where)


def read(origin: Origin) -> Text:
    """The images of both archives, or of two folders of PNG files in manual_dir."""
    splits = {split: _images(origin, split) for split in ("train", "validation")}
    splits["test"] = splits["validation"]
    facts = {
        "images": {split: images.count for split, images in splits.items()},
        "images_published": IMAGES,
    }
    size = sum(images.count * RECORD for images in splits.values())
    return Text(splits, facts, size)


def _images(origin: Origin, split: str) -> Images:
    archive, name = ARCHIVES[split]
    folder = origin.folder / name if origin.folder is not None else None
    if origin.has(archive) or not folder.is_dir():
        return origin.first(archive, lambda source: _of_archive(origin, source))
    names = sorted(x.name for x in folder.iterdir() if _is_image(x.name))
    origin.facts["unpinned"].append(f"{name}/*.png")
    return _counted(str(folder), len(names), lambda: _files(folder, names))


def _of_archive(origin: Origin, source: Source) -> Images:
    # Its headers are gone through twice, so that one that is cut off is told at once.
    def members():
        return archives.members(origin, source, _is_image)

    count = sum(1 for _ in members())
    return _counted(source.name, count, members)


def _counted(where: str, count: int, members: Callable) -> Images:
    if not count:
        raise UserError(f"imagenet64: {where}: no images (*.png)")
    return Images(where, count, members)


def _files(folder: epath.Path, names: list[str]) -> Iterator[tuple[str, Document]]:
    for name in names:
        source = documents.source(str(folder / name))
        yield name, Document(source, 0, source.size)


def _is_image(name: str) -> bool:
    return name.endswith(".png")


def pixels(data: bytes, where: str) -> bytes:
    """The pixels of a PNG file; UserError unless it is one of 64 x 64, 8-bit RGB."""
    try:
        from PIL import Image
    except ImportError:
        line = "imagenet64 needs Pillow: pip install 'xlformer[images]'"
        raise UserError(line) from None
    # Before any decoder sees it. Pillow would make 8 bits of 16 without a word.
    if data[:8] != SIGNATURE or len(data) < 33:
        raise UserError(f"{where}: not a PNG file, or cut off")
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    if (width, height, depth, colour) != (SIDE, SIDE, 8, 2):
        kinds = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}
        raise UserError(
            f"{where}: expected {SIDE} x {SIDE} pixels of 8-bit RGB, found {width} x"
            f" {height} of {depth}-bit {kinds.get(colour, f'colour type {colour}')}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            found = image.tobytes()
    # SyntaxError, OSError, struct.error, ...: the library has no class of its own.
    except Exception as error:
        raise UserError(f"{where}: a damaged PNG file: {reason(error)}") from None
    if len(found) != RECORD:
        raise UserError(f"{where}: expected {RECORD} bytes of pixels, got {len(found)}")
    return found


CORPUS = Corpus(
    "imagenet64",
    "bytes",
    tuple(archive for archive, _ in ARCHIVES.values()),
    read=read,
    protocol=PROTOCOL,
    # The values of a byte, each its own id.
    symbols="".join(map(chr, range(256))),
    documents=True,
    record=RECORD,
    free=True,
)
