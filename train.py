"""Train LoFi (Sec. 2.0.1 and 2.0.4), then evaluate retrieval (Table 1) and grounding (Table 4).

    python train.py                       # the paper in miniature: drawn X-rays, small towers, CPU
    python train.py --data PATH           # the paper's setting on a manifest (see data.py)
    python train.py --data PATH --init runs/NAME --objectives g        # fine-tune, Table 4
    torchrun --nproc_per_node=4 train.py --data PATH                   # 4 GPUs, or CPU processes

You will see a bar with the four losses, then R@K in both directions next to chance, and the
grounding scores next to those of the phrase prior. The run folder holds config.json,
model.safetensors, tokenizer/, trainer.pt (for --resume), log.jsonl (one line per step), curve.png,
metrics.json and README.md, a model card.
"""

import argparse
import math
import sys

from metrics import InputError, first_line


# ---- arguments: before the imports that take seconds, so that --help answers at once -------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="Defaults marked 'preset' are in model.py: PAPER (with --data), TINY, and PHANTOM "
        "(without --data).")
    add = parser.add_argument_group("data and files").add_argument
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file (default: drawn "
        "X-rays, made in runs/phantom_data)")
    add("--out", metavar="DIR", help="run folder; an older run there is renamed (default: "
        "runs/NAME, from the name of the data)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--init", metavar="RUN", help="run folder to fine-tune (Table 4: FT w/ Ours)")
    add("--skip-bad-images", action="store_true", help="skip unreadable training images, counted")

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
    add("--steps", type=int, metavar="N", help="optimizer steps, instead of epochs (preset)")
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
    add("--grad-checkpoint", action="store_true", help="less memory, about a third slower")
    add("--compile", action="store_true", help="torch.compile: a slow first step, then faster")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: one per "
        "core, at most 4; tiny: 1 with augmentation, else 0)")
    add("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints, with "
        "the losses on val (default: 500)")
    add("--seed", type=int, default=0, help="seed of all random draws (default: 0)")
    add("--dry-run", action="store_true", help="check the data, run one step, write nothing")
    return parser.parse_args()


def check_args(args):
    """Reject invalid flags before anything is read. Raises InputError."""
    if not args.objectives or set(args.objectives) - set("scgd"):
        raise InputError(f"--objectives {args.objectives!r}: expected letters of s, c, g, d")
    metrics.check_ranges(args, {
        "epochs": (1, 1e6), "steps": (1, 1e9), "batch_size": (1, 1e6), "accumulate": (1, 1e4),
        "save_every": (1, 1e9), "lr": (1e-12, 1), "lam": (0, 1e6), "augment": (0, 1),
        "seed": (0, 2 ** 32 - 1), "workers": (0, 256)})
    if args.init and (args.encoder or args.llm or args.random_init):
        raise InputError("--init has its own weights; leave out --encoder, --llm, --random-init")


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import atexit
import dataclasses
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import icl_ground
import metrics
import retrieve
from losses import (TASKS, captioning_loss, dense_captioning_loss, grounding_loss, sigmoid_loss,
                    total_loss)
from model import (PHANTOM, PRESETS, LoFi, find_device, from_all, join_processes, say,
                   silence_libraries)

LOSSES = ("loss", "sigmoid", "captioning", "grounding", "dense_captioning")      # in log.jsonl
PHANTOM_FOLDER = Path("runs/phantom_data")
MAX_SKIPPED = 5                         # skipped steps in a row that end the run


# ---- data and model -----------------------------------------------------------------------------

def phantom_folder(dry_run, rank):
    """The folder of the phantom, drawn on first use; a dry run draws a small one and removes it."""
    if dry_run:
        folder = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return data.make_phantom(Path(folder, "phantom"), {"train": 64, "test": 8})
    if rank == 0 and not PHANTOM_FOLDER.exists():
        data.make_phantom(PHANTOM_FOLDER)
    from_all(rank)                                             # the other processes wait
    return PHANTOM_FOLDER


