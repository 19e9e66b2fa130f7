"""icl_ground.py: prompt, answers to boxes, demonstrations, and the fast way against the plain one.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, in_two_processes, made_earlier
from PIL import Image, ImageColor
from small_gemma import CHAT_TEMPLATE, PHRASES, small_lvlm, small_processor, small_text_lvlm

import data
import icl_ground
import metrics
import retrieve
import train
from data import InputError
from icl_ground import INSTRUCTION, InContext, parse_boxes, turns
from model import LoFi


@pytest.fixture(scope="module")
def processor():
    return small_processor()


@pytest.fixture(scope="module")
def lvlm(processor):
    return small_lvlm(processor)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """36 noisy pictures of all shapes, as rows of a manifest, each with 1 to 3 boxed phrases."""
    folder, rng, rows = tmp_path_factory.mktemp("pool"), np.random.default_rng(0), []
    for i in range(36):
        pixels = rng.integers(0, 256, (3, 3), dtype=np.uint8)
        size = tuple(rng.integers(20, 60, 2).tolist())
        Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(folder / f"{i}.png")
        low, high = rng.uniform(0, 0.5, (3, 2)).tolist(), rng.uniform(0.5, 1, (3, 2)).tolist()
        regions = [{"phrase": f"{PHRASES[j]} {i}", "boxes": [low[j] + high[j]]}
                   for j in range(1 + i % 3)]
        rows.append({"image": f"{i}.png", "path": str(folder / f"{i}.png"), "patient": f"p{i}",
                     "regions": regions})
    return rows


def triplets_of(rows):
    return [{"image": row["image"], "path": row["path"], **region}
            for row in rows for region in row["regions"]]


def padded(path):
    """An image in the middle of a black square, by numpy."""
    image = np.array(Image.open(path).convert("L"))
    height, width = image.shape
    square = np.zeros((max(image.shape),) * 2, np.uint8)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top:top + height, left:left + width] = image
    return Image.fromarray(square).convert("RGB")


def plain_inputs(processor, chat):
    """What processor.apply_chat_template makes of a chat, with its images read in."""
    chat = [{**message, "content": [
        {**item, "image": padded(item["image"])} if item["type"] == "image" else item
        for item in message["content"]]} for message in chat]
    return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True,
                                         return_dict=True, return_tensors="pt")


# ---- the prompt ---------------------------------------------------------------------------------

def test_ids_are_those_of_the_processors_chat_template(processor, pool):
    """Guards against a tokenization of our own: a second <bos>, other image tokens, a phrase whose
    "<start_of_image>" becomes a token, token types that miss an image."""
    for n in (0, 1, 5):
        for phrase in PHRASES:
            chat = turns(pool[-1]["path"], phrase, triplets_of(pool[:n]))
            ids = icl_ground.chat_ids(processor, chat)
            inputs = plain_inputs(processor, chat)
            assert ids == inputs["input_ids"][0].tolist()
            is_image = [i == processor.tokenizer.image_token_id for i in ids]
            assert is_image == inputs["token_type_ids"][0].bool().tolist()
            assert len(inputs["pixel_values"]) == len(icl_ground.images_of(chat)) == n + 1


def test_chat_is_demonstrations_most_similar_last_then_the_query(pool):
    """Guards against an order that is not the one said, an image repeated for each of its triplets,
    the instruction at every turn, and a phrase that is not the end."""
    chat = turns(pool[0]["path"], "A. 0", triplets_of(pool[1:3]))  # 2 and 3 triplets, best first
    assert icl_ground.images_of(chat) == [pool[i]["path"] for i in (2, 1, 0)]
    asked = [item["text"] for message in chat if message["role"] == "user"
             for item in message["content"] if item["type"] == "text"]
    regions = pool[2]["regions"] + pool[1]["regions"]
    expected = [region["phrase"] for region in regions] + ["A. 0"]
    assert [text.replace("< ", "<").endswith(phrase)
            for text, phrase in zip(asked, expected, strict=True)] == [True] * 6
    assert [INSTRUCTION in text for text in asked] == [True] + [False] * 5
    assert [message["role"] for message in chat] == ["user", "assistant"] * 5 + ["user"]
    for n, message in enumerate(chat[1::2]):                   # its boxes and label, read back
        said = json.loads(message["content"][0]["text"])
        size = Image.open(pool[2 if n < 3 else 1]["path"]).size
        back = icl_ground.boxes_from_yxyx_1000([item["box_2d"] for item in said], size)
        np.testing.assert_allclose(back, regions[n]["boxes"], atol=2e-3)
        assert {item["label"].replace("< ", "<") for item in said} == {expected[n]}


def test_boxes_are_y_first_of_the_image_padded_to_a_centred_square():
    """Guards against x first, boxes of the unpadded image, and padding on one side: a white
    rectangle is drawn on an image, found again in the padded picture, and its box must be there."""
    rng = np.random.default_rng(0)
    for size in ((900, 600), (600, 901), (700, 700), (50, 1000)):
        x0, y0 = (int(rng.integers(0, n // 2)) for n in size)
        x1, y1 = (int(rng.integers(n // 2 + 1, n)) for n in size)
        image = Image.new("L", size, 9)
        image.paste(255, (x0, y0, x1, y1))
        square = np.asarray(icl_ground.pad_to_square(image))
        assert square.shape == (max(size), max(size), 3) and (square > 0).mean() < 1.01
        rows, columns = (np.flatnonzero((square[..., 0] == 255).any(axis)) for axis in (1, 0))
        seen = np.array([rows[0], columns[0], rows[-1] + 1, columns[-1] + 1]) * 1000 / max(size)
        box = [x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1]]
        [made] = icl_ground.boxes_to_yxyx_1000([box], size)
        np.testing.assert_allclose(made, seen, atol=0.51)
        assert all(type(v) is int for v in made)
        [back] = icl_ground.boxes_from_yxyx_1000([made], size)
        np.testing.assert_allclose(back, box, atol=0.51e-3 * max(size) / min(size))
    assert icl_ground.boxes_from_yxyx_1000([[0, 0, 1000, 200]], (500, 1000)) == []
    assert icl_ground.boxes_from_yxyx_1000([[0, 0, 1000, 1000]], (500, 1000)) == [[0, 0, 1, 1]]
    [[y0, x0, y1, x1]] = icl_ground.boxes_to_yxyx_1000([[0.9999, 0, 1, 0.0001]], (10, 10))
    assert y0 < y1 and x0 < x1 <= 1000                         # small boxes are never empty


# ---- answers ------------------------------------------------------------------------------------

BOX = '{"box_2d": [10, 20, 300, 400], "label": "x"}'
OTHER = '{"box_2d": [50, 60, 700, 800], "label": "y"}'
REPLIES = [
    (f"[{BOX}]", [[10, 20, 300, 400]]),
    (f"Here:\n```json\n[{BOX}]\n```\nIn the format [y0, x0, y1, x1].", [[10, 20, 300, 400]]),
    (f"<unused94>thought [[1, 2, 3, 4]]<unused95>[{BOX}]", [[10, 20, 300, 400]]),
    ("thought [[1, 2, 3, 4]]<unused95>[]", []),
    (f"<unused94>a thought that never ends [{BOX}]", None),
    (f"First [[1, 2, 3, 4]], no: Final Answer: [{BOX}]", [[10, 20, 300, 400]]),
    ("[{'box_2d': [10, 20, 300, 400], 'label': 'x'}]", [[10, 20, 300, 400]]),
    ('[{"box_2d": [10.5, 20.25, 300.0, 400], "label": "x"}]', [[10.5, 20.25, 300, 400]]),
    ('[{"box_2d": [300, 400, 10, 20]}]', [[10, 20, 300, 400]]),
    ('[{"box_2d": ["10", "20", "300", "400"]}]', [[10, 20, 300, 400]]),
    (f'[{BOX}, {{"box_2d": [30, 40, 5', [[10, 20, 300, 400]]),
    ('[{"box_2d": [30, 40, 5', None),
    ('[{"box_2d": [-5, 20, 1300, 1e3]}]', None),
    ('[{"box_2d": [-5, 20, 1300, 400]}]', [[0, 20, 1000, 400]]),
    ('[{"box_2d": [1100, 0, 1200, 50]}]', None),
    ('[{"box_2d": [100, 100, 100, 200]}]', None),
    ('[{"box_2d": [1, 2, 3]}]', None), ('[{"box_2d": [1, 2, 3, 4, 5]}]', None),
    (f"[{BOX}, {BOX}]", [[10, 20, 300, 400]]),
    (f"[{BOX}, " + '{"box_2d": [0, 0, 5, 5]}]', [[10, 20, 300, 400], [0, 0, 5, 5]]),
    (f"{BOX}\n" + '{"box_2d": [0, 0, 5, 5]}', [[10, 20, 300, 400], [0, 0, 5, 5]]),
    ('{"boxes": [[10, 20, 300, 400]]}', [[10, 20, 300, 400]]),
    ("[10, 20, 300, 400]", [[10, 20, 300, 400]]),
    ("[]", []), ("```json\n[ ]\n```", []), ("", None), ("[", None), ("There is none.", None),
    ("[{}]", None), ('[{"box_2d": [١, ٢, ٣, ٤]}]', None), ("[[１, ２, ３, ４]]", None),
    (f"[[{'9' * 5000}, 0, 5, 5]]", [[5, 0, 1000, 5]]), ("[[nan, 0, inf, 1]]", None),
    # an answer, and lists for other findings
    (f"The left effusion is at [{BOX}]. There is no right effusion: [].", [[10, 20, 300, 400]]),
    (f"Right: []\nLeft:\n```json\n[{BOX}]\n```", [[10, 20, 300, 400]]),
    (f"Left:\n```json\n[{BOX}]\n```\nRight:\n```json\n[]\n```", [[10, 20, 300, 400]]),
    # one list or object a box: lines, numbers, dashes, blocks, "and", keys of its own
    (f"[{BOX}]\n[{OTHER}]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    (f"1. [{BOX}]\n2. [{OTHER}]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    (f"- {BOX}\n- {OTHER}", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    (f"```json\n[{BOX}]\n```\n\n```json\n[{OTHER}]\n```", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    ("[10, 20, 300, 400] and [50, 60, 700, 800]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    ('{"left lung": [10, 20, 300, 400], "right lung": [50, 60, 700, 800]}',
     [[10, 20, 300, 400], [50, 60, 700, 800]]),
    ('[{"box_2d": [10, 20, 300, 400], "score": 0.93, "sure": true}, {"box_2d": [50, 60, 700, 800]'
     "}]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    # nothing: zeros, an empty box, null
    ('[{"box_2d": [0, 0, 0, 0], "label": "x"}]', []), ('[{"box_2d": [], "label": "x"}]', []),
    ("[[0.0, 0.0, 0.0, 0.0], [0, 0, 0, 0]]", []), ('{"box_2d": [-1, -1, -1, -1]}', []),
    ('[{"box_2d": null, "label": "none"}]', []), ("[{'box_2d': None}]", []), ("[null]", []),
    ('[{"box_2d": [null, null, null, null]}]', []), ('[{"box_2d": "none", "label": "x"}]', []),
    (f'[{{"box_2d": [0, 0, 0, 0], "label": "right"}}, {BOX}]', [[10, 20, 300, 400]]),
    ("The list is [...].", None), ('[{"box_2d": [100, 0, 0, 0]}]', None),
    # fractions
    ('[{"box_2d": [0.1, 0.2, 0.3, 0.4], "label": "x"}]', [[100, 200, 300, 400]]),
    ('[{"box_2d": [0, 0.2, 0.5, 1.0]}, {"box_2d": ["0.1", "0", ".5", "1"]}]',
     [[0, 200, 500, 1000], [100, 0, 500, 1000]]),
    # labels with brackets, quotes, apostrophes, numbers
    ('[{"label": "nodule [RUL]", "box_2d": [10, 20, 300, 400]}, {"label": "b [1]", "box_2d": '
     '[50, 60, 700, 800]}]', [[10, 20, 300, 400], [50, 60, 700, 800]]),
    (r'[{"box_2d": [10, 20, 300, 400], "label": "a \"small\" nodule"}, {"box_2d": [50, 60, 700, '
     "800]}]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    ("[{'box_2d': [10, 20, 300, 400], 'label': 'the patient's left'}, {'box_2d': [50, 60, 700, "
     "800]}]", [[10, 20, 300, 400], [50, 60, 700, 800]]),
    # refusals
    ("I am unable to provide bounding boxes.", None), ("Sorry, I can't help with that [1].", None),
    # repeats until the tokens end
    (f"[{f'{BOX}, ' * 20}" + '{"box_2d": [10, 20', [[10, 20, 300, 400]]),
    (f"[{f'{BOX}, ' * 20}" + '{"box_2d": [10, 20, 300, 400], "lab', [[10, 20, 300, 400]]),
    ("[0, 0, " * 60, None),
    (f"[{BOX}, {OTHER}" + ", 0" * 200, [[10, 20, 300, 400], [50, 60, 700, 800]])]


@pytest.mark.parametrize("reply, expected", REPLIES)
def test_a_reply_is_read_or_counted_as_malformed(reply, expected):
    """Guards against boxes out of a thought or a draft, guesses at what cannot be read, an
    unreadable reply taken for "no box" (None here), and "no box" taken for unreadable."""
    assert parse_boxes(reply) == (expected or [], expected is None)


def test_the_instructions_own_example_is_no_answer():
    """Guards against a base model that repeats the instruction and is scored for its example; a
    list that holds more than the example keeps the rest, and [] stays an answer."""
    [example] = re.findall(r"\[\{.*\}\]", INSTRUCTION)
    assert json.loads(example) == [json.loads(item) for item in icl_ground.EXAMPLE]
    for copied in (example, f"[{icl_ground.EXAMPLE[0]}]", example[:80], f"For instance {example}."):
        assert parse_boxes(copied) == ([], True)
    assert parse_boxes(f"{example[:-1]}, {BOX}]") == ([[10, 20, 300, 400]], False)
    assert parse_boxes(f"Not {example} but []") == ([], False)
    assert parse_boxes('[{"box_2d": [640, 90, 880, 430], "label": "x"}]')[0]


def test_no_reply_raises():
    """Guards against an exception on 10,000 random and mangled replies, and boxes that the
    predictions file refuses."""
    rng = random.Random(0)
    alphabet = [*'[]{}(),:."\'-+ \n\\0123456789eE٣०½²', "box_2d", "<unused94>", "<unused95>",
                "[1,2,3,4]", BOX, "\ud800", "\0", "1e999", "```json", "null"]
    for i in range(10_000):
        reply = "".join(rng.choices(alphabet, k=rng.randrange(40)))
        cut = f"[{BOX}, {BOX}]"[:rng.randrange(90)]
        boxes, malformed = parse_boxes(reply if i % 2 else cut + reply)
        assert not (boxes and malformed)
        assert all(0 <= y0 < y1 <= 1000 and 0 <= x0 < x1 <= 1000 for y0, x0, y1, x1 in boxes)


# ---- demonstrations -----------------------------------------------------------------------------

def test_demonstrations_are_the_top_k_triplets_without_the_query_or_its_patient(pool, tmp_path):
    """Guards: a query that sees its own boxes, through a link or in another image of the patient;
    fewer than k demonstrations because those of the patient were counted first. By a double loop,
    also where the five most similar images are all the patient's."""
    link = tmp_path / "other name.png"
    link.symlink_to(pool[0]["path"])
    rows = [{**row, "patient": "p8" if 8 <= i < 13 else row["patient"]}
            for i, row in enumerate(pool)]
    queries = [{**pool[0], "path": str(link), "patient": None}, rows[1],
               {**pool[2], "patient": "p7"}, {**pool[3], "patient": "nobody's"}, rows[9]]
    own = [{0}, {1}, {2, 7}, {3}, {8, 9, 10, 11, 12}]
    emb = torch.tensor(np.random.default_rng(1).normal(size=(len(pool), 8))).float()
    emb[8:13] = emb[9] + emb[8:13] / 100                       # p8's images are alike
    emb = torch.nn.functional.normalize(emb, dim=1)
    query_emb = emb[[0, 1, 2, 3, 9]]
    for k in (1, 3, 9, 40, 100):                               # the pool has 72 triplets
        found, left_out = icl_ground.top_triplets(queries, query_emb, rows, emb, k)
        assert left_out == own
        for q in range(len(queries)):
            best = sorted((i for i in range(len(rows)) if i not in own[q]),
                          key=lambda i: -float(query_emb[q].double() @ emb[i].double()))
            every = [(rows[i]["image"], rows[i]["path"], region["phrase"], region["boxes"])
                     for i in best for region in rows[i]["regions"]]
            assert [(t["image"], t["path"], t["phrase"], t["boxes"]) for t in found[q]] == every[:k]


