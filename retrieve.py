"""Retrieval with E_I and E_T: Table 1 (Sec. 3.1), and a search by image or text (Sec. 2.0.2).

    python retrieve.py                              # Table 1 of runs/phantom on its test split
    python retrieve.py --checkpoint runs/NAME google/siglip2-so400m-patch16-512     # a row each
    python retrieve.py --image x.png                # the nearest images by cosine of E_I
    python retrieve.py --text "small left pleural effusion"               # images for a sentence
    python retrieve.py --categories nodule "pleural effusion"             # zero-shot AUROC, P@K
    torchrun --nproc_per_node=N retrieve.py         # N processes embed together

You will see a bar while images are embedded (once: the embeddings are kept with the checkpoint),
then R@K in the paper's columns, and by chance; or, for a search, study, similarity and the start of
each report, and a contact sheet PNG.

Below: embeddings, nearest neighbours, Table 1, categories. The method ends there; then pictures,
arguments and main. Q queries, N images or texts of the pool; the other letters are model.py's.
"""

import argparse
import math
import os
import pickle
import re
import shlex
import textwrap
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tqdm import tqdm

import data
import metrics
from data import InputError, check_output, format_table, write_file, write_json
from model import (DualEncoder, check_checkpoint, find_device, is_run, join_processes,
                   rank_and_world, say, silence_libraries)

# ---- embeddings ---------------------------------------------------------------------------------

def text_embeddings(encoder, texts, batch_size=256):
    """E_T of texts -> (N, D) float32 on the CPU, of unit length. Equal texts are embedded once.
    Texts beyond the encoder's length (64 tokens, Sec. 2.0.4) are cut, and a line counts them."""
    tokenizer, length = encoder.text_tokenizer, encoder.text_length
    n_cut = sum(len(data.plain_ids(tokenizer, data.siglip_text(tokenizer, text))) > length - 1
                for text in texts)
    if n_cut:
        say(f"truncated {n_cut:,} of {len(texts):,} texts to the text encoder's {length} tokens")
    unique = list(dict.fromkeys(texts))
    emb = torch.cat([encoder.encode_text(unique[i:i + batch_size]).cpu()
                     for i in range(0, len(unique), batch_size)])
    position = {text: i for i, text in enumerate(unique)}
    return emb[[position[text] for text in texts]]


def image_embeddings(encoder, path, rows, batch_size=64):
    """E_I of the images of manifest rows -> (N, D) float32 on the CPU, of unit length, read from
    the cache if it is fresh. path: the manifest or its folder. Under torchrun each process embeds
    every n-th batch."""
    file, (rank, world) = cache_file(encoder, path, rows), rank_and_world()
    if is_fresh(file, [encoder.source], path, rows):
        try:
            return load_file(file)["emb"]
        except (OSError, SafetensorError, KeyError):
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
        emb = emb.to(encoder.device)
        dist.all_reduce(emb)                                   # a row is 0 in all processes but one
        emb = emb.cpu()
    if rank == 0:
        write_file(file, lambda draft: draft.write_bytes(save({"emb": emb})))
    if world > 1:
        dist.barrier()                                         # wait until the file is written
    return emb


def cache_file(encoder, path, rows):
    """RUN/embeddings/DATA-CHECKSUM.safetensors; the checksum is of the manifest's place and of the
    names of the rows' images."""
    manifest = data.manifest_path(path).resolve()
    names = "\n".join([str(manifest), *(row["image"] for row in rows)])
    name = f"{manifest.parent.name}-{zlib.crc32(names.encode()):08x}.safetensors"
    return results_folder(encoder.source) / "embeddings" / name


def results_folder(checkpoint):
    """Where what is made with a checkpoint is kept: in it, or below runs/ for the id of a model."""
    if checkpoint and Path(checkpoint).is_dir() and os.access(checkpoint, os.W_OK):
        return Path(checkpoint)
    return Path("runs", re.sub(r"[^\w.-]+", "_", str(checkpoint)))


def is_fresh(file, checkpoints, *sources):
    """Whether a file made with checkpoints is newer than their weights and than the sources, which
    are manifests, or rows with their images."""
    if not Path(file).exists():
        return False
    paths = [Path(checkpoint or "", "model.safetensors") for checkpoint in checkpoints]
    for source in sources:
        paths += ([row["path"] for row in source] if isinstance(source, list)
                  else [data.manifest_path(source)])
    newest = max((os.stat(path).st_mtime_ns for path in paths if os.path.exists(path)), default=0)
    return os.stat(file).st_mtime_ns > newest


