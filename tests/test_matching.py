"""The matching stage: the direction of its gradient, the fake's loss, the roll-out, the update, the resume."""

import dataclasses
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import cases, finish, flags, one_family, read_log
from diffusers import DDIMScheduler, LCMScheduler
from safetensors.torch import load_file

CPU = torch.device("cpu")
F32 = torch.float32
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.fixture(scope="module")
def start_lora(script, teacher, tmp_path_factory):
    """Return a LoRA to start from whose B is not zero."""
    folder = tmp_path_factory.mktemp("start")
    args = script.parse_args(flags(teacher, "x", "x"))
    unet = script.load_teacher(args, F32, CPU).unet
    for number, parameter in enumerate(script.add_lora(unet, args)):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    script.save_lora(unet, folder / script.WEIGHTS_NAME, args)
    return folder / script.WEIGHTS_NAME


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"sea {number}\n\n" for number in range(20)))
    return path


def matching_flags(teacher, prompts, start_lora, output_dir, **changes):
    values = {
        "train_shards_path_or_url": prompts, "objective": "matching", "init_lora": start_lora,
        "fake_warmup_steps": 1, "w_min": 2, "w_max": 3,
    }  # fmt: skip
    return flags(teacher, None, output_dir, **values | changes)


@pytest.fixture
def job(script, teacher, prompts, start_lora, tmp_path):
    changes = {"lr_scheduler": "linear", "lora_dropout": 0.5}
    return job_of(script, matching_flags(teacher, prompts, start_lora, tmp_path, **changes))


def job_of(script, line):
    args = script.parse_args(line)
    shards = script.list_shards(args.train_shards_path_or_url)
    samples, _, cache = script.audit(shards, args)
    accelerator = Accelerator(cpu=True)
    job = script.make_job(args, accelerator, samples, cache, script.RunState())
    stream = script.make_stream(job, shards, 0, None)
    return SimpleNamespace(job=job, args=args, batches=iter(stream))


def schedule_of(script, teacher, prediction_type="epsilon"):
    scheduler = DDIMScheduler.from_pretrained(teacher, subfolder="scheduler", prediction_type=prediction_type)
    args = SimpleNamespace(objective="matching", num_ddim_timesteps=50, timestep_scaling_factor=10.0)
    return script.make_schedule(scheduler.config, args, CPU), scheduler


class GaussianScore(torch.nn.Module):
    """A UNet that knows its data: each element is of N(mean, std^2); predicts eps exactly."""

    def __init__(self, schedule, mean, std):
        super().__init__()
        self.schedule, self.mean, self.std = schedule, mean, std

    def forward(self, z_t, timesteps, shift=None, **_):
        alpha, sigma = self.schedule.at(timesteps)
        mean = self.mean + shift.view(-1, 1, 1, 1)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return ((z_t - alpha * (mean + gain * (z_t - alpha * mean))) / sigma,)


@one_family
@cases("w", [0.0, 2.0])
def test_the_gradient_moves_the_student_onto_the_teacher(script, teacher, w):
    """Student N(m, s^2) with an exact fake; the guided teacher's Gaussian is known: its mean moves by w * shift."""
    schedule, _ = schedule_of(script, teacher)
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.tensor(1.0, requires_grad=True), torch.tensor(-1.5, requires_grad=True)
    real = GaussianScore(schedule, -0.5, 0.8)
    optimizer = torch.optim.Adam([mean, log_std], lr=0.03)
    given, free = {"shift": torch.full((64,), 0.3)}, {"shift": torch.zeros(64)}
    for _ in range(300):
        x = mean + log_std.exp() * torch.randn(64, 4, 2, 2, generator=generator)
        fake = GaussianScore(schedule, mean.detach() - 0.3, log_std.detach().exp())
        tau = torch.randint(20, 980, (64,), generator=generator)
        eps = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            estimates = script.two_estimates(real, fake, schedule, x, tau, eps, given, free, torch.tensor(w), F32)
        loss = script.matching_loss(x, *estimates)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if w == 0:
        assert mean.item() == pytest.approx(-0.2, abs=0.08) and log_std.exp().item() == pytest.approx(0.8, abs=0.08)
    else:  # guidance moves the mean away from that without a caption
        assert mean.item() > 0.0


