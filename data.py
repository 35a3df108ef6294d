"""Pixels in, pixels out: every dataset becomes one array; batches index it; results become pictures.

    python data.py --data celeba --res 256      packs a dataset and draws a sheet of it, without training

A source (a zip, a folder, our own drawing code) is decoded, cropped and resized once, into a uint8 array (N, H, W, C)
on disk. Training only maps that array into memory. So loading a batch is an index and a memcpy, all processes share
the pages, and there are no loader processes to tune.

Last in this file: the plumbing that all scripts share (seeds, flags, ending with a message).
"""

import argparse
import contextlib
import csv
import ctypes
import functools
import gzip
import hashlib
import inspect
import io
import json
import os
import posixpath
import re
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------------------
# Batches. Which samples a step gets is a function of (seed, step), so a resumed run needs no generator state.


def batch_indices(n, size, step, seed):
    """Which of n samples make up batch `step`: epochs of fresh permutations, laid end to end and cut into batches.

    Returns (size,) int64. A batch may straddle two epochs (or more, if size > n), so no sample is left out.
    """
    place = np.arange(step * size, (step + 1) * size)
    epoch, within = np.divmod(place, n)
    indices = np.empty(size, np.int64)
    for this_epoch in np.unique(epoch):
        here = epoch == this_epoch
        indices[here] = permutation(n, seed, int(this_epoch))[within[here]]
    return indices


@functools.lru_cache(maxsize=4)
def permutation(n, seed, epoch):
    return np.random.default_rng(seed_from(seed, ORDER, epoch)).permutation(n)


