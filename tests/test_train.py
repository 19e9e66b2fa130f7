"""train.py: in this process, or in others where it is killed, signalled or one of several."""

import contextlib
import dataclasses
import importlib
import io
import json
import math
import os
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import train
from conftest import ROOT, SMALL, by_two
from data import InputError
from model import PAPER, TINY, LoFi

FAST = ("--preset", "tiny", "--batch-size", 8, "--device", "cpu", "--workers", 0)
STEPS = ("--steps", 5, "--accumulate", 2, "--save-every", 2)


def log_of(folder):
    """The log without its timing."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "samples_per_s"} for line in lines]


def weights_of(folder):
    return LoFi.from_pretrained(folder).state_dict()


def saved_step(folder):
    return torch.load(folder / "trainer.pt", weights_only=True)["step"]


def assert_same_run(a, b):
    """The same log, and the same weights bit for bit."""
    assert log_of(a) == log_of(b)
    a, b = weights_of(a), weights_of(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def main(monkeypatch, *flags, script=train):
    """A script in this process -> stdout."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        script.main()
    return out.getvalue()


def wait_for_step(is_alive, out, step):
    """Until the log has that many lines."""
    log = out / "log.jsonl"
    while is_alive() and (not log.exists() or log.read_text().count("\n") < step):
        time.sleep(0.01)


def in_one_process(rank, act, *args):
    """What torch.multiprocessing starts by a fork, as importing takes seconds."""
    torch.set_num_threads(1)                                   # OpenMP's do not survive a fork
    act(*args)


def forked(act, *args):
    """act(*args) in another process. Raises what it raises, or says the signal it died of."""
    torch.multiprocessing.start_processes(in_one_process, (act, *args), 1, start_method="fork")


def command(*flags):
    """train.py's main, in a process of its own."""
    sys.argv = ["train.py", *map(str, flags)]
    train.main()


def on_two_processes(*flags):
    by_two(command, *flags)


def at_step(monkeypatch, step, act):
    """Call act() in a step of the run, counted from 1."""
    rate = train.learning_rate

    def learning_rate(number, *rest):
        if number + 1 == step:
            act()
        return rate(number, *rest)
    monkeypatch.setattr(train, "learning_rate", learning_rate)


def keys_of(monkeypatch, *flags):
    """The keys (epoch, i) of the images that a run draws, in their order."""
    keys, whole = [], data.ChestXrays.__getitem__
    with monkeypatch.context() as patch:
        patch.setattr(data.ChestXrays, "__getitem__",
                      lambda self, key: keys.append(key) or whole(self, key))
        main(patch, *flags)
    return keys


def gradients_of(monkeypatch, *flags):
    """The gradient of each step of a run, before it is clipped."""
    clip, gradients = torch.nn.utils.clip_grad_norm_, []

    def keep(parameters, max_norm):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        return clip(parameters, max_norm)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
        main(patch, *flags)
    return gradients


def steps_of(monkeypatch, *flags):
    """What each optimizer finds at each of its steps -> [(gradient, groups)]."""
    steps = []

    def note(optimizer, *_):
        groups = [dict(group) for group in optimizer.param_groups]
        steps.append((torch.cat([p.grad.flatten() for group in groups for p in group["params"]
                                 if p.grad is not None]), groups))
    hook = register_optimizer_step_pre_hook(note)
    try:
        main(monkeypatch, *flags)
    finally:
        hook.remove()
    return steps


