"""Data: who reads which sample, where a resumed run goes on, and what damaged or odd shards do."""

import http.server
import io
import itertools
import json
import math
import os
import random
import signal
import struct
import tarfile
import threading
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, SIDE, Windows, cases, flags, load_script, picture_bytes, write_shard, write_shards
from PIL import Image

UNEQUAL = (7, 1, 12, 5, 9, 3, 8, 6)  # samples of each shard
DEADLINE_S = 60  # no test here may hang
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more than CPUs


@pytest.fixture(autouse=True)
def deadline():
    """Turn an endless loop into a failure."""

    def fail(*_):
        raise TimeoutError(f"no end after {DEADLINE_S} s")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(DEADLINE_S)
    yield
    signal.alarm(0)


@pytest.fixture(scope="module")
def script():
    """One family: check_shared.py proves that the other one reads data with the same code."""
    return load_script(SCRIPTS[0])


def make_args(script, shards, **changes):
    return script.parse_args(flags("a/teacher", shards, "unused", **changes))


def make_stream(script, shards, processes=1, rank=0, done=0, positions=None, **changes):
    """Return the stream of one process after `done` of its batches."""
    args = make_args(script, shards, **changes)
    workers = max(1, args.dataloader_num_workers or 0)
    stream = script.ShardStream(script.list_shards([str(shards)]), args, processes * workers, rank * workers, workers)
    stream.start_batch, stream.start_positions = done, positions or {}
    return stream


def loader_of(script, stream):
    return script.make_loader(stream, stream.args.dataloader_num_workers or 0, torch.device("cpu"))


def batches_of(script, stream, count):
    """Return the first batches that the real loader gives."""
    loader = iter(loader_of(script, stream))
    return [next(loader) for _ in range(count)]


