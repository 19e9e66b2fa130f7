"""Data of LoFi (Sec. 2.0.1 and 2.0.4): manifest, prompts, training samples and batches.

    python data.py phantom OUT        # draw chest X-rays with findings, reports and boxes
    python data.py covid-cxr --help   # convert a data set; also mimic-cxr, padchest-gr and ms-cxr
    python data.py check DIR          # read every row and image, count, draw a few with their boxes

A data set is a folder with `manifest.jsonl`, one image a line (`report`, `regions` may be missing):

    {"image": "images/0001.png", "study": "s1", "patient": "p1", "split": "train",
     "report": "The heart is enlarged. ...",
     "regions": [{"phrase": "The heart is enlarged.", "boxes": [[0.38, 0.51, 0.78, 0.84]]}]}

Boxes are (x0, y0, x1, y1), fractions of the width and height of the original image. The image is
stretched to the encoder's square, so a box is the same fraction of the model's input.

In each training step the row above gives its image, a text for Eq. 1 and one of three tasks:

    text  for E_T         sentences of the report
    "c"   captioning      "Report this medical scan."                -> "The heart is enlarged. ..."
    "g"   grounding       "Detect all instances of: The heart ..."   -> "380 510 780 840"
    "d"   dense captions  "Describe the regions: 380 510 780 840"    -> "The heart is enlarged."
"""

import argparse
import contextlib
import csv
import difflib
import filecmp
import functools
import gzip
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tempfile
import textwrap
import threading
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from metrics import (InputError, box_iou, box_problem, check_output, drop_degenerate, first_line,
                     format_table, write_file, write_json)

# torch and transformers, which take seconds to import, are imported in the few functions that use
# them: the commands of this file do without.


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

    Boxes of almost no area are dropped. Raises InputError with file, line, what was given and what
    is expected, for the first invalid row."""
    path, rows = manifest_path(data), []
    for number, row, problem in scan_manifest(data):
        if problem:
            raise InputError(f"{path}:{number}: {problem}")
        if split in (None, row["split"]):
            regions = [{**region, "boxes": drop_degenerate(region["boxes"])}
                       for region in row.get("regions") or []]
            rows.append({**row, "report": " ".join((row.get("report") or "").split()),
                         "regions": regions, "path": str(path.parent / row["image"])})
    if not rows:
        raise InputError(f"{path}: no rows" + (f" with split {split!r}" if split else ""))
    return rows


# ---- boxes as text: integers in [0, 1000], x first, in a fixed order (Sec. 2.0.4) ----------------

NO_BOXES = "none"                                           # not stated in the paper
BOX_PATTERN = re.compile(r"\d{1,4} \d{1,4} \d{1,4} \d{1,4}", re.ASCII)


def boxes_to_text(boxes):
    """[(x0, y0, x1, y1), ...], fractions -> "380 510 780 840; ...", left to right, or "none"."""
    rounded = []
    for x0, y0, x1, y1 in boxes:
        x0, y0 = (min(999, round(1000 * v)) for v in (x0, y0))
        x1, y1 = max(x0 + 1, round(1000 * x1)), max(y0 + 1, round(1000 * y1))  # never empty
        rounded.append((x0, y0, x1, y1))
    # A fixed order, left to right: the decoder need not guess which of several boxes comes first.
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


# ---- prompts (Eq. 2, 3, L_d) and the draw of a task ----------------------------------------------

# Of the last two the paper prints only the beginning: their endings are not stated in the paper.
CAPTIONING_PROMPT = "Report this medical scan."             # P_c
GROUNDING_PROMPT = "Detect all instances of: {phrase}"      # P_g
DENSE_CAPTIONING_PROMPT = "Describe the regions: {boxes}"   # P_d

# tau of L_t and its weight: L_c and L_g,d "contribute equally" (Sec. 2.0.1), so captioning is
# drawn half of the time, grounding and dense captioning a quarter each.
TASK_WEIGHT = {"c": 2, "g": 1, "d": 1}


def possible_tasks(row, objectives="cgd"):
    """The tasks that a row can serve: c needs a report, g and d need a region with boxes."""
    has_boxes = any(region["boxes"] for region in row["regions"])
    return [task for task in TASK_WEIGHT
            if task in objectives and (row["report"] if task == "c" else has_boxes)]


def sample_tasks(report, regions, objectives, n_regions, rng):
    """Draw tau, then its (task, prompt, target) rows: one report, or up to n_regions regions.

    No rows if the image has neither. A row is one sequence of the LLM; those of one image share its
    vision pass, which is why several regions cost little."""
    regions = [region for region in regions if region["boxes"]]
    tasks = possible_tasks({"report": report, "regions": regions}, objectives)
    if not tasks:
        return []
    # Where a task is impossible or not among the objectives, the others share its weight.
    weight = np.array([TASK_WEIGHT[task] for task in tasks], float)
    task = tasks[rng.choice(len(tasks), p=weight / weight.sum())]
    if task == "c":
        return [("c", CAPTIONING_PROMPT, report)]                          # Eq. 2
    chosen = rng.permutation(len(regions))[:n_regions]
    return [location_aware_row(task, regions[i]) for i in chosen]


def location_aware_row(task, region):
    """(task, prompt, target): grounding (Eq. 3, phrase to boxes) or its swap, dense captioning."""
    phrase, boxes = region["phrase"], boxes_to_text(region["boxes"])
    if task == "g":
        return "g", GROUNDING_PROMPT.format(phrase=phrase), boxes          # p(b | I, P_g, s)
    return "d", DENSE_CAPTIONING_PROMPT.format(boxes=boxes), phrase        # p(s | I, P_d, b)


# ---- sentences and sub-reports -------------------------------------------------------------------

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
    """Table 1's images and texts: of each study the first image with a report, and its sub-reports.

    -> images: indices into rows; texts; owner: (texts,) the index in images of each text's image.
    """
    first_of_study = {}
    for i, row in enumerate(rows):
        if row["report"]:
            first_of_study.setdefault(row["study"], i)
    images = list(first_of_study.values())
    pairs = [(n, text) for n, i in enumerate(images) for text in sub_reports(rows[i]["report"])]
    return images, [text for _, text in pairs], np.array([n for n, _ in pairs], int)


# ---- images: any mode to 8-bit grey, and augmentation --------------------------------------------

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def window_levels(values):
    """(h, w) numbers -> (h, w) uint8: percentiles 0.5 to 99.5 to 0..255, as a radiologist does."""
    values = np.nan_to_num(np.asarray(values, np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def load_image(path, size=None):
    """Read an image of any mode as 8-bit grey (PIL "L"), stretched to (size, size) if given.

    path: of a file, or a PIL image. 16-bit, 32-bit and float images, and 8-bit ones that use less
    than a quarter of the range, are windowed by percentiles; transparency is black. Raises
    InputError, with the path, if it cannot be read."""
    try:
        with path.copy() if isinstance(path, Image.Image) else Image.open(path) as image:
            if size and image.format == "JPEG":
                image.draft("L", (size, size))                 # JPEG: decode at 1/2, 1/4 or 1/8
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray(window_levels(image))
            elif "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.composite(image.convert("L"), Image.new("L", image.size),
                                        image.getchannel("A"))
            image = image.convert("L")
    except UNREADABLE as error:
        hint = "; a DICOM file: convert it to PNG first" if is_dicom(path) else ""
        raise InputError(f"{path}: cannot be read as an image ({first_line(error)}){hint}")
    low, high = image.getextrema()
    if 0 < high - low < 64:
        image = Image.fromarray(window_levels(image))
    return image.resize((size, size), Image.Resampling.BILINEAR) if size else image


def augment(image, regions, size, strength, rng):
    """Crop or pad, brighten and contrast an image, and move its boxes along; not stated in the
    paper.

    image: PIL "L" of any size. -> ((size, size) uint8, regions). At strength 1 the window is 0.75
    to 1.25 of the image a side. Never a flip, which would swap left and right. A region that loses
    over a third of a box's area is dropped."""
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


# ---- tokens --------------------------------------------------------------------------------------