def test_nearest_takes_the_closest_phrase_and_of_ties_the_more_similar_image(monkeypatch):
    """Guards against the closest image instead of the closest phrase, and ties to the last."""
    vectors = {"a": [1.0, 0], "b": [0.6, 0.8], "c": [0, 1.0], "q": [0.8, 0.6]}
    embed = lambda _, texts: torch.tensor([vectors[text] for text in texts])
    monkeypatch.setattr(icl_ground.retrieve, "text_embeddings", embed)
    demonstrations = [{"image": str(i), "phrase": phrase, "boxes": [[0, 0, 1, (i + 1) / 9]]}
                      for i, phrase in enumerate("caabcb")]
    row = {"image": "x", "regions": [{"phrase": phrase, "boxes": []} for phrase in "qac"]}
    answers = icl_ground.nearest_answers(None, [row], [demonstrations])
    assert [a["pred"] for a in answers] == [demonstrations[i]["boxes"] for i in (3, 1, 0)]
    assert [a["raw"] for a in answers] == ["3: b", "1: a", "0: c"]


# ---- the fast way against the plain way ---------------------------------------------------------

STEPS = 6


class Recorded(InContext):
    """An LVLM that keeps the logits (steps, vocabulary) that chose each reply."""

    def __init__(self, *args, **options):
        super().__init__(*args, max_new_tokens=STEPS, **options)
        self.logits = []

    def generate(self, input_ids, **inputs):
        heads = []
        hook = self.model.lm_head.register_forward_hook(lambda _, __, out: heads.append(out[:, -1]))
        ids = super().generate(input_ids, **inputs)
        hook.remove()
        self.logits += torch.stack(heads, 1)
        return ids

    def plain_answers(self, jobs):
        """jobs: (path, phrases, triplets) -> [(ids, logits), ...] of each phrase."""
        ids = [self.plain(path, phrase, found) for path, phrases, found in jobs
               for phrase in phrases]
        return list(zip(ids, self.logits, strict=True))

    def fast_answers(self, jobs):
        ids = [reply for job in jobs for reply in self.fast(*job)]
        return list(zip(ids, self.logits, strict=True))


