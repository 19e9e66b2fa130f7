"""Train LoFi (Sec. 2.0.1 and 2.0.4), then evaluate retrieval (Table 1) and grounding (Table 4).

    python train.py                       # the paper in miniature: phantom films, small towers, CPU
    python train.py --data PATH           # the paper's setting on a manifest (see data.py)
    python train.py --data PATH --init runs/NAME --objectives g        # fine-tune, Table 4
    torchrun --nproc_per_node=4 train.py --data PATH                   # 4 GPUs, or CPU processes

You will see a bar with the four losses, then R@K both ways and the grounding row beside the phrase
prior. The run folder holds config.json, model.safetensors, tokenizer/, trainer.pt, log.jsonl (a
line a step) and metrics.json.
"""

import argparse
import atexit
import dataclasses
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import logging as transformers_logging

import data
import losses
import metrics
from model import (ANSWER_TOKENS, PHANTOM, PRESETS, TINY, LoFi, ModelError, SafetensorError,
                   find_device)

transformers_logging.set_verbosity_error()

LOSSES = ("loss", "sigmoid", "captioning", "grounding", "dense_captioning")      # as in log.jsonl
TRAINER_KEYS = {"step", "settings", "weights", "optimizer", "scaler", "rng"}       # of trainer.pt
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError,
           pickle.UnpicklingError)      # what torch.load raises on bytes that it did not write
MAX_SKIPPED = 5                         # steps in a row without a finite loss, then the run stops


# ---- arguments ----------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults marked 'preset' are in model.py: PAPER (with --data), TINY, and PHANTOM "
        "(without --data).")
    group = parser.add_argument_group("data and files")
    group.add_argument("--data", metavar="PATH", help="folder with manifest.jsonl, or that file "
                       "(default: phantom films, drawn into runs/phantom_data)")
    group.add_argument("--out", metavar="DIR", help="run folder to write (default: runs/NAME of "
                       "the data); an older run there is moved aside, never overwritten")
    group.add_argument("--resume", action="store_true",
                       help="go on from the last checkpoint in --out, with the same flags")
    group.add_argument("--init", metavar="RUN", help="start from the weights of a run folder "
                       "(Table 4: FT w/ Ours), with its preset and tokenizers")
    group.add_argument("--skip-bad-images", action="store_true", help="count and report unreadable "
                       "images instead of stopping at the first")

    group = parser.add_argument_group("model")
    group.add_argument("--preset", choices=PRESETS, help="paper: SigLIP 2 400M, Gemma 3 270M, "
                       "LoRA; tiny: small towers from scratch (default: paper with --data; "
                       "without, tiny as PHANTOM changes it)")
    group.add_argument("--encoder", metavar="ID", help="SigLIP-family model id or folder (preset)")
    group.add_argument("--llm", metavar="ID", help="Gemma 3 text model id or folder (preset)")
    group.add_argument("--random-init", action="store_true", help="the preset's sizes with random "
                       "weights, nothing downloaded: to try memory and speed; --encoder or --llm, "
                       "if given, is still loaded")

    group = parser.add_argument_group("objective and schedule")
    group.add_argument("--objectives", default="scgd", metavar="LETTERS", help="s sigmoid (Eq. 1), "
                       "c captioning (Eq. 2), g grounding (Eq. 3), d dense captioning; Fig. 4 "
                       "drops gd, then cgd; Table 4 fine-tunes with g (default: %(default)s)")
    group.add_argument("--lambda", dest="lam", type=float, metavar="X", help="weight of the "
                       "autoregressive loss (preset; paper: 5, Fig. 4e)")
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training split "
                       "(preset; paper: 10; tiny: by --steps)")
    group.add_argument("--steps", type=int, metavar="N",
                       help="optimizer steps; with --epochs, whichever ends first (preset)")
    group.add_argument("--batch-size", type=int, metavar="B",
                       help="images a step and process (preset; paper: 16; tiny: 48, phantom: 32, "
                       "both fewer on a set with less than 6 batches of that)")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="batches a step: "
                       "gradients are averaged over N batches of B images; the sigmoid loss stays "
                       "within a batch (default: 1)")
    group.add_argument("--lr", type=float, metavar="X", help="learning rate after warm-up, then "
                       "cosine to 0 (preset; paper: 3e-4)")
    group.add_argument("--augment", type=float, metavar="X", help="strength of crop, brightness "
                       "and contrast, boxes moved along; 0: none, 1: windows of 0.75 to 1.25 of "
                       "the film; not in the paper (preset: tiny 0.65, paper and phantom 0)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    group.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
                       help="autocast type; auto: bf16, or fp16 with a gradient scaler on a GPU "
                       "without bf16, or fp32 on a CPU (default: auto)")
    group.add_argument("--grad-checkpoint", action="store_true", help="recompute activations in "
                       "the backward pass: less memory, about a third slower")
    group.add_argument("--compile", action="store_true", help="compile the layers of towers and "
                       "LLM by torch.compile: minutes at the start, then faster steps")
    group.add_argument("--workers", type=int, metavar="N", help="processes that decode images "
                       "(default: 1 if the preset keeps decoded films in memory, else one a core, "
                       "at most 4)")
    group.add_argument("--save-every", type=int, default=500, metavar="N",
                       help="steps between checkpoints (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0,
                       help="of weights, order and draws (default: %(default)s)")
    group.add_argument("--dry-run", action="store_true", help="check the data, build the model, "
                       "run one batch forward and backward, write nothing")
    return parser.parse_args()


