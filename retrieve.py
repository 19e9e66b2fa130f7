"""Retrieval with E_I and E_T: Table 1 (Sec. 3.1), and a search by image or text (Sec. 2.0.2).

    python retrieve.py                              # Table 1 of runs/phantom on its test split
    python retrieve.py --checkpoint runs/NAME google/siglip2-so400m-patch16-512     # a row each
    python retrieve.py --image x.png                # the nearest images by cosine of E_I
    python retrieve.py --text "small left pleural effusion"               # images for a sentence
    python retrieve.py --categories nodule "pleural effusion"      # zero-shot AUROC, P@K, heat maps
    torchrun --nproc_per_node=N retrieve.py         # N processes embed together

You will see a bar while images are embedded (once: the embeddings are kept with the checkpoint),
then R@K in the paper's columns, and by chance; or, for a search, study, similarity and the start of
each report, and a contact sheet PNG.
Q queries  N images or texts of the pool  D shared width
"""

import argparse
from pathlib import Path

DEFAULT_RUN, DEFAULT_DATA = "runs/phantom", "runs/phantom_data"    # what train.py makes


# ---- arguments: before the imports that take seconds, so that --help answers at once -------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do (default: Table 1)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--image", metavar="FILE", help="find the images nearest to this one by E_I (Sec. 2.0.2)")
    add("--text", metavar="WORDS", help="find the images nearest to this sentence by E_T and E_I")
    add("--categories", nargs="+", metavar="WORDS",
        help="also zero-shot AUROC, P@K and heat maps of findings such as 'nodule'")
    group.add_argument("--k", type=int, metavar="N",
                       help="images to find (default: 5, or all of a smaller pool)")

    add = parser.add_argument_group("model and data").add_argument
    add("--checkpoint", nargs="+", default=[DEFAULT_RUN], metavar="RUN",
        help="runs of train.py, or SigLIP-family ids or folders (default: %(default)s)")
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file (default: the "
        f"data of the first checkpoint; without a run folder, {DEFAULT_DATA})")
    add("--split", choices=["train", "val", "test", "all"], default="test",
        help="rows to evaluate or to search (default: test, as in Sec. 3.0.1)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")

    add = parser.add_argument_group("output").add_argument
    add("--png", default="runs/retrieve.png", metavar="FILE",
        help="contact sheet of a search, or heat maps (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the result there, R@K as fractions")
    args = parser.parse_args()
    if args.text is not None and not args.text.strip():
        parser.error("--text is empty, expected a sentence such as 'No pleural effusion.'")
    if not all(category.strip(" .") for category in args.categories or []):
        parser.error("--categories has an empty string, expected words such as 'pleural effusion'")
    if len(args.checkpoint) > 1 and (args.image or args.text):
        parser.error(f"--checkpoint: got {len(args.checkpoint)}, expected one for a search")
    return args


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import hashlib
import math
import os
import re
import shlex
import textwrap
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import data
import metrics
from metrics import InputError, check_output, format_table, write_file, write_json
from model import (Encoder, LoFi, check_checkpoint, checksum, find_device, join_processes,
                   rank_and_world, read_weights, say, silence_libraries, write_weights)


# ---- embeddings and nearest neighbours ----------------------------------------------------------

def text_embeddings(encoder, texts, batch_size=256):
    """E_T of texts -> (N, D) float32 on the CPU, of unit length. Equal texts are embedded once.
    Texts beyond the encoder's length (64 tokens, Sec. 2.0.4) are cut, and a line counts them."""
    tokenizer, length = encoder.text_tokenizer, encoder.text_length
    n_cut = sum(len(data.plain_ids(tokenizer, text.lower())) > length - 1 for text in texts)
    if n_cut:
        say(f"truncated {n_cut:,} of {len(texts):,} texts to the text encoder's {length} tokens")
    unique = list(dict.fromkeys(texts))
    emb = torch.cat([encoder.encode_text(unique[i:i + batch_size]).cpu()
                     for i in range(0, len(unique), batch_size)])
    position = {text: i for i, text in enumerate(unique)}
    return emb[[position[text] for text in texts]]


