"""What every task asks, answers and reads back."""

import random
from pathlib import Path

import pytest

from data_prep.boxes import iou
from data_prep.record import NEEDS, parse
from m3d.tasks import TASKS, render
from m3d.tasks.base import templates
from m3d.tasks.codecs import Frac3
from m3d.tasks.vqa import write_choices
from m3d.tasks.wordings import languages

EXAMPLES = Path(__file__).parents[1] / "fixtures" / "records" / "examples.jsonl"
BOX = {"name": "liver", "lo": (0, 5, 20), "hi": (5, 15, 40)}  # of (10, 20, 40)
TEXT = "<bx_start>[0.000, 0.250, 0.500, 0.500, 0.750, 1.000]<bx_end>"
LARGE = "Largest organ of the belly"


def masks(*names: str) -> dict[str, tuple[dict[str, object], ...]]:
    return {"masks": tuple({"name": name, "path": "m.npz", "label": 1} for name in names)}


DESCRIBED = {"subtask": "description", "slots": {"description": f"{LARGE}."}}
CASES = {  # task, fields of the record, prompt, answer
    "retrieval": ("retrieval", {"target": {"text": "A mass."}}, "", "A mass."),
    "report": ("report", {"target": {"text": "Normal."}}, "Write a report of this scan.", "Normal."),
    "vqa.open": ("vqa.open", {"slots": {"question": "Which?"}, "target": {"text": "Left."}}, "Which?", "Left."),
    "vqa.closed": (
        "vqa.closed",
        {"slots": {"question": "Which?"}, "target": {"options": ("left", "right"), "choice": 1}},
        "Which? Choices: A. left B. right",
        "B. right",
    ),
    "yes or no": (
        "vqa.closed",
        {"subtask": "yes/no", "slots": {"question": "Is it?"}, "target": {"options": ("yes", "no"), "choice": 1}},
        "Is it? Answer yes or no.",
        "no",
    ),
    "rec.box3d": (
        "rec.box3d",
        {"slots": {"object": "liver"}, "target": {"boxes": (BOX,)}},
        "Where is the liver?",
        f"The liver is at {TEXT}.",
    ),
    "two boxes": (
        "rec.box3d",
        {
            "slots": {"object": "cyst"},
            "target": {"boxes": (BOX, BOX | {"frame": "norm", "lo": (0,) * 3, "hi": (1,) * 3})},
        },
        "Where is the cyst?",
        f"The cyst is at {TEXT} and <bx_start>[0.000, 0.000, 0.000, 1.000, 1.000, 1.000]<bx_end>.",
    ),
    "absent box": (
        "rec.box3d",
        {"slots": {"object": "liver"}, "target": {"boxes": ()}},
        "Where is the liver?",
        "There is no liver in this scan.",
    ),
    "rec by description": (
        "rec.box3d",
        DESCRIBED | {"target": {"boxes": (BOX,)}},
        f"Which structure fits this description, and where is it? {LARGE}.",
        f"It is the liver, at {TEXT}.",
    ),
    "rec absent by description": (
        "rec.box3d",
        DESCRIBED | {"target": {"boxes": ()}},
        f"Which structure fits this description, and where is it? {LARGE}.",
        "Nothing in this scan fits that description.",
    ),
    "reg": ("reg", {"target": {"boxes": (BOX,)}}, f"What is at {TEXT}?", "It is the liver."),
    "reg by description": (
        "reg",
        DESCRIBED | {"target": {"boxes": (BOX,)}},
        f"Describe what is at {TEXT}.",
        f"It is the liver: {LARGE}.",
    ),
    "reg absent": (
        "reg",
        {"slots": {"object": "liver"}, "target": {"boxes": ()}},
        "Where is the liver?",
        "There is no liver in this scan.",
    ),
    "seg.sem": (
        "seg.sem",
        {"slots": {"objects": ["liver", "spleen"]}, "target": masks("liver", "spleen")},
        "Segment the liver and the spleen.",
        "Here is the liver [SEG] and spleen [SEG].",
    ),
    "seg.sem of one": (
        "seg.sem",
        {"slots": {"object": "liver"}, "target": masks("liver")},
        "Segment the liver.",
        "Here is the liver [SEG].",
    ),
    "absent masks": (
        "seg.sem",
        {"slots": {"objects": ["liver", "spleen"]}, "target": masks()},
        "Segment the liver and the spleen.",
        "There is no liver in this scan. There is no spleen in this scan.",
    ),
    "seg.ref": (
        "seg.ref",
        {"slots": {"description": LARGE}, "target": masks("liver")},
        f"Which structure fits this description? Please segment it. {LARGE}.",
        "It is the liver [SEG].",
    ),
    "seg.ref with its own answer": (
        "seg.ref",
        {"slots": {"description": LARGE}, "target": masks("liver") | {"text": "It is liver, [SEG]."}},
        f"Which structure fits this description? Please segment it. {LARGE}.",
        "It is liver, [SEG].",
    ),
    "seg.ref with its own question": (
        "seg.ref",
        {"slots": {"question": "Where is the lesion?"}, "target": masks("lesion 1") | {"text": "Sure, it is [SEG]."}},
        "Where is the lesion?",
        "Sure, it is [SEG].",
    ),
    "seg.ref absent": (
        "seg.ref",
        {"slots": {"description": LARGE}, "target": masks()},
        f"Which structure fits this description? Please segment it. {LARGE}.",
        "Nothing in this scan fits that description.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_evaluation_wording_is_fixed(name, make):
    task, fields, prompt, answer = CASES[name]
    said = render(TASKS, make(task, **fields), codec=Frac3())
    assert (said.prompt, said.answer) == (prompt, answer)
    assert said.answer.count("[SEG]") == len(said.masks)


def test_the_eight_tasks_are_there_with_what_they_need():
    eight = ["retrieval", "report", "vqa.closed", "vqa.open", "rec.box3d", "reg", "seg.sem", "seg.ref"]
    assert list(TASKS) == eight
    assert all((task.name, task.needs) == (name, NEEDS[name]) for name, task in TASKS.items())


def test_training_wording_varies_and_repeats_by_seed(make):
    given = make("rec.box3d", {"boxes": (BOX,)}, {"object": "liver"})
    prompts = [render(TASKS, given, codec=Frac3(), rng=random.Random(seed)).prompt for seed in range(200)]
    assert set(prompts) == {variant.format(name="liver") for variant in templates("en")["rec.box3d"]["prompt"]}
    again = [render(TASKS, given, codec=Frac3(), rng=random.Random(seed)).prompt for seed in range(200)]
    assert prompts == again


# -- what is rendered is read back, over all variants of all languages ---------------------------------------------

NAMES = {
    "en": [
        "liver",
        "left kidney",
        "kidneys",
        "L1 vertebra",
        "head and neck",
        "non-enhancing core",
        "inferior vena cava",
    ],
    "zh": ["肝脏", "左肾", "第1腰椎"],
}
EVERY = [(lang, name) for lang, names in NAMES.items() for name in names]
VARIANTS = range(44)  # as many as the longest list has


def test_every_language_and_variant_is_tried():
    assert set(NAMES) == set(languages())
    lists = [
        variants
        for lang in NAMES
        for parts in templates(lang).values()
        if isinstance(parts, dict)
        for variants in parts.values()
        if isinstance(variants, list)
    ]
    assert max(map(len, lists)) <= len(VARIANTS)


@pytest.mark.parametrize(("lang", "name"), EVERY)
@pytest.mark.parametrize("subtask", ["name", "description"])
def test_boxes_and_their_names_are_read_back(lang, name, subtask, make, nth):
    slots = {"name": {"object": name}, "description": {"description": "A part of the body, near others."}}[subtask]
    box = {"name": name, "lo": (1, 2, 3), "hi": (4, 12, 33)}
    given = make("rec.box3d", {"boxes": (box,)}, slots, subtask=subtask, lang=lang)
    absent = make("rec.box3d", {"boxes": ()}, slots, subtask=subtask, lang=lang)
    for number in VARIANTS:
        said = render(TASKS, given, codec=Frac3(), rng=nth(number))
        for text in (said.answer, said.answer.replace("<bx_start>", "").replace("<bx_end>", "")):
            (back,) = TASKS["rec.box3d"].parse(text, Frac3())
            assert back.name == name
            assert (back.lo, back.hi) == (pytest.approx((0.1, 0.1, 0.075)), pytest.approx((0.4, 0.6, 0.825)))
            assert iou(back, back) == 1
        denied = render(TASKS, absent, codec=Frac3(), rng=nth(number))
        assert TASKS["rec.box3d"].parse(denied.answer, Frac3()) == []
        asked = {said.prompt, denied.prompt}
        assert len(asked) == 1 and (slots.get("object") or "A part of the body, near others") in asked.pop()


@pytest.mark.parametrize(("lang", "name"), EVERY)
@pytest.mark.parametrize("subtask", ["name", "description"])
def test_names_of_boxes_are_read_back(lang, name, subtask, make, nth):
    slots = {} if subtask == "name" else {"description": "A part of the body: it is the core, near others"}
    given = make("reg", {"boxes": (BOX | {"name": name},)}, slots, subtask=subtask, lang=lang)
    for number in VARIANTS:
        said = render(TASKS, given, codec=Frac3(), rng=nth(number))
        assert TASKS["reg"].parse(said.answer, Frac3()) == name
        assert Frac3().decode(said.prompt)[0].lo == (0, 0.25, 0.5)
        assert subtask == "name" or slots["description"] in said.answer


@pytest.mark.parametrize("lang", NAMES)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("task", ["seg.sem", "seg.ref"])
def test_names_of_masks_are_read_back(task, count, lang, make, nth):
    for first in range(len(NAMES[lang])):
        names = (NAMES[lang][first:] + NAMES[lang])[:count]
        slots = {"objects": names or NAMES[lang][:2]} if task == "seg.sem" else {"description": LARGE}
        given = make(task, masks(*names), slots, lang=lang)
        for number in VARIANTS:
            said = render(TASKS, given, codec=Frac3(), rng=nth(number))
            assert TASKS[task].parse(said.answer, Frac3()) == names == list(said.masks)


@pytest.mark.parametrize("lang", NAMES)
@pytest.mark.parametrize("choice", [0, 1, 2])
def test_choices_are_read_back(choice, lang, make, nth):
    options = ("A cyst", "B-cell lymphoma", "no")
    given = make("vqa.closed", {"options": options, "choice": choice}, {"question": "Which?"}, lang=lang)
    plain = make(
        "vqa.closed", {"options": options, "choice": choice}, {"question": "Which?"}, template="m3d.vqa.closed.yes_no"
    )
    for number in VARIANTS:
        said = render(TASKS, given, codec=Frac3(), rng=nth(number))
        assert TASKS["vqa.closed"].parse(said.answer, Frac3()) == choice
        assert "Which?" in said.prompt and "A. A cyst B. B-cell lymphoma C. no" in said.prompt
        said = render(TASKS, plain, codec=Frac3(), rng=nth(number))
        assert TASKS["vqa.closed"].parse(said.answer, Frac3(), options=options) == choice


@pytest.mark.parametrize("task", ["retrieval", "report", "vqa.open"])
def test_texts_are_read_back(task, make, nth):
    slots = {"question": "Which?"} if task == "vqa.open" else {}
    given = make(task, {"text": "There is no mass. Left: 3 cm"}, slots, modality="MR")
    for number in VARIANTS:
        said = render(TASKS, given, codec=Frac3(), rng=nth(number))
        assert TASKS[task].parse(f" {said.answer}\n", Frac3()) == given.target.text
        assert "{" not in said.prompt


@pytest.mark.parametrize(
    ("text", "options", "choice"),
    [
        ("B. right", None, 1),
        ("(C) three", None, 2),
        ("A", None, 0),
        ("The answer is B.", None, 1),
        ("Answer: (D) four", None, 3),
        ("All of it", None, None),
        ("A large mass is seen", None, None),
        ("The answer is a mass", None, None),
        ("The answer is A large mass", None, None),
        ("", ("?", "!"), None),
        ("b. right", None, None),
        ("", None, None),
        ("MRA. x", None, None),
        ("D. four", ("one", "two"), None),
        ("Two.", ("one", "two"), 1),
        ("Left kidney cyst", ("left", "left kidney", "right kidney"), 1),
        ("nothing", ("no", "yes"), None),
        ("No, there is none.", ("no", "yes"), 0),
    ],
)
def test_choice_is_a_letter_of_its_own_or_an_option_in_words(text, options, choice):
    assert TASKS["vqa.closed"].parse(text, Frac3(), options=options) == choice


def test_choices_without_letters_are_refused():
    assert write_choices("Which?", ["a", "b"]) == "Which? Choices: A. a B. b"
    with pytest.raises(ValueError, match="27 options, but only 26 letters"):
        write_choices("Which?", [str(number) for number in range(27)])


# -- records of their own words, and records that are wrong --------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "target", "answer"),
    [
        ("report", {"text": "Normal."}, "Normal."),
        ("vqa.open", {"text": "Left."}, "Left."),
        ("vqa.closed", {"options": ("yes", "no"), "choice": 0}, "A. yes"),
        ("rec.box3d", {"boxes": (BOX,)}, f"It is the liver, at {TEXT}."),
        ("rec.box3d", {"boxes": (), "text": "Nowhere."}, "Nowhere."),
        ("reg", {"boxes": (BOX,)}, "It is the liver."),
        ("reg", {"boxes": (BOX | {"name": ""},), "text": "A large organ."}, "A large organ."),
        ("seg.sem", masks("liver"), "Here is the liver [SEG]."),
        ("seg.ref", masks("", "") | {"text": "Here [SEG] and there [SEG]."}, "Here [SEG] and there [SEG]."),
        ("seg.ref", masks() | {"text": "There is none."}, "There is none."),
    ],
)
def test_a_text_of_the_records_own_is_asked_as_it_stands(task, target, answer, make, nth):
    given = make(task, target, text="Say it,  as I ask {it}!")
    said = render(TASKS, given, codec=Frac3())
    assert (said.prompt, said.answer) == ("Say it,  as I ask {it}!", answer)
    assert render(TASKS, given, codec=Frac3(), rng=nth(7)).prompt == said.prompt


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("seg.ref", {"text": "?", "target": masks("a") | {"text": "It is a."}}, r"0 \[SEG\] for 1 masks"),
        ("seg.ref", {"text": "?", "target": masks() | {"text": "It is a [SEG]."}}, r"1 \[SEG\] for 0 masks"),
        ("seg.ref", {"text": "?", "target": masks("")}, "a mask without a name needs target.text"),
        ("seg.ref", {"target": masks("a")}, "needs prompt.slots.description; it has"),
        ("seg.sem", {"text": "?", "target": masks()}, "give target.text too"),
        ("seg.sem", {"slots": {"objects": "liver"}, "target": masks("liver")}, "must be a list of names"),
        (
            "seg.sem",
            {"slots": {"objects": ["a", "b"]}, "target": masks("a")},
            "asks for b beside a, but has no such mask",
        ),
        ("rec.box3d", {"target": {"boxes": (BOX,)}}, "record r: template m3d.rec.box3d needs prompt.slots.object"),
        ("rec.box3d", {"text": "?", "target": {"boxes": ()}}, "asks for something absent; give target.text"),
        ("rec.box3d", {"text": "?", "target": {"boxes": (BOX | {"frame": "mm"},)}}, "'liver' is in mm"),
        ("rec.box3d", {"template": "umit.det3d", "target": {"boxes": ()}}, "no template 'umit.det3d'; known: m3d.rec"),
        ("vqa.open", {"template": "m3d.vqa.opn", "target": {"text": "a"}}, r"did you mean 'm3d\.vqa\.open'"),
        ("reg", {"target": {"boxes": (BOX, BOX | {"name": "spleen"})}}, "asks of one structure, got"),
        ("reg", {"target": {"boxes": (BOX | {"name": " "},)}}, "needs the box's name"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named(task, fields, message, make):
    with pytest.raises(ValueError, match=message):
        render(TASKS, make(task, **fields), codec=Frac3())


def test_a_target_that_was_taken_away_is_missed(make):
    given = make("report", {"text": "Normal."})
    with pytest.raises(ValueError, match=r"record r: task report needs target\.text"):
        render(
            TASKS, given.model_copy(update={"target": given.target.model_copy(update={"text": None})}), codec=Frac3()
        )


def test_unknown_task_and_language_are_named(make):
    with pytest.raises(KeyError, match=r"unknown name 'seg\.magic'"):
        render(TASKS, make("seg.magic", {"text": "a"}), codec=Frac3())
    with pytest.raises(FileNotFoundError, match="no templates for lang='xx'"):
        render(TASKS, make("report", {"text": "a"}), codec=Frac3(), lang="xx")


def test_the_published_examples_of_our_tasks_are_rendered():
    records = [parse(line, "examples") for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    ours = {
        one.id: render(TASKS, one, codec=Frac3()) for one in records if (one.prompt.template or "").startswith("m3d.")
    }
    assert ours["m3dvqa/000123/q7"].prompt == (
        "Which organ shows a mass? Choices: A. Liver B. Right kidney C. Spleen D. Pancreas"
    )
    assert ours["m3dvqa/000123/q7"].answer == "B. Right kidney"
    assert ours["m3dseg/0001/0042/liver/seg"].answer == "It is liver, [SEG]."
    assert ours["m3dseg/0001/0042/liver/seg"].masks == ("liver",)
    assert ours["m3dcap/000123/rep"].prompt == "Write a report of this scan."
