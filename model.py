"""LoFi's model (Sec. 2.0.1, Fig. 1a): SigLIP 2 towers, 64 attention pooling queries, Gemma 3.

    from model import LoFi
    model = LoFi.from_pretrained("runs/phantom")
    model.ground(image, ["The heart is enlarged."])        # -> boxes; also report, describe
    python model.py ask RUN IMAGE --phrase WORDS ...       # boxes; also its report, or --box
    python model.py export RUN OUT                         # a plain SiglipModel folder, LoRA merged

B images, S x S pixels  P patches, D_v wide  V visual tokens (64)  H LLM width
T text tokens  D shared width of image and text  g patches a side, P = g * g
R rows of the LLM (image, prompt, target)  L prompt and target tokens  N target tokens of all rows
boxes: (x0, y0, x1, y1), fractions of width and height
"""

import argparse
import dataclasses
import functools
import json
import math
import os
import shutil
import sys
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.utils.loftq_utils import SafetensorError             # safetensors comes with both
from torch import nn
from transformers import (AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig,
                          PreTrainedTokenizerFast, SiglipConfig, SiglipModel)
from transformers.modeling_utils import load_state_dict as load_safetensors
from transformers.modeling_utils import safe_open, safe_save_file
from transformers.utils.hub import is_offline_mode

import data


class ModelError(ValueError):
    """A model cannot be built or loaded; the message is one line that says what to do."""


def find_device(name=None):
    """--device -> torch.device; under torchrun each process takes its own GPU. Raises ModelError"""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ModelError(f"--device {name}: wanted cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {name}: torch sees no CUDA GPU here; use --device cpu")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


# ---- hyper-parameters, each once ----------------------------------------------------------------

SIGLIP2_400M = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
                    num_attention_heads=16)
TINY_TOWER = dict(hidden_size=128, intermediate_size=384, num_attention_heads=2, hidden_act="gelu")


@dataclass(frozen=True)
class Config:
    """The paper's setting; TINY below is the miniature. Sizes count only when nothing is loaded."""
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
    steps: int | None = None        # whichever of steps and epochs ends first
    batch_size: int = 16            #                                                   (Sec. 2.0.4)
    min_batches: int = 1            # of an epoch; on a small set the batch shrinks to give them
    text_lr: float = 1.0            # rate of the text tower, as a share of lr
    scale_lr: float = 1.0           # rate of t' and b, as a share of lr
    warmup: float = 0.02            # share of the steps; not stated in the paper
    weight_decay: float = 0.01      # not stated in the paper
    clip: float = 1.0               # gradient norm; not stated in the paper
    n_regions: int = 1              # regions of an image in a step; not stated in the paper
    max_target: int = 256           # tokens of a target; not stated in the paper
    augment: float = 0.0            # strength of augmentation; not stated in the paper
    cache: bool = False             # keep decoded films in memory
    vocab_size: int = 32_000        # at most, of a tokenizer learned where none can be loaded
    vision: dict = dataclasses.field(default_factory=lambda: dict(
        SIGLIP2_400M, image_size=512, patch_size=16))
    text: dict = dataclasses.field(default_factory=lambda: dict(
        SIGLIP2_400M, vocab_size=256_000, max_position_embeddings=64, projection_size=1152))
    decoder: dict = dataclasses.field(default_factory=lambda: dict(
        vocab_size=262_144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
        head_dim=256, num_attention_heads=4, num_key_value_heads=1, sliding_window=512,
        max_position_embeddings=32_768))


PAPER = Config()
TINY = Config(                          # for a few hundred films on a CPU
    preset="tiny", encoder=None, llm=None, n_queries=9, lora_rank=0, llm_lora_rank=0,
    lr=1.2e-3, text_lr=0.3, scale_lr=10, warmup=0.08, weight_decay=0.05, steps=2200, epochs=None,
    batch_size=48, min_batches=6, n_regions=3, max_target=34, augment=0.65, cache=True,
    vocab_size=1024,
    vision=dict(TINY_TOWER, num_hidden_layers=3, image_size=60, patch_size=12),
    text=dict(TINY_TOWER, num_hidden_layers=2, max_position_embeddings=24, projection_size=128),
    decoder=dict(hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64,
                 initializer_range=0.08, hidden_activation="silu", max_position_embeddings=1024))
