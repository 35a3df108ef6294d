"""A checkpoint in, pictures out.

    python sample.py out/faces-32 --n 64 --steps 50 --solver heun --seed 0 --to grid.png

--to decides by its ending: .png a grid (for points a scatter plot), .gif the flow from noise to data, .npy the raw
float32 array (n, C, H, W) or (n, 2), anything without an ending a folder of single PNGs.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import data
import fm
import model


def pick_device(name):
    """"auto" is the best there is. An absent device is the user's mistake."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [device for device in there if there[device]]
    if name not in ("auto", *there):
        data.refuse(f"no device {name} here; there is: {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def has_bf16(device):
    """Does the hardware multiply matrices in bfloat16 natively?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def autocast(device, bf16=True):
    """Matrix products, and what flows between them, in bfloat16 if the hardware has it. Weights, the state of the ODE
    and fm.py stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and has_bf16(device))


def read_checkpoint(path):
    """What train.py saved, on the CPU, and under "built" its network with the averaged weights. Refuses others."""
    if not path.is_file():
        data.refuse(f"no checkpoint {path}: train first (python train.py) or name a run's folder (train.py --out DIR)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["built"] = model.build(**checkpoint["net"])
        checkpoint["built"].load_state_dict(checkpoint["ema"])
        checkpoint["step"], checkpoint["config"]["data"], checkpoint["label_names"], checkpoint["log"], checkpoint["n"]
    except Exception as error:  # torch.load alone raises half a dozen kinds for a damaged file
        data.refuse(f"{path} is not a checkpoint of this program ({error!r:.200})")
    return checkpoint


def batched(net, size):
    """The network, for more samples than memory holds: not more than `size` of them pass it at once."""
    parts = lambda inputs: zip(*(values.split(size) for values in inputs if values is not None))  # y may be None
    return lambda *inputs: torch.cat([net(*part) for part in parts(inputs)])


def noises(n, shape, purpose, seed):
    """A function that draws standard normal noise (n, *shape), on the CPU, time and again. What sample i gets depends
    on (seed, i) alone, whatever the batch."""
    generators = [torch.Generator().manual_seed(data.key(seed, purpose, i)) for i in range(n)]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


def noise(n, shape, seed):
    return noises(n, shape, data.SAMPLE, seed)()


def shape_of(config):
    return (2,) if config["data"] in data.POINTS else (data.channels(config["data"]), config["res"], config["res"])


def generate(net, config, z, steps, solver="euler", states=None, y=None, guidance=1.0, interval=(0.1, 1.0), shift=1.0,
             tol=1e-4, start=0.0, known=None):
    """Follows the flow from z, at time start (0: noise), to samples, float32, shaped as z. Returns (samples, NFE).

    known: (picture, hole, noise), to fill the hole in the picture only, see `fm.inpaint`.
    """
    path = fm.PATHS[config["path"]]
    v = fm.velocity(net, config["predict"], path, y, guidance, interval)
    ts = [start + (1 - start) * t for t in fm.time_grid(steps, shift)]
    end_euler = config["predict"] == "x"
    if solver == "dopri5" and states is None and not known:  # chooses its own steps
        ts = [start, 1.0]
    with autocast(z.device, config["bf16"] and solver != "dopri5"):  # which would take rounding for error
        if known:
            return fm.inpaint(v, z, *known, ts, path, solver, end_euler, states, tol)
        return fm.solve(v, z, ts, solver, end_euler, states, tol)


def parse_label(text, names, config):
    """--label as rows of y: a class by name or number, attributes by name (with commas), or all: a row for each."""
    numbers = {str(i): i for i in range(len(names))} | {name: i for i, name in enumerate(names)}
    words = names if names and text == "all" else text.split(",")
    for word in words:
        if word not in numbers:
            known = ", ".join(names) or "no labels; train with --cond all"
            data.refuse(f"--label {word}: this network has learnt {known}")
    y = torch.tensor([numbers[word] for word in words])
    if config["data"] not in ("faces", "celeba"):
        return y
    rows = torch.nn.functional.one_hot(y, len(names))  # several may hold at once
    return rows if text == "all" else rows.amax(0, keepdim=True)


def draw(x, config, columns=None):
    """Samples as one PIL image: a grid, or for points a scatter plot."""
    return data.scatter(x.cpu().numpy()) if config["data"] in data.POINTS else data.grid(data.to_uint8(x), columns)


def write(x, states, config, to, columns=None):
    """x to the file or folder `to`, whose ending says how; states: those of the whole flow, for a GIF. A kill or a
    full disk leaves a file that was there before."""
    part = to.parent / f"part-{to.name}"
    if to.suffix == ".png":
        draw(x, config, columns).save(part)
    elif to.suffix == ".gif":
        data.save_gif(part, [draw(z, config, columns) for z in states])
    elif to.suffix == ".npy":
        np.save(part, x.cpu().numpy())
    else:
        for i, pixels in enumerate(data.to_uint8(x)):
            Image.fromarray(pixels.squeeze()).save(to / f"{i:05d}.png")
    if to.suffix:
        part.replace(to)
    print(f"wrote {to}")


def border_ratio(x, patch, stride):
    """Mean squared difference of neighbouring pixels where a patch begins or ends, over that elsewhere. A visible grid
    of patches makes it larger than it is in the data. x: (B, C, H, W)."""
    steps = x.diff(dim=3).square().mean((0, 1, 2)) + x.diff(dim=2).square().mean((0, 1, 3))  # (W-1,)
    starts = torch.arange(0, x.shape[3] - patch + 1, stride)
    border = torch.isin(torch.arange(1, x.shape[3]), torch.cat([starts, starts + patch]))
    return (steps[border].mean() / steps[~border].mean()).item()


def likelihood(net, config, n, steps, seed, device, batch=64):
    """Prints bits per dimension (pictures) or nats (points) of n held-out samples, with the standard error."""
    points, images = config["data"] in data.POINTS, data.load(config["data"], config["root"], config["res"])[0]
    x = torch.from_numpy(images[data.split(len(images))[1][:n]])
    g = torch.Generator().manual_seed(data.key(seed, data.TRACE))
    if not points:  # bytes become densities by adding the fraction that rounding took away: (b + u) / 256, on [-1, 1]
        x = x.permute(0, 3, 1, 2)
        x = (x + torch.rand(x.shape, generator=g)) / 128 - 1
    # From data to noise the training clamp is right: unclamped, an x-prediction's velocity is 0/0 at t = 1, and near
    # it blows up every error. Clamped, it is the field that was trained, and any field has a likelihood.
    v = fm.velocity(net, config["predict"], fm.PATHS[config["path"]], clamped=True)
    scores = []
    for part in x.split(batch):
        probe = None if points else torch.randint(0, 2, part.shape, generator=g).to(device) * 2.0 - 1
        log_p, nfe = fm.log_likelihood(v, part.to(device), fm.time_grid(steps)[::-1], "heun", probe)
        scores.append(-log_p.cpu() if points else fm.bits_per_dimension(log_p.cpu(), x[0].numel()))
    score = torch.cat(scores)
    error = score.std(correction=min(1, len(score) - 1)) / math.sqrt(len(score))
    print(f"{score.mean():.3f} +- {error:.3f} {'nats' if points else 'bits per dimension'} on {len(score)} held-out "
          f"samples, {steps} steps of heun, NFE {nfe}")


def sweep(net, config, e, y):
    """Prints how far each solver is from the exact flow, by evaluations of the network; for points also W2.

    The flow is that of the clamped field, see `likelihood`: unclamped, an x-prediction's does not settle near t = 1,
    however small the steps. And in float32: bfloat16's rounding would drown the differences between solvers.
    """
    points = config["data"] in data.POINTS
    v = fm.velocity(net, config["predict"], fm.PATHS[config["path"]], y, clamped=True)
    exact, _ = fm.solve(v, e, fm.time_grid(100), "rk4")
    fresh = data.points(config["data"], len(e), data.key(1, data.HELD_OUT, 0)) if points else None
    print("solver    steps or tol   NFE   RMS distance from the exact flow" + ("   W2 to data" if points else ""))
    trials = [(name, budget // cost) for name, cost in (("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4))
              for budget in (4, 8, 16, 32, 64)]
    for solver, steps in [*trials, *(("dopri5", tol) for tol in (1e-1, 1e-2, 1e-3, 1e-4))]:
        x, nfe = fm.solve(v, e, fm.time_grid(steps if solver != "dopri5" else 1), solver, tol=steps)
        row = f"{solver:8s} {steps:13g} {nfe:5d} {(x - exact).square().mean().sqrt():34.4f}"
        print(row + (f"{fm.w2(fresh, x):13.3f}" if points else ""), flush=True)


def slerp(a, b, s):
    """Between two noises along the sphere on which noise lies: a straight mixture would be too short to be noise."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def read_exactly(path, shape, device):
    """A picture that is exactly what the network draws, or a mask of its size: (1, C, H, W) in [-1, 1]."""
    if len(shape) < 3:
        data.refuse(f"{path}: this network draws points, not pictures")
    mode, res = {1: "L", 3: "RGB"}[shape[0]], shape[-1]
    try:
        with Image.open(path) as im:
            found, pixels = f"{im.mode} {im.width}x{im.height}", np.array(im)
    except Exception as error:  # whatever a broken file makes a decoder raise
        data.refuse(f"{path} is no picture that can be read ({error})")
    if found != f"{mode} {res}x{res}":
        data.refuse(f"{path} is {found}, needed is {mode} {res}x{res}: python -c \"from PIL import Image; Image.open("
                    f"'{path}').convert('{mode}').resize(({res}, {res})).save('fits.png')\"")
    return data.to_tensor(pixels.reshape(1, res, res, -1), device)


def invert(net, config, x, steps, y):
    """Takes a picture back to its noise and forth again, and prints how far from itself it ends. Returns the three
    and all states between.

    Both ways with the training clamp, see `likelihood`: there and back must be the same field, and in float32, since
    rounding is all that is lost otherwise.
    """
    v, states = fm.velocity(net, config["predict"], fm.PATHS[config["path"]], y, clamped=True), [x]
    e, there = fm.solve(v, x, fm.time_grid(steps)[::-1], "heun", states=states)
    again, back = fm.solve(v, e, fm.time_grid(steps), "heun", states=states)
    print(f"round trip: RMS error {(again - x).square().mean().sqrt():.5f} on [-1, 1], NFE {there} + {back}; "
          f"its noise has mean {e.mean():.3f} and standard deviation {e.std():.3f}")
    return torch.cat([x, e, again]), states


def pair_of_times(text):
    """A type for argparse: two times, such as 0.1,1."""
    low, high = map(float, text.split(","))
    if not low <= high:
        raise ValueError
    return low, high


def parse(argv):
    parser = argparse.ArgumentParser(description="Draws samples from a trained flow.", allow_abbrev=False)
    parser.error = data.refuse
    count, ratio, tolerance = data.between(int, 1, 10**9), data.between(float, 1e-3, 1e3), data.between(float, 1e-6, 1)
    seed, weight = data.between(int, 0, 2**63 - 1), data.between(float, 0, 100)
    parser.add_argument("folder", type=Path, help="what train.py wrote, such as out/faces-32")
    parser.add_argument("--n", type=count, default=64, help="how many samples; with labels, rounded up to whole rows")
    parser.add_argument("--steps", type=count, default=50, help="steps of the solver")
    parser.add_argument("--solver", default="heun", choices=list(fm.SOLVERS))
    parser.add_argument("--seed", type=seed, default=0, help="the noise of sample i depends on (seed, i) only")
    parser.add_argument("--tol", type=tolerance, default=1e-4, help="error that dopri5 allows itself per step")
    parser.add_argument("--shift", type=ratio, default=1.0, help="more than 1: smaller steps near the noise")
    parser.add_argument("--label", help="class or attribute, by name or number; a,b; or all: a row each")
    parser.add_argument("--guidance", type=weight, default=1.0, help="how strongly the label pulls; 1: as learnt")
    parser.add_argument("--interval", type=pair_of_times, default=(0.1, 1.0), help="when guidance is on: 0.1,1")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--interpolate", type=count, help="pictures from each noise to the next")
    modes.add_argument("--from", dest="source", metavar="PICTURE", help="start from this picture, partly made noise")
    parser.add_argument("--strength", type=data.between(float, 1e-3, 1), default=0.6, help="... 1: only noise is left")
    modes.add_argument("--inpaint", metavar="PICTURE", help="fill a hole in this picture ...")
    parser.add_argument("--mask", metavar="PICTURE", help="... white where the hole is, else black")
    modes.add_argument("--invert", metavar="PICTURE", help="instead: to its noise and back, in --steps of heun")
    modes.add_argument("--sweep", action="store_true", help="instead: a table of error against NFE, all solvers")
    modes.add_argument("--bpd", type=count, help="instead: likelihood of so many held-out samples (at most 1024)")
    parser.add_argument("--batch", type=count, default=64, help="samples that pass the network at once")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--columns", type=count, help="pictures in a row (default: a square grid)")
    parser.add_argument("--to", type=Path, help="x.png, x.gif, x.npy or a folder (default: FOLDER/samples.png)")
    args = parser.parse_args(argv)
    if args.interpolate and args.n < 2:
        data.refuse("--interpolate needs --n 2 or more noises to go between")
    if bool(args.inpaint) != bool(args.mask):
        data.refuse("--inpaint PICTURE and --mask MASK go together")
    if args.guidance != 1 and not args.label:
        data.refuse("--guidance needs a --label to pull towards")
    if args.bpd and args.label or args.guidance != 1 and (args.bpd or args.sweep or args.invert):
        data.refuse("--bpd knows no --label, and no --guidance; nor do --sweep and --invert know --guidance")
    return args


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    path = args.folder if args.folder.suffix == ".pt" else args.folder / "ckpt.pt"
    checkpoint = read_checkpoint(path)
    net, config = checkpoint["built"].to(device).eval().requires_grad_(False), checkpoint["config"]
    points, shape = config["data"] in data.POINTS, shape_of(config)
    to = args.to or path.parent / "samples.png"
    if to.suffix not in (".png", ".gif", ".npy") and (points or to.suffix):
        data.refuse(f"cannot write {to}: its ending must be .png, .gif, .npy or, for pictures, none (a folder)")
    data.check_writable(to)
    if points and device.type == "cpu":
        torch.set_num_threads(1)  # see train.py
    if args.bpd:
        return likelihood(net, config, args.bpd, args.steps, args.seed, device, args.batch)
    net = batched(net, args.batch)
    labels = parse_label(args.label, checkpoint["label_names"], config) if args.label else torch.tensor([-1])
    each = math.ceil(args.n / len(labels))
    columns = args.columns or (each if len(labels) > 1 else None)
    y = labels.repeat_interleave(each, 0).to(device)
    e, start, known = noise(len(y), shape, args.seed).to(device), 0.0, None
    if args.sweep:
        return sweep(net, config, e, y)
    if args.invert:
        picture = read_exactly(args.invert, shape, device)
        return write(*invert(net, config, picture, args.steps, y[:1]), config, to, args.columns or 3)
    if args.interpolate:  # a row from each noise to the next
        columns, s = args.columns or args.interpolate, torch.linspace(0, 1, args.interpolate).tolist()
        e = torch.stack([slerp(a, b, part) for a, b in zip(e, e.roll(-1, 0)) for part in s])
        y = y.repeat_interleave(args.interpolate, 0)
    if args.source:  # SDEdit (Meng et al. 2021, arXiv 2108.01073): noise hides detail and keeps the layout
        start = 1 - args.strength
        alpha, sigma, _, _ = fm.PATHS[config["path"]](torch.tensor(start))
        e = alpha * read_exactly(args.source, shape, device) + sigma * e
    if args.inpaint:
        hole = read_exactly(args.mask, (1, *shape[1:]), device) > 0
        known = read_exactly(args.inpaint, shape, device), hole, noises(len(e), shape, data.INPAINT, args.seed)

    states = [e] if to.suffix == ".gif" else None
    began = time.perf_counter()
    x, nfe = generate(net, config, e, args.steps, args.solver, states, y, args.guidance, args.interval, args.shift,
                      args.tol, start, known)
    x = x.cpu()  # a GPU has finished then
    rate = len(x) / (time.perf_counter() - began)
    how = f"dopri5 to {args.tol:g}" if args.solver == "dopri5" else f"{args.steps} steps of {args.solver}"
    print(f"{len(x)} samples, {how}, NFE {nfe}, {rate:.1f} samples/s")
    if config["model"] == "transformer":
        ratio = border_ratio(x, config["patch"], config["stride"])
        if math.isfinite(ratio):  # there are borders, and there is something elsewhere
            print(f"squared gradient at patch borders: {ratio:.3f} of that elsewhere")
    write(x, states, config, to, columns)


if __name__ == "__main__":
    data.run(main)