@pytest.fixture(scope="module")
def odd(phantom):
    """A manifest of 37 training images and no test split: the last batch of 8 or 16 has 5."""
    path = phantom / "odd.jsonl"
    lines = (phantom / "manifest.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join([line for line in lines if '"split": "train"' in line][:37]))
    return path


@pytest.fixture(scope="module")
def quick(odd, saved_run):
    """Flags of a run whose steps take a tenth of a second, and which is not evaluated."""
    return "--data", odd, "--init", saved_run, *FAST


@pytest.fixture(scope="module")
def finished(phantom, tmp_path_factory):
    """A run of 5 steps of two batches from scratch, by Muon and AdamW, with its evaluation."""
    out = tmp_path_factory.mktemp("runs") / "a"
    with pytest.MonkeyPatch.context() as patch:
        text = main(patch, "--data", phantom, *FAST, *STEPS, "--out", out)
    return out, text, {path.name for path in out.iterdir()}


# ---- a run and what it writes -------------------------------------------------------------------

def test_a_run_writes_what_it_promises(finished):
    """Guards: a missing file or key of the run folder; a log without a loss of the paper."""
    out, text, names = finished
    assert names == {"config.json", "model.safetensors", "tokenizer", "trainer.pt", "log.jsonl",
                     "metrics.json", "curve.png", "README.md"}
    log = log_of(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert set(log[0]) == {"step", "lr", "loss", "sigmoid", "captioning", "grounding",
                           "dense_captioning"}
    assert [line["step"] for line in log if "val" in line] == [2, 4, 5]
    scores = json.loads((out / "metrics.json").read_text())
    assert set(scores) == {"i2t", "t2i", "grounding", "prior", "seconds", "n_images"}
    assert list(scores["i2t"]) == ["R@1", "R@5", "R@10", "R@20", "R@40"]
    assert scores["n_images"] == 12
    assert scores["grounding"]["n_queries"] == scores["prior"]["n_queries"] > 12
    for words in ("trains", "Image-to-Text", "chance", "phrase prior", "Next:", "F@0.5"):
        assert words in text
    card = (out / "README.md").read_text()
    for words in ("not for clinical use", "--steps 5", "LoFi.from_pretrained", "baseline",
                  f"{100 * scores['grounding']['F@0.5']:.2f}", "40 training images"):
        assert words in card
    assert Image.open(out / "curve.png").size == (840, 600)


def test_the_next_commands_work(finished, tmp_path, monkeypatch):
    """Guards: a command to paste that names a file which is not there."""
    lines = finished[1].split("Next:")[1].strip().splitlines()
    commands = [shlex.split(line)[1:] for line in lines]
    assert [name for name, *_ in commands] == ["retrieve.py", "icl_ground.py", "icl_ground.py"]
    pictures = [tmp_path / "a.png", tmp_path / "b.png"]
    texts = [main(monkeypatch, *flags, *more, script=importlib.import_module(name[:-3]))
             for (name, *flags), more in zip(commands, (("--png", pictures[0]),
                                                        ("--out", pictures[1]), ()))]
    assert all(picture.exists() for picture in pictures)
    assert "nearest" in texts[2] and "phrase prior" in texts[2]


@torch.no_grad()
def test_val_losses_are_of_the_val_split(phantom, finished):
    """Guards: losses on other images than those of the val split, or augmented, or averaged wrong.

    Oracle: Eq. 1 in a double loop and means of -log p, on the two val images at the last step."""
    model = LoFi.from_pretrained(finished[0])
    dataset = data.ChestXrays(data.read_manifest(phantom, "val"), model.image_size, n_regions=3)
    batch = data.Collate(model.text_tokenizer, model.text_length, model.llm_tokenizer,
                         model.config.max_target)([dataset[0, 0], dataset[0, 1]])
    image_emb, text_emb, nll = model(batch)
    t, b = model.siglip.logit_scale.exp().item(), model.siglip.logit_bias.item()
    logits = (t * image_emb @ text_emb.T + b).tolist()
    sigmoid = sum(math.log1p(math.exp(-logits[i][j] if i == j else logits[i][j])) / 2
                  for i in range(2) for j in range(2))
    expected = {"sigmoid": sigmoid, "loss": sigmoid + 5 * nll.mean().item()}
    for task, name in enumerate(("captioning", "grounding", "dense_captioning")):
        drawn = nll[batch["task_of_row"] == task].tolist()
        expected[name] = sum(drawn) / len(drawn) if drawn else None
    assert sum(value is not None for value in expected.values()) >= 3
    assert log_of(finished[0])[-1]["val"] == {
        name: value and pytest.approx(value, abs=2e-4) for name, value in expected.items()}


def test_a_val_split_does_not_disturb_the_training(phantom, finished, tmp_path, monkeypatch):
    """Guards: draws for the losses on val that change the next batch; train losses of val images.

    Oracle: the same run without a val split."""
    path, text = phantom / "no_val.jsonl", (phantom / "manifest.jsonl").read_text()
    path.write_text("".join(line for line in text.splitlines(keepends=True)
                            if '"split": "train"' in line))
    main(monkeypatch, "--data", path, *FAST, *STEPS, "--out", tmp_path / "v")
    assert log_of(tmp_path / "v") == [{k: v for k, v in line.items() if k != "val"}
                                      for line in log_of(finished[0])]


def test_evaluation_without_training_boxes_has_no_prior(phantom, tmp_path, monkeypatch):
    """Guards: a run that trains for days and fails at its end, before metrics.json."""
    path, lines = phantom / "unboxed.jsonl", (phantom / "manifest.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for i, row in enumerate(rows):
        if row["split"] == "train":
            row["regions"] = [{"phrase": "Heart.", "boxes": []}] if i % 2 else []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = main(monkeypatch, "--data", path, *FAST, "--steps", 1, "--out", tmp_path / "u",
                "--objectives", "scg")
    found = json.loads((tmp_path / "u" / "metrics.json").read_text())
    assert "prior" not in found and found["grounding"]["n_queries"] > 0
    assert "LoFi" in text and "phrase prior" not in text


@pytest.mark.parametrize("letter", "sc")
def test_a_decoder_that_never_saw_boxes_is_not_scored(phantom, tmp_path, monkeypatch, letter):
    """Guards: minutes of answers, and a row of Table 4, by a decoder that was not trained for
    them."""
    monkeypatch.setattr(train.icl_ground, "lofi_predictions", None)
    text = main(monkeypatch, "--data", phantom, *FAST, "--steps", 1, "--objectives", letter,
                "--out", tmp_path / "u")
    found = json.loads((tmp_path / "u" / "metrics.json").read_text())
    assert set(found) == {"i2t", "t2i", "n_images", "seconds"} and "F@0.5" not in text


# ---- the losses and their gradient --------------------------------------------------------------

def test_each_named_loss_is_one_that_trains(quick, tmp_path, monkeypatch):
    """Guards: a loss function on the page through which no gradient flows, or a part of the
    gradient that comes from elsewhere.

    Oracle: each loss of the four times 4 adds three times its gradient; the four add up."""
    flags = [*quick, "--steps", 1, "--batch-size", 16]
    [before] = gradients_of(monkeypatch, *flags, "--out", tmp_path / "a")
    added = {}
    for name in ("sigmoid_loss", "captioning_loss", "grounding_loss", "dense_captioning_loss",
                 "total_loss"):
        with monkeypatch.context() as patch:
            loss = getattr(train, name)
            patch.setattr(train, name, lambda *args: 4 * loss(*args))
            [after] = gradients_of(patch, *flags, "--out", tmp_path / name)
        added[name] = (after - before) / 3
        assert added[name].norm() > 1e-3 * before.norm()
    assert torch.allclose(added.pop("total_loss"), before, atol=1e-4 * before.norm().item())
    assert torch.allclose(sum(added.values()), before, atol=1e-4 * before.norm().item())


def test_total_loss_is_made_of_its_parts(quick, tmp_path, monkeypatch):
    """Guards: --lambda forgotten, or a loss in the log that is not the one that trains."""
    main(monkeypatch, *quick, "--steps", 2, "--objectives", "sg", "--lambda", 7,
         "--out", tmp_path / "l")
    for line in log_of(tmp_path / "l"):
        assert line["loss"] == pytest.approx(line["sigmoid"] + 7 * line["grounding"], abs=1e-4)
        assert line["captioning"] is line["dense_captioning"] is None


def test_accumulated_gradients_are_the_mean_of_the_batches(quick, tmp_path, monkeypatch):
    """Guards: gradients summed over batches instead of averaged, batches skipped, or gradients
    that are left over in the next step."""
    flags = (*quick, "--lr", 1e-12, "--steps")
    both = gradients_of(monkeypatch, *flags, 2, "--accumulate", 2, "--out", tmp_path / "f1")
    each = gradients_of(monkeypatch, *flags, 4, "--out", tmp_path / "f2")
    for i in (0, 1):
        mean = (each[2 * i] + each[2 * i + 1]) / 2
        assert torch.allclose(both[i], mean, atol=1e-5) and mean.norm() > 0.01


def test_gradients_are_unscaled_then_clipped(quick, tmp_path, monkeypatch):
    """Guards: gradients clipped while fp16's scale of 65,536 is on them, so that the optimizer gets
    next to nothing; no clipping; clipping of gradients that are short enough.

    Oracle: norms as the optimizer finds them; proportional to lambda, but cut to 1."""
    def norm(precision, lam):
        [(gradient, _)] = steps_of(
            monkeypatch, *quick, "--objectives", "g", "--steps", 1, "--precision", precision,
            "--lambda", lam, "--out", tmp_path / f"{precision}{lam}")
        return gradient.norm().item()
    short = norm("fp32", 0.001)
    assert 1e-4 < short < 0.3 and norm("fp32", 0.002) == pytest.approx(2 * short, rel=1e-3)
    lam = 0.003 / short                                        # a gradient of three times the norm
    assert norm("fp32", lam) == pytest.approx(1, rel=1e-4)
    assert norm("fp16", 0.001) == pytest.approx(short, rel=0.02)
    assert norm("fp16", lam) == pytest.approx(1, rel=1e-2)


# ---- schedule, optimizer, batches ---------------------------------------------------------------

def test_learning_rate_is_a_cosine_after_a_warm_up():
    """Guards: another annealing than the paper's, one that ends high, a first step at full rate."""
    rates = [train.learning_rate(step, 1000, PAPER) for step in range(1000)]
    assert PAPER.lr == 3e-4 and PAPER.epochs == 10 and PAPER.batch_size == 16 and PAPER.lam == 5
    # 20 steps of warm-up, then 3e-4 * (1 + cos(pi * share)) / 2
    by_hand = {0: 1.5e-5, 9: 1.5e-4, 250: 2.56066e-4, 500: 1.5e-4, 750: 4.39340e-5, 999: 7.4e-10}
    assert {step: rates[step] for step in by_hand} == pytest.approx(by_hand, rel=1e-3)
    assert max(rates) == max(rates[17:21]) > 2.99e-4


def test_epochs_count_batches_and_steps_count_accumulated_ones(quick, tmp_path, monkeypatch):
    """Guards: N times the epochs, and a longer schedule, with --accumulate N; one order of the
    images in all epochs or for all seeds; images left out of an epoch.

    By hand: 37 images in batches of 8 are 5 batches an epoch; 10 in threes are 4 steps."""
    keys = keys_of(monkeypatch, *quick, "--objectives", "s", "--epochs", 2, "--accumulate", 3,
                   "--out", tmp_path / "a")
    rates = [line["lr"] for line in log_of(tmp_path / "a")]
    assert rates == pytest.approx([1.2e-3, 1.2e-3 * 0.853553, 0.6e-3, 1.2e-3 * 0.146447], rel=1e-4)
    orders = [[i for epoch, i in keys if epoch == number] for number in (0, 1)]
    assert keys[:37] == [(0, i) for i in orders[0]]
    assert [sorted(order) for order in orders] == [list(range(37))] * 2
    other = keys_of(monkeypatch, *quick, "--objectives", "s", "--epochs", 1, "--steps", 9,
                    "--accumulate", 4, "--seed", 1, "--out", tmp_path / "b")
    assert len(log_of(tmp_path / "b")) == 2                    # the epoch ends first
    orders.append([i for epoch, i in other if epoch == 0])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert sum(x == y for x, y in zip(orders[a], orders[b])) < 10 and orders[a] != orders[b]
    again = keys_of(monkeypatch, *quick, "--objectives", "s", "--epochs", 9, "--steps", 1,
                    "--out", tmp_path / "c")
    assert len(log_of(tmp_path / "c")) == 1 and again == keys[:8]


def test_batches_cover_an_epoch_once():
    """Guards: an image drawn twice in an epoch; another order after a resume."""
    keys = [key for batch in train.batches(10, 3, 4, 7, 0, 6) for key in batch]
    for epoch in (0, 1):                                       # of 4 batches, and 2 of the second
        drawn = [i for e, i in keys if e == epoch]
        assert len(drawn) == len(set(drawn)) == (10 if epoch == 0 else 6)
    assert list(train.batches(10, 3, 4, 7, 0, 6))[3:] == list(train.batches(10, 3, 4, 7, 3, 6))


@pytest.mark.parametrize("n, world", [(10, 2), (9, 2), (13, 3), (8, 4)])
def test_processes_share_an_epoch_without_repeats(n, world):
    """Guards: an image drawn by two processes; a process without an image in a batch."""
    n_batches = train.batches_per_epoch(n, 4, "c", world)
    parts = [list(train.batches(n, 4, n_batches, 0, 0, n_batches, rank, world))
             for rank in range(world)]
    drawn = [key for part in parts for batch in part for key in batch]
    assert len(drawn) == len(set(drawn)) >= n - world + 1
    assert all(batch for part in parts for batch in part)


def groups_of(config, rows):
    """{name of a trainable parameter: (optimizer, share of the rate, weight decay)}."""
    model = LoFi.build(config, data.tokenizer_texts(rows))
    name_of = {p: name.removeprefix("llm.").replace("base_model.model.", "")
               for name, p in model.named_parameters() if p.requires_grad}
    found = [(name_of[p], (type(optimizer).__name__, group["rate"], group["weight_decay"]))
             for optimizer in train.build_optimizers(model, config)
             for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in found) == sorted(name_of.values())      # each of them once
    return dict(found)


def test_every_weight_has_its_optimizer_rate_and_decay(rows):
    """Guards: embeddings or queries orthogonalized; t' and b or the text tower at the others' rate;
    decay of biases and norms; a parameter that no optimizer has, or two. By hand, for TINY."""
    groups, vision, text = groups_of(TINY, rows), "siglip.vision_model.", "siglip.text_model."
    layer = "encoder.layers.0."
    by_hand = {
        "siglip.logit_scale": ("AdamW", 10, 0), "siglip.logit_bias": ("AdamW", 10, 0),
        "pooling.queries": ("AdamW", 1, 0.05), "model.embed_tokens.weight": ("AdamW", 1, 0.05),
        vision + "embeddings.patch_embedding.weight": ("AdamW", 1, 0.05),
        vision + "embeddings.position_embedding.weight": ("AdamW", 1, 0.05),
        vision + layer + "mlp.fc1.bias": ("AdamW", 1, 0),
        vision + layer + "layer_norm1.weight": ("AdamW", 1, 0),
        "model.norm.weight": ("AdamW", 1, 0), "pooling.norm.weight": ("AdamW", 1, 0),
        text + "embeddings.token_embedding.weight": ("AdamW", 0.3, 0.05),
        text + layer + "layer_norm1.weight": ("AdamW", 0.3, 0),
        text + "head.bias": ("AdamW", 0.3, 0),
        text + layer + "mlp.fc1.weight": ("Muon", 1.5, 0.05),
        text + "head.weight": ("Muon", 1.5, 0.05),
        vision + layer + "self_attn.q_proj.weight": ("Muon", 5, 0.05),
        "model.layers.1.mlp.down_proj.weight": ("Muon", 5, 0.05),
        "pooling.projection.weight": ("Muon", 5, 0.05)}
    assert {name: groups[name] for name in by_hand} == by_hand
    assert set(groups.values()) == set(by_hand.values())
    assert all("embed" not in name and "norm" not in name and name.endswith("weight")
               for name, (optimizer, *_) in groups.items() if optimizer == "Muon")


def test_lora_and_new_layers_share_one_rate(rows):
    """Guards: Muon, other rates or decay of vectors in the paper's setting; a frozen weight that
    trains."""
    paper = {name: getattr(PAPER, name) for name in ("lr", "muon_lr", "text_lr", "scale_lr",
                                                     "weight_decay")}
    groups = groups_of(dataclasses.replace(SMALL, **paper), rows)
    vectors = {name for name in groups if name.endswith("bias") or ".norm" in name
               or "logit_" in name}
    assert len(vectors) == 9 and {groups[name] for name in vectors} == {("AdamW", 1, 0)}
    matrices = set(groups) - vectors
    assert {groups[name] for name in matrices} == {("AdamW", 1, 0.01)}
    assert {name for name in matrices if "lora_" not in name} == {
        "pooling.queries", "pooling.attention.in_proj_weight", "pooling.attention.out_proj.weight",
        "pooling.projection.weight"}


def test_each_group_steps_at_its_own_rate(odd, tmp_path, monkeypatch):
    """Guards: rates of the groups that are ignored in the steps; a rate that is never annealed.

    By hand: lr is 1.2e-3, and half of it in the second of two steps; Muon's is 5 times that, the
    text tower's 0.3, that of t' and b 10 times."""
    steps = steps_of(monkeypatch, "--data", odd, *FAST, "--steps", 2, "--out", tmp_path / "a")
    rates = [sorted({round(group["lr"], 9) for group in groups}) for _, groups in steps]
    adamw, muon = [0.36e-3, 1.2e-3, 12e-3], [1.8e-3, 6e-3]
    halves = [rate / 2 for rate in adamw], [rate / 2 for rate in muon]
    assert sorted(rates) == [pytest.approx(r) for r in sorted([adamw, muon, *halves])]


# ---- resume, kill, signals ----------------------------------------------------------------------

def killed_at_4(*flags):
    """A run that dies as it writes the checkpoint of step 4."""
    whole = torch.save

    def save(state, draft):
        whole(state, draft)
        if state["step"] == 4:
            os.truncate(draft, 1000)
            os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
    command(*flags)


def test_a_killed_run_resumes_as_the_unbroken_one(phantom, finished, tmp_path, monkeypatch):
    """Guards: draws, optimizer, schedule or accumulated batches that start over; log lines written
    twice or lost; half a checkpoint, as kill -9 leaves it, taken for a whole one."""
    flags = ["--data", phantom, *FAST, *STEPS, "--out", tmp_path / "b"]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        forked(killed_at_4, *flags)
    assert len(log_of(tmp_path / "b")) == 4 and saved_step(tmp_path / "b") == 2
    main(monkeypatch, *flags, "--resume")
    assert_same_run(finished[0], tmp_path / "b")
    assert not list((tmp_path / "b").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(quick, tmp_path, monkeypatch, capsys, number):
    """Guards: work lost to Ctrl-C or a cluster's SIGTERM; a checkpoint of another step."""
    handlers = [(n, signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGINT)]
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
    try:
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, *quick, "--steps", 9, "--out", tmp_path / "s")
    finally:
        for n, handler in handlers:
            signal.signal(n, handler)
    error = capsys.readouterr().err
    assert stop.value.code == 128 + number
    assert "stopped and saved after step 3" in error and "--resume" in error
    assert saved_step(tmp_path / "s") == len(log_of(tmp_path / "s")) == 3


def test_sigterm_to_the_whole_group_saves(quick, tmp_path, capfd):
    """Guards: workers that die of the signal and take the run with them (timeout, scancel)."""
    def in_a_group(*flags):
        os.setsid()
        torch.set_num_threads(1)                               # OpenMP's do not survive a fork
        command(*flags)
    out = tmp_path / "s"
    process = torch.multiprocessing.get_context("fork").Process(
        target=in_a_group, args=(*quick, "--steps", 3000, "--out", out, "--workers", 2))
    process.start()
    wait_for_step(process.is_alive, out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    error = capfd.readouterr().err
    assert process.exitcode == 128 + signal.SIGTERM and "stopped and saved" in error, error
    assert "Traceback" not in error and saved_step(out) == len(log_of(out))


def test_sigterm_to_torchrun_saves(quick, tmp_path):
    """Guards: a second signal, which torchrun passes on, taken for impatience."""
    out = tmp_path / "s"
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "train.py",
             *quick, "--steps", 3000, "--out", out]
    process = subprocess.Popen([*map(str, words)], cwd=ROOT, text=True, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(lambda: process.poll() is None, out, 3)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=90)
    assert process.returncode != 0 and "stopped and saved" in error, error[-2000:]
    assert saved_step(out) == len(log_of(out))


def test_an_error_of_ours_ends_the_run(phantom, saved_run, tmp_path, monkeypatch):
    """Guards: a process that waits for ever for its workers; a bug of ours hidden."""
    def fail(*_):
        raise RuntimeError("a bug")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="RuntimeError: a bug"):
        monkeypatch.setattr(train, "learning_rate", fail)      # the fork has it too
        forked(command, "--data", phantom, "--init", saved_run, *FAST, "--workers", 2, "--steps",
               40, "--out", tmp_path / "b")


def test_a_torn_log_and_moved_data_are_continued(phantom, saved_run, tmp_path, monkeypatch):
    """Guards: a run that only resumes at one path, or whose log can't be read, as its last line is
    torn; a manifest that was changed since, unsaid."""
    out, moved = tmp_path / "t", shutil.copytree(phantom, tmp_path / "moved")
    flags = ["--init", saved_run, *FAST, "--steps", 3, "--out", out, "--data"]
    main(monkeypatch, *flags, phantom)
    log, whole = log_of(out), (out / "log.jsonl").read_bytes()
    (out / "log.jsonl").write_bytes(whole[:-20])
    assert "saved" in main(monkeypatch, *flags, moved, "--resume")
    assert log_of(out) == log[:-1]
    (moved / "manifest.jsonl").open("a").write("\n")
    with pytest.raises(InputError, match="manifest"):
        main(monkeypatch, *flags, moved, "--resume")


def test_resume_expects_the_same_flags_and_a_whole_checkpoint(phantom, finished, tmp_path,
                                                              monkeypatch):
    """Guards: a resumed run on other data or another schedule; a damaged checkpoint loaded as it
    is."""
    out = tmp_path / "c"
    shutil.copytree(finished[0], out)
    command = ["--data", phantom, *FAST, *STEPS, "--resume", "--out"]
    for flags, words in (((*command, out, "--steps", 9), "'steps': 5"),
                         ((*command, out, "--accumulate", 3), "'accumulate': 2"),
                         ((*command, out, "--lr", 1e-4), "'lr': 0.0012"),
                         ((*command, tmp_path / "none"), "no run to resume")):
        with pytest.raises(InputError, match=words):
            main(monkeypatch, *flags)
    whole = (out / "trainer.pt").read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"no checkpoint"):
        (out / "trainer.pt").write_bytes(damaged)
        with pytest.raises(InputError, match="trainer.pt"):
            main(monkeypatch, *command, out)
    torch.save({"step": 3}, out / "trainer.pt")
    with pytest.raises(InputError, match="trainer.pt"):
        main(monkeypatch, *command, out)


@pytest.mark.parametrize("left", [("log.jsonl",), ("log.jsonl", "tokenizer", "model.safetensors",
                                                   "config.json")])
def test_resume_before_the_first_checkpoint_starts_anew(quick, tmp_path, monkeypatch, left):
    """Guards: --init that --resume refuses or forgets; a run killed before its first checkpoint, or
    between the model's files and trainer.pt, that goes on from trained weights with a new
    optimizer, or keeps the old lines of its log."""
    flags = [*quick, "--objectives", "g", "--steps", 2]
    main(monkeypatch, *flags, "--out", tmp_path / "o")
    (tmp_path / "p").mkdir()
    for name in left:
        copy = shutil.copytree if name == "tokenizer" else shutil.copy
        copy(tmp_path / "o" / name, tmp_path / "p" / name)
    main(monkeypatch, *flags, "--out", tmp_path / "p", "--resume")
    assert_same_run(tmp_path / "o", tmp_path / "p")


def test_a_run_is_never_overwritten(quick, finished, tmp_path, monkeypatch):
    """Guards: a trained model lost to the same command typed again; of two runs at once, both in
    one folder; a finished model that --resume replaces by an untrained one."""
    out, flags = tmp_path / "a", [*quick, "--steps", 1, "--out"]
    shutil.copytree(finished[0], out)
    (out / "trainer.pt").unlink()
    (tmp_path / "empty").mkdir()
    before = {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
              for path in [tmp_path, *tmp_path.rglob("*")]}
    for place, more, words in (
            (out, (), "already exists.*--resume.*--out"), (out, ("--resume",), "finished run"),
            (tmp_path / "empty", (), "already exists.*--resume.*--out")):
        with pytest.raises(InputError, match=words) as error:
            main(monkeypatch, *flags, place, *more)
        assert str(place) in str(error.value) and "\n" not in str(error.value)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="already exists.*--out"):
        patch.setattr(train, "run_folder", lambda args: out)   # as if it was not there at first
        (out / "log.jsonl").rename(tmp_path / "log")
        main(patch, *flags, out)
    (tmp_path / "log").rename(out / "log.jsonl")
    after = {path: (path.stat().st_mtime_ns, path.is_dir() or path.read_bytes())
             for path in [tmp_path, *tmp_path.rglob("*")]}
    for state in (before, after):                              # where "log" came and went
        del state[tmp_path], state[out]
    assert before == after


