"""Data of LoFi (Sec. 2.0.1 and 2.0.4): the manifest, box strings, prompts, samples and the phantom.

    python data.py phantom OUT        # draw chest films with findings, reports and boxes
    python data.py mimic-cxr --help   # a manifest from archives; also padchest-gr and ms-cxr
    python data.py check DIR          # read every row and image, count, draw a few with their boxes

A data set is a folder with `manifest.jsonl`, one image a line (`report`, `regions` may be missing):

    {"image": "images/0001.png", "study": "s1", "patient": "p1", "split": "train",
     "report": "The heart is enlarged. ...",
     "regions": [{"phrase": "The heart is enlarged.", "boxes": [[0.38, 0.51, 0.78, 0.84]]}]}

Boxes are (x0, y0, x1, y1), fractions of the width and height of the original image. The image is
stretched to the encoder's square, so a box is the same fraction of the model's input.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import textwrap
import threading
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from metrics import box_iou

# ---- prompts (Eq. 2, 3, L_d); of the last two the paper prints only the beginning ----------------

CAPTIONING_PROMPT = "Report this medical scan."             # P_c
GROUNDING_PROMPT = "Detect all instances of: {phrase}"      # P_g; ending not stated in the paper
DENSE_CAPTIONING_PROMPT = "Describe the regions: {boxes}"   # P_d; ending not stated in the paper

SPLITS = ("train", "val", "test")
TASKS = "cgd"                           # tau of L_t: captioning, grounding, dense captioning
TASK_WEIGHT = {"c": 2, "g": 1, "d": 1}  # L_c and L_g,d "contribute equally" (Sec. 2.0.1)


class DataError(ValueError):
    """The data are not as they should be; the message is one line for the person who gave them."""


# ---- files, whole or not there ------------------------------------------------------------------

def write_whole(path, write):
    """write(draft), then rename it to path: whole or not there, its folder made where it is
    missing. Raises DataError where the disk cannot take it."""
    path = Path(path)
    draft = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:                   # RuntimeError: torch's word for it
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be written ({reason}); once it can, run the same command "
                        "again")
    finally:
        if os.path.lexists(draft):
            draft.unlink()


def write_json(path, value):
    """A JSON file, whole or not there. Raises DataError."""
    write_whole(path, lambda draft: draft.write_text(json.dumps(value, indent=2) + "\n"))


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
    if not all(abs(v) < math.inf for v in box):
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
                    if "\\u" in line:                          # half a surrogate pair is no text
                        json.dumps(row, ensure_ascii=False).encode()
                except (ValueError, RecursionError) as error:
                    yield number, None, f"not JSON: {str(error).splitlines()[0]}"
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
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError,
              Image.DecompressionBombWarning)


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
    except UNREADABLE as error:
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


# ---- pictures of films with their boxes ---------------------------------------------------------

def draw_boxes(film, regions):
    """Draw boxes, and the start of their phrases above them, on a film (PIL "RGB"), in place."""
    pen, (w, h), font = ImageDraw.Draw(film), film.size, ImageFont.load_default(13)
    boxes = [([x0 * (w - 1), y0 * (h - 1), x1 * (w - 1), y1 * (h - 1)],
              textwrap.shorten(region["phrase"], 44, placeholder=" ..."))
             for region in regions for x0, y0, x1, y1 in region["boxes"]]
    for (x, y, *_), phrase in boxes:
        place = max(2, min(x, w - 4 - pen.textlength(phrase, font))), y - 17 if y > 19 else y + 3
        pen.text(place, phrase, "yellow", font, stroke_width=2, stroke_fill="black")
    for box, _ in boxes:                                       # last: no phrase hides an edge
        pen.rectangle(box, outline="yellow", width=2)


def tile(cells, columns):
    """Pictures of one size, row by row on one sheet -> PIL image."""
    w, h = cells[0].size
    sheet = Image.new("RGB", (w * min(columns, len(cells)), h * math.ceil(len(cells) / columns)))
    for n, cell in enumerate(cells):
        sheet.paste(cell, (n % columns * w, n // columns * h))
    return sheet


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


def sub_report_table(rows):
    """Table 1's films and texts: of each study the first image with a report, and its sub-reports.

    -> images: indices into rows; texts; owner: (texts,) the place in images of each text's film."""
    first_of_study = {row["study"]: i for i, row in reversed(list(enumerate(rows)))
                      if row["report"]}
    images = sorted(first_of_study.values())
    pairs = [(n, text) for n, i in enumerate(images) for text in sub_reports(rows[i]["report"])]
    return images, [text for _, text in pairs], np.array([n for n, _ in pairs], int)


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

    A sample: {"image": (size, size) uint8, "path": str, "text": str, "tasks": [(task, prompt,
    target), ...]}, or {"bad": message} for an unreadable image when skip_bad is set."""

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
        return {"image": torch.from_numpy(np.array(film)), "path": row["path"],
                "text": " ".join(sample_sentences(sentences, rng)),
                "tasks": sample_tasks(row["report"], regions, self.objectives, self.n_regions, rng)}


class Collate:
    """Samples -> a batch of tensors. B images, R rows of the LLM, L tokens of the longest row.

    image (B, S, S) uint8; text (B, T) ids, if there is a text tokenizer; ids (R, L): prompt,
    target, <eos>, padding; is_target (R, L): target and <eos>; image_of_row (R,); task_of_row (R,):
    index in TASKS; paths: of the images; bad: messages."""

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
                 "bad": bad, "paths": [s["path"] for s in samples]}
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
SIZES = {"small": .35, "moderate": .47, "large": .62}           # widths
HEART = {"mildly": .58, "moderately": .68, "severely": .80}     # left border, x; .46 is normal
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
SENTENCES = 3                       # on findings, there or not, in a phantom's report
POSITION = "{view} view, chest {y} and {x}."                    # in half of the reports
BODY_WIDTH, BODY_SHIFT = (.70, 1.06), .12                       # fractions of the film; each way


class Film:
    """A film being drawn: (n, n) brightness, and the frame that places the body on it."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n
        self.scale = rng.uniform(*BODY_WIDTH) / 2 * np.array([1, rng.uniform(.9, 1.12)])
        self.centre = .5 + rng.uniform(-BODY_SHIFT, BODY_SHIFT, 2)
        self.pixels = np.full((n, n), 14, np.float32)

    def position(self):
        """The sentence that says how the body lies on the film: how much of its width it takes, and
        where its middle is, each by thirds of the range. Right and left are the patient's."""
        def third(value, low, high, *words):
            return words[min(2, int(3 * (value - low) / (high - low)))]
        x, y = self.centre - .5
        return POSITION.format(
            view=third(2 * self.scale[0], *BODY_WIDTH, "Wide", "Standard", "Close"),
            y=third(y, -BODY_SHIFT, BODY_SHIFT, "high", "level", "low"),
            x=third(x, -BODY_SHIFT, BODY_SHIFT, "right", "central", "left"))

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
            layer = layer.filter(ImageFilter.BoxBlur(1.6 * blur * self.n))
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
    film.add(film.mask(outline, blur=.006), 112)
    return [outline]


