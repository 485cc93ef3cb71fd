"""scripts/cache_latents.py, and training from what it makes."""

import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import filelock
import pytest
import torch
import transformers
from conftest import (
    ENVIRONMENT,
    ROOT,
    SIDE,
    at_call,
    finish,
    flags,
    load_script,
    one_family,
    picture_bytes,
    read_log,
    send,
    write_shard,
    write_shards,
)
from diffusers import AutoencoderKL
from safetensors.torch import load, load_file, save, save_file
from test_checkpoint import assert_same, contents
from webdataset import TarWriter

TOOL = ROOT / "scripts" / "cache_latents.py"
VAE_FILE = "diffusion_pytorch_model.safetensors"


class Tool:
    """The tool as test_checkpoint.Run starts a training script."""

    @staticmethod
    def parse_args(words):
        sys.argv = [str(TOOL), *words]  # the tool is run anew, as from the command line

    @staticmethod
    def run(_args):
        runpy.run_path(str(TOOL), run_name="__main__")
        return 0


def tool_flags(teacher, shards, output_dir, **changes):
    """Return the tool's command line; True is a bare flag, None leaves a flag out."""
    values = {
        "pretrained_teacher_model": teacher, "train_shards_path_or_url": shards, "output_dir": output_dir,
        "resolution": SIDE, "mixed_precision": "no", "batch_size": 5, "decode_threads": 2,
        "center_crop": True,
    } | changes  # fmt: skip
    words = []
    for name, value in values.items():
        if value is not None:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


@pytest.fixture
def cache(script, teacher, tmp_path):
    """Return a function that runs the tool and gives the lines that it said."""

    def run(shards, output_dir, expected=0, processes=1, hook=None, **changes):
        words = tool_flags(teacher, shards, output_dir, **changes)
        said = tmp_path / f"said-{time.monotonic_ns()}"
        act = (lambda _tool: hook(script)) if hook else None
        lines = finish(Tool, words, said, expected, processes=processes, hook=act)
        return [line for line in lines if not line.startswith("encoding")]

    return run


@pytest.fixture(scope="module")
def cached(teacher, shards, tmp_path_factory):
    """Return the folder of the cached test shards, centre crops."""
    folder = tmp_path_factory.mktemp("cached")
    finish(Tool, tool_flags(teacher, shards, folder / "cache"), folder / "said")
    return folder / "cache"


def read(script, folder):
    """Return {shard: {key: (caption, tensors)}} of a folder of cached shards, heads included."""
    found = {}
    for shard in sorted(folder.glob("[!.]*.tar")):
        samples = script.wds.tarfile_samples([{"url": str(shard)}])
        found[shard.name] = {sample["__key__"]: (sample.get("txt"), load(sample["safetensors"])) for sample in samples}
    return found


def assert_same_cache(script, folder, other):
    ours, theirs = read(script, folder), read(script, other)
    assert {name: list(shard) for name, shard in ours.items()} == {n: list(s) for n, s in theirs.items()}
    for name, shard in ours.items():
        for key, (caption, tensors) in shard.items():
            other_caption, other_tensors = theirs[name][key]
            assert caption == other_caption and tensors.keys() == other_tensors.keys()
            for part, tensor in tensors.items():
                torch.testing.assert_close(tensor, other_tensors[part], rtol=1e-2, atol=1e-3)


def audit(script, shards, teacher, **changes):
    """Return (captions of the first four usable samples, the report) of the check before training."""
    args = script.parse_args(flags(teacher, shards, "unused", center_crop=True, **changes))
    usable, report, _ = script.audit(script.list_shards([str(shards)]), args)
    return [sample["caption"] for sample in usable][:4], report


# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

SETTINGS = {
    "center_crop": True, "max_train_steps": 3, "proportion_empty_prompts": 0.3, "validation_prompts": None,
    "dataloader_num_workers": 1, "validation_steps": 2,
}  # fmt: skip