def captions_of(batches):
    return [caption for batch in batches for caption in batch["caption"]]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Folders of 1, 3 and 8 shards: of unequal sizes, and of twelve samples each."""
    folder = tmp_path_factory.mktemp("layouts")
    for count in (1, 3, 8):
        write_shards(folder / f"equal-{count}", count, 12)
        for shard, size in enumerate((36,) if count == 1 else UNEQUAL[:count]):
            samples = [{"png": picture_bytes(0), "txt": f"sea {i}"} for i in range(size)]
            write_shard(folder / f"unequal-{count}" / f"{shard:05d}.tar", samples)
    return folder


# ----------------------------------------------------------------------------------------------------------
# Who reads what
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["equal", "unequal"])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_sample_is_read_once_an_epoch(script, layouts, count, kind):
    shards = layouts / f"{kind}-{count}"
    total = 12 * count if kind == "equal" else 36 if count == 1 else sum(UNEQUAL[:count])
    for processes, workers, epoch in itertools.product((1, 2, 3), (0, 1, 3), (0, 1)):
        stream = make_stream(script, shards, processes, dataloader_num_workers=workers)
        assert stream.consumers == processes * max(1, workers)
        skipped = Counter()
        parts = [
            [sample["__key__"] for sample in stream.raw_samples(epoch, consumer, skipped)]
            for consumer in range(stream.consumers)
        ]
        read = Counter(key for part in parts for key in part)
        assert len(read) == total and set(read.values()) == {1} and not skipped
        sizes = [len(part) for part in parts]
        assert kind == "unequal" or max(sizes) - min(sizes) <= 2, f"unequal parts {sizes}"
        epochs = range(count == 1 and stream.consumers)
        seen = {sample["__key__"] for each in epochs for sample in stream.raw_samples(each, 0, skipped)}
        assert len(seen) == total * (count == 1), "the parts of one shard go round, because some are larger"


def test_a_real_loader_reads_each_sample_once_an_epoch(script, layouts):
    changes = {"train_batch_size": 3, "dataloader_num_workers": 3}
    streams = [make_stream(script, layouts / "equal-3", 2, rank, **changes) for rank in (0, 1)]
    captions = [caption for stream in streams for caption in captions_of(batches_of(script, stream, 6))]
    assert sorted(captions) == sorted(f"sea {i}" for i in range(36))


def test_order_follows_seed_epoch_and_rank(script, layouts):
    def order(rank=0, batches=9, **changes):
        stream = make_stream(script, layouts / "equal-3", 2, rank, **changes)
        return captions_of(batches_of(script, stream, batches))

    first = order()
    assert first == order()
    assert first != order(seed=1)
    assert first != sorted(first, key=lambda caption: int(caption.split()[1]))
    assert not set(first) & set(order(rank=1))
    both = Counter(order(batches=18)) + Counter(order(rank=1, batches=18))
    assert set(both.values()) == {2}, "two epochs"
    assert order(batches=18)[18:] != first, "the second epoch has another order"


# ----------------------------------------------------------------------------------------------------------
# Where a resumed run goes on
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 3])
def test_resumed_stream_goes_on_as_an_unbroken_one(script, layouts, workers):
    def stream(done=0, positions=None):
        return make_stream(
            script, layouts / "equal-3", 2, 1, done, positions, train_batch_size=4,
            dataloader_num_workers=workers, random_flip=True, shuffle_buffer_samples=5,
        )  # fmt: skip

    unbroken = batches_of(script, stream(), 12)  # 48 samples of this process's 18: over epoch boundaries
    assert max(batch["position"][1] for batch in unbroken) == 2
    positions = {}
    for done, last in enumerate(unbroken, 1):
        consumer, *position = last["position"]
        positions[str(consumer)] = position
        if done not in (1, 2, 4, 7, 9):
            continue
        resumed = batches_of(script, stream(done, json.loads(json.dumps(positions))), 12 - done)
        for ours, theirs in zip(resumed, unbroken[done:], strict=True):
            assert ours["caption"] == theirs["caption"] and ours["position"] == theirs["position"]
            assert torch.equal(ours["pixels"], theirs["pixels"])


def test_what_is_passed_over_is_not_decoded(script, layouts, monkeypatch):
    prepared = []
    prepare = script.prepare_sample
    monkeypatch.setattr(script, "prepare_sample", lambda *sample: prepared.append(1) or prepare(*sample))
    next(iter(make_stream(script, layouts / "equal-3", done=15, positions={"0": [0, 30]})))
    assert len(prepared) == 2, "one batch"


def test_every_consumer_needs_a_sample(script, tmp_path, monkeypatch):
    shard_of_two = shard = write_shard(tmp_path / "0.tar", [{"png": picture_bytes(i), "txt": "sea"} for i in range(2)])
    batches = [list(itertools.islice(make_stream(script, shard, 4, rank), 1)) for rank in range(4)]
    errors = [batch["error"] for (batch,) in batches if "error" in batch]
    assert len(errors) == 2 and all("fewer samples than processes x loader workers" in e for e in errors)
    # A shard of fewer samples than share it leaves some of them without one, but not in each epoch.
    shard, files = script.PictureFolder, tuple(f"{number}.txt" for number in range(8))
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text("sea")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    shards = [shard("long", tmp_path, files), shard("short", tmp_path, ("bad.txt",))]
    args = make_args(script, shard, objective="matching", init_lora="x", train_batch_size=1)
    for rank in range(4):
        batches = itertools.islice(script.ShardStream(shards, args, 4, rank, 1), 400)
        assert not any("error" in batch for batch in batches)
    # In a loader process all of a batch goes to shared memory, where a lack of room is an error and no endless wait.
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: SimpleNamespace(id=0))
    (batch,) = itertools.islice(make_stream(script, shard_of_two), 1)
    tensors = [value for value in [*batch.values(), *batch["ids"]] if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 2 and all(value.is_shared() for value in tensors)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_consumer_without_a_usable_sample_ends_the_run(script, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(script, "EMPTY_EPOCHS", 1)
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [{"png": b"garbage", "txt": "sea"} for _ in range(4)])
    job = SimpleNamespace(state=script.RunState(), accelerator=SimpleNamespace(num_processes=1))
    with pytest.raises(script.UnusableInput, match="in 4 epochs: picture cannot be decoded: (8|16)$"):
        for rank in (0, 1):
            stream = make_stream(script, tmp_path, 2, rank, dataloader_num_workers=workers)
            batches = iter(loader_of(script, stream))
            for _ in range(4):
                script.next_batch(job, batches, {})


# ----------------------------------------------------------------------------------------------------------
# Damage: each row ends in a counted skip with its cause, or in one line that names the shard
# ----------------------------------------------------------------------------------------------------------


def good(number=0, **members):
    return {"png": picture_bytes(number), "txt": f"sea {number}"} | members


def changed(every, **members):
    """Return 8 samples of which the first and each `every`-th after it have other members; None: left out."""
    samples = [good(i, **members) if i % every == 0 else good(i) for i in range(8)]
    return [{name: value for name, value in sample.items() if value is not None} for sample in samples]


def png(width, height):
    """Return a PNG in one colour."""
    data = io.BytesIO()
    Image.new("RGB", (width, height), "teal").save(data, "PNG")
    return data.getvalue()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def end_of(path):
    """Return how many bytes of zeros end a tar."""
    data = path.read_bytes()
    return len(data) - -(-len(data.rstrip(b"\0")) // 512) * 512


WHOLE_SHARD = {
    "truncated inside a sample": (lambda path: cut(path, 2 * 1024 + 100), "is truncated"),
    "its end mark cut off": (lambda path: cut(path, -end_of(path)), "is truncated"),
    "not a tar": (lambda path: path.write_bytes(b"<html>not found</html>" * 99), "is not a tar"),
    "zstd": (lambda path: path.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(range(99))), "give 'pipe:zstd -dc "),
    "zero bytes": (lambda path: path.write_bytes(b""), "is empty"),
    "an empty tar": (lambda path: path.write_bytes(bytes(10240)), "is empty"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("name", WHOLE_SHARD)
def test_a_broken_shard_is_named_before_training(script, tmp_path, name):
    damage, message = WHOLE_SHARD[name]
    write_shards(tmp_path, 3)
    damage(tmp_path / "00001.tar")
    with pytest.raises(script.UnusableInput, match=rf"00001\.tar.*{message}"):
        script.list_shards([f"{tmp_path}/{{00000..00002}}.tar"])


def test_a_slip_in_braces_is_named(script):
    with pytest.raises(script.UnusableInput, match="/data/{0..3.tar"):
        script.list_shards(["/data/{0..3.tar"])


SURROGATE = b'{"caption": "sea \\ud83d"}'  # half of an emoji: json that no tokenizer can encode
SOME_SAMPLES = {
    "garbage picture": ({"png": b"garbage"}, {}, "picture cannot be decoded"),
    "HEIC": ({"png": b"\0\0\0\x18ftypheic" + bytes(99)}, {}, "picture is HEIC, whatever its name"),
    "truncated picture": ({"png": picture_bytes(0)[:-400]}, {}, "picture cannot be decoded"),
    "no picture": ({"png": None}, {}, "no picture"),
    "no caption": ({"txt": None}, {}, "no caption"),
    "caption not UTF-8": ({"txt": b"caf\xe9"}, {}, "caption is not UTF-8"),
    "caption with half a character": ({"txt": None, "json": SURROGATE}, {}, "caption is not UTF-8"),
    "broken json": ({"json": b'{"width": 32'}, {}, "json cannot be read"),
    "json is a list": ({"json": b"[1, 2]"}, {}, "json cannot be read"),
    "json nested deep": ({"json": b"[" * 100_000}, {}, "json cannot be read"),
    "small": ({"png": png(16, 99)}, {"min_image_side_px": SIDE}, "filtered by smaller side"),
    "small, one side known": (
        {"png": png(16, 99), "json": {"width": 99}}, {"min_image_side_px": SIDE}, "filtered by smaller side"
    ),
    "large": ({"png": png(100, 100)}, {"max_image_pixels": 9999}, "picture over --max_image_pixels"),
}  # fmt: skip


@cases("name", SOME_SAMPLES)
def test_a_damaged_sample_is_skipped_and_counted(script, tmp_path, name):
    members, changes, cause = SOME_SAMPLES[name]
    samples = changed(4, **members)
    shard = write_shard(tmp_path / "0.tar", samples)
    usable, report, _ = script.audit([str(shard)], make_args(script, shard, **changes))
    captions = [f"sea {i}" for i in range(8) if i % 4]
    assert [sample["caption"] for sample in usable] == captions
    assert f"({cause}: 2 (such as 0-00000))" in report
    batches = list(itertools.islice(make_stream(script, shard, **changes), 6))
    skipped = sum((Counter(batch["skipped"]) for batch in batches), Counter())
    assert skipped.keys() == {cause} and 2 <= skipped[cause] <= 4  # some may come after these batches
    assert Counter(captions_of(batches)) == Counter(2 * captions)


@pytest.mark.parametrize(
    ("members", "changes", "cause"),
    [
        ({"png": b"garbage"}, {}, "picture cannot be decoded: 8"),
        ({"txt": None}, {}, "no caption: 8"),
        ({}, {"min_image_side_px": SIDE + 1}, "filtered by smaller side: 8"),
    ],
)
def test_a_data_set_without_a_usable_sample_is_an_error(script, tmp_path, members, changes, cause):
    shard = write_shard(tmp_path / "0.tar", changed(1, **members))
    with pytest.raises(script.UnusableInput, match=cause):
        script.audit([str(shard)], make_args(script, shard, **changes))


@pytest.mark.parametrize(
    ("members", "changes"),
    [
        ({"json": {"width": None, "height": None}}, {"min_image_side_px": SIDE}),
        ({"json": b'{"width": 1' + b"0" * 400 + b"}"}, {}),
        ({"png": png(2000, 2)}, {}),
        ({"txt": ""}, {}),
        ({}, {"train_batch_size": 50}),
    ],
    ids=["null sizes", "a width of 1e400", "2000x2 picture", "empty caption", "batch over the data"],
)
def test_odd_samples_are_trained_on(script, tmp_path, members, changes):
    shard = write_shard(tmp_path / "0.tar", changed(1, **members))
    (batch,) = itertools.islice(make_stream(script, shard, **changes), 1)
    assert batch["pixels"].shape == (changes.get("train_batch_size", 2), SIDE, SIDE, 3)
    assert not batch["skipped"]


def test_the_flag_alone_limits_the_pixels_and_a_strip_is_not_blown_up(script, monkeypatch):
    """A resize to the training resolution must not cost a strip's length times that."""
    asked, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args, **kw: asked.append(args[1]) or resize(*args, **kw))
    outcome(script, {}, {"png": png(9000, 1)}, max_image_pixels=9999)
    assert all(width * height < 10**6 for width, height in asked)
    data = png(1, 1)
    start = data.index(b"IHDR")
    header = b"IHDR" + struct.pack(">II", 20_000, 10_000) + data[start + 12 : start + 17]
    data = data[:start] + header + struct.pack(">I", zlib.crc32(header)) + data[start + 21 :]
    picture = {"png": data}
    assert outcome(script, {}, picture) == "picture over --max_image_pixels"
    assert outcome(script, {}, picture, max_image_pixels=10**9) == "picture cannot be decoded"