def draw_cavity(film, side, zone, width):
    x, y = place_in_zone(film, side, zone)
    outline = ellipse(x, y, width / 2, width / 2 * film.rng.uniform(.8, 1.2))
    inside = (outline - (x, y)) * .55 + (x, y)
    film.add(film.mask(outline, blur=.005) - film.mask(inside, blur=.005), 112)
    film.add(film.mask(inside, blur=.005), -30)
    return [outline]


def draw_consolidation(film, side, zone, width):
    rng, (x, y) = film.rng, place_in_zone(film, side, zone)
    wobble = 1 + .12 * np.sin(np.arange(28) / 28 * 2 * np.pi * rng.integers(3, 6)
                              + rng.uniform(0, 6))
    outline = ellipse(x, y, .62 * width, .62 * width * rng.uniform(.55, .85), wobble)
    film.add(film.mask(outline, blur=.012) * (1 + noise(rng, 24, film.n, .3)), 66)
    return [outline]


def draw_effusion(film, side, _, width):
    top = .50 - 1.5 * (width - .12) * film.rng.uniform(.9, 1.1)
    outline = mirror([(-.75, top), (-.62, top + .10), (-.40, top + .16), (-.15, top + .17),
                      (-.13, .52), (-.74, .58)], side)
    film.add(film.mask(outline, blur=.010), 92)
    return [outline]


def draw_pneumothorax(film, side, _, width):
    edge, base = width * film.rng.uniform(.6, .8), -.78 + 2 * width * film.rng.uniform(.95, 1.05)
    line = [(-.20, -.70 + edge), (-.40, -.62 + edge), (-.60 + .4 * edge, -.40 + edge), (-.70, base)]
    outline = mirror([(-.14, -.66), (-.26, -.76), (-.42, -.72), (-.58, -.48), (-.68, -.12)]
                     + line[::-1], side)
    film.add(film.mask(outline, blur=.004), -48)
    film.add(film.mask(mirror(line, side), blur=.002, line=.012), 70)
    return [outline]


def draw_pacemaker(film, side, *_):
    rng = film.rng
    x, y = rng.uniform(-.70, -.36), rng.uniform(-.72, -.30)
    outline = mirror(ellipse(x, y, rng.uniform(.20, .26), rng.uniform(.16, .21)), side)
    lead = mirror([(x, y), (-.16, y - .1), (-.02, -.1), (-.10 if side == "right" else .10, .38)],
                  side)
    film.add(film.mask(lead, blur=.002, line=.009), 80)
    film.add(film.mask(outline, blur=.003), 120)
    return [outline]


def choose_findings(rng):
    """1 to 3 findings, each as (kind, side, zone, size); a zone, pleura or organ is used once."""
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