# ---- several processes --------------------------------------------------------------------------

def weights_and_rows():
    """Parameters by name, of which "text" has a gradient in the first process alone and "unused" in
    none, and the rows of both processes."""
    draw = torch.Generator().manual_seed(0)
    parameters = {name: torch.nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in
                  (("image", (4, 3)), ("text", (4, 3)), ("nll", (4,)), ("unused", (2,)))}
    return parameters, torch.randn(5, 4, generator=draw)


def loss_of(parameters, image, text, nll, task):
    """A loss in which each row meets all others, as in Eq. 1, divided by the number of rows."""
    cross = (image @ text.T).tanh().sum() / len(image)
    return cross + (nll * (task + 1)).sum() / len(nll)


def gradients_of_a_part(out, split):
    """The first process has the first `split` rows, the second the others."""
    rank, world = train.join_processes()
    assert world == 2
    parameters, rows = weights_and_rows()
    own = slice(0, split) if rank == 0 else slice(split, 5)
    image, text = rows[own] @ parameters["image"], rows[:3] @ parameters["text"]
    nll = rows[own] @ parameters["nll"] if len(rows[own]) else torch.zeros(0)
    text = text if rank == 0 else torch.zeros(0, 3)            # without a graph
    gathered = [train.gather(x) for x in (image, text, nll, torch.arange(5)[own])]
    assert train.gather(None) is None
    loss = loss_of(parameters, *gathered)
    loss.backward()
    train.average_gradients([*parameters.values()])
    state = {name: p.grad for name, p in parameters.items()}
    torch.save((loss.detach(), [x.detach() for x in gathered], state), out / f"{rank}.pt")