def assert_same(answers, expected, eos):
    """Ids up to <eos>, and the logits that chose them."""
    assert len(answers) == len(expected)
    for (ids, logits), (expected_ids, expected_logits) in zip(answers, expected):
        n = len(expected_ids)
        assert ids[:n] == expected_ids and (n == STEPS or expected_ids[-1] in eos)
        torch.testing.assert_close(logits[:n], expected_logits, atol=2e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def jobs(pool):
    """10 images with 4 phrases each and 2 images of demonstrations; the pool is 5 images."""
    return [(pool[i]["path"], PHRASES, triplets_of(pool[i % 4:i % 4 + 2])) for i in range(10, 20)]


@pytest.fixture(scope="module")
def plain_answers(lvlm, processor, jobs):
    """40 answers of the plain way. Every twelfth token ends an answer here, so that the phrases of
    a batch end at different steps."""
    lvlm.generation_config.eos_token_id = [1, 6, *range(12, 690, 12)]
    return Recorded(lvlm, processor).plain_answers(jobs)


def test_plain_way_is_the_librarys_on_the_chat(lvlm, processor, jobs, plain_answers):
    """Guards against a definition that pads, orders or feeds images otherwise than the processor
    does with a chat whose images a reader prepared by hand."""
    for job, (ids, _) in zip(jobs[:3], plain_answers[::4]):
        inputs = plain_inputs(processor, turns(job[0], job[1][0], job[2]))
        out = lvlm.generate(**inputs, do_sample=False, max_new_tokens=STEPS)
        assert out[0, inputs["input_ids"].shape[1]:].tolist() == ids


def test_fast_way_gives_the_plain_ways_answers(lvlm, processor, jobs, plain_answers, monkeypatch):
    """Guards against every trap of the fast way, on 40 pairs in float32: token types of a part of
    the prompt, the sliding window counted over padding, a prefix moved too far, image features out
    of order, or made again for each phrase or each query image."""
    prefix = len(icl_ground.chat_ids(processor, turns(*jobs[0][:1], "", jobs[0][2])))
    suffix = len(processor.tokenizer(PHRASES[3])["input_ids"])
    assert prefix > 32 < suffix                                # the window of small_lvlm
    lengths = [len(ids) for ids, _ in plain_answers]
    assert len({tuple(ids) for ids, _ in plain_answers}) > 20 and len(set(lengths)) > 3
    seen, load = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda path: seen.append(path) or load(path))
    answers = Recorded(lvlm, processor).fast_answers(jobs)
    assert_same(answers, plain_answers, lvlm.generation_config.eos_token_id)
    once = {triplet["path"] for *_, found in jobs for triplet in found}
    assert sorted(seen) == sorted([*once, *(path for path, *_ in jobs)])


def test_one_phrase_or_a_batch_of_many_gives_the_same(lvlm, processor, jobs, plain_answers):
    """Guards against an answer that depends on the other phrases of the batch, a prefix that leaves
    no token to start from (one phrase: all is prefix), and a cache that one batch leaves changed
    for the next."""
    eos, some = lvlm.generation_config.eos_token_id, jobs[:3]
    single = [(path, [phrase], found) for path, phrases, found in some for phrase in phrases]
    assert_same(Recorded(lvlm, processor).fast_answers(single), plain_answers[:12], eos)
    three = Recorded(lvlm, processor, batch_size=3)
    assert_same(three.fast_answers(some), plain_answers[:12], eos)
    twice = [(path, [*phrases, *phrases], found) for path, phrases, found in some[:1]]
    assert_same(Recorded(lvlm, processor).fast_answers(twice), plain_answers[:4] * 2, eos)


def test_text_model_is_blind_and_fast_is_plain(processor, jobs):
    """Guards against a text model that gets image tokens, ids that are not its chat template's, and
    a fast way that is wrong without images: with and without demonstrations."""
    tokenizer = small_processor().tokenizer
    model = small_text_lvlm(tokenizer)
    model.generation_config.eos_token_id = [1, *range(12, 690, 12)]
    blind = [(path, phrases, found * k) for path, phrases, found in jobs[:3] for k in (0, 1)]
    for path, phrases, found in blind:
        chat = turns(path, phrases[1], found, blind=True)
        ids = icl_ground.chat_ids(tokenizer, chat)
        assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        assert not icl_ground.images_of(chat) and tokenizer.image_token_id not in ids
    expected = Recorded(model, tokenizer).plain_answers(blind)
    assert len({tuple(ids) for ids, _ in expected}) > 10
    assert_same(Recorded(model, tokenizer).fast_answers(blind), expected,
                model.generation_config.eos_token_id)


def test_blind_vlm_never_sees_an_image(lvlm, processor, pool, tmp_path):
    """Guards against a control row in which the images still count: the same replies whatever the
    files hold; and, to show that the test can fail, other replies when it sees."""
    lvlm.generation_config.eos_token_id = 1
    found, path, replies = triplets_of(pool[:2]), pool[5]["path"], {}
    for row in (pool[0], pool[1], pool[5]):                    # the same names and sizes, inverted
        image = Image.open(row["path"]).point(lambda v: 255 - v)
        image.save(tmp_path / row["image"])
    inverted = [{**t, "path": str(tmp_path / t["image"])} for t in found]
    for blind in (True, False):
        for where, demonstrations in ((path, found), (str(tmp_path / "5.png"), inverted)):
            ground = InContext(lvlm, processor, blind=blind, max_new_tokens=STEPS)
            replies[blind, where == path] = ground.fast(where, PHRASES, demonstrations)
            assert not blind or ground.fast(where, PHRASES, demonstrations) == [
                ground.plain(where, phrase, demonstrations) for phrase in PHRASES]
    assert replies[True, False] == replies[True, True]
    assert replies[False, False] != replies[False, True]


