"""Data of LoFi (Sec. 2.0.1 and 2.0.4): the manifest, box strings, prompts, samples and the phantom.

    python data.py phantom OUT        # draw chest films with findings, reports and boxes
    python data.py check DIR          # read every row and image, count, draw a few with their boxes

A data set is a folder with `manifest.jsonl`, one image a line (`report`, `regions` may be missing):

    {"image": "images/0001.png", "study": "s1", "patient": "p1", "split": "train",
     "report": "The heart is enlarged. ...",
     "regions": [{"phrase": "The heart is enlarged.", "boxes": [[0.38, 0.51, 0.78, 0.84]]}]}

Boxes are (x0, y0, x1, y1), fractions of the width and height of the original image. The image is
stretched to the encoder's square, so a box is the same fraction of the model's input.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from tqdm import tqdm

# ---- prompts (Eq. 2 to 4); of the last two the paper prints only the beginning ------------------

CAPTIONING_PROMPT = "Report this medical scan."             # P_c
GROUNDING_PROMPT = "Detect all instances of: {phrase}"      # P_g; ending not stated in the paper
DENSE_CAPTIONING_PROMPT = "Describe the regions: {boxes}"   # P_d; ending not stated in the paper

SPLITS = ("train", "val", "test")
TASKS = "cgd"                           # tau of L_t: captioning, grounding, dense captioning
TASK_WEIGHT = {"c": 2, "g": 1, "d": 1}  # L_c and L_g,d "contribute equally" (Sec. 2.0.1)


class DataError(ValueError):
    """The data are not as they should be; the message is one line for the person who gave them."""


# ---- boxes as text: integers in [0, 1000], x first, in a fixed order (Sec. 2.0.4) ---------------

NO_BOXES = "none"
BOX_PATTERN = re.compile(r"\d{1,4} \d{1,4} \d{1,4} \d{1,4}", re.ASCII)


def boxes_to_text(boxes):
    """[(x0, y0, x1, y1), ...], fractions -> "380 510 780 840; ...", left to right, or "none"."""
    rounded = []
    for x0, y0, x1, y1 in boxes:
        x0, y0 = (min(999, round(1000 * v)) for v in (x0, y0))
        x1, y1 = max(x0 + 1, round(1000 * x1)), max(y0 + 1, round(1000 * y1))  # never empty
        rounded.append((x0, y0, x1, y1))
    return "; ".join(" ".join(map(str, box)) for box in sorted(rounded)) or NO_BOXES


def text_to_boxes(text):
    """The inverse: -> (boxes, malformed). Text that is not exactly box text gives ([], True)."""
    if text.strip() == NO_BOXES:
        return [], False
    boxes = []
    for part in text.strip().split("; "):
        if not BOX_PATTERN.fullmatch(part):
            return [], True
        x0, y0, x1, y1 = (int(v) / 1000 for v in part.split())
        if not (x0 < x1 <= 1 and y0 < y1 <= 1):
            return [], True
        boxes.append([x0, y0, x1, y1])
    return boxes, False


# ---- the manifest -------------------------------------------------------------------------------

def manifest_path(data):
    """The manifest of a folder, or the file itself. Raises DataError if there is none."""
    path = Path(data) / "manifest.jsonl" if Path(data).is_dir() else Path(data)
    if not path.is_file():
        raise DataError(f"{path}: no such file; --data takes a folder with manifest.jsonl, or that "
                        "file (python data.py phantom OUT makes one)")
    return path


def box_problem(box):
    """What is wrong with a box of the manifest, in words, or None."""
    number = (int, float)
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in number for v in box)):
        return "is not a list of 4 numbers"
    if not all(math.isfinite(v) for v in box):
        return "has a value that is not finite"
    x0, y0, x1, y1 = box
    if max(box) > 2:
        return "looks like pixels: divide x by the image's width and y by its height"
    if x1 <= x0 or y1 <= y0:
        return "has x1 <= x0 or y1 <= y0: corners are wanted, not x, y, width, height"
    if min(box) < 0 or max(box) > 1:
        return "leaves the image: clip it to [0, 1]"


def row_problem(row, folder):
    """What is wrong with a row of the manifest, in words, or None."""
    if not isinstance(row, dict):
        return f"found {type(row).__name__}, wanted a JSON object"
    for key in ("image", "study", "patient", "split"):
        if not (isinstance(row.get(key), str) and row[key]):
            return f"{key!r} is {row.get(key)!r}, wanted text"
    if row["split"] not in SPLITS:
        return f"'split' is {row['split']!r}, wanted one of {', '.join(SPLITS)}"
    if not isinstance(row.get("report"), (str, type(None))):
        return f"'report' is {row['report']!r}, wanted text"
    if not isinstance(row.get("regions"), (list, type(None))):
        return f"'regions' is {row['regions']!r}, wanted a list"
    for region in row.get("regions") or []:
        if not isinstance(region, dict) or not isinstance(region.get("phrase"), str) \
                or not region["phrase"].strip() or not isinstance(region.get("boxes"), list):
            return f"region {region!r}, wanted {{'phrase': text, 'boxes': [[x0, y0, x1, y1], ...]}}"
        for box in region["boxes"]:
            if problem := box_problem(box):
                return (f"box {box} of {region['phrase']!r} {problem}; "
                        "wanted [x0, y0, x1, y1] in [0, 1]")
    if not (folder / row["image"]).is_file():
        return f"image {folder / row['image']} does not exist"


def scan_manifest(data):
    """Yield (line number, row or None, problem or None) for each line of a manifest."""
    path = manifest_path(data)
    with open(path, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    yield number, None, f"not JSON: {error.msg} at column {error.colno}"
                    continue
                yield number, row, row_problem(row, path.parent)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})")


def read_manifest(data, split=None):
    """The rows of a manifest (of one split), each checked, plus "path": the image's full path.

    Raises DataError with file, line, what was found and wanted, for the first wrong row."""
    path, rows = manifest_path(data), []
    for number, row, problem in scan_manifest(data):
        if problem:
            raise DataError(f"{path}:{number}: {problem}")
        if split in (None, row["split"]):
            rows.append({**row, "report": " ".join((row.get("report") or "").split()),
                         "regions": row.get("regions") or [],
                         "path": str(path.parent / row["image"])})
    if not rows:
        raise DataError(f"{path}: no rows" + (f" with split {split!r}" if split else ""))
    return rows


# ---- images: any mode to 8-bit grey -------------------------------------------------------------

warnings.simplefilter("error", Image.DecompressionBombWarning)


def window_film(values):
    """(h, w) numbers -> (h, w) uint8: percentiles 0.5 to 99.5 to 0..255, as a reader windows."""
    values = np.nan_to_num(np.asarray(values, np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def load_image(path, size=None):
    """Read an image of any mode as a grey 8-bit film, stretched to (size, size) if a size is given.

    path: of a file, or a PIL image. 16-bit, 32-bit and float films, and 8-bit ones that use less
    than a quarter of the range, are windowed by percentiles; transparency is black. Raises
    DataError, with the path, if it cannot."""
    try:
        with path.copy() if isinstance(path, Image.Image) else Image.open(path) as image:
            if size and image.format == "JPEG":
                image.draft("L", (size, size))                 # JPEG: decode at 1/2, 1/4 or 1/8
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray(window_film(image))
            elif "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.composite(image.convert("L"), Image.new("L", image.size),
                                        image.getchannel("A"))
            image = image.convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError,
            Image.DecompressionBombWarning) as error:
        raise DataError(f"{path}: cannot be read as an image "
                        f"({str(error) or type(error).__name__})")
    low, high = image.getextrema()
    if 0 < high - low < 64:
        image = Image.fromarray(window_film(image))
    return image.resize((size, size), Image.Resampling.BILINEAR) if size else image


def augment(image, regions, size, strength, rng):
    """Crop or pad, brighten and contrast a film, and move its boxes along; not stated in the paper.

    At strength 1 the window is 0.75 to 1.25 of the film a side. Never a flip, which would swap left
    and right. A region that loses over a third of a box's area is dropped. image: PIL "L".
    -> (size, size) uint8, regions."""
    vary = lambda low, high, n=None: strength * rng.uniform(low, high, n)
    w, h = (1 + vary(-0.25, 0.25)) * (1 + vary(-0.07, 0.07, 2))                # of the film, a side
    x, y = rng.uniform(min(0, 1 - w), max(0, 1 - w)), rng.uniform(min(0, 1 - h), max(0, 1 - h))
    window = np.array([x, y, x + w, y + h]) * np.array(image.size * 2)
    image = image.transform((size, size), Image.Transform.EXTENT, window, Image.Resampling.BILINEAR)
    levels = (np.arange(256) - 128) * (1 + vary(-0.25, 0.3)) + 128 + vary(-25, 25)
    film = levels.clip(0, 255).astype(np.uint8)[np.asarray(image)]
    kept = []
    for region in regions:
        boxes = (np.array(region["boxes"]).reshape(-1, 4) - [x, y, x, y]) / [w, h, w, h]
        inside = boxes.clip(0, 1)
        area, left = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, inside))
        if (left > area * 2 / 3).all():
            kept.append({**region, "boxes": inside.tolist()})
    return film, kept


# ---- samples: what one image gives a training step ----------------------------------------------

def split_sentences(report):
    """Sentences of a report: cut after . ! or ? before white space and a capital or a digit."""
    return [s for s in re.split(r"(?<=[.!?])\s+(?=[A-Z0-9])", report.strip()) if s]


def sample_sentences(sentences, rng, low=4, high=8):
    """4 to 8 random sentences of a report, in their order (Sec. 2.0.4); fewer if it has fewer."""
    n = min(len(sentences), rng.integers(low, high + 1))
    return [sentences[i] for i in sorted(rng.choice(len(sentences), n, replace=False))]


def sub_reports(report, length=5):
    """A report in pieces of five sentences, the last one shorter (Sec. 3.1)."""
    sentences = split_sentences(report)
    return [" ".join(sentences[i:i + length]) for i in range(0, len(sentences), length)]


def possible_tasks(row, objectives=TASKS):
    """The tau that a row can serve: c wants a report, g and d want a region with boxes."""
    boxed = any(region["boxes"] for region in row["regions"])
    return [t for t in TASKS if t in objectives and (row["report"] if t == "c" else boxed)]


def sample_tasks(report, regions, objectives, n_regions, rng):
    """Draw tau, then its (task, prompt, target) rows: one report, or up to n_regions regions."""
    regions = [region for region in regions if region["boxes"]]
    tasks = possible_tasks({"report": report, "regions": regions}, objectives)
    if not tasks:
        return []
    weight = np.array([TASK_WEIGHT[t] for t in tasks], float)
    task = tasks[rng.choice(len(tasks), p=weight / weight.sum())]
    if task == "c":
        return [("c", CAPTIONING_PROMPT, report)]
    chosen = rng.permutation(len(regions))[:n_regions]
    return [location_aware_row(task, regions[i]) for i in chosen]


def location_aware_row(task, region):
    """(task, prompt, target): grounding (Eq. 3, phrase to boxes) or its swap, dense captioning."""
    phrase, boxes = region["phrase"], boxes_to_text(region["boxes"])
    if task == "g":
        return "g", GROUNDING_PROMPT.format(phrase=phrase), boxes
    return "d", DENSE_CAPTIONING_PROMPT.format(boxes=boxes), phrase


# ---- tokens -------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=100_000)
def plain_ids(tokenizer, text):
    """Token ids of a text, nothing added; "<eos>" written in a report stays plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def text_ids(tokenizer, texts, length):
    """Texts -> (B, length) ids for the text encoder, as SigLIP 2 wants them: lower case, no <bos>,
    <eos> kept when cut, padded on the right, no mask (it pools at the last position)."""
    ids = torch.full((len(texts), length), tokenizer.pad_token_id)
    for row, text in zip(ids, texts):
        tokens = plain_ids(tokenizer, text.lower())[:length - 1] + [tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def prompt_ids(tokenizer, prompt):
    """Prompt, then a line break that parts it from the target (not stated in the paper)."""
    return plain_ids(tokenizer, prompt + "\n")


def learn_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer learned from texts, for towers trained from scratch.

    Digits are never merged, so that a coordinate is one token a digit, as in Gemma's tokenizer."""
    from transformers import GPT2Tokenizer
    bytes_only = GPT2Tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                               unk_token="<unk>")
    texts = [re.sub(r"\d", " ", text) for text in texts]
    return bytes_only.train_new_from_iterator(texts + [t.lower() for t in texts], vocab_size,
                                              show_progress=False)


