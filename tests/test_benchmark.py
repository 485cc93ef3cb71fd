"""The benchmark's figures are there, and its plain recipe is the same mathematics as the training script."""

import json
import subprocess
import sys

import pytest
from conftest import ENVIRONMENT, ROOT, SIDE

FIGURES = ("samples_per_second", "seconds_per_step", "cpu_seconds_per_step", "peak_memory_gib")
PARTS = {"data", "VAE", "text", "teacher", "target", "student forward", "backward", "optimizer"}


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark_training.py"), *map(str, arguments)],
        capture_output=True, text=True, timeout=240, env=ENVIRONMENT,
    )  # fmt: skip


def measured(teacher, tmp_path, *arguments):
    file = tmp_path / "figures" / "benchmark.json"
    run = benchmark(
        "--model", teacher, "--repeats", 1, "--steps", 2, "--warmup_steps", 1, "--json", file, "--resolution",
        SIDE, "--train_batch_size", 2, "--lora_rank", 4, "--learning_rate", 1e-3, "--mixed_precision", "no",
        *arguments,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return json.loads(file.read_text())


def test_both_recipes_are_measured_and_their_losses_agree(teacher, tmp_path):
    report = measured(teacher, tmp_path, "--recipe", "reference", "ours")
    for name in FIGURES:
        ours, reference = (report["recipes"][recipe][name] for recipe in ("ours", "reference"))
        assert ours > 0 and reference > 0
        assert report["ratios"][name] == pytest.approx(ours / reference)
    for figures in report["recipes"].values():
        assert set(figures["seconds_per_part"]) == PARTS
        assert sum(figures["seconds_per_part"].values()) <= figures["seconds_per_step"]
        assert len(figures["losses"]) == 3 and len(set(figures["losses"])) == 3
    assert report["ratios"]["loss_difference"] < 1e-4  # float32; the third loss follows two updates


@pytest.mark.parametrize("arguments", [("--model", "sd14"), ("--steps", "0"), ("--recipe", "fast")])
def test_wrong_flags_end_in_one_line_and_code_2(arguments):
    run = benchmark(*arguments)
    assert run.returncode == 2
    assert arguments[0] in run.stderr.splitlines()[-1] and arguments[1] in run.stderr.splitlines()[-1]
