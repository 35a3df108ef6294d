"""Pixels in, pixels out: every dataset becomes one array; batches index it; results become pictures.

    python data.py --data celeba --res 256      packs a dataset and draws a sheet of it, without training

A source (a zip, a folder, our own drawing code) is decoded, cropped and resized once, into a uint8 array
(N, H, W, C) on disk. Training only ever maps that array into memory, so loading a batch is an index and a memcpy,
shared by all processes through the page cache; there are no loader processes to tune.
"""

import argparse
import ctypes
import functools
import gzip
import hashlib
import inspect
import io
import re
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

POINTS = ("moons", "8gaussians", "checkerboard", "spirals")
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
REMEDIES = {  # what torch and Triton say when something is missing, and how to go without it
    "out of memory|can't allocate memory|not enough memory": "a smaller --batch needs less",
    "No working C.. compiler|Failed to find C compiler|CalledProcessError|working triton": "--no-compile does without",
}
FACES, DOTS = 20_000, 10**6  # how many are drawn; a three-minute run sees each about once


def refuse(message, status=2):
    """Ends the program with one line and no traceback: status 2 for a mistake in its use, 1 for a failure."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(status)


def check_writable(path):
    """Makes the folder of `path`, or `path` itself where that is to be a folder, as it has no ending. What cannot be
    made is refused before the work, not after it."""
    if path.suffix and path.is_dir():
        refuse(f"cannot write {path}: there is a folder of that name")
    try:
        (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"cannot write {path}: {error}")


def between(kind, low, high):
    """A type for argparse: a number of this kind from low to high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} must lie between {low} and {high:g}")
        return kind(text)

    return number


