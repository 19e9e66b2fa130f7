"""Benchmarks, each a ratio of things timed in one run: python tests/bench.py NAME [--json PATH].

    retrieve     exact top-40 against a bare chunked matmul, memory, recall@K over 100,000 x 100,000
    icl          in-context grounding: the shared prefix against one call per phrase
    prepare      the converters: rows a second, resized images a second

Machines are shared and differ, so a figure alone says little: compare the ratios.
"""

import argparse
import gzip
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data                                            # noqa: E402


# ---- retrieve -----------------------------------------------------------------------------------

def unit_vectors(n, width, near=None):
    """Random rows of unit length; near: rows that they lie around, so that some find their own."""
    import torch
    x = torch.randn(n, width)
    if near is not None:
        x.mul_(0.25).add_(near)
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


def peak_gb():
    """The most memory that this process has had at once (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bench_retrieve(n_queries=20_000, n=100_000, width=1152, piece=2000):
    """top_k against a bare matmul in pieces that take turns, then R@K of a tenth of the queries."""
    import torch

    import metrics
    from retrieve import top_k
    torch.manual_seed(0)
    films = unit_vectors(n, width)
    texts = unit_vectors(n, width, near=films)
    step, data_gb, seconds = 2 ** 26 // n, peak_gb(), {"bare": 0.0, "exact": 0.0}
    for queries in texts[:n_queries].split(piece):
        start = time.perf_counter()
        top_k(queries, films, 40, chunk=2 ** 26)
        half = time.perf_counter()
        table = torch.empty(step, n)
        for some in queries.split(step):
            torch.mm(some, films.T, out=table[:len(some)])
        seconds["exact"] += half - start
        seconds["bare"] += time.perf_counter() - half
        del table
    start, tenth, ids = time.perf_counter(), n // 10, np.arange(n)
    best = top_k(films[:tenth], texts, 40)[1].numpy()
    recall = metrics.recall_at_k(best, ids[:tenth], ids)
    print("recall over all pairs, both ways: its time is 20 times that of a tenth of one way")
    return {"top40_seconds": seconds["exact"], "bare_matmul_seconds": seconds["bare"],
            "top40_speed_over_bare_matmul": seconds["bare"] / seconds["exact"],
            "memory_above_data_gb": peak_gb() - data_gb,
            "recall_seconds_extrapolated": 20 * (time.perf_counter() - start),
            "recall_r1_of_a_tenth": recall["R@1"]}


# ---- icl ----------------------------------------------------------------------------------------

def icl_model():
    """-> (model, processor, tokens of a reply): MedGemma's sizes in bf16 where there is a GPU, else
    a mid-size one; both random, with vision and language in about the paper's proportion."""
    import torch
    from test_icl_ground import small_lvlm, small_processor
    gpu = torch.cuda.is_available()
    width, vision, image_size, tokens = (
        dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, head_dim=256,
             num_attention_heads=8, num_key_value_heads=4, vocab_size=262_208, sliding_window=1024),
        dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, patch_size=14,
             num_attention_heads=16), 896, 256) if gpu else (
        dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64,
             num_attention_heads=4, num_key_value_heads=2, sliding_window=256),
        dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=4),
        112, 64)
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention"
             for i in range(width["num_hidden_layers"] - 1)] + ["full_attention"]
    processor = small_processor(image_size, tokens)
    with torch.device("cuda" if gpu else "cpu"):
        model = small_lvlm(processor, vision, **width, layer_types=kinds)
    model.generation_config.eos_token_id = 1                   # rare: replies of full length
    return model.to(torch.bfloat16 if gpu else torch.float32), processor, 48


def icl_films(folder, n):
    """n noisy films, each with one boxed phrase, as triplets."""
    rng, triplets = np.random.default_rng(0), []
    for i in range(n):
        path = str(Path(folder, f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (9, 7), np.uint8)).resize((350, 450)).save(path)
        triplets.append({"image": path, "path": path, "phrase": f"nodule {i}",
                         "boxes": [[0.2, 0.3, 0.4, 0.6]]})
    return triplets


