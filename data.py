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
import os
import re
import shlex
import sys
import tempfile
import textwrap
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, UnidentifiedImageError
from tqdm import tqdm

from metrics import (DAMAGED, InputError, box_iou, box_problem, check_output, check_ranges,
                     drop_degenerate, first_line, format_table, run_command, write_file, write_json)

# torch and transformers, which take seconds to import, are imported only in the few functions that
# use them; the commands of this file do not.


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

    Boxes of almost no area are dropped. Raises InputError with file and line for an invalid row."""
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
    parts = text.strip().split("; ")
    if not all(BOX_PATTERN.fullmatch(part) for part in parts):
        return [], text.strip() != NO_BOXES
    boxes = [[int(v) / 1000 for v in part.split()] for part in parts]
    if not all(x0 < x1 <= 1 and y0 < y1 <= 1 for x0, y0, x1, y1 in boxes):
        return [], True
    return boxes, False


# ---- prompts (Eq. 2, 3, L_d), the draw of a task, sentences of a report --------------------------

# The paper prints only the beginning of the last two prompts; their endings are not stated in it.
CAPTIONING_PROMPT = "Report this medical scan."             # P_c
GROUNDING_PROMPT = "Detect all instances of: {phrase}"      # P_g
DENSE_CAPTIONING_PROMPT = "Describe the regions: {boxes}"   # P_d

# tau of L_t and its weight: L_c and L_g,d "contribute equally" (Sec. 2.0.1), so captioning is
# drawn half of the time, grounding and dense captioning a quarter each. (With several regions of an
# image in a step, as in the miniature, g and d have more rows, and so more weight.)
TASK_WEIGHT = {"c": 2, "g": 1, "d": 1}


def possible_tasks(report, regions, objectives="cgd"):
    """The tasks that an image can serve: c needs a report, g and d need a region with boxes."""
    has_boxes = any(region["boxes"] for region in regions)
    return [task for task in TASK_WEIGHT
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
    -> images: indices into rows; texts; owner: (texts,) the index in images of each text's image"""
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
    """(h, w) numbers -> (h, w) uint8: percentiles 0.5 to 99.5 become 0 and 255."""
    values = np.nan_to_num(np.asarray(values, np.float32), posinf=0, neginf=0)
    low, high = np.percentile(values, (0.5, 99.5))
    if high <= low:
        low, high = values.min(), max(values.max(), values.min() + 1)
    return (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)


def load_image(path, size=None):
    """Read an image of any mode as 8-bit grey (PIL "L"), stretched to (size, size) if given.

    path: of a file, or a PIL image. 16-bit, 32-bit and float images, and 8-bit ones that use less
    than a quarter of the range, are windowed; transparency is black. Raises InputError."""
    try:
        with path.copy() if isinstance(path, Image.Image) else Image.open(path) as image:
            if size and image.format == "JPEG":
                image.draft("L", (size, size))                 # JPEG: decode at 1/2, 1/4 or 1/8
            image.load()
            if image.mode.startswith("I") or image.mode == "F":
                image = Image.fromarray(window_levels(image))
            elif image.has_transparency_data:
                black = Image.new("RGBA", image.size, "black")
                image = Image.alpha_composite(black, image.convert("RGBA"))
            image = image.convert("L")
    except UNREADABLE as error:
        hint = ("; if it is a DICOM file, convert it to PNG first"
                if isinstance(error, UnidentifiedImageError) else "")
        raise InputError(f"{path}: cannot be read as an image ({first_line(error)}){hint}")
    low, high = image.getextrema()
    if 0 < high - low < 64:
        image = Image.fromarray(window_levels(image))
    return image.resize((size, size), Image.Resampling.BILINEAR) if size else image


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
        tokens = plain_ids(tokenizer, text.lower())[:length - 1] + [tokenizer.eos_token_id]
        row[:len(tokens)] = torch.tensor(tokens)
    return ids


say_once = functools.cache(print)               # the same line only once per process


