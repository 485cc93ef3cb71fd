"""Streams that end early or fail, errors within seconds, every picture once an epoch."""

import bz2
import gzip
import hashlib
import http.server
import itertools
import lzma
import random
import tarfile
import threading
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import SCRIPTS, flags, load_script, picture_bytes, write_shard, write_shards, write_tar

SAMPLES = 6  # of the shard that is damaged


@pytest.fixture(scope="module")
def script():
    """One family: check_shared.py proves that the other one reads data with the same code."""
    return load_script(SCRIPTS[0])


@pytest.fixture
def sleeps(script, monkeypatch):
    """Do not wait between attempts; return how long each would have waited, s."""
    asked, sleep = [], time.sleep

    def wait(seconds):  # whole seconds: read_shard; others: subprocess and the server
        asked.append(seconds) if isinstance(seconds, int) else sleep(seconds)

    monkeypatch.setattr(script.time, "sleep", wait)
    return asked


@pytest.fixture
def shard(tmp_path):
    (path,) = write_shards(tmp_path, 1, SAMPLES)
    return path


def read(script, url):
    """Return (captions that a shard gives, what was counted)."""
    skipped = script.Skipped()
    return [sample["txt"].decode() for sample in script.read_shard(str(url), skipped) if "txt" in sample], skipped


def offsets(shard):
    """Return where in a tar its members begin, and where its end mark does."""
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar.getmembers()] + [tar.offset]


# ----------------------------------------------------------------------------------------------------------
# A shard that is read is known to be whole
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", range(1, 3 * SAMPLES + 1))
def test_an_end_between_any_two_members_is_noticed(script, shard, sleeps, member):
    end = offsets(shard)[member]
    captions, skipped = read(script, f"pipe:head -c {end} {shard}")
    ((cause, count),) = skipped.items()
    assert str(shard) in cause and "end" in cause and count == 1
    assert sorted(set(captions)) == sorted(captions), "no sample twice, though it was read three times"
    assert len(captions) >= (member - 1) // 3 and len(sleeps) == script.READ_ATTEMPTS


def test_a_command_that_fails_is_noticed_and_read_again(script, shard, sleeps, tmp_path, monkeypatch):
    captions, skipped = read(script, f"pipe:cat {shard}; exit 3")
    ((cause, count),) = skipped.items()
    assert "exit code 3" in cause and count == 1
    assert captions == [f"sea {i}" for i in range(len(captions))] and len(sleeps) == script.READ_ATTEMPTS
    skipped = Counter()
    with monkeypatch.context() as patch:
        patch.setattr(script, "COMMAND_STALL_S", 0.3)
        stall = f"pipe:head -c {offsets(shard)[6] + 700} {shard}; sleep 3333"
        assert len(list(script.read_shard(stall, skipped, attempts=1))) == 1
        closed = f"pipe:head -c {offsets(shard)[6]} {shard}; exec >&-; sleep 3333"
        assert len(list(script.read_shard(closed, skipped, attempts=1))) == 1
    assert sum(skipped.values()) == 2 and "sent nothing for 0.3 s" in str(skipped) and "does not end" in str(skipped)
    list(script.read_shard("pipe:printf '%0600d' 7; echo no access >&2; exit 22", skipped, attempts=1))
    assert "exit code 22: no access" in str(skipped), "an error page is no damaged tar"
    (tmp_path / "0.tgz").write_bytes(gzip.compress(shard.read_bytes()))
    slow = f"pipe:head -c 2 {tmp_path}/0.tgz; sleep 0.3; tail -c +3 {tmp_path}/0.tgz"
    assert len(list(script.read_shard(slow, script.Skipped(), attempts=1))) == SAMPLES
    # A connection that breaks again and again loses nothing as long as samples come.
    sleeps.clear()
    ends = [*offsets(shard)[6::3], shard.stat().st_size]  # each attempt gets a sample more than the one before
    (tmp_path / "ends").write_text("".join(f"{end}\n" for end in ends))
    read_one_more = f"tail -n +$(wc -l < {tmp_path}/tries) {tmp_path}/ends | head -n 1"
    captions, skipped = read(script, f"pipe:echo >> {tmp_path}/tries; head -c $({read_one_more}) {shard}")
    assert captions == [f"sea {i}" for i in range(SAMPLES)] and not skipped
    assert len(sleeps) == len(ends) > script.READ_ATTEMPTS and max(sleeps) == 1