PROMPT_TOKENS = 256                     # of a prompt, which is a phrase or some boxes


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
        tokens = plain_ids(tokenizer, text.lower())[:length - 1] + [tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


def prompt_ids(tokenizer, prompt):
    """Prompt, then a line break that parts it from the target (not stated in the paper)."""
    return plain_ids(tokenizer, cut_text(tokenizer, prompt) + "\n")


# ---- dataset and batches -------------------------------------------------------------------------

class ChestXrays:
    """Training samples of manifest rows: a map-style dataset for torch.utils.data.DataLoader.

    Indexed by (epoch, i), which alone fixes the random draws, whatever the order or the workers. A
    sample: {"image": (size, size) uint8, "path": str, "text": str, "tasks": [(task, prompt,
    target), ...]}, or {"bad": message} for an unreadable image if skip_bad is set.

    rows: of read_manifest; objectives: of "scgd"; n_regions: at most, of an image in a step;
    augmented: strength, 0 for none; cached: keep decoded images, for sets that fit in memory."""

    def __init__(self, rows, size, objectives="scgd", n_regions=1, augmented=0.0, cached=False,
                 skip_bad=False, seed=0):
        self.rows, self.size, self.objectives, self.n_regions = rows, size, objectives, n_regions
        self.augmented, self.skip_bad, self.seed = augmented, skip_bad, seed
        self.cache = {} if cached else None

    def __len__(self):
        return len(self.rows)

    def decode(self, i):
        """The decoded image (PIL "L"), at twice the input size if a window of it will be taken."""
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        image = load_image(self.rows[i]["path"], self.size * (2 if self.augmented else 1))
        if self.cache is not None:
            self.cache[i] = image
        return image

    def __getitem__(self, key):
        epoch, i = key
        row, rng = self.rows[i], np.random.default_rng([self.seed, epoch, i])
        try:
            image, regions = self.decode(i), row["regions"]
        except InputError as error:
            if self.skip_bad:
                return {"bad": str(error)}
            raise
        if self.augmented:
            image, regions = augment(image, regions, self.size, self.augmented, rng)
        # T of Eq. 1: sentences of the report; where there is none, the phrases stand in for it.
        sentences = split_sentences(row["report"]) or [r["phrase"] for r in row["regions"]]
        return {"image": np.array(image), "path": row["path"],                 # (S, S) uint8
                "text": " ".join(sample_sentences(sentences, rng)),
                "tasks": sample_tasks(row["report"], regions, self.objectives, self.n_regions, rng)}


class Collate:
    """Samples -> a batch of tensors. B images, R rows of the LLM, L tokens of the longest row.

    image (B, S, S) uint8; text (B, T) ids, if there is a text tokenizer; ids (R, L): prompt,
    target, <eos>, padding; is_target (R, L): target and <eos>; image_of_row (R,); task_of_row (R,):
    index in losses.TASKS; paths: of the images; bad: messages."""

    def __init__(self, text_tokenizer, text_length, llm_tokenizer, max_target):
        self.text_tokenizer, self.text_length = text_tokenizer, text_length
        self.llm_tokenizer, self.max_target = llm_tokenizer, max_target

    def __call__(self, samples):
        import torch

        from losses import TASKS
        bad = [s["bad"] for s in samples if "bad" in s]
        samples = [s for s in samples if "bad" not in s]
        if not samples:
            return {"image": torch.zeros(0), "bad": bad}
        rows = [(i, *task) for i, sample in enumerate(samples) for task in sample["tasks"]]
        ids, is_target = self.pad([(prompt, target) for *_, prompt, target in rows])
        batch = {"image": torch.from_numpy(np.stack([s["image"] for s in samples])),   # (B, S, S)
                 "ids": ids, "is_target": is_target,                                   # (R, L)
                 "image_of_row": torch.tensor([i for i, *_ in rows], dtype=torch.long),
                 "task_of_row": torch.tensor([TASKS.index(task) for _, task, *_ in rows],
                                             dtype=torch.long),
                 "bad": bad, "paths": [s["path"] for s in samples]}
        if self.text_tokenizer:
            batch["text"] = text_ids(self.text_tokenizer, [s["text"] for s in samples],
                                     self.text_length)                                 # (B, T)
        return batch

    def pad(self, pairs):
        """(prompt, target) texts of the R rows -> ids (R, L), is_target (R, L), padded right."""
        import torch
        from torch.nn.utils.rnn import pad_sequence
        ids, is_target = [], []
        for prompt, target in pairs:
            prompt = prompt_ids(self.llm_tokenizer, prompt)
            target = plain_ids(self.llm_tokenizer, target) + [self.llm_tokenizer.eos_token_id]
            target = target[:self.max_target]                  # a target that is cut has no <eos>
            ids.append(torch.tensor(prompt + target))
            is_target.append(torch.arange(len(prompt + target)) >= len(prompt))
        if not pairs:                                          # contrastive learning alone
            return torch.zeros(0, 0, dtype=torch.long), torch.zeros(0, 0, dtype=torch.bool)
        return (pad_sequence(ids, batch_first=True, padding_value=self.llm_tokenizer.pad_token_id),
                pad_sequence(is_target, batch_first=True, padding_value=False))


# ==================================================================================================
# Nothing below is needed to read the paper: pictures, the phantom, converters, the check, commands.
# ==================================================================================================


# ---- reading a manifest: what is checked ---------------------------------------------------------

ROW_KEYS = ("image", "study", "patient", "split", "report", "regions")
REGION_KEYS = ("phrase", "boxes")


def parse_line(line):
    """A line of a manifest -> (JSON value, None), or (None, what is invalid about it)."""
    try:
        line.encode()                                          # a wrong byte was read as surrogate
        row = json.loads(line)
        if "\\u" in line:                                      # half a surrogate pair is no text
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return None, f"not UTF-8 text ({error.reason}); save the file as UTF-8"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {first_line(error)}"
    return row, None


def scan_manifest(data):
    """Yield (line number, row or None, problem or None) for each line of a manifest."""
    path, first = manifest_path(data), True
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):
                yield number, None, "a JSON array, expected one JSON object a line (JSON Lines)"
                return
            first = False
            row, problem = parse_line(line)
            yield number, row, problem or row_problem(row, path.parent)


def row_problem(row, folder):
    """What is invalid about a row of the manifest, in words; None if it is valid."""
    if not isinstance(row, dict):
        return f"expected a JSON object, got {type(row).__name__}"
    for key in ("image", "study", "patient", "split"):
        if not (isinstance(row.get(key), str) and row[key]):
            return f"{key!r} is {row.get(key)!r:.80}, expected text"
    if row["split"] not in SPLITS:
        return f"'split' is {row['split']!r:.80}, expected one of {', '.join(SPLITS)}"
    for key, kind, words in (("report", str, "text"), ("regions", list, "a list")):
        if not isinstance(row.get(key), (kind, type(None))):
            return f"{key!r} is {row[key]!r:.80}, expected {words}"
    for region in row.get("regions") or []:
        if not isinstance(region, dict) or not isinstance(region.get("boxes"), list) \
                or not isinstance(region.get("phrase"), str) or not region["phrase"].strip():
            return (f"region {region!r:.120}, expected {{'phrase': text, "
                    "'boxes': [[x0, y0, x1, y1], ...]}")
        for box in region["boxes"]:
            if problem := box_problem(box):
                return (f"box {box!r:.120} of {region['phrase']!r:.80} {problem}; "
                        "expected [x0, y0, x1, y1] in [0, 1]")
    if not (folder / row["image"]).is_file():
        return f"image {folder / row['image']} does not exist"
    return None


def find_row(rows, image):
    """The row whose image is this file or, by its bytes, a copy of it; None if there is none."""
    places, size = {os.path.abspath(image), os.path.realpath(image)}, os.path.getsize(image)
    for row in rows:
        if os.path.abspath(row["path"]) in places:
            return row
    for row in rows:
        if os.path.getsize(row["path"]) == size and filecmp.cmp(row["path"], image, shallow=False):
            return row
    return None


def is_dicom(path):
    """Whether a file has DICOM's mark, after 128 bytes, or its suffix."""
    with contextlib.suppress(OSError, TypeError):              # TypeError: path is a PIL image
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM" or str(path).lower().endswith(".dcm")
    return False


