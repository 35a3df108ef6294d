"""All tests: python -m pytest. About two minutes on two cores; no network, no GPU.

Each holds a property against something that does not share its code: a closed form, a brute-force search, scipy's
distributions, torch's own layers, a second process.
"""

import itertools
import math
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
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
    assert line.splitlines()[-1] and "Traceback" not in line
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
        seen = {}
        fm.loss(lambda z, *_: seen.setdefault("z", z), x, e, torch.full((n,), t, dtype=torch.float64), None, "v", "v")
        slope = (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        fit = scipy.stats.linregress(seen["z"].flatten(), (x - e).flatten())
        assert abs(fit.slope - slope) < 0.02
        assert abs(fit.intercept - (m - slope * t * m)) < 0.02


# ---------------------------------------------------------------------------------------------------------------
# Times and couplings


def test_training_times_are_logit_normal_or_uniform():
    g = torch.Generator().manual_seed(1)
    t = fm.sample_t(20_000, mean=-0.8, generator=g).double()
    assert scipy.stats.kstest(torch.logit(t), "norm", (-0.8, 0.8)).pvalue > 0.01
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


# ---------------------------------------------------------------------------------------------------------------
# Solvers and the sampler


def errors_on_analytic_ode(solver):
    """dz/dt = z cos(2t), z = exp(sin(2t)/2): errors at t = 1 for 20, 40, 80 steps."""
    v = lambda z, t: z * math.cos(2 * t)
    z = torch.ones(1, 1, dtype=torch.float64)
    return [abs(fm.solve(v, z, fm.time_grid(n), solver)[0].item() - math.exp(math.sin(2) / 2)) for n in (20, 40, 80)]


@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2)])
def test_order_of_convergence(solver, order):
    errors = errors_on_analytic_ode(solver)
    for coarse, fine in zip(errors, errors[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


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
    states = []
    v = lambda z, t: torch.full_like(z, 2 * math.pi * math.cos(2 * math.pi * t))
    fm.solve(v, torch.zeros(1, 1), fm.time_grid(100), states=states)
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
    """Claim P14: the residual noise near t = 1, measured as distance from the data of a perfect denoiser."""
    points = 2 * torch.randint(0, 2, (20, 64), dtype=torch.float64) - 1
    net, z, ts = ideal_denoiser(points), torch.randn(50, 64, dtype=torch.float64), fm.time_grid(50)
    clamped = lambda z, t: fm.convert(net(z, torch.full((50,), t, dtype=z.dtype)), "x", "v", z,
                                      torch.full((50,), t, dtype=z.dtype), clamp=fm.CLAMP)
    noise = {name: torch.cdist(fm.solve(v, z, ts)[0], points).min(1).values.square().mean().div(64).sqrt().item()
             for name, v in (("clamped", clamped), ("ours", fm.velocity(net)))}
    assert noise["ours"] < 1e-6 and noise["clamped"] > 0.005, noise


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
    assert torch.allclose(unmasked, z) == (model.overlap(16, patch, stride).max() == 1)


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
    cos, sin = (table.double() for table in model.rope_table(side, d))
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


def small_transformer(**sizes):
    return model.build("transformer", **{**dict(res=16, patch=8, stride=4, width=32, depth=2, heads=2), **sizes})


@pytest.mark.parametrize("attention", model.ATTENTION)
def test_whole_network_does_not_depend_on_how_attention_is_computed(attention):
    torch.manual_seed(1)
    net = small_transformer(attention="hand")
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    other = small_transformer(attention=attention)
    other.load_state_dict(net.state_dict())
    z, t = torch.randn(3, 3, 16, 16), torch.rand(3)
    torch.testing.assert_close(net(z, t), other(z, t), atol=1e-5, rtol=1e-4)


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


def test_the_256_pixel_face_model_has_about_115M_parameters_and_441_tokens():
    config = train.resolve({"data": "celeba", "res": 256})
    with torch.device("meta"):
        net = model.build(**{**train.network(config), "attention": "hand"})
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(115e6, rel=0.01)
    assert net.position.shape == (441, 768)


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
    images, _, _ = data.load("faces", "data", 32)
    whole = train.batch(config, images, 5, 0, 1, torch.device("cpu"))
    parts = [train.batch(config, images, 5, rank, 2, torch.device("cpu")) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([parts[0][0], parts[1][0]]), whole[0])
    assert not torch.equal(parts[0][1], parts[1][1]) and not torch.equal(parts[0][2], parts[1][2])
    again = train.batch(config, images, 5, 1, 2, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(parts[1], again))


@pytest.mark.parametrize("name", data.POINTS)
def test_points_fill_their_shape(name):
    p = data.points(name, 4000, np.random.default_rng(0))
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


def test_resizing_averages_over_area():
    stripes = np.zeros((256, 256), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save("stripes.png")
    assert np.abs(data.read_picture("stripes.png", 16).astype(int) - 128).max() <= 4


def test_folder_is_packed_once_with_sub_folders_as_labels_and_again_when_it_changes(capsys):
    make_pictures(Path("pets/cat"), 3)
    make_pictures(Path("pets/dog"), 2)
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


def test_no_readable_picture_is_refused_and_nothing_half_packed_stays(capsys):
    Path("pets").mkdir()
    Path("pets/bad.png").write_bytes(b"nonsense")
    refused(capsys, lambda: data.load("pets", "data", 16), "none of the 1 pictures")
    assert list(Path("data/cache").iterdir()) == []


def test_a_full_disk_while_packing_leaves_nothing_behind(capsys, monkeypatch):
    make_pictures(Path("pets"), 3)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    refused(capsys, lambda: data.load("pets", "data", 16), "No space left", status=1)
    assert list(Path("data/cache").iterdir()) == []


@pytest.mark.parametrize("shape", ["zip", "folder", "hq", "root"])
def test_celeba_is_found_in_its_usual_shapes(shape):
    place = {"zip": Path("tmp/img_align_celeba"), "folder": Path("data/celeba/img_align_celeba"),
             "hq": Path("data/celeba_hq_256"), "root": Path("data")}[shape]
    make_pictures(place, 5, size=(178, 218))
    if shape == "zip":
        Path("data").mkdir()
        with zipfile.ZipFile("data/img_align_celeba.zip", "w") as archive:
            for p in place.iterdir():
                archive.write(p, f"img_align_celeba/{p.name}")
    assert data.load("celeba", "data", 32)[0].shape == (5, 32, 32, 3)


def test_grid_plot_and_gif_are_pictures_of_the_right_size():
    assert data.grid(np.zeros((5, 32, 32, 3), np.uint8), columns=3).size == ((3 * 34 + 2) * 2, (2 * 34 + 2) * 2)
    assert data.plot({"a": ([1], [0.5]), "b": ([1, 2], [1.0, 0.1])}, "step").size == (720, 420)
    assert data.scatter(np.array([[0, 0], [np.inf, np.nan]])).size == (480, 480)
    data.save_gif("a.gif", [Image.new("RGB", (8, 8), (i * 50, 0, 0)) for i in range(5)])
    assert Image.open("a.gif").n_frames == 5


# ---------------------------------------------------------------------------------------------------------------
# The programs


def state(folder, name="ckpt.pt"):
    return torch.load(Path(folder) / name, weights_only=True)


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
    base = [*MOONS, "--log", "5", "--preview", "10", *extra]
    train.main([*base, "--steps", "20", "--out", "once"])
    train.main([*base, "--steps", "12", "--out", "twice"])
    train.main(["--out", "twice", "--steps", "20", "--resume"])
    assert_same_training(state("once"), state("twice"))
    once, twice = (train.read_log(Path(out)) for out in ("once", "twice"))
    assert float(once[-1]["held_out"]) == float(twice[-1]["held_out"])
    assert [int(r["step"]) for r in twice] == sorted({int(r["step"]) for r in twice})


def test_resuming_pictures_equals_never_stopping_to_the_bit():
    base = ["--res", "16", *TINY, "--preview", "100"]
    train.main([*base, "--steps", "8", "--out", "once"])
    train.main([*base, "--steps", "5", "--out", "twice"])
    train.main([*base, "--steps", "8", "--out", "twice", "--resume"])
    assert_same_training(state("once"), state("twice"))


def test_sigterm_finishes_the_step_saves_and_resume_goes_on_to_the_same_end(quick_w2):
    args = [*MOONS, "--steps", "1200", "--preview", "1200", "--log", "20"]
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


def test_a_new_run_sets_the_old_one_aside(quick_w2):
    args = [*MOONS, "--steps", "3"]
    train.main(args)
    before = Path("out/moons/ckpt.pt").read_bytes()
    train.main([*args, "--seed", "1"])
    assert Path("out/moons/before-1/ckpt.pt").read_bytes() == before != Path("out/moons/ckpt.pt").read_bytes()


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
    monkeypatch.setattr(train, "batch", lambda config, images, step, rank, world, device: [
        torch.cat(parts) for parts in zip(*(original(config, images, step, r, 2, device) for r in (0, 1)))])
    one = train.main([*args, "--out", "one"]).state_dict()
    for k in one:
        torch.testing.assert_close(one[k], rank0[k], atol=1e-4, rtol=0)


def test_moons_train_to_moons_and_w2_is_logged():
    train.main(["--data", "moons", "--device", "cpu", "--steps", "600", "--width", "64", "--cooldown", "0.5"])
    rows = dict(line.split(",") for line in Path("out/moons/w2.csv").read_text().split()[1:])
    assert list(rows) == ["0", "1", "2", "4", "10", "100"]
    assert float(rows["100"]) < 0.8 < float(rows["1"])
    first, last = (float(train.read_log(Path("out/moons"))[i]["loss"]) for i in (0, -1))
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
    often = ["--steps", 4, "--preview", 2, "--log", 1, "--no-bf16"]
    done = command("train.py", "--data", "pets", "--res", 16, *TINY, *often, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_training_leaves_checkpoint_log_curve_and_previews(faces_run):
    folder, said = faces_run
    out = folder / "out/pets-16"
    assert {p.name for p in out.iterdir()} == {"ckpt.pt", "stable.pt", "log.csv", "loss.png", "samples"}
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["000002.png", "000004.png"]
    rows = train.read_log(out)
    assert [r["step"] for r in rows] == ["1", "2", "3", "4"]
    assert all(float(rows[-1][f"t{i}"]) > 0 for i in range(10)) and rows[0]["t0"] == ""
    for word in ("step", "loss", "samples/s", "ETA", "M parameters", "width=32"):
        assert word in said
    assert state(out)["config"]["width"] == 32


@pytest.mark.parametrize("to", ["x.png", "x.gif", "x.npy", "folder"])
def test_samples_are_written_as_the_ending_says(faces_run, to, capsys):
    sample.main([str(faces_run[0] / "out/pets-16"), "--n", "5", "--steps", "3", "--batch", "2", "--to", to])
    said = capsys.readouterr().out
    assert "NFE 5" in said and "samples/s" in said  # Heun: two a step, but one in the last
    if to == "x.npy":
        x = np.load(to)
        assert x.shape == (5, 3, 16, 16) and x.dtype == np.float32
    elif to == "folder":
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
    assert torch.equal(sample.noise(2, (3,), 0, first=3), sample.noise(5, (3,), 0)[3:])


def test_raw_weights_can_be_sampled_and_differ_from_the_average(faces_run):
    run = str(faces_run[0] / "out/pets-16")
    for weights in ("ema", "raw"):
        sample.main([run, "--n", "1", "--steps", "2", "--weights", weights, "--to", f"{weights}.npy"])
    assert not np.array_equal(np.load("ema.npy"), np.load("raw.npy"))


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


def test_bench_prints_rates(capsys):
    train.main(["--res", "16", *TINY, "--bench"])
    said = capsys.readouterr().out
    for word in ("ms/step", "samples/s", "GFLOP/sample", "GFLOP/s", "float32", "bfloat16"):
        assert word in said
    assert not Path("out").exists()


def test_contact_sheet_of_a_dataset(capsys, monkeypatch):
    make_pictures(Path("pets"), 30)
    done = command("data.py", "--data", "pets", "--res", 16)
    assert done.returncode == 0 and Image.open("out/pets-16/data.png").size[0] > 50


@pytest.mark.parametrize("flag", [
    "--predict e", "--loss x", "--path cosine", "--time uniform", "--t-mean 0.5", "--ot", "--lr 0.01", "--warmup 0",
    "--cooldown 0", "--decay 0.5", "--clip 0.001", "--seed 1", "--batch 4", "--no-flip", "--norm derf",
    "--attention fused", "--optimizer adamw", "--no-bf16", "--patch 4", "--stride 8", "--depth 2", "--heads 4",
    "--ema 0.1", "--width 64"])
def test_every_flag_changes_the_training(flag, monkeypatch):
    monkeypatch.setattr(sample, "draw", lambda *_: Image.new("L", (1, 1)))
    monkeypatch.setattr(train, "held_out", lambda *_: [1.0] * 10)
    base = ["--res", "16", "--patch", "8", "--stride", "4", *TINY, "--steps", "5", "--attention", "hand", "--preview", "100"]
    monkeypatch.setattr(train, "PREVIEW_STEPS", 1)
    if flag == "--no-bf16" and not sample.has_bf16(torch.device("cpu")):
        pytest.skip("this CPU does not multiply in bfloat16")
    train.main([*base, "--out", "plain"])
    train.main([*base, *flag.split(), "--out", "other"])
    plain, other = (flat(state(out)["ema"]) for out in ("plain", "other"))
    same = len(plain) == len(other) and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(plain, other))
    assert not same


# ---------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("args,words", [
    (["--stpes", "5"], ["--stpes", "--steps"]),
    (["--data", "nowhere"], ["nowhere", "faces"]),
    (["--data", "celeba", "--res", "256"], ["img_align_celeba.zip", "--root"]),
    (["--stride", "5"], ["stride 5", "nearest that fit: 4, 6"]),
    (["--resume"], ["ckpt.pt", "--out"]),
    (["--predict", "score"], ["--predict"]),
    (["--steps", "many"], ["--steps"]),
    (["--steps", "0"], ["--steps"]),
    (["--batch", "-1"], ["--batch"]),
    (["--heads", "5"], ["heads"]),
    (["--res", "4"], ["--res"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--data", "moons", "--model", "transformer"], ["--model"]),
    (["--ema", "1.5"], ["--ema"]),
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
    refused(capsys, lambda: train.main([*args, "--resume"]), "--steps")
    assert Path("out/moons/ckpt.pt").read_bytes() == before
    Path("out/moons/ckpt.pt").write_bytes(before[: len(before) // 2])
    refused(capsys, lambda: train.main([*args, "--resume"]), "not a checkpoint")


@pytest.mark.parametrize("args,words", [
    (["nowhere"], ["nowhere", "train.py"]),
    (["RUN", "--to", "x.bmp"], [".png", ".gif", ".npy"]),
    (["RUN", "--n", "0"], ["--n"]),
    (["RUN", "--solver", "magic"], ["--solver", "heun"]),
    (["RUN", "--device", "tpu"], ["tpu"]),
], ids=str)
def test_sample_refuses_what_cannot_work(args, words, faces_run, capsys):
    run = str(faces_run[0] / "out/pets-16")
    refused(capsys, lambda: sample.main([run if a == "RUN" else a for a in args]), *words)


def test_sample_refuses_a_file_that_is_no_checkpoint(capsys):
    Path("ckpt.pt").write_bytes(b"nonsense")
    refused(capsys, lambda: sample.main(["."]), "not a checkpoint")
