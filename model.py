"""LoFi's model (Sec. 2.0.1, Fig. 1a): SigLIP 2 encoders, 64 attention pooling queries, Gemma 3.

    from model import LoFi
    model = LoFi.from_pretrained("runs/phantom")
    model.report("x.png")                                  # -> the image's report
    model.ground("x.png", ["The heart is enlarged."])      # -> boxes of each phrase
    model.describe("x.png", [[0.4, 0.5, 0.8, 0.8]])        # -> the sentence about a region
    emb = model.encode_image(["a.png", "b.png"])           # -> (2, D), unit length, no gradient
    emb @ model.encode_text(["No nodule."]).T              # -> (2, 1) cosines
    model.export("siglip")                                 # a plain SiglipModel folder, LoRA merged

The letters of all files:
B images, S x S pixels  P patches, D_v wide, g patches a side, P = g * g  V visual tokens (64)
T text tokens  D shared width of image and text  H LLM width  K demonstrations
R rows of the LLM: image, prompt, target  L prompt and target tokens  N target tokens of all rows
boxes: (x0, y0, x1, y1), fractions of width and height

Below: Config, AttentionPooling, building the parts, DualEncoder, LoFi (forward, nll, answers, save
and load). The method ends there; then towers from scratch, loading, devices and processes.
"""

import copy
import dataclasses
import functools
import json
import logging
import math
import os
import re
import shutil
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel,
                          PreTrainedTokenizerFast, SiglipConfig, SiglipModel)
from transformers import logging as transformers_logging
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import data
from data import InputError, box_problem, first_line, write_file, write_json
from losses import autoregressive_nll

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
    scale_lr: float = 1.0           # rate of t' and b, as a factor on lr
    warmup: float = 0.02            # share of the steps; not stated in the paper
    weight_decay: float = 0.01      # not stated in the paper
    clip: float = 1.0               # gradient norm; not stated in the paper
    n_regions: int = 1              # regions of an image in a step; not stated in the paper
    max_target: int = 256           # tokens of a target or an answer; not stated in the paper
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
    steps=1400, epochs=None, batch_size=36, n_regions=3, max_target=72, augment=0.65,
    cache=True, vocab_size=1024,
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
    """V learned queries attend to P patches, then a projection to the LLM's width (Sec. 2.0.1: "64
    attention pooling modules", here one attention with 64 queries).

    The queries start on a grid over the image, and the keys carry the same position code, so that
    each query starts by attending to its own position (not stated in the paper)."""

    def __init__(self, width, heads, n_patches, n_queries, llm_width):
        super().__init__()
        self.register_buffer("position", grid_code(round(n_patches ** 0.5), width, heads),
                             persistent=False)                                     # (P, D_v)
        # V = 64: an 8 x 8 grid; a V that is no square: evenly spaced positions of the next grid
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
    b starts at -log of the batch size (of all processes; config's by default)."""
    if config.encoder:
        return load_pretrained(SiglipModel, config.encoder, dtype=torch.float32)
    siglip = SiglipModel(SiglipConfig(vision_config=config.vision, text_config=config.text))
    return init_from_scratch(siglip, config, batch_size or config.batch_size)


def build_llm(config):
    """The pretrained Gemma 3 text model, or one of the same class with random weights."""
    if config.llm:
        return load_pretrained(Gemma3ForCausalLM, config.llm, dtype=torch.float32)
    llm = Gemma3ForCausalLM(Gemma3TextConfig(**config.decoder))
    return llm if config.llm_lora_rank else zero_residual_branches(llm)


def add_lora(part, rank, alpha, target_modules):
    """Freeze a part and wrap the named layers in LoRA; rank 0 leaves it whole and trainable."""
    if not rank:
        return part
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=target_modules)
    with warnings.catch_warnings():     # peft still reads a deprecated attribute of transformers
        warnings.simplefilter("ignore", FutureWarning)
        part = get_peft_model(part, lora)
    for layer in part.modules():        # autocast chooses the type; peft would cast to fp32 first
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
    return part