def test_template_of_ours_is_gemmas(pool):
    """Guards against a chat format of our own for base models, and a model's own template lost."""
    own, bare = small_processor(), small_processor()
    bare.chat_template = bare.tokenizer.chat_template = None
    model = small_lvlm(own)
    kept, given = InContext(model, own), InContext(model, bare)
    assert own.chat_template == CHAT_TEMPLATE and (len(kept.stops), len(given.stops)) == (0, 1)
    chat = turns(pool[0]["path"], " a phrase ", triplets_of(pool[1:3]))
    assert own.apply_chat_template(chat, add_generation_prompt=True) \
        == bare.apply_chat_template(chat, add_generation_prompt=True)


def test_a_base_models_reply_ends_where_its_list_closes(pool):
    """Guards against a base model that runs on to --max-new-tokens: a scripted reply that goes on
    with a query of its own is cut where the list ends, and an empty list ends too."""
    tokenizer = small_processor().tokenizer
    tokenizer.chat_template = None
    model = small_text_lvlm(tokenizer)
    later = tokenizer(" Query: [[1, 2, 3, 4]]", add_special_tokens=False)["input_ids"]
    for answer in (f"[{BOX}, {BOX}]", "[]"):
        script = tokenizer(answer, add_special_tokens=False)["input_ids"]
        steps = iter(script + later)
        one_hot = lambda _, __, out: torch.nn.functional.one_hot(
            torch.tensor([[next(steps)]]), out.shape[-1]).float()
        hook = model.lm_head.register_forward_hook(one_hot)
        ids = InContext(model, tokenizer).plain(pool[0]["path"], "A.", [])
        hook.remove()
        tokenizer.chat_template = None
        assert ids == script and len(script) < len(script + later)


def test_replies_become_predictions(lvlm, processor, tmp_path):
    """Guards: a reply whose boxes all lie in the padding counted as a readable one; boxes of
    another image's shape; phrases and replies that change places. Scripted replies, by hand."""
    rows, box = [], '{"box_2d": [%d, %d, %d, %d], "label": "x"}'
    for name, size in (("tall", (50, 100)), ("wide", (100, 50))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
        rows.append({"image": f"{name}.png", "path": str(tmp_path / f"{name}.png"), "regions": [
            {"phrase": f"{name} {n}", "boxes": [[0, 0, 1, n / 9]]} for n in range(1, 6)]})
    left, middle, top = (box % v for v in (
        (0, 0, 1000, 200), (100, 300, 600, 500), (0, 0, 200, 1000)))
    script = [f"[{left}]", f"[{middle}]", f"[{left}, {middle}]", "[]", "There is none.",
              f"[{left}]", f"[{middle}]", f"[{top}]", f"[{top}, {middle}]", "[[1, 2, 3]]"]
    # of a tall image the square's left and right quarters are padding, of a wide one top and bottom
    tall, wide = [[0.1, 0.1, 0.5, 0.6]], [[0.3, 0, 0.5, 0.7]]
    expected = [([], True), (tall, False), (tall, False), ([], False), ([], True),
                ([[0, 0, 0.2, 1]], False), (wide, False), ([], True), (wide, False), ([], True)]
    ids = [processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in script]
    asked = [region for row in rows for region in row["regions"]]
    for plainly in (False, True):
        ground, replies = InContext(lvlm, processor, plainly=plainly), iter([*ids, None])
        ground.plain = lambda path, phrase, triplets: next(replies)
        ground.fast = lambda path, phrases, triplets: [next(replies) for _ in phrases]
        predictions = ground(rows, [[], []])
        assert [(row["pred"], row["malformed"]) for row in predictions] == expected
        assert [row["raw"] for row in predictions] == script and next(replies) is None
        assert [(row["phrase"], row["boxes"]) for row in predictions] \
            == [(region["phrase"], region["boxes"]) for region in asked]
        assert [row["image"] for row in predictions] == ["tall.png"] * 5 + ["wide.png"] * 5


def similarity_by_hand(model, path, phrase):
    """cos(E_I, E_T(phrase)) - cos(E_I, E_T("")), one image and one text at a time, by numpy."""
    image, text, empty = (emb[0].double().numpy() for emb in (
        model.encode_image(path), model.encode_text(phrase), model.encode_text("")))
    cosine = lambda a, b: a @ b / (a @ a) ** 0.5 / (b @ b) ** 0.5
    return pytest.approx(cosine(image, text) - cosine(image, empty), abs=6e-5)


# ---- LoFi's own decoder -------------------------------------------------------------------------

def test_lofi_answers_a_set_as_it_answers_each_image(model, phantom, monkeypatch):
    """Guards: phrases asked of another image's visual tokens, or answers that change places, where
    images and phrases are batched. Against model.ground, one image and one phrase at a time; the
    replies themselves stand in for their boxes."""
    rows = icl_ground.with_boxes(data.read_manifest(phantom, "test"))[:6]
    for row in rows:                                           # every phrase on every image
        row["regions"] = [{"phrase": phrase, "boxes": [[0, 0, 1, 1]]} for phrase in ("A.", "B c.")]
    rows[2]["regions"] = rows[2]["regions"][:1]
    with torch.no_grad():                                      # so that the images count
        model.pooling.projection.weight.normal_()
        for name, weight in model.named_parameters():
            if "vision_model" in name:
                weight.mul_(3)
            if "q_norm" in name or "post_attention" in name:
                weight.fill_(1)
    monkeypatch.setattr(data, "text_to_boxes", lambda reply: ([reply], False))
    model.config = dataclasses.replace(model.config, max_target=12)
    monkeypatch.setattr(icl_ground, "PHRASES_AT_ONCE", 4)
    monkeypatch.setattr(icl_ground, "IMAGES_AT_ONCE", 5)
    alone = [(row["image"], region["phrase"], *model.ground(row["path"], region["phrase"]))
             for row in rows for region in row["regions"]]
    assert len({pred for _, _, [pred] in alone}) > 6
    for answers in (icl_ground.lofi_answers(model, rows), icl_ground.lofi_predictions(model, rows)):
        assert [(row["image"], row["phrase"], row["pred"]) for row in answers] == alone
        assert [row["similarity"] for row in answers] == [
            similarity_by_hand(model, row["path"], region["phrase"])
            for row in rows for region in row["regions"]]


# ---- the command --------------------------------------------------------------------------------

@pytest.fixture
def run_dir(saved_run, tmp_path):
    """A copy of it, so that no test finds the predictions of another."""
    return shutil.copytree(saved_run, tmp_path / "run")


@pytest.fixture(scope="module")
def lvlm_dir(lvlm, processor, tmp_path_factory):
    """The small Gemma 3 as a local folder."""
    folder = tmp_path_factory.mktemp("lvlm")
    lvlm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """main() with these arguments, in an empty folder -> (stdout, stderr)."""
    def call(*args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["icl_ground.py", *map(str, args)])
        icl_ground.main()
        return capsys.readouterr()
    return call


def predictions_in(out):
    """The predictions files that a command's last line names."""
    return shlex.split(out.splitlines()[-1].split("Next: python metrics.py ")[1])


def demonstrations_by_hand(model, phantom, query):
    """All triplets of train and val but the query's own, best first, by cosines of one image at a
    time."""
    emb = model.encode_image(query["path"])[0].double().numpy()
    every = []
    for row in data.read_manifest(phantom):
        if row["split"] != "test" and row["path"] != query["path"] \
                and row["patient"] != query["patient"]:
            other = model.encode_image(row["path"])[0].double().numpy()
            cosine = emb @ other / (emb @ emb) ** 0.5 / (other @ other) ** 0.5
            every += [(-cosine, {"image": row["image"], "boxes": r["boxes"], "phrase": r["phrase"],
                                 "cosine": pytest.approx(cosine, abs=6e-5)})
                      for r in row["regions"] if r["boxes"]]
    return [triplet for _, triplet in sorted(every, key=lambda pair: pair[0])]


@pytest.mark.parametrize("grounder", ["lofi", "nearest", "prior", "folder"])
def test_one_image(grounder, call, phantom, run_dir, lvlm_dir, tmp_path):
    """Guards against anything on stdout but the answer, pixels of another image's size, an overlay
    that is not written, boxes that the predictions file would refuse, a grounder that answers
    without the retrieval, and cosines or a similarity of other vectors."""
    row = data.read_manifest(phantom, "test")[0]
    phrase = row["regions"][0]["phrase"]
    out, err = call("--image", row["path"], "--phrase", phrase, "--data", phantom, "--checkpoint",
                    run_dir, "--lvlm", lvlm_dir if grounder == "folder" else grounder, "--k", 3,
                    "--max-new-tokens", 8)
    answer, model = json.loads(out), LoFi.from_pretrained(run_dir)
    for box in answer["boxes"] + answer["ground_truth"]:
        assert data.box_problem(box) is None
    assert answer["ground_truth"] == row["regions"][0]["boxes"] and answer["phrase"] == phrase
    assert answer["demonstrations"] == demonstrations_by_hand(model, phantom, row)[:3]
    assert answer["n_demonstrations"] == 3
    assert answer["similarity"] == similarity_by_hand(model, row["path"], phrase)
    assert answer["pixels"] == [[round(96 * v) for v in box] for box in answer["boxes"]]
    assert len(answer["boxes"]) > 0 or grounder in ("lofi", "folder")
    if grounder == "nearest":
        assert answer["boxes"] in [triplet["boxes"] for triplet in answer["demonstrations"]]
    n_cells = 1 + len({triplet["image"] for triplet in answer["demonstrations"]})
    assert Image.open(tmp_path / answer["overlay"]).size == (360 * n_cells, 448)
    assert "leave-one-out: 0 of 1" in err


def test_the_querys_file_is_never_its_demonstration_and_its_patient_not_in_one_manifest(
        call, phantom, run_dir, tmp_path):
    """Guards against a query that sees its own boxes, by a link, in its own set or in another one;
    its patient's other images among them; and strangers of another data set left out since their
    patients bear the same names."""
    rows = [json.loads(line) for line in open(phantom / "manifest.jsonl")]
    train = [row for row in rows if row["split"] == "train"]
    query = next(row for row in train if row["regions"])
    for row in train:                                          # all of one patient but ten
        row["patient"] = query["patient"] if row in train[:30] else row["patient"]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "images").symlink_to(phantom / "images")
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = shutil.copytree(phantom, tmp_path / "other")       # the same names of patients
    (other / "manifest.jsonl").write_text((folder / "manifest.jsonl").read_text())
    link = tmp_path / "link.png"
    link.symlink_to(phantom / query["image"])
    args = ("--image", link, "--phrase", "x", "--checkpoint", run_dir, "--lvlm", "nearest", "--k",
            99, "--data", folder)
    boxed = [row["image"] for row in rows if row["split"] != "test"
             and any(r["boxes"] for r in row["regions"])]
    own = {row["image"] for row in train[:30]}
    in_own = {image for image in boxed if image not in own}
    for pool, expected in (((), in_own), (("--pool", folder / "manifest.jsonl"), in_own),
                           (("--pool", other), {*boxed}), (("--pool", phantom), {*boxed}
                                                           - {query["image"]})):
        found = json.loads(call(*args, *pool)[0])["demonstrations"]
        assert {triplet["image"] for triplet in found} == expected
        cosines = [triplet["cosine"] for triplet in found]
        assert cosines == sorted(cosines, reverse=True)


