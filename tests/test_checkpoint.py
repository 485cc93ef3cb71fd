"""Checkpoints: a run that is killed, stopped or damaged ends as one that was left alone."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import conftest
import pytest
import torch
from conftest import (
    DEADLINE_S,
    SCRIPTS,
    Run,
    at_call,
    build_teacher,
    finish,
    load_script,
    picture_bytes,
    read_log,
    send,
    write_shards,
)
from safetensors.torch import load_file, save_file

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def script():
    """The SD 1.5 script: no model's family changes what is saved, stopped and resumed."""
    return load_script(SCRIPTS[0])


def flags(*given, **changes):
    """Return the command line of a small run that draws no pictures."""
    return conftest.flags(*given, **{"validation_steps": -1} | changes)


def results(output_dir):
    """Return what must not depend on where a run was interrupted: the log and the weights."""
    log = [{name: row[name] for name in ("step", "loss", "lr", "grad_norm")} for row in read_log(output_dir)]
    return log, load_file(Path(output_dir) / WEIGHTS)


def assert_same(output_dir, other):
    (log, weights), (other_log, other_weights) = results(output_dir), results(other)
    assert log == other_log
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoints(output_dir):
    return {path.name for path in Path(output_dir).glob("checkpoint-*")}


SETTINGS = {
    "max_train_steps": 6, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.1,
    "dataloader_num_workers": 1, "random_flip": True, "proportion_empty_prompts": 0.2,
    "lr_scheduler": "linear", "checkpoints_total_limit": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(script, teacher, shards, tmp_path_factory):
    """Return the folder of a run of 6 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(script, flags(teacher, shards, folder / "out", **SETTINGS), folder / "said")
    return folder / "out"


@pytest.fixture
def again(script, teacher, shards, tmp_path):
    """Return a function that gives the same command, with changes, in a folder of its own."""

    def run(expected=0, hook=None, **changes):
        line = flags(teacher, shards, tmp_path / "out", **SETTINGS | changes)
        return finish(script, line, tmp_path / f"said-{time.monotonic_ns()}", expected, hook=hook)

    return run


def test_a_run_killed_and_stopped_at_bad_moments_ends_as_an_unbroken_one(again, unbroken, tmp_path):
    out, log = tmp_path / "out", read_log(unbroken)
    assert [row["lr"] for row in log] == pytest.approx([1e-3 * left / 6 for left in range(6, 0, -1)])

    def losses_agree(last_step):
        ours = read_log(out)
        assert [row["step"] for row in ours] == list(range(1, last_step + 1))
        assert [row["loss"] for row in ours] == [row["loss"] for row in log[:last_step]]

    kill = send(signal.SIGKILL)
    again(-9, at_call("save_for_peft", 1, kill))  # while checkpoint-2 is being written
    assert (out / ".writing-checkpoint-2").exists() and not checkpoints(out)
    said = again(-9, at_call("prune_checkpoints", 1, kill))  # when it has just got its name
    assert any("starting from update 0" in line for line in said)
    assert checkpoints(out) == {"checkpoint-2"}
    said = again(-9, at_call("draw", 4, kill))  # in the middle of update 4
    assert any(line.endswith("checkpoint-2") and "resuming" in line for line in said)
    assert len(read_log(out)) == 3, "update 3 is lost, and its line has to go"
    with (out / "log.jsonl").open("a") as file:
        file.write('\0\0\n{"loss": 1.0}\n{"step": 4, "loss": 0.0')  # as a crash leaves, and a kill that cut one short
    # checkpoint-4 lacks only its manifest
    again(-9, at_call("write_atomically", lambda path, _data: path.match(".writing-checkpoint-4/*.json"), kill))
    assert (out / ".writing-checkpoint-4").exists() and checkpoints(out) == {"checkpoint-2"}
    said = again(3, at_call("draw", 2, send(signal.SIGTERM)))
    assert said[-1].startswith("stopped: ") and "SIGTERM" in said[-1] and "checkpoint-3" in said[-1]
    losses_agree(3)
    said = again(3, at_call("draw", 2, send(signal.SIGINT)))
    assert said[-1].startswith("stopped: ") and "SIGINT" in said[-1] and "checkpoint-4" in said[-1]
    said = again(3, at_call("draw", 2, send(signal.SIGUSR1)))
    assert said[-1].startswith("stopped: ") and "SIGUSR1" in said[-1] and "checkpoint-5" in said[-1]
    losses_agree(5)
    (out / ".writing-checkpoint-6-old").mkdir()
    (out / ".writing-checkpoint-6-old" / "of a kill").touch()
    again()
    assert_same(out, unbroken)
    assert checkpoints(out) == {"checkpoint-5", "checkpoint-6"}, "--checkpoints_total_limit 2"
    assert not list(out.rglob(".writing*"))


def test_a_kill_from_outside_at_any_moment(script, teacher, shards, unbroken, tmp_path):
    out = tmp_path / "out"
    line = flags(teacher, shards, out, **SETTINGS)
    for number in range(2):
        run = Run(script, line, tmp_path / f"said-{number}")
        ends = time.monotonic() + DEADLINE_S
        before = checkpoints(out)
        while checkpoints(out) == before and time.monotonic() < ends:
            time.sleep(0.003)
        time.sleep(0.2 * number)
        run.signal(signal.SIGKILL)
        assert run.wait() == [-9]
    finish(script, line, tmp_path / "said")
    assert_same(out, unbroken)


# Under nohup, where SIGHUP is ignored, it has to stay so.
IS_IGNORED = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM if IS_IGNORED else signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_to_loader_workers_too_saves_a_checkpoint(script, teacher, shards, tmp_path, number):
    """torchrun signals the process group of each rank, Slurm every process of a step."""
    out = tmp_path / "out"
    line = flags(teacher, shards, out, **SETTINGS | {"max_train_steps": 500, "checkpointing_steps": 500})
    run = Run(script, line, tmp_path / "said")
    ends = time.monotonic() + DEADLINE_S
    while not (out / "log.jsonl").exists() or not read_log(out):
        assert time.monotonic() < ends
        time.sleep(0.05)
    run.signal(number)
    assert run.wait() == [3], run.lines()
    (name,) = checkpoints(out)
    assert read_log(out)[-1]["step"] == int(name.partition("-")[2])
    assert script.read_manifest(out / name)[0]


def test_other_settings_are_refused_by_name_and_nothing_is_touched(again, unbroken, teacher, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.copytree(teacher, tmp_path / "other")
    before = contents(out)
    other = str(tmp_path / "other")
    changes = {"max_train_steps": 8, "lora_rank": 8, "w_max": 9.0, "train_batch_size": 1}
    said = again(2, pretrained_teacher_model=other, **changes)
    assert said[-1].startswith("error: ")
    for name, value in changes.items():
        assert f"{name} was " in said[-1] and f"is {value}" in said[-1]
    assert "pretrained_teacher_model was" in said[-1] and other in said[-1]
    assert "seed" not in said[-1]
    assert contents(out) == before


def test_a_damaged_checkpoint_is_passed_over(again, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    sizes = json.loads((out / "checkpoint-6" / "checkpoint.json").read_text())["sizes"]
    files = {path.relative_to(out / "checkpoint-6").as_posix() for path in (out / "checkpoint-6").rglob("*.*")}
    assert sizes.keys() == files - {"checkpoint.json"} and "unet/adapter_model.safetensors" in sizes
    file = out / "checkpoint-6" / "training_state.pt"
    newest = (out / "checkpoint-6").rename(tmp_path / "newest")
    for name in ("training_state.pt", "unet/adapter_model.safetensors"):  # of the right size, but zeros
        whole = (out / "checkpoint-4" / name).read_bytes()
        (out / "checkpoint-4" / name).write_bytes(bytes(len(whole)))
        assert re.search(r"error: \S+checkpoint-4 cannot be read \(.+\); if .* remove it", again(expected=2)[-1])
        (out / "checkpoint-4" / name).write_bytes(whole)
    newest.rename(out / "checkpoint-6")
    file.write_bytes(file.read_bytes()[:-1])
    said = again()
    assert any("passing over" in line and "checkpoint-6: training_state.pt is damaged" in line for line in said)
    assert any("resuming from" in line and line.endswith("checkpoint-4") for line in said)
    assert_same(out, unbroken)


def test_a_damaged_checkpoint_does_not_push_out_a_new_one(again, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-6" / "training_state.pt").write_bytes(b"")
    said = again(2)  # rather than replace the LoRA of a finished run
    assert "the run would replace" in said[-1]
    for name in ("README.md", "pytorch_lora_weights.safetensors"):
        (out / name).unlink()
    again(3, at_call("draw", 6, send(signal.SIGTERM)), checkpoints_total_limit=1)
    assert "checkpoint-3" in checkpoints(out)
    again()
    assert_same(out, unbroken)


@pytest.mark.parametrize("flag, code", [("use_4bit_base", 0), ("random_flip", 2)])
def test_a_checkpoint_older_than_a_flag_has_its_default(again, unbroken, script, tmp_path, flag, code):
    """Of the two flags SETTINGS has the second."""
    shutil.copytree(unbroken, tmp_path / "out")
    for name in checkpoints(unbroken):
        file = tmp_path / "out" / name / script.MANIFEST_NAME
        manifest = json.loads(file.read_text())
        del manifest["settings"][flag]
        file.write_text(json.dumps(manifest))
    said = again(code)
    wanted = {0: "this run is finished", 2: "(random_flip was False, is True)"}[code]
    assert any(re.search(wanted, line) for line in said)


def test_more_steps_go_on_from_the_last(script, teacher, shards, tmp_path):
    for steps in (2, 3):
        said = finish(script, flags(teacher, shards, tmp_path / "out", max_train_steps=steps), tmp_path / "said")
    assert any("resuming from" in text and text.endswith("checkpoint-2") for text in said)
    finish(script, flags(teacher, shards, tmp_path / "once", max_train_steps=3), tmp_path / "said")
    assert_same(tmp_path / "out", tmp_path / "once")


def test_a_loss_that_is_not_finite_stops_the_run(script, shards, tmp_path):
    out, teacher = tmp_path / "out", build_teacher(tmp_path / "teacher")
    finish(script, flags(teacher, shards, out, max_train_steps=2), tmp_path / "said")
    before = contents(out / "checkpoint-2")

    def poison(script):
        load = script.load_teacher

        def poisoned(*args, **kwargs):
            pipe = load(*args, **kwargs)
            pipe.unet.conv_out.bias[0] = torch.nan
            return pipe

        script.load_teacher = poisoned

    line = flags(teacher, shards, out, max_train_steps=6, logging_steps=3)
    said = finish(script, line, tmp_path / "nan", expected=1, hook=poison)
    assert (
        said[-1].startswith("error: ")
        and "loss nan" in said[-1]
        and "update 3" in said[-1]
        and "--learning_rate" in said[-1]
    )
    assert not any("Traceback" in line for line in said)
    assert checkpoints(out) == {"checkpoint-2"} and contents(out / "checkpoint-2") == before
    assert [row["step"] for row in read_log(out)] == [1, 2]
    # Another teacher under the same name is no teacher to go on with; a place has many names.
    line[line.index(str(teacher))] = f"{teacher}/../teacher/"
    finish(script, [*line, "--dry_run"], tmp_path / "said-again")
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"conv_out.bias": torch.ones(4)}, weights)
    said = finish(script, line, tmp_path / "other", expected=2)
    assert "made with other settings (files of the teacher was" in said[-1] and "train_shards" not in said[-1]


def test_a_gradient_that_is_not_finite_does_not_reach_a_checkpoint(script, teacher, shards, tmp_path):
    def poison(script):
        distance, calls = script.distance, []

        def without_gradient(pred, *args):
            calls.append(1)
            loss = distance(pred, *args)
            return loss + 0 * torch.sqrt(0 * pred.sum()) if len(calls) == 4 else loss

        script.distance = without_gradient

    out = tmp_path / "out"
    said = finish(script, flags(teacher, shards, out), tmp_path / "said", 1, hook=poison)
    assert said[-1].startswith("error: ") and "update 4" in said[-1]
    assert checkpoints(out) == {"checkpoint-2"}
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_new_shards_are_noticed_when_a_run_is_resumed(script, teacher, tmp_path):
    """They would move every position: part of the data would come twice an epoch, part not at all."""
    write_shards(tmp_path / "shards")
    line = flags(teacher, tmp_path / "shards", tmp_path / "out", max_train_steps=2)
    finish(script, line, tmp_path / "said")
    write_shards(tmp_path / "shards", num_shards=3)
    said = finish(script, line, tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and "shards" in said[-1]


def test_a_run_goes_on_from_its_own_copy_of_the_script(script, teacher, shards, tmp_path):
    out = tmp_path / "out"

    def be_the_copy(script):
        script.__file__ = str(out / Path(script.__file__).name)

    finish(script, flags(teacher, shards, out, max_train_steps=1), tmp_path / "said")
    finish(script, flags(teacher, shards, out, max_train_steps=2), tmp_path / "said", hook=be_the_copy)
    assert len(read_log(out)) == 2


def test_another_runs_checkpoint_with_other_settings_is_named(again, unbroken, tmp_path):
    said = again(2, resume_from_checkpoint=unbroken / "checkpoint-6", lora_rank=8)
    assert f"{unbroken / 'checkpoint-6'} was made with other settings (lora_rank was 4, is 8)" in said[-1]
    assert "checkpoint-6 in " not in said[-1] and not checkpoints(tmp_path / "out")


def test_a_finished_run_started_again_ends_at_once(again, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "out")
    before = contents(tmp_path / "out")
    said = again()
    assert said[-1].startswith("this run is finished: ") and str(tmp_path / "out" / WEIGHTS) in said[-1]
    assert said[-1].endswith(f"--init_lora {tmp_path / 'out' / 'checkpoint-6'}"), "its schedule has ended"
    assert not any("loading the models" in line for line in said) and contents(tmp_path / "out") == before
    said = again(resume_from_checkpoint="checkpoint-4")
    assert any("note: 'latest' would go on from checkpoint-6: remove" in line for line in said)
    assert_same(tmp_path / "out", unbroken)


def test_a_run_stopped_before_its_first_update_does_not_hold_its_folder(script, teacher, shards, tmp_path):
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=2, gradient_accumulation_steps=2)
    said = finish(script, line, tmp_path / "first", 3, hook=at_call("draw", 1, send(signal.SIGINT)))
    assert any(text.startswith("SIGINT: a checkpoint is saved after this update") for text in said)
    assert said[-1].startswith("stopped: SIGINT; checkpoint-0 is saved")
    said = finish(script, [*line, "--lora_rank", "2"], tmp_path / "second", 2)
    assert said[-1].endswith("it holds no update: remove it, or choose another --output_dir")


def test_a_finished_run_is_uploaded_when_asked_later(script, again, unbroken, tmp_path):
    def stub(script):
        script.make_repository = lambda args: f"me/{args.hub_model_id}"
        script.push = lambda _args, folder: script.tqdm.write(f"pushed {folder}")

    shutil.copytree(unbroken, tmp_path / "out")
    manifest = tmp_path / "out" / "checkpoint-6" / script.MANIFEST_NAME
    record = json.loads(manifest.read_text())
    record["settings"] |= {"compile": False, "allow_tf32": False}  # as earlier versions noted them
    manifest.write_text(json.dumps(record))
    assert again(hook=stub, allow_tf32=True)[-1].startswith("this run is finished")
    weights = load_file(tmp_path / "out" / WEIGHTS)
    card, asked = tmp_path / "out" / "README.md", {"push_to_hub": True, "hub_model_id": "late"}
    for prompts, shown in (("a hill", '"a hill"'), (None, script.NEUTRAL_PROMPTS[0])):
        text = card.read_text()
        said = again(2, hook=stub, validation_prompts=prompts, **asked)
        assert f"{card} was not written for the Hub and may show captions" in said[-1] and card.read_text() == text
        card.unlink()
        said = again(hook=stub, validation_prompts=prompts, **asked)
        assert said[-1] == f"pushed {tmp_path / 'out'}" and "loading the models" in said
        text = card.read_text()
        assert 'load_lora_weights("me/late"' in text and shown in text and "sea" not in text
        card.write_bytes(text.encode() + b"\xe4")  # edited, in another encoding
        said = again(hook=stub, validation_prompts=prompts, **asked)
        assert said[-1] == f"pushed {tmp_path / 'out'}" and "loading the models" not in said
        card.write_text(text)
    torch.testing.assert_close(load_file(tmp_path / "out" / WEIGHTS), weights, rtol=0, atol=0)


def test_a_finished_run_of_a_constant_rate_names_the_flag_that_goes_on(script, teacher, shards, tmp_path):
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=1)
    finish(script, line, tmp_path / "first")
    assert finish(script, line, tmp_path / "again")[-1].endswith("; a greater --max_train_steps goes on")


def test_a_second_signal_while_the_first_ones_checkpoint_is_written(script, teacher, shards, tmp_path):
    """The first one comes between two micro steps, whose update is given up."""

    def hook(script):
        at_call("draw", 3, send(signal.SIGUSR1))(script)
        at_call("write_checkpoint", 1, send(signal.SIGTERM))(script)
        os.write = gone  # Ctrl-C ends `tee`, too, and with it the stream that the run writes to

    gone = mock.Mock(side_effect=BrokenPipeError)
    print("lost", file=script.Unbroken(mock.Mock(write=gone, flush=gone)), flush=True)
    line = flags(teacher, shards, tmp_path / "out", gradient_accumulation_steps=2, checkpointing_steps=50)
    said = finish(script, line, tmp_path / "said", 3, hook=hook)
    assert "SIGUSR1" in said[-1] and "checkpoint-1 is saved" in said[-1]
    positions = json.loads((tmp_path / "out" / "checkpoint-1" / "checkpoint.json").read_text())["positions"]
    assert positions == {"0": [0, 4]}, "the samples of the update that is given up come again"
    assert checkpoints(tmp_path / "out") == {"checkpoint-1"}


def test_a_run_stopped_after_its_last_update_writes_what_is_missing(again, unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "out")
    for name in (WEIGHTS, "README.md"):
        (tmp_path / "out" / name).unlink()
    again()
    assert_same(tmp_path / "out", unbroken)
    assert (tmp_path / "out" / "README.md").exists()
    (tmp_path / "out" / WEIGHTS).write_bytes(b"cut")
    again()
    assert_same(tmp_path / "out", unbroken)
    os.utime(tmp_path / "out" / WEIGHTS, (0, 0))  # the file of a shorter run, before more updates
    assert not any("this run is finished" in line for line in again())


def test_two_runs_in_one_folder_are_refused(script, teacher, shards, tmp_path):
    out = tmp_path / "out"
    line = flags(teacher, shards, out, max_train_steps=5000, checkpointing_steps=5000)
    first = Run(script, line, tmp_path / "first")
    ends = time.monotonic() + DEADLINE_S
    while not (out / "log.jsonl").exists() and time.monotonic() < ends:
        time.sleep(0.02)
    before = (out / "args.json").read_bytes()
    said = finish(script, flags(teacher, shards, out, max_train_steps=1), tmp_path / "second", 2)
    assert said[-1].startswith("error: ") and str(out) in said[-1] and "another run" in said[-1]
    assert (out / "args.json").read_bytes() == before
    first.signal(signal.SIGKILL)
    first.wait()
    finish(script, flags(teacher, shards, out, max_train_steps=1), tmp_path / "third")  # a dead run holds no lock

    def no_locks(_script):  # as on Lustre mounted without flock
        fcntl.flock = mock.Mock(side_effect=OSError(errno.ENOSYS, "no flock"))

    said = finish(script, flags(teacher, shards, out, max_train_steps=2), tmp_path / "fourth", hook=no_locks)
    assert any("has no file locks" in line for line in said)
    assert not (out / ".lock").read_text(), "a soft lock is no lock of the kernel's, and stays"


def test_a_folder_of_pictures_is_trained_on_as_it_is_and_resumed_exactly(script, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SAMPLES_PER_FOLDER_SHARD", 5)
    for number in range(12):
        folder = tmp_path / "pictures" / ("deep/er" if number % 3 else ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(picture_bytes(number))
        (folder / f"{number}.txt").write_text(f"sea {number}")
    changes = {"max_train_steps": 7, "checkpointing_steps": 3, "dataloader_num_workers": 2, "random_flip": True}
    lines = [flags(teacher, tmp_path / "pictures", tmp_path / name, **changes) for name in ("whole", "broken")]
    said = finish(script, lines[0], tmp_path / "said")
    assert any(line.startswith("data: 12 samples") for line in said)
    finish(script, lines[1], tmp_path / "said", -9, hook=at_call("draw", 5, send(signal.SIGKILL)))
    assert checkpoints(tmp_path / "broken") == {"checkpoint-3"}, "where it is the second worker's turn"
    finish(script, lines[1], tmp_path / "said")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("out", ["/proc/lcm", "/sys/lcm"])
def test_an_unwritable_output_folder_is_named_before_any_model_loads(script, teacher, shards, tmp_path, out):
    said = finish(script, flags(teacher, shards, out), tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and f"--output_dir {out}" in said[-1]
    assert not any("Traceback" in line or "loading the models" in line for line in said)


def test_a_checkpoint_is_loaded_through_the_cpu(script, monkeypatch, tmp_path):
    """Else each GPU would hold the optimizer's state twice at the start."""
    places, load = [], torch.load
    monkeypatch.setattr(script.torch, "load", lambda *given, **named: places.append(named) or load(*given, **named))
    for name in ("load_file", "set_peft_model_state_dict", "cast_training_params"):
        monkeypatch.setattr(script, name, lambda *_given, **_named: {})
    manifest = {"global_step": 1, "positions": {}, "skipped": {"no caption": 2}, "sizes": {}}
    (tmp_path / script.MANIFEST_NAME).write_text(json.dumps(manifest))
    job = mock.MagicMock(student_unet=torch.nn.Identity(), state=script.RunState())
    with pytest.raises(FileNotFoundError):
        script.load_checkpoint(job, tmp_path, manifest)
    assert job.state.skipped == {"no caption": 2}, "counts go on from the checkpoint's"
    job.accelerator.is_main_process = False
    with pytest.raises(FileNotFoundError):
        script.load_checkpoint(job, tmp_path, manifest)
    assert job.state.skipped == {"no caption": 2}, "once over all processes"
    for place, step in (Path("/nowhere"), 1), (tmp_path, 2):  # rank 0 has another one
        with pytest.raises(script.UnusableInput, match=f"{place} is not that of the first process"):
            script.load_checkpoint(job, place, manifest | {"global_step": step})
    assert places and str(places[0]["map_location"]) == "cpu" and places[0]["weights_only"] is True


# ----------------------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------------------


def make_checkpoint(script, output_dir, step, **manifest):
    """Write a folder that looks like a complete checkpoint."""
    folder = output_dir / f"checkpoint-{step}"
    (folder / "unet").mkdir(parents=True)
    sizes = {"a": step, "unet/b": 3}
    for name, size in sizes.items():
        (folder / name).write_bytes(b"x" * size)
    manifest = {"global_step": step, "settings": {}, "positions": {}, "sizes": sizes} | manifest
    (folder / script.MANIFEST_NAME).write_text(json.dumps(manifest))
    return folder


def find(script, output_dir, wanted="latest"):
    """Return (name of the checkpoint to resume from, what was said)."""
    said = []
    args = mock.Mock(resume_from_checkpoint=str(wanted), output_dir=str(output_dir))
    folder, manifest = script.find_checkpoint(args, said.append)
    assert (folder is None) == (manifest is None)
    return folder and folder.name, said


def test_the_newest_complete_checkpoint_is_found(script, tmp_path):
    assert find(script, tmp_path) == (None, [])
    for step in (2, 10, 9):
        make_checkpoint(script, tmp_path, step)
    make_checkpoint(script, tmp_path, 11).rename(tmp_path / ".writing-checkpoint-11")
    (tmp_path / "checkpoint-best").mkdir()
    assert find(script, tmp_path) == ("checkpoint-10", [])
    for wanted in (tmp_path / "checkpoint-2", "checkpoint-2"):
        assert find(script, tmp_path, wanted) == ("checkpoint-2", [])
    for name in (script.WEIGHTS_NAME, "README.md"):  # of another LoRA, perhaps that of --init_lora
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).touch()
        for wanted in ("latest", "none", tmp_path / "checkpoint-2"):
            with pytest.raises(script.UnusableInput, match=f"would replace .*{name}/{name}; name another folder"):
                find(script, tmp_path / name, wanted)
        make_checkpoint(script, tmp_path / name, 4)
        assert find(script, tmp_path / name) == ("checkpoint-4", [])
        (tmp_path / name / "checkpoint-4").rename(tmp_path / name / "best")
        with pytest.raises(script.UnusableInput, match="would replace"):  # from elsewhere
            find(script, tmp_path / name, tmp_path / "checkpoint-2")


