"""Retrieval with E_I and E_T: Table 1 (Sec. 3.1), and a search by image or text (Sec. 2.0.2).

    python retrieve.py                              # Table 1 of runs/phantom on its test split
    python retrieve.py --checkpoint runs/NAME google/siglip2-so400m-patch16-512     # a row each
    python retrieve.py --image x.png                # the nearest films by cosine of E_I
    python retrieve.py --text "small left pleural effusion"               # films for a sentence
    python retrieve.py --categories nodule "pleural effusion"      # zero-shot AUROC, P@K, heat maps
    torchrun --nproc_per_node=N retrieve.py         # N processes share the embedding

You will see a bar while films are embedded (they are kept beside the checkpoint, so only once), and
then R@K in the paper's columns and how often the nearest films share a finding; or, for a search,
study, similarity and the start of each report, and a contact sheet PNG.

Q queries  N films or texts of the pool  D shared width
"""

import argparse
import datetime
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import sys
import textwrap
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm
from transformers import AutoConfig, SiglipModel
from transformers import logging as transformers_logging

import data
import metrics
from model import (LoFi, ModelError, SafetensorError, find_device, find_tokenizer, read_config,
                   safe_open, safe_save_file, where_to_look)

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()

DEFAULT_RUN, DEFAULT_DATA = "runs/phantom", "runs/phantom_data"         # what train.py makes


class RetrieveError(ValueError):
    """A search or evaluation cannot be done; the message is one line that says what to do."""


# ---- encoders -----------------------------------------------------------------------------------

class PlainSiglip:
    """A SiglipModel without LoFi's decoder; images and texts take LoFi's one forward path."""

    films, encode_image, encode_text = LoFi.films, LoFi.encode_image, LoFi.encode_text
    heat_map = LoFi.heat_map

    def __init__(self, siglip, text_tokenizer):
        self.siglip, self.text_tokenizer, self.device = siglip, text_tokenizer, siglip.device
        self.image_size = siglip.config.vision_config.image_size
        self.text_length = siglip.config.text_config.max_position_embeddings


def load_siglip(source, device):
    """A SigLIP-family id or folder -> PlainSiglip. Raises RetrieveError."""
    try:
        options = where_to_look(source)
        kind = AutoConfig.from_pretrained(source, **options).model_type
        if kind != "siglip":
            raise ValueError(f"it is a {kind} model")
        siglip, report = SiglipModel.from_pretrained(source, dtype=torch.float32,
                                                     output_loading_info=True, **options)
        if missing := report["missing_keys"]:
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} for one")
        if not (tokenizer := find_tokenizer(source)):
            raise ValueError("it has no tokenizer")
        return PlainSiglip(siglip.to(device).eval(), tokenizer)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    advice = ("train.py makes a run, model.py export a SigLIP folder" if Path(source).exists() else
              "no folder has that name; a gated model wants its terms accepted on huggingface.co "
              "and `hf auth login`")
    raise RetrieveError(f"{source}: neither a run of train.py nor a SigLIP-family model of one "
                        f"image size could be loaded ({reason}); {advice}")


def check_source(source):
    """A path is told from a hub's id by its parent folder: a lost run is not looked for there."""
    path = Path(source)
    if not path.is_dir() and (source == DEFAULT_RUN
                              or len(path.parts) > 1 and path.parent.is_dir()):
        raise RetrieveError(f"{source}: no such checkpoint; python train.py makes runs/phantom, "
                            "and --checkpoint takes a run, or a SigLIP-family id or folder")


def load_encoder(source, device="cpu"):
    """A run folder of train.py, or a SigLIP-family id or local folder -> an encoder.

    It has encode_image and encode_text -> (B, D) of unit length, image_size, text_length, source.
    Raises RetrieveError or ModelError."""
    source = str(source)
    check_source(source)
    try:
        ours = read_config(source)
    except ModelError:
        ours = None
    encoder = LoFi.from_pretrained(source, device) if ours else load_siglip(source, device)
    encoder.source = source
    return encoder


# ---- embeddings of texts and films --------------------------------------------------------------

