"""genai_config.json and config.json: what onnxruntime-genai and others are told of a converted model."""

from __future__ import annotations

from typing import Any

from lowtide.models.onnx.convert.decoder_shape import DecoderShape
from lowtide.models.onnx.convert.tokenizer_json import GgufVocabulary


def genai_config(shape: DecoderShape, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of genai_config.json (onnxruntime-genai, "Config reference")."""
    ends = vocabulary.end_ids
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": "model.onnx",
        "head_size": shape.head_size,
        "hidden_size": shape.width,
        "num_attention_heads": shape.num_heads,
        "num_hidden_layers": shape.num_layers,
        "num_key_value_heads": shape.num_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    padding = vocabulary.special("padding")
    first = vocabulary.special("bos")
    return {
        "model": {
            "type": shape.architecture.model_type,
            "bos_token_id": ends[0] if first is None else first,
            "eos_token_id": ends,
            "pad_token_id": ends[0] if padding is None else padding,
            "context_length": shape.context_length,
            "vocab_size": shape.vocabulary,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": shape.context_length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def model_config(shape: DecoderShape, vocabulary: GgufVocabulary) -> dict[str, Any]:
    """Return the content of config.json, in the names that published models have."""
    local = shape.local_rotary
    return {
        "model_type": shape.architecture.model_type,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward_width,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context_length,
        "vocab_size": shape.vocabulary,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary.base,
        **({"rope_local_base_freq": local.base} if local else {}),
        **({"sliding_window": shape.window} if shape.window else {}),
        "bos_token_id": vocabulary.special("bos"),
        "eos_token_id": vocabulary.end_ids,
    }