def run(main):
    """Runs a program. A full disk, a missing right, too little memory are told in a line, like any other failure."""
    sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no Unicode
    for number in (signal.SIGINT, signal.SIGTERM):  # as an exception, so that half-written files are removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    if sys.platform == "linux":
        # malloc gives large freed blocks back to the system, and the next tensor pays for them anew, with a page fault
        # for every 4 KiB: 6% of a CPU's step at --res 64. So it shall trim nothing and map nothing (see malloc.h).
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, -1)
        ctypes.CDLL(None).mallopt(M_MMAP_MAX, 0)
    try:
        main()
    except (OSError, FloatingPointError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
        text = str(error) or "out of memory"
        for words, remedy in REMEDIES.items():
            if line := re.search(f".*({words}).*", text):
                refuse(f"{line[0]}; {remedy}", status=1)
        if isinstance(error, RuntimeError):
            raise  # a mistake in the program
        refuse(text.partition("\n")[0], status=1)


# ---------------------------------------------------------------------------------------------------------------
# Random numbers. What a run draws is a pure function of a few integers (seed, purpose, step, rank, ...), so a resumed
# run needs no generator state and the noise of picture i is the same in any batch.

ORDER, BATCH, HELD_OUT, SAMPLE, SPLIT, INPAINT, TRACE = range(7)  # purposes, so that no two uses share a stream


def key(*words):
    """Hashes integers into one 63-bit seed, for numpy's and torch's generators alike."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]) >> 1


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
# Points in the plane, within about [-5, 5.5]: drawn at each start and kept in memory, never packed.


def points(name, n, seed):
    """n points of a toy distribution, (n, 2) float32, always the same for a seed."""
    rng = np.random.default_rng(seed)
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
    return torch.from_numpy(p.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------
# Cartoon faces, the default data: no download, any resolution, drawn by the code below.

FACE_ATTRIBUTES = ("smiling", "open_mouth", "glasses", "hat", "beard", "long_hair", "curly_hair", "blond")


def palette(codes):
    """Colours (3, k), red, green and blue, 0 to 255."""
    return np.array([list(bytes.fromhex(code)) for code in codes.split()], np.float32).T


CLOTHES = palette("d8432f 2e86ab f2a541 5b8c5a 7a5ba8 d64b7f 2f3e5c f4f1e8")
INK, WHITE, TONGUE, BLACK, DUSK = palette("260e17 ffffff f0606c 221f2e dec2b8").T.reshape(5, 3, 1, 1, 1)


# Shapes are signed distances, negative inside. The chin is near y = 0.74, the scalp near y = -0.54, the ears
# near x = -0.62 and 0.62. A union is a minimum, an intersection a maximum; abs(x) draws both sides at once.
def disc(x, y, rx, ry):
    # Half of k^2 - 1 has the slope of a distance at the rim, where it counts, and needs no square root.
    return ((x / rx) ** 2 + (y / ry) ** 2 - 1) * (0.5 * min(rx, ry))


def slab(x, y, width, height, corner):
    dx = np.maximum(abs(x) - (width - corner), 0)
    dy = np.maximum(abs(y) - (height - corner), 0)
    return np.sqrt(dx * dx + dy * dy) - corner


def stroke(x, y, width, bend, thick):
    """A pen line with round ends, which a positive bend lifts, as in a smile."""
    return slab(x, y + bend * (x / width) ** 2 - bend / 2, width + thick, thick, thick)


def head(x, y, grow=0.0):
    a, b = (x / (0.62 + grow - 0.05 * y)) ** 2, ((y - 0.1) / (0.64 + grow)) ** 2
    return (a + b - 0.3 * a * b - 1) * 0.31  # the product squares the cheeks a little


def draw_faces(indices, res):
    """The faces numbered `indices`: images (n, res, res, 3) and multi-hot attributes (n, 8), both uint8.

    Painter's algorithm: one flat shape after another over all faces at once, back to front. What differs between
    faces is an array (n, 1, 1), a colour (3, n, 1, 1), drawn from each face's index alone.
    """
    rolls = [np.random.default_rng(i).random(24, np.float32) for i in indices]
    dice = iter(np.stack(rolls, 1)[..., None, None])

    def between(low, high):
        return low + (high - low) * next(dice)

    def any_of(table):
        return table[..., (next(dice) * table.shape[-1]).astype(int)]

    # Who is it? Each colour and word is as likely as it is often named.
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

    # Where is each pixel, seen from the face?
    tilt, size, aspect = between(-0.06, 0.06), between(1.06, 1.15), between(0.96, 1.04)
    ticks = (np.arange(res, dtype=np.float32) + 0.5) * (2 / res) - 1
    px, py = ticks - between(-0.05, 0.05), ticks[:, None] - between(-0.03, 0.03)
    x = (px * np.cos(tilt) + py * np.sin(tilt)) / (size * aspect)
    y = (py * np.cos(tilt) - px * np.sin(tilt)) / size
    sides, pixels = abs(x), size * (res / 2)
    canvas = np.broadcast_to(backdrop, (3, len(indices), res, res)).copy()

    def paint(who, colour, shape):
        """Lays a flat colour over the inside of a shape, on the faces in `who`; edges are one pixel soft."""
        cover = np.clip(0.5 - shape * pixels, 0, 1) * who
        canvas[:] += cover * (colour - canvas)

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
    labels = smile | grin | laugh, grin | laugh | (mouth == "round"), glasses, hatted, beard, long, curly, blond
    return (canvas.transpose(1, 2, 3, 0) + 0.5).astype(np.uint8), np.hstack(labels)[..., 0].astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------
# Finding pictures


def find_celeba(root):
    """The first of CelebA's usual shapes found under root: the aligned zip, its folder, or a CelebA-HQ folder."""
    shapes = ("img_align_celeba.zip", "img_align_celeba", "celeba_hq_256", "celeba_hq", "CelebA-HQ-img", "celebahq")
    for place in [root / sub / shape for sub in ("", "celeba", "CelebAMask-HQ") for shape in shapes]:
        if place.exists():
            return place
    refuse(f"CelebA is not there: looked in {root}/ for {', '.join(shapes[:3])} and the like. Get {shapes[0]} "
           f"(1.3 GB) from https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html, put it into {root}/ as it is, and run "
           f"this again (or name the folder it lies in: --root DIR)")


def celeba_attributes(table, names):
    """CelebA's 40 attributes from its list_attr_celeba.txt: their names and multi-hot (N, 40) uint8."""
    _, attributes, *lines = [*table.read_text(errors="replace").splitlines(), "", ""]
    rows = {file: values for file, *values in map(str.split, filter(str.strip, lines))}
    files = [name.rpartition("/")[2] for name in names]
    lost = [file for file in files if file not in rows or len(rows[file]) != len(attributes.split())]
    if lost:
        refuse(f"{table} says nothing of {lost[0]} (and {len(lost) - 1} others): get the whole file, or move it away "
               f"to train without attributes")
    return attributes.split(), (np.array([rows[file] for file in files]) == "1").astype(np.uint8)


def list_pictures(place):
    """Names of the pictures in a folder or zip, sorted."""
    names = [p.relative_to(place).as_posix() for p in place.rglob("*") if p.is_file()]  # none, unless it is a folder
    if zipfile.is_zipfile(place):
        names = zipfile.ZipFile(place).namelist()
    # not macOS's hidden twins, ._1.jpg and __MACOSX/._1.jpg
    names = sorted(n for n in names if n.lower().endswith(ENDINGS) and not n.split("/")[-1].startswith("._"))
    if not names:
        refuse(f"no pictures in {place}: looked for a folder, or a whole zip, with any of {' '.join(ENDINGS)} in it. "
               f"Other data by name: {', '.join(['faces', 'celeba', *OFFICIAL, *POINTS])}")
    return names


def stem(name):
    """A dataset's short name: pets for ../pets.zip."""
    return Path(name).resolve().stem


def folder(name, res):
    """Where results go, if the user does not say."""
    return Path("out", stem(name) if name in POINTS else f"{stem(name)}-{res}")


def read_picture(file, res):
    """Decodes one picture: upright, RGB, centre crop, resized by a filter that widens as the picture shrinks."""
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

IDX = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
ZIPPED = [f"{part}.gz" for part in IDX]
ROWS = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]

