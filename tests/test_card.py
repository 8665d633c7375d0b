"""The model card: metadata the Hub can read, no number that was not measured, nothing from outside that acts."""

import json
import re
import socket

import pytest
import yaml
from huggingface_hub import ModelCard
from test_checkpoint import report

from hf_prune import card

EVIL = [
    "a`b``c",
    "]( javascript:alert(1) ) <script>alert(1)</script>",
    "{{ 7 * 7 }} {% raw %}",
    "x\n---\nlicense: mit\n---\n# Owned",
    "'\"\n- tag: !!python/object/apply:os.system [id]",
    "a | b | c \\| d",
    "![](http://tracker/p.png) <img src=x onerror=1> @everyone",
    "\u202egnp.exe \x1b[31m\u2028# line",
    "```\n# out of the fence\n```",
]


def full(**changes: object) -> dict:
    """The report of a run on Hub data, with `a.b` style changes."""
    found = report()
    found["model"].update(source="google/vit", license="apache-2.0", revision="0123456789abcdef", classes=5)
    found["command"] = "hf-prune google/vit --nm 2:4"
    found["layers"][0]["dense_reason"] = None
    found["calibration"].update(dataset="timm/mini-imagenet", hub=True, split="train", config=None)
    found["evaluation"].update(dataset="timm/mini-imagenet", hub=True, split="validation", config=None, skipped=0)
    for path, value in changes.items():
        *way, last = path.split("__")
        place = found
        for step in way:
            place = place[int(step) if step.isdigit() else step]
        place[last] = value
    return found


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the card is rendered without network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def head(text: str) -> dict:
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert match, "a card starts with its metadata"
    return yaml.safe_load(match[1])


def body(text: str) -> str:
    return text.split("\n---\n", 1)[1]


def outside_code(text: str) -> str:
    """The body without fenced blocks and code spans: what markdown acts on."""
    text = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "", body(text), flags=re.S | re.M)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text)


def test_metadata() -> None:
    data = head(card.render(full(), name="vit-2of4"))
    assert data["base_model"] == "google/vit"
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert data["license"] == "apache-2.0"
    assert data["tags"] == ["pruned", "sparse", "2:4", "hf-prune"]
    assert data["datasets"] == ["timm/mini-imagenet"]
    (index,) = data["model-index"]
    assert index["name"] == "vit-2of4"
    (result,) = index["results"]
    assert result["task"]["type"] == "image-classification"
    assert result["dataset"] == {"name": "timm/mini-imagenet", "type": "timm/mini-imagenet", "split": "validation"}
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.5)]


def test_the_hub_library_reads_the_card_back() -> None:
    read = ModelCard(card.render(full()))
    assert read.data.base_model == "google/vit"
    assert read.data.eval_results[0].metric_value == 0.5


def test_metadata_of_a_local_timm_backbone_without_evaluation() -> None:
    changed = full(
        evaluation=None, model__hub=False, model__source="/home/me/private/net", model__revision=None,
        model__library="timm", model__classes=None, model__license=None, pattern="70% (layer)",
        calibration__dataset="/home/me/pics",
        calibration__hub=False,
    )  # fmt: skip
    text = card.render(changed)
    data = head(text)
    assert data["tags"] == ["pruned", "sparse", "hf-prune"]
    assert data["pipeline_tag"] == "image-feature-extraction" and data["library_name"] == "timm"
    assert not {"base_model", "license", "datasets", "model-index"} & set(data)
    assert "/home/me" not in text, "a card tells the names of local things, not where they lie"
    assert "`net`" in text and "`pics`" in text
    assert 'timm.create_model("local-dir:net-70pct", pretrained=True)' in text


def test_what_was_measured_is_said_with_its_interval_and_number_of_images() -> None:
    text = card.render(full())
    assert "| top-1 accuracy | 90.0 % [80.0, 95.0] | 50.0 % [40.0, 60.0] |" in text
    assert "| same top-1 answer as the dense model |  | 60.0 % |" in text
    assert "| relative squared error of the logits | 0 | 0.3 |" in text
    assert "on the same 20 images of `timm/mini-imagenet`, split `validation`" in text
    assert "top-5" not in text, "it was not measured"


def test_without_evaluation_the_card_says_so_and_has_no_accuracy() -> None:
    text = card.render(full(evaluation=None))
    assert "**Not evaluated.**" in text and "Not evaluated: measure it" in text
    assert "accuracy |" not in text and "model-index" not in head(text)


NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def test_every_number_comes_from_the_report() -> None:
    """Change every figure of the report to one that occurs nowhere else; the numbers of the card must follow."""
    changed = full(
        layers=full()["layers"][:1], layers__0__error_before=0.71234, layers__0__error_after=0.31234,
        layers__0__weight_norm_ratio=0.87654,
        evaluation__samples=737, evaluation__agreement=0.61234, evaluation__logit_error=0.41234,
        evaluation__dense={"top1": 0.91234, "top1_interval": [0.81234, 0.95123], "top5": 0.98765},
        evaluation__pruned={"top1": 0.51234, "top1_interval": [0.40123, 0.60123], "top5": 0.77654},
        calibration__samples=373, calibration__skipped=17, resources__seconds=1235.0,
        resources__peak_host_bytes=7654321,
        seed=4711, versions={}, recipe={"name": "snows"},
    )  # fmt: skip
    del changed["layers"][0]["seconds"]
    allowed = {"0.712", "0.312", "0.877", "737", "61.2", "0.4123", "91.2", "81.2", "95.1", "98.8", "51.2", "40.1",
               "60.1", "77.7", "373", "17", "20", "35", "7.7", "4711"}  # fmt: skip
    allowed |= {"2", "4", "1", "5", "0"}  # 2:4, 2of4, top-1, top-5, and the dense model's error against itself
    allowed |= {"95", "32", "50.0", "16", "8", "100"}  # the interval's level, entries, share of zeros, 4x8
    text = re.sub(r"\A---\n.*?\n---\n", "", card.render(changed), flags=re.S)
    text = re.sub(r"0123456789abcdef|https://\S+|sh\n.*?```|4x8", "", text, flags=re.S)
    assert set(NUMBER.findall(text)) <= allowed, set(NUMBER.findall(text)) - allowed
    for figure in (
        "0.712",
        "0.312",
        "737",
        "61.2",
        "0.4123",
        "51.2",
        "40.1",
        "77.7",
        "373",
        "17",
        "7.7",
        "20 min 35 s",
    ):
        assert figure in text


