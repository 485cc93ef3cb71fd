"""The mathematics of the loss, against diffusers' schedulers and plain formulas."""

import argparse
import dataclasses

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, load_script
from diffusers import DDIMScheduler, LCMScheduler

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
REQUIRED = ["--pretrained_teacher_model", "owner/name", "--train_shards_path_or_url", "pipe:cat 0.tar"]


@pytest.fixture(scope="module")
def script():
    """The SD 1.5 script: the mathematics is the same in both."""
    return load_script(SCRIPTS[0])


def args_of(script, **changes):
    args = script.build_parser().parse_args(REQUIRED)
    vars(args).update(changes)
    return args


def ddim(prediction_type="epsilon", **changes):
    """Return SD's scheduler, set to the solver's 50 steps."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, timestep_spacing="trailing", prediction_type=prediction_type, **changes,
    )  # fmt: skip
    scheduler.set_timesteps(50)
    return scheduler


def schedule_of(script, scheduler, **changes):
    return script.make_schedule(scheduler.config, args_of(script, **changes), torch.device("cpu"))


def noise(seed, batch=1):
    return torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def raw_output(scheduler, latents, eps, timesteps):
    """Return the output of a perfect UNet of the scheduler's prediction type for latents and eps."""
    if scheduler.config.prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, eps, timesteps)
    return eps if scheduler.config.prediction_type == "epsilon" else latents


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_solver_step_is_ddim(script, prediction_type):
    scheduler = ddim(prediction_type)
    schedule = schedule_of(script, scheduler)
    for index in (0, 1, 7, 25, 49):
        timesteps = schedule.ddim_timesteps[[index]]
        z_t, output = noise(index), noise(index + 100)
        z0, eps = script.clean_estimate(schedule, output, z_t, timesteps)
        z_prev = script.ddim_step(schedule, z0, eps, (timesteps - schedule.k).clamp(min=0))
        expected = scheduler.step(output, timesteps[0], z_t, eta=0.0).prev_sample
        torch.testing.assert_close(z_prev, expected, rtol=1e-5, atol=2e-5)


def test_solver_grid_is_trailing(script):
    schedule = schedule_of(script, ddim())
    assert schedule.k == 20
    assert schedule_of(script, ddim(), timestep_scaling_factor=7.0).timestep_scaling == 7.0
    assert schedule.ddim_timesteps.tolist() == list(range(19, 1000, 20))
    assert schedule.ddim_timesteps.tolist() == ddim().timesteps.tolist()[::-1]
    assert schedule_of(script, ddim(), num_ddim_timesteps=1000).ddim_timesteps.tolist() == list(range(1000))
    with pytest.raises(script.UnusableInput, match="--num_ddim_timesteps 1001"):
        schedule_of(script, ddim(), num_ddim_timesteps=1001)
    with pytest.raises(script.UnusableInput, match="--phases 2: the teacher has 500 timesteps"):
        schedule_of(script, ddim(num_train_timesteps=500), phases=2)


@pytest.mark.parametrize("timestep_scaling", [10.0, 0.5])
def test_boundary_scalings_are_those_of_lcm_scheduler(script, timestep_scaling):
    scheduler = LCMScheduler(timestep_scaling=timestep_scaling)
    timesteps = torch.tensor([0, 1, 19, 39, 499, 999])
    expected = [scheduler.get_scalings_for_boundary_condition_discrete(t.double()) for t in timesteps]
    actual = script.boundary_scalings(timesteps, timestep_scaling)
    for got, want in zip(actual, zip(*expected, strict=True), strict=True):
        assert got.shape == (6, 1, 1, 1) and got.dtype == torch.float32
        torch.testing.assert_close(got.flatten(), torch.stack(want).float(), rtol=1e-6, atol=0)
    assert [c[0].item() for c in actual] == [1.0, 0.0]


def test_v_prediction_takes_zero_terminal_snr(script):
    scheduler = ddim("v_prediction", rescale_betas_zero_snr=True)
    schedule = schedule_of(script, scheduler)
    assert schedule.alphas[-1] == 0 and schedule.sigmas[-1] == 1
    latents, eps, timesteps = noise(0), noise(1), torch.tensor([999])
    output = -latents  # v at pure noise
    z0, same_eps = script.clean_estimate(schedule, output, eps, timesteps)
    torch.testing.assert_close(z0, latents)
    torch.testing.assert_close(same_eps, eps)
    expected = scheduler.step(output, 999, eps, eta=0.0).prev_sample
    torch.testing.assert_close(script.ddim_step(schedule, z0, same_eps, torch.tensor([979])), expected)


def test_schedules_that_cannot_be_distilled_are_refused(script):
    with pytest.raises(script.UnusableInput, match="zero terminal SNR"):
        schedule_of(script, ddim("epsilon", rescale_betas_zero_snr=True))
    with pytest.raises(script.UnusableInput, match="--loss_space sample"):
        schedule_of(script, ddim("v_prediction", rescale_betas_zero_snr=True), loss_space="epsilon")
    config = dict(ddim().config) | {"prediction_type": "flow_prediction"}
    with pytest.raises(script.UnusableInput, match="prediction_type 'flow_prediction'"):
        script.make_schedule(config, args_of(script), torch.device("cpu"))


