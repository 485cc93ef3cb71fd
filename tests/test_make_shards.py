"""Shards from every kind of source: whole, in order, resumed, never mixed; and the trainer takes them."""

import csv
import functools
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SIDE, flags, launch, load_script, picture_bytes
from PIL import Image

sys.path.insert(0, str(ROOT / "scripts"))
from lib.trainers import UnusableInput

SCRIPT = "scripts/make_shards.py"
GREY = ("x-16.tif", "x-float.tif")  # of the pictures of test_every_kind_of_picture_trains


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
    for name, value in ({"shuffle_seed": -1} | changes).items():
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
    expected = {f"00{i}.png": f"sea {i}" for i in range(3)} | {f"b.c/deep/00{i}.PNG": f"sea {i}" for i in (0, 1)}
    assert code == 0 and captions(out) == expected and list(captions(out)) == sorted(expected)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert "5 samples in 3 shards" in capsys.readouterr().out
    first = read_shards(out)["001.png"]
    assert first["png"] == picture_bytes(1), "the bytes of the source"
    assert first["json"] == {
        "caption": "sea 1", "width": SIDE, "height": SIDE, "original_width": SIDE, "original_height": SIDE,
        "source": "001.png",
    }  # fmt: skip


CAPTION_FILES = [
    ("a.txt", "sea"), ("a.text", "sea"), ("a.caption", "sea"), ("A.TXT", "sea"), ("a.JPG.txt", "sea"),
    ("a.json", '{"caption": "sea"}'), ("a.json", '{"prompt": ["sea", "hill"]}'), ("a.json", '{"text": "sea"}'),
    ("a.JPG.json", '{"caption": "sea"}'), ("a.txt", "\ufeffsea\n"), ("a.cap", "sea"),
]  # fmt: skip


def test_every_spelling_of_a_caption_file(tool, tmp_path):
    for number, (name, text) in enumerate(CAPTION_FILES):
        folder = tmp_path / f"in {number}"
        folder.mkdir()
        (folder / f"{name[0]}.JPG").write_bytes(picture_bytes(0, suffix="JPEG"))
        (folder / name).write_text(text, encoding="utf-8")
        _, out = make(tool, tmp_path, folder, out=f"out {number}", caption_extension=".cap")
        assert list(captions(out).values()) == ["sea"], name


def test_an_empty_caption_gives_way_to_the_next(tool, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 5)
    (folder / "metadata.csv").write_text("file_name,text\n000.png,\n001.png,two\n")
    for number in (2, 3):
        (folder / f"00{number}.txt").write_text(" \n")
    (folder / "002.json").write_text('{"caption": "of the json"}')
    (folder / "003.json").write_text('{"width": 64}')
    (folder / "004.txt").write_bytes(b"caf\xe9")
    (folder / "004.json").write_text('{"width": 64}')  # no caption, and no other fault
    (folder / "003.caption").write_bytes(b"caf\xe9")
    expected = {"000.png": "sea 0", "001.png": "two", "002.png": "of the json"}
    assert captions(make(tool, tmp_path, folder)[1]) == expected
    assert "empty caption: 1, caption is not UTF-8: 1" in capsys.readouterr().out


def test_the_asked_caption_extension_comes_first(tool, tmp_path):
    folder = write_pictures(tmp_path / "in", 1)
    (folder / "000.caption").write_text("hill")
    assert captions(make(tool, tmp_path, folder, out="a")[1]) == {"000.png": "sea 0"}
    assert captions(make(tool, tmp_path, folder, out="b", caption_extension="caption")[1]) == {"000.png": "hill"}


def test_linked_folders_are_followed_once_and_loops_end(tool, tmp_path):
    folder = write_pictures(tmp_path / "in", 2)
    write_pictures(folder / "deep", 1)
    write_pictures(tmp_path / "elsewhere" / "sub", 2)
    (folder / "elsewhere").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere" / "sub")
    (folder / "aaa").symlink_to(folder / "deep")
    (folder / "deep" / "loop").symlink_to(folder)
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(folder / "001.text")  # reading it would wait for ever
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere.png")
    expected = {"000.png", "001.png", "deep/000.png", "again/000.png", "again/001.png"}
    assert set(captions(make(tool, tmp_path, folder)[1])) == expected


@pytest.mark.parametrize(("kind", "column"), [("jsonl", "text"), ("csv", "caption"), ("parquet", "Beschreibung")])
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