def estimates_by_diffusers(scheduler, unets, x, tau, eps, given, free, w, **broken):
    """Return (real, fake) clean estimates written from their definition, sample by sample."""
    real, fake = unets
    z = scheduler.add_noise(x, eps, tau)

    def clean(unet, n, conditioning):
        one = {
            k: {i: j[n : n + 1] for i, j in v.items()} if isinstance(v, dict) else v[n : n + 1]
            for k, v in conditioning.items()
        }
        output = unet(z[n : n + 1], tau[n], **one).sample
        return scheduler.step(output, tau[n], z[n : n + 1]).pred_original_sample

    guide = 0.0 if broken.get("teacher_without") else 1.0
    rows = [(clean(real, n, given), clean(real, n, free), clean(fake, n, given)) for n in range(len(x))]
    return (
        torch.cat([c + guide * w[n] * (c - u) for n, (c, u, _) in enumerate(rows)]),
        torch.cat([f + w[n] * (f - u) if broken.get("fake_guided") else f for n, (_, u, f) in enumerate(rows)]),
    )


@one_family
@cases("prediction_type", PREDICTION_TYPES)
@torch.no_grad()
def test_estimates_and_the_fakes_loss_are_their_definitions(script, teacher, job, prediction_type):
    schedule, scheduler = schedule_of(script, teacher, prediction_type)
    scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    scheduler.set_timesteps(1000)
    job = job.job
    _, _, given, free, draws = script.matching_inputs(job, batch_for(script, job), 0)
    x = torch.randn(draws.w.shape[0], 4, 16, 16, generator=torch.Generator().manual_seed(5))
    tau, eps = torch.tensor([700, 130]), torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    unets = job.teacher_unet, job.student_unet.eval()  # the student stands for a fake whose LoRA has learned
    estimates = script.two_estimates(*unets, schedule, x, tau, eps, given, free, draws.w, F32)
    expected = estimates_by_diffusers(scheduler, unets, x, tau, eps, given, free, draws.w)
    for value, wanted in zip(estimates, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)
    for broken in ("teacher_without", "fake_guided"):
        wrong = estimates_by_diffusers(scheduler, unets, x, tau, eps, given, free, draws.w, **{broken: True})
        assert not all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(estimates, wrong, strict=True))
    # The denoising loss by which the teacher itself was trained: in its own output.
    wanted = {"epsilon": eps, "sample": x, "v_prediction": scheduler.get_velocity(x, eps, tau)}[prediction_type]
    output = unets[1](scheduler.add_noise(x, eps, tau), tau, **given).sample
    loss, noise_error = script.fake_loss(unets[1], schedule, x, tau, eps, given, F32)
    torch.testing.assert_close(loss, (output - wanted).square().mean(), rtol=1e-3, atol=1e-5)
    alpha = scheduler.alphas_cumprod[tau].sqrt().view(-1, 1, 1, 1)
    implied = (scheduler.add_noise(x, eps, tau) - alpha * estimates[1]) / (
        1 - alpha**2
    ).sqrt()  # by its clean estimate
    torch.testing.assert_close(noise_error, (implied - eps).square().mean(), rtol=1e-3, atol=1e-5)
    for parameter in job.fake.unet.parameters():
        parameter.data += 0.05 * parameter.requires_grad  # a fake that has learned
    noise = draws.tau[0], draws.tau_eps[0]
    unets = job.teacher_unet, job.fake.unet
    estimates = script.two_estimates(*unets, job.schedule, x, *noise, given, free, draws.w, F32)
    loss = script.student_loss(job, x, given, free, draws)
    torch.testing.assert_close(loss, script.matching_loss(x, *estimates))
    torch.testing.assert_close(job.fake.watched["fake_norm_ratio"], estimates[1].norm() / estimates[0].norm())


