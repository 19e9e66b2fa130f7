"""Data of LoFi (Sec. 2.0.1 and 2.0.4): manifest, prompts, training samples and batches.

    python data.py phantom OUT        # draw chest X-rays with findings, reports and boxes
    python data.py covid-cxr --help   # convert a data set; also mimic-cxr, padchest-gr and ms-cxr
    python data.py check DIR          # read every row and image, count, draw a few with their boxes

A data set is a folder with `manifest.jsonl`, one image a line; `report`, `regions` and `labels`
(findings that are there, for retrieve.py --categories) may each be missing:

    {"image": "images/0001.png", "study": "s1", "patient": "p1", "split": "train",
     "report": "The heart is enlarged. ...", "labels": ["cardiomegaly"],
     "regions": [{"phrase": "The heart is enlarged.", "boxes": [[0.38, 0.51, 0.78, 0.84]]}]}

Boxes are (x0, y0, x1, y1), fractions of the width and height of the upright image. The image is
stretched to the encoder's square, so a box is the same fraction of the model's input.

In each training step the row above gives its image, a text for Eq. 1 and one of three tasks:

    text  for E_T         sentences of the report
    "c"   captioning      "Report this medical scan."                -> "The heart is enlarged. ..."
    "g"   grounding       "Detect all instances of: The heart ..."   -> "380 510 780 840"
    "d"   dense captions  "Describe the regions: 380 510 780 840"    -> "The heart is enlarged."

Below: manifest, boxes, tasks, sentences, images, samples and batches. The method ends there; then
pictures, checks, the phantom, the converters, files and errors (for all scripts), the command.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import io
import itertools
import json
import math
import os
import re
import string
import sys
import tempfile
import textwrap
import uuid
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# torch and transformers, which take seconds to import, are imported in the three functions that
# need them: the commands of this file and the processes that draw the phantom do without.

# ---- the manifest: one image a row ---------------------------------------------------------------

SPLITS = ("train", "val", "test")


def manifest_path(data):
    """The manifest of a folder, or the file itself. Raises InputError if there is none."""
    path = Path(data) / "manifest.jsonl" if Path(data).is_dir() else Path(data)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a folder with manifest.jsonl, or that "
                         "file (python data.py phantom OUT makes one)")
    return path


def read_manifest(data, split=None):
    """The rows of a manifest (of one split), each checked, plus "path": the image's full path.

    White space is collapsed; equal phrases of an image become one region; boxes of almost no area
    are dropped. Raises InputError with file and line for an invalid row."""
    path, rows = manifest_path(data), []
    for number, row, problem in scan_manifest(data):
        if problem:
            raise InputError(f"{path}:{number}: {problem}")
        if split in (None, row["split"]):
            boxes = defaultdict(list)                          # phrase -> its boxes, each once
            for region in row.get("regions") or []:
                found = boxes[one_line(region["phrase"])]
                for box in drop_degenerate(region["boxes"]):
                    if box not in found:
                        found.append(box)
            rows.append({**row, "report": one_line(row.get("report")),
                         "regions": [{"phrase": phrase, "boxes": found}
                                     for phrase, found in boxes.items()],
                         "path": str(path.parent / row["image"])})
    if not rows:
        raise InputError(f"{path}: no rows" + (f" with split {split!r}" if split else ""))
    return rows


def one_line(text):
    """Text with its white space collapsed; "" for anything else (None, NaN)."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def study_of(row):
    """What identifies a study: some data sets number the studies of each patient from 1."""
    return row["patient"], row["study"]


# ---- boxes, and boxes as text: integers in [0, 1000], x first, in a fixed order (Sec. 2.0.4) -----

def box_problem(box):
    """An error message for an invalid box, expected [x0, y0, x1, y1] in fractions; else None."""
    if not (isinstance(box, list) and len(box) == 4
            and all(isinstance(v, (int, float, np.number)) and not isinstance(v, bool)
                    and abs(v) < np.inf for v in box)):        # NaN compares as False
        return "is not a list of 4 numbers, or has one that is not finite"
    if max(box) > 2:
        return ("is not in fractions of the image: divide pixels by its width and height, percent "
                "by 100, thousandths by 1000")
    if box[2] <= box[0] or box[3] <= box[1]:
        return "has x1 <= x0 or y1 <= y0: corners are expected, not x, y, width, height"
    if min(box) < -1e-6 or max(box) > 1 + 1e-6:
        return "leaves the image: clip it to [0, 1]"


def drop_degenerate(boxes):
    """Remove boxes narrower or lower than a millionth of the image, whose area is 0."""
    return [box for box in boxes if box[2] - box[0] >= 1e-6 and box[3] - box[1] >= 1e-6]


def box_iou(a, b, generalized=False):
    """IoU = intersection / union. (N, 4), (M, 4) -> (N, M), in [0, 1].
    generalized: GIoU = IoU - (hull - union) / hull, in (-1, 1], with the enclosing box as hull
    (Rezatofighi et al. 2019). (0, 0, .2, .2), (.4, 0, .6, .2): 0 - (.12 - .08) / .12 = -1/3."""
    a, b = np.asarray(a, float).reshape(len(a), 1, 4), np.asarray(b, float).reshape(1, len(b), 4)
    for box in (a, b):                                         # checked where a file is read
        assert (box[..., :2] < box[..., 2:]).all(), f"expected x0 < x1 and y0 < y1, got {box}"
    low, high = np.minimum(a, b), np.maximum(a, b)                                 # (N, M, 4)
    inter = (low[..., 2:] - high[..., :2]).clip(0).prod(-1)                        # (N, M)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)) - inter
    hull = (high[..., 2:] - low[..., :2]).prod(-1)
    iou = inter / union
    return iou - (hull - union) / hull if generalized else iou


CUT = "…"                                       # ends an answer that ran out of tokens
BOX_PATTERN = re.compile(r"\d{1,4} \d{1,4} \d{1,4} \d{1,4}", re.ASCII)
HALF_A_BOX = re.compile(r"(\d{1,4} ?){0,3}", re.ASCII)


def boxes_to_text(boxes):
    """[(x0, y0, x1, y1), ...], fractions -> "380 510 780 840; ...", left to right."""
    rounded = []
    for x0, y0, x1, y1 in boxes:
        x0, y0 = (min(999, round(1000 * v)) for v in (x0, y0))
        x1, y1 = max(x0 + 1, round(1000 * x1)), max(y0 + 1, round(1000 * y1))  # never empty
        rounded.append((x0, y0, x1, y1))
    # A fixed order, left to right: the decoder need not guess which of several boxes comes first.
    return "; ".join(" ".join(map(str, box)) for box in sorted(rounded))


def text_to_boxes(text):
    """The inverse of boxes_to_text -> (boxes, malformed). Of text that was cut off, the complete
    boxes before its end count; other text that is not exactly box text gives ([], True)."""
    parts = text.strip().split("; ")
    if text.endswith(CUT) or len(parts) > 1 and HALF_A_BOX.fullmatch(parts[-1]):
        parts.pop()
    if not parts or not all(BOX_PATTERN.fullmatch(part) for part in parts):
        return [], True
    boxes = [[int(v) / 1000 for v in part.split()] for part in parts]
    if not all(x0 < x1 <= 1 and y0 < y1 <= 1 for x0, y0, x1, y1 in boxes):
        return [], True
    return boxes, False


# ---- prompts (Eq. 2, 3, L_d) and the draw of a task ----------------------------------------------

# The paper prints only the beginning of the last two prompts; their endings are not stated in it.
CAPTIONING_PROMPT = "Report this medical scan."             # P_c
GROUNDING_PROMPT = "Detect all instances of: {phrase}"      # P_g
DENSE_CAPTIONING_PROMPT = "Describe the regions: {boxes}"   # P_d

TASKS = "cgd"                # tau of L_t: captioning, grounding, dense captioning
# L_c and L_g,d "contribute equally" (Sec. 2.0.1): captioning is drawn half of the time, the others
# a quarter each. (With several regions of an image in a step, as in the miniature, g and d have
# more rows, and so more weight.)
TASK_WEIGHT = dict(zip(TASKS, (2, 1, 1)))


def possible_tasks(report, regions, objectives=TASKS):
    """The tasks that an image can serve: c needs a report, g and d need a region with boxes."""
    has_boxes = any(region["boxes"] for region in regions)
    return [task for task in TASKS
            if task in objectives and (report if task == "c" else has_boxes)]


def sample_tasks(report, regions, objectives, n_regions, rng):
    """Draw one task tau for an image -> its rows (task, prompt, target), sequences of the LLM: one
    for the report, or up to n_regions that share the vision pass; [] if it can serve no task."""
    if not (tasks := possible_tasks(report, regions, objectives)):
        return []
    regions = [region for region in regions if region["boxes"]]
    # Where a task is impossible or not among the objectives, the others share its weight.
    weight = np.array([TASK_WEIGHT[task] for task in tasks], float)
    task = tasks[rng.choice(len(tasks), p=weight / weight.sum())]
    if task == "c":
        return [("c", CAPTIONING_PROMPT, report)]                              # Eq. 2
    rows = []
    for i in rng.permutation(len(regions))[:n_regions]:
        phrase, boxes = regions[i]["phrase"], boxes_to_text(regions[i]["boxes"])
        if task == "g":
            rows.append(("g", GROUNDING_PROMPT.format(phrase=phrase), boxes))  # Eq. 3
        else:                                                                  # L_d: Eq. 3 swapped
            rows.append(("d", DENSE_CAPTIONING_PROMPT.format(boxes=boxes), phrase))
    return rows