def check_that_a_row_that_cannot_be_read_costs_itself(tool, tmp_path, folder, capsys):
    paths = ["/", f"zip://0.png::{folder}/000.png", "https://127.0.0.1:9/x.png", "S3://a/x.png", f"{folder}/000.png"]
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("at 12:30.png", "bad.png"):
            file.writestr(name, picture_bytes(3) + bytes(100))
    data = bytearray((folder / "a.zip").read_bytes())
    place = data.rindex(b"PK\3\4") + 30 + len("bad.png")
    data[place : place + 2] = b"\xff\xff"  # no block of deflate
    (folder / "a.zip").write_bytes(data)
    paths += [f"zip://{name}::{folder}/a.zip" for name in ("at 12:30.png", "bad.png")]
    paths += [f"file://{folder}/000.png", "simplecache::https://127.0.0.1:9/x.png", "git+ssh://127.0.0.1/x.png"]
    paths += ["zip://a.png::https://127.0.0.1:9/x.zip", "zip://a::b::https://127.0.0.1:9/x.zip"]
    write_table(folder / "local.parquet", [{"image": {"bytes": None, "path": path}, "text": "x"} for path in paths])
    first, second, third = read_all(make(tool, tmp_path, folder / "local.parquet", out="local")[1])
    assert first["png"] == third["png"] == picture_bytes(0) and second["png"].startswith(picture_bytes(3))
    said = capsys.readouterr().out
    assert (
        "Is a directory: 1" in said
        and "file cannot be read: 2" in said
        and "row without a picture of this data set: 6" in said
    )


def test_odd_tables_keep_every_row(tool, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 4, text=False)
    long = {"file_name": "003.png", "text": "d", "score": 5.5, "note": "x" * 100}
    rows = [{"file_name": f"00{i}.png", "text": "abc"[i % 3], "score": 5, "note": None} for i in range(3)]
    for name, text, expected in (
        ("index.csv", ",file_name,text\n\n0,000.png,a\n1,001.png,b\n", "ab"),
        ("quotes.tsv", 'file_name\ttext\n000.png\t"big cat\n001.png\tdog\n', ['"big cat', "dog"]),
        ("quoted.tsv", 'file_name\ttext\n000.png\t"big\tcat"\n001.png\tdog\n', ["big\tcat", "dog"]),
        ("pandas.tsv", 'file_name\ttext\n000.png\t"a ""big"" cat"\n001.png\t"dog\n"\n', ['a "big" cat', "dog"]),
        ("null.jsonl", '{"file_name": null}\n{"file_name": "001.png", "text": "b"}\n', "b"),
        ("types.jsonl", "\n".join(map(json.dumps, [*rows, long])), "abcd"),
        ("long.csv", f"file_name,text,data\n000.png,a,{'x' * 200_000}\n", "a"),
        ("empty.jsonl", '{"file_name": "000.png", "captions": ["", "a"]}\n', "a"),
    ):
        (folder / name).write_text(text, encoding="utf-8")
        _, out = make(tool, tmp_path, folder / name, out=f"out {name}")
        assert [sample["txt"].decode() for sample in read_all(out)] == list(expected), name
        (folder / name).unlink()
    (folder / "metadata.csv").write_text("file_name,text\n000.png,one\n000.png,two\n001.png,three\n")
    _, out = make(tool, tmp_path, folder, out="several")
    assert [sample["txt"].decode() for sample in read_all(out)] == ["one", "two", "three"]
    write_table(folder / "null.parquet", [{"file_name": name, "text": "sea"} for name in (None, "000.png", None)])
    assert list(captions(make(tool, tmp_path, folder / "null.parquet", out="null")[1])) == ["000.png"]
    kinds = pyarrow.schema({"file_name": pyarrow.string(), "image": pyarrow.large_binary(), "text": pyarrow.string()})
    row = {"file_name": "of another machine.png", "image": picture_bytes(1), "text": "sea"}  # as polars writes it
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row], kinds), folder / "large.parquet")
    assert read_all(make(tool, tmp_path, folder / "large.parquet", out="large")[1])[0]["png"] == picture_bytes(1)
    data = [{"bytes": picture_bytes(i), "path": None} for i in range(4)]
    features = {
        "hash": datasets.Value("binary"),
        "depth": datasets.Image(),
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
    }
    columns = {"hash": [b"1", b"2"], "depth": data[:2], "image": data[2:], "label": [1, 0]}
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(tmp_path / "saved")
    _, out = make(tool, tmp_path, tmp_path / "saved", out="two", caption_column="label")
    found = [(sample["png"], sample["txt"]) for sample in read_all(out)]
    assert found == [(picture_bytes(2), b"dog"), (picture_bytes(3), b"cat")]
    check_that_a_row_that_cannot_be_read_costs_itself(tool, tmp_path, folder, capsys)


