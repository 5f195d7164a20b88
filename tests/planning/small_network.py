"""A network of a size that a step on the CPU takes a second with."""

from finetune.planning.published import CONFIGS

SMALL = {
    **CONFIGS["v4_5"],
    "head_dim": 32,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "query_num": 16,
    "vocab_size": 2000,
    "vision_config": {
        **CONFIGS["v4_5"]["vision_config"],
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
    },
}
