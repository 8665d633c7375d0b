"""A dozen of the architectures of `make matrix`, one for each kind of structure; docs/architectures.md has them all."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
import architecture_matrix  # noqa: E402
import architectures  # noqa: E402

CASES = {c.name: c for c in architectures.cases()}
# name -> (walk, units, pruned weights): a change here is a change of what a user's model gets
SEEN = {
    "ViTForImageClassification": ("chain", 3, 18),
    "SwinForImageClassification": ("lean", 5, 25),  # shifted windows, patch merging between stages
    "SiglipForImageClassification": ("lean", 6, 23),  # nn.MultiheadAttention as pooling
    "ImageGPTForImageClassification": ("lean", 2, 8),  # Conv1D, key-value cache
    "MobileNetV1ForImageClassification": ("lean", 13, 13),  # depthwise weights stay dense
    "ResNetForImageClassification": ("chain", 5, 18),
    "dinov3_vit backbone": ("chain", 3, 17),
    "test_convnext2": ("chain", 4, 11),
    "test_efficientnet": ("lean", 6, 14),  # squeeze and excite
    "densenet121": ("splice", 8, 14),  # every layer reads all before it
    "eva02_tiny_patch14_224": ("chain", 3, 9),  # rotary embedding, gated MLP
    "mixer": ("chain", 2, 8),
}


@pytest.mark.parametrize("name", SEEN)
def test_planned_pruned_and_reloaded(name):
    row = architecture_matrix.examine(CASES[name])
    assert (row.walk, row.units, row.pruned) == SEEN[name]


def test_what_cannot_be_pruned_says_why():
    case = CASES["BitForImageClassification"]
    with pytest.raises(ValueError, match="no matrix product or convolution reads it unchanged"):
        architecture_matrix.examine(case)


def test_every_class_of_the_mapping_is_built_or_excused():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as mapping

    assert set(mapping) == set(architectures.TRANSFORMERS) - {"dinat"} | set(architectures.NOT_BUILT)
    assert len(architectures.TIMM) + len(architectures.TIMM_CLASSES) >= 60