def test_the_delimiter_of_a_csv_is_found(tool, tmp_path):
    folder = write_pictures(tmp_path / "in", 3, text=False)
    for number, sign in enumerate(";\t|"):
        rows = [f"00{i}.png{sign}{text}" for i, text in enumerate(["007", "NA", "red, round, small"])]
        (folder / "list.CSV").write_text("\n".join([f"image{sign}text", *rows]), encoding="utf-8")
        _, out = make(tool, tmp_path, folder / "list.CSV", out=f"out {number}")
        assert list(captions(out).values()) == ["007", "NA", "red, round, small"], "text stays text"


@pytest.mark.parametrize("layout", ["saved", "saved splits", "parquet", "saved paths"])
def test_a_folder_of_datasets(tool, tmp_path, layout, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pictures = [{"bytes": picture_bytes(i), "path": None} for i in range(5)]
    if layout == "saved paths":
        pictures = [str(path) for path in sorted(write_pictures(tmp_path / "p", 5).glob("*.png"))]
    columns = {"id": list(range(5)), "photo": pictures, "text": [f"sea {i}" for i in range(5)]}
    kinds = {"id": "int64", "photo": datasets.Image(), "text": "string"}
    features = datasets.Features({k: datasets.Value(v) if isinstance(v, str) else v for k, v in kinds.items()})
    data = datasets.Dataset.from_dict(columns, features)
    if layout == "parquet":
        (tmp_path / "in" / "data").mkdir(parents=True)
        data.to_parquet(str(tmp_path / "in" / "data" / "train-00000-of-00001.parquet"))
    else:
        (datasets.DatasetDict({"train": data}) if layout == "saved splits" else data).save_to_disk(tmp_path / "in")
    _, out = make(tool, tmp_path, tmp_path / "in", samples_per_shard=2)
    samples = read_all(out)
    assert [sample["txt"].decode() for sample in samples] == columns["text"]
    assert [sample["png"] for sample in samples] == [picture_bytes(i) for i in range(5)]
    if layout == "saved splits":
        with pytest.raises(UnusableInput, match="--split test: .* has train"):
            make(tool, tmp_path, tmp_path / "in", out="other", split="test")


def test_without_the_package_datasets_its_requirements_file_is_named(tmp_path):
    (tmp_path / "datasets.py").write_text("raise ImportError")
    line = ["--source", tmp_path, "--output_dir", tmp_path / "shards"]
    done = launch(line, SCRIPT, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "scripts/requirements-data.txt" in done.stderr


@pytest.fixture
def hub(monkeypatch):
    """Stand in for the Hub: data sets by name, and how they were asked for."""
    found, asked = {}, []

    def load(name, config=None, **options):
        asked.append((name, config, options))
        if name not in found:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name!r} doesn't exist on the Hub")
        return {"train": found[name].to_iterable_dataset(num_shards=2)}

    def info(name, revision=None):
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=f"sha of {revision}", tags=[])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "dataset_info", info)
    return found, asked


def of_the_hub(rows):
    features = {"image": datasets.Image(), "text": datasets.Value("string"), "audio": datasets.Audio()}
    return datasets.Dataset.from_list([{"audio": None} | row for row in rows], datasets.Features(features))


def test_a_data_set_of_the_hub_is_streamed_shared_and_resumed(tool, tmp_path, hub, monkeypatch):
    found, asked = hub
    rows = [{"image": {"bytes": picture_bytes(i), "path": f"{i}.png"}, "text": f"sea {i}"} for i in range(11)]
    found["me/sea"] = of_the_hub(rows)
    changes = {"samples_per_shard": 4, "dataset_revision": "v1", "dataset_config_name": "big", "shuffle_seed": 3}
    _, alone = make(tool, tmp_path, None, out="alone", dataset_name="me/sea", **changes)
    options = {"streaming": True, "revision": "sha of v1"}
    assert asked == [("me/sea", "big", options)], "one pass, nothing downloaded first, no code of the data set's"
    samples = read_shards(alone)
    assert sorted(samples, key=lambda name: int(name.split()[1])) == [f"row {i} {i}.png" for i in range(11)]
    assert list(samples) != sorted(samples) and samples["row 7 7.png"]["png"] == picture_bytes(7)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        _, together = make(tool, tmp_path, "me/sea", out="together", **changes)
    assert contents(together) == {name: data for name, data in contents(alone).items()}, "--source NAME is the same"
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    (together / "00001.tar").unlink()
    assert contents(make(tool, tmp_path, "me/sea", out="together", **changes)[1]) == contents(alone)
    with pytest.raises(UnusableInput, match="dataset_revision was 'v1', is 'v2'"):
        make(tool, tmp_path, "me/sea", out="together", **changes | {"dataset_revision": "v2"})
    _, few = make(tool, tmp_path, "me/sea", out="few", max_samples=3)
    assert list(captions(few).values()) == ["sea 0", "sea 1", "sea 2"]


