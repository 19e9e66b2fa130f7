"""The model: LoRA, attention pooling, one forward path, answers, files."""

import dataclasses
import itertools
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from PIL import Image
from transformers import SiglipConfig, SiglipModel

import data
import losses
import train
from conftest import SMALL
from data import InputError
from model import (PAPER, AttentionPooling, DualEncoder, LoFi, build_encoder, build_llm,
                   check_checkpoint)


def lora(model):
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def fill_lora(model):
    """Give the B matrices values, as training does; at the start they are 0."""
    for name, p in lora(model).items():
        torch.nn.init.normal_(p, std=0.2)
    return model


def all_losses(model, batch):
    image_emb, text_emb, nll = model(batch)
    return losses.sigmoid_loss(image_emb, text_emb, model.siglip.logit_scale.exp(),
                               model.siglip.logit_bias), nll


# ---- LoRA and parts from scratch ----------------------------------------------------------------

def adapted(part):
    """{name: layer} of the layers of a part that LoRA wraps; the name from "layers" on for Gemma,
    with the tower's for SigLIP."""
    return {re.search(r"(\w+_model\.encoder\.)?layers.*", name)[0]: layer
            for name, layer in part.named_modules() if hasattr(layer, "lora_A")}


def test_paper_sizes():
    """Guards: LoRA on other layers than the paper's, such as the LLM's keys, the pooling head or
    the MLPs; another rank; LoRA scaled by more or less than 1; another architecture than the
    checkpoints'."""
    with torch.device("meta"):
        siglip = SiglipModel(SiglipConfig(vision_config=PAPER.vision, text_config=PAPER.text))
        llm = build_llm(dataclasses.replace(PAPER, llm=None))
        assert sum(p.numel() for p in siglip.parameters()) == 1_136_555_698
        assert sum(p.numel() for p in llm.parameters()) == 268_098_176
        full = [i for i, kind in enumerate(llm.config.layer_types) if kind == "full_attention"]
        assert full == [5, 11, 17]
    tokenizer = SimpleNamespace(name_or_path="", vocab_size=9, bos_token_id=1, eos_token_id=2,
                                pad_token_id=0)
    model = LoFi(PAPER, siglip, llm, tokenizer, tokenizer)
    assert adapted(model.siglip).keys() == {
        f"{tower}_model.encoder.layers.{i}.self_attn.{name}" for tower in ("vision", "text")
        for i in range(27) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
    assert adapted(model.llm).keys() == {
        f"layers.{i}.self_attn.{name}" for i in range(18) for name in ("q_proj", "v_proj")}
    layers = [*adapted(model.siglip).values(), *adapted(model.llm).values()]
    assert {scale for layer in layers for scale in layer.scaling.values()} == {1.0}
    count = lambda part: sum(p.numel() for p in lora(part).values())
    assert count(model.siglip) == 7_962_624 and count(model.llm) == 184_320
    assert model.pooling.queries.shape == (64, 1152)
    assert model.pooling.projection.out_features == 640
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    rest = {n for n in trains if "lora_" not in n and not n.startswith("pooling.")}
    assert {n.split(".")[-1] for n in rest} == {"logit_scale", "logit_bias"}


def test_lora_adds_alpha_over_rank_b_a(rows):
    """Guards: one part's alpha or rank taken for the other's, a layer that is changed before it is
    trained, a wrapped layer that is not the one it wraps. Oracle: W x + alpha / rank B A x."""
    config = dataclasses.replace(SMALL, lora_alpha=32, llm_lora_alpha=2)     # ranks: 16 and 4
    model = LoFi.build(config, data.tokenizer_texts(rows)).eval()
    for part, scale in ((model.siglip, 2.0), (model.llm, 0.5)):
        for layer in adapted(part).values():
            x, base = torch.randn(3, layer.in_features), layer.base_layer
            assert torch.equal(layer(x), base(x))
            a, b = (matrix["default"].weight for matrix in (layer.lora_A, layer.lora_B))
            with torch.no_grad():
                b.normal_()
            by_hand = F.linear(x, base.weight + scale * b @ a, base.bias)
            assert torch.allclose(layer(x), by_hand, atol=1e-4)


def test_adapters_under_autocast_need_no_cast(model, batch):
    """Guards: adapters whose input is cast to float32 and back, which costs time and memory; a cast
    left out where it changes the numbers. Oracle: peft's own way, with the cast."""
    fill_lora(model).train()
    layers, gradients = [m for m in model.modules() if isinstance(m, LoraLayer)], []
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
    for casts in (False, True):
        for layer in layers:
            layer.cast_input_dtype_enabled = casts
        with torch.autocast("cpu", torch.bfloat16):
            l_s, nll = all_losses(model, batch)
        trains = [p for p in model.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(l_s + 5 * nll.mean(), trains))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients[0])


