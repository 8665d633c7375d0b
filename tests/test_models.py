"""Loading and saving models: transformers, timm, local folders, and everything that can be wrong with them."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import vision
from safetensors import safe_open
from safetensors.torch import load_file

from hf_prune import models

FAMILIES = ("vit", "mobilenet_v1", "resnet", "swin")
TIMM = ("test_vit", "test_resnet", "test_convnext")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint per family. Read only: copy before editing."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {family: vision.hf_folder(root / family, family) for family in FAMILIES}
    return made | {name: vision.timm_folder(root / name, name) for name in TIMM}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every look at the network fails and is noted, with the offline switches of the libraries off."""
    import huggingface_hub.constants

    tried: list[str] = []

    def refuse(*args: object, **_: object) -> None:
        tried.append(str(args))
        raise OSError("the network was used")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def pixels(loaded: models.Loaded, count: int = 2) -> torch.Tensor:
    return loaded.processor([vision.photo(i, (20, 24)) for i in range(count)])


def message(name: object, **options: object) -> str:
    """What the user reads, checked to be one line."""
    with pytest.raises(ValueError) as caught:
        models.load(str(name), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the face


@pytest.mark.parametrize("family", [*FAMILIES, *TIMM])
def test_one_face(checkpoints: dict[str, Path], no_network: list[str], family: str) -> None:
    loaded = models.load(str(checkpoints[family]))
    assert not loaded.module.training and loaded.dtype == torch.float32 and loaded.has_logits
    assert loaded.library == ("timm" if family in TIMM else "transformers")
    found = pixels(loaded)
    assert found.dtype == torch.float32 and found.shape[:2] == (2, 3)
    with torch.no_grad():
        logits = loaded.outputs(loaded.batch(found))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert no_network == [], "a local folder reached for the network"


@pytest.mark.parametrize("family", [*FAMILIES, *TIMM])
def test_checkpoint_names_are_those_of_the_file(checkpoints: dict[str, Path], family: str) -> None:
    loaded = models.load(str(checkpoints[family]))
    names = loaded.checkpoint_names()
    on_disk = load_file(checkpoints[family] / "model.safetensors")
    state = loaded.module.state_dict()
    assert set(names) == set(state) and set(names.values()) == set(on_disk)
    assert all(torch.equal(state[name], on_disk[disk]) for name, disk in names.items())


def test_restructured_names_differ(checkpoints: dict[str, Path]) -> None:
    names = models.load(str(checkpoints["vit"])).checkpoint_names()
    changed = {name: disk for name, disk in names.items() if name != disk}
    assert changed, "this version of transformers keeps the names: the test above proves nothing about renaming"


def test_module_argument_runs_another_module(checkpoints: dict[str, Path]) -> None:
    one, two = (models.load(str(checkpoints["resnet"])) for _ in range(2))
    vision.shake(two.module, seed=1)
    batch = one.batch(pixels(one))
    with torch.no_grad():
        assert torch.equal(one.outputs(batch, two.module), two.outputs(batch))
        assert not torch.equal(one.outputs(batch), two.outputs(batch))


def test_grey_models(tmp_path: Path) -> None:
    loaded = models.load(str(vision.hf_folder(tmp_path / "hf", "vit", channels=1)))
    assert pixels(loaded).shape == (2, 1, vision.SIZE, vision.SIZE)
    with torch.no_grad():
        assert loaded.outputs(loaded.batch(pixels(loaded))).shape == (2, 5)


# --- saving


def test_fresh_process_loads_the_same(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """transformers, timm and TimmWrapper, never having heard of hf_prune and without network, to the bit."""
    for family, folder in checkpoints.items():
        loaded = models.load(str(folder))
        with torch.no_grad():
            for parameter in loaded.module.parameters():
                parameter.mul_((torch.rand_like(parameter) < 0.5).float() * -1)  # leaves -0.0 behind
            loaded.save(tmp_path / family)
            found = pixels(loaded)
            torch.save({"pixels": found, "logits": loaded.outputs(loaded.batch(found))}, tmp_path / f"{family}.pt")
    code = """
        import json, socket, sys, torch
        def refuse(*a, **k): raise OSError("the network was used")
        socket.socket.connect = socket.getaddrinfo = refuse
        import timm
        from transformers import AutoImageProcessor, AutoModelForImageClassification as Auto
        root, answer = sys.argv[1], {}
        for family in sys.argv[2:]:
            kept = torch.load(f"{root}/{family}.pt")
            hf = Auto.from_pretrained(f"{root}/{family}", local_files_only=True).eval()
            with torch.no_grad():
                answer[family] = torch.equal(hf(kept["pixels"]).logits, kept["logits"])
                if family.startswith("test_"):
                    other = timm.create_model(f"local-dir:{root}/{family}", pretrained=True).eval()
                    answer[family + " timm"] = torch.equal(other(kept["pixels"]), kept["logits"])
            AutoImageProcessor.from_pretrained(f"{root}/{family}", local_files_only=True)
        answer["hf_prune"] = "hf_prune" not in sys.modules
        print(json.dumps(answer))
    """
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), *checkpoints],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(answer) == len(checkpoints) + len(TIMM) + 1
    assert all(answer.values()), answer


