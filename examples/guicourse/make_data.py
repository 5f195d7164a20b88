"""Writes made-up GUICourse files in the published form (JSON, and Parquet with the screenshots) into a folder.

The screens are drawn: coloured buttons with words on them, so every answer is known.
"""

from __future__ import annotations

import base64
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw
from pyarrow import parquet

WIDTH, HEIGHT = 168, 112
WORDS = ("Home", "Login", "Search", "Cart", "Help", "News", "Save", "Next")
COLOURS = ("#aa3333", "#338833", "#3355aa", "#996600")

Screen = tuple[str, Image.Image, list[dict[str, Any]]]


def draw(rng: random.Random, name: str) -> Screen:
    """A screen of four buttons, and its page elements."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    elements = []
    for number, word in enumerate(rng.sample(WORDS, 4)):
        left, top = 8 + 80 * (number % 2), 8 + 52 * (number // 2)
        right, bottom = left + rng.randint(50, 70), top + rng.randint(24, 40)
        pen.rectangle((left, top, right, bottom), fill=COLOURS[number])
        pen.text((left + 6, top + 6), word, fill="white")
        rect = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        rect |= {"left": left, "top": top, "right": right, "bottom": bottom}
        elements.append({"uid": number, "rect": rect, "text": word})
    return name, image, elements


def marked(name: str, *values: int) -> dict[str, str]:
    """Coordinates x, y, x, y, ... in both published forms."""
    shares = [f"{value / (WIDTH, HEIGHT)[axis % 2]:.3f}" for axis, value in enumerate(values)]
    return {
        "absolute": f"<{name}>{', '.join(map(str, values))}</{name}>",
        "related": f"<{name}>{', '.join(shares)}</{name}>",
    }


def corners(element: dict[str, Any]) -> list[int]:
    """Left, top, right, bottom in pixels."""
    return [element["rect"][side] for side in ("left", "top", "right", "bottom")]


def environment(screen: Screen, element: dict[str, Any]) -> list[dict[str, Any]]:
    """Two records of GUIEnv."""
    name, box = screen[0], marked("box", *corners(element))
    common = {"image_id": name, "image_size": {"width": WIDTH, "height": HEIGHT}}
    boxes = {form: [value] for form, value in box.items()}
    region = {"uid": f"uid_img_{name}_bbox2text_00", "task_type": "bbox2text", "question": box}
    text = {"uid": f"uid_img_{name}_text2bbox_00", "task_type": "text2bbox", "question": element["text"]}
    return [{**common, **region, "answer": element["text"]}, {**common, **text, "answer": boxes}]


def act(screen: Screen, uid: str, question: str, actions: list[dict[str, Any]], **more: str) -> dict[str, Any]:
    """A record of GUIAct."""
    return {
        "uid": uid,
        "image_id": screen[0],
        "image_size": {"width": WIDTH, "height": HEIGHT},
        "question": question,
        "actions_history": more.get("history", ""),
        "logs": "",
        "thoughts": more.get("thoughts", ""),
        "actions_label": actions,
    }


def click(element: dict[str, Any]) -> dict[str, Any]:
    """A click on a page element."""
    return {"name": "click", "element": {"id": element["uid"], **marked("box", *corners(element))}}


def tap(element: dict[str, Any]) -> dict[str, Any]:
    """A tap on the middle of a page element."""
    left, top, right, bottom = corners(element)
    return {"name": "tap", "point": marked("point", (left + right) // 2, (top + bottom) // 2)}


def chat(screen: Screen, uid: str, element: dict[str, Any]) -> dict[str, Any]:
    """A conversation of GUIChat."""
    box = " ".join(str(round(1000 * v / (WIDTH, HEIGHT)[i % 2])) for i, v in enumerate(corners(element)))
    turns = [
        {"from": "human", "value": f"<image>{screen[0]}</image>\nWhere is {element['text']}?"},
        {"from": "gpt", "value": f"It is the button at <box>{box}</box>."},
    ]
    return {"uid": uid, "image_id": screen[0], "text": turns}


def write(folder: Path, stem: str, records: list[dict[str, Any]], screens: list[Screen], *, raw: bool = False) -> None:
    """``<stem>_data.json`` and ``<stem>_images.parquet``; GUIChat has its images raw, the others in base64."""
    (folder / f"{stem}_data.json").write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8")
    data: list[bytes | str] = []
    for _, image, _ in screens:
        written = io.BytesIO()
        image.save(written, "JPEG", quality=90)
        data.append(written.getvalue() if raw else base64.b64encode(written.getvalue()).decode())
    columns = {
        "__index_level_0__": [name for name, _, _ in screens],
        "base64": data,
        "elements": [elements for _, _, elements in screens],
    }
    parquet.write_table(pa.table(columns), folder / f"{stem}_images.parquet")


def make(folder: Path, train: int = 16, test: int = 4, seed: int = 0) -> Path:
    """All five data sets; ``train`` and ``test`` count the screens of each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    for split, count in (("train", train), ("test", test)):
        screens = [draw(rng, f"page-{split}-{number}") for number in range(count)]
        chosen = [rng.choice(elements) for _, _, elements in screens]
        pairs = list(zip(screens, chosen, strict=True))
        stage = "train_stage2" if split == "train" else split
        write(folder, f"ocr_grounding_{stage}", [r for s, e in pairs for r in environment(s, e)], screens)
        single = [
            act(s, f"uid_image_{s[0]}_qa_01", f"Open {e['text']}", [click(e)], thoughts=f"click on {e['text']}")
            for s, e in pairs
        ]
        write(folder, f"web-single_{split}", single, screens)
        steps = {"web-multi": "uid_record_{}_step_00", "smartphone": "uid_episode_{}_step_00"}
        for stem, pattern in steps.items():
            action = click if stem == "web-multi" else tap
            named = [(pattern.format(f"{split}{number:03}"), s, e) for number, (s, e) in enumerate(pairs)]
            records = [
                act((uid, *s[1:]), uid, f"Find {e['text']}", [action(e), {"name": "input", "text": e["text"]}])
                for uid, s, e in named
            ]
            write(folder, f"{stem}_{split}", records, [(uid, *s[1:]) for uid, s, _ in named])
        if split == "train":
            write(folder, "guichat", [chat(s, f"uid_chat_{s[0]}", e) for s, e in pairs], screens, raw=True)
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]), *map(int, sys.argv[2:4]))
