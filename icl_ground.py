"""Phrase grounding by retrieval-based in-context learning (Sec. 2.0.2, Fig. 1b; Tables 2 to 4).

    python icl_ground.py --image x.png --phrase "small left pleural effusion"
    python icl_ground.py --data DIR --split test --out P.jsonl     # a set: a row of Table 2
    python icl_ground.py --data DIR --encoders A B --k 20 40       # Table 2, several encoders
    python icl_ground.py --data DIR --lvlm lofi                    # Table 4; or nearest, or prior
    python icl_ground.py --data DIR --lvlm google/gemma-3-270m     # blind: a text model

The pool images most similar to the query image, by the cosine of E_I, become demonstrations: turns
of image, phrase and boxes before the query. For one image you will see JSON on stdout and an
overlay PNG, predictions solid, ground truth dashed; for a set, the columns of Table 2 next to the
phrase prior. LoFi is never taught that a finding is absent, so it predicts boxes for almost any
phrase; an answer's score, the geometric mean probability of its tokens, is not calibrated.

K demonstrations  n phrases of an image  H LLM width
boxes: (x0, y0, x1, y1), fractions of width and height; box_yxyx_1000: MedGemma's own format
"""

import argparse
import json
import sys
from pathlib import Path

MEDGEMMA = "google/medgemma-1.5-4b-it"                 # the paper's LVLM               (Sec. 2.0.4)


# ---- arguments: before the imports that take seconds, so that --help answers at once -------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to ground: one image and phrase, or a set").add_argument
    add("--image", metavar="FILE", help="a chest X-ray of any mode and size")
    add("--phrase", metavar="TEXT", help="the sentence to find on it")
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file: the set, and the "
        "pool of demonstrations (default: what --checkpoint was trained on)")
    add("--split", choices=["train", "val", "test"], default="test", help="(default: %(default)s)")
    add("--out", metavar="FILE", help="overlay of an image (default: runs/IMAGE_grounded.png), or "
        "predictions of a set, one file for each encoder and k; a stopped run continues there "
        "(default: runs/DATA_SPLIT_LVLM.jsonl, LVLM_blind with --blind)")
    add("--json", metavar="PATH", help="also write a set's scores there, as fractions")

    add = parser.add_argument_group("demonstrations").add_argument
    add("--checkpoint", default="runs/phantom", metavar="RUN", help="run folder of train.py, or a "
        "SigLIP-family id or folder (default: %(default)s)")
    add("--encoders", nargs="+", metavar="RUN", help="retrieve with each of these instead")
    add("--k", type=int, nargs="+", default=[40], metavar="K", help="demonstrations per query; "
        "Table 2: 20 40; MedGemma's row of Table 3: 0 (default: 40, the paper's best)")
    add("--pool", metavar="PATH", help="manifest whose train and val splits give the "
        "demonstrations (default: --data)")
    add("--order", choices=["similar-last", "similar-first"], default="similar-last",
        help="order of the demonstrations; not stated in the paper (default: %(default)s)")

    add = parser.add_argument_group("grounder").add_argument
    add("--lvlm", metavar="NAME", help="Gemma 3 id or folder (a text model is blind: no images); "
        "lofi: LoFi's own decoder (Table 4); nearest: the boxes of the demonstration whose phrase "
        "is closest by E_T; prior: the phrase's median training box (default: lofi if --checkpoint "
        f"is a run of the tiny preset, else {MEDGEMMA}, which is gated)")
    add("--blind", action="store_true", help="leave all images out of the prompt, to measure what "
        "the demonstrations' text and boxes carry; not in the paper")
    add("--max-new-tokens", type=int, default=512, metavar="N",
        help="maximum tokens in a reply; not stated in the paper (default: %(default)s)")
    add("--show-prompt", action="store_true", help="print the (first) prompt before the answer")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="type of the LVLM's weights; auto: bf16, on a CPU fp32 (default: auto)")
    add("--plain", action="store_true", help="one generate per phrase: slower, the same answers")
    add("--batch-size", type=int, default=16, metavar="N",
        help="phrases of an image decoded at once (default: %(default)s)")
    add("--feature-cache-gb", type=float, default=8, metavar="GB", help="CPU memory for image "
        "features, 1.3 MB per image for MedGemma in bf16; 0: no cache (default: %(default)s)")
    return parser.parse_args()


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import contextlib
import filecmp
import functools
import itertools
import os
import re
import shlex
import textwrap
import time
import zlib
from collections import defaultdict

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm
from transformers import (AutoConfig, AutoTokenizer, DynamicCache, Gemma3ForCausalLM,
                          Gemma3ForConditionalGeneration, Gemma3Processor, StopStringCriteria)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import data
import metrics
import retrieve
from metrics import InputError
from model import (Encoder, LoFi, check_checkpoint, find_device, from_all, join_processes,
                   load_pretrained, rank_and_world, read_config, say, silence_libraries)

# ---- the prompt; not stated in the paper --------------------------------------------------------
# The box format is MedGemma 1.5's own. Each demonstration is a user turn that ends with its phrase
# and an assistant turn of bare JSON.

