"""Ways out of a run (issue 17, number 4; issue 18, number 5): each ends every process of the run within seconds."""

import contextlib
import errno
import multiprocessing.connection
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import (
    ENVIRONMENT,
    ROOT,
    SCRIPTS,
    Run,
    at_call,
    flags,
    load_script,
    picture_bytes,
    read_log,
    send,
    write_shard,
)

SECONDS = 15  # from the cause to the last process; idle, all take under 3
WORKERS = {"dataloader_num_workers": 2}


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPTS[0])


@pytest.fixture(scope="module")
def teacher(teachers):
    return teachers["train_lcm_lora_sd15"]


def processes_of(sessions):
    """Return the living processes of some sessions: the runs and all that they started."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def until(condition, seconds=120):
    """Wait for a condition; fails after so many seconds."""
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "did not come to it"
        time.sleep(0.02)


def assert_all_end(sessions, seconds=SECONDS):
    """Fail where processes of the sessions live on; they are killed first."""
    ends = time.monotonic() + seconds
    while (left := processes_of(sessions)) and time.monotonic() < ends:
        time.sleep(0.02)
    for process in left:
        process.kill()
    assert not left, left


def fail(error):
    def raise_it():
        raise error

    return raise_it


@pytest.fixture
def out_of(script, teacher, shards, tmp_path):
    """Return a function that runs with a hook or an act from outside and returns (exit codes, what was printed)."""

    def run(hook=None, act=None, processes=1, data=None, **changes):
        changes = {"max_train_steps": 50, "checkpointing_steps": 50, "validation_steps": -1} | changes
        line = flags(teacher, data or shards, tmp_path / "out", **changes)
        started, codes = Run(script, line, tmp_path / "said", processes=processes, hook=hook), []
        waiter = threading.Thread(target=lambda: codes.extend(started.wait()))  # takes a dead process off the list
        waiter.start()
        try:
            if act:
                act(started)
            if act:
                assert_all_end(started.pids)
            waiter.join(60)
        finally:
            assert_all_end(started.pids, 1 if waiter.is_alive() else SECONDS)
        return codes, "\n".join(started.lines())

    return run


def write_data(folder, *names):
    """Write a shard of eight samples for each name; those of a name with "bad" have no picture."""
    for name in names:
        picture = b"garbage" if "bad" in name else picture_bytes(0)
        write_shard(folder / f"{name}.tar", [{"png": picture, "txt": "sea"} for _ in range(8)])
    return folder


# ----------------------------------------------------------------------------------------------------------
# Errors
# ----------------------------------------------------------------------------------------------------------


def test_4_fewer_samples_than_loader_workers(out_of, tmp_path):
    write_shard(tmp_path / "data" / "one.tar", [{"png": picture_bytes(0), "txt": "sea"}])
    codes, said = out_of(data=tmp_path / "data", **WORKERS)
    assert codes == [2] and "fewer samples than processes x loader workers" in said and "Traceback" not in said


def lose_patience(script):
    script.EMPTY_EPOCHS = 1


def test_4_unusable_data_in_a_loader_worker(out_of, tmp_path):
    codes, said = out_of(lose_patience, data=write_data(tmp_path / "data", "0", "1-bad"), **WORKERS)
    assert codes == [2] and "in 4 epochs: picture cannot be decoded: 32" in said.splitlines()[-1]


def test_4_an_error_in_a_loader_worker(out_of):
    codes, said = out_of(at_call("prepare_sample", 40, fail(MemoryError("no memory"))), **WORKERS)
    assert codes == [1] and "no memory" in said


@pytest.mark.parametrize("name", ["training_loss", "encode", "make_job"])
def test_4_an_error_in_the_run(out_of, name):
    codes, said = out_of(at_call(name, 1, fail(RuntimeError("planted"))), **WORKERS)
    assert codes == [1] and "planted" in said
    if name != "training_loss":
        of_cudnn = "GET was unable to find an engine to execute this computation"
        short = RuntimeError({"encode": "CUDA error: CUBLAS_STATUS_ALLOC_FAILED", "make_job": of_cudnn}[name])
        codes, said = out_of(at_call(name, 1, fail(short)), **WORKERS)
        last = said.splitlines()[-1]
        assert codes == [1] and last.startswith("error: out of GPU memory") and "try --mixed_precision fp16" in last


def limit_files(size):
    """Return what makes each write beyond `size` bytes of a file fail, as on a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("processes", [1, 2])