def ranks():
    """(rank, number of ranks) of torchrun, or (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def say(text):
    """Print, once for all ranks."""
    if not ranks()[0]:
        print(text)


@torch.no_grad()
def text_embeddings(encoder, texts, batch_size=256):
    """E_T of texts -> (N, D) on the CPU. Equal texts are embedded once, so they tie exactly.

    Texts beyond the encoder's length (64 tokens, Sec. 2.0.4) are cut, and counted aloud."""
    tokenizer, length = encoder.text_tokenizer, encoder.text_length
    n_cut = sum(len(data.plain_ids(tokenizer, text.lower())) > length - 1 for text in texts)
    if n_cut:
        say(f"cut to the text encoder's {length} tokens: {n_cut:,} of {len(texts):,} texts")
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    once = list(place)
    emb = torch.cat([encoder.encode_text(once[i:i + batch_size]).cpu()
                     for i in range(0, len(once), batch_size)])
    return emb[[place[text] for text in texts]]


def ahead(function, items, workers):
    """function(item) of each item in order, by threads that run a few items ahead (Pillow decodes
    outside Python's lock)."""
    with ThreadPoolExecutor(workers) as pool:
        results = deque()
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > workers:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()


def embed(encoder, paths, batch_size, bar):
    """E_I of image files -> (N, D) on the CPU, on every rank.

    Under torchrun each rank takes every n-th batch: the batches, and so the last bits, are those of
    one process."""
    rank, n_ranks = ranks()
    starts = range(0, len(paths), batch_size)[rank::n_ranks]
    emb = torch.zeros(len(paths), encoder.siglip.config.vision_config.hidden_size)
    chunks = [paths[i:i + batch_size] for i in starts]
    for i, films in zip(starts, ahead(encoder.films, chunks, min(8, os.cpu_count()))):
        emb[i:i + batch_size] = encoder.encode_image(films).cpu()
        bar.update(min(n_ranks * len(films), bar.total - bar.n))
    if n_ranks > 1:
        dist.all_reduce(emb)                                   # a row is 0 on all ranks but one
    return emb


# ---- the cache: films embedded once -------------------------------------------------------------

PART = 4096                                                    # films between writes, or a 16th


def cache_file(encoder, path):
    """embeddings/NAME.safetensors beside the checkpoint; in runs/ for an id or a read-only
    folder."""
    folder = Path(encoder.source)
    name = data.manifest_path(path).resolve().parent.name + ".safetensors"
    if folder.is_dir() and os.access(folder, os.W_OK):
        return folder / "embeddings" / name
    return Path("runs/embeddings", encoder.source.strip("/.").replace("/", "--"), name)