# ---- E_I and E_T --------------------------------------------------------------------------------

class DualEncoder(nn.Module):
    """E_I and E_T (Sec. 2.0.1): a SiglipModel and its tokenizer. LoFi extends it."""

    def __init__(self, siglip, text_tokenizer, source=None):
        super().__init__()
        self.siglip, self.text_tokenizer, self.source = siglip, text_tokenizer, source
        self.image_size = siglip.config.vision_config.image_size
        self.text_length = siglip.config.text_config.max_position_embeddings
        check_tokenizer(text_tokenizer, siglip.config.text_config.vocab_size)

    @staticmethod
    def load(source, device="cpu"):
        """A run folder of train.py -> LoFi; a SigLIP-family id or folder -> DualEncoder, for
        baselines. Raises InputError."""
        if is_run(source):
            return LoFi.from_pretrained(source, device)
        return DualEncoder(load_pretrained(SiglipModel, source, dtype=torch.float32),
                           load_tokenizer(source), source).to(device).eval()

    @property
    def device(self):
        return self.siglip.logit_scale.device

    def pixels(self, images):
        """One image or a list (path, PIL image, (h, w) or (h, w, 3) uint8 array), or a (B, S, S)
        uint8 tensor -> (B, S, S) uint8. Raises InputError."""
        size = self.image_size
        if isinstance(images, torch.Tensor):
            if images.dtype != torch.uint8 or images.shape[1:] != (size, size):
                raise InputError(f"got a tensor of {images.dtype}, {tuple(images.shape)}, expected "
                                 f"uint8, (B, {size}, {size}); a path or a PIL image can be any")
            return images.to(self.device)
        images = images if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise InputError("got no image, expected one or a list of them")
        pixels = [np.array(data.load_image(image, size)) for image in images]
        return torch.from_numpy(np.stack(pixels)).to(self.device)

    def image_features(self, pixels):
        """(B, S, S) uint8 -> image_emb (B, D) of unit length, patch tokens (B, P, D_v)."""
        # three equal channels, from 0..255 to SigLIP's -1..1
        pixels = pixels[:, None].expand(-1, 3, -1, -1) / 127.5 - 1                 # (B, 3, S, S)
        out = self.siglip.get_image_features(pixel_values=pixels)
        return F.normalize(out.pooler_output.float(), dim=-1), out.last_hidden_state

    def text_features(self, ids):
        """(B, T) ids -> text_emb (B, D) of unit length."""
        out = self.siglip.get_text_features(input_ids=ids)
        return F.normalize(out.pooler_output.float(), dim=-1)

    @torch.no_grad()
    def encode_image(self, images, with_patches=False):
        """E_I: images as `pixels` takes them -> (B, D) of unit length, without gradient.
        with_patches: also the patch tokens (B, P, D_v) that the attention pooling takes."""
        image_emb, patches = self.image_features(self.pixels(images))
        return (image_emb, patches) if with_patches else image_emb

    @torch.no_grad()
    def encode_text(self, texts):
        """E_T: a text, a list of them, or (B, T) ids -> (B, D) of unit length, without gradient."""
        if not isinstance(texts, torch.Tensor):
            texts = data.text_ids(self.text_tokenizer, as_texts(texts), self.text_length)
        return self.text_features(texts.to(self.device))

    def similarity(self, images, texts):
        """cos(E_I, E_T) minus that of the empty text -> (B, n): how well texts fit images, without
        the part of the cosine that all texts share. Not in the paper."""
        return self.encode_image(images) @ (self.encode_text(texts) - self.encode_text("")).T

    def export(self, folder):
        """Write a plain SiglipModel folder with LoRA merged, which transformers loads without this
        code. Its texts must be lower-cased and padded to text_length, as data.text_ids does."""
        from transformers import SiglipImageProcessor          # prints a note on torchvision
        folder = Path(folder)
        folder.mkdir(parents=True)                             # FileExistsError: nothing is lost
        size = {"height": self.image_size, "width": self.image_size}
        siglip = copy.deepcopy(self.siglip)
        siglip = siglip.merge_and_unload() if hasattr(siglip, "merge_and_unload") else siglip
        siglip.save_pretrained(folder)
        self.text_tokenizer.save_pretrained(folder)
        SiglipImageProcessor(size=size, resample=2).save_pretrained(folder)        # 2: bilinear


