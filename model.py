"""LoFi's model (Sec. 2.0.1, Fig. 1a): SigLIP 2 encoders, 64 attention pooling queries, Gemma 3.

    from model import LoFi
    model = LoFi.from_pretrained("runs/phantom")
    model.ground("x.png", ["The heart is enlarged."])      # -> boxes of each phrase
    emb = model.encode_image(["a.png", "b.png"])           # -> (2, D), unit length, no gradient
    emb @ model.encode_text(["No nodule."]).T              # -> (2, 1) cosines

    python model.py ask RUN IMAGE --phrase WORDS ...       # boxes; without --phrase the report
    python model.py export RUN OUT                         # a plain SiglipModel folder, LoRA merged

B images, S x S pixels  P patches, D_v wide, g patches a side, P = g * g  V visual tokens (64)
T text tokens  D shared width of image and text  H LLM width
R rows of the LLM (image, prompt, target)  L prompt and target tokens  N target tokens of all rows
boxes: (x0, y0, x1, y1), fractions of width and height

Below: Config, AttentionPooling, building the parts, Encoder, LoFi (forward, nll, answers, save and
load). The method ends there; then files, devices and processes, and the commands.
"""

import argparse
import json
import sys


# ---- arguments: before the imports that take seconds, so that --help answers at once -------------

def parse_args():
    parser = argparse.ArgumentParser(
        description="Ask a trained LoFi about an image, or export its encoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    words = "merge LoRA into a plain SiglipModel folder, which transformers loads without this code"
    add = commands.add_parser("export", help=words, description=words).add_argument
    add("run", help="run folder of train.py")
    add("out", help="folder to write: SiglipModel, tokenizer and image processor")
    words = "print JSON: an image's report, the boxes of phrases, or the sentence of a box"
    ask = commands.add_parser(
        "ask", help=words, description=words, epilog="A score is the geometric mean probability of "
        "an answer's tokens and is not calibrated: LoFi is never taught that a finding is absent, "
        "so it answers almost any phrase with boxes.")
    ask.add_argument("run", help="run folder of train.py")
    ask.add_argument("image", help="a chest X-ray of any mode and size")
    add = ask.add_mutually_exclusive_group().add_argument
    add("--phrase", nargs="+", metavar="WORDS", help="findings, each a sentence (Eq. 3)")
    add("--box", nargs=4, type=float, metavar=("X0", "Y0", "X1", "Y1"),
        help="region to describe, as fractions of width and height")
    return parser.parse_args()


ARGS = parse_args() if __name__ == "__main__" else None

# ruff: noqa: E402
import dataclasses
import functools
import logging
import math
import os
import re
import shutil
import tempfile
import textwrap
import urllib.error
import urllib.request
import warnings
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import SafetensorError          # safetensors is peft's dependency
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel,
                          PreTrainedTokenizerFast, SiglipConfig, SiglipModel)
from transformers import logging as transformers_logging
from transformers.modeling_utils import safe_open, safe_save_file
from transformers.utils.hub import is_offline_mode

import data
from losses import autoregressive_nll
from metrics import (DAMAGED, InputError, box_problem, first_line, run_command, write_file,
                     write_json)

# ---- hyper-parameters, each once ----------------------------------------------------------------

SIGLIP2_400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                    num_attention_heads=16)
TINY_TOWER = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, hidden_act="gelu")


