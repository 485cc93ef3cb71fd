"""What only a GPU can prove. Without CUDA all of it is skipped; LCM_GPU_TESTS_ON=cpu runs what a CPU can.

bash scripts/test.sh --gpu                        # under 4 minutes on one H100
LCM_GPU_TESTS_ON=cpu bash scripts/test.sh --gpu   # the same tests' logic, to know that the file is sound
"""

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import FAMILIES, ROOT, SCRIPTS, flags, load_script, write_shards
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(ROOT / "scripts"))
ON_CPU = os.environ.get("LCM_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if ON_CPU else "cuda")
HALF = "bf16" if ON_CPU else "fp16"  # accelerate refuses fp16 on a CPU
REASON = "needs a CUDA GPU (LCM_GPU_TESTS_ON=cpu runs what a CPU can)"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not ON_CPU and not torch.cuda.is_available(), reason=REASON)]
cuda_only = pytest.mark.skipif(ON_CPU, reason="measures what only a GPU does")
both = pytest.mark.parametrize("script", SCRIPTS, ids=FAMILIES, indirect=True)
sdxl = pytest.mark.parametrize("script", SCRIPTS[1:], ids=FAMILIES[1:], indirect=True)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
GIB = 2**30


def choose(device):
    """Let the next Accelerator compute on a device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_CPU"] = str(torch.device(device).type == "cpu").lower()


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")  # put back after the test
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions are compared closely
    choose(DEVICE)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def demo(script):
    """Return the demo teacher of a script's family, trained, with layers that 4 bits can pack."""
    return ROOT / "assets" / f"demo-teacher-{script.__name__.rpartition('_')[2]}"


@pytest.fixture(scope="module")
def large_shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-shards")
    write_shards(folder, side=64)
    return str(folder)


@pytest.fixture
def make(script, large_shards, tmp_path):
    """Return a function that makes (job of the demo teacher, its batches)."""

    def make(device=DEVICE, cache=None, **changes):
        choose(device)
        if changes.get("mixed_precision") == "bf16" and not (ON_CPU or torch.cuda.is_bf16_supported(False)):
            pytest.skip("needs a GPU that computes in bfloat16")
        values = {"resolution": 64, "lora_alpha": None, "output_dir": tmp_path / "out"} | changes
        args = script.parse_args(flags(demo(script), cache or large_shards, **values))
        accelerator = script.start(args)
        shards = script.list_shards(args.train_shards_path_or_url)
        samples, _, head = script.audit(shards, args)
        job = script.make_job(args, accelerator, samples, head, script.RunState())
        loader = script.make_loader(script.make_stream(job, shards, 0, head), 0, accelerator.device)
        return job, iter(loader)

    return make


def parameters_of(job):
    return [parameter for parameter in job.student_unet.parameters() if parameter.requires_grad]


def one_loss(script, job, batches):
    """Return (loss, gradients as one float64 vector on the CPU) of one batch."""
    batch = script.next_batch(job, batches, {})
    loss = script.batch_loss(job, batch, 0)
    loss.backward()
    grads = [parameter.grad.double().flatten().cpu() for parameter in parameters_of(job)]
    job.optimizer.zero_grad()
    return loss.item(), torch.cat(grads)


def moved(job, scale=0.02):
    """Give the LoRA's B values that are not zero, so that every gradient flows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in job.student_unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return job


def cosine(first, second):
    return functional.cosine_similarity(first, second, dim=0).item()


class Operations(TorchDispatchMode):
    """Counts the operations that PyTorch dispatches."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def kernels():
    """Profile a block; give the list of the names of kernels and CUDA calls, filled afterwards."""
    names = []
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield names
        torch.cuda.synchronize()
    names += [event.name for event in profile.events()]


@both
@pytest.mark.parametrize("precision", ["no", "bf16"] if ON_CPU else ["no", "fp16", "bf16"])
def test_01_loss_and_gradients_equal_those_of_the_cpu(script, make, precision):
    job, batches = make("cpu")
    expected, grads = one_loss(script, moved(job), batches)
    job, batches = make(mixed_precision=precision)
    loss, found = one_loss(script, moved(job), batches)
    assert all(parameter.dtype == torch.float32 for parameter in parameters_of(job))
    assert found.isfinite().all()
    assert loss == pytest.approx(expected, rel={"no": 1e-3, "fp16": 2e-2, "bf16": 1e-1}[precision])
    assert cosine(found, grads) > {"no": 0.9999, "fp16": 0.998, "bf16": 0.98}[precision]


