"""The networks, written out from torch's basic layers. All take (z, t, y=None, length=None) and return a tensor shaped
as z.

What the output means (x, e or v) is decided in fm.py; here it is only numbers. Shapes are in the comments:
B batch, N tokens, D width, H heads (but in (B, C, H, W) the height), d = D/H, P = C * patch^2 numbers in a patch.
"""

import math
import os
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F


def zeroed(layer):
    """The layer with all its weights 0, so that at the start it adds nothing."""
    for w in layer.parameters():
        nn.init.zeros_(w)
    return layer


# ---------------------------------------------------------------------------------------------------------------
# Time, labels, and how long a step is


def sinusoidal(t, dim, max_period=10000.0):
    """(B,) -> (B, dim): cosines and sines of t at geometrically spaced frequencies (Vaswani et al. 2017, arXiv
    1706.03762, section 3.5). t in [0, 1] is multiplied by 1000, so that the fastest wave tells nearby times apart."""
    frequency = torch.exp(-math.log(max_period) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angle = 1000 * t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=1)  # (B, dim)


HIDDEN = -1  # as a label: "no label given". As an index, the last row


class Condition(nn.Module):
    """What the network is told beside z, as one vector c for each sample, (B, D).

    t: time, (B,). y: classes (B,), or attributes (B, K) of 0 and 1, of which several may hold at once; or None: no
    label given. In a batch that mixes samples with and without labels, those without have y = HIDDEN. length: that of
    a shortcut, see fm.py, (B,); None: 0, the flow itself. A network without labels or shortcuts ignores y or length.
    """

    def __init__(self, dim, labels, shortcut):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))
        # A learned row for each label, and one more for HIDDEN. A deviation of 0.2 is about the time vector's. With
        # 0.02, labels have no effect for most of a short run.
        self.rows = nn.Parameter(0.2 * torch.randn(labels + 1, dim)) if labels else None
        self.length = None
        if shortcut:
            self.length = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), zeroed(nn.Linear(dim, dim)))

    def forward(self, t, y, length):
        c = self.time(sinusoidal(t, 256))  # (B, D)
        if self.rows is not None:
            c = c + self.label(y)
        if self.length is not None:
            c = c + self.length(sinusoidal(torch.zeros_like(t) if length is None else length, 256))
        return F.silu(c)

    def label(self, y):
        null = self.rows[HIDDEN]  # (D,)
        if y is None:
            return null
        if y.dim() == 1:
            return self.rows[y]  # (B, D)
        hidden = (y == HIDDEN).all(dim=1, keepdim=True)  # (B, 1)
        return torch.where(hidden, null, y.to(null.dtype) @ self.rows[:-1])  # (B, D)


def hide(y, where):
    """The labels y with those of some samples hidden; where: bool, (B,)."""
    return torch.where(where.view(-1, *[1] * (y.dim() - 1)), HIDDEN, y)


# ---------------------------------------------------------------------------------------------------------------
# MLP, for points


class MLP(nn.Module):
    """Time is one more input number; with shortcuts, so is their length, 0 for the flow itself."""

    def __init__(self, dim=2, width=64, depth=3, shortcut=False):
        super().__init__()
        self.shortcut = shortcut
        layers = [nn.Linear(dim + 1 + shortcut, width), nn.SiLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(width, dim))

    def forward(self, z, t, y=None, length=None):
        inputs = [z, t[:, None]]
        if self.shortcut:
            inputs.append(torch.zeros_like(t)[:, None] if length is None else length[:, None])
        return self.net(torch.cat(inputs, dim=1))  # (B, dim + 1 or 2) -> (B, dim)


# ---------------------------------------------------------------------------------------------------------------
# Pictures <-> tokens


def check_stride(res, patch, stride):
    """Raises ValueError, naming the nearest strides that fit, unless patches at this stride tile the picture exactly,
    without gaps."""
    fitting = [other for other in range(1, patch + 1) if patch <= res and (res - patch) % other == 0]
    if stride in fitting:
        return
    fitting.sort(key=lambda other: abs(other - stride))
    nearest = ", ".join(str(other) for other in sorted(fitting[:2])) or "none"
    raise ValueError(f"--stride {stride} does not fit --patch {patch} at --res {res}: patch is at most res, stride at "
                     f"most patch, and res - patch a multiple of stride; nearest that fit: {nearest}")


