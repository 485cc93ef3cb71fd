# SPDX-License-Identifier: Apache-2.0
"""Where make_shards.py gets its pictures: folders, tables, data sets, or a teacher that draws prompts.

A source is (entries, function that yields for some of them the bytes of the picture, or a LeftOut).
"""

import csv
import io
import json
import os
import random
from pathlib import Path
from typing import NamedTuple

PICTURE_SUFFIXES = frozenset(".jpg .jpeg .jfif .png .webp .bmp .gif .tif .tiff .avif".split())
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
CAPTION_COLUMNS = ("text", "caption", "prompt")
PICTURE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file")
PNG_MODES = frozenset("1 L LA I;16 P RGB RGBA".split())
csv.field_size_limit(2**27)


class InputError(ValueError):
    """An input this tool cannot use; the message is one line that names it and the remedy."""


class LeftOut(Exception):
    """A picture that goes into no shard; the message is the cause, the same for all of that cause."""


class Entry(NamedTuple):
    """One picture to come: `place` is its file, its row in a data set, or its seed."""

    name: str
    caption: str | None
    place: Path | int
    fault: str | None = None


def pick_column(columns, asked, known, flag, where):
    """Return the column that a flag names, or else the first known one; raises InputError without either."""
    found = next((name for name in ([asked] if asked else known) if name in columns), None)
    if found is None:
        raise InputError(f"{where}: has the columns {', '.join(columns) or '(none)'}; name one with {flag}")
    return found


def read_table(path):
    """Return the rows of a table as dicts; of parquet only the columns of text."""
    try:
        if path.suffix == ".parquet":
            try:
                import pyarrow as pa
                import pyarrow.parquet as pq
            except ImportError as error:
                raise InputError(f"{path}: reading parquet needs pyarrow; pip install pyarrow") from error
            texts = [f.name for f in pq.read_schema(path) if f.type in (pa.string(), pa.large_string())]
            return pq.read_table(path, columns=texts).to_pylist()
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix != ".jsonl":
                return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
            rows = [json.loads(line) for line in file if line.strip()]
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's and json's errors are ValueErrors
        raise InputError(f"{path}: cannot be read ({error}); mend it") from error
    if not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: has a line that is no {{...}} record; mend it")
    return rows


def read_rows(path, args):
    """Return pairs (path of a picture, caption or None) of a table's rows."""
    rows = read_table(path)
    columns = list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))
    if not rows:
        raise InputError(f"{path}: has no rows; give a table of pictures")
    picture = pick_column(columns, args.image_column, PICTURE_COLUMNS, "--image_column", path)
    caption = pick_column(columns, args.caption_column, CAPTION_COLUMNS, "--caption_column", path)
    texts = ((row.get(picture), row.get(caption)) for row in rows)
    return [
        (Path(os.path.normpath(path.parent / str(name or ""))), text if isinstance(text, str) else None)
        for name, text in texts
    ]