def fixed_loss(script, job, batch):
    """Return the mean loss of one batch with four draws that do not change from update to update."""
    with torch.no_grad(), mock.patch.object(job.state, "global_step", 0):
        return sum(script.batch_loss(job, batch, number).item() for number in range(4)) / 4


@both
def test_02_half_precision_trains(script, make, tmp_path):
    job, batches = make(mixed_precision=HALF, train_batch_size=8, learning_rate=3e-4)
    batch = script.next_batch(job, batches, {})
    untrained = fixed_loss(script, job, batch)
    before = torch.cat([parameter.detach().flatten().clone() for parameter in parameters_of(job)])
    losses, norms = zip(*[script.update(job, batches) for _ in range(10 if ON_CPU else 30)], strict=True)
    assert all(loss.isfinite() for loss in losses)
    after = torch.cat([parameter.detach().flatten() for parameter in parameters_of(job)])
    assert (after != before).float().mean() > 0.5
    assert fixed_loss(script, job, batch) < untrained
    if job.accelerator.scaler:
        assert sum(not norm.isfinite() for norm in norms) <= 3 and job.accelerator.scaler.get_scale() >= 1024
    start = tmp_path / "start.safetensors"
    script.save_lora(job.student_unet, start, job.args)
    values = {"objective": "matching", "init_lora": start, "fake_warmup_steps": 2, "gradient_accumulation_steps": 2}
    job, batches = make(mixed_precision=HALF, **values)
    before = [parameter.detach().clone() for parameter in parameters_of(job)]
    losses = [script.update(job, batches)[0] for _ in range(6)]
    assert all(value.isfinite() for value in [*losses, job.fake.watched["fake_loss"], job.fake.watched["x_std"]])
    assert job.state.global_step == 6 and losses[-1].device.type == torch.device(DEVICE).type
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters_of(job), strict=True))


@sdxl
def test_03_a_collapsed_loss_scale_ends_the_run(script, make, monkeypatch, tmp_path):
    job, batches = make(mixed_precision=HALF)
    (tmp_path / "out").mkdir()
    plain = script.batch_loss
    monkeypatch.setattr(script, "batch_loss", lambda *words: plain(*words) * torch.inf)
    log = script.Log(job)
    with pytest.raises(script.NonFiniteLoss):
        for step in range(25):
            _, norm = script.update(job, batches)
            log.add(step, torch.zeros((), device=DEVICE), norm, 1e-4)
            log.flush()


@pytest.mark.parametrize("precision", ["no", "bf16"] if ON_CPU else ["no", "fp16", "bf16"])
@both
def test_04_lora_layers_equal_float64(script, precision):
    torch.manual_seed(0)
    net = torch.nn.Module()
    net.linear, net.conv = torch.nn.Linear(128, 192), torch.nn.Conv2d(64, 96, 3, 2, 1)
    net.point = torch.nn.Conv2d(64, 32, 1)
    inputs = {
        "linear": torch.randn(3, 40, 128), "conv": torch.randn(2, 64, 16, 16).to(memory_format=torch.channels_last),
        "point": torch.randn(2, 64, 16, 16).transpose(2, 3),
    }  # fmt: skip
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(inputs))
    config._register_custom_module({torch.nn.Linear: script.LoraLinear, torch.nn.Conv2d: script.LoraConv2d})
    net = inject_adapter_in_model(config, net.requires_grad_(False))
    tolerance = {"no": 1e-4, "fp16": 4e-3, "bf16": 3e-2}[precision]
    for name, x in inputs.items():
        layer = getattr(net, name)
        with torch.no_grad():
            layer.lora_B["default"].weight.normal_(std=0.05)
        results = []
        for device, dtype in (("cpu", torch.float64), (DEVICE, DTYPES[precision])):
            one = copy.deepcopy(layer).to(device)
            one.base_layer.to(dtype)
            one.lora_A.to(torch.float64 if dtype == torch.float64 else torch.float32)
            one.lora_B.to(torch.float64 if dtype == torch.float64 else torch.float32)
            taken = x.to(device, dtype).requires_grad_()
            output = one(taken)
            output.backward(torch.ones((), device=device, dtype=dtype).expand_as(output))
            grads = taken.grad, one.lora_A["default"].weight.grad, one.lora_B["default"].weight.grad
            results.append([each.double().cpu() for each in (output.detach(), *grads)])
        for expected, found in zip(*results, strict=True):
            assert (found - expected).norm() <= tolerance * expected.norm(), name


