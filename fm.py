"""Flow matching, the mathematics: functions on tensors. Knows no network, file or flag.

    python fm.py      draws what is said here, into out/figures/; nothing is trained

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
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import brentq, linear_sum_assignment

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
    alpha, sigma, d_alpha, d_sigma = path(per_sample(t, x))
    z = alpha * x + sigma * e
    truth = {"x": x, "e": e, "v": d_alpha * x + d_sigma * e}[predict]
    prediction = net(z if jitter is None else z + jitter, t, y).to(z.dtype)
    # Truth and prediction are turned into v (or whatever `target` says) alike. This divides by 1-t, clamped, so near
    # t = 1 not even the true x gives exactly x - e; but a perfect prediction has loss 0 at every t.
    v = convert(truth, predict, target, z, t, path, CLAMP)
    v_pred = convert(prediction, predict, target, z, t, path, CLAMP)
    return (v - v_pred).square().flatten(1).mean(1)


def convert(p, have, want, z, t, path=linear, clamp=0.0):
    """Turns a prediction of one of x, e, v into another of them.

    (z, v) is a 2x2 linear map of (x, e), so z and any one of the three give the other two:

        z = alpha  x + sigma  e
        v = alpha' x + sigma' e          det = alpha' sigma - sigma' alpha        (1 on the straight path)

    p: tensor shaped as z, a prediction of `have`; returns it converted to `want`; both are one of "x", "e", "v".
    clamp: lower bound of the divisor where it can be 0: sigma for have = "x" (0 at the data end), alpha for have =
    "e" (0 at the noise end).

    The factor in front of p, squared, is the weight that a loss on `want` gives to the error of p. On the straight
    path:

        x -> v   1 / max(1-t, clamp)^2        v -> x   (1-t)^2        x -> e   t^2 / max(1-t, clamp)^2
        e -> v   1 / max(t, clamp)^2          v -> e   t^2            e -> x   (1-t)^2 / max(t, clamp)^2
    """
    if have == want:
        return p
    alpha, sigma, d_alpha, d_sigma = path(per_sample(t, z))
    det = d_alpha * sigma - d_sigma * alpha
    if have == "x":
        divisor = sigma.clamp(min=clamp)
        return (det * p + d_sigma * z) / divisor if want == "v" else (z - alpha * p) / divisor
    if have == "e":
        divisor = alpha.clamp(min=clamp)
        return (d_alpha * z - det * p) / divisor if want == "v" else (z - sigma * p) / divisor
    return (sigma * p - d_sigma * z) / det if want == "x" else (d_alpha * z - alpha * p) / det


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


def logit_normal(n, mean, generator, device):
    """sigmoid of a normal: most times lie near sigmoid(mean), and the two ends are rare."""
    return torch.sigmoid(mean + LOGIT_STD * torch.randn(n, generator=generator, device=device))


def logit_normal_density(t, mean):
    t = t.clamp(1e-6, 1 - 1e-6)  # float32 can round a time to 0 or 1, where the formula is 0/0
    normal = torch.exp(-(((torch.logit(t) - mean) / LOGIT_STD) ** 2) / 2) / (LOGIT_STD * math.sqrt(2 * math.pi))
    return normal / (t * (1 - t))


def uniform(n, mean, generator, device):
    return torch.rand(n, generator=generator, device=device)


def uniform_density(t, mean):
    return torch.ones_like(t)


# How times are drawn, and with what density. Uniform times have no mean to set, and ignore it.
TIMES = {"logit-normal": (logit_normal, logit_normal_density), "uniform": (uniform, uniform_density)}


def sample_t(n, times="logit-normal", mean=0.0, cover=0.0, generator=None, device=None):
    """n training times in [0, 1]. A fraction `cover` of them is drawn uniformly; `importance` corrects the loss."""
    draw, _ = TIMES[times]
    t = draw(n, mean, generator, device)
    if cover:
        coin, uniform_t = torch.rand(2, n, generator=generator, device=device)
        t = torch.where(coin < cover, uniform_t, t)
    return t


def importance(t, times, mean, cover):
    """The weights p(t) / q(t) for times drawn from q(t) = (1 - cover) p(t) + cover * 1 instead of p, where 1 is the
    uniform density. They leave the expected loss as it was: rare times are seen more often, and count less each."""
    _, density = TIMES[times]
    p = density(t, mean)
    return p / ((1 - cover) * p + cover)


def ot_pair(x, e, block=None):
    """Optimal-transport coupling within a batch: returns e permuted so that the sum of |x - e|^2 is least.

    With random pairs paths cross, and where they cross the network can only learn the mean of their directions.
    Optimal pairs hardly cross: paths become nearly straight, and a few Euler steps suffice (Tong et al. 2023, arXiv
    2302.00482; Pooladian et al. 2023, arXiv 2304.14772). Only the noise is permuted, so x and its labels keep their
    order. Every e is used exactly once, so the noise stays standard normal.
    block: solve the assignment, which costs O(n^3), in groups of this many samples. Raises ValueError if x or e is
    not finite.

    With labels, take care. Pairs ignore labels, so a label's pictures train with the noises nearest to them, not with
    all of the noise. At sampling that label meets noise it seldom trained with, most visibly under guidance.
    """
    # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two sums are the same for every pairing.
    products = (x.flatten(1) @ e.flatten(1).T).cpu().double().numpy()
    if not np.isfinite(products).all():
        raise ValueError("ot_pair: x and e must be finite, found NaN or infinity")
    block = block or len(x)
    order = []
    for start in range(0, len(x), block):
        group = slice(start, start + block)
        _, partners = linear_sum_assignment(products[group, group], maximize=True)
        order.extend(start + partners)
    return e[torch.tensor(order, device=e.device)]


# ---------------------------------------------------------------------------------------------------------------
# Sampling: follow dz/dt = v(z, t) from noise to data.


def velocity(net, predict="x", path=linear, y=None, y_null=None, guidance=1.0, interval=(0.1, 1.0), clamp=None):
    """The network's velocity field v(z, t), with t a float, for `solve`. If it has learnt shortcuts, see below, also
    v(z, s, t): the mean velocity from time s to time t. Without guidance times may be (B,), one for each sample.

    Guidance w is classifier-free (Ho & Salimans 2022, arXiv 2207.12598): v_null + w (v_y - v_null), for t within the
    interval only (Kynkäänniemi et al. 2024, arXiv 2404.07724), or for shortcuts whose middle is. y_null: y with all
    labels hidden. Within the interval the network sees each z twice, with y and with y_null; elsewhere, and if w = 1,
    guidance costs nothing.

    clamp: as in `convert`. The default suits sampling:
    - x-prediction: none. At 50 steps, training's clamp would let the last step divide by 0.05 where 1-t is 0.02: it
      would go only 40% of the way to the predicted picture, and leave noise. Unclamped, the last Euler step ends at
      z + (1-t) (x_pred - z) / (1-t) = x_pred. (On the cosine path it ends near x_pred, and nearer with more steps.)
    - e-prediction: training's. Its divisor alpha is 0 at the first step. This costs a little: with a perfect
      e-prediction on the straight path, data from N(2, 0.5^2) come out with mean 1.974 and standard deviation 0.513,
      however fine the steps.
    """
    if clamp is None:
        clamp = 0.0 if predict == "x" else CLAMP

    def v(z, t, end=None):
        middle = t if end is None else (t + end) / 2
        guided = guidance != 1 and interval[0] <= middle <= interval[1]
        inputs, labels = z, y
        if guided:  # both halves in one batch
            inputs, labels = torch.cat([z, z]), torch.cat([y, y_null])
        times = inputs.new_zeros(len(inputs)) + t  # (B,), if t is a float, too
        if end is None:
            prediction = net(inputs, times, labels).to(z.dtype)
        else:
            prediction = net(inputs, times, labels, end - times).to(z.dtype)
        result = convert(prediction, predict, "v", inputs, times, path, clamp)
        if guided:
            v_y, v_null = result.chunk(2)
            return v_null + guidance * (v_y - v_null)
        return result

    return v


@torch.no_grad()
def solve(v, z, ts, solver="euler", end_euler=False, states=None, tol=1e-4):
    """Integrates dz/dt = v(z, t) along the times ts (floats, in either direction). Returns z and the NFE, the number
    of evaluations of v.

    end_euler: take the last step by Euler's rule, which never evaluates v at the end. Needed from noise to data when
    the network predicts x and nothing is clamped: its velocity (x_pred - z) / (1-t) divides by 0 at t = 1.
    solver: one of SOLVERS. "shortcut" calls v(z, s, t); it needs a network that has learnt steps between these times.
    states: a list that receives the state after each step (dopri5: at each time but the first, and before end_euler).
    tol: for dopri5, which takes its own steps between the times.
    """
    ts, nfe = list(ts), 0
    if solver == "dopri5" and end_euler:
        # There may be just one interval, [0, 1], far too long for an Euler step: so dopri5 covers all but its last
        # thousandth, and Euler the rest.
        before, end = ts[-2:]
        ts.insert(-1, end - 1e-3 * (end - before))
    for s, t in zip(ts, ts[1:]):
        if end_euler and t == ts[-1]:
            z = euler(v, z, s, t)
            nfe += 1
        elif solver == "dopri5":
            z, evaluations = dopri5(v, z, s, t, tol)
            nfe += evaluations
        elif solver == "shortcut":
            z = z + (t - s) * v(z, s, t)  # along the mean velocity from s to t
            nfe += 1
        else:
            step, evaluations = FIXED_STEP[solver]
            z = step(v, z, s, t)
            nfe += evaluations
        if states is not None:
            states.append(z)
    return z, nfe


def euler(v, z, s, t):
    """One step from time s to time t along the velocity at s. Order 1: half the step, half the error."""
    return z + (t - s) * v(z, s)


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


def dopri5(v, z, s, t, tol):
    """From s to t in steps that adapt: each keeps the estimated error below tol (1 + |z|), as a root mean square over
    the whole batch (Dormand & Prince 1980). Order 5. scipy does it, in float64 on the CPU. Returns z and the NFE."""
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
    return torch.tensor(ode.y, dtype=z.dtype, device=z.device).view_as(z), ode.nfev


FIXED_STEP = {"euler": (euler, 1), "heun": (heun, 2), "midpoint": (midpoint, 2), "rk4": (rk4, 4)}  # step, evaluations
SOLVERS = [*FIXED_STEP, "dopri5", "shortcut"]


def time_grid(steps, shift=1.0):
    """steps + 1 times from 0 (noise) to 1 (data), equally spaced. A shift above 1 makes steps smaller near
    the noise: it divides the odds t / (1-t) (Esser et al. 2024, arXiv 2403.03206, section 5.3.2)."""
    return [grid_time(i, steps, shift) for i in range(steps + 1)]


def grid_time(i, steps, shift):
    return i / (i + shift * (steps - i))


def solve_with_churn(v, z, ts, churn, new_noise, path=linear, solver="heun", end_euler=False, states=None, tol=1e-4):
    """`solve` with randomness on the way. new_noise(): a new e, shaped as z. Returns z and the NFE.

    The score, which is the gradient of log p(z), is -e / sigma, where e is the mean of the noise in z. Adding g/2 score
    to the velocity, and noise of variance g dt, leaves the distribution of z at each time as it was, for any g(t) >= 0:
    what the noise spreads, the score draws together (Song et al. 2020, arXiv 2011.13456; Ma et al. 2024, arXiv
    2401.08740). Here g = 2 churn sigma, which vanishes at t = 1:

        dz = v dt - churn e dt + sqrt(2 churn sigma) dB

    So errors of earlier steps are partly forgotten. Each step first takes the random part, then the ODE's. With x and
    sigma held fixed the random part has an exact solution: it keeps a fraction of the noise and draws the rest anew.
    """
    nfe = 0
    for s, t in zip(ts, ts[1:]):
        times = torch.full((len(z),), s, dtype=z.dtype, device=z.device)
        _, sigma, _, _ = path(torch.tensor(s, dtype=z.dtype))
        e = convert(v(z, s), "v", "e", z, times, path)
        keep = torch.exp(-churn * (t - s) / sigma)
        z = z + sigma * ((keep - 1) * e + (1 - keep**2).sqrt() * new_noise())
        z, evaluations = solve(v, z, [s, t], solver, end_euler and t == ts[-1], tol=tol)
        nfe += 1 + evaluations
        if states is not None:
            states.append(z)
    return z, nfe


def inpaint(v, z, x, hole, new_noise, ts, path=linear, solver="heun", end_euler=False, states=None, tol=1e-4,
            repeats=5):
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
            z, evaluations = solve(v, z, [s, t], solver, end_euler and t == ts[-1], tol=tol)
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

# The ways to cut [0, 1] into shortcuts. Each halves the steps of the one before, so m is a time of the next.
SHORTCUT_STEPS = (1, 2, 4, 8, 16)


def sample_shortcuts(n, shift=1.0, generator=None, device=None):
    """n random shortcuts, (n,) each: the times s, m and t, and whether they are of the shortest kind. They are steps of
    `time_grid` with 1, 2, 4, 8 or 16 steps; each of the five grids is drawn equally often."""
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


def shortcut_loss(net, teacher, x, e, s, m, t, shortest, y=None, predict="x", path=linear):
    """How far the network's shortcut from s to t is from the teacher's two by way of m, for each sample, (B,): the
    squared error of what the network predicts.

    teacher: the averaged network, which learns nothing here. s, m, t, shortest: as from `sample_shortcuts`.
    """
    alpha, sigma, _, _ = path(per_sample(s, x))
    z = alpha * x + sigma * e
    with torch.no_grad():
        u = shortcut_target(velocity(teacher, predict, path, y), z, s, m, t, shortest)
        target = convert(u, "v", predict, z, s, path)
    prediction = net(z, s, y, t - s).to(z.dtype)
    return (prediction - target).square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Likelihood: a flow is invertible, so the density of its samples is known (Chen et al. 2018, arXiv 1806.07366).


def log_likelihood(v, x, ts, solver="rk4", probe=None):
    """log p(x) of each sample in nats, (B,), and the NFE. It solves z from data back to noise together with

        d log p(z_t) / dt = - trace(dv/dz)        so log p(x) = log N(e; 0, 1) - integral of the trace over [0, 1]

    ts: the solver's times, from data to noise; or values of another variable, if v is dz by that variable. probe:
    random signs shaped as x, the same for the whole solve, for Hutchinson's unbiased estimate of the trace, probe^T
    (dv/dz) probe (Grathwohl et al. 2018, arXiv 1810.01367). None: the exact trace, a sum over all d unit vectors, in d
    backward passes per evaluation.
    """
    d = x[0].numel()
    if probe is None:
        unit_vectors = torch.eye(d).to(x).view(d, 1, *x.shape[1:])
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
    end, nfe = solve(velocity_and_trace, start, ts, solver)
    e, integral = end[:, :d], end[:, d]  # from data to noise: this is minus the integral from noise to data
    log_normal = -(e.square().sum(1) + d * math.log(2 * math.pi)) / 2
    return log_normal + integral, nfe


def bits_per_dimension(v, x, e, probe, noise, steps, path=linear):
    """An upper bound on the bits that each number of the pictures x takes, (B,), and the NFE. It is a bound on average
    over e and probe, and up to the solver's error.

    A flow has a density for real numbers, but pictures are bytes: 256 grey levels. So stop at the time just before 1 at
    which sigma is `noise`, and draw z from q(z|x) = N(alpha x, sigma^2). Count the bits of z, and then those of which
    level each number has, less the information in the draw itself (variational dequantisation, Ho et al. 2019, arXiv
    1902.00275; with the levels as here: Kingma et al. 2021, arXiv 2107.00630):

        -log P(x)  <=  mean over z of  log q(z|x) - log p(z) - log P(x|z)

    e: the noise of the draw, standard normal. probe: see log_likelihood. v: an x-prediction needs no clamp, since t
    stays below 1. Less noise makes the level more certain, but errors of the network near t = 1 then cost more.
    """
    t_end = brentq(lambda t: float(path(torch.tensor(t, dtype=torch.float64))[1]) - noise, 0, 1)
    alpha, sigma, _, _ = path(torch.tensor(t_end, dtype=x.dtype))
    z = alpha * x + sigma * e
    log_draw = -(e.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2 - x[0].numel() * sigma.log()

    def v_u(z, u):
        """dz/du with the clock u = log(1 - t), since near t = 1 things happen in times of the size of 1 - t."""
        return -math.exp(u) * v(z, 1 - math.exp(u))

    us = np.linspace(math.log(1 - t_end), 0, steps + 1).tolist()
    log_density, nfe = log_likelihood(v_u, z, us, "rk4", probe)
    grey_levels = alpha * (torch.arange(256).to(x) / 127.5 - 1)  # as in data.to_tensor
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
    a, b = a.double().cpu(), b.double().cpu()
    # Triangular matrices with root_a^T root_a = cov_a. The singular values of root_a root_b^T are the roots of the
    # eigenvalues of cov_a cov_b, without its rounding.
    root_a = torch.linalg.qr((a - a.mean(0)) / math.sqrt(len(a) - 1), mode="r").R
    root_b = torch.linalg.qr((b - b.mean(0)) / math.sqrt(len(b) - 1), mode="r").R
    means = (a.mean(0) - b.mean(0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    return (means + traces - 2 * torch.linalg.svdvals(root_a @ root_b.T).sum()).item()


# ---------------------------------------------------------------------------------------------------------------
# Figures: `python fm.py` draws what this file is about. Each function prints its numbers and returns them. The drawing
# is data.py's, which nothing above needs.

FIGURES = Path("out", "figures")


def draw_pairs():
    """Noise and data as straight lines, in random pairs and in the optimal ones: how long they are, how many cross."""
    import data

    x = data.points("moons", 150, seed=0)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pictures, numbers = {}, []
    for title, noise in (("random pairs", e), ("optimal-transport pairs", ot_pair(x, e))):
        length, crossed = (x - noise).norm(dim=1).mean().item(), crossings(noise, x)
        numbers.append((length, crossed))
        title = f"{title}: mean length {length:.2f}, {crossed:,} crossings"
        pictures[title] = data.trails(torch.stack([noise, x], dim=1).numpy())
        print(f"pairs.png    {title}")
    data.save_whole(data.panels(pictures), FIGURES / "pairs.png")
    return numbers


def crossings(a, b):
    """How many pairs of the segments from a to b, (n, 2) each, cross."""

    def side(p):
        """(n, n): on which side of the line through a_i and b_i point p_j lies, +1 or -1."""
        along, across = b - a, p - a[:, None]
        return (along[:, None, 0] * across[..., 1] - along[:, None, 1] * across[..., 0]).sign()

    separated = side(a) * side(b) < 0  # line i passes between the two ends of segment j
    return int((separated & separated.T).sum()) // 2


def exact_velocity(points, path=linear):
    """v(z, t) that a perfect network would learn from a dataset of finitely many points, (n, d).

    Any of them may be the x in z. If it was x, the noise was e = (z - alpha x) / sigma, and the density of that e is
    Bayes' weight for x: a softmax of -|e|^2 / 2. For given z the velocity is linear in x, so its mean is that of the
    mean x.
    """

    def v(z, t):
        times = torch.full((len(z),), t, dtype=z.dtype)
        alpha, sigma, _, _ = path(times[:1])
        e = (z[:, None] - alpha * points) / sigma  # (B, n, d)
        weights = (-e.square().sum(dim=2) / 2).softmax(dim=1)  # (B, n)
        return convert(weights @ points, "x", "v", z, times, path)

    return v


def draw_exact_flow():
    """The exact velocity of 200 points at three times, and paths along it. The pairs are straight, but the paths bend:
    where pairs cross, a path follows their mean. On the cosine path even the pairs are bent."""
    import data

    x = data.points("moons", 200, seed=0)
    e = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    ticks = torch.linspace(-4.8, 4.8, 15)
    places = torch.cartesian_prod(ticks, ticks)  # (225, 2)
    pictures, bends = {}, []
    for t in (0.0, 0.5, 0.9):
        arrows = torch.stack([places, places + 0.15 * exact_velocity(x)(places, t)], dim=1)  # (225, 2, 2)
        pictures[f"exact velocity at t = {t}"] = data.trails(arrows.numpy())
    pictures["pairs (every fifth)"] = data.trails(torch.stack([e, x[:150]], dim=1)[::5].numpy())
    for name, path in PATHS.items():
        states = [e]
        solve(exact_velocity(x, path), e, time_grid(100), end_euler=True, states=states)
        lines = torch.stack(states, dim=1)  # (150, 101, 2)
        walked = lines.diff(dim=1).norm(dim=2).sum(dim=1)
        bends.append((walked / (lines[:, -1] - lines[:, 0]).norm(dim=1)).mean().item())
        pictures[f"paths: {name}"] = data.trails(lines.numpy())
        print(f"flow.png     {name} path: {bends[-1]:.3f} times as long as the straight line")
    data.save_whole(data.panels(pictures, columns=3), FIGURES / "flow.png")
    return bends


def draw_times():
    """The density of the training times at 64, 256 and 512 pixels, by the formula (for short runs see train.preset)."""
    import data

    t = torch.linspace(0, 1, 400)
    curves, peaks = {}, []
    for res in (64, 256, 512):
        mean = logit_normal_mean(res)
        density = logit_normal_density(t, mean)
        curves[f"{res} pixels, mean of logit(t) {mean:.2f}"] = t, density
        peaks.append(t[density.argmax()].item())
        print(f"times.png    {res} pixels: most times near t = {peaks[-1]:.2f}")
    data.save_whole(data.plot(curves, "t (0: noise, 1: data)", logarithmic=""), FIGURES / "times.png")
    return peaks


def draw_noise_and_size():
    """One picture at two sizes, both at t = 0.3. Averaged down to 32 x 32, the larger one has lost its noise and kept
    its content: to hide as much, it needs more noise."""
    import data

    t, pictures, left = 0.3, {}, []
    for res in (32, 256):
        x = data.to_tensor(data.draw_faces([18], res)[0], torch.device("cpu"))
        noise = (1 - t) * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        averaged = torch.nn.functional.avg_pool2d(noise, res // 32)
        left.append(averaged.std().item())
        print(f"noise.png    {res} pixels at t = {t}: noise of {left[-1]:.2f} after averaging down to 32 pixels")
        pictures[f"{res} pixels, t = {t}"] = t * x + noise
    pictures["the same, averaged to 32"] = torch.nn.functional.avg_pool2d(pictures[f"256 pixels, t = {t}"], 8)
    data.save_whole(data.panels({title: data.tile(z) for title, z in pictures.items()}), FIGURES / "noise.png")
    return left


def draw_sine():
    """dz/dt = cos(t) from z = 0, whose solution is a sine, by Euler's method."""
    import data

    curves, errors = {}, []
    for steps in (10, 30, 100):
        ts = np.linspace(0, 2 * math.pi, steps + 1)
        states = [torch.zeros(1, dtype=torch.float64)]
        solve(lambda z, t: torch.full_like(z, math.cos(t)), states[0], ts.tolist(), states=states)
        z = torch.cat(states).numpy()
        errors.append(np.abs(z - np.sin(ts)).max())
        curves[f"Euler, {steps} steps"] = ts, z
        print(f"sine.png     {steps:3d} Euler steps: largest error {errors[-1]:.3f}")
    curves["sin(t)"] = ts, np.sin(ts)
    data.save_whole(data.plot(curves, "t", logarithmic=""), FIGURES / "sine.png")
    return errors