OFFICIAL = {  # files: what is published, with its MD5; parts: the same unpacked
    "mnist": dict(
        res=28, channels=1, parts=IDX, url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        label_names="0 1 2 3 4 5 6 7 8 9".split(),
        files=dict(zip(ZIPPED, ["f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
                                "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c"]))),
    "fashion": dict(
        res=28, channels=1, parts=IDX, url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        label_names="T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(","),
        files=dict(zip(ZIPPED, ["8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
                                "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310"]))),
    "cifar10": dict(
        res=32, channels=3, parts=ROWS, url="https://www.cs.toronto.edu/~kriz/",
        label_names="airplane automobile bird cat deer dog frog horse ship truck".split(),
        files={"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"}),
}


def look(name, root):
    """The paths of a dataset's files, unpacked or else as published, and what is missing: in root/NAME/ or below it,
    or in root/ itself, if that is the dataset's own folder: MNIST and Fashion-MNIST call their files alike."""
    for search in ((root / name).rglob, root.glob):
        for wanted in (OFFICIAL[name]["parts"], OFFICIAL[name]["files"]):
            found = {file: next(filter(Path.is_file, search(file)), None) for file in wanted}
            if all(found.values()):
                return list(found.values()), []
    return [], [file for file in OFFICIAL[name]["files"] if not (root / name / file).exists()]


def arrays_in(content):
    """What a file holds, as arrays. MNIST's: two zeros, 8 for bytes, how many sizes, the sizes (big-endian, 4 bytes
    each), the values. CIFAR-10's, pictures and labels: rows of a label and the red, the green and the blue plane."""
    if content[:3] == b"\0\0\x08":
        shape = np.frombuffer(content, ">u4", content[3], 4)
        return [np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)]
    rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
    return [rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0]]