@pytest.mark.parametrize("family", ["vit", "resnet", "test_vit"])
def test_zeros_are_positive_and_nothing_else_changes(checkpoints: dict[str, Path], tmp_path: Path, family: str) -> None:
    loaded = models.load(str(checkpoints[family]))
    weight = next(p for p in loaded.module.parameters() if p.ndim > 1)
    with torch.no_grad():
        weight.view(-1)[::2] = -0.0
    assert (torch.signbit(weight) & (weight == 0)).any()
    before = {name: tensor.clone() for name, tensor in loaded.module.state_dict().items()}
    loaded.save(tmp_path / "out")
    stored, names = load_file(tmp_path / "out" / "model.safetensors"), loaded.checkpoint_names()
    for name, tensor in loaded.module.state_dict().items():
        assert torch.equal(tensor, before[name]) and torch.equal(stored[names[name]], tensor), name
        assert not (torch.signbit(stored[names[name]]) & (stored[names[name]] == 0)).any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForImageClassification

    loaded = models.load(str(vision.hf_folder(tmp_path / "in", "vit", dtype=dtype)))
    assert loaded.dtype == dtype and {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.add_(torch.rand_like(parameter) * 1e-3)  # values that this dtype cannot hold
    state, config_dtype = {k: v.clone() for k, v in loaded.module.state_dict().items()}, loaded.module.config.dtype
    loaded.save(tmp_path / "out")
    stored, names = load_file(tmp_path / "out" / "model.safetensors"), loaded.checkpoint_names()
    assert all(torch.equal(stored[names[name]], tensor.to(dtype)) for name, tensor in state.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.module.state_dict().items())
    assert loaded.module.config.dtype == config_dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").dtype == dtype


def test_mixed_dtypes_come_back_one_by_one(tmp_path: Path) -> None:
    folder = vision.timm_folder(tmp_path / "in", "test_resnet")
    vision.edit_weights(folder, lambda state: state.update({k: v.half() for k, v in state.items() if v.ndim == 4}))
    kinds = {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}
    assert len(set(kinds.values())) == 3  # float16, float32, and the int64 of num_batches_tracked
    loaded = models.load(str(folder))
    loaded.save(tmp_path / "out")
    assert {name: t.dtype for name, t in load_file(tmp_path / "out" / "model.safetensors").items()} == kinds
    wide = models.load(str(folder), dtype="bfloat16")
    wide.save(tmp_path / "wide")
    floats = {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values() if t.is_floating_point()}
    assert floats == {torch.bfloat16}


def test_a_weight_too_large_for_half_precision_is_refused(tmp_path: Path) -> None:
    loaded = models.load(str(vision.hf_folder(tmp_path / "in", "vit", dtype=torch.float16)))
    with torch.no_grad():
        loaded.module.classifier.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="classifier.weight is not finite once stored as torch.float16"):
        loaded.save(tmp_path / "out")


