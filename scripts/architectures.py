"""Small random members of every architecture that the matrix goes through.  Nothing is downloaded.

Every weight is shaken after the initialisation, so that no layer is zero, no normalisation trivial and no layer scale
too small to matter: a fault that random initialisation would hide shows up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LABELS = 5
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [16, 32, 32, 48], "depths": [1, 2, 1, 1]}

# transformers: model type -> configuration.  Types of the image-classification mapping that are absent here fail the
# matrix, so a new release of transformers cannot add one unseen.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "beit": VIT,
    "bit": {"embedding_size": 16, **STAGES, "num_groups": 4, "image_size": 32},
    "clip": {"vision_config": {**VIT}, "text_config": {"hidden_size": 16, "num_hidden_layers": 1}},
    "convnext": {**STAGES, "image_size": 64},
    "convnextv2": {**STAGES, "image_size": 64},
    "cvt": {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 2, 3]},
    "data2vec-vision": VIT,
    "deit": VIT,
    "dinat": {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32},
    "dinov2": VIT,
    "dinov2_with_registers": VIT,
    "donut-swin": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 2,
    },
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320, "image_size": 64},
    "focalnet": {"embed_dim": 16, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 32},
    "hgnet_v2": {
        "stem_channels": [3, 16, 16],
        "stage_in_channels": [16, 32],
        "stage_mid_channels": [16, 16],
        "stage_out_channels": [32, 64],
        "stage_num_blocks": [1, 2],
        "stage_downsample": [False, True],
        "stage_light_block": [False, True],
        "stage_kernel_size": [3, 5],
        "stage_numb_of_layers": [2, 2],
        "hidden_sizes": [32, 64],
        "depths": [1, 2],
        "embedding_size": 16,
        "downsample_strides": [2, 2],
        "stem_strides": [2, 1, 1, 2, 1],
        "image_size": 64,
    },
    "hiera": {"embed_dim": 16, "depths": [1, 2, 2, 1], "num_heads": [1, 2, 4, 8], "image_size": [64, 64]},
    "ijepa": VIT,
    "imagegpt": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 17},
    "levit": {
        "image_size": 64,
        "hidden_sizes": [16, 32, 48],
        "num_attention_heads": [2, 2, 2],
        "depths": [2, 2, 2],
        "key_dim": [8, 8, 8],
        "patch_size": 16,
        "down_ops": [["Subsample", 8, 2, 4, 2, 2], ["Subsample", 8, 4, 4, 2, 2]],
    },
    "metaclip_2": {"vision_config": {**VIT}, "text_config": {"hidden_size": 16, "num_hidden_layers": 1}},
    "mobilenet_v1": {"depth_multiplier": 0.25, "image_size": 64},
    "mobilenet_v2": {"depth_multiplier": 0.35, "image_size": 64},
    "mobilevit": {
        "image_size": 64,
        "hidden_sizes": [32, 40, 48],
        "neck_hidden_sizes": [8, 16, 16, 16, 24, 24, 64],
        "num_attention_heads": 4,
        "mlp_ratio": 2.0,
    },
    "mobilevitv2": {"image_size": 64, "width_multiplier": 0.25},
    "perceiver": {
        "num_latents": 8,
        "d_latents": 32,
        "d_model": 32,
        "num_blocks": 1,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 1,
        "image_size": 16,
    },
    "poolformer": {**STAGES, "image_size": 64},
    "pp_lcnet": {"scale": 0.25, "image_size": 64},
    "pvt": {
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4],
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "pvt_v2": {
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4],
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "regnet": {"embedding_size": 16, **STAGES, "groups_width": 8},
    "resnet": {"embedding_size": 16, **STAGES},
    "segformer": {
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 3, 4],
        "mlp_ratios": [2, 2, 2, 2],
        "image_size": 64,
    },
    "siglip": {"vision_config": {**VIT}, "text_config": {"hidden_size": 16, "num_hidden_layers": 1}},
    "siglip2": {
        "vision_config": {k: v for k, v in VIT.items() if k not in ("image_size",)} | {"num_patches": 16},
        "text_config": {"hidden_size": 16, "num_hidden_layers": 1},
    },
    "swiftformer": {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64},
    "swin": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 2,
    },
    "swinv2": {
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
        "image_size": 32,
        "patch_size": 2,
    },
    "textnet": {"image_size": [64, 64]},
    "vit": VIT,
    "vit_msn": VIT,
}
SIZES = {
    "imagegpt": 8,
    "perceiver": 16,
    "convnext": 64,
    "convnextv2": 64,
    "hgnet_v2": 64,
    "hiera": 64,
    "levit": 64,
    "mobilenet_v1": 64,
    "mobilenet_v2": 64,
    "mobilevit": 64,
    "mobilevitv2": 64,
    "poolformer": 64,
    "pp_lcnet": 64,
    "pvt": 64,
    "pvt_v2": 64,
    "segformer": 64,
    "swiftformer": 64,
    "textnet": 64,
    "resnet": 64,
    "regnet": 64,
    "efficientnet": 64,
}

# Vision towers and backbones: name -> (model class, configuration class, configuration)
TOWERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip vision tower": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", VIT),
    "siglip vision tower": ("SiglipVisionModel", "SiglipVisionConfig", VIT),
    "dinov2 backbone": ("Dinov2Model", "Dinov2Config", VIT),
    "dinov3_vit backbone": ("DINOv3ViTModel", "DINOv3ViTConfig", VIT),
    "dinov3_convnext backbone": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {**STAGES, "image_size": 64}),
    "vit backbone": ("ViTModel", "ViTConfig", VIT),
    "swin backbone": ("SwinModel", "SwinConfig", TRANSFORMERS["swin"]),
}

# Not built, and why.
NOT_BUILT = {
    "dinat": "needs the natten package, which compiles its own kernels",
    "shieldgemma2": "a language model that reads images; its classifier is the text generator",
    "timm_wrapper": "the timm part of this table",
}

_VIT = {"embed_dim": 32, "depth": 3, "num_heads": 2}
# timm: model -> (image size, arguments that make it small)
TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (32, {**_VIT, "img_size": 32}),
    "botnet26t_256": (64, {"img_size": 64}),
    "cait_xxs24_224": (32, {**_VIT, "img_size": 32}),
    "coat_tiny": (
        64,
        {
            "img_size": 64,
            "embed_dims": (64, 64, 64, 64),
            "serial_depths": (1, 1, 1, 1),
            "num_heads": 8,
            "parallel_depth": 1,
        },
    ),
    "convit_tiny": (32, {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 4, "local_up_to_layer": 2}),
    "test_convnext": (64, {}),
    "test_convnext2": (64, {}),
    "test_convnext3": (64, {}),
    "crossvit_9_240": (240, {"embed_dim": (16, 32), "depth": ((1, 2, 0), (1, 2, 0)), "num_heads": (2, 2)}),
    "cspresnet50": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1), "embed_dims": (16, 32), "num_heads": (1, 2)}),
    "deit_tiny_distilled_patch16_224": (32, {**_VIT, "img_size": 32}),
    "deit3_small_patch16_224": (32, {**_VIT, "img_size": 32}),
    "densenet121": (64, {"block_config": (2, 2, 2), "growth_rate": 8}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {"k_sec": (1, 1, 1, 1)}),
    "edgenext_xx_small": (64, {"dims": (16, 32, 32, 48), "depths": (2, 2, 2, 2), "heads": (2, 2, 2, 2)}),
    "test_efficientnet": (64, {}),
    "test_efficientnet_evos": (64, {}),
    "efficientformer_l1": (224, {"embed_dims": (16, 16, 32, 32), "depths": (1, 1, 1, 2)}),
    "efficientformerv2_s0": (64, {"img_size": 64, "embed_dims": (16, 16, 32, 32)}),
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (224, {}),
    "eva02_tiny_patch14_224": (28, {**_VIT, "img_size": 28}),
    "fasternet_t0": (64, {"embed_dim": 16, "depths": (1, 1, 2, 1)}),
    "fastvit_t8": (64, {"embed_dims": (16, 16, 32, 32), "layers": (1, 1, 1, 1)}),
    "ghostnet_050": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (64, {"img_size": 64, "embed_dim": 16, "stages": (1, 1, 1, 1)}),
    "sam2_hiera_tiny": (
        64,
        {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,), "window_spec": (4, 2, 2, 1)},
    ),
    "hrnet_w18_small": (64, {}),
    "inception_next_atto": (64, {"depths": (1, 1, 2, 1), "dims": (16, 32, 32, 48)}),
    "inception_v3": (75, {}),
    "lcnet_035": (64, {}),
    "levit_128s": (224, {"embed_dim": (32, 48, 64), "depth": (1, 1, 1)}),
    "test_maxvit": (160, {"depths": (1, 1, 1, 1)}),
    "test_coatnet": (160, {}),
    "test_mambaout": (64, {}),
    "test_byobnet": (64, {}),
    "test_resnet": (64, {}),
    "test_nfnet": (64, {}),
    "coatnet_pico_rw_224": (64, {"img_size": 64}),
    "mobilenetv2_035": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv4_conv_small_035": (64, {}),
    "mobilevit_xxs": (64, {}),
    "mobilevitv2_050": (64, {}),
    "mobileone_s0": (32, {}),
    "naflexvit_base_patch16_gap": (32, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    "nextvit_small": (64, {"depths": (1, 1, 5, 1)}),
    "nf_resnet26": (64, {}),
    "pit_ti_224": (64, {"img_size": 64, "base_dims": (16, 16, 16), "depth": (1, 1, 2), "heads": (2, 2, 2)}),
    "pvt_v2_b0": (64, {"embed_dims": (16, 16, 40, 32), "depths": (1, 1, 1, 1)}),
    "rdnet_tiny": (64, {}),
    "regnetx_002": (64, {}),
    "regnety_002": (64, {}),
    "regnetz_005": (64, {}),
    "repghostnet_050": (64, {}),
    "repvgg_a0": (64, {}),
    "repvit_m0_9": (64, {"embed_dim": (16, 32, 32, 48), "depth": (1, 1, 2, 1)}),
    "res2net50_14w_8s": (64, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {}),
    "resnet10t": (64, {}),
    "seresnet18": (64, {}),
    "resnext26ts": (64, {}),
    "resnetv2_50": (64, {"layers": (1, 1, 1, 1), "channels": (16, 32, 32, 64), "stem_chs": 16}),
    "rexnet_100": (64, {"width_mult": 0.5}),
    "selecsls42": (64, {}),
    "sequencer2d_s": (
        64,
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 8, 8, 8)},
    ),
    "shvit_s1": (64, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {"embed_dims": (16, 24, 32, 48), "layers": (1, 1, 1, 1)}),
    "swin_tiny_patch4_window7_224": (56, {"img_size": 56, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}),
    "swinv2_cr_tiny_224": (
        64,
        {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4},
    ),
    "tf_efficientnet_lite0": (64, {}),
    "tiny_vit_5m_224": (
        64,
        {
            "embed_dims": (16, 32, 32, 48),
            "depths": (1, 1, 2, 1),
            "num_heads": (1, 2, 2, 2),
            "window_sizes": (4, 4, 2, 2),
        },
    ),
    "csatv2": (64, {}),
    "cpubone_nano": (64, {}),
    "cspnext_tiny": (64, {}),
    "deepseek_vit_412m": (28, {**_VIT, "img_size": 28}),
    "efficientvim_m1": (64, {}),
    "gemma4_vit_167m": (64, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    "iformer_t": (64, {}),
    "lcnetv2_small": (64, {}),
    "legacy_seresnet18": (64, {}),
    "lowformer_b0": (64, {}),
    "qwen3_vit_88m": (64, {"embed_dim": 32, "depth": 3, "num_heads": 2}),
    "tnt_s_legacy_patch16_224": (
        32,
        {"img_size": 32, "embed_dim": 32, "inner_dim": 16, "depth": 2, "num_heads_outer": 2, "num_heads_inner": 2},
    ),
    "tresnet_m": (64, {"layers": (1, 1, 1, 1), "width_factor": 0.5}),
    "twins_svt_small": (
        64,
        {"img_size": 64, "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 2, 1)},
    ),
    "twins_pcpvt_small": (
        64,
        {"img_size": 64, "embed_dims": (16, 32, 32, 32), "num_heads": (1, 2, 2, 2), "depths": (1, 1, 2, 1)},
    ),
    "visformer_tiny": (64, {"img_size": 64, "embed_dim": 32, "num_heads": 2, "init_channels": 8, "depth": (1, 2, 1)}),
    "test_vit": (160, {}),
    "test_vit2": (160, {}),
    "vit_tiny_patch16_224": (32, {**_VIT, "img_size": 32}),
    "vit_base_patch16_siglip_224": (32, {**_VIT, "img_size": 32}),
    "vit_base_patch16_clip_224": (32, {**_VIT, "img_size": 32}),
    "vit_small_patch14_reg4_dinov2": (28, {**_VIT, "img_size": 28}),
    "vit_small_patch16_dinov3": (32, {**_VIT, "img_size": 32}),
    "vit_small_patch16_36x1_224": (32, {**_VIT, "img_size": 32}),
    "vit_small_patch16_18x2_224": (32, {**_VIT, "img_size": 32}),  # two branches in parallel
    "aimv2_large_patch14_224": (28, {**_VIT, "img_size": 28}),
    "vit_so400m_patch14_siglip_gap_224": (28, {**_VIT, "img_size": 28}),
    "vit_relpos_small_patch16_224": (32, {**_VIT, "img_size": 32}),
    "vit_small_r26_s32_224": (64, {**_VIT, "img_size": 64}),
    "samvit_base_patch16": (64, {**_VIT, "img_size": 64, "window_size": 2, "global_attn_indexes": (2,)}),
    "ese_vovnet19b_slim": (64, {}),
    "legacy_xception": (71, {}),
    "xception41": (64, {}),
    "xcit_nano_12_p16_224": (32, {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}),
}

# timm families whose named members cannot be made small by arguments: the same class, smaller.
TIMM_CLASSES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "convmixer": ("convmixer", "ConvMixer", 32, {"dim": 32, "depth": 3}),
    "focalnet": ("focalnet", "FocalNet", 64, {"embed_dim": 16, "depths": (1, 1, 2, 1)}),
    "gcvit": (
        "gcvit",
        "GlobalContextVit",
        64,
        {
            "img_size": 64,
            "embed_dim": 16,
            "depths": (1, 1, 2, 1),
            "num_heads": (2, 2, 2, 2),
            "window_ratio": (16, 16, 16, 32),
        },
    ),
    "caformer": (
        "metaformer",
        "MetaFormer",
        64,
        {
            "depths": (1, 1, 1, 1),
            "dims": (16, 32, 32, 64),
            "token_mixers": ["SepConv", "SepConv", "Attention", "Attention"],
            "norm_layers": ["LayerNorm2dNoBias", "LayerNorm2dNoBias", "LayerNormNoBias", "LayerNormNoBias"],
        },
    ),
    "poolformer": ("metaformer", "MetaFormer", 64, {"depths": (1, 1, 1, 1), "dims": (16, 32, 32, 64)}),
    "mixer": ("mlp_mixer", "MlpMixer", 32, {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}),
    "gmlp": (
        "mlp_mixer",
        "MlpMixer",
        32,
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "num_blocks": 2,
            "mlp_ratio": 6,
            "block_layer": "SpatialGatingBlock",
            "mlp_layer": "GatedMlp",
        },
    ),
    "resmlp": (
        "mlp_mixer",
        "MlpMixer",
        32,
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "num_blocks": 2,
            "mlp_ratio": 4,
            "block_layer": "ResBlock",
            "norm_layer": "Affine",
        },
    ),
    "mvitv2": (
        "mvitv2",
        "MultiScaleVit",
        64,
        {
            "img_size": 64,
            "cfg": {
                "embed_dim": (16, 32, 32, 64),
                "depths": (1, 1, 2, 1),
                "num_heads": 1,
                "stride_kv_adaptive": (4, 4),
            },
        },
    ),
    "nest": (
        "nest",
        "Nest",
        64,
        {"img_size": 64, "embed_dims": (16, 32, 32), "depths": (1, 1, 2), "num_heads": (1, 2, 2)},
    ),
    "resnetv2_bit": (
        "resnetv2",
        "ResNetV2",
        64,
        {"layers": (1, 1, 1, 1), "channels": (128, 128, 256, 256), "stem_chs": 32, "conv_layer": "StdConv2d"},
    ),
    "vgg": ("vgg", "VGG", 32, {"cfg": [16, "M", 32, "M", 32, 32, "M"], "mlp_ratio": 0.0625}),
    "volo": (
        "volo",
        "VOLO",
        64,
        {"img_size": 64, "layers": (1, 1, 1, 1), "embed_dims": (32, 32, 32, 32), "num_heads": (2, 2, 2, 2)},
    ),
}


@dataclass(frozen=True)
class Case:
    """One architecture: `build()` gives the same model each time, `batch(n, seed)` what its forward takes."""

    name: str
    library: str
    create: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]

    def build(self) -> nn.Module:
        return settle(self.create(), self.batch(8, 100))


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every tensor off its initial value, keeping variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            size = max(0.02, float(p.std()) / 4) if p.numel() > 1 else 0.02
            p.add_(torch.randn(p.shape, generator=generator) * size)
            if "gamma" in name or "ls1" in name or "ls2" in name or "lambda" in name or "layer_scale" in name:
                p.add_(0.2)  # a layer scale of 1e-5 hides what happens behind it
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(torch.randn(b.shape, generator=generator) * 0.1)
            elif name.endswith("running_var"):
                b.copy_(torch.rand(b.shape, generator=generator) + 0.5)
    return model.eval()


def settle(model: nn.Module, batch: Any) -> nn.Module:
    """Running statistics of batch norms as of one batch, so that signals neither die out nor explode with depth."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]
    for m in norms:
        if m.weight is not None and m.weight.abs().mean() < 0.1:  # EfficientNet starts them at 0.02
            with torch.no_grad():
                m.weight.add_(1)
        m.momentum = 1.0
        m.train()
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for m, momentum in zip(norms, before, strict=True):
        m.momentum = momentum
        with torch.no_grad():
            m.running_var.clamp_(min=1e-3)
    return model.eval()