def test_4_a_full_disk_at_a_checkpoint(out_of, tmp_path, processes):
    hook = at_call("write_checkpoint", 2, limit_files(20_000))
    codes, said = out_of(hook, processes=processes, checkpointing_steps=1, **WORKERS)
    assert codes == [2] * processes and "Traceback" not in said
    last = said.splitlines()[-1]
    assert "checkpoint-2 cannot be written" in last and "--output_dir" in last
    assert load_script(SCRIPTS[0]).read_manifest(tmp_path / "out" / "checkpoint-1")[0], "the one before is whole"


def test_4_a_full_disk_at_the_log(out_of, tmp_path):
    def fill():
        (tmp_path / "out" / "log.jsonl").unlink()
        (tmp_path / "out" / "log.jsonl").symlink_to("/dev/full")

    codes, said = out_of(at_call("update", 2, fill), **WORKERS)
    assert codes == [2] and "Traceback" not in said and os.strerror(errno.ENOSPC) in said.splitlines()[-1]
    killed = fail(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))  # PyTorch raises it anywhere
    (tmp_path / "out" / "log.jsonl").unlink()
    codes, said = out_of(at_call("save_for_peft", 1, killed), **WORKERS)
    assert codes == [1] and said.splitlines()[-1].startswith("error: a loader process failed")
    full = fail(RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nunable to allocate shared memory"))
    codes, said = out_of(at_call("update", 1, full), **WORKERS)
    assert codes == [1] and "/dev/shm may be short" in said.splitlines()[-1] and "Traceback" not in said
    short = fail(RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB"))
    codes, said = out_of(at_call("save_for_peft", 1, short), **WORKERS)
    assert codes == [1] and said.splitlines()[-1].startswith("error: out of GPU memory"), "and no full disk"


@pytest.mark.parametrize("processes", [1, 2])
def test_4_an_error_in_the_final_pictures(out_of, tmp_path, processes):
    hook = at_call("validate", 1, fail(RuntimeError("planted")))
    codes, said = out_of(hook, processes=processes, max_train_steps=2, validation_steps=0, **WORKERS)
    assert codes[0] == 1 and all(codes) and "planted" in said
    assert (tmp_path / "out" / "pytorch_lora_weights.safetensors").is_file()


def test_4_an_upload_error(out_of):
    def refuse(script):
        script.create_repo = lambda name, **_kwargs: SimpleNamespace(repo_id=name)
        script.upload_folder = lambda **_kwargs: fail(OSError("the connection broke"))()

    codes, said = out_of(refuse, max_train_steps=1, push_to_hub=True, **WORKERS)
    assert codes == [0] and "the connection broke" in said and "hf upload" in said


@pytest.mark.parametrize("rank", ["0", "1"])
def test_4_one_process_of_two_fails(out_of, rank):
    """No launcher is there to end the other one."""

    def hook(script):
        if os.environ["RANK"] == rank:
            at_call("training_loss", 2, fail(RuntimeError("planted")))(script)

    codes, said = out_of(hook, processes=2, **WORKERS)
    assert all(codes) and codes[int(rank)] == 1 and "planted" in said


def test_4_bad_input_that_one_process_of_two_meets(out_of):
    """Its words are printed, and it waits for no one."""

    def hook(script):
        if os.environ["RANK"] == "1":
            at_call("load_models", 1, fail(script.UnusableInput("no teacher on this node")))(script)

    codes, said = out_of(hook, processes=2, **WORKERS)
    assert codes[1] == 2 and codes[0] and "error: no teacher on this node" in said


def test_4_a_tracker_that_only_the_main_process_starts(out_of):
    def hook(script):
        script.Accelerator.init_trackers = lambda self, *_: self.is_main_process and fail(ValueError("no key"))()

    codes, said = out_of(hook, processes=2, report_to="tensorboard", **WORKERS)
    assert codes == [2, 2] and said.count("cannot start: no key") == 1


def test_4_one_process_of_two_is_out_of_data(out_of, tmp_path):
    data = write_data(tmp_path / "data", "0", "1-bad")
    codes, said = out_of(lose_patience, data=data, processes=2, seed=1, **WORKERS)
    assert 2 in codes and all(codes) and "in 4 epochs: picture cannot be decoded: " in said


# ----------------------------------------------------------------------------------------------------------
# Signals
# ----------------------------------------------------------------------------------------------------------

STOPPING = ["SIGTERM", "SIGINT"]


@pytest.mark.parametrize("name", STOPPING)
def test_4_a_signal_before_training(out_of, name):
    number = getattr(signal, name)
    place = {"SIGTERM": "draw_teacher", "SIGINT": "make_job"}[name]
    codes, said = out_of(at_call(place, 1, send(number)), validation_steps=1, **WORKERS)
    assert codes == [128 + number] and f"stopped by {name}" in said and "Traceback" not in said


@pytest.mark.parametrize("name", STOPPING)
def test_18_5_the_first_signal_in_training_saves(out_of, tmp_path, name):
    def act(run):
        until(lambda: (tmp_path / "out" / "log.jsonl").exists() and read_log(tmp_path / "out"))
        run.signal(getattr(signal, name))  # to the loader workers too, as a terminal and Slurm do

    codes, said = out_of(act=act, max_train_steps=5000, checkpointing_steps=5000, **WORKERS)
    last = said.splitlines()[-1]
    assert codes == [3] and last.startswith("stopped: ") and name in last and "Traceback" not in said
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    assert folder.name in last and read_log(tmp_path / "out")[-1]["step"] == int(folder.name[11:])


def test_18_5_a_signal_while_a_loader_process_hands_over_a_batch(out_of):
    def hook(_script):
        main, answer = os.getpid(), multiprocessing.connection.answer_challenge

        def interrupted(*args):
            if os.getpid() == main and threading.current_thread() is threading.main_thread():
                send(signal.SIGINT)()
            return answer(*args)

        multiprocessing.connection.answer_challenge = interrupted

    codes, said = out_of(hook, **WORKERS)
    assert codes == [3] and "Traceback" not in said


@pytest.mark.parametrize("first", STOPPING)
def test_18_5_a_second_ctrl_c_ends_at_once(out_of, tmp_path, first):
    def hook(script):
        at_call("training_loss", 2, send(getattr(signal, first)))(script)
        again = lambda: [send(signal.SIGINT)() for _ in range(1 + (first != "SIGINT"))]  # noqa: E731
        at_call("write_checkpoint", 1, again)(script)

    codes, said = out_of(hook, **WORKERS)
    assert codes == [128 + signal.SIGINT] and "Traceback" not in said
    assert not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("name", STOPPING)
@pytest.mark.parametrize("place", ["finish", "validate", "push"])
def test_4_a_signal_after_training(out_of, name, place):
    def hook(script):
        script.create_repo = lambda name, **_kwargs: SimpleNamespace(repo_id=name)
        at_call(place, 1, send(getattr(signal, name)))(script)

    codes, said = out_of(hook, max_train_steps=1, validation_steps=0, push_to_hub=True, **WORKERS)
    assert codes == [3] and "checkpoint-1 is saved" in said.splitlines()[-1] and "Traceback" not in said


def stalling(tmp_path):
    """Return a shard that can be read once, then stalls for ever."""
    (shard,) = write_data(tmp_path / "data", "0").glob("*.tar")
    return f"pipe:test -e {tmp_path}/seen && sleep 3333; touch {tmp_path}/seen; cat {shard}"


def impatient(_script):
    """Look for data that does not come every 2 s instead of 10."""
    alarm = signal.alarm
    signal.alarm = lambda seconds: alarm(seconds // 5)


def stalls(run, commands=1):
    """Return whether so many commands of the run are asleep."""
    asleep = 0
    for process in processes_of(run.pids):
        with contextlib.suppress(psutil.Error):  # it has ended
            asleep += "3333" in process.cmdline()
    return asleep >= commands


@pytest.mark.parametrize("workers", [0, 2])
def test_4_sigterm_while_a_shard_stalls(out_of, tmp_path, workers):
    def act(run):
        until(lambda: stalls(run))
        run.signal(signal.SIGTERM)

    codes, said = out_of(act=act, data=stalling(tmp_path), dataloader_num_workers=workers)
    assert codes in ([3], [128 + signal.SIGTERM]), said  # the second where the first batch is waited for
    assert "SIGTERM" in said.splitlines()[-1] and "Traceback" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_4_sigterm_just_before_a_shard_stalls(out_of, tmp_path, processes):
    def hook(script):
        impatient(script)
        draw = script.draw

        def drawing(*args):  # in the second update, so that the next wait is for ever
            if args[2] == 1:
                script.read_shard = lambda *_args, **_kwargs: time.sleep(3333)
                send(signal.SIGTERM)()
            return draw(*args)

        script.draw = drawing

    data = write_data(tmp_path / "data", *"0123")
    codes, said = out_of(hook, data=data, processes=processes, shuffle_buffer_samples=1, dataloader_num_workers=0,
                         gradient_accumulation_steps=64)  # fmt: skip
    assert all(codes) and "SIGTERM" in said and "Traceback" not in said


def test_4_sigterm_while_the_first_shard_stalls(out_of):
    def act(run):
        until(lambda: stalls(run))
        os.kill(run.pids[0], signal.SIGTERM)

    codes, said = out_of(act=act, data="pipe:sleep 3333")
    assert codes == [128 + signal.SIGTERM] and "stopped by SIGTERM" in said


def test_4_sigterm_to_two_processes_whose_shards_stall(out_of, tmp_path):
    """No update can be finished, so none is saved: they have to end all the same."""

    def act(run):
        until(lambda: stalls(run, commands=2))
        for pid in run.pids:
            os.killpg(pid, signal.SIGTERM)

    codes, said = out_of(impatient, act, data=stalling(tmp_path), processes=2)
    assert all(codes) and "Traceback" not in said, said


@pytest.mark.parametrize("data", ["whole", "stalling"])
@pytest.mark.parametrize("workers", [0, 2])
def test_4_sigkill_of_the_main_process(out_of, tmp_path, data, workers):
    def act(run):
        if data == "stalling":
            until(lambda: stalls(run))
        else:
            until(lambda: (tmp_path / "out" / "log.jsonl").exists() and read_log(tmp_path / "out"))
        os.kill(run.pids[0], signal.SIGKILL)

    shards = stalling(tmp_path) if data == "stalling" else None
    codes, _ = out_of(act=act, data=shards, max_train_steps=5000, dataloader_num_workers=workers)
    assert codes == [-signal.SIGKILL]


def test_4_a_loader_process_that_starts_after_its_run_was_killed_ends(script, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")

    def worker(run):
        while os.getppid() == run:
            time.sleep(0.01)
        script.start_worker(0)
        (tmp_path / "alive").touch()

    def run():
        process = context.Process(target=worker, args=(os.getpid(),))
        process.start()
        (tmp_path / "pid").write_text(str(process.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    process = context.Process(target=run)
    process.start()
    process.join()
    pid = int((tmp_path / "pid").read_text())
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / "alive").exists()

    monkeypatch.setattr(script, "STOP_SIGNALS", [])
    monkeypatch.setattr(script, "end_with_parent", print)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which a loader process replaces
    monkeypatch.delattr(signal, "SIGKILL")  # as on Windows
    script.start_worker(0)


def test_4_a_loader_worker_is_killed(out_of, tmp_path):
    def act(run):
        until(lambda: (tmp_path / "out" / "log.jsonl").exists() and read_log(tmp_path / "out"))
        psutil.Process(run.pids[0]).children()[0].kill()

    codes, said = out_of(act=act, max_train_steps=5000, checkpointing_steps=5000, **WORKERS)
    assert codes == [1] and ("a loader process failed" in said or "Connection" in said)


# ----------------------------------------------------------------------------------------------------------
# Real processes
# ----------------------------------------------------------------------------------------------------------


def start(command, said):
    with said.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], stdout=file, stderr=file, env=ENVIRONMENT, start_new_session=True
        )


@pytest.mark.parametrize("moment", ["imports", "training"])
def test_18_5_sigterm_to_accelerate_launch_reaches_the_training(teacher, shards, tmp_path, moment):
    out, said = tmp_path / "out", tmp_path / "said"
    line = flags(teacher, shards, out, max_train_steps=5000, checkpointing_steps=5000, validation_steps=-1, **WORKERS)
    command = "-m accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no".split()
    process = start([*command, "--dynamo_backend", "no", ROOT / SCRIPTS[0], *line], said)
    if moment == "imports":
        until(lambda: "loading libraries" in said.read_text())
    else:
        until(lambda: (out / "log.jsonl").exists() and read_log(out))
    process.send_signal(signal.SIGTERM)
    process.wait(SECONDS)
    assert_all_end([process.pid], 60 if moment == "imports" else SECONDS)
    if moment == "training":
        assert list(out.glob("checkpoint-*")) and "stopped: " in said.read_text()
        # torchrun, whose end by SIGKILL nobody passes on
        process = start(["-m", "torch.distributed.run", "--standalone", ROOT / SCRIPTS[0], *line], said)
        until(lambda: "resuming from" in said.read_text() and "distilling" in said.read_text())
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(SECONDS)
        assert children and not psutil.wait_procs(children, SECONDS)[1]
    else:
        assert not list(out.glob("checkpoint-*"))


def test_18_5_ctrl_c_while_libraries_load(script, teacher, shards, tmp_path):
    said = tmp_path / "said"
    process = start([Path(script.__file__), *flags(teacher, shards, tmp_path / "out")], said)
    until(lambda: "loading libraries" in said.read_text())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SECONDS) == -signal.SIGINT and "Traceback" not in said.read_text()
