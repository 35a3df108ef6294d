"""Pixels in, pixels out: every dataset becomes one array; batches index it; results become pictures.

    python data.py --data celeba --res 256      packs a dataset and draws a sheet of it, without training

A source (a zip, a folder, our own drawing code) is decoded, cropped and resized once, into a uint8 array (N, H, W, C)
on disk. Training only maps that array into memory. So loading a batch is an index and a memcpy, all processes share
the pages, and there are no loader processes to tune.

Errors are for the user: a ValueError says what to change, an OSError what failed. Last in this file: the plumbing that
all scripts share (seeds, flags, progress, writing files whole, ending with a message).
"""

import argparse
import contextlib
import errno
import functools
import gzip
import hashlib
import http.client
import io
import math
import os
import re
import shlex
import signal
import sys
import tarfile
import tempfile
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from shutil import disk_usage
from urllib.request import urlopen

import numpy as np
import torch
from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------------------
# Datasets. To add one, add a branch to `find_dataset` (or, for points, a function to POINTS).

VERSION = 2  # of what is packed: raise it when a change of this file changes pixels or labels, and all is packed anew


def load(name, root="data", cache="cache", res=32, cond="", channels=None):
    """A dataset by name or path, packed on first use: (images, labels, label_names, content).

    images: uint8 (N, res, res, C), memory-mapped, or points, float32 (N, 2). labels: those that `cond` asks for, see
    `choose_labels`. content: a hash of the files' names and sizes and of the labels, but not of pixels, which another
    version of Pillow may decode a little differently, nor of the place.
    root: where datasets lie; it is only read. cache: where packs are written. channels: 3 for colour, 1 for grey; by
    default 3, or an official dataset's own.
    """
    if name in POINTS:
        labels, label_names = choose_labels(np.zeros(POINTS_DRAWN, np.int64), [], cond)
        return points(name, POINTS_DRAWN, seed=0).numpy(), labels, label_names, name
    if channels is None:
        channels = usual_channels(name)
    place, files, label_names, n, samples = find_dataset(name, Path(root), res, channels)
    identity = VERSION, os.path.realpath(place), files, n, res, channels
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    pack = Path(cache, f"{short_name(name)}-{res}-{key}.images")
    if not pack.exists():
        say(f"packing {name} at {res}x{res} from {place} into {pack}")
        write_pack(pack, n * res**2 * channels, samples, n, files, label_names)
    try:
        with np.load(pack.with_suffix(".npz")) as beside:
            labels, label_names = beside["labels"], beside["label_names"].tolist()
            skipped, content = int(beside["skipped"]), str(beside["content"])
        images = np.memmap(pack, mode="r").reshape(len(labels), res, res, channels)
    except Exception as error:  # cut short, or one of the two deleted
        raise ValueError(f"{pack} is damaged ({error}); it will be packed anew after rm {shlex.quote(str(pack))}")
    if skipped:
        say(f"{skipped:,} pictures of {name} could not be read, and are left out (to try them again: rm "
            f"{shlex.quote(str(pack))})")
    labels, label_names = choose_labels(labels, label_names, cond)
    content = hashlib.sha256(repr((content, label_names)).encode() + labels.tobytes()).hexdigest()[:16]
    return images, labels, label_names, content


