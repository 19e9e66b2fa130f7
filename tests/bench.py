"""Benchmarks, ratios of things timed in one run, and looks at what a run learned:

    python tests/bench.py NAME [--json PATH] [--tiny]

    retrieve     top-40 against a bare chunked matmul, memory, recall@K over 100,000 x 100,000
    icl          in-context grounding: the shared prefix against one call per phrase
    prepare      the converters: rows a second, resized images a second
    train        train.py's loop against the bare step, the Trainer and the naive formulation
    paper        the paper's sizes with random weights: loop, bare step, memory, hours of 10 epochs
    neighbours   on the default run: how often do the nearest images share a finding?
    similarity   on the default run: does it tell the phrases of an image from others?
    picture      on the default run: draw the README's picture
    ablate       objectives and lambda (Fig. 4) on the phantom, 3 seeds each, 15 runs

Each figure is printed as soon as it is known. Machines are shared and differ, so a figure alone
says little: compare the ratios.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import io
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
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data                                            # noqa: E402
import icl_ground                                      # noqa: E402
import losses                                          # noqa: E402
import metrics                                         # noqa: E402
import train                                           # noqa: E402
from conftest import SMALL                             # noqa: E402
from icl_ground import InContext                       # noqa: E402
from model import PAPER, PHANTOM, TINY, LoFi, find_device  # noqa: E402
from retrieve import image_embeddings, top_k, trained_on  # noqa: E402
from small_gemma import PHRASES, small_lvlm, small_processor  # noqa: E402


# ---- shared: time, memory, processes ------------------------------------------------------------

def timed(work, *args):
    """-> (seconds, result), the GPU's work done."""
    start = time.perf_counter()
    result = work(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def seconds_of(work, times=1):
    """The median of a few timings, in seconds."""
    return float(np.median([timed(work)[0] for _ in range(times)]))


def host_gb():
    """The most memory that this process has had at once (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_gb():
    """The same of the GPU, if there is one."""
    cuda = torch.cuda.is_available()
    return torch.cuda.max_memory_allocated() / 1e9 if cuda else host_gb()


def alone(work, *args):
    """work(*args) in a process of its own, so that its memory is its own too."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *args).result()


# ---- retrieve -----------------------------------------------------------------------------------

def unit_vectors(n, width, near=None):
    """Random rows of unit length; near: rows that they lie around, so that some find their own."""
    x = torch.randn(n, width)
    if near is not None:
        x.mul_(0.25).add_(near)
    return x.div_(torch.linalg.vector_norm(x, dim=1, keepdim=True))


def bench_retrieve(tiny):
    """top_k on the CPU against a bare matmul in pieces that take turns, then R@K of a tenth of the
    queries."""
    n_queries, n, width, piece = (200, 1000, 64, 100) if tiny else (20_000, 100_000, 1152, 4000)
    torch.manual_seed(0)
    images = unit_vectors(n, width)
    texts = unit_vectors(n, width, near=images)
    step, data_gb = 2 ** 26 // n, host_gb()

    def bare(queries):
        table = torch.empty(step, n)
        for some in queries.split(step):
            torch.mm(some, images.T, out=table[:len(some)])
    seconds = sum(np.array([timed(top_k, queries, images, 40)[0], timed(bare, queries)[0]])
                  for queries in texts[:n_queries].split(piece))
    yield "top40_seconds", seconds[0]
    yield "bare_matmul_seconds", seconds[1]
    yield "top40_speed_over_bare_matmul", seconds[1] / seconds[0]
    start, tenth, ids = time.perf_counter(), n // 10, np.arange(n)
    best = top_k(images[:tenth], texts, 40)[1].numpy()
    recall = metrics.recall_at_k(best, ids[:tenth], ids)
    yield "memory_above_data_gb", host_gb() - data_gb
    # over all pairs and both ways it is 20 times that of a tenth of one way
    yield "recall_seconds_extrapolated", 20 * (time.perf_counter() - start)
    yield "recall_r1_of_a_tenth", recall["R@1"]


# ---- icl ----------------------------------------------------------------------------------------

def icl_model(tiny):
    """-> (model, processor, tokens of a reply), random: MedGemma's sizes in bf16 on a GPU, else a
    mid-size one with vision and language in about the same proportion."""
    gpu = torch.cuda.is_available()
    width, vision, image_size, tokens = (
        dict(num_hidden_layers=2), {}, 28, 4) if tiny else (
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
        model = small_lvlm(processor, vision, tied=gpu and not tiny, **width, layer_types=kinds)
    model.generation_config.eos_token_id = 1                   # rare: replies of full length
    return model.to(torch.bfloat16 if gpu else torch.float32), processor, 8 if tiny else 48


def icl_images(folder, n):
    """n noisy images, each with one boxed phrase, as triplets."""
    rng, triplets = np.random.default_rng(0), []
    for i in range(n):
        path = str(Path(folder, f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (9, 7), np.uint8)).resize((350, 450)).save(path)
        triplets.append({"image": path, "path": path, "phrase": f"nodule {i}",
                         "boxes": [[0.2, 0.3, 0.4, 0.6]]})
    return triplets


def bench_icl(tiny):
    """Two images with 4 phrases each and the same demonstration images (the paper's test set meets
    each image of its pool about five times).

    By k: seconds an image of the fast way with the features at hand; speedup over the plain way,
    one processor call and one generate a phrase. Then, at the largest k, the parts of the fast way
    one by one: image features kept; the prefix of an image prefilled once; its phrases decoded as
    one batch."""
    seconds, (model, processor, n_tokens) = timed(icl_model, tiny)
    yield "seconds_to_build_the_model", seconds
    ks, n_queries = (1, 2) if tiny else (5, 10, 20), 2

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
        for k in ks:
            ground = lvlm()
            fast_way(queries[:1], found[:k], ground)
            fast_s, _ = timed(fast_way, queries[1:2], found[:k], ground)
            yield f"k{k}_fast_seconds_per_image", fast_s
            plain_s, _ = timed(plain_way, queries[1:2], found[:k])
            yield f"k{k}_speedup", plain_s / fast_s
        fast_s, fast = timed(fast_way, queries, found, lvlm())
        yield "fast_seconds_per_image", fast_s / n_queries
        plain_s, expected = timed(plain_way, queries, found)
        yield "plain_seconds_per_image", plain_s / n_queries
        yield "speedup", plain_s / fast_s
        yield "same_answers", np.mean([a == b for a, b in zip(fast, expected)])
        kept_s, _ = timed(fast_way, queries, found, lvlm(), False)
        yield "speedup_by_features", plain_s / kept_s
        prefix_s, _ = timed(fast_way, queries, found, lvlm(batch_size=1))
        yield "speedup_by_prefix", kept_s / prefix_s
        yield "speedup_by_batching", prefix_s / fast_s
        yield "peak_gb", peak_gb()


# ---- prepare ------------------------------------------------------------------------------------

QUESTIONS = 37                                       # a study: 7.5 million of about 200,000


def write_gz(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.writelines(f"{row}\n" for row in itertools.chain([header], rows))


def question(i, dicom):
    """Question i of a study, of about the size of its format; few are positive, as in truth."""
    box = [100.0 + 20 * i, 200.0, 900.0 + 20 * i, 1400.0]
    place = {"bboxes": [box, [v + 8 for v in box]], "is_fallback": False}
    answer = {"text": f"There is a finding of kind {i}.", "localization": {dicom: place},
              "positiveness": "neg" if i % 20 else "pos", "from_report": True,
              **{f"another key, {n}": ["consolidation"] for n in range(16)}}
    return {"question_id": f"Q{i:02}", "question": "Describe the given study.",
            "answers": [{**answer, "sub_answers": [answer]}]}


def write_archives(root, studies):
    """Archives of the shape of MIMIC-CXR, one image a study, shrunk already -> data.py's command
    line."""
    qba, texts = root / "qba" / "exports" / "A_frontal", root / "llava-rad"
    ids = [(f"p{10_000_000 + n}", f"s{50_000_000 + n}", f"dicom{n:040}") for n in range(studies)]
    paths = [f"{patient[:3]}/{patient}/{study}/{dicom}.jpg" for patient, study, dicom in ids]
    Image.new("L", (32, 32)).save(root / "image.jpg")
    for path in paths:
        target = root / "out" / "images_512" / path
        target.parent.mkdir(parents=True)
        os.link(root / "image.jpg", target)
    write_gz(root / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,ViewPosition,Rows,Columns",
             (f"{dicom},PA,3056,2544" for *_, dicom in ids))
    write_gz(root / "chexmask.csv.gz", "dicom_id,Dice RCA (Mean),Left Lung",
             (f"{dicom},0.9,{'129656 10 ' * 1000}" for *_, dicom in ids))
    write_gz(qba / "metadata" / "App" / "question_metadata.csv.gz", "study_id,question_id",
             (f"{study},Q{i:02}" for _, study, _ in ids for i in range(0, QUESTIONS, 5)))
    study_text = json.dumps({"questions": [question(i, "DICOM") for i in range(QUESTIONS)]})
    with zipfile.ZipFile(qba / "qa.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for patient, study, dicom in ids:
            archive.writestr(f"{patient[:3]}/{study}.qa.json", study_text.replace("DICOM", dicom))
    texts.mkdir()
    for split in ("train", "dev", "test"):
        entries = [{"image": f"mimic/{path}", "generate_method": method, "view": "PA",
                    "impression": "No change. " * 15,
                    "conversations": [{}, {"value": f"Report {path}. " * 20}],
                    "chexpert_labels": {"Lung Opacity": 1.0, "Edema": 0.0}}
                   for path in (paths if split == "train" else [])
                   for method in ("gpt4", "rule-based")]
        (texts / f"chat_{split}_.json").write_text(json.dumps(entries))
    return [ROOT / "data.py", "mimic-cxr", "--images", root, "--llava-rad", texts,
            "--qba", root / "qba", "--chexmask", root / "chexmask.csv.gz", "--out", root / "out"]


RUN_AND_PRINT_PEAK = """import runpy, sys; sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])"""


def time_manifest(studies):
    """Prepare a manifest of so many studies -> seconds, peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", RUN_AND_PRINT_PEAK, *write_archives(Path(folder), studies)]
        start = time.time()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.time() - start
        rows = (Path(folder) / "out" / "manifest.jsonl").read_text().splitlines()
        assert len(rows) == studies and len(json.loads(rows[-1])["regions"]) == 2
    return seconds, int(done.stdout.split()[-1]) / 1024


def time_images(n, size=512):
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


def bench_prepare(tiny):
    few, many, n = (20, 200, 2) if tiny else (2_000, 20_000, 12)
    ours, plain = time_images(n)
    yield "images shrunk a second", ours
    yield "images a second by plain PIL", plain
    yield "shrink over plain PIL", ours / plain
    _, small = time_manifest(few)
    seconds, large = time_manifest(many)
    yield "manifest rows a second", many / seconds
    yield f"peak MB at {many:,} studies", large
    yield ("peak MB at 243,334 images, extrapolated",
           small + (large - small) * (243_334 - few) / (many - few))


# ---- train and paper: train.py's own model, loop and flags --------------------------------------

@contextlib.contextmanager
def train_py(config, folder, *flags):
    """Within, train.py has these flags and `config` as its preset, prints nothing, and builds its
    model on the device, where a large one of random weights is drawn in seconds."""
    build = train.build_model

    def build_on_device(args, *more):
        with torch.device(find_device(args.device)):
            return build(args, *more)
    argv = ["train.py", "--data", str(folder), "--random-init", *flags]
    with (mock.patch("sys.argv", argv), mock.patch.dict(train.PRESETS, paper=config),
          mock.patch.object(train, "build_model", build_on_device),
          contextlib.redirect_stdout(io.StringIO())):
        yield


def train_parts(config, folder, *flags, n_batches=8):
    """A model as train.py builds it, its dataset and collate, and batches held on its device."""
    with train_py(config, folder, *flags):
        torch.manual_seed(0)
        args, (_, rows) = train.parse_args(), train.read_rows(folder, "scgd")
        model, batch_size = train.build_model(args, None, rows, 1)
    model.to(find_device(args.device)).train()
    dataset = data.ChestXrays(rows, model.image_size, "scgd", config.n_regions, config.augment,
                              config.cache)
    collate = data.Collate(model.text_tokenizer, model.text_length, model.llm_tokenizer,
                           config.max_target)
    keys = train.batches(len(rows), batch_size, len(rows) // batch_size, 0, 0, n_batches)
    batches = [collate([dataset[key] for key in some]) for some in keys]
    return model, dataset, collate, [to_device(batch, model) for batch in batches]


def to_device(batch, model):
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


def loop_rate(config, folder, steps, *flags):
    """Samples a second of train.py itself, the median of its log after the first third."""
    with tempfile.TemporaryDirectory() as out:
        with train_py(config, folder, "--steps", str(steps), "--out", f"{out}/run", *flags):
            train.main()
        lines = Path(out, "run", "log.jsonl").read_text().splitlines()
    return float(np.median([json.loads(line)["samples_per_s"] for line in lines[steps // 3:]]))


def loss_of(model, batch):
    """L_t of a batch, as in train.py's loop."""
    precision = train.choose_precision("auto", model.device)
    with torch.autocast(model.device.type, precision, enabled=precision != torch.float32):
        image_emb, text_emb, nll = model(batch)
    l_s = losses.sigmoid_loss(image_emb, text_emb, model.siglip.logit_scale.exp(),
                              model.siglip.logit_bias)
    l_tau = [loss(nll, batch["task_of_row"]) for loss in (
        losses.captioning_loss, losses.grounding_loss, losses.dense_captioning_loss)]
    return losses.total_loss(l_s, *l_tau, model.config.lam)


def bare_step(model, batch):
    """Only forward and backward."""
    loss_of(model, batch).backward()
    model.zero_grad()


def flop_of(model, batch):
    """FLOP of a bare step. The counter knows no grouped-query attention, so attention is computed
    as plain products, which take far more memory: give it a small batch."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        bare_step(model, batch)
    return counter.get_total_flops()


# ---- train --------------------------------------------------------------------------------------

def trainer_rate(model, dataset, collate, steps):
    """Samples a second of Hugging Face's Trainer on the same model, data, optimizer and worker."""
    batch_size, ticks = model.config.batch_size, []

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            ticks.append(time.perf_counter())
            return {"loss": loss_of(self.model, batch)}

    epochs = range(1 + steps * batch_size // len(dataset))
    keys = [(epoch, i) for epoch in epochs for i in range(len(dataset))]       # read in the worker
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=batch_size, use_cpu=True,
            remove_unused_columns=False, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", dataloader_num_workers=1, dataloader_persistent_workers=True,
            max_grad_norm=1.0, learning_rate=1e-3, lr_scheduler_type="cosine",
            dataloader_pin_memory=False, dataloader_drop_last=True)
        Trainer(Loss(), args, train_dataset=keys,
                data_collator=lambda keys: collate([dataset[key] for key in keys]),
                optimizers=(train.build_optimizers(model, model.config)[0], None)).train()
    return batch_size / float(np.median(np.diff(ticks)[steps // 3:]))


def naive_losses(model, batch):
    """The same total loss the plain way: an LLM pass for each objective, logits of the whole
    vocabulary at every position."""
    emb, patches = model.image_features(batch["image"])
    l_s = losses.sigmoid_loss(emb, model.text_features(batch["text"]),
                              model.siglip.logit_scale.exp(), model.siglip.logit_bias)
    visual, total = model.visual_tokens(patches), 0.0
    for task in range(len(data.TASKS)):
        chosen = batch["task_of_row"] == task
        if not chosen.any():
            continue
        ids, is_target = batch["ids"][chosen], batch["is_target"][chosen]
        embeds = model.embed(visual[batch["image_of_row"][chosen]], ids)
        logits = model.llm(inputs_embeds=embeds, use_cache=False).logits[:, -ids.shape[1] - 1:-1]
        labels = ids.masked_fill(~is_target, -100)
        nll = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        total = total + (nll.sum(1) / is_target.sum(1)).sum()
    return l_s + model.config.lam * total / len(batch["ids"])


def formulation(config, folder, naive, times=3):
    """In a process of its own: (samples a second, peak GB above model and data, loss)."""
    model, _, _, [batch] = train_parts(config, folder, "--device", "cpu", n_batches=1)
    kept, status = [], Path("/proc/self/status")

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
    return config.batch_size / seconds, gb("VmHWM") - before, kept[0]


def bench_train(tiny):
    """On the CPU: one LLM pass against the naive formulation (Gemma's width, vocabulary and LoRA,
    4 of its 18 layers, and 64 visual tokens, on tiny towers); train.py's loop, the bare step and
    Hugging Face's Trainer in turn, medians of the rounds."""
    steps, rounds = (6, 1) if tiny else (45, 3)
    # AdamW alone: the Trainer takes one optimizer
    config = dataclasses.replace(TINY, batch_size=8 if tiny else 48, muon_lr=0)
    wide = config if tiny else dataclasses.replace(
        TINY, decoder=dict(PAPER.decoder, num_hidden_layers=4), batch_size=PAPER.batch_size,
        llm_lora_rank=PAPER.llm_lora_rank, n_queries=PAPER.n_queries, max_target=PAPER.max_target)
    with tempfile.TemporaryDirectory() as folder:
        phantom = data.make_phantom(Path(folder, "phantom"), {"train": 8 * config.batch_size},
                                    quiet=True)
        ours, naive = (alone(formulation, wide, phantom, is_naive) for is_naive in (False, True))
        assert abs(ours[2] - naive[2]) < 1e-3, f"losses differ: {ours[2]} and {naive[2]}"
        for name, (rate, gb, _) in (("one pass", ours), ("naive", naive)):
            yield f"{name}, samples/s", rate
            yield f"{name}, peak GB", gb
        yield "one pass over naive", ours[0] / naive[0]
        yield "naive over one pass, memory", naive[1] / ours[1]

        model, dataset, collate, batches = train_parts(config, phantom, "--device", "cpu")
        bare = lambda: config.batch_size * len(batches) / seconds_of(
            lambda: [bare_step(model, batch) for batch in batches])
        bare()
        rates = np.array([(bare(), loop_rate(config, phantom, steps, "--device", "cpu"), bare(),
                           trainer_rate(model, dataset, collate, steps)) for _ in range(rounds)])
        before, loop, between, trainer = rates.T               # samples a second, in turn
        yield "bare step, samples/s", np.median((before + between) / 2)
        yield "train.py, samples/s", np.median(loop)
        yield "Trainer, samples/s", np.median(trainer)
        yield "loop over bare step", np.median(loop * 2 / (before + between))
        yield "loop over Trainer", np.median(loop / trainer)


# ---- paper --------------------------------------------------------------------------------------

def paper_loop(config, folder, steps, flags):
    """In a process of its own: train.py -> (samples a second, peak GB)."""
    return loop_rate(config, folder, steps, *flags), peak_gb()


def paper_bare(config, folder, steps, flags):
    """In a process of its own: the bare step -> (samples a second, peak GB)."""
    model, *_, batches = train_parts(config, folder, *flags)
    seconds = [timed(bare_step, model, batch)[0]
               for batch in itertools.islice(itertools.cycle(batches), steps)]
    return config.batch_size / float(np.median(seconds[steps // 3:])), peak_gb()


def paper_flop(config, folder, n):
    """In a process of its own: (FLOP a sample, counted on two; FLOP/s of an n x n product in the
    precision of the training)."""
    model, dataset, collate, _ = train_parts(config, folder, n_batches=1)
    flop = flop_of(model, to_device(collate([dataset[0, i] for i in range(2)]), model))
    a = torch.randn(n, n, device=model.device, dtype=train.choose_precision("auto", model.device))
    timed(torch.mm, a, a)
    return flop / 2, 2 * n ** 3 / seconds_of(lambda: torch.mm(a, a), 10)


def bench_paper(tiny):
    """The paper's sizes with random weights on images of 512 px: batches of 16 on a GPU, also with
    --compile and --grad-checkpoint; on a CPU five steps of one image, the plain way alone (tiny:
    the tests' small model)."""
    cuda = torch.cuda.is_available()
    batch_size, steps = (2, 5) if tiny else (16, 30) if cuda else (1, 5)
    variants = [[], ["--compile"], ["--grad-checkpoint"]] if cuda else [[]]
    config = dataclasses.replace(SMALL if tiny else PAPER, batch_size=batch_size)
    with tempfile.TemporaryDirectory() as folder:
        phantom = data.make_phantom(Path(folder, "phantom"), {"train": 8 * batch_size}, quiet=True)
        for row in data.read_manifest(phantom):
            Image.open(row["path"]).resize((512, 512)).save(row["path"])
        for flags in variants:
            name = " ".join(["paper", *flags])
            loop, gb = alone(paper_loop, config, phantom, steps, flags)
            yield f"{name}, samples/s", loop
            yield f"{name}, peak GB", gb
            yield f"{name}, hours of 10 epochs", 10 * 237_972 / loop / 3600
            bare, gb = alone(paper_bare, config, phantom, steps, flags)
            yield f"{name}, bare step, samples/s", bare
            yield f"{name}, bare step, peak GB", gb
            yield f"{name}, loop over bare step", loop / bare
            if not flags:
                flop, matmul = alone(paper_flop, config, phantom, 256 if tiny else 8192)
                yield "paper, TFLOP a sample", flop / 1e12
                yield "paper, TFLOP/s of a matmul", matmul / 1e12
            yield f"{name}, share of the matmul's, loop", flop * loop / matmul
            yield f"{name}, share of the matmul's, bare step", flop * bare / matmul


# ---- on the default run: neighbours, similarity -------------------------------------------------

RUN = "runs/phantom"
SIZE_WORD = re.compile(r"\b(tiny|small|minimal|slight|mild|moderate|large|marked|severe|massive)"
                       r"(ly)?\b")


def rows_of_test(run, tiny=False):
    """The manifest that a run was trained on, and the rows of its test split."""
    folder = trained_on(run)
    return folder, data.read_manifest(folder, "test")[:40 if tiny else None]


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


def bench_neighbours(tiny, run=RUN):
    """How often the 5 nearest test images of a run share a finding and its place, and by chance."""
    folder, rows = rows_of_test(run, tiny)
    embeddings = image_embeddings(LoFi.from_pretrained(run), folder, rows)
    yield from shared_findings(rows, embeddings).items()


def bench_similarity(tiny, run=RUN):
    """How often the similarity of a phrase of the image is above that of a phrase of another image:
    AUROC over the phrases of the test split, one foreign phrase for each."""
    model, (_, rows) = LoFi.from_pretrained(run), rows_of_test(run, tiny)
    rng = np.random.default_rng(0)
    phrases = [{region["phrase"] for region in row["regions"]} for row in rows]
    values, present = [], []
    for row, own in zip(rows, phrases):
        others = sorted(set().union(*phrases) - own)
        foreign = rng.choice(others, len(own), replace=False).tolist()
        values += model.similarity(row["path"], [*sorted(own), *foreign])[0].tolist()
        present += [True] * len(own) + [False] * len(foreign)
    values, present = np.array(values), np.array(present)
    yield "phrases of the image", present.sum()
    yield "and as many of other images, AUROC", metrics.auroc(values, present)
    yield "mean similarity of the image's phrases", values[present].mean()
    yield "mean similarity of foreign phrases", values[~present].mean()


def bench_picture(tiny, run=RUN):
    """Draw the README's picture, .github/phantom.png: the answers to the first phrases of the
    first five test images; below, the first one again, with its demonstrations."""
    model, (folder, rows) = LoFi.from_pretrained(run), rows_of_test(run, tiny)
    rows = [{**row, "regions": row["regions"][:1]} for row in icl_ground.with_boxes(rows)[:5]]
    answers = icl_ground.lofi_answers(model, rows)
    images = [data.load_image(row["path"]) for row in rows]
    cells = [icl_ground.answer_cell(*pair) for pair in zip(images, answers)]
    [found] = icl_ground.find_demonstrations(model, rows[:1], model.encode_image(rows[0]["path"]),
                                             folder, data.read_manifest(folder), 40)
    below = icl_ground.figure(images[0], answers[0], found)
    above = data.tile(cells, 5)
    sheet = Image.new("RGB", (above.width, above.height + below.height))
    sheet.paste(above)
    sheet.paste(below, (0, above.height))
    sheet.quantize(128).save(ROOT / ".github" / "phantom.png", optimize=True)
    yield "images drawn", len(cells)


# ---- ablate -------------------------------------------------------------------------------------

ABLATIONS = {"s": ["--objectives", "s"], "s, c": ["--objectives", "sc"], "s, c, g, d": [],
             "lambda 1": ["--lambda", "1"], "lambda 10": ["--lambda", "10"]}
COLUMNS = ["i2t R@1", "t2i R@1", "i2t R@10", "t2i R@10", "shared@5", "nearest Ro/L", "nearest F",
           "decoder F"]


def ablation_run(job):
    """Train on one thread, ground by the nearest of 20 demonstrations, look at the neighbours
    -> COLUMNS, percent; NaN for a decoder that was not taught to ground. What is there already is
    not repeated, and a stopped training goes on."""
    flags, seed, steps, out = job
    resume = ["--resume"] if out.exists() else []
    runs = {out / "metrics.json": ["train.py", *flags, "--seed", str(seed), "--steps", str(steps),
                                   "--workers", "1", "--out", out, *resume],
            out / "nearest.json": ["icl_ground.py", "--lvlm", "nearest", "--k", "20",
                                   "--checkpoint", out, "--json", out / "nearest.json"]}
    for path, (script, *rest) in runs.items():
        if not path.exists():
            done = subprocess.run(
                [sys.executable, ROOT / script, *rest, "--device", "cpu"], capture_output=True,
                text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(f"{out}: {done.stderr.strip().splitlines()[-1]}")
    done, nearest = (json.loads(path.read_text()) for path in runs)
    nearest, shared = nearest["grounding"], dict(bench_neighbours(False, out))["shared@5"]
    return [100 * v for v in (*(done[way][k] for k in ("R@1", "R@10") for way in ("i2t", "t2i")),
                              shared, nearest["Ro/L"], nearest["F@0.5"],
                              done["grounding"]["F@0.5"] if "grounding" in done else np.nan)]


def bench_ablate(tiny):
    """Fig. 4 on the phantom, each run a quarter of the default one: mean and standard deviation
    over the seeds, percent. Interrupted, it continues with the runs that are not there yet."""
    names, seeds, steps, folder = (["s"], (0, 1), 2, "runs/ablate_tiny") if tiny else (
        list(ABLATIONS), (0, 1, 2), PHANTOM.steps // 4, "runs/ablate")
    train.phantom_folder(0)
    jobs = [(ABLATIONS[name], seed, steps, Path(folder, f"{name.replace(', ', '')}_{seed}"))
            for name in names for seed in seeds]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = np.array(list(pool.map(ablation_run, jobs))).reshape(len(names), len(seeds), -1)
    print(f"{'':16}" + "".join(f"{column:>15}" for column in COLUMNS))
    for name, row in zip(names, rows):
        cells = (f"{mean:.2f} +- {sd:4.2f}" for mean, sd in zip(row.mean(0), row.std(0, ddof=1)))
        print(f"{name:16}" + "".join(f"{'-' if 'nan' in cell else cell:>15}" for cell in cells))
    for name, row in zip(names, rows):
        yield from ((f"{name}: {column}", mean) for column, mean in zip(COLUMNS, row.mean(0)))


# ---- command line -------------------------------------------------------------------------------

BENCHMARKS = {"retrieve": bench_retrieve, "icl": bench_icl, "prepare": bench_prepare,
              "train": bench_train, "paper": bench_paper, "neighbours": bench_neighbours,
              "similarity": bench_similarity, "picture": bench_picture, "ablate": bench_ablate}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--json", metavar="PATH", help="write the figures there, a flat object")
    parser.add_argument("--tiny", action="store_true",
                        help="small sizes, only to see that it runs")
    args, figures = parser.parse_args(), {}
    for name, value in BENCHMARKS[args.name](args.tiny):
        print(f"{name:40} {value:,.3f}", flush=True)
        figures[name] = float(value)
    if args.json:
        data.write_json(args.json, figures)


if __name__ == "__main__":
    main()
