"""The networks, every part by hand. All take (z, t, y=None) and return a tensor shaped as z.

What the output means (x, e or v) is decided in fm.py; here it is only numbers. Shapes in the right-hand column:
B batch, N tokens, D width, H heads, d = D/H, P = C * patch^2 numbers in a patch.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def zeroed(layer):
    """The layer with all weights 0: what it adds to the network is nothing at the start."""
    for w in layer.parameters():
        nn.init.zeros_(w)
    return layer


# ---------------------------------------------------------------------------------------------------------------
# Time


def sinusoidal(t, dim, max_period=10000.0):
    """(B,) -> (B, dim): sines and cosines of t at geometrically spaced frequencies (Vaswani et al. 2017, 3.5).

    t in [0, 1] is stretched by 1000, so that the fastest wave turns many times over the unit interval.
    """
    frequency = torch.exp(-math.log(max_period) / (dim // 2) * torch.arange(dim // 2, device=t.device))
    angle = 1000 * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Labels(nn.Module):
    """Label(s) -> a vector to add to time's: a learned row for each label, and one for "no label", y = -1."""

    def __init__(self, labels, dim):
        super().__init__()
        # About as large as time's vector varies. With rows of 0.02, training took long to notice the labels at all.
        self.rows = nn.Parameter(0.2 * torch.randn(labels + 1, dim)) if labels else None

    def forward(self, y):
        if self.rows is None:
            return 0
        if y is None:
            return self.rows[-1]
        if y.dim() == 1:
            return self.rows[y]  # -1 is the last row
        some = (y >= 0).all(1, keepdim=True)  # (B, 1); multi-hot y are (B, K), all -1 where there is no label
        return torch.where(some, y.to(self.rows.dtype) @ self.rows[:-1], self.rows[-1])  # (B, D)


# ---------------------------------------------------------------------------------------------------------------
# MLP, for points


class MLP(nn.Module):
    """[z, t] -> as z. Time is one more input number."""

    def __init__(self, dim=2, width=64, depth=3):
        super().__init__()
        hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(dim + 1, width), nn.SiLU(), *hidden, nn.Linear(width, dim))

    def forward(self, z, t, y=None):
        return self.net(torch.cat([z, t[:, None]], dim=1))


# ---------------------------------------------------------------------------------------------------------------
# Pictures <-> tokens


def strides_that_fit(res, patch):
    """Strides that tile res exactly with patches, gaps excluded."""
    return [s for s in range(1, patch + 1) if patch <= res and (res - patch) % s == 0]


def check_stride(res, patch, stride):
    """Raises ValueError, naming the nearest strides that fit, unless patches at this stride tile the picture."""
    fitting = strides_that_fit(res, patch)
    if stride not in fitting:
        near = sorted(sorted(fitting, key=lambda s: abs(s - stride))[:2])
        raise ValueError(f"stride {stride} does not fit patch {patch} at res {res}: patch is at most res, stride at "
                         f"most patch, and res - patch a multiple of stride; nearest that fit: "
                         f"{', '.join(map(str, near)) or 'none'}")


def patchify(z, patch, stride):
    """Cuts pictures into patches, overlapping where stride < patch."""
    return F.unfold(z, patch, stride=stride).transpose(1, 2)  # (B, C, H, W) -> (B, N, P)


def unpatchify(patches, res, patch, stride):
    """Puts patches back, averaging where they overlap.

    fold adds up what overlaps, so a pixel covered four times would come out four times as bright: hence the
    division by the normalisation mask, the fold of ones, which says how many patches cover each pixel.
    """
    ones = torch.ones_like(patches[:1, :, : patch**2])  # as of one picture with one channel
    total, mask = (F.fold(p.transpose(1, 2), res, patch, stride=stride) for p in (patches, ones))
    return total / mask  # (B, C, H, W) / (1, 1, H, W)


# ---------------------------------------------------------------------------------------------------------------
# Position