def test_checkpoints_of_another_run_or_program_are_left_alone(script, tmp_path):
    named, out = make_checkpoint(script, tmp_path / "a", 2), tmp_path / "b"
    make_checkpoint(script, out, 7)
    with pytest.raises(
        script.UnusableInput, match="b: holds checkpoints of another run; go on from them with 'latest'"
    ):
        find(script, out, named)
    (out / "args.json").write_text(json.dumps({"resume_from_checkpoint": str(named)}))
    assert find(script, out, named)[0] == "checkpoint-7", "the run began there, and is requeued"
    (out / "checkpoint-7" / "a").unlink()
    assert find(script, out, named)[0] == "checkpoint-2"
    foreign = tmp_path / "c" / "checkpoint-500"  # as accelerate's save_state leaves it
    foreign.mkdir(parents=True)
    (foreign / "optimizer.bin").touch()
    for wanted in ("latest", named):
        with pytest.raises(script.UnusableInput, match="checkpoint-500: is of another program"):
            find(script, tmp_path / "c", wanted)


def test_a_checkpoint_is_on_the_disk_once_and_whole(script, tmp_path, monkeypatch):
    synced, fsync, written = set(), os.fsync, []
    monkeypatch.setattr(
        script.os, "fsync", lambda file: synced.add(os.readlink(f"/proc/self/fd/{file}")) or fsync(file)
    )
    state = script.RunState(global_step=3)
    args = SimpleNamespace(output_dir=tmp_path / "out", checkpoints_total_limit=1)
    accelerator = SimpleNamespace(is_main_process=True)
    job = SimpleNamespace(args=args, state=state, student_unet=None, fake=None, accelerator=accelerator)
    monkeypatch.setattr(script, "save_lora", lambda _unet, path, _args: path.write_bytes(b"lora"))
    monkeypatch.setattr(
        script, "save_for_peft", lambda _unet, folder: (folder / "adapter_config.json").write_text("{}")
    )
    monkeypatch.setattr(script, "stateful_parts", lambda _job: written.append(1) or {})
    script.save_checkpoint(job, {})
    files = {path for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in files} == {Path(name).name.removeprefix(".writing-") for name in synced}
    script.save_checkpoint(job, {})  # as where a signal comes before the next update
    assert len(written) == 1
    state.global_step = 4
    for error, kind in ((OSError(28, "full"), script.UnusableInput), (torch.AcceleratorError("ECC"), RuntimeError)):
        monkeypatch.setattr(script, "stateful_parts", mock.Mock(side_effect=error))
        with pytest.raises(kind):
            script.save_checkpoint(job, {})
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-3"], "nothing fills the disk"


