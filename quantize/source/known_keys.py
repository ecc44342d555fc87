"""Configurations are read by allow-list: a key that is set and that nobody here knows is refused by name.

A key that is null, false, zero or empty is not set. Keys that are listed have no effect on the numbers of the model, or
hf_config.py and lora.py read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What transformers writes into any config.json: how text is generated and how the file was made.
WRITTEN_BY_TRANSFORMERS = _names("""
    architectures auto_map dtype model_type name_or_path torch_dtype transformers_version use_cache return_dict
    attention_dropout initializer_range id2label label2id problem_type task_specific_params tokenizer_class
    prefix bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id output_attentions output_hidden_states torchscript finetuning_task max_length min_length
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty num_return_sequences output_scores no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids pretraining_tp
    """)  # fmt: skip
OWN_PREFIXES = ("_", "unsloth")  # notes of a program for itself

ROPE = _names("""
    rope_theta rope_type type factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim
    llama_4_scaling_beta
    """)  # fmt: skip
TEXT = _names("""
    head_dim hidden_act hidden_size intermediate_size max_position_embeddings num_attention_heads
    num_hidden_layers num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
    tie_word_embeddings vocab_size layer_types quantization_config
    """)  # fmt: skip
VISION = _names("""
    head_dim hidden_act hidden_size image_size intermediate_size num_attention_heads num_channels
    num_hidden_layers patch_size rope_parameters rope_theta
    """)  # fmt: skip
OUTER = _names("""
    image_token_index image_token_id multimodal_projector_bias projector_hidden_act spatial_merge_size
    text_config vision_config tie_word_embeddings vision_feature_layer quantization_config
    """)  # fmt: skip
PARAMS = _names("""
    dim n_layers head_dim hidden_dim n_heads n_kv_heads norm_eps rope_theta tied_embeddings vocab_size
    max_position_embeddings max_seq_len yarn llama_4_scaling vision_encoder quantization moe sliding_window
    model_parallel causal dtype
    """)  # fmt: skip
PARAMS_YARN = _names("""
    alpha apply_scale beta factor original_max_position_embeddings
    """)  # fmt: skip
PARAMS_SCALING = _names("""
    beta original_max_position_embeddings
    """)  # fmt: skip
PARAMS_VISION = _names("""
    adapter_bias add_pre_mm_projector_layer_norm hidden_size image_break_token_id image_end_token_id image_size
    image_token_id intermediate_size max_image_size mm_projector_id num_attention_heads num_channels
    num_hidden_layers patch_size rope_theta spatial_merge_size
    """)  # fmt: skip
ADAPTER = _names("""
    alpha_pattern auto_mapping base_model_name_or_path bias eva_config exclude_modules inference_mode
    init_lora_weights layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core peft_type
    peft_version qalora_group_size r rank_pattern revision target_modules task_type use_rslora
    """)  # fmt: skip


def unknown_key(table: dict[str, Any], *known: Iterable[str]) -> str:
    """The first key that is set and not known; "": none."""
    names = {name for part in known for name in part}
    return next((key for key, value in table.items() if value and key not in names and not _is_note(key)), "")


def _is_note(key: str) -> bool:
    return key.startswith(OWN_PREFIXES)
