"""Faults that users of such trainers reported (issue 17), by its numbers: security, silence, losses, misleading words.

Numbers 3, 6, 9, 14 and 19 are of other files: the Hub, models and tools. Number 4 is in test_exits.py.
"""

import bz2
import gzip
import http.server
import io
import itertools
import json
import lzma
import os
import pickle
import random
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate.tracking import TensorBoardTracker
from conftest import SCRIPTS, cases, finish, flags, load_script, picture_bytes, read_log, write_shards, write_tar
from PIL import Image, PngImagePlugin

JPG, PNG = picture_bytes(0, suffix="JPEG"), picture_bytes(0)
SECRET = "s3cr3tPlantedHere"


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS[0])


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers["train_lcm_lora_sd15"]


def sample(key, **members):
    """Return the files of a sample: picture and caption, others by suffix; None leaves one out."""
    files = {"jpg": JPG, "txt": b"a red circle"} | members
    return [(f"{key}.{suffix}", data) for suffix, data in files.items() if data is not None]


def eight(**members):
    return [file for i in range(8) for file in sample(f"{i:04d}", **members)]


def audited(script, *values, **changes):
    """Return (captions of the samples that can be used, the report) of the values of a command line."""
    args = script.parse_args(flags("a/teacher", "x", "unused", **changes))
    usable, report, _ = script.audit(script.list_shards([str(value) for value in values]), args)
    return [sample["caption"] for sample in usable], report


