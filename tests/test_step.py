"""One training step on a tiny UNet: its loss, its gradients, its precision, its conditioning, its waiting."""

import copy
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import bitsandbytes
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import FAMILIES, SCRIPTS, flags, load_script, read_log
from diffusers import DDIMScheduler, LCMScheduler
from diffusers.models.embeddings import Timesteps
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
F32 = torch.float32
both_families = pytest.mark.parametrize("script", SCRIPTS, ids=FAMILIES, indirect=True)


@pytest.fixture(scope="module")
def script(request):
    """The SD 1.5 script, unless a test names another: the step is the same in both."""
    return load_script(getattr(request, "param", SCRIPTS[0]))


@pytest.fixture
def args(script, teacher, shards, tmp_path):
    return script.parse_args(flags(teacher, shards, tmp_path))


@pytest.fixture(scope="module")
def pipe(script, teacher, shards):
    args = script.parse_args(flags(teacher, shards, "unused"))
    return script.load_teacher(args, F32, CPU)


@pytest.fixture
def unet(script, pipe, args):
    """A copy of the teacher's UNet whose LoRA changes its output."""
    return with_lora(script, pipe.unet, args)


def with_lora(script, base, args, scale=0.1):
    unet = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(1)
    for parameter in script.add_lora(unet, args):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    script.prepare_unet(unet, args)
    return unet


def schedule_of(script, pipe, args, **changes):
    return script.make_schedule(dict(pipe.scheduler.config) | changes, args, CPU)


def inputs(script, args, pipe, index=(0, 7, 24, 49), dtype=F32):
    """Return (latents, conditioning, uncond, draws) of a batch with one sample at each index of the grid."""
    shape = (len(index), 4, 8, 8)
    draws = script.draw(args, shape, 0, 0, 0, CPU)
    draws = dataclasses.replace(draws, index=torch.tensor(index))
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        uncond_embeds = {name: value.to(dtype) for name, value in script.encode_prompts(pipe, [""], CPU).items()}
        batch = batch_of(script, pipe, len(index))
        conditioning, uncond = script.condition(uncond_embeds, batch, batch, draws.empty)
    return latents, conditioning, uncond, draws


def batch_of(script, pipe, size):
    """Return a batch as the UNet's conditioning is made of, each row with its own caption, size and crop."""
    captions = [f"sea {i}" for i in range(size)]
    time_ids = torch.tensor([[40, 50 + i, i, 2, 32, 32] for i in range(size)], dtype=F32)
    return {"caption": captions, "time_ids": time_ids} | script.encode_prompts(pipe, captions, CPU)


def loss_of(script, unet, pipe, args, schedule=None, dtype=F32, data=None, teacher=None):
    job = SimpleNamespace(
        args=args, dtype=dtype, schedule=schedule or schedule_of(script, pipe, args), student_unet=unet, student=unet,
        teacher_unet=teacher or script.make_twin(copy.deepcopy(pipe.unet).to(dtype)),
    )  # fmt: skip
    return script.training_loss(job, *(data or inputs(script, args, pipe, dtype=dtype)))


def row(conditioning, n):
    """Return one row of a conditioning, a dict of tensors or of such dicts."""
    return {k: row(v, n) if isinstance(v, dict) else v[n : n + 1] for k, v in conditioning.items()}