def find_dataset(name, root, res, channels):
    """Where a dataset is and what it holds: (place, files, label_names, n, samples).

    place: the file or folder that it comes from. files: (name, size, stamp) each; if a stamp changes, all is packed
    again. label_names: of attributes or numbered classes; or None, if each sample brings the name of its class. n: how
    many samples. samples: a lazy generator of (pixels, label, notes), with pixels uint8 (res, res, C) and a list of
    what was odd; or of (None, name, reason) where a picture cannot be read.
    """
    if name == "faces":
        # As many as take about half a minute to draw. A default run at 32 pixels sees each once or twice.
        n = min(FACES, 2**27 // res**2)
        return Path(__file__), [], FACE_ATTRIBUTES, n, stream_faces(n, res)
    if name in OFFICIAL:
        paths, about = find_official(name, root), OFFICIAL[name]
        files = [stamped(path.name, path) for path in paths]
        return paths[0].parent, files, about["label_names"], about["n"], stream_official(name, paths, res)
    place = find_celeba(root, res) if name == "celeba" else Path(name)
    files, open_picture = list_pictures(place)
    names = [picture for picture, _, _ in files]
    attributes, beside = place.parent / "list_attr_celeba.txt", []
    if name == "celeba" and attributes.exists():
        beside = [stamped(attributes.name, attributes)]
        label_names, labels = celeba_attributes(attributes, names)
    else:  # a picture's class is the folder that it lies in
        label_names = None
        labels = [composed(PurePosixPath(picture).parent.name or short_name(place)) for picture in names]
    samples = stream_files(files, labels, open_picture, res, channels)
    return place, files + beside, label_names, len(files), samples


def stamped(name, path):
    about = path.stat()
    return name, about.st_size, about.st_mtime_ns


def choose_labels(labels, label_names, cond):
    """The labels to learn, and their names: classes, int64 (N,), or attributes, (N, K) of 0 and 1. cond: "all", or some
    attributes by name, comma-separated; or "" for none: then they are all 0, and a network that was built for none
    ignores them."""
    if not cond:
        return np.zeros(len(labels), np.int64), []
    if len(label_names) < 2:
        raise ValueError(f"--cond {cond}: this dataset has no labels to learn (a folder's are its sub-folders; those "
                         f"of --data celeba come from list_attr_celeba.txt beside its pictures)")
    if labels.ndim == 1:
        if cond != "all":
            raise ValueError(f"--cond {cond}: for this dataset it can be all")
        for name in label_names:
            if name == "all" or "," in name or name != name.strip():
                raise ValueError(f"--cond {cond}: sample.py --label could not ask for '{name}': rename that folder")
    else:
        chosen = label_names if cond == "all" else [name.strip() for name in cond.split(",")]
        for name in chosen:
            if name not in label_names or chosen.count(name) > 1:
                raise ValueError(f"--cond {name}: it can be all, or, each once, {', '.join(label_names)}")
        labels, label_names = labels[:, [label_names.index(name) for name in chosen]], list(chosen)
    training = labels[split(len(labels))[0]]
    counts = training.sum(0) if training.ndim == 2 else np.bincount(training, minlength=len(label_names))
    for name, count in zip(label_names, counts):
        if count == 0:
            raise ValueError(f"--cond {cond}: there are no pictures with the label {name}, or all of them are held "
                             f"out: add some; or remove that folder, or name other attributes")
    say("labels, with how many pictures to learn from:",
        ", ".join(f"{name} ({count:,})" for name, count in zip(label_names, counts)))
    return labels, label_names


def usual_channels(name):
    return OFFICIAL[name]["channels"] if name in OFFICIAL else 3


def usual_res(name):
    return OFFICIAL[name]["res"] if name in OFFICIAL else 32


def composed(name):
    """Accents as a keyboard types them; macOS takes them apart in the names of files."""
    return unicodedata.normalize("NFC", name)


def short_name(name):
    """pets for ../pets.zip."""
    return Path(os.path.realpath(name)).name.removesuffix(".zip")


def run_folder(name, res):
    """Where results go unless the user says otherwise."""
    return Path("out", name if name in POINTS else f"{short_name(name)}-{res}")


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
    return x.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # the same order in memory as the noise


def to_uint8(x):
    """Tensor in [-1, 1], (B, C, H, W) -> uint8 array (B, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


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


POINTS = {"moons": moons, "8gaussians": eight_gaussians, "checkerboard": checkerboard, "spirals": spirals}


# ---------------------------------------------------------------------------------------------------------------
# Cartoon faces, the default data: no download, any resolution, drawn by the code below (if you change it: VERSION).

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


def stream_faces(n, res):
    at_once = max(1, 2**16 // res**2)  # few enough to stay in the processor's cache, which is faster than threads
    for i in range(0, n, at_once):
        for pixels, label in zip(*draw_faces(range(i, min(i + at_once, n)), res)):
            yield pixels, label, []


# ---------------------------------------------------------------------------------------------------------------
# Pictures in: from a folder or a zip, each read right, or left out by name


def list_pictures(place):
    """The pictures in a folder or zip: ([(name, size, stamp)], sorted, and a function that opens one by its name).
    Hidden files are ignored; what else Pillow does not read is counted by its ending, and printed."""
    if place.is_dir():
        found = list_folder(place)
        opener = lambda name: open(place / name, "rb")
    else:
        try:
            archive = zipfile.ZipFile(place)
        except Exception as error:  # among others OSError, BadZipFile and UnicodeDecodeError
            raise ValueError(f"--data {place}: no folder, and no zip that can be read ({error}): name its "
                             f"place, or one of {', '.join(NAMES)}")
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        found = [(name, entry.file_size, entry.CRC) for name, entry in entries.items()]
        opener = lambda name: archive.open(entries[name])
    pictures, others = [], Counter()
    for file in sorted(found):
        name = PurePosixPath(file[0])
        if any(is_hidden(part) for part in name.parts):
            continue
        if Image.registered_extensions().get(name.suffix.lower()) in Image.OPEN:
            pictures.append(file)
        else:
            others[name.suffix.lower() or "without an ending"] += 1
    if others:
        say(f"left out of {place}:", ", ".join(f"{count:,} {ending}" for ending, count in others.most_common()))
    if not pictures:
        raise ValueError(f"--data {place}: no pictures in it, such as .jpg or .png")
    return pictures, opener


def list_folder(folder):
    """(name, size, time of change) of each file below a folder. Links are followed, but to each folder once, so circles
    end."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=lambda error: say("left out:", error), followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            say(f"left out: {here}, a folder that was seen already under another name")
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for path in (Path(here, name) for name in names):
            if path.is_file():
                found.append(stamped(path.relative_to(folder).as_posix(), path))
            else:
                say(f"left out: {path}, a link to nothing, or no file")
    return found


def is_hidden(name):
    """Does some system keep this file or folder for itself? Unix has names with a dot, Synology's disks @eaDir, zips
    from macOS __MACOSX, Windows the other two."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "Thumbs.db")


def stream_files(files, labels, open_picture, res, channels):
    """Decodes in parallel, since Pillow releases the interpreter's lock. Each thread takes a chunk of files, and small
    pictures have one thread only: else they would spend their time waiting for the lock."""

    def read_chunk(chunk):
        samples = []
        for i in chunk:
            name, _, _ = files[i]
            try:
                with open_picture(name) as file:
                    pixels, notes = read_picture(file, res, channels)
                samples.append((pixels, labels[i], notes))
            except Exception as error:  # a broken picture raises anything; it is skipped, and named
                if getattr(error, "errno", None) not in (None, errno.EINVAL, errno.EACCES, errno.EPERM):
                    raise  # the disk or the network failed: the picture may be readable next time
                samples.append((None, name, f"{type(error).__name__}: {error}"))
        return samples

    small = sum(size for _, size, _ in files) < 8000 * len(files)
    size = max(8, min(64, 2**21 // res**2))  # of a chunk; 16 of them wait at most, 100 MB up to 512 pixels a side
    with ThreadPoolExecutor(1 if small else os.cpu_count()) as pool:
        for start in range(0, len(files), 16 * size):
            part = range(len(files))[start : start + 16 * size]
            for samples in pool.map(read_chunk, [part[i : i + size] for i in range(0, len(part), size)]):
                yield from samples


def read_picture(file, res, channels=3):
    """Decodes a picture, of an open file or a path: (uint8 (res, res, channels), list of what was odd). Upright, in
    sRGB, transparency on white, the centre square, resized with antialiasing.

    Raises if it is damaged, or of a kind whose values of black and white are not defined (float, 32 bits, TIFF's 16).
    """
    im = Image.open(file)
    width, height = im.size
    im.draft("RGB", (res, res))  # JPEG: the decoder halves while it decodes, as long as it stays above res
    deep = ";16" in str(im.tile)  # Pillow reads grey of 16 bits as it is, colours as their upper 8
    if im.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr") and not (deep and im.format == "PNG"):
        raise ValueError(f"pictures of Pillow's mode {im.mode} are not read; save it as an ordinary PNG or JPEG")
    if deep and "transparency" in im.info:
        raise ValueError("16 bits with a transparent colour are not read; save it with an alpha channel")
    im = ImageOps.exif_transpose(im)
    profile, notes = im.info.get("icc_profile"), []
    if im.mode.startswith("I"):
        im = Image.fromarray((np.asarray(im) / 257 + 0.5).astype(np.uint8))
    if im.has_transparency_data:
        white = Image.new("RGBA", im.size, "white")
        im = Image.alpha_composite(white, im.convert("RGBA"))
    if im.mode != "CMYK":  # whose profile is for its four inks
        im = im.convert("RGB")
    im = ImageOps.fit(im, (res, res), Image.Resampling.LANCZOS)
    if profile:  # after the resize, since a photograph has 12 million pixels
        try:
            im = ImageCms.profileToProfile(im, io.BytesIO(profile), SRGB, outputMode="RGB")
        except ImageCms.PyCMSError:
            notes.append("with a colour profile that does not apply, and was ignored")
    if min(width, height) < res:
        notes.append(f"enlarged to {res}x{res}")
    im = im.convert("RGB" if channels == 3 else "L")
    return np.array(im).reshape(res, res, channels), notes


SRGB = ImageCms.createProfile("sRGB")


def upright_size(file):
    """(width, height) of a picture."""
    with Image.open(file) as im:
        return ImageOps.exif_transpose(im).size


def read_mask(file, res):
    """Decodes a mask: bool (res, res), True in the hole, which is where it is at least half white."""
    with Image.open(file) as im:
        if im.has_transparency_data:
            raise ValueError("a mask must not be transparent: make the hole white, and the rest black")
    hole = read_picture(file, res, channels=1)[0][..., 0] >= 128
    if not hole.any():
        raise ValueError("it has no hole: make it white where the picture is to be filled in, and black elsewhere")
    return hole


def find_celeba(root, res):
    """The first of CelebA's usual forms found under root: the aligned zip, its folder, or a CelebA-HQ folder. Above 178
    pixels, the width of the aligned pictures, CelebA-HQ comes first."""
    aligned = "img_align_celeba.zip", "img_align_celeba"
    hq = "celeba_hq_256", "celeba_hq", "CelebA-HQ-img", "celebahq"
    for form in aligned + hq if res <= 178 else hq + aligned:
        for folder in (root, root / "celeba", root / "CelebAMask-HQ"):
            if (folder / form).exists():
                return folder / form
    raise ValueError(f"CelebA is not there: looked in {root}/ for {aligned[0]}, {hq[0]} and the like. Get {aligned[0]} "
                     f"(1.3 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, put it into {root}/ as it is, "
                     f"and run this again (or name the folder it lies in: --root DIR)")


def celeba_attributes(table, pictures):
    """CelebA's 40 attributes from its list_attr_celeba.txt: their names, and (N, 40) of 0 and 1. The table has the
    number of pictures in its first line, the names in its second, then a line a picture: file, and 1 or -1 each."""
    rows = [line.split() for line in table.read_text(errors="replace").splitlines()]
    names = rows[1] if len(rows) > 1 else []
    by_file = {row[0]: row[1:] for row in rows[2:] if len(row) == 1 + len(names)}
    files = [PurePosixPath(picture).name for picture in pictures]
    missing = [file for file in files if file not in by_file]
    if missing:
        raise ValueError(f"{table} says nothing of {missing[0]} (and {len(missing) - 1} others): get the whole file, "
                         f"or move it away to train without attributes")
    return names, (np.array([by_file[file] for file in files]) == "1").astype(np.int64)


# ---------------------------------------------------------------------------------------------------------------
# MNIST, Fashion-MNIST and CIFAR-10, from the files that their authors publish

OFFICIAL = {  # files: what is published, with its MD5
    "mnist": dict(
        res=28, channels=1, n=70_000, label_names="0 1 2 3 4 5 6 7 8 9".split(),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        files={"train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
               "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
               "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
               "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c"}),
    "fashion": dict(
        res=28, channels=1, n=70_000,
        label_names="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        files={"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}),
    "cifar10": dict(
        res=32, channels=3, n=60_000,
        label_names="airplane automobile bird cat deer dog frog horse ship truck".split(),
        url="https://www.cs.toronto.edu/~kriz/",
        files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}

NAMES = ["faces", "celeba", *OFFICIAL, *POINTS]  # anything else that --data is given is the path of a folder or zip


def find_official(name, root):
    """The paths of the published files, or of the same without .gz, in root/NAME. Not elsewhere: MNIST and
    Fashion-MNIST call their files alike."""
    about, paths = OFFICIAL[name], []
    for file in about["files"]:
        path = root / name / file
        if not path.is_file():
            path = path.with_suffix("")
        if not path.is_file():
            raise ValueError(f"{name} is not there: no {file} (or the same without .gz) in {root / name}/. Get it from "
                             f"{about['url']}, or let train.py fetch it: python train.py --data {name} --root {root} "
                             f"--download")
        paths.append(path)
    return paths


def stream_official(name, paths, res):
    """All published samples, training and test; `split` decides anew which ones are held out."""
    arrays = []  # pictures, labels, pictures, labels
    for path in paths:
        try:
            arrays += read_cifar(path) if name == "cifar10" else [read_idx(path)]
        except Exception as error:  # gzip, tarfile and numpy raise half a dozen kinds for a damaged file
            if getattr(error, "errno", None):
                raise  # the disk failed, or reading is forbidden
            raise ValueError(f"{path} is damaged ({error!r:.90}): delete it, and fetch it anew by train.py --download")
    pictures, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    if len(pictures) != len(labels):
        raise ValueError(f"{paths[0].parent}/ is damaged, with {len(pictures):,} pictures and {len(labels):,} labels: "
                         f"delete the files, and fetch them anew by train.py --download")
    for picture, label in zip(pictures, labels):
        resized = Image.fromarray(picture).resize((res, res), Image.Resampling.LANCZOS)
        yield np.asarray(resized), label, []


def read_idx(path):
    """An array in MNIST's format: two zeros, 8 for bytes, the number of dimensions, their sizes (big-endian, 4 bytes
    each), the values."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    sizes = np.frombuffer(content, ">u4", count=content[3], offset=4)
    if len(sizes) != (1 if "labels" in path.name else 3):
        raise ValueError("another number of dimensions")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


def read_cifar(path):
    """[pictures, labels] from CIFAR-10's archive: rows of a label and the red, green and blue planes."""
    with tarfile.open(path) as archive:
        members = sorted(name for name in archive.getnames() if name.endswith(".bin"))
        content = b"".join(archive.extractfile(name).read() for name in members)
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    return [rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]]


