"""The model: LoRA, one forward path, generation, files."""

import copy
import dataclasses
import itertools
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import SiglipConfig, SiglipModel

import data
import losses
import model as lofi_model
from conftest import SMALL, run
from metrics import InputError
from model import PAPER, Encoder, LoFi, build_encoder, build_llm


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


def test_paper_sizes():
    """Guards: LoRA on the pooling head or the MLPs, another rank, another architecture than the
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
    count = lambda part: sum(p.numel() for p in lora(part).values())
    assert count(model.siglip) == 7_962_624 and count(model.llm) == 184_320
    assert model.pooling.queries.shape == (64, 1152)
    assert model.pooling.projection.out_features == 640
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    rest = {n for n in trains if "lora_" not in n and not n.startswith("pooling.")}
    assert {n.split(".")[-1] for n in rest} == {"logit_scale", "logit_bias"}


def test_lora_changes_nothing_at_the_start(rows):
    """Guards: a wrapped layer that is not the one it wraps."""
    torch.manual_seed(0)
    model = LoFi.build(SMALL, data.tokenizer_texts(rows)).eval()
    plain = copy.deepcopy(model.siglip).merge_and_unload()
    pixels = torch.rand(2, 3, 32, 32)
    a, b = (m.get_image_features(pixel_values=pixels).pooler_output for m in (model.siglip, plain))
    assert torch.allclose(a, b, atol=1e-6)
    with model.siglip.disable_adapter():
        assert torch.equal(a, model.siglip.get_image_features(pixel_values=pixels).pooler_output)


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


def test_images_are_normalised_once(model):
    """Guards: a second preprocessing path; uint8 images read as 0..255 floats."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    pixels = torch.from_numpy(image).float()[None, None].expand(1, 3, 32, 32) / 255 * 2 - 1
    out = model.siglip.get_image_features(pixel_values=pixels)
    expected = F.normalize(out.pooler_output, dim=-1)
    assert torch.allclose(model.encode_image(torch.from_numpy(image)[None]), expected, atol=1e-5)
    assert torch.allclose(model.encode_image(Image.fromarray(image)), expected, atol=1e-5)


def test_heat_map_is_what_a_patch_adds_to_the_cosine(model):
    """Guards: rows and columns swapped; phrases mixed; the empty text's share left in. Oracle: the
    change of the cosines while one patch token is scaled."""
    image = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    phrases = ["No nodule.", "Large left pleural effusion."]
    heat = model.heat_map(Image.fromarray(image), phrases)
    assert heat.shape == (2, 4, 4) and not heat.requires_grad
    _, patches = model.encode_image(torch.from_numpy(image)[None], with_patches=True)
    scales, cosines = torch.ones(2, 16, 1), []
    scales[:, 4 * 2 + 1] += torch.tensor([[-0.05], [0.05]])    # row 2, column 1
    image_emb = model.siglip.vision_model.head(patches * scales)
    for text in (phrases[1], ""):
        cosines.append(F.cosine_similarity(image_emb, model.encode_text(text)))
    low, high = cosines[0] - cosines[1]
    assert heat[1, 2, 1].item() == pytest.approx((high - low).item() / 0.1, rel=0.02)
    assert abs(heat[1, 2, 1]) > 1e-4


def test_ask_command(model, phantom, tmp_path, monkeypatch, capsys):
    """Guards: an answer of another image or phrase; an answer without boxes that is not said; a bad
    box or image that ends in a traceback."""
    model.save_pretrained(tmp_path / "run")
    image = phantom / "images" / "test_00001.png"
    again = LoFi.from_pretrained(tmp_path / "run")

    def ask(*flags):
        monkeypatch.setattr(sys, "argv", ["model.py", "ask", *map(str, (tmp_path / "run", *flags))])
        capsys.readouterr()
        lofi_model.main()
        out, err = capsys.readouterr()
        return json.loads(out), err
    answer, _ = ask(image)
    assert answer["report"] == again.report(image) and 0 <= answer["score"] <= 1
    phrases = ["No nodule.", "Small left pneumothorax."]
    answers, err = ask(image, "--phrase", *phrases)
    assert [a["phrase"] for a in answers] == phrases
    assert [[a["boxes"] for a in answers], [a["score"] for a in answers]] == list(
        again.ground(image, phrases, with_scores=True))
    assert err.count("no box predicted") == sum(not a["boxes"] for a in answers) > 0
    box = [0.1, 0.2, 0.5, 0.6]
    assert ask(image, "--box", *box)[0]["sentence"] == again.describe(image, [box])
    for flags, words in (((image, "--box", .5, .4, .1, .2), "--box"), (("x.png",), "x.png: ")):
        with pytest.raises(InputError, match=words):
            ask(*flags)


