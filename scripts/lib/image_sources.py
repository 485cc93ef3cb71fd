# SPDX-License-Identifier: Apache-2.0
"""Where make_shards.py gets its pictures: folders, tables, data sets, or a teacher that draws prompts."""

import csv
import glob
import hashlib
import io
import itertools
import json
import os
import random
import re
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import fsspec
import huggingface_hub
import webdataset as wds

from lib.pipelines import LOAD_ERRORS, choose_device, draw, load_teacher, refuse_folder, set_sampler, start_offload
from lib.trainers import UnusableInput, sd15

TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".parquet": "parquet"}  # suffix: builder of datasets
CAPTION_COLUMNS = ("text", "caption", "prompt", "txt", "captions")
PICTURE_COLUMNS = ("file_name", "image", "image_path", "path", "filename", "file", "jpg", "png", "webp", "jpeg")
SHUFFLE_BUFFER = 1000  # samples of a streamed data set that are shuffled among
HUB_FILE = re.compile(r"(zip://[^:]*::)?hf://datasets/[^:]*")
LOCAL_FILE = re.compile(r"(?s)((zip|tar|gzip)://((?!::).)*::)?((file|local):)?(?!\w[\w+.-]+://)((?!::).)+")
csv.field_size_limit(2**31 - 1)  # pandas, which reads the table, has none
datasets.logging.set_verbosity(datasets.logging.CRITICAL)
datasets.disable_progress_bars()


class Entry(NamedTuple):
    """One picture to come: `place` is its file, its cell in a data set, or the seed of its noise."""

    name: str
    caption: str | None
    place: Any
    fault: str | None = None


class Source(NamedTuple):
    """`read` yields (entry, encoded picture or SkippedSample) for some of the entries, in their order."""

    entries: Any  # a list; of a stream an iterator
    read: Any
    identity: str  # changes when the data do
    unread: list = []  # (name, cause) of files that this tool does not read


def csv_options(path, args):
    """Return the options of datasets' csv builder for a table: its delimiter, and every column as text."""
    known = {args.image_column, args.caption_column, *PICTURE_COLUMNS, *CAPTION_COLUMNS}
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = list(itertools.islice(file, 100))
    parsed = {sign: [*filter(None, csv.reader(head, delimiter=sign)), [], []][:2] for sign in ",;\t|"}
    sign = max(parsed, key=lambda sign: (len(known & {*parsed[sign][0]}), len(parsed[sign][0])))
    columns, row = parsed[sign]
    if len(row) > len(columns):  # pandas would shift the columns
        raise ValueError("its first row has more fields than its header; put captions with commas in quotes")
    features = datasets.Features({name: datasets.Value("string") for name in columns if name})
    # A caption may begin with a quote in a TSV whose quotes enclose no cell.
    is_bare = sign == "\t" and '\t"' in (text := "".join(head)) and not re.search(r'(?m)\t"([^"]|"")*"(\t|\r?$)', text)
    quoting = csv.QUOTE_NONE if is_bare else csv.QUOTE_MINIMAL
    return dict(sep=sign, features=features, quoting=quoting, keep_default_na=False, encoding="utf-8-sig")


@lru_cache
def commit_of(name, revision):
    """Return the commit of a data set of the Hub, so that a run goes on with the data that it began with."""
    return huggingface_hub.dataset_info(name, revision=revision).sha


def load_data(path, args):
    """Return what the package datasets makes of a table, a folder or, without a path, --dataset_name."""
    if path is None:
        options = {"revision": commit_of(args.dataset_name, args.dataset_revision), "streaming": True}
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name, **options)
    if path.is_dir():
        if is_saved(path):
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path), args.dataset_config_name, streaming=True)
    kind = TABLES[path.suffix.lower()]
    if kind == "json":  # whose builder takes each column's type from the first 10 MB, and refuses a row of another
        lines = partial(path.open, encoding="utf-8-sig")
        return datasets.IterableDataset.from_generator(lambda: (dict(json.loads(x)) for x in lines() if x.strip()))
    options = csv_options(path, args) if kind == "csv" else {}
    return datasets.load_dataset(kind, data_files={args.split: glob.escape(str(path))}, streaming=True, **options)


