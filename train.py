"""Train LoFi (Sec. 2.0.1 and 2.0.4), then evaluate retrieval (Table 1) and grounding (Table 4).

    python train.py                       # the paper in miniature: drawn X-rays, small towers, CPU
    python train.py --data PATH           # the paper's setting on a manifest (see data.py)
    python train.py --data PATH --init runs/NAME --objectives g        # fine-tune, Table 4
    torchrun --nproc_per_node=4 train.py --data PATH                   # 4 GPUs, or CPU processes

You will see a bar with the four losses, then R@K both ways beside chance, and the grounding row
beside the phrase prior. The run folder holds config.json, model.safetensors, tokenizer/, trainer.pt
(for --resume), log.jsonl (a line a step), curve.png, metrics.json and README.md, a model card.
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
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file (default: a "
        "phantom, drawn X-rays, made in runs/phantom_data)")
    add("--out", metavar="DIR", help="run folder to write (default: runs/NAME of the data); an "
        "older run there is renamed, anything else is refused")
    add("--resume", action="store_true",
        help="go on from the last checkpoint in --out, with the same flags")
    add("--init", metavar="RUN", help="start from the weights of a run folder, with its preset and "
        "tokenizers (Table 4: FT w/ Ours)")
    add("--skip-bad-images", action="store_true",
        help="count and report unreadable images instead of stopping at the first")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=["paper", "tiny"], help="paper: SigLIP 2 400M, Gemma 3 270M, LoRA; "
        "tiny: small towers from scratch (default: paper with --data, else tiny)")
    add("--encoder", metavar="ID", help="SigLIP-family model id or folder (preset)")
    add("--llm", metavar="ID", help="Gemma 3 text model id or folder (preset)")
    add("--random-init", action="store_true", help="the preset's sizes with random weights, "
        "nothing downloaded, to try memory and speed; a given --encoder or --llm is still loaded")

    add = parser.add_argument_group("objective and schedule").add_argument
    add("--objectives", default="scgd", metavar="LETTERS", help="s sigmoid (Eq. 1), c captioning "
        "(Eq. 2), g grounding (Eq. 3), d dense captioning; where an image has boxes, c is drawn "
        "twice as often as g or d (scg: 2/3 and 1/3); Fig. 4 drops gd, then cgd; Table 4 trains g "
        "alone (default: %(default)s)")
    add("--lambda", dest="lam", type=float, metavar="X",
        help="weight of the autoregressive loss (preset; paper: 5, Fig. 4e)")
    add("--epochs", type=int, metavar="N",
        help="passes over the training split (preset; paper: 10; tiny: by --steps)")
    add("--steps", type=int, metavar="N",
        help="optimizer steps; with --epochs, whichever ends first (preset)")
    add("--batch-size", type=int, metavar="B", help="images a step and process (preset; paper: 16; "
        "tiny: fewer on a set of less than 6 such batches)")
    add("--accumulate", type=int, default=1, metavar="N", help="batches a step: gradients are "
        "averaged; the sigmoid loss stays within a batch (default: 1)")
    add("--lr", type=float, metavar="X",
        help="learning rate after warm-up, then cosine to 0 (preset; paper: 3e-4)")
    add("--augment", type=float, metavar="X", help="strength of crop, brightness and contrast, "
        "boxes moved along; 0: none, 1: windows of 0.75 to 1.25 of the image (preset; paper: 0)")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of "
        "autocast; auto: bf16, fp16 on a GPU without bf16, fp32 on a CPU (default: auto)")
    add("--grad-checkpoint", action="store_true",
        help="recompute activations in the backward pass: less memory, about a third slower")
    add("--compile", action="store_true", help="torch.compile the layers of towers and LLM: "
        "minutes at the start, then faster steps")
    add("--workers", type=int, metavar="N", help="processes that decode images (default: one a "
        "core, at most 4; if the preset keeps decoded images in memory 1, without augmentation 0)")
    add("--save-every", type=int, default=500, metavar="N",
        help="steps between checkpoints, each with the losses on val (default: %(default)s)")
    add("--seed", type=int, default=0, help="of weights, order and draws (default: %(default)s)")
    add("--dry-run", action="store_true",
        help="check the data, build the model, run one step, write nothing")
    return parser.parse_args()


RANGES = {"epochs": (1, 1e6), "steps": (1, 1e9), "batch_size": (1, 1e6), "accumulate": (1, 1e4),
          "save_every": (1, 1e9), "lr": (1e-12, 1), "lam": (0, 1e6), "augment": (0, 1),
          "seed": (0, 2 ** 32 - 1), "workers": (0, 256)}


def check_args(args):
    """Reject invalid flags before anything is read. Raises InputError."""
    if not args.objectives or set(args.objectives) - set("scgd"):
        raise InputError(f"--objectives {args.objectives!r}: expected letters of s, c, g, d")
    for name, (low, high) in RANGES.items():
        value, flag = getattr(args, name), "lambda" if name == "lam" else name.replace("_", "-")
        if value is not None and not low <= value <= high:     # NaN compares as False
            raise InputError(f"--{flag} {value}: expected {low:g} to {high:g}")
    if args.init and (args.encoder or args.llm or args.random_init):
        raise InputError("--init brings its own encoder and LLM: leave out --encoder, --llm and "
                         "--random-init")


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import atexit
import dataclasses
import hashlib
import json
import os
import pickle
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
from transformers import logging as transformers_logging

import data
import icl_ground
import metrics
import retrieve
from losses import (TASKS, captioning_loss, dense_captioning_loss, grounding_loss, sigmoid_loss,
                    total_loss)
from model import PHANTOM, PRESETS, TINY, LoFi, find_device, join_processes, say

LOSSES = ("loss", "sigmoid", "captioning", "grounding", "dense_captioning")      # as in log.jsonl
MAX_SKIPPED = 5                         # steps in a row without a finite loss, then the run stops


# ---- schedule, precision, optimizer -------------------------------------------------------------

def learning_rate(step, steps, config):
    """Linear warm-up, then cosine annealing to 0 (Sec. 2.0.4); step counts from 0."""
    warmup = max(1, round(config.warmup * steps))
    return config.lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))


def choose_precision(name, device):
    """--precision -> the autocast type; float32 means none."""
    if name != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        return (torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False)
                else torch.float16)
    return torch.float32


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal, at the update size of AdamW.

    It is torch.optim.Muon(adjust_lr_fn="match_rms_adamw") with the matrices of one shape in one
    batched product, which takes the miniature's on a CPU half the time."""

    def __init__(self, params, lr, momentum=0.85):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(momentum, group["momentum"])      # Nesterov's
                    by_shape.setdefault(p.shape, []).append((p, update))
            for shape, same in by_shape.items():
                updates = orthogonalize(torch.stack([update for _, update in same]))
                for (p, _), update in zip(same, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * 0.2 * max(shape) ** 0.5)


