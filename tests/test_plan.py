"""Name patterns and the plan as text."""

import pytest

from hf_prune import plan
from hf_prune.loop import Plan, Row

NAMES = {
    "vit.layers.1.attention.q_proj.weight": "vit.encoder.layer.1.attention.attention.query.weight",
    "vit.layers.1.mlp.fc1.weight": "vit.encoder.layer.1.intermediate.dense.weight",
    "vit.layers.10.attention.q_proj.weight": "vit.encoder.layer.10.attention.attention.query.weight",
    "vit.layers.10.mlp.fc1.weight": "vit.encoder.layer.10.intermediate.dense.weight",
    "classifier.weight": "classifier.weight",
    "attn.in_proj_weight": "attn.in_proj_weight",
}
Q1, F1, Q10, F10, HEAD, IN = NAMES


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ("classifier", [HEAD]),
        ("classifier.weight", [HEAD]),
        ("vit.layers.1", [Q1, F1]),  # and not layer 10
        ("layers.1", [Q1, F1]),
        ("q_proj", [Q1, Q10]),
        ("mlp.fc1", [F1, F10]),
        ("query", [Q1, Q10]),  # the name on disk
        ("encoder.layer.10", [Q10, F10]),
        ("*.q_proj", [Q1, Q10]),
        ("vit.layers.1*", [Q1, F1, Q10, F10]),
        ("*.intermediate.dense", [F1, F10]),
        ("attn.in_proj_weight", [IN]),
        (r"re:layers\.\d\.", [Q1, F1]),
        ("re:query", [Q1, Q10]),
        (r"re:^classifier\.", [HEAD]),
    ],
)
def test_a_pattern_means_these_weights(pattern: str, hits: list[str]) -> None:
    assert plan.expand([pattern], NAMES, flag="--skip") == tuple(hits)


def test_patterns_add_up_in_the_order_of_the_model() -> None:
    assert plan.expand(["classifier", "layers.1"], NAMES, flag="--skip") == (Q1, F1, HEAD)
    assert plan.expand([], NAMES, flag="--skip") == ()


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("clasifier", "classifier"), ("q_pro", "q_proj"), ("proj", "q_proj"), ("zzzz", "attn"),
     ("vit.layer.1.mlp.fc1", "vit.layers.1.mlp.fc1"), ("re:^fc1$", "fc1"), ("*.fc2", "fc1")],
)  # fmt: skip
def test_a_pattern_without_a_match_is_an_error_with_the_nearest_names(pattern: str, near: str) -> None:
    with pytest.raises(ValueError) as caught:
        plan.expand(["classifier", pattern], NAMES, flag="--only")
    said = str(caught.value)
    assert f"--only {pattern!r} matches no weight of this model. Nearest names: " in said
    assert near in said.partition("Nearest names")[2]


def test_all_patterns_without_a_match_are_listed() -> None:
    with pytest.raises(ValueError) as caught:
        plan.expand(["aa", "classifier", "bb"], NAMES, flag="--skip")
    assert [line.split()[1] for line in str(caught.value).splitlines()] == ["'aa'", "'bb'"]


def a_plan() -> Plan:
    long = "encoder.very.long.path.that.some.models.really.have.stages.3.blocks.17.attention.qkv.weight"
    return Plan(
        rows=[
            Row("embed.weight", (192, 3, 16, 16), "embed", 147456, None, "stem, kept dense by default"),
            Row("blocks.0.fc1.weight", (768, 192), "blocks.0", 147456, "2:4"),
            Row(long, (576, 192), "blocks.17", 110592, "2:4"),
            Row("head.weight", (10, 192), "head", 1920, None, "it is the classifier " * 8),
        ],
        blocks=["blocks.0", "blocks.17"],
        walk="chain",
    )  # fmt: skip


def test_the_text_has_every_weight_its_shape_its_pattern_or_reason_and_the_totals() -> None:
    text = plan.text(a_plan())
    for row in a_plan().rows:
        assert row.name in text, "a name is never cut: it is what --skip takes"
        assert "x".join(map(str, row.shape)) in text
    assert text.count("2:4") == 2 and text.count("stays dense:") == 2
    assert "2 weights in 2 blocks get pruned, 2 stay dense: 0.26 M of 0.41 M weight" in text
    assert "(63.3 %)" in text.replace("\n", " ")


def test_the_text_fits_80_columns_unless_a_name_alone_is_longer() -> None:
    names = {row.name for row in a_plan().rows}
    for line in plan.text(a_plan()).splitlines():
        assert len(line) <= 80 or line in names
        assert line == line.rstrip()


def test_columns_line_up() -> None:
    lines = [line for line in plan.text(a_plan()).splitlines() if line.endswith(("2:4", "dense", "pattern"))]
    starts = {line.rindex(line.split()[-1]) for line in lines}
    assert len(lines) == 5 and len(starts) == 1


def test_totals() -> None:
    assert plan.totals(a_plan()) == {"pruned": 2, "dense": 2, "parameters": 407424, "prunable": 258048}
