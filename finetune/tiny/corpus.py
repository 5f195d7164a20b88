"""Training corpus of the tiny tokenizers: some sentences, and every phrase of the demo."""

from __future__ import annotations

from collections.abc import Iterator

from finetune.tiny.demo_phrases import ANSWERS, QUESTIONS

ENGLISH = (
    "The answer is short, the question is not.",
    "A small model learns a small task in a minute.",
    "You are a helpful assistant.",
    "The user shows a picture and asks what is in it.",
    "Please describe the image in detail.",
    "What is the number on the sign next to the door?",
    "There are two cats under the table and one on the chair.",
    "The system prints the loss of every step.",
    "How many people are waiting at the bus stop?",
    "The left half is brighter than the right half.",
    "Read the text in the first image, then compare it with the second.",
    "The assistant answers in one word.",
    "Where is the red car? It is in front of the house.",
    "Rain falls on the quiet street while the lamps are lit.",
    "This chart shows the price of bread for ten years.",
    "Is the window open or closed? I think it is open.",
    "Give the box of the largest object in the picture.",
    "First come the weights, then the data, then the training.",
)
CHINESE = (
    "图片里有什么？",
    "请描述这张图片。",
    "用户提出问题，助手给出回答。",
    "这个方块是什么颜色？",
    "图中有两只猫和一把椅子。",
    "你好，世界！",
    "请用一个词回答。",
    "第一张图片和第二张图片有什么不同？",
    "训练数据越多，模型越好。",
    "门牌上的数字是多少？",
)
ROLES = ("system", "user", "assistant")


def lines(before_question: str, before_answer: str) -> Iterator[str]:
    """The corpus, line by line; what a demo prompt or answer contains occurs often enough to become single tokens.

    Args:
        before_question: text that the chat template puts before a question.
        before_answer: text that it puts before an answer.
    """
    yield from ENGLISH
    yield from CHINESE
    for _ in range(20):
        for role in ROLES:
            yield f"{role}\n\n"
        for question in QUESTIONS:
            yield f"{before_question}\n{question}"
        for answer in ANSWERS:
            yield f"{before_answer}{answer}"