class Handler(BaseHTTPRequestHandler):
    """Serve a folder as the Hub serves the data set me/sea at the commit aaaa..."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        files = {file.relative_to(self.folder).as_posix(): file for file in self.folder.rglob("*.*")}
        answer, start = None, 0
        if "/tree/" in path:
            below = path.partition(f"/tree/{COMMIT}")[2].strip("/")
            found = [name for name in files if name.startswith(f"{below}/" if below else "")]
            is_deep = "recursive=true" in query
            folders = [] if is_deep else sorted({name.partition("/")[0] for name in found if "/" in name})
            found = [{"type": "directory", "path": name, "oid": COMMIT, "size": 0} for name in folders] + [
                {"type": "file", "path": name, "oid": COMMIT, "size": files[name].stat().st_size}
                for name in found if is_deep or "/" not in name
            ]  # fmt: skip
            answer = json.dumps(found).encode() if found else None
        elif path.startswith("/api/datasets/me/sea"):
            siblings = [{"rfilename": name} for name in files]
            answer = json.dumps({"id": "me/sea", "sha": COMMIT, "tags": [], "siblings": siblings}).encode()
        elif (name := path.partition(f"/resolve/{COMMIT}/")[2]) in files:
            answer = files[name].read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(404 if answer is None else 206 if "Range" in self.headers else 200)
        self.send_header("X-Error-Code", "EntryNotFound" if answer is None else "")
        self.send_header("Content-Range", f"bytes {start}-{len(answer or b'') - 1}/{len(answer or b'')}")
        self.send_header("Content-Length", str(len((answer or b"")[start:])))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write((answer or b"")[start:])

    do_HEAD = do_GET


COMMIT = "a" * 40


def test_an_image_folder_of_the_hub_is_streamed_file_by_file(tmp_path):
    """The real clients of the Hub; a picture in EPS, named like another, starts no program."""
    folder = write_pictures(tmp_path / "hub" / "train", 3, text=False)
    (folder / "003.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    write_table(folder / "metadata.jsonl", [{"file_name": f"00{i}.png", "text": f"sea {i}"} for i in range(4)])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    handler = type("Served", (Handler,), {"folder": tmp_path / "hub"})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "home"), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        }  # fmt: skip
        line = ["--dataset_name", "me/sea", "--output_dir", tmp_path / "out", "--shuffle_seed", -1]
        done = launch(line, SCRIPT, env=environment)
        server.shutdown()
    assert done.returncode == 0 and "left out: picture cannot be decoded: 1" in done.stdout, done.stderr
    assert captions(tmp_path / "out") == {f"row {i} 00{i}.png": f"sea {i}" for i in range(3)}
    assert read_all(tmp_path / "out")[2]["png"] == picture_bytes(2) and not (tmp_path / "started").exists()


def test_a_row_of_the_hub_reads_no_file_of_this_machine(tool, tmp_path, hub, capsys):
    (tmp_path / "private.png").write_bytes(picture_bytes(0))
    paths = [str(tmp_path / "private.png"), "http://127.0.0.1:9/x.png", f"hf://datasets/a::{tmp_path}/private.png"]
    rows = [{"image": {"bytes": None, "path": path}, "text": "x"} for path in paths]
    rows.append({"image": {"bytes": picture_bytes(1), "path": None}, "text": "sea"})
    hub[0]["me/sea"] = of_the_hub(rows)
    _, out = make(tool, tmp_path, "me/sea")
    assert list(captions(out).values()) == ["sea"]
    assert "row without a picture of this data set: 3" in capsys.readouterr().out


def test_a_data_set_that_cannot_be_had_is_named(tool, tmp_path, hub):
    with pytest.raises(UnusableInput, match="--dataset_name me/typo: cannot be read .*doesn't exist on the Hub"):
        make(tool, tmp_path, "me/typo")
    hub[0]["me/links"] = datasets.Dataset.from_list([{"image": "http://x.org/1.jpg", "text": "sea"}] * 2)
    with pytest.raises(UnusableInput, match="img2dataset"):
        make(tool, tmp_path, "me/links")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "file_name,words\n0.png,sea\n", "columns file_name, words; name one with --caption_column"),
        ("a.csv", "picture,text\n0.png,sea\n", "columns picture, text; name one with --image_column"),
        ("a.csv", "", "cannot be read .No columns"),
        ("a.csv", "file_name,text\n", "no rows"),
        ("a.jsonl", '{"file_name": "0.png", "text": "sea"}\n{"file_na', "cannot be read"),
        ("a.csv", "file_name,text\n0.png,red, round\n", "more fields than its header; put captions .* in quotes"),
        ("a.csv", "file_name,text\n0.png,red\n1.png,red, round\n", "cannot be read"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.docx", "", "give a folder, a data set, or a file of .csv"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tool, tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(UnusableInput, match=f"{name}.*{message}") as error:
        make(tool, tmp_path, tmp_path / name)
    assert "\n" not in str(error.value) and not list((tmp_path / "shards").iterdir())


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
    rows = [{"file_name": "gone.png", "text": "x"}, {"file_name": "https://x.org/a.png", "text": "x"}]
    write_table(folder / "metadata.jsonl", rows)
    (folder / "half.png").write_bytes(picture_bytes(1))
    (folder / "half.json").write_text('{"caption": "half \\ud83d"}')
    return folder


def test_what_is_left_out_is_counted_by_cause(tool, tmp_path, damaged, capsys):
    code, out = make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
    line = capsys.readouterr().out
    assert code == 0 and list(captions(out)) == [f"00{i}.png" for i in range(4)]
    for cause in (
        "picture cannot be decoded: 3", "picture over --max_image_pixels: 1", "no caption: 1",
        "empty caption: 1", "caption is not UTF-8: 2", "No such file or directory: 1",
    ):  # fmt: skip
        assert cause in line
    left_out = [json.loads(row) for row in (out / "left_out.jsonl").read_text().splitlines()]
    assert {row["source"]: row["cause"] for row in left_out} == {
        "a.jpg": "picture cannot be decoded", "b.jpg": "picture cannot be decoded", "bare.png": "no caption",
        "c.png": "picture cannot be decoded", "empty.png": "empty caption", "latin.png": "caption is not UTF-8",
        "half.png": "caption is not UTF-8", "gone.png": "No such file or directory",
        "large.png": "picture over --max_image_pixels",
    }  # fmt: skip
    for name, text in (("00000_stats.json", "[1]"), ("00001_stats.json", '{"run": 1}'), ("make_shards.json", "[]")):
        kept = (out / name).read_text()
        (out / name).write_text(text)  # damaged; what the shards are made of is not known any more
        if name == "make_shards.json":
            with pytest.raises(UnusableInput, match="holds other shards"):
                make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
            (out / name).write_text(kept)
        else:
            make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
            assert (out / name).read_text() == kept
    capsys.readouterr()
    make(tool, tmp_path, damaged, max_image_pixels=100_000, samples_per_shard=3)
    said = capsys.readouterr()
    assert said.out == line and "2 shards were there already and are kept" in said.err
    os.mkfifo(damaged / "fifo.png")
    table = "".join(f"{name},sea\n" for name in ("000.png", "fifo.png", "a" * 5000 + ".png", "x\0y.png"))
    (damaged / "odd.csv").write_text(f"file_name,text\n{table}")
    code, out = make(tool, tmp_path, damaged / "odd.csv", out="odd")
    assert code == 0 and len(captions(out)) == 1 and len((out / "left_out.jsonl").read_text().splitlines()) == 3


def test_pictures_without_a_caption_can_be_kept(tool, tmp_path, damaged, capsys):
    _, out = make(tool, tmp_path, damaged, default_caption="a photo", out="a")
    assert captions(out)["bare.png"] == captions(out)["empty.png"] == "a photo"
    assert captions(out)["001.png"] == "sea 1"
    _, out = make(tool, tmp_path, damaged, default_caption="", out="b")
    assert captions(out)["bare.png"] == captions(out)["empty.png"] == ""
    assert "caption is not UTF-8: 2" in capsys.readouterr().out


@pytest.mark.parametrize("samples_per_shard", [2, 1000])
def test_nothing_usable_is_an_error_until_a_flag_or_a_file_cures_it(tool, tmp_path, samples_per_shard):
    folder = write_pictures(tmp_path / "in", 3, text=False)
    with pytest.raises(UnusableInput, match=r"none of 3 pictures can be used \(no caption: 3\)"):
        make(tool, tmp_path, folder, samples_per_shard=samples_per_shard)
    assert not list((tmp_path / "shards").glob("*.tar"))
    _, out = make(tool, tmp_path, folder, samples_per_shard=samples_per_shard, default_caption="x")
    assert set(captions(out).values()) == {"x"}
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    write_pictures(folder, 3)
    assert len(captions(make(tool, tmp_path, folder)[1])) == 3


def test_a_finished_part_of_other_settings_is_made_again(tool, tmp_path):
    """The first part has nothing usable without a caption; the flag that cures it must not find it done."""
    folder = write_pictures(tmp_path / "in", 2, text=False)
    with pytest.raises(UnusableInput):
        make(tool, tmp_path, folder, samples_per_shard=1)
    _, out = make(tool, tmp_path, folder, samples_per_shard=1, default_caption="x", max_samples=1)
    assert captions(out) == {"000.png": "x"}
    assert json.loads((out / "00000_stats.json").read_text())["samples"] == 1


def test_a_folder_without_pictures_is_named(tool, tmp_path):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UnusableInput, match="nothing: holds no pictures"):
        make(tool, tmp_path, tmp_path / "nothing")
    (tmp_path / "nothing" / "a.HEIC").touch()
    with pytest.raises(UnusableInput, match="heic files are not read; pictures can be converted to PNG"):
        make(tool, tmp_path, tmp_path / "nothing")
    for name, text, message in (
        ("e.jsonl", "", "has the columns of no row"),
        ("x.jsonl", "[1]\n", "cannot be read"),
        ("n.jsonl", '{"file_name": 1, "text": "a"}\n', "none of"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(UnusableInput, match=message):
            make(tool, tmp_path, tmp_path / name, out=name.replace(".", "-"))


UNREAD = {
    "HEIC": "converted to PNG", "jxl": "PNG", "pcx": "PNG", "eps": "", "xyz": "",
    "tar": "give them to the training script", "csv": "--source FILE",
}  # fmt: skip


def test_files_that_are_not_read_are_counted_by_suffix(tool, tmp_path, capsys):
    folder = write_pictures(tmp_path / "in", 1)
    for suffix in UNREAD:
        for name in ("x", "y"):
            (folder / f"{name}.{suffix}").write_bytes(b"%!PS")
    _, out = make(tool, tmp_path, folder)
    line = capsys.readouterr().out
    assert line.startswith(f"1 samples in 1 shards in {out}; left out: ")
    rows = [json.loads(row) for row in (out / "left_out.jsonl").read_text().splitlines()]
    causes = {row["source"]: row["cause"] for row in rows}
    assert causes.keys() == {f"{name}.{suffix}" for suffix in UNREAD for name in ("x", "y")}
    for suffix, remedy in UNREAD.items():
        cause = causes[f"x.{suffix}"]
        assert suffix.lower() in cause and remedy in cause and f"{cause}: 2" in line


def test_a_picture_that_would_start_a_program_is_not_opened(tool, tmp_path, monkeypatch):
    """Pillow reads EPS with Ghostscript, whatever the file's name."""
    folder = write_pictures(tmp_path / "in", 1)
    (folder / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (folder / "x.txt").write_text("x")
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_options: pytest.fail("a program was started"))
    assert list(captions(make(tool, tmp_path, folder)[1])) == ["000.png"]


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
        "x-16.tif": encode(Image.fromarray(np.asarray(grey, np.uint16) * 257), "TIFF"),
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
    args = trainer.parse_args(flags("a/teacher", str(out), "unused", min_image_side_px=32, require_metadata=True))
    shards = trainer.list_shards([str(out)])
    _, report, _ = trainer.audit(shards, args)
    assert report.endswith(f"of the first {len(samples)} samples {len(samples)} can be used")
    for name in kinds:
        sample = samples[name]
        picture, original = trainer.open_picture(next(sample[s] for s in ("jpg", "png", "webp") if s in sample), 1e8)
        reference = np.asarray(upright.convert("L") if name in GREY else upright, float)
        found = np.asarray(picture.convert("L") if name in GREY else picture, float)
        assert original == (80, 50) and np.abs(found - reference).mean() < 12, f"{name}: wrong colours"


