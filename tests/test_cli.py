"""The command line: what is accepted, what is refused, and that every flag acts."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim import optimizer as bnb_optimizer
from conftest import ENVIRONMENT, ROOT, SCRIPTS, Windows, cases, flags, load_script

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
NOTHING = dict.fromkeys(("train_batch_size", "mixed_precision", "lora_rank", "lora_alpha"))
both_families = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="module")
def script():
    """The SD 1.5 script: but for defaults the command line is shared."""
    return load_script(SCRIPTS[0])


def parse(script, **changes):
    """Return the flags of a small run, changed."""
    return script.parse_args(flags("owner/name", "pipe:cat 0.tar", "unused", **changes))


def actions(script):
    return {action.dest: action for action in script.build_parser()._actions if action.dest != "help"}


@both_families
def test_every_flag_has_help_and_a_group_and_users_know_its_name(name):
    script = load_script(name)
    groups = script.build_parser()._action_groups
    named = {action.dest for group in groups[2:] for action in group._group_actions}
    assert named == set(actions(script)) >= set(KNOWN_FLAGS) | script.FREE_FLAGS
    for name, action in actions(script).items():
        assert action.help and f"--{name}" in action.option_strings, name


@both_families
def test_every_flag_is_read_or_is_said_to_have_no_effect(name):
    script = load_script(name)
    body = Path(script.__file__).read_text().partition("# <<< shared: arguments")[2]
    unread = set(actions(script)) - set(re.findall(r"\bargs\.(\w+)", body))
    assert unread <= set(script.FLAGS_WITHOUT_EFFECT) | {"use_fix_crop_and_size"}
    assert ("use_fix_crop_and_size" in script.FLAGS_WITHOUT_EFFECT) == (name == SCRIPTS[0])
    for flag in set(script.FLAGS_WITHOUT_EFFECT) - {"use_fix_crop_and_size"}:
        assert "without effect" in actions(script)[flag].help


@both_families
def test_the_launch_line_of_diffusers_readme_parses(name):
    script = load_script(name)
    script.parse_args(shlex.split(DIFFUSERS_README + ONLY_XL))
    args = script.parse_args(shlex.split(DIFFUSERS_README))
    assert args.train_shards_path_or_url[0].startswith("pipe:curl -L -s https://")
    assert (args.lora_rank, args.lora_alpha, args.train_batch_size) == (64, 64.0, 12)
    assert args.use_8bit_adam and args.push_to_hub and args.report_to == "wandb"


@both_families
def test_defaults_are_the_released_recipe(name):
    script = load_script(name)
    args = parse(script, lora_rank=None, lora_alpha=None, learning_rate=None, train_batch_size=None)
    assert (args.lora_rank, args.lora_alpha, args.learning_rate) == (64, 64, 1e-4)
    assert (args.w_max, args.num_ddim_timesteps, args.loss_type, args.huber_c) == (15, 50, "huber", 0.001)
    assert args.loss_space == "sample" and not args.hub_public_repo
    assert (args.timestep_scaling_factor, args.adam_weight_decay, args.proportion_empty_prompts) == (10, 0, 0)
    assert parse(script, lora_rank=8, lora_alpha=None).lora_alpha == 8
    args = parse(script, resolution=None)
    assert (args.resolution, args.w_min) == RECIPES[script.__name__]


# Wrong values

COUNTS = """
lora_rank num_ddim_timesteps resolution train_batch_size gradient_accumulation_steps max_train_steps
num_train_epochs max_train_samples checkpointing_steps checkpoints_total_limit logging_steps
vae_encode_batch_size shuffle_buffer_samples max_image_pixels student_steps fake_updates
""".split()
FROM_ZERO = "dataloader_num_workers fake_warmup_steps lr_warmup_steps seed min_image_side_px".split()
POSITIVE = (
    "lora_alpha learning_rate fake_learning_rate adam_epsilon max_grad_norm huber_c timestep_scaling_factor".split()
)
SHARES = "lora_dropout adam_beta1 adam_beta2 proportion_empty_prompts max_watermark max_unsafe student_eta".split()
CHOICES = """
objective loss_type loss_space lr_scheduler report_to mixed_precision interpolation_type prediction_type
""".split()
WRONG = {
    "counts": [(name, value) for name in COUNTS for value in (0, -1, 1.5, "nan")],
    "from zero": [(name, value) for name in FROM_ZERO for value in (-1, 0.5, "inf")],
    "positive": [(name, value) for name in POSITIVE for value in (0, -0.1, "nan", "inf", "much")],
    "shares": [(name, value) for name in SHARES for value in (-0.1, 1.1, "nan", "inf")],
    "below one": [(name, 1) for name in ("lora_dropout", "adam_beta1", "adam_beta2")],
    "not negative": [(name, v) for name in ("w_min", "adam_weight_decay") for v in (-1, "nan", "inf")],
    "choices": [(name, "x") for name in CHOICES],
    "w_max": [("w_max", value) for value in (2.9, "nan", "inf")],
    "aesthetic": [("min_aesthetic", value) for value in ("nan", "-inf")],
    "others": [
        ("resolution", 60), ("validation_steps", -2), ("validation_steps", 0.5), ("seed", 2**63),
        ("lora_target_modules", " , "), ("num_ddim_timesteps", 7), ("phases", "x"), ("phases", 3), ("phases", 4),
    ],
    "paths": [
        ("pretrained_teacher_model", "/nowhere/teacher"), ("pretrained_teacher_model", "./nowhere"),
        ("pretrained_teacher_model", "nowhere.safetensors"), ("teacher_config", "/nowhere/config"),
        ("pretrained_vae_model_name_or_path", "/nowhere/vae"), ("output_dir", __file__),
        ("pretrained_vae_model_name_or_path", __file__),
        ("resume_from_checkpoint", "/nowhere/checkpoint-2"), ("output_dir", f"{__file__}/below"),
        ("pretrained_teacher_model", r"C:\nowhere\teacher"), ("init_lora", "./nowhere"),
    ],
    "empty": [
        (name, value) for name in "init_lora output_dir train_shards_path_or_url hub_token variant".split()
        for value in ("", " ")
    ],
    "float16": [("lora_alpha", value) for value in (1e-4, 65505)],
    "missing": [(name, None) for name in "pretrained_teacher_model train_shards_path_or_url max_train_steps".split()],
    "unknown": [("unknown_flag", 1), ("lora_ran", 4), ("validation_prompts", "m\udce4r")],
}  # fmt: skip


def refusal(script, capsys, line):
    """Return the one line that a wrong command line ends with."""
    with pytest.raises(SystemExit) as error:
        script.parse_args(line)
    printed = capsys.readouterr()
    assert error.value.code == 2 and not printed.out and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    return printed.err


@cases("kind", WRONG)
def test_wrong_flags_end_in_one_line_that_names_them(script, capsys, kind):
    required = {"pretrained_teacher_model": "owner/name", "train_shards_path_or_url": "pipe:cat 0.tar"}
    for name, value in WRONG[kind]:
        given = required | {"max_train_steps": 1} | {name: value}
        # with "=", because argparse takes "-inf" alone for a flag
        line = [f"--{flag}={value}" for flag, value in given.items() if value is not None]
        said = refusal(script, capsys, line)
        assert f"--{name}" in said and (value is None or f"{value}" in said or kind == "unknown"), said


def test_every_flag_with_a_rule_is_in_the_table_of_wrong_values(script):
    ruled = {name for name, action in actions(script).items() if action.type or action.choices}
    assert ruled <= {name for group in WRONG.values() for name, _ in group}


@cases(
    ("word", "meant"),
    [
        ("--network_dim", "--lora_rank"), ("--network_alpha=8", "--lora_alpha"), ("--rank", "--lora_rank"),
        ("--validation_prompt", "--validation_prompts"), ("--lora_rnak", "--lora_rank"),
        ("--max_train_epochs", "--num_train_epochs"), ("--instance_data_dir", "--train_data_dir"),
        ("--pretrained_model_name_or_path", "--pretrained_teacher_model"), ("--unet_lr", "--learning_rate"),
        ("--cache_latents", "scripts/cache_latents.py"), ("--save_steps", "--checkpointing_steps"),
        ("--network-dim", "--lora_rank"),
    ],
)  # fmt: skip
def test_a_foreign_or_mistyped_flag_is_answered_with_the_flag_that_is_meant(script, capsys, word, meant):
    said = refusal(script, capsys, [*flags("owner/name", "pipe:cat 0.tar", "unused"), word, "4"])
    assert f"did you mean {meant}?" in said and word.partition("=")[0] in said
    said = refusal(script, capsys, [*flags("owner/name", "pipe:cat 0.tar", "unused"), "--keep_tokens", "1", word, "4"])
    assert "--keep_tokens: no such flag; " in said and f"did you mean {meant}?" in said, "all of them at once"
    said = refusal(script, capsys, [*flags("owner/name", "pipe:cat 0.tar", "unused"), "--center_crop", "true"])
    assert "true: a value too many; a switch takes none" in said


def test_tools_say_at_once_that_libraries_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    (tmp_path / "lora.safetensors").touch()
    teacher = ["--pretrained_teacher_model", ROOT / "assets" / "demo-teacher-sd15", "--output_dir", tmp_path / "out"]
    files = ["--input", tmp_path / "lora.safetensors", "--output", tmp_path / "a.safetensors"]
    for tool, *words in (
        ("sample", *teacher, "--prompts", "sea"),
        ("evaluate", *teacher, "--prompts", "sea"),
        ("export_lora", *files, "--format", "kohya"),
        ("cache_latents", *teacher),
        ("estimate_memory", "--model", "sd15"),
        ("make_shards", "--source", tmp_path, *teacher[2:]),
    ):
        line = [sys.executable, ROOT / "scripts" / f"{tool}.py", *words]
        env = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, env=env)
        assert (done.returncode, done.stderr) == (7, "loading libraries\n"), tool


def test_every_answer_names_a_flag_that_exists(script):
    known = {option for action in actions(script).values() for option in action.option_strings}
    known |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob("scripts/*.py")}
    assert set(script.FOREIGN_FLAGS.values()) <= known and not set(script.FOREIGN_FLAGS) & set(actions(script))


@pytest.mark.parametrize("flag", ["dataset_name", "dataset_config_name", "image_column", "caption_column"])
def test_a_data_set_of_the_hub_is_answered_with_the_line_that_makes_shards(script, capsys, flag):
    said = refusal(script, capsys, ["--pretrained_teacher_model", "owner/name", f"--{flag}", "owner/data"])
    assert "scripts/make_shards.py --dataset_name" in said and "--train_shards_path_or_url" in said


@cases(
    "changes",
    [
        {"w_min": 7.5, "w_max": 7.5},
        {"lora_dropout": 0, "proportion_empty_prompts": 1, "max_watermark": 0, "min_aesthetic": -1},
        {"max_train_steps": None, "max_train_samples": 10},
        {"train_shards_path_or_url": ["pipe:cat 0.tar", "https://host/{0..9}.tar"]},
        {"resume_from_checkpoint": "none", "lr_warmup_steps": 0, "adam_weight_decay": 0, "seed": 2**63 - 1},
        {"validation_steps": -1, "report_to": "all", "validation_prompts": [""], "lora_alpha": 65504},
    ],
)
def test_values_at_the_edge_are_accepted(script, changes):
    args = parse(script, **changes)
    for name, value in changes.items():
        assert getattr(args, name) == value


def test_train_data_dir_is_train_shards_path_or_url(script):
    args = script.parse_args(["--pretrained_teacher_model=o/n", "--train_data_dir", "a", "b", "--max_train_steps=1"])
    assert args.train_shards_path_or_url == ["a", "b"]


# Files of flags


def test_flags_come_from_files_too(script, tmp_path, monkeypatch):
    """Several words a line, comments, quotes; what comes later wins."""
    (tmp_path / "card.txt").write_text(
        "\ufeff# for 12 GB\n\n--mixed_precision fp16 --train_batch_size 4  # samples\n--gradient_checkpointing\n"
        '--validation_prompts "sea at dawn" \'a # in a prompt\' C#7 "don\'t"  # don\'t cut "C#7"\n--cache_dir ~/hub'
        "\n--variant 'it'\\''s # 1'\u2028\\ #2 # '\n#--tracker_project_name x\n--hub_model_id me/a\\ #b # it's"
    )
    line = flags("owner/name", "pipe:cat 0.tar", "unused", train_batch_size=None, mixed_precision=None)
    args = script.parse_args([f"@{tmp_path / 'card.txt'}", *line, "--train_batch_size", "8"])
    assert (args.mixed_precision, args.train_batch_size, args.gradient_checkpointing) == ("fp16", 8, True)
    args = script.parse_args([*line, f"@{tmp_path / 'card.txt'}"])
    assert args.validation_prompts == ["sea at dawn", "a # in a prompt", "C#7", "don't"]
    assert args.train_batch_size == 4 and args.cache_dir == str(Path.home() / "hub")
    assert args.variant == "it's # 1\u2028 #2" and args.hub_model_id == "me/a #b"
    (tmp_path / "paths.txt").write_text("--cache_dir C:\\models\\new  # of Windows\n--output_dir 'C:\\my runs\\a'\n")
    monkeypatch.setattr(script, "os", Windows())
    args = script.parse_args([*line, f"@{tmp_path / 'paths.txt'}"])
    assert (args.cache_dir, args.output_dir) == (r"C:\models\new", r"C:\my runs\a")


def test_a_file_of_flags_that_cannot_be_read_is_named(script, tmp_path, capsys):
    (tmp_path / "open.txt").write_text("--validation_prompts it's\n--output_dir bob's\n")  # each line for itself
    (tmp_path / "latin").write_bytes("--validation_prompts m\xe4r\n".encode("latin-1"))
    (tmp_path / "outer").write_text(f"@{tmp_path / 'latin'}")
    for name in ("nowhere.txt", "open.txt", "latin", "outer"):
        assert name.replace("outer", "latin") in refusal(script, capsys, [f"@{tmp_path / name}"])


RECIPE_FILES = sorted((ROOT / "scripts" / "launch" / "recipes").glob("*.txt"))


def test_every_recipe_parses_with_its_script():
    for path in RECIPE_FILES:
        script = load_script(SCRIPTS["sdxl" in path.name])
        line = flags("owner/name", "pipe:cat 0.tar", "unused", mixed_precision=None)
        assert script.parse_args([f"@{path}", *line]).mixed_precision in ("fp16", "bf16"), path


# Documented commands


def documented_commands():
    """Yield (file, words after the script, script) of each command in README's and docs' bash blocks."""
    pages = [ROOT / "README.md", ROOT / "scripts" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in (page for page in pages if page.exists()):
        for block in re.findall(r"^ *```(?:bash|sh)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
            for command in block.replace("\\\n", " ").splitlines():
                words = shlex.split(command, comments=True)
                ends = [n for n, word in enumerate(words) if word in ("|", ">", "&&", ";")]
                words = words[: ends[0] if ends else None]
                places = [n for n, word in enumerate(words) if re.search(r"(^|/)[\w.]+\.py$", word)]
                if places and (ROOT / words[places[0]]).parent in (ROOT, ROOT / "scripts"):
                    yield page.name, words[places[0] + 1 :], words[places[0]]


def test_every_documented_command_parses_with_its_own_parser(monkeypatch, tmp_path):
    """The models and data in it need not exist."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "prompts.txt").write_text("sea\n")
    monkeypatch.chdir(tmp_path)
    parse_known_args, parsed = argparse.ArgumentParser.parse_known_args, []

    def noted(parser, *given, **named):
        result = parse_known_args(parser, *given, **named)
        parsed.append(result[1])
        return result

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", noted)
    count, faults = 0, []
    for page, words, name in documented_commands():
        parsed.clear()
        count += 1
        if not (ROOT / name).exists():
            faults.append(f"{page}: {name} does not exist")
            continue
        if words[-1:] == ["..."] and not words[-2].startswith("--"):
            words.pop()
        try:
            result = load_script(name).parse_args(words)
            rest = result[1] if isinstance(result, tuple) else getattr(result, "rest", None)
            if rest is not None:  # tools of training steps pass on what the training script reads
                required = flags("owner/name", "pipe:cat 0.tar", "unused", **NOTHING)
                load_script(SCRIPTS["sdxl" in " ".join(words)]).parse_args([*required, *rest])
        except SystemExit:
            pass  # for a path that does not exist
        if not parsed or parsed[-1]:
            faults.append(f"{page}: {name} {shlex.join(words)}")
    assert not faults, "\n".join(faults)
    assert count >= 10


