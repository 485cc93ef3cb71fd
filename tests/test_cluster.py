"""Launch files: what the Slurm scripts do on a signal, what accelerate's files start, a process that dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT, ROOT, flags, load_script

SLURM = sorted((ROOT / "scripts" / "slurm").glob("*.sh"))
CONFIGS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))
TRAINING = [path for path in SLURM if path.name.startswith("train_")]

# Stand-ins for Slurm's commands: srun runs its command in a process group, scancel signals all of it,
# scontrol notes what was asked; and for the launcher with its training process, whose 3 it turns into 1.
STUBS = {
    "srun": """#!/bin/bash
set -m
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0
"$@" & echo $! > $STATE/step; wait $!; code=$?
kill -KILL -- -$! 2>/dev/null; exit $code""",
    "scancel": """#!/bin/bash
echo "$@" >> $STATE/scancel; kill -USR1 -- -$(cat $STATE/step)""",
    "scontrol": """#!/bin/bash
if [[ $1 == show ]]; then echo node0; exit; fi
echo "$@" >> $STATE/scontrol; kill -KILL -- -$(cat $STATE/step) 2>/dev/null; exit 0""",
    "squeue": """#!/bin/bash
echo ${JOB_STATE:-RUNNING}""",
    "accelerate": """#!/bin/bash
printf '%s\\n' "$@" > $STATE/words; env > $STATE/env
[[ -n $FAIL ]] && exit 1
[[ -n $WORK ]] || exit 0
python3 $STATE/bin/train.py || exit 1""",
    "train.py": """
import os, pathlib, signal, sys, time
state = pathlib.Path(os.environ["STATE"])
def save(number, _frame):
    time.sleep(0.3)
    (state / "saved").write_text(signal.Signals(number).name + "\\n")
    sys.exit(3)
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, save)
(state / "up").touch()
time.sleep(60)
""",
}


@pytest.fixture(scope="module")
def teacher(teachers):
    """Return the folder of the tiny SD 1.5 teacher: nothing here depends on the family."""
    return teachers["train_lcm_lora_sd15"]


@pytest.fixture
def job(tmp_path):
    """Return a function that runs a Slurm script with stand-ins: (exit code, folder with what they noted)."""
    (tmp_path / "bin").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "shards").mkdir()
    for number in range(4):
        (tmp_path / "shards" / f"{number:05d}.tar").write_bytes(b"tar")

    def run(script, *words, send=None, **changes):
        variables = {
            "STATE": tmp_path, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "USER": "me",
            "SLURM_JOB_ID": 77,
            "SLURM_NNODES": 2, "SLURM_JOB_NODELIST": "node[0-1]", "SHARDS": tmp_path / "shards",
            "OUTPUT_DIR": tmp_path / "out", "LOCAL_DISK": tmp_path / "local", "SLURM_ARRAY_TASK_ID": 1,
            "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_COUNT": 2, "FAIL": "", "WORK": "",
        } | changes  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(script), *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={name: str(value) for name, value in variables.items()},
        )  # fmt: skip
        if send:
            ends = time.monotonic() + 60
            while not (tmp_path / "up").exists() and time.monotonic() < ends:
                time.sleep(0.02)
            send(process)
        said = process.communicate(timeout=60)[0].decode()
        return process.returncode, said

    return run


def noted(folder, name):
    path = folder / name
    return path.read_text().split("\n")[:-1] if path.exists() else []


def to_the_shell(process):
    """Signal as `--signal=B:USR1` does before the time limit."""
    process.send_signal(signal.SIGUSR1)


def to_the_step(tmp_path):
    """Signal as a preemption does where the cluster does not send the job's own signal: not the shell."""
    return lambda _process: os.killpg(int(noted(tmp_path, "step")[0]), signal.SIGTERM)


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.name)
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_stopped_job_saves_and_requeues_itself(job, tmp_path, script, name):
    send = to_the_shell if name == "SIGUSR1" else to_the_step(tmp_path)
    code, said = job(script, send=send, WORK=1)
    assert noted(tmp_path, "saved") == [name], said
    assert noted(tmp_path, "scancel") == (["--signal=USR1 77"] if name == "SIGUSR1" else [])
    assert noted(tmp_path, "scontrol") == ["requeue 77"] and code == 3 and "requeued" in said


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.name)
def test_a_job_that_fails_or_is_done_or_is_cancelled_is_not_requeued(job, tmp_path, script):
    assert job(script, FAIL=1)[0] == 1 and job(script)[0] == 0
    assert job(script, send=to_the_step(tmp_path), WORK=1, JOB_STATE="COMPLETING")[0] == 3
    assert noted(tmp_path, "scontrol") == []


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.name)
def test_the_training_script_takes_what_a_job_gives(job, tmp_path, script):
    code, said = job(script, "--max_train_steps", "7", STAGE=1, OFFLINE=1, SLURM_GPUS_ON_NODE=8)
    assert code == 0, said
    words = noted(tmp_path, "words")
    number = next(i for i, word in enumerate(words) if word.startswith("train_lcm_lora_"))
    launch = dict(zip(words[1:number:2], words[2:number:2], strict=True))
    assert (ROOT / launch["--config_file"]).is_file()
    assert launch["--num_processes"] == ("16" if "multi_node" in script.name else "8")
    if "multi_node" in script.name:
        assert launch["--num_machines"] == "2" and launch["--main_process_ip"] == "node0"
        assert launch["--machine_rank"] == "0" and 20000 <= int(launch["--main_process_port"]) < 40000
    copied = tmp_path / "local" / "me-lcm-lora" / "shards"
    assert {path.name for path in copied.iterdir()} == {f"{number:05d}.tar" for number in range(4)}
    args = load_script(words[number]).parse_args(words[number + 1 :])
    assert args.max_train_steps == 7 and args.resume_from_checkpoint == "latest"
    assert args.train_shards_path_or_url == [str(copied)] and args.output_dir == str(tmp_path / "out")
    given = dict(line.partition("=")[::2] for line in noted(tmp_path, "env"))
    assert (given["WANDB_RUN_ID"], given["WANDB_RESUME"]) == ("lcm-lora-77", "allow")
    assert given["HF_HUB_OFFLINE"] == "1" and given["TRITON_CACHE_DIR"].startswith(str(tmp_path / "local"))