def is_saved(folder):
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def read_rows(path, args):
    """Yield (picture cell, caption or None) of a table or data set; raises UnusableInput where it cannot be read."""
    where = f"--dataset_name {args.dataset_name}" if path is None else str(path)
    try:
        data = load_data(path, args)
        if isinstance(data, dict):
            if args.split not in data:
                raise UnusableInput(f"--split {args.split}: {where} has {', '.join(data)}; name one of them")
            data = data[args.split]
        data = data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data
        # Undecoded: Pillow would open pictures of every format, and start Ghostscript for EPS.
        data = data.decode(False) if data.features else data
        kinds = data.features or dict.fromkeys(itertools.chain.from_iterable(itertools.islice(data, 10_000)))
        known = [name for name in PICTURE_COLUMNS if re.match(r"Image|Value\('\w*bin|{'bytes'", repr(kinds.get(name)))]
        known += [name for name, kind in kinds.items() if isinstance(kind, datasets.Image)]  # `conditioning_image`
        picture = pick_column(kinds, args.image_column, [*known, *PICTURE_COLUMNS], "--image_column", where)
        caption = pick_column(kinds, args.caption_column, CAPTION_COLUMNS, "--caption_column", where)
        names = {str(number): name for number, name in enumerate(getattr(kinds[caption], "names", ()))}  # ClassLabel's
        for row in data.select_columns([picture, caption]) if data.features else data:
            cells = [(row.get(name), kinds[name]) for name in (picture, caption)]
            cell, texts = (json.loads(c) if c and isinstance(kind, datasets.Json) else c for c, kind in cells)
            texts = texts if isinstance(texts, list) else [names.get(str(texts), texts)]
            yield cell, max((text for text in texts if isinstance(text, str)), key=sd15.is_filled, default=None)
    except (*LOAD_ERRORS, csv.Error) as error:
        why = " ".join(str(error).split())[:240] or type(error).__name__
        raise UnusableInput(f"{where}: cannot be read ({why}); mend it, or check name, network and access") from error


def pick_column(columns, asked, known, flag, where):
    """Return the column that a flag names, or else the first known one; raises UnusableInput without either."""
    found = next((name for name in ([asked] if asked else known) if name in columns), None)
    if found is None:
        raise UnusableInput(f"{where}: has the columns {', '.join(columns) or 'of no row'}; name one with {flag}")
    return found