def refused(script, *values, **changes):
    """Return the one line for data that cannot be used."""
    with pytest.raises(script.UnusableInput) as error:
        audited(script, *values, **changes)
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------
# 1. Nothing that comes from data is executed
# ----------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_1_pickles_in_a_shard_are_not_read(script, tmp_path):
    bomb, saved = pickle.dumps(Bomb(tmp_path / "exploded")), io.BytesIO()
    torch.save(Bomb(tmp_path / "exploded"), saved)
    members = dict.fromkeys("pkl pyd pickle pth npy pt cls bin ckpt".split(), bomb)
    members |= {"safetensors": bomb, "npz": saved.getvalue(), "PTH": saved.getvalue()}
    captions, _ = audited(script, write_tar(tmp_path / "0.tar", eight(**members)))
    assert len(captions) == 8 and not (tmp_path / "exploded").exists()
    (raw, *_) = script.read_shard(str(tmp_path / "0.tar"), Counter())
    assert set(raw) == {"__key__", "__url__", "jpg", "txt", "safetensors"}
    cached = write_tar(tmp_path / "1.tar", [("_cache.json", b"{}"), ("_cache.safetensors", bomb)])
    assert "cache" in refused(script, cached) and not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"\xd7\xcd\xc6\x9a"]
)
def test_1_no_picture_starts_a_program(script, tmp_path, monkeypatch, head):
    """Pillow hands Encapsulated PostScript to Ghostscript."""
    for name in ("gs", "gswin64c", "wmf2png", "convert"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    picture = head + b"%%EndComments\n" + b"0 " * 400
    files = [(f"0.{suffix}", picture) for suffix in ("jpg", "tif", "png")] + [("0.txt", b"sea")]
    assert "picture cannot be decoded: 1" in refused(script, write_tar(tmp_path / "0.tar", files))
    assert not (tmp_path / "started").exists()
    assert not {"EPS", "WMF", "PDF", "IPTC", "FPX", "MIC", "MPEG"} & set(script.PICTURE_FORMATS)


@pytest.mark.parametrize("value", [".", "*.tar", "{folder}", "{folder}/*.tar"])
def test_1_a_file_name_is_no_command(script, tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "0.tar", eight())
    write_tar(tmp_path / "pipe:touch pwned;.tar", eight())
    write_tar(tmp_path / "$(touch pwned).tar", sample("`touch pwned`"))
    captions, _ = audited(script, value.format(folder=tmp_path))
    assert len(captions) == 17 and not (tmp_path / "pwned").exists()


def test_1_an_address_is_no_command(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(script, "http://127.0.0.1:9/a.tar';touch pwned;'", "http://127.0.0.1:9/$(touch pwned).tar")
    assert not (tmp_path / "pwned").exists()


# ----------------------------------------------------------------------------------------------------------
# 2. Secrets
# ----------------------------------------------------------------------------------------------------------

HOST = "http://127.0.0.1:9"
SIGNED = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK%2Feu&X-Amz-Security-Token={0}&X-Amz-Signature={0}"
WITH_SECRETS = {
    "query": "http://host/{{0..3}}.tar?sv=1&sig={}",
    "query without a name": "http://host/a.tar?{}",
    "query in quotes": "http://host/a.tar?x='{}'",
    "presigned": "https://bucket.s3.amazonaws.com/a.tar?" + SIGNED,
    "fragment": "http://host/a.tar#{}",
    "password": "https://user:{}@host/a.tar",
    "password with an @": "https://user:p@{}@host/a.tar",
    "user name": "https://{}@host/a.tar",
    "one slash, as Path writes it": "https:/user:{}@host/a.tar",
    "parameter": "https://host/a.tar;token={}",
    "an address in a text": "cannot get 'https://user:{0}@host/a?k={0}' (404)",
    "two addresses": "https://host/a.tar https://user:{}@host/b.tar",
    "a pipe behind another shard": "/data/{{0..3}}.tar::pipe:env X=x tool {} b.tar",
    "a pipe behind a space": " pipe:tool {} b.tar",
    "a pipe as a file, in capitals": "a.tar::file:PIPE:tool {} b.tar",
    "a pipe with the mark of a break": "pipe:tool --opt a::{} b.tar",
    "an address beside a pipe": "https://u:pa::{}@h/a.tar pipe:cat b.tar",
    "header": "pipe:curl -H 'Authorization: Bearer {}' https://host/a.tar",
    "header with spaces": "pipe:curl -H 'X-Key: a {} b' https://host/a.tar",
    "basic": "pipe:curl -u user:{} https://host/a.tar",
    "basic, joined": "pipe:curl -uuser:{} https://host/a.tar",
    "address in a command": "pipe:curl https://user:{0}@host/a.tar https://host/b.tar?sig={0}",
    "environment": "pipe:AWS_SECRET_ACCESS_KEY={} aws s3 cp s3://bucket/a.tar -",
    "environment, env": "pipe:env TOKEN={} cat a.tar",
    "environment, quoted": "pipe:TOKEN='a {} b' cat a.tar",
    "statement": "pipe:T={};cat a.tar",
    "first of a pipe": "pipe:echo {}|gpg --passphrase-fd 0 a.tar",
    "substitution": "pipe:curl${{IFS}}-u${{IFS}}{}",
    "parenthesis": "pipe:(T={} cat a.tar)",
    "secret before .tar": "pipe:cat --key={}.tar",
    "echoed header": "> Authorization: Bearer {}",
    "echoed digest": "> Authorization: Digest {}",
    "echoed signature": "Authorization: AWS4-HMAC-SHA256 Credential={0}/x, Signature={0}",
    "echoed cookie": "Cookie: a=1; session={}",
    "echoed json": '{{"token": "{}"}}',
    "echoed dict": "{{'password': '{}'}}",
    "echoed flag": "usage: get --password {}",
    "echoed key": "AccountKey={};",
    "echoed api key": "X-Api-Key: {}",
    "Hub token": "hf_{}",
    "GitHub token": "github_pat_{}",
}


@cases("name", WITH_SECRETS)
def test_2_secrets_are_masked(script, name):
    text = WITH_SECRETS[name].format(SECRET)
    assert SECRET not in script.masked(text)
    assert SECRET not in script.masked(script.masked(text))


def test_2_what_is_no_secret_stays(script):
    plain = [
        "/data/{00000..00099}.tar",
        "http://host:80/a/b.tar",
        "owner/name",
        "loss 0.1: a = b",
        "s3://bucket/a.tar",
    ]
    assert [script.masked(text) for text in plain] == plain
    assert "/data/a.tar" in script.masked("pipe:cat /data/a.tar")
    assert script.masked("pipe:cat a.tar::pipe:cat b.tar") == "pipe:cat a.tar::pipe:cat b.tar"


@cases(
    "command",
    [
        "sh -c 'echo denied for $0 >&2; exit 3' {}",
        "T={} sh -c 'echo $T$T >&2; exit 3'",
        "sh -c 'echo {} " + "x" * 185 + " >&2; exit 3'",
        "sh -c 'echo a{0} {0}b >&2; exit 3' a{0} {0}",
        "sh -c 'set -x; curl -H \"X-Key: {}\"; exit 3'",
    ],
)
def test_2_a_command_s_words_are_masked(script, command):
    said = refused(script, "pipe:" + command.format(SECRET))
    assert "exit code 3" in said
    assert not [n for n in range(0, len(SECRET) - 6) if SECRET[n : n + 6] in said], said


@cases(
    "words",
    [
        [f"--hub_tokn={SECRET}"],
        ["--dry_run", f"http://host/b.tar?sig={SECRET}"],
        ["--max_train_steps", f"http://user:{SECRET}@host"],
        ["--pretrained_vae_model_name_or_path", f"/no/such?token={SECRET}"],
        ["--train_data_dir", "x::pipe:t {S}", "pipe:t {S} y.tar", "--train_data_dir", "x", "--lora_rank", "0"],
    ],
)
def test_2_wrong_flags_are_masked(script, capsys, words):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args([*flags("a/teacher", "x", "unused"), *(word.replace("{S}", SECRET) for word in words)])
    said = capsys.readouterr().err
    assert "error: " in said and SECRET not in said
    if words[0] == "--train_data_dir":
        for values in (["x::", words[2]], [f"pipe:t {SECRET} {{x.tar"], [f"x?sig={SECRET}", "y"]):
            with pytest.raises(script.UnusableInput) as told:
                script.list_shards(values)
            assert SECRET not in str(told.value)


def test_2_the_command_line_that_trackers_read_is_masked(script, monkeypatch):
    line = flags("a/teacher", f"http://host/a.tar?sig={SECRET}", "unused", hub_token=SECRET)
    monkeypatch.setattr("sys.argv", ["train.py", *line, f"--train_data_dir=pipe:T={SECRET} cat a.tar"])
    assert script.parse_args().hub_token == SECRET
    assert SECRET not in " ".join(sys.argv)


def test_2_prompts_are_recorded_as_they_were_given(script):
    prompts = ["a basic landscape at dusk", "the secret: garden"]
    args = script.parse_args(flags("a/teacher", "x", "unused", validation_prompts=prompts))
    assert script.public_flags(args)["validation_prompts"] == prompts


def test_2_a_teacher_s_address_is_masked(script, tmp_path):
    address = f"https://user:{SECRET}@host/model.safetensors?key={SECRET}"
    args = script.parse_args(flags(address, "x", "unused"))
    assert SECRET not in script.loading_error(args, OSError(f"cannot get {address}"))
    assert SECRET[:6] not in script.one_line("x" * 275 + f" https://me:{SECRET}@host/{'y' * 99}"), "masked before cut"
    assert SECRET not in json.dumps(script.cache_identity(args))
    args.pretrained_teacher_model, gated = "a/teacher", OSError("a/teacher is no valid model identifier")
    gated.__cause__ = script.GatedRepoError("401", response=Mock())
    assert "accept its terms on https://huggingface.co/a/teacher" in script.loading_error(args, gated)
    half = OSError("Error no file named model.safetensors, or pytorch_model.bin, found in directory x")
    assert script.loading_error(args, half).endswith("give --variant fp16")
    for name, variant in (("vae/a.fp16.bin", "fp16"), ("text_encoder/b.bf16-00001-of-00002.safetensors", "bf16")):
        path = tmp_path / variant / name
        args.pretrained_teacher_model = str(tmp_path / variant)
        path.parent.mkdir(parents=True)
        path.touch()
        assert script.loading_error(args, half).endswith(f"({path.name}); give --variant {variant}")
        path.with_name("model-00001-of-00002.safetensors").touch()
        assert "--variant" not in script.loading_error(args, half)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Print nothing."""


@pytest.fixture
def server(shards, monkeypatch):
    """Serve the shards at an address of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=shards)) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_2_no_file_of_a_run_has_a_secret(script, teacher, shards, server, tmp_path):
    """One secret in each place where a command line can have one."""
    tar = f"{shards}/00000.tar"
    data = [
        f"http://{server}/00000.tar?sv=1&sig={SECRET}1",
        f"http://user:{SECRET}2@{server}/00000.tar",
        f"http://{server}/00001.tar#{SECRET}3",
        f"pipe:TOKEN={SECRET}4 cat {tar}",
        f"pipe:curl -s -H 'Authorization: Bearer {SECRET}5' http://{server}/00000.tar",
        f"pipe:sh -c 'echo denied {SECRET}6 >&2; exit 3'",
        f"pipe:cat {tar}::http://{server}/00001.tar?{SECRET}7",
    ]
    address = f"https://user:{SECRET}8@host/model.safetensors?key={SECRET}9"

    def hook(script):
        load = script.load_pipeline

        def local(args, *rest, **options):  # as if the address had been fetched
            return load(SimpleNamespace(**vars(args) | {"pretrained_teacher_model": str(teacher)}), *rest, **options)

        script.load_pipeline, script.time.sleep = local, lambda _: None
        TensorBoardTracker.finish = Mock(side_effect=ConnectionError("gone"))

    out = tmp_path / "out"
    line = flags(
        address,
        data,
        out,
        max_train_steps=2,
        report_to="tensorboard",
        hub_token=f"{SECRET}10",
        train_batch_size=50,
        prediction_type="epsilon",  # of an address it has to be given
    )
    said = finish(script, line, tmp_path / "said", hook=hook)
    assert any("exit code 3" in text for text in said), "the shard that fails is named"
    assert any("tensorboard failed" in text for text in said), "and a tracker, which costs the run nothing"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"args.json", "checkpoint.json", "README.md", "log.jsonl", "hparams.yml"} <= {path.name for path in files}
    assert [str(path) for path in files if SECRET.encode() in path.read_bytes()] == []


