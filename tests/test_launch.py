"""Whole runs: what `accelerate launch` leaves behind, two processes, kinds of teacher, unusable input."""

import gc
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BUILDERS,
    ENVIRONMENT,
    ROOT,
    flags,
    launch,
    one_family,
    picture_bytes,
    read_log,
    tiny_unet,
    write_shard,
)
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint import Run, assert_same, at_call, checkpoints, finish, free_port, send
from torch.nn.parallel import DistributedDataParallel

TOKEN = "hf_this_must_not_be_written"


# ----------------------------------------------------------------------------------------------------------
# accelerate launch
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(script, teacher, shards, tmp_path_factory):
    """Return the folder of a run of two updates under `accelerate launch`."""
    out = tmp_path_factory.mktemp("launched") / "out"
    line = flags(
        teacher, shards, out, max_train_steps=2, validation_steps=1, report_to="tensorboard", hub_token=TOKEN,
        learning_rate=0.05,
    )  # fmt: skip
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", script.__file__]
    done = subprocess.run(
        [*command, *map(str, line)], capture_output=True, text=True, timeout=240, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_its_files(script, launched, teacher):
    rows = read_log(launched)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row.keys() == {"step", "loss", "lr", "grad_norm", "samples_per_second"}
        assert row["lr"] == 0.05 and all(value > 0 for value in row.values())
    args = json.loads((launched / "args.json").read_text())
    assert args["pretrained_teacher_model"] == str(teacher) and args["max_train_steps"] == 2
    versions = json.loads((launched / "versions.json").read_text())
    assert versions["torch"] == torch.__version__ and versions["script"] == script.SCRIPT_VERSION
    copy = (launched / os.path.basename(script.__file__)).read_text()
    assert copy.startswith("#!/usr/bin/env python") and copy.endswith("sys.exit(run(ARGS))\n")
    for name in ("unet/adapter_config.json", "unet/adapter_model.safetensors", script.WEIGHTS_NAME):
        assert (launched / "checkpoint-2" / name).is_file()
    assert script.read_manifest(launched / "checkpoint-2")[0]["global_step"] == 2
    for step in (1, 2):
        grid = Image.open(launched / "validation" / f"step-{step:07d}.png")
        assert grid.width == 4 * 32 and len(np.unique(np.asarray(grid))) > 50
    assert Image.open(launched / "image_0.png").size == (32, 32)
    assert "lcm-lora" in (launched / "README.md").read_text()
    events = [path.read_bytes() for path in (launched / "logs").rglob("events.out.tfevents*")]
    for tag in (b"train/loss", b"train/grad_norm", b"validation/4 steps"):
        assert any(tag in event for event in events)


def test_the_token_is_written_nowhere(launched):
    files = [path for path in launched.rglob("*") if path.is_file()]
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_the_lora_loads_into_a_fresh_pipeline_and_draws(script, launched, teacher):
    pipe = DiffusionPipeline.from_pretrained(teacher, safety_checker=None)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)

    def picture():
        drawn = pipe("sea", num_inference_steps=2, guidance_scale=1.0, height=32, width=32, output_type="np",
                     generator=torch.Generator().manual_seed(0))  # fmt: skip
        return drawn.images[0]

    without = picture()
    pipe.load_lora_weights(str(launched))
    assert np.isfinite(picture()).all() and np.abs(picture() - without).max() > 0.01
    pipe.unload_lora_weights()
    assert np.array_equal(picture(), without)
    with safe_open(launched / script.KOHYA_NAME, "pt") as kohya:
        names = list(kohya.keys())
    assert all(name.startswith("lora_unet_") for name in names)
    assert len(names) * 2 == 3 * len(load_file(launched / script.WEIGHTS_NAME))


# ----------------------------------------------------------------------------------------------------------
# Two processes
# ----------------------------------------------------------------------------------------------------------

OBSERVED = """
import sys
sys.path[:0] = [{tests!r}]
from conftest import load_script
from test_launch import observe

if __name__ == "__main__":
    script = load_script({script!r})
    observe({folder!r})(script)
    sys.exit(script.run(script.parse_args()))
"""


