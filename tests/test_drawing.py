"""What scripts/sample.py draws with: several LoRAs, PEFT folders, pictures to start from, ControlNet."""

import argparse
import json
import shutil
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SIDE, cases, flags, load_script, one_family, tiny_unet
from diffusers import AutoPipelineForImage2Image, ControlNetModel, StableDiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

sys.path.insert(0, str(ROOT / "scripts"))
from lib import pipelines
from lib.trainers import UnusableInput, exit_code, sd15

PROMPTS = ["a red hill", "the sea"]
TARGETS = ["to_q", "to_v", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"]


@pytest.fixture(scope="module")
def sample():
    return load_script("scripts/sample.py")


def load(model, **flags):
    """Return the pipeline of a model on the CPU, in float32 where --mixed_precision is not given."""
    return pipelines.load_teacher(argparse.Namespace(pretrained_teacher_model=str(model), **flags), "cpu")


def random_lora(folder, teacher, name, seed, rank):
    """Write a random LoRA, alpha = rank, for diffusers and for PEFT in `<name>/unet`; return its weights."""
    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, init_lora_weights=False)
    pipe.unet.add_adapter(config)
    weights = {key: value.clone() for key, value in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(folder / name, unet_lora_layers=weights)
    config.save_pretrained(folder / name / "unet")
    prefixed = {f"base_model.model.{key}": value.contiguous() for key, value in weights.items()}
    save_file(prefixed, folder / name / "unet" / "adapter_model.safetensors")
    return weights


@pytest.fixture(scope="module")
def loras(teacher, tmp_path_factory):
    """Return (folder with `lcm` and `style`, {name: weights})."""
    folder = tmp_path_factory.mktemp("loras")
    return folder, {
        name: random_lora(folder, teacher, name, seed, rank) for name, seed, rank in (("lcm", 1, 3), ("style", 2, 2))
    }


def latents_of(pipe, sampler, weights=None):
    pipelines.set_sampler(pipe, sampler, weights)
    return torch.stack(pipelines.draw(pipe, PROMPTS, 2, 1.0, [0, 1], output_type="latent")[0])


def merge(unet, loras):
    """Add weight * B A of every LoRA, {weight: tensors}, to the UNet's own weights, by hand."""
    modules = dict(unet.named_modules())
    for scale, tensors in loras:
        for key in (key for key in tensors if key.endswith("lora_A.weight")):
            down, up = tensors[key].flatten(1), tensors[key.replace("lora_A", "lora_B")].flatten(1)
            weight = modules[key.removesuffix(".lora_A.weight")].weight
            weight.data += scale * (up @ down).view(weight.shape)


def test_style_and_lcm_lora_equal_weights_merged_by_hand(teacher, loras):
    folder, weights = loras
    pipe = load(teacher)
    pipelines.load_lora(pipe, folder / "lcm")
    pipelines.load_lora(pipe, folder / "style", "style1")
    both = latents_of(pipe, "lcm-lora", {"lcm": 1.0, "style1": 0.8})
    merged = load(teacher)
    merge(merged.unet, [(1.0, weights["lcm"]), (0.8, weights["style"])])
    torch.testing.assert_close(both, latents_of(merged, "lcm-without-lora"), rtol=1e-3, atol=1e-4)
    for other in ({"lcm": 1.0, "style1": 1.0}, {"lcm": 0.8, "style1": 0.8}, {"lcm": 1.0}):
        assert (latents_of(pipe, "lcm-lora", other) - both).abs().max() > 1e-2, other
    styled = load(teacher)
    merge(styled.unet, [(0.8, weights["style"])])
    teacher_row = latents_of(pipe, "ddim", {"lcm": 1.0, "style1": 0.8})  # the style stays, the LCM not
    torch.testing.assert_close(teacher_row, latents_of(styled, "ddim"), rtol=1e-3, atol=1e-4)
    plain = load(teacher)
    off = latents_of(pipe, "ddim", {"lcm": 1.0})
    torch.testing.assert_close(off, latents_of(plain, "ddim"), rtol=1e-4, atol=1e-5)


@one_family
def test_a_kohya_file_with_alphas_that_differ_is_drawn_as_it_says(teacher, loras, tmp_path):
    _, weights = loras
    for some, part in ((False, ""), (True, ""), (True, "attn")):  # some layers without one, which is then their rank
        pipe, merged, state = load(teacher), load(teacher), {}
        trainer = pipelines.sdxl if hasattr(pipe, "text_encoder_2") else pipelines.sd15
        for number, down in enumerate(name for name in weights["style"] if part in name and "lora_A" in name):
            module, up = down.removesuffix(".lora_A.weight"), down.replace("lora_A", "lora_B")
            key, rank = trainer.kohya_name(module, pipe.unet.config.layers_per_block), 1 + number % 2
            a, b = weights["style"][down][:rank], weights["style"][up][:, :rank]
            alpha = rank * (0.5 + number % 3) if not some else (rank, 1.5)[number % 2]
            state |= {f"{key}.lora_down.weight": a.contiguous(), f"{key}.lora_up.weight": b.contiguous()}
            if number % 2 or not some:
                state[f"{key}.alpha"] = torch.tensor(alpha)
            merge(merged.unet, [(alpha / rank, {down: a, up: b})])
        save_file(state, tmp_path / "style.safetensors")
        pipelines.load_lora(pipe, tmp_path / "style.safetensors", "style1")
        drawn = latents_of(pipe, "ddim", {"style1": 1.0})
        torch.testing.assert_close(drawn, latents_of(merged, "ddim"), rtol=1e-3, atol=1e-4)
    save_file(state | {f"{key}.dora_scale": torch.ones(4, 1)}, tmp_path / "dora.safetensors")
    with pytest.raises(UnusableInput, match="DoRA"):
        pipelines.load_lora(pipe, tmp_path / "dora.safetensors", "style2")


def test_peft_folder_of_a_checkpoint_loads_as_peft_loads_it(teacher, loras, tmp_path):
    folder, _ = loras
    pipe, by_peft = load(teacher), load(teacher)
    pipelines.load_lora(pipe, folder / "lcm" / "unet" / "adapter_model.safetensors")
    by_peft.unet = PeftModel.from_pretrained(by_peft.unet, folder / "lcm" / "unet")
    shutil.copytree(folder / "lcm" / "unet", tmp_path / "both")
    shutil.copy(folder / "style" / sd15.WEIGHTS_NAME, tmp_path / "both")
    other = load(teacher)
    for number, (name, rank) in enumerate((("", 2), ("adapter_model.safetensors", 3), (sd15.WEIGHTS_NAME, 2))):
        pipelines.load_lora(other, tmp_path / "both" / name, f"lcm{number}")
        by_trainer = sd15.read_lora(tmp_path / "both" / name)
        assert other.unet.peft_config[f"lcm{number}"].r == rank == len(next(iter(by_trainer.values())).down)
    ours = latents_of(pipe, "lcm-lora")
    pipelines.set_sampler(by_peft, "lcm-without-lora", {})
    theirs = torch.stack(pipelines.draw(by_peft, PROMPTS, 2, 1.0, [0, 1], output_type="latent")[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - latents_of(pipe, "lcm-without-lora")).abs().max() > 1e-2


@one_family
def test_peft_folder_of_another_model_is_refused(teacher, loras, tmp_path):
    folder, _ = loras
    (tmp_path / "unet").mkdir()
    source = folder / "lcm" / "unet"
    (tmp_path / "unet" / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    weights = load_file(source / "adapter_model.safetensors")
    renamed = {key.replace("mid_block", "middle"): value for key, value in weights.items()}
    save_file(renamed, tmp_path / "unet" / "adapter_model.safetensors")
    with pytest.raises(UnusableInput, match="middle"):
        pipelines.load_lora(load(teacher), tmp_path / "unet")


def run(sample, teacher, output_dir, *flags):
    """Run the tool on one prompt and return {folder of pictures: first picture as an array}."""
    usual = ["--pretrained_teacher_model", teacher, "--output_dir", output_dir, "--prompts", "a hill"]
    args = sample.parse_args([str(flag) for flag in (*usual, "--device", "cpu", *flags)])
    assert exit_code(sample.main, args) == 0
    found = sorted(output_dir.glob("*/0-0.png"))
    return {path.parent.name: np.asarray(Image.open(path).convert("RGB"), int) for path in found}


def test_rows_of_strengths_guidances_and_base_steps(sample, teacher, loras, tmp_path):
    folder, _ = loras
    rows = run(
        sample, teacher, tmp_path, "--lora", f"{folder / 'lcm'}=0.5", "--lora", f"{folder / 'style'}=0.8",
        "--lora_strengths", "0", "2", "--lcm_guidance_scale", "1", "1.5", "--steps", "1", "2",
        "--base_steps", "3", "--samplers", "ddim", "lcm-lora", "--negative_prompt", "sea",
    )  # fmt: skip
    lcm = {f"lcm-lora-guidance{g}-strength{s}-{n}steps" for g in ("1", "1.5") for s in "02" for n in (1, 2)}
    assert set(rows) == lcm | {"ddim-3steps"}
    records = json.loads((tmp_path / "samples.json").read_text())
    strong = next(r for r in records if r["image"].startswith("lcm-lora-guidance1.5-strength2-1steps"))
    assert strong["lora_weights"] == {"lcm": 1.0, "style1": 0.8} and strong["guidance"] == 1.5
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    cell, gap = 128, 6  # columns 1, 2, 3; the row of ddim has a picture in the last one only
    columns = [grid.shape[1] - (3 - column) * (cell + gap) for column in range(3)]
    top = grid.shape[0] - 5 * (cell + gap)
    blank = [bool((grid[top : top + cell, left : left + cell] == 255).all()) for left in columns]
    assert blank == [True, True, False]


@one_family
def test_image_to_image_starts_from_the_picture(sample, teacher, loras, tmp_path):
    folder, _ = loras
    Image.effect_noise((SIDE + 3, SIDE), 90).convert("RGB").save(tmp_path / "start.png")
    flags = ["--lora", folder / "lcm", "--samplers", "lcm-lora", "--steps", "4", "--image", tmp_path / "start.png"]
    flags[1] = f"{flags[1]}=0.9"
    weak = run(sample, teacher, tmp_path / "weak", *flags, "--strength", "0.3")["lcm-lora-4steps"]
    assert json.loads((tmp_path / "weak" / "samples.json").read_text())[0]["lora_weights"] == {"lcm": 0.9}
    full = run(sample, teacher, tmp_path / "full", *flags, "--strength", "1")["lcm-lora-4steps"]
    assert weak.shape == (SIDE, SIDE, 3)  # cut to multiples of 8 px
    pipe = load(teacher)
    kind = AutoPipelineForImage2Image
    with mock.patch.object(kind, "from_pipe", wraps=kind.from_pipe) as asked:
        sample.task_pipeline(pipe, argparse.Namespace(image="a", mask=None, controlnet=None))
    assert asked.call_args.kwargs["add_watermarker"] is False, "else SDXL's pictures get one where its package is"
    picture = sample.fitted_picture(tmp_path / "start.png", None)
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        coded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    coded = (coded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy() * 255
    assert abs(weak - coded).mean() < abs(full - coded).mean()


@one_family
def test_inpainting_keeps_what_the_mask_keeps(sample, teacher, loras, tmp_path):
    folder, _ = loras
    Image.effect_noise((SIDE, SIDE), 90).convert("RGB").save(tmp_path / "start.png")
    Image.new("L", (SIDE, SIDE), 0).save(tmp_path / "none.png")
    left = Image.new("L", (SIDE, SIDE), 0)
    left.paste(255, (0, 0, SIDE // 2, SIDE))
    left.save(tmp_path / "left.png")
    pipe, drawn = load(teacher), {}
    pipelines.load_lora(pipe, folder / "lcm")
    usual = ["--pretrained_teacher_model", str(teacher), "--output_dir", str(tmp_path), "--prompts", "a hill"]
    for name in ("none", "left"):
        flags = ["--image", str(tmp_path / "start.png"), "--mask", str(tmp_path / f"{name}.png")]
        args = sample.parse_args([*usual, *flags])
        task, extra = sample.task_pipeline(pipe, args), sample.start_pictures(args)
        pipelines.set_sampler(task, "lcm-lora")
        (drawn[name],), _ = pipelines.draw(task, ["a hill"], 2, 1.0, [0], output_type="latent", **extra)
    change = (drawn["left"] - drawn["none"]).abs().amax(0)  # latents: 16 x 16
    assert change[:, 8:].max() < 1e-5, "what is black in the mask must stay"
    assert change[:, :8].median() > 1e-2, "what is white in the mask must be drawn"


def test_controlnet(sample, teacher, loras, tmp_path, capsys):
    folder, _ = loras
    unet = StableDiffusionPipeline.from_pretrained(teacher).unet
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    net.save_pretrained(tmp_path / "silent")  # as made: its output layers are zero
    for block in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(block.weight, std=0.5)
    net.save_pretrained(tmp_path / "net")
    for name, colour in (("dark", 0), ("light", 255)):
        Image.new("RGB", (SIDE, SIDE), (colour,) * 3).save(tmp_path / f"{name}.png")
    common = ["--lora", folder / "lcm", "--samplers", "lcm-lora", "--steps", "2"]
    plain = run(sample, teacher, tmp_path / "plain", *common)["lcm-lora-2steps"]

    def controlled(net, picture, *more):
        flags = ["--controlnet", tmp_path / net, "--control_image", tmp_path / f"{picture}.png", *more]
        name = f"{net}-{picture}-{len(more)}"
        return run(sample, teacher, tmp_path / name, *common, *flags)["lcm-lora-2steps"]

    assert abs(controlled("silent", "light") - plain).max() <= 1
    light = controlled("net", "light")
    assert abs(light - plain).mean() > 1 and abs(light - controlled("net", "dark")).max() > 1
    assert abs(controlled("net", "light", "--controlnet_scale", "0") - plain).max() <= 1
    assert controlled("net", "light", "--image", tmp_path / "dark.png", "--strength", "1").shape == (SIDE, SIDE, 3)
    wider = {"cross_attention_dim": unet.config.cross_attention_dim + 8}, {"block_out_channels": (16, 32)}
    for number, change in enumerate(wider):
        ControlNetModel.from_config(net.config, **change).save_pretrained(tmp_path / f"other{number}")
        with pytest.raises(AssertionError):
            controlled(f"other{number}", "light")
        assert "is for another kind of model" in capsys.readouterr().err


@one_family
@cases(
    ("flags", "named"),
    [
        (["--lora", "{loras}/lcm=strong"], "=0.8"),
        (["--mask", "{loras}/lcm"], "give a file"),
        (["--control_image", "no.png"], "no.png"),
        (["--controlnet", "owner/net"], "--control_image"),
        (["--strength", "0"], "--strength"),
        (["--strength", "0.5"], "--image"),
        (["--image", "{config}", "--strength", "0.2", "--steps", "4"], "no step"),
        (["--lora_strengths", "nan"], "--lora_strengths"),
        (["--image", "{config}", "--strength", "0.01"], "no step"),
        (["--base_steps", "1001"], "--base_steps [1001]"),
        (["--lcm_guidance_scale", "1", "-1"], "guidance"),
    ],
)
def test_wrong_values_exit_with_2(sample, teacher, loras, tmp_path, capsys, flags, named):
    folder, _ = loras
    config = folder / "lcm" / "unet" / "adapter_config.json"
    flags = [flag.format(loras=folder, config=config) for flag in flags]
    usual = ["--pretrained_teacher_model", str(teacher), "--prompts", "a", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        sample.parse_args(usual + flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and named in message and message.count("\n") == 1


@one_family
def test_a_file_that_is_no_picture_exits_with_2(sample, teacher, loras, tmp_path, capsys):
    folder, _ = loras
    config = folder / "lcm" / "unet" / "adapter_config.json"
    usual = ["--pretrained_teacher_model", str(teacher), "--prompts", "a", "--output_dir", str(tmp_path)]
    args = sample.parse_args([*usual, "--device", "cpu", "--image", str(config)])
    assert exit_code(sample.main, args) == 2
    message = capsys.readouterr().err
    assert "adapter_config.json" in message and message.count("\n") == 1


def test_a_lora_that_is_not_finite_and_ctrl_c_end_with_one_line(teacher, loras, tmp_path, capsys):
    weights = load_file(loras[0] / "lcm" / "pytorch_lora_weights.safetensors")
    first = next(iter(weights))
    save_file(weights | {first: torch.full_like(weights[first], float("nan"))}, tmp_path / "nan.safetensors")
    with pytest.raises(UnusableInput, match="not finite"):
        pipelines.load_lora(load(teacher), str(tmp_path / "nan.safetensors"))
    loaded = sd15.read_lora(loras[0] / "lcm")
    state = {
        f"unet.{name}.lora_{part}.weight": m
        for name, one in loaded.items()
        for part, m in zip("AB", one[:2], strict=True)
    }
    del state[next(name for name in state if "lora_B" in name)]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(UnusableInput, match=f"{len(state)} of {len(state) + 1} UNet tensors fit"):
        pipelines.load_lora(load(teacher), str(tmp_path / "half.safetensors"))
    (pipe := load(teacher)).unet.conv_out.bias.data[0] = float("nan")  # as half precision that overflows would give
    with pytest.raises(UnusableInput, match="2 steps, guidance 1: not finite"):
        pipelines.draw(pipe, ["sea"], 2, 1.0, [0], is_strict=True)
    (picture,), _ = pipelines.draw(pipe, ["sea"], 2, 1.0, [0])  # make_shards.py leaves such a one out
    assert not np.asarray(picture).any()

    def interrupted(_args):
        raise KeyboardInterrupt

    assert exit_code(interrupted, None) == 130 and capsys.readouterr().err.split() == ["stopped", "by", "SIGINT"]

    def refused(_args):
        bar = tqdm(total=2, desc="drawing")
        bar.update()
        raise UnusableInput("no such row")

    assert exit_code(refused, None) == 2
    assert capsys.readouterr().err.endswith("\nerror: no such row\n"), "below the bar, and not at its end"


def test_the_trainers_file_draws_what_was_trained(script, teacher, shards, tmp_path):
    """The one LoRA file, with alpha unlike the rank, against the UNet that the trainer itself holds."""
    args = script.parse_args(flags(teacher, shards, tmp_path, lora_rank=4, lora_alpha=6))
    trained = script.load_teacher(args, torch.float32, "cpu")
    script.add_lora(trained.unet, args)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in trained.unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    script.save_lora(trained.unet, tmp_path / "pytorch_lora_weights.safetensors", args)
    pipelines.set_sampler(trained, "lcm-without-lora", {"default": 1.0})
    theirs = torch.stack(pipelines.draw(trained, PROMPTS, 2, 1.0, [0, 1], output_type="latent")[0])
    pipe = load(teacher)
    pipelines.load_lora(pipe, tmp_path)
    ours = latents_of(pipe, "lcm-lora")
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)  # the file is float16
    assert (ours - latents_of(pipe, "lcm-without-lora")).abs().max() > 0.5
    with pytest.raises(UnusableInput, match="made for this model"):
        wide = load(teacher)
        wide.unet = tiny_unet(block_out_channels=(8, 32), cross_attention_dim=wide.unet.config.cross_attention_dim)
        pipelines.load_lora(wide, tmp_path)
