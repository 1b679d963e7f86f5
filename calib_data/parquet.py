"""Values of one column of a parquet file, row by row, in bounded memory: a few kilobytes on disk can stand for gigabytes.

The library that decodes them can end the process on a damaged file, where no exception is left to catch. So a child process reads
the file first (`python -m calib_data.parquet FILE COLUMN ...`): what ends the child is an error with a name here.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from convert.errors import InputError
from convert.folder.json_files import open_regular, show

BATCH_BYTES = 32 * 2**20  # of decoded values at a time, as the file states their size
CHUNK_LIMIT = 2**30  # bytes of the column in one group of rows
ROW_LIMIT = 64 * 2**20  # bytes of an average row: more is no text


def column_values(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each row of the first of the columns that is there, after a child process has read them all.

    Raises InputError where the file is damaged, has none of them, or states rows too large to be text.
    """
    _check_in_child(file, columns)
    yield from decode(file, columns)


def _check_in_child(file: Path, columns: tuple[str, ...]) -> None:
    """Raises InputError where reading the file ends a process. Every other fault is left to the reading here."""
    root = str(Path(__file__).resolve().parents[1])
    path = os.environ.get("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-m", "calib_data.parquet", str(file), *columns],
        env={**os.environ, "PYTHONPATH": root if not path else root + os.pathsep + path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise InputError(
            f"{file} cannot be read as parquet: it is damaged in such a way that the library ends with {name}. Write it anew."
        )


def decode(file: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """As `column_values`, in this process alone: a damaged file may end it."""
    from pyarrow import parquet

    with open_regular(file) as stream:
        try:
            table = parquet.ParquetFile(stream)
            names = table.schema_arrow.names
            wanted = next((name for name in columns if name in names), None)
            if wanted is None:
                found = ", ".join(show(name, 40) for name in names[:12])
                raise InputError(
                    f'{file} has no column "{columns[0]}" (found: {found}): name it with --text-column.'
                )
            # a column whose rows repeat stays the few values that it is, not a copy for each row
            table = parquet.ParquetFile(stream, read_dictionary=[wanted])
            for group in range(table.num_row_groups):
                rows = _batch_rows(file, wanted, table.metadata.row_group(group))
                for batch in table.iter_batches(rows, row_groups=[group], columns=[wanted]):
                    for value in batch.column(0):
                        yield wanted, value.as_py()
        except InputError:
            raise
        except Exception as error:  # the library raises its own types, OSError, OverflowError and more
            raise InputError(
                f"{file} cannot be read as parquet: {show(str(error))}. Write it anew."
            ) from error


def _batch_rows(file: Path, column: str, group: Any) -> int:
    """Rows to decode at once. Raises InputError where the group states too many bytes for its rows."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)
    row = size / max(1, group.num_rows)
    if size > CHUNK_LIMIT or row > ROW_LIMIT:
        raise InputError(
            f'{file}: the column "{column}" has a group of {group.num_rows:,} rows and {size:,} bytes; at most {CHUNK_LIMIT:,} '
            f"bytes a group and {ROW_LIMIT:,} a row are read. Write it with smaller groups of rows, or name another column."
        )
    return max(1, min(256, int(BATCH_BYTES / max(1.0, row))))


if __name__ == "__main__":
    with suppress(Exception):  # what raises here raises in the parent too, which tells it
        for _ in decode(Path(sys.argv[1]), tuple(sys.argv[2:])):
            pass
