"""All tests: python -m pytest. About two minutes on two cores; no network, no GPU.

Each holds a property against something that does not share its code: a closed form, a brute-force search, scipy's
distributions, torch's own layers, a second process.
"""

import csv
import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.distributed.run
import torch.nn.functional as F
from PIL import Image

import data
import fm
import model
import sample
import train

HERE = Path(__file__).parent
MOONS = ["--data", "moons", "--device", "cpu", "--width", "16", "--batch", "32"]
TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--batch", "8", "--device", "cpu", "--warmup", "2"]


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with few faces, and leaves signals and threads as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "FACES", 60)
    monkeypatch.setenv("no_proxy", "*")
    handlers, threads = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}, torch.get_num_threads()
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.set_num_threads(threads)


def refused(capsys, run, *words, status=2):
    """The call ends with this exit status and one line on stderr in which all the words stand."""
    with pytest.raises(SystemExit) as end:
        run()
    line = capsys.readouterr().err.strip()
    assert end.value.code == status
    assert len(line.splitlines()) == 1 and "Traceback" not in line, line
    for word in words:
        assert word in line, line
    return line


def command(*args, **kwargs):
    """A command as a user types it."""
    args = [sys.executable, HERE / args[0], *map(str, args[1:])]
    return subprocess.run(args, capture_output=True, text=True, **kwargs)