# ---- sentences of a report -----------------------------------------------------------------------

# A stop, quotes or brackets, then white space or a capital; stops of other scripts stand alone.
STOP = re.compile(r"""[.!?]+[)\]"'”’»]*\s+|(?<=[^\W\d_A-Z]{2})\.(?=[A-ZÀ-ÞА-Я\0])
    |[;；]\s*(?=\0)|[。．｡！？।۔]+[)\]"'”’」』）]*\s*""", re.VERBOSE)
LIST_NUMBER = re.compile(r"""(?:^|(?<=[.!?:;]\s)|(?<=[^\W\d_]{2}\.)|(?<=[。．｡；：]))
    \(?(?:\d{1,2}|[IVX]{2,4})[.)、](?:\s+|(?!\d))(?=[\w("“])""", re.VERBOSE)
ABBREVIATION = re.compile(r"""\b(?:(?i:drs?|prof|mrs?|ms|sra?|dra|st|jr|vs|cf|aprox|approx|[rl]t
    |e\.g|i\.e|p\.?\s?ej|[vz](?:\.\s?[abn])?)\.\s+.|(?<!\.)[A-Z]\.\s+[^\W\d]  # an initial
    |(?i:nos?|figs?|ca|img?|ser|th?|jan|feb|mar|apr|aug|sept?|oct|nov|dec)\.\s+\d)$""", re.VERBOSE)


@functools.lru_cache(maxsize=100_000)
def split_sentences(report):
    """Sentences of a report, without list numbers.

    A sentence ends at . ! or ? before white space and anything but a lower-case letter, unless it
    is an abbreviation or an initial. Where few sentences begin with a capital, each stop counts."""
    def abbreviated(text, i):                                  # does text[i] follow one?
        return ABBREVIATION.search(text[max(0, i - 12):i + 1])
    text = LIST_NUMBER.sub(lambda number: number[0] if abbreviated(number.string, number.start())
                           else "\0", report.strip())          # a sentence may begin at "\0"
    ends = (stop.end() for stop in STOP.finditer(text))
    starts = [0] + [i for i in ends if i < len(text) and not abbreviated(text, i)]
    n_capitals = sum(text[i:i + 2].istitle() for i in starts)  # The, A; not PICC
    if n_capitals and n_capitals >= sum(text[i].islower() for i in starts):
        starts = [i for i in starts if i == 0 or not text[i].islower()]
    sentences = [text[i:j].replace("\0", "").strip() for i, j in zip(starts, [*starts[1:], None])]
    return [sentence for sentence in sentences if re.search(r"\w", sentence)]


def sample_sentences(sentences, rng, low=4, high=8):
    """4 to 8 random sentences of a report (Sec. 2.0.4), in their order (not stated in the paper);
    fewer if it has fewer."""
    n = min(len(sentences), rng.integers(low, high + 1))
    return [sentences[i] for i in sorted(rng.choice(len(sentences), n, replace=False))]


def sub_reports(report, length=5):
    """A report in pieces of five sentences, the last one shorter (Sec. 3.1)."""
    sentences = split_sentences(report)
    return [" ".join(sentences[i:i + length]) for i in range(0, len(sentences), length)]


def sub_report_table(rows):
    """Table 1's images and texts: of each study the first image with a report (not stated in the
    paper), and its sub-reports.
    -> images: indices into rows; texts; owner: (texts,) the index in images of each text's image"""
    first_of_study = {}
    for i, row in enumerate(rows):
        if row["report"]:
            first_of_study.setdefault(study_of(row), i)
    images = list(first_of_study.values())
    pairs = [(n, text) for n, i in enumerate(images) for text in sub_reports(rows[i]["report"])]
    return images, [text for _, text in pairs], np.array([n for n, _ in pairs], int)


# ---- images: any mode to 8-bit grey, and augmentation --------------------------------------------

@contextlib.contextmanager
def open_image(source):
    """Open a file (a path, or a zipfile.Path) as a PIL image that is not yet decoded."""
    # By a file handle: Pillow reads some TIFF files with an orientation wrongly by their path.
    with (source.open("rb") if hasattr(source, "open") else open(source, "rb")) as file:
        with Image.open(file) as image:
            yield image


def image_shape(path):
    """(width, height) of an image file as it is seen upright; only its header is read."""
    with open_image(path) as image:
        # orientations 5 to 8 are a quarter turn; of TIFF files Pillow gives the upright size
        is_turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if is_turned else image.size