def test_embeddings_are_of_unit_length_and_text_goes_in_as_text_or_ids(model):
    """Guards: dot products in place of cosines; two text paths."""
    texts = ["No nodule.", "Large left pleural effusion."]
    emb = model.encode_text(texts)
    assert torch.allclose(emb.norm(dim=-1), torch.ones(2), atol=1e-5)
    ids = data.text_ids(model.text_tokenizer, texts, model.text_length)
    assert torch.equal(emb, model.encode_text(ids))


def test_queries_start_spatial(model):
    """Guards: queries that start blind; each must look most at the patches of its own quarter."""
    pool = model.pooling
    score = pool.queries @ pool.position.T                      # 2 x 2 queries on 4 x 4 patches
    best = score.argmax(-1)
    quarter = (best // 4 // 2) * 2 + best % 4 // 2
    assert quarter.tolist() == [0, 1, 2, 3]


def test_generate_is_the_argmax_of_the_full_forward(model, rows):
    """Guards: a wrong mask or position with left padding, a cache that drifts, rows that see each
    other."""
    fill_lora(model)
    prompts = [data.CAPTIONING_PROMPT,
               "Detect all instances of: a much longer phrase than that.", "x"]
    _, patches = model.encode_image([row["path"] for row in rows[:3]], with_patches=True)
    visual = model.visual_tokens(patches)
    answers, _ = model.generate(visual, prompts, max_new_tokens=12)
    for v, prompt, answer in zip(visual, prompts, answers):
        ids = torch.tensor([data.prompt_ids(model.llm_tokenizer, prompt)])
        new = []
        for _ in range(12):
            embeds = model.embed(v[None], ids)
            logits = model.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1]
            new.append(int(logits.argmax()))
            ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
            if new[-1] == model.llm_tokenizer.eos_token_id:
                break
        assert answer == model.llm_tokenizer.decode(new, skip_special_tokens=True)


def test_report_ground_and_describe_answer(model, rows):
    """Guards: a public command of the model that does not run on a path and on a PIL image."""
    path = rows[0]["path"]
    assert isinstance(model.report(path), str)
    assert len(model.ground(Image.open(path), ["No nodule.", "x"])) == 2
    assert isinstance(model.describe(path, [[0.1, 0.2, 0.3, 0.4]]), str)


def test_save_and_load(model, batch, tmp_path):
    """Guards: weights that are not saved, or not loaded; a tokenizer that comes back different."""
    fill_lora(model)
    model.save_pretrained(tmp_path / "run")
    again = LoFi.from_pretrained(tmp_path / "run")
    assert again.config == model.config
    for a, b in zip(model(batch), again(batch)):
        assert torch.equal(a, b)
    text = "A <eos> of 1.5 cm."
    assert data.plain_ids(again.llm_tokenizer, text) == data.plain_ids(model.llm_tokenizer, text)
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_pretrained_parts_are_loaded_from_folders_and_not_saved_again(rows, tmp_path):
    """Guards: random weights where pretrained ones were asked for; a run that stores 1.4 B frozen
    weights."""
    torch.manual_seed(0)
    source = LoFi.build(dataclasses.replace(SMALL, lora_rank=0, llm_lora_rank=0),
                        data.tokenizer_texts(rows))
    source.siglip.save_pretrained(tmp_path / "siglip")
    source.text_tokenizer.save_pretrained(tmp_path / "siglip")
    source.llm.save_pretrained(tmp_path / "gemma")
    source.llm_tokenizer.save_pretrained(tmp_path / "gemma")
    config = dataclasses.replace(SMALL, encoder=str(tmp_path / "siglip"),
                                 llm=str(tmp_path / "gemma"))
    model = fill_lora(LoFi.build(config).eval())
    path = rows[0]["path"]
    with model.siglip.disable_adapter():
        assert torch.allclose(model.encode_image(path), source.eval().encode_image(path), atol=1e-6)
    model.save_pretrained(tmp_path / "run")
    saved = model.saved_state()
    assert all("lora_" in n or n.startswith("pooling.") or "logit" in n for n in saved)
    again = LoFi.from_pretrained(tmp_path / "run")
    assert torch.equal(again.encode_image(path), model.encode_image(path))
    with pytest.raises(InputError, match="nowhere"):
        LoFi.build(dataclasses.replace(config, llm=str(tmp_path / "nowhere")), ["text"])