# ---- nearest neighbours -------------------------------------------------------------------------

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
    report with any of its sub-reports (not stated in the paper). table: data.sub_report_table;
    image_emb: (rows, D)."""
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


def category_scores(encoder, rows, image_emb, category):
    """A finding among the manifest's labels -> {"n_images", "AUROC", "P@1", .., "P@10"}.

    AUROC is of the cosine with "Nodule." minus that with "No nodule."; None if all images show it,
    or none. P@K is the share of the K images nearest to "Nodule." that show it. A miniature, which
    has learned few texts and none so short, stays near chance."""
    word = category.lower().strip(" .")
    labels = np.array([word in map(str.lower, row["labels"]) for row in rows])
    present, absent = text_embeddings(encoder, [f"{word.capitalize()}.", f"No {word}."])
    nearest = top_k(present[None], image_emb, min(10, len(rows)))[1][0].numpy()    # best first
    auroc = metrics.auroc(image_emb @ (present - absent), labels)
    return {"n_images": int(labels.sum()), "AUROC": None if math.isnan(auroc) else auroc,
            **{f"P@{k}": float(labels[nearest[:k]].mean()) for k in (1, 2, 5, 10)}}


def format_categories(scores):
    """{category: category_scores} -> AUROC and P@K in percent."""
    table = [("Category", "images", "AUROC", "P@1", "P@2", "P@5", "P@10")]
    for category, values in scores.items():
        cells = [values[name] for name in table[0][2:]]
        table.append((category, f"{values['n_images']:,}",
                      *("-" if v is None else f"{100 * v:.2f}" for v in cells)))
    return format_table(table)


# ==================================================================================================
# The method ends here. Below: the pictures of a search, the data of a run, arguments and main.
# ==================================================================================================

def words_of(row):
    """An image's report, or its phrases where it has none."""
    return row["report"] or " ".join(region["phrase"] for region in row["regions"])


def trained_on(checkpoint):
    """The manifest that a run was trained on, by its trainer.pt; runs/phantom_data for a model that
    is no run, and for a phantom run that was moved. Raises InputError if it cannot be found."""
    own = phantom = Path("runs/phantom_data")
    if is_run(checkpoint):
        try:
            own = Path(torch.load(Path(checkpoint, "trainer.pt"), map_location="cpu",
                                  weights_only=True, mmap=True)["settings"]["data"])
        except (OSError, RuntimeError, LookupError, pickle.UnpicklingError):
            raise InputError(f"{checkpoint}: trainer.pt, which names its data, is missing or "
                             "damaged; give --data")
    if not own.exists() and own.name == phantom.name:
        own = phantom                                          # a phantom run that was moved
    if not own.exists():
        raise InputError(f"{checkpoint}: {own}, its data, cannot be found; give --data")
    return str(own)


def search(encoder, args, own, pool, image_emb, k):
    """Print the k rows of the pool nearest to --image, whose row is `own` if it has one, or to
    --text -> the rows, with rank and similarity; a contact sheet, a query image first."""
    query_emb = (encoder.encode_image(args.image).cpu() if args.image else
                 text_embeddings(encoder, [args.text]))                            # (1, D)
    [similarity], [index] = top_k(query_emb, image_emb, k)                         # (k,) each
    found = [{**pool[i], "rank": n, "similarity": round(value, 6)}
             for n, (value, i) in enumerate(zip(similarity.tolist(), index.tolist()), 1)]
    say("rank  similarity  study: report")
    for row in found:
        start = textwrap.shorten(words_of(row), 80, placeholder=" ...")
        say(f"{row['rank']:4}  {row['similarity']:10.4f}  {row['study']}: {start}")
    cells = [data.cell(data.load_image(row["path"]), row["regions"],
                       f"{row['rank']}, cosine {row['similarity']:.3f}, {row['study']}\n"
                       f"{words_of(row)}") for row in found]
    if args.image:
        regions = own["regions"] if own else []
        cells.insert(0, data.cell(data.load_image(args.image), regions, "query", "orange"))
    return found, data.tile(cells, math.ceil(len(cells) ** 0.5))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do (default: Table 1)")
    add = group.add_mutually_exclusive_group().add_argument
    add("--image", metavar="FILE", help="find the images nearest to this one by E_I (Sec. 2.0.2)")
    add("--text", metavar="WORDS", help="find the images nearest to this sentence by E_T and E_I")
    add("--categories", nargs="+", metavar="WORDS",
        help="also zero-shot AUROC and P@K of findings among the manifest's labels")
    group.add_argument("--k", type=int, metavar="N",
                       help="images to find (default: 5, or all of a smaller pool)")

    add = parser.add_argument_group("model and data").add_argument
    add("--checkpoint", nargs="+", default=["runs/phantom"], metavar="RUN",
        help="runs of train.py, or SigLIP-family ids or folders (default: %(default)s)")
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file (default: the "
        "data of the first checkpoint; without a run folder, runs/phantom_data)")
    add("--split", choices=["train", "val", "test", "all"], default="test",
        help="rows to evaluate or to search (default: test, as in Sec. 3.0.1)")
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--batch-size", type=int, default=64, metavar="B", help="images at a time (default: 64)")

    add = parser.add_argument_group("output").add_argument
    add("--png", default="runs/retrieve.png", metavar="FILE",
        help="contact sheet of a search (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the result there, R@K as fractions")
    return parser.parse_args()