# ----------------------------------------------------------------------------------------------------------
# 5. Remote shards that cannot be read
# ----------------------------------------------------------------------------------------------------------

DEAD = [
    "pipe:sh -c 'sleep 0.2; echo no such bucket >&2; exit 7' {00000..00029}",
    f"{HOST}/{{00000..00029}}.tar",
    "pipe:echo '<html>log in</html>' # {00000..00029}",
    "pipe:true {00000..00029}",
    "pipe:no-such-program {00000..00029}",
]


@pytest.mark.parametrize("value", DEAD)
def test_5_dead_shards_end_a_run_within_seconds(script, value):
    started = time.monotonic()
    said = refused(script, value)
    assert time.monotonic() - started < 5 and len(said) < 500
    wanted = {0: ("exit code 7", "no such bucket"), 1: ("exit code 7", HOST), 4: ("exit code 127", "not found")}
    for words in wanted.get(DEAD.index(value), ("pipe:",)):
        assert words in said


def test_5_dead_shards_end_a_training_too(script, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    args = script.parse_args(flags("a/teacher", "x", "unused"))
    for shards, cause in (
        (script.list_shards(["pipe:sh -c 'exit 7' {00..99}"]), "exit code 7"),
        ([f"/purged/{number}.tar" for number in range(10**4)], "No such file"),  # they were there at the start
    ):
        (batch,) = itertools.islice(script.ShardStream(shards, args, 1, 0, 1), 1)
        assert batch["error"].startswith("8 shards in a row cannot be read") and cause in batch["error"]
        skipped = script.Skipped({f"shard {number} broke off": 1 for number in range(10**4)})
        assert len(script.describe(skipped)) < 1000 and script.describe(skipped).endswith(", and 9980 causes more")


def test_5_some_dead_shards_among_others_end_nothing(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "sleep", lambda _: None)
    tar = write_tar(tmp_path / "0.tar", eight())
    captions, report = audited(script, "pipe:false", "pipe:false", tar, "pipe:false", "pipe:false", tar)
    assert len(captions) == 16 and "pipe:false broke off" in report


@pytest.mark.parametrize(
    ("value", "command"),
    [
        ("s3://bucket/a.tar", "pipe:aws s3 cp s3://bucket/a.tar -"), ("S3://bucket/a.tar", "pipe:aws s3 cp"),
        ("gs://bucket/a.tar", "pipe:"), ("hdfs://host/a.tar", "pipe:"),
    ],
)  # fmt: skip
def test_5_a_scheme_that_needs_a_command_names_it(script, value, command):
    assert command in refused(script, value)


# ----------------------------------------------------------------------------------------------------------
# 7. Numbers written as text
# ----------------------------------------------------------------------------------------------------------

FILTERS = {"max_watermark": 0.5, "max_unsafe": 0.1, "min_aesthetic": 6}


@pytest.mark.parametrize("kind", [str, float, "{:e}".format, " {} ".format])
def test_7_numbers_written_as_text_are_numbers(script, tmp_path, kind):
    fine = {"pwatermark": kind(0.1), "punsafe": kind(0.01), "aesthetic": kind(6.5)}
    bad = [fine | {name: kind(value)} for name, value in (("pwatermark", 0.98), ("punsafe", 0.99), ("aesthetic", 4.1))]
    records = [*bad, {name.upper(): value for name, value in bad[1].items()}, fine]
    files = [f for i, r in enumerate(records) for f in sample(f"{i}", json=json.dumps(r).encode())]
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files), **FILTERS)
    assert len(captions) == 1
    assert all(words in report for words in ("unsafe: 2", "watermark: 1", "aesthetic score: 1"))
    assert "filters nothing" not in report
    _, report = audited(script, write_tar(tmp_path / "1.tar", sample("a", json=b'{"punsafe": 0}')), **FILTERS)
    warned = [line.partition(" filters nothing")[0] for line in report.splitlines()[1:]]
    assert warned == ["warning: --max_watermark", "warning: --min_aesthetic"]