EXAMPLE = ('{"box_2d": [640, 90, 880, 430], "label": "cup"}',
           '{"box_2d": [150, 520, 300, 610], "label": "cup"}')

INSTRUCTION = f"""\
Each query names a finding on a chest X-ray. Answer with its bounding boxes. The format of a box \
is [y0, x0, y1, x1]: (y0, x0) is the top-left corner and (y1, x1) the bottom-right corner, so \
y0 < y1 and x0 < x1. Coordinates are integers normalized to the range [0, 1000]: a box that starts \
at 15% of the image width has x0 = 150. Output a single parseable JSON list of objects, bare or in \
a ```json code block, for instance [{", ".join(EXAMPLE)}]. \
If the finding is not there, output [].

Remember that "left" is the patient's left side, which is on the right of the image."""

QUERY = "Query:\nWhere is this finding? {phrase}"

# Gemma 3's own chat format, for base models, which come without a template.
CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}\
{% for item in message['content'] %}\
{{ '<start_of_image>' if item['type'] == 'image' else item['text'] | trim }}\
{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}\
{{ '<start_of_turn>model\n' if add_generation_prompt else '' }}"""


def turns(path, phrase, demonstrations, order="similar-last", blind=False, cut=str):
    """Chat messages: the demonstrations (given most similar first), then the query. Each image
    appears once, before its first triplet; with blind, not at all. cut: shortens a long phrase."""
    groups = [list(group) for _, group in
              itertools.groupby(demonstrations, key=lambda triplet: triplet["path"])]
    if order == "similar-last":
        groups.reverse()
    messages = []
    for group in [*groups, [{"path": path, "phrase": phrase}]]:
        for triplet in group:
            # "<eos>" or an image token written in a phrase must stay plain text
            asked = re.sub(r"<(?=\w+>)", "< ", cut(triplet["phrase"]))
            text = QUERY.format(phrase=asked)
            content = [{"type": "text", "text": text if messages else f"{INSTRUCTION}\n\n{text}"}]
            if triplet is group[0] and not blind:
                content.insert(0, {"type": "image", "image": triplet["path"]})
            messages.append({"role": "user", "content": content})
            if "boxes" in triplet:
                boxes = boxes_to_yxyx_1000(triplet["boxes"], image_shape(triplet["path"]))
                text = json.dumps([{"box_2d": box, "label": asked} for box in boxes],
                                  ensure_ascii=False)
                messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return messages


def images_of(messages):
    """Paths of the images of a chat, in its order."""
    return [item["image"] for message in messages for item in message["content"]
            if item["type"] == "image"]


def chat_ids(processor, messages):
    """The ids of apply_chat_template(messages, tokenize=True), without reading images. processor: a
    multimodal one, or a text model's tokenizer."""
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    if images_of(messages):
        text = text.replace(processor.boi_token, processor.full_image_sequence)
    tokenizer = getattr(processor, "tokenizer", processor)
    has_bos = text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not has_bos)["input_ids"]


# ---- boxes: y first, 0 to 1000, of the image padded with black to a centred square --------------

@functools.lru_cache(maxsize=100_000)
def image_shape(path):
    """(width, height) of an image file; only its header is read."""
    with Image.open(path) as image:
        return image.size


def square_of(size):
    """(width, height) -> side of the square, and the offset (left, top, left, top) of a box in it,
    in pixels."""
    side = max(size)
    return side, [(side - n) // 2 for n in size] * 2


def pad_to_square(image):
    """A grey image -> RGB, padded with black to a centred square."""
    side, (left, top, *_) = square_of(image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image, (left, top))
    return square


def boxes_to_yxyx_1000(boxes, size):
    """Boxes of an image of size (width, height) -> box_yxyx_1000 integers of its padded square."""
    side, offset = square_of(size)
    corners = np.reshape(boxes, (-1, 4)) * (size * 2) + offset                     # (n, 4), pixels
    corners = np.round(1000 * corners / side).astype(int)
    low = np.minimum(corners[:, :2], 999)
    high = np.maximum(corners[:, 2:], low + 1)                                     # never empty
    return np.hstack([low[:, ::-1], high[:, ::-1]]).tolist()


def boxes_from_yxyx_1000(boxes_yxyx_1000, size):
    """The inverse, clipped to the image; a box that lies in the padding is dropped."""
    side, offset = square_of(size)
    corners = np.reshape(boxes_yxyx_1000, (-1, 4))[:, [1, 0, 3, 2]] * side / 1000  # (n, 4), pixels
    boxes = ((corners - offset) / (size * 2)).clip(0, 1).round(6).tolist()
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


# ---- replies ------------------------------------------------------------------------------------

NUMBER = r"""\s*["']?([-+]?(?:\d+\.?\d*|\.\d+))["']?\s*"""
FOUR_NUMBERS = re.compile(r"\[" + ",".join([NUMBER] * 4) + r"\]", re.ASCII)
EMPTY_LIST = re.compile(r"\[\s*\]")
# A list with inner lists one deep, or objects in a row outside a list; either may be cut off.
LIST = r"\[[^][]*(?:\[[^][]*\][^][]*)*(?:\]|(?:\[[^][]*)?\Z)"
OBJECTS = r"\{[^{}]*(?:\}[\s,]*\{[^{}]*)*(?:\}|\Z)"
THOUGHT = re.compile(r"<unused94>.*?(?:<unused95>|\Z)|\A.*<unused95>", re.DOTALL)


def parse_boxes(reply):
    """A reply -> (boxes_yxyx_1000, malformed). Never raises; an unreadable reply gives ([], True).

    Its last JSON list counts, a thinking trace does not. Decimals, swapped corners, single quotes
    and a cut-off end are read, values clipped to [0, 1000]; boxes without area, repeated ones and
    the instruction's examples, which a base model may copy, are dropped."""
    lists = [part for part in re.findall(f"{LIST}|{OBJECTS}", THOUGHT.sub("", reply))
             if "box_2d" in part or FOUR_NUMBERS.search(part) or EMPTY_LIST.fullmatch(part)]
    answer, boxes = lists[-1] if lists else "", []
    says_none = EMPTY_LIST.fullmatch(answer)
    for copied in EXAMPLE:
        answer = answer.replace(copied, "")
    for match in FOUR_NUMBERS.finditer(answer):
        y0, x0, y1, x1 = (min(1000.0, max(0.0, float(v))) for v in match.groups())
        box = [min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)]
        if box[0] < box[2] and box[1] < box[3] and box not in boxes:
            boxes.append(box)
    return boxes, not (boxes or says_none)


