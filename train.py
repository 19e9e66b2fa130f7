"""Train LoFi (Sec. 2.0.1 and 2.0.4), then evaluate retrieval (Table 1) and grounding (Table 4).

    python train.py                       # the paper in miniature: drawn X-rays, small towers, CPU
    python train.py --data PATH           # the paper's setting on a manifest (see data.py)
    python train.py --data PATH --init runs/NAME --objectives g        # fine-tune, Table 4
    torchrun --nproc_per_node=4 train.py --data PATH --batch-size 4    # the same batch of 16

You will see a bar with the losses, then R@K in both directions next to chance, and the
grounding scores next to those of the phrase prior. The run folder holds config.json,
model.safetensors, tokenizer/, trainer.pt (for --resume), log.jsonl (one line per step), curve.png,
metrics.json and README.md, a model card.

Below: optimizers and schedule, batches, several processes, the losses in the log, and `train`, the
loop. The method ends there; then the run folder, the evaluation, arguments and main.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
import icl_ground
import metrics
import retrieve
from data import TASKS, InputError, first_line, write_file, write_json
from losses import (captioning_loss, dense_captioning_loss, grounding_loss, sigmoid_loss,
                    total_loss)
from model import (PHANTOM, PRESETS, LoFi, find_device, from_all, join_processes, rank_and_world,
                   say, silence_libraries)

# ---- precision, schedule, optimizers ------------------------------------------------------------

def choose_precision(name, device):
    """--precision -> the autocast type; float32 means none. The frozen weights stay in float32:
    Gemma's residual stream, which autocast leaves alone, exceeds the range of float16."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def learning_rate(step, steps, config):
    """The lower of cosine annealing to 0 (Sec. 2.0.4) and a linear warm-up; step counts from 0."""
    warmup = max(1, round(config.warmup * steps))
    return config.lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def build_optimizers(model, config):
    """AdamW for all trainable parameters; with muon_lr, Muon for the hidden matrices.

    Vectors and scalars do not decay; the text tower, t' and b have their own rates, "rate", in
    units of learning_rate(). AdamW's eps is above the rounding error of gradients that are zero in
    theory (the bias of an attention key)."""
    adamw, muon = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.ndim == 2 and not re.search("embedding|embed_tokens|queries", name)
            groups = muon if hidden and config.muon_lr else adamw
            rate = config.muon_lr if groups is muon else 1.0
            if "logit_" in name:
                rate *= config.scale_lr
            elif "text_model" in name:
                rate *= config.text_lr
            decay = config.weight_decay if p.ndim >= 2 else 0.0
            group = {"params": [], "rate": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), group)["params"].append(p)
    optimizers = [torch.optim.AdamW([*adamw.values()], lr=config.lr, betas=(0.9, 0.98), eps=1e-7,
                                    fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon([*muon.values()], lr=config.lr, momentum=0.85,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---- batches ------------------------------------------------------------------------------------

def batches_per_epoch(n_rows, batch_size, objectives, world=1):
    """The number of batches. A short last one counts if each process gets an image and Eq. 1 a
    negative pair."""
    least = max(world, 2 if "s" in objectives and batch_size > 1 else 1)
    return n_rows // batch_size + (n_rows % batch_size >= least)


def batches(n_rows, batch_size, per_epoch, seed, first, last, rank=0, world=1):
    """Keys (epoch, i) of the batches first..last-1; each epoch is a new order of all rows.

    batch_size counts the images of all processes; each process takes its own part of them."""
    order = None
    for number in range(first, last):
        epoch, i = divmod(number, per_epoch)
        if order is None or i == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        batch = order[i * batch_size:(i + 1) * batch_size]
        yield [(epoch, int(row)) for row in np.array_split(batch, world)[rank]]


def load_batches(model, rows, objectives, seed, keys, augment=0.0, workers=0):
    """An iterator over the batches of the keys, decoded by worker processes, on the model's device.
    augment: strength of augmentation."""
    config = model.config
    dataset = data.ChestXrays(rows, model.image_size, objectives, config.n_regions, augment,
                              config.cache, seed)
    collate = data.Collate(model.text_tokenizer if "s" in objectives else None,
                           model.text_length, model.llm_tokenizer, config.max_target)
    if workers is None:
        # a worker competes with small towers for the cores: only augmentation is worth one
        workers = int(augment > 0) if config.cache else min(4, os.cpu_count())
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers,
        worker_init_fn=leave_group, pin_memory=model.device.type == "cuda",
        generator=torch.Generator())                           # does not draw from torch's own
    for batch in loader:    # asynchronous copies; the images are converted from uint8 on the device
        yield {name: x.to(model.device, non_blocking=True) for name, x in batch.items()}


def leave_group(_):
    """In a worker: a Ctrl-C or SIGTERM for the whole group is left to the main process, which still
    needs this step's batch."""
    with contextlib.suppress(AttributeError):                  # Windows has no groups
        os.setpgid(0, 0)


# ---- several processes: each computes the losses of the global batch ----------------------------

def gather(x):
    """Rows (any number each) of all processes, in the order of their ranks; None stays None.

    Every process computes the loss of all rows, but only its own rows carry a gradient. The hook
    multiplies it by the number of processes, by which average_gradients divides later, so that the
    result is the gradient of one process with all rows."""
    if x is None or not dist.is_initialized():
        return x
    counts = torch.zeros(dist.get_world_size(), dtype=torch.long, device=x.device)
    counts[dist.get_rank()] = len(x)
    dist.all_reduce(counts)
    counts = counts.tolist()
    padded = F.pad(x.detach(), [0, 0] * (x.ndim - 1) + [0, max(counts) - len(x)]).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:n] for part, n in zip(parts, counts)]
    parts[dist.get_rank()] = x                                 # its own rows, with a gradient
    if x.requires_grad:
        x.register_hook(lambda gradient: len(parts) * gradient)
    return torch.cat(parts)