def cache_file(encoder, path, rows):
    """RUN/embeddings/DATA-HASH.safetensors, or below runs/ for a model id. The hash is of all that
    the embeddings depend on: weights, image size, and the images' names, sizes, times and order."""
    weights = checksum(encoder.siglip.vision_model.state_dict())
    digest = hashlib.sha256(f"{encoder.image_size} {weights}\n".encode())
    for row in rows:
        stat = os.stat(row["path"])
        digest.update(f"{row['image']} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    folder = Path(encoder.source or "runs")
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        folder = Path("runs")
    data_name = data.manifest_path(path).resolve().parent.name
    return folder / "embeddings" / f"{data_name}-{digest.hexdigest()[:16]}.safetensors"


def image_embeddings(encoder, path, rows, batch_size=64):
    """E_I of the images of manifest rows -> (N, D) float32 on the CPU, of unit length, read from
    the cache if it is there. path: the manifest or its folder. Under torchrun each process embeds
    every n-th batch. Raises InputError."""
    if not rows:
        raise InputError(f"{path}: no images to embed, the pool is empty")
    file, (rank, world) = cache_file(encoder, path, rows), rank_and_world()
    if file.exists():
        try:
            return read_weights(file)["emb"]
        except (InputError, KeyError):
            say(f"{file}: damaged, embedding the images again")

    starts = range(0, len(rows), batch_size)[rank::world]
    batches = [[row["path"] for row in rows[i:i + batch_size]] for i in starts]
    emb = torch.zeros(len(rows), encoder.siglip.config.vision_config.hidden_size)  # (N, D)
    n_threads = min(8, os.cpu_count())                         # decode ahead of the encoder
    with ThreadPoolExecutor(n_threads) as threads:
        pixels = data.map_ahead(threads, encoder.pixels, batches, n_threads)
        for i, images in zip(starts, tqdm(pixels, "embed", len(batches), disable=rank > 0)):
            emb[i:i + batch_size] = encoder.encode_image(images).cpu()
    if world > 1:
        dist.all_reduce(emb)                                   # a row is 0 in all processes but one
    if rank == 0:
        try:
            write_weights(file, {"emb": emb})
        except InputError as error:                            # a full disk: not fatal
            print(f"note: the embeddings are not cached: {error}")
    if world > 1:
        dist.barrier()                                         # wait until the file is written
    return emb


def check_k(k, n):
    """Raise InputError unless 1 <= k <= n, the images of the pool."""
    if not 1 <= k <= n:
        raise InputError(f"k is {k}, expected 1 to {n:,}, which is all of the pool; lower --k or "
                         "take a larger pool (--data, --split)")


def top_k(queries, pool, k, chunk=2 ** 26):
    """The k largest cosines of queries (Q, D) with a pool (N, D), on one device -> similarity
    and index, (Q, k) each, on the CPU, best first. chunk: similarities held at a time."""
    check_k(k, len(pool))
    n = min(len(queries), max(1, chunk // len(pool)))          # queries at a time
    cosine = queries.new_empty(n, len(pool))                   # one buffer for all    (n, N)
    similarity, index = zip(*(torch.mm(part, pool.T, out=cosine[:len(part)]).topk(k)
                              for part in queries.split(n)))                       # (n, k) each
    return torch.cat(similarity).cpu(), torch.cat(index).cpu()


# ---- Table 1; zero-shot classification and P@K by category, not in the paper --------------------

def table_1(encoder, table, image_emb):
    """R@K of Table 1 -> {"i2t": {"R@1": .., ..}, "t2i": {..}}, as fractions. An image finds its
    report with any of its sub-reports. table: data.sub_report_table; image_emb: (rows, D)."""
    images, texts, owner = table
    image_emb = image_emb[images].to(encoder.device)                               # (I, D)
    text_emb = text_embeddings(encoder, texts).to(encoder.device)                  # (T, D)
    _, to_text = top_k(image_emb, text_emb, min(40, len(texts)))                   # (I, 40)
    _, to_image = top_k(text_emb, image_emb, min(40, len(images)))                 # (T, 40)
    own = np.arange(len(images))                               # of each image; owner: of each text
    return {"i2t": metrics.recall_at_k(to_text.numpy(), own, owner),
            "t2i": metrics.recall_at_k(to_image.numpy(), owner, own)}


def chance(table):
    """The expected table_1 of random rankings."""
    images, _, owner = table
    own = np.arange(len(images))
    return {"i2t": metrics.chance_recall(own, owner), "t2i": metrics.chance_recall(owner, own)}


def format_table_1(results, by_chance):
    """{model: {"i2t": .., "t2i": ..}}, and chance in the same form -> Table 1 in percent."""
    tables = []
    for way, name in (("i2t", "Image-to-Text"), ("t2i", "Text-to-Image")):
        rows = [(model, *(f"{100 * value:.2f}" for value in result[way].values()))
                for model, result in {**results, "chance": by_chance}.items()]
        tables.append(format_table([(name, *by_chance[way]), *rows]))
    return "\n\n".join(tables)


def words_of(row):
    """An image's report, or its phrases where it has none."""
    return row["report"] or " ".join(region["phrase"] for region in row["regions"])


def mentions(sentence, category):
    """Whether a sentence mentions the category, in singular or plural, and does not negate it."""
    named = rf"\b{re.escape(category.strip(' .'))}(s|es)?\b"
    denied = r"\b(no|not|without|free of)\b"
    return bool(re.search(named, sentence, re.I)) and not re.search(denied, sentence, re.I)


def category_scores(encoder, rows, image_emb, category):
    """-> {"n_images", "AUROC", "P@1", .., "P@10"}; AUROC is None if all images show it, or none.

    The prompt is the mean E_T of the 20 most common sentences of these rows that mention the
    category, or "Nodule." if there are none. AUROC is of its cosine minus that of "No nodule.";
    P@K is the share of the K images nearest to the prompt that show it."""
    named = [[sentence for sentence in data.split_sentences(words_of(row))
              if mentions(sentence, category)] for row in rows]
    labels = np.array([len(sentences) > 0 for sentences in named])
    word = category.lower().strip(" .")
    common = Counter(text for texts in named for text in texts).most_common(20)
    prompts = [text for text, _ in common] or [f"{word.capitalize()}."]
    *present, absent = text_embeddings(encoder, [*prompts, f"No {word}."])
    prompt = torch.nn.functional.normalize(torch.stack(present).mean(0), dim=0)    # (D,)
    nearest = top_k(prompt[None], image_emb, min(10, len(rows)))[1][0].numpy()     # best first
    auroc = metrics.auroc(image_emb @ (prompt - absent), labels)
    return {"n_images": int(labels.sum()), "AUROC": None if math.isnan(auroc) else auroc,
            **{f"P@{k}": float(labels[nearest[:k]].mean()) for k in (1, 2, 5, 10)}}


def print_categories(results):
    """{model: {"categories": {category: category_scores}}} -> AUROC and P@K in percent."""
    for model, result in results.items():
        table = [("Category", "images", "AUROC", "P@1", "P@2", "P@5", "P@10")]
        for category, scores in result["categories"].items():
            n_images, *values = scores.values()
            table.append((category, f"{n_images:,}",
                          *("-" if v is None else f"{100 * v:.2f}" for v in values)))
        print(f"\n{model}: AUROC and P@K in %\n\n{format_table(table)}")


# ---- pictures -----------------------------------------------------------------------------------

def card(title, row, picture=None, frame="black", size=360):
    """A cell of a sheet: a row's image, or a picture in its place; below, title, study, words."""
    image = (picture or data.load_image(row["path"])).convert("RGB")
    image = ImageOps.contain(image, (size - 8, size - 8))
    data.draw_boxes(image, row["regions"])
    cell = Image.new("RGB", (size, size + 88), (18, 18, 18))
    cell.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    words = textwrap.wrap(words_of(row), 48, max_lines=3, placeholder=" ...")
    lines = "\n".join([f"{title}, {row['study']}"[:48], *words])
    pen = ImageDraw.Draw(cell)
    pen.text((8, size + 4), lines, "white", ImageFont.load_default(14))
    pen.rectangle([0, 0, size - 1, size + 87], outline=frame, width=3)
    return cell


def over_image(heat, image):
    """The warmer half of a heat map (g, g), red to yellow, over a grey image -> PIL image."""
    heat = (heat - np.median(heat)) / (heat.max() - np.median(heat) + 1e-9)        # (g, g), <= 1
    warmth = Image.fromarray((255 * heat.clip(0)).astype(np.uint8)).resize(image.size)  # bicubic
    colour = ImageOps.colorize(warmth, "red", "yellow")
    return Image.composite(colour, image.convert("RGB"), warmth.point(lambda value: 0.7 * value))


def heat_map_sheet(encoder, rows, categories, most=4):
    """The first images with boxes of each category, under their heat maps -> PIL image, or None."""
    cells = []
    for category in categories:
        shown = [(row, region) for row in rows for region in row["regions"]
                 if region["boxes"] and mentions(region["phrase"], category)]
        for row, region in shown[:most]:
            heat = encoder.heat_map(row["path"], [region["phrase"]])[0].cpu().numpy()
            picture = over_image(heat, data.load_image(row["path"]))
            cells.append(card(category, {**row, "regions": [region]}, picture))
    return data.tile(cells, most) if cells else None


# ---- checkpoint and data, and the command -------------------------------------------------------

def check_outputs(outputs, inputs, rows, checkpoints):
    """Raise InputError if an output is a file that the command reads, or of another kind.

    outputs: {suffix: path, or None}. inputs: images, manifests or their folders, or None. rows:
    those of the manifests."""
    inputs = [Path(path, "manifest.jsonl") if Path(path).is_dir() else path
              for path in inputs if path]
    inputs += [row["path"] for row in rows]
    inputs += [file for folder in checkpoints for file in Path(folder).rglob("*")
               if re.search("config|token|model|metrics|log|curve", file.name)]    # not a result
    for suffix, output in outputs.items():
        if output:
            check_output(output, suffix, inputs)


def trained_on(checkpoint):
    """The manifest that trainer.pt says the checkpoint was trained on; for a model without one, and
    for a phantom run that was moved, runs/phantom_data. Raises InputError if it is missing."""
    trainer = Path(checkpoint, "trainer.pt")
    if not trainer.exists() and Path(checkpoint, "log.jsonl").exists():
        raise InputError(f"{trainer}: missing, so the run's data is not known: train.py has not "
                         "saved a checkpoint yet, or the file was deleted; give --data")
    try:
        own = torch.load(trainer, map_location="cpu", weights_only=True, mmap=True)[
            "settings"]["data"] if trainer.exists() else DEFAULT_DATA
    except metrics.DAMAGED:
        raise InputError(f"{trainer}: damaged, so its data is not known; give --data")
    for path in (own, DEFAULT_DATA):
        if Path(path).exists() and Path(path).name == Path(own).name:
            return path
    raise InputError(f"{checkpoint}: {own}, its data, cannot be found; give --data")


def search(encoder, args, own, pool, image_emb, k):
    """Print the k rows of the pool nearest to --image, whose row is `own` if it has one, or to
    --text -> the rows, with rank and similarity; a contact sheet with the query first."""
    query = own or {"study": Path(args.image or "text").name, "report": args.text or "",
                    "regions": []}
    if args.image:
        query_emb, picture = encoder.encode_image(args.image).cpu(), data.load_image(args.image)
    else:                                                      # in large letters
        query_emb, picture = text_embeddings(encoder, [args.text]), Image.new("L", (352, 352))
        words = textwrap.fill(args.text, 28, max_lines=11, placeholder=" ...")
        ImageDraw.Draw(picture).text((176, 176), words, 255, ImageFont.load_default(22),
                                     anchor="mm", align="center")
    [similarity], [index] = top_k(query_emb, image_emb, k)                         # (k,) each
    found = [{**pool[i], "rank": n, "similarity": round(value, 6)}
             for n, (value, i) in enumerate(zip(similarity.tolist(), index.tolist()), 1)]
    print("rank  similarity  study: report")
    for row in found:
        start = textwrap.shorten(words_of(row), 80, placeholder=" ...")
        print(f"{row['rank']:4}  {row['similarity']:10.4f}  {row['study']}: {start}")
    cells = [card("query", query, picture, "orange"), *(
        card(f"{row['rank']}, cosine {row['similarity']:.3f}", row) for row in found)]
    return found, data.tile(cells, math.ceil(len(cells) ** 0.5))


def main(args=None):
    args = args or parse_args()
    silence_libraries()

    # ---- all that can be checked before the work starts
    metrics.check_ranges(args, {"k": (1, np.inf), "batch_size": (1, np.inf)})
    device, searching = find_device(args.device), bool(args.image or args.text)
    for source in args.checkpoint:
        check_checkpoint(source)
    if args.image:
        data.load_image(args.image)
    path = args.data or trained_on(args.checkpoint[0])
    rows = data.read_manifest(path)
    pool = [row for row in rows if args.split in ("all", row["split"])]
    if not pool:
        raise InputError(f"{path}: no rows with split {args.split!r}, the pool is empty; its "
                         f"splits are {', '.join(sorted({row['split'] for row in rows}))}")
    own = data.find_row(rows, args.image) if args.image else None
    others = [i for i, row in enumerate(pool) if row is not own]
    images, texts, _ = table = data.sub_report_table(pool)
    if searching:
        k = args.k or max(1, min(5, len(others)))
        check_k(k, len(others))
    elif not texts:
        raise InputError("no image of the split has a report, and Table 1 ranks reports; give "
                         "other --data or --split, or search with --image")
    check_outputs({".json": args.json, ".png": (searching or args.categories) and args.png},
                  [path, args.image], rows, args.checkpoint)
    rank, _ = join_processes()

    # ---- embed in all processes, then search or evaluate in the first
    results, sheet = {}, None
    for source in args.checkpoint:
        began, encoder = time.time(), Encoder.load(source, device)
        image_emb = image_embeddings(encoder, path, pool, args.batch_size)
        if rank == 0 and not searching:
            results[source] = {**table_1(encoder, table, image_emb), "n_images": len(images)}
            if args.categories:
                results[source]["categories"] = {
                    name: category_scores(encoder, pool, image_emb, name)
                    for name in args.categories}
                sheet = sheet or heat_map_sheet(encoder, pool, args.categories)
            results[source]["seconds"] = round(time.time() - began, 1)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    # ---- print and write; a search has one checkpoint
    title, phrase = f"{path}, split {args.split}", args.text or "left pleural effusion"
    if searching:
        left_out = "; the query itself is left out" if len(others) < len(pool) else ""
        print(f"{source} on {len(others):,} images of {title}{left_out}")
        found, sheet = search(encoder, args, own, [pool[i] for i in others], image_emb[others], k)
        keys = "rank", "similarity", *data.ROW_KEYS
        results = {"query": args.image or args.text, "checkpoint": source, "data": str(path),
                   "n_images": len(others),
                   "results": [{key: row[key] for key in keys} for row in found]}
        how = ["lofi"] if isinstance(encoder, LoFi) else ["nearest", "--data", str(path)]
        command = ["icl_ground.py", "--checkpoint", source, "--lvlm", *how, "--image",
                   args.image or found[0]["path"], "--phrase", phrase]
    else:
        print(f"\nTable 1 on {title}: {len(images):,} images, one per study, and {len(texts):,} "
              f"sub-reports; %\n\n{format_table_1(results, chance(table))}")
        if args.categories:
            print_categories(results)
            if not sheet:
                print("\nno picture: no phrase with boxes mentions one of these")
        results = results if len(results) > 1 else results[source]
        command = ["retrieve.py", "--checkpoint", source, "--data", str(path), "--text", phrase]
    if sheet:
        write_file(args.png, lambda draft: sheet.save(draft, "PNG"))
        print(f"\ndrew {args.png}")
    if args.json:
        write_json(args.json, results)
    print(f"\nNext: python {shlex.join(command)}")


if __name__ == "__main__":
    metrics.run_command(main, ARGS)