def as_texts(texts):
    """A text or a list of them -> a list. Raises InputError."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"got {texts!r:.80}, expected a text or a list of texts")
    return texts


# ---- LoFi ---------------------------------------------------------------------------------------

class LoFi(DualEncoder):
    """E_I, E_T, the attention pooling and the LLM, the same for training and use."""

    def __init__(self, config, siglip, llm, text_tokenizer, llm_tokenizer):
        super().__init__(add_lora(siglip, config.lora_rank, config.lora_alpha, ENCODER_LORA),
                         text_tokenizer)
        check_tokenizer(llm_tokenizer, llm.config.vocab_size)
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
        """A model to train. Pretrained parts bring their tokenizers; random parts share a
        byte-level BPE tokenizer learned from the texts. Raises InputError."""
        if not (config.encoder and config.llm):
            learned = data.learn_tokenizer(texts, config.vocab_size)
            say(f"learned a tokenizer of {len(learned):,} tokens from the training rows")
            size = {"vocab_size": len(learned)}                # unless the preset says more
            special = dict(bos_token_id=learned.bos_token_id, eos_token_id=learned.eos_token_id,
                           pad_token_id=learned.pad_token_id)
            config = dataclasses.replace(config, text={**size, **config.text, **special},
                                         decoder={**size, **config.decoder, **special})
        text_tokenizer = load_tokenizer(config.encoder) if config.encoder else learned
        llm_tokenizer = load_tokenizer(config.llm) if config.llm else learned
        return cls(config, build_encoder(config, batch_size), build_llm(config),
                   text_tokenizer, llm_tokenizer)

    def forward(self, batch):
        """A batch of data.Collate -> image_emb (B, D), text_emb (B, D), nll (R,).

        nll: -log p_LLM of each row's target given its image and prompt, of any task: one pass over
        each encoder and one over the LLM. text_emb is None without the sigmoid objective."""
        image_emb, patches = self.image_features(batch["image"])
        text_emb = self.text_features(batch["text"]) if "text" in batch else None
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
    def generate(self, visual, prompts, max_new_tokens=None):
        """Greedy, batched, KV-cached: visual (R, V, H) and R prompts -> R texts. One that does not
        end within max_new_tokens (config.max_target) ends in data.CUT."""
        prompts = [torch.tensor(data.prompt_ids(self.llm_tokenizer, prompt), device=visual.device)
                   for prompt in prompts]
        embeds = [self.embed(v[None], ids[None])[0] for v, ids in zip(visual, prompts)]
        mask = [torch.ones(len(row), dtype=torch.long, device=visual.device) for row in embeds]
        pad_left = functools.partial(pad_sequence, batch_first=True, padding_side="left")
        eos, pad = self.llm_tokenizer.eos_token_id, self.llm_tokenizer.pad_token_id
        out = self.llm.generate(                                                   # (R, n)
            inputs_embeds=pad_left(embeds), attention_mask=pad_left(mask), do_sample=False,
            top_k=None, top_p=None, max_new_tokens=max_new_tokens or self.config.max_target,
            eos_token_id=eos, pad_token_id=pad)
        texts = self.llm_tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text if eos in ids else text + data.CUT for text, ids in zip(texts, out.tolist())]

    @torch.no_grad()
    def ask(self, image, prompts):
        """Several prompts on one image, encoded once -> the answers."""
        _, patches = self.encode_image(image, with_patches=True)
        if len(patches) != 1:
            raise InputError(f"got {len(patches)} images, expected one")
        return self.generate(self.visual_tokens(patches).expand(len(prompts), -1, -1), prompts)

    def report(self, image):
        """An image -> its report (Eq. 2)."""
        return self.ask(image, [data.CAPTIONING_PROMPT])[0]

    def ground(self, image, phrases, with_similarity=False):
        """An image and phrases (or one) -> the boxes of each (Eq. 3), none if malformed.

        The method never learns that a finding is absent, so almost any phrase gets boxes.
        with_similarity: also the `similarity` of each phrase, larger where it is on the image."""
        phrases = as_texts(phrases)
        prompts = [data.GROUNDING_PROMPT.format(phrase=phrase) for phrase in phrases]
        boxes = [data.text_to_boxes(answer)[0] for answer in self.ask(image, prompts)]
        return (boxes, self.similarity(image, phrases)[0].tolist()) if with_similarity else boxes

    def describe(self, image, boxes):
        """An image and boxes -> the sentence about that region (dense captioning)."""
        boxes = [list(box) if np.iterable(box) else box for box in
                 np.asarray(boxes, object).tolist()]
        if not boxes or any(map(box_problem, boxes)):
            raise InputError(f"boxes {boxes!r:.80}: expected a list of [x0, y0, x1, y1] in [0, 1]")
        prompt = data.DENSE_CAPTIONING_PROMPT.format(boxes=data.boxes_to_text(boxes))
        return self.ask(image, [prompt])[0]

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
        """Write tokenizer/, model.safetensors and config.json, each file whole, or InputError."""
        folder = Path(folder)
        with tempfile.TemporaryDirectory() as scratch:
            self.llm_tokenizer.save_pretrained(scratch)
            self.text_tokenizer.save_pretrained(Path(scratch, "text"))
            for file in Path(scratch).rglob("*.*"):
                write_file(folder / "tokenizer" / file.relative_to(scratch),
                           functools.partial(shutil.copyfile, file))
        weights = save(self.saved_state())                     # save_file's mode would be 0600
        write_file(folder / "model.safetensors", lambda draft: draft.write_bytes(weights))
        write_json(folder / "config.json", dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read what save_pretrained wrote. Raises InputError if it is not a run, or is damaged."""
        if not is_run(folder):
            raise InputError(f"{folder}: not a run folder of train.py, or without a checkpoint; "
                             "python train.py makes runs/phantom")
        try:
            config = Config(**json.loads(Path(folder, "config.json").read_text()))
            state = load_file(Path(folder, "model.safetensors"))
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise InputError(f"{folder}: config.json or model.safetensors is missing, damaged or "
                             f"of another version of the code ({first_line(error)}); train again")
        tokenizer = Path(folder, "tokenizer")
        model = cls(config, build_encoder(config), build_llm(config),
                    load_tokenizer(tokenizer / "text"), load_tokenizer(tokenizer))
        def shapes(tensors):
            return {(name, tensor.shape) for name, tensor in tensors.items()}
        if wrong := shapes(state) ^ shapes(model.saved_state()):
            raise InputError(f"{folder}: {min(wrong)[0]} is missing, unknown or of another size; "
                             "do config.json and model.safetensors come from one run?")
        model.load_state_dict(state, strict=False)             # frozen weights are not in it
        model.source = str(folder)
        return model.to(device).eval()


