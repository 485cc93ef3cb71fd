"""benchmark.py: figures of both recipes, the list of cases with its rows on disk, the table, drawing, the loader."""

import argparse
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, SIDE, load_script

sys.path.insert(0, str(ROOT / "scripts"))
from lib.benchmark import sweep, table

FIGURES = ("samples_per_second", "seconds_per_step", "cpu_seconds_per_step", "allocated_gib")


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


def benchmark(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
    )


FAILING = """
import sys
sys.path[:0] = [{tests!r}]
from conftest import load_script
once = load_script("scripts/lib/benchmark/measure_once.py")
once.sd15.update = lambda _job, batches: next(batches) and 1 / 0
sys.exit(once.exit_code(once.main, sys.argv[1:]))
"""


def fail_with_loader_processes(teacher):
    """A row that fails must end, or no time is left for the rows after it."""
    words = f"--model {teacher} --recipe ours --steps 1 --warmup_steps 1 --resolution {SIDE} --lora_rank 4".split()
    line = [sys.executable, "-c", FAILING.format(tests=str(ROOT / "tests")), *words, "--dataloader_num_workers", "2"]
    failed = subprocess.run(line, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert failed.returncode == 1 and "ZeroDivisionError" in failed.stderr.splitlines()[-1], failed.stderr


def test_both_recipes_are_measured_and_their_losses_agree(teacher, tmp_path):
    file = tmp_path / "figures" / "benchmark.json"
    run = benchmark(
        *("train", "--model", teacher, "--repeats", 1, "--steps", 2, "--warmup_steps", 1, "--json", file),
        *("--resolution", SIDE, "--train_batch_size", 2, "--lora_rank", 4, "--learning_rate", 1e-3),
        *("--mixed_precision", "no", "--use_8bit_adam"),
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(file.read_text())
    (figures,) = report["rounds"]
    for name in FIGURES:
        ours, reference = (figures[recipe][name] for recipe in ("ours", "reference"))
        assert ours > 0 and reference > 0
        assert report["ratios"][name] == [pytest.approx(ours / reference)]
        assert name in run.stdout
    for each in figures.values():
        assert len(each["losses"]) == 3 and len(set(each["losses"])) == 3
    assert report["loss_difference"] < 1e-4  # float32; the third loss follows two updates
    measure_once = load_script("scripts/lib/benchmark/measure_once.py")
    own = SimpleNamespace(model=str(teacher), recipe="reference", cached=False)
    args, trainer = SimpleNamespace(resolution=SIDE, phases=2), SimpleNamespace(start=lambda _args: None)
    with pytest.raises(measure_once.UnusableInput, match="does not know --phases 2"):
        measure_once.make_recipe_job(own, trainer, args, tmp_path)
    fail_with_loader_processes(teacher)
    parent = (
        "import subprocess as s, sys, time; print(s.Popen(sys.argv[1:], stdin=-1).pid, flush=True); time.sleep(60)"
    )
    line = [sys.executable, "-c", parent, sys.executable, sweep.MEASURE_ONCE]
    killed = subprocess.Popen(line, stdout=subprocess.PIPE, env=ENVIRONMENT)
    child = psutil.Process(int(killed.stdout.readline()))
    time.sleep(0.5)  # it imports, which takes seconds
    killed.kill()
    time.sleep(0.5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


WRONG_LINES = {
    "train --model sd14": "sd14",
    "train --steps 0": "--steps",
    "train --recipe fast": "fast",
    "train --all --json x.json --lora_rank 4": "--lora_rank 4",
    "train --all": "--json",
    "table none.json": "none.json",
    "loader --output_dir x --cases 512": "--cases",
    "loader --output_dir x --picture 3": "--picture",
    "train --all --json x.json --minutes nan": "--minutes",
    "train --json /proc/none/x.json": "--json /proc/none: cannot be written to",
    "train --json /dev/null": "--json /dev/null: is no file",
    "loader --output_dir /proc/none": "--output_dir /proc/none: cannot be written to",
}


def test_wrong_flags_end_in_one_line_and_code_2(capsys):
    tool = load_script("scripts/benchmark.py")
    for line, named in WRONG_LINES.items():
        with pytest.raises(SystemExit) as stop:
            tool.parse_args(line.split())
        message = capsys.readouterr().err
        assert stop.value.code == 2 and named in message and message.count("\n") == 1, line


def test_the_cases_hold_all_that_is_asked_for_the_most_telling_first():
    cases = sweep.list_cases()
    assert len({str(case) for case in cases}) == len(cases)
    assert cases[0] == ("sdxl", 4, "fp16", ["checkpointing", "8-bit"])
    assert {case[:2] for case in cases[:5]} == {("sdxl", 1), ("sdxl", 4), ("sdxl", 12), ("sd15", 4), ("sd15", 16)}
    for size in {case[:2] for case in cases}:
        mine = [case for case in cases if case[:2] == size]
        for precision in ("fp16", "bf16"):
            options = [case[3] for case in mine if case[2] == precision]
            assert {"cached" in each for each in options} == {"compile" in each for each in options} == {True, False}
        assert any("4-bit" in case[3] for case in mine)


class Worker:
    """Stands in for a process that measures: its figures, its failure, or one that never ends."""

    def __init__(self, number):
        self.number, self.returncode, self.killed = number, 0, False

    def communicate(self, line=None, timeout=None):
        if line is None:
            return "", ""
        words = json.loads(line)
        if "--compile" in words or "--use_4bit_base" in words:
            raise subprocess.TimeoutExpired("measure", timeout)
        if "12" in words:
            self.returncode = 1
            return "", "Traceback\nRuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"
        figures = dict.fromkeys(sweep.PRINTED, 2.0 if "ours" in words else 1.0)
        return json.dumps(figures | {"device": "GPU", "torch": "2", "cuda": "13"}) + "\n", ""

    def kill(self):
        self.killed = True


def test_each_row_is_written_as_it_is_measured_and_a_cut_run_keeps_them(tmp_path, monkeypatch, capsys):
    workers, written = [], []

    def start(**_streams):
        workers.append(Worker(len(workers)))
        return workers[-1]

    def estimate(_self, row, _case):
        row["estimated_gib"] = 7.0

    def run(self, worker, case, recipe):
        written.append(len(json.loads(args.json.read_text())["rows"]) if args.json.exists() else 0)
        if "compile" in case[3]:
            self.ends = 0  # the time is over
        return plain_run(self, worker, case, recipe)

    plain_run = sweep.Sweep.run
    text, row = "  + validation            0.75\n  peak                   12.14\n  a card of at least     14.36\n", {}
    with monkeypatch.context() as patch:
        done = argparse.Namespace(returncode=0, stdout=text)
        patch.setattr(sweep.subprocess, "run", lambda *_given, **_named: done)
        one = argparse.Namespace(words=lambda *_: ("sdxl", []), seconds_left=lambda: 9)
        sweep.Sweep.estimate(one, row, ())
    assert row == {"estimated_gib": 12.14}
    args = argparse.Namespace(minutes=1, steps=1, warmup_steps=1, tiny=False)
    assert sweep.measure_all(args) == 2 and "--tiny" in capsys.readouterr().err, "without a GPU"
    monkeypatch.setattr(sweep.shutil, "which", lambda _program: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(sweep, "start_worker", start)
    monkeypatch.setattr(sweep.Sweep, "estimate", estimate)
    monkeypatch.setattr(sweep.Sweep, "run", run)
    args.json = tmp_path / "gpu.json"
    assert sweep.measure_all(args) == 0
    report = json.loads(args.json.read_text())
    assert written[:3] == [0, 1, 1] and written == sorted(written)
    assert workers[-1].killed and workers[-2].killed  # the one that imports ahead, and the one that was cut
    first, failed = report["rows"][0], next(row for row in report["rows"] if row["batch"] == 12)
    assert first["ours"]["allocated_gib"] == 2 * first["reference"]["allocated_gib"] and first["estimated_gib"] == 7
    assert failed["ours"] == {"failed": "out of memory"} == failed["reference"]
    assert not any("compile" in row["options"] for row in report["rows"])
    slow = [row for row in report["rows"] if "4-bit" in row["options"]]
    assert slow and all(row["ours"] == {"failed": "not done in 180 s"} and row["reference"] for row in slow)
    shown = capsys.readouterr().out
    assert "| out of memory | out of memory | – |" in shown


def test_the_table_is_written_between_its_markers_or_reads_not_measured(tmp_path):
    row = {"model": "sdxl", "batch": 4, "precision": "fp16", "options": ["cached"], "tiny": False}
    figures = dict.fromkeys(sweep.PRINTED, 3.0)
    report = {"machine": {"device": "H100", "torch": "2.13"}, "rows": [row | {"ours": figures, "estimated_gib": 2.5}]}
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    (tmp_path / "docs").mkdir()
    files = [tmp_path / "README.md", tmp_path / "docs" / "performance.md"]
    for file, kind in zip(files, ("short", "full"), strict=True):
        file.write_text(f"before\n<!-- gpu table: {kind} -->\nold\n<!-- end of gpu table -->\nafter\n")
    assert table.write_tables(tmp_path / "gpu.json", tmp_path) == 0
    for file in files:
        text = file.read_text()
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
        assert "H100" in text and "| SDXL | 1024 px x 4 | fp16 | cached | 3.0" in text
    assert "2.50" in files[1].read_text()
    assert table.write_tables(None, tmp_path) == 0
    assert all("ot measured" in file.read_text() and "H100" not in file.read_text() for file in files)
    files[0].write_text("no place\n")
    assert table.write_tables(None, tmp_path) == 2
    for text in (json.dumps(report | {"rows": []}), "{", "[]", '{"rows": [{}]}', '{"rows": 1}'):
        (tmp_path / "gpu.json").write_text(text)
        assert table.write_tables(tmp_path / "gpu.json", tmp_path) == 2, text


def test_the_documents_have_a_place_for_the_table():
    for path in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        assert len(table.PLACE.findall(path.read_text())) == 1, path


def test_the_loader_is_measured(tmp_path, capsys):
    from lib.benchmark import loader_speed

    tool = load_script("scripts/benchmark.py")
    line = ["loader", "--output_dir", str(tmp_path / "out"), "--cases", "64:32", "--pictures", "4", "--repeats", "1"]
    loader_speed.measure_loader(tool.parse_args(line)[0])
    (record,) = json.loads((tmp_path / "out" / "loader.json").read_text())
    assert record["share"][0] == pytest.approx(record["loader"][0] / record["decode"][0]) and record["loader"][0] > 0
    assert re.search(r"\| 64 px, [\d.]+ kB \| 32 px \| [\d.]+ \(", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("family", "millions", "lora"),
    [("sd15", 859.520964, 67252224), ("sdxl", 2567.463684, 196751360), ("ssd1b", 1331.334404, 104902656)],
)
def test_random_weights_have_the_real_sizes(family, millions, lora):
    from lib.benchmark.real_models import build_unet
    from lib.trainers import sd15
    from peft import LoraConfig

    with torch.device("meta"):
        unet = build_unet(family)
        assert sum(p.numel() for p in unet.parameters()) / 1e6 == pytest.approx(millions)
        targets = sd15.LORA_TARGETS.split(",")
        unet.add_adapter(LoraConfig(r=64, target_modules=targets))
    assert sum(p.numel() for name, p in unet.named_parameters() if "lora_" in name) == lora


def test_a_real_model_is_made_in_half_precision(monkeypatch):
    from lib.benchmark import real_models

    made, plain = [], real_models.build_unet

    def build_unet(model):
        made.append((torch.get_default_dtype(), torch.empty(1).device.type))
        return plain(model)

    monkeypatch.setattr(real_models, "build_unet", build_unet)
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    pipe = real_models.build_teacher("sd15", argparse.Namespace(seed=0), torch.bfloat16, torch.device("meta"), **parts)
    assert made == [(torch.bfloat16, "meta")] and pipe.unet.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