def download(name, root):
    """Fetches what is missing into root/NAME."""
    for file, md5 in OFFICIAL[name]["files"].items():
        path, url = root / name / file, OFFICIAL[name]["url"] + file
        if path.exists() or path.with_suffix("").exists():
            continue
        say(f"downloading {url} to {path}")
        try:
            with urlopen(url, timeout=30) as answer, whole(path) as out:
                report = progress(int(answer.headers["Content-Length"] or 0), "bytes")
                digest = hashlib.md5()
                while block := answer.read(10**6):
                    digest.update(block)
                    report(out.write(block))
                if digest.hexdigest() != md5:
                    raise OSError(f"what came is not the published file, whose MD5 is {md5}")
        except (OSError, http.client.HTTPException) as error:
            raise OSError(f"could not download {url}: {error}. Run this again, or put the file into {path.parent}/")


# ---------------------------------------------------------------------------------------------------------------
# Packing


def write_pack(pack, total, samples, n, files, label_names):
    """Writes samples to `pack`, `total` raw bytes of one picture after another, and what belongs to them into a .npz
    beside it. The rest: see `find_dataset`."""
    check_writable(pack.parent, "--cache DIR")
    pack.parent.mkdir(parents=True, exist_ok=True)
    mention_parts(pack.parent)
    free = disk_usage(pack.parent).free
    if total > free:
        raise OSError(f"{pack} needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free: name another disk, --cache DIR")
    labels, skipped, notes, report = [], {}, Counter(), progress(n, "pictures")
    with whole(pack) as file:  # not a memory map: there, a full disk kills the process without a message
        for pixels, label, about in samples:
            report(1)
            if pixels is None:
                skipped[label] = about
                continue
            file.write(pixels.tobytes())
            labels.append(label)
            notes.update(about)
        if skipped:
            say(f"skipped {len(skipped):,} of {n:,} pictures that could not be read; the first are")
            for name in list(skipped)[:10]:
                say(f"  {name} ({skipped[name]})")
        if not labels:
            raise ValueError(f"none of the {n:,} pictures could be read")
        if label_names is None:  # of classes that have a picture; numbers in their own order, 2 before 10
            label_names = sorted(set(labels), key=lambda name: (int(name) if name.isdecimal() else math.inf, name))
            numbers = {name: i for i, name in enumerate(label_names)}
            labels = [numbers[name] for name in labels]
        content = hashlib.sha256()
        for name, size, _ in files:
            content.update(repr((name, size)).encode())
        with whole(pack.with_suffix(".npz")) as beside:  # it comes first: a pack that exists is complete
            np.savez(beside, labels=np.array(labels, np.int64), label_names=np.array(label_names, str),
                     skipped=len(skipped), content=content.hexdigest())
    say(", ".join([f"  {len(labels):,} pictures", *(f"{count:,} {note}" for note, count in notes.items())]))


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