@dataclasses.dataclass(frozen=True)
class Config:
    """The paper's setting. vision, text and decoder are used only for parts built from scratch."""
    preset: str = "paper"
    encoder: str | None = "google/siglip2-so400m-patch16-512"   # E_I and E_T           (Sec. 2.0.4)
    llm: str | None = "google/gemma-3-270m"                     # LLM                   (Sec. 2.0.4)
    n_queries: int = 64             # attention pooling modules, V                      (Sec. 2.0.1)
    lora_rank: int = 16             # q, k, v, out of both encoders; 0: all trains      (Sec. 2.0.4)
    lora_alpha: int = 16            # not stated in the paper
    llm_lora_rank: int = 4          # q, v of the LLM; 0: all trains                    (Sec. 2.0.4)
    llm_lora_alpha: int = 4         # not stated in the paper
    lam: float = 5.0                # lambda of the total loss                          (Sec. 2.0.1)
    lr: float = 3e-4                # initial, then cosine annealing                    (Sec. 2.0.4)
    epochs: int | None = 10         #                                                   (Sec. 2.0.4)
    steps: int | None = None        # if both are given, whichever ends first
    batch_size: int = 16            #                                                   (Sec. 2.0.4)
    muon_lr: float = 0.0            # rate of Muon for hidden matrices, in units of lr; 0: AdamW
    text_lr: float = 1.0            # rate of the text tower, as a share of the others'
    scale_lr: float = 1.0           # rate of t' and b, as a share of lr
    warmup: float = 0.02            # share of the steps; not stated in the paper
    weight_decay: float = 0.01      # not stated in the paper
    clip: float = 1.0               # gradient norm; not stated in the paper
    n_regions: int = 1              # regions of an image in a step; not stated in the paper
    max_target: int = 256           # tokens of a target; not stated in the paper
    answer_tokens: int = 160        # of boxes (nine) or a phrase; not stated in the paper
    augment: float = 0.0            # strength of augmentation; not stated in the paper
    cache: bool = False             # keep decoded images in memory
    vocab_size: int = 32_000        # at most, of a tokenizer that is learned from the texts
    vision: dict = dataclasses.field(default_factory=lambda: dict(
        SIGLIP2_400M, image_size=512, patch_size=16))
    text: dict = dataclasses.field(default_factory=lambda: dict(
        SIGLIP2_400M, vocab_size=256_000, max_position_embeddings=64, projection_size=1152))
    decoder: dict = dataclasses.field(default_factory=lambda: dict(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        head_dim=256, num_attention_heads=4, num_key_value_heads=1, sliding_window=512,
        max_position_embeddings=32_768))


PAPER = Config()
TINY = Config(                          # for a few hundred images on a CPU
    preset="tiny", encoder=None, llm=None, n_queries=9, lora_rank=0, llm_lora_rank=0,
    lr=1.2e-3, muon_lr=5.0, text_lr=0.3, scale_lr=10, weight_decay=0.05,
    steps=1400, epochs=None, batch_size=36, n_regions=3, max_target=34,
    answer_tokens=64, augment=0.65, cache=True, vocab_size=1024,
    vision=dict(TINY_TOWER, num_hidden_layers=3, image_size=60, patch_size=12),
    text=dict(TINY_TOWER, num_hidden_layers=1, max_position_embeddings=24, projection_size=128),
    decoder=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64,
                 initializer_range=0.08, hidden_activation="silu", max_position_embeddings=1024))
# For the phantom: its images are many, so none is augmented; its reports have up to four sentences.
PHANTOM = dataclasses.replace(
    TINY, steps=1500, batch_size=32, augment=0.0,
    text=dict(TINY.text, max_position_embeddings=34))
PRESETS = {"paper": PAPER, "tiny": TINY}


# ---- attention pooling and projection -----------------------------------------------------------

def grid_code(n, width, heads):
    """Sine and cosine position code of an n x n grid, the same in every head: (n * n, width).

    A head of h channels holds h / 4 frequencies of x and of y, from 1/2 to 2 periods over the
    image; equal positions have the largest dot product."""
    frequency = torch.pi * torch.linspace(0, 2, width // heads // 4).exp2()
    position = (torch.arange(n) + 0.5) / n
    y, x = torch.meshgrid(position, position, indexing="ij")
    angle = torch.stack([x, y], -1).view(n * n, 2, 1) * frequency                  # (n * n, 2, h/4)
    code = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)                    # (n * n, h)
    return code.repeat(1, heads)


