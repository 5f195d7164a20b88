"""Import rules between packages: the table of docs/design.md, enforced by tests/test_layers.py."""

from __future__ import annotations

# Package -> packages it may import, besides itself; the layers of docs/design.md, lowest first. The first entry that
# matches a module applies.
TABLE: dict[str, set[str]] = {
    "__init__": set(),
    "utils": set(),
    "timeline": set(),
    "sample": {"utils", "timeline"},
    # placing records by an installed package
    "duplex_sdk": {"utils", "timeline", "sample"},
    "runtime": {"utils"},
    "media.slicing": set(),
    "media.audio_layout": set(),
    "media.video_sampling": {"utils"},
    "media": {"utils", "sample", "runtime"},
    "arguments": {"utils", "runtime", "media.video_sampling"},
    "data_files": {"utils", "sample"},
    # of media only where Pillow opens an image
    "readers": {"utils", "timeline", "sample", "duplex_sdk", "data_files", "media.image_files"},
    "templates": {"utils", "timeline", "sample", "media.slicing", "media.audio_layout", "media.video_sampling"},
    "families": {"utils", "sample", "media.slicing", "media.audio_layout", "media.video_sampling", "templates"},
    "encoding": {"utils", "timeline", "sample", "media", "templates", "families"},
    "model_folders": {"utils", "timeline", "templates.duplex_fc", "templates.prompt_types", "families"},
    "tokenizers": {"utils", "families", "model_folders", "templates.duplex_fc"},
    "models": {"utils", "runtime", "families", "model_folders", "templates.duplex_fc", "tokenizers"},
    "tiny": {"families", "models"},
    "data_check": {"utils", "sample", "templates", "encoding"},
    "batching": {"utils", "sample", "arguments", "families", "encoding", "data_check"},
    "early_check": {
        *("utils", "sample", "arguments", "families", "templates.turn_order", "model_folders", "data_files", "readers"),
    },
    "launch": {"utils", "runtime", "early_check"},
    "run": {"utils", "arguments.argv", "early_check"},
    "training": {
        *("utils", "sample", "runtime", "media", "arguments", "families", "encoding", "model_folders", "models"),
        "templates.duplex_fc",
    },
    # how pages look, whatever they show
    "pages.long_text": {"utils"},
    "pages.html_page": {"utils", "pages.long_text"},
    "pages.thumbnails": set(),
    "pages.charts": set(),
    "pages": {"utils", "sample", "media", "templates", "encoding", "data_check"},
    "evaluation": {
        *("utils", "sample", "media", "templates", "encoding", "model_folders"),
        *("pages.html_page", "pages.thumbnails", "pages.charts"),
    },
    # only the rules of boxes and words
    "guicourse": {"utils", "sample", "media.image_files", "evaluation.metrics"},
    "checkpoints": {
        *("utils", "runtime", "arguments", "families", "encoding", "model_folders", "models", "training"),
        *("templates.duplex_fc", "templates.prompt_types"),
    },
    "chat": {
        "utils",
        "sample",
        "runtime",
        "media",
        "families",
        "encoding",
        "model_folders",
        "tokenizers",
        "models",
        "evaluation",
        "checkpoints",
    },
    "export": {
        "utils",
        "sample",
        "runtime",
        "templates.duplex_fc",
        "families",
        "encoding",
        "model_folders",
        "tokenizers",
        "models",
        "checkpoints",
    },
    "planning": {
        *("utils", "sample", "runtime", "arguments", "families", "encoding", "model_folders", "models", "training"),
        "checkpoints",
    },
    "commands.command_list": set(),
    "commands": {
        *(
            "utils",
            "timeline",
            "sample",
            "runtime",
            "media",
            "arguments",
            "data_files",
            "readers",
            "families",
            "encoding",
            "models",
        ),
        *("tiny", "data_check", "training", "pages", "evaluation", "guicourse", "checkpoints", "chat", "export"),
        *("launch", "model_folders", "tokenizers", "planning"),
    },
    "__main__": {"utils", "runtime", "commands.command_list"},  # and the requested command, by name
}

# Imports inside functions that violate the table, with the reason.
EXCEPTIONS = {
    # ``model.chat`` is a method of the models, and prompts are written in a higher layer.
    ("models.chat_mixin", "finetune.chat.model_chat.chat"),
}

# Modules that never import these packages, not even inside a function.
TORCH = {"torch", "torchvision", "timm", "deepspeed", "accelerate", "peft"}
WITHOUT: dict[str, set[str]] = {
    "__init__": TORCH | {"transformers"},
    "__main__": TORCH | {"transformers"},
    "utils": TORCH | {"transformers"},
    "timeline": TORCH | {"transformers"},
    "sample": TORCH | {"transformers"},
    "early_check": TORCH | {"transformers"},
    "runtime.out_of_memory": TORCH | {"transformers"},
    "run": TORCH | {"transformers"},
    "runtime.outcome": TORCH | {"transformers"},
    "runtime.processes": TORCH | {"transformers"},
    "runtime.signals": TORCH | {"transformers"},
    "arguments.data": TORCH | {"transformers"},
    "arguments.early_flags": TORCH | {"transformers"},
    "arguments.flag_rules": TORCH | {"transformers"},
    "arguments.flag_names": TORCH | {"transformers"},
    "arguments.model": TORCH | {"transformers"},
    "arguments.legacy": TORCH | {"transformers"},
    "arguments.argv": TORCH | {"transformers"},
    "arguments.resolve": TORCH | {"transformers"},
    "arguments.ranges": TORCH | {"transformers"},
    "arguments.llamafactory": TORCH | {"transformers"},
    "arguments.llamafactory_table": TORCH | {"transformers"},
    # deepspeed only inside a function: its own reading of a configuration
    "arguments.deepspeed": (TORCH | {"transformers"}) - {"deepspeed"},
    "arguments": TORCH - {"deepspeed"},
    "families": TORCH | {"transformers"},
    "templates": TORCH,
    "model_folders": TORCH,
    "data_files": TORCH | {"transformers"},
    "readers": TORCH | {"transformers"},
    "guicourse": TORCH | {"transformers"},
    "media.audio_layout": TORCH | {"transformers", "numpy", "PIL"},
    "media.video_sampling": TORCH | {"transformers", "numpy", "PIL"},
    "media.slicing": TORCH | {"transformers", "numpy", "PIL"},
    "media.video": TORCH | {"transformers"},
    "encoding": TORCH - {"torch"},
    "models": {"deepspeed", "accelerate", "PIL"},
}
