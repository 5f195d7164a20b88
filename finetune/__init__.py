"""Finetuning toolkit for the MiniCPM-V and MiniCPM-o model families.

This file is load-bearing: without it, ``import finetune`` inside ``finetune.py`` would find the script itself.
Importing the package is cheap; ``import finetune.models`` registers the network with transformers.
"""

__version__ = "0.1.0"