def test_default_overlays_of_two_files_of_one_name_differ(call, phantom, run_dir, tmp_path):
    """Guards against the picture of one patient written over that of another, where all files bear
    one name, as in CheXpert, or differ in their suffix alone."""
    path, names = data.read_manifest(phantom, "test")[0]["path"], set()
    for name in ("p1/study1/view1.png", "p2/study1/view1.png", "p1/study1/view1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(tmp_path / name)
        out, _ = call("--image", tmp_path / name, "--phrase", "x", "--data", phantom,
                      "--checkpoint", run_dir, "--lvlm", "prior", "--k", 0)
        names.add(json.loads(out)["overlay"])
        assert json.loads(out)["demonstrations"] == []
    assert len(names) == 3 and all((tmp_path / name).is_file() for name in names)


def test_a_note_about_a_long_phrase_is_not_on_stdout(call, phantom, run_dir):
    """Guards against JSON that cannot be piped into another program."""
    path = data.read_manifest(phantom, "test")[0]["path"]
    out, err = call("--image", path, "--phrase", "A large left nodule. " * 20, "--data", phantom,
                    "--checkpoint", run_dir, "--lvlm", "nearest", "--k", 3)
    assert json.loads(out)["boxes"] and "truncated 1 of" in err


def test_pixels_are_those_of_the_original(call, phantom, pool, run_dir, tmp_path):
    """Guards against width and height taken for each other, and an image that the manifest must
    know; the prior answers from the phrase alone."""
    path = next(row["path"] for row in pool if len(set(Image.open(row["path"]).size)) == 2)
    out, _ = call("--image", path, "--phrase", "unheard of", "--data", phantom, "--lvlm", "prior",
                  "--checkpoint", run_dir, "--out", "there/x.png", "--k", 0)
    answer, (w, h) = json.loads(out), Image.open(path).size
    [[x0, y0, x1, y1]] = answer["boxes"]
    assert answer["pixels"] == [[round(x0 * w), round(y0 * h), round(x1 * w), round(y1 * h)]]
    assert "ground_truth" not in answer
    assert Image.open(tmp_path / "there" / "x.png").size == (360, 448)       # no demonstrations


def test_a_query_of_the_pool_is_left_out_and_said(call, phantom, run_dir):
    """Guards against leave-one-out that is not done where pool and query set are one, and
    demonstrations out of the test split."""
    out, _ = call("--data", phantom, "--split", "train", "--lvlm", "nearest", "--checkpoint",
                  run_dir, "--k", 2)
    rows = icl_ground.with_boxes(data.read_manifest(phantom))
    train = [row for row in rows if row["split"] == "train"]
    assert f"leave-one-out: {len(train)} of {len(train)} query images" in out
    predictions = metrics.read_predictions(*predictions_in(out))
    assert len(predictions) == sum(len(row["regions"]) for row in train)
    sources = [row["raw"].split(": ")[0] for row in predictions]
    assert all(source != row["image"] for source, row in zip(sources, predictions))
    assert {*sources} <= {row["image"] for row in rows if row["split"] != "test"}


def test_a_set_goes_on_where_it_was_stopped(call, phantom, run_dir, monkeypatch):
    """Guards against queries asked twice or never, a torn line that stops the run for good, a row
    that is not that of the file, and scores that are not those of the file's rows."""
    asked, answer = [], icl_ground.nearest_answers
    monkeypatch.setattr(icl_ground, "nearest_answers", lambda encoder, rows, found: (
        asked.extend((row["image"], r["phrase"]) for row in rows for r in row["regions"])
        or answer(encoder, rows, found)))
    args = ("--data", phantom, "--lvlm", "nearest", "--checkpoint", run_dir, "--k", 4, "--json",
            "p.json")
    whole, _ = call(*args)
    [file] = predictions_in(whole)
    lines = open(file, "rb").read().splitlines(keepends=True)
    rows = data.read_manifest(phantom, "test")
    every = [(row["image"], region["phrase"]) for row in rows for region in row["regions"]]
    assert asked == every == [(row["image"], row["phrase"])
                              for row in metrics.read_predictions(file)]
    for kept, torn in ((lines[:7], lines[7][:20]), (lines, b"")):
        with open(file, "wb") as partly:
            partly.write(b"".join(kept) + torn)
        asked.clear()
        again, _ = call(*args)
        assert sorted(open(file, "rb")) == sorted(lines)
        assert asked == every[len(kept):]
        assert f"{len(kept)} phrases are already answered" in again
        table = [line for line in whole.splitlines() if line.startswith(("nearest", "phrase pr"))]
        assert len(table) == 2 and all(line in again for line in table)
    scores = json.load(open("p.json"))
    assert scores["grounding"] == metrics.grounding_metrics(metrics.read_predictions(file))
    prior = metrics.phrase_prior(data.read_manifest(phantom, "train"))
    expected = [{"image": row["image"], "boxes": region["boxes"], "pred": prior(region["phrase"])}
                for row in rows for region in row["regions"]]
    assert scores["prior"] == metrics.grounding_metrics(expected)


def test_two_processes_share_a_set(call, phantom, run_dir, tmp_path):
    """Guards against images that two processes both take, or neither, rows that are written twice,
    processes that wait for each other for ever, and a share that a stopped run had left."""
    args = ("--data", phantom, "--lvlm", "lofi", "--checkpoint", run_dir, "--device", "cpu")
    [file] = (tmp_path / name for name in predictions_in(call(*args)[0]))

    def answers():
        keys = "image", "phrase", "pred", "raw", "malformed"
        return sorted([str(json.loads(line)[key]) for key in keys] for line in open(file))
    expected, lines = answers(), open(file).readlines()
    for n_done in (0, 5):                                      # from nothing, then continued
        file.write_text("".join(lines[:n_done]))
        first, second = in_two_processes(icl_ground.main, tmp_path, *args)
        assert first.count("Next:") == 1 and not second and answers() == expected


def test_default_names_of_predictions(call, phantom, run_dir, lvlm_dir, tmp_path):
    """Guards against two rows of Table 2 that share a file (another split, blind, another k), and
    predictions that do not lie with the run they were made with, or not where --out says."""
    torch.save({"settings": {"data": str(phantom)}}, run_dir / "trainer.pt")
    lvlm = ("--lvlm", lvlm_dir, "--max-new-tokens", 1, "--k", 1)
    name = lvlm_dir.name
    for args, expected in (
            (("--lvlm", "nearest", "--k", 2, 3), ["test_nearest_k2", "test_nearest_k3"]),
            (("--lvlm", "lofi", "--split", "val"), ["val_lofi_k0"]),
            (("--lvlm", "prior", "--data", phantom), ["test_prior_k0"]),
            (lvlm, [f"test_{name}_k1"]), ((*lvlm, "--blind"), [f"test_{name}_blind_k1"])):
        made = predictions_in(call("--checkpoint", run_dir, *args)[0])
        assert made == [str(run_dir / f"{stem}.jsonl") for stem in expected]
    made = predictions_in(call("--checkpoint", run_dir, "--lvlm", "nearest", "--k", 2, "--out",
                               "there/mine.jsonl")[0])
    assert made == ["there/mine.jsonl"]


def test_answers_made_in_another_way_are_not_continued(call, phantom, run_dir, tmp_path):
    """Guards against a file of two grounders' answers, which is scored as one's: another lvlm, k,
    set, split, pool, encoder or length of a reply under one --out, or under the default name; and,
    on the contrary, the same command refused."""
    shutil.copytree(run_dir, tmp_path / "again")
    for name in ("set", "pool"):
        shutil.copytree(phantom, tmp_path / name)
    made_earlier(tmp_path, 60)                                 # so that no file is too old
    out = tmp_path / "mine.jsonl"
    first = ("--data", "set", "--checkpoint", run_dir, "--lvlm", "nearest", "--k", 2)
    call(*first, "--out", out)
    [file] = [tmp_path / name for name in predictions_in(call(*first)[0])]
    whole = out.read_bytes(), file.read_bytes()
    manifest = tmp_path / "set" / "manifest.jsonl"
    assert {json.loads(line)["by"] for line in open(out)} == {
        f"nearest, k 2, data {manifest} test, pool {manifest}, at most 512 tokens, encoder "
        f"{run_dir}"}
    for to, *changes in (
            (("--out", out), ("--lvlm", "prior"), ("--k", 3), ("--pool", "pool"),
             ("--data", "pool"), ("--split", "val"), ("--checkpoint", "again"),
             ("--max-new-tokens", 9)),
            ((), ("--pool", "pool"), ("--data", "pool"), ("--max-new-tokens", 9))):
        for change in changes:
            with pytest.raises(InputError, match="was written by nearest, k 2, .*--out") as error:
                call(*first, *to, *change)
            assert "\n" not in str(error.value)
        assert "are already answered" in call(*first, *to)[0]
    assert whole == (out.read_bytes(), file.read_bytes())


def test_half_a_first_answer_is_dropped_and_other_files_are_kept(tmp_path):
    """Guards against answers appended to half a line, and a user's file that is cut or deleted."""
    out = tmp_path / "a.jsonl"
    out.write_text('{"image": "a.png", "phr')
    assert icl_ground.read_answers(out, True, "x") == {} and out.read_text() == ""
    for text in ("my notes", '{"image": "a.png", "study": "s"}\n', '{"step": 1}\n{"st', "[]\n"):
        out.write_text(text)
        for is_fresh in (True, False):
            with pytest.raises(InputError, match="another program"):
                icl_ground.read_answers(out, is_fresh, "x")
        assert out.read_text() == text


def test_a_model_away_from_its_data_grounds_another_set(call, phantom, run_dir, tmp_path):
    """Guards against --data that is asked for although it was given, where the run's own data are
    not on this machine; and of two sets with one name, answers to the pictures of the other: the
    second one is refused under the default name, and has its own scores under another."""
    torch.save({"settings": {"data": "/elsewhere/mimic"}}, run_dir / "trainer.pt")
    second = shutil.copytree(phantom, tmp_path / "b" / "phantom")
    rows = [json.loads(line) for line in open(phantom / "manifest.jsonl")]
    for row in rows:                                           # the same names and phrases
        for region in row["regions"]:
            region["boxes"] = [[1 - x1, y0, 1 - x0, y1] for x0, y0, x1, y1 in region["boxes"]]
    (second / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made_earlier(second, 60)
    files = []
    for path in (phantom, second):
        args = ("--data", path, "--checkpoint", run_dir, "--lvlm", "nearest", "--k", 2, "--json",
                "p.json")
        if files:
            with pytest.raises(InputError, match="name another file with --out"):
                call(*args)
            args += ("--out", tmp_path / "second.jsonl")
        files += predictions_in(call(*args)[0])
        of_file = {(row["image"], row["phrase"]): row
                   for row in metrics.read_predictions(files[-1])}
        regions = [(row["image"], region) for row in data.read_manifest(path, "test")
                   for region in row["regions"]]
        expected = [of_file[image, region["phrase"]] for image, region in regions]
        assert [row["boxes"] for row in expected] == [region["boxes"] for _, region in regions]
        scores = json.load(open(tmp_path / "p.json"))["grounding"]
        assert scores == metrics.grounding_metrics(expected)
    assert files[0] != files[1]


def test_predictions_of_older_weights_or_manifests_are_made_anew(call, phantom, run_dir, tmp_path):
    """Guards against answers of an earlier checkpoint, or to an earlier manifest or pool, that are
    scored as this one's; and, on the contrary, whole files that are asked again."""
    folder, pool = (shutil.copytree(phantom, tmp_path / name) for name in ("set", "pool"))
    args = ("--data", folder, "--pool", pool, "--checkpoint", run_dir, "--lvlm", "nearest", "--k",
            1)
    [file] = predictions_in(call(*args)[0])
    good = open(file).read()
    fake = good.replace('"raw": "', '"raw": "old ')
    for newer in (None, run_dir / "model.safetensors", folder / "manifest.jsonl",
                  pool / "manifest.jsonl"):
        with open(file, "w") as old:
            old.write(fake)
        if newer:
            made_earlier(tmp_path, 60)
            newer.write_bytes(newer.read_bytes())
        out, _ = call(*args)
        assert ("started again" in out) == bool(newer) == ("already answered" not in out)
        assert open(file).read() == (good if newer else fake)


def test_of_a_changed_set_only_its_pairs_are_scored(call, phantom, run_dir, tmp_path):
    """Guards against scores over pairs that the file still holds from a larger set."""
    folder = shutil.copytree(phantom, tmp_path / "set")
    args = ("--data", folder, "--checkpoint", run_dir, "--lvlm", "prior", "--json", "p.json")
    [file] = predictions_in(call(*args)[0])
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    tests = [line for line in lines if '"test"' in line]
    (folder / "manifest.jsonl").write_text(
        "".join(line for line in lines if line not in tests[:4]))
    made_earlier(folder, 60)                                   # so that the file is kept
    call(*args)
    n_left = sum(len(json.loads(line)["regions"]) for line in tests[4:])
    scores = json.load(open("p.json"))["grounding"]
    assert scores["n_queries"] == n_left < len(metrics.read_predictions(file))


def test_a_run_that_goes_on_is_searched_and_grounded_anew(call, phantom, tmp_path, monkeypatch):
    """Guards against embeddings and answers of the stopped run after it was resumed: stopped by a
    signal, searched and grounded, resumed, searched and grounded again; against a fresh model, one
    image at a time."""
    config = dataclasses.replace(SMALL, preset="tiny", lora_rank=0, llm_lora_rank=0, steps=8,
                                 epochs=None, batch_size=8)
    monkeypatch.setitem(train.PRESETS, "tiny", config)
    monkeypatch.chdir(tmp_path)
    run, rows = tmp_path / "run", data.read_manifest(phantom, "test")
    flags = ["train.py", "--data", str(phantom), "--preset", "tiny", "--out", str(run),
             "--device", "cpu"]
    log_values, answers = train.log_values, []
    for resume in ([], ["--resume"]):
        n_steps = itertools.count(1)
        if not resume:                                         # the third step is interrupted
            monkeypatch.setattr(train, "log_values", lambda *args: (
                next(n_steps) == 3 and os.kill(os.getpid(), signal.SIGTERM)) or log_values(*args))
        monkeypatch.setattr(sys, "argv", flags + resume)
        with contextlib.nullcontext() if resume else pytest.raises(SystemExit):
            train.main()
        monkeypatch.setattr(train, "log_values", log_values)
        model = LoFi.from_pretrained(run)
        monkeypatch.setattr(sys, "argv", ["retrieve.py", "--checkpoint", str(run), "--text",
                                          "Nodule.", "--k", "12", "--json", "s.json"])
        retrieve.main()
        text_emb = model.encode_text("Nodule.")[0]
        cosine = {row["image"]: float(model.encode_image(row["path"])[0] @ text_emb)
                  for row in rows}
        found = {row["image"]: row["similarity"]
                 for row in json.load(open("s.json"))["results"]}
        assert found == pytest.approx(cosine, abs=1e-5)
        [nearest] = predictions_in(call("--checkpoint", run, "--lvlm", "nearest", "--k", 2)[0])
        [lofi] = predictions_in(call("--checkpoint", run, "--lvlm", "lofi")[0])
        paths = {row["image"]: row["path"] for row in rows}
        for row in metrics.read_predictions(nearest) + metrics.read_predictions(lofi):
            assert row["similarity"] == similarity_by_hand(model, paths[row["image"]],
                                                           row["phrase"])
        expected = icl_ground.lofi_predictions(model, rows)
        assert [row["raw"] for row in metrics.read_predictions(lofi)] \
            == [row["raw"] for row in expected]
        answers.append((lofi, [row["similarity"] for row in metrics.read_predictions(lofi)]))
    assert answers[0][0] == answers[1][0] and answers[0][1] != answers[1][1]
    assert len(open(run / "log.jsonl").readlines()) == 8


def test_several_encoders_and_k_make_table_2(call, phantom, run_dir, tmp_path):
    """Guards against encoders or k that overwrite each other, and demonstrations of a small k that
    are not the first of a larger one's: with k = 1, a phrase gets the first boxes of the image that
    is most similar by E_I."""
    shutil.copytree(run_dir, tmp_path / "other")
    args = ("--data", phantom, "--lvlm", "nearest")
    out, _ = call(*args, "--encoders", run_dir, "other", "--k", 1, 3)
    names = [f"nearest, {encoder}, k={k}" for encoder in (run_dir, "other") for k in (1, 3)]
    rows = [line for line in out.splitlines() if "[" in line and "k=" in line]
    assert [line.split("  ")[0] for line in rows] == names
    files = predictions_in(out)
    assert len({*files}) == 4 and len({open(file).read() for file in files}) == 2
    model, manifest = LoFi.from_pretrained(run_dir), data.read_manifest(phantom)
    pool = icl_ground.with_boxes(row for row in manifest if row["split"] != "test")
    pool_emb = model.encode_image([row["path"] for row in pool])
    paths = {row["image"]: row["path"] for row in manifest}
    for row in metrics.read_predictions(files[0]):
        best = pool[int((pool_emb @ model.encode_image(paths[row["image"]])[0]).argmax())]
        assert row["pred"] == best["regions"][0]["boxes"]


def test_shown_prompt_is_what_is_sent(call, phantom, run_dir, lvlm_dir, processor, tmp_path,
                                      monkeypatch):
    """Guards against a prompt that is printed by other means than the one that is sent, one that
    stands before the JSON on stdout, and images in the prompt of a model that sees none."""
    text_dir, tokenizer = tmp_path / "text", small_processor().tokenizer
    small_text_lvlm(tokenizer).save_pretrained(text_dir)
    tokenizer.save_pretrained(text_dir)
    sent, ids = [], icl_ground.chat_ids
    monkeypatch.setattr(icl_ground, "chat_ids", lambda *args: sent.append(ids(*args)) or sent[-1])
    row = data.read_manifest(phantom, "test")[0]
    for folder, *blind in ((lvlm_dir,), (lvlm_dir, "--blind"), (text_dir,)):
        out, err = call("--image", row["path"], "--phrase", "A <eos> nodule.", "--data", phantom,
                        "--lvlm", folder, "--checkpoint", run_dir, "--max-new-tokens", 2, "--k",
                        3, "--show-prompt", *blind)
        assert json.loads(out)["lvlm"] == str(folder)
        prompt = err[err.index("<bos>"):err.rindex("<start_of_turn>model\n")]
        note = r"\[image: (.*?)\]"
        shown = re.findall(f"<start_of_image>{note}", prompt)
        assert shown == [] if blind or folder == text_dir else shown[-1] == row["path"]
        whole = re.sub(f"<start_of_image>{note}", lambda _: processor.full_image_sequence, prompt)
        whole += "<start_of_turn>model\n"
        assert processor.tokenizer(whole, add_special_tokens=False)["input_ids"] == sent[-1]


def test_prompt_is_shown_without_any_weights_of_an_lvlm(call, phantom, run_dir, pool):
    """Guards against --show-prompt that needs a gated model: the whole prompt is printed, for an
    image whoever answers, and for a set before the missing model is named. Against the turns."""
    row, model = data.read_manifest(phantom, "test")[0], LoFi.from_pretrained(run_dir)
    phrase = row["regions"][0]["phrase"]
    options = ("--data", phantom, "--checkpoint", run_dir, "--k", 2, "--show-prompt")
    out, err = call("--image", row["path"], "--phrase", phrase, *options, "--lvlm", "lofi")
    found = json.loads(out)["demonstrations"]
    prompt = err[err.index("<start_of_turn>user"):err.rindex("<start_of_turn>model\n")]
    assert INSTRUCTION in prompt and prompt.endswith(f"{phrase}<end_of_turn>\n")
    images = [phantom / triplet["image"] for triplet in found[::-1]] + [row["path"]]
    assert re.findall(r"\[image: (.*?)\]", prompt) == list(dict.fromkeys(map(str, images)))
    assert all(f"{triplet['phrase']}<end_of_turn>" in prompt for triplet in found)
    assert "not at hand" in err and err.count("Where is this finding?") == 3
    assert found == demonstrations_by_hand(model, phantom, row)[:2]
    with pytest.raises(InputError, match="google/medgemma-1.5-4b-it: cannot be loaded"):
        call(*options, "--lvlm", "google/medgemma-1.5-4b-it")


def answer(pred=(), boxes=(), malformed=False, **more):
    return {"phrase": "words " * 30, "pred": pred, "boxes": boxes, "malformed": malformed, **more}


def test_an_answer_is_drawn_solid_and_the_truth_dashed():
    """Guards against the two kinds of box being taken for each other, and boxes out of place: of a
    400 x 200 image, which is drawn 352 x 176 in the middle of 360 x 360."""
    cell = np.array(icl_ground.answer_cell(
        Image.new("L", (400, 200)), answer([[0.1, 0.2, 0.4, 0.8]], [[0.6, 0.2, 0.9, 0.8]])))
    assert cell.shape == (448, 360, 3) and (cell[1, 1] == (255, 165, 0)).all()
    colours = [ImageColor.getrgb(colour) for colour in data.COLOURS[:2]]

    def drawn(line, colour, low, high):
        """Where the colour is, on an edge from low to high and not beyond it."""
        found = np.flatnonzero((line == colour).all(1))
        assert abs(found[0] - low) < 3 and abs(found[-1] - high) < 10
        return found
    for y in (127, 232):                                       # upper and lower edge of both
        assert (np.diff(drawn(cell[y], colours[0], 39, 144)) == 1).all()
        assert 40 < len(drawn(cell[y], colours[1], 215, 320)) < 75           # of 105
    for x, colour, least, most in ((39, 0, 104, 109), (144, 0, 104, 109), (215, 1, 40, 75),
                                   (320, 1, 40, 75)):          # left and right edge of each
        assert least < len(drawn(cell[110:, x], colours[colour], 127 - 110, 232 - 110)) < most


def test_an_answer_without_a_box_and_its_words():
    """Guards against labels on the image, and an answer without boxes, a malformed reply or a low
    similarity that is not said, in the picture after a long phrase too."""
    box, image = [[0.1, 0.2, 0.4, 0.8]], Image.new("L", (300, 300))
    answers = [answer(), answer(malformed=True), answer(similarity=0.5), answer(box),
               answer(box, similarity=-0.123)]
    assert [icl_ground.outcome(a) for a in answers] == [
        "no box predicted", "malformed reply, no box", "no box predicted, similarity 0.50",
        "predicted", "predicted, similarity -0.12"]
    cells = [np.array(icl_ground.answer_cell(image, a)) for a in answers]
    assert not any(cell[4:356, 4:356].any() for cell in cells[:3])
    assert len({cell[360:].tobytes() for cell in cells}) == 5  # the captions


def test_figure_shows_the_nearest_demonstrations_with_their_boxes(tmp_path):
    """Guards against a picture of Fig. 1b without its demonstrations, one cell per triplet instead
    of per image, and more of them than fit. By the grey values of the images."""
    found = []
    for n, grey in enumerate((50, 50, 90, 130, 170, 210)):
        path = tmp_path / f"{grey}.png"
        Image.new("L", (40, 40), grey).save(path)
        found.append({"path": str(path), "phrase": f"p{n}", "cosine": 0.9 - n / 10,
                      "boxes": [[0.5, 0.5, 0.9 - n / 10, 0.9]]})
    query = Image.new("L", (100, 100), 20)
    sheet = np.array(icl_ground.figure(query, answer([[0.1, 0.1, 0.4, 0.4]]), found))
    assert sheet.shape == (448, 5 * 360, 3)
    assert [tuple(sheet[100, x]) for x in range(100, 1800, 360)] == [
        (grey,) * 3 for grey in (20, 50, 90, 130, 170)]
    first = sheet[:360, 360:720]                               # its two triplets, by right edges
    for x, colour in zip((320, 285), data.COLOURS):            # 4 + 0.9 * 351, 4 + 0.8 * 351
        assert (first[185:315, x - 2:x + 3] == ImageColor.getrgb(colour)).all(2).any(1).all()
    assert not (sheet[:360, 720:1080] == ImageColor.getrgb(data.COLOURS[1])).all(2).any()
    alone = np.array(icl_ground.figure(query, answer(), []))
    assert alone.shape == (448, 360, 3)


# ---- first contact, and what must not be overwritten --------------------------------------------

@pytest.fixture(scope="module")
def paper_run(saved_run, tmp_path_factory):
    """A run folder of the paper's preset."""
    folder = tmp_path_factory.mktemp("runs") / "paper"
    shutil.copytree(saved_run, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "preset": "paper"}))
    return folder