@cases("value", ["high", "0,99", [0.99], {"p": 0.99}, True, "nan", "1e999", "0.9.9"])
def test_7_what_is_no_number_is_counted_where_it_is_asked_for(script, tmp_path, value):
    files = eight(json=json.dumps({"punsafe": value}).encode())
    tar = write_tar(tmp_path / "0.tar", files)
    assert "unsafe in the metadata is no number: 8" in refused(script, tar, max_unsafe=0.1)
    assert len(audited(script, tar)[0]) == len(audited(script, tar, max_watermark=0.5)[0]) == 8


def test_7_sizes_written_as_text(script, tmp_path):
    tar = write_tar(tmp_path / "0.tar", eight(json=b'{"width": "99", "height": "20"}'))
    assert "filtered by smaller side: 8" in refused(script, tar, min_image_side_px=32)
    assert len(audited(script, tar, min_image_side_px=20)[0]) == 8


# ----------------------------------------------------------------------------------------------------------
# 8. Variables of accelerate
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "given"), [(4, None), (1, 4), (2, 2)])
def test_8_the_flag_alone_sets_gradient_accumulation(script, teacher, shards, tmp_path, asked, given):
    settings = {"max_train_steps": 2, "gradient_accumulation_steps": given, "validation_steps": -1}
    variables = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": str(asked), "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_SPLIT_BATCHES": "true", "ACCELERATE_GRADIENT_CLIPPING": "1e-9", "ACCELERATE_DOWNCAST_BF16": "yes",
    }  # fmt: skip
    steps = tmp_path / "steps"

    def hook(script):
        os.environ.update(variables)
        count(script)

    def count(script):
        loss_of, make = script.training_loss, script.make_optimizer
        note = lambda word: steps.open("a").write(word) and None  # noqa: E731
        script.training_loss = lambda *args: note("l") or loss_of(*args)

        def making(*args):
            optimizer, schedule = make(*args)
            step = optimizer.step
            optimizer.step = lambda *args, **kwargs: note("s") or step(*args, **kwargs)
            return optimizer, schedule

        script.make_optimizer = making

    said = finish(script, flags(teacher, shards, tmp_path / "a", **settings), tmp_path / "said", hook=hook)
    assert steps.read_text() == 2 * ("l" * (given or 1) + "s")
    note = f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={asked} is ignored"
    assert any(note in text for text in said) == (asked != (given or 1))
    assert [row["step"] for row in read_log(tmp_path / "a")] == [1, 2]