class AttentionPooling(nn.Module):
    """V learned queries attend to P patches, then a projection to the LLM's width (Sec. 2.0.1).

    The queries start on a grid over the image, and the keys carry the same position code, so that
    each query starts by attending to its own position (not stated in the paper)."""

    def __init__(self, width, heads, n_patches, n_queries, llm_width):
        super().__init__()
        self.register_buffer("position", grid_code(round(n_patches ** 0.5), width, heads),
                             persistent=False)                                     # (P, D_v)
        # V = 64: an 8 x 8 grid; other V: evenly spaced positions of the next larger grid
        code = grid_code(math.ceil(n_queries ** 0.5), width, heads)
        chosen = torch.linspace(0, len(code) - 1, n_queries).round().long()
        self.queries = nn.Parameter(2 * code[chosen])     # 2: sharper attention    (V, D_v)
        self.norm_patches = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, llm_width)
        with torch.no_grad():           # query and key projections start as the identity
            self.attention.in_proj_weight[:2 * width] = torch.eye(width).repeat(2, 1)

    def forward(self, patches):
        patches = self.norm_patches(patches)                                       # (B, P, D_v)
        queries = self.queries.expand(len(patches), -1, -1)                        # (B, V, D_v)
        keys = patches + 2 * self.position                                         # (B, P, D_v)
        pooled, _ = self.attention(queries, keys, patches, need_weights=False)
        return self.projection(self.norm(pooled))                                  # (B, V, H)


# ---- building the parts: E_I and E_T, LLM, LoRA --------------------------------------------------

# LoRA only on the encoder layers: the suffix "out_proj" would also wrap the pooling head's, where
# LoRA has neither effect nor gradient.
ENCODER_LORA = r".*encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
LLM_LORA = r".*layers\.\d+\.self_attn\.(q_proj|v_proj)"


def build_encoder(config, batch_size=None):
    """E_I and E_T: the pretrained SiglipModel, or one of the same class with random weights, whose
    b starts by the batch size (config's by default)."""
    if config.encoder:
        return load_pretrained(SiglipModel, config.encoder, dtype=torch.float32)
    siglip = SiglipModel(SiglipConfig(vision_config=config.vision, text_config=config.text))
    with torch.no_grad():
        siglip.logit_scale.fill_(math.log(10))                 # t' as SigLIP starts it
        # b = -log(B), as one pair of B is positive; SigLIP's -10 is for B = 32,768
        siglip.logit_bias.fill_(-math.log(batch_size or config.batch_size))
        position = siglip.vision_model.embeddings.position_embedding.weight
        position.copy_(grid_code(round(len(position) ** 0.5), position.shape[1],
                                 config.vision["num_attention_heads"]))
        # SigLIP pools the text at its last position, often padding. Larger token embeddings and
        # smaller position embeddings make the first output about the mean of the words.
        words = siglip.text_model.embeddings
        words.token_embedding.weight.mul_(3)
        words.token_embedding.weight[config.text["pad_token_id"]].zero_()
        words.position_embedding.weight.mul_(0.2)
    if not config.lora_rank:
        zero_residual_branches(siglip.vision_model)
    return siglip


def build_llm(config):
    """The pretrained Gemma 3 text model, or one of the same class with random weights."""
    if config.llm:
        return load_pretrained(Gemma3ForCausalLM, config.llm, dtype=torch.float32)
    llm = Gemma3ForCausalLM(Gemma3TextConfig(**config.decoder))
    if not config.llm_lora_rank:
        zero_residual_branches(llm)
    return llm


@torch.no_grad()
def zero_residual_branches(part):
    """Zero the last matrix of attention and MLP: layers start as the identity and learn faster."""
    for name, p in part.named_parameters():
        if re.search(r"layers.*\.(out_proj|o_proj|fc2|down_proj)\.weight", name):
            p.zero_()


def add_lora(part, rank, alpha, target_modules):
    """Freeze a part and wrap the named layers in LoRA; rank 0 leaves it whole and trainable."""
    if not rank:
        return part
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules)
    with warnings.catch_warnings():     # peft still reads a deprecated attribute of transformers
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(part, lora)


# ---- E_I and E_T --------------------------------------------------------------------------------

