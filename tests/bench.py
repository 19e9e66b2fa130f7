"""Benchmarks, ratios of things timed in one run, and two longer looks at what was learned:

    python tests/bench.py NAME [--json PATH]

    retrieve     top-40 against a bare chunked matmul, memory, recall@K over 100,000 x 100,000
    neighbours   on the default run: how often do the nearest images share a finding?
    icl          in-context grounding: the shared prefix against one call per phrase
    prepare      the converters: rows a second, resized images a second
    train        train.py's loop against the bare step, the Trainer and the naive formulation
    paper        the paper's sizes with random weights: loop, bare step, memory, hours of 10 epochs
    hints        on the default run: does a box follow "left" and "right" in its phrase?
    scores       on the default run: does the score tell the phrases of an image from others?
    heat         on the default run: does the heat map of a phrase peak in its true box?
    ablate       objectives and lambda (Fig. 4) on the phantom, 3 seeds each, 15 runs

Machines are shared and differ, so a figure alone says little: compare the ratios.
"""

import argparse
import concurrent.futures
import gzip
import itertools
import json
import multiprocessing
import os
import re
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


def bench_retrieve(n_queries=20_000, n=100_000, width=1152, piece=4000):
    """top_k against a bare matmul in pieces that take turns, then R@K of a tenth of the queries."""
    import torch

    import metrics
    from retrieve import top_k
    torch.manual_seed(0)
    images = unit_vectors(n, width)
    texts = unit_vectors(n, width, near=images)
    step, data_gb, seconds = 2 ** 26 // n, peak_gb(), {"bare": 0.0, "top_k": 0.0}
    for queries in texts[:n_queries].split(piece):
        start = time.perf_counter()
        top_k(queries, images, 40, chunk=2 ** 26)
        half = time.perf_counter()
        table = torch.empty(step, n)
        for some in queries.split(step):
            torch.mm(some, images.T, out=table[:len(some)])
        seconds["top_k"] += half - start
        seconds["bare"] += time.perf_counter() - half
        del table
    start, tenth, ids = time.perf_counter(), n // 10, np.arange(n)
    best = top_k(images[:tenth], texts, 40)[1].numpy()
    recall = metrics.recall_at_k(best, ids[:tenth], ids)
    print("recall over all pairs, both ways: its time is 20 times that of a tenth of one way")
    return {"top40_seconds": seconds["top_k"], "bare_matmul_seconds": seconds["bare"],
            "top40_speed_over_bare_matmul": seconds["bare"] / seconds["top_k"],
            "memory_above_data_gb": peak_gb() - data_gb,
            "recall_seconds_extrapolated": 20 * (time.perf_counter() - start),
            "recall_r1_of_a_tenth": recall["R@1"]}


# ---- neighbours ---------------------------------------------------------------------------------

SIZE_WORD = re.compile(r"\b(tiny|small|minimal|slight|mild|moderate|large|marked|severe|massive)"
                       r"(ly)?\b")


def findings(row):
    """What an image shows, and where: its boxed phrases in lower case, without words of size. Those
    of a phantom say kind, side and zone: {"left lower zone consolidation."}."""
    return {" ".join(SIZE_WORD.sub("", region["phrase"].lower()).split())
            for region in row["regions"] if region["boxes"]}


def shared_findings(rows, image_emb, k=5):
    """Of each image with a finding, the share of its k nearest images that share one, and the share
    of all images, which is chance; images of its own patient are left out."""
    found = [findings(row) for row in rows]
    patient = np.array([row["patient"] for row in rows])
    near, chance = [], []
    for i, own in enumerate(found):
        others = np.flatnonzero(patient != patient[i])
        if own and len(others) >= k:
            shares = np.array([not own.isdisjoint(found[j]) for j in others])
            cosine = (image_emb[others] @ image_emb[i]).numpy()
            near.append(shares[np.argsort(-cosine)[:k]].mean())
            chance.append(shares.mean())
    return {f"shared@{k}": np.mean(near), "chance": np.mean(chance), "n_queries": len(near)}


def bench_neighbours(run="runs/phantom", folder=None):
    """How often the 5 nearest test images of a run share a finding and its place, and by chance."""
    from model import Encoder
    from retrieve import image_embeddings, trained_on
    folder = folder or trained_on(run)
    rows = data.read_manifest(folder, "test")
    return shared_findings(rows, image_embeddings(Encoder.load(run), folder, rows))