# ---- helpers of the loop ------------------------------------------------------------------------

class TrainError(ValueError):
    """The run cannot start or go on; the message is one line that says what to do."""


def catch_signals(last=False):
    """Note SIGTERM and Ctrl-C instead of dying -> the list that they are put into; a second one
    interrupts at once. last: as they were."""
    asked = []

    def note(number, _):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL),
                          (signal.SIGINT, signal.default_int_handler)):
        signal.signal(number, usual if last else note)
    return asked


def leave_signals(_):
    """In a worker process: Ctrl-C is for the main process, which still wants this step's batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check_args(args):
    """Flags that cannot be, before anything is read. Raises TrainError."""
    if not args.objectives or set(args.objectives) - set("scgd"):
        raise TrainError(f"--objectives {args.objectives!r}: wanted letters of s, c, g, d")
    for name in ("epochs", "steps", "batch_size", "accumulate", "save_every", "lr"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise TrainError(f"--{name.replace('_', '-')} {getattr(args, name)}: "
                             "wanted more than 0")
    if args.init and (args.encoder or args.llm or args.random_init):
        raise TrainError("--init brings its own encoder and LLM: leave out --encoder, --llm and "
                         "--random-init")


def batches_per_epoch(n_rows, batch_size, world=1):
    """The last one may be short, but has an image for each process."""
    return n_rows // batch_size + (n_rows % batch_size >= world)


def batches(n_rows, batch_size, seed, first, last, rank=0, world=1):
    """Keys (epoch, i) of the batches first..last-1; each epoch is a new order of all rows.

    batch_size counts the images of all processes; each takes its own part of them."""
    per_epoch, order = batches_per_epoch(n_rows, batch_size, world), None
    for number in range(first, last):
        epoch, place = divmod(number, per_epoch)
        if order is None or place == 0:
            order = np.random.default_rng([seed, epoch]).permutation(n_rows)
        batch = order[place * batch_size:(place + 1) * batch_size]
        yield [(epoch, int(i)) for i in np.array_split(batch, world)[rank]]


def images_per_step(args, config, n_rows, world=1):
    """Of all processes, before --accumulate: config.batch_size each, or what the rows allow."""
    most = n_rows if args.batch_size else max(world, n_rows // config.min_batches)
    return min(config.batch_size * world, most)


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


def build_optimizer(model, config):
    """AdamW; matrices decay, vectors and scalars do not; text tower, t' and b may have rates of
    their own. eps is above the rounding of gradients that are zero (a key's bias has no effect)."""
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = (config.scale_lr if "logit_" in name else
                    config.text_lr if "text_model" in name else 1.0)
            groups.setdefault((p.ndim >= 2, rate), []).append(p)
    return torch.optim.AdamW(
        [{"params": params, "weight_decay": config.weight_decay if decays else 0.0, "rate": rate}
         for (decays, rate), params in groups.items()], lr=config.lr, betas=(0.9, 0.98), eps=1e-7,
        fused=True)


def join_processes(device):
    """-> (rank, number of processes) that torchrun started; (0, 1) without it."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")                     # one process prints and writes
    return dist.get_rank(), dist.get_world_size()


def over_processes(x, op="SUM"):
    """A tensor reduced over all processes: SUM, MIN or MAX."""
    if dist.is_initialized():
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
    return x


def add_gradients(parameters):
    """Sum the gradients over the processes, as the shares of the loss want; None stays where no
    process has one.

    One call after the backward pass, not DistributedDataParallel's hooks within it: a process may
    have drawn no LLM row, and the texts' gradient is gathered within too, so the order of calls
    could differ between processes. Only LoRA and new layers train: there is little to overlap."""
    if not dist.is_initialized():
        return
    has = over_processes(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int,
                                      device=parameters[0].device), "MAX")
    used = [p for p, n in zip(parameters, has.tolist()) if n]
    flat = over_processes(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                                     for p in used]))
    for p, gradient in zip(used, flat.split([p.numel() for p in used])):
        p.grad = gradient.view_as(p)


def to_device(batch, device):
    """Tensors of a batch, moved without waiting (images stay uint8 until they are there)."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
            for k, v in batch.items()}