def announce(script):
    """Say what is loaded from a file, and when pictures are drawn."""

    def said(owner):
        original = owner.from_pretrained.__func__

        def loading(cls, *args, **kwargs):
            script.tqdm.write(f"loaded {cls.__name__}", file=sys.stderr)
            return original(cls, *args, **kwargs)

        owner.from_pretrained = classmethod(loading)

    said(transformers.CLIPTextModel)
    said(transformers.CLIPTextModelWithProjection)
    said(AutoencoderKL)
    draw = script.draw_pictures
    script.draw_pictures = lambda *given, **more: script.tqdm.write("drawing", file=sys.stderr) or draw(*given, **more)


@pytest.fixture(scope="module")
def trained(script, teacher, shards, cached, tmp_path_factory):
    """Return (folder of a run on pictures, folder of one on their cache, what the latter said)."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"validation_prompts": "sea", "validation_steps": 0}  # which leave the losses as they are
    line = flags(teacher, shards, folder / "pictures", **SETTINGS | changes)
    finish(script, line, folder / "said-pictures")
    line = flags(teacher, cached, folder / "cached", **SETTINGS)
    said = finish(script, line, folder / "said", hook=announce)
    return folder / "pictures", folder / "cached", said


def test_losses_from_a_cache_are_those_from_pictures(trained):
    pictures, from_cache = ([row["loss"] for row in read_log(folder)] for folder in trained[:2])
    assert len(pictures) == len(set(pictures)) == 3
    assert from_cache == pytest.approx(pictures, rel=1e-3)


def test_a_cached_run_loads_the_vae_for_drawing_and_no_text_encoder(trained):
    said = [line.strip() for line in trained[2]]
    assert any("shards of cached tensors" in line for line in said)
    loaded = [line for line in said if line.startswith("loaded") or line == "drawing"]
    assert loaded == ["drawing", "loaded AutoencoderKL"] * 3, "the VAE leaves the device after each drawing"
    assert (trained[1] / "image_3.png").is_file(), "the first captions of the data are drawn"


def test_prompts_to_draw_need_the_text_encoders_and_still_no_vae(script, teacher, cached, tmp_path):
    changes = {"validation_prompts": "sea at dawn", "max_train_steps": 1}
    line = flags(teacher, cached, tmp_path / "out", **SETTINGS | changes)
    said = finish(script, line, tmp_path / "said", hook=announce)
    loaded = [line.strip() for line in said if line.startswith("loaded") or line.strip() == "drawing"]
    encoders = ["loaded CLIPTextModel", "loaded CLIPTextModelWithProjection"][: len(loaded) - 4]
    assert sorted(loaded[:-4]) == encoders and len(encoders) == len(script.TEXT_PARTS) // 2
    assert loaded[-4:] == ["drawing", "loaded AutoencoderKL"] * 2, "the teacher's pictures, and the LoRA's"


def test_a_stopped_run_on_a_cache_goes_on_as_an_unbroken_one(script, teacher, cached, trained, tmp_path):
    line = flags(teacher, cached, tmp_path / "out", **SETTINGS)
    finish(script, line, tmp_path / "1", 3, hook=at_call("draw", 2, send(signal.SIGTERM)))
    finish(script, line, tmp_path / "2")
    assert_same(tmp_path / "out", trained[1])


# ----------------------------------------------------------------------------------------------------------
# A cache that is not for this run
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"resolution": 2 * SIDE}, "resolution was 32, is 64"),
        ({"center_crop": None}, "center_crop was True, is False"),
        ({"random_flip": True}, "random_flip was False, is True"),
        ({"use_fix_crop_and_size": True}, "use_fix_crop_and_size was False, is True"),
        ({"interpolation_type": "lanczos"}, "interpolation_type was 'bilinear', is 'lanczos'"),
    ],
)
def test_other_flags_than_the_caches_are_named(script, teacher, cached, changes, named):
    args = script.parse_args(flags(teacher, cached, "unused", **{"center_crop": True} | changes))
    if changes.keys() & script.FLAGS_WITHOUT_EFFECT.keys():  # SD 1.5 has no size and crop: the cache stays usable
        assert script.audit(script.list_shards([str(cached)]), args)[2]["__key__"] == script.CACHE_KEY
        return
    with pytest.raises(script.UnusableInput, match=named):
        script.audit(script.list_shards([str(cached)]), args)


def test_another_text_encoder_or_vae_is_refused_and_another_unet_is_not(script, teacher, cached, tmp_path):
    file, seen = tmp_path / "model.safetensors", set()
    for place, value in ((0, 0), (0, 1), (-1, 1), (3 * 2**19, 1)):  # head, tail and middle
        data = bytearray(3 * 2**20)
        data[place] = value
        file.write_bytes(data)
        seen.add(script.fingerprint(file))
    with file.open("r+b") as large:
        large.truncate(200 * 2**20)
        seen.add(script.fingerprint(file))
        large.seek(50 * 2**20)
        large.write(b"\1" * 2**23)  # more than lies between two places that are read
    assert len(seen) == 5 and script.fingerprint(file) not in seen
    name, whole = "files of the teacher", script.fingerprint(file)
    before = {name: whole.partition(",")[0]}  # version 0.2.0's
    assert not script.differences(before, {name: whole}) and script.differences({name: whole[:-20]}, {name: whole})
    for old, new in (("crc32 0 of 1 files", whole), (None, whole), ("to_q", "to_q, to_k"), (1, 2), (None, 0)):
        assert script.differences({name: old}, {name: new}), (old, new)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    assert audit(script, cached, other)[0]
    before = script.fingerprint(other / "vae")
    (other / "vae" / ".cache" / "huggingface").mkdir(parents=True)  # where the Hub's downloads leave times
    (other / "vae" / ".cache" / "huggingface" / "a.metadata").write_text("now")
    assert script.fingerprint(other / "vae") == before and audit(script, cached, other)[0]
    for name, value in (("teacher_revision", "v2"), ("pretrained_vae_model_name_or_path", str(teacher / "vae"))):
        with pytest.raises(script.UnusableInput, match=f"{name} was None, is '"):
            audit(script, cached, other, **{name: value})
    for part, refused in ((f"unet/{VAE_FILE}", False), (f"vae/{VAE_FILE}", True)):
        state = load_file(other / part)
        save_file({name: value + 0.1 for name, value in state.items()}, other / part)
        if not refused:
            assert audit(script, cached, other)[0]
            continue
        with pytest.raises(script.UnusableInput, match="pretrained_teacher_model was 'crc32"):
            audit(script, cached, other)


def test_the_other_familys_cache_is_refused(script, teachers, cached):
    other = next(load_script(f"{name}.py") for name in teachers if name != script.__name__)
    with pytest.raises(other.UnusableInput, match="family was"):
        audit(other, cached, teachers[other.__name__])


@one_family
def test_a_run_that_the_cache_is_not_for_ends_with_2(script, teacher, cached, tmp_path):
    said = finish(script, flags(teacher, cached, tmp_path / "out"), tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and "center_crop was True, is False" in said[-1]
    assert "scripts/cache_latents.py" in said[-1] and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------
# Making it
# ----------------------------------------------------------------------------------------------------------


def test_two_processes_share_the_shards(script, cache, shards, cached, tmp_path):
    cache(shards, tmp_path / "out", processes=2)
    assert_same_cache(script, tmp_path / "out", cached)


@one_family
def test_views_are_crops_of_their_own(script, cache, teacher, tmp_path):
    data = [{"png": picture_bytes(i), "txt": f"sea {i}", "json": {"width": 99}} for i in range(4)]
    shard = write_shard(tmp_path / "0.tar", data)
    cache(shard, tmp_path / "out", num_views=3, center_crop=None, resolution=16, random_flip=True)
    (samples,) = read(script, tmp_path / "out").values()
    assert list(samples) == ["_cache", *(f"0-{i:05d}-{view}" for i in range(4) for view in range(3))]
    views = [samples[f"0-00000-{view}"][1]["moments"] for view in range(3)]
    assert {view.dtype for view in views} == {torch.float16} and views[0].shape == (8, 8, 8)
    mirrored = [samples[f"0-{i:05d}-{view}"][1]["moments"] for i in range(4) for view in range(3)]
    far = [(mirrored[3 * i] - mirrored[3 * i + view]).abs().max() > 0.02 for i in range(4) for view in (1, 2)]
    assert any(far) and not all(far), "flips of four pictures, beyond the rounding of float16"
    changes = {"resolution": 16, "random_flip": True}
    args = script.parse_args(flags(teacher, tmp_path / "out", "unused", **changes))
    usable, report, _ = script.audit(script.list_shards([str(tmp_path / "out")]), args)
    assert "first 12 samples 12 can be used" in report
    assert [sample["caption"] for sample in usable] == [f"sea {i}" for i in range(4) for _ in range(3)]


@one_family
def test_a_killed_run_leaves_no_half_shard_and_the_next_makes_the_missing(script, cache, tmp_path):
    write_shards(tmp_path / "shards", num_shards=3, samples_per_shard=8)
    out = tmp_path / "out"
    cache(tmp_path / "shards", out, -9, hook=at_call("encode_moments", 4, send(signal.SIGKILL)))
    assert [path.name for path in sorted(out.glob("[!.]*"))] == ["00000.tar", "00000_stats.json"]
    before = contents(out)[str(out / "00000.tar")]
    cache(tmp_path / "shards", out)
    assert contents(out)[str(out / "00000.tar")] == before and not list(out.glob(".writing*"))
    cache(tmp_path / "shards", tmp_path / "whole")
    assert_same_cache(script, out, tmp_path / "whole")
    assert len(read(script, out)) == 3
    everything = contents(out)
    cache(tmp_path / "shards", out, hook=at_call("encode_moments", 1, send(signal.SIGKILL)))
    assert contents(out) == everything, "a third run has nothing to do"
    middle = rb', \w{8} of their middle"'
    for path in out.glob("*.tar"):  # as version 0.2.0 wrote its head, whose checksums have no middle
        with tarfile.open(path) as tar:
            members = [(member, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for member, data in members:
                data = re.sub(middle, b'"', data)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    everything = contents(out)
    (out / "00001.tar").unlink()
    cache(tmp_path / "shards", out)
    assert contents(out).keys() == everything.keys() and not re.search(middle, (out / "00001.tar").read_bytes())
    assert_same_cache(script, out, tmp_path / "whole")
    (tmp_path / "busy").mkdir()
    with filelock.FileLock(tmp_path / "busy" / ".writing-00000.tar.lock"):  # as another process has it
        said = cache(tmp_path / "shards", tmp_path / "busy", 2)
    assert "00000.tar: another process is making it" in said[-1] and not list((tmp_path / "busy").glob("*.tar"))


@one_family
def test_a_truncated_shard_is_named(cache, tmp_path):
    write_shards(tmp_path / "shards", num_shards=3, samples_per_shard=4)
    path = tmp_path / "shards" / "00001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    said = cache(tmp_path / "shards", tmp_path / "out", 2)
    assert said[-1].startswith("error: ") and f"{path}: is truncated" in said[-1]
    assert not list((tmp_path / "out").iterdir())


@one_family
def test_a_shard_that_breaks_off_is_named_and_left_out(script, cache, tmp_path):
    write_shards(tmp_path / "shards", num_shards=3, samples_per_shard=4)
    url = f"pipe:cat {tmp_path}/shards/{{00000..00002}}.tar | head -c 30000000"
    cut = tmp_path / "shards" / "00001.tar"
    cut.write_bytes(cut.read_bytes()[:3000])

    def hurry(script):
        script.time.sleep = lambda _seconds: None

    said = cache(url, tmp_path / "out", 2, hook=hurry)
    assert said[-1].startswith("error: ") and "1 shards are missing" in said[-1]
    assert "00001.tar" in said[-2] and "broke off" in said[-2]
    assert list(read(script, tmp_path / "out")) == ["00000.tar", "00002.tar"]
    assert not list((tmp_path / "out").glob(".writing*"))


@one_family
def test_a_folder_with_other_shards_is_left_alone(cache, shards, cached, tmp_path):
    for number, (folder, changes) in enumerate(((shards, {}), (cached, {"num_views": 2}))):
        out = tmp_path / str(number)
        shutil.copytree(folder, out)
        before = contents(out)
        said = cache(shards, out, 2, **changes)
        assert said[-1].startswith("error: ") and str(out) in said[-1] and "other shards" in said[-1]
        assert contents(out) == before


@one_family
def test_a_cache_is_of_the_shards_that_it_was_begun_with(cache, shards, tmp_path):
    first = min(Path(shards).glob("*.tar"))
    cache(shards, tmp_path / "out")
    shutil.copytree(shards, tmp_path / "moved")
    cache(tmp_path / "moved", tmp_path / "out")  # the same shards elsewhere
    before = contents(tmp_path / "out")
    (tmp_path / "out" / "00001.tar").unlink()
    said = cache(shards, tmp_path / "out", 2, max_watermark=0.5)
    assert "00000.tar: was made with other filters (max_watermark was None, is 0.5)" in said[-1]
    cache(shards, tmp_path / "out")
    (tmp_path / "moved" / first.name).unlink()
    said = cache(tmp_path / "moved", tmp_path / "out", 2)
    assert f"00000.tar: was made of {first.name}" in said[-1] and contents(tmp_path / "out") == before
    (tmp_path / "out" / "00001_stats.json").write_text("{")
    os.truncate(tmp_path / "out" / "00001.tar", 5000)
    said = cache(shards, tmp_path / "out", 2)
    assert "00001.tar: is truncated" in said[-1]
    (tmp_path / "moved" / "no-caption.png").write_bytes(picture_bytes(0))
    for tar in (tmp_path / "moved").glob("*.tar"):
        tar.unlink()
    said = cache(tmp_path / "moved", tmp_path / "empty", 2)
    assert "no sample can be cached: no caption: 1" in said[-1]


FILTERED = [
    {"png": picture_bytes(0), "json": json.dumps({"pwatermark": 0.1, "caption": " fine"}).encode("utf-16")},
    {"png": picture_bytes(1), "txt": "marked", "json": {"pwatermark": 0.9}},
    {"png": picture_bytes(2, side=16), "txt": "small"},
    {"png": b"garbage", "txt": "damaged"},
]


@one_family
def test_filters_act_at_caching_and_at_training(script, cache, teacher, tmp_path):
    shard = write_shard(tmp_path / "0.tar", FILTERED)
    limits = {"max_watermark": 0.5, "min_image_side_px": SIDE}
    said = cache(shard, tmp_path / "filtered", **limits)
    causes = ["filtered by watermark: 1", "filtered by smaller side: 1"]
    assert all(cause in said[-1] for cause in [*causes, "picture cannot be decoded: 1"])
    assert [caption for caption, _ in read(script, tmp_path / "filtered")["00000.tar"].values()] == [
        None, b"fine"
    ]  # fmt: skip
    cache(shard, tmp_path / "all")
    assert audit(script, tmp_path / "all", teacher)[0] == ["fine", "marked", "small"]
    captions, report = audit(script, tmp_path / "all", teacher, **limits)
    assert captions == ["fine"] and all(cause in report for cause in causes)


def test_wrong_flags_end_with_2_before_the_slow_imports(teachers, shards, tmp_path):
    teacher = teachers["train_lcm_lora_sd15"]
    line = tool_flags(teacher, shards, tmp_path, num_views=0)
    command = [sys.executable, "-X", "importtime", str(TOOL), *line]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert done.returncode == 2 and "--num_views: 0: give 1 or more" in done.stderr
    assert not any(line.endswith(" torch") for line in done.stderr.splitlines())


@one_family
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"max_train_steps": 4}, "--max_train_steps"),  # a flag of the trainer that no cache depends on
        ({"resolution": 31}, "--resolution: '31'"),
        ({"pretrained_teacher_model": "/nowhere"}, "/nowhere"),
    ],
)
def test_what_cannot_be_cached_is_named(cache, shards, tmp_path, changes, named):
    said = cache(shards, tmp_path / "out", 2, **changes)
    assert named in said[-1] and not any("Traceback" in line for line in said)


@one_family
def test_a_name_twice_costs_one_file_and_is_counted(script, cache, tmp_path):
    write_shards(tmp_path / "in", num_shards=1, samples_per_shard=8)
    with tarfile.open(tmp_path / "in" / "00000.tar") as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]
    files.insert(12, next(file for file in files if file[0].endswith("00002.png")))
    with tarfile.open(tmp_path / "twice.tar", "w") as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    said = cache(tmp_path / "twice.tar", tmp_path / "out")
    assert "file name twice in its shard: 1" in said[-1]
    (samples,) = read(script, tmp_path / "out").values()
    assert [caption for caption, _ in samples.values()] == [None, *(b"sea %d" % i for i in range(8))]


def test_a_folder_of_pictures_is_cached_too(script, cache, cached, tmp_path):
    for i in range(24):
        (tmp_path / "in" / f"{i // 12}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / f"{i // 12}" / f"{i:03d}.png").write_bytes(picture_bytes(i))
        (tmp_path / "in" / f"{i // 12}" / f"{i:03d}.txt").write_text(f"sea {i}")
    (tmp_path / "in" / "1" / "z.png").symlink_to("nowhere.png")
    cache(tmp_path / "in", tmp_path / "out")
    ours = [pair for shard in read(script, tmp_path / "out").values() for pair in list(shard.values())[1:]]
    theirs = [pair for shard in read(script, cached).values() for pair in list(shard.values())[1:]]
    assert [caption for caption, _ in ours] == [caption for caption, _ in theirs]
    for (_, tensors), (_, others) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensors["moments"], others["moments"], rtol=1e-2, atol=1e-3)
        assert tensors.keys() == others.keys() and ("time_ids" in tensors) == (len(script.TEXT_PARTS) > 2)


@one_family
def test_files_of_a_cache_follow_the_umask_and_tell_their_samples(script, cache, shards, tmp_path):
    old = os.umask(0o022)
    try:
        cache(shards, tmp_path / "out", num_views=2)
    finally:
        os.umask(old)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    names = [f"0000{i}{end}" for i in (0, 1) for end in (".tar", "_stats.json")]
    assert modes == dict.fromkeys(sorted(names), "0o644") and sorted(modes) == sorted(names)
    assert script.count_samples(script.list_shards([str(tmp_path / "out")])) == 48


@one_family
def test_one_thread_writes_while_the_next_batch_is_encoded(cache, shards, tmp_path):
    """Writing that takes as long as encoding takes no longer than one of the two."""

    def slow(script):
        encode, write = script.encode_moments, TarWriter.write

        def encoding(*args):
            script.tqdm.write("began", file=sys.stderr)
            time.sleep(0.2)
            return encode(*args)

        def writing(writer, sample):
            if sample["__key__"] != script.CACHE_KEY:
                time.sleep(0.04)
                script.tqdm.write("wrote", file=sys.stderr)
            return write(writer, sample)

        script.encode_moments, TarWriter.write = encoding, writing

    said = [line.strip() for line in cache(shards, tmp_path / "out", hook=slow)]
    said = [word for line in said for word in line.split() if word in ("began", "wrote")]
    first, second = [number for number, word in enumerate(said) if word == "began"][:2]
    assert said[first + 1 : second].count("wrote") == 0, "the second batch begins before the first is written"
    assert said.count("wrote") == 24


@one_family
def test_a_full_disk_and_latents_that_overflow_end_with_2_and_one_line(cache, shards, tmp_path):
    def limit(_script):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def overflow(script):
        encode = script.encode_moments
        script.encode_moments = lambda *args: encode(*args).index_fill(0, torch.tensor(2), torch.inf)

    said = cache(shards, tmp_path / "out", 2, hook=overflow)
    assert "moments of 00000-00002 overflow" in said[-1] and not any("Traceback" in line for line in said)
    said = cache(shards, tmp_path / "out", 2, hook=limit)
    assert said[-1].startswith("error: ") and str(tmp_path / "out") in said[-1] and "cannot be written" in said[-1]
    assert not list((tmp_path / "out").glob("[!.]*.tar")) and not any("Traceback" in line for line in said)


@one_family
def test_what_is_missing_is_shared_among_processes(cache, tmp_path):
    """All that is missing must not fall to one process while the other waits for it."""
    write_shards(tmp_path / "shards", num_shards=4, samples_per_shard=2)
    cache(tmp_path / "shards", tmp_path / "out")
    for number in (1, 3):
        (tmp_path / "out" / f"0000{number}.tar").unlink()

    def tell(script):
        read_shard, note = script.read_shard, tmp_path / f"process {os.environ['RANK']}"

        def reading(shard, *args, **options):
            if Path(shard).parent.name == "shards":
                note.write_text(f"{note.read_text() if note.exists() else ''}{Path(shard).name}")
            return read_shard(shard, *args, **options)

        script.read_shard = reading

    cache(tmp_path / "shards", tmp_path / "out", processes=2, hook=tell)
    reads = {path.name: path.read_text() for path in tmp_path.glob("process *")}
    assert reads == {"process 0": "00001.tar", "process 1": "00003.tar"}


# ----------------------------------------------------------------------------------------------------------
# Damage
# ----------------------------------------------------------------------------------------------------------


def rewrite(script, source, target, edit):
    """Write a cached shard again; `edit` gets the samples, dicts, and returns those to write."""
    samples = list(script.wds.tarfile_samples([{"url": str(source)}]))
    target.parent.mkdir(parents=True, exist_ok=True)
    with script.wds.TarWriter(str(target)) as writer:
        for sample in edit(samples):
            writer.write({n: value for n, value in sample.items() if n == "__key__" or n[0] != "_"})


def damaged(samples):
    """Return a cached shard's samples, four of them each wrong in its own way."""
    head, *rest = samples
    del rest[0]["safetensors"]
    rest[1]["safetensors"] = rest[1]["safetensors"][:-50]
    tensors = load(rest[2]["safetensors"])
    rest[2]["safetensors"] = save({name: value for name, value in tensors.items() if name != "moments"})
    rest[3] = {"__key__": rest[3]["__key__"], "txt": rest[3]["txt"], "png": picture_bytes(0)}
    return [head, *rest]


