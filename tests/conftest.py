"""What the tests share: a small phantom, and a LoFi of a few thousand weights with LoRA as in the
paper."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                 # no hub within reach, as it may be for a user

import data                                            # noqa: E402
from model import TINY, LoFi                           # noqa: E402

TOWER = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2)
SMALL = dataclasses.replace(           # TINY's kind; LoRA and AdamW, as in the paper
    TINY, muon_lr=0, n_queries=4, lora_rank=16, llm_lora_rank=4, max_target=64,
    vision=dict(TOWER, image_size=32, patch_size=8),
    text=dict(TOWER, max_position_embeddings=32, projection_size=32),
    decoder=dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                 head_dim=16, num_key_value_heads=1, query_pre_attn_scalar=16,
                 initializer_range=0.2, sliding_window=64, max_position_embeddings=512))


@pytest.fixture(scope="session")
def phantom(tmp_path_factory):
    """A phantom of 40 training and 12 test images."""
    return data.make_phantom(tmp_path_factory.mktemp("data") / "phantom",
                             {"train": 40, "val": 2, "test": 12}, quiet=True)


@pytest.fixture(scope="session")
def rows(phantom):
    return data.read_manifest(phantom, "train")


@pytest.fixture(scope="session")
def built_model(rows):
    torch.manual_seed(0)
    return LoFi.build(SMALL, data.tokenizer_texts(rows)).eval()


@pytest.fixture
def model(built_model):
    """A new small LoFi, LoRA on random frozen towers: a copy, which is faster than building it."""
    torch.manual_seed(0)
    return copy.deepcopy(built_model)


@pytest.fixture
def batch(model, rows):
    """A batch of 6 images with all three tasks among its rows."""
    dataset = data.ChestXrays(rows, model.image_size, n_regions=2)
    collate = data.Collate(model.text_tokenizer, model.text_length, model.llm_tokenizer, 64)
    for epoch in range(50):
        batch = collate([dataset[(epoch, i)] for i in range(6)])
        if len(batch["task_of_row"].unique()) == 3:
            return batch
    raise AssertionError("50 epochs drew no batch with all three tasks")


def run(*command, cwd=ROOT, ok=True, whole=False):
    """Run a script of ours as a user would -> stdout; or, ok=False, its one error line (whole: all
    of stderr, which torchrun adds to)."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if ok:
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    assert done.returncode != 0
    if whole:
        return done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.strip().splitlines()[-1]