def test_the_array_shares_the_shards(job, tmp_path):
    script = ROOT / "scripts" / "slurm" / "cache_latents.sh"
    assert job(script, "--resolution", "512")[0] == 0
    words = noted(tmp_path, "words")
    assert [Path(word).name for word in words if word.endswith(".tar")] == ["00001.tar", "00003.tar"]
    assert words[words.index("--output_dir") + 1] == str(tmp_path / "out" / "part-1")
    assert job(script, send=to_the_shell, WORK=1)[0] != 0
    assert noted(tmp_path, "scontrol") == ["requeue 77"]
    assert job(script, SLURM_ARRAY_TASK_ID=5, SLURM_ARRAY_TASK_COUNT=9)[0] == 2


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.name)
def test_a_slurm_script_is_preemptible_and_holds_no_secret(script):
    text = script.read_text()
    options = re.findall(r"^#SBATCH --(.+)$", text, re.MULTILINE)
    assert {"requeue", "open-mode=append"} <= set(options)
    assert any(re.fullmatch(r"signal=B:USR1@\d+", option) for option in options)
    assert not re.search(r"hf_\w{8,}|WANDB_API_KEY|HF_TOKEN|hub_token", text)


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *map(str, SLURM)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_each_file(path):
    from accelerate.commands.config.config_args import load_config_from_file

    record = yaml.safe_load(path.read_text())
    config = load_config_from_file(str(path))
    assert config.num_processes == record["num_processes"] and config.num_machines == record["num_machines"]
    assert str(config.mixed_precision) == record["mixed_precision"]


WRAPPER = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from conftest import load_script
from test_checkpoint import at_call, send

script = load_script("train_lcm_lora_sd15.py")
if os.environ["RANK"] == "1":
    at_call("draw", 3, send(signal.SIGKILL))(script)
sys.exit(script.run(script.parse_args()))
"""


def test_a_killed_process_ends_the_others_and_is_named(teacher, shards, tmp_path):
    wrapper = tmp_path / "killed.py"
    wrapper.write_text(WRAPPER.format(tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "scripts" / "accelerate" / "multi_cpu.yaml"), str(wrapper)]
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=100, checkpointing_steps=2)
    done = subprocess.run(  # one that waits for the dead runs into the time limit
        [*command, *map(str, line)],
        capture_output=True,
        text=True,
        timeout=240,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert re.search(r"exitcode\s*: -9", said) and re.search(r"rank\s*: 1", said), said[-3000:]
    assert (tmp_path / "out" / "checkpoint-2" / "checkpoint.json").is_file()