def read_rows(path, objectives):
    """A manifest -> {split: rows}, and the training rows that the objectives can use.

    Prints warnings about it. Raises InputError if there is no row to train on."""
    rows = data.read_manifest(path)
    for note in data.manifest_notes(rows):
        say(f"note: {note}")
    split = {name: [row for row in rows if row["split"] == name] for name in data.SPLITS}
    usable = [row for row in split["train"]
              if data.possible_tasks(row["report"], row["regions"], objectives)
              or "s" in objectives and (row["report"] or row["regions"])]
    if not usable:
        raise InputError(f"{path}: no row with split 'train' has what --objectives {objectives} "
                         "needs, a report or boxes")
    if n := len(split["train"]) - len(usable):
        say(f"left out {n} training images: no text or box for --objectives {objectives}")
    return split, usable


def find_config(args, start):
    """The config of the preset, or of the run to start from, changed by the flags."""
    preset = args.preset or ("paper" if args.data else "tiny")
    names = ["lam", "batch_size", "lr", "augment"]             # flags that change it
    if start:
        config = start
        if args.preset not in (None, start.preset):
            raise InputError(f"--preset {preset}: the run to start from has preset {start.preset}")
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
    if args.compile:
        for layer in (*model.siglip.vision_model.encoder.layers,
                      *model.siglip.text_model.encoder.layers, *model.llm.get_decoder().layers):
            layer.compile()
    if args.grad_checkpoint:
        for part in (model.siglip, model.llm):
            part.gradient_checkpointing_enable({"use_reentrant": False})
    say(f"trains {sum(p.numel() for p in model.parameters() if p.requires_grad):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
        + (", LoRA and new layers" if config.lora_rank else ""))
    return model, batch_size


# ---- schedule, precision, optimizer -------------------------------------------------------------

def learning_rate(step, steps, config):
    """Cosine annealing to 0 (Sec. 2.0.4), below a linear warm-up; step counts from 0."""
    warmup = max(1, round(config.warmup * steps))
    return config.lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def choose_precision(name, device):
    """--precision -> the autocast type; float32 means none."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)


def build_optimizers(model, config):
    """AdamW for all trainable parameters; with muon_lr, Muon for the hidden matrices.

    Only matrices decay; the text tower, t' and b have their own learning rates. AdamW's eps is
    above the rounding error of gradients that are zero in theory (the bias of an attention key)."""
    adamw, muon = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.ndim == 2 and not re.search("embedding|embed_tokens|queries", name)
            groups = muon if hidden and config.muon_lr else adamw
            rate = config.muon_lr if groups is muon else 1.0   # as a fraction of learning_rate()
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

    augment: strength of augmentation. An unreadable image becomes a message in batch["bad"]."""
    config = model.config
    dataset = data.ChestXrays(rows, model.image_size, objectives, config.n_regions, augment,
                              config.cache, seed)
    collate = data.Collate(model.text_tokenizer if "s" in objectives else None,
                           model.text_length, model.llm_tokenizer, config.max_target)
    if workers is None:
        # a worker competes with small towers for the cores: only augmentation is worth one
        workers = int(augment > 0) if config.cache else min(4, os.cpu_count())
    loader = iter(torch.utils.data.DataLoader(                 # its workers start here
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers,
        worker_init_fn=ignore_signals, pin_memory=model.device.type == "cuda",
        generator=torch.Generator()))                          # does not draw from torch's own
    atexit.register(kill_workers)
    # asynchronous copies; the images are converted from uint8 on the device
    return ({k: v.to(model.device, non_blocking=True) if isinstance(v, torch.Tensor) else v
             for k, v in batch.items()} for batch in loader)


def ignore_signals(_):
    """In a worker: the main process handles signals; it still needs this step's batch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """At the exit: multiprocessing would send workers a SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in torch.multiprocessing.active_children():
        worker.kill()


# ---- several processes: each computes the losses of the global batch ----------------------------

def gather(x):
    """Rows (any number each) of all processes, in the order of their ranks; None stays None.

    Every process computes the loss of all rows, but only its own rows carry a gradient. The hook
    multiplies it by the number of processes, by which average_gradients divides later, so that the
    result is the gradient of one process with all rows."""
    if x is None or not dist.is_initialized():
        return x
    parts = [part.to(x.device) for part in from_all(x.detach().cpu())]
    parts[dist.get_rank()] = x                                 # its own rows, with a gradient
    if x.requires_grad:
        x.register_hook(lambda gradient: len(parts) * gradient)
    return torch.cat(parts)