# ---- icl ----------------------------------------------------------------------------------------

def icl_model():
    """-> (model, processor, tokens of a reply): MedGemma's sizes in bf16 where there is a GPU, else
    a mid-size one; both random, with vision and language in about the paper's proportion."""
    import torch
    from small_gemma import small_lvlm, small_processor
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
        model = small_lvlm(processor, vision, tied=gpu, **width, layer_types=kinds)
    model.generation_config.eos_token_id = 1                   # rare: replies of full length
    return model.to(torch.bfloat16 if gpu else torch.float32), processor, 48


def icl_images(folder, n):
    """n noisy images, each with one boxed phrase, as triplets."""
    rng, triplets = np.random.default_rng(0), []
    for i in range(n):
        path = str(Path(folder, f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (9, 7), np.uint8)).resize((350, 450)).save(path)
        triplets.append({"image": path, "path": path, "phrase": f"nodule {i}",
                         "boxes": [[0.2, 0.3, 0.4, 0.6]]})
    return triplets


def timed(function, *args):
    """-> (seconds, result), the GPU's work done."""
    import torch
    start = time.perf_counter()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def bench_icl(n_queries=4, ks=(5, 10, 20)):
    """n_queries images with 4 phrases each and the same 20 demonstration images (the paper's test
    set meets each image of its pool about five times).

    plain: one processor call and one generate a phrase. Then the parts of the fast way, added one
    by one: image features kept; the prefix of an image prefilled once; its phrases decoded as one
    batch. By k: seconds an image with the features at hand."""
    import torch
    from small_gemma import PHRASES

    from icl_ground import InContext
    model, processor, n_tokens = icl_model()

    def lvlm(batch_size=16):
        return InContext(model, processor, max_new_tokens=n_tokens, batch_size=batch_size)

    def plain_way(paths, found):
        ground = lvlm()
        return [ground.plain(path, phrase, found) for path in paths for phrase in PHRASES]

    def fast_way(paths, found, ground, together=True):
        groups = [PHRASES] if together else [[phrase] for phrase in PHRASES]
        return [ids for path in paths for phrases in groups
                for ids in ground.fast(path, phrases, found)]

    with tempfile.TemporaryDirectory() as folder:
        triplets = icl_images(folder, max(ks) + n_queries)
        found, queries = triplets[:max(ks)], [t["path"] for t in triplets[max(ks):]]
        fast_way(queries[:1], found[:1], lvlm()), plain_way(queries[:1], found[:1])    # warm up
        plain_s, expected = timed(plain_way, queries, found)
        kept_s, _ = timed(fast_way, queries, found, lvlm(), False)
        prefix_s, _ = timed(fast_way, queries, found, lvlm(batch_size=1))
        fast_s, fast = timed(fast_way, queries, found, lvlm())
        figures = {"plain_seconds_per_image": plain_s / n_queries,
                   "fast_seconds_per_image": fast_s / n_queries, "speedup": plain_s / fast_s,
                   "speedup_by_features": plain_s / kept_s, "speedup_by_prefix": kept_s / prefix_s,
                   "speedup_by_batching": prefix_s / fast_s,
                   "same_answers": float(np.mean([a == b for a, b in zip(fast, expected)]))}
        if model.device.type == "cuda":
            figures["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        for k in ks:
            ground = lvlm()
            fast_way(queries[:1], found[:k], ground)
            fast_s, _ = timed(fast_way, queries[1:2], found[:k], ground)
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
    """Archives of the shape of MIMIC-CXR, one image a study -> data.py's command line."""
    export, texts = root / "qba" / "exports" / "A_frontal", root / "llava-rad"
    (export / "metadata" / "App").mkdir(parents=True)
    texts.mkdir()
    ids = [(f"{10_000_000 + n}", f"{50_000_000 + n}", f"dicom{n:040}") for n in range(studies)]
    Image.new("L", (32, 32)).save(root / "image.jpg")
    for patient, study, dicom in ids:
        folder = root / "files" / f"p{patient[:2]}" / f"p{patient}" / f"s{study}"
        folder.mkdir(parents=True)
        os.link(root / "image.jpg", folder / f"{dicom}.jpg")
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


def time_images(n=12, size=512):
    """Images of 2500 x 3000 by data.shrink and, in turn, by plain PIL, each read, resized and
    written in this process -> images a second of each, by its processor time."""
    rng, spent = np.random.default_rng(0), np.zeros(2)
    coarse = Image.fromarray(rng.integers(30, 220, (60, 50), np.uint8)).resize((2500, 3000))
    grain = Image.fromarray(rng.integers(0, 6, (3000, 2500), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "image.jpg", Path(folder) / "small.jpg"
        ImageChops.add(coarse, grain).save(path, quality=95)       # 1.6 MB; MIMIC-CXR-JPG's: 1.5
        for _ in range(n):
            target.unlink(missing_ok=True)                         # shrink leaves what is there
            start = time.process_time()
            data.shrink((path, target, size))
            middle = time.process_time()
            Image.open(path).convert("L").resize((size, size * 6 // 5)).save(target, quality=95)
            spent += middle - start, time.process_time() - middle
    return n / spent


def bench_prepare():
    few, many = 2_000, 20_000
    _, small = time_manifest(few)                                # first: the peak only grows
    seconds, large = time_manifest(many)
    ours, plain = time_images()
    return {"manifest rows a second": many / seconds, "peak MB at 20,000 studies": large,
            "peak MB at 243,334 images, extrapolated":
                small + (large - small) * (243_334 - few) / (many - few),
            "images shrunk a second": ours, "images a second by plain PIL": plain,
            "shrink over plain PIL": ours / plain}


# ---- train --------------------------------------------------------------------------------------

def train_parts(folder, config, batch_size, n_batches=8):
    """A model, its optimizers, dataset and collate as in train.py, and batches held in memory."""
    import torch

    import train
    from model import LoFi
    torch.manual_seed(0)
    rows = data.read_manifest(folder, "train")
    model = LoFi.build(config, data.tokenizer_texts(rows)).train()
    dataset = data.ChestXrays(rows, model.image_size, "scgd", config.n_regions, config.augment,
                              config.cache)
    collate = data.Collate(model.text_tokenizer, model.text_length, model.llm_tokenizer,
                           config.max_target)
    keys = train.batches(len(rows), batch_size, len(rows) // batch_size, 0, 0, n_batches)
    batches = [collate([dataset[key] for key in some]) for some in keys]
    return model, train.build_optimizers(model, config), dataset, collate, batches


def loss_of(model, batch, precision="fp32"):
    """L_t of a batch, as in train.py's loop."""
    import torch

    import losses
    import train
    precision = train.choose_precision(precision, model.device)
    with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
        image_emb, text_emb, nll = model(batch)
    l_s = losses.sigmoid_loss(image_emb, text_emb, model.siglip.logit_scale.exp(),
                              model.siglip.logit_bias)
    l_tau = [loss(nll, batch["task_of_row"]) for loss in (
        losses.captioning_loss, losses.grounding_loss, losses.dense_captioning_loss)]
    return losses.total_loss(l_s, *l_tau, model.config.lam)


def seconds_of(work, times=1):
    """The median of a few timings, in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


def alone(work, *args):
    """work(*args) in a process of its own, so that its memory is its own too."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *args).result()


def bare_step(model, batch, precision="fp32"):
    """Only forward and backward."""
    loss_of(model, batch, precision).backward()
    model.zero_grad()


def loop_rate(folder, steps, batch_size, *flags):
    """Samples a second of train.py itself, the median of its log after the first third."""
    import contextlib
    import io
    from unittest import mock

    import dataclasses

    import train
    from model import TINY
    adamw = dataclasses.replace(TINY, muon_lr=0)            # as the Trainer takes one optimizer
    with tempfile.TemporaryDirectory() as out:
        flags = ["train.py", "--data", str(folder), "--steps", str(steps), "--batch-size",
                 str(batch_size), *flags, "--out", f"{out}/run"]
        with (mock.patch("sys.argv", flags), mock.patch.dict(train.PRESETS, tiny=adamw),
              contextlib.redirect_stdout(io.StringIO())):
            train.main()
        lines = Path(out, "run", "log.jsonl").read_text().splitlines()
    return float(np.median([json.loads(line)["samples_per_s"] for line in lines[steps // 3:]]))


def trainer_rate(model, dataset, collate, steps, batch_size):
    """Samples a second of Hugging Face's Trainer on the same model, data, optimizer and worker."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import train

    class Samples(torch.utils.data.Dataset):
        """One epoch after another, each with draws of its own, as in train.py."""
        drawn = 0

        def __len__(self):
            return len(dataset)

        def __getitem__(self, i):
            self.drawn += 1
            return dataset[self.drawn // len(dataset), i]

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            return {"loss": loss_of(self.model, batch)}

    class Clock(TrainerCallback):
        ticks = []

        def on_step_end(self, *_, **__):
            self.ticks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=batch_size, use_cpu=True,
            remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", dataloader_num_workers=1, dataloader_persistent_workers=True,
            max_grad_norm=1.0, learning_rate=1e-3, lr_scheduler_type="cosine",
            dataloader_pin_memory=False, dataloader_drop_last=True)
        Trainer(Loss(), args, data_collator=collate, train_dataset=Samples(),
                callbacks=[Clock()],
                optimizers=(train.build_optimizers(model, model.config)[0], None)).train()
    return batch_size / float(np.median(np.diff(Clock.ticks)[steps // 3:]))


def naive_losses(model, batch, lam=5.0):
    """The same total loss the plain way: an LLM pass for each objective, logits of the whole
    vocabulary at every position."""
    import torch
    import torch.nn.functional as F

    import losses
    emb, patches = model.encode_image(batch["image"], with_patches=True, requires_grad=True)
    l_s = losses.sigmoid_loss(emb, model.encode_text(batch["text"], requires_grad=True),
                              model.siglip.logit_scale.exp(), model.siglip.logit_bias)
    visual, total = model.visual_tokens(patches), 0.0
    for task in range(3):
        chosen = batch["task_of_row"] == task
        if not chosen.any():
            continue
        ids, is_target = batch["ids"][chosen], batch["is_target"][chosen]
        embeds = model.embed(visual[batch["image_of_row"][chosen]], ids)
        logits = model.llm(inputs_embeds=embeds, use_cache=False).logits[:, -ids.shape[1] - 1:-1]
        labels = ids.masked_fill(~is_target, -100)
        nll = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        total = total + (nll.sum(1) / is_target.sum(1)).sum()
    return l_s + lam * total / len(batch["ids"])


def formulation(folder, naive, times=3):
    """In a process of its own: (samples a second, peak GB above model and data, loss). Gemma's
    width, vocabulary and LoRA, 4 of its 18 layers, and 64 visual tokens, on tiny towers."""
    import dataclasses

    import torch

    import train
    from model import PAPER, TINY
    config = dataclasses.replace(
        TINY, decoder=dict(PAPER.decoder, num_hidden_layers=4), llm_lora_rank=PAPER.llm_lora_rank,
        n_queries=PAPER.n_queries, max_target=PAPER.max_target)
    model, _, _, _, batches = train_parts(folder, config, PAPER.batch_size, 1)
    kept, batch, status = [], batches[0], Path("/proc/self/status")

    def gb(name):
        return int(status.read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e9

    def work():
        loss = naive_losses(model, batch) if naive else loss_of(model, batch)
        loss.backward()
        model.zero_grad()
        kept.append(loss.item())
    before = gb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")              # Linux: the peak starts again
    seconds = seconds_of(work, times)
    return PAPER.batch_size / seconds, gb("VmHWM") - before, kept[0]


def bench_train(steps=45, batch_size=48, rounds=3):
    """train.py's loop, the bare step and Hugging Face's Trainer in turn, medians of the rounds; the
    naive formulation; the parts."""
    import dataclasses

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from model import TINY
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        phantom = data.make_phantom(Path(folder, "phantom"), {"train": 8 * batch_size}, quiet=True)
        ours = alone(formulation, phantom, False)
        naive = alone(formulation, phantom, True)
        assert abs(ours[2] - naive[2]) < 1e-3, f"losses differ: {ours[2]} and {naive[2]}"
        figures |= {"one pass, samples/s": ours[0], "naive, samples/s": naive[0],
                    "one pass over naive": ours[0] / naive[0],
                    "one pass, peak GB": ours[1], "naive, peak GB": naive[1],
                    "naive over one pass, memory": naive[1] / ours[1]}

        adamw = dataclasses.replace(TINY, muon_lr=0)        # the Trainer takes one optimizer
        model, _, dataset, collate, batches = train_parts(phantom, adamw, batch_size)
        bare = lambda: batch_size * len(batches) / seconds_of(
            lambda: [bare_step(model, batch) for batch in batches])
        bare()
        rates = np.array([(bare(), loop_rate(phantom, steps, batch_size,
                                             "--preset", "tiny", "--device", "cpu"), bare(),
                           trainer_rate(model, dataset, collate, steps, batch_size))
                          for _ in range(rounds)])
        before, loop, between, trainer = rates.T               # samples a second, in turn
        figures |= {"bare step, samples/s": np.median((before + between) / 2),
                    "train.py, samples/s": np.median(loop),
                    "Trainer, samples/s": np.median(trainer),
                    "loop over bare step": np.median(loop * 2 / (before + between)),
                    "loop over Trainer": np.median(loop / trainer)}

        with FlopCounterMode(display=False) as counter:
            bare_step(model, batches[0])
        a, flops = torch.randn(2048, 2048), counter.get_total_flops()
        peak = 2 * 2048 ** 3 / seconds_of(lambda: a @ a, 10)
        rate = flops * bare() / batch_size
        figures |= {"GFLOP a step": flops / 1e9, "GFLOP/s of the bare step": rate / 1e9,
                    "GFLOP/s of a matmul": peak / 1e9, "share of the matmul's": rate / peak}
        figures |= parts_of_a_step(*train_parts(phantom, TINY, batch_size)[:4], batches[0])
    return figures


def parts_of_a_step(model, optimizers, dataset, collate, batch, times=5):
    """Milliseconds of each part of a step, forward and backward, each run alone."""
    import torch

    import losses
    keys = [(9, i) for i in range(len(batch["image"]))]
    visual = model.encode_image(batch["image"], with_patches=True)[1].detach()
    emb = [torch.nn.functional.normalize(torch.randn(len(keys), 128), dim=1).requires_grad_()
           for _ in range(2)]
    t, b = model.siglip.logit_scale.exp().detach(), model.siglip.logit_bias.detach()

    def decoder():
        tokens = model.visual_tokens(visual)[batch["image_of_row"]]
        model.nll(tokens, batch["ids"], batch["is_target"]).mean().backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
    parts = {"augment, collate (images in memory)": lambda: collate([dataset[key] for key in keys]),
             "vision tower": lambda: model.encode_image(
                 batch["image"], requires_grad=True).sum().backward(),
             "text tower": lambda: model.encode_text(
                 batch["text"], requires_grad=True).sum().backward(),
             "pooling, LLM and its losses": decoder,
             "sigmoid loss": lambda: losses.sigmoid_loss(*emb, t, b).backward(),
             "clip and optimizer": update}
    return {f"{name}, ms": 1000 * seconds_of(work, times) for name, work in parts.items()}


# ---- paper --------------------------------------------------------------------------------------

def paper_loop(folder, steps, batch_size, flags):
    """In a process of its own: train.py at the paper's sizes -> (samples a second, peak GB)."""
    import torch
    rate = loop_rate(folder, steps, batch_size, "--random-init", *flags)
    return rate, torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else peak_gb()


def paper_bare(folder, steps, batch_size):
    """In a process of its own, on batches in memory: (samples a second of forward and backward,
    FLOP a sample, FLOP/s of a matmul in the same precision)."""
    import dataclasses

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import train
    from model import PAPER, find_device
    device = find_device(None)
    model, _, _, _, batches = train_parts(
        folder, dataclasses.replace(PAPER, encoder=None, llm=None), batch_size, steps)
    model = model.to(device)
    batches = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
               for batch in batches]

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    def step(batch):
        bare_step(model, batch, "auto")
        wait()
    with FlopCounterMode(display=False) as counter:            # the first step warms up as well
        step(batches[0])
    rates = [batch_size / seconds_of(lambda: step(batch)) for batch in batches]
    a = torch.randn(8192, 8192, device=device, dtype=train.choose_precision("auto", device))

    def product():
        a @ a
        wait()
    product()
    return (float(np.median(rates[steps // 3:])), counter.get_total_flops() / batch_size,
            2 * 8192 ** 3 / seconds_of(product, 5))


def bench_paper():
    """The paper's sizes with random weights on images of 512 px: batches of 16 on a GPU, also with
    --grad-checkpoint and --compile; on a CPU five steps of one image, the plain way alone."""
    import torch
    cuda = torch.cuda.is_available()
    batch_size, steps = (16, 30) if cuda else (1, 5)
    variants = [[], ["--grad-checkpoint"], ["--compile"]] if cuda else [[]]
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        phantom = data.make_phantom(Path(folder, "phantom"), {"train": 8 * batch_size}, quiet=True)
        for row in data.read_manifest(phantom):
            Image.open(row["path"]).resize((512, 512)).save(row["path"])
        before = alone(paper_bare, phantom, steps, batch_size)[0]
        for flags in variants:
            rate, gb = alone(paper_loop, phantom, steps, batch_size, flags)
            name = " ".join(["paper", *flags])
            figures |= {f"{name}, samples/s": rate, f"{name}, peak GB": gb,
                        f"{name}, hours of 10 epochs": 10 * 237_972 / rate / 3600}
        after, flop, matmul = alone(paper_bare, phantom, steps, batch_size)
    bare, loop = (before + after) / 2, figures["paper, samples/s"]
    return figures | {"paper, bare step, samples/s": bare,
                      "paper, loop over bare step": loop / bare,
                      "paper, TFLOP a sample": flop / 1e12,
                      "paper, TFLOP/s of a matmul": matmul / 1e12,
                      "paper, share of the matmul's, loop": flop * loop / matmul,
                      "paper, share of the matmul's, bare step": flop * bare / matmul}


# ---- hints --------------------------------------------------------------------------------------

def bench_hints(run="runs/phantom", folder="runs/phantom_data"):
    """Each boxed test phrase that names a side, and the same with the other side: does LoFi's box
    follow the words? Only one of the two findings is on the image."""
    from model import LoFi
    model, moved = LoFi.from_pretrained(run), []
    other = {"left": "right", "right": "left"}
    for row in data.read_manifest(folder, "test"):
        for region in row["regions"]:
            side = next((side for side in other if side in region["phrase"]), None)
            if not side or not region["boxes"]:
                continue
            swapped = region["phrase"].replace(side, other[side])
            found = model.ground(row["path"], [region["phrase"], swapped])
            if all(found):
                own, hinted = ((boxes[0][0] + boxes[0][2]) / 2 for boxes in found)
                toward = own - hinted if side == "left" else hinted - own
                moved.append(toward)                           # the patient's left: larger x
    return {"phrases with a side, both answered": len(moved),
            "box moves to the hinted side": float(np.mean(np.array(moved) > 0)),
            "by more than a tenth of the image": float(np.mean(np.array(moved) > 0.1)),
            "mean move, of the image's width": float(np.mean(moved))}


# ---- scores -------------------------------------------------------------------------------------

def bench_scores(run="runs/phantom", folder="runs/phantom_data"):
    """How often the score of an answer tells a phrase of the image from one of another image: AUROC
    over the boxed phrases of the test split, one foreign phrase for each."""
    import metrics
    from model import LoFi
    model, rows = LoFi.from_pretrained(run), data.read_manifest(folder, "test")
    rng, phrases = np.random.default_rng(0), [{region["phrase"] for region in row["regions"]}
                                              for row in rows]
    scores, present = [], []
    for row, own in zip(rows, phrases):
        others = sorted(set().union(*phrases) - own)
        foreign = list(rng.choice(others, len(own), replace=False))
        asked = [*sorted(own), *foreign]
        scores += model.ground(row["path"], asked, with_scores=True)[1]
        present += [True] * len(own) + [False] * len(foreign)
    scores, present = np.array(scores), np.array(present)
    return {"phrases of the image": int(present.sum()), "and as many of other images, AUROC":
            metrics.auroc(scores, present), "mean score of a phrase of the image":
            scores[present].mean(), "mean score of a foreign phrase": scores[~present].mean()}


# ---- heat ---------------------------------------------------------------------------------------

def bench_heat(run="runs/phantom", folder="runs/phantom_data"):
    """How often the highest patch of a phrase's heat map overlaps one of its true boxes, and how
    often any patch does, over the boxed phrases of the test split."""
    from model import LoFi
    model, hits, overlaps = LoFi.from_pretrained(run), [], []
    for row in data.read_manifest(folder, "test"):
        for region in row["regions"]:
            heat = model.heat_map(row["path"], [region["phrase"]])[0].numpy()
            edge = np.arange(len(heat) + 1) / len(heat)        # of the patches
            overlap = np.zeros(heat.shape, bool)
            for x0, y0, x1, y1 in region["boxes"]:
                in_x, in_y = ((edge[:-1] < high) & (edge[1:] > low)
                              for low, high in ((x0, x1), (y0, y1)))
                overlap |= in_y[:, None] & in_x
            hits.append(overlap.flat[heat.argmax()])
            overlaps.append(overlap.mean())
    return {"phrases": len(hits), "highest patch overlaps a true box": float(np.mean(hits)),
            "any patch does": float(np.mean(overlaps))}


# ---- ablate -------------------------------------------------------------------------------------

ABLATIONS = {"s": ["--objectives", "s"], "s, c": ["--objectives", "sc"], "s, c, g, d": [],
             "lambda 1": ["--lambda", "1"], "lambda 10": ["--lambda", "10"]}
COLUMNS = ["i2t R@1", "t2i R@1", "i2t R@10", "t2i R@10", "shared@5", "nearest Ro/L", "nearest F",
           "decoder F"]


def ablation_run(job):
    """Train on one thread, ground by the nearest of 20 demonstrations, look at the neighbours
    -> COLUMNS, percent; NaN for a decoder that was not taught to ground. A run that is there
    already is not repeated."""
    flags, seed, steps, out = job
    runs = {out / "metrics.json": ["train.py", *flags, "--seed", str(seed), "--steps", str(steps),
                                   "--workers", "1", "--out", out],
            out / "nearest.json": ["icl_ground.py", "--lvlm", "nearest", "--k", "20", "--data",
                                   "runs/phantom_data", "--checkpoint", out, "--out",
                                   out / "nearest.jsonl", "--json", out / "nearest.json"]}
    for path, (script, *rest) in runs.items():
        if not path.exists():
            done = subprocess.run(
                [sys.executable, ROOT / script, *rest, "--device", "cpu"], capture_output=True,
                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(f"{out}: {done.stderr.strip().splitlines()[-1]}")
    done, nearest = (json.loads(path.read_text()) for path in runs)
    nearest, taught = nearest["grounding"], "--objectives" not in flags
    return [100 * v for v in (done["i2t"]["R@1"], done["t2i"]["R@1"], done["i2t"]["R@10"],
                              done["t2i"]["R@10"],
                              bench_neighbours(out, "runs/phantom_data")["shared@5"],
                              nearest["Ro/L"], nearest["F@0.5"],
                              done["grounding"]["F@0.5"] if taught else np.nan)]


def bench_ablate(seeds=(0, 1, 2), folder="runs/ablate"):
    """Fig. 4 on the phantom, each run a quarter of the default one: mean and standard deviation
    over the seeds, percent. Interrupted, it continues with the runs that are not there yet."""
    from model import PHANTOM
    if not Path("runs/phantom_data/manifest.jsonl").exists():
        data.make_phantom("runs/phantom_data")
    jobs = [(flags, seed, PHANTOM.steps // 4, Path(folder, f"{name.replace(', ', '')}_{seed}"))
            for name, flags in ABLATIONS.items() for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = np.array(list(pool.map(ablation_run, jobs))).reshape(len(ABLATIONS), len(seeds), -1)
    print(f"{'':16}" + "".join(f"{column:>15}" for column in COLUMNS))
    for name, row in zip(ABLATIONS, rows):
        cells = (f"{mean:.2f} +- {sd:4.2f}" for mean, sd in zip(row.mean(0), row.std(0, ddof=1)))
        print(f"{name:16}" + "".join(f"{'-' if 'nan' in cell else cell:>15}" for cell in cells))
    return {f"{name}: {column}": mean for name, row in zip(ABLATIONS, rows)
            for column, mean in zip(COLUMNS, row.mean(0))}


# ---- command line -------------------------------------------------------------------------------

BENCHMARKS = {"retrieve": bench_retrieve, "neighbours": bench_neighbours, "icl": bench_icl,
              "prepare": bench_prepare, "train": bench_train, "paper": bench_paper,
              "hints": bench_hints, "scores": bench_scores, "heat": bench_heat,
              "ablate": bench_ablate}


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