@cases(
    "variables",
    [
        {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, {"ACCELERATE_USE_DEEPSPEED": "true"},
        {"ACCELERATE_MIXED_PRECISION": "fp8"}, {"WORLD_SIZE": "2", "RANK": "0", "ACCELERATE_USE_CPU": ""},
    ],
    ids=lambda variables: next(iter(variables)),
)  # fmt: skip
def test_8_other_variables_that_change_the_training_are_refused(script, teacher, shards, tmp_path, variables):
    line = flags(teacher, shards, tmp_path / "out", mixed_precision=None)
    said = finish(script, line, tmp_path / "said", 2, hook=lambda _script: os.environ.update(variables))
    assert said[-1].startswith("error: ") and not any("Traceback" in text for text in said)


# ----------------------------------------------------------------------------------------------------------
# 10. Byte-order marks
# ----------------------------------------------------------------------------------------------------------

MARK = "\ufeff"


@cases(
    "members",
    [
        {"txt": f"{MARK}sea\r\n".encode()},
        {"txt": f"{MARK}{MARK}sea".encode()},
        {"txt": None, "caption": f"{MARK} sea".encode()},
        {"txt": None, "json": (MARK + '{"caption": "sea"}').encode()},
        {"txt": None, "json": f'{{"caption": "{MARK}sea"}}'.encode()},
        {"txt": None, "json": b'{"caption": "\\ufeffsea"}'},
    ],
)
def test_10_a_byte_order_mark_is_no_part_of_a_caption(script, tmp_path, members):
    assert audited(script, write_tar(tmp_path / "0.tar", eight(**members)))[0] == 8 * ["sea"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "cp1252", "utf-32"])
def test_10_other_encodings_are_counted(script, tmp_path, encoding):
    files = [*sample("0", txt="mer à l'aube".encode(encoding)), *sample("1")]
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files))
    assert captions == ["a red circle"] and "caption is not UTF-8: 1" in report


# ----------------------------------------------------------------------------------------------------------
# 11. Files of a sample that are not neighbours
# ----------------------------------------------------------------------------------------------------------

RECORD = b'{"punsafe": 0.99}'


def by_kind(*kinds):
    members = {"jpg": JPG, "txt": b"sea", "json": RECORD}
    return [(f"./{i:02d}.{kind}", members[kind]) for kind in kinds for i in range(8)]


@cases("kinds", list(itertools.permutations(("jpg", "txt", "json"))), ids=" ".join)
def test_11_tars_in_the_order_of_kinds(script, tmp_path, kinds):
    tar = write_tar(tmp_path / "0.tar", by_kind(*kinds))
    captions, report = audited(script, tar)
    assert captions == 8 * ["sea"] and "(" not in report
    assert "filtered by unsafe: 8" in refused(script, tar, max_unsafe=0.1), "a filter sees every json"


@pytest.mark.parametrize("seed", range(4))
def test_11_tars_in_any_order(script, tmp_path, seed):
    files = by_kind("jpg", "txt")
    random.Random(seed).shuffle(files)
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files))
    assert captions == 8 * ["sea"] and "(" not in report
    read = [list(script.read_shard(str(tmp_path / "0.tar"), Counter())) for _ in "ab"]
    assert read[0] == read[1], "the order is a function of the tar"


def test_11_no_use_of_a_sample_goes_unseen_by_a_filter(script, tmp_path):
    """In any order, a sample is used with its json or what is lost is counted."""
    for seed in range(20):
        files = by_kind("jpg", "txt", "json")
        random.Random(seed).shuffle(files)
        args = script.parse_args(flags("a/teacher", "x", "unused", max_unsafe=0.1))
        skipped, used = Counter(), 0
        for raw in script.read_shard(str(write_tar(tmp_path / "0.tar", files)), skipped):
            try:
                script.prepare_sample(raw, args, 0)
                used += 1
            except script.SkippedSample:
                pass
        assert used <= sum(skipped.values())


def test_11_what_tar_makes_of_a_folder(script, tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    for number, (name, data) in enumerate(eight(json=b"{}")):
        (tmp_path / "data" / ("sub" if number % 2 else ".") / f"{hash(name) % 97:02d}-{name[4:]}").write_bytes(data)
    for name, data in eight(json=b"{}"):
        (tmp_path / "data" / name).write_bytes(data)
    files = sorted(str(path.relative_to(tmp_path / "data")) for path in (tmp_path / "data").glob("0*"))
    random.Random(0).shuffle(files)
    subprocess.run(["tar", "cf", "../0.tar", *files], cwd=tmp_path / "data", check=True)
    assert len(audited(script, tmp_path / "0.tar")[0]) >= 8


def test_11_waiting_takes_bounded_memory_and_what_is_lost_is_counted(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "WAITING_BYTES", 3 * len(JPG))
    tar = write_tar(tmp_path / "0.tar", by_kind("jpg", "txt"))
    captions, report = audited(script, tar)
    assert len(captions) == 3 and "no caption: 5" in report and "tar --sort=name" in report
    assert "(" not in audited(script, write_tar(tmp_path / "1.tar", eight()))[1]


@pytest.mark.parametrize("extra", ["mask.png", "seg.jpg", "k.mask.webp", "depth.png"])
def test_11_other_files_beside_a_sample_part_nothing(script, tmp_path, extra):
    files = sorted(file for i in range(8) for file in [*sample(f"{i}", json=b"{}"), (f"{i}.{extra}", PNG)])
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files))
    assert captions == 8 * ["a red circle"] and "(" not in report


# ----------------------------------------------------------------------------------------------------------
# 12, 13. Names
# ----------------------------------------------------------------------------------------------------------