def highest(values, device):
    """The element-wise maximum over the processes of a list of numbers."""
    values = torch.tensor(values, device=device)
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def average_gradients(parameters):
    """Average the gradients over the processes; None stays where no process has one.

    One call after the backward pass instead of DistributedDataParallel's hooks within it: with LoRA
    there is little to overlap."""
    if not dist.is_initialized():
        return
    has = highest([int(p.grad is not None) for p in parameters], parameters[0].device)
    if not (used := [p for p, has_gradient in zip(parameters, has) if has_gradient]):
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, gradient in zip(used, flat.split([p.numel() for p in used])):
        p.grad = gradient.view_as(p)


# ---- the losses in the log ----------------------------------------------------------------------

LOSSES = ("loss", "sigmoid", "captioning", "grounding", "dense_captioning")


def mean_per_task(loss, l_s, l_c, l_g, l_d, task):
    """The losses of a batch for the log, in the order of LOSSES -> (5,).

    Unlike in L_t, where L_c, L_g and L_d are divided by all rows, each is here the mean over the
    rows that drew its task, NaN if none did."""
    c, g, d = [(task == tau).float().mean() for tau in range(len(TASKS))]      # fractions of rows
    return torch.stack([loss, l_s, l_c / c, l_g / g, l_d / d]).detach()


def log_values(losses, objectives):
    """Results of mean_per_task -> {name: their mean, or None if the task was not drawn}."""
    mean = torch.stack(losses).nanmean(0).tolist()
    values = {name: round(v, 6) if math.isfinite(v) else None for name, v in zip(LOSSES, mean)}
    return values if "s" in objectives else {**values, "sigmoid": None}


@torch.no_grad()
def validate(model, rows, objectives, batch_size):
    """The losses in float32 on at most 512 images spread over the val split, with the same draws
    each time."""
    keys = [(0, i) for i in range(0, len(rows), math.ceil(len(rows) / 512))]
    keys = [keys[start:start + batch_size] for start in range(0, len(keys), batch_size)]
    sigmoids, nlls, tasks = [], [], []
    t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
    for batch in load_batches(model, rows, objectives, 0, keys):
        image_emb, text_emb, nll = model(batch)
        sigmoids.append(sigmoid_loss(image_emb, text_emb, t, b) if "s" in objectives else 0 * t)
        nlls.append(nll)
        tasks.append(batch["task_of_row"])
    nll, task, l_s = torch.cat(nlls), torch.cat(tasks), torch.stack(sigmoids).mean()
    l_c, l_g, l_d = (loss(nll, task) for loss in
                     (captioning_loss, grounding_loss, dense_captioning_loss))
    loss = total_loss(l_s, l_c, l_g, l_d, model.config.lam)
    return log_values([mean_per_task(loss, l_s, l_c, l_g, l_d, task)], objectives)


