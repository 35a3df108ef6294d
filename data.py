"""Pixels in, pixels out: every dataset becomes one array; batches index it; results become pictures.

    python data.py --data celeba --res 256      packs a dataset and draws a sheet of it, without training

A source (a zip, a folder, our own drawing code) is decoded, cropped and resized once, into a uint8 array
(N, H, W, C) on disk. Training only ever maps that array into memory, so loading a batch is an index and a memcpy,
shared by all processes through the page cache; there are no loader processes to tune.
"""

import argparse
import difflib
import functools
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import signal
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

POINTS = ("moons", "8gaussians", "checkerboard", "spirals")
PICTURES = ("faces", "celeba", "mnist", "fashion", "cifar10")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FACES = 20_000  # drawn once; a three-minute run sees each a handful of times


def refuse(message, status=2):
    """Ends the program with one line and no traceback: status 2 for a mistake in its use, 1 for a failure."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def check_writable(path):
    """Before the work, not after it: a file where a folder should be, or the other way round, is a mistake."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"cannot write {path}: {error}")
    if path.exists() and path.is_dir() == bool(path.suffix):
        refuse(f"cannot write {path}: there is a {'folder' if path.is_dir() else 'file'} of that name")


def run(main):
    """Runs a program. What the system denies it, a full disk or a missing right, is told like any other failure."""
    for number in (signal.SIGINT, signal.SIGTERM):  # as an exception, so that half-written files are removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except OSError as error:
        refuse(error, status=1)


# ---------------------------------------------------------------------------------------------------------------
# Random numbers. Everything random is a pure function of a few integers (seed, purpose, step, rank, ...), so a
# resumed run needs no generator state and picture i comes out the same in any batch.

ORDER, BATCH, HELD_OUT, SAMPLE, SPLIT = range(5)  # purposes, so that no two uses share a stream