def test_a_miniature_run_answers_by_itself(call, phantom, run_dir):
    """Guards against a first command that ends at gated weights although a run is there, a grounder
    that is chosen in silence, and an answer without a box that is not told."""
    path = data.read_manifest(phantom, "test")[0]["path"]
    out, err = call("--image", path, "--phrase", "Zebra.", "--checkpoint", run_dir, "--data",
                    phantom)
    found = json.loads(out)
    assert found["lvlm"] == "lofi" and "miniature run" in err
    assert "--lvlm google/medgemma-1.5-4b-it" in err
    assert bool(found["boxes"]) != ("no box" in err) and Image.open(found["overlay"])


def test_the_order_of_what_is_missing(call, phantom, paper_run):
    """Guards against gated weights being named where there is no run at all, and an error that does
    not say how to get them."""
    image = data.read_manifest(phantom, "test")[0]["path"]
    with pytest.raises(InputError, match="runs/phantom: no such checkpoint; python train.py"):
        call("--image", image, "--phrase", "x")
    args = ("--image", image, "--phrase", "Small nodule.", "--checkpoint", paper_run, "--blind",
            "--data")
    with pytest.raises(InputError) as error:
        call(*args, phantom)
    for part in ("google/medgemma-1.5-4b-it", "https://huggingface.co/google/medgemma-1.5-4b-it",
                 "hf auth login", "local folder"):
        assert part in str(error.value)


