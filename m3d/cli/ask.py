"""`m3d ask SCAN "question"`: an answer, with the boxes and masks it speaks of."""

import argparse

from m3d.cli.common import add_scan_options, deliver, open_scan

DESCRIPTION = """\
Ask a question about a scan. Boxes and masks that the answer speaks of come with it, and so do the masks that a model
measured to know it; --out keeps them."""
EPILOG = """\
examples:
  m3d ask ct.nii.gz "Is the mandible visible?"
  m3d ask ct.nii.gz "Which is larger? Choices: A. left parotid B. right parotid"
  m3d ask ct.nii.gz "What is the volume of the brainstem?" --json

The bundled model knows head-and-neck CT and the kinds of question it was trained on; README says which.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's own arguments."""
    add_scan_options(parser)
    parser.add_argument("question", metavar="QUESTION", help="in quotes")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="the longest answer, in tokens (the model's own limit)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask."""
    if not arguments.question.strip():
        raise ValueError("the question is empty")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {arguments.max_new_tokens}")
    scan = open_scan(arguments)
    limit = {} if arguments.max_new_tokens is None else {"max_new_tokens": arguments.max_new_tokens}
    return deliver(arguments, scan.ask(arguments.question, **limit))
