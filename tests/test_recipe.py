"""Recipes: every shipped one loads, what is wrong is said at once and by name, a resolved one reads back the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hf_prune import assets, recipe
from hf_prune.recipe import resolve

SHIPPED = assets.names("recipes")


def message(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


# ------------------------------------------------------------------------------------------------------ shipped ones
def test_the_five_recipes_ship() -> None:
    assert {"snows", "snows-paper", "magnitude", "wanda", "sparsegpt"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("pattern", [{"nm": "2:4"}, {"sparsity": 0.7}])
def test_every_shipped_recipe_resolves(name: str, pattern: dict) -> None:
    run = resolve(name, flags=pattern)
    assert run.recipe.name == name
    assert run.recipe.description, "the description is printed in the model card"
    assert str(run.recipe.pattern()).startswith(("2:4", "70%"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_short_and_leave_the_pattern_to_the_user(name: str) -> None:
    text = assets.path("recipes", name).read_text()
    assert len(text.splitlines()) <= 24
    assert not {"nm", "sparsity"} & set(yaml.safe_load(text))


def test_snows_is_the_default() -> None:
    assert resolve(flags={"nm": "2:4"}) == resolve("snows", flags={"nm": "2:4"})


# --------------------------------------------------------------------------------------------------------- round trip
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("kind", ["yaml", "json", "mapping"])
def test_a_resolved_run_reads_back_the_same(name: str, kind: str, tmp_path: Path) -> None:
    flags = {"sparsity": 0.65, "scope": "model", "skip": ["re:.*fc1", "head"], "dataset": "a: b # 'c'", "seed": 3,
             "eval_split": "test", "eval_samples": 7, "device": "cpu", "prune_stem": True}  # fmt: skip
    run = resolve(name, flags=flags, sets=["mask.method=obs", "mask.ridge=1e-3"])
    source = recipe.dump(run)
    if kind != "mapping":
        source = tmp_path / f"resolved.{kind}"
        source.write_text(recipe.to_yaml(run) if kind == "yaml" else json.dumps(recipe.dump(run)))
    assert resolve(source) == run
    assert recipe.dump(resolve(source)) == recipe.dump(run)


def test_nm_is_dumped_in_a_form_that_other_yaml_readers_take_as_text() -> None:
    # YAML 1.1 reads a bare 2:4 as the number 124, in base 60
    assert yaml.safe_load(recipe.to_yaml(resolve(flags={"nm": "2:4"})))["nm"] == "2:4"


def test_yaml_means_what_people_mean(tmp_path: Path) -> None:
    path = write(
        tmp_path, "nm: 2:4\nmask: {method: obs, ridge: 1e-3}\nsolve: {method: least_squares, tolerance: 1E-4}\n"
    )
    found = resolve(path).recipe
    assert found.nm == "2:4"
    assert found.mask["ridge"] == 0.001
    assert found.solve["tolerance"] == 0.0001
    assert resolve(sets=["nm=1:4"]).recipe.nm == "1:4"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-2", -2), ("0.5", 0.5), (".05", 0.05), ("5.", 5.0), ("1e-3", 1e-3), ("2.5E4", 2.5e4), ("true", True),
     ("12:30:45", "12:30:45"), ("1_000", "1_000"), ("0x10", "0x10"), ("null", None), ("1:4", "1:4")],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    found = recipe._parse(text)
    assert found == value and type(found) is type(value)


# --------------------------------------------------------------------------------------------------------- precedence
def test_flags_win_over_set_and_set_over_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, "samples: 10\nbatch_size: 3\nseed: 5\nnm: '2:4'\n")
    found = resolve(path, flags={"samples": 30}, sets=["batch_size=8"]).recipe
    assert (found.samples, found.batch_size, found.seed) == (30, 8, 5)


def test_the_users_pattern_replaces_the_recipes_whichever_kind_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, "sparsity: 0.7\nscope: model\n")
    assert str(resolve(path, flags={"nm": "2:4"}).recipe.pattern()) == "2:4"
    assert resolve(path, flags={"sparsity": 0.5}).recipe.scope == "model"
    path.write_text("nm: '2:4'\n")
    assert str(resolve(path, flags={"sparsity": 0.5}).recipe.pattern()) == "50% (layer)"


def test_eval_flags_win_over_no_eval_of_the_recipe_and_the_other_way_round(tmp_path: Path) -> None:
    path = write(tmp_path, "nm: '2:4'\nno_eval: true\n")
    assert resolve(path, flags={"eval_split": "test"}).no_eval is False
    path.write_text("nm: '2:4'\neval_split: test\n")
    assert resolve(path, flags={"no_eval": True}).eval_split is None


def test_options_of_one_method_merge_and_another_method_starts_from_its_defaults() -> None:
    base = {"nm": "2:4", "mask": {"method": "obs", "ridge": 0.3}}
    assert resolve(base, sets=["solve.ridge=.05"]).recipe.mask == {"method": "obs", "ridge": 0.3}
    assert resolve(base, sets=["mask.ridge=.2"]).recipe.mask == {"method": "obs", "ridge": 0.2}
    assert resolve(base, sets=["mask=sparsegpt"]).recipe.mask == {"method": "sparsegpt"}
    assert resolve(base, sets=["mask.method=sparsegpt", "mask.damp=.02"]).recipe.mask == {
        "method": "sparsegpt", "damp": 0.02}  # fmt: skip
    assert resolve(base, sets=["solve=none"]).recipe.solve is None


def test_null_gives_a_default_back(tmp_path: Path) -> None:
    assert resolve({"nm": "2:4", "samples": 99}, sets=["samples=null"]).recipe.samples == 256


# ----------------------------------------------------------------------------------------------------- what is wrong
def test_everything_wrong_is_said_at_once_with_the_nearest_names(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "sample: 10\nbatch_size: 0\nmask: {method: obss}\nsolve: {method: least_squares, rigde: 1}\n"
        "nm: 4:4\nskip: [a.b]\nonly: [a.b]\ntoken: secret\n",
    )
    said = message(path, flags={"eval_samples": 0}, sets=["target.mixx=1", "sed=3"])
    for part in (
        "problems",
        "sample (recipe mine): there is no such key. Did you mean samples",
        "batch_size (recipe mine): expected a whole number of at least 1, found 0",
        "there is no method 'obss'; known: magnitude, wanda, obs, sparsegpt, chita, obd, woodfisher, mfac, cbs, alps, "
        "obc, exchange. "
        "Did you mean obs or",
        "least_squares has no option 'rigde'; it has ridge, tolerance. Did you mean ridge?",
        "nm (recipe mine): N:M keeps N of every M weights, so 0 < N < M is needed, found 4:4",
        "'a.b' stands in both only and skip",
        "token (recipe mine): this is said on the command line only (--token)",
        "--eval-samples: expected a whole number of at least 1, found 0",
        "target has no option 'mixx'; it has mix",
        "sed (--set): there is no such key. Did you mean seed",
    ):
        assert part in said, said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("flags", "sets", "part"),
    [
        ({}, [], "give --nm N:M (for example --nm 2:4) or --sparsity S"),
        ({"nm": "2:4", "sparsity": 0.5}, [], "--nm and --sparsity contradict each other"),
        ({"nm": "2:4", "scope": "model"}, [], "--scope: a scope belongs to --sparsity"),
        ({"scope": "model"}, [], "--scope: a scope belongs to --sparsity"),
        ({"nm": "4:2"}, [], "0 < N < M is needed, found 4:2"),
        ({"nm": "0:4"}, [], "0 < N < M is needed"),
        ({"nm": "2of4"}, [], "--nm: expected N:M, for example 2:4, found 2of4"),
        ({"sparsity": 1.0}, [], "must lie between 0 and 1"),
        ({"sparsity": 0.0}, [], "must lie between 0 and 1"),
        ({"sparsity": 70}, [], "must lie between 0 and 1, for example 0.7, found 70"),
        ({"sparsity": "half"}, [], "found half"),
        ({"sparsity": 0.5, "scope": "layers"}, [], "choose one of layer, row, model, found layers"),
        ({"nm": "2:4", "samples": 1}, [], "--samples: expected a whole number of at least 2, found 1"),
        ({"nm": "2:4", "samples": "many"}, [], "found many"),
        ({"nm": "2:4", "seed": -1}, [], "--seed"),
        ({"nm": "2:4", "no_eval": True, "eval_split": "test"}, [], "--no-eval and --eval-split contradict each other"),
        ({"nm": "2:4", "no_eval": True, "eval_dataset": "x"}, [], "--no-eval and --eval-dataset contradict each other"),
        ({"nm": "2:4", "no_eval": True, "eval_samples": 3}, [], "--no-eval and --eval-samples contradict each other"),
        ({"nm": "2:4", "skip": ["head"], "only": ["head"]}, [], "'head' stands in both only and skip"),
        ({"nm": "2:4", "skip": ["re:("]}, [], "'re:(' is not a regular expression"),
        ({"nm": "2:4", "device": "the big one"}, [], "expected a device such as cpu, cuda or cuda:1"),
        ({"nm": "2:4", "dtype": "int8"}, [], "choose one of float32"),
        ({"nm": "2:4"}, ["nm=1:4"], "--nm 2:4 and --set nm=1:4 contradict each other"),
        ({"nm": "2:4"}, ["solve.ridge"], "expected key=value"),
        ({"nm": "2:4"}, ["=1"], "expected key=value"),
        ({"nm": "2:4"}, ["samples.x=1"], "samples has no inner keys"),
        ({"nm": "2:4"}, ["solve={"], "is not a YAML value"),
        ({"nm": "2:4"}, ["trust_remote_code=true"], "on the command line only (--trust-remote-code)"),
        ({"nm": "2:4"}, ["mask=none"], "a mask method is needed"),
        ({"nm": "2:4"}, ["mask=[1]"], "expected a method's name"),
        ({"nm": "2:4"}, ["solve.ridge=much"], "least_squares.ridge is a number, found much"),
        ({"nm": "2:4"}, ["target=3"], "expected a mapping of options, found 3"),
        ({"nm": "2:4"}, ["target.bias=2"], "target.bias is true or false"),
    ],
)
def test_each_mistake_has_its_message(flags: dict, sets: list[str], part: str) -> None:
    assert part in message(flags=flags, sets=sets)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- 1\n- 2\n", "expected a YAML mapping of keys to values"),
        ("", "expected a YAML mapping"),
        ("nm: [2\n", "line 2"),
        ("samples: 1\nsamples: 2\n", "line 2: the key 'samples' stands twice"),
        ("nm: 2:4\nsparsity: .5\n", "nm (recipe mine) and sparsity (recipe mine) contradict each other"),
        ("nm: 2:4\nscope: model\n", "scope (recipe mine): a scope belongs to --sparsity"),
        ("nm: 2:4\n3: x\n", "3 (recipe mine): there is no such key"),
        ("nm: 2:4\nbatch_size: true\n", "batch_size (recipe mine): expected a whole number"),
        ("nm: 2:4\noutput_dir: /\n", "output_dir (recipe mine): this is said on the command line only"),
        ("!!python/object/apply:os.system [id]\n", "could not determine a constructor"),
    ],
)
def test_files_that_are_no_recipes(text: str, part: str, tmp_path: Path) -> None:
    assert part in message(write(tmp_path, text))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert "not text in UTF-8" in message(path)


def test_an_unknown_name_lists_what_ships() -> None:
    said = message("snow", flags={"nm": "2:4"})
    assert "--recipe snow: there is no such file" in said and "sparsegpt" in said and "Did you mean snows" in said


def test_a_file_of_a_shipped_name_is_reached_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("snows").write_text("nm: '1:4'\n")
    assert resolve("./snows").recipe.nm == "1:4"
    assert "what to keep" in message("snows")


# ------------------------------------------------------------------------------------------------- for Python callers
def test_load_takes_names_paths_mappings_and_recipes(tmp_path: Path) -> None:
    first = recipe.load("snows", nm="2:4")
    assert recipe.load(first) == first
    assert recipe.load(first, samples=9).samples == 9
    assert recipe.load(write(tmp_path, "nm: 2:4\n")).name == "mine"
    assert recipe.load({"nm": "2:4"}).name == "custom"
    assert recipe.load("snows", nm="2:4", solve={"ridge": 0.5}).solve == {"method": "least_squares", "ridge": 0.5}
    assert recipe.load("snows", nm="2:4", solve="none").solve is None


def test_load_refuses_what_only_the_command_reads() -> None:
    with pytest.raises(ValueError, match="dataset: only the hf-prune command reads this; pass the images as `batches`"):
        recipe.load("snows", nm="2:4", dataset="x")


def test_nothing_is_loaded_to_find_a_mistake() -> None:
    code = (
        "import sys\nfrom hf_prune.recipe import resolve\n"
        "try: resolve(flags={'nm': '9:4', 'smaples': 3})\nexcept ValueError as e: print(e)\n"
        "print(sorted({'transformers', 'timm', 'datasets', 'accelerate', 'huggingface_hub'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Did you mean samples" in answer.stdout and answer.stdout.strip().endswith("[]")
