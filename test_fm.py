"""What each part promises, in the order of the scripts. python -m pytest: about two minutes on two cores.

Each test holds a promise against something that does not share its code: a closed form, a brute-force search, scipy's
distributions, torch's own layers, a second process. No network and no GPU are needed.
"""

import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import math
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import scipy.stats
import torch
import torch.nn.functional as F
from numpy.testing import assert_allclose, assert_array_equal
from PIL import ExifTags, Image, ImageCms, ImageOps
from pytest import approx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import fm
import model
import sample
import train

HERE = Path(__file__).parent
sys.path.append(str(HERE / "assets"))
import figures
CPU = torch.device("cpu")
MOONS = ["--data", "moons", "--device", "cpu", "--width", "16", "--batch", "32"]
TINY = ["--width", "32", "--depth", "1", "--heads", "2", "--batch", "8", "--device", "cpu", "--warmup", "2"]

parametrize = pytest.mark.parametrize
every_path = parametrize("path", fm.PATHS.values(), ids=fm.PATHS)
needs_unix = pytest.mark.skipif(sys.platform == "win32", reason="needs Unix")


@pytest.fixture(autouse=True)
def small_and_alone(tmp_path, monkeypatch):
    """Every test runs in a folder of its own, with few faces and points and short previews, in float32 whatever the
    processor offers, and leaves threads as they were. A process that a test starts knows nothing of this:
    give it --no-bf16."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "has_bf16", lambda device: False)
    monkeypatch.setattr(data, "FACES", 60)
    monkeypatch.setattr(data, "POINTS_DRAWN", 20_000)
    monkeypatch.setattr(train, "PREVIEW_STEPS", 2)
    monkeypatch.setattr(train, "HELD_OUT_PICTURES", 20)
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
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


def write(folder, files):
    """{name: bytes} as files in a folder, which is made."""
    for name, content in files.items():
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def make_pictures(folder, n, size=(40, 30)):
    """n coloured JPEGs, always the same for a given n."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize(size).save(folder / f"{i:06d}.jpg")


def zip_folder(folder, archive):
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        for picture in folder.iterdir():
            file.write(picture, f"{folder.name}/{picture.name}")


def normal(*shape):
    """Standard normal numbers in float64, so that errors are the method's and not those of rounding."""
    return torch.randn(*shape, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: paths, conversions, the loss


def gaussian_flow(path):
    """u(z, s, t): the mean velocity from s to t where the data are N(2, 0.5^2); the velocity at s if t is s. At each
    time z is normal, so the flow shifts and stretches it from one normal distribution to the other."""

    def u(z, s, t):
        s, t = s[:, None].double(), t[:, None].double()
        t = torch.where(s == t, s + 1e-7, t)
        (alpha_s, sigma_s, *_), (alpha_t, sigma_t, *_) = path(s), path(t)
        stretch = torch.hypot(alpha_t / 2, sigma_t) / torch.hypot(alpha_s / 2, sigma_s)
        landed = 2 * alpha_t + stretch * (z - 2 * alpha_s)
        return (landed - z) / (t - s)

    return u


@every_path
def test_a_path_runs_from_noise_to_data_and_its_derivatives_are_right(path):
    """Against differences. The linear path's alpha and sigma sum to 1, the cosine's squares do."""
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    before, now, after = (torch.stack(path(t + step)) for step in (-1e-6, 0, 1e-6))
    assert_close(now[2:], (after - before)[:2] / 2e-6, atol=1e-8, rtol=0)
    assert now[0, [0, -1]].tolist() == [0, 1]
    assert_allclose((now[:2] if path == fm.linear else now[:2] ** 2).sum(0), 1)


@every_path
def test_convert_finds_any_of_x_e_v_from_any_other_and_the_truth_has_loss_0(path):
    x, e = normal(2, 7, 3)
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64)
    _, _, d_alpha, d_sigma = path(t[:, None])
    truth = {"x": x, "e": e, "v": d_alpha * x + d_sigma * e}
    for have, want in itertools.product("xev", repeat=2):
        assert_close(fm.convert(truth[have], have, want, fm.mix(x, e, t, path), t, path), truth[want])
        assert fm.loss(lambda *_: truth[have], x, e, t, None, have, want, path).max() < 1e-20


def test_each_loss_weighs_an_error_as_its_table_says():
    """See `factors`: those of an error at the times 0, 1/2 and 1. None is infinite."""
    x, e, error = normal(3, 3, 5)
    truth = {"x": x, "e": e, "v": x - e}
    table = {"xv": [1, 2, 20], "xe": [0, 1, 20], "ev": [20, 2, 1], "ex": [20, 1, 0], "vx": [1, 0.5, 0],
             "ve": [0, 0.5, 1]}
    for (predict, target), factors in table.items():
        loss = fm.loss(lambda *_: truth[predict] + error, x, e, torch.tensor([0, 0.5, 1]), None, predict, target)
        assert_close(loss, (torch.tensor(factors)[:, None] * error).square().mean(1))


# ---------------------------------------------------------------------------------------------------------------
# fm.py: times and pairs


def test_training_times_are_uniform_or_logit_normal_and_less_noisy_for_smaller_pictures():
    """Averaging 4 x 4 pixels divides the noise by 4. So at 64 pixels the odds of data are 4 times those at 256."""
    t = fm.sample_t(20_000, "uniform")
    assert scipy.stats.kstest(t, "uniform").pvalue > 0.01
    t = fm.sample_t(20_000, "logit-normal", fm.logit_normal_mean(64)).double()
    assert scipy.stats.kstest(torch.logit(t), "norm", (-0.8 + math.log(4), 0.8)).pvalue > 0.01


def test_ot_pair_pairs_by_rank_on_a_line_in_each_group_and_refuses_what_is_not_finite():
    x, e = torch.randn(2, 5, 4)
    paired = fm.ot_pair(x.view(20, 1, 1), e.view(20, 1, 1), group=4).view(5, 4)
    assert torch.equal(paired.gather(1, x.argsort()), e.sort().values)
    with pytest.raises(ValueError, match="finite"):
        fm.ot_pair(x, x / 0, group=4)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: sampling


@parametrize("guidance,t,velocity", [(1, 0.5, 3), (2, 0.05, 3), (2, 0.95, 3), (2, 0.5, 7), (0, 0.5, -1)])
def test_guidance_is_off_at_1_and_outside_its_interval_and_takes_one_batch_inside(guidance, t, velocity):
    batches = []

    def net(z, t, y, length):  # its velocity is the label, 3, or -1 where the label is hidden
        batches.append(len(z))
        return z * 0 + y[:, None]

    y = torch.full((4,), 3)
    v = fm.velocity(net, "v", y=y, y_null=y - 4, guidance=guidance, interval=(0.1, 0.9))
    for times in [(t,), (t - 0.05, t + 0.05)]:  # a shortcut counts by its middle
        assert (v(torch.zeros(4, 2), *times) == velocity).all()
    assert batches == 2 * [4 if velocity == 3 else 8]


@parametrize("predict,mean,std", [("x", 2, 0.5), ("v", 2, 0.5), ("e", 1.974, 0.513)])
def test_a_perfect_prediction_carries_noise_to_a_gaussian(predict, mean, std):
    """The flow to N(2, 0.5^2) is affine, so where -1 and 1 land says where all noise does. An e-prediction starts too
    slowly: the numbers that `velocity` states."""
    u = gaussian_flow(fm.linear)
    v = fm.velocity(lambda z, t, *_: fm.convert(u(z, t, t), "v", predict, z, t), predict)
    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x, _ = fm.solve(v, z, fm.time_grid(200), fm.heun, end_euler=True)
    assert x.flatten().tolist() == approx([mean - std, mean + std], abs=1e-3)


@parametrize("solver", fm.SOLVERS)
def test_half_the_step_divides_the_error_by_two_to_the_order_and_evaluations_are_counted(solver):
    """dz/dt = -2 t z^2 has the solution 1 / (1 + t^2). dopri5 takes steps of its own, and a shortcut is exact."""
    z, calls = torch.ones(1, 1, dtype=torch.float64), []

    def v(z, s, t=None):
        calls.append(s)
        t = s if t is None else t
        return -(s + t) * z**2 / (1 + (t**2 - s**2) * z)

    (coarse, few), (fine, many) = (fm.solve(v, z, fm.time_grid(n), fm.SOLVERS[solver]) for n in (40, 80))
    assert few + many == len(calls)
    order = {"euler": 1, "heun": 2, "midpoint": 2, "rk4": 4}.get(solver)
    if order:
        assert math.log2((coarse - 0.5) / (fine - 0.5)) == approx(order, abs=0.15)
    else:
        assert coarse.item() == approx(0.5, abs=1e-7)


def test_dopri5_heeds_its_tolerance_and_says_when_it_cannot_go_on():
    """dz/dt = z^2 has the solution 1 / (1 - t), which ends at t = 1."""
    start = torch.ones(1, dtype=torch.float64)
    for tol in (1e-3, 1e-7):
        error = fm.dopri5(lambda z, t: z**2, start, 0, 0.5, tol) - 2
        assert 0.01 * tol < abs(error) < 10 * tol
    with pytest.raises(FloatingPointError, match="no step is short enough at t = 1.0"):
        fm.dopri5(lambda z, t: z**2, start, 0, 2)


def test_a_shifted_time_grid_divides_the_odds_and_keeps_the_ends():
    plain, shifted = fm.time_grid(10), fm.time_grid(10, shift=3)
    assert plain == approx(np.arange(11) / 10)
    assert_allclose(scipy.special.logit(shifted), scipy.special.logit(plain) - math.log(3))


@every_path
def test_inpainting_keeps_what_is_known_and_every_state_on_the_path(path):
    """For data that are always 2, z at time t is normal with mean 2 alpha(t) and standard deviation sigma(t)."""
    x, hole, states = torch.full((20_000, 2), 2.0), torch.tensor([True, False]), []
    v = fm.velocity(lambda *_: x, path=path)
    z, nfe = fm.inpaint(v, torch.randn_like(x), x, hole, lambda: torch.randn_like(x), fm.time_grid(4), path, fm.rk4,
                        end_euler=True, states=states, repeats=3)
    assert nfe == 39  # three times 4 + 4 + 4 + 1
    assert_close(z[:, 1], x[:, 1])
    alpha, sigma, _, _ = path(torch.tensor(0.5))
    assert_allclose(states[1].mean(0), 2 * alpha, atol=0.03)
    assert_allclose(states[1].std(0), sigma, rtol=0.03)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: shortcuts


def test_shortcuts_are_steps_of_the_grids_of_1_to_16_steps_each_grid_equally_often():
    *times, shortest = fm.sample_shortcuts(100_000, shift=3)
    s, m, t = (3 * time / (1 + 2 * time) for time in times)  # the times before the shift
    assert_close(m, (s + t) / 2)
    steps = (1 / (t - s)).round()
    assert torch.equal(shortest, steps == 16)
    kinds, counts = (steps + s).round(decimals=4).unique(return_counts=True)
    assert kinds.tolist() == approx([n + i / n for n in (1, 2, 4, 8, 16) for i in range(n)])
    assert_allclose(counts * kinds.floor(), 20_000, rtol=0.1)


