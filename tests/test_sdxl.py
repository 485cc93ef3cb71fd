"""What SDXL has and SD 1.5 has not: sizes and crops, zeros for empty captions, asymmetric UNets, its VAE."""

import io
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, SIDE, at_call, build_teacher_xl, finish, flags, load_script, read_log, send
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import PeftModel
from PIL import Image
from safetensors.torch import save
from test_checkpoint import assert_same, checkpoints

sys.path.insert(0, str(ROOT / "scripts"))
from lib.pipelines import draw

CPU = torch.device("cpu")
F32 = torch.float32


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS[1])


@pytest.fixture(scope="module")
def pipe(teacher):
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_args(script, teacher="owner/name", **changes):
    return script.parse_args(flags(teacher, "pipe:", "unused", **changes))


# ----------------------------------------------------------------------------------------------------------
# Size and crop
# ----------------------------------------------------------------------------------------------------------


def told(pipe, original_size, crop_top_left):
    """Return the time ids that the pipeline gives its UNet for a picture of the test's size."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    pipe(
        "sea", num_inference_steps=1, guidance_scale=1.0, height=SIDE, width=SIDE, output_type="latent",
        original_size=original_size, crops_coords_top_left=crop_top_left, target_size=(SIDE, SIDE),
    )  # fmt: skip
    hook.remove()
    return seen[0][0]


def ruler(script, width, height, key="a", **changes):
    """Return the training sample of a picture whose red is x and whose green is y."""
    y, x = np.mgrid[:height, :width]
    data = io.BytesIO()
    Image.fromarray(np.stack([x, y, 0 * x], axis=-1).astype(np.uint8)).save(data, "PNG")
    sample = {"png": data.getvalue(), "txt": b"sea", "__key__": key, "__url__": "0.tar"}
    args = make_args(script, interpolation_type="nearest", **changes)
    return script.prepare_sample(sample, args, epoch=0)


@pytest.mark.parametrize("size", [(80, 48), (48, 80), (32, 32)])
def test_time_ids_are_those_of_the_pipeline(script, pipe, size):
    sample = ruler(script, *size, center_crop=True)
    left, top = ((round(length * SIDE / min(size)) - SIDE) // 2 for length in size)
    assert torch.equal(sample["time_ids"], told(pipe, size[::-1], (top, left)))


@pytest.mark.parametrize("random_flip", [None, True])
def test_time_ids_tell_the_crop_that_was_made(script, pipe, random_flip):
    """Of a mirrored picture the corner counts from its own left side, as the picture that is seen."""
    mirrored, corners = 0, set()
    for key in "abcdefghij":
        sample = ruler(script, 62, SIDE, key, random_flip=random_flip)
        row = sample["pixels"][0, :, 0].tolist()
        left = row[0] if row[0] < row[-1] else 61 - row[0]
        mirrored += row[0] > row[-1]
        corners.add(left)
        assert torch.equal(sample["time_ids"], told(pipe, (SIDE, 62), (0, left)))
    assert len(corners) > 4 and (0 < mirrored < 10 if random_flip else mirrored == 0)


def test_a_fixed_crop_and_size_is_that_of_a_whole_picture(script, pipe):
    sample = ruler(script, 80, 48, use_fix_crop_and_size=True)
    assert torch.equal(sample["time_ids"], told(pipe, (SIDE, SIDE), (0, 0)))
    args = make_args(script)
    args.objective = "matching"  # of a caption alone the same
    sample = {"txt": b"sea", "__key__": "a", "__url__": "0.tar"}
    cached = sample | {"safetensors": save({name: torch.zeros(6) for name in script.CACHED_TENSORS})}
    for each, is_cached in ((sample, False), (cached, True)):
        given = script.prepare_sample(each, args, 0, is_cached)
        assert torch.equal(given["time_ids"], told(pipe, (SIDE, SIDE), (0, 0)))


def test_teacher_and_student_are_told_the_size_and_crop_of_their_sample(script, teacher):
    args, seen = make_args(script, teacher), []
    loaded = script.load_teacher(args, F32, CPU)
    script.add_lora(loaded.unet, args)
    loaded.unet.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    samples = [ruler(script, 80, 48, key) for key in "ab"]
    batch = script.ShardStream([], args, 1, 0, 1).collate(samples)
    embeds = script.encode_prompts(loaded, batch["caption"], CPU)
    empty = torch.tensor([True, False])
    given = script.condition(script.encode_prompts(loaded, [""], CPU), embeds, batch, empty)
    draws = script.draw(args, (2, 4, 8, 8), 0, 0, 0, CPU)
    schedule = script.make_schedule(loaded.scheduler.config, args, CPU)
    unets = dict.fromkeys(("teacher_unet", "student_unet", "student"), loaded.unet)
    job = SimpleNamespace(args=args, dtype=F32, schedule=schedule, **unets)
    script.training_loss(job, draws.eps, *given, draws)
    ids = torch.stack([sample["time_ids"] for sample in samples])
    assert not torch.equal(ids[0], ids[1])
    doubled, *single = seen
    assert torch.equal(doubled, ids.repeat(2, 1)), "conditional and unconditional half of the guidance"
    assert len(single) == 2 and all(torch.equal(part, ids) for part in single)


# ----------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("force_zeros", [True, False])
def test_empty_and_dropped_captions_are_what_the_pipeline_guides_away_from(script, pipe, force_zeros):
    pipe.register_to_config(force_zeros_for_empty_prompt=force_zeros)
    captions = ["sea 1", "", "sea at dawn"]
    with torch.no_grad():
        text, free, pooled, free_pooled = pipe.encode_prompt(
            ["sea at dawn"], device=CPU, do_classifier_free_guidance=True, negative_prompt=None
        )
        uncond_embeds = script.encode_prompts(pipe, [""], CPU)
        batch = {"caption": captions, "time_ids": torch.zeros(3, 6)}
        batch |= script.encode_prompts(pipe, captions, CPU)
        conditioning, uncond = script.condition(uncond_embeds, batch, batch, torch.tensor([True, False, False]))
    pipe.register_to_config(force_zeros_for_empty_prompt=True)
    assert (free == 0).all() == force_zeros and (free_pooled == 0).all() == force_zeros
    for part, empty, full in (("encoder_hidden_states", free, text), ("text_embeds", free_pooled, pooled)):
        ours, theirs = (given.get(part, given["added_cond_kwargs"].get(part)) for given in (conditioning, uncond))
        torch.testing.assert_close(theirs, empty.expand_as(theirs))
        torch.testing.assert_close(ours, torch.cat([empty, empty, full]))
    assert torch.equal(batch["prompt_embeds"][1], uncond_embeds["prompt_embeds"][0])


# ----------------------------------------------------------------------------------------------------------
# Teachers
# ----------------------------------------------------------------------------------------------------------

SSD_1B = {  # in small: no attention in the middle, a count of transformer layers for each place on the way up
    "transformer_layers_per_block": [1, [2]], "reverse_transformer_layers_per_block": [[2, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}  # fmt: skip


def output(unet):
    """Return a UNet's output at fixed inputs."""
    z_t, text, pooled = (
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)) for shape in ((4, 8, 8), (5, 40), (12,))
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[48.0, 80, 0, 10, 32, 32]]).repeat(2, 1)}
    with torch.no_grad():
        return unet.eval()(z_t, torch.tensor([19, 999]), text, added_cond_kwargs=added).sample