DAMAGES = {
    "a": [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.write_bytes(b"")],
    "unet/b": [Path.unlink, lambda path: path.write_bytes(b"xx")],
    "checkpoint.json": [
        Path.unlink, *(lambda path, text=text: path.write_text(text) for text in
        ("", "[]", "null", '{"sizes": 1}', '{"global_step": 30}', '{"sizes": {"a": 20}'))
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_never_picked(script, tmp_path, name):
    make_checkpoint(script, tmp_path, 10)
    for damage in DAMAGES[name]:
        damaged = make_checkpoint(script, tmp_path, 20)
        damage(damaged / name)
        found, said = find(script, tmp_path)
        assert found == "checkpoint-10" and len(said) == 1 and "checkpoint-20: " in said[0]
        with pytest.raises(script.UnusableInput, match="checkpoint-20: .* (damaged|missing|read)"):
            find(script, tmp_path, damaged)
        shutil.rmtree(damaged)


def test_a_manifest_cut_anywhere_is_never_read(script, tmp_path):
    manifest = make_checkpoint(script, tmp_path, 2) / script.MANIFEST_NAME
    text = manifest.read_bytes()
    assert script.read_manifest(manifest.parent)[0]["global_step"] == 2
    for length in range(len(text)):
        manifest.write_bytes(text[:length])
        assert script.read_manifest(manifest.parent)[0] is None, length


def test_a_checkpoint_of_the_version_before_is_refused_by_name(again, script, tmp_path):
    """As e68caa9 wrote it: a manifest with a checksum of each file and a seal."""
    folder = tmp_path / "out" / "checkpoint-6"
    (folder / "unet").mkdir(parents=True)
    (folder / "optimizer.bin").write_bytes(b"optimizer")
    manifest = {
        "global_step": 6, "script_version": "0.1.0", "settings": {"lora_rank": 4, "num_shards": 2},
        "positions": {"0": [0, 96]}, "files": {"optimizer.bin": "cd164d716f5d859f"}, "seal": "389061f69c8dd971",
    }  # fmt: skip
    (folder / script.MANIFEST_NAME).write_text(json.dumps(manifest))
    before = contents(tmp_path)
    said = again(2)
    assert said[-1].startswith("error: ") and f"{folder} was written by version 0.1.0" in said[-1]
    assert "--output_dir" in said[-1] and before.items() <= contents(tmp_path).items()
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_an_earlier_run_is_not_overwritten_by_starting_afresh(script, tmp_path):
    assert find(script, tmp_path, "none") == (None, [])
    make_checkpoint(script, tmp_path, 2)
    with pytest.raises(script.UnusableInput, match="--resume_from_checkpoint none.*holds checkpoints of an earlier"):
        find(script, tmp_path, "none")


def test_old_checkpoints_go_and_the_one_just_written_stays(script, tmp_path):
    now = time.time()
    for number, step in enumerate((2, 10, 9)):  # 9 was saved on a signal, after resuming from an earlier one
        os.utime(make_checkpoint(script, tmp_path, step) / script.MANIFEST_NAME, (now + number, now + number))
    (tmp_path / "checkpoint-10" / script.MANIFEST_NAME).unlink()
    (tmp_path / ".writing-checkpoint-10").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    script.prune_checkpoints(tmp_path, None, tmp_path / "checkpoint-9")
    names = {"checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-notes"}
    assert {path.name for path in tmp_path.iterdir()} == names
    script.prune_checkpoints(tmp_path, 2, tmp_path / "checkpoint-9")
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-9", "checkpoint-notes"}, "damaged ones go first"
    newest = make_checkpoint(script, tmp_path, 5)
    os.utime(newest / script.MANIFEST_NAME, (0, 0))  # by a clock that was set back
    script.prune_checkpoints(tmp_path, 1, newest)
    assert checkpoints(tmp_path) == {"checkpoint-5", "checkpoint-notes"}


def test_an_old_checkpoint_that_cannot_be_removed_is_reported(script, tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        make_checkpoint(script, tmp_path, step)
    monkeypatch.setattr(script.shutil, "rmtree", mock.Mock(side_effect=PermissionError(13, "not yours")))
    script.prune_checkpoints(tmp_path, 1, tmp_path / "checkpoint-2")
    assert "checkpoint-1 cannot be removed" in capsys.readouterr().err