@pytest.mark.parametrize("split", [3, 5])
def test_gathered_rows_have_the_gradient_of_one_process(tmp_path, split):
    """Guards: rows of another process cut, padded or in another order; gradients that are too large
    or small by the number of processes, or that wait for ever for a process without rows; zeros in
    place of no gradient, by which AdamW would decay a weight that is not used.

    Oracle: one process with all rows. By hand: 3 and 2 rows, 5 and none."""
    parameters, rows = weights_and_rows()
    everything = [rows @ parameters["image"], rows[:3] @ parameters["text"],
                  rows @ parameters["nll"], torch.arange(5)]
    loss = loss_of(parameters, *everything)
    loss.backward()
    by_two(gradients_of_a_part, tmp_path, split)
    for rank in (0, 1):
        loss_there, gathered, gradients = torch.load(tmp_path / f"{rank}.pt")
        assert torch.allclose(loss_there, loss, atol=1e-6)
        assert all(torch.allclose(a, b) for a, b in zip(gathered, everything, strict=True))
        assert gradients["unused"] is parameters["unused"].grad is None
        for name in ("image", "text", "nll"):
            assert torch.allclose(gradients[name], parameters[name].grad, atol=1e-6)


def test_a_schedulers_variables_start_no_process_group(monkeypatch):
    """Guards: an error on a cluster that sets WORLD_SIZE=1, and RANK or not, for every job."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.setenv(name, "1")
        assert train.join_processes() == (0, 1)
        assert not torch.distributed.is_initialized()


def test_two_processes_are_one_with_twice_the_batch(quick, saved_run, tmp_path, monkeypatch):
    """Guards: a sigmoid loss within each process's batch, texts gathered without their gradient,
    means of means over unequal parts, images drawn twice or left out, two processes writing.

    By AdamW: Muon's bfloat16 would hide a small difference."""
    flags = [*quick, "--steps", 5, "--out"]
    main(monkeypatch, *flags, tmp_path / "one", "--batch-size", 16)
    on_two_processes(*flags, tmp_path / "two")
    one, two = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert len(one) == len(two) == 5
    for a, b in zip(one, two):
        assert {k: pytest.approx(v, abs=2e-5) for k, v in a.items()} == b
    start, one, two = (weights_of(path) for path in (saved_run, tmp_path / "one", tmp_path / "two"))
    assert max((one[name] - start[name]).abs().max() for name in one) > 2e-3
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-4


