"""TFDS builders of every corpus, which need no TensorFlow.

They call only `dl.download`, open archives themselves, and store array_record files.
tensorflow_datasets is imported where it is used, because `import xlformer` must not
need it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from xlformer import progress, storage
from xlformer.data import parts
from xlformer.data.documents import Document, Text
from xlformer.errors import UserError, reason

# Text of one shard of tokens, which is encoded by one process at a time; of texts that
# make few of them a sixteenth, so that processes end at about the same time. 100 MB are
# 3 shards of 32 MiB, with which one of two processes had two thirds of the work.
SHARD = 1 << 25
SMALL_SHARD, SHARES = 1 << 22, 16
# The version of the builders: another one prepares everything again.
VERSION = "1.1.0"
# Weak compression, because it takes longer than all else: the default, zstd:3, writes
# 125 MB/s, zstd:1 220, none 1,600 (array_record 0.8.6, one core).
OPTIONS = "group_size:1,zstd:1"
# Bytes of records that are read at a time, more or less.
TOGETHER = 1 << 23
# Where the builder keeps what it has seen of the text; all else there is for the card.
STORED = "stored"


@functools.cache
def _builder_class(corpus_name: str):
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Stores the documents of each split as numbered parts, in order."""

        name = corpus_name
        VERSION = tfds.core.Version(VERSION)

        def __init__(self, *, read: Callable[[object], Text], data_dir: str):
            self._read = read
            super().__init__(data_dir=data_dir)

        def _info(self):
            number = tfds.features.Scalar(np.int64)
            features = {
                # Bytes as Text come back as they are. A Tensor of uint8 takes eight
                # times as long to write: 6.9 s instead of 0.9 s for 100 MB.
                "text": tfds.features.Text(),
                "document": number,
                "offset": number,
                "joins": number,
            }
            return tfds.core.DatasetInfo(
                builder=self,
                # TFDS would shuffle records by a hash of their key; a text has an
                # order.
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl):
            text = self._read(dl)
            self._facts = text.facts
            # Compressed it takes less.
            storage.check_room(self.data_path.parent, text.size, "the text")
            self._size = text.size
            return {s: self._generate_examples(d) for s, d in text.splits.items()}

        def _generate_examples(self, documents: Iterable[Document]):
            for number, document in enumerate(documents):
                for part in parts.of(document):
                    yield number, part

        def _download_and_prepare(self, dl_manager, download_config):
            # TFDS's own writer would hold a gigabyte of the text, and sort what is
            # beyond it in memory; the records come in order.
            splits = self._split_generators(dl_manager)
            with progress.counting(f"storing {self.name}", self._size):
                infos = self._stored(splits)
            # Some facts of a text are known when all of it has been read.
            self.info.metadata.update(self._facts)
            self.info.set_splits(tfds.core.splits.SplitDict(infos))

        def _stored(self, splits) -> list:
            digest, found, infos = hashlib.sha256(), {}, []
            for split, examples in splits.items():
                template = self._get_filename_template(split_name=split)
                path = template.sharded_filepath(shard_index=0, num_shards=1)
                size, shards = self._write(os.fspath(path), examples, digest)
                found[split] = {"bytes": size, "shards": shards}
                infos.append(
                    tfds.core.SplitInfo(
                        name=split,
                        shard_lengths=[shards[-1]],
                        num_bytes=size,
                        filename_template=template,
                    )
                )
            for split, about in found.items():
                if not about["bytes"]:
                    raise UserError(f"{self.name}: the text is empty: split {split!r}")
            self.info.metadata[STORED] = {"sha256": digest.hexdigest(), "splits": found}
            return infos

        def _write(self, path: str, examples, digest) -> tuple[int, list[int]]:
            """Writes a split; returns its bytes, and where shards begin and end."""
            from array_record.python import array_record_module

            features = self.info.features
            serializer = tfds.core.example_serializer.ExampleSerializer(
                features.get_serialized_info()
            )
            writer = array_record_module.ArrayRecordWriter(path, OPTIONS)
            size, shards, records = 0, [0], 0
            # Whatever the number of processes is: it is a function of the text.
            shard = min(SHARD, max(SMALL_SHARD, self._size // SHARES))
            for number, part in examples:
                record = features.encode_example(_example(number, part))
                writer.write(serializer.serialize_example(record))
                digest.update(part.data)
                progress.passed(len(part.data))
                size, records = size + len(part.data), records + 1
                if size >= shard * len(shards):
                    shards.append(records)
            writer.close()
            return size, shards if shards[-1] == records else [*shards, records]

    return Builder


def _example(number: int, part: parts.Part) -> dict:
    joins = part.in_line + 2 * part.in_word + 4 * part.ends
    return {
        "text": part.data,
        "document": number,
        "offset": part.offset,
        "joins": joins,
    }


def build(
    name: str,
    read: Callable[[object], Text],
    data_dir: str,
    *,
    download_dir,
):
    """Prepares the TFDS form of a corpus under data_dir, unless it is there."""
    import tensorflow_datasets as tfds

    with _whole(data_dir):
        builder = _builder_class(name)(read=read, data_dir=os.fspath(data_dir))
    # Google's storage, which TFDS would ask first, has none of these builders.
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    # TFDS prints two lines of its own, and standard output is the command's result.
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(
            # The default format fails without TensorFlow, and only after all records
            # have been made. 'parquet' can do without, but said that of 68,880 records
            # it had 3,600.
            file_format="array_record",
            download_dir=download_dir,
            download_config=config,
        )
    return builder


def opened(store: str):
    """The builder of a TFDS directory, which is there."""
    import tensorflow_datasets as tfds

    with _whole(store):
        return tfds.builder_from_directory(store)


@contextlib.contextmanager
def _whole(store) -> Iterator[None]:
    """Says in one line that a TFDS directory is damaged."""
    try:
        yield
    except MemoryError:
        raise
    # Whatever the libraries of its files raise.
    except Exception as error:
        raise UserError(
            f"{store}: the text that is stored there cannot be read: {reason(error)}; "
            f"delete {store} and prepare again"
        ) from error


def records(builder, split: str, start: int, stop: int) -> Iterator[tuple]:
    """Yields (number of the document, part) of the records of a split."""
    with _whole(builder.data_path):
        source = builder.as_data_source(split)
    count = 1
    while start < stop:
        # Together: of 68,880 records one at a time took 385 us each, together 30 us.
        # Where they are large, one by one, because all of them lie in memory.
        together = range(start, min(start + count, stop))
        with _whole(builder.data_path):
            found = source.__getitems__(together)
            # Of a file that is cut it has records without a text.
            size = sum(len(record["text"]) for record in found)
        for record in found:
            joins = int(record["joins"])
            part = parts.Part(
                record["text"],
                int(record["offset"]),
                in_line=bool(joins & 1),
                in_word=bool(joins & 2),
                ends=bool(joins & 4),
            )
            yield int(record["document"]), part
        start, count = together.stop, 16 if size < TOGETHER else 1


def stored(builder) -> dict:
    """What was seen of the text: its checksum, and of each split bytes and shards."""
    with _whole(builder.data_path):
        return builder.info.metadata[STORED]