# The start


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


# Settings of a resumed run

ONE = SimpleNamespace(num_processes=1, mixed_precision="no")


def compare(script, first, second, process=ONE, shards=(1, 1), workers=(0, 0)):
    """Resume the run of the first flags with the second."""
    old = script.settings_of(first, ONE, first.max_train_steps, ["pipe:"] * shards[0], workers[0])
    new = script.settings_of(second, process, second.max_train_steps, ["pipe:"] * shards[1], workers[1])
    script.check_resume(Path("checkpoint-2"), {"settings": old, "global_step": 2}, new, second.max_train_steps)


def test_each_changed_setting_is_named(script):
    assert not script.FREE_FLAGS & set(
        "pretrained_teacher_model train_shards_path_or_url lora_rank lora_alpha lora_target_modules seed w_min w_max "
        "learning_rate loss_type resolution train_batch_size gradient_accumulation_steps".split()
    )
    for name in set(actions(script)) - {"mixed_precision", "dataloader_num_workers"}:
        changed = parse(script)
        is_list = isinstance(getattr(changed, name), list)
        setattr(changed, name, 7 if name == "max_train_steps" else ["something"] if is_list else "something")
        if name in script.FREE_FLAGS or name in script.FLAGS_WITHOUT_EFFECT:
            compare(script, parse(script), changed)
        else:
            with pytest.raises(script.UnusableInput, match=rf"{name} was .*, is \[?'something'"):
                compare(script, parse(script), changed)