def patchify(z, patch, stride):
    """Cuts pictures into patches, overlapping where stride < patch."""
    return F.unfold(z, patch, stride=stride).transpose(1, 2)  # (B, C, H, W) -> (B, N, P)


def unpatchify(patches, res, patch, stride):
    """Puts patches back. Where they overlap it takes their mean, in which a patch counts less towards its rim, so that
    one fades into the next and no edge shows.

    fold adds up what overlaps, which would make it brighter. So the sum is divided by the normalisation mask, the
    weights folded likewise.
    """
    place = torch.arange(patch, device=patches.device)
    to_rim = torch.minimum(place, patch - 1 - place)  # 0 at both ends
    weight = (to_rim + 1).clamp(max=patch - stride + 1.0)  # (patch,); all equal if nothing overlaps
    window = torch.outer(weight, weight).flatten()  # (patch^2,)
    B, N, P = patches.shape
    weighted = (patches.view(B, N, -1, patch**2) * window).view(B, N, P)
    total = F.fold(weighted.transpose(1, 2), res, patch, stride=stride)  # (B, N, P) -> (B, C, H, W)
    mask = F.fold(window.expand(1, N, -1).transpose(1, 2), res, patch, stride=stride)  # (1, 1, H, W)
    return total / mask  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------
# Position


def angles(side, dim, base):
    """(row, column) of each token, centred on 0, each multiplied by dim/4 frequencies that fall from 1 to almost
    1/base."""
    place = torch.arange(side) - (side - 1) / 2
    frequency = base ** -(torch.arange(dim // 4) / (dim // 4))
    return torch.cartesian_prod(place, place)[:, :, None] * frequency  # (N, 2, dim/4)


def position_table(side, dim):
    """Fixed sine-cosine embedding of (row, column), added to the tokens once. A quarter of the width each: sines of
    the row, cosines of the row, sines of the column, cosines of the column."""
    angle = angles(side, dim, base=10000.0)  # (N, 2, D/4)
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)  # (N, D)


def rope_table(side, dim):
    """2-D rotary positions (Su et al. 2021, arXiv 2104.09864, once per axis): cosines and sines for `rope`.

    A head has d/2 pairs of numbers. Half of the pairs turn with the row, half with the column. The base is 100, not
    the usual 10,000: a picture is some 20 tokens wide, not thousands.
    """
    angle = angles(side, dim, base=100.0).flatten(1)  # (N, d/2): d/4 for the row, then d/4 for the column
    cos = torch.cat([angle.cos(), angle.cos()], dim=1)  # (N, d)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=1)  # (N, d)
    return cos[:, None, None], sin[:, None, None]  # (N, 1, 1, d) each: for q and k, and for all heads


def rope(q, cos, sin):
    """Rotates each pair (q_i, q_{i + d/2}) by its token's angle. Then q . k depends only on where one token lies
    relative to the other."""
    partner = q.roll(q.shape[-1] // 2, dims=-1)  # swaps the two halves
    return q * cos + partner * sin  # (..., d); sin is negative in the first half, as in a rotation matrix


# ---------------------------------------------------------------------------------------------------------------
# Parts of the transformer. h: the features of the tokens, (B, N, D). Inside the blocks, linear layers that act on
# tokens have no bias: adding it would read and write all of h once more.


def inverse_rms(h, eps=1e-6):
    """1 / sqrt(mean(h^2)) over the last axis, summed in float32."""
    norm = torch.linalg.vector_norm(h, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square() / h.shape[-1] + eps).rsqrt().to(h.dtype)


class RMSNorm(nn.Module):
    """h / rms(h) * weight * scale (Zhang & Sennrich 2019, arXiv 1910.07467). scale is the caller's, (B, 1, D); it is
    multiplied with the small weight, not with all tokens, which saves a pass over them."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, h, scale=1.0):
        return h * inverse_rms(h) * (self.weight * scale).to(h.dtype)  # (B, N, D)


class Derf(nn.Module):
    """(gamma * erf(alpha h + s) + beta) * scale, in RMSNorm's place: it squashes each number by itself and needs no
    statistics over the token (Chen et al. 2025, arXiv 2512.10938). alpha and s are one learned number each."""

    def __init__(self, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.s = nn.Parameter(torch.tensor(0.0))
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, h, scale=1.0):
        squashed = torch.erf(self.alpha.to(h.dtype) * h + self.s.to(h.dtype))
        return (self.gamma * scale).to(h.dtype) * squashed + (self.beta * scale).to(h.dtype)  # (B, N, D)


NORMS = {"rms": RMSNorm, "derf": Derf}


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, written out."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    return scores.softmax(dim=-1) @ v  # (B, H, N, d)


def attend_fastest(q, k, v):
    """torch's fused attention computes the same and never stores the N x N scores (FlashAttention). It is by far the
    faster one, except in bfloat16 on a CPU, where its backward pass takes several times as long as ours."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return attend(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


ATTENTION = {"auto": attend_fastest, "fused": F.scaled_dot_product_attention, "hand": attend}


class Attention(nn.Module):
    """Each token's query is compared with all keys, and the values are averaged by how well they match. The tokens
    come from a square of side x side."""

    def __init__(self, side, dim, heads, attention):
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise ValueError(f"--heads {heads}: a width of {dim} (in a UNet, four times --width) must split into heads "
                             f"of 4, 8, ... numbers each")
        self.heads = heads
        self.attend = ATTENTION[attention]
        self.q = nn.Linear(dim, dim, bias=False)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        cos, sin = rope_table(side, dim // heads)
        # Buffers move to a device with the network. Not persistent: they are not saved with it.
        self.cos = nn.Buffer(cos, persistent=False)
        self.sin = nn.Buffer(sin, persistent=False)

    def forward(self, h):
        # One product for all three; then q and k are normalised and turned together.
        weight = torch.cat([self.q.weight, self.k.weight, self.v.weight])  # (3D, D)
        qkv = F.linear(h, weight).unflatten(2, (3, self.heads, -1))  # (B, N, D) -> (B, N, 3, H, d)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]  # (B, N, 2, H, d), (B, N, H, d)
        # QK-norm: q and k have length sqrt(d), so the scores stay within +-sqrt(d) however large the weights grow
        # (Henry et al. 2020, arXiv 2010.04245).
        cos, sin = self.cos.to(qk.dtype), self.sin.to(qk.dtype)  # (N, 1, 1, d) each
        q, k = rope(qk * inverse_rms(qk), cos, sin).unbind(2)  # (B, N, H, d) each
        mixed = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))  # (B, H, N, d)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """A feed-forward layer in which one half gates the other (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim):
        super().__init__()
        # Three matrices of 8/3 D cost as much as the usual two of 4 D; rounded to 64, which hardware likes.
        hidden = max(1, round(dim * 8 / 3 / 64)) * 64
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, h):
        return self.down(F.silu(self.gate(h)) * self.up(h))  # (B, N, D)