def relative_name(path, folder):
    """Return a file's name from its folder; of a file elsewhere only the last part."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def list_folder(folder, args):
    """Return the entries of a folder of pictures, sorted by name."""
    found, captions = set(), {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in PICTURE_SUFFIXES:
                found.add(path)
            elif path.stem == "metadata" and path.suffix in TABLE_SUFFIXES:
                captions |= dict(read_rows(path, args))
    entries = []
    for path in sorted(found | captions.keys()):
        caption, fault, text = captions.get(path), None, path.with_suffix(".txt")
        if caption is None and text.is_file():
            try:
                caption = text.read_text(encoding="utf-8-sig")
            except UnicodeError:
                fault = "caption is not UTF-8"
        entries.append(Entry(relative_name(path, folder), caption, path, fault))
    return entries


def read_files(entries):
    """Yield the bytes of files, or why there are none."""
    for entry in entries:
        try:
            yield entry.place.read_bytes()
        except OSError as error:
            yield LeftOut(error.strerror or "file cannot be read")


def open_dataset(folder, args):
    """Return the source of a folder of the package datasets; its place for a picture is the row."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"--source {folder}: reading it needs datasets; pip install datasets") from error
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    try:
        data = datasets.load_from_disk(str(folder)) if saved else datasets.load_dataset(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"--source {folder}: datasets cannot load it ({error})") from error
    if isinstance(data, dict):
        if args.split not in data:
            raise InputError(f"--split {args.split}: {folder} has {', '.join(data)}; name one of them")
        data = data[args.split]
    known = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    picture = pick_column(data.column_names, args.image_column, known, "--image_column", folder)
    caption = pick_column(data.column_names, args.caption_column, CAPTION_COLUMNS, "--caption_column", folder)
    texts = list(data[caption])
    pictures = data.select_columns([picture]).cast_column(picture, datasets.Image(decode=False))

    def read(entries):
        for entry in entries:
            cell = pictures[entry.place][picture] or {}
            if cell.get("bytes") is not None:
                yield cell["bytes"]
            else:
                yield from read_files([entry._replace(place=Path(cell.get("path") or ""))])

    return [Entry(f"row {i}", text, i) for i, text in enumerate(texts)], read


def draw_prompts(args):
    """Return the source that draws a file of prompts as PNG; its place for a picture is the seed."""
    try:
        lines = args.prompts_file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise InputError(f"--prompts_file {args.prompts_file}: cannot be read ({error})") from error
    entries = [
        Entry(f"prompt {p} image {i}", prompt, random.Random(f"{args.seed} {p} {i}").getrandbits(61))
        for p, prompt in enumerate(line.strip() for line in lines if line.strip())
        for i in range(args.num_images)
    ]
    pipes = []

    def read(wanted):
        if not pipes:
            pipes.append(load_teacher(args))
        from drawing import draw

        for start in range(0, len(wanted), args.batch_size):
            batch = wanted[start : start + args.batch_size]
            prompts, seeds = [entry.caption for entry in batch], [entry.place for entry in batch]
            pictures, _ = draw(
                pipes[0], prompts, args.steps, args.guidance_scale, seeds, resolution=args.resolution
            )
            for picture in pictures:
                flat = all(low == high for low, high in picture.getextrema())
                yield LeftOut("drawn in one colour, as of NaN") if flat else encode_png(picture)

    return entries, read


def encode_png(picture):
    """Return a picture as PNG; modes that PNG does not know become RGB."""
    data = io.BytesIO()
    (picture if picture.mode in PNG_MODES else picture.convert("RGB")).save(data, "PNG")
    return data.getvalue()


def load_teacher(args):
    """Return the pipeline that draws, on this process's device."""
    import drawing  # of this folder
    import torch

    try:
        device = drawing.choose_device(args.device)
        if args.device == "auto" and device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        pipe = drawing.load_teacher(args, device)
    except drawing.InputError as error:
        raise InputError(str(error)) from error
    drawing.set_sampler(pipe, args.sampler)
    return pipe


def open_source(args):
    """Return (entries in the order of the shards, function that yields the bytes of some of them)."""
    path, read = args.source, read_files
    if path is None:
        entries, read = draw_prompts(args)
    elif path.is_file():
        if path.suffix not in TABLE_SUFFIXES:
            raise InputError(f"--source {path}: give a folder or a file of {', '.join(TABLE_SUFFIXES)}")
        entries = [Entry(relative_name(p, path.parent), text, p) for p, text in read_rows(path, args)]
    elif any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        entries, read = open_dataset(path, args)
    else:
        entries = list_folder(path, args)
        if not entries and next(path.rglob("*.parquet"), None):
            entries, read = open_dataset(path, args)
    if not entries:
        raise InputError(f"{path or args.prompts_file}: holds no pictures or prompts; check the path")
    if args.shuffle_seed is not None:
        random.Random(args.shuffle_seed).shuffle(entries)
    return entries, read