def test_all_changed_settings_are_named_at_once(script):
    with pytest.raises(script.UnusableInput, match="lora_rank was 4, is 8; w_min was 5.0, is 3.0") as error:
        compare(script, parse(script, w_min=5.0), parse(script, lora_rank=8, w_min=3.0))
    assert str(error.value).startswith("checkpoint-2 ")


def test_processes_precision_workers_and_shards_are_compared(script):
    for changes, message in (
        ({"process": SimpleNamespace(num_processes=2, mixed_precision="no")}, "number of processes was 1, is 2"),
        ({"process": SimpleNamespace(num_processes=1, mixed_precision="bf16")}, "mixed_precision was 'no', is 'bf16'"),
        ({"shards": (1, 2)}, "number of shards was 1, is 2"),
        ({"workers": (0, 2)}, "workers was 1, is 2"),
    ):
        with pytest.raises(script.UnusableInput, match=message):
            compare(script, parse(script), parse(script), **changes)
    compare(script, parse(script), parse(script), workers=(0, 1))  # the order of samples is the same


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial"])
def test_length_matters_where_it_shapes_the_learning_rate(script, name):
    lines = [parse(script, lr_scheduler=name, max_train_steps=steps) for steps in (4, 8)]
    with pytest.raises(script.UnusableInput, match="max_train_steps was 4, is 8"):
        compare(script, *lines)


