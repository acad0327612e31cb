"""Records of earlier calls: of what is asked, or none."""

import pytest

from xlformer.instruments import records


@pytest.mark.parametrize(
    ("text", "is_there"),
    [
        ('{"asked": {"n": 1}, "rows": [2]}', True),
        ('{"asked": {"n": 2}, "rows": [2]}', False),
        ('{"rows": [2]}', False),
        ("[1]", False),
        ('{"asked": {"n"', False),
        ("[" * 100_000, False),
        ("\udcff", False),
    ],
)
def test_a_record_is_of_what_is_asked(tmp_path, text, is_there):
    file = tmp_path / "record.json"
    assert records.read(file, asked={"n": 1}) is None
    file.write_bytes(text.encode(errors="surrogateescape"))
    found = records.read(file, asked={"n": 1})
    assert (found is not None) == is_there
