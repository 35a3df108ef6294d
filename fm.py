"""Flow matching, the mathematics: functions on tensors. Knows no network, file or flag; assets/figures.py draws it.

Letters (code that is not about the flow may use x and the others for something else):

    x   clean data                        t   time: 0 is noise, 1 is data   (B,)
    e   noise, standard normal            z   noisy state, alpha(t) x + sigma(t) e
    y   labels                            v   velocity, dz/dt = alpha'(t) x + sigma'(t) e

Some papers run time the other way (t = 1 is noise). We never do.

The whole idea: draw x and e, mix them into z, and regress the velocity v that carries z on towards x. Many pairs
(x, e) pass through the same z, so the network that minimises the squared error learns the mean of their velocities.
Following that mean velocity from noise at t = 0 leads, at t = 1, to samples distributed like the data (Lipman et al.
2022, arXiv 2210.02747; Liu et al. 2022, arXiv 2209.03003).
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

# Lower bound for divisors that go to 0 at one end of time. It bounds the default loss's weight 1 / (1-t)^2 at 400.
CLAMP = 0.05


# ---------------------------------------------------------------------------------------------------------------
# Paths: how data and noise are mixed at time t. A path returns alpha, sigma and their derivatives.


def linear(t):
    """The straight path z = t x + (1-t) e. Its velocity x - e does not depend on t."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def cosine(t):
    """A quarter circle: alpha^2 + sigma^2 = 1, so z keeps unit variance if x has unit variance."""
    angle = math.pi / 2 * t
    alpha, sigma = torch.sin(angle), torch.cos(angle)
    return alpha, sigma, math.pi / 2 * sigma, -math.pi / 2 * alpha


PATHS = {"linear": linear, "cosine": cosine}


def per_sample(t, z):
    """t of shape (B,) as (B, 1, 1, ...), so that it multiplies z sample by sample."""
    return t.view(-1, *[1] * (z.dim() - 1))


# ---------------------------------------------------------------------------------------------------------------
# The loss.


def loss(net, x, e, t, y=None, predict="x", target="v", path=linear, jitter=None):
    """The flow matching loss of each sample, shape (B,). It is plain regression: training solves no ODE.

    net(z, t, y) predicts `predict`, and the squared error is taken on `target`; each is one of "x", "e", "v". The
    default, x and v, is Algorithm 1 of Li & He 2025 ("Back to Basics", arXiv 2511.13720). Natural pictures lie near a
    low-dimensional surface, and noise and velocities do not: so a clean picture is the easiest thing to predict.
    jitter: extra noise on the network's input only, shaped as z. It teaches the network to correct small errors in z.
    """
    z = mix(x, e, t, path)
    prediction = net(z if jitter is None else z + jitter, t, y).to(z.dtype)
    return squared_error(prediction, x, e, t, predict, target, path)


def mix(x, e, t, path=linear):
    """The noisy state z at the times t, (B,)."""
    alpha, sigma, _, _ = path(per_sample(t, x))
    return alpha * x + sigma * e


def squared_error(prediction, x, e, t, predict, target, path):
    """The squared error of the network's prediction, on `target`: the mean over each sample's numbers, (B,)."""
    if predict == "v":
        _, _, d_alpha, d_sigma = path(per_sample(t, x))
        truth = d_alpha * x + d_sigma * e
    else:
        truth = x if predict == "x" else e
    # Truth and prediction could each be converted to `target` and then subtracted. But z would cancel, and what stays
    # is their difference times a factor, one number a sample: so the factor is applied last, to the mean.
    weight, _ = factors(predict, target, t, path, CLAMP)
    return weight.square() * (prediction - truth).square().flatten(1).mean(1)


