"""Trains a flow: noise in, pictures out.

    python train.py                                                cartoon faces, a few minutes on a laptop's CPU
    python train.py --data moons --ot                              points in the plane, seconds
    python train.py --data celeba --res 256                        the real job, on a GPU
    torchrun --nproc_per_node=8 train.py --data celeba --res 256   on eight

Config below says what a run does. What it leaves behind is in out/faces-32, out/moons, ...
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import math
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

import data
import fm
import model
import sample


def flag(default, help, choices=None, low=None, high=None, name=None):
    """A field of Config and its flag on the command line: --ot-block for the field ot_block, unless `name` is given."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high, name=name))


@dataclasses.dataclass
class Config:
    """Every setting of a run. These defaults are tuned for some minutes of cartoon faces on two CPU cores; `preset` has
    those for other data and sizes."""

    # the data
    dataset: str = flag("faces", "faces, celeba, mnist, fashion, cifar10, moons, 8gaussians, checkerboard, spirals, or "
                                 "the path of a folder or zip of pictures", name="--data")
    res: int = flag(32, "pixels a side; pictures are cropped to the centre square and resized", low=8, high=10**4)
    dim: int = flag(2, "for points: the plane that they are in lies in a space of so many dimensions", low=2, high=4096)
    root: str = flag("data", "where datasets are looked for, and packed arrays kept (in cache/)")
    flip: bool = flag(True, "mirror half of the pictures, at random")
    cond: str = flag("", "labels to learn: all, or some attributes by name (Smiling,Male); by default none")
    drop: float = flag(0.1, "fraction of samples whose labels are hidden; guidance needs some", high=1)
    download: bool = flag(False, "fetch mnist, fashion or cifar10 into --root first, if it is not there")
    # the flow
    predict: str = flag("x", "what the network predicts", choices=("x", "e", "v"))
    target: str = flag("v", "what the squared error compares (for shortcuts: what is predicted)",
                       choices=("x", "e", "v"))
    path: str = flag("linear", "how data and noise are mixed", choices=tuple(fm.PATHS))
    times: str = flag("logit-normal", "distribution of the training times", choices=tuple(fm.TIMES))
    t_mean: float = flag(-0.5, "mean of logit(t), lower for larger pictures", low=-10, high=10)
    ot: bool = flag(False, "pair noise with data by optimal transport")
    ot_block: int = flag(64, "pair in groups of this many: the cost grows as n^3, and larger groups gain little")
    cover: float = flag(0.0, "fraction of the times drawn uniformly, to see rare ones; the loss is reweighted", high=1)
    jitter: float = flag(0.0, "standard deviation of extra noise on the network's input")
    shortcut: bool = flag(False, "learn samples in one step, too; twice the steps, and a longer cool-down")
    # the network
    network: str = flag("transformer", "transformer, unet or mlp", choices=tuple(model.NETWORKS))
    patch: int = flag(4, "pixels a side of a patch")
    stride: int = flag(4, "pixels from one patch to the next; below --patch they overlap")
    width: int = flag(128, "numbers per token (transformer), channels at full resolution (unet), or per layer (mlp)")
    depth: int = flag(4, "blocks (transformer), per resolution, down and again up (unet), or layers (mlp)")
    heads: int = flag(4, "attention heads")
    norm: str = flag("rms", "normalisation in the transformer", choices=tuple(model.NORMS))
    attention: str = flag("auto", "fused (torch's), hand (written out), or auto: the faster one",
                          choices=tuple(model.ATTENTION))
    # optimisation
    optimizer: str = flag("muon", "muon (for the matrices in the transformer's blocks; AdamW for the rest) or adamw",
                          choices=("muon", "adamw"))
    steps: int = flag(1000, "gradient steps")
    batch: int = flag(32, "samples a step, over all processes together")
    lr: float = flag(3e-3, "peak learning rate", low=1e-9)
    warmup: int = flag(30, "steps of linear warm-up", low=0)
    cooldown: float = flag(0.4, "last fraction of the steps, in which the rate falls linearly towards zero", high=1)
    decay: float = flag(0.0, "weight decay")
    clip: float = flag(1.0, "gradients of a larger norm are scaled down to this one", low=1e-9)
    ema: float = flag(0.98, "decay of the averaged weights, the ones to sample from", high=1)
    # the run
    preset: str = flag("auto", "above 32 pixels: laptop (small networks), gpu (the papers'), or auto (gpu if CUDA)",
                       choices=("auto", "laptop", "gpu"))
    seed: int = flag(0, "of weights, batches, noise and times; what is held out is always the same", low=0,
                     high=2**63 - 1)
    device: str = flag("auto", "auto, cpu, cuda or mps")
    bf16: bool = flag(True, "multiply matrices in bfloat16, where the hardware does")
    compile: bool = flag(None, "torch.compile; by default on CUDA, where it pays at once")
    out: str = flag("", "where results go; by default out/<data>-<res>")
    report: int = flag(20, "steps between lines of progress")
    preview: int = flag(250, "steps between previews, held-out losses and checkpoints")


