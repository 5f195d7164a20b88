"""The commands of ``python -m finetune``, each with a line that says what it does."""

from __future__ import annotations

# A command's module is imported only when it runs, so that the list appears at once.
COMMANDS = {
    "train": "train, on all GPUs here or on two CPU processes: flags, or a YAML file of ours or of LLaMA-Factory",
    "init": "write a folder to start from: train.yaml, data, and a README with the commands",
    "tiny": "write a complete tiny checkpoint folder in the official layout",
    "demo-data": "write a small image dataset with known answers",
    "demo": "train, save, verify and question a tiny model: proof that the installation works",
    "doctor": "is everything here that training needs? what is wrong comes with the line that mends it",
    "check": "look at the records of a data file as training will, and report every problem",
    "plan": "what fits on the card: memory by method, ZeRO stage and batch, before anything is trained",
    "selfcheck": "load a checkpoint and try it out: prompt, caption, loss; the first thing to do with real weights",
    "evaluate": "ask a model the questions of a data file and score its answers",
    "guicourse": "convert the GUICourse data sets, and score predictions as they are scored",
    "chat": "talk to a model in the terminal, with and without its adapters",
    "restore-template": "give a 2.5 checkpoint of the old scripts its inference chat template back",
    "consolidate": "make a model or an adapter of the parts that an interrupted run with ZeRO left",
    "export": "merge adapters into their base: a complete model folder, checked, in shards",
    "completion": "print shell completion of these commands and of all flags of training",
    "verify": "load a saved adapter or model in this process and compare it with its training",
}
