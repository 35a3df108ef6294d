"""A checkpoint in, pictures out.

    python sample.py out/faces-32 --n 64 --steps 10 --solver heun --seed 0 --to grid.png

The ending of --to chooses the format: .png a grid (for points a scatter plot), .gif the flow from noise to data, .npy
the raw float32 array (n, C, H, W) or (n, 2), no ending a folder of single PNGs.
"""

import argparse
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

import data
import fm
import model

# ---------------------------------------------------------------------------------------------------------------
# From noise to pictures


def generate(net, config, z, steps, solver="euler", y=None, guidance=1.0, interval=(0.1, 1.0), shift=None, start=0.0,
             inpaint=None, states=None):
    """Follows the flow from z, at time `start` (0: noise), to samples, float32, shaped as z. Returns (samples, NFE).

    config: a run's, of which it reads predict, path, bf16 and how its times were drawn. y: labels, or None. shift: of
    the times, see `usual_shift` for None. inpaint: (picture, hole, new_noise), see `fm.inpaint`. states: a list that
    receives the state after each step.
    """
    y_null = None if y is None else torch.full_like(y, model.HIDDEN)
    path = fm.PATHS[config.path]
    v = fm.velocity(net, config.predict, path, y, y_null, guidance, interval)
    ts = [start + (1 - start) * t for t in fm.time_grid(steps, shift or usual_shift(config))]
    if solver == "dopri5" and inpaint is None:
        ts = [start, start + 0.999 * (1 - start), 1.0]  # between these it chooses its own steps
    end_euler = config.predict == "x" and solver != "shortcut"
    # No bfloat16 with dopri5: it would take the rounding for its own error, and shorten its steps.
    with model.autocast(z.device, config.bf16 and solver != "dopri5"):
        if inpaint is not None:
            return fm.inpaint(v, z, *inpaint, ts, path, fm.SOLVERS[solver], end_euler, states)
        return fm.solve(v, z, ts, fm.SOLVERS[solver], end_euler, states)


def usual_shift(config):
    """The shift that makes steps small where training drew many times. Large pictures are trained at noisy times, and
    one long step finishes, through the late times that the network has hardly seen. The price: it lands on the mean of
    the pictures that fit, without the detail that the noise at its start still hides. With more steps it is shorter."""
    return math.exp(-config.t_mean) if config.times == "logit-normal" else 1.0


def noise(indices, shape, seed):
    """Standard normal noise (len(indices), *shape), on the CPU. That of sample i depends on (seed, i) alone."""
    return noise_source(indices, shape, seed, data.SAMPLE)()


def noise_source(indices, shape, seed, purpose):
    """A function that draws new noise at each call. The sequence that sample i gets depends on (seed, i) alone."""
    generators = [torch.Generator().manual_seed(data.seed_from(seed, purpose, i)) for i in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators])


def shape_of(config):
    """The shape of one sample."""
    if config.data in data.POINTS:
        return (2,)
    return (data.usual_channels(config.data), config.res, config.res)


def draw(x, config, columns=None):
    """Samples as one PIL image: a grid, or for points a scatter plot."""
    if config.data in data.POINTS:
        return data.scatter(x.cpu().numpy())
    return data.grid(data.to_uint8(x), columns)


