"""Tiny stand-ins, built in memory: a byte tokenizer and random models of several families."""

from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.models import attend, shapes
from harness.models.load import LM, Codec, ModelIdentity, assemble

FAMILIES = ("tiny-llama", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma2", "tiny-gemma3", "tiny-phi3",
            "tiny-olmo2", "tiny-gpt2", "tiny-neox")  # fmt: skip
END = "<|end|>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and one that ends a text: every text has exactly one spelling. 257 ids, END is 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def build_model(shape: str, seed: int = 0, sharpness: float = 12.0, dtype: torch.dtype = torch.float32, **overrides):
    """A random model of a tiny shape with 260 ids. `sharpness` is added to its final norm, so that its distributions
    are far from flat (entropy about 4 of 5.6 nats)."""
    config = shapes.config_of(shape)
    for key, value in {"vocab_size": 260, "eos_token_id": 256, "bos_token_id": None, **overrides}.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attend.registered()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("model.norm.weight", "transformer.ln_f.weight", "gpt_neox.final_layer_norm.weight"):
                parameter.add_(sharpness)
            elif parameter.ndim > 1 and (".layers." in name or ".h." in name):
                parameter.mul_(4.0)  # so that attention and MLP matter beside the embedding
    return model.requires_grad_(False)


def identity(name: str, dtype: str = "float32") -> ModelIdentity:
    return ModelIdentity(
        name, "tiny", "0", "0", "0", dtype, None, {"config": {"eos_token_id": 256}, "generation_config": None}
    )


@lru_cache(maxsize=32)
def tiny_lm(shape: str = "tiny-llama", seed: int = 0, sharpness: float = 12.0, dtype: str = "float32") -> LM:
    """A tiny LM over bytes; shared between tests, so never change it."""
    model = build_model(shape, seed, sharpness, getattr(torch, dtype))
    return assemble(model, Codec(byte_tokenizer()), identity(shape, dtype))