def check_args(args):
    """Reject invalid flags before anything is loaded. Raises InputError."""
    data.check_ranges(args, {"k": (1, np.inf), "batch_size": (1, np.inf)})
    if args.text is not None and not args.text.strip():
        raise InputError("--text is empty, expected a sentence such as 'No pleural effusion.'")
    if len(args.checkpoint) > 1 and (args.image or args.text):
        raise InputError(f"--checkpoint: got {len(args.checkpoint)}, expected one for a search")
    for source in args.checkpoint:
        check_checkpoint(source)
    if args.image:
        data.load_image(args.image)
    check_output(args.png, ".png", args.image)
    if args.json:
        check_output(args.json, ".json", args.image)


def main():
    args = parse_args()
    silence_libraries()
    check_args(args)
    device, path = find_device(args.device), args.data or trained_on(args.checkpoint[0])
    rows = data.read_manifest(path)
    pool = [row for row in rows if args.split in ("all", row["split"])]
    if not pool:
        raise InputError(f"{path}: no rows with split {args.split!r}, the pool is empty; its "
                         f"splits are {', '.join(sorted({row['split'] for row in rows}))}")
    rank, _ = join_processes(device)
    print_results = print_search if args.image or args.text else print_table_1
    result, command = print_results(args, path, rows, pool, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank == 0:
        if args.json:
            write_json(args.json, result)
        print(f"\nNext: python {shlex.join(command)}")


def print_search(args, path, rows, pool, device):
    """--image or --text: print and draw what is nearest -> what --json holds, the next command."""
    [checkpoint], own = args.checkpoint, data.find_row(rows, args.image) if args.image else None
    others = [i for i, row in enumerate(pool) if row is not own]
    k = args.k or max(1, min(5, len(others)))
    check_k(k, len(others))
    encoder = DualEncoder.load(checkpoint, device)
    image_emb = image_embeddings(encoder, path, pool, args.batch_size)[others]
    left_out = "; the query itself is left out" if len(others) < len(pool) else ""
    say(f"{checkpoint} on {len(others):,} images of {path}, split {args.split}{left_out}")
    found, sheet = search(encoder, args, own, [pool[i] for i in others], image_emb, k)
    write_file(args.png, lambda draft: sheet.save(draft, "PNG"))
    say(f"\ndrew {args.png}")
    keys = "rank", "similarity", *data.ROW_KEYS
    result = {"query": args.image or args.text, "checkpoint": checkpoint, "data": str(path),
              "n_images": len(others),
              "results": [{key: row.get(key) for key in keys} for row in found]}
    return result, ["icl_ground.py", "--checkpoint", checkpoint, "--data", str(path), "--image",
                    args.image or found[0]["path"], "--phrase", args.text or "pleural effusion"]


def print_table_1(args, path, rows, pool, device):
    """Table 1 of each checkpoint, and --categories -> what --json holds, the next command."""
    labelled = [i for i, row in enumerate(pool) if row.get("labels") is not None]
    images, texts, _ = table = data.sub_report_table(pool)
    if not texts:
        raise InputError("no image of the split has a report, and Table 1 ranks reports; give "
                         "other --data or --split, or search with --image")
    if args.categories and not labelled:
        raise InputError(f"{path}: no row of split {args.split!r} has 'labels', which --categories "
                         "scores; add them to the manifest")
    results = {}
    for source in args.checkpoint:
        began, encoder = time.time(), DualEncoder.load(source, device)
        image_emb = image_embeddings(encoder, path, pool, args.batch_size)
        results[source] = {**table_1(encoder, table, image_emb), "n_images": len(images)}
        if args.categories:
            of_labelled = [pool[i] for i in labelled], image_emb[labelled]
            results[source]["categories"] = {
                name: category_scores(encoder, *of_labelled, name) for name in args.categories}
        results[source]["seconds"] = round(time.time() - began, 1)
    say(f"\nTable 1 on {path}, split {args.split}: {len(images):,} images, one per study, and "
        f"{len(texts):,} sub-reports; %\n\n{format_table_1(results, chance(table))}")
    for name in args.checkpoint if args.categories else []:
        say(f"\n{name}: AUROC and P@K in %\n\n{format_categories(results[name]['categories'])}")
    result = results if len(results) > 1 else results[args.checkpoint[0]]
    return result, ["retrieve.py", "--checkpoint", args.checkpoint[0], "--data", str(path),
                    "--text", "left pleural effusion"]


if __name__ == "__main__":
    data.run_command(main)