def key(*words):
    """Hashes integers into one 63-bit seed, for numpy's and torch's generators alike."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng(key(seed, ORDER, epoch)).permutation(n)


def batch_indices(n, size, step, seed):
    """Which of n samples make up batch `step`: epochs of fresh permutations, laid end to end and cut into batches.

    Returns (size,) int64. A batch may straddle two epochs (or more, if size > n), so no sample is left out.
    """
    place = np.arange(step * size, (step + 1) * size)
    epochs = np.unique(place // n)
    return np.concatenate([permutation(n, seed, epoch)[place[place // n == epoch] % n] for epoch in epochs])


# ---------------------------------------------------------------------------------------------------------------
# Points in the plane, drawn afresh for every batch, within about [-4, 5].


def points(name, n, rng):
    """n points of a toy distribution, (n, 2) float32. rng: numpy Generator."""
    if name == "moons":  # two half circles, interleaved
        angle, upper = np.pi * rng.random(n), rng.random(n) < 0.5
        p = np.where(upper, [np.cos(angle), np.sin(angle)], [1 - np.cos(angle), 0.5 - np.sin(angle)]).T
        p = 3 * (p + 0.05 * rng.normal(size=(n, 2))) - 1
    elif name == "8gaussians":  # on a circle of radius 4
        angle = np.pi / 4 * rng.integers(8, size=n)
        p = 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(n, 2))
    elif name == "checkerboard":  # the dark fields of a 4 x 4 board with fields of size 2
        column = rng.integers(4, size=n)
        row = 2 * rng.integers(2, size=n) + column % 2
        p = 2 * (np.stack([column, row], 1) + rng.random((n, 2))) - 4
    else:  # spirals: two arms, one turn and a half, evenly filled along their length
        r = np.sqrt(rng.random(n))
        angle = 3 * np.pi * r + np.pi * rng.integers(2, size=n)
        p = 4 * (r * [np.cos(angle), np.sin(angle)]).T + 0.1 * rng.normal(size=(n, 2))
    return p.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------
# Cartoon faces, the default data: no download, any resolution, drawn by the code below.

FACE_ATTRIBUTES = ("smiling", "open_mouth", "glasses", "hat", "beard", "long_hair", "curly_hair", "blond")

HAIR_STYLES = dict(bald=7, short=14, swept=12, mohawk=6, bun=8, buns=7, bob=10, long=16, curly=12)
MOUTHS = dict(smile=24, grin=17, laugh=17, tongue=8, flat=13, round=12, frown=9)


def palette(codes):
    return np.array([list(bytes.fromhex(code)) for code in codes.split()], np.float32)


SKINS = palette("ffdcc4 f9c8a6 eeb083 d9986a bd7d55 a86f49 8b583a")  # light to dark
HAIRS = palette("f7c63f ffd85e ee7430 b04e2c 6e4023 38272b 221f2e c3c8d2 f072a6 3fa7a3")  # two blonds first
BACKDROPS = palette("bfe3f5 c9efd8 ffd9dc fff0c2 dcd3f7 ffdcbd b5e0dc e9ecf2")
CLOTHES = palette("e4572e 2e86ab f2a541 5b8c5a 7a5ba8 d64b7f 2f3e5c f4f1e8")
IRISES = palette("5a3420 2f78c0 3a8a55 4a4a5c")
FRAMES = palette("26263a c2313f 1f6f8b")
INK, WHITE, TONGUE, PUPIL = palette("260e17 ffffff f0606c 14101a")


def uniforms(indices, count):
    """(n, count) numbers in [0, 1) hashed from each index alone, so a face never depends on its batch."""
    z = np.asarray(indices, np.uint64)[:, None] * np.uint64(count) + np.arange(1, count + 1, dtype=np.uint64)
    z = z * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return ((z ^ z >> np.uint64(31)) >> np.uint64(11)) / 2.0**53


# Shapes are signed distances, negative inside. The chin is near y = 0.74, the scalp near y = -0.54, the ears
# near x = -0.62 and 0.62. A union is a minimum, an intersection a maximum; abs(x) draws both sides at once.
def disc(x, y, rx, ry=None):
    ry = ry or rx
    # Half of k^2 - 1 has the slope of a distance at the rim, where it counts, and needs no square root.
    return ((x / rx) ** 2 + (y / ry) ** 2 - 1) * (0.5 * min(rx, ry))


def slab(x, y, width, height, corner):
    dx = np.maximum(abs(x) - (width - corner), 0)
    dy = np.maximum(abs(y) - (height - corner), 0)
    return np.sqrt(dx * dx + dy * dy) - corner


def stroke(x, y, width, bend, thick):
    """A pen line with round ends, which a positive bend lifts, as in a smile."""
    slope = 2 * bend / width**2 * x
    y = (y + bend * (x / width) ** 2 - bend / 2) / np.sqrt(1 + slope * slope)
    return slab(x, y, width + thick, thick, thick)


def head(x, y, grow=0.0):
    a = (x / (0.62 + grow - 0.05 * y)) ** 2
    b = ((y - 0.1) / (0.64 + grow)) ** 2
    return (a + b - 0.3 * a * b - 1) * 0.31  # the product squares the cheeks a little


def discs(x, y, *spots):
    return np.minimum.reduce([disc(abs(x) - cx, y - cy, r) for cx, cy, r in spots])


# A coarse canvas on which each shape is tried first, to find the rectangle it touches.
GRID = np.linspace(-1.3, 1.3, 105, dtype=np.float32)


def draw_chunk(indices, res):
    """Painter's algorithm: one flat shape after another over all faces at once, back to front."""
    n = len(indices)
    dice = iter(uniforms(indices, 32).T)
    everyone = np.ones(n, bool)

    def between(low, high):
        return (low + (high - low) * next(dice)).astype(np.float32)[:, None, None]

    def pick(*odds):
        return np.searchsorted(np.cumsum(odds) / np.sum(odds), next(dice), side="right")

    def any_of(colours):
        return colours[pick(*np.ones(len(colours)))]

    # Who is it?
    skin_tone = pick(1, 1, 1, 1, 1, 1, 1)
    hair_tone = pick(10, 10, 11, 10, 14, 14, 13, 6, 6, 6)
    lost = (skin_tone > 3) & (hair_tone > 2) & (hair_tone < 6)
    hair_tone[lost] = 6  # brown hair would be lost on brown skin
    skin, hair = SKINS[skin_tone], HAIRS[hair_tone]
    shade, shadow = skin * (0.87, 0.76, 0.72), hair * (0.88, 0.8, 0.8)
    style = np.array(list(HAIR_STYLES))[pick(*HAIR_STYLES.values())]
    mouth = np.array(list(MOUTHS))[pick(*MOUTHS.values())]
    glasses, hat, gaze = pick(75, 14, 11), pick(78, 12, 10), pick(1, 2, 1) - 1
    style[(hat > 0) & np.isin(style, ("mohawk", "bun", "buns"))] = "short"
    beard = (pick(3, 1) > 0) & ~np.isin(style, ("bun", "buns", "bob", "long"))
    backdrop, shirt, iris, frame, felt = map(any_of, (BACKDROPS, CLOTHES, IRISES, FRAMES, CLOTHES[:-1]))

    # Where is each pixel, seen from the face?
    tilt, size, aspect = between(-0.06, 0.06), between(1.06, 1.15), between(0.96, 1.04)
    ticks = (np.arange(res, dtype=np.float32) + 0.5) * (2 / res) - 1
    px, py = ticks[None, None, :] - between(-0.05, 0.05), ticks[None, :, None] - between(-0.03, 0.03)
    x = (px * np.cos(tilt) + py * np.sin(tilt)) / (size * aspect)
    y = (py * np.cos(tilt) - px * np.sin(tilt)) / size
    pixels = size * (res / 2)

    canvas = np.empty((3, n, res, res), np.float32)
    canvas[:] = backdrop.T[:, :, None, None]

    def paint(who, colour, shape):
        """Lay a flat colour over the faces in `who`, visiting only the pixels the shape may reach."""
        rows, cols = np.nonzero(shape(GRID[None, :], GRID[:, None]) < 0)
        spans = [(GRID[[i.min(), i.max()]] + (0.75, 1.25)) * res / 2 + (-1, 2) for i in (rows, cols)]
        rows, cols = (slice(*np.clip(span, 0, res).astype(int)) for span in spans)
        who = slice(None) if who.all() else np.flatnonzero(who)
        below = canvas[:, who, rows, cols]
        cover = np.clip(0.5 - shape(x[who, rows, cols], y[who, rows, cols]) * pixels[who], 0, 1)
        inks = np.broadcast_to(colour, (n, 3)).astype(np.float32).T[:, who, None, None]
        canvas[:, who, rows, cols] = below + cover * (inks - below)

    # Behind the head.
    paint(style == "long", shadow, lambda x, y: slab(x, y - 0.27, 0.76, 0.88, 0.62))
    paint(style == "bob", shadow, lambda x, y: slab(x, y - 0.02, 0.76, 0.66, 0.5))
    paint(style == "curly", hair,
          lambda x, y: discs(x, y, (0, -0.6, 0.25), (0.33, -0.54, 0.23), (0.56, -0.34, 0.22),
                             (0.64, -0.04, 0.2), (0.63, 0.22, 0.17)))
    paint(style == "bun", hair, lambda x, y: disc(x, y + 0.63, 0.22))
    paint(style == "buns", hair, lambda x, y: disc(abs(x) - 0.5, y + 0.5, 0.22))
    paint(everyone, shirt, lambda x, y: slab(x, y - 1.4, 0.8, 0.7, 0.4))
    paint(everyone, shade, lambda x, y: disc(x, y - 0.68, 0.3, 0.2))
    paint(~np.isin(style, ("long", "bob")), shade, lambda x, y: disc(abs(x) - 0.63, y - 0.12, 0.11, 0.13))

    # The face.
    paint(everyone, skin, head)
    paint(everyone, skin * 0.65 + np.array((245, 75, 95)) * 0.35,
          lambda x, y: disc(abs(x) - 0.43, y - 0.36, 0.1, 0.08))
    paint(beard, hair, lambda x, y: np.maximum(np.maximum(head(x, y, 0.06), 0.1 - y),
                                               -disc(x, y - 0.1, 0.6, 0.49)))
    paint(glasses > 0, skin * 0.5 + 127, lambda x, y: slab(abs(x) - 0.27, y - 0.08, 0.25, 0.23, 0.2))
    paint(everyone, WHITE, lambda x, y: disc(abs(x) - 0.25, y - 0.08, 0.18, 0.19))
    for side in (-1, 0, 1):
        look = 0.035 * side
        paint(gaze == side, iris, lambda x, y: disc(abs(x - look) - 0.24, y - 0.09, 0.125, 0.135))
        paint(gaze == side, PUPIL, lambda x, y: disc(abs(x - look) - 0.24, y - 0.09, 0.08))
        paint(gaze == side, WHITE, lambda x, y: disc(abs(x - look + 0.05) - 0.24, y - 0.03, 0.045))
    paint(everyone, shade, lambda x, y: disc(x, y - 0.28, 0.075, 0.06))

    # The mouth.
    paint(mouth == "tongue", TONGUE, lambda x, y: slab(x - 0.06, y - 0.59, 0.11, 0.12, 0.1))
    paint(np.isin(mouth, ("smile", "tongue")), INK, lambda x, y: stroke(x, y - 0.48, 0.21, 0.12, 0.048))
    paint(mouth == "flat", INK, lambda x, y: stroke(x, y - 0.48, 0.14, 0, 0.048))
    paint(mouth == "frown", INK, lambda x, y: stroke(x, y - 0.48, 0.14, -0.07, 0.048))
    paint(mouth == "round", INK, lambda x, y: disc(x, y - 0.49, 0.1, 0.11))
    paint(np.isin(mouth, ("grin", "laugh")), INK,
          lambda x, y: np.maximum(disc(x, y - 0.4, 0.26, 0.24), 0.4 - y))
    paint(mouth == "grin", WHITE, lambda x, y: np.maximum(disc(x, y - 0.4, 0.22, 0.2), 0.43 - y))
    paint(mouth == "laugh", TONGUE, lambda x, y: np.maximum(disc(x, y - 0.4, 0.26, 0.24),
                                                            disc(x, y - 0.62, 0.16, 0.11)))

    # Hair in front, which stops above the eyes.
    paint(np.isin(style, ("short", "bun", "buns")), hair,
          lambda x, y: np.maximum(head(x, y, 0.06), y + 0.34 - 0.95 * x * x))
    paint(style == "swept", hair, lambda x, y: np.maximum(np.maximum(head(x, y, 0.08), y - 0.02),
                                                          -disc(x - 0.12, y - 0.3, 0.7, 0.62)))
    paint(style == "mohawk", hair, lambda x, y: slab(x, y + 0.54, 0.19, 0.32, 0.18))
    paint(style == "bob", hair, lambda x, y: np.maximum(head(x, y, 0.08), np.minimum(y + 0.2, 0.52 - abs(x))))
    paint(style == "long", hair, lambda x, y: np.maximum(head(x, y, 0.08), y + 0.44 - 1.3 * x * x))
    paint(style == "curly", hair,
          lambda x, y: discs(x, y, (0, -0.42, 0.2), (0.3, -0.38, 0.2), (0.54, -0.2, 0.15)))
    paint(everyone, np.minimum(shadow, shade * 0.85),
          lambda x, y: stroke(abs(x) - 0.26, y + 0.17, 0.1, -0.04, 0.037))

    # What they wear.
    paint(glasses == 1, frame, lambda x, y: abs(disc(abs(x) - 0.27, y - 0.08, 0.25)) - 0.037)
    paint(glasses == 2, frame, lambda x, y: abs(slab(abs(x) - 0.28, y - 0.08, 0.25, 0.23, 0.08)) - 0.037)
    paint(hat > 0, backdrop, lambda x, y: y + 0.52 - 0.6 * x * x)  # or hair would stick out above
    paint(hat == 1, felt, lambda x, y: np.maximum(head(x, y, 0.1), y + 0.3))
    paint(hat == 1, felt * 0.5 + 127, lambda x, y: np.minimum(slab(x, y + 0.3, 0.68, 0.1, 0.09),
                                                              disc(x, y + 0.64, 0.15)))
    paint(hat == 2, felt, lambda x, y: np.minimum(slab(x, y + 0.54, 0.48, 0.3, 0.16),
                                                  slab(x, y + 0.3, 0.82, 0.085, 0.08)))
    paint(hat == 2, felt * 0.6, lambda x, y: slab(x, y + 0.43, 0.48, 0.06, 0.05))

    smiling = np.isin(mouth, ("smile", "grin", "laugh", "tongue"))
    open_mouth = np.isin(mouth, ("grin", "laugh", "round"))
    blond = (hair_tone < 2) & ((style != "bald") | beard)
    attributes = (smiling, open_mouth, glasses > 0, hat > 0, beard, style == "long", style == "curly", blond)
    return (canvas.transpose(1, 2, 3, 0) + 0.5).astype(np.uint8), np.stack(attributes, 1).astype(np.uint8)


