"""How well the derived questions can be answered without looking: a family that needs no image teaches none.

Of each family, on the OpenKBP training patients: chance, how often its most frequent answer is right, and how often the
most frequent answer to that very question is (learned on the same patients, so an upper bound for a blind reader).

    python benchmarks/derived_questions.py --data PATH/openkbp
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from data_prep.atomic import atomic_path
from data_prep.derived import derived_drafts
from data_prep.draft import Draft
from data_prep.openkbp import cases, read_case

RESULT = Path(__file__).parent / "results" / "derived_questions.json"


def rates(drafts: list[Draft]) -> dict[str, float]:
    """``n``, chance and the two majority rates of one family's closed questions."""
    answers = [(str(draft.slots["question"]), (draft.options or ())[draft.choice or 0]) for draft in drafts]
    usual: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in answers:
        usual[question][answer] += 1
    majority = Counter(answer for _, answer in answers).most_common(1)[0][1] / len(answers)
    return {
        "n": len(drafts),
        "chance": round(fmean(1 / len(draft.options or ()) for draft in drafts), 3),
        "majority": round(majority, 3),
        "usual": round(sum(max(counts.values()) for counts in usual.values()) / len(answers), 3),
    }


def main() -> None:
    """Measure, say and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data" / "openkbp")
    given = parser.parse_args()
    if not given.data.is_dir():
        print(f"{given.data} is not here: give --data PATH/openkbp; nothing measured")
        return
    folders = cases(given.data, "train")
    families: dict[str, list[Draft]] = defaultdict(list)
    texts: dict[str, list[str]] = defaultdict(list)
    for folder in tqdm(folders, unit="case"):
        case = read_case(folder)
        for draft in derived_drafts(case, random.Random(f"0/openkbp/{case.id}")):
            if draft.task == "vqa.closed":
                families[str(draft.subtask)].append(draft)
            if draft.task in ("report", "retrieval"):
                texts[draft.task].append(str(draft.text))
    results = {
        "command": "python benchmarks/derived_questions.py",
        "patients": len(folders),
        "families": {name: rates(drafts) for name, drafts in sorted(families.items())},
        "distinct texts": {task: [len(set(said)), len(said)] for task, said in texts.items()},
    }
    with atomic_path(RESULT) as path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for name, row in results["families"].items():
        print(f"{name:12} {row['n']:5} {row['chance']:.2f} {row['majority']:.2f} {row['usual']:.2f}")
    print(f"distinct: {results['distinct texts']}; kept in {RESULT.name}")


if __name__ == "__main__":
    main()