def average_gradients(parameters):
    """Average the gradients over the processes; None stays where no process has one.

    One call after the backward pass instead of DistributedDataParallel's hooks within it: with LoRA
    there is little to overlap."""
    has = from_all([p.grad is not None for p in parameters])
    used = [p for p, *has_gradient in zip(parameters, *has) if any(has_gradient)]
    if len(has) == 1 or not used:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in used])
    dist.all_reduce(flat)
    for p, gradient in zip(used, (flat / len(has)).split([p.numel() for p in used])):
        p.grad = gradient.view_as(p)


# ---- what can go wrong in a step ----------------------------------------------------------------

class Guard:
    """Handle signals, unreadable images and losses that are not finite.

    SIGTERM or Ctrl-C stops the run after the current step; without torchrun, a second Ctrl-C stops
    it immediately."""

    def __init__(self, skip_bad_images):
        self.skip_bad_images, self.bad = skip_bad_images, []
        self.signal = self.skipped = self.in_a_row = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, _):
        # torchrun forwards a Ctrl-C that its processes have already received
        if number == self.signal == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self.signal = number

    def readable(self, batch):
        """Whether each process has an image in its batch. Raises InputError."""
        self.bad += batch["bad"]
        if self.bad and not self.skip_bad_images:
            raise InputError(f"{self.bad[0]}; mend it, or leave such images out with "
                             "--skip-bad-images; --resume continues from the last checkpoint")
        return all(from_all(len(batch["image"]) > 0))

    def may_step(self, step, losses, norm, scaler, paths):
        """Whether losses and gradient are finite, or fp16's scaler only has to lower its scale.
        Raises InputError after MAX_SKIPPED steps in a row that were not."""
        scales = scaler.is_enabled() and not norm.isfinite() and scaler.get_scale() > 1
        if torch.stack(losses)[:, 0].isfinite().all() and (norm.isfinite() or scales):
            self.in_a_row = 0
            return bool(norm.isfinite())                       # one norm clips both optimizers
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == MAX_SKIPPED:
            raise InputError(f"step {step + 1}: no finite loss or gradient in {MAX_SKIPPED} steps; "
                             "lower --lr, or look at this step's images: " + " ".join(paths))
        return False

    def leave(self, done, number):
        """Exit after a signal, and say how to continue."""
        say(f"stopped{'' if self.in_a_row else ' and saved'} after step {done}; run the same "
            "command with --resume", sys.stderr)
        sys.exit(128 + number)

    def end(self, steps):
        """Print what was left out. Raises InputError if the training diverged."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if bad := sum(from_all(self.bad), []):
            say("\n".join([f"skipped unreadable images {len(bad)} times:", *sorted(set(bad))[:10]]))
        if self.skipped:
            say(f"skipped {self.skipped} steps without a finite loss and gradient")
        if self.in_a_row or 2 * self.skipped > steps:
            raise InputError(f"training diverged: {self.skipped} of {steps} steps were skipped, "
                             f"{self.in_a_row} at the end; lower --lr and train again")


# ---- the run folder -----------------------------------------------------------------------------

RUN_FILES = {"config.json", "model.safetensors", "tokenizer", "trainer.pt", "log.jsonl",
             "curve.png", "metrics.json", "README.md", "embeddings"}


def run_folder(args, rank=0):
    """The run folder: --out, or runs/NAME of the data. Nothing is written yet.

    Raises InputError unless it is new, empty, or a run that no process is writing."""
    name = "phantom"
    if args.data:
        name = data.manifest_path(Path(args.data).resolve()).parent.name
    out = Path(args.out or f"runs/{name}")
    files = {file.name for file in out.glob("*") if file.suffix != ".tmp"}     # drafts, if killed
    log = out / "log.jsonl"
    has_log = log.is_file() and log.read_bytes()[:8] in (b"", b'{"step":')     # empty: at the start
    if args.resume and not has_log:
        raise InputError(f"{out}: no run to resume, it has no log.jsonl of one; give its --out, or "
                         "start a new run without --resume")
    is_taken = out.resolve() in (PHANTOM_FOLDER.resolve(), Path.cwd(), *Path.cwd().parents)
    is_run = has_log and files <= RUN_FILES
    is_file = out.exists() and not out.is_dir()
    if not args.resume and (is_file or is_taken or files and not is_run):
        raise InputError(f"{out}: is a file, the working folder, the phantom's, or has files that "
                         "are not of a run; choose another --out")
    if has_log and rank == 0:                                  # else they lock each other out
        metrics.lock(out / "log.jsonl").close()                # InputError if a process writes it
    return out


def open_log(out, resume, step, config):
    """Lock log.jsonl of the run folder -> the open file. Resumed, it is cut to the whole lines up
    to the checkpoint (step); otherwise an older run in the folder is renamed to OUT.1, OUT.2, ...,
    and so is a run to resume that has a model but has lost its trainer.pt."""
    out.mkdir(parents=True, exist_ok=True)
    is_new = not any(out.iterdir())
    log = metrics.lock(out / "log.jsonl")                      # of two runs at once, one goes on
    if resume and (step or not (out / "model.safetensors").exists()):
        for draft in out.glob(".*.tmp"):                       # of a run that was killed
            draft.unlink()
        lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)[:step]
        log.truncate(sum(len(line) for line in lines if line.endswith(b"\n")))
        return log
    if not is_new:
        older = next(p for n in count(1) if not (p := out.with_name(f"{out.name}.{n}")).exists())
        out.rename(older)
        say(f"renamed the older run {out} to {older}")
        out.mkdir()
        log = metrics.lock(out / "log.jsonl")
    metrics.write_json(out / "config.json", dataclasses.asdict(config))
    return log


def save_run(out, model, optimizers, scaler, step, settings):
    """Write the model's files, then trainer.pt, all that --resume needs, each atomically."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "settings": settings, "weights": weights,
             "optimizers": [optimizer.state_dict() for optimizer in optimizers],
             "scaler": scaler.state_dict(), "rng": torch.get_rng_state()}
    try:
        model.save_pretrained(out)
        metrics.write_file(out / "trainer.pt", lambda draft: torch.save(state, draft))
        metrics.write_file(out / "curve.png",
                           lambda draft: draw_curves(out / "log.jsonl").save(draft, "PNG"))
    except InputError as error:
        raise InputError(f"step {step} is not saved: {error}, with --resume; a checkpoint "
                         "before it, if any, is kept")