# ---- demonstrations -----------------------------------------------------------------------------

def with_boxes(rows):
    """The rows that have a phrase with boxes, reduced to those phrases (Sec. 3.0.1: non-empty)."""
    boxed = [{**row, "regions": [region for region in row["regions"] if region["boxes"]]}
             for row in rows]
    return [row for row in boxed if row["regions"]]


def top_triplets(queries, query_emb, rows, image_emb, k):
    """C of each query (Sec. 2.0.2): the k triplets of pool rows whose image is most similar by
    cos(E_I(I), E_I(I_p)), best first (those of one image keep their order).

    Left out are rows that hold the query's own image, by its bytes, or its patient.
    query_emb: (Q, D), image_emb: (N, D), unit length. -> Q lists of triplets, Q sets of indices."""
    alike, own, found = defaultdict(set), [], []               # rows by patient, and by file size
    for i, row in enumerate(rows):
        alike[row["patient"]].add(i)
        alike[os.path.getsize(row["path"])].add(i)
    for query in queries:
        same_size = alike[os.path.getsize(query["path"])]
        own.append(alike[query["patient"]] | {
            i for i in same_size if filecmp.cmp(query["path"], rows[i]["path"], shallow=False)})
    n = min(len(rows), k + max(map(len, own)))                 # an image has a triplet or more
    _, index = retrieve.top_k(query_emb, image_emb, n)                             # (Q, n)
    for best, left_out in zip(index.tolist(), own):
        found.append([{"image": rows[i]["image"], "path": rows[i]["path"], **region}
                      for i in best if i not in left_out for region in rows[i]["regions"]][:k])
    return found, own


def find_demonstrations(encoder, queries, query_emb, source, pool, k):
    """k triplets of each query from train and val of a pool, the rows of the manifest `source`;
    print what was left out."""
    rows = with_boxes(row for row in pool if row["split"] != "test")
    if not rows:
        raise InputError(f"{source}: no phrase with boxes in its splits train and val, to take "
                         "demonstrations from; name another manifest with --pool")
    image_emb = retrieve.image_embeddings(encoder, source, rows)
    found, own = top_triplets(queries, query_emb, rows, image_emb, k)
    say(f"pool of {encoder.source}: {len(rows):,} images of {source}, train and val; "
        f"leave-one-out: {sum(map(bool, own)):,} of {len(queries):,} query images have "
        f"{sum(map(len, own)):,} pool images of the same patient or file, which are excluded")
    if (fewest := min(map(len, found))) < k:
        say(f"note: --k {k}, but the pool has only {fewest} triplets for an image")
    return found


# ---- b = LVLM(I, s | C) (Sec. 2.0.2): a Gemma 3, greedy -----------------------------------------

