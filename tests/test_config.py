"""Typed YAML: what is wrong is said before anything is loaded."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from m3d.config import config_root, load_config, lookup


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError("lr must be positive")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    name: str
    steps: int = 10
    kind: Literal["adam", "sgd"] = "adam"
    data: str | None = None
    optim: Optim = field(default_factory=Optim)
    weights: dict[str, float] = field(default_factory=dict)
    stages: tuple[Optim, ...] = ()
    by_name: dict[str, Optim] | None = None


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_values_extends_and_overrides(tmp_path):
    write(tmp_path, "base.yaml", "name: base\noptim: {lr: 0.1, betas: [0.5, 0.6]}\nweights: {seg.sem: 2}")
    path = write(tmp_path, "run.yaml", "extends: base.yaml\nname: run\noptim: {lr: 1e-2}")
    recipe = load_config(Recipe, path, ["steps=7", "optim.betas=[0.1, 0.2]", "data=~"])
    assert recipe == Recipe(
        name="run", steps=7, optim=Optim(lr=0.01, betas=(0.1, 0.2)), weights={"seg.sem": 2.0}, data=None
    )


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("name: x\nstep: 3", [], "unknown key 'step'; did you mean 'steps'?"),
        ("name: x", ["optim.beta=3"], "optim: unknown key 'beta'; did you mean 'betas'?"),
        ("name: x\nstages: [{lr: 1}, {lrs: 1}]", [], "stages: 1: unknown key 'lrs'; did you mean 'lr'?"),
        ("name: x\nby_name: {a: {lrs: 1}}", [], "by_name: a: unknown key 'lrs'"),
        ("name: x\nsteps: 1\nsteps: 2", [], "'steps' is given twice"),
        ("name: x\noptim: {lr: -1}", [], "lr must be positive"),
        ("name: x\nsteps: many", [], "steps='many'"),
        ("name: x\nkind: adamw", [], "kind='adamw'"),
        ("name: x", ["steps"], "is no key=value"),
        ("steps: 3", [], "name"),
        ("- 1", [], "must hold keys and values"),
        ("name: [", [], "is not YAML"),
        ("extends: run.yaml", [], "extends itself"),
        ("extends: gone.yaml", [], "gone.yaml: no such config"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, overrides, said):
    path = write(tmp_path, "run.yaml", text)
    with pytest.raises((ValueError, FileNotFoundError), match=said.replace("?", r"\?")):
        load_config(Recipe, path, overrides)


def test_deep_values_are_typed_too(tmp_path):
    path = write(tmp_path, "run.yaml", "name: x\nstages: [{lr: 1}, {}]\nby_name: {a: {lr: 2e-4}}")
    recipe = load_config(Recipe, path)
    assert recipe.stages == (Optim(lr=1.0), Optim())
    assert recipe.by_name == {"a": Optim(lr=2e-4)}


def test_lookup_suggests():
    with pytest.raises(KeyError, match="did you mean 'report'"):
        lookup({"report": 1, "reg": 2}, "reprot")


SHIPPED = sorted(config_root().rglob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_shipped_config_builds(path, tmp_path):
    from data_prep.preprocess import Preprocess
    from data_prep.sources.registry import build_source
    from m3d.bench.config import BenchConfig
    from m3d.cli.data.prepare import PrepareConfig
    from m3d.recipes.registry import recipe, stage_of

    others = {"data": PrepareConfig, "bench": BenchConfig}
    schema = others[path.parent.name] if path.parent.name in others else recipe(stage_of(path)).Config
    config = load_config(schema, path)
    assert yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(config, PrepareConfig):
        assert Preprocess.from_dict(config.preprocess)
        for fields in config.sources:
            assert (
                build_source({k: v for k, v in fields.items() if k != "derive"}, root=tmp_path).name == fields["kind"]
            )


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    from m3d.cli.data.prepare import PrepareConfig

    monkeypatch.chdir(tmp_path)
    shipped = load_config(PrepareConfig, config_root() / "data" / "openkbp.yaml")
    assert load_config(PrepareConfig, "configs/data/openkbp.yaml") == shipped
    with pytest.raises(FileNotFoundError, match=r"configs/data/openkpb\.yaml: no such config"):
        load_config(PrepareConfig, "configs/data/openkpb.yaml")


def test_an_override_reaches_into_a_list(tmp_path):
    path = write(tmp_path, "run.yaml", "name: run\nstages: [{lr: 0.1}, {lr: 0.2}]")
    assert load_config(Recipe, path, ["stages.1.lr=0.5"]).stages == (Optim(lr=0.1), Optim(lr=0.5))
    with pytest.raises(ValueError, match=r"stages\.2\.lr: '2' is none of the 2 entries"):
        load_config(Recipe, path, ["stages.2.lr=0.5"])
    with pytest.raises(ValueError, match="a value stands where"):
        load_config(Recipe, path, ["name.x=1"])


def test_an_override_begins_a_group_where_there_is_none(tmp_path):
    path = write(tmp_path, "run.yaml", "name: run")
    assert load_config(Recipe, path, ["by_name.adam.lr=0.5"]).by_name == {"adam": Optim(lr=0.5)}
    path = write(tmp_path, "none.yaml", "name: run\nby_name: null")
    assert load_config(Recipe, path, ["by_name.adam.lr=0.5"]).by_name == {"adam": Optim(lr=0.5)}


def test_an_override_finds_keys_that_have_dots(tmp_path):
    path = write(tmp_path, "run.yaml", "name: x\nweights: {seg.sem: 2, seg: 1}\nby_name: {a.b: {lr: 1}, a: {lr: 2}}")
    recipe = load_config(Recipe, path, ["weights.seg.sem=3", "weights.seg=5", "by_name.a.b.lr=7", "by_name.a.lr=8"])
    assert recipe.weights == {"seg.sem": 3.0, "seg": 5.0}
    assert recipe.by_name == {"a.b": Optim(lr=7), "a": Optim(lr=8)}