@every_path
def test_one_pass_learns_the_flow_and_shortcuts_which_land_where_two_of_the_teachers_do(path):
    """The teacher is the exact flow, and the student's error is known. Two shortcuts of the exact flow land where one
    does, but the shortest kind is learnt from velocities, which have no length. y numbers the samples."""
    u, asked = gaussian_flow(path), []
    x, e, error, jitter = normal(4, 300, 3)
    t, y = torch.rand(300), torch.arange(300)
    shortcuts = fm.sample_shortcuts(200, 3)
    shortest = shortcuts[3]

    def teacher(z, t, y, length):
        asked.append((y, length == 0))
        return fm.convert(u(z, t, t + length), "v", "x", z, t, path)

    def student(z, t, y, length=0 * t):
        return teacher(z - jitter[y], t, y, length) + error[y]

    flow, jumps = fm.loss_with_shortcuts(student, teacher, x, e, t, shortcuts, y, path=path, jitter=jitter)
    assert_close(asked, [(y, y < 100), (y[100:], shortest), (y[100:], shortest)])
    assert_close(flow, fm.loss(student, x, e, t, y, path=path, jitter=jitter)[:100])
    assert_close(jumps[~shortest], error[100:].square().mean(1)[~shortest], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------
# fm.py: likelihood and distances


def test_the_likelihood_is_its_closed_form_and_the_mean_over_orthogonal_signs():
    """A linear flow dz/dt = A z takes expm(-A) x to x, and the density on the way falls by the trace of A."""
    A, x = normal(4, 4) / 4, normal(4)
    e = scipy.linalg.expm(-A) @ x.numpy()
    exact = scipy.stats.norm.logpdf(e).sum() - A.trace().item()
    for probe in (None, torch.from_numpy(scipy.linalg.hadamard(4)).double()):
        log_p, _ = fm.log_likelihood(lambda z, t: z @ A.T, x.expand(4, 4), fm.time_grid(20)[::-1], probe)
        assert log_p.mean().item() == approx(exact, abs=1e-6)


@every_path
@parametrize("levels,entropy", [([127], 0), ([255], 0), ([0, 0, 0, 0, 1, 1, 200, 255], 1.75)], ids=str)
def test_bits_of_pictures_with_known_probabilities_are_bounded_by_little_more_than_the_entropy(path, levels, entropy):
    """The levels listed are equally likely, in each of a picture's two numbers. The best x-prediction is the posterior
    mean. A picture that is known beforehand takes no bits."""
    levels = torch.tensor(levels).double() / 127.5 - 1
    x = levels.repeat(256).view(-1, 1, 2)

    def net(z, t, *_):
        alpha, sigma, _, _ = path(t[0])
        log_posterior = -(z[..., None] - alpha * levels).square() / (2 * sigma**2)
        return log_posterior.softmax(dim=-1) @ levels

    v = fm.velocity(net, path=path)
    bits, nfe = fm.bits_per_dimension(v, x, torch.randn_like(x), torch.randn_like(x).sign(), 0.9995, 50, path)
    assert nfe == 200 and bits.mean().item() == approx(entropy, abs=0.05)


def test_w2_of_a_shifted_cloud_is_the_shift_and_of_a_broken_one_infinite():
    a = torch.randn(100, 2)
    assert fm.w2(a, a[torch.randperm(100)] + torch.tensor([3.0, 4.0])) == approx(5)
    assert fm.w2(a, a / 0) == math.inf


def test_the_frechet_distance_is_its_formula_also_with_fewer_vectors_than_numbers_in_each():
    a, b = normal(4, 5) @ normal(5, 5), 1 + normal(200, 5) @ normal(5, 5)
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.abs(np.linalg.eigvals(cov_a @ cov_b)))  # abs: two are 0, up to rounding
    means = (a.mean(0) - b.mean(0)).square().sum().item()
    assert fm.frechet(a, b) == approx(means + np.trace(cov_a + cov_b) - 2 * roots.sum(), abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# model.py

SMALL = {"transformer": dict(res=16, patch=4, stride=4, width=32, depth=1, heads=2),
         "unet": dict(res=16, channels=3, width=16, depth=1, heads=2), "mlp": dict(width=16)}


def small(kind, **sizes):
    """A small network whose weights are no longer those of the start, where much is zero."""
    net = model.build(kind, **SMALL[kind] | sizes)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return net


def test_the_time_embedding_tells_nearby_times_apart():
    assert F.pdist(model.sinusoidal(torch.linspace(0, 1, 1001), 256)).min() > 0.5


def test_labels_are_rows_of_a_table_and_a_hidden_label_has_a_row_of_its_own():
    condition = model.Condition(5, 3, False)
    rows, attributes = condition.rows, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1]])
    some = model.hide(attributes, torch.tensor([False, False, True]))
    assert_close(condition.label(some), torch.stack([rows[0] + rows[2], 0 * rows[0], rows[3]]))
    assert_close(condition.label(torch.tensor([0, 2, -1])), rows[[0, 2, 3]])
    assert torch.equal(condition.label(None), rows[3])


@parametrize("kind", SMALL)
def test_time_matters_to_all_and_a_shortcuts_length_to_those_that_learn_it_and_0_is_the_flow(kind):
    z, t = torch.randn(4, *((2,) if kind == "mlp" else (3, 16, 16))), torch.full((4,), 0.5)
    for learns in (False, True):
        net = small(kind, shortcut=learns)
        flow = net(z, t)
        assert not torch.equal(net(z, t / 2), flow)
        assert torch.equal(net(z, t, None, 0 * t), flow)
        assert torch.equal(net(z, t, None, t), flow) != learns


@parametrize("kind,changes,words", [
    ("transformer", dict(res=256, patch=16, stride=13), "--stride 13 .* nearest that fit: 12, 15"),
    ("transformer", dict(stride=6), "--stride 6 does not fit --patch 4"),
    ("transformer", dict(heads=16), "--heads 16"),
    ("unet", dict(heads=7), "--heads 7"),
    ("unet", dict(res=30), "--res 30"),
    ("unet", dict(width=20), "--width 20")], ids=str)
def test_sizes_that_do_not_fit_together_are_refused_in_the_flags_words(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        model.build(kind, **SMALL[kind] | changes)


@parametrize("patch,stride", [(4, 4), (6, 2), (16, 1)])
def test_unpatchify_puts_together_what_patchify_cut_out(patch, stride):
    z = torch.randn(2, 3, 16, 16)
    patches = model.patchify(z, patch, stride)
    assert torch.equal(patches[:, 0], z[:, :, :patch, :patch].flatten(1))
    assert_close(model.unpatchify(patches, 16, patch, stride), z)


def test_where_patches_overlap_one_fades_into_the_next_and_no_edge_shows():
    """White patches and black ones in turn: a plain mean would jump by half at each rim."""
    patches = (torch.arange(81) % 2.0)[None, :, None].expand(1, 81, 32**2)
    row = model.unpatchify(patches, 256, 32, 28)[0, 0, 16]  # the middle of the first row of patches
    assert_close(row[27:33], torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1]))


def test_the_norms_and_swiglu_are_torchs_or_their_papers():
    h = 5 * torch.randn(4, 7, 48)
    rms, derf, swiglu = model.RMSNorm(48), model.Derf(48), model.SwiGLU(48)
    for weight in [*rms.parameters(), *derf.parameters()]:
        weight.data += torch.randn_like(weight)
    assert_close(rms(h, 3), F.rms_norm(h, (48,), rms.weight * 3, 1e-6))
    assert_close(derf(h, 3), 3 * (derf.gamma * torch.erf(derf.alpha * h + derf.s) + derf.beta))
    gate = swiglu.gate(h)
    assert_close(swiglu(h), swiglu.down(gate * gate.sigmoid() * swiglu.up(h)))


