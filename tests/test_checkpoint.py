"""Checkpoints: a run that is killed, stopped or damaged ends as one that was left alone."""

import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import ENVIRONMENT, build_teacher, flags, one_family, read_log, write_shards
from safetensors.torch import load_file, save_file

WEIGHTS = "pytorch_lora_weights.safetensors"
DEADLINE_S = 600  # for a run that hangs; a busy machine can take minutes for one of seconds


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Run:
    """A script's run in forked processes: as its own command, without the seconds that imports take."""

    def __init__(self, script, arguments, said, processes=1, hook=None):
        """Start it; `said` is the file for its output, `hook` is called with the script in each process."""
        self.said = said
        self.pids = []
        port = free_port()
        for rank in range(processes):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
            environment = ENVIRONMENT | {name: str(value) for name, value in world.items() if processes > 1}
            self.pids.append(os.fork())
            if not self.pids[-1]:
                self.become(script, [*map(str, arguments)], environment, hook)

    def become(self, script, arguments, environment, hook):
        """Run the script in this process and leave with its exit code."""
        code = 1
        try:
            os.setsid()
            os.environ.update(environment)
            os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            os.dup2(2, 1)
            sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
            for state in (AcceleratorState, GradientState, PartialState):
                state._shared_state.clear()
            if hook:
                hook(script)
            code = script.run(script.parse_args(arguments))
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def signal(self, number):
        """Send a signal to the first process and everything it started, as a scheduler does."""
        os.killpg(self.pids[0], number)

    def wait(self):
        """Return the exit code of each process, that of a signal negative."""
        codes, ends = {}, time.monotonic() + DEADLINE_S
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > ends:
                    os.killpg(pid, signal.SIGKILL)
            time.sleep(0.01)
        return [codes[pid] for pid in self.pids]

    def lines(self):
        """Return what it said, but for the progress bar, which has to be on lines of its own."""
        lines = re.split(r"[\r\n]+", self.said.read_text())
        return [line for line in lines if line and not line.startswith("distilling")]


def finish(script, arguments, said, expected=0, **kwargs):
    """Run a script to its end and return the lines that it said."""
    run = Run(script, arguments, said, **kwargs)
    codes = run.wait()
    assert set(codes) == {expected}, (codes, run.said.read_text()[-3000:])
    return run.lines()


def at_call(name, when, act):
    """Return a hook that acts at the n-th call of one of the script's functions, or where when(*args)."""

    def hook(script):
        function = getattr(script, name)
        calls = []

        def acting(*args, **kwargs):
            calls.append(1)
            if len(calls) == when if isinstance(when, int) else when(*args):
                act()
            return function(*args, **kwargs)

        setattr(script, name, acting)

    return hook


def send(number):
    return lambda: os.kill(os.getpid(), number)


def results(output_dir):
    """Return what must not depend on where a run was interrupted: the log and the weights."""
    log = [{name: row[name] for name in ("step", "loss", "lr", "grad_norm")} for row in read_log(output_dir)]
    return log, load_file(Path(output_dir) / WEIGHTS)


def assert_same(output_dir, other):
    (log, weights), (other_log, other_weights) = results(output_dir), results(other)
    assert log == other_log
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(value, other_weights[name]) for name, value in weights.items())


def contents(folder):
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def checkpoints(output_dir):
    return {path.name for path in Path(output_dir).glob("checkpoint-*")}


