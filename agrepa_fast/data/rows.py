"""Text files of rows: read as UTF-8, and split into cells as Python's csv module writes them, with line numbers."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

LISTS = "a list of clips: CSV with the header audio_file|text, or JSONL (docs/data.md)"
INSTEAD = f"extract its sound files into a folder, and write {LISTS}"
TABLE = f"give its folder as hf:FOLDER:train, or {INSTEAD}"
ARCHIVE = f"give it as wds:FILE (WebDataset), or {INSTEAD}"
# (offset, the bytes there, what such a file is, what to do)
_OTHER_FILES = (
    (0, b"PAR1", "a Parquet file", TABLE),
    (0, b"ARROW1", "an Arrow file", TABLE),
    (257, b"ustar", "a tar archive", ARCHIVE),
    (0, b"PK\3\4", "a zip archive", INSTEAD),
    (0, b"PK\5\6", "an empty zip archive", INSTEAD),
    (0, b"\x1f\x8b", "a gzip file", "unpack it and give what is inside"),
    (0, b"\xfd7zXZ", "an xz file", "unpack it and give what is inside"),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it and give what is inside"),
    (0, b"7z\xbc\xaf", "a 7z archive", INSTEAD),
    (0, b"SQLite format 3", "an SQLite database", INSTEAD),
    (0, b"RIFF", "a sound file", f"give {LISTS}"),
    (0, b"fLaC", "a sound file", f"give {LISTS}"),
    (0, b"OggS", "a sound file", f"give {LISTS}"),
    (0, b"ID3", "a sound file", f"give {LISTS}"),
    (0, b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (0, b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without byte order mark. Bytes that are not UTF-8 become lone surrogates.

    Raises:
        UserError: it cannot be read, or is of another kind; the message says what to give instead.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(512)
            _refuse_other_files(path, start)
            data = start + file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return data.decode("utf-8-sig", "surrogateescape")


def _refuse_other_files(path: Path, start: bytes) -> None:
    for offset, magic, what, instead in _OTHER_FILES:
        if start[offset : offset + len(magic)] == magic:
            if path.suffix.lower() in (".xlsx", ".ods"):
                what, instead = "a spreadsheet", "save it as CSV in UTF-8"
            raise UserError(f"{path}: {what} is no manifest: {instead}")


def lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    numbered = enumerate(re.split(r"\r\n?|\n", text), start=1)
    return [(number, line) for number, line in numbered if line.strip()]


def csv_rows(path: Path, text: str, delimiter: str, *, quoted: bool = True) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its first line; cells without outer spaces.

    quoted: cells may be in double quotes, and then hold the delimiter, line ends and doubled quotes.

    Raises:
        UserError: quotes that do not match.
    """
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=delimiter == ",",
        strict=True,
    )
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error):
                raise UserError(
                    f"{path}:{number}: a cell from here on has more than {csv.field_size_limit()} characters: give "
                    "the double quote that ends it, or shorten the text"
                ) from error
            raise UserError(
                f"{path}:{number}: {error}: a cell that begins with a double quote must end with one, and those inside "
                "are doubled; for a list without such quoting give unquoted:PATH"
            ) from error
        if len(row) > 1 or (row and row[0].strip()):
            yield number, [cell.strip() for cell in row]
