"""The shipped configs of the bundled model fit together: each stage begins where another ends."""

import pytest

from m3d.config import config_root, load_config
from m3d.recipes import chain
from m3d.recipes.registry import recipe, stage_of

PATHS = sorted((config_root() / "tiny").glob("*.yaml"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_config_is_read_by_its_recipe(path):
    stage = stage_of(path)
    assert load_config(recipe(stage).Config, path).stage == stage


def test_the_chain_hands_every_stage_what_it_begins_from():
    links = list(chain.load(load_config(chain.Config, "configs/tiny/chain.yaml", ["root=/somewhere"])))
    stages = ["pretrain_words", "pretrain_segvol", "align", "instruct", "instruct", "merge", "pretrain_clip"]
    assert [stage for stage, _ in links] == stages
    made: list[str] = []
    for _, link in links:
        parents = [folder for folder in link.parents().values() if folder is not None]
        assert set(parents) <= set(made)
        assert link.output.startswith("/somewhere/runs/tiny/")
        made.append(link.output)
    assert "/somewhere/runs/tiny/m3d-tiny" in made
    stores = {link.data.stores for _, link in links if hasattr(link, "data")}
    assert stores == {("/somewhere/stores/openkbp", "/somewhere/stores/phantoms")}
    named = {step.config for step in load_config(chain.Config, "configs/tiny/chain.yaml").stages}
    assert named == {f"configs/tiny/{path.name}" for path in PATHS} - {"configs/tiny/chain.yaml"}


def test_the_tower_is_taught_slowly_once_it_has_learned():
    instruct = load_config(recipe("instruct").Config, "configs/tiny/instruct.yaml")
    assert instruct.optim.lr_by_part["vision_tower"] <= instruct.optim.lr / 4
    align = load_config(recipe("align").Config, "configs/tiny/align.yaml")
    assert align.parts.vision_tower == "frozen"
    assert align.loss.boxes > 0  # digits alone taught it every usual answer, and never to look