def test_another_number_of_processes_is_said(phantom, saved_run, tmp_path, monkeypatch):
    """Guards: a resumed run that trains on other batches than an unbroken one, silently."""
    path, out = phantom / "thirteen.jsonl", tmp_path / "x"
    lines = [line for line in (phantom / "manifest.jsonl").open() if '"split": "train"' in line]
    path.write_text("".join(lines[:13]))                       # batches of 4: the last has 1 image
    flags = ["--data", path, "--init", saved_run, *FAST, "--objectives", "c", "--steps", 2, "--out",
             out, "--batch-size"]
    main(monkeypatch, *flags, 4)
    with pytest.raises(Exception, match="batches an epoch.*\n?.*number of processes"):
        on_two_processes(*flags, 2, "--resume")


def test_fine_tuning_on_two_processes(quick, tmp_path):
    """Guards: an objective left out that ends in a traceback under torchrun."""
    on_two_processes(*quick, "--objectives", "g", "--steps", 2, "--batch-size", 4,
                     "--out", tmp_path / "g")
    assert [line["grounding"] > 0 for line in log_of(tmp_path / "g")] == [True, True]


def test_workers_do_not_change_the_batches(quick, tmp_path, monkeypatch):
    """Guards: random draws that depend on which process decodes an image."""
    for workers in (0, 2):
        main(monkeypatch, *quick, "--steps", 3, "--workers", workers,
             "--out", tmp_path / str(workers))
    assert_same_run(tmp_path / "0", tmp_path / "2")