def test_b_starts_at_minus_log_of_the_batch(rows, phantom, monkeypatch):
    """Guards: SigLIP's b = -10 for 32,768 images in place of -log(B), a batch size that does not
    reach the encoder or leaves out the other processes, a temperature of 1."""
    texts = data.tokenizer_texts(rows)
    start = lambda model: (model.siglip.logit_scale.exp().item(), model.siglip.logit_bias.item())
    assert start(LoFi.build(SMALL, texts, 7)) == pytest.approx((10, -math.log(7)))
    assert start(LoFi.build(SMALL, texts)) == pytest.approx((10, -math.log(SMALL.batch_size)))
    flags = f"train.py --data {phantom} --preset tiny --batch-size 6"
    monkeypatch.setattr(sys, "argv", flags.split())
    for world, expected in ((1, 6), (3, 18), (20, 40)):        # of 40 training images at most
        model, batch_size = train.build_model(train.parse_args(), None, rows, world)
        assert batch_size == expected
        assert start(model) == pytest.approx((10, -math.log(expected)))


def test_towers_from_scratch():
    """Guards: layers that do not start as the identity where everything trains; LoRA on towers that
    do nothing; embeddings that are scaled twice or not at all; a patch's position code turned or
    off centre."""
    special = dict(vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    config = dataclasses.replace(SMALL, text={**SMALL.text, **special},
                                 decoder={**SMALL.decoder, **special})
    whole = dataclasses.replace(config, lora_rank=0, llm_lora_rank=0)
    torch.manual_seed(5)
    plain = SiglipModel(SiglipConfig(vision_config=config.vision, text_config=config.text))
    torch.manual_seed(5)
    siglip = build_encoder(config)
    ours, theirs = (m.text_model.embeddings for m in (siglip, plain))
    words = 3 * theirs.token_embedding.weight
    words[3] = 0                                               # padding
    assert torch.allclose(ours.token_embedding.weight, words)
    assert torch.allclose(ours.position_embedding.weight, 0.2 * theirs.position_embedding.weight)
    assert torch.allclose(siglip.vision_model.embeddings.position_embedding.weight,
                          code_by_hand(4, 32, 2), atol=1e-5)
    x = torch.randn(2, 5, 32)
    for tower in (siglip.vision_model, siglip.text_model):
        assert not torch.allclose(tower.encoder(x).last_hidden_state, x, atol=0.01)
    vision = build_encoder(whole).vision_model
    assert torch.allclose(vision.encoder(x).last_hidden_state, x, atol=1e-4)
    x = torch.randn(2, 5, 48)
    decoder = build_llm(whole).model
    assert torch.equal(decoder(inputs_embeds=x).last_hidden_state, decoder.norm(x))


# ---- attention pooling --------------------------------------------------------------------------

def code_by_hand(n, width, heads):
    """Sines, then cosines of x, then of y, at the centre of each cell of an n x n grid, row by row:
    h / 4 frequencies from pi to 4 pi for the h channels of a head."""
    h, rows = width // heads, []
    frequencies = [math.pi * 4 ** (i / (h // 4 - 1)) for i in range(h // 4)]
    for row, column in itertools.product(range(n), repeat=2):
        code = [wave(f * (place + 0.5) / n) for place in (column, row)
                for wave in (math.sin, math.cos) for f in frequencies]
        rows.append(code * heads)
    return torch.tensor(rows)


def layer_norm(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def pooling_by_hand(pool, patches, n, heads):
    """Patches (P, D_v) -> visual tokens (V, H) and the attention of each head (heads, V, P)."""
    x = layer_norm(patches, pool.norm_patches)
    keys = x + 2 * code_by_hand(n, x.shape[1], heads)          # the values: x without the code
    w, b = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    q, k, v = (y @ w[i].T + b[i] for i, y in enumerate((pool.queries, keys, x)))
    pooled, weights, h = [], [], x.shape[1] // heads
    for head in range(heads):
        part = slice(head * h, (head + 1) * h)
        weights.append((q[:, part] @ k[:, part].T / h ** 0.5).softmax(-1))
        pooled.append(weights[-1] @ v[:, part])
    out = torch.cat(pooled, -1) @ pool.attention.out_proj.weight.T + pool.attention.out_proj.bias
    out = layer_norm(out, pool.norm) @ pool.projection.weight.T + pool.projection.bias
    return out, torch.stack(weights)


@torch.no_grad()
def test_attention_pooling_by_hand(model):
    """Guards: keys without the position code, values with it, a grid that is off centre, queries
    that differ from their grid, a norm or bias left out. Oracle: attention written out, with the
    module's own weights, all of them random."""
    pool, patches = model.pooling, torch.randn(2, 16, 32)      # 2 x 2 queries on 4 x 4 patches
    assert torch.allclose(pool.queries, 2 * code_by_hand(2, 32, 2), atol=1e-5)
    for p in pool.parameters():
        p.add_(0.3 * torch.randn_like(p))
    for one, visual in zip(patches, model.visual_tokens(patches)):
        by_hand, _ = pooling_by_hand(pool, one, 4, 2)
        assert torch.allclose(visual, by_hand, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("a_side, n", [(2, 4), (3, 5), (8, 32)])             # SMALL, TINY, PAPER
def test_queries_start_at_their_own_place(a_side, n):
    """Guards: queries that start blind, on another grid than the patches', or to one side. Each
    looks most at the patch nearest to the centre of its cell, and a mirrored one as if mirrored."""
    torch.manual_seed(0)
    pool = AttentionPooling(32, 2, n * n, a_side ** 2, 48)
    patches = torch.randn(n * n, 32)
    by_hand, _ = pooling_by_hand(pool, patches, n, 2)
    assert torch.allclose(pool(patches[None])[0], by_hand, atol=1e-4)
    _, weights = pooling_by_hand(pool, torch.zeros(n * n, 32), n, 2)         # places alone count
    weights = weights.mean(0).view(a_side, a_side, n, n)
    for row, column in itertools.product(range(a_side), repeat=2):
        y, x = divmod(weights[row, column].argmax().item(), n)
        assert abs((y + 0.5) / n - (row + 0.5) / a_side) <= 0.51 / n
        assert abs((x + 0.5) / n - (column + 0.5) / a_side) <= 0.51 / n
    score = (pool.queries @ pool.position.T).view(a_side, a_side, n, n)
    assert torch.allclose(score, score.flip(1, 3), atol=1e-3)                # left and right
    assert torch.allclose(score, score.flip(0, 2), atol=1e-3)                # above and below


# ---- one forward path ---------------------------------------------------------------------------

def test_gradients_are_exactly_where_they_should_be(model, batch):
    """Guards: a frozen tower that trains, a trainable tensor that no loss reaches, a loss that
    leaks."""
    fill_lora(model).train()
    l_s, nll = all_losses(model, batch)
    everything = touched(model, l_s + 5 * nll.mean())
    assert everything == {n for n, p in model.named_parameters() if p.requires_grad}
    contrastive = touched(model, l_s)
    assert not {n for n in contrastive if n.startswith(("llm.", "pooling."))}
    assert {"siglip.base_model.model.logit_scale",
            "siglip.base_model.model.logit_bias"} <= contrastive
    generative = touched(model, nll.mean())
    assert not {n for n in generative if "text_model" in n or "logit" in n}
    assert {n for n in lora(model) if "vision_model" in n} <= generative


def touched(model, loss):
    """Names of the parameters that get a gradient other than 0 from a loss."""
    trains = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in trains], allow_unused=True, retain_graph=True)
    return {n for (n, _), g in zip(trains, grads) if g is not None and g.abs().sum() > 0}


def test_the_loss_of_targets_is_gemmas(model, batch):
    """Guards: logits one place off, a missing <bos>, visual tokens scaled by sqrt(H), padding that
    is seen.

    Oracle: Gemma3ForCausalLM(labels=...) on each row alone, its embeddings laid out by hand."""
    fill_lora(model)
    _, patches = model.encode_image(batch["image"], with_patches=True)
    visual = model.visual_tokens(patches)
    _, nll = all_losses(model, batch)
    table = model.llm.get_input_embeddings()
    for r, (ids, is_target) in enumerate(zip(batch["ids"], batch["is_target"])):
        end = is_target.nonzero().max() + 1
        labels = torch.full((1, 1 + SMALL.n_queries + end), -100)
        labels[0, 1 + SMALL.n_queries:][is_target[:end]] = ids[:end][is_target[:end]]
        embeds = torch.cat([table(torch.tensor([[model.llm_tokenizer.bos_token_id]])),
                            visual[batch["image_of_row"][r]][None], table(ids[None, :end])], 1)
        loss = model.llm(inputs_embeds=embeds, labels=labels).loss
        assert torch.allclose(loss, nll[r], atol=1e-4)


def test_embeddings_are_siglips(model):
    """Guards: a second preprocessing path, uint8 images read as 0..255 floats, dot products in
    place of cosines, texts read in another way than their ids, a gradient kept for a user's
    embeddings or lost in training."""
    fill_lora(model)
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    pixels = torch.from_numpy(image).float()[None, None].expand(1, 3, 32, 32) / 255 * 2 - 1
    expected = F.normalize(model.siglip.get_image_features(pixel_values=pixels).pooler_output)
    for images in (torch.from_numpy(image)[None], Image.fromarray(image)):
        assert torch.allclose(model.encode_image(images), expected, atol=1e-5)
        assert not model.encode_image(images).requires_grad
    assert model.image_features(model.pixels(image))[0].requires_grad
    texts = ["No nodule.", "Large left pleural effusion."]
    ids = data.text_ids(model.text_tokenizer, texts, 32)
    expected = F.normalize(model.siglip.get_text_features(input_ids=ids).pooler_output)
    assert torch.allclose(expected.norm(dim=-1), torch.ones(2), atol=1e-5)
    for given in (texts, ids):
        assert torch.allclose(model.encode_text(given), expected, atol=1e-5)
        assert not model.encode_text(given).requires_grad
    assert model.text_features(ids).requires_grad
    assert torch.allclose(model.encode_text(texts[1]), expected[1:], atol=1e-5)


def test_every_kind_of_image_and_text_is_one_embedding(model, rows):
    """Guards: a path, picture, array or tensor that is read in another way than the others; a list
    taken for one image, or its order lost."""
    paths, pictures = [row["path"] for row in rows[:2]], [Image.open(r["path"]) for r in rows[:2]]
    arrays = [np.array(image) for image in pictures]
    tensor = torch.stack([torch.from_numpy(np.array(image.resize((32, 32), Image.BILINEAR)))
                          for image in pictures])
    assert {image.mode for image in pictures} == {"L"}         # so no other conversion is needed
    expected, _ = model.image_features(tensor)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)
    for images in (paths, tuple(paths), pictures, arrays, tensor, [paths[0], arrays[1]],
                   [np.stack([array] * 3, -1) for array in arrays]):
        assert torch.allclose(model.encode_image(images), expected, atol=1e-6)
    for image in (paths[1], Path(paths[1]), pictures[1], arrays[1], [paths[1]], tensor[1:]):
        assert torch.allclose(model.encode_image(image), expected[1:], atol=1e-6)
    texts = ["No nodule.", "The heart is enlarged."]
    emb = model.encode_text(texts)
    assert torch.equal(model.encode_text(tuple(texts)), emb)
    assert torch.allclose(model.encode_text(texts[1]), emb[1:], atol=1e-6)


@pytest.mark.parametrize("call, words", [
    (lambda m, x: m.encode_image(torch.rand(3, 32, 32)), "torch.float32.*expected uint8"),
    (lambda m, x: m.encode_image(torch.zeros(1, 31, 32, dtype=torch.uint8)), "32, 32"),
    (lambda m, x: m.encode_image(np.zeros((32, 32))), "float64: cannot be read as an image"),
    (lambda m, x: m.encode_image([]), "no image"), (lambda m, x: m.report([]), "no image"),
    (lambda m, x: m.encode_image([x, "nowhere.png"]), "nowhere.png"),
    (lambda m, x: m.encode_image(None), "cannot be read as an image"),
    (lambda m, x: m.encode_text([]), "a list of texts"),
    (lambda m, x: m.encode_text(["No nodule.", None]), "a list of texts"),
    (lambda m, x: m.ground(x, []), "a list of texts"),
    (lambda m, x: m.ground([x, x], ["x"]), "2 images, expected one"),
    (lambda m, x: m.report([x, x]), "2 images, expected one"),
    (lambda m, x: m.describe(x, [[40, 50, 80, 80]]), "80.*expected a list of .* in .0, 1"),
    (lambda m, x: m.describe(x, [0.4, 0.5, 0.8, 0.8]), "expected a list of"),
    (lambda m, x: m.describe(x, [[0.4, 0.5, 0.4, 0.8]]), "expected a list of"),
    (lambda m, x: m.describe(x, [[0.4, 0.5, 0.8, 0.8], [0.1, 0.2]]), "expected a list of"),
    (lambda m, x: m.describe(x, []), "expected a list of")])
def test_what_the_model_cannot_take_is_one_line(model, rows, call, words):
    """Guards: three embeddings for the channels of one float tensor, the answer about another
    image or region than was meant, an error from deep in a library."""
    with pytest.raises(InputError, match=words) as error:
        call(model, rows[0]["path"])
    assert "\n" not in str(error.value)


def test_similarity_is_a_cosine_less_that_of_no_text(model, rows):
    """Guards: an image's own offset left in, the similarities of other phrases or in another order,
    other boxes than without them. Oracle: cosines by hand."""
    fill_lora(model)
    path, phrases = rows[0]["path"], ["Large left pleural effusion.", "x"]
    model.config = dataclasses.replace(model.config, max_target=4)
    image = torch.from_numpy(np.array(data.load_image(path, 32)))[None, None].float() / 127.5 - 1
    ids = data.text_ids(model.text_tokenizer, [*phrases, ""], 32)
    with torch.no_grad():
        i = model.siglip.get_image_features(pixel_values=image.expand(1, 3, 32, 32)).pooler_output
        t = model.siglip.get_text_features(input_ids=ids).pooler_output
    first, second, empty = (i @ t.T / i.norm() / t.norm(dim=1)).flatten().tolist()
    by_hand = [first - empty, second - empty]
    assert abs(by_hand[0] - by_hand[1]) > 1e-3
    boxes, similarity = model.ground(path, phrases, with_similarity=True)
    assert similarity == pytest.approx(by_hand, abs=1e-5)
    assert boxes == model.ground(path, phrases) and len(boxes) == 2
    both = model.similarity([rows[1]["path"], path], phrases)
    assert both.shape == (2, 2) and both[1].tolist() == pytest.approx(by_hand, abs=1e-5)


# ---- answers ------------------------------------------------------------------------------------

@torch.no_grad()
def answer_by_hand(model, visual, prompt, most):
    """The ids of one prompt's greedy answer, with <eos> if that ends it; a full forward for each:
    <bos>, visual tokens (V, H), the prompt, a line break, the answer so far."""
    table, tokenizer, new = model.llm.get_input_embeddings(), model.llm_tokenizer, []
    ids = tokenizer(prompt + "\n", add_special_tokens=False)["input_ids"]
    bos = table(torch.tensor([tokenizer.bos_token_id]))
    while len(new) < most and tokenizer.eos_token_id not in new:
        embeds = torch.cat([bos, visual, table(torch.tensor(ids + new))])
        logits = model.llm(inputs_embeds=embeds[None], use_cache=False).logits[0, -1]
        new.append(logits.argmax().item())
    return new


def as_text(model, ids):
    """The text of an answer's ids; one without <eos> was cut, and is marked as such."""
    text = model.llm_tokenizer.decode(ids, skip_special_tokens=True)
    return text if model.llm_tokenizer.eos_token_id in ids else text + "…"


@pytest.fixture
def speaker(model):
    """A small LoFi whose answers depend on image and prompt: its head is not its token embeddings,
    or it would repeat the last token of the prompt."""
    fill_lora(model)
    head = model.llm.lm_head
    head.weight = torch.nn.Parameter(torch.randn_like(head.weight))
    return model


def visual_of(model, path):
    """The visual tokens (V, H) of an image file."""
    pixels = torch.from_numpy(np.array(data.load_image(path, model.image_size)))
    return model.visual_tokens(model.encode_image(pixels[None], with_patches=True)[1])[0].detach()


def test_generate_is_the_argmax_of_the_full_forward(speaker, rows):
    """Guards: a wrong mask or position with left padding, a cache that drifts, rows that see each
    other, words after <eos>, an answer that is cut and not marked, or marked and whole. Oracle: one
    token at a time, each row alone."""
    prompts = ["Report this medical scan.", "x", "Detect all instances of: a much longer phrase."]
    visual = torch.stack([visual_of(speaker, row["path"]) for row in rows[:3]])
    token, head = answer_by_hand(speaker, visual[0], prompts[0], 3)[-1], speaker.llm.lm_head.weight
    with torch.no_grad():                                      # <eos> wherever this token was
        head[speaker.llm_tokenizer.eos_token_id] = 1.01 * head[token]
    by_hand = [answer_by_hand(speaker, v, p, 12) for v, p in zip(visual, prompts)]
    assert len(by_hand[0]) <= 3 and max(map(len, by_hand)) > 3
    assert speaker.generate(visual, prompts, 12) == [as_text(speaker, ids) for ids in by_hand]


def test_report_ground_and_describe(speaker, rows, monkeypatch):
    """Guards: another task's prompt than in training, answers of another image or in another order,
    a phrase taken letter by letter, a path and a PIL image that are not read alike. Oracle: the
    prompts in full, decoded one token at a time."""
    def by_hand(path, prompt):
        return as_text(speaker, answer_by_hand(speaker, visual_of(speaker, path), prompt, 12))
    generate = speaker.generate                                # at most 12 tokens, to save time
    monkeypatch.setattr(speaker, "generate", lambda visual, prompts, *_: generate(
        visual, prompts, 12))
    monkeypatch.setattr(data, "text_to_boxes", lambda text: ([text], False))
    first, second = rows[0]["path"], rows[1]["path"]
    boxes, seen = [[0.5, 0.2, 0.75, 1.0], [0.1, 0.3, 0.4, 0.6]], []
    for path, image in ((first, first), (second, Image.open(second))):
        x, nodule = (by_hand(path, f"Detect all instances of: {phrase}")
                     for phrase in ("x", "No nodule."))
        assert speaker.ground(image, ["x", "No nodule."]) == [[x], [nodule]]
        assert speaker.ground(image, "No nodule.") == [[nodule]]
        sentence = by_hand(path, "Describe the regions: 100 300 400 600; 500 200 750 1000")
        assert speaker.describe(image, boxes) == sentence
        seen += [x, nodule, sentence]
    seen.append(by_hand(first, "Report this medical scan."))
    assert speaker.report(first) == speaker.report(Image.open(first)) == seen[-1]
    assert len(set(seen)) == 7                                 # so none can stand in for another


def test_ground_reads_boxes(model, rows, monkeypatch):
    """Guards: boxes in another order of coordinates, boxes made of malformed text, half a number
    read as a whole one where the answer is cut; cut answers that are lost whole."""
    eos, pad = model.llm_tokenizer.eos_token_id, model.llm_tokenizer.pad_token_id
    ids = [data.plain_ids(model.llm_tokenizer, text) for text in (
        "125 250 500 750; 600 100 900 400", "125 250 500", "125 250 500 750; 600 100 900 40")]
    ids = [ids[0] + [eos], ids[1] + [eos], ids[2]]             # the last one is cut
    ids = torch.tensor([row + [pad] * (len(ids[0]) - len(row)) for row in ids])
    monkeypatch.setattr(model.llm, "generate", lambda **_: ids)
    assert model.ground(rows[0]["path"], ["No nodule.", "x", "y"]) == [
        [[0.125, 0.25, 0.5, 0.75], [0.6, 0.1, 0.9, 0.4]], [], [[0.125, 0.25, 0.5, 0.75]]]


# ---- files --------------------------------------------------------------------------------------

def test_save_and_load(model, batch, tmp_path):
    """Guards: weights that are not saved, or not loaded; a tokenizer that comes back different;
    dropped temporary files; files that colleagues cannot read."""
    fill_lora(model)
    old = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "run")
    finally:
        os.umask(old)
    again = LoFi.from_pretrained(tmp_path / "run")
    assert again.config == model.config and not again.training
    for a, b in zip(model(batch), again(batch)):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in
               zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    text = "A <eos> of 1.5 cm."
    for name in ("text_tokenizer", "llm_tokenizer"):
        ids = [data.plain_ids(getattr(m, name), text) for m in (model, again)]
        assert ids[0] == ids[1]
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in files} == {0o644} and len(files) >= 4
    assert not [p for p in files if p.suffix == ".tmp"]


def test_pretrained_parts_are_loaded_from_folders_and_not_saved_again(model, rows, tmp_path):
    """Guards: random weights where pretrained ones were asked for, a pretrained b that is set anew,
    a run that stores 1.4 B frozen weights, a tokenizer learned from our texts in place of one that
    is missing."""
    with model.siglip.disable_adapter(), torch.no_grad():
        expected = model.encode_image(rows[0]["path"])
        model.siglip.logit_bias.fill_(-9.5)
    for part, name, tokenizer in (("siglip", "siglip", model.text_tokenizer),
                                  ("llm", "gemma", model.llm_tokenizer)):
        getattr(model, part).unload().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    config = dataclasses.replace(SMALL, encoder=str(tmp_path / "siglip"),
                                 llm=str(tmp_path / "gemma"))
    built = fill_lora(LoFi.build(config, batch_size=3).eval())
    assert built.siglip.logit_bias.item() == -9.5
    assert torch.equal(built.llm.get_input_embeddings().weight,
                       model.llm.get_input_embeddings().weight)
    with built.siglip.disable_adapter():
        assert torch.allclose(built.encode_image(rows[0]["path"]), expected, atol=1e-6)
    with torch.no_grad():
        built.siglip.logit_bias.fill_(-4.5)                    # as if trained
    built.save_pretrained(tmp_path / "run")
    saved = built.saved_state()
    assert all("lora_" in n or n.startswith("pooling.") or "logit" in n for n in saved)
    again = LoFi.from_pretrained(tmp_path / "run")
    for name, tensor in built.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    with pytest.raises(InputError, match="nowhere"):
        LoFi.build(dataclasses.replace(config, llm=str(tmp_path / "nowhere")), ["text"])
    for name in ("gemma", "siglip"):                           # of which siglip comes first
        (tmp_path / name / "tokenizer.json").unlink()
        (tmp_path / name / "tokenizer_config.json").unlink()
        with pytest.raises(InputError, match=f"{name}: cannot be loaded .*tokenizer"):
            LoFi.build(config, ["text"])


def test_a_run_and_its_export_are_one_encoder(model, rows, tmp_path):
    """Guards: LoRA left out of the merge, or merged twice; an export that needs our code; a second
    forward path for baselines; a lost run looked for on the Hub."""
    fill_lora(model).save_pretrained(tmp_path / "run")
    model.export(tmp_path / "out")
    path, emb = rows[0]["path"], model.encode_image(rows[0]["path"])
    for name in ("run", "out"):
        encoder = DualEncoder.load(tmp_path / name)
        assert torch.allclose(encoder.encode_image(path), emb, atol=1e-5)
        assert torch.allclose(encoder.encode_text("No nodule."), model.encode_text("No nodule."),
                              atol=1e-5)
    plain = SiglipModel.from_pretrained(tmp_path / "out")
    pixels = torch.from_numpy(np.array(data.load_image(path, 32)))[None, None] / 127.5 - 1
    out = plain.get_image_features(pixel_values=pixels.expand(1, 3, 32, 32)).pooler_output
    assert torch.allclose(F.normalize(out), emb, atol=1e-5)
    assert not any("lora" in name for name in plain.state_dict())
    assert torch.equal(model.encode_image(path), emb)          # its own LoRA is not merged
    with pytest.raises(FileExistsError, match="out"):
        model.export(tmp_path / "out")
    for lost, words in ((tmp_path / "lost", "no such checkpoint"), ("runs/lost", "train.py")):
        with pytest.raises(InputError, match=words):
            check_checkpoint(lost)
    check_checkpoint("google/siglip2-base-patch16-224")        # may be on the Hub
    (tmp_path / "out" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="out: cannot be loaded"):
        DualEncoder.load(tmp_path / "out")


def test_damaged_and_foreign_checkpoints_are_refused(model, tmp_path):
    """Guards: a half-written file loaded in part; a checkpoint of other sizes forced in; the
    tokenizer of another model; a traceback where one line says which file it is."""
    place = tmp_path / "run"

    def refused(words):
        with pytest.raises(InputError, match=words) as error:
            LoFi.from_pretrained(place)
        assert "\n" not in str(error.value)
    model.save_pretrained(place)
    with pytest.raises(InputError, match="not a run folder"):
        LoFi.from_pretrained(tmp_path)
    config = (place / "config.json").read_text()
    for damaged in ("{", "[]", '{"unknown": 1}'):
        (place / "config.json").write_text(damaged)
        refused("config.json")
    for old, new, words in (('"n_queries": 4', '"n_queries": 9', "pooling.queries"),
                            ('"intermediate_size": 48', '"intermediate_size": 52', "other size"),
                            ('"lora_rank": 16', '"lora_rank": 0', "is missing, unknown")):
        assert old in config
        (place / "config.json").write_text(config.replace(old, new))
        refused(words)
    (place / "config.json").write_text(config)
    weights = place / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused("model.safetensors")
    weights.unlink()
    refused("model.safetensors")
    weights.write_bytes(whole)
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
    data.learn_tokenizer(words, 1024).save_pretrained(place / "tokenizer")
    with pytest.raises(AssertionError, match="the model's own tokenizer"):
        LoFi.from_pretrained(place)