def save_gif(file, frames):
    """PIL images as an animation of three seconds that loops, holding the last frame for a while."""
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def plot(curves, xlabel, logarithmic=True):
    """Line plot as a PIL image. curves: {name: (list of x, list of y)}. logarithmic: the axis of y is, and then all y
    must be above 0."""
    im = Image.new("RGB", (1440, 840), "white")  # drawn at twice the size, as in `trails`
    draw, font, grey = ImageDraw.Draw(im), ImageFont.load_default(24), "#444444"
    lines = [np.stack([x, np.log10(y) if logarithmic else y], 1) for x, y in curves.values()]  # (n, 2) each
    everything = np.concatenate(lines)
    low, high = everything.min(0), everything.max(0) + 1e-6

    def place(p):
        """Where points (n, 2) lie in the picture; the axes meet at (120, 750)."""
        return (p - low) / (high - low) * (1290, -710) + (120, 750)

    for tick in np.linspace(low, high, 6):  # each is a tick of both axes, (2,)
        x, y = place(tick)
        value = 10 ** tick[1] if logarithmic else tick[1]
        draw.line([120, y, 1410, y], "#dddddd", 2)
        draw.text((108, y), f"{value:.3g}", grey, font, "rm")
        draw.text((x, 762), f"{tick[0]:,.0f}" if tick[0] >= 10 else f"{tick[0]:.2g}", grey, font, "mt")
    colours = ("#2846a0", "#e07020", "#208040", "#a02860", "#808080")
    for i, (name, line) in enumerate(zip(curves, lines)):
        draw.line(place(line).ravel().tolist(), colours[i], 4)
        draw.text((1398, 42 + 34 * i), name, colours[i], font, "rt")
    draw.text((720, 828), xlabel, grey, font, "mb")
    return im.reduce(2)