# ----------------------------------------------------------------------------------------------------------
# Where shards come from
# ----------------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `cut-SIZE-NAME` breaks off after SIZE bytes, `flaky-SIZE-NAME` only the first time."""

    seen = Counter()

    def do_GET(self):
        how, _, rest = self.path.lstrip("/").partition("-")
        self.seen[self.path] += 1
        if how not in ("cut", "flaky"):
            return super().do_GET()
        size, _, name = rest.partition("-")
        data = (Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        whole = how == "flaky" and self.seen[self.path] > 1
        self.wfile.write(data if whole else data[: int(size)])
        self.close_connection = True

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server(layouts, monkeypatch):
    """Serve a folder of three shards at an address of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Handler.seen.clear()

    def handler(*connection):
        return Handler(*connection, directory=layouts / "equal-3")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def test_shards_come_from_http_pipe_braces_folders_and_several_values(script, layouts, server, monkeypatch):
    folder = layouts / "equal-3"
    names = [str(folder / f"{i:05d}.tar") for i in range(3)]
    assert script.list_shards([str(folder)]) == names
    assert script.list_shards([f"{folder}/{{00000..00002}}.tar"]) == names
    assert script.list_shards([f"{folder}/{{00000..00001}}.tar", names[2]]) == names
    assert script.list_shards([f"{folder.parent}/{{{folder.name},{folder.name}}}"]) == names * 2, "of folders"
    assert script.list_shards([f"{folder}/{{00000,00001}}*"]) == names[:2], "of patterns"
    assert len(script.list_shards([f"{server}/{{00000..00002}}.tar"])) == 3
    assert len(script.list_shards([f"{server}/{{0..2}}.tar?sig={'s' * 400}", f"pipe:cat {'x' * 400}"])) == 4
    for url in (f"{server}/00001.tar", f"pipe:cat {names[1]}"):
        skipped = Counter()
        captions = [sample["txt"].decode() for sample in script.read_shard(url, skipped)]
        assert captions == [f"sea {i}" for i in range(12, 24)] and not skipped
    monkeypatch.setattr(script, "os", Windows())
    for value in r"C:\data\{00,01}.tar", "file:///C:/data/00.tar":
        with pytest.raises(script.UnusableInput, match=r"data C:[\\/]data[\\/]00\.tar: No such file"):
            script.list_shards([value])
    commands = []
    monkeypatch.setattr(script.subprocess, "Popen", lambda command, **_: commands.append(command) or 1 / 0)
    with pytest.raises(ZeroDivisionError), script.open_shard("https://host/a.tar?x=1&y=2"):
        pass
    assert commands[0].endswith(' "https://host/a.tar?x=1&y=2"')


def member_offset(folder, number):
    with tarfile.open(folder / "equal-3" / "00000.tar") as tar:
        return tar.getmembers()[number].offset


@pytest.mark.parametrize("inside", [True, False], ids=["inside a file", "between two files"])
def test_a_connection_that_dies_is_named_and_its_shard_left(script, layouts, server, monkeypatch, inside):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    size = member_offset(layouts, 15) + 700 * inside  # five whole samples
    url, skipped = f"{server}/cut-{size}-00000.tar", Counter()
    assert len(list(script.read_shard(url, skipped))) <= 5
    ((cause, count),) = skipped.items()
    assert url in cause and count == 1
    assert Handler.seen[f"/cut-{size}-00000.tar"] == script.READ_ATTEMPTS


def test_a_connection_that_dies_once_loses_nothing(script, layouts, server, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    size = member_offset(layouts, 16) + 700
    url, skipped = f"{server}/flaky-{size}-00000.tar", Counter()
    captions = [sample["txt"].decode() for sample in script.read_shard(url, skipped)]
    assert captions == [f"sea {i}" for i in range(12)] and not skipped


@pytest.mark.parametrize("source", ["http", "pipe"])
def test_an_address_that_gives_nothing_is_an_error_that_names_it(script, server, monkeypatch, source):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    url = f"{server}/missing.tar" if source == "http" else "pipe:cat /no/such.tar"
    with pytest.raises(script.UnusableInput, match=url):
        script.audit(script.list_shards([url]), make_args(script, url))


# ----------------------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------------------

LEFT, RIGHT = (200, 40, 80), (20, 120, 220)


def halves(mode, left, right):
    picture = Image.new(mode, (64, 48), right)
    picture.paste(left, (0, 0, 32, 48))
    return picture


def encode(picture, suffix="PNG", **options):
    data = io.BytesIO()
    picture.save(data, suffix, **options)
    return data.getvalue()


def palette(transparent):
    picture = halves("P", 1, 2)
    picture.putpalette([9, 9, 9, *LEFT, *RIGHT])
    return encode(picture, **({"transparency": 1} if transparent else {}))


def odd_floats(picture, *odd):
    for x, value in enumerate(odd):
        picture.putpixel((x, 0), value)
    return encode(picture, "TIFF")


WHITE, GREY = (255,) * 3, (128,) * 3
PICTURES = {
    "RGB": (encode(halves("RGB", LEFT, RIGHT)), LEFT, RIGHT),
    "CMYK": (encode(halves("RGB", LEFT, RIGHT).convert("CMYK"), "JPEG", quality=95), LEFT, RIGHT),
    "palette": (palette(transparent=False), LEFT, RIGHT),
    "palette with transparency": (palette(transparent=True), WHITE, RIGHT),
    "RGBA": (encode(halves("RGBA", (0, 0, 0, 0), (*RIGHT, 255))), WHITE, RIGHT),
    "RGBA, half": (encode(halves("RGBA", (0, 0, 0, 127), (*RIGHT, 255))), GREY, RIGHT),
    "LA": (encode(halves("LA", (0, 0), (128, 255))), WHITE, GREY),
    "16-bit grey": (encode(halves("I;16", 32896, 65535)), GREY, WHITE),
    "16-bit grey, dark": (encode(halves("I;16", 0, 200)), (0,) * 3, (1,) * 3),
    "16-bit grey TIFF": (encode(halves("I;16", 32896, 65535), "TIFF"), GREY, WHITE),
    "16-bit grey TIFF, big-endian": (encode(halves("I;16B", 32896, 65535), "TIFF"), GREY, WHITE),
    "float TIFF of 0 to 1": (encode(halves("F", 0.5, 1.0), "TIFF"), GREY, WHITE),
    "float TIFF of 0 to 255": (encode(halves("F", 128.0, 255.0), "TIFF"), GREY, WHITE),
    "float TIFF of a few white lines": (odd_floats(halves("F", 0.0, 0.0), 255.0), (0,) * 3, (0,) * 3),
    "float TIFF with odd pixels": (odd_floats(halves("F", 0.5, 1.0), 1.5, math.nan, math.inf), GREY, WHITE),
    "BMP": (encode(halves("RGB", LEFT, RIGHT), "BMP"), LEFT, RIGHT),
    "GIF": (encode(halves("RGB", LEFT, RIGHT), "GIF"), LEFT, RIGHT),
    "PPM": (encode(halves("RGB", LEFT, RIGHT), "PPM"), LEFT, RIGHT),
    "TGA": (encode(halves("RGB", LEFT, RIGHT), "TGA"), LEFT, RIGHT),
    "JPEG 2000": (encode(halves("RGB", LEFT, RIGHT), "JPEG2000"), LEFT, RIGHT),
    "1-bit": (encode(halves("1", 1, 0)), WHITE, (0,) * 3),
    "WebP": (encode(halves("RGB", LEFT, RIGHT), "WEBP", lossless=True), LEFT, RIGHT),
}


@cases(("data", "left", "right"), PICTURES.values(), ids=PICTURES)
def test_every_kind_of_picture_comes_out_in_its_colours(script, data, left, right):
    picture, original = script.open_picture(data, 10**6)
    assert picture.mode == "RGB" and picture.size == original == (64, 48)
    for x, colour in ((8, left), (56, right)):
        assert np.allclose(picture.getpixel((x, 24)), colour, atol=4)


@cases("orientation", [*range(1, 9), 99])
def test_pictures_are_turned_upright(script, orientation):
    # How a camera stores a picture that is upright once EXIF's orientation is obeyed.
    stored = {
        2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
        7: "TRANSVERSE", 8: "ROTATE_270",
    }  # fmt: skip
    upright = halves("RGB", LEFT, RIGHT)
    upright.paste((255, 255, 255), (0, 0, 32, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright.transpose(Image.Transpose[stored[orientation]]) if orientation in stored else upright
    exif[0x011A] = 72  # a resolution
    odd = (
        exif.tobytes().replace(b"\x01\x1a\0\5", b"\x01\x1a\0\n").replace(b"\0\0\0H\0\0\0\1", b"\xff" * 4 + b"\0\0\0\1")
    )
    for kind, given in (
        ("PNG", exif),
        ("PNG", odd),
        ("JPEG", odd),
        ("WEBP", odd),
    ):  # less than 0: Pillow cannot write it
        picture, original = script.open_picture(encode(turned, kind, exif=given, quality=100), 10**6)
        assert original == picture.size == (64, 48)
        assert np.abs(np.asarray(picture, int) - np.asarray(upright, int)).mean() < {"PNG": 1e-9}.get(kind, 3)
    for kind, none in itertools.product(("PNG", "WEBP", "JPEG"), (b"garbage", b"Exif\0\0II*\0")):
        assert script.open_picture(encode(upright, kind, exif=none), 10**6)[1] == (64, 48)
    for unclear in (odd_floats(halves("F", 0.5, 1.0), 200.0), encode(halves("F", 0.0, 10.0), "TIFF")):
        with pytest.raises(
            script.SkippedSample, match="range cannot be told"
        ):  # [0, 1] and lamps, or night in [0, 255]
            script.open_picture(unclear, 10**6)


@cases(("size", "orientation"), [((640, 480), 1), ((641, 333), 6), ((199, 201), 1), ((255, 256), 1), ((255, 256), 8)])
def test_jpeg_is_decoded_small_but_not_too_small(script, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.effect_noise(size, 50).convert("RGB"), "JPEG", exif=exif)
    picture, original = script.open_picture(data, 10**6, 96)
    assert original == (size if orientation == 1 else size[::-1])
    assert 96 <= min(picture.size) <= min(size)
    assert min(picture.size) < 192, "decoded at 1/2 or less where that is enough"


# ----------------------------------------------------------------------------------------------------------
# Crops
# ----------------------------------------------------------------------------------------------------------


def ruler(width=60, height=40):
    """Return a picture whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8))