def plain_loss(
    unet, config, latents, conditioning, uncond, draws, adapter=True, w_offset=0.0, swap=False, phases=1, k=20
):
    """Return the loss written from its definition, sample by sample; `adapter`, `w_offset` and `swap` break it."""
    changes = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
    ddim, lcm = DDIMScheduler.from_config(config, **changes), LCMScheduler.from_config(config)
    alphas, sigmas = ddim.alphas_cumprod.sqrt(), (1 - ddim.alphas_cumprod).sqrt()
    ddim.set_timesteps(1000 // k)

    def end_of(t):
        return 499 if 500 <= t < 775 else 0

    def jump(z0, z, t, end):
        return alphas[end] * z0 + sigmas[end] * (z - alphas[t] * z0) / sigmas[t]

    def consistency(z, t, given):
        c_skip, c_out = lcm.get_scalings_for_boundary_condition_discrete(torch.tensor(t))
        output = unet(z, t, **given).sample
        return c_skip * z + c_out * ddim.step(output, t, z).pred_original_sample

    losses = []
    for n, index in enumerate(draws.index.tolist()):
        t, t_prev, w = k * index + k - 1, max(k * index - 1, 0), draws.w[n] + w_offset
        given = row(conditioning, n)
        z_t = ddim.add_noise(latents[n : n + 1], draws.eps[n : n + 1], torch.tensor([t]))
        with torch.no_grad():
            unet.disable_adapters()
            cond, free = unet(z_t, t, **given).sample, unet(z_t, t, **row(uncond, n)).sample
            z_prev = ddim.step((1 + w) * cond - w * free, t, z_t).prev_sample
            if adapter:
                unet.enable_adapters()
            target = consistency(z_prev, t if swap else t_prev, given)
            unet.enable_adapters()
            while end_of(t_prev) > end_of(t):  # on to the picture, from end to end
                t_prev, z_prev = end_of(t_prev), jump(target, z_prev, t_prev, end_of(t_prev))
                target = consistency(z_prev, t_prev, given)
        difference = consistency(z_t, t, given) - target
        if phases > 1:  # both as jumps to the end of the phase, in units of the clean latent
            end = end_of(t)
            difference = jump(consistency(z_t, t, given), z_t, t, end) - jump(target, z_prev, t_prev, end)
            difference /= alphas[end] - sigmas[end] * alphas[t] / sigmas[t]
        losses.append((torch.sqrt(difference**2 + 0.001**2) - 0.001).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("script", "prediction_type"),
    [(SCRIPTS[0], "epsilon"), (SCRIPTS[0], "v_prediction"), (SCRIPTS[0], "sample"), (SCRIPTS[1], "epsilon")],
    ids=["epsilon", "v_prediction", "sample", "sdxl"], indirect=["script"],
)  # fmt: skip
def test_loss_is_the_definition(script, pipe, unet, args, prediction_type):
    config = dict(pipe.scheduler.config) | {"prediction_type": prediction_type}
    # With 2 phases 519 steps to the end of its own, and 499 begins one; 779 is the first that jumps to the picture,
    # and goes on from the middle.
    grids = (1, 20, (0, 7, 24, 49)), (2, 20, (0, 38, 24, 25, 27, 38, 49)), (2, 25, (0, 19, 20, 22, 39))
    for phases, k, index in grids:
        args.phases, args.num_ddim_timesteps = phases, 1000 // k
        schedule = schedule_of(script, pipe, args, prediction_type=prediction_type)
        data = inputs(script, args, pipe, index)
        loss = loss_of(script, unet, pipe, args, schedule, data=data)
        torch.testing.assert_close(loss, plain_loss(unet, config, *data, phases=phases, k=k), rtol=1e-5, atol=0)


@pytest.mark.parametrize("broken", [{"adapter": False}, {"w_offset": -1.0}, {"swap": True}])
def test_loss_is_not_a_broken_variant(script, pipe, unet, args, broken):
    data = inputs(script, args, pipe)
    loss = loss_of(script, unet, pipe, args, data=data)
    wrong = plain_loss(unet, pipe.scheduler.config, *data, **broken)
    assert abs(wrong / loss - 1) > 0.001


def test_loss_tells_a_bfloat16_schedule(script, pipe, unet, args):
    schedule = schedule_of(script, pipe, args)
    rounded = dataclasses.replace(
        schedule, alphas=schedule.alphas.bfloat16().float(), sigmas=schedule.sigmas.bfloat16().float()
    )
    losses = [loss_of(script, unet, pipe, args, s) for s in (schedule, rounded)]
    assert abs(losses[1] / losses[0] - 1) > 0.001


def test_target_of_the_first_grid_point_is_z_prev(script, pipe, unet, args, monkeypatch):
    seen = spy(script, monkeypatch)
    data = inputs(script, args, pipe, index=(0, 0))
    loss_of(script, unet, pipe, args, data=data)
    latents, conditioning, uncond, draws = data
    schedule, timesteps = schedule_of(script, pipe, args), torch.tensor([19, 19])
    z_t = script.add_noise(schedule, latents, draws.eps, timesteps)
    with torch.no_grad():
        z_prev = script.teacher_step(
            pipe.unet, schedule, z_t, timesteps, timesteps * 0, conditioning, uncond, draws.w, F32
        )  # fmt: skip
    assert torch.equal(seen[0][1], z_prev)


def spy(script, monkeypatch):
    """Return a list that fills with the (pred, target) of each loss."""
    seen, distance = [], script.distance

    def noted(pred, target, *rest):
        seen.append((pred, target))
        return distance(pred, target, *rest)

    monkeypatch.setattr(script, "distance", noted)
    return seen


def test_the_loss_in_epsilon_counts_from_the_upper_end(script, pipe, unet, args, monkeypatch):
    seen, schedule = spy(script, monkeypatch), schedule_of(script, pipe, args)
    for args.loss_space in ("sample", "epsilon"):
        loss_of(script, unet, pipe, args, schedule)
    alpha_t, sigma_t = schedule.at(schedule.ddim_timesteps[[0, 7, 24, 49]])
    for clean, noise in zip(*seen, strict=True):
        torch.testing.assert_close(noise, clean * alpha_t / sigma_t, rtol=1e-5, atol=1e-6)


def test_target_carries_no_gradient(script, pipe, unet, args, monkeypatch):
    seen = spy(script, monkeypatch)
    loss_of(script, unet, pipe, args)
    pred, target = seen[0]
    assert pred.requires_grad and not target.requires_grad
    assert pred.dtype == target.dtype == F32


def test_every_lora_weight_and_nothing_else_has_a_gradient(script, pipe, unet, args):
    loss_of(script, unet, pipe, args).backward()
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad and parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad and parameter.grad is None, name
    assert all(p.grad is None for module in (pipe.vae, pipe.text_encoder) for p in module.parameters())


def test_an_update_changes_the_lora_alone(script, pipe, unet, args):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer, _ = script.make_optimizer(trained, args, 1, 4)
    loss_of(script, unet, pipe, args).backward()
    optimizer.step()
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name]) == ("lora_" not in name), name


