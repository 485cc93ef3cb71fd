"""Shards from every kind of source: whole, in order, resumed, never mixed; and the trainer takes them."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import defaultdict

import numpy as np
import pytest
from conftest import ENVIRONMENT, ROOT, SIDE, flags, launch, load_script, picture_bytes
from PIL import Image

SCRIPT = "scripts/make_shards.py"


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


@pytest.fixture(scope="module")
def tool():
    return load_script(SCRIPT)


def make(tool, tmp_path, source, out="shards", **changes):
    """Run the tool in this process; return (exit code or what was raised, output folder)."""
    line = ["--output_dir", str(tmp_path / out)] + (["--source", str(source)] if source else [])
    for name, value in changes.items():
        line += [f"--{name}", str(value)]
    return tool.main(tool.parse_args(line)), tmp_path / out


def read_all(folder):
    """Return the samples of all shards in order: members by suffix, json decoded."""
    samples = defaultdict(dict)
    for path in sorted(folder.glob("[!.]*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                samples[key][suffix] = tar.extractfile(member).read()
    return [sample | {"json": json.loads(sample["json"])} for sample in samples.values()]


def read_shards(folder):
    """Return {source name: members by suffix} of all shards, in order."""
    return {sample["json"]["source"]: sample for sample in read_all(folder)}


def captions(folder):
    return {name: sample["txt"].decode() for name, sample in read_shards(folder).items()}


def contents(folder):
    """Return {name: bytes} of what a run leaves, hidden files included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_pictures(folder, count, suffix="png", text=True):
    """Write numbered pictures, with captions beside them if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03d}.{suffix}").write_bytes(picture_bytes(i))
        if text:
            (folder / f"{i:03d}.txt").write_text(f"sea {i}\n", encoding="utf-8")
    return folder


def encode(picture, kind, **options):
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


# ----------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_captions_beside_the_pictures(tool, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 3)
    write_pictures(folder / "b.c" / "deep", 2, suffix="PNG")
    write_pictures(folder / ".trash", 2)
    (folder / "._000.png").write_bytes(b"left by macOS")
    (folder / "notes.md").write_text("no picture")
    code, out = make(tool, tmp_path, folder, samples_per_shard=2)
    expected = {f"00{i}.png": f"sea {i}" for i in range(3)} | {
        f"b.c/deep/00{i}.PNG": f"sea {i}" for i in (0, 1)
    }
    assert code == 0 and captions(out) == expected and list(captions(out)) == sorted(expected)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert "5 samples in 3 shards" in capsys.readouterr().out
    first = read_shards(out)["001.png"]
    assert first["png"] == picture_bytes(1), "the bytes of the source"
    assert first["json"] == {
        "caption": "sea 1", "width": SIDE, "height": SIDE, "original_width": SIDE, "original_height": SIDE,
        "source": "001.png",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["text", "caption", "Beschreibung"])
def test_a_folder_with_metadata_as_imagefolder_has_it(tool, tmp_path, kind, column):
    folder = write_pictures(tmp_path / "in", 3, text=False)
    write_pictures(folder / "train", 2, text=False)
    rows = [{"file_name": f"00{i}.png", column: f"hill, {i}"} for i in range(3)]
    write_table(folder / f"metadata.{kind}", rows)
    write_table(folder / "train" / f"metadata.{kind}", rows[:2])
    changes = {"caption_column": column} if column == "Beschreibung" else {}
    _, out = make(tool, tmp_path, folder, **changes)
    expected = {row["file_name"]: row[column] for row in rows}
    assert captions(out) == expected | {f"train/00{i}.png": f"hill, {i}" for i in (0, 1)}


def write_table(path, rows):
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow", reason="parquet needs the package pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            dialect = csv.excel_tab if path.suffix == ".tsv" else csv.excel
            writer = csv.DictWriter(file, rows[0], dialect=dialect)
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_a_table_of_files_in_its_own_order(tool, tmp_path, kind):
    folder = write_pictures(tmp_path / "in", 3, text=False)
    elsewhere = write_pictures(tmp_path / "private" / "home", 1, text=False)
    names = ["002.png", "./000.png", str(folder / "001.png"), str(elsewhere / "000.png")]
    rows = [{"score": str(i), "image": name, "caption": f"sée\n{i}"} for i, name in enumerate(names)]
    write_table(folder / f"list.{kind}", rows)
    _, out = make(tool, tmp_path, folder / f"list.{kind}")
    samples = read_all(out)
    assert [sample["txt"].decode() for sample in samples] == [f"sée\n{i}" for i in range(4)]
    assert [sample["png"] for sample in samples] == [picture_bytes(i) for i in (2, 0, 1, 0)]
    sources = [sample["json"]["source"] for sample in samples]
    assert sources == ["002.png", "000.png", "001.png", "000.png"], "no path of this machine"


@pytest.mark.parametrize("layout", ["saved", "saved splits", "parquet", "saved paths"])
def test_a_folder_of_datasets(tool, tmp_path, layout, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [{"bytes": picture_bytes(i), "path": None} for i in range(5)]
    if layout == "saved paths":
        pictures = [str(path) for path in sorted(write_pictures(tmp_path / "p", 5).glob("*.png"))]
    columns = {"id": list(range(5)), "photo": pictures, "text": [f"sea {i}" for i in range(5)]}
    kinds = {"id": "int64", "photo": datasets.Image(), "text": "string"}
    features = datasets.Features(
        {k: datasets.Value(v) if isinstance(v, str) else v for k, v in kinds.items()}
    )
    data = datasets.Dataset.from_dict(columns, features)
    if layout == "parquet":
        (tmp_path / "in" / "data").mkdir(parents=True)
        data.to_parquet(str(tmp_path / "in" / "data" / "train-00000-of-00001.parquet"))
    else:
        (datasets.DatasetDict({"train": data}) if layout == "saved splits" else data).save_to_disk(
            tmp_path / "in"
        )
    _, out = make(tool, tmp_path, tmp_path / "in", samples_per_shard=2)
    samples = read_all(out)
    assert [sample["txt"].decode() for sample in samples] == columns["text"]
    assert [sample["png"] for sample in samples] == [picture_bytes(i) for i in range(5)]
    if layout == "saved splits":
        with pytest.raises(ValueError, match="--split test: .* has train"):
            make(tool, tmp_path, tmp_path / "in", out="other", split="test")


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "list.parquet"), ("datasets", "saved")])
def test_an_optional_package_that_is_missing_is_named(tool, tmp_path, monkeypatch, package, source):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").touch()
    (tmp_path / "list.parquet").touch()
    with pytest.raises(ValueError, match=f"{source}.*pip install {package}"):
        make(tool, tmp_path, tmp_path / source)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file_name,words\n0.png,sea\n", "columns file_name, words; name one with --caption_column"),
        ("a.csv", "picture,text\n0.png,sea\n", "columns picture, text; name one with --image_column"),
        ("a.csv", "", "no rows"),
        ("a.jsonl", '{"file_name": "0.png", "text": "sea"}\n{"file_na', "cannot be read"),
        ("a.jsonl", "[1]\n", "no {...} record"),
        ("a.parquet", "no parquet", "(cannot be read|reading parquet needs)"),
        ("a.docx", "", "give a folder or a file of .csv"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tool, tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name}.*{message.replace('{...}', '.*')}"):
        make(tool, tmp_path, tmp_path / name)
    assert not (tmp_path / "shards").exists()


# ----------------------------------------------------------------------------------------------------------
# What is left out
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path):
    """Four good pictures, and one of each kind that is left out."""
    folder = write_pictures(tmp_path / "damaged", 4)
    whole = encode(Image.effect_noise((300, 300), 90).convert("RGB"), "JPEG")
    for name, data in {
        "a.jpg": b"garbage", "b.jpg": whole[: len(whole) // 2], "c.png": b"", "large.png": encode(
            Image.new("RGB", (400, 300)), "PNG"
        ), "bare.png": picture_bytes(1), "empty.png": picture_bytes(1), "latin.png": picture_bytes(1),
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)
        if name != "bare.png":
            (folder / name).with_suffix(".txt").write_bytes(
                {"empty.png": b" \n", "latin.png": b"caf\xe9"}.get(name, b"sea")
            )
    rows = [{"file_name": "gone.png", "text": "x"}, {"file_name": "003.png", "text": "half \ud83d"}]
    write_table(folder / "metadata.jsonl", rows)
    return folder


def test_what_is_left_out_is_counted_by_cause(tool, tmp_path, damaged, capsys):
    code, out = make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
    line = capsys.readouterr().out
    assert code == 0 and list(captions(out)) == ["000.png", "001.png", "002.png"]
    for cause in (
        "picture cannot be decoded: 3", "more pixels than --max_image_pixels: 1", "no caption: 1",
        "empty caption: 1", "caption is not UTF-8: 2", "No such file or directory: 1",
    ):  # fmt: skip
        assert cause in line
    make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
    assert capsys.readouterr().out == line, "the counts of finished shards are kept"


def test_pictures_without_a_caption_can_be_kept(tool, tmp_path, damaged, capsys):
    _, out = make(tool, tmp_path, damaged, default_caption="a photo", out="a")
    assert captions(out)["bare.png"] == captions(out)["empty.png"] == "a photo"
    assert captions(out)["001.png"] == "sea 1"
    _, out = make(tool, tmp_path, damaged, default_caption="", out="b")
    assert captions(out)["bare.png"] == captions(out)["empty.png"] == ""
    assert "caption is not UTF-8: 2" in capsys.readouterr().out


def test_a_source_without_a_usable_picture_is_an_error(tool, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 3, text=False)
    code, out = make(tool, tmp_path, folder)
    assert code == 2 and not list(out.glob("*.tar"))
    assert "none of 3 pictures can be used (no caption: 3)" in capsys.readouterr().err
    write_pictures(folder, 3)
    assert make(tool, tmp_path, folder)[0] == 0, "once mended, the same folder is used"
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="nothing: holds no pictures"):
        make(tool, tmp_path, tmp_path / "nothing")


# ----------------------------------------------------------------------------------------------------------
# The trainer takes them
# ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_picture_trains(tool, trainer, tmp_path):
    folder = write_pictures(tmp_path / "in", 2)
    upright = Image.effect_noise((80, 50), 60).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    grey = upright.convert("L")
    kinds = {
        "x.jpg": encode(upright, "JPEG"), "x-turned.jpg": encode(turned, "JPEG", exif=exif, quality=95),
        "x.webp": encode(upright, "WEBP"), "x.bmp": encode(upright, "BMP"), "x.gif": encode(upright, "GIF"),
        "x-cmyk.tif": encode(upright.convert("CMYK"), "TIFF"),
        "x-16.tif": encode(grey.convert("I;16"), "TIFF"),
        "x-turned.tif": encode(turned, "TIFF", exif=exif), "x-float.tif": encode(grey.convert("F"), "TIFF"),
        "x-alpha.webp": encode(upright.convert("RGBA"), "WEBP", lossless=True),
    }  # fmt: skip
    for name, data in kinds.items():
        (folder / name).write_bytes(data)
    _, out = make(tool, tmp_path, folder, default_caption="plain")
    samples = read_shards(out)
    assert len(samples) == 2 + len(kinds)
    for name, sample in samples.items():
        record, suffix = sample["json"], next(s for s in ("jpg", "png", "webp") if s in sample)
        kept = name.rpartition(".")[2] in ("jpg", "png", "webp")
        assert (sample[suffix] == (folder / name).read_bytes()) == kept
        if name.startswith("x"):
            assert (record["width"], record["height"]) == (80, 50), f"{name}: the upright size"
    args = trainer.parse_args(
        flags("a/teacher", str(out), "unused", min_image_side_px=32, require_metadata=True)
    )
    shards = trainer.list_shards([str(out)])
    _, report, _ = trainer.audit(shards, args)
    assert report.endswith(f"of the first {len(samples)} samples {len(samples)} can be used")
    raw = {sample["__key__"]: sample for shard in shards for sample in trainer.read_shard(shard, {})}
    for sample in raw.values():
        record = json.loads(sample["json"])
        if record["source"] in ("x-turned.jpg", "x-turned.tif"):
            data = next(sample[s] for s in ("jpg", "png") if s in sample)
            picture, original = trainer.open_picture(data, args)
            assert original == (80, 50)
            assert np.abs(np.asarray(picture, float) - np.asarray(upright, float)).mean() < 12


# ----------------------------------------------------------------------------------------------------------
# Interrupted, repeated, mixed
# ----------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for kill -9: nothing after it is done."""