# ---- the loop -----------------------------------------------------------------------------------

def train(model, loader, val_rows, optimizers, scaler, first, settings, args, out, log):
    """Train from step `first` on; write the log and, in the first process, checkpoints to `out`.

    Ctrl-C and SIGTERM end it after the current step, which is saved. Raises InputError if a loss or
    a gradient is not finite; the last checkpoint stays as it is."""
    config, device, objectives = model.config, model.device, args.objectives
    precision = choose_precision(args.precision, device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    steps, per_step = settings["steps"], args.accumulate * settings["batch-size"]
    is_first_process = rank_and_world()[0] == 0
    signals = [0]                       # received; the loop ends after the step in which one comes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    bar = tqdm(range(first, steps), "train", initial=first, total=steps, unit="step",
               disable=not is_first_process)
    model.train()
    for step in bar:
        began, losses = time.time(), []
        for _ in range(args.accumulate):
            batch = next(loader)
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                image_emb, text_emb, nll = model(batch)        # nll: -log p of each row's target
            # with several processes: the rows of all of them
            image_emb, text_emb, nll, task = map(
                gather, (image_emb, text_emb, nll, batch["task_of_row"]))
            t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
            l_s = (sigmoid_loss(image_emb, text_emb, t, b) if "s" in objectives    # Eq. 1
                   else 0 * b.sum())                           # backward() needs a graph
            l_c = captioning_loss(nll, task)                                       # Eq. 2
            l_g = grounding_loss(nll, task)                                        # Eq. 3
            l_d = dense_captioning_loss(nll, task)                                 # after Eq. 3
            loss = total_loss(l_s, l_c, l_g, l_d, config.lam)                      # L_t
            scaler.scale(loss / args.accumulate).backward()
            losses.append(mean_per_task(loss, l_s, l_c, l_g, l_d, task))
        average_gradients(trainable)

        lr = learning_rate(step, steps, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * lr
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, max_norm=config.clip)
        diverged = not torch.stack(losses)[:, 0].isfinite().all()
        # In fp16 an overflow skips the step and lowers the scale; otherwise it is an error.
        if norm.isfinite() and not diverged:
            for optimizer in optimizers:
                scaler.step(optimizer)
        elif diverged or scaler.get_scale() <= 1:
            raise InputError(f"step {step + 1}: the loss or its gradient is not finite; lower --lr "
                             "and train again, or --resume from the last checkpoint")
        scaler.update()
        model.zero_grad()

        values = log_values(losses, objectives)
        line = {"step": step + 1, "lr": lr, **values,
                "samples_per_s": round(per_step / (time.time() - began), 4)}
        stop = highest([signals[-1]], device)[0]
        is_checkpoint = step + 1 == steps or (step + 1) % args.save_every == 0
        if is_checkpoint and is_first_process and val_rows:
            line["val"] = validate(model, val_rows, objectives, settings["batch-size"])
        print(json.dumps(line), file=log, flush=True)
        bar.set_postfix({k: f"{v:.2f}" for k, v in values.items() if v is not None}, refresh=False)
        if (is_checkpoint or stop) and is_first_process:
            save_run(out, model, optimizers, scaler, step + 1, settings)
        if stop and step + 1 < steps:
            say(f"stopped and saved after step {step + 1}; run the same command with --resume",
                sys.stderr)
            sys.exit(128 + stop)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ==================================================================================================
# The method ends here. Below: data and model of a run, its folder, the evaluation, arguments, main.
# ==================================================================================================

PHANTOM_FOLDER = Path("runs/phantom_data")


def phantom_folder(rank):
    """The folder of the phantom, drawn on first use."""
    if rank == 0 and not PHANTOM_FOLDER.exists():
        # in a process of its own, whose workers then import no torch
        command = [sys.executable, data.__file__, "phantom", PHANTOM_FOLDER]
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit("train.py: the phantom was not drawn")
    from_all(rank)                                             # a barrier: the others wait
    return PHANTOM_FOLDER