def settings_of(encoder):
    """What an embedding depends on beside its film: the vision tower's weights, the image size."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.siglip.state_dict().items()):
        if "vision_model" in name:
            raw = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            digest.update(f"{name} {tuple(tensor.shape)} {zlib.crc32(raw)}\n".encode())
    return {"weights": digest.hexdigest(), "image size": encoder.image_size}


def film_key(row):
    """A film of the manifest: its name, bytes and time of change."""
    stat = os.stat(row["path"])
    return f"{row['image']} {stat.st_size} {stat.st_mtime_ns}"


def read_cache(path, settings):
    """-> (film keys, (N, D)), or ([], None), printing why where a file is no use."""
    if not path.exists():
        return [], None
    try:
        with safe_open(path, framework="pt") as cache:
            made_with, emb = json.loads(cache.metadata()["made_with"]), cache.get_tensor("emb")
        keys, checksum = made_with.pop("keys"), made_with.pop("crc32")
        changed = [name for name in settings if settings[name] != made_with[name]]
        reason = changed and "made with other " + " and ".join(changed)
        if not changed and (len(keys) != len(emb) or zlib.crc32(emb.numpy()) != checksum):
            reason = "damaged: its checksum is another"
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"damaged: {(str(error).splitlines() or [type(error).__name__])[0]}"
    if not reason:
        return keys, emb
    say(f"embedding the films anew, {path} is {reason}")
    return [], None


def write_cache(path, settings, keys, emb):
    """By rank 0; the others wait until it is there. A disk that cannot take it costs only the
    reuse."""
    if not ranks()[0]:
        emb = emb.contiguous()
        made_with = json.dumps({**settings, "keys": keys, "crc32": zlib.crc32(emb.numpy())})
        try:
            data.write_whole(path, lambda draft: safe_save_file({"emb": emb}, draft,
                                                                {"made_with": made_with}))
        except (data.DataError, SafetensorError) as error:
            print(f"the embeddings are not kept: {error}")
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def image_embeddings(encoder, path, rows, batch_size=64):
    """E_I of the films of manifest rows -> (N, D) float32 on the CPU, of unit length.

    path: the manifest or its folder, which names the cache. A film is embedded once a checkpoint,
    and anew when its size or time of change is another; part by part, so that a stopped run goes on
    there. Raises RetrieveError without rows, data.DataError for a film that cannot be read."""
    if not rows:
        raise RetrieveError(f"{path}: no films to embed, the pool is empty")
    cache, settings = cache_file(encoder, path), settings_of(encoder)
    wanted = [film_key(row) for row in rows]
    keys, emb = read_cache(cache, settings)
    known, name = set(keys), lambda key: key.rsplit(" ", 2)[0]
    missing = {key: row["path"] for key, row in zip(wanted, rows) if key not in known}
    names, todo = {name(key) for key in missing}, list(missing)
    kept = [i for i, key in enumerate(keys) if name(key) not in names]
    if len(kept) < len(keys):
        say(f"{len(keys) - len(kept):,} films changed since they were embedded in {cache}")
        keys, emb = [keys[i] for i in kept], emb[kept]
    part = batch_size * math.ceil(max(PART, len(todo) / 16) / batch_size)
    bar = tqdm(total=len(todo), desc="embed", unit="film", disable=not todo or ranks()[0] > 0)
    for i in range(0, len(todo), part):
        some = todo[i:i + part]
        new = embed(encoder, [missing[key] for key in some], batch_size, bar)
        keys, emb = keys + some, new if emb is None else torch.cat([emb, new])
        write_cache(cache, settings, keys, emb)
    bar.close()
    place = {key: i for i, key in enumerate(keys)}
    index = [place[key] for key in wanted]
    end = index[0] + len(index)
    in_order = index == list(range(index[0], end))             # then nothing is copied
    return emb[index[0]:end] if in_order else emb[index]


# ---- exact top-k --------------------------------------------------------------------------------

GRID, BLOCK, SPARE = 2.0 ** 26, 64, 8


def on_grid(x):
    """Unit vectors in multiples of 2^-26, as whole float64 numbers. A dot product of two, and every
    partial sum, is then a whole number of at most 2^53: exact in any order, on any machine."""
    return (x * GRID).round_().double()


def check_k(k, n):
    if not 1 <= k <= n:
        raise RetrieveError(f"k is {k}, wanted 1 to {n:,}, which is all of the pool; lower --k or "
                            "take a larger pool (--data, --split)")


def best_of_all(queries, pool, k, rows=8192):
    """top_k the plain way: every similarity in float64, (Q, N) at once."""
    queries = on_grid(queries)
    similarity = torch.cat([queries @ on_grid(some).T for some in pool.split(rows)], 1)    # (Q, N)
    least = similarity.topk(k).values[:, -1:]                                              # (Q, 1)
    above, equal = similarity > least, similarity == least
    chosen = above | equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True))
    index = chosen.nonzero()[:, 1].view(-1, k)                 # ascending in a row        # (Q, k)
    values, order = similarity.gather(1, index).sort(dim=1, descending=True, stable=True)
    return values, index.gather(1, order)


def candidates(near, wanted):
    """Similarities (Q, blocks * 64) -> the `wanted` largest and their indices, (Q, wanted) each.

    The blocks of the largest maxima hold them: torch.topk over these is a tenth of the work."""
    near = near.view(len(near), -1, BLOCK)
    blocks = near.amax(2).topk(min(wanted, near.shape[1])).indices                 # (Q, blocks)
    near = near.gather(1, blocks[..., None].expand(-1, -1, BLOCK)).flatten(1)
    values, place = near.topk(wanted)                                              # (Q, wanted)
    return values, blocks.gather(1, place // BLOCK) * BLOCK + place % BLOCK


def exact_products(queries, pool, index):
    """Products on the grid of queries (Q, D) with their candidates, pool[index (Q, C)] -> (Q, C).

    Threads of our own, a query at a time, which fits a core's cache: torch's would meet after each
    small step, and on a busy machine wait there longer than they work."""
    queries, pool, index = on_grid(queries).numpy(), pool.numpy(), index.numpy()
    found, threads = np.empty(index.shape), torch.get_num_threads()

    def work(part):
        for i in part:
            rows = pool.take(index[i], axis=0)                                     # (C, D)
            rows = np.rint(np.multiply(rows, np.float32(GRID), out=rows), out=rows).astype(float)
            found[i] = np.einsum("cd,d->c", rows, queries[i])
    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(work, np.array_split(np.arange(len(index)), threads)))
    return torch.from_numpy(found)


@torch.no_grad()
def top_k(queries, pool, k, chunk=2 ** 26):
    """The k largest cosines of each query with the pool -> (similarity (Q, k), index (Q, k)).

    queries (Q, D), pool (N, D): float32 of unit length, on one device; the result is on the CPU,
    best first, ties by lower index. torch.topk promises no order of ties, and a matmul's last bits
    depend on shape and machine; so the best k + 8 of a float32 matmul are compared in exact
    arithmetic, and where one beyond them could belong, by the bound on float32's error, the whole
    pool is. The result depends on nothing but the vectors (of which another machine's encoder may
    give other last bits). chunk: similarities held at a time. Raises RetrieveError if k is not 1 to
    N."""
    n, width = pool.shape
    check_k(k, n)
    for x in (queries, pool):
        assert ((x.norm(dim=1) - 1).abs() < 1e-3).all(), "top_k wants rows of unit length"
    wanted, error = min(k + SPARE, n), width * 2.0 ** -23      # of float32, the grid included
    step = min(max(1, chunk // n), max(1, len(queries)))
    table = torch.full((step, -(-n // BLOCK) * BLOCK), -math.inf, device=pool.device)
    own_queries, own_pool = queries.detach().cpu(), pool.detach().cpu()
    similarity = torch.empty(len(queries), k, dtype=torch.double)
    index, unsure = torch.empty(len(queries), k, dtype=torch.long), torch.zeros(len(queries)).bool()
    for first in range(0, len(queries), step):
        here = slice(first, first + step)
        near = table[:len(queries[here])]
        torch.mm(queries[here], pool.T, out=near[:, :n])                           # (step, N)
        values, found = (x.cpu() for x in candidates(near, wanted))                # (step, wanted)
        found = found.sort(1).values                           # lower index first, where they tie
        exact = exact_products(own_queries[here], own_pool, found)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        similarity[here], index[here] = exact[:, :k], found.gather(1, order)[:, :k]
        if wanted < n:
            unsure[here] = exact[:, k - 1] <= (values[:, -1].double() + error) * GRID ** 2
    rest, step = unsure.nonzero()[:, 0], max(1, chunk // 8 // n)
    for first in range(0, len(rest), step):
        some = rest[first:first + step]
        similarity[some], index[some] = best_of_all(own_queries[some], own_pool, k)
    return (similarity / GRID ** 2).float(), index


# ---- Table 1 ------------------------------------------------------------------------------------

def table_1(encoder, table, image_emb):
    """R@K both ways -> {"i2t": .., "t2i": ..}. table: data.sub_report_table; image_emb: of all its
    rows. A film finds its report with any of the sub-reports, a sub-report its one film."""
    images, texts, owner = table
    films = image_emb[images].to(encoder.device)
    texts, every = text_embeddings(encoder, texts).to(encoder.device), np.arange(len(images))
    best = lambda queries, pool: top_k(queries, pool, min(40, len(pool)))[1].numpy()
    return {"i2t": metrics.recall_at_k(best(films, texts), every, owner),
            "t2i": metrics.recall_at_k(best(texts, films), owner, every)}


def print_table(results):
    """{model: {"i2t": .., "t2i": ..}} in the columns of Table 1, percent."""
    width = max(map(len, results))
    print(f"{'':{width}}{'Image-to-Text':^40}  {'Text-to-Image':^40}".rstrip())
    ks = list(next(iter(results.values()))["i2t"])
    line = lambda cells: "  ".join("".join(f"{cell:>8}" for cell in half) for half in cells)
    print(f"{'Model':{width}}" + line([ks, ks]))
    for model, result in results.items():
        print(f"{model:{width}}" + line([[f"{100 * result[way][k]:.2f}" for k in ks]
                                         for way in ("i2t", "t2i")]))


def words_of(row):
    """A film's report, or its phrases where it has none."""
    return row["report"] or " ".join(region["phrase"] for region in row["regions"])