def test_shards(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    loaded = models.load(str(checkpoints["vit"]))
    loaded.save(tmp_path / "out", max_shard_size="10KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = models.load(str(tmp_path / "out"))
    state = loaded.module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.module.state_dict().items())


def test_running_statistics_survive(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    loaded = models.load(str(checkpoints["resnet"]))
    buffers = dict(loaded.module.named_buffers())
    assert any("running_var" in name for name in buffers)
    loaded.save(tmp_path / "out")
    again = dict(models.load(str(tmp_path / "out")).module.named_buffers())
    assert all(torch.equal(buffers[name], again[name]) for name in buffers)


def test_tied_weights_are_stored_alike(tmp_path: Path) -> None:
    loaded = models.load(str(vision.timm_folder(tmp_path / "in")))
    first, second = loaded.module.blocks[0].mlp.fc1, loaded.module.blocks[1].mlp.fc1
    second.weight = first.weight
    state = loaded.stored_state()
    assert state["blocks.0.mlp.fc1.weight"].data_ptr() == state["blocks.1.mlp.fc1.weight"].data_ptr()
    loaded.save(tmp_path / "out")
    again = models.load(str(tmp_path / "out")).module
    assert torch.equal(again.blocks[1].mlp.fc1.weight, first.weight)


def test_timm_config_is_made_true_of_the_saved_weights(tmp_path: Path) -> None:
    folder = vision.timm_folder(
        tmp_path / "in", model_args={"num_classes": 5, "img_size": 160}, label_names=list("abcde")
    )
    content = json.loads((folder / "config.json").read_text())
    content["pretrained_cfg"] |= {"hf_hub_id": "timm/dense", "url": "https://example.org/dense.pth"}
    (folder / "config.json").write_text(json.dumps(content))
    loaded = models.load(str(folder))
    assert loaded.labels == list("abcde")
    loaded.save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_args"] == {"img_size": 160}, "transformers stops at num_classes given twice"
    assert not {"hf_hub_id", "url"} & set(saved["pretrained_cfg"]), "this would point to the dense weights"
    assert saved["label_names"] == list("abcde") and saved["num_classes"] == 5
    assert models.load(str(tmp_path / "out")).labels == list("abcde")


def test_timm_label_offset_is_applied_once(tmp_path: Path) -> None:
    """1 + 5 classes on disk, the first one cut off on loading; saved as 5, and 5 it stays."""
    folder = vision.timm_folder(tmp_path / "in", "test_vit", classes=6)
    content = json.loads((folder / "config.json").read_text()) | {"num_classes": 5}
    content["pretrained_cfg"] |= {"label_offset": 1, "num_classes": 5}
    (folder / "config.json").write_text(json.dumps(content))
    loaded = models.load(str(folder))
    assert torch.equal(loaded.module.head.weight, load_file(folder / "model.safetensors")["head.weight"][1:])
    loaded.save(tmp_path / "out")
    assert torch.equal(models.load(str(tmp_path / "out")).module.head.weight, loaded.module.head.weight)


# --- bare backbones


def test_bare_backbone(tmp_path: Path) -> None:
    loaded = models.load(str(vision.hf_folder(tmp_path / "vit", "vit", head=False)))
    assert not loaded.has_logits and loaded.labels is None and "bare backbone" in " ".join(loaded.notes)
    batch = loaded.batch(pixels(loaded))
    with torch.no_grad():
        assert torch.equal(loaded.outputs(batch), loaded.module(**batch).pooler_output)
    loaded.save(tmp_path / "out")
    stored = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert stored == set(load_file(tmp_path / "vit" / "model.safetensors"))


def test_backbone_without_pooler_is_not_given_a_random_one(tmp_path: Path) -> None:
    folder = vision.hf_folder(tmp_path / "vit", "vit", head=False)
    vision.edit_weights(folder, lambda state: [state.pop(k) for k in list(state) if k.startswith("pooler")])
    loaded = models.load(str(folder))
    assert not any("pooler" in name for name, _ in loaded.module.named_parameters())
    with torch.no_grad():
        batch = loaded.batch(pixels(loaded))
        assert torch.equal(loaded.outputs(batch), loaded.module(**batch).last_hidden_state.mean(1))


def test_convolutional_backbone_is_pooled(tmp_path: Path) -> None:
    loaded = models.load(str(vision.hf_folder(tmp_path / "resnet", "resnet", head=False)))
    with torch.no_grad():
        assert loaded.outputs(loaded.batch(pixels(loaded))).shape == (2, 16)


def test_timm_backbone(tmp_path: Path) -> None:
    loaded = models.load(str(vision.timm_folder(tmp_path / "vit", "test_vit", classes=0)))
    assert not loaded.has_logits and loaded.labels is None
    with torch.no_grad():
        assert loaded.outputs(loaded.batch(pixels(loaded))).shape == (2, loaded.module.num_features)


def test_vision_tower_of_clip(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**small, "image_size": vision.SIZE, "patch_size": 8},
        projection_dim=8,
    )
    vision.shake(CLIPModel(config)).save_pretrained(tmp_path / "clip")
    vision.write_processor(tmp_path / "clip")
    loaded = models.load(str(tmp_path / "clip"))
    assert not loaded.has_logits and any("vision tower" in note for note in loaded.notes)
    stored = load_file(tmp_path / "clip" / "model.safetensors")
    state = loaded.module.state_dict()
    assert all(any(t.shape == s.shape and torch.equal(t, s) for s in stored.values()) for t in state.values())
    loaded.save(tmp_path / "out")
    assert type(models.load(str(tmp_path / "out")).module) is type(loaded.module)


# --- refused


def test_missing_weights_are_never_random(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    classifier = vision.copy(checkpoints["vit"], tmp_path / "classifier")
    vision.edit_weights(classifier, lambda state: state.pop("classifier.weight"))
    assert "lacks classifier.weight, which ViTForImageClassification needs" in message(classifier)
    block = vision.copy(checkpoints["vit"], tmp_path / "block")
    vision.edit_weights(
        block, lambda state: state.pop(next(k for k in state if "query.weight" in k or "q_proj.w" in k))
    )
    assert "and would start from random values" in message(block)
    statistics = vision.copy(checkpoints["resnet"], tmp_path / "statistics")
    vision.edit_weights(statistics, lambda s: s.pop(next(k for k in s if "running_var" in k)))
    assert "running_var" in message(statistics)
    timm = vision.copy(checkpoints["test_vit"], tmp_path / "timm")
    vision.edit_weights(timm, lambda state: state.pop("head.weight"))
    assert "head.weight" in message(timm)


def test_compressed_weights_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """A sparse-24-bitmask checkpoint loads in transformers as random weights, with a warning only."""
    folder = vision.copy(checkpoints["vit"], tmp_path / "compressed")

    def compress(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if "output.dense.weight" in name or "fc2.weight" in name]:
            state[name.replace("weight", "compressed")] = state.pop(name)[:, ::2].contiguous()

    assert "would start from random values" in message(vision.edit_weights(folder, compress))


def test_timm_config_that_contradicts_itself(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = vision.copy(checkpoints["test_vit"], tmp_path / "timm")
    vision.edit_config(folder, model_args={"num_classes": 7})
    assert "5 classes for the weights and 7 for the model" in message(folder)


def test_num_batches_tracked_may_be_missing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = vision.copy(checkpoints["resnet"], tmp_path / "old")
    vision.edit_weights(folder, lambda s: [s.pop(k) for k in list(s) if "num_batches" in k])
    assert models.load(str(folder)).has_logits


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("family", "part"), [("vit", "layernorm.weight"), ("test_resnet", "running_mean")])
def test_not_finite(checkpoints: dict[str, Path], tmp_path: Path, family: str, part: str, value: float) -> None:
    folder = vision.copy(checkpoints[family], tmp_path / "damaged")
    vision.edit_weights(folder, lambda state: state[next(k for k in state if part in k)].view(-1)[:1].fill_(value))
    found = message(folder)
    assert part in found and "1 values that are NaN or infinite" in found


def test_pickles_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for family, file in (("vit", "pytorch_model.bin"), ("test_vit", "pytorch_model.bin")):
        folder = vision.copy(checkpoints[family], tmp_path / family)
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
        found = message(folder)
        assert file in found and "can run code" in found


def test_broken_folders(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no config.json" in message(empty)
    assert "this folder does not exist" in message(tmp_path / "nowhere")
    assert "is a file" in message(checkpoints["vit"] / "config.json")
    (empty / "adapter_config.json").write_text("{}")
    assert "an adapter, not a model" in message(empty)
    (empty / "config.json").write_text("{")
    (empty / "model.safetensors").write_bytes(b"")
    assert "is not readable JSON" in message(empty)
    (empty / "config.json").write_text("{}")
    assert "neither a model_type (transformers) nor an architecture (timm)" in message(empty)
    assert "no revisions" in message(checkpoints["vit"], revision="main")

    pointer = vision.copy(checkpoints["vit"], tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert "git-lfs" in message(pointer)
    unknown = vision.edit_config(vision.copy(checkpoints["vit"], tmp_path / "unknown"), model_type="vit_from_tomorrow")
    assert "vit_from_tomorrow" in message(unknown)
    unknown = vision.edit_config(vision.copy(checkpoints["test_vit"], tmp_path / "t"), architecture="vit_tomorrow")
    assert "knows no architecture 'vit_tomorrow'" in message(unknown)
    quantized = vision.copy(checkpoints["vit"], tmp_path / "quantized")
    vision.edit_config(quantized, quantization_config={"quant_method": "fp8"})
    assert "is quantized (fp8)" in message(quantized)
    blind = vision.copy(checkpoints["vit"], tmp_path / "blind")
    (blind / "preprocessor_config.json").unlink()
    assert "preprocessor_config.json" in message(blind)
    assert "--dtype int8" in message(checkpoints["vit"], dtype="int8")


def test_language_model(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path)
    assert "is no vision model: BertModel takes input_ids" in message(tmp_path)


def test_repository_code_needs_permission(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = vision.copy(checkpoints["vit"], tmp_path / "custom")
    vision.edit_config(folder, model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"})
    (folder / "mine.py").write_text("raise SystemExit('this code must not run')")
    assert "--trust-remote-code" in message(folder)


def test_torchvision_of_another_torch(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision")
    found = message(checkpoints["vit"])
    assert "torchvision::nms" in found and "pip install --upgrade torch torchvision" in found


def test_names_that_mean_nothing_offline() -> None:
    assert "the Hub could not be reached" in message("nobody/no-such-model")
    assert "neither a local folder nor a possible Hub id" in message("two words/model")
    found = message("timm:resnet5O")
    assert "timm has no model named resnet5O" in found and "resnet50" in found
    found = message("timm:resnet50.a1_in1000")
    assert "timm has no weights of that name" in found and "resnet50.a1_in1k" in found


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("timm:resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("hf-hub:timm/resnet50.a1_in1k", "timm/resnet50.a1_in1k"),
        ("google/vit-base-patch16-224", "google/vit-base-patch16-224"),
    ],
)
def test_timm_names(name: str, repo: str) -> None:
    from hf_prune.source import _timm_repo

    assert _timm_repo(name) == repo


def test_timm_name_without_tag_means_its_default_weights() -> None:
    from hf_prune.source import _timm_repo

    assert _timm_repo("timm:resnet18").startswith("timm/resnet18.")


def test_license(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = vision.copy(checkpoints["vit"], tmp_path / "vit")
    assert models.load(str(folder)).license is None
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Text\n")
    assert models.load(str(folder)).license == "apache-2.0"
    (folder / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert models.load(str(folder)).license is None


# --- the Hub, played by a server on this machine


HUB = """
import http.server, json, os, sys, threading
root = sys.argv[1]
SHA = "0123456789abcdef0123456789abcdef01234567"

class Hub(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def do_GET(self):
        path = self.path.split("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            name, rest = path[3], path[4:]
            if name == "gated": return self.answer(403, b"{}", X_Error_Code="GatedRepo", X_Error_Message="gated")
            if name == "down": return self.answer(418, b"{}", X_Error_Message="tea only")
            if not os.path.isdir(f"{root}/{name}"): return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            if rest[:1] == ["revision"] and rest[1] not in ("main", SHA):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            files = sorted(os.listdir(f"{root}/{name}"))
            if rest[:1] == ["tree"]:
                size = lambda f: os.path.getsize(f"{root}/{name}/{f}")
                tree = [{"type": "file", "path": f, "size": size(f), "oid": f} for f in files]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            info = {"id": f"me/{name}", "sha": SHA, "siblings": [{"rfilename": f} for f in files], "tags": [],
                    "private": False, "downloads": 0, "likes": 0}
            return self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        name, file = path[1], path[-1]
        body = open(f"{root}/{name}/{file}", "rb").read()
        self.answer(200, body, ETag=f'"{len(body)}-{file}"', X_Repo_Commit=SHA)
    do_HEAD = do_GET

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_address[1]}"
import torch
from hf_prune import models
answer = {}
def attempt(name, **options):
    try:
        loaded = models.load(name, **options)
        return [loaded.library, loaded.revision, loaded.license, len(loaded.notes)]
    except ValueError as error:
        return str(error)
for name in ("me/vit", "me/timm", "me/gated", "me/none", "me/down", "me/pickle"):
    answer[name] = attempt(name)
answer["revision"] = attempt("me/vit", revision="v9")
answer["pinned"] = attempt("me/vit", revision=SHA)
answer["files"] = sorted(os.listdir(models.load("me/vit").origin.folder))
server.shutdown(); server.server_close()
answer["cached"] = attempt("me/vit")
answer["gone"] = attempt("me/other")
print(json.dumps(answer))
"""


def test_hub(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "hub"
    vision.copy(checkpoints["vit"], root / "vit")
    (root / "vit" / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "vit" / "pytorch_model.bin").write_bytes(b"never fetched")
    vision.copy(checkpoints["test_vit"], root / "timm")
    vision.copy(checkpoints["vit"], root / "pickle")
    (root / "pickle" / "model.safetensors").rename(root / "pickle" / "pytorch_model.bin")
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, str(root)],
        capture_output=True, text=True, env=environment, timeout=120, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    sha = "0123456789abcdef0123456789abcdef01234567"
    assert answer["me/vit"] == answer["pinned"] == ["transformers", sha, "mit", 0]
    assert answer["me/timm"][:2] == ["timm", sha]
    assert "is gated" in answer["me/gated"] and "hf auth login" in answer["me/gated"]
    assert "was not found" in answer["me/none"]
    assert "the Hub answered with an error" in answer["me/down"] and "418" in answer["me/down"]
    assert "has no revision v9" in answer["revision"]
    assert "can run code" in answer["me/pickle"]
    assert answer["files"] == ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert answer["cached"] == ["transformers", sha, "mit", 1], "with the Hub gone the cached copy serves, saying so"
    assert "could not be reached" in answer["gone"]


# --- real models


def test_real_vit_in_both_forms(shared_data: Path, tmp_path: Path) -> None:
    """The same weights under the names of transformers and of timm give the same logits."""
    hf = models.load(str(shared_data / "vit-tiny-patch16-224-hf"))
    timm = models.load(str(vision.real_timm_vit(tmp_path / "timm", shared_data)))
    assert hf.labels[0] == "tench, Tinca tinca" and timm.labels[0].startswith("n01440764 tench")
    found = hf.processor([vision.photo(i, (224, 224)) for i in range(2)])
    with torch.no_grad():
        one, two = hf.outputs(hf.batch(found)), timm.outputs(timm.batch(found))
    assert (one - two).abs().max() < 1e-4 and one.abs().max() > 1
    with safe_open(shared_data / "vit-tiny-patch16-224-hf" / "model.safetensors", "pt") as file:
        assert set(hf.checkpoint_names().values()) == set(file.keys())


def test_real_mobilenet(shared_data: Path) -> None:
    loaded = models.load(str(shared_data / "mobilenet_v1_0.25_128-hf"))
    assert loaded.num_classes == 1001 and loaded.labels[:2] == ["background", "tench, Tinca tinca"]
    assert pixels(loaded).shape == (2, 3, 128, 128)