class Encoder(nn.Module):
    """E_I and E_T (Sec. 2.0.1): a SiglipModel and its tokenizer. LoFi extends it."""

    def __init__(self, siglip, text_tokenizer):
        super().__init__()
        self.siglip, self.text_tokenizer, self.source = siglip, text_tokenizer, None
        self.image_size = siglip.config.vision_config.image_size
        self.text_length = siglip.config.text_config.max_position_embeddings
        check_tokenizer(text_tokenizer, siglip.config.text_config.vocab_size)

    @staticmethod
    def load(source, device="cpu"):
        """A run folder of train.py -> LoFi; a SigLIP-family id or folder -> Encoder, for baselines.
        Raises InputError."""
        check_checkpoint(source)
        if read_config(source):
            return LoFi.from_pretrained(source, device)
        encoder = Encoder(load_pretrained(SiglipModel, source, dtype=torch.float32),
                          load_pretrained(PreTrainedTokenizerFast, source)).to(device).eval()
        encoder.source = str(source)
        return encoder

    @property
    def device(self):
        return self.siglip.logit_scale.device

    def pixels(self, images):
        """A path, a PIL image, or a list of them -> (B, S, S) uint8; a tensor is left as it is."""
        if isinstance(images, torch.Tensor):
            return images.to(self.device)
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = [np.array(data.load_image(image, self.image_size)) for image in images]
        return torch.from_numpy(np.stack(pixels)).to(self.device)

    def encode_image(self, images, with_patches=False, requires_grad=False):
        """E_I: images (B, S, S) uint8, or paths, or PIL images -> (B, D) of unit length.

        with_patches: also the patch tokens (B, P, D_v) that the attention pooling takes.
        requires_grad: track gradients, as training does."""
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            # three equal channels, from 0..255 to SigLIP's -1..1
            pixels = self.pixels(images)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1  # (B, 3, S, S)
            out = self.siglip.get_image_features(pixel_values=pixels)
            image_emb = F.normalize(out.pooler_output.float(), dim=-1)             # (B, D)
        return (image_emb, out.last_hidden_state) if with_patches else image_emb

    def encode_text(self, texts, requires_grad=False):
        """E_T: texts (one, a list, or (B, T) ids) -> (B, D) of unit length."""
        if not isinstance(texts, torch.Tensor):
            texts = data.text_ids(self.text_tokenizer, [texts] if isinstance(texts, str) else texts,
                                  self.text_length)                                # (B, T)
        with torch.set_grad_enabled(requires_grad and torch.is_grad_enabled()):
            out = self.siglip.get_text_features(input_ids=texts.to(self.device))
            return F.normalize(out.pooler_output.float(), dim=-1)

    @torch.enable_grad()
    def heat_map(self, image, phrases):
        """An image and n phrases -> (n, g, g): what each patch adds to the cosine of a phrase, less
        that of an empty text, as patch token times gradient. Not in the paper."""
        patches = self.encode_image(image, with_patches=True)[1].requires_grad_()  # (1, P, D_v)
        image_emb = F.normalize(self.siglip.vision_model.head(patches).float(), dim=-1)
        # the empty text: what the cosines of all texts share says nothing about the phrase
        cosines = image_emb @ (self.encode_text(phrases) - self.encode_text("")).T  # (1, n)
        heat = torch.cat([patches * torch.autograd.grad(cosine, patches, retain_graph=True)[0]
                          for cosine in cosines[0]]).sum(-1).detach()              # (n, P)
        side = round(patches.shape[1] ** 0.5)
        return heat.view(-1, side, side)


# ---- LoFi ---------------------------------------------------------------------------------------

