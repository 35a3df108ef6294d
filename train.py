"""Trains a flow: noise in, pictures out.

    python train.py                                                cartoon faces, a few minutes on a laptop's CPU
    python train.py --data moons --ot                              points in the plane, seconds
    python train.py --data celeba --res 256                        the real job, on a GPU
    torchrun --nproc_per_node=8 train.py ...                       on eight, see README.md

Config below says what a run does. What it leaves behind is in out/faces-32, out/moons, ...
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
import shutil
import signal
import sys
import time
from collections import defaultdict
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


@dataclasses.dataclass
class Config:
    """Every setting of a run, and so every flag: --t-mean for t_mean. The comment is the flag's help. These defaults
    are tuned for some minutes of cartoon faces on two CPU cores; PRESETS has those for other data and sizes."""

    # the data
    data: str = "faces"  # faces, celeba, mnist, fashion, cifar10, moons, 8gaussians, checkerboard, spirals, or a path
    res: int = 32  # pixels a side; pictures are cropped to the centre square and resized
    root: str = "data"  # where datasets lie; it is only read (but for --download)
    cache: str = "cache"  # where packed arrays are kept
    flip: bool = True  # mirror half of the pictures, at random
    cond: str = ""  # labels to learn: all, or some attributes by name (Smiling,Male); by default none
    drop: float = 0.1  # fraction of samples whose labels are hidden; guidance needs some
    download: bool = False  # fetch mnist, fashion or cifar10 into --root first, if it is not there
    # the flow
    predict: str = "x"  # what the network predicts: x, e or v
    target: str = "v"  # what the squared error compares: x, e or v (shortcuts always compare what is predicted)
    path: str = "linear"  # how data and noise are mixed: linear or cosine
    times: str = "logit-normal"  # distribution of the training times: logit-normal or uniform
    t_mean: float = -0.5  # mean of logit(t), lower for larger pictures
    ot: int = 0  # pair noise with data by optimal transport, in groups of at most this many; --ot alone means 64
    jitter: float = 0.0  # standard deviation of extra noise on the network's input
    shortcut: bool = False  # learn samples in one step, too; twice the steps, and a longer cool-down
    # the network
    network: str = "transformer"  # transformer, unet or mlp
    patch: int = 4  # pixels a side of a patch
    stride: int = 4  # pixels from one patch to the next; below --patch they overlap
    width: int = 128  # numbers per token (transformer), channels at full resolution (unet), or per layer (mlp)
    depth: int = 4  # blocks (transformer), per resolution, down and again up (unet), or hidden layers (mlp)
    heads: int = 4  # attention heads
    norm: str = "rms"  # normalisation in the transformer: rms or derf
    attention: str = "auto"  # fused (torch's), hand (written out), or auto: the faster one
    # optimisation
    optimizer: str = "muon"  # muon (for the matrices in the transformer's blocks; AdamW for the rest) or adamw
    steps: int = 1000  # gradient steps
    hours: float = 0.0  # train for this many hours, instead of --steps; with --resume, for so many more
    batch: int = 32  # samples a step, over all processes together
    accumulate: int = 1  # parts of the batch that pass the network one after another, where memory is short
    lr: float = 3e-3  # peak learning rate
    warmup: int = 30  # steps of linear warm-up
    cooldown: float = 0.4  # last fraction of the steps or the --hours, in which the rate falls linearly towards zero
    decay: float = 0.0  # weight decay
    clip: float = 1.0  # gradients of a larger norm are scaled down to this one
    ema: float = 0.98  # decay of the averaged weights, the ones to sample from
    # the run
    preset: str = "auto"  # above 32 pixels: laptop (small networks), gpu (the papers'), or auto (gpu if CUDA)
    seed: int = 0  # of weights, batches, noise and times; what is held out is always the same
    device: str = "auto"  # auto, cpu, cuda or mps
    bf16: bool = True  # multiply matrices in bfloat16, where the hardware does
    compile: bool = None  # torch.compile; by default where the run is long enough to win by it
    out: str = ""  # where results go; by default out/<data>-<res>
    report: int = 20  # steps between lines of progress
    preview: int = 250  # steps between previews, held-out losses and checkpoints


# ---------------------------------------------------------------------------------------------------------------
# A training step: what goes in, the loss, the update


def draw_batch(config, images, labels, step, rank, world, device):
    """What goes into a step, the same each time for the same seed, step and process: x, e, t, y, jitter (or None) and
    shortcuts (or None). Shortcuts are learnt in the cool-down, by the last half of the samples.

    images, labels: the arrays of the dataset, see `data.load`. rank: which of the processes this is; world: how many
    there are (1 without torchrun). Each draws its own share of the batch.
    """
    n = config.batch // world
    g = torch.Generator(device).manual_seed(data.seed_from(config.seed, data.BATCH, step, rank))
    training, _ = data.split(len(images))
    indices = training[data.batch_indices(len(training), config.batch, step, config.seed)]
    mine = indices[rank * n : (rank + 1) * n]
    x, y = data.to_tensor(images[mine], device), data.send(labels[mine], device)
    if config.flip and x.dim() == 4:
        coin = torch.rand(n, 1, 1, 1, generator=g, device=device)
        x = torch.where(coin < 0.5, x, x.flip(3))
    e = torch.randn(x.shape, generator=g, device=device)
    if config.ot:
        e = fm.ot_pair(x, e, config.ot)
    t = fm.sample_t(n, config.times, config.t_mean, g, device)
    y = model.hide(y, torch.rand(n, generator=g, device=device) < config.drop)  # a coin for each sample
    jitter = config.jitter * torch.randn(x.shape, generator=g, device=device) if config.jitter else None
    shortcuts = None
    if config.shortcut and step >= cooldown_start(config):
        shortcuts = fm.sample_shortcuts(n // 2, sample.usual_shift(config), g, device)
    return x, e, t, y, jitter, shortcuts


def batch_loss(config, net, ema, x, e, t, y, jitter, shortcuts):
    """(the loss of the flow, the loss to descend): means over a batch, or over a part of it."""
    path = fm.PATHS[config.path]
    if shortcuts is None:
        if config.shortcut:  # to a compiled network, a length of 0 and none at all would be two networks
            net = functools.partial(net, length=torch.zeros_like(t))
        flow = fm.loss(net, x, e, t, y, config.predict, config.target, path, jitter).mean()
        return flow, flow
    flow, others = fm.loss_with_shortcuts(net, ema, x, e, t, shortcuts, y, config.predict, config.target, path, jitter)
    return flow.mean(), (flow.mean() + others.mean()) / 2


def train_step(config, step, batch, net, ema, optimizers, loss=batch_loss):
    """The loss and the update. Returns the flow's loss as a tensor, since .item() would make the CPU wait for a GPU.

    With --accumulate k, each k-th sample is a part: the gradients of the parts add up to the whole batch's.
    """
    *tensors, shortcuts = batch
    k, total = config.accumulate, 0
    net.zero_grad()
    for part in range(k):
        mine = [tensor if tensor is None else tensor[part::k] for tensor in tensors]
        mine.append(shortcuts and [tensor[part::k] for tensor in shortcuts])
        net.require_backward_grad_sync = part == k - 1  # several processes exchange the sum of the gradients only
        with model.autocast(mine[0].device, config.bf16):
            flow_loss, all_loss = loss(config, net, ema, *mine)
        (all_loss / k).backward()
        total += flow_loss.detach() / k

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
    return total


# ---------------------------------------------------------------------------------------------------------------
# The run


def train(config, checkpoint, dataset, rank, world, device, signals=()):
    """The loop. Goes on from a checkpoint, or starts anew if that is None. dataset: see `data.load`. signals: the
    numbers of those that came, such as Ctrl-C; the loop finishes its step, and saves. Returns the averaged network."""
    out = Path(config.out)
    images, labels, label_names, content = dataset
    if rank == 0 and checkpoint and "keep_end_as" in checkpoint:
        keep_end(out, checkpoint["keep_end_as"])
    net, ema, optimizers, sizes = build_networks(config, checkpoint, len(label_names), device, world)
    one_step = make_step(config, net, ema, optimizers, world)
    first, log = (checkpoint["step"], checkpoint["log"]) if checkpoint else (0, [])
    about = dict(config=vars(config), net=sizes, label_names=label_names, multi_hot=labels.ndim == 2, content=content,
                 log=log)  # is in every checkpoint, with all rows of the log so far
    about["seconds"] = before = checkpoint["seconds"] if checkpoint else 0.0  # spent in training so far
    total, reported, timed = torch.zeros((), device=device), first, first
    began = clock = time.perf_counter()

    for step in itertools.count(first):
        if config.steps == ENDLESS and about["seconds"] > (1 - config.cooldown) * config.hours * 3600:
            config.steps = steps_if_cooling_from(step, config)
            data.say(f"the learning rate falls in the rest of the time; {config.steps:,} steps in all")
        if rank == 0 and step == cooldown_start(config):
            for name in ("stable.pt", "ckpt.pt"):
                save(out / name, about, step, net, ema, optimizers)
        batch = draw_batch(config, images, labels, step, rank, world, device)
        total += one_step(step, batch)
        done = step + 1
        stop, about["seconds"] = signal_and_time(signals, before + time.perf_counter() - began, world)
        late = config.hours > 0 and about["seconds"] > 1.1 * config.hours * 3600
        # Asked to stop, it saves at once, without the slower held-out loss and preview.
        milestone = late or done == config.steps or (done % config.preview == 0 and not stop)
        if milestone or stop or done % config.report == 0 or done == first + 3:  # a first ETA
            # .item() makes the CPU wait for the device, so it is called rarely.
            loss = total.item() / (done - reported)  # of this process's share of the batch
            rate = (done - timed) * config.batch / (time.perf_counter() - clock)
            log.append(report(config, step, loss, rate, about["seconds"]))
            if late and done < config.steps:
                data.say("it ends here: since the learning rate began to fall, this machine has become slower")
                config.steps = done  # `config` is what the checkpoint keeps
            if milestone:  # all processes compute it: the others would only wait
                log[-1].update(held_out(ema, config, images, labels, device))
                data.say(f"held-out loss {log[-1]['held_out']:.4f}")
            if not np.isfinite(list(log[-1].values())).all():
                raise FloatingPointError(f"the loss is no longer finite at step {done}; try a lower --lr (if a "
                                         f"checkpoint was saved, --resume goes on from it)")
            if rank == 0 and (milestone or stop):
                save(out / "ckpt.pt", about, done, net, ema, optimizers)
                try:
                    write_log(out, log)
                    if milestone:
                        write_preview(out, ema, config, images, labels, device, done)
                except OSError as error:
                    data.say(f"the checkpoint is saved, but not all of the log and preview: {error}")
            total.zero_()
            reported = timed = done
            clock = time.perf_counter()
        elif step == first:  # in which torch may compile; the rates that follow do not count it
            total.item()
            timed, clock = done, time.perf_counter()
        if stop or done == config.steps:
            break

    if world > 1:
        meet()  # wait for the one that saves: when one process ends by a signal, torchrun ends all
        dist.destroy_process_group()
    if done < config.steps:
        how = "--resume, without --hours," if config.hours else "the same command with --resume"
        data.say(f"stopped after step {done:,} and saved; {how} goes on")
        sys.exit(128 + stop)
    data.say(f"{time.perf_counter() - began:.0f} s; weights, log and pictures are in {out}/")
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
    data.say(f"{count / 1e6:.2f}M parameters on {world} x {device.type}")
    return net, ema, optimizers, sizes


def network_sizes(config, label_count):
    """What `model.build` needs: the fields of Config that the chosen network has."""
    sizes = dict(kind=config.network, width=config.width, depth=config.depth, shortcut=config.shortcut)
    if config.network == "mlp":
        return sizes
    sizes.update(res=config.res, channels=data.usual_channels(config.data), heads=config.heads,
                 attention=config.attention, labels=label_count)
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
        optimizers.append(Muon(matrices, config.bf16 and model.has_bf16(matrices[0].device)))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Subtracts from a matrix not its averaged gradient but the orthogonal matrix nearest to that, so that all
    directions learn at one pace (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). Its steps are scaled
    to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so one learning rate serves both. In short runs it needs
    about half of AdamW's steps. torch.optim.Muon does the same, but always in bfloat16: slow on a CPU without it.

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
                for w in matrices:
                    if not self.state[w]:
                        self.state[w]["momentum_buffer"] = torch.zeros_like(w)
                gradients, averages = [w.grad for w in matrices], [self.state[w]["momentum_buffer"] for w in matrices]
                torch._foreach_lerp_(averages, gradients, 0.05)
                # Nesterov: 0.05 grad + 0.95 average. The average holds the latest gradient already, so that one counts
                # about twice as much.
                directions = torch._foreach_lerp(gradients, averages, 0.95)
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


ENDLESS = 10**12  # the steps of a run by --hours, until its learning rate begins to fall


def cooldown_start(config):
    return config.steps - int(config.cooldown * config.steps)


def steps_if_cooling_from(step, config):
    """The least number of steps with which the cool-down does not start before this one."""
    shortest = dataclasses.replace(config, steps=step + 1)
    while cooldown_start(shortest) < step:
        shortest.steps += 1
    return shortest.steps


def learning_rate(config, step):
    """Linear warm-up, constant, linear cool-down."""
    up = min(1, (step + 1) / (config.warmup + 1))
    down = min(1, (config.steps - step) / (config.steps - cooldown_start(config) + 1))
    return config.lr * up * down


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind

PREVIEW_PICTURES, PREVIEW_STEPS, HELD_OUT_PICTURES = 16, 20, 200


def report(config, step, loss, rate, seconds):
    """Prints a line of progress, and returns it as a row of the log. rate: samples a second. seconds: spent so far."""
    done = step + 1
    if config.steps == ENDLESS:
        of, left = "", config.hours * 3600 - seconds
    else:
        of, left = f"/{config.steps:,}", (config.steps - done) * config.batch / rate
    left = timedelta(seconds=round(left))
    data.say(f"step {done:>6,}{of}  loss {loss:.4f}  {rate:,.0f} samples/s  ETA {left}")
    return {"step": done, "loss": loss, "lr": learning_rate(config, step), "samples_s": rate}


@torch.no_grad()
def held_out(net, config, images, labels, device):
    """The loss on held-out data: {"held_out": mean, "t0": first tenth of the times, ..., "t9": last tenth}.

    The data, the noise and the times are the same each time. All times count the same, unlike in training, where (if
    logit-normal) most are drawn near the mean: so this number is not the training loss, however well a run generalises.
    """
    n = 1000 if config.data in data.POINTS else HELD_OUT_PICTURES
    chosen = np.resize(data.split(len(images))[1], n)  # repeats a small dataset's samples
    x, y = data.to_tensor(images[chosen], device), data.send(labels[chosen], device)
    e = sample.noise(range(n), x.shape[1:], seed=1).to(device)
    t = (torch.arange(n, device=device) + 0.5) / n
    losses = []
    for part in torch.arange(n).split(50):
        with model.autocast(device, config.bf16):
            losses.append(fm.loss(net, x[part], e[part], t[part], y[part], config.predict, config.target,
                                  fm.PATHS[config.path]))
    bins = torch.cat(losses).view(10, -1).mean(1).tolist()
    return {"held_out": sum(bins) / 10, **{f"t{i}": loss for i, loss in enumerate(bins)}}


def write_preview(out, ema, config, images, labels, device, done):
    """Draws samples, always from the same noise and held-out labels, so that previews can be compared. Once shortcuts
    are learnt, pictures have a second row: what one step makes of the same noise."""
    n = 2000 if config.data in data.POINTS else PREVIEW_PICTURES
    chosen = np.resize(data.split(len(images))[1], n)
    y = data.send(labels[chosen], device)
    e = sample.noise(range(n), sample.shape_of(config), seed=0).to(device)
    x, _ = sample.generate(ema, config, e, PREVIEW_STEPS, y=y)
    columns = None
    if config.shortcut and done > cooldown_start(config) and config.data not in data.POINTS:
        in_one_step, _ = sample.generate(ema, config, e, 1, "shortcut", y=y)
        x, columns = torch.cat([x, in_one_step]), n
    with data.whole(out / "samples" / f"{done:06d}.png") as file:
        sample.draw(x, config, columns).save(file)


def save(file, about, step, net, ema, optimizers):
    """Writes a checkpoint, whole or not at all. Refuses broken weights."""
    weights = net.state_dict()
    if not all(w.isfinite().all() for w in weights.values()):
        raise FloatingPointError(f"the weights are no longer finite, and were not saved to {file}; try a lower --lr")
    states = [optimizer.state_dict() for optimizer in optimizers]
    checkpoint = {**about, "step": step, "weights": weights, "ema": ema.state_dict(), "optimizers": states}
    with data.whole(file) as out:
        try:
            torch.save(checkpoint, out)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"could not write {file}: is the disk full? What was there is untouched ({str(error):.60})")


def keep_end(out, name):
    """Copies the latest checkpoint of a run that is made longer, and so starts again from before its cool-down."""
    with open(out / "ckpt.pt", "rb") as latest, data.whole(out / name) as file:
        shutil.copyfileobj(latest, file)


COLUMNS = ["step", "loss", "lr", "samples_s", "held_out", *(f"t{i}" for i in range(10))]


def write_log(out, log):
    """Rewrites log.csv and its picture from all rows."""
    lines = [",".join(COLUMNS)]
    for row in log:
        lines.append(",".join(str(row.get(column, "")) for column in COLUMNS))
    with data.whole(out / "log.csv") as file:
        file.write("\n".join([*lines, ""]).encode())
    curves = {}
    for name, column in (("training loss", "loss"), ("held-out loss, all t alike", "held_out")):
        rows = [row for row in log if column in row]
        if rows:
            curves[name] = [row["step"] for row in rows], [row[column] for row in rows]
    with data.whole(out / "loss.png") as file:
        data.plot(curves, "step").save(file)


def measure_points(ema, config, device):
    """Prints how far samples are from fresh data, by the number of Euler steps: exact W2 on 2,048 points. If paths are
    straight, few steps already come close. Perfect samples would score about what other fresh data do."""
    fresh, others = (data.points(config.data, 2048, data.seed_from(1, data.HELD_OUT, i)) for i in (0, 1))
    e = sample.noise(range(2048), (2,), seed=1).to(device)
    distances = []
    for steps in (1, 2, 4, 10, 100):
        x, _ = sample.generate(ema, config, e, steps)
        distances.append(f"{steps}: {fm.w2(fresh, x):.3f}")
    floor = fm.w2(fresh, others)
    data.say("W2 to the data, by Euler steps:", "  ".join(distances), f" (data against data: {floor:.3f})")


# ---------------------------------------------------------------------------------------------------------------
# Plumbing: skip this at first. Presets, the command line, resuming, several processes, --bench.


def main(argv=None):
    """Trains, or times (--bench), as the command line says; returns the averaged network."""
    given, resuming, bench_only = parse_flags(argv)
    with data.refusing():
        out = Path(given.get("out") or resolve(given).out)
    writes = model.processes()[0] == 0 and not bench_only
    signals = []
    # First of all the lock: otherwise another run could end between a look into the folder and the first save.
    with data.lock(out) if writes else contextlib.nullcontext():
        with data.refusing():
            checkpoint, config = resume(given, out) if resuming else (None, resolve(given))
            for name in ("ckpt.pt", "stable.pt", "log.csv", "loss.png", "samples"):
                if (out / name).exists() and not resuming and not bench_only:
                    raise ValueError(f"{out} holds {name} already (perhaps of other data of that name): go on with "
                                     f"that run by --resume, name another folder by --out DIR, or move it away")
            check(config)
            rank, world, device = start_processes(config)
        if config.compile is None:
            config.compile = compiling_pays(config, device)
        data.say(*(f"{field}={value}" for field, value in vars(config).items()))
        dataset = load_dataset(config, checkpoint, rank)
        if bench_only:
            return bench(config, dataset, rank, world, device)
        with data.on_signals(lambda number, frame: signals.append(number)):
            ema = train(config, checkpoint, dataset, rank, world, device, signals)
    if rank == 0 and config.data in data.POINTS:
        measure_points(ema, config, device)
    return ema


# What differs from Config's defaults. patches=(n, a, b): n patches a side, and patch to stride about as a to b.
PRESETS = {
    "points": dict(network="mlp", width=64, predict="v", times="uniform", t_mean=0.0, optimizer="adamw", steps=3000,
                   batch=256, lr=2e-3, ema=0.999, report=200, preview=1000),
    "mnist, fashion, cifar10": dict(network="unet", cond="all", t_mean=-0.4, width=256, steps=2000, batch=64,
                                    warmup=100, ema=0.995, report=50, preview=500, patches=(8, 1, 1)),
    # Real pictures vary more than the faces, so they get more of all: on two cores that multiply in bfloat16 ten to 13
    # minutes up to 32 pixels, about an hour at 64, an hour and a half at 256. At a rate of 3e-3 a run of width 256
    # diverged after 3,100 steps: hence lower rates, and where steps are many, weight decay, or the weights would grow
    # without end. (Tuned on photographs of faces at 32 and 64 pixels, by one seed each; tried, but not compared with
    # others, at 256. In equal time --fd 600 was, at 32 pixels, 3.1 times with patches of 4 pixels side by side, 2.5
    # with these that overlap; at 64 pixels 1.9 with these, 2.0 with --ot, 2.5 with --patch 8 --stride 4, 3.0 with
    # --t-mean -1.2.)
    "faces, up to 32": dict(patches=(8, 1, 1)),
    "pictures, up to 32": dict(width=256, steps=3000, lr=1.5e-3, ema=0.99, patches=(10, 5, 3)),
    "faces, laptop, up to 127": dict(steps=1200, ema=0.99, patches=(10, 5, 3)),
    "faces, laptop": dict(width=256, steps=900, ema=0.99, preview=300, patches=(10, 5, 3)),
    "pictures, laptop": dict(width=256, depth=6, lr=1e-3, decay=0.1, steps=13_000, warmup=100, ema=0.999, report=50,
                             preview=500, patches=(10, 5, 3)),
    "gpu, up to 127": dict(width=384, depth=8, heads=6, batch=64, lr=1e-3, decay=0.1, steps=20_000, warmup=500,
                           ema=0.999, report=50, preview=1000, patches=(9, 8, 7)),
    # At 256 pixels: JiT-B/16 (Li & He 2025), with overlapping patches, about 115M parameters. The paper's rate is 5e-5
    # for each 256 samples of a batch: 2e-4 at its 1,024, and 2.5e-5 at 128. By the square root of the batch it is 7e-5
    # here: a guess, nobody has compared them.
    "gpu": dict(width=768, depth=12, heads=12, optimizer="adamw", lr=7e-5, batch=128, steps=160_000, warmup=2000,
                cooldown=0.0, ema=0.9999, report=50, preview=2000, patches=(21, 4, 3)),
}
UNET = dict(width=32, depth=2, heads=4, optimizer="adamw", lr=2e-3)


def resolve(given):
    """Config's defaults, overridden by the preset, by what --shortcut needs, and by the given fields."""
    name = given.get("data", Config.data)
    res, size = given.get("res", data.usual_res(name)), given.get("preset", "auto")
    if size == "auto":
        size = "gpu" if model.pick_device(given.get("device", "auto")).type == "cuda" else "laptop"
    # Larger pictures need more noise, see fm.py. Short runs draw faces whose parts do not fit together, and ignore
    # labels, unless they see still more of it, which hides all but the layout. So on a laptop the mean of logit(t)
    # falls as by the formula, but from 0 at 32 pixels; and it is at most Config's.
    t_mean = min(Config.t_mean, fm.logit_normal_mean(res) if size == "gpu" else -math.log(res / 32))
    fields = dict(root=data.as_absolute(Config.root), res=res, flip=name != "mnist", t_mean=t_mean,
                  out=str(data.run_folder(name, res)))
    fields.update(PRESETS[preset(name, res, size)])
    if given.get("network", fields.get("network")) == "unet":
        fields.update(UNET)
    if "patches" in fields:
        fields["patch"], fields["stride"] = tiling(res, *fields.pop("patches"))
    if given.get("shortcut"):
        # There is more to learn, and shortcuts are learnt while the rate falls.
        fields.update(steps=2 * fields.get("steps", Config.steps), cooldown=0.6)
    if given.get("hours"):
        fields["steps"] = ENDLESS
    return Config(**{**fields, **given, "preset": size})


