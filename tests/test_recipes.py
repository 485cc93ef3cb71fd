"""The recipes' files of flags fit their cards; requirements.txt resolves on every platform."""

import re

import pytest
from conftest import ROOT, load_script
from packaging.requirements import Requirement

RECIPES = sorted((ROOT / "scripts" / "launch" / "recipes").glob("*.txt"))


def test_each_card_has_a_recipe_for_each_model():
    names = {f"{model}-{gb}gb" for model in ("sd15", "sdxl") for gb in (8, 12, 16, 24, 80)}
    assert {path.stem for path in RECIPES} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_fits_its_card(path):
    """Also after 10% for fragmentation and 1 GiB for CUDA's context and workspaces."""
    tool = load_script("scripts/estimate_memory.py")
    model, card_gib = path.stem.removesuffix("gb").split("-")
    own, words = tool.parse_args(["--model", model, f"@{path}"])
    args, fixed, peaks = tool.count_memory(own, words)
    assert tool.card_gib(fixed, peaks) <= int(card_gib)
    assert tool.card_gib({"UNet": 9 * 2**30}, {"student": 2**29, "backward": 2**30}) == 12
    assert args.train_batch_size * args.gradient_accumulation_steps == 16
    assert args.learning_rate == 1e-4 and args.mixed_precision == "fp16"


def test_every_flag_of_a_recipe_has_its_reason():
    for path in RECIPES:
        lines = [line for line in path.read_text().splitlines()[2:] if line]
        for reason, flag in zip(lines, lines[1:], strict=False):
            assert not flag.startswith("--") or reason.startswith("# ") or reason.startswith("--train_batch_size"), (
                path
            )


def test_words_after_a_recipe_win():
    script = load_script("train_lcm_lora_sdxl.py")
    line = [f"@{RECIPES[-1]}", "--train_batch_size", "3", "--pretrained_teacher_model", "a/b"]
    args = script.parse_args([*line, "--train_shards_path_or_url", "pipe:", "--max_train_steps", "1"])
    assert args.train_batch_size == 3


PLATFORMS = {
    ("linux", "x86_64"): True,
    ("win32", "AMD64"): True,
    ("linux", "aarch64"): False,
    ("darwin", "arm64"): False,
}


def test_requirements_ask_for_xformers_only_where_there_is_a_wheel():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = {each.name: each for each in map(Requirement, filter(lambda x: not x.startswith("#"), lines))}
    assert all(re.fullmatch(r"==[\w.]+", str(each.specifier)) for each in requirements.values())
    for (system, machine), has_wheel in PLATFORMS.items():
        where = {"sys_platform": system, "platform_machine": machine}
        asked = {name for name, each in requirements.items() if not each.marker or each.marker.evaluate(where)}
        assert set(requirements) - asked == (set() if has_wheel else {"xformers"})
    # The scripts import them; nothing else needs simplejpeg any more.
    assert {"filelock", "psutil"} <= set(requirements) and "simplejpeg" not in requirements