def tokenizer_texts(rows):
    """What a tokenizer is learned from: the prompts, reports and phrases of the training split."""
    prompts = [CAPTIONING_PROMPT, GROUNDING_PROMPT, DENSE_CAPTIONING_PROMPT] * 100
    return prompts + [r["report"] for r in rows] + [g["phrase"] for r in rows for g in r["regions"]]


# ---- dataset and batches ------------------------------------------------------------------------

class ChestXrays(torch.utils.data.Dataset):
    """Training samples of manifest rows; indexed by (epoch, i), which alone fixes the random draws.

    A sample: {"image": (size, size) uint8, "text": str, "tasks": [(task, prompt, target), ...]},
    or {"bad": message} for an unreadable image when skip_bad is set."""

    def __init__(self, rows, size, objectives="scgd", n_regions=1, augmented=0.0, cached=False,
                 skip_bad=False, seed=0):
        self.rows, self.size, self.objectives, self.n_regions = rows, size, objectives, n_regions
        self.augmented, self.skip_bad, self.seed = augmented, skip_bad, seed
        self.cache = {} if cached else None                    # decoded films, for sets that fit

    def __len__(self):
        return len(self.rows)

    def film(self, i):
        """The decoded film, at twice the input size if a window of it will be taken."""
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        film = load_image(self.rows[i]["path"], self.size * (2 if self.augmented else 1))
        if self.cache is not None:
            self.cache[i] = film
        return film

    def __getitem__(self, key):
        epoch, i = key
        row, rng = self.rows[i], np.random.default_rng([self.seed, epoch, i])
        try:
            film, regions = self.film(i), row["regions"]
        except DataError as error:
            if self.skip_bad:
                return {"bad": str(error)}
            raise
        if self.augmented:
            film, regions = augment(film, regions, self.size, self.augmented, rng)
        sentences = split_sentences(row["report"]) or [r["phrase"] for r in row["regions"]]
        return {"image": torch.from_numpy(np.array(film)),
                "text": " ".join(sample_sentences(sentences, rng)),
                "tasks": sample_tasks(row["report"], regions, self.objectives, self.n_regions, rng)}


