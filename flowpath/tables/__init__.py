"""Tables: reading and writing them, their columns and supports, and what a flow makes of their cells."""

from flowpath.tables.columns import Schema, is_frame, pick
from flowpath.tables.files import ENDINGS, read, write
from flowpath.tables.inference import Column, columns, describe, infer_supports

__all__ = ["ENDINGS", "Column", "Schema", "columns", "describe", "infer_supports", "is_frame", "pick", "read", "write"]