def angles(side, dim, base):
    """Row and column of each token, centred on 0, times dim / 4 frequencies from 1 down to almost 1 / base."""
    r = torch.arange(side) - (side - 1) / 2
    frequency = base ** -(torch.arange(dim // 4) / (dim // 4))
    return torch.cartesian_prod(r, r)[:, :, None] * frequency  # (N, 2, dim/4)


def position_table(side, dim):
    """Fixed sine-cosine embedding of (row, column), added to the tokens once: a quarter of the width per wave."""
    angle = angles(side, dim, base=10000.0)  # (N, 2, D/4)
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1)  # (N, D)


def rope_table(side, dim):
    """2-D rotary positions (Su et al. 2021, arXiv 2104.09864, once per axis): cos and sin for `rope`.

    Of the d/2 pairs in a head, half turn with the row, half with the column; 100 as the base, not 10,000, because
    a picture is some 20 tokens wide, not thousands.
    """
    angle = angles(side, dim, base=100.0).flatten(1)  # (N, 2, d/4) -> (N, d/2)
    cos, sin = angle.cos().repeat(1, 2), torch.cat([-angle.sin(), angle.sin()], dim=1)
    return cos[:, None], sin[:, None]  # (N, 1, d) each


def rope(q, cos, sin):
    """Rotates each pair (q_i, q_{i + d/2}) by its token's angle, so that q . k depends only on where the one token
    lies relative to the other."""
    return q * cos + q.roll(q.shape[-1] // 2, dims=-1) * sin  # (B, N, H, d)


# ---------------------------------------------------------------------------------------------------------------
# Parts of the transformer. The layers that see every token carry no bias: it costs a pass over them each way.


def inverse_rms(z, eps=1e-6):
    """1 / sqrt(mean(z^2)) over the last axis, summed in float32."""
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True, dtype=torch.float32)
    return (norm.square() / z.shape[-1] + eps).rsqrt().to(z.dtype)


class RMSNorm(nn.Module):
    """weight * z / rms(z) (Zhang & Sennrich 2019, arXiv 1910.07467), times the caller's scale: multiplied with the
    weight first, it costs no pass over the tokens of its own."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, z, scale=1.0):
        return z * inverse_rms(z) * (self.weight * scale).to(z.dtype)


class Derf(nn.Module):
    """gamma * erf(alpha z + s) + beta in RMSNorm's place: squashes each number by itself, no statistics over the
    token (Chen et al. 2025, arXiv 2512.10938). alpha and s are one learned number each."""

    def __init__(self, dim):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(0.5))
        self.s = nn.Parameter(torch.tensor(0.0))
        self.gamma = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, z, scale=1.0):
        squashed = torch.erf(self.alpha.to(z.dtype) * z + self.s.to(z.dtype))
        return (self.gamma * scale).to(z.dtype) * squashed + (self.beta * scale).to(z.dtype)


NORMS = {"rms": RMSNorm, "derf": Derf}


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, written out."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, H, N, N)
    return scores.softmax(dim=-1) @ v  # (B, H, N, d)


def attend_fastest(q, k, v):
    """torch's fused attention computes the same without storing the N x N scores (FlashAttention): by far the faster
    one on a GPU. But on CPUs its backward pass in bfloat16 takes several times as long as ours."""
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return attend(q, k, v) if slow else F.scaled_dot_product_attention(q, k, v)


ATTENTION = {"auto": attend_fastest, "fused": F.scaled_dot_product_attention, "hand": attend}


class Attention(nn.Module):
    """Each token asks (q), offers (k) and tells (v); side x side tokens."""

    def __init__(self, side, dim, heads, attention):
        super().__init__()
        if dim % heads or dim // heads % 4:
            raise ValueError(f"width {dim} (UNet: times 4) must split into {heads} heads of 4, 8, ... numbers each")
        self.heads, self.attention = heads, attention
        self.q, self.k, self.v, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        # Buffers move with the network; these are not saved with it.
        self.cos, self.sin = (nn.Buffer(table, persistent=False) for table in rope_table(side, dim // heads))

    def forward(self, z):
        q, k, v = (f(z).unflatten(2, (self.heads, -1)) for f in (self.q, self.k, self.v))  # (B, N, H, d) each
        # QK-norm bounds the scores by sqrt(d), so that no softmax saturates (Henry et al. 2020, arXiv 2010.04245).
        cos, sin = self.cos.to(q.dtype), self.sin.to(q.dtype)
        q = rope(q * inverse_rms(q), cos, sin)
        k = rope(k * inverse_rms(k), cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, N, d) each
        mixed = ATTENTION[self.attention](q, k, v)  # (B, H, N, d)
        return self.out(mixed.transpose(1, 2).flatten(2))  # (B, N, D)


class SwiGLU(nn.Module):
    """A feed-forward layer with a gate that is itself computed (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim):
        super().__init__()
        hidden = max(1, round(dim * 8 / 3 / 64)) * 64  # three matrices of 8/3 D cost as much as the usual two of 4 D
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, z):
        return self.down(F.silu(self.gate(z)) * self.up(z))  # (B, N, D)


class Block(nn.Module):
    """Time (and label) scale what enters each branch and gate what leaves it (adaLN-Zero, Peebles & Xie 2022,
    arXiv 2212.09748). There is no shift: RMSNorm has none either."""

    def __init__(self, side, dim, heads, norm, attention):
        super().__init__()
        self.norm1, self.attention = NORMS[norm](dim), Attention(side, dim, heads, attention)
        self.norm2, self.swiglu = NORMS[norm](dim), SwiGLU(dim)
        # All gates closed: at the start every block passes z on unchanged; a deep network trains like a shallow one.
        self.modulation = zeroed(nn.Linear(dim, 4 * dim))

    def forward(self, z, c):
        scale1, gate1, scale2, gate2 = self.modulation(c)[:, None].chunk(4, dim=-1)  # (B, 1, D) each
        z = z + gate1 * self.attention(self.norm1(z, 1 + scale1))  # (B, N, D)
        return z + gate2 * self.swiglu(self.norm2(z, 1 + scale2))  # (B, N, D)