def read_rows(path, objectives):
    """A manifest -> {split: rows}, and the training rows; of train and val those that the
    objectives can use.

    Prints warnings about it. Raises InputError if there is no row to train on."""
    rows = data.read_manifest(path)
    for note in data.manifest_notes(rows):
        say(f"note: {note}")
    split = {name: [row for row in rows if row["split"] == name] for name in data.SPLITS}
    usable = {name: [row for row in split[name]
                     if data.possible_tasks(row["report"], row["regions"], objectives)
                     or "s" in objectives and (row["report"] or row["regions"])]
              for name in ("train", "val")}
    if not usable["train"]:
        raise InputError(f"{path}: no row with split 'train' has what --objectives {objectives} "
                         "needs, a report or boxes")
    for name, kept in usable.items():
        if n := len(split[name]) - len(kept):
            say(f"left out {n} {name} images: no text or box for --objectives {objectives}")
    return {**split, "val": usable["val"]}, usable["train"]


def find_config(args, start):
    """The config of the preset, or of the run to start from, changed by the flags."""
    preset = args.preset or ("paper" if args.data else "tiny")
    names = ["lam", "batch_size", "lr", "augment"]             # flags that change it
    if start:
        config = start                                         # it has a preset already
    else:
        config = PHANTOM if preset == "tiny" and not args.data else PRESETS[preset]
        if args.random_init:
            config = dataclasses.replace(config, encoder=None, llm=None)
        names += ["encoder", "llm"]
    changed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.steps or args.epochs:
        changed |= {"steps": args.steps, "epochs": args.epochs}
    return dataclasses.replace(config, **changed)


def build_model(args, source, rows, world):
    """Build a model, or load the run to start from -> (model, batch size over all processes)."""
    model = LoFi.from_pretrained(source) if source else None
    config = find_config(args, model and model.config)
    if len(rows) < max(world, 2 if "s" in args.objectives else 1):
        raise InputError(f"{len(rows)} training images for {world} processes; expected one each, "
                         "two for the sigmoid loss")
    batch_size = min(config.batch_size * world, len(rows))     # of all processes
    if batch_size < config.batch_size * world:
        say(f"steps of {batch_size} images: the training split has no more")
    if model:
        model.config = config
    else:
        model = LoFi.build(config, data.tokenizer_texts(rows), batch_size)
    if args.compile:                                           # whole stacks: three graphs
        model.siglip.vision_model.encoder.compile()
        model.siglip.text_model.encoder.compile()
        model.llm.get_decoder().compile(dynamic=True)
    if args.grad_checkpoint:
        for part in (model.siglip, model.llm):
            part.gradient_checkpointing_enable({"use_reentrant": False})
    say(f"trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
        + (", LoRA and new layers" if config.lora_rank else ""))
    n_cut, n_targets = data.count_cut_targets(model.llm_tokenizer, rows, config.max_target)
    if n_cut:
        say(f"{n_cut:,} of {n_targets:,} targets have {config.max_target} tokens or more: they end "
            "after the last whole sentence or box that fits")
    return model, batch_size


# ---- the run folder -----------------------------------------------------------------------------

def run_folder(args):
    """The run folder: --out, or runs/NAME of the data. Nothing is written yet. Raises InputError if
    it already exists or, with --resume, if it holds no run that can go on."""
    name = data.manifest_path(Path(args.data).resolve()).parent.name if args.data else "phantom"
    out = Path(args.out or f"runs/{name}")
    if out.exists() and not args.resume:
        raise InputError(f"{out}: already exists; continue that run with --resume, or name another "
                         "folder with --out")
    if args.resume and not out.is_dir():
        raise InputError(f"{out}: no run to resume; give its --out, or leave out --resume")
    if args.resume and Path(out, "metrics.json").exists() and not Path(out, "trainer.pt").exists():
        raise InputError(f"{out}: a finished run without trainer.pt cannot go on; name another "
                         "folder with --out")
    return out


