"""Flow matching, the mathematics: pure functions on tensors. Knows no network, file or flag.

Letters, here and in every other file:

    x   clean data                        t   time: 0 is noise, 1 is data   (B,)
    e   noise, standard normal            z   noisy state, alpha(t) x + sigma(t) e
    y   labels                            v   velocity, dz/dt = alpha'(t) x + sigma'(t) e

Some papers run time the other way (t = 1 is noise). We never do.

The whole idea: draw x and e, mix them into z, and regress the velocity v that carries z on towards x. A network
that minimises this squared error learns the mean velocity of all paths through (z, t), and following that mean
velocity from noise at t = 0 ends, at t = 1, in the distribution of the data (Lipman et al. 2022, arXiv 2210.02747;
Liu et al. 2022, arXiv 2209.03003).
"""

import math

import numpy as np
import torch
from scipy.integrate import RK45
from scipy.optimize import linear_sum_assignment

CLAMP = 0.05  # lower bound of a divisor that vanishes, so that the loss weight is bounded; for 1-t at 1/0.05^2 = 400


# ---------------------------------------------------------------------------------------------------------------
# Paths: four numbers that say how data and noise are mixed at time t, and how fast each share changes.


def linear(t):
    """The straight path z = t x + (1-t) e, whose velocity x - e does not depend on t."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def cosine(t):
    """A quarter circle: alpha^2 + sigma^2 = 1, so z keeps unit variance when x has it."""
    a = math.pi / 2 * t
    return torch.sin(a), torch.cos(a), math.pi / 2 * torch.cos(a), -math.pi / 2 * torch.sin(a)


PATHS = {"linear": linear, "cosine": cosine}


def over_pixels(t, z):
    """t of shape (B,) as (B, 1, 1, ...), to be multiplied with z."""
    return t.view(-1, *[1] * (z.dim() - 1))


def convert(p, have, want, z, t, path=linear, clamp=0.0):
    """Turns a prediction of one of x, e, v into another of them.

    (z, v) is a 2x2 linear map of (x, e), so z and any one of the three give the other two:

        z = alpha  x + sigma  e
        v = alpha' x + sigma' e          det = alpha' sigma - sigma' alpha        (1 on the straight path)

    p: tensor shaped as z, a prediction of `have`; returns the same prediction as a `want`; both in "x", "e", "v".
    clamp: lower bound of the divisor, where there is one that vanishes: sigma for have = "x" (at the data end),
    alpha for have = "e" (at the noise end). A loss taken after such a division weighs the error of p by the square
    of the factor in front of p: on the straight path x -> v weighs it by 1 / max(1-t, clamp)^2, e -> v by
    1 / max(t, clamp)^2, v -> x by (1-t)^2, v -> e by t^2,
    x -> e by (t / (1-t))^2, e -> x by the inverse of that.
    """
    if have == want:
        return p
    alpha, sigma, d_alpha, d_sigma = path(over_pixels(t, z))
    det = d_alpha * sigma - d_sigma * alpha
    if have == "x":
        sigma = sigma.clamp(min=clamp)
        return (det * p + d_sigma * z) / sigma if want == "v" else (z - alpha * p) / sigma
    if have == "e":
        alpha = alpha.clamp(min=clamp)
        return (d_alpha * z - det * p) / alpha if want == "v" else (z - sigma * p) / alpha
    return (sigma * p - d_sigma * z) / det if want == "x" else (d_alpha * z - alpha * p) / det


# ---------------------------------------------------------------------------------------------------------------
# What a training step draws: times, and which noise goes with which picture.


def logit_normal_mean(res):
    """Mean of logit(t) for pictures of res x res pixels: -0.8 at 256, lower (noisier) for larger ones.

    Neighbouring pixels repeat each other, so the same noise hides less of a larger picture; shifting logit(t) by
    -log(res/256) gives every resolution the same signal-to-noise ratio after averaging down to a common size
    (Hoogeboom et al. 2023, "Simple Diffusion", arXiv 2301.11093; -0.8 and 0.8: Li & He 2025, arXiv 2511.13720).
    """
    return -0.8 - math.log(res / 256)


def sample_t(n, mean=None, std=0.8, cover=0.0, generator=None, device=None):
    """n training times in (0, 1): sigmoid(mean + std * normal), or uniform if mean is None. cover: the share of the
    former that is drawn uniformly instead, to be corrected by `importance`."""
    if mean is None:
        return torch.rand(n, generator=generator, device=device)
    t = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))
    if cover:
        fair = torch.rand(2, n, generator=generator, device=device)
        t = torch.where(fair[0] < cover, fair[1], t)
    return t


def importance(t, mean, cover, std=0.8):
    """p(t) / q(t), where p is the logit-normal density and q = (1 - cover) p + cover what was drawn from: the weight
    under which the mean loss stays what it was, while rare times are seen more often and each counts less."""
    t = t.clamp(1e-6, 1 - 1e-6)  # 0 and 1, to which a time can be rounded, would give 0/0
    p = torch.exp(-(((torch.logit(t) - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))
    return p / ((1 - cover) * p + cover)


def ot_pair(x, e, block=None):
    """Optimal-transport coupling in a batch: returns e permuted so that the summed |x - e|^2 is least.

    Random pairs cross, and where paths cross the network can only learn the mean of their directions. Nearest
    pairs do not: paths straighten and a few Euler steps suffice (Tong et al. 2023, arXiv 2302.00482; Pooladian
    et al. 2023, arXiv 2304.14772). Only the noise moves, so x and its labels keep their order, and every e is used
    exactly once, so the noise stays standard normal. The assignment costs O(n^3): `block` solves it in groups
    of that many.

    With labels: pairs are made before labels are hidden and regardless of them. So noise and label are no longer
    independent: over the whole batch e is standard normal, but a label's own pictures take the noises near them, while
    the sampler gives every label all of the noise. The flow of a label then starts from more than it was trained on;
    guidance and few labels make it visible. Drop --ot where labels matter.
    """
    # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two sums are the same for every pairing.
    gain = (x.flatten(1) @ e.flatten(1).T).cpu().double().numpy()
    if not np.isfinite(gain).all():
        raise ValueError("ot_pair: x and e must be finite, found NaN or infinity")
    block = block or len(x)
    order = [i + linear_sum_assignment(gain[i : i + block, i : i + block], maximize=True)[1]
             for i in range(0, len(x), block)]
    return e[torch.from_numpy(np.concatenate(order)).to(e.device)]


# ---------------------------------------------------------------------------------------------------------------
# The loss.


def loss(net, x, e, t, y=None, predict="x", space="v", path=linear, jitter=None):
    """Flow matching loss of each sample, shape (B,): a plain regression, no ODE is solved in training.

    net(z, t, y) predicts `predict`; the squared error is taken in `space`; both are one of "x", "e", "v".
    jitter: noise on z alone, shaped as z, which makes the network forgive a state that is a little off its path.
    The default, x and v, is Algorithm 1 of Li & He 2025 ("Back to Basics", arXiv 2511.13720): natural pictures lie
    near a low-dimensional surface, noise and velocity do not, and only the former is easy for a network to say.
    """
    alpha, sigma, d_alpha, d_sigma = path(over_pixels(t, x))
    z = alpha * x + sigma * e
    v = d_alpha * x + d_sigma * e
    truth = {"x": x, "e": e, "v": v}[predict]
    guess = net(z if jitter is None else z + jitter, t, y).to(z.dtype)
    # convert is linear in (p, z): convert(guess, z) - convert(truth, z) = convert(guess - truth, 0).
    error = convert(guess - truth, predict, space, torch.zeros_like(z), t, path, CLAMP)
    return error.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Sampling: follow dz/dt = v(z, t) from noise to data.


def velocity(net, predict="x", path=linear, y=None, guidance=1.0, interval=(0.1, 1.0), clamped=False):
    """The network's prediction as a velocity field v(z, t) for `solve`; t is a float.

    The training clamp must not come along for x-prediction: with 50 steps the last one would divide by 0.05 where
    1-t is 0.02, go only 40% of the way to the predicted picture, and leave the rest of the noise in it. Unclamped,
    the last Euler step is z + (1-t) (x_pred - z) / (1-t) = x_pred (on the cosine path nearly so, if steps are many).
    At t = 1 that is 0/0: see `solve`. For e-prediction the divisor alpha = t vanishes at the very first step, where
    nothing is known of x yet, and there the clamp stays, at the cost of too slow a start. clamped: keeps it always.

    guidance w: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), v_null + w (v_y - v_null), for t in
    the interval only (Kynkaanniemi et al. 2024, arXiv 2404.07724); w = 1 and times outside cost nothing extra.
    """
    clamp = CLAMP if clamped or predict != "x" else 0.0

    def field(z, t, y):
        t = torch.full((len(z),), t, dtype=z.dtype, device=z.device)
        return convert(net(z, t, y).to(z.dtype), predict, "v", z, t, path, clamp)

    def v(z, t):
        if y is None or guidance == 1 or not interval[0] <= t <= interval[1]:
            return field(z, t, y)
        null = torch.full_like(y, -1)
        v_y, v_null = field(torch.cat([z, z]), t, torch.cat([y, null])).chunk(2)  # one batch for both
        return v_null + guidance * (v_y - v_null)

    return v


def euler(v, z, t, s):
    """One step from time t to time s: the definition of the derivative, read backwards. Order 1."""
    return z + (s - t) * v(z, t)


def heun(v, z, t, s):
    """The mean of the velocities at both ends of an Euler step. Order 2."""
    k = v(z, t)
    return z + (s - t) / 2 * (k + v(z + (s - t) * k, s))


def midpoint(v, z, t, s):
    """The velocity in the middle of an Euler step. Order 2."""
    middle = (t + s) / 2
    return z + (s - t) * v(z + (middle - t) * v(z, t), middle)


def rk4(v, z, t, s):
    """The classical Runge-Kutta method. Order 4."""
    h, middle = s - t, (t + s) / 2
    k1 = v(z, t)
    k2 = v(z + h / 2 * k1, middle)
    k3 = v(z + h / 2 * k2, middle)
    k4 = v(z + h * k3, s)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def dopri5(v, z, t, s, tol):
    """From t to s in steps of its own, as long as the error estimate stays below tol (1 + |z|), root mean square over
    the batch (Dormand & Prince 1980), by scipy: its arithmetic is in float64 on the CPU. Order 5."""
    numbers = lambda z: z.flatten().cpu().numpy()
    tensor = lambda y: torch.tensor(y, dtype=z.dtype, device=z.device).view_as(z)
    ode = RK45(lambda t, y: numbers(v(tensor(y), t)), t, numbers(z), s, rtol=tol, atol=tol, first_step=abs(s - t) / 10)
    while ode.status == "running":
        ode.step()
    if ode.status == "failed":
        raise FloatingPointError(f"dopri5: no step is short enough at t = {ode.t:.6f} for tol = {tol}")
    return tensor(ode.y)


SOLVERS = {"euler": euler, "heun": heun, "midpoint": midpoint, "rk4": rk4, "dopri5": dopri5}


@torch.no_grad()
def solve(v, z, ts, solver="euler", end_euler=False, states=None, tol=1e-4):
    """Integrates dz/dt = v(z, t) along the time grid ts (floats, either direction); returns (z, NFE).

    end_euler: take the last step by Euler's rule. Needed when the network predicts x, since its velocity
    (x_pred - z) / (1-t) is 0/0 at t = 1; Euler never looks there (on the way from noise to data).
    states: a list that receives the state after each step of the grid. NFE: number of evaluations of v.
    tol: dopri5's, which takes its own steps between the grid's times.
    """
    if solver == "dopri5" and end_euler:  # which chose its steps; only a thousandth of the last is left to Euler
        ts = [*ts[:-1], ts[-1] - 1e-3 * (ts[-1] - ts[-2]), ts[-1]]
    times = []  # at which v was evaluated
    counted = lambda z, t: times.append(t) or v(z, t)
    for t, s in zip(ts, ts[1:]):
        name = "euler" if end_euler and s == ts[-1] else solver
        z = SOLVERS[name](counted, z, t, s, **({"tol": tol} if name == "dopri5" else {}))
        if states is not None:
            states.append(z)
    return z, len(times)


def inpaint(v, z, x, hole, noise, ts, path=linear, solver="heun", end_euler=False, states=None, tol=1e-4, repeats=5):
    """Fills the hole in a picture; returns (the picture, NFE). hole: bool, True where to fill. noise(): a new e.

    What is known of z at any time is x mixed with noise, so after each step that part is replaced by just this, and
    the network continues the rest to fit. The last step ends at t = 1, where the known part is x itself, exactly. But
    a step sees of x only what the noise lets through, and early choices in the hole may not suit it. So each
    step is taken `repeats` times: the result goes back to the time before, with new noise, and the hole gets another
    chance to agree with its surroundings (RePaint, Lugmayr et al. 2022, arXiv 2201.09865, for stochastic diffusion).
    """
    nfe = 0
    for t, s in zip(ts, ts[1:]):
        (alpha, sigma), (alpha_s, sigma_s) = (path(torch.tensor(time, dtype=z.dtype))[:2] for time in (t, s))
        for turn in range(repeats):
            if turn > 0:  # from s back to t: less of what is there, and the noise that this takes
                share = alpha / alpha_s
                z = share * z + (sigma**2 - (share * sigma_s) ** 2).sqrt() * noise().to(z)
            z, n = solve(v, z, [t, s], solver, end_euler and s == ts[-1], tol=tol)
            z = torch.where(hole, z, alpha_s * x + sigma_s * noise().to(z))
            nfe += n
        if states is not None:
            states.append(z)
    return z, nfe


def time_grid(steps, shift=1.0):
    """steps + 1 times from 0 (noise) to 1 (data); equally spaced, or with shift > 1 denser near the noise: t / (t +
    shift (1-t)), which divides the odds t / (1-t) by shift (Esser et al. 2024, arXiv 2403.03206, 5.3.2)."""
    return [i / (i + shift * (steps - i)) for i in range(steps + 1)]


# ---------------------------------------------------------------------------------------------------------------
# Likelihood: a flow is invertible, so the density of its samples is known (Chen et al. 2018, arXiv 1806.07366).


def log_likelihood(v, x, ts, solver="rk4", probe=None):
    """log p(x) of each sample in nats, (B,), and the NFE: solves z from data back to noise together with

        d log p(z_t) / dt = - trace(dv/dz)        so log p(x) = log N(e; 0, 1) - integral of the trace over [0, 1]

    ts: time grid from data (about 1) down to noise (0). probe: random signs shaped as x, kept for the whole solve, for
    Hutchinson's unbiased estimate probe . dv/dz probe of the trace (Grathwohl et al. 2018, arXiv 1810.01367); or None:
    the sum over all d unit vectors in its place is the exact trace, in d backward passes per evaluation.
    """
    d = x[0].numel()
    probes = [probe] if probe is not None else torch.eye(d).to(x).view(d, 1, *x.shape[1:]).expand(d, *x.shape)

    def with_trace(state, t):
        z = state[:, :d].reshape(x.shape)
        with torch.enable_grad():
            z.requires_grad_()
            out = v(z, t)
        trace = sum((torch.autograd.grad(out, z, p, retain_graph=True)[0] * p).flatten(1).sum(1) for p in probes)
        return torch.cat([out.detach().flatten(1), trace[:, None]], dim=1)

    end, nfe = solve(with_trace, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1), ts, solver)
    normal = -(end[:, :d].square().sum(1) + d * math.log(2 * math.pi)) / 2
    return normal + end[:, d], nfe  # integrated from 1 down to 0, the trace comes with the minus sign already


def bits_per_dimension(log_p, d):
    """Of pixels: bytes b became (b + u) / 128 - 1 with u uniform in [0, 1), and that scaling costs 7 bits each."""
    return -log_p / (d * math.log(2)) + 7


# ---------------------------------------------------------------------------------------------------------------
# Measuring.


def w2(a, b):
    """2-Wasserstein distance between two point clouds of n points each, exact, by assignment. O(n^3); twice as fast
    if a is the one that is spread out more. Infinite if a point is not finite."""
    cost = torch.cdist(a.flatten(1).cpu().double(), b.flatten(1).cpu().double()).square().numpy()
    if not np.isfinite(cost).all():
        return math.inf
    i, j = linear_sum_assignment(cost)
    return float(np.sqrt(cost[i, j].mean()))