# ---------------------------------------------------------------------------------------------------------------
# The program


def main(argv=None):
    parser = argparse.ArgumentParser(description="Packs a dataset and draws a sheet of it.", allow_abbrev=False)
    parser.add_argument("--data", type=as_dataset, default="faces",
                        help="a name (see README.md), or a folder or zip of pictures")
    parser.add_argument("--res", type=number(int, 8, 10**4), help="pixels a side (32, or an official dataset's own)")
    parser.add_argument("--root", type=as_absolute, default="data", help="where datasets are looked for")
    parser.add_argument("--cache", type=as_path, default="cache", help="where packed arrays are kept")
    parser.error = fail
    args = parser.parse_args(argv)
    res = args.res or usual_res(args.data)
    to = run_folder(args.data, res) / "data.png"
    with refusing():
        check_outside(args.data, to.parent, "work in another folder")
        check_outside(args.data, args.cache, "--cache DIR")
        check_writable(to.parent, "work in another folder")
        images, _, _, _ = load(args.data, args.root, args.cache, res)
    if args.data in POINTS:
        sheet = scatter(images[:2000])
    else:
        sheet = grid(images[permutation(len(images), seed=0, epoch=0)[:64]])
    with whole(to) as file:
        sheet.save(file)
    say(f"{len(images):,} samples; wrote {to}")