def open_rows(path, args):
    """Return the source of a table or data set: a list where cells are paths, else a stream."""
    head, rows = [], read_rows(path, args)
    for row in itertools.islice(rows, 10_000):
        head.append(row)
        if row[0] is not None:  # it tells what the cells are
            break
    if not head:
        raise UnusableInput(f"{path or args.dataset_name}: has no rows; give a table of pictures")
    rows, first = itertools.chain(head, rows), head[-1]
    if isinstance(first[0], str) or (first[0] is None and path and path.suffix.lower() in (".csv", ".tsv", ".jsonl")):
        if path is None or path.is_dir():
            what = f"its pictures are addresses or paths, such as {sd15.masked(first[0])[:60]!r}"
            raise UnusableInput(f"{path or args.dataset_name}: {what}; download them with img2dataset")
        return list_source([file_entry(cell, text, path.parent) for cell, text in rows])
    entries = (cell_entry(n, cell, text, is_remote=path is None) for n, (cell, text) in enumerate(rows))
    if args.shuffle_seed is not None:
        order = random.Random(args.shuffle_seed)
        entries = wds.shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER, rng=order)(entries)
    if path is None:
        identity = [args.dataset_name, args.dataset_config_name, commit_of(args.dataset_name, args.dataset_revision)]
    else:
        files = sorted(file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        identity = [(relative_name(file, path), file.stat().st_size) for file in files if file.name[0] != "."]
    return Source(iter(entries), read_places, hashlib.sha256(json.dumps(identity).encode()).hexdigest())


def cell_entry(number, cell, caption, is_remote):
    """Return the entry of a data set's row; one of the Hub may name its own files, and none of this machine."""
    place = cell if isinstance(cell, dict) else {"bytes": cell if isinstance(cell, bytes) else None}
    path = place.get("path") or ""
    is_wrong = place.get("bytes") is None and not (HUB_FILE if is_remote else LOCAL_FILE).fullmatch(path)
    name = sd15.masked(f"row {number} {path.rpartition('/')[2]}".strip())
    return Entry(name, caption, place, "row without a picture of this data set" if is_wrong else None)


def file_entry(cell, caption, folder):
    cell = cell if isinstance(cell, str) else ""
    if "://" in cell:
        return Entry(sd15.masked(cell), caption, None, "picture is an address; download it with img2dataset")
    path = Path(os.path.normpath(folder / cell))
    return Entry(relative_name(path, folder), caption, path)


def relative_name(path, folder):
    """Return a file's name from its folder; of a file elsewhere only the last part."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def list_folder(folder, args):
    asked = [args.caption_extension.lower().lstrip(".")] if args.caption_extension else []
    suffixes = [*asked, *sd15.CAPTION_SUFFIXES, "json"]
    pictures, texts, captions, unread = set(), {}, {}, []
    for path in sd15.files_below(folder, refuse_folder):
        suffix = path.suffix.lower().lstrip(".")
        if suffix in sd15.IMAGE_SUFFIXES:
            pictures.add(path)
        elif path.stem == "metadata" and path.suffix.lower() in TABLES:
            own = {}  # a picture may have several
            for entry in (file_entry(cell, text, path.parent) for cell, text in read_rows(path, args)):
                own.setdefault(entry.place, []).append(entry.caption)
            captions |= {place: each for place, each in own.items() if place}
        elif suffix in suffixes:
            texts[path.with_suffix(""), suffix] = path
        else:
            unread.append((relative_name(path, folder), why_unread(suffix)))
    entries = []
    for path, caption in [(p, each) for p in sorted(pictures | captions.keys()) for each in captions.get(p, [None])]:
        beside = (texts.get((stem, suffix)) for suffix in suffixes for stem in (path.with_suffix(""), path))
        found = [(caption, None)] * (caption is not None)
        ours, rest = itertools.tee(itertools.chain(found, map(read_caption, filter(None, beside))))
        caption, fault = next((one for one in rest if sd15.is_filled(one[0] or "")), next(ours, (None, None)))
        entries.append(Entry(relative_name(path, folder), caption, path, fault))
    return list_source(entries, sorted(unread))


def why_unread(suffix):
    if f".{suffix}" in TABLES:
        return f".{suffix} tables are read where they are named metadata.{suffix}, or as --source FILE"
    if suffix == "tar":
        return "tars are shards already; give them to the training script"
    return f".{suffix} files are not read; pictures can be converted to PNG or JPEG, captions: --caption_extension"


def read_caption(path):
    """Return (caption or None, fault or None) of a file beside a picture, as the training scripts read it."""
    suffix = "json" if path.suffix.lower() == ".json" else "txt"
    try:
        sample = {suffix: path.read_bytes()}
        metadata = sd15.metadata_of(sample)
        return (metadata.get("caption") if suffix == "json" else sd15.caption_of(sample, metadata)), None
    except (sd15.SkippedSample, OSError) as cause:
        return None, getattr(cause, "strerror", None) or str(cause)


def list_source(entries, unread=()):
    is_file = [isinstance(entry.place, Path) and os.path.isfile(entry.place) for entry in entries]
    sizes = [entry.place.stat().st_size if known else 0 for entry, known in zip(entries, is_file, strict=True)]
    identity = [(entry.name, entry.caption, size) for entry, size in zip(entries, sizes, strict=True)]
    return Source(entries, read_places, hashlib.sha256(json.dumps(identity).encode()).hexdigest(), list(unread))


def read_places(entries):
    """Yield entries with the bytes of their pictures, or with the cause for which there are none."""
    for entry in entries:
        try:
            yield entry, None if entry.fault else read_place(entry.place)
        except Exception as error:  # of a zip for one: zlib.error, BadZipFile, of a method that is unknown
            # A network that fails would leave out every picture after this one.
            is_of_network = isinstance(error, LOAD_ERRORS) and not isinstance(error, FileNotFoundError)
            if is_of_network and isinstance(entry.place, dict) and HUB_FILE.fullmatch(entry.place["path"] or ""):
                raise UnusableInput(f"{entry.name}: cannot be read ({error}); run again to go on") from error
            yield entry, sd15.SkippedSample(getattr(error, "strerror", None) or "file cannot be read")


def read_place(place):
    if isinstance(place, Path):
        if place.exists() and not place.is_file():  # reading a FIFO would wait
            raise OSError("no regular file")
        return place.read_bytes()
    if place.get("bytes") is not None:
        return place["bytes"]
    with fsspec.open(place["path"], "rb") as file:
        return file.read()


def draw_prompts(args):
    """Return the source that draws a file of prompts as PNG; the noise is a function of --seed and both numbers."""
    entries = [
        Entry(f"prompt {p} image {i}", prompt, random.Random(f"{args.seed} {p} {i}").getrandbits(61))
        for p, prompt in enumerate(args.prompts_file)
        for i in range(args.num_images)
    ]
    pipes = []

    def read(wanted):
        if not pipes:
            device = choose_device(args.device)
            pipes.append(load_teacher(args, device))
            start_offload(pipes[0], args, device)
            set_sampler(pipes[0], args.sampler)
        wanted = iter(wanted)
        while batch := list(itertools.islice(wanted, args.batch_size)):
            settings = (args.steps, args.guidance_scale, [entry.place for entry in batch])
            drawn, _ = draw(pipes[0], [entry.caption for entry in batch], *settings, resolution=args.resolution)
            for entry, picture in zip(batch, drawn, strict=True):
                is_flat = all(low == high for low, high in picture.getextrema())
                cause = sd15.SkippedSample("drawn in one colour, as of NaN")
                yield entry, cause if is_flat else encode_picture(picture, "png")

    return list_source(entries)._replace(read=read)


def encode_picture(picture, suffix):
    data = io.BytesIO()
    picture.save(data, "PNG" if suffix == "png" else "JPEG", quality=95, subsampling=0)
    return data.getvalue()


def open_source(args):
    path = args.source
    if args.prompts_file:
        source = draw_prompts(args)
    elif path and path.is_dir():
        source = list_folder(path, args)
        if not source.entries and (is_saved(path) or next(path.rglob("*.parquet"), None)):
            source = open_rows(path, args)
    elif path and path.suffix.lower() not in TABLES:
        raise UnusableInput(f"--source {path}: give a folder, a data set, or a file of {', '.join(TABLES)}")
    else:
        source = open_rows(path, args)
    entries = source.entries
    if entries == []:
        hint = ", ".join(sorted({cause for _, cause in source.unread})) or "no file"
        raise UnusableInput(f"{path or args.prompts_file}: holds no pictures or prompts ({hint}); check the path")
    if isinstance(entries, list):
        if args.shuffle_seed is not None:
            random.Random(args.shuffle_seed).shuffle(entries)
        return source._replace(entries=entries[: args.max_samples])
    return source._replace(entries=itertools.islice(entries, args.max_samples))