SIZE_WORD = re.compile(r"\b(tiny|small|minimal|slight|mild|moderate|large|marked|severe|massive)"
                       r"(ly)?\b")


def findings(row):
    """What a film shows, and where: its boxed phrases in lower case, without words of size. Those
    of a phantom say kind, side and zone: {"left lower zone consolidation."}."""
    return {" ".join(SIZE_WORD.sub("", region["phrase"].lower()).split())
            for region in row["regions"] if region["boxes"]}


def shared_findings(rows, image_emb, k=5, most=2000):
    """How often one of the k nearest films shares a finding with the query film, beside chance.

    Over at most 2,000 films spread over the rows, each with a finding a query; films of the query's
    own patient do not count. Not in the paper. -> {"neighbours": {"shared@5", "chance",
    "n_queries"}}, the mean share of the k nearest and of all films; {} without findings."""
    step = math.ceil(len(rows) / most)
    rows, emb, found = rows[::step], image_emb[::step], [findings(row) for row in rows[::step]]
    patient = np.unique([row["patient"] for row in rows], return_inverse=True)[1]
    other = patient[:, None] != patient                                            # (N, N)
    shares = np.array([[not a.isdisjoint(b) for b in found] for a in found])       # (N, N)
    cosine = np.where(other, (emb @ emb.T).cpu().numpy(), -2)                      # (N, N)
    nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :k]                    # (N, k)
    queries = [i for i, some in enumerate(found) if some and other[i].sum() >= k]
    if not queries:
        return {}
    near = np.take_along_axis(shares, nearest, axis=1)[queries].mean()
    chance = np.mean([shares[i, other[i]].mean() for i in queries])
    return {"neighbours": {f"shared@{k}": float(near), "chance": float(chance),
                           "n_queries": len(queries)}}