KEYS = [
    "img.v1",
    "v1.txt",
    "a.json",
    "a b.c",
    "é.1",
    "..a",
    "a.caption",
    "x.jpg",
    "a.png",
    "d.d/e.f",
    "1.5.tar",
    "A.JPG",
]


@cases("key", KEYS)
def test_12_dots_in_names(script, tmp_path, key):
    files = [file for i in range(8) for file in sample(f"{i}{key}", json=b"{}")]
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files))
    assert captions == 8 * ["a red circle"] and "(" not in report


def test_12_names_that_differ_behind_a_dot_are_samples_of_their_own(script, tmp_path):
    files = [file for n in range(8) for file in sample(f"img.{n}", txt=b"%d" % n)]
    captions, report = audited(script, write_tar(tmp_path / "0.tar", [*sample("img", txt=b"x"), *files]))
    assert captions == ["x", *map(str, range(8))] and "(" not in report


def test_12_upper_case_suffixes(script, tmp_path):
    files = [(f"{i}.{suffix}", data) for i in range(8) for suffix, data in (("JPG", JPG), ("TXT", b"sea"))]
    assert audited(script, write_tar(tmp_path / "0.tar", files))[0] == 8 * ["sea"]


@pytest.mark.parametrize("far", [False, True])
def test_13_a_name_twice_loses_one_file(script, tmp_path, monkeypatch, far):
    waits = []
    monkeypatch.setattr(script.time, "sleep", lambda seconds: waits.append(seconds))
    files = eight()
    files.insert(len(files) if far else 7, files[6])
    tar = write_tar(tmp_path / "0.tar", files)
    for _epoch in range(2):
        skipped = Counter()
        assert len(list(script.read_shard(str(tar), skipped))) == 8
        ((cause, count),) = skipped.items()
        assert "twice" in cause and count == 1
    assert not sum(waits), "read once"


def test_13_the_first_of_a_name_is_kept(script, tmp_path):
    files = [*sample("0", txt=b"first"), ("0.txt", b"second"), *sample("1", txt=b"third"), *sample("0", txt=b"fourth")]
    captions, report = audited(script, write_tar(tmp_path / "0.tar", files))
    assert captions == ["first", "third"] and "twice in its shard: 3" in report


# ----------------------------------------------------------------------------------------------------------
# 15. Pictures of ComfyUI
# ----------------------------------------------------------------------------------------------------------


@cases("kind", ["zTXt", "tEXt", "iTXt", "several", "exif"])
def test_15_text_in_a_picture_does_not_matter(script, tmp_path, kind):
    texts, data, options = PngImagePlugin.PngInfo(), io.BytesIO(), {"pnginfo": None}
    if kind == "exif":
        options = {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(2**20)}
    for number in range(9 if kind == "several" else kind != "exif"):
        add = texts.add_itxt if kind == "iTXt" else texts.add_text
        add(f"workflow{number}", "{}," * 600_000, zip=kind != "tEXt")
        options = {"pnginfo": texts}
    Image.open(io.BytesIO(PNG)).save(data, "PNG", **options)
    captions, _ = audited(script, write_tar(tmp_path / "0.tar", eight(jpg=None, png=data.getvalue())))
    assert len(captions) == 8


# ----------------------------------------------------------------------------------------------------------
# 16. Spellings of shards
# ----------------------------------------------------------------------------------------------------------


def test_16_folders_of_all_kinds_of_tar(script, tmp_path):
    tar = write_tar(tmp_path / "a.tar", eight())
    for name in ("b.tar.gz", "c.tgz", "d.TAR", "e.TAR.GZ", "f.Tgz", "g.tbz2", "h.txz"):
        data, pack = tar.read_bytes(), {"z": gzip.compress, "2": bz2.compress}.get(name[-1].lower(), bytes)
        (tmp_path / name).write_bytes(lzma.compress(data) if name.endswith("xz") else pack(data))
    (tmp_path / "00.tar").write_bytes(gzip.compress(tar.read_bytes()))
    (tmp_path / ".a.tar.swp").write_bytes(b"no shard")
    (tmp_path / "a_stats.json").write_bytes(b"{}")
    shards = script.list_shards([str(tmp_path)])
    assert len(shards) == 9
    for shard in shards:
        skipped = Counter()
        assert len(list(script.read_shard(shard, skipped))) == 8 and not skipped, shard


@pytest.fixture(scope="module")
def spelled(tmp_path_factory):
    """Return a folder of two shards of four samples each."""
    folder = tmp_path_factory.mktemp("spelled") / "data"
    write_shards(folder, 2, 4)
    return folder


SPELLINGS = {  # value, shards
    "a folder with a slash": ("{0}/", 2), "star": ("{0}/*.tar", 2), "several stars": ("{1}/*/*.tar", 2),
    "two stars": ("{1}/**/*.tar", 2), "question mark": ("{0}/0000?.tar", 2), "class": ("{0}/0000[01].tar", 2),
    "two values": ("{0}/00000.tar::{0}/00001.tar", 2),
    "braces and two": ("{0}/{{00000..00001}}.tar::{0}/00000.tar", 3),
    "star and two": ("{0}/*.tar::{0}/00000.tar", 3), "relative": ("00000.tar::00001.tar", 2), "here": (".", 2),
    "file:": ("file:{0}/00000.tar", 1), "file://": ("file://{0}/00000.tar", 1), "FILE:": ("FILE:{0}/00000.tar", 1),
    "file://localhost": ("file://localhost{0}/00000.tar", 1), "file: of a folder": ("file:{0}", 2),
    "file: with braces": ("file:{0}/{{00000..00001}}.tar", 2), "file: with a star": ("file://{0}/*.tar", 2),
    "pipe and file": ("pipe:cat {0}/00000.tar::{0}/00001.tar", 2), "comma braces": ("{0}/0000{{0,1}}.tar", 2),
}  # fmt: skip