def draw_samples(net, config, args, n, y, picture, hole, device):
    """Draws n samples, at most --batch at a time, and yields each batch as (indices, samples, states). Of several
    processes each draws its own share of the batches. At the end it prints how it was done, and how fast.

    args: the flags, see `parse_flags`. y: labels, (n,) or (n, K), or None. picture: to start from, or to fill where
    hole is True; or None.
    """
    shares = share(n, args.batch)
    report = data.progress(sum(len(indices) for indices in shares), "samples")
    start = 1 - args.strength if args.source else 0.0
    if args.interpolate:
        on_the_way = between(noise(range(n // args.interpolate), shape_of(config), args.seed), args.interpolate)
    began, nfe = time.perf_counter(), 0
    for indices in shares:
        if args.interpolate:
            z = on_the_way[indices].to(device)
        else:
            z = noise(indices.tolist(), shape_of(config), args.seed).to(device)
        if args.source:
            z = noisy(picture.expand_as(z), z, start, config)
        inpaint = None
        if args.inpaint:
            source = noise_source(indices.tolist(), shape_of(config), args.seed, data.ON_THE_WAY)
            inpaint = picture, hole, lambda: source().to(device)
        states = [z] if args.to.suffix == ".gif" else None
        x, evaluations = generate(net, config, z, args.steps, args.solver, None if y is None else y[indices],
                                  args.guidance, args.interval, args.shift, start, inpaint, states)
        nfe = max(nfe, evaluations)  # dopri5's count differs from batch to batch
        yield indices.tolist(), x.cpu(), states and [state.cpu() for state in states]
        report(len(x))
    how = "dopri5" if args.solver == "dopri5" else f"{args.steps} steps of {args.solver}"
    if shares:  # the first process has the largest share
        rate = n / (time.perf_counter() - began)  # with writing, but for the last batch's
        data.say(f"{n} samples, {how}, NFE {nfe}, {rate:.1f} samples/s")


def share(n, batch):
    """The indices of n samples, in batches, that this process draws."""
    rank, world, _ = model.processes()
    return torch.arange(n).split(batch)[rank::world]


def write(batches, n, config, to, columns=None):
    """Writes n samples to the file or folder `to`, in the format that its ending says. batches: as of `draw_samples`.
    Folders and .npy files are written batch by batch, so their size is not bounded by the memory."""

    def write_picture(i, pixels):
        with data.whole(to / picture_name(i)) as file:
            Image.fromarray(pixels.squeeze()).save(file)

    if not to.suffix:
        with ThreadPoolExecutor() as threads:  # they write while the network draws the next batch
            written = []
            for indices, x, _ in batches:
                list(written)  # waits, so that no more than two batches are in memory; and raises what failed
                written = threads.map(write_picture, indices, data.to_uint8(x))
            list(written)
    elif to.suffix == ".npy":
        with data.whole(to) as file:
            header = dict(descr="<f4", fortran_order=False, shape=(n, *shape_of(config)))
            np.lib.format.write_array_header_1_0(file, header)
            for _, x, _ in batches:
                file.write(x.numpy().tobytes())
    else:
        batches = list(batches)
        with data.whole(to) as file:
            if to.suffix == ".gif":
                flows = zip(*(states for _, _, states in batches))
                data.save_gif(file, [draw(torch.cat(parts), config, columns) for parts in flows])
            else:
                draw(torch.cat([x for _, x, _ in batches]), config, columns).save(file)
    data.say(f"wrote {to}")


def picture_name(i):
    return f"{i:05d}.png"


# ---------------------------------------------------------------------------------------------------------------
# Editing


def between(z, count):
    """`count` noises from each noise to the next, both included, and from the last to the first. They lie on the sphere
    near which the noise of a picture lies: a straight mixture of two would have too small a norm."""
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
    return fm.mix(x, e, torch.full((len(x),), t, device=x.device), fm.PATHS[config.path])


def read_picture(file, config, device):
    """Any picture, prepared as for training, (1, C, H, W) in [-1, 1]."""
    if config.data in data.POINTS:
        raise ValueError(f"{file}: this network draws points, not pictures")
    pixels, notes = readable(file, data.read_picture, config.res, data.usual_channels(config.data))
    data.say(f"{file}:", ", ".join(notes) or "read")
    return data.to_tensor(pixels[None], device)


def read_mask(args, config, device):
    """bool (1, 1, H, W): True in the hole."""
    if readable(args.mask, data.upright_size) != readable(args.inpaint, data.upright_size):
        raise ValueError(f"--mask {args.mask} has not the size of {args.inpaint}: save it at the picture's size")
    return torch.from_numpy(readable(args.mask, data.read_mask, config.res))[None, None].to(device)


def readable(file, read, *sizes):
    try:
        return read(file, *sizes)
    except Exception as error:  # whatever a broken file makes a decoder raise
        raise ValueError(f"cannot read the picture {file}: {error}")


# ---------------------------------------------------------------------------------------------------------------
# A number for quality


def load_judge(run, args, device):
    """(network, config, held-out pictures, training pictures) of the run that judges; the pictures (n, C, H, W), n =
    --fd, of each kind."""
    net, checkpoint = model.load(run)
    n, config = args.fd, moved(checkpoint["config"], args)
    if config.data in data.POINTS:
        raise ValueError(f"--fd is for pictures, and {run} has learnt points, for which training prints W2")
    if config.drop == 0 and checkpoint["label_names"]:
        raise ValueError(f"{run} was trained with --drop 0, so it has never seen a picture without its label, as here: "
                         f"name another run, --judge DIR")
    images, _, _, _ = load_data(config, checkpoint)
    training, held_out = data.split(len(images))
    if n > len(held_out) or len(images) == len(training):
        raise ValueError(f"--fd {n}: {run} has held out only {len(images) - len(training)} pictures to compare with, "
                         f"so ask for no more")
    training = training[data.permutation(len(training), seed=0, epoch=0)]
    fresh, known = (data.to_tensor(images[chosen[:n]], torch.device("cpu")) for chosen in (held_out, training))
    return net.to(device), config, fresh, known


def judge(net, config, fresh, known, drawn, device, batch):
    """Prints how far the features of drawn pictures are from those of held-out ones (fresh): the Fréchet distance, see
    `features`. Beside it stands that of training pictures (known), which is about what a perfect sampler would get."""
    fresh, known, drawn = (features(net, config, x, device, batch) for x in (fresh, known, drawn))
    unit = fresh.std(dim=0).clamp(min=1e-6)  # or the few features with the largest numbers would dominate
    floor, distance = fm.frechet(known / unit, fresh / unit), fm.frechet(drawn / unit, fresh / unit)
    if floor < 1e-6:
        data.fail("the judge has learnt pictures that are all alike: no distance to them means anything")
    data.say(f"Fréchet distance of {len(drawn):,} pictures to as many held-out ones: {distance:.4g}, "
             f"{distance / floor:.3g} times that of training pictures, {floor:.4g}")


def features(net, config, x, device, batch):
    """What the judge's network makes of pictures x, (n, C, H, W): (n, F). It looks at them at time 0.9, through a
    little noise, the same for the i-th picture of every set. Each number that comes out of the middle block (of a UNet:
    half of the way up) becomes two: mean and standard deviation over the tokens."""
    t = 0.9
    layer = net.up2 if config.network == "unet" else net.blocks[(len(net.blocks) - 1) // 2]
    outputs, rows = [], []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    e = noise_source(range(len(x)), x.shape[1:], 0, data.JUDGE)()
    report = data.progress(len(x), "pictures")
    for part in torch.arange(len(x)).split(batch):
        z = noisy(x[part], e[part], t, config).to(device)
        with model.autocast(device, config.bf16):
            net(z, torch.full((len(z),), t, device=device))
        h = outputs.pop().float().cpu()  # (B, N, D)
        if config.network == "unet":
            h = h.flatten(2).transpose(1, 2)  # (B, C, R, R) -> (B, N, C)
        rows.append(torch.cat([h.mean(dim=1), h.std(dim=1, correction=0)], dim=1))  # (B, F)
        report(len(part))
    hook.remove()
    return torch.cat(rows)


def read_folder(folder, n, config):
    """n pictures of a folder, chosen at random but always the same, prepared as for the training of the judge, whose
    config this is."""
    images, _, _, _ = data.load(os.path.abspath(folder), "", config.cache, config.res,
                                channels=data.usual_channels(config.data))
    if len(images) < n:
        raise ValueError(f"--fd {n}: {folder} has only {len(images)} pictures")
    chosen = np.sort(data.permutation(len(images), seed=0, epoch=0)[:n])
    return data.to_tensor(images[chosen], torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------
# Likelihood

T_END = 0.95  # see fm.bits_per_dimension; of 0.93 to 0.98 it gives the default faces the lowest bound


def likelihood(net, config, images, args, device):
    """Prints bits per dimension (pictures) or nats (points) of held-out samples, with the standard error."""
    training, held_out = data.split(len(images))
    x, path = data.to_tensor(images[held_out[: args.bpd]], device), fm.PATHS[config.path]
    source = noise_source(range(len(x)), x.shape[1:], args.seed, data.TRACE)
    e, signs = source().to(device), source().sign().to(device)
    scores, report = [], data.progress(len(x), "samples")
    for part in torch.arange(len(x)).split(args.batch):
        if config.data in data.POINTS:
            # All the way to the data, where an x-prediction divides by 0 unless it is clamped as in training.
            v = fm.velocity(net, config.predict, path, clamp=fm.CLAMP)
            log_p, nfe = fm.log_likelihood(v, x[part], fm.time_grid(args.steps)[::-1])
            scores.append(-log_p)
        else:
            v = fm.velocity(net, config.predict, path)
            bits, nfe = fm.bits_per_dimension(v, x[part], e[part], signs[part], T_END, args.steps, path)
            scores.append(bits)
        report(len(part))
    scores = torch.cat(scores)
    error = scores.std(correction=min(1, len(scores) - 1)) / math.sqrt(len(scores))
    unit = "nats" if config.data in data.POINTS else "bits per dimension at most"
    which = "training (too few to hold any out)" if len(training) == len(images) else "held-out"
    data.say(f"{scores.mean():.3f} +- {error:.3f} {unit} on {len(scores)} {which} samples, {args.steps} steps of rk4, "
             f"NFE {nfe}")


# ---------------------------------------------------------------------------------------------------------------
# Data, labels, and the command line


def moved(config, args):
    """config, but --data, --root and --cache, where given, replace what training stored."""
    given = {field: getattr(args, field) for field in ("data", "root", "cache") if getattr(args, field)}
    return SimpleNamespace(**{**vars(config), **given})


def load_data(config, checkpoint=None):
    """What a run learns from, see `data.load`. Refuses data that are not the checkpoint's."""
    images, labels, label_names, content = data.load(config.data, config.root, config.cache, config.res, config.cond)
    if checkpoint and content != checkpoint["content"]:
        raise ValueError(f"--data {config.data} is not what {config.out} has learnt from: names, sizes or labels "
                         f"differ. Restore the old data, name their place by --data, or start anew: train.py --out "
                         f"DIR")
    return images, labels, label_names, content


def parse_label(text, checkpoint):
    """--label as rows of y, or None without it. Classes: "a,b" is a row for each. Attributes: "a,b" is one row, of
    samples with both. "all" is a row for each class or attribute."""
    if text is None:
        return None
    names = checkpoint["label_names"]
    chosen = names if text == "all" else [data.composed(name.strip()) for name in text.split(",")]
    for name in chosen or ["all"]:  # without labels there is no all
        if name not in names:
            learnt = ", ".join(names) or "no labels; train with --cond all"
            raise ValueError(f"--label {name}: this network has learnt {learnt}")
    y = torch.tensor([names.index(name) for name in chosen])
    if not checkpoint["multi_hot"]:
        return y  # (R,)
    rows = torch.nn.functional.one_hot(y, len(names))  # (R, K)
    return rows if text == "all" else rows.amax(dim=0, keepdim=True)


COMPILE_FROM = 10_000  # samples; 32-pixel pictures win the half minute of compiling back with some 5,000


def main(argv=None):
    args = parse_flags(argv)
    picture = hole = y = None
    with data.refusing():
        rank, world, _ = model.processes()
        if rank > 0:  # only the first process prints
            data.silence()
        device = model.pick_device(args.device)
        if args.fd:
            referee = load_judge(args.judge or args.folder, args, device)
            if args.judge and args.folder.is_dir() and not (args.folder / "ckpt.pt").exists():
                return judge(*referee, read_folder(args.folder, args.fd, referee[1]), device, args.batch or 64)
        net, checkpoint = model.load(args.folder)
        net, config = net.to(device), checkpoint["config"]
        rows = parse_label(args.label, checkpoint)
        check(args, checkpoint, rows, world)
        if args.to is None:
            args.to = (args.folder if args.folder.is_dir() else args.folder.parent) / "samples.png"
        # On a CPU, large pictures are as fast in small batches, and their progress shows earlier.
        args.batch = args.batch or (16 if config.res > 64 and device.type == "cpu" else 64)
        if args.bpd:
            images, _, _, _ = load_data(moved(config, args), checkpoint)
        if args.source or args.inpaint:
            picture = read_picture(args.source or args.inpaint, config, device)
        if args.inpaint:
            hole = read_mask(args, config, device)
    if config.network == "mlp" and device.type == "cpu":
        torch.set_num_threads(1)  # layers of microseconds are slower when threads share them
    if args.bpd:
        return likelihood(net, config, images, args, device)

    n, columns = args.n, args.columns
    if rows is not None:  # the same number of samples for each row of labels
        n = math.ceil(n / len(rows)) * len(rows)
        y = rows.repeat_interleave(n // len(rows), 0).to(device)
        if len(rows) > 1:
            columns = columns or n // len(rows)
    if args.interpolate:
        n, y = n * args.interpolate, None if y is None else y.repeat_interleave(args.interpolate, 0)
        columns = args.columns or args.interpolate  # a row from each noise to the next
    if n >= COMPILE_FROM and model.compiles_well(config, device):
        data.say("with so many samples compiling pays; it takes a while")
        net = data.with_fallback(torch.compile(net), net)
    batches = draw_samples(net, config, args, n, y, picture, hole, device)
    if not args.fd:
        with data.refusing():
            check_output(args.to, config, n, args.batch)
        return write(batches, n, config, args.to, columns)
    wanted, drawn = tuple(referee[2].shape), (n, *shape_of(config))
    if wanted != drawn:
        data.fail(f"--fd {args.fd}: the judge knows pictures of shape {wanted}, and {args.folder} draws {drawn}: take "
                  f"a judge of their size, and a multiple of the number of rows of --label")
    x = torch.cat([x for _, x, _ in batches])
    judge(*referee, data.to_tensor(data.to_uint8(x), x.device), device, args.batch)  # rounded, as it would be written


def parse_flags(argv):
    parser = argparse.ArgumentParser(description="Draws samples from a trained flow.", allow_abbrev=False)
    parser.error = data.fail
    file = lambda text: Path(data.as_path(text))
    parser.add_argument("folder", type=file, help="what train.py wrote, such as out/faces-32")
    count, number = data.number(int), data.number
    for name, kind, usual, what in (
        ("--n", count, 64, "how many samples; with labels, rounded up to whole rows"),
        ("--steps", count, None,
         "of the solver (default: 10; for --bpd, --inpaint and GIFs 50; for shortcuts 1); dopri5 chooses its own"),
        ("--seed", number(int, 0, 2**63 - 1), 0, "the noise of sample i depends on (seed, i) only"),
        ("--shift", number(float, 1e-3, 1e3), None,
         "more than 1: smaller steps near the noise (default: where training drew most times)"),
        ("--label", str, None, "classes or attributes by name: a or a,b; or all, a row for each"),
        ("--guidance", number(float, 0, 100), 1.0, "how strongly the label pulls; 1: as learnt"),
        ("--strength", number(float, 1e-3, 1), 0.6, "for --from: how much noise; 1 leaves nothing else"),
        ("--mask", file, None, "for --inpaint: white where the hole is"),
        ("--judge", file, None, "for --fd: the run whose network judges (itself by default); to compare, one for all"),
        ("--batch", count, None, "samples that pass the network at once (default: 64; on a CPU, above 64 pixels, 16)"),
        ("--device", str, "auto", "auto, cpu, cuda or mps"),
        ("--columns", count, None, "pictures in a row (default: a square grid)"),
        ("--to", file, None, "x.png, x.gif, x.npy or a folder (default: FOLDER/samples.png)"),
        ("--data", data.as_dataset, None, "for --fd and --bpd: where the data lie, if not where they lay in training"),
        ("--root", data.as_absolute, None, "the same for datasets by name"),
        ("--cache", data.as_path, None, "where packed arrays are kept"),
    ):
        parser.add_argument(name, type=kind, default=usual, help=what)
    parser.add_argument("--solver", default="heun", choices=fm.SOLVERS)
    parser.add_argument("--interval", type=number(float, 0, 1), nargs=2, default=(0.1, 1.0),
                        help="times between which guidance acts: 0.1 1")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--interpolate", type=count, help="pictures from each noise to the next")
    modes.add_argument("--from", type=file, dest="source", help="start from this picture with noise added")
    modes.add_argument("--inpaint", type=file,
                       help="fill a hole in this picture; with its 50 steps it takes 26 times as long as a sample")
    modes.add_argument("--fd", type=number(int, 2), metavar="N",
                       help="instead: Fréchet distance of N samples to as many held-out ones")
    modes.add_argument("--bpd", type=count, metavar="N", help="instead: likelihood of N held-out samples")
    args = parser.parse_args(argv)
    if args.steps is None:
        # Ten are enough for pictures, by --fd. A likelihood, a filled hole and a film deserve more.
        closer = args.bpd or args.inpaint or (args.to and args.to.suffix == ".gif")
        args.steps = 1 if args.solver == "shortcut" and not args.bpd else 50 if closer else 10
    args.n = args.fd or args.n
    if args.judge and not args.fd:
        parser.error("--judge goes with --fd N")
    if args.to and (args.fd or args.bpd):
        parser.error("--fd and --bpd print a number and write no pictures: leave --to out")
    if (args.data or args.root or args.cache) and not (args.fd or args.bpd):
        parser.error("--data, --root and --cache go with --fd or --bpd, which look at the data")
    return args


def check(args, checkpoint, rows, world):
    """Refuses what would give a wrong result, or fail after the work."""
    config = checkpoint["config"]
    if args.guidance != 1 and not args.label:
        raise ValueError("--guidance needs a --label to pull towards")
    if args.bpd and args.label:
        raise ValueError("--bpd is the likelihood without labels: leave --label out")
    if args.interval[0] > args.interval[1]:
        raise ValueError(f"--interval {args.interval[0]} {args.interval[1]}: the earlier time comes first")
    if config.drop == 0 and checkpoint["label_names"] and (rows is None or args.guidance != 1):
        raise ValueError("with --drop 0 no label was ever hidden in training: this network needs a --label, and cannot "
                         "do --guidance or --bpd")
    if args.interpolate and args.n < 2:
        raise ValueError("--interpolate needs --n 2 or more noises to go between")
    if bool(args.inpaint) != bool(args.mask):
        raise ValueError("--inpaint PICTURE and --mask MASK go together")
    if args.inpaint and args.steps == 1:
        raise ValueError("--inpaint needs --steps 2 or more: in one step the hole would not see the picture")
    if world > 1 and (args.fd or args.bpd or not args.to or args.to.suffix):
        raise ValueError("several processes share out samples to a folder, --to FOLDER; all else is for one")
    if args.solver == "shortcut":
        if args.steps not in fm.SHORTCUT_STEPS:
            raise ValueError(f"--solver shortcut takes --steps {', '.join(str(steps) for steps in fm.SHORTCUT_STEPS)}")
        if args.shift or args.source:
            raise ValueError("--solver shortcut has learnt steps between certain times: leave --shift and --from out")
        if not config.shortcut or checkpoint["step"] <= config.steps - int(config.cooldown * config.steps):
            raise ValueError(f"{args.folder} has not learnt shortcuts (train.py --shortcut does, in its cool-down)")
    for source in (args.source, args.inpaint, args.mask):
        if source and args.to and source.resolve() in (args.to.resolve(), args.to.resolve() / source.name):
            raise ValueError(f"--to {args.to} would write over {source}, or beside it: name another place")


def check_output(to, config, n, batch):
    """Before the work, refuses a --to that cannot be written. n: how many pictures there will be, by all processes."""
    endings = (".png", ".gif", ".npy") if config.data in data.POINTS else (".png", ".gif", ".npy", "")
    if to.suffix not in endings:
        raise ValueError(f"cannot write {to}: its ending must be .png, .gif, .npy or, for pictures, none (a folder)")
    if to.suffix and to.is_dir():
        raise ValueError(f"cannot write {to}: there is a folder of that name")
    if len(os.fsencode(to.name)) > 255:
        raise ValueError(f"cannot write {to}: the name is too long")
    data.check_outside(config.data, to, "another --to")
    data.check_writable(to.parent if to.suffix else to, "another --to")
    if not to.suffix:
        others = {file.name for file in to.glob("[!.]*")}
        mine = [i for indices in share(n, batch) for i in indices.tolist()]
        others -= {picture_name(i) for i in {*range(n)} - {*mine}}  # another process may have drawn them just now
        if others:
            raise ValueError(f"{to}/ holds {len(others)} files already, such as {min(others)}: name an empty or a new "
                             f"folder")


if __name__ == "__main__":
    data.run(main)