def preset(name, res, size):
    """The row of PRESETS."""
    if name in data.POINTS:
        return "points"
    if name in data.OFFICIAL:
        return "mnist, fashion, cifar10"
    kind = "faces" if name == "faces" else "pictures"
    if res <= 32:
        return f"{kind}, up to 32"
    if size == "gpu":
        return "gpu, up to 127" if res < 128 else "gpu"
    return "faces, laptop, up to 127" if kind == "faces" and res < 128 else f"{kind}, laptop"


def tiling(res, side, patch, stride):
    """(patch, stride) in pixels: `side` patches a side that cover the picture exactly. They overlap as asked if res
    divides evenly, otherwise more."""
    pixels = stride * res // (stride * (side - 1) + patch)
    return res - (side - 1) * pixels, pixels


CHOICES = {"predict": ("x", "e", "v"), "target": ("x", "e", "v"), "path": fm.PATHS,
           "times": ("logit-normal", "uniform"), "network": model.NETWORKS, "norm": model.NORMS,
           "attention": model.ATTENTION, "optimizer": ("muon", "adamw"), "preset": ("auto", "laptop", "gpu")}
PLACES = {"data": data.as_dataset, "root": data.as_absolute, "cache": data.as_path, "out": data.as_path}
# The least and the most that a number may be, if not 1 and a billion (whole ones), or 0 and 1e38. (A grid of 10 by 10
# overlapping patches, as in PRESETS, needs 11 pixels a side.)
LIMITS = {"res": (11, 10**4), "drop": (0, 0.99), "t_mean": (-10, 10), "ot": (0, 10**4), "width": (1, 10**5),
          "hours": (1e-3, 10**4), "lr": (1e-9, 1e38), "warmup": (0, 10**9), "cooldown": (0, 1),
          "clip": (1e-9, 1e38), "ema": (0, 1), "seed": (0, 2**63 - 1)}