# ==================================================================================================
# The method ends here. Below: towers from scratch, loading, the device, processes of torchrun.
# ==================================================================================================

# ---- how the miniature's towers start; not in the paper ------------------------------------------

@torch.no_grad()
def init_from_scratch(siglip, config, batch_size):
    """Start a random SiglipModel so that it learns faster, in place. Returns it."""
    siglip.logit_scale.fill_(math.log(10))                     # t' as SigLIP starts it
    # b = -log(B), as one pair of B is positive; SigLIP's -10 is for B = 32,768
    siglip.logit_bias.fill_(-math.log(batch_size))
    position = siglip.vision_model.embeddings.position_embedding.weight
    position.copy_(grid_code(round(len(position) ** 0.5), position.shape[1],
                             config.vision["num_attention_heads"]))
    # SigLIP pools the text at its last position, often padding. Larger token embeddings and smaller
    # position embeddings make the first output about the mean of the words.
    words = siglip.text_model.embeddings
    words.token_embedding.weight.mul_(3)
    words.token_embedding.weight[config.text["pad_token_id"]].zero_()
    words.position_embedding.weight.mul_(0.2)
    if not config.lora_rank:
        zero_residual_branches(siglip.vision_model)
    return siglip


@torch.no_grad()
def zero_residual_branches(part):
    """Zero the last matrix of attention and MLP: layers start as the identity. Returns the part."""
    for name, p in part.named_parameters():
        if re.search(r"layers.*\.(out_proj|o_proj|fc2|down_proj)\.weight", name):
            p.zero_()
    return part