def orthogonalize(x):
    """Matrices (n, rows, columns) -> about U V^T of their SVD U S V^T, by Newton-Schulz steps."""
    if x.shape[1] > x.shape[2]:
        return orthogonalize(x.mT).mT
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT                                                       # (n, rows, rows)
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def build_optimizers(model, config):
    """AdamW for all that trains; with muon_lr, Muon for the hidden matrices.

    Matrices decay, vectors and scalars do not; the text tower, t' and b have rates of their own.
    AdamW's eps is above the rounding of gradients that are zero (a key's bias has no effect)."""
    adamw, muon = {}, {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p.ndim == 2 and not re.search("embedding|embed_tokens|queries", name)
            groups = muon if config.muon_lr and hidden else adamw
            rate = (config.scale_lr if "logit_" in name else
                    config.text_lr if "text_model" in name else 1.0)
            groups.setdefault((p.ndim >= 2, rate), []).append(p)

    def param_groups(groups, share=1.0):                       # rate: times learning_rate()
        return [{"params": params, "rate": share * rate,
                 "weight_decay": config.weight_decay if decays else 0.0}
                for (decays, rate), params in groups.items()]
    optimizers = [torch.optim.AdamW(param_groups(adamw), lr=config.lr, betas=(0.9, 0.98), eps=1e-7,
                                    fused=True)]
    if muon:
        optimizers.append(Muon(param_groups(muon, config.muon_lr), lr=config.lr))
    return optimizers


# ---- batches ------------------------------------------------------------------------------------

def batches_per_epoch(n_rows, batch_size, objectives, world=1):
    """The last one may be short, but has an image for each process, and a negative for Eq. 1."""
    least = max(world, 2 if "s" in objectives and batch_size > 1 else 1)
    return n_rows // batch_size + (n_rows % batch_size >= least)


def batches(n_rows, batch_size, per_epoch, seed, first, last, rank=0, world=1):
    """Keys (epoch, i) of the batches first..last-1; each epoch is a new order of all rows.

    batch_size counts the images of all processes; each takes its own part of them."""
    order = None
    for number in range(first, last):
        epoch, place = divmod(number, per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        batch = order[place * batch_size:(place + 1) * batch_size]
        yield [(epoch, int(i)) for i in np.array_split(batch, world)[rank]]


def images_per_step(config, given, n_rows, objectives, world):
    """Images of a batch over all processes: config.batch_size each, or fewer on a small set.

    given: --batch-size. The sigmoid loss learns from negatives, so a batch shrinks to 8 images at
    most. Raises InputError if there are fewer rows than processes, or no negatives at all."""
    if n_rows < world or n_rows < 2 and "s" in objectives:
        raise InputError(f"{n_rows} training images for {world} processes; expected one each, and "
                         "two for the sigmoid loss, which learns from negatives")
    full, least = config.batch_size * world, min(8, n_rows) if "s" in objectives else 1
    most = n_rows if given else max(world, least, n_rows // config.min_batches)
    if most < full:
        say(f"steps of {most} images instead of {full}: the training split has {n_rows}"
            + ("" if given else f", and an epoch should have {config.min_batches} batches"))
    elif full == 1 and "s" in objectives:
        say("note: a step of 1 image has no negatives for the sigmoid loss")
    return min(full, most)


def ignore_signals(_):
    """In a worker: the main process handles signals; it still needs this step's batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def set_rate(optimizers, rate):
    """The learning rate of this step, times each parameter group's own share."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate


def to_device(batch, device):
    """Tensors of a batch, moved without waiting (images stay uint8 until they are there)."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
            for k, v in batch.items()}


# ---- several processes: every one computes the losses of the global batch -----------------------

class Gather(torch.autograd.Function):
    """Rows of all processes, in the order of their ranks.

    Each process computes the same loss from them, so the gradient of its own rows is complete. It
    is multiplied by the number of processes because average_gradients divides by it."""

    @staticmethod
    def forward(ctx, x):
        counts = [torch.zeros(1, dtype=torch.long, device=x.device)
                  for _ in range(dist.get_world_size())]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        counts, rank = [int(n) for n in counts], dist.get_rank()
        parts = [x.new_empty(max(counts), *x.shape[1:]) for _ in counts]
        padding = x.new_zeros(max(counts) - len(x), *x.shape[1:])
        dist.all_gather(parts, torch.cat([x, padding]))
        ctx.own = slice(sum(counts[:rank]), sum(counts[:rank + 1]))
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, gradient):
        return dist.get_world_size() * gradient[ctx.own]


def gather(x):
    """Rows (any number each) of all processes; None, without the sigmoid objective, stays None."""
    return x if x is None or not dist.is_initialized() else Gather.apply(x)


def over_processes(x, op="SUM"):
    """A tensor reduced over all processes: SUM, MIN or MAX."""
    if dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def average_gradients(parameters):
    """Average the gradients over the processes; None stays where no process has one.

    One call after the backward pass instead of DistributedDataParallel's hooks within it: only LoRA
    and new layers train, so there is little to overlap."""
    if not dist.is_initialized():
        return
    has = over_processes(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int,
                                      device=parameters[0].device), "MAX")
    used = [p for p, n in zip(parameters, has.tolist()) if n]
    if not used:
        return
    flat = over_processes(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                                     for p in used])) / dist.get_world_size()
    for p, gradient in zip(used, flat.split([p.numel() for p in used])):
        p.grad = gradient.view_as(p)


# ---- what can go wrong in a step ----------------------------------------------------------------

class Guard:
    """Signals, unreadable images, and losses that are not finite; asked once a step.

    It notes SIGTERM and Ctrl-C, to stop after the step; a second Ctrl-C interrupts at once."""

    def __init__(self, device, skip_bad_images):
        self.device, self.skip_bad_images = device, skip_bad_images
        self.signal, self.bad, self.skipped, self.in_a_row = 0, [], 0, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, _):
        # torchrun passes a signal on that the whole process group has received already
        if number == self.signal == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self.signal = number

    def stop(self):
        """The signal that one of the processes received, or 0."""
        return int(over_processes(torch.tensor(self.signal, device=self.device), "MAX"))

    def readable(self, batch):
        """Whether every process has an image in its batch. Raises InputError for the first image
        that cannot be read, unless such images are skipped."""
        self.bad += batch["bad"]
        if self.bad and not self.skip_bad_images:
            raise InputError(f"{self.bad[0]}; --skip-bad-images leaves such images out")
        return bool(over_processes(torch.tensor(len(batch["image"]), device=self.device), "MIN"))

    def may_step(self, step, parts, norm, scaler, paths):
        """Whether loss and gradient are finite (a gradient scaler takes care of its own overflow).

        Raises InputError after MAX_SKIPPED steps in a row that were not, or without an image."""
        if not parts:
            raise InputError(f"step {step + 1}: no image of the batch could be read; the last: "
                             f"{self.bad[-1] if self.bad else 'of another process'}")
        if torch.stack(parts)[:, 0].isfinite().all() and (scaler.is_enabled() or norm.isfinite()):
            self.in_a_row = 0
            return True
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row == MAX_SKIPPED:
            raise InputError(f"step {step + 1}: no finite loss or gradient in {MAX_SKIPPED} steps; "
                             "lower --lr, or look at this step's images: " + " ".join(paths))
        return False

    def end(self, steps):
        """Restore the signals and print what was left out. Raises InputError if the training
        diverged: its last steps were skipped, or more than half of them."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        every = [self.bad]
        if dist.is_initialized():
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, self.bad)
        if bad := sum(every, []):
            say(f"{len(bad)} times an image could not be read and was left out, "
                f"{len(set(bad))} different ones:\n" + "\n".join(sorted(set(bad))[:10]))
        if self.skipped:
            say(f"skipped {self.skipped} steps: their loss or gradient was not finite")
        if self.in_a_row or 2 * self.skipped > steps:
            raise InputError(f"{self.skipped} of {steps} steps were skipped, {self.in_a_row} of "
                             "them at the end: the training diverged, and its last weights are not "
                             "saved or scored; lower --lr and train again")


# ---- the run folder -----------------------------------------------------------------------------

RUN_FILES = {"config.json", "model.safetensors", "tokenizer", "trainer.pt", "log.jsonl",
             "curve.png", "metrics.json", "README.md", "embeddings"}


def run_folder(out, path, resume):
    """--out, or runs/NAME of the data -> the run folder, before anything is written.

    Raises InputError unless it is new, empty, or a run of ours that no process is writing."""
    path = Path(path).resolve()
    name = path.name if path.is_dir() else path.parent.name
    out = Path(out or f"runs/{name}")
    log = out / "log.jsonl"
    if out.is_file():
        raise InputError(f"{out}: is a file; --out takes a folder")
    if resume and not log.exists():
        raise InputError(f"{out}: no run to resume, it has no log.jsonl; start without --resume")
    files = {file.name for file in out.glob("*") if file.suffix != ".tmp"}     # drafts, if killed
    is_run = "log.jsonl" in files and files & {"config.json", "trainer.pt"}
    if files and not resume and (not is_run or files - RUN_FILES):
        raise InputError(f"{out}: holds files that are not of a run, such as "
                         f"{min(files - RUN_FILES or files)}; name a new folder with --out")
    if files and not resume and out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"{out}: is the working folder, which is not renamed; name a new folder "
                         "with --out")
    if log.exists():
        metrics.lock(log).close()                              # InputError if a process writes it
    return out


def open_log(out, resume, step, config):
    """The locked log.jsonl of the run folder, of a resumed run cut to the lines up to its
    checkpoint. An older run there becomes OUT.1, OUT.2, ..."""
    if resume:
        log = metrics.lock(out / "log.jsonl")
        for draft in out.glob(".*.tmp"):                       # of a run that was killed
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
        lines = (out / "log.jsonl").read_bytes().splitlines(keepends=True)[:step]
        log.truncate(sum(map(len, lines)))
        return log
    if out.exists() and any(out.iterdir()):
        older = next(p for n in count(1) if not (p := out.with_name(f"{out.name}.{n}")).exists())
        out.rename(older)
        say(f"renamed the older run {out} to {older}")
    out.mkdir(parents=True, exist_ok=True)
    log = metrics.lock(out / "log.jsonl")
    metrics.write_json(out / "config.json", dataclasses.asdict(config))
    return log


def save_run(out, model, optimizers, scaler, step, settings):
    """The model's files, then trainer.pt: all that --resume needs, written atomically.

    It holds the weights that train, optimizers, scaler, RNG, step and settings. Raises
    InputError."""
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
        kept = "its last good checkpoint is kept" if (out / "trainer.pt").exists() else "none yet"
        raise InputError(f"step {step} cannot be saved ({error}); {kept}; then add --resume")


def load_trainer(path, model, optimizers, scaler, settings):
    """Restore what save_run wrote -> the step to go on from. Raises InputError."""
    try:
        with zipfile.ZipFile(path) as archive:                 # torch.load checks no checksum
            if broken := archive.testzip():
                raise ValueError(f"checksum mismatch in {broken}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        differ = {k: v for k, v in state["settings"].items()
                  if k != "data" and v != settings.get(k)}
        if differ:
            raise InputError(f"{path}: was trained with {differ}, now "
                             f"{({k: settings.get(k) for k in differ})}; resume with the same "
                             "flags, data and number of processes, or train anew in another --out")
        model.load_state_dict(state["weights"], strict=False)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["rng"])
        return state["step"]
    except InputError:
        raise
    except (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
            NotImplementedError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: damaged, or not a checkpoint of this train.py "
                         f"({first_line(error)}); train anew in another --out")


