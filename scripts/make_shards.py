#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make training shards from your own pictures, or from pictures that a teacher draws for a file of prompts.

    python scripts/make_shards.py --source pictures --output_dir shards
    accelerate launch scripts/make_shards.py --prompts_file prompts.txt --output_dir shards \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5

--source is one of
  - a folder of pictures, at any depth: the caption of a.jpg is in a.txt, or in a metadata.jsonl, .csv or
    .parquet with the columns file_name and text (ImageFolder of datasets), in its folder or one above;
  - a .csv, .tsv, .jsonl or .parquet file with a path (from the file's folder) and a caption in each row;
  - a folder of datasets: what save_to_disk wrote, or parquet files that hold the pictures.
Output: 00000.tar onwards with KEY.jpg|png|webp (the bytes of the source; other formats become PNG), KEY.txt,
KEY.json; beside each tar a 00000_stats.json with counts of what was left out; make_shards.json.
The order is that of the sorted names, or of the rows. The same command again makes the missing shards;
several processes share them. A drawn picture is a function of (--seed, its prompt's number, its own number).
Exit codes: 0 done, 2 wrong usage or unusable input, 1 anything else.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

KEPT_FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # Pillow's name: suffix in a shard
MANIFEST = "make_shards.json"
DRAWING = "pretrained_teacher_model teacher_revision variant teacher_config num_images sampler steps "
DRAWING += "guidance_scale seed resolution mixed_precision batch_size"


def build_parser():
    """Return the parser of the command line."""
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = cli.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", type=Path, metavar="PATH", help="folder or table of pictures")
    what.add_argument("--prompts_file", type=Path, metavar="FILE", help="UTF-8 text, one prompt a line")
    add = cli.add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add("--samples_per_shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    add("--shuffle_seed", type=int, metavar="N", help="shuffle with this seed (default: sorted)")
    text = 'caption of pictures without one, or with an empty one; may be "" (default: they are left out)'
    add("--default_caption", metavar="TEXT", help=text)
    add("--max_image_pixels", type=int, default=100_000_000, metavar="N", help="leave larger pictures out")
    text = "column of captions (default: text, caption or prompt)"
    add("--caption_column", metavar="NAME", help=text)
    add("--image_column", metavar="NAME", help="column of paths or pictures (default: file_name, image, ...)")
    add("--split", default="train", help="split of a data set that has several (default: %(default)s)")
    add = cli.add_argument_group("drawing, with --prompts_file").add_argument
    text = "diffusers folder, Hub id, or one .safetensors or .ckpt file (SD 1.x, SD 2.x, SDXL)"
    add("--pretrained_teacher_model", metavar="MODEL", help=text)
    add("--teacher_config", metavar="MODEL", help="folder or Hub id of one file's configs (default: by Hub)")
    add("--teacher_revision", metavar="REV", help="branch, tag or commit of a Hub id (default: main)")
    add("--variant", help="weight files of a folder or Hub id, such as fp16 (default: the plain ones)")
    add("--num_images", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add("--sampler", choices=("ddim", "dpmsolver++"), default="dpmsolver++", help="default: %(default)s")
    add("--steps", type=int, default=25, metavar="N", help="solver steps, 1 to 1000 (default: %(default)s)")
    add("--guidance_scale", type=float, default=7.5, metavar="G", help="w + 1 (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    add("--batch_size", type=int, default=8, metavar="N", help="drawn at a time (default: %(default)s)")
    add("--resolution", type=int, metavar="PX", help="side, a multiple of 8 (default: the model's)")
    add("--mixed_precision", choices=("no", "fp16", "bf16"), help="default: fp16 on cuda, else no")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto, one GPU a process)")
    return cli


def parse_args(argv=None):
    """Return the checked command line; a wrong one exits with 2."""
    cli = build_parser()
    args = cli.parse_args(argv)
    for name in ("samples_per_shard", "max_image_pixels", "num_images", "batch_size", "resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            cli.error(f"--{name} {value}: must be at least 1")
    if not 1 <= args.steps <= 1000 or math.ceil(1000 / (1000 / args.steps)) != args.steps:
        cli.error(f"--steps {args.steps}: diffusers makes no such schedule; give another of 1 to 1000")
    if args.resolution and args.resolution % 8:
        cli.error(f"--resolution {args.resolution}: must be a multiple of 8")
    if not 0 <= args.guidance_scale <= 100:
        cli.error(f"--guidance_scale {args.guidance_scale}: must be in 0 to 100")
    if bool(args.prompts_file) != bool(args.pretrained_teacher_model):
        cli.error("--prompts_file and --pretrained_teacher_model: give both, or --source")
    for name in ("source", "prompts_file"):
        path = getattr(args, name)
        if path and not path.exists():
            cli.error(f"--{name} {path}: no such file or folder; check the path")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        cli.error(f"--output_dir {args.output_dir}: is a file, give a folder")
    args.source = args.source and Path(os.path.normpath(args.source))
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the imports below

from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

Image.MAX_IMAGE_PIXELS = None  # --max_image_pixels is the limit, looked at before a picture is decoded

sys.path.insert(0, str(Path(__file__).parent))
from picture_sources import InputError, LeftOut, encode_png, open_source


def encode(data, args):
    """Return (suffix, bytes for the shard, upright (width, height)) of an encoded picture.

    Raises:
        LeftOut: it cannot be decoded to its end, or has more pixels than --max_image_pixels.
    """
    try:
        picture = Image.open(io.BytesIO(data))
        size = picture.size
        if size[0] * size[1] > args.max_image_pixels:
            raise LeftOut("more pixels than --max_image_pixels")
        if picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # stored on its side
            size = size[::-1]
        picture.draft("RGB", (1, 1))  # JPEG: all of it is read, but decoded at an eighth of the size
        picture.load()
        suffix = KEPT_FORMATS.get(picture.format)
        if suffix is None:
            picture = ImageOps.exif_transpose(picture)
            suffix, data, size = "png", encode_png(picture), picture.size
        return suffix, data, size
    except LeftOut:
        raise
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise LeftOut("picture cannot be decoded") from error


def make_sample(entry, data, args):
    """Return the members {suffix: bytes} of an entry's sample; raises LeftOut if it is not to be used."""
    if entry.fault:
        raise LeftOut(entry.fault)
    caption = (entry.caption or "").strip() or args.default_caption
    if caption is None:
        raise LeftOut("no caption" if entry.caption is None else "empty caption")
    if isinstance(data, LeftOut):
        raise data
    try:
        text = caption.encode()  # json can hold half a character
    except UnicodeError as error:
        raise LeftOut("caption is not UTF-8") from error
    suffix, data, (width, height) = encode(data, args)
    record = {"caption": caption, "width": width, "height": height}
    record |= {"original_width": width, "original_height": height, "source": entry.name}
    if args.prompts_file:
        record |= {"seed": entry.place, "teacher": Path(args.pretrained_teacher_model).name}
    return {suffix: data, "txt": text, "json": json.dumps(record).encode()}


def write_shard(target, first, entries, read, args, bar):
    """Write the samples of some entries as one tar, whole or not at all; return causes, counted.

    The key of a sample is its entry's number, counted from `first`. A tar without samples is not kept.
    """
    left_out, scratch = Counter(), target.with_name(f".writing-{target.name}")
    with tarfile.open(scratch, "w") as tar:
        for number, (entry, data) in enumerate(zip(entries, read(entries), strict=True), first):
            bar.update()
            try:
                members = make_sample(entry, data, args)
            except LeftOut as cause:
                left_out[str(cause)] += 1
                continue
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")  # owner and time: none, so equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if left_out.total() < len(entries):
        os.replace(scratch, target)
    else:
        scratch.unlink()
    return left_out


def write_json(path, record):
    """Write a record, whole or not at all; processes may do it at the same time."""
    scratch = path.with_name(f".writing-{os.getpid()}-{path.name}")
    scratch.write_text(json.dumps(record, indent=1), encoding="utf-8")
    os.replace(scratch, path)


def describe_run(args, entries):
    """Return what the shards depend on; a run with other values must not add to them."""
    names = "samples_per_shard shuffle_seed default_caption max_image_pixels ".split()
    names += DRAWING.split() if args.prompts_file else []
    settings = {name: getattr(args, name) for name in names}
    digest = hashlib.sha256()
    for entry in entries:
        is_file = isinstance(entry.place, Path) and entry.place.is_file()
        size = entry.place.stat().st_size if is_file else None
        digest.update(json.dumps([entry.name, entry.caption, size]).encode())
    return settings | {"pictures": len(entries), "contents": digest.hexdigest()}


def check_output(folder, run):
    """Write the manifest of a run; raises InputError where the folder holds shards of another one."""
    manifest = folder / MANIFEST
    old = json.loads(manifest.read_text(encoding="utf-8")) if manifest.exists() else {}
    if old == run:
        return
    if next(folder.glob("[!.]*.tar"), None):
        changed = [f"{key} was {old.get(key)!r}, is {run[key]!r}" for key in run if old.get(key) != run[key]]
        why = "; ".join(changed) if old else "this tool did not make them"
        raise InputError(
            f"--output_dir {folder}: holds other shards ({why}); remove them or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(manifest, run)


def finished(target, run):
    """Return the counts of a shard's samples by fate, or None if the shard is not finished."""
    stats = target.with_name(f"{target.stem}_stats.json")
    if not stats.exists():
        return None
    record = json.loads(stats.read_text(encoding="utf-8"))
    if record.pop("run") != run or target.exists() != bool(record["samples"]):
        return None
    return record


def main(args):
    """Make the shards that are not there yet; return the exit code."""
    rank, processes = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    entries, read = open_source(args)
    run = describe_run(args, entries)
    check_output(args.output_dir, run)
    size = args.samples_per_shard
    firsts = {args.output_dir / f"{n // size:05d}.tar": n for n in range(0, len(entries), size)}
    missing = [target for target in [*firsts][rank::processes] if finished(target, run["contents"]) is None]
    parts = {target: entries[firsts[target] : firsts[target] + size] for target in missing}
    total = sum(len(part) for part in parts.values())
    with tqdm(total=total, unit="picture", desc="making shards", disable=rank > 0) as bar:
        for target, part in parts.items():
            left_out = write_shard(target, firsts[target], part, read, args, bar)
            samples = len(part) - left_out.total()
            record = {"run": run["contents"], "samples": samples, "left_out": dict(left_out)}
            write_json(target.with_name(f"{target.stem}_stats.json"), record)
    records = [finished(target, run["contents"]) for target in firsts]
    if None in records:
        return 0  # other processes are still at work; the last one reports
    return report(args, records)


def report(args, records):
    """Print what the shards hold and what was left out; return the exit code."""
    samples = sum(record["samples"] for record in records)
    left_out = sum((Counter(record["left_out"]) for record in records), Counter())
    causes = ", ".join(f"{cause}: {count}" for cause, count in left_out.most_common())
    if not samples:
        hint = "mend them; captions are a.txt beside a.jpg, a column of a table, or --default_caption"
        print(f"error: none of {left_out.total()} pictures can be used ({causes}); {hint}", file=sys.stderr)
        return 2
    shards = sum(bool(record["samples"]) for record in records)
    print(f"{samples} samples in {shards} shards in {args.output_dir}; left out: {causes or 'none'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(ARGS))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
