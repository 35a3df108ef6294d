"""What each part promises, in the order of the scripts. python -m pytest: about two minutes on two cores.

Each test holds a promise against something that does not share its code: a closed form, a brute-force search, scipy's
distributions, torch's own layers, a second process. No network and no GPU are needed.
"""

import csv
import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import torch.distributed.run
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from PIL import ExifTags, Image, ImageCms, ImageOps
from pytest import approx
from torch.testing import assert_close

import data
import fm
import model
import sample
import train

HERE = Path(__file__).parent
MOONS = ["--data", "moons", "--device", "cpu", "--width", "16", "--batch", "32"]
TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--batch", "8", "--device", "cpu", "--warmup", "2"]

parametrize = pytest.mark.parametrize
EVERY_PAIR = list(itertools.product("xev", repeat=2))

every_path = parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
needs_unix = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix")


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with few faces, in float32 whatever the processor offers, and leaves
    signals and threads as they were. A process that a test starts knows nothing of this: give it --no-bf16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "has_bf16", lambda device: False)
    monkeypatch.setattr(data, "FACES", 60)
    monkeypatch.setenv("no_proxy", "*")
    interrupt, terminate = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, terminate)
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


def load_refused(capsys, name, *words):
    return refused(capsys, lambda: data.load(name), *words)


def command(*args, **kwargs):
    """A command as a user types it."""
    args = [sys.executable, HERE / args[0], *map(str, args[1:])]
    return subprocess.run(args, capture_output=True, text=True, **kwargs)


def make_pictures(folder, n, size=(40, 30)):
    """n coloured JPEGs, always the same for a given n."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{i:06d}.jpg")


def normal(*shape):
    """Standard normal numbers in float64, so that errors are the method's and not those of rounding."""
    return torch.randn(*shape, dtype=torch.float64)


def zip_folder(folder, archive):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for picture in folder.iterdir():
            file.write(picture, f"{folder.name}/{picture.name}")


# ---------------------------------------------------------------------------------------------------------------
# fm.py: paths, conversions, the loss


def gaussian_velocity(m, s):
    """The straight path's mean velocity at (z, t) where the data are N(m, s^2). Its flow takes e to m + s e."""

    def v(z, t):
        slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        return m + slope * (z - t * m)

    return v


@every_path
def test_a_path_runs_from_noise_to_data_and_its_derivatives_are_right(path):
    """Against differences. The linear path's alpha and sigma sum to 1, the cosine's squares do."""
    t, step = torch.linspace(0, 1, 11, dtype=torch.float64), 1e-6
    alpha, sigma, *derivatives = path(t)
    for i in (0, 1):
        slope = (path(t + step)[i] - path(t - step)[i]) / (2 * step)
        assert_close(derivatives[i], slope, atol=1e-8, rtol=0)
    assert alpha[0] == 0 and alpha[-1] == 1
    assert_close(alpha + sigma if path == fm.linear else alpha**2 + sigma**2, torch.ones_like(t))


@parametrize("predict,target", EVERY_PAIR)
def test_each_of_the_nine_losses_weighs_an_error_as_its_table_says(predict, target):
    """See `convert`. The weight stays finite at both ends of time, and the truth has loss 0."""
    x, e, error = normal(3, 101, 5)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    rest = 1 - t
    low, high = t.clamp(min=0.05), rest.clamp(min=0.05)
    same = torch.ones_like(t)
    factors = {"xx": same, "xe": t / high, "xv": 1 / high, "ee": same, "ex": rest / low, "ev": 1 / low,
               "vv": same, "vx": rest, "ve": t}
    truth = {"x": x, "e": e, "v": x - e}[predict]
    loss = fm.loss(lambda z, t, y: truth + error, x, e, t, predict=predict, target=target)
    assert_close(loss, (factors[predict + target][:, None] * error).square().mean(1))
    assert fm.loss(lambda z, t, y: truth, x, e, t, predict=predict, target=target).max() < 1e-20


@parametrize("t", [0.2, 0.5, 0.9])
def test_the_loss_is_least_at_the_mean_velocity(t):
    """For Gaussian data the mean velocity is known. There the loss has no slope in any linear direction."""
    n, closed_form = 400_000, gaussian_velocity(1.3, 0.6)
    x, e = 1.3 + 0.6 * torch.randn(n, 1), torch.randn(n, 1)
    scale, shift = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)

    def net(z, times, y):
        return scale * closed_form(z, times[:, None]) + shift

    fm.loss(net, x, e, torch.full((n,), t), predict="v", target="v").mean().backward()
    assert abs(scale.grad) < 0.03 and abs(shift.grad) < 0.03


@every_path
@parametrize("have,want", EVERY_PAIR)
def test_convert_finds_any_of_x_e_v_from_any_other(path, have, want):
    x, e = normal(2, 7, 3, 4, 4)
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = torch.stack(path(t)).view(4, 7, 1, 1, 1)
    truth = {"x": x, "e": e, "v": d_alpha * x + d_sigma * e}
    got = fm.convert(truth[have], have, want, alpha * x + sigma * e, t, path)
    assert_close(got, truth[want], rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: times and pairs


@parametrize("res", [32, 64, 256, 512])
def test_all_resolutions_have_the_same_signal_to_noise_once_averaged_down(res):
    """Averaging k x k pixels divides the noise by k. So at k times the resolution the odds may be k times smaller."""
    odds, at_256 = math.exp(fm.logit_normal_mean(res)), math.exp(-0.8)
    assert odds / at_256 == approx(256 / res)


def test_training_times_are_logit_normal_or_uniform():
    g = torch.Generator().manual_seed(1)
    t = fm.sample_t(20_000, "logit-normal", mean=-0.8, generator=g).double()
    assert scipy.stats.kstest(torch.logit(t), "norm", (-0.8, 0.8)).pvalue > 0.01
    t = fm.sample_t(20_000, "uniform", mean=-0.8, generator=g)
    assert scipy.stats.kstest(t, "uniform").pvalue > 0.01


@parametrize("times", fm.TIMES)
def test_importance_weights_leave_the_mean_loss_as_it_was(times):
    """E_q[w f] = E_p[f] for any f, though the rare times are drawn far more often."""
    g = torch.Generator().manual_seed(0)
    plain = fm.sample_t(400_000, times, -0.8, generator=g)
    covered = fm.sample_t(400_000, times, -0.8, cover=0.3, generator=g)
    weight = fm.importance(covered, times, -0.8, 0.3)
    for f in (torch.ones_like, torch.sin, torch.exp):
        assert (weight * f(covered)).mean().item() == approx(f(plain).mean().item(), abs=0.01)
    assert (covered > 0.9).double().mean().item() == approx(0.03 if times == "logit-normal" else 0.1, abs=0.01)
    assert fm.importance(torch.tensor([0.0, 0.5, 1.0]), times, 20.0, 0.5).isfinite().all()


def test_ot_pair_equals_brute_force_in_each_block():
    for _ in range(5):
        x, e = torch.randn(2, 6, 3, 2)
        orders = list(itertools.permutations(range(6)))
        costs = [(x - e[list(order)]).square().sum() for order in orders]
        best = orders[int(torch.stack(costs).argmin())]
        assert_close(fm.ot_pair(x, e), e[list(best)])
        parts = torch.cat([fm.ot_pair(x[:4], e[:4]), fm.ot_pair(x[4:], e[4:])])
        assert torch.equal(fm.ot_pair(x, e, block=4), parts)


def test_ot_pair_refuses_what_is_not_finite():
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="finite"):
        fm.ot_pair(x, x / 0)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: sampling


def test_guidance_is_off_at_1_and_outside_its_interval_and_takes_one_batch_inside():
    batches = []

    def net(z, t, y, length=None):  # its velocity is the label, 3, or -1 where the label is hidden
        batches.append(len(z))
        return z * 0 + y[:, None].float()

    z, y, y_null = torch.zeros(4, 2), torch.full((4,), 3), torch.full((4,), -1)
    rows = [(1.0, 0.5, 3.0, 4), (2.0, 0.05, 3.0, 4), (2.0, 0.95, 3.0, 4), (2.0, 0.5, 7.0, 8), (0.0, 0.5, -1.0, 8)]
    for guidance, t, velocity, batch in rows:
        v = fm.velocity(net, "v", y=y, y_null=y_null, guidance=guidance, interval=(0.1, 0.9))
        assert (v(z, t) == velocity).all() and batches[-1] == batch
        assert (v(z, t - 0.05, t + 0.05) == velocity).all() and batches[-1] == batch  # a shortcut counts by its middle


@parametrize("predict,mean,std", [("x", 2, 0.5), ("v", 2, 0.5), ("e", 1.974, 0.513)])
def test_a_perfect_prediction_carries_noise_to_a_gaussian(predict, mean, std):
    """The flow to N(2, 0.5^2) is affine, so where -1 and 1 land says where all noise does. An e-prediction starts too
    slowly: the numbers that `velocity` states."""
    closed_form = gaussian_velocity(2, 0.5)

    def net(z, t, y):
        v = closed_form(z, t[:, None])
        return fm.convert(v, "v", predict, z, t)

    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x, _ = fm.solve(fm.velocity(net, predict), z, fm.time_grid(200), "heun", end_euler=True)
    assert x.mean().item() == approx(mean, abs=6e-4)
    assert (x[1] - x[0]).item() / 2 == approx(std, abs=6e-4)