def step_losses(model, batch, objectives, lam, precision):
    """One forward pass -> L_t and [L_t, L_s, L_c, L_g, L_d] in the order of LOSSES; NaN: not
    drawn. With several processes: one's own share of L_t, which adds up to that of all, and the
    losses over the images of all."""
    device = batch["image"].device
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        image_emb, text_emb, hidden = model(batch)
        nll = torch.zeros(0, device=device)
        if hidden is not None:
            nll = losses.autoregressive_nll(hidden, model.llm.get_output_embeddings(),
                                            batch["ids"], batch["is_target"])
    l_s = 0 * image_emb.float().sum()                          # a batch may ask nothing at all
    if text_emb is not None:
        text_emb, first = losses.gather(text_emb)
        l_s = losses.sigmoid_loss(image_emb, text_emb, model.siglip.logit_scale.exp(),
                                  model.siglip.logit_bias, first)
    every_nll, _ = losses.gather(nll.detach())
    every_task, _ = losses.gather(batch["task_of_row"])
    l_c = losses.captioning_loss(every_nll, every_task)
    l_g = losses.grounding_loss(every_nll, every_task)
    l_d = losses.dense_captioning_loss(every_nll, every_task)
    loss = losses.total_loss(l_s, nll, lam, len(every_nll))
    l_t, l_s = over_processes(torch.stack([loss, l_s]).detach())
    return loss, torch.stack([l_t, l_s if "s" in objectives else l_s * torch.nan, l_c, l_g, l_d])