def test_shards_hold_what_the_trainers_see(tool, trainer, tmp_path):
    """Sixteen bits, signed and big-endian integers, floats: the tool and the trainers have one opener."""
    folder, ramp = tmp_path / "in", np.linspace(0, 1, 40 * 30).reshape(30, 40)
    folder.mkdir()
    kinds = {
        "i16.tif": Image.fromarray((ramp * 65535).astype(np.uint16)),
        "i32.tif": Image.fromarray((ramp * 65535).astype(np.int32)),
        "big-endian.tif": Image.fromarray((ramp * 65535).astype(">u2")),
        "float1.tif": Image.fromarray(ramp.astype(np.float32)),
        "float255.tif": Image.fromarray((ramp * 255).astype(np.float32)),
        "i16.png": Image.fromarray((ramp * 65535).astype(np.uint16)),
    }
    for name, picture in kinds.items():
        picture.save(folder / name)
    for name, sample in read_shards(make(tool, tmp_path, folder, default_caption="x")[1]).items():
        picture, _ = trainer.open_picture(sample["png"], 1e8)
        assert np.abs(np.asarray(picture)[..., 0] - ramp * 255).max() <= 1.01, f"{name}: not the ramp"


def test_large_pictures_are_shrunk_on_request(tool, trainer, tmp_path):
    folder, turned = tmp_path / "in", Image.Exif()
    folder.mkdir()
    turned[0x0112] = 6
    stripes = np.repeat(np.arange(30) % 2 * 200, 10)  # which a picture decoded too small would lose
    wide = Image.fromarray(np.tile(stripes.astype(np.uint8)[None, :, None], (120, 1, 3)))
    for suffix in ("jpg", "png", "webp", "tif"):
        wide.transpose(Image.Transpose.ROTATE_90).save(folder / f"large.{suffix}", exif=turned, quality=95)
        wide.resize((100, 40)).save(folder / f"small.{suffix}", quality=95)
    samples = read_shards(make(tool, tmp_path, folder, default_caption="x", max_side_px=150)[1])
    assert len(samples) == 8
    for name, sample in samples.items():
        size, original = ([150, 60], [300, 120]) if name.startswith("large") else ([100, 40], [100, 40])
        record, kept = sample["json"], next(s for s in ("jpg", "png", "webp") if s in sample)
        assert [record["width"], record["height"]] == size, name
        assert [record["original_width"], record["original_height"]] == original, name
        picture, stored = trainer.open_picture(sample[kept], 1e8)
        assert list(stored) == size
        assert np.abs(np.asarray(picture, float) - np.asarray(wide.resize(picture.size), float)).mean() < 6
        is_kept = sample[kept] == (folder / name).read_bytes()
        assert is_kept == (name.startswith("small") and not name.endswith("tif")), "a small one keeps its bytes"