def observe(folder):
    """Return a hook that notes, in folder/<rank>.jsonl, what each process trains on and its weights."""

    def hook(script):
        loss_of, batch_of, batches = script.distillation_loss, script.next_batch, []

        def noting(*args, **kwargs):
            loss = loss_of(*args, **kwargs)
            given = inspect.signature(loss_of).bind(*args, **kwargs).arguments
            places = [
                {
                    name.replace(".base_layer", ""): value.data_ptr()
                    for name, value in model.state_dict().items()
                }
                for model in (given["teacher"], given["unet"])
            ]
            assert places[0].items() <= places[1].items() and len(places[0]) < len(places[1])
            lora = [value for value in given["unet"].parameters() if value.requires_grad]
            draws = given["draws"]
            row = {
                "data": batches[-1]["caption"], "eps": draws.eps.double().sum().item(),
                "w": draws.w.flatten().tolist(), "index": draws.index.tolist(), "loss": loss.item(),
                "weights": sum(value.detach().double().abs().sum().item() for value in lora),
            }  # fmt: skip
            with open(os.path.join(folder, os.environ.get("RANK", "0") + ".jsonl"), "a") as file:
                file.write(json.dumps(row) + "\n")
            return loss

        def keeping(*args):
            batches.append(batch_of(*args))
            return batches[-1]

        script.distillation_loss, script.next_batch = noting, keeping

    return hook


TWO = {"max_train_steps": 6, "gradient_accumulation_steps": 2, "random_flip": True}