DENIED = re.compile(r"\b(no|not|without|free of)\b")


def names(sentence, category):
    """Whether a sentence names the category, one or several; "massive" names no mass."""
    return re.search(rf"\b{re.escape(category)}(s|es)?\b", sentence.lower())


def sentences_on(row, category):
    """Sentences of the film's report, or its boxed phrases, that name the category and do not deny
    it: a plain reading of words, for want of labels."""
    return [sentence for sentence in data.split_sentences(words_of(row))
            if names(sentence, category) and not DENIED.search(sentence.lower())]


def by_category(encoder, rows, image_emb, categories):
    """Zero-shot classification, retrieval by category and heat maps; not in the paper.

    A category's prompt is the mean E_T of the 20 commonest sentences of these rows that name it,
    "Nodule." if there are none. AUROC of its cosine less that of "No nodule.", P@K of the films
    nearest to it, and the mean contrast-to-noise ratio of the heat maps of its boxed phrases.
    -> {category: {"n_images", "AUROC", "P@1", .., "CNR"}}; None where there is no such film."""
    results, ratios = {}, defaultdict(list)                    # ratios: {phrase: [CNR, ...]}
    for row in tqdm(rows, "heat maps", unit="film"):
        if regions := [region for region in row["regions"] if region["boxes"]]:
            heat = encoder.heat_map(row["path"], [region["phrase"] for region in regions]).cpu()
            for region, one in zip(regions, heat.numpy()):
                ratios[region["phrase"].lower()].append(
                    metrics.contrast_to_noise_ratio(one, region["boxes"]))
    for category in categories:
        name = category.lower().rstrip(".")
        sentences = [sentences_on(row, name) for row in rows]
        labels = [bool(some) for some in sentences]
        common = Counter(sentence for some in sentences for sentence in some).most_common(20)
        named = [sentence for sentence, _ in common] or [f"{name.capitalize()}."]
        *texts, denied = text_embeddings(encoder, [*named, f"No {name}."]).to(image_emb.device)
        prompt = F.normalize(torch.stack(texts).mean(0), dim=0)
        nearest = top_k(prompt[None], image_emb, min(10, len(rows)))[1].numpy()
        own = [ratio for phrase in ratios if names(phrase, name) for ratio in ratios[phrase]
               if not math.isnan(ratio)]                       # a box between the patches' centres
        values = {"AUROC": metrics.auroc(image_emb @ (prompt - denied), labels),
                  **metrics.precision_at_k(nearest, [True], labels),
                  "CNR": float(np.mean(own)) if own else math.nan}
        results[category] = {"n_images": sum(labels), **{
            key: None if math.isnan(value) else value for key, value in values.items()}}
    return results


