"""What the tests share: a small phantom, and a LoFi of a few thousand weights with LoRA as in the
paper."""

import contextlib
import copy
import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                 # no hub within reach, as it may be for a user
os.environ["OMP_NUM_THREADS"] = "1"                # models this small are faster so, and the same
torch.set_num_threads(1)                           # to the last bit

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


@pytest.fixture(scope="session")
def saved_run(built_model, tmp_path_factory):
    """The run folder of a small LoFi that was not trained, without trainer.pt."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    built_model.save_pretrained(folder)
    return folder


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


def made_earlier(folder, minutes):
    """Give all files of a folder an older time, so that what is written next is newer."""
    for path in Path(folder).rglob("*"):
        os.utime(path, (time.time() - 60 * minutes,) * 2)


def one_of_two(rank, port, act, args):
    """What a process that torchrun starts does."""
    torch.set_num_threads(1)                           # OpenMP's do not survive a fork
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="a")
    act(*args)


def by_two(act, *args):
    """act(*args) on two processes, forked, as importing takes seconds. Raises what one raises, or
    if they take more than two minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = torch.multiprocessing.start_processes(one_of_two, (port, act, args), 2, join=False,
                                                 daemon=True, start_method="fork")
    end = time.time() + 120
    while not both.join(max(0, end - time.time())):
        assert time.time() < end, "the processes wait for each other"


def in_two_processes(main, folder, *flags):
    """main() with these flags, in a folder, on two processes -> what each printed."""
    def work():
        os.chdir(folder)
        sys.argv = ["script.py", *map(str, flags)]
        with open(f"printed_{os.environ['RANK']}", "w") as printed, \
                contextlib.redirect_stdout(printed):
            main()
    by_two(work)
    return [Path(folder, f"printed_{rank}").read_text() for rank in (0, 1)]
