#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Make training shards from your own pictures, a data set of the Hub, or pictures that a teacher draws.

    python scripts/make_shards.py --source pictures --output_dir shards
    python scripts/make_shards.py --dataset_name owner/name --max_samples 20000 --output_dir shards
    accelerate launch scripts/make_shards.py --prompts_file prompts.txt --output_dir shards \\
        --pretrained_teacher_model stable-diffusion-v1-5/stable-diffusion-v1-5

--source is one of
  - a folder of pictures, at any depth: the caption of a.jpg is in a.txt, a.text, a.caption, a.jpg.txt or a.json,
    or in a metadata.csv, .tsv, .jsonl or .parquet (columns file_name and text) of its folder or one above;
  - a .csv, .tsv, .jsonl or .parquet file with a path (from the file's folder) and a caption in each row;
  - a folder of datasets: what save_to_disk wrote, or parquet files that hold the pictures;
  - owner/name of a data set of the Hub, which is streamed; the same as --dataset_name.
Output: 00000.tar onwards with KEY.jpg|png|webp (the bytes of the source; other formats become PNG), KEY.txt,
KEY.json; beside each tar a 00000_stats.json; left_out.jsonl with every picture left out and its cause.
The same command again makes the missing shards; several processes share them.
"""

import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from itertools import count, groupby
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from lib import cli, write_whole

KEPT_FORMATS = {b"\xff\xd8\xff": "jpg", b"\x89PNG\r\n\x1a\n": "png", b"RIFF": "webp"}  # first bytes: suffix
MANIFEST = "make_shards.json"
LEFT_OUT = "left_out.jsonl"
# Flags without an influence on the shards; a run with another value of any other flag must not add to them.
UNRECORDED = ("source", "output_dir", "prompts_file", "device", "cache_dir")


# fmt: off
def parse_args(argv=None):
    parser = cli.ToolParser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--source", metavar="PATH", help="folder, table or data set of pictures")
    what.add_argument("--dataset_name", metavar="NAME", help="data set of the Hub, owner/name")
    what.add_argument("--prompts_file", type=cli.prompts_in, metavar="FILE", help="UTF-8 text, one prompt a line")
    add = parser.add_argument
    add("--output_dir", required=True, type=Path, metavar="DIR", help="folder for the shards")
    add("--samples_per_shard", type=cli.COUNT, default=1000, metavar="N", help="default: %(default)s")
    add("--max_samples", type=cli.COUNT, metavar="N", help="stop after this many pictures (default: all)")
    add("--shuffle_seed", type=int, default=0, metavar="N",
        help="seed of the order; -1 keeps the order of names or rows (default: %(default)s)")
    add("--default_caption", metavar="TEXT",
        help='caption of pictures without one, or with an empty one; may be "" (default: they are left out)')
    add("--caption_extension", metavar="EXT", help="suffix of caption files that is looked for before the usual ones")
    add("--max_side_px", type=cli.COUNT, metavar="PX",
        help="shrink pictures whose longer side is larger; give twice the training resolution or more")
    add("--max_image_pixels", type=cli.COUNT, default=100_000_000, metavar="N", help="leave larger pictures out")
    add("--caption_column", metavar="NAME", help="column of captions (default: text, caption, prompt, ...)")
    add("--image_column", metavar="NAME", help="column of paths or pictures (default: file_name, image, ...)")
    add("--split", default="train", help="split of a data set that has several (default: %(default)s)")
    add("--dataset_config_name", metavar="NAME", help="configuration of a data set that has several")
    add("--dataset_revision", metavar="REV", help="branch, tag or commit of a data set of the Hub")
    cli.add_model_flags(parser, required=False)
    add = parser.add_argument_group("drawing, with --prompts_file").add_argument
    add("--num_images", type=cli.COUNT, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    add("--sampler", choices=("ddim", "dpmsolver++"), default="dpmsolver++", help="default: %(default)s")
    add("--steps", type=int, default=25, metavar="N", help="solver steps, 1 to 1000 (default: %(default)s)")
    add("--guidance_scale", type=cli.GUIDANCE, default=7.5, metavar="G", help="w + 1 (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (default: %(default)s)")
    add("--batch_size", type=cli.COUNT, default=8, metavar="N", help="drawn at a time (default: %(default)s)")
    add("--resolution", type=cli.SIDE_PX, metavar="PX", help="side, a multiple of 8 (default: the model's)")
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto, one GPU a process)")
    args = parser.parse_args(argv)
    cli.refuse(parser, flag_problems(args))
    cli.refuse(parser, cli.folder_problems(args.output_dir))
    if args.source and not Path(args.source).exists():
        args.dataset_name, args.source = args.source, None
    args.source = args.source and Path(os.path.normpath(args.source))
    args.shuffle_seed = None if args.shuffle_seed < 0 else args.shuffle_seed
    return args


def flag_problems(args):
    source, drawn, prompts = args.source, args.pretrained_teacher_model, args.prompts_file
    is_there = not source or Path(source).exists() or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
    return (
        *cli.step_problems([args.steps], [args.sampler]),
        (bool(prompts) != bool(drawn), "--prompts_file and --pretrained_teacher_model: give both, or --source"),
        *(cli.model_problems(args) if drawn else ()),
        (not is_there, f"--source {source}: no such file or folder; check the path"),
        (args.resolution and not prompts, "--resolution: of pictures that are drawn; --max_side_px shrinks others"),
    )
# fmt: on


if __name__ == "__main__":
    ARGS = parse_args()
    try:
        import datasets  # noqa: F401 - it may be missing, which is one line
    except ImportError:
        print("error: reading pictures needs datasets; pip install -r scripts/requirements-data.txt", file=sys.stderr)
        sys.exit(2)
    cli.started(ARGS)

from lib.image_sources import encode_picture, open_source
from lib.pipelines import choose_device, family_of, read_json, writing_alone, writing_to
from lib.trainers import UnusableInput, exit_code, sd15
from PIL import Image
from tqdm import tqdm


def encode_to_fit(data, args):
    """Return (suffix, bytes, (width, height), the original's); raises SkippedSample for damaged or too large ones."""
    suffix = next((suffix for start, suffix in KEPT_FORMATS.items() if data.startswith(start)), None)
    # A JPEG that goes into the shard as it is gets decoded at an eighth of its size: enough to find damage.
    draft_px = (args.max_side_px or 1) if suffix else None
    picture, original = sd15.open_picture(data, args.max_image_pixels, draft_px)
    scale = (args.max_side_px or max(original)) / max(original)
    if scale >= 1 and suffix:
        return suffix, data, original, original
    size = tuple(max(1, round(side * min(scale, 1))) for side in original)
    picture = picture if scale >= 1 else picture.resize(size, Image.Resampling.LANCZOS)
    suffix = "jpg" if suffix == "jpg" else "png"
    return suffix, encode_picture(picture, suffix), size, original


def make_sample(entry, data, args):
    """Return the members {suffix: bytes} of an entry's sample; raises SkippedSample if it is not to be used."""
    if entry.fault:
        raise sd15.SkippedSample(entry.fault)
    caption = (entry.caption or "").strip() or args.default_caption
    if caption is None:
        raise sd15.SkippedSample("no caption" if entry.caption is None else "empty caption")
    if isinstance(data, sd15.SkippedSample):
        raise data
    try:
        text = caption.encode()  # json can hold half a character
    except UnicodeError as error:
        raise sd15.SkippedSample("caption is not UTF-8") from error
    suffix, data, (width, height), original = encode_to_fit(data, args)
    record = {"caption": caption, "width": width, "height": height}
    record |= {"original_width": original[0], "original_height": original[1], "source": entry.name}
    if args.prompts_file:
        record |= {"seed": entry.place, "teacher": Path(args.pretrained_teacher_model).name}
    return {suffix: data, "txt": text, "json": json.dumps(record).encode()}


def write_shard(target, pairs, args, bar):
    """Write (number, entry, picture) as one tar, whole or not at all; return (samples, what was left out and why)."""
    samples, left_out, scratch = 0, [], target.with_name(f".writing-{target.name}")
    with tarfile.open(scratch, "w") as tar:
        for number, (entry, data) in pairs:
            bar.update()
            try:
                members = make_sample(entry, data, args)
            except sd15.SkippedSample as cause:
                left_out.append({"source": entry.name, "cause": str(cause)})
                continue
            samples += 1
            for suffix, content in members.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")  # owner and time: none, so equal bytes
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    if samples:
        os.replace(scratch, target)
    else:
        scratch.unlink()
    return samples, left_out


def describe_run(args, source):
    """Return what the shards depend on; a run with other values must not add to them."""
    settings = {name: value for name, value in vars(args).items() if name not in UNRECORDED}
    if args.prompts_file:
        is_half = choose_device(args.device).type == "cuda"
        settings["teacher_revision"] = args.teacher_revision = family_of(args).check_teacher(args)
        settings["mixed_precision"] = args.mixed_precision or ("fp16" if is_half else "no")
        model = Path(args.pretrained_teacher_model)
        settings["teacher_files"] = [sd15.fingerprint(part) for part in (model, model / "unet") if part.exists()]
    return json.loads(json.dumps(settings)) | {"contents": source.identity}


def check_output(folder, run):
    """Write the manifest of a run; raises UnusableInput where the folder holds shards of another one."""
    manifest = folder / MANIFEST
    old = read_json(manifest)
    if old == run:
        return
    if next(folder.glob("[!.]*.tar"), None):
        changed = [f"{key} was {old.get(key)!r}, is {run[key]!r}" for key in run if old.get(key) != run[key]]
        why = "; ".join(changed) if old else "this tool did not make them"
        raise UnusableInput(f"--output_dir {folder}: holds other shards ({why}); remove them or choose another folder")
    write_whole(manifest, json.dumps(run, indent=1))


def finished(target, digest):
    record = read_json(target.with_name(f"{target.stem}_stats.json"))
    is_whole = record.get("run") == digest and {"samples", "left_out"} <= record.keys()
    return record if is_whole and target.exists() == bool(record["samples"]) else None


def main(args):
    rank, processes = sd15.own_rank(), int(os.environ.get("WORLD_SIZE", 1))
    source = open_source(args)
    run = describe_run(args, source)
    digest = hashlib.sha256(json.dumps(run).encode()).hexdigest()
    total = len(source.entries) if isinstance(source.entries, list) else None
    targets, kept = [], 0
    with writing_to(args.output_dir):  # before the teacher of --prompts_file loads
        check_output(args.output_dir, run)
    with writing_to(args.output_dir), tqdm(total=total, unit="picture", desc="making shards", disable=rank > 0) as bar:
        for part, numbered in groupby(zip(count(), source.entries), lambda pair: pair[0] // args.samples_per_shard):
            target = args.output_dir / f"{part:05d}.tar"
            targets.append(target)
            if record := finished(target, digest):
                kept += bool(record["samples"])
                continue
            if part % processes != rank:
                continue
            pairs = zip(count(part * args.samples_per_shard), source.read(entry for _, entry in numbered))
            with writing_alone(target):
                samples, left_out = write_shard(target, pairs, args, bar)
            record = json.dumps({"run": digest, "samples": samples, "left_out": left_out}, indent=1)
            write_whole(target.with_name(f"{target.stem}_stats.json"), record)
        records = [finished(target, digest) for target in targets]
        if kept:
            bar.write(f"{kept} shards were there already and are kept", file=sys.stderr)
        if None in records:
            return 0  # other processes are still at work; the last one reports
        return report(args, records, source.unread)


def report(args, records, unread):
    rows = [row for record in records for row in record["left_out"]]
    rows += [{"source": name, "cause": cause} for name, cause in unread]
    write_whole(args.output_dir / LEFT_OUT, "".join(json.dumps(row) + "\n" for row in rows))
    causes = Counter(row["cause"] for row in rows)
    text = ", ".join(f"{cause}: {number}" for cause, number in causes.most_common())
    samples = sum(record["samples"] for record in records)
    if not samples:
        hint = "mend them; captions are a.txt beside a.jpg, a column of a table, or --default_caption"
        raise UnusableInput(f"none of {len(rows) - len(unread)} pictures can be used ({text}); {hint}")
    shards = sum(bool(record["samples"]) for record in records)
    print(f"{samples} samples in {shards} shards in {args.output_dir}; left out: {text or 'none'} ({LEFT_OUT})")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, ARGS))