def test_the_image_is_not_replaced_by_its_overlay(call, phantom, tmp_path):
    """Guards against a query image that is lost, through a link too."""
    image, link = tmp_path / "x.png", tmp_path / "link.png"
    shutil.copy(data.read_manifest(phantom, "test")[0]["path"], image)
    link.symlink_to(image)
    before = image.read_bytes()
    for out in (image, link):
        with pytest.raises(InputError, match=out.name):
            call("--image", image, "--phrase", "x", "--lvlm", "prior", "--data", phantom, "--out",
                 out)
    assert image.read_bytes() == before


WRONG = [
    (("--image", "x.png"), "--image and --phrase go together"),
    (("--phrase", "x"), "--image and --phrase go together"),
    (("--image", "x.png", "--phrase", " "), "--image and --phrase go together"),
    (("--image", "x.png", "--phrase", "x", "--lvlm", "lofi"), "x.png: cannot be read"),
    (("--k", "-1"), "--k -1: expected 0 or more"),
    (("--lvlm", "nearest", "--k", 0), "--k 0: expected 1 or more"),
    (("--lvlm", "prior", "--blind"), "--blind and --plain are for a Gemma 3"),
    (("--lvlm", "lofi", "--plain"), "--blind and --plain are for a Gemma 3"),
    (("--lvlm", "lofi", "--encoders", "RUN"), "--encoders: --lvlm lofi takes no demonstrations"),
    (("--lvlm", "prior", "--encoders", "RUN", "RUN"), "--encoders: --lvlm prior takes no demon"),
    (("--image", "x.png", "--phrase", "x", "--k", 1, 2), "one --k"),
    (("--image", "IMAGE", "--phrase", "x", "--out", "x.jsonl"), "expected a .png"),
    (("--image", "IMAGE", "--phrase", "x", "--json", "x.json"), "no --json"),
    (("--out", "x.csv"), "expected a .jsonl"),
    (("--data", "DATA", "--lvlm", "prior", "--out", "x.jsonl", "--json", "./x.jsonl"),
     "x.jsonl: expected a .json file"),
    (("--lvlm", "prior", "--data", "DATA", "--device", "gpu"), "expected cpu"),
    (("--lvlm", "lofi", "--checkpoint", "RUN", "--data", "nowhere"), "no such file"),
    (("--lvlm", "lofi", "--checkpoint", "nowhere", "--data", "DATA"), "no such checkpoint"),
    (("--lvlm", "lofi", "--checkpoint", "TEST", "--data", "DATA"), "not a run folder"),
    (("--lvlm", "nearest", "--encoders", "nowhere", "--data", "DATA"), "nowhere"),
    (("--lvlm", "RUN", "--data", "DATA", "--checkpoint", "RUN"),
     "cannot be loaded .*expected a folder that save_pretrained wrote"),
    (("--lvlm", "nearest", "--pool", "TEST", "--checkpoint", "RUN", "--data", "DATA"),
     "no phrase with boxes in its splits train and val")]