def test_schedule_tables_are_float32(script):
    schedule, alphas_cumprod = schedule_of(script, ddim()), ddim().alphas_cumprod.double()
    for table, expected in ((schedule.alphas, alphas_cumprod), (schedule.sigmas, 1 - alphas_cumprod)):
        assert table.dtype == torch.float32
        torch.testing.assert_close(table.double(), expected.sqrt(), rtol=1e-6, atol=1e-7)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(table.bfloat16().double(), expected.sqrt(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_estimate_undoes_add_noise(script, prediction_type):
    scheduler = ddim(prediction_type)
    schedule = schedule_of(script, scheduler)
    timesteps = torch.tensor([0, 19, 499, 999])
    latents, eps = noise(0, batch=4), noise(1, batch=4)
    z_t = script.add_noise(schedule, latents, eps, timesteps)
    torch.testing.assert_close(z_t, scheduler.add_noise(latents, eps, timesteps))
    output = raw_output(scheduler, latents, eps, timesteps)
    z0, same_eps = script.clean_estimate(schedule, output, z_t, timesteps)
    torch.testing.assert_close(z0, latents, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(same_eps, eps, rtol=1e-5, atol=2e-5)


def test_distance_is_the_plain_formula(script):
    pred, target = noise(0, batch=3), noise(1, batch=3)
    d, c = (pred - target).double().numpy(), 0.1
    assert script.distance(pred, target, "l2", c).item() == pytest.approx(np.mean(d**2), rel=1e-6)
    huber = np.mean(np.sqrt(d**2 + c**2) - c)
    assert script.distance(pred, target, "huber", c).item() == pytest.approx(huber, rel=1e-6)
    assert script.distance(pred, pred, "huber", 0.001).item() == 0


@pytest.mark.parametrize("loss_type", ["huber", "l2"])
def test_the_loss_in_epsilon_compares_the_noise_that_clean_latents_imply(script, loss_type):
    schedule = schedule_of(script, ddim())
    timesteps = torch.tensor([19, 499, 999])
    z_t, pred, target = (noise(seed, batch=3) for seed in range(3))
    args = argparse.Namespace(loss_type=loss_type, huber_c=0.1, loss_space="epsilon")
    alpha_t, sigma_t = schedule.at(timesteps)
    eps = [(z_t - alpha_t * z_0) / sigma_t for z_0 in (pred, target)]
    loss = script.loss_between(schedule, pred, target, timesteps, args)
    torch.testing.assert_close(loss, script.distance(*eps, loss_type, 0.1), rtol=1e-5, atol=0)
    args.loss_space = "sample"
    plain = script.loss_between(schedule, pred, target, timesteps, args)
    assert torch.equal(plain, script.distance(pred, target, loss_type, 0.1))


def draw(script, step=3, micro_step=1, rank=2, batch=64, **changes):
    return script.draw(args_of(script, **changes), (batch, 4, 4, 4), step, micro_step, rank, torch.device("cpu"))


def same(first, second):
    """Return for each field of two Draws whether they are equal."""
    names = [field.name for field in dataclasses.fields(first)]
    return [torch.equal(getattr(first, name), getattr(second, name)) for name in names]


def test_draws_are_a_function_of_their_key(script):
    first = draw(script, proportion_empty_prompts=0.5)
    after_first = torch.rand(8)  # dropout draws from here
    assert all(same(first, draw(script, proportion_empty_prompts=0.5)))
    assert torch.equal(torch.rand(8), after_first)
    assert not torch.equal(first.eps, first.posterior_eps)


@pytest.mark.parametrize("change", [{"seed": 1}, {"step": 4}, {"micro_step": 2}, {"rank": 3}])
def test_each_part_of_the_key_changes_every_draw(script, change):
    first = draw(script, proportion_empty_prompts=0.5)
    after_first = torch.rand(8)
    assert not any(same(first, draw(script, proportion_empty_prompts=0.5, **change)))
    assert not torch.equal(torch.rand(8), after_first)


def test_draws_keep_to_their_ranges(script):
    draws = draw(script, batch=4000, w_min=3.0, w_max=4.0, num_ddim_timesteps=10)
    assert draws.w.shape == (4000, 1, 1, 1) and draws.eps.shape == (4000, 4, 4, 4)
    assert 3.0 <= draws.w.min() < 3.02 and 3.98 < draws.w.max() <= 4.0
    assert sorted(set(draws.index.tolist())) == list(range(10))
    assert draws.eps.mean().abs() < 0.02 and abs(draws.eps.std() - 1) < 0.02
    assert draw(script, w_min=7.5, w_max=7.5).w.unique().tolist() == [7.5]


def test_proportion_of_empty_prompts(script):
    assert not draw(script, proportion_empty_prompts=0.0).empty.any()
    assert draw(script, proportion_empty_prompts=1.0).empty.all()
    assert 0.2 < draw(script, batch=4000, proportion_empty_prompts=0.25).empty.float().mean() < 0.3