def test_export_is_a_plain_siglip(model, rows, tmp_path):
    """Guards: LoRA left out of the merge, or merged twice; a folder that needs our code."""
    fill_lora(model).save_pretrained(tmp_path / "run")
    run("model.py", "export", tmp_path / "run", tmp_path / "out")
    plain = SiglipModel.from_pretrained(tmp_path / "out")
    pixels = model.pixels(rows[0]["path"])[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    emb = F.normalize(plain.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    assert torch.allclose(emb, model.encode_image(rows[0]["path"]), atol=1e-5)
    assert not any("lora" in name for name in plain.state_dict())
    message = run("model.py", "export", tmp_path / "run", tmp_path / "out", ok=False)
    assert "exists already" in message


def test_damaged_and_foreign_checkpoints_are_refused(model, tmp_path):
    """Guards: a half-written file loaded in part; a checkpoint of other sizes forced in; numbers of
    config.json that do not fit together."""
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="not a run folder"):
        LoFi.from_pretrained(tmp_path)
    config = (tmp_path / "run" / "config.json").read_text()
    for damaged in ("{", "[]", '{"unknown": 1}'):
        (tmp_path / "run" / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="config.json is missing, damaged or of another"):
            Encoder.load(tmp_path / "run")
    for old, new, words in (('"n_queries": 4', '"n_queries": 9', "pooling.queries"),
                            ('"n_queries": 4', '"n_queries": "4"', "unsupported operand"),
                            ('"patch_size": 8', '"patch_size": 0', "zero"),
                            ('"hidden_size": 32', '"hidden_size": 33', "33"),
                            ('"lora_rank": 16', '"lora_rank": 0', "is missing or unknown"),
                            ('"encoder": null', '"encoder": 5', "int")):
        assert old in config
        (tmp_path / "run" / "config.json").write_text(config.replace(old, new))
        with pytest.raises(InputError, match=f"do not make a model .*{words}") as error:
            LoFi.from_pretrained(tmp_path / "run")
        assert "\n" not in str(error.value)
    (tmp_path / "run" / "config.json").write_text(config)
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors: missing or damaged"):
        LoFi.from_pretrained(tmp_path / "run")
    weights.unlink()
    with pytest.raises(InputError, match="model.safetensors: missing or damaged"):
        LoFi.from_pretrained(tmp_path / "run")


def test_a_flipped_byte_of_the_weights_is_noticed(model, tmp_path):
    """Guards: a damaged file that loads as another model without a word."""
    model.save_pretrained(tmp_path / "run")
    weights, rng = tmp_path / "run" / "model.safetensors", np.random.default_rng(0)
    small = tmp_path / "small.safetensors"                     # here, every bit of every byte
    lofi_model.write_weights(small, {"a.0": torch.tensor([1.0, -2.0]), "a.1": torch.zeros(2, 1),
                                     "b": torch.tensor(3.0, dtype=torch.bfloat16)})
    assert lofi_model.read_weights(small)["b"] == 3
    bits = [(small, i, bit) for i in range(small.stat().st_size) for bit in range(8)]
    size = weights.stat().st_size
    bits += [(weights, rng.integers(size), rng.integers(8)) for _ in range(50)]
    for path, place, bit in bits:
        whole = path.read_bytes()
        content = bytearray(whole)
        content[place] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(InputError, match="damaged"):
            lofi_model.read_weights(path)
        path.write_bytes(whole)
    assert len(lofi_model.read_weights(weights)) == len(model.saved_state())


def test_weights_that_are_not_finite_are_refused(model, tmp_path):
    """Guards: a diverged model that answers nonsense."""
    with torch.no_grad():
        model.pooling.norm.bias[3] = torch.nan
    model.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match="pooling.norm.bias has a value that is not finite"):
        LoFi.from_pretrained(tmp_path / "run")


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    """Guards: an IndexError in three scripts; a special token that is gone."""
    model.save_pretrained(tmp_path / "run")
    place = tmp_path / "run" / "tokenizer"
    words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
    larger = data.learn_tokenizer(words, 1024)
    larger.save_pretrained(place)
    with pytest.raises(InputError, match="tokenizer: its largest id is .* token embeddings"):
        LoFi.from_pretrained(tmp_path / "run")
    model.llm_tokenizer.save_pretrained(place)
    for path in place.glob("*.json"):
        path.write_text(path.read_text().replace('"eos_token"', '"no_token"'))
    with pytest.raises(InputError, match="eos_token is missing"):
        LoFi.from_pretrained(tmp_path / "run")


