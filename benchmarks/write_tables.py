"""Write the stored results into the documents, so that no number there is typed by hand.

python benchmarks/write_tables.py          # rewrites the marked blocks of README.md and MODEL_CARD.md
"""

import json
import re
from pathlib import Path

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results"
DOCUMENTS = (HOME / "README.md", HOME / "MODEL_CARD.md")
TITLES = {"dice": "Dice", "iou": "box IoU", "vqa": "closed VQA accuracy"}


def accuracy() -> str:
    """Dice, box IoU and closed VQA of the bundled model beside its blind twin."""
    result = json.loads((RESULTS / "tiny_accuracy.json").read_text(encoding="utf-8"))
    metrics = result["metrics"]
    lines = ["| | n | model | blind |", "|---|---|---|---|"]
    for kind, title in TITLES.items():
        names = [name for name in metrics if name.startswith(f"{kind}/") and not name.endswith(("/mean", "/chance"))]
        for name in [*names, f"{kind}/mean"]:
            row, what = metrics[name], name.split("/")[1]
            bold = "**" if what == "mean" else ""
            lines.append(f"| {title}, {bold}{what}{bold} | {row['n']} | {row['model']:.2f} | {row['blind']:.2f} |")
    chance = metrics["vqa/chance"]["model"]
    return "\n".join(
        [
            f"`{result['model']}` on {result['patients']} OpenKBP validation patients "
            f"(`{result['command']}`); chance in closed VQA is {chance:.2f}.",
            "",
            *lines,
        ]
    )


def parity() -> str:
    """Largest absolute difference to the reference on each fixture."""
    rows = json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))["max_abs_error"]
    return "\n".join(
        ["| fixture | values compared | largest absolute error |", "|---|---|---|"]
        + [f"| {name} | {row['values']:,} | {row['error']:.1e} |" for name, row in rows.items()]
    )


BLOCKS = {"accuracy": accuracy, "parity": parity}


def rewrite(text: str) -> str:
    """Put each table between its markers."""
    for name, table in BLOCKS.items():
        block = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        if block.search(text):
            new = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
            text = block.sub(lambda _, new=new: new, text)
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(rewrite(document.read_text(encoding="utf-8")), encoding="utf-8")