class Collate:
    """Samples -> a batch of tensors. B images, R rows of the LLM, L tokens of the longest row.

    image (B, S, S) uint8; text (B, T) ids, if there is a text tokenizer; ids (R, L): prompt,
    target, <eos>, padding; is_target (R, L): target and <eos>; image_of_row (R,); task_of_row (R,):
    index in TASKS; bad: messages."""

    def __init__(self, text_tokenizer, text_length, llm_tokenizer, max_target):
        self.text_tokenizer, self.text_length = text_tokenizer, text_length
        self.llm_tokenizer, self.max_target = llm_tokenizer, max_target

    def __call__(self, samples):
        bad = [s["bad"] for s in samples if "bad" in s]
        samples = [s for s in samples if "bad" not in s]
        if not samples:
            return {"image": torch.zeros(0), "bad": bad}
        rows = [(i, *task) for i, sample in enumerate(samples) for task in sample["tasks"]]
        prompts = [prompt_ids(self.llm_tokenizer, prompt) for _, _, prompt, _ in rows]
        targets = [(plain_ids(self.llm_tokenizer, target) + [self.llm_tokenizer.eos_token_id])
                   [:self.max_target] for *_, target in rows]  # a cut target has no <eos>
        length = max((len(p) + len(t) for p, t in zip(prompts, targets)), default=0)
        ids = torch.full((len(rows), length), self.llm_tokenizer.pad_token_id)
        is_target = torch.zeros(len(rows), length, dtype=torch.bool)
        for r, (prompt, target) in enumerate(zip(prompts, targets)):
            end = len(prompt) + len(target)
            ids[r, :end] = torch.tensor(prompt + target)
            is_target[r, len(prompt):end] = True
        batch = {"image": torch.stack([s["image"] for s in samples]),
                 "ids": ids, "is_target": is_target,
                 "image_of_row": torch.tensor([row[0] for row in rows], dtype=torch.long),
                 "task_of_row": torch.tensor([TASKS.index(row[1]) for row in rows],
                                             dtype=torch.long),
                 "bad": bad}
        if self.text_tokenizer:
            batch["text"] = text_ids(self.text_tokenizer, [s["text"] for s in samples],
                                     self.text_length)
        return batch