@pytest.fixture(scope="module")
def two_processes(script, teacher, shards, tmp_path_factory):
    """Return the folder of an undisturbed run in two processes, with the notes of each."""
    folder = tmp_path_factory.mktemp("two")
    wrapper = folder / "observed.py"
    wrapper.write_text(
        OBSERVED.format(
            tests=str(ROOT / "tests"), script=os.path.basename(script.__file__), folder=str(folder)
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), str(wrapper)]
    line = flags(teacher, shards, folder / "out", **TWO)
    done = subprocess.run(
        [*command, *map(str, line)], capture_output=True, text=True, timeout=240, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_processes_differ_in_all_they_draw_and_agree_in_weights(two_processes):
    first, second = (
        [json.loads(line) for line in (two_processes / f"{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    )
    assert len(first) == len(second) == 12
    for name in ("data", "eps", "w", "index"):
        assert all(ours[name] != theirs[name] for ours, theirs in zip(first, second, strict=True)), name
        assert name == "data" or len({str(row[name]) for row in first + second}) == 24, f"{name} comes twice"
    for epoch in (slice(0, 6), slice(6, 12)):
        captions = [caption for row in first[epoch] + second[epoch] for caption in row["data"]]
        assert sorted(captions) == sorted(f"sea {i}" for i in range(24)), "each sample once an epoch"
    assert [row["weights"] for row in first] == [row["weights"] for row in second]
    assert len({row["weights"] for row in first}) == 6, "each update changes the weights"
    for row in read_log(two_processes / "out"):
        part = slice(2 * row["step"] - 2, 2 * row["step"])
        losses = [noted["loss"] for noted in first[part] + second[part]]
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5), "the mean over all processes"


def test_a_checkpoint_of_two_processes_knows_both(two_processes):
    manifest = json.loads((two_processes / "out" / "checkpoint-6" / "checkpoint.json").read_text())
    assert manifest["settings"]["number of processes"] == 2
    assert manifest["positions"] == {"0": [1, 12], "1": [1, 12]}, "24 samples each: two epochs of twelve"


def test_two_processes_killed_and_stopped_end_as_an_unbroken_run(
    script, teacher, shards, two_processes, tmp_path
):
    out = tmp_path / "out"
    line = flags(teacher, shards, out, **TWO)
    finish(script, line, tmp_path / "1", -9, processes=2, hook=at_call("draw", 6, send(signal.SIGKILL)))
    assert checkpoints(out) == {"checkpoint-2"}

    def stop_second(script):
        if os.environ["RANK"] == "1":  # the signal reaches one process; all have to stop at the same update
            at_call("draw", 5, send(signal.SIGTERM))(script)

    said = finish(script, line, tmp_path / "2", 3, processes=2, hook=stop_second)
    assert sum(text.startswith("stopped: ") for text in said) == 1
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4", "checkpoint-5"}
    said = finish(script, line, tmp_path / "3", processes=2)
    assert sum("checkpoint-5" in text for text in said) == 1
    assert_same(out, two_processes / "out")


@one_family
def test_ddp_goes_before_its_process_group(script, teacher, shards, tmp_path):
    """Else the run hangs now and then: the group's end waits for a thread that waits for the interpreter."""

    def look(_script):
        destroy = torch.distributed.destroy_process_group

        def looked(*args):
            found = any(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())
            os._exit(7) if found else destroy(*args)

        torch.distributed.destroy_process_group = looked

    line = flags(teacher, shards, tmp_path / "out", **TWO | {"max_train_steps": 1})
    finish(script, line, tmp_path / "said", processes=2, hook=look)


@one_family
def test_another_number_of_processes_is_refused(script, teacher, shards, two_processes, tmp_path):
    shutil.copytree(two_processes / "out", tmp_path / "out")
    said = finish(script, flags(teacher, shards, tmp_path / "out", **TWO), tmp_path / "said", 2)
    assert "number of processes was 2, is 1" in said[-1]


@one_family
@pytest.mark.parametrize("rank", [0, 1])
def test_what_only_one_process_meets_is_said(script, teacher, tmp_path, rank):
    """A shard that cannot be used falls to one of two processes; whichever it is has to say so."""
    folder = tmp_path / "shards"
    write_shard(folder / "0.tar", GOOD)
    write_shard(folder / "1.tar", [{"png": b"garbage", "txt": "sea"} for _ in range(8)])

    def has_no_sample(seed):
        args = script.parse_args(flags(teacher, folder, tmp_path / "out", seed=seed))
        return "error" in next(iter(script.ShardStream(script.list_shards([str(folder)]), args, 2, rank)))

    seed = next(filter(has_no_sample, range(99)))
    run = Run(script, flags(teacher, folder, tmp_path / "out", seed=seed), tmp_path / "said", processes=2)
    assert run.wait()[rank] == 2
    assert re.search("error: .*picture cannot be decoded: 8", run.said.read_text())


# ----------------------------------------------------------------------------------------------------------
# Kinds of teacher, precision and optimizer
# ----------------------------------------------------------------------------------------------------------


def test_a_v_prediction_teacher_trains(script, shards, tmp_path):
    build = BUILDERS[script.__name__]
    teacher = build(tmp_path / "teacher", "v_prediction", rescale_betas_zero_snr=True)
    finish(script, flags(teacher, shards, tmp_path / "out", max_train_steps=2), tmp_path / "said")
    assert len(read_log(tmp_path / "out")) == 2


@one_family
def test_other_arithmetic_trains_and_resumes(script, teacher, shards, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(teacher, wide)
    tiny_unet(block_out_channels=(8, 64)).save_pretrained(wide / "unet")
    changes = {"mixed_precision": "bf16", "use_8bit_adam": True, "use_4bit_base": True, "lora_rank": 64}
    unbroken, resumed = tmp_path / "unbroken", tmp_path / "resumed"
    for out in (unbroken, resumed):
        line = flags(wide, shards, out, **changes)
        # a process of its own: bf16 kernels do not outlive a fork
        done = launch(line, Path(script.__file__).name)
        assert done.returncode == 0, done.stderr[-2000:]
        if out == unbroken:  # and as it was after its second update
            shutil.copytree(unbroken, resumed)
            shutil.rmtree(resumed / "checkpoint-4")
            (resumed / "pytorch_lora_weights.safetensors").unlink()
    assert "resuming from" in done.stdout + done.stderr
    assert_same(resumed, unbroken)
    for folder in ("checkpoint-2", "checkpoint-4"):
        weights = load_file(resumed / folder / "unet" / "adapter_model.safetensors")
        assert {value.dtype for value in weights.values()} == {torch.float32}


@one_family
def test_gradient_checkpointing_changes_nothing(script, teacher, shards, tmp_path):
    for name, changes in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        line = flags(teacher, shards, tmp_path / name, max_train_steps=2, **changes)
        finish(script, line, tmp_path / "said")
    plain, checkpointed = (read_log(tmp_path / name) for name in ("plain", "checkpointed"))
    assert [row["loss"] for row in plain] == pytest.approx([row["loss"] for row in checkpointed], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------
# Input that cannot be used: exit code 2 and one line that names it
# ----------------------------------------------------------------------------------------------------------


GOOD = [{"png": picture_bytes(number), "txt": "sea"} for number in range(8)]


@pytest.fixture(scope="module")
def unusable(script, teacher, teachers, tmp_path_factory):
    """Return a folder with teachers and shards that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("unusable")
    (folder / "empty").mkdir()
    config = dict(UNet2DConditionModel.load_config(teacher / "unet"))
    shutil.copytree(teacher, folder / "inpainting")
    inpainting = UNet2DConditionModel.from_config(config | {"in_channels": 9})
    inpainting.save_pretrained(folder / "inpainting" / "unet")
    (other,) = (teachers[name] for name in teachers if name != script.__name__)
    (folder / "other-family").symlink_to(other)
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        name = part.partition("/")[0]
        shutil.copytree(teacher, folder / f"cut-{name}")
        weights = folder / f"cut-{name}" / f"{part}.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    shutil.copytree(teacher, folder / "cut-tokenizer")
    tokenizer = folder / "cut-tokenizer" / "tokenizer" / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes()[:-100])
    shutil.copytree(teacher, folder / "no-tokenizer")
    shutil.rmtree(folder / "no-tokenizer" / "tokenizer")  # transformers makes an empty one, without a word
    DiffusionPipeline.from_pretrained(
        teacher, scheduler=FlowMatchEulerDiscreteScheduler(), safety_checker=None
    ).save_pretrained(folder / "flow")
    write_shard(folder / "garbage.tar", [{"png": b"garbage", "txt": "sea"} for _ in range(8)])
    whole = write_shard(folder / "whole.tar", GOOD)
    (folder / "cut.tar").write_bytes(whole.read_bytes()[:5000])
    return folder


REAL = {  # flag and value to change, what the last line has to name
    "empty teacher folder": ("pretrained_teacher_model", "{}/empty", r"--pretrained_teacher_model {}/empty"),
    "garbage shard": ("train_shards_path_or_url", "{}/garbage.tar", "picture cannot be decoded: 8"),
    "truncated shard": ("train_shards_path_or_url", "{}/cut.tar", "shard {}/cut.tar: is truncated"),
}
FORKED = {
    "inpainting teacher": ("pretrained_teacher_model", "{}/inpainting", "inpainting"),
    "other family": ("pretrained_teacher_model", "{}/other-family", "use train_lcm_lora_"),
    "truncated UNet": ("pretrained_teacher_model", "{}/cut-unet", "{}/cut-unet"),
    "truncated text encoder": ("pretrained_teacher_model", "{}/cut-text_encoder", "{}/cut-text_encoder"),
    "truncated VAE": ("pretrained_teacher_model", "{}/cut-vae", "{}/cut-vae"),
    "missing tokenizer": ("pretrained_teacher_model", "{}/no-tokenizer", "tokenizer"),
    "flow matching": ("pretrained_teacher_model", "{}/flow", "FlowMatchEulerDiscreteScheduler"),
    "truncated tokenizer": ("pretrained_teacher_model", "{}/cut-tokenizer", "{}/cut-tokenizer"),
    "output in a file": ("output_dir", "{}/whole.tar/out", "--output_dir {}/whole.tar/out"),
    "LoRA targets": ("lora_target_modules", "to_q,to_nowhere", "'to_nowhere'"),
    "no teacher": (
        "pretrained_teacher_model",
        "no-such/model",
        "no-such/model cannot be loaded (no such path",
    ),
    "solver steps": ("num_ddim_timesteps", 1001, "--num_ddim_timesteps 1001"),
}


def line_of(case, teacher, shards, unusable, out):
    """Return a command line with one flag changed, and what has to be named."""
    flag, value, named = case
    value, named = (str(text).replace("{}", str(unusable)) for text in (value, named))
    line = flags(teacher, shards, out, num_ddim_timesteps=50, lora_target_modules="to_q")
    line = [str(part) for part in line]
    line[line.index(f"--{flag}") + 1] = value
    return line, named


@pytest.fixture(scope="module")
def refused(script, teacher, shards, unusable, tmp_path_factory):
    """Return (exit code, seconds of CPU time, what it said, what it has to name) of each real process."""
    folder = tmp_path_factory.mktemp("refused")
    started = {}
    for number, (name, case) in enumerate(REAL.items()):
        line, named = line_of(case, teacher, shards, unusable, folder / "out")
        said = folder / str(number)
        with said.open("w") as file:
            command = [sys.executable, script.__file__, *line]
            started[name] = subprocess.Popen(command, stderr=file, env=ENVIRONMENT), said, named
    ended = {}
    for name, (process, said, named) in started.items():
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        ended[name] = process.returncode, usage.ru_utime + usage.ru_stime, said.read_text(), named
    return ended


@one_family
@pytest.mark.parametrize("name", REAL)
def test_unusable_input_ends_a_real_process_with_one_line(refused, name):
    code, seconds, said, named = refused[name]
    assert code == 2 and seconds < 30 and "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("error: ") and named in last


@pytest.mark.parametrize("name", FORKED)
def test_unusable_input_is_named(script, teacher, shards, unusable, tmp_path, name):
    line, named = line_of(FORKED[name], teacher, shards, unusable, tmp_path / "out")
    said = finish(script, line, tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and named in said[-1]
    assert not any("Traceback" in text for text in said)