def batch_for(script, job):
    ids = script.tokenize([getattr(job.pipe, name) for name in script.TEXT_PARTS if "tokenizer" in name], ["a", "b"])
    time_ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    return {"caption": ["sea", "lake"], "ids": ids, "time_ids": time_ids}


@one_family
def test_the_loss_moves_x_from_the_fake_to_the_teacher(script):
    x = torch.zeros(2, 4, 2, 2, requires_grad=True)
    real = torch.tensor([2.0, 8.0]).view(2, 1, 1, 1).expand(x.shape)
    fake = real - 1.0
    script.matching_loss(x, real, fake).backward()
    torch.testing.assert_close(x.grad, -1.0 / real / x.numel())  # each sample by its own error
    x.grad, fake = None, torch.ones(x.shape)
    script.matching_loss(x, fake.detach() * 1e-3, fake.detach() * 2e-3).backward()  # an error below the least size
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-3 / script.MIN_ERROR / x.numel()))


def check_inputs(script, job, batch, embeds, draws):
    """Check what the second stage's inputs depend on: the process, a cache, empty captions, eta."""
    second = dataclasses.replace(job, accelerator=SimpleNamespace(device=CPU, process_index=1))
    assert not torch.equal(script.matching_inputs(second, batch, 0)[-1].w, draws.w)
    later = dataclasses.replace(job, state=script.RunState(global_step=1))
    others = script.matching_inputs(later, batch, 0)[-1], script.matching_inputs(job, batch, 1)[-1]
    assert not any(torch.equal(each.w, draws.w) for each in others)
    cached = batch | embeds | {"moments": torch.zeros(2, 8, 12, 20)}
    assert script.matching_inputs(job, cached, 0)[0].shape == (2, 4, 12, 20)
    job.args.proportion_empty_prompts = 1.0
    _, _, conditioning, uncond, _ = script.matching_inputs(job, batch, 0)
    assert torch.equal(conditioning["encoder_hidden_states"], uncond["encoder_hidden_states"])
    drawn = []
    job.args.student_steps = [4]
    for job.args.student_eta in (0.0, 1.0):
        found = [script.matching_inputs(job, batch, micro_step) for micro_step in range(6)]
        drawn.append([z_t for z_t, *_, draws in found if len(draws.timesteps) > 1])
    assert drawn[0] and not any(torch.equal(one, other) for one, other in zip(*drawn, strict=True))