# ---- the phantom: drawn chest films -------------------------------------------------------------
# Body frame: x from the patient's right (-1) to left (1), which is the picture's left to right;
# y from the shoulders (-1) to the abdomen (1).

RIGHT_LUNG = [(-.14, -.62), (-.26, -.74), (-.42, -.70), (-.56, -.48), (-.66, -.12), (-.71, .25),
              (-.73, .56), (-.58, .46), (-.38, .40), (-.20, .50), (-.14, .28), (-.21, .02),
              (-.15, -.25)]
ZONES = {"upper": -.42, "mid": -.06, "lower": .27}              # centres, y
SIZES = {"small": .35, "moderate": .45, "large": .57}           # widths
HEART = {"mildly": .58, "moderately": .66, "severely": .75}     # left border, x; .46 is normal
FINDINGS = {"nodule": "{Size} {side} {zone} zone nodule.",
            "cavity": "{Size} cavity in the {side} {zone} zone.",
            "consolidation": "{Size} {side} {zone} zone consolidation.",
            "effusion": "{Size} {side} pleural effusion.",
            "pneumothorax": "{Size} {side} pneumothorax.",
            "pacemaker": "Pacemaker over the {side} chest.",
            "heart": "The heart is {degree} enlarged."}
ABSENT = {"nodule": "No nodule.", "cavity": "No cavity.", "consolidation": "No consolidation.",
          "effusion": "No pleural effusion.", "pneumothorax": "No pneumothorax.",
          "pacemaker": "No implanted device.", "heart": "Normal heart size."}