def load_trainer(path, model, optimizers, scaler, settings):
    """Restore what save_run wrote -> the step to continue from. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:                 # torch.load verifies no checksum
            if broken := archive.testzip():
                raise ValueError(f"checksum mismatch in {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = {k: v for k, v in state["settings"].items()
                  if k != "data" and v != settings.get(k)}
    except metrics.DAMAGED as error:
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


# ---- the losses while it trains -----------------------------------------------------------------

def mean_per_task(loss, l_s, l_c, l_g, l_d, task):
    """The losses of a batch for the log, in the order of LOSSES -> (5,).

    Unlike in L_t, where L_c, L_g and L_d are divided by all rows, each is here the mean over the
    rows that drew its task, NaN if none did."""
    c, g, d = [(task == tau).float().mean() for tau in range(len(TASKS))]      # fractions of rows
    return torch.stack([loss, l_s, l_c / c, l_g / g, l_d / d]).detach()


def log_values(losses, objectives):
    """Results of mean_per_task -> {name: their mean, or None if the task was not drawn}."""
    mean = torch.stack(losses).nanmean(0).tolist() if losses else [math.nan] * len(LOSSES)
    values = {name: round(v, 6) if math.isfinite(v) else None for name, v in zip(LOSSES, mean)}
    return values if "s" in objectives else {**values, "sigmoid": None}


@torch.no_grad()
def validate(model, rows, objectives, batch_size):
    """The losses in float32 on at most 512 images spread over the val split, with the same draws
    each time; None if no image could be read."""
    keys = [(0, i) for i in range(0, len(rows), math.ceil(len(rows) / 512))]
    keys = [keys[start:start + batch_size] for start in range(0, len(keys), batch_size)]
    sigmoids, nlls, tasks = [], [], []
    t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
    for batch in load_batches(model, rows, objectives, 0, keys):
        if len(batch["image"]):
            image_emb, text_emb, nll = model(batch)
            sigmoids.append(sigmoid_loss(image_emb, text_emb, t, b) if "s" in objectives else 0 * t)
            nlls.append(nll)
            tasks.append(batch["task_of_row"])
    if not nlls:
        return None
    nll, task, l_s = torch.cat(nlls), torch.cat(tasks), torch.stack(sigmoids).mean()
    l_c, l_g, l_d = (loss(nll, task) for loss in
                     (captioning_loss, grounding_loss, dense_captioning_loss))
    loss = total_loss(l_s, l_c, l_g, l_d, model.config.lam)
    return log_values([mean_per_task(loss, l_s, l_c, l_g, l_d, task)], objectives)


def draw_curves(log, w=420, h=300):
    """log.jsonl -> a picture of the four losses by step, in panels of w x h pixels."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    picture, last = Image.new("RGB", (2 * w, 2 * h), "white"), lines[-1]["step"]
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
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
                 "train (line), val (dots)", "black", font)
        pen.line(train, "#1f77b4", 2)
        for point in val:
            pen.circle(point, 4, "#d62728")
    return picture