def cut_text(tokenizer, text, length=256):
    """Cut a prompt's text to its first `length` tokens; the first time, say so on stderr."""
    if len(text.encode()) <= length or len(plain_ids(tokenizer, text)) <= length:
        return text                                            # so most texts need no tokenizing
    say_once(f"note: a prompt of over {length} tokens is cut to its first {length}",
             file=sys.stderr)
    return tokenizer.decode(plain_ids(tokenizer, text)[:length])


def prompt_ids(tokenizer, prompt):
    """Token ids of a prompt and a line break before the target (not stated in the paper)."""
    return plain_ids(tokenizer, cut_text(tokenizer, prompt) + "\n")


class ChestXrays:
    """Training samples of manifest rows: a map-style dataset for torch.utils.data.DataLoader.

    Indexed by (epoch, i), which alone fixes the random draws. A sample: {"image": (size, size)
    uint8, "path": str, "text": str, "tasks": [(task, prompt, target), ...]}, or {"bad": message}
    for an unreadable image. objectives: letters of "scgd"; n_regions: at most, per image and step;
    augmented: strength; cached: keep decoded images in memory."""

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
        try:                                                   # twice the size, if it is cropped
            image = image or load_image(row["path"], self.size * (2 if self.augmented else 1))
        except InputError as error:
            return {"bad": str(error)}
        if self.cached:
            self.cache[i] = image
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
    target, <eos>, padding; is_target (R, L): target and <eos>; image_of_row (R,): index in image;
    task_of_row (R,): index in losses.TASKS; paths: of the images; bad: messages."""

    def __init__(self, text_tokenizer, text_length, llm_tokenizer, max_target):
        self.text_tokenizer, self.text_length = text_tokenizer, text_length
        self.llm_tokenizer, self.max_target = llm_tokenizer, max_target

    def __call__(self, samples):
        import torch
        bad = [s["bad"] for s in samples if "bad" in s]
        samples = [s for s in samples if "bad" not in s]
        if not samples:
            return {"image": torch.zeros(0), "bad": bad}
        rows, llm, tasks = [], self.llm_tokenizer, list(TASK_WEIGHT)         # as losses.TASKS
        for i, sample in enumerate(samples):
            for task, prompt, target in sample["tasks"]:
                prompt, target = prompt_ids(llm, prompt), plain_ids(llm, target)
                target = (target + [llm.eos_token_id])[:self.max_target]     # if cut, no <eos>
                rows.append((i, tasks.index(task), prompt + target, len(prompt)))
        length = max((len(tokens) for _, _, tokens, _ in rows), default=0)
        ids = torch.full((len(rows), length), llm.pad_token_id)                        # (R, L)
        is_target = torch.zeros_like(ids, dtype=torch.bool)                            # (R, L)
        for n, (_, _, tokens, n_prompt) in enumerate(rows):
            ids[n, :len(tokens)] = torch.tensor(tokens)
            is_target[n, n_prompt:len(tokens)] = True
        batch = {"image": torch.from_numpy(np.stack([s["image"] for s in samples])),   # (B, S, S)
                 "ids": ids, "is_target": is_target, "bad": bad,
                 "image_of_row": torch.tensor([i for i, *_ in rows], dtype=torch.long),
                 "task_of_row": torch.tensor([task for _, task, *_ in rows], dtype=torch.long),
                 "paths": [s["path"] for s in samples]}
        if self.text_tokenizer:
            batch["text"] = text_ids(self.text_tokenizer, [s["text"] for s in samples],
                                     self.text_length)                                 # (B, T)
        return batch


# ==================================================================================================
# The method ends here. Below: pictures, checks of the manifest, the phantom, converters, commands.
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


COLOURS = ("#ffd21f", "#ff7ab8", "#7fb8ff", "#ffa14a", "#b6f06a", "#c99cff")


def draw_boxes(image, regions):
    """Draw boxes on an image (PIL "RGB"), in place, and list their phrases in the same colours."""
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    coloured = list(zip([r for r in regions if r["boxes"]], itertools.cycle(COLOURS)))
    for n, (region, colour) in enumerate(coloured):
        phrase = textwrap.shorten(region["phrase"], 44, placeholder=" ...")
        pen.text((5, 3 + 16 * n), phrase, colour, font, stroke_width=2, stroke_fill="black")
    for region, colour in coloured:
        for box in region["boxes"]:                            # last, so text hides no edge
            corners = [v * max(0, n - 1) for v, n in zip(box, image.size * 2)]
            pen.rectangle(corners, outline=colour, width=2)


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

ROW_KEYS = ("image", "study", "patient", "split", "report", "regions")


def scan_manifest(data):
    """Yield (line number, row or None, problem or None) for each line of a manifest."""
    path = manifest_path(data)
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            row = None
            try:
                line = line.decode("utf-8-sig").strip()
                if not line:
                    continue
                row = json.loads(line)
                if "\\u" in line:                              # reject lone surrogates
                    json.dumps(row, ensure_ascii=False).encode()
                problem = row_problem(row, path.parent)
            except OSError as error:                           # a name of 5,000 characters
                problem = f"'image' cannot be looked up ({error.strerror})"
            except (ValueError, RecursionError) as error:
                problem = f"expected one JSON object a line, in UTF-8: {first_line(error)}"
            yield number, row, problem


def row_problem(row, folder):
    """An error message for an invalid row of the manifest, else None."""
    if not isinstance(row, dict):
        return f"expected one JSON object a line, got {type(row).__name__}"
    for key, kind in zip(ROW_KEYS, (str, str, str, str, str | None, list | None)):
        value = row.get(key)
        if not isinstance(value, kind) or (kind is str and not value):
            return f"{key!r} is {value!r:.80}, expected {'a list' if key == 'regions' else 'text'}"
    if row["split"] not in SPLITS:
        return f"'split' is {row['split']!r:.80}, expected one of {', '.join(SPLITS)}"
    for region in row.get("regions") or []:
        if not isinstance(region, dict) or not isinstance(region.get("boxes"), list) \
                or not isinstance(region.get("phrase"), str) or not region["phrase"].strip():
            return f"region {region!r:.120}, expected 'phrase' and 'boxes': [[x0, y0, x1, y1], ...]"
        for box in region["boxes"]:
            if problem := box_problem(box):
                return (f"box {box!r:.120} of {region['phrase']!r:.80} {problem}; "
                        "expected [x0, y0, x1, y1] in [0, 1]")
    if not (folder / row["image"]).is_file():
        return f"image {folder / row['image']} does not exist"


def find_row(rows, image):
    """The row whose image is this file or, by its bytes, a copy of it; None if there is none."""
    same = [row for row in rows if filecmp.cmp(row["path"], image, shallow=False)]
    return max(same, key=lambda row: os.path.samefile(row["path"], image), default=None)


def manifest_notes(rows):
    """Warnings about valid but suspicious rows of a manifest, one line each; reads no image."""
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
    for things, known in ((rows, (*ROW_KEYS, "path")), (regions, ("phrase", "boxes"))):
        for key, n in Counter(key for thing in things for key in thing if key not in known).items():
            meant = "".join(f"; is {k!r} meant?" for k in difflib.get_close_matches(key, known, 1))
            notes.append(f"unknown key {key!r}, not read: {n:,}{meant}")
    notes += [f"no rows of split {split!r}" for split in ("val", "test") if not patients[split]]
    for first, second in itertools.combinations(SPLITS, 2):
        if shared := patients[first] & patients[second]:
            notes.append(f"patients both in {first} and in {second}, so scores mislead: "
                         f"{len(shared):,}, such as {min(shared)!r}")
    return notes


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


def check(data, png):
    """Read every row and image of a data set, print every problem, the counts and what is odd, and
    draw eight rows with their boxes. Returns the number of problems."""
    path, rows, n_flat, pictures = manifest_path(data), [], 0, set()
    scanned = list(scan_manifest(data))
    if not scanned:
        raise InputError(f"{path}: no rows")
    images = [path.parent / str(row.get("image")) for _, row, _ in scanned if isinstance(row, dict)]
    check_output(png, ".png", [path, *images])
    for number, row, problem in tqdm(scanned, "check", unit="row"):
        try:
            if problem:
                raise InputError(problem)
            pixels = load_image(path.parent / row["image"], 64).tobytes()
        except InputError as error:
            tqdm.write(f"{path}:{number}: {error}")
            continue
        rows.append({**row, "report": row.get("report"), "regions": row.get("regions") or []})
        n_flat += len(set(pixels)) == 1
        pictures.add(hash(pixels))
    print(format_table([("", *count_rows([], ""))] + [
        (split, *(f"{n:,}" for n in count_rows(rows, split).values())) for split in SPLITS]))
    looks = {"images of a single grey value": n_flat,
             "images that look the same as another row's": len(rows) - len(pictures)}
    for note in [f"{words}: {n:,}" for words, n in looks.items() if n] + manifest_notes(rows):
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
FINDINGS = {  # kind: (probability, its sentence, the sentence that it is not there)
    "nodule": (.24, "{Size} {side} {zone} zone nodule.", "No nodule."),
    "cavity": (.20, "{Size} cavity in the {side} {zone} zone.", "No cavity."),
    "consolidation": (.21, "{Size} {side} {zone} zone consolidation.", "No consolidation."),
    "effusion": (.11, "{Size} {side} pleural effusion.", "No pleural effusion."),
    "pneumothorax": (.09, "{Size} {side} pneumothorax.", "No pneumothorax."),
    "pacemaker": (.10, "Pacemaker over the {side} chest.", "No implanted device."),
    "heart": (.05, "The heart is {degree} enlarged.", "Normal heart size.")}
BODY_WIDTH, BODY_SHIFT = (.70, 1.06), .12                       # fractions of the image; each way
PHANTOM_SIZES = {"train": 16000, "val": 50, "test": 400}


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
    elif kind == "effusion":
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


def draw_phantom(out, split, i, seed, n=96):
    """Draw and save image i of a split, n x n pixels -> its manifest row."""
    rng = np.random.default_rng([seed, SPLITS.index(split), i])
    canvas, findings, regions = Canvas(rng, n), {}, []
    n_findings = rng.choice([1, 2, 3], p=[.15, .65, .2])
    while len(findings) < n_findings:                           # a zone or organ is used once
        kind = rng.choice(list(FINDINGS), p=[p for p, *_ in FINDINGS.values()])
        side, size = rng.choice(["right", "left"]), rng.choice(list(SIZES))
        zone = {"effusion": "lower", "pneumothorax": "upper"}.get(kind) or rng.choice(list(ZONES))
        place = kind if kind in ("heart", "pacemaker") else (side, zone)
        findings.setdefault(place, (kind, side, zone, size))
    size_of = {kind: size for kind, _, _, size in findings.values()}
    degree, border = HEART[size_of.get("heart")]
    left = -.22 - .3 * (border - .46)
    heart = ellipse((left + border) / 2, .26, (border - left) / 2, .28)
    draw_anatomy(canvas, heart)
    for kind, side, zone, size in findings.values():
        width = SIZES[size] * rng.uniform(.94, 1.06)
        outline = heart if kind == "heart" else draw_finding(canvas, kind, side, zone, width)
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
            "regions": regions}


def make_phantom(out, sizes=PHANTOM_SIZES, seed=0, quiet=False):
    """Write a phantom data set to a new folder, the same for the same seed. Returns the folder.
    It is drawn in a temporary folder, then renamed: a killed run leaves no partial phantom."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        draft = Path(folder, "phantom")                        # its mode is the umask's
        (draft / "images").mkdir(parents=True)
        numbers = [(split, i) for split, n in sizes.items() for i in range(n)]
        rows = [draw_phantom(draft, split, i, seed)
                for split, i in tqdm(numbers, "phantom", unit="image", disable=quiet)]
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
    """Turn any error inside, while a source is read, into an InputError that names the source."""
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read ({reason}); is the download complete?")


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


