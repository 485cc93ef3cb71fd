"""Whole runs on a device that is simulated on the CPU: what a GPU would refuse, and where it would be waited for."""

import functools
import os
import sys

import numpy as np
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import cases, finish, flags, load_script, read_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

NAME = "simulated"
READS = {"_local_scalar_dense", "nonzero", "equal"}  # their result is needed on the CPU
COPIES = {"copy_", "_to_copy"}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device; `inner`, a CPU tensor, has its values."""

    @staticmethod
    def __new__(cls, inner):
        options = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=f"{NAME}:0", **options)
        made.inner = inner
        return made

    @property
    def data(self):
        return torch.Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.inner = other.inner

    def __reduce_ex__(self, protocol):
        return self.inner.__reduce_ex__(protocol)  # torch.save

    def tolist(self):
        Simulated.waits.add(caller())
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, operator, _types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """Sends what is made on the device, or copied to it, through `compute`."""

    waits = set()  # functions of the script in which the CPU waits for the device

    def __torch_dispatch__(self, operator, _types, args=(), kwargs=None):
        return compute(operator, args, kwargs or {})


def caller():
    """Return the name of the innermost function of a training script that is running."""
    frame = sys._getframe()
    while frame and "train_lcm_lora" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame.f_code.co_name if frame else "another"


def compute(operator, args, kwargs):
    """Compute on the CPU; raise what CUDA raises where an operation has tensors of both devices."""
    name, device, tensors = operator._schema.name.partition("::")[2], kwargs.get("device"), []

    def on_cpu(value):
        if isinstance(value, (list, tuple)):
            return [on_cpu(each) for each in value]
        if not isinstance(value, torch.Tensor):
            return value
        tensors.append(value)
        return value.inner if isinstance(value, OnDevice) else value

    given = {key: on_cpu(value) for key, value in kwargs.items()} | ({} if device is None else {"device": "cpu"})
    result = operator(*on_cpu(args), **given)
    is_there = [isinstance(tensor, OnDevice) for tensor in tensors]
    goes_there = any(is_there) if device is None else torch.device(device).type == NAME
    others = [tensor for tensor, there in zip(tensors, is_there, strict=True) if not there and tensor.ndim]
    if any(is_there) and others and name not in COPIES:
        raise RuntimeError(f"{operator} has tensors on the device and on the CPU, in {caller()}")
    if any(is_there) and (name in READS or (name in COPIES and not (goes_there and is_there[0]))):
        Simulated.waits.add(caller())
    if operator._schema.is_mutable:
        return kwargs.get("out", args[0] if isinstance(args[0], torch.Tensor) else None)
    return tree_map_only(torch.Tensor, OnDevice, result) if goes_there else result


def simulate(script, waits):
    """Let a run of the script, in a process of its own, compute on the device; note where it waits in a file."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes its numbers on the CPU and copies them
    check_launch, to_bytes, run = script.check_launch, script.tensors_to_bytes, script.run

    def choose_device(accelerator):
        check_launch(accelerator)
        os.environ["ACCELERATE_USE_CPU"] = "false"
        for state in (PartialState, AcceleratorState):
            state._shared_state["device"] = torch.device(f"{NAME}:0")

    def noted(args):
        with Simulated():
            code = run(args)
        waits.write_text(" ".join(sorted(Simulated.waits)))
        return code

    script.check_launch, script.run = choose_device, noted
    script.tensors_to_bytes = lambda tensors, *rest: to_bytes({n: t.cpu() for n, t in tensors.items()}, *rest)


# Once when the models are described, at every line of the log, and where files are written.
MAY_WAIT = {"describe_models", "flush", "train", "kohya_weights", "save_for_peft"}
RUN = {"max_train_steps": 2, "logging_steps": 2, "lora_dropout": 0.2, "proportion_empty_prompts": 0.5}
PHASES = {"phases": 2, "loss_space": "epsilon", "num_ddim_timesteps": 10, "train_batch_size": 12}
MATCHING = {"objective": "matching", "fake_warmup_steps": 1, "student_steps": 2}


@cases("family, own", [("sd15", PHASES), ("sdxl", MATCHING)], ids=["phases", "matching"])
def test_an_update_runs_on_another_device_and_waits_for_it_only_to_log_and_save(
    teachers, shards, tmp_path, family, own
):
    name = f"train_lcm_lora_{family}"
    script, line = load_script(f"{name}.py"), functools.partial(flags, teachers[name], shards)
    if own is MATCHING:
        finish(script, line(tmp_path / "lora", max_train_steps=1), tmp_path / "lora.txt")
        own = own | {"init_lora": tmp_path / "lora"}
    finish(script, line(tmp_path / "cpu", **RUN | own), tmp_path / "cpu.txt")
    hook = functools.partial(simulate, waits=tmp_path / "waits")
    finish(script, line(tmp_path / "device", **RUN | own), tmp_path / "device.txt", hook=hook)
    losses = [[(row["loss"], row["grad_norm"]) for row in read_log(tmp_path / place)] for place in ("cpu", "device")]
    assert np.allclose(*losses, rtol=1e-3) and len(losses[0]) == 2
    waits = set((tmp_path / "waits").read_text().split())
    assert waits <= MAY_WAIT and "flush" in waits, "which shows that it did run there"