def make_pictures(folder, n, size=(40, 30), **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{i:06d}.jpg", **kwargs)


# ---------------------------------------------------------------------------------------------------------------
# Paths, conversions, loss


@pytest.mark.parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
def test_path_runs_from_noise_to_data_and_its_derivatives_are_right(path):
    ends = [float(v) for v in (*path(torch.zeros(1))[:2], *path(torch.ones(1))[:2])]
    np.testing.assert_allclose(ends, [0, 1, 1, 0], atol=1e-6)
    t = torch.rand(50, dtype=torch.float64, requires_grad=True)
    for value, derivative in zip(path(t)[:2], path(t)[2:]):
        torch.testing.assert_close(torch.autograd.grad(value.sum(), t, retain_graph=True)[0], derivative)


@pytest.mark.parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
@pytest.mark.parametrize("have,want", list(itertools.product("xev", repeat=2)))
def test_convert_finds_any_of_x_e_v_from_any_other(path, have, want):
    x, e = torch.randn(2, 7, 3, 4, 4, dtype=torch.float64)
    t = torch.rand(7, dtype=torch.float64) * 0.98 + 0.01
    alpha, sigma, d_alpha, d_sigma = (s.reshape(7, 1, 1, 1) for s in path(t))
    truth = {"x": x, "e": e, "v": d_alpha * x + d_sigma * e}
    got = fm.convert(truth[have], have, want, alpha * x + sigma * e, t, path)
    torch.testing.assert_close(got, truth[want], rtol=1e-9, atol=1e-9)


def test_default_loss_is_the_x_error_over_clamped_one_minus_t_squared():
    x, e, p = torch.randn(3, 200, 5, dtype=torch.float64)
    t = torch.linspace(0, 1, 200, dtype=torch.float64)
    want = ((x - p) ** 2).mean(1) / torch.maximum(1 - t, torch.tensor(0.05)) ** 2
    torch.testing.assert_close(fm.loss(lambda z, t, y: p, x, e, t), want)


@pytest.mark.parametrize("predict,space", list(itertools.product("xev", repeat=2)))
def test_each_of_nine_losses_is_zero_at_the_truth_and_learns_a_point(predict, space):
    target = torch.tensor([1.5, -0.5])
    truth = {"x": lambda z, t: target.expand_as(z), "e": lambda z, t: (z - t * target) / (1 - t),
             "v": lambda z, t: (target - z) / (1 - t)}[predict]
    x, e, t = target.expand(64, 2), torch.randn(64, 2), torch.rand(64) * 0.8 + 0.1
    at_truth = fm.loss(lambda z, t, y: truth(z, t[:, None]), x, e, t, None, predict, space)
    assert at_truth.max() < 1e-8
    net = model.build("mlp", width=32, depth=2)
    optimizer, losses = torch.optim.Adam(net.parameters(), 3e-3), []
    for _ in range(150):
        e, t = torch.randn(64, 2), torch.rand(64)
        losses.append(fm.loss(net, x, e, t, None, predict, space).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_regressing_v_on_z_gives_the_marginal_velocity_of_a_gaussian():
    """For x ~ N(m, s^2) the best predictor of x - e given z is known; least squares must find it."""
    m, s, n = 1.3, 0.6, 400_000
    x, e = m + s * torch.randn(n, 1, dtype=torch.float64), torch.randn(n, 1, dtype=torch.float64)
    for t in (0.2, 0.5, 0.9):
        seen, guess = [], torch.zeros(n, 1, dtype=torch.float64, requires_grad=True)
        net = lambda z, *_: seen.append(z) or guess
        fm.loss(net, x, e, torch.full((n,), t, dtype=torch.float64), None, "v", "v").sum().backward()
        slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        fit = scipy.stats.linregress(seen[0].flatten(), -guess.grad.flatten() / 2)  # (0 - v)^2 pulls by -2 v
        assert abs(fit.slope - slope) < 0.02
        assert abs(fit.intercept - (m - slope * t * m)) < 0.02


# ---------------------------------------------------------------------------------------------------------------
# Times and couplings


def test_training_times_are_logit_normal_or_uniform():
    g = torch.Generator().manual_seed(1)
    t = fm.sample_t(20_000, mean=-0.8, generator=g).double()
    assert scipy.stats.kstest((torch.logit(t) + 0.8) / 0.8, "norm").pvalue > 0.01
    assert scipy.stats.kstest(fm.sample_t(20_000, generator=g), "uniform").pvalue > 0.01


def test_resolution_shift_keeps_the_signal_to_noise_ratio_of_averaged_pictures():
    """Averaging k x k pixels divides the noise by k: t/(1-t) at k times the resolution may be k times smaller."""
    assert fm.logit_normal_mean(256) == pytest.approx(-0.8)
    for res in (32, 64, 512):
        odds = [math.exp(fm.logit_normal_mean(r)) for r in (res, 256)]
        assert odds[0] / odds[1] == pytest.approx(256 / res)


def test_ot_pair_equals_brute_force_and_uses_every_noise_once():
    for _ in range(5):
        x, e = torch.randn(2, 6, 3, 2)
        cost = lambda order: ((x - e[list(order)]) ** 2).sum()
        best = min(itertools.permutations(range(6)), key=cost)
        torch.testing.assert_close(fm.ot_pair(x, e), e[list(best)])
    paired = fm.ot_pair(x, e, block=4)  # pairs within the first four and within the last two
    for part in (slice(0, 4), slice(4, 6)):
        assert sorted(paired[part, 0, 0].tolist()) == sorted(e[part, 0, 0].tolist())


def test_ot_pair_refuses_non_finite_input():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="finite"):
        fm.ot_pair(x, x / 0)


def test_w2_of_a_shifted_cloud_is_the_shift():
    a = torch.randn(100, 2)
    assert fm.w2(a, a[torch.randperm(100)] + torch.tensor([3.0, 4.0])) == pytest.approx(5)
    assert fm.w2(a, a / 0) == math.inf


# ---------------------------------------------------------------------------------------------------------------
# Solvers and the sampler


def errors_on_analytic_ode(solver):
    """dz/dt = -2 t z^2, z = 1 / (1 + t^2): errors at t = 1 for 20, 40, 80 steps."""
    v = lambda z, t: -2 * t * z**2
    z = torch.ones(1, 1, dtype=torch.float64)
    return [abs(fm.solve(v, z, fm.time_grid(n), solver)[0].item() - 0.5) for n in (20, 40, 80)]


@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_order_of_convergence(solver, order):
    errors = errors_on_analytic_ode(solver)
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_dopri5_keeps_its_tolerance_and_has_order_5():
    """Its error per step is tol ~ h^5, so 32 times the accuracy should cost about twice the evaluations."""
    v = lambda z, t: z * math.cos(12 * t) * 6
    exact, results = math.exp(math.sin(12) / 2), []
    for tol in (1e-4, 1e-4 / 32, 1e-4 / 1024):
        z, nfe = fm.solve(v, torch.ones(1, 1, dtype=torch.float64), [0.0, 1.0], "dopri5", tol=tol)
        assert abs(z.item() - exact) < 20 * tol
        results.append(nfe)
    for fewer, more in zip(results, results[1:]):
        assert more / fewer == pytest.approx(2, rel=0.25)


def test_dopri5_leaves_only_a_thousandth_of_the_last_step_to_euler():
    v = lambda z, t: z * math.cos(3 * t) if t < 1 else z / 0
    for grid in ([0.0, 1.0], fm.time_grid(3)):
        z, nfe = fm.solve(v, torch.ones(1, 1, dtype=torch.float64), grid, "dopri5", end_euler=True, tol=1e-6)
        assert z.item() == pytest.approx(math.exp(math.sin(3) / 3), abs=1e-5) and nfe > 12


def test_shifted_time_grid_divides_the_odds_and_keeps_the_ends():
    plain, shifted = fm.time_grid(10), fm.time_grid(10, shift=3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and plain[3] == pytest.approx(0.3)
    for t, s in zip(plain[1:-1], shifted[1:-1]):
        assert s / (1 - s) == pytest.approx(t / (1 - t) / 3)


def test_guidance_is_off_at_1_and_outside_its_interval_and_runs_one_batch_inside():
    batches = []

    def net(z, t, y):
        batches.append(len(z))
        return z * 0 + y[:, None].float()  # velocity: the label, or -1 without one

    z, y = torch.zeros(4, 2), torch.full((4,), 3)
    for w, t, want in ((1.0, 0.5, 3.0), (2.0, 0.05, 3.0), (2.0, 0.5, 7.0), (0.0, 0.5, -1.0)):
        assert (fm.velocity(net, "v", y=y, guidance=w, interval=(0.1, 0.9))(z, t) == want).all()
    assert batches == [4, 4, 8, 8]


# ---------------------------------------------------------------------------------------------------------------
# Likelihood


@pytest.mark.parametrize("hutchinson", [False, True])
def test_likelihood_of_a_gaussian_is_its_closed_form(hutchinson):
    m, s = 0.7, 0.5
    v = lambda z, t: m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (z - t * m)
    x = m + s * torch.randn(50, 3, dtype=torch.float64)
    sign = torch.sign(torch.randn_like(x)) if hutchinson else None  # exact here: the Jacobian is diagonal
    log_p, _ = fm.log_likelihood(v, x, fm.time_grid(200)[::-1], "rk4", sign)
    want = scipy.stats.norm(m, s).logpdf(x.numpy()).sum(1)
    np.testing.assert_allclose(log_p, want, atol=1e-5)


def test_likelihood_of_a_mixture_of_noisy_points_is_its_closed_form():
    """The flow to a finite dataset, stopped at t: points t x_i, each with noise 1-t around it."""
    points = torch.tensor([[-1.0, 0.5], [1.0, -0.3], [0.2, 1.0]], dtype=torch.float64)
    end, v = 0.8, fm.velocity(ideal_denoiser(points))
    z = end * points[torch.randint(0, 3, (40,))] + (1 - end) * torch.randn(40, 2, dtype=torch.float64)
    log_p, _ = fm.log_likelihood(v, z, [end * t for t in fm.time_grid(300)[::-1]], "rk4")
    each = [scipy.stats.multivariate_normal(end * p, (1 - end) ** 2).logpdf(z) for p in points.numpy()]
    np.testing.assert_allclose(log_p, scipy.special.logsumexp(each, axis=0) - math.log(3), atol=1e-5)


def test_hutchinson_estimates_the_trace_without_bias():
    A = torch.randn(4, 4, dtype=torch.float64)
    v = lambda z, t: z @ A.T / 4
    x = torch.zeros(20_000, 4, dtype=torch.float64)
    exact, _ = fm.log_likelihood(v, x[:1], [1.0, 0.0], "rk4")
    guess, _ = fm.log_likelihood(v, x, [1.0, 0.0], "rk4", torch.randint(0, 2, x.shape) * 2.0 - 1.0 + 0 * x)
    assert abs(guess.mean() - exact) < 4 * guess.std() / math.sqrt(20_000)


def test_uniform_bytes_have_eight_bits_per_dimension():
    """Density 1/2 on [-1, 1] in every dimension."""
    assert fm.bits_per_dimension(torch.tensor(10 * math.log(0.5)), 10) == pytest.approx(8)


# ---------------------------------------------------------------------------------------------------------------
# Solvers backwards


@pytest.mark.parametrize("solver", fm.SOLVERS)
def test_solver_runs_backwards_to_where_it_came_from_and_counts_evaluations(solver):
    calls = []
    v = lambda z, t: calls.append(t) or torch.sin(z)
    z = torch.randn(5, 2, dtype=torch.float64)
    there, nfe = fm.solve(v, z, fm.time_grid(400), solver)
    assert nfe == len(calls)
    back, _ = fm.solve(v, there, fm.time_grid(400)[::-1], solver)
    assert (there - z).abs().max() > 0.1 and (back - z).abs().max() < 5e-3


def test_euler_with_100_steps_follows_a_sine_closely():
    states = [torch.zeros(1, 1)]
    v = lambda z, t: torch.full_like(z, 2 * math.pi * math.cos(2 * math.pi * t))
    fm.solve(v, states[0], fm.time_grid(100), states=states)
    sine = np.sin(2 * np.pi * np.arange(101) / 100)
    bound = 0.01 / 2 * 4 * np.pi  # h/2 times the largest change of slope
    assert np.abs(torch.cat(states).flatten().numpy() - sine).max() <= bound * 1.01


def test_gaussian_velocity_in_closed_form_gives_exact_samples():
    """Data N(m, s^2): the flow is affine, so noise z must land on m + s z."""
    m, s = 2.0, 0.5
    v = lambda z, t: m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (z - t * m)
    z = torch.randn(500, 1, dtype=torch.float64)
    torch.testing.assert_close(fm.solve(v, z, fm.time_grid(400), "heun")[0], m + s * z, atol=2e-4, rtol=0)


def ideal_denoiser(points):
    """E[x | z] when the data are finitely many points: a softmax over them (straight path)."""
    def net(z, t, y=None):
        distance = ((z[:, None] - t[:, None, None] * points) ** 2).sum(-1)
        return (-distance / (2 * (1 - t[:, None]) ** 2)).softmax(1) @ points
    return net


def test_ideal_x_prediction_samples_land_on_the_finite_dataset():
    points = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    z = torch.randn(600, 2, dtype=torch.float64)
    x, _ = fm.solve(fm.velocity(ideal_denoiser(points)), z, fm.time_grid(50), "heun", end_euler=True)
    distance, nearest = torch.cdist(x, points).min(1)
    assert distance.max() < 1e-6
    assert (nearest.bincount() / 600 - 1 / 3).abs().max() < 0.08  # each a third of the time


@pytest.mark.parametrize("solver", fm.SOLVERS)
def test_last_step_lands_on_the_predicted_picture(solver):
    seen = {}
    net = lambda z, t, y: seen.setdefault(float(t[0]), torch.tanh(3 * z))
    x, _ = fm.solve(fm.velocity(net), torch.randn(4, 3, 8, 8), fm.time_grid(50), solver, end_euler=True)
    torch.testing.assert_close(x, seen[max(seen)], atol=1e-5, rtol=0)


def test_training_clamp_in_the_sampler_would_leave_noise_and_ours_leaves_none():
    """Noise measured as distance from the data of a perfect denoiser."""
    points = 2 * torch.randint(0, 2, (20, 64), dtype=torch.float64) - 1
    net, z, ts = ideal_denoiser(points), torch.randn(50, 64, dtype=torch.float64), fm.time_grid(50)
    clamped = lambda z, t: fm.convert(net(z, torch.full((50,), t, dtype=z.dtype)), "x", "v", z,
                                      torch.full((50,), t, dtype=z.dtype), clamp=fm.CLAMP)
    noise = {name: torch.cdist(fm.solve(v, z, ts)[0], points).min(1).values.square().mean().div(64).sqrt().item()
             for name, v in (("clamped", clamped), ("ours", fm.velocity(net)))}
    assert noise["ours"] < 1e-6 and noise["clamped"] > 0.005, noise


@pytest.mark.parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
def test_inpainting_keeps_what_is_known_and_repeats_find_the_only_completion(path):
    """Four points; the first two numbers tell which one it is. A perfect denoiser must find the other two."""
    x = torch.tensor([[-1.0, -1, 2, 0], [-1, 1, -2, 0], [1, -1, 0, 2], [1, 1, 0, -2]], dtype=torch.float64)
    hole, wanted = torch.tensor([False, False, True, True]), x.repeat(50, 1)

    def denoiser(z, t, y=None):
        alpha, sigma, _, _ = path(t)
        return (-((z[:, None] - alpha[:, None, None] * x) ** 2).sum(-1) / (2 * sigma[:, None] ** 2)).softmax(1) @ x

    right = {}
    for repeats in (1, 5, 25):
        z = torch.randn(200, 4, dtype=torch.float64)
        z, nfe = fm.inpaint(fm.velocity(denoiser, path=path), z, wanted, hole, lambda: torch.randn_like(z),
                            fm.time_grid(20), path, "heun", True, repeats=repeats)
        assert nfe == 39 * repeats
        torch.testing.assert_close(z[:, :2], wanted[:, :2], atol=1e-6, rtol=0)
        right[repeats] = ((z - wanted).abs().amax(1) < 0.01).double().mean()
    assert right[1] + 0.1 < right[5] < right[25] > 0.85, right


def test_dopri5_passes_through_every_time_of_the_grid():
    states = []
    fm.solve(lambda z, t: torch.ones_like(z), torch.zeros(1), fm.time_grid(4), "dopri5", end_euler=True, states=states)
    torch.testing.assert_close(torch.cat(states), torch.tensor([0.25, 0.5, 0.75, 0.99975, 1.0]))  # the last by Euler


@pytest.mark.parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
def test_filling_in_goes_back_to_states_that_the_path_has(path):
    """For data that are always 2, z at time s is normal with mean 2 alpha(s) and deviation sigma(s)."""
    x, states = torch.full((20_000, 1), 2.0, dtype=torch.float64), []
    v = fm.velocity(lambda z, t, y: torch.full_like(z, 2.0), path=path)
    fm.inpaint(v, torch.randn_like(x), x, torch.tensor([True]), lambda: torch.randn_like(x), fm.time_grid(4), path,
               "rk4", True, states)
    for s, z in zip((0.25, 0.5, 0.75), states):
        alpha, sigma = path(torch.tensor(s))[:2]
        assert z.mean().item() == pytest.approx(2 * alpha.item(), abs=0.03)
        assert z.std().item() == pytest.approx(sigma.item(), rel=0.03)


def test_starting_from_a_picture_stays_near_it_when_little_noise_is_added():
    points = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    config, back = dict(predict="x", path="linear", bf16=False), []
    for strength in (0.3, 1.0):
        z = (1 - strength) * points[0] + strength * torch.randn(200, 2, dtype=torch.float64)
        x, _ = sample.generate(ideal_denoiser(points), config, z, 20, start=1 - strength)
        back.append(((x - points[0]).abs().amax(1) < 0.01).double().mean().item())
    assert back[0] > 0.95 and 0.35 < back[1] < 0.65


@pytest.mark.parametrize("predict", ["e", "v"])
def test_e_and_v_predictions_sample_too(predict):
    """A perfect network for one data point, whatever it predicts, brings all noise there."""
    target = torch.tensor([1.0, -2.0])
    net = {"v": lambda z, t, y: (target - z) / (1 - t[:, None]),
           "e": lambda z, t, y: (z - t[:, None] * target) / (1 - t[:, None])}
    x, _ = fm.solve(fm.velocity(net[predict], predict), torch.randn(50, 2), fm.time_grid(200))
    assert (x - target).abs().max() < 0.2


# ---------------------------------------------------------------------------------------------------------------
# The networks


@pytest.mark.parametrize("patch,stride", [(p, s) for p in (4, 6, 8, 16) for s in model.strides_that_fit(16, p)])
def test_unpatchify_inverts_patchify_for_every_stride_but_not_without_the_mask(patch, stride):
    z = torch.randn(2, 3, 16, 16)
    patches = model.patchify(z, patch, stride)
    assert patches.shape == (2, ((16 - patch) // stride + 1) ** 2, 3 * patch**2)
    torch.testing.assert_close(model.unpatchify(patches, 16, patch, stride), z)
    unmasked = F.fold(patches.transpose(1, 2), 16, patch, stride=stride)
    assert torch.allclose(unmasked, z) == (stride == patch or patch == 16)


def test_stride_that_does_not_fit_names_the_nearest_that_do():
    with pytest.raises(ValueError, match="nearest that fit: 12, 15"):
        model.check_stride(256, 16, 13)
    for patch, stride in ((16, 17), (300, 12), (16, 0)):
        with pytest.raises(ValueError):
            model.check_stride(256, patch, stride)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rmsnorm_equals_torchs_forward_and_gradient(dtype, tolerance):
    ours, theirs = model.RMSNorm(48), torch.nn.RMSNorm(48, eps=1e-6)
    ours.weight.data = theirs.weight.data = torch.rand(48) + 0.5
    start = (5 * torch.randn(4, 7, 48)).to(dtype)
    z = [start.clone().requires_grad_() for _ in "ab"]
    out = ours(z[0]), F.rms_norm(z[1], (48,), theirs.weight.to(dtype), 1e-6)
    torch.testing.assert_close(*out, atol=tolerance, rtol=tolerance)
    for o in out:
        (o.float() ** 3).sum().backward()
    scale = z[1].grad.abs().max()
    torch.testing.assert_close(z[0].grad / scale, z[1].grad / scale, atol=tolerance, rtol=tolerance)


def test_derf_equals_its_formula_in_float64():
    norm = model.Derf(10).double()
    z = torch.randn(3, 10, dtype=torch.float64)
    assert [norm.alpha.item(), norm.s.item(), norm.gamma.unique().item(), norm.beta.unique().item()] == [0.5, 0, 1, 0]
    for p in norm.parameters():
        p.data += torch.randn_like(p)
    a, s, gamma, beta = (p.detach().numpy() for p in (norm.alpha, norm.s, norm.gamma, norm.beta))
    np.testing.assert_allclose(norm(z).detach(), gamma * scipy.special.erf(a * z.numpy() + s) + beta)


def test_rope_scores_depend_on_relative_position_only_in_both_axes():
    side, d = 7, 16
    cos, sin = (table.double()[:, 0] for table in model.rope_table(side, d))
    q, k = torch.randn(2, d, dtype=torch.float64)
    scores = (model.rope(q.expand(side**2, d), cos, sin) @ model.rope(k.expand(side**2, d), cos, sin).T)
    scores = scores.view(side, side, side, side)  # [row, column] of q, [row, column] of k
    torch.testing.assert_close(scores[1:, :, 1:], scores[:-1, :, :-1], atol=1e-6, rtol=0)
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1], atol=1e-6, rtol=0)
    by_row, by_column = scores[:, 3, 3, 3], scores[3, :, 3, 3]
    assert by_row.std() > 0.01 and by_column.std() > 0.01 and not torch.allclose(by_row, by_column)


def test_attention_by_hand_equals_the_fused_one_forward_and_gradient():
    inputs = [torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    results = []
    for attention in (model.ATTENTION["hand"], model.ATTENTION["fused"]):
        out = attention(*inputs)
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
    for hand, fused in zip(*results):
        torch.testing.assert_close(hand, fused)


def test_importance_weights_leave_the_mean_loss_as_it_was():
    """E_q[w f] = E_p[f] for any f, and rare times are drawn far more often."""
    g, f = torch.Generator().manual_seed(0), lambda t: torch.sin(9 * t) + t**3
    plain = fm.sample_t(400_000, -0.8, generator=g)
    covered = fm.sample_t(400_000, -0.8, cover=0.3, generator=g)
    weight = fm.importance(covered, -0.8, 0.3)
    assert fm.importance(torch.tensor([0.0, 0.5, 1.0]), 20.0, 0.5).isfinite().all()
    assert abs((weight * f(covered)).mean() - f(plain).mean()) < 0.01 and abs(weight.mean() - 1) < 0.01
    assert (covered > 0.9).float().mean() > 5 * (plain > 0.9).float().mean()


def small_transformer(**sizes):
    return model.build("transformer", **{**dict(res=16, patch=8, stride=4, width=32, depth=2, heads=2), **sizes})


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_attention_tells_equal_tokens_apart_by_relative_position_only(kind, monkeypatch):
    scores = []
    monkeypatch.setitem(model.ATTENTION, "hand", lambda q, k, v: scores.append(q @ k.transpose(-2, -1)) or v)
    sizes = dict(patch=4, stride=4, width=32) if kind == "transformer" else dict(width=16, channels=3)
    net = model.build(kind, res=16, depth=1, heads=2, attention="hand", **sizes)
    attention = net.blocks[0].attention if kind == "transformer" else net.attention
    attention(torch.randn(attention.q.in_features).expand(1, 16, -1))
    scores = scores[0][0, 0].view(4, 4, 4, 4)  # [row, column] of q, [row, column] of k
    torch.testing.assert_close(scores[1:, :, 1:], scores[:-1, :, :-1])
    torch.testing.assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1])
    assert scores.std() > 0.01


@pytest.mark.parametrize("attention", ["auto", "fused"])
def test_whole_network_does_not_depend_on_how_attention_is_computed(attention):
    torch.manual_seed(1)
    net = small_transformer(attention="hand")
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    other = small_transformer(attention=attention)
    other.load_state_dict(net.state_dict())
    z, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    torch.testing.assert_close(net(z, t), other(z, t), atol=1e-5, rtol=1e-4)


def test_each_scale_and_gate_of_a_block_acts_on_its_own_branch():
    block, z, c = model.Block(2, 16, 2, "rms", "hand"), torch.randn(1, 4, 16), torch.zeros(1, 16)
    one, zero = torch.ones(16), torch.zeros(16)
    for scale1, gate1, scale2, gate2, same in (  # a scale of -1 lets nothing into its branch, a gate of 0 nothing out
            (-one, one, zero, zero, True), (zero, zero, -one, one, True),
            (-one, zero, zero, one, False), (zero, one, -one, zero, False)):
        block.modulation.bias.data = torch.cat([scale1, gate1, scale2, gate2])
        assert torch.equal(block(z, c), z) == same


@pytest.mark.parametrize("kind", ["transformer", "unet"])
def test_networks_of_pictures_answer_by_time(kind):
    sizes = dict(patch=8, stride=4) if kind == "transformer" else {}
    net = model.build(kind, res=16, width=32, depth=1, heads=2, channels=3, **sizes)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    early, late = net(torch.randn(1, 3, 16, 16).expand(2, -1, -1, -1), torch.tensor([0.2, 0.8]))
    assert (early - late).abs().max() > 1e-2


def test_the_unet_gives_each_pixel_the_answer_of_its_own_token():
    net, seen = model.build("unet", res=16, width=16, depth=1, channels=3), []
    net.attention = torch.nn.Identity()
    net.down3.register_forward_hook(lambda net, inputs, h: seen.append(h))
    net.up3.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0]))
    net(torch.randn(2, 3, 16, 16), torch.rand(2))
    torch.testing.assert_close(seen[1], seen[0] + net.norm3(seen[0]))