def test_center_crop_takes_the_middle(script):
    args = make_args(script, "pipe:", resolution=40, center_crop=True)
    pixels, corner = script.crop(ruler(), args, random.Random())
    assert corner == (0, 10) and pixels.shape == (40, 40, 3) and pixels.dtype == np.uint8
    assert pixels[0, :, 0].tolist() == list(range(10, 50)) and pixels[:, 0, 1].tolist() == list(range(40))


def test_random_crop_and_flip_are_what_they_say(script):
    args = make_args(script, "pipe:", resolution=32, random_flip=True, interpolation_type="nearest")
    corners, flips = set(), 0
    for seed in range(60):
        pixels, (top, left) = script.crop(ruler(62, 32), args, random.Random(seed))
        row = pixels[0, :, 0].tolist()
        flipped = row[0] > row[-1]
        # Of a mirrored picture, the corner is counted from its own left side.
        assert row == (list(range(61 - left, 29 - left, -1)) if flipped else list(range(left, left + 32)))
        assert top == 0 and 0 <= left <= 30
        corners.add(left)
        flips += flipped
    assert len(corners) > 15 and {0, 30} & corners
    found, noise = set(), Image.effect_noise((96, 96), 50).convert("RGB")
    for args.interpolation_type in ("nearest", "bilinear", "bicubic", "lanczos"):
        found.add(script.crop(noise, args, random.Random(0))[0].tobytes())
    assert len(found) == 4, "each of the flag's values is used"
    args.interpolation_type = "nearest"
    assert 18 <= flips <= 42
    tall = [script.crop(ruler(32, 62), args, random.Random(seed)) for seed in range(9)]
    assert all(pixels[0, 0, 1] == top for pixels, (top, _) in tall) and len({c for _, (c, _) in tall}) > 3


