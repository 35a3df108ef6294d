"""A checkpoint in, pictures out.

    python sample.py out/faces-32 --n 64 --steps 50 --solver heun --seed 0 --to grid.png

--to decides by its ending: .png a grid (for points a scatter plot), .gif the flow from noise to data, .npy the raw
float32 array (n, C, H, W) or (n, 2), anything without an ending a folder of single PNGs.
"""

import argparse
import contextlib
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
    name = next(d for d in there if there[d]) if name == "auto" else name
    if not there.get(name):
        data.refuse(f"no device {name} here; there is: {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def has_bf16(device):
    """Does the hardware multiply matrices in bfloat16 natively? CUDA GPUs of interest do, CPUs say so."""
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return device.type == "cuda"


def autocast(device, bf16=True):
    """Matrix products in bfloat16 if the hardware has them. Weights, the state of the ODE and fm.py stay float32."""
    on = bf16 and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()


def read_checkpoint(path, part="ema"):
    """What train.py saved, on the CPU, and under "built" its network with the weights of `part`. Refuses others."""
    if not path.is_file():
        data.refuse(f"no checkpoint {path}: train first (python train.py), or name the run's folder: sample.py DIR, "
                    f"train.py --resume --out DIR")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["built"] = model.build(**checkpoint["net"])
        checkpoint["built"].load_state_dict(checkpoint[part])
        checkpoint["config"]["data"], checkpoint["step"], checkpoint["optimizers"], checkpoint["label_names"]
    except Exception as error:  # torch.load alone raises half a dozen kinds for a damaged file
        reason = (str(error) or "empty").splitlines()[0]
        data.refuse(f"{path} is not a checkpoint of this program ({type(error).__name__}: {reason})")
    return checkpoint


def load(path, device, weights="ema"):
    """The network of a checkpoint, ready to sample from, its config (a dict) and the names of its labels."""
    checkpoint = read_checkpoint(path, {"raw": "weights", "ema": "ema"}[weights])
    net = checkpoint["built"].to(device).eval().requires_grad_(False)
    return net, checkpoint["config"], checkpoint["label_names"]


def streams(n, purpose, seed):
    """Generators for n samples: what sample i draws is a function of (seed, i) alone, whatever the batch."""
    return [torch.Generator().manual_seed(data.key(seed, purpose, i)) for i in range(n)]


def noise(n, shape, seed):
    """(n, *shape), standard normal, on the CPU."""
    return torch.stack([torch.randn(shape, generator=g) for g in streams(n, data.SAMPLE, seed)])


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
    if solver == "dopri5" and states is None and not known:  # chooses its own steps, up to where x's velocity is 0/0
        ts = [start, 1 - 1e-3 * (1 - start), 1.0] if end_euler else [start, 1.0]
    with autocast(z.device, config["bf16"] and solver != "dopri5"):  # which would take rounding for error
        if known:
            return fm.inpaint(v, z, *known, ts, path, solver, end_euler, states, tol)
        return fm.solve(v, z, ts, solver, end_euler, states, tol)


def parse_label(text, names, config):
    """--label as y: a class by name or number, attributes by name (comma-separated), or all: one row for each."""
    if not names:
        data.refuse(f"--label {text}: this network has learnt no labels; train with --cond all")
    words = names if text == "all" else text.split(",")
    for word in words:
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            data.refuse(f"--label {word}: not one of {', '.join(names)}")
    y = torch.tensor([names.index(word) if word in names else int(word) for word in words])
    if config["data"] not in ("faces", "celeba"):
        return y
    rows = torch.nn.functional.one_hot(y, len(names))  # several may hold at once
    return rows if text == "all" else rows.amax(0, keepdim=True)


def draw(x, config, columns=None):
    """Samples as one PIL image: a grid, or for points a scatter plot."""
    return data.scatter(x.cpu().numpy()) if config["data"] in data.POINTS else data.grid(data.to_uint8(x), columns)


def write(x, states, config, to, columns=None):
    """x to the file or folder `to`, whose ending says how; states: those of the whole flow, for a GIF."""
    if to.suffix == ".png":
        draw(x, config, columns).save(to)
    elif to.suffix == ".gif":
        data.save_gif(to, [draw(z, config, columns) for z in states])
    elif to.suffix == ".npy":
        np.save(to, x.cpu().numpy())
    else:
        to.mkdir(exist_ok=True)
        for i, pixels in enumerate(data.to_uint8(x)):
            data.picture(pixels).save(to / f"{i:05d}.png")


def border_ratio(x, patch, stride):
    """Mean squared difference of neighbouring pixels where a patch begins or ends, over that elsewhere. A visible grid
    of patches makes it larger than it is in the data. x: (B, C, H, W)."""
    steps = x.diff(dim=3).square().mean((0, 1, 2)) + x.diff(dim=2).square().mean((0, 1, 3))  # (W-1,)
    starts = torch.arange(0, x.shape[3] - patch + 1, stride)
    border = torch.isin(torch.arange(1, x.shape[3]), torch.cat([starts, starts + patch])).to(x.device)
    return (steps[border].mean() / steps[~border].mean()).item()


def held_out_data(config, n):
    """n samples that were not trained on, as a tensor: points, or bytes (n, C, H, W) as floats 0..255."""
    if config["data"] in data.POINTS:
        rng = np.random.default_rng(data.key(1, data.HELD_OUT, 0))
        return torch.from_numpy(data.points(config["data"], n, rng))
    images = data.load(config["data"], config["root"], config["res"])[0]
    return torch.from_numpy(images[data.split(len(images))[1][:n]]).permute(0, 3, 1, 2).float()


def likelihood(net, config, n, steps, seed, device, batch=64):
    """Prints bits per dimension (pictures) or nats (points) of n held-out samples, with the standard error."""
    points = config["data"] in data.POINTS
    x = held_out_data(config, n)
    # Bytes become densities by adding the fraction that rounding took away: (b + u) / 256, stretched to [-1, 1].
    g = torch.Generator().manual_seed(data.key(seed, data.TRACE))
    x = x if points else (x + torch.rand(x.shape, generator=g)) / 128 - 1
    # From data to noise the training clamp is right: unclamped, an x-prediction's velocity is 0/0 at t = 1, and near
    # it blows up every error. Clamped, it is the field that was trained, and any field has a likelihood.
    v = fm.velocity(net, config["predict"], fm.PATHS[config["path"]], clamp=fm.CLAMP)
    parts = []
    for part in x.split(n if points else batch):
        probe = None if points else torch.randint(0, 2, part.shape, generator=g).to(device) * 2.0 - 1
        log_p, nfe = fm.log_likelihood(v, part.to(device), fm.time_grid(steps)[::-1], "heun", probe)
        parts.append(log_p.cpu())
    log_p = torch.cat(parts)
    score = -log_p if points else fm.bits_per_dimension(log_p, x[0].numel())
    error = score.std(correction=min(1, len(score) - 1)) / math.sqrt(len(score))
    print(f"{score.mean():.3f} +- {error:.3f} {'nats' if points else 'bits per dimension'} on {len(score)} held-out "
          f"samples, {steps} steps of heun, NFE {nfe}")


def sweep(net, config, e, y):
    """Prints how far each solver is from the exact flow, by evaluations of the network; for points also W2."""
    points = config["data"] in data.POINTS
    config = {**config, "bf16": False}  # bfloat16's rounding would drown the differences between solvers
    exact, _ = generate(net, config, e, 100, "rk4", y=y)
    fresh = held_out_data(config, len(e)).to(e.device) if points else None
    print("solver    steps or tol   NFE   RMS distance from the exact flow" + ("   W2 to data" if points else ""))
    trials = [(name, budget // cost) for name, cost in (("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4))
              for budget in (4, 8, 16, 32, 64)]
    for solver, steps in [*trials, *(("dopri5", tol) for tol in (1e-1, 1e-2, 1e-3, 1e-4))]:
        x, nfe = generate(net, config, e, steps if solver != "dopri5" else 1, solver, y=y, tol=steps)
        row = f"{solver:8s} {steps:13g} {nfe:5d} {(x - exact).square().mean().sqrt():34.4f}"
        print(row + (f"{fm.w2(fresh, x):13.3f}" if points else ""), flush=True)


def slerp(a, b, s):
    """Between two noises along the sphere on which noise lies: a straight mixture would be too short to be noise."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def read_picture(path, mode, res):
    """A picture that is exactly what the network draws, or a mask of its size, as uint8 (H, W, C)."""
    try:
        with Image.open(path) as im:
            if (im.mode, im.size) == (mode, (res, res)):
                return np.array(im).reshape(res, res, -1)
    except Exception as error:  # whatever a broken file makes a decoder raise
        data.refuse(f"{path} is no picture that can be read ({error})")
    data.refuse(f"{path} is {im.mode} with {im.width}x{im.height} pixels, needed is {mode} with {res}x{res}; convert "
                f"it: python -c \"from PIL import Image; Image.open('{path}').convert('{mode}').resize(({res}, {res}))"
                f".save('fits.png')\"")


def invert(net, config, x, steps, y):
    """Takes a picture back to its noise and forth again, and prints how far from itself it ends. Returns the three
    and all states between.

    Both ways with the training clamp, see `likelihood`: there and back must be the same field, and in float32, since
    rounding is all that is lost otherwise.
    """
    v, states = fm.velocity(net, config["predict"], fm.PATHS[config["path"]], y, clamp=fm.CLAMP), []
    e, there = fm.solve(v, x, fm.time_grid(steps)[::-1], "heun", states=states)
    again, back = fm.solve(v, e, fm.time_grid(steps), "heun", states=states)
    print(f"round trip: RMS error {(again - x).square().mean().sqrt():.5f} on [-1, 1], NFE {there} + {back}; "
          f"its noise has mean {e.mean():.3f} and standard deviation {e.std():.3f}")
    return torch.cat([x, e, again]), states


def parse(argv):
    parser = argparse.ArgumentParser(description="Draws samples from a trained flow.", allow_abbrev=False)
    parser.error = data.refuse
    parser.add_argument("folder", help="what train.py wrote, such as out/faces-32")
    parser.add_argument("--n", type=int, default=64, help="how many samples")
    parser.add_argument("--steps", type=int, default=50, help="steps of the solver")
    parser.add_argument("--solver", default="heun", choices=list(fm.SOLVERS))
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on (seed, i) only")
    parser.add_argument("--tol", type=float, default=1e-4, help="error that dopri5 allows itself per step")
    parser.add_argument("--shift", type=float, default=1.0, help="more than 1: smaller steps near the noise")
    parser.add_argument("--label", default=None, help="class or attribute, by name or number; a,b; or all: a row each")
    parser.add_argument("--guidance", type=float, default=1.0, help="how strongly the label pulls; 1 is not at all")
    parser.add_argument("--interval", default="0.1,1", help="times between which guidance is on")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--interpolate", type=int, default=0, help="pictures from each noise to the next")
    modes.add_argument("--from", dest="source", metavar="PICTURE", help="start from this picture, partly made noise")
    parser.add_argument("--strength", type=float, default=0.6, help="... how much of it: 1 is all, 0 nothing")
    modes.add_argument("--inpaint", metavar="PICTURE", help="fill a hole in this picture ...")
    parser.add_argument("--mask", metavar="PICTURE", help="... white where the hole is, else black")
    modes.add_argument("--invert", metavar="PICTURE", help="instead: the noise that leads to it, and back")
    modes.add_argument("--sweep", action="store_true", help="instead: a table of error against NFE for every solver")
    modes.add_argument("--bpd", type=int, default=0, help="instead: the likelihood of so many held-out samples")
    parser.add_argument("--batch", type=int, default=None, help="samples at once (default: 64; points: all)")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"], help="averaged or last weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--columns", type=int, default=None, help="pictures in a row (default: a square grid)")
    parser.add_argument("--to", default=None, help="x.png, x.gif, x.npy or a folder (default: FOLDER/samples.png)")
    args = parser.parse_args(argv)
    if any(number is not None and number < 1 for number in (args.n, args.steps, args.batch, args.columns)):
        data.refuse("--n, --steps, --batch and --columns must be at least 1")
    if min(args.seed, args.bpd, args.interpolate) < 0 or not (args.tol > 0 and 0 < args.shift < math.inf):
        data.refuse("--seed, --bpd and --interpolate must not be negative, --tol and --shift must be more than 0")
    if args.interpolate and args.n < 2:
        data.refuse("--interpolate needs --n 2 or more noises to go between")
    if not 0 < args.strength <= 1:
        data.refuse(f"--strength {args.strength}: more than 0, at most 1")
    if bool(args.inpaint) != bool(args.mask):
        data.refuse("--inpaint PICTURE and --mask MASK go together")
    if args.guidance != 1 and not args.label:
        data.refuse("--guidance needs a --label to pull towards")
    try:
        args.interval = low, high = tuple(map(float, args.interval.split(",")))
    except ValueError:
        low, high = 1, 0
    if not low <= high:
        data.refuse(f"--interval {args.interval}: two times, such as 0.1,1")
    return args


def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device)
    path = Path(args.folder)
    path = path if path.suffix == ".pt" else path / "ckpt.pt"
    net, config, label_names = load(path, device, args.weights)
    points, shape = config["data"] in data.POINTS, shape_of(config)
    to = Path(args.to) if args.to else path.parent / "samples.png"
    if to.suffix not in (".png", ".gif", ".npy", "") or (points and not to.suffix):
        endings = ".png, .gif or .npy" + ("" if points else ", or none (a folder)")
        data.refuse(f"cannot write {to}: its ending must be {endings}")
    data.check_writable(to)
    y, columns = None, args.columns
    if args.label:
        rows = parse_label(args.label, label_names, config)
        each = math.ceil(args.n / len(rows))
        args.n, y = each * len(rows), rows.repeat_interleave(each, 0).to(device)
        columns = columns or (each if len(rows) > 1 else None)
    picture, picture_name = None, args.source or args.inpaint or args.invert
    if picture_name:
        if points:
            data.refuse(f"{picture_name}: this network draws points, not pictures")
        pixels = read_picture(picture_name, "L" if shape[0] == 1 else "RGB", config["res"])
        picture = data.to_tensor(pixels[None], device)

    if points and device.type == "cpu":
        torch.set_num_threads(1)  # see train.py
    if args.bpd:
        return likelihood(net, config, args.bpd, args.steps, args.seed, device, args.batch or 64)
    e, start, known = noise(args.n, shape, args.seed).to(device), 0.0, None
    if args.sweep:
        return sweep(net, config, e, y)
    if args.invert:
        write(*invert(net, config, picture, args.steps, None if y is None else y[:1]), config, to, columns or 3)
        return print(f"wrote {to}")
    if args.interpolate:  # a row from each noise to the next
        columns, s = args.interpolate, torch.linspace(0, 1, args.interpolate).tolist()
        e = torch.stack([slerp(a, b, part) for a, b in zip(e, e.roll(-1, 0)) for part in s])
        y = None if y is None else y.repeat_interleave(columns, 0)
    if args.source:  # SDEdit (Meng et al. 2021, arXiv 2108.01073): noise hides detail and keeps the layout
        start = 1 - args.strength
        alpha, sigma, _, _ = fm.PATHS[config["path"]](torch.tensor(start))
        e = alpha * picture + sigma * e
    if args.inpaint:
        hole = read_picture(args.mask, "L", config["res"])
        hole = torch.from_numpy(hole > 127).to(device).permute(2, 0, 1)

    size = args.batch or (len(e) if points else 64)
    generators, began, parts, states = streams(len(e), data.INPAINT, args.seed), time.time(), [], []
    for i in range(0, len(e), size):
        if args.inpaint:
            known = picture, hole, lambda: torch.stack([torch.randn(shape, generator=g)
                                                        for g in generators[i : i + size]]).to(device)
        states.append([] if to.suffix == ".gif" else None)
        x, nfe = generate(net, config, e[i : i + size], args.steps, args.solver, states[-1],
                          None if y is None else y[i : i + size], args.guidance, args.interval, args.shift, args.tol,
                          start, known)
        parts.append(x)
    seconds = time.time() - began
    states = [torch.cat(batch) for batch in zip(*states)] if to.suffix == ".gif" else None
    x = torch.cat(parts)
    write(x, states, config, to, columns)
    how = f"dopri5 to {args.tol:g}" if args.solver == "dopri5" else f"{args.steps} steps of {args.solver}"
    print(f"{len(e)} samples, {how}, NFE {nfe}, {len(e) / seconds:.1f} samples/s")
    if config["model"] == "transformer":
        ratio = border_ratio(x, config["patch"], config["stride"])
        print(f"squared gradient at patch borders: {ratio:.3f} of that elsewhere")
    print(f"wrote {to}")


if __name__ == "__main__":
    data.run(main)
