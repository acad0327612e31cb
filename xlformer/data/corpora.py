"""TFDS builders of every corpus, which need no TensorFlow.

They call only `dl.download`, open archives themselves, and store array_record files.
tensorflow_datasets is imported where it is used, because `import xlformer` must not
need it.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Callable

import numpy as np

from xlformer.data.sources import Text

CHUNK = 1 << 18  # Bytes of a record; one record a line would be 100 times slower.
VERSION = "1.0.0"  # Of the builders; another one prepares everything again.


@functools.cache
def _builder_class(corpus_name: str):
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Stores the documents of each split as numbered pieces, in order."""

        name = corpus_name
        VERSION = tfds.core.Version(VERSION)

        def __init__(self, *, read: Callable[[object], Text], data_dir: str):
            self._read = read
            super().__init__(data_dir=data_dir)

        def _info(self):
            features = {
                "text": tfds.features.Text(),
                "document": tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                disable_shuffling=True,
                features=tfds.features.FeaturesDict(features),
                metadata=tfds.core.MetadataDict(),
            )

        def _split_generators(self, dl):
            text = self._read(dl)
            self.info.metadata.update(text.facts)
            return {s: self._generate_examples(d) for s, d in text.splits.items()}

        def _generate_examples(self, documents: list[bytes]):
            key = 0
            for number, document in enumerate(documents):
                for start in range(0, len(document), CHUNK):
                    piece = document[start : start + CHUNK]
                    yield key, {"text": piece, "document": number}
                    key += 1

    return Builder


def build(
    name: str,
    read: Callable[[object], Text],
    data_dir: str,
    *,
    download_dir,
):
    """Prepares the TFDS form of a corpus under data_dir, unless it is there."""
    import tensorflow_datasets as tfds

    builder = _builder_class(name)(read=read, data_dir=os.fspath(data_dir))
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # It prints two lines of its own.
        builder.download_and_prepare(
            file_format="array_record",  # The default one would need TensorFlow.
            download_dir=download_dir,
            download_config=config,
        )
    return builder


def read_split(builder, split: str) -> list[bytes]:
    """Reads the documents of a split as they were before they were cut."""
    source = builder.as_data_source(split)
    parts: list[list[bytes]] = []
    for start in range(0, len(source), 256):
        stop = min(start + 256, len(source))
        for record in source.__getitems__(range(start, stop)):
            while record["document"] >= len(parts):
                parts.append([])
            parts[record["document"]].append(record["text"])
    return [b"".join(pieces) for pieces in parts]
