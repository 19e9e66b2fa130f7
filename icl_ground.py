"""Phrase grounding by retrieval-based in-context learning (Sec. 2.0.2, Fig. 1b; Tables 2 to 4).

    python icl_ground.py --image x.png --phrase "small left pleural effusion"
    python icl_ground.py --data DIR --split test                   # a set: a row of Table 2, or,
                                                                   # of a miniature run, of Table 4
    python icl_ground.py --data DIR --encoders A B --k 20 40       # Table 2, several encoders
    python icl_ground.py --data DIR --lvlm lofi                    # Table 4; or nearest, or prior
    python icl_ground.py --data DIR --lvlm google/gemma-3-270m     # blind: a text model

The pool images most similar to the query image, by the cosine of E_I, become demonstrations: turns
of image, phrase and boxes before the query. For one image you will see JSON on stdout and a PNG,
the answer beside its nearest demonstrations; for a set, the columns of Table 2 next to the phrase
prior. Almost any phrase gets boxes; an answer's "similarity", larger where the phrase fits the
image, is cos(E_I(I), E_T(phrase)) minus that of the empty text.

Below: demonstrations, prompt, box format, replies, the grounder (`plain`, then `fast`), baselines.
The method ends there; then pictures, sets, arguments and main. The letters are model.py's;
box_yxyx_1000 is MedGemma's own box format.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm
from transformers import (AutoConfig, AutoProcessor, AutoTokenizer, DynamicCache, Gemma3ForCausalLM,
                          Gemma3ForConditionalGeneration, Gemma3Processor, StopStringCriteria)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import data
import metrics
import retrieve
from data import InputError, image_shape
from model import (DualEncoder, LoFi, check_checkpoint, find_device, from_all, is_run,
                   join_processes, load_pretrained, rank_and_world, say, silence_libraries)

MEDGEMMA = "google/medgemma-1.5-4b-it"                 # the paper's LVLM               (Sec. 2.0.4)
CACHED_IMAGES = 6000                                   # 8 GB of features of MedGemma in bf16

# ---- demonstrations -----------------------------------------------------------------------------

def with_boxes(rows):
    """The rows that have a phrase with boxes, reduced to those phrases (Sec. 3.0.1: non-empty)."""
    boxed = [{**row, "regions": [region for region in row["regions"] if region["boxes"]]}
             for row in rows]
    return [row for row in boxed if row["regions"]]


def top_triplets(queries, query_emb, rows, image_emb, k, one_manifest=True):
    """The demonstrations C of each query (Sec. 2.0.2): the k triplets of pool rows whose image is
    most similar by cos(E_I(I), E_I(I_p)), best first (those of one image keep their order).

    Left out are rows of the query's own file and, if queries and rows are of one manifest, of its
    patient (not stated in the paper). query_emb: (Q, D), image_emb: (N, D), unit length.
    -> Q lists of triplets, Q sets of the indices left out."""
    of_patient, of_file = defaultdict(set), defaultdict(set)
    for i, row in enumerate(rows):
        of_patient[row["patient"]].add(i)
        of_file[file_id(row["path"])].add(i)
    excluded, found = [], []
    for query in queries:
        patient = of_patient[query["patient"]] if one_manifest else set()
        excluded.append(of_file[file_id(query["path"])] | patient)
    n = min(len(rows), k + max(map(len, excluded)))            # an image has a triplet or more
    cosine, index = retrieve.top_k(query_emb, image_emb, n)                        # (Q, n)
    for cosines, best, left_out in zip(cosine.tolist(), index.tolist(), excluded):
        triplets = []
        for value, i in zip(cosines, best):
            if i not in left_out:
                triplets += [{"image": rows[i]["image"], "path": rows[i]["path"],
                              "cosine": round(value, 4), **region} for region in rows[i]["regions"]]
        found.append(triplets[:k])
    return found, excluded


def file_id(path):
    """Device and inode, equal for two paths of one file."""
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def find_demonstrations(encoder, queries, query_emb, source, pool, k, one_manifest=True):
    """k triplets of each query from train and val of a pool, the rows of the manifest `source`
    (both are the paper's pool, inferred); print what was left out."""
    rows = with_boxes(row for row in pool if row["split"] != "test")
    if not rows:
        raise InputError(f"{source}: no phrase with boxes in its splits train and val, to take "
                         "demonstrations from; name another manifest with --pool")
    image_emb = retrieve.image_embeddings(encoder, source, rows)
    found, excluded = top_triplets(queries, query_emb, rows, image_emb, k, one_manifest)
    say(f"pool of {encoder.source}: {len(rows):,} images of {source}, train and val; "
        f"leave-one-out: {sum(map(bool, excluded)):,} of {len(queries):,} query images have "
        f"{sum(map(len, excluded)):,} pool images of the same patient or file, which are excluded")
    if (fewest := min(map(len, found))) < k:
        say(f"note: --k {k}, but the pool has only {fewest} triplets for an image")
    return found


def add_similarity(encoder, rows, image_emb):
    """Give each phrase of the rows its "similarity" to their images. image_emb: (rows, D)."""
    phrases = sorted({region["phrase"] for row in rows for region in row["regions"]})
    *text_emb, empty = retrieve.text_embeddings(encoder, [*phrases, ""])           # (D,) each
    offset = {phrase: emb - empty for phrase, emb in zip(phrases, text_emb)}
    return [{**row, "regions": [
        {**region, "similarity": round(float(emb @ offset[region["phrase"]]), 4)}
        for region in row["regions"]]} for row, emb in zip(rows, image_emb.cpu())]


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


def turns(path, phrase, demonstrations, blind=False):
    """Chat messages: the demonstrations (given most similar first), the most similar image last,
    then the query. Each image appears once, before its first triplet; with blind, not at all."""
    groups = [list(group) for _, group in
              itertools.groupby(demonstrations, key=lambda triplet: triplet["path"])]
    messages = []
    for group in [*reversed(groups), [{"path": path, "phrase": phrase}]]:
        for triplet in group:
            # "<eos>" or an image token written in a phrase must stay plain text
            asked = re.sub(r"<(?=\w+>)", "< ", triplet["phrase"])
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
NOTHING = re.compile(r"""\[(?:null|none|-1|\.?0|[\s,])*\]|box_2d\W*n(?:ull|one)""", re.I)
THOUGHT = re.compile(r"<unused94>.*?(?:<unused95>|\Z)|\A.*<unused95>", re.DOTALL)
BETWEEN = re.compile(r"""(?:[^{}]*\})?(?:"[^"]*"|'[^']*'|box_2d|label|json|and|\d|[^\w"'])*""")


def parse_boxes(reply):
    """A reply -> (boxes_yxyx_1000, malformed). Never raises; an unreadable reply gives ([], True).

    Boxes without prose between them are one answer; the last one counts, a thinking trace does
    not. Decimals, fractions, swapped corners, single quotes and a cut-off end are read,
    values clipped to [0, 1000]; boxes without area, repeated ones and the instruction's examples,
    which a base model may copy, are dropped. [], null and zeros mean that nothing is there."""
    text, answers, end = THOUGHT.sub("", reply), [[]], 0
    for copied in EXAMPLE:
        text = text.replace(copied, "{}")
    for match in FOUR_NUMBERS.finditer(text):
        if not BETWEEN.fullmatch(text[end:match.start()]) and answers[-1]:
            answers.append([])
        answers[-1].append([float(v) for v in match.groups()])
        end = match.end()
    answer = next((boxes for boxes in reversed(answers) if has_area(boxes)), [])
    scale = 1000 if max(itertools.chain([0], *answer)) <= 1 else 1     # fractions of the image
    kept = []
    for values in answer:
        y0, x0, y1, x1 = (min(1000.0, max(0.0, scale * v)) for v in values)
        box = [min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)]
        if has_area([box]) and box not in kept:
            kept.append(box)
    return kept, not (kept or NOTHING.search(text))