def one_line(text):
    """Text with its white space collapsed; "" for anything else (None, NaN)."""
    return " ".join(text.split()) if isinstance(text, str) else ""


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
    """Write an image as an 8-bit JPEG, its short side `size` pixels, unless it is smaller.

    job: (path, where to write, size or 0 to write nothing). -> None or why there is no image."""
    source, target, size = job
    if target.exists() if size else source.is_file():
        return None
    try:
        with source.open("rb") as file, Image.open(file) as image:
            factor = min(1, size / min(image.size))
            small = [max(1, round(factor * side)) for side in image.size]
            image.draft("L", small)                            # JPEG: decode at 1/2, 1/4 or 1/8
            image = load_image(image).resize(small, Image.Resampling.BILINEAR)
    except FileNotFoundError:
        return "no image"
    except (*UNREADABLE, zlib.error, zipfile.BadZipFile):
        tqdm.write(f"unreadable image: {source}")
        return "unreadable image"
    write_file(target, lambda draft: image.save(draft, "JPEG", quality=95))


class Conversion:
    """A run of a converter: the steps that all converters share, and their counts.

    funnel: {table: {reason: {split: n}}}, table one of images, pairs, boxes and out (what is left);
    reason "in", or why something was dropped. lost: what the run has to do without, in words."""

    def __init__(self, args):
        self.args, self.out, self.size, self.funnel, self.lost = args, args.out, args.size, {}, []
        self.iou = getattr(args, "wbf_iou", 1)                 # no boxes overlap by more than 1
        check_ranges(args, {"size": (0, 1e5), "workers": (1, 256), "wbf_iou": (0, 1)})
        notes = self.out / "prepare.json"
        mine = notes.exists() and f'"command": "{args.command}"'.encode() in notes.read_bytes()
        for path in (self.out / "manifest.jsonl", notes, self.out / "LICENSES.csv"):
            if path.exists() and not mine:
                raise InputError(f"{path}: not written by {args.command}; choose another --out")

    def count(self, table, split, reason, n=1):
        by_split = self.funnel.setdefault(table, {}).setdefault(reason, dict.fromkeys(SPLITS, 0))
        by_split[split] += n

    def admit(self, table, split, reason=None):
        """Count an image or pair that came in and, given a reason, was dropped -> if it stays."""
        self.count(table, split, "in")
        if reason:
            self.count(table, split, reason)
        return not reason

    def prepare_images(self, rows):
        """Shrink the images of rows into --out, or leave them in place -> the rows that have one.

        row["source"]: the image's path, perhaps in a zip; row["name"]: where to write it."""
        unique, kept = {}, []
        for row in rows:
            row["image"] = (f"images_{self.size}/{row['name']}" if self.size else
                            os.path.abspath(row["source"]))
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

    def finish(self, rows, published):
        """Make the regions, print the funnel and what is missing, write prepare.json and manifest.
        published: {"table reason": a count of the paper or of the data set's page}."""
        for row in rows:
            self.add_regions(row)
        for split in SPLITS:
            for name, n in count_rows(rows, split).items():
                self.count("out", split, name, n)
        print(format_table([("", *SPLITS)] + [
            (f"{table} {reason}", *(f"{n:,}" for n in by_split.values()))
            for table, reasons in self.funnel.items() for reason, by_split in reasons.items()]))
        for name, n in published.items():
            print(f"published, {name}: {n}")
        for loss in self.lost:
            print(f"missing: {loss}")
        if not rows:
            raise InputError(f"{self.out}: no image is left, see the counts above; nothing written")
        arguments = {name: str(value) for name, value in vars(self.args).items()}
        write_json(self.out / "prepare.json", {
            "command": self.args.command, "arguments": arguments, "lost": self.lost,
            "funnel": self.funnel, "published": published})
        lines = [json.dumps({key: row[key] for key in ROW_KEYS}) + "\n" for row in rows]
        write_file(self.out / "manifest.jsonl", lambda draft: draft.write_text("".join(lines)))
        print(f"wrote {self.out / 'manifest.jsonl'}; next: python data.py check "
              f"{shlex.quote(str(self.out))}")