def draw_solvers():
    """Error against the number of evaluations, for the flow from noise to data from N(2, 1.5^2), whose velocity and
    solution have closed forms. On the cosine path, since on the straight one the midpoint rule would have order 3."""
    import data

    def v(z, t):
        alpha, sigma, d_alpha, d_sigma = cosine(torch.tensor(t, dtype=z.dtype))
        variance = (1.5 * alpha) ** 2 + sigma**2  # of z, whose mean is 2 alpha
        half_its_rate = 1.5**2 * alpha * d_alpha + sigma * d_sigma
        return 2 * d_alpha + (z - 2 * alpha) * half_its_rate / variance

    e = torch.linspace(-2, 2, 9, dtype=torch.float64)
    exact = 2 + 1.5 * e
    curves, slopes = {}, {}
    for solver, (_, evaluations) in FIXED_STEP.items():
        nfe = [4 * 2**k for k in range(7)]
        errors = [(solve(v, e, time_grid(n // evaluations), solver)[0] - exact).abs().max() for n in nfe]
        slopes[solver] = math.log2(errors[-2] / errors[-1])
        curves[solver] = nfe, errors
        print(f"solvers.png  {solver}: twice the evaluations, {2 ** slopes[solver]:.1f} times less error, order "
              f"{slopes[solver]:.2f}")
    tried = [solve(v, e, [0.0, 1.0], "dopri5", tol=10.0**-k) for k in range(3, 10)]
    curves["dopri5"] = [nfe for _, nfe in tried], [(z - exact).abs().max() for z, _ in tried]
    data.save_whole(data.plot(curves, "evaluations of v", logarithmic="xy"), FIGURES / "solvers.png")
    return slopes


def draw_last_step():
    """What is left of the noise after 50 Euler steps if a perfect x-prediction is turned into v with training's clamp,
    and without it."""
    import data

    x = data.to_tensor(data.draw_faces([18], 64)[0], torch.device("cpu"))
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    pictures, left = {}, []
    for title, clamp in (("with training's clamp", CLAMP), ("without", 0.0)):
        v = velocity(lambda z, t, y: x, clamp=clamp)
        z, _ = solve(v, e, time_grid(50), end_euler=True)
        left.append((z - x).std().item() * 127.5)
        print(f"last.png     {title}: noise of {left[-1]:.2f} grey levels is left")
        for name, picture in ((title, z), ("10 times the error", 10 * (z - x))):
            pictures[f"{name}, {left[-1]:.2f} grey levels"] = data.tile(picture)
    data.save_whole(data.panels(pictures), FIGURES / "last.png")
    return left


def main():
    FIGURES.mkdir(parents=True, exist_ok=True)
    for draw in (draw_pairs, draw_exact_flow, draw_times, draw_noise_and_size, draw_sine, draw_solvers, draw_last_step):
        draw()
    print(f"wrote {FIGURES}/*.png")


if __name__ == "__main__":
    import data

    data.run(main)
