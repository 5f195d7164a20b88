from dataclasses import replace

import pytest
from golden_tokenizers import small_images, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune.encoding.encoder import Encoder
from finetune.encoding.length_policy import POLICIES, LengthPolicy, OverlongError
from finetune.families import by_name
from finetune.media.slicing import SlicePlan
from finetune.sample import DataError, Media, Message, Part, Sample, Source, Text

SOURCE = Source("data.json", 5, "q")
NAMES = {"v2_0": "minicpm", "llama3_v2_5": "llama3"}
BOTH = pytest.mark.parametrize("family", NAMES)
QUERIES = 4
MADE: dict[str, Encoder] = {}


def encoder(family: str, max_length: int | None = None) -> Encoder:
    """One vocabulary per family, which takes a while to make; only the limit differs."""
    if family not in MADE:
        MADE[family] = Encoder(by_name(family), tokenizer(NAMES[family]), small_images(QUERIES))
    made = MADE[family]
    made.max_length = max_length
    return made


def picture(width: int, height: int) -> Media:
    return Media("image", Image.new("RGB", (width, height), (10, 20, 30)))


def user(*parts: Media | str) -> Message:
    return Message("user", tuple(Text(part) if isinstance(part, str) else part for part in parts))


def answer(text: str, train: bool = True) -> Message:
    return Message("assistant", (Text(text),), train=train)


def conversation(*messages: Message) -> Sample:
    return Sample("q", SOURCE, messages)


def long_one(system: bool = False) -> Sample:
    """Three exchanges, four images, two of them cut into many slices."""
    head = [Message("system", (Text("Be brief, and look closely at every picture. " * 2),))] if system else []
    return conversation(
        *head,
        user(picture(168, 168), "\nWhat is in the first picture, and what stands to the left of it?"),
        answer("A tall house with a red roof; a tree stands to the left of it."),
        user("Compare ", picture(300, 60), " with ", picture(20, 20), "."),
        answer("The second is smaller."),
        user(picture(168, 112), "And now?"),
        answer("Two dogs run."),
    )


def last_labels(labels: list[int]) -> list[int]:
    """The labels of the last answer: the run that ends the sample."""
    run = []
    for label in reversed(labels):
        if label == -100:
            break
        run.append(label)
    return run[::-1]


def check_example(made: Encoder, sample: Sample, policy: str, limit: int) -> str:
    """Holds the contract of every policy; returns what became of the sample."""
    made.max_length = None
    whole = made.encode(sample)
    made.max_length = limit
    length_policy = LengthPolicy(made, policy)
    try:
        fitted = length_policy.fit(sample)
    except OverlongError:
        reason = f"record 5 .*: skipped: {len(whole.input_ids)} tokens, the limit is {limit}"
        with pytest.raises(OverlongError, match=reason):
            length_policy.encode(sample)
        return "skipped"
    example, outcome = length_policy.encode(sample)
    ids, labels = example.input_ids.tolist(), example.labels.tolist()
    assert outcome == fitted.outcome
    assert len(ids) <= limit
    images = list(fitted.sample.media("image"))
    assert len(fitted.plans) == len(images)
    items = sum(cuts.items for cuts in fitted.plans if isinstance(cuts, SlicePlan))
    assert len(example.image_bound) == len(example.tgt_sizes) == items
    placeholder = made.prompt_tokenizer.control("<unk>")
    for first, last in example.image_bound.tolist():
        assert ids[first:last] == [placeholder] * QUERIES
    assert ids.count(placeholder) == items * QUERIES
    assert len(example.patches) == example.tgt_sizes.prod(1).sum()
    assert any(label != -100 for label in labels)
    if sample.messages[-1].train:
        assert last_labels(labels) == last_labels(whole.labels.tolist())
    assert fitted.sample.messages[-1] == sample.messages[-1]
    assert fitted.lost_media == len(list(sample.media("image"))) - len(images)
    if outcome == "kept":
        assert ids == whole.input_ids.tolist()
    # What remains is encoded as if it had been written so.
    made.max_length = None
    if policy == "truncate":
        assert made.encode(fitted.sample).input_ids.tolist() == ids
    return outcome


@BOTH
@pytest.mark.parametrize("policy", ["shrink", "truncate", "drop"])
def test_every_limit(family: str, policy: str) -> None:
    made = encoder(family)
    sample = long_one(system=family == "llama3_v2_5")
    whole = made.measure(sample).tokens
    outcomes = [check_example(made, sample, policy, limit) for limit in range(1, whole + 3)]
    # A larger limit never costs more.
    worst = {"skipped": 0, "turns removed": 1, "shrunk": 2, "truncated": 2, "kept": 3}
    ranks = [worst[outcome] for outcome in outcomes]
    assert ranks == sorted(ranks)
    assert outcomes[whole - 1] == "kept"
    expected = {"shrink": "shrunk", "truncate": "truncated"}.get(policy)
    assert set(outcomes) == ({"skipped", "kept", expected, "turns removed"} if expected else {"skipped", "kept"})


TEXTS = st.text(alphabet="abcdefg ,.<unk>\n高éß🙂", max_size=40)
PARTS = st.one_of(TEXTS.map(Text), st.tuples(st.integers(1, 300), st.integers(1, 300)).map(lambda size: picture(*size)))
EXCHANGES = st.tuples(st.lists(PARTS, min_size=1, max_size=3), TEXTS, st.booleans())