def draw_phantom(rng, n=96):
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
        width = SIZES[size] * rng.uniform(.94, 1.06)
        phrase = FINDINGS[kind].format(side=side, zone=zone, Size=size.capitalize(),
                                       degree=degree[size])
        regions.append({"phrase": phrase,
                        "boxes": [film.box(o) for o in draw[kind](film, side, zone, width)]})
    absent = rng.permutation([kind for kind in FINDINGS if kind not in kinds])
    sentences = [r["phrase"] for r in regions] + [ABSENT[kind] for kind in absent]
    sentences = sentences[:SENTENCES]
    if rng.integers(2):
        sentences.append(film.position())
    report = " ".join(rng.permutation(sentences))
    pixels = (film.pixels * rng.uniform(.85, 1.1)
              + noise(rng, 2 * n // 3, n, 8) + noise(rng, 5, n, 6))
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


PHANTOM_SIZES = {"train": 16000, "val": 50, "test": 400}


def make_phantom(out, sizes=PHANTOM_SIZES, seed=0, quiet=False):
    """Write a phantom data set to a new folder, the same for the same seed. Returns the folder."""
    out = Path(out)
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "images").mkdir(parents=True)
    jobs = [(draft, split, i, seed) for split, n in sizes.items() for i in range(n)]
    with (ProcessPoolExecutor(min(8, os.cpu_count()), initializer=start_worker) as pool,
          open(draft / "manifest.jsonl", "w") as manifest):
        for row in tqdm(pool.map(write_phantom, jobs, chunksize=50), "phantom", len(jobs),
                        unit="film", disable=quiet):
            manifest.write(json.dumps(row) + "\n")
    draft.rename(out)
    return out


# ---- converters: sources read in place, a line or a member at a time ----------------------------

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, csv.Error, struct.error, zlib.error,
           zipfile.BadZipFile)


@contextlib.contextmanager
def reading(path):
    """Whatever goes wrong with a source inside becomes a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except DAMAGED as error:
        raise DataError(f"{path}: cannot be read to its end "
                        f"({getattr(error, 'strerror', None) or error or type(error).__name__}); "
                        "is the path right and the download whole?")


@contextlib.contextmanager
def open_text(path):
    """A text, plain, .gz or the one .csv of a .zip, without its byte order mark."""
    suffix = Path(path).suffix
    with reading(path), contextlib.ExitStack() as stack:
        if suffix == ".zip":
            names, take = members(path, ".csv")
            raw = io.BytesIO(take(names[min(names)]))
        else:
            raw = stack.enter_context((gzip.open if suffix == ".gz" else open)(path, "rb"))
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def csv_rows(path, *columns, optional=()):
    """Yield the named columns of a table's rows; an optional column that it lacks is ""."""
    csv.field_size_limit(1 << 30)                              # CheXmask: a mask is one field
    with open_text(path) as text:
        lines = csv.reader(text)
        header = next(lines, [])
        if absent := [name for name in columns if name not in header]:
            raise DataError(f"{path}: no column {absent[0]!r}; it has {', '.join(header)[:200]}")
        places = [header.index(name) if name in header else -1 for name in (*columns, *optional)]
        for line in tqdm(filter(None, lines), Path(path).name, unit="row"):
            if len(line) < len(header):
                raise DataError(f"{path}:{lines.line_num}: {len(line)} fields, wanted "
                                f"{len(header)}; is the download whole?")
            line.append("")
            yield [line[place] for place in places]


def json_items(path, chunk=1 << 20, limit=1 << 26):
    """Yield the objects of a JSON array, with bare NaN if need be; only a piece is in memory."""
    decoder, at, number = json.JSONDecoder(), 1, 1
    with open_text(path) as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise DataError(f"{path}: starts with {text[:20]!r}, wanted a JSON array")
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                item, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(chunk)
                if not more or len(text) - at > limit:
                    raise DataError(f"{path}: item {number} is cut short or not JSON "
                                    f"({error.msg}); is the download whole?")
                text, at = text[at:] + more, 0
                continue
            if not isinstance(item, dict):
                raise DataError(f"{path}: item {number} is {item!r:.40}, wanted an object")
            yield item
            number += 1


def members(path, suffix):
    """Files below a folder or in a zip, by bare name (leading folders differ between releases).

    -> {name: path or member}, and what turns a member into bytes and leaves a path as it is."""
    with reading(path):
        archive = None if os.path.isdir(path) else zipfile.ZipFile(path)
        found = archive.namelist() if archive else map(str, Path(path).rglob("*" + suffix))
    names = {os.path.basename(p): p for p in found if p.endswith(suffix)}
    names = {name: p for name, p in names.items() if not name.startswith(".")}    # macOS adds ._x
    if not names:
        raise DataError(f"{path}: no *{suffix} in it; wanted a folder or a zip that has some")

    def take(member):
        with reading(f"{path}: {member}"):
            return archive.read(member) if archive else member

    return names, take


def find(folder, *patterns):
    """The first file of a pattern in a folder or one level below (releases differ), or None."""
    places = (place for pattern in patterns for place in (pattern, f"*/{pattern}"))
    return next((path for place in places for path in sorted(Path(folder).glob(place))), None)


def one_line(text):
    """Text with its white space collapsed; what is no text (None, NaN) is empty."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def official_split(value, path):
    """The manifest's name of a split as its authors spell it."""
    names = {"validate": "val", "validation": "val"} | {split: split for split in SPLITS}
    if value not in names:
        raise DataError(f"{path}: split {value!r}, wanted one of {', '.join(names)}")
    return names[value]


# ---- converters: steps they share ---------------------------------------------------------------

def weighted_boxes_fusion(boxes, iou):
    """Merge boxes that overlap into their mean (Solovyev et al. 2021; scores 1, one source).

    From the last box to the first: it joins the fused box of highest IoU, if that is above `iou`,
    or opens a new one. (N, 4) -> (M, 4), left to right. (0, 0, .4, .4) and (.2, 0, .6, .4), of
    IoU 1/3, give (.1, 0, .5, .4) at 0.3 and themselves at 0.4. Empty boxes are dropped."""
    joined, fused = [], []
    for box in reversed([box for box in boxes if box[0] < box[2] and box[1] < box[3]]):
        overlap = box_iou(fused, [box])[:, 0] if fused else np.zeros(1)
        best = int(overlap.argmax())
        if overlap[best] > iou:
            joined[best].append(box)
            fused[best] = np.mean(joined[best], axis=0).tolist()
        else:
            joined.append([box])
            fused.append(list(box))
    return sorted(fused)