def read_official(name, paths, res):
    """How many samples there are, and a stream of them; `split` decides anew which ones are held out."""
    again = f"then get it anew: python train.py --data {name} --download"
    arrays = []  # pictures, labels, pictures, labels, ...
    for path in paths:
        try:
            if path.name.endswith(".tar.gz"):
                with tarfile.open(path, "r:gz") as tar:
                    inside = {file.name: tar.extractfile(file).read() for file in tar if ".bin" in file.name}
                arrays += [array for part in sorted(inside) for array in arrays_in(inside[part])]
            else:
                arrays += arrays_in(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
            if not len(arrays[-1]):
                raise ValueError("empty")
        except Exception as error:  # gzip, tarfile and numpy raise half a dozen kinds for a damaged file
            refuse(f"{path} is cut short or damaged ({error}); delete it, {again}")
    size = (28, 28) if channels(name) == 1 else (32, 32, 3)
    if any(p.shape != (len(y), *size) or y.ndim != 1 or y.max() > 9 for p, y in zip(arrays[::2], arrays[1::2])):
        refuse(f"{paths[0].parent}: pictures and labels do not belong together; delete them, {again}")
    images, labels = np.concatenate(arrays[::2]), np.concatenate(arrays[1::2])
    resized = (np.asarray(Image.fromarray(p).resize((res, res), Image.Resampling.LANCZOS)) for p in images)
    return len(images), zip(resized, labels)


def download(name, root):
    """Fetches what is missing into root/name. Only one process may at a time."""
    (root / name).mkdir(parents=True, exist_ok=True)
    for file in look(name, root)[1]:
        fetch(OFFICIAL[name]["url"] + file, root / name / file, OFFICIAL[name]["files"][file])


def fetch(url, path, md5):
    """Downloads into PATH.part, going on where an earlier run stopped; the name changes when the MD5 is right."""
    print(f"downloading {url} to {path}", flush=True)
    part = path.with_name(path.name + ".part")
    part.touch()
    request = Request(url, headers={"Range": f"bytes={part.stat().st_size}-"})
    advice = f"Run the same command again, or put the file into {path.parent}/ by hand"
    try:
        # 206 is the rest, as asked for; else the server sends all of it
        with urlopen(request, timeout=30) as answer, open(part, "ab" if answer.status == 206 else "wb") as file:
            total = file.tell() + int(answer.headers["Content-Length"] or 0)
            while block := answer.read(2**21):
                file.write(block)
                print(f"  {file.tell() / 1e6:,.1f} of {total / 1e6:,.1f} MB", flush=True)
            if file.tell() < total:
                raise ConnectionError(f"the connection closed after {file.tell():,} of {total:,} bytes")
    except Exception as error:  # no server, no such file, nonsense, silence
        if getattr(error, "code", None) != 416:  # 416: nothing is missing, an earlier run stopped at the very end
            refuse(f"could not download {url}: {str(error).strip()}. {advice}", status=1)
    if hashlib.md5(part.read_bytes()).hexdigest() != md5:
        part.unlink()
        refuse(f"what {url} sent is not the published file (its MD5 is not {md5}) and was deleted. {advice}", status=1)
    part.rename(path)


# ---------------------------------------------------------------------------------------------------------------
# Packing. All streams yield (pixels, label), where pixels are uint8 numbers, res x res x C of them in that order.


def stream_faces(res):
    step = max(1, 2**16 // res**2)  # small enough to stay in cache, and so faster than threads
    for i in range(0, FACES, step):
        yield from zip(*draw_faces(range(i, min(i + step, FACES)), res))


def stream_files(place, names, labels, res):
    """Decodes in parallel (Pillow releases the GIL), in pieces, so that pictures do not pile up in memory."""
    read = (lambda name: (place / name).read_bytes()) if place.is_dir() else zipfile.ZipFile(place).read
    broken = []

    def decode(name, label):
        try:
            return read_picture(io.BytesIO(read(name)), res), label
        except Exception as error:  # whatever a broken file makes a decoder raise: it is skipped, and named
            if getattr(error, "errno", None):
                raise  # but one that could not be read now may be readable the next time
            broken.append(f"{name} ({type(error).__name__}: {error})")

    with ThreadPoolExecutor() as pool:
        for i in range(0, len(names), 512):
            yield from filter(None, pool.map(decode, names[i : i + 512], labels[i : i + 512]))
    if broken:
        print(f"skipped {len(broken)} of {len(names)} that could not be decoded:", *sorted(broken)[:10], sep="\n  ")


def write_pack(pack, stream, n):
    """Writes a stream of n to `pack`, raw bytes of one picture after another, and the labels to a .npy beside it.

    Both are written in a folder of their own, and move when they are whole; the folder goes, unless the process is
    killed outright.
    """
    labels, began = [], time.perf_counter()
    pack.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="part-", dir=pack.parent) as own:
        part = Path(own, "part")
        with open(part, "wb") as file:  # no memory map: there a full disk kills, here it is an error
            for done, (pixels, label) in enumerate(stream, 1):
                file.write(pixels.tobytes())
                labels.append(label)
                if done % 2000 == 0 or done == n:
                    print(f"  {done:,} of {n:,}  {done / (time.perf_counter() - began):,.0f} pictures/s", flush=True)
        if not labels:
            refuse(f"none of the {n:,} pictures could be decoded")
        np.save(part.with_suffix(".npy"), np.array(labels, np.int64))
        part.with_suffix(".npy").replace(pack.with_suffix(".npy"))
        part.replace(pack)  # last: where the pictures are, the labels must be


def usual_res(name):
    return OFFICIAL[name]["res"] if name in OFFICIAL else 32


def channels(name):
    return OFFICIAL[name]["channels"] if name in OFFICIAL else 3


def load(name, root="data", res=32):
    """A dataset by name or path, packed on first use: (images, labels, label_names).

    images: uint8 (N, res, res, C), memory-mapped, or points, float32 (N, 2). labels: int64 (N,), or multi-hot (N, K)
    for attributes.
    """
    root = Path(root)
    if not name:
        refuse("--data needs a name or a path")
    if name in POINTS:
        return points(name, DOTS, seed=0).numpy(), np.zeros(DOTS, np.int64), []
    if name in OFFICIAL:
        about, (sources, missing) = OFFICIAL[name], look(name, root)
        if missing:
            refuse(f"{name} is not there: no {', '.join(missing)} (or unpacked) in {root / name}/. Type python "
                   f"train.py --data {name} --root {root} --download, or get {about['url']}NAME, into that folder")
        label_names, samples = about["label_names"], lambda: read_official(name, sources, res)
    elif name == "faces":
        label_names, samples = FACE_ATTRIBUTES, lambda: (FACES, stream_faces(res))
        sources = [Path(__file__)]  # whoever changes the drawing sees the change
    else:
        place = find_celeba(root) if name == "celeba" else Path(name)
        names, table = list_pictures(place), place.parent / "list_attr_celeba.txt"
        sources = [place / p for p in names] if place.is_dir() else [place]
        label_names, labels = np.unique([p.rpartition("/")[0] for p in names], return_inverse=True)
        if name == "celeba" and table.exists():
            label_names, labels = celeba_attributes(table, names)
            sources.append(table)
        samples = lambda: (len(names), stream_files(place, names, labels, res))
    identity = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in sources]
    digest = hashlib.sha256(repr((identity, FACES, res, inspect.getsource(read_picture))).encode()).hexdigest()[:12]
    pack = root / "cache" / f"{stem(name)}-{res}-{digest}.images"
    if not pack.exists():
        n, stream = samples()
        print(f"packing {n:,} pictures of {name}, {n * res**2 * channels(name) / 1e9:.1f} GB, into {pack}", flush=True)
        write_pack(pack, stream, n)
    images = np.memmap(pack, mode="r").reshape(-1, res, res, channels(name))
    return images, np.load(pack.with_suffix(".npy")), [str(label) for label in label_names]