class InContext:
    """A grounder: b = LVLM(I, s | C), by `plain` or by `fast`, the same replies up to rounding.

    blind: the images are left out, as for a text model. feature_cache_gb: CPU memory for the
    features of pool images, so that an image passes the vision tower once while they are kept."""

    def __init__(self, model, processor, order="similar-last", blind=False, plainly=False,
                 max_new_tokens=512, batch_size=16, feature_cache_gb=8.0):
        self.model, self.processor, self.order, self.plainly = model, processor, order, plainly
        self.tokenizer = getattr(processor, "tokenizer", processor)    # a text model has only this
        self.blind = blind or self.tokenizer is processor
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.stops = []
        if not processor.chat_template:                        # a base model knows no end of turn:
            processor.chat_template = CHAT_TEMPLATE            # its reply ends with its first list
            self.stops = [StopStringCriteria(self.tokenizer, ["}]", "]]", "[]"])]
        if not self.blind:
            n_values = model.config.mm_tokens_per_image * model.config.text_config.hidden_size
            n_images = int(feature_cache_gb * 1e9 / (n_values * model.dtype.itemsize))
            self.image_features = functools.lru_cache(n_images)(self.encode)

    def chat(self, path, phrase, demonstrations):
        """The prompt as chat messages; a phrase of hundreds of words is cut."""
        cut = functools.partial(data.cut_text, self.tokenizer)
        return turns(path, phrase, demonstrations, self.order, self.blind, cut)

    def generate(self, input_ids, **inputs):
        """Greedy decoding by transformers -> ids of the replies (n, new), padded on the right."""
        ids = self.model.generate(
            input_ids=input_ids, **inputs, do_sample=False, top_k=None, top_p=None,
            max_new_tokens=self.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=self.stops)
        return ids[:, input_ids.shape[1]:]

    @torch.inference_mode()
    def plain(self, path, phrase, demonstrations):
        """The definition: the chat with its images through the processor, then one `generate`.
        -> ids of the reply"""
        chat = self.chat(path, phrase, demonstrations)
        for item in itertools.chain(*(message["content"] for message in chat)):
            if item["type"] == "image":
                item["image"] = pad_to_square(data.load_image(item["image"]))
        inputs = self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
        return self.generate(**inputs.to(self.model.device))[0].tolist()

    # ---- the same replies, faster: the ICL overhead that Sec. 4 names ---------------------------

    @torch.inference_mode()
    def fast(self, path, phrases, demonstrations):
        """All phrases of an image: their prompts share instruction, demonstrations and image, which
        are prefilled once; then the phrases decode as one batch. -> lists of ids"""
        chats = [self.chat(path, phrase, demonstrations) for phrase in phrases]
        prompts = [chat_ids(self.processor, chat) for chat in chats]
        # The longest common prefix of whole prompts, so nothing depends on how the tokenizer merges
        # a phrase with what precedes it; at least one token is left to predict from.
        start = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
        images = images_of(chats[0])
        features = torch.cat([self.image_features(image) for image in images]).to(
            self.model.device) if images else None             # (image tokens, H)
        prefix, ids = DynamicCache(), torch.tensor([prompts[0][:start]], device=self.model.device)
        self.model(input_ids=ids, past_key_values=prefix, use_cache=True, logits_to_keep=1,
                   **self.vision_inputs(ids, 0, features))
        return [reply for i in range(0, len(prompts), self.batch_size)
                for reply in self.decode(prefix, start, prompts[i:i + self.batch_size], features)]

    def decode(self, prefix, start, prompts, features):
        """Continue the cache of a prefix of `start` tokens with n prompts -> n lists of ids.

        A batch predicts from the last position, so shorter prompts are padded on the left. The
        sliding window counts positions in the cache, so the prefix must directly precede the rest
        of its prompt: its copy for a row moves right by the row's padding. The prefix's last
        tokens, as many as there are padding tokens, no longer fit before `start` and are computed
        again."""
        pad, length = self.tokenizer.pad_token_id, max(map(len, prompts))
        shifts = [length - len(prompt) for prompt in prompts]
        ids = torch.tensor([[pad] * n + prompt for n, prompt in zip(shifts, prompts)],
                           device=self.model.device)                               # (n, length)
        position = torch.arange(length, device=ids.device)
        mask = position >= torch.tensor(shifts, device=ids.device)[:, None]        # (n, length)
        cache = DynamicCache(config=self.model.config.get_text_config())
        for i, layer in enumerate(prefix.layers):              # (1, heads, start, width) each
            # what roll() wraps around to the front lies under the padding, which is masked
            keys, values = (torch.cat([x.roll(n, dims=2) for n in shifts])
                            for x in (layer.keys, layer.values))
            cache.update(keys, values, i)                      # sliding layers keep their window
        return self.generate(ids, attention_mask=mask.long(), past_key_values=cache,
                             **self.vision_inputs(ids, start, features)).tolist()

    def vision_inputs(self, ids, start, features):
        """What a forward pass over the ids (n, length) from `start` on needs for its images.

        An image token sees the whole of its image, which token_type_ids carries for the whole
        prompt. features: (image tokens, H) of the prompt, or None; each row takes its last ones."""
        if features is None:
            return {}
        is_image = ids == self.model.config.image_token_id
        counts = is_image[:, start:].sum(1).tolist()
        seen = torch.cat([features[len(features) - n:] for n in counts])
        return {"token_type_ids": is_image.long(),
                "mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=seen)}}

    def encode(self, path):
        """An image through the vision tower and projector -> (tokens, H) on the CPU."""
        pixels = self.processor.image_processor(
            pad_to_square(data.load_image(path)), return_tensors="pt",
            do_pan_and_scan=False)["pixel_values"]                                 # (1, 3, S, S)
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixels).pooler_output[0].cpu()

    def __call__(self, rows, found):
        """Rows of the manifest and the triplets of each -> rows of the predictions file."""
        predictions = []
        for row, triplets in zip(rows, found):
            phrases = [region["phrase"] for region in row["regions"]]
            if self.plainly:
                ids = [self.plain(row["path"], phrase, triplets) for phrase in phrases]
            else:
                ids = self.fast(row["path"], phrases, triplets)
            replies = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for region, reply in zip(row["regions"], replies):
                in_square, malformed = parse_boxes(reply)
                boxes = boxes_from_yxyx_1000(in_square, image_shape(row["path"]))
                if in_square and not boxes:
                    malformed = True                           # all boxes lie in the padding
                predictions.append(prediction(row, region, boxes, malformed, reply))
        return predictions