# ---- the losses while it trains -----------------------------------------------------------------

def mean_of_task(losses, task):
    """L_c, L_g, L_d, shares of one mean over the rows -> each as a mean over its own rows, for the
    log; NaN where no row drew the task."""
    share = [(task == tau).float().mean() for tau in range(len(TASKS))]
    return [loss / part for loss, part in zip(losses, share)]


def log_values(losses, objectives):
    """A tensor in the order of LOSSES -> {name: float, or None if it was not drawn}."""
    values = {name: round(v, 6) if math.isfinite(v) else None
              for name, v in zip(LOSSES, losses.tolist())}
    return values if "s" in objectives else {**values, "sigmoid": None}


@torch.no_grad()
def validate(model, rows, objectives, batch_size, most=512):
    """The losses on the val split in float32, of at most 512 images spread over it, with the same
    draws each time; None if no image of it could be read."""
    dataset, collate = build_dataset(model, rows[::math.ceil(len(rows) / most)], objectives, 0, 0)
    sigmoid, nlls, tasks = [], [], []
    for start in range(0, len(dataset), batch_size):
        keys = [(0, i) for i in range(start, min(start + batch_size, len(dataset)))]
        batch = to_device(collate([dataset[key] for key in keys]), model.device)
        if not len(batch["image"]):                            # none could be read
            continue
        image_emb, text_emb, nll = model(batch)
        t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
        sigmoid.append(sigmoid_loss(image_emb, text_emb, t, b) if "s" in objectives else 0 * t)
        nlls.append(nll)
        tasks.append(batch["task_of_row"])
    if not nlls:
        return None
    nll, task, l_s = torch.cat(nlls), torch.cat(tasks), torch.stack(sigmoid).mean()
    l_c, l_g, l_d = (loss(nll, task) for loss in
                     (captioning_loss, grounding_loss, dense_captioning_loss))
    loss = total_loss(l_s, l_c, l_g, l_d, model.config.lam)
    return log_values(torch.stack([loss, l_s, *mean_of_task((l_c, l_g, l_d), task)]), objectives)