@pytest.mark.usefixtures("sleeps")
def test_a_damaged_header_does_not_end_a_shard_in_silence(script, shard):
    data = bytearray(shard.read_bytes())
    start = offsets(shard)[6]
    data[start : start + 100] = bytes(range(100))
    shard.write_bytes(data)
    script.check_shard(shard)  # looks at head and tail alone
    captions, skipped = read(script, shard)
    ((cause, _),) = skipped.items()
    assert captions[:1] == ["sea 0"] and len(captions) < SAMPLES and "bad checksum" in cause


@pytest.mark.usefixtures("sleeps")
@pytest.mark.parametrize("padding", [0, 5120, 3_000_000])
def test_a_whole_shard_is_whole_whatever_follows_its_end_mark(script, shard, padding):
    blocks = bytes(padding // 512 * 512)
    first = write_shard(shard.with_name("first.tar"), [{"png": picture_bytes(i), "txt": f"{i}"} for i in range(3)])
    first.write_bytes(first.read_bytes() + blocks)
    captions, skipped = read(script, f"pipe:cat {first} {shard}")  # two tars
    assert captions == ["0", "1", "2", *(f"sea {i}" for i in range(SAMPLES))] and not skipped
    captions, skipped = read(script, f"pipe:cat {first}; head -c {offsets(shard)[6]} {shard}")
    assert len(captions) in (4, 5) and "ends before its end mark" in str(skipped)
    for packed in ("(gzip -c {0}; gzip -c {1})", "cat {0} {1} | bzip2", "cat {0} {1} | gzip"):
        captions, skipped = read(script, f"pipe:{packed.format(first, shard)}")
        assert len(captions) == 3 + SAMPLES and not skipped
    junk = "bytes behind an end mark that are no tar"
    for packed, found in (
        ("gzip -c {0}; echo junk", ({junk: 1},)),
        ("xz -c {0}; head -c 5000 /dev/zero", ({}, {junk: 1})),
        ("cat {0}; head -c 700 /dev/urandom; cat {0}", ({junk: 1},)),
        ("cat {0}; head -c 20000000 /dev/zero", ({},)),
    ):
        captions, skipped = read(script, f"pipe:({packed.format(shard)})")
        assert captions == [f"sea {i}" for i in range(SAMPLES)] and skipped in found, packed
    shard.write_bytes(shard.read_bytes() + bytes(padding))
    for url in (shard, f"pipe:cat {shard}", f"pipe:cat {shard} | cat"):
        captions, skipped = read(script, url)
        assert captions == [f"sea {i}" for i in range(SAMPLES)] and not skipped


@pytest.mark.usefixtures("sleeps")
def test_compressed_shards_are_read_and_their_early_end_is_noticed(script, shard):
    packed = shard.with_suffix(".tar.gz")
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert read(script, packed) == ([f"sea {i}" for i in range(SAMPLES)], Counter())
    packed.write_bytes(gzip.compress(shard.read_bytes()[: offsets(shard)[9]]))  # whole as a gzip file
    captions, skipped = read(script, packed)
    assert len(captions) in (2, 3) and "ends before its end mark" in str(skipped)
    packed.write_bytes(packed.read_bytes()[:-200])
    assert sum(read(script, packed)[1].values()) == 1
    data = bytearray(gzip.compress(shard.read_bytes()))
    data[10] = 0xFF  # behind gzip's header: a block of no known type
    packed.write_bytes(data)
    assert "broke off" in str(read(script, packed)[1])


@pytest.mark.usefixtures("sleeps")
@pytest.mark.parametrize("module", [bz2, lzma])
def test_other_kinds_of_compression_are_read(script, shard, module):
    packed = shard.with_suffix(".packed")
    packed.write_bytes(module.compress(shard.read_bytes()))
    assert read(script, packed) == ([f"sea {i}" for i in range(SAMPLES)], Counter())
    packed.write_bytes(packed.read_bytes()[:-400])
    assert "broke off" in str(read(script, packed)[1])


@pytest.mark.usefixtures("sleeps")
@pytest.mark.parametrize("end", ["head -c 3000", "head -c 512", "head -c 10", "head -c 0"])
def test_a_command_that_ends_early_with_exit_code_0_is_noticed(script, shard, end):
    captions, skipped = read(script, f"pipe:{end} {shard}")
    assert len(captions) < SAMPLES and sum(skipped.values()) == 1 and "broke off" in str(skipped)


@pytest.mark.usefixtures("sleeps")
def test_what_is_not_read_does_not_lie_in_memory(script, tmp_path):
    """As a film among the pictures."""
    path = write_tar(tmp_path / "0.tar", [("film.mp4", bytes(2**25)), ("a.txt", b"sea"), ("b.mov", bytes(2**25))])
    tracemalloc.start()
    try:
        assert read(script, path)[0] == ["sea"]
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("sleeps")
def test_sparse_files_are_an_error(script, tmp_path):
    header = tarfile.TarInfo("a.txt")
    header.type, header.size = tarfile.GNUTYPE_SPARSE, 512
    (tmp_path / "0.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(512 + 1024))
    captions, skipped = read(script, tmp_path / "0.tar")
    assert not captions and "sparse files are not read" in str(skipped)


@pytest.mark.usefixtures("sleeps")
def test_random_damage_never_ends_a_reader(script, shard):
    """What is read is what was written, or it is counted; no other error comes out."""
    rng, whole = random.Random(0), shard.read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for place in rng.sample(range(len(data)), rng.choice((1, 3))):
            data[place] = rng.randrange(256)
        start = rng.choice(offsets_of_headers(whole)) + rng.choice((0, 124, 156, 257, 345))
        data[start : start + 3] = rng.randbytes(3)
        shard.write_bytes(data if rng.random() < 0.7 else data[: rng.randrange(len(data))])
        captions, skipped = [], script.Skipped()
        for sample in script.read_shard(str(shard), skipped):
            captions.append(sample.get("txt"))
        assert len(captions) == SAMPLES or skipped


def offsets_of_headers(data):
    return [place for place in range(0, len(data), 512) if data[place + 257 : place + 262] == b"ustar"]


def test_a_stream_may_be_left_in_the_middle(script, tmp_path, recwarn):
    samples = [{"png": picture_bytes(0), "txt": "sea", "json": {"filling": "x" * 100_000}} for _ in range(40)]
    path = write_shard(tmp_path / "0.tar", samples)
    skipped = Counter()
    stream = script.read_shard(f"pipe:cat {path}", skipped)
    next(stream)
    started = time.monotonic()
    stream.close()
    del stream
    assert time.monotonic() - started < 5 and not skipped
    assert not [warning for warning in recwarn if "xception" in str(warning.message)]


@pytest.mark.usefixtures("sleeps")
def test_unreadable_shards_end_a_run_if_all_are_and_are_counted_once_if_it_is_resumed(script, shard):
    args = script.parse_args(flags("a/teacher", "pipe:false", "unused"))
    stream = script.ShardStream(["pipe:false"], args, 1, 0, 1)
    job = SimpleNamespace(state=script.RunState(), accelerator=SimpleNamespace(num_processes=1))
    with pytest.raises(script.UnusableInput, match="no usable sample in 5 epochs: shard pipe:false broke off.*: 5$"):
        script.next_batch(job, iter(script.make_loader(stream, 0, torch.device("cpu"))), {})

    # One of two consumers has nothing but the broken shard in the first epoch. In a later one it has the whole one.
    streams = [script.ShardStream(["pipe:false", str(shard)], args, 2, rank, 1) for rank in (0, 1)]
    epochs = sorted(next(iter(stream))["position"][1] for stream in streams)
    assert epochs[0] == 0 < epochs[1] < 5

    args = script.parse_args(flags("a/teacher", "x", "unused", train_batch_size=2, shuffle_buffer_samples=2))

    def counts(start, num_batches):
        stream, counted = script.ShardStream([f"pipe:head -c {offsets(shard)[9]} {shard}"], args, 1, 0, 1), Counter()
        stream.start_positions = start
        for batch in itertools.islice(stream, num_batches):
            counted.update(batch["skipped"])
        return counted, {"0": batch["position"][1:]}

    whole, _ = counts({}, 7)
    first, place = counts({}, 4)
    assert whole.total() > first.total() > 0 and first + counts(place, 3)[0] == whole


# ----------------------------------------------------------------------------------------------------------
# Errors come within seconds
# ----------------------------------------------------------------------------------------------------------

ANSWERS = {  # status, length that is promised, what is sent
    "404": (404, 0, b""),
    "empty": (200, 0, b""),
    "a page, no tar": (200, 5000, b"<html>log in</html>" + b" " * 4981),
    "dies at once": (200, 5000, b"x" * 10),
    "stalls": (200, 5000, b"x" * 100),
}
STALLS = len(ANSWERS) - 1


@pytest.fixture
def server(monkeypatch):
    """Give ANSWERS by their number."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            number = int(self.path.strip("/").split(".")[0])
            status, length, data = [*ANSWERS.values()][number]
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(data)
            if status == 200 and number == STALLS:
                self.wfile.flush()
                ended.wait(60)
            self.close_connection = True

        def log_message(self, *_):
            """Say nothing."""

    ended = threading.Event()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        ended.set()
        httpd.shutdown()


@pytest.mark.parametrize("number", range(STALLS), ids=[*ANSWERS][:STALLS])
def test_an_address_without_a_shard_is_an_error_in_under_10_seconds(script, server, sleeps, number):
    url = f"{server}/{number}.tar"
    args = script.parse_args(flags("a/teacher", url, "unused"))
    started = time.monotonic()
    with pytest.raises(script.UnusableInput, match=f"shard {url} broke off"):
        script.audit(script.list_shards([url]), args)
    assert time.monotonic() - started + sum(sleeps) < 10


@pytest.mark.usefixtures("sleeps")
def test_a_server_that_stalls_is_left(script, server, monkeypatch):
    monkeypatch.setattr(script, "STALL_S", 1)
    skipped, started = script.Skipped(), time.monotonic()
    assert not list(script.read_shard(f"{server}/{STALLS}.tar", skipped, attempts=1))
    assert time.monotonic() - started < 30 and "broke off" in str(skipped)


# ----------------------------------------------------------------------------------------------------------
# Every picture once an epoch
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for count in (1, 3, 8):
        write_shards(folder / str(count), count, 12)
    return folder


def stream_of(script, shards, args, processes, rank, done=0, positions=None):
    """Return the stream of one of several processes after `done` of its batches."""
    workers = max(1, args.dataloader_num_workers or 0)
    stream = script.ShardStream(shards, args, processes * workers, rank * workers, workers)
    stream.start_batch, stream.start_positions = done, positions or {}
    return stream


def first_epoch(stream, worker, monkeypatch):
    """Return (hash of the pixels, caption) of each sample that a loader worker gives in epoch 0, in order."""
    info = SimpleNamespace(id=worker) if stream.args.dataloader_num_workers else None
    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.data.get_worker_info", lambda: info)
        batches = itertools.takewhile(lambda batch: batch["position"][1] == 0, stream)
        return [
            (hashlib.sha256(batch["pixels"].numpy().tobytes()).hexdigest(), *batch["caption"]) for batch in batches
        ]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_picture_comes_once_an_epoch(script, layouts, monkeypatch, count):
    shards = script.list_shards([str(layouts / str(count))])
    orders = {}
    for processes, workers in itertools.product((1, 2, 3), (0, 1, 3)):
        line = flags("a/teacher", layouts, "u", train_batch_size=1, dataloader_num_workers=workers, seed=4)
        args = script.parse_args(line)
        parts = [
            first_epoch(stream_of(script, shards, args, processes, rank), worker, monkeypatch)
            for rank in range(processes)
            for worker in range(max(1, workers))
        ]
        seen = Counter(sample for part in parts for sample in part)
        assert len({pixels for pixels, _ in seen}) == len(seen) == 12 * count
        assert set(seen.values()) == {1}, f"{processes} processes, {workers} workers"
        orders[processes, workers] = parts
    assert orders[1, 0] == orders[1, 1] and orders[2, 0] == orders[2, 1], "a worker changes nothing"
    args.seed = 5
    again = [first_epoch(stream_of(script, shards, args, 3, 0), 0, monkeypatch) for _ in "ab"]
    assert again[0] == again[1] != orders[3, 3][0], "order is a function of the seed"


def test_killed_at_any_step_a_run_sees_what_it_would_have_seen(script, layouts):
    """Two processes, 24 batches each over epochs, killed at random, resumed from the last checkpoint."""
    shards = script.list_shards([str(layouts / "3")])
    args = script.parse_args(flags("a/teacher", layouts, "u", train_batch_size=2, shuffle_buffer_samples=7))
    rng = random.Random(0)
    for rank in (0, 1):
        unbroken = [b["caption"] for b in itertools.islice(stream_of(script, shards, args, 2, rank), 24)]
        seen, done, positions = [], 0, {}
        while done < 24:
            stream = stream_of(script, shards, args, 2, rank, done, positions)
            steps, lost = rng.randint(1, 6), rng.randint(0, 3)  # `lost` come after the checkpoint
            batches = list(itertools.islice(stream, min(steps + lost, 24 - done)))[:steps]
            seen += [batch["caption"] for batch in batches]
            done += len(batches)
            consumer, *position = batches[-1]["position"]
            positions = {str(consumer): position}
        assert seen == unbroken