# For drawn films: they are many, so none is augmented; more, smaller steps; reports of up to four
# sentences.
PHANTOM = dataclasses.replace(
    TINY, batch_size=32, augment=0.0, text=dict(TINY.text, max_position_embeddings=34))
PRESETS = {"paper": PAPER, "tiny": TINY}

# LoRA on the encoder layers alone: the suffix "out_proj" would also wrap the pooling head's, where
# it has neither effect nor gradient.
ENCODER_LORA = r".*encoder\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|out_proj)"
LLM_LORA = r".*layers\.\d+\.self_attn\.(q_proj|v_proj)"
ANSWER_TOKENS = 160                     # boxes (nine) or a phrase; not stated in the paper


# ---- attention pooling and projection -----------------------------------------------------------

def grid_code(n, width, heads):
    """Sine and cosine code of an n x n grid, the same in every head: (n * n, width).

    A head of h channels holds h / 4 frequencies of x and of y, from half a period over the film to
    one period in four patches of an 8 x 8 grid; equal places have the largest product."""
    n_frequencies = width // heads // 4
    frequency = torch.pi * torch.linspace(0, 2, n_frequencies).exp2()
    place = (torch.arange(n) + 0.5) / n
    y, x = torch.meshgrid(place, place, indexing="ij")
    angle = torch.stack([x, y], -1).view(n * n, 2, 1) * frequency                  # (n * n, 2, h/4)
    code = torch.cat([angle.sin(), angle.cos()], -1).flatten(1)                    # (n * n, h)
    return F.pad(code, (0, width // heads - code.shape[1])).repeat(1, heads)


class AttentionPooling(nn.Module):
    """V learned queries attend to P patches, then a projection to the LLM's width (Sec. 2.0.1).

    The queries start on a grid over the film, and the keys carry the same code, so that each starts
    by looking at its own place (how they start is not stated in the paper)."""

    def __init__(self, width, heads, n_patches, n_queries, llm_width):
        super().__init__()
        self.register_buffer("place", grid_code(round(n_patches ** 0.5), width, heads),
                             persistent=False)
        code = grid_code(int(np.ceil(n_queries ** 0.5)), width, heads)
        chosen = torch.linspace(0, len(code) - 1, n_queries).round().long()
        self.queries = nn.Parameter(2 * code[chosen])
        self.norm_patches = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, llm_width)
        with torch.no_grad():                                  # queries meet keys as they are
            self.attention.in_proj_weight[:2 * width] = torch.eye(width).repeat(2, 1)

    def forward(self, patches):
        patches = self.norm_patches(patches)                                       # (B, P, D_v)
        queries = self.queries.expand(len(patches), -1, -1)                        # (B, V, D_v)
        pooled, _ = self.attention(queries, patches + 2 * self.place, patches, need_weights=False)
        return self.projection(self.norm(pooled))                                  # (B, V, H)


# ---- loading and building the parts -------------------------------------------------------------

@functools.cache
def hub_answers():
    """Is there a model hub within reach? Asked once, for its own loader tries for minutes."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if is_offline_mode():                                      # HF_HUB_OFFLINE=1
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return True                                            # it answered: "no" is an answer
    except (OSError, ValueError):
        return False
    return True


def where_to_look(source):
    """Options of from_pretrained: the hub only for what is no folder, and only if it is there."""
    return {"local_files_only": Path(source).exists() or not hub_answers()}


def load_part(cls, source, **options):
    """cls.from_pretrained(source), or a ModelError of one line if it cannot be had."""
    try:
        return cls.from_pretrained(source, **where_to_look(source), **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{source}: no {cls.__name__} could be loaded ({reason}). Give a local folder, or "
            "accept the model's terms on huggingface.co and run `hf auth login`; train.py's "
            "--random-init and --preset tiny need neither")


def build_encoder(config):
    """E_I and E_T: the pretrained SiglipModel, or one of the same kind with random weights."""
    if config.encoder:
        return load_part(SiglipModel, config.encoder, dtype=torch.float32)
    siglip = SiglipModel(SiglipConfig(vision_config=config.vision, text_config=config.text))
    with torch.no_grad():
        siglip.logit_scale.fill_(math.log(10))                 # t' as SigLIP starts it
        # b = -log(batch): one pair of B is positive; SigLIP's -10: B = 32k
        siglip.logit_bias.fill_(-math.log(config.batch_size))
        place = siglip.vision_model.embeddings.position_embedding.weight
        place.copy_(grid_code(round(len(place) ** 0.5), place.shape[1],
                              config.vision["num_attention_heads"]))
        # the last place, mostly padding, is what is pooled: it starts as a mean of the words
        words = siglip.text_model.embeddings
        words.token_embedding.weight.mul_(3)
        words.token_embedding.weight[config.text["pad_token_id"]].zero_()
        words.position_embedding.weight.mul_(0.2)
    return siglip


def build_llm(config):
    """The pretrained Gemma 3 text model, or one of the same kind with random weights."""
    if config.llm:
        return load_part(Gemma3ForCausalLM, config.llm, dtype=torch.float32)
    return Gemma3ForCausalLM(Gemma3TextConfig(**config.decoder))


def find_tokenizer(source):
    """The tokenizer of a model id or folder; None if there is no source or it has no tokenizer."""
    if not source:
        return None
    options = where_to_look(source)
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except ImportError:                                        # SigLIP 1 names a class that wants
        return PreTrainedTokenizerFast.from_pretrained(source, **options)      # another package
    except (OSError, ValueError, KeyError):
        return None


def build_tokenizers(config, texts):
    """-> (text tokenizer, LLM tokenizer, config with the vocabulary sizes filled in).

    Each comes with its pretrained part; where one is missing, a byte-level BPE is learned from the
    texts, and said so."""
    text_tokenizer, llm_tokenizer = find_tokenizer(config.encoder), find_tokenizer(config.llm)
    if text_tokenizer and llm_tokenizer:
        return text_tokenizer, llm_tokenizer, config
    most = config.vocab_size
    if config.encoder and not text_tokenizer:
        most = min(most, load_part(SiglipConfig, config.encoder).text_config.vocab_size)
        print(f"{config.encoder} has no tokenizer, so its text tower cannot read as it was trained "
              "to: ", end="")
    learned = data.learn_tokenizer(texts, most)
    if len(learned) > most:
        raise ModelError(f"{config.encoder}: {most} text tokens are too few for the 260 of a "
                         "byte-level tokenizer")
    print(f"learned a byte-level BPE tokenizer of {len(learned):,} tokens from the training split")
    sizes = {"vocab_size": len(learned)}
    special = dict(bos_token_id=learned.bos_token_id, eos_token_id=learned.eos_token_id,
                   pad_token_id=learned.pad_token_id)
    return text_tokenizer or learned, llm_tokenizer or learned, dataclasses.replace(
        config, text={**sizes, **config.text, **special},
        decoder={**sizes, **config.decoder, **special})


def add_lora(part, rank, alpha, target_modules):
    """Freeze a part and wrap the named layers in LoRA; rank 0 leaves it whole and trainable."""
    if not rank:
        return part
    with warnings.catch_warnings():                            # peft asks by a name of older days
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(part, LoraConfig(r=rank, lora_alpha=alpha,
                                               target_modules=target_modules))


# ---- LoFi ---------------------------------------------------------------------------------------

class LoFi(nn.Module):
    """E_I, E_T, the attention pooling and the LLM. One forward path serves training and use."""

    def __init__(self, config, siglip, llm, text_tokenizer, llm_tokenizer):
        super().__init__()
        self.config, self.text_tokenizer, self.llm_tokenizer = config, text_tokenizer, llm_tokenizer
        vision, text = siglip.config.vision_config, siglip.config.text_config
        self.image_size, self.text_length = vision.image_size, text.max_position_embeddings
        n_patches = (vision.image_size // vision.patch_size) ** 2
        self.siglip = add_lora(siglip, config.lora_rank, config.lora_alpha, ENCODER_LORA)
        self.llm = add_lora(llm, config.llm_lora_rank, config.llm_lora_alpha, LLM_LORA)
        self.pooling = AttentionPooling(vision.hidden_size, vision.num_attention_heads, n_patches,
                                        config.n_queries, llm.config.hidden_size)
        for parameter in (siglip.logit_scale, siglip.logit_bias):
            parameter.requires_grad_(True)

    @classmethod
    def build(cls, config, texts=()):
        """A model to train; texts: what a missing tokenizer is learned from. Raises ModelError."""
        text_tokenizer, llm_tokenizer, config = build_tokenizers(config, texts)
        return cls(config, build_encoder(config), build_llm(config), text_tokenizer, llm_tokenizer)

    @property
    def device(self):
        return self.pooling.queries.device

    def compile_layers(self):
        """torch.compile the layers of towers and LLM, one at a time: equal ones share the work."""
        for layer in (*self.siglip.vision_model.encoder.layers,
                      *self.siglip.text_model.encoder.layers, *self.llm.get_decoder().layers):
            layer.compile()

    def checkpoint_layers(self):
        """Recompute activations in the backward pass: less memory, about a third slower."""
        for part in (self.siglip, self.llm):
            part.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False})

    # ---- encoders -------------------------------------------------------------------------------

    def films(self, images):
        """A path, a PIL image, or a list of them -> (B, S, S) uint8; a tensor is left as it is."""
        if isinstance(images, torch.Tensor):
            return images.to(self.device)
        images = images if isinstance(images, (list, tuple)) else [images]
        films = [np.array(data.load_image(image, self.image_size)) for image in images]
        return torch.from_numpy(np.stack(films)).to(self.device)

    def encode_image(self, images, with_patches=False):
        """E_I: images (B, S, S) uint8, or paths, or PIL images -> (B, D) of unit length.

        with_patches: also the patch tokens (B, P, D_v) that the attention pooling takes."""
        pixels = self.films(images)[:, None].expand(-1, 3, -1, -1) / 127.5 - 1     # (B, 3, S, S)
        out = self.siglip.get_image_features(pixel_values=pixels)
        image_emb = F.normalize(out.pooler_output.float(), dim=-1)
        return (image_emb, out.last_hidden_state) if with_patches else image_emb

    def encode_text(self, texts):
        """E_T: texts (a list, or (B, T) ids) -> (B, D) of unit length."""
        if not isinstance(texts, torch.Tensor):
            texts = data.text_ids(self.text_tokenizer, texts, self.text_length)
        out = self.siglip.get_text_features(input_ids=texts.to(self.device))
        return F.normalize(out.pooler_output.float(), dim=-1)

    def visual_tokens(self, patches):
        """Patch tokens (B, P, D_v) -> visual tokens (B, V, H): attention pooling and projection."""
        return self.pooling(patches)

    # ---- language model -------------------------------------------------------------------------

    def embed(self, visual, ids):
        """<bos>, visual tokens (R, V, H), then the ids (R, L) -> (R, 1 + V + L, H)."""
        # the table scales by sqrt(H); visual tokens do not pass it
        table = self.llm.get_input_embeddings()
        bos = torch.full((len(ids), 1), self.llm_tokenizer.bos_token_id, device=ids.device)
        return torch.cat([table(bos), visual, table(ids)], 1)

    def target_states(self, visual, ids, is_target):
        """The LLM's states that predict the targets: visual (R, V, H), ids and is_target (R, L)
        -> (N, H). The loss asks its head for the vocabulary at these alone.

        Rows are padded on the right and the mask is causal, so no target sees padding. Rows of any
        task share this one pass."""
        decoder = self.llm.get_decoder()
        hidden = decoder(inputs_embeds=self.embed(visual, ids), use_cache=False).last_hidden_state
        hidden = hidden[:, visual.shape[1]:-1]                 # position before each id  (R, L, H)
        return hidden[is_target]

    def forward(self, batch):
        """A batch of data.Collate -> image_emb (B, D), text_emb (B, D), target states (N, H).

        text_emb is None without the sigmoid objective, the states where no row asks the LLM."""
        image_emb, patches = self.encode_image(batch["image"], with_patches=True)
        text_emb = self.encode_text(batch["text"]) if "text" in batch else None
        if not len(batch["ids"]):
            return image_emb, text_emb, None
        visual = self.visual_tokens(patches)[batch["image_of_row"]]                # (R, V, H)
        return image_emb, text_emb, self.target_states(visual, batch["ids"], batch["is_target"])

    @torch.inference_mode()
    def generate(self, visual, prompts, max_new_tokens=256):
        """Greedy, batched, KV-cached: visual (R, V, H) and R prompts -> R texts."""
        tokens = [data.prompt_ids(self.llm_tokenizer, prompt) for prompt in prompts]
        length = max(map(len, tokens))
        ids = torch.full((len(tokens), length), self.llm_tokenizer.pad_token_id,
                         device=visual.device)
        for row, prompt in zip(ids, tokens):
            row[:len(prompt)] = torch.tensor(prompt)
        embeds = self.embed(visual, ids)
        padding = [length - len(prompt) for prompt in tokens]  # moved left, where it is masked
        embeds = torch.stack([row.roll(n, 0) for row, n in zip(embeds, padding)])
        mask = torch.arange(embeds.shape[1], device=visual.device) >= torch.tensor(
            padding, device=visual.device)[:, None]
        out = self.llm.generate(inputs_embeds=embeds, attention_mask=mask.long(), do_sample=False,
                                top_k=None, top_p=None, max_new_tokens=max_new_tokens,
                                eos_token_id=self.llm_tokenizer.eos_token_id,
                                pad_token_id=self.llm_tokenizer.pad_token_id)
        return self.llm_tokenizer.batch_decode(out, skip_special_tokens=True)

    def ask(self, image, prompts, max_new_tokens=256):
        """Answers to several prompts on one image, which passes the vision tower once."""
        with torch.inference_mode():
            visual = self.visual_tokens(self.encode_image(image, with_patches=True)[1])
            return self.generate(visual.expand(len(prompts), -1, -1), prompts, max_new_tokens)

    def report(self, image):
        """An image -> its report (Eq. 2)."""
        return self.ask(image, [data.CAPTIONING_PROMPT])[0]

    def ground(self, image, phrases):
        """An image and phrases -> the boxes of each (Eq. 3); none where the answer is malformed."""
        prompts = [data.GROUNDING_PROMPT.format(phrase=phrase) for phrase in phrases]
        return [data.text_to_boxes(answer)[0]
                for answer in self.ask(image, prompts, ANSWER_TOKENS)]

    def describe(self, image, boxes):
        """An image and boxes -> the sentence about that region (dense captioning)."""
        prompt = data.DENSE_CAPTIONING_PROMPT.format(boxes=data.boxes_to_text(boxes))
        return self.ask(image, [prompt], ANSWER_TOKENS)[0]

    @torch.inference_mode()
    def heat_map(self, image, phrases):
        """An image and n phrases -> (n, g, g): cosine of each phrase with each patch of the film.

        The encoder's pooling head is shown one patch at a time; not in the paper."""
        patches = self.encode_image(image, with_patches=True)[1][0]                # (P, D_v)
        patch_emb = F.normalize(self.siglip.vision_model.head(patches[:, None]).float(), dim=-1)
        side = round(len(patches) ** 0.5)
        return (self.encode_text(phrases) @ patch_emb.T).view(-1, side, side)

    # ---- files ----------------------------------------------------------------------------------

    def saved_state(self):
        """What a run keeps: the tensors that train, and all of a part not loaded from elsewhere."""
        parts = ("siglip.", self.config.encoder), ("llm.", self.config.llm)
        made = [name for name, source in parts if not source]
        trains = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: tensor.detach().cpu().contiguous()
                for name, tensor in self.state_dict().items()
                if name in trains or name.startswith(tuple(made)) and "lm_head" not in name}

    def save_pretrained(self, folder):
        """Write tokenizer/, model.safetensors and config.json, files to a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        drafts = folder / "tokenizer.tmp"
        try:
            self.llm_tokenizer.save_pretrained(drafts)
            self.text_tokenizer.save_pretrained(drafts / "text")
            (folder / "tokenizer" / "text").mkdir(parents=True, exist_ok=True)
            for draft in [path for path in drafts.rglob("*") if path.is_file()]:
                os.replace(draft, folder / "tokenizer" / draft.relative_to(drafts))
        finally:
            shutil.rmtree(drafts, ignore_errors=True)
        data.write_whole(folder / "model.safetensors", lambda draft: safe_save_file(
            self.saved_state(), draft, metadata={"format": "pt"}))
        data.write_json(folder / "config.json", dataclasses.asdict(self.config))

    @classmethod
    def from_pretrained(cls, folder, device="cpu"):
        """Read what save_pretrained wrote. Raises ModelError if it is not a run, or is damaged."""
        folder = Path(folder)
        config = read_config(folder)
        tokenizers = [find_tokenizer(folder / "tokenizer" / "text"),
                      find_tokenizer(folder / "tokenizer")]
        if any(t is None or None in (t.eos_token_id, t.pad_token_id) for t in tokenizers):
            raise ModelError(f"{folder}/tokenizer: no tokenizer to be read there; "
                             "the run is incomplete")
        try:
            model = cls(config, build_encoder(config), build_llm(config), *tokenizers)
        except ModelError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise ModelError(f"{folder}/config.json: no model can be built of it ({error!r}); "
                             "was it edited?")
        try:
            state = load_safetensors(str(folder / "model.safetensors"))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder}/model.safetensors: cannot be read "
                             f"({str(error).splitlines()[0]})")
        wanted = model.saved_state()
        wrong = [name for name in wanted.keys() | state.keys()
                 if name not in state or name not in wanted
                 or state[name].shape != wanted[name].shape]
        if wrong:
            raise ModelError(
                f"{folder}/model.safetensors: {len(wrong)} tensors do not fit config.json, "
                f"{min(wrong)} for one; it is a checkpoint of another model")
        model.load_state_dict(state, strict=False)
        return model.to(device).eval()


def read_config(folder):
    """config.json of a run folder -> Config. Raises ModelError."""
    try:
        config = Config(**json.loads((Path(folder) / "config.json").read_text()))
    except (OSError, TypeError, ValueError):
        raise ModelError(f"{folder}: not a run folder of train.py (no config.json of ours in it)")
    for name, usual in dataclasses.asdict(PAPER).items():
        value = getattr(config, name)
        if isinstance(usual, (int, float)) and not isinstance(value, (int, float, type(None))):
            raise ModelError(f"{folder}/config.json: {name} is {value!r}, wanted a number")
    return config


def export(run, out):
    """Merge LoRA into a plain SiglipModel folder, which transformers loads without this code."""
    from transformers import SiglipImageProcessor              # speaks of torchvision as it loads
    model = LoFi.from_pretrained(run)
    siglip = model.siglip.merge_and_unload() if model.config.lora_rank else model.siglip
    out = Path(out)
    if out.exists():
        raise ModelError(f"{out}: exists already; name a new folder")
    draft = out.with_name(out.name + ".tmp")
    shutil.rmtree(draft, ignore_errors=True)
    siglip.save_pretrained(draft)
    model.text_tokenizer.save_pretrained(draft)
    size = {"height": model.image_size, "width": model.image_size}
    SiglipImageProcessor(size=size).save_pretrained(draft)
    draft.rename(out)


def answer(args):
    """What a trained LoFi says about one film, as JSON: to phrases, to a box, or its report."""
    model = LoFi.from_pretrained(args.run)
    if args.box:
        if problem := data.box_problem(args.box):
            raise ModelError(f"--box {args.box}: {problem}")
        return {"boxes": [args.box], "sentence": model.describe(args.image, [args.box])}
    if not args.phrase:
        return {"report": model.report(args.image)}
    return [{"phrase": phrase, "boxes": boxes,
             "sentence": model.describe(args.image, boxes) if boxes else ""}
            for phrase, boxes in zip(args.phrase, model.ground(args.image, args.phrase))]


def main():
    parser = argparse.ArgumentParser(
        prog="model.py", description="Ask a trained LoFi about a film, or export its encoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help=export.__doc__.splitlines()[0])
    command.add_argument("run", help="run folder of train.py")
    command.add_argument("out", help="folder to write: SiglipModel, tokenizer and image processor")
    command = commands.add_parser(
        "ask", help="JSON on stdout: the report of a film; with --phrase, the boxes of each phrase "
        "and the sentence for them; with --box, the sentence about that region")
    command.add_argument("run", help="run folder of train.py")
    command.add_argument("image", help="a chest X-ray")
    one = command.add_mutually_exclusive_group()
    one.add_argument("--phrase", nargs="+", metavar="WORDS",
                     help="findings to look for, each a sentence (Eq. 3)")
    one.add_argument("--box", nargs=4, type=float, metavar=("X0", "Y0", "X1", "Y1"),
                     help="a region, as fractions of width and height (dense captioning)")
    args = parser.parse_args()
    try:
        if args.command == "ask":
            print(json.dumps(answer(args)))
            return
        export(args.run, args.out)
    except (ModelError, data.DataError) as error:
        sys.exit(f"model.py: {error}")
    print(f"wrote {args.out}; load it with transformers.SiglipModel.from_pretrained({args.out!r})")


if __name__ == "__main__":
    main()