@pytest.mark.parametrize("args, message", WRONG)
def test_wrong_input_is_one_line(args, message, call, phantom, run_dir, tmp_path):
    """Guards against a traceback, or a run that starts and leaves a file behind."""
    rows = [line for line in open(phantom / "manifest.jsonl") if '"test"' in line]
    (tmp_path / "manifest.jsonl").write_text("".join(rows))
    (tmp_path / "images").symlink_to(phantom / "images")
    names = {"DATA": phantom, "RUN": run_dir, "TEST": tmp_path,
             "IMAGE": data.read_manifest(phantom, "test")[0]["path"]}
    with pytest.raises(InputError, match=message) as error:
        call(*(names.get(arg, arg) for arg in args))
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.glob("*.jsonl"))[1:] and not (tmp_path / "runs").exists()


def test_first_command_of_all_is_one_line(tmp_path, monkeypatch):
    """Guards against a traceback where nothing was trained yet, and gated weights named first."""
    script = str(ROOT / "icl_ground.py")
    monkeypatch.chdir(tmp_path)
    Image.new("L", (9, 9)).save("x.png")
    monkeypatch.setattr(sys, "argv", [script, "--image", "x.png", "--phrase", "Small effusion."])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code.startswith("icl_ground.py: runs/phantom: no such checkpoint; python trai")
    assert "\n" not in end.value.code and "medgemma" not in end.value.code