# ---- loading from folders and the Hub -----------------------------------------------------------

def is_run(folder):
    """Whether a folder is a run of train.py that has saved a checkpoint."""
    return Path(folder, "tokenizer", "text").is_dir() and Path(folder, "config.json").exists()


def check_checkpoint(source):
    """Raise InputError if a run is missing, before it is looked for on the Hub."""
    path = Path(source)
    if not path.exists() and (path.parts[0] == "runs" or path.parent.is_dir() or is_path(source)):
        raise InputError(f"{source}: no such checkpoint; python train.py makes runs/phantom, and "
                         "--checkpoint takes a run, or a SigLIP-family id or folder")


def is_path(source):
    """Whether a source is written as a folder rather than as an id of the Hub, owner/name."""
    return str(source).startswith((".", "/", "~")) or Path(source).exists()


def load_pretrained(cls, source, **options):
    """cls.from_pretrained(source) for models, configs, tokenizers and processors, from a folder or
    the Hub. Raises InputError."""
    advice = ("expected a folder that save_pretrained wrote, with its weights and tokenizer"
              if is_path(source) else
              f"if it is gated, accept its terms at https://huggingface.co/{source} and run "
              "`hf auth login`; or give a local folder; train.py --preset tiny needs none")
    options["local_files_only"] = is_path(source)
    try:
        if not issubclass(cls, PreTrainedModel):
            return cls.from_pretrained(source, **options)
        part, report = cls.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{source}: cannot be loaded ({first_line(error).rstrip('. ')}); {advice}")
    if missing := report["missing_keys"]:                      # they would stay random
        raise InputError(f"{source}: {len(missing)} weights of a {cls.__name__} are missing, such "
                         f"as {min(missing)}; {advice}")
    return part


def load_tokenizer(source):
    """The tokenizer of a folder or a Hub id."""
    tokenizer = load_pretrained(PreTrainedTokenizerFast, source)
    if get_tokenizer_config(source).get("tokenizer_class") == "SiglipTokenizer":
        tokenizer.init_kwargs["drops_punctuation"] = True      # its tokenizer.json does not say so
    return tokenizer


def check_tokenizer(tokenizer, n_embeddings):
    """Another model's tokenizer would give wrong ids, or an index error deep in the model."""
    fits = tokenizer.vocab_size <= n_embeddings
    assert fits and None not in (tokenizer.eos_token_id, tokenizer.pad_token_id), (
        f"{tokenizer.name_or_path}: expected the model's own tokenizer, with <eos> and padding")


# ---- the device, and the processes of torchrun --------------------------------------------------

def find_device(name=None):
    """--device -> torch.device; with torchrun each process takes its own GPU. Raises InputError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        number = torch.zeros(1, device=name)
        number.item()                                          # "meta" holds no values
        if number.is_cuda:                                     # TF32 where autocast is off
            torch.set_float32_matmul_precision("high")
        return number.device
    except (RuntimeError, AssertionError):                     # not a device, or not there
        raise InputError(f"--device {name}: expected cpu, cuda or cuda:N, a GPU that torch sees")


def join_processes(device=torch.device("cpu")):
    """Join the processes that torchrun started, which exchange tensors on a device -> (rank,
    number of processes)."""
    if dist.is_torchelastic_launched() and not dist.is_initialized():
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