def has_area(boxes):
    return any(box[0] != box[2] and box[1] != box[3] for box in boxes)


# ---- b = LVLM(I, s | C) (Sec. 2.0.2): a Gemma 3, greedy -----------------------------------------

class InContext:
    """A grounder: b = LVLM(I, s | C), by `plain` or by `fast`, the same replies up to rounding.

    blind: the images are left out, as for a text model."""

    def __init__(self, model, processor, blind=False, plainly=False, max_new_tokens=512,
                 batch_size=16):
        self.model, self.processor, self.plainly = model, processor, plainly
        self.tokenizer = getattr(processor, "tokenizer", processor)    # a text model has only this
        self.blind = blind or self.tokenizer is processor
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.stops = []
        if not processor.chat_template:                        # a base model knows no end of turn:
            processor.chat_template = CHAT_TEMPLATE            # its reply ends with its first list
            self.stops = [StopStringCriteria(self.tokenizer, ["}]", "]]", "[]"])]
        # an image of the pool passes the vision tower once in a run
        self.image_features = functools.lru_cache(CACHED_IMAGES)(self.encode)

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
        chat = turns(path, phrase, demonstrations, self.blind)
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
        chats = [turns(path, phrase, demonstrations, self.blind) for phrase in phrases]
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

        Rows end at one position, so a shorter prompt gets padding on its left, and its copy of the
        prefix moves right by as much. What moves past `start` is computed again:

            padding 2, start 4:  cache [.. .. p0 p1]  ids from position 4 on: p2 p3 q4 q5"""
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

def prediction(row, region, boxes, malformed, raw):
    """A row of the predictions file. region: phrase, boxes and perhaps similarity."""
    return {"image": row["image"], **region, "pred": boxes, "raw": raw, "malformed": malformed}


IMAGES_AT_ONCE, PHRASES_AT_ONCE = 64, 128


@torch.no_grad()
def lofi_answers(model, rows, found=None):
    """LoFi's own decoder (Table 4) on up to 64 images: one vision pass, phrases in batches."""
    image_emb, patches = model.encode_image([row["path"] for row in rows], with_patches=True)
    visual = model.visual_tokens(patches)                                          # (B, V, H)
    rows = add_similarity(model, rows, image_emb)
    queries = [(i, region) for i, row in enumerate(rows) for region in row["regions"]]
    predictions = []
    for start in range(0, len(queries), PHRASES_AT_ONCE):
        batch = queries[start:start + PHRASES_AT_ONCE]
        prompts = [data.GROUNDING_PROMPT.format(phrase=region["phrase"]) for _, region in batch]
        replies = model.generate(visual[[i for i, _ in batch]], prompts)
        for (i, region), reply in zip(batch, replies):
            boxes, malformed = data.text_to_boxes(reply)
            predictions.append(prediction(rows[i], region, boxes, malformed, reply))
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


