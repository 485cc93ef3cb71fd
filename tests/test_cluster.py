"""Launch files: what the Slurm scripts do on a signal, what accelerate's files start, a process that dies."""

import json
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
from conftest import ENVIRONMENT, ROOT, cases, flags, load_script

SLURM = sorted((ROOT / "scripts" / "launch" / "slurm").glob("*.sh"))
CONFIGS = sorted((ROOT / "scripts" / "launch" / "accelerate").glob("*.yaml"))
TRAIN, CACHE = (ROOT / "scripts" / "launch" / "slurm" / name for name in ("train.sh", "cache_latents.sh"))

# Stand-ins for Slurm's commands: srun runs its command in a process group, scancel signals all of it,
# scontrol notes what was asked; and for the launcher with its training process, whose 3 it turns into 1.
STUBS = {
    "srun": """#!/bin/bash
set -m
[[ $SLURM_EXPORT_ENV == ALL ]] || exit 127  # as after `sbatch --export=NAME=...`, where a step gets little else
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0
"$@" & echo $! > $STATE/step; wait $!; code=$?
kill -KILL -- -$! 2>/dev/null; exit $code""",
    "scancel": """#!/bin/bash
echo "$@" >> $STATE/scancel; kill -USR1 -- -$(cat $STATE/step); sleep 1""",  # it answers after the step's end
    "scontrol": """#!/bin/bash
if [[ $1 == show ]]; then echo node0; exit; fi
echo "$@" >> $STATE/scontrol; kill -KILL -- -$(cat $STATE/step) 2>/dev/null; exit 0""",
    "squeue": """#!/bin/bash
echo "$@" >> $STATE/squeue; echo ${JOB_STATE:-RUNNING}""",
    "torchrun": """#!/bin/bash
printf '%s\\n' $(basename $0) "$@" > $STATE/words; env > $STATE/env
[[ -n $FAIL ]] && exit 1
[[ -n $WORK ]] || exit 0
python3 $STATE/bin/train.py || exit 1""",
    "python": """#!/bin/bash
printf '%s\\n' $(basename $0) "$@" > $STATE/words; env > $STATE/env
[[ -n $FAIL ]] && exit 1
[[ -n $WORK ]] || exit 0
exec python3 $STATE/bin/train.py""",
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
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("export ACTIVATED=1\n")
    for number in range(4):
        (tmp_path / "shards" / f"{number:05d}.tar").write_bytes(b"tar")

    def run(script, *words, send=None, **changes):
        variables = {
            "STATE": tmp_path, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": 77,
            "SLURM_NNODES": 2, "VENV": tmp_path / "venv", "SLURM_JOB_NODELIST": "node[0-1]",
            "SHARDS": tmp_path / "shards",
            "OUTPUT_DIR": tmp_path / "out", "LOCAL_DISK": tmp_path / "local", "SLURM_ARRAY_TASK_ID": 1,
            "SLURM_ARRAY_JOB_ID": 77, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_MAX": 1,
            "SLURM_ARRAY_TASK_COUNT": 2, "FAIL": "", "WORK": "",
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
    return path.read_text(errors="surrogateescape").split("\n")[:-1] if path.exists() else []


def to_the_shell(process):
    """Signal as `--signal=B:USR1` does before the time limit."""
    process.send_signal(signal.SIGUSR1)


def to_the_step(tmp_path):
    """Signal as a preemption does where the cluster does not send the job's own signal: not the shell."""
    return lambda _process: os.killpg(int(noted(tmp_path, "step")[0]), signal.SIGTERM)


# One process runs under plain python, several under torchrun, which turns the exit code 3 into 1.
@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_stopped_job_saves_and_requeues_itself(job, tmp_path, gpus, name):
    send = to_the_shell if name == "SIGUSR1" else to_the_step(tmp_path)
    code, said = job(TRAIN, send=send, WORK=1, SLURM_NNODES=1, SLURM_GPUS_ON_NODE=gpus)
    assert noted(tmp_path, "saved") == [name], said
    assert noted(tmp_path, "words")[0] == ("python" if gpus == 1 else "torchrun")
    assert noted(tmp_path, "scancel") == (["--signal=USR1 77"] if name == "SIGUSR1" else [])
    assert noted(tmp_path, "scontrol") == ["requeue 77"] and code == 3 and "requeued" in said
    if name == "SIGUSR1":  # also while shards are copied, where nothing has to be saved
        (tmp_path / "up").unlink()
        (tmp_path / "bin" / "tar").write_text("#!/bin/bash\ntouch $STATE/up; sleep 60")
        (tmp_path / "bin" / "tar").chmod(0o755)
        code, said = job(TRAIN, send=send, STAGE=1, SLURM_NNODES=1, SLURM_GPUS_ON_NODE=gpus)
        assert code == 3 and noted(tmp_path, "scontrol") == ["requeue 77"] * 2, said


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_job_that_fails_or_is_done_or_is_cancelled_is_not_requeued(job, tmp_path, gpus):
    options = {"SLURM_NNODES": 1, "SLURM_GPUS_ON_NODE": gpus}
    assert job(TRAIN, FAIL=1, **options)[0] == 1 and job(TRAIN, **options)[0] == 0

    def to_all(process):  # as `scancel JOB` and a requeue do
        process.send_signal(signal.SIGTERM)
        to_the_step(tmp_path)(process)

    assert job(TRAIN, send=to_all, WORK=1, JOB_STATE="COMPLETING", **options)[0] == 3
    assert noted(tmp_path, "scontrol") == noted(tmp_path, "scancel") == []
    (tmp_path / "up").unlink()
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\necho busy >&2; exit 1")
    code, said = job(TRAIN, send=to_the_step(tmp_path), WORK=1, **options)
    assert code == 3 and "unknown to squeue; submit it again" in said


@pytest.mark.parametrize(("nodes", "model"), [(1, "sd15"), (2, "sdxl")])
def test_the_training_script_takes_what_a_job_gives(job, tmp_path, nodes, model):
    options = {"SLURM_NNODES": nodes, "MODEL": model, "SLURM_GPUS_ON_NODE": 8, "SLURM_CPUS_PER_TASK": 32}
    (tmp_path / "shards" / "00003.tar").rename(tmp_path / "blob")
    (tmp_path / "shards" / "00003.tar").symlink_to("../blob")  # as in the Hub's cache
    (tmp_path / "shards" / "gone.tar").symlink_to("nowhere")
    code, said = job(TRAIN, "--max_train_steps", "7", STAGE=1, OFFLINE=1, RECIPE=f"{model}-80gb", **options)
    assert code == 0, said
    words = noted(tmp_path, "words")
    number = words.index(f"train_lcm_lora_{model}.py")
    launch = dict(zip(words[1:number:2], words[2:number:2], strict=True))
    assert words[0] == "torchrun" and launch["--nnodes"] == str(nodes) and launch["--nproc_per_node"] == "8"
    assert launch["--master_addr"] == "node0" and launch["--node_rank"] == "0"
    assert 20000 <= int(launch["--master_port"]) < 40000
    variables = dict(line.split("=", 1) for line in noted(tmp_path, "env") if "=" in line)
    assert variables["ACTIVATED"] == variables["HF_HUB_OFFLINE"] == "1" and "USER" not in variables
    assert variables["SRUN_CPUS_PER_TASK"] == "32", "srun gives its step no more than this says"
    local = tmp_path / "local" / f"lcm-lora-{os.getuid()}"
    (copied,) = local.glob("shards-*")
    assert {path.name for path in copied.iterdir()} == {f"{number:05d}.tar" for number in range(4)}
    assert (copied / "00003.tar").read_bytes() == b"tar" and not (copied / "00003.tar").is_symlink()
    args = load_script(words[number]).parse_args(words[number + 1 :])
    assert args.max_train_steps == 7 and args.resume_from_checkpoint == "latest"
    assert args.train_shards_path_or_url == [str(copied)] and args.output_dir == str(tmp_path / "out")
    assert (variables["WANDB_RUN_ID"], variables["WANDB_RESUME"]) == ("lcm-lora-77", "allow")
    assert variables["TRITON_CACHE_DIR"].startswith(str(tmp_path / "local"))
    assert args.dataloader_num_workers == 3 and args.mixed_precision == "fp16"
    # The same files lie in the same place, as a resume needs; others, or half a copy, are not taken for them.
    (tmp_path / "linked").symlink_to("shards")
    options["SHARDS"] = tmp_path / "linked"
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-1" / "checkpoint.json").write_text(json.dumps({"wandb_run": "other"}, indent=1))
    assert job(TRAIN, STAGE=1, **options)[0] == 0
    assert not re.search("^WANDB_RUN_ID", "\n".join(noted(tmp_path, "env")), re.M), "the checkpoint's run goes on"
    (staged,) = {*local.glob("shards-*")} - {copied}
    assert (staged / "00001.tar").read_bytes() == b"tar"
    shutil.rmtree(staged)
    (local / f"{staged.name}.77").mkdir()
    (local / f"{staged.name}.77" / "00009.tar").touch()  # what a job left that is requeued
    assert job(TRAIN, STAGE=1, **options)[0] == 0 and len([*staged.iterdir()]) == 4
    (tmp_path / "shards" / "00001.tar").write_bytes(b"another")
    assert job(TRAIN, STAGE=1, **options)[0] == 0
    found = [(path / "00001.tar").read_bytes() for path in local.glob("shards-*")]
    assert sorted(found) == [b"another", b"tar", b"tar"]


@cases(
    ("changes", "named"),
    [({"MODEL": "sd3"}, "MODEL=sd3"), ({"RECIPE": "sdxl-9gb"}, "sdxl-9gb"), ({"SHARDS": ""}, "SHARDS"),
     ({"OUTPUT_DIR": ""}, "OUTPUT_DIR"), ({"VENV": "/none"}, "VENV=/none"), ({"SLURM_NTASKS": 16}, "--ntasks")],
)  # fmt: skip
def test_a_job_with_unusable_variables_ends_at_once(job, tmp_path, changes, named):
    code, said = job(TRAIN, **changes)
    assert code == 2 and named in said and len(said.splitlines()) == 1
    assert not (tmp_path / "words").exists()


def test_each_job_of_an_array_encodes_its_own_shards(job, tmp_path):
    code, said = job(CACHE, "--resolution", "1024")
    assert code == 0, said
    words = noted(tmp_path, "words")
    assert words[:2] == ["python", "scripts/cache_latents.py"] and words[-2:] == ["--resolution", "1024"]
    first = words.index("--train_shards_path_or_url") + 1
    mine = [str(tmp_path / "shards" / f"{number:05d}.tar") for number in (1, 3)]
    assert words[first : first + 3] == [*mine, "--output_dir"]
    assert "ACTIVATED=1" in noted(tmp_path, "env")
    # 77 alone would be the whole array.
    assert job(CACHE, send=to_the_shell, WORK=1)[0] != 0 and noted(tmp_path, "scontrol") == ["requeue 77_1"]
    assert "--jobs=77_1" in noted(tmp_path, "squeue")[-1]
    (tmp_path / "bin" / "train.py").write_text(STUBS["train.py"].replace("    sys.exit(3)", "    os._exit(143)"))
    (tmp_path / "up").unlink()
    assert job(CACHE, send=to_the_step(tmp_path), WORK=1)[0] == 143
    assert noted(tmp_path, "scontrol") == ["requeue 77_1"] * 2


def test_a_job_takes_the_shards_that_the_training_scripts_would_each_once(job, tmp_path):
    for name in (".writing-00000.tar", "._00000.tar", "00000.tar.part", "00000_stats.json"):
        (tmp_path / "shards" / name).touch()
    (tmp_path / "shards" / "d.tar").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0.tgz").touch()
    Path(os.fsdecode(os.fsencode(tmp_path / "real") + b"/\xe9 1.tar")).touch()  # no UTF-8
    for name in ("x", "y"):
        (tmp_path / "shards" / name).symlink_to("../real")
    assert job(CACHE, PARTS=1, SLURM_ARRAY_TASK_ID=0)[0] == 0
    words = noted(tmp_path, "words")
    found = words[words.index("--train_shards_path_or_url") + 1 : words.index("--output_dir")]
    names = [*(f"{number:05d}.tar" for number in range(4)), "0.tgz", "\udce9 1.tar"]
    assert [path.rpartition("/")[2] for path in found] == names


def test_some_jobs_of_an_array_run_again_and_a_wrong_number_of_jobs_is_refused(job, tmp_path):
    code, said = job(CACHE, SLURM_ARRAY_TASK_ID="")
    assert code == 2 and "no job of an array" in said
    code, said = job(CACHE, SLURM_ARRAY_TASK_ID=9, PARTS=10)
    assert code == 2 and "holds 4 .tar files" in said
    for parts in ("0", "08", "x"):
        code, said = job(CACHE, PARTS=parts)
        assert code == 2 and f"PARTS={parts}: must be" in said
    code, said = job(CACHE, SLURM_ARRAY_TASK_ID=9)
    assert code == 2 and "job 9 is none of 2, 0 to 1" in said
    # PARTS tells how many there were.
    again = {f"SLURM_ARRAY_TASK_{name}": 3 for name in ("ID", "MIN", "MAX")} | {"SLURM_ARRAY_TASK_COUNT": 1}
    assert job(CACHE, **again)[0] == 2 and job(CACHE, PARTS=4, **again)[0] == 0
    words = noted(tmp_path, "words")
    mine = str(tmp_path / "shards" / "00003.tar")
    assert words[words.index("--train_shards_path_or_url") + 1 :][:2] == [mine, "--output_dir"]
    for name in ("part-old", "part-1.old", "part-08.bak"):  # of the user's own
        (tmp_path / "out" / name).mkdir(parents=True)
    assert job(CACHE)[0] == 0
    (tmp_path / "out" / "part-08").mkdir()
    code, said = job(CACHE)
    assert code == 2 and "part-08: is of more than 2 jobs" in said
    (tmp_path / "out" / "part-08").rmdir()
    (tmp_path / "out" / "part-3").mkdir()
    code, said = job(CACHE)  # an array of two after one of four
    assert code == 2 and "part-3: is of more than 2 jobs" in said


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
from conftest import at_call, load_script, send

script = load_script("train_lcm_lora_sd15.py")
if os.environ["RANK"] == "1":
    at_call("draw", 3, send(signal.SIGKILL))(script)
sys.exit(script.run(script.parse_args()))
"""


def test_a_killed_process_ends_the_others_and_is_named(teacher, shards, tmp_path):
    wrapper = tmp_path / "killed.py"
    wrapper.write_text(WRAPPER.format(tests=str(ROOT / "tests")))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "scripts" / "launch" / "accelerate" / "multi_cpu.yaml"), str(wrapper)]
    line = flags(teacher, shards, tmp_path / "out", max_train_steps=100, checkpointing_steps=2)
    done = subprocess.run(  # one that waits for the dead runs into the time limit
        [*command, *map(str, line)], capture_output=True, text=True, timeout=240, env=ENVIRONMENT, cwd=tmp_path
    )
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert re.search(r"exitcode\s*: -9", said) and re.search(r"rank\s*: 1", said), said[-3000:]
    assert (tmp_path / "out" / "checkpoint-2" / "checkpoint.json").is_file()