def draw_faces(indices, res):
    """The faces numbered `indices`: images (n, res, res, 3) and multi-hot attributes (n, 8), both uint8."""
    indices = np.asarray(indices)
    step = max(1, 2**17 // res**2)  # small enough to stay in cache
    parts = [draw_chunk(indices[i:i + step], res) for i in range(0, len(indices), step)]
    return tuple(np.concatenate(part) for part in zip(*parts))


# ---------------------------------------------------------------------------------------------------------------
# Finding pictures


def find_celeba(root):
    """The first of CelebA's usual shapes found under root: the aligned zip, its folder, or a CelebA-HQ folder."""
    shapes = ("img_align_celeba.zip", "img_align_celeba", "celeba_hq_256", "celeba_hq", "CelebA-HQ-img", "celebahq")
    places = [root / sub / shape for sub in ("", "celeba", "CelebA", "CelebAMask-HQ") for shape in shapes]
    for place in places:
        if place.exists():
            return place
    if root.is_dir() and any(p.suffix.lower() in ENDINGS for p in root.iterdir()):
        return root
    refuse(
        f"CelebA is not there: looked in {root}/ for {', '.join(shapes[:3])} and the like. Get img_align_celeba.zip "
        f"(1.3 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, put it into {root}/ as it is, and run "
        f"this again (or name its folder: --root DIR)"
    )


def celeba_attributes(source, names):
    """CelebA's 40 attributes, if list_attr_celeba.txt lies beside the pictures: ({file name: multi-hot}, names)."""
    for place in (source.parent, source, source.parent.parent):
        if (place / "list_attr_celeba.txt").is_file():
            lines = (place / "list_attr_celeba.txt").read_text().splitlines()
            attributes = lines[1].split()
            table = {row[0]: np.array(row[1:]) == "1" for row in map(str.split, lines[2:]) if row}
            lost = [n for n in names if len(table.get(n.rpartition("/")[2], ())) != len(attributes)]
            if lost:
                refuse(f"{place / 'list_attr_celeba.txt'} says nothing of {lost[0]} (and {len(lost) - 1} others): get "
                       f"the whole file, or move it away to train without attributes")
            return {n: table[n.rpartition("/")[2]].astype(np.uint8) for n in names}, attributes
    return None, None


def list_pictures(source):
    """Names of the pictures in a folder or zip, sorted; for a folder of sub-folders, those are the labels."""
    if source.is_dir():
        names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
    else:
        try:
            names = zipfile.ZipFile(source).namelist()
        except (zipfile.BadZipFile, OSError) as error:
            refuse(f"{source} is neither a folder nor a readable zip of pictures ({error})")
    # not macOS's hidden twins, ._1.jpg and __MACOSX/1.jpg
    names = sorted(n for n in names if n.lower().endswith(ENDINGS) and not n.split("/")[-1].startswith("._"))
    if not names:
        refuse(f"no pictures in {source}: looked for {' '.join(ENDINGS)}")
    return names


def stem(name):
    """A dataset's short name: pets for ../pets.zip."""
    return Path(name).resolve().stem


def folder_of(name):
    """The label of a picture: the folder it lies in."""
    return name.rpartition("/")[0]


def read_picture(file, res):
    """Decodes one picture: upright, RGB, centre crop, resized by averaging over each new pixel's area."""
    with Image.open(file) as im:
        im.draft("RGB", (res, res))  # JPEG: let the decoder halve while it decodes, as long as it stays above res
        im = ImageOps.exif_transpose(im)
        if im.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        if im.mode.startswith("I"):  # 16 bits
            im = Image.fromarray((np.asarray(im) // 257).clip(0, 255).astype(np.uint8))
        if im.has_transparency_data:
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im.convert("RGBA"))
        return np.asarray(ImageOps.fit(im.convert("RGB"), (res, res), Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------------------------------------------------
# MNIST, Fashion-MNIST and CIFAR-10, from the files their authors publish

IDX = {"train-images-idx3-ubyte": (60_000, 28, 28), "train-labels-idx1-ubyte": (60_000,),
       "t10k-images-idx3-ubyte": (10_000, 28, 28), "t10k-labels-idx1-ubyte": (10_000,)}
BATCHES = {f"{b}.bin": (10_000, 3073) for b in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]}

# files: {as downloaded: (its MD5 as published, {part inside: shape of its bytes})}. MNIST and Fashion-MNIST name
# their files alike; how the training labels begin tells them apart.
OFFICIAL = {
    "mnist": dict(
        n=70_000, res=28, channels=1, label_names=list("0123456789"),
        begins=bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/", size="12 MB", folder="MNIST/raw",
        files={f"{part}.gz": (md5, {part: shape}) for (part, shape), md5 in zip(IDX.items(), (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"))},
    ),
    "fashion": dict(
        n=70_000, res=28, channels=1,
        label_names="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        begins=bytes([9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", size="31 MB", folder="FashionMNIST/raw",
        files={f"{part}.gz": (md5, {part: shape}) for (part, shape), md5 in zip(IDX.items(), (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"))},
    ),
    "cifar10": dict(
        n=60_000, res=32, channels=3,
        label_names="airplane automobile bird cat deer dog frog horse ship truck".split(),
        url="https://www.cs.toronto.edu/~kriz/", size="170 MB", folder="cifar-10-batches-bin",
        files={"cifar-10-binary.tar.gz": ("c32a1d4ab5d03f1284b67883e8d87530", BATCHES)},
    ),
}
AGAIN = "delete it and run the same command with --download"


def look(name, root):
    """For each folder a dataset's files may lie in: (folder, the paths found there, the downloads missing there).

    A folder must hold all of them, else MNIST's labels might end up beside Fashion-MNIST's pictures.
    """
    usual = OFFICIAL[name]["folder"]
    for folder in (root / name, root / usual, root / name / usual, root):
        found, missing = [], []
        for file, (_, parts) in OFFICIAL[name]["files"].items():
            unpacked = [folder / part for part in parts]
            if all(p.is_file() for p in unpacked):
                found += unpacked
            elif (folder / file).is_file():
                found.append(folder / file)
            else:
                missing.append(file)
        yield folder, found, missing


def find_official(name, root):
    """The paths of a dataset's files, packed or unpacked."""
    places = list(look(name, root))
    _, found, missing = min(places, key=lambda place: len(place[2]))
    if missing:
        refuse(
            f"{name} is not there: no {', '.join(missing)} (or unpacked) in "
            f"{', '.join(f'{folder}/' for folder, _, _ in places)}. Run the same command with --download "
            f"({OFFICIAL[name]['size']}), or get each as {OFFICIAL[name]['url']}NAME, into {root / name}/"
        )
    return found


def read_official(name, root):
    """(path, array) of every part in the table's order, each checked to be whole and what the table says."""
    contents = {}
    for path in find_official(name, root):
        try:
            if path.name.endswith(".tar.gz"):
                with tarfile.open(path, "r:gz") as tar:  # in its own order: going back is decompressing again
                    for member in filter(tarfile.TarInfo.isfile, tar):
                        contents[Path(member.name).name] = path, tar.extractfile(member).read()
            else:
                with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                    contents[path.name.removesuffix(".gz")] = path, file.read()
        except (gzip.BadGzipFile, EOFError, zlib.error, tarfile.TarError) as error:
            refuse(f"{path} cannot be read ({error}); {AGAIN}")
    for _, parts in OFFICIAL[name]["files"].values():
        for part, shape in parts.items():
            path, content = contents.get(part, (path, b""))  # an archive may lack one
            start = b""
            if "-idx" in part:  # a magic number and the sizes, big-endian, stand before the values
                start = np.array([0x800 + len(shape), *shape], ">u4").tobytes()
            size = len(start) + math.prod(shape)
            if part == "train-labels-idx1-ubyte":
                start += OFFICIAL[name]["begins"]
            if len(content) != size:
                refuse(f"{path} is cut short or wrong: {part} has {len(content):,} bytes, not {size:,}; {AGAIN}")
            if not content.startswith(start):
                begins = content[:len(start)].hex()
                refuse(f"{path} is not {name}'s {part}: it begins {begins}, not {start.hex()}; {AGAIN}")
            yield path, np.frombuffer(content, np.uint8)[-math.prod(shape):].reshape(shape)


def stream_official(name, root, res):
    """Yields (picture (res, res, C) uint8, label) of all OFFICIAL[name]["n"], training files first."""
    parts = list(read_official(name, root))
    if name == "cifar10":  # in each row a label, then the red, the green and the blue plane
        pairs = [(path, rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0])
                 for path, rows in parts]
    else:
        pairs = [(path, images[..., None], labels) for (_, images), (path, labels) in zip(parts[::2], parts[1::2])]
    for path, images, labels in pairs:
        if labels.max() > 9:
            refuse(f"{path} is not {name}'s: there is a label {labels.max()}; {AGAIN}")
        for pixels, label in zip(images, labels.tolist()):
            if res != len(pixels):
                pixels = np.asarray(picture(pixels).resize((res, res), Image.Resampling.LANCZOS))
            yield pixels.reshape(res, res, -1), label


def download(name, root):
    """Fetches what is missing into root/name. Only one process may: rank 0."""
    if all(missing for _, _, missing in look(name, root)):
        folder, _, missing = next(look(name, root))
        folder.mkdir(parents=True, exist_ok=True)
        for file in missing:
            fetch(OFFICIAL[name]["url"] + file, folder / file, OFFICIAL[name]["files"][file][0])


def fetch(url, path, md5):
    """Downloads into PATH.part, going on where an earlier run stopped; the name changes when the MD5 is right."""
    part = path.with_name(path.name + ".part")
    had = got = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={had}-"} if had else {})
    print(f"downloading {url} to {path}", flush=True)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer, open(part, "ab" if had else "wb") as file:
            if answer.status != 206:  # the server sends all of it, asked or not
                file.truncate(0)
                had = got = 0
            total = had + int(answer.headers.get("Content-Length") or 0)
            began = shown = time.time()
            while block := answer.read1(2**16):  # read would wait for a full block
                got += file.write(block)
                if time.time() - shown > 3 or got == total:
                    shown, rate = time.time(), (got - had) / max(time.time() - began, 1e-3)
                    print(f"  {got / 1e6:,.1f}/{total / 1e6:,.1f} MB  {rate / 1e6:.2f} MB/s  "
                          f"ETA {max(0, total - got) / rate:.0f} s", flush=True)
        if got < total:
            raise ConnectionError(f"the connection closed after {got:,} of {total:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing is missing, an earlier run stopped at the very end
            refuse(f"could not download {url}: {str(error).strip()}. Run the same command again to go on, or "
                   f"put the file into {path.parent}/ by hand", status=1)
    if hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        refuse(f"what {url} sent is not the published file (its MD5 is not {md5}) and was deleted. Run the same "
               f"command again, or put the file into {path.parent}/ by hand", status=1)
    part.rename(path)


# ---------------------------------------------------------------------------------------------------------------
# Packing. Both streams below yield (picture, label) per sample, or (None, reason) where there is no picture.


def stream_faces(res):
    for chunk in np.array_split(np.arange(FACES), math.ceil(FACES / 256)):
        yield from zip(*draw_faces(chunk, res))  # no threads: many small numpy calls only wait for each other


def stream_files(source, label_of, res):
    """Decodes in parallel (Pillow releases the GIL), in pieces, so that pictures do not pile up in memory."""
    archive = None if source.is_dir() else zipfile.ZipFile(source)

    def decode(name):
        try:
            file = source / name if archive is None else io.BytesIO(archive.read(name))
            return read_picture(file, res), label_of[name]
        except Exception as error:  # whatever a broken file makes a decoder raise: it is skipped, and named
            return None, f"{name} ({type(error).__name__}: {error})"

    names = list(label_of)
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), 512):
            yield from pool.map(decode, names[i : i + 512])


def write_pack(folder, stream, shape, label_names):
    """Writes images.npy of the given shape (n, res, res, C), labels.npy and about.json into folder.

    Pictures are appended, not written through a memory map: there a full disk kills the process, here it is an
    ordinary error.
    """

    def header(count):  # numpy leaves room in it for a longer count, so it can be written again in place
        return {"descr": "|u1", "fortran_order": False, "shape": (count, *shape[1:])}

    n = shape[0]
    labels, skipped, began, shown = [], [], time.time(), time.time()
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, header(n))
        for i, (picture, label) in enumerate(stream, 1):
            if picture is None:
                skipped.append(label)
            else:
                file.write(picture.tobytes())
                labels.append(label)
            if time.time() - shown > 5 or i == n:
                shown, rate = time.time(), i / (time.time() - began)
                print(f"  {i:,}/{n:,}  {rate:,.0f} pictures/s  ETA {(n - i) / rate:.0f} s", flush=True)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, header(len(labels)))
        file.flush()
        os.fsync(file.fileno())
    if skipped:
        print(f"skipped {len(skipped):,} of {n:,} that could not be decoded:", *skipped[:10], sep="\n  ")
    if not labels:
        refuse(f"none of the {n:,} pictures could be decoded")
    np.save(folder / "labels.npy", np.array(labels))
    (folder / "about.json").write_text(json.dumps({"label_names": label_names, "skipped": len(skipped)}))


def channels(name):
    return OFFICIAL[name]["channels"] if name in OFFICIAL else 3


def load(name, root="data", res=32):
    """A dataset by name or path, packed on first use: (images, labels, label_names).

    images: uint8 (N, res, res, C), memory-mapped. labels: multi-hot (N, K) for faces and celeba, else (N,) int64.
    """
    root = Path(root)
    if name in OFFICIAL:
        n, label_names = OFFICIAL[name]["n"], OFFICIAL[name]["label_names"]
        files = find_official(name, root)
        identity = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        stream = stream_official(name, root, res)
    elif name == "faces":
        n, label_names = FACES, FACE_ATTRIBUTES
        identity = [Path(__file__).read_text()]  # whoever changes the drawing sees the change
        stream = stream_faces(res)
    else:
        source = find_celeba(root) if name == "celeba" else Path(name)
        if not source.exists():
            refuse(f"no dataset {name}: neither a folder or zip that exists nor one of {', '.join(PICTURES + POINTS)}")
        names = list_pictures(source)
        label_of, label_names = celeba_attributes(source, names) if name == "celeba" else (None, None)
        if label_of is None:
            label_names = sorted({folder_of(p) for p in names})
            label_of = {p: label_names.index(folder_of(p)) for p in names}
        n = len(names)
        stats = [os.stat(source / p) for p in names] if source.is_dir() else [os.stat(source)]
        identity = [str(source.resolve()), names, label_names, [(s.st_size, s.st_mtime_ns) for s in stats]]
        stream = stream_files(source, label_of, res)
    digest = hashlib.sha256(json.dumps([identity, n, res]).encode()).hexdigest()[:12]
    pack = root / "cache" / f"{stem(name)}-{res}-{digest}"
    if not pack.exists():
        for stale in pack.parent.glob(f"{pack.name}.part-*"):  # of processes that were killed
            if not Path(f"/proc/{stale.name.rpartition('-')[2]}").exists() and Path("/proc/self").exists():
                shutil.rmtree(stale, ignore_errors=True)
        part = pack.with_name(f"{pack.name}.part-{os.getpid()}")
        try:
            part.mkdir(parents=True)
            shape = (n, res, res, channels(name))
            need, free = math.prod(shape), shutil.disk_usage(part).free
            if need > free:
                refuse(f"{n:,} pictures at {res}x{res} take {need / 1e9:.1f} GB in {pack.parent}, where only "
                       f"{free / 1e9:.1f} GB are free; make room, or name a larger place: --root DIR")
            print(f"packing {n:,} pictures of {name} at {res}x{res} into {pack}", flush=True)
            write_pack(part, stream, shape, label_names)
            part.rename(pack)  # complete or not there at all
        except OSError as error:
            if not pack.exists():  # else another process was faster, which is as well
                refuse(f"could not pack into {part}: {error}", status=1)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    label_names = json.loads((pack / "about.json").read_text())["label_names"]
    try:
        return np.load(pack / "images.npy", mmap_mode="r"), np.load(pack / "labels.npy"), label_names
    except (ValueError, EOFError) as error:
        refuse(f"{pack} is damaged ({error}); delete it, and it is packed again")


@functools.lru_cache(maxsize=4)
def split(n):
    """(training indices, held-out indices): a twentieth, at most 1,024, is held out, the same in every run."""
    order = np.random.default_rng(key(0, SPLIT)).permutation(n)
    held = min(1024, n // 20)
    return np.sort(order[held:]), order[:held] if held else order


def choose_labels(labels, label_names, cond):
    """The labels to learn and their names. cond: "all", or some attributes by name, comma-separated."""
    if labels.ndim == 1 or cond == "all":
        if cond != "all" or len(label_names) < 2:
            refuse(f"--cond {cond}: the labels of this dataset are {', '.join(label_names) or 'none'}; use --cond all"
                   if len(label_names) > 1 else f"--cond {cond}: this dataset has no labels to learn")
        return labels, label_names
    for name in cond.split(","):
        if name not in label_names:
            near = difflib.get_close_matches(name, label_names, 3, 0) or label_names
            refuse(f"--cond {name}: no such attribute; the nearest are {', '.join(near)}")
    return labels[:, [label_names.index(name) for name in cond.split(",")]], cond.split(",")


# ---------------------------------------------------------------------------------------------------------------
# Pixels in and out


def to_tensor(pixels, device):
    """uint8 (n, H, W, C) array -> float32 (n, C, H, W) tensor in [-1, 1]; it travels to the device as bytes."""
    pixels = torch.from_numpy(pixels)
    if device.type == "cuda":
        pixels = pixels.pin_memory().to(device, non_blocking=True)
    return pixels.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Tensor in [-1, 1], (B, C, H, W) -> uint8 array (B, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(pixels):
    """uint8 (H, W, C), C = 1 or 3, as a PIL image."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(pixels, columns=None):
    """uint8 (n, H, W, C) as one PIL image, as square as it goes; small pictures are enlarged to be seen."""
    n, H, W, C = pixels.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    gap = max(1, H // 16)
    sheet = np.full((rows * (H + gap) + gap, columns * (W + gap) + gap, C), 255, np.uint8)
    for i, p in enumerate(pixels):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[top : top + H, left : left + W] = p
    zoom = max(1, 72 // H)
    return picture(sheet.repeat(zoom, 0).repeat(zoom, 1))


def scatter(p, limit=6.0, size=480):
    """Points (n, 2) as a PIL image of the square [-limit, limit]^2, each a translucent dot."""
    fine = 2 * size  # drawn at twice the size, then averaged down: smooth dots without an anti-aliasing library
    im = Image.new("RGB", (fine, fine), "white")
    draw = ImageDraw.Draw(im, "RGBA")
    for x, y in (p + limit) / (2 * limit) * fine:
        if abs(x) < 2 * fine and abs(y) < 2 * fine:  # not drawn if far outside, infinite or NaN
            draw.circle((x, fine - y), 4, (40, 70, 160, 110))
    return im.reduce(2)


def save_gif(path, frames, seconds=3.0):
    """PIL images as an animation that loops, holding the last frame for a while."""
    each = max(20, int(1000 * seconds / len(frames)))
    durations = [each] * (len(frames) - 1) + [1500]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def plot(curves, xlabel, size=(720, 420)):
    """Line plot with a logarithmic y axis as a PIL image. curves: {name: (list of x, list of y)}, y > 0."""
    W, H = 2 * size[0], 2 * size[1]
    left, right, top, bottom = 120, 30, 30, 90
    im = Image.new("RGB", (W, H), "white")
    draw, font = ImageDraw.Draw(im), ImageFont.load_default(24)
    xs = [x for x, _ in curves.values() for x in x]
    ys = [math.log10(y) for _, y in curves.values() for y in y]
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), min(ys) - 0.02, max(ys) + 0.02

    def place(x, y):
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (W - left - right), H - bottom - up * (H - top - bottom)

    for i in range(6):
        x, y = x0 + i / 5 * (x1 - x0), y0 + i / 5 * (y1 - y0)
        draw.line([place(x0, y), place(x1, y)], "#dddddd", 2)
        draw.text((left - 12, place(x0, y)[1]), f"{10**y:.3g}", "#444444", font, anchor="rm")
        draw.text((place(x, y0)[0], H - bottom + 12), f"{x:,.0f}", "#444444", font, anchor="mt")
    draw.text((W / 2, H - 12), xlabel, "#444444", font, anchor="mb")
    for i, (name, (x, y)) in enumerate(curves.items()):
        colour = ("#2846a0", "#e07020", "#208040", "#a02860")[i % 4]
        draw.line([place(a, math.log10(b)) for a, b in zip(x, y)], colour, 4, joint="curve")
        draw.text((W - right - 12, top + 12 + 34 * i), name, colour, font, anchor="rt")
    return im.reduce(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Packs a dataset and draws a sheet of it.", allow_abbrev=False)
    parser.add_argument("--data", default="faces", help="faces, celeba, or the path of a folder or zip of pictures")
    parser.add_argument("--res", type=int, default=32, help="pixels a side")
    parser.add_argument("--root", default="data", help="where datasets are looked for and packed arrays kept")
    parser.add_argument("--to", default=None, help="where the sheet goes (default: out/DATA-RES/data.png)")
    parser.error = refuse
    args = parser.parse_args(argv)
    if args.res < 8:
        refuse(f"--res {args.res} is too small: at least 8")
    if args.to and not args.to.endswith(".png"):
        refuse(f"--to {args.to}: the sheet is a .png")
    check_writable(Path(args.to or "out/x.png"))
    if args.data in POINTS:
        to = Path(args.to or f"out/{args.data}/data.png")
        sheet = scatter(points(args.data, 2000, np.random.default_rng(0)))
    else:
        images, labels, label_names = load(args.data, args.root, args.res)
        to = Path(args.to or f"out/{stem(args.data)}-{args.res}/data.png")
        sheet = grid(images[split(len(images))[1][:64]])
        print(f"{len(images):,} pictures; labels: {', '.join(filter(None, label_names)) or 'none'}")
    to.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(to)
    print(f"wrote {to}")


if __name__ == "__main__":
    run(main)
