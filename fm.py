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
from scipy.optimize import linear_sum_assignment

CLAMP = 0.05  # lower bound of a divisor (1-t for x-prediction) in training: bounds the loss weight at 1/0.05^2 = 400


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
    1 / max(t, clamp)^2, v -> x by (1-t)^2, v -> e by t^2.
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


def sample_t(n, mean=None, std=0.8, generator=None, device=None):
    """n training times in (0, 1): sigmoid(mean + std * normal), or uniform if mean is None."""
    if mean is None:
        return torch.rand(n, generator=generator, device=device)
    return torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device))


def ot_pair(x, e, block=None):
    """Optimal-transport coupling in a batch: returns e permuted so that the summed |x - e|^2 is least.

    Random pairs cross, and where paths cross the network can only learn the mean of their directions. Nearest
    pairs do not: paths straighten and a few Euler steps suffice (Tong et al. 2023, arXiv 2302.00482; Pooladian
    et al. 2023, arXiv 2304.14772). Only the noise moves, so x and its labels keep their order, and every e is used
    exactly once, so the noise stays standard normal. The assignment costs O(n^3): `block` solves it in groups
    of that many.
    """
    # |x - e|^2 = |x|^2 + |e|^2 - 2 x.e, and the first two sums are the same for every pairing.
    gain = (x.flatten(1) @ e.flatten(1).T).double().cpu().numpy()
    if not np.isfinite(gain).all():
        raise ValueError("ot_pair: x and e must be finite, found NaN or infinity")
    block = block or len(x)
    order = [i + linear_sum_assignment(gain[i : i + block, i : i + block], maximize=True)[1]
             for i in range(0, len(x), block)]
    return e[torch.from_numpy(np.concatenate(order)).to(e.device)]


# ---------------------------------------------------------------------------------------------------------------
# The loss.


def loss(net, x, e, t, y=None, predict="x", space="v", path=linear):
    """Flow matching loss of each sample, shape (B,): a plain regression, no ODE is solved in training.

    net(z, t, y) predicts `predict`; the squared error is taken in `space`; both are one of "x", "e", "v".
    The default, x and v, is Algorithm 1 of Li & He 2025 ("Back to Basics", arXiv 2511.13720): natural pictures lie
    near a low-dimensional surface, noise and velocity do not, and only the former is easy for a network to say.
    """
    alpha, sigma, d_alpha, d_sigma = path(over_pixels(t, x))
    z = alpha * x + sigma * e
    v = d_alpha * x + d_sigma * e
    truth = {"x": x, "e": e, "v": v}[predict]
    guess = net(z, t, y).to(z.dtype)
    # Both sides pass the same clamped division: near t = 1 its effect on the target and on the guess cancels.
    error = convert(guess, predict, space, z, t, path, CLAMP) - convert(truth, predict, space, z, t, path, CLAMP)
    return error.square().flatten(1).mean(1)


# ---------------------------------------------------------------------------------------------------------------
# Sampling: follow dz/dt = v(z, t) from noise to data.


def velocity(net, predict="x", path=linear, y=None):
    """The network's prediction as a velocity field v(z, t) for `solve`; t is a float.

    The training clamp must not come along for x-prediction: with 50 steps the last one would divide by 0.05 where
    1-t is 0.02, go only 40% of the way to the predicted picture, and leave the rest of the noise in it. Unclamped,
    the last Euler step is z + (1-t) (x_pred - z) / (1-t) = x_pred. At t = 1 that is 0/0: see `solve`.
    For e-prediction the division by alpha = t vanishes at the very first step, where nothing is known of x yet, and
    there the clamp stays.
    """
    clamp = 0.0 if predict == "x" else CLAMP

    def v(z, t):
        t = torch.full((len(z),), t, dtype=z.dtype, device=z.device)
        return convert(net(z, t, y).to(z.dtype), predict, "v", z, t, path, clamp)

    return v


def euler(v, z, t, s):
    """One step from time t to time s, error O((s-t)^2): the definition of the derivative, read backwards."""
    return z + (s - t) * v(z, t)


def heun(v, z, t, s):
    """Second order: the mean of the velocities at both ends of an Euler step."""
    k = v(z, t)
    return z + (s - t) / 2 * (k + v(z + (s - t) * k, s))


SOLVERS = {"euler": (euler, 1), "heun": (heun, 2)}  # step function, evaluations of v per step


@torch.no_grad()
def solve(v, z, ts, solver="euler", end_euler=False, states=None):
    """Integrates dz/dt = v(z, t) along the time grid ts (floats, either direction); returns (z, NFE).

    end_euler: take the last step by Euler's rule. Needed when the network predicts x, since its velocity
    (x_pred - z) / (1-t) is 0/0 at t = 1; Euler never looks there.
    states: a list that receives every state, the first one included. NFE counts evaluations of v.
    """
    nfe = 0
    if states is not None:
        states.append(z)
    for i in range(len(ts) - 1):
        last = i == len(ts) - 2
        step, cost = SOLVERS["euler" if end_euler and last else solver]
        z = step(v, z, ts[i], ts[i + 1])
        nfe += cost
        if states is not None:
            states.append(z)
    return z, nfe


def time_grid(steps):
    """steps + 1 equally spaced times from 0 (noise) to 1 (data)."""
    return [i / steps for i in range(steps + 1)]


# ---------------------------------------------------------------------------------------------------------------
# Measuring.


def w2(a, b):
    """2-Wasserstein distance between two point clouds of n points each, exact, by assignment. O(n^3); twice as fast
    if a is the one that is spread out more."""
    cost = torch.cdist(a.flatten(1).double(), b.flatten(1).double()).square().cpu().numpy()
    i, j = linear_sum_assignment(cost)
    return float(np.sqrt(cost[i, j].mean()))