@cases("size", [(120, 80), (80, 120), (30, 20), (81, 80), (2000, 2)])
def test_a_crop_keeps_the_aspect(script, size):
    args = make_args(script, "pipe:", resolution=40, center_crop=True)
    scale = 40 / min(size)
    picture = ruler(*size) if max(size) < 256 else Image.new("RGB", size)
    pixels, (top, left) = script.crop(picture, args, random.Random())
    assert pixels.shape == (40, 40, 3)
    assert (top, left) == ((round(size[1] * scale) - 40) // 2, (round(size[0] * scale) - 40) // 2)
    if max(size) < 256:  # 20 pixels of the crop span 20 / scale of the picture, in x and in y
        for channel, line in ((0, pixels[20, :, 0]), (1, pixels[:, 20, 1])):
            assert int(line[30]) - int(line[10]) == pytest.approx(20 / scale, abs=1), channel


def test_a_sample_is_a_function_of_seed_epoch_and_key(script):
    data = encode(ruler(200, 40))

    def left(key="a", epoch=0, shard="0.tar", **changes):
        sample = {"png": data, "txt": b"sea", "__key__": key, "__url__": shard}
        prepared = script.prepare_sample(sample, make_args(script, "pipe:", **changes), epoch)
        return prepared["pixels"][0, 0, 0]  # of the ruler: grows with x

    assert left() == left()
    assert len({left(key) for key in "abcdef"}) > 3
    assert len({left(epoch=epoch) for epoch in range(6)}) > 3
    assert len({left(seed=seed) for seed in range(6)}) > 3
    assert len({left(shard=f"{n}.tar") for n in range(6)}) > 3
    # However the place is spelled when a run is resumed.
    assert len({left(shard=place + "0.tar") for place in ("", "./", "/data/", "C:\\data\\", "https://host/a/")}) == 1


# ----------------------------------------------------------------------------------------------------------
# Filters and captions
# ----------------------------------------------------------------------------------------------------------


def outcome(script, record, members=None, **changes):
    """Return a sample's training sample, or the cause why it is skipped."""
    sample = {"png": picture_bytes(0), "txt": b"sea", "json": json.dumps(record).encode()} | (members or {})
    sample |= {"__key__": "a", "__url__": "0.tar"}
    sample = {name: value for name, value in sample.items() if value is not None}
    try:
        return script.prepare_sample(sample, make_args(script, "pipe:", **changes), 0)
    except script.SkippedSample as cause:
        return str(cause)


FILTERS = {  # flag, limit, a value it rejects, one it keeps, spellings
    "watermark": ("max_watermark", 0.5, 0.6, 0.4, ["pwatermark", "watermark", "PWatermark"]),
    "unsafe": ("max_unsafe", 0.1, 0.2, 0.0, ["punsafe", "UNSAFE"]),
    "aesthetic score": ("min_aesthetic", 5.0, 4.9, 5.0, ["AESTHETIC_SCORE", "aesthetic"]),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters(script, name):
    flag, limit, bad, fine, keys = FILTERS[name]
    for key in keys:
        assert outcome(script, {key: bad}, **{flag: limit}) == f"filtered by {name}"
        assert outcome(script, {key: fine}, **{flag: limit})["caption"] == "sea"
        assert outcome(script, {key: bad})["caption"] == "sea", "no filter without its flag"
    for none in (None, "", " ", []):  # of one name in two spellings the filled one counts
        pairs = [(keys[0].lower(), bad), (keys[0].upper(), none)]
        for record in (dict(pairs), dict(reversed(pairs))):
            assert outcome(script, record, **{flag: limit}) == f"filtered by {name}"
    for record in ({}, {keys[0]: None}, {keys[0]: ""}):
        assert outcome(script, record, **{flag: limit})["caption"] == "sea", "missing is no rejection"
        asked = outcome(script, record, **{flag: limit, "require_metadata": True})
        assert asked == f"no {name} in the metadata"


@pytest.mark.parametrize("prefix", ["", "original_"])
def test_side_filter(script, prefix):
    record = {f"{prefix}width": 500, f"{prefix}height": 99}
    assert outcome(script, record, min_image_side_px=100) == "filtered by smaller side"
    assert outcome(script, record, min_image_side_px=99)["caption"] == "sea"
    for require_metadata in (None, True):  # the picture's own side will do
        options = {"require_metadata": require_metadata}
        assert outcome(script, {}, min_image_side_px=SIDE, **options)["caption"] == "sea"
        assert outcome(script, {}, min_image_side_px=SIDE + 1, **options) == "filtered by smaller side"


def test_size_before_resizing_by_img2dataset_counts(script):
    record = {"original_width": 900, "original_height": 900, "width": 99, "height": 99}
    assert outcome(script, record, min_image_side_px=800)["caption"] == "sea"


def test_caption_comes_from_the_text_else_from_the_json(script):
    assert outcome(script, {"caption": "hill"})["caption"] == "sea"
    assert outcome(script, {"caption": " hill\n"}, {"txt": None})["caption"] == "hill"
    assert outcome(script, {"caption": None}, {"txt": None}) == "no caption"
    assert outcome(script, {}, {"txt": "sea é\n".encode(), "json": None})["caption"] == "sea é"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_format_are_read_as_tarfile_reads_them(script, tmp_path, form):
    """Long names, names not ASCII, sizes and times in extended headers, links, folders."""
    written = {
        "a.txt": b"sea",
        f"{'d' * 90}/{'f' * 60}.txt": b"a" * 513,
        "ä.json": b"{}",
        "empty.txt": b"",
        "block.jpg": b"b" * 512,
        "x.pkl": b"no data",
        "last.png": b"c" * 20_000,
    }
    others = {f"link{'k' * 90}.txt": tarfile.SYMTYPE, "h.jpg": tarfile.LNKTYPE, "f.png": tarfile.DIRTYPE}
    headers = {"comment": "for all"} if form == tarfile.PAX_FORMAT else None
    with tarfile.open(tmp_path / "0.tar", "w", format=form, pax_headers=headers) as tar:
        for name, data in written.items():
            member = tarfile.TarInfo(name)
            member.mtime = 1.5
            member.size, member.pax_headers = len(data), {"size": str(len(data)), "comment": "1=2 \n 3"}
            tar.addfile(member, io.BytesIO(data))
            for other, member.type in others.items():
                member.name, member.linkname = other, "t" * (90 if form == tarfile.USTAR_FORMAT else 120)
                tar.addfile(member)  # with a size, as tar programs of old gave to links
    with tarfile.open(tmp_path / "0.tar") as tar:
        expected = {m.name: tar.extractfile(m).read() for m in tar if m.isreg() and m.name != "x.pkl"}
    assert len(expected) == 6 and expected.items() <= written.items()
    read = list(script.shard_members(str(tmp_path / "0.tar"), lost := Counter()))
    assert read == list(expected.items())
    assert lost == {"link in a tar; pack with tar --dereference --hard-dereference": 14}


def test_a_crop_does_not_keep_the_whole_picture(script):
    args = make_args(script, "pipe:", resolution=48)
    for size in ((4000, 48), (48, 4000)):
        picture, _ = script.open_picture(encode(Image.new("RGB", size), "JPEG"), 10**6, 48)
        kept, _ = script.crop(picture, args, random.Random(0))
        while isinstance(kept.base, np.ndarray):
            kept = kept.base
        assert kept.nbytes == 48 * 48 * 3


# ----------------------------------------------------------------------------------------------------------
# A folder of pictures is a data set
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, script, monkeypatch):
    """Return a folder of 20 pictures in folders, with captions, in virtual shards of 8."""
    monkeypatch.setattr(script, "SAMPLES_PER_FOLDER_SHARD", 8)
    for i in range(20):
        path = tmp_path / f"part{i % 3}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture_bytes(i))
        path.with_suffix(".txt").write_text(f"sea {i}")
    (tmp_path / "part0" / "notes.pdf").write_bytes(b"no picture")
    return tmp_path


def test_a_folder_of_pictures_is_read_as_shards(script, folder):
    shards = script.list_shards([str(folder)])
    assert len(shards) == 3 and script.count_samples(shards) == 20
    for processes in (1, 2, 3):
        streams = [make_stream(script, folder, processes, rank) for rank in range(processes)]
        read = Counter(
            raw["txt"] for stream in streams for raw in stream.raw_samples(0, stream.first_consumer, Counter())
        )
        assert set(read.values()) == {1} and len(read) == 20


def test_a_folder_of_pictures_resumes_where_it_stopped(script, folder):
    unbroken = batches_of(script, make_stream(script, folder), 14)  # over an epoch's end
    consumer, *position = unbroken[6]["position"]
    resumed = batches_of(script, make_stream(script, folder, done=7, positions={str(consumer): position}), 7)
    assert captions_of(resumed) == captions_of(unbroken[7:])
    linked = folder.with_name(f"{folder.name}-linked")  # one place, two names: the same crops
    linked.symlink_to(folder)
    streams = [make_stream(script, name, random_flip=True, train_batch_size=16) for name in (folder, linked)]
    assert torch.equal(*(next(iter(stream))["pixels"] for stream in streams))


def test_what_a_folder_lacks_is_counted_or_named(script, folder, tmp_path, monkeypatch, capsys):
    (folder / "part1" / "01.txt").unlink()
    (folder / "part2" / "02.png").write_bytes(b"garbage")
    (folder / "part2" / "05.jpg").write_bytes(picture_bytes(5))  # beside 05.png
    (folder / "part2" / "_cache.jpg").write_bytes(picture_bytes(6))  # a name of its own use
    (folder / "part2" / "_cache.txt").write_text("sea 20")
    (folder / "part2" / "08.png").unlink()
    (folder / "part2" / "08.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "part0" / "pipe.png")  # reading it would wait for ever
    assert script.data_checksum(script.list_shards([str(folder)]))
    for value in ("", "::", f" ::{folder}", f"{folder}::", "file://", f"{{,{folder}}}"):  # as of an unset variable
        with pytest.raises(script.UnusableInput, match="is empty; mend it"):
            script.list_shards([value])
    walk = os.walk

    def walk_with_a_fault(top, onerror=None, **options):
        onerror(PermissionError(13, "Permission denied", "lost+found"))
        return walk(top, **options)

    monkeypatch.setattr(os, "walk", walk_with_a_fault)
    usable, report, _ = script.audit(script.list_shards([str(folder)]), make_args(script, folder))
    assert len(usable) == 18 and "no caption: 1" in report and "picture cannot be decoded: 1" in report
    assert "picture cannot be read: 1 (such as part2/08)" in report, "a sample by its name"
    assert "second picture of a sample, such as a.png beside a.jpg: 1" in report
    assert "folder lost+found (Permission denied): 1" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(script.UnusableInput, match="empty.*no picture"):
        script.list_shards([str(tmp_path / "empty")])


def test_a_picture_that_goes_while_a_run_lasts_is_counted(script, folder, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    stream, skipped = make_stream(script, folder), Counter()
    (folder / "part1" / "01.png").unlink()
    raws = list(stream.raw_samples(0, 0, skipped))
    # A thousand pictures of a camera, waiting to be shuffled, would fill the memory.
    assert len(raws) == 20 and all(Path(raw["png"]).suffix == ".png" for raw in raws) and not skipped
    skips = sum((Counter(batch["skipped"]) for batch in batches_of(script, stream, 12)), Counter())
    assert set(skips) == {"picture cannot be read"}
    raws[0]["__key__"] = "z\udcfc"  # not UTF-8, as in old zips
    assert script.prepare_sample(raws[0] | {"png": picture_bytes(1)}, stream.args, 0)
    (folder / "part1" / "04.txt").unlink()
    raws = list(stream.raw_samples(0, 0, skipped))
    assert len(raws) == 20 and sum("txt" not in raw for raw in raws) == 1 and not skipped


@pytest.mark.parametrize("stats", [{"samples": 12}, {"successes": 12, "count": 15}, {"other": 1}, None])
def test_stats_files_tell_how_many_samples_there_are(script, tmp_path, stats):
    for shard in write_shards(tmp_path, 2):
        if stats:
            shard.with_name(f"{shard.stem}_stats.json").write_text(json.dumps(stats))
    known = {"samples", "successes"} & set(stats or ())
    assert script.count_samples(script.list_shards([str(tmp_path)])) == (24 if known else None)