def load_grounder(lvlm, args, device, encoder, training):
    """--lvlm -> a function of rows and their triplets that answers. Raises InputError."""
    if lvlm == "lofi":
        is_own = isinstance(encoder, LoFi) and encoder.source == str(args.checkpoint)
        model = encoder if is_own else LoFi.from_pretrained(args.checkpoint, device)
        return functools.partial(lofi_answers, model)
    if lvlm == "nearest":
        return functools.partial(nearest_answers, encoder)
    if lvlm == "prior":
        return functools.partial(prior_answers, metrics.phrase_prior(training))
    in_fp32 = args.precision == "fp32" or args.precision == "auto" and device.type == "cpu"
    is_text = load_pretrained(AutoConfig, lvlm).model_type == "gemma3_text"
    processor = load_pretrained(AutoTokenizer if is_text else Gemma3Processor, lvlm)
    model = load_pretrained(Gemma3ForCausalLM if is_text else Gemma3ForConditionalGeneration, lvlm,
                            attn_implementation="sdpa",
                            dtype=torch.float32 if in_fp32 else torch.bfloat16)
    return InContext(model.to(device).eval(), processor, args.blind, args.plain,
                     args.max_new_tokens, args.batch_size)


# ==================================================================================================
# The method ends here. Below: the picture of an answer, sets and their files, arguments and main.
# ==================================================================================================

# ---- the picture of an answer (Fig. 1b) ---------------------------------------------------------

def outcome(answer):
    """A short status for captions and messages."""
    words = ("malformed reply, no box" if answer["malformed"] else
             "predicted" if answer["pred"] else "no box predicted")
    return words + (f", similarity {answer['similarity']:.2f}" if "similarity" in answer else "")


def answer_cell(image, answer):
    """An image with its answer, a row of the predictions file: prediction solid, ground truth
    dashed, as in Figs. 2 and 3 -> PIL "RGB"."""
    regions = [{"phrase": "predicted", "boxes": answer["pred"]},
               {"phrase": "ground truth", "boxes": answer["boxes"], "dashed": True}]
    return data.cell(image, regions, f"{outcome(answer)}\nquery: {answer['phrase']}", "orange")