CAUSES = {
    "no cached tensors": 2, "cached tensors cannot be read": 1,
    "cached tensors are incomplete or not finite": 1,
}  # fmt: skip


def skips(script, folder, teacher, num_batches):
    """Return (captions, skipped samples by cause) of the first batches that training would get."""
    args = script.parse_args(flags(teacher, folder, "unused", center_crop=True))
    shards = script.list_shards([str(folder)])
    cache = script.audit(shards, args)[2]
    stream = iter(script.ShardStream(shards, args, 1, 0, 1, cache=cache))
    batches = [next(stream) for _ in range(num_batches)]
    counts = sum((Counter(batch["skipped"]) for batch in batches), Counter())
    return [caption for batch in batches for caption in batch["caption"]], counts


def test_damaged_samples_of_a_cache_are_counted(script, teacher, cached, tmp_path):
    rewrite(script, cached / "00000.tar", tmp_path / "cache" / "0.tar", damaged)
    captions, report = audit(script, tmp_path / "cache", teacher)
    assert captions == [f"sea {i}" for i in range(4, 8)]
    assert all(f"{cause}: {count}" in report for cause, count in CAUSES.items()), report
    captions, counts = skips(script, tmp_path / "cache", teacher, num_batches=4)
    assert sorted(captions) == sorted(f"sea {i}" for i in range(4, 12)) and counts.keys() <= CAUSES.keys()
    whole = load([*script.read_shard(str(cached / "00000.tar"), Counter())][1]["safetensors"])
    assert script.cached_tensors({"safetensors": save(whole)}).keys() == script.CACHED_TENSORS
    for name, value in whole.items():  # a bit of a name, of a number
        whole_number = {name: value.half().view(torch.int16)}
        for wrong in ({name[:-1]: value}, {name + "x": value.clone(), name: value}, {name: value / 0}, whole_number):
            rest = {other: tensor for other, tensor in whole.items() if other != name}
            with pytest.raises(script.SkippedSample, match="incomplete or not finite"):
                script.cached_tensors({"safetensors": save(rest | wrong)})