# ---- what a run starts from ---------------------------------------------------------------------

def test_fine_tuning_starts_from_a_run_with_grounding_only(odd, finished, tmp_path, monkeypatch):
    """Guards: --init that starts from random weights; objectives that train what was not asked
    for."""
    main(monkeypatch, "--data", odd, "--init", finished[0], "--objectives", "g", "--steps", 1,
         "--out", tmp_path / "e", "--lr", 1e-6, *FAST)
    line = log_of(tmp_path / "e")[0]
    assert line["sigmoid"] is line["captioning"] is line["dense_captioning"] is None
    assert line["loss"] == pytest.approx(5 * line["grounding"], abs=1e-4) and line["loss"] > 0
    assert "not evaluated: no test split" in (tmp_path / "e" / "README.md").read_text()
    before, after = weights_of(finished[0]), weights_of(tmp_path / "e")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("text_model" in name for name in changed)
    assert max((before[name] - after[name]).abs().max() for name in before) < 1e-4


def test_a_small_set_keeps_its_negatives(phantom, saved_run, tmp_path, monkeypatch):
    """Guards: steps of one image, whose sigmoid loss falls to nothing without negatives."""
    path = phantom / "eight.jsonl"
    lines = [line for line in (phantom / "manifest.jsonl").open() if '"split": "train"' in line]
    path.write_text("".join(lines[:8]))
    flags = ["--data", path, "--init", saved_run, *FAST, "--steps", 2, "--batch-size", 36]
    text = main(monkeypatch, *flags, "--out", tmp_path / "y")
    assert "steps of 8 images: the training split" in text and "2 steps of 8" in text
    assert all(line["sigmoid"] > 1 for line in log_of(tmp_path / "y"))
    path.write_text(lines[0])
    with pytest.raises(InputError, match="two for the sigmoid loss"):
        main(monkeypatch, *flags, "--out", tmp_path / "z")


def test_the_paper_preset_takes_any_siglip_and_gemma_folder(odd, rows, tmp_path, monkeypatch):
    """Guards: image size, patches or text length taken from the preset, not from the encoder's
    config."""
    model = LoFi.build(dataclasses.replace(SMALL, lora_rank=0, llm_lora_rank=0),
                       data.tokenizer_texts(rows))
    for part, tokenizer, name in ((model.siglip, model.text_tokenizer, "siglip"),
                                  (model.llm, model.llm_tokenizer, "gemma")):
        part.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = main(monkeypatch, "--data", odd, "--encoder", tmp_path / "siglip",
                "--llm", tmp_path / "gemma", "--steps", 2, "--batch-size", 4,
                "--out", tmp_path / "h", "--workers", 0, "--device", "cpu")
    assert "LoRA and new layers" in text and "learned a tokenizer" not in text
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    assert config["preset"] == "paper" and config["n_queries"] == 64
    assert len(log_of(tmp_path / "h")) == 2


