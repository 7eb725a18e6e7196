"""`m3d bench`: M3D-Bench, from a model to numbers that can be trusted; one file a subcommand."""

COMMANDS = {
    "run": "ask a model everything of a benchmark config; resumable, in several processes",
    "score": "answers to metrics with intervals, a table and a page; of this model or of any other system",
    "table": "scored runs beside each other and beside published numbers",
    "compare": "two scored runs on the same records: paired differences and whether they are more than chance",
    "judge": "let a language model score the content of answers, 0 to 100",
}
DESCRIPTION = "M3D-Bench: eight tasks, two protocols, every number with its interval and beside a blind twin."
EPILOG = """\
examples:
  m3d bench run configs/bench/derived.yaml --data stores/openkbp --out bench/tiny split=validation
  m3d bench score bench/tiny
  m3d bench table bench/tiny bench/other
  m3d bench compare bench/tiny bench/other

`m3d bench COMMAND --help` explains a command.
"""