class Block(nn.Module):
    """Attention, then the feed-forward layer. The time (and the label) set a scale for what enters each of the two and
    a gate for what leaves it (adaLN-Zero, Peebles & Xie 2022, arXiv 2212.09748). They set no shift, as RMSNorm has
    none."""

    def __init__(self, side, dim, heads, norm, attention):
        super().__init__()
        self.norm1 = NORMS[norm](dim)
        self.attention = Attention(side, dim, heads, attention)
        self.norm2 = NORMS[norm](dim)
        self.swiglu = SwiGLU(dim)
        # All gates start at 0: every block passes its input on unchanged, and a deep network trains like a shallow one.
        self.modulation = zeroed(nn.Linear(dim, 4 * dim))

    def forward(self, h, c):
        scale1, gate1, scale2, gate2 = self.modulation(c)[:, None].chunk(4, dim=-1)  # (B, 1, D) each
        h = h + gate1 * self.attention(self.norm1(h, 1 + scale1))  # (B, N, D)
        return h + gate2 * self.swiglu(self.norm2(h, 1 + scale2))  # (B, N, D)


class Transformer(nn.Module):
    """Pictures as sequences of patches, which may overlap, straight from the pixels ("Just image Transformer", Li & He
    2025, arXiv 2511.13720). The defaults are the sizes of the paper's JiT-B/16 for 256 pixels, with overlap."""

    def __init__(self, res, channels=3, patch=16, stride=12, width=768, depth=12, heads=12, norm="rms",
                 attention="auto", labels=0, bottleneck=128, shortcut=False):
        super().__init__()
        check_stride(res, patch, stride)
        self.res, self.patch, self.stride = res, patch, stride
        side = (res - patch) // stride + 1
        P = channels * patch**2
        # A patch first becomes 128 numbers. Where P is 768 this is a bottleneck, and natural patches pass it well (Li &
        # He 2025); with small patches it is just one more matrix.
        self.embed = nn.Sequential(nn.Linear(P, bottleneck, bias=False), nn.Linear(bottleneck, width))
        self.condition = Condition(width, labels, shortcut)
        self.blocks = nn.ModuleList(Block(side, width, heads, norm, attention) for _ in range(depth))
        self.norm = NORMS[norm](width)
        self.head = nn.Linear(width, P)
        if norm == "rms":
            zeroed(self.head)  # start from 0 (grey) rather than from random pixels; Derf's paper keeps the usual start
        self.position = nn.Buffer(position_table(side, width), persistent=False)

    def forward(self, z, t, y=None, length=None):
        c = self.condition(t, y, length)  # (B, D)
        h = self.embed(patchify(z, self.patch, self.stride))  # (B, N, D)
        h = h + self.position.to(h.dtype)
        for block in self.blocks:
            h = block(h, c)
        patches = self.head(self.norm(h)).float()  # (B, N, P); pixels are summed and averaged in float32
        return unpatchify(patches, self.res, self.patch, self.stride)  # (B, C, H, W)


