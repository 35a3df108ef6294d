"""Trains a flow: noise in, pictures out.

    python train.py                                                cartoon faces, a few minutes on a laptop's CPU
    python train.py --data moons --ot                              points in the plane, seconds
    python train.py --data celeba --res 256                        the real job, on a GPU
    torchrun --nproc_per_node=8 train.py --data celeba --res 256   on eight

Everything a run needs to be understood is in Config below; everything it leaves behind is in out/<data>-<res>.
"""

import argparse
import copy
import csv
import dataclasses
import difflib
import inspect
import os
import re
import shutil
import signal
import sys
import time
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


@dataclasses.dataclass
class Config:
    """Every number of a run, and so every flag: `--name value`. The comment is the flag's help."""

    # what is learned
    data: str = "faces"  # faces, celeba, mnist, fashion, cifar10, moons, 8gaussians, checkerboard, spirals, or a path
    res: int = 32  # pixels a side; pictures are cropped to the centre square and resized
    root: str = "data"  # where datasets are looked for, and packed arrays kept (in cache/)
    flip: bool = True  # mirror half of the pictures, at random
    cond: str = ""  # labels to learn: all, or some attributes by name (Smiling,Male); by default none
    drop: float = 0.1  # share of samples whose labels are hidden, so that guidance has something to compare with
    download: bool = False  # fetch mnist, fashion or cifar10 into --root first, if it is not there
    # the flow
    predict: str = "x"  # what the network says: x, e or v
    loss: str = "v"  # in which of x, e, v the squared error is taken
    path: str = "linear"  # linear or cosine
    time: str = "logit-normal"  # logit-normal or uniform training times
    t_mean: float = 0.0  # mean of the logit-normal; -0.8 - log(res/256), at most 0; for mnist and its like -0.4
    ot: bool = False  # pair noise with data by optimal transport
    ot_block: int = 64  # in groups of so many: the assignment costs O(n^3), the gain flattens about here
    cover: float = 0.0  # share of times drawn uniformly, so that all are seen; the loss is corrected for it
    jitter: float = 0.0  # standard deviation of noise on z, which the targets do not know
    # the network
    model: str = "transformer"  # transformer, unet or mlp
    patch: int = 4  # pixels a side of a patch
    stride: int = 4  # pixels from one patch to the next; below `patch` they overlap
    width: int = 256  # numbers per token, channels at full resolution (unet), or numbers per layer (mlp)
    depth: int = 4  # blocks, blocks per resolution (unet), or layers (mlp)
    heads: int = 4  # attention heads
    norm: str = "rms"  # rms or derf
    attention: str = "auto"  # fused, hand (written out), or auto: the faster one
    # optimisation
    optimizer: str = "muon"  # muon (for the matrices of the transformer's blocks, AdamW for the rest) or adamw
    steps: int = 700  # gradient steps
    batch: int = 32  # samples a step, over all processes together
    lr: float = 3e-3  # peak learning rate
    warmup: int = 30  # steps of linear warm-up
    cooldown: float = 0.4  # the last part of the steps, in which the rate falls linearly to zero
    decay: float = 0.0  # weight decay
    clip: float = 1.0  # larger gradients are scaled down to this norm
    ema: float = 0.98  # decay of the averaged weights, the ones to sample from
    # the run
    seed: int = 0  # all randomness follows from it
    device: str = "auto"  # auto, cpu, cuda or mps
    bf16: bool = True  # matrix products, and what lies between, in bfloat16, where the hardware has them
    compile: bool = None  # torch.compile; by default on CUDA, where it pays at once
    out: str = ""  # where results go; by default out/<data>-<res>
    report: int = 20  # steps between lines of progress
    preview: int = 175  # steps between previews, held-out losses and checkpoints


