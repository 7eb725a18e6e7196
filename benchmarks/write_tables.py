"""Write the stored results into the documents, so that no number there is typed by hand.

python benchmarks/write_tables.py          # rewrites the marked blocks of README.md, MODEL_CARD.md and docs/
"""

import json
import re
from pathlib import Path

HOME = Path(__file__).parents[1]
RESULTS = HOME / "benchmarks" / "results"
DOCUMENTS = (HOME / "README.md", HOME / "MODEL_CARD.md", HOME / "docs" / "data.md", HOME / "docs" / "training.md")
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


def formats() -> str:
    """Bytes and read times of every format and kind of number."""
    result = json.loads((RESULTS / "store_formats.json").read_text(encoding="utf-8"))
    kinds = result["formats"]
    names = sorted(kinds["uint8 [0,1]"], key=lambda name: kinds["uint8 [0,1]"][name]["read_ms"])
    lines = ["| MiB / read ms | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        cells = [f"{kinds[kind][name]['mib']:.2f} / {kinds[kind][name]['read_ms']:.2f}" for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    against, worst = result["against float32 npy"], result["largest error of uint8 in a 600 HU window, HU"]
    return "\n".join(
        [
            *lines,
            "",
            f"uint8 `.npy` against the reference's float32 `.npy`: {against['bytes']:.1f} times fewer bytes, read "
            f"{against['read time']:.1f} times faster; its largest error in a 600 HU window is {worst:.2f} HU.",
        ]
    )


def families() -> str:
    """How far each family of derived questions can be answered blind."""
    result = json.loads((RESULTS / "derived_questions.json").read_text(encoding="utf-8"))
    lines = ["| family | n | chance | most frequent answer | usual answer to the question |", "|---|---|---|---|---|"]
    for name, row in result["families"].items():
        lines.append(f"| {name} | {row['n']} | {row['chance']:.2f} | {row['majority']:.2f} | {row['usual']:.2f} |")
    said = ", ".join(f"{some} of {whole} {task} texts" for task, (some, whole) in result["distinct texts"].items())
    return "\n".join([*lines, "", f"{result['patients']} patients (`{result['command']}`); distinct: {said}."])


def packing() -> str:
    """Exchanges a second: each with its own look at the volume, sharing one, and packed into a row."""
    result = json.loads((RESULTS / "packing.json").read_text(encoding="utf-8"))
    lines = ["| model | losses | apart | volume shared | packed | packed / apart |", "|---|---|---|---|---|---|"]
    for size, row in result["sizes"].items():
        for losses in ("words and masks", "words alone"):
            rate, gain = row[losses]["exchanges a second"], row[losses]["packed / apart"]
            cells = " | ".join(f"{rate[way]:.2f}" for way in ("apart", "shared", "packed"))
            lines.append(f"| {size} ({row['parameters'] / 1e6:.0f} M) | {losses} | {cells} | {gain:.1f} |")
    return "\n".join([*lines, "", f"Exchanges a second, {result['machine'].strip(', ')}, beside other work."])


BLOCKS = {"accuracy": accuracy, "parity": parity, "formats": formats, "families": families, "packing": packing}


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