def lora_modules(unet):
    return sum(hasattr(module, "lora_A") for module in unet.modules())


def test_an_asymmetric_teacher_trains_loads_and_draws(script, shards, tmp_path):
    teacher, out = build_teacher_xl(tmp_path / "teacher", unet_changes=SSD_1B), tmp_path / "out"
    line = flags(teacher, shards, out, max_train_steps=2, learning_rate=0.05)
    finish(script, line, tmp_path / "said")
    assert len(read_log(out)) == 2
    unet = UNet2DConditionModel.from_pretrained(teacher / "unet")
    before, mid_names = output(unet), [name for name, _ in unet.mid_block.named_modules()]
    assert not any("attn" in name for name in mid_names)
    trained = PeftModel.from_pretrained(unet, out / "checkpoint-2" / "unet")
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(out)
    assert lora_modules(pipe.unet) == lora_modules(trained) > 20
    torch.testing.assert_close(output(pipe.unet), output(trained), rtol=2e-3, atol=2e-3)
    assert (output(pipe.unet) - before).abs().max() > 0.01
    line = ["--pretrained_teacher_model", str(teacher), "--lora", str(out), "--prompts", "sea", "--steps"]
    line += ["2", "--samplers", "lcm-lora", "--output_dir", str(tmp_path / "drawn"), "--device", "cpu"]
    sample = load_script("scripts/sample.py")
    assert not sample.main(sample.parse_args([*line, "--resolution", str(SIDE)]))
    with Image.open(tmp_path / "drawn" / "lcm-lora-2steps" / "0-0.png") as picture:
        assert picture.size == (SIDE, SIDE) and len(np.unique(np.asarray(picture))) > 20