# ---------------------------------------------------------------------------------------------------------------
# A training step: what goes in, the loss, the update


def draw_batch(config, images, labels, step, rank, world, device):
    """What goes into a step, the same each time for the same seed, step and process: x, e, t, y, jitter (or None) and
    shortcuts (or None). Shortcuts are learnt in the cool-down, by half of the samples: t and jitter are then for the
    first half of x, e and y, and shortcuts for the second.

    images, labels: the arrays of the dataset, see `data.load`. rank: which of the processes this is; world: how many
    there are (1 without torchrun). Each draws its own share of the batch.
    """
    n = config.batch // world
    g = torch.Generator(device).manual_seed(data.seed_from(config.seed, data.BATCH, step, rank))
    training, _ = data.split(len(images))
    indices = training[data.batch_indices(len(training), config.batch, step, config.seed)]
    mine = indices[rank * n : (rank + 1) * n]
    x, y = data.to_tensor(images[mine], device), data.send(labels[mine], device)
    if x.dim() == 2:
        x = data.bury(x, config.dim)
    elif config.flip:
        coin = torch.rand(n, 1, 1, 1, generator=g, device=device)
        x = torch.where(coin < 0.5, x, x.flip(3))
    e = torch.randn(x.shape, generator=g, device=device)
    if config.ot:
        e = fm.ot_pair(x, e, config.ot_block)
    t = fm.sample_t(n, config.times, config.t_mean, config.cover, g, device)
    y = model.hide(y, torch.rand(n, generator=g, device=device) < config.drop)  # a coin for each sample
    jitter = config.jitter * torch.randn(x.shape, generator=g, device=device) if config.jitter else None
    shortcuts = None
    if config.shortcut and step >= cooldown_start(config):
        shortcuts = fm.sample_shortcuts(n // 2, sample.usual_shift(config), g, device)
        t = t[: n - n // 2]
        if config.jitter:
            jitter = jitter[: len(t)]
    return x, e, t, y, jitter, shortcuts


def train_step(config, step, net, ema, optimizers, batch):
    """The loss and the update. Returns the flow's loss as a tensor, since .item() would make the CPU wait for a GPU."""
    x, e, t, y, jitter, shortcuts = batch
    path, n = fm.PATHS[config.path], len(t)  # n of the samples learn the flow, the others shortcuts
    with sample.autocast(x.device, config.bf16):
        losses = fm.loss(net, x[:n], e[:n], t, y[:n], config.predict, config.target, path, jitter)
        if shortcuts is not None:
            shortcut_losses = fm.shortcut_loss(net, ema, x[n:], e[n:], *shortcuts, y[n:], config.predict, path)
    if config.cover:
        losses = losses * fm.importance(t, config.times, config.t_mean, config.cover)
    flow_loss = loss = losses.mean()
    if shortcuts is not None:
        loss = (flow_loss + shortcut_losses.mean()) / 2

    net.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), config.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
            group["weight_decay"] = config.decay
        optimizer.step()

    # Weights averaged over the last 1 / (1 - ema) steps give better samples than the latest ones. Early in the run the
    # average reaches less far back, so that the random weights of the start are soon forgotten.
    keep = min(config.ema, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - keep)
    return flow_loss.detach()


# ---------------------------------------------------------------------------------------------------------------
# The run


def train(config, checkpoint, rank, world, device):
    """The loop. Goes on from a checkpoint, or starts anew if that is None. Returns the averaged network."""
    images, labels, label_names, content = load_dataset(config, checkpoint, world)
    if len(images) < 500:
        print("so few will be learnt by heart: expect samples that are nearly copies of them")
    net, ema, optimizers, sizes = build_networks(config, checkpoint, len(label_names), device, world)
    fast, fast_ema = wrap(net, config, world, device), wrap(ema, config, 1, device)  # each process has its own average
    out = Path(config.out)
    if rank == 0:
        prepare_folder(out, checkpoint)
    first, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    # What goes into every checkpoint. `log` is the list to which the loop appends, so each one holds all rows so far.
    about = dict(config=vars(config), net=sizes, label_names=label_names, multi_hot=labels.ndim == 2, n=len(images),
                 content=content, log=log)
    signals = note_signals()
    began = clock = time.perf_counter()
    reported, total = first, torch.zeros((), device=device)

    for step in range(first, config.steps):
        if rank == 0 and step == cooldown_start(config):
            save(out / "stable.pt", about, step, net, ema, optimizers)
        batch = draw_batch(config, images, labels, step, rank, world, device)
        total += train_step(config, step, fast, fast_ema, optimizers, batch)
        done = step + 1
        stop = stop_signal(signals, world)
        # Asked to stop, it saves at once, without the slower held-out loss and preview.
        milestone = done == config.steps or (done % config.preview == 0 and not stop)
        if rank == 0 and (milestone or stop or done % config.report == 0 or done == first + 3):  # an ETA at once
            # .item() makes the CPU wait for the device, so it is called rarely.
            loss = total.item() / (done - reported)  # of this process's share of the batch
            rate = (done - reported) * config.batch / (time.perf_counter() - clock)
            row = report(config, step, loss, rate)
            if done == first + 3:
                print(f"each of {len(images):,} samples is seen every {timedelta(seconds=round(len(images) / rate))}, "
                      f"{config.steps * config.batch / len(images):.1f} times in all", flush=True)
            if milestone:
                row.update(held_out(ema, config, images, labels, device))
                print(f"held-out loss {row['held_out']:.4f}", flush=True)
            log.append(row)
            if not np.isfinite(list(row.values())).all():
                data.fail(f"the loss is no longer finite at step {done}; try a lower --lr", status=1)
            if milestone or stop:
                save(out / "ckpt.pt", about, done, net, ema, optimizers)
                write_log(out, log)
            if milestone:
                preview(ema, config, images, labels, device, done).save(out / "samples" / f"{done:06d}.png")
            total.zero_()
            reported, clock = done, time.perf_counter()
        if stop:
            break

    sample.leave_processes()
    heed_signals()  # all is saved: what comes now may be cut short
    if done < config.steps:
        print(f"stopped after step {done:,} and saved; the same command with --resume goes on")
        sys.exit(128 + stop)
    print(f"{time.perf_counter() - began:.0f} s; weights, log and pictures are in {out}/")
    if rank == 0 and config.dataset in data.POINTS:
        measure_points(ema, config, device)
    return ema


def build_networks(config, checkpoint, label_count, device, world):
    """The network, its average, the optimizers, and the sizes from which a checkpoint rebuilds the network."""
    torch.manual_seed(config.seed)
    sizes = network_sizes(config, label_count)
    net = model.build(**sizes).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizers = make_optimizers(net, config)
    if checkpoint:
        net.load_state_dict(checkpoint["weights"])
        ema.load_state_dict(checkpoint["ema"])
        for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
            optimizer.load_state_dict(state)
    count = sum(w.numel() for w in net.parameters())
    print(f"{count / 1e6:.2f}M parameters on {world} x {device.type}", flush=True)
    return net, ema, optimizers, sizes


def network_sizes(config, label_count):
    """What `model.build` needs: the fields of Config that the chosen network has."""
    if config.network == "mlp":
        return dict(kind="mlp", dim=config.dim, width=config.width, depth=config.depth, shortcut=config.shortcut)
    sizes = dict(kind=config.network, res=config.res, channels=data.channels(config.dataset), width=config.width,
                 depth=config.depth, heads=config.heads, attention=config.attention, labels=label_count,
                 shortcut=config.shortcut)
    if config.network == "transformer":
        sizes.update(patch=config.patch, stride=config.stride, norm=config.norm)
    return sizes


def make_optimizers(net, config):
    """AdamW for all weights; or Muon for the matrices inside the blocks and AdamW for the rest. `train_step` sets their
    learning rate and weight decay."""
    weights = dict(net.named_parameters())
    matrices = []
    if config.optimizer == "muon":
        for name in block_matrices(net):
            matrices.append(weights.pop(name))
    optimizers = [torch.optim.AdamW(weights.values(), betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, config.bf16 and sample.has_bf16(matrices[0].device)))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Moves a matrix against the orthogonal matrix nearest to its averaged gradient, so that all its directions learn
    at one pace (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Its steps are scaled to the size of
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both. In short runs it needs about half of
    AdamW's steps. torch.optim.Muon does the same, but always in bfloat16: seconds a step on a CPU without it.

    bf16: multiply in bfloat16; the average and the weights stay float32.
    """

    def __init__(self, matrices, bf16):
        super().__init__(matrices, dict(lr=0.0, weight_decay=0.0))
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape are multiplied as one stack: a few large products instead of many small ones.
            same_shape = defaultdict(list)
            for w in group["params"]:
                same_shape[w.shape].append(w)
            for (rows, columns), matrices in same_shape.items():
                directions = []
                for w in matrices:
                    state = self.state[w]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(w)
                    average = state["momentum_buffer"].lerp_(w.grad, 0.05)
                    # Nesterov: 0.05 grad + 0.95 average. The average holds the latest gradient already, so that one
                    # counts about twice as much.
                    directions.append(w.grad.lerp(average, 0.95))
                updates = nearest_orthogonal(torch.stack(directions).to(self.dtype)).float()
                torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(matrices, list(updates), alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)


def nearest_orthogonal(g, rounds=3):
    """Approximates U V^T for each matrix g = U S V^T of a stack, (K, rows, columns). Each round takes a singular value
    s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which brings all but the smallest between 0.7 and 1.2 within a few rounds.
    For the default faces three are as good as Jordan's five."""
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g  # now x x^T is smaller than x^T x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above 1; the first gradients are all 0
    for _ in range(rounds):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # -4.7750 gram + 2.0315 gram gram
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)  # 3.4445 x + polynomial x
    return x.mT if tall else x


def block_matrices(net):
    """Names of the matrices in net.blocks that act on tokens, so not the modulation's; empty if it has no blocks."""
    names = []
    for name, w in net.named_parameters():
        if name.startswith("blocks.") and w.ndim == 2 and "modulation" not in name:
            names.append(name)
    return names


def cooldown_start(config):
    return config.steps - int(config.cooldown * config.steps)


def learning_rate(config, step):
    """Linear warm-up, constant, linear cool-down."""
    up = min(1, (step + 1) / (config.warmup + 1))
    down = min(1, (config.steps - step) / (config.steps - cooldown_start(config) + 1))
    return config.lr * up * down


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind

PREVIEW_PICTURES, PREVIEW_STEPS, HELD_OUT_PICTURES = 16, 20, 200


def report(config, step, loss, rate):
    """Prints a line of progress, and returns it as a row of the log. rate: samples per second."""
    done = step + 1
    left = timedelta(seconds=round((config.steps - done) * config.batch / rate))
    print(f"step {done:>6,}/{config.steps:,}  loss {loss:.4f}  {rate:,.0f} samples/s  ETA {left}", flush=True)
    return {"step": done, "loss": loss, "lr": learning_rate(config, step), "samples_s": rate}


@torch.no_grad()
def held_out(net, config, images, labels, device):
    """The loss on held-out data: {"held_out": mean, "t0": first tenth of the times, ..., "t9": last tenth}.

    The data, the noise and the times are the same each time. All times count the same, unlike in training, where (if
    logit-normal) most are drawn near the mean: so this number is not the training loss, however well a run generalises.
    """
    n = 1000 if config.dataset in data.POINTS else HELD_OUT_PICTURES
    chosen = np.resize(data.split(len(images))[1], n)  # repeats a small dataset's samples
    x = data.to_tensor(images[chosen], device)
    if x.dim() == 2:
        x = data.bury(x, config.dim)
    y = data.send(labels[chosen], device)
    g = torch.Generator().manual_seed(data.seed_from(0, data.HELD_OUT, 1))
    e = torch.randn(x.shape, generator=g).to(device)
    t = (torch.arange(n, device=device) + 0.5) / n
    losses = []
    for part in torch.arange(n).split(50):
        with sample.autocast(device, config.bf16):
            losses.append(fm.loss(net, x[part], e[part], t[part], y[part], config.predict, config.target,
                                  fm.PATHS[config.path]))
    bins = torch.cat(losses).view(10, n // 10).mean(1).tolist()
    row = {"held_out": sum(bins) / 10}
    for i, loss in enumerate(bins):
        row[f"t{i}"] = loss
    return row


def preview(ema, config, images, labels, device, done):
    """A picture of samples, always from the same noise and held-out labels, so that previews can be compared. Once
    shortcuts are learnt, pictures have a second row: what one step makes of the same noise."""
    n = 2000 if config.dataset in data.POINTS else PREVIEW_PICTURES
    chosen = np.resize(data.split(len(images))[1], n)
    y = data.send(labels[chosen], device)
    e = sample.noise(range(n), sample.shape_of(config), seed=0).to(device)
    x, _ = sample.generate(ema, config, e, PREVIEW_STEPS, y=y)
    if not config.shortcut or done <= cooldown_start(config) or config.dataset in data.POINTS:
        return sample.draw(x, config)
    in_one_step, _ = sample.generate(ema, config, e, 1, "shortcut", y=y)
    return sample.draw(torch.cat([x, in_one_step]), config, columns=n)


def save(file, about, step, net, ema, optimizers):
    """Writes a checkpoint, whole or not at all: a kill or a full disk leaves the old one. Refuses broken weights."""
    weights = net.state_dict()
    if not all(w.isfinite().all() for w in weights.values()):
        data.fail(f"the weights are no longer finite and were not saved to {file}; try a lower --lr", status=1)
    states = [optimizer.state_dict() for optimizer in optimizers]
    checkpoint = {**about, "step": step, "weights": weights, "ema": ema.state_dict(), "optimizers": states}
    part = file.with_suffix(".part")
    try:
        with open(part, "wb") as out:
            torch.save(checkpoint, out)
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        data.fail(f"could not write {file} ({error}); what was there before is untouched", status=1)


COLUMNS = ["step", "loss", "lr", "samples_s", "held_out", *(f"t{i}" for i in range(10))]


def write_log(out, log):
    """Rewrites log.csv and its picture from all rows. What a kill left half-written is written whole the next time."""
    with open(out / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(log)
    curves = {}
    for name, column in (("training loss", "loss"), ("held-out loss, all t alike", "held_out")):
        rows = [row for row in log if column in row]
        if rows:
            curves[name] = [row["step"] for row in rows], [row[column] for row in rows]
    data.plot(curves, "step").save(out / "loss.png")


def measure_points(ema, config, device):
    """Prints, and writes to w2.csv, how far samples are from fresh data, by the number of Euler steps: exact W2 on
    2,048 points. If paths are straight, few steps already come close. Perfect samples would score about what other
    fresh data do."""
    distances = wasserstein(ema, config, device)
    with open(Path(config.out) / "w2.csv", "w") as file:
        file.write("euler_steps,w2\n")  # 0 steps: data against data
        for steps, distance in distances.items():
            file.write(f"{steps},{distance:g}\n")
    data_to_data = distances.pop(0)
    by_steps = "  ".join(f"{steps}: {distance:.3f}" for steps, distance in distances.items())
    print(f"W2 to the data, by Euler steps: {by_steps}  (data against data: {data_to_data:.3f})")


def wasserstein(ema, config, device):
    """{Euler steps: W2}; 0 stands for data against data."""
    fresh = data.points(config.dataset, 2048, data.seed_from(1, data.HELD_OUT, 0))
    clouds = {0: data.points(config.dataset, 2048, data.seed_from(1, data.HELD_OUT, 1))}
    e = sample.noise(range(2048), sample.shape_of(config), seed=1).to(device)
    for steps in (1, 2, 4, 10, 100):
        x, _ = sample.generate(ema, config, e, steps)
        clouds[steps] = data.dig(x).cpu()
    with ThreadPoolExecutor() as pool:  # scipy's assignment releases the GIL
        distances = pool.map(fm.w2, [fresh] * len(clouds), clouds.values())
    return dict(zip(clouds, distances))


# ---------------------------------------------------------------------------------------------------------------
# Plumbing: skip this at first. The command line, presets, resuming, several processes, --bench.


def main(argv=None):
    """Trains, or times (--bench), as the command line says; returns the averaged network."""
    given, resume, bench_only = parse_flags(argv)
    if resume:
        checkpoint, config = resume_from(given)
    else:
        checkpoint, config = None, resolve(given)
    check(config, given)
    rank, world, device = start_processes(config)
    print(*(f"{field}={value}" for field, value in vars(config).items()))
    if bench_only:
        return bench(config, checkpoint, rank, world, device)
    return train(config, checkpoint, rank, world, device)


def flag_of(field):
    return field.metadata["name"] or "--" + field.name.replace("_", "-")


def parse_flags(argv):
    """Command line -> (the given fields of Config, resume, bench)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="In brackets: defaults for faces at 32 pixels. Every run prints its own.")
    parser.error = data.fail
    flags = ["--help", "--resume", "--bench"]
    for field in dataclasses.fields(Config):
        about = field.metadata
        how = dict(dest=field.name, help=f"{about['help']} [{field.default}]".replace("%", "%%"))
        if field.type is bool:
            how.update(action=argparse.BooleanOptionalAction)
        elif field.type is str:
            how.update(choices=about["choices"], metavar=field.name.upper())
        else:
            how.update(type=data.number(field.type, about["low"], about["high"]), metavar=field.name.upper())
        parser.add_argument(flag_of(field), **how)
        flags.append(flag_of(field))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--bench", action="store_true", help="time the training step instead of training")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        nearest = difflib.get_close_matches(name, flags, n=1) or ["--help"]
        guess = sample.RENAMED.get(name.lstrip("-"), nearest[0].lstrip("-"))
        data.fail(f"no flag {unknown[0]}; did you mean --{guess}?")
    given = vars(args)
    resume, bench_only = given.pop("resume", False), given.pop("bench", False)
    return given, resume, bench_only


def resolve(given):
    """Config's defaults, overridden by the preset, by what --shortcut needs, and by the given fields."""
    name = given.get("dataset", Config.dataset)
    res = given.get("res", data.usual_res(name))
    size = given.get("preset", "auto")
    if size == "auto":
        size = "gpu" if sample.pick_device(given.get("device", "auto")).type == "cuda" else "laptop"
    fields = {"res": res, **preset(name, res, size, given.get("network"))}
    if given.get("shortcut"):
        # There is more to learn, and shortcuts are learnt while the rate falls.
        fields.update(steps=2 * fields.get("steps", Config.steps), cooldown=0.6)
    config = Config(**{**fields, **given, "preset": size})
    config.out = config.out or str(data.run_folder(name, res))
    return config


def preset(name, res, size, network=None):
    """The fields that differ from Config's defaults. size: laptop or gpu. network: the one that the user asks for, if
    any."""
    if name in data.POINTS:
        return dict(network="mlp", width=64, predict="v", times="uniform", t_mean=0.0, optimizer="adamw", steps=3000,
                    batch=256, lr=2e-3, ema=0.999, report=200, preview=1000)
    # Larger pictures need more noise, see fm.py. Short runs draw faces whose parts do not fit together, and ignore
    # labels, unless they see still more of it, which hides all but the layout. So on a laptop the mean of logit(t) is
    # lower than the formula's, and for small pictures it is Config's.
    mean = fm.logit_normal_mean(res) if size == "gpu" else -math.log(res / 32)
    fields = dict(t_mean=min(Config.t_mean, mean))
    patch, overlap = res // 8, 0.25
    if name in data.OFFICIAL:
        network = network or "unet"
        fields.update(cond="all", flip=name != "mnist", t_mean=-0.4, width=256, steps=2000, batch=64, warmup=100,
                      ema=0.995, report=50, preview=500)
    elif size == "gpu" and res >= 128:  # at 256: JiT-B/16, with overlapping patches, about 115M parameters
        fields.update(width=768, depth=12, heads=12, optimizer="adamw", lr=2e-4, batch=128, steps=160_000, warmup=2000,
                      cooldown=0.0, ema=0.9999, report=50, preview=2000)
        patch = res // 16
    elif size == "gpu" and res > 32:
        fields.update(width=384, depth=8, heads=6, batch=64, lr=1e-3, steps=20_000, warmup=500, ema=0.999, report=50,
                      preview=1000)
    elif name != "faces" and res <= 32:  # real pictures vary more than the faces, so they get more of all: minutes here
        fields.update(t_mean=0.0, width=256, steps=2000, ema=0.99)
    elif name != "faces":  # and a night here
        fields.update(width=384, depth=6, heads=6, lr=2e-3, steps=20_000, warmup=100, ema=0.999, report=50, preview=500)
    elif res >= 128:
        fields.update(width=256, steps=900, ema=0.99, preview=300)
    elif res > 32:
        fields.update(steps=1200, ema=0.99)
    if size == "laptop" and res >= 64:
        # About 10 x 10 patches, however large the picture. They overlap much, or their edges would show.
        patch, overlap = round(5 / 32 * res), 0.4
    if network == "unet":
        fields.update(network="unet", width=32, depth=2, heads=4, optimizer="adamw", lr=2e-3)
    else:
        patch, stride = fitting_patches(res, patch, overlap)
        fields.update(patch=patch, stride=stride)
    return fields


def fitting_patches(res, wanted, overlap):
    """(patch, stride) that tile the picture, with a patch of about the wanted size. overlap: about what fraction of a
    patch the next one is to cover. Of two that are equally near, the larger stride, which is faster."""

    def distance(fit):
        patch, stride = fit
        return abs(patch / wanted - 1) + abs(1 - stride / patch - overlap), -stride

    fits = []
    for patch in range(1, 2 * wanted):
        for stride in model.strides_that_fit(res, patch):
            fits.append((patch, stride))
    return min(fits, key=distance)


def check(config, given):
    """Refuses what cannot work, before anything slow."""
    out = Path(config.out)
    for place in (out, *out.parents):
        if place.is_file():
            data.fail(f"--out {out}: {place} is a file")
    if (config.network == "mlp") != (config.dataset in data.POINTS):
        data.fail(f"--network {config.network} --data {config.dataset}: mlp is for points, transformer and unet are "
                  f"for pictures")
    if config.shortcut and cooldown_start(config) == config.steps:
        data.fail("--shortcut: shortcuts are learnt in the cool-down, and there is none: take more --steps, or more "
                  "--cooldown, such as 0.6")
    if config.shortcut and config.predict == "e":
        data.fail("--shortcut --predict e: at t = 0, z is e, and to predict it says nothing about the picture: use "
                  "--predict x or v")
    if config.shortcut and config.path == "cosine" and config.predict == "x":
        data.fail("--shortcut --path cosine: a long step there does not end at the prediction, which would have to "
                  "hold noise: use --predict v")
    if config.dim > 2 and config.network != "mlp":
        data.fail(f"--dim {config.dim} is for points: --data moons")
    sizes = network_sizes(config, label_count=0)
    for field in ("patch", "stride", "width", "depth", "heads", "norm", "attention"):
        if field in given and field not in sizes:
            data.fail(f"--{field} means nothing to --network {config.network}")
    try:
        with torch.device("meta"):  # shapes without numbers: do the sizes go together?
            net = model.build(**sizes)
    except (ValueError, RuntimeError) as error:  # the latter for sizes beyond any memory
        data.fail(str(error))
    if config.optimizer == "muon" and not block_matrices(net):
        data.fail(f"--optimizer muon is for the matrices in a network's blocks; --network {config.network} has none: "
                  f"use --optimizer adamw")


# If any of these changed, a checkpoint's weights or optimizers would not fit, or mean something else.
FIXED = ("preset", "dataset", "res", "dim", "predict", "path", "network", "patch", "stride", "width", "depth", "heads",
         "norm", "optimizer", "cond", "shortcut")


def resume_from(given):
    """(checkpoint, config) to go on with. config: the run's own, changed by the given fields.

    It goes on from ckpt.pt if --steps and --cooldown are unchanged, or if ckpt.pt lies before the cool-down of both the
    old and the new schedule. Else from stable.pt, the state from just before a cool-down began, if the new one does not
    begin earlier. Else it refuses. So a run of k steps, extended to n, gives what n steps at once give, to the bit on
    the same machine. (Other flags, such as --lr, simply act from there on.)
    """
    out = Path(given.get("out") or resolve(given).out)
    latest = sample.read_checkpoint(out / "ckpt.pt")
    old, done = vars(latest["config"]), latest["step"]  # read_checkpoint has made the config a namespace
    if old.keys() - vars(Config()):
        data.fail(f"{out / 'ckpt.pt'} is of another version of this program; start anew: --out DIR")
    config = Config(**{**old, **given, "out": str(out)})
    old = Config(**old)
    check_same_run(old, config)
    if done >= config.steps:
        data.fail(f"{out} is at step {done} already; to train longer, ask for more: --steps {2 * done}")
    old_start, new_start = cooldown_start(old), cooldown_start(config)
    same_schedule = (old.steps, old_start) == (config.steps, new_start)
    if same_schedule or done <= min(old_start, new_start):
        return latest, config
    stable = out / "stable.pt"
    if stable.exists():
        earlier = sample.read_checkpoint(stable)
        if earlier["step"] <= new_start:
            earlier["keep_ckpt_as"] = f"ckpt-{done}.pt"  # how far the run had come, which may be wanted
            return earlier, config
    data.fail(f"{out} is at step {done} with another learning rate than these settings give, and there is no {stable} "
              f"from before step {new_start} to go back to: ask for more --steps or less --cooldown, or start anew: "
              f"--out DIR")


def check_same_run(old, config):
    for field in dataclasses.fields(Config):
        was, now = getattr(old, field.name), getattr(config, field.name)
        if field.name == "dataset" and was not in data.NAMES and now not in data.NAMES:
            continue  # two paths: `sample.load_data` compares what is there
        fixed = field.name in FIXED or (old.shortcut and field.name in ("times", "t_mean"))  # of its shortcuts' times
        if fixed and was != now:
            asked = f"{flag_of(field)} {now}" if field.type is not bool else flag_of(field)
            data.fail(f"{asked}: {config.out} was trained with {was!r}; leave the flag out (with --out "
                      f"{config.out}), or start anew: --out DIR")


def prepare_folder(out, checkpoint):
    """Makes the run's folder. A new run never overwrites an old one: its files move to out/before-1, or -2, ..."""
    if checkpoint is None:
        set_aside(out)
    elif "keep_ckpt_as" in checkpoint:
        shutil.copyfile(out / "ckpt.pt", out / checkpoint["keep_ckpt_as"])
    data.make_folder_for(out / "samples")


def set_aside(out):
    old = []
    for name in ("ckpt*.pt", "stable.pt", "log.csv", "w2.csv", "loss.png", "samples"):
        old.extend(out.glob(name))
    if not old:
        return
    number = 1
    while (out / f"before-{number}").exists():
        number += 1
    aside = out / f"before-{number}"
    aside.mkdir()
    for file in old:
        file.rename(aside / file.name)
    print(f"{out} held an earlier run; it is now in {aside}")


def start_processes(config):
    """(rank, world, device): see `sample.start_processes`."""
    rank, world = sample.processes()
    if config.batch % world:
        data.fail(f"--batch {config.batch} does not split evenly over {world} processes")
    if config.shortcut and config.batch < 2 * world:
        data.fail(f"--shortcut --batch {config.batch}: half of each process's samples learn shortcuts, so take --batch "
                  f"{2 * world} or more")
    device = sample.start_processes(config.device)
    if config.network == "mlp" and device.type == "cpu":
        torch.set_num_threads(1)  # its layers take microseconds; sharing one among threads takes longer
    return rank, world, device


def load_dataset(config, checkpoint, world):
    """See `sample.load_data`. One process of each machine packs the dataset while the others wait; then they find the
    pack ready."""
    if sample.local_rank() == 0:
        if config.download and config.dataset in data.OFFICIAL:
            data.download(config.dataset, Path(config.root))
        dataset = sample.load_data(config, checkpoint)
    sample.meet()
    if sample.local_rank() > 0:
        dataset = sample.load_data(config, checkpoint)
    return dataset


def wrap(net, config, world, device):
    """The network as training calls it: for several processes, compiled, both, or as it is."""
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net)
        net.broadcast_buffers = False  # all are constants, so the processes need not exchange them at every step
    if config.compile or (config.compile is None and device.type == "cuda"):
        net = torch.compile(net)
    return net


def note_signals():
    """From now on Ctrl-C and SIGTERM only add their numbers to the list that is returned, so that the loop can finish
    its step and save."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    return received


def heed_signals():
    """From now on they end the program at once, as before `note_signals`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, data.exit_on_signal)


def stop_signal(received, world):
    """The number of the signal that asked a process to stop, or 0; the same in all, so that all stop together."""
    number = torch.tensor(max(received, default=0))
    if world > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)  # between CPUs
    return int(number)