@cases("name", SPELLINGS)
def test_16_spellings_of_shards(script, spelled, monkeypatch, name):
    monkeypatch.chdir(spelled)
    value, count = SPELLINGS[name]
    value = value.format(spelled, spelled.parent)
    assert len(script.list_shards([value])) == count
    assert len(audited(script, value)[0]) == 4 * count


def test_16_an_address_of_ipv6_is_one(script):
    assert script.list_shards(["http://[::1]:8000/{0..1}.tar"]) == [
        "http://[::1]:8000/0.tar",
        "http://[::1]:8000/1.tar",
    ]


@cases("value", ["{0}/nothing*.tar", "{0}/none.tar", "{0}/empty", "{0}/{{0..1.tar", "ftp://host/a.tar"])
def test_16_what_names_no_shard_is_named(script, tmp_path, value):
    (tmp_path / "empty").mkdir()
    assert value.format(tmp_path) in refused(script, value.format(tmp_path))


# ----------------------------------------------------------------------------------------------------------
# 17. Captions
# ----------------------------------------------------------------------------------------------------------


@cases(
    "members",
    [
        {"text": b"sea"}, {"caption": b"sea"}, {"txt": b"sea"}, {"CAPTION": b" sea\n"}, {"jpg.txt": b"sea"},
        {"json": b'{"prompt": "sea"}'}, {"json": b'{"text": "sea"}'}, {"json": b'{"caption": ["sea", "hill"]}'},
        {"json": b'{"Caption": "sea", "text": "hill"}'}, {"json": b'{"caption": null, "TEXT": "sea"}'},
        {"json": b'{"caption": [], "prompt": ["sea"]}'}, {"text": b"sea", "json": b'{"caption": "hill"}'},
        {"json": b'{"caption": " ", "text": "sea"}'}, {"txt": b"\n", "json": b'{"caption": "sea"}'},
        {"txt": b"sea", "caption": b"\xe9t\xe9"},
    ],
)  # fmt: skip
def test_17_captions_of_all_spellings(script, tmp_path, members):
    members = {"txt": None} | members
    assert audited(script, write_tar(tmp_path / "0.tar", eight(**members)))[0] == 8 * ["sea"]


@pytest.mark.parametrize("name", ["{}.txt", "{}.text", "{}.caption", "{}.jpg.txt", "{}.json"])
def test_17_captions_beside_the_pictures_of_a_folder(script, tmp_path, name):
    for i in range(8):
        (tmp_path / f"{i}.v1.jpg").write_bytes(JPG)
        caption = '{"caption": "sea"}' if "json" in name else f"{MARK}sea\n"
        (tmp_path / name.format(f"{i}.v1")).write_text(caption)
    captions, report = audited(script, tmp_path)
    assert captions == 8 * ["sea"] and "(" not in report
    (tmp_path / name.format("0.v1")).write_text('{"caption": ""}' if "json" in name else " \n")
    captions, report = audited(script, tmp_path)
    assert captions == ["", *7 * ["sea"]] and "(captions that are empty: 1)" in report


def test_17_captions_cut_and_pictures_enlarged_are_counted(script, teacher, tmp_path):
    files = [*eight(), *sample("long", txt=b"sea " * 99), *sample("large", jpg=picture_bytes(0, 64, "JPEG"))]
    line = flags(teacher, write_tar(tmp_path / "0.tar", files), tmp_path / "out", resolution=64, max_train_steps=1)
    said = "\n".join(finish(script, line + ["--validation_steps", "-1"], tmp_path / "said"))
    assert "enlarged: 9" in said and "tokens: 1 of the first 10" in said
    assert len(script.caption_of({"txt": b"sea " * 10**6}, {})) < 10_001, "or tokens would take minutes"


# ----------------------------------------------------------------------------------------------------------
# 18, 20. Words
# ----------------------------------------------------------------------------------------------------------


def test_18_wandb_without_a_key_ends_before_any_model_loads(script, teacher, shards, tmp_path):
    def hook(script):
        for name in [name for name in os.environ if name.startswith("WANDB")]:
            del os.environ[name]
        os.environ |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_SILENT": "true"}
        script.load_teacher = lambda *_args, **_kwargs: os._exit(9)

    line = flags(teacher, shards, tmp_path / "out", report_to="wandb")
    said = finish(script, line, tmp_path / "said", 2, hook=hook)
    assert said[-1].startswith("error: --report_to wandb") and "WANDB_MODE=offline" in said[-1]
    assert not any("Traceback" in text for text in said)


