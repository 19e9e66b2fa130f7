"""Retrieval with E_I and E_T: Table 1 (Sec. 3.1), and a search by image or text (Sec. 2.0.2).

    python retrieve.py                              # Table 1 of runs/phantom on its test split
    python retrieve.py --checkpoint runs/NAME google/siglip2-so400m-patch16-512     # a row each
    python retrieve.py --image x.png                # the nearest images by cosine of E_I
    python retrieve.py --text "small left pleural effusion"               # images for a sentence
    python retrieve.py --categories nodule "pleural effusion"      # zero-shot AUROC, P@K, heat maps
    torchrun --nproc_per_node=N retrieve.py         # N processes share the embedding

You will see a bar while images are embedded (the embeddings are kept beside the checkpoint, so only
once), then R@K in the paper's columns beside chance; or, for a search, study, similarity and the
start of each report, and a contact sheet PNG.

Q queries  N images or texts of the pool  D shared width
"""

import argparse
import sys

DEFAULT_RUN, DEFAULT_DATA = "runs/phantom", "runs/phantom_data"    # what train.py makes


# ---- arguments: before the imports that take seconds, so that --help answers at once -------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do (default: Table 1)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--image", metavar="FILE", help="search the images nearest to this one by the "
                     "cosine of E_I (Sec. 2.0.2); the image itself is not among them")
    one.add_argument("--text", metavar="WORDS", help="search the images nearest to this sentence "
                     "by the cosine of E_T and E_I; cut at the text encoder's length (64 tokens)")
    one.add_argument("--categories", nargs="+", metavar="WORDS", help="beside Table 1: zero-shot "
                     "AUROC, P@K and the heat maps' contrast-to-noise ratio of such findings as "
                     "'nodule' or 'pleural effusion', and a PNG of heat maps; an image shows a "
                     "finding if a sentence of its report says so, and the commonest of these "
                     "sentences are the prompt")
    group.add_argument("--k", type=int, metavar="N", help="images to find (default: 5, or all of a "
                       "smaller pool; Table 1 always prints R@1 to R@40)")

    group = parser.add_argument_group("model and data")
    group.add_argument("--checkpoint", nargs="+", default=[DEFAULT_RUN], metavar="RUN",
                       help="run folder of train.py, or a SigLIP-family model id or local folder "
                       f"(a baseline of Table 1); several give a row each (default: {DEFAULT_RUN})")
    group.add_argument("--data", metavar="PATH", help="folder with manifest.jsonl, or that file "
                       "(default: what the first checkpoint was trained on; of a model without a "
                       f"run folder, {DEFAULT_DATA})")
    group.add_argument("--split", choices=["train", "val", "test", "all"], default="test",
                       help="rows of the manifest that are evaluated or searched (default: test, "
                       "as in Sec. 3.0.1)")

    group = parser.add_argument_group("output")
    group.add_argument("--png", default="runs/retrieve.png", metavar="FILE", help="contact sheet "
                       "of a search, the query first, or heat maps (default: %(default)s)")
    group.add_argument("--json", metavar="FILE", help="also write the result there, R@K as "
                       "fractions; under each checkpoint's name if there are several "
                       "(default: not written)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    group.add_argument("--batch-size", type=int, default=64, metavar="B", help="images embedded "
                       "at a time; fewer take less memory (default: %(default)s)")
    args = parser.parse_args()

    if args.batch_size < 1:
        parser.error(f"--batch-size: got {args.batch_size}, expected 1 or more")
    if args.k is not None and args.k < 1:
        parser.error(f"--k: got {args.k}, expected 1 or more")
    if args.text is not None and not args.text.strip():
        parser.error("--text: is empty, expected a sentence such as 'No pleural effusion.'")
    if not all(category.strip(" .") for category in args.categories or []):
        parser.error("--categories: one is empty, expected words such as 'pleural effusion'")
    if len(args.checkpoint) > 1 and (args.image or args.text):
        parser.error(f"--checkpoint: got {len(args.checkpoint)}, expected one for a search")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import hashlib
import math
import os
import pickle
import re
import shlex
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm
from transformers import logging as transformers_logging

import data
import metrics
from metrics import InputError, check_output, first_line, format_table, write_file, write_json
from model import (Encoder, LoFi, find_device, join_processes, rank_and_world, read_weights, say,
                   write_weights)