# ---- other grounders: functions of the same rows and triplets -----------------------------------

def prediction(row, region, boxes, malformed, raw, **more):
    """A row of the predictions file."""
    return {"image": row["image"], "phrase": region["phrase"], "boxes": region["boxes"],
            "pred": boxes, "raw": raw, "malformed": malformed, **more}


IMAGES_AT_ONCE, PHRASES_AT_ONCE = 64, 128


@torch.no_grad()
def lofi_answers(model, rows, found=None):
    """LoFi's own decoder (Table 4) on up to 64 images: one vision pass, phrases in batches."""
    _, patches = model.encode_image([row["path"] for row in rows], with_patches=True)
    visual = model.visual_tokens(patches)                                          # (B, V, H)
    queries = [(i, region) for i, row in enumerate(rows) for region in row["regions"]]
    predictions = []
    for start in range(0, len(queries), PHRASES_AT_ONCE):
        batch = queries[start:start + PHRASES_AT_ONCE]
        prompts = [data.GROUNDING_PROMPT.format(phrase=region["phrase"]) for _, region in batch]
        replies, scores = model.generate(visual[[i for i, _ in batch]], prompts,
                                         model.config.answer_tokens)
        for (i, region), reply, score in zip(batch, replies, scores):
            boxes, malformed = data.text_to_boxes(reply)
            predictions.append(prediction(rows[i], region, boxes, malformed, reply,
                                          score=score))
    return predictions


def lofi_predictions(model, rows):
    """LoFi's grounding of a set (Table 4): of manifest rows, the phrases that have boxes."""
    rows = with_boxes(rows)
    starts = tqdm(range(0, len(rows), IMAGES_AT_ONCE), "ground", unit="batch")
    return [answer for i in starts for answer in lofi_answers(model, rows[i:i + IMAGES_AT_ONCE])]


def nearest_answers(encoder, rows, found):
    """Of the demonstrations, the boxes of the one whose phrase is closest by E_T, the first of
    equals. Not in the paper: a baseline for what the LVLM makes of its demonstrations."""
    phrases = sorted({item["phrase"] for row, triplets in zip(rows, found)
                      for item in [*row["regions"], *triplets]})
    embeddings = dict(zip(phrases, retrieve.text_embeddings(encoder, phrases)))    # (D,) each
    predictions = []
    for row, triplets in zip(rows, found):
        if not triplets:
            raise InputError(f"{row['image']}: the pool has no demonstration of another patient; "
                             "give a larger --pool")
        for region in row["regions"]:
            # one product per phrase, so that equal phrases tie exactly
            best = max(triplets, key=lambda triplet: float(
                embeddings[region["phrase"]] @ embeddings[triplet["phrase"]]))
            source = f"{best['image']}: {best['phrase']}"
            predictions.append(prediction(row, region, best["boxes"], False, source))
    return predictions


def prior_answers(prior, rows, found=None):
    """The phrase prior's answers, blind to the image. prior: phrase -> boxes."""
    return [prediction(row, region, prior(region["phrase"]), False, "")
            for row in rows for region in row["regions"]]


def load_grounder(lvlm, args, device, training):
    """--lvlm -> a grounder; None for nearest, whose encoder is loaded later. Raises InputError."""
    if lvlm == "lofi":
        return functools.partial(lofi_answers, LoFi.from_pretrained(args.checkpoint, device))
    if lvlm == "prior":
        return functools.partial(prior_answers, metrics.phrase_prior(training))
    if lvlm == "nearest":
        return None
    in_fp32 = args.precision == "fp32" or args.precision == "auto" and device.type == "cpu"
    other = "nearest" if args.encoders or not read_config(args.checkpoint) else "lofi"
    flags = [flag for flag in sys.argv[1:] if flag not in ("--blind", "--plain", "--show-prompt")]
    hint = f"; without it: python icl_ground.py {shlex.join([*flags, '--lvlm', other])}"
    is_text = load_pretrained(AutoConfig, lvlm, hint).model_type == "gemma3_text"
    processor = load_pretrained(AutoTokenizer if is_text else Gemma3Processor, lvlm, hint)
    model = load_pretrained(Gemma3ForCausalLM if is_text else Gemma3ForConditionalGeneration, lvlm,
                            hint, attn_implementation="sdpa",
                            dtype=torch.float32 if in_fp32 else torch.bfloat16)
    return InContext(model.to(device).eval(), processor, args.order, args.blind, args.plain,
                     args.max_new_tokens, args.batch_size, args.feature_cache_gb)


# ---- the picture of an answer -------------------------------------------------------------------

TURQUOISE = "#35e0c8"                                      # ground truth