def test_a_fresh_lora_changes_nothing(script, pipe, args):
    unet = copy.deepcopy(pipe.unet)
    script.add_lora(unet, args)
    z_t, timesteps, conditioning = unet_inputs(script, args, pipe)
    assert torch.equal(
        script.predict(unet, z_t, timesteps, conditioning, F32),
        script.predict(pipe.unet, z_t, timesteps, conditioning, F32),
    )


def unet_inputs(script, args, pipe, dtype=F32):
    latents, conditioning, _, draws = inputs(script, args, pipe, dtype=dtype)
    return latents, draws.index * 20 + 19, conditioning


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_the_teacher_has_the_weights_and_not_the_lora(script, pipe, args, dtype):
    """No weight lies in memory twice; what is trained does not reach it."""
    unet = copy.deepcopy(pipe.unet).to(dtype)
    z_t, timesteps, conditioning = unet_inputs(script, args, pipe, dtype)
    expected = script.predict(unet, z_t, timesteps, conditioning, dtype)
    teacher = script.make_twin(unet)
    weights = {name: value.data_ptr() for name, value in unet.state_dict().items()}
    for parameter in script.add_lora(unet, args):
        parameter.data += 0.1
    assert {name: value.data_ptr() for name, value in teacher.state_dict().items()} == weights
    assert {value.dtype for value in teacher.state_dict().values()} == {dtype} and not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    outputs = [script.predict(each, z_t, timesteps, conditioning, dtype) for each in (teacher, unet)]
    assert torch.equal(outputs[0], expected) and (outputs[1] - expected).abs().max() > 0.01


def test_lora_stays_float32_on_a_bfloat16_base(script, pipe, args):
    unet = with_lora(script, copy.deepcopy(pipe.unet).to(torch.bfloat16), args)
    for name, parameter in unet.named_parameters():
        assert parameter.dtype == (F32 if "lora_" in name else torch.bfloat16), name
    loss = loss_of(script, unet, pipe, args, dtype=torch.bfloat16)
    full = loss_of(script, with_lora(script, pipe.unet, args), pipe, args)
    loss.backward()
    assert loss.dtype == F32 and loss.item() == pytest.approx(full.item(), rel=0.1)
    assert {p.grad.dtype for p in unet.parameters() if p.requires_grad} == {F32}