# ---- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, rows, training_rows, batch_size=64):
    """Print Table 1 and a row of Table 4 -> (the parts of metrics.json, the printed tables).

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
    if predictions := icl_ground.lofi_predictions(model, rows):
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
* code: commit {commit}

Scores, next to a baseline:

```
{scores}
```

In Python, next to model.py:

    from model import LoFi
    model = LoFi.from_pretrained("{out}")
    boxes = model.ground("x.png", ["The heart is enlarged."])
    report = model.report("x.png")

LoFi is never taught that a finding is not there: it answers almost any phrase with boxes.
"""


def finish_run(out, model, split, settings, began):
    """Evaluate on the test split, write metrics.json and README.md, print the next commands."""
    print(f"saved {out}")
    results, tables = {}, ["not evaluated: no test split, or frozen towers with random weights"]
    try:
        if split["test"]:
            results, tables = evaluate(model.eval(), split["test"], split["train"])
        else:
            print(tables[0])
    except InputError as error:
        raise InputError(f"{error}; the run is saved: fix the image, then evaluate with --resume")
    seconds = time.time() - began
    metrics.write_json(out / "metrics.json", {**results, "seconds": round(seconds, 1)})
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                            capture_output=True).stdout.strip() if shutil.which("git") else ""
    card = MODEL_CARD.format(
        **settings, name=out.name, out=out, n_rows=len(split["train"]), commit=commit or "unknown",
        command=shlex.join(["python", *sys.argv]), scores="\n\n".join(tables))
    metrics.write_file(out / "README.md", lambda draft: draft.write_text(card))

    print(f"\n{seconds:.0f} s in total. Next:")
    run = shlex.quote(str(out))
    for row in icl_ground.with_boxes(split["test"])[:1]:
        phrase = shlex.quote(row["regions"][0]["phrase"])
        print(f"  python retrieve.py --checkpoint {run} --text {phrase}")
        print(f"  python icl_ground.py --checkpoint {run} --lvlm lofi --image "
              f"{shlex.quote(row['path'])} --phrase {phrase}")
    print(f"  python model.py export {run} {shlex.quote(f'{out}_siglip')}")


# ---- the run ------------------------------------------------------------------------------------

def plan_run(args, config, path, n_rows, batch_size, world):
    """What a resumed run must have in common with its first part, but for where the data are ->
    settings: {name: value}."""
    per_epoch = batches_per_epoch(n_rows, batch_size, args.objectives, world)
    steps = config.steps or math.inf
    if config.epochs:
        steps = min(steps, math.ceil(config.epochs * per_epoch / args.accumulate))
    manifest = hashlib.sha256(data.manifest_path(path).read_bytes()).hexdigest()
    return {"data": str(Path(path).resolve()), "manifest": manifest, "objectives": args.objectives,
            "lambda": config.lam, "lr": config.lr, "steps": steps, "batch-size": batch_size,
            "batches an epoch": per_epoch, "accumulate": args.accumulate, "seed": args.seed,
            "augment": config.augment}