# ----------------------------------------------------------------------------------------------------------
# Interrupted, repeated, mixed
# ----------------------------------------------------------------------------------------------------------


def test_pictures_are_shuffled_unless_asked_not_to(tmp_path, tool):
    folder = write_pictures(tmp_path / "in", 20)
    line = ["--source", str(folder), "--output_dir", str(tmp_path / "shards")]
    assert tool.main(tool.parse_args(line)) == 0
    names = list(captions(tmp_path / "shards"))
    assert names != sorted(names) and set(names) == {f"{i:03d}.png" for i in range(20)}


def test_output_that_cannot_be_written_ends_with_2_and_one_line(tool, tmp_path, capfd):
    folder = write_pictures(tmp_path / "in", 40)
    (tmp_path / "file").touch()

    def limit():  # no file may grow beyond 30 kB, as on a disk that is almost full
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    child = forked(tool, ["--source", folder, "--output_dir", tmp_path / "full"], limit)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path / 'full'}: cannot be written")
    with pytest.raises(SystemExit) as end:
        make(tool, tmp_path, folder, out="file/x")
    assert end.value.code == 2 and "file/x: cannot be written" in capfd.readouterr().err


def test_the_files_modes_follow_the_umask(tool, tmp_path):
    old = os.umask(0o022)
    try:
        _, out = make(tool, tmp_path, write_pictures(tmp_path / "in", 2))
    finally:
        os.umask(old)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == dict.fromkeys(
        ["00000.tar", "00000_stats.json", "left_out.jsonl", "make_shards.json"], "0o644"
    )


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
    assert renames == 10, "manifest, shards of which one is empty, the counts of each, what was left out"