def factors(have, want, t, path=linear, clamp=0.0):
    """The numbers a and b, (B,) each, for which want = a * have + b * z. Both are one of "x", "e", "v".

    (z, v) is a 2x2 linear map of (x, e), so z and any one of the three give the other two:

        z = alpha  x + sigma  e
        v = alpha' x + sigma' e          det = alpha' sigma - sigma' alpha        (1 on the straight path)

    clamp: lower bound of the divisor where it can be 0: sigma for have = "x" (0 at the data end), alpha for have =
    "e" (0 at the noise end).

    a squared is the weight that a loss on `want` gives to an error of `have`. On the straight path:

        x -> v   1 / max(1-t, clamp)^2        v -> x   (1-t)^2        x -> e   t^2 / max(1-t, clamp)^2
        e -> v   1 / max(t, clamp)^2          v -> e   t^2            e -> x   (1-t)^2 / max(t, clamp)^2
    """
    if have == want:
        return torch.ones_like(t), torch.zeros_like(t)
    alpha, sigma, d_alpha, d_sigma = path(t)
    det = d_alpha * sigma - d_sigma * alpha
    if have == "x":
        divisor = sigma.clamp(min=clamp)
        return (det / divisor, d_sigma / divisor) if want == "v" else (-alpha / divisor, 1 / divisor)
    if have == "e":
        divisor = alpha.clamp(min=clamp)
        return (-det / divisor, d_alpha / divisor) if want == "v" else (-sigma / divisor, 1 / divisor)
    return (sigma / det, -d_sigma / det) if want == "x" else (-alpha / det, d_alpha / det)


def convert(p, have, want, z, t, path=linear, clamp=0.0):
    """A prediction p of `have`, shaped as z, as a prediction of `want`; see `factors`."""
    if have == want:
        return p
    a, b = factors(have, want, t, path, clamp)
    return per_sample(a, z) * p + per_sample(b, z) * z


# ---------------------------------------------------------------------------------------------------------------
# What a training step draws: times, and which noise goes with which picture.

LOGIT_STD = 0.8  # standard deviation of logit(t)


def logit_normal_mean(res):
    """Mean of logit(t) for pictures of res x res pixels: -0.8 at 256 pixels, lower (noisier) for larger ones.

    Averaging neighbouring pixels removes noise but hardly changes a picture, so large pictures need more noise to
    hide the same content. On the straight path logit(t) = log(alpha / sigma). Shifting it by -log(res/256) gives all
    resolutions the same signal-to-noise ratio once they are averaged down to a common size (Hoogeboom et al. 2023,
    "Simple Diffusion", arXiv 2301.11093; -0.8 and the deviation 0.8: Li & He 2025, arXiv 2511.13720).
    """
    return -0.8 - math.log(res / 256)


def sample_t(n, times="logit-normal", mean=0.0, generator=None, device=None):
    """n training times in [0, 1]. Logit-normal: sigmoid of a normal with this mean, so most times lie near
    sigmoid(mean), and the two ends are rare. Uniform: all alike, and the mean has no effect."""
    if times == "uniform":
        return torch.rand(n, generator=generator, device=device)
    return torch.sigmoid(mean + LOGIT_STD * torch.randn(n, generator=generator, device=device))


def ot_pair(x, e, group):
    """Optimal-transport coupling within a batch: returns e permuted so that the sum of |x - e|^2 is least.

    With random pairs paths cross, and where they cross the network can only learn the mean of their directions.
    Optimal pairs hardly cross: paths become nearly straight, and a few Euler steps suffice (Tong et al. 2023, arXiv
    2302.00482; Pooladian et al. 2023, arXiv 2304.14772). Only the noise is permuted, so x and its labels keep their
    order. Every e is used exactly once, so the noise stays standard normal.
    group: solve the assignment, which costs O(n^3), for this many samples at a time. Raises ValueError if x or e is not
    finite.

    With labels, take care. Pairs ignore labels, so a label's pictures train with the noises nearest to them, not with
    all of the noise. At sampling that label meets noise it seldom trained with, most visibly under guidance.
    """
    # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two sums are the same for every pairing.
    products = (x.flatten(1) @ e.flatten(1).T).cpu().double().numpy()
    if not np.isfinite(products).all():
        raise ValueError("ot_pair: x and e must be finite, found NaN or infinity")
    order = []
    for start in range(0, len(x), group):
        here = slice(start, start + group)
        _, partners = linear_sum_assignment(products[here, here], maximize=True)
        order.extend(start + partners)
    return e[torch.tensor(order, device=e.device)]