def pixels(n: int, size: int, seed: int) -> Tensor:
    """Images with structure at several scales, (n, 3, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=generator)
    fine = torch.randn(n, 3, size, size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") + 0.3 * fine


def _transformers(kind: str, model_class: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        options = {**TRANSFORMERS[kind], "num_labels": LABELS}
        config = transformers.AutoConfig.for_model(kind, **options)
        torch.manual_seed(0)
        return shake(getattr(transformers, model_class)(config))

    return build


def _tower(model_class: str, config_class: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        return shake(getattr(transformers, model_class)(getattr(transformers, config_class)(**options)))

    return build


def _timm(name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        torch.manual_seed(0)
        return shake(timm.create_model(name, pretrained=False, **({"num_classes": LABELS} | options)))

    return build


def _timm_class(module: str, name: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import importlib

        home = importlib.import_module(f"timm.models.{module}")
        # layers given by name are classes of the same module
        layers = {k: getattr(home, v) for k, v in options.items() if k.endswith("_layer")}
        if isinstance(options.get("cfg"), dict):
            layers["cfg"] = home.MultiScaleVitCfg(**options["cfg"])
        layers |= {k: [getattr(home, v) for v in options[k]] for k in ("token_mixers", "norm_layers") if k in options}
        torch.manual_seed(0)
        return shake(getattr(home, name)(**{"num_classes": LABELS} | options | layers))

    return build


def _batch(kind: str, size: int) -> Callable[[int, int], Any]:
    def batch(n: int, seed: int) -> Any:
        if kind == "imagegpt":
            generator = torch.Generator().manual_seed(seed)
            return {"input_ids": torch.randint(0, 16, (n, size * size), generator=generator)}
        if kind == "perceiver":
            return {"inputs": pixels(n, size, seed)}
        if kind == "siglip2":  # flattened patches with their grid
            patches = pixels(n, 32, seed).unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
            return {
                "pixel_values": patches.reshape(n, 16, -1).contiguous(),
                "pixel_attention_mask": torch.ones(n, 16, dtype=torch.int32),
                "spatial_shapes": torch.tensor([[4, 4]] * n),
            }
        return {"pixel_values": pixels(n, size, seed)}

    return batch


def cases() -> list[Case]:
    """Everything the matrix goes through."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as mapping

    out = []
    for kind, classes in mapping.items():
        if kind in NOT_BUILT:
            continue
        for cls in (classes,) if isinstance(classes, str) else classes:
            out.append(Case(cls, "transformers", _transformers(kind, cls), _batch(kind, SIZES.get(kind, 32))))
    for name, (cls, config, options) in TOWERS.items():
        size = options["image_size"]
        out.append(Case(name, "transformers", _tower(cls, config, options), _batch("", size)))
    for name, (size, options) in TIMM.items():
        out.append(Case(name, "timm", _timm(name, options), lambda n, seed, size=size: pixels(n, size, seed)))
    for name, (module, cls, size, options) in TIMM_CLASSES.items():
        build = _timm_class(module, cls, options)
        out.append(Case(name, "timm", build, lambda n, seed, size=size: pixels(n, size, seed)))
    return out