def test_rows_that_the_objectives_cannot_use_are_left_out(tmp_path, capsys):
    """Guards: val losses that are NaN or of empty texts, by rows that train leaves out; test rows
    left out of the scores; a set that is thinned without a word."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    boxed = [{"phrase": "A.", "boxes": [[0, 0, 1, 1]]}]
    kinds = ({"report": "A."}, {"regions": boxed}, {"regions": [{"phrase": "B.", "boxes": []}]}, {})
    path = tmp_path / "manifest.jsonl"
    path.write_text("".join(json.dumps(
        {"image": "a.png", "study": f"{n}", "patient": split, "split": split, **more}) + "\n"
        for split in data.SPLITS for n, more in enumerate(kinds)))
    for objectives, kept in (("scgd", "012"), ("s", "012"), ("cg", "01"), ("c", "0"), ("gd", "1")):
        split, rows = train.read_rows(path, objectives)
        assert "".join(row["study"] for row in rows) == kept
        assert "".join(row["study"] for row in split["val"]) == kept
        assert len(split["test"]) == 4
        printed = capsys.readouterr().out
        for name in ("train", "val"):
            assert f"left out {4 - len(kept)} {name} images: no text or box" in printed


@pytest.mark.parametrize("flags, words", [
    (("--data", "nowhere"), "no such file"), (("--objectives", "sx"), "letters of s, c, g, d"),
    (("--steps", "0"), "--steps 0: expected"), (("--init", "nowhere"), "not a run folder"),
    (("--lambda", "nan"), "--lambda nan: expected"), (("--lr", "1e9"), "--lr"),
    (("--augment", "50"), "--augment"), (("--seed", "-5"), "--seed"),
    (("--workers", "-1"), "--workers"), (("--lr", "inf"), "--lr"),
    (("--init", "x", "--llm", "y"), "leave out"), (("--colour", "red"), "unrecognized"),
    (("--device", "tpu9"), "tpu9"),
    (("--preset", "paper", "--encoder", "nowhere"), "nowhere")])
def test_bad_flags_get_one_line(phantom, tmp_path, monkeypatch, capsys, flags, words):
    """Guards: a traceback, or a run that starts on something else than was asked for."""
    command = ["--data", phantom, *FAST, "--out", tmp_path / "i", "--steps", 1]
    with pytest.raises((InputError, SystemExit)) as error:
        main(monkeypatch, *command, *flags)
    assert words in str(error.value) + capsys.readouterr().err
    assert "\n" not in str(error.value)
    assert not (tmp_path / "i").exists()


@pytest.mark.parametrize("script, flags, model", [
    ("train", (), "google/siglip2-so400m-patch16-512"),
    ("retrieve", ("--checkpoint", "google/siglip2-base-patch16-224"), "google/siglip2-base"),
    ("icl_ground", ("--lvlm", "google/medgemma-1.5-4b-it", "--checkpoint",
                    "google/siglip2-base-patch16-224"), "google/medgemma-1.5-4b-it")])
def test_without_a_hub_there_is_one_line(phantom, tmp_path, monkeypatch, capfd, script, flags,
                                         model):
    """Guards: two minutes of retries, each a line, where weights cannot be downloaded."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        main(monkeypatch, "--data", phantom, *flags, script=importlib.import_module(script))
    assert not any(tmp_path.iterdir()) and capfd.readouterr().err == ""
    [line] = str(error.value).splitlines()
    assert model in line and "hf auth login" in line


def test_help_is_the_manual(monkeypatch, capsys):
    """Guards: a flag without an explanation, or one that the design names and the parser lacks."""
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
        train.main()
    text = capsys.readouterr().out
    for flag in ("data out preset encoder llm random-init init resume objectives lambda epochs "
                 "steps batch-size lr accumulate grad-checkpoint workers seed device").split():
        assert f"--{flag}" in text
    assert TINY.preset in text and "Eq. 1" in text


def test_autocast_is_bf16_or_fp16_by_the_gpu(monkeypatch):
    """Guards: fp16 without a scaler on a GPU that has bf16; half precision on a CPU unasked."""
    cuda = torch.device("cuda")
    for has_bf16, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
        assert train.choose_precision("auto", cuda) == expected
    assert train.choose_precision("auto", torch.device("cpu")) == torch.float32
    assert train.choose_precision("bf16", torch.device("cpu")) == torch.bfloat16


def test_compile_says_what_it_lacks(phantom, tmp_path, monkeypatch):
    """Guards: 129 lines of traceback after minutes, where a C++ compiler is missing."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile.* C\+\+ compiler") as error:
        main(monkeypatch, "--data", phantom, *FAST, "--compile", "--out", tmp_path / "i")
    assert "\n" not in str(error.value) and not (tmp_path / "i").exists()


def test_the_phantom_is_drawn_on_first_use(tmp_path, monkeypatch):
    """Guards: a default run that fails without data, draws it again, or draws it in workers that
    each import torch."""
    calls, whole = [], subprocess.run

    def run(words, **options):                                 # a small one, to save time
        calls.append(words)
        small = ("--train", "9", "--val", "0", "--test", "1")
        return whole([*map(str, words), *small], **options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", run)
    folder = train.phantom_folder(0)
    assert len(data.read_manifest(folder)) == 10 and (tmp_path / folder).samefile(folder)
    assert train.phantom_folder(0) == folder
    [(python, script, *_)] = calls
    assert python == sys.executable and (ROOT / "data.py").samefile(script)
    program = "import sys, data; print('torch' in sys.modules)"
    assert whole([python, "-c", program], cwd=ROOT, capture_output=True, text=True).stdout == (
        "False\n")


@pytest.mark.parametrize("most, words", [(16, "2 of 8 targets"), (15, "4 of 8 targets"),
                                         (250, None)])
def test_cut_targets_are_counted(phantom, saved_run, tmp_path, monkeypatch, most, words):
    """Guards: a decoder that never learns several boxes or the end of a report, without a word.

    By hand: a box is 15 tokens (12 digits, 3 spaces), and <eos> needs one more. Three phrases have
    boxes, one of them two, and one of the two reports is long."""
    box, other = [0.125, 0.25, 0.5, 0.75], [0.25, 0.125, 0.75, 0.5]
    regions = [[("A.", [box])], [("A.", [box, other]), ("B.", [])], [("A.", [box])]]
    reports = ["A.", "", " ".join(["A."] * 70)]
    first, path = json.loads((phantom / "manifest.jsonl").open().readline()), phantom / "cut.jsonl"
    path.write_text("".join(json.dumps({
        **first, "split": "train", "report": report,
        "regions": [{"phrase": phrase, "boxes": boxes} for phrase, boxes in found]}) + "\n"
        for report, found in zip(reports, regions)))
    source = shutil.copytree(saved_run, tmp_path / "small")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "max_target": most}))
    text = main(monkeypatch, "--data", path, "--init", source, *FAST, "--steps", 1,
                "--out", tmp_path / "c")
    if words:
        assert f"{words} have {most} tokens or more: they end after the last whole" in text
    else:
        assert "tokens or more" not in text


# ---- what can go wrong in a run -----------------------------------------------------------------

def test_a_loss_that_is_not_finite_ends_the_run(quick, tmp_path, monkeypatch):
    """Guards: NaN in the weights; a diverging run that is saved over its last good checkpoint, or
    scored."""
    whole, broken = train.total_loss, []
    monkeypatch.setattr(train, "total_loss", lambda *args: whole(*args) * (
        float("nan") if broken else 1))
    at_step(monkeypatch, 3, lambda: broken.append(True))       # from the step after it
    with pytest.raises(InputError, match="step 4: .* not finite.*--lr.*--resume") as error:
        main(monkeypatch, *quick, "--steps", 30, "--save-every", 2, "--out", tmp_path / "k")
    assert "\n" not in str(error.value) and len(log_of(tmp_path / "k")) == 3
    assert saved_step(tmp_path / "k") == 2 and not (tmp_path / "k" / "metrics.json").exists()
    assert all(v.isfinite().all() for v in weights_of(tmp_path / "k").values())


def test_fp16_that_overflows_keeps_the_weights(odd, tmp_path, monkeypatch):
    """Guards: a gradient that is NaN in one optimizer's weights, as fp16's scale is too high at the
    start, and becomes NaN in the other's by the norm that both are clipped to."""
    nans, build = [float("nan"), 1.0], train.build_optimizers

    def build_optimizers(model, config):
        model.pooling.queries.register_hook(lambda gradient: gradient * nans.pop(0))  # AdamW's
        return build(model, config)
    monkeypatch.setattr(train, "build_optimizers", build_optimizers)
    main(monkeypatch, "--data", odd, *FAST, "--precision", "fp16", "--objectives", "g",
         "--lambda", 0.001, "--batch-size", 2, "--steps", 2, "--out", tmp_path / "o")
    assert not nans and all(v.isfinite().all() for v in weights_of(tmp_path / "o").values())


