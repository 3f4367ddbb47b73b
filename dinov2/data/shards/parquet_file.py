"""One Parquet file: its image column and labels, and copies of the images of a row group for reading in any order.

Parquet compresses and encodes a column of a row group as a whole, so that one image cannot be read without the others
before it. A copy of a row group has the place of each image instead: (number of rows + 1) int64 offsets, little-endian,
of which row i has the bytes from offset i to offset i + 1, followed by these bytes.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dinov2.data.datasets.file_list import PathTable
from dinov2.data.shards.archives import ArchiveError
from dinov2.data.shards.storage import DataFile, Version

OFFSET_BYTES = 8
_BUFFER = 4 * 2**20  # bytes that are read at once; with the pages of the file this bounds the memory


class ParquetIndex(NamedTuple):
    """The images in a Parquet file."""

    version: Version  # of the file that was read
    column: str  # the image column, with ".bytes" if it is a struct
    group_rows: np.ndarray  # (number of row groups,) int64
    group_bytes: np.ndarray  # the same: bytes of the image column, decompressed
    paths: PathTable  # that the rows mention; "" without one
    labels: PathTable  # text of each row; "" without one
    classes: list[str]  # names of the class indices
    label: str  # the column of labels; "" without one
    columns: str  # all columns with their types, for messages
    notes: list[str]


def import_parquet() -> tuple[ModuleType, ModuleType]:
    """The modules pyarrow and pyarrow.parquet; an ImportError names the installation."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from error
    return pyarrow, pyarrow.parquet


@contextmanager
def _open_parquet(file: DataFile, **settings: Any) -> Iterator[Any]:
    """The `pyarrow.parquet.ParquetFile` of a file; an `ArchiveError` if it, or what is read of it, is damaged."""
    pyarrow, parquet = import_parquet()
    try:
        with file.ranges() as source:
            yield parquet.ParquetFile(source, **settings)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise ArchiveError(f"{file} is no Parquet file, or is damaged or truncated: {error}") from error


def index_parquet(file: DataFile, version: Version, image: str, label: str) -> ParquetIndex:
    """Read what is known about the images in a Parquet file, without reading them.

    Args:
        image: Name of the image column; "": the only one.
        label: Name of the column of labels; "": `label`, or the only one of class labels.

    Raises:
        ArchiveError: The file is damaged, or has no such columns; names those that it has.
    """
    import_parquet()
    return file.attempt(lambda: _index(file, version, image, label))


def _index(file: DataFile, version: Version, image: str, label: str) -> ParquetIndex:
    with _open_parquet(file) as content:
        schema = content.schema_arrow
        features = _features(schema.metadata)
        column, path_column = _image_column(str(file), schema, features, image)
        label_column = _label_column(str(file), schema, features, label)
        groups = [content.metadata.row_group(number) for number in range(content.metadata.num_row_groups)]
        rows, chunks = content.metadata.num_rows, [_chunk(group, column) for group in groups]
        if not rows:
            raise ArchiveError(f"{file} has no rows")
        paths = _texts(content, path_column) if path_column else [""] * rows
        missing = sum(chunk.statistics.null_count or 0 for chunk in chunks if chunk.statistics)
        if missing == rows:
            there = f", but paths such as {path}" if (path := next(filter(None, paths), "")) else ""
            raise ArchiveError(
                f"{file} has no image in column {column}{there}: write the images into the file (Image.embed_storage "
                "of the library datasets), or list their files, ImageList:file=..."
            )
        names = features.get(label_column, {}).get("names") or []
        labels = _texts(content, label_column) if label_column else [""] * rows
        return ParquetIndex(
            *(version, column, np.array([group.num_rows for group in groups], np.int64)),
            np.array([chunk.total_uncompressed_size for chunk in chunks], np.int64),
            PathTable.of(paths),
            PathTable.of("" if names and text == "-1" else text for text in labels),  # -1 is no class
            list(names),
            label_column,
            _columns(schema),
            [f"{file}: {missing:,} of {rows:,} rows have no image"] if missing else [],
        )