def window_levels(values):
    """(h, w) numbers -> (h, w) uint8: percentiles 0.5 to 99.5 become 0 and 255."""
    values = np.nan_to_num(np.asarray(values, np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def load_image(source, size=None):
    """Read an image of any mode as upright 8-bit grey (PIL "L"), stretched to a square of `size`.

    source: path, PIL image, or (h, w) or (h, w, 3) uint8 array. 16-bit, 32-bit and float images,
    and 8-bit ones that use less than a quarter of the range, are windowed; transparency is black.
    Raises InputError."""
    try:
        if isinstance(source, np.ndarray) and source.dtype == np.uint8:
            image = to_grey(Image.fromarray(source), size)
        elif isinstance(source, Image.Image):
            image = to_grey(source.copy(), size)
        elif isinstance(source, (str, os.PathLike, zipfile.Path)):
            with open_image(source) as opened:
                image = to_grey(opened, size)
        else:
            raise TypeError("expected a path, a PIL image or a uint8 array")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        is_file = isinstance(source, (str, os.PathLike, zipfile.Path))
        name = source if is_file else f"{type(source).__name__} {getattr(source, 'dtype', '')}"
        hint = ("; if it is a DICOM file, convert it to PNG first"
                if isinstance(error, UnidentifiedImageError) else "")
        raise InputError(f"{name}: cannot be read as an image ({first_line(error)}){hint}")
    return image.resize((size, size), Image.Resampling.BILINEAR) if size else image


def to_grey(image, size=None):
    """An opened image -> PIL "L", upright. size: JPEG files are decoded not much larger."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":    # MPO: a phone's JPEG
        raise ValueError(f"it has {image.n_frames} frames; save the one to use as a PNG")
    if size and image.format == "JPEG":
        image.draft("L", (size, size))                         # decode at 1/2, 1/4 or 1/8
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(window_levels(image))
    elif image.has_transparency_data:
        black = Image.new("RGBA", image.size, "black")
        image = Image.alpha_composite(black, image.convert("RGBA"))
    image = image.convert("L")
    low, high = image.getextrema()
    return Image.fromarray(window_levels(image)) if 0 < high - low < 64 else image


def augment(image, regions, size, strength, rng):
    """Randomly crop or pad an image and change its contrast; move its boxes along.

    Not stated in the paper. image: PIL "L" of any size. -> ((size, size) uint8, regions). There is
    no flip, which would swap left and right. Regions with a box that loses a third are dropped."""
    def vary(low, high, n=None):
        return strength * rng.uniform(low, high, n)
    # The window (x, y, w, h) in fractions of the image; where it is larger, black is padded.
    w, h = (1 + vary(-0.25, 0.25)) * (1 + vary(-0.07, 0.07, 2))
    x, y = rng.uniform(min(0, 1 - w), max(0, 1 - w)), rng.uniform(min(0, 1 - h), max(0, 1 - h))
    window = np.array([x, y, x + w, y + h]) * np.array(image.size * 2)
    image = image.transform((size, size), Image.Transform.EXTENT, window, Image.Resampling.BILINEAR)
    # Contrast and brightness as a table of the 256 grey levels.
    levels = (np.arange(256) - 128) * (1 + vary(-0.25, 0.3)) + 128 + vary(-25, 25)
    pixels = levels.clip(0, 255).astype(np.uint8)[np.asarray(image)]           # (size, size)
    kept = []
    for region in regions:
        boxes = (np.array(region["boxes"]).reshape(-1, 4) - [x, y, x, y]) / [w, h, w, h]
        inside = boxes.clip(0, 1)                                              # (N, 4)
        area, left = (np.prod(b[:, 2:] - b[:, :2], axis=1) for b in (boxes, inside))
        if (left > area * 2 / 3).all():
            kept.append({**region, "boxes": inside.tolist()})
    return pixels, kept


# ---- tokens, samples and batches -----------------------------------------------------------------

@functools.lru_cache(maxsize=100_000)
def plain_ids(tokenizer, text):
    """Token ids of a text, nothing added; "<eos>" written in a report stays plain text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def text_ids(tokenizer, texts, length):
    """Texts -> (B, length) ids for the text encoder, as SigLIP 2 expects them: lower case, no
    <bos>, <eos> kept when cut, padded on the right, no mask (it pools at the last position)."""
    import torch
    ids = torch.full((len(texts), length), tokenizer.pad_token_id)
    for row, text in zip(ids, texts):
        tokens = plain_ids(tokenizer, siglip_text(tokenizer, text))[:length - 1]
        tokens = tokens + [tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def siglip_text(tokenizer, text):
    """Lower case and, for SigLIP 1 (MedSigLIP), no punctuation, as its own tokenizer has it."""
    if tokenizer.init_kwargs.get("drops_punctuation"):         # model.load_tokenizer sets it
        text = one_line(text.translate(str.maketrans("", "", string.punctuation)))
    return text.lower()


def prompt_ids(tokenizer, prompt, most=256):
    """Token ids of a prompt and a line break before the target (not stated in the paper); a prompt
    of over 256 tokens is cut, and a line says so once."""
    ids = plain_ids(tokenizer, prompt + "\n")
    if len(ids) > most:
        say_once(f"note: a prompt of over {most} tokens is cut to {most}", file=sys.stderr)
        ids = ids[:most - 1] + plain_ids(tokenizer, "\n")
    return ids


say_once = functools.cache(print)               # the same line only once per process


@functools.lru_cache(maxsize=100_000)
def target_ids(tokenizer, target, most):
    """Token ids of a target and <eos>, at most `most` (not stated in the paper): one that is too
    long ends after its last whole box or sentence, or, if that is its first, within it."""
    ids, is_boxes = plain_ids(tokenizer, target), BOX_PATTERN.match(target)
    parts, glue = (target.split("; "), "; ") if is_boxes else (split_sentences(target), " ")
    while len(ids) >= most and len(parts) > 1:
        parts = parts[:-1]
        ids = plain_ids(tokenizer, glue.join(parts))
    return ids[:most - 1] + [tokenizer.eos_token_id]


def count_cut_targets(tokenizer, rows, most):
    """How many reports, phrases and box texts of manifest rows target_ids cuts, of how many."""
    targets = [row["report"] for row in rows if row["report"]] + [
        text for row in rows for region in row["regions"] if region["boxes"]
        for text in (region["phrase"], boxes_to_text(region["boxes"]))]
    n_cut = sum(len(target.encode()) >= most and len(plain_ids(tokenizer, target)) >= most
                for target in targets)                         # a token has one byte or more
    return n_cut, len(targets)


class ChestXrays:
    """Training samples of manifest rows: a map-style dataset for torch.utils.data.DataLoader.

    Indexed by (epoch, i), which alone fixes the random draws. A sample: {"image": (size, size)
    uint8, "text": str, "tasks": [(task, prompt, target), ...]}. objectives: letters of "scgd";
    n_regions: at most, per image and step; augmented: strength; cached: keep decoded images in
    memory. Raises InputError for an unreadable image."""

    def __init__(self, rows, size, objectives="scgd", n_regions=1, augmented=0.0, cached=False,
                 seed=0):
        self.rows, self.size, self.objectives, self.n_regions = rows, size, objectives, n_regions
        self.augmented, self.cached, self.cache, self.seed = augmented, cached, {}, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, i = key
        row, rng = self.rows[i], np.random.default_rng([self.seed, epoch, i])
        regions, image = row["regions"], self.cache.get(i)
        # twice the size, if it is cropped
        image = image or load_image(row["path"], self.size * (2 if self.augmented else 1))
        if self.cached:
            self.cache[i] = image
        if self.augmented:
            image, regions = augment(image, regions, self.size, self.augmented, rng)
        # T of Eq. 1: sentences of the report; where there is none, the phrases stand in for it
        # (not stated in the paper).
        sentences = split_sentences(row["report"]) or [r["phrase"] for r in row["regions"]]
        return {"image": np.array(image),                                      # (S, S) uint8
                "text": " ".join(sample_sentences(sentences, rng)),
                "tasks": sample_tasks(row["report"], regions, self.objectives, self.n_regions, rng)}


class Collate:
    """Samples -> a batch of tensors. B images, R rows of the LLM, L tokens of the longest row.

    image (B, S, S) uint8; text (B, T) ids, if there is a text tokenizer; ids (R, L): prompt,
    target, <eos>, padding; is_target (R, L): target and <eos>; image_of_row (R,): index in image;
    task_of_row (R,): index in TASKS."""

    def __init__(self, text_tokenizer, text_length, llm_tokenizer, max_target):
        self.text_tokenizer, self.text_length = text_tokenizer, text_length
        self.llm_tokenizer, self.max_target = llm_tokenizer, max_target

    def __call__(self, samples):
        import torch
        rows, llm = [], self.llm_tokenizer
        for i, sample in enumerate(samples):
            for task, prompt, target in sample["tasks"]:
                prompt, target = prompt_ids(llm, prompt), target_ids(llm, target, self.max_target)
                rows.append((i, TASKS.index(task), prompt + target, len(prompt)))
        length = max((len(tokens) for _, _, tokens, _ in rows), default=0)
        ids = torch.full((len(rows), length), llm.pad_token_id)                        # (R, L)
        is_target = torch.zeros_like(ids, dtype=torch.bool)                            # (R, L)
        for n, (_, _, tokens, n_prompt) in enumerate(rows):
            ids[n, :len(tokens)] = torch.tensor(tokens)
            is_target[n, n_prompt:len(tokens)] = True
        batch = {"image": torch.from_numpy(np.stack([s["image"] for s in samples])),   # (B, S, S)
                 "ids": ids, "is_target": is_target,
                 "image_of_row": torch.tensor([i for i, *_ in rows], dtype=torch.long),
                 "task_of_row": torch.tensor([task for _, task, *_ in rows], dtype=torch.long)}
        if self.text_tokenizer:
            batch["text"] = text_ids(self.text_tokenizer, [s["text"] for s in samples],
                                     self.text_length)                                 # (B, T)
        return batch


# ==================================================================================================
# The method ends here. Below: pictures, checks, phantom, converters, errors and files, commands.
# ==================================================================================================


# ---- shared by the scripts: a tokenizer, pictures, work in parallel ------------------------------

def learn_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer learned from texts, for towers trained from scratch."""
    from transformers import GPT2Tokenizer
    base = GPT2Tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>")
    # No digits: a coordinate then has one token per digit, as in Gemma's tokenizer. Lower case
    # too: the text encoder reads nothing else.
    texts = [re.sub(r"\d", " ", text) for text in texts]
    texts += [text.lower() for text in texts]
    return base.train_new_from_iterator(texts, vocab_size, show_progress=False)


def tokenizer_texts(rows):
    """The texts to learn a tokenizer from: the prompts, and the rows' reports and phrases."""
    prompts = [CAPTIONING_PROMPT, GROUNDING_PROMPT, DENSE_CAPTIONING_PROMPT] * 100
    return prompts + [r["report"] for r in rows] + [g["phrase"] for r in rows for g in r["regions"]]


@functools.cache
def font(size, text=""):
    """A font of the system with accents, or with the characters of Chinese, Japanese and Korean
    text; Pillow's own where there is none."""
    wide = ["NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "msyh.ttc", "PingFang.ttc"]
    is_wide = max(text, default="") > "\u2e80"
    for name in (wide if is_wide else []) + ["DejaVuSans.ttf", "Arial.ttf"]:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


COLOURS = ("#ffd21f", "#ff7ab8", "#7fb8ff", "#ffa14a", "#b6f06a", "#c99cff")


def draw_boxes(image, regions):
    """Draw boxes on an image (PIL "RGB"), in place, and list their phrases in the same colours; of
    regions with "dashed" the boxes are dashed."""
    pen = ImageDraw.Draw(image)
    coloured = list(zip([r for r in regions if r["boxes"]], itertools.cycle(COLOURS)))
    for n, (region, colour) in enumerate(coloured):
        phrase = textwrap.shorten(region["phrase"], 44, placeholder=" ...")
        pen.text((5, 3 + 16 * n), phrase, colour, font(13, phrase), stroke_width=2,
                 stroke_fill="black")
    for region, colour in coloured:
        for box in region["boxes"]:                            # last, so text hides no edge
            x0, y0, x1, y1 = (v * max(0, n - 1) for v, n in zip(box, image.size * 2))
            if not region.get("dashed"):
                pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
                continue
            for x in np.arange(x0, x1, 16):
                pen.line((x, y0, min(x + 8, x1), y0), colour, 2)
                pen.line((x, y1, min(x + 8, x1), y1), colour, 2)
            for y in np.arange(y0, y1, 16):
                pen.line((x0, y, x0, min(y + 8, y1)), colour, 2)
                pen.line((x1, y, x1, min(y + 8, y1)), colour, 2)


def cell(image, regions, caption, frame="black", size=360):
    """A cell of a sheet: an image with boxes and phrases, and four lines of caption below."""
    image = ImageOps.contain(image.convert("RGB"), (size - 8, size - 8))
    draw_boxes(image, regions)
    picture = Image.new("RGB", (size, size + 88), (18, 18, 18))
    picture.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, 44)]
    pen, text = ImageDraw.Draw(picture), "\n".join(lines[:4])
    pen.text((8, size + 4), text, "white", font(14, text))
    pen.rectangle([0, 0, size - 1, size + 87], outline=frame, width=3)
    return picture


def tile(cells, columns):
    """Images of one size, row by row on one sheet -> PIL image."""
    w, h = cells[0].size
    sheet = Image.new("RGB", (w * min(columns, len(cells)), h * math.ceil(len(cells) / columns)))
    for n, cell in enumerate(cells):
        sheet.paste(cell, (n % columns * w, n // columns * h))
    return sheet


def map_ahead(pool, function, items, ahead):
    """Yield function(item) in order, computed by an executor at most `ahead` items ahead, so
    that the items and results of a large set are never all in memory."""
    futures = (pool.submit(function, item) for item in items)
    waiting = deque(itertools.islice(futures, ahead + 1))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(itertools.islice(futures, 1))


# ---- checks of a manifest ------------------------------------------------------------------------

ROW_KEYS = {"image": str, "study": str, "patient": str, "split": str,
            "report": str | None, "regions": list | None, "labels": list | None}
PLACEHOLDERS = ("nan", "none", "null", "<na>")


def scan_manifest(data):
    """Yield (line number, row or None, problem or None) for each line of a manifest."""
    path = manifest_path(data)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row = None
            try:
                if not (line := line.decode("utf-8-sig").strip()):
                    continue
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()   # no lone surrogates
                problem = row_problem(row, path.parent)
            except (ValueError, RecursionError, OSError) as error:     # OSError: an endless name
                problem = f"expected one JSON object a line, in UTF-8: {first_line(error)}"
            yield number, row, problem


def row_problem(row, folder):
    """An error message for an invalid row of the manifest, else None."""
    if not isinstance(row, dict):
        return f"expected one JSON object a line, got {type(row).__name__}"
    for key, kind in ROW_KEYS.items():
        value = row.get(key)
        if not isinstance(value, kind) or kind is str and not value.strip():
            expected = "a list" if kind == list | None else "text"
            return f"{key!r} is {value!r:.80}, expected {expected}"
        if isinstance(value, str) and value.strip().lower() in PLACEHOLDERS:
            return f"{key!r} is {value!r}: a missing value written as text; leave the key out"
    if row["split"] not in SPLITS:
        return f"'split' is {row['split']!r:.80}, expected one of {', '.join(SPLITS)}"
    if not all(isinstance(label, str) for label in row.get("labels") or []):
        return f"'labels' is {row['labels']!r:.80}, expected a list of words"
    for region in row.get("regions") or []:
        if not isinstance(region, dict) or not isinstance(region.get("boxes"), list) \
                or one_line(region.get("phrase")).lower() in ("", *PLACEHOLDERS):
            return f"region {region!r:.120}, expected 'phrase' and 'boxes': [[x0, y0, x1, y1], ...]"
        for box in region["boxes"]:
            if problem := box_problem(box):
                return (f"box {box!r:.120} of {region['phrase']!r:.80} {problem}; "
                        "expected [x0, y0, x1, y1] in [0, 1]")
    if not (folder / row["image"]).is_file():
        return f"image {folder / row['image']} does not exist"


def find_row(rows, image):
    """The row whose image is this file, under any path; None if there is none."""
    return next((row for row in rows if os.path.samefile(row["path"], image)), None)


def manifest_notes(rows):
    """Warnings about valid but suspicious rows of a manifest, one line each; reads no image."""
    reports = [row["report"] for row in rows if row.get("report")]
    reports = reports[::1 + len(reports) // 1000]              # of a large set, about a thousand
    n_single = sum(len(split_sentences(report)) == 1 for report in reports)
    notes = [f"unknown key {key!r}, not read: {n:,}" for key, n in Counter(
        key for row in rows for key in row.keys() - ROW_KEYS.keys() - {"path"}).items()]
    if n := len(rows) - len({row["image"] for row in rows}):
        notes.append(f"rows whose image another row has: {n:,}")
    if 2 * n_single > len(reports):
        notes.append(f"{n_single:,} of {len(reports):,} reports looked at are a single sentence; "
                     "do their sentences end with a full stop?")
    patients = {split: {r["patient"] for r in rows if r["split"] == split} for split in SPLITS}
    notes += [f"no rows of split {split!r}" for split in ("val", "test") if not patients[split]]
    for first, second in itertools.combinations(SPLITS, 2):
        if shared := patients[first] & patients[second]:
            notes.append(f"patients both in {first} and in {second}, so scores mislead: "
                         f"{len(shared):,}, such as {min(shared)!r}")
    return notes


def count_rows(rows, split):
    """{what: how many} of a split's rows."""
    rows = [row for row in rows if row["split"] == split]
    pairs = [region for row in rows for region in row["regions"] if region["boxes"]]
    boxed = [row for row in rows if any(region["boxes"] for region in row["regions"])]
    return {"images": len(rows), "boxed images": len(boxed),
            "studies": len({study_of(row) for row in rows}),
            "boxed studies": len({study_of(row) for row in boxed}),
            "patients": len({row["patient"] for row in rows}),
            "reports": sum(bool(row["report"]) for row in rows),
            "pairs": len(pairs), "boxes": sum(len(pair["boxes"]) for pair in pairs)}


def check(data, png):
    """Read every row and image of a data set, print every problem, the counts and what is odd, and
    draw eight rows with their boxes. Returns the number of problems."""
    path, rows, n_flat = manifest_path(data), [], 0
    check_output(png, ".png")
    if not (scanned := list(scan_manifest(data))):
        raise InputError(f"{path}: no rows")
    for image in (path.parent / row["image"] for _, row, problem in scanned if not problem):
        check_output(png, ".png", image)
    for number, row, problem in tqdm(scanned, "check", unit="row"):
        try:
            if problem:
                raise InputError(problem)
            levels = load_image(path.parent / row["image"]).histogram()
            n_flat += sum(n > 0 for n in levels) < 32
            rows.append({**row, "report": row.get("report"), "regions": row.get("regions") or []})
        except InputError as error:
            tqdm.write(f"{path}:{number}: {error}")
    print(format_table([("", *count_rows([], ""))] + [
        (split, *(f"{n:,}" for n in count_rows(rows, split).values())) for split in SPLITS]))
    notes = [f"images of fewer than 32 grey levels: {n_flat:,}"] if n_flat else []
    for note in notes + manifest_notes(rows):
        print(f"note: {note}")
    boxed, images = [row for row in rows if row["regions"]] or rows, []
    for row in boxed[::max(1, len(boxed) // 8)][:8]:           # from all over the set
        images.append(load_image(path.parent / row["image"], 320).convert("RGB"))
        draw_boxes(images[-1], row["regions"])
    if images:
        write_file(png, lambda draft: tile(images, 4).save(draft, "PNG"))
        print(f"drew {png}: check that the boxes are where the phrases say")
    print(f"{len(scanned) - len(rows)} problems in {len(scanned)} rows")
    return len(scanned) - len(rows)


# ---- the phantom: drawn chest X-rays -------------------------------------------------------------
# Body frame: x from the patient's right (-1) to left (1), which is the picture's left to right;
# y from the shoulders (-1) to the abdomen (1).

RIGHT_LUNG = [(-.14, -.62), (-.26, -.74), (-.42, -.70), (-.56, -.48), (-.66, -.12), (-.71, .25),
              (-.73, .56), (-.58, .46), (-.38, .40), (-.20, .50), (-.14, .28), (-.21, .02),
              (-.15, -.25)]
ZONES = {"upper": -.42, "mid": -.06, "lower": .27}              # centres, y
SIZES = {"small": .35, "moderate": .47, "large": .62}           # widths
HEART = {"small": ("mildly", .58), "moderate": ("moderately", .68), "large": ("severely", .80),
         None: ("", .46)}                                       # left border, x; None is normal
FINDINGS = {  # label: (probability, its sentence, the sentence that it is not there)
    "nodule": (.24, "{Size} {side} {zone} zone nodule.", "No nodule."),
    "cavity": (.20, "{Size} cavity in the {side} {zone} zone.", "No cavity."),
    "consolidation": (.21, "{Size} {side} {zone} zone consolidation.", "No consolidation."),
    "pleural effusion": (.11, "{Size} {side} pleural effusion.", "No pleural effusion."),
    "pneumothorax": (.09, "{Size} {side} pneumothorax.", "No pneumothorax."),
    "pacemaker": (.10, "Pacemaker over the {side} chest.", "No implanted device."),
    "cardiomegaly": (.05, "The heart is {degree} enlarged.", "Normal heart size.")}
ZONE_OF = {"pleural effusion": "lower", "pneumothorax": "upper"}          # others are in any zone
BODY_WIDTH, BODY_SHIFT = (.70, 1.06), .12                       # fractions of the image; each way
PHANTOM_SIZES = {"train": 16000, "val": 50, "test": 400}
ONE_PROCESS = 1000                              # so few images are drawn without a process pool


class Canvas:
    """A chest X-ray being drawn: (n, n) brightness, and the frame that places the body on it."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n
        self.scale = rng.uniform(*BODY_WIDTH) / 2 * np.array([1, rng.uniform(.9, 1.12)])
        self.centre = .5 + rng.uniform(-BODY_SHIFT, BODY_SHIFT, 2)
        self.pixels = np.full((n, n), 14, np.float32)

    def position(self):
        """The sentence on the body's width and the position of its middle, by thirds."""
        def third(value, low, high, *words):
            return words[min(2, int(3 * (value - low) / (high - low)))]
        x, y = self.centre - .5
        view = third(2 * self.scale[0], *BODY_WIDTH, "Wide", "Standard", "Close")
        y = third(y, -BODY_SHIFT, BODY_SHIFT, "high", "level", "low")
        x = third(x, -BODY_SHIFT, BODY_SHIFT, "right", "central", "left")    # the patient's
        return f"{view} view, chest {y} and {x}."

    def mask(self, *shapes, blur=0, line=0):
        """Filled polygons, or lines of that width (image fraction), blurred: (n, n) in [0, 1]."""
        layer = Image.new("L", (self.n, self.n))
        pen = ImageDraw.Draw(layer)
        for points in shapes:
            corners = [tuple(p) for p in (self.centre + self.scale * points) * self.n]
            if line:
                pen.line(corners, 255, max(1, round(line * self.n)), "curve")
            else:
                pen.polygon(corners, 255)
        layer = layer.filter(ImageFilter.BoxBlur(1.6 * blur * self.n))
        return np.asarray(layer, np.float32) / 255

    def box(self, points):
        """The manifest's box around points of the body frame, clipped to the image."""
        points = (self.centre + self.scale * points).clip(0, 1)
        return [round(float(v), 4) for v in (*points.min(0), *points.max(0))]


def mirror(points, side="left"):
    """Points drawn on the patient's right, moved to the side asked for."""
    return [(x if side == "right" else -x, y) for x, y in points]


def noise(rng, grid, n, std):
    """(n, n) smooth noise: a grid of normal draws, enlarged."""
    draws = Image.fromarray(rng.normal(0, std, (grid, grid)).astype(np.float32))
    return np.asarray(draws.resize((n, n), Image.Resampling.BICUBIC))


def ellipse(x, y, rx, ry, wobble=1):
    """28 points of an ellipse; wobble, a number or (28,), scales its radius."""
    angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return np.stack([x + rx * wobble * np.cos(angle), y + ry * wobble * np.sin(angle)], 1)


def draw_anatomy(canvas, heart):
    """Body, lungs, spine, trachea, ribs, clavicles, vessels and heart (its outline is given)."""
    rng, pixels, mask, wide = canvas.rng, canvas.pixels, canvas.mask, 2 * canvas.scale[0]
    torso = [(-.30, -1.3), (-.34, -.98), (-.86, -.82), (-1.02, -.3), (-.95, 1.6)]
    pixels += mask(torso + mirror(torso)[::-1], blur=.02) * rng.uniform(118, 138)
    lungs = mask(RIGHT_LUNG, mirror(RIGHT_LUNG), blur=.008)
    pixels -= lungs * rng.uniform(82, 92)
    pixels += mask([(-.10, -1.1), (.10, -1.1), (.12, 1.3), (-.12, 1.3)], blur=.02) * 38
    pixels -= mask([(-.035, -1.1), (.035, -1.1), (.03, -.42), (-.03, -.42)], blur=.008) * 26
    ribs = [[(-.10, y - .05), (-.32, y - .10), (-.55, y - .02), (-.72, y + .16)]
            for y in np.arange(-.66, .5, .155)]
    pixels += mask(*ribs, *map(mirror, ribs), blur=.004, line=.016 * wide) * 13
    clavicle = [(-.08, -.60), (-.35, -.70), (-.74, -.80)]
    pixels += mask(clavicle, mirror(clavicle), blur=.004, line=.03 * wide) * 24
    roots = [(-.2, y) for y in rng.uniform(-.15, .1, 14)]
    vessels = [[(x, y), (x - rng.uniform(.1, .36), y + rng.uniform(-.4, .3))] for x, y in roots]
    vessels = vessels[:7] + list(map(mirror, vessels[7:]))
    pixels += mask(*vessels, blur=.006, line=.012) * lungs * 20
    pixels += mask(heart, blur=.014) * 66


def draw_finding(canvas, kind, side, zone, width):
    """Draw a finding, other than the heart -> the points of its outline, in the body frame."""
    rng, pixels, mask = canvas.rng, canvas.pixels, canvas.mask
    if kind in ("nodule", "cavity", "consolidation"):           # anywhere in a zone
        x, y = rng.uniform(-.55, -.30), ZONES[zone] + rng.uniform(-.14, .14)
        x = x if side == "right" else -x
    if kind == "nodule":
        outline = ellipse(x, y, width / 2, width / 2)
        pixels += mask(outline, blur=.006) * 112
    elif kind == "cavity":
        outline = ellipse(x, y, width / 2, width / 2 * rng.uniform(.8, 1.2))
        inside = mask((outline - (x, y)) * .55 + (x, y), blur=.005)
        pixels += (mask(outline, blur=.005) - inside) * 112
        pixels -= inside * 30
    elif kind == "consolidation":
        waves, phase = rng.integers(3, 6), rng.uniform(0, 6)
        wobble = 1 + .12 * np.sin(np.arange(28) / 28 * 2 * np.pi * waves + phase)
        outline = ellipse(x, y, .62 * width, .62 * width * rng.uniform(.55, .85), wobble)
        pixels += mask(outline, blur=.012) * (1 + noise(rng, 24, canvas.n, .3)) * 66
    elif kind == "pleural effusion":
        top = .50 - 1.5 * (width - .12) * rng.uniform(.9, 1.1)
        outline = mirror([(-.75, top), (-.62, top + .10), (-.40, top + .16), (-.15, top + .17),
                          (-.13, .52), (-.74, .58)], side)
        pixels += mask(outline, blur=.010) * 92
    elif kind == "pneumothorax":
        edge = width * rng.uniform(.6, .8)
        line = mirror([(-.20, -.70 + edge), (-.40, -.62 + edge), (-.60 + .4 * edge, -.40 + edge),
                       (-.70, -.78 + 2 * width * rng.uniform(.95, 1.05))], side)
        apex = [(-.14, -.66), (-.26, -.76), (-.42, -.72), (-.58, -.48), (-.68, -.12)]
        outline = mirror(apex, side) + line[::-1]
        pixels -= mask(outline, blur=.004) * 48
        pixels += mask(line, blur=.002, line=.012) * 70
    elif kind == "pacemaker":
        x, y = rng.uniform(-.70, -.36), rng.uniform(-.72, -.30)
        outline = mirror(ellipse(x, y, rng.uniform(.20, .26), rng.uniform(.16, .21)), side)
        lead = [(x, y), (-.16, y - .1), (-.02, -.1), (-.10 if side == "right" else .10, .38)]
        pixels += mask(mirror(lead, side), blur=.002, line=.009) * 80
        pixels += mask(outline, blur=.003) * 120
    return outline


def draw_phantom(out, seed, number, n=96):
    """Draw and save image `number`, (split, i), n x n pixels -> its manifest row."""
    split, i = number
    rng = np.random.default_rng([seed, SPLITS.index(split), i])
    canvas, findings, regions = Canvas(rng, n), {}, []
    n_findings = rng.choice([1, 2, 3], p=[.15, .65, .2])
    while len(findings) < n_findings:                           # a zone or organ is used once
        kind = rng.choice(list(FINDINGS), p=[p for p, *_ in FINDINGS.values()])
        side, size = rng.choice(["right", "left"]), rng.choice(list(SIZES))
        zone = ZONE_OF.get(kind) or rng.choice(list(ZONES))
        place = kind if kind in ("cardiomegaly", "pacemaker") else (side, zone)
        findings.setdefault(place, (kind, side, zone, size))
    size_of = {kind: size for kind, _, _, size in findings.values()}
    degree, border = HEART[size_of.get("cardiomegaly")]
    left = -.22 - .3 * (border - .46)
    heart = ellipse((left + border) / 2, .26, (border - left) / 2, .28)
    draw_anatomy(canvas, heart)
    for kind, side, zone, size in findings.values():
        width = SIZES[size] * rng.uniform(.94, 1.06)
        outline = heart if kind == "cardiomegaly" else draw_finding(canvas, kind, side, zone, width)
        phrase = FINDINGS[kind][1].format(side=side, zone=zone, Size=size.capitalize(),
                                          degree=degree)
        regions.append({"phrase": phrase, "boxes": [canvas.box(outline)]})
    # A report has three sentences on findings, there or not, and half of the time the position.
    absent = rng.permutation([kind for kind in FINDINGS if kind not in size_of])
    sentences = [r["phrase"] for r in regions] + [FINDINGS[kind][2] for kind in absent]
    sentences = sentences[:3] + ([canvas.position()] if rng.integers(2) else [])
    report = " ".join(rng.permutation(sentences))
    pixels = (canvas.pixels * rng.uniform(.85, 1.1)
              + noise(rng, 2 * n // 3, n, 8) + noise(rng, 5, n, 6))
    name, study = f"images/{split}_{i:05d}.png", f"{split}{i:05d}"
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out / name, compress_level=1)
    return {"image": name, "study": study, "patient": study, "split": split, "report": report,
            "regions": regions, "labels": list(size_of)}


def make_phantom(out, sizes=PHANTOM_SIZES, seed=0, quiet=False):
    """Write a phantom data set to a new folder, the same for the same seed. Returns the folder.
    It is drawn in a temporary folder, then renamed: a killed run leaves no partial phantom."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    numbers = [(split, i) for split, n in sizes.items() for i in range(n)]
    with (tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder,
          contextlib.ExitStack() as stack):
        draft = Path(folder, "phantom")                        # its mode is the umask's
        (draft / "images").mkdir(parents=True)
        draw, draws = functools.partial(draw_phantom, draft, seed), map
        if len(numbers) > ONE_PROCESS:
            draws = functools.partial(stack.enter_context(ProcessPoolExecutor()).map, chunksize=50)
        rows = list(tqdm(draws(draw, numbers), "phantom", len(numbers), unit="image",
                         disable=quiet))
        (draft / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        try:
            draft.rename(out)
        except OSError:
            if not (out / "manifest.jsonl").exists():          # else another run was first
                raise
    return out


# ---- converters: steps they share ----------------------------------------------------------------

@contextlib.contextmanager
def reading(path):
    """Turn an error inside, while a source is read, into an InputError that names the source."""
    try:
        yield
    except InputError:
        raise
    except (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, csv.Error,
            zlib.error, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); is the download complete?")


def csv_rows(path, *columns, ragged=False):
    """Yield the rows of a .csv, a .gz or a zip of one .csv as dicts; ragged: rows may be short."""
    csv.field_size_limit(1 << 30)                              # CheXmask: a mask is one field
    with reading(path):
        if path.suffix == ".zip":
            [path] = files_below(path, ".csv").values()
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as raw:
            table = csv.DictReader(io.TextIOWrapper(raw, "utf-8-sig", newline=""))
            names = table.fieldnames or []
            if missing := [name for name in columns if name not in names]:
                raise InputError(f"{path}: no column {missing[0]!r} in {', '.join(names)[:200]}")
            for row in tqdm(table, path.name, unit="row"):
                if None in row.values() and not ragged:
                    raise InputError(f"{path}:{table.line_num}: cut, expected {len(names)} fields")
                yield row


def files_below(path, suffix):
    """{file name: path} of the files in a folder or a zip, at any depth, as releases differ."""
    with reading(path):
        if path.is_dir():
            found = path.rglob("*" + suffix)
        else:
            archive = zipfile.ZipFile(path)
            found = (zipfile.Path(archive, name) for name in archive.namelist())
        files = {file.name: file for file in found
                 if file.name.endswith(suffix) and not file.name.startswith(".")}    # macOS: ._x
    if not files:
        raise InputError(f"{path}: no *{suffix} in it; expected a folder or a zip with some")
    return files


def find(folder, pattern, expected):
    """The first file in a folder that matches a pattern."""
    if not (found := sorted(folder.glob(pattern))):
        raise InputError(f"{folder}: has no {pattern}; {expected}")
    return found[0]


def official_split(value, path):
    """The manifest's name of a split of the data set."""
    split = {"validate": "val", "validation": "val"}.get(value, value)
    if split not in SPLITS:
        raise InputError(f"{path}: split {value!r}, expected train, validate, validation or test")
    return split


def weighted_boxes_fusion(boxes, iou):
    """Merge boxes that overlap into their mean (Solovyev et al. 2021; scores 1, one source).

    From the last box to the first: it joins the fused box of highest IoU, if that is above `iou`,
    or opens a new one. (N, 4) -> (M, 4), left to right. (0, 0, .4, .4) and (.2, 0, .6, .4), of
    IoU 1/3, give (.1, 0, .5, .4) at 0.3 and themselves at 0.4. Empty boxes are dropped."""
    groups, fused = [], []
    for box in reversed(drop_degenerate(boxes)):
        overlap = box_iou([box], fused)[0]                     # (len(groups),)
        if overlap.max(initial=0) > iou:
            groups[overlap.argmax()].append(box)
        else:
            groups.append([box])
        fused = [np.mean(group, axis=0).tolist() for group in groups]
    return sorted(fused)


def shrink(job):
    """Write an image as an upright 8-bit JPEG, its short side at most `size` pixels.

    job: (path, where to write, size). -> None or why there is no image."""
    source, target, size = job
    if target.exists():
        return None
    try:
        shape = image_shape(source)
        small = [max(1, round(min(1, size / min(shape)) * side)) for side in shape]
        with open_image(source) as image:
            image = to_grey(image, size).resize(small, Image.Resampling.BILINEAR)
    except FileNotFoundError:
        return "no image"
    except (OSError, SyntaxError, ValueError, zlib.error, zipfile.BadZipFile):
        tqdm.write(f"unreadable image: {source}")
        return "unreadable image"
    write_file(target, lambda draft: image.save(draft, "JPEG", quality=95))


class Conversion:
    """A run of a converter: the steps that all converters share, and their counts.

    funnel: {table: {reason: {split: n}}}, table one of images, pairs, boxes and out (what is left);
    reason "in", or why something was dropped. lost: messages about missing inputs."""

    def __init__(self, args):
        self.args, self.out, self.size, self.funnel, self.lost = args, args.out, args.size, {}, []
        self.iou = getattr(args, "wbf_iou", 1)                 # no boxes overlap by more than 1
        check_ranges(args, {"size": (1, 1e5), "workers": (1, 256), "wbf_iou": (0, 1)})
        if (self.out / "manifest.jsonl").exists():
            raise InputError(f"{self.out}: has a manifest.jsonl already; choose another --out")

    def count(self, table, split, reason, n=1):
        by_split = self.funnel.setdefault(table, {}).setdefault(reason, dict.fromkeys(SPLITS, 0))
        by_split[split] += n

    def admit(self, table, split, reason=None):
        """Count an image or pair that came in, and the reason why it is dropped, if there is one.
        -> whether it is kept"""
        self.count(table, split, "in")
        if reason:
            self.count(table, split, reason)
        return not reason

    def prepare_images(self, rows):
        """Shrink the images of rows into --out -> the rows that have one.

        row["source"]: the image's path, perhaps in a zip; row["name"]: where to write it."""
        unique, kept = {}, []
        for row in rows:
            row["image"] = f"images_{self.size}/{row['name']}"
            if unique.setdefault(row["name"], row) is not row:
                self.count("images", row["split"], "repeated image")
        jobs = ((row["source"], self.out / row["image"], self.size) for row in unique.values())
        with ThreadPoolExecutor(self.args.workers) as threads:
            reasons = map_ahead(threads, shrink, jobs, 2 * self.args.workers)
            for row, reason in zip(tqdm(unique.values(), "images", unit="image"), reasons):
                if reason:
                    self.count("images", row["split"], reason)
                else:
                    kept.append(row)
        return kept

    def add_regions(self, row):
        """Turn row["pairs"], (phrase, boxes in units of row["scale"]), into regions, counted: boxes
        are clipped to the image and, where a --wbf-iou is given, fused."""
        scale, split, row["regions"] = row["scale"], row["split"], []
        for phrase, boxes in row["pairs"]:
            boxes = boxes if phrase else []
            with reading(f"boxes {boxes} of {phrase!r}"):
                fractions = np.array(boxes, float).reshape(-1, 4) / (*scale, *scale)
            if scale == (1, 1) and (fractions > 2).any():
                raise InputError(f"{phrase!r} has boxes {boxes}, expected fractions, got pixels")
            inside = drop_degenerate(fractions.clip(0, 1).round(5).tolist())
            fused = weighted_boxes_fusion(inside, self.iou) if self.iou < 1 else inside
            if self.admit("pairs", split, "no text" if not phrase else "no box" if not boxes else
                          "degenerate box" if not fused else None):
                fused = [[round(v, 5) for v in box] for box in fused]
                row["regions"].append({"phrase": phrase, "boxes": fused})
            self.count("boxes", split, "in", len(boxes))
            self.count("boxes", split, "degenerate box", len(boxes) - len(inside))
            self.count("boxes", split, "merged", len(inside) - len(fused))

    def finish(self, rows):
        """Make the regions, print the funnel and what is missing, write prepare.json, manifest."""
        for row in rows:
            self.add_regions(row)
        for split in SPLITS:
            for name, n in count_rows(rows, split).items():
                self.count("out", split, name, n)
        print(format_table([("", *SPLITS)] + [
            (f"{table} {reason}", *(f"{n:,}" for n in by_split.values()))
            for table, reasons in self.funnel.items() for reason, by_split in reasons.items()]))
        for loss in self.lost:
            print(f"missing: {loss}")
        if not rows:
            raise InputError(f"{self.out}: no image is left, see the counts above; nothing written")
        arguments = {name: str(value) for name, value in vars(self.args).items()}
        write_json(self.out / "prepare.json", {"arguments": arguments, "lost": self.lost,
                                               "funnel": self.funnel})
        lines = [json.dumps({key: row[key] for key in ROW_KEYS}) + "\n" for row in rows]
        write_file(self.out / "manifest.jsonl", lambda draft: draft.write_text("".join(lines)))
        print(f"wrote {self.out / 'manifest.jsonl'}; next: python data.py check {self.out}")


# ---- converters: MIMIC-CXR, MS-CXR, PadChest-GR and (not in the paper) an open COVID-19 set ------

DICE = "Dice RCA (Mean)"                       # CheXmask's quality of an image
MIMIC_PATH = re.compile(r"(p\d+)/(s\d+)/([^/]+)\.jpg$")
LUNGS = {1: "Right lung.", 2: "Left lung."}    # by the category in covid-chestxray-dataset
NO_DERIVATIVES = re.compile(r"\bND\b|no.?deriv", re.IGNORECASE)


def mimic_table(images, kind, *columns):
    """{dicom id: its columns} of a table of MIMIC-CXR-JPG."""
    path = find(images, f"mimic-cxr-2*-{kind}.csv*", "--images expects the root of MIMIC-CXR-JPG")
    return {row["dicom_id"]: [row[column] for column in columns]
            for row in csv_rows(path, "dicom_id", *columns)}


def mimic_row(images, path, where):
    """An image of MIMIC-CXR-JPG by ".../p10000032/s50414267/ID.jpg" -> the beginning of its row."""
    if not (found := MIMIC_PATH.search(str(path))):
        raise InputError(f"{where}: image {path!r}, expected .../p10000032/s50414267/ID.jpg")
    patient, study, dicom = found.groups()
    name = f"{patient[:3]}/{found[0]}"
    return {"study": study, "patient": patient, "dicom": dicom, "name": name, "pairs": [],
            "labels": [], "report": "", "source": images / "files" / name}


def find_questions(root):
    """MIMIC-Ext-CXR-QBA -> {name: path} of studies' questions, {study: ids of those rated A++}."""
    folder, rated = root / "exports" / "A_frontal", defaultdict(set)
    files = files_below(find(folder, "qa*", "--qba expects MIMIC-Ext-CXR-QBA's root"), ".qa.json")
    path = find(folder, "metadata/App/question_metadata.csv*", "it lists the A++ questions")
    for row in csv_rows(path, "study_id", "question_id"):
        rated["s" + row["study_id"].removeprefix("s")].add(row["question_id"])
    return files, rated


def add_pairs(run, rows, files, rated):
    """Give rows the text-box pairs that the questions on their studies have for their images.

    Which answers give a pair, apart from their rating, is not stated in the paper: here the
    top-level, positive ones that are drawn from the report, each text once per image."""
    missing = set()
    for row in tqdm(rows, "boxes", unit="image"):
        study, dicom, pairs = row["study"], row["dicom"], {}
        if not (file := files.get(f"{study}.qa.json")):
            missing.add(study)
            continue
        with reading(file):
            questions = json.loads(file.read_bytes()).get("questions") or []
            for question, answer in ((q, a) for q in questions for a in q.get("answers") or []):
                place = (answer.get("localization") or {}).get(dicom)
                if place is None:
                    continue
                phrase, boxes = one_line(answer.get("text")), place.get("bboxes")
                reason = ("rating" if question.get("question_id") not in rated[study]
                          else "not positive" if answer.get("positiveness", "pos") != "pos"
                          else "not in report" if not answer.get("from_report", True)
                          else "fallback box" if place.get("is_fallback")
                          else "repeated text" if phrase in pairs
                          else "no box" if not boxes else None)
                if reason:
                    run.admit("pairs", row["split"], reason)
                else:                                          # add_regions counts these
                    pairs[phrase] = boxes
        row["pairs"] = list(pairs.items())
    if missing:
        run.lost.append(f"pairs of {len(missing):,} studies that have no questions")


def llava_rad_entries(run, path):
    """The entries of a file of LLaVA-Rad with texts extracted by GPT-4; where there are none, as
    in the test file, those by rules."""
    entries = json.loads(path.read_bytes())
    methods = {entry.get("generate_method") for entry in entries}
    if "gpt4" not in methods:
        run.lost.append(f"gpt4 texts of {path.name}: its rule-based texts are used")
    return entries, "gpt4" if "gpt4" in methods else "rule-based"


def prepare_mimic_cxr(args):
    """MIMIC-CXR-JPG, LLaVA-Rad, CheXmask and MIMIC-Ext-CXR-QBA -> a manifest (Sec. 3.0.1)."""
    run, rows, good = Conversion(args), [], None
    paths = [find(args.llava_rad, f"**/chat_{name}_*.json", "--llava-rad expects LLaVA-Rad's root")
             for name in ("train", "dev", "test")]
    views = mimic_table(args.images, "metadata", "ViewPosition", "Columns", "Rows")
    if args.qba:
        files, rated = find_questions(args.qba)
    else:
        run.lost.append("text-box pairs, so grounding and dense captioning (no --qba)")
    if args.chexmask:
        with reading(args.chexmask):                           # 0.7: not stated in the paper
            good = {row["dicom_id"] for row in csv_rows(args.chexmask, "dicom_id", DICE)
                    if float(row[DICE] or 0) >= 0.7}
    else:
        run.lost.append("the quality filter of images (no --chexmask)")
    for split, path in zip(SPLITS, paths):
        with reading(path):
            entries, method = llava_rad_entries(run, path)
            for entry in tqdm(entries, path.name, unit="item"):
                row = mimic_row(args.images, entry.get("image"), path)
                # Findings and impression (Sec. 3.0.1); either may be missing.
                texts = [turn.get("value") for turn in (entry.get("conversations") or [])[1:2]]
                texts = [one_line(text) for text in (*texts, entry.get("impression"))]
                labels = entry.get("chexpert_labels") or {}
                # Boxes are in pixels of the originals. Their sizes are read from the table, as the
                # images may be copies that were shrunk before.
                view, width, height = views.get(row["dicom"], ("", 1, 1))
                row |= {"split": split, "report": " ".join(filter(None, texts)),
                        "labels": [name for name, value in labels.items() if value == 1],
                        "scale": (float(width), float(height))}
                if run.admit("images", split,
                             "other method" if entry.get("generate_method") != method
                             else "view" if view not in ("PA", "AP")
                             else "quality" if good is not None and row["dicom"] not in good
                             else "no text" if not row["report"] else None):
                    rows.append(row)
    rows = run.prepare_images(rows)
    if args.qba:
        add_pairs(run, rows, files, rated)
    run.finish(rows)


def prepare_ms_cxr(args):
    """MS-CXR -> a manifest: phrases and boxes, no reports. Its table has a line per box."""
    run, rows, boxes = Conversion(args), {}, defaultdict(list)
    splits = mimic_table(args.images, "split", "split")
    with reading(args.table):
        for line in csv_rows(args.table, "path", "category_name", "label_text", "image_width",
                             "image_height", *"xywh"):
            row = mimic_row(args.images, line["path"], args.table)
            split = line.get("split") or splits.get(row["dicom"], ["test"])[0]
            row["split"] = official_split(split, args.table)
            row["scale"] = float(line["image_width"]), float(line["image_height"])
            x, y, w, h = (float(line[key]) for key in "xywh")
            boxes[row["name"], one_line(line["label_text"])].append([x, y, x + w, y + h])
            if row["name"] not in rows and run.admit("images", row["split"]):
                rows[row["name"]] = row
            if line["category_name"] not in rows[row["name"]]["labels"]:
                rows[row["name"]]["labels"].append(line["category_name"])
    for (name, phrase), found in boxes.items():
        rows[name]["pairs"].append((phrase, found))
    run.finish(run.prepare_images(rows.values()))


def prepare_padchest_gr(args):
    """PadChest-GR -> a manifest (Sec. 3.0.1): all sentences of a study, the boxed ones as pairs.
    Validation becomes train: together they are the paper's pool (inferred)."""
    run, splits, rows = Conversion(args), {}, []
    images = files_below(args.images, ".png")
    if not args.table:
        run.lost.append("splits and patients, all rows are of train (no --table)")
    for row in csv_rows(args.table, "ImageID", "split", "PatientID") if args.table else []:
        is_test = official_split(row["split"], args.table) == "test"
        splits[row["ImageID"]] = "test" if is_test else "train", row["PatientID"]
    with reading(args.reports):
        for entry in json.loads(args.reports.read_bytes()):
            image = str(entry.get("ImageID"))
            study = str(entry.get("StudyID") or image)
            split, patient = splits.get(image, ("train", study))
            findings = entry.get("findings") or []
            pairs = [(one_line(f.get("sentence_en")), f.get("boxes") or []) for f in findings]
            sentences = [s if s[-1] in ".!?" else s + "." for s, _ in pairs if s]
            labels = dict.fromkeys(label for f in findings for label in f.get("labels") or [])
            if run.admit("images", split, "not in table" if splits and image not in splits else
                         "no text" if not sentences else
                         "no image" if image not in images else None):
                rows.append({"study": study, "patient": patient or study, "split": split,
                             "report": " ".join(sentences), "pairs": pairs, "scale": (1, 1),
                             "labels": list(labels), "name": f"{Path(image).stem}.jpg",
                             "source": images[image]})
    run.finish(run.prepare_images(rows))


def covid_lungs(path):
    """{file name: (pairs of a lung and its box in pixels, image size)} of the COCO annotations."""
    found, lungs = defaultdict(list), {}
    coco = json.loads(path.read_bytes())
    for note in coco["annotations"]:
        if None not in note["bbox"]:                           # some are empty
            x, y, w, h = note["bbox"]
            found[note["image_id"]].append(([x, y, x + w, y + h], note.get("category_id")))
    for image in coco["images"]:
        if boxes := found[image["id"]]:
            if len(boxes) == 2:                                # the right lung is further left
                boxes = zip(sorted(box for box, _ in boxes), LUNGS)
            pairs = [(LUNGS.get(category), [box]) for box, category in boxes]
            lungs[image["file_name"]] = pairs, (image["width"], image["height"])
    return lungs


def prepare_covid_cxr(args):
    """A clone of ieee8023/covid-chestxray-dataset -> a manifest and LICENSES.csv."""
    run, rows = Conversion(args), []
    path = args.repo / "annotations" / "imageannotation_ai_lung_bounding_boxes.json"
    with reading(path):
        lungs = covid_lungs(path)
    for line in csv_rows(args.repo / "metadata.csv", "filename", "view", "license", ragged=True):
        # early releases have other capitals and spaces, and fewer columns
        line = defaultdict(str, {str(key).strip().lower(): one_line(value)
                                 for key, value in line.items()})
        name, report = Path(line["filename"]).name, line["clinical_notes"] or line["notes"]
        patient, licence = line["patientid"] or name, line["license"] or "unstated"
        pairs, scale = lungs.get(name, ([], (1, 1)))
        split = "train" if zlib.crc32(patient.encode()) % 5 else "test"
        labels = [word for word in line["finding"].split("/")      # Pneumonia/Viral/COVID-19
                  if word.lower() not in ("", "no finding", "todo", "unknown")]
        if run.admit("images", split, "not X-ray" if line["modality"] not in ("", "X-ray") else
                     "view" if line["view"] not in ("PA", "AP", "AP Supine", "APS") else
                     "licence" if NO_DERIVATIVES.search(licence) else
                     "no text" if not (report or pairs) else None):
            rows.append({"study": f"{patient}-{zlib.crc32(report.encode()):08x}",  # one per note
                         "patient": patient, "split": split, "report": report, "pairs": pairs,
                         "scale": scale, "labels": labels, "name": Path(name).stem + ".jpg",
                         "source": args.repo / (line["folder"] or "images") / name,
                         "licence": (name, licence, line["url"])})
    rows, text = run.prepare_images(rows), io.StringIO(newline="")
    csv.writer(text).writerows([("image", "original_file", "licence", "source")] + [
        (row["image"], *row["licence"]) for row in rows])
    write_file(args.out / "LICENSES.csv", lambda draft: draft.write_bytes(text.getvalue().encode()))
    run.finish(rows)                                           # the manifest last: all is there


# ---- errors, files and tables: shared by all scripts ---------------------------------------------

class InputError(ValueError):
    """Invalid input. The message is one line: what was given, what is expected, what to do."""


def first_line(error):
    """The first line of an error's message, or its type if it has none."""
    text = getattr(error, "strerror", None) or str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]


def run_command(main):
    """Run a script's main; an error that a user can fix ends it with one line, exit status 1."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):                    # a terminal without some letters
        stream.reconfigure(errors="replace")
    try:
        main()
    except (InputError, OSError) as error:
        # of an error in a DataLoader's worker the last line is ours
        text = str(error).strip().splitlines() or [first_line(error)]
        sys.exit(f"{name}: {text[-1].removeprefix('data.InputError: ')}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
    except (RuntimeError, MemoryError) as error:
        if type(error).__name__ not in ("MemoryError", "OutOfMemoryError"):    # the latter: torch's
            raise
        sys.exit(f"{name}: out of memory; lower --batch-size; train.py also has --accumulate and "
                 "--grad-checkpoint, icl_ground.py --k")


def write_file(path, write):
    """Write a file whole, and its folders: write(draft), then rename the draft to path. Raises
    InputError; a file that was there is then unchanged."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:                   # torch.save raises RuntimeError
        draft.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written ({first_line(error)}); make room or choose "
                         "another path, then run the same command again")


def write_json(path, value):
    """Write a JSON file whole. Raises InputError."""
    write_file(path, lambda draft: draft.write_text(json.dumps(value, indent=2) + "\n"))


def check_output(path, suffix, image=None):
    """Raise InputError unless an output has its suffix and is not the image that is read."""
    is_image = image and Path(path).exists() and os.path.samefile(path, image)
    if Path(path).suffix != suffix or Path(path).is_dir() or is_image:
        raise InputError(f"{path}: expected a {suffix} file to write, not the image itself")


def check_ranges(args, ranges):
    """Raise InputError unless flags are in their ranges, {name in args: (low, high)}."""
    for name, (low, high) in ranges.items():
        flag = "lambda" if name == "lam" else name.replace("_", "-")
        values = getattr(args, name, None)                     # None: not given, or no such flag
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not low <= value <= high:     # NaN compares as False
                most = "or more" if high == np.inf else f"to {high:,.10g}"
                raise InputError(f"--{flag} {value}: expected {low:g} {most}")


def format_table(rows):
    """Rows of text, the header first -> aligned lines: first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


# ---- command line --------------------------------------------------------------------------------

CONVERTERS = {"mimic-cxr": prepare_mimic_cxr, "padchest-gr": prepare_padchest_gr,
              "ms-cxr": prepare_ms_cxr, "covid-cxr": prepare_covid_cxr}


def parse_args():
    parser = argparse.ArgumentParser(description="Make and check data sets; see top of data.py.")
    commands = parser.add_subparsers(dest="command", required=True)
    path = {"required": True, "type": Path}

    def command(name, words):
        return commands.add_parser(name, help=words, description=words).add_argument

    def converter(name, words):
        add = command(name, words + " -> a manifest")
        add("--out", **path, help="folder to write; run again to continue a stopped run")
        add("--size", type=int, default=512, help="short side of the JPEGs (default: 512, Sec. "
            "2.0.4; for MedGemma 896)")
        add("--workers", type=int, default=min(8, os.cpu_count()),
            help="threads that shrink images (default: the CPUs, at most 8)")
        return add

    add = command("phantom", "draw chest X-rays with findings, reports and boxes")
    add("out", type=Path, help="folder to write; must not exist")
    for split, n in PHANTOM_SIZES.items():
        add(f"--{split}", type=int, default=n, help=f"images of {split} (default: {n})")
    add("--seed", type=int, default=0, help="the same seed draws the same images (default: 0)")

    add = converter("mimic-cxr", "MIMIC-CXR-JPG, LLaVA-Rad's texts, MIMIC-Ext-CXR-QBA's boxes")
    add("--images", **path, help="root of MIMIC-CXR-JPG")
    add("--llava-rad", **path, help="folder of LLaVA-Rad's chat_*.json")
    add("--qba", type=Path, help="root of MIMIC-Ext-CXR-QBA (default: none, so no boxes)")
    add("--chexmask", type=Path,
        help="CheXmask's MIMIC-CXR-JPG.csv: drop images below 0.7 in Dice RCA (default: none)")
    add("--wbf-iou", type=float, default=0.1,
        help="fuse boxes of a sentence above this IoU (default: 0.1, not stated in the paper)")

    add = converter("padchest-gr", "PadChest-GR: images, sentences and boxes")
    add("--images", **path, help="folder or zip of the 16-bit PNGs")
    add("--reports", **path, help="grounded_reports_*.json")
    add("--table", type=Path, help="master_table.csv, or .zip (default: none, all rows are train)")

    add = converter("ms-cxr", "MS-CXR: phrases and boxes on images of MIMIC-CXR-JPG")
    add("--images", **path, help="root of MIMIC-CXR-JPG")
    add("--table", **path, help="MS_CXR_Local_Alignment_v*.csv; without splits, MIMIC-CXR's")

    add = converter("covid-cxr", "the open COVID-19 image data collection: notes and lung boxes")
    add("--repo", **path, help="clone of ieee8023/covid-chestxray-dataset")

    add = command("check", "read every row and image, count, draw eight rows with boxes")
    add("data", help="folder with manifest.jsonl, or that file")
    add("--png", default="runs/check.png", help="where to draw (default: runs/check.png)")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.command == "check":
        sys.exit(bool(check(args.data, args.png)))
    if args.command in CONVERTERS:
        return CONVERTERS[args.command](args)
    if args.out.exists():
        raise InputError(f"{args.out}: exists already; choose a new folder")
    check_ranges(args, {"train": (1, 1e7), "val": (0, 1e7), "test": (0, 1e7),
                        "seed": (0, 2 ** 32 - 1)})
    make_phantom(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"wrote {args.out}; next: python data.py check {args.out}")


if __name__ == "__main__":
    run_command(main)