def figure(image, answer, demonstrations):
    """The query with its answer and, beside it, its four nearest demonstration images with their
    phrases and boxes, as in Fig. 1b -> PIL "RGB"."""
    cells = [answer_cell(image, answer)]
    groups = itertools.groupby(demonstrations, key=lambda triplet: triplet["path"])
    for path, group in itertools.islice(groups, 4):
        triplets = list(group)
        caption = f"demonstration {len(cells)}, cosine {triplets[0]['cosine']:.3f}"
        cells.append(data.cell(data.load_image(path), triplets, caption))
    return data.tile(cells, 5)


# ---- a set --------------------------------------------------------------------------------------

def ground_set(rows, ground, found, out, is_fresh, by):
    """Ground each phrase of each row, appending to a predictions file those that it does not have
    yet; a file that is not fresh is started again. found: the triplets of each row; by: who
    answers, and how, as text.

    Under torchrun the processes share the images in rounds, and only rank 0 reads and writes the
    file. -> what --json holds, on rank 0."""
    began, (rank, world) = time.time(), rank_and_world()
    known = read_answers(out, is_fresh, by) if rank == 0 else {}
    known = from_all(known)[0]                                 # {(image, phrase): answer}
    jobs = []                                                  # rows with the phrases that are left
    for row, triplets in zip(rows, found):
        left = [region for region in row["regions"]
                if known.get((row["image"], region["phrase"]), {}).get("boxes") != region["boxes"]]
        if left:
            jobs.append(({**row, "regions": left}, triplets))
    n = 1 if isinstance(ground, InContext) else IMAGES_AT_ONCE
    bar = tqdm(range(0, len(jobs), n * world), out.stem, unit="round", disable=rank > 0)
    with open(out, "a") if rank == 0 else contextlib.nullcontext() as file:
        for start in bar:
            share = jobs[start + n * rank:start + n * (rank + 1)]
            rows_of_share, found_of_share = [row for row, _ in share], [c for _, c in share]
            answers = ground(rows_of_share, found_of_share) if share else []
            for answer in itertools.chain(*from_all(answers)):
                known[answer["image"], answer["phrase"]] = answer
                if rank == 0:
                    print(json.dumps({**answer, "by": by}), file=file, flush=True)
            bar.set_postfix(malformed=sum(a["malformed"] for a in known.values()), refresh=False)
    if rank > 0:
        return {}
    predictions = [known[row["image"], region["phrase"]]
                   for row in rows for region in row["regions"]]
    return {"grounding": metrics.grounding_metrics(predictions),
            "intervals": metrics.bootstrap(predictions), "n_images": len(rows),
            "seconds": round(time.time() - began, 1)}


