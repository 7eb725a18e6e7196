"""The wordings: as many as promised, each with its slots, none that could be false; other languages are built alike."""

import copy
import re

import pytest

from m3d.tasks.wordings import OPTIONAL, SLOTS, Phrases, check_templates, languages, read_back, slots_of, templates

LISTS = [(lang, wording, part) for lang in languages() for wording, parts in SLOTS.items() for part in parts]
PUBLISHED = {  # how many distinct ones the paper's code draws from (REFERENCE A4)
    ("report", "prompt"): 41,
    ("rec.box3d", "prompt"): 19,
    ("rec.box3d", "answer"): 29,
    ("rec.box3d", "absent"): 15,
    ("rec.box3d.description", "prompt"): 41,
    ("rec.box3d.description", "answer"): 21,
    ("rec.box3d.description", "absent"): 13,
    ("reg", "prompt"): 30,
    ("reg", "answer"): 19,
    ("reg", "absent"): 9,
    ("reg.description", "prompt"): 17,
    ("reg.description", "answer"): 18,
    ("reg.description", "absent"): 6,
    ("seg.sem", "prompt"): 22,
    ("seg.sem", "answer"): 13,
    ("seg.sem", "absent"): 12,
    ("seg.ref", "prompt"): 21,
    ("seg.ref", "answer"): 12,
    ("seg.ref", "absent"): 10,
}
LEARNED = {  # what the bundled model was trained and is asked with: never to be changed
    ("report", "prompt"): "Write a report of this scan.",
    ("vqa.closed", "prompt"): "{question} Choices: {choices}",
    ("rec.box3d", "prompt"): "Where is the {name}?",
    ("rec.box3d", "answer"): "The {name} is at {box}.",
    ("rec.box3d", "absent"): "There is no {name} in this scan.",
    ("reg", "prompt"): "What is at {box}?",
    ("reg", "answer"): "It is the {name}.",
    ("seg.sem", "prompt"): "Segment {names}.",
    ("seg.sem", "answer"): "Here is the {masks}.",
    ("seg.sem", "absent"): "There is no {name} in this scan.",
}
UNSURE = r"\b(left|right|CT|MRI?|PET|X-ray|ultrasound|contrast|axial|coronal|sagittal|chest|abdom\w+|head|brain)\b"


@pytest.mark.parametrize(("wording", "part"), PUBLISHED)
def test_there_are_as_many_distinct_variants_as_published(wording, part):
    variants = templates("en")[wording][part]
    told_apart = {re.sub(r"\W+", " ", variant).strip().lower() for variant in variants}
    assert len(told_apart) == len(variants) >= PUBLISHED[wording, part]


@pytest.mark.parametrize(("wording", "part"), LEARNED)
def test_the_first_variant_is_the_fixed_one(wording, part):
    assert templates("en")[wording][part][0] == LEARNED[wording, part]


@pytest.mark.parametrize(("lang", "wording", "part"), LISTS)
def test_every_variant_has_the_slots_of_its_list(lang, wording, part):
    for variant in templates(lang)[wording][part]:
        found = re.findall(r"\{(\w+)\}", variant)
        assert len(found) == len(set(found))
        assert set(found) - OPTIONAL.get((wording, part), set()) == SLOTS[wording][part]
        assert "masks" not in SLOTS[wording][part] or variant.count("{masks}") == 1
        assert variant == variant.strip() and variant.count("  ") == 0
        assert "[SEG]" not in variant  # it comes with the mask that it draws


@pytest.mark.parametrize(("wording", "part"), [(wording, part) for lang, wording, part in LISTS if lang == "en"])
def test_english_says_nothing_that_may_be_false_and_bends_no_verb_to_a_name(wording, part):
    for number, variant in enumerate(templates("en")[wording][part]):
        assert not re.search(UNSURE, variant, re.IGNORECASE), variant
        assert variant[0].isupper() or variant[0] == "{"
        assert variant[-1] in ".?" or variant.endswith(("{choices}", "{question}"))
        subject = re.sub(r"\b(of|around|for) the \{name", "of it", variant)  # "the box of the kidneys is" is right
        bent = re.search(r"(\{(name|names)\}(,)? (is|are|has|have|lies|lie)\b)|(Where is the \{name)", subject)
        assert number == 0 or bent is None, variant
        if "{description}" in variant:  # a phrase or a sentence: it stands alone, after a colon, or in quotation marks
            assert re.search(r'(^|[:.?] |")\{description\}([.?"])', variant), variant


def test_optional_slots_are_drawn_only_where_they_are_given(nth):
    variants = templates("en")["report"]["prompt"]
    plain = {Phrases("en", nth(number))("report", "prompt") for number in range(len(variants))}
    assert plain == {variant for variant in variants if not slots_of(variant)}
    all_of_them = {Phrases("en", nth(number))("report", "prompt", modality="MR") for number in range(len(variants))}
    assert len(all_of_them) == len(variants) and "Report this MR scan." in all_of_them


def test_an_answer_is_read_backwards_in_any_language():
    assert read_back(("reg",), "answer", " it is the left kidney ") == {"name": "left kidney"}
    assert read_back(("reg",), "answer", "框内是左肾。") == {"name": "左肾"}
    assert read_back(("reg",), "answer", "A large mass.") is None


def test_a_language_that_is_not_there_says_how_to_add_it():
    with pytest.raises(FileNotFoundError, match=r"lang='xx', only for en, zh; add m3d/tasks/templates/xx\.yaml"):
        templates("xx")
    assert templates("zh-CN")["report"] == templates("zh")["report"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.pop("reg"), "fr.yaml: missing or unknown: reg; compare it with en.yaml"),
        (lambda given: given.update(extra={}), "missing or unknown: extra"),
        (lambda given: given["reg"].pop("absent"), "fr.yaml: reg: missing or unknown: absent"),
        (lambda given: given["list"].pop("and"), "fr.yaml: list: missing or unknown: and"),
        (lambda given: given.update(version=1), "version: 2"),
        (lambda given: given["reg"].update(prompt=[]), "reg: a list of one or more sentences"),
        (lambda given: given["reg"].update(answer=["A thing."]), r"reg: 'A thing\.' must have \{name\}, each once"),
        (lambda given: given["seg.ref"].update(absent=["No {name}."]), "must have no slot"),
        (lambda given: given["seg.ref"].update(answer=["{masks} {masks}"]), "each once"),
        (lambda given: given["reg"]["answer"].append("It is the {name}."), "is there twice"),
    ],
)
def test_a_file_that_is_built_otherwise_is_refused(change, message):
    given = copy.deepcopy(templates("en"))
    change(given)
    with pytest.raises(ValueError, match=message):
        check_templates(given, "fr.yaml")
