"""A checkpoint in, pictures out.

    python sample.py out/faces-32 --n 64 --steps 10 --solver heun --seed 0 --to grid.png

The ending of --to chooses the format: .png a grid (for points a scatter plot), .gif the flow from noise to data, .npy
the raw float32 array (n, C, H, W) or (n, 2), no ending a folder of single PNGs.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

import data
import fm
import model

# ---------------------------------------------------------------------------------------------------------------
# From noise to pictures


def generate(net, config, z, steps, solver="euler", y=None, guidance=1.0, interval=(0.1, 1.0), shift=None, tol=1e-4,
             start=0.0, inpaint=None, churn=0.0, new_noise=None, states=None):
    """Follows the flow from z, at time `start` (0: noise), to samples, float32, shaped as z. Returns (samples, NFE).

    config: a run's, of which it reads predict, path, bf16 and how its times were drawn. y: labels, or None. shift: of
    the times, see `usual_shift` for None. inpaint: (picture, hole), to fill the hole in the picture, see `fm.inpaint`.
    churn: see `fm.solve_with_churn`. new_noise: a function, for these two. states: a list that receives the state after
    each step.
    """
    y_null = None if y is None else model.hide(y, torch.ones(len(y), dtype=bool, device=y.device))
    path = fm.PATHS[config.path]
    v = fm.velocity(net, config.predict, path, y, y_null, guidance, interval)
    ts = [start + (1 - start) * t for t in fm.time_grid(steps, shift or usual_shift(config))]
    if solver == "dopri5" and states is None and new_noise is None:
        ts = [start, 1.0]  # it chooses its own steps; only a GIF or new noise on the way needs the states between
    end_euler = config.predict == "x" and solver != "shortcut"
    # No bfloat16 with dopri5: it would take the rounding for its own error, and shorten its steps.
    with autocast(z.device, config.bf16 and solver != "dopri5"):
        if inpaint is not None:
            return fm.inpaint(v, z, *inpaint, new_noise, ts, path, solver, end_euler, states, tol)
        if churn:
            return fm.solve_with_churn(v, z, ts, churn, new_noise, path, solver, end_euler, states, tol)
        return fm.solve(v, z, ts, solver, end_euler, states, tol)


def usual_shift(config):
    """The shift that makes steps small where training drew many times. Large pictures are trained at noisy times, and
    the network has hardly seen the others: so it should be asked there seldom, and finish in one long step. The price:
    that step lands on the mean of the pictures that fit, without the detail that the noise at its start still hides.
    With more steps it is shorter."""
    return math.exp(-config.t_mean) if config.times == "logit-normal" else 1.0


def noise(indices, shape, seed):
    """Standard normal noise (len(indices), *shape), on the CPU. That of sample i depends on (seed, i) alone."""
    return noise_source(indices, shape, seed, data.SAMPLE, torch.device("cpu"))()


def noise_source(indices, shape, seed, purpose, device):
    """A function that draws new noise at each call. The sequence that sample i gets depends on (seed, i) alone."""
    generators = [torch.Generator().manual_seed(data.seed_from(seed, purpose, i)) for i in indices]

    def draw_noise():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return draw_noise


def shape_of(config):
    """The shape of one sample."""
    if config.dataset in data.POINTS:
        return (config.dim,)
    return (data.channels(config.dataset), config.res, config.res)


def draw(x, config, columns=None):
    """Samples as one PIL image: a grid, or for points a scatter plot."""
    if config.dataset in data.POINTS:
        return data.scatter(data.dig(x).cpu().numpy())
    return data.grid(data.to_uint8(x), columns)


def write(batches, n, config, to, columns=None, rank=0):
    """Writes n samples to the file or folder `to`, in the format that its ending says. batches: (indices, x, states)
    each, with all states of the flow if it is for a GIF. Folders and .npy files are written batch by batch, so their
    size is not bounded by the memory. If it fails midway, an older file stays whole; a folder may then hold both old
    and new pictures."""
    part = to.parent / f".part-{to.name}"
    try:
        if to.suffix == ".npy":
            write_array(batches, n, config, part, rank)
        elif to.suffix:
            samples, flows = [], []
            for _, x, states in batches:
                samples.append(x)
                flows.append(states)
            if to.suffix == ".gif":
                data.save_gif(part, [draw(torch.cat(parts), config, columns) for parts in zip(*flows)])
            else:
                draw(torch.cat(samples), config, columns).save(part)
        else:
            for indices, x, _ in batches:
                for i, pixels in zip(indices, data.to_uint8(x)):
                    data.save_whole(Image.fromarray(pixels.squeeze()), to / picture_name(i))
        meet()
        if to.suffix and rank == 0:
            part.replace(to)
    except OSError as error:
        data.fail(f"could not write {to} ({error}); free some space, or name another place: --to", status=1)
    finally:
        if rank == 0:
            part.unlink(missing_ok=True)
    print(f"wrote {to}")


def write_array(batches, n, config, file, rank):
    """Writes samples as a .npy file, float32. Several processes write to the same file, each its own samples."""
    if rank == 0:
        with open(file, "wb") as out:
            header = dict(descr="<f4", fortran_order=False, shape=(n, *shape_of(config)))
            np.lib.format.write_array_header_1_0(out, header)
    meet()
    with open(file, "r+b") as out:
        np.lib.format.read_magic(out)
        np.lib.format.read_array_header_1_0(out)
        start = out.tell()
        for indices, x, _ in batches:
            out.seek(start + indices[0] * x[0].numel() * 4)
            out.write(x.cpu().numpy().tobytes())


def main(argv=None):
    args = parse_flags(argv)
    rank, world = processes()
    alone = args.bpd or args.sweep or args.fd or args.paths or args.invert
    if world > 1 and (alone or not args.to or args.to.suffix not in ("", ".npy")):
        data.fail("several processes share out samples to a folder or a .npy file: --to FOLDER")
    device = start_processes(args.device)
    judge, judged_shape = make_judge(args, device) if args.fd else (None, None)  # now, lest pictures be drawn in vain
    if judge and holds_pictures(args.folder):
        if args.label or args.churn:
            data.fail(f"{args.folder} holds pictures that are drawn already: --label, --guidance and --churn are for "
                      f"runs")
        return judge(read_folder(args.folder, args.fd, judged_shape))
    file = checkpoint_in(args.folder)
    checkpoint = read_checkpoint(file)
    net, config = checkpoint["network"].to(device).eval().requires_grad_(False), checkpoint["config"]
    to = args.to or file.parent / "samples.png"
    if config.network == "mlp" and device.type == "cpu":
        torch.set_num_threads(1)  # layers of microseconds are slower when threads share them
    args.batch = args.batch or usual_batch(config, device)
    rows = parse_label(args.label, checkpoint)
    check(args, config, checkpoint, rows, to)
    if args.bpd:
        return likelihood(net, config, checkpoint, args.bpd, args.steps, args.seed, device, args.batch)
    if args.paths:
        return write_paths(net, config, to, device, args)

    n, y, columns = args.n, None, args.columns
    if rows is not None:  # the same number of samples for each row of labels
        each = math.ceil(n / len(rows))
        n, y = each * len(rows), rows.repeat_interleave(each, 0).to(device)
        if len(rows) > 1:
            columns = columns or each
    if args.sweep:
        z = noise(range(n), shape_of(config), args.seed).to(device)
        return sweep(net, config, z, y, args.batch, args.shift or usual_shift(config), has_shortcuts(checkpoint))
    if judge:
        check_judged(args, shape_of(config), judged_shape, n)
    else:
        check_output(to, config, 3 if args.invert else n * (args.interpolate or 1))
    if args.invert:
        picture = read_picture(args.invert, config, device)
        x, states = invert(net, config, picture, fm.time_grid(args.steps, args.shift or 1), y)
        return write([(range(3), x, states)], 3, config, to, args.columns or 3)
    if args.interpolate:
        n, y = n * args.interpolate, None if y is None else y.repeat_interleave(args.interpolate, 0)
        columns = args.columns or args.interpolate  # a row from each noise to the next
    batches = generate_in_batches(net, config, n, y, args, device, rank, world, keep_states=to.suffix == ".gif")
    if judge:
        x = torch.cat([x for _, x, _ in batches])
        return judge(data.to_tensor(data.to_uint8(x), torch.device("cpu")))  # rounded, as it would be written
    write(batches, n, config, to, columns, rank)
    leave_processes()


def generate_in_batches(net, config, n, y, args, device, rank, world, keep_states):
    """Draws n samples, at most --batch at a time, and yields each batch as (indices, samples, states). Of several
    processes each draws its own share. At the end it prints how it was done, and how fast."""
    shape, start, known, picture, between_noises = shape_of(config), 0.0, None, None, None
    if args.interpolate:
        between_noises = between(noise(range(n // args.interpolate), shape, args.seed), args.interpolate)
    if args.source:
        start, picture = 1 - args.strength, read_picture(args.source, config, device)
    if args.inpaint:
        known = (read_picture(args.inpaint, config, device), read_mask(args.mask, config, device))

    shares = torch.arange(n).split(args.batch)[rank::world]
    report = progress(sum(len(indices) for indices in shares))
    seconds, nfe, energy = 0.0, 0, 0.0
    for indices in shares:
        began = time.perf_counter()
        z = noise(indices.tolist(), shape, args.seed) if between_noises is None else between_noises[indices]
        z = z.to(device)
        if args.source:
            z = noisy(picture, z, start, config)
        y_part = None if y is None else y[indices]
        states = [z] if keep_states else None
        new_noise = None
        if known is not None or args.churn:
            new_noise = noise_source(indices.tolist(), shape, args.seed, data.ON_THE_WAY, device)
        x, evaluations = generate(net, config, z, args.steps, args.solver, y_part, args.guidance, args.interval,
                                  args.shift, args.tol, start, known, args.churn, new_noise, states)
        x = x.cpu()  # waits for a GPU, so that the time is right
        seconds += time.perf_counter() - began
        nfe = max(nfe, evaluations)  # dopri5's count differs from batch to batch
        if config.network == "transformer":
            energy = energy + edge_energy(x) * len(x)
        yield indices.tolist(), x, states
        report(len(x))
    if rank > 0:
        return
    how = f"dopri5 to {args.tol:g}" if args.solver == "dopri5" else f"{args.steps} steps of {args.solver}"
    print(f"{n} samples, {how}, NFE {nfe}, {n / seconds:.1f} samples/s")  # the first process has the largest share
    if config.network == "transformer":
        ratio = border_ratio(energy, config.patch, config.stride)
        if math.isfinite(ratio):  # it is not finite if no pixel, or every one, is at a border
            print(f"squared gradient at patch borders: {ratio:.3f} of that elsewhere")


def edge_energy(x):
    """Mean squared difference between neighbouring pixels, for each of the W - 1 edges along a side."""
    across, down = x.diff(dim=3).square(), x.diff(dim=2).square()  # (B, C, H, W)
    return across.mean((0, 1, 2)) + down.mean((0, 1, 3))  # (W-1,): entry i is the edge before pixel i + 1


def border_ratio(energy, patch, stride):
    """The `edge_energy` of pictures where a patch begins or ends, over that elsewhere. If it is larger than the data's
    own, the grid of patches shows."""
    starts = torch.arange(0, len(energy) + 1 - patch + 1, stride)
    borders = torch.cat([starts, starts + patch])  # the pixels before which a patch begins or ends
    at_border = torch.isin(torch.arange(1, len(energy) + 1), borders)
    return (energy[at_border].mean() / energy[~at_border].mean()).item()


def usual_batch(config, device):
    """On a CPU, large pictures are as fast in small batches, and their progress shows earlier."""
    return 16 if config.res > 64 and device.type == "cpu" else 64


def progress(n, unit="samples"):
    """Returns a function to call after each batch with its size. At most every five seconds it prints how many of the n
    samples (or other units) are done, and how long the rest will take."""
    began = reported = time.perf_counter()
    done = 0

    def report(more):
        nonlocal reported, done
        done, now = done + more, time.perf_counter()
        if done < n and now - reported > 5:
            data.report_progress(done, n, now - began, unit)
            reported = now

    return report


# ---------------------------------------------------------------------------------------------------------------
# A number for quality


def make_judge(args, device):
    """(judge, shape). shape: of the pictures that the judge knows, (C, H, W). judge: a function of n such pictures.

    It prints how far their features are from those of n held-out pictures of its dataset: the Fréchet distance, see
    `features`. Beside it stands that of n training pictures, which is about what a perfect sampler would get.
    """
    run = args.judge or args.folder
    if holds_pictures(run):
        data.fail(f"{run} holds pictures, and no network to judge any: name a run, such as --judge out/faces-32")
    checkpoint = read_checkpoint(checkpoint_in(run))
    net, config = checkpoint["network"].to(device).eval().requires_grad_(False), checkpoint["config"]
    if config.dataset in data.POINTS:
        data.fail(f"--fd is for pictures, and {run} has learnt points: for those --sweep prints W2")
    if config.drop == 0 and checkpoint["label_names"]:
        data.fail(f"{run} was trained with --drop 0, so it has never seen a picture without its label, as here: name "
                  f"another run, --judge DIR")
    images, _, _, _ = load_data(config, checkpoint)
    training, held_out = data.split(len(images))
    if args.fd > len(held_out) or len(images) == len(training):
        data.fail(f"--fd {args.fd}: {run} has held out only {len(images) - len(training)} pictures to compare with, so "
                  f"ask for no more")
    training = training[data.permutation(len(training), seed=0, epoch=0)]

    def judge(x):
        n, sets, batch = len(x), [], args.batch or usual_batch(config, device)
        for pictures in (images[held_out[:n]], images[training[:n]]):
            sets.append(features(net, config, data.to_tensor(pictures, x.device), device, batch))
        fresh, known = sets
        drawn = features(net, config, x, device, batch)
        unit = fresh.std(dim=0).clamp(min=1e-6)  # or the few features with the largest numbers would say it all
        floor, distance = fm.frechet(known / unit, fresh / unit), fm.frechet(drawn / unit, fresh / unit)
        if floor < 1e-6:
            data.fail(f"{run} has learnt pictures that are all alike: no distance to them means anything")
        print(f"Fréchet distance of {n:,} pictures to as many held-out ones: {distance:.4g}, {distance / floor:.3g} "
              f"times that of training pictures, {floor:.4g}; judge: {run}")

    return judge, shape_of(config)


def check_judged(args, shape, judged_shape, n):
    """Refuses pictures that the judge does not know, and a number of them, n, that is not that of --fd."""
    if shape != judged_shape:
        data.fail(f"--judge {args.judge} knows pictures of shape {judged_shape}, channels first, and {args.folder} "
                  f"draws {shape}")
    if n != args.fd:
        data.fail(f"--fd {args.fd} must be a multiple of the number of rows of --label, as {n} is")


def checkpoint_in(folder):
    """The checkpoint of a run, of which the folder is given, or the file itself."""
    return folder / "ckpt.pt" if folder.is_dir() or not folder.suffix else folder


def holds_pictures(folder):
    """Is this a folder of pictures, and not that of a run?"""
    if not folder.is_dir() or checkpoint_in(folder).exists():
        return False
    return any(data.is_picture(file) for file in data.walk(folder))


def read_folder(folder, n, shape):
    """n pictures of a folder, chosen at random but always the same, and prepared as for the judge's training."""
    channels, res, _ = shape
    names, read = data.list_files(folder)
    names = data.pick_pictures(folder, names)
    if len(names) < n:
        data.fail(f"--fd {n}: {folder} has only {len(names)} pictures")
    chosen = [names[i] for i in sorted(data.permutation(len(names), seed=0, epoch=0)[:n])]
    pixels, done = [], Counter()
    for picture, _, notes in data.stream_files(chosen, chosen, read, res, channels):
        if picture is None:
            data.fail(f"cannot read {folder}/{notes}")
        pixels.append(picture)
        done.update(notes)
    notes = [f"{count:,} {note}" for note, count in done.items()]
    print(f"{folder}: {n:,} of {len(names):,} pictures", *notes, sep=", ")
    return data.to_tensor(np.stack(pixels), torch.device("cpu"))