def read_answers(out, is_fresh, by):
    """The answers that a predictions file holds -> {(image, phrase): its row}; {} if it is older
    than the weights or a manifest. A half-written last line is dropped. Raises InputError if it is
    not a predictions file, or was made in another way."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = out.read_bytes().splitlines(keepends=True) if out.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        made_by = {str(json.loads(line)["by"]) for line in whole}
    except (ValueError, TypeError, LookupError):
        made_by = {"another program"}
    if lines and not lines[0].startswith(b'{"image": '):
        made_by = {"another program"}
    if others := made_by - {by}:
        raise InputError(f"{out}: was written by {min(others)}, not by {by}; name another file "
                         "with --out")
    if whole and not is_fresh:
        print(f"{out}: older than the weights or the manifest, started again")
        whole = []
    if lines:
        os.truncate(out, sum(map(len, whole)))
    if not whole:
        return {}
    print(f"{out}: {len(whole):,} phrases are already answered")
    return {(row["image"], row["phrase"]): row for row in metrics.read_predictions(out)}


def predictions_file(args, checkpoint, lvlm, k, source, is_one_of_several):
    """--out, or RUN/SPLIT_LVLM_kK.jsonl -> the file, and what its answers depend on, as text."""
    name = Path(lvlm).name + ("_blind" if args.blind else "")
    out = retrieve.results_folder(checkpoint) / f"{args.split}_{name}_k{k}.jsonl"
    if args.out:
        out = Path(args.out)
    if args.out and is_one_of_several:
        part = re.sub(r"[^\w.-]+", "_", checkpoint).strip("_")
        out = out.with_stem(f"{out.stem}_{part}_k{k}")
    own, pool = (data.manifest_path(path).resolve() for path in (source, args.pool or source))
    model = Path(lvlm).resolve() if Path(lvlm).exists() else lvlm
    by = (f"{model}{' blind' if args.blind else ''}, k {k}, data {own} {args.split}, pool {pool}, "
          f"at most {args.max_new_tokens} tokens" + (f", encoder {checkpoint}" if args.out else ""))
    return out, by


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


# ---- arguments and main -------------------------------------------------------------------------

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to ground: one image and phrase, or a set").add_argument
    add("--image", metavar="FILE", help="a chest X-ray of any mode and size")
    add("--phrase", metavar="TEXT", help="the sentence to find on it")
    add("--data", metavar="PATH", help="folder with manifest.jsonl, or that file: the set, and the "
        "pool of demonstrations (default: what --checkpoint was trained on)")
    add("--split", choices=["train", "val", "test"], default="test",
        help="rows to ground (default: %(default)s)")
    add("--out", metavar="FILE", help="picture of an image's answer (default: in runs/), or "
        "predictions of a set, one file for each encoder and k; a stopped run continues there "
        "(default: RUN/SPLIT_LVLM_kK.jsonl)")
    add("--json", metavar="PATH", help="also write a set's scores there, as fractions")

    add = parser.add_argument_group("demonstrations").add_argument
    add("--checkpoint", default="runs/phantom", metavar="RUN", help="run folder of train.py, or a "
        "SigLIP-family id or folder (default: %(default)s)")
    add("--encoders", nargs="+", metavar="RUN", help="retrieve with each of these instead")
    add("--k", type=int, nargs="+", default=[40], metavar="K", help="demonstrations per query; "
        "Table 2: 20 40; MedGemma's row of Table 3: 0 (default: 40, the paper's best)")
    add("--pool", metavar="PATH", help="manifest whose train and val splits give the "
        "demonstrations (default: --data)")

    add = parser.add_argument_group("grounder").add_argument
    add("--lvlm", metavar="NAME", help="Gemma 3 id or folder (a text model is blind: no images); "
        "lofi: LoFi's own decoder (Table 4); nearest: the boxes of the demonstration whose phrase "
        "is closest by E_T; prior: the phrase's median training box (default: lofi if --checkpoint "
        f"is a run of the tiny preset, else {MEDGEMMA}, which is gated)")
    add("--blind", action="store_true", help="leave all images out of the prompt, to measure what "
        "the demonstrations' text and boxes carry; not in the paper")
    add("--max-new-tokens", type=int, default=512, metavar="N",
        help="maximum tokens in a reply; not stated in the paper (default: %(default)s)")
    add("--show-prompt", action="store_true", help="print the (first) prompt of MedGemma before "
        "the answer, also where its weights are missing")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="cuda, cuda:1, cpu (default: cuda if there is one)")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto",
        help="type of the LVLM's weights; auto: bf16, on a CPU fp32 (default: auto)")
    add("--plain", action="store_true", help="one generate per phrase: slower, the same answers")
    add("--batch-size", type=int, default=16, metavar="N",
        help="phrases of an image decoded at once (default: %(default)s)")
    return parser.parse_args()


def check_args(args):
    """Reject invalid flags before anything is loaded. Raises InputError."""
    data.check_ranges(args, {"k": (1 if args.lvlm == "nearest" else 0, np.inf),
                             "max_new_tokens": (1, 1e6), "batch_size": (1, 1e6)})
    if bool(args.image) != bool((args.phrase or "").strip()):
        raise InputError("--image and --phrase go together: an image, and the sentence to find on "
                         "it")
    if args.image and (len(args.k) > 1 or len(args.encoders or []) > 1 or args.json):
        raise InputError("--image takes one --k, one encoder and no --json; those are for a set")
    if args.lvlm in ("lofi", "nearest", "prior") and (args.blind or args.plain):
        raise InputError(f"--blind and --plain are for a Gemma 3, not for --lvlm {args.lvlm}")
    if args.lvlm in ("lofi", "prior") and args.encoders:
        raise InputError(f"--encoders: --lvlm {args.lvlm} takes no demonstrations; give "
                         "--checkpoint")
    if args.image:
        data.load_image(args.image)
    if args.out:
        data.check_output(args.out, ".png" if args.image else ".jsonl", args.image)
    if args.json:
        data.check_output(args.json, ".json")


def default_lvlm(args):
    """MedGemma, or LoFi's own decoder if --checkpoint is a run of the tiny preset."""
    for_gemma = args.encoders or args.pool or args.blind or args.plain
    if for_gemma or not is_run(args.checkpoint):
        return MEDGEMMA
    config = json.loads(Path(args.checkpoint, "config.json").read_text())
    if config["preset"] != "tiny":
        return MEDGEMMA
    say(f"icl_ground.py: {args.checkpoint} is a miniature run, so its own decoder answers (--lvlm "
        f"lofi); --lvlm {MEDGEMMA} sends MedGemma the image, the phrase and the demonstrations "
        "(--show-prompt prints that prompt)", sys.stderr)
    return "lofi"


