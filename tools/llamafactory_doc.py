"""Generates the table of LLaMA-Factory's keys in docs/llamafactory.md.

``python -m tools.llamafactory_doc FILE`` writes it into the file, between its markers.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path

from finetune.arguments.llamafactory_table import KeyRow, other_defaults, rows

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_RULES = {
    "method": "`--use_lora`, `--tune_llm`, `--tune_vision`, `--tune_resampler`, `--lora_parts`, `--tune_llm_layers`",
    "adapter": "`--lora_weight_path`; in export `--adapter_name_or_path`",
    "attention": "`--attn_implementation`: auto is the default, fa2 flash_attention_2, sdpa sdpa, disabled eager",
    "checkpointing": "`--gradient_checkpointing`, its opposite",
    "alpha": "`--lora_alpha`",
    "targets": "`--lora_target_modules`; all is all-linear",
    "quantization": "`--q_lora true` for 4; other numbers are refused",
    "history": "`--train_on last` for true",
    "neat_packing": "`--packing best_fit` for true",
    "preference": "the flag of that name; `stage` is sft or dpo, other values are refused",
    "shuffling": "`--train_sampling_strategy sequential` for true",
}


def table() -> str:
    """The sections, each a table with key, default there and what becomes of the key here."""
    parts = []
    for section, entries in groupby(rows().values(), key=lambda row: row.section):
        lines = [f"| `{row.key}` | {_default(row)} | {_fate(row)} |" for row in entries]
        parts.append("\n".join([f"**{section}**", "", "| key | default there | here |", "|---|---|---|", *lines]))
    others = ", ".join(f"`{key}` {value}" for key, value in other_defaults().items())
    parts.append(f"**Flags of transformers** are the same; of these the default there is another than ours: {others}.")
    return "\n\n".join(parts)


def _default(row: KeyRow) -> str:
    return "" if row.default is None else row.default if isinstance(row.default, str) else json.dumps(row.default)


def _fate(row: KeyRow) -> str:
    if row.flag is not None:
        kept = f"; without it {row.ours}" if row.ours else ""
        return f"`--{row.flag}`{' of export' if row.only_export else ''}{kept}"
    if row.rule is not None:
        return _RULES[row.rule]
    if row.no_effect is not None:
        return f"no effect: {row.no_effect}"
    return f"other values are refused: {row.instead}"


def insert(text: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(insert(page.read_text(encoding="utf-8")), encoding="utf-8")
