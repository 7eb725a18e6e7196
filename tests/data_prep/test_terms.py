"""The term dictionary: complete, right about sides, silent about its own names; and the published one in both forms."""

import dataclasses
import json
import logging
import random
import re
from collections import Counter

import pytest

from data_prep.openkbp import NAMES as OPENKBP
from data_prep.terms import (
    KINDS,
    Term,
    Terms,
    describe,
    find,
    load_terms,
    published_terms,
    read_published,
    read_terms,
)

PAIRED = """adrenal_gland autochthon clavicula femur gluteus_maximus gluteus_medius gluteus_minimus hip humerus
    iliac_artery iliac_vena iliopsoas kidney scapula lung_upper_lobe lung_lower_lobe heart_atrium heart_ventricle
    kidney_cyst subclavian_artery common_carotid_artery brachiocephalic_vein lung""".split()
SINGLE = """spleen gallbladder liver stomach pancreas esophagus trachea thyroid_gland small_bowel duodenum colon
    urinary_bladder prostate sacrum heart aorta pulmonary_vein brachiocephalic_trunk atrial_appendage_left
    superior_vena_cava inferior_vena_cava portal_vein_and_splenic_vein spinal_cord brain skull sternum costal_cartilages
    lung_middle_lobe_right heart_myocardium pulmonary_artery face vertebrae intervertebral_discs""".split()
LEVELS = [f"C{n}" for n in range(1, 8)] + [f"T{n}" for n in range(1, 13)] + [f"L{n}" for n in range(1, 6)]
TOTALSEGMENTATOR = [
    *SINGLE,
    *(f"{name}_{side}" for name in PAIRED for side in ("left", "right")),
    *(f"rib_{side}_{n}" for side in ("left", "right") for n in range(1, 13)),
    *(f"vertebrae_{level}" for level in [*LEVELS, "S1"]),
]
M3D = """carotid artery left; arytenoid; bone mandible; buccal mucosa; oral cavity; cochlea right; cricopharyngeal
    inlet; cervical esophagus; anterior eyeball left; posterior eyeball right; lacrimal gland left; submandibular
    gland right; thyroid; larynx glottis; larynx supraglottic; lips; optic chiasm; optic nerve left; parotid gland
    right; pituitary gland; gall bladder; postcava; bladder; prostate or uterus; kidney; kidney tumor; kidney cyst;
    renal vein; renal artery; tumor; stones; artery; biliary system; bone; kidneys; left suprarenal tumor; liver
    kyst; liver kyste; liver tumor 07; liver tumors; lungs; metal; metastasectomie; portal vein 1; right suprarenal
    gland; skin; small intestin; suprarenal gland; uterus; vena cava; venous system; lumbar spine L6; coccygis;
    additional 13th thoracic vertebra, T13; additional 13th thoracic vertebra T13; pancreatic lesion; colon cancer;
    hepatic vessels; tumour; lung tumours; intestine; adrenal; rectum; head of femur right"""
VALID = """version: 1
terms:
  - name: left thumb
    kind: bone
    side: left
    aliases: [pollex left]
    descriptions: ["Shortest digit of the left hand, set apart from the rest."]
"""


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def forms(name: str) -> set[str]:
    """A name, the same without its side, and both in singular and plural."""
    whole = words(name)
    bare = " ".join(word for word in whole.split() if word not in ("left", "right"))
    singular = {form.removesuffix("s") if len(form) > 4 else form for form in (whole, bare)}
    return (
        {whole, bare} | singular | {form + "s" for form in singular} | {re.sub("y$", "ies", form) for form in singular}
    )


@pytest.fixture(scope="module")
def terms() -> Terms:
    return load_terms()