def dashed(pen, x0, y0, x1, y1, colour, dash=12):
    """A rectangle of dashes, for the ground truth."""
    for x in range(round(x0), round(x1), 2 * dash):
        for y in (y0, y1):
            pen.line((x, y, min(x + dash, x1), y), colour, 4)
    for y in range(round(y0), round(y1), 2 * dash):
        for x in (x0, x1):
            pen.line((x, y, x, min(y + dash, y1)), colour, 4)


def outcome(answer):
    """A short status for captions and messages."""
    words = ("malformed reply, no box" if answer["malformed"] else
             "predicted" if answer["pred"] else "no box predicted")
    return words + (f", score {answer['score']:.2f}" if "score" in answer else "")


def overlay(image, answers, longest=768):
    """A grey image and its answers, rows of the predictions file -> PIL "RGB": predictions solid,
    ground truth dashed, as in Figs. 2 and 3; each phrase in its colour, written below the image."""
    size = [max(1, round(n * longest / max(image.size))) for n in image.size]
    coloured, labels = list(zip(answers, itertools.cycle(data.COLOURS))), []
    for answer, colour in coloured:
        text = f"{answer['phrase']} ({outcome(answer)})"
        labels += [(line, colour) for line in textwrap.wrap(text, max(12, size[0] // 11))]
    if any(answer["boxes"] for answer in answers):
        labels.append(("dashed: ground truth", TURQUOISE))
    sheet = Image.new("RGB", (size[0], size[1] + 26 * len(labels) + 12))
    sheet.paste(image.resize(size))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for n, (text, colour) in enumerate(labels):
        pen.text((8, size[1] + 6 + 26 * n), text, colour, font)
    for answer, colour in coloured:
        for box in answer["pred"]:
            pen.rectangle([v * (n - 1) for v, n in zip(box, size * 2)], outline=colour, width=4)
        for box in answer["boxes"]:
            dashed(pen, *(v * (n - 1) for v, n in zip(box, size * 2)), TURQUOISE)
    return sheet


# ---- a set --------------------------------------------------------------------------------------

def count_answered(out, rows, settings):
    """Prepare a predictions file to continue -> how many of the set's phrases it answers.

    A half-written last line is dropped. The settings are kept in a file next to it. Raises
    InputError, before a file is changed, unless both files are of this command and these settings;
    then if the answers are not those of the set's first phrases."""
    kept, before = out.with_suffix(".settings.json"), settings
    if kept.exists() or out.stat().st_size:
        try:
            before = dict(json.loads(kept.read_text()))
        except (OSError, ValueError, TypeError):
            before = {}
        if before.keys() != settings.keys():
            raise InputError(f"{out}: cannot be continued: {kept} is missing, damaged or not of "
                             "this command; choose another --out")
    differ = [key for key in settings if settings[key] != before[key]]
    if differ and out.stat().st_size:
        was, now = ({key: of[key] for key in differ} for of in (before, settings))
        raise InputError(f"{out}: was made with {was}, now {now}; use the same flags, or choose "
                         "another --out")
    metrics.write_json(kept, settings)
    os.truncate(out, out.read_bytes().rfind(b"\n") + 1)
    answers = metrics.read_predictions(out) if out.stat().st_size else []
    asked = ((row["image"], region["phrase"]) for row in rows for region in row["regions"])
    for n, answer in enumerate(answers, 1):
        if (answer["image"], answer["phrase"]) != next(asked, None):
            raise InputError(f"{out}:{n}: {answer['phrase']!r:.60} on {answer['image']} is a "
                             "duplicate or not the next phrase of this set; choose another --out")
    return len(answers)


def ground_set(rows, ground, found, out, settings):
    """Ground each phrase of each row, appending to a predictions file what it does not have yet.

    found: the triplets of each row. Under torchrun the processes share the images in rounds, and
    only rank 0 reads and writes the file. -> what --json holds, on rank 0. Raises InputError."""
    began, (rank, world) = time.time(), rank_and_world()
    out.parent.mkdir(parents=True, exist_ok=True)
    with metrics.lock(out) if rank == 0 else contextlib.nullcontext() as file:
        n_answered = from_all(count_answered(out, rows, settings) if rank == 0 else 0)[0]
        if n_answered:
            say(f"{out}: resuming, {n_answered:,} phrases are already answered")
        jobs = []                                              # rows with the phrases that are left
        for row, triplets in zip(rows, found):
            if left := row["regions"][n_answered:]:
                jobs.append(({**row, "regions": left}, triplets))
            n_answered = max(0, n_answered - len(row["regions"]))
        n = 1 if isinstance(ground, InContext) else IMAGES_AT_ONCE
        bar = tqdm(range(0, len(jobs), n * world), out.stem, unit="round", disable=rank > 0)
        n_malformed = 0
        for start in bar:
            share = jobs[start + n * rank:start + n * (rank + 1)]
            answers = sum(from_all(ground(*zip(*share)) if share else []), [])
            n_malformed += sum(answer["malformed"] for answer in answers)
            bar.set_postfix(malformed=n_malformed, refresh=False)
            if rank == 0:
                file.write("".join(json.dumps(answer) + "\n" for answer in answers))
                file.flush()
    if rank == 0:
        predictions = metrics.read_predictions(out)
        return {"grounding": metrics.grounding_metrics(predictions),
                "intervals": metrics.bootstrap(predictions), "n_images": len(rows),
                "seconds": round(time.time() - began, 1)}


def with_prior(results, rows, training):
    """{model: {"grounding": .., ..}} of the phrases of rows -> the same with the "prior" of the
    training rows, if they have boxes, and Tables 2 to 4 as text."""
    table = dict(results)
    if with_boxes(training):
        prior = metrics.grounding_metrics(
            prior_answers(metrics.phrase_prior(training), with_boxes(rows)))
        table["phrase prior"] = {"grounding": prior}
        results = {name: {**result, "prior": prior} for name, result in results.items()}
    return results, metrics.grounding_table(table)


# ---- the command --------------------------------------------------------------------------------

def check_args(args):
    """Reject invalid flags before anything is loaded. Raises InputError."""
    metrics.check_ranges(args, {
        "k": (1 if args.lvlm == "nearest" else 0, np.inf), "max_new_tokens": (1, 1e6),
        "batch_size": (1, 1e6), "feature_cache_gb": (0, 1e6)})
    suffix = ".png" if args.image else ".jsonl"
    for wrong, problem in (                                    # (condition of an error, message)
            (bool(args.image) != bool((args.phrase or "").strip()),
             "--image and --phrase go together: an image, and the sentence to find on it"),
            (args.lvlm in ("nearest", "prior") and args.show_prompt,
             f"--show-prompt: --lvlm {args.lvlm} sends no prompt"),
            (args.lvlm in ("lofi", "nearest", "prior") and (args.blind or args.plain),
             f"--blind and --plain are for a Gemma 3, not for --lvlm {args.lvlm}"),
            (args.image and (len(args.k) > 1 or len(args.encoders or []) > 1),
             "--image takes one --k and one encoder; several are for a set"),
            (args.out and Path(args.out).suffix != suffix, f"--out: expected a {suffix} file"),
            (args.json and args.image, "--json is for a set's scores, not for --image")):
        if wrong:
            raise InputError(problem)
    if args.image:
        data.load_image(args.image)


def default_lvlm(args):
    """MedGemma, or LoFi's own decoder if --checkpoint is a run of the tiny preset."""
    for_gemma = args.encoders or args.pool or args.blind or args.plain
    config = None if for_gemma else read_config(args.checkpoint)
    if not config or config.preset != "tiny":
        return MEDGEMMA
    print(f"icl_ground.py: {args.checkpoint} is a miniature run, so its own decoder answers "
          f"(--lvlm lofi); to ask MedGemma, with demonstrations: --lvlm {MEDGEMMA}",
          file=sys.stderr)
    return "lofi"


def query_rows(args, source, manifest):
    """The queries, as rows of the manifest: the boxed phrases of a split; or --phrase of --image,
    with the boxes and the patient that they have in the manifest, if any. Raises InputError."""
    if args.image:
        row = data.find_row(manifest, args.image) or {"patient": None, "regions": []}
        truth = [box for region in row["regions"] if region["phrase"] == args.phrase
                 for box in region["boxes"]]
        return [{**row, "image": args.image, "path": args.image,
                 "regions": [{"phrase": args.phrase, "boxes": truth}]}]
    of_split = [row for row in manifest if row["split"] == args.split]
    rows = with_boxes(of_split)
    if not rows:
        raise InputError(f"{source}: no phrase with boxes in split {args.split!r}; expected "
                         'rows with "regions"')
    n_phrases, n_all = (sum(len(row["regions"]) for row in part) for part in (rows, of_split))
    say(f"{n_phrases:,} phrases with boxes on {len(rows):,} images of {source}, {args.split}; "
        f"{n_all - n_phrases:,} phrases without boxes are left out")
    return rows


def shown_prompt(ground, row, demonstrations):
    """The prompt of a row's first phrase as text, with a note for the tokens of each image."""
    phrase = row["regions"][0]["phrase"]
    if not isinstance(ground, InContext):
        return data.GROUNDING_PROMPT.format(phrase=phrase)
    chat = ground.chat(row["path"], phrase, demonstrations)
    text = ground.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    paths = iter(images_of(chat))
    return re.sub("<start_of_image>", lambda token: (
        f"{token[0]}[{ground.processor.image_seq_length} image tokens: {next(paths)}]"), text)


def settings_of(args, lvlm, ground, source, pool, checkpoint, k):
    """What predictions depend on; a run may be trained again, a manifest written again."""
    weights = Path(checkpoint, "model.safetensors")
    settings = {"lvlm": lvlm, "split": args.split, "order": args.order, "k": k,
                "data": str(Path(source).resolve()), "pool": str(Path(pool).resolve()),
                "manifests": [zlib.crc32(data.manifest_path(path).read_bytes())
                              for path in (source, pool)], "encoder": checkpoint,
                "weights": zlib.crc32(weights.read_bytes()) if weights.exists() else None}
    if isinstance(ground, InContext):
        settings |= {"blind": ground.blind, "dtype": str(ground.model.dtype),
                     "max_new_tokens": ground.max_new_tokens}
    return settings


def print_answer(answer, out, **more):
    """Write the overlay of an answer and print it as JSON, with boxes in pixels too."""
    if not answer["pred"]:
        print(f"icl_ground.py: {outcome(answer)}, for {answer['phrase']!r:.100} on "
              f"{answer['image']}", file=sys.stderr)
    image = data.load_image(answer["image"])
    metrics.write_file(out, lambda draft: overlay(image, [answer]).save(draft, "PNG"))
    boxes, truth = answer.pop("pred"), answer.pop("boxes")
    pixels = [[round(v * n) for v, n in zip(box, image.size * 2)] for box in boxes]
    print(json.dumps({**answer, "boxes": boxes, "pixels": pixels, "overlay": str(out), **more,
                      **({"ground_truth": truth} if truth else {})}))


def main(args=None):
    args = args or parse_args()
    silence_libraries()
    check_args(args)
    began, device = time.time(), find_device(args.device)
    rank, _ = join_processes()

    # ---- defaults that follow from other flags; a missing run is named before missing weights
    lvlm = args.lvlm or default_lvlm(args)
    encoders, ks = args.encoders or [args.checkpoint], args.k
    if lvlm in ("lofi", "prior") or not any(ks):               # no demonstrations
        encoders, ks = [args.checkpoint], [0]
    for encoder in encoders if any(ks) else []:
        check_checkpoint(encoder)
    try:
        source = args.data or retrieve.trained_on(args.checkpoint)
    except InputError:
        if any(ks) or lvlm == "prior" or not args.image:
            raise
        source = None                                          # LoFi, and k 0, need only the image
    manifest = data.read_manifest(source) if source else []
    pool = args.pool or source
    pool_rows = data.read_manifest(pool) if args.pool else manifest
    training = [row for row in manifest if row["split"] == "train"]
    rows = query_rows(args, source, manifest)
    if args.image:
        out = Path(args.out or f"runs/{Path(args.image).stem}_grounded.png")
    else:
        folder = data.manifest_path(source).resolve().parent.name
        name = Path(lvlm).name + ("_blind" if args.blind else "")
        out = Path(args.out or f"runs/{folder}_{args.split}_{name}.jsonl")
    retrieve.check_outputs({".json": args.json, out.suffix: out}, [args.image, source, pool],
                           manifest + pool_rows, [args.checkpoint, *encoders, lvlm])

    # ---- the grounder, before images are embedded: an LVLM's weights may be missing
    ground = load_grounder(lvlm, args, device, training)
    title = Path(lvlm).name + (" (blind)" if getattr(ground, "blind", False) else "")

    # ---- demonstrations and answers, with each encoder and k
    results, files = {}, []
    for checkpoint in encoders:
        found = [[] for _ in rows]
        with contextlib.redirect_stdout(sys.stderr if args.image else sys.stdout):
            if any(ks):
                encoder = Encoder.load(checkpoint, device)
                query_emb = (encoder.encode_image(args.image).cpu() if args.image else
                             retrieve.image_embeddings(encoder, source, rows))     # (Q, D)
                found = find_demonstrations(encoder, rows, query_emb, pool, pool_rows, max(ks))
                if lvlm == "nearest":
                    ground = functools.partial(nearest_answers, encoder)
            if args.show_prompt:
                say(shown_prompt(ground, rows[0], found[0][:ks[0]]))
            if args.image:
                [answer] = ground(rows, found)                 # InContext.__call__ for an LVLM
        if args.image:
            print_answer(answer, out, lvlm=lvlm, n_demonstrations=len(found[0]))
            command = ["--lvlm", lvlm, "--checkpoint", checkpoint, "--data", str(source or "DIR")]
            print(f"wrote {out}; next, a set: python icl_ground.py {shlex.join(command)}",
                  file=sys.stderr)
            return
        for k in ks:
            several = len(encoders) * len(ks) > 1
            part = "_" + re.sub(r"[^\w.-]+", "_", checkpoint).strip("_") + f"_k{k}"
            files.append(out.with_stem(out.stem + part) if several else out)
            results[f"{title}, {checkpoint}, k={k}" if any(ks) else title] = ground_set(
                rows, ground, [triplets[:k] for triplets in found], files[-1],
                settings_of(args, lvlm, ground, source, pool, checkpoint, k))
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return

    # ---- the table
    results, table = with_prior(results, rows, training if lvlm != "prior" else [])
    print(f"\ngrounding, % [95 % interval over images]\n{table}")
    for name, result in results.items():
        print("{}: {n_malformed:,} of {n_queries:,} replies are malformed".format(
            name, **result["grounding"]))
    if args.json:
        metrics.write_json(args.json, results if len(results) > 1 else results[name])
    print(f"\n{time.time() - began:.0f} s in total. Next: python metrics.py "
          + shlex.join(map(str, files)))


if __name__ == "__main__":
    metrics.run_command(main, ARGS, interrupted="stopped; the same command continues where it was")
