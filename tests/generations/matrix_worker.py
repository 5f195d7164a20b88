"""Trains every given family in every way through finetune.py (``train``), or loads every result anew (``reload``).

One process does all of it, as starting one costs more than two steps of a tiny model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import io
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from packed_folders import write_packed  # noqa: E402
from variants import MIXTURE, family_name  # noqa: E402

from finetune.families import by_name  # noqa: E402

KINDS = {"full": (), "lora": ("--use_lora", "true", "--lora_r", "4", "--learning_rate", "1e-2")}
# Adapters on the experts of a mixture too.
EXPERTS = ["--lora_target_parameters", "experts.gate_up_proj,experts.down_proj", "--lora_dropout", "0"]
DATA = ("text", "image", "several")
# Kinds of data that some families take; with sound the audio tower is trained too.
MORE = {
    "audio": lambda family: by_name(family).audio_spec is not None,
    "video": lambda family: by_name(family).video is not None,
}
FLAGS_OF = {
    ("full", "audio"): ("--tune_audio", "true"),
    ("lora", "audio"): ("--lora_parts", "llm", "audio"),
    # Frames that share their placeholders, for the family that packs them.
    ("full", "video"): ("--video_packing", "2"),
}
# Recipes that no family of its own has, and the family that each is for.
EXAMPLES = {
    "full": "v2_6",
    "qlora": "llama3_v2_5",
    "three_24gb": "v2_0",
    "multi_node": "v4_5",
    "guicourse": "v2_0",
    "dpo": "v2_6",
    "duplex": "o4_5",
}
# Their data, where a conversation with an image would not do.
DATA_OF_EXAMPLES = {"dpo": "columns", "duplex": "timelines"}
# The report has the answers before and after.
FLAGS_OF_EXAMPLES = {"dpo": ("--eval_generate", "2", "--eval_on_start", "true")}
FLAGS = (
    "--max_steps 2 --per_device_train_batch_size 2 --save_strategy no --report_to none --disable_tqdm true "
    "--dataloader_num_workers 0 --max_slice_nums 4 --learning_rate 1e-3 --check off --do_eval true --use_cpu true"
)


# Preference training: on pairs of answers, with adapters everywhere and in full for one of each kind of network.
PAIRS = "pairs"
PREFERENCE = {"dpo": (*KINDS["lora"], "--stage", "dpo"), "dpofull": ("--stage", "dpo")}
IN_FULL = ("llama3_v2_5", "o2_6", "v4_6")


def kinds_of(variant: str) -> dict[str, tuple[str, ...]]:
    """The ways in which a checkpoint is trained."""
    pairs = {kind: flags for kind, flags in PREFERENCE.items() if kind == "dpo" or variant in IN_FULL}
    own = {"experts": (*KINDS["lora"], *EXPERTS)} if variant == MIXTURE else {"int4": KINDS["lora"]}
    return {**KINDS, **own, **pairs}


def data_of(variant: str, kind: str) -> tuple[str, ...]:
    """The kinds of data that it is trained on; a mixture, and a folder in 4 bit, see them as the other one does."""
    if kind in PREFERENCE:
        return (PAIRS,)
    if variant == MIXTURE or kind == "int4":
        return ("image",)
    family = variant
    return (*DATA, *(records for records, taken in MORE.items() if taken(family)))


def train(families: list[str], models: Path, data: Path, out: Path) -> None:
    """Runs finetune.py's main per family, way of training and data; writes runs.json with the last line of each."""
    spec = importlib.util.spec_from_file_location("launched", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    launched = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launched)
    from finetune.checkpoints import verification
    from finetune.evaluation import progress_files

    # tests/evaluation/ looks at plots; here they would be a third of the time.
    progress_files.plot_training_curves = lambda *_: None
    references: list[Path] = []
    # Its process is the one that reloads everything.
    verification.verify_in_fresh_process = lambda _, reference, verifier: references.append(reference) or 0
    runs, examples = {}, {}
    for family in families:
        for kind, chosen in kinds_of(family).items():
            stored = models / family
            if kind == "int4":
                stored = write_packed(stored, out / f"{family}_int4")
            for records in data_of(family, kind):
                name = f"{family}-{kind}-{records}"
                argv = ["--model_name_or_path", str(stored), "--output_dir", str(out / name)]
                argv += [
                    "--data_path",
                    str(data / f"{records}.json"),
                    "--eval_data_path",
                    str(data / f"{records}.json"),
                ]
                if (kind, records) == ("lora", "image"):
                    recipe = ROOT / "examples" / "lora" / f"{family_name(family)}.yaml"
                    argv = [str(recipe), *argv, "--deepspeed", "none"]
                result = run(launched, [*argv, *FLAGS.split(), *chosen, *FLAGS_OF.get((kind, records), ())])
                runs[name] = {"result": result, "reference": str(references[-1])}
                (out / "runs.json").write_text(json.dumps(runs))
    for name, family in EXAMPLES.items():
        argv = [str(ROOT / "examples" / f"{name}.yaml"), "--model_name_or_path", str(models / family)]
        records = str(data / f"{DATA_OF_EXAMPLES.get(name, 'image')}.json")
        argv += ["--data_path", records, "--eval_data_path", records]
        argv += ["--output_dir", str(out / name), "--deepspeed", "none", "--verify_adapter", "off", *FLAGS.split()]
        examples[name] = run(launched, [*argv, "--max_steps", "1", *FLAGS_OF_EXAMPLES.get(name, ())])
        (out / "examples.json").write_text(json.dumps(examples))