def draw_curves(log, w=420, h=300):
    """log.jsonl -> a picture of the four losses by step: train as a line, val as dots."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    sheet = Image.new("RGB", (2 * w, 2 * h), "white")
    pen, font, n_bins = ImageDraw.Draw(sheet), ImageFont.load_default(13), 100
    for panel, name in enumerate(LOSSES[1:]):
        left, top = panel % 2 * w + 50, panel // 2 * h + 34
        train = [(line["step"], line[name]) for line in lines if line[name] is not None]
        val = [(line["step"], line["val"][name]) for line in lines
               if "val" in line and line["val"][name] is not None]
        train = [np.mean(some, 0) for some in np.array_split(train, min(len(train), n_bins) or 1)
                 if len(some)]                                 # steps in bins, their means
        high = max([value for _, value in [*train, *val]], default=1) or 1
        points = [[(left + (w - 70) * step / lines[-1]["step"], top + (h - 70) * (1 - value / high))
                   for step, value in some] for some in (train, val)]
        pen.rectangle((left, top, left + w - 70, top + h - 70), outline="#cccccc")
        pen.text((left, top - 22), f"{name.replace('_', ' ')}: train (line), val (dots)", "black",
                 font)
        pen.text((left - 6, top), f"{high:.1f}", "black", font, anchor="rm")
        pen.text((left - 6, top + h - 70), "0", "black", font, anchor="rm")
        pen.text((left + w - 70, top + h - 60), f"step {lines[-1]['step']:,}", "black", font,
                 anchor="ra")
        pen.line(points[0], "#1f77b4", 2)
        for x, y in points[1]:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), "#d62728")
    return sheet


# ---- evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, rows, training_rows, batch_size=64):
    """Table 1 and a row of Table 4, printed -> (the parts of metrics.json, R@K by chance).

    Retrieval: five-sentence sub-reports, one image a study (Sec. 3.1). Grounding: by LoFi's own
    decoder, each boxed phrase of each image; beside it the phrase prior of the training rows."""
    results, chance, paths = {"n_images": len(rows)}, {}, [row["path"] for row in rows]
    table = data.sub_report_table(rows)
    if table[1]:
        image_emb = torch.cat([model.encode_image(paths[i:i + batch_size])
                               for i in range(0, len(paths), batch_size)]).cpu()
        results |= retrieve.table_1(model, table, image_emb)
        print(f"\nretrieval over {len(table[0])} test images and {len(table[1])} sub-reports, %")
        chance = retrieve.chance(table)
        retrieve.print_table_1({"LoFi": results}, chance)
    if predictions := icl_ground.lofi_predictions(model, rows):
        results["grounding"] = metrics.grounding_metrics(predictions)
        table = {"LoFi": {"grounding": results["grounding"]}}
        if icl_ground.with_boxes(training_rows):
            prior = icl_ground.prior_answers(metrics.phrase_prior(training_rows),
                                             icl_ground.with_boxes(rows))
            results["prior"] = metrics.grounding_metrics(prior)
            table["phrase prior"] = {"grounding": results["prior"]}
        print(f"\ngrounding of {len(predictions)} test phrases, %")
        print(metrics.grounding_table(table))
    return results, chance


MODEL_CARD = """\
# {name}