def save_run(out, model, optimizer, scaler, step, settings):
    """The model's files, then trainer.pt: all that --resume needs, whole or the one before.

    It holds the weights that train, optimizer, scaler, RNG, step and settings. Raises TrainError if
    the disk is full."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"step": step, "settings": settings, "weights": weights,
             "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
             "rng": torch.get_rng_state()}
    try:
        model.save_pretrained(out)
        data.write_whole(out / "trainer.pt", lambda draft: torch.save(state, draft))
    except (OSError, data.DataError, SafetensorError) as error:
        kept = "its last good checkpoint is kept" if (out / "trainer.pt").exists() else "none yet"
        raise TrainError(f"{out}: step {step} cannot be saved ({str(error).splitlines()[0]}); "
                         f"{kept}; make room on the disk, then add --resume")


def load_trainer(path, model, optimizer, scaler, settings):
    """Restore what save_run wrote -> the step to go on from. Raises TrainError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrainError(f"{path}: damaged checkpoint ({reason}); start anew with another --out")
    if not isinstance(state, dict) or set(state) != TRAINER_KEYS \
            or set(state["settings"]) != set(settings):
        raise TrainError(f"{path}: not a checkpoint of this train.py; start anew with another "
                         "--out")
    other = {k: v for k, v in state["settings"].items() if v != settings[k]}
    if other:
        raise TrainError(f"{path}: was trained with {other}, "
                         f"now {({k: settings[k] for k in other})}; "
                         "resume with the same flags, or start anew with another --out")
    model.load_state_dict(state["weights"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(state["rng"])
    return state["step"]


# ---- evaluation ---------------------------------------------------------------------------------

def best_first(queries, pool, k):
    """Unit vectors (Q, D) and (N, D) -> (Q, min(k, N)) indices of the best, ties by lower index.

    On a grid of 2^-26 float64 holds every product exactly, on any machine, as in retrieve.py."""
    queries, pool = ((x * 2.0 ** 26).round().double() for x in (queries, pool))
    order = (queries @ pool.T).sort(dim=1, descending=True, stable=True).indices
    return order[:, :k].cpu().numpy()


@torch.inference_mode()
def evaluate(model, rows, prior, batch_size=64):
    """Table 1 and a row of Table 4 on manifest rows -> the parts of metrics.json.

    Retrieval: five-sentence sub-reports, one image a study (Sec. 3.1). Grounding: by LoFi's own
    decoder, each boxed phrase of each image; beside it the phrase prior."""
    image_emb, predictions = [], []
    for start in tqdm(range(0, len(rows), batch_size), "evaluate", unit="batch"):
        chunk = rows[start:start + batch_size]
        emb, patches = model.encode_image([row["path"] for row in chunk], with_patches=True)
        image_emb.append(emb)
        queries = [(i, region) for i, row in enumerate(chunk)
                   for region in row["regions"] if region["boxes"]]
        visual = model.visual_tokens(patches)
        for first in range(0, len(queries), 2 * batch_size):
            some = queries[first:first + 2 * batch_size]
            prompts = [data.GROUNDING_PROMPT.format(phrase=region["phrase"]) for _, region in some]
            answers = model.generate(visual[[i for i, _ in some]], prompts, ANSWER_TOKENS)
            for (i, region), answer in zip(some, answers):
                boxes, malformed = data.text_to_boxes(answer)
                predictions.append({"image": chunk[i]["image"], "phrase": region["phrase"],
                                    "boxes": region["boxes"], "pred": boxes, "raw": answer,
                                    "malformed": malformed})
    return {**retrieval(model, rows, torch.cat(image_emb)), **grounding(predictions, prior)}


def retrieval(model, rows, image_emb, batch_size=256):
    """Table 1: R@K image-to-text and text-to-image -> {"i2t": .., "t2i": ..}."""
    images, texts, owner = data.sub_report_table(rows)
    if not texts:
        return {}
    place = {text: i for i, text in enumerate(dict.fromkeys(texts))}    # equal texts tie exactly
    once = torch.cat([model.encode_text(list(place)[i:i + batch_size])
                      for i in range(0, len(place), batch_size)])
    films, texts = image_emb[images], once[[place[text] for text in texts]]
    every = np.arange(len(images))
    return {"i2t": metrics.recall_at_k(best_first(films, texts, 40), every, owner),
            "t2i": metrics.recall_at_k(best_first(texts, films, 40), owner, every)}


def grounding(predictions, prior):
    """A row of Table 4, and the same row for the phrase prior, if there is one -> {"grounding": ..,
    "prior": ..}."""
    if not predictions:
        return {}
    results = {"grounding": metrics.grounding_metrics(predictions)}
    if prior:
        by_prior = [{**p, "pred": prior(p["phrase"]), "malformed": False} for p in predictions]
        results["prior"] = metrics.grounding_metrics(by_prior)
    return results


def print_results(results):
    """The tables of metrics.json, in the paper's columns, percent."""
    if "i2t" in results:
        print(f"\nretrieval over {results['n_images']} test images, %")
        print(f"{'':16}" + "".join(f"{k:>8}" for k in results["i2t"]))
        for key, name in (("i2t", "image-to-text"), ("t2i", "text-to-image")):
            print(f"{name:16}" + "".join(f"{100 * v:8.2f}" for v in results[key].values()))
    if "grounding" in results:
        print(f"\ngrounding of {results['grounding']['n_queries']} test phrases, %")
        table = {"LoFi": results["grounding"], "phrase prior": results.get("prior")}
        print(metrics.format_table({name: {"grounding": row}
                                    for name, row in table.items() if row}))


def evaluate_run(model, path):
    """evaluate() on the test split of a manifest, if it has one, with the prior of the training
    split."""
    rows = data.read_manifest(path)
    test = [row for row in rows if row["split"] == "test"]
    if not test:
        print(f"not evaluated: {path} has no test split")
        return {}
    train = [row for row in rows if row["split"] == "train"
             and any(region["boxes"] for region in row["regions"])]
    prior = metrics.phrase_prior(train) if train else None
    return {**evaluate(model.eval(), test, prior), "n_images": len(test)}


# ---- data and run folder ------------------------------------------------------------------------

def find_data(args, rank, device):
    """The manifest's folder: --data, or the phantom, drawn on first use (a dry run throws its own
    away)."""
    if args.data:
        return args.data
    if args.dry_run:
        folder = Path(tempfile.mkdtemp())
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return data.make_phantom(folder / "phantom", {"train": 64, "test": 8})
    folder = Path("runs/phantom_data")
    if not (folder / "manifest.jsonl").exists() and rank == 0:
        data.make_phantom(folder)
    over_processes(torch.zeros(1, device=device))              # the others wait
    return folder


def training_rows(path, objectives):
    """Rows of the training split that the objectives can use; what is left out is counted and
    printed."""
    rows = data.read_manifest(path, "train")
    has_text = lambda row: "s" in objectives and (row["report"] or row["regions"])
    usable = [row for row in rows if has_text(row) or data.possible_tasks(row, objectives)]
    if len(usable) < len(rows):
        print(f"left out {len(rows) - len(usable)} of {len(rows)} training images: "
              f"no text or box for --objectives {objectives}")
    if not usable:
        raise TrainError(f"{path}: no training image has what --objectives {objectives} needs")
    return usable


def run_folder(args):
    """--out, or runs/NAME of the data -> (folder, whether there is a checkpoint to resume).

    A run that was killed before its first checkpoint is resumed at step 0. Raises TrainError if
    there is no run to --resume."""
    name = "phantom"
    if args.data:
        path = Path(args.data).resolve()
        name = path.name if path.is_dir() else path.parent.name
    out = Path(args.out or f"runs/{name}")
    if args.resume and not (out / "log.jsonl").exists():
        raise TrainError(f"{out}: no run to resume, it has no log.jsonl; start without --resume")
    return out, args.resume and (out / "trainer.pt").exists()


def move_aside(folder):
    """Make way for a new run: an older folder of that name becomes NAME.1, NAME.2, ..."""
    if folder.exists():
        aside = next(p for n in itertools.count(1)
                     if not (p := folder.with_name(f"{folder.name}.{n}")).exists())
        folder.rename(aside)
        print(f"moved the older {folder} to {aside}")
    draft = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    (draft / "log.jsonl").touch()
    draft.rename(folder)


def keep_log(path, step):
    """Open log.jsonl to append a line a step, without the lines that an interrupted run wrote after
    its checkpoint."""
    lines = path.read_text().splitlines(keepends=True)[:step]
    data.write_whole(path, lambda draft: draft.write_text("".join(lines)))
    return open(path, "a", buffering=1)


def build_model(args, start, rows):
    """The model to train: of the preset, or of the run it starts from; its config changed by the
    flags."""
    names = ("lam", "epochs", "steps", "batch_size", "lr", "augment")
    changed = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.steps and not args.epochs:
        changed["epochs"] = None
    elif args.epochs and not args.steps:
        changed["steps"] = None
    if start:
        model = LoFi.from_pretrained(start)
        if args.preset not in (None, model.config.preset):
            raise TrainError(f"{start} has preset {model.config.preset}, not {args.preset}")
        model.config = dataclasses.replace(model.config, **changed)
        return model
    config = PRESETS[args.preset or ("paper" if args.data else "tiny")]
    config = PHANTOM if config is TINY and not args.data else config
    sources = {"encoder": args.encoder, "llm": args.llm}
    sources = {name: source for name, source in sources.items() if source or args.random_init}
    config = dataclasses.replace(config, **sources, **changed)
    world = dist.get_world_size() if dist.is_initialized() else 1
    batch_size = images_per_step(args, config, len(rows), world)        # by which b starts
    model = LoFi.build(dataclasses.replace(config, batch_size=batch_size),
                       data.tokenizer_texts(rows))
    model.config = dataclasses.replace(model.config, batch_size=config.batch_size)
    return model


def print_sizes(model):
    """How much of the model trains, part by part."""
    trains = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    part = lambda prefix, lora: sum(n for name, n in trains.items()
                                    if name.startswith(prefix) and ("lora_" in name) == lora)
    counts = {"LoRA of the encoders": part("siglip.", True), "LoRA of the LLM": part("llm.", True),
              "attention pooling and projection": part("pooling.", False),
              "encoders with t' and b" if not model.config.lora_rank else "t' and b":
                  part("siglip.", False),
              "LLM": part("llm.", False)}
    print(f"trains {sum(trains.values()):,} of {sum(p.numel() for p in model.parameters()):,} "
          "parameters: "
          + ", ".join(f"{name} {n:,}" for name, n in counts.items() if n))


def load_batches(args, model, rows, keys):
    """An iterator over the batches of the keys, decoded by worker processes; an image that cannot
    be read becomes a message in batch["bad"]."""
    config = model.config
    dataset = data.ChestXrays(rows, model.image_size, args.objectives, config.n_regions,
                              config.augment, config.cache, skip_bad=True, seed=args.seed)
    collate = data.Collate(model.text_tokenizer if "s" in args.objectives else None,
                           model.text_length, model.llm_tokenizer, config.max_target)
    workers = args.workers
    if workers is None:
        workers = 1 if config.cache else min(4, os.cpu_count())
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=keys, collate_fn=collate, num_workers=workers,
        worker_init_fn=leave_signals, pin_memory=model.device.type == "cuda"))