def test_attention_equals_torchs():
    q, k, v = normal(3, 2, 3, 9, 8)
    for attend in model.ATTENTION.values():
        assert_close(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_attention_compares_directions_turned_by_how_far_apart_two_tokens_lie():
    """All tokens are equal, and so are all queries and keys. Of the four pairs of numbers in each, two turn with the
    row and two with the column, by frequencies of 1 and 1/10. A turn by an angle multiplies a pair's product by the
    angle's cosine."""
    attention, h = model.Attention(3, 8, 1, "hand"), torch.randn(8)
    attention.q.weight.data = attention.k.weight.data = torch.eye(8)
    attention.out = torch.nn.Identity()
    attention.attend = lambda q, k, v: q @ k.mT
    down, across = (place - place[:, None] for place in (torch.arange(9) // 3, torch.arange(9) % 3))
    angle = torch.stack([down, down / 10, across, across / 10], dim=2)
    products = F.rms_norm(h, (8,)).square().view(2, 4).sum(0)
    assert_close(attention(h.expand(1, 9, 8))[0], (products * angle.cos()).sum(2), atol=1e-4, rtol=0)


def test_each_scale_and_gate_of_a_block_acts_on_its_own_branch():
    """A scale of -1 lets nothing into its branch, a gate of 0 nothing out. At the start all gates are 0."""
    block, h, c = model.Block(2, 16, 2, "rms", "hand"), torch.randn(1, 4, 16), torch.randn(1, 16)
    assert torch.equal(block(h, c), h)
    rows = [(-1, 1, 0, 0, True), (0, 0, -1, 1, True), (-1, 0, 0, 1, False), (0, 1, -1, 0, False)]
    for *modulation, same in rows:  # scale and gate of the attention, scale and gate of the feed-forward layer
        block.modulation.bias.data = torch.tensor(modulation).float().repeat_interleave(16)
        assert torch.equal(block(h, c), h) == same


def test_the_transformer_knows_where_in_the_picture_a_patch_lies():
    """All patches of a flat picture are equal, and attention over equal tokens cannot tell them apart."""
    out = small("transformer")(torch.ones(1, 3, 16, 16), torch.rand(1))
    assert F.pdist(model.patchify(out, 4, 4)[0]).min() > 0.1


def test_the_unet_passes_on_what_each_level_computed_and_gives_a_pixel_its_own_token():
    net, given, out = small("unet"), {}, {}
    net.attention = torch.nn.Identity()

    def note(module, inputs, output):
        given[module], out[module] = inputs[0], output

    for module in net.children():
        module.register_forward_hook(note)
    net(torch.randn(2, 3, 16, 16), torch.rand(2))
    assert torch.equal(given[net.up1][:, 16:], out[net.down1])
    assert torch.equal(given[net.up2][:, 32:], out[net.down2])
    assert_close(given[net.up3], out[net.down3] + out[net.norm3])


@parametrize("kind,changes", [("transformer", {}), ("transformer", dict(norm="derf")), ("unet", {})], ids=str)
def test_every_parameter_learns(kind, changes):
    """All start from grey, but for Derf, and wake up one after the other."""
    net = model.build(kind, **SMALL[kind], **changes, labels=3, shortcut=True)
    x, y, t = torch.randn(6, 3, 16, 16), torch.arange(6) % 3, torch.full((6,), 0.5)
    assert (net(x, t, y) == 0).all() == (not changes)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (net(x, t, y, t) - x).square().mean().backward()
        optimizer.step()
    for name, weight in net.named_parameters():
        assert weight.grad.abs().max() > 0, name


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
    x = data.to_tensor(pixels, CPU)
    assert x.shape == (2, 3, 8, 16) and x.min() == -1 and x.max() == 1
    for less_than_half_a_level in (-0.003, 0.003):
        assert (data.to_uint8(x + less_than_half_a_level) == pixels).all()
    assert_array_equal(data.to_uint8(999 * x), np.where(pixels < 128, 0, 255))  # beyond 1 there is nothing brighter


# ---------------------------------------------------------------------------------------------------------------
# data.py: which dataset it is, and packing


def encoded(im, kind, **how):
    """The bytes of a picture file."""
    file = io.BytesIO()
    im.save(file, kind, **how)
    return file.getvalue()


def picture(shade=0):
    """A small one, of the same length whatever is on it."""
    return encoded(Image.new("L", (8, 8), shade), "BMP")


in_both = parametrize("zipped", [False, True], ids=["folder", "zip"])


def make_dataset(files, zipped):
    """A folder or zip of {name: bytes}; returns its path."""
    write("pets", files)
    return shutil.make_archive("pets", "zip", "pets") if zipped else "pets"


def test_a_folder_is_packed_once_into_cache_alone_and_again_when_a_file_changes(capsys):
    write("pets", {"a.bmp": picture(0), "b.bmp": picture(9)})
    for time, packs in ((1, True), (1, False), (2, True)):
        os.utime("pets/a.bmp", (time, time))
        images, _, _, _ = data.load("pets", res=16)
        said = capsys.readouterr().out
        assert ("packing" in said) == packs and ("left by a run that was killed" in said) == (time == 2)
        write("cache", {".part-1-a": b""})
    assert images.shape == (2, 16, 16, 3) and images[1].max() == 9
    assert {*os.listdir()} == {"pets", "cache"} and len(os.listdir("pets")) == 2


def test_a_dataset_is_told_by_names_sizes_and_labels_wherever_it_lies_and_whatever_its_pixels():
    contents = []
    write("pets", {"cat/a.bmp": picture(), "dog/b.bmp": picture()})
    for change in (lambda: None, lambda: shutil.move("pets", "there/pets"),
                   lambda: write("there/pets", {"cat/a.bmp": picture(9)}),
                   lambda: os.rename("there/pets/cat/a.bmp", "there/pets/cat/c.bmp"),
                   lambda: write("there/pets", {"cat/c.bmp": picture() + b"more"})):
        change()
        *_, content = data.load("there/pets" if contents else "pets", res=8, cond="all")
        contents.append(content)
    assert contents[0] == contents[1] == contents[2] and len({*contents}) == 3


def test_packing_tells_how_long_it_will_take_at_most_every_five_seconds(capsys, monkeypatch):
    monkeypatch.setattr(data, "time", Namespace(perf_counter=itertools.count(0, 3).__next__))
    write("pets", {f"{i}.bmp": picture() for i in range(4)})  # 3 seconds each
    data.load("pets", res=8)
    said = capsys.readouterr().out.split("\n", 1)[1]
    assert said == "  2 of 4 pictures  0.3 pictures/s  ETA 0:00:06\n  4 pictures\n"


def test_every_one_of_many_pictures_keeps_its_own_label():
    write("pets", {f"{i % 3}/{i}.bmp": picture(i % 3 * 100) for i in range(1100)})
    images, labels, _, _ = data.load("pets", res=8, cond="all")
    assert len(images) == 1100
    assert_array_equal(images[:, 0, 0, 0], labels * 100)


@parametrize("error,words", [
    (ValueError("odd"), "none of the 3 pictures"),
    (PermissionError(13, "not yours"), "none of the 3 pictures"),
    (OSError(5, "just now"), "just now"),  # which is no reason to leave a picture out for ever
    (SystemExit(143), "143"),
], ids=["broken", "forbidden", "unreadable", "ended"])
def test_packing_that_fails_leaves_nothing(error, words, monkeypatch):
    def read_picture(file, res, channels):
        raise error

    monkeypatch.setattr(data, "read_picture", read_picture)
    make_pictures(Path("pets"), 3)
    with pytest.raises(BaseException, match=words):
        data.load("pets")
    assert os.listdir("cache") == []


@needs_unix
def test_a_full_disk_while_packing_is_told_in_a_line_and_leaves_nothing_behind():
    import resource

    make_pictures(Path("pets"), 9)

    def small_files_only():  # stands in for a small disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))

    done = command("data.py", "--data", "pets", preexec_fn=small_files_only)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "too large" in done.stderr
    assert os.listdir("cache") == [] and not Path("out/pets-32/data.png").exists()


def test_too_little_space_is_told_before_packing(monkeypatch):
    monkeypatch.setattr(data, "disk_usage", lambda folder: Namespace(free=10**5))
    with pytest.raises(OSError, match="needs 0.4 GB.* 0.0 are free.*--cache"):
        data.load("faces", res=4096)  # of which only 8 are drawn


@parametrize("ending,size", [("images", 2 * 32 * 32 * 3), ("images", 0), ("npz", 0)])
def test_a_damaged_pack_is_refused_with_a_command_that_helps(ending, size):
    make_pictures(Path("my pets"), 3)
    data.load("my pets")
    os.truncate(next(Path("cache").glob(f"*.{ending}")), size)
    with pytest.raises(ValueError, match="damaged.* anew after rm ") as refusal:
        data.load("my pets")
    os.remove(shlex.split(str(refusal.value))[-1])
    assert len(data.load("my pets")[0]) == 3


# ---------------------------------------------------------------------------------------------------------------
# data.py: what a folder or zip holds


@in_both
@parametrize("names,classes,label_names,words", [
    ("cat/a.bmp dog/b.bmp", "cat dog", "cat dog", ": cat (1), dog (1)"),
    ("cafe\u0301/a.bmp caf\xe9/b.bmp dog/c.bmp", "caf\xe9 caf\xe9 dog", "caf\xe9 dog", ""),
    ("test/cat/a.bmp train/cat/b.bmp train/dog/a.bmp", "cat cat dog", "cat dog", "cat (2)"),
    ("10/a.bmp 2/b.bmp x/c.bmp", "10 2 x", "2 10 x", ""),
    ("a.bmp cat/b.bmp", "pets cat", "cat pets", ""),
    ("ant/empty.bmp cat/a.bmp dog/b.bmp", "cat dog", "cat dog", "skipped 1 of 3"),
    ("README cat/a.BMP cat/b.TXT dog/c.bmp dog/c.txt", "cat dog", "cat dog", ": 2 .txt, 1 without an ending"),
    (".a.bmp .git/a.bmp @eaDir/a.bmp __MACOSX/a.bmp $RECYCLE.BIN/a.bmp cat/Thumbs.db cat/.c.bmp "
     "cat/a.bmp dog/b.bmp", "cat dog", "cat dog", ""),
], ids=["plain", "accents", "train and test", "numbers", "top", "broken", "others", "hidden"])
def test_a_class_is_the_folder_that_its_pictures_lie_in(names, classes, label_names, words, zipped, capsys):
    files = {name: b"" if "empty" in name else picture() for name in names.split()}
    _, labels, got, _ = data.load(make_dataset(files, zipped), res=8, cond="all")
    assert [got[label] for label in labels] == classes.split() and got == label_names.split()
    said = capsys.readouterr().out
    assert words in said and ("left out of" in said) == ("txt" in words)


@parametrize("names,words", [("all/a.bmp b/c.bmp", "'all'"), ("a,b/a.bmp b/c.bmp", "'a,b'"),
                             ("b/c.bmp \xa0/a.bmp", "'\xa0'")])
def test_a_class_that_no_flag_could_name_is_refused(names, words):
    with pytest.raises(ValueError, match=words):
        data.load(make_dataset({name: picture() for name in names.split(" ")}, False), res=8, cond="all")


def test_a_label_of_which_nothing_is_left_to_learn_from_is_refused():
    few = np.zeros(20, np.int64)
    few[data.split(20)[1]] = 1  # the only one that is held out
    for labels, cond in ((few, "all"), (np.stack([1 - few, few], 1), "b")):
        with pytest.raises(ValueError, match="label b"):
            data.choose_labels(labels, ["a", "b"], cond)


@needs_unix
def test_links_are_followed_but_not_in_circles(capsys):
    write("pets", {"cat/a.bmp": picture()})
    write("elsewhere", {"b.bmp": picture(255)})
    for link, target in (("pets/dog", "elsewhere"), ("pets/cat/circle", "pets"), ("pets/gone.bmp", "nowhere")):
        Path(link).symlink_to(Path(target).absolute())
    images, _, names, _ = data.load("pets", res=8, cond="all")
    assert names == ["cat", "dog"] and images[:, 0, 0, 0].tolist() == [0, 255]
    said = capsys.readouterr().out
    assert "left out: pets/cat/circle, a folder that was seen" in said and "left out: pets/gone.bmp, a link" in said


def test_celeba_hq_is_preferred_where_the_aligned_pictures_would_be_enlarged():
    for place in ("img_align_celeba", "CelebAMask-HQ/CelebA-HQ-img"):
        make_pictures(Path("data", place), 1)
    found = [data.find_celeba(Path("data"), res).name for res in (64, 256)]
    assert found == ["img_align_celeba", "CelebA-HQ-img"]


@parametrize("place", ["img_align_celeba.zip", "celeba/img_align_celeba", "celeba_hq_256"])
def test_celeba_is_found_in_its_usual_shapes_with_its_attributes(place, capsys):
    place, contents = Path("data", place), []
    make_pictures(place.with_suffix(""), 3)
    if place.suffix:
        zip_folder(place.with_suffix(""), place)
    for first in ("1 -1", "-1 1"):
        table = f"3\nSmiling Bald\n000000.jpg {first}\n000001.jpg  -1 -1\n000002.jpg  1  1\n"
        (place.parent / "list_attr_celeba.txt").write_text(table)
        images, labels, names, content = data.load("celeba", res=16, cond="Bald, Smiling")
        contents.append(content)
    assert images.shape == (3, 16, 16, 3) and f"from {place} into" in capsys.readouterr().out
    assert labels.tolist() == [[1, 0], [0, 0], [1, 1]] and names == ["Bald", "Smiling"]
    assert contents[0] != contents[1]


@parametrize("table,cond,words", [
    ("", "", "list_attr_celeba.txt"),
    ("9\nHat Male\n000000.jpg 1", "", "list_attr_celeba.txt .*000000.jpg"),
    ("9\nHat Male\n000000.jpg 1 1", "hat", "--cond hat: .*Hat, Male"),
    ("9\nHat Male\n000000.jpg 1 1", "Hat,Hat", "--cond Hat: .*each once"),
    (None, "all", "--cond all: .*no labels"),
], ids=["empty", "short", "unknown", "twice", "none"])
def test_attributes_that_are_not_there_are_refused(table, cond, words):
    make_pictures(Path("data/img_align_celeba"), 1)
    if table is not None:
        Path("data/list_attr_celeba.txt").write_text(table)
    with pytest.raises(ValueError, match=words):
        data.load("celeba", cond=cond)


# ---------------------------------------------------------------------------------------------------------------
# data.py: points and faces

turn = np.arange(1, 65) / 64
half_circle, spiral = 3 * np.exp(1j * np.pi * turn), 4 * np.sqrt(turn) * np.exp(3j * np.pi * np.sqrt(turn))
fields = [-3 - 3j, -3 + 1j, -1 - 1j, -1 + 3j, 1 - 3j, 1 + 1j, 3 - 1j, 3 + 3j]


@parametrize("name,centres,reach", [
    ("moons", [*(half_circle - 1 - 1j), *(half_circle.conj() + 2 + 0.5j)], 0.7),
    ("8gaussians", 4 * np.exp(1j * np.pi / 4 * np.arange(8)), 1.3), ("checkerboard", fields, 1.42),
    ("spirals", [*spiral, *-spiral], 0.6)], ids=data.POINTS)
def test_points_fill_their_shape_and_nothing_else(name, centres, reach):
    """The shape as some of its points, with y as the imaginary part: all drawn points lie near one, and all are hit."""
    p = data.points(name, 4000, seed=0).numpy() @ [1, 1j]
    distance = abs(p - np.array(centres)[:, None])
    assert (distance.min(0) <= reach).mean() > 0.999
    assert np.bincount(distance.argmin(0), minlength=len(centres)).min() > 1000 / len(centres)


def test_a_face_depends_on_its_index_alone_and_looks_alike_at_every_resolution():
    images, labels, _, _ = data.load("faces", res=64, cond="all")  # drawn in several pieces
    for i in (5, 59):
        image, label = data.draw_faces([i], 64)
        assert (images[i] == image).all() and (labels[i] == label).all()
        small, small_label = data.draw_faces([i], 16)
        shrunk = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 6 and (label == small_label).all()


def test_an_attribute_shows_where_its_name_says():
    """Faces with it and faces without it differ at this one of 32 x 32 pixels as much as anywhere."""
    pixels, labels = data.draw_faces(range(400), 32)
    for line in ("smiling 23 19", "open_mouth 25 15", "glasses 16 16", "hat 3 16", "beard 24 4", "long_hair 27 26",
                 "curly_hair 16 1", "blond 6 16"):
        name, row, column = line.split()
        grey, has = pixels.mean(3), labels[:, data.FACE_ATTRIBUTES.index(name)] == 1
        a, b = grey[has], grey[~has]
        gap = np.abs(a.mean(0) - b.mean(0)) / (a.std(0) + b.std(0) + 1)
        assert gap[int(row), int(column)] > 0.8 * gap.max() and min(len(a), len(b)) > 20, name


# ---------------------------------------------------------------------------------------------------------------
# data.py: pictures in. A corpus of small files, each of its own kind


def halves(left, right, mode="RGB", size=(16, 16)):
    """A picture of two colours, side by side."""
    im = Image.new(mode, size, right)
    im.paste(left, (0, 0, size[0] // 2, size[1]))
    return im


def stripes(width, kind):
    """64 x 64 pixels, white and black in turn."""
    return encoded(Image.fromarray(np.tile(np.uint8([255] * width + [0] * width), (64, 32 // width))), kind, quality=95)


def swapped_profile():
    """sRGB's profile with the primaries red and green in each other's place: red looks green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = profile.index(b"rXYZ"), profile.index(b"gXYZ")
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    return bytes(profile)


RED, GREEN, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3, (0,) * 3, (128,) * 3
red_blue, deep, inks = halves(RED, BLUE), halves(0, 32896, "I;16"), halves((0, 255, 255, 0), (0, 0, 0, 255), "CMYK")
indexed, exif, swapped = halves(0, 1, "P"), Image.Exif(), swapped_profile()
indexed.putpalette([*RED, *BLUE])
exif[ExifTags.Base.Orientation] = 6

# name of the file: (its bytes, what the left and the right half must look like, what is said of it if anything)
CORPUS = {
    "grey.png": (encoded(halves(0, 128, "L"), "PNG"), BLACK, GREY),
    **{f"kind.{ending}": (encoded(red_blue, kind), RED, BLUE) for ending, kind in {
        "PNG": "PNG", "jfif": "JPEG", "tiff": "TIFF"}.items()},
    # transparency turns white: an alpha channel, a palette's, a transparent colour
    "half.png": (encoded(halves((*RED, 255), (*BLACK, 127), "RGBA"), "PNG"), RED, GREY),
    "palette.png": (encoded(indexed, "PNG", transparency=b"\xff\0"), RED, WHITE),
    "colour.png": (encoded(red_blue, "PNG", transparency=BLUE), RED, WHITE),
    # 16 bits, of which Pillow writes grey alone: the other two are built by hand
    "deep-grey.png": (encoded(deep, "PNG"), BLACK, GREY),
    "deep-grey-alpha.png": (bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000010000000101004000000e56aeba90000001b49444154789c636868f8ff1f1f662004460d"
        "183560d480e16200009bff7f105ef5e51e0000000049454e44ae426082"), GREY, WHITE),
    "deep-rgb.png": (bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000010000000101002000000c001b4750000002349444154789c63f8ff9f0108882741a0a181"
        "0472d482510b462d18b560d482a160010028da7f10fe156b6a0000000049454e44ae426082"), RED, (0, 0, 128)),
    # colours
    "profile.png": (encoded(red_blue, "PNG", icc_profile=swapped), GREEN, BLUE),
    "broken-profile.png": (encoded(red_blue, "PNG", icc_profile=b"none"), RED, BLUE, "1 with a colour profile that"),
    "cmyk-profile.tif": (encoded(inks, "TIFF", icc_profile=swapped), RED, BLACK, "does not apply"),  # to inks
    # shape
    "narrow.png": (stripes(1, "PNG"), GREY, GREY),  # all pixels count
    "broad.jpg": (stripes(4, "JPEG"), WHITE, BLACK),  # although the decoder halves it, twice
    "wide.png": (encoded(ImageOps.expand(red_blue, (20, 0), "white"), "PNG"), RED, BLUE),
    "small.png": (encoded(halves(RED, BLUE, size=(2, 2)), "PNG"), RED, BLUE, "1 enlarged to 16x16"),
    "turned.jpg": (encoded(red_blue.rotate(90), "JPEG", exif=exif), RED, BLUE),
    "film.gif": (encoded(red_blue, "GIF", save_all=True, append_images=[halves(GREEN, GREEN)]), RED, BLUE),
}

# What must be skipped: (its bytes, what is said of it)
SKIPPED = {
    "deep-colour.png": (encoded(deep, "PNG", transparency=0), "16 bits with a transparent colour"),
    "deep.pgm": (encoded(halves(0, 1000, "I"), "PPM"), "mode I are not read"),
    "deep.tif": (encoded(deep, "TIFF"), "mode I;16 are not read"),
    "floats.tif": (encoded(halves(0, 1, "F"), "TIFF"), "mode F are not read"),
    "cut.jpg": (encoded(red_blue.resize((99, 99)), "JPEG")[:900], "truncated"),
    "words.png": (b"no picture", "cannot identify"),
    "huge.ppm": (b"P6 99999 99999 255 ", "DecompressionBombError"),
}


@in_both
@parametrize("name", CORPUS)
def test_every_kind_of_picture_comes_out_right(name, zipped, capsys):
    content, left, right, *words = CORPUS[name]
    images, _, _, _ = data.load(make_dataset({name: content}, zipped), res=16)
    for colour, column in ((left, 2), (right, 13)):
        assert np.abs(images[0, :, column] - np.float32(colour)).max() < 9
    said = capsys.readouterr().out.splitlines()[-1]
    assert "".join(words) in said and (said == "  1 pictures") == (not words)


@in_both
@parametrize("name", SKIPPED)
def test_a_picture_that_cannot_be_read_right_is_left_out_by_name(name, zipped, capsys):
    content, words = SKIPPED[name]
    assert len(data.load(make_dataset({name: content, "zz.bmp": picture()}, zipped), res=16)[0]) == 1
    _, skipped, line, *_ = capsys.readouterr().out.splitlines()
    assert "skipped 1 of 2" in skipped and line.startswith(f"  {name} (") and words in line


# ---------------------------------------------------------------------------------------------------------------
# data.py: official files, here tiny, written byte by byte from the published descriptions of the formats


def idx(array):
    """MNIST's format."""
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def official(name):
    """What would be on offer, {name: bytes}, and the pictures and labels in it. CIFAR-10's lie in a folder, in an order
    of its own, beside another file."""
    shape = (18, 32, 32, 3) if name == "cifar10" else (18, 28, 28, 1)
    pictures, labels = np.random.default_rng(0).integers(0, 256, shape, np.uint8), np.arange(18, dtype=np.uint8) % 10
    if name == "cifar10":
        rows = np.hstack([labels[:, None], pictures.transpose(0, 3, 1, 2).reshape(18, -1)])
        write("b", {"test_batch.bin": rows[12:].tobytes(), "data_batch.bin": rows[:12].tobytes(), "readme.html": b""})
        with tarfile.open("cifar.tar", "w") as archive:
            for file in ("b/readme.html", "b/test_batch.bin", "b/data_batch.bin"):
                archive.add(file)
        contents = [Path("cifar.tar").read_bytes()]
    else:
        contents = [idx(array[part]) for part in (np.s_[:12], np.s_[12:]) for array in (pictures[..., 0], labels)]
    return {f: gzip.compress(c) for f, c in zip(data.OFFICIAL[name]["files"], contents)}, pictures, labels


every_official = parametrize("name", data.OFFICIAL)


@every_official
@parametrize("unpacked", [False, True], ids=["gz", "unpacked"])
def test_official_files_are_found_and_read(name, unpacked):
    files, pictures, labels = official(name)
    if unpacked:
        files = {file.removesuffix(".gz"): gzip.decompress(content) for file, content in files.items()}
    write(f"data/{name}", files)
    images, numbers, _, _ = data.load(name, res=data.usual_res(name), cond="all")
    assert_array_equal(images, pictures)
    assert_array_equal(numbers, labels)
    assert data.load(name, res=16)[0].shape == (18, 16, 16, pictures.shape[3])


@every_official
def test_damaged_or_missing_official_files_are_refused_by_name(name):
    files, _, labels = official(name)
    for file, content in files.items():
        for damaged in (content[: len(content) * 3 // 4], b"", gzip.compress(idx(labels[1:]))):
            write(f"data/{name}", files | {file: damaged})
            with pytest.raises(ValueError, match=f"data/{name}/.* is damaged.*--download"):
                data.load(name, res=8)
        Path("data", name, file).unlink()
        with pytest.raises(ValueError, match=f"{name} is not there: no {file}.* data/{name}/.*http.*--download"):
            data.load(name, res=8)
    assert os.listdir("cache") == []


def offer(name, monkeypatch):
    """Puts the tiny files on offer, here in a folder instead of on a server, and returns them."""
    files, _, _ = official(name)
    write("offer", files)
    checksums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    offered = data.OFFICIAL[name] | {"url": Path("offer").absolute().as_uri() + "/", "files": checksums}
    monkeypatch.setitem(data.OFFICIAL, name, offered)
    return files


@every_official
def test_download_fetches_what_is_missing_and_only_that(name, monkeypatch):
    mine, *others = files = offer(name, monkeypatch)
    write(f"data/{name}", {mine: b"mine"})
    data.download(name, Path("data"))
    assert {file.name: file.read_bytes() for file in Path("data", name).iterdir()} == files | {mine: b"mine"}
    os.remove(f"data/{name}/{mine}")
    write("offer", {mine: b"<html>Log in to this network</html>"})
    with pytest.raises(OSError, match=f"/offer/{mine}: .*MD5.*put the file into data/{name}"):
        data.download(name, Path("data"))
    assert mine not in os.listdir(f"data/{name}")


# ---------------------------------------------------------------------------------------------------------------
# data.py: pictures out


def test_a_grid_is_read_like_a_page():
    shades = np.arange(0, 240, 40, dtype=np.uint8)
    sheet = data.grid(np.broadcast_to(shades[:, None, None, None], (6, 72, 72, 1)), columns=3)
    assert [sheet.getpixel((40 + 76 * (i % 3), 40 + 76 * (i // 3))) for i in range(6)] == shades.tolist()


def test_lines_end_in_dots_with_y_upwards_and_those_outside_are_left_out():
    image = data.trails(np.array([[[-4.0, 3.0], [4.0, 3.0]], [[0, 0], [99, 0]], [[0, 0], [np.inf, np.nan]]]))
    red, _, blue = image.getpixel((400, 120))  # the middle is (240, 240), and 40 pixels are 1
    assert blue > red + 20 and image.getpixel((240, 120)) < WHITE  # the dot and the line
    assert np.array(image)[130:].min() == 255


def test_a_plot_has_a_logarithmic_axis():
    """Exponential decay is a straight line, from the upper left to the lower right through the middle of the axes."""
    plot = data.plot({"loss": (np.arange(101), 10.0 ** -np.arange(101))}, "step")
    for place in ((382, 197), (221, 108), (543, 286)):
        assert plot.getpixel(place)[0] < 128


# ---------------------------------------------------------------------------------------------------------------
# data.py: the program, and the plumbing


@parametrize("name,place", [("elsewhere/pets/", "out/pets-16"), ("spirals", "out/spirals")], ids=["pets", "spirals"])
def test_a_sheet_of_a_dataset_is_drawn(name, place, capsys):
    write("elsewhere/pets", {f"{i}.bmp": picture() for i in range(9)})
    data.main(["--data", name, "--res", "16"])
    assert os.listdir(place) == ["data.png"]
    assert f" samples; wrote {place}/data.png" in capsys.readouterr().out


@parametrize("flags,words", [
    ("--res 4", "--res 4 between"),
    ("--data nowhere", "nowhere folder zip faces"),
    ("--data bad.zip", "bad.zip"),
    ("--data .", "out inside another folder"),
    ("--data empty --cache empty/cache", "empty/cache/ inside --data /empty another --cache"),
    ("--data empty", "empty pictures"),
    ("--data celeba", "img_align_celeba.zip data/ --root"),
    ("--data mnist --root there", "there/mnist/ --download"),
])
def test_data_refuses_what_cannot_work(flags, words, capsys):
    Path("empty").mkdir()
    write(".", {"bad.zip": bytes(46) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0)})  # its end is right
    refused(capsys, lambda: data.main(flags.split()), *words.split())


def test_failures_that_are_no_mistake_of_the_program_end_it_in_a_line(capsys, monkeypatch):
    refused(capsys, lambda: data.run(lambda: torch.empty(2**50)), "; a smaller --batch needs less", status=1)
    with pytest.raises(RuntimeError):  # but this is a mistake of the program
        data.run(torch.nn.Module())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # closed, as in a daemon
        data.run(lambda: None)


@needs_unix
@parametrize("full", [True, False], ids=["full disk", "closed pipe"])
def test_output_that_cannot_be_shown_stops_nothing(full, pets_run, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    for run in (lambda: train_moons("--steps 4"), lambda: sampled(pets_run, to="folder")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open("/dev/full" if full else os.dup(writing), "w"))
            data.run(run)
    assert state("out/moons")["step"] == 4 and len(os.listdir("folder")) == 2


@parametrize("blocked", ["log.csv", "samples"])
def test_a_log_or_preview_that_cannot_be_written_stops_no_run_nor_does_a_thread_without_signals(blocked, capsys):
    train_moons("--steps 4")
    os.rename(f"out/moons/{blocked}", "away")
    if blocked == "log.csv":
        os.mkdir("out/moons/log.csv")
    else:
        write("out/moons", {"samples": b"no folder"})
    thread = threading.Thread(target=train_moons, args=["--steps 8 --resume"])
    thread.start()
    thread.join()
    assert state("out/moons")["step"] == 8 and "but not all of the log" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one():
    write(".", {"x": b"old"})
    with pytest.raises(ZeroDivisionError), data.whole(Path("x")) as file:
        file.write(b"new")
        1 / 0
    assert Path("x").read_bytes() == b"old" and os.listdir() == ["x"]


@needs_unix
def test_a_file_may_have_the_longest_of_names():
    with data.whole(Path("é" * 127)) as file:
        file.write(b"it")
    assert os.listdir() == ["é" * 127]


def test_seeds_differ_where_any_integer_does():
    seeds = {data.seed_from(*integers) for integers in itertools.product(range(4), repeat=3)}
    assert len(seeds) == 64


@parametrize("mask,reason", [
    (halves(255, 0, "L"), None),
    (halves(130, 120, "L"), None),  # a soft brush, or a JPEG: half white is the limit
    (halves((0, 0, 0, 255), (0, 0, 0, 0), "RGBA"), "transparent"),
], ids=["grey", "soft", "alpha"])
def test_the_hole_of_a_mask_is_where_it_is_at_least_half_white(mask, reason):
    mask.save("mask.png")
    if reason:
        with pytest.raises(ValueError, match=reason):
            data.read_mask("mask.png", 16)
    else:
        assert_array_equal(data.read_mask("mask.png", 16), np.arange(16) < np.full((16, 1), 8))


# ---------------------------------------------------------------------------------------------------------------
# train.py: a training step. From here on runs are kept tiny, and compared to the bit.

measure_points = train.measure_points


@pytest.fixture(autouse=True)
def no_exact_w2(monkeypatch):
    """It takes seconds. A process that a test starts knows nothing of this."""
    monkeypatch.setattr(train, "measure_points", lambda *_: None)


def train_moons(flags):
    return train.main([*MOONS, *flags.split()])


def train_faces(flags):
    return train.main(["--res", "16", *TINY, *shlex.split(flags)])


def state(folder, name="ckpt.pt"):
    return torch.load(Path(folder, name), weights_only=True)


def equal(a, b):
    """Do nested dicts and lists of tensors and other values agree to the bit?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return equal(list(a.items()), list(b.items()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def refuses(capsys, words, run, *args, status=2):
    refused(capsys, functools.partial(run, *args), *words.split(), status=status)


def batch_of(config, step=0, rank=0, world=1):
    images, labels, _, _ = data.load(config.data, res=config.res, cond="" if config.data in data.POINTS else "all")
    return train.draw_batch(config, images, labels, step, rank, world, CPU)


def test_ranks_share_the_pictures_of_a_batch_and_all_differs_from_rank_to_rank_and_step_to_step():
    config = train.resolve({"batch": 8, "flip": False})
    whole, first, second = batch_of(config, 5), batch_of(config, 5, 0, 2), batch_of(config, 5, 1, 2)
    assert torch.equal(torch.cat([first[0], second[0]]), whole[0])
    for other in (first, batch_of(config, 6, 1, 2)):
        assert not any(map(torch.equal, second[:3], other[:3]))  # neither the pictures, nor the noise, nor the times


def test_pictures_are_mirrored_and_labels_hidden_one_by_one_and_ot_moves_only_the_noise():
    images, labels, _, _ = data.load("faces", cond="all")
    (x, e, _, y, *_), paired = [batch_of(train.resolve({"batch": 40, "drop": 0.25, "ot": n}), 3) for n in (0, 4)]
    same, mirrored = ((images[:, None] == data.to_uint8(side)).all((2, 3, 4)) for side in (x, x.flip(3)))  # (60, 40)
    assert 10 < mirrored.sum() < 30
    hidden = (y == model.HIDDEN).all(1)
    assert 2 < hidden.sum() < 20
    assert_array_equal(y[~hidden], labels[(same | mirrored).argmax(0)][~hidden])
    assert equal((paired[0], paired[3]), (x, y)) and not torch.equal(paired[1], e)
    assert x.stride() == e.stride()  # or each pass over both would jump about in one of them


def test_shortcuts_take_half_of_a_batch_once_the_cool_down_begins_and_leave_the_rest_of_it_as_it_was():
    """They lie on the grids of 1 to 16 steps that sampling will use, with middles on that of 32."""
    fields = dict(batch=65, steps=10, cooldown=0.4, jitter=0.1, t_mean=-1.0)
    config, without = train.resolve({**fields, "shortcut": True}), train.resolve(fields)
    assert equal(batch_of(config, 5), batch_of(without, 5))
    *others, shortcuts = batch_of(config, 6)
    assert equal(others, list(batch_of(without, 6)[:5]))
    assert [len(part) for part in shortcuts] == [32] * 4
    grid = torch.tensor(fm.time_grid(32, shift=math.e))
    assert (shortcuts[1][:, None] - grid).abs().min(dim=1).values.max() < 1e-6


@parametrize("step,clip,kept", [(0, 1e9, 0.1), (3000, 0.025, 0.75)])
def test_a_step_goes_down_the_gradient_of_flow_and_shortcuts_and_the_average_follows(step, clip, kept):
    """By plain gradient descent. Shortcuts are taught by the average, and count as much as the flow, whose loss is what
    is reported. The average keeps little of the first weights, and later as much as ema says."""
    config = train.resolve({"data": "moons", "shortcut": True, "cooldown": 1.0, "clip": clip, "decay": 0.5, "ema": 0.75,
                            "lr": 0.1, "target": "x", "path": "cosine", "jitter": 0.1})
    net, ema = (model.build("mlp", width=16, shortcut=True) for _ in range(2))
    x, e, t, y, jitter, shortcuts = batch = batch_of(config, step)
    flow, others = fm.loss_with_shortcuts(net, ema, x, e, t, shortcuts, y, "v", "x", fm.cosine, jitter)
    ((flow.mean() + others.mean()) / 2).backward()
    flat = torch.nn.utils.parameters_to_vector
    gradient, before, average = flat(w.grad for w in net.parameters()), flat(net.parameters()), flat(ema.parameters())
    optimizer = torch.optim.SGD(net.parameters(), lr=7.0, weight_decay=7.0)  # both to be replaced by the config's
    assert train.train_step(config, step, batch, net, ema, [optimizer]).item() == approx(flow.mean().item())
    gradient *= min(1, clip / gradient.norm())
    assert_close(flat(net.parameters()), before - train.learning_rate(config, step) * (gradient + 0.5 * before))
    assert_close(flat(ema.parameters()), kept * average + (1 - kept) * flat(net.parameters()))


def test_muon_gets_the_matrices_inside_the_blocks_and_adamw_the_rest():
    net = model.build("transformer", res=8, patch=4, stride=4, width=32, depth=2, heads=2, labels=3)
    adamw, muon = (set(each.param_groups[0]["params"]) for each in train.make_optimizers(net, train.resolve({})))
    assert muon == {w for name, w in net.named_parameters() if re.match(r"blocks.\d.(attention|swiglu)", name)}
    assert adamw == set(net.parameters()) - muon


def test_muon_moves_as_torchs_does():
    """Which rounds to bfloat16, so to three digits."""
    start = [torch.randn(shape) for shape in ((48, 20), (32, 32), (20, 48), (48, 20))]  # two go together
    ours, theirs = ([torch.nn.Parameter(g.clone()) for g in start] for _ in range(2))
    optimizers = train.Muon(ours, bf16=False), torch.optim.Muon(theirs, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = b.grad = torch.randn(a.shape)
        for optimizer in optimizers:
            optimizer.param_groups[0].update(lr=0.1, weight_decay=0.3)
            optimizer.step()
    assert_close(ours, theirs, atol=0.004, rtol=0)


def test_the_learning_rate_climbs_stays_and_falls_along_straight_lines():
    config = train.Config(lr=2.0, steps=100, warmup=9, cooldown=0.4)
    rates = [train.learning_rate(config, step) for step in range(100)]
    assert_allclose(rates, np.interp(np.arange(100), [-1, 9, 59, 100], [0, 2, 2, 0]))


CHANGES = [
    "--predict e", "--target x", "--path cosine", "--times uniform", "--t-mean 0.5", "--ot", "--jitter 0.1",
    "--lr 0.01", "--warmup 0", "--cooldown 0", "--decay 0.5", "--clip 0.001", "--ema 0.1", "--seed 1", "--batch 4",
    "--steps 4", "--no-flip", "--cond hat,smiling", "--drop 0.9", "--norm derf", "--attention hand",
    "--optimizer adamw", "--patch 4", "--stride 8", "--depth 2", "--heads 4", "--width 64", "--network unet",
    "--shortcut"]


@functools.cache
def average_after(flag):
    return train_faces(f"--steps 3 --cond all --patch 8 --stride 4 --out 'with {flag}' {flag}").state_dict()


@parametrize("flag", CHANGES)
def test_every_flag_changes_the_training(flag):
    assert not equal(average_after(flag), average_after(""))


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_a_run_leaves_checkpoints_log_curve_and_previews_and_rates_leave_out_the_first_step(monkeypatch, capsys):
    """By a clock for which the first step takes 100 seconds, as when torch compiles, and each other one two."""
    seconds = []
    monkeypatch.setattr(train, "signal_and_time", lambda *_: (seconds.append(2 if seconds else 100), 0.0))
    monkeypatch.setattr(train, "time", Namespace(perf_counter=lambda: sum(seconds)))
    train_faces("--cache packs --steps 8 --report 5 --preview 4")
    assert "4 samples/s  ETA 0:00:10\n" in capsys.readouterr().out
    assert Path("packs").exists() and not Path("cache").exists()
    assert {*os.listdir("out/faces-16")} == {".lock", "ckpt.pt", "stable.pt", "log.csv", "loss.png", "samples"}
    assert {*os.listdir("out/faces-16/samples")} == {"000004.png", "000008.png"}
    rows = csv.DictReader(Path("out/faces-16/log.csv").read_text().splitlines())
    assert [(row["step"], row["samples_s"], row["t9"] > "") for row in rows] == [
        ("3", "4.0", False), ("4", "4.0", True), ("5", "4.0", False), ("8", "4.0", True)]


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
    net, checkpoint = model.load(Path("out/moons"))
    for used in (net, returned):
        assert equal(used.state_dict(), checkpoint["ema"])
    assert not equal(checkpoint["ema"], checkpoint["weights"])
    images, labels, _, _ = data.load("moons")
    about = net, checkpoint["config"], images, labels, CPU
    assert train.held_out(*about)["held_out"] == checkpoint["log"][-1]["held_out"]
    train.write_preview(Path("again"), *about, 5)
    assert_array_equal(*(Image.open(f"{out}/samples/000005.png") for out in ("out/moons", "again")))


def test_neither_a_failed_save_nor_what_is_not_finite_replaces_a_checkpoint(monkeypatch):
    train_moons("--steps 4 --cooldown 0")  # without a cool-down nothing else is saved
    before = Path("out/moons/ckpt.pt").read_bytes()

    def break_weights(*others, net, **more):
        next(net.parameters()).data[0] = math.nan
        return torch.ones(())

    for module, name, broken in [(train, "train_step", break_weights),
                                 (train, "held_out", lambda *_: {"held_out": math.inf}),
                                 (torch, "save", lambda checkpoint, file: file.write(b"half of it") / 0)]:
        with monkeypatch.context() as patch, pytest.raises(ArithmeticError):
            patch.setattr(module, name, broken)
            train_moons("--steps 8 --resume")
    assert Path("out/moons/ckpt.pt").read_bytes() == before


def test_moons_train_to_moons_and_w2_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(train, "measure_points", measure_points)
    w2 = fm.w2
    monkeypatch.setattr(fm, "w2", lambda a, b: w2(a[:500], b[:500]))  # all 2,048 points take seconds
    train_moons("--steps 600 --width 64 --batch 256")
    one, *_, hundred, floor = map(float, re.findall(r": (\d\.\d+)", capsys.readouterr().out.splitlines()[-1]))
    assert 0 < floor < 0.8 and hundred < 0.8 < one


# ---------------------------------------------------------------------------------------------------------------
# Presets


def test_the_256_pixel_model_has_about_115M_parameters_and_441_tokens():
    config = train.resolve({"data": "celeba", "res": 256, "preset": "gpu"})
    with torch.device("meta"):
        net = model.build(**train.network_sizes(config, label_count=0))
    assert sum(w.numel() for w in net.parameters()) == approx(115e6, rel=0.01)
    assert net.position.shape == (441, 768)


@parametrize("name", ["faces", "pets"])
@parametrize("size", ["laptop", "gpu"])
def test_presets_fit_every_resolution_and_a_laptop_never_works_on_more_than_100_patches(name, size):
    for res in (*range(train.LIMITS["res"][0], 65), 96, 128, 256, 512):
        config = train.resolve({"data": name, "res": res, "preset": size})
        model.check_stride(res, config.patch, config.stride)
        side = (res - config.patch) // config.stride + 1
        assert side in ((8, 10) if size == "laptop" else (8, 9, 10, 21)), res


@parametrize("flags,width,t_mean", [
    ("--preset laptop", 128, -0.5),
    ("--res 64 --device cpu", 128, -0.693),
    ("--res 256 --preset laptop", 256, -2.079),
    ("--data pets --res 64 --preset laptop", 256, -0.693),
    ("--data mnist", 32, -0.4),
    ("--data mnist --network transformer", 256, -0.4),
    ("--res 64", 384, -0.5),
    ("--res 512", 768, -1.493),
    ("--res 512 --t-mean 1 --width 24", 24, 1.0),
])
def test_data_resolution_and_device_choose_the_sizes_and_the_times_unless_flags_do(flags, width, t_mean, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    given, _, _ = train.parse_flags(flags.split())
    config = train.resolve(given)
    assert (config.width, config.t_mean) == (width, approx(t_mean, abs=1e-3))


def test_official_data_are_downloaded_if_asked_to(monkeypatch, capsys):
    monkeypatch.setattr(data, "download", lambda name, root: data.fail(f"{name} to {root}"))
    refuses(capsys, "mnist to there", train.main, "--data mnist --root there --download".split())


# ---------------------------------------------------------------------------------------------------------------
# Going on. Some of these runs turn bfloat16 on, on every machine. Processors without it emulate it, slowly.


@parametrize("run,flags,bf16", [
    (train_moons, "--ot 8 --predict x --path cosine", False),
    (train_faces, "--cond all --jitter 0.1", False),
    (train_faces, "--shortcut", False),
    (train_faces, "--cooldown 0", True),
    (train_faces, "--shortcut", True),
    (train_faces, "--network unet --width 16", True),
    (train_faces, "--no-bf16", True),
])
def test_resuming_equals_never_stopping_to_the_bit_and_what_is_saved_is_float32(run, flags, bf16, monkeypatch):
    monkeypatch.setattr(model, "has_bf16", lambda device: bf16)
    flags += " --preview 2 --report 1"
    run(f"{flags} --steps 5 --out once")
    run(f"{flags} --steps 4 --out twice")
    run(f"{flags} --steps 5 --out twice --resume")
    once, twice = state("once"), state("twice")
    for part in ("weights", "ema", "optimizers"):
        assert equal(once[part], twice[part])
    assert [row["step"] for row in twice["log"]] == [1, 2, 3, 4, 5]
    assert once["log"][-1]["held_out"] == twice["log"][-1]["held_out"]
    content = Path("once/ckpt.pt").read_bytes()
    assert b"FloatStorage" in content and b"BFloat16Storage" not in content  # as pickle calls their tensors


@parametrize("bf16", [True, False])
def test_in_bf16_matrices_are_multiplied_in_it_in_network_and_muon_and_the_loss_is_float32(bf16, monkeypatch):
    monkeypatch.setattr(model, "has_bf16", lambda device: True)
    config = train.resolve({"res": 16, "batch": 8, "width": 32, "depth": 1, "bf16": bf16})
    net, ema, optimizers, _ = train.build_networks(config, None, 0, CPU, 1)
    products = []
    monkeypatch.setattr(train, "nearest_orthogonal", lambda g: products.append(g.dtype) or g)
    net.blocks[0].swiglu.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    loss = train.train_step(config, 0, batch_of(config), net, ema, optimizers)
    assert set(products) == {torch.bfloat16 if bf16 else torch.float32}
    assert loss.dtype == torch.float32


@needs_unix
@parametrize("number", [signal.SIGTERM, getattr(signal, "SIGHUP", None)], ids=["SIGTERM", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_resume_goes_on_to_the_same_end(number, monkeypatch, capsys):
    report, before = train.report, signal.getsignal(number)
    whole = train_moons("--steps 20 --out whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + number)):
        patch.setattr(train, "report", lambda *args: signal.raise_signal(number) or report(*args))
        train_moons("--steps 20 --out killed")
    assert state("killed")["step"] == 4 and "--resume" in capsys.readouterr().out
    assert equal(train_moons("--steps 20 --out killed --resume").state_dict(), whole.state_dict())
    assert signal.getsignal(number) == before


def test_a_longer_run_goes_on_from_before_the_cool_down_and_keeps_the_end_of_the_shorter_one():
    file = Path("run/ckpt.pt")
    once = train_moons("--steps 40 --out once")
    train_moons("--steps 10 --out run")
    finished = file.read_bytes()
    train_moons("--steps 40 --out run --resume")
    assert Path("run/ckpt-10.pt").read_bytes() == finished
    file.write_bytes(finished)  # as after a kill when only a new stable.pt had been written
    assert equal(train_moons("--steps 40 --out run --resume").state_dict(), once.state_dict())


def test_a_run_by_hours_is_one_of_so_many_steps_in_time_and_more_hours_make_it_longer(capsys, monkeypatch):
    """By clocks that move by a tenth of an hour in each step, and by more when the machine becomes slow."""

    def trained_by(clock, flags):
        with monkeypatch.context() as patch:
            patch.setattr(train, "signal_and_time", lambda *_: (0, next(clock)))
            return train_moons(f"--hours 1 {flags}").state_dict()

    whole = trained_by(itertools.count(360, 360), "--out run")
    assert "step      3  loss" in capsys.readouterr().out
    assert equal(whole, train_moons("--steps 11 --out counted").state_dict())  # it cools down from 7 on
    longer = trained_by(itertools.count(8 * 360, 360), "--out run --resume")  # from 7 on, for an hour: 1.7 in all
    assert equal(longer, train_moons("--steps 17 --out counted --resume").state_dict())
    assert Path("run/ckpt-11.pt").exists()
    trained_by(iter([*range(360, 2521, 360), 3500, 4500]), "--out slow")  # the machine becomes slow while it cools down
    assert state("slow")["step"] == 9 and state("slow")["log"][-1]["lr"] > 1e-4
    stopped = state("slow", "stable.pt") | {"step": 8}  # as by Ctrl-C before the steps are known
    stopped["config"]["steps"] = train.ENDLESS
    torch.save(stopped, "slow/ckpt.pt")
    refuses(capsys, "--steps 10 step 8 --steps 12", train_moons, "--steps 10 --out slow --resume")
    refuses(capsys, "--hours 0.4 1.1 0.733 0.807", train_moons, "--hours 0.4 --out run --resume")
    for flags in ("--cooldown 1", "--shortcut"):
        refuses(capsys, f"--hours {flags}", train_moons, f"--hours 1 {flags} --out refused")


def test_a_run_is_not_overwritten_and_goes_on_as_it_was_begun_or_not_at_all(capsys):
    train_moons("--steps 20 --ot")
    before = {file: file.read_bytes() for file in Path("out").rglob("*.*")}
    refuses(capsys, "out/moons --resume --out", train_moons, "--steps 20 --ot")
    refuses(capsys, "step 20 of 20 --steps 40", train_moons, "--steps 20 --ot --resume")
    for flags in ("--data spirals, --res 16, --cond all, --drop 0.5, --predict x, --target x, --path cosine, "
                  "--times logit-normal, --t-mean 1, --ot 32, --jitter 1, --shortcut, --network unet, --patch 2, "
                  "--stride 2, --width 24, --depth 2, --heads 2, --norm derf, --attention hand, --optimizer muon, "
                  "--batch 8, --warmup 1, --cooldown 0.1, --decay 1, --clip 2, --ema 0.5, --seed 1").split(", "):
        refuses(capsys, f"{flags} out/moons --out", train_moons, f"--out out/moons --steps 30 --resume {flags}")
    assert {file: file.read_bytes() for file in Path("out").rglob("*.*")} == before
    train_moons("--steps 30 --ot --resume --t-mean 0 --preset auto --lr 0.1 --report 7")
    assert state("out/moons")["step"] == 30


@needs_unix
def test_a_second_run_in_a_folder_is_refused(capsys):
    with data.lock(Path("out/moons")):
        refuses(capsys, "another run out/moons --out", train_moons, "--steps 2")
    train_moons("--steps 2")


def test_resume_refuses_a_lost_state_and_a_checkpoint_of_another_version(capsys):
    train_moons("--steps 20")
    Path("out/moons/stable.pt").unlink()
    refuses(capsys, "no out/moons/stable.pt --out", train_moons, "--steps 1000 --resume")
    newer = state("out/moons")
    newer["config"]["newer_name"] = 1
    torch.save(newer, "out/moons/ckpt.pt")
    refuses(capsys, "out/moons version --out", train_moons, "--steps 30 --resume")


def test_resume_refuses_other_data_and_takes_the_same_by_another_path_and_so_does_sampling(capsys, monkeypatch):
    make_pictures(Path("pets/cats"), 8)
    make_pictures(Path("pets/dogs"), 9)
    train_faces(f"--data pets --cond all --steps 1 --cache {Path('cache').absolute()}")
    monkeypatch.chdir("pets")
    assert "on 17 " in said(capsys, "../out/pets-16", "--bpd 20 --steps 1")  # from any folder
    monkeypatch.chdir("..")
    shutil.copytree("pets", "there/animals")
    resume = "--steps 2 --resume --out out/pets-16 --data"
    for old, new in (("dogs", "ants"), ("cats", "dogs"), ("ants", "cats")):
        Path("pets", old).rename(Path("pets", new))
    refuses(capsys, "--data pets labels --out", train_faces, f"{resume} pets")  # now the two are swapped
    train_faces(f"{resume} there/animals/")
    assert state("out/pets-16")["step"] == 2
    shutil.move("there/animals", "moved")
    refuses(capsys, "there/animals --data", sample.main, "out/pets-16 --device cpu --bpd 1".split())
    assert "on 1 " in said(capsys, "out/pets-16", "--data moved --bpd 1 --steps 1")


# ---------------------------------------------------------------------------------------------------------------
# Several processes, compiling, timing


@needs_unix
@parametrize("backend", ["", "aot_eager"])
def test_two_processes_learn_what_one_does_with_the_same_batch(backend, monkeypatch):
    """Rank r draws noise from (seed, step, r), so the one process is given both ranks' draws. What remains is the order
    in which float32 gradients are summed; AdamW divides by their size, so where that is tiny the rounding shows."""
    make_pictures(Path("pets"), 30)
    flags = "--data pets --res 16 --steps 20 --shortcut --cooldown 1 --optimizer adamw --no-bf16".split()
    program = f"""import functools, sys; sys.path.append({str(HERE)!r})
import data, torch, train
torch.compile = functools.partial(torch.compile, backend="{backend}")
data.run(train.main)"""
    write(".", {"program.py": program.encode()})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "program.py"]
    compiled = "--compile" if backend else "--no-compile"
    done = subprocess.run([*launch, *TINY, *flags, "--out", "two", compiled], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 x cpu") == 1 and "Warning" not in done.stderr  # only the first one prints
    draw_batch = train.draw_batch

    def draw_both_shares(config, images, labels, step, *others):
        a, b = (draw_batch(config, images, labels, step, rank, 2, CPU) for rank in (0, 1))
        batch = [torch.cat([p[:2], q[:2], p[2:], q[2:]]) for p, q in zip(a[:4], b[:4])]  # the last two learn shortcuts
        return *batch, None, [torch.cat(pair) for pair in zip(a[5], b[5])]

    monkeypatch.setattr(train, "draw_batch", draw_both_shares)
    train.main([*TINY, *flags, "--out", "one"])
    assert_close(state("one")["weights"], state("two")["weights"], atol=1e-5, rtol=0)


META = torch.device("meta")  # torch's device without numbers, which stands for a GPU here


class OnlyThere(TorchDispatchMode):
    """Refuses what is computed on the CPU, single numbers aside. (An index made there would pass on a GPU, slowly.)"""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in tree_leaves((args, kwargs, result)):
            assert not torch.is_tensor(part) or part.device == META or part.dim() == 0, f"{function} on the CPU"
        return result


@pytest.fixture
def gpu(monkeypatch):
    """What would wait for a GPU, such as .item(), raises on META. Of what META lacks, stand-ins."""
    seedless = dict(__init__=lambda self, device: None, manual_seed=lambda self, seed: None)
    monkeypatch.setattr(torch, "Generator", type("Generator", (), seedless))
    monkeypatch.setattr(model, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(data, "send", lambda array, device: torch.zeros(
        array.shape, dtype=getattr(torch, str(array.dtype)), device=device))
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, betas, fused: adamw(weights, betas=betas))
    return OnlyThere()


def a_run(flags, device):
    """config, (images, labels), networks and optimizers"""
    config = train.resolve(train.parse_flags(["--res", "16", *TINY, *flags.split()])[0])
    images, labels, names, _ = data.load(config.data, res=16, cond=config.cond)
    return config, (images, labels), train.build_networks(config, None, len(names), device, 1)[:3]


KINDS_OF_STEP = ["", "--cond all --accumulate 2 --predict v", "--shortcut --jitter 0.1 --norm derf",
                 "--data moons --network mlp",
                 "--network unet --optimizer adamw --cond all --shortcut --attention fused"]


@parametrize("flags", KINDS_OF_STEP)
def test_a_step_neither_waits_for_a_gpu_nor_computes_elsewhere_but_for_pairs(flags, gpu):
    """Pairs by optimal transport are found on the CPU."""
    config, arrays, (net, ema, optimizers) = a_run(flags, META)
    with gpu:
        batch = train.draw_batch(config, *arrays, config.steps - 1, 0, 1, META)
        train.train_step(config, config.steps - 1, batch, net, ema, optimizers)


@parametrize("solver", sorted({*fm.SOLVERS} - {"dopri5"}))
def test_sampling_and_bits_neither_wait_for_a_gpu_nor_compute_elsewhere_but_for_dopri5(solver, gpu):
    net, config = small("transformer", labels=2, shortcut=True).to(META), train.Config()
    z, y = torch.empty(2, 3, 16, 16, device=META), torch.zeros(2, dtype=torch.int64, device=META)
    with gpu:
        sample.generate(net, config, z, 4, solver, y, guidance=2.0)
        sample.generate(net, config, z, 4, solver, y, inpaint=(z, z > 0, lambda: torch.randn_like(z)))
        fm.bits_per_dimension(fm.velocity(net), z, z, z, 0.9, 2)


@parametrize("flags", KINDS_OF_STEP)
def test_a_network_is_compiled_in_one_piece_and_once(flags):
    torch._dynamo.reset()
    config, arrays, (net, ema, optimizers) = a_run(flags, CPU)
    net = torch.compile(net, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 1, config.steps - 1):
            batch = train.draw_batch(config, *arrays, step, 0, 1, CPU)
            train.train_step(config, step, batch, net, ema, optimizers)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_a_compiled_network_computes_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    net, z, t = small("transformer", stride=3), torch.randn(2, 3, 16, 16), torch.rand(2)
    assert_close(torch.compile(net)(z, t), net(z, t), atol=1e-5, rtol=1e-4)


def test_each_process_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert model.pick_device("auto") == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ValueError, match="--nproc_per_node must be at most 3"):
        model.pick_device("cuda")


def test_a_batch_that_does_not_split_among_the_processes_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    refuses(capsys, "RANK", train_moons, "")  # this was not torchrun
    refuses(capsys, "--batch 31 2 processes", train_moons, "--batch 31")
    refuses(capsys, "--shortcut --batch 30 multiple of 12", train_moons, "--shortcut --batch 30 --accumulate 3")


@parametrize("works", [True, False])
def test_the_loss_is_compiled_if_asked_to_and_a_failure_of_that_stops_nothing(works, monkeypatch, capsys):
    compiled = []

    def compile(function):
        compiled.append(function)
        return function if works else lambda *_: 1 / 0

    monkeypatch.setattr(torch, "compile", compile)
    plain = train_moons("--steps 3 --no-compile --out plain")
    assert not compiled
    assert equal(train_moons("--steps 3 --compile").state_dict(), plain.state_dict())
    assert compiled == [train.batch_loss] and ("runs without it: division" in capsys.readouterr().out) != works


@parametrize("flags,cuda,bf16,pays", [("", True, False, True), ("", False, True, False),
                                      ("--width 256 --steps 2000", False, True, True),
                                      ("--width 256 --steps 2000", False, False, False),
                                      ("--network unet --steps 9000 --width 256", False, True, False)])
def test_compiling_is_chosen_where_it_was_measured_to_pay(flags, cuda, bf16, pays, monkeypatch):
    monkeypatch.setattr(model, "has_bf16", lambda device: bf16)
    config = train.resolve(train.parse_flags(shlex.split("--device cpu " + flags))[0])
    assert train.compiling_pays(config, torch.device("cuda" if cuda else "cpu")) == pays


@parametrize("flags", ["--cond all --jitter 0.1", "--shortcut --cooldown 1"])
def test_a_batch_in_parts_teaches_the_same(flags):
    """Up to the order of sums. AdamW forgets the size of gradients, but its averages of them do not."""
    flags += " --steps 1 --optimizer adamw --clip 1e9 --out"
    train_faces(f"{flags} once")
    train_faces(f"{flags} parts --accumulate 4")
    once, parts = state("once"), state("parts")
    assert_close(parts["optimizers"][0]["state"], once["optimizers"][0]["state"], atol=1e-6, rtol=1e-4)
    assert parts["log"][0]["loss"] == approx(once["log"][0]["loss"])


def test_bench_counts_the_arithmetic_and_divides_it_by_the_time(monkeypatch, capsys):
    """By a clock on which whatever is measured takes a quarter of a second."""
    monkeypatch.setattr(train, "time", Namespace(perf_counter=itertools.count(0, 0.25).__next__))
    train.main("--data moons --device cpu --width 1024 --depth 3 --batch 1024 --bench".split())
    said = capsys.readouterr().out
    step = 1024 * 2 * 3 * (3 * 1024 + 2 * 1024**2 + 1024 * 2) / 1e9  # a product and a sum; back takes twice as much
    square = 2 * 2048**3 / 1e9
    assert f"250.0 ms/step  4,096.0 samples/s  {4 * step:,.0f} GFLOP/s\n" in said
    assert f"{step / square:.0%} of a plain float32 matrix product's {4 * square:,.0f} GFLOP/s" in said


# ---------------------------------------------------------------------------------------------------------------
# train.py: bad input. One line with the words that help, and status 2, before anything slow.


@parametrize("flags,words", [
    ("--stpes 5", "--stpes"),
    ("--t-mean nan", "--t-mean between -10 10"),
    ("--predict xe", "--predict"),
    ("--hours 1", "--steps --hours leave one out"),
    ("--device tpu", "--device tpu cpu"),
    ("--data ''", "--data"),
    ("--data .", "out/ inside --data another place --out"),
    ("--data=~/none", os.path.expanduser("~/none")),
    ("--data moons --cond all", "--cond all no labels"),
    ("--drop 1", "--drop 1 0.99"),
    ("--cond smilling", "--cond smilling smiling,"),
    ("--network mlp", "--network mlp faces"),
    ("--network unet --optimizer muon", "--optimizer muon unet"),
    ("--shortcut --predict e", "--shortcut --predict e x or v"),
    ("--shortcut --cooldown 0", "--shortcut --cooldown"),
    ("--shortcut --path cosine", "--shortcut --path cosine --predict v"),
    ("--resume", "out/faces-32/ckpt.pt --out"),
])
def test_train_refuses_what_cannot_work(flags, words, capsys):
    refuses(capsys, words, train.main, shlex.split(f"--device cpu --steps 2 {flags}"))
    assert not any(Path().glob("out/*"))


# ---------------------------------------------------------------------------------------------------------------
# sample.py


@pytest.fixture(scope="module")
def pets_run(tmp_path_factory):
    """A tiny run by the real command, for many tests to sample from: two classes of pets, shortcuts, 20 pictures held
    out. Its paths are absolute, and tests write elsewhere (but for packs)."""
    folder = tmp_path_factory.mktemp("run")
    make_pictures(folder / "pets/cats", 190)
    make_pictures(folder / "pets/dogs", 210)
    sizes = ["--res", 16, "--patch", 2, "--stride", 2, *TINY, "--steps", 20, "--lr", 0.01, "--t-mean", -1]
    paths = ["--data", folder / "pets", "--cache", folder / "cache", "--out", folder / "run"]
    done = command("train.py", *sizes, *paths, "--cond", "all", "--shortcut", "--no-bf16")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def said(capsys, run, flags):
    """What sample.py prints."""
    sample.main([str(run), "--device", "cpu", *flags.split()])
    return capsys.readouterr().out


def sampled(run, flags="", to="x.npy"):
    """What sample.py writes, by default of two samples in three steps: an array, or a picture, or a folder's."""
    sample.main([str(run), *f"--device cpu --n 2 --steps 3 {flags} --to {to}".split()])
    if to == "x.npy":
        return np.load(to)
    if Path(to).suffix:
        return Image.open(to)
    return np.stack([Image.open(file) for file in sorted(Path(to).glob("0*.png"))])


def save_picture(name, size=(16, 16), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(name)
    return pixels


def test_samples_are_written_as_the_ending_says(pets_run):
    x = sampled(pets_run, "--n 5 --batch 2")
    assert x.shape == (5, 3, 16, 16) and x.dtype == np.float32
    flow = sampled(pets_run, "--n 5 --batch 2 --columns 1 --solver euler", to="x.gif")
    assert flow.n_frames == 4 and flow.info["loop"] == 0 and flow.height > 4 * flow.width
    assert 1.3 < np.divide(*sampled(pets_run, "--n 5", to="x.png").size) < 1.6  # two rows of three
    pixels = sampled(pets_run, "--n 5", to="new/folder")
    assert_allclose(pixels / 127.5 - 1, x.clip(-1, 1).transpose(0, 2, 3, 1), atol=1 / 250)
    assert sorted(os.listdir("new/folder")) == [f"0000{i}.png" for i in range(5)]


@parametrize("flags,words,file", [
    ("", "1 samples, 10 steps of heun, NFE 19, ", "samples.png"),  # two a step, but one in the last
    ("--to x.gif", "50 steps of heun, NFE 99", "x.gif"),
    ("--inpaint a.png --mask a.png", "50 steps of heun, NFE 495", "samples.png"),  # each step five times
    ("--solver dopri5", "dopri5, NFE ", "samples.png"),
    ("--solver shortcut", "1 steps of shortcut, NFE 1,", "samples.png"),
    ("--bpd 1 --solver euler", "50 steps of rk4, NFE 200", ""),
])
def test_samples_lie_beside_the_checkpoint_and_take_ten_steps_or_what_is_looked_at_closely_more(
        flags, words, file, pets_run, capsys):
    save_picture("a.png")
    shutil.copy(pets_run / "ckpt.pt", ".")
    assert words in said(capsys, "ckpt.pt", f"--n 1 {flags}")
    assert set(os.listdir()) == {"a.png", "ckpt.pt", file} - {""}


def test_a_full_disk_leaves_the_files_that_were_there(pets_run, monkeypatch):
    files = "x.png", "x.gif", "x.npy", "folder/00000.png"
    write(".", {name: b"old" for name in files})

    def fail(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "check_output", lambda *args: None)  # which would notice at once
    monkeypatch.setattr(os, "fsync", fail)
    for to in files:
        with pytest.raises(OSError, match="No space"):
            sampled(pets_run, to=to.removesuffix("/00000.png"))
    assert [file.read_bytes() for file in Path().rglob("*.*")] == [b"old"] * 4


@parametrize("to,growing", [("folder", "folder/0*.png"), ("x.npy", ".part-*-x.npy")])
def test_a_folder_and_an_array_are_written_batch_by_batch(to, growing, pets_run, monkeypatch):
    """So that memory need not hold them all: when the third batch is drawn, the first is on the disk."""
    generate, found = sample.generate, []

    def generate_and_look(*args):
        found.append(sum(file.stat().st_size for file in Path().glob(growing)))
        return generate(*args)

    monkeypatch.setattr(sample, "generate", generate_and_look)
    sampled(pets_run, "--n 30 --batch 10", to=to)
    assert found[0] < 200 and found[2] > found[0] + 5000


def test_several_processes_write_the_files_that_one_does(pets_run, monkeypatch, capsys):
    """Of three processes, the third is left without work."""
    sampled(pets_run, "--n 7 --batch 4", to="one")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be put back: all but the first process replace it
    monkeypatch.setenv("WORLD_SIZE", "3")
    refuses(capsys, "--to FOLDER", sampled, pets_run)
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        sampled(pets_run, "--n 7 --batch 4", to="three")
        assert len(os.listdir("three")) == (4 if rank == "0" else 7)
    assert capsys.readouterr().out.count("samples/s") == 1
    monkeypatch.setenv("RANK", "1")
    refuses(capsys, "three/ 00004.png", sampled, pets_run, "--n 7 --batch 4", "three")  # these are of another time
    one, three = ({file.name: file.read_bytes() for file in Path(name).iterdir()} for name in ("one", "three"))
    assert one == three


def test_a_compiled_network_draws_where_samples_are_many(pets_run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or net)
    monkeypatch.setattr(model, "compiles_well", lambda config, device: True)
    monkeypatch.setattr(sample, "COMPILE_FROM", 3)
    two = sampled(pets_run)
    assert not compiled
    assert_allclose(sampled(pets_run, "--n 3")[:2], two, atol=1e-5)
    assert len(compiled) == 1


@parametrize("flags,unit", [("--n 6 --to x.npy", "samples"), ("--bpd 6", "samples"), ("--fd 6", "pictures")])
def test_long_work_shows_how_much_is_done_and_how_long_the_rest_takes(flags, unit, pets_run, capsys, monkeypatch):
    """On a clock that moves six seconds at each look."""
    clock = itertools.count(0, 6)
    monkeypatch.setattr(data, "time", Namespace(perf_counter=lambda: next(clock)))
    words = said(capsys, pets_run, f"--steps 1 --batch 2 {flags}")
    assert f"  2 of 6 {unit}  0.3 {unit}/s  ETA 0:00:12\n" in words


def test_a_sample_depends_on_seed_and_index_only(pets_run):
    five = sampled(pets_run, "--n 5")
    assert_allclose(sampled(pets_run, "--n 3 --batch 2"), five[:3], atol=1e-5)
    assert np.abs(sampled(pets_run, "--n 5 --seed 1") - five).max() > 0.1
    assert np.abs(five[0] - five[1]).max() > 0.1


def test_steps_are_small_where_training_drew_many_times(pets_run):
    """Half of the training's times are below sigmoid(t_mean), and half of the steps, too."""
    assert_array_equal(sampled(pets_run), sampled(pets_run, f"--shift {math.e}"))  # trained with --t-mean -1
    assert not np.array_equal(sampled(pets_run), sampled(pets_run, "--shift 1"))
    assert sample.usual_shift(Namespace(t_mean=-2, times="uniform")) == 1
    times = fm.time_grid(1000, sample.usual_shift(Namespace(t_mean=-2, times="logit-normal")))
    assert np.median(times) == approx(float(fm.sample_t(10_000, "logit-normal", -2).median()), abs=0.01)


@parametrize("solver", fm.SOLVERS)
def test_in_bf16_every_solver_keeps_its_state_in_float32_and_lands_nearby(solver, monkeypatch):
    """But dopri5, which would take the rounding for its own error, never uses it."""
    monkeypatch.setattr(model, "has_bf16", lambda device: True)
    # With Derf the last layer does not start at 0.
    net = model.build("transformer", res=16, width=32, depth=1, heads=2, norm="derf", shortcut=True)
    config, z, states = train.resolve({"res": 16, "predict": "v"}), torch.randn(2, 3, 16, 16), []
    rounded, _ = sample.generate(net, config, z, 4, solver, states=states)
    config.bf16 = False
    exact, _ = sample.generate(net, config, z, 4, solver)
    assert {state.dtype for state in states} == {torch.float32}
    assert torch.equal(rounded, exact) == (solver == "dopri5")
    assert_close(rounded, exact, atol=0.1, rtol=0.1)


# ---------------------------------------------------------------------------------------------------------------
# Shortcuts and labels


def test_one_shortcut_is_the_picture_that_the_network_draws_from_noise_for_all_of_the_time(pets_run):
    net, _ = model.load(pets_run)
    e, now, all_of_it = sample.noise(range(2), (3, 16, 16), seed=0), torch.zeros(2), torch.ones(2)
    drawn = sampled(pets_run, "--solver shortcut --steps 1")
    assert_allclose(drawn, net(e, now, None, all_of_it), atol=1e-5, rtol=1e-4)
    assert np.abs(drawn - sampled(pets_run, "--solver euler --steps 1")).max() > 1e-3


def test_labels_and_guidance_steer_the_samples(pets_run):
    dogs = sampled(pets_run, "--label dogs")
    for flags in ("", "--label cats", "--label dogs --guidance 4"):
        assert np.abs(sampled(pets_run, flags) - dogs).max() > 1e-3
    assert_array_equal(sampled(pets_run, "--label dogs --guidance 4 --interval 1 1"), dogs)  # never on
    unlabelled = sampled(pets_run, "--label dogs --guidance 0 --interval 0 1")
    assert_allclose(unlabelled, sampled(pets_run), atol=1e-5)
    rows = sampled(pets_run, "--label all --n 5 --batch 4")  # rounded up to two rows of three
    assert_allclose(rows[:3], sampled(pets_run, "--label cats --n 3"), atol=1e-5)
    assert_allclose(rows[3:], sampled(pets_run, "--label dogs --n 6")[3:], atol=1e-5)
    assert 1.8 < np.divide(*sampled(pets_run, "--label all --n 8", to="x.png").size) < 2  # two rows of four


@parametrize("text,multi_hot,rows", [
    ("dog", False, [1]),
    ("dog, cat", False, [1, 0]),  # two classes: a row of samples each
    ("all", False, [0, 1, 2]),
    ("dog,cat", True, [[1, 1, 0]]),  # two attributes: samples that have both
    ("all", True, [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
])
def test_a_label_is_read_as_its_kind_says(text, multi_hot, rows):
    checkpoint = {"label_names": ["cat", "dog", "7"], "multi_hot": multi_hot}
    assert sample.parse_label(text, checkpoint).tolist() == rows


# ---------------------------------------------------------------------------------------------------------------
# A number for quality


def save_folder(folder, pixels):
    Path(folder).mkdir()
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(f"{folder}/{i:05d}.png")


def distance_of(capsys, run, flags):
    """The distance and that of training pictures."""
    line = said(capsys, run, flags).splitlines()[-1]
    distance, ratio, floor = map(float, re.search(r"ones: (.*), (.*) times .* pictures, (.*)", line).groups())
    assert ratio == approx(distance / floor, rel=0.01)
    return distance, floor


def test_held_out_pictures_have_no_distance_and_worse_ones_more_than_training_pictures(pets_run, capsys):
    images, _, _, _ = data.load(str(pets_run.parent / "pets"), cache=pets_run.parent / "cache", res=16)
    training, held_out = data.split(400)
    known = images[training[:20]]
    blocks = known.reshape(20, 4, 4, 4, 4, 3).mean(axis=(2, 4)).astype(np.uint8)  # 4 x 4 pixels of one colour
    blurred = blocks.repeat(4, axis=1).repeat(4, axis=2)
    distance, floors = {}, set()
    for folder, pixels in dict(faces=images[held_out], known=known, blurred=blurred, copies=known[[0] * 20]).items():
        save_folder(folder, pixels)
        distance[folder], floor = distance_of(capsys, folder, f"--fd 20 --judge {pets_run}")
        floors.add(floor)
    assert len(floors) == 1
    assert distance["faces"] == approx(0, abs=1e-4)  # of the folder, though a dataset has that name
    assert distance["known"] / 2 < floor < 1.5 * distance["known"] < min(distance["blurred"], distance["copies"])


def test_the_distance_of_samples_is_that_of_their_folder_whatever_the_batch(pets_run, capsys):
    by_itself = distance_of(capsys, pets_run, "--fd 20 --steps 3 --seed 1 --batch 7")
    sampled(pets_run, "--n 20 --seed 1", to="drawn")
    assert by_itself == approx(distance_of(capsys, "drawn", f"--fd 20 --judge {pets_run}"), rel=1e-3)


@parametrize("network,features,later", [("transformer", 32, "blocks.2"), ("unet", 64, "up1")])
def test_the_judge_looks_through_noise_that_is_always_the_same_but_not_the_samplers(
        network, features, later, monkeypatch):
    """Samples seen through the noise that they grew from would look unlike held-out pictures, however good."""
    seen, noisy = [], sample.noisy
    monkeypatch.setattr(sample, "noisy", lambda x, e, t, config: seen.append(e) or noisy(x, e, t, config))
    net = model.build(network, res=16, channels=3, width=16, depth=3, heads=4).requires_grad_(False)
    for weight in net.get_submodule(later).parameters():
        weight.fill_(math.nan)  # what comes after the middle counts for nothing
    config, x = Namespace(network=network, bf16=False, path="linear"), torch.zeros(3, 3, 16, 16)
    rows = [sample.features(net, config, x, CPU, batch) for batch in (3, 2)]
    assert rows[0].shape == (3, features)
    assert_close(*rows)
    assert rows[0][:, features // 2 :].min() >= 0  # standard deviations
    assert torch.equal(seen[0], torch.cat(seen[1:]))
    assert (seen[0] * sample.noise(range(3), (3, 16, 16), seed=0)).mean().abs() < 0.1


# ---------------------------------------------------------------------------------------------------------------
# Editing


def test_interpolation_passes_through_the_samples_themselves(pets_run):
    """The last of each row has the noise of the next row's first one, and the label of its own row."""
    ends = sampled(pets_run, "--n 4 --label all")
    between = sampled(pets_run, "--n 4 --label all --interpolate 4").reshape(4, 4, 3, 16, 16)
    assert_allclose(between[:, 0], ends, atol=1e-5)
    assert_allclose(between[[0, 2], -1], ends[[1, 3]], atol=1e-5)
    a, b = torch.randn(2, 1000)
    assert sample.slerp(a, b, 0.5).norm() == approx(float(a.norm() + b.norm()) / 2, rel=0.02)
    sheet = sampled(pets_run, "--n 4 --interpolate 3 --label all", to="x.png")
    assert 1.2 < sheet.height / sheet.width < 1.4  # four rows of three


@parametrize("solver,start", [("heun", 0.75), ("dopri5", 0.75), ("dopri5", 0.999)])
def test_from_a_start_on_the_way_the_flow_takes_the_rest_of_the_time(solver, start):
    """It moves all by 1 in the time from 0 to 1."""
    z = torch.randn(2, 3)
    x, _ = sample.generate(lambda z, *_: 0 * z + 1, train.resolve({"predict": "v"}), z, 2, solver, start=start)
    assert_close(x, z + 1 - start)


def test_full_strength_forgets_the_picture_and_less_stays_nearer_to_it(pets_run):
    pixels = save_picture("a.png").transpose(2, 0, 1) / 127.5 - 1
    near, far = (sampled(pets_run, f"--from a.png --strength {strength}") - pixels for strength in (0.1, 0.9))
    assert np.abs(near).mean() < np.abs(far).mean()
    assert_array_equal(sampled(pets_run, "--from a.png --strength 1"), sampled(pets_run))


def test_inpainting_keeps_the_unmasked_part_exactly_and_fills_the_rest_differently(pets_run):
    pixels, mask = save_picture("a.png"), np.zeros((16, 16), np.uint8)
    mask[4:9, 5:] = 255
    known = mask == 0
    Image.fromarray(mask).save("mask.png")
    flags = "--inpaint a.png --mask mask.png"
    x = sampled(pets_run, flags)
    assert (x[:, :, known] == data.to_tensor(pixels[None], CPU).numpy()[:, :, known]).all()
    assert (sampled(pets_run, flags, to="folder")[:, known] == pixels[known]).all()
    assert np.abs(x[0] - x[1]).max() > 1e-3
    assert_allclose(sampled(pets_run, f"{flags} --n 3 --batch 1")[:2], x, atol=1e-5)  # a function of (seed, i) alone
    assert sampled(pets_run, flags, to="x.gif").n_frames == 4


def test_a_picture_is_prepared_as_for_training_and_grey_for_a_grey_network(capsys):
    save_picture("small.jpg", size=(10, 14))
    for name, channels in (("pets", 3), ("mnist", 1)):
        x = sample.read_picture("small.jpg", Namespace(data=name, res=16), CPU)
        assert_array_equal(data.to_uint8(x)[0], data.read_picture("small.jpg", 16, channels)[0])
    assert capsys.readouterr().out == 2 * "small.jpg: enlarged to 16x16\n"


# ---------------------------------------------------------------------------------------------------------------
# Likelihood


def likelihood(capsys, net, name, predict, images, n, steps):
    """What --bpd prints of a network."""
    config = Namespace(data=name, predict=predict, path="linear")
    sample.likelihood(net, config, images, Namespace(bpd=n, steps=steps, seed=0, batch=20), CPU)
    return capsys.readouterr().out


@parametrize("predict", "vx")
def test_likelihood_under_a_flow_that_moves_nothing_is_that_of_the_noise(predict, capsys):
    """The density is the standard normal, at t = 1, too. The error is the standard deviation over the root of n."""
    points = data.points("moons", 2000, seed=0).numpy()
    words = likelihood(capsys, lambda z, *_: z * (predict == "x"), "moons", predict, points, 50, 3)
    nats = -scipy.stats.norm.logpdf(points[data.split(2000)[1][:50]]).sum(1)
    assert words.startswith(f"{nats.mean():.3f} +- {nats.std(ddof=1) / math.sqrt(50):.3f} nats on 50 held-out samples")


def test_bits_per_dimension_of_gaussian_pictures_are_their_entropy_in_grey_levels(capsys):
    """Pixels with a standard deviation of two grey levels, and a perfect network for them. Rounding them to bytes adds
    a variance of 1/12. One level is 1 / 127.5 wide. Of fewer than 20 pictures none is held out, and that is said."""
    pixels = 127.5 + 2 * np.random.default_rng(0).normal(size=(10, 16, 16, 3))
    variance = 4 + 1 / 12

    def net(z, t, *_):
        t, s2 = t.view(-1, 1, 1, 1), variance / 127.5**2
        return t * s2 * z / (t**2 * s2 + (1 - t) ** 2)

    words = likelihood(capsys, net, "pets", "x", pixels.round().astype(np.uint8), 10, 20)
    assert "bits per dimension at most on 10 training (too few to hold any out) samples, 20 steps of rk4, NFE" in words
    widened = variance + (127.5 * (1 - sample.T_END) / sample.T_END) ** 2  # it is a bound, and this is by how much
    assert float(words.split()[0]) == approx(math.log2(2 * math.pi * math.e * widened) / 2, abs=0.04)


# ---------------------------------------------------------------------------------------------------------------
# README.md, and bad input to sample.py: one line with the words that help, before the work. Nothing is overwritten.


def test_the_first_program_of_the_readme_learns_the_moons():
    program = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(program, names)
    assert fm.w2(data.points("moons", 500, seed=10**6), names["samples"][:500]) < 0.8


def test_a_mistake_on_the_real_command_line_shows_one_line():
    done = command("sample.py", "nowhere")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "nowhere/ckpt.pt" in done.stderr


@parametrize("flags,words", [
    ("--label cow", "--label cow: cats, dogs"),
    ("--guidance 2", "--guidance --label"),
    ("--interpolate 3 --n 1", "--interpolate --n 2"),
    ("--inpaint a.png", "--inpaint --mask"),
    ("--inpaint a.png --mask a.png --steps 1", "--inpaint --steps 2"),
    ("--label cats --interval 1 0", "--interval earlier"),
    ("--to a.gif", "a.gif folder of that name"),
    ("--inpaint a.png --mask black.png", "black.png no hole white"),
    ("--inpaint a.png --mask wide.png", "wide.png size of a.png"),
    ("--judge .", "--judge --fd"),
    ("--bpd 2 --to x.npy", "--bpd leave --to out"),
    (f"--to {'x' * 300}", "too long"),
    ("--from nowhere.png", "cannot read nowhere.png"),
    ("--from a.png --to a.png", "a.png would write over"),
    ("--from a.png --to .", "a.png another place"),
    ("--to x.jpg", "x.jpg .png, .gif, .npy"),
    ("--data .", "--data --bpd"),
    ("--to taken --n 9", "taken 1 files 00003.png new folder"),
    ("--solver shortcut --steps 3", "--steps 1, 2, 4, 8, 16"),
    ("--solver shortcut --shift 2", "shortcut --shift"),
    ("--solver shortcut --from a.png", "shortcut --from"),
    ("--fd 21", "--fd 21 held 20"),
    ("--fd 5 --label cats,dogs,cats", "--fd 5 (6, 3, 16, 16)"),
])
def test_sample_refuses_what_cannot_work_before_the_work(flags, words, pets_run, capsys, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    save_picture("a.png")
    Image.new("L", (16, 16), 0).save("black.png")
    Image.new("L", (20, 16), 255).save("wide.png")
    write("taken", {"00003.png": b"old"})
    Path("a.gif").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")}
    refuses(capsys, words, sample.main, [str(pets_run), "--device", "cpu", *flags.split()])
    assert {path: path.is_file() and path.read_bytes() for path in Path().rglob("*")} == before


def test_what_cannot_be_judged_or_is_not_what_a_run_has_learnt_is_refused(pets_run, capsys, monkeypatch):
    train_moons("--steps 2")
    train_faces("--steps 1 --cond hat,beard --drop 0 --out deaf")
    sampled("deaf", "--label hat,beard")
    torch.save(state(pets_run) | {"content": "another hash"}, "other.pt")
    save_folder("drawn", np.zeros((3, 16, 16, 3), np.uint8))
    monkeypatch.setattr(sample, "generate", None)
    for args, words in (
        ("other.pt --bpd 2", "pets is not what /run has learnt train.py --out"),
        ("deaf", "--drop 0 --label"),
        ("deaf --label hat --guidance 2", "--drop 0 --guidance"),
        ("deaf --label hat --bpd 2", "--bpd --label"),
        (f"{pets_run} --fd 5 --judge deaf", "deaf --drop 0 --judge"),
        ("out/moons --fd 5", "--fd points W2"),
        ("out/moons --from drawn/00000.png", "draws points"),
        ("out/moons --to folder", ".png, .gif, .npy"),
        ("drawn --fd 3", "drawn --judge"),
        (f"{pets_run}/stable.pt --solver shortcut", "stable.pt has not learnt --shortcut"),  # from before the cool-down
        (f"drawn --fd 4 --judge {pets_run}", "--fd 4 drawn only 3"),
        (f"out/moons --fd 5 --judge {pets_run}", "--fd 5 (5, 3, 16, 16) (5, 2)"),
    ):
        refuses(capsys, words, sample.main, [*args.split(), "--device", "cpu"])


# ---------------------------------------------------------------------------------------------------------------
# assets/figures.py


@pytest.fixture
def drawing():
    figures.FIGURES.mkdir(parents=True)


def test_the_figures_that_need_no_run_are_drawn_and_show_what_is_known(drawing):
    assert min(figures.draw_flow()) > 1.1  # paths bend
    assert figures.draw_noise() == approx([0.7, 0.7 / 8], rel=0.05)  # 64 pixels are averaged
    # At t = pi, Euler's sum of cosines is too large by exactly the step.
    assert figures.draw_sine() == approx([2 * math.pi / steps for steps in (10, 30, 100)])
    # The last two of 50 steps, with 1-t = 0.04 and 0.02, each divide by 0.05, and leave 60%.
    x, e = figures.a_face(64)
    assert figures.draw_last() == approx([0.04 * 0.6**2 * (e - x).std().item() * 127.5, 0], rel=1e-3, abs=1e-3)
    most, error = figures.draw_patches()
    assert most == approx(4, abs=1e-4) and error < 1e-6  # where rows and columns overlap
    for res, t in zip((64, 256, 512), figures.draw_times()):  # where the density's derivative is 0
        assert math.log(t / (1 - t)) == approx(fm.logit_normal_mean(res) + 0.8**2 * (2 * t - 1), abs=0.02)
    names = {file.stem for file in figures.FIGURES.iterdir()}
    assert names == {"flow", "noise", "sine", "last", "patches", "times"}


@every_path
def test_the_exact_velocity_is_the_mean_over_the_data_weighted_by_the_density_of_their_noise(path):
    points, z, t = normal(5, 2), normal(3, 2), 0.4
    alpha, sigma, d_alpha, d_sigma = (float(number) for number in path(torch.tensor(t, dtype=torch.float64)))
    for place, v in zip(z, figures.exact_velocity(points, path)(z, t)):
        noises = (place - alpha * points) / sigma
        weights = scipy.stats.multivariate_normal(cov=np.eye(2)).pdf(noises)
        assert_allclose(v, np.average(d_alpha * points + d_sigma * noises, axis=0, weights=weights))


def test_paths_of_a_run_with_optimal_transport_are_straighter(drawing):
    for flags in ("--out random", "--ot --out ot"):
        train_moons(f"--steps 300 {flags}")
    random, ot = figures.draw_moons("random", "ot")
    assert 1 <= ot < 1.06 < random < 1.6
    assert Image.open(figures.FIGURES / "moons.png").size == (3 * 480, 2 * 510)
    figures.main("rows", figures.FIGURES / "moons.png", figures.FIGURES / "moons.png")
    assert Image.open(figures.FIGURES / "rows.png").size == (3 * 480, 30 + 2 * 510)  # one name, one row


def test_in_many_dimensions_x_prediction_finds_the_buried_plane_and_e_prediction_does_not(drawing, monkeypatch):
    """The noise has 128 numbers, and the moons have 2."""
    monkeypatch.setattr(figures, "PREDICTIONS", "xe")
    distances = figures.draw_planes(dims=(128,), steps=80, n=200)
    assert distances["x", 128] < 2 and distances["e", 128] > 3 * distances["x", 128]


def test_border_ratio_finds_a_grid_of_patches_and_none_in_noise():
    noise, borders = torch.randn(200, 3, 16, 16), torch.tensor([5, 6, 10, 11])
    brightness = torch.bucketize(torch.arange(16), borders, right=True)  # a step at each border
    assert figures.border_ratio(noise, 6, 5) == approx(1, abs=0.05)
    assert figures.border_ratio(noise + 3 * brightness, 6, 5) > 3
