"""The estimate of memory adds up what is alive, and follows the flags."""

from unittest.mock import patch

import pytest
import torch
from conftest import load_script


@pytest.fixture(scope="module")
def tool():
    return load_script("scripts/estimate_memory.py")


def test_what_is_alive_counts_once_and_until_it_is_freed(tool):
    with torch.device("meta"):
        weight = torch.empty(1000)
        memory = tool.LiveMemory([weight])
        with memory:
            view = weight.view(10, 100).t()
            first = torch.empty(100)  # 400 bytes
            second = first[:50] + 1  # 200
            assert memory.live == 600
            del first
            assert memory.live == 200
            with memory.within("later"):
                product = view @ torch.empty(10)  # 400 of 40
            second.add_(product[:50])
    assert memory.peaks == {"student": 600, "later": 640}


def figures(tool, *words):
    own, rest = tool.parse_args(["--model", "sd15", "--resolution", "256", "--mixed_precision", "bf16", *words])
    _, fixed, peaks = tool.count_memory(own, rest)
    return fixed, peaks


def test_what_the_flags_change(tool):
    fixed, peaks = figures(tool, "--train_batch_size", "4")
    # The published numbers of weights.
    assert fixed["unet"] == 2 * 859_520_964 and fixed["vae"] == 2 * 83_653_863
    assert fixed["optimizer"] == 2 * fixed["LoRA"] > 0
    assert peaks["teacher"] < peaks["student"] and peaks["teacher"] < peaks["backward"]
    words = "--train_batch_size 4 --gradient_checkpointing --use_8bit_adam --use_4bit_base --lora_rank 4 --cached"
    small_fixed, small = figures(tool, *words.split())
    assert "text_encoder" not in small_fixed and "VAE, text" in peaks and "VAE, text" not in small
    assert small["validation"] == pytest.approx(peaks["validation"], rel=0.01)
    assert small_fixed["optimizer"] / small_fixed["LoRA"] == pytest.approx(2.03 / 4, rel=0.01)
    assert small["teacher"] == pytest.approx(peaks["teacher"], rel=0.02)
    assert small["backward"] < peaks["backward"] / 2
    # Of 16 bits a weight of the attention blocks 4 stay, and 32 for each 64 weights; one layer is unpacked at a time.
    saved = 242_196_480 * (2 - 0.5 - 4 / 64) - 2 * 1280 * 10240
    assert fixed["unet"] - small_fixed["unet"] == pytest.approx(saved)
    assert tool.exit_code(lambda _: figures(tool, "--num_ddim_timesteps", "2000"), None) == 2
    for teacher, vae in (("my.safetensors", 4), ("owner/name", 2), (None, 2)):  # SDXL's own VAE overflows in fp16
        own, rest = tool.parse_args(["--model", "ssd1b", "--mixed_precision", "fp16"])
        rest += ["--pretrained_teacher_model", teacher] if teacher else []
        job, *_ = tool.meta_job(own, tool.trainer_of("ssd1b"), tool.trainer_flags(own, rest, tool.trainer_of("ssd1b")))
        assert next(job.pipe.vae.parameters()).element_size() == vae
        pixels = torch.empty(2, 8, 8, 3, dtype=torch.uint8, device="meta")
        with patch.object(job.pipe.vae, "encode", wraps=job.pipe.vae.encode) as encode:
            tool.trainer_of("ssd1b").encode_moments(job.pipe.vae, pixels, job.args)
        assert encode.call_count == (2 if vae == 4 else 1)  # as on a GPU


def test_the_step_is_left_as_it_was(tool):
    """What the tool patches to count is put back."""
    trainer = tool.trainer_of("sd15")
    before = trainer.encode, trainer.teacher_step, torch.nn.functional.scaled_dot_product_attention
    words = "--train_batch_size 1 --objective matching --student_steps 1 --validation_steps -1 --cached"
    fixed, peaks = figures(tool, *words.split())  # before there is a first stage
    assert "validation" not in peaks and "vae" not in fixed
    assert fixed["fake's LoRA"] == fixed["LoRA"] == fixed["optimizer"] / 4 > 0
    assert before == (trainer.encode, trainer.teacher_step, torch.nn.functional.scaled_dot_product_attention)