@functools.lru_cache(maxsize=4)
def split(n):
    """(training indices, held-out indices): a twentieth, at most 1,024, is held out, the same in every run."""
    order = np.random.default_rng(key(0, SPLIT)).permutation(n)
    held = min(1024, n // 20)
    return np.sort(order[held:]), order[:held] if held else order


def choose_labels(labels, label_names, cond):
    """The labels to learn and their names. cond: "all", or some attributes by name, comma-separated, or "": none."""
    if not cond:
        return np.full(len(labels), -1), []
    if len(label_names) < 2:
        refuse(f"--cond {cond}: this dataset has no labels to learn (a folder's are its sub-folders, CelebA's come "
               f"from list_attr_celeba.txt beside the pictures)")
    if cond == "all":
        return labels, label_names
    chosen, attributes = cond.split(","), label_names if labels.ndim > 1 else []
    for name in chosen:
        if name not in attributes:
            refuse(f"--cond {name}: for this dataset it can be {', '.join(['all', *attributes])}")
    return labels[:, [attributes.index(name) for name in chosen]], chosen


# ---------------------------------------------------------------------------------------------------------------
# Pixels in and out


def send(array, device):
    """An array as a tensor on the device; the CPU does not wait until a GPU has taken it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_tensor(pixels, device):
    """uint8 (n, H, W, C) array -> float32 (n, C, H, W) tensor in [-1, 1]; it travels to the device as bytes. Points
    stay what they are."""
    x = send(pixels, device)
    return x if x.dim() == 2 else x.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(x):
    """Tensor in [-1, 1], (B, C, H, W) -> uint8 array (B, H, W, C)."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def grid(pixels, columns=None):
    """uint8 (n, H, W, C) as one PIL image, as square as it goes; small pictures are enlarged to be seen."""
    n, H, W, _ = pixels.shape
    columns = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows, gap = -(-n // columns), max(1, H // 16)
    tiles = [Image.fromarray(p.squeeze()) for p in pixels]  # (H, W, 3), or (H, W) if grey
    sheet = Image.new(tiles[0].mode, (columns * (W + gap) + gap, rows * (H + gap) + gap), "white")
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (gap + i % columns * (W + gap), gap + i // columns * (H + gap)))
    return ImageOps.scale(sheet, max(1, 72 // H), Image.Resampling.NEAREST)


def scatter(p, limit=6.0, size=480):
    """Points (n, 2) as a PIL image of the square [-limit, limit]^2, each a translucent dot."""
    im = Image.new("RGB", (2 * size, 2 * size), "white")  # averaged down at the end, which smooths the dots
    draw = ImageDraw.Draw(im, "RGBA")
    for x, y in p[np.abs(p).max(1) < 2 * limit] / limit * size:  # not far outside, infinite or NaN
        draw.circle((size + x, size - y), 4, (40, 70, 160, 110))
    return im.reduce(2)


def save_gif(path, frames):
    """PIL images as an animation of three seconds that loops, holding the last frame for a while."""
    durations = [max(20, 3000 // len(frames))] * (len(frames) - 1) + [1500]  # milliseconds
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def plot(curves, xlabel):
    """Line plot with a logarithmic y axis as a PIL image. curves: {name: (list of x, list of y)}, y > 0."""
    im = Image.new("RGB", (1440, 840), "white")  # drawn at twice the size, too
    draw, font, grey = ImageDraw.Draw(im), ImageFont.load_default(24), "#444444"
    lines = [np.stack([x, np.log10(y)], 1) for x, y in curves.values()]  # (n, 2) each
    low, high = np.concatenate(lines).min(0), np.concatenate(lines).max(0) + 1e-6

    def place(p):
        """Where points (n, 2) lie in the picture; the axes meet at (120, 750)."""
        return (p - low) / (high - low) * (1290, -710) + (120, 750)

    for tick in np.linspace(low, high, 6):
        x, y = place(tick)
        draw.line([120, y, 1410, y], "#dddddd", 2)
        draw.text((108, y), f"{10 ** tick[1]:.3g}", grey, font, "rm")
        draw.text((x, 762), f"{tick[0]:,.0f}", grey, font, "mt")
    for i, (name, line, colour) in enumerate(zip(curves, lines, ("#2846a0", "#e07020", "#208040", "#a02860"))):
        draw.line(place(line).ravel().tolist(), colour, 4)
        draw.text((1398, 42 + 34 * i), name, colour, font, "rt")
    draw.text((720, 828), xlabel, grey, font, "mb")
    return im.reduce(2)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Packs a dataset and draws a sheet of it.", allow_abbrev=False)
    parser.add_argument("--data", default="faces", help="a name (see README.md), or a folder or zip of pictures")
    parser.add_argument("--res", type=between(int, 8, 10**4), help="pixels a side (32, or an official dataset's own)")
    parser.add_argument("--root", default="data", help="where datasets are looked for and packed arrays kept")
    parser.error = refuse
    args = parser.parse_args(argv)
    res = args.res or usual_res(args.data)
    to = folder(args.data, res) / "data.png"
    check_writable(to)
    images, _, label_names = load(args.data, args.root, res)
    (scatter(images[:2000]) if args.data in POINTS else grid(images[split(len(images))[1][:64]])).save(to)
    print(f"{len(images):,} samples; labels: {', '.join(filter(None, label_names)) or 'none'}; wrote {to}")


if __name__ == "__main__":
    run(main)