LoFi (arXiv 2603.19451): location-aware fine-grained representation learning for chest X-rays.
A research model, not a medical device: not for clinical use.

* data: `{data}`, {n_rows:,} training images
* training: {steps:,} steps of {batch_size} images, objectives `{objectives}`
* command: `{command}`
* code: commit {commit}

Scores on {n_images} images of the test split, in percent:

{scores}

    from model import LoFi
    model = LoFi.from_pretrained("{out}")
    boxes = model.ground("x.png", ["The heart is enlarged."])
    report = model.report("x.png")

LoFi is never taught that a finding is not there: it answers almost any phrase with boxes.
"""


def model_card(out, settings, results, chance, n_rows):
    """The README.md of a run folder: what it is, how it was made, its scores beside baselines."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, text=True,
                         capture_output=True) if shutil.which("git") else None
    scores = [("", "LoFi", "baseline")]
    for part, names, baseline in (("i2t", ("R@1", "R@10"), chance.get("i2t")),
                                  ("t2i", ("R@1", "R@10"), chance.get("t2i")),
                                  ("grounding", metrics.PERCENT, results.get("prior"))):
        for name in names if part in results else ():
            scores.append((f"{part} {name}", f"{100 * results[part][name]:.2f}",
                           f"{100 * baseline[name]:.2f}" if baseline else "-"))
    return MODEL_CARD.format(
        name=out.name, out=out, n_rows=n_rows, n_images=results.get("n_images", 0),
        commit=git.stdout.strip() if git and git.returncode == 0 else "unknown",
        command=shlex.join(["python", *sys.argv]), data=settings["data"], steps=settings["steps"],
        batch_size=settings["accumulate"] * settings["batch-size"],
        objectives=settings["objectives"],
        scores="\n".join("    " + line for line in metrics.format_table(scores).splitlines()))