# ---- converters: MIMIC-CXR, MS-CXR, PadChest-GR and (not in the paper) an open COVID-19 set ------

METHODS, DICE = ("gpt4", "rule-based"), "Dice RCA (Mean)"
RATINGS = {"A++": ("A_frontal", "App"), "A+": ("A_frontal", "Ap"), "A": ("A_frontal", None),
           "B": ("B_frontal", None)}           # export, and its table of those rated so or better
MIMIC_PATH = re.compile(r"(p\d+)/(s\d+)/([^/]+)\.jpg$")
MIMIC_PUBLISHED = {"images in": "400,042 + 3,238 + 2,461 (LLaVA-Rad)",
                   "out images": "237,972 + 1,959 + 3,403 before the quality filter (LLaVA-Rad)",
                   "out studies": "2,432 of test (LoFi)", "out boxed studies": "169,441 (LoFi)",
                   "out pairs": "394,835 (LoFi)"}
MS_CXR_PUBLISHED = {"boxes in": "1,448", "out images": "1,047", "out pairs": "1,162"}
PADCHEST_PUBLISHED = {"images in": "4,555",
                      "out boxed images": "2,404 of the pool, 604 of test (LoFi)",
                      "out pairs": "4,979 of the pool (LoFi)",
                      "out boxes": "1,521 of test (inferred from LoFi's Tables 2 to 4)"}
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
    return {"study": study, "patient": patient, "dicom": dicom, "name": name,
            "pairs": [], "report": "", "source": images / "files" / name}