# ---------------------------------------------------------------------------------------------------------------
# Sampling: follow dz/dt = v(z, t) from noise to data.


def velocity(net, predict="x", path=linear, y=None, y_null=None, guidance=1.0, interval=(0.1, 1.0), clamp=0.0):
    """The network's velocity field v(z, s), with the time s a float, for `solve`. If it has learnt shortcuts, see
    below, also v(z, s, t): the mean velocity from time s to time t. Without guidance times may be (B,), one for each
    sample.

    Guidance w is classifier-free (Ho & Salimans 2022, arXiv 2207.12598): v_null + w (v_y - v_null), for t within the
    interval only (Kynkäänniemi et al. 2024, arXiv 2404.07724); a shortcut counts by its middle. y_null: y with all
    labels hidden. Within the interval the network sees each z twice, with y and with y_null; otherwise once.

    clamp: as in `factors`. Sampling with x-prediction needs none. At 50 steps, training's clamp would let the last step
    divide by 0.05 where 1-t is 0.02: it would go only 40% of the way to the predicted picture, and leave noise.
    Unclamped, the last Euler step ends at z + (1-t) (x_pred - z) / (1-t) = x_pred. (On the cosine path it ends near
    x_pred, and nearer with more steps.) An e-prediction always gets training's, since its divisor alpha is 0 at the
    first step. This costs a little: with a perfect e-prediction on the straight path, data from N(2, 0.5^2) come out
    with mean 1.974 and standard deviation 0.513, however fine the steps.
    """
    if predict == "e":
        clamp = max(clamp, CLAMP)

    def v(z, s, t=None):
        middle = s if t is None else (s + t) / 2
        guided = guidance != 1 and interval[0] <= middle <= interval[1]
        inputs, labels = z, y
        if guided:  # both halves in one batch
            inputs, labels = torch.cat([z, z]), torch.cat([y, y_null])
        times = inputs.new_zeros(len(inputs)) + s  # s, a float or (B,), as (B,)
        length = None if t is None else t - times
        prediction = net(inputs, times, labels, length).to(z.dtype)
        result = convert(prediction, predict, "v", inputs, times, path, clamp)
        if guided:
            v_y, v_null = result.chunk(2)
            return v_null + guidance * (v_y - v_null)
        return result

    return v


def euler(v, z, s, t):
    """One step from time s to time t along the velocity at s. Order 1: half the step, half the error."""
    return z + (t - s) * v(z, s)


@torch.no_grad()
def solve(v, z, ts, step=euler, end_euler=False, states=None):
    """Integrates dz/dt = v(z, t) along the times ts (floats, in either direction). Returns z and the NFE, the number
    of evaluations of v.

    step: one of SOLVERS, a function (v, z, s, t) that returns the state at time t.
    end_euler: take the last step by Euler's rule, which never evaluates v at the end. Needed from noise to data when
    the network predicts x and nothing is clamped: its velocity (x_pred - z) / (1-t) divides by 0 at t = 1.
    states: a list that receives the state after each step.
    """
    nfe = 0

    def counted_v(*inputs):
        nonlocal nfe
        nfe += 1
        return v(*inputs)

    for s, t in zip(ts, ts[1:]):
        if end_euler and t == ts[-1]:
            step = euler
        z = step(counted_v, z, s, t)
        if states is not None:
            states.append(z)
    return z, nfe


