"""config.json, params.json and the processor files of a toy checkpoint, key for key as the releases have them."""

import json

from tests.harness.toy_layout import IMG, IMG_BREAK, IMG_END, MERGE, PATCH_PX, PIXEL_MEAN, PIXEL_STD


def write_json(path, data):
    """Without an indent, which makes Python's encoder ten times slower."""
    path.write_text(json.dumps(data, ensure_ascii=False) + "\n", encoding="utf-8")


def config(s):
    """config.json, key for key as the releases have it."""
    config = {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": IMG,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": MERGE,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": s["head_dim"],
            "hidden_act": "silu",
            "hidden_size": s["hidden"],
            "initializer_range": 0.02,
            "intermediate_size": s["ffn"],
            "max_position_embeddings": 16 * s["original_context"],
            "model_type": "ministral3",
            "num_attention_heads": s["heads"],
            "num_hidden_layers": s["layers"],
            "num_key_value_heads": s["kv_heads"],
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": s["original_context"],
                "rope_theta": s["rope_theta"],
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": s["tied"],
            "use_cache": True,
            "vocab_size": s["vocab"],
        },
        "tie_word_embeddings": s["tied"],
        "transformers_version": "5.0.0.dev0",
        "vision_config": {
            "attention_dropout": 0.0,
            "head_dim": s["vision_hidden"] // s["vision_heads"],
            "hidden_act": "silu",
            "hidden_size": s["vision_hidden"],
            "image_size": 1540,
            "initializer_range": 0.02,
            "intermediate_size": s["vision_ffn"],
            "model_type": "pixtral",
            "num_attention_heads": s["vision_heads"],
            "num_channels": 3,
            "num_hidden_layers": s["vision_layers"],
            "patch_size": PATCH_PX,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "vision_feature_layer": -1,
    }
    if s["family"] == "mistral":
        text = config["text_config"] | {"model_type": "mistral", "max_position_embeddings": 131072}
        text["rope_parameters"] = {"rope_theta": s["rope_theta"], "rope_type": "default"}
        config["text_config"] = text
    if not s["vision"]:
        name = {"ministral3": "Ministral3ForCausalLM", "mistral": "MistralForCausalLM"}[s["family"]]
        config = config["text_config"] | {"architectures": [name], "dtype": "bfloat16"}
    if s["dtype"] == "fp8":
        config["quantization_config"] = {
            "activation_scheme": "static",
            "dequantize": False,
            "modules_to_not_convert": ["model.vision_tower", "model.multi_modal_projector", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": None,
        }
    return config


def params(s):
    """params.json, key for key as the releases have it."""
    params = {
        "dim": s["hidden"],
        "n_layers": s["layers"],
        "head_dim": s["head_dim"],
        "hidden_dim": s["ffn"],
        "n_heads": s["heads"],
        "n_kv_heads": s["kv_heads"],
        "norm_eps": 1e-05,
        "rope_theta": s["rope_theta"],
        "tied_embeddings": s["tied"],
        "vocab_size": s["vocab"],
        "max_position_embeddings": 131072,
    }
    if s["family"] == "ministral3":
        yarn = {"alpha": 1.0, "apply_scale": False, "beta": 32.0, "factor": 16.0}
        params |= {
            "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": s["original_context"]},
            "max_position_embeddings": 16 * s["original_context"],
            "yarn": yarn | {"original_max_position_embeddings": s["original_context"]},
        }
    if s["vision"]:
        params["vision_encoder"] = {
            "adapter_bias": False,
            "add_pre_mm_projector_layer_norm": True,
            "hidden_size": s["vision_hidden"],
            "image_break_token_id": IMG_BREAK,
            "image_end_token_id": IMG_END,
            "image_size": 1540,
            "image_token_id": IMG,
            "intermediate_size": s["vision_ffn"],
            "max_image_size": 1540,
            "mm_projector_id": "patch_merge",
            "num_attention_heads": s["vision_heads"],
            "num_channels": 3,
            "num_hidden_layers": s["vision_layers"],
            "patch_size": PATCH_PX,
            "rope_theta": 10000.0,
            "spatial_merge_size": MERGE,
        }
    if s["dtype"] == "fp8":
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return params


def write_processor(folder, context):
    image_processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(PIXEL_MEAN),
        "image_processor_type": "PixtralImageProcessorFast",
        "image_std": list(PIXEL_STD),
        "patch_size": PATCH_PX,
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": 1540},
    }
    write_json(folder / "preprocessor_config.json", image_processor | {"processor_class": "PixtralProcessor"})
    write_json(
        folder / "processor_config.json",
        {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_processor": image_processor,
            "image_token": "[IMG]",
            "patch_size": PATCH_PX,
            "processor_class": "PixtralProcessor",
            "spatial_merge_size": MERGE,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_length": context,
            "pad_token_id": 11,
            "transformers_version": "5.0.0.dev0",
        },
    )