def preset(name, res, kind=None):
    """The fields that differ from Config's own, which are tuned for three minutes of cartoon faces on two CPU cores.

    kind: the network, where the user names it.
    """
    if name in data.POINTS:
        return dict(model="mlp", width=64, predict="v", time="uniform", optimizer="adamw", steps=3000, batch=256,
                    lr=2e-3, ema=0.999, report=200, preview=1000)
    # For small pictures the formula's mean, 1.3 at 32 pixels, sees too little noise in few steps: faces fall apart,
    # and labels, which say most where little is to be seen, go unheard.
    fields = dict(t_mean=min(0.0, fm.logit_normal_mean(res)))
    if name in data.OFFICIAL:
        kind = kind or "unet"
        fields = dict(model="unet", cond="all", flip=name != "mnist", t_mean=-0.4, steps=2000, batch=64, warmup=100,
                      ema=0.995, report=50, preview=500)
    elif res >= 128:  # at 256: JiT-B/16 with patches that overlap, about 115M parameters
        fields |= dict(width=768, depth=12, heads=12, optimizer="adamw", lr=2e-4, batch=128, steps=160_000,
                       warmup=2000, cooldown=0.0, ema=0.9999, report=50, preview=2000)
    elif res > 32:
        fields |= dict(width=384, depth=8, heads=6, batch=64, lr=1e-3, steps=20_000, warmup=500, ema=0.999, report=50,
                       preview=1000)
    if kind == "unet":
        return fields | dict(width=32, depth=2, heads=4, optimizer="adamw", lr=2e-3)
    patch, stride = fitting_patches(res, res // 16 if res >= 128 else res // 8)
    return fields | dict(patch=patch, stride=stride)


def fitting_patches(res, patch):
    """(patch, stride) that tile the picture: a patch of about the given size, and of it about three quarters, rather
    more than less, for speed."""
    pairs = [(p, s) for p in range(1, 2 * patch) for s in model.strides_that_fit(res, p)]
    return min(pairs, key=lambda pair: (abs(pair[0] / patch - 1) + abs(pair[1] / pair[0] - 0.75), -pair[1]))


CHOICES = {"predict": ["x", "e", "v"], "loss": ["x", "e", "v"], "path": fm.PATHS, "time": ["logit-normal", "uniform"],
           "model": model.KINDS, "norm": model.NORMS, "attention": model.ATTENTION, "optimizer": ["muon", "adamw"]}
# The least that a number may be, and the most, other than 1 and a billion (if it is whole) or 0 and 1e38.
LIMITS = {"res": (8, 10**4), "seed": (0, 2**63 - 1), "warmup": (0, 10**9)}
LIMITS |= {"lr": (1e-9, 1e38), "clip": (1e-9, 1e38), "t_mean": (-1e38, 1e38)}
LIMITS |= dict.fromkeys(("cooldown", "ema", "drop", "cover"), (0, 1))
# If any of these changed, a checkpoint's weights would mean something else, or not fit.
FIXED = "data res predict path model patch stride width depth heads norm optimizer cond".split()
PREVIEW_PICTURES, PREVIEW_STEPS, HELD_OUT_PICTURES = 16, 20, 200


def parse(argv):
    """Command line -> (given fields, resume, bench). The flags and their help are Config and its comments."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = data.refuse
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config).replace("%", "%%"), re.M))
    for field in dataclasses.fields(Config):
        how = dict(type=field.type, choices=CHOICES.get(field.name), metavar=field.name.upper())
        if field.type in (int, float):
            usual = (1, 10**9) if field.type is int else (0, 1e38)
            how["type"] = data.between(field.type, *LIMITS.get(field.name, usual))
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument("--" + field.name.replace("_", "-"), help=f"{helps[field.name]} [{field.default}]", **how)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--bench", action="store_true", help="time the training step instead of training")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, n=1)
        data.refuse(f"no flag {unknown[0]}; did you mean {near[0] if near else '--help'}?")
    given = vars(args)
    return given, given.pop("resume", False), given.pop("bench", False)


def resolve(given):
    """The given fields over the preset's over Config's. Refuses what cannot work."""
    name = given.get("data", Config.data)
    res = given.get("res", data.usual_res(name))
    config = Config(**{"res": res, **preset(name, res, given.get("model")), **given})
    config.out = config.out or str(data.folder(name, res))
    for place in filter(Path.is_file, [Path(config.out), *Path(config.out).parents]):
        data.refuse(f"--out {config.out}: {place} is a file")
    if (config.model == "mlp") != (name in data.POINTS):
        data.refuse(f"--model {config.model} --data {name}: mlp is for points, transformer and unet are for pictures")
    of_networks = {"patch", "stride", "width", "depth", "heads", "norm", "attention"}
    for unknown in of_networks & given.keys() - inspect.signature(model.KINDS[config.model]).parameters.keys():
        data.refuse(f"--{unknown} means nothing to --model {config.model}")
    return config


def network(config, labels=0):
    """What model.build needs: those fields of Config that the network has a parameter for. labels: how many."""
    fields = vars(config) | dict(channels=data.channels(config.data), labels=labels)
    wanted = inspect.signature(model.KINDS[config.model]).parameters
    return dict(kind=config.model) | {name: fields[name] for name in wanted if name in fields}


# ---------------------------------------------------------------------------------------------------------------
# What goes into a step


def batch(config, images, labels, step, rank, world, device):
    """One process's share of a step: x, e, t, y and jitter, a pure function of (seed, step, rank).

    images, labels: the dataset's arrays; labels, (N,) or (N, K), are -1 where there is none, and y also where hidden.
    """
    n = config.batch // world
    g = torch.Generator(device).manual_seed(data.key(config.seed, data.BATCH, step, rank))
    train, _ = data.split(len(images))
    chosen = train[data.batch_indices(len(train), config.batch, step, config.seed).reshape(world, n)[rank]]
    x = data.to_tensor(images[chosen], device)
    if config.flip and x.dim() == 4:
        x = torch.where(torch.rand(n, 1, 1, 1, generator=g, device=device) < 0.5, x, x.flip(3))
    e = torch.randn(x.shape, generator=g, device=device)
    if config.ot:
        e = fm.ot_pair(x, e, config.ot_block)
    mean = config.t_mean if config.time == "logit-normal" else None
    t = fm.sample_t(n, mean, cover=config.cover, generator=g, device=device)
    y = data.send(labels[chosen], device)
    y[torch.rand(n, generator=g, device=device) < config.drop] = -1  # a coin for each sample
    jitter = config.jitter * torch.randn(x.shape, generator=g, device=device) if config.jitter else None
    return x, e, t, y, jitter


def cooldown_start(config):
    return config.steps - int(config.cooldown * config.steps)


def learning_rate(config, step):
    """Linear warm-up, constant, linear cool-down."""
    up = min(1, (step + 1) / (config.warmup + 1))
    down = min(1, (config.steps - step) / (config.steps - cooldown_start(config) + 1))
    return config.lr * up * down


def make_optimizers(net, config):
    """AdamW alone, or Muon for the matrices inside the blocks and AdamW for the rest.

    Muon (Jordan et al. 2024; torch.optim.Muon) replaces a matrix's mean gradient by the nearest orthogonal matrix, so
    that all its directions learn at one pace. Scaled to the size of AdamW's steps, both share a learning rate. In
    short runs it gets as far as AdamW in about half the steps. Three iterations towards the orthogonal matrix do here
    what the usual five do.
    """
    rest = dict(net.named_parameters())
    matrices = [name for name, w in rest.items() if w.ndim == 2 and "blocks." in name and "modulation" not in name]
    matrices = [rest.pop(name) for name in matrices if config.optimizer == "muon"]
    optimizers = [torch.optim.AdamW(rest.values(), betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", ns_steps=3))
    return optimizers  # each step sets their learning rate and weight decay


@torch.no_grad()
def held_out(net, config, images, labels, device):
    """Loss on held-out data in ten bins of t from noise to data; the same data and noise each time. All bins count the
    same, unlike in training, and --ot pairs nothing here: compare held-out losses with one another."""
    n = 1000 if config.data in data.POINTS else HELD_OUT_PICTURES
    chosen = np.resize(data.split(len(images))[1], n)  # a tiny dataset repeats itself
    x, y = data.to_tensor(images[chosen], device), data.send(labels[chosen], device)
    e = torch.randn(x.shape, generator=torch.Generator().manual_seed(data.key(0, data.HELD_OUT, 1)))
    t = (torch.arange(len(x), device=device) + 0.5) / len(x)
    net = sample.batched(net, 50)
    with sample.autocast(device, config.bf16):
        losses = fm.loss(net, x, e.to(device), t, y, config.predict, config.loss, fm.PATHS[config.path])
    return [part.mean().item() for part in losses.tensor_split(10)]


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def save(path, checkpoint):
    """Replaces path whole or not at all: a kill or a full disk leaves the old file. Refuses broken weights."""
    if not all(w.isfinite().all() for w in checkpoint["weights"].values()):
        data.refuse(f"the weights are no longer finite; {path} is left as it was; try a lower --lr", status=1)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        part.unlink(missing_ok=True)
        data.refuse(f"could not write {path} ({error}); what was there before is untouched", status=1)


def resume_from(given):
    """(checkpoint, config): the one in the run's folder, its config changed by the given fields.

    More --steps move the cool-down, so a run whose learning rate has already begun to fall goes back to stable.pt,
    saved at the moment before it did. So k steps and then n - k more are the same as n steps at once, to the bit.
    """
    out = Path(given.get("out") or resolve(given).out)
    last = sample.read_checkpoint(out / "ckpt.pt")
    if last["config"].keys() - vars(Config()):
        data.refuse(f"{out / 'ckpt.pt'} is of another version of this program; start anew: --out DIR")
    was, done = Config(**last["config"]), last["step"]
    config = dataclasses.replace(was, **{**given, "out": str(out)})
    for field in FIXED:
        if getattr(config, field) != getattr(was, field):
            data.refuse(f"--{field} {getattr(config, field)}: {out} was trained with {getattr(was, field)!r}; leave "
                        f"the flag out (with --out {out}), or start anew: --out DIR")
    if done >= config.steps:
        data.refuse(f"{out} is at step {done} already; to train longer, ask for more: --steps {2 * done}")
    fell, falls = cooldown_start(was), cooldown_start(config)
    same = (config.steps, config.cooldown) == (was.steps, was.cooldown)
    if same or done <= min(fell, falls):  # until it falls, the rate does not depend on --steps
        return last, config
    stable = out / "stable.pt"
    if stable.exists() and (earlier := sample.read_checkpoint(stable))["step"] <= falls:
        return earlier | {"ahead": done}, config
    data.refuse(f"in {out} the rate has begun to fall, and there is no {stable} from before step {falls}, where it "
                f"would now: ask for more --steps or less --cooldown, or start anew: --out DIR")


def set_aside(out):
    """A new run never overwrites an old one: what lies in its place moves to out/before-1, or -2, ..."""
    ours = ("ckpt*.pt", "stable.pt", "log.csv", "w2.csv", "loss.png", "samples")
    old = [path for name in ours for path in out.glob(name)]
    if old:
        place = next(p for p in (out / f"before-{i}" for i in range(1, 1_000_000)) if not p.exists())
        place.mkdir()
        for path in old:
            path.rename(place / path.name)
        print(f"{out} held an earlier run; it is now in {place}")


COLUMNS = ["step", "loss", "lr", "samples_s", "held_out", *(f"t{i}" for i in range(10))]


def write_log(out, rows):
    """log.csv and its picture. What a kill leaves half written is written again: the checkpoint has the rows, too."""
    with open(out / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *([row.get(name) for name in COLUMNS] for row in rows)])
    curves = {name: [(row["step"], row[column]) for row in rows if column in row]
              for name, column in (("training loss", "loss"), ("held-out loss, all t alike", "held_out"))}
    data.plot({name: tuple(zip(*curve)) for name, curve in curves.items() if curve}, "step").save(out / "loss.png")


def preview(ema, config, images, labels, device):
    """A picture of samples, always from the same noise (and held-out labels), so that previews can be compared."""
    n = 2000 if config.data in data.POINTS else PREVIEW_PICTURES
    y = data.send(labels[np.resize(data.split(len(images))[1], n)], device)
    e = sample.noise(n, sample.shape_of(vars(config)), seed=0).to(device)
    x, _ = sample.generate(ema, vars(config), e, PREVIEW_STEPS, y=y)
    return sample.draw(x, vars(config))


def wasserstein(ema, config, device):
    """How far samples are from fresh data, by number of Euler steps: exact W2 on 2,048 points (claims of straighter
    paths are claims about few steps). Returns {steps: W2}; 0 steps stands for the floor, data against data."""
    fresh, other = (data.points(config.data, 2048, data.key(1, data.HELD_OUT, i)) for i in range(2))
    e = sample.noise(2048, (2,), seed=1).to(device)
    clouds = {0: other} | {k: sample.generate(ema, vars(config), e, k)[0].cpu() for k in (1, 2, 4, 10, 100)}
    with ThreadPoolExecutor() as pool:  # scipy's assignment releases the GIL
        return dict(zip(clouds, pool.map(lambda cloud: fm.w2(fresh, cloud), clouds.values())))


def bench(config, sizes, train_step, device, world):
    """Times the training step."""
    from torch.utils.benchmark import Timer  # only here, since it takes long to import

    calls = 10 if device.type == "cuda" else 1  # in a row, so that a GPU's queue stays filled

    def seconds(f):
        """Median time of a call over five repeats, each after a warm-up. As many on every process: they wait for
        one another in each step."""
        timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        return np.median([timer.timeit(calls).mean for _ in range(5)])

    step = seconds(lambda: train_step(0))
    memory = torch.cuda.max_memory_allocated() / 2**30
    with torch.device("meta"), FlopCounterMode(display=False) as counter:  # shapes without numbers, to count
        model.build(**sizes)(torch.empty(1, *sample.shape_of(vars(config))), torch.empty(1))
    flop = 3 * counter.get_total_flops()  # the backward pass costs two forward passes
    rate = config.batch / step * flop
    print(f"{step * 1e3:.1f} ms/step  {config.batch / step:,.1f} samples/s  {flop / 1e9:.3f} GFLOP/sample  "
          f"{rate / 1e9:,.0f} GFLOP/s")
    n = 8192 if device.type == "cuda" else 2048
    for kind in (torch.float32, torch.bfloat16)[: 1 + sample.has_bf16(device)]:
        a = torch.randn(n, n, dtype=kind, device=device)
        top = 2 * n**3 / seconds(lambda: a @ a) * world
        print(f"  {rate / top:.0%} of a plain {kind} matrix product's {top / 1e9:,.0f} GFLOP/s".replace("torch.", ""))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name()
        mfu = [f"MFU {rate / world / peak / 1e12:.1%} of {peak} TFLOP/s (datasheet)"
               for name, peak in PEAK_TFLOPS.items() if name in gpu]
        print(f"  {gpu}", *mfu, f"peak memory {memory:.1f} GiB", sep="  ")


# Dense bf16 with float32 sums, from the makers' datasheets.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 5090": 209, "RTX 4090": 165, "RTX 3090": 71}


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(argv=None):
    """Trains, or times (--bench), as the command line says; returns the averaged network."""
    given, resume, bench_only = parse(argv)
    checkpoint, config = resume_from(given) if resume else ({"step": 0, "log": []}, resolve(given))
    # torchrun says how many processes there are and which one this is, of all and on its machine.
    world = int(os.environ.get("WORLD_SIZE", 1))
    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    if rank > 0:  # only the first process speaks
        sys.stdout = open(os.devnull, "w")
    device = sample.pick_device(config.device)
    if config.batch % world:
        data.refuse(f"--batch {config.batch} does not split evenly over {world} processes")
    try:
        with torch.device("meta"):  # before anything slow: do the sizes go together?
            model.build(**network(config))
    except (ValueError, RuntimeError) as error:  # the latter for a size that no memory has
        data.refuse(str(error))

    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", local)
            torch.cuda.set_device(device)
        # Hours, because the other processes wait while one packs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    if config.model == "mlp" and device.type == "cpu":
        torch.set_num_threads(1)  # its layers take microseconds, sharing one among threads takes longer

    if local > 0:
        dist.barrier()  # while the first process of this machine packs
    if config.download and config.data in data.OFFICIAL:
        data.download(config.data, Path(config.root))
    images, labels, label_names = data.load(config.data, config.root, config.res)
    if world > 1 and local == 0:
        dist.barrier()
    labels, label_names = data.choose_labels(labels, label_names, config.cond)
    if resume and (label_names, len(images)) != (checkpoint["label_names"], checkpoint["n"]):
        data.refuse(f"the data, or their labels, are no longer those of {config.out}; start anew: --out DIR")
    torch.manual_seed(config.seed)
    sizes = network(config, len(label_names))
    net = model.build(**sizes).to(device)
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizers = make_optimizers(net, config)
    if resume:
        states = checkpoint["weights"], checkpoint["ema"], *checkpoint["optimizers"]
        for part, state in zip((net, ema, *optimizers), states):
            part.load_state_dict(state)
    weights, averaged = list(net.parameters()), list(ema.parameters())
    # All buffers are constants, so the processes need not exchange them.
    fast = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False) if world > 1 else net
    if config.compile or (config.compile is None and device.type == "cuda"):
        fast = torch.compile(fast)

    def train_step(step):
        """The whole method. Returns the loss as a tensor: reading it would make the CPU wait."""
        x, e, t, y, jitter = batch(config, images, labels, step, rank, world, device)
        with sample.autocast(device, config.bf16):
            loss = fm.loss(fast, x, e, t, y, config.predict, config.loss, fm.PATHS[config.path], jitter)
        if config.cover and config.time != "uniform":
            loss = loss * fm.importance(t, config.t_mean, config.cover)
        loss = loss.mean()
        net.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, config.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.update(lr=learning_rate(config, step), weight_decay=config.decay)
            optimizer.step()
        # The average forgets the first weights fast: its memory grows with the run, up to 1 / (1 - ema) steps.
        with torch.no_grad():
            torch._foreach_lerp_(averaged, weights, 1 - min(config.ema, (1 + step) / (10 + step)))
        return loss.detach()

    out, first, rows = Path(config.out), checkpoint["step"], checkpoint["log"]

    def keep(name, step):
        save(out / name, {"step": step, "config": vars(config), "net": sizes, "label_names": label_names, "log": rows,
                          "n": len(images), "weights": net.state_dict(), "ema": ema.state_dict(),
                          "optimizers": [optimizer.state_dict() for optimizer in optimizers]})

    print(*(f"{name}={value}" for name, value in vars(config).items()))
    print(f"{sum(w.numel() for w in weights) / 1e6:.2f}M parameters on {world} x {device.type}", flush=True)
    if bench_only:
        return bench(config, sizes, train_step, device, world)

    if rank == 0:
        if not resume:
            set_aside(out)
        if "ahead" in checkpoint:  # ckpt.pt is ahead of the state that we go on from; it may be wanted
            shutil.copyfile(out / "ckpt.pt", out / f"ckpt-{checkpoint['ahead']}.pt")
        data.check_writable(out / "samples")
    stop = []  # the signal that asked us to
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    total, reported, began, started = torch.zeros((), device=device), first, time.perf_counter(), time.perf_counter()
    for step in range(first, config.steps):
        if rank == 0 and step == cooldown_start(config):
            keep("stable.pt", step)
        total += train_step(step)
        done = step + 1
        signalled = torch.tensor(max(stop, default=0))
        if world > 1:
            dist.all_reduce(signalled, dist.ReduceOp.MAX)  # between CPUs; so that all leave after the same step
        milestone = done == config.steps or (done % config.preview == 0 and not signalled)
        if rank == 0 and (milestone or signalled or done % config.report == 0):
            # The one place where the CPU waits for the device (but for --ot). The loss is of this process's share.
            loss = total.item() / (done - reported)
            rate = (done - reported) * config.batch / (time.perf_counter() - began)
            rows.append({"step": done, "loss": loss, "lr": learning_rate(config, step), "samples_s": rate})
            left = timedelta(seconds=round((config.steps - done) * config.batch / rate))
            print(f"step {done:>6,}/{config.steps:,}  loss {loss:.4f}  {rate:,.0f} samples/s  ETA {left}", flush=True)
            if milestone:
                bins = held_out(ema, config, images, labels, device)
                rows[-1] |= {"held_out": sum(bins) / 10} | {f"t{i}": b for i, b in enumerate(bins)}
                print(f"held-out loss {rows[-1]['held_out']:.4f}", flush=True)
            if not np.isfinite(list(rows[-1].values())).all():
                data.refuse(f"the loss is no longer finite at step {done}; try a lower --lr", status=1)
            if milestone or signalled:
                keep("ckpt.pt", done)
                write_log(out, rows)
            if milestone:
                preview(ema, config, images, labels, device).save(out / "samples" / f"{done:06d}.png")
            total.zero_()
            reported, began = done, time.perf_counter()
        if signalled:
            break
    if world > 1:
        dist.barrier()  # torchrun ends all when one ends by a signal, even one that still saves
        dist.destroy_process_group()
    if done < config.steps:
        print(f"stopped after step {done:,} and saved; the same command with --resume goes on")
        sys.exit(128 + int(signalled))
    print(f"{time.perf_counter() - started:.0f} s; weights, log and pictures are in {out}/")
    if rank == 0 and config.data in data.POINTS:
        distances = wasserstein(ema, config, device)
        np.savetxt(out / "w2.csv", list(distances.items()), "%g", ",", header="euler_steps,w2", comments="")
        print(f"W2 to fresh data: {distances.pop(0):.3f} from other fresh data; from samples by Euler steps:",
              *(f"{k}: {d:.3f}" for k, d in distances.items()))
    return ema


if __name__ == "__main__":
    data.run(main)