# ---------------------------------------------------------------------------------------------------------------
# UNet, for small pictures (Ronneberger et al. 2015, arXiv 1505.04597; as a diffusion network: Ho et al. 2020,
# arXiv 2006.11239). W is its width and R = res: W channels at R x R, 2 W at R/2, 4 W at R/4, so that a convolution
# costs the same on each level.


def group_norm(channels):
    """16 channels a group, whatever the width (Wu & He 2018, arXiv 1803.08494, compare the choices)."""
    return nn.GroupNorm(channels // 16, channels)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice. The time (and the label) scale and shift the output of the second norm
    ("adaptive group norm", Dhariwal & Nichol 2021, arXiv 2105.05233)."""

    def __init__(self, a, b, dim):
        super().__init__()
        self.norm1 = group_norm(a)
        self.conv1 = nn.Conv2d(a, b, 3, padding=1)
        self.norm2 = group_norm(b)
        # At the start the block just passes h on, and the time has no effect.
        self.conv2 = zeroed(nn.Conv2d(b, b, 3, padding=1))
        self.modulation = zeroed(nn.Linear(dim, 2 * b))
        self.skip = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, h, c):
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)  # (B, b, 1, 1) each
        r = self.conv1(F.silu(self.norm1(h)))  # (B, a, R, R) -> (B, b, R, R)
        r = self.conv2(F.silu(self.norm2(r) * (1 + scale) + shift))  # (B, b, R, R)
        return self.skip(h) + r


class Level(nn.ModuleList):
    """Residual blocks in a row at one resolution. The first goes from a to b channels."""

    def __init__(self, a, b, dim, depth):
        super().__init__([ResBlock(a, b, dim)])
        for _ in range(depth - 1):
            self.append(ResBlock(b, b, dim))

    def forward(self, h, c):
        for block in self:
            h = block(h, c)
        return h


class UNet(nn.Module):
    """Down to a quarter of the resolution, where attention is affordable, and up again. On the way up the two
    upper levels also get what they computed on the way down, so detail need not pass through the bottom."""

    def __init__(self, res, channels=1, width=32, depth=2, heads=4, attention="auto", labels=0, shortcut=False):
        """depth: residual blocks per level, on the way down and again on the way up."""
        super().__init__()
        if res % 4 or width % 16:
            raise ValueError(f"--network unet: --res {res} must be a multiple of 4 (it is halved twice), and --width "
                             f"{width} of 16 (the channels in a group of its norms)")
        W, D = width, 4 * width
        self.condition = Condition(D, labels, shortcut)
        self.embed = nn.Conv2d(channels, W, 3, padding=1)
        self.down1 = Level(W, W, D, depth)
        self.down2 = Level(W, 2 * W, D, depth)
        self.down3 = Level(2 * W, 4 * W, D, depth)
        self.norm3 = group_norm(4 * W)
        self.attention = Attention(res // 4, 4 * W, heads, attention)
        self.up3 = Level(4 * W, 4 * W, D, depth)
        self.up2 = Level(2 * W + 2 * W, 2 * W, D, depth)  # from below, and from the way down
        self.up1 = Level(W + W, W, D, depth)
        # A 1x1 convolution before the upsampling gives what it would give after it, at a quarter of the cost.
        self.grow2 = nn.Sequential(nn.Conv2d(4 * W, 2 * W, 1), nn.Upsample(scale_factor=2))
        self.grow1 = nn.Sequential(nn.Conv2d(2 * W, W, 1), nn.Upsample(scale_factor=2))
        self.norm = group_norm(W)
        self.head = zeroed(nn.Conv2d(W, channels, 3, padding=1))
        # Store the channels of a pixel side by side, the order in which convolutions read them; features then have this
        # layout, too. It takes a quarter off the step on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, z, t, y=None, length=None):
        c = self.condition(t, y, length)  # (B, D)
        h1 = self.down1(self.embed(z), c)  # (B, W, R, R)
        h2 = self.down2(F.avg_pool2d(h1, 2), c)  # (B, 2W, R/2, R/2)
        h = self.down3(F.avg_pool2d(h2, 2), c)  # (B, 4W, R/4, R/4)
        tokens = self.norm3(h).flatten(2).transpose(1, 2)  # (B, N, 4W); every pixel attends to all others
        h = h + self.attention(tokens).transpose(1, 2).reshape(h.shape)  # (B, 4W, R/4, R/4)
        h = self.up3(h, c)  # (B, 4W, R/4, R/4)
        h = self.up2(torch.cat([self.grow2(h), h2], dim=1), c)  # (B, 2W, R/2, R/2)
        h = self.up1(torch.cat([self.grow1(h), h1], dim=1), c)  # (B, W, R, R)
        return self.head(F.silu(self.norm(h))).float().contiguous()  # (B, C, R, R)


# ---------------------------------------------------------------------------------------------------------------
# Building and loading. Errors here are for the user: a ValueError says what to change.

NETWORKS = {"mlp": MLP, "transformer": Transformer, "unet": UNet}


def build(kind, **sizes):
    """A network from plain numbers and strings, so that a checkpoint can rebuild its own. ValueError: sizes that do
    not fit together."""
    return NETWORKS[kind](**sizes)


def load(folder):
    """(network, checkpoint) from what train.py saved: the folder of a run, or a checkpoint itself. The network, on the
    CPU, has the averaged weights; the checkpoint is a dict, with the run's settings as a namespace under "config".
    ValueError: there is none, or another file."""
    file = folder if folder.is_file() else folder / "ckpt.pt"
    if not file.is_file():
        raise ValueError(f"no checkpoint {file}: train first (python train.py), or name a run's folder (train.py: "
                         f"--out DIR; sample.py: DIR, and to judge pictures --judge DIR)")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        net = build(**checkpoint["net"])
        net.load_state_dict(checkpoint["ema"])
        checkpoint["config"] = SimpleNamespace(**checkpoint["config"])
    except OSError:
        raise  # it may be readable another time
    except Exception as error:  # torch.load alone raises half a dozen kinds for a damaged file
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged, or no checkpoint of this version ({reason:.90}): try stable.pt beside "
                         f"it, or train anew, --out DIR")
    return net.eval().requires_grad_(False), checkpoint


# ---------------------------------------------------------------------------------------------------------------
# Where a network runs, and in which precision


def pick_device(name):
    """auto: a GPU if there is one, and to each process of a machine its own. ValueError: there is no such device."""
    devices = ["cpu"]
    if torch.backends.mps.is_available():
        devices.insert(0, "mps")
    if torch.cuda.is_available():
        devices.insert(0, "cuda")
    if name == "auto":
        name = devices[0]
    if name not in devices:
        raise ValueError(f"--device {name}: there is only {', '.join(devices)} here")
    if name != "cuda":
        return torch.device(name)
    _, _, local_rank = processes()
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node must be at most {torch.cuda.device_count()}, the number of GPUs here")
    return torch.device("cuda", local_rank)


def has_bf16(device):
    """Does the hardware multiply matrices in bfloat16?"""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def compiles_well(config, device):
    """Does torch.compile make this network much faster? Measured on CPUs: transformers take about two thirds of the
    time in bfloat16, where little is left but passes over memory; in float32 and for UNets nine tenths. That is not
    worth the wait."""
    return device.type == "cuda" or (config.network == "transformer" and config.bf16 and has_bf16(device))


def autocast(device, bf16):
    """Runs the network in bfloat16 if the hardware has it. Weights, the state of the ODE and fm.py's arithmetic stay
    float32 (or more)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16 and has_bf16(device))


def processes():
    """(rank, world, local rank): torchrun starts several processes (world) and tells each its number (rank), and its
    number on its machine (local rank), through the environment. Without torchrun there is one."""
    return [int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))]