@one_family
def test_a_damaged_head_is_named(script, teacher, cached, tmp_path):
    def without_embeddings(samples):
        samples[0].pop("safetensors")
        return samples

    rewrite(script, cached / "00000.tar", tmp_path / "cache" / "0.tar", without_embeddings)
    with pytest.raises(script.UnusableInput, match="the cache's head cannot be read"):
        audit(script, tmp_path / "cache", teacher)
    whole = [*script.read_shard(str(cached / "00000.tar"), Counter())][0]
    args = script.parse_args(flags(teacher, cached, "unused", center_crop=True))
    script.check_cache(whole, args)
    made, embeds = json.loads(whole["json"]), load(whole["safetensors"])
    without = {name: value for name, value in made.items() if name != "scaling_factor"}
    for wrong in (without, *(made | {"scaling_factor": value} for value in (0, None, float("nan")))):
        with pytest.raises(script.UnusableInput, match="the cache's head"):
            script.check_cache(whole | {"json": json.dumps(wrong).encode()}, args)
    for name, value in embeds.items():
        for wrong in ({name[:-1] + "t": value}, {name: value / 0}, {name: value.view(torch.int16)}):
            rest = {other: tensor for other, tensor in embeds.items() if other != name}
            with pytest.raises(script.UnusableInput, match="the cache's head is damaged"):
                script.check_cache(whole | {"safetensors": save(rest | wrong)}, args)