def find_questions(root, rating):
    """MIMIC-Ext-CXR-QBA -> {name: path} of studies' questions, {study: ids rated well} or None."""
    export, table = RATINGS[rating]
    folder, rated = root / "exports" / export, defaultdict(set)
    files = files_below(find(folder, "qa*", "--qba expects MIMIC-Ext-CXR-QBA's root"), ".qa.json")
    if not table:
        return files, None
    path = find(folder, f"metadata/{table}/question_metadata.csv*", f"--rating {rating} needs it")
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
                reason = ("rating" if rated is not None
                          and question.get("question_id") not in rated[study]
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


def prepare_mimic_cxr(args):
    """MIMIC-CXR-JPG, LLaVA-Rad, CheXmask and MIMIC-Ext-CXR-QBA -> a manifest (Sec. 3.0.1)."""
    run, rows, good = Conversion(args), [], None
    paths = [find(args.llava_rad, f"**/chat_{name}_*.json", "--llava-rad expects LLaVA-Rad's root")
             for name in ("train", "dev", "test")]
    views = mimic_table(args.images, "metadata", "ViewPosition", "Columns", "Rows")
    if args.qba:
        files, rated = find_questions(args.qba, args.rating)
    else:
        run.lost.append("text-box pairs, so grounding and dense captioning (no --qba)")
    if args.chexmask:
        with reading(args.chexmask):
            good = {row["dicom_id"] for row in csv_rows(args.chexmask, "dicom_id", DICE)
                    if float(row[DICE] or 0) >= 0.7}
    else:
        run.lost.append("the quality filter of images (no --chexmask)")
    for split, path in zip(SPLITS, paths):
        with reading(path):
            entries, method = json.loads(path.read_bytes()), args.method
            if not any(entry.get("generate_method") == method for entry in entries):
                method = "rule-based" if method == "gpt4" else "gpt4"
                run.lost.append(f"{args.method} texts of {path.name}: its {method} texts are used")
            for entry in tqdm(entries, path.name, unit="item"):
                row = mimic_row(args.images, entry.get("image"), path)
                # Findings and impression (Sec. 3.0.1); either may be missing.
                texts = [turn.get("value") for turn in (entry.get("conversations") or [])[1:2]]
                texts = [one_line(text) for text in (*texts, entry.get("impression"))]
                # Boxes are in pixels of the originals. Their sizes are read from the table, as the
                # images may be copies that were shrunk before.
                view, width, height = views.get(row["dicom"], ("", 1, 1))
                row |= {"split": split, "report": " ".join(filter(None, texts)),
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
    run.finish(rows, MIMIC_PUBLISHED)


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
            key = row["name"], line["category_name"], one_line(line["label_text"])
            boxes[key].append([x, y, x + w, y + h])
            if row["name"] not in rows and run.admit("images", row["split"]):
                rows[row["name"]] = row
    for (name, _, phrase), found in boxes.items():
        rows[name]["pairs"].append((phrase, found))
    run.finish(run.prepare_images(rows.values()), MS_CXR_PUBLISHED)


def prepare_padchest_gr(args):
    """PadChest-GR -> a manifest (Sec. 3.0.1): all sentences of a study, the boxed ones as pairs."""
    run, splits, rows = Conversion(args), {}, []
    images = files_below(args.images, ".png")
    if not args.size and not args.images.is_dir():
        raise InputError(f"{args.images}: --size 0 cannot keep images inside a zip; unzip it first")
    if not args.table:
        run.lost.append("splits and patients, all rows are of train (no --table)")
    for row in csv_rows(args.table, "ImageID", "split", "PatientID") if args.table else []:
        split = official_split(row["split"], args.table)
        if split == "val" and not args.official_val:
            split = "train"                                    # both are the paper's pool
        splits[row["ImageID"]] = split, row["PatientID"]
    with reading(args.reports):
        for entry in json.loads(args.reports.read_bytes()):
            image = str(entry.get("ImageID"))
            study = str(entry.get("StudyID") or image)
            split, patient = splits.get(image, ("train", study))
            pairs = [(one_line(f.get("sentence_en")), f.get("boxes") or [])
                     for f in entry.get("findings") or []]
            sentences = [s if s[-1] in ".!?" else s + "." for s, _ in pairs if s]
            if run.admit("images", split, "not in table" if splits and image not in splits else
                         "no text" if not sentences else
                         "no image" if image not in images else None):
                rows.append({"study": study, "patient": patient or study, "split": split,
                             "report": " ".join(sentences), "pairs": pairs, "scale": (1, 1),
                             "name": f"{Path(image).stem}.jpg", "source": images[image]})
    run.finish(run.prepare_images(rows), PADCHEST_PUBLISHED)


def prepare_covid_cxr(args):
    """A clone of ieee8023/covid-chestxray-dataset -> a manifest and LICENSES.csv."""
    run, rows, found, lungs = Conversion(args), [], defaultdict(list), {}
    path = args.repo / "annotations" / "imageannotation_ai_lung_bounding_boxes.json"
    with reading(path):
        coco = json.loads(path.read_bytes())
        for note in coco["annotations"]:
            if None not in note["bbox"]:                       # some are empty
                x, y, w, h = note["bbox"]
                found[note["image_id"]].append(([x, y, x + w, y + h], note.get("category_id")))
        for image in coco["images"]:
            if boxes := found[image["id"]]:
                if len(boxes) == 2:                            # the right lung is further left
                    boxes = zip(sorted(box for box, _ in boxes), LUNGS)
                pairs = [(LUNGS.get(category), [box]) for box, category in boxes]
                lungs[image["file_name"]] = pairs, (image["width"], image["height"])
    for line in csv_rows(args.repo / "metadata.csv", "filename", "view", "license", ragged=True):
        # early releases have other capitals and spaces, and fewer columns
        line = defaultdict(str, {str(key).strip().lower(): one_line(value)
                                 for key, value in line.items()})
        name, report = Path(line["filename"]).name, line["clinical_notes"] or line["notes"]
        patient, licence = line["patientid"] or name, line["license"] or "unstated"
        pairs, scale = lungs.get(name, ([], (1, 1)))
        split = "train" if zlib.crc32(patient.encode()) % 5 else "test"
        if run.admit("images", split, "not X-ray" if line["modality"] not in ("", "X-ray") else
                     "view" if line["view"] not in ("PA", "AP", "AP Supine", "APS") else
                     "licence" if NO_DERIVATIVES.search(licence) else
                     "no text" if not (report or pairs) else None):
            rows.append({"study": f"{patient}-{zlib.crc32(report.encode()):08x}",  # one per note
                         "patient": patient, "split": split, "report": report, "pairs": pairs,
                         "scale": scale, "name": name.removesuffix(".jpg") + ".jpg",
                         "source": args.repo / (line["folder"] or "images") / name,
                         "licence": (name, licence, line["url"])})
    rows = run.prepare_images(rows)
    run.finish(rows, {})
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("image", "original_file", "licence", "source")] + [
        (row["image"], *row["licence"]) for row in rows])
    write_file(args.out / "LICENSES.csv", lambda draft: draft.write_bytes(text.getvalue().encode()))


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
        add("--size", type=int, default=512,
            help="short side of the JPEGs; 0: originals in place (default: 512, Sec. 2.0.4)")
        add("--workers", type=int, default=min(8, os.cpu_count()),
            help="threads that shrink images (default: the CPUs, at most 8)")
        return add

    add = command("phantom", "draw chest X-rays with findings, reports and boxes")
    add("out", help="folder to write; must not exist")
    for split, n in PHANTOM_SIZES.items():
        add(f"--{split}", type=int, default=n, help=f"images of {split} (default: {n})")
    add("--seed", type=int, default=0, help="the same seed draws the same images (default: 0)")

    add = converter("mimic-cxr", "MIMIC-CXR-JPG, LLaVA-Rad's texts, MIMIC-Ext-CXR-QBA's boxes")
    add("--images", **path, help="root of MIMIC-CXR-JPG")
    add("--llava-rad", **path, help="folder of LLaVA-Rad's chat_*.json")
    add("--qba", type=Path, help="root of MIMIC-Ext-CXR-QBA (default: none, so no boxes)")
    add("--chexmask", type=Path,
        help="CheXmask's MIMIC-CXR-JPG.csv: drop images below 0.7 in Dice RCA (default: none)")
    add("--method", choices=METHODS, default="gpt4",
        help="which texts of LLaVA-Rad; a file without them gives its others (default: gpt4)")
    add("--rating", choices=RATINGS, default="A++",
        help="lowest rating of a text-box pair's question (default: A++, Sec. 3.0.1)")
    add("--wbf-iou", type=float, default=0.1,
        help="fuse boxes of a sentence above this IoU (default: 0.1, not stated in the paper)")

    add = converter("padchest-gr", "PadChest-GR: images, sentences and boxes")
    add("--images", **path, help="folder or zip of the 16-bit PNGs")
    add("--reports", **path, help="grounded_reports_*.json")
    add("--table", type=Path, help="master_table.csv, or .zip (default: none, all rows are train)")
    add("--official-val", action="store_true",
        help="validation is val (default: it is train, as in the paper's pool, Sec. 3.0.1)")

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
    if os.path.lexists(args.out):
        raise InputError(f"{args.out}: exists already; choose a new folder")
    check_ranges(args, {"train": (1, 1e7), "val": (0, 1e7), "test": (0, 1e7),
                        "seed": (0, 2 ** 32 - 1)})
    make_phantom(args.out, {split: getattr(args, split) for split in SPLITS}, args.seed)
    print(f"wrote {args.out}; next: python data.py check {shlex.quote(args.out)}")


if __name__ == "__main__":
    run_command(main, interrupted="stopped; run the same command again")
