"""What happened: the record schema, readers of the formats people have, and the log they make."""

from walras.records.log import UNKNOWN, Log, read_log
from walras.records.read import OnRows, read_records
from walras.records.schema import COLUMNS, SCHEMA, Column

__all__ = ["COLUMNS", "SCHEMA", "UNKNOWN", "Column", "Log", "OnRows", "read_log", "read_records"]