def query_rows(args, source, manifest):
    """The queries, as rows of the manifest: the boxed phrases of a split; or --phrase of --image,
    with the boxes and the patient that they have in the manifest, if any. Raises InputError."""
    if args.image:
        row, phrase = data.find_row(manifest, args.image), data.one_line(args.phrase)
        row = row or {"patient": None, "regions": []}
        truth = [box for region in row["regions"] if region["phrase"] == phrase
                 for box in region["boxes"]]
        return [{**row, "image": args.image, "path": args.image,
                 "regions": [{"phrase": phrase, "boxes": truth}]}]
    of_split = [row for row in manifest if row["split"] == args.split]
    rows = with_boxes(of_split)
    if not rows:
        raise InputError(f"{source}: no phrase with boxes in split {args.split!r}; expected "
                         'rows with "regions"')
    n_phrases, n_all = (sum(len(row["regions"]) for row in part) for part in (rows, of_split))
    say(f"{n_phrases:,} phrases with boxes on {len(rows):,} images of {source}, {args.split}; "
        f"{n_all - n_phrases:,} phrases without boxes are left out")
    return rows


def shown_prompt(lvlm, args, encoder, row, demonstrations):
    """The prompt of a row's first phrase as text, with a note for the tokens of each image: by the
    LVLM's processor or, where it is not at hand, by our template."""
    note, blind, template, others = "", args.blind, CHAT_TEMPLATE, ("lofi", "nearest", "prior")
    try:
        processor = load_pretrained(AutoProcessor, MEDGEMMA if lvlm in others else lvlm)
        template = processor.chat_template or CHAT_TEMPLATE
        blind |= not hasattr(processor, "image_processor")     # a text model
    except InputError:
        processor = encoder.text_tokenizer
        note = "(Gemma 3's chat format; the LVLM's own processor is not at hand)\n"
    chat = turns(row["path"], row["regions"][0]["phrase"], demonstrations, blind)
    text = processor.apply_chat_template(chat, chat_template=template, tokenize=False,
                                         add_generation_prompt=True)
    paths = iter(images_of(chat))
    return note + re.sub("<start_of_image>", lambda t: f"{t[0]}[image: {next(paths)}]", text)


def print_answer(answer, demonstrations, out, **more):
    """Draw an answer beside its demonstrations; print both as JSON, with boxes in pixels too."""
    if not answer["pred"]:
        print(f"icl_ground.py: {outcome(answer)}, for {answer['phrase']!r:.100} on "
              f"{answer['image']}", file=sys.stderr)
    image = data.load_image(answer["image"])
    sheet = figure(image, answer, demonstrations)
    data.write_file(out, lambda draft: sheet.save(draft, "PNG"))
    pixels = [[round(v * n) for v, n in zip(box, image.size * 2)] for box in answer["pred"]]
    keys = "image", "phrase", "boxes", "cosine"
    shown = {key: answer[key] for key in ("image", "phrase", "raw", "malformed", "similarity")}
    print(json.dumps({**shown, "boxes": answer["pred"], "pixels": pixels, "overlay": str(out),
                      **more, **({"ground_truth": answer["boxes"]} if answer["boxes"] else {}),
                      "demonstrations": [{key: item[key] for key in keys}
                                         for item in demonstrations]}))


def retrieve_demonstrations(args, checkpoint, device, rows, sources, k):
    """Load an encoder -> it, the rows with the similarity of their phrases, k triplets of each row.
    sources: the queries' manifest, the pool's manifest and rows."""
    source, pool, pool_rows = sources
    encoder = DualEncoder.load(checkpoint, device)
    image_emb = (encoder.encode_image(args.image).cpu() if args.image else
                 retrieve.image_embeddings(encoder, source, rows))                 # (Q, D)
    is_one = os.path.samefile(*map(data.manifest_path, (source, pool)))
    found = [[] for _ in rows]
    if k:
        found = find_demonstrations(encoder, rows, image_emb, pool, pool_rows, k, is_one)
    return encoder, add_similarity(encoder, rows, image_emb), found