def test_fewer_updates_than_are_done_are_refused(script):
    with pytest.raises(script.UnusableInput, match="--max_train_steps 1: checkpoint-2 is beyond it.*at least 2"):
        compare(script, parse(script), parse(script, max_train_steps=1))


def test_a_run_is_as_long_as_its_epochs(script):
    line = {"max_train_steps": None, "train_batch_size": 3, "gradient_accumulation_steps": 2}
    for processes, epochs, samples, updates in ((1, 2, 10, 4), (4, 2, 240, 20), (4, None, 24, 100), (4, 1, 1, 1)):
        args = parse(script, num_train_epochs=epochs, max_train_samples=samples, **line)
        assert script.count_updates(args, SimpleNamespace(num_processes=processes)) == updates
    args = parse(script, num_train_epochs=2, max_train_samples=10, max_train_steps=7)
    assert script.count_updates(args, ONE) == 7, "--max_train_steps wins"
    args = parse(script, num_train_epochs=3, max_train_steps=None)
    with pytest.raises(script.UnusableInput, match="--num_train_epochs 3: .*does not tell.*--max_train_samples"):
        script.count_updates(args, ONE)


# Optimizer


def make_optimizer(script, parameters, num_processes=1, **changes):
    args = parse(script, **changes)
    return script.make_optimizer(parameters, args, num_processes, args.max_train_steps)