# ---------------------------------------------------------------------------------------------------------------
# Plumbing that every script needs: seeds, flags, progress, writing files whole, ending with a message.

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


def as_path(text):
    """A type for argparse: a path that is not empty; ~ is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return os.path.expanduser(text)


def as_absolute(text):
    """The same, made absolute, so that sample.py finds the data from any folder."""
    return os.path.abspath(as_path(text))


def as_dataset(text):
    """A type for argparse: a dataset's name, or an absolute path."""
    return text if text in NAMES else as_absolute(text)


def say(*words):
    """Prints. If that fails (a closed pipe, a full disk), the work goes on in silence."""
    try:
        print(*words, flush=True)
    except OSError:
        silence()


def silence():
    sys.stdout = open(os.devnull, "w", errors="replace")


def progress(n, unit):
    """Returns a function to call with how much more is done. At most every five seconds it prints how many of the n
    units are, and how long the rest will take."""
    began = reported = time.perf_counter()
    done = 0

    def report(more):
        nonlocal reported, done
        done, now = done + more, time.perf_counter()
        if done < n and now - reported > 5:
            rate = done / (now - began)
            left = timedelta(seconds=round((n - done) / rate))
            say(f"  {done:,} of {n:,} {unit}  {rate:,.1f} {unit}/s  ETA {left}")
            reported = now

    return report