def parse_flags(argv):
    """Command line -> (the given fields of Config, resume, bench)."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="In brackets: defaults for faces at 32 pixels. Every run prints its own.")
    parser.error = data.fail
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config).replace("%", "%%"), re.MULTILINE))
    for field in dataclasses.fields(Config):
        how = dict(help=f"{helps[field.name]} [{field.default}]", metavar=field.name.upper())
        if field.type is bool:
            how = dict(help=how["help"], action=argparse.BooleanOptionalAction)
        elif field.type is str:
            how["choices"] = CHOICES.get(field.name)
            how["type"] = PLACES.get(field.name, str)
        else:
            how["type"] = data.number(field.type, *LIMITS.get(field.name, ()))
        if field.name == "ot":
            how.update(nargs="?", const=64)
        parser.add_argument(flag(field.name), **how)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--bench", action="store_true", help="time the training step instead of training")
    given = vars(parser.parse_args(argv))
    if "hours" in given and "steps" in given:
        parser.error("--steps and --hours both say how long: leave one out")
    return given, given.pop("resume", False), given.pop("bench", False)


def flag(field):
    return "--" + field.replace("_", "-")


def check(config):
    """Refuses what cannot work, before anything slow."""
    data.check_outside(config.data, config.out, "--out DIR")
    data.check_outside(config.data, config.cache, "--cache DIR")
    if (config.network == "mlp") != (config.data in data.POINTS):
        raise ValueError(f"--network {config.network} --data {config.data}: mlp is for points, transformer and unet "
                         f"are for pictures")
    if config.hours and (config.shortcut or config.cooldown == 1):
        raise ValueError("--hours needs a time before the cool-down in which steps take as long as in it: not so with "
                         "--cooldown 1, nor with --shortcut (use --steps)")
    if config.shortcut and cooldown_start(config) == config.steps:
        raise ValueError("--shortcut: shortcuts are learnt in the cool-down, and there is none: take more --steps, or "
                         "more --cooldown, such as 0.6")
    if config.shortcut and config.predict == "e":
        raise ValueError("--shortcut --predict e: at t = 0, z is e, and to predict it says nothing about the picture: "
                         "use --predict x or v")
    if config.shortcut and config.path == "cosine" and config.predict == "x":
        raise ValueError("--shortcut --path cosine: a long step there does not end at the prediction, which would have "
                         "to hold noise: use --predict v")
    with torch.device("meta"):  # shapes without numbers: do the sizes go together?
        net = model.build(**network_sizes(config, label_count=0))
    if config.optimizer == "muon" and not block_matrices(net):
        raise ValueError(f"--optimizer muon is for the matrices in a network's blocks; --network {config.network} has "
                         f"none: use --optimizer adamw")


# What may change when a run goes on; all else must stay.
MAY_CHANGE = "data root cache download steps hours lr device bf16 compile out report preview".split()


def resume(given, out):
    """(checkpoint, config) to go on with. config: the run's own, but for the given fields that may change.

    It goes on from ckpt.pt; or, if --steps or --hours ask for more and the learning rate has begun to fall, from
    stable.pt, the state from just before, and the end of the shorter run stays as ckpt-STEP.pt. So a run of k steps,
    extended to n, gives what n steps at once give, to the bit on the same machine. (Flags such as --lr simply act from
    there on.) --hours are so many more than that checkpoint had spent.
    """
    _, checkpoint = model.load(out)
    was, done = vars(checkpoint["config"]), checkpoint["step"]
    if was.keys() != vars(Config()).keys():
        raise ValueError(f"{out} is of another version of this program: train anew, --out DIR")
    if given.get("preset") == "auto":  # stored is what it stood for
        del given["preset"]
    for field, value in given.items():
        if field not in MAY_CHANGE and value != was[field]:
            raise ValueError(f"{flag(field)}: {out} was trained with {was[field]}, not {value}; leave the flag out "
                             f"(with --out {out}), or start anew: --out DIR")
    if given.get("hours"):
        given["steps"] = ENDLESS
    elif "steps" in given:
        given["hours"] = 0.0
    config = Config(**{**was, **given, "out": str(out)})
    if was["steps"] == ENDLESS and cooldown_start(config) < done:
        raise ValueError(f"--steps {config.steps}: {out} is at step {done}, where the learning rate would already have "
                         f"fallen: ask for --steps {steps_if_cooling_from(done, config)} or more")
    if done >= config.steps or (config.steps < was["steps"] and was["steps"] != ENDLESS):
        raise ValueError(f"--steps {config.steps}: {out} is at step {done} of {was['steps']}; to train longer ask for "
                         f"more, such as --steps {2 * was['steps']}")
    if config.steps > was["steps"] and done > cooldown_start(checkpoint["config"]):
        if not (out / "stable.pt").exists():
            raise ValueError(f"no {out}/stable.pt, from which a finished run is made longer: start anew, --out DIR "
                             f"(ckpt.pt is still good to sample from)")
        _, checkpoint = model.load(out / "stable.pt")
        checkpoint["keep_end_as"] = f"ckpt-{done}.pt"
    if given.get("hours"):
        spent = checkpoint["seconds"] / 3600
        least = spent * config.cooldown / (1 - config.cooldown)
        if given["hours"] < least:
            raise ValueError(f"--hours {given['hours']}: {spent:.3g} were spent at a constant learning rate, so that "
                             f"its fall takes {least:.3g}: ask for {1.1 * least:.3g} or more")
        config.hours += spent
    return checkpoint, config


def start_processes(config):
    """(rank, world, device) of this process, connected with the others."""
    rank, world, _ = model.processes()
    parts = world * config.accumulate * (2 if config.shortcut else 1)
    if config.batch % parts:
        raise ValueError(f"--batch {config.batch} does not split evenly over {world} processes of --accumulate "
                         f"{config.accumulate} parts (with --shortcut in two halves): take a multiple of {parts}")
    device = model.pick_device(config.device)
    if rank > 0:  # only the first process prints
        data.silence()
    if world > 1:
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "cpu:gloo,cuda:nccl"
        # Hours, because the other processes wait while one packs the dataset.
        dist.init_process_group(backend, timeout=timedelta(hours=6))
    if config.network == "mlp" and device.type == "cpu":
        torch.set_num_threads(1)  # its layers take microseconds; sharing one among threads takes longer
    keep_memory()
    return rank, world, device


def keep_memory():
    """When a large tensor is freed, Linux's C library returns its memory to the system. The next step asks for it
    again, and the system clears each page: a tenth of a CPU's step. This tells the library to keep the memory."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other systems have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: what is larger is returned all the same. This is the most it takes
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give it back