def write_group(file: DataFile, group: int, index: ParquetIndex, copy: BinaryIO) -> int:
    """Write the copy of a row group; returns its size in bytes. Errors as `index_parquet`."""
    rows = int(index.group_rows[group])
    ends = np.full(rows + 1, OFFSET_BYTES * (rows + 1), "<i8")
    rows_at_once = max(1, _BUFFER * rows // max(1, int(index.group_bytes[group])))

    def write() -> None:
        copy.seek(ends[0])
        number = 0
        with _open_parquet(file, pre_buffer=False, buffer_size=_BUFFER) as content:
            columns: Any = {"columns": [index.column], "row_groups": [group], "use_threads": False}
            for batch in content.iter_batches(rows_at_once, **columns):
                images = batch.column(0)
                for image in images.flatten()[0] if "." in index.column else images:
                    data = image.as_buffer() if image.is_valid else b""
                    copy.write(data)
                    ends[number + 1] = ends[number] + len(data)
                    number += 1
        if number != rows:
            raise ArchiveError(f"{file} has {number:,} of {rows:,} rows in row group {group}")

    file.attempt(write)
    copy.seek(0)
    copy.write(ends.tobytes())
    return int(ends[-1])


# --- Columns ---------------------------------------------------------------------------------------------------------


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """What the library datasets notes of columns; empty for files of others."""
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {name: each for name, each in features.items() if isinstance(each, dict)}


def _image_column(path: str, schema: Any, features: Mapping[str, Any], wanted: str) -> tuple[str, str]:
    """The columns of the bytes and of the paths of images; "" without paths."""
    if wanted:
        candidates = [_existing(path, schema, wanted, "image")]
    else:
        candidates = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
        for is_kind in (_is_struct, _is_binary):
            candidates = candidates or [field.name for field in schema if is_kind(field.type)]
    if len(candidates) > 1:
        names = ", ".join(candidates)
        raise ArchiveError(f"{path} has several columns of images, {names}: choose one with :image={candidates[0]}")
    kind = schema.field(candidates[0]).type if candidates else None
    if kind is not None and _is_struct(kind):
        has_path = kind.get_field_index("path") >= 0 and str(kind.field("path").type) in ("string", "large_string")
        return f"{candidates[0]}.bytes", f"{candidates[0]}.path" if has_path else ""
    if kind is not None and _is_binary(kind):
        return candidates[0], ""
    lists = [field.name for field in schema if str(field.type).startswith(("list", "large_list", "fixed_size_list"))]
    several = f"; {', '.join(lists)}: several values in a row, of which none is chosen" if lists else ""
    raise ArchiveError(
        f"{path} has no {f'images in column {wanted}' if wanted else 'column of images'}: their files must be in it as "
        f"bytes, one in a row. Columns: {_columns(schema)}{several}"
    )


def _label_column(path: str, schema: Any, features: Mapping[str, Any], wanted: str) -> str:
    """The column of labels; "" if none is wanted and there is not exactly one."""
    if wanted:
        kind = schema.field(_existing(path, schema, wanted, "label")).type
        if not _is_label(kind):
            raise ArchiveError(f"{path}: column {wanted} holds {kind}, not one class index or name in a row")
        return wanted
    if "label" in schema.names and _is_label(schema.field("label").type):
        return "label"
    classes = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    return classes[0] if len(classes) == 1 else ""


def _existing(path: str, schema: Any, name: str, key: str) -> str:
    if schema.names.count(name) != 1:
        raise ArchiveError(f"{path} has no column {name} ({key}={name}); it has: {_columns(schema)}")
    return name


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema) or "none"


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary")


def _is_struct(kind: Any) -> bool:
    """Whether it is the type of a struct with the bytes of a file."""
    is_struct = str(kind).startswith("struct<")
    return is_struct and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def _is_label(kind: Any) -> bool:
    text = str(kind)
    return text in ("string", "large_string", "bool") or text.startswith(("int", "uint", "dictionary<values=string"))


def _chunk(group: Any, column: str) -> Any:
    """The metadata of a column in a row group."""
    chunks = (group.column(number) for number in range(group.num_columns))
    return next(chunk for chunk in chunks if chunk.path_in_schema == column)


def _texts(content: Any, column: str) -> Sequence[str]:
    """The values of a column as text; "" for missing ones."""
    values = content.read(columns=[column], use_threads=False).column(0).combine_chunks()
    if "." in column:
        values = values.flatten()[0]
    return [
        "" if value is None else str(int(value) if isinstance(value, bool) else value) for value in values.to_pylist()
    ]
