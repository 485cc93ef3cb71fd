"""scripts/sample.py on a random Stable Diffusion of a few thousand weights."""

import argparse
import itertools
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, build_teacher, cases, load_script, tiny_unet
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SCRIPT = ROOT / "scripts" / "sample.py"
sys.path.insert(0, str(SCRIPT.parent))
from lib import pipelines  # noqa: E402
from lib.trainers import UnusableInput, exit_code, sd15, sdxl  # noqa: E402

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
    pipe.save_pretrained(folder / "halves", variant="fp16")
    (folder / "flux").mkdir()
    (folder / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    torch.save({"state_dict": {"model.w": torch.zeros(2)}, "extra": Runs(folder / "ran")}, folder / "runs.ckpt")
    text = pipe.text_encoder
    pipe.register_modules(text_encoder=None)
    pipe.save_pretrained(folder / "no-text")
    pipe.register_modules(text_encoder=text, unet=tiny_unet(in_channels=9))
    pipe.save_pretrained(folder / "inpainting")
    yield folder
    assert not (folder / "ran").exists(), "a pickle was run"


class Runs:
    """An object whose pickle writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


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
    flags = ["--lora", str(models / "lora"), *samplers, "--steps", "1", "4", "--num_images", "2", "--seed", "5"]
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


def test_grid_wraps_long_prompts_and_keeps_large_pictures():
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
    with pytest.MonkeyPatch.context() as patched:  # of the Hub's cache, where the Hub is away
        patched.setattr("huggingface_hub.hf_hub_download", lambda *_: str(models / "lora" / sd15.WEIGHTS_NAME))
        pipelines.load_lora(load(models / "teacher"), "me/a-lora")
        dora = {f"unet.conv_in.lora_{part}.weight": torch.ones(4, 4, 1, 1) for part in "AB"}
        save_file(dora | {"unet.conv_in.dora_scale": torch.ones(1)}, tmp_path / "style.safetensors")

        def download(_source, name):
            if name == sd15.WEIGHTS_NAME:
                raise OSError("no such file")
            return str(tmp_path / name)

        patched.setattr("huggingface_hub.hf_hub_download", download)
        patched.setattr("huggingface_hub.list_repo_files", lambda _source: ["README.md", "style.safetensors"])
        with pytest.raises(UnusableInput, match="me/style.*it is a DoRA"):
            pipelines.load_lora(load(models / "teacher"), "me/style")
        # Of several files diffusers takes the first, and its warning says so.
        patched.setattr("huggingface_hub.list_repo_files", lambda _source: ["style.safetensors", "2.safetensors"])
        pipe, levels, logs = load(models / "teacher"), [], pipelines.diffusers.utils.logging
        pipe.lora_state_dict = lambda *_args, **_options: levels.append(logs.get_verbosity()) or ({}, None)
        pipe.load_lora_weights = lambda *_args, **_options: None
        for lora in ("me/style", models / "lora"):
            with pytest.raises(UnusableInput, match="0 of 0 UNet tensors fit"):
                pipelines.load_lora(pipe, lora)
        assert levels == [logs.WARNING, logs.CRITICAL]


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
        torch.testing.assert_close(latents, eps / pipe.scheduler.alphas_cumprod[999].sqrt(), rtol=1e-4, atol=1e-4)


def test_an_lcm_lora_drawn_by_ddim_and_euler(models, sample, tmp_path):
    kinds = {"lcm-lora": ("consistency", 1), "lcm-lora-euler": ("consistency", 2), "lcm-lora-ddim": ("matching", 1)}
    for name, (objective, phases) in kinds.items():  # by default the sampler that the LoRA's header names
        trained = argparse.Namespace(
            objective=objective, phases=phases, student_eta=0.3, timestep_scaling_factor=10.0, num_ddim_timesteps=50
        )
        (tmp_path / name).mkdir()
        hint = {"modelspec.usage_hint": sd15.usage_of(trained)[1]}
        save_file({"a": torch.zeros(1)}, tmp_path / name / sd15.WEIGHTS_NAME, metadata=hint)
        args = sample.parse_args(usual_flags(models, tmp_path, "--prompts", "a", "--lora", f"{tmp_path / name}=0.8"))
        assert args.samplers == ["ddim", "dpmsolver++", name]
    assert sample.cli.samplers_for(["none/there", models / "lora", *map(tmp_path.joinpath, kinds)]) == [*kinds]
    with pytest.MonkeyPatch.context() as patched:
        download = str(tmp_path / "lcm-lora-euler" / sd15.WEIGHTS_NAME)
        patched.setattr("huggingface_hub.hf_hub_download", lambda *_: download)
        assert sample.cli.samplers_for(["me/a-lora-of-phases"]) == ["lcm-lora-euler"]
    (tmp_path / name / "checkpoint-7" / "unet").mkdir(parents=True)  # whose files have no such header
    for file in sample.cli.PEFT_FILES:
        (tmp_path / name / "checkpoint-7" / "unet" / file).touch()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / name / sd15.WEIGHTS_NAME)
    for part in (
        "checkpoint-7",
        "checkpoint-7/unet",
        "checkpoint-7/unet/adapter_model.safetensors",
        "../link.safetensors",
    ):
        assert sample.cli.samplers_for([tmp_path / name / part]) == [name]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(tmp_path / name)
        assert sample.cli.samplers_for(["."]) == sample.cli.samplers_for(["checkpoint-7/unet"]) == [name]
    pipe = load(models / "teacher")
    pipelines.load_lora(pipe, models / "lora")
    schedule, drawn = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}, {}
    for name in ("lcm-lora-ddim", "lcm-lora-euler"):
        given = pipelines.set_sampler(pipe, name)
        (drawn[name],), _ = pipelines.draw(pipe, ["sea"], 4, 1.0, [0], output_type="latent", **given)
        assert pipe.scheduler.timesteps[0] == 999
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **schedule)

    def latents(eta):
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "generator": noise}
        return pipe("sea", eta=eta, **options).images[0]

    torch.testing.assert_close(drawn["lcm-lora-ddim"], latents(0.3))
    torch.testing.assert_close(drawn["lcm-lora-euler"], latents(0.0))
    assert (latents(0.3) - drawn["lcm-lora-euler"]).abs().max() > 1e-3, "eta must act"
    pipe.disable_lora()
    assert (latents(0.0) - drawn["lcm-lora-euler"]).abs().max() > 1e-3, "the LoRA must be on"


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


@cases(
    ("flags", "named"),
    [
        (["--pretrained_teacher_model", "./no-model"], "./no-model"),
        (["--pretrained_teacher_model", "no/such/model.safetensors"], "no/such/model.safetensors"),
        (["--pretrained_teacher_model", "{models}/empty"], "model_index.json"),
        (["--teacher_revision", "fp16"], "--teacher_revision"),
        (["--lora", "{models}/no-lora.safetensors"], "no-lora.safetensors"),
        (["--lora", "{models}/empty"], "pytorch_lora_weights.safetensors"),
        (["--samplers", "ddim", "lcm-lora-ddim"], "--lora"),
        (["--steps", "0"], "--steps"),
        (["--steps", "4", "51", "--samplers", "lcm-without-lora"], "--steps"),
        (["--steps", "61"], "[61]"),
        (["--guidance_scale", "nan"], "guidance"),
        (["--seed", "-1"], "--seed"),
        (["--num_images", "0"], "--num_images"),
        (["--resolution", "0"], "--resolution"),
        (["--resolution", "100"], "--resolution"),
        (["--output_dir", "{models}/blank.txt"], "blank.txt"),
        (["--output_dir", "/proc/none"], "/proc/none"),
        (["--pretrained_teacher_model", "{models}/lora"], "this is a LoRA"),
        (["--sampler", "ddim"], "did you mean --samplers?"),
    ],
)
def test_wrong_values_exit_with_2(sample, models, tmp_path, capsys, flags, named):
    usual = usual_flags(models, tmp_path, "--prompts", "a")
    with pytest.raises(SystemExit) as stop:
        sample.parse_args(usual + [flag.format(models=models) for flag in flags])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1


def test_prompts_file_without_prompts(sample, models, tmp_path, capsys):
    for flag in ("--prompts", "--negative_prompt"):  # nor a prompt of another encoding
        with pytest.raises(SystemExit) as stop:
            sample.parse_args([*usual_flags(models, tmp_path, "--prompts", "a"), flag, "m\udce4r"])
        assert stop.value.code == 2 and "is not UTF-8" in capsys.readouterr().err
    os.mkfifo(tmp_path / "fifo.safetensors")
    for flag, value in (("--output_dir", ""), ("--controlnet", " "), ("--lora", tmp_path / "fifo.safetensors")):
        with pytest.raises(SystemExit) as stop:  # neither this folder, nor a wait without end
            sample.parse_args([*usual_flags(models, tmp_path, "--prompts", ""), f"{flag}={value}"])
        assert stop.value.code == 2 and flag in capsys.readouterr().err
    for name in ("blank.txt", "no-file.txt"):
        with pytest.raises(SystemExit) as stop:
            sample.parse_args([*usual_flags(models, tmp_path), "--prompts_file", str(models / name)])
        assert stop.value.code == 2 and name in capsys.readouterr().err


def test_prompts_file_is_read_line_by_line(sample, models, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa hill\n\n  die See\u2028bei Nacht, schön \r\n", encoding="utf-8")
    usual = usual_flags(models, tmp_path)
    args = sample.parse_args([*usual, "--prompts_file", str(tmp_path / "prompts.txt")])
    assert args.prompts == ["a hill", "die See\u2028bei Nacht, schön"]


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
        (["--pretrained_teacher_model", "no-such/model"], "no-such/model cannot be loaded (no such path here"),
        (["--variant", "fp16"], "fp16"),
        (["--pretrained_teacher_model", "{models}/halves"], "--variant fp16"),
        (["--pretrained_teacher_model", "{models}/lora/pytorch_lora_weights.safetensors"], "this is a LoRA"),
        (["--pretrained_teacher_model", "{models}/runs.ckpt"], "more than tensors"),
        (["--pretrained_teacher_model", "{models}/flux"], "FluxPipeline"),
        (["--pretrained_teacher_model", "{models}/inpainting"], "inpainting model, its UNet takes 9 channels"),
        (["--pretrained_teacher_model", "{models}/no-text"], "text_encoder"),
        (["--offload"], "--offload"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
    ],
)
def test_unusable_files_exit_with_2(sample, models, tmp_path, capfd, flags, named):
    usual = usual_flags(models, tmp_path, "--prompts", "a")
    args = sample.parse_args(usual + ["--device", "cpu"] + [flag.format(models=models) for flag in flags])
    assert exit_code(sample.main, args) == 2
    message = capfd.readouterr().err
    assert named in message and message.count("\n") == 1, message
    assert not list(tmp_path.iterdir())


XL_KEY = "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias"


def test_single_file_decides_the_family(tmp_path):
    families = (("model.diffusion_model.input_blocks.0.0.weight", sd15), (XL_KEY, sdxl))
    for suffix, (key, family) in itertools.product((".safetensors", ".ckpt"), families):
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


def picture_file(path, pixels, **options):
    Image.fromarray(pixels).save(path, **options)
    return path


def test_pictures_to_start_from_are_opened_as_training_opens_them(sample, tmp_path):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :, 0] = 255
    exif = Image.Exif()
    exif[274] = 6  # turned a quarter clockwise for display
    turned = picture_file(tmp_path / "turned.png", np.ascontiguousarray(np.rot90(upright)), exif=exif)
    assert (np.asarray(sample.fitted_picture(turned, None)) == upright).all()
    grey = picture_file(tmp_path / "grey.png", np.full((16, 16), 257 * 100, np.uint16))
    assert (np.asarray(sample.fitted_picture(grey, None)) == 100).all()


def big_picture(path):
    Image.new("1", (20000, 9000)).save(path)


def eps_picture(path):
    text = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    path.write_text(text)


@pytest.mark.parametrize(("make", "named"), [(big_picture, "at most 178 megapixels"), (eps_picture, "cannot be read")])
def test_unusable_pictures_are_refused_before_a_model_loads(
    sample, models, tmp_path, capsys, monkeypatch, make, named
):
    make(tmp_path / "start.png")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sample, "load_teacher", None)
    flags = usual_flags(models, tmp_path / "out", "--prompts", "a", "--image", str(tmp_path / "start.png"))
    assert exit_code(sample.main, sample.parse_args(flags)) == 2
    message = capsys.readouterr().err
    assert "start.png" in message and named in message and message.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_inpainting_models_draw_with_a_mask(sample, models, tmp_path):
    start = picture_file(tmp_path / "start.png", np.full((SIDE, SIDE, 3), 90, np.uint8))
    flags = ["--image", str(start), "--mask", str(start), "--steps", "1", "--samplers", "ddim"]
    flags += ["--pretrained_teacher_model", str(models / "inpainting")]
    assert draw(sample, models, tmp_path / "out", *flags, prompts=["sea"])
    layer = np.zeros((SIDE, SIDE, 4), np.uint8)  # as editors save one: nothing but what is painted
    layer[:, : SIDE // 2] = 255
    flags[3] = str(picture_file(tmp_path / "mask.png", layer))
    args = sample.parse_args([*usual_flags(models, tmp_path, "--prompts", "sea"), *flags])
    with pytest.raises(UnusableInput, match="mask.png: is transparent in part; save it in black and white"):
        sample.start_pictures(args)


def test_another_runs_pictures_are_not_overwritten_in_silence(sample, models, tmp_path, capsys):
    args = sample.parse_args(usual_flags(models, tmp_path, "--prompts", "a", "--steps", "1", "--samplers", "ddim"))
    said = []
    for _ in range(2):
        assert exit_code(sample.main, args) == 0
        said.append(capsys.readouterr().out)
    assert "another run's pictures" not in said[0] and f"{args.output_dir} holds another run's pictures" in said[1]


def test_a_disk_that_fills_up_ends_with_one_line(sample, models, tmp_path, capsys, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    args = sample.parse_args(usual_flags(models, tmp_path, "--prompts", "a", "--steps", "1"))
    monkeypatch.setattr(Image.Image, "save", full)
    assert exit_code(sample.main, args) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path) in message and "No space left" in message


def test_a_full_disk_is_found_before_the_libraries_load(tmp_path, monkeypatch):
    from lib import cli

    monkeypatch.setattr(cli.tempfile, "TemporaryFile", lambda **_options: open("/dev/full", "wb"))
    ((_, message),) = cli.folder_problems(tmp_path)
    assert "No space left" in message and str(tmp_path) in message


def single_file(path, **extra):
    """Write the keys of an SDXL file, with some tensors of no use: load_teacher is tried in its own tests."""
    weights = {XL_KEY: torch.zeros(1), "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 4, 1, 1)}
    save_file(weights | {key: torch.tensor([]) for key in extra}, path)
    return path


def test_every_tool_takes_prediction_type_and_file_markers(sample, tmp_path, monkeypatch, models):
    """The flags and the file reach the trainer's load_teacher, which reads the markers."""
    seen = []

    def load_teacher(args, *_where, check):
        assert not check
        seen.append((args.prediction_type, sorted(sdxl.weight_names(Path(args.pretrained_teacher_model)))))
        raise UnusableInput("stop")

    monkeypatch.setattr(sdxl, "load_teacher", load_teacher)
    path = single_file(tmp_path / "model.safetensors", v_pred=True, ztsnr=True)
    flags = usual_flags(models, tmp_path / "out", "--prompts", "a", "--prediction_type", "v_prediction")
    flags[1] = str(path)
    assert exit_code(sample.main, sample.parse_args(flags)) == 2
    ((prediction_type, names),) = seen
    assert prediction_type == "v_prediction" and {"v_pred", "ztsnr"} <= set(names)


def test_v_prediction_and_zero_snr_reach_the_samplers(tmp_path):
    teacher = build_teacher(tmp_path, "v_prediction", rescale_betas_zero_snr=True)
    pipe = load(teacher)
    for sampler in ("ddim", "dpmsolver++", "lcm-without-lora"):
        pipelines.set_sampler(pipe, sampler)
        assert pipe.scheduler.config.prediction_type == "v_prediction", sampler
        assert pipe.scheduler.alphas_cumprod[-1] < 1e-6, sampler


def test_a_process_takes_the_gpu_of_its_rank(monkeypatch):
    touched = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_options: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.accelerator, "set_device_index", touched.append)
    empty = torch.empty

    def record(*size, device):
        touched.append(device)
        return empty(*size, device="meta")

    monkeypatch.setattr(torch, "empty", record)
    pipelines.choose_device("auto")
    assert touched == [3, "cuda:3"]