def meet():
    """Returns when all processes have called it."""
    try:
        dist.barrier()
    except RuntimeError as error:  # most often another one has failed, and says why
        data.fail(str(error).partition("\n")[0], status=1)


def load_dataset(config, checkpoint, rank):
    """See `data.load`. First one process packs, then the first of each other machine (which finds nothing to do if they
    share a disk), then the rest find it ready. Refuses data that are not the checkpoint's."""
    _, world, local_rank = model.processes()
    turn = 0 if rank == 0 else 1 if local_rank == 0 else 2
    for now in range(3):
        if now == turn:
            with data.refusing():
                if config.download and config.data in data.OFFICIAL:
                    data.download(config.data, Path(config.root))
                dataset = sample.load_data(config, checkpoint)
        if world > 1:
            meet()
    n = len(dataset[0])
    seen = config.steps * config.batch / len(data.split(n)[0])
    times = "as often as the time allows" if config.steps == ENDLESS else f"{seen:.1f} times in all"
    data.say(f"{n:,} samples; each that is not held out is seen {times}")
    if n < 500:
        data.say("so few will be learnt by heart: expect samples that are nearly copies of them")
    return dataset


def make_step(config, net, ema, optimizers, world):
    """`train_step` as a function of the step and the batch: with the network for several processes, compiled, or as it
    is. (Averages need no exchange: they are the same in all processes.)"""
    if world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        net.broadcast_buffers = False  # they are constants; as an argument it warns, from torch 2.13 on
    plain = functools.partial(train_step, config, net=net, ema=ema, optimizers=optimizers)
    if not config.compile:
        return plain
    if world == 1:
        return data.with_fallback(functools.partial(plain, loss=torch.compile(batch_loss)), plain)
    # What exchanges gradients cannot be compiled into one piece with the loss.
    return data.with_fallback(functools.partial(plain, net=torch.compile(net), ema=torch.compile(ema)), plain)