def test_20_a_checkpoint_is_looked_for_in_the_output_folder(script, teacher, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": -1}
    finish(script, flags(teacher, shards, "out", **settings), tmp_path / "said")
    for name in ("checkpoint-1", "out/checkpoint-1", str(tmp_path / "out" / "checkpoint-1")):
        line = flags(teacher, shards, "out", resume_from_checkpoint=name, dry_run=True, **settings)
        said = finish(script, line, tmp_path / f"said-{shlex.quote(name).replace('/', '_')}")
        assert any("resuming from" in text and "checkpoint-1" in text for text in said)


def test_20_a_checkpoint_that_is_not_there_is_named(script, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        script.parse_args(flags("a/teacher", "x", tmp_path, resume_from_checkpoint="checkpoint-500"))
    assert "checkpoint-500: no such checkpoint" in capsys.readouterr().err


LINES = [
    {"interpolation_type": "nearest_exact"}, {"local_rank": "0"}, {"revision": "main"}, {"report_to": "all"},
    {"local-rank": "0"},
    {"report_to": "comet_ml"}, {"cast_teacher_unet": True}, {"train_data_dir": "x"}, {"non_ema_revision": None},
]  # fmt: skip


@cases("changes", LINES, ids=str)
def test_20_lines_of_the_public_scripts_parse(script, changes, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")  # of something else, because there is no WORLD_SIZE
    script.parse_args(flags("a/teacher", "shards", "unused", **changes))
    said = capsys.readouterr().err
    assert ("--train_data_dir takes the place of shards" in said) == ("train_data_dir" in changes), said


def test_20_flags_without_effect_are_said_and_others_work(script, teacher, shards, tmp_path):
    line = flags(
        teacher, shards, tmp_path / "out", max_train_steps=1, validation_steps=-1, report_to="all", local_rank="-1",
        revision="main", interpolation_type="nearest_exact",
    )  # fmt: skip

    def hook(_script):
        os.environ |= {"WANDB_MODE": "disabled", "HOME": str(tmp_path)}

    said = "\n".join(finish(script, line, tmp_path / "said", hook=hook))
    assert "--revision has no effect" in said and "--local_rank has no effect" in said
    assert list((tmp_path / "out" / "logs").rglob("events.out.tfevents*"))


def test_20_a_tracker_that_is_not_installed_is_one_line(script, teacher, shards, tmp_path):
    line = flags(teacher, shards, tmp_path / "out", report_to="comet_ml")
    said = finish(script, line, tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and "comet" in said[-1] and not any("Traceback" in text for text in said)


@pytest.mark.parametrize(("value", "top"), [(0.5, 1.02), (128.0, 260.0), (32896.0, 65535.0)])
def test_9_float_pictures_may_overshoot_their_range(script, value, top):
    values = np.full((40, 60), value, np.float32)
    values[0, 0] = top
    data = io.BytesIO()
    Image.fromarray(values).save(data, "TIFF")
    picture, _ = script.open_picture(data.getvalue(), 10**8)
    assert abs(picture.getpixel((9, 9))[0] - 128) <= 1


def test_4_what_is_no_regular_file_is_refused_at_once(script, tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"x" * 1024)
    with pytest.raises(script.UnusableInput, match=r"a.tar: is no regular file.*; unusable, too: \S*b.tar$"):
        script.list_shards([str(tmp_path)])


def test_14_a_folders_links_are_followed_once_and_unread_files_are_counted(script, tmp_path, capsys):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder, name in ((inside, "a"), (outside, "z")):
        folder.mkdir()
        (folder / f"{name}.png").write_bytes(PNG)
        (folder / f"{name}.txt").write_text("sea")
    (inside / "link").symlink_to(outside)
    (outside / "loop").symlink_to(inside)
    for name in ("b.HEIC", "a", "link/z.mp4"):  # the last two beside pictures of the same key
        (inside / name).write_bytes(b"x")
    (inside / "link" / "z.mp4.png").write_bytes(PNG)
    (inside / "link" / "z.mp4.txt").write_text("sea")
    (shard,) = script.list_shards([str(inside)])
    keys = [sample["__key__"] for sample in script.read_shard(shard, script.Skipped())]
    assert keys == ["a", "link/z.mp4", "link/z"]
    assert "files that are not read: a: 1, .heic: 1, .mp4: 1" in capsys.readouterr().err
    (inside / "c.txt").write_text("sea")
    script.list_shards([str(inside)])
    assert "text without a picture: 1" in capsys.readouterr().err
    for place in ("0.tar", "deep/1.tar", "deep/2.tgz", "deep/a.jpg"):  # at the top tars are read, and no other
        (tmp_path / "tars" / place).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "tars" / place, eight())
    assert len(script.list_shards([str(tmp_path / "tars")])) == 1
    said = capsys.readouterr().err
    assert "1 pictures beside its tars are not read" in said and "2 tars in its folders are not read" in said
    (tmp_path / "tars" / "0.tar").rename(tmp_path / "tars" / "deep" / "0.tar.gz")
    (tmp_path / "tars" / "deep" / "a.jpg").unlink()
    (tmp_path / "tars" / "b.txt").touch()
    with pytest.raises(
        script.UnusableInput, match=r"but .*\.tar\.gz: 1.*text without a picture: 1.*folders of its tars"
    ):
        script.list_shards([str(tmp_path / "tars")])
    with pytest.raises(script.UnusableInput, match="owner/name.*make_shards.py --dataset_name"):
        script.list_shards(["owner/name"])