@parametrize("solver,order", [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_half_the_step_divides_the_error_by_two_to_the_order_and_evaluations_are_counted(solver, order):
    """dz/dt = -2 t z^2 has the solution z = 1 / (1 + t^2)."""
    z, errors, calls = torch.ones(1, 1, dtype=torch.float64), [], []

    def v(z, t):
        calls.append(t)
        return -2 * t * z**2

    for steps in (20, 40, 80):
        calls.clear()
        end, nfe = fm.solve(v, z, fm.time_grid(steps), solver)
        errors.append(abs(end.item() - 0.5))
        assert nfe == len(calls)
    assert math.log2(errors[0] / errors[1]) == approx(order, abs=0.15)
    assert math.log2(errors[1] / errors[2]) == approx(order, abs=0.15)


@parametrize("grid,passed", [([0.0, 1.0], [0.999, 1]), (fm.time_grid(4), [0.25, 0.5, 0.75, 0.99975, 1])])
def test_dopri5_visits_every_time_leaves_the_last_thousandth_to_euler_and_finds_back(grid, passed):
    """dz/dt = z cos(3t) has the solution exp(sin(3t) / 3). At t = 1 this velocity is infinite."""
    start, states, calls = torch.ones(1, dtype=torch.float64), [], []

    def v(z, t):
        calls.append(t)
        return z * math.cos(3 * t) if t < 1 else z / 0

    _, nfe = fm.solve(v, start, grid, "dopri5", end_euler=True, states=states, tol=1e-7)
    assert nfe == len(calls)
    assert_allclose(torch.cat(states), np.exp(np.sin(3 * np.array(passed)) / 3), atol=2e-6)
    assert_close(fm.solve(v, states[-2], [passed[-2], 0.0], "dopri5", tol=1e-7)[0], start, atol=2e-6, rtol=0)


def test_a_shifted_time_grid_divides_the_odds_and_keeps_the_ends():
    plain, shifted = fm.time_grid(10), fm.time_grid(10, shift=3.0)
    assert plain == approx(np.linspace(0, 1, 11))
    assert shifted[0] == 0 and shifted[-1] == 1
    for t, s in zip(plain[1:-1], shifted[1:-1]):
        assert s / (1 - s) == approx(t / (1 - t) / 3)


@every_path
def test_inpainting_keeps_what_is_known_and_every_state_on_the_path(path):
    """For data that are always 2, z at time s is normal with mean 2 alpha(s) and standard deviation sigma(s)."""
    x, hole, states = torch.full((20_000, 2), 2.0, dtype=torch.float64), torch.tensor([True, False]), []
    v = fm.velocity(lambda z, t, y: torch.full_like(z, 2.0), path=path)
    z, nfe = fm.inpaint(v, torch.randn_like(x), x, hole, lambda: torch.randn_like(x), fm.time_grid(4), path, "rk4",
                        end_euler=True, states=states, repeats=3)
    assert nfe == 3 * (4 + 4 + 4 + 1)
    assert_close(z[:, 1], x[:, 1])
    for s, z in zip((0.25, 0.5, 0.75), states):
        alpha, sigma, _, _ = path(torch.tensor(s))
        assert_allclose(z.mean(0), 2 * alpha, atol=0.03)
        assert_allclose(z.std(0), sigma, rtol=0.03)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: shortcuts


def gaussian_mean_velocity(path, mean, std):
    """u(z, s, t) where the data are N(mean, std^2). At each time z is normal, so the flow shifts and stretches it from
    one normal distribution to the other. At s = t: its derivative by t."""

    def u(z, s, t):
        s, t = s[:, None], t[:, None]
        t = torch.where(s == t, s + 1e-7, t)
        moments = []
        for time in (s, t):
            alpha, sigma, _, _ = path(time)
            moments.append((alpha * mean, ((alpha * std) ** 2 + sigma**2).sqrt()))
        (mean_s, std_s), (mean_t, std_t) = moments
        landed = mean_t + std_t / std_s * (z - mean_s)
        return (landed - z) / (t - s)

    return u


def some_shortcuts(n, shift=1.0):
    s, m, t, shortest = fm.sample_shortcuts(n, shift)
    return s.double(), m.double(), t.double(), shortest


@parametrize("shift", [1.0, 3.0])
def test_shortcuts_are_steps_of_the_grids_of_1_to_16_steps_each_grid_equally_often(shift):
    s, m, t, shortest = fm.sample_shortcuts(100_000, shift)
    counted = 0
    for steps in (1, 2, 4, 8, 16):
        grid, halves = torch.tensor(fm.time_grid(steps, shift)), torch.tensor(fm.time_grid(2 * steps, shift)[1::2])
        for start, middle, end in zip(grid, halves, grid[1:]):
            here = (s - start).abs() + (t - end).abs() < 1e-6
            assert here.float().mean().item() == approx(0.2 / steps, rel=0.1)
            assert_close(m[here], middle.expand(int(here.sum())))
            assert (shortest[here] == (steps == 16)).all()
            counted += int(here.sum())
    assert counted == 100_000


@every_path
def test_two_shortcuts_of_the_exact_flow_land_where_one_does_and_the_shortest_are_two_euler_steps(path):
    u, z = gaussian_mean_velocity(path, 1.3, 0.6), normal(200, 3)
    s, m, t, shortest = some_shortcuts(200, shift=2.0)
    target = fm.shortcut_target(u, z, s, m, t, shortest)
    assert 10 < shortest.sum() < 100
    assert_close(target[~shortest], u(z, s, t)[~shortest])
    v = gaussian_field(path, 1.3, 0.6)
    for i in shortest.nonzero()[:10, 0]:
        landed, _ = fm.solve(v, z[i : i + 1], [s[i].item(), m[i].item(), t[i].item()])
        assert_close(z[i] + (t - s)[i] * target[i], landed[0], atol=1e-6, rtol=0)


@parametrize("predict", ["x", "v"])
@every_path
def test_the_loss_of_shortcuts_is_the_squared_error_of_the_prediction_and_0_for_the_exact_flow(path, predict):
    u, error = gaussian_mean_velocity(path, 1.3, 0.6), normal(200, 3)

    def net(z, t, y, length=None):
        end = t if length is None else t + length
        return fm.convert(u(z, t, end), "v", predict, z, t, path)

    def off(z, t, y, length):
        return net(z, t, y, length) + error

    x, e = normal(200, 3), normal(200, 3)
    s, m, t, _ = some_shortcuts(200)
    never = torch.zeros(200, dtype=bool)
    assert fm.shortcut_loss(net, net, x, e, s, m, t, never, None, predict, path).max() < 1e-12
    loss = fm.shortcut_loss(off, net, x, e, s, m, t, never, None, predict, path)
    assert_close(loss, error.square().mean(1), atol=1e-6, rtol=0)


def test_the_flow_through_data_of_finitely_many_points_is_learnt_in_one_step_from_its_own_halves():
    """The teacher follows the exact velocity in 64 steps of RK4; what two such shortcuts add up to is what one is."""
    points = normal(5, 2)
    v = fm.exact_velocity(points)

    def u(z, s, t):
        rows = []
        for start, a, b in zip(z, s.tolist(), t.tolist()):
            end, _ = fm.solve(v, start[None], np.linspace(a, b, 65).tolist(), "rk4", end_euler=b == 1)
            rows.append((end[0] - start) / (b - a))
        return torch.stack(rows)

    s = torch.tensor([0.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    t = torch.tensor([1.0, 0.5, 1.0, 0.5], dtype=torch.float64)
    z, never = normal(4, 2), torch.zeros(4, dtype=bool)
    target = fm.shortcut_target(u, z, s, (s + t) / 2, t, never)
    assert_close(target, u(z, s, t), atol=1e-3, rtol=0)
    landed = z[:1] + target[:1]
    assert torch.cdist(landed, points).min() < 0.01


def test_a_network_that_learns_shortcuts_takes_noise_to_a_gaussian_in_one_step_and_its_jumps_compose():
    torch.manual_seed(0)
    net = model.build("mlp", dim=1, width=32, shortcut=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(1000):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 1000)
        x, e = 1.3 + 0.6 * torch.randn(256, 1), torch.randn(256, 1)
        loss = fm.loss(net, x, e, torch.rand(256), predict="v").mean()
        loss = loss + fm.shortcut_loss(net, net, x, e, *fm.sample_shortcuts(256), predict="v").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    u, e = fm.velocity(net, "v"), torch.randn(4000, 1)
    exact = 1.3 + 0.6 * e
    for steps in fm.SHORTCUT_STEPS:
        landed, nfe = fm.solve(u, e, fm.time_grid(steps), "shortcut")
        assert nfe == steps
        assert landed.mean().item() == approx(1.3, abs=0.05) and landed.std().item() == approx(0.6, abs=0.05)
        assert (landed - exact).square().mean().sqrt() < 0.08
    euler, _ = fm.solve(u, e, fm.time_grid(1), "euler")
    assert (euler - exact).square().mean().sqrt() > 0.5  # one step of the flow itself lands elsewhere


# ---------------------------------------------------------------------------------------------------------------
# fm.py: likelihood and distance


def test_the_likelihood_is_its_closed_form_and_random_signs_find_it_without_bias():
    """A linear flow dz/dt = A z takes expm(-A) x to x, and the density on the way falls by the trace of A."""
    A, x = normal(4, 4) / 4, normal(1, 4)
    e = scipy.linalg.expm(-A.numpy()) @ x[0].numpy()
    exact = scipy.stats.norm.logpdf(e).sum() - A.trace().item()
    log_p, _ = fm.log_likelihood(lambda z, t: z @ A.T, x, fm.time_grid(20)[::-1], "rk4")
    assert log_p.item() == approx(exact, abs=1e-6)
    many, signs = x.expand(20_000, 4), torch.randint(0, 2, (20_000, 4)).double() * 2 - 1
    log_p, _ = fm.log_likelihood(lambda z, t: z @ A.T, many, fm.time_grid(4)[::-1], "rk4", signs)
    assert log_p.mean().item() == approx(exact, abs=4 * log_p.std().item() / math.sqrt(20_000))


def signs_like(x):
    return torch.randint(0, 2, x.shape) * 2.0 - 1


def byte(number):
    return number / 127.5 - 1


def gaussian_field(path, m, s):
    """The mean velocity where the data are N(m, s^2), on any path."""

    def v(z, t):
        alpha, sigma, d_alpha, d_sigma = path(torch.tensor(t, dtype=z.dtype))
        slope = (d_alpha * alpha * s**2 + d_sigma * sigma) / (alpha**2 * s**2 + sigma**2)
        return d_alpha * m + slope * (z - alpha * m)

    return v


@every_path
@parametrize("stop", [0.3, 0.7, 1.0])
def test_churn_leaves_the_distribution_at_each_time_as_it_is(path, stop):
    """Of data from N(2, 0.5^2)."""
    v, z = gaussian_field(path, 2, 0.5), torch.randn(10_000, 1, dtype=torch.float64)
    ts = np.linspace(0, stop, 200).tolist()
    ends = [fm.solve_with_churn(v, z, ts, churn, lambda: torch.randn_like(z), path)[0] for churn in (0.5, 3)]
    alpha, sigma, _, _ = path(torch.tensor(stop, dtype=torch.float64))
    for end in ends:
        assert float(end.mean()) == approx(float(2 * alpha), abs=0.02)
        assert float(end.std()) == approx(math.hypot(0.5 * alpha, sigma), rel=0.02)
    still, _ = fm.solve(v, z, ts, "heun")
    assert torch.equal(still, fm.solve_with_churn(v, z, ts, 0, lambda: torch.randn_like(z), path)[0])
    again = [torch.corrcoef(torch.cat([still, end], 1).T)[0, 1] for end in ends]
    assert 0.98 > again[0] > again[1]  # the more churn, the less is left of the noise that it started from


@every_path
@parametrize("level", [0, 127, 255])
def test_a_picture_that_is_known_beforehand_takes_no_bits(level, path):
    x = torch.full((4, 3, 8, 8), byte(level))

    def v(z, t):
        t = torch.full((4,), t)
        return fm.convert(x, "x", "v", z, t, path)

    bits, nfe = fm.bits_per_dimension(v, x, torch.randn_like(x), signs_like(x), 0.001, 20, path)
    assert nfe == 80 and bits.abs().max() < 0.05


def test_bits_of_pictures_with_known_probabilities_are_bounded_by_little_more_than_the_entropy():
    """Pictures of one number. The best x-prediction is the posterior mean."""
    levels, p = byte(torch.tensor([10.0, 11, 200, 255], dtype=torch.float64)), torch.tensor([0.5, 0.25, 0.125, 0.125])

    def v(z, t):
        log_posterior = p.log() - (z - t * levels).square() / (2 * (1 - t) ** 2)  # (B, 4) from z (B, 1)
        mean = (log_posterior.softmax(dim=1) * levels).sum(1, keepdim=True)
        return (mean - z) / (1 - t)

    x = levels.repeat_interleave(torch.tensor([512, 256, 128, 128]))[:, None]
    bits, _ = fm.bits_per_dimension(v, x, torch.randn_like(x), signs_like(x), 0.001, 100)
    entropy = -(p * p.log2()).sum()
    assert entropy - 0.02 < bits.mean() < entropy + 0.05


def test_w2_of_a_shifted_cloud_is_the_shift_and_of_a_broken_one_infinite():
    a = torch.randn(100, 2)
    assert fm.w2(a, a[torch.randperm(100)] + torch.tensor([3.0, 4.0])) == approx(5)
    assert fm.w2(a, a / 0) == math.inf


def test_the_frechet_distance_is_scipys_and_that_of_known_gaussians():
    a, b = normal(300, 5) @ normal(5, 5), 1 + normal(200, 5) @ normal(5, 5)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    by_scipy = (a.mean(0) - b.mean(0)).square().sum().item() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root).real
    assert fm.frechet(a, b) == approx(by_scipy)
    assert fm.frechet(a, a) == approx(0, abs=1e-12)
    assert fm.frechet(a[:3], a[:3] + 1) == approx(5)  # fewer vectors than numbers in each
    wide = torch.tensor([1.0, 2.0, 3.0]) * normal(200_000, 3) + 1  # the deviations differ by 0, 1 and 2, the means by 1
    assert fm.frechet(normal(200_000, 3), wide) == approx(3 + 1 + 4, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: figures


@pytest.fixture
def figures():
    fm.FIGURES.mkdir(parents=True)
    return fm.FIGURES


@parametrize("script,names", [
    (fm, ["pairs", "flow", "times", "noise", "sine", "solvers", "last"]), (model, ["patches", "rope"])])
def test_fm_and_model_draw_their_figures(script, names, capsys):
    script.main()
    assert sorted(file.stem for file in script.FIGURES.iterdir()) == sorted(names)
    printed = capsys.readouterr().out
    for name in names:
        assert f"{name}.png" in printed


def test_crossings_are_those_that_a_search_for_common_points_finds():
    a, b = normal(2, 25, 2)
    found = 0
    for i, j in itertools.combinations(range(25), 2):
        # a_i + s (b_i - a_i) = a_j + r (b_j - a_j)
        s, r = np.linalg.solve(np.stack([b[i] - a[i], a[j] - b[j]], axis=1), a[j] - a[i])
        found += 0 < s < 1 and 0 < r < 1
    assert fm.crossings(a, b) == found > 20


def test_the_figure_of_pairs_has_shorter_lines_and_fewer_crossings_with_optimal_transport(figures):
    (length, crossed), (ot_length, ot_crossed) = fm.draw_pairs()
    assert ot_length < 0.8 * length and ot_crossed < crossed / 5


@every_path
def test_the_exact_velocity_is_the_mean_over_the_data_weighted_by_the_density_of_their_noise(path):
    points, z, t = normal(5, 2), normal(3, 2), 0.4
    alpha, sigma, d_alpha, d_sigma = (float(number) for number in path(torch.tensor(t, dtype=torch.float64)))
    for place, v in zip(z, fm.exact_velocity(points, path)(z, t)):
        noises = (place - alpha * points) / sigma
        weights = scipy.stats.multivariate_normal(cov=np.eye(2)).pdf(noises)
        assert_allclose(v, np.average(d_alpha * points + d_sigma * noises, axis=0, weights=weights))


def test_the_figure_of_the_exact_flow_ends_at_the_data_by_bent_paths(figures, monkeypatch):
    drawn, trails = [], data.trails
    monkeypatch.setattr(data, "trails", lambda lines: drawn.append(lines) or trails(lines))
    assert min(fm.draw_exact_flow()) > 1.1
    moons = data.points("moons", 200, seed=0)
    for lines in drawn[-2:]:
        assert torch.cdist(torch.tensor(lines[:, -1]), moons).min(dim=1).values.median() < 0.02


def test_the_figure_of_times_peaks_where_most_drawn_times_lie(figures):
    for res, peak in zip((64, 256, 512), fm.draw_times()):
        t = fm.sample_t(200_000, mean=fm.logit_normal_mean(res))
        counts, edges = np.histogram(t, bins=25, range=(0, 1))
        assert peak == approx(edges[counts.argmax()] + 0.02, abs=0.045)


def test_the_figure_of_noise_and_size_averages_64_pixels_and_so_divides_the_noise_by_8(figures):
    assert fm.draw_noise_and_size() == approx([0.7, 0.7 / 8], rel=0.05)


def test_the_figures_of_solvers_have_the_known_errors_and_orders(figures):
    # At t = pi, Euler's sum of cosines is too large by exactly the step.
    assert fm.draw_sine() == approx([2 * math.pi / steps for steps in (10, 30, 100)])
    assert fm.draw_solvers() == approx(dict(euler=1, heun=2, midpoint=2, rk4=4), abs=0.1)


def test_the_figure_of_the_last_step_shows_what_its_clamp_leaves_and_nothing_without(figures):
    """The last two of 50 steps, with 1-t = 0.04 and 0.02, each divide by 0.05, and leave 60%."""
    x = torch.tensor(data.draw_faces([18], 64)[0] / 127.5 - 1).permute(0, 3, 1, 2)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert fm.draw_last_step() == approx([0.04 * 0.6**2 * (e - x).std().item() * 127.5, 0], rel=1e-3, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------
# model.py

SMALL = {"transformer": dict(res=16, channels=3, patch=4, stride=4, width=32, depth=1, heads=2),
         "unet": dict(res=16, channels=3, width=16, depth=1, heads=2), "mlp": dict(dim=2, width=16, depth=2)}


def small(kind, **sizes):
    """A small network whose weights are no longer those of the start, where much is zero."""
    net = model.build(kind, **SMALL[kind] | sizes)
    with torch.no_grad():
        for weight in net.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return net


def test_the_time_embedding_tells_nearby_times_apart():
    embedding = model.sinusoidal(torch.linspace(0, 1, 1001), 256)
    assert F.pdist(embedding).min() > 0.5


def test_labels_are_rows_of_a_table_and_a_hidden_label_has_a_row_of_its_own():
    labels = model.Labels(3, 5)
    rows = labels.rows
    assert_close(labels(torch.tensor([0, 2, -1])), rows[[0, 2, 3]])
    attributes = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    y = model.hide(attributes, torch.tensor([False, False, True]))
    assert_close(labels(y), torch.stack([rows[0] + rows[2], 0 * rows[0], rows[3]]))
    assert attributes.min() == 0  # hide leaves its argument alone
    assert torch.equal(labels(None), rows[3]) and model.Labels(0, 5)(None) == 0


@parametrize("kind", ["transformer", "unet"])
def test_labels_weigh_about_as_much_as_time_before_training(kind):
    """Rows a tenth as large were heard so late that samples ignored their labels."""
    net = model.build(kind, **SMALL[kind] | dict(width=64, labels=8))
    of_time = net.time(model.sinusoidal(torch.rand(512), 256)).std(0).mean()
    of_label = net.labels(torch.arange(8)).std(0).mean()
    assert 0.5 < of_label / of_time < 5


@parametrize("kind", SMALL)
def test_only_a_network_that_learns_shortcuts_has_weights_for_their_length_and_length_0_is_the_flow(kind):
    assert not any("length" in name for name, _ in small(kind).named_parameters())
    net = small(kind, shortcut=True)
    z, t = torch.randn(4, *((2,) if kind == "mlp" else (3, 16, 16))), torch.full((4,), 0.5)
    flow = net(z, t)
    assert torch.equal(net(z, t, None, torch.zeros(4)), flow)
    assert (net(z, t, None, torch.full((4,), 0.5)) - flow).abs().max() > 1e-3
    assert (model.Length(True, 8)(torch.rand(4), t) == 0).all()  # before training it adds nothing


@parametrize("kind,layer,for_each_depth,beside", [
    ("mlp", torch.nn.Linear, 1, 1), ("transformer", model.Block, 1, 0), ("unet", model.ResBlock, 6, 0)])
def test_a_network_is_as_deep_as_it_was_asked_to_be(kind, layer, for_each_depth, beside):
    for depth in (1, 3):
        layers = [one for one in small(kind, depth=depth).modules() if isinstance(one, layer)]
        assert len(layers) == depth * for_each_depth + beside


@parametrize("patch,stride", [(4, 4), (4, 3), (4, 2), (4, 1), (6, 5), (6, 2), (8, 8), (8, 4), (16, 1)])
def test_unpatchify_puts_together_what_patchify_cut_out(patch, stride):
    z = torch.randn(2, 3, 16, 16)
    patches = model.patchify(z, patch, stride)
    assert torch.equal(patches[:, 0], z[:, :, :patch, :patch].flatten(1))
    assert_close(model.unpatchify(patches, 16, patch, stride), z)


def test_where_patches_overlap_one_fades_into_the_next_and_no_edge_shows():
    """White patches and black ones in turn: a plain mean would jump by half at each rim."""
    patches = (torch.arange(81) % 2.0)[None, :, None].expand(1, 81, 3 * 32**2)
    row = model.unpatchify(patches, 256, 32, 28)[0, 0, 16]  # the middle of the first row of patches
    assert torch.equal(row[[0, 27, 32, 55, 60]], torch.tensor([0.0, 0, 1, 1, 0]))  # five places that one patch covers
    assert_close(row[28:32], torch.tensor([0.2, 0.4, 0.6, 0.8]))


def test_a_stride_that_does_not_fit_is_refused_with_the_nearest_that_do():
    model.check_stride(256, 16, 12)
    with pytest.raises(ValueError, match="nearest that fit: 12, 15"):
        model.check_stride(256, 16, 13)
    for patch, stride in ((16, 17), (300, 12), (16, 0)):
        with pytest.raises(ValueError, match=f"stride {stride} does not fit patch {patch}"):
            model.check_stride(256, patch, stride)


@parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rmsnorm_equals_torchs(dtype, tolerance):
    norm, z = model.RMSNorm(48), (5 * torch.randn(4, 7, 48)).to(dtype)
    norm.weight.data = torch.rand(48)
    wanted = F.rms_norm(z, (48,), norm.weight.to(dtype) * 2, 1e-6)
    assert_close(norm(z, scale=2), wanted, atol=tolerance, rtol=tolerance)


def test_derf_and_swiglu_equal_scipys_functions():
    norm, layer, z = model.Derf(10).double(), model.SwiGLU(10).double(), normal(3, 10)
    scale = torch.rand(10, dtype=torch.float64)
    with torch.no_grad():
        for weight in norm.parameters():
            weight += torch.randn_like(weight)
        squashed = torch.from_numpy(scipy.special.erf((norm.alpha * z + norm.s).numpy()))
        assert_close(norm(z, scale), (norm.gamma * squashed + norm.beta) * scale)
        gate = layer.gate(z)
        silu = gate * torch.from_numpy(scipy.special.expit(gate.numpy()))
        assert_close(layer(z), (silu * layer.up(z)) @ layer.down.weight.T)


@parametrize("dtype,tolerance", [(torch.float64, 1e-9), (torch.bfloat16, 3e-2)])
@parametrize("name", ["hand", "auto"])
def test_attention_equals_torchs(name, dtype, tolerance):
    q, k, v = torch.randn(3, 2, 3, 9, 8, dtype=dtype)
    wanted = F.scaled_dot_product_attention(q, k, v)
    assert_close(model.ATTENTION[name](q, k, v), wanted, atol=tolerance, rtol=tolerance)


def test_attention_tells_equal_tokens_apart_by_relative_position_only():
    attention, seen = model.Attention(4, 32, 2, "hand"), []

    def spy(q, k, v):
        seen.extend([q, k])
        return v

    attention.attend = spy
    attention(torch.randn(32).expand(1, 16, 32))
    q, k = seen
    scores = (q @ k.mT)[0, 0].view(4, 4, 4, 4)  # row and column of the query, row and column of the key
    assert_close(scores[1:, :, 1:], scores[:-1, :, :-1], atol=1e-4, rtol=0)
    assert_close(scores[:, 1:, :, 1:], scores[:, :-1, :, :-1], atol=1e-4, rtol=0)
    assert F.pdist(torch.cat([scores[:, 0, 0, 0], scores[0, 1:, 0, 0]])[:, None]).min() > 1e-3


def test_the_length_of_queries_and_keys_does_not_matter():
    attention, z = model.Attention(3, 32, 2, "hand"), torch.randn(2, 9, 32)
    before = attention(z)
    attention.q.weight.data *= 50
    attention.k.weight.data *= 50
    assert_close(attention(z), before, atol=1e-4, rtol=0)


def test_each_scale_and_gate_of_a_block_acts_on_its_own_branch():
    """A scale of -1 lets nothing into its branch, a gate of 0 nothing out. At the start all gates are 0."""
    block, z, c = model.Block(2, 16, 2, "rms", "hand"), torch.randn(1, 4, 16), torch.randn(1, 16)
    assert torch.equal(block(z, c), z)
    rows = [(-1, 1, 0, 0, True), (0, 0, -1, 1, True), (-1, 0, 0, 1, False), (0, 1, -1, 0, False)]
    for *modulation, same in rows:  # scale and gate of the attention, scale and gate of the feed-forward layer
        block.modulation.bias.data = torch.tensor(modulation).float().repeat_interleave(16)
        assert torch.equal(block(z, c), z) == same


def test_a_residual_block_of_the_unet_starts_as_its_shortcut_and_norms_16_channels_together():
    h = torch.randn(2, 48, 4, 4)
    assert torch.equal(model.ResBlock(48, 48, 8)(h, torch.randn(2, 8)), h)
    norm, changed = model.group_norm(48), h.clone()
    changed[:, 0] *= 10
    differs = (norm(h) - norm(changed)).abs().amax((0, 2, 3)) > 0.1
    assert differs.tolist() == [True] * 16 + [False] * 32


def test_the_transformer_knows_where_in_the_picture_a_patch_lies():
    """All patches of a flat picture are equal, and attention over equal tokens cannot tell them apart."""
    out = small("transformer")(torch.ones(1, 3, 16, 16), torch.rand(1))
    assert F.pdist(model.patchify(out, 4, 4)[0]).min() > 0.1


def test_the_unet_passes_on_what_each_level_computed_and_gives_a_pixel_its_own_token():
    net, given, out = small("unet"), {}, {}
    net.attention = torch.nn.Identity()

    def note(name):
        def hook(module, inputs, output):
            given[name], out[name] = inputs[0], output

        return hook

    for name, module in net.named_children():
        module.register_forward_hook(note(name))
    net(torch.randn(2, 3, 16, 16), torch.rand(2))
    assert torch.equal(given["up1"][:, 16:], out["down1"]) and torch.equal(given["up2"][:, 32:], out["down2"])
    assert_close(given["up3"], out["down3"] + out["norm3"])


@parametrize("kind,changes", [
    ("transformer", {}), ("transformer", dict(norm="derf")), ("unet", {}), ("unet", dict(res=28, channels=1))], ids=str)
def test_every_parameter_learns_and_time_matters(kind, changes):
    """All start from grey, but for Derf."""
    sizes = SMALL[kind] | dict(labels=3) | changes
    net, y, t = model.build(kind, **sizes), torch.tensor([0, 1, 2, -1, 0, 1]), torch.full((6,), 0.5)
    x = torch.randn(6, sizes["channels"], sizes["res"], sizes["res"]).tanh()
    assert (net(x, t, y) == 0).all() == ("norm" not in changes)
    before, losses = [weight.clone() for weight in net.parameters()], []
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0)
    for _ in range(30):
        loss = fm.loss(net, x, torch.randn_like(x), torch.rand(6), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for old, (name, weight) in zip(before, net.named_parameters()):
        assert not torch.equal(old, weight), name
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (net(x, t, y) - net(x, t + 0.4, y)).abs().max() > 1e-3


@parametrize("size,value,words", [("res", 30, "res 30"), ("width", 20, "width 20"), ("heads", 7, "7 heads")])
def test_sizes_of_the_unet_that_do_not_fit_together_are_refused(size, value, words):
    with pytest.raises(ValueError, match=words):
        model.build("unet", **SMALL["unet"] | {size: value})


def test_the_figure_of_patches_shows_a_sum_four_times_too_bright_where_rows_and_columns_overlap(figures):
    most, error = model.draw_patches()
    assert most == approx(4, abs=1e-4) and error < 1e-6


def test_the_figure_of_rope_falls_with_distance_as_the_mean_of_its_cosines(figures):
    """Half of the 32 pairs of numbers turn with the row, by 16 frequencies from 1 to almost 1/100."""
    frequencies = 0.01 ** (np.arange(16) / 16)
    mean = model.draw_rope()
    for down, across in itertools.product((-10, -3, 0, 1, 5), repeat=2):
        cosines = np.cos(down * frequencies).mean() / 2 + np.cos(across * frequencies).mean() / 2
        assert mean[10 + down, 10 + across].item() == approx(cosines, abs=0.02)


def test_the_table_of_parts_adds_up_and_is_of_the_networks_that_train_py_builds(capsys):
    flags = {"32 pixels": dict(preset="laptop"), "256, laptop": dict(res=256, preset="laptop"),
             "256, GPU": dict(res=256, preset="gpu")}
    table = model.list_parts()
    assert table.keys() == flags.keys()
    for name, given in flags.items():
        sizes = train.network_sizes(train.resolve(given), label_count=0)
        assert sizes.items() >= model.EXAMPLES[name].items()
        parts = dict(table[name])
        weights, operations = parts.pop("all")
        assert sum(part[0] for part in parts.values()) == weights
        assert sum(part[1] for part in parts.values()) == operations
        assert operations * 3 == train.flop_per_sample(sizes, (3, sizes["res"], sizes["res"]))
    # Four matrices of 128 x 128 for each of 64 tokens, and their products with one another, in 4 blocks.
    assert table["32 pixels"]["attention"] == (4 * 4 * 128**2, 4 * 2 * (4 * 64 * 128**2 + 2 * 64**2 * 128))


# ---------------------------------------------------------------------------------------------------------------
# data.py: batches


def test_batches_are_epochs_of_permutations_laid_end_to_end():
    batches = [data.batch_indices(10, 4, step, seed=3) for step in range(10)]
    epochs = np.concatenate(batches).reshape(4, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and len(np.unique(epochs, axis=0)) == 4
    assert np.bincount(data.batch_indices(3, 9, 0, seed=0)).tolist() == [3, 3, 3]


@parametrize("n,held_out", [(19, 19), (100, 5), (10**5, 1024)])
def test_held_out_samples_are_a_twentieth_and_never_trained_on_but_where_there_are_few(n, held_out):
    train, held = data.split(n)
    assert len(held) == held_out
    assert sorted({*train, *held}) == list(range(n)) and len(train) == (n if n < 20 else n - held_out)


def test_bytes_become_numbers_from_minus_1_to_1_and_come_back():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(2, 8, 16, 3)
    x = data.to_tensor(pixels, torch.device("cpu"))
    assert x.shape == (2, 3, 8, 16) and x.min() == -1 and x.max() == 1
    for less_than_half_a_level in (-0.003, 0, 0.003):
        assert (data.to_uint8(x + less_than_half_a_level) == pixels).all()
    assert data.to_uint8(torch.full((1, 1, 1, 1), 3.0)) == 255  # beyond 1 there is nothing brighter
    points = np.float32([[3, -4]])
    assert (data.to_tensor(points, torch.device("cpu")).numpy() == points).all()


# ---------------------------------------------------------------------------------------------------------------
# data.py: datasets of pictures, and packing


def packs(capsys, name):
    """Does loading this dataset pack it?"""
    data.load(name, "data", 16)
    return "packing" in capsys.readouterr().out


def test_a_folder_is_packed_once_with_sub_folders_as_labels_and_again_when_it_changes(capsys):
    make_pictures(Path("pets/cat"), 3)
    make_pictures(Path("pets/dog"), 2)
    Path("pets/folder.png").mkdir()
    assert packs(capsys, "pets") and not packs(capsys, "pets")
    images, labels, names, _ = data.load("pets", "data", 16)
    assert images.shape == (5, 16, 16, 3) and images.dtype == np.uint8
    assert names == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1, 1]
    os.utime("pets/cat/000000.jpg", (0, 0))
    assert packs(capsys, "pets")
    make_pictures(Path("pets/dog"), 4)
    assert packs(capsys, "pets")


def test_faces_are_packed_again_when_the_code_that_draws_them_changes(capsys, monkeypatch):
    monkeypatch.setattr(data, "__file__", shutil.copy(data.__file__, "data.py"))
    assert packs(capsys, "faces") and not packs(capsys, "faces")
    Path("data.py").write_text("# drawn otherwise")
    assert packs(capsys, "faces")


def test_a_zip_packs_to_the_same_pixels_as_the_folder(capsys):
    make_pictures(Path("pets"), 4)
    zip_folder(Path("pets"), Path("pets.zip"))
    with zipfile.ZipFile("pets.zip", "a") as archive:
        archive.writestr("__MACOSX/pets/._000000.jpg", b"what macOS adds is no picture")
    assert (data.load("pets", "data", 16)[0] == data.load("pets.zip", "data", 16)[0]).all()
    assert "skipped" not in capsys.readouterr().out


@parametrize("n,words", [(4000, "2,000 of 4,000 ETA pictures/s"), (None, "2,000 pictures pictures/s")])
def test_packing_shows_progress(n, words, capsys):
    samples = ((np.zeros((1, 1, 3), np.uint8), -1, []) for _ in range(4000))
    data.write_pack(Path("cache/x.images"), Path("x"), samples, n, [])
    said = capsys.readouterr().out.splitlines()
    assert all(word in said[0] for word in words.split()) and len(said) == 3


def test_every_one_of_many_pictures_keeps_its_own_label():
    for name, colour, n in (("dark", 0, 515), ("light", 255, 9)):
        Path("pets", name).mkdir(parents=True)
        Image.new("L", (8, 8), colour).save("one.bmp")
        for i in range(n):
            shutil.copy("one.bmp", f"pets/{name}/{i}.bmp")
    images, labels, _, _ = data.load("pets", "data", 8)
    assert np.array_equal(images[:, 0, 0, 0] > 127, labels) and labels.sum() == 9


def test_broken_pictures_are_skipped_counted_and_named(capsys):
    make_pictures(Path("pets"), 3)
    whole = Path("pets/000000.jpg").read_bytes()
    Path("pets/half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("F", (9, 9)).save("pets/float.tiff")
    images, labels, _, _ = data.load("pets", "data", 16)
    assert len(images) == len(labels) == 3
    said = capsys.readouterr().out
    assert "skipped 2 of 5" in said and "half.jpg" in said and "float.tiff" in said


def broken(file, res, channels):
    raise ValueError


def unreadable(file, res, channels):  # just now, which is no reason to leave the picture out for ever
    open("gone")


def ended(file, res, channels):
    signal.raise_signal(signal.SIGTERM)


@parametrize("reader,status,words", [(broken, 2, "none of the 3 pictures"), (unreadable, 1, "gone"), (ended, 143, "")])
def test_packing_that_fails_leaves_nothing_and_starts_anew(reader, status, words, monkeypatch, capsys):
    make_pictures(Path("pets"), 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(data, "read_picture", reader)
        data.run(lambda: data.load("pets", "data", 16))
    assert end.value.code == status and words in capsys.readouterr().err
    assert list(Path("data/cache").iterdir()) == []
    assert len(data.load("pets", "data", 16)[0]) == 3


@needs_unix
def test_a_full_disk_while_packing_is_told_in_a_line_and_leaves_nothing_behind():
    import resource

    make_pictures(Path("pets"), 9)

    def small_files_only():  # stands in for a small disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    done = command("data.py", "--data", "pets", "--res", 32, preexec_fn=small_files_only)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr
    assert list(Path("data/cache").iterdir()) == [] and not Path("out/pets-32/data.png").exists()


@parametrize("place", ["img_align_celeba.zip", "celeba/img_align_celeba", "celeba_hq_256"])
def test_celeba_is_found_in_its_usual_shapes_with_its_attributes(place):
    make_pictures(Path("img_align_celeba"), 3, size=(178, 218))
    place = Path("data", place)
    if place.suffix:
        zip_folder(Path("img_align_celeba"), place)
    else:
        shutil.copytree("img_align_celeba", place)
    rows = "3\nSmiling Bald\n000000.jpg 1 -1\n000001.jpg  -1 -1\n000002.jpg  1  1\n"
    (place.parent / "list_attr_celeba.txt").write_text(rows)
    images, labels, names, _ = data.load("celeba", "data", 16)
    assert images.shape == (3, 16, 16, 3)
    assert names == ["Smiling", "Bald"] and labels.tolist() == [[1, 0], [0, 0], [1, 1]]


@parametrize("table", ["", "nonsense", "5\n\n000001.jpg", "5\nSmiling Male\n000001.jpg 1 1\n"])
def test_an_attribute_table_that_lacks_pictures_is_refused(table, capsys):
    make_pictures(Path("data/img_align_celeba"), 5)
    Path("data/list_attr_celeba.txt").write_text(table)
    load_refused(capsys, "celeba", "list_attr_celeba.txt", "000000.jpg", "whole file")


def test_attributes_are_learnt_in_the_order_asked_for():
    images, labels, names = np.zeros(2), np.array([[1, 0, 0], [0, 1, 0]]), ["smiling", "hat", "beard"]
    _, chosen, learnt = data.choose_labels(images, labels, names, "hat, smiling")
    assert learnt == ["hat", "smiling"] and chosen.tolist() == [[0, 1], [1, 0]]
    assert data.choose_labels(images, labels, names, "all") == (images, labels, names)
    assert data.choose_labels(images, labels, names, "")[1].tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------------------------
# data.py: what a folder or zip holds, and what its pictures are called

PICTURE = functools.cache(lambda shade=0: encoded(Image.new("L", (8, 8), shade), "PNG"))


def make_dataset(files, zipped, separator="/"):
    """A folder or zip of the given files, {name: content or the shade of a picture}; returns its name."""
    contents = {name: PICTURE(file) if isinstance(file, int) else file for name, file in files.items()}
    if zipped:
        with zipfile.ZipFile("pets.zip", "w") as archive:
            for name, content in contents.items():
                entry = zipfile.ZipInfo()
                entry.filename = name.replace("/", separator)
                archive.writestr(entry, content)
        return "pets.zip"
    for name, content in contents.items():
        file = Path("pets", name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return "pets"


in_both = parametrize("zipped", [False, True], ids=["folder", "zip"])


@in_both
@parametrize("hidden", [".a.png", ".git/a.png", "cat/.thumbnails/a.png", "@eaDir/a.png", "__MACOSX/cat/._a.png",
                        "$RECYCLE.BIN/a.png", "cat/Thumbs.db", "cat/.DS_Store"])
def test_what_a_system_hides_is_neither_picture_nor_class(hidden, zipped, capsys):
    name = make_dataset({"cat/a.png": 0, "dog/b.png": 255, hidden: 9}, zipped)
    images, _, names, _ = data.load(name, "data", 8)
    assert len(images) == 2 and names == ["cat", "dog"] and "left out" not in capsys.readouterr().out


@in_both
def test_what_is_no_picture_is_counted_by_its_ending(zipped, capsys):
    others = {"a.txt": b"", "b.TXT": b"", "cat/c.mp4": b"", "README": b""}
    assert len(data.load(make_dataset({"a.png": 0, **others}, zipped), "data", 8)[0]) == 1
    assert "left out: 2 .txt, 1 without an ending, 1 .mp4" in capsys.readouterr().out


@needs_unix
def test_links_are_followed_but_not_in_circles(capsys):
    make_dataset({"cat/a.png": 0}, zipped=False)
    write(Path("elsewhere"), {"b.png": PICTURE(255)})
    for link, target in (("pets/dog", "elsewhere"), ("pets/cat/c.png", "elsewhere/b.png"), ("pets/cat/circle", "pets"),
                         ("elsewhere/back", "elsewhere"), ("pets/gone.png", "nowhere")):
        Path(link).symlink_to(Path(target).absolute())
    images, labels, names, _ = data.load("pets", "data", 8)
    assert names == ["cat", "dog"] and labels.tolist() == [0, 0, 1] and images[:, 0, 0, 0].tolist() == [0, 255, 255]
    said = capsys.readouterr().out
    assert "pets/cat/circle, a link to a folder that holds it" in said and "pets/dog/back, a link to a folder" in said
    assert "pets/gone.png, a link to nothing" in said


def test_a_zip_from_windows_has_folders_and_one_with_two_equal_names_is_refused(capsys):
    _, labels, names, _ = data.load(make_dataset({"cat/a.png": 0, "dog/b.png": 255}, True, "\\"), "data", 8)
    assert names == ["cat", "dog"] and labels.tolist() == [0, 1]
    with zipfile.ZipFile("pets.zip", "a") as archive:
        archive.writestr("dog/b.png", PICTURE(9))
    load_refused(capsys, "pets.zip", "dog/b.png twice", "unpack")


STYLEGAN = b'{"labels": [["0/a.png", 3], ["0/b.png", 1], ["1/c.png", 3]]}'
CSV = b"\xef\xbb\xbffile_name,label\na.png,dog\nb.png,cat\n"  # with the mark that Excel puts first
JSONL = b'{"file_name": "a.png", "label": "dog"}\n{"file_name": "b.png", "label": "cat"}\n'
CAT_DOG, A_B = {"cat/a.png": 0, "dog/b.png": 1}, {"a.png": 0, "b.png": 1}


@in_both
@parametrize("files,names,labels,words", [
    (CAT_DOG, ["cat", "dog"], [0, 1], "2 classes from sub-folders"),
    ({"top/cat/a.png": 0, "top/dog/b.png": 1}, ["cat", "dog"], [0, 1], "2 classes"),  # a zip of the folder top
    ({**CAT_DOG, "c.png": 2}, ["cat", "dog"], [0, 1, -1], "1 pictures have no class; --cond leaves"),
    (A_B, [], [-1, -1], ""),
    ({**CAT_DOG, "ant/c.png": b"broken"}, ["cat", "dog"], [0, 1], "no class ant"),
    # StyleGAN's and EDM's table, where folders are only shards; or something else of its name
    ({"0/a.png": 0, "0/b.png": 1, "1/c.png": 2, "dataset.json": STYLEGAN}, ["1", "3"], [1, 0, 1], "from dataset.json"),
    ({"x/0/a.png": 0, "x/0/b.png": 1, "x/dataset.json": STYLEGAN}, ["1", "3"], [1, 0], "from x/dataset.json"),
    ({"0/a.png": 0, "1/b.png": 1, "dataset.json": b'{"labels": null}'}, [], [-1, -1], "says that there are no classes"),
    ({**CAT_DOG, "dataset.json": b'{"name": "pets"}'}, ["cat", "dog"], [0, 1], "dataset.json was seen and ignored"),
    ({**CAT_DOG, "dataset.json": b"no JSON"}, ["cat", "dog"], [0, 1], "dataset.json was seen and ignored"),
    # Hugging Face's tables
    ({**A_B, "metadata.csv": CSV}, ["cat", "dog"], [1, 0], "from metadata.csv"),
    ({**A_B, "metadata.jsonl": JSONL}, ["cat", "dog"], [1, 0], "from metadata.jsonl"),
    ({**A_B, "metadata.csv": b"file_name,text\na.png,a dog\n"}, [], [-1, -1], "metadata.csv was seen and ignored"),
    ({**CAT_DOG, "metadata.csv": CSV}, ["cat", "dog"], [0, 1], "no picture has one of the names"),
    ({**CAT_DOG, "metadata.csv": b"file_name,label\n"}, ["cat", "dog"], [0, 1], "it is empty"),
    ({**A_B, "metadata.csv": CSV, "dataset.json": STYLEGAN}, ["cat", "dog"], [1, 0], "from metadata.csv"),
    ({**A_B, "metadata.csv": CSV, "metadata.jsonl": JSONL}, ["cat", "dog"], [1, 0], "metadata.csv does so already"),
    ({**A_B, "metadata.csv": CSV + b"a.png,cow\n"}, [], [-1, -1], "a.png has several labels"),
    ({**CAT_DOG, "cat/metadata.csv": CSV}, ["cat", "dog"], [0, 1], "does not lie above all pictures"),
])
def test_classes_are_sub_folders_or_what_a_table_says(files, names, labels, words, zipped, capsys):
    images, got, got_names, _ = data.load(make_dataset(files, zipped), "data", 8)
    assert (got_names, got.tolist()) == (names, labels) and words in capsys.readouterr().out
    assert sorted(images[:, 0, 0, 0]) == sorted(shade for shade in files.values() if isinstance(shade, int))


def test_pictures_without_a_class_are_left_out_when_classes_are_learnt():
    dataset = data.load(make_dataset({"a.png": 1, "cat/b.png": 2, "dog/c.png": 3}, zipped=False), "data", 8)[:3]
    images, labels, names = data.choose_labels(*dataset, "all")
    assert images[:, 0, 0, 0].tolist() == [2, 3] and labels.tolist() == [0, 1] and names == ["cat", "dog"]
    assert len(data.choose_labels(*dataset, "")[0]) == 3


# ---------------------------------------------------------------------------------------------------------------
# data.py: which dataset it is


def test_a_dataset_is_one_however_its_path_is_spelt_and_wherever_it_lies(capsys):
    make_dataset({"cat/a.png": 0, "dog/b.png": 255}, zipped=False)
    assert packs(capsys, "pets")
    digest = data.load("pets", "data", 16)[3]
    for name in ("pets/", "./pets", "../" + Path.cwd().name + "/pets", str(Path("pets").absolute())):
        assert not packs(capsys, name) and data.run_folder(name, 16) == Path("out/pets-16")
    shutil.move("pets", "there/pets")
    assert packs(capsys, "there/pets") and data.load("there/pets", "data", 16)[3] == digest
    digests = []
    for shade in (0, 9):  # two of the same size, and of the same date, as in archives that give all files one
        Path("there/pets/cat/a.png").write_bytes(encoded(Image.new("L", (8, 8), shade), "BMP"))
        os.utime("there/pets/cat/a.png", (0, 0))
        digests.append(data.load("there/pets", "data", 16)[3])
    assert digests[0] != digests[1]


@parametrize("damage", ["one picture short", "empty", "no labels"])
def test_a_damaged_pack_is_refused_with_a_command_that_helps(damage, capsys):
    make_pictures(Path("pets"), 3)
    data.load("pets", "data", 16)
    (pack,) = Path("data/cache").glob("*.images")
    if damage == "no labels":
        pack.with_suffix(".npz").unlink()
    else:
        os.truncate(pack, pack.stat().st_size - 16 * 16 * 3 if damage == "one picture short" else 0)
    line = refused(capsys, lambda: data.load("pets", "data", 16), "damaged", "rm -- ")
    make_pictures(Path("cats"), 3)
    assert len(data.load("cats", "data", 16)[0]) == 3
    subprocess.run(line.split("anew: ")[1], shell=True, check=True)
    assert len(data.load("pets", "data", 16)[0]) == 3


def test_a_folder_called_like_a_dataset_is_not_shadowed_silently(capsys):
    for name in ("moons", "faces"):
        make_pictures(Path(name), 3)
        data.load(name, "data", 16)
        assert f"your own {name} in this folder: --data ./{name}" in capsys.readouterr().out
        assert len(data.load(f"./{name}", "data", 16)[0]) == 3


def test_packs_of_data_that_has_gone_or_changed_are_named_with_a_command_that_deletes_them(capsys):
    for name in ("old pets", "pets"):
        make_pictures(Path(name), 3)
        data.load(name, "data", 16)
    assert "to delete" not in capsys.readouterr().out
    shutil.rmtree("old pets")
    make_pictures(Path("pets"), 4)
    data.load("pets", "data", 16)
    said = capsys.readouterr().out
    assert len(list(Path("data/cache").glob("*.images"))) == 3 and "or has changed, 0.0 MB" in said
    subprocess.run(said.split("to delete them: ")[1], shell=True, check=True)
    assert len(list(Path("data/cache").glob("*.images"))) == 1
    assert {file.suffix for file in Path("data/cache").iterdir()} == {".images", ".npz", ".txt"}
    assert not packs(capsys, "pets")


def test_packs_go_to_the_present_folder_if_root_cannot_be_written(capsys):
    Path("shared").mkdir()
    Path("shared/cache").write_text("in the way, as a read-only disk would be")
    make_pictures(Path("shared/img_align_celeba"), 3)
    assert len(data.load("celeba", "shared", 16)[0]) == 3
    assert len(list(Path("data/cache").glob("celeba-16-*.images"))) == 1
    assert "packing" in capsys.readouterr().out
    data.load("celeba", "shared", 16)
    assert "packing" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# data.py: points and faces

turn = np.arange(1, 65) / 64
half_circle, spiral = 3 * np.exp(1j * np.pi * turn), 4 * np.sqrt(turn) * np.exp(3j * np.pi * np.sqrt(turn))
fields = [-3 - 3j, -3 + 1j, -1 - 1j, -1 + 3j, 1 - 3j, 1 + 1j, 3 - 1j, 3 + 3j]


@parametrize("name,centres,reach", [
    ("moons", [*(half_circle - 1 - 1j), *(half_circle.conj() + 2 + 0.5j)], 0.7), ("spirals", [*spiral, *-spiral], 0.6),
    ("8gaussians", 4 * np.exp(1j * np.pi / 4 * np.arange(8)), 1.3), ("checkerboard", fields, 1)])
def test_points_fill_their_shape_and_nothing_else(name, centres, reach):
    """The shape as some of its points, with y as the imaginary part: all drawn points lie near one, and all are hit."""
    p = data.points(name, 4000, seed=0)
    assert p.shape == (4000, 2) and torch.equal(p, data.points(name, 4000, seed=0))
    centres = torch.view_as_real(torch.tensor(centres)).float()
    distance, nearest = torch.cdist(p, centres, p=math.inf).min(1)
    assert (distance <= reach).float().mean() > 0.999
    assert nearest.bincount(minlength=len(centres)).min() > 1000 / len(centres)


def test_a_buried_plane_is_found_again_and_lies_at_the_same_angle_each_time():
    p = torch.randn(100, 2)
    z = data.bury(p, 512)
    assert z.shape == (100, 512) and torch.equal(z, data.bury(p, 512))
    assert_close(data.dig(z), p)
    assert_close(z @ z.T, p @ p.T)  # lengths and angles are the same
    assert (z.std(0) > 0).all()  # all axes take part
    assert torch.equal(data.bury(p, 2), p)


def test_a_face_depends_on_its_index_alone_and_looks_alike_at_every_resolution():
    images, labels, _, _ = data.load("faces", "data", 64)  # drawn in several pieces
    assert len(images) == 60
    for i in (5, 59):
        image, label = data.draw_faces([i], 64)
        assert (images[i] == image).all() and (labels[i] == label).all()
        small, small_label = data.draw_faces([i], 16)
        shrunk = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 6 and (label == small_label).all()


def test_fewer_faces_are_drawn_if_they_are_large(monkeypatch):
    monkeypatch.setattr(data, "FACES", 20_000)
    count = {res: data.find_dataset("faces", Path("data"), res)[3] for res in (32, 64, 256, 512)}
    assert count == {32: 20_000, 64: 20_000, 256: 2048, 512: 512}


@parametrize("name,row,column", [
    ("smiling", 23, 19), ("open_mouth", 25, 15), ("glasses", 16, 16), ("hat", 3, 16), ("beard", 24, 4),
    ("long_hair", 27, 26), ("curly_hair", 16, 1), ("blond", 6, 16)])
def test_an_attribute_shows_where_its_name_says(name, row, column):
    """Faces with it and faces without it differ at this one of 32 x 32 pixels as much as anywhere."""
    pixels, labels = data.draw_faces(range(400), 32)
    assert len(np.unique(pixels.reshape(400, -1), axis=0)) == 400  # all faces differ
    grey, has = pixels.mean(3), labels[:, data.FACE_ATTRIBUTES.index(name)] == 1
    a, b = grey[has], grey[~has]
    gap = np.abs(a.mean(0) - b.mean(0)) / (a.std(0) + b.std(0) + 1)
    assert gap[row, column] > 0.8 * gap.max() and min(len(a), len(b)) > 20


# ---------------------------------------------------------------------------------------------------------------
# data.py: pictures in. A corpus of small files, each of its own kind


def encoded(im, kind, **how):
    """The bytes of a picture file."""
    file = io.BytesIO()
    im.save(file, kind, **how)
    return file.getvalue()


def halves(left, right, mode="RGB", size=(16, 16)):
    """A picture of two colours, side by side."""
    im = Image.new(mode, size, right)
    im.paste(left, (0, 0, size[0] // 2, size[1]))
    return im


def png(colour_type, bits, left, right, size=16, **chunks):
    """A PNG of two colours, written byte by byte from the published description of the format. left, right: tuples of
    samples. size: as the file says; it always holds 16 x 16 pixels. chunks: what to put before the pixels, with a wrong
    checksum if the name ends in _."""
    def chunk(name, content):
        checksum = zlib.crc32(name[:4].encode() + content) ^ (len(name) > 4)
        return struct.pack(">I", len(content)) + name[:4].encode() + content + struct.pack(">I", checksum)

    if bits < 8:
        samples = left * 8 + right * 8
        row = np.packbits(np.unpackbits(np.uint8(samples)[:, None], axis=1)[:, -bits:]).tobytes()
    else:
        row = np.array([left] * 8 + [right] * 8, f">u{bits // 8}").tobytes()
    before = [chunk("IHDR", struct.pack(">IIBBBBB", size, size, bits, colour_type, 0, 0, 0))]
    before += [chunk(name, content) for name, content in chunks.items()]
    pixels = chunk("IDAT", zlib.compress(b"".join([b"\0" + row] * 16)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(before) + pixels + chunk("IEND", b"")


def tiff(bits, left, right, photometric=1, sample_format=1):
    """A grey TIFF of two values, little-endian, in one strip, without compression."""
    if bits == 12:
        pairs = [(left, left)] * 4 + [(right, right)] * 4
        row = b"".join(((a << 12) + b).to_bytes(3, "big") for a, b in pairs)
    else:
        row = np.array([left] * 8 + [right] * 8, {1: "<u", 2: "<i", 3: "<f"}[sample_format] + str(bits // 8)).tobytes()
    tags = {256: 16, 257: 16, 258: bits, 259: 1, 262: photometric, 273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: 16,
            279: 16 * len(row), 339: sample_format}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + row * 16


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def swapped_profile():
    """sRGB's profile under another name, with the primaries red and green in each other's place: red looks green."""
    profile = bytearray(SRGB.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


# sRGB's profile with all its curves straight, and still called sRGB, as some programs do.
LINEAR = re.sub(rb"para.{12}", lambda curve: b"para" + bytes(8) + struct.pack(">i", 65536), SRGB, flags=re.DOTALL)


def grey_ink_profile():
    """A CMYK profile under which magenta looks middle grey, L = 50 (in sRGB, 119), and cyan and yellow do not show:
    header, table of tags, and a table with two nodes for each ink."""
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += bytes(range(256)) * 4
    for _, magenta, _, black in itertools.product([0, 1], repeat=4):
        table += bytes([0 if black else 128 if magenta else 255, 128, 128])
    table += bytes(range(256)) * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    words = b"desc" + bytes(4) + struct.pack(">I", 5) + b"grey\0" + bytes(79)
    contents, tags, at = [words, white, table], b"", 128 + 4 + 3 * 12
    for name, content in zip((b"desc", b"wtpt", b"A2B0"), contents):
        tags += name + struct.pack(">II", at, len(content))
        at += len(content)
    header = struct.pack(">I4sI", at, b"lcms", 0x02100000) + b"prtrCMYKLab " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", 3) + tags + b"".join(contents)


def exif(orientation):
    about = Image.Exif()
    about[ExifTags.Base.Orientation] = orientation
    return about


RED, GREEN, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3, (128,) * 3
red_blue = halves(RED, BLUE)
palette = dict(PLTE=bytes([*RED, *BLUE]))

# name of the file: (its bytes, what the left and the right half must look like, what is said of it); no colours where
# it must be skipped.
CORPUS = {
    # 8 bits and fewer
    "rgb.png": (png(2, 8, RED, BLUE), RED, BLUE, ""),
    "grey.png": (png(0, 8, (0,), (128,)), BLACK, GREY, ""),
    "bits1.png": (png(0, 1, (0,), (1,)), BLACK, WHITE, ""),
    "bits2.png": (png(0, 2, (1,), (3,)), (85,) * 3, WHITE, ""),
    "palette.png": (png(3, 8, (0,), (1,), **palette), RED, BLUE, ""),
    # transparency turns white: an alpha channel, a palette's, a transparent colour
    "rgba.png": (png(6, 8, (*RED, 255), (*BLUE, 0)), RED, WHITE, "transparency turned white"),
    "half.png": (png(6, 8, (*RED, 255), (*BLACK, 127)), RED, GREY, "transparency turned white"),
    "grey-alpha.png": (png(4, 8, (128, 255), (0, 0)), GREY, WHITE, "transparency turned white"),
    "opaque.png": (png(6, 8, (*RED, 255), (*BLUE, 255)), RED, BLUE, ""),
    "palette-alpha.png": (png(3, 8, (0,), (1,), **palette, tRNS=b"\xff\0"), RED, WHITE, "transparency turned white"),
    "grey-colour.png": (png(0, 8, (0,), (128,), tRNS=b"\0\0"), WHITE, GREY, "transparency turned white"),
    "bits1-colour.png": (png(0, 1, (0,), (1,), tRNS=b"\0\0"), WHITE, WHITE, "transparency turned white"),
    "rgb-colour.png": (png(2, 8, RED, BLUE, tRNS=struct.pack(">3H", *BLUE)), RED, WHITE, "transparency turned white"),
    "clear.gif": (encoded(halves(0, 1, "P"), "GIF", transparency=0), WHITE, None, "transparency turned white"),
    # 16 bits and others
    "deep-grey.png": (png(0, 16, (0,), (32896,)), BLACK, GREY, ""),
    "deep-grey-colour.png": (png(0, 16, (300,), (32896,), tRNS=struct.pack(">H", 300)), WHITE, GREY,
                             "transparency turned white"),
    "deep-grey-opaque.png": (png(0, 16, (1028,), (32896,), tRNS=b"\xff\xff"), (4,) * 3, GREY, ""),
    "deep-grey-alpha.png": (png(4, 16, (32896, 65535), (0, 0)), GREY, WHITE, "transparency turned white"),
    "deep-rgb.png": (png(2, 16, (65535, 0, 0), (0, 0, 32896)), RED, (0, 0, 128), ""),
    "deep-rgb-colour.png": (png(2, 16, (4736, 0, 0), (32786, 0, 0), tRNS=struct.pack(">3H", 32786, 0, 0)), (18, 0, 0),
                            WHITE, "transparency turned white"),
    "deep-rgba.png": (png(6, 16, (65535, 0, 0, 65535), (0, 0, 0, 0)), RED, WHITE, "transparency turned white"),
    "deep-dark.png": (png(0, 16, (0,), (4095,)), BLACK, (16,) * 3, ""),
    "deep-night.png": (png(0, 16, (0,), (2570,)), BLACK, (10,) * 3, "nearly black"),
    "deep.pgm": (b"P5 16 16 1023\n" + np.array(([0] * 8 + [1023] * 8) * 16, ">u2").tobytes(), BLACK, WHITE, ""),
    "deep.tif": (tiff(16, 0, 32896), BLACK, GREY, ""),
    "negative.tif": (tiff(16, 0, 32639, photometric=0), WHITE, GREY, ""),
    "bits12.tif": (tiff(12, 0, 4095), BLACK, WHITE, ""),
    "integers.tif": (tiff(32, 0, 10**6, sample_format=2), None, None, "no agreed black and white"),
    "floats.tif": (tiff(32, 0, 1, sample_format=3), None, None, "no agreed black and white"),
    # colours
    "profile.png": (encoded(red_blue, "PNG", icc_profile=swapped_profile()), GREEN, BLUE, "colours converted to sRGB"),
    "linear.png": (encoded(halves(GREY, WHITE), "PNG", icc_profile=LINEAR), (188,) * 3, WHITE, "converted to sRGB"),
    "profile-and-bad-text.png": (png(2, 8, RED, BLUE, iCCP=b"a\0\0" + zlib.compress(swapped_profile()), tEXt_=b"a\0b"),
                                 GREEN, BLUE, "colours converted to sRGB"),
    "srgb.png": (encoded(red_blue, "PNG", icc_profile=SRGB), RED, BLUE, ""),
    "broken-profile.png": (encoded(red_blue, "PNG", icc_profile=b"no profile"), RED, BLUE, ""),
    "other-profile.png": (encoded(halves(0, 128, "L"), "PNG", icc_profile=swapped_profile()), BLACK, GREY, ""),
    "profile-alpha.png": (encoded(halves((*RED, 255), (*RED, 0), "RGBA"), "PNG", icc_profile=swapped_profile()), GREEN,
                          WHITE, "colours converted to sRGB"),
    "cmyk.tif": (encoded(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK"), "TIFF"), RED, BLACK, ""),
    "cmyk-profile.tif": (encoded(halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK"), "TIFF",
                                 icc_profile=grey_ink_profile()), (119,) * 3, BLACK, "colours converted to sRGB"),
    # shape
    "wide.png": (encoded(ImageOps.expand(red_blue, (20, 0), "white"), "PNG"), RED, BLUE, "cropped to the centre"),
    "tall.png": (encoded(ImageOps.expand(red_blue, (0, 20), "white"), "PNG"), RED, BLUE, "cropped to the centre"),
    "large.png": (encoded(red_blue.resize((64, 64)), "PNG"), RED, BLUE, "resized to 16x16"),
    "small.png": (encoded(halves(RED, BLUE, size=(2, 2)), "PNG"), RED, BLUE, "enlarged to 16x16"),
    "turned.png": (encoded(red_blue.rotate(90), "PNG", exif=exif(6)), RED, BLUE, "turned upright"),
    "mirrored.png": (encoded(ImageOps.mirror(red_blue), "PNG", exif=exif(2)), RED, BLUE, "turned upright"),
    "turned-alpha.png": (encoded(halves((*RED, 255), (*RED, 0), "RGBA").rotate(90), "PNG", exif=exif(6)), RED, WHITE,
                         "turned upright"),
    # damaged metadata around sound pixels, and damaged pixels
    "text.png": (png(2, 8, RED, BLUE, tEXt_=b"a\0b"), RED, BLUE, ""),
    "bomb-text.png": (png(2, 8, RED, BLUE, zTXt=b"a\0\0" + zlib.compress(bytes(10**8))), RED, BLUE, ""),
    "no-end.png": (png(2, 8, RED, BLUE)[:-6], RED, BLUE, ""),
    "damaged-exif.png": (png(2, 8, RED, BLUE, eXIf=b"II*\0\xff\xff\xff\xff"), RED, BLUE, ""),
    "damaged.png": (png(2, 8, RED, BLUE, IDAT=b"nonsense"), None, None, "damaged.png"),
    "cut.jpg": (encoded(red_blue.resize((99, 99)), "JPEG")[:900], None, None, "truncated"),
    "words.png": (b"no picture", None, None, "cannot identify"),
    "empty.png": (b"", None, None, "cannot identify"),
    "huge.png": (png(2, 8, RED, BLUE, size=10**5), None, None, "DecompressionBombError"),
    # several frames
    "film.gif": (encoded(red_blue, "GIF", save_all=True, append_images=[halves(GREEN, GREEN)]), RED, BLUE,
                 "the first of its frames"),
    "film.webp": (encoded(red_blue, "WEBP", save_all=True, append_images=[halves(GREEN, GREEN)], lossless=True), RED,
                  BLUE, "the first of its frames"),
    # any ending that Pillow reads, in any case
    "upper.PNG": (png(2, 8, RED, BLUE), RED, BLUE, ""),
    **{f"kind.{ending}": (encoded(red_blue, kind), RED, BLUE, "") for ending, kind in {
        "jfif": "JPEG", "jpe": "JPEG", "tiff": "TIFF", "bmp": "BMP", "ppm": "PPM", "tga": "TGA", "jp2": "JPEG2000",
        "apng": "PNG", "dib": "DIB", "pcx": "PCX"}.items()},
}


@parametrize("name", CORPUS)
@parametrize("zipped", [False, True], ids=["folder", "zip"])
def test_every_kind_of_picture_comes_out_right_or_is_named(name, zipped, capsys):
    content, left, right, words = CORPUS[name]
    write(Path("pets"), {name: content, "zz.png": png(2, 8, WHITE, WHITE)})
    if zipped:
        zip_folder(Path("pets"), Path("pets.zip"))
    images, _, _, _ = data.load("pets.zip" if zipped else "pets", "data", 16)
    said = capsys.readouterr().out
    assert words in said
    skipped = left is None
    assert len(images) == 2 - skipped and ("skipped 1 of 2" in said) == skipped
    if skipped:
        listed, = Path("data/cache").glob("*.skipped.txt")
        assert name in listed.read_text() and str(listed) in said
    for colour, columns in ((left, slice(0, 4)), (right, slice(12, 16))):
        if colour:
            assert_allclose(images[0, :, columns], np.broadcast_to(colour, (16, 4, 3)), atol=8)


def test_shrinking_takes_every_pixel_into_account_and_loses_no_detail():
    narrow = np.tile(np.uint8([255, 0]), (256, 128))
    Image.fromarray(narrow).save("narrow.png")
    assert_allclose(data.read_picture(Path("narrow.png").read_bytes(), 16)[0], 128, atol=4)
    wide = np.tile(np.uint8([255, 255, 0, 0]), (64, 16))
    Image.fromarray(wide).save("wide.jpg", quality=95)
    assert_allclose(data.read_picture(Path("wide.jpg").read_bytes(), 32)[0][..., 0], wide[:32, ::2][:, :32], atol=60)


# ---------------------------------------------------------------------------------------------------------------
# data.py: pictures out


def test_a_grid_is_read_like_a_page():
    shades = np.arange(0, 240, 40, dtype=np.uint8)
    sheet = data.grid(np.broadcast_to(shades[:, None, None, None], (6, 72, 72, 1)), columns=3)
    assert [sheet.getpixel((40 + 76 * (i % 3), 40 + 76 * (i // 3))) for i in range(6)] == shades.tolist()


def test_lines_end_in_dots_with_y_upwards_and_those_outside_are_left_out():
    lines = np.array([[[-4.0, 3.0], [4.0, 3.0]], [[0, 0], [99, 0]], [[0, 0], [np.inf, np.nan]]])
    for picture, middle in ((data.trails(lines), False), (data.scatter(lines[:, 1]), True)):
        red, _, blue = picture.getpixel((400, 120))  # the middle is (240, 240), and 40 pixels are 1
        assert blue > red + 20
        assert (picture.getpixel((240, 120)) == (255, 255, 255)) == middle
        assert np.array(picture)[130:].min() == 255


def test_a_plot_has_a_logarithmic_axis():
    """Exponential decay is a straight line, from the upper left to the lower right through the middle of the axes."""
    plot = data.plot({"loss": (np.arange(101), 10.0 ** -np.arange(101))}, "step")
    for place in ((382, 197), (221, 108), (543, 286)):
        assert plot.getpixel(place)[0] < 128


def test_a_plot_may_have_two_logarithmic_axes_or_none():
    """A power law is a straight line on two, and so is a straight line on none."""
    for x, y, axes in ((2.0 ** np.arange(9), 4.0 ** -np.arange(9), "xy"), (np.arange(9), -np.arange(9), "")):
        plot = data.plot({"error": (x, y)}, "steps", axes)
        for place in ((382, 197), (221, 108), (543, 286)):
            assert plot.getpixel(place)[0] < 128


def test_a_picture_that_cannot_be_saved_whole_leaves_the_old_one(tmp_path):
    data.save_whole(Image.new("L", (8, 8), 7), tmp_path / "x.png")
    with pytest.raises(OSError):
        data.save_whole(Image.new("F", (8, 8)), tmp_path / "x.png")  # PNG has no floats
    assert Image.open(tmp_path / "x.png").getpixel((0, 0)) == 7


def test_panels_stand_in_rows_each_below_its_title():
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    sheet = data.panels({name: Image.new("RGB", (60, 40), colour) for name, colour in colours.items()}, columns=2)
    assert sheet.size == (120, 140)
    for colour, place in zip(colours.values(), ((30, 50), (90, 50), (30, 120))):
        assert sheet.getpixel(place) == colour
    assert np.asarray(sheet)[:30, :60].min() < 128 and np.asarray(sheet)[70:, 60:].min() == 255


def test_a_gif_loops_for_ever_and_holds_its_last_frame():
    data.save_gif("a.gif", [Image.new("L", (8, 8), 50 * i) for i in range(5)])
    with Image.open("a.gif") as gif:
        assert gif.n_frames == 5 and gif.info["loop"] == 0
        gif.seek(4)
        assert gif.info["duration"] == 1500


@parametrize("name,place", [("elsewhere/pets.zip", "out/pets-16"), ("spirals", "out/spirals")])
def test_a_sheet_of_a_dataset_is_drawn(name, place):
    make_pictures(Path("pets"), 30)
    zip_folder(Path("pets"), Path("elsewhere/pets.zip"))
    data.main(["--data", name, "--res", "16"])
    assert np.array(Image.open(f"{place}/data.png")).std() > 5


# ---------------------------------------------------------------------------------------------------------------
# data.py: official files, here tiny, written byte by byte from the published descriptions of the formats

IDX = "train-images-idx3-ubyte train-labels-idx1-ubyte t10k-images-idx3-ubyte t10k-labels-idx1-ubyte".split()
BINARY = "data_batch_1.bin data_batch_2.bin data_batch_3.bin data_batch_4.bin data_batch_5.bin test_batch.bin".split()


def idx(*sizes, content=None):
    """MNIST's format. Without content all values are 0."""
    content = bytes(math.prod(sizes)) if content is None else bytes(content)
    return b"\0\0\x08" + bytes([len(sizes)]) + np.array(sizes, ">u4").tobytes() + content


def official(name):
    """The unpacked files {name: bytes}, and what is in them: pictures (18, H, W, C) and labels."""
    size = (32, 32, 3) if name == "cifar10" else (28, 28, 1)
    pictures = np.random.default_rng(len(name)).integers(0, 256, (18, *size), np.uint8)
    labels = [i % 10 for i in range(18)]
    if name == "cifar10":
        rows = [bytes([label]) + picture.transpose(2, 0, 1).tobytes() for picture, label in zip(pictures, labels)]
        return {file: b"".join(rows[3 * i:3 * i + 3]) for i, file in enumerate(BINARY)}, pictures, labels
    contents = (idx(12, 28, 28, content=pictures[:12].tobytes()), idx(12, content=labels[:12]),
                idx(6, 28, 28, content=pictures[12:].tobytes()), idx(6, content=labels[12:]))
    return dict(zip(IDX, contents)), pictures, labels


def published(name):
    """What would be on offer, {name: bytes}: CIFAR-10 in a folder, in an order of its own, among other files."""
    files, _, _ = official(name)
    if name != "cifar10":
        return {f"{file}.gz": gzip.compress(content, mtime=0) for file, content in files.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for file in ["readme.html", *reversed(BINARY)]:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{file}")
            entry.size = len(files.get(file, b"hello"))
            archive.addfile(entry, io.BytesIO(files.get(file, b"hello")))
    return {"cifar-10-binary.tar.gz": gzip.compress(buffer.getvalue(), mtime=0)}


def unpacked(name):
    return official(name)[0]


every_offer = parametrize("offer", [published, unpacked])


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_read(name, res=None):
    _, pictures, labels = official(name)
    if res:
        resized = [Image.fromarray(p.squeeze()).resize((res, res), Image.Resampling.LANCZOS) for p in pictures]
        pictures = np.stack(resized).reshape(18, res, res, -1)
    images, numbers, names, _ = data.load(name, "data", pictures.shape[1])
    assert_array_equal(images, pictures)
    assert numbers.tolist() == labels and len(set(names)) == 10


@parametrize("name", data.OFFICIAL)
@every_offer
@parametrize("folder", ["data/NAME", "data/NAME/cifar-10-batches-bin"])
def test_official_files_are_found_and_read_once(name, offer, folder, monkeypatch):
    write(Path(folder.replace("NAME", name)), offer(name))
    check_read(name)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
    check_read(name)


@parametrize("name,folder,other", [
    ("mnist", "MNIST/raw", "FashionMNIST/raw"),  # torchvision's
    ("fashion", "FashionMNIST/raw", "MNIST/raw"),
    ("cifar10", "cifar-10-batches-bin", "MNIST/raw"),
    ("fashion", "fashion-mnist", "mnist"),  # Debian's
])
def test_official_files_are_found_where_other_programs_put_them(name, folder, other):
    write(Path("data", other), {IDX[0]: b"another dataset's"})
    write(Path("data", folder), unpacked(name))
    check_read(name)
    assert len(data.load(name, f"data/{folder}", data.usual_res(name))[0]) == 18  # root may be that folder itself


def test_official_pictures_are_resized_and_may_lie_in_folders_of_their_own_names(capsys):
    for name in ("mnist", "cifar10"):
        for file, content in official(name)[0].items():
            write(Path("data", name, file), {file: content})
        check_read(name, res=16)
    data.main(["--data", "mnist"])  # at their own size, so that training packs nothing anew
    assert Path("out/mnist-28/data.png").exists()


def test_missing_files_are_named_with_place_source_and_next_step(capsys):
    write(CIFAR.parent, {BINARY[0]: unpacked("cifar10")[BINARY[0]]})
    load_refused(capsys, "cifar10", CIFAR.name, "https://www.cs.toronto.edu/~kriz/", "--download")
    write(CIFAR.parent, published("cifar10"))
    check_read("cifar10")
    write(Path("data/mnist"), published("mnist"))  # MNIST's files, although they are named alike,
    load_refused(capsys, "fashion", "fashion is not there")  # are not taken for Fashion-MNIST's
    Path(f"data/mnist/{IDX[3]}.gz").unlink()
    assert IDX[0] not in load_refused(capsys, "mnist", f"{IDX[3]}.gz", "data/mnist/")


@parametrize("name", ["mnist", "cifar10"])
@every_offer
def test_damaged_official_files_are_refused_by_name(capsys, name, offer):
    folder, files = Path("data", name), offer(name)
    for file, whole in files.items():
        for content in (whole[: len(whole) * 3 // 4], whole[:9], b""):
            write(folder, files | {file: content})
            load_refused(capsys, name, f"{folder / file} ", "--download")
    assert list(folder.parent.rglob("*.images")) == []


@parametrize("number,content", [
    (1, idx(11)), (1, idx(12, 1)), (1, idx(12, content=[10] * 12)), (0, idx(12, 20, 20)), (0, idx(12, 28)),
    (0, idx(12, 28, 28, 3)), (0, idx(12))])
def test_labels_that_do_not_belong_to_the_pictures_are_refused(capsys, number, content):
    write(Path("data/mnist"), official("mnist")[0] | {IDX[number]: content})
    load_refused(capsys, "mnist", str(Path("data/mnist")), "do not belong together")


# ---------------------------------------------------------------------------------------------------------------
# data.py: downloading, from a server on this machine

ROOT, CIFAR = Path("data"), Path("data/cifar10/cifar-10-binary.tar.gz")
PART = CIFAR.with_name(CIFAR.name + ".part")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files, notes the range of each request, and misbehaves as the server's other attributes say."""

    def do_GET(self):
        content, asked = self.server.files.get(self.path), self.headers["Range"]
        self.server.ranges.append(asked)
        if self.path.startswith("/mail"):
            self.wfile.write(b"220 this is a mail server\r\n")
            return
        if content is None:
            self.send_error(404)
            return
        start = int(asked[len("bytes="):-1]) if self.server.honours_range else 0
        if start and start >= len(content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][:self.server.closes_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    it = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
    checksums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    monkeypatch.setitem(data.OFFICIAL[name], "files", checksums)
    monkeypatch.setitem(data.OFFICIAL[name], "url", f"http://127.0.0.1:{server.server_port}/{name}/")
    server.files = {f"/{name}/{file}": content for file, content in files.items()}
    return files


@pytest.fixture
def offered(monkeypatch, server):
    """The tar file of a tiny CIFAR-10, on offer."""
    return publish(monkeypatch, server, "cifar10")[CIFAR.name]


def download_refused(capsys, *words):
    refused(capsys, lambda: data.download("cifar10", ROOT), *words, status=1)


def downloaded(offered):
    return CIFAR.read_bytes() == offered and list(CIFAR.parent.iterdir()) == [CIFAR]


@parametrize("tells_length", [True, False])
@parametrize("name", data.OFFICIAL)
def test_download_fetches_what_is_missing_and_only_that(monkeypatch, server, name, tells_length):
    server.tells_length = tells_length
    files = publish(monkeypatch, server, name)
    first, *rest = files
    for asked in (len(files), 0, 1):
        server.ranges.clear()
        data.download(name, ROOT)
        assert len(server.ranges) == asked
        assert {file.name: file.read_bytes() for file in (ROOT / name).iterdir()} == files
        if not asked:
            (ROOT / name / first).unlink()
    check_read(name)


def test_download_needs_no_server_for_unpacked_files(server, offered):
    write(CIFAR.parent, official("cifar10")[0])
    data.download("cifar10", ROOT)
    assert server.ranges == []


@parametrize("have,more,honours_range", [
    (1, b"", True), (1000, b"", True), (None, b"", True), (1000, b"", False), (None, b"?", False)])
def test_download_goes_on_where_it_stopped_or_starts_over_if_ranges_are_ignored(server, offered, have, more,
                                                                                honours_range):
    server.honours_range, part = honours_range, offered[:have] + more
    write(PART.parent, {PART.name: part})
    data.download("cifar10", ROOT)
    assert server.ranges == [f"bytes={len(part)}-"] and downloaded(offered)


@parametrize("part,sent", [(b"", b"<html>Log in to this network</html>"), (b"?", None)])
def test_a_wrong_checksum_is_refused_and_deleted(capsys, server, offered, part, sent):
    """A page in place of the file, and a part as long as the file that is not the file."""
    server.files = dict.fromkeys(server.files, sent or offered)
    write(PART.parent, {PART.name: part * len(offered)})
    download_refused(capsys, "MD5", CIFAR.name, "deleted", "again")
    assert list(CIFAR.parent.iterdir()) == []


def test_an_interrupted_download_leaves_only_the_part_and_is_completed_later(capsys, server, offered):
    server.closes_after = 1000
    for size in (1000, 2000):
        download_refused(capsys, f"closed after {size:,} of {len(offered):,}", "again",
                "http://127.0.0.1")
        assert list(CIFAR.parent.iterdir()) == [PART] and PART.read_bytes() == offered[:size]
    server.closes_after = None
    data.download("cifar10", ROOT)
    assert server.ranges == ["bytes=0-", "bytes=1000-", "bytes=2000-"] and downloaded(offered)


@parametrize("folder,words", [("gone", "404"), ("mail", "mail server"), (None, "refused")])
def test_unreachable_files_are_refused_in_a_line(capsys, monkeypatch, server, offered, folder, words):
    write(PART.parent, {PART.name: offered[:1000]})
    with socket.socket() as nobody:  # bound, but not listening
        nobody.bind(("127.0.0.1", 0))
        port = server.server_port if folder else nobody.getsockname()[1]
        monkeypatch.setitem(data.OFFICIAL["cifar10"], "url", f"http://127.0.0.1:{port}/{folder}/")
        download_refused(capsys, words, CIFAR.name, "by hand")
    assert PART.read_bytes() == offered[:1000]


# ---------------------------------------------------------------------------------------------------------------
# data.py: plumbing


def test_seeds_differ_where_any_integer_does():
    seeds = {data.seed_from(*integers) for integers in itertools.product(range(4), repeat=3)}
    assert len(seeds) == 64 and 0 <= min(seeds) and max(seeds) < 2**63


def test_failures_that_are_no_mistake_of_the_program_end_it_in_a_line(capsys):
    make_pictures(Path("pets"), 2)
    zip_folder(Path("pets"), Path("pets.zip"))
    Path("pets.zip").write_bytes(Path("pets.zip").read_bytes().replace(b"PK\1\2", b"PK\7\7"))
    damaged_zip = ["--data", "pets.zip"]
    refused(capsys, lambda: data.run(lambda: data.main(damaged_zip)), "pets.zip", "no zip that can be read")
    refused(capsys, lambda: data.run(lambda: torch.empty(2**50)), "; a smaller --batch needs less", status=1)
    with pytest.raises(RuntimeError):  # but this is a mistake of the program
        data.run(torch.nn.Module())


@needs_unix
def test_a_missing_compiler_is_told_in_a_line():
    code = "import data, torch; data.run(lambda: torch.compile(torch.sin)(torch.ones(2)))"
    environment = os.environ | {"PYTHONPATH": str(HERE), "CXX": "/none", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=environment)
    assert "; --no-compile does without" in done.stderr and "Traceback" not in done.stderr


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


# ---------------------------------------------------------------------------------------------------------------
# train.py: a training step. From here on runs are kept tiny, and compared to the bit.

CPU = torch.device("cpu")
FEW_POINTS = 20_000


@pytest.fixture(autouse=True)
def small_runs(monkeypatch):
    """Few points, short previews, and no exact W2, which takes seconds. A process of its own knows nothing of this."""
    monkeypatch.setattr(data, "POINTS_DRAWN", FEW_POINTS)
    monkeypatch.setattr(train, "PREVIEW_STEPS", 2)
    monkeypatch.setattr(train, "HELD_OUT_PICTURES", 20)
    monkeypatch.setattr(train, "wasserstein", lambda ema, config, device: {0: 0.0, 1: 1.0})


def train_moons(flags):
    return train.main([*MOONS, *flags.split()])


def train_faces(flags):
    return train.main(["--res", "16", *TINY, *shlex.split(flags)])


def state(folder, name="ckpt.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def log_of(folder):
    return list(csv.DictReader(Path(folder, "log.csv").read_text().splitlines()))


def equal(a, b):
    """Do nested dicts and lists of tensors and other values agree to the bit?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        a, b = list(a.items()), list(b.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_training(folder, other):
    a, b = state(folder), state(other)
    return all(equal(a[part], b[part]) for part in ("weights", "ema", "optimizers"))


def refuses(capsys, words, run, *args, status=2):
    refused(capsys, functools.partial(run, *args), *words.split(), status=status)


def test_once_the_loop_has_saved_everything_signals_end_the_program_at_once():
    train_moons("--steps 1")
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == data.exit_on_signal


def test_a_batch_follows_from_seed_step_and_rank_and_ranks_share_its_pictures():
    config = train.resolve({"batch": 8, "flip": False})
    images, labels, _, _ = data.load("faces")

    def draw(step, rank, world):
        return train.draw_batch(config, images, labels, step, rank, world, CPU)[:3]

    whole, first, second = draw(5, 0, 1), draw(5, 0, 2), draw(5, 1, 2)
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    assert equal(draw(5, 1, 2), second)
    for other in (first, draw(6, 1, 2)):  # neither the pictures, nor the noise, nor the times
        assert not any(torch.equal(a, b) for a, b in zip(second, other))


def test_shortcuts_take_half_of_a_batch_once_the_cool_down_begins_and_leave_the_rest_of_it_as_it_was():
    images, labels, _, _ = data.load("faces")
    fields = {"batch": 9, "steps": 10, "cooldown": 0.4, "jitter": 0.1}
    without, config = train.resolve(fields), train.resolve({**fields, "shortcut": True})

    def draw(config, step):
        return train.draw_batch(config, images, labels, step, 0, 1, CPU)

    assert equal(draw(config, 5), draw(without, 5)) and draw(config, 5)[-1] is None
    x, e, t, y, jitter, shortcuts = draw(config, 6)
    plain = draw(without, 6)
    assert equal((x, e, t, y, jitter), (*plain[:2], plain[2][:5], plain[3], plain[4][:5]))
    assert [len(part) for part in shortcuts] == [4] * 4
    noisy = train.resolve({**fields, "shortcut": True, "t_mean": -1.0, "batch": 64})  # on the grids of its own samples
    _, middles, _, _ = draw(noisy, 6)[-1]
    grid = torch.tensor(fm.time_grid(32, sample.usual_shift(noisy)))
    assert (middles[:, None] - grid).abs().min(dim=1).values.max() < 1e-6


def test_shortcuts_are_learnt_from_the_averaged_network_and_count_as_much_as_the_flow():
    """The gradient is the mean of the two gradients, and what is reported is the flow's loss."""
    images, labels, _, _ = data.load("moons")
    config = train.resolve({"dataset": "moons", "shortcut": True, "steps": 10, "lr": 0.1, "warmup": 0, "cooldown": 1.0,
                            "clip": 1e9})
    net, ema = small("mlp", shortcut=True), small("mlp", shortcut=True).requires_grad_(False)
    x, e, t, y, _, shortcuts = batch = train.draw_batch(config, images, labels, 0, 0, 1, CPU)
    assert len(x) == 256 and len(t) == 128
    flow = fm.loss(net, x[:128], e[:128], t, predict="v").mean()
    others = fm.shortcut_loss(net, ema, x[128:], e[128:], *shortcuts, predict="v").mean()
    gradient = torch.autograd.grad((flow + others) / 2, list(net.parameters()))
    gradient = torch.cat([part.flatten() for part in gradient])
    before = weights_of(net)
    loss = train.train_step(config, 0, net, ema, [torch.optim.SGD(net.parameters(), lr=1.0)], batch)
    assert_close(weights_of(net), before - train.learning_rate(config, 0) * gradient)
    assert loss.item() == approx(flow.item())


def test_about_half_of_the_pictures_are_mirrored_left_to_right():
    images, labels, _, _ = data.load("faces")
    with_flip, without = train.resolve({"batch": 16}), train.resolve({"batch": 16, "flip": False})
    x, plain = (train.draw_batch(config, images, labels, 0, 0, 1, CPU)[0] for config in (with_flip, without))
    same, mirrored = ((x == other).flatten(1).all(1) for other in (plain, plain.flip(3)))  # (B, C, H, W) each
    assert (same | mirrored).all() and 2 < mirrored.sum() < 14


def test_labels_are_hidden_one_by_one_and_stay_with_their_pictures_under_ot():
    """Only the noise may move: whatever --ot and --drop do, picture and label stay those of the packed arrays."""
    images, labels, _, _ = data.load("faces")

    def draw(**fields):
        config = train.resolve({"batch": 40, "flip": False, "drop": 0.25, **fields})
        return train.draw_batch(config, images, labels, 3, 0, 1, CPU)

    x, e, _, y, *_ = draw(ot=True)
    hidden = (y == model.Labels.HIDDEN).all(1)
    assert 2 < hidden.sum() < 20
    places = (images[:, None] == data.to_uint8(x)).all((2, 3, 4)).argmax(0)  # where each one comes from
    assert_array_equal(y[~hidden], labels[places][~hidden])
    for other in (draw(), draw(ot=True, ot_block=4)):
        assert torch.equal(other[0], x) and torch.equal(other[3], y) and not torch.equal(other[1], e)


def weights_of(net):
    return torch.cat([w.detach().flatten() for w in net.parameters()])


def gradient_step(step=0, **fields):
    """A training step of plain gradient descent on moons, where a weight moves by exactly rate times gradient.
    Returns the weights before and after, the average before and after, and the loss."""
    config = train.resolve({"dataset": "moons", "warmup": 0, "lr": 0.1, **fields})
    images, labels, _, _ = data.load("moons")
    torch.manual_seed(0)
    net, ema = model.build("mlp", width=16), model.build("mlp", width=16)
    optimizer = torch.optim.SGD(net.parameters(), lr=7.0, weight_decay=7.0)  # both to be replaced by the config's
    before, average_before = weights_of(net), weights_of(ema)
    batch = train.draw_batch(config, images, labels, step, 0, 1, CPU)
    loss = train.train_step(config, step, net, ema, [optimizer], batch)
    return before, weights_of(net), average_before, weights_of(ema), float(loss)


def test_gradients_are_clipped_to_the_norm_that_was_asked_for():
    before, after, *_ = gradient_step(clip=0.25)
    assert (after - before).norm() == approx(0.1 * 0.25, rel=1e-4)


def test_weight_decay_shrinks_the_weights_by_rate_times_decay():
    before, after, *_ = gradient_step(clip=1e-9, decay=0.5)
    assert_close(after, before * (1 - 0.1 * 0.5))


@parametrize("step,kept", [(0, 0.1), (2000, 0.75)])
def test_the_average_keeps_little_of_the_first_weights_and_later_as_much_as_ema_says(step, kept):
    _, weights, before, after, _ = gradient_step(step, ema=0.75)
    assert_close(after, kept * before + (1 - kept) * weights)


def test_covering_all_times_leaves_the_mean_loss_as_it_was():
    """The loss counts early times more, and most times are early: without the weights, cover would change it."""
    fields = dict(batch=FEW_POINTS, times="logit-normal", t_mean=-2.0, target="x")
    assert gradient_step(**fields, cover=0.5)[-1] == approx(gradient_step(**fields)[-1], rel=0.02)


def test_muon_gets_the_matrices_inside_the_blocks_and_adamw_the_rest():
    net = model.build("transformer", res=8, patch=4, stride=4, width=32, depth=2, heads=2, labels=3)
    adamw, muon = train.make_optimizers(net, train.resolve({}))
    assert muon.dtype == torch.float32
    matrices = set()
    for block in net.blocks:
        matrices.update(block.attention.parameters(), block.swiglu.parameters())
    assert set(muon.param_groups[0]["params"]) == matrices
    assert set(adamw.param_groups[0]["params"]) == set(net.parameters()) - matrices


@parametrize("shape", [(32, 32), (48, 20), (20, 48)])
def test_muon_moves_along_the_nearest_orthogonal_matrix_as_torchs_does(shape):
    """torch's rounds to bfloat16, which has three digits."""
    stack = torch.randn(2, *shape)
    for g, nearest in zip(stack, train.nearest_orthogonal(stack, rounds=8).float()):
        u, s, vh = torch.linalg.svd(g, full_matrices=False)
        along = u.T @ nearest @ vh.T
        assert_close(along.diag(), torch.ones_like(s), atol=0.35, rtol=0)  # the rounds end between 0.7 and 1.2
        assert (along - along.diag().diag()).abs().max() < 0.05
    shapes = shape, (8, 8), shape  # two go through the rounds together
    start = [torch.randn(shape) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(g.clone()) for g in start] for _ in range(2))
    optimizers = train.Muon(ours, bf16=False), torch.optim.Muon(theirs, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    for optimizer in optimizers:
        optimizer.param_groups[0].update(lr=0.1, weight_decay=0.3)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert_close(a, b, atol=0.004, rtol=0)


def test_the_learning_rate_climbs_stays_and_falls_along_straight_lines():
    config = train.Config(lr=2.0, steps=100, warmup=9, cooldown=0.4)
    rate = [train.learning_rate(config, step) for step in range(100)]
    assert_allclose(rate[:10], np.arange(1, 11) / 5)
    assert_allclose(rate[10:60], 2)
    assert_allclose(rate[60:], 2 * np.arange(40, 0, -1) / 41)


@functools.cache
def average_after(flags):
    return weights_of(train_faces(f"--steps 5 --attention hand {flags}"))


@parametrize("flag", [
    "--predict e", "--target x", "--path cosine", "--times uniform", "--t-mean 0.5", "--ot", "--lr 0.01", "--warmup 0",
    "--cooldown 0", "--decay 0.5", "--clip 0.001", "--seed 1", "--batch 4", "--no-flip", "--norm derf",
    "--attention fused", "--optimizer adamw", "--patch 4", "--stride 8", "--depth 2", "--heads 4",
    "--ema 0.1", "--width 64", "--network unet", "--cond all", "--cond smiling,hat", "--cover 0.5", "--jitter 0.1",
    "--shortcut"])
def test_every_flag_changes_the_training(flag):
    patches = "--patch 8 --stride 4 "
    other = average_after(flag if "unet" in flag else patches + flag)
    assert not torch.equal(other, average_after(patches))


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


@pytest.fixture(scope="module")
def pets_run(tmp_path_factory):
    """The folder of a tiny run by the real command, for many tests to read and to sample from."""
    folder = tmp_path_factory.mktemp("run")
    make_pictures(folder / "pets", 30)
    often = ["--steps", 4, "--preview", 2, "--report", 1, "--no-bf16"]
    done = command("train.py", "--data", "pets", "--res", 16, *TINY, *often, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "ETA" in done.stdout
    assert "so few will be learnt by heart" in done.stdout and "each of 30 samples is seen every 0:00:0" in done.stdout
    return folder / "out/pets-16"


def test_training_leaves_checkpoint_log_curve_and_previews(pets_run):
    assert {file.name for file in pets_run.iterdir()} == {"ckpt.pt", "stable.pt", "log.csv", "loss.png", "samples"}
    assert {file.name for file in (pets_run / "samples").iterdir()} == {"000002.png", "000004.png"}
    rows = log_of(pets_run)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["t9"]) for row in rows] == [False, True, False, True]  # where a preview was drawn, too


def test_the_held_out_loss_is_of_held_out_pictures_in_ten_bins_of_t_from_noise_to_data(monkeypatch):
    """Training pictures are black, held-out ones white, and the network is wrong by t: its loss is t^2."""
    monkeypatch.setattr(train, "HELD_OUT_PICTURES", 200)
    images = np.zeros((40, 8, 8, 3), np.uint8)
    images[data.split(40)[1]] = 255

    def net(z, t, y):
        return (1 + t).view(-1, 1, 1, 1).expand_as(z)

    row = train.held_out(net, train.resolve({"target": "x"}), images, np.zeros(40, np.int64), CPU)
    integral = np.linspace(0, 1, 11) ** 3 / 3
    assert_allclose(list(row.values()), [1 / 3, *10 * np.diff(integral)], atol=1e-4)


def test_the_average_is_what_is_judged_drawn_returned_and_sampled_from():
    returned = train_moons("--steps 5")
    checkpoint = sample.read_checkpoint(Path("out/moons/ckpt.pt"))
    net, config = checkpoint["network"], checkpoint["config"]
    for used in (net, returned):
        assert equal(used.state_dict(), checkpoint["ema"])
    assert not equal(checkpoint["ema"], checkpoint["weights"])
    images, labels, _, _ = data.load("moons")
    assert train.held_out(net, config, images, labels, CPU)["held_out"] == checkpoint["log"][-1]["held_out"]
    drawn = train.preview(net, config, images, labels, CPU, 5)
    assert_array_equal(Image.open("out/moons/samples/000005.png"), drawn)


def test_a_failed_save_leaves_the_old_checkpoint(capsys, monkeypatch):
    train_moons("--steps 4 --cooldown 0")  # without a cool-down nothing else is saved
    before = Path("out/moons/ckpt.pt").read_bytes()

    def fill_the_disk(thing, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    refuses(capsys, "No space left", train_moons, "--steps 8 --resume", status=1)
    assert Path("out/moons/ckpt.pt").read_bytes() == before and not list(Path("out/moons").glob("*.part"))


def test_what_is_not_finite_never_replaces_a_checkpoint(capsys, monkeypatch):
    train_moons("--steps 4 --clip 1e30")
    before = Path("out/moons/ckpt.pt").read_bytes()
    refuses(capsys, "finite --lr", train_moons, "--steps 40 --lr 1e30 --resume", status=1)
    monkeypatch.setattr(train, "held_out", lambda *_: {"held_out": math.inf})
    refuses(capsys, "finite --lr", train_moons, "--steps 8 --resume", status=1)
    assert Path("out/moons/ckpt.pt").read_bytes() == before


WASSERSTEIN, W2 = train.wasserstein, fm.w2


def test_in_a_space_of_many_dimensions_x_prediction_finds_the_plane_and_e_prediction_does_not(capsys):
    """Li & He 2025, figure 2. The noise has 64 numbers, and the network 32; the moons have 2."""
    distances = {}
    for predict in ("x", "e"):
        train_moons(f"--dim 64 --steps 400 --width 32 --batch 256 --predict {predict} --out {predict}")
        z = torch.from_numpy(sampled(predict, "--n 500 --batch 500 --steps 50"))
        assert z.shape == (500, 64)
        distances[predict] = fm.w2(data.dig(z), data.points("moons", 500, seed=9))
    assert distances["x"] < 1.2 and distances["e"] > 3 * distances["x"], distances
    assert sampled("x", "--n 200", to="x.png").width == 480
    refuses(capsys, "--bpd --dim 2", sampled, "x", "--bpd 8")


def test_moons_train_to_moons_and_w2_is_logged(monkeypatch):
    monkeypatch.setattr(train, "wasserstein", WASSERSTEIN)
    monkeypatch.setattr(fm, "w2", lambda a, b: W2(a[:500], b[:500]))  # all 2,048 points take seconds
    train_moons("--steps 600 --width 64 --batch 256 --cooldown 0.5")
    rows = dict(line.split(",") for line in Path("out/moons/w2.csv").read_text().split()[1:])
    assert list(rows) == ["0", "1", "2", "4", "10", "100"]
    assert float(rows["100"]) < 0.8 < float(rows["1"])
    log = log_of("out/moons")
    assert float(log[-1]["loss"]) < float(log[0]["loss"])


# ---------------------------------------------------------------------------------------------------------------
# Presets


def test_the_256_pixel_face_model_has_about_115M_parameters_and_441_tokens():
    config = train.resolve({"dataset": "celeba", "res": 256, "preset": "gpu"})
    with torch.device("meta"):
        net = model.build(**train.network_sizes(config, label_count=0))
    assert sum(w.numel() for w in net.parameters()) == approx(115e6, rel=0.01)
    assert net.position.shape == (441, 768)


@parametrize("size", ["laptop", "gpu"])
def test_presets_fit_every_resolution_with_several_patches_a_side(size):
    for res in (*range(8, 65), 96, 128, 256, 512):
        config = train.resolve({"res": res, "preset": size})
        model.check_stride(res, config.patch, config.stride)
        assert (res - config.patch) // config.stride + 1 >= 4, res
        if res == 32:
            assert config.patch == config.stride == 4


def test_a_laptop_works_on_about_100_patches_however_large_the_picture():
    for res in (64, 128, 256, 512):
        config = train.resolve({"res": res, "preset": "laptop"})
        assert (config.patch, config.stride) == (res * 5 // 32, res * 3 // 32)


def test_larger_pictures_see_more_noise_and_on_a_laptop_more_than_the_formula_says():
    for size, expected in (("laptop", [-0.5, -0.5, -math.log(2), -math.log(8), -math.log(16)]),
                           ("gpu", [-0.5, -0.5, -0.5, -0.8, -0.8 - math.log(2)])):
        means = [train.resolve({"res": res, "preset": size}).t_mean for res in (16, 32, 64, 256, 512)]
        assert means == approx(expected)


@parametrize("given,width", [
    ({}, 128), ({"res": 64}, 128), ({"res": 128}, 256), ({"dataset": "pets"}, 256),
    ({"dataset": "pets", "res": 64}, 384), ({"dataset": "mnist", "network": "transformer"}, 256),
    ({"dataset": "mnist"}, 32), ({"dataset": "moons"}, 64)])
def test_on_a_laptop_small_faces_get_the_smallest_transformer(given, width):
    assert train.resolve({**given, "preset": "laptop"}).width == width


def test_without_cuda_the_preset_is_the_laptops_and_a_flag_chooses_the_other(monkeypatch):
    assert train.resolve({"res": 256, "device": "cpu"}).width == 256
    assert train.resolve({"res": 256, "preset": "gpu"}).width == 768
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.resolve({"res": 256}).preset == "gpu"


@parametrize("flags,optimizer", [("", "adamw"), ("--network transformer --patch 7 --stride 7", "muon")])
def test_mnist_downloads_trains_by_unet_or_transformer_and_samples_by_label(flags, optimizer, monkeypatch, server):
    publish(monkeypatch, server, "mnist")
    few = "--width 16 --depth 1 --heads 2 --steps 3 --batch 4 --device cpu"
    train.main(f"--data mnist --root there --download {few} {flags}".split())
    assert len(list(Path("there/mnist").glob("*.gz"))) == 4 and not Path("data").exists()
    assert state("out/mnist-28")["config"]["optimizer"] == optimizer
    assert sampled("out/mnist-28", "--n 20 --label all").shape == (20, 1, 28, 28)


# ---------------------------------------------------------------------------------------------------------------
# Going on


@parametrize("run,flags", [(train_moons, ""), (train_moons, "--ot"), (train_faces, ""),
                                       (train_moons, "--predict x --path cosine"), (train_moons, "--shortcut"),
                                       (train_faces, "--shortcut --cooldown 0.6 --jitter 0.1")])
def test_resuming_equals_never_stopping_to_the_bit(run, flags):
    flags += " --report 5 --preview 10"
    averaged = run(f"{flags} --steps 20 --out once")
    assert not any(w.requires_grad for w in averaged.parameters())  # or every step would stay in memory
    run(f"{flags} --steps 12 --out twice")
    run(f"{flags} --steps 20 --out twice --resume")
    assert same_training("once", "twice")
    once, twice = log_of("once"), log_of("twice")
    assert once[-1]["held_out"] == twice[-1]["held_out"]
    assert [int(row["step"]) for row in twice] == sorted({int(row["step"]) for row in twice})


@needs_unix
def test_sigterm_finishes_the_step_saves_and_resume_goes_on_to_the_same_end(monkeypatch):
    monkeypatch.setattr(data, "POINTS_DRAWN", 10**6)  # as many as the process draws
    flags = "--steps 200 --preview 200 --report 20 --no-bf16"
    start = [sys.executable, HERE / "train.py", *MOONS, *flags.split(), "--out", "killed"]
    process = subprocess.Popen(start, stdout=subprocess.PIPE, text=True)
    line = ""
    while not line.startswith("step "):
        line = process.stdout.readline()
        assert line
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in said
    assert 0 < state("killed")["step"] < 200
    train_moons(f"{flags} --out killed --resume")
    train_moons(f"{flags} --out whole")
    assert same_training("killed", "whole")


def test_a_longer_run_keeps_the_finished_weights_and_survives_a_kill_after_its_own_cool_down_began(quarter_seconds):
    train_moons("--steps 10 --out run")
    finished = Path("run/ckpt.pt").read_bytes()
    train_moons("--steps 40 --out run --resume --bench")
    assert not Path("run/ckpt-10.pt").exists()
    train_moons("--steps 40 --out run --resume")
    assert Path("run/ckpt-10.pt").read_bytes() == finished
    shutil.copytree("run", "killed")
    Path("killed/ckpt.pt").write_bytes(finished)  # when only stable.pt had been written
    train_moons("--steps 40 --out killed --resume")
    assert same_training("killed", "run")


def make_older(file):
    """Rewrites a checkpoint with the names that its config had in an earlier version."""
    checkpoint = torch.load(file, weights_only=True)
    config = checkpoint["config"]
    for name, older in (("dataset", "data"), ("target", "loss"), ("times", "time"), ("network", "model")):
        config[older] = config.pop(name)
    del checkpoint["multi_hot"]
    torch.save(checkpoint, file)


def test_a_checkpoint_of_an_earlier_version_resumes():
    train_moons("--steps 20 --out once")
    train_moons("--steps 12 --out older")
    make_older("older/ckpt.pt")
    make_older("older/stable.pt")
    train_moons("--steps 20 --out older --resume")
    assert same_training("once", "older")


def test_a_new_run_sets_the_old_one_aside():
    out, kept = Path("out/moons"), []
    for number in (1, 2):
        train_moons(f"--steps 3 --seed {number}")
        kept.append((out / "ckpt.pt").read_bytes())
        for name in ("ckpt-2.pt", "mine.csv"):
            (out / name).write_text("kept")
    train_moons("--steps 3")
    assert [(out / f"before-{number}/ckpt.pt").read_bytes() for number in (1, 2)] == kept
    assert (out / "before-1/ckpt-2.pt").exists() and (out / "mine.csv").exists()  # the latter is not ours to move


# ---------------------------------------------------------------------------------------------------------------
# Several processes, compiling, timing


@needs_unix
def test_two_processes_learn_what_one_does_with_the_same_batch(monkeypatch):
    """Rank r draws noise from (seed, step, r), so the one process is given both ranks' draws. What remains is the
    order in which float32 gradients are summed; AdamW divides by their size, so where that is tiny the rounding shows:
    1e-4 after 20 steps of up to 8e-4 each. The ranks themselves must agree to the bit."""
    Path("run.py").write_text(
        f"import os, sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import data, torch, train\n"
        f"data.POINTS_DRAWN = {FEW_POINTS}\n"
        "train.wasserstein = lambda *_: {0: 0.0}\n"
        "torch.save(train.main(sys.argv[1:]).state_dict(), f'rank{os.environ[\"RANK\"]}.pt')\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "run.py"]
    flags = "--steps 20 --shortcut --cooldown 0.5 --no-bf16"
    done = subprocess.run([*launch, *MOONS, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu") == 1 and "Warning" not in done.stderr  # only the first one prints
    first, second = state(".", "rank0.pt"), state(".", "rank1.pt")
    assert equal(first, second)
    draw_batch = train.draw_batch

    def draw_both_shares(config, images, labels, step, rank, world, device):
        (x, e, t, y, _, shortcuts), (x2, e2, t2, y2, _, shortcuts2) = [
            draw_batch(config, images, labels, step, rank, 2, device) for rank in (0, 1)]
        n = len(t)  # of each share; what follows learns shortcuts
        x, e, y = (torch.cat([a[:n], b[:n], a[n:], b[n:]]) for a, b in ((x, x2), (e, e2), (y, y2)))
        both = [torch.cat(pair) for pair in zip(shortcuts, shortcuts2)] if shortcuts else None
        return x, e, torch.cat([t, t2]), y, None, both

    monkeypatch.setattr(train, "draw_batch", draw_both_shares)
    one = train_moons(flags).state_dict()
    assert_close(one, first, atol=1e-4, rtol=0)


def test_torchrun_takes_none_of_our_flags_for_its_own():
    """It accepts abbreviations, so one of ours must not be the beginning of one of its own."""
    theirs = torch.distributed.run.get_args_parser()._option_string_actions
    for our in ["--resume", "--bench", *map(train.flag_of, dataclasses.fields(train.Config))]:
        assert not any(their.startswith(our) for their in theirs), our


def test_the_step_is_compiled_if_asked_to(monkeypatch):
    compiled = []

    def pretend(net):
        compiled.append(net)
        return net

    monkeypatch.setattr(torch, "compile", pretend)
    train_moons("--steps 1 --no-compile")
    assert len(compiled) == 0
    train_moons("--steps 1 --compile")
    assert len(compiled) == 2  # the network, and its average, which shortcuts learn from


@pytest.fixture
def quarter_seconds(monkeypatch):
    """Whatever --bench measures takes a quarter of a second. It is run, but only once."""

    def timer(statement, globals, num_threads):
        exec(statement, dict(globals))
        return Namespace(timeit=lambda calls: Namespace(mean=0.25))

    monkeypatch.setattr("torch.utils.benchmark.Timer", timer)


def test_bench_counts_the_arithmetic_and_divides_it_by_the_time(quarter_seconds, capsys):
    train.main(["--device", "cpu", "--depth", "1", "--bench"])
    said = capsys.readouterr().out
    each = 48 * 128 + 128**2 + 4 * 128**2 + 3 * 128 * 320 + 128 * 48  # embedding, q k v out, SwiGLU, head
    once = 256 * 128 + 128**2 + 128 * 4 * 128  # time, modulation
    scores = 2 * 64 * 128  # q k, and then times v: each of 64 tokens with all of them
    one = 2 * 3 * (64 * (each + scores) + once) / 1e9  # a product and a sum; forwards, and twice that backwards
    step, square = 32 * one, 2 * 2048**3 / 1e9
    assert f"250.0 ms/step  128.0 samples/s  {one:.3f} GFLOP/sample  {4 * step:,.0f} GFLOP/s\n" in said
    assert f"{step / square:.0%} of a plain float32 matrix product's {4 * square:,.0f} GFLOP/s" in said
    assert "plain bfloat16" not in said and not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------------
# bfloat16: these tests turn it on, on every machine. Processors without it emulate it, slowly.


@pytest.fixture
def in_bf16(monkeypatch):
    monkeypatch.setattr(sample, "has_bf16", lambda device: True)


def tensors_in(state):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return [tensor for part in state for tensor in tensors_in(part)] if isinstance(state, list) else []


@parametrize("flags", ["", "--no-bf16", "--shortcut --cooldown 0.6", "--network unet --width 16"])
def test_in_bf16_runs_resume_to_the_bit_and_weights_averages_and_optimizers_stay_in_float32(flags, in_bf16):
    flags += " --preview 2 --report 1"
    train_faces(f"--steps 5 --out once {flags}")
    train_faces(f"--steps 4 --out twice {flags}")
    train_faces(f"--steps 5 --out twice {flags} --resume")
    assert same_training("once", "twice")
    saved = state("once")
    for part in ("weights", "ema", "optimizers"):
        assert {tensor.dtype for tensor in tensors_in(saved[part])} == {torch.float32}


@parametrize("bf16", [True, False])
def test_in_bf16_matrices_are_multiplied_in_it_and_the_loss_is_float32(bf16, in_bf16):
    config = train.resolve({"res": 16, "patch": 8, "stride": 8, "batch": 8, "bf16": bf16})
    images, labels, _, _ = data.load("faces", "data", 16)
    net, ema, optimizers, _ = train.build_networks(config, None, 0, CPU, 1)
    products = []
    net.blocks[0].swiglu.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    loss = train.train_step(config, 0, net, ema, optimizers, train.draw_batch(config, images, labels, 0, 0, 1, CPU))
    wanted = torch.bfloat16 if bf16 else torch.float32
    assert products == [wanted] and optimizers[1].dtype == wanted and loss.dtype == torch.float32


@parametrize("solver", fm.SOLVERS)
def test_in_bf16_every_solver_keeps_its_state_in_float32_and_lands_nearby(solver, in_bf16, monkeypatch):
    """But dopri5, which would take the rounding for its own error, never uses it."""
    net, z = small("transformer", shortcut=True).requires_grad_(False), torch.randn(2, 3, 16, 16)
    config = train.resolve({"res": 16, "predict": "v"})
    rounded, _ = sample.generate(net, config, z, 4, solver)
    config.bf16 = False
    exact, _ = sample.generate(net, config, z, 4, solver)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, exact) == (solver == "dopri5")
    assert_close(rounded, exact, atol=0.1, rtol=0.1)


# ---------------------------------------------------------------------------------------------------------------
# sample.py


def sampled(run, flags="", to="x.npy"):
    """What sample.py writes, by default of two samples in three steps: an array, or a picture, or a folder's."""
    writes = [] if "--bpd" in flags or "--sweep" in flags else ["--to", to]
    sample.main([str(run), "--device", "cpu", "--n", "2", "--steps", "3", *flags.split(), *writes])
    if to == "x.npy":
        return np.load(to)
    if Path(to).suffix:
        return Image.open(to)
    return np.stack([Image.open(file) for file in sorted(Path(to).glob("0*.png"))])


@pytest.fixture(scope="module")
def shortcut_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shortcut")
    for kind in ("cats", "dogs"):
        make_pictures(folder / "pets" / kind, 10)
    flags = ["--res", 16, *TINY, "--steps", 4, "--cond", "all", "--shortcut", "--no-bf16"]
    done = command("train.py", "--data", "pets", *flags, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out/pets-16"


def test_one_shortcut_is_the_picture_that_the_network_draws_from_noise_for_all_of_the_time(shortcut_run):
    checkpoint = state(shortcut_run)
    checkpoint["ema"]["length.net.2.weight"] += 0.1  # so few steps have hardly moved it
    torch.save(checkpoint, "ckpt.pt")
    net = sample.read_checkpoint(Path("ckpt.pt"))["network"]
    e, now, all_of_it = sample.noise(range(2), (3, 16, 16), seed=0), torch.zeros(2), torch.ones(2)
    drawn = sampled("ckpt.pt", "--solver shortcut --steps 1")
    assert_close(torch.from_numpy(drawn), net(e, now, None, all_of_it).detach(), atol=1e-5, rtol=1e-4)


@parametrize("flags,shape", [
    ("--steps 16", (2, 3, 16, 16)), ("--steps 2 --label all --guidance 2 --n 8", (8, 3, 16, 16)),
    ("--steps 2 --churn 1", (2, 3, 16, 16)), ("--steps 2 --interpolate 3", (6, 3, 16, 16)),
    ("--steps 1 --interpolate 2 --n 5 --label all", (12, 3, 16, 16)),  # n is rounded up to 6
    ("--steps 4 --inpaint a.png --mask white.png", (2, 3, 16, 16))])
def test_shortcuts_serve_wherever_a_solver_does(shortcut_run, flags, shape, capsys):
    save_picture("a.png")
    halves(255, 255, "L").save("white.png")
    x = sampled(shortcut_run, "--solver shortcut " + flags)
    assert x.shape == shape and np.isfinite(x).all() and "steps of shortcut" in capsys.readouterr().out


def test_an_inversion_takes_one_label_and_an_interpolation_has_a_row_for_each_pair(shortcut_run, capsys):
    save_picture("a.png")
    refuses(capsys, "--invert single --label", sampled, shortcut_run, "--invert a.png --label all")
    sheet = sampled(shortcut_run, "--n 4 --interpolate 4 --label all", to="x.png")
    assert sheet.width == sheet.height  # four rows of four
    sheet = sampled(shortcut_run, "--n 4 --interpolate 2 --label all", to="x.png")
    assert 1.8 < sheet.height / sheet.width < 2.2  # four rows of two


def test_previews_show_one_step_below_the_flow_once_shortcuts_are_learnt(monkeypatch):
    monkeypatch.setattr(train, "PREVIEW_PICTURES", 4)
    train_faces("--steps 4 --preview 2 --shortcut --cooldown 0.5")
    before, after = (Image.open(f"out/faces-16/samples/00000{step}.png") for step in (2, 4))
    assert before.width == before.height  # two rows of two
    assert after.width > 1.9 * after.height  # two rows of four


def test_shortcuts_that_are_not_learnt_yet_are_refused(capsys):
    train_moons("--steps 10 --shortcut --cooldown 0.5")
    assert sampled("out/moons", "--solver shortcut --steps 1").shape == (2, 2)
    shutil.copy("out/moons/stable.pt", "early.pt")
    refuses(capsys, "early.pt --resume --out out/moons", sampled, "early.pt", "--solver shortcut --steps 1")
    capsys.readouterr()
    sampled("early.pt", "--sweep")
    assert "shortcut" not in capsys.readouterr().out


def test_the_times_of_shortcuts_stay_as_they_were_when_a_run_goes_on(capsys):
    train_faces("--steps 2 --shortcut")
    refuses(capsys, "--t-mean -1.0 -0.5 --out", train_faces, "--steps 4 --resume --t-mean -1 --cooldown 0")
    refuses(capsys, "--shortcut: trained True", train_faces, "--steps 4 --resume --no-shortcut")


@parametrize("flags,words", [
    ("--bpd 2", "--bpd --solver"), ("--sweep", "--sweep --solver"), ("--invert a.png", "--invert --solver"),
    ("--label cats --guidance 2 --interval 0.6,1", "--interval middle more --steps")])
def test_what_shortcuts_would_not_heed_is_refused(shortcut_run, flags, words, capsys):
    refuses(capsys, words, sample.main, [str(shortcut_run), *f"--solver shortcut --steps 1 {flags}".split()])


@needs_unix
def test_a_process_whose_partner_fails_ends_without_a_traceback(pets_run):
    """The first cannot write; the second waits for it."""
    Path("run.py").write_text(
        f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
        "import data, sample\n"
        "def fail(*args): raise OSError(28, 'No space left on device')\n"
        "if sample.processes()[0] == 0: sample.write_array = fail\n"
        "data.run(sample.main)\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", "run.py"]
    flags = [pets_run, "--n", 4, "--steps", 1, "--device", "cpu", "--to", "x.npy"]
    done = subprocess.run([str(word) for word in launch + flags], capture_output=True, text=True)
    assert done.returncode != 0 and "could not write x.npy" in done.stderr and "sample.py\", line" not in done.stderr


def test_the_solvers_of_the_flow_take_no_notice_of_shortcuts_and_a_sweep_has_both(shortcut_run, capsys):
    assert sampled(shortcut_run, "--solver euler --steps 3").shape == (2, 3, 16, 16)
    sampled(shortcut_run, "--sweep")
    said = capsys.readouterr().out
    assert said.count("shortcut") == 5 and "rk4" in said


def save_picture(name, size=(16, 16), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(name)
    return pixels


def test_samples_are_written_as_the_ending_says(pets_run, capsys):
    x = sampled(pets_run, "--n 5 --batch 2")
    assert x.shape == (5, 3, 16, 16) and x.dtype == np.float32
    said = capsys.readouterr().out
    assert "3 steps of heun, NFE 5, " in said and "samples/s" in said  # Heun: two a step, but one in the last
    flow = sampled(pets_run, "--n 5 --columns 1 --solver euler", to="x.gif")
    assert "3 steps of euler, NFE 3, " in capsys.readouterr().out
    assert flow.n_frames == 4 and flow.height > 4 * flow.width
    sheet = sampled(pets_run, "--n 5", to="x.png")
    assert 1.3 < sheet.width / sheet.height < 1.6  # two rows of three
    for to in ("folder", "folder", "."):
        Path("x.png").unlink(missing_ok=True)
        pixels = sampled(pets_run, "--n 5", to=to)
        assert_allclose(pixels / 127.5 - 1, x.clip(-1, 1).transpose(0, 2, 3, 1), atol=1 / 250)
    assert not list(Path().glob("*part*"))
    refuses(capsys, "folder 2 other 00003.png new folder", sampled, pets_run, "--n 3", "folder")
    Path("folder/.part-00009.png").write_text("half")  # what a kill left, or another process is writing
    assert len(sampled(pets_run, "--n 5", to="folder")) == 5


@parametrize("to", ["x.png", "x.gif", "x.npy"])
def test_a_full_disk_leaves_the_picture_that_was_there(to, pets_run, monkeypatch, capsys):
    def fill_the_disk(file):
        Path(file).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "write_array", lambda batches, n, config, file, rank: fill_the_disk(file))
    monkeypatch.setattr(Image.Image, "save", lambda image, file, **how: fill_the_disk(file))
    Path(to).write_text("old")
    refuses(capsys, f"could not write {to} No space --to", sampled, pets_run, "", to, status=1)
    assert Path(to).read_text() == "old" and not list(Path().glob(".part*"))


@parametrize("to,last", [("folder", "folder/00003.png"), ("x.npy", ".part-x.npy")])
def test_a_folder_and_an_array_are_written_batch_by_batch(to, last, pets_run, monkeypatch):
    """So that memory need not hold them all: when the last batch is drawn, those before it are on the disk."""
    generate, found = sample.generate, []

    def generate_and_look(*args):
        found.append(Path(last).stat().st_size if Path(last).exists() else 0)
        return generate(*args)

    monkeypatch.setattr(sample, "generate", generate_and_look)
    sampled(pets_run, "--n 6 --batch 2", to=to)
    assert found[0] < 200 and found[2] > found[0] + 100


@needs_unix
@parametrize("to", ["folder", "x.npy"])
def test_several_processes_write_the_files_that_one_does(to, pets_run):
    """Of three processes, the third is left without work."""
    draw = [HERE / "sample.py", pets_run, "--n", 7, "--batch", 4, "--steps", 2, "--device", "cpu"]
    # Without the "--", torchrun takes our --n for the beginning of one of its own flags.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "--"]
    command = [str(word) for word in [*launch, *draw, "--to", f"three/{to}"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("7 samples, 2 steps of heun") == 1 and "Warning" not in done.stderr
    sample.main([str(word) for word in [*draw[1:], "--to", f"one/{to}"]])
    one, three = ({file.name: file.read_bytes() for file in Path(name).rglob("*.*")} for name in ("one", "three"))
    assert one == three and len(one) == (7 if to == "folder" else 1)


@parametrize("flags,words", [
    ("--to x.png", "10 steps of heun, NFE 19"), ("--to x.gif", "50 steps of heun, NFE 99"),
    ("--inpaint a.png --mask hole.png", "50 steps of heun"), ("--invert a.png", "NFE 100 + 100")])
def test_samples_take_ten_steps_by_default_and_closer_looks_fifty(flags, words, pets_run, capsys):
    save_picture("a.png")
    Image.new("1", (16, 16), 1).save("hole.png")
    sample.main([str(pets_run), "--device", "cpu", "--n", "1", *flags.split()])
    assert words in capsys.readouterr().out


@parametrize("flags,words", [
    ("--n 6 --batch 2", "  2 of 6  0.1 samples/s  ETA 0:00:36"), ("--n 70", "  64 of 70  3.6 samples/s  ETA 0:00:02"),
    ("--bpd 6 --batch 2", "  2 of 6  0.3 samples/s  ETA 0:00:12"),
    ("--sweep --n 6 --batch 2", "  800 of 5,376  133.3 evaluations/s  ETA 0:00:34")])
def test_long_work_shows_how_much_is_done_and_how_long_the_rest_takes(flags, words, capsys, monkeypatch):
    """On a clock that moves six seconds at each look. The fine solution of a sweep takes 400 evaluations a sample."""
    train_moons("--steps 3")
    clock = itertools.count(0, 6)
    monkeypatch.setattr(sample, "time", Namespace(perf_counter=lambda: next(clock)))
    sample.main(["out/moons", "--steps", "3", *flags.split()])
    assert words in capsys.readouterr().out.splitlines()


@parametrize("res,device,n", [(32, "cpu", 64), (256, "cpu", 16), (256, "cuda", 64)])
def test_large_pictures_pass_a_cpu_in_small_batches(res, device, n):
    assert sample.usual_batch(Namespace(res=res), torch.device(device)) == n


def test_a_sample_depends_on_seed_and_index_only(pets_run):
    five = sampled(pets_run, "--n 5 --batch 5")
    assert_allclose(sampled(pets_run, "--n 3 --batch 2"), five[:3], atol=1e-6)
    assert np.abs(sampled(pets_run, "--n 5 --seed 1") - five).max() > 1e-4
    assert np.abs(five[0] - five[1]).max() > 1e-4
    start = sample.noise(range(5), (3,), seed=0)
    assert torch.equal(sample.noise(range(2), (3,), seed=0), start[:2])
    fill = sample.noise_source(range(5), (3,), 0, data.ON_THE_WAY, CPU)
    assert not torch.equal(fill(), start) and not torch.equal(fill(), fill())


def test_shift_and_tolerance_change_the_samples_and_dopri5_counts_its_steps(pets_run, capsys):
    assert not np.array_equal(sampled(pets_run), sampled(pets_run, "--shift 4"))
    evaluations = []
    for tol in (0.1, 1e-5):
        capsys.readouterr()
        sampled(pets_run, f"--solver dopri5 --tol {tol}")
        evaluations.append(int(re.search(rf"dopri5 to {tol}, NFE (\d+)", capsys.readouterr().out)[1]))
    assert evaluations[0] < evaluations[1]


def test_steps_are_small_where_training_drew_many_times():
    """Half of the training's times are below sigmoid(t_mean), and half of the steps, too."""
    train_faces("--data faces --steps 2 --t-mean -2 --out noisy")
    assert_array_equal(sampled("noisy"), sampled("noisy", f"--shift {math.exp(2)}"))
    assert not np.array_equal(sampled("noisy"), sampled("noisy", "--shift 1"))
    assert sample.usual_shift(Namespace(t_mean=-2, times="uniform")) == 1
    times = fm.time_grid(1000, sample.usual_shift(Namespace(t_mean=-2, times="logit-normal")))
    drawn = fm.sample_t(10_000, "logit-normal", -2, 0, torch.Generator().manual_seed(0), CPU)
    assert np.median(times) == approx(float(drawn.median()), abs=0.01)


def test_churn_changes_a_sample_by_noise_of_its_own(pets_run):
    plain, churned = sampled(pets_run), sampled(pets_run, "--churn 1")
    assert_array_equal(sampled(pets_run, "--churn 0"), plain)
    assert np.abs(churned - plain).max() > 1e-3
    assert_allclose(sampled(pets_run, "--churn 1 --n 3 --batch 1")[:2], churned, atol=1e-5)  # of (seed, i) alone
    assert np.abs(sampled(pets_run, "--churn 1 --seed 1") - churned).max() > 1e-3


def test_border_ratio_finds_a_grid_of_patches_and_none_in_noise(pets_run, capsys):
    noise = torch.randn(200, 3, 16, 16)
    for patch, stride, borders in ((4, 4, [4, 8, 12]), (6, 5, [5, 6, 10, 11])):
        assert sample.border_ratio(sample.edge_energy(noise), patch, stride) == approx(1, abs=0.05)
        brightness = torch.bucketize(torch.arange(16), torch.tensor(borders), right=True)  # a step at each border
        assert sample.border_ratio(sample.edge_energy(noise + 3 * brightness), patch, stride) > 3
    sampled(pets_run)
    assert "patch borders" in capsys.readouterr().out
    checkpoint = state(pets_run)
    checkpoint["config"].update(patch=16, stride=16)  # one patch, without borders
    torch.save(checkpoint, "ckpt.pt")
    sampled(".")
    assert "patch borders" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------
# Labels


@pytest.fixture
def labelled_run():
    """A tiny conditional run on CelebA-like pictures with attributes, of which it learns two."""
    make_pictures(Path("data/img_align_celeba"), 30)
    rows = [f"{i:06d}.jpg  {'1' if i % 2 else '-1'} -1  {'1' if i % 3 else '-1'}" for i in range(30)]
    Path("data/list_attr_celeba.txt").write_text("\n".join(["30", "Smiling Bald Male", *rows]))
    train_faces("--data celeba --patch 8 --stride 4 --steps 20 --lr 0.01 --no-bf16 --cond Smiling,Male")
    return "out/celeba-16"


def test_labels_and_guidance_steer_the_samples(labelled_run):
    male, both = sampled(labelled_run, "--label Male"), sampled(labelled_run, "--label Smiling,Male")
    assert np.array_equal(sampled(labelled_run, "--label 1"), male)  # by number
    for other in (sampled(labelled_run), both, sampled(labelled_run, "--label Male --guidance 4")):
        assert not np.array_equal(other, male)
    assert np.array_equal(sampled(labelled_run, "--label Male --guidance 4 --interval 1,1"), male)  # never on
    unlabelled = sampled(labelled_run, "--label Male --guidance 0 --interval 0,1")
    assert_allclose(unlabelled, sampled(labelled_run), atol=1e-5)
    make_older(f"{labelled_run}/ckpt.pt")
    assert np.array_equal(sampled(labelled_run, "--label Smiling,Male"), both)


def test_each_label_gets_a_row_of_its_own(labelled_run):
    rows = sampled(labelled_run, "--label all --n 6")
    assert_allclose(rows[:3], sampled(labelled_run, "--label Smiling --n 3"), atol=1e-5)
    assert_allclose(rows[3:], sampled(labelled_run, "--label Male --n 6")[3:], atol=1e-5)
    sheet = sampled(labelled_run, "--label all --n 8", to="x.png")
    assert sheet.width > 1.8 * sheet.height  # two rows of four


@parametrize("text,multi_hot,rows", [
    ("dog", False, [1]),
    ("dog,cat", False, [1, 0]),  # two classes: a row of samples each
    ("all", False, [0, 1, 2]),
    ("2,0", False, [2, 0]),  # numbers, where no name is one
    ("cow, brown", False, [2]),  # a comma in a name
    ("cow, brown", True, [[0, 0, 1]]),
    ("dog, cat", True, [[1, 1, 0]]),  # two attributes: samples that have both
    ("all", True, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
])
def test_a_label_is_read_as_its_kind_says_and_may_have_commas(text, multi_hot, rows):
    checkpoint = {"label_names": ["cat", "dog", "cow, brown"], "multi_hot": multi_hot}
    assert sample.parse_label(text, checkpoint).tolist() == rows


def test_a_name_is_always_what_it_says(capsys):
    checkpoint = {"label_names": ["10", "3", "all"], "multi_hot": False}
    assert sample.parse_label("3,10", checkpoint).tolist() == [1, 0]
    assert sample.parse_label("all", checkpoint).tolist() == [2]
    for number in "01":  # neither is a name, and numbers would mean something else
        refuses(capsys, f"--label {number}: 10, 3, all", sample.parse_label, number, checkpoint)


def test_a_network_that_never_saw_hidden_labels_is_not_asked_without_one(capsys):
    make_dataset({"cat/a.png": 0, "dog/b.png": 255}, zipped=False)
    train_faces("--data pets --cond all --drop 0 --steps 1")
    assert len(sampled("out/pets-16", "--label dog")) == 2
    for flags in ("", "--label dog --guidance 2", "--sweep", "--bpd 1"):
        refuses(capsys, "--drop 0 --label --guidance", sampled, "out/pets-16", flags)


# ---------------------------------------------------------------------------------------------------------------
# A number for quality


@pytest.fixture(params=["transformer", "unet"])
def judging_run(request, monkeypatch):
    """A tiny run on 400 faces, of which it holds out 20."""
    monkeypatch.setattr(data, "FACES", 400)
    flags = "--network unet --width 16" if request.param == "unet" else "--depth 3"
    train_faces(f"--steps 30 --report 10 {flags} --out judge")
    return "judge"


def save_folder(folder, pixels):
    Path(folder).mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(f"{folder}/{i:05d}.png")


def distance_of(capsys, *args):
    """The distance and the floor that sample.py prints."""
    capsys.readouterr()
    sample.main([*map(str, args), "--device", "cpu"])
    line = capsys.readouterr().out.splitlines()[-1]
    return [float(number) for number in re.search(r"ones: (.*), (.*) times .* pictures, (.*);", line).group(1, 3, 2)]


def test_held_out_pictures_have_no_distance_and_worse_ones_more_than_training_pictures(judging_run, capsys):
    images, _, _, _ = data.load("faces", res=16)
    training, held_out = data.split(400)
    fresh, known = images[held_out], images[training[:20]]
    blocks = known.reshape(20, 4, 4, 4, 4, 3).mean(axis=(2, 4)).astype(np.uint8)  # 4 x 4 pixels of one colour
    blurred = blocks.repeat(4, axis=1).repeat(4, axis=2)
    distance, floor = {}, set()
    for folder, pixels in dict(fresh=fresh, known=known, blurred=blurred, copies=known[[0] * 20]).items():
        save_folder(folder, pixels)
        distance[folder], reference, ratio = distance_of(capsys, folder, "--fd", 20, "--judge", judging_run)
        floor.add(reference)
        assert ratio == approx(distance[folder] / reference, rel=0.01)
    assert len(floor) == 1
    assert distance["fresh"] == approx(0, abs=1e-4)
    assert 1.2 * distance["known"] < min(distance["blurred"], distance["copies"])


def test_the_distance_of_samples_is_that_of_their_folder_whatever_the_batch(judging_run, capsys):
    flags = ["--steps", 3, "--seed", 1]
    by_itself = distance_of(capsys, judging_run, "--fd", 20, *flags, "--batch", 7)
    sample.main([judging_run, "--n", "20", *map(str, flags), "--to", "drawn", "--device", "cpu"])
    assert by_itself == approx(distance_of(capsys, "drawn", "--fd", 20, "--judge", judging_run), rel=1e-3)
    assert by_itself != approx(distance_of(capsys, judging_run, "--fd", 20, "--steps", 3, "--seed", 2), rel=1e-3)


def test_the_judge_looks_through_noise_that_is_always_the_same_but_not_the_samplers(monkeypatch):
    """Samples seen through the noise that they grew from would look unlike held-out pictures, however good."""
    seen, noisy = [], sample.noisy
    monkeypatch.setattr(sample, "noisy", lambda x, e, t, config: seen.append(e) or noisy(x, e, t, config))
    config = Namespace(network="transformer", bf16=False, path="linear")
    for _ in range(2):
        sample.features(small("transformer").requires_grad_(False), config, torch.zeros(3, 3, 16, 16), CPU, batch=3)
    first, again = seen
    assert torch.equal(first, again) and first.std().item() == approx(1, abs=0.1)
    assert (first * sample.noise(range(3), (3, 16, 16), seed=0)).mean().abs() < 0.1


def test_what_cannot_be_judged_is_refused_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(data, "FACES", 400)
    train_faces("--steps 2 --depth 2")
    train_faces("--steps 2 --cond all --drop 0 --out deaf")
    train_moons("--steps 2")
    save_folder("same", np.zeros((60, 16, 16, 3), np.uint8))
    train_faces("--data same --steps 1")
    save_folder("drawn", np.zeros((3, 20, 16, 3), np.uint8))
    Path("drawn/00001.png").write_bytes(b"nothing")
    Path("empty").mkdir()
    run = "out/faces-16"
    for args, words in (
        (f"{run} --fd 21", "--fd 21 20 held"),
        (f"{run} --judge {run}", "--judge --fd"),
        (f"{run} --fd 5 --to x.png", "--fd --to"),
        (f"{run} --sweep --to x.png", "--sweep --to"),
        (f"drawn --fd 3 --label hat --judge {run}", "drawn --label"),
        ("drawn --fd 3", "drawn --judge"),
        ("out/same-16 --fd 3", "same-16 alike"),
        (f"drawn --fd 4 --judge {run}", "drawn 3"),
        (f"drawn --fd 3 --judge {run}", "cannot read drawn/00001.png"),
        (f"empty --fd 3 --judge {run}", "empty/ckpt.pt"),
        ("out/moons --fd 5", "points --sweep"),
        (f"{run} --fd 5 --judge deaf", "deaf --drop 0 --judge"),
        (f"out/moons --fd 5 --judge {run}", "--judge (3, 16, 16) (2,)"),
        (f"deaf --fd 12 --label all --judge {run}", "--fd 12 multiple rows"),
        (f"{run} --fd 5 --judge drawn", "--judge out/faces-32"),
    ):
        refuses(capsys, words, sample.main, args.split())


# ---------------------------------------------------------------------------------------------------------------
# Editing


def test_interpolation_passes_through_the_samples_themselves(pets_run):
    ends = sampled(pets_run, "--n 3")
    between = sampled(pets_run, "--n 3 --interpolate 4").reshape(3, 4, 3, 16, 16)
    assert_allclose(between[:, 0], ends, atol=1e-5)
    assert_allclose(between[:, -1], ends[[1, 2, 0]], atol=1e-5)
    a, b = torch.randn(2, 1000)
    assert sample.slerp(a, b, 0.5).norm() == approx(float(a.norm() + b.norm()) / 2, rel=0.02)


def test_full_strength_forgets_the_picture_and_less_stays_nearer_to_it(pets_run):
    pixels = save_picture("a.png").transpose(2, 0, 1) / 127.5 - 1
    plain, distances = sampled(pets_run), []
    for strength in (0.1, 0.6, 0.9):
        distances.append(np.abs(sampled(pets_run, f"--from a.png --strength {strength}") - pixels).mean())
    assert distances == sorted(distances)
    assert_array_equal(sampled(pets_run, "--from a.png --strength 1"), plain)


def test_a_picture_to_start_from_is_mixed_with_noise_as_the_path_says():
    """The quarter circle: at two thirds of the time, two thirds of a right angle."""
    x, e = torch.randn(2, 5)
    z = sample.noisy(x, e, 2 / 3, Namespace(path="cosine"))
    assert_close(z, 3**0.5 / 2 * x + e / 2)


def test_inpainting_keeps_the_unmasked_part_exactly_and_fills_the_rest_differently(pets_run):
    pixels, mask = save_picture("a.png"), np.zeros((16, 16), np.uint8)
    mask[4:9, 5:] = 255
    known = mask == 0
    Image.fromarray(mask).save("mask.png")
    flags = "--inpaint a.png --mask mask.png"
    x = sampled(pets_run, flags)
    assert (x[:, :, known] == data.to_tensor(pixels[None], CPU).numpy()[:, :, known]).all()
    assert (sampled(pets_run, flags, to="folder")[:, known] == pixels[known]).all()
    assert np.abs(x[0] - x[1]).max() > 1e-4
    one_by_one = sampled(pets_run, f"{flags} --n 3 --batch 1")
    assert_allclose(one_by_one[:2], x, atol=1e-5)  # a function of (seed, i) alone
    assert sampled(pets_run, flags, to="x.gif").n_frames == 4


@parametrize("flag", ["--from", "--inpaint", "--invert"])
def test_any_picture_is_taken_and_prepared_as_for_training(flag, pets_run, monkeypatch, capsys):
    """A phone's: on its side, wide, with transparency. What arrives is what training would have packed."""
    photo = halves((*RED, 255), (*BLUE, 0), "RGBA", size=(30, 40)).rotate(90, expand=True)
    photo.save("it's.png", exif=exif(6))
    make_dataset({"a.png": Path("it's.png").read_bytes()}, zipped=False)
    packed = data.load("pets", "data", 16)[0]
    save_picture("mask.png", mode="L")
    taken, to_tensor = [], data.to_tensor
    monkeypatch.setattr(data, "to_tensor", lambda pixels, device: taken.append(pixels) or to_tensor(pixels, device))
    sample.main([str(pets_run), "--device", "cpu", "--n", "1", "--steps", "1", flag, "it's.png", "--to", "x.npy",
                 *(["--mask", "mask.png"] if flag == "--inpaint" else [])])
    assert_array_equal(taken[0], packed)
    assert "it's.png: transparency turned white" not in capsys.readouterr().err
    assert len(np.unique(packed[0, 2], axis=0)) > 1


def test_a_picture_is_said_to_be_prepared_and_becomes_grey_for_a_grey_network(capsys):
    halves(RED, BLUE, size=(40, 30)).save("a.png")
    config = Namespace(dataset="mnist", res=28)
    x = sample.read_picture("a.png", config, CPU)
    assert "a.png: cropped to the centre square, resized to 28x28" in capsys.readouterr().out
    assert_allclose(x[0, 0, :, [2, -3]], np.tile([76 / 127.5 - 1, 29 / 127.5 - 1], (28, 1)), atol=0.01)


@parametrize("mask,rule", [
    (halves(255, 0, "L"), "white"),
    (halves(1, 0, "L"), "white"),
    (halves(1, 0, "1"), "white"),
    (halves(WHITE, BLACK), "white"),
    (halves((255, 255, 255, 255), (0, 0, 0, 255), "RGBA"), "white"),  # opaque everywhere
    (halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"), "painted"),
    (halves((0, 255), (255, 0), "LA"), "painted"),
    (halves(65535, 0, "I;16"), "white"),
    (halves(255, 0, "L", size=(64, 64)), "white"),
    (ImageOps.expand(halves(255, 0, "L"), (30, 0), 0), "white"),
], ids=repr)
def test_a_mask_is_what_is_painted_or_else_white(mask, rule, capsys):
    mask.save("mask.png")
    hole = sample.read_mask("mask.png", Namespace(dataset="pets", res=16), CPU)
    assert_array_equal(hole[0, 0], np.arange(16) < np.full((16, 1), 8))
    assert f"hole: where it is {rule}" in capsys.readouterr().out


def test_a_mask_without_a_hole_is_refused_and_one_that_is_all_hole_is_said(capsys):
    config = Namespace(dataset="pets", res=16)
    halves(0, 0, "L").save("none.png")
    halves(255, 255, "L").save("all.png")
    refuses(capsys, "none.png no hole white", sample.read_mask, "none.png", config, CPU)
    assert sample.read_mask("all.png", config, CPU).all()
    assert "nothing of the picture is kept" in capsys.readouterr().out


def test_inversion_finds_noise_that_leads_back_to_the_picture(pets_run, capsys):
    pixels, errors = save_picture("a.png"), []
    for steps in (4, 40):
        picture, _, again = sampled(pets_run, f"--invert a.png --steps {steps}")
        errors.append(float(capsys.readouterr().out.split("RMS error ")[1].split()[0]))
        assert_allclose(picture, pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)
        assert np.sqrt(np.mean((picture - again) ** 2)) == approx(errors[-1], abs=1e-5)
    assert errors[1] < errors[0] / 10 and errors[1] < 0.05  # order 2
    assert sampled(pets_run, "--invert a.png", to="x.gif").n_frames == 7  # three steps there, three back


# ---------------------------------------------------------------------------------------------------------------
# Looking at the flow itself


def test_paths_draws_pairs_velocities_and_paths_of_points_side_by_side(monkeypatch, capsys):
    panels, trails = [], data.trails

    def watch(lines):
        panels.append(torch.tensor(lines))
        return trails(lines)

    train_moons("--steps 300")
    train_moons("--steps 300 --ot --out ot")
    monkeypatch.setattr(data, "trails", watch)
    capsys.readouterr()
    sheet = sampled("out/moons", "--paths --n 100 --seed 3 --steps 30", to="x.png")
    sampled("ot", "--paths --n 100 --seed 3 --steps 30", to="x.png")
    sampled("ot", "--paths --n 30 --seed 3 --steps 2 --solver dopri5", to="x.png")
    energy, ot_energy, in_two_steps = re.findall(r"([\d.]+) times the squared W2", capsys.readouterr().out)
    assert 1 <= float(ot_energy) < 1.06 < float(energy) < 1.6 and float(in_two_steps) >= 1
    assert 2.8 < sheet.width / sheet.height < 3
    pairs, arrows, paths, ot_pairs = panels[:4]
    assert ot_pairs.diff(dim=1).square().sum() < 0.7 * pairs.diff(dim=1).square().sum()
    net = sample.read_checkpoint(Path("out/moons/ckpt.pt"))["network"]
    v = net(arrows[:, 0], torch.full((len(arrows),), 0.5))
    assert torch.cosine_similarity(arrows[:, 1] - arrows[:, 0], v).min() > 0.999
    assert torch.equal(paths[:, 0], pairs[:, 0])
    assert_allclose(paths[:, -1], sampled("out/moons", "--n 100 --seed 3 --steps 30"), atol=1e-5)
    refuses(capsys, "--paths .png", sampled, "out/moons", "--paths")


@parametrize("predict", ["v", "x"])
def test_sweep_shows_that_more_steps_and_higher_order_end_nearer_to_a_fine_solution(predict, capsys):
    train_moons(f"--steps 200 --shortcut --predict {predict}")
    capsys.readouterr()
    sample.main(["out/moons", "--n", "100", "--sweep"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert {row[0] for row in rows} == set(fm.SOLVERS) and all(len(row) == 5 for row in rows)
    error = {(row[0], row[1]): float(row[3]) for row in rows}  # by solver and steps
    assert error["euler", "64"] < error["euler", "8"] and error["rk4", "16"] < error["euler", "16"]
    fine = sampled("out/moons", "--n 100 --solver rk4 --steps 100")
    distance = np.sqrt(np.square(sampled("out/moons", "--n 100 --solver euler --steps 8") - fine).mean())
    assert error["euler", "8"] == approx(distance, abs=1e-4)


def likelihood(net, dataset, n, steps, capsys):
    """What --bpd says of a network that predicts v."""
    config = Namespace(dataset=dataset, root="data", res=16, predict="v", path="linear", cond="", out="out")
    checkpoint = dict(config=config, n=len(data.load(dataset, "data", 16)[0]), content=None)
    capsys.readouterr()
    sample.likelihood(net, config, checkpoint, n, steps, seed=0, device=CPU, batch=20)
    return capsys.readouterr().out


def test_likelihood_under_a_flow_that_moves_nothing_is_that_of_the_noise(capsys):
    """Then the density is the standard normal. The error is the standard deviation over the root of n."""
    said = likelihood(lambda z, t, y: 0 * z, "moons", 50, 3, capsys)
    points, _, _, _ = data.load("moons")
    nats = -scipy.stats.norm.logpdf(points[data.split(len(points))[1][:50]]).sum(1)
    assert said.startswith(f"{nats.mean():.3f} +- {nats.std(ddof=1) / math.sqrt(50):.3f} nats on 50 held-out")


def test_bits_per_dimension_of_gaussian_pictures_are_their_entropy_in_grey_levels(capsys):
    """Pixels with a standard deviation of two grey levels, and a perfect network for them. Rounding them to bytes adds
    a variance of 1/12. One level is 1 / 127.5 wide."""
    Path("grey").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = 127.5 + 2 * rng.normal(size=(16, 16, 3))
        Image.fromarray(pixels.round().astype(np.uint8)).save(f"grey/{i}.png")
    variance = 4 + 1 / 12
    v = gaussian_velocity(0, math.sqrt(variance) / 127.5)
    said = likelihood(lambda z, t, y: v(z, t.view(-1, 1, 1, 1)), "grey", 2, 20, capsys)
    assert "bits per dimension at most on 2 held-out samples, 20 steps of rk4, NFE 80, from noise of 0.005" in said
    entropy = math.log2(2 * math.pi * math.e * variance) / 2
    assert entropy < float(said.split()[0]) < entropy + 0.1  # a bound: with a noise of 0.005 it is 0.07 above


def test_the_likelihood_of_trained_pictures_is_not_called_held_out_and_needs_the_same_pictures(capsys):
    make_pictures(Path("pets"), 3)
    train_faces("--data pets --steps 1")
    sample.main(["out/pets-16", "--device", "cpu", "--bpd", "3", "--steps", "2"])
    assert "on 3 training (too few to hold any out) samples" in capsys.readouterr().out
    make_pictures(Path("pets"), 4)
    refuses(capsys, "pets is not what out/pets-16 has learnt from", sampled, "out/pets-16", "--bpd 3")


def test_training_makes_the_data_more_likely_than_any_one_gaussian_would(capsys):
    """Eight Gaussians of standard deviation 0.3 on a circle of radius 4."""
    train_moons("--data 8gaussians --steps 400 --width 64 --batch 256")
    capsys.readouterr()
    sample.main(["out/8gaussians", "--bpd", "200", "--steps", "20"])
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.3**2)
    one_gaussian = math.log(2 * math.pi * math.e * (4**2 / 2 + 0.3**2))
    assert entropy - 0.3 < float(capsys.readouterr().out.split()[0]) < one_gaussian - 0.3


# ---------------------------------------------------------------------------------------------------------------
# README.md


def test_the_first_program_of_the_readme_learns_the_moons():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    program = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {}
    exec(program, names)
    assert fm.w2(data.points("moons", 500, seed=10**6), names["samples"][:500]) < 0.8


# ---------------------------------------------------------------------------------------------------------------
# Bad input: one line with the words that help, and status 2. Nothing is overwritten.


def test_a_mistake_on_the_real_command_line_shows_one_line():
    done = command("sample.py", "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_asking_for_help_is_no_mistake():
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    assert end.value.code == 0


@parametrize("flags,words", [
    ("--data ''", "--data"),
    ("--res 4", "--res"),
    ("--nonsense", "--nonsense"),
])
def test_data_refuses_what_cannot_work(flags, words, capsys):
    refuses(capsys, words, data.main, shlex.split(flags))


@parametrize("flags,words", [
    ("--stpes 5", "--stpes --steps"),
    ("--model unet", "--model --network"),  # the name in an earlier version
    ("--steps 1e3", "--steps int 1e3"),
    ("--data nowhere", "nowhere faces"),
    ("--data celeba --res 256", "img_align_celeba.zip --root"),
    ("--data mnist --root there", "mnist --root there --download"),
    ("--data moons --cond all", "--cond"),
    ("--data moons --network transformer", "--network transformer moons"),
    ("--data moons --heads 2", "--heads mlp"),
    ("--dim 8", "--dim 8 moons"),
    ("--network mlp", "--network mlp faces"),
    ("--shortcut --predict e", "--shortcut --predict e x or v"),
    ("--shortcut --cooldown 0", "--shortcut --cooldown"),
    ("--shortcut --path cosine", "--shortcut --path cosine --predict v"),
    ("--t-mean 17", "--t-mean between"),
    ("--network unet --optimizer muon", "--optimizer muon unet"),
    ("--cond smilling", "--cond smilling smiling,"),
    ("--stride 5", "stride 5 nearest 2, 4"),
    ("--heads 5", "heads"),
    ("--width 1000000000", "overflow"),
    ("--res 4", "--res"),
    ("--steps 0", "--steps"),
    ("--warmup -1", "--warmup"),
    ("--ema 1.5", "--ema"),
    ("--lr inf", "--lr"),
    ("--t-mean nan", "--t-mean"),
    ("--seed -1", "--seed"),
    ("--seed 18446744073709551616", "--seed"),
    ("--predict score", "--predict"),
    ("--device tpu", "tpu cpu"),
    ("--out file.txt/x", "--out file.txt is a file"),
    ("--resume", "ckpt.pt --out"),
])
def test_train_refuses_what_cannot_work_before_anything_slow(flags, words, capsys):
    Path("file.txt").write_text("old")
    refuses(capsys, words, train.main, ["--device", "cpu", *shlex.split(flags)])
    assert not Path("out").exists()


def test_a_batch_that_does_not_split_among_the_processes_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refuses(capsys, "WORLD_SIZE torchrun", train_moons, "")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    for rank in ("2", "-1", "x", ""):
        monkeypatch.setenv("RANK", rank)
        refuses(capsys, "RANK torchrun", train_moons, "")
    monkeypatch.setenv("RANK", "1")
    refuses(capsys, "--batch 31 2 processes", train_moons, "--batch 31")
    refuses(capsys, "--shortcut --batch 2 --batch 4 or more", train_moons, "--shortcut --batch 2")


def test_classes_are_learnt_all_or_not_at_all(capsys):
    make_pictures(Path("plain"), 3)
    refuses(capsys, "--cond all no labels", train_faces, "--data plain --cond all")
    make_pictures(Path("plain/dog"), 3)
    make_pictures(Path("plain/cat"), 3)
    refuses(capsys, "--cond dog all", train_faces, "--data plain --cond dog")


def test_resume_refuses_what_would_give_the_weights_another_meaning(capsys):
    train_moons("--steps 20")
    before = Path("out/moons/ckpt.pt").read_bytes()
    for flags in ("--data spirals", "--res 16", "--predict x", "--path cosine", "--network unet", "--patch 2",
                  "--stride 2", "--width 24", "--depth 2", "--heads 2", "--norm derf", "--optimizer muon",
                  "--cond all"):
        args = f"--out out/moons --steps 30 --resume {flags}"
        refuses(capsys, f"{flags}: trained with --out", train.main, args.split())
    assert Path("out/moons/ckpt.pt").read_bytes() == before


def test_resume_refuses_a_finished_run_a_lost_state_and_a_damaged_file(capsys):
    train_moons("--steps 20")
    refuses(capsys, "20 already --steps 40", train_moons, "--steps 20 --resume")
    refuses(capsys, "stable.pt from before step 3", train_moons, "--steps 21 --cooldown 0.9 --resume")
    Path("out/moons/stable.pt").unlink()
    refuses(capsys, "no stable.pt --out", train_moons, "--steps 1000 --resume")
    file, newer = Path("out/moons/ckpt.pt"), state("out/moons")
    half = file.read_bytes()[:10_000]
    newer["config"]["newer_name"] = 1
    torch.save(newer, file)
    refuses(capsys, "another version --out", train_moons, "--steps 30 --resume")
    torch.save({"weights": {}}, file)
    for content in (file.read_bytes(), half, b"nonsense", b""):
        file.write_bytes(content)
        refuses(capsys, "not a checkpoint", train_moons, "--steps 30 --resume")
        refuses(capsys, "not a checkpoint", sampled, "out/moons")


def test_resume_refuses_data_that_are_no_longer_the_same(capsys):
    make_pictures(Path("pets/cats"), 8)
    make_pictures(Path("pets/dogs"), 9)
    train_faces("--data pets --cond all --steps 1")
    resume = "--data pets --steps 2 --resume"
    Path("pets/dogs").rename("pets/ants")  # as many labels, but cats would be called ants
    refuses(capsys, "labels --out", train_faces, resume)
    Path("pets/cats").rename("pets/dogs")  # swapped
    Path("pets/ants").rename("pets/cats")
    refuses(capsys, "labels --out", train_faces, resume)
    make_pictures(Path("pets/dogs"), 10)
    refuses(capsys, "labels --out", train_faces, resume)


@parametrize("name", ["pets", "pets/", "./pets", "there/pets"])
def test_resume_takes_the_same_pictures_by_another_path(name, capsys):
    make_pictures(Path("pets"), 8)
    train_faces("--data pets --steps 1")
    if name == "there/pets":
        shutil.move("pets", name)
        os.utime(f"{name}/000000.jpg", (0, 0))  # so that they are packed again
    train_faces(f"--data {name} --steps 2 --resume --out out/pets-16")
    assert state("out/pets-16")["step"] == 2
    assert (f"{name} holds the same pictures and labels as pets did" in capsys.readouterr().out) == (name != "pets")


@parametrize("flags,words", [
    ("--to x.bmp", ".png .gif .npy"),
    ("--to folder.png", "folder.png folder of that name"),
    ("--seed -1", "--seed"),
    ("--bpd 999999999999999999999999999999", "--bpd between"),
    ("--bpd 8 --label 0", "--bpd --label"),
    ("--paths", "--paths moons"),
    ("--sweep --label 0 --guidance 2", "--sweep --guidance"),
    ("--sweep --churn 1", "--sweep --churn"),
    ("--guidance 3", "--guidance --label"),
    ("--solver shortcut --steps 4", "not learnt shortcuts train.py --shortcut"),
    ("--solver shortcut --steps 3", "--steps 1, 2, 4, 8, 16"),
    ("--solver shortcut --steps 4 --shift 2", "--solver shortcut --shift"),
    ("--solver shortcut --steps 4 --from a.png", "--solver shortcut --from"),
    ("--guidance 1e38 --label 0", "--guidance between"),
    ("--label 0 --interval 0.9,0.1", "--interval"),
    ("--label 0 --interval 0,nan", "--interval"),
    ("--label dog", "--label dog no labels --cond"),
    ("--interpolate 5 --n 1", "--interpolate"),
    ("--from text.png", "text.png"),
    ("--from a.png --strength 0", "--strength"),
    ("--label 0 --interval 0.5,2", "--interval"),
    ("--inpaint a.png", "--mask"),
    ("--mask a.png", "--inpaint"),
    ("--inpaint a.png --mask black.png", "black.png no hole"),
    ("--inpaint a.png --mask text.png", "text.png"),
    ("--from kept.png", "kept.png would write over"),
    ("--from ./own/00000.png --to own", "would write over own/00000.png"),
    ("--inpaint a.png --mask a.png --invert a.png", "--invert not allowed with"),
])
def test_sample_refuses_what_cannot_work(flags, words, pets_run, capsys):
    save_picture("a.png")
    halves(0, 0, "L").save("black.png")
    Path("text.png").write_text("no picture")
    Path("folder.png").mkdir()
    Path("kept.png").write_text("old")
    refuses(capsys, words, sample.main, [str(pets_run), "--device", "cpu", "--to", "kept.png", *flags.split()])
    assert Path("kept.png").read_text() == "old"


def test_sample_refuses_labels_that_were_not_learnt(labelled_run, capsys):
    refuses(capsys, "--label Bald Smiling, Male", sampled, labelled_run, "--label Bald")


def test_points_are_written_too_but_not_edited_nor_to_a_folder(capsys):
    train_moons("--steps 2")
    assert sampled("out/moons").shape == (2, 2)
    save_picture("a.png")
    refuses(capsys, "a.png points", sampled, "out/moons", "--invert a.png")
    refuses(capsys, "cannot write folder", sampled, "out/moons", "", "folder")