COMPILE_FLOP = 3e13  # of a run, from where on a CPU wins more than the minute that compiling takes


def compiling_pays(config, device):
    """Does this run, counted from its first step, win by torch.compile? It says so."""
    flop = config.steps * config.batch * flop_per_sample(network_sizes(config, label_count=0), sample.shape_of(config))
    long = config.hours > 0.1 if config.hours else flop > COMPILE_FLOP  # six minutes win more than the one, too
    pays = model.compiles_well(config, device) and (device.type == "cuda" or long)
    why = "a GPU wins at once" if device.type == "cuda" else "a CPU wins in long runs of a transformer in bfloat16"
    data.say(f"compile: {'on' if pays else 'off'}, since {'' if pays else 'only '}{why} (--compile, --no-compile)")
    return pays


def signal_and_time(received, seconds, world):
    """(the number of the signal that asked a process to stop, or 0; the seconds of the slowest): the same in all
    processes, so that all stop together."""
    both = torch.tensor([max(received, default=0), seconds], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(both, dist.ReduceOp.MAX)  # between CPUs
    return int(both[0]), float(both[1])


def bench(config, dataset, rank, world, device):
    """Times the training step, and compares its arithmetic with a plain matrix product's."""
    images, labels, label_names, _ = dataset
    net, ema, optimizers, sizes = build_networks(config, None, len(label_names), device, world)
    one_step = make_step(config, net, ema, optimizers, world)
    last = config.steps - 1  # with shortcuts, if they are learnt
    step = seconds(lambda: one_step(last, draw_batch(config, images, labels, last, rank, world, device)), device)
    flop = config.batch * flop_per_sample(sizes, sample.shape_of(config))
    data.say(f"{step * 1e3:.1f} ms/step  {config.batch / step:,.1f} samples/s  {flop / step / 1e9:,.0f} GFLOP/s")
    n = 8192 if device.type == "cuda" else 2048
    for name, there in (("float32", True), ("bfloat16", config.bf16 and model.has_bf16(device))):
        if there:
            a = torch.randn(n, n, device=device).to(getattr(torch, name))
            top = world * 2 * n**3 / seconds(lambda: a @ a, device)
            data.say(f"  {flop / step / top:.0%} of a plain {name} matrix product's {top / 1e9:,.0f} GFLOP/s")
    if device.type == "cuda":
        data.say(f"  {torch.cuda.get_device_name()}, peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def seconds(function, device):
    """Median time of a call that returns a tensor, over five repeats after a warm-up. The count is fixed, because all
    processes must take the same number of steps."""
    times, calls = [], 10 if device.type == "cuda" else 1  # in a row, so that a GPU's queue stays filled
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(calls):
            result = function()
        result.sum().item()  # waits for a GPU
        times.append((time.perf_counter() - began) / calls)
    return np.median(times[1:])


def flop_per_sample(sizes, shape):
    """Floating-point operations of a training step, per sample. The backward pass costs two forward passes. With
    shortcuts, half of the samples also pass the average twice."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers, to count
        model.build(**sizes)(torch.empty(1, *shape), torch.empty(1))
    return (4 if sizes["shortcut"] else 3) * counter.get_total_flops()


if __name__ == "__main__":
    data.run(main)