def features(net, config, x, device, batch):
    """What the judge's network makes of pictures x, (n, C, H, W): (n, F). It looks at them at time 0.9, through a
    little noise, the same for the i-th picture of every set. Each number that comes out of the middle block (of a UNet:
    half of the way up) becomes two: mean and standard deviation over the tokens."""
    t = 0.9
    layer = net.up2 if config.network == "unet" else net.blocks[(len(net.blocks) - 1) // 2]
    outputs, rows = [], []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    e = noise_source(range(len(x)), x.shape[1:], 0, data.JUDGE, x.device)()
    report = progress(len(x))
    for part in torch.arange(len(x)).split(batch):
        z = noisy(x[part], e[part], t, config).to(device)
        with autocast(device, config.bf16):
            net(z, torch.full((len(z),), t, device=device))
        h = outputs.pop().float().cpu()  # (B, N, D)
        if config.network == "unet":
            h = h.flatten(2).transpose(1, 2)  # (B, C, R, R) -> (B, N, C)
        rows.append(torch.cat([h.mean(dim=1), h.std(dim=1, correction=0)], dim=1))  # (B, F)
        report(len(part))
    hook.remove()
    return torch.cat(rows)


# ---------------------------------------------------------------------------------------------------------------
# Editing


def between(z, count):
    """`count` noises from each noise to the next, both included, and from the last to the first. They lie on the sphere
    near which all noise lies: a straight mixture of two noises would have too small a norm."""
    rows = []
    for a, b in zip(z, z.roll(-1, 0)):
        for s in torch.linspace(0, 1, count).tolist():
            rows.append(slerp(a, b, s))
    return torch.stack(rows)


def slerp(a, b, s):
    """The point that lies the fraction s of the way from a to b along the sphere."""
    angle = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def noisy(x, e, t, config):
    """The picture x as it is at time t, to start from: noise hides its detail and keeps its layout (SDEdit, Meng et
    al. 2021, arXiv 2108.01073)."""
    alpha, sigma, _, _ = fm.PATHS[config.path](torch.tensor(t))
    return alpha * x + sigma * e


def invert(net, config, x, ts, y):
    """Takes a picture back to its noise and forth again, and prints the error. Returns picture, noise and
    reconstruction as one batch, and all states on the way.

    Both ways with training's clamp, see `likelihood`, so that they follow the same field; and in float32, so that
    nothing is lost but the solver's error. That field changes fastest near t = 1, so steps must not be longer there.
    """
    y = None if y is None else y[:1]
    v = fm.velocity(net, config.predict, fm.PATHS[config.path], y, clamp=fm.CLAMP)
    states = [x]
    e, nfe_back = fm.solve(v, x, ts[::-1], "heun", states=states)
    again, nfe_forth = fm.solve(v, e, ts, "heun", states=states)
    error = (again - x).square().mean().sqrt()
    print(f"round trip: RMS error {error:.5f} on [-1, 1], NFE {nfe_back} + {nfe_forth}; its noise has mean "
          f"{e.mean():.3f} and standard deviation {e.std():.3f}")
    return torch.cat([x, e, again]), states


def read_picture(file, config, device):
    """Any picture, prepared as for training, (1, C, H, W) in [-1, 1]; prints what was done with it."""
    shape = shape_of(config)
    if len(shape) < 3:
        data.fail(f"{file}: this network draws points, not pictures")
    pixels = read_or_fail(file, data.read_picture, config.res, shape[0])
    return data.to_tensor(pixels[None], device)


def read_mask(file, config, device):
    """bool (1, 1, H, W): True in the hole, see `data.read_mask`."""
    hole = read_or_fail(file, data.read_mask, config.res)
    if not hole.any():
        data.fail(f"{file} has no hole: make it white where the picture is to be filled in, black elsewhere (or paint "
                  f"there, and leave the rest transparent)")
    if hole.all():
        print(f"{file} is all hole: nothing of the picture is kept")
    return torch.from_numpy(hole)[None, None].to(device)


def read_or_fail(file, read, *sizes):
    """Reads a file by one of data.py's functions, and prints what was done; or ends the program."""
    try:
        pixels, done = read(Path(file).read_bytes(), *sizes)
    except Exception as error:  # whatever a broken file makes a decoder raise
        data.fail(f"cannot read the picture {file}: {error}")
    print(f"{file}: {', '.join(done) or 'as it is'}")
    return pixels


# ---------------------------------------------------------------------------------------------------------------
# Looking at the flow itself


@torch.no_grad()
def write_paths(net, config, to, device, args):
    """For points, three pictures side by side: pairs of noise and data as training draws them, the learnt velocities
    at t = 0.5, and the paths from noise to samples."""
    if config.dataset not in data.POINTS or config.dim > 2:
        data.fail("--paths draws the flow of points in the plane: python train.py --data moons")
    if to.suffix != ".png":
        data.fail(f"--paths writes a .png, not {to}")
    check_output(to, config, 1)
    e = noise(range(args.n), (2,), args.seed)
    x = data.points(config.dataset, args.n, data.seed_from(1, data.HELD_OUT, 0))
    paired = fm.ot_pair(x, e, config.ot_block) if config.ot else e
    pairs = torch.stack([paired, x], dim=1)  # (n, 2, 2)

    ticks = torch.linspace(-4.8, 4.8, 15)
    places = torch.cartesian_prod(ticks, ticks).to(device)  # (225, 2)
    v = fm.velocity(net, config.predict, fm.PATHS[config.path])
    arrows = torch.stack([places, places + 0.15 * v(places, 0.5)], dim=1)  # (225, 2, 2)

    states = [e.to(device)]
    generate(net, config, states[0], args.steps, args.solver, shift=args.shift, tol=args.tol, states=states)
    ts = torch.tensor(fm.time_grid(args.steps, args.shift or usual_shift(config)), device=device)
    if len(states) > len(ts):
        del states[-2]  # where dopri5 left the rest to Euler
    paths = torch.stack(states, dim=1)  # (n, steps + 1, 2)
    energy = (paths.diff(dim=1).square().sum(dim=2) / ts.diff()).sum(dim=1).mean().item()
    least = fm.w2(states[0], states[-1]) ** 2
    print(f"mean of |v|^2 along the paths: {energy / least:.2f} times the squared W2 from noise to samples, which is "
          f"the least possible")

    panels = {}
    for title, lines in (("optimal-transport pairs" if config.ot else "random pairs", pairs),
                         ("learnt velocity at t = 0.5", arrows), ("paths from noise to samples", paths)):
        panels[title] = data.trails(lines.cpu().numpy())
    data.save_whole(data.panels(panels), to)
    print(f"wrote {to}")


def likelihood(net, config, checkpoint, n, steps, seed, device, batch):
    """Prints bits per dimension (pictures) or nats (points) of n held-out samples, with the standard error."""
    images, _, _, _ = load_data(config, checkpoint)
    training, held_out = data.split(len(images))
    x = data.to_tensor(images[held_out[:n]], torch.device("cpu"))
    g, path = torch.Generator().manual_seed(data.seed_from(seed, data.TRACE)), fm.PATHS[config.path]

    def nats(points):
        # All the way to the data, where an x-prediction divides by 0 unless it is clamped as in training.
        v = fm.velocity(net, config.predict, path, clamp=fm.CLAMP)
        log_p, nfe = fm.log_likelihood(v, points, fm.time_grid(steps)[::-1], "rk4")
        return -log_p, nfe

    def bits(pictures, noise):
        v = fm.velocity(net, config.predict, path)
        e = torch.randn(pictures.shape, generator=g).to(device)
        signs = torch.randint(0, 2, pictures.shape, generator=g).to(device) * 2.0 - 1
        return fm.bits_per_dimension(v, pictures, e, signs, noise, steps, path)

    scores, unit, how = [], "nats", ""
    if config.dataset in data.POINTS:
        report = progress(len(x))
    else:  # any noise gives a bound; the first eight pictures choose the lowest
        few, bounds = x[:8].to(device), {}
        noises = (0.001, 0.002, 0.005, 0.01, 0.02, 0.04)
        report = progress(len(noises) * len(few) + len(x))
        for noise in noises:
            bounds[noise] = bits(few, noise)[0].mean().item()
            report(len(few))
        best = min(bounds, key=bounds.get)
        unit, how = "bits per dimension at most", f", from noise of {best}"
    for part in x.to(device).split(batch):
        score, nfe = nats(part) if unit == "nats" else bits(part, best)
        scores.append(score.cpu())
        report(len(part))
    scores = torch.cat(scores)
    error = scores.std(correction=min(1, len(scores) - 1)) / math.sqrt(len(scores))
    which = "training (too few to hold any out)" if len(training) == len(images) else "held-out"
    print(f"{scores.mean():.3f} +- {error:.3f} {unit} on {len(scores)} {which} samples, {steps} steps of rk4, NFE "
          f"{nfe}{how}")


def sweep(net, config, z, y, batch, shift, shortcuts):
    """Prints how far each solver ends from a fine solution of the same flow, by evaluations of the network; for points
    also W2 to the data. In float32, so that rounding does not hide the differences.

    The fine solution is RK4 in 100 steps. With an x-prediction its last step is Euler's and lands on the prediction,
    which has the more detail the later that step starts: so no number of steps is the exact end.
    """
    config = SimpleNamespace(**{**vars(config), "bf16": False})

    def solve_all(solver, steps, tol):
        parts, most = [], 0
        for part in torch.arange(len(z)).split(batch):
            y_part = None if y is None else y[part]
            x, nfe = generate(net, config, z[part], steps, solver, y_part, tol=tol,
                              shift=None if solver == "shortcut" else shift)  # learnt at the usual one only
            most = max(most, nfe)
            parts.append(x)
            report(nfe * len(part))
        return torch.cat(parts), most

    points = config.dataset in data.POINTS
    fresh = data.points(config.dataset, len(z), data.seed_from(1, data.HELD_OUT, 0)) if points else None
    trials, total = [], 4 * 100  # (solver, steps, tol) each; evaluations, at first those of the fine solution
    if shortcuts:
        for steps in fm.SHORTCUT_STEPS:
            trials.append(("shortcut", steps, None))
            total += steps
    for solver, (_, evaluations) in fm.FIXED_STEP.items():
        for nfe in (4, 8, 16, 32, 64):
            trials.append((solver, nfe // evaluations, None))
            total += nfe
    for tol in (1e-1, 1e-2, 1e-3, 1e-4):
        trials.append(("dopri5", 1, tol))  # comes last, as nobody knows beforehand how many it will take
    report = progress(total * len(z), "evaluations")
    fine, _ = solve_all("rk4", 100, None)
    print("solver    steps or tol   NFE   RMS distance from rk4 in 100 steps" + ("   W2 to data" if points else ""))
    for solver, steps, tol in trials:
        x, nfe = solve_all(solver, steps, tol)
        distance = (x - fine).square().mean().sqrt()
        row = f"{solver:8s} {tol or steps:13g} {nfe:5d} {distance:36.4f}"
        if points:
            row += f"{fm.w2(fresh, x):13.3f}"
        print(row, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Plumbing: flags, labels, checkpoints, devices


def parse_flags(argv):
    parser = argparse.ArgumentParser(description="Draws samples from a trained flow.", allow_abbrev=False)
    parser.error = data.fail
    count, seed = data.number(int), data.number(int, 0, 2**63 - 1)
    parser.add_argument("folder", type=Path, help="what train.py wrote, such as out/faces-32")
    parser.add_argument("--n", type=count, default=64, help="how many samples; with labels, rounded up to whole rows")
    parser.add_argument("--steps", type=count,
                        help="steps of the solver (default: 10; for --bpd, --inpaint, --invert, --paths and GIFs 50; "
                             "with --solver shortcut always 1)")
    parser.add_argument("--solver", default="heun", choices=fm.SOLVERS)
    parser.add_argument("--seed", type=seed, default=0, help="the noise of sample i depends on (seed, i) only")
    parser.add_argument("--tol", type=data.number(float, 1e-6, 1), default=1e-4,
                        help="error that dopri5 allows itself per step")
    parser.add_argument("--shift", type=data.number(float, 1e-3, 1e3),
                        help="more than 1: smaller steps near the noise (default: where training drew most times; for "
                             "--invert 1)")
    parser.add_argument("--label", help="classes or attributes by name or number: a or a,b; or all, a row for each")
    parser.add_argument("--guidance", type=data.number(float, 0, 100), default=1.0,
                        help="how strongly the label pulls; 1: as learnt")
    parser.add_argument("--interval", type=pair_of_times, default=(0.1, 1.0),
                        help="times between which guidance acts: 0.1,1")
    parser.add_argument("--churn", type=data.number(float, 0, 100), default=0.0,
                        help="noise added, and removed, on the way; 0: none")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--interpolate", type=count, help="pictures from each noise to the next")
    modes.add_argument("--from", dest="source", metavar="PICTURE", help="start from this picture with noise added")
    parser.add_argument("--strength", type=data.number(float, 1e-3, 1), default=0.6,
                        help="for --from: how much noise; 1 leaves nothing else")
    modes.add_argument("--inpaint", metavar="PICTURE", help="fill a hole in this picture")
    parser.add_argument("--mask", metavar="PICTURE",
                        help="for --inpaint: white where the hole is, or painted, if the rest is transparent")
    modes.add_argument("--invert", metavar="PICTURE", help="instead: to its noise and back, in --steps of heun")
    modes.add_argument("--paths", action="store_true", help="instead, of points: pairs, velocities and paths")
    modes.add_argument("--sweep", action="store_true", help="instead: a table of error against NFE, all solvers")
    modes.add_argument("--fd", type=data.number(int, 2), help="instead: Fréchet distance of N samples to held-out data")
    parser.add_argument("--judge", type=Path,
                        help="for --fd: the run whose network judges; itself by default. To compare runs, one for all")
    modes.add_argument("--bpd", type=count, help="instead: likelihood of N held-out samples (or all, if fewer)")
    parser.add_argument("--batch", type=count,
                        help="samples that pass the network at once (default: 64; on a CPU, above 64 pixels, 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--columns", type=count, help="pictures in a row (default: a square grid)")
    parser.add_argument("--to", type=Path, help="x.png, x.gif, x.npy or a folder (default: FOLDER/samples.png)")
    args = parser.parse_args(argv)
    if args.steps is None:
        # Ten are enough for pictures, by --fd. What is measured, edited or watched on its way deserves more.
        closer = args.bpd or args.inpaint or args.invert or args.paths or (args.to and args.to.suffix == ".gif")
        args.steps = 50 if closer else 10
        if args.solver == "shortcut":
            args.steps = 1
    if args.fd:
        args.n = args.fd
    check_flags(args)
    return args


def check_flags(args):
    """Refuses flags that contradict each other, whatever the run."""
    if args.interpolate and args.n < 2:
        data.fail("--interpolate needs --n 2 or more noises to go between")
    if bool(args.inpaint) != bool(args.mask):
        data.fail("--inpaint PICTURE and --mask MASK go together")
    if args.judge and not args.fd:
        data.fail("--judge goes with --fd N")
    if args.solver == "shortcut":
        if args.steps not in fm.SHORTCUT_STEPS:
            data.fail(f"--solver shortcut takes --steps {', '.join(str(steps) for steps in fm.SHORTCUT_STEPS)}")
        if args.bpd or args.sweep or args.invert:
            data.fail("--bpd, --sweep and --invert choose their own solvers: leave --solver out")
        if args.shift or args.source:
            data.fail("--solver shortcut works without --shift and --from: it has learnt steps between certain times")
    if args.guidance != 1 and not args.label:
        data.fail("--guidance needs a --label to pull towards")
    if args.guidance != 1 and (args.bpd or args.sweep or args.invert):
        data.fail("--bpd, --sweep and --invert work without --guidance")
    if args.churn and (args.bpd or args.sweep or args.invert or args.inpaint or args.paths):
        data.fail("--bpd, --sweep, --invert, --inpaint and --paths work without --churn")
    if args.label and (args.bpd or args.paths):
        data.fail("--bpd and --paths work without --label")
    if args.to and (args.fd or args.bpd or args.sweep):
        data.fail("--fd, --bpd and --sweep print numbers and write nothing: leave --to out")


def check(args, config, checkpoint, rows, to):
    """Refuses what this run cannot do."""
    if args.solver == "shortcut":
        if not config.shortcut:
            data.fail(f"{args.folder} has not learnt shortcuts: train.py --shortcut does")
        if not has_shortcuts(checkpoint):
            data.fail(f"{args.folder} is from before the cool-down, in which shortcuts are learnt: name the finished "
                      f"run, or finish it: train.py --resume --out {config.out}")
        ts = fm.time_grid(args.steps, usual_shift(config))
        inside = [args.interval[0] <= (s + t) / 2 <= args.interval[1] for s, t in zip(ts, ts[1:])]
        if args.guidance != 1 and not any(inside):
            data.fail(f"--interval: a shortcut counts by its middle, and none of the {args.steps} has it there; take "
                      f"more --steps, or a wider interval")
    if config.drop == 0 and checkpoint["label_names"] and (rows is None or args.guidance != 1):
        data.fail("with --drop 0 no label was ever hidden in training: this network needs a --label, and cannot do "
                  "--guidance or --bpd")
    if (args.bpd or args.sweep) and config.dim > 2:
        data.fail("--bpd and --sweep are for points in their own plane, --dim 2")
    if args.invert and rows is not None and len(rows) > 1:
        data.fail("--invert takes a single --label, the picture's own")
    for source in (args.source, args.inpaint, args.mask, args.invert):
        if source and Path(source).resolve() in (to.resolve(), to.resolve() / Path(source).name):
            data.fail(f"--to {to} would write over {source}, or beside it: name another place")


def has_shortcuts(checkpoint):
    """Has the network learnt any yet? They come with the cool-down, see train.py."""
    config = checkpoint["config"]
    return config.shortcut and checkpoint["step"] > config.steps - int(config.cooldown * config.steps)


def pair_of_times(text):
    """A type for argparse: two times, such as 0.1,1."""
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        low, high = 1, 0
    if not 0 <= low <= high <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be two times, the earlier first, such as 0.1,1")
    return low, high


def check_output(to, config, n):
    """Before any work, refuses a --to that cannot be written. n: how many pictures there will be."""
    endings = [".png", ".gif", ".npy"]
    if config.dataset not in data.POINTS:
        endings.append("")
    if to.suffix not in endings:
        data.fail(f"cannot write {to}: its ending must be .png, .gif, .npy or, for pictures, none (a folder)")
    data.make_folder_for(to)
    if not to.suffix:
        others = {file.name for file in to.glob("[!.]*.png")} - {picture_name(i) for i in range(n)}
        if others:
            data.fail(f"{to}/ holds {len(others)} other pictures, such as {min(others)}, that would stay among the {n} "
                      f"new ones: name an empty or a new folder")


def picture_name(i):
    return f"{i:05d}.png"


def parse_label(text, checkpoint):
    """--label as rows of y, or None without it. Classes: "a,b" is a row for each. Attributes: "a,b" is one row, of
    samples with both. "all" is a row for each class or attribute. A label may also be given by its number, from 0; but
    if the name of any label is a number, only names count."""
    if text is None:
        return None
    names = checkpoint["label_names"]
    numbers = {name: i for i, name in enumerate(names)}
    if not any(name.isdigit() for name in names):
        numbers.update({str(i): i for i in range(len(names))})
    every = text == "all" and text not in numbers and names
    if every:
        words = names
    elif text in numbers:  # a name may have commas
        words = [text]
    else:
        words = [word if word in numbers else word.strip() for word in text.split(",")]
    for word in words:
        if word not in numbers:
            learnt = ", ".join(names) or "no labels; train with --cond all"
            data.fail(f"--label {word}: this network has learnt {learnt}")
    y = torch.tensor([numbers[word] for word in words])
    if not checkpoint["multi_hot"]:
        return y  # (R,)
    rows = torch.nn.functional.one_hot(y, len(names))  # (R, K)
    return rows if every else rows.amax(dim=0, keepdim=True)


def load_data(config, checkpoint=None):
    """What a run learns from: (images, labels, label_names, content). content: a hash of all three. Refuses data that
    are not the checkpoint's."""
    images, labels, label_names, digest = data.load(config.dataset, config.root, config.res)
    images, labels, label_names = data.choose_labels(images, labels, label_names, config.cond)
    content = hashlib.sha256(repr((digest, label_names)).encode() + labels.tobytes()).hexdigest()[:16]
    if checkpoint:
        was = checkpoint["config"].dataset
        same = checkpoint["content"] in (content, None)  # None: an older checkpoint, which does not say
        if checkpoint["n"] != len(images) or not same:
            data.fail(f"{config.dataset} is not what {config.out} has learnt from: pictures or labels differ. Restore "
                      f"the old data, or start anew: train.py --out DIR")
        if was != config.dataset:
            print(f"{config.dataset} holds the same pictures and labels as {was} did")
    return images, labels, label_names, content


# Fields of Config as older checkpoints call them.
RENAMED = {"data": "dataset", "loss": "target", "time": "times", "model": "network"}


def read_checkpoint(file):
    """What train.py saved, on the CPU, with its config as a namespace, and under "network" the network with the
    averaged weights. Refuses other files."""
    if not file.is_file():
        data.fail(f"no checkpoint {file}: train first (python train.py) or name a run's folder (train.py --out DIR)")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["network"] = model.build(**checkpoint["net"])
        checkpoint["network"].load_state_dict(checkpoint["ema"])
        fields = {"dim": 2, "shortcut": False}  # which older ones do not say
        for name, value in checkpoint["config"].items():
            fields[RENAMED.get(name, name)] = value
        checkpoint["config"] = SimpleNamespace(**fields)
        checkpoint.setdefault("multi_hot", fields["dataset"] in ("faces", "celeba"))
        checkpoint.setdefault("content", None)  # older ones do not say
        for key in ("step", "label_names", "log", "n"):
            if key not in checkpoint:
                raise KeyError(key)
    except Exception as error:  # torch.load alone raises half a dozen kinds for a damaged file
        data.fail(f"{file} is not a checkpoint of this program ({error!r:.200})")
    return checkpoint


def processes():
    """(rank, world). torchrun starts several processes (world) and tells each its number (rank), and its number on its
    machine (local rank), through the environment. Without torchrun there is one."""
    number, count = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    address = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT", "").isdigit()
    valid = number.isdigit() and count.isdigit() and int(number) < int(count) and (address or count == "1")
    if not valid:
        data.fail("RANK and WORLD_SIZE are set, but not as torchrun sets them: start several processes by torchrun, or "
                  "type: unset RANK WORLD_SIZE")
    return int(number), int(count)


def start_processes(device_name):
    """Connects this process with the others, and returns its device."""
    rank, world = processes()
    device = pick_device(device_name)
    if rank > 0:  # only the first process prints
        sys.stdout = open(os.devnull, "w")
    if world > 1:
        backend = "gloo"
        if device.type == "cuda":
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        # Hours, because the other processes wait while one packs the dataset.
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    return device


def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))


def meet():
    """Returns when all processes have called it."""
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError:
            sys.exit(1)  # another one has failed, and says why


def leave_processes():
    if dist.is_initialized():
        meet()  # wait for the one that saves: when one process ends by a signal, torchrun ends all
        dist.destroy_process_group()


def pick_device(name):
    """auto: a GPU if there is one."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    devices.append("cpu")
    if name == "auto":
        name = devices[0]
    if name not in devices:
        data.fail(f"no device {name} here; there is: {', '.join(devices)}")
    return torch.device(name)


def has_bf16(device):
    """Does the hardware multiply matrices in bfloat16? Nothing else may ask it, so that tests can answer for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def autocast(device, bf16=True):
    """Runs the network in bfloat16 if the hardware has it. Weights, the state of the ODE and fm.py's arithmetic stay
    float32 (or more)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and has_bf16(device))


if __name__ == "__main__":
    data.run(main)