SENTENCES = 4                                                   # of a phantom's report


class Film:
    """A film being drawn: (n, n) brightness, and the frame that places the body on it."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n
        self.scale = rng.uniform(.70, 1.06) / 2 * np.array([1, rng.uniform(.9, 1.12)])
        self.centre = .5 + rng.uniform(-.11, .11, 2)
        self.pixels = np.full((n, n), 14, np.float32)

    def place(self, points):
        """Body frame -> fractions of the film."""
        return self.centre + self.scale * np.asarray(points, float)

    def mask(self, *shapes, blur=0, line=0):
        """Filled polygons, or lines of that width (film fraction), blurred: (n, n) in [0, 1]."""
        layer = Image.new("L", (self.n, self.n))
        for points in shapes:
            corners = [tuple(p) for p in self.place(points) * self.n]
            if line:
                ImageDraw.Draw(layer).line(corners, 255, max(1, round(line * self.n)), "curve")
            else:
                ImageDraw.Draw(layer).polygon(corners, 255)
        if blur:
            layer = layer.filter(ImageFilter.GaussianBlur(blur * self.n))
        return np.asarray(layer, np.float32) / 255

    def add(self, mask, value):
        self.pixels += mask * value

    def box(self, points):
        """The manifest's box around points of the body frame, clipped to the film."""
        points = self.place(points).clip(0, 1)
        return [round(float(v), 4) for v in (*points.min(0), *points.max(0))]


def mirror(points, side):
    """Points drawn on the patient's right, moved to the side asked for."""
    return [(x if side == "right" else -x, y) for x, y in points]


def noise(rng, grid, n, std):
    """(n, n) smooth noise: a grid of normal draws, enlarged."""
    draws = Image.fromarray(rng.normal(0, std, (grid, grid)).astype(np.float32))
    return np.asarray(draws.resize((n, n), Image.Resampling.BICUBIC))