@BOTH
@settings(max_examples=60, deadline=None)
@given(st.lists(EXCHANGES, min_size=1, max_size=4), st.sampled_from(["shrink", "truncate", "drop"]), st.data())
def test_any_conversation(
    family: str, exchanges: list[tuple[list[Part], str, bool]], policy: str, data: st.DataObject
) -> None:
    messages: list[Message] = []
    for index, (parts, reply, train) in enumerate(exchanges):
        trained = train or index == len(exchanges) - 1
        messages += [Message("user", tuple(parts)), answer(f"{reply} yes", trained)]
    made = encoder(family)
    sample = conversation(*messages)
    limit = data.draw(st.integers(1, made.measure(sample).tokens + 1))
    check_example(made, sample, policy, limit)


@BOTH
def test_shrink_takes_the_most_slices_that_fit(family: str) -> None:
    sample = conversation(user(picture(168, 168), "What?"), answer("A dog."))
    made = encoder(family)
    lengths = {
        slices: len(made.render(sample, made.plans(made.sizes(sample), slices)).input_ids) for slices in range(1, 10)
    }
    assert len(set(lengths.values())) > 4
    for limit in range(lengths[1], lengths[9]):
        made.max_length = limit
        fitted = LengthPolicy(made, "shrink").fit(sample)
        assert len(fitted.rendered.input_ids) == max(length for length in lengths.values() if length <= limit)
        assert fitted.outcome == "shrunk"
        assert fitted.sample == sample


@BOTH
def test_shrink_drops_whole_oldest_turns_with_their_images(family: str) -> None:
    sample = long_one()
    made = encoder(family)
    last_two = replace(sample, messages=sample.messages[2:])
    made.max_length = len(made.render(last_two, made.plans(made.sizes(last_two), 1)).input_ids)
    fitted = LengthPolicy(made, "shrink").fit(sample)
    assert fitted.outcome == "turns removed"
    assert fitted.sample == last_two
    assert fitted.lost_media == 1
    assert [cuts.items for cuts in fitted.plans if isinstance(cuts, SlicePlan)] == [1, 1, 1]


def test_a_system_turn_stays() -> None:
    sample = long_one(system=True)
    made = encoder("llama3_v2_5")
    rest = replace(sample, messages=(sample.messages[0], *sample.messages[5:]))
    made.max_length = len(made.render(rest, made.plans(made.sizes(rest), 1)).input_ids)
    assert LengthPolicy(made, "shrink").fit(sample).sample == rest


@BOTH
def test_truncate_shortens_the_oldest_text_first_and_keeps_slices(family: str) -> None:
    sample = long_one()
    made = encoder(family)
    made.max_length = made.measure(sample).tokens - 3
    fitted = LengthPolicy(made, "truncate").fit(sample)
    assert fitted.plans == made.plans(made.sizes(sample))
    first, old = fitted.sample.messages[0], sample.messages[0]
    assert old.text.endswith(first.text)
    assert 0 < len(first.text) < len(old.text)
    assert list(fitted.sample.media()) == list(sample.media())
    assert fitted.sample.messages[1:] == sample.messages[1:]


@BOTH
def test_truncate_spares_a_question_while_older_turns_can_go(family: str) -> None:
    sample = conversation(
        user("Tell me. "), answer("A very long story, told again and again. " * 4), user("Really? Why?"), answer("No.")
    )
    made = encoder(family)
    made.max_length = made.measure(sample).tokens // 2
    fitted = LengthPolicy(made, "truncate").fit(sample)
    assert fitted.sample.messages == sample.messages[2:]
    # Alone, it is shortened, but never to nothing.
    alone = made.measure(fitted.sample).tokens
    made.max_length = alone - 1
    assert LengthPolicy(made, "truncate").fit(sample).sample.messages[0].text in "Really? Why?"
    made.max_length = made.measure(conversation(user("x"), answer("No."))).tokens - 1
    with pytest.raises(OverlongError, match="and one word of the question of its last exchange need more"):
        LengthPolicy(made, "truncate").fit(sample)


@BOTH
def test_no_trained_answer_left(family: str) -> None:
    sample = conversation(user("One? " * 20), answer("Yes."), user("Two?"), answer("No.", train=False))
    made = encoder(family)
    made.max_length = made.measure(sample).tokens // 2
    with pytest.raises(OverlongError, match="no trained answer fits"):
        LengthPolicy(made, "shrink").fit(sample)


@BOTH
def test_error_and_drop_name_the_record(family: str) -> None:
    sample = long_one()
    made = encoder(family)
    length = made.measure(sample).tokens
    made.max_length = 20
    with pytest.raises(DataError, match=rf"record 5 \(id 'q'\): {length} tokens .*, the limit is 20;") as raised:
        LengthPolicy(made, "error").fit(sample)
    assert not isinstance(raised.value, OverlongError)
    with pytest.raises(OverlongError, match=rf"record 5 \(id 'q'\): skipped: {length} tokens.*--overlong drop"):
        LengthPolicy(made, "drop").fit(sample)


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
def test_what_fits_is_left_alone_and_bad_is_bad(family: str, policy: str) -> None:
    made = encoder(family)
    sample = long_one()
    fitted = LengthPolicy(made, policy).fit(sample)
    assert (fitted.sample, fitted.outcome, fitted.lost_media) == (sample, "kept", 0)
    with pytest.raises(DataError, match="no token has a label"):
        LengthPolicy(made, policy).fit(conversation(user("x"), answer("y", train=False)))


def test_generation_keeps_the_error() -> None:
    with pytest.raises(DataError, match="the limit is 20"):
        encoder("v2_0", 20).encode(long_one(), generate=True)
    with pytest.raises(ValueError, match="no policy 'cut'"):
        LengthPolicy(encoder("v2_0"), "cut")