@pytest.fixture
def published(tmp_path):
    """Writes text as a published dictionary and gives its path."""

    def write(text: str, name: str = "terms.json"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_the_dictionary_is_of_the_size_we_wrote(terms):
    assert len(terms) == 193
    assert sum(len(term.descriptions) for term in terms.values()) == 1568
    assert set(Counter(term.kind for term in terms.values())) <= set(KINDS)
    assert Counter(term.side for term in terms.values()) == {"left": 46, "right": 46, None: 101}
    assert load_terms("en") is terms  # read once


@pytest.mark.parametrize("name", [*TOTALSEGMENTATOR, *OPENKBP.values(), *map(str.strip, M3D.split(";"))])
def test_names_of_the_data_sets_are_known(terms, name):
    term = terms.find(" ".join(name.split()))
    side = set(re.findall("left|right", name))
    assert side == ({term.side} if term.side else set())


def test_every_published_name_is_known_and_no_phrase_is_copied(terms, shared_data):
    theirs = read_published(shared_data / "data" / "text" / "m3d_term_dictionary.json")
    assert len(theirs) == 223
    assert {name for name in theirs if terms.find(name).side != (re.findall("left|right", name) or [None])[0]} == set()
    copied = {words(phrase) for phrases in theirs.values() for phrase in phrases}
    assert not copied & {words(phrase) for term in terms.values() for phrase in term.descriptions}
    assert sum(map(len, theirs.values())) == 3872  # 4,060 as published, 188 of them repeated within their term


def test_no_description_says_its_own_name(terms):
    leaks = [
        (term.name, phrase)
        for term in terms.values()
        for phrase in term.descriptions
        for form in set().union(*map(forms, (term.name, *term.aliases)))
        if f" {form} " in f" {words(phrase)} "
    ]
    assert leaks == []


def test_descriptions_are_at_least_eight_sentences_of_6_to_25_words_each_said_once(terms):
    assert [term.name for term in terms.values() if len(term.descriptions) < 8] == []
    phrases = [phrase for term in terms.values() for phrase in term.descriptions]
    assert [phrase for phrase in phrases if not 6 <= len(phrase.split()) <= 25] == []
    assert [phrase for phrase in phrases if not (phrase[0].isupper() and phrase.endswith("."))] == []
    assert [phrase for phrase, count in Counter(map(words, phrases)).items() if count > 1] == []


def test_a_sided_term_says_its_own_side_every_time_and_never_the_other(terms):
    for term in terms.values():
        if term.side:
            said = [set(re.findall(r"\b(left|right)\b", phrase.lower())) for phrase in term.descriptions]
            assert said == [{term.side}] * len(said), term.name
            assert re.search(rf"\b{term.side}\b", term.name)


def test_members_of_families_are_told_apart_by_their_facts():
    assert "odontoid" in " ".join(find("C2").descriptions).lower()
    assert "aorta divides" in " ".join(find("lumbar spine L4").descriptions)
    assert "cauda equina" in " ".join(find("lumbar spine L2").descriptions)
    assert "spleen" in " ".join(find("rib left 10").descriptions)
    assert "hepatic" in " ".join(find("rib right 10").descriptions)
    assert "lingula" in " ".join(find("lung upper lobe left").descriptions)
    assert find("lumbar spine L2") != find("lumbar spine L1")  # the published class list has L1 twice


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("adrenal_gland_right", "right adrenal gland"),
        ("Right Suprarenal-Gland", "right adrenal gland"),
        ("Kidney_Left", "left kidney"),
        ("right parotid", "right parotid gland"),
        ("IVC", "inferior vena cava"),
        ("tumour", "tumor"),
        ("  liver   tumor 03", "liver tumor"),
        ("iliac vena left", "left iliac vein"),
        ("cervical spine C1", "vertebra C1"),
        ("additional 13th thoracic vertebra, T13", "vertebra T13"),
        ("right first rib", "right rib 1"),
    ],
)
def test_find_takes_names_as_people_and_data_sets_write_them(said, name):
    assert find(said).name == name


def test_an_unknown_name_is_an_error_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"no term is called 'galbladder'; did you mean 'gallbladder'\?"):
        find("galbladder")
    with pytest.raises(ValueError, match="no term is called 'qqqq'; data_prep"):
        describe("qqqq")
    with pytest.raises(FileNotFoundError, match=r"lang='xx'; add data_prep/terms/xx/\*\.yaml"):
        load_terms("xx")


def test_the_first_description_in_evaluation_and_a_seeded_one_in_training():
    phrases = find("spleen").descriptions
    assert describe("spleen") == phrases[0]
    drawn = [describe("spleen", random.Random(seed)) for seed in range(100)]
    assert drawn == [describe("Spleen", random.Random(seed)) for seed in range(100)]
    assert set(drawn) == set(phrases)


def test_a_term_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        find("liver").kind = "bone"


