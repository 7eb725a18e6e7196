"""Questions that a blind reader cannot answer, and phantoms and patients that are told apart."""

import itertools
import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from data_prep.derived import derived_drafts
from data_prep.derived.questions import questions
from data_prep.derived.scene import Scene
from data_prep.openkbp import cases, read_case
from data_prep.phantoms import NAMES, head_neck


@pytest.mark.parametrize("seed", [0, 5])
def test_a_phantom_answers_alike_on_every_grid(seed):
    kinds = ("report", "vqa", "rec")
    answers = []
    for codes in ("PLI", "SPL", "RAS"):
        case = replace(head_neck(seed, orientation=codes, without=["larynx"]), unit="arbitrary")  # noise differs
        answers.append(derived_drafts(case, random.Random(seed), kinds=kinds))
    assert answers[0] == answers[1] == answers[2]
    assert len({one.subtask for one in answers[0]}) >= 10
    assert str(answers[0][0].text).startswith("Head and neck CT, ")


def usual_rate(scenes, seeds=3):
    """Per family, how often a question's usual answer is right: the most that a blind reader can get."""
    seen = defaultdict(lambda: defaultdict(Counter))
    for scene, seed in itertools.product(scenes, range(seeds)):
        for one in questions(scene, random.Random(f"{scene.case.id}/{seed}")):
            lead = one.text.partition(": the ")[0].partition(", the ")[0]
            asked_of = one.text if lead == one.text else (lead, *sorted(one.options))
            seen[one.subtask][asked_of][one.options[one.choice]] += 1
    return {
        family: sum(max(c.values()) for c in counts.values()) / sum(sum(c.values()) for c in counts.values())
        for family, counts in seen.items()
    }


def test_phantoms_leave_no_answer_to_guess():
    scenes = []
    for seed in range(30):
        rng = random.Random(seed)
        without = [name for name in NAMES.values() if rng.random() < 0.1]
        scenes.append(Scene.of(head_neck(seed, shape=(48, 40, 50), spacing=(5.0, 5.0, 6.0), without=without)))
    rates = usual_rate(scenes)
    for family in ("larger", "volume", "present", "count", "height", "asymmetry"):
        assert rates[family] <= 0.75, (family, rates[family])


def test_real_captions_differ_and_real_answers_vary(shared_data):
    scenes, captions = [], Counter()
    for folder in cases(shared_data / "data" / "openkbp", "validation")[:12]:
        case = read_case(folder)
        drafts = derived_drafts(case, random.Random(case.id), kinds=["rec", "seg", "retrieval"])
        assert not any(() in (one.boxes, one.masks) for one in drafts)
        captions.update(one.text for one in drafts if one.task == "retrieval")
        scenes.append(Scene.of(case))
    assert len(captions) == len(scenes)
    for text in captions:
        assert 2 <= text.count(". ") + 1 <= 4
    rates = usual_rate(scenes)
    for family in ("larger", "volume", "comparison", "extent", "asymmetry", "distance", "density", "length", "height"):
        assert rates[family] <= 0.75, (family, rates[family])
    assert len(rates) >= 10