def test_a_base_in_4_bits_computes_with_its_unpacked_weights(script, pipe, args, monkeypatch):
    args.gradient_checkpointing = True
    monkeypatch.setattr(pipe, "unet", with_widths(pipe.unet, 8, 64))
    small, plain = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.unet)
    script.quantize_4bit(small)
    small.to(CPU)
    teachers = script.make_twin(small), script.make_twin(plain)
    kept = {n: module for n, module in small.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    widths = set()
    for name, module in plain.named_modules():
        is_linear = isinstance(module, torch.nn.Linear) and ".attentions." in name
        assert (name in kept) == (is_linear and module.in_features % 64 == 0), name
        if name in kept:
            assert teachers[0].get_submodule(name).weight.data_ptr() == kept[name].weight.data_ptr()
            assert kept[name].weight.numel() == module.weight.numel() / 2
            unpacked = unpack(kept[name])
            assert 0.02 < (unpacked - module.weight).norm() / module.weight.norm() < 0.12
            module.weight.copy_(unpacked)  # which the teacher shares
            widths.add(tuple(unpacked.shape))
    assert {(64, 64), (512, 64), (64, 256)} == widths
    results = []
    for base, teacher in zip((small, plain), teachers, strict=True):
        unet = with_lora(script, base, args)
        loss = loss_of(script, unet, pipe, args, teacher=teacher)
        loss.backward()
        results.append([loss, *(each.grad for each in unet.parameters() if each.requires_grad)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert len(results[0]) > 50


# The 16 values of NF4 (QLoRA, arXiv:2305.14314, appendix E), to four digits.
NF4 = torch.tensor([
    -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1,
])  # fmt: skip


def unpack(layer):
    """Return the weight of a layer kept in 4 bits, written from its definition and exact to four digits."""
    packed, scales = layer.weight.flatten(), layer.weight.quant_state.absmax
    codes = torch.stack([packed >> 4, packed & 15], dim=1).long().flatten()
    values = (NF4[codes].view(-1, 64) * scales[:, None]).view(-1, layer.in_features)
    exact = bitsandbytes.functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    torch.testing.assert_close(exact, values, rtol=1e-3, atol=1e-4)
    return exact


def with_widths(unet, *widths):
    """Return a frozen random UNet like `unet`, of other widths."""
    config = dict(unet.config) | {"block_out_channels": widths}
    return type(unet).from_config(config).requires_grad_(False)


def test_a_base_with_nothing_to_pack_is_refused(script, pipe):
    unet = with_widths(pipe.unet, 8, 8)
    with pytest.raises(script.UnusableInput, match="use_4bit_base: .* leave it out"):
        script.quantize_4bit(unet)


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_lora_layers_compute_what_pefts_own_do(script, pipe, args, dropout):
    args.lora_dropout, args.lora_alpha = dropout, 3 * args.lora_rank
    ours, pefts = with_lora(script, pipe.unet, args).train(), copy.deepcopy(pipe.unet)
    pefts.add_adapter(
        LoraConfig(
            r=args.lora_rank, lora_alpha=args.lora_alpha, lora_dropout=dropout,
            target_modules=args.lora_target_modules.split(","),
        )
    )  # fmt: skip
    pefts.load_state_dict(ours.state_dict())
    seen, layers = set(), dict(pefts.train().named_modules())
    for name, layer in ours.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        given = [2, 5, layer.in_features] if isinstance(layer, Linear) else [2, layer.in_features, 6, 6]
        x = torch.randn(given)
        for with_input in (False, True):  # the first layers' inputs need no gradient
            results = [gradients_of(each, x, with_input) for each in (layer, layers[name])]
            torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
        for each in (layer, layers[name]):
            each.enable_adapters(False)
        assert torch.equal(layer(x), layers[name](x)) and not torch.equal(layer(x), results[0][0])
        seen.add(type(layer))
        assert type(layer) is not type(layers[name])
    assert len(seen) == 2


def gradients_of(layer, x, with_input):
    """Return the layer's output of x, and the gradients of its parameters and, where asked, of x."""
    leaf = x.clone().requires_grad_(with_input)
    torch.manual_seed(0)  # for the same dropout
    output = layer(leaf)
    wanted = [leaf] * with_input + [each for each in layer.parameters() if each.requires_grad]
    return output, *torch.autograd.grad(output.square().sum(), wanted)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_the_unet_computes_in_the_named_dtype(script, pipe, args, monkeypatch, dtype):
    inside, seen = set(), spy(script, monkeypatch)
    unet = with_lora(script, copy.deepcopy(pipe.unet).to(dtype), args)
    for module in unet.modules():
        if not list(module.children()) and not isinstance(module, Timesteps):  # angles are float32, always
            module.register_forward_hook(lambda _module, _inputs, output: inside.add(output.dtype))
    loss_of(script, unet, pipe, args, dtype=dtype)
    assert inside == {dtype}
    assert script.predict(unet, *unet_inputs(script, args, pipe, dtype), dtype).dtype == F32
    assert {tensor.dtype for tensor in seen[0]} == {F32}


@pytest.fixture
def job_of(script, args, monkeypatch):
    """Return a function that starts a run as the script does, and returns its Job."""
    for state in (AcceleratorState, GradientState, PartialState):
        monkeypatch.setattr(state, "_shared_state", {})  # whatever another test has started

    def start():
        return script.make_job(args, script.start(args), [{"caption": "sea"}], None, script.RunState())

    return start


def test_accelerate_does_not_autocast(script, args, job_of):
    args.mixed_precision, seen = "bf16", set()
    job = job_of()
    job.student_unet.conv_in.register_forward_hook(lambda *_given: seen.add(torch.is_autocast_enabled("cpu")))
    z_t, timesteps, conditioning = unet_inputs(script, args, job.pipe, job.dtype)
    assert script.predict(job.student, z_t, timesteps, conditioning, job.dtype).dtype == F32
    output = job.student(z_t.to(job.dtype), timesteps, **conditioning).sample
    assert seen == {False} and job.dtype == output.dtype == torch.bfloat16


class NoWaiting(TorchDispatchMode):
    """Raises where a number leaves its tensor: on a GPU the program would wait there for all queued work."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero"), name
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("use_8bit_adam", [True, False])
def test_an_update_on_pictures_waits_for_nothing(script, args, job_of, shards, use_8bit_adam):
    """Captions are tokenized by the loader, and no loss is read between two log lines."""
    args.use_8bit_adam, args.gradient_accumulation_steps = use_8bit_adam, 2
    job = job_of()
    stream = script.make_stream(job, script.list_shards([shards]), 0, None)
    job.pipe.tokenizer = None
    batches = iter(script.make_loader(stream, 0, CPU))
    script.update(job, batches)  # the first one makes the optimizer's state
    with NoWaiting():
        losses = [script.update(job, batches)[0] for _ in range(2)]
    assert all(torch.isfinite(loss) for loss in losses) and job.state.global_step == 3
    args.gradient_accumulation_steps = 3
    assert script.make_stream(job, [], 2, None).start_batch == 9, "whose worker's turn it is"
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        losses[0].item()


def test_gradients_are_clipped_to_the_flags_norm(script, args, job_of, shards):
    def updated(max_grad_norm):
        args.max_grad_norm, norms, args.gradient_accumulation_steps = max_grad_norm, [], 2
        job = job_of()
        parameters = [p for p in job.student_unet.parameters() if p.requires_grad]
        job.optimizer.optimizer.register_step_pre_hook(
            lambda *_given: norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())
        )
        stream = script.make_stream(job, script.list_shards([shards]), 0, None)
        batches = iter(script.make_loader(stream, 0, CPU))
        batches = [next(batches) for _ in range(2)]
        loss = sum(script.batch_loss(job, batch, number) for number, batch in enumerate(batches)) / 2
        whole = torch.stack([grad.norm() for grad in torch.autograd.grad(loss, parameters)]).norm()
        _, noted = script.update(job, iter(batches))
        assert noted.item() == pytest.approx(whole.item(), rel=1e-4), "the mean over micro steps"
        return norms, noted.item()

    (free,), noted = updated(1e9)
    assert free == pytest.approx(noted, rel=1e-4) and free > 1e-3
    (clipped,), noted = updated(free / 7)
    assert clipped == pytest.approx(free / 7, rel=1e-3) and noted == pytest.approx(free, rel=1e-4)


class Sent(torch.Tensor):
    """A tensor that notes how it is moved."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to:
            cls.moves.append((torch.device(args[1]).type, bool((kwargs or {}).get("non_blocking"))))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", ["cpu", "mps", "cuda"])
def test_only_cuda_is_copied_to_without_waiting(script, kind):
    """Elsewhere an asynchronous copy may read memory that is freed already."""
    Sent.moves, device = [], torch.device(kind)
    tensor = torch.zeros(2).as_subclass(Sent)
    script.send(tensor, device)
    assert Sent.moves == [(kind, kind == "cuda")]


class OnCuda(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes", "contiguous"),
    [
        (OnCuda, F32, [1] * 5, True), (OnCuda, torch.float16, [2, 2, 1], True), (torch.Tensor, F32, [2, 2, 1], False),
    ],
)  # fmt: skip
def test_the_vae_encodes_in_parts_that_fit(script, args, kind, dtype, sizes, contiguous):
    """One picture at a time in float32 on a GPU, and there not channels-last."""
    seen, args.vae_encode_batch_size = [], 2

    def encode(pixels):
        seen.append((len(pixels), pixels.is_contiguous()))
        assert pixels.dtype == dtype and pixels.abs().max() <= 1
        posterior = SimpleNamespace(parameters=pixels.as_subclass(torch.Tensor)[:, :, ::2, ::2])
        return SimpleNamespace(latent_dist=posterior)

    pixels = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    moments = script.encode_moments(SimpleNamespace(dtype=dtype, encode=encode), pixels.as_subclass(kind), args)
    assert [size for size, _ in seen] == sizes and {each for size, each in seen if size > 1} <= {contiguous}
    assert seen[0][1] or not contiguous
    expected = pixels.permute(0, 3, 1, 2)[:, :, ::2, ::2] / 127.5 - 1
    torch.testing.assert_close(moments.as_subclass(torch.Tensor), expected, rtol=0, atol=1e-3)


def test_dropout_is_for_the_student_only(script, pipe, args, monkeypatch):
    args.lora_dropout = 0.5
    seen, unet = spy(script, monkeypatch), with_lora(script, pipe.unet, args)
    data = inputs(script, args, pipe)
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss_of(script, unet, pipe, args, data=data)
    (pred, target), (other_pred, other_target) = seen
    assert torch.equal(target, other_target)
    assert not torch.equal(pred, other_pred)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(script, pipe, args, dropout):
    args.lora_dropout, gradients = dropout, []
    for args.gradient_checkpointing in (False, True):
        unet = with_lora(script, pipe.unet, args)
        assert unet.is_gradient_checkpointing == args.gradient_checkpointing
        loss_of(script, unet, pipe, args).backward()
        gradients.append([p.grad for p in unet.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_w_acts_on_its_own_sample(script, pipe, args):
    latents, conditioning, uncond, draws = inputs(script, args, pipe)
    schedule, timesteps = schedule_of(script, pipe, args), draws.index * 20 + 19
    w, results = draws.w.clone(), []
    for w[1] in (draws.w[1].clone(), draws.w[1] + 1):
        with torch.no_grad():
            results.append(
                script.teacher_step(
                    pipe.unet, schedule, latents, timesteps, timesteps - 19, conditioning, uncond, w, F32
                )
            )
    assert [torch.equal(a, b) for a, b in zip(*results, strict=True)] == [True, False, True, True]


def leaves(conditioning):
    """Return the tensors of a conditioning, a dict of tensors or of such dicts, by name."""
    inner = (leaves(value) for value in conditioning.values() if isinstance(value, dict))
    outer = {name: value for name, value in conditioning.items() if not isinstance(value, dict)}
    return outer | {name: value for part in inner for name, value in part.items()}


@both_families
def test_a_dropped_or_empty_caption_is_the_unconditional_one(script, pipe):
    with torch.no_grad():
        batch, uncond_embeds = batch_of(script, pipe, 4), script.encode_prompts(pipe, [""], CPU)
        batch["caption"][3] = ""  # its embeddings do not count
        conditioning, uncond = script.condition(uncond_embeds, batch, batch, torch.tensor([False, True, False, False]))
        alone = script.encode_prompts(pipe, ["sea 2", "sea 0"], CPU)["prompt_embeds"]
    given, free = leaves(conditioning), leaves(uncond)
    assert given.keys() == free.keys()
    for name, tensor in given.items():
        assert tensor.shape == free[name].shape and len(tensor) == 4
        assert torch.equal(tensor[[1, 3]], free[name][[1, 3]])
        assert name == "time_ids" or torch.equal(free[name][0], free[name][2])
    text = given["encoder_hidden_states"]
    torch.testing.assert_close(text[[2, 0]], alone)
    assert torch.equal(free["encoder_hidden_states"][[0]], uncond_embeds["prompt_embeds"])
    assert not torch.equal(text[0], text[1]) and not torch.equal(text[0], text[2])


def test_latents_are_scaled_samples_of_the_posterior_however_sliced(script, pipe, args):
    pixels = torch.randint(256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = script.encode_moments(pipe.vae, pixels, args)
        args.vae_encode_batch_size = 1
        sliced = script.encode_moments(pipe.vae, pixels, args)
        posterior = pipe.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    latents = script.sample_latents(whole, eps, 0.5)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * eps) * 0.5)
    torch.testing.assert_close(sliced, whole)
    half = whole.half()  # as a cache holds them: what follows is float32
    torch.testing.assert_close(script.sample_latents(half, eps, 0.5), script.sample_latents(half.float(), eps, 0.5))
    assert script.sample_latents(half, eps, 0.5).dtype == F32


def test_a_pipeline_loaded_around_the_student_leaves_it_trainable(script, args, unet):
    """A run on cached latents loads its VAE when it first draws, in the middle of training."""
    before = {name: parameter.requires_grad for name, parameter in unet.named_parameters()}
    loaded = script.load_teacher(args, F32, CPU, unet=unet, **dict.fromkeys(script.TEXT_PARTS))
    assert loaded.unet is unet and loaded.text_encoder is None
    assert not any(parameter.requires_grad for parameter in loaded.vae.parameters())
    assert any(before.values())
    assert {name: parameter.requires_grad for name, parameter in unet.named_parameters()} == before


def check_that_the_reason_comes_first(script, job, capsys):
    """A run that fails says why before its trackers end, which may take long."""
    said, codes = [], []
    record = SimpleNamespace(finish=lambda exit_code: codes.append(exit_code))
    for name in ("slow", "tensorboard", "wandb"):  # the second ends at once, and needs no word before
        tracker = SimpleNamespace(name=name, tracker=record, finish=lambda: said.append(capsys.readouterr().err))
        job.accelerator.trackers, job.state = [tracker], script.RunState(is_training=True)
        with pytest.raises(TypeError), script.trackers_ended(job.accelerator, job.state):
            script.distil(job, None, None)
    assert "after TypeError: " in said[0] and not said[1] and not job.state.is_training
    with pytest.raises(script.StoppedBySignal), script.trackers_ended(job.accelerator, job.state):
        raise script.StoppedBySignal
    with script.trackers_ended(job.accelerator, job.state):
        pass
    assert len(said) == 2 and codes == [1, 0, 0], "wandb shows whether a run failed"


def check_that_the_teacher_is_drawn_beside(script, job):
    """The teacher's pictures are the plain pipeline's without the LoRA, and the numbers compare with them."""
    pipe, student, scheduler = job.pipe, job.pipe.unet, job.pipe.scheduler
    job.teacher_unet = script.make_twin(student)
    passes = []
    student.register_forward_pre_hook(lambda *_: passes.append("student"))
    job.teacher_pictures = script.draw_teacher(job)
    assert not passes and pipe.unet is student and pipe.scheduler is scheduler
    options = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    pipe.unet, pipe.scheduler = job.teacher_unet, DDIMScheduler.from_config(scheduler.config, **options)
    size = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(job.args.seed + 1)}
    expected = np.asarray(pipe("hill", num_inference_steps=50, guidance_scale=7.5, **size).images[0], int)
    pipe.unet, pipe.scheduler = student, scheduler
    assert np.abs(np.asarray(job.teacher_pictures[1], int) - expected).max() <= 1
    ranges = ((5, 15), (9, 12), (2, 4.5))
    assert [script.teacher_guidance(SimpleNamespace(w_min=a, w_max=b)) for a, b in ranges] == [7.5, 10, 5.5]
    script.validate(job)
    (path,) = Path(job.args.output_dir).glob("validation/*.json")
    assert json.loads(path.read_text()) == {"prompts": job.prompts}, "an LCM-LoRA comes no nearer as it improves"
    job.args.phases, logged = 2, []
    job.accelerator.trackers = [SimpleNamespace(name="one", log=lambda values, step: logged.append((values, step)))]
    drawn = script.validate(job)
    record = json.loads(path.read_text())["differences"]
    assert list(record) == list("1248") and logged[0][0].keys() == {f"validation/difference_{n}_steps" for n in record}
    job.args.phases, job.accelerator.trackers = 1, []
    pairs = [np.asarray(a, int) - np.asarray(b, int) for a, b in zip(drawn[4], job.teacher_pictures, strict=True)]
    assert record["4"] == pytest.approx(np.abs(pairs).mean(), abs=1e-3)


def check_that_no_failure_of_validation_ends_a_run(script, job):
    """Too little memory, or a tracker that fails."""
    accelerator, pipe, scheduler = job.accelerator, job.pipe, job.pipe.scheduler
    steps, job.state.global_step = [], 7
    quiet = {"log": lambda _values, step: step}
    fine = SimpleNamespace(name="fine", log_images=lambda values, step: steps.append((*values, step)), **quiet)
    silent, broken = (SimpleNamespace(name=name, **quiet) for name in ("silent", "broken"))
    broken.log_images = None
    accelerator.trackers += [broken, silent, fine]
    assert script.validate(job) and [tracker.name for tracker in accelerator.trackers] == ["silent", "fine"]
    titles = "1 step", "2 steps", "4 steps", "8 steps", "teacher"
    assert steps == [(f"validation/{title}", 7) for title in titles], "every picture, with its step"
    modes = []

    def raise_it():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    pipe.unet.train()
    with pytest.MonkeyPatch.context() as patch:
        decode = Mock(side_effect=lambda *_: modes.append(pipe.unet.training) or raise_it())
        patch.setattr(pipe.vae, "decode", decode)
        assert script.validate(job) == {} and pipe.scheduler is scheduler and pipe.unet.training
        assert modes == [False], "drawn without the LoRA's dropout"
        assert script.draw_teacher(job) == [], "and the student is drawn without it beside"
        patch.setattr(pipe, "vae", None)  # a cached run loads it here, where the Hub may be out of reach
        patch.setattr(script, "load_teacher", Mock(side_effect=script.UnusableInput("no such VAE")))
        assert script.validate(job) == {} and pipe.scheduler is scheduler and pipe.unet.training


def test_validation_draws_what_the_pipeline_itself_draws(script, pipe, args, tmp_path, capsys):
    args.output_dir, prompts = str(tmp_path), ["sea 1", "hill"]
    with torch.no_grad():
        embeds = script.encode_prompts(pipe, prompts, CPU)
        uncond = script.encode_prompts(pipe, [""], CPU)
    accelerator = SimpleNamespace(device=CPU, trackers=[], is_main_process=False, wait_for_everyone=lambda: None)
    job = SimpleNamespace(
        args=args, accelerator=accelerator, dtype=F32, pipe=pipe, prompts=prompts, prompt_embeds=embeds,
        state=script.RunState(), uncond_embeds=uncond, student_unet=pipe.unet, teacher_pictures=[],
    )  # fmt: skip
    args.num_ddim_timesteps, args.timestep_scaling_factor = 20, 1e-3
    check_that_the_teacher_is_drawn_beside(script, job)
    scheduler, drawn = pipe.scheduler, script.validate(job)
    assert pipe.scheduler is scheduler, "the teacher's own is put back"
    pipe.scheduler = LCMScheduler.from_config(scheduler.config, original_inference_steps=20, timestep_scaling=1e-3)
    generator = torch.Generator().manual_seed(args.seed + 1)
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 32, "width": 32}
    expected = pipe("hill", generator=generator, **options).images[0]
    pipe.scheduler = scheduler
    assert sorted(drawn) == [1, 2, 4, 8] and len(drawn[4]) == 2
    grid = np.asarray(Image.open(tmp_path / "validation" / "step-0000000.png"))
    assert np.array_equal(grid[-32:, 64:96], np.asarray(drawn[4][1])), "a row a prompt, a column a step count"
    assert np.array_equal(grid[-32:, 128:], np.asarray(job.teacher_pictures[1])), "and the teacher beside them"
    difference = np.asarray(drawn[4][1], int) - np.asarray(expected, int)
    assert np.abs(difference).max() <= 1 and np.asarray(expected).std() > 1
    args.objective = "matching"
    first, second = (np.asarray(script.validate(job)[4][1]) for args.student_eta in (0.0, 1.0))
    assert not np.array_equal(first, second), "drawn with the eta that the card names"
    args.objective, args.phases = "consistency", 2
    assert np.array_equal(first, np.asarray(script.validate(job)[4][1])), "phases are for DDIM with eta 0"
    check_that_no_failure_of_validation_ends_a_run(script, job)
    assert "no such VAE; --validation_steps -1 leaves them out" in capsys.readouterr().err
    pipe.unet.eval()
    check_that_the_reason_comes_first(script, job, capsys)


@pytest.mark.parametrize(("name", "count", "shape"), [("tensorboard", 1, 4), ("swanlab", 1, 4), ("aim", 2, 3)])
def test_each_tracker_gets_pictures_in_the_form_that_it_takes(script, name, count, shape):
    taken = []
    tracker = SimpleNamespace(name=name, log_images=lambda values, **_: taken.append(values))
    script.log_pictures(tracker, {"4 steps": [Image.new("RGB", (8, 8))] * 2}, ["sea", "hill"], 1)
    assert len(taken[0]) == count and {value.ndim for value in taken[0].values()} == {shape}
    logged, stub = [], SimpleNamespace(Image=lambda picture, caption: (picture, caption))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", stub)
        tracker = SimpleNamespace(name="wandb", log=lambda values, step: logged.append((values, step)))
        script.log_pictures(tracker, {"1 step": ["a", "b"], "4 steps": ["c", "d"]}, ["sea", "hill"], 7)
    rows = [("a", "sea (1 step)"), ("b", "hill (1 step)"), ("c", "sea (4 steps)"), ("d", "hill (4 steps)")]
    assert logged == [({"validation": rows}, 7)]


@pytest.mark.parametrize(
    ("loss", "grad_norm", "scaler"),
    [("nan", "1", None), ("inf", "1", object()), ("1", "nan", None), ("1", "inf", None)],
)
def test_an_update_that_ruins_the_lora_stops_the_run(script, args, tmp_path, loss, grad_norm, scaler):
    log = log_of(script, args, tmp_path, scaler)
    log.job.state.skipped.update({"no caption": 3, "no picture": 4})
    log.accelerator.num_processes, log.accelerator.reduce = 2, lambda values, _mean: values - 0.5 * (values == 7)
    log.add(1, torch.tensor(0.5), torch.tensor(2.0), 1e-3)
    log.add(2, torch.tensor(float(loss)), torch.tensor(float(grad_norm)), 1e-3)
    with pytest.raises(script.NonFiniteLoss, match="update 2"):
        log.flush()
    assert [(line["step"], line["skipped_samples"]) for line in read_log(tmp_path)] == [(1, 13)]  # 7 and 6


def test_updates_that_the_fp16_scaler_skips_stop_the_run_only_when_its_scale_collapses(script, args, tmp_path):
    log, step = log_of(script, args, tmp_path, scaler=object()), 0
    for number in (1, 12, 12):  # updates that overflow before one that does not
        for norm in ["inf"] * number + ["1"]:
            step += 1
            log.add(step, torch.tensor(0.5), torch.tensor(float(norm)), 1e-3)
    steps = []
    log.accelerator.trackers = [SimpleNamespace(log=lambda _values, step: steps.append(step))]
    log.started -= 1000
    log.flush()
    samples = step * args.train_batch_size * args.gradient_accumulation_steps
    assert read_log(tmp_path)[-1]["samples_per_second"] == pytest.approx(samples / 1000, rel=0.05)
    assert steps == list(range(1, step + 1)), "a tracker gets each update with its step"
    log.accelerator.trackers = []
    assert len(read_log(tmp_path)) == step and read_log(tmp_path)[0]["grad_norm"] is None
    with pytest.raises(script.NonFiniteLoss, match="scale collapsed"):
        for number in range(1, 40):
            log.add(step + number, torch.tensor(0.5), torch.tensor(float("inf")), 1e-3)
            if number % 3 == 0:
                log.flush()
    assert number <= 30


def log_of(script, args, folder, scaler):
    args.output_dir = str(folder)
    accelerator = SimpleNamespace(
        is_main_process=True, num_processes=1, scaler=scaler, trackers=[], reduce=lambda values, _how: values
    )  # fmt: skip
    return script.Log(SimpleNamespace(args=args, accelerator=accelerator, max_train_steps=99, state=script.RunState()))


def test_compiled_blocks_are_compiled_in_the_first_update_only(script, pipe, unet, args, monkeypatch):
    """With Dynamo's graphs run eagerly: when they are made is the same, and no compiler is needed."""
    data = [inputs(script, args, pipe, index) for index in ((0, 7, 24, 49), (3, 3, 30, 9))]
    expected = [loss_of(script, unet, pipe, args, data=each).item() for each in data]
    kind, limit = type(unet), torch._dynamo.config.recompile_limit
    compile_blocks = kind.compile_repeated_blocks
    monkeypatch.setattr(kind, "compile_repeated_blocks", lambda self: compile_blocks(self, backend="eager"))
    args.compile = True
    try:
        torch.compiler.reset()
        teacher = script.make_twin(pipe.unet)
        for each in (unet, teacher):
            script.prepare_unet(each, args)
        loss = loss_of(script, unet, pipe, args, data=data[0], teacher=teacher)
        assert loss.item() == pytest.approx(expected[0], rel=1e-5)
        with torch.compiler.set_stance("fail_on_recompile"):
            loss = loss_of(script, unet, pipe, args, data=data[1], teacher=teacher)
            loss.backward()
        assert loss.item() == pytest.approx(expected[1], rel=1e-5)
        assert torch._dynamo.utils.counters["frames"]["ok"] >= 3
    finally:
        torch._dynamo.config.recompile_limit = limit
        torch.compiler.reset()
