"""`m3d data verify`, `stats` and `show` on a small store: what they print, write, and how they exit."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.records import read_records
from data_prep.store import Store
from m3d.cli.data.verify import try_to_render
from m3d.inference.overlay import WORDS_LINES, Row, draw_rows
from m3d.inference.planes import Window, mid_planes
from m3d.inference.sample_sheet import choose_samples, contact_sheet, draw_sample

spec = importlib.util.spec_from_file_location("small_store", Path(__file__).parents[1] / "fixtures" / "small_store.py")
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)

TASKS = ("rec.box3d", "reg", "report", "retrieval", "seg.ref", "seg.sem", "vqa.closed", "vqa.open")


@pytest.fixture
def store(tmp_path):
    return small.build(tmp_path / "store")


# --- verify ---


def test_verify_of_a_clean_store_exits_with_0(run, store):
    code, out, err = run("data", "verify", store)
    assert code == 0
    assert "27 records, 3 images; 0 errors, 0 warnings" in out
    assert "not looked at" not in out
    assert "Traceback" not in err


def test_verify_with_an_error_exits_with_1_and_says_what_helps(run, store):
    (store / "images/mini/a.npy").unlink()
    code, out, _ = run("data", "verify", store)
    assert code == 1
    assert "images/mini/a.npy: missing" in out
    assert "m3d data prepare" in out
    assert "1 errors, 0 warnings" in out


def test_verify_with_warnings_only_exits_with_0(run, store):
    (store / "images/mini/.0a1b2c3d.x.npy").write_bytes(b"")
    code, out, _ = run("data", "verify", store)
    assert code == 0
    assert "leftovers" in out
    assert "0 errors, 1 warnings" in out


def test_verify_allow_makes_an_error_a_warning(run, store):
    (store / "images/mini/b.npy").write_bytes((store / "images/mini/a.npy").read_bytes())
    small.seal(store)
    assert run("data", "verify", store)[0] == 1
    assert run("data", "verify", store, "--allow", "volumes")[0] == 0


def test_verify_writes_its_report(run, store, tmp_path):
    (store / "images/mini/a.npy").unlink()
    code, out, _ = run("data", "verify", store, "--out", tmp_path / "report", "--json")
    assert code == 1
    told = json.loads(out)
    assert told == json.loads((tmp_path / "report/verify.json").read_text())
    assert told["checks"]["files"]["errors"] == 1
    assert "## files" in (tmp_path / "report/verify.md").read_text()
    code, _, err = run("data", "verify", store, "--out", tmp_path / "report")
    assert code == 1
    assert "--force" in err


def test_verify_of_records_alone_needs_their_root(run, store, tmp_path):
    alone = tmp_path / "mine.jsonl"
    alone.write_bytes((store / "records.jsonl").read_bytes())
    assert run("data", "verify", alone)[0] == 1
    assert run("data", "verify", alone, "--root", store)[0] == 0


def test_verify_finds_what_no_task_can_write(run, store):
    small.edit(store / "records.jsonl", lambda row: row["prompt"].update(slots={}), id="mini/b/1")
    code, out, _ = run("data", "verify", store, "--json")
    findings = json.loads(out)["checks"]["tasks"]["findings"]
    assert code == 1
    assert [one["where"] for one in findings] == ["records.jsonl:11"]
    assert "needs prompt.slots.object" in findings[0]["message"]


def test_a_template_or_language_of_others_is_told(store):
    record = next(iter(read_records(store / "records.jsonl")))
    assert try_to_render(record) is None
    other = record.model_copy(update={"prompt": record.prompt.model_copy(update={"template": "umit.det3d"})})
    assert "umit.det3d" in try_to_render(other)
    assert "zu" in try_to_render(record.model_copy(update={"lang": "zu"}))


@pytest.mark.parametrize(
    "words", [["--limit", "0"], ["--workers", "x"], ["--similar", "2"], ["--allow", "nothing"], []]
)
def test_verify_misunderstood_exits_with_2(run, store, words):
    with pytest.raises(SystemExit) as stopped:
        run("data", "verify", *([store] if words else []), *words)
    assert stopped.value.code == 2


def test_verify_help_explains_every_check(run, capsys):
    with pytest.raises(SystemExit):
        run("data", "verify", "--help")
    told = capsys.readouterr().out
    assert "near" in told
    assert all(name in told for name in ("schema", "boxes", "answers", "--root", "examples:"))


@pytest.mark.parametrize("command", ["verify", "stats", "show"])
def test_a_folder_that_is_no_store_is_one_line(run, tmp_path, command):
    code, out, err = run("data", command, tmp_path)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "m3d data prepare" in err


# --- stats ---


def test_stats_prints_tables_and_draws(run, store, tmp_path):
    code, out, _ = run("data", "stats", store, "--out", tmp_path / "stats")
    assert code == 0
    assert "| train | 2 | 2 | 18 |" in out
    assert (tmp_path / "stats/stats.md").read_text().strip() == out.strip()
    assert json.loads((tmp_path / "stats/stats.json").read_text())["schema"] == "m3d.stats/1"
    assert (tmp_path / "stats/stats.png").read_bytes().startswith(b"\x89PNG")


def test_no_word_of_the_figure_touches_an_edge(run, store, tmp_path):
    long = "a structure whose name is far longer than that of any other one"
    for image_id in small.SPLITS:
        small.edit(store / "records.jsonl", lambda row: row["target"]["masks"][1].update(name=long), id=f"{image_id}/6")
    run("data", "stats", store, "--out", tmp_path / "stats")
    pixels = np.asarray(Image.open(tmp_path / "stats/stats.png").convert("L"))
    for edge in (pixels[:, :8], pixels[:, -8:], pixels[:8], pixels[-8:]):
        assert edge.min() == 255


def test_stats_without_masks_or_questions_still_draws(run, store, tmp_path):
    rows = [row for row in small.read_lines(store / "records.jsonl") if row["task"] == "report"]
    small.write_lines(store / "records.jsonl", rows)
    code, out, _ = run("data", "stats", store, "--fast", "--out", tmp_path / "stats", "--json")
    assert code == 0
    assert json.loads(out)["structures"] == json.loads(out)["answers"] == {}
    assert (tmp_path / "stats/stats.png").is_file()


# --- show ---


def test_show_draws_each_task_and_says_the_words(run, store, tmp_path):
    code, out, err = run("data", "show", store, "--image", "mini/b", "--out", tmp_path / "look")
    assert code == 0
    assert {path.name for path in (tmp_path / "look").iterdir()} == {"samples.png", *(f"{task}.png" for task in TASKS)}
    assert "Not for clinical use" in err
    assert "asked: How many are labelled?" in out
    assert small.REPORTS["mini/b"] in out
    assert "[SEG]" in out


def test_show_one_task_as_json_goes_to_samples(run, store, elsewhere):
    code, out, _ = run("data", "show", store, "--task", "seg.ref", "--json")
    assert code == 0
    (sample,) = json.loads(out)["samples"]
    assert sample["task"] == "seg.ref"
    assert small.LIVER_WORDS in sample["asked"]
    assert (elsewhere / "samples/seg.ref.png").is_file()
    code, _, err = run("data", "show", store, "--task", "seg.ref")
    assert code == 1
    assert "--force" in err


def test_show_of_a_store_without_records_is_one_line(run, store):
    (store / "records.jsonl").write_text("")
    for words in ([], ["--image", "mini/a"], ["--task", "report"]):
        code, out, err = run("data", "show", store, *words)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        assert "holds no record, so there is nothing to show" in err


@pytest.mark.parametrize(
    ("words", "told"), [(["--image", "mini/z"], "its first is 'mini/a'"), (["--task", "calc"], "it has rec.box3d, reg")]
)
def test_show_what_is_not_there_says_what_is(run, store, words, told):
    code, _, err = run("data", "show", store, *words)
    assert code == 1
    assert told in err


def test_samples_are_chosen_by_their_seed(store):
    first, again = (choose_samples(Store(store), seed=3) for _ in range(2))
    assert [one.record.id for one in first] == [one.record.id for one in again]
    assert [one.record.task for one in first] == list(TASKS)
    others = {tuple(one.record.id for one in choose_samples(Store(store), seed=seed)) for seed in range(5)}
    assert len(others) > 1


def test_a_drawn_target_is_preferred_to_an_absent_one(store):
    small.edit(store / "records.jsonl", lambda row: row["target"].update(boxes=[]), id="mini/a/1")
    for seed in range(8):
        (sample,) = choose_samples(Store(store), tasks=["rec.box3d"], image_id="mini/a", seed=seed)
        assert sample.record.id == "mini/a/0"


def colours(figure):
    figure.canvas.draw()
    return {tuple(pixel) for pixel in np.asarray(figure.canvas.buffer_rgba())[..., :3].reshape(-1, 3).tolist()}


def texts(figure):
    return " | ".join(text.get_text() for text in figure.texts)


def test_a_picture_has_its_words_and_its_target(store):
    small.save_image(store, "mini/a", np.tile(np.array([50, 200], np.uint8), (6, 8, 5)))
    seg, reg = choose_samples(Store(store), tasks=["seg.sem", "report"], image_id="mini/a")
    drawn, plain = draw_sample(seg), draw_sample(reg)
    assert "Segment the liver and the spleen." in texts(drawn)
    assert "as stored" in texts(drawn)
    assert "Not for clinical use" in texts(drawn)
    assert "iliac crest" in texts(plain)

    def coloured(figure):
        return sum(max(pixel) - min(pixel) > 60 for pixel in colours(figure))

    assert coloured(drawn) > coloured(plain)


def test_what_words_mention_is_drawn_for_the_reader(store):
    change = {"slots": {"question": "Is the spleen large?"}}
    small.edit(store / "records.jsonl", lambda row: row["prompt"].update(change), id="mini/a/8")
    (sample,) = choose_samples(Store(store), tasks=["vqa.open"], image_id="mini/a")
    assert "Drawn is what the words mention" in texts(draw_sample(sample))


def test_what_cannot_be_rendered_is_shown_with_its_reason(store):
    small.edit(store / "records.jsonl", lambda row: row["prompt"].update(template="umit.report"), id="mini/a/3")
    (sample,) = choose_samples(Store(store), tasks=["report"], image_id="mini/a")
    assert "umit.report" in sample.problem
    assert "cannot be rendered" in texts(draw_sample(sample))


def test_a_sheet_holds_every_card_in_two_columns(store):
    figures = [draw_sample(one) for one in choose_samples(Store(store), tasks=["reg", "report", "seg.ref"])]
    sheet = contact_sheet(figures)
    assert sheet.width == 2 * 1150 + 3 * 24
    assert contact_sheet(figures[:1]).width == 1150 + 2 * 24


def test_long_words_are_cut_and_short_ones_wrapped(store):
    image = Store(store).images["mini/a"]
    planes = mid_planes(image_volume(image))
    row = [Row(planes, Window(0, 1))]
    long = draw_rows(row, [], title="t", words=[("answer", "word " * 2000)])
    short = draw_rows(row, [], title="t", words=[("asked", "one\ntwo")])
    assert sum("word word" in text.get_text() for text in long.texts) == WORDS_LINES - 1
    assert {"one", "two", "asked"} <= {text.get_text() for text in short.texts}
    assert long.get_figheight() > short.get_figheight() > draw_rows(row, [], title="t").get_figheight()


def image_volume(image):
    from data_prep.store import unpack
    from data_prep.volume import Volume

    return Volume(unpack(image.array()), image.affine)