class Transformer(nn.Module):
    """Pictures as sequences of overlapping patches, straight from the pixels ("Just image Transformer", Li & He
    2025, arXiv 2511.13720)."""

    def __init__(self, res, channels=3, patch=16, stride=12, width=768, depth=12, heads=12, norm="rms",
                 attention="auto", labels=0, bottleneck=128):
        super().__init__()
        check_stride(res, patch, stride)
        self.res, self.patch, self.stride = res, patch, stride
        side = (res - patch) // stride + 1
        P = channels * patch**2
        # Through 128 numbers a patch: natural patches need no more, and noise cannot all pass (JiT, section 4.3).
        self.embed = nn.Sequential(nn.Linear(P, bottleneck, bias=False), nn.Linear(bottleneck, width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = Labels(labels, width)
        self.blocks = nn.ModuleList([Block(side, width, heads, norm, attention) for _ in range(depth)])
        self.norm = NORMS[norm](width)
        # Start from "grey" rather than from random pixels; Derf's paper keeps the usual start.
        self.head = zeroed(nn.Linear(width, P)) if norm == "rms" else nn.Linear(width, P)
        self.position = nn.Buffer(position_table(side, width), persistent=False)

    def forward(self, z, t, y=None):
        c = F.silu(self.time(sinusoidal(t, 256)) + self.labels(y))  # (B, D)
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
    """GroupNorm, SiLU, convolution, twice. Time (and label) scale and shift what the second norm gives ("adaptive
    group norm", Dhariwal & Nichol 2021, arXiv 2105.05233)."""

    def __init__(self, a, b, dim):
        super().__init__()
        self.norm1, self.conv1 = group_norm(a), nn.Conv2d(a, b, 3, padding=1)
        # At the start the block is its shortcut, scale and shift are 0: time is let in only as far as it helps.
        self.norm2, self.conv2 = group_norm(b), zeroed(nn.Conv2d(b, b, 3, padding=1))
        self.modulation = zeroed(nn.Linear(dim, 2 * b))
        self.shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, h, c):
        scale, shift = self.modulation(c)[:, :, None, None].chunk(2, dim=1)  # (B, b, 1, 1) each
        r = self.conv1(F.silu(self.norm1(h)))  # (B, a, R, R) -> (B, b, R, R)
        r = self.conv2(F.silu(self.norm2(r) * (1 + scale) + shift))  # (B, b, R, R)
        return self.shortcut(h) + r


class Level(nn.Sequential):
    """Residual blocks in a row; the first goes from a to b channels."""

    def __init__(self, a, b, dim, depth):
        super().__init__(*(ResBlock(b if i else a, b, dim) for i in range(depth)))

    def forward(self, h, c):
        for block in self:
            h = block(h, c)
        return h


class UNet(nn.Module):
    """Down to a quarter of the resolution, where attention is affordable, and up again; on the way up each level
    sees what the same level knew on the way down, so that detail need not pass through the bottom."""

    def __init__(self, res, channels=1, width=32, depth=2, heads=4, attention="auto", labels=0):
        """depth: residual blocks per level, on the way down and again on the way up."""
        super().__init__()
        if res % 4 or width % 16:
            raise ValueError(f"res {res} must be a multiple of 4 (the UNet halves it twice), and width {width} of 16 "
                             f"(the channels in a group of its norms)")
        W, D = width, 4 * width
        self.time = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.labels = Labels(labels, D)
        self.embed = nn.Conv2d(channels, W, 3, padding=1)
        self.down1 = Level(W, W, D, depth)
        self.down2 = Level(W, 2 * W, D, depth)
        self.down3 = Level(2 * W, 4 * W, D, depth)
        self.norm3, self.attention = group_norm(4 * W), Attention(res // 4, 4 * W, heads, attention)
        self.up3 = Level(4 * W, 4 * W, D, depth)
        self.up2 = Level(2 * W + 2 * W, 2 * W, D, depth)  # from below, and from the way down
        self.up1 = Level(W + W, W, D, depth)
        # A 1x1 convolution before the upsampling gives what it would give after it, at a quarter of the cost.
        self.grow2 = nn.Sequential(nn.Conv2d(4 * W, 2 * W, 1), nn.Upsample(scale_factor=2))
        self.grow1 = nn.Sequential(nn.Conv2d(2 * W, W, 1), nn.Upsample(scale_factor=2))
        self.norm, self.head = group_norm(W), zeroed(nn.Conv2d(W, channels, 3, padding=1))
        # A pixel's channels lie side by side in memory, the order in which convolutions read them; features take
        # over the layout of the weights. This takes a quarter off the step on a CPU.
        self.to(memory_format=torch.channels_last)

    def forward(self, z, t, y=None):
        c = F.silu(self.time(sinusoidal(t, 256)) + self.labels(y))  # (B, D)
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


KINDS = {"mlp": MLP, "transformer": Transformer, "unet": UNet}


def build(kind, **sizes):
    """A network from plain numbers and strings, so that a checkpoint can rebuild its own. ValueError: sizes that
    do not fit together."""
    return KINDS[kind](**sizes)