def ellipse(x, y, rx, ry, wobble=None, steps=28):
    """Points of an ellipse; wobble (steps,) scales its radius by angle."""
    angle = np.linspace(0, 2 * np.pi, steps, endpoint=False)
    radius = 1 if wobble is None else wobble
    return np.stack([x + rx * radius * np.cos(angle), y + ry * radius * np.sin(angle)], 1)


def draw_anatomy(film, heart):
    """Body, lungs, spine, trachea, ribs, clavicles, vessels and heart (its outline is given)."""
    rng, wide = film.rng, 2 * film.scale[0]
    torso = [(-.30, -1.3), (-.34, -.98), (-.86, -.82), (-1.02, -.3), (-.95, 1.6)]
    film.add(film.mask(torso + mirror(torso, "left")[::-1], blur=.02), rng.uniform(118, 138))
    lungs = film.mask(RIGHT_LUNG, mirror(RIGHT_LUNG, "left"), blur=.008)
    film.add(lungs, -rng.uniform(82, 92))
    film.add(film.mask([(-.10, -1.1), (.10, -1.1), (.12, 1.3), (-.12, 1.3)], blur=.02), 38)
    film.add(film.mask([(-.035, -1.1), (.035, -1.1), (.03, -.42), (-.03, -.42)], blur=.008), -26)
    both = lambda lines: lines + [mirror(points, "left") for points in lines]
    ribs = [[(-.10, y - .05), (-.32, y - .10), (-.55, y - .02), (-.72, y + .16)]
            for y in np.arange(-.66, .5, .155)]
    film.add(film.mask(*both(ribs), blur=.004, line=.016 * wide), 13)
    film.add(film.mask(*both([[(-.08, -.60), (-.35, -.70), (-.74, -.80)]]), blur=.004,
                       line=.03 * wide), 24)
    roots = [(-.2, y) for y in rng.uniform(-.15, .1, 14)]
    vessels = [[(x, y), (x - rng.uniform(.1, .36), y + rng.uniform(-.4, .3))] for x, y in roots]
    vessels = vessels[:7] + [mirror(points, "left") for points in vessels[7:]]
    film.add(film.mask(*vessels, blur=.006, line=.012) * lungs, 20)
    film.add(film.mask(heart, blur=.014), 66)


def place_in_zone(film, side, zone):
    """Where in a zone a finding sits, anywhere in it: its centre in the body frame."""
    x = film.rng.uniform(-.55, -.30)
    return (x if side == "right" else -x), ZONES[zone] + film.rng.uniform(-.14, .14)


def draw_nodule(film, side, zone, width):
    outline = ellipse(*place_in_zone(film, side, zone), width / 2, width / 2)
    film.add(film.mask(outline, blur=.006), 88)
    return [outline]


def draw_cavity(film, side, zone, width):
    x, y = place_in_zone(film, side, zone)
    outline = ellipse(x, y, width / 2, width / 2 * film.rng.uniform(.8, 1.2))
    inside = (outline - (x, y)) * .68 + (x, y)
    film.add(film.mask(outline, blur=.005) - film.mask(inside, blur=.005), 92)
    film.add(film.mask(inside, blur=.005), -14)
    return [outline]


def draw_consolidation(film, side, zone, width):
    rng, (x, y) = film.rng, place_in_zone(film, side, zone)
    wobble = 1 + .18 * np.sin(np.arange(28) / 28 * 2 * np.pi * rng.integers(3, 6)
                              + rng.uniform(0, 6))
    outline = ellipse(x, y, .62 * width, .62 * width * rng.uniform(.55, .85), wobble)
    film.add(film.mask(outline, blur=.012) * (1 + noise(rng, 24, film.n, .3)), 64)
    return [outline]


def draw_effusion(film, side, _, width):
    top = .50 - 1.5 * (width - .12) * film.rng.uniform(.9, 1.1)
    outline = mirror([(-.75, top), (-.62, top + .10), (-.40, top + .16), (-.15, top + .17),
                      (-.13, .52), (-.74, .58)], side)
    film.add(film.mask(outline, blur=.010), 92)
    return [outline]