def finish_run(out, model, split, settings, began, random):
    """Evaluate on the test split, write metrics.json and README.md, print the next commands."""
    results, chance, test = {}, {}, split["test"]
    if random:
        print("not evaluated: with --random-init the frozen towers are random")
    elif not test:
        print("not evaluated: the data have no test split")
    else:
        results, chance = evaluate(model.eval(), test, split["train"])
    metrics.write_json(out / "metrics.json",
                       {**results, "seconds": round(time.time() - began, 1)})
    card = model_card(out, settings, results, chance, len(split["train"]))
    metrics.write_file(out / "README.md", lambda draft: draft.write_text(card))
    print(f"\n{time.time() - began:.0f} s in all. Next:")
    boxed = [(row["path"], region["phrase"]) for row in test for region in row["regions"]
             if region["boxes"]]
    if boxed:
        path, phrase = map(shlex.quote, boxed[0])
        print(f"  python retrieve.py --checkpoint {out} --text {phrase}")
        print(f"  python icl_ground.py --checkpoint {out} --lvlm lofi --image {path} "
              f"--phrase {phrase}")
    print(f"  python model.py export {out} {out}_siglip")


# ---- data and model -----------------------------------------------------------------------------

def phantom_folder(dry_run, rank):
    """The folder of the phantom, drawn on first use; a dry run draws a small one and removes it."""
    if dry_run:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return data.make_phantom(folder / "phantom", {"train": 64, "test": 8})
    folder = Path("runs/phantom_data")
    if not folder.exists() and rank == 0:
        data.make_phantom(folder)
    if dist.is_initialized():
        dist.barrier()                                         # the others wait
    return folder


def read_splits(path):
    """{split: rows} of a manifest; prints what is odd about it. Raises InputError."""
    rows = data.read_manifest(path)
    for note in data.manifest_notes(rows):
        say(f"note: {note}")
    split = {name: [row for row in rows if row["split"] == name] for name in data.SPLITS}
    if not split["train"]:
        raise InputError(f"{path}: no rows with split 'train'")
    return split