def ground_image(args, lvlm, device, rows, sources, training):
    """--image and --phrase: retrieve, answer, print JSON, draw answer and demonstrations."""
    [checkpoint], [k] = args.encoders or [args.checkpoint], args.k
    with contextlib.redirect_stdout(sys.stderr):               # stdout is for the JSON
        encoder, rows, [found] = retrieve_demonstrations(args, checkpoint, device, rows, sources, k)
        if args.show_prompt:
            print(shown_prompt(lvlm, args, encoder, rows[0], found))
        ground = load_grounder(lvlm, args, device, encoder, training)
        [answer] = ground(rows, [found])                       # InContext.__call__ for an LVLM
    if rank_and_world()[0] > 0:
        return
    parts = Path(args.image).resolve().parts[1:][-3:]          # so names do not collide
    out = Path(args.out or Path("runs", "_".join(parts) + "_grounded.png"))
    print_answer(answer, found, out, lvlm=lvlm, n_demonstrations=len(found))
    print(f"wrote {out}; next, a set: python icl_ground.py --lvlm {lvlm} --checkpoint "
          f"{shlex.quote(checkpoint)} --data {shlex.quote(str(sources[0]))}", file=sys.stderr)


def ground_table(args, lvlm, device, rows, sources, training):
    """A row of Table 2 or 4 for each encoder and k -> ({row: its scores}, predictions files)."""
    results, files, ground = {}, [], None
    encoders, ks = args.encoders or [args.checkpoint], args.k
    if lvlm in ("lofi", "prior"):                              # they take no demonstrations
        encoders, ks = [args.checkpoint], [0]
    for checkpoint in encoders:
        encoder, found = None, [[] for _ in rows]
        if any(ks) or args.show_prompt:
            encoder, rows, found = retrieve_demonstrations(args, checkpoint, device, rows, sources,
                                                           max(args.k))
        if args.show_prompt:
            say(shown_prompt(lvlm, args, encoder, rows[0], found[0][:args.k[0]]))
        if ground is None or lvlm == "nearest":
            ground = load_grounder(lvlm, args, device, encoder, training)
        for k in ks:
            out, by = predictions_file(args, checkpoint, lvlm, k, sources[0],
                                       len(encoders) * len(ks) > 1)
            files.append(out)
            is_fresh = retrieve.is_fresh(out, [checkpoint, lvlm], *sources[:2])
            name = Path(lvlm).name + (" (blind)" if getattr(ground, "blind", False) else "")
            title = name if lvlm in ("lofi", "prior") else f"{name}, {checkpoint}, k={k}"
            results[title] = ground_set(
                rows, ground, [triplets[:k] for triplets in found], out, is_fresh, by)
    return results, files


def main():
    began, args = time.time(), parse_args()
    silence_libraries()
    check_args(args)
    device = find_device(args.device)
    rank, _ = join_processes(device)
    lvlm = args.lvlm or default_lvlm(args)
    for checkpoint in args.encoders or [args.checkpoint]:
        check_checkpoint(checkpoint)
    if lvlm not in ("lofi", "nearest", "prior") and not args.show_prompt:
        load_pretrained(AutoConfig, lvlm)                      # if it is missing, say so first

    source = args.data or retrieve.trained_on(args.checkpoint)
    manifest, pool = data.read_manifest(source), args.pool or source
    sources = source, pool, data.read_manifest(pool) if args.pool else manifest
    training = [row for row in manifest if row["split"] == "train"]
    rows = query_rows(args, source, manifest)
    if args.image:
        return ground_image(args, lvlm, device, rows, sources, training)
    results, files = ground_table(args, lvlm, device, rows, sources, training)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    results, table = with_prior(results, rows, training if lvlm != "prior" else [])
    print(f"\ngrounding, % [95 % interval over images]\n{table}")
    if args.json:
        data.write_json(args.json, results if len(results) > 1 else next(iter(results.values())))
    print(f"\n{time.time() - began:.0f} s in total. Next: python metrics.py "
          + shlex.join(map(str, files)))


if __name__ == "__main__":
    data.run_command(main)