# ---- text: long prompts, and a tokenizer for models trained from scratch -------------------------

def cut_text(tokenizer, text, length=PROMPT_TOKENS):
    """Cut a text to its first `length` tokens; the first time, say so on stderr."""
    if len(text.encode()) <= length:                           # a token has at least one byte
        return text
    ids = plain_ids(tokenizer, text)
    if len(ids) <= length:
        return text
    say_once(f"note: a prompt of over {length} tokens is cut to its first {length}")
    return tokenizer.decode(ids[:length])


@functools.cache
def say_once(text):
    """Print a line on stderr, once a process."""
    print(text, file=sys.stderr)


def learn_tokenizer(texts, vocab_size):
    """A byte-level BPE tokenizer learned from texts, for towers trained from scratch.

    Digits are never merged, so that a coordinate is one token a digit, as in Gemma's tokenizer."""
    from transformers import GPT2Tokenizer
    bytes_only = GPT2Tokenizer(pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
                               unk_token="<unk>")
    texts = [re.sub(r"\d", " ", text) for text in texts]
    # Lower case too: the text encoder reads nothing else.
    return bytes_only.train_new_from_iterator(texts + [t.lower() for t in texts], vocab_size,
                                              show_progress=False)


def tokenizer_texts(rows):
    """What a tokenizer is learned from: the prompts, reports and phrases of the training split."""
    prompts = [CAPTIONING_PROMPT, GROUNDING_PROMPT, DENSE_CAPTIONING_PROMPT] * 100
    return prompts + [r["report"] for r in rows] + [g["phrase"] for r in rows for g in r["regions"]]


# ---- pictures of images with their boxes ---------------------------------------------------------

def draw_boxes(image, regions):
    """Draw boxes, and the start of their phrases above them, on an image (PIL "RGB"), in place."""
    pen, (w, h), font = ImageDraw.Draw(image), image.size, ImageFont.load_default(13)
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


# ---- work in parallel ----------------------------------------------------------------------------

def map_ahead(pool, function, items, ahead):
    """Yield function(item) in order from an executor, which is at most `ahead` items ahead.

    So neither the items nor the results of a large set are all in memory at once."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def start_worker():
    """A worker process leaves Ctrl-C to its parent, and ends with it even if that is killed."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def map_processes(function, items, workers):
    """Yield function(item) in order, from a process pool if there is more than one worker."""
    if workers == 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            yield from map_ahead(pool, function, items, 2 * workers)
        except BrokenProcessPool:
            raise InputError("a worker process was killed, perhaps because memory ran out; run the "
                             "same command with fewer --workers: it continues where it was")


# ---- the phantom: drawn chest X-rays -------------------------------------------------------------
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
BODY_WIDTH, BODY_SHIFT = (.70, 1.06), .12                       # fractions of the image; each way


class Canvas:
    """A chest X-ray being drawn: (n, n) brightness, and the frame that places the body on it."""

    def __init__(self, rng, n):
        self.rng, self.n = rng, n
        self.scale = rng.uniform(*BODY_WIDTH) / 2 * np.array([1, rng.uniform(.9, 1.12)])
        self.centre = .5 + rng.uniform(-BODY_SHIFT, BODY_SHIFT, 2)
        self.pixels = np.full((n, n), 14, np.float32)

    def position(self):
        """The sentence that says how the body lies in the image: how much of its width it takes,
        and where its middle is, each by thirds of the range. Right and left are the patient's."""
        def third(value, low, high, *words):
            return words[min(2, int(3 * (value - low) / (high - low)))]
        x, y = self.centre - .5
        return POSITION.format(
            view=third(2 * self.scale[0], *BODY_WIDTH, "Wide", "Standard", "Close"),
            y=third(y, -BODY_SHIFT, BODY_SHIFT, "high", "level", "low"),
            x=third(x, -BODY_SHIFT, BODY_SHIFT, "right", "central", "left"))

    def place(self, points):
        """Body frame -> fractions of the image."""
        return self.centre + self.scale * np.asarray(points, float)

    def mask(self, *shapes, blur=0, line=0):
        """Filled polygons, or lines of that width (image fraction), blurred: (n, n) in [0, 1]."""
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
        """The manifest's box around points of the body frame, clipped to the image."""
        points = self.place(points).clip(0, 1)
        return [round(float(v), 4) for v in (*points.min(0), *points.max(0))]


def mirror(points, side="left"):
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


def draw_anatomy(canvas, heart):
    """Body, lungs, spine, trachea, ribs, clavicles, vessels and heart (its outline is given)."""
    rng, wide = canvas.rng, 2 * canvas.scale[0]
    torso = [(-.30, -1.3), (-.34, -.98), (-.86, -.82), (-1.02, -.3), (-.95, 1.6)]
    canvas.add(canvas.mask(torso + mirror(torso)[::-1], blur=.02), rng.uniform(118, 138))
    lungs = canvas.mask(RIGHT_LUNG, mirror(RIGHT_LUNG), blur=.008)
    canvas.add(lungs, -rng.uniform(82, 92))
    canvas.add(canvas.mask([(-.10, -1.1), (.10, -1.1), (.12, 1.3), (-.12, 1.3)], blur=.02), 38)
    trachea = [(-.035, -1.1), (.035, -1.1), (.03, -.42), (-.03, -.42)]
    canvas.add(canvas.mask(trachea, blur=.008), -26)
    ribs = [[(-.10, y - .05), (-.32, y - .10), (-.55, y - .02), (-.72, y + .16)]
            for y in np.arange(-.66, .5, .155)]
    canvas.add(canvas.mask(*ribs, *map(mirror, ribs), blur=.004, line=.016 * wide), 13)
    clavicle = [(-.08, -.60), (-.35, -.70), (-.74, -.80)]
    canvas.add(canvas.mask(clavicle, mirror(clavicle), blur=.004, line=.03 * wide), 24)
    roots = [(-.2, y) for y in rng.uniform(-.15, .1, 14)]
    vessels = [[(x, y), (x - rng.uniform(.1, .36), y + rng.uniform(-.4, .3))] for x, y in roots]
    vessels = vessels[:7] + list(map(mirror, vessels[7:]))
    canvas.add(canvas.mask(*vessels, blur=.006, line=.012) * lungs, 20)
    canvas.add(canvas.mask(heart, blur=.014), 66)


def place_in_zone(canvas, side, zone):
    """Where in a zone a finding sits, anywhere in it: its centre in the body frame."""
    x = canvas.rng.uniform(-.55, -.30)
    return (x if side == "right" else -x), ZONES[zone] + canvas.rng.uniform(-.14, .14)


def draw_nodule(canvas, side, zone, width):
    outline = ellipse(*place_in_zone(canvas, side, zone), width / 2, width / 2)
    canvas.add(canvas.mask(outline, blur=.006), 112)
    return outline


def draw_cavity(canvas, side, zone, width):
    x, y = place_in_zone(canvas, side, zone)
    outline = ellipse(x, y, width / 2, width / 2 * canvas.rng.uniform(.8, 1.2))
    inside = (outline - (x, y)) * .55 + (x, y)
    canvas.add(canvas.mask(outline, blur=.005) - canvas.mask(inside, blur=.005), 112)
    canvas.add(canvas.mask(inside, blur=.005), -30)
    return outline


def draw_consolidation(canvas, side, zone, width):
    rng, (x, y) = canvas.rng, place_in_zone(canvas, side, zone)
    wobble = 1 + .12 * np.sin(np.arange(28) / 28 * 2 * np.pi * rng.integers(3, 6)
                              + rng.uniform(0, 6))
    outline = ellipse(x, y, .62 * width, .62 * width * rng.uniform(.55, .85), wobble)
    canvas.add(canvas.mask(outline, blur=.012) * (1 + noise(rng, 24, canvas.n, .3)), 66)
    return outline


def draw_effusion(canvas, side, _, width):
    top = .50 - 1.5 * (width - .12) * canvas.rng.uniform(.9, 1.1)
    outline = mirror([(-.75, top), (-.62, top + .10), (-.40, top + .16), (-.15, top + .17),
                      (-.13, .52), (-.74, .58)], side)
    canvas.add(canvas.mask(outline, blur=.010), 92)
    return outline