def bench_icl(n_queries=4, ks=(5, 10, 20)):
    """n_queries images with 4 phrases each and the same 20 demonstration images (the paper's test
    set meets each image of its pool about five times).

    plain: one processor call and one generate a phrase, as in the tests. Then the parts of the fast
    way, added one by one: image features kept; the prefix of an image prefilled once; its phrases
    decoded as one batch. By k: seconds an image with the features at hand."""
    import torch
    from test_icl_ground import PHRASES, plain

    from icl_ground import InContext
    model, processor, n_tokens = icl_model()

    def timed(function, *args):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function(*args)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start, result

    def plain_way(paths, found):
        return [plain(model, processor, path, phrase, found, n_tokens)[0]
                for path in paths for phrase in PHRASES]

    def fast_way(paths, found, together=True, batch_size=16, ground=None):
        ground = ground or InContext(model, processor, max_new_tokens=n_tokens,
                                     batch_size=batch_size)
        groups = [PHRASES] if together else [[phrase] for phrase in PHRASES]
        return [ids for path in paths for phrases in groups
                for ids in ground.generate(path, phrases, found)]

    with tempfile.TemporaryDirectory() as folder:
        triplets = icl_films(folder, max(ks) + n_queries)
        found, queries = triplets[:max(ks)], [t["path"] for t in triplets[max(ks):]]
        fast_way(queries[:1], found[:1]), plain_way(queries[:1], found[:1])    # warm up
        plain_s, wanted = timed(plain_way, queries, found)
        kept_s, kept = timed(fast_way, queries, found, False)
        prefix_s, prefix = timed(fast_way, queries, found, True, 1)
        fast_s, fast = timed(fast_way, queries, found)
        figures = {"plain_seconds_per_image": plain_s / n_queries,
                   "fast_seconds_per_image": fast_s / n_queries, "speedup": plain_s / fast_s,
                   "speedup_by_features": plain_s / kept_s, "speedup_by_prefix": kept_s / prefix_s,
                   "speedup_by_batching": prefix_s / fast_s,
                   "same_answers": float(np.mean([a == b for a, b in zip(fast, wanted)]))}
        if model.device.type == "cuda":
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        for k in ks:
            ground = InContext(model, processor, max_new_tokens=n_tokens)
            fast_way(queries[:1], found[:k], ground=ground)
            fast_s, _ = timed(lambda: fast_way(queries[1:2], found[:k], ground=ground))
            plain_s, _ = timed(plain_way, queries[1:2], found[:k])
            figures |= {f"k{k}_fast_seconds_per_image": fast_s, f"k{k}_speedup": plain_s / fast_s}
    return figures


# ---- prepare ------------------------------------------------------------------------------------

QUESTIONS = 37                                       # a study: 7.5 million of about 200,000


def write_gz(path, header, rows):
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(f"{row}\n" for row in itertools.chain([header], rows))


def question_text(i, dicom):
    """Question i of a study with all the keys of its format; few are positive, as in truth."""
    box = [100.0 + 20 * i, 200.0, 900.0 + 20 * i, 1400.0]
    place = {"image_id": dicom, "localization_reference_ids": ["lungs"], "is_fallback": False,
             "bboxes": [box, [v + 8 for v in box]], "instance_mask_ids": ["lungs"],
             "missing_localization": [], "localization_quality": 4}
    answer = {"answer_id": f"A{i}", "answer_type": "main_answer", "answer_level": 0,
              "text": f"There is a finding of kind {i}.", "name_tag": "finding",
              "laterality": "left", "regions": ["lungs"], "obs_entities": ["consolidation"],
              "obs_categories": ["ANATOMICAL_FINDING"], "certainty": "certain", "modifiers": [],
              "positiveness": "neg" if i % 20 else "pos", "localization": {dicom: place},
              "from_report": True, "extraction_quality": {}, "answer_quality": {}}
    return {"question_id": f"Q{i:02}", "question_type": "B01_describe_all", "variables": {},
            "obs_ids": ["O01"], "question": "Describe the given study.", "question_quality": {},
            "answers": [{**answer, "sub_answers": [{**answer, "answer_level": 1}]}]}