def run(launched: ModuleType, argv: list[str]) -> dict[str, Any]:
    """The last line of a run through finetune.py's main."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = launched.main(argv)
    assert status == 0, (argv, said.getvalue())
    gc.collect()
    gc.freeze()  # what is left are modules; the next search need not go through them
    return json.loads(said.getvalue().splitlines()[-1].removeprefix("result="))


def reload(models: Path, data: Path, out: Path) -> None:
    """Loads every result, compares logits with the trained network's and generates; writes reloaded.json."""
    from chat import MiniCPMVChat, img2base64
    from finetune.checkpoints.base_checkpoint import resolve_base
    from finetune.commands import verify
    from finetune.encoding.encoder import Encoder
    from finetune.evaluation.batched_generation import generate_answers, split_answer
    from finetune.models import load_model, load_tokenizer
    from finetune.readers import read

    found = {}
    for name, run in json.loads((out / "runs.json").read_text()).items():
        family, _, records = name.split("-")
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            status = verify.main([str(out / name), "--reference", run["reference"], "--device", "cpu"])
        base = resolve_base(str(models / family))
        model, tokenizer = load_model(out / name).eval(), load_tokenizer(out / name)
        encoder = Encoder(base.family, tokenizer, base.settings, max_slice_nums=4)
        file = data / f"{records}.json"
        prompts = [split_answer(sample)[0] for sample in read(file, pairs=records == PAIRS)][:2]
        answers = generate_answers(model, tokenizer, encoder, prompts, max_new_tokens=4)  # pyright: ignore[reportArgumentType]
        found[name] = {"status": status, "said": said.getvalue(), "answers": answers}
        if records == "image":
            question = json.dumps([{"role": "user", "content": "Which number?"}])
            asked = {"image": img2base64(str(data / "0.png")), "question": question}
            found[name]["chat"] = MiniCPMVChat(str(out / name)).chat(asked, max_new_tokens=4)
        (out / "reloaded.json").write_text(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["train", "reload"])
    parser.add_argument("--models", type=Path, required=True, help="folder with a checkpoint per family")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--families", nargs="*", default=[])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.action == "train":
        train(given.families, given.models, given.data, given.out)
    else:
        reload(given.models, given.data, given.out)