def test_a_run_is_resumed_exactly(script, teacher, shards, tmp_path):
    changes = {"validation_steps": -1, "random_flip": True, "dataloader_num_workers": 1, "max_train_steps": 3}
    lines = [flags(teacher, shards, tmp_path / name, **changes) for name in ("whole", "broken")]
    finish(script, lines[0], tmp_path / "said")
    finish(script, lines[1], tmp_path / "said", -9, hook=at_call("draw", 3, send(signal.SIGKILL)))
    assert checkpoints(tmp_path / "broken") == {"checkpoint-2"}
    finish(script, lines[1], tmp_path / "said")
    assert_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_other_familys_teacher_is_refused_with_the_script_for_it(teachers, name):
    script = load_script(name)
    (other,) = set(SCRIPTS) - {name}
    args = make_args(script, teachers[other.removesuffix(".py")])
    for refuses in (script.check_teacher, lambda args: script.load_teacher(args, F32, CPU)):
        with pytest.raises(script.UnusableInput, match=f"use {other}"):
            refuses(args)
    args.pretrained_teacher_model = str(teachers[name.removesuffix(".py")])
    assert script.check_teacher(args) is None


def test_the_refiner_is_refused(script, pipe):
    refiner = SimpleNamespace(unet=pipe.unet, text_encoder=None, text_encoder_2=pipe.text_encoder_2)
    for refiner.unet in (pipe.unet, None):  # None: as cache_latents.py loads it
        with pytest.raises(script.UnusableInput, match="refiner"):
            script.check_parts(refiner)
    config = dict(pipe.unet.config)
    for other in ({"layers_per_block": [1, 1]}, {"down_block_types": ["DownBlock2D"] * 4, "layers_per_block": 2}):
        odd = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(**config | other)), text_encoder_2=None)
        with pytest.raises(script.UnusableInput, match="other blocks than SDXL's"):
            script.check_parts(odd)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_missing_tokenizer_is_named(script, teacher, tmp_path, part):
    shutil.copytree(teacher, tmp_path / "teacher")
    shutil.rmtree(tmp_path / "teacher" / part)  # transformers makes an empty one, without a word
    with pytest.raises(script.UnusableInput, match=f"{part} has no maximum length"):
        script.load_teacher(make_args(script, tmp_path / "teacher"), F32, CPU)