class Scaler(torch.amp.GradScaler):
    """One that starts low, and notes its scale at each update."""
    scales = []

    def __init__(self, *args, **more):
        super().__init__(*args, init_scale=4.0, growth_interval=2, **more)

    def update(self):
        super().update()
        self.scales.append(self.get_scale())


@pytest.mark.parametrize("precision, finite, scales", [
    ("fp16", {1, 2, 4}, [4, 8, 4, 4, 2, 1]),                   # the gradient of step 7 ends it
    ("fp16", set(), [2, 1]), ("fp32", {1, 2}, [1, 1]), ("bf16", set(), [])])
def test_a_gradient_that_is_not_finite(quick, tmp_path, monkeypatch, precision, finite, scales):
    """Guards: fp16 that keeps a scale that overflows, or lowers it for ever; an optimizer that
    steps by NaN; a run in another precision that goes on and learns nothing.

    By hand: the scale starts at 4, halves where the gradient is not finite and doubles after two
    steps in a row where it is; at 1 there is nothing to lower, so that the run ends."""
    steps, number, build = [], [0], train.build_optimizers

    def spoil(gradient):
        number[0] += 1
        return gradient if number[0] in finite else gradient * float("nan")

    def build_optimizers(model, config):
        model.pooling.queries.register_hook(spoil)
        return build(model, config)
    monkeypatch.setattr(train, "build_optimizers", build_optimizers)
    monkeypatch.setattr(torch.amp, "GradScaler", Scaler)
    monkeypatch.setattr(Scaler, "scales", [])
    hook = register_optimizer_step_pre_hook(lambda *_: steps.append(number[0]))
    try:
        with pytest.raises(InputError, match="is not finite; lower --lr") as error:
            main(monkeypatch, *quick, "--objectives", "g", "--lambda", 0.001, "--precision",
                 precision, "--steps", 30, "--out", tmp_path / "n")
    finally:
        hook.remove()
    assert Scaler.scales == scales and set(steps) == finite
    assert f"step {len(scales) + 1}: " in str(error.value) and "\n" not in str(error.value)


def test_a_batch_that_asks_nothing_is_a_step(quick, tmp_path, monkeypatch):
    """Guards: a traceback in backward() where augmentation has moved all regions of a batch out
    of its window."""
    monkeypatch.setattr(data, "augment", lambda image, regions, size, *_: (
        image.resize((size, size)), []))
    main(monkeypatch, *quick, "--steps", 2, "--objectives", "g", "--out", tmp_path / "n")
    assert [line["loss"] for line in log_of(tmp_path / "n")] == [0, 0]
    assert all(v.isfinite().all() for v in weights_of(tmp_path / "n").values())


def test_an_unreadable_image_costs_no_work(phantom, tmp_path, monkeypatch):
    """Guards: a training image silently replaced by noise, or an error without its path; a finished
    run whose evaluation is lost to one test image."""
    folder = shutil.copytree(phantom, tmp_path / "data")
    flags = ["--data", folder, *FAST, "--batch-size", 40, "--steps", 1, "--objectives", "s",
             "--out"]
    for split in ("train", "test"):
        whole = (folder / "images" / f"{split}_00003.png").read_bytes()
        (folder / "images" / f"{split}_00003.png").write_bytes(whole[:200])
        with pytest.raises(InputError, match=f"{split}_00003.png: cannot be read"):
            main(monkeypatch, *flags, tmp_path / split)
        assert not (tmp_path / split / "metrics.json").exists()
        (folder / "images" / f"{split}_00003.png").write_bytes(whole)
    before = weights_of(tmp_path / "test")
    main(monkeypatch, *flags, tmp_path / "test", "--resume")
    after = weights_of(tmp_path / "test")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "test" / "metrics.json").read_text())["n_images"] == 12


@pytest.mark.parametrize("room, file", [(100_000, "model.safetensors"), (7_000_000, "trainer.pt")])
def test_a_full_disk_leaves_the_last_good_checkpoint(odd, tmp_path, monkeypatch, room, file):
    """Guards: half a checkpoint over a whole one. The limit on a file's size stands for a disk."""
    out, (limit, most) = tmp_path / "m", resource.getrlimit(resource.RLIMIT_FSIZE)
    flags = ["--data", odd, *FAST, "--steps", 2, "--save-every", 1, "--out", out]
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, most)))
        try:
            with pytest.raises(InputError, match=f"{file}: cannot be written"):
                main(patch, *flags)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert saved_step(out) == 1 and not list(out.glob(".*"))
    main(monkeypatch, *flags, "--resume")
    assert saved_step(out) == 2


def test_out_of_memory_says_what_to_lower(quick, tmp_path, monkeypatch):
    """Guards: a traceback where a smaller batch is all that is needed; another error hidden."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, quick), "--steps", "1", "--out"])
    for error, raised, words in (
            (torch.OutOfMemoryError("CUDA out of memory."), SystemExit, "lower --batch-size"),
            (RuntimeError("shapes differ"), RuntimeError, "shapes differ")):
        def backward(*_, **__):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "backward", backward)
            patch.setattr(sys, "argv", [*sys.argv, str(tmp_path / raised.__name__)])
            with pytest.raises(raised, match=words):
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