def print_left_out(skipped, bad):
    """Steps without a finite loss, and messages of images that could not be read, if any."""
    if dist.is_initialized():
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, bad)
        bad = sum(every, [])
    if skipped:
        print(f"skipped {skipped} steps: their loss or gradient was not finite")
    if bad:
        print(f"{len(bad)} times an image could not be read and was left out, "
              f"{len(set(bad))} different ones:")
        print("\n".join(sorted(set(bad))[:10]))


# ---- the run ------------------------------------------------------------------------------------

def main():
    began, args = time.time(), parse_args()
    check_args(args)
    device = find_device(args.device)
    rank, world = join_processes(device)
    torch.manual_seed(args.seed)
    precision = choose_precision(args.precision, device)

    # data and model
    path = find_data(args, rank, device)
    rows = training_rows(path, args.objectives)
    out, has_checkpoint = run_folder(args)
    model = build_model(args, out if has_checkpoint else args.init, rows).to(device)
    config, trainable = model.config, [p for p in model.parameters() if p.requires_grad]
    print_sizes(model)
    if args.grad_checkpoint:
        model.checkpoint_layers()
    if args.compile:
        model.compile_layers()

    # optimizer and checkpoint
    if len(rows) < world:
        raise TrainError(f"{path}: {len(rows)} training images for {world} processes; "
                         "start fewer")
    batch_size = images_per_step(args, config, len(rows), world)
    epoch = batches_per_epoch(len(rows), batch_size, world) / args.accumulate      # in steps
    limits = [config.steps, config.epochs and math.ceil(config.epochs * epoch)]
    steps = min(limit for limit in limits if limit)
    optimizer = build_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    settings = {"data": str(Path(path).resolve()), "objectives": args.objectives,
                "lambda": config.lam, "lr": config.lr, "steps": steps, "batch-size": batch_size,
                "accumulate": args.accumulate, "seed": args.seed, "augment": config.augment}
    first = (load_trainer(out / "trainer.pt", model, optimizer, scaler, settings)
             if has_checkpoint else 0)

    # batches
    keys = batches(len(rows), batch_size, args.seed, first * args.accumulate,
                   steps * args.accumulate, rank, world)
    loader = load_batches(args, model, rows, keys)
    print(f"{len(rows):,} training images, {steps:,} steps of {args.accumulate * batch_size}, "
          f"objectives {args.objectives}, on {f'{world} x ' if world > 1 else ''}{device.type} in "
          f"{str(precision).removeprefix('torch.')}")
    if args.dry_run:
        steps = first + 1
    elif not args.resume and rank == 0:
        move_aside(out)
    log = (open(os.devnull, "w") if args.dry_run or rank else keep_log(out / "log.jsonl", first))

    # the loop
    model.train()
    bad, skipped, in_a_row, asked_to_stop = [], 0, 0, catch_signals()
    bar = tqdm(range(first, steps), "train", initial=first, total=steps, unit="step",
               disable=rank > 0)
    for step in bar:
        start, parts, images = time.time(), [], []
        for _ in range(args.accumulate):
            batch = to_device(next(loader), device)
            bad += batch["bad"]
            if bad and not args.skip_bad_images:
                raise TrainError(bad[0])
            if not over_processes(torch.tensor(len(batch["image"]), device=device), "MIN"):
                continue                                       # of one process none could be read
            loss, named = step_losses(model, batch, args.objectives, config.lam, precision)
            scaler.scale(loss / args.accumulate).backward()
            parts.append(named)
            images += batch["paths"]
        if not parts:
            raise TrainError(f"step {step + 1}: no image of the batch could be read"
                             + f"; the last: {bad[-1]}" * bool(bad))
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, steps, config)
        add_gradients(trainable)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.clip)
        parts = torch.stack(parts)
        if parts[:, 0].isfinite().all() and (scaler.is_enabled() or norm.isfinite()):
            scaler.step(optimizer)
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        scaler.update()
        optimizer.zero_grad()
        if in_a_row == MAX_SKIPPED:
            raise TrainError(f"step {step + 1}: no finite loss or gradient in {MAX_SKIPPED} steps; "
                             "lower --lr, or look at this step's images: " + " ".join(images))

        values = {name: round(v, 6) if math.isfinite(v) else None
                  for name, v in zip(LOSSES, parts.nanmean(0).tolist())}
        rate = args.accumulate * batch_size / (time.time() - start)
        line = {"step": step + 1, "lr": learning_rate(step, steps, config), **values,
                "samples_per_s": round(rate, 4)}
        log.write(json.dumps(line) + "\n")
        bar.set_postfix({name: f"{v:.2f}" for name, v in values.items() if v is not None}
                        | ({"skipped": skipped} if skipped else {}), refresh=False)
        stop = over_processes(torch.tensor(max(asked_to_stop, default=0), device=device), "MAX")
        if rank == 0 and not args.dry_run and step + 1 < steps \
                and (stop or (step + 1) % args.save_every == 0):
            save_run(out, model, optimizer, scaler, step + 1, settings)
        if stop and step + 1 < steps:
            bar.close()
            print(f"stopped and saved after step {step + 1}; go on with the same command and "
                  "--resume", file=sys.stderr)
            sys.exit(128 + int(stop))
    log.close()
    catch_signals(last=True)
    print_left_out(skipped, bad)
    if args.dry_run:
        print(f"dry run: one step of {batch_size} images, loss {values['loss']:.3f}, every row of "
              "the data is well formed; nothing written")
        return
    if rank:
        return
    save_run(out, model, optimizer, scaler, steps, settings)
    print(f"saved {out}")

    # evaluation
    results = {}
    if args.random_init and config.lora_rank:
        print("not evaluated: with --random-init the frozen towers are random")
    else:
        results = evaluate_run(model, path)
    data.write_json(out / "metrics.json", {**results, "seconds": round(time.time() - began, 1)})
    print_results(results)
    print(f"\n{time.time() - began:.0f} s in all. Next: python model.py export {out} {out}/siglip")


if __name__ == "__main__":
    try:
        main()
    except (TrainError, ModelError, data.DataError, OSError) as error:
        sys.exit(f"train.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("train.py: interrupted")
    except RuntimeError as error:                              # on a CPU it has no name of its own
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        sys.exit("train.py: out of memory; lower --batch-size (and raise --accumulate), "
                 "or add --grad-checkpoint")
