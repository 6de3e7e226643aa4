"""Parquet for programs that read tables."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, ClassVar

from phaselens.errors import InputError
from phaselens.report.formats.base import TableFormat

if TYPE_CHECKING:
    from phaselens.plugin import Table


class ParquetFormat(TableFormat):
    """Parquet of one result table, binary, with the columns' types and units; the file must be redirected."""

    help: ClassVar[str] = "one table, binary"
    is_binary: ClassVar[bool] = True

    def write_table(self, name: str, table: Table, file: IO[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as parquet

        buffer = getattr(file, "buffer", None)
        if buffer is None:
            raise InputError("parquet is binary, but the file takes text only; write to a file on the disk")
        sink = pa.BufferOutputStream()
        parquet.write_table(table.to_arrow(), sink)
        file.flush()
        buffer.write(sink.getvalue().to_pybytes())