def test_the_vae_decodes_picture_by_picture(models):
    pipe = load(models / "teacher")
    sizes = []
    pipe.vae.decoder.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    pipelines.set_sampler(pipe, "ddim")
    pipelines.draw(pipe, PROMPTS, 1, 1.0, [0, 1])
    assert sizes == [1, 1]


def test_offload_loads_to_the_cpu_and_moves_parts(models, monkeypatch):
    moved = []
    monkeypatch.setattr(
        StableDiffusionPipeline, "enable_model_cpu_offload", lambda _pipe, device: moved.append(device)
    )
    args = argparse.Namespace(pretrained_teacher_model=str(models / "teacher"), offload=True, mixed_precision="no")
    pipe = pipelines.load_teacher(args, "cuda:1")
    assert pipe.device.type == "cpu"
    pipelines.start_offload(pipe, args, "cuda:1")
    assert moved == ["cuda:1"]


def test_a_batch_too_large_for_the_gpu_is_drawn_in_halves(models):
    pipe = load(models / "teacher")
    pipelines.set_sampler(pipe, "ddim")
    whole, _ = pipelines.draw(pipe, PROMPTS * 2, 1, 1.0, [0, 1, 2, 3], output_type="latent")
    limit, sizes = 1, []

    def refuse(_module, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > limit:
            raise RuntimeError("GET was unable to find an engine to execute this computation")  # cuDNN's words

    pipe.unet.register_forward_pre_hook(refuse)
    for _ in range(2):
        parts, seconds = pipelines.draw(pipe, PROMPTS * 2, 1, 1.0, [0, 1, 2, 3], output_type="latent")
        torch.testing.assert_close(torch.stack(parts), torch.stack(whole), rtol=1e-3, atol=1e-3)
        assert seconds > 0
    assert sizes == [4, 2, 1, 1, 1, 1, *[1] * 4], "what does not fit is not tried again"
    limit, sizes[:] = 3, []
    del pipe.batch_that_fits
    for _ in range(2):
        pipelines.draw(pipe, [*PROMPTS * 3, "a"], 1, 1.0, range(7), output_type="latent")
    assert sizes == [7, 3, 3, 1, 3, 3, 1], "and no smaller batch than that which fits"
    limit = 0
    with pytest.raises(UnusableInput, match="--offload"):
        pipelines.draw(pipe, PROMPTS, 1, 1.0, [0, 1])