def make_region(phrase, boxes, scale, split, funnel, iou=None):
    """Boxes in units of scale (w, h) -> a region, or None if no box is left on the image.

    Boxes are clipped and, with iou, fused; they, and a pair that is dropped, are counted."""
    if not phrase:
        funnel["pairs", "no text", split] += 1
        return None
    try:
        fractions = np.array(boxes, float).reshape(-1, 4) / (*scale, *scale)
    except (TypeError, ValueError):
        raise DataError(f"{phrase!r} has boxes {boxes}, wanted lists of 4 numbers")
    if scale == (1, 1) and (fractions > 2).any():
        raise DataError(f"{phrase!r} has boxes {boxes}, which look like pixels; wanted fractions")
    inside = [b for b in fractions.clip(0, 1).round(5).tolist() if b[0] < b[2] and b[1] < b[3]]
    fused = inside if iou is None else weighted_boxes_fusion(inside, iou)
    funnel.update({("boxes", "in", split): len(boxes),
                   ("boxes", "degenerate box", split): len(boxes) - len(inside),
                   ("boxes", "merged", split): len(inside) - len(fused)})
    if not fused:
        funnel["pairs", "degenerate box" if len(boxes) else "no box", split] += 1
        return None
    return {"phrase": phrase, "boxes": [[round(v, 5) for v in box] for box in fused]}


def start_worker():
    """A worker leaves Ctrl-C to its parent, and ends with it even if that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wait = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=wait, daemon=True).start()


def parallel(work, jobs, workers):
    """Yield work(job) in order from a process pool that is handed only a few jobs at a time."""
    if workers == 1:
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError("a worker process was killed, perhaps for want of memory; the same "
                            "command with fewer --workers goes on where it was")


def shrink(job):
    """Write a film as an 8-bit JPEG, its short side `size` pixels, unless it is smaller.

    job: (path or bytes, where to write or None, size, (w, h) or None). -> (w, h), of the original
    where not given; or, as text, why there is none. Raises DataError if it cannot be written."""
    source, target, size, scale = job
    try:
        if not target and scale:
            return scale if os.path.isfile(source) else "no image"
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            scale = scale or image.size
            if target:
                factor = min(1, size / min(image.size))
                small = [max(1, round(factor * side)) for side in image.size]
                image.draft("L", small)                        # JPEG: decode at 1/2, 1/4 or 1/8
                film = load_image(image).resize(small, Image.Resampling.BILINEAR)
    except FileNotFoundError:
        return "no image"
    except UNREADABLE:
        return "unreadable image"
    if target:
        write_whole(target, lambda draft: film.save(draft, "JPEG", quality=95))
    return scale


def prepare_images(rows, args, funnel, take=lambda source: source):
    """Give each row its image, shrunk once into --out, or the original's path; drop those without.

    row["name"]: where to write, below a folder that names the size; row["source"]: what take()
    turns into a path or bytes; row["scale"]: units of its boxes, (w, h), None for the film's."""
    def job(row):
        target = args.out / row["image"] if args.size else None
        return (take(row["source"]), target if target and not target.exists() else None, args.size,
                row["scale"])

    todo = []
    for row in rows:
        row["image"] = (f"images_{args.size}/{row['name']}" if args.size else
                        os.path.abspath(row["source"]))
        if not (args.size and row["scale"] and (args.out / row["image"]).exists()):
            todo.append(row)
    done = parallel(shrink, map(job, todo), args.workers if args.size else 1)
    for result, row in zip(tqdm(done, "images", len(todo), unit="image"), todo):
        if isinstance(result, str):
            row["image"] = None
            funnel["images", result, row["split"]] += 1
            if result == "unreadable image":
                tqdm.write(f"unreadable image: {row['source']}")
        else:
            row["scale"] = result
    return [row for row in rows if row["image"]]