def print_categories(results):
    """A row a category: films that show it, then AUROC and P@K in percent, and CNR."""
    width, columns = max(8, *map(len, results)), list(next(iter(results.values())))[1:]
    print(f"{'Category':{width}}   films" + "".join(f"{name:>8}" for name in columns))
    for category, result in results.items():
        cells = [f"{result[name] * (1 if name == 'CNR' else 100):8.2f}"
                 if result[name] is not None else f"{'-':>8}" for name in columns]
        print(f"{category:{width}}{result['n_images']:8,}" + "".join(cells))


@torch.no_grad()
def evaluate(args, path, rows, device):
    """Print Table 1, a row a checkpoint, and the neighbours. -> {checkpoint: what --json holds}"""
    rows, results = pool_of(path, rows, args.split), {}
    table = data.sub_report_table(rows)
    if not table[1]:
        raise RetrieveError("no film of the split has a report, and Table 1 ranks reports; give "
                            "other --data or --split, or search with --image")
    for source in args.checkpoint:
        began, encoder = time.time(), load_encoder(source, device)
        image_emb = image_embeddings(encoder, path, rows, args.batch_size)
        if not ranks()[0]:
            results[source] = {**table_1(encoder, table, image_emb),
                               **shared_findings(rows, image_emb.to(device)),
                               "n_images": len(table[0]), "seconds": round(time.time() - began, 1)}
            if args.categories:
                found = by_category(encoder, rows, image_emb, args.categories)
                results[source]["categories"] = found
    if ranks()[0]:
        return {}
    print(f"\nTable 1 on {path}, split {args.split}: {len(table[0]):,} films, one a study, and "
          f"{len(table[1]):,} sub-reports; %\n")
    print_table(results)
    if any("neighbours" in result for result in results.values()):
        print("\nOf the 5 nearest films of other patients, so many share a finding and its place:")
    for source, result in results.items():
        if "neighbours" in result:
            print("{}: {shared@5:.1%}, by chance {chance:.1%} ({n_queries:,} query films)".format(
                source, **result["neighbours"]))
    for source, result in results.items():
        if "categories" in result:
            print(f"\n{source}: AUROC and P@K in %, CNR of the boxed phrases' heat maps\n")
            print_categories(result["categories"])
    print(f"\nNext: python retrieve.py --checkpoint {source} --text 'left pleural effusion'")
    return results


# ---- search by image or text --------------------------------------------------------------------