SETTINGS = {
    "max_train_steps": 6, "checkpointing_steps": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.1,
    "dataloader_num_workers": 1, "random_flip": True, "proportion_empty_prompts": 0.2,
    "lr_scheduler": "linear", "checkpoints_total_limit": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(script, teacher, shards, tmp_path_factory):
    """Return the folder of a run of 6 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    finish(script, flags(teacher, shards, folder / "out", **SETTINGS), folder / "said")
    return folder / "out"


@pytest.fixture
def again(script, teacher, shards, tmp_path):
    """Return a function that gives the same command, with changes, in a folder of its own."""

    def run(expected=0, hook=None, **changes):
        line = flags(teacher, shards, tmp_path / "out", **SETTINGS | changes)
        return finish(script, line, tmp_path / f"said-{time.monotonic_ns()}", expected, hook=hook)

    return run


def test_a_run_killed_and_stopped_at_bad_moments_ends_as_an_unbroken_one(again, unbroken, tmp_path):
    out, log = tmp_path / "out", read_log(unbroken)

    def losses_agree(last_step):
        ours = read_log(out)
        assert [row["step"] for row in ours] == list(range(1, last_step + 1))
        assert [row["loss"] for row in ours] == [row["loss"] for row in log[:last_step]]

    kill = send(signal.SIGKILL)
    again(-9, at_call("save_for_peft", 1, kill))  # while checkpoint-2 is being written
    assert (out / ".writing-checkpoint-2").exists() and not checkpoints(out)
    said = again(-9, at_call("prune_checkpoints", 1, kill))  # when it has just got its name
    assert any("starting from update 0" in line for line in said)
    assert checkpoints(out) == {"checkpoint-2"}
    said = again(-9, at_call("draw", 4, kill))  # in the middle of update 4
    assert any(line.endswith("checkpoint-2") and "resuming" in line for line in said)
    assert len(read_log(out)) == 3, "update 3 is lost, and its line has to go"
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0')  # a line that a kill cut short
    # checkpoint-4 lacks only its manifest
    again(-9, at_call("digest", lambda path: ".writing-checkpoint-4" in str(path), kill))
    assert (out / ".writing-checkpoint-4").exists() and checkpoints(out) == {"checkpoint-2"}
    said = again(3, at_call("draw", 1, send(signal.SIGTERM)))
    assert said[-1].startswith("stopped: ") and "SIGTERM" in said[-1] and "checkpoint-3" in said[-1]
    losses_agree(3)
    said = again(3, at_call("draw", 3, send(signal.SIGUSR1)))
    assert said[-1].startswith("stopped: ") and "SIGUSR1" in said[-1] and "checkpoint-5" in said[-1]
    losses_agree(5)
    again()
    assert_same(out, unbroken)
    assert checkpoints(out) == {"checkpoint-5", "checkpoint-6"}, "--checkpoints_total_limit 2"
    assert not [path for path in out.rglob(".writing*") if "log" not in path.name]


@one_family
def test_a_kill_from_outside_at_any_moment(script, teacher, shards, unbroken, tmp_path):
    out = tmp_path / "out"
    line = flags(teacher, shards, out, **SETTINGS)
    for number in range(2):
        run = Run(script, line, tmp_path / f"said-{number}")
        ends = time.monotonic() + DEADLINE_S
        before = checkpoints(out)
        while checkpoints(out) == before and time.monotonic() < ends:
            time.sleep(0.003)
        time.sleep(0.2 * number)
        run.signal(signal.SIGKILL)
        assert run.wait() == [-9]
    finish(script, line, tmp_path / "said")
    assert_same(out, unbroken)


@one_family
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_loader_workers_too_saves_a_checkpoint(script, teacher, shards, tmp_path, number):
    """torchrun signals the process group of each rank, Slurm every process of a step."""
    out = tmp_path / "out"
    line = flags(teacher, shards, out, **SETTINGS | {"max_train_steps": 500, "checkpointing_steps": 500})
    run = Run(script, line, tmp_path / "said")
    ends = time.monotonic() + DEADLINE_S
    while not (out / "log.jsonl").exists() or not read_log(out):
        assert time.monotonic() < ends
        time.sleep(0.05)
    run.signal(number)
    assert run.wait() == [3], run.lines()
    (name,) = checkpoints(out)
    assert read_log(out)[-1]["step"] == int(name.partition("-")[2])
    assert script.read_manifest(out / name)[0]


@one_family
def test_other_settings_are_refused_by_name_and_nothing_is_touched(again, unbroken, teacher, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.copytree(teacher, tmp_path / "other")
    before = contents(out)
    other = str(tmp_path / "other")
    changes = {"max_train_steps": 8, "lora_rank": 8, "w_max": 9.0, "train_batch_size": 1}
    said = again(2, pretrained_teacher_model=other, **changes)
    assert said[-1].startswith("error: ")
    for name, value in changes.items():
        assert f"{name} was " in said[-1] and f"is {value}" in said[-1]
    assert "pretrained_teacher_model was" in said[-1] and other in said[-1]
    assert "seed" not in said[-1]
    assert contents(out) == before


def test_a_damaged_checkpoint_is_passed_over(again, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    file = out / "checkpoint-6" / "optimizer.bin"
    file.write_bytes(file.read_bytes()[:-1])
    said = again()
    assert any("passing over" in line and "checkpoint-6: optimizer.bin is damaged" in line for line in said)
    assert any("resuming from" in line and line.endswith("checkpoint-4") for line in said)
    assert_same(out, unbroken)


@one_family
def test_a_damaged_checkpoint_does_not_push_out_a_new_one(again, unbroken, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(unbroken, out)
    shutil.rmtree(out / "checkpoint-4")
    (out / "checkpoint-6" / "optimizer.bin").write_bytes(b"")
    again(3, at_call("draw", 5, send(signal.SIGTERM)), checkpoints_total_limit=1)
    assert "checkpoint-3" in checkpoints(out)
    again()
    assert_same(out, unbroken)


@one_family
@pytest.mark.parametrize("flag, code", [("use_4bit_base", 0), ("random_flip", 2)])
def test_a_checkpoint_older_than_a_flag_has_its_default(again, unbroken, script, tmp_path, flag, code):
    """Of the two flags SETTINGS has the second."""
    shutil.copytree(unbroken, tmp_path / "out")
    for name in checkpoints(unbroken):
        file = tmp_path / "out" / name / script.MANIFEST_NAME
        manifest = json.loads(file.read_text())
        del manifest["settings"][flag]
        file.write_text(json.dumps(script.seal(manifest)))
    said = again(code)
    wanted = {0: "resuming from .*checkpoint-6", 2: "(random_flip was False, is True)"}[code]
    assert any(re.search(wanted, line) for line in said)


@one_family
def test_more_steps_go_on_from_the_last(script, teacher, shards, tmp_path):
    for steps in (2, 3):
        said = finish(
            script, flags(teacher, shards, tmp_path / "out", max_train_steps=steps), tmp_path / "said"
        )
    assert any("resuming from" in text and text.endswith("checkpoint-2") for text in said)
    finish(script, flags(teacher, shards, tmp_path / "once", max_train_steps=3), tmp_path / "said")
    assert_same(tmp_path / "out", tmp_path / "once")


@one_family
def test_a_loss_that_is_not_finite_stops_the_run(script, shards, tmp_path):
    out, teacher = tmp_path / "out", build_teacher(tmp_path / "teacher")
    finish(script, flags(teacher, shards, out, max_train_steps=2), tmp_path / "said")
    before = contents(out / "checkpoint-2")
    weights = teacher / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"][0] = torch.nan
    save_file(state, weights)
    said = finish(
        script, flags(teacher, shards, out, max_train_steps=6, logging_steps=3), tmp_path / "nan", expected=1
    )
    assert said[-1].startswith("error: ") and "nan at update 3" in said[-1] and "--learning_rate" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert checkpoints(out) == {"checkpoint-2"} and contents(out / "checkpoint-2") == before
    assert [row["step"] for row in read_log(out)] == [1, 2]


@one_family
def test_a_gradient_that_is_not_finite_does_not_reach_a_checkpoint(script, teacher, shards, tmp_path):
    def poison(script):
        distance, calls = script.distance, []

        def without_gradient(pred, *args):
            calls.append(1)
            loss = distance(pred, *args)
            return loss + 0 * torch.sqrt(0 * pred.sum()) if len(calls) == 4 else loss

        script.distance = without_gradient

    out = tmp_path / "out"
    said = finish(script, flags(teacher, shards, out), tmp_path / "said", 1, hook=poison)
    assert said[-1].startswith("error: ") and "update 4" in said[-1]
    assert checkpoints(out) == {"checkpoint-2"}
    for line in (out / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@one_family
def test_new_shards_are_noticed_when_a_run_is_resumed(script, teacher, tmp_path):
    """They would move every position: part of the data would come twice an epoch, part not at all."""
    write_shards(tmp_path / "shards")
    line = flags(teacher, tmp_path / "shards", tmp_path / "out", max_train_steps=2)
    finish(script, line, tmp_path / "said")
    write_shards(tmp_path / "shards", num_shards=3)
    said = finish(script, line, tmp_path / "said", 2)
    assert said[-1].startswith("error: ") and "shards" in said[-1]


@one_family
def test_a_run_goes_on_from_its_own_copy_of_the_script(script, teacher, shards, tmp_path):
    out = tmp_path / "out"

    def be_the_copy(script):
        script.__file__ = str(out / Path(script.__file__).name)

    finish(script, flags(teacher, shards, out, max_train_steps=1), tmp_path / "said")
    finish(script, flags(teacher, shards, out, max_train_steps=2), tmp_path / "said", hook=be_the_copy)
    assert len(read_log(out)) == 2


# ----------------------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------------------


def make_checkpoint(script, output_dir, step, **manifest):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "a").write_text("a")
    manifest = {"global_step": step, "files": {"a": script.digest(folder / "a")}} | manifest
    (folder / script.MANIFEST_NAME).write_text(json.dumps(script.seal(manifest)))
    return folder


def find(script, output_dir, wanted="latest"):
    said = []
    args = mock.Mock(resume_from_checkpoint=str(wanted), output_dir=str(output_dir))
    return script.find_checkpoint(args, said.append)[0], said


def test_the_newest_complete_checkpoint_is_found(script, tmp_path):
    assert find(script, tmp_path) == (None, [])
    for step in (2, 10, 9):
        make_checkpoint(script, tmp_path, step)
    make_checkpoint(script, tmp_path, 11).rename(tmp_path / ".writing-checkpoint-11")
    assert find(script, tmp_path)[0].name == "checkpoint-10"
    damages = {
        "a is damaged": lambda folder: (folder / "a").write_text("b"),
        "checkpoint.json is missing": lambda folder: (folder / "checkpoint.json").unlink(),
        "a is missing": lambda folder: (folder / "a").unlink(),
    }
    for text, (step, damage) in zip(damages, enumerate(damages.values(), 20), strict=True):
        damage(make_checkpoint(script, tmp_path, step))
        folder, said = find(script, tmp_path)
        assert (
            folder.name == "checkpoint-10" and text.split()[-1] in said[0] and f"checkpoint-{step}" in said[0]
        )
        with pytest.raises(script.UnusableInput, match=text.split()[0]):
            find(script, tmp_path, tmp_path / f"checkpoint-{step}")
    for content in ("", "[]", "null", '{"files": 1}', '{"global_step": 30}'):
        (make_checkpoint(script, tmp_path, 30) / "checkpoint.json").write_text(content)
        assert find(script, tmp_path)[0].name == "checkpoint-10"
        shutil.rmtree(tmp_path / "checkpoint-30")


def test_an_earlier_run_is_not_overwritten_by_starting_afresh(script, tmp_path):
    make_checkpoint(script, tmp_path, 2)
    with pytest.raises(script.UnusableInput, match="--resume_from_checkpoint none"):
        find(script, tmp_path, "none")


def test_old_checkpoints_go_and_the_one_just_written_stays(script, tmp_path):
    for step in (2, 9, 10):
        make_checkpoint(script, tmp_path, step)
    (tmp_path / ".writing-checkpoint-10").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    script.prune_checkpoints(tmp_path, None)
    assert checkpoints(tmp_path) == {"checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-notes"}
    script.prune_checkpoints(tmp_path, 2)
    assert checkpoints(tmp_path) == {"checkpoint-9", "checkpoint-10", "checkpoint-notes"}
    assert not (tmp_path / ".writing-checkpoint-10").exists()
