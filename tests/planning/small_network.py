"""Configurations of small models, with which a step on the CPU takes a second."""

from finetune.families import by_name

SMALL = {
    **by_name("v4_5").published.config,
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "query_num": 16,
    "vocab_size": 2000,
    "vision_config": {
        **by_name("v4_5").published.config["vision_config"],
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
}

# Its language model is a mixture: every token goes through 2 of 8 experts and the shared one.
SMALL_MIXTURE = {
    **by_name("v4_7").published.config,
    "image_token_id": 5,
    "insert_layer_id": 1,
    "text_config": {
        **by_name("v4_7").published.config["text_config"],
        "head_dim": 32,
        "hidden_size": 256,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 128,
        "num_attention_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            **by_name("v4_7").published.config["text_config"]["rope_parameters"],
            "mrope_section": [2, 1, 1],
        },
        "shared_expert_intermediate_size": 128,
        "tie_word_embeddings": False,
        "vocab_size": 2000,
    },
    "tie_word_embeddings": False,
    "vision_config": {
        **by_name("v4_7").published.config["vision_config"],
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
}
