"""Phrase grounding by retrieval-based in-context learning (Sec. 2.0.2, Fig. 1b; Tables 2 to 4).

    python icl_ground.py --image x.png --phrase "small left pleural effusion"
    python icl_ground.py --data DIR --split test --out P.jsonl     # a set: a row of Table 2
    python icl_ground.py --data DIR --encoders A B --k 20 40       # Table 2, several encoders
    python icl_ground.py --data DIR --lvlm lofi                    # Table 4; or nearest, or prior

The pool images most like the query image, by the cosine of E_I, become demonstrations: turns of
image, sentence and boxes before the query. For one image you will see JSON on stdout (boxes as
fractions and as pixels) and an overlay PNG, predictions solid, ground truth dashed where known; for
a set a bar, then the row Ro/L Ro/S F@0.5 P@0.5 R@0.5 beside the phrase prior. Needs a run of
train.py, or another encoder, and for MedGemma its weights.

K demonstrations  n phrases of an image  H LLM width
boxes: (x0, y0, x1, y1), fractions of width and height; box_yxyx_1000: MedGemma's own format
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import os
import re
import sys
import textwrap
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import (AutoConfig, DynamicCache, Gemma3ForConditionalGeneration, Gemma3Processor,
                          logging as transformers_logging)
from transformers.modeling_outputs import BaseModelOutputWithPooling

transformers_logging.set_verbosity_error()             # before imports of ours that would log
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

import data                                            # noqa: E402
import metrics                                         # noqa: E402
import retrieve                                        # noqa: E402
from model import (ANSWER_TOKENS, LoFi, SafetensorError, find_device,      # noqa: E402
                   where_to_look)

MEDGEMMA = "google/medgemma-1.5-4b-it"                 # the paper's LVLM               (Sec. 2.0.4)


class IclError(ValueError):
    """The run cannot start or go on; the message is one line that says what to do."""


# ---- the prompt; not stated in the paper --------------------------------------------------------
# The box format is MedGemma 1.5's own. Each demonstration is a user turn that ends with its phrase
# and an assistant turn of bare JSON; phrases of one image share it; the query comes last.

INSTRUCTION = """\
Each query names a finding on a chest X-ray. Answer with its bounding boxes. The format of a box \
is [y0, x0, y1, x1]: (y0, x0) is the top-left corner and (y1, x1) the bottom-right corner, so \
y0 < y1 and x0 < x1. Coordinates are integers normalized to the range [0, 1000]: a box that starts \
at 15% of the image width has x0 = 150. Output a single parseable JSON list of objects, bare or in \
a ```json code block, for instance [{"box_2d": [640, 90, 880, 430], "label": "cup"}, \
{"box_2d": [150, 520, 300, 610], "label": "cup"}]. If the finding is not there, output [].

Remember that "left" is the patient's left side, which is on the right of the image."""

QUERY = "Query:\nWhere is this finding? {phrase}"


def boxes_to_reply(boxes_yxyx_1000, phrase):
    """An assistant's turn: [{"box_2d": [y0, x0, y1, x1], "label": phrase}, ...]."""
    return json.dumps([{"box_2d": box, "label": phrase} for box in boxes_yxyx_1000],
                      ensure_ascii=False)


def turns(path, phrase, demonstrations, order="similar-last"):
    """Chat messages: the demonstrations (given most similar first), then the query, phrase at the
    end. An image stands once, before the first of its triplets."""
    groups = [list(group) for _, group in
              itertools.groupby(demonstrations, key=lambda triplet: triplet["path"])]
    if order == "similar-last":
        groups.reverse()
    messages, shown = [], None
    for triplet in [*itertools.chain(*groups), {"path": path, "phrase": phrase}]:
        # "<eos>" or an image token written in a phrase stays plain text
        asked = re.sub(r"<(?=\w+>)", "< ", triplet["phrase"])
        text = QUERY.format(phrase=asked)
        content = [{"type": "text", "text": text if messages else f"{INSTRUCTION}\n\n{text}"}]
        if triplet["path"] != shown:
            content.insert(0, {"type": "image", "image": triplet["path"]})
            shown = triplet["path"]
        messages.append({"role": "user", "content": content})
        if "boxes" in triplet:
            boxes = boxes_to_yxyx_1000(triplet["boxes"], film_size(triplet["path"]))
            answer = [{"type": "text", "text": boxes_to_reply(boxes, asked)}]
            messages.append({"role": "assistant", "content": answer})
    return messages


def images_of(messages):
    """Paths of the images of a chat, in its order."""
    return [item["image"] for message in messages for item in message["content"]
            if item["type"] == "image"]


def chat_ids(processor, messages):
    """The ids of processor.apply_chat_template(messages, tokenize=True), images left unread."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    text = text.replace(processor.boi_token, processor.full_image_sequence)
    bos = processor.tokenizer.bos_token
    return processor.tokenizer(text, add_special_tokens=not text.startswith(bos))["input_ids"]


# ---- boxes: y first, 0 to 1000, of the film padded with black to a centred square ---------------

@functools.lru_cache(maxsize=100_000)
def film_size(path):
    """(width, height) of an image file; only its header is read."""
    with Image.open(path) as image:
        return image.size


def centred_square(size):
    """(width, height) of a film -> side, left and top of the film in its square, pixels."""
    side = max(size)
    return side, (side - size[0]) // 2, (side - size[1]) // 2


def pad_to_square(film):
    """A grey film -> RGB, padded with black to a centred square."""
    side, left, top = centred_square(film.size)
    square = Image.new("RGB", (side, side))
    square.paste(film, (left, top))
    return square


def boxes_to_yxyx_1000(boxes, size):
    """Boxes of a film of size (width, height) -> box_yxyx_1000 integers of its padded square."""
    side, left, top = centred_square(size)
    scaled = lambda v, length, offset: round(1000 * (v * length + offset) / side)
    whole = [[scaled(y0, size[1], top), scaled(x0, size[0], left),
              scaled(y1, size[1], top), scaled(x1, size[0], left)] for x0, y0, x1, y1 in boxes]
    low = lambda v: min(v, 999)                                # never empty
    return [[low(y0), low(x0), max(y1, low(y0) + 1), max(x1, low(x0) + 1)]
            for y0, x0, y1, x1 in whole]


def boxes_from_yxyx_1000(boxes_yxyx_1000, size):
    """The inverse, clipped to the film; a box that lies in the padding alone is dropped."""
    side, left, top = centred_square(size)
    part = lambda v, length, offset: round(min(1, max(0, (v * side / 1000 - offset) / length)), 6)
    boxes = [[part(x0, size[0], left), part(y0, size[1], top),
              part(x1, size[0], left), part(y1, size[1], top)]
             for y0, x0, y1, x1 in boxes_yxyx_1000]
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


# ---- answers ------------------------------------------------------------------------------------

NUMBER = r"""\s*["']?([-+]?(?:\d+\.?\d*|\.\d+))["']?\s*"""
FOUR_NUMBERS = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]", re.ASCII)
EMPTY_LIST = re.compile(r"\[\s*\]")
# a list, its inner lists one deep, or objects in a row without one; either may be cut off
LIST = r"\[[^][]*(?:\[[^][]*\][^][]*)*(?:\]|(?:\[[^][]*)?\Z)"
OBJECTS = r"\{[^{}]*(?:\}[\s,]*\{[^{}]*)*(?:\}|\Z)"
THOUGHT = re.compile(r"<unused94>.*?(?:<unused95>|\Z)|\A.*<unused95>", re.DOTALL)


def parse_boxes(reply):
    """A reply -> (boxes_yxyx_1000, malformed). Never raises; an unreadable reply gives ([], True).

    A thinking trace is dropped, then the last JSON list counts. Decimals, swapped corners, single
    quotes and a cut-off end are read; values are clipped to [0, 1000]; boxes without area and
    repeated ones are dropped."""
    lists = [part for part in re.findall(f"{LIST}|{OBJECTS}", THOUGHT.sub("", reply))
             if "box_2d" in part or FOUR_NUMBERS.search(part) or EMPTY_LIST.fullmatch(part)]
    boxes = []
    for match in FOUR_NUMBERS.finditer(lists[-1]) if lists else ():
        y0, x0, y1, x1 = (min(1000.0, max(0.0, float(v))) for v in match.groups())
        box = [min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)]
        if box[0] < box[2] and box[1] < box[3] and box not in boxes:
            boxes.append(box)
    return boxes, not (boxes or lists and EMPTY_LIST.fullmatch(lists[-1]))


# ---- demonstrations -----------------------------------------------------------------------------

def with_boxes(rows):
    """Rows that have a phrase with boxes, with those phrases alone (Sec. 3.0.1: non-empty)."""
    boxed = [{**row, "regions": [region for region in row["regions"] if region["boxes"]]}
             for row in rows]
    return [row for row in boxed if row["regions"]]


def count(rows):
    """Phrases of manifest rows."""
    return sum(len(row["regions"]) for row in rows)


def leave_one_out(queries, rows):
    """For each query the indices of rows that hold its own image, by its bytes, or its patient."""
    of_patient, of_size = defaultdict(set), defaultdict(set)
    for i, row in enumerate(rows):
        of_patient[row["patient"]].add(i)
        of_size[os.path.getsize(row["path"])].add(i)
    own = []
    for query in queries:
        content = Path(query["path"]).read_bytes()
        same = {i for i in of_size.get(len(content), ())
                if Path(rows[i]["path"]).read_bytes() == content}
        own.append(same | of_patient.get(query["patient"], set()))
    return own


def top_triplets(queries, query_emb, rows, image_emb, k):
    """C of each query (Sec. 2.0.2): the k triplets of pool rows whose image is most similar by
    cos(E_I(I), E_I(I_p)), best first, an image's own in their order; and what was left out of it.

    query_emb: (Q, D), image_emb: (N, D), unit length. -> Q lists of triplets, Q sets of indices."""
    own = leave_one_out(queries, rows)
    n = min(len(rows), k + max(map(len, own)))                 # an image has a triplet or more
    similarity, index = retrieve.top_k(query_emb, image_emb, n)                    # (Q, n)
    found = [[{"image": rows[i]["image"], "path": rows[i]["path"], **region, "similarity": s}
              for i, s in zip(*ranked) if i not in left_out for region in rows[i]["regions"]][:k]
             for *ranked, left_out in zip(index.tolist(), similarity.tolist(), own)]
    return found, own


def find_demonstrations(args, encoder, queries, query_emb):
    """max(k) triplets of each query from train and val of --pool; says what was left out."""
    source, k = args.pool or args.data, max(args.k)
    rows = with_boxes(row for row in data.read_manifest(source) if row["split"] != "test")
    if not rows:
        raise IclError(f"{source}: no phrase with boxes in its splits train and val, the pool of "
                       "demonstrations; name another manifest with --pool")
    image_emb = retrieve.image_embeddings(encoder, source, rows)
    found, own = top_triplets(queries, query_emb, rows, image_emb, k)
    retrieve.say(f"pool of {encoder.source}: {len(rows):,} images with {count(rows):,} triplets of "
                 f"{source}, train and val; leave-one-out: {sum(map(bool, own)):,} of "
                 f"{len(queries):,} query images have themselves or their patient there, "
                 f"{sum(map(len, own)):,} pool images were kept from them")
    if (fewest := min(map(len, found))) < k:
        retrieve.say(f"note: --k {k}, but the pool has only {fewest} triplets for an image")
    return found


# ---- the LVLM: same answers as one call per phrase, at a fraction of the cost -------------------

def load_lvlm(source, device, dtype):
    """A Gemma 3 family id or folder -> (model, processor). Raises IclError if it cannot be had."""
    options = where_to_look(source)
    try:
        kind = AutoConfig.from_pretrained(source, **options).model_type
        if kind != "gemma3":
            raise ValueError(f"it is a {kind} model; wanted gemma3, with images")
        processor = Gemma3Processor.from_pretrained(source, **options)
        model, info = Gemma3ForConditionalGeneration.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, **options)
        if missing := info["missing_keys"]:
            raise ValueError(f"{len(missing)} weights are missing, {min(missing)} for one")
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
        cure = ("wanted a folder as save_pretrained writes it, with weights, tokenizer and "
                "processor" if Path(source).exists() else
                f"accept its terms at https://huggingface.co/{source} and run `hf auth login`, or "
                "give a local folder with --lvlm DIR")
        raise IclError(f"--lvlm {source}: cannot be loaded ({reason}); {cure}; "
                       "--lvlm lofi or --lvlm nearest work without it")
    return model.to(device).eval(), processor


class InContext:
    """b = LVLM(I, s | C) (Sec. 2.0.2) for all phrases s of an image at once.

    Demonstrations and query image are prefilled once an image; the phrases decode as one batch on
    the repeated cache; an image passes the vision tower once, while feature_cache_gb (CPU memory)
    holds its features. Greedy."""

    def __init__(self, model, processor, order="similar-last", max_new_tokens=512, batch_size=16,
                 feature_cache_gb=8.0):
        self.model, self.processor, self.order = model, processor, order
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.budget, self.features = feature_cache_gb * 1e9, {}    # {path: (tokens, H)}, old first
        self.image_token = model.config.image_token_id
        self.window = model.config.get_text_config().sliding_window
        if self.image_token != processor.tokenizer.image_token_id:
            raise IclError(f"image token {self.image_token} in the model's config, "
                           f"{processor.tokenizer.image_token_id} in its tokenizer: they do not "
                           "belong together")

    def encode(self, paths, batch_size=8):
        """Films through the vision tower and projector -> [(tokens, H), ...] on the CPU."""
        features = []
        for i in range(0, len(paths), batch_size):
            films = retrieve.ahead(lambda path: pad_to_square(data.load_image(path)),
                                   paths[i:i + batch_size], workers=8)
            pixels = self.processor.image_processor([[film] for film in films], return_tensors="pt",
                                                    do_pan_and_scan=False)["pixel_values"]
            pixels = pixels.to(self.model.device, self.model.dtype)                # (b, 3, S, S)
            made = self.model.get_image_features(pixels).pooler_output.cpu()       # (b, tokens, H)
            features += [image.clone() for image in made]      # so that each is freed by itself
        return features

    def image_features(self, paths):
        """Features of a prompt's images, (images, tokens, H); all but the last, which is the query,
        are kept for prompts to come, the oldest making way."""
        found = {path: self.features[path] for path in paths if path in self.features}
        new = [path for path in paths if path not in found]
        found.update(zip(new, self.encode(new)))
        self.features.update((path, found[path]) for path in paths[:-1])
        size = found[paths[-1]].nbytes
        while len(self.features) * size > self.budget:
            del self.features[next(iter(self.features))]
        return torch.stack([found[path] for path in paths]).to(self.model.device)

    def prefill(self, ids, features):
        """Run a prefix (list of ids, all images in it) -> its cache. Image tokens see the whole of
        their image: token_type_ids carries that."""
        ids = torch.tensor([ids], device=self.model.device)                        # (1, prefix)
        cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(input_ids=ids, token_type_ids=(ids == self.image_token).long(),
                   mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
                   past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache

    def masks(self, kept, start, position, key_position):
        """Who sees whom, by place in its own prompt: {layer type: (n, 1, queries, keys) bool}.

        By place, not by index in the cache: the gap between the prefix and a short phrase must not
        count towards the sliding window. kept: {layer type: prefix keys its cache holds}."""
        masks = {}
        for kind, n_kept in kept.items():
            prefix = torch.arange(start - n_kept, start, device=position.device)
            keys = torch.cat([prefix.expand(len(position), -1), key_position], 1)  # (n, keys)
            distance = position[:, None, :, None] - keys[:, None, None, :]
            masks[kind] = distance >= 0
            if kind == "sliding_attention":
                masks[kind] &= distance < self.window
        return masks

    def decode(self, prefix, start, suffixes):
        """Continue a prefix of `start` tokens with n suffixes as a batch -> n lists of new ids."""
        device, eos = self.model.device, self.model.generation_config.eos_token_id
        eos = torch.tensor(eos if isinstance(eos, list) else [eos], device=device)
        pad, length = self.processor.tokenizer.pad_token_id, max(map(len, suffixes))
        ids = torch.tensor([[pad] * (length - len(s)) + s for s in suffixes], device=device)
        real = torch.tensor([[0] * (length - len(s)) + [1] * len(s) for s in suffixes],
                            device=device).bool()                                  # (n, suffix)
        position = start + real.cumsum(1) - 1
        key_position = position.where(real, torch.iinfo(torch.long).max // 2)      # pads: unseen
        cache, kept = DynamicCache(), {}                       # plain layers: nothing slides away
        types = self.model.config.get_text_config().layer_types
        for i, (kind, layer) in enumerate(zip(types, prefix.layers)):
            cache.update(layer.keys.expand(len(ids), -1, -1, -1),
                         layer.values.expand(len(ids), -1, -1, -1), i)
            kept[kind] = layer.keys.shape[2]
        replies, finished = [], torch.zeros(len(ids), dtype=torch.bool, device=device)
        while len(replies) < self.max_new_tokens and not finished.all():
            masks = self.masks(kept, start, position, key_position)
            logits = self.model(input_ids=ids, position_ids=position, attention_mask=masks,
                                past_key_values=cache, logits_to_keep=1).logits[:, -1]
            token = logits.argmax(-1).masked_fill(finished, pad)                   # (n,)
            replies.append(token)
            finished |= torch.isin(token, eos)
            ids, position = token[:, None], position[:, -1:] + 1
            key_position = torch.cat([key_position, position], 1)
        return torch.stack(replies, 1).tolist()

    @torch.inference_mode()
    def generate(self, path, phrases, demonstrations):
        """The ids of the answers to several phrases on one image, as rows with padding behind."""
        chats = [turns(path, phrase, demonstrations, self.order) for phrase in phrases]
        prompts = [chat_ids(self.processor, chat) for chat in chats]
        # the longest common prefix of whole prompts: nothing hangs on where a tokenizer merges
        start = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        prefix = self.prefill(prompts[0][:start], self.image_features(images_of(chats[0])))
        suffixes = [prompt[start:] for prompt in prompts]
        return [row for i in range(0, len(suffixes), self.batch_size)
                for row in self.decode(prefix, start, suffixes[i:i + self.batch_size])]

    def __call__(self, query, phrases, demonstrations):
        """A grounder: row, phrases, triplets -> [(boxes, malformed, raw reply), ...]."""
        answers, size = [], film_size(query["path"])
        ids = self.generate(query["path"], phrases, demonstrations)
        for reply in self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True):
            boxes_yxyx_1000, malformed = parse_boxes(reply)
            boxes = boxes_from_yxyx_1000(boxes_yxyx_1000, size)
            # boxes that lie beside the film, all of them, are no answer either
            answers.append((boxes, malformed or len(boxes) < min(1, len(boxes_yxyx_1000)), reply))
        return answers


# ---- grounders that need no download ------------------------------------------------------------
# A grounder is a function: row, its phrases, their triplets -> [(boxes, malformed, raw), ...].

def lofi_grounder(model):
    """LoFi's own decoder (Table 4): one vision pass an image, its phrases as one batch."""
    def ground(query, phrases, _):
        prompts = [data.GROUNDING_PROMPT.format(phrase=phrase) for phrase in phrases]
        return [(*data.text_to_boxes(reply), reply)
                for reply in model.ask(query["path"], prompts, ANSWER_TOKENS)]
    return ground


def nearest_grounder(encoder):
    """Of the demonstrations, the boxes of the one whose phrase is closest by E_T, ties to the more
    similar image. Not in the paper: a floor under what the LVLM makes of its demonstrations."""
    known = {}                                                 # {phrase: (D,)}

    def ground(_, phrases, demonstrations):
        others = {triplet["phrase"] for triplet in demonstrations}
        if new := sorted({*phrases, *others} - known.keys()):
            known.update(zip(new, retrieve.text_embeddings(encoder, new)))
        answers = []
        for phrase in phrases:
            # one product a phrase, so that equal phrases tie exactly; max takes the first
            closeness = {other: float(known[phrase] @ known[other]) for other in others}
            best = max(demonstrations, key=lambda triplet: closeness[triplet["phrase"]])
            answers.append((best["boxes"], False, f"{best['image']}: {best['phrase']}"))
        return answers
    return ground


def training_prior(args):
    """phrase -> its median box in the training split of --data, blind to the image."""
    rows = data.read_manifest(args.data)
    return metrics.phrase_prior([row for row in rows if row["split"] == "train"])


def build_grounder(args, encoder=None):
    """--lvlm -> a grounder; nearest wants the encoder."""
    if args.lvlm == "lofi":
        return lofi_grounder(LoFi.from_pretrained(args.checkpoint, args.device))
    if args.lvlm == "nearest":
        return nearest_grounder(encoder)
    if args.lvlm == "prior":
        prior = training_prior(args)
        return lambda _, phrases, __: [(prior(phrase), False, "") for phrase in phrases]
    dtype = torch.float32 if args.precision == "fp32" else torch.bfloat16
    return InContext(*load_lvlm(args.lvlm, args.device, dtype), args.order, args.max_new_tokens,
                     args.batch_size, args.feature_cache_gb)


def shown_prompt(ground, query, phrase, demonstrations):
    """What a grounder is sent, as text; image tokens are counted instead of repeated."""
    if not isinstance(ground, InContext):
        return data.GROUNDING_PROMPT.format(phrase=phrase)
    processor, messages = ground.processor, turns(query["path"], phrase, demonstrations,
                                                  ground.order)
    token, n, images = (processor.tokenizer.image_token, processor.image_seq_length,
                        iter(images_of(messages)))
    block = lambda _: processor.full_image_sequence.replace(token * n,
                                                            f"{token} x {n}: {next(images)}")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return re.sub(re.escape(processor.boi_token), block, text)


# ---- one image ----------------------------------------------------------------------------------

YELLOW, GREEN = "#ffd21f", "#35e0c8"


def dashed(pen, x0, y0, x1, y1, dash=12):
    """A rectangle of dashes, for the ground truth."""
    for x in range(round(x0), round(x1), 2 * dash):
        for y in (y0, y1):
            pen.line((x, y, min(x + dash, x1), y), GREEN, 4)
    for y in range(round(y0), round(y1), 2 * dash):
        for x in (x0, x1):
            pen.line((x, y, x, min(y + dash, y1)), GREEN, 4)


def overlay(film, phrase, predicted, truth, longest=768):
    """The film with its phrase below, predicted boxes solid and wanted ones dashed, as in Figs. 2
    and 3 -> PIL "RGB". film: grey, any size."""
    size = [max(1, round(n * longest / max(film.size))) for n in film.size]
    words = textwrap.wrap(phrase, max(12, size[0] // 11))
    sheet = Image.new("RGB", (size[0], size[1] + 26 * len(words) + 40))
    sheet.paste(film.resize(size), (0, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    corners = lambda box: [v * (n - 1) for v, n in zip(box, size * 2)]
    for box in predicted:
        pen.rectangle(corners(box), outline=YELLOW, width=4)
    for box in truth:
        dashed(pen, *corners(box))
    pen.text((8, size[1] + 6), "\n".join(words), "white", font, spacing=4)
    legend = "predicted" if predicted else "no box predicted"
    below = size[1] + 26 * len(words) + 8
    pen.text((8, below), legend, YELLOW, font)
    if truth:
        pen.text((28 + pen.textlength(legend, font), below), "ground truth (dashed)", GREEN, font)
    return sheet


def query_row(args):
    """The manifest's row of --image, if it has one; else a row that knows no more than its path."""
    rows, path = data.read_manifest(args.data) if args.data else [], Path(args.image).resolve()
    return next((row for row in rows if Path(row["path"]).resolve() == path),
                {"image": args.image, "path": args.image, "patient": None, "regions": []})


def ground_image(args, ground):
    """Ground --phrase on --image and write the overlay -> what main prints as JSON."""
    film, query, encoder, demonstrations = data.load_image(args.image), query_row(args), None, []
    if args.retrieves:
        encoder = retrieve.load_encoder(args.encoders[0], args.device)
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):      # stdout is the answer's
            query_emb = encoder.encode_image(args.image).cpu()                     # (1, D)
            demonstrations = find_demonstrations(args, encoder, [query], query_emb)[0]
    ground = ground or build_grounder(args, encoder)
    if args.show_prompt:
        print(shown_prompt(ground, query, args.phrase, demonstrations))
    [(boxes, malformed, raw)] = ground(query, [args.phrase], demonstrations)
    truth = [box for region in query["regions"] if region["phrase"] == args.phrase
             for box in region["boxes"]]
    out = args.out or f"runs/{Path(args.image).stem}_grounded.png"
    sheet = overlay(film, args.phrase, boxes, truth)
    data.write_whole(out, lambda draft: sheet.save(draft, "PNG"))
    pixels = [[round(v * n) for v, n in zip(box, film.size * 2)] for box in boxes]
    return {"image": args.image, "phrase": args.phrase, "boxes": boxes, "pixels": pixels,
            **({"ground_truth": truth} if truth else {}), "malformed": malformed, "raw": raw,
            "lvlm": args.lvlm, "n_demonstrations": len(demonstrations), "overlay": out}


# ---- a set --------------------------------------------------------------------------------------

def wait():
    """Under torchrun: for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def read_done(out, settings):
    """Rows that an earlier run left in a predictions file; a line that a kill tore is cut off.

    Raises IclError if they were made with other settings, which OUT.settings.json beside it has."""
    beside, done = out.with_suffix(".settings.json"), []
    if out.exists():
        before = json.loads(beside.read_text()) if beside.exists() else settings
        if other := {key: before.get(key) for key in settings if before.get(key) != settings[key]}:
            now = {key: settings[key] for key in other}
            raise IclError(f"{out}: was made with {other}, now {now}; go on with the same flags, "
                           "or name another --out")
        whole = out.read_bytes().rfind(b"\n") + 1
        os.truncate(out, whole)
        done = metrics.read_predictions(out) if whole else []
    data.write_json(beside, settings)
    return done


def ground_rows(rows, ground, found, out, settings):
    """Ground each boxed phrase of each row, an image at a time, and append to a predictions file
    what it does not have yet. found: the triplets of each row.

    Under torchrun each rank takes its share of the images; a write is whole, so they share the
    file."""
    (rank, n_ranks), jobs = retrieve.ranks(), []
    done = Counter((row["image"], row["phrase"]) for row in read_done(out, settings))
    if done:
        retrieve.say(f"{out}: {done.total():,} phrases were done before, going on")
    for row, triplets in list(zip(rows, found))[rank::n_ranks]:
        regions = []
        for region in row["regions"]:
            key = row["image"], region["phrase"]
            regions += [] if done[key] else [region]
            done[key] -= done[key] > 0
        if regions:
            jobs.append((row, triplets, regions))
    wait()                                                     # till all have read
    n_malformed, bar = 0, tqdm(jobs, out.stem, unit="image", disable=rank > 0)
    with open(out, "ab", buffering=0) as file:
        for row, triplets, regions in bar:
            lines = []
            answers = ground(row, [region["phrase"] for region in regions], triplets)
            for region, (boxes, malformed, raw) in zip(regions, answers):
                n_malformed += malformed
                lines.append(json.dumps({
                    "image": row["image"], "phrase": region["phrase"], "boxes": region["boxes"],
                    "pred": boxes, "raw": raw, "malformed": malformed}) + "\n")
            file.write("".join(lines).encode())
            bar.set_postfix(malformed=n_malformed, refresh=False)
    wait()                                                     # till all have written


def runs_of(args, rows, ground):
    """For each encoder and k: yield (name, grounder, triplets of each row, file, settings); without
    retrieval there is one."""
    path, name = data.manifest_path(args.data).resolve(), Path(args.lvlm).name
    out = Path(args.out or f"runs/{path.parent.name}_{args.split}_{name}.jsonl")
    settings = {"lvlm": args.lvlm, "data": str(path), "split": args.split}
    settings |= {"max_new_tokens": args.max_new_tokens} if isinstance(ground, InContext) else {}
    if not args.retrieves:
        settings |= {"checkpoint": args.checkpoint}
        yield name, ground or build_grounder(args), [[]] * len(rows), out, settings
        return
    settings |= {"pool": str(Path(args.pool or args.data).resolve()), "order": args.order}
    for source in args.encoders:
        encoder = retrieve.load_encoder(source, args.device)
        query_emb = retrieve.image_embeddings(encoder, args.data, rows)
        found = find_demonstrations(args, encoder, rows, query_emb)
        for k in args.k:
            file = out
            if len(args.encoders) * len(args.k) > 1:
                part = re.sub(r"[^\w-]+", "_", source).strip("_")
                file = out.with_stem(f"{out.stem}_{part}_k{k}")
            yield (f"{name}, {source}, k={k}", ground or build_grounder(args, encoder),
                   [triplets[:k] for triplets in found], file,
                   {**settings, "encoder": source, "k": k})


def prior_row(args, predictions):
    """{"grounding": ..} of the phrase prior on the same queries; {} if no row trains it."""
    try:
        prior = training_prior(args)
    except ValueError as error:
        print(f"no row of the phrase prior: {error}")
        return {}
    return {"grounding": metrics.grounding_metrics(
        [{**row, "pred": prior(row["phrase"]), "malformed": False} for row in predictions])}


def ground_set(args, ground):
    """Ground the boxed phrases of a split with each encoder and k; print the rows of Table 2."""
    began, results, files = time.time(), {}, []
    every = data.read_manifest(args.data, args.split)
    rows = with_boxes(every)
    if not rows:
        raise IclError(f"{args.data}: no phrase with boxes in split {args.split!r}, wanted rows "
                       'with "regions"')
    retrieve.say(f"{count(rows):,} phrases with boxes on {len(rows):,} images of {args.data}, "
                 f"{args.split}; left out {count(every) - count(rows):,} phrases without")
    for name, grounder, found, out, settings in runs_of(args, rows, ground):
        if args.show_prompt:
            phrase = rows[0]["regions"][0]["phrase"]
            retrieve.say(shown_prompt(grounder, rows[0], phrase, found[0]))
        start = time.time()
        ground_rows(rows, grounder, found, out, settings)
        predictions = metrics.read_predictions(out)
        results[name] = {"grounding": metrics.grounding_metrics(predictions),
                         "intervals": metrics.bootstrap(predictions), "n_images": len(rows),
                         "seconds": round(time.time() - start, 1)}
        files.append(str(out))
    if retrieve.ranks()[0]:
        return
    prior = prior_row(args, predictions) if args.lvlm != "prior" else {}
    print(f"\ngrounding of {count(rows):,} phrases, % [95 % interval over images]")
    print(metrics.format_table({**results, **({"phrase prior": prior} if prior else {})}))
    for name, result in results.items():
        print(f"{name}: {result['grounding']['n_malformed']:,} malformed replies")
        result |= {"prior": prior["grounding"]} if prior else {}
    if args.json:
        data.write_json(args.json, results if len(results) > 1 else results[name])
    print(f"\n{time.time() - began:.0f} s in all. Next: python metrics.py {' '.join(files)}")


# ---- command line -------------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\nK demo")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to ground: one image and phrase, or a set").add_argument
    add("--image", metavar="FILE", help="a chest film of any mode")
    add("--phrase", metavar="TEXT", help="the sentence to find on it")
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file: the set, and the "
        "pool of demonstrations (default: what --checkpoint was trained on)")
    add("--split", choices=data.SPLITS, default="test",
        help="of --data, to ground (default: %(default)s)")
    add("--out", metavar="FILE", help="of an image: the overlay, .png (default: "
        "runs/IMAGE_grounded.png); of a set: the predictions, .jsonl, which a stopped run goes on "
        "with (default: runs/DATA_SPLIT_LVLM.jsonl); several encoders or k: a file each, named "
        "after them")
    add("--json", metavar="PATH", help="also write a set's scores there, as fractions (default: "
        "not written)")

    add = parser.add_argument_group("demonstrations").add_argument
    add("--checkpoint", default=retrieve.DEFAULT_RUN, metavar="RUN", help="run folder of train.py: "
        "E_I, E_T, and the decoder of --lvlm lofi; or a SigLIP-family id or folder (default: "
        "%(default)s)")
    add("--encoders", nargs="+", metavar="RUN", help="several of these to retrieve with, in turn: "
        "a row of Table 2 each (default: --checkpoint)")
    add("--k", type=int, nargs="+", default=[40], metavar="K", help="demonstrations (image, "
        "sentence, boxes) a query; Table 2: 20 40; 0: none, MedGemma's row of Table 3 (default: "
        "40, the paper's best)")
    add("--pool", metavar="PATH", help="another manifest for the demonstrations; they are always "
        "of its train and val splits (default: --data)")
    add("--order", choices=["similar-last", "similar-first"], default="similar-last",
        help="of the demonstrations; not stated in the paper (default: %(default)s)")

    add = parser.add_argument_group("grounder").add_argument
    add("--lvlm", default=MEDGEMMA, metavar="NAME", help="a Gemma 3 family id or folder; or lofi: "
        "LoFi's own decoder (Table 4); nearest: the boxes of the demonstration whose phrase is "
        "closest by E_T; prior: the phrase's median training box (default: %(default)s, which is "
        "gated)")
    add("--max-new-tokens", type=int, default=512, metavar="N",
        help="of a reply; not stated in the paper (default: %(default)s)")
    add("--show-prompt", action="store_true", help="print what is sent before the answer, image "
        "tokens counted, not repeated; of a set, for its first phrase")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="of the LVLM; auto: bf16, or fp32 on a CPU (default: auto)")
    add("--batch-size", type=int, default=16, metavar="N",
        help="phrases of an image that decode at once (default: %(default)s)")
    add("--feature-cache-gb", type=float, default=8, metavar="GB", help="CPU memory for image "
        "features; MedGemma's take 1.3 MB an image in bf16; 0: keep none (default: %(default)s)")
    return parser.parse_args()


def check_args(args):
    """Flags that cannot be. Raises IclError."""
    if (args.image is None) != (not (args.phrase or "").strip()):
        raise IclError("--image and --phrase go together: one film, and the sentence to find on it")
    for name, least in dict(k=0, max_new_tokens=1, batch_size=1, feature_cache_gb=0).items():
        value = getattr(args, name)
        if min(value if name == "k" else [value]) < least:
            raise IclError(f"--{name.replace('_', '-')} {value}: wanted {least} or more")
    if args.lvlm == "nearest" and 0 in args.k:
        raise IclError("--lvlm nearest answers with a demonstration: wanted --k 1 or more")
    if args.lvlm in ("nearest", "prior") and args.show_prompt:
        raise IclError(f"--show-prompt: --lvlm {args.lvlm} sends no prompt")
    if args.image and (len(args.k) > 1 or args.encoders and len(args.encoders) > 1):
        raise IclError("--image takes one --k and one encoder; several are for a set")
    wanted = ".png" if args.image else ".jsonl"
    if args.out and Path(args.out).suffix != wanted:
        raise IclError(f"--out {args.out}: wanted a {wanted} file")
    if args.json and args.image:
        raise IclError("--json is for a set; the answer for an image is on stdout")
    if args.image:
        data.load_image(args.image)
    for path in filter(None, (args.data, args.pool)):
        data.manifest_path(path)


def main():
    args = parse_args()
    check_args(args)
    args.device = find_device(args.device)
    if args.precision == "auto":
        args.precision = "fp32" if args.device.type == "cpu" else "bf16"
    args.encoders = args.encoders or [args.checkpoint]
    args.retrieves = args.lvlm not in ("lofi", "prior") and max(args.k) > 0
    # an LVLM first of all: its weights may not be had
    ground = None if args.lvlm in ("nearest", "prior") else build_grounder(args)
    if not args.data:
        try:
            args.data = retrieve.trained_on(args.checkpoint)
        except retrieve.RetrieveError:
            if args.retrieves or ground is None or not args.image:
                raise
    if args.image:
        answer = ground_image(args, ground)
        print(json.dumps(answer))
        print(f"wrote {answer['overlay']}; next, a set: python icl_ground.py --lvlm {args.lvlm} "
              f"--checkpoint {args.checkpoint} --data {args.data or 'DIR'}", file=sys.stderr)
        return
    retrieve.start_ranks()
    ground_set(args, ground)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:             # IclError, DataError, ModelError among them
        sys.exit("icl_ground.py: " + (str(error).strip() or type(error).__name__).splitlines()[0])
    except torch.OutOfMemoryError:
        sys.exit("icl_ground.py: out of GPU memory; lower --k or --batch-size")
    except KeyboardInterrupt:
        sys.exit("icl_ground.py: stopped; the same command goes on where it was")