def check_converter(args):
    """Make --out. Raises DataError if it holds another data set, or for a flag that cannot be."""
    if args.size < 0 or args.workers < 1 or not 0 <= getattr(args, "wbf_iou", 0) <= 1:
        raise DataError("--size wants 0 or more, --workers 1 or more, --wbf-iou 0 to 1")
    with reading(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        notes = args.out / "prepare.json"
        mine = notes.exists() and f'"command": "{args.command}"' in notes.read_text()
    if (args.out / "manifest.jsonl").exists() and not mine:
        raise DataError(f"{args.out}: holds a manifest that is not of {args.command}; name another "
                        "--out")


def show_funnel(rows, funnel, published):
    """Count what is left, and print each (table, reason) by split beside the published counts.

    -> the same counts as {table: {reason: {split: n}}}."""
    for split in SPLITS:
        some = [row for row in rows if row["split"] == split]
        boxed = [row for row in some if row["regions"]]
        pairs = [region for row in some for region in row["regions"]]
        for name, n in (("images", len(some)), ("boxed images", len(boxed)),
                        ("studies", len({row["study"] for row in some})),
                        ("boxed studies", len({row["study"] for row in boxed})),
                        ("patients", len({row["patient"] for row in some})),
                        ("pairs", len(pairs)), ("boxes", sum(len(p["boxes"]) for p in pairs))):
            funnel["out", name, split] = n
    tables = {}
    for table, reason, _ in sorted(funnel, key=lambda key: ("images", "pairs", "boxes", "out")
                                   .index(key[0])):
        tables.setdefault(table, {})[reason] = {s: funnel[table, reason, s] for s in SPLITS}
    print(f"{'':26}{'train':>10}{'val':>10}{'test':>10}   published")
    for table, reasons in tables.items():
        for n, (reason, by_split) in enumerate(reasons.items()):
            print(f"{'' if n else table:8}{reason:18}"
                  + "".join(f"{count:10,}" for count in by_split.values())
                  + f"   {published.get(f'{table} {reason}', '')}".rstrip())
    return tables


def finish(rows, args, funnel, lost, published):
    """Print the funnel and what is lost; write prepare.json and then, whole, manifest.jsonl."""
    tables = show_funnel(rows, funnel, published)
    for loss in lost:
        print(f"lost: {loss}")
    if not rows:
        raise DataError(f"{args.out}: no image is left, see the counts above; nothing written")
    given = {name: str(value) for name, value in vars(args).items() if name != "prepare"}
    notes = {"command": args.command, "arguments": given, "lost": lost, "funnel": tables,
             "published": published}
    keys = ("image", "study", "patient", "split", "report", "regions")

    def write_manifest(draft):
        with open(draft, "w") as file:
            file.writelines(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows)
    write_json(args.out / "prepare.json", notes)
    write_whole(args.out / "manifest.jsonl", write_manifest)
    print(f"wrote {args.out / 'manifest.jsonl'}; next: python data.py check {args.out}")


# ---- converters: MIMIC-CXR ----------------------------------------------------------------------

METHODS = ("gpt4", "rule-based")
LLAVA_RAD = {"train": "chat_train_*.json", "val": "chat_dev_*.json", "test": "chat_test_*.json"}
RATINGS = {"A++": ("A_frontal", "App"), "A+": ("A_frontal", "Ap"), "A": ("A_frontal", None),
           "B": ("B_frontal", None)}           # export, and its table of those rated so or better
MIMIC_PATH = re.compile(r"(p\d+)/(s\d+)/([^/]+)\.jpg$")
MIMIC_PUBLISHED = {"images in": "400,042 + 3,238 + 2,461 (LLaVA-Rad)",
                   "out images": "237,972 + 1,959 + 3,403 before the quality filter (LLaVA-Rad)",
                   "out studies": "2,432 of test (LoFi)", "out boxed studies": "169,441 (LoFi)",
                   "out pairs": "394,835 (LoFi)"}


def mimic_table(images, kind, lost, loss, *columns):
    """Rows of a table of MIMIC-CXR-JPG, or none and a word on what is lost without it."""
    if not (Path(images) / "files").is_dir():
        raise DataError(f"{images}: has no folder 'files'; --images wants the root of "
                        "MIMIC-CXR-JPG (files/p10/p10000032/s50414267/ID.jpg)")
    if path := find(images, f"mimic-cxr-2*-{kind}.csv*"):
        return csv_rows(path, *columns)
    lost.append(f"{loss} (no mimic-cxr-2.0.0-{kind}.csv.gz in {images})")
    return []


def mimic_splits(images, lost, loss="the official splits"):
    """{dicom id: split}."""
    table = mimic_table(images, "split", lost, loss, "dicom_id", "split")
    return {dicom: official_split(split, images) for dicom, split in table}


def mimic_films(images, lost):
    """{dicom id: (view, (w, h))}; Columns and Rows, so that a tree of copies that were shrunk
    before serves as well: boxes are in pixels of the originals."""
    table = mimic_table(images, "metadata", lost, "the official views and film sizes, LLaVA-Rad's "
                        "and the files' are taken", "dicom_id", "ViewPosition", "Columns", "Rows")
    with reading(images):
        return {dicom: (sys.intern(view), (float(w), float(h)) if w and h else None)
                for dicom, view, w, h in table}


def good_masks(path):
    """Dicom ids of which CheXmask's table says that its masks, and so the film, are good."""
    with reading(path):
        return {dicom for dicom, dice in csv_rows(path, "dicom_id", "Dice RCA (Mean)")
                if dice and float(dice) >= 0.7}


def method_of(path, wanted, lost):
    """The wanted method, or the other where a file has none of it, as the test split of gpt4."""
    if any(entry.get("generate_method") == wanted for entry in json_items(path)):
        return wanted
    other = METHODS[wanted == METHODS[0]]
    lost.append(f"{wanted} texts of {path.name}, which has none: its {other} ones are taken")
    return other


def mimic_film(images, path, where):
    """A film of MIMIC-CXR-JPG by ".../p10000032/s50414267/ID.jpg" -> the beginning of its row."""
    if not (found := MIMIC_PATH.search(str(path))):
        raise DataError(f"{where}: image {path!r}, wanted .../p10000032/s50414267/ID.jpg")
    patient, study, dicom = found.groups()
    name = f"{patient[:3]}/{found[0]}"
    return {"study": study, "patient": patient, "dicom": dicom, "name": name, "regions": [],
            "report": "", "source": f"{images}/files/{name}"}


def mimic_report(entry):
    """Findings and impression of an entry of LLaVA-Rad (Sec. 3.0.1), either may be missing."""
    findings = [turn.get("value") for turn in (entry.get("conversations") or [])[1:2]]
    return " ".join(filter(None, map(one_line, [*findings, entry.get("impression")])))


def mimic_rows(path, default_split, args, tables, funnel, lost):
    """Yield a row for each frontal film of good quality in a file of LLaVA-Rad, with its text."""
    (splits, films, good), seen = tables, set()
    method = method_of(path, args.method, lost)
    for entry in tqdm(json_items(path), path.name, unit="item"):
        row = mimic_film(args.images, entry.get("image"), path)
        dicom = row["dicom"]
        view, row["scale"] = films.get(dicom, (entry.get("view"), None))
        row["split"], row["report"] = splits.get(dicom, default_split), mimic_report(entry)
        reason = ("other method" if entry.get("generate_method") != method else
                  "view" if view not in ("PA", "AP") else
                  "quality" if good is not None and dicom not in good else
                  "no text" if not row["report"] else
                  "repeated image" if dicom in seen else None)
        funnel["images", "in", row["split"]] += 1
        if reason:
            funnel["images", reason, row["split"]] += 1
        else:
            seen.add(dicom)
            yield row


def open_qba(root, rating):
    """Question files of MIMIC-Ext-CXR-QBA -> members, and {study: ids of the questions rated so or
    better}, None for all."""
    export, table = RATINGS[rating]
    folder = find(root, f"exports/{export}", export)
    path = folder and find(folder, "qa.zip", "qa")
    if not path:
        raise DataError(f"{root}: no exports/{export}/qa.zip; --qba wants the root of "
                        "MIMIC-Ext-CXR-QBA")
    if not table:
        return members(path, ".qa.json"), None
    rated = find(folder, f"metadata/{table}/question_metadata.csv*")
    if not rated:
        raise DataError(f"{folder}: no metadata/{table}/question_metadata.csv.gz, the questions "
                        f"that --rating {rating} keeps")
    questions = defaultdict(set)
    for study, question in csv_rows(rated, "study_id", "question_id"):
        questions["s" + study.removeprefix("s")].add(sys.intern(question))
    return members(path, ".qa.json"), questions


def walk(answers, depth=0):
    """Yield (answer, depth) of answers and, below them, their sub-answers."""
    for answer in answers or []:
        yield answer, depth
        yield from walk(answer.get("sub_answers"), depth + 1)


def study_regions(job):
    """Text-box pairs of a study. Which answers give one, beside their rating, is not stated in the
    paper: here the top-level, positive ones drawn from the report, each text once an image.

    job: (name, path or bytes of the questions, ids of those rated well or None for all, split,
    {dicom id: (w, h)}, IoU of the fusion). -> {dicom id: {phrase: region}}, funnel."""
    name, source, rated, split, scales, iou = job
    regions, funnel = {dicom: {} for dicom in scales}, Counter()
    try:
        text = source if isinstance(source, bytes) else Path(source).read_bytes()
        questions = json.loads(text).get("questions") or []
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: is no file of questions ({error}); is the download whole?")
    for question in questions:
        for answer, depth in walk(question.get("answers")):
            phrase = one_line(answer.get("text"))
            for dicom in scales.keys() & (answer.get("localization") or {}).keys():
                place = answer["localization"][dicom] or {}
                reason = ("rating" if not (rated is None or question.get("question_id") in rated)
                          else "sub-answer" if depth
                          else "not positive" if answer.get("positiveness", "pos") != "pos"
                          else "not in report" if not answer.get("from_report", True)
                          else "fallback box" if place.get("is_fallback")
                          else "repeated text" if phrase in regions[dicom] else None)
                funnel["pairs", "in", split] += 1
                if reason:
                    funnel["pairs", reason, split] += 1
                elif region := make_region(phrase, place.get("bboxes") or [], scales[dicom], split,
                                           funnel, iou):
                    regions[dicom][phrase] = region
    return regions, funnel


def add_qba(rows, files, rated, args, funnel, lost):
    """Give rows the text-box pairs of their studies."""
    (names, take), studies = files, defaultdict(list)
    for row in rows:
        studies[row["study"]].append(row)
    found = [study for study in studies if f"{study}.qa.json" in names]
    if len(found) < len(studies):
        lost.append(f"text-box pairs of {len(studies) - len(found):,} studies that have no "
                    "questions")
    jobs = ((study, take(names[f"{study}.qa.json"]), rated and rated.get(study, ()),
             studies[study][0]["split"], {row["dicom"]: row["scale"] for row in studies[study]},
             args.wbf_iou) for study in found)
    results = tqdm(parallel(study_regions, jobs, args.workers), "boxes", len(found), unit="study")
    for (regions, counts), study in zip(results, found):
        funnel.update(counts)
        for row in studies[study]:
            row["regions"] = list(regions[row["dicom"]].values())


def prepare_mimic_cxr(args):
    """MIMIC-CXR-JPG, LLaVA-Rad, CheXmask and MIMIC-Ext-CXR-QBA -> a manifest (Sec. 3.0.1)."""
    funnel, lost, rows = Counter(), [], []
    texts = {split: find(args.llava_rad, pattern) for split, pattern in LLAVA_RAD.items()}
    for split, path in texts.items():                          # wrong folders are said at once
        if not path:
            raise DataError(f"{args.llava_rad}: no {LLAVA_RAD[split]}; --llava-rad wants the "
                            "folder of the LLaVA-Rad MIMIC-CXR annotations")
    qba = open_qba(args.qba, args.rating) if args.qba else None
    tables = (mimic_splits(args.images, lost), mimic_films(args.images, lost),
              good_masks(args.chexmask) if args.chexmask else None)
    for split, path in texts.items():
        rows += mimic_rows(path, split, args, tables, funnel, lost)
    rows = prepare_images(rows, args, funnel)
    if qba:
        add_qba(rows, *qba, args, funnel, lost)
    lost += [] if args.chexmask else ["the quality filter of films (no --chexmask)"]
    lost += [] if qba else ["text-box pairs, so grounding and dense captioning (no --qba)"]
    finish(rows, args, funnel, lost, MIMIC_PUBLISHED)


# ---- converters: PadChest-GR and MS-CXR ---------------------------------------------------------

PADCHEST_PUBLISHED = {"images in": "4,555", "out boxed images": "2,404 of the pool, 604 of test "
                      "(LoFi)", "out pairs": "4,979 of the pool, 2,404 of test (LoFi)"}
MS_CXR_PUBLISHED = {"boxes in": "1,448", "out images": "1,047", "out pairs": "1,162"}


def padchest_splits(args, lost):
    """{ImageID: (split, patient)}. The paper's pool is train + validation: both are "train" here,
    unless --official-val."""
    if not args.table:
        lost.append("splits and patients, all rows are of train (no --table)")
        return {}
    table = csv_rows(args.table, "ImageID", "split", "PatientID")
    split = lambda value: official_split(value, args.table)
    pool = {"train": "train", "val": "val" if args.official_val else "train", "test": "test"}
    return {image: (pool[split(value)], patient) for image, value, patient in table}


def padchest_rows(args, names, splits, funnel):
    """Yield a row a study of the grounded reports: all its sentences, and the boxed as pairs."""
    for entry in tqdm(json_items(args.reports), Path(args.reports).name, unit="item"):
        image = str(entry.get("ImageID"))
        study = str(entry.get("StudyID") or image)
        split, patient = splits.get(image, ("train", study))
        pairs = [(one_line(f.get("sentence_en")), f.get("boxes") or [])
                 for f in entry.get("findings") or []]
        sentences = [s if s[-1] in ".!?" else s + "." for s, _ in pairs if s]
        reason = ("not in table" if splits and image not in splits else
                  "no text" if not sentences else "no image" if image not in names else None)
        funnel["images", "in", split] += 1
        if reason:
            funnel["images", reason, split] += 1
        else:
            yield {"study": study, "patient": patient or study, "split": split,
                   "report": " ".join(sentences), "pairs": pairs, "scale": (1, 1),
                   "name": f"{Path(image).stem}.jpg", "source": names[image]}


def ms_cxr_rows(args, splits, funnel):
    """Rows of MS-CXR, an image each; its table has a line a box, in x, y, width and height."""
    rows, boxes_of = {}, defaultdict(list)
    columns = ("path", "category_name", "label_text", "image_width", "image_height", "x", "y", "w",
               "h")
    for path, kind, text, width, height, *box_xywh, split in csv_rows(args.table, *columns,
                                                                      optional=["split"]):
        film = mimic_film(args.images, path, args.table)
        split = split or splits.get(film["dicom"], "test")
        with reading(args.table):
            x, y, w, h, width, height = map(float, (*box_xywh, width, height))
        rows.setdefault(path, {**film, "split": official_split(split, args.table),
                               "scale": (width, height)})
        boxes_of[path, kind, one_line(text)].append([x, y, x + w, y + h])
    for row in rows.values():
        row["pairs"] = []
        funnel["images", "in", row["split"]] += 1
    for (path, _, phrase), boxes in boxes_of.items():
        rows[path]["pairs"].append((phrase, boxes))
    return list(rows.values())


def add_regions(rows, funnel):
    """Turn the pairs of rows, (phrase, boxes in units of scale), into regions."""
    for row in rows:
        funnel["pairs", "in", row["split"]] += len(row["pairs"])
        regions = [make_region(phrase, boxes, row["scale"], row["split"], funnel)
                   for phrase, boxes in row["pairs"]]
        row["regions"] = [region for region in regions if region]


def prepare_padchest_gr(args):
    """PadChest-GR -> a manifest (Sec. 3.0.1)."""
    funnel, lost = Counter(), []
    names, take = members(args.images, ".png")
    if not args.size and not Path(args.images).is_dir():
        raise DataError(f"{args.images}: --size 0 keeps the originals, which cannot stay inside a "
                        "zip; unzip it and give the folder, or give a --size")
    rows = list(padchest_rows(args, names, padchest_splits(args, lost), funnel))
    rows = prepare_images(rows, args, funnel, take)
    add_regions(rows, funnel)
    finish(rows, args, funnel, lost, PADCHEST_PUBLISHED)


def prepare_ms_cxr(args):
    """MS-CXR -> a manifest: phrases and boxes, no reports."""
    funnel, lost = Counter(), []
    splits = mimic_splits(args.images, lost, "splits, all rows without one are of test")
    rows = prepare_images(ms_cxr_rows(args, splits, funnel), args, funnel)
    add_regions(rows, funnel)
    finish(rows, args, funnel, lost, MS_CXR_PUBLISHED)


# ---- check ---------------------------------------------------------------------------------------

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
    if not rows and not problems:
        raise DataError(f"{path}: no rows")
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
        films = []
        for row in boxed[::max(1, len(boxed) // 8)][:8]:
            films.append(load_image(row["path"], 320).convert("RGB"))
            draw_boxes(films[-1], row["regions"])
        write_whole(png, lambda draft: tile(films, 4).save(draft, "PNG"))
        print(f"drew {png}: look whether the boxes sit where the phrases say")
    print(f"{problems} problems in {len(rows) + problems} rows")
    return problems


# ---- command line --------------------------------------------------------------------------------

def add_converter(commands, name, prepare, words):
    """A converter's command with the flags they share. -> its groups of sources and choices."""
    command = commands.add_parser(name, help=f"{words} -> a manifest", description=f"{words} -> a "
                                  "manifest. The archives are read where they are; the README "
                                  "says where to apply for them.")
    command.set_defaults(prepare=prepare)
    groups = [command.add_argument_group(title) for title in ("sources", "choices", "output")]
    group = groups.pop()
    group.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for "
                       "manifest.jsonl, prepare.json (the counts) and the films; given again after "
                       "an interruption, it goes on where it was")
    group.add_argument("--size", type=int, default=512, metavar="PX", help="short side of the "
                       "films written, 8-bit JPEG, proportions kept, none enlarged; 0 "
                       "keeps the originals where they are and writes none (default: 512, the "
                       "encoder's input, Sec. 2.0.4)")
    group.add_argument("--workers", type=int, default=min(8, os.cpu_count()), metavar="N",
                       help="processes that decode and parse (default: the CPUs, at most 8)")
    return groups


def add_converters(commands):
    """The commands mimic-cxr, padchest-gr and ms-cxr."""
    mimic_root = "root of MIMIC-CXR-JPG: files/, and if there the split and metadata csv.gz"
    sources, choices = add_converter(
        commands, "mimic-cxr", prepare_mimic_cxr,
        "films of MIMIC-CXR-JPG, texts of LLaVA-Rad, boxes of MIMIC-Ext-CXR-QBA")
    sources.add_argument("--images", required=True, metavar="DIR", help=mimic_root)
    sources.add_argument("--llava-rad", required=True, metavar="DIR", help="folder of the "
                         "LLaVA-Rad annotations: chat_{train,dev,test}_*.json")
    sources.add_argument("--qba", metavar="DIR", help="root of MIMIC-Ext-CXR-QBA, with "
                         "exports/A_frontal (default: none, so no boxes)")
    sources.add_argument("--chexmask", metavar="FILE", help="CheXmask's MIMIC-CXR-JPG.csv, or .gz: "
                         "films with Dice RCA (Mean) below 0.7 are dropped (default: none, so all "
                         "are kept)")
    choices.add_argument("--method", choices=METHODS, default=METHODS[0], help="which texts of "
                         "LLaVA-Rad; where a file has none of them, the others are taken and it is "
                         "said (default: %(default)s, an LLM's, Sec. 3.0.1)")
    choices.add_argument("--rating", choices=RATINGS, default="A++", help="least rating of a "
                         "text-box pair's question (default: %(default)s, Sec. 3.0.1)")
    choices.add_argument("--wbf-iou", type=float, default=0.1, metavar="IOU", help="boxes of a "
                         "sentence that overlap more are fused into their mean, 0 to 1 (default: "
                         "%(default)s, of the authors' later code; not stated in the paper)")
    sources, choices = add_converter(commands, "padchest-gr", prepare_padchest_gr,
                                     "films, sentences and boxes of PadChest-GR")
    sources.add_argument("--images", required=True, metavar="DIR_OR_ZIP",
                         help="the 16-bit PNGs, in a folder (of any depth) or a zip")
    sources.add_argument("--reports", required=True, metavar="JSON",
                         help="grounded_reports_20240819.json")
    sources.add_argument("--table", metavar="CSV", help="master_table.csv, or .csv.zip: splits and "
                         "patients (default: none, so all rows are of train)")
    choices.add_argument("--official-val", action="store_true", help="keep the validation split "
                         "as val (default: it is of train, as the paper's pool of 2,404 X-rays "
                         "is train and validation, Sec. 3.0.1)")
    sources, _ = add_converter(commands, "ms-cxr", prepare_ms_cxr,
                               "films of MIMIC-CXR-JPG, phrases and boxes of MS-CXR")
    sources.add_argument("--images", required=True, metavar="DIR", help=mimic_root)
    sources.add_argument("--table", required=True, metavar="CSV", help="MS_CXR_Local_Alignment_"
                         "v*.csv; rows without a split there have MIMIC's")


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
    add_converters(commands)
    command = commands.add_parser(
        "check", help="read every row and image, count, draw eight rows with boxes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("data", help="folder with manifest.jsonl, or that file")
    command.add_argument("--png", default="runs/check.png", help="where to draw")
    args = parser.parse_args()
    if args.command == "check":
        sys.exit(1 if check(args.data, args.png) else 0)
    if hasattr(args, "prepare"):
        check_converter(args)
        return args.prepare(args)
    if Path(args.out).exists():
        raise DataError(f"{args.out}: exists already; name a new folder")
    make_phantom(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"wrote {args.out}; next: python data.py check {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; the same command goes on where it was")