def time_grid(steps, shift=1.0):
    """steps + 1 times from 0 (noise) to 1 (data), equally spaced. A shift above 1 makes steps smaller near
    the noise: it divides the odds t / (1-t) (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return [grid_time(i, steps, shift) for i in range(steps + 1)]


def grid_time(i, steps, shift):
    return i / (i + shift * (steps - i))


def heun(v, z, s, t):
    """The mean of the velocities at both ends of an Euler step. Order 2."""
    k1 = v(z, s)
    k2 = v(z + (t - s) * k1, t)
    return z + (t - s) / 2 * (k1 + k2)


def midpoint(v, z, s, t):
    """The velocity in the middle of an Euler step. Order 2."""
    middle = (s + t) / 2
    z_middle = z + (middle - s) * v(z, s)
    return z + (t - s) * v(z_middle, middle)


def rk4(v, z, s, t):
    """The classical Runge-Kutta method. Order 4."""
    h, middle = t - s, (s + t) / 2
    k1 = v(z, s)
    k2 = v(z + h / 2 * k1, middle)
    k3 = v(z + h / 2 * k2, middle)
    k4 = v(z + h * k3, t)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def dopri5(v, z, s, t, tol=1e-4):
    """Many steps, which adapt: each keeps the estimated error below tol (1 + |z|), as a root mean square over the whole
    batch (Dormand & Prince 1980). Order 5. scipy does it, in float64 on the CPU."""
    from scipy.integrate import RK45  # only here, since it takes half a second to import

    def flat_velocity(time, flat):
        state = torch.tensor(flat, dtype=z.dtype, device=z.device).view_as(z)
        return v(state, time).flatten().cpu().numpy()

    start = z.flatten().cpu().numpy()
    ode = RK45(flat_velocity, s, start, t, rtol=tol, atol=tol, first_step=abs(t - s) / 10)
    while ode.status == "running":
        ode.step()
    if ode.status == "failed":
        raise FloatingPointError(f"dopri5: no step is short enough at t = {ode.t:.6f} for tol = {tol}")
    return torch.tensor(ode.y, dtype=z.dtype, device=z.device).view_as(z)


def shortcut(v, z, s, t):
    """Along the mean velocity from s to t, in one evaluation; see below."""
    return z + (t - s) * v(z, s, t)


SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "dopri5": dopri5, "shortcut": shortcut}


def inpaint(v, z, x, hole, new_noise, ts, path=linear, step=heun, end_euler=False, states=None, repeats=5):
    """Fills a hole in the picture x. Returns the picture and the NFE. hole: bool, True where to fill. new_noise():
    a new e, shaped as z.

    Outside the hole it is known how z is distributed at time t: x mixed with noise. So after each step that part is
    replaced, and the network continues the rest to fit. At t = 1 the known part is x itself (to 1e-7 on the cosine
    path). But at noisy times little of x can be seen, so early choices in the hole may not match their surroundings.
    Therefore each step is taken `repeats` times: the result goes back to the time before, with new noise, and the hole
    gets another chance (RePaint, Lugmayr et al. 2022, arXiv 2201.09865, who did it for diffusion).
    """
    nfe = 0
    for s, t in zip(ts, ts[1:]):
        alpha_s, sigma_s, _, _ = path(torch.tensor(s, dtype=z.dtype))
        alpha_t, sigma_t, _, _ = path(torch.tensor(t, dtype=z.dtype))
        for turn in range(repeats):
            if turn > 0:
                # Back from t to s: scale z so that it holds alpha_s x; its noise is then scale * sigma_t, and new noise
                # brings it up to sigma_s.
                scale = alpha_s / alpha_t
                missing = (sigma_s**2 - (scale * sigma_t) ** 2).sqrt()
                z = scale * z + missing * new_noise()
            z, evaluations = solve(v, z, [s, t], step, end_euler and t == ts[-1])
            nfe += evaluations
            z = torch.where(hole, z, alpha_t * x + sigma_t * new_noise())
        if states is not None:
            states.append(z)
    return z, nfe


# ---------------------------------------------------------------------------------------------------------------
# One step: shortcuts, which train.py --shortcut learns beside the flow.
#
# Solvers take many steps because the velocity changes on the way. But a network can also learn the mean velocity. Start
# at z at time s, follow the flow until time t, and call the end X. The mean velocity is u = (X - z) / (t - s), so
#
#     X(z, s, t) = z + (t - s) u(z, s, t)              u(z, s, s) = v(z, s)
#
# Then X(e, 0, 1) is a sample, in one evaluation. Nobody has to solve an ODE to learn u. A shortcut must land where two
# shorter ones land, by way of a time m between s and t:
#
#     (t - s) u(z, s, t) = (m - s) u(z, s, m) + (t - m) u(z_m, m, t)              z_m = X(z, s, m)
#
# So long ones are learnt from shorter ones, and the shortest from two Euler steps of the flow (Frans et al. 2024,
# "shortcut models", arXiv 2410.12557; for any s, m, t: Boffi et al. 2025, arXiv 2505.18825).

# The ways to cut [0, 1] into shortcuts. Each cuts every step of the one before in two, so m is a time of the next.
SHORTCUT_STEPS = (1, 2, 4, 8, 16)


def sample_shortcuts(n, shift=1.0, generator=None, device=None):
    """n random shortcuts, (n,) each: the times s, m and t, and whether they are of the shortest kind. They are steps of
    `time_grid`, and each of the grids of SHORTCUT_STEPS is drawn equally often."""
    steps = 2 ** torch.randint(len(SHORTCUT_STEPS), (n,), generator=generator, device=device)
    i = torch.floor(steps * torch.rand(n, generator=generator, device=device))
    s, m, t = (grid_time(i + part, steps, shift) for part in (0, 0.5, 1))
    return s, m, t, steps == SHORTCUT_STEPS[-1]


def shortcut_target(u, z, s, m, t, shortest):
    """The mean velocity from s to t, by way of m: that of two shortcuts, or of two Euler steps if it is of the shortest
    kind. s, m, t and shortest are (B,). The result has the shape of z."""
    before, after = per_sample(m - s, z), per_sample(t - m, z)
    first = u(z, s, torch.where(shortest, s, m))
    z_m = z + before * first
    second = u(z_m, m, torch.where(shortest, m, t))
    return (before * first + after * second) / (before + after)


def loss_with_shortcuts(net, teacher, x, e, t, shortcuts, y=None, predict="x", target="v", path=linear, jitter=None):
    """The losses of a batch whose last samples learn shortcuts, and whose others the flow, in one pass of the network:
    (of the flow, of the shortcuts), one number a sample. For a shortcut it is the squared error of what the network
    predicts, where the teacher's two shorter shortcuts are the truth.

    teacher: the averaged network, which learns nothing here. shortcuts: (s, m, t, shortest), as `sample_shortcuts`
    returns them. The others as in `loss`; those t that belong to shortcuts are not used.
    """
    s, m, end, shortest = shortcuts
    n = len(x) - len(s)
    start = torch.cat([t[:n], s])
    length = torch.cat([torch.zeros_like(t[:n]), end - s])  # 0: the flow itself
    z = mix(x, e, start, path)
    prediction = net(z if jitter is None else z + jitter, start, y, length).to(z.dtype)
    flow = squared_error(prediction[:n], x[:n], e[:n], t[:n], predict, target, path)
    with torch.no_grad():
        u = velocity(teacher, predict, path, None if y is None else y[n:])
        mean_velocity = shortcut_target(u, z[n:], s, m, end, shortest)
        truth = convert(mean_velocity, "v", predict, z[n:], s, path)
    return flow, (prediction[n:] - truth).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Likelihood: a flow is invertible, so the density of its samples is known (Chen et al. 2018, arXiv 1806.07366).


def log_likelihood(v, x, ts, probe=None):
    """log p(x) of each sample in nats, (B,), and the NFE. It solves z from data back to noise together with

        d log p(z_t) / dt = - trace(dv/dz)        so log p(x) = log N(e; 0, 1) - integral of the trace over [0, 1]

    ts: times of RK4's steps, from data to noise; any clock u that runs with t will do, if v is dz/du. probe:
    random signs shaped as x, the same for the whole solve, for Hutchinson's unbiased estimate of the trace, probe^T
    (dv/dz) probe (Grathwohl et al. 2018, arXiv 1810.01367). None: the exact trace, a sum over all d unit vectors, in d
    backward passes per evaluation.
    """
    d = x[0].numel()
    if probe is None:
        unit_vectors = torch.eye(d, dtype=x.dtype, device=x.device).view(d, 1, *x.shape[1:])
        probes = [vector.expand_as(x) for vector in unit_vectors]
    else:
        probes = [probe]

    def velocity_and_trace(state, t):
        z = state[:, :d].reshape(x.shape)
        with torch.enable_grad():
            z.requires_grad_()
            out = v(z, t)
        trace = 0
        for p in probes:
            (gradient,) = torch.autograd.grad(out, z, p, retain_graph=True)
            trace = trace + (gradient * p).flatten(1).sum(1)
        return torch.cat([out.detach().flatten(1), trace[:, None]], dim=1)

    start = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    end, nfe = solve(velocity_and_trace, start, ts, rk4)
    e, integral = end[:, :d], end[:, d]  # from data to noise: this is minus the integral from noise to data
    log_normal = -(e.square().sum(1) + d * math.log(2 * math.pi)) / 2
    return log_normal + integral, nfe


def bits_per_dimension(v, x, e, probe, t_end, steps, path=linear):
    """An upper bound on the bits that each number of the pictures x takes, (B,), and the NFE. It is a bound on average
    over e and probe, and up to the solver's error.

    A flow has a density for real numbers, but pictures are bytes: 256 grey levels. So stop just before 1, at t_end, and
    draw z from q(z|x) = N(alpha x, sigma^2). Count the bits of z, and then those of which level each number has, less
    the information in the draw itself (variational dequantisation, Ho et al. 2019, arXiv 1902.00275; with the levels as
    here: Kingma et al. 2021, arXiv 2107.00630):

        -log P(x)  <=  mean over z of  [log q(z|x) - log p(z) - log P(x|z)]

    e: the noise of the draw, standard normal. probe: see log_likelihood. v: an x-prediction needs no clamp, since t
    stays below 1. The later t_end, the more certain the level, but errors of the network near t = 1 then cost more.
    """
    alpha, sigma, _, _ = path(torch.tensor(t_end, dtype=x.dtype))
    z = alpha * x + sigma * e
    log_draw = -(e.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2 - x[0].numel() * sigma.log()

    def v_u(z, u):
        """dz/du with the clock u = log(1 - t), since near t = 1 things happen in times of the size of 1 - t."""
        return -math.exp(u) * v(z, 1 - math.exp(u))

    us = np.linspace(math.log(1 - t_end), 0, steps + 1).tolist()
    log_density, nfe = log_likelihood(v_u, z, us, probe)
    grey_levels = alpha * (torch.arange(256, dtype=x.dtype, device=x.device) / 127.5 - 1)  # as in data.to_tensor
    log_levels = []
    for picture, noisy in zip(x, z):  # one by one, for there are 256 numbers for each number of a picture
        fit = (-(noisy[..., None] - grey_levels).square() / (2 * sigma**2)).log_softmax(dim=-1)
        true_level = ((picture + 1) * 127.5).round().long()[..., None]
        log_levels.append(fit.gather(-1, true_level).sum())
    bound = log_draw - log_density - torch.stack(log_levels)
    return bound / (x[0].numel() * math.log(2)), nfe


# ---------------------------------------------------------------------------------------------------------------
# Measuring.


def w2(a, b):
    """The exact 2-Wasserstein distance between two clouds of n points, by assignment in O(n^3). Infinite if a point is
    not finite."""
    cost = torch.cdist(a.flatten(1).cpu().double(), b.flatten(1).cpu().double()).square().numpy()
    if not np.isfinite(cost).all():
        return math.inf
    rows, columns = linear_sum_assignment(cost)
    return float(np.sqrt(cost[rows, columns].mean()))


def frechet(a, b):
    """The Fréchet distance between two sets of vectors, (n, d): the squared 2-Wasserstein distance between the normal
    distributions with their means and covariances (Heusel et al. 2017, arXiv 1706.08500):

        |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 sqrt(cov_a cov_b))

    The fewer vectors, the larger it comes out, since covariances are then known badly: compare only results of equal n.
    """
    a, b = a.cpu().double(), b.cpu().double()
    mean_a, mean_b = a.mean(0), b.mean(0)
    # Matrices with root_a^T root_a = cov_a. The singular values of root_a root_b^T are the roots of the eigenvalues of
    # cov_a cov_b, and their sum is the nuclear norm.
    root_a = (a - mean_a) / math.sqrt(len(a) - 1)
    root_b = (b - mean_b) / math.sqrt(len(b) - 1)
    traces = root_a.square().sum() + root_b.square().sum() - 2 * torch.linalg.matrix_norm(root_a @ root_b.T, "nuc")
    return ((mean_a - mean_b).square().sum() + traces).item()
