"""Draws the README's pictures of the theory, into out/figures/, and composes those that runs leave.

    python assets/figures.py                                 what needs no trained network, in seconds
    python assets/figures.py planes                          the buried plane: trains twelve small networks
    python assets/figures.py moons out/moons out/moons-ot    pairs, velocities and paths of runs on points
    python assets/figures.py rows A.png B.png                pictures below one another, each with its name
    python assets/figures.py borders out/faces-256           does the grid of patches show in a run's samples?

Most functions print their numbers and return them.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import fm
import model
import sample

FIGURES, CPU = Path("out", "figures"), torch.device("cpu")
PREDICTIONS = ("x", "v", "e")


def save(im, name):
    with data.whole(FIGURES / name) as file:
        im.save(file)
    print(f"wrote {FIGURES / name}")


def panels(pictures, columns):
    """{title: PIL image}, all of one size, as one image: in rows, each below its title."""
    W, H = next(iter(pictures.values())).size
    strip = 30  # pixels for a title
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * W, rows * (strip + H)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, im) in enumerate(pictures.items()):
        row, column = divmod(i, columns)
        left, top = column * W, row * (strip + H)
        draw.text((left + W / 2, top + strip / 2), title, "#444444", ImageFont.load_default(16), "mm")
        sheet.paste(im, (left, top + strip))
    return sheet


def tile(x):
    """Pictures in [-1, 1], (B, C, H, W), one or a few, as a PIL image of 288 x 288 pixels."""
    return data.grid(data.to_uint8(x)).resize((288, 288), Image.Resampling.NEAREST)


def a_face(res):
    """(1, 3, res, res), and noise of that shape."""
    x = data.to_tensor(data.draw_faces([18], res)[0], CPU)
    return x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


# ---------------------------------------------------------------------------------------------------------------
# The flow


def exact_velocity(points, path=fm.linear):
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
        return fm.convert(weights @ points, "x", "v", z, times, path)

    return v


def arrows(v, t):
    """The velocities at time t on a grid of places, as short lines, (225, 2, 2)."""
    ticks = torch.linspace(-4.8, 4.8, 15)
    places = torch.cartesian_prod(ticks, ticks)  # (225, 2)
    return torch.stack([places, places + 0.15 * v(places, t)], dim=1)


def draw_flow():
    """The exact velocity of 200 points at three times, and paths along it. The pairs are straight, but the paths bend:
    where pairs cross, a path follows their mean. On the cosine path even the pairs are bent."""
    x = data.points("moons", 200, seed=0)
    e = torch.randn(150, 2, generator=torch.Generator().manual_seed(0))
    pictures, bends = {}, []
    for t in (0.0, 0.5, 0.9):
        pictures[f"exact velocity at t = {t}"] = data.trails(arrows(exact_velocity(x), t).numpy())
    pictures["pairs (every fifth)"] = data.trails(torch.stack([e, x[:150]], dim=1)[::5].numpy())
    for name, path in fm.PATHS.items():
        states = [e]
        fm.solve(exact_velocity(x, path), e, fm.time_grid(100), end_euler=True, states=states)
        lines = torch.stack(states, dim=1)  # (150, 101, 2)
        walked = lines.diff(dim=1).norm(dim=2).sum(dim=1)
        bends.append((walked / (lines[:, -1] - lines[:, 0]).norm(dim=1)).mean().item())
        pictures[f"paths: {name}"] = data.trails(lines.numpy())
        print(f"{name} path: {bends[-1]:.3f} times as long as the straight line")
    save(panels(pictures, columns=3), "flow.png")
    return bends


def draw_moons(*runs):
    """Of runs on points, a row each: pairs of noise and data as training draws them, the learnt velocities at t = 0.5,
    and the paths from noise to samples. Prints how straight those are."""
    pictures, energies = {}, []
    for run in runs:
        net, checkpoint = model.load(Path(run))
        config = checkpoint["config"]
        x, e = data.points(config.data, 200, seed=1), sample.noise(range(200), (2,), seed=0)
        states, steps = [e], 50
        sample.generate(net, config, e, steps, shift=1.0, states=states)
        paths = torch.stack(states, dim=1)  # (200, steps + 1, 2)
        energies.append(steps * paths.diff(dim=1).square().sum(dim=(1, 2)).mean().item() / fm.w2(e, states[-1]) ** 2)
        print(f"{run}: mean of |v|^2 along the paths {energies[-1]:.2f} times the squared W2 from noise to samples, "
              f"which is the least possible")
        pairs = torch.stack([fm.ot_pair(x, e, config.ot) if config.ot else e, x], dim=1)  # (200, 2, 2)
        v = fm.velocity(net, config.predict, fm.PATHS[config.path])
        for title, lines in (("pairs", pairs), ("velocity at t = 0.5", arrows(v, 0.5)), ("paths", paths)):
            pictures[f"{run}: {title}"] = data.trails(lines.numpy())
    save(panels(pictures, columns=3), "moons.png")
    return energies


# ---------------------------------------------------------------------------------------------------------------
# Times and sizes


def draw_times():
    """The density of the training times at 64, 256 and 512 pixels, by the formula."""
    t = torch.linspace(0.0025, 0.9975, 399)
    curves, peaks = {}, []
    for res in (64, 256, 512):
        mean = fm.logit_normal_mean(res)
        normal = (-(((t.logit() - mean) / fm.LOGIT_STD) ** 2) / 2).exp() / (fm.LOGIT_STD * math.sqrt(2 * math.pi))
        density = normal / (t * (1 - t))
        curves[f"{res} pixels, mean of logit(t) {mean:.2f}"] = t, density
        peaks.append(t[density.argmax()].item())
        print(f"{res} pixels: most times near t = {peaks[-1]:.2f}")
    save(data.plot(curves, "t (0: noise, 1: data)", logarithmic=False), "times.png")
    return peaks


def draw_noise():
    """One picture at two sizes, both at t = 0.3. Averaged down to 32 x 32, the larger one has lost its noise and kept
    its content: to hide as much, it needs more noise."""
    t, pictures, left = 0.3, {}, []
    for res in (32, 256):
        x, e = a_face(res)
        left.append(F.avg_pool2d((1 - t) * e, res // 32).std().item())
        print(f"{res} pixels at t = {t}: noise of {left[-1]:.2f} after averaging down to 32 pixels")
        z = t * x + (1 - t) * e
        pictures[f"{res} pixels, t = {t}"] = tile(z)
    pictures["the same, averaged to 32"] = tile(F.avg_pool2d(z, 8))
    save(panels(pictures, columns=3), "noise.png")
    return left


# ---------------------------------------------------------------------------------------------------------------
# Steps


def draw_sine():
    """dz/dt = cos(t) from z = 0, whose solution is a sine, by Euler's method."""
    curves, errors = {}, []
    for steps in (10, 30, 100):
        ts = np.linspace(0, 2 * math.pi, steps + 1)
        states = [torch.zeros(1, dtype=torch.float64)]
        fm.solve(lambda z, t: torch.full_like(z, math.cos(t)), states[0], ts.tolist(), states=states)
        z = torch.cat(states).numpy()
        errors.append(np.abs(z - np.sin(ts)).max())
        curves[f"Euler, {steps} steps"] = ts, z
        print(f"{steps:3d} Euler steps along a sine: largest error {errors[-1]:.3f}")
    curves["sin(t)"] = ts, np.sin(ts)
    save(data.plot(curves, "t", logarithmic=False), "sine.png")
    return errors