def usable_rows(rows, path, objectives):
    """Training rows that the objectives can use. Raises InputError if there is none."""
    usable = [row for row in rows
              if data.possible_tasks(row, objectives)
              or "s" in objectives and (row["report"] or row["regions"])]
    if len(usable) < len(rows):
        say(f"left out {len(rows) - len(usable)} of {len(rows)} training images: no text or box "
            f"for --objectives {objectives}")
    if not usable:
        raise InputError(f"{path}: no training image has what --objectives {objectives} needs")
    return usable


def find_config(args, start):
    """The preset's config, or that of the run to start from, changed by the flags.

    Raises InputError."""
    names = ("lam", "epochs", "steps", "batch_size", "lr", "augment")
    changed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.steps and not args.epochs:
        changed["epochs"] = None
    elif args.epochs and not args.steps:
        changed["steps"] = None
    if start:
        if args.preset not in (None, start.preset):
            raise InputError(f"the run to start from has preset {start.preset}, not {args.preset}")
        return dataclasses.replace(start, **changed)
    config = PRESETS[args.preset or ("paper" if args.data else "tiny")]
    config = PHANTOM if config is TINY and not args.data else config
    sources = {"encoder": args.encoder, "llm": args.llm}
    sources = {name: source for name, source in sources.items() if source or args.random_init}
    return dataclasses.replace(config, **sources, **changed)


def build_dataset(model, rows, objectives, seed, strength):
    """-> (dataset, collate) of the model's sizes; strength: of augmentation. An unreadable image
    becomes a message in batch["bad"]."""
    config = model.config
    dataset = data.ChestXrays(rows, model.image_size, objectives, config.n_regions, strength,
                              config.cache, skip_bad=True, seed=seed)
    return dataset, data.Collate(model.text_tokenizer if "s" in objectives else None,
                                 model.text_length, model.llm_tokenizer, config.max_target)


def build_model(args, source, rows, world):
    """The model to train, new or of the run to start from -> (model, images of a batch)."""
    model = LoFi.from_pretrained(source) if source else None
    config = find_config(args, model and model.config)
    batch_size = images_per_step(config, args.batch_size, len(rows), args.objectives, world)
    if model:
        model.config = config
    else:
        model = LoFi.build(config, data.tokenizer_texts(rows), batch_size)
    layers = (*model.siglip.vision_model.encoder.layers, *model.siglip.text_model.encoder.layers,
              *model.llm.get_decoder().layers)
    for layer in layers if args.compile else ():
        layer.compile()
    for part in (model.siglip, model.llm) if args.grad_checkpoint else ():
        part.gradient_checkpointing_enable({"use_reentrant": False})
    return model, batch_size


def load_batches(model, rows, objectives, seed, keys, workers):
    """An iterator over the batches of the keys, decoded by worker processes."""
    config = model.config
    dataset, collate = build_dataset(model, rows, objectives, seed, config.augment)
    if workers is None:
        # a worker beside small towers takes a core from them: only augmentation is worth one
        workers = int(config.augment > 0) if config.cache else min(4, os.cpu_count())
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers,
        worker_init_fn=ignore_signals, pin_memory=model.device.type == "cuda"))


# ---- the run ------------------------------------------------------------------------------------

