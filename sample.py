"""A checkpoint in, pictures out.

    python sample.py out/faces-32 --n 64 --steps 50 --solver heun --seed 0 --to grid.png

--to decides by its ending: .png a grid (for points a scatter plot), .gif the flow from noise to data, .npy the raw
float32 array (n, C, H, W) or (n, 2), anything without an ending a folder of single PNGs.
"""

import argparse
import contextlib
import time
from pathlib import Path

import numpy as np
import torch

import data
import fm
import model


def pick_device(name):
    """"auto" is the best there is. An absent device is the user's mistake."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in there if there[d]) if name == "auto" else name
    if name.split(":")[0] not in there or not there[name.split(":")[0]]:
        data.refuse(f"no device {name} here; there is: {', '.join(d for d in there if there[d])}")
    return torch.device(name)


def has_bf16(device):
    """Does the hardware multiply matrices in bfloat16 natively? All GPUs of interest do, CPUs say so."""
    if device.type == "cpu":
        abilities = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return device.type == "cuda"


def autocast(device, bf16=True):
    """Matrix products in bfloat16 if the hardware has them. Weights, the state of the ODE and fm.py stay float32."""
    on = bf16 and has_bf16(device)
    return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()


def load(folder, device, weights="ema"):
    """The network of out/<name>/ckpt.pt and its config (a dict), ready to sample from."""
    path = Path(folder)
    path = path / "ckpt.pt" if path.suffix != ".pt" else path
    if not path.is_file():
        data.refuse(f"no checkpoint {path}: train first (python train.py), or name the folder that train.py wrote")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        net = model.build(**checkpoint["net"])
        net.load_state_dict(checkpoint["weights" if weights == "raw" else weights])
    except Exception as error:  # torch.load alone raises half a dozen kinds for a damaged file
        reason = str(error).splitlines()[0]
        data.refuse(f"{path} is not a checkpoint of this program ({type(error).__name__}: {reason})")
    return net.to(device).eval().requires_grad_(False), checkpoint["config"]


def noise(n, shape, seed, first=0):
    """Noise of samples first .. first + n - 1: sample i's is a function of (seed, i) alone, whatever the batch."""
    streams = [torch.Generator().manual_seed(data.key(seed, data.SAMPLE, i)) for i in range(first, first + n)]
    return torch.stack([torch.randn(shape, generator=g) for g in streams])


def shape_of(config):
    return (2,) if config["data"] in data.POINTS else (3, config["res"], config["res"])


def generate(net, config, e, steps, solver="euler", states=None):
    """Follows the flow from noise e to samples, float32, shaped as e. Returns (samples, NFE)."""
    v = fm.velocity(net, config["predict"], fm.PATHS[config["path"]])
    with autocast(e.device, config["bf16"]):
        return fm.solve(v, e, fm.time_grid(steps), solver, end_euler=config["predict"] == "x", states=states)


def draw(x, config, columns=None):
    """Samples as one PIL image: a grid, or for points a scatter plot."""
    return data.scatter(x.cpu().numpy()) if config["data"] in data.POINTS else data.grid(data.to_uint8(x), columns)


def write(x, states, config, to, columns=None):
    """x to the file or folder `to`, whose ending says how; states: those of the whole flow, for a GIF."""
    to.parent.mkdir(parents=True, exist_ok=True)
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


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws samples from a trained flow.", allow_abbrev=False)
    parser.add_argument("folder", help="what train.py wrote, such as out/faces-32")
    parser.add_argument("--n", type=int, default=64, help="how many samples")
    parser.add_argument("--steps", type=int, default=50, help="steps of the solver")
    parser.add_argument("--solver", default="heun", choices=list(fm.SOLVERS))
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on (seed, i) only")
    parser.add_argument("--batch", type=int, default=None, help="samples at once (default: 64; points: all)")
    parser.add_argument("--weights", default="ema", choices=["ema", "raw"], help="averaged or last weights")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--columns", type=int, default=None, help="pictures in a row (default: a square grid)")
    parser.add_argument("--to", default=None, help="x.png, x.gif, x.npy or a folder (default: FOLDER/samples.png)")
    args = parser.parse_args(argv)
    if min(args.n, args.steps, args.batch or 1, args.columns or 1) < 1:
        data.refuse("--n, --steps, --batch and --columns must be at least 1")
    device = pick_device(args.device)
    net, config = load(args.folder, device, args.weights)
    to = Path(args.to) if args.to else Path(args.folder) / "samples.png"
    points = config["data"] in data.POINTS
    if to.suffix not in (".png", ".gif", ".npy", "") or (points and not to.suffix):
        endings = ".png, .gif or .npy" + ("" if points else ", or none (a folder)")
        data.refuse(f"cannot write {to}: its ending must be {endings}")

    if points and device.type == "cpu":
        torch.set_num_threads(1)  # see train.py
    size = args.batch or (args.n if points else 64)
    began, parts, states = time.time(), [], []
    for first in range(0, args.n, size):
        e = noise(min(size, args.n - first), shape_of(config), args.seed, first).to(device)
        flow = [] if to.suffix == ".gif" else None
        x, nfe = generate(net, config, e, args.steps, args.solver, flow)
        parts.append(x)
        states.append(flow)
    seconds = time.time() - began
    states = [torch.cat(batch) for batch in zip(*states)] if to.suffix == ".gif" else None
    write(torch.cat(parts), states, config, to, args.columns)
    print(f"{args.n} samples, {args.steps} steps of {args.solver}, NFE {nfe}, {args.n / seconds:.1f} samples/s")
    print(f"wrote {to}")


if __name__ == "__main__":
    data.run(main)
