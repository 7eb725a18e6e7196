"""Multiple-choice questions from radiology reports: written by a language model as in M3D-VQA, or by offline rules.

Part of m3d-lamed; import through `m3d`.
"""

from data_prep.questions_from_reports.asking import Patience
from data_prep.questions_from_reports.drafts import read_written, to_drafts, to_records
from data_prep.questions_from_reports.endpoints import AskedTooMuch, Endpoint, EndpointError, OpenAIEndpoint, Reply
from data_prep.questions_from_reports.ledger import Prices, Spending
from data_prep.questions_from_reports.progress import Summary
from data_prep.questions_from_reports.prompts import Prompts, load_prompts
from data_prep.questions_from_reports.questions import TOPICS, Question, Rejected
from data_prep.questions_from_reports.reports import Report, read_reports
from data_prep.questions_from_reports.rules import by_rules, write_by_rules
from data_prep.questions_from_reports.write import Job, write_questions

__all__ = [
    "TOPICS",
    "AskedTooMuch",
    "Endpoint",
    "EndpointError",
    "Job",
    "OpenAIEndpoint",
    "Patience",
    "Prices",
    "Prompts",
    "Question",
    "Rejected",
    "Reply",
    "Report",
    "Spending",
    "Summary",
    "by_rules",
    "load_prompts",
    "read_reports",
    "read_written",
    "to_drafts",
    "to_records",
    "write_by_rules",
    "write_questions",
]
