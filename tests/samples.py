"""A few KB of the form of PG-19, ImageNet64 and TrEMBL, made anew at each call."""

import io
import random
import tarfile

import numpy as np

RESIDUES = "ACDEFGHIKLMNPQRSTVWYBOUXZ"
WORDS = "the of a to man ship sea and whale his was not in it".split()


def proteins(count=40, seed=1):
    """Random sequences of 5 to 89 residues, all of them different."""
    draw = random.Random(seed)
    return [
        "".join(draw.choice(RESIDUES) for _ in range(draw.randrange(5, 90)))
        for _ in range(count)
    ]


def fasta(sequences) -> bytes:
    """As UniProt writes them: 60 residues a line."""
    lines = []
    for i, x in enumerate(sequences):
        lines.append(f">tr|A{i:05}|A{i:05}_X Protein {i} OS=Homo sapiens\n")
        lines += [x[k : k + 60] + "\n" for k in range(0, len(x), 60)]
    return "".join(lines).encode()


def pixels(count, seed=0):
    """Images of 16 x 16 squares, in few colours: their files are small."""
    draw = np.random.default_rng(seed)
    small = draw.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return small.repeat(16, 1).repeat(16, 2)


def png(image, **options) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image, **options).save(buffer, "PNG")
    return buffer.getvalue()


def tar(files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            opened.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def book(seed) -> str:
    draw = random.Random(seed)
    lines = [" " * (i % 3) + " ".join(draw.choices(WORDS, k=9)) for i in range(30)]
    return "\n".join(lines) + "\n"


def write_pg19(folder):
    """Two books a split."""
    for number, split in enumerate(("train", "validation", "test")):
        (folder / split).mkdir(parents=True)
        for i in (1, 2):
            name = f"{10 * number + i}.txt"
            (folder / split / name).write_text(book(10 * number + i))
    (folder / "metadata.csv").write_text("1,Moby Dick,1851,http://x/1\n")


def write_images(folder, train=5, validation=1):
    """Folders of PNG files, as the archives have them."""
    for name, count, seed in (("train", train, 0), ("valid", validation, 1)):
        (folder / f"{name}_64x64").mkdir(parents=True)
        for i, image in enumerate(pixels(count, seed)):
            (folder / f"{name}_64x64" / f"{i:07}.png").write_bytes(png(image))


def write_proteins(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "few.fasta").write_bytes(fasta(proteins()))