def test_own_terms_are_read_and_found_beside_ours(terms, tmp_path):
    (tmp_path / "hand.yaml").write_text(VALID, encoding="utf-8")
    own = read_terms(tmp_path / "hand.yaml")
    both = Terms([*terms.values(), *own])
    assert both.find("Pollex_left") == own[0]
    assert describe("left thumb", terms=both) == "Shortest digit of the left hand, set apart from the rest."
    with pytest.raises(ValueError, match="names two terms, 'left kidney' and 'twin'"):
        Terms([terms["left kidney"], Term(name="twin", kind="organ", aliases=("kidney_left",), descriptions=("x",))])


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kind: bone", "kind: bon", r"hand\.yaml: term 'left thumb' \(number 1\): kind: Input should be 'organ'"),
        ("side: left", "side: both", r"term 'left thumb' \(number 1\): side: Input should be 'left' or 'right'"),
        ("    kind: bone\n", "", r"term 'left thumb' \(number 1\): kind: Field required"),
        ("kind: bone", "kind: bone\n    colour: red", r"term 'left thumb' \(number 1\): colour: "),
        ("name: left thumb", "name: 3", r"term 3 \(number 1\): name: Input should be a valid string"),
        ('["Shortest digit of the left hand, set apart from the rest."]', "[]", r"descriptions: .*at least 1 item"),
        ("version: 1", "version: 2", r"hand\.yaml: expected the keys 'version: 1' and 'terms'"),
        ("version: 1", "version: 1\nmore: 2", "and no others"),
        ("terms:\n", "terms: [\n", r"hand\.yaml: not YAML"),
        (VALID, "version: 1\nterms: [thumb]\n", r"hand\.yaml: term None \(number 1\): term: "),
        (VALID, "version: 1\nterms: thumb\n", r"hand\.yaml: terms: "),
        (VALID, "", r"hand\.yaml: expected the keys"),
    ],
)
def test_a_broken_yaml_is_named_with_term_and_key(tmp_path, old, new, said):
    assert old in VALID
    path = tmp_path / "hand.yaml"
    path.write_text(VALID.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=said) as caught:
        read_terms(path)
    assert "\n" not in str(caught.value)


MINIATURE = {"liver": ["Makes bile.", "Big gland.", "Makes bile. "], "gall bladder": ["Stores bile."]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("terms.json", json.dumps(MINIATURE)),
        ("term_dictionary.py", f"# phrases\nterm_dict = {MINIATURE!r}\n"),
        ("term_dictionary.py", f'"""Doc."""\nimport os\nVERSION = 3\nterms: dict[str, list[str]] = {MINIATURE!r}\n'),
    ],
)
def test_both_published_forms_are_read_and_repetitions_counted(published, caplog, name, text):
    with caplog.at_level(logging.INFO, logger="data_prep.terms.dictionary"):
        read = read_published(published(text, name))
    assert read == {"liver": ("Makes bile.", "Big gland."), "gall bladder": ("Stores bile.",)}
    assert "2 terms, 1 repeated descriptions dropped" in caplog.text


def test_the_python_form_is_never_run(published, tmp_path):
    mark = tmp_path / "ran"
    text = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nterms = {{'liver': ['Makes bile.']}}\n"
    assert read_published(published(text, "terms.py")) == {"liver": ("Makes bile.",)}
    assert not mark.exists()


def test_a_name_given_twice_is_told(published, caplog):
    read = read_published(published('{"liver": ["One."], "liver": ["Two."]}'))
    assert read == {"liver": ("Two.",)}
    assert "'liver' is given twice; the last one counts" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.json", '{"liver": ["Makes', r"t\.json: not a published term dictionary"),
        ("t.json", '["liver"]', "expected one object of name"),
        ("t.json", '{"liver": "Makes bile."}', r"t\.json: 'liver': expected a list with at least one description"),
        ("t.json", '{"liver": []}', r"t\.json: 'liver': expected a list"),
        ("t.json", '{"liver": ["Makes bile.", 7]}', r"t\.json: 'liver': description 2 is 7, expected text"),
        ("t.json", '{"liver": [" "]}', r"'liver': description 1 is ' ', expected text"),
        ("t.json", '{"": ["Makes bile."]}', r"t\.json: the name '' is not text"),
        ("t.py", "terms = {'liver': [", r"t\.py: not a published term dictionary"),
        ("t.py", "x = 1\n", "expected one assigned dict literal, found 0"),
        ("t.py", "a = {}\nb = {}\n", "found 2"),
        ("t.py", "terms = {'liver': open('x')}\n", r"t\.py: .*line 1: .*open.* is not a literal"),
        ("t.py", "terms = {3: ['x']}\n", r"t\.py: the name 3 is not text"),
        ("t.py", "terms = {**{'liver': ['x']}}\n", r"t\.py: the name None is not text"),
        ("t.txt", "liver", r"t\.txt: a published term dictionary ends in \.json or \.py"),
    ],
)
def test_a_broken_published_file_is_named_with_the_key(published, name, text, said):
    with pytest.raises(ValueError, match=said):
        read_published(published(text, name))


def test_published_phrases_take_the_place_of_ours(published):
    listed = {"gall bladder": ["A sac."], "gallbladder": ["A sac.", "A bag."], "pinna left": ["Left ear."]}
    theirs = published_terms(published(json.dumps(listed)))
    assert list(theirs) == ["gallbladder", "pinna left"]
    assert theirs.find("Gall_Bladder").descriptions == ("A sac.", "A bag.")
    assert theirs["gallbladder"].kind == "organ"
    assert (theirs["pinna left"].kind, theirs["pinna left"].side) == ("other", "left")
    assert describe("gallbladder", terms=theirs) == "A sac."
    with pytest.raises(ValueError, match="no term is called 'spleen'"):
        theirs.find("spleen")