@cuda_only
@both
@pytest.mark.parametrize("cached", [False, True], ids=["pictures", "cache"])
def test_05_no_update_waits_for_the_gpu(script, make, cached, large_shards, tmp_path):
    cache = make_cache(script, large_shards, tmp_path) if cached else None
    job, batches = make(mixed_precision="bf16", cache=cache, phases=1 if cached else 2, num_ddim_timesteps=10)
    for _ in range(2):
        script.update(job, batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            script.update(job, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@sdxl
def test_06_8_bit_adam_equals_bitsandbytes_and_does_not_wait(script):
    import bitsandbytes

    torch.manual_seed(0)
    start, grads = torch.randn(40, 64, 128), torch.randn(3, 40, 64, 128)
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    results = []
    for build in (lambda given: bitsandbytes.optim.AdamW8bit(given, **options),
                  lambda given: script.adam_8bit(given, **options)):  # fmt: skip
        given = [torch.nn.Parameter(each.clone().to(DEVICE)) for each in start]
        optimizer = build(given)
        for each in grads:
            for parameter, grad in zip(given, each, strict=True):
                parameter.grad = grad.to(DEVICE)
            optimizer.step()
        results.append(torch.stack([parameter.detach() for parameter in given]))
    assert torch.equal(*results)
    if not ON_CPU:
        with kernels() as names:
            optimizer.step()
        assert sum("Synchronize" in name for name in names) < 10  # the profiler's own; bitsandbytes' step has 40


@both
def test_07_an_update_takes_no_more_operations_than_recorded(script, make):
    job, batches = make(mixed_precision="bf16")
    script.update(job, batches)
    with Operations() as operations:
        script.update(job, batches)
    recorded = {"sd15": 7515, "sdxl": 11175}[script.__name__.rpartition("_")[2]]
    assert operations.count <= 1.05 * recorded, operations.count


@both
def test_08_checkpointing_changes_memory_alone(script, make):
    found = []
    for changes in ({}, {"gradient_checkpointing": True}):
        job, batches = make(mixed_precision="bf16", train_batch_size=8, **changes)
        moved(job)
        assert not job.student_unet.training
        peak = 0
        if not ON_CPU:
            torch.cuda.reset_peak_memory_stats()
        loss, grads = one_loss(script, job, batches)
        if not ON_CPU:
            peak = torch.cuda.max_memory_allocated()
        found.append((loss, grads, peak))
    (loss, grads, peak), (other_loss, other_grads, lower) = found
    assert other_loss == pytest.approx(loss, rel=1e-3) and cosine(grads, other_grads) > 0.9999
    assert ON_CPU or lower < peak


@both
def test_09_the_teacher_has_no_weights_of_its_own(script, make):
    job, _ = make(mixed_precision="bf16")
    own = {tensor.data_ptr() for tensor in job.student_unet.parameters() if not tensor.requires_grad}
    theirs = [*job.teacher_unet.parameters(), *job.teacher_unet.buffers()]
    assert not any(tensor.is_meta for tensor in theirs) and {tensor.data_ptr() for tensor in theirs} <= own
    if not ON_CPU:
        before = torch.cuda.memory_allocated()
        twin = script.make_twin(job.teacher_unet)
        assert torch.cuda.memory_allocated() - before < 2**20 and twin is not None


def measured(model, *words):
    """Return the figures of the training script's recipe, measured in a process of its own."""
    from lib.benchmark.sweep import MEASURE_ONCE

    line = ["--model", model, "--recipe", "ours", "--steps", "3", "--warmup_steps", "2", *words]
    environment = os.environ | {"ACCELERATE_USE_CPU": str(ON_CPU).lower()}
    done = subprocess.run(
        [sys.executable, str(MEASURE_ONCE), *line], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def estimated_gib(model, *words):
    tool = load_script("scripts/estimate_memory.py")
    own, rest = tool.parse_args(["--model", model, "--validation_steps", "-1", *words])
    _, fixed, peaks = tool.count_memory(own, rest)
    return tool.peak_gib_of(fixed, peaks)


def test_10_sdxl_takes_what_is_estimated():
    words = ["--train_batch_size", "2", "--mixed_precision", HALF, "--gradient_checkpointing", "--cached"]
    figures = measured("demo-sdxl" if ON_CPU else "sdxl", *words)
    print({name: figures[name] for name in ("allocated_gib", "reserved_gib", "samples_per_second")})
    assert all(math.isfinite(loss) for loss in figures["losses"])
    if not ON_CPU:
        assert 0.9 <= figures["allocated_gib"] / estimated_gib("sdxl", *words) <= 1.15


def test_11_sd15_from_pictures_takes_what_is_estimated():
    words = ["--train_batch_size", "4", "--mixed_precision", HALF, "--use_8bit_adam"]
    figures = measured("demo" if ON_CPU else "sd15", *words)
    print({name: figures[name] for name in ("allocated_gib", "reserved_gib", "samples_per_second")})
    assert all(math.isfinite(loss) for loss in figures["losses"])
    if not ON_CPU:
        assert 0.9 <= figures["allocated_gib"] / estimated_gib("sd15", *words) <= 1.15


@cuda_only
@sdxl
def test_12_a_vae_in_float32_encodes_one_picture_at_a_time(script, monkeypatch):
    from lib.benchmark.real_models import published_parts

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # as in a run; without, workspaces are others
    with torch.device(DEVICE):
        vae = published_parts("sdxl")[2]["vae"]().requires_grad_(False).eval()
        pixels = torch.randint(0, 256, (4, 1024, 1024, 3), dtype=torch.uint8)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        moments = script.encode_moments(vae, pixels, argparse.Namespace(vae_encode_batch_size=4))
    assert moments.isfinite().all() and torch.cuda.max_memory_allocated() <= 3.5 * GIB


@sdxl
@pytest.mark.parametrize("precision", ["no", "bf16"] if ON_CPU else ["no", "fp16", "bf16"])
def test_13_4_bit_layers_equal_their_unpacked_weights(script, precision):
    import bitsandbytes

    dtype = DTYPES[precision]
    for inputs, rows in ((320, 1), (640, 8), (1280, 77), (2048, 924), (640, 4096)):
        torch.manual_seed(0)
        unet = torch.nn.Module()
        unet.attentions = torch.nn.Module()
        unet.attentions.to_q = torch.nn.Linear(inputs, 640, dtype=dtype)
        holder = torch.nn.Module()
        holder.down = unet
        script.quantize_4bit(holder)
        packed = holder.requires_grad_(False).to(DEVICE).down.attentions.to_q
        whole = bitsandbytes.functional.dequantize_4bit(packed.weight.data, packed.weight.quant_state)
        x = torch.randn(rows, inputs, device=DEVICE, dtype=dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        output, expected = packed(x), functional.linear(y, whole.to(dtype), packed.bias)
        grad = torch.randn_like(output)
        output.backward(grad)
        expected.backward(grad)
        for found, wanted in ((output, expected), (x.grad, y.grad)):
            assert (found - wanted).norm() <= {"no": 1e-3, "fp16": 1e-2, "bf16": 2e-2}[precision] * wanted.norm()


@both
def test_14_4_bit_training(script, make):
    options = {"mixed_precision": HALF, "gradient_checkpointing": True, "train_batch_size": 8}
    job, batches = make(**options)
    whole = [script.update(job, batches)[0].item() for _ in range(3)]
    job, batches = make(**options, use_4bit_base=True)
    packed = [script.update(job, batches)[0].item() for _ in range(3)]
    assert packed == pytest.approx(whole, rel=0.2) and packed != whole
    layers = [
        (name, module) for name, module in job.teacher_unet.named_modules() if type(module).__name__ == "Linear4bit"
    ]
    assert layers
    for name, module in layers:
        student = job.student_unet.get_submodule(name)
        student = getattr(student, "base_layer", student)
        assert student.weight.data_ptr() == module.weight.data_ptr() and module.weight.dtype == torch.uint8


@both
@pytest.mark.parametrize("kind", ["fused", "8-bit"])
def test_15_the_optimizer_state_survives_a_file(script, make, kind, tmp_path):
    job, batches = make(use_8bit_adam=True if kind == "8-bit" else None)
    for _ in range(2):
        script.update(job, batches)
    torch.save(job.optimizer.state_dict(), tmp_path / "state.pt")
    weights = [parameter.detach().clone() for parameter in parameters_of(job)]
    ends = []
    for reload in (False, True):
        with torch.no_grad():
            for parameter, weight in zip(parameters_of(job), weights, strict=True):
                parameter.copy_(weight)
        if reload:
            state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
            job.optimizer.load_state_dict(state)
        for number in range(3):
            generator = torch.Generator().manual_seed(number)
            for parameter in parameters_of(job):
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(DEVICE)
            job.optimizer.step()
        ends.append(torch.cat([parameter.detach().flatten() for parameter in parameters_of(job)]))
    assert torch.equal(*ends)


@both
def test_16_a_resumed_run_equals_an_unbroken_one(script, make, tmp_path):
    job, batches = make(mixed_precision=HALF)
    unbroken = [script.update(job, batches)[0].item() for _ in range(4)]
    job, batches = make(mixed_precision=HALF)
    losses = [script.update(job, batches)[0].item() for _ in range(2)]
    (tmp_path / "out").mkdir(exist_ok=True)
    script.save_checkpoint(job, {})
    (folder,) = (tmp_path / "out").glob("checkpoint-2")
    job, batches = make(mixed_precision=HALF)
    for _ in range(2):
        next(batches)
    script.load_checkpoint(job, folder, script.read_manifest(folder)[0])
    losses += [script.update(job, batches)[0].item() for _ in range(2)]
    assert losses == (unbroken if ON_CPU else pytest.approx(unbroken, rel=1e-3))


@cuda_only
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_17_attention_is_fused(precision):
    dtype = DTYPES[precision]
    for dim, length, needs_grad in ((40, 4096, True), (64, 4096, True), (80, 1024, True), (160, 256, True),
                                    (512, 4096, False)):  # fmt: skip
        query = torch.randn(1, 8, length, dim, device=DEVICE, dtype=dtype, requires_grad=needs_grad)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with kernels() as names:
            output = functional.scaled_dot_product_attention(query, query, query)
            if needs_grad:
                output.sum().backward()
        assert not any("softmax" in name.lower() for name in names), (dim, names)
        matrix = 8 * length * length * 2
        assert length < 1024 or torch.cuda.max_memory_allocated() - before < matrix, dim


@sdxl
def test_18_the_xformers_flag_never_ends_in_a_traceback(script, make):
    job, batches = make(mixed_precision=HALF)
    expected = one_loss(script, job, batches)[0]
    job, batches = make(mixed_precision=HALF, enable_xformers_memory_efficient_attention=True)
    assert one_loss(script, job, batches)[0] == pytest.approx(expected, rel=1e-2)


@cuda_only
@sdxl
@pytest.mark.parametrize("checkpointing", [None, True], ids=["plain", "checkpointing"])
def test_19_compiled_blocks_are_not_compiled_again(script, make, checkpointing, tmp_path):
    job, batches = make(mixed_precision="bf16", gradient_checkpointing=checkpointing)
    expected = [script.update(job, batches)[0].item() for _ in range(2)]
    job, batches = make(mixed_precision="bf16", gradient_checkpointing=checkpointing, compile=True)
    found = [script.update(job, batches)[0].item()]
    with torch.compiler.set_stance("fail_on_recompile"):
        found.append(script.update(job, batches)[0].item())
    assert found == pytest.approx(expected, rel=3e-2)
    script.save_lora(job.student_unet, tmp_path / "lora.safetensors", job.args)
    from safetensors.torch import load_file

    assert not any("_orig_mod" in name for name in load_file(tmp_path / "lora.safetensors"))


@both
def test_20_what_a_machine_cannot_do_is_told(script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend="NO"))
    turing = SimpleNamespace(
        device=torch.device("cuda"), mixed_precision="bf16", num_processes=1, state=state,
        distributed_type=script.DistributedType.NO,
    )  # fmt: skip
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(script.UnusableInput, match="use fp16"):
        script.check_launch(turing)
    turing.mixed_precision = "fp16"
    script.check_launch(turing)
    assert "Tesla T4" in script.describe_device(turing)
    monkeypatch.setattr(script.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    turing.device = torch.device("cpu")
    assert script.describe_device(turing).count("\nwarning") == 1


@cuda_only
@sdxl
def test_21_the_encoder_computes_in_one_memory_layout(script):
    from lib.benchmark.real_models import published_parts

    torch.manual_seed(0)
    vae = published_parts("sdxl")[2]["vae"]().requires_grad_(False).eval()
    pixels = torch.randint(0, 256, (2, 256, 256, 3), dtype=torch.uint8)
    args = argparse.Namespace(vae_encode_batch_size=2)
    with torch.no_grad():
        expected = script.encode_moments(vae, pixels, args)
        vae.to(DEVICE, torch.bfloat16)
        pixels = pixels.to(DEVICE)
        script.encode_moments(vae, pixels, args)
        with kernels() as names:
            found = script.encode_moments(vae, pixels, args)
    assert (found.cpu() - expected).norm() <= 5e-2 * expected.norm()
    assert sum("nchwToNhwc" in name or "nhwcToNchw" in name for name in names) <= 4 * 2 * 23


@both
def test_22_validation_leaves_training_alone(script, make, tmp_path):
    found = []
    for draws in (False, True):
        job, batches = make(mixed_precision=HALF)
        script.update(job, batches)
        (tmp_path / "out").mkdir(exist_ok=True)
        grads = [parameter.requires_grad for parameter in job.student_unet.parameters()]
        if draws:
            pictures = script.validate(job)
            assert all(picture.getextrema() != ((0, 0),) * 3 for each in pictures.values() for picture in each)
        assert [parameter.requires_grad for parameter in job.student_unet.parameters()] == grads
        found.append([script.update(job, batches)[0].item() for _ in range(2)])
    assert found[0] == pytest.approx(found[1], rel=0 if ON_CPU else 1e-3)


def run_script(script, tmp_path, large_shards, launcher=(), **changes):
    """Start the training script as a user would; return (process, its output folder)."""
    folder = tmp_path / "run"
    values = {"resolution": 64, "lora_alpha": None, "mixed_precision": HALF, "validation_steps": -1} | changes
    line = flags(demo(script), large_shards, folder, **values)
    environment = os.environ | {"ACCELERATE_USE_CPU": str(ON_CPU).lower(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / f"{script.__name__}.py"), *line], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return process, folder


@sdxl
def test_23_loader_workers_and_signals(script, tmp_path, large_shards):
    changes = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "dataloader_num_workers": 2}
    process, folder = run_script(script, tmp_path, large_shards, **changes)
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 3, printed[-3000:]
    assert len(list(folder.glob("checkpoint-*"))) == 1


def make_cache(script, large_shards, tmp_path, precision=HALF):
    """Return the folder of the shards' cached tensors."""
    words = ["--mixed_precision", precision, "--resolution", "64", "--train_shards_path_or_url", large_shards]
    words += ["--pretrained_teacher_model", str(demo(script)), "--output_dir", str(tmp_path / "cache")]
    environment = os.environ | {"ACCELERATE_USE_CPU": str(ON_CPU).lower()}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "cache_latents.py"), *words], capture_output=True, text=True,
        timeout=120, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path / "cache"


@sdxl
def test_24_tools(script, make, large_shards, tmp_path):
    cache = make_cache(script, large_shards, tmp_path)
    losses = []
    for source in (None, cache):
        job, batches = make(mixed_precision=HALF, cache=source, center_crop=None)
        losses.append(one_loss(script, moved(job), batches)[0])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    from lib.pipelines import draw, set_sampler

    pipe = script.load_teacher(job.args, DTYPES[HALF], DEVICE)
    set_sampler(pipe, "ddim")
    pictures, _ = draw(pipe, ["a lake", "the sea"], 2, 5.0, [0, 1], resolution=64)
    assert len(pictures) == 2 and all(picture.size == (64, 64) for picture in pictures)
    if not ON_CPU:
        from lib.benchmark.real_models import published_parts

        with torch.device(DEVICE):
            vae = published_parts("sdxl")[2]["vae"]().requires_grad_(False).eval()
        vae.enable_slicing()
        torch.backends.cudnn.allow_tf32 = True  # as it is; without it workspaces are others
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            vae.decode(torch.randn(8, 4, 128, 128, device=DEVICE))
        assert torch.cuda.max_memory_allocated() <= 5 * GIB


def free_port_for_torchrun():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@sdxl
@pytest.mark.parametrize("processes", [1, 2])
def test_25_torchrun(script, tmp_path, large_shards, processes):
    if not ON_CPU and torch.cuda.device_count() < processes:
        pytest.skip("needs two GPUs")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launcher += ["--master_addr", "127.0.0.1", "--master_port", free_port_for_torchrun()]
    process, folder = run_script(script, tmp_path, large_shards, launcher, max_train_steps=2)
    printed, _ = process.communicate(timeout=180)
    assert process.returncode == 0, printed[-3000:]
    assert (folder / script.WEIGHTS_NAME).is_file() and (folder / "checkpoint-2").is_dir()
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2