def with_fallback(fast, slow):
    """Calls fast. If its first call fails, says why, and calls slow from then on: torch.compile needs a compiler."""
    calls = 0

    def call(*args):
        nonlocal fast, calls
        calls += 1
        try:
            return fast(*args)
        except Exception as error:
            if calls > 1:
                raise
            reason = str(error).strip().partition("\n")[0]
            say(f"torch.compile failed, so this runs without it: {reason:.150}")
            fast = slow
            return slow(*args)

    return call


def check_writable(folder, advice):
    """Makes a file that vanishes where this folder is, or will be: so an OSError comes before the work, not after."""
    here = next(here for here in (folder, *folder.parents, Path()) if os.path.lexists(here))
    try:
        tempfile.TemporaryFile(dir=here).close()
    except OSError as error:
        raise OSError(f"cannot write to {folder}/ ({error.strerror}): take another place ({advice})")


def check_outside(name, folder, advice):
    """Refuses to write into the folder that --data names: what is written there would become data."""
    if name not in NAMES and Path(folder).resolve().is_relative_to(Path(name).resolve()):
        raise ValueError(f"{folder}/ lies inside --data {name}, and would become part of it: take another place "
                         f"({advice})")


@contextlib.contextmanager
def lock(folder):
    """Keeps a second run from writing to the folder, which is made."""
    check_writable(folder, "--out DIR")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"another run is writing to {folder}/ now: wait until it ends, or name another folder, --out DIR (for "
                 f"several processes of one run use torchrun)")
        except (ImportError, OSError):  # Windows and some network disks have no such lock
            pass
        mention_parts(folder)
        try:
            yield
        finally:
            if os.listdir(folder) == [".lock"]:  # nothing came of it
                os.remove(file.name)
                folder.rmdir()


def mention_parts(folder):
    """What `whole` could not remove."""
    for part in folder.glob(".part-*"):
        say(f"{part} was left by a run that was killed: delete it, unless another one writes it now")


@contextlib.contextmanager
def whole(file):
    """A file to write, opened for bytes; its folder is made. It has another name until it is complete and on the disk.
    So a kill or a full disk leaves what was there before."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".part-{os.urandom(4).hex()}-{file.name[-40:]}")  # pillow looks at the ending
    try:
        with open(part, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        part.replace(file)
    except OSError as error:
        if error.errno and not error.filename:
            error.filename = str(file)  # of a full disk, Python does not say which file
        raise
    finally:
        part.unlink(missing_ok=True)


def fail(message, status=2):
    """Ends the program with one line and no traceback: status 2 for a mistake in its use, 1 for a failure."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def refusing():
    """A ValueError in here is for the user to mend: it ends the program with its message."""
    try:
        yield
    except ValueError as error:
        fail(error)


def run(main):
    """Runs a program. What is no mistake of its own (a full disk, too little memory) ends it in a line, too."""
    if hasattr(sys.stdout, "reconfigure"):  # not closed, nor a notebook's
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid Unicode
    try:
        with on_signals(exit_on_signal):
            main()
    except (OSError, FloatingPointError) as error:
        fail(error, status=1)
    except (MemoryError, RuntimeError) as error:  # torch has its own kinds for a GPU and for a CPU
        if isinstance(error, RuntimeError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        fail(f"out of memory; a smaller --batch needs less ({str(error):.100})", status=1)


@contextlib.contextmanager
def on_signals(handler):
    """Sets what happens on Ctrl-C, on SIGTERM, and when the terminal closes, unless nohup lets that be ignored."""
    before = {}
    if threading.current_thread() is threading.main_thread():  # in others Python forbids it
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_on_signal(number, frame):
    """Raises SystemExit, so that half-written files are removed on the way out."""
    sys.exit(128 + number)


if __name__ == "__main__":
    run(main)