@pytest.mark.parametrize("norm", model.NORMS)
def test_every_parameter_of_the_transformer_learns(norm):
    net = small_transformer(norm=norm)
    x, optimizer = torch.randn(8, 3, 16, 16).tanh(), torch.optim.AdamW(net.parameters(), 3e-3)
    assert (net(x, torch.rand(8)) == 0).all() == (norm == "rms")  # zero at the start, but not with Derf
    before, losses = [p.clone() for p in net.parameters()], []
    for _ in range(40):
        losses.append(fm.loss(net, x, torch.randn_like(x), torch.rand(8)).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("res,channels", [(28, 1), (32, 3)])
def test_every_parameter_of_the_unet_learns(res, channels):
    net = model.build("unet", res=res, channels=channels, width=16, depth=1, heads=2, labels=3)
    x, y = torch.randn(6, channels, res, res).tanh(), torch.tensor([0, 1, 2, -1, 0, 1])
    assert net(x, torch.rand(6), y).shape == x.shape and (net(x, torch.rand(6), y) == 0).all()
    before, losses = [p.clone() for p in net.parameters()], []
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0)
    for _ in range(25):
        losses.append(fm.loss(net, x, torch.randn_like(x), torch.rand(6), y).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_unet_refuses_sizes_that_do_not_fit():
    for sizes, word in ((dict(res=30), "res 30"), (dict(width=20), "width 20"), (dict(heads=7), "7 heads")):
        with pytest.raises(ValueError, match=word):
            model.build("unet", **{**dict(res=28, width=32, heads=4), **sizes})


def test_labels_are_rows_of_a_table_and_no_label_has_a_row_of_its_own():
    labels = model.Labels(3, 5)
    one = labels(torch.tensor([0, 2, -1]))
    torch.testing.assert_close(one, labels.rows[[0, 2, 3]])
    many = labels(torch.tensor([[1, 0, 1], [0, 0, 0], [-1, -1, -1]]))
    rows = labels.rows
    torch.testing.assert_close(many, torch.stack([rows[0] + rows[2], 0 * rows[0], rows[3]]))
    assert torch.equal(labels(None), labels.rows[3]) and model.Labels(0, 5)(None) == 0


@pytest.mark.parametrize("sizes", [dict(kind="transformer", patch=8, stride=8), dict(kind="unet")])
def test_labels_weigh_about_as_much_as_time_before_training(sizes):
    """Rows a tenth as large were heard so late that samples ignored their labels."""
    torch.manual_seed(0)
    net = model.build(res=32, width=64, heads=4, labels=8, **sizes)
    of_time = net.time(model.sinusoidal(torch.rand(512), 256)).std(0).mean()
    of_label = net.labels(torch.arange(8)).std(0).mean()
    assert 0.5 < of_label / of_time < 5


def test_the_256_pixel_face_model_has_about_115M_parameters_and_441_tokens():
    config = train.resolve({"data": "celeba", "res": 256})
    with torch.device("meta"):
        net = model.build(**{**train.network(config), "attention": "hand"})
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(115e6, rel=0.01)
    assert net.position.shape == (441, 768)


def test_presets_fit_every_resolution_with_several_patches_a_side():
    sizes = {res: vars(train.resolve({"data": "faces", "res": res})) for res in (32, 256)}
    assert [(size["patch"], size["stride"]) for size in sizes.values()] == [(4, 4), (16, 12)]
    for res in (*range(8, 65), 96, 128, 256, 512):
        config = train.resolve({"data": "faces", "res": res})
        model.check_stride(res, config.patch, config.stride)
        assert (res - config.patch) // config.stride + 1 >= 4, (res, config.patch, config.stride)


def test_presets_of_small_pictures_see_more_noise_than_the_formula_and_of_large_ones_as_much():
    means = [train.resolve({"data": "faces", "res": res}).t_mean for res in (32, 64, 256, 512)]
    assert means == pytest.approx([0, 0, -0.8, -0.8 - math.log(2)])


def test_time_embedding_tells_nearby_times_apart():
    t = torch.linspace(0, 1, 1001)
    distance = torch.cdist(model.sinusoidal(t, 256), model.sinusoidal(t, 256))
    assert (distance + 9 * torch.eye(1001)).min() > 0.5


# ---------------------------------------------------------------------------------------------------------------
# Data


def test_batches_are_epochs_of_permutations_laid_end_to_end():
    seen = np.concatenate([data.batch_indices(10, 4, step, seed=3) for step in range(10)])
    epochs = seen.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4
    assert np.bincount(data.batch_indices(3, 9, 0, seed=0)).tolist() == [3, 3, 3]


def test_ranks_share_out_a_batch_without_overlap_and_draw_different_noise():
    config = train.resolve({"data": "faces", "batch": 8, "flip": False})
    images, labels, _ = data.load("faces", "data", 32)
    whole = train.batch(config, images, labels, 5, 0, 1, torch.device("cpu"))
    parts = [train.batch(config, images, labels, 5, rank, 2, torch.device("cpu")) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([parts[0][0], parts[1][0]]), whole[0])
    assert not torch.equal(parts[0][1], parts[1][1]) and not torch.equal(parts[0][2], parts[1][2])
    again = train.batch(config, images, labels, 5, 1, 2, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(parts[1][:3], again))


def test_labels_are_hidden_one_by_one_and_stay_with_their_pictures_under_ot():
    """Only the noise may move: whatever --ot and --drop do, picture and label stay those of the packed arrays."""
    images, labels, names = data.load("faces", "data", 32)
    config = train.resolve({"data": "faces", "batch": 40, "flip": False, "drop": 0.25, "cond": "all", "ot": True})
    x, e, t, y, _ = train.batch(config, images, labels, 3, 0, 1, torch.device("cpu"))
    pixels = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    hidden = (y < 0).all(1)
    assert 2 < hidden.sum() < 20
    for picture, row, gone in zip(pixels, y.numpy(), hidden):
        place = np.flatnonzero((images == picture).all((1, 2, 3)))
        assert gone or (labels[place] == row).all(1).any()
    for other in ({"ot": False}, {"ot_block": 4}):
        again = train.batch(train.resolve({**vars(config), **other}), images, labels, 3, 0, 1, torch.device("cpu"))
        assert torch.equal(again[0], x) and torch.equal(again[3], y) and not torch.equal(again[1], e)


@pytest.mark.parametrize("name", data.POINTS)
def test_points_fill_their_shape(name):
    p = data.points(name, 4000, seed=0).numpy()
    assert p.shape == (4000, 2) and p.dtype == np.float32 and np.abs(p).max() < 6.5
    x, y = p.T
    if name == "checkerboard":
        assert ((np.floor(x / 2) + np.floor(y / 2)) % 2 == 0).mean() == 1 and np.histogram2d(x, y, 4)[0].max() < 650
    elif name == "8gaussians":
        corner = np.round(np.arctan2(y, x) / (np.pi / 4)).astype(int) % 8
        assert np.bincount(corner).min() > 400 and abs(np.hypot(x, y).mean() - 4) < 0.1
    elif name == "moons":
        upper = np.abs(np.hypot(x + 1, y + 1) - 3) < 1
        lower = np.abs(np.hypot(x - 2, y - 0.5) - 3) < 1
        assert 0.4 < upper.mean() < 0.75 and (upper | lower).mean() > 0.98
    else:
        r, angle = np.hypot(x, y), np.arctan2(y, x)
        off = (angle - 3 * np.pi * r / 4) % np.pi  # both arms; as a distance between turns of the spiral:
        assert np.mean(np.minimum(off, np.pi - off) / (3 * np.pi / 4) < 0.3) > 0.95


def test_a_face_depends_on_its_index_alone_and_looks_alike_at_every_resolution():
    both, labels = data.draw_faces([5, 9], 32)
    for i, index in enumerate((5, 9)):
        one, label = data.draw_faces([index], 32)
        assert (one[0] == both[i]).all() and (label[0] == labels[i]).all()
    fine, fine_labels = data.draw_faces([5, 9], 128)
    assert (fine_labels == labels).all() and labels.shape == (2, len(data.FACE_ATTRIBUTES))
    shrunk = fine.reshape(2, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(shrunk - both).mean() < 3


def test_faces_are_varied_and_every_attribute_is_there_and_missing():
    pictures, labels = data.draw_faces(np.arange(400), 16)
    assert len(np.unique(pictures.reshape(400, -1), axis=0)) == 400
    assert (labels.mean(0) > 0.05).all() and (labels.mean(0) < 0.95).all()


def test_pictures_are_cropped_to_the_centre_turned_upright_and_put_on_white():
    Image.fromarray(np.repeat(np.uint8([[255] * 10 + [0] * 40 + [255] * 10]), 40, 0)).save("wide.png")
    assert data.read_picture("wide.png", 20).max() < 20
    upright = np.zeros((40, 40, 3), np.uint8)
    upright[:20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(upright)).save("turned.png", exif=exif)
    got = data.read_picture("turned.png", 10).astype(int)
    assert (got[:4] > 250).all() and (got[-4:] < 5).all()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save("clear.png")
    assert (data.read_picture("clear.png", 8) == 255).all()


def test_sixteen_bit_pictures_are_scaled_and_floating_point_ones_named(capsys):
    Path("deep").mkdir()
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save("deep/a.png")
    Image.fromarray((ramp / 65535).astype(np.float32)).save("deep/b.tiff")
    images = data.load("deep", "data", 16)[0]
    assert len(images) == 1 and abs(images.mean() - 127.5) < 2 and "b.tiff" in capsys.readouterr().out


def test_whoever_changes_how_faces_are_drawn_gets_them_packed_again(tmp_path):
    text, sheets = (HERE / "data.py").read_text().replace("FACES, DOTS = 20_000", "FACES, DOTS = 20"), []
    for edited in (text, text.replace("paint(True, skin, head", "paint(True, 0 * skin, head")):
        Path("data.py").write_text(edited)
        subprocess.run([sys.executable, "data.py", "--res", "16"], check=True)
        sheets.append(Path("out/faces-16/data.png").read_bytes())
    assert sheets[0] != sheets[1]


def test_shrinking_takes_every_pixel_into_account():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save("stripes.png")
    assert np.abs(data.read_picture("stripes.png", 16).astype(int) - 128).max() <= 4


def test_folder_is_packed_once_with_sub_folders_as_labels_and_again_when_it_changes(capsys):
    make_pictures(Path("pets/cat"), 3)
    make_pictures(Path("pets/dog"), 2)
    Path("pets/link.png").symlink_to("nowhere.png")
    Path("pets/folder.png").mkdir()
    images, labels, names = data.load("pets", "data", 16)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert names == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1, 1]
    assert "packing" in capsys.readouterr().out
    data.load("pets", "data", 16)
    assert "packing" not in capsys.readouterr().out
    make_pictures(Path("pets/dog"), 4)
    assert len(data.load("pets", "data", 16)[0]) == 7


def test_zip_packs_to_the_same_pixels_as_the_folder():
    make_pictures(Path("pets"), 4)
    with zipfile.ZipFile("pets.zip", "w") as archive:
        for p in Path("pets").iterdir():
            archive.write(p)
        archive.writestr("__MACOSX/pets/._000000.jpg", b"not a picture")
    assert (data.load("pets", "data", 16)[0] == data.load("pets.zip", "data", 16)[0]).all()


def test_broken_pictures_are_skipped_counted_and_named(capsys):
    make_pictures(Path("pets"), 3)
    Path("pets/bad.jpg").write_bytes(b"nonsense")
    whole = Path("pets/000000.jpg").read_bytes()
    Path("pets/half.jpg").write_bytes(whole[: len(whole) // 2])
    images, labels, _ = data.load("pets", "data", 16)
    assert len(images) == len(labels) == 3
    said = capsys.readouterr().out
    assert "skipped 2 of 5" in said and "bad.jpg" in said and "half.jpg" in said


def test_a_picture_that_cannot_be_read_now_is_not_left_out_for_ever(monkeypatch):
    make_pictures(Path("pets"), 3)
    original = data.read_picture
    monkeypatch.setattr(data, "read_picture", lambda file, res: Path("pets/gone/a.jpg").read_bytes())
    with pytest.raises(OSError):
        data.load("pets", "data", 16)
    monkeypatch.setattr(data, "read_picture", original)
    assert len(data.load("pets", "data", 16)[0]) == 3


def test_a_damaged_zip_full_memory_and_a_missing_compiler_are_told_in_a_line(capsys):
    make_pictures(Path("pets"), 2)
    with zipfile.ZipFile("pets.zip", "w") as archive:
        for picture in Path("pets").iterdir():
            archive.write(picture)
    Path("pets.zip").write_bytes(Path("pets.zip").read_bytes().replace(b"PK\1\2", b"PK\7\7"))
    for code, word in (("data.main(['--data', 'pets.zip'])", "directory"),
                       ("torch.empty(2**50)", "; a smaller --batch needs less"),
                       ("torch.compile(torch.sin)(torch.ones(2))", "; --no-compile does without"),
                       ("torch.empty(2**62, dtype=int)", ""), ("torch.nn.Module()(1)", "")):
        done = subprocess.run([sys.executable, "-c", f"import data, torch; data.run(lambda: {code})"], text=True,
                              capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE), "CXX": "/none",
                                                        "TORCHINDUCTOR_CACHE_DIR": "inductor"})
        assert word in done.stderr
        assert ("Traceback" in done.stderr) == (word == ""), done.stderr  # the last two are mistakes in the program


def test_no_readable_picture_is_refused_and_nothing_half_packed_stays(capsys):
    Path("pets").mkdir()
    Path("pets/bad.png").write_bytes(b"nonsense")
    refused(capsys, lambda: data.load("pets", "data", 16), "none of the 1 pictures")
    assert list(Path("data/cache").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a remedy for Linux's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    code = """if True:
        import resource, data, torch
        def main():
            for step in range(40):
                if step == 20:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.zeros(2**24)  # 64 MiB, 16,384 pages
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        data.run(main)"""
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True).stdout
    assert int(said) < 16_384  # 20 times as many if each one were fetched anew


def test_a_full_disk_while_packing_is_told_in_a_line_and_leaves_nothing_behind():
    make_pictures(Path("pets"), 9)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # noqa: E731  stands in for the disk's
    done = command("data.py", "--data", "pets", "--res", 32, preexec_fn=limit)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr
    assert list(Path("data/cache").iterdir()) == [] and not Path("out/pets-32/data.png").exists()


def test_a_grid_is_read_like_a_page_and_a_scatter_plot_has_y_upwards():
    shades = np.arange(0, 240, 40, dtype=np.uint8)
    sheet = data.grid(np.broadcast_to(shades[:, None, None, None], (6, 72, 72, 1)), columns=3)
    assert [sheet.getpixel((40 + 76 * (i % 3), 40 + 76 * (i // 3))) for i in range(6)] == shades.tolist()
    dark = np.argwhere(np.array(data.scatter(np.array([[4.0, 3.0]])).convert("L")) < 250)
    np.testing.assert_allclose(dark.mean(0), (120, 400), atol=1)  # rows from the top; the middle is (240, 240)


@pytest.mark.parametrize("shape", ["zip", "folder", "hq"])
def test_celeba_is_found_in_its_usual_shapes(shape):
    place = {"zip": Path("tmp/img_align_celeba"), "folder": Path("data/celeba/img_align_celeba"),
             "hq": Path("data/celeba_hq_256")}[shape]
    make_pictures(place, 5, size=(178, 218))
    if shape == "zip":
        Path("data").mkdir()
        with zipfile.ZipFile("data/img_align_celeba.zip", "w") as archive:
            for p in place.iterdir():
                archive.write(p, f"img_align_celeba/{p.name}")
    assert data.load("celeba", "data", 32)[0].shape == (5, 32, 32, 3)


@pytest.mark.parametrize("table", ["", "nonsense", "5\n\n000001.jpg", "5\nSmiling Male\n000001.jpg 1 1\n"])
def test_an_attribute_table_that_lacks_pictures_is_refused(table, capsys):
    make_pictures(Path("data/img_align_celeba"), 5)
    Path("data/list_attr_celeba.txt").write_text(table)
    refused(capsys, lambda: data.load("celeba", "data", 16), "data/list_attr_celeba.txt", "000000.jpg", "whole file")


def test_grid_plot_and_gif_are_pictures_of_the_right_size():
    assert data.grid(np.zeros((5, 32, 32, 3), np.uint8), columns=3).size == ((3 * 34 + 2) * 2, (2 * 34 + 2) * 2)
    assert data.plot({"a": ([1], [0.5]), "b": ([1, 2], [1.0, 0.1])}, "step").size == (720, 420)
    assert data.scatter(np.array([[0, 0], [np.inf, np.nan]])).size == (480, 480)
    data.save_gif("a.gif", [Image.new("RGB", (8, 8), (i * 50, 0, 0)) for i in range(5)])
    assert Image.open("a.gif").n_frames == 5


# ---------------------------------------------------------------------------------------------------------------
# Official files, here tiny, written byte by byte from the published descriptions of the formats

IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
BINS = ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin",
        "test_batch.bin"]


def published(name):
    """What would be on offer: the archives of digits() or cifar()."""
    return {"cifar-10-binary.tar.gz": tar(cifar()[0])} if name == "cifar10" else packed(digits(name)[0])


def idx(*sizes, content):
    return b"\0\0\x08" + bytes([len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes) + content


def digits(name="mnist"):
    """({file: bytes}, pictures (15, 28, 28, 1), labels) as MNIST's four files hold them."""
    pictures = np.random.default_rng(len(name)).integers(0, 256, (15, 28, 28, 1), np.uint8)
    labels = [5, 0, 4, 1, 9, 2, 1, 3, 1, 4, 7, 7, 7, 2, 1]
    files = (idx(12, 28, 28, content=pictures[:12].tobytes()), idx(12, content=bytes(labels[:12])),
             idx(3, 28, 28, content=pictures[12:].tobytes()), idx(3, content=bytes(labels[12:])))
    return dict(zip(IDX, files)), pictures, labels


def cifar():
    """({file: bytes}, pictures (18, 32, 32, 3), labels) as CIFAR-10's six files hold them."""
    pictures = np.random.default_rng(1).integers(0, 256, (18, 32, 32, 3), np.uint8)
    labels = [i % 10 for i in range(18)]
    rows = [bytes([label]) + b"".join(picture[:, :, c].tobytes() for c in range(3))
            for label, picture in zip(labels, pictures)]
    return {file: b"".join(rows[3 * i:3 * i + 3]) for i, file in enumerate(BINS)}, pictures, labels


def tar(files):
    """cifar-10-binary.tar.gz: in a folder, in an order of its own, among other files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("cifar-10-batches-bin")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in ["readme.html", *sorted(files, reverse=True)]:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(files.get(name, b"hello"))
            archive.addfile(entry, io.BytesIO(files.get(name, b"hello")))
    return gzip.compress(buffer.getvalue(), mtime=0)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def packed(files):
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in files.items()}


def check_read(name, pictures, labels, res=None):
    got, numbers, _ = data.load(name, "data", res or pictures.shape[1])
    np.testing.assert_array_equal(got, pictures)
    assert numbers.tolist() == labels


# ---------------------------------------------------------------------------------------------------------------
# Reading


def test_the_tables_are_whole():
    assert all(len(set(about["label_names"])) == 10 for about in data.OFFICIAL.values())
    checksums = [md5 for about in data.OFFICIAL.values() for md5 in about["files"].values()]
    assert len(set(checksums)) == 9 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in checksums)


@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
@pytest.mark.parametrize("form", ["unpacked", "published"])
@pytest.mark.parametrize("folder", ["data", "data/NAME", "data/NAME/cifar-10-batches-bin"])
def test_official_files_are_found_and_read(name, form, folder):
    files, pictures, labels = cifar() if name == "cifar10" else digits(name)
    write(Path(folder.replace("NAME", name)), files if form == "unpacked" else published(name))
    check_read(name, pictures, labels)


def test_official_files_are_not_read_again_once_packed(monkeypatch):
    write(Path("data/mnist"), published("mnist"))
    data.load("mnist", "data", 28)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    check_read("mnist", *digits()[1:])


def test_a_half_unpacked_archive_is_read_packed(capsys):
    files, pictures, labels = cifar()
    write(Path("data/cifar10"), {name: files[name] for name in BINS[:3]})
    refused(capsys, lambda: data.load("cifar10"), "cifar10 is not there")
    write(Path("data/cifar10"), published("cifar10"))
    check_read("cifar10", pictures, labels)


def test_official_pictures_are_resized():
    for name, (files, pictures, labels) in {"mnist": digits(), "cifar10": cifar()}.items():
        write(Path("data") / name, files)
        expected = [Image.fromarray(p.squeeze()).resize((16, 16), Image.Resampling.LANCZOS) for p in pictures]
        check_read(name, np.stack(expected).reshape(len(pictures), 16, 16, -1), labels, res=16)


def test_a_file_is_found_in_a_folder_of_its_own_name():
    files, pictures, labels = digits()
    for name, content in files.items():
        write(Path("data/mnist") / name, {name: content})
    check_read("mnist", pictures, labels)


def test_missing_files_are_named_with_place_source_and_next_step(capsys):
    refused(capsys, lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "data/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/", "--download")
    refused(capsys, lambda: data.load("cifar10"), "cifar-10-binary.tar.gz", "https://www.cs.toronto.edu/~kriz/")
    write(Path("data/mnist"), published("mnist"))  # MNIST's files, although they are named alike,
    refused(capsys, lambda: data.load("fashion"), "fashion is not there")  # are not taken for Fashion-MNIST's
    Path(f"data/mnist/{IDX[3]}.gz").unlink()
    assert IDX[0] not in refused(capsys, lambda: data.load("mnist"), f"{IDX[3]}.gz")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_broken_official_files_are_refused_by_name(capsys, name):
    folder = Path("data") / name
    parts = cifar()[0] if name == "cifar10" else digits(name)[0]
    for files in (published(name), parts):
        for file, whole in files.items():
            for content in (whole[: len(whole) * 3 // 4], whole[:9], b""):
                write(folder, files | {file: content})
                refused(capsys, lambda: data.load(name), f"{folder / file} ", "--download")
        for file in files:
            (folder / file).unlink()
    assert not Path("data/cache").exists()


def test_labels_that_do_not_belong_to_the_pictures_are_refused(capsys):
    files, _, _ = digits()
    for broken in (idx(11, content=bytes(11)), idx(12, content=bytes([10] * 12))):
        write(Path("data/mnist"), files | {IDX[1]: broken})
        refused(capsys, lambda: data.load("mnist"), "data/mnist", "do not belong together")
    for sizes in ((12, 20, 20), (12, 28), (12, 28, 28, 3), (12,)):
        write(Path("data/mnist"), files | {IDX[0]: idx(*sizes, content=bytes(math.prod(sizes)))})
        refused(capsys, lambda: data.load("mnist"), "data/mnist", "do not belong together")


# ---------------------------------------------------------------------------------------------------------------
# Downloading, from a server on this machine


@pytest.fixture
def server(monkeypatch):
    """Serves .files, notes the Range of every request in .ranges, and misbehaves as its other attributes say."""

    def do_GET(handler):
        content, asked = it.files.get(handler.path), handler.headers.get("Range")
        it.ranges.append(asked)
        if handler.path.startswith("/mail"):
            return handler.wfile.write(b"220 this is a mail server\r\n")
        if content is None:
            return handler.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and it.honours_range else 0
        if start and start >= len(content):
            return handler.send_error(416)
        handler.send_response(206 if start else 200)
        if it.tells_length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start:][:it.closes_after])

    parts = {"do_GET": do_GET, "log_message": lambda *_: None}
    kind = type("Handler", (http.server.BaseHTTPRequestHandler,), parts)
    it = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    it.files, it.ranges, it.honours_range, it.tells_length, it.closes_after = {}, [], True, True, None
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield it
    it.shutdown()
    thread.join()
    it.server_close()


def publish(monkeypatch, server, name):
    """The server offers these files, which the table then knows by their checksums."""
    files = published(name)
    md5 = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(data.OFFICIAL[name], "files", md5)
    server.files = {f"/{name}/{file}": content for file, content in files.items()}
    monkeypatch.setitem(data.OFFICIAL[name], "url", f"http://127.0.0.1:{server.server_port}/{name}/")
    return files


ROOT, CIFAR = Path("data"), Path("data/cifar10/cifar-10-binary.tar.gz")
PART = CIFAR.with_name(CIFAR.name + ".part")


@pytest.fixture
def offered(monkeypatch, server):
    """The tar file of a tiny CIFAR-10, on offer."""
    return publish(monkeypatch, server, "cifar10")[CIFAR.name]


@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("name", ["mnist", "fashion", "cifar10"])
def test_download_fetches_what_is_missing_and_only_that(capsys, monkeypatch, server, name, tells_length):
    server.tells_length = tells_length
    files = publish(monkeypatch, server, name)
    data.download(name, ROOT)
    assert {p.name: p.read_bytes() for p in (ROOT / name).iterdir()} == files
    assert " MB" in capsys.readouterr().out
    check_read(name, *(cifar() if name == "cifar10" else digits(name))[1:])
    data.download(name, ROOT)
    assert len(server.ranges) == len(files)  # asked for nothing twice
    first = next(iter(files))
    (ROOT / name / first).unlink()
    data.download(name, ROOT)
    assert len(server.ranges) == len(files) + 1 and (ROOT / name / first).read_bytes() == files[first]


def test_download_needs_no_server_for_unpacked_files(monkeypatch, server):
    publish(monkeypatch, server, "mnist")
    write(ROOT / "mnist", digits()[0])
    data.download("mnist", ROOT)
    assert server.ranges == []


@pytest.mark.parametrize("have", [1, 1000, -1])
def test_download_goes_on_where_it_stopped(server, offered, have):
    write(PART.parent, {PART.name: offered[:have]})
    data.download("cifar10", ROOT)
    assert server.ranges == [f"bytes={len(offered[:have])}-"]
    assert CIFAR.read_bytes() == offered and not PART.exists()


@pytest.mark.parametrize("more", [-100, 100])
def test_download_starts_over_if_the_server_ignores_ranges(server, offered, more):
    server.honours_range = False
    write(PART.parent, {PART.name: b"?" * (len(offered) + more)})
    data.download("cifar10", ROOT)
    assert CIFAR.read_bytes() == offered and not PART.exists()


def test_download_finishes_a_part_that_is_already_whole(server, offered):
    write(PART.parent, {PART.name: offered})
    data.download("cifar10", ROOT)
    assert CIFAR.read_bytes() == offered and not PART.exists()


def test_wrong_checksum_is_refused_and_deleted(capsys, server, offered):
    server.files = {path: b"<html>Log in to this network</html>" for path in server.files}
    refused(capsys, lambda: data.download("cifar10", ROOT), "MD5", CIFAR.name, "deleted", "again", status=1)
    assert list(CIFAR.parent.iterdir()) == []
    server.files = {path: offered for path in server.files}
    write(PART.parent, {PART.name: b"?" * len(offered)})  # as long as the file, but not the file
    refused(capsys, lambda: data.download("cifar10", ROOT), "MD5", "deleted", status=1)
    data.download("cifar10", ROOT)
    assert CIFAR.read_bytes() == offered


def test_interrupted_download_leaves_only_the_part_and_is_completed_later(capsys, server, offered):
    server.closes_after = 1000
    refused(capsys, lambda: data.download("cifar10", ROOT), f"closed after 1,000 of {len(offered):,}", "again",
            "http://127.0.0.1", status=1)
    assert list(CIFAR.parent.iterdir()) == [PART] and PART.read_bytes() == offered[:1000]
    refused(capsys, lambda: data.download("cifar10", ROOT), f"closed after 2,000 of {len(offered):,}", status=1)
    server.closes_after = None
    data.download("cifar10", ROOT)
    assert server.ranges == ["bytes=0-", "bytes=1000-", "bytes=2000-"]
    assert list(CIFAR.parent.iterdir()) == [CIFAR] and CIFAR.read_bytes() == offered


def test_unreachable_files_are_refused_in_a_line(capsys, monkeypatch, server, offered):
    write(PART.parent, {PART.name: offered[:1000]})
    server.files = {}
    refused(capsys, lambda: data.download("cifar10", ROOT), "404", CIFAR.name, "by hand", status=1)
    monkeypatch.setitem(data.OFFICIAL["cifar10"], "url", f"http://127.0.0.1:{server.server_port}/mail/")
    refused(capsys, lambda: data.download("cifar10", ROOT), "mail server", CIFAR.name, "by hand", status=1)
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setitem(data.OFFICIAL["cifar10"], "url", f"http://127.0.0.1:{nobody.getsockname()[1]}/")
        refused(capsys, lambda: data.download("cifar10", ROOT), "refused", CIFAR.name, "by hand", status=1)
    assert list(CIFAR.parent.iterdir()) == [PART] and PART.read_bytes() == offered[:1000]


# ---------------------------------------------------------------------------------------------------------------
# The programs


def state(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


def log_of(folder):
    return list(csv.DictReader((Path(folder) / "log.csv").read_text().splitlines()))


def flat(thing):
    """All tensors and numbers in nested dicts and lists, for comparing to the bit."""
    if isinstance(thing, dict):
        return [x for k in sorted(thing, key=str) for x in flat(thing[k])]
    return [x for item in thing for x in flat(item)] if isinstance(thing, (list, tuple)) else [thing]


def assert_same_training(a, b):
    for part in ("weights", "ema", "optimizers"):
        for p, q in zip(flat(a[part]), flat(b[part]), strict=True):
            assert torch.equal(p, q) if torch.is_tensor(p) else p == q


@pytest.fixture
def quick_w2(monkeypatch):
    monkeypatch.setattr(train, "wasserstein", lambda *_: {0: 0.0, 1: 1.0})


@pytest.mark.parametrize("extra", [[], ["--ot"], ["--predict", "x", "--path", "cosine"]], ids=str)
def test_resuming_equals_never_stopping_to_the_bit(extra, quick_w2):
    base = [*MOONS, "--report", "5", "--preview", "10", *extra]
    averaged = train.main([*base, "--steps", "20", "--out", "once"])
    assert not any(w.requires_grad for w in averaged.parameters())  # or every step would stay in memory
    train.main([*base, "--steps", "12", "--out", "twice"])
    train.main(["--out", "twice", "--steps", "20", "--resume"])
    assert_same_training(state("once"), state("twice"))
    once, twice = log_of("once"), log_of("twice")
    assert float(once[-1]["held_out"]) == float(twice[-1]["held_out"])
    assert [int(r["step"]) for r in twice] == sorted({int(r["step"]) for r in twice})


def test_resuming_pictures_equals_never_stopping_to_the_bit():
    base = ["--res", "16", *TINY, "--preview", "100"]
    train.main([*base, "--steps", "8", "--out", "once"])
    train.main([*base, "--steps", "5", "--out", "twice"])
    train.main([*base, "--steps", "8", "--out", "twice", "--resume"])
    assert_same_training(state("once"), state("twice"))


def test_sigterm_finishes_the_step_saves_and_resume_goes_on_to_the_same_end(quick_w2):
    args = [*MOONS, "--steps", "1200", "--preview", "1200", "--report", "20"]
    start = [sys.executable, HERE / "train.py", *args, "--out", "killed"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, text=True)
    while "step " not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in said
    assert 0 < state("killed")["step"] < 1200
    train.main([*args, "--out", "killed", "--resume"])
    train.main([*args, "--out", "whole"])
    assert_same_training(state("killed"), state("whole"))


def test_lengthening_keeps_the_finished_weights_and_survives_a_kill_after_its_own_cool_down_began(quick_w2):
    args = [*MOONS, "--out", "run", "--preview", "1000"]
    train.main([*args, "--steps", "10"])
    finished = Path("run/ckpt.pt").read_bytes()
    train.main([*args, "--steps", "40", "--resume", "--bench"])
    assert not Path("run/ckpt-10.pt").exists()
    train.main([*args, "--steps", "40", "--resume"])
    assert Path("run/ckpt-10.pt").read_bytes() == finished
    whole = state("run")
    Path("run/ckpt.pt").write_bytes(finished)  # as if killed when only stable.pt had been written
    train.main(["--out", "run", "--steps", "40", "--resume"])
    assert_same_training(state("run"), whole)


def test_learning_rate_climbs_stays_and_falls_along_straight_lines():
    config = train.Config(lr=2.0, steps=100, warmup=9, cooldown=0.4)
    rate = np.array([train.learning_rate(config, step) for step in range(100)])
    np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 5)
    np.testing.assert_allclose(rate[10:60], 2)
    np.testing.assert_allclose(rate[60:], 2 * np.arange(40, 0, -1) / 41)


def test_the_average_forgets_nine_tenths_of_the_first_weights_in_the_first_step(quick_w2):
    train.main([*MOONS, "--steps", "1"])
    after = state("out/moons")
    torch.manual_seed(0)
    start = model.build(**after["net"]).state_dict()
    for name in start:
        torch.testing.assert_close(after["ema"][name], 0.1 * start[name] + 0.9 * after["weights"][name])


def test_held_out_loss_comes_in_ten_bins_of_t_from_noise_to_data(monkeypatch):
    monkeypatch.setattr(fm, "loss", lambda net, x, e, t, *_: t)
    dataset, config = data.load("faces", "data", 16)[:2], train.resolve({})
    bins = train.held_out(None, config, *dataset, torch.device("cpu"))
    np.testing.assert_allclose(bins, np.arange(0.05, 1, 0.1), atol=1e-6)


def test_the_average_is_what_is_judged_drawn_and_sampled_from(monkeypatch):
    used = []
    for name, result in (("held_out", [1.0] * 10), ("preview", Image.new("L", (1, 1))), ("wasserstein", {0: 0.0})):
        monkeypatch.setattr(train, name, lambda net, *_, result=result: used.append(net) or result)
    train.main([*MOONS, "--steps", "5"])
    used.append(sample.read_checkpoint(Path("out/moons/ckpt.pt"))["built"])
    assert len(used) == 4 and not torch.equal(*(flat(state("out/moons")[part])[0] for part in ("ema", "weights")))
    for net in used:
        assert all(torch.equal(w, state("out/moons")["ema"][name]) for name, w in net.state_dict().items())


def test_about_half_of_the_pictures_are_mirrored_left_to_right():
    dataset = data.load("faces", "data", 16)[:2]
    cpu, configs = torch.device("cpu"), [train.resolve({"batch": 16, "flip": flip}) for flip in (True, False)]
    mirrored, plain = (train.batch(config, *dataset, 0, 0, 1, cpu)[0] for config in configs)
    swapped = [torch.equal(p, q.flip(2)) for p, q in zip(mirrored, plain)]  # (C, H, W) each
    assert 2 < sum(swapped) < 14 and all(s or torch.equal(p, q) for s, p, q in zip(swapped, mirrored, plain))


def test_gradients_are_clipped_to_the_norm_that_was_asked_for(monkeypatch, quick_w2):
    norms = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda weights, norm: norms.append(norm))
    train.main([*MOONS, "--steps", "2", "--clip", "0.25"])
    assert norms == [0.25, 0.25]


def test_the_weight_of_cover_multiplies_the_loss(monkeypatch, quick_w2):
    losses = []
    for weight in (1.0, 4.0):
        monkeypatch.setattr(fm, "importance", lambda t, *_: torch.full_like(t, weight))
        train.main([*MOONS, "--steps", "1", "--time", "logit-normal", "--cover", "0.5", "--out", str(weight)])
        losses.append(state(str(weight))["log"][0]["loss"])
    assert losses[1] == pytest.approx(4 * losses[0])


def test_changing_the_cool_down_needs_a_state_from_before_it(capsys, quick_w2):
    args = [*MOONS, "--out", "run"]
    train.main([*args, "--steps", "20"])
    refused(capsys, lambda: train.main([*args, "--steps", "21", "--cooldown", "0.9", "--resume"]), "before step 3")
    Path("run/stable.pt").unlink()
    refused(capsys, lambda: train.main([*args, "--steps", "1000", "--resume"]), "no run/stable.pt", "--out")


def test_weight_decay_given_with_resume_is_obeyed(quick_w2):
    for out, extra in (("a", []), ("b", ["--decay", "0.9"])):
        train.main([*MOONS, "--steps", "3", "--cooldown", "0", "--out", out])
        train.main([*MOONS, "--steps", "9", "--cooldown", "0", "--out", out, "--resume", *extra])
    assert not torch.equal(*(flat(state(out)["weights"])[0] for out in "ab"))


def test_a_failed_save_leaves_the_old_checkpoint(capsys, monkeypatch, quick_w2):
    args = [*MOONS, "--out", "run"]
    train.main([*args, "--steps", "4"])
    before = Path("run/ckpt.pt").read_bytes()

    def full(thing, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    refused(capsys, lambda: train.main([*args, "--steps", "8", "--resume"]), "No space left", status=1)
    assert Path("run/ckpt.pt").read_bytes() == before and not list(Path("run").glob("*.part"))


def test_diverging_weights_never_replace_a_checkpoint(capsys, quick_w2):
    args = [*MOONS, "--out", "run", "--clip", "1e30"]
    train.main([*args, "--steps", "4"])
    before = Path("run/ckpt.pt").read_bytes()
    refused(capsys, lambda: train.main([*args, "--steps", "40", "--lr", "1e30", "--resume"]), "finite", status=1)
    assert Path("run/ckpt.pt").read_bytes() == before


def test_an_infinite_held_out_loss_never_replaces_a_checkpoint(capsys, monkeypatch, quick_w2):
    args = [*MOONS, "--out", "run"]
    train.main([*args, "--steps", "4"])
    before = Path("run/ckpt.pt").read_bytes()
    monkeypatch.setattr(train, "held_out", lambda *_: [math.inf] * 10)
    refused(capsys, lambda: train.main([*args, "--steps", "8", "--resume"]), "finite", "--lr", status=1)
    assert Path("run/ckpt.pt").read_bytes() == before


def test_a_new_run_sets_the_old_one_aside(quick_w2):
    args = [*MOONS, "--steps", "3"]
    train.main(args)
    for name in ("ckpt-2.pt", "mine.csv"):
        Path(f"out/moons/{name}").write_text("kept")
    before = Path("out/moons/ckpt.pt").read_bytes()
    train.main([*args, "--seed", "1"])
    assert Path("out/moons/before-1/ckpt.pt").read_bytes() == before != Path("out/moons/ckpt.pt").read_bytes()
    assert Path("out/moons/before-1/ckpt-2.pt").exists() and Path("out/moons/mine.csv").exists()  # not ours to move


def test_two_processes_learn_what_one_does_with_the_same_batch(monkeypatch, quick_w2):
    """Rank r draws noise from (seed, step, r), so the one process is given both ranks' draws. What remains is the
    order in which float32 gradients are summed; AdamW divides by their size, so where that is tiny the rounding shows:
    1e-4 after 20 steps of up to 8e-4 each. The ranks themselves must agree to the bit."""
    Path("run.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import torch, train\n"
        "train.wasserstein = lambda *_: {0: 0.0}\n"
        "torch.save(train.main(sys.argv[1:]).state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n")
    args = [*MOONS, "--steps", "20", "--preview", "20"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, "run.py", *args, "--out", "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rank0, rank1 = (torch.load(f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert all(torch.equal(rank0[k], rank1[k]) for k in rank0)
    original = train.batch
    monkeypatch.setattr(train, "batch", lambda config, images, labels, step, rank, world, device: [
        parts[0] if parts[0] is None else torch.cat(parts)
        for parts in zip(*(original(config, images, labels, step, r, 2, device) for r in (0, 1)))])
    one = train.main([*args, "--out", "one"]).state_dict()
    for k in one:
        torch.testing.assert_close(one[k], rank0[k], atol=1e-4, rtol=0)


def test_torchrun_takes_none_of_our_flags_for_its_own():
    theirs = torch.distributed.run.get_args_parser()._option_string_actions
    ours = ["resume", "bench", *(field.name for field in dataclasses.fields(train.Config))]
    ours = ["--" + name.replace("_", "-") for name in ours]
    assert not [(our, their) for our in ours for their in theirs if their.startswith(our)]


def test_moons_train_to_moons_and_w2_is_logged():
    train.main(["--data", "moons", "--device", "cpu", "--steps", "600", "--width", "64", "--cooldown", "0.5"])
    rows = dict(line.split(",") for line in Path("out/moons/w2.csv").read_text().split()[1:])
    assert list(rows) == ["0", "1", "2", "4", "10", "100"]
    assert float(rows["100"]) < 0.8 < float(rows["1"])
    first, last = (float(log_of("out/moons")[i]["loss"]) for i in (0, -1))
    assert last < first


def test_celeba_at_256_trains_previews_saves_resumes_and_samples(monkeypatch, capsys):
    """The real job's command, network and all; only the pictures are a stand-in."""
    make_pictures(Path("tmp/img_align_celeba"), 24, size=(178, 218))
    Path("data").mkdir()
    with zipfile.ZipFile("data/img_align_celeba.zip", "w") as archive:
        for p in Path("tmp/img_align_celeba").iterdir():
            archive.write(p, f"img_align_celeba/{p.name}")
    monkeypatch.setattr(train, "PREVIEW_PICTURES", 1)
    monkeypatch.setattr(train, "PREVIEW_STEPS", 2)
    monkeypatch.setattr(train, "HELD_OUT_PICTURES", 10)
    train.main(["--data", "celeba", "--res", "256", "--steps", "1", "--batch", "2", "--device", "cpu"])
    train.main(["--data", "celeba", "--res", "256", "--steps", "2", "--batch", "2", "--device", "cpu", "--resume"])
    said = capsys.readouterr().out
    assert "114." in said or "115." in said
    assert Image.open("out/celeba-256/samples/000002.png").size[0] >= 256
    sample.main(["out/celeba-256", "--n", "1", "--steps", "1", "--to", "one"])
    assert Image.open("one/00000.png").size == (256, 256)


@pytest.fixture(scope="module")
def faces_run(tmp_path_factory):
    """A tiny run of the default command, for the tests below to sample from."""
    folder = tmp_path_factory.mktemp("run")
    make_pictures(folder / "pets", 30)
    often = ["--steps", 4, "--preview", 2, "--report", 1, "--no-bf16"]
    done = command("train.py", "--data", "pets", "--res", 16, *TINY, *often, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.parametrize("to", ["x.png", "x.gif", "x.npy"])
def test_a_full_disk_leaves_the_picture_that_was_there(to, faces_run, monkeypatch):
    def full(file, *_, **__):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    monkeypatch.setattr(Image.Image, "save", lambda image, file, **_: full(file))
    Path(to).write_text("old")
    with pytest.raises(OSError):
        sample.main([str(faces_run[0] / "out/pets-16"), "--n", "1", "--steps", "1", "--to", to])
    assert Path(to).read_text() == "old"


def test_training_leaves_checkpoint_log_curve_and_previews(faces_run):
    folder, said = faces_run
    out = folder / "out/pets-16"
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "stable.pt", "log.csv", "loss.png", "samples"}
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["000002.png", "000004.png"]
    rows = log_of(out)
    assert [r["step"] for r in rows] == ["1", "2", "3", "4"]
    bins = [float(rows[-1][f"t{i}"]) for i in range(10)]
    assert min(bins) > 0 and float(rows[-1]["held_out"]) == pytest.approx(np.mean(bins)) and rows[0]["t0"] == ""
    for word in ("step", "loss", "samples/s", "ETA", "M parameters", "width=32"):
        assert word in said
    assert state(out)["config"]["width"] == 32


@pytest.mark.parametrize("to", ["x.png", "x.gif", "x.npy", "folder", "."])
def test_samples_are_written_as_the_ending_says(faces_run, to, capsys):
    sample.main([str(faces_run[0] / "out/pets-16"), "--n", "5", "--steps", "3", "--batch", "2", "--to", to])
    said = capsys.readouterr().out
    assert not list(Path().glob("*part*"))
    assert "NFE 5" in said and "samples/s" in said  # Heun: two a step, but one in the last
    if to == "x.npy":
        x = np.load(to)
        assert x.shape == (5, 3, 16, 16) and x.dtype == np.float32
    elif to in ("folder", "."):
        assert [Image.open(p).size for p in sorted(Path(to).iterdir())] == [(16, 16)] * 5
    elif to == "x.gif":
        assert Image.open(to).n_frames == 4
    else:
        assert Image.open(to).size[0] > 200


def test_a_sample_depends_on_seed_and_index_only(faces_run):
    run = str(faces_run[0] / "out/pets-16")
    for name, args in {"a": "--n 5 --batch 5", "b": "--n 3 --batch 2", "c": "--n 5 --seed 1"}.items():
        sample.main([run, "--steps", "2", *args.split(), "--to", f"{name}.npy"])
    a, b, c = (np.load(f"{name}.npy") for name in "abc")
    np.testing.assert_allclose(a[:3], b, atol=1e-6)
    assert np.abs(a - c).max() > 1e-4 and np.abs(a[0] - a[1]).max() > 1e-4
    assert torch.equal(sample.noise(2, (3,), 0), sample.noise(5, (3,), 0)[:2])


def test_solver_steps_and_columns_of_sample_are_obeyed(faces_run, capsys):
    run = str(faces_run[0] / "out/pets-16")
    sample.main([run, "--n", "2", "--steps", "7", "--solver", "euler", "--columns", "1", "--to", "a.gif"])
    assert "7 steps of euler, NFE 7" in capsys.readouterr().out and Image.open("a.gif").n_frames == 8
    width, height = Image.open("a.gif").size
    assert height > 1.8 * width


def test_moons_samples_are_points(quick_w2):
    train.main([*MOONS, "--steps", "2"])
    for to in ("x.png", "x.gif", "x.npy"):
        sample.main(["out/moons", "--n", "9", "--steps", "2", "--to", to])
    assert np.load("x.npy").shape == (9, 2) and Image.open("x.gif").n_frames == 3


@pytest.fixture(scope="module")
def labelled_run(tmp_path_factory):
    """A tiny conditional run on CelebA-like pictures with attributes."""
    folder = tmp_path_factory.mktemp("labelled")
    make_pictures(folder / "data/img_align_celeba", 30)
    rows = [f"{i:06d}.jpg  {'1' if i % 2 else '-1'} -1  {'1' if i % 3 else '-1'}" for i in range(30)]
    (folder / "data/list_attr_celeba.txt").write_text("\n".join(["30", "Smiling Bald Male", *rows]) + "\n")
    args = ["--data", "celeba", "--res", 16, "--patch", 8, "--stride", 4, *TINY, "--steps", 30, "--lr", 0.01]
    done = command("train.py", *args, "--no-bf16", "--cond", "Smiling,Male", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_labels_and_guidance_steer_the_samples(labelled_run, monkeypatch, capsys):
    run, results = str(labelled_run / "out/celeba-16"), {}
    assert state(run)["label_names"] == ["Smiling", "Male"]
    for name, args in {"plain": "", "male": "--label Male", "both": "--label Smiling,Male", "second": "--label 1",
                       "pulled": "--label Male --guidance 4",
                       "never": "--label Male --guidance 4 --interval 2,3"}.items():
        sample.main([run, "--n", "2", "--steps", "4", *args.split(), "--to", f"{name}.npy"])
        results[name] = np.load(f"{name}.npy")
    for a, b, same in (("plain", "male", False), ("male", "both", False), ("male", "second", True),
                       ("male", "pulled", False), ("male", "never", True)):
        assert np.array_equal(results[a], results[b]) == same, (a, b)
    sample.main([run, "--n", "6", "--steps", "1", "--label", "all", "--to", "rows.png"])
    width, height = Image.open("rows.png").size
    assert width > 1.3 * height  # two rows of three
    refused(capsys, lambda: sample.main([run, "--label", "Bald"]), "--label Bald", "Smiling, Male")
    refused(capsys, lambda: sample.main([run, "--guidance", "3"]), "--label")
    for interval in ("now", "0.9,0.1", "0,nan", "0.5"):
        refused(capsys, lambda: sample.main([run, "--label", "Male", "--interval", interval]), "--interval")


def test_conditions_that_the_data_do_not_have_are_refused(labelled_run, monkeypatch, capsys):
    monkeypatch.chdir(labelled_run)
    args = ["--data", "celeba", "--res", "16", "--patch", "8", "--stride", "4", *TINY]
    refused(capsys, lambda: train.main([*args, "--cond", "Smilling"]), "--cond Smilling", "Smiling")
    make_pictures(Path("plain"), 3)
    refused(capsys, lambda: train.main(["--data", "plain", "--res", "16", "--cond", "all"]), "no labels")
    make_pictures(Path("plain/dog"), 3)  # classes are learnt all or not at all
    refused(capsys, lambda: train.main(["--data", "plain", "--res", "16", "--cond", "dog"]), "--cond dog", "all")


def test_interpolation_passes_through_the_samples_themselves(faces_run):
    run = str(faces_run[0] / "out/pets-16")
    sample.main([run, "--n", "3", "--steps", "2", "--to", "ends.npy"])
    sample.main([run, "--n", "3", "--steps", "2", "--interpolate", "4", "--to", "between.npy"])
    ends, between = np.load("ends.npy"), np.load("between.npy").reshape(3, 4, 3, 16, 16)
    np.testing.assert_allclose(between[:, 0], ends, atol=1e-5)
    np.testing.assert_allclose(between[:, -1], ends[[1, 2, 0]], atol=1e-5)
    a, b = torch.randn(2, 1000)
    assert sample.slerp(a, b, 0.5).norm() == pytest.approx(float(a.norm() + b.norm()) / 2, rel=0.02)


def save_picture(name, size=(16, 16), mode="RGB"):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode).save(name)
    return np.asarray(Image.open(name))


def test_inpainting_keeps_the_unmasked_part_exactly_and_fills_the_rest_differently(faces_run):
    run, pixels = str(faces_run[0] / "out/pets-16"), save_picture("a.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 5:] = 255
    Image.fromarray(mask).save("mask.png")
    args = [run, "--inpaint", "a.png", "--mask", "mask.png", "--n", "2", "--steps", "3"]
    for to in ("x.npy", "folder", "x.gif"):
        sample.main([*args, "--to", to])
    x = np.load("x.npy").transpose(0, 2, 3, 1)
    for i in range(2):
        np.testing.assert_array_equal(x[i][mask == 0], pixels[mask == 0].astype(np.float32) / 127.5 - 1)
        filled = np.asarray(Image.open(f"folder/{i:05d}.png"))
        np.testing.assert_array_equal(filled[mask == 0], pixels[mask == 0])
    assert np.abs(x[0] - x[1]).max() > 1e-4
    assert Image.open("x.gif").n_frames == 4
    sample.main([*args, "--n", "3", "--batch", "1", "--to", "y.npy"])
    np.testing.assert_allclose(np.load("y.npy")[:2], np.load("x.npy"), atol=1e-5)  # a function of (seed, i) alone


def test_inversion_finds_noise_that_leads_back_to_the_picture(faces_run, capsys):
    run, pixels = str(faces_run[0] / "out/pets-16"), save_picture("a.png")
    errors = []
    for steps in (4, 40):
        sample.main([run, "--invert", "a.png", "--steps", str(steps), "--to", "x.npy"])
        errors.append(float(capsys.readouterr().out.split("RMS error ")[1].split()[0]))
        picture, noise, again = np.load("x.npy").transpose(0, 2, 3, 1)
        np.testing.assert_allclose(picture, pixels / 127.5 - 1, atol=1e-6)
        assert np.sqrt(np.mean((picture - again) ** 2)) == pytest.approx(errors[-1], abs=1e-5)
        assert np.abs(noise - picture).max() > 0.1
    assert errors[1] < errors[0] / 10 and errors[1] < 0.05  # order 2
    sample.main([run, "--invert", "a.png", "--steps", "3", "--to", "x.gif"])
    assert Image.open("x.gif").n_frames == 7  # three steps there, three back


def test_border_ratio_finds_a_grid_of_patches_and_none_in_noise():
    noise = torch.randn(200, 3, 16, 16)
    for patch, stride, borders in ((4, 4, [4, 8, 12]), (8, 4, [4, 8, 12]), (6, 5, [5, 6, 10, 11])):
        assert sample.border_ratio(noise, patch, stride) == pytest.approx(1, abs=0.05)
        brightness = torch.tensor([sum(column >= border for border in borders) for column in range(16)])
        assert sample.border_ratio(noise + 3 * brightness, patch, stride) > 3


def test_a_border_ratio_is_printed_only_where_there_are_borders(faces_run, monkeypatch, capsys):
    for ratio, told in ((1.5, True), (math.nan, False)):
        monkeypatch.setattr(sample, "border_ratio", lambda *_: ratio)
        sample.main([str(faces_run[0] / "out/pets-16"), "--n", "1", "--steps", "1", "--to", "x.png"])
        assert ("patch borders" in capsys.readouterr().out) == told


def test_full_strength_forgets_the_picture_and_less_does_not(faces_run):
    run, _ = str(faces_run[0] / "out/pets-16"), save_picture("a.png")
    for name, args in {"plain": "", "all": "--from a.png --strength 1", "most": "--from a.png --strength 0.9",
                       "usual": "--from a.png"}.items():
        sample.main([run, "--n", "2", "--steps", "3", *args.split(), "--to", f"{name}.npy"])
    plain, all, most, usual = (np.load(f"{name}.npy") for name in ("plain", "all", "most", "usual"))
    np.testing.assert_array_equal(all, plain)
    assert not np.array_equal(most, plain) and not np.array_equal(most, usual)


def test_a_picture_to_start_from_is_mixed_with_noise_as_the_path_says(faces_run, monkeypatch):
    checkpoint, seen = state(faces_run[0] / "out/pets-16"), []
    checkpoint["config"]["path"] = "cosine"
    torch.save(checkpoint, "ckpt.pt")
    monkeypatch.setattr(sample, "generate", lambda net, config, z, *rest: seen.append(z) or (z, 0))
    pixels, angle = save_picture("a.png"), 0.75 * math.pi / 2
    sample.main([".", "--n", "2", "--from", "a.png", "--strength", "0.25", "--to", "x.npy"])
    x, e = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1), sample.noise(2, (3, 16, 16), 0)
    torch.testing.assert_close(seen[0], (math.sin(angle) * x + math.cos(angle) * e).float())


@pytest.mark.parametrize("args,words", [
    ("--invert small.png", ["small.png", "8x8", "16x16", "resize"]),
    ("--invert grey.png", ["grey.png is L", "RGB"]),
    ("--from nowhere.png", ["nowhere.png"]),
    ("--from text.png", ["text.png"]),
    ("--from a.png --strength 0", ["--strength"]),
    ("--from a.png --strength nan", ["--strength"]),
    ("--inpaint a.png", ["--mask"]),
    ("--mask grey.png", ["--inpaint"]),
    ("--inpaint a.png --mask small.png", ["small.png"]),
    ("--inpaint a.png --mask a.png", ["a.png is RGB", "needed is L"]),
    ("--inpaint a.png --mask grey.png --invert a.png", ["--invert", "not allowed with"]),
], ids=str)
def test_pictures_and_masks_that_do_not_fit_are_refused(args, words, faces_run, capsys):
    save_picture("a.png")
    save_picture("small.png", (8, 8))
    save_picture("grey.png", mode="L")
    Path("text.png").write_text("no picture")
    Path("kept.png").write_text("old")
    run = str(faces_run[0] / "out/pets-16")
    refused(capsys, lambda: sample.main([run, *args.split(), "--to", "kept.png"]), *words)
    assert Path("kept.png").read_text() == "old"


def test_points_have_no_pictures_to_edit(quick_w2, capsys):
    train.main([*MOONS, "--steps", "2"])
    save_picture("a.png")
    refused(capsys, lambda: sample.main(["out/moons", "--invert", "a.png"]), "points")


def test_shift_and_tolerance_change_the_samples_and_dopri5_counts_its_steps(faces_run, capsys):
    run = str(faces_run[0] / "out/pets-16")
    results = {}
    for name, args in {"plain": "", "shift": "--shift 4", "loose": "--solver dopri5 --tol 0.1",
                       "tight": "--solver dopri5 --tol 1e-5"}.items():
        sample.main([run, "--n", "1", "--steps", "3", *args.split(), "--to", "x.npy"])
        results[name] = np.load("x.npy"), int(capsys.readouterr().out.split("NFE ")[1].split(",")[0])
    assert not np.array_equal(results["plain"][0], results["shift"][0])
    assert results["tight"][1] > results["loose"][1]


@pytest.mark.parametrize("predict", ["v", "x"])
def test_sweep_shows_that_more_evaluations_and_higher_order_are_nearer_to_the_exact_flow(predict, quick_w2, capsys):
    train.main(["--data", "moons", "--device", "cpu", "--width", "32", "--steps", "200", "--predict", predict])
    capsys.readouterr()
    sample.main(["out/moons", "--n", "100", "--sweep"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert {row[0] for row in rows} == set(fm.SOLVERS) and all(len(row) == 5 for row in rows)
    error = {(row[0], row[2]): float(row[3]) for row in rows}
    assert error["euler", "64"] < error["euler", "8"] and error["rk4", "64"] < error["euler", "64"]


def test_likelihood_is_printed_with_its_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(fm, "log_likelihood", lambda *_: (-torch.tensor([1.0, 2.0, 3.0, 6.0]), 7))
    config = dict(data="moons", root="data", res=32, predict="v", path="linear")
    sample.likelihood(None, config, n=4, steps=3, seed=0, device=torch.device("cpu"))
    assert capsys.readouterr().out.startswith("3.000 +- 1.080 nats on 4 held-out")  # sqrt(14 / 3 / 4)


def test_likelihood_is_better_after_training_and_known_for_points(quick_w2, capsys):
    nats = []
    for steps in ("1", "400"):
        train.main(["--data", "8gaussians", "--device", "cpu", "--steps", steps, "--out", steps])
        capsys.readouterr()
        sample.main([steps, "--bpd", "200", "--steps", "20"])
        nats.append(float(capsys.readouterr().out.split()[0]))
    # The data's own entropy: one of eight Gaussians of standard deviation 0.3.
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.3**2)
    assert entropy - 0.3 < nats[1] < nats[0] - 0.3


def test_bits_per_dimension_of_gaussian_pictures_is_their_entropy(capsys):
    """Pixels N(0, 1/4^2) in [-1, 1], and a perfect network for them: entropy in bits, and 7 for the scaling."""
    Path("grey").mkdir()
    for i in range(40):
        pixels = 128 + 32 * np.random.default_rng(i).normal(size=(16, 16, 3))
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(f"grey/{i}.png")
    data.load("grey", "data", 16)
    capsys.readouterr()

    def net(z, t, y=None):
        t = t.view(-1, 1, 1, 1)
        return (t / 16 - (1 - t)) / (t**2 / 16 + (1 - t) ** 2) * z

    config = dict(data="grey", root="data", res=16, predict="v", path="linear")
    sample.likelihood(net, config, n=2, steps=100, seed=0, device=torch.device("cpu"))
    said = capsys.readouterr().out
    assert "bits per dimension on 2 held-out" in said
    assert float(said.split()[0]) == pytest.approx(math.log2(2 * math.pi * math.e / 16) / 2 + 7, abs=0.03)


@pytest.mark.parametrize("extra", [[], ["--model", "transformer", "--patch", "7", "--stride", "7"]], ids=str)
def test_mnist_downloads_trains_by_unet_and_by_transformer_and_samples_by_label(extra, monkeypatch, server):
    publish(monkeypatch, server, "mnist")
    monkeypatch.setattr(train, "PREVIEW_STEPS", 2)
    train.main(["--data", "mnist", "--width", "16", "--depth", "1", "--heads", "2", "--steps", "3", "--batch", "4",
                "--device", "cpu", "--root", "there", "--download", *extra])
    assert len(list(Path("there/mnist").glob("*.gz"))) == 4 and not Path("data").exists()
    sample.main(["out/mnist-28", "--n", "20", "--steps", "1", "--label", "all", "--to", "x.npy"])
    assert np.load("x.npy").shape == (20, 1, 28, 28)


def test_bench_prints_rates(capsys):
    train.main(["--res", "16", *TINY, "--bench"])
    said = capsys.readouterr().out
    for word in ("ms/step", "samples/s", "GFLOP/sample", "GFLOP/s", "float32", "bfloat16"):
        assert word in said
    assert not Path("out").exists()


def test_bench_counts_the_arithmetic_and_divides_it_by_the_time(monkeypatch, capsys):
    """Counted anew, layer by layer, and every call takes a quarter of a second."""
    timer = Namespace(timeit=lambda calls: Namespace(mean=0.25))
    monkeypatch.setattr("torch.utils.benchmark.Timer", lambda *_, **__: timer)
    train.main(["--device", "cpu", "--bench"])
    said, products = capsys.readouterr().out, []
    net = model.build("transformer", res=32, patch=4, stride=4, width=256, depth=4, heads=4)
    for layer in filter(lambda layer: isinstance(layer, torch.nn.Linear), net.modules()):
        layer.register_forward_hook(lambda layer, _, out: products.append(2 * out.numel() * layer.in_features))
    net(torch.randn(1, 3, 32, 32), torch.rand(1))
    flop = 3 * (sum(products) + 4 * 2 * 2 * 64**2 * 256)  # 4 blocks of 64 x 64 tokens, q k and then v
    sample, step, square = flop / 1e9, 32 * flop / 1e9, 2 * 2048**3 / 1e9
    assert f"250.0 ms/step  128.0 samples/s  {sample:.3f} GFLOP/sample  {4 * step:,.0f} GFLOP/s\n" in said
    assert f"{step / square:.0%} of a plain float32 matrix product's {4 * square:,.0f} GFLOP/s" in said


@pytest.mark.parametrize("name", ["pets", "spirals"])
def test_sheet_of_a_dataset(name):
    make_pictures(Path("pets"), 30)
    done = command("data.py", "--data", name, "--res", 16)
    sheet = Image.open(data.folder(name, 16) / "data.png").convert("L")
    assert done.returncode == 0 and sheet.width > 50 and 0.01 < (np.array(sheet) < 250).mean() < 0.99


def test_sheet_of_digits_has_their_own_size_so_that_training_packs_nothing_anew(capsys):
    write(ROOT / "mnist", digits()[0])
    data.main(["--data", "mnist"])
    assert Path("out/mnist-28/data.png").exists() and "packing" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [
    "--predict e", "--loss x", "--path cosine", "--time uniform", "--t-mean 0.5", "--ot", "--lr 0.01", "--warmup 0",
    "--cooldown 0", "--decay 0.5", "--clip 0.001", "--seed 1", "--batch 4", "--no-flip", "--norm derf",
    "--attention fused", "--optimizer adamw", "--no-bf16", "--patch 4", "--stride 8", "--depth 2", "--heads 4",
    "--ema 0.1", "--width 64", "--model unet", "--cond all", "--cond smiling,hat", "--cover 0.5", "--jitter 0.1"])
def test_every_flag_changes_the_training(flag, monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *_: Image.new("L", (1, 1)))
    monkeypatch.setattr(train, "held_out", lambda *_: [1.0] * 10)
    base = ["--res", "16", *TINY, "--steps", "5", "--attention", "hand"]
    base += ["--patch", "8", "--stride", "4"] if "unet" not in flag else []
    monkeypatch.setattr(train, "PREVIEW_STEPS", 1)
    if flag == "--no-bf16" and not sample.has_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply in bfloat16")
    train.main([*base, "--out", "plain"])
    train.main([*base, *flag.split(), "--out", "other"])
    plain, other = (flat(state(out)["ema"]) for out in ("plain", "other"))
    same = len(plain) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(plain, other))
    assert not same


def test_the_step_is_compiled_if_asked_to(monkeypatch, quick_w2):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    for flag, count in (("--no-compile", 0), ("--compile", 1)):
        train.main([*MOONS, "--steps", "1", flag])
        assert len(compiled) == count


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("args,words", [
    (["--stpes", "5"], ["--stpes", "--steps"]),
    (["--data", "nowhere"], ["nowhere", "faces"]),
    (["--data", "celeba", "--res", "256"], ["img_align_celeba.zip", "--root"]),
    (["--stride", "5"], ["stride 5", "nearest that fit: 2, 4"]),
    (["--resume"], ["ckpt.pt", "--out"]),
    (["--predict", "score"], ["--predict"]),
    (["--steps", "many"], ["--steps"]),
    (["--steps", "0"], ["--steps"]),
    (["--batch", "-1"], ["--batch"]),
    (["--heads", "5"], ["heads"]),
    (["--res", "4"], ["--res"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--data", "moons", "--model", "transformer"], ["--model"]),
    (["--data", "moons", "--cond", "all"], ["--cond"]),
    (["--data", "moons", "--heads", "2"], ["--heads", "mlp"]),
    (["--model", "unet", "--norm", "derf"], ["--norm", "unet"]),
    (["--seed", str(2**64)], ["--seed"]),
    (["--ema", "1.5"], ["--ema"]),
    (["--seed", "-1"], ["--seed"]),
    (["--warmup", "-1"], ["--warmup"]),
    (["--lr", "inf"], ["--lr"]),
    (["--t-mean", "nan"], ["--t-mean"]),
    (["--data", ""], ["--data"]),
    (["--device", "cpu:foo"], ["cpu:foo"]),
    (["--width", "1000000000"], ["overflow"]),
    (["--out", f"{HERE / 'fm.py'}/x"], ["--out", "fm.py is a file"]),
    (["--data", "mnist", "--root", "there"], ["there/mnist", "--root there --download"]),
], ids=str)
def test_a_wrong_command_gets_one_line_and_status_2(args, words, capsys):
    refused(capsys, lambda: train.main(["--device", "cpu", *args]), *words)
    assert not Path("out").exists()


def test_a_mistake_on_the_real_command_line_shows_no_traceback():
    for line in ("train.py --stride 5", "train.py --nonsense", "sample.py nowhere", "data.py --data nowhere"):
        done = command(*line.split())
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()


def test_resume_refuses_another_shape_a_finished_run_and_a_damaged_file(capsys, quick_w2):
    args = [*MOONS, "--steps", "4"]
    train.main(args)
    before = Path("out/moons/ckpt.pt").read_bytes()
    refused(capsys, lambda: train.main([*args, "--width", "24", "--resume"]), "--width 24", "trained with 16")
    mlp = ["--resume", "--out", "out/moons", "--model", "mlp"]  # which does not fit --data faces, the default
    refused(capsys, lambda: train.main([*mlp, "--width", "24"]), "--width 24", "trained with 16")
    refused(capsys, lambda: train.main([*args, "--resume"]), "--steps")
    assert Path("out/moons/ckpt.pt").read_bytes() == before
    Path("out/moons/ckpt.pt").write_bytes(before[: len(before) // 2])
    refused(capsys, lambda: train.main([*args, "--resume"]), "not a checkpoint")
    kept = torch.load(io.BytesIO(before), weights_only=True)
    kept["config"]["older_name"] = 1
    torch.save(kept, "out/moons/ckpt.pt")
    refused(capsys, lambda: train.main([*args, "--resume"]), "another version", "--out")


def test_resume_refuses_data_that_are_no_longer_the_same(capsys):
    make_pictures(Path("pets/cats"), 8)
    make_pictures(Path("pets/dogs"), 8)
    args = ["--data", "pets", "--res", "16", "--cond", "all", *TINY]
    train.main([*args, "--steps", "1"])
    for change in (lambda: Path("pets/dogs").rename("pets/ants"),  # as many labels, but cats would be called ants
                   lambda: (Path("pets/ants").rename("pets/dogs"), make_pictures(Path("pets/dogs"), 9))):
        change()
        refused(capsys, lambda: train.main([*args, "--steps", "2", "--resume"]), "labels", "out/pets-16", "--out")


@pytest.mark.parametrize("args,words", [
    (["nowhere"], ["nowhere", "train.py"]),
    (["RUN", "--to", "x.bmp"], [".png", ".gif", ".npy"]),
    (["RUN", "--n", "0"], ["--n"]),
    (["RUN", "--bpd", "9" * 30], ["--bpd", "between"]),
    (["RUN", "--bpd", "8", "--label", "0"], ["--bpd", "--label"]),
    (["RUN", "--sweep", "--label", "0", "--guidance", "2"], ["--sweep", "--guidance"]),
    (["RUN", "--guidance", "1e38", "--label", "0"], ["--guidance", "between"]),
    (["RUN", "--solver", "magic"], ["--solver", "heun"]),
    (["RUN", "--device", "tpu"], ["tpu"]),
    (["RUN", "--batch", "0"], ["--batch"]),
    (["RUN", "--interpolate", "5", "--n", "1"], ["--interpolate"]),
    (["RUN", "--shift", "inf"], ["--shift"]),
    (["RUN", "--seed", "-1"], ["--seed"]),
    (["RUN", "--to", f"{HERE / 'fm.py'}/x.png"], ["fm.py"]),
    (["RUN", "--to", "folder.png"], ["folder.png", "folder of that name"]),
], ids=str)
def test_sample_refuses_what_cannot_work(args, words, faces_run, capsys):
    Path("folder.png").mkdir()
    run = str(faces_run[0] / "out/pets-16")
    refused(capsys, lambda: sample.main([run if a == "RUN" else a for a in args]), *words)


def test_sample_refuses_a_file_that_is_no_checkpoint(capsys):
    for content in (b"nonsense", b""):
        Path("ckpt.pt").write_bytes(content)
        refused(capsys, lambda: sample.main(["."]), "not a checkpoint")
    torch.save({"weights": {}}, "ckpt.pt")
    refused(capsys, lambda: sample.main(["."]), "not a checkpoint")