# ----------------------------------------------------------------------------------------------------------
# The VAE
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(script, pipe, monkeypatch):
    """Return a list that fills with the VAEs that are asked for; the pipeline comes without the Hub."""
    found = []

    def from_pretrained(_cls, name, **options):
        found.append((str(name), options["dtype"]))
        return pipe.vae

    def whole(_cls, _name, vae="its own", **_options):
        if vae == "its own":
            found.append((vae, None))
        return pipe

    def own_config(*_args, **_options):
        if script.own_vae is None:
            raise OSError("no file named config.json")
        return script.own_vae

    script.own_vae = {"force_upcast": True, "scaling_factor": script.VAE_SCALING}
    monkeypatch.setattr(script.AutoencoderKL, "load_config", classmethod(own_config))
    monkeypatch.setattr(script.AutoencoderKL, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_pretrained", classmethod(whole))
    yield found
    pipe.vae.to(F32)


@pytest.mark.parametrize(
    ("model", "dtype", "changes", "expected"),
    [
        ("owner/name", torch.float16, {}, "madebyollin/sdxl-vae-fp16-fix"),
        ("owner/name", torch.bfloat16, {}, "its own"),
        ("owner/name", F32, {}, "its own"),
        (None, torch.float16, {}, "its own"),
        ("owner/name", torch.float16, {"pretrained_vae_model_name_or_path": "owner/vae"}, "owner/vae"),
        (None, F32, {"pretrained_vae_model_name_or_path": "owner/vae"}, "owner/vae"),
    ],
)
def test_fp16_takes_the_vae_that_does_not_overflow(script, teacher, asked, capsys, model, dtype, changes, expected):
    script.load_teacher(make_args(script, model or teacher, **changes), dtype, CPU)
    assert asked == [(expected, None if expected == "its own" else dtype)]
    for own in ({"force_upcast": False}, {"scaling_factor": 0.18}, None):  # does not overflow; not SDXL's; none there
        script.own_vae, asked[:] = own and script.own_vae | own, []
        script.load_teacher(make_args(script, "owner/name"), torch.float16, CPU)
        assert asked == [("its own", None) if own else (script.USUAL_VAE, torch.float16)]
    assert f"VAE: {script.USUAL_VAE} for the teacher's" in capsys.readouterr().err


def test_no_vae_is_asked_for_where_none_is_needed(script, asked):
    script.load_teacher(make_args(script), torch.float16, CPU, vae=None)
    assert asked == []


def watch(vae):
    """Return a set that fills with the dtypes that a VAE's convolutions compute in."""
    seen = set()
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_vae_that_overflows_runs_in_float32_in_an_fp16_run(script, tmp_path, force_upcast):
    teacher = build_teacher_xl(tmp_path / "teacher", vae_changes={"force_upcast": force_upcast})
    args = make_args(script, teacher)
    args.output_dir = str(tmp_path)
    loaded = script.load_teacher(args, torch.float16, CPU)
    assert {part.dtype for part in (loaded.unet, loaded.text_encoder, loaded.text_encoder_2)} == {torch.float16}
    expected = {F32 if force_upcast else torch.float16}
    seen = watch(loaded.vae)
    pixels = torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8)
    with torch.no_grad():
        assert script.encode_moments(loaded.vae, pixels, args).dtype == F32
        uncond, embeds = (script.encode_prompts(loaded, [text], CPU) for text in ("", "sea"))
    assert seen == expected, "when pictures are encoded"
    seen.clear()
    script.add_lora(loaded.unet, args)
    accelerator = SimpleNamespace(device=CPU, trackers=[])
    job = SimpleNamespace(
        args=args, accelerator=accelerator, dtype=torch.float16, pipe=loaded, prompts=["sea"],
        prompt_embeds=embeds, state=script.RunState(), uncond_embeds=uncond, student_unet=loaded.unet,
        teacher_pictures=[], teacher_unet=None,
    )  # fmt: skip
    drawn = script.validate(job)
    assert seen == expected, "when pictures are drawn"
    assert np.asarray(drawn[1][0]).std() > 1
    for _ in range(2):  # the tools draw through the pipeline
        seen.clear()
        (picture,), _seconds = draw(loaded, ["sea"], 1, 1.0, [0])
        assert seen == expected and np.asarray(picture).std() > 1
    job.schedule, job.teacher_unet = script.make_schedule(loaded.scheduler.config, args, CPU), loaded.unet
    loaded.vae.to(*expected)
    assert ("it computes in float32" in script.describe_models(job, [])) == force_upcast
    loaded.scheduler = LCMScheduler.from_config(loaded.scheduler.config)
    assert "LCMScheduler: if it draws in few steps already, name its base model" in script.describe_models(job, [])


def test_memory_that_is_short_while_loading_is_not_called_a_bad_teacher(script, teacher, monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(script, "load_pipeline", fail)
    with pytest.raises(torch.OutOfMemoryError):
        script.load_teacher(make_args(script, teacher), F32, CPU)