def open_log(out, first, resume):
    """log.jsonl of the run folder, which is made, or, to resume, cut to the whole lines up to the
    step of the checkpoint -> the open file."""
    try:
        out.mkdir(parents=True, exist_ok=resume)
    except FileExistsError:                                    # two started together: one stops
        raise InputError(f"{out}: already exists; name another folder with --out")
    for draft in out.glob(".*.tmp"):                           # of a run that was killed
        draft.unlink()
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)[:first] if log.exists() else []
    write_file(log, lambda draft: draft.write_bytes(
        b"".join(line for line in lines if line.endswith(b"\n"))))
    return log.open("a")


def save_run(out, model, optimizers, scaler, step, settings):
    """Write the model's files, then trainer.pt, which --resume needs too, each file whole. It holds
    the trained weights again: after a kill in between, model.safetensors is ahead of it."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "settings": settings, "weights": weights,
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "scaler": scaler.state_dict(), "rng": torch.get_rng_state()}
    model.save_pretrained(out)
    write_file(out / "trainer.pt", lambda draft: torch.save(state, draft))
    write_file(out / "curve.png", lambda draft: draw_curves(out / "log.jsonl").save(draft, "PNG"))


def load_trainer(path, model, optimizers, scaler, settings):
    """Restore what save_run wrote -> the step to continue from. Raises InputError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = {k: v for k, v in state["settings"].items()
                  if k != "data" and v != settings.get(k)}
    except (OSError, EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: damaged, or not a checkpoint of this train.py "
                         f"({first_line(error)}); train again with a new --out")
    if differ:
        raise InputError(f"{path}: was trained with {differ}, now "
                         f"{({k: settings.get(k) for k in differ})}; resume with the same flags, "
                         "data and number of processes, or train again with a new --out")
    model.load_state_dict(state["weights"], strict=False)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def draw_curves(log, w=420, h=300):
    """log.jsonl -> a picture of the four losses by step, in panels of w x h pixels."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    picture, last = Image.new("RGB", (2 * w, 2 * h), "white"), lines[-1]["step"]
    pen = ImageDraw.Draw(picture)
    for panel, name in enumerate(LOSSES[1:]):
        train = [(line["step"], line[name]) for line in lines[::1 + len(lines) // 400]]
        val = [(line["step"], line["val"][name]) for line in lines if line.get("val")]
        high = max([value for _, value in train + val if value is not None], default=1) or 1
        left, top = panel % 2 * w + 20, panel // 2 * h + 30
        right, bottom = left + w - 40, top + h - 40
        train, val = ([(left + (right - left) * step / last, bottom - (bottom - top) * value / high)
                       for step, value in points if value is not None] for points in (train, val))
        pen.rectangle((left, top, right, bottom), outline="#cccccc")
        pen.text((left, top - 20), f"{name.replace('_', ' ')}, 0 to {high:.1f}, in {last:,} steps: "
                 "train (line), val (dots)", "black", data.font(12))
        pen.line(train, "#1f77b4", 2)
        for point in val:
            pen.circle(point, 4, "#d62728")
    return picture


# ---- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, rows, training_rows, objectives, batch_size=64):
    """Print Table 1 and, if the decoder learned grounding, a row of Table 4 -> (the parts of
    metrics.json, the printed tables).

    Retrieval: five-sentence sub-reports, one image per study (Sec. 3.1). Grounding: LoFi's own
    decoder on each phrase with boxes, next to the phrase prior of the training rows."""
    results, tables, paths = {"n_images": len(rows)}, [], [row["path"] for row in rows]
    images, texts, _ = table = data.sub_report_table(rows)
    if texts:
        image_emb = torch.cat([model.encode_image(paths[i:i + batch_size])
                               for i in range(0, len(paths), batch_size)]).cpu()
        results |= retrieve.table_1(model, table, image_emb)
        tables = [f"retrieval over {len(images)} test images and {len(texts)} sub-reports, %\n\n"
                  + retrieve.format_table_1({"LoFi": results}, retrieve.chance(table))]
        print("\n" + tables[0])
    if "g" in objectives and (predictions := icl_ground.lofi_predictions(model, rows)):
        scores = {"LoFi": {"grounding": metrics.grounding_metrics(predictions)}}
        scores, text = icl_ground.with_prior(scores, rows, training_rows)
        results |= scores["LoFi"]
        tables.append(f"grounding of {len(predictions)} test phrases, %\n{text}")
        print("\n" + tables[-1])
    return results, tables


MODEL_CARD = """\
# {name}