def forked(tool, arguments, prepare=lambda: None):
    """Start the tool in a child of this process, which spares the imports; return the child's number."""
    child = os.fork()
    if not child:
        code = 1
        try:
            prepare()
            code = tool.exit_code(tool.main, tool.parse_args([str(word) for word in arguments]))
        finally:
            os._exit(code)
    return child


def test_a_killed_process_is_resumed(tool, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "shards"
    folder.mkdir()
    data = encode(Image.effect_noise((900, 900), 90).convert("RGB"), "PNG")
    for i in range(120):
        (folder / f"{i:03d}.png").write_bytes(data)
        (folder / f"{i:03d}.txt").write_text(f"sea {i}")
    child = forked(tool, ["--source", folder, "--samples_per_shard", 4, "--shuffle_seed", -1, "--output_dir", out])
    deadline = time.monotonic() + 60
    while len(list(out.glob("0*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "killed in the middle"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*_stats.json")}
    assert 2 <= len(before) < 30
    assert make(tool, tmp_path, folder, samples_per_shard=4)[0] == 0
    assert captions(out) == {f"{i:03d}.png": f"sea {i}" for i in range(120)}
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("0*_stats.json")}
    assert {name: after[name] for name in before} == before, "finished shards stay"
    assert not list(out.glob(".writing-0*"))
    (out / "00001_stats.json").write_text("{")  # is made again
    assert make(tool, tmp_path, folder, samples_per_shard=4)[0] == 0
    assert json.loads((out / "00001_stats.json").read_text())["samples"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_shard": 2}, "samples_per_shard was 1000, is 2"),
        ({"shuffle_seed": 1}, "shuffle_seed was None, is 1"),
        ({"max_side_px": 16}, "max_side_px was None, is 16"),
        ({"default_caption": ""}, "default_caption was None, is ''"),
        (lambda folder: write_pictures(folder, 4), "contents was"),
        (lambda folder: (folder / "000.txt").write_text("SEA 0"), "contents was"),
    ],
)
def test_other_data_is_neither_mixed_in_nor_overwritten(tool, tmp_path, change, message):
    folder = write_pictures(tmp_path / "in", 3)
    _, out = make(tool, tmp_path, folder)
    before = contents(out)
    with pytest.raises(UnusableInput, match=f"holds other shards .*{message}"):
        make(tool, tmp_path, folder, **(change if isinstance(change, dict) else change(folder) and {}))
    assert contents(out) == before