def test_the_roll_out_draws_as_lcm_scheduler_or_ddim_does_and_without_gradient(script, job):
    job = job.job
    scheduler = LCMScheduler.from_config(job.pipe.scheduler.config)
    for steps, grid in job.fake.grids.items():
        scheduler.set_timesteps(steps)
        assert grid == scheduler.timesteps.tolist()
    scheduler.set_timesteps(4)
    batch = batch_for(script, job)
    with torch.no_grad():
        embeds = script.encode_ids(job.pipe, batch["ids"])
    given, _ = script.condition(job.uncond_embeds, embeds, batch, torch.zeros(2, dtype=torch.bool))
    generator = torch.Generator().manual_seed(3)
    z = first = torch.randn(2, 4, 16, 16, generator=generator)
    state, unet = generator.get_state(), job.student_unet.eval()
    with torch.no_grad():
        for t in scheduler.timesteps[:3]:
            z = scheduler.step(unet(z, t, **given).sample, t, z, generator=generator).prev_sample
    generator.set_state(state)
    noise = torch.stack([first, *(torch.randn(first.shape, generator=generator) for _ in range(3))])
    timesteps = scheduler.timesteps[:, None].expand(-1, 2)
    with torch.no_grad():
        drawn = script.roll_out(unet, job.schedule, timesteps, noise, 1.0, given, F32)
        without_noise = script.roll_out(unet, job.schedule, timesteps, noise, 0.0, given, F32)
        ddim, z_ddim = DDIMScheduler.from_config(job.pipe.scheduler.config, clip_sample=False), first
        ddim.set_timesteps(1000)
        for t, next_t in zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False):
            eps = unet(z_ddim, t, **given).sample
            z_ddim = ddim.add_noise(ddim.step(eps, t, z_ddim).pred_original_sample, eps, next_t[None])
    torch.testing.assert_close(drawn, z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(without_noise, z_ddim, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # without fresh noise, DDIM's direction is left in the share that eta gives it
        still = torch.stack([first, torch.zeros_like(first)])
        ends = [script.roll_out(unet, job.schedule, timesteps[:2], still, eta, given, F32) for eta in (0.0, 0.6, 1.0)]
    torch.testing.assert_close(ends[1], ends[2] + 0.8 * (ends[0] - ends[2]), rtol=1e-4, atol=1e-4)
    few = SimpleNamespace(student_steps=[4], num_ddim_timesteps=20)
    scheduler.set_timesteps(4, original_inference_steps=20)
    assert script.student_grids(job.pipe.scheduler.config, few)[4] == scheduler.timesteps.tolist()
    unet.train()
    z_t, timestep, conditioning, _, draws = script.matching_inputs(job, batch, 0)
    assert not z_t.requires_grad and timestep.tolist() == 2 * draws.timesteps[-1:] and unet.training
    with torch.no_grad():  # as a pipeline draws: without the LoRA's dropout
        timesteps = torch.tensor(draws.timesteps)[:, None].expand(-1, 2)
        eta, unet = job.args.student_eta, unet.eval()
        drawn = script.roll_out(unet, job.schedule, timesteps, draws.noise, eta, conditioning, F32)
    assert torch.equal(drawn, z_t) and len(set(draws.timesteps)) > 1
    assert job.fake.unet.peft_config["default"].lora_dropout == 0
    check_inputs(script, job, batch, embeds, draws)


@one_family
def test_draws_are_a_function_of_seed_update_and_process(script, job):
    args, grids = job.args, job.job.fake.grids
    shape, seen, taus, fake_taus, ws = (2, 4, 4, 4), set(), [], [], []

    def draw(step, process):
        return script.draw_matching(args, grids, shape, 1000, step, 0, process, CPU)

    for step in range(400):
        one, other = draw(step, 0), draw(step, 1)
        assert one.timesteps == other.timesteps and len(one.noise) == len(one.timesteps)
        assert not torch.equal(one.noise, other.noise) and not torch.equal(one.tau_eps, other.tau_eps)
        seen.add(tuple(one.timesteps))
        taus += one.tau[0].tolist() + other.tau[0].tolist()
        ws += one.w.flatten().tolist()
        assert len({each.sum().item() for each in (*one.noise, *one.tau_eps)}) == len(one.noise) + len(one.tau_eps)
        fake_taus += one.tau[1:].flatten().tolist() + other.tau[1:].flatten().tolist()
    assert torch.equal(draw(7, 0).noise, draw(7, 0).noise)
    assert len(draw(7, 0).tau) == 1 + args.fake_updates
    assert job.job.fake.optimizer.param_groups[0]["lr"] == pytest.approx(3 * args.learning_rate)
    assert seen == {tuple(grid[: i + 1]) for grid in grids.values() for i in range(len(grid))}
    assert 20 <= min(taus) < 30 and 970 <= max(taus) < 980
    assert 2 <= min(ws) < 2.05 and 2.95 < max(ws) <= 3
    assert min(fake_taus) < 10 and max(fake_taus) > 990


def lora_of(unet):
    return {name: value.clone() for name, value in unet.state_dict().items() if "lora_" in name}


def test_an_update_changes_the_fake_then_both_and_never_the_base(script, job, monkeypatch):
    batches, job = job.batches, job.job
    base = {name: value.clone() for name, value in job.teacher_unet.state_dict().items()}
    unets = job.student_unet, job.fake.unet
    before, rates, norms = [lora_of(unet) for unet in unets], [], []

    def note(*_given):
        parts = [p.grad.norm() for p in job.fake.unet.parameters() if p.requires_grad]
        norms.append(torch.stack(parts).norm().item())
        rates.append([o.param_groups[0]["lr"] for o in (job.optimizer, job.fake.optimizer)])

    assert type(job.fake.optimizer) is type(job.optimizer), "both prepared by accelerate"
    job.fake.optimizer.optimizer.register_step_pre_hook(note)
    job.args.max_grad_norm = 1e-4
    loss, _ = script.update(job, batches)
    after = [lora_of(unet) for unet in unets]
    assert math.isfinite(loss)
    assert all(torch.equal(value, before[0][name]) for name, value in after[0].items())  # the fake's head start
    assert any(not torch.equal(value, before[1][name]) for name, value in after[1].items())
    script.update(job, batches)
    ends = [schedule.get_last_lr()[0] for schedule in (job.lr_schedule, job.fake.lr_schedule)]
    # Of 4 updates the student has the last 3.
    expected = [[1e-3, 3e-3], [1e-3, 3e-3 * 3 / 4], [1e-3 * 2 / 3, 3e-3 * 2 / 4]]
    assert [*rates[::2], ends] == [pytest.approx(pair) for pair in expected]
    assert max(norms) < 1.001e-4, "the fake's own gradient is clipped"
    final = [lora_of(unet) for unet in unets]
    assert all(any(not torch.equal(f[name], a[name]) for name in a) for f, a in zip(final, after, strict=True))
    assert all(torch.equal(value, base[name]) for name, value in job.teacher_unet.state_dict().items())
    assert all(parameter.grad is None for unet in unets for parameter in unet.parameters())
    assert job.fake.watched.keys() == {"fake_loss", "fake_grad_norm", "fake_norm_ratio", "fake_cosine", "x_std"}
    job.args.gradient_accumulation_steps, student_loss, seen = 2, script.student_loss, []
    monkeypatch.setattr(script, "student_loss", lambda *a: (student_loss(*a), seen.append(job.fake.watched))[0])
    script.update(job, batches)
    stds = [each["x_std"].item() for each in seen]
    assert stds[0] != stds[1] and job.fake.watched["x_std"].item() == pytest.approx(sum(stds) / 2)


@one_family
def test_the_student_gets_its_gradient_through_the_last_step_alone(script, job, monkeypatch):
    calls = []
    plain = script.predict

    def spied(unet, *rest):
        calls.append((unet is job.job.student, torch.is_grad_enabled()))
        return plain(unet, *rest)

    monkeypatch.setattr(script, "predict", spied)
    job.job.state.global_step = 5
    script.update(job.job, job.batches)
    assert [with_grad for is_student, with_grad in calls if is_student].count(True) == 1
    assert calls[-1] == (False, True)  # the fake learns last


@one_family
def test_the_fakes_updates_share_a_batch_and_a_single_sample_serves_in_each(script, job, monkeypatch):
    seen, drawn = [], []
    plain, draw = script.fake_loss, script.draw_matching
    monkeypatch.setattr(script, "draw_matching", lambda *given: drawn.append(draw(*given)) or drawn[-1])

    def spied(fake, schedule, x, tau, eps, conditioning, dtype):
        assert len(x) == len(tau) == len(eps) == len(conditioning["encoder_hidden_states"])
        assert any(torch.equal(eps[0], each) for each in drawn[-1].tau_eps[1:].flatten(0, 1)), "not the student's"
        seen.append(list(zip(x.sum((1, 2, 3)).tolist(), tau.tolist(), strict=True)))
        return plain(fake, schedule, x, tau, eps, conditioning, dtype)

    monkeypatch.setattr(script, "fake_loss", spied)
    job.job.state.global_step = 5
    script.update(job.job, job.batches)
    first, second = seen
    assert len(first) == len(second) == 1 and first[0][0] != second[0][0]  # two samples, each in one update
    assert [first[0][1], second[0][1]] == drawn[0].tau[[1, 2], [0, 1]].tolist()  # row 0 is the student's
    seen.clear()
    job.args.train_batch_size = 1
    script.update(job.job, job.batches)
    (first,), (second,) = seen
    assert first[0] == second[0] and first[1] != second[1]  # the same picture, noised anew


SETTINGS = {
    "max_train_steps": 6,
    "lora_dropout": 0.2,
    "gradient_accumulation_steps": 2,
    "fake_updates": 2,
    "lr_scheduler": "linear",
}


@one_family
def test_a_resumed_run_ends_as_an_unbroken_one_and_the_fake_stays_in_checkpoints(
    script, teacher, prompts, start_lora, tmp_path
):
    for name in ("whole", "broken"):
        steps = 6 if name == "whole" else 4
        line = matching_flags(teacher, prompts, start_lora, tmp_path / name, **SETTINGS)
        line += ["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "9"]
        finish(script, [*line, "--max_train_steps", steps], tmp_path / "said")
    assert any("resuming from" in text for text in finish(script, line, tmp_path / "said"))
    adapters = [f"checkpoint-6/{name}/adapter_model.safetensors" for name in ("unet", "fake")]
    for path in (script.WEIGHTS_NAME, *adapters):
        one, other = (load_file(tmp_path / name / path) for name in ("whole", "broken"))
        assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items()), path
    rows = [[{**row, "samples_per_second": 0} for row in read_log(tmp_path / name)] for name in ("whole", "broken")]
    assert rows[0] == rows[1] and "fake_cosine" in rows[0][-1]
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "DDIMScheduler.from_config" in card and "eta=0.3)" in card and "| objective | matching |" in card
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert "fake" not in files and [name for name in files if "safetensors" in name] == [script.WEIGHTS_NAME]


def test_two_processes_learn_from_captions_alone(script, teacher, shards, prompts, start_lora, tmp_path):
    changes = {"train_shards_path_or_url": shards} if script.FAMILY == "SDXL" else {}
    line = matching_flags(teacher, prompts, start_lora, tmp_path, max_train_steps=2, use_8bit_adam=True, **changes)

    def agree(script):
        ending = script.finish

        def compared(job):
            sums = [[p.double().sum().item() for p in u.parameters() if p.requires_grad] for u in
                    (job.student_unet, job.fake.unet)]  # fmt: skip
            job.state.skipped[f"met by process {job.accelerator.process_index}"] += 2
            first, second = script.gather_object([sums])
            assert first == second, "both LoRAs have the mean gradient of the processes"
            ending(job)

        script.finish = compared

    said = finish(script, line, tmp_path / "said", processes=2, hook=agree)
    (counts,) = [text for text in said if text.startswith("skipped samples: ")]
    assert "met by process 0: 2" in counts and "met by process 1: 2" in counts


@one_family
@cases(
    "changes,named",
    [
        ({"init_lora": None}, "--init_lora"), ({"objective": None}, "--objective matching"),
        ({"student_steps": [4, 99]}, "--student_steps 99"),
        ({"objective": None, "phases": 2, "num_ddim_timesteps": 501, "train_shards_path_or_url": "x"}, "--phases 2"),
        ({"lr_scheduler": "polynomial", "fake_learning_rate": 5e-8}, "--fake_learning_rate 5e-08"),
    ],
)  # fmt: skip
def test_wrong_flags_are_named(script, prompts, start_lora, capsys, changes, named):
    with pytest.raises(SystemExit):
        script.parse_args(matching_flags("owner/name", prompts, start_lora, "out", **changes))
    assert named in capsys.readouterr().err
    line = matching_flags("owner/name", "pipe:xargs cat < list.txt", start_lora, "out", objective=None)
    assert script.parse_args(line).objective == "consistency"  # a command may end so


@one_family
def test_checkpointing_computes_the_same(script, teacher, prompts, start_lora, tmp_path):
    losses = []
    for changes in ({}, {"gradient_checkpointing": True}):
        line = matching_flags(teacher, prompts, start_lora, tmp_path, fake_learning_rate=7e-4, **changes)
        job = job_of(script, line)
        assert job.job.fake.optimizer.param_groups[0]["lr"] == 7e-4
        unets = job.job.student_unet, job.job.fake.unet, job.job.teacher_unet
        assert {unet.is_gradient_checkpointing for unet in unets} == {bool(changes)}
        losses.append([script.update(job.job, job.batches)[0].item() for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@one_family
@cases(
    "warm_up,schedule,lr_warm_up,named",
    [(9, "constant", 0, "--fake_warmup_steps 9"), (4, "polynomial", 5, "--lr_warmup_steps 5"), (4, "linear", 5, None)],
)
def test_more_warm_up_than_updates_is_named(script, prompts, start_lora, warm_up, schedule, lr_warm_up, named):
    changes = {"fake_warmup_steps": warm_up, "lr_scheduler": schedule, "lr_warmup_steps": lr_warm_up}
    args = script.parse_args(matching_flags("owner/name", prompts, start_lora, "out", max_train_steps=9, **changes))
    if not named:
        assert script.count_updates(args, None) == 9
        return
    with pytest.raises(script.UnusableInput, match=named):
        script.count_updates(args, None)


@one_family
@cases(
    "content,named",
    [(b"", "no prompts"), (b"\n \n", "no prompts"), ("sea\n".encode("utf-16"), "UTF-8"), (b"\xe9t\xe9", "UTF-8")],
)
def test_prompts_that_cannot_be_read_are_named(script, tmp_path, content, named):
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(script.UnusableInput, match=f"mine.txt: .*{named}"):
        script.list_shards([str(tmp_path / "mine.txt")])


@one_family
def test_prompts_are_the_lines_of_a_text_file_or_the_captions_alone(script, shards, start_lora, tmp_path):
    (tmp_path / "mine.txt").write_bytes("\ufeffsea\r\n\r\n hills \nété\u2028été".encode())
    line = matching_flags("owner/name", tmp_path / "mine.txt", start_lora, "out", resolution=64)
    samples, report, cache = script.audit([str(tmp_path / "mine.txt")], script.parse_args(line))
    assert [sample["caption"].strip() for sample in samples] == ["sea", "hills", "été\u2028été"] and cache is None
    assert "3 samples 3 can be used" in report
    args = script.parse_args(matching_flags("owner/name", shards, start_lora, "out"))
    stream = script.ShardStream(script.list_shards([str(shards)]), args, 1, 0, 1)
    suffixes = {suffix for sample in stream.raw_samples(0, 0, script.Skipped()) for suffix in sample}
    assert "txt" in suffixes and not suffixes & set(script.IMAGE_SUFFIXES), "pictures must not fill the buffer"


@one_family
def test_a_fake_that_is_ruined_stops_the_run_before_it_is_saved(script, prompts, start_lora, teacher, tmp_path):
    job = job_of(script, matching_flags(teacher, prompts, start_lora, tmp_path)).job
    for ruined in ("fake_loss", "fake_grad_norm"):
        log = script.Log(job)
        numbers = {"fake_loss": torch.tensor(0.1), "fake_grad_norm": torch.tensor(0.1)}
        log.add(1, torch.tensor(0.5), torch.tensor(1.0), 1e-4, numbers)
        log.add(2, torch.tensor(0.5), torch.tensor(1.0), 1e-4, numbers | {ruined: torch.tensor(float("nan"))})
        with pytest.raises(script.NonFiniteLoss, match=f"{ruined} nan at update 2.*--fake_learning_rate"):
            log.flush()
    log = script.Log(job)
    for step, fake_loss in enumerate([*[1.0] * 19, 0.5, *[1.0] * 19], 1):  # a fake that recovers goes on
        log.add(step, torch.tensor(0.5), torch.tensor(1.0), 1e-4, {"fake_loss": torch.tensor(fake_loss)})
        log.flush()
    log.add(40, torch.tensor(0.5), torch.tensor(1.0), 1e-4, {"fake_loss": torch.tensor(1.0)})
    with pytest.raises(script.NonFiniteLoss, match="diverged: 20 updates up to 40 .*lower --fake_learning_rate"):
        log.flush()


@one_family
def test_a_checkpoint_from_before_the_second_stage_is_resumed(script, teacher, shards, tmp_path):
    args = script.parse_args(flags(teacher, shards, tmp_path))
    settings = script.settings_of(args, Accelerator(cpu=True), 4, [], 0)
    old = {name: value for name, value in settings.items() if name not in {"objective", *script.READ_BY["matching"]}}
    del old["files of the data"], old["files of the teacher"]  # nor had it these
    script.check_resume(tmp_path, {"settings": old, "global_step": 2}, settings, 4)
    # A place has many names; other files have none.
    again = settings | {"pretrained_teacher_model": f"{teacher}/../{script.Path(teacher).name}/"}
    script.check_resume(tmp_path, {"settings": again, "global_step": 2}, settings, 4)
    args.pretrained_vae_model_name_or_path = f"{teacher}/vae"
    settings = script.settings_of(args, Accelerator(cpu=True), 4, [], 0)
    for name in ("files of the data", "files of the teacher", "files of the VAE"):
        assert name in settings
        with pytest.raises(script.UnusableInput, match=name):
            script.check_resume(tmp_path, {"settings": settings | {name: "others"}, "global_step": 2}, settings, 4)
    # A branch of the Hub counts as the commit that it was; nothing was noted of it before.
    hub, commits = tmp_path / "models--me--sea", ["a" * 40, "b" * 40]
    (hub / "refs").mkdir(parents=True)
    args.pretrained_teacher_model, args.cache_dir, seen = "me/sea", str(tmp_path), []
    for commit in commits:
        shutil.copytree(teacher, hub / "snapshots" / commit)
        (hub / "refs" / "main").write_text(commit)
        args.teacher_revision = None
        args.teacher_revision = script.check_teacher(args)
        seen.append(script.settings_of(args, Accelerator(cpu=True), 4, [], 0))
    assert [each["teacher_revision"] for each in seen] == commits
    with pytest.raises(script.UnusableInput, match=f"teacher_revision was '{commits[0]}', is '{commits[1]}'"):
        script.check_resume(tmp_path, {"settings": seen[0], "global_step": 2}, seen[1], 4)
    script.check_resume(tmp_path, {"settings": seen[0] | {"teacher_revision": "main"}, "global_step": 2}, seen[1], 4)


@one_family
@cases("objective,flag", [("consistency", "student_eta"), ("matching", "loss_space")])
def test_flags_of_the_other_objective_are_said_to_do_nothing(script, prompts, start_lora, objective, flag):
    changes = {"student_eta": 0.5, "loss_space": "epsilon", "objective": objective, "train_shards_path_or_url": "x"}
    args = script.parse_args(matching_flags("owner/name", prompts, start_lora, "out", **changes))
    named = [line.split()[0] for line in script.without_effect(args, torch.device("cpu")) if "objective" in line]
    assert f"--{flag}" in named and all(name[2:] not in script.READ_BY[objective] for name in named)