LoFi (arXiv 2603.19451): location-aware fine-grained representation learning for chest X-rays.
A research model, not a medical device: not for clinical use.

* data: `{data}`, {n_rows:,} training images
* training: {steps:,} steps of {accumulate} x {batch-size} images, objectives `{objectives}`
* command: `{command}`

Scores, next to a baseline:

```
{scores}
```

In Python, next to model.py:

    from model import LoFi
    model = LoFi.from_pretrained("{out}")
    boxes = model.ground("x.png", ["The heart is enlarged."])
    report = model.report("x.png")

LoFi never learns that a finding is absent: it answers almost any phrase with boxes.
"""


def finish_run(out, model, split, n_rows, settings, began):
    """Evaluate on the test split, write metrics.json and README.md, print the next commands."""
    print(f"saved {out}")
    results, tables = {}, ["not evaluated: no test split, or frozen parts with random weights"]
    if split["test"]:
        results, tables = evaluate(model, split["test"], split["train"], settings["objectives"])
    else:
        print(tables[0])
    seconds = time.time() - began
    write_json(out / "metrics.json", {**results, "seconds": round(seconds, 1)})
    card = MODEL_CARD.format(
        **settings, name=out.name, out=out, n_rows=n_rows,
        command=shlex.join(["python", *sys.argv]), scores="\n\n".join(tables))
    write_file(out / "README.md", lambda draft: draft.write_text(card, encoding="utf-8"))

    print(f"\n{seconds:.0f} s in total")
    run = shlex.quote(str(out))
    for row in icl_ground.with_boxes(split["test"])[:1]:
        phrase = shlex.quote(row["regions"][0]["phrase"])
        print(f"Next:\n  python retrieve.py --checkpoint {run} --text {phrase}\n"
              f"  python icl_ground.py --checkpoint {run} --image {shlex.quote(row['path'])} "
              f"--phrase {phrase}\n"
              f"  python icl_ground.py --checkpoint {run} --lvlm nearest --k 20")


# ---- arguments and main -------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Defaults marked 'preset' are in model.py: PAPER (with --data), TINY, and PHANTOM "
        "(without --data).")
    add = parser.add_argument_group("data and files").add_argument
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file (default: drawn "
        "X-rays, made in runs/phantom_data)")
    add("--out", metavar="DIR", help="run folder, a new one (default: runs/NAME, from the name of "
        "the data)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--init", metavar="RUN", help="run folder to fine-tune (Table 4: FT w/ Ours)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=["paper", "tiny"], help="SigLIP 2 400M and Gemma 3 270M with LoRA, or "
        "small towers from scratch (default: paper with --data, else tiny)")
    add("--encoder", metavar="ID", help="SigLIP-family model id or folder (preset)")
    add("--llm", metavar="ID", help="Gemma 3 text model id or folder (preset)")
    add("--random-init", action="store_true", help="random weights for parts without --encoder or "
        "--llm, to try memory and speed without downloads")

    add = parser.add_argument_group("objective and schedule").add_argument
    add("--objectives", default="scgd", metavar="LETTERS", help="s sigmoid (Eq. 1), c captioning "
        "(Eq. 2), g grounding (Eq. 3), d dense captioning; Table 4: g (default: scgd)")
    add("--lambda", dest="lam", type=float, metavar="X", help="weight of L_tau (preset; paper: 5)")
    add("--epochs", type=int, metavar="N", help="passes over the data (preset; paper: 10)")
    add("--steps", type=int, metavar="N", help="optimizer steps (preset); with --epochs, whichever "
        "ends first")
    add("--batch-size", type=int, metavar="B", help="images per batch and process (preset; "
        "paper: 16; at most the training split)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches per step, whose gradients "
        "are averaged; the sigmoid loss stays within a batch (default: 1)")
    add("--lr", type=float, metavar="X", help="learning rate after warm-up (preset; paper: 3e-4)")
    add("--augment", type=float, metavar="X", help="random crop and contrast, 0 to 1 (preset)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1 or cpu (default: cuda if available)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="autocast "
        "type; auto: bf16, or fp16 on a GPU without bf16, or fp32 on a CPU (default: auto)")
    add("--grad-checkpoint", action="store_true", help="a third of the memory, half the speed "
        "(H100, paper's sizes: 27 to 9 GB, 44 to 20 images/s)")
    add("--compile", action="store_true", help="torch.compile of the three stacks of layers: a "
        "slow first step, then faster")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: one per "
        "core, at most 4; tiny: 1 with augmentation, else 0)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints, with "
        "the losses on val (default: 500)")
    add("--seed", type=int, default=0, help="seed of all random draws (default: 0)")
    return parser.parse_args()


def check_args(args):
    """Reject invalid flags before anything is read. Raises InputError."""
    if not args.objectives or set(args.objectives) - set("scgd"):
        raise InputError(f"--objectives {args.objectives!r}: expected letters of s, c, g, d")
    data.check_ranges(args, {
        "epochs": (1, 1e6), "steps": (1, 1e9), "batch_size": (1, 1e6), "accumulate": (1, 1e4),
        "save_every": (1, 1e9), "lr": (1e-12, 1), "lam": (0, 1e6), "augment": (0, 1),
        "seed": (0, 2 ** 32 - 1), "workers": (0, 256)})
    if args.init and (args.encoder or args.llm or args.random_init):
        raise InputError("--init has its own weights; leave out --encoder, --llm, --random-init")
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise InputError("--compile: torch.compile needs a C++ compiler, such as g++; none found")


def main():
    began, args = time.time(), parse_args()
    check_args(args)
    silence_libraries()
    device = find_device(args.device)
    rank, world = join_processes(device)
    torch.manual_seed(args.seed)

    # data
    out = run_folder(args)
    path = args.data or phantom_folder(rank)
    split, rows = read_rows(path, args.objectives)
    checkpoint = out / "trainer.pt"
    resumes = args.resume and checkpoint.exists()

    # model
    model, batch_size = build_model(args, out if resumes else args.init, rows, world)
    model.to(device)
    config = model.config
    if config.lora_rank and not config.encoder or config.llm_lora_rank and not config.llm:
        split["val"] = split["test"] = []                      # frozen parts would stay random

    # schedule; what a resumed run must have in common with its first part
    per_epoch = batches_per_epoch(len(rows), batch_size, args.objectives, world)
    steps = config.steps or math.inf
    if config.epochs:
        steps = min(steps, math.ceil(config.epochs * per_epoch / args.accumulate))
    settings = {
        "data": str(Path(path).resolve()),
        "manifest": hashlib.sha256(data.manifest_path(path).read_bytes()).hexdigest(),
        "encoder": args.encoder or config.encoder, "llm": args.llm or config.llm,
        "objectives": args.objectives, "lambda": config.lam, "lr": config.lr, "steps": steps,
        "batch-size": batch_size, "batches an epoch": per_epoch, "accumulate": args.accumulate,
        "seed": args.seed, "augment": config.augment}

    # optimizers, checkpoint, batches
    optimizers = build_optimizers(model, config)
    is_fp16 = choose_precision(args.precision, device) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=is_fp16)
    first = load_trainer(checkpoint, model, optimizers, scaler, settings) if resumes else 0
    keys = batches(len(rows), batch_size, per_epoch, args.seed, first * args.accumulate,
                   steps * args.accumulate, rank, world)
    loader = load_batches(model, rows, args.objectives, args.seed, keys, config.augment,
                          args.workers)
    say(f"{len(rows):,} training images, {steps:,} steps of {args.accumulate * batch_size}, "
        f"objectives {args.objectives}, on {f'{world} x ' if world > 1 else ''}{device.type}; "
        f"writes {out}")

    # loop, evaluation
    with open_log(out, first, args.resume) if rank == 0 else open(os.devnull, "w") as log:
        train(model, loader, split["val"], optimizers, scaler, first, settings, args, out, log)
    if dist.is_initialized():                                  # the first process evaluates alone
        dist.destroy_process_group()
    if rank == 0:
        finish_run(out, model.eval(), split, len(rows), settings, began)


if __name__ == "__main__":
    data.run_command(main)