def prepare_step(optimizers, scaler, parameters, lr, most):
    """Set the optimizers' learning rates, unscale and clip the gradients -> their norm before."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * lr
        scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(parameters, most)


def main(args=None):
    began, args = time.time(), args or parse_args()
    check_args(args)
    silence_libraries()
    device = find_device(args.device)
    rank, world = join_processes(device)
    torch.manual_seed(args.seed)
    precision = choose_precision(args.precision, device)

    # data, run folder
    out = run_folder(args, rank)
    path = args.data or phantom_folder(args.dry_run, rank)
    split, rows = read_rows(path, args.objectives)
    checkpoint, writes = out / "trainer.pt", rank == 0 and not args.dry_run
    resumes = args.resume and checkpoint.exists()

    # model
    model, batch_size = build_model(args, out if resumes else args.init, rows, world)
    model.to(device)
    config, trainable = model.config, [p for p in model.parameters() if p.requires_grad]
    if config.lora_rank and not config.encoder:
        split["val"] = split["test"] = []                      # frozen towers would stay random

    # schedule, optimizer, checkpoint
    settings = plan_run(args, config, path, len(rows), batch_size, world)
    steps, per_epoch = settings["steps"], settings["batches an epoch"]
    optimizers = build_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first = load_trainer(checkpoint, model, optimizers, scaler, settings) if resumes else 0

    # batches
    keys = batches(len(rows), batch_size, per_epoch, args.seed, first * args.accumulate,
                   steps * args.accumulate, rank, world)
    loader = load_batches(model, rows, args.objectives, args.seed, keys, config.augment,
                          args.workers)
    per_step = args.accumulate * batch_size
    say(f"{len(rows):,} training images, {steps:,} steps of {per_step}, objectives "
        f"{args.objectives}, on {f'{world} x ' if world > 1 else ''}{device.type} in "
        f"{str(precision).removeprefix('torch.')}")
    log = open_log(out, args.resume, first, config) if writes else open(os.devnull, "w")

    # the loop
    model.train()
    guard, shown, values = Guard(args.skip_bad_images), {}, {}             # shown: in the bar
    last = min(first + 1, steps) if args.dry_run else steps
    bar = tqdm(range(first, last), "train", initial=first, total=steps, unit="step",
               disable=rank > 0)
    for step in bar:
        start, losses, paths = time.time(), [], []
        for _ in range(args.accumulate):
            batch = next(loader)
            if not guard.readable(batch):
                continue
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                image_emb, text_emb, nll = model(batch)        # nll: -log p of each row's target
            # with several processes: the rows of all of them
            image_emb, text_emb, nll, task = map(
                gather, (image_emb, text_emb, nll, batch["task_of_row"]))
            t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
            l_s = (sigmoid_loss(image_emb, text_emb, t, b)                         # Eq. 1
                   if "s" in args.objectives else 0 * image_emb.sum())   # backward() needs a graph
            l_c = captioning_loss(nll, task)                                       # Eq. 2
            l_g = grounding_loss(nll, task)                                        # Eq. 3
            l_d = dense_captioning_loss(nll, task)                                 # after Eq. 3
            loss = total_loss(l_s, l_c, l_g, l_d, config.lam)                      # L_t
            scaler.scale(loss / args.accumulate).backward()
            losses.append(mean_per_task(loss, l_s, l_c, l_g, l_d, task))
            paths += batch["paths"]
        average_gradients(trainable)
        lr = learning_rate(step, steps, config)
        if losses:                                             # else no image could be read
            norm = prepare_step(optimizers, scaler, trainable, lr, config.clip)
            if guard.may_step(step, losses, norm, scaler, paths):
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
        model.zero_grad()

        # log, checkpoint, stop
        done, stop = step + 1, max(from_all(guard.signal))
        at_checkpoint = writes and (done == steps or done % args.save_every == 0)
        values = log_values(losses, args.objectives)
        line = {"step": done, "lr": lr, **values,
                "samples_per_s": round(per_step / (time.time() - start), 4)}
        if at_checkpoint and split["val"]:
            line["val"] = validate(model, split["val"], args.objectives, batch_size)
        print(json.dumps(line), file=log, flush=True)
        shown |= {name: f"{value:.2f}" for name, value in values.items() if value is not None}
        if line.get("val"):
            shown["val"] = f"{line['val']['loss']:.2f}"
        bar.set_postfix(shown, refresh=False)
        if (at_checkpoint or stop and writes) and not guard.in_a_row:
            save_run(out, model, optimizers, scaler, done, settings)
        if stop and done < steps:
            bar.close()
            guard.leave(done, stop)

    guard.end(steps - first)
    if args.dry_run:
        loss = values.get("loss") or "none: no step is left, or no image could be read"
        say(f"dry run: every row of the data is well formed; loss of one step: {loss}; nothing "
            "written")
    if dist.is_initialized():                                  # the first process evaluates alone
        dist.destroy_process_group()
    if writes:
        finish_run(out, model, split, settings, began)


if __name__ == "__main__":
    metrics.run_command(main, ARGS, interrupted="interrupted; once the bar 'train' was shown, "
                        "the same command with --resume continues")
