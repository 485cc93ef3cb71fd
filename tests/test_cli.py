"""The command line: what is accepted, what is refused, and that every flag acts."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from conftest import ENVIRONMENT, flags

POINTLESS = {"cast_teacher_unet"}  # accepted for diffusers' launch lines; its help says that it is not needed
KNOWN_FLAGS = """
pretrained_teacher_model pretrained_vae_model_name_or_path teacher_revision variant output_dir cache_dir
seed logging_dir report_to checkpointing_steps checkpoints_total_limit resume_from_checkpoint
train_shards_path_or_url resolution interpolation_type use_fix_crop_and_size center_crop random_flip
dataloader_num_workers train_batch_size num_train_epochs max_train_steps max_train_samples learning_rate
scale_lr lr_scheduler lr_warmup_steps gradient_accumulation_steps use_8bit_adam adam_beta1 adam_beta2
adam_weight_decay adam_epsilon max_grad_norm proportion_empty_prompts w_min w_max num_ddim_timesteps
loss_type huber_c lora_rank lora_alpha lora_dropout lora_target_modules vae_encode_batch_size
timestep_scaling_factor mixed_precision allow_tf32 enable_xformers_memory_efficient_attention
gradient_checkpointing validation_steps push_to_hub hub_token hub_model_id tracker_project_name
cast_teacher_unet
""".split()
DIFFUSERS_README = """
--pretrained_teacher_model=runwayml/stable-diffusion-v1-5 --output_dir=outputs --mixed_precision=fp16
--resolution=512 --lora_rank=64 --learning_rate=1e-4 --loss_type="huber" --adam_weight_decay=0.0
--max_train_steps=1000 --max_train_samples=4000000 --dataloader_num_workers=8
--train_shards_path_or_url="pipe:curl -L -s https://huggingface.co/datasets/laion/conceptual-captions-12m-webdataset/resolve/main/data/{00000..01099}.tar?download=true"
--validation_steps=200 --checkpointing_steps=200 --checkpoints_total_limit=10 --train_batch_size=12
--gradient_checkpointing --enable_xformers_memory_efficient_attention --gradient_accumulation_steps=1
--use_8bit_adam --resume_from_checkpoint=latest --report_to=wandb --seed=453645634 --push_to_hub
"""
ONLY_XL = "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --use_fix_crop_and_size"
RECIPES = {"train_lcm_lora_sd15": (512, 5), "train_lcm_lora_sdxl": (1024, 3)}  # resolution, least w


def parse(script, **changes):
    """Return the flags of a small run, changed."""
    return script.parse_args(flags("owner/name", "pipe:cat 0.tar", "unused", **changes))


def actions(script):
    return {action.dest: action for action in script.build_parser()._actions if action.dest != "help"}


def test_every_flag_has_help_and_a_group(script):
    groups = script.build_parser()._action_groups
    named = {action.dest for group in groups[2:] for action in group._group_actions}
    assert named == set(actions(script)) and len(groups) == 9
    for name, action in actions(script).items():
        assert action.help, name
        assert action.option_strings == [f"--{name}"]


def test_the_flags_that_users_know_are_there(script):
    assert set(KNOWN_FLAGS) <= set(actions(script))


def test_every_flag_is_read(script):
    source = Path(script.__file__).read_text()
    body = source.partition("# <<< shared: arguments")[2]
    read = set(re.findall(r"\bargs\.(\w+)", body))
    unread = set(actions(script)) - read
    assert unread == POINTLESS
    for name in unread:
        assert "accepted and not needed" in actions(script)[name].help


def test_the_launch_line_of_diffusers_readme_parses(script):
    script.parse_args(shlex.split(DIFFUSERS_README + ONLY_XL))
    args = script.parse_args(shlex.split(DIFFUSERS_README))
    assert args.train_shards_path_or_url[0].startswith("pipe:curl -L -s https://")
    assert (args.lora_rank, args.lora_alpha, args.train_batch_size) == (64, 64.0, 12)
    assert args.use_8bit_adam and args.push_to_hub and args.report_to == "wandb"


def test_defaults_are_the_released_recipe(script):
    args = parse(script, lora_rank=None, lora_alpha=None, learning_rate=None, train_batch_size=None)
    assert (args.lora_rank, args.lora_alpha, args.learning_rate) == (64, 64, 1e-4)
    assert (args.w_max, args.num_ddim_timesteps, args.loss_type, args.huber_c) == (15, 50, "huber", 0.001)
    assert args.loss_space == "sample"
    assert (args.timestep_scaling_factor, args.adam_weight_decay, args.proportion_empty_prompts) == (10, 0, 0)
    assert parse(script, lora_rank=8, lora_alpha=None).lora_alpha == 8
    args = parse(script, resolution=None)
    assert (args.resolution, args.w_min) == RECIPES[script.__name__]


COUNTS = """
lora_rank num_ddim_timesteps resolution train_batch_size gradient_accumulation_steps max_train_steps
num_train_epochs max_train_samples checkpointing_steps checkpoints_total_limit logging_steps
vae_encode_batch_size shuffle_buffer_samples max_image_pixels
""".split()
FROM_ZERO = "dataloader_num_workers lr_warmup_steps seed validation_steps min_image_side_px".split()
POSITIVE = "lora_alpha learning_rate adam_epsilon max_grad_norm huber_c timestep_scaling_factor".split()
SHARES = "lora_dropout adam_beta1 adam_beta2 proportion_empty_prompts max_watermark max_unsafe".split()
WRONG = [
    *((name, value) for name in COUNTS for value in (0, -1, 1.5, "nan")),
    *((name, value) for name in FROM_ZERO for value in (-1, 0.5, "inf")),
    *((name, value) for name in POSITIVE for value in (0, -0.1, "nan", "inf", "much")),
    *((name, value) for name in SHARES for value in (-0.1, 1.1, "nan", "inf")),
    *((name, 1) for name in ("lora_dropout", "adam_beta1", "adam_beta2")),
    *((name, value) for name in ("w_min", "adam_weight_decay") for value in (-1, "nan", "inf")),
    ("resolution", 60),
    *(("w_max", value) for value in (2.9, "nan", "inf")),
    *(("min_aesthetic", value) for value in ("nan", "-inf")),
    *(
        (name, "x")
        for name in "loss_type loss_space lr_scheduler report_to mixed_precision interpolation_type".split()
    ),
    ("lora_target_modules", " , "),
    ("seed", 2**63),
    ("pretrained_teacher_model", None),
    ("pretrained_teacher_model", "/nowhere/teacher"),
    ("pretrained_teacher_model", "./nowhere"),
    ("pretrained_teacher_model", "nowhere.safetensors"),
    ("pretrained_vae_model_name_or_path", "/nowhere/vae"),
    ("teacher_config", "/nowhere/config"),
    ("train_shards_path_or_url", None),
    ("train_shards_path_or_url", "/nowhere/0.tar"),
    ("train_shards_path_or_url", ["pipe:cat 0.tar", "/nowhere/1.tar"]),
    ("resume_from_checkpoint", "/nowhere/checkpoint-2"),
    ("output_dir", __file__),
    ("max_train_steps", None),
    ("unknown_flag", 1),
    ("lora_ran", 4),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_flags_end_in_one_line_that_names_them(script, capsys, name, value):
    required = {"pretrained_teacher_model": "owner/name", "train_shards_path_or_url": "pipe:cat 0.tar"}
    values = required | {"max_train_steps": 1} | {name: value}
    line = []
    for flag, given in values.items():  # with "=", as argparse takes "-inf" alone for a flag
        if given is not None:
            line += [f"--{flag}", *given] if isinstance(given, list) else [f"--{flag}={given}"]
    with pytest.raises(SystemExit) as error:
        script.parse_args(line)
    printed = capsys.readouterr()
    assert error.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and f"--{name}" in printed.err
    assert value is None or isinstance(value, (bool, list)) or f"{value}" in printed.err


def test_every_numeric_flag_is_in_the_table_of_wrong_values(script):
    numeric = {name for name, action in actions(script).items() if action.type in (int, float)}
    assert numeric <= {name for name, _ in WRONG}


@pytest.mark.parametrize(
    "changes",
    [
        {"w_min": 7.5, "w_max": 7.5},
        {"lora_dropout": 0, "proportion_empty_prompts": 1, "max_watermark": 0, "min_aesthetic": -1},
        {"max_train_steps": None, "max_train_samples": 10},
        {"train_shards_path_or_url": ["pipe:cat 0.tar", "https://host/{0..9}.tar", "s3://x/0.tar"]},
        {"resume_from_checkpoint": "none", "lr_warmup_steps": 0, "adam_weight_decay": 0, "seed": 2**63 - 1},
    ],
)
def test_values_at_the_edge_are_accepted(script, changes):
    args = parse(script, **changes)
    for name, value in changes.items():
        assert getattr(args, name) == value


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("--lora_rank=0", 2)])
def test_help_and_errors_answer_before_the_slow_imports(script, argument, code):
    line = flags("owner/name", "pipe:cat 0.tar", "unused") + [argument]
    command = [sys.executable, "-X", "importtime", script.__file__, *line]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    imported = set(re.findall(r"^import time:.*\| +(\w+)", done.stderr, re.MULTILINE))
    assert done.returncode == code and "argparse" in imported
    assert not imported & {"torch", "numpy", "diffusers", "accelerate", "webdataset", "PIL"}
    if code == 0:
        assert all(f"--{name}" in done.stdout for name in actions(script))


def test_the_token_leaves_the_command_line(script, monkeypatch):
    line = flags("owner/name", "pipe:cat 0.tar", "unused")
    for token in (["--hub_token", "hf_secret"], ["--hub_token=hf_secret"]):
        monkeypatch.setattr(sys, "argv", ["script.py", *line, *token])
        assert script.parse_args().hub_token == "hf_secret"
        assert "hf_secret" not in " ".join(sys.argv) and "--lora_rank" in sys.argv


def test_fewer_solver_steps_than_are_drawn_are_refused(script, capsys):
    with pytest.raises(SystemExit):
        parse(script, num_ddim_timesteps=max(script.VALIDATION_STEPS) - 1)
    assert "--num_ddim_timesteps" in capsys.readouterr().err


# Settings of a resumed run

PROCESS = SimpleNamespace(num_processes=1, mixed_precision="no")


def compare(script, first, second, process=PROCESS):
    manifest = {"settings": script.settings_of(first, PROCESS)}
    script.check_same_settings(manifest, second, process)


def test_free_flags_are_flags(script):
    assert set(actions(script)) >= script.FREE_FLAGS


def test_each_changed_setting_is_named(script):
    for name in set(actions(script)) - {"mixed_precision"}:
        changed = parse(script)
        several = isinstance(getattr(changed, name), list)
        setattr(changed, name, ["something else"] if several else "something else")
        if name in script.FREE_FLAGS:
            compare(script, parse(script), changed)
        else:
            with pytest.raises(script.UnusableInput, match=rf"{name} was .*, is \[?'something else'"):
                compare(script, parse(script), changed)


def test_all_changed_settings_are_named_at_once(script):
    with pytest.raises(script.UnusableInput, match="lora_rank was 4, is 8; w_min was 5.0, is 3.0"):
        compare(script, parse(script, w_min=5.0), parse(script, lora_rank=8, w_min=3.0))


def test_number_of_processes_and_precision_are_compared(script):
    for process, message in (
        (SimpleNamespace(num_processes=2, mixed_precision="no"), "number of processes was 1, is 2"),
        (SimpleNamespace(num_processes=1, mixed_precision="bf16"), "mixed_precision was 'no', is 'bf16'"),
    ):
        with pytest.raises(script.UnusableInput, match=message):
            compare(script, parse(script), parse(script), process)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_length_matters_where_it_shapes_the_learning_rate(script, name):
    lines = [parse(script, lr_scheduler=name, max_train_steps=steps) for steps in (4, 8)]
    with pytest.raises(script.UnusableInput, match="max_train_steps was 4, is 8"):
        compare(script, *lines)


# Optimizer


def rates(script, num_updates, num_processes=1, **changes):
    """Return the learning rate of each update."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    optimizer, schedule = script.make_optimizer(parameters, parse(script, **changes), num_processes)
    found = []
    for _ in range(num_updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup"])
def test_constant_rate_honours_warmup(script, name):
    found = rates(script, 7, lr_scheduler=name, lr_warmup_steps=4, learning_rate=0.4)
    assert found == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_constant_rate_is_constant(script):
    assert rates(script, 3, learning_rate=0.4) == [0.4] * 3


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_other_rates_end_at_the_last_update(script, name):
    line = {"lr_scheduler": name, "max_train_steps": 100, "lr_warmup_steps": 10, "learning_rate": 0.4}
    for num_processes, accumulation in ((1, 1), (4, 3)):
        found = rates(script, 101, num_processes, gradient_accumulation_steps=accumulation, **line)
        assert found[5] == pytest.approx(0.2) and max(found) == found[10] == pytest.approx(0.4)
        assert 0.1 < found[55] < 0.3 and found[100] < 1e-6 < found[99]


def test_scale_lr_multiplies_by_the_samples_of_an_update(script):
    line = {"train_batch_size": 3, "gradient_accumulation_steps": 2, "learning_rate": 1e-4}
    assert rates(script, 1, num_processes=4, **line) == [1e-4]
    assert rates(script, 1, num_processes=4, scale_lr=True, **line) == pytest.approx([24e-4])


@pytest.mark.parametrize("use_8bit_adam", [True, None])
def test_optimizer_takes_the_adam_flags(script, use_8bit_adam):
    args = parse(
        script, use_8bit_adam=use_8bit_adam, adam_beta1=0.8, adam_beta2=0.9, adam_weight_decay=0.1,
        adam_epsilon=1e-6,
    )  # fmt: skip
    optimizer, _ = script.make_optimizer([torch.nn.Parameter(torch.zeros(1))], args, 1)
    assert type(optimizer) is (bitsandbytes.optim.AdamW8bit if use_8bit_adam else torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.1, 1e-6)