def test_shards_of_another_tool_are_not_touched(tool, tmp_path):
    folder, out = write_pictures(tmp_path / "in", 1), tmp_path / "shards"
    out.mkdir()
    (out / "00000.tar").write_bytes(b"precious")
    with pytest.raises(UnusableInput, match="this tool did not make them"):
        make(tool, tmp_path, folder)
    assert contents(out) == {"00000.tar": b"precious"}


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


def test_processes_at_the_same_time_do_not_disturb_each_other(tool, tmp_path):
    folder = write_pictures(tmp_path / "in", 6)
    line = ["--source", folder, "--samples_per_shard", 1, "--output_dir", tmp_path / "shards"]

    def prepare(rank, replace=os.replace):
        os.environ.update({"RANK": str(rank), "WORLD_SIZE": "3"})
        os.replace = lambda source, target: time.sleep(0.2) or replace(source, target)  # so that all write at once

    children = [forked(tool, line, functools.partial(prepare, rank)) for rank in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 3
    assert len(captions(tmp_path / "shards")) == 6 and (tmp_path / "shards" / "left_out.jsonl").exists()
    assert not list((tmp_path / "shards").glob(".writing*"))


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
    assert [sample["txt"].decode() for sample in samples.values()][::2] == ["sea at dawn", "hill", "lake at night"]
    seeds = [sample["json"]["seed"] for sample in samples.values()]
    assert len(set(seeds)) == 6, "each from its own noise"
    record = samples["prompt 1 image 1"]["json"]
    sample = load_script("scripts/sample.py")
    line = ["--pretrained_teacher_model", teacher, "--prompts", record["caption"], "--seed", record["seed"]]
    line += ["--steps", 2, "--guidance_scale", 5, "--samplers", "dpmsolver++", "--output_dir", tmp_path]
    assert not sample.main(sample.parse_args([str(word) for word in line]))
    theirs = np.asarray(Image.open(tmp_path / "dpmsolver++-2steps" / "0-0.png"), int)
    ours = np.asarray(Image.open(io.BytesIO(samples["prompt 1 image 1"]["png"])), int)
    assert ours.shape == (SIDE, SIDE, 3) and np.abs(ours - theirs).max() <= 1, "but for the batch's rounding"


def test_drawing_is_resumed_and_shared(tool, drawn, teachers, tmp_path, monkeypatch):
    changes, unbroken = drawn
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    make(tool, tmp_path, None, **changes)
    assert [path.name for path in tmp_path.glob("shards/*.tar")] == ["00001.tar"]
    monkeypatch.delenv("WORLD_SIZE"), monkeypatch.delenv("RANK")
    _, out = make(tool, tmp_path, None, **changes)
    assert contents(out) == contents(unbroken)
    with pytest.raises(UnusableInput, match="guidance_scale was 5.0, is 6.0"):
        make(tool, tmp_path, None, **changes | {"guidance_scale": 6})
    sdxl = changes | {"pretrained_teacher_model": teachers["train_lcm_lora_sdxl"], "num_images": 1}
    assert len(read_shards(make(tool, tmp_path, None, out="sdxl", **sdxl)[1])) == 3


WRONG_FLAGS = [
    (["--source", "nowhere"], "nowhere: no such file"),
    (["--source", "./no/where"], "./no/where: no such file"),
    (["--source", ".", "--caption_extention", "x"], "did you mean --caption_extension?"),
    (["--sorce", "."], "unknown flag --sorce; did you mean --source?"),
    (["--prompts_file", __file__], "give both, or --source"),
    (["--source", ".", "--pretrained_teacher_model", "a/b"], "give both, or --source"),
    (["--source", ".", "--samples_per_shard", "0"], "--samples_per_shard: 0: give 1 or more"),
    (["--source", ".", "--steps", "61"], "--steps [61]"),
    (["--source", ".", "--resolution", "100"], "--resolution: 100: give 8 or more, a multiple of 8"),
    (["--source", ".", "--resolution", "512"], "--max_side_px shrinks others"),
    ([], "one of the arguments --source --dataset_name --prompts_file is required"),
]


def test_wrong_flags(tool, tmp_path, capsys):
    for line, message in WRONG_FLAGS:
        with pytest.raises(SystemExit) as end:
            tool.parse_args([*line, "--output_dir", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert end.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