def main(args=None):
    began, args = time.time(), args or parse_args()
    check_args(args)
    transformers_logging.set_verbosity_error()
    device = find_device(args.device)
    rank, world = join_processes(device)
    torch.manual_seed(args.seed)
    precision = choose_precision(args.precision, device)

    # data
    path = args.data or phantom_folder(args.dry_run, rank)
    split = read_splits(path)
    rows = usable_rows(split["train"], path, args.objectives)
    out = run_folder(args.out or ("" if args.data else "runs/phantom"), path, args.resume)
    has_checkpoint = args.resume and (out / "trainer.pt").exists()

    # model
    model, batch_size = build_model(args, out if has_checkpoint else args.init, rows, world)
    model.to(device)
    config, trainable = model.config, [p for p in model.parameters() if p.requires_grad]
    say(f"trains {sum(p.numel() for p in trainable):,} of "
        f"{sum(p.numel() for p in model.parameters()):,} parameters"
        + (", LoRA and new layers" if config.lora_rank else ""))

    # optimizer, schedule, checkpoint
    per_epoch = batches_per_epoch(len(rows), batch_size, args.objectives, world)
    limits = [config.steps, config.epochs and math.ceil(config.epochs * per_epoch
                                                        / args.accumulate)]
    steps = min(limit for limit in limits if limit)
    optimizers = build_optimizers(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    manifest = hashlib.sha256(data.manifest_path(path).read_bytes()).hexdigest()
    settings = {"data": str(Path(path).resolve()), "manifest": manifest,
                "objectives": args.objectives, "lambda": config.lam, "lr": config.lr,
                "steps": steps, "batch-size": batch_size, "batches an epoch": per_epoch,
                "accumulate": args.accumulate, "seed": args.seed, "augment": config.augment}
    first = (load_trainer(out / "trainer.pt", model, optimizers, scaler, settings)
             if has_checkpoint else 0)

    # batches
    keys = batches(len(rows), batch_size, per_epoch, args.seed, first * args.accumulate,
                   steps * args.accumulate, rank, world)
    loader = load_batches(model, rows, args.objectives, args.seed, keys, args.workers)
    writes, random = rank == 0 and not args.dry_run, bool(args.random_init and config.lora_rank)
    say(f"{len(rows):,} training images, {steps:,} steps of {args.accumulate * batch_size}, "
        f"objectives {args.objectives}, on {f'{world} x ' if world > 1 else ''}{device.type} in "
        f"{str(precision).removeprefix('torch.')}")
    log = open_log(out, args.resume, first, config) if writes else open(os.devnull, "w")

    # the loop
    model.train()
    guard, shown = Guard(device, args.skip_bad_images), {}
    bar = tqdm(range(first, first + 1 if args.dry_run else steps), "train", initial=first,
               total=steps, unit="step", disable=rank > 0)
    for step in bar:
        start, parts, paths = time.time(), [], []
        for _ in range(args.accumulate):
            batch = to_device(next(loader), device)
            if not guard.readable(batch):
                continue
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                image_emb, text_emb, nll = model(batch)        # nll: -log p of each row's target
            # with several processes: the rows of all of them
            image_emb, text_emb, nll, task = map(
                gather, (image_emb, text_emb, nll, batch["task_of_row"]))
            t, b = model.siglip.logit_scale.exp(), model.siglip.logit_bias
            l_s = (sigmoid_loss(image_emb, text_emb, t, b)                         # Eq. 1
                   if "s" in args.objectives else 0 * image_emb.sum())
            l_c = captioning_loss(nll, task)                                       # Eq. 2
            l_g = grounding_loss(nll, task)                                        # Eq. 3
            l_d = dense_captioning_loss(nll, task)                                 # after Eq. 3
            loss = total_loss(l_s, l_c, l_g, l_d, config.lam)                      # L_t
            scaler.scale(loss / args.accumulate).backward()
            parts.append(torch.stack([loss, l_s, *mean_of_task((l_c, l_g, l_d), task)]).detach())
            paths += batch["paths"]
        average_gradients(trainable)
        set_rate(optimizers, learning_rate(step, steps, config))
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.clip)
        if guard.may_step(step, parts, norm, scaler, paths):
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad()

        # log, checkpoint, stop
        done, stop = step + 1, guard.stop()
        values = log_values(torch.stack(parts).nanmean(0), args.objectives)
        rate = args.accumulate * batch_size / (time.time() - start)
        line = {"step": done, "lr": learning_rate(step, steps, config), **values,
                "samples_per_s": round(rate, 4)}
        at_checkpoint = done == steps or done % args.save_every == 0
        if at_checkpoint and writes and split["val"] and not random:
            if val := validate(model, split["val"], args.objectives, batch_size):
                line["val"] = val
        log.write(json.dumps(line) + "\n")
        log.flush()
        shown.update({name: f"{v:.2f}" for name, v in values.items() if v is not None})
        shown.update({"val": f"{line['val']['loss']:.2f}"} if "val" in line else {})
        shown.update({"skipped": guard.skipped} if guard.skipped else {})
        bar.set_postfix(shown, refresh=False)
        if writes and (at_checkpoint or stop) and not guard.in_a_row:
            save_run(out, model, optimizers, scaler, done, settings)
        if stop and done < steps:
            bar.close()
            if rank == 0:
                print(f"stopped{'' if guard.in_a_row else ' and saved'} after step {done}; go on "
                      "with the same command and --resume", file=sys.stderr)
            sys.exit(128 + stop)

    guard.end(steps - first)
    if args.dry_run:
        say(f"dry run: one step of {args.accumulate * batch_size} images, loss "
            f"{values['loss']:.3f}, every row of the data is well formed; nothing written")
    elif rank == 0:
        log.close()
        print(f"saved {out}")
        finish_run(out, model, split, settings, began, random)


if __name__ == "__main__":
    try:
        main(ARGS)
    except (InputError, OSError) as error:
        sys.exit(f"train.py: {first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
    except RuntimeError as error:       # CPU out-of-memory raises a plain RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        sys.exit("train.py: out of memory; lower --batch-size (and raise --accumulate), "
                 "or add --grad-checkpoint")
