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

# Bytes of a record. 5 MB as 68,880 records, one a line, take about 26 s to read one by
# one; 100 MB in 1,526 records of 64 KiB take 0.16 s (tensorflow-datasets 4.9.10, 2 CPU
# cores).
CHUNK = 1 << 18
# The version of the builders: another one prepares everything again.
VERSION = "1.0.0"


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
                # Bytes as Text come back as they are. A Tensor of uint8 takes eight
                # times as long to write: 6.9 s instead of 0.9 s for 100 MB.
                "text": tfds.features.Text(),
                "document": tfds.features.Scalar(np.int64),
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
            self.info.metadata.update(text.facts)
            return {s: self._generate_examples(d) for s, d in text.splits.items()}

        def _generate_examples(self, documents: list[bytes]):
            key = 0
            for number, document in enumerate(documents):
                # A piece may end within a character: read_split joins bytes, not
                # strings.
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


def read_split(builder, split: str) -> list[bytes]:
    """Reads the documents of a split as they were before they were cut."""
    source = builder.as_data_source(split)
    parts: list[list[bytes]] = []
    # In blocks: of 68,880 records one at a time took 385 us each, together 30 us.
    for start in range(0, len(source), 256):
        stop = min(start + 256, len(source))
        for record in source.__getitems__(range(start, stop)):
            while record["document"] >= len(parts):
                parts.append([])
            parts[record["document"]].append(record["text"])
    return [b"".join(pieces) for pieces in parts]