def draw_pneumothorax(canvas, side, _, width):
    rng = canvas.rng
    edge, base = width * rng.uniform(.6, .8), -.78 + 2 * width * rng.uniform(.95, 1.05)
    line = [(-.20, -.70 + edge), (-.40, -.62 + edge), (-.60 + .4 * edge, -.40 + edge), (-.70, base)]
    outline = mirror([(-.14, -.66), (-.26, -.76), (-.42, -.72), (-.58, -.48), (-.68, -.12)]
                     + line[::-1], side)
    canvas.add(canvas.mask(outline, blur=.004), -48)
    canvas.add(canvas.mask(mirror(line, side), blur=.002, line=.012), 70)
    return outline


def draw_pacemaker(canvas, side, *_):
    rng = canvas.rng
    x, y = rng.uniform(-.70, -.36), rng.uniform(-.72, -.30)
    outline = mirror(ellipse(x, y, rng.uniform(.20, .26), rng.uniform(.16, .21)), side)
    lead = mirror([(x, y), (-.16, y - .1), (-.02, -.1), (-.10 if side == "right" else .10, .38)],
                  side)
    canvas.add(canvas.mask(lead, blur=.002, line=.009), 80)
    canvas.add(canvas.mask(outline, blur=.003), 120)
    return outline


DRAW = {"nodule": draw_nodule, "cavity": draw_cavity, "consolidation": draw_consolidation,
        "effusion": draw_effusion, "pneumothorax": draw_pneumothorax, "pacemaker": draw_pacemaker}