def bench(config, checkpoint, rank, world, device):
    """Times the training step, and compares its arithmetic with a plain matrix product's."""
    from torch.utils.benchmark import Timer  # only here, since it takes long to import

    images, labels, label_names, _ = load_dataset(config, checkpoint, world)
    net, ema, optimizers, sizes = build_networks(config, checkpoint, len(label_names), device, world)
    net, ema = wrap(net, config, world, device), wrap(ema, config, 1, device)
    last = config.steps - 1  # with shortcuts, if they are learnt
    calls = 10 if device.type == "cuda" else 1  # in a row, so that a GPU's queue stays filled

    def one_step():
        batch = draw_batch(config, images, labels, last, rank, world, device)
        train_step(config, last, net, ema, optimizers, batch)

    def seconds(function):
        """Median time of a call over five repeats, each after a warm-up. The count is fixed, because all processes
        must take the same number of steps."""
        timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
        return np.median([timer.timeit(calls).mean for _ in range(5)])

    step = seconds(one_step)
    memory = torch.cuda.max_memory_allocated() / 2**30
    flop = flop_per_sample(sizes, sample.shape_of(config))
    if config.shortcut:
        flop *= 4 / 3  # half of the samples also pass the average twice
    rate = config.batch / step * flop
    print(f"{step * 1e3:.1f} ms/step  {config.batch / step:,.1f} samples/s  {flop / 1e9:.3f} GFLOP/sample  "
          f"{rate / 1e9:,.0f} GFLOP/s")
    n = 8192 if device.type == "cuda" else 2048
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        if name == "bfloat16" and not (config.bf16 and sample.has_bf16(device)):
            continue
        a = torch.randn(n, n, dtype=dtype, device=device)
        top = 2 * n**3 / seconds(lambda: a @ a) * world
        print(f"  {rate / top:.0%} of a plain {name} matrix product's {top / 1e9:,.0f} GFLOP/s")
    if device.type == "cuda":
        gpu, words = torch.cuda.get_device_name(), []
        for name, peak in PEAK_TFLOPS.items():
            if name in gpu:
                words.append(f"MFU {rate / world / peak / 1e12:.1%} of {peak} TFLOP/s (datasheet)")
        print(f"  {gpu}", *words, f"peak memory {memory:.1f} GiB", sep="  ")


# Dense bf16 with float32 sums, from the makers' datasheets.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71}


def flop_per_sample(sizes, shape):
    """Floating-point operations of a training step, per sample. The backward pass costs two forward passes."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers, to count
        model.build(**sizes)(torch.empty(1, *shape), torch.empty(1))
    return 3 * counter.get_total_flops()


if __name__ == "__main__":
    data.run(main)
