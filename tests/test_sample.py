"""scripts/sample.py on a random Stable Diffusion of a few thousand weights."""

import argparse
import json
import string
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load_script
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCRIPT = ROOT / "scripts" / "sample.py"
sys.path.insert(0, str(SCRIPT.parent))
from lib import pipelines
from lib.trainers import UnusableInput, exit_code, sd15, sdxl

SIDE = 32  # px
PROMPTS = ["a red hill", "the sea at night"]
TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "time_emb_proj"]


@pytest.fixture(scope="module")
def sample():
    return load_script("scripts/sample.py")


def load(model, **flags):
    """Return the pipeline of a model on the CPU, in float32 where --mixed_precision is not given."""
    return pipelines.load_teacher(argparse.Namespace(pretrained_teacher_model=str(model), **flags), "cpu")


def build_pipeline(folder):
    """Return a random pipeline; its tokenizer spells words in letters, its scheduler is that of SD 1.5."""
    torch.manual_seed(0)
    folder.mkdir()
    letters = string.ascii_lowercase
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    text = CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=24,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=2,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=SIDE,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=unet, scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(folder, model_max_length=24),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save_loras(folder, unet):
    """Write a random LoRA, trained with dropout, with diffusers and kohya keys, and some that do not fit."""
    config = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "init_lora_weights": False}
    unet.add_adapter(LoraConfig(target_modules=TARGETS, **config))
    weights = get_peft_model_state_dict(unet)
    broken = {
        "wide": {key: torch.cat([value] * (1 + ("lora_B" in key))) for key, value in weights.items()},
        "renamed": {key.replace("mid_block", "middle_block"): value for key, value in weights.items()},
        "foreign": {f"blocks.{key}": value for key, value in weights.items()},
    }
    for name, layers in broken.items():
        StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=layers)
    metadata = _collate_lora_metadata({"unet": unet})
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=weights, **metadata)
    kohya = {}
    for key, value in weights.items():
        module, side = key.removesuffix(".weight").rsplit(".", 1)
        module = "lora_unet_" + module.replace(".", "_")
        kohya[f"{module}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = value.contiguous()
        kohya[f"{module}.alpha"] = torch.tensor(4.0)
    save_file(kohya, folder / "kohya.safetensors")
    save_file({"transformer.lora_A.weight": torch.zeros(2, 2)}, folder / "text_only.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"not safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a folder with `teacher`, `lora`, `kohya.safetensors` and files that must be refused."""
    folder = tmp_path_factory.mktemp("models")
    pipe = build_pipeline(folder / "tokenizer")
    pipe.save_pretrained(folder / "teacher")
    save_loras(folder, pipe.unet)
    (folder / "empty").mkdir()
    (folder / "blank.txt").write_text("\n  \n")
    (folder / "damaged.ckpt").write_bytes(b"not a checkpoint")
    return folder


def usual_flags(models, output_dir, *flags):
    return ["--pretrained_teacher_model", str(models / "teacher"), "--output_dir", str(output_dir), *flags]


def draw(sample, models, output_dir, *flags, prompts=PROMPTS):
    """Run the tool in this process and return the pictures' bytes by name."""
    flags = usual_flags(models, output_dir, "--prompts", *prompts, "--device", "cpu", *flags)
    args = sample.parse_args(flags)
    assert exit_code(sample.main, args) == 0
    return {path.relative_to(output_dir).as_posix(): path.read_bytes() for path in output_dir.glob("*/*.png")}


@pytest.fixture(scope="module")
def drawn(sample, models, tmp_path_factory):
    """Return (folder, pictures) of a run with all samplers, the LoRA's row first."""
    folder = tmp_path_factory.mktemp("drawn")
    samplers = ["--samplers", "lcm-lora", "ddim", "dpmsolver++", "lcm-without-lora"]
    flags = [
        "--lora",
        str(models / "lora"),
        *samplers,
        "--steps",
        "1",
        "4",
        "--num_images",
        "2",
        "--seed",
        "5",
    ]
    return folder, draw(sample, models, folder, *flags)


def test_help_answers_without_torch():
    code = (
        "import runpy, sys; sys.argv = ['sample.py', '--help']\n"
        f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "except SystemExit as stop: print('exit', stop.code, {'torch', 'diffusers'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20).stdout
    assert "exit 0 set()" in output
    assert "--lcm_guidance_scale" in output and "trailing" in output


def test_wrong_flags_answer_without_torch(tmp_path):
    code = "import sys; sys.modules['torch'] = sys.modules['diffusers'] = None\nimport runpy\n"
    code += f"sys.argv = ['sample.py', *{['--output_dir', str(tmp_path), '--prompts', 'a']!r}]\n"
    code += "sys.argv += ['--pretrained_teacher_model', '/missing/model']\n"
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert finished.returncode == 2
    assert "/missing/model" in finished.stderr and finished.stderr.count("\n") == 1


def test_files_and_records(drawn):
    folder, pictures = drawn
    samplers = ["lcm-lora", "ddim", "dpmsolver++", "lcm-without-lora"]
    names = {f"{s}-{n}steps/{p}-{i}.png" for s in samplers for n in (1, 4) for p in (0, 1) for i in (0, 1)}
    assert set(pictures) == names
    records = json.loads((folder / "samples.json").read_text())
    assert {record["image"] for record in records} == names
    record = next(r for r in records if r["image"] == "dpmsolver++-4steps/1-1.png")
    assert record.pop("seconds") > 0
    assert record == {
        "sampler": "dpmsolver++", "steps": 4, "guidance": 7.5, "prompt": PROMPTS[1], "seed": 6,
        "image": "dpmsolver++-4steps/1-1.png",
    }  # fmt: skip
    assert {r["guidance"] for r in records if r["sampler"].startswith("lcm")} == {1.0}
    with Image.open(folder / "lcm-lora-1steps" / "0-0.png") as picture:
        assert picture.size == (SIDE, SIDE)


def test_grid_holds_enlarged_pictures_in_order(drawn):
    folder, _ = drawn
    grid = Image.open(folder / "grid.png")
    cell, gap = 128, 6  # 32 px are enlarged by 4
    heading = (grid.height - 2 * gap - 2 * 4 * (cell + gap)) / 3
    assert 14 < heading < 30 and heading == int(heading)  # one line for the columns, one for each prompt
    for row, sampler in enumerate(["lcm-lora", "ddim", "dpmsolver++", "lcm-without-lora"]):
        for column, steps in enumerate((1, 4)):
            left, top = grid.width - (2 - column) * (cell + gap), grid.height - (4 - row) * (cell + gap)
            shown = np.asarray(grid.crop((left, top, left + cell, top + cell)))
            with Image.open(folder / f"{sampler}-{steps}steps" / "1-0.png") as picture:
                expected = np.asarray(picture).repeat(4, axis=0).repeat(4, axis=1)
            assert (shown == expected).all(), (sampler, steps)
    label = grid.crop((0, grid.height - cell, grid.width - 2 * (cell + gap), grid.height - gap))
    assert np.asarray(label).min() < 100  # there is text left of the last row


def test_grid_wraps_long_prompts_and_keeps_large_pictures(sample):
    pictures = {(0, "ddim", 2): Image.new("RGB", (256, 192), "red")}
    short = pipelines.make_grid(["short"], {"ddim": "DDIM"}, [2], pictures)
    long = pipelines.make_grid(["many words " * 20], {"ddim": "DDIM"}, [2], pictures)
    assert short.width == long.width and long.height > short.height
    assert (np.asarray(short) == (255, 0, 0)).all(-1).sum() == 256 * 192


def test_seed_decides_the_pictures(sample, models, drawn, tmp_path):
    flags = ["--lora", str(models / "kohya.safetensors"), "--steps", "4", "--samplers", "ddim", "lcm-lora"]
    again = draw(sample, models, tmp_path / "again", *flags, "--seed", "5")
    other = draw(sample, models, tmp_path / "other", *flags, "--seed", "6")
    _, pictures = drawn
    # The first run used the same LoRA with diffusers' keys, and another order of samplers.
    assert all(pictures[name] == picture for name, picture in again.items())
    assert all(pictures[name] != picture for name, picture in other.items())
    assert pictures["ddim-4steps/0-1.png"] == other["ddim-4steps/0-0.png"]  # seed 5 + 1


def test_lora_changes_its_own_row_only(sample, models, drawn, tmp_path):
    teacher = draw(sample, models, tmp_path, "--steps", "4", "--seed", "5")
    assert set(teacher) == {f"{s}-4steps/{p}-0.png" for s in ("ddim", "dpmsolver++") for p in (0, 1)}
    _, pictures = drawn
    assert all(pictures[name] == picture for name, picture in teacher.items())
    assert pictures["lcm-lora-4steps/0-0.png"] != pictures["lcm-without-lora-4steps/0-0.png"]


def test_samplers_start_in_noise_and_end_clean(models):
    pipe = load(models / "teacher")
    finals = {}
    for name in ("ddim", "dpmsolver++", "lcm-without-lora", "ddim"):
        pipelines.set_sampler(pipe, name)
        pipe.scheduler.set_timesteps(4)
        assert len(pipe.scheduler.timesteps) == 4 and pipe.scheduler.timesteps[0] == 999
        (latents,), _ = pipelines.draw(pipe, ["sea"], 2, 3.0, [0], output_type="latent")
        assert (latents - finals.setdefault(name, latents)).abs().max() == 0, "the order of samplers matters"
    assert (finals["ddim"] - finals["dpmsolver++"]).abs().max() < 1e-3 * finals["ddim"].abs().max()
    assert (finals["ddim"] - finals["lcm-without-lora"]).abs().max() > 0.1
    # A UNet that predicts no noise makes the clean estimate z_t / alpha_t, which no sampler may clip.
    torch.nn.init.zeros_(pipe.unet.conv_out.weight)
    torch.nn.init.zeros_(pipe.unet.conv_out.bias)
    eps = torch.randn(4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(0))
    for name in ("ddim", "dpmsolver++"):
        pipelines.set_sampler(pipe, name)
        (latents,), _ = pipelines.draw(pipe, ["sea"], 1, 1.0, [0], output_type="latent")
        torch.testing.assert_close(
            latents, eps / pipe.scheduler.alphas_cumprod[999].sqrt(), rtol=1e-4, atol=1e-4
        )


def test_batch_equals_single_pictures(models):
    pipe = load(models / "teacher")
    pipelines.load_lora(pipe, models / "lora")
    pipelines.set_sampler(pipe, "lcm-lora")
    options = {"negative_prompt": "hill", "resolution": 16, "output_type": "latent"}
    batch, seconds = pipelines.draw(pipe, PROMPTS, 3, 1.5, [3, 4], **options)
    assert isinstance(batch, list) and batch[0].shape == (4, 8, 8) and seconds > 0
    for prompt, seed, latents in zip(PROMPTS, (3, 4), batch, strict=True):
        (alone,), _ = pipelines.draw(pipe, [prompt], 3, 1.5, [seed], **options)
        torch.testing.assert_close(alone, latents, rtol=1e-3, atol=1e-3)
    plain, _ = pipelines.draw(pipe, PROMPTS, 3, 1.5, [3, 4], **options | {"negative_prompt": None})
    assert (plain[0] - batch[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--pretrained_teacher_model", "./no-model"], "./no-model"),
        (["--pretrained_teacher_model", "no/such/model.safetensors"], "no/such/model.safetensors"),
        (["--pretrained_teacher_model", "{models}/empty"], "model_index.json"),
        (["--teacher_revision", "fp16"], "--teacher_revision"),
        (["--lora", "{models}/no-lora.safetensors"], "no-lora.safetensors"),
        (["--lora", "{models}/empty"], "pytorch_lora_weights.safetensors"),
        (["--samplers", "lcm-lora"], "--lora"),
        (["--steps", "0"], "--steps"),
        (["--steps", "4", "1001"], "--steps"),
        (["--steps", "4", "51", "--samplers", "lcm-without-lora"], "--steps"),
        (["--steps", "61"], "[61]"),
        (["--guidance_scale", "nan"], "guidance"),
        (["--seed", "-1"], "--seed"),
        (["--num_images", "0"], "--num_images"),
        (["--resolution", "0"], "--resolution"),
        (["--resolution", "100"], "--resolution"),
        (["--output_dir", "{models}/blank.txt"], "blank.txt"),
    ],
)
def test_wrong_values_exit_with_2(sample, models, tmp_path, capsys, flags, named):
    usual = usual_flags(models, tmp_path, "--prompts", "a")
    with pytest.raises(SystemExit) as stop:
        sample.parse_args(usual + [flag.format(models=models) for flag in flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["blank.txt", "no-file.txt"])
def test_prompts_file_without_prompts(sample, models, tmp_path, capsys, name):
    usual = usual_flags(models, tmp_path)
    with pytest.raises(SystemExit) as stop:
        sample.parse_args([*usual, "--prompts_file", str(models / name)])
    assert stop.value.code == 2 and name in capsys.readouterr().err


def test_prompts_file_is_read_line_by_line(sample, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa hill\n\n  die See bei Nacht, schön \r\n", encoding="utf-8")
    usual = usual_flags(models, tmp_path)
    args = sample.parse_args([*usual, "--prompts_file", str(tmp_path / "prompts.txt")])
    assert args.prompts == ["a hill", "die See bei Nacht, schön"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora", "{models}/wide"], "size mismatch"),
        (["--lora", "{models}/renamed"], "UNet tensors fit"),
        (["--lora", "{models}/foreign"], "foreign"),
        (["--lora", "{models}/text_only.safetensors"], "0 of 0"),
        (["--lora", "{models}/damaged.safetensors"], "damaged.safetensors"),
        (["--lora", "no-such/lora"], "no-such/lora (no such path here"),
        (["--pretrained_teacher_model", "{models}/damaged.ckpt"], "damaged.ckpt"),
        (["--pretrained_teacher_model", "{models}/damaged.safetensors"], "damaged.safetensors"),
        (["--pretrained_teacher_model", "no-such/model"], "no-such/model (no such path here"),
        (["--variant", "fp16"], "fp16"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_unusable_files_exit_with_2(sample, models, tmp_path, capfd, monkeypatch, flags, named):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    usual = usual_flags(models, tmp_path, "--prompts", "a")
    args = sample.parse_args(usual + ["--device", "cpu"] + [flag.format(models=models) for flag in flags])
    assert exit_code(sample.main, args) == 2
    message = capfd.readouterr().err
    assert named in message and message.count("\n") == 1, message
    assert not list(tmp_path.iterdir())


XL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file_decides_the_family(tmp_path, suffix):
    for key, family in (("model.diffusion_model.input_blocks.0.0.weight", sd15), (XL_KEY, sdxl)):
        path, weights = tmp_path / f"model{suffix}", {key: torch.zeros(8, 4, 1, 1)}
        if suffix == ".ckpt":
            torch.save({"state_dict": weights}, path)
        else:
            save_file(weights, path)
        args = argparse.Namespace(pretrained_teacher_model=path, teacher_revision=None, cache_dir=None)
        assert pipelines.family_of(args) is family


def test_weights_take_the_dtype_asked_for(models):
    pipe = load(models / "teacher", mixed_precision="bf16")
    pipelines.load_lora(pipe, models / "lora")
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
    pipelines.set_sampler(pipe, "lcm-lora")
    (picture,), _ = pipelines.draw(pipe, ["sea"], 1, 1.0, [0])
    assert picture.size == (SIDE, SIDE)
