"""Archives and tables for the tests of `wds:` and `hf:` data."""

from __future__ import annotations

import io
import tarfile

import pytest

datasets = pytest.importorskip("datasets")


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def built(columns, features):
    """A data set from plain columns: the library would encode sounds by torchcodec, a real one holds bytes."""
    import pyarrow

    rows = pyarrow.table(columns, schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(rows), info=datasets.DatasetInfo(features=features))