# ---- embeddings ---------------------------------------------------------------------------------

@torch.no_grad()
def text_embeddings(encoder, texts, batch_size=256):
    """E_T of texts -> (N, D) float32 on the CPU, of unit length. Equal texts are embedded once.

    Texts beyond the encoder's length (64 tokens, Sec. 2.0.4) are cut, and a line counts them."""
    tokenizer, length = encoder.text_tokenizer, encoder.text_length
    n_cut = sum(len(data.plain_ids(tokenizer, text.lower())) > length - 1 for text in texts)
    if n_cut:
        say(f"cut to the text encoder's {length} tokens: {n_cut:,} of {len(texts):,} texts")
    unique = list(dict.fromkeys(texts))
    emb = torch.cat([encoder.encode_text(unique[i:i + batch_size]).cpu()
                     for i in range(0, len(unique), batch_size)])
    place = {text: i for i, text in enumerate(unique)}
    return emb[[place[text] for text in texts]]


@torch.no_grad()
def embed(encoder, paths, batch_size=64):
    """E_I of image files -> (N, D) float32 on the CPU, of unit length, the same on every process.

    Under torchrun each process takes every n-th batch. Threads decode images some batches ahead of
    the encoder. Raises InputError for an image that cannot be read."""
    rank, world = rank_and_world()
    starts = range(0, len(paths), batch_size)[rank::world]
    batches = [paths[i:i + batch_size] for i in starts]
    emb = torch.zeros(len(paths), encoder.siglip.config.vision_config.hidden_size)
    n_threads = min(8, os.cpu_count())
    with (ThreadPoolExecutor(n_threads) as threads,
          tqdm(total=len(paths), desc="embed", unit="image", disable=rank > 0) as bar):
        pixels = data.map_ahead(threads, encoder.pixels, batches, n_threads)
        for i, images in zip(starts, pixels):
            emb[i:i + batch_size] = encoder.encode_image(images).cpu()
            bar.update(min(world * len(images), bar.total - bar.n))
    if world > 1:
        dist.all_reduce(emb)                                   # a row is 0 on all but one process
    return emb