def rates(script, num_updates, num_processes=1, **changes):
    """Return the learning rate of each update."""
    optimizer, schedule = make_optimizer(script, [torch.nn.Parameter(torch.zeros(1))], num_processes, **changes)
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
    optimizer, _ = make_optimizer(
        script, [torch.nn.Parameter(torch.zeros(1))], use_8bit_adam=use_8bit_adam, adam_beta1=0.8, adam_beta2=0.9,
        adam_weight_decay=0.1, adam_epsilon=1e-6,
    )  # fmt: skip
    assert isinstance(optimizer, bitsandbytes.optim.AdamW8bit if use_8bit_adam else torch.optim.AdamW)
    group = optimizer.param_groups[0]
    assert (tuple(group["betas"]), group["weight_decay"], group["eps"]) == ((0.8, 0.9), 0.1, 1e-6)


def test_8bit_adam_computes_what_bitsandbytes_own_does_and_waits_for_no_matrix(script, monkeypatch):
    waits, sync = [], bnb_optimizer.sync_gpu
    monkeypatch.setattr(bnb_optimizer, "sync_gpu", lambda tensor: (waits.append(1), sync(tensor)))
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((80, 64), (7,), (4096,))]
    gradients = [[torch.randn(p.shape, generator=generator) for p in start] for _ in range(4)]

    def trained(make):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        optimizer = make(parameters)
        for number, step in enumerate(gradients):
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            parameters[1].grad = None if number == 1 else parameters[1].grad
            optimizer.step(None)  # as accelerate calls it
        return parameters, json.dumps([str(value) for state in optimizer.state.values() for value in state.values()])

    line = {"learning_rate": 0.01, "adam_weight_decay": 0.1, "use_8bit_adam": True}
    ours, our_state = trained(lambda parameters: make_optimizer(script, parameters, **line)[0])
    assert not waits
    theirs, their_state = trained(
        lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, lr=0.01, weight_decay=0.1, betas=(0.9, 0.999))
    )
    assert waits and our_state == their_state
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], start[0])