def choose_findings(rng):
    """1 to 3 findings, each as (kind, side, zone, size); a zone, pleura or organ is used once."""
    taken, findings, n_findings = set(), [], rng.choice([1, 2, 3], p=[.15, .65, .2])
    while len(findings) < n_findings:
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
    canvas, findings = Canvas(rng, n), choose_findings(rng)
    degree = dict(zip(SIZES, HEART))
    kinds = {kind: size for kind, _, _, size in findings}
    border = HEART[degree[kinds["heart"]]] if "heart" in kinds else .46
    left, top, bottom = -.22 - .3 * (border - .46), -.02, .54
    heart = ellipse((left + border) / 2, (top + bottom) / 2,
                    (border - left) / 2, (bottom - top) / 2)
    draw_anatomy(canvas, heart)
    regions = []
    for kind, side, zone, size in findings:
        width = SIZES[size] * rng.uniform(.94, 1.06)
        phrase = FINDINGS[kind].format(side=side, zone=zone, Size=size.capitalize(),
                                       degree=degree[size])
        outline = heart if kind == "heart" else DRAW[kind](canvas, side, zone, width)
        regions.append({"phrase": phrase, "boxes": [canvas.box(outline)]})
    absent = rng.permutation([kind for kind in FINDINGS if kind not in kinds])
    sentences = [r["phrase"] for r in regions] + [ABSENT[kind] for kind in absent]
    sentences = sentences[:SENTENCES]
    if rng.integers(2):
        sentences.append(canvas.position())
    report = " ".join(rng.permutation(sentences))
    pixels = (canvas.pixels * rng.uniform(.85, 1.1)
              + noise(rng, 2 * n // 3, n, 8) + noise(rng, 5, n, 6))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), report, regions


def write_phantom(job):
    """Draw phantom i of a split and save its image; a process pool's task. Returns the row."""
    out, split, i, seed = job
    image, report, regions = draw_phantom(np.random.default_rng([seed, SPLITS.index(split), i]))
    name = f"images/{split}_{i:05d}.png"
    image.save(out / name, compress_level=1)
    study = f"{split}{i:05d}"
    return {"image": name, "study": study, "patient": study, "split": split,
            "report": report, "regions": regions}


PHANTOM_SIZES = {"train": 16000, "val": 50, "test": 400}


def make_phantom(out, sizes=PHANTOM_SIZES, seed=0, quiet=False):
    """Write a phantom data set to a new folder, the same for the same seed. Returns the folder.

    It is drawn in a folder of its own and renamed: a killed run leaves no half phantom, and of two
    runs at once the first to finish is kept."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        draft = Path(folder, "phantom")                        # its mode is the umask's
        (draft / "images").mkdir(parents=True)
        jobs = [(draft, split, i, seed) for split, n in sizes.items() for i in range(n)]
        with (ProcessPoolExecutor(min(8, os.cpu_count()), initializer=start_worker) as pool,
              open(draft / "manifest.jsonl", "w") as manifest):
            for row in tqdm(pool.map(write_phantom, jobs, chunksize=50), "phantom", len(jobs),
                            unit="image", disable=quiet):
                manifest.write(json.dumps(row) + "\n")
        try:
            draft.rename(out)
        except OSError:
            if not (out / "manifest.jsonl").exists():
                raise
    return out


def is_whole_phantom(folder, sizes=PHANTOM_SIZES):
    """Whether a folder has a manifest with as many rows of each split as make_phantom writes."""
    try:
        with open(manifest_path(folder)) as lines:
            found = Counter(json.loads(line)["split"] for line in lines)
    except (ValueError, KeyError, TypeError, OSError):
        return False
    return all(found[split] == n for split, n in sizes.items())


# ---- converters: sources read in place, a line or a member at a time -----------------------------

DAMAGED = (OSError, EOFError, ValueError, RuntimeError, KeyError, TypeError, csv.Error,
           struct.error, zlib.error, zipfile.BadZipFile)


@contextlib.contextmanager
def reading(path):
    """Turn whatever goes wrong inside with a source into an InputError that names it."""
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read to its end ({reason}); is the path right and the "
                         "download complete?")


@contextlib.contextmanager
def open_text(path):
    """A text file, plain, .gz or the one .csv of a .zip, without its byte order mark."""
    suffix = Path(path).suffix
    with reading(path), contextlib.ExitStack() as stack:
        if suffix == ".zip":
            names, take = members(path, ".csv")
            raw = io.BytesIO(take(names[min(names)]))
        else:
            raw = stack.enter_context((gzip.open if suffix == ".gz" else open)(path, "rb"))
        yield io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")


def csv_rows(path, *columns, ragged=False):
    """Yield the rows of a table as dicts; short ones, filled with "", only if ragged.

    Raises InputError if one of the columns is missing."""
    csv.field_size_limit(1 << 30)                              # CheXmask: a mask is one field
    with open_text(path) as text:
        table = csv.DictReader(text, restval="" if ragged else None)
        names = table.fieldnames or []
        if missing := [name for name in columns if name not in names]:
            raise InputError(f"{path}: no column {missing[0]!r}, expected one; it has "
                             f"{', '.join(names)[:200]}")
        for row in tqdm(table, Path(path).name, unit="row"):
            if None in row.values():                           # DictReader's mark of a short row
                raise InputError(f"{path}:{table.line_num}: expected {len(names)} fields, got "
                                 f"fewer; is the download complete?")
            yield row


def json_items(path, chunk=1 << 20, limit=1 << 26):
    """Yield the objects of a JSON array, with bare NaN if need be; only a piece is in memory."""
    decoder, at, number = json.JSONDecoder(), 1, 1
    with open_text(path) as file:
        text = file.read(chunk).lstrip()
        if not text.startswith("["):
            raise InputError(f"{path}: expected a JSON array, got {text[:20]!r}")
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()
            if text.startswith("]", at):
                return
            try:
                item, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                more = file.read(chunk)
                if not more or len(text) - at > limit:
                    raise InputError(f"{path}: item {number} is cut short or not JSON "
                                     f"({error.msg}); is the download complete?")
                text, at = text[at:] + more, 0
                continue
            if not isinstance(item, dict):
                raise InputError(f"{path}: item {number} is {item!r:.40}, expected an object")
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
        raise InputError(f"{path}: no *{suffix} in it; expected a folder or a zip with some")

    def take(member):
        with reading(f"{path}: {member}"):
            return archive.read(member) if archive else member

    return names, take


def find(folder, *patterns):
    """The first file of a pattern in a folder or one level below (releases differ), or None."""
    places = (place for pattern in patterns for place in (pattern, f"*/{pattern}"))
    return next((path for place in places for path in sorted(Path(folder).glob(place))), None)


def one_line(text):
    """Text with its white space collapsed; "" for anything else (None, NaN)."""
    return " ".join(text.split()) if isinstance(text, str) else ""


def official_split(value, path):
    """The manifest's name of a split as its authors spell it."""
    names = {"validate": "val", "validation": "val"} | {split: split for split in SPLITS}
    if value not in names:
        raise InputError(f"{path}: split {value!r}, expected one of {', '.join(names)}")
    return names[value]


# ---- converters: steps they share ----------------------------------------------------------------

def weighted_boxes_fusion(boxes, iou):
    """Merge boxes that overlap into their mean (Solovyev et al. 2021; scores 1, one source).

    From the last box to the first: it joins the fused box of highest IoU, if that is above `iou`,
    or opens a new one. (N, 4) -> (M, 4), left to right. (0, 0, .4, .4) and (.2, 0, .6, .4), of
    IoU 1/3, give (.1, 0, .5, .4) at 0.3 and themselves at 0.4. Empty boxes are dropped."""
    joined, fused = [], []
    for box in reversed(drop_degenerate(boxes)):
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
    """Boxes in units of scale (w, h) -> a region, or None if no box is left in the image.

    Boxes are clipped and, with iou, fused; they, and a pair that is dropped, are counted."""
    if not phrase:
        funnel["pairs", "no text", split] += 1
        return None
    try:
        fractions = np.array(boxes, float).reshape(-1, 4) / (*scale, *scale)
    except (TypeError, ValueError):
        raise InputError(f"{phrase!r} has boxes {boxes}, expected lists of 4 numbers")
    if scale == (1, 1) and (fractions > 2).any():
        raise InputError(f"{phrase!r} has boxes {boxes}, expected fractions, got pixels")
    inside = drop_degenerate(fractions.clip(0, 1).round(5).tolist())
    fused = inside if iou is None else weighted_boxes_fusion(inside, iou)
    funnel.update({("boxes", "in", split): len(boxes),
                   ("boxes", "degenerate box", split): len(boxes) - len(inside),
                   ("boxes", "merged", split): len(inside) - len(fused)})
    if not fused:
        funnel["pairs", "degenerate box" if len(boxes) else "no box", split] += 1
        return None
    return {"phrase": phrase, "boxes": [[round(v, 5) for v in box] for box in fused]}


def shrink(job):
    """Write an image as an 8-bit JPEG, its short side `size` pixels, unless it is smaller.

    job: (path or bytes, where to write or None, size, (w, h) or None). -> (w, h), of the original
    where not given; or, as text, why there is none. Raises InputError if it cannot be written."""
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
                image = load_image(image).resize(small, Image.Resampling.BILINEAR)
    except FileNotFoundError:
        return "no image"
    except UNREADABLE:
        return "unreadable image"
    if target:
        write_file(target, lambda draft: image.save(draft, "JPEG", quality=95))
    return scale


class Conversion:
    """A run of a converter: where it writes, what it counts (the funnel) and what it does without.

    funnel: {(table, reason, split): n}, table one of images, pairs and boxes. "in" is what came
    in, "out" what is left; every other reason says why something was dropped."""

    def __init__(self, args):
        self.command, self.out, self.size = args.command, args.out, args.size
        self.workers, self.funnel, self.lost = args.workers, Counter(), []
        self.arguments = {name: str(value) for name, value in vars(args).items() if name != "run"}
        for flag, value, least, most in (("--size", args.size, 0, 1 << 16),
                                         ("--workers", args.workers, 1, 1 << 16),
                                         ("--wbf-iou", getattr(args, "wbf_iou", 0), 0, 1)):
            if not least <= value <= most:
                raise InputError(f"{flag} {value}: expected a number from {least} to {most}")
        notes = self.out / "prepare.json"
        with reading(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            mine = notes.exists() and f'"command": "{self.command}"' in notes.read_text()
        for path in (self.out / "manifest.jsonl", notes, self.out / "LICENSES.csv"):
            if path.exists() and not mine:
                raise InputError(f"{path}: exists and was not written by {self.command}; choose "
                                 "another --out")
            check_output(path, filter(os.path.isfile, self.arguments.values()))

    def admit(self, row, reason):
        """Count a row that came in, and why it is dropped -> whether it stays."""
        self.funnel["images", "in", row["split"]] += 1
        if reason:
            self.funnel["images", reason, row["split"]] += 1
        return not reason

    def prepare_images(self, rows, take=str):
        """Give each row its image, shrunk once into --out, or the original's path; drop those
        without.

        row["name"]: where to write, below a folder that names the size; row["source"]: what take()
        turns into a path or bytes; row["scale"]: units of its boxes, (w, h), None for the image's.
        """
        def job(row):
            target = self.out / row["image"] if self.size else None
            return (take(row["source"]), target if target and not target.exists() else None,
                    self.size, row["scale"])

        for row in rows:
            row["image"] = (f"images_{self.size}/{row['name']}" if self.size else
                            os.path.abspath(row["source"]))
        todo = [row for row in rows if not (self.size and row["scale"]
                                            and (self.out / row["image"]).exists())]
        done = map_processes(shrink, map(job, todo), self.workers if self.size else 1)
        for result, row in zip(tqdm(done, "images", len(todo), unit="image"), todo):
            if not isinstance(result, str):
                row["scale"] = result
                continue
            row["image"] = None
            self.funnel["images", result, row["split"]] += 1
            if result == "unreadable image":
                tqdm.write(f"unreadable image: {row['source']}")
        return [row for row in rows if row["image"]]

    def add_regions(self, rows):
        """Turn the pairs of rows, (phrase, boxes in units of scale), into regions."""
        for row in rows:
            self.funnel["pairs", "in", row["split"]] += len(row["pairs"])
            regions = [make_region(phrase, boxes, row["scale"], row["split"], self.funnel)
                       for phrase, boxes in row["pairs"]]
            row["regions"] = [region for region in regions if region]

    def finish(self, rows, published):
        """Print the funnel and what is missing; write prepare.json, then manifest.jsonl.

        published: {"table reason": a count of the paper or of the data set's page}."""
        for split in SPLITS:
            for name, n in count_rows(rows, split).items():
                self.funnel["out", name, split] = n
        tables = {}
        for table in ("images", "pairs", "boxes", "out"):
            reasons = dict.fromkeys(reason for t, reason, _ in self.funnel if t == table)
            if reasons:
                tables[table] = {reason: {s: self.funnel[table, reason, s] for s in SPLITS}
                                 for reason in reasons}
        print(format_table([("", *SPLITS)] + [
            (f"{table} {reason}", *(f"{n:,}" for n in by_split.values()))
            for table, reasons in tables.items() for reason, by_split in reasons.items()]))
        for name, count in published.items():
            print(f"published, {name}: {count}")
        for loss in self.lost:
            print(f"missing: {loss}")
        if not rows:
            raise InputError(f"{self.out}: no image is left, see the counts above; nothing written")
        write_json(self.out / "prepare.json", {
            "command": self.command, "arguments": self.arguments, "lost": self.lost,
            "funnel": tables, "published": published})
        def write_rows(draft):                                 # row by row: some sets are large
            with open(draft, "w") as file:
                file.writelines(json.dumps({key: row[key] for key in ROW_KEYS}) + "\n"
                                for row in rows)
        write_file(self.out / "manifest.jsonl", write_rows)
        print(f"wrote {self.out / 'manifest.jsonl'}; next: python data.py check {self.out}")


def count_rows(rows, split):
    """{what: how many} of a split's rows."""
    rows = [row for row in rows if row["split"] == split]
    boxed = [row for row in rows if row["regions"]]
    pairs = [region for row in rows for region in row["regions"]]
    return {"images": len(rows), "boxed images": len(boxed),
            "studies": len({row["study"] for row in rows}),
            "boxed studies": len({row["study"] for row in boxed}),
            "patients": len({row["patient"] for row in rows}),
            "reports": sum(bool(row["report"]) for row in rows),
            "pairs": len(pairs), "boxes": sum(len(pair["boxes"]) for pair in pairs)}


# ---- converters: MIMIC-CXR -----------------------------------------------------------------------

METHODS = ("gpt4", "rule-based")
LLAVA_RAD = {"train": "chat_train_*.json", "val": "chat_dev_*.json", "test": "chat_test_*.json"}
RATINGS = {"A++": ("A_frontal", "App"), "A+": ("A_frontal", "Ap"), "A": ("A_frontal", None),
           "B": ("B_frontal", None)}           # export, and its table of those rated so or better
MIMIC_PATH = re.compile(r"(p\d+)/(s\d+)/([^/]+)\.jpg$")
MIMIC_PUBLISHED = {"images in": "400,042 + 3,238 + 2,461 (LLaVA-Rad)",
                   "out images": "237,972 + 1,959 + 3,403 before the quality filter (LLaVA-Rad)",
                   "out studies": "2,432 of test (LoFi)", "out boxed studies": "169,441 (LoFi)",
                   "out pairs": "394,835 (LoFi)"}


def mimic_table(run, images, kind, loss, *columns):
    """Rows of a table of MIMIC-CXR-JPG; without it none, and a note of what is lost."""
    if not (Path(images) / "files").is_dir():
        raise InputError(f"{images}: has no folder 'files'; --images expects the root of "
                         "MIMIC-CXR-JPG (files/p10/p10000032/s50414267/ID.jpg)")
    if path := find(images, f"mimic-cxr-2*-{kind}.csv*"):
        return csv_rows(path, *columns)
    run.lost.append(f"{loss} (no mimic-cxr-2.0.0-{kind}.csv.gz in {images})")
    return []


def mimic_splits(run, images, loss="the official splits"):
    """{dicom id: split}."""
    table = mimic_table(run, images, "split", loss, "dicom_id", "split")
    return {row["dicom_id"]: official_split(row["split"], images) for row in table}


def mimic_views(run, images):
    """{dicom id: (view, (w, h))}; Columns and Rows, so that a tree of copies that were shrunk
    before serves as well: boxes are in pixels of the originals."""
    table = mimic_table(run, images, "metadata", "the official views and image sizes; LLaVA-Rad's "
                        "and the files' are used", "dicom_id", "ViewPosition", "Columns", "Rows")
    views = {}
    with reading(images):
        for row in table:
            w, h = row["Columns"], row["Rows"]
            views[row["dicom_id"]] = (sys.intern(row["ViewPosition"]),
                                      (float(w), float(h)) if w and h else None)
    return views


def good_masks(path):
    """Dicom ids of which CheXmask's table says that the masks, and so the image, are good."""
    with reading(path):
        return {row["dicom_id"] for row in csv_rows(path, "dicom_id", "Dice RCA (Mean)")
                if row["Dice RCA (Mean)"] and float(row["Dice RCA (Mean)"]) >= 0.7}


def mimic_row(images, path, where):
    """An image of MIMIC-CXR-JPG by ".../p10000032/s50414267/ID.jpg" -> the beginning of its row."""
    if not (found := MIMIC_PATH.search(str(path))):
        raise InputError(f"{where}: image {path!r}, expected .../p10000032/s50414267/ID.jpg")
    patient, study, dicom = found.groups()
    name = f"{patient[:3]}/{found[0]}"
    return {"study": study, "patient": patient, "dicom": dicom, "name": name, "regions": [],
            "report": "", "source": f"{images}/files/{name}"}


def method_of(run, path, asked):
    """The texts to take from a file: those asked for, or the others where it has none of them (the
    test split has no gpt4 texts)."""
    if any(entry.get("generate_method") == asked for entry in json_items(path)):
        return asked
    other = "rule-based" if asked == "gpt4" else "gpt4"
    run.lost.append(f"{asked} texts of {path.name}, which has none: its {other} texts are used")
    return other


def mimic_report(entry):
    """Findings and impression of an entry of LLaVA-Rad (Sec. 3.0.1), either may be missing."""
    findings = [turn.get("value") for turn in (entry.get("conversations") or [])[1:2]]
    return " ".join(filter(None, map(one_line, [*findings, entry.get("impression")])))


def mimic_rows(run, path, method, images, default_split, tables):
    """Yield a row for each frontal image of good quality in a file of LLaVA-Rad, with its text."""
    (splits, views, good), seen = tables, set()
    for entry in tqdm(json_items(path), path.name, unit="item"):
        row = mimic_row(images, entry.get("image"), path)
        dicom = row["dicom"]
        view, row["scale"] = views.get(dicom, (entry.get("view"), None))
        row["split"], row["report"] = splits.get(dicom, default_split), mimic_report(entry)
        reason = ("other method" if entry.get("generate_method") != method else
                  "view" if view not in ("PA", "AP") else
                  "quality" if good is not None and dicom not in good else
                  "no text" if not row["report"] else
                  "repeated image" if dicom in seen else None)
        if run.admit(row, reason):
            seen.add(dicom)
            yield row


def open_qba(root, rating):
    """Question files of MIMIC-Ext-CXR-QBA -> members, and {study: ids of the questions rated so or
    better}, None for all."""
    export, table = RATINGS[rating]
    folder = find(root, f"exports/{export}", export)
    path = folder and find(folder, "qa.zip", "qa")
    if not path:
        raise InputError(f"{root}: no exports/{export}/qa.zip; --qba expects the root of "
                         "MIMIC-Ext-CXR-QBA")
    if not table:
        return members(path, ".qa.json"), None
    rated = find(folder, f"metadata/{table}/question_metadata.csv*")
    if not rated:
        raise InputError(f"{folder}: no metadata/{table}/question_metadata.csv.gz, the questions "
                         f"that --rating {rating} keeps")
    questions = defaultdict(set)
    for row in csv_rows(rated, "study_id", "question_id"):
        study = "s" + row["study_id"].removeprefix("s")
        questions[study].add(sys.intern(row["question_id"]))
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
        raise InputError(f"{name}: not a file of questions ({error}); is the download complete?")
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


def add_qba(run, rows, files, rated, iou):
    """Give rows the text-box pairs of their studies."""
    (names, take), studies = files, defaultdict(list)
    for row in rows:
        studies[row["study"]].append(row)
    found = [study for study in studies if f"{study}.qa.json" in names]
    if len(found) < len(studies):
        run.lost.append(f"text-box pairs of {len(studies) - len(found):,} studies that have no "
                        "questions")
    jobs = ((study, take(names[f"{study}.qa.json"]), rated and rated.get(study, ()),
             studies[study][0]["split"], {row["dicom"]: row["scale"] for row in studies[study]},
             iou) for study in found)
    results = tqdm(map_processes(study_regions, jobs, run.workers), "boxes", len(found),
                   unit="study")
    for (regions, counts), study in zip(results, found):
        run.funnel.update(counts)
        for row in studies[study]:
            row["regions"] = list(regions[row["dicom"]].values())


def prepare_mimic_cxr(args):
    """MIMIC-CXR-JPG, LLaVA-Rad, CheXmask and MIMIC-Ext-CXR-QBA -> a manifest (Sec. 3.0.1)."""
    run, rows = Conversion(args), []
    texts = {split: find(args.llava_rad, pattern) for split, pattern in LLAVA_RAD.items()}
    for split, path in texts.items():                          # wrong folders are said at once
        if not path:
            raise InputError(f"{args.llava_rad}: no {LLAVA_RAD[split]}; --llava-rad expects the "
                             "folder of the LLaVA-Rad MIMIC-CXR annotations")
    qba = open_qba(args.qba, args.rating) if args.qba else None
    tables = (mimic_splits(run, args.images), mimic_views(run, args.images),
              good_masks(args.chexmask) if args.chexmask else None)
    for split, path in texts.items():
        method = method_of(run, path, args.method)
        rows += mimic_rows(run, path, method, args.images, split, tables)
    rows = run.prepare_images(rows)
    if qba:
        add_qba(run, rows, *qba, args.wbf_iou)
    if not args.chexmask:
        run.lost.append("the quality filter of images (no --chexmask)")
    if not qba:
        run.lost.append("text-box pairs, so grounding and dense captioning (no --qba)")
    run.finish(rows, MIMIC_PUBLISHED)


# ---- converters: PadChest-GR and MS-CXR ----------------------------------------------------------

PADCHEST_PUBLISHED = {"images in": "4,555", "out boxed images": "2,404 of the pool, 604 of test "
                      "(LoFi)", "out pairs": "4,979 of the pool, 2,404 of test (LoFi)"}
MS_CXR_PUBLISHED = {"boxes in": "1,448", "out images": "1,047", "out pairs": "1,162"}


def padchest_splits(run, table, official_val):
    """{ImageID: (split, patient)}. The paper's pool is train + validation: both are "train" here,
    unless official_val."""
    if not table:
        run.lost.append("splits and patients, all rows are of train (no --table)")
        return {}
    splits = {}
    for row in csv_rows(table, "ImageID", "split", "PatientID"):
        split = official_split(row["split"], table)
        pooled = "train" if split == "val" and not official_val else split
        splits[row["ImageID"]] = pooled, row["PatientID"]
    return splits


def padchest_rows(run, reports, names, splits):
    """Yield a row a study of the grounded reports: all its sentences, and the boxed as pairs."""
    for entry in tqdm(json_items(reports), Path(reports).name, unit="item"):
        image = str(entry.get("ImageID"))
        study = str(entry.get("StudyID") or image)
        split, patient = splits.get(image, ("train", study))
        pairs = [(one_line(f.get("sentence_en")), f.get("boxes") or [])
                 for f in entry.get("findings") or []]
        sentences = [s if s[-1] in ".!?" else s + "." for s, _ in pairs if s]
        reason = ("not in table" if splits and image not in splits else
                  "no text" if not sentences else "no image" if image not in names else None)
        row = {"study": study, "patient": patient or study, "split": split,
               "report": " ".join(sentences), "pairs": pairs, "scale": (1, 1),
               "name": f"{Path(image).stem}.jpg", "source": names.get(image)}
        if run.admit(row, reason):
            yield row


def prepare_padchest_gr(args):
    """PadChest-GR -> a manifest (Sec. 3.0.1)."""
    run = Conversion(args)
    names, take = members(args.images, ".png")
    if not args.size and not Path(args.images).is_dir():
        raise InputError(f"{args.images}: --size 0 keeps the originals, which cannot stay inside a "
                         "zip; unzip it and give the folder, or give a --size")
    splits = padchest_splits(run, args.table, args.official_val)
    rows = run.prepare_images(list(padchest_rows(run, args.reports, names, splits)), take)
    run.add_regions(rows)
    run.finish(rows, PADCHEST_PUBLISHED)


def ms_cxr_rows(run, images, table, splits):
    """Rows of MS-CXR, an image each; its table has a line a box, in x, y, width and height."""
    rows, boxes_of = {}, defaultdict(list)
    columns = ("path", "category_name", "label_text", "image_width", "image_height", *"xywh")
    for line in csv_rows(table, *columns):
        row, path = mimic_row(images, line["path"], table), line["path"]
        row["split"] = official_split(line.get("split") or splits.get(row["dicom"], "test"), table)
        with reading(table):
            x, y, w, h = (float(line[key]) for key in "xywh")
            row["scale"] = float(line["image_width"]), float(line["image_height"])
        rows.setdefault(path, row)
        pair = path, line["category_name"], one_line(line["label_text"])
        boxes_of[pair].append([x, y, x + w, y + h])
    for (path, _, phrase), boxes in boxes_of.items():
        rows[path].setdefault("pairs", []).append((phrase, boxes))
    return [row for row in rows.values() if run.admit(row, None)]


def prepare_ms_cxr(args):
    """MS-CXR -> a manifest: phrases and boxes, no reports."""
    run = Conversion(args)
    splits = mimic_splits(run, args.images, "splits, all rows without one are of test")
    rows = run.prepare_images(ms_cxr_rows(run, args.images, args.table, splits))
    run.add_regions(rows)
    run.finish(rows, MS_CXR_PUBLISHED)


# ---- converters: the open COVID-19 image data collection (not in the paper) ----------------------

COVID_VIEWS = ("PA", "AP", "AP Supine", "APS")
LUNGS = {1: "Right lung.", 2: "Left lung."}                    # by the annotations' category
NO_DERIVATIVES = re.compile(r"\bND\b|no.?deriv", re.IGNORECASE)


def lung_pairs(path):
    """{file name: ([(phrase, boxes in pixels)], (width, height))} of the lung annotations (COCO).
    Of two boxes the patient's right lung is the one further left; a single one needs a category."""
    found, pairs = defaultdict(list), {}
    with open_text(path) as text:
        coco = json.load(text)
        for note in coco["annotations"]:
            if None not in note["bbox"]:                       # some are empty
                x, y, w, h = note["bbox"]
                found[note["image_id"]].append(([x, y, x + w, y + h], note.get("category_id")))
        for image in coco["images"]:
            boxes, phrases = found[image["id"]], defaultdict(list)
            if len(boxes) == 2:
                boxes = zip(sorted(box for box, _ in boxes), LUNGS)
            for box, category in boxes:
                phrases[LUNGS.get(category)].append(box)
            if phrases:
                pairs[image["file_name"]] = list(phrases.items()), (image["width"], image["height"])
    return pairs


def covid_rows(run, repo, lungs):
    """Yield a row for each frontal X-ray of metadata.csv, in its late and its early spelling."""
    seen = set()
    for line in csv_rows(repo / "metadata.csv", "filename", "view", "license", ragged=True):
        line = defaultdict(str, {str(key).strip().lower().replace(" ", "_"): one_line(value)
                                 for key, value in line.items()})
        name, report = line["filename"], line["clinical_notes"] or line["notes"]
        patient, licence = line["patientid"] or name, line["license"] or "unstated"
        pairs, scale = lungs.get(name, ([], None))
        row = {"study": f"{patient}-{zlib.crc32(report.encode()):08x}",        # a note, a study
               "patient": patient, "report": report, "pairs": pairs, "scale": scale,
               "split": "train" if zlib.crc32(patient.encode()) % 5 else "test",
               "source": repo / (line["folder"] or "images") / name,
               "name": name.removesuffix(".jpg") + ".jpg", "licence": (name, licence, line["url"])}
        if run.admit(row, "not X-ray" if line["modality"].lower() not in ("", "x-ray") else
                     "view" if line["view"] not in COVID_VIEWS else
                     "licence" if NO_DERIVATIVES.search(licence) else
                     "no text" if not (report or pairs) else
                     "repeated image" if name in seen else None):
            seen.add(name)
            yield row


def prepare_covid_cxr(args):
    """A clone of ieee8023/covid-chestxray-dataset -> a manifest and LICENSES.csv."""
    run = Conversion(args)
    lungs = lung_pairs(args.repo / "annotations" / "imageannotation_ai_lung_bounding_boxes.json")
    rows = run.prepare_images(list(covid_rows(run, args.repo, lungs)))
    run.add_regions(rows)
    licences = io.StringIO()
    csv.writer(licences).writerows([("image", "original_file", "licence", "source")] + [
        (row["image"], *row["licence"]) for row in rows])
    run.finish(rows, {})
    write_file(args.out / "LICENSES.csv", lambda draft: draft.write_text(
        licences.getvalue(), encoding="utf-8", newline=""))


# ---- check ---------------------------------------------------------------------------------------

def manifest_notes(rows):
    """What is odd, though valid, about rows of a manifest -> one line each; no image is read."""
    regions = [region for row in rows for region in row.get("regions") or []]
    boxes = [box for region in regions for box in region["boxes"]]
    patients = {split: {r["patient"] for r in rows if r["split"] == split} for split in SPLITS}
    counts = {"rows repeated word for word": len(rows) - len({hash(str(row)) for row in rows}),
              "rows whose image another row has": len(rows) - len({r["image"] for r in rows}),
              "rows with neither report nor regions":
                  sum(not (row.get("report") or row.get("regions")) for row in rows),
              "boxes of almost no area, dropped when read":
                  len(boxes) - len(drop_degenerate(boxes))}
    notes = [f"{words}: {n:,}" for words, n in counts.items() if n]
    notes += unknown_keys(rows, ROW_KEYS) + unknown_keys(regions, REGION_KEYS)
    notes += [f"no rows of split {split!r}" for split in ("val", "test") if not patients[split]]
    for first, second in itertools.combinations(SPLITS, 2):
        if shared := patients[first] & patients[second]:
            notes.append(f"patients both in {first} and in {second}, so scores mislead: "
                         f"{len(shared):,}, such as {min(shared)!r}")
    return notes


def unknown_keys(objects, known):
    """A line for each key that nothing reads; it may be a misspelt one."""
    counts = Counter(key for thing in objects for key in thing if key not in (*known, "path"))
    close = {key: difflib.get_close_matches(key, known, 1) for key in counts}
    return [f"unknown key {key!r}, not read: {n:,}"
            + (f"; is {close[key][0]!r} meant?" if close[key] else "") for key, n in counts.items()]


def check(data, png):
    """Read every row and image of a data set, print every problem, the counts and what is odd, and
    draw eight rows with their boxes. Returns the number of problems."""
    path, rows, n_flat, pictures = manifest_path(data), [], 0, set()
    scanned = list(scan_manifest(data))
    if not scanned:
        raise InputError(f"{path}: no rows")
    if Path(png).exists():
        images = [path.parent / row["image"] for _, row, problem in scanned if not problem]
        check_output(png, [path, *images])
    for number, row, problem in tqdm(scanned, "check", unit="row"):
        if not problem:
            row = {**row, "path": str(path.parent / row["image"]), "report": row.get("report"),
                   "regions": row.get("regions") or []}
            try:
                image = load_image(row["path"], 64)
            except InputError as error:
                problem = str(error)
        if problem:
            tqdm.write(f"{path}:{number}: {problem}")
            continue
        rows.append(row)
        low, high = image.getextrema()
        n_flat += low == high
        pictures.add(hash(image.tobytes()))
    print(format_table([("", *count_rows([], ""))] + [
        (split, *(f"{n:,}" for n in count_rows(rows, split).values())) for split in SPLITS]))
    looks = {"images of a single grey value": n_flat,
             "images that look the same as another row's": len(rows) - len(pictures)}
    for note in [f"{words}: {n:,}" for words, n in looks.items() if n] + manifest_notes(rows):
        print(f"note: {note}")
    if rows:
        draw_sheet(rows, png)
    n_problems = len(scanned) - len(rows)
    print(f"{n_problems} problems in {len(scanned)} rows")
    return n_problems


def draw_sheet(rows, png):
    """Draw eight rows with boxes, from all over the set, on one sheet."""
    boxed = [row for row in rows if row["regions"]] or rows
    images = []
    for row in boxed[::max(1, len(boxed) // 8)][:8]:
        images.append(load_image(row["path"], 320).convert("RGB"))
        draw_boxes(images[-1], row["regions"])
    write_file(png, lambda draft: tile(images, 4).save(draft, "PNG"))
    print(f"drew {png}: check that the boxes are where the phrases say")


# ---- command line --------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description="Make and check data sets of manifest.jsonl rows (see the top of data.py).")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    command = commands.add_parser("phantom", **defaults, help="draw chest X-rays with findings, "
                                  "reports and boxes")
    command.add_argument("out", help="folder to write; an existing one is not touched")
    for split, n in PHANTOM_SIZES.items():
        command.add_argument(f"--{split}", type=int, default=n, metavar="N",
                             help=f"images of the {split} split")
    command.add_argument("--seed", type=int, default=0, help="the same seed draws the same images")
    add_mimic_flags(add_converter(commands, "mimic-cxr", prepare_mimic_cxr, "images of MIMIC-CXR-"
                                  "JPG, texts of LLaVA-Rad, boxes of MIMIC-Ext-CXR-QBA"))
    add_padchest_flags(add_converter(commands, "padchest-gr", prepare_padchest_gr,
                                     "images, sentences and boxes of PadChest-GR"))
    add = add_converter(commands, "ms-cxr", prepare_ms_cxr,
                        "images of MIMIC-CXR-JPG, phrases and boxes of MS-CXR")
    add("--images", required=True, metavar="DIR", help=MIMIC_ROOT)
    add("--table", required=True, metavar="CSV",
        help="MS_CXR_Local_Alignment_v*.csv; rows without a split there have MIMIC's")
    add = add_converter(commands, "covid-cxr", prepare_covid_cxr, "X-rays, clinical notes and lung "
                        "boxes of the open COVID-19 image data collection")
    add("--repo", required=True, type=Path, metavar="DIR",
        help="a clone of https://github.com/ieee8023/covid-chestxray-dataset")
    command = commands.add_parser("check", **defaults, help="read every row and image, count, draw "
                                  "eight rows with boxes")
    command.add_argument("data", help="folder with manifest.jsonl, or that file")
    command.add_argument("--png", default="runs/check.png", help="where to draw")
    return parser.parse_args()


def add_converter(commands, name, prepare, words):
    """A converter's command with the flags that all share -> the function that adds its own."""
    command = commands.add_parser(name, help=f"{words} -> a manifest", description=f"{words} -> a "
                                  "manifest. The archives are read where they are; the README "
                                  "says where to get them.")
    command.set_defaults(run=prepare)
    sources, output = map(command.add_argument_group, ("sources and choices", "output"))
    output.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for "
                        "manifest.jsonl, prepare.json (the counts) and the images; given again "
                        "after an interruption, it continues where it was")
    output.add_argument("--size", type=int, default=512, metavar="PX", help="short side of the "
                        "images written, 8-bit JPEG, proportions kept, none enlarged; 0 "
                        "keeps the originals where they are and writes none (default: 512, the "
                        "encoder's input, Sec. 2.0.4)")
    output.add_argument("--workers", type=int, default=min(8, os.cpu_count()), metavar="N",
                        help="processes that decode and parse (default: the CPUs, at most 8)")
    return sources.add_argument


MIMIC_ROOT = "root of MIMIC-CXR-JPG: files/, and if there the split and metadata csv.gz"


def add_mimic_flags(add):
    add("--images", required=True, metavar="DIR", help=MIMIC_ROOT)
    add("--llava-rad", required=True, metavar="DIR",
        help="folder of the LLaVA-Rad annotations: chat_{train,dev,test}_*.json")
    add("--qba", metavar="DIR", help="root of MIMIC-Ext-CXR-QBA, with exports/A_frontal (default: "
        "none, so no boxes)")
    add("--chexmask", metavar="FILE", help="CheXmask's MIMIC-CXR-JPG.csv, or .gz: images with Dice "
        "RCA (Mean) below 0.7 are dropped (default: none, so all are kept)")
    add("--method", choices=METHODS, default=METHODS[0], help="which texts of LLaVA-Rad; where a "
        "file has none of them, the others are used and it is said (default: %(default)s, an "
        "LLM's, Sec. 3.0.1)")
    add("--rating", choices=RATINGS, default="A++", help="least rating of a text-box pair's "
        "question (default: %(default)s, Sec. 3.0.1)")
    add("--wbf-iou", type=float, default=0.1, metavar="IOU", help="boxes of a sentence that "
        "overlap more are fused into their mean, 0 to 1 (default: %(default)s, of the authors' "
        "later code; not stated in the paper)")


def add_padchest_flags(add):
    add("--images", required=True, metavar="DIR_OR_ZIP",
        help="the 16-bit PNGs, in a folder (of any depth) or a zip")
    add("--reports", required=True, metavar="JSON", help="grounded_reports_20240819.json")
    add("--table", metavar="CSV", help="master_table.csv, or .csv.zip: splits and patients "
        "(default: none, so all rows are of train)")
    add("--official-val", action="store_true", help="keep the validation split as val (default: it "
        "is of train, as the paper's pool of 2,404 X-rays is train and validation, Sec. 3.0.1)")


def main(args=None):
    args = args or parse_args()
    if args.command == "check":
        sys.exit(1 if check(args.data, args.png) else 0)
    if args.command != "phantom":
        return args.run(args)
    if os.path.lexists(args.out):
        raise InputError(f"{args.out}: exists already; choose a new folder")
    make_phantom(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"wrote {args.out}; next: python data.py check {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        sys.exit(f"data.py: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("data.py: stopped; the same command continues where it was")