def draw_pneumothorax(film, side, _, width):
    edge, base = width * film.rng.uniform(.55, .75), -.72 + 1.9 * width * film.rng.uniform(.9, 1.1)
    line = [(-.20, -.70 + edge), (-.40, -.62 + edge), (-.60 + .4 * edge, -.40 + edge), (-.70, base)]
    outline = mirror([(-.14, -.66), (-.26, -.76), (-.42, -.72), (-.58, -.48), (-.68, -.12)]
                     + line[::-1], side)
    film.add(film.mask(outline, blur=.004), -34)
    film.add(film.mask(mirror(line, side), blur=.002, line=.012), 70)
    return [outline]


def draw_pacemaker(film, side, *_):
    rng = film.rng
    x, y = rng.uniform(-.70, -.36), rng.uniform(-.72, -.30)
    outline = mirror(ellipse(x, y, rng.uniform(.17, .23), rng.uniform(.13, .18)), side)
    lead = mirror([(x, y), (-.16, y - .1), (-.02, -.1), (-.10 if side == "right" else .10, .38)],
                  side)
    film.add(film.mask(lead, blur=.002, line=.009), 80)
    film.add(film.mask(outline, blur=.003), 120)
    return [outline]


def choose_findings(rng):
    """1 to 4 findings, each as (kind, side, zone, size); a zone, pleura or organ is used once."""
    taken, findings, wanted = set(), [], rng.choice([1, 2, 3], p=[.15, .65, .2])
    while len(findings) < wanted:
        kind = rng.choice(list(FINDINGS), p=[.24, .20, .21, .11, .09, .10, .05])
        side, size = rng.choice(["right", "left"]), rng.choice(list(SIZES))
        zone = {"effusion": "lower", "pneumothorax": "upper"}.get(kind) or rng.choice(list(ZONES))
        place = kind if kind in ("heart", "pacemaker") else (side, zone)
        if place not in taken:
            taken.add(place)
            findings.append((kind, side, zone, size))
    return findings


