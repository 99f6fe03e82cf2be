"""Named model shapes for `random:<shape>`: the published sizes of real models, and tiny ones for tests.

A shape is a transformers configuration without weights. It measures speed and correctness, never language.
"""

from transformers import AutoConfig, PretrainedConfig


def _rope(theta: float) -> dict[str, dict]:
    """Rotary embedding with this base, as configurations of transformers 5 spell it."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_TINY = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_TINY_GEMMA = _TINY | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}

# Sizes as published in each model's config.json.
_SHAPES: dict[str, tuple[str, dict]] = {
    "tiny-llama": ("llama", _TINY),
    "tiny-mistral": ("mistral", _TINY | {"sliding_window": 16}),
    "tiny-qwen2": ("qwen2", _TINY),
    "tiny-qwen3": ("qwen3", _TINY | {"head_dim": 16}),
    "tiny-gemma2": ("gemma2", _TINY_GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "tiny-gemma3": ("gemma3_text", _TINY_GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "tiny-phi3": ("phi3", _TINY),
    "tiny-olmo2": ("olmo2", _TINY),
    "tiny-gpt2": ("gpt2", {"vocab_size": 4096, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024,
                           "bos_token_id": 0, "eos_token_id": 0}),
    "tiny-neox": ("gpt_neox", {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128,
                               "num_hidden_layers": 4, "num_attention_heads": 4, "max_position_embeddings": 2048,
                               "bos_token_id": 0, "eos_token_id": 0}),
    "llama-40m": ("llama", _TINY | {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1408,
                                    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8}),
    "qwen2.5-0.5b": ("qwen2", {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
                               "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
                               "max_position_embeddings": 32768, **_rope(1e6), "tie_word_embeddings": True}),
    "qwen2.5-1.5b": ("qwen2", {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960,
                               "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
                               "max_position_embeddings": 32768, **_rope(1e6), "tie_word_embeddings": True}),
    "qwen2.5-7b": ("qwen2", {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
                             "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                             "max_position_embeddings": 32768, **_rope(1e6)}),
    "llama-3.2-1b": ("llama", {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                               "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                               "max_position_embeddings": 131072, **_rope(5e5), "tie_word_embeddings": True}),
    "llama-3.1-8b": ("llama", {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
                               "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                               "max_position_embeddings": 131072, **_rope(5e5)}),
    "gemma-2-2b": ("gemma2", {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
                              "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                              "head_dim": 256, "max_position_embeddings": 8192}),
    "gpt2": ("gpt2", {}),
    "pythia-410m": ("gpt_neox", {"vocab_size": 50304, "hidden_size": 1024, "intermediate_size": 4096,
                                 "num_hidden_layers": 24, "num_attention_heads": 16,
                                 "max_position_embeddings": 2048}),
}  # fmt: skip

NAMES = tuple(_SHAPES)


def config_of(shape: str) -> PretrainedConfig:
    """The configuration of a named shape. Raises KeyError for a name not in `NAMES`."""
    model_type, values = _SHAPES[shape]
    return AutoConfig.for_model(model_type, **values)