def test_files_follow_the_umask(model, tmp_path):
    """Guards: model.safetensors that colleagues cannot read, next to files that they can."""
    old = os.umask(0o022)
    try:
        model.save_pretrained(tmp_path / "run")
    finally:
        os.umask(old)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert {p.stat().st_mode & 0o777 for p in files} == {0o644} and len(files) >= 4


def test_what_a_user_encodes_carries_no_gradient(model, rows):
    """Guards: memory that grows with each image embedded; training without gradients."""
    path = rows[0]["path"]
    assert not model.encode_image(path).requires_grad
    assert not model.encode_text(["No nodule."]).requires_grad
    assert model.encode_image(path, requires_grad=True).requires_grad
    assert model.encode_text("No nodule.", requires_grad=True).requires_grad


def test_a_score_is_the_geometric_mean_probability(model, rows):
    """Guards: a mean of logits, the score of another row, <eos> left out. Oracle: one token at a
    time, each row alone."""
    fill_lora(model)
    prompts = ["Detect all instances of: a longer phrase.", "x"]
    _, patches = model.encode_image([row["path"] for row in rows[:2]], with_patches=True)
    visual = model.visual_tokens(patches)
    _, scores = model.generate(visual, prompts, 6)
    for v, prompt, score in zip(visual, prompts, scores):
        ids, log_p = data.prompt_ids(model.llm_tokenizer, prompt), []
        while len(log_p) < 6 and ids[-1] != model.llm_tokenizer.eos_token_id:
            embeds = model.embed(v[None], torch.tensor([ids]))
            best = model.llm(inputs_embeds=embeds).logits[0, -1].log_softmax(0).max(0)
            log_p.append(best.values.item())
            ids = [*ids, best.indices.item()]
        assert score == pytest.approx(np.exp(np.mean(log_p)), abs=1e-4)


def test_a_string_is_one_phrase(model, rows):
    """Guards: a phrase taken letter by letter."""
    path = rows[0]["path"]
    assert model.ground(path, "No nodule.") == model.ground(path, ["No nodule."])


def test_a_run_or_its_export_is_an_encoder(model, rows, tmp_path):
    """Guards: a second forward path for baselines; a lost run looked for on the Hub."""
    fill_lora(model).save_pretrained(tmp_path / "run")
    text = run("model.py", "export", tmp_path / "run", tmp_path / "siglip")
    assert text.count("\n") == 1
    path, emb = rows[0]["path"], model.encode_image(rows[0]["path"])
    for name in ("run", "siglip"):
        encoder = Encoder.load(tmp_path / name)
        assert torch.allclose(encoder.encode_image(path), emb, atol=1e-5)
        assert torch.allclose(encoder.encode_text("No nodule."), model.encode_text("No nodule."),
                              atol=1e-5)
    with pytest.raises(InputError, match="no such checkpoint"):
        Encoder.load(tmp_path / "lost")
    with pytest.raises(InputError, match="python train.py"):
        Encoder.load("runs/lost")
    (tmp_path / "siglip" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="siglip: cannot be loaded"):
        Encoder.load(tmp_path / "siglip")


def test_from_scratch_towers_start_as_siglip_does():
    """Guards: a temperature of 1 and a bias of 0, with which a fresh SiglipModel comes."""
    text = {**SMALL.text, "vocab_size": 300, "pad_token_id": 3}
    siglip = build_encoder(dataclasses.replace(SMALL, text=text))
    assert siglip.logit_scale.exp().item() == pytest.approx(10, rel=1e-5)
