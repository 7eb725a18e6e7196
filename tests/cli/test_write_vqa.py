"""`m3d data write-vqa` as a person calls it: rules, dry run, privacy, a model on disk, and one that is given."""

import asyncio
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data_prep.questions_from_reports import Job, Patience, Reply, Report, write_questions
from data_prep.records import read_records
from m3d.cli.data import write_vqa
from m3d.inference.chat import LocalChat

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
TEXT = "Axial CT, arterial phase. A mass in the head of the pancreas."
MEDIA = {
    "image_id": "ct1", "kind": "volume", "path": "images/ct1.npy", "modality": "CT", "shape": [32, 64, 64],
    "axes": "DHW", "intensity": {"unit": "norm01"},
}  # fmt: skip


@pytest.fixture
def table() -> Path:
    Path("reports.csv").write_text(f'image,text\na.npy,"{TEXT}"\nb.npy,No finding.\n', encoding="utf-8")
    return Path("reports.csv")


@pytest.fixture
def records() -> Path:
    entries = [
        {
            "schema": "m3d.record/1", "id": "set/ct1/report", "image_id": "ct1", "patient_id": "p1", "split": "train",
            "source": {"dataset": "set"}, "media": [MEDIA], "task": "report", "prompt": {"template": "m3d.report"},
            "target": {"text": TEXT},
        }
    ]  # fmt: skip
    Path("records.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
    return Path("records.jsonl")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """A folder with a language model of random weights that reads bytes."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    alphabet = {token: i for i, token in enumerate(["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=8192, eos_token_id=1, pad_token_id=0, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Obliging:
    """An endpoint that asks about the plane and agrees with itself."""

    model, kind = "obliging", "given"

    def __init__(self):
        self.calls = 0

    async def chat(self, messages, *, seed):
        self.calls += 1
        system, user = messages[0]["content"], messages[1]["content"]
        if system.startswith("You write"):
            options = ["axial", "coronal", "sagittal", "oblique"]
            entry = {"topic": "plane", "question": "How do the images lie?", "options": options, "answer": "A"}
            said = {"questions": [entry]}
        elif system.startswith("You are a strict"):
            said = {"verdicts": [{"topic": "plane", "keep": True, "why": ""}]}
        else:
            said = {"answers": {"plane": re.search(r"^([A-D])\. axial$", user, re.MULTILINE)[1]}}
        return Reply(text=json.dumps(said), prompt_tokens=1000, completion_tokens=100)

    async def close(self):
        pass


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_rules_need_no_model_and_say_what_they_kept(run, table):
    code, out, err = run("data", "write-vqa", table, "--rules", "--out", "vqa", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["kept"] == {"plane": 1, "phase": 1, "organ": 1, "abnormality": 1, "location": 1}
    assert (summary["reports"], summary["rejected"], summary["cost"]) == (2, {"rules": 5}, None)
    assert {row["image_id"] for row in lines("vqa/questions.jsonl")} == {"a.npy"}
    code, _, err = run("data", "write-vqa", table, "--rules", "--out", "vqa")
    assert code == 1
    assert "use --force" in err
    assert run("data", "write-vqa", table, "--rules", "--out", "vqa", "--force")[0] == 0


def test_records_beside_the_reports_come_out_of_records(run, records):
    code, _, err = run("data", "write-vqa", records, "--rules", "--out", "vqa")
    assert code == 0, err
    found = list(read_records("vqa/records.jsonl"))
    assert len(found) == 10
    assert {(record.image_id, record.patient_id) for record in found} == {("ct1", "p1")}
    assert {record.task for record in found} == {"vqa.closed", "vqa.open"}


def test_a_dry_run_shows_the_prompt_and_asks_nobody(run, table):
    url = "http://127.0.0.1:9/v1"
    code, out, err = run("data", "write-vqa", table, "--base-url", url, "--model", "m", "--dry-run")
    assert code == 0, err
    assert out.startswith("[system]\nYou write examination questions")
    assert TEXT in out
    assert "2 reports" in err
    assert list(Path().glob("*")) == [table]


def test_reports_leave_this_machine_only_when_told(run, table):
    words = ("data", "write-vqa", table, "--out", "vqa", "--base-url", "https://llm.example.org/v1", "--model", "m")
    code, _, err = run(*words)
    assert code == 1
    assert "llm.example.org is not this machine, and reports are patient data" in err
    assert "--allow-remote" in err
    assert not Path("vqa").exists()
    assert run(*words, "--allow-remote", "--dry-run")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base-url", "http://localhost/v1", "--out", "vqa"), "--base-url needs --model NAME"),
        (("--rules",), "--out DIR is needed"),
        (("--rules", "--out", "vqa", "--limit", "0"), "--limit 0 leaves no report"),
        (("--local-model", "nowhere", "--out", "vqa"), "nowhere: no model folder"),
        (("--base-url", "http://localhost/v1", "--model", "m", "--api-key-env", "NOT_SET", "--out", "v"), "NOT_SET"),
    ],
)
def test_what_is_missing_is_said_in_one_line(run, table, words, said):
    code, _, err = run("data", "write-vqa", table, *words)
    assert code == 1
    assert said in err
    assert err.startswith("m3d: error: ")
    assert err.count("\n") == 1


def test_help_says_where_reports_go(run, capsys):
    with pytest.raises(SystemExit):
        run("data", "write-vqa", "--help")
    shown = capsys.readouterr().out
    assert "let the reports leave this machine: they are patient data" in " ".join(shown.split())
    assert "never the key" in shown


def test_a_model_writes_the_cost_is_summed_and_a_rerun_asks_nothing(run, records, monkeypatch):
    endpoint = Obliging()
    monkeypatch.setattr(write_vqa, "_endpoint", lambda arguments: endpoint)
    words = ("data", "write-vqa", records, "--out", "vqa", "--base-url", "http://localhost/v1", "--model", "m")
    code, out, err = run(*words, "--prices", "2,10", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["kept"] == {"plane": 1}
    assert summary["rejected"] == {"write": 4}
    assert (summary["calls"], summary["prompt_tokens"], summary["completion_tokens"]) == (3, 3000, 300)
    assert summary["cost"] == pytest.approx(3 * (1000 * 2 + 100 * 10) / 1e6)
    assert summary["records"] == 2
    before = Path("vqa/questions.jsonl").read_bytes()
    code, out, err = run(*words)
    assert code == 0, err
    assert endpoint.calls == 3
    assert "0.0090" in out
    assert Path("vqa/questions.jsonl").read_bytes() == before
    code, _, err = run("data", "write-vqa", records, "--out", "vqa", "--rules")
    assert code == 1
    assert "give the rules another --out" in err


def test_the_gibberish_of_a_random_model_becomes_rejects(run, table, chatty):
    code, out, err = run(
        "data", "write-vqa", table, "--out", "vqa", "--local-model", chatty, "--device", "cpu", "--max-tokens", "12",
        "--reasks", "1", "--limit", "1", "--json",
    )  # fmt: skip
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["finished"], summary["kept"], summary["rejected"]) == (1, {}, {"write": 1})
    assert (summary["calls"], summary["completion_tokens"], summary["cost"]) == (2, 24, None)
    assert summary["prompt_tokens"] > 2000
    assert lines("vqa/rejects.jsonl")[0]["reason"].startswith("broken JSON in all of 2 replies")
    assert json.loads(Path("vqa/settings.json").read_text())["generator"] == "tiny-chat"


def test_a_template_without_a_system_role_gets_it_before_the_question(chatty):
    endpoint = LocalChat(chatty, device="cpu", max_tokens=4)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert endpoint._tokenizer.decode(endpoint._encode(talk)[0]) == "[system]Be brief.[user]Why?[assistant]"
    endpoint._tokenizer.chat_template = NO_SYSTEM
    assert endpoint._tokenizer.decode(endpoint._encode(talk)[0]) == "[user]Be brief.\n\nWhy?[assistant]"
    replies = [asyncio.run(endpoint.chat(talk, seed=seed)) for seed in (0, 1)]
    assert replies[0] == replies[1]
    assert replies[0].completion_tokens == 4


def test_a_model_without_a_chat_template_is_refused(chatty, tmp_path):
    folder = shutil.copytree(chatty, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template; take the model's chat or instruct version"):
        LocalChat(folder, device="cpu")


def test_what_does_not_fit_into_the_context_is_turned_down(chatty, tmp_path):
    endpoint = LocalChat(chatty, device="cpu", max_tokens=7000)
    summary = write_questions(
        [Report(id="r", image_id="i", text="A mass.")],
        tmp_path,
        endpoint=endpoint,
        job=Job(patience=Patience(retries=0)),
    )
    assert summary.rejected == {"write": 1}
    assert "exceed the context of 8192" in lines(tmp_path / "rejects.jsonl")[0]["reason"]