class LoFi(Encoder):
    """E_I, E_T, the attention pooling and the LLM, the same for training and use."""

    def __init__(self, config, siglip, llm, text_tokenizer, llm_tokenizer):
        super().__init__(add_lora(siglip, config.lora_rank, config.lora_alpha, ENCODER_LORA),
                         text_tokenizer)
        check_tokenizer(llm_tokenizer, llm.config.vocab_size, "bos_token")
        self.config, self.llm_tokenizer = config, llm_tokenizer
        self.llm = add_lora(llm, config.llm_lora_rank, config.llm_lora_alpha, LLM_LORA)
        vision = siglip.config.vision_config
        self.pooling = AttentionPooling(vision.hidden_size, vision.num_attention_heads,
                                        (vision.image_size // vision.patch_size) ** 2,
                                        config.n_queries, llm.config.hidden_size)
        for parameter in (siglip.logit_scale, siglip.logit_bias):    # t' and b train with LoRA
            parameter.requires_grad_(True)

    @classmethod
    def build(cls, config, texts=(), batch_size=None):
        """A model to train. Pretrained parts have their tokenizers; parts from scratch, and an
        encoder without one, get a byte-level BPE learned from the texts. Raises InputError."""
        text_tokenizer = llm_tokenizer = None
        if config.encoder and (not Path(config.encoder).is_dir()
                               or Path(config.encoder, "tokenizer.json").exists()):
            text_tokenizer = load_pretrained(PreTrainedTokenizerFast, config.encoder)
        if config.llm:
            llm_tokenizer = load_pretrained(PreTrainedTokenizerFast, config.llm)
        if not (text_tokenizer and llm_tokenizer):
            n_tokens = config.vocab_size
            if config.encoder and not text_tokenizer:
                siglip = load_pretrained(SiglipConfig, config.encoder)
                n_tokens = min(n_tokens, siglip.text_config.vocab_size)
                say(f"{config.encoder} has no tokenizer; one is learned from the reports")
            learned = data.learn_tokenizer(texts, n_tokens)
            say(f"learned a byte-level BPE tokenizer of {len(learned):,} tokens from the training "
                "split")
            size = {"vocab_size": len(learned)}                # unless the preset says more
            special = dict(bos_token_id=learned.bos_token_id, eos_token_id=learned.eos_token_id,
                           pad_token_id=learned.pad_token_id)
            config = dataclasses.replace(config, text={**size, **config.text, **special},
                                         decoder={**size, **config.decoder, **special})
        return cls(config, build_encoder(config, batch_size), build_llm(config),
                   text_tokenizer or learned, llm_tokenizer or learned)

    def forward(self, batch):
        """A batch of data.Collate -> image_emb (B, D), text_emb (B, D), nll (R,).

        nll: -log p_LLM of each row's target given its image and prompt, of any task: one pass over
        each encoder and one over the LLM. text_emb is None without the sigmoid objective."""
        image_emb, patches = self.encode_image(batch["image"], with_patches=True,
                                               requires_grad=True)
        text_emb = self.encode_text(batch["text"], requires_grad=True) if "text" in batch else None
        if not len(batch["ids"]):                                  # no target for the LLM
            return image_emb, text_emb, image_emb.new_zeros(0)
        visual = self.visual_tokens(patches)[batch["image_of_row"]]                # (R, V, H)
        return image_emb, text_emb, self.nll(visual, batch["ids"], batch["is_target"])

    def visual_tokens(self, patches):
        """Patch tokens (B, P, D_v) -> visual tokens (B, V, H): attention pooling and projection."""
        return self.pooling(patches)

    def embed(self, visual, ids):
        """<bos>, visual tokens (R, V, H), then the ids (R, L) -> (R, 1 + V + L, H)."""
        # embedding() scales by sqrt(H), as in Gemma; the visual tokens are not scaled
        embedding = self.llm.get_input_embeddings()
        bos = torch.full((len(ids), 1), self.llm_tokenizer.bos_token_id, device=ids.device)
        return torch.cat([embedding(bos), visual, embedding(ids)], 1)

    def nll(self, visual, ids, is_target):
        """-log p_LLM of the target tokens of each row, their mean. visual: (R, V, H), ids: (R, L)
        prompt, target, padding; is_target: (R, L). Returns (R,).

        Rows are padded on the right and the mask is causal, so no target sees padding. The head,
        as wide as the vocabulary, is applied only to the states that predict a target."""
        decoder, head = self.llm.get_decoder(), self.llm.get_output_embeddings()
        hidden = decoder(inputs_embeds=self.embed(visual, ids), use_cache=False).last_hidden_state
        # State 0 is <bos>'s, 1 to V the visual tokens', the rest the ids'. State V predicts the
        # first id, and the last state predicts nothing.
        hidden = hidden[:, visual.shape[1]:-1]                                     # (R, L, H)
        return autoregressive_nll(hidden[is_target], head, ids, is_target)

    # ---- answers --------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, visual, prompts, max_new_tokens=256):
        """Greedy, batched, KV-cached: visual (R, V, H) and R prompts -> R texts, and R scores, the
        geometric mean probability of the answer's tokens."""
        prompts = [torch.tensor(data.prompt_ids(self.llm_tokenizer, prompt), device=visual.device)
                   for prompt in prompts]
        embeds = [self.embed(v[None], ids[None])[0] for v, ids in zip(visual, prompts)]
        mask = [torch.ones(len(row), dtype=torch.long, device=visual.device) for row in embeds]
        pad_left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        eos, pad = self.llm_tokenizer.eos_token_id, self.llm_tokenizer.pad_token_id
        out = self.llm.generate(                                                   # (R, n)
            inputs_embeds=pad_left(embeds), attention_mask=pad_left(mask), do_sample=False,
            top_k=None, top_p=None, max_new_tokens=max_new_tokens, eos_token_id=eos,
            pad_token_id=pad)
        ids, is_target = [], []                                # the answers, to read their nll
        for prompt, answer in zip(prompts, out):
            is_eos = (answer == eos).nonzero()
            n_tokens = is_eos[0] + 1 if len(is_eos) else len(answer)       # padding follows <eos>
            ids.append(torch.cat([prompt, answer[:n_tokens]]))
            is_target.append(torch.arange(len(ids[-1]), device=visual.device) >= len(prompt))
        nll = self.nll(visual, pad_sequence(ids, batch_first=True),
                       pad_sequence(is_target, batch_first=True))
        scores = [round(score, 4) for score in (-nll).exp().tolist()]
        return self.llm_tokenizer.batch_decode(out, skip_special_tokens=True), scores

    @torch.no_grad()
    def ask(self, image, prompts, max_new_tokens=256):
        """Several prompts on one image, encoded once -> the answers and the score of each."""
        visual = self.visual_tokens(self.encode_image(image, with_patches=True)[1])
        return self.generate(visual.expand(len(prompts), -1, -1), prompts, max_new_tokens)

    def report(self, image, with_score=False):
        """An image -> its report (Eq. 2)."""
        [report], [score] = self.ask(image, [data.CAPTIONING_PROMPT])
        return (report, score) if with_score else report

    def ground(self, image, phrases, with_scores=False):
        """An image and phrases (or one) -> the boxes of each (Eq. 3), none if malformed.

        The method never learns that a finding is absent, so almost any phrase gets boxes."""
        phrases = [phrases] if isinstance(phrases, str) else phrases
        prompts = [data.GROUNDING_PROMPT.format(phrase=phrase) for phrase in phrases]
        answers, scores = self.ask(image, prompts, self.config.answer_tokens)
        boxes = [data.text_to_boxes(answer)[0] for answer in answers]
        return (boxes, scores) if with_scores else boxes

    def describe(self, image, boxes, with_score=False):
        """An image and boxes -> the sentence about that region (dense captioning)."""
        prompt = data.DENSE_CAPTIONING_PROMPT.format(boxes=data.boxes_to_text(boxes))
        [sentence], [score] = self.ask(image, [prompt], self.config.answer_tokens)
        return (sentence, score) if with_score else sentence

    # ---- save and load --------------------------------------------------------------------------

    def saved_state(self):
        """What a run keeps: the tensors that train, and all of a part not loaded from elsewhere."""
        parts = ("siglip.", self.config.encoder), ("llm.", self.config.llm)
        built = tuple(name for name, source in parts if not source)
        trains = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: tensor.detach().cpu().contiguous()
                for name, tensor in self.state_dict().items()
                if name in trains or name.startswith(built) and "lm_head" not in name}

    def save_pretrained(self, folder):
        """Write tokenizer/, model.safetensors and config.json, each atomically, or InputError."""
        folder = Path(folder)
        with tempfile.TemporaryDirectory() as scratch:
            self.llm_tokenizer.save_pretrained(scratch)
            self.text_tokenizer.save_pretrained(Path(scratch, "text"))
            for file in Path(scratch).rglob("*.*"):
                write_file(folder / "tokenizer" / file.relative_to(scratch),
                           functools.partial(shutil.copyfile, file))
        write_weights(folder / "model.safetensors", self.saved_state())
        write_json(folder / "config.json", dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read what save_pretrained wrote. Raises InputError if it is not a run, or is damaged."""
        weights, tokenizer = Path(folder, "model.safetensors"), Path(folder, "tokenizer")
        if not (config := read_config(folder)):
            raise InputError(f"{folder}: not a run folder of train.py; python train.py makes "
                             "runs/phantom")
        state = read_weights(weights)
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise InputError(f"{weights}: {name} has a value that is not finite: the training "
                                 "diverged or the file was edited; train again, or use a backup")
        try:
            model = cls(config, build_encoder(config), build_llm(config),
                        load_pretrained(PreTrainedTokenizerFast, tokenizer / "text"),
                        load_pretrained(PreTrainedTokenizerFast, tokenizer))
            if wrong := state.keys() ^ model.saved_state().keys():
                raise ValueError(f"{min(wrong)} is missing or unknown")
            model.load_state_dict(state, strict=False)         # frozen weights are not in it
        except InputError:
            raise
        except DAMAGED as error:
            raise InputError(f"{folder}: config.json and model.safetensors do not make a model "
                             f"({textwrap.shorten(str(error), 200)}); was one of them edited, or "
                             "copied from another run?")
        model.source = str(folder)
        return model.to(device).eval()


# ---- files --------------------------------------------------------------------------------------

def check_checkpoint(source):
    """Raise InputError if a run is missing, before it is looked for on the Hub."""
    path = Path(source)
    is_lost = not path.exists() and (path.parts[0] == "runs" or path.parent.is_dir())
    is_another = path.is_dir() and not Path(path, "config.json").exists()
    if is_lost or is_another:
        raise InputError(f"{source}: no such checkpoint; python train.py makes runs/phantom, and "
                         "--checkpoint takes a run, or a SigLIP-family id or folder")


def read_config(folder):
    """config.json of a run folder -> Config; None if the folder holds no run. Raises InputError."""
    if not Path(folder, "tokenizer", "text").is_dir():         # as only a run has it
        if Path(folder, "log.jsonl").exists():
            raise InputError(f"{folder}: has no tokenizer/: train.py has not saved a checkpoint "
                             "there yet, or it was deleted")
        return None
    try:
        return Config(**json.loads(Path(folder, "config.json").read_text()))
    except (OSError, TypeError, ValueError):
        raise InputError(f"{folder}: config.json is missing, damaged or of another version of this "
                         "code; train again, or use a backup")


def checksum(state):
    """crc32 of tensors with their names, types and shapes, as text."""
    value = 0
    for name, tensor in sorted(state.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.cpu().reshape(-1).view(torch.uint8).numpy(), value)
    return str(value)


def write_weights(path, state):
    """Write {name: tensor} to a safetensors file, with a checksum. Raises InputError."""
    def write(draft):
        try:
            safe_save_file(state, draft, {"crc32": checksum(state)})
        except SafetensorError as error:                       # a full disk
            raise OSError(first_line(error))
    write_file(path, write)


def read_weights(path):
    """Read what write_weights wrote. Raises InputError."""
    try:
        with safe_open(path, "pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
            if (file.metadata() or {}).get("crc32") != checksum(state):
                raise ValueError("checksum mismatch")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path}: missing or damaged, or not written by this code "
                         f"({first_line(error)}); train again, or use a backup")
    return state


@functools.cache
def hub_is_reachable():
    """Check once whether the Hub is reachable; transformers retries for minutes."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        if not is_offline_mode():                              # HF_HUB_OFFLINE=1
            urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
        return not is_offline_mode()
    except (OSError, ValueError) as error:                     # no network, or a bad address
        return isinstance(error, urllib.error.HTTPError)       # any response will do


def load_pretrained(cls, source, hint="", **options):
    """cls.from_pretrained(source) for models, configs, tokenizers and processors, from a folder or
    the Hub. hint: what else can be done. Raises InputError."""
    is_folder = Path(source).exists() or len(Path(source).parts) != 2    # the Hub's are owner/name
    options["local_files_only"] = is_folder or not hub_is_reachable()
    try:
        if not issubclass(cls, PreTrainedModel):
            return cls.from_pretrained(source, **options)
        kind = AutoConfig.from_pretrained(source, **options).model_type
        if kind != cls.config_class.model_type:
            raise ValueError(f"it is a {kind} model, expected {cls.config_class.model_type}")
        part, report = cls.from_pretrained(source, output_loading_info=True, **options)
        if missing := report["missing_keys"]:                  # they would stay random
            raise ValueError(f"{len(missing)} weights are missing, such as {min(missing)}")
        return part
    except (*DAMAGED, SafetensorError) as error:
        reason = first_line(error).rstrip(". ")
    if is_folder and not Path(source).exists():
        reason = "no such folder"
    if not is_folder and not hub_is_reachable():
        reason = "the Hub cannot be reached, and no copy is in the cache"
    advice = ("expected a folder that save_pretrained wrote, with its weights and tokenizer"
              if is_folder else
              f"if it is gated, accept its terms at https://huggingface.co/{source} and run "
              "`hf auth login`; or give a local folder; train.py --preset tiny needs none")
    raise InputError(f"{source}: cannot be loaded ({reason}); {advice}{hint}")


def check_tokenizer(tokenizer, n_embeddings, *special):
    """Raise InputError unless a tokenizer fits a model: its number of token embeddings, and the
    special tokens that it needs apart from <eos> and padding."""
    source = tokenizer.name_or_path
    if tokenizer.vocab_size > n_embeddings:
        raise InputError(f"{source}: its largest id is {tokenizer.vocab_size - 1:,}, but the model "
                         f"has {n_embeddings:,} token embeddings; use the model's own tokenizer")
    for name in ("eos_token", "pad_token", *special):
        number = getattr(tokenizer, f"{name}_id")
        if number is None or number >= n_embeddings:
            raise InputError(f"{source}: its {name} is missing; take the model's own tokenizer")


# ---- the device, and the processes of torchrun --------------------------------------------------

def find_device(name=None):
    """--device -> torch.device; with torchrun each process takes its own GPU. Raises InputError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        number = torch.zeros(1, device=name)
        number.item()                                          # "meta" holds no values
        return number.device
    except (RuntimeError, AssertionError):                     # not a device, or not there
        raise InputError(f"--device {name}: expected cpu, cuda or cuda:N, a GPU that torch sees")


def join_processes(device=torch.device("cpu")):
    """Join the processes that torchrun started, which exchange tensors on a device -> (rank,
    number of processes)."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                timeout=timedelta(days=1))     # the first evaluates, others wait
    return rank_and_world()


def rank_and_world():
    """(rank, number of processes); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all(value):
    """The value of each process, in the order of their ranks: [value] if there is only one."""
    values = [value] * rank_and_world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def silence_libraries():
    """Keep transformers and the Hub from printing notes and progress bars."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def say(text, file=None):
    """Print, once for all processes."""
    if rank_and_world()[0] == 0:
        print(text, file=file, flush=True)


# ---- the commands -------------------------------------------------------------------------------

def export(run, out):
    """Merge LoRA into a plain SiglipModel folder. Raises InputError.

    Texts for it must be lower-cased and padded to text_length, as data.text_ids does."""
    from transformers import SiglipImageProcessor
    model, out = LoFi.from_pretrained(run), Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    size = {"height": model.image_size, "width": model.image_size}
    siglip = model.siglip.merge_and_unload() if model.config.lora_rank else model.siglip
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        draft = Path(scratch, "siglip")
        siglip.save_pretrained(draft)
        model.text_tokenizer.save_pretrained(draft)
        SiglipImageProcessor(size=size, resample=2).save_pretrained(draft)     # 2: bilinear
        draft.rename(out)
    print(f"wrote {out}: transformers.SiglipModel.from_pretrained({str(out)!r})")


def main(args=None):
    args = args or parse_args()
    silence_libraries()
    if args.command == "export":
        return export(args.run, args.out)
    if args.box and (problem := box_problem(args.box)):
        raise InputError(f"--box {args.box}: {problem}")
    if not all(phrase.strip() for phrase in args.phrase or []):
        raise InputError("--phrase: one is empty, expected a sentence")
    model = LoFi.from_pretrained(args.run)
    if args.box:
        sentence, score = model.describe(args.image, [args.box], with_score=True)
        answer = {"boxes": [args.box], "sentence": sentence, "score": score}
    elif args.phrase:
        answer = []
        for phrase, boxes, score in zip(args.phrase,
                                        *model.ground(args.image, args.phrase, with_scores=True)):
            if not boxes:
                print(f"no box predicted for {phrase!r}", file=sys.stderr)
            sentence = model.describe(args.image, boxes) if boxes else ""
            answer.append({"phrase": phrase, "boxes": boxes, "score": score, "sentence": sentence})
    else:
        report, score = model.report(args.image, with_score=True)
        answer = {"report": report, "score": score}
    print(json.dumps(answer))


if __name__ == "__main__":
    run_command(main, ARGS)
