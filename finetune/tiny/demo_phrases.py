"""Questions and answers of the demo dataset."""

from __future__ import annotations

# The corners of the RGB cube: as far apart as colours can be, and each has its opposite among them.
COLOURS: dict[str, tuple[bool, bool, bool]] = {
    "black": (False, False, False),
    "red": (True, False, False),
    "green": (False, True, False),
    "blue": (False, False, True),
    "yellow": (True, True, False),
    "magenta": (True, False, True),
    "cyan": (False, True, True),
    "white": (True, True, True),
}
SQUARE_QUESTION = "What colour is the square?"
DOTS_QUESTION = "What colour are the fine dots?"
SQUARES_QUESTION = "What colours are the squares?"
# The tiny model learns to answer for the images in order within 100 steps. Asked for one image by its number it
# needs from 200 to more than 500, depending on the seed.
SQUARES_ANSWER = "first {}, second {}"
QUESTIONS = (SQUARE_QUESTION, DOTS_QUESTION, SQUARES_QUESTION)
ANSWERS = (*COLOURS, *(SQUARES_ANSWER.format(colour, colour) for colour in COLOURS))