def write_archives(root, studies):
    """Archives of the shape of MIMIC-CXR, one film a study -> data.py's command line."""
    export, texts = root / "qba" / "exports" / "A_frontal", root / "llava-rad"
    (export / "metadata" / "App").mkdir(parents=True)
    texts.mkdir()
    ids = [(f"{10_000_000 + n}", f"{50_000_000 + n}", f"dicom{n:040}") for n in range(studies)]
    Image.new("L", (32, 32)).save(root / "film.jpg")
    for patient, study, dicom in ids:
        folder = root / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
        folder.mkdir(parents=True)
        os.link(root / "film.jpg", folder / f"{dicom}.jpg")
    write_gz(root / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,split",
             (f"{dicom},train" for *_, dicom in ids))
    write_gz(root / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,ViewPosition,Rows,Columns",
             (f"{dicom},PA,3056,2544" for *_, dicom in ids))
    write_gz(root / "chexmask.csv.gz", "dicom_id,Dice RCA (Mean),Left Lung",
             (f"{dicom},0.9,{'129656 10 ' * 1000}" for *_, dicom in ids))
    write_gz(export / "metadata" / "App" / "question_metadata.csv.gz", "study_id,question_id",
             (f"s{study},Q{i:02}" for _, study, _ in ids for i in range(0, QUESTIONS, 5)))
    study_text = json.dumps({"questions": [question_text(i, "DICOM") for i in range(QUESTIONS)]})
    with zipfile.ZipFile(export / "qa.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for patient, study, dicom in ids:
            archive.writestr(f"p{patient[:2]}/p{patient}/s{study}.qa.json",
                             study_text.replace("DICOM", dicom))
    for split in ("train", "dev", "test"):
        with open(texts / f"chat_{split}_.json", "w") as file:
            entries = ({"image": f"mimic/p{patient[:2]}/p{patient}/s{study}/{dicom}.jpg",
                        "generate_method": method, "view": "PA", "impression": "No change. " * 15,
                        "conversations": [{}, {"value": f"Report {study}. " * 30}]}
                       for patient, study, dicom in (ids if split == "train" else [])
                       for method in ("gpt4", "rule-based"))
            file.write("[")
            file.writelines(f"{',' * (n > 0)}{json.dumps(e)}\n" for n, e in enumerate(entries))
            file.write("]")
    return [sys.executable, ROOT / "data.py", "mimic-cxr", "--images", root, "--llava-rad", texts,
            "--qba", root / "qba", "--chexmask", root / "chexmask.csv.gz", "--size", "0", "--out",
            root / "out"]


def time_manifest(studies):
    """Prepare a manifest of so many studies -> seconds, peak memory of the largest process, MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = write_archives(Path(folder), studies)
        start = time.time()
        subprocess.run(command, check=True, capture_output=True)
        seconds = time.time() - start
        rows = (Path(folder) / "out" / "manifest.jsonl").read_text().splitlines()
        assert len(rows) == studies and len(json.loads(rows[-1])["regions"]) == 2
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def time_films(n=12, size=512):
    """Films of 2500 x 3000 by data.shrink and, in turn, by plain PIL, each read, resized and
    written in this process -> films a second of each, by its processor time."""
    rng, spent = np.random.default_rng(0), np.zeros(2)
    coarse = Image.fromarray(rng.integers(30, 220, (60, 50), np.uint8)).resize((2500, 3000))
    grain = Image.fromarray(rng.integers(0, 6, (3000, 2500), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "film.jpg", Path(folder) / "small.jpg"
        ImageChops.add(coarse, grain).save(path, quality=95)       # 1.6 MB; MIMIC-CXR-JPG's: 1.5
        for _ in range(n):
            start = time.process_time()
            data.shrink((path, target, size, None))
            middle = time.process_time()
            Image.open(path).convert("L").resize((size, size * 6 // 5)).save(target, quality=95)
            spent += middle - start, time.process_time() - middle
    return n / spent


def prepare():
    few, many = 2_000, 20_000
    _, small = time_manifest(few)                                # first: the peak only grows
    seconds, large = time_manifest(many)
    ours, plain = time_films()
    return {"manifest rows a second": many / seconds, "peak MB at 20,000 studies": large,
            "peak MB at 243,334 films, extrapolated":
                small + (large - small) * (243_334 - few) / (many - few),
            "films shrunk a second": ours, "films a second by plain PIL": plain,
            "shrink over plain PIL": ours / plain}


# ---- command line -------------------------------------------------------------------------------

BENCHMARKS = {"retrieve": bench_retrieve, "icl": bench_icl, "prepare": prepare}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", metavar="PATH", help="write the figures there, a flat object")
    args = parser.parse_args()
    figures = BENCHMARKS[args.name]()
    for name, value in figures.items():
        print(f"{name:40} {value:,.3f}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