@functools.lru_cache(maxsize=4)
def split(n):
    """(training indices, held-out indices). A twentieth is held out, at most 1,024, the same in every run; of fewer
    than 20 samples, all serve as both."""
    order = np.random.default_rng(seed_from(0, SPLIT)).permutation(n)
    held_out = min(1024, n // 20)
    if held_out == 0:
        return np.sort(order), order
    return np.sort(order[held_out:]), order[:held_out]


def send(array, device):
    """An array as a tensor on the device. The CPU does not wait until a GPU has taken it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_tensor(pixels, device):
    """uint8 (n, H, W, C) array -> float32 (n, C, H, W) tensor in [-1, 1]; it travels to the device as bytes. Points
    (n, 2) stay as they are."""
    x = send(pixels, device)
    if x.dim() == 2:
        return x
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Tensor in [-1, 1], (B, C, H, W) -> uint8 array (B, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------
# Datasets. To add one, add a branch to `find_dataset` (or, for points, a function to POINTS).


def load(name, root="data", res=32):
    """A dataset by name or path, packed on first use: (images, labels, label_names, digest).

    images: uint8 (N, res, res, C), memory-mapped, or points, float32 (N, 2). labels: attributes, int64 (N, K) of 0 and
    1, or classes, int64 (N,); pictures without a class have -1 and come last. digest: a hash of the images, wherever
    they lie.
    """
    if not name:
        fail("--data needs a name or a path")
    if name in NAMES and Path(name).exists():
        print(f"--data {name} means the built-in dataset; for your own {name} in this folder: --data ./{name}")
    if name in POINTS:
        return points(name, POINTS_DRAWN, seed=0).numpy(), np.zeros(POINTS_DRAWN, np.int64), [], name
    source, files, label_names, n, samples = find_dataset(name, Path(root), res)
    # The pack's name holds a hash of the files' paths, sizes and dates and of the code that reads them, so that it is
    # packed again when one of them changes.
    identity = [os.path.realpath(source)]
    for file, path in files.items():
        about = path.stat()
        identity.append((file, about.st_size, about.st_mtime_ns, about.st_ctime_ns))
    code = [inspect.getsource(function) for function in READING]
    key = hashlib.sha256(repr((identity, n, res, code)).encode(errors="surrogateescape")).hexdigest()[:12]
    pack = Path(root, "cache", f"{short_name(name)}-{res}-{key}.images")
    if not pack.exists() and not is_writable(pack.parent):
        pack = Path("data", "cache", pack.name)  # root may be a shared disk that is read-only
    if not pack.exists():
        size = f", {n * res**2 * channels(name) / 1e6:,.0f} MB," if n else ""
        print(f"packing {name} at {res}x{res}{size} into {pack}", flush=True)
        write_pack(pack, source, samples, n, label_names)
    try:
        with np.load(pack.with_suffix(".npz")) as beside:
            labels, skipped, digest = beside["labels"], int(beside["skipped"]), str(beside["digest"])
            label_names = beside["label_names"].tolist()
        images = np.memmap(pack, mode="r").reshape(len(labels), res, res, channels(name))
    except Exception as error:  # cut short, or one of the two deleted
        fail(f"{pack} is damaged ({error}). Delete it, and it will be packed anew: rm -- {all_of(pack)}")
    if skipped:
        print(f"{skipped:,} pictures could not be read; {pack.with_suffix('.skipped.txt')} says why")
    report_old_packs(pack, source)
    if name == "faces":
        digest = name  # drawn by arithmetic that processors round differently: the same faces, but not to the bit
    return images, labels, label_names, digest


def find_dataset(name, root, res):
    """Where a dataset is and what it holds: (source, files, label_names, n, samples).

    source: the file or folder that it comes from. files: {name: path}; if one of them changes, it is packed again. n:
    how many samples, or None if that is not known without reading them. samples: a lazy generator of (pixels, label,
    notes), with pixels uint8 (res, res, C) and what was done to them; or None, and the reason, if they cannot be read.
    """
    if name == "faces":
        code = Path(__file__)  # redrawn whenever this file changes
        # As many as take about half a minute to draw. A default run at 32 pixels sees each once or twice.
        n = min(FACES, 2**27 // res**2)
        return code, {code.name: code}, FACE_ATTRIBUTES, n, stream_faces(n, res)
    if name in OFFICIAL:
        files = find_official(name, root)
        names = OFFICIAL[name]["label_names"]
        return files[0].parent, {file.name: file for file in files}, names, None, stream_official(name, files, res)
    place = find_celeba(root) if name == "celeba" else Path(name)
    names, read = list_files(place)
    pictures = pick_pictures(place, names)
    tables = [file for file in names if PurePosixPath(file).name in TABLES]
    files = {file: place / file for file in pictures + tables} if place.is_dir() else {place.name: place}
    attributes = place.parent / "list_attr_celeba.txt"
    if name == "celeba" and attributes.exists():
        files[attributes.name] = attributes
        label_names, labels = celeba_attributes(attributes, pictures)
    else:
        classes = find_classes(pictures, tables, read)
        label_names = sorted(set(classes.values()))
        numbers = {label: i for i, label in enumerate(label_names)}
        pictures.sort(key=lambda picture: picture not in classes)  # those without a class come last
        labels = [numbers.get(classes.get(picture), -1) for picture in pictures]
    return place, files, label_names, len(pictures), stream_files(pictures, labels, read, res)


def channels(name):
    return OFFICIAL[name]["channels"] if name in OFFICIAL else 3


def usual_res(name):
    return OFFICIAL[name]["res"] if name in OFFICIAL else 32


def short_name(name):
    """pets for ../pets.zip."""
    return Path(os.path.realpath(name)).name.removesuffix(".zip")


def run_folder(name, res):
    """Where results go unless the user says otherwise."""
    return Path("out", name if name in POINTS else f"{short_name(name)}-{res}")


def choose_labels(images, labels, label_names, wanted):
    """(images, labels, label_names) to learn. wanted: "all", or some attributes by name, comma-separated; pictures
    without a class are left out. Or "" for no labels: then they are all 0, and a network that was built for none
    ignores them."""
    if not wanted:
        return images, np.zeros(len(labels), np.int64), []
    if len(label_names) < 2:
        fail(f"--cond {wanted}: this dataset has no labels to learn (a folder's are its sub-folders or a dataset.json, "
             f"CelebA's come from list_attr_celeba.txt beside the pictures)")
    if labels.ndim == 1:
        if wanted != "all":
            fail(f"--cond {wanted}: for this dataset it can be all")
        known = (labels >= 0).sum()
        return images[:known], labels[:known], label_names
    if wanted == "all":
        return images, labels, label_names
    chosen = [name.strip() for name in wanted.split(",")]
    for name in chosen:
        if name not in label_names or chosen.count(name) > 1:
            fail(f"--cond {name}: for this dataset it can be all, or, each once, {', '.join(label_names)}")
    return images, labels[:, [label_names.index(name) for name in chosen]], chosen


# ---------------------------------------------------------------------------------------------------------------
# Points in the plane, within about [-5, 5.5]. They are drawn at each start and kept in memory, never packed.

POINTS_DRAWN = 10**6


def points(name, n, seed):
    """n points of a distribution in POINTS, (n, 2) float32, always the same for a seed."""
    p = POINTS[name](n, np.random.default_rng(seed))
    return torch.from_numpy(p.astype(np.float32))


def moons(n, rng):
    """Two half circles, interleaved."""
    angle, upper = np.pi * rng.random(n), rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle))
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle))
    return 3 * (np.stack([x, y], 1) + 0.05 * rng.normal(size=(n, 2))) - 1


def eight_gaussians(n, rng):
    """On a circle of radius 4."""
    angle = np.pi / 4 * rng.integers(8, size=n)
    return 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * rng.normal(size=(n, 2))


def checkerboard(n, rng):
    """The dark fields of a board of 4 x 4 fields, each of size 2."""
    column = rng.integers(4, size=n)
    row = 2 * rng.integers(2, size=n) + column % 2
    return 2 * (np.stack([column, row], 1) + rng.random((n, 2))) - 4


def spirals(n, rng):
    """Two arms of one turn and a half, evenly filled along their length."""
    r = np.sqrt(rng.random(n))
    angle = 3 * np.pi * r + np.pi * rng.integers(2, size=n)
    return 4 * np.stack([r * np.cos(angle), r * np.sin(angle)], 1) + 0.1 * rng.normal(size=(n, 2))


@functools.lru_cache
def plane(dim):
    """A fixed plane in dim dimensions, at a random angle: two orthonormal columns, (dim, 2) float32. For dim = 2 it is
    the plane itself, not turned."""
    if dim == 2:
        return torch.eye(2)
    return torch.from_numpy(np.linalg.qr(np.random.default_rng(dim).normal(size=(dim, 2)))[0].astype(np.float32))


def bury(p, dim):
    """Points of the plane, (n, 2), as points in dim dimensions, (n, dim)."""
    return p @ plane(dim).T.to(p)


def dig(z):
    """Points in any number of dimensions, (..., dim), as seen in the plane, (..., 2)."""
    return z @ plane(z.shape[-1]).to(z)


POINTS = {"moons": moons, "8gaussians": eight_gaussians, "checkerboard": checkerboard, "spirals": spirals}


# ---------------------------------------------------------------------------------------------------------------
# Cartoon faces, the default data: no download, any resolution, drawn by the code below.

FACES = 20_000  # the most that are drawn
FACE_ATTRIBUTES = ("smiling", "open_mouth", "glasses", "hat", "beard", "long_hair", "curly_hair", "blond")


def palette(codes):
    """Hexadecimal codes as colours (3, k): red, green and blue, 0 to 255."""
    return np.array([list(bytes.fromhex(code)) for code in codes.split()], np.float32).T


CLOTHES = palette("d8432f 2e86ab f2a541 5b8c5a 7a5ba8 d64b7f 2f3e5c f4f1e8")
INK, WHITE, TONGUE, BLACK, DUSK = palette("260e17 ffffff f0606c 221f2e dec2b8").T.reshape(5, 3, 1, 1, 1)


# Shapes are signed distances (roughly), negative inside. The chin is near y = 0.74, the scalp near y = -0.54, the ears
# near x = -0.62 and 0.62. A union is a minimum, an intersection a maximum; abs(x) draws both sides at once.
def disc(x, y, rx, ry):
    # With k = distance from the centre over the radius: (k^2 - 1) / 2 instead of k - 1. Both have the same slope at the
    # rim, where it counts, and this one needs no root.
    return ((x / rx) ** 2 + (y / ry) ** 2 - 1) * (0.5 * min(rx, ry))


def slab(x, y, width, height, corner):
    """A rectangle with rounded corners."""
    dx = np.maximum(abs(x) - (width - corner), 0)
    dy = np.maximum(abs(y) - (height - corner), 0)
    return np.sqrt(dx * dx + dy * dy) - corner


def stroke(x, y, width, bend, thick):
    """A pen line with round ends. A positive bend lifts the ends, as in a smile."""
    return slab(x, y + bend * (x / width) ** 2 - bend / 2, width + thick, thick, thick)


def head(x, y, grow=0.0):
    a, b = (x / (0.62 + grow - 0.05 * y)) ** 2, ((y - 0.1) / (0.64 + grow)) ** 2
    return (a + b - 0.3 * a * b - 1) * 0.31  # the product makes the cheeks a little squarer


def draw_faces(indices, res):
    """The faces numbered `indices`: images (n, res, res, 3) and multi-hot attributes (n, 8), both uint8.

    Painter's algorithm: flat shapes, one over the other from back to front, each on all faces at once. What differs
    between faces is an array (n, 1, 1), or for a colour (3, n, 1, 1), drawn from each face's index alone.
    """
    rolls = [np.random.default_rng(i).random(24, np.float32) for i in indices]
    dice = iter(np.stack(rolls, 1)[..., None, None])  # 24 numbers in [0, 1), each (n, 1, 1)

    def between(low, high):
        return low + (high - low) * next(dice)

    def any_of(table):
        return table[..., (next(dice) * table.shape[-1]).astype(int)]

    # What the faces look like. A word or colour that is listed twice is drawn twice as often.
    skin = any_of(palette("ffdcc4 f9c8a6 eeb083 d9986a bd7d55 a86f49 8b583a"))
    hair = any_of(palette("f7c63f ffd85e ee7430 b04e2c 6e4023 6e4023 38272b 221f2e 221f2e c3c8d2 f072a6 3fa7a3"))
    iris = any_of(palette("5a3420 2f78c0 3a8a55 4a4a5c"))
    backdrop = any_of(palette("bfe3f5 c9efd8 ffd9dc fff0c2 dcd3f7 b5e0dc e9ecf2"))
    shirt, felt = any_of(CLOTHES), any_of(CLOTHES[:, :-1])  # no white hats
    frame = any_of(palette("26263a c2313f 1f6f8b"))
    style = any_of(np.array("bald short short short short mohawk buns bob long long long curly curly".split()))
    mouth = any_of(np.array("smile smile smile grin grin laugh laugh flat round frown".split()))
    hat = any_of(np.array("none none none none none none none beanie brim".split()))
    smile, grin, laugh, frown = (mouth == kind for kind in ("smile", "grin", "laugh", "frown"))
    long, curly, falling = style == "long", style == "curly", np.isin(style, ("long", "bob"))
    hatted, knitted, glasses = hat != "none", hat == "beanie", between(0, 1) < 0.25
    beard = (between(0, 1) < 0.3) & ~falling & (style != "buns")
    hair = np.where(abs(hair - skin).sum(0) < 90, BLACK, hair)  # brown hair would be lost on brown skin
    shade, shadow = skin * DUSK / 255, hair * 0.85

    # The coordinates of each pixel in the face's own system, which is shifted, turned and scaled a little.
    tilt, size, aspect = between(-0.06, 0.06), between(1.06, 1.15), between(0.96, 1.04)
    ticks = (np.arange(res, dtype=np.float32) + 0.5) * (2 / res) - 1
    px, py = ticks - between(-0.05, 0.05), ticks[:, None] - between(-0.03, 0.03)
    x = (px * np.cos(tilt) + py * np.sin(tilt)) / (size * aspect)
    y = (py * np.cos(tilt) - px * np.sin(tilt)) / size
    sides, pixels_per_unit = abs(x), size * (res / 2)
    canvas = np.broadcast_to(backdrop, (3, len(indices), res, res)).copy()

    def paint(who, colour, shape):
        """Lays a flat colour over the inside of a shape, on the faces where `who` holds; edges are one pixel soft."""
        if not np.any(who):
            return
        opacity = np.clip(0.5 - shape * pixels_per_unit, 0, 1) * who
        rows, columns = np.flatnonzero(opacity.any(axis=(0, 2))), np.flatnonzero(opacity.any(axis=(0, 1)))
        if len(rows):  # most shapes are small, and what lies outside of them stays as it is
            box = np.s_[..., rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            canvas[box] += opacity[box] * (colour - canvas[box])

    # Behind the head.
    paint(falling, shadow, slab(x, y - 0.03 - 0.23 * long, 0.76, 0.65 + 0.23 * long, 0.55))
    curls = head(x, y, 0.2) + 0.03 - 0.08 * abs(np.cos(8 * np.arctan2(x, y)))
    paint(curly, hair, np.maximum(curls, y - 0.35))
    paint(style == "buns", hair, disc(sides - 0.5, y + 0.5, 0.22, 0.22))
    paint(True, shirt, slab(x, y - 1.4, 0.8, 0.7, 0.4))
    paint(True, shade, disc(x, y - 0.68, 0.3, 0.2))
    paint(~falling, shade, disc(sides - 0.63, y - 0.12, 0.11, 0.13))

    # The face.
    paint(True, skin, head(x, y))
    paint(True, skin * 0.65 + TONGUE * 0.35, disc(sides - 0.43, y - 0.36, 0.1, 0.08))
    paint(beard, hair, np.maximum(np.maximum(head(x, y, 0.06), 0.1 - y), -disc(x, y - 0.1, 0.6, 0.49)))
    lenses = slab(sides - 0.28, y - 0.08, 0.25, 0.24, between(0.08, 0.24))
    paint(glasses, skin * 0.5 + 127, lenses)
    paint(True, WHITE, disc(sides - 0.25, y - 0.08, 0.18, 0.19))
    gaze = between(-0.035, 0.035)
    paint(True, iris, disc(abs(x - gaze) - 0.24, y - 0.09, 0.125, 0.135))
    paint(True, INK, disc(abs(x - gaze) - 0.24, y - 0.09, 0.08, 0.08))
    paint(True, WHITE, disc(abs(x - gaze + 0.05) - 0.24, y - 0.03, 0.045, 0.045))
    paint(True, shade, disc(x, y - 0.28, 0.075, 0.06))

    # The mouth.
    lips = stroke(x, y - 0.48, 0.14 + 0.07 * smile, 0.12 * smile - 0.07 * frown, 0.048)
    paint(smile | frown | (mouth == "flat"), INK, lips)
    paint(mouth == "round", INK, disc(x, y - 0.49, 0.1, 0.11))
    bowl = np.maximum(disc(x, y - 0.4, 0.26, 0.24), 0.4 - y)
    paint(grin | laugh, INK, bowl)
    paint(grin, WHITE, bowl + 0.035)
    paint(laugh, TONGUE, np.maximum(bowl, disc(x, y - 0.62, 0.16, 0.11)))

    # Hair in front, which stops above the eyes.
    fringe = y + 0.38 - 1.1 * (x - between(-0.15, 0.15)) ** 2
    paint(np.isin(style, ("short", "buns", "long")), hair, np.maximum(head(x, y, 0.07), fringe))
    paint(style == "bob", hair, np.maximum(head(x, y, 0.07), np.minimum(y + 0.2, 0.52 - sides)))
    paint(style == "mohawk", hair, slab(x, y + 0.54, 0.19, 0.32, 0.18))
    paint(curly, hair, np.maximum(curls, y + 0.3 - 0.5 * x * x - 0.06 * abs(np.cos(9 * x))))
    paint(True, np.minimum(shadow, shade * 0.85), stroke(sides - 0.26, y + 0.17, 0.1, -0.04, 0.037))

    # What they wear.
    paint(glasses, frame, abs(lenses) - 0.037)
    paint(hatted, backdrop, y + 0.52 - 0.6 * x * x)  # or hair would stick out above
    paint(hatted, felt, np.where(knitted, np.maximum(head(x, y, 0.1), y + 0.3), slab(x, y + 0.54, 0.48, 0.3, 0.16)))
    paint(knitted, felt * 0.5 + 127, np.minimum(slab(x, y + 0.3, 0.68, 0.1, 0.09), disc(x, y + 0.64, 0.15, 0.15)))
    paint(hat == "brim", felt * 0.6, slab(x, y + 0.3, 0.82, 0.085, 0.08))

    blond = (hair[1] > 190) & (hair[2] < 100) & ((style != "bald") | beard)
    attributes = {
        "smiling": smile | grin | laugh,
        "open_mouth": grin | laugh | (mouth == "round"),
        "glasses": glasses,
        "hat": hatted,
        "beard": beard,
        "long_hair": long,
        "curly_hair": curly,
        "blond": blond,
    }  # (n, 1, 1) each
    labels = np.hstack([attributes[name] for name in FACE_ATTRIBUTES])[..., 0]  # (n, 8)
    return (canvas.transpose(1, 2, 3, 0) + 0.5).astype(np.uint8), labels.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# Pictures in


def list_files(place):
    """What a folder or zip holds, without hidden things: (names, read). names: sorted, with slashes; none if it is
    neither. read: a function that returns the bytes of one."""
    if place.is_dir():
        names = [path.relative_to(place).as_posix() for path in walk(place)]
        return sorted(names), lambda name: (place / name).read_bytes()
    if not place.is_file():
        return [], None
    try:
        archive, entries = zipfile.ZipFile(place), {}
    except Exception as error:  # among others BadZipFile, NotImplementedError and UnicodeDecodeError
        fail(f"{place} is no folder, and no zip that can be read ({error})")
    for entry in archive.infolist():
        name = entry.filename.replace("\\", "/").lstrip("/")  # a zip from Windows may have backslashes
        path = PurePosixPath(name)  # without "./"
        if name.endswith("/") or any(is_hidden(part) for part in path.parts):
            continue
        if str(path) in entries:
            fail(f"{place} holds {path} twice: unpack it, and name the folder")
        entries[str(path)] = entry
    return sorted(entries), lambda name: archive.read(entries[name])


def walk(folder, above=()):
    """The files below a folder. Links are followed, unless they lead back to a folder that they are in."""
    real = os.path.realpath(folder)
    if real in above:
        print(f"left out: {folder}, a link to a folder that holds it")
        return
    for path in folder.iterdir():
        if is_hidden(path.name):
            continue
        if path.is_dir():
            yield from walk(path, (*above, real))
        elif path.is_file():
            yield path
        else:
            print(f"left out: {path}, a link to nothing, or no file")


def is_hidden(name):
    """Is this a file or folder that some system keeps for itself? Unix has names with a dot, Synology's disks @eaDir,
    zips from macOS __MACOSX, Windows the other two."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "Thumbs.db")


def is_picture(path):
    """Has it the ending of a format that Pillow reads?"""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def pick_pictures(place, names):
    """The names that end like a format that Pillow reads; says what is left out."""
    pictures, others = [], Counter()
    for name in names:
        path = PurePosixPath(name)
        if is_picture(path):
            pictures.append(name)
        elif path.name not in TABLES:
            others[path.suffix.lower() or "without an ending"] += 1
    if others:
        print("left out:", ", ".join(f"{count:,} {ending}" for ending, count in others.most_common()))
    if not pictures:
        fail(f"no pictures in {place}: looked for a folder or zip with .jpg, .png or another of Pillow's formats in it "
             f"(if it has moved: train.py --data and its new place, or a link to that). Other data by name: "
             f"{', '.join(NAMES)}")
    return pictures


TABLES = ("dataset.json", "metadata.csv", "metadata.jsonl")


def find_classes(pictures, tables, read):
    """{picture: class}, without the pictures that have none. Classes are the sub-folders, unless one of the tables
    names them."""
    folders = [PurePosixPath(picture).parent for picture in pictures]
    top = PurePosixPath(posixpath.commonpath(folders))  # in a zip of the folder pets, say, this is pets
    origin, classes = "sub-folders", {}
    for picture, folder in zip(pictures, folders):
        if folder != top:
            classes[picture] = str(folder.relative_to(top))
    for file in tables:
        try:
            if not top.is_relative_to(PurePosixPath(file).parent):
                raise ValueError("it does not lie above all pictures")
            by_name = read_table(file, read(file).decode("utf-8-sig"))
            matching = {picture: by_name[picture] for picture in pictures if picture in by_name}
            if by_name and not matching:
                raise ValueError("no picture has one of the names in it")
            if origin != "sub-folders":
                raise ValueError(f"{origin} does so already")
            origin, classes = file, matching
        except Exception as error:  # tables of other forms fail in many ways
            print(f"{file} was seen and ignored, it does not name the pictures' classes: {error!r:.80}")
    if origin != "sub-folders" and not classes:
        print(f"{origin} says that there are no classes")
    if classes:
        labels = sorted(set(classes.values()))
        print(f"{len(labels)} classes from {origin}: {', '.join(labels[:8])}{', ...' if len(labels) > 8 else ''}")
    if classes and len(classes) < len(pictures):
        print(f"{len(pictures) - len(classes):,} pictures have no class; --cond leaves them out")
    return classes


def read_table(file, text):
    """{picture: class} from a table. dataset.json (StyleGAN, EDM) has pairs of picture and label, or null, under
    "labels"; metadata.csv and metadata.jsonl (Hugging Face) have rows with a file_name and a label."""
    if file.endswith(".json"):
        pairs = json.loads(text)["labels"]
        if pairs is None:
            return {}
    elif file.endswith(".jsonl"):
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        pairs = [(row["file_name"], row["label"]) for row in rows]
    else:
        pairs = [(row["file_name"], row["label"]) for row in csv.DictReader(io.StringIO(text))]
    if not pairs:
        raise ValueError("it is empty")
    classes = {}
    for picture, label in pairs:
        name = str(PurePosixPath(file).parent / picture)
        if not isinstance(label, str | int | None) or name in classes:
            raise ValueError(f"{picture} has several labels, or one that is no class")
        if label not in (None, ""):
            classes[name] = str(label)
    return classes


def stream_files(names, labels, read, res, channels=3):
    """Decodes in parallel, since Pillow releases the GIL; a few hundred at a time, so that memory stays small."""

    def work(name, label):
        try:
            pixels, done = read_picture(read(name), res, channels)
            return pixels, label, done
        except Exception as error:  # a broken picture raises anything; it is skipped, and named
            if getattr(error, "errno", None):
                raise  # the disk or the network failed: the picture may be readable next time
            return None, label, f"{name} ({type(error).__name__}: {error})"

    at_once = max(64, min(512, 2**24 // res**2))  # results that may wait: 50 MB, or 200 at 1024 pixels
    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), at_once):
            yield from pool.map(work, names[i : i + at_once], labels[i : i + at_once])


def read_picture(content, res, channels=3):
    """Decodes a picture file: (uint8 (res, res, channels), list of what was done). Upright, in sRGB, transparency on
    white, the centre square, resized with antialiasing."""
    colours, alpha, done = decode(content, res)
    if alpha is not None:
        colours = Image.composite(colours, Image.new("RGB", colours.size, "white"), alpha)
        done.append("transparency turned white")
    square = ImageOps.fit(colours, (res, res), Image.Resampling.LANCZOS)
    pixels = np.array(square if channels == 3 else square.convert("L"))
    if pixels.max() < 16:
        done.append("nearly black")
    if pixels.min() > 239:
        done.append("nearly white")
    return pixels.reshape(res, res, channels), done


def read_mask(content, res):
    """Decodes a mask: (bool (res, res), True in the hole, list of what was done). If it is transparent anywhere, the
    hole is where it is painted; otherwise where it is bright."""
    colours, alpha, done = decode(content, res)
    if alpha is None:
        mask, rule = colours.convert("L"), "hole: where it is white"
    else:
        mask, rule = alpha, "hole: where it is painted, not transparent"
    values = np.asarray(ImageOps.fit(mask, (res, res), Image.Resampling.NEAREST))
    white = 1 if values.max() == 1 else 255  # some programs write masks as 0 and 1
    return values > white / 2, done + [rule]


def decode(content, res):
    """A picture file's pixels, upright and in sRGB: (RGB image, its alpha as an L image, or None if it is opaque
    everywhere, list of what was done). A JPEG may come out smaller than the file says, but not smaller than res."""
    try:
        im = Image.open(io.BytesIO(content))
        size = im.size
        im.draft("RGB", (res, res))  # JPEG: the decoder halves while it decodes, as long as it stays above res
        im.load()
    except Exception:
        im = Image.open(io.BytesIO(bare_png(content)))
        size = im.size
        im.load()
    done, turn, alpha = [], None, None
    with contextlib.suppress(Exception):  # the second frame may be damaged, which is no matter
        if getattr(im, "is_animated", False):
            done.append("the first of its frames")
    with contextlib.suppress(Exception):  # so may the metadata
        turn = TURNS.get(im.getexif().get(ExifTags.Base.Orientation))
    if im.has_transparency_data:
        alpha = opacity(im, content)
        if alpha.getextrema()[0] == 255:
            alpha = None

    colours = eight_bits(im)
    mode = {"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(colours.mode, "RGB")
    colours = colours.convert(mode)  # without alpha
    transform = to_srgb(im.info.get("icc_profile"), mode)
    if transform:
        colours = ImageCms.applyTransform(colours, transform)
        done.append("colours converted to sRGB")
    colours = colours.convert("RGB")

    if turn is not None:
        colours = colours.transpose(turn)
        alpha = None if alpha is None else alpha.transpose(turn)
        done.append("turned upright")
    if size[0] != size[1]:
        done.append("cropped to the centre square")
    if min(size) != res:
        done.append(f"{'resized' if min(size) > res else 'enlarged'} to {res}x{res}")
    return colours, alpha, done


# What makes a picture upright, by the orientation that EXIF gives it.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def bare_png(content):
    """A PNG with nothing but its pixels and their colours and orientation, in case the damage is elsewhere; other files
    as they are."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept, at = content[:8], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")  # length, name, data, checksum
        kind, checksum = content[at + 4 : at + 8], content[end - 4 : end]
        sound = zlib.crc32(content[at + 4 : end - 4]).to_bytes(4, "big") == checksum
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT") or sound and kind in (b"iCCP", b"eXIf"):
            kept += content[at:end]
        at = end
    return kept + b"\0\0\0\0IEND\xaeB`\x82"


def opacity(im, content):
    """The alpha of a picture as an L image: 255 where it is opaque, 0 where it is transparent."""
    colour = im.info.get("transparency")
    deep = im.format == "PNG" and content[24] == 16  # bits per sample
    if not deep or colour is None:
        return im.convert("RGBA").getchannel("A")
    # PNG can make one colour transparent. Pillow compares its 16 bits with pixels of 8.
    if im.mode == "RGB":
        differs = (np.asarray(im) != np.array(colour) >> 8).any(axis=2)
    else:
        differs = np.asarray(im) != colour
    return Image.fromarray(np.uint8(255) * differs)


def eight_bits(im):
    """A picture with 8 bits per colour. Pillow reads most files so, but not grey ones of 16 bits."""
    if im.mode.startswith("I;16") or (im.mode == "I" and im.format == "PPM"):
        tags = im.tag_v2 if im.format == "TIFF" else {}
        bits = tags.get(ExifTags.Base.BitsPerSample, [16])[0]  # 12 or 16
        values = np.asarray(im) / (2**bits - 1)
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # white is 0
            values = 1 - values
        return Image.fromarray((255 * values + 0.5).astype(np.uint8))
    if im.mode in ("I", "F"):
        raise ValueError("integers of 32 bits and floating-point numbers have no agreed black and white")
    return im


@functools.lru_cache(maxsize=16)
def to_srgb(profile, mode):
    """The transform from a colour profile (bytes, or None) to sRGB. None if there is nothing to do, or if the profile
    is broken or not for such pictures."""
    if not profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode != "CMYK":  # is it sRGB already, up to rounding?
        before = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).convert(mode)
        after = ImageCms.applyTransform(before, transform)
        if max(high for _, high in ImageChops.difference(before.convert("RGB"), after).getextrema()) <= 2:
            return None
    return transform


# A change of these functions, too, means packing again.
READING = (list_files, is_hidden, is_picture, pick_pictures, find_classes, read_table, stream_files, read_picture,
           decode, bare_png, opacity, eight_bits, to_srgb)


def find_celeba(root):
    """The first of CelebA's usual forms found under root: the aligned zip, its folder, or a CelebA-HQ folder."""
    forms = ("img_align_celeba.zip", "img_align_celeba", "celeba_hq_256", "celeba_hq", "CelebA-HQ-img", "celebahq")
    for folder in (root, root / "celeba", root / "CelebAMask-HQ"):
        for form in forms:
            if (folder / form).exists():
                return folder / form
    fail(f"CelebA is not there: looked in {root}/ for {', '.join(forms[:3])} and the like. Get {forms[0]} "
         f"(1.3 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, put it into {root}/ as it is, and run "
         f"this again (or name the folder it lies in: --root DIR)")


def celeba_attributes(table, names):
    """CelebA's 40 attributes from its list_attr_celeba.txt: their names, and (N, 40) of 0 and 1. The table has the
    number of pictures in its first line, the names in its second, then a line a picture: file, and 1 or -1 each."""
    lines = [line.split() for line in table.read_text(errors="replace").splitlines()]
    attributes = lines[1] if len(lines) > 1 else []
    rows = {}
    for words in lines[2:]:
        if attributes and len(words) == 1 + len(attributes):
            rows[words[0]] = words[1:]
    files = [name.rpartition("/")[2] for name in names]
    missing = [file for file in files if file not in rows]
    if missing:
        fail(f"{table} says nothing of {missing[0]} (and {len(missing) - 1} others): get the whole file, or move it "
             f"away to train without attributes")
    values = np.array([rows[file] for file in files])
    return attributes, (values == "1").astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# Pictures out


def grid(pixels, columns=None):
    """uint8 (n, H, W, C) as one PIL image, by default as square as it goes; small pictures are enlarged."""
    n, H, W, _ = pixels.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows, gap = -(-n // columns), max(1, H // 16)
    tiles = [Image.fromarray(p.squeeze()) for p in pixels]  # (H, W, 3), or (H, W) if grey
    sheet = Image.new(tiles[0].mode, (columns * (W + gap) + gap, rows * (H + gap) + gap), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        sheet.paste(tile, (gap + column * (W + gap), gap + row * (H + gap)))
    return ImageOps.scale(sheet, max(1, 72 // H), Image.Resampling.NEAREST)


def save_whole(im, file):
    """Saves a PIL image. If this is cut short, an older file stays as it was."""
    part = file.parent / f".part-{file.name}"
    try:
        im.save(part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def tile(x):
    """Pictures in [-1, 1], (B, C, H, W), one or a few, as a PIL image of 288 x 288 pixels."""
    return grid(to_uint8(x)).resize((288, 288), Image.Resampling.NEAREST)


def scatter(p):
    """Points (n, 2) as a PIL image of the square [-6, 6]^2."""
    return trails(p[:, None])


def trails(lines):
    """Lines through points, (n, k, 2), as a PIL image of the square [-6, 6]^2: each starts in an orange dot and ends in
    a blue one. Lines that are not finite, or go far outside, are left out."""
    limit, size = 6.0, 480
    im = Image.new("RGB", (2 * size, 2 * size), "white")  # averaged down at the end, which smooths the edges
    draw = ImageDraw.Draw(im, "RGBA")
    near = np.abs(lines).max((1, 2)) < 2 * limit
    corners = size + lines[near] * (1, -1) / limit * size  # y points down in a picture
    if lines.shape[1] > 1:
        for line in corners:
            draw.line(line.ravel().tolist(), (100, 100, 100, 110), 2)
        for line in corners:
            draw.circle(line[0], 4, (230, 120, 30, 160))
    for line in corners:
        draw.circle(line[-1], 4, (40, 70, 160, 110))
    return im.reduce(2)


def panels(pictures, columns=None):
    """{title: PIL image}, all of one size, as one image: in rows, each below its title. By default in one row."""
    W, H = next(iter(pictures.values())).size
    columns, strip = columns or len(pictures), 30  # pixels for a title
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * W, rows * (strip + H)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (title, im) in enumerate(pictures.items()):
        row, column = divmod(i, columns)
        left, top = column * W, row * (strip + H)
        draw.text((left + W / 2, top + strip / 2), title, "#444444", ImageFont.load_default(16), "mm")
        sheet.paste(im, (left, top + strip))
    return sheet


def save_gif(file, frames):
    """PIL images as an animation of three seconds that loops, holding the last frame for a while."""
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def plot(curves, xlabel, logarithmic="y"):
    """Line plot as a PIL image. curves: {name: (list of x, list of y)}. logarithmic: which axes are, "", "y" or "xy";
    on those all numbers must be above 0."""
    im = Image.new("RGB", (1440, 840), "white")  # drawn at twice the size, as in `trails`
    draw, font, grey = ImageDraw.Draw(im), ImageFont.load_default(24), "#444444"
    is_log = np.array([axis in logarithmic for axis in "xy"])
    lines = []
    for x, y in curves.values():
        line = np.stack([x, y], 1).astype(float)  # (n, 2)
        line[:, is_log] = np.log10(line[:, is_log])
        lines.append(line)
    everything = np.concatenate(lines)
    low, high = everything.min(0), everything.max(0) + 1e-6

    def place(p):
        """Where points (n, 2) lie in the picture; the axes meet at (120, 750)."""
        return (p - low) / (high - low) * (1290, -710) + (120, 750)

    for tick in np.linspace(low, high, 6):  # each is a tick of both axes, (2,)
        x, y = place(tick)
        value = tick.copy()
        value[is_log] = 10 ** tick[is_log]
        draw.line([120, y, 1410, y], "#dddddd", 2)
        draw.text((108, y), f"{value[1]:.3g}", grey, font, "rm")
        draw.text((x, 762), f"{value[0]:,.0f}" if value[0] >= 10 else f"{value[0]:.2g}", grey, font, "mt")
    colours = ("#2846a0", "#e07020", "#208040", "#a02860", "#808080")
    for i, (name, line) in enumerate(zip(curves, lines)):
        draw.line(place(line).ravel().tolist(), colours[i], 4)
        draw.text((1398, 42 + 34 * i), name, colours[i], font, "rt")
    draw.text((720, 828), xlabel, grey, font, "mb")
    return im.reduce(2)


# ---------------------------------------------------------------------------------------------------------------
# Packing


def stream_faces(n, res):
    at_once = max(1, 2**16 // res**2)  # few enough to stay in the processor's cache, which is faster than threads
    for i in range(0, n, at_once):
        for pixels, label in zip(*draw_faces(range(i, min(i + at_once, n)), res)):
            yield pixels, label, []


def is_writable(folder):
    """Can files be made in this folder, which is itself made if need be?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def write_pack(pack, source, samples, n, label_names):
    """Writes samples to `pack`, raw bytes of one picture after another, and what belongs to them into a .npz beside it.
    n: how many there will be, or None. What could not be read is listed in a .skipped.txt.

    All are written in a temporary folder and move when they are whole. The folder is deleted even if this fails,
    unless the process is killed outright.
    """
    began = time.perf_counter()
    labels, skipped, done, digest = [], [], Counter(), hashlib.sha256()
    pack.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=pack.parent) as folder:
        part = Path(folder, "part.images")
        with open(part, "wb") as file:  # not a memory map: there, a full disk kills the process without a message
            for pixels, label, notes in samples:
                if pixels is None:
                    skipped.append(notes)
                    continue
                content = pixels.tobytes()
                file.write(content)
                digest.update(content)
                labels.append(label)
                done.update(notes)
                if len(labels) % 2000 == 0:
                    report_progress(len(labels), n, time.perf_counter() - began)
        if skipped:
            print(f"skipped {len(skipped)} of {n} that could not be read:", *skipped[:10], sep="\n  ")
        if not labels:
            fail(f"none of the {n:,} pictures could be read")
        labels, label_names = drop_empty_classes(np.array(labels, np.int64), label_names)
        np.savez(part.with_suffix(".npz"), labels=labels, label_names=np.array(label_names, str), skipped=len(skipped),
                 digest=digest.hexdigest(), source=os.path.realpath(source))
        part.with_suffix(".skipped.txt").write_text("\n".join(skipped), errors="backslashreplace")
        for ending in (".skipped.txt", ".npz", ".images"):  # the pictures last: a pack that exists is complete
            part.with_suffix(ending).replace(pack.with_suffix(ending))
    print(f"  {len(labels):,} pictures", *(f"{count:,} {note}" for note, count in done.items()), sep=", ", flush=True)


def report_progress(done, n, seconds, unit="pictures"):
    """done: how many were ready after so many seconds; n: how many there will be, or None if nobody knows."""
    rate = done / seconds
    if n is None:
        print(f"  {done:,} {unit}  {rate:,.1f} {unit}/s", flush=True)
    else:
        left = timedelta(seconds=round((n - done) / rate))
        print(f"  {done:,} of {n:,}  {rate:,.1f} {unit}/s  ETA {left}", flush=True)


def drop_empty_classes(labels, label_names):
    """Without the classes none of whose pictures could be read."""
    if labels.ndim == 2:
        return labels, label_names
    present = np.unique(labels[labels >= 0])
    for i, name in enumerate(label_names):
        if i not in present:
            print(f"no class {name}: none of its pictures could be read")
    renumbered = np.where(labels < 0, -1, np.searchsorted(present, labels))
    return renumbered, [label_names[i] for i in present]


def report_old_packs(pack, source):
    """Says which packs beside this one are of data that has gone or changed; deleting them is for the user."""
    old, size = [], 0
    for other in pack.parent.glob("*.images"):
        try:
            with np.load(other.with_suffix(".npz")) as beside:
                origin = str(beside["source"])
        except Exception:  # of an earlier version, or damaged
            origin = ""
        same_kind = other.name.rpartition("-")[0] == pack.name.rpartition("-")[0]
        same_data = same_kind and origin == os.path.realpath(source)
        if other != pack and (same_data or not os.path.exists(origin)):
            old.append(all_of(other))
            size += other.stat().st_size
    if old:
        print(f"packs of data that is gone from here or has changed, {size / 1e6:,.1f} MB; to delete them: rm -- "
              f"{' '.join(old)}")


def all_of(pack):
    """A pack and what belongs to it, for the command line."""
    return shlex.quote(str(pack.with_suffix(""))) + ".*"


# ---------------------------------------------------------------------------------------------------------------
# MNIST, Fashion-MNIST and CIFAR-10, from the files that their authors publish

IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
BINARY = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]

OFFICIAL = {  # files: what is published, with its MD5; unpacked: the files inside; folders: where people have them
    "mnist": dict(
        res=28, channels=1, unpacked=IDX, folders=["mnist", "MNIST"],
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        label_names="0 1 2 3 4 5 6 7 8 9".split(),
        files={"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
               "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
               "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
               "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion": dict(
        res=28, channels=1, unpacked=IDX, folders=["fashion", "fashion-mnist", "FashionMNIST"],
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        label_names="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        files={"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "cifar10": dict(
        res=32, channels=3, unpacked=BINARY, folders=["cifar10", "cifar-10-batches-bin"],
        url="https://www.cs.toronto.edu/~kriz/",
        label_names="airplane automobile bird cat deer dog frog horse ship truck".split(),
        files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}

NAMES = ["faces", "celeba", *OFFICIAL, *POINTS]  # anything else that --data is given is the path of a folder or zip


def find_files(name, root):
    """The dataset's files, unpacked or as published; [] if they are not all there.

    Looks below the folders of root that are called like the dataset by us, torchvision or Debian, and in root, if its
    own path has such a name. Not elsewhere: MNIST and Fashion-MNIST call their files alike.
    """
    about = OFFICIAL[name]
    places = [root / folder for folder in about["folders"]]
    if not set(about["folders"]).isdisjoint(root.absolute().parts):
        places.append(root)
    for place in places:
        by_name = {file.name: file for file in sorted(place.rglob("*"), reverse=True) if file.is_file()}
        for wanted in (about["unpacked"], about["files"]):
            if all(file in by_name for file in wanted):
                return [by_name[file] for file in wanted]
    return []


def missing_files(name, root):
    """The published files that are not in the dataset's own folder."""
    return [file for file in OFFICIAL[name]["files"] if not (root / name / file).exists()]


def find_official(name, root):
    files = find_files(name, root)
    if not files:
        fail(f"{name} is not there: no {', '.join(missing_files(name, root))} (or unpacked) in {root / name}/. Type "
             f"python train.py --data {name} --root {root} --download, or get {OFFICIAL[name]['url']}NAME, into that "
             f"folder")
    return files


def stream_official(name, files, res):
    """All published samples, training and test; `split` decides anew which ones are held out."""
    advice = "and run this again with --download"
    arrays = []  # pictures, labels, pictures, labels, ...
    for file in files:
        try:
            arrays += arrays_in(file)
            if len(arrays[-1]) == 0:
                raise ValueError("empty")
        except Exception as error:  # gzip, tarfile and numpy raise half a dozen kinds for a damaged file
            fail(f"{file} is cut short or damaged ({error}); delete it {advice}")
    size = (28, 28) if channels(name) == 1 else (32, 32, 3)
    for pictures, labels in zip(arrays[::2], arrays[1::2]):
        if pictures.shape != (len(labels), *size) or labels.ndim != 1 or labels.max() > 9:
            fail(f"{files[0].parent}: pictures and labels do not belong together; delete them {advice}")
    for pictures, labels in zip(arrays[::2], arrays[1::2]):
        for picture, label in zip(pictures, labels):
            resized = Image.fromarray(picture).resize((res, res), Image.Resampling.LANCZOS)
            yield np.asarray(resized), label, []


def arrays_in(file):
    """The arrays in a file, unpacking it if need be."""
    if file.name.endswith(".tar.gz"):
        contents = {}
        with tarfile.open(file, "r:gz") as archive:
            for member in archive:
                if member.name.endswith(".bin"):
                    contents[member.name] = archive.extractfile(member).read()
        arrays = []
        for name in sorted(contents):
            arrays += parse_official(contents[name])
        return arrays
    content = file.read_bytes()
    return parse_official(gzip.decompress(content) if file.suffix == ".gz" else content)


def parse_official(content):
    """Returns [array] for MNIST's format: two zeros, 8 for bytes, the number of dimensions, their sizes (big-endian, 4
    bytes each), the values. Returns [pictures, labels] for CIFAR-10's: rows of a label and the red, green and blue
    planes."""
    if content[:3] == b"\0\0\x08":
        sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes))
        return [values.reshape(sizes)]
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    pictures = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return [pictures, rows[:, 0]]


def download(name, root):
    """Fetches what is missing into root/name. Only one process may do so at a time."""
    if find_files(name, root):
        return
    (root / name).mkdir(parents=True, exist_ok=True)
    for file in missing_files(name, root):
        fetch(OFFICIAL[name]["url"] + file, root / name / file, OFFICIAL[name]["files"][file])


def fetch(url, file, md5):
    """Downloads into FILE.part, going on where an earlier run stopped; its name changes once the MD5 is right."""
    print(f"downloading {url} to {file}", flush=True)
    part = file.with_name(file.name + ".part")
    part.touch()
    advice = f"Run the same command again, or put the file into {file.parent}/ by hand"
    try:
        fetch_rest(url, part)
    except Exception as error:  # no server, no such file, nonsense, silence
        fail(f"could not download {url}: {str(error).strip()}. {advice}", status=1)
    if hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        fail(f"what {url} sent is not the published file (its MD5 is not {md5}) and was deleted. {advice}", status=1)
    part.rename(file)


def fetch_rest(url, part):
    """Downloads what `part` still lacks."""
    request = Request(url, headers={"Range": f"bytes={part.stat().st_size}-"})
    try:
        answer = urlopen(request, timeout=30)
    except HTTPError as error:
        if error.code == 416:  # there is nothing after the range's start: an earlier run got it all
            return
        raise
    # 206 answers with the rest, as asked for; a server that ignores ranges sends all of it.
    with answer, open(part, "ab" if answer.status == 206 else "wb") as out:
        total = out.tell() + int(answer.headers["Content-Length"] or 0)
        while True:
            block = answer.read(2**21)
            if not block:
                break
            out.write(block)
            print(f"  {out.tell() / 1e6:,.1f} of {total / 1e6:,.1f} MB", flush=True)
        if out.tell() < total:
            raise ConnectionError(f"the connection closed after {out.tell():,} of {total:,} bytes")


# ---------------------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    parser = argparse.ArgumentParser(description="Packs a dataset and draws a sheet of it.", allow_abbrev=False)
    parser.add_argument("--data", default="faces", help="a name (see README.md), or a folder or zip of pictures")
    parser.add_argument("--res", type=number(int, 8, 10**4), help="pixels a side (32, or an official dataset's own)")
    parser.add_argument("--root", default="data", help="where datasets are looked for and packed arrays kept")
    parser.error = fail
    args = parser.parse_args(argv)
    res = args.res or usual_res(args.data)
    to = run_folder(args.data, res) / "data.png"
    make_folder_for(to)
    images, _, label_names, _ = load(args.data, args.root, res)
    if args.data in POINTS:
        sheet = scatter(images[:2000])
    else:
        sheet = grid(images[permutation(len(images), seed=0, epoch=0)[:64]])
    sheet.save(to)
    print(f"{len(images):,} samples; labels: {', '.join(label_names) or 'none'}; wrote {to}")


# ---------------------------------------------------------------------------------------------------------------
# Plumbing that every script needs: seeds, flags, ending with a message.

# Batches, noise and the like each have a seed of their own, made from the user's seed (or a fixed one), one of these
# purposes, and what else they depend on: the step and the process, or the sample. The order of calls has no effect.
ORDER, BATCH, HELD_OUT, SAMPLE, SPLIT, ON_THE_WAY, TRACE, JUDGE = range(8)


def seed_from(*integers):
    """Hashes integers into one 63-bit seed, for numpy's and torch's generators alike."""
    return int(np.random.SeedSequence(integers).generate_state(1, np.uint64)[0]) >> 1


def number(kind, low=None, high=None):
    """A type for argparse: a number of this kind (int or float) from low to high; by default from 1 for an int, from 0
    for a float."""
    if low is None:
        low = 1 if kind is int else 0
    if high is None:
        high = 10**9 if kind is int else 1e38

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie between {low} and {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse calls a wrong one "invalid int value"
    return parse


def make_folder_for(file):
    """Makes the folder in which `file` goes (or `file` itself, as a folder, if it has no ending). So what cannot be
    written is refused before the work, not after it."""
    if file.suffix and file.is_dir():
        fail(f"cannot write {file}: there is a folder of that name")
    folder = file.parent if file.suffix else file
    if not is_writable(folder):
        fail(f"cannot write {file}: files cannot be made in {folder}/")


def fail(message, status=2):
    """Ends the program with one line and no traceback: status 2 for a mistake in its use, 1 for a failure."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


REMEDIES = {  # what torch and Triton say when something is missing, and what to do about it
    "out of memory|can't allocate memory|not enough memory": "a smaller --batch needs less",
    "No working C.. compiler|Failed to find C compiler|CalledProcessError|working triton": "--no-compile does without",
}


def run(main):
    """Runs a program. Failures that are no mistake of the program (a full disk, no permission, too little memory) end
    it with one line instead of a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    warnings.filterwarnings("ignore", module="PIL")  # about metadata; what cannot be read is an error
    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, exit_on_signal)
    if sys.platform == "linux":
        keep_freed_memory()
    try:
        main()
    except (OSError, FloatingPointError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
        text = str(error) or "out of memory"
        for words, remedy in REMEDIES.items():
            line = re.search(f".*({words}).*", text)
            if line:
                fail(f"{line[0]}; {remedy}", status=1)
        if isinstance(error, RuntimeError):
            raise  # a mistake in the program
        fail(text.partition("\n")[0], status=1)


def exit_on_signal(signal_number, frame):
    """Raises SystemExit, so that half-written files are removed on the way out."""
    sys.exit(128 + signal_number)


def keep_freed_memory():
    """glibc's malloc returns freed memory to the system, by trimming its heap and by unmapping large blocks. The next
    tensor then pays for fresh memory, with a page fault for every 4 KiB: 6% of a CPU's step at --res 64. We switch off
    both (see mallopt(3))."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


if __name__ == "__main__":
    run(main)