def card(title, words, film=None, regions=(), frame="black", size=360):
    """A cell of the contact sheet: a film with its boxes, or words alone; a title and the start of
    the words below."""
    cell = Image.new("RGB", (size, size + 88), (18, 18, 18))
    pen, (small, middle, large) = ImageDraw.Draw(cell), map(ImageFont.load_default, (13, 15, 22))
    if film is None:
        quoted = textwrap.fill(textwrap.shorten(words, 300, placeholder=" ..."), 28)
        pen.text((size / 2, size / 2), quoted, "white", large, anchor="mm", align="center")
    else:
        film = ImageOps.contain(film.convert("RGB"), (size - 8, size - 8))
        data.draw_boxes(film, regions)
        cell.paste(film, ((size - film.width) // 2, (size - film.height) // 2))
        start = textwrap.wrap(words, 50, max_lines=3, placeholder=" ...")
        pen.text((8, size + 26), "\n".join(start), (200, 200, 200), small)
    pen.text((8, size + 5), title[:48], "white", middle)
    pen.rectangle([0, 0, size - 1, size + 87], outline=frame, width=3)
    return cell


def contact_sheet(args, own, found):
    """The query first, framed in orange, then the films found, best first -> PIL image.

    own: the query film's row of the manifest, or None."""
    if args.image:
        row = own or {"study": Path(args.image).name, "report": "", "regions": []}
        cells = [card(f"query, {row['study']}", words_of(row), data.load_image(args.image),
                      row["regions"], "orange")]
    else:
        cells = [card("query", args.text, frame="orange")]
    cells += [card(f"{row['rank']}, cosine {row['similarity']:.3f}, {row['study']}", words_of(row),
                   data.load_image(row["path"]), row["regions"]) for row in found]
    return data.tile(cells, math.ceil(len(cells) ** 0.5))


def print_found(found):
    """Rank, similarity, study and the start of the report, a film a line."""
    width = max(5, *(len(row["study"]) for row in found))
    print(f"\nrank  similarity  {'study':{width}}  report")
    for row in found:
        print(f"{row['rank']:4}  {row['similarity']:10.4f}  {row['study']:{width}}  "
              + textwrap.shorten(words_of(row), 90, placeholder=" ..."))


@torch.no_grad()
def search(args, path, rows, device):
    """--image or --text: print the k films nearest, draw the contact sheet. -> what --json holds

    rows: of the whole manifest, where the query's own boxes may be; the split is the pool."""
    pool, file = pool_of(path, rows, args.split), args.image and Path(args.image).resolve()
    own = next((row for row in rows if file and Path(row["path"]).resolve() == file), None)
    others = [i for i, row in enumerate(pool) if not own or row["path"] != own["path"]]
    check_k(args.k, len(others))
    encoder = load_encoder(args.checkpoint[0], device)
    image_emb = image_embeddings(encoder, path, pool, args.batch_size)
    if len(others) < len(pool):
        say("the query is a film of the pool: it is left out of its own neighbours")
        pool, image_emb = [pool[i] for i in others], image_emb[others]
    if ranks()[0]:
        return {}
    emb = (encoder.encode_image(args.image).cpu() if args.image
           else text_embeddings(encoder, [args.text]))
    similarity, index = (x[0].tolist() for x in top_k(emb, image_emb, args.k))
    found = [{**pool[i], "rank": rank, "similarity": round(value, 6)}
             for rank, (value, i) in enumerate(zip(similarity, index), 1)]
    print(f"{encoder.source} on {len(pool):,} films of {path}, split {args.split}")
    print_found(found)
    sheet = contact_sheet(args, own, found)
    data.write_whole(args.png, lambda draft: sheet.save(draft, "PNG"))
    film, phrase = args.image or found[0]["path"], args.text or "left pleural effusion"
    lvlm = "--lvlm lofi " if isinstance(encoder, LoFi) else ""
    print(f"\ndrew {args.png}\nNext: python icl_ground.py {lvlm}--checkpoint {encoder.source} "
          f"--image {shlex.quote(film)} --phrase {shlex.quote(phrase)}")
    names = ("rank", "similarity", "study", "patient", "split", "image", "report", "regions")
    found = [{name: row[name] for name in names} for row in found]
    return {"query": args.image or args.text, "checkpoint": encoder.source, "data": str(path),
            "n_images": len(pool), "results": found}


# ---- command line -------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to do (default: Table 1)")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--image", metavar="FILE", help="search the films nearest to this one by the "
                     "cosine of E_I (Sec. 2.0.2); the file itself is not among them")
    one.add_argument("--text", metavar="WORDS", help="search the films nearest to this sentence by "
                     "the cosine of E_T and E_I; cut at the text encoder's length (64 tokens)")
    group.add_argument("--categories", nargs="+", metavar="WORDS", help="beside Table 1: zero-shot "
                       "AUROC, P@K and the heat maps' contrast-to-noise ratio of such findings as "
                       "'nodule' or 'pleural effusion'; a film shows one if a sentence says so, "
                       "and the commonest of these sentences are the prompt")
    group.add_argument("--k", type=int, default=5, metavar="N",
                       help="films to find (default: %(default)s; Table 1 always prints R@1 to 40)")

    group = parser.add_argument_group("model and data")
    group.add_argument("--checkpoint", nargs="+", default=[DEFAULT_RUN], metavar="RUN",
                       help="run folder of train.py, or a SigLIP-family model id or local folder "
                       "(a baseline of Table 1); several give a row each (default: runs/phantom)")
    group.add_argument("--data", metavar="PATH", help="folder with manifest.jsonl, or that file "
                       "(default: what the first checkpoint was trained on; of a model without a "
                       "run folder, runs/phantom_data)")
    group.add_argument("--split", choices=[*data.SPLITS, "all"], default="test", help="rows of the "
                       "manifest that are evaluated or searched (default: test, as in Sec. 3.0.1)")

    group = parser.add_argument_group("output")
    group.add_argument("--png", default="runs/retrieve.png", metavar="FILE", help="contact sheet "
                       "of a search, the query first (default: %(default)s)")
    group.add_argument("--json", metavar="FILE", help="also write the result there, R@K as "
                       "fractions; under each checkpoint's name if there are several "
                       "(default: not written)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    group.add_argument("--batch-size", type=int, default=64, metavar="B", help="films embedded at "
                       "a time; fewer take less memory (default: %(default)s)")
    return parser.parse_args()


def check_args(args):
    """Flags and files that cannot be, before anything is loaded. Raises RetrieveError, DataError"""
    if args.batch_size < 1:
        raise RetrieveError(f"--batch-size {args.batch_size}: wanted 1 or more")
    if args.text is not None and not args.text.strip():
        raise RetrieveError("--text is empty: wanted a sentence such as 'No pleural effusion.'")
    if args.categories and (args.image or args.text):
        raise RetrieveError("--categories goes with Table 1, not with a search by --image or "
                            "--text")
    if not all(category.strip(" .") for category in args.categories or []):
        raise RetrieveError("--categories: one is empty; wanted words such as 'pleural effusion'")
    if len(args.checkpoint) > 1 and (args.image or args.text):
        raise RetrieveError(f"--checkpoint: found {len(args.checkpoint)}, wanted one for a search "
                            "with --image or --text")
    for source in args.checkpoint:
        check_source(source)
    if args.image:
        data.load_image(args.image)


def trained_on(checkpoint):
    """The manifest when no --data is given: what the checkpoint was trained on, by its trainer.pt;
    of a model without one, and of a phantom run that was moved, runs/phantom_data."""
    path, own = Path(checkpoint) / "trainer.pt", None
    if path.exists():
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            own = state["settings"]["data"]
        except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError):
            raise RetrieveError(f"{path}: damaged, so it does not say what it was trained on; give "
                                "--data")
    if own and Path(own).exists():
        return own
    if Path(DEFAULT_DATA).exists() and Path(own or DEFAULT_DATA).name == Path(DEFAULT_DATA).name:
        return DEFAULT_DATA
    raise RetrieveError(f"{checkpoint}: a checkpoint without a manifest ({own or DEFAULT_DATA} is "
                        "not there); give --data, a folder with manifest.jsonl")


def pool_of(path, rows, split):
    """The rows of the split. Raises data.DataError if it has none."""
    pool = [row for row in rows if split in ("all", row["split"])]
    if not pool:
        raise data.DataError(f"{path}: no rows with split {split!r}, the pool is empty; its splits "
                             f"are {', '.join(sorted({row['split'] for row in rows}))}")
    return pool


def start_ranks():
    """Join the other processes if torchrun started this one."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))


def main():
    args = parse_args()
    check_args(args)
    device, path = find_device(args.device), args.data or trained_on(args.checkpoint[0])
    rows, searching = data.read_manifest(path), args.image or args.text
    start_ranks()
    results = (search if searching else evaluate)(args, path, rows, device)
    if args.json and not ranks()[0]:
        content = results if searching or len(results) > 1 else results[args.checkpoint[0]]
        data.write_json(args.json, content)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (RetrieveError, ModelError, data.DataError, OSError) as error:
        sys.exit(f"retrieve.py: {str(error).strip().splitlines()[0]}")
    except torch.OutOfMemoryError:
        sys.exit("retrieve.py: out of GPU memory; lower --batch-size, or take --device cpu")