def test_no_speed_is_claimed() -> None:
    text = card.render(full())
    assert "2:4 stored dense; no inference speed was measured" in text
    assert not re.search(r"(?i)faster|speed-?up|\bx\b\s*speed", text)


def test_layers_are_under_their_names_on_disk_and_dense_ones_have_their_reason() -> None:
    changed = full(layers__0__checkpoint_name="encoder.layer.0.query.weight", layers__1__dense_reason="it is the head")
    text = card.render(changed)
    assert "| `encoder.layer.0.query.weight` | 4x8 | `2:4` | 50.0 % | 0.5 | 0.25 | 0.9 |" in text
    assert "dense: it is the head" in text
    assert "1 of 2 weight tensors follow it; 50.0 % of their 32 entries are zero" in text


def test_snippets_are_python() -> None:
    for library in ("transformers", "timm", "torch"):
        for classes in (None, 5):
            text = card.render(full(model__library=library, model__classes=classes), name='evil" + x')
            (snippet,) = re.findall(r"```python\n(.*?)\n```", text, re.S)
            compile(snippet, "card", "exec")
            assert '"evil' not in snippet or "evil" in re.findall(r'"([^"]*)"', snippet)[-1]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize(
    "place",
    ["model__source", "model__license", "model__revision", "command", "calibration__dataset", "calibration__split",
     "evaluation__dataset", "evaluation__config", "layers__0__checkpoint_name", "layers__1__dense_reason",
     "recipe__name", "recipe__description", "recipe__skip", "resources__device"],
)  # fmt: skip
def test_nothing_from_outside_acts(place: str, evil: str) -> None:
    text = card.render(full(**{place: [evil] if place.endswith("skip") else evil}), name="net")
    data = head(text)
    assert data.get("license") != "mit" and set(data) <= set(head(card.render(full())))
    assert ModelCard(text).data.tags == ["pruned", "sparse", "2:4", "hf-prune"]
    assert "49" not in body(text), "no template expression was evaluated"
    assert not re.search(r"[\u202a-\u202e\u2028\u2029\x00-\x08\x0b-\x1f]", text)
    acts = outside_code(text)
    acts = acts.replace("<details>", "").replace("</details>", "").replace("<summary>", "").replace("</summary>", "")
    acts = re.sub(r"\[\]?\(https://huggingface.co/google/vit\)|\[hf-prune\]\(https://\S+\)", "", acts)
    assert not re.search(r"(?<!\\)[<>]", acts), acts
    assert not re.search(r"(?<!\\)!?\](?=\()", acts.replace("[](https://huggingface.co/google/vit)", "")), acts
    assert not re.search(r"^# (Owned|line|out)", acts, re.M)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "4x8" in line]
    assert len(rows) == 2
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 8 for row in rows), rows


def test_a_title_from_outside_is_code_too() -> None:
    for evil in EVIL:
        text = card.render(full(), name=evil)
        assert sum(line.startswith("# ") for line in outside_code(text).splitlines()) <= 1
        assert head(text)["model-index"][0]["name"]


def test_a_report_read_from_disk_renders_the_same_card(tmp_path) -> None:
    changed = full()
    (tmp_path / "r.json").write_text(json.dumps(changed))
    assert card.render(json.loads((tmp_path / "r.json").read_text())) == card.render(changed)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (43, "43 s"), (133, "2 min 13 s"), (3900, "1 h 05 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert card.duration(seconds) == text


@pytest.mark.parametrize(("pattern", "text"), [("2:4", "2of4"), ("70% (layer)", "70pct"), ("12.5% (model)", "12.5pct")])
def test_slugs(pattern: str, text: str) -> None:
    assert card.slug(pattern) == text


def test_the_card_says_that_channels_were_reordered() -> None:
    assert "another order" not in card.render(full())
    group = {"channels": 8, "weights": ["a"], "readers": ["b"], "kept_before": 0.7, "kept_after": 0.8, "reason": None}
    told = full() | {"permutation": {"score": "activation", "groups": [group, group, {**group, "reason": "it moved"}]}}
    assert "2 sets of channels were put in another order before that" in card.render(told)


def test_a_distilled_model_is_not_called_untrained() -> None:
    told = {"epochs": 20, "kept": 17, "held_out": 96, "before": 0.4512, "after": 0.3987, "history": [0.4512, 0.3987]}
    text = body(card.render(full(distillation=told)))
    assert "without retraining" not in text
    assert "pruned once, then distilled on its calibration images, by" in text
    assert "after 17 of 20 epochs the loss on 96 calibration images that took no part in the run was 0.3987" in text
    assert "and 0.4512 before them" in text
    text = body(card.render(full(distillation=told | {"kept": 0, "after": 0.4512})))
    assert "pruned once, without retraining, by" in text
    assert "did not lower the loss on 96 calibration images" in text