def test_whatever_the_moment_of_a_kill_the_shards_come_out_the_same(tool, tmp_path, damaged, monkeypatch):
    """Every rename is a moment at which what is on the disk changes."""
    changes = {"samples_per_shard": 3, "max_image_pixels": 100_000, "default_caption": "sea"}
    _, unbroken = make(tool, tmp_path, damaged, out="unbroken", **changes)
    replace, renames = os.replace, 0
    for moment in range(40):
        done = [0]

        def rename(source, target, done=done, moment=moment):
            if done[0] == moment:
                raise Killed
            done[0] += 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", rename)
            try:
                make(tool, tmp_path, damaged, out=f"killed-{moment}", **changes)
            except Killed:
                renames += 1
        _, out = make(tool, tmp_path, damaged, out=f"killed-{moment}", **changes)
        left = {name: data for name, data in contents(out).items() if not name.startswith(".writing-")}
        assert left == contents(unbroken), f"killed before rename {moment}"
        if done[0] < moment:
            break
    assert renames == 7, "the manifest, two shards, and the counts of four, of which two are empty"


def test_a_killed_process_is_resumed(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    data = encode(Image.effect_noise((900, 900), 90).convert("RGB"), "PNG")
    for i in range(120):
        (folder / f"{i:03d}.png").write_bytes(data)
        (folder / f"{i:03d}.txt").write_text(f"sea {i}")
    line = [
        sys.executable,
        str(ROOT / SCRIPT),
        "--source",
        str(folder),
        "--samples_per_shard",
        "4",
        "--output_dir",
    ]
    out = tmp_path / "shards"
    process = subprocess.Popen([*line, str(out)], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "killed in the middle"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*_stats.json")}
    assert 2 <= len(before) < 30
    done = subprocess.run([*line, str(out)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "120 samples in 30 shards" in done.stdout
    assert captions(out) == {f"{i:03d}.png": f"sea {i}" for i in range(120)}
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*_stats.json")}
    assert {name: after[name] for name in before} == before, "finished shards stay"
    assert not list(out.glob(".writing-0*.tar"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 2}, "samples_per_shard was 1000, is 2"),
        ({"shuffle_seed": 1}, "shuffle_seed was None, is 1"),
        ({"default_caption": ""}, "default_caption was None, is ''"),
        (lambda folder: write_pictures(folder, 4), "pictures was 3, is 4"),
        (lambda folder: (folder / "000.txt").write_text("SEA 0"), "contents was"),
    ],
)
def test_other_data_is_neither_mixed_in_nor_overwritten(tool, tmp_path, change, message):
    folder = write_pictures(tmp_path / "in", 3)
    _, out = make(tool, tmp_path, folder)
    before = contents(out)
    with pytest.raises(ValueError, match=f"holds other shards .*{message}"):
        make(tool, tmp_path, folder, **(change if isinstance(change, dict) else change(folder) and {}))
    assert contents(out) == before


def test_shards_of_another_tool_are_not_touched(tmp_path):
    folder, out = write_pictures(tmp_path / "in", 1), tmp_path / "shards"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"precious")
    done = launch(["--source", folder, "--output_dir", out], SCRIPT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "this tool did not make them" in done.stderr and (out / "00000.tar").read_bytes() == b"precious"


def test_order_and_processes(tool, tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "in", 23)
    changes = {"samples_per_shard": 4, "shuffle_seed": 5}
    _, alone = make(tool, tmp_path, folder, out="alone", **changes)
    assert sorted(captions(alone)) == sorted(f"{i:03d}.png" for i in range(23))
    assert list(captions(alone)) != sorted(captions(alone))
    _, other = make(tool, tmp_path, folder, out="other", **changes | {"shuffle_seed": 6})
    assert list(captions(alone)) != list(captions(other))
    monkeypatch.setenv("WORLD_SIZE", "3")
    written = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        _, out = make(tool, tmp_path, folder, out="together", **changes)
        written.append(len(list(out.glob("*.tar"))))
    assert written == [2, 4, 6] and contents(out) == contents(alone)


# ----------------------------------------------------------------------------------------------------------
# Drawn by the teacher
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(tool, teacher, tmp_path_factory):
    """Six drawn pictures, three a shard, two at a time: (flags, folder)."""
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "prompts.txt").write_text("sea at dawn\n\n  hill \nlake at night\n", encoding="utf-8-sig")
    changes = {
        "prompts_file": folder / "prompts.txt", "pretrained_teacher_model": teacher, "num_images": 2,
        "steps": 2, "seed": 3, "batch_size": 2, "samples_per_shard": 3, "guidance_scale": 5,
    }  # fmt: skip
    code, out = make(tool, folder, None, **changes)
    assert code == 0
    return changes, out


def test_drawn_pictures_are_what_sample_py_draws(drawn, teacher, tmp_path):
    changes, out = drawn
    samples = read_shards(out)
    expected = [f"prompt {p} image {i}" for p in range(3) for i in range(2)]
    assert list(samples) == expected
    assert [sample["txt"].decode() for sample in samples.values()][::2] == [
        "sea at dawn",
        "hill",
        "lake at night",
    ]
    seeds = [sample["json"]["seed"] for sample in samples.values()]
    assert len(set(seeds)) == 6, "each from its own noise"
    record = samples["prompt 1 image 1"]["json"]
    sample = load_script("scripts/sample.py")
    line = ["--pretrained_teacher_model", teacher, "--prompts", record["caption"], "--seed", record["seed"]]
    line += ["--steps", 2, "--guidance_scale", 5, "--samplers", "dpmsolver++", "--output_dir", tmp_path]
    assert sample.main(sample.parse_args([str(word) for word in line])) == 0
    theirs = np.asarray(Image.open(tmp_path / "dpmsolver++-2steps" / "0-0.png"), int)
    ours = np.asarray(Image.open(io.BytesIO(samples["prompt 1 image 1"]["png"])), int)
    assert ours.shape == (SIDE, SIDE, 3) and np.abs(ours - theirs).max() <= 1, "but for the batch's rounding"


def test_drawing_is_resumed_and_shared(tool, drawn, tmp_path, monkeypatch):
    changes, unbroken = drawn
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    make(tool, tmp_path, None, **changes)
    assert [path.name for path in tmp_path.glob("shards/*.tar")] == ["00001.tar"]
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    _, out = make(tool, tmp_path, None, **changes)
    assert contents(out) == contents(unbroken)
    with pytest.raises(ValueError, match="guidance_scale was 5.0, is 6.0"):
        make(tool, tmp_path, None, **changes | {"guidance_scale": 6})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--source", "nowhere"], "nowhere: no such file"),
        (["--prompts_file", __file__], "give both, or --source"),
        (["--source", ".", "--pretrained_teacher_model", "a/b"], "give both, or --source"),
        (["--source", ".", "--samples_per_shard", "0"], "--samples_per_shard 0: must be at least 1"),
        (["--source", ".", "--steps", "61"], "--steps 61"),
        (["--source", ".", "--resolution", "100"], "--resolution 100: must be a multiple of 8"),
        ([], "one of the arguments --source --prompts_file is required"),
    ],
)
def test_wrong_flags(tool, tmp_path, capsys, line, message):
    with pytest.raises(SystemExit) as end:
        tool.parse_args([*line, "--output_dir", str(tmp_path)])
    assert end.value.code == 2 and message in capsys.readouterr().err