def cache_file(encoder, path, rows):
    """The file for the embeddings of these rows, named by a hash of all that they depend on: the
    vision tower's weights, the image size, each image's name, bytes and time of change.

    In embeddings/ beside the checkpoint; in runs/embeddings/ for a model id or a read-only folder.
    """
    digest = hashlib.sha256(f"{encoder.image_size}".encode())
    for name, tensor in encoder.siglip.vision_model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    for row in rows:
        stat = os.stat(row["path"])
        digest.update(f"{row['image']} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    folder = Path(encoder.source or "runs")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        folder = Path("runs")
    name = data.manifest_path(path).resolve().parent.name
    return folder / "embeddings" / f"{name}-{digest.hexdigest()[:16]}.safetensors"


def image_embeddings(encoder, path, rows, batch_size=64):
    """E_I of the images of manifest rows -> (N, D) float32 on the CPU, of unit length.

    path: the manifest or its folder, which names the cache. The same rows are embedded once for a
    checkpoint. Raises InputError without rows, and for an image that cannot be read."""
    if not rows:
        raise InputError(f"{path}: no images to embed, the pool is empty")
    file = cache_file(encoder, path, rows)
    if file.exists():
        try:
            return read_weights(file)["emb"]
        except (InputError, KeyError):
            say(f"{file}: damaged, embedding the images anew")
    emb = embed(encoder, [row["path"] for row in rows], batch_size)
    if rank_and_world()[0] == 0:
        try:
            write_weights(file, {"emb": emb})
        except InputError as error:                            # a full disk costs only the reuse
            print(f"the embeddings are not kept: {error}")
    if dist.is_initialized():
        dist.barrier()                                         # none looks for a file half-way
    return emb


# ---- nearest neighbours -------------------------------------------------------------------------

def check_k(k, n):
    if not 1 <= k <= n:
        raise InputError(f"k is {k}, expected 1 to {n:,}, which is all of the pool; lower --k or "
                         "take a larger pool (--data, --split)")


@torch.no_grad()
def top_k(queries, pool, k, chunk=2 ** 26):
    """The k largest cosines of each query with the pool -> (similarity (Q, k), index (Q, k)).

    queries (Q, D), pool (N, D): of unit length, on one device; the result is on the CPU, best
    first. chunk: similarities held at a time. Raises InputError if k is not 1 to N."""
    check_k(k, len(pool))
    n = min(len(queries), max(1, chunk // len(pool)))          # queries at a time
    cosine = queries.new_empty(n, len(pool))                   # one buffer for all    (n, N)
    similarity, index = [], []
    for some in queries.split(n):
        nearest = torch.mm(some, pool.T, out=cosine[:len(some)]).topk(k)           # (n, k)
        similarity.append(nearest.values.cpu())
        index.append(nearest.indices.cpu())
    return torch.cat(similarity), torch.cat(index)


# ---- Table 1 ------------------------------------------------------------------------------------

def table_1(encoder, table, image_emb):
    """R@K of Table 1 -> {"i2t": {"R@1": .., ..}, "t2i": {..}}, as fractions.

    table: data.sub_report_table of the rows; image_emb: (rows, D). An image finds its report with
    any of its sub-reports, a sub-report its one image."""
    images, texts, owner = table
    image_emb = image_emb[images].to(encoder.device)                               # (I, D)
    text_emb = text_embeddings(encoder, texts).to(encoder.device)                  # (T, D)
    _, to_text = top_k(image_emb, text_emb, min(40, len(texts)))                   # (I, 40)
    _, to_image = top_k(text_emb, image_emb, min(40, len(images)))                 # (T, 40)
    every = np.arange(len(images))
    return {"i2t": metrics.recall_at_k(to_text.numpy(), every, owner),
            "t2i": metrics.recall_at_k(to_image.numpy(), owner, every)}


def chance(table):
    """What table_1 expects of random rankings."""
    images, _, owner = table
    every = np.arange(len(images))
    return {"i2t": metrics.chance_recall(every, owner), "t2i": metrics.chance_recall(owner, every)}


def print_table_1(results, chance):
    """Table 1 in percent: {model: {"i2t": .., "t2i": ..}}, and chance of the same form."""
    for way, name in (("i2t", "Image-to-Text"), ("t2i", "Text-to-Image")):
        rows = [(name, *chance[way])]
        for model, result in {**results, "chance": chance}.items():
            rows.append((model, *(f"{100 * value:.2f}" for value in result[way].values())))
        print(f"\n{format_table(rows)}")


# ---- categories: zero-shot classification, P@K and heat maps; not in the paper ------------------

DENIED = re.compile(r"\b(no|not|without|free of)\b")


def words_of(row):
    """An image's report, or its phrases where it has none."""
    return row["report"] or " ".join(region["phrase"] for region in row["regions"])


def names(sentence, category):
    """Whether a sentence names the category, in singular or plural, and does not deny it."""
    sentence, category = sentence.lower(), category.lower().strip(" .")
    named = re.search(rf"\b{re.escape(category)}(s|es)?\b", sentence)
    return bool(named) and not DENIED.search(sentence)


def sentences_on(row, category):
    """The sentences of an image's report that name the category: keywords, there are no labels."""
    return [sentence for sentence in data.split_sentences(words_of(row))
            if names(sentence, category)]


def regions_on(row, category):
    """The boxed regions of an image whose phrase names the category."""
    return [region for region in row["regions"]
            if region["boxes"] and names(region["phrase"], category)]


def heat_contrast(encoder, rows, category):
    """Mean contrast-to-noise ratio of the heat maps of the category's boxed phrases, or NaN."""
    ratios = []
    for row in tqdm(rows, f"heat maps, {category}", unit="image"):
        if regions := regions_on(row, category):
            heat = encoder.heat_map(row["path"], [region["phrase"] for region in regions]).cpu()
            ratios += [metrics.contrast_to_noise_ratio(one, region["boxes"])
                       for one, region in zip(heat.numpy(), regions)]
    ratios = [ratio for ratio in ratios if not math.isnan(ratio)]  # a box between patch centres
    return float(np.mean(ratios)) if ratios else math.nan


def category_scores(encoder, rows, image_emb, category):
    """-> {"n_images", "AUROC", "P@1", .., "CNR"}; None for a score without such an image.

    The category's prompt is the mean E_T of the 20 commonest sentences of these rows that name it,
    "Nodule." if there are none. AUROC is that of its cosine minus that of "No nodule."; P@K is of
    the images nearest to it."""
    category = category.lower().strip(" .")
    sentences = [sentences_on(row, category) for row in rows]
    labels = [len(some) > 0 for some in sentences]
    common = Counter(sentence for some in sentences for sentence in some).most_common(20)
    prompts = [sentence for sentence, _ in common] or [f"{category.capitalize()}."]
    *present, absent = text_embeddings(encoder, [*prompts, f"No {category}."])
    prompt = F.normalize(torch.stack(present).mean(0), dim=0)                      # (D,)
    _, nearest = top_k(prompt[None], image_emb, min(10, len(rows)))
    scores = {"AUROC": metrics.auroc(image_emb @ (prompt - absent), labels),
              **metrics.precision_at_k(nearest.numpy(), [True], labels),
              "CNR": heat_contrast(encoder, rows, category)}
    return {"n_images": sum(labels),
            **{name: None if math.isnan(score) else score for name, score in scores.items()}}


def print_categories(results):
    """{category: category_scores} -> a row each: AUROC and P@K in percent, and CNR."""
    columns = [name for name in next(iter(results.values())) if name != "n_images"]
    rows = [("Category", "images", *columns)]
    for category, scores in results.items():
        cells = ["-" if scores[name] is None else
                 f"{scores[name] * (1 if name == 'CNR' else 100):.2f}" for name in columns]
        rows.append((category, f"{scores['n_images']:,}", *cells))
    print(format_table(rows))


# ---- pictures -----------------------------------------------------------------------------------

def card(title, words, image=None, regions=(), frame="black", size=360):
    """A cell of a sheet: an image with its boxes, or words alone; below, a title and the words."""
    cell = Image.new("RGB", (size, size + 88), (18, 18, 18))
    pen, (small, middle, large) = ImageDraw.Draw(cell), map(ImageFont.load_default, (13, 15, 22))
    if image is None:
        quoted = textwrap.fill(textwrap.shorten(words, 300, placeholder=" ..."), 28)
        pen.text((size / 2, size / 2), quoted, "white", large, anchor="mm", align="center")
    else:
        image = ImageOps.contain(image.convert("RGB"), (size - 8, size - 8))
        data.draw_boxes(image, regions)
        cell.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
        start = textwrap.wrap(words, 50, max_lines=3, placeholder=" ...")
        pen.text((8, size + 26), "\n".join(start), (200, 200, 200), small)
    pen.text((8, size + 5), title[:48], "white", middle)
    pen.rectangle([0, 0, size - 1, size + 87], outline=frame, width=3)
    return cell


def contact_sheet(query, found):
    """The query's card first, then the images found, best first -> PIL image."""
    cells = [card(f"{row['rank']}, cosine {row['similarity']:.3f}, {row['study']}", words_of(row),
                  data.load_image(row["path"]), row["regions"]) for row in found]
    return data.tile([query, *cells], math.ceil((len(cells) + 1) ** 0.5))


def over_image(heat, image, size=352):
    """A heat map (g, g) in colour over a grey image -> PIL image: the warmer, the less of the image
    shows through; the coldest half of the map is left out."""
    image = ImageOps.contain(image.convert("L"), (size, size))
    heat = (heat - np.median(heat)) / (heat.max() - np.median(heat) + 1e-9)        # (g, g), <= 1
    heat = Image.fromarray(heat.clip(0).astype(np.float32)).resize(image.size,
                                                                   Image.Resampling.BICUBIC)
    heat = np.asarray(heat).clip(0, 1)[..., None]                                  # (H, W, 1)
    colour = np.concatenate([255 + 0 * heat, 220 * heat ** 2, 60 * heat ** 4], 2)  # red to yellow
    grey = np.asarray(image, np.float32)[..., None]
    return Image.fromarray((grey + (colour - grey) * 0.7 * heat).astype(np.uint8))


def heat_map_sheet(encoder, rows, categories, most=4):
    """For each category a row of the first images that show it, each with the heat map of a phrase
    and its true boxes; of a sentence of the report where no phrase has boxes.

    -> PIL image, or None if no image shows a category."""
    cells = []
    for category in categories:
        shown = ([(row, region) for row in rows for region in regions_on(row, category)] or
                 [(row, {"phrase": sentence, "boxes": []})
                  for row in rows for sentence in sentences_on(row, category)])[:most]
        for row, region in shown:
            heat = encoder.heat_map(row["path"], [region["phrase"]])[0].cpu().numpy()
            picture = over_image(heat, data.load_image(row["path"]))
            cells.append(card(f"{category}, {row['study']}", region["phrase"], picture,
                              [{**region, "phrase": ""}]))
        if shown:
            cells += [card("", "")] * (most - len(shown))
    return data.tile(cells, most) if cells else None


# ---- search by image or text --------------------------------------------------------------------

FOUND_KEYS = ("rank", "similarity", "study", "patient", "split", "image", "report", "regions")


def search(query_emb, pool, image_emb, k, own=None):
    """The k rows of the pool nearest to a query (1, D), with "rank" and "similarity", best first.

    own: the query image's row, which is left out."""
    others = [i for i, row in enumerate(pool) if row is not own]
    similarity, index = top_k(query_emb, image_emb[others], k)
    return [{**pool[others[i]], "rank": rank, "similarity": round(value, 6)}
            for rank, (value, i) in enumerate(zip(similarity[0].tolist(), index[0].tolist()), 1)]


def print_found(found):
    """Study, rank, similarity and the start of the report, an image on each line."""
    starts = [textwrap.shorten(words_of(row), 80, placeholder=" ...") for row in found]
    width = max(map(len, ["report", *starts]))                 # text is aligned on the left
    rows = [("study", "rank", "similarity", "report".ljust(width))]
    for row, start in zip(found, starts):
        rows.append((row["study"], str(row["rank"]), f"{row['similarity']:.4f}",
                     start.ljust(width)))
    print(f"\n{format_table(rows)}")


# ---- checkpoint and data ------------------------------------------------------------------------

def check_checkpoint(source):
    """Raise InputError if the default run is missing, before it is looked for on the Hub."""
    if source == DEFAULT_RUN and not Path(source).is_dir():
        raise InputError(f"{source}: no such checkpoint; python train.py makes it, and "
                         "--checkpoint takes a run, or a SigLIP-family id or folder")


def trained_on(checkpoint):
    """The manifest where no --data is given: what trainer.pt says the checkpoint was trained on.

    Of a model without one, and of a phantom run that was moved, runs/phantom_data. Raises
    InputError if it is not there."""
    trainer, own = Path(checkpoint) / "trainer.pt", DEFAULT_DATA
    if trainer.exists():
        try:
            state = torch.load(trainer, map_location="cpu", weights_only=True, mmap=True)
            own = state["settings"]["data"]
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
            raise InputError(f"{trainer}: damaged, so it does not say what the run was trained on; "
                             "give --data")
    for path in (own, DEFAULT_DATA):
        if Path(path).exists() and Path(path).name == Path(own).name:
            return path
    raise InputError(f"{checkpoint}: its data {own} are not there (were they moved?); give --data, "
                     "a folder with manifest.jsonl")


def rows_of_split(rows, split, path):
    """The rows of a split, or of all. Raises InputError if there are none."""
    pool = [row for row in rows if split in ("all", row["split"])]
    if not pool:
        raise InputError(f"{path}: no rows with split {split!r}, the pool is empty; its splits are "
                         f"{', '.join(sorted({row['split'] for row in rows}))}")
    return pool


def check_outputs(outputs, checkpoints, image, path, rows):
    """Raise InputError if an output is the query, the manifest, an image of it or a checkpoint."""
    inputs = [data.manifest_path(path), *(row["path"] for row in rows), *([image] if image else []),
              *(Path(source, name) for source in checkpoints
                for name in ("config.json", "model.safetensors", "trainer.pt"))]
    for output in outputs:
        if output:
            check_output(output, inputs)


# ---- the command --------------------------------------------------------------------------------

def evaluate(encoder, table, pool, image_emb, categories):
    """Table 1 and the categories of one encoder -> what --json holds."""
    result = {**table_1(encoder, table, image_emb), "n_images": len(table[0])}
    if categories:
        result["categories"] = {category: category_scores(encoder, pool, image_emb, category)
                                for category in categories}
    return result


def print_evaluation(results, table, title):
    """Table 1 beside chance, then the categories of each checkpoint."""
    images, texts, _ = table
    print(f"\nTable 1 on {title}: {len(images):,} images, one a study, and {len(texts):,} "
          "sub-reports; %")
    print_table_1(results, chance(table))
    for source, result in results.items():
        if "categories" in result:
            print(f"\n{source}: AUROC and P@K in %, CNR of the boxed phrases' heat maps\n")
            print_categories(result["categories"])


def query_card(image, text, own):
    """The query's cell of the contact sheet, framed in orange; own: its row, if it has one."""
    if text:
        return card("query", text, frame="orange")
    row = own or {"study": Path(image).name, "report": "", "regions": []}
    return card(f"query, {row['study']}", words_of(row), data.load_image(image), row["regions"],
                "orange")


def grounding_command(encoder, path, image, phrase):
    """The icl_ground.py command that finds a phrase on an image, without a download."""
    how = ["lofi"] if isinstance(encoder, LoFi) else ["nearest", "--data", str(path)]
    return shlex.join(["python", "icl_ground.py", "--checkpoint", encoder.source, "--lvlm", *how,
                       "--image", str(image), "--phrase", phrase])


def main(args=None):
    args = args or parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    searching = bool(args.image or args.text)

    # ---- all that can be checked before the work starts
    device = find_device(args.device)
    for source in args.checkpoint:
        check_checkpoint(source)
    if args.image:
        data.load_image(args.image)
    path = args.data or trained_on(args.checkpoint[0])
    rows = data.read_manifest(path)
    pool = rows_of_split(rows, args.split, path)
    own = data.find_row(rows, args.image) if args.image else None
    n_others = sum(row is not own for row in pool)
    k = min(5, n_others) if args.k is None else args.k
    table = data.sub_report_table(pool)                        # images, sub-reports, their owners
    if searching:
        check_k(k, n_others)
    elif not table[1]:
        raise InputError("no image of the split has a report, and Table 1 ranks reports; give "
                         "other --data or --split, or search with --image")
    pictures = [args.png] if searching or args.categories else []
    check_outputs([*pictures, args.json], args.checkpoint, args.image, path, rows)
    rank, _ = join_processes()

    # ---- embed, then search or evaluate on the first process
    results, sheet = {}, None
    for source in args.checkpoint:
        began = time.time()
        encoder = Encoder.load(source, device)
        image_emb = image_embeddings(encoder, path, pool, args.batch_size)
        if rank > 0:
            continue
        if searching:
            query_emb = (encoder.encode_image(args.image).cpu() if args.image
                         else text_embeddings(encoder, [args.text]))
            found = search(query_emb, pool, image_emb, k, own)
            sheet = contact_sheet(query_card(args.image, args.text, own), found)
        else:
            results[source] = evaluate(encoder, table, pool, image_emb, args.categories)
            results[source]["seconds"] = round(time.time() - began, 1)
            if args.categories and not sheet:
                sheet = heat_map_sheet(encoder, pool, args.categories)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    # ---- print and write
    title = f"{path}, split {args.split}"
    if searching:
        print(f"{source} on {n_others:,} images of {title}")
        if n_others < len(pool):
            print("the query is an image of the pool: it is left out of its own neighbours")
        print_found(found)
        results = {"query": args.image or args.text, "checkpoint": source, "data": str(path),
                   "n_images": n_others, "results": [{key: row[key] for key in FOUND_KEYS}
                                                     for row in found]}
        command = grounding_command(encoder, path, args.image or found[0]["path"],
                                    args.text or "left pleural effusion")
    else:
        print_evaluation(results, table, title)
        results = results if len(results) > 1 else results[source]
        command = shlex.join(["python", "retrieve.py", "--checkpoint", source,
                              *(["--data", args.data] if args.data else []),
                              "--text", "left pleural effusion"])
    if sheet:
        write_file(args.png, lambda draft: sheet.save(draft, "PNG"))
        print(f"\ndrew {args.png}")
    if args.json:
        write_json(args.json, results)
    print(f"\nNext: {command}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (InputError, OSError) as error:
        sys.exit(f"retrieve.py: {first_line(error)}")
    except torch.OutOfMemoryError:
        sys.exit("retrieve.py: out of GPU memory; lower --batch-size, or give --device cpu")
