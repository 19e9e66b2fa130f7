"""A small Gemma 3 for tests and benchmarks: its real classes, special tokens and chat template,
with random weights."""

import string

import torch
from transformers import (Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration,
                          Gemma3ImageProcessorPil, Gemma3Processor, Gemma3TextConfig,
                          GemmaTokenizer)

from icl_ground import INSTRUCTION, QUERY

PHRASES = ["A.", "small left lower zone nodule", "The heart is enlarged; <eos> <start_of_image>",
           "a phrase longer than the sliding window of the small model, with many words that go on "
           "and on, so that the cache of its sliding layers holds nothing of the shared prefix"]

CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}\
{% for item in message['content'] %}\
{% if item['type'] == 'image' %}{{ '<start_of_image>' }}{% else %}{{ item['text'] | trim }}\
{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>",
           "<start_of_image>", "<end_of_image>", "<image_soft_token>"]


def small_processor(image_size=28, tokens=4):
    """Gemma3Processor with a tokenizer of bytes, characters and the words of the prompt."""
    words = f'{INSTRUCTION} {QUERY} left lower zone. [{{"box_2d": [ }}], "label": "'
    pairs = [(word[:i], word[i]) for word in words.replace(" ", " ▁").split()
             for i in range(1, len(word)) if not any(map(str.isdigit, word[:i + 1]))]
    merges = list(dict.fromkeys(pairs))                        # digits stay single, as in Gemma's
    parts = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁\n",
             *string.printable[:94], *(first + last for first, last in merges)]
    tokenizer = GemmaTokenizer(
        vocab={part: i for i, part in enumerate(dict.fromkeys(parts))}, merges=merges,
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                              "image_token": "<image_soft_token>", "turn": "<start_of_turn>",
                              "end_of_turn": "<end_of_turn>"})
    images = Gemma3ImageProcessorPil(size={"height": image_size, "width": image_size})
    return Gemma3Processor(images, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=tokens)


def small_lvlm(processor, vision=None, tied=False, **text):
    """A random Gemma3ForConditionalGeneration; vision, text: its sizes. As the library draws them
    its answers repeat one token and its images count for nothing, so some weights are made larger.
    """
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = Gemma3Config(
        tie_word_embeddings=tied, mm_tokens_per_image=processor.image_seq_length,
        image_token_id=processor.tokenizer.image_token_id,
        text_config={**sizes, "vocab_size": len(processor.tokenizer), "head_dim": 16,
                     "num_key_value_heads": 1, "query_pre_attn_scalar": 16, "sliding_window": 32,
                     "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
                     "bos_token_id": 2, "initializer_range": 0.3, **text},
        vision_config={**sizes, "image_size": processor.image_processor.size["height"],
                       "patch_size": 7, **(vision or {})})
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        if not tied:
            model.lm_head.weight.normal_()
        model.model.multi_modal_projector.mm_input_projection_weight.normal_()
        model.model.language_model.embed_tokens.weight.mul_(0.3)
        for layer in model.model.language_model.layers:
            layer.post_attention_layernorm.weight.fill_(2)
            layer.self_attn.q_norm.weight.fill_(1)
        for weight in model.model.vision_tower.parameters():
            weight.mul_(3)
    return model


def small_text_lvlm(tokenizer, seed=0):
    """A random Gemma3ForCausalLM of the tokenizer's vocabulary, whose answers vary."""
    torch.manual_seed(seed)
    model = Gemma3ForCausalLM(Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16,
        sliding_window=32, layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
        bos_token_id=2, eos_token_id=1, initializer_range=0.3, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        model.lm_head.weight.normal_()
        model.model.embed_tokens.weight.mul_(0.3)
    return model
