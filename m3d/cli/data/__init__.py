"""`m3d data`: from data sets and your own scans to verified records and fast volumes; one file a subcommand."""

COMMANDS = {
    "prepare": "read scans once and write a store: small volumes, masks and records",
    "verify": "check a store or a file of records: schema, files, labels, leaks, duplicates",
    "stats": "what a store holds: entries and tasks per image, lengths, labels (PNG and table)",
    "show": "a rendered sample of each task with its picture",
    "pseudo": "regions that grey values alone set apart, for the mask head to learn from",
    "schema": "print the JSON Schema of a record",
    "write-vqa": "questions from reports, by a language model or by rule",
}
DESCRIPTION = "From data sets and your own scans to verified records and fast volumes."
EPILOG = """\
examples:
  m3d data prepare configs/data/openkbp.yaml root=/data/openkbp output=stores/openkbp
  m3d data verify stores/openkbp
  m3d data stats stores/openkbp --out stats
  m3d data show stores/openkbp --out samples

`m3d data COMMAND --help` explains a command.
"""
