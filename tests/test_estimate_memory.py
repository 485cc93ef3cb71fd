"""The estimate of memory adds up what is alive, and knows what the flags change."""

import pytest
import torch
from conftest import load_script
from torch.nn import functional


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
    assert memory.peaks == {"other": 600, "later": 640}


def test_what_the_flags_change(tool, monkeypatch):
    attention = functional.scaled_dot_product_attention

    def figures(*words):
        usual = ["--model", "sd15", "--resolution", "256", "--mixed_precision", "bf16"]
        own, trainer, args = tool.parse_args([*usual, *words])
        with monkeypatch.context() as patch:  # which puts back what is wrapped
            patch.setattr(functional, "scaled_dot_product_attention", attention)
            for name in tool.PARTS:
                patch.setattr(trainer, name, getattr(trainer, name))
            return tool.measure(own, trainer, args)

    fixed, peaks = figures("--train_batch_size", "4")
    assert (
        fixed["unet"] == 2 * 859_520_964 and fixed["vae"] == 2 * 83_653_863
    )  # the published numbers of weights
    assert fixed["optimizer"] == 2 * fixed["LoRA"] > 0
    assert peaks["teacher"] < peaks["student forward"] <= peaks["backward"]
    words = "--train_batch_size 4 --gradient_checkpointing --use_8bit_adam --use_4bit_base --lora_rank 4"
    small_fixed, small = figures(*words.split(), "--cached")
    assert "text_encoder" not in small_fixed and not {"VAE", "text"} & small.keys()
    assert small["validation"] == pytest.approx(peaks["validation"], rel=0.01)
    assert small_fixed["optimizer"] / small_fixed["LoRA"] == pytest.approx(2.03 / 4, rel=0.01)
    assert small["teacher"] == pytest.approx(peaks["teacher"], rel=0.01)
    assert small["backward"] < peaks["backward"] / 2
    # Of 16 bits a weight of the attention blocks 4 stay, and 32 for each 64 weights.
    assert fixed["unet"] - small_fixed["unet"] == pytest.approx(242_196_480 * (2 - 0.5 - 4 / 64))
    assert sum(small_fixed.values()) + small["loading"] == fixed["unet"]  # nothing else is there yet
    assert "loading" not in peaks