def draw_last():
    """What is left of the noise after 50 Euler steps if a perfect x-prediction is turned into v with training's clamp,
    and without it."""
    x, e = a_face(64)
    pictures, left = {}, []
    for title, clamp in (("with training's clamp", fm.CLAMP), ("without", 0.0)):
        v = fm.velocity(lambda z, t, y, length: x, clamp=clamp)
        z, _ = fm.solve(v, e, fm.time_grid(50), end_euler=True)
        left.append((z - x).std().item() * 127.5)
        print(f"{title}: noise of {left[-1]:.2f} grey levels is left after the last step")
        pictures[title] = tile(z)
        pictures[f"10 times the error: {left[-1]:.2f} grey levels"] = tile(10 * (z - x))
    save(panels(pictures, columns=4), "last.png")
    return left


# ---------------------------------------------------------------------------------------------------------------
# Patches


def draw_patches():
    """A picture, its overlapping patches, and the picture put back from them: by a plain sum, and by `unpatchify`."""
    res, patch, stride = 64, 16, 12
    light = (a_face(res)[0] + 1) / 2  # black is 0, so that a sum of two is twice as bright
    patches = model.patchify(light, patch, stride)  # (1, 25, P)
    total = F.fold(patches.transpose(1, 2), res, patch, stride=stride)
    back = model.unpatchify(patches, res, patch, stride)
    most, error = (total / light).nan_to_num().max().item(), (back - light).abs().max().item()
    print(f"patches: plain sum up to {most:.0f} times as bright; weighted, over the mask: error {error:.1e}")
    pictures = {"a picture": light, "25 patches": patches.view(-1, 3, patch, patch), "their sum": total,
                "weighted, over the mask": back}
    save(panels({title: tile(2 * picture - 1) for title, picture in pictures.items()}, columns=4), "patches.png")
    return most, error