def test_pictures_among_cached_shards_are_refused_or_counted(
    script, teacher, cached, shards, tmp_path, monkeypatch, capsys
):
    (tmp_path / "beside.png").write_bytes(picture_bytes(0))
    for name, source in (("0.tar", cached / "00000.tar"), ("1.tar", Path(shards) / "00001.tar")):
        shutil.copy(source, tmp_path / name)
    with pytest.raises(script.UnusableInput, match="mixes cached shards and others, such as .*0.tar and .*1.tar"):
        audit(script, tmp_path, teacher)
    assert "1 pictures beside its tars are not read" in capsys.readouterr().err
    monkeypatch.setattr(script, "check_shard", lambda _path: b"")  # remote ones are not looked at before
    captions, report = audit(script, tmp_path, teacher)
    assert captions == [f"sea {i}" for i in range(4)] and "no cached tensors: 12" in report
    captions, counts = skips(script, tmp_path, teacher, num_batches=6)
    assert sorted(captions) == sorted(f"sea {i}" for i in range(12))
    assert counts.keys() <= {"no cached tensors"}
    for name, source in (("0.tar", Path(shards) / "00001.tar"), ("1.tar", cached / "00000.tar")):
        shutil.copy(source, tmp_path / name)
    with pytest.raises(script.UnusableInput, match="mixes pictures with cached shards"):
        audit(script, tmp_path, teacher)


@one_family
def test_a_shard_cached_in_another_way_is_refused_or_counted(
    script, cache, teacher, cached, shards, tmp_path, monkeypatch
):
    cache(shards, tmp_path / "other", center_crop=None)
    (tmp_path / "both").mkdir()
    for name, folder in (("0.tar", cached), ("1.tar", tmp_path / "other")):
        shutil.copy(folder / "00000.tar", tmp_path / "both" / name)
    with pytest.raises(script.UnusableInput, match="mixes shards that were cached in different ways"):
        audit(script, tmp_path / "both", teacher)
    monkeypatch.setattr(script, "check_shard", lambda _path: b"")  # remote ones are not looked at before
    captions, report = audit(script, tmp_path / "both", teacher)
    assert captions == [f"sea {i}" for i in range(4)] and "1.tar was cached in another way" in report