def draw_phantom(rng, n=128):
    """One phantom -> (PIL "L" image of n x n, report, regions)."""
    film, findings = Film(rng, n), choose_findings(rng)
    degree = dict(zip(SIZES, HEART))
    kinds = {kind: size for kind, _, _, size in findings}
    border = HEART[degree[kinds["heart"]]] if "heart" in kinds else .46
    left, top, bottom = -.22 - .3 * (border - .46), -.02, .54
    heart = ellipse((left + border) / 2, (top + bottom) / 2,
                    (border - left) / 2, (bottom - top) / 2)
    draw_anatomy(film, heart)
    draw = {"nodule": draw_nodule, "cavity": draw_cavity, "consolidation": draw_consolidation,
            "effusion": draw_effusion, "pneumothorax": draw_pneumothorax,
            "pacemaker": draw_pacemaker, "heart": lambda *_: [heart]}
    regions = []
    for kind, side, zone, size in findings:
        width = SIZES[size] * rng.uniform(.9, 1.1)
        phrase = FINDINGS[kind].format(side=side, zone=zone, Size=size.capitalize(),
                                       degree=degree[size])
        regions.append({"phrase": phrase,
                        "boxes": [film.box(o) for o in draw[kind](film, side, zone, width)]})
    absent = rng.permutation([kind for kind in FINDINGS if kind not in kinds])
    sentences = [r["phrase"] for r in regions] + [ABSENT[kind] for kind in absent]
    report = " ".join(rng.permutation(sentences[:SENTENCES]))
    pixels = (film.pixels * rng.uniform(.85, 1.1)
              + noise(rng, 2 * n // 3, n, 14) + noise(rng, 5, n, 9))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), report, regions


def write_phantom(job):
    """Draw phantom i of a split and save its film; a process pool's task. Returns the row."""
    out, split, i, seed = job
    film, report, regions = draw_phantom(np.random.default_rng([seed, SPLITS.index(split), i]))
    name = f"images/{split}_{i:05d}.png"
    film.save(out / name, compress_level=1)
    study = f"{split}{i:05d}"
    return {"image": name, "study": study, "patient": study, "split": split,
            "report": report, "regions": regions}


PHANTOM_SIZES = {"train": 8000, "val": 50, "test": 400}


def make_phantom(out, sizes=PHANTOM_SIZES, seed=0, quiet=False):
    """Write a phantom data set to a new folder, the same for the same seed. Returns the folder."""
    out = Path(out)
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "images").mkdir(parents=True)
    jobs = [(draft, split, i, seed) for split, n in sizes.items() for i in range(n)]
    with (ProcessPoolExecutor(min(8, os.cpu_count())) as pool,
          open(draft / "manifest.jsonl", "w") as manifest):
        for row in tqdm(pool.map(write_phantom, jobs, chunksize=50), "phantom", len(jobs),
                        unit="film", disable=quiet):
            manifest.write(json.dumps(row) + "\n")
    draft.rename(out)
    return out


# ---- check ---------------------------------------------------------------------------------------

def draw_rows(rows, path, size=320):
    """Write a PNG of a few rows, four abreast, each film with its boxes and phrases."""
    sheet = Image.new("RGB", (size * min(4, len(rows)), size * math.ceil(len(rows) / 4)))
    for n, row in enumerate(rows):
        film = load_image(row["path"], size).convert("RGB")
        pen = ImageDraw.Draw(film)
        for region in row["regions"]:
            for box in region["boxes"]:
                pen.rectangle([v * (size - 1) for v in box], outline="yellow")
                x = min(box[0] * size + 3, size - 2 - pen.textlength(region["phrase"]))
                pen.text((max(0, x), box[1] * size + 2), region["phrase"], fill="yellow")
        sheet.paste(film, (size * (n % 4), size * (n // 4)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def check(data, png):
    """Read every row and image of a data set, print every problem and the counts, draw eight rows.

    Returns the number of problems."""
    path, rows, problems = manifest_path(data), [], 0
    for number, row, problem in tqdm(scan_manifest(data), "check", unit="row"):
        if not problem:
            row = {**row, "path": str(path.parent / row["image"]),
                   "regions": row.get("regions") or []}
            try:
                load_image(row["path"], 64)
                rows.append(row)
            except DataError as error:
                problem = str(error)
        if problem:
            problems += 1
            tqdm.write(f"{path}:{number}: {problem}")
    for split in SPLITS:
        some = [row for row in rows if row["split"] == split]
        regions = [region for row in some for region in row["regions"]]
        print(f"{split:6}{len(some):8,} images {len({r['study'] for r in some}):8,} studies "
              f"{len({r['patient'] for r in some}):8,} patients "
              f"{sum(bool(r.get('report')) for r in some):8,} reports "
              f"{len(regions):8,} regions {sum(len(r['boxes']) for r in regions):8,} boxes")
    patients = [{r["patient"] for r in rows if r["split"] == split} for split in SPLITS]
    if shared := patients[0] & (patients[1] | patients[2]):
        print(f"note: {len(shared)} patients of train are in val or test too, "
              f"{min(shared)!r} for one")
    if rows:
        boxed = [row for row in rows if row["regions"]] or rows
        draw_rows(boxed[::max(1, len(boxed) // 8)][:8], png)
        print(f"drew {png}: look whether the boxes sit where the phrases say")
    print(f"{problems} problems in {len(rows) + problems} rows")
    return problems


# ---- command line --------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(
        description="Make and check data sets of manifest.jsonl rows (see the top of data.py).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "phantom", help="draw chest films with findings, reports and boxes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("out", help="folder to write; an existing one is not touched")
    for split, n in PHANTOM_SIZES.items():
        command.add_argument(f"--{split}", type=int, default=n, metavar="N",
                             help=f"films of the {split} split")
    command.add_argument("--seed", type=int, default=0, help="the same seed draws the same films")
    command = commands.add_parser(
        "check", help="read every row and image, count, draw eight rows with boxes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("data", help="folder with manifest.jsonl, or that file")
    command.add_argument("--png", default="runs/check.png", help="where to draw")
    args = parser.parse_args()
    if args.command == "check":
        sys.exit(1 if check(args.data, args.png) else 0)
    if Path(args.out).exists():
        raise DataError(f"{args.out}: exists already; name a new folder")
    make_phantom(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"wrote {args.out}; next: python data.py check {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")