def print_borders(*runs):
    """Prints the squared difference of neighbouring pixels where a patch begins or ends, over that elsewhere, in 24
    samples of each run. If it is larger than the data's own, the grid of patches shows."""
    for run in runs:
        net, checkpoint = model.load(Path(run))
        config = checkpoint["config"]
        x, _ = sample.generate(net, config, sample.noise(range(24), sample.shape_of(config), seed=0), 20)
        print(f"{run}: {border_ratio(x, config.patch, config.stride):.3f}")


def border_ratio(x, patch, stride):
    across, down = x.diff(dim=3).square(), x.diff(dim=2).square()  # (B, C, H, W)
    energy = across.mean((0, 1, 2)) + down.mean((0, 1, 3))  # (W-1,): entry i is the edge before pixel i + 1
    starts = torch.arange(0, x.shape[3] - patch + 1, stride)
    at_border = torch.isin(torch.arange(1, x.shape[3]), torch.cat([starts, starts + patch]))
    return (energy[at_border].mean() / energy[~at_border].mean()).item()


# ---------------------------------------------------------------------------------------------------------------
# Why predict x: Li & He 2025, figure 2


def draw_planes(dims=(2, 8, 16, 512), steps=1500, n=1000):
    """The moons in a plane that is buried in ever more dimensions, found again by networks that predict x, v and e.
    Prints W2 to the data, in the plane."""
    pictures, distances = {}, {}
    for predict in PREDICTIONS:
        for dim in dims:
            torch.manual_seed(0)
            plane = torch.linalg.qr(torch.randn(dim, 2)).Q  # two orthonormal columns
            net = model.build("mlp", dim=dim, width=256, depth=5)
            optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
            for step in range(steps):
                x = data.points("moons", 256, seed=step) @ plane.T  # (256, dim)
                loss = fm.loss(net, x, torch.randn(256, dim), torch.rand(256), None, predict, "v").mean()
                optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
            v, e = fm.velocity(net, predict), torch.randn(n, dim)
            z, _ = fm.solve(v, e, fm.time_grid(100), end_euler=predict == "x")
            distances[predict, dim] = fm.w2(z @ plane, data.points("moons", n, seed=steps))
            print(f"{predict}-prediction in {dim} dimensions: W2 {distances[predict, dim]:.2f}", flush=True)
            pictures[f"{predict}, {dim} dimensions"] = data.scatter((z @ plane).numpy()).reduce(2)
    save(panels(pictures, columns=len(dims)), "planes.png")
    return distances


def draw_rows(*files):
    pictures = {str(file): Image.open(file) for file in files}
    save(panels(pictures, columns=1), "rows.png")


OTHERS = {"planes": draw_planes, "moons": draw_moons, "rows": draw_rows, "borders": print_borders}


def main(what=None, *args):
    FIGURES.mkdir(parents=True, exist_ok=True)
    if what is None:
        for draw in (draw_flow, draw_times, draw_noise, draw_sine, draw_last, draw_patches):
            draw()
    elif what in OTHERS:
        OTHERS[what](*args)
    else:
        raise ValueError(f"no figure {what}: there is {', '.join(OTHERS)}")


if __name__ == "__main__":
    with data.refusing():
        data.run(lambda: main(*sys.argv[1:]))
