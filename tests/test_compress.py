"""Packed weights: the same bits back, or an error; files, folders, loading, converting, and a fuzz run over damage."""

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
import torch
import vision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_prune
from hf_prune import checkpoint, cli, compress, packing

HERE = Path(__file__).resolve().parent
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (1, 8), (1, 16), (4, 16), (8, 16), (2, 3), (3, 5), (5, 10)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(packing.BITS[tensor.element_size()])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, n: int, m: int, seed: int = 0) -> torch.Tensor:
    """A tensor that follows n:m with every bit pattern in it: NaN of any payload, infinities, -0.0, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (*shape, size), generator=generator, dtype=torch.uint8).view(dtype).squeeze(-1)
    groups = bits(raw.movedim(1, -1)).clone().view(-1, m)
    keep = torch.rand(groups.shape, generator=generator).topk(n, 1).indices
    groups[~torch.zeros_like(groups, dtype=torch.bool).scatter_(1, keep, True)] = 0
    groups[::7] = 0  # groups without any value
    moved = [shape[0], *shape[2:], shape[1]]
    return groups.view(moved).view(dtype).movedim(-1, 1).contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_every_bit_comes_back(n: int, m: int, dtype: torch.dtype) -> None:
    for shape in ((6, 5 * m), (4, 3 * m, 3, 3), (2, m, 2, 1, 3), (1, m)):
        dense = random_bits(shape, dtype, n, m, seed=n * m)
        packed = packing.pack(dense, n, m)
        assert packed is not None and packed[0].dtype == dtype and packed[1].dtype == torch.uint8
        assert sum(t.numel() * t.element_size() for t in packed) == packing.packed_bytes(
            shape, dense.element_size(), n, m
        )
        back = packing.unpack(*packed, n, m)
        assert back.shape == dense.shape and back.is_contiguous() and torch.equal(bits(back), bits(dense))


def test_payloads_and_signed_zeros() -> None:
    words = [0x7FC00001, -0x3FFFFF, 0, 0, -0x80000000, 0, 0, 1, 0, 0, 0, 0, 0x7F800000, 0, 0, -0x80000000]
    dense = torch.tensor(words, dtype=torch.int32).view(torch.float32).view(2, 8)
    back = packing.unpack(*packing.pack(dense, 2, 4), 2, 4)
    assert bits(back).flatten().tolist() == words


def test_more_chunks_than_one() -> None:
    dense = random_bits((5, 4 * packing.CHUNK + 12), torch.bfloat16, 2, 4)
    assert torch.equal(bits(packing.unpack(*packing.pack(dense, 2, 4), 2, 4)), bits(dense))


def test_two_bits_per_value_as_the_description_says() -> None:
    dense = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 0.0, 0.0]])
    values, fields = packing.pack(dense, 2, 4)
    assert values.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    assert fields.tolist() == [0b01_00_11_01], "positions 1, 3 of the first group, 0, 1 (filled up) of the second"


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(2, 4), torch.zeros(8), torch.zeros(2, 6), torch.zeros(2, 4, dtype=torch.int32), torch.zeros(0, 4),
     torch.tensor([[1.0, 2.0, -0.0, 0.0]])],
)  # fmt: skip
def test_what_does_not_follow_stays_dense(tensor: torch.Tensor) -> None:
    assert packing.pack(tensor, 2, 4) is None


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 4), (5, 4), (2, 17), (-1, 4)])
def test_patterns_that_cannot_be_packed(n: int, m: int) -> None:
    with pytest.raises(ValueError, match="cannot be packed"):
        packing.pack(torch.zeros(4, 4), n, m)


def instructions(work: Callable[[], Any]) -> int:
    """How many instructions of Python it takes."""
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def test_there_is_no_loop_over_rows_or_groups() -> None:
    def both(rows: int, columns: int) -> list[int]:
        dense = random_bits((rows, columns), torch.float32, 2, 4)
        packed = packing.pack(dense, 2, 4)  # its tables are made once
        return [instructions(lambda: packing.pack(dense, 2, 4)), instructions(lambda: packing.unpack(*packed, 2, 4))]

    chunk = packing.CHUNK * 4 // 1024
    few, one, many = both(8, 64), both(chunk, 1024), both(1024, 4096)
    assert few == one and min(few) > 0, "as much Python for 128 times as many groups"
    chunks = 1024 * 4096 // 4 // packing.CHUNK
    assert all(m < chunks * o for m, o in zip(many, one, strict=True))


# ------------------------------------------------------------------------------------------------------------- files
def follow(state: dict[str, torch.Tensor], n: int = 2, m: int = 4) -> None:
    """Make every inner weight follow n:m."""
    for name, weight in state.items():
        if weight.dim() in (2, 4) and weight.shape[1] % m == 0 and "classifier" not in name and "head" not in name:
            moved = weight.movedim(1, -1).contiguous()
            groups = moved.view(-1, m)
            keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.float().abs().topk(n, 1).indices, True)
            state[name] = torch.where(keep, groups, torch.zeros_like(groups)).view_as(moved).movedim(-1, 1).contiguous()


def model_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    if family == "timm":
        vision.timm_folder(folder)
    else:
        vision.hf_folder(folder, family, dtype=dtype)
    return vision.edit_weights(folder, follow)


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return set(found) == set(wanted) and all(
        found[k].dtype == wanted[k].dtype and torch.equal(bits(found[k]), bits(wanted[k])) for k in wanted
    )


CASES = [("vit", torch.float32), ("swin", torch.bfloat16), ("resnet", torch.float16), ("timm", torch.float32)]


@pytest.mark.parametrize(("family", "dtype"), CASES, ids=lambda value: str(value))
def test_a_compressed_folder_loads_to_the_same_bits(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification as Auto
    from transformers.quantizers import auto

    folder = model_folder(tmp_path / "m", family, dtype)
    dense = load_file(folder / "model.safetensors")
    wanted = Auto.from_pretrained(folder).state_dict()
    file = compress.add(folder, 2, 4, only=True)
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.sparse24.safetensors"]
    assert same(dict(compress.read(file)), dense)
    loaded = hf_prune.load(folder).state_dict()
    assert same(loaded, dense if family == "timm" else wanted)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(compress.KEY, None)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        Auto.from_pretrained(folder)
    from hf_prune import quantizer

    quantizer.register()
    model, info = Auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()) and same(model.state_dict(), wanted)
    model.save_pretrained(tmp_path / "again")
    assert same(Auto.from_pretrained(tmp_path / "again").state_dict(), wanted), "it is an ordinary model by then"
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert Auto.from_pretrained(folder, dtype=torch.float64).dtype == torch.float64


def test_timm_refuses_it(tmp_path: Path) -> None:
    import timm

    folder = model_folder(tmp_path / "m", "timm")
    compress.add(folder, 2, 4, only=True)
    with pytest.raises(RuntimeError, match=r"Missing key|missing"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)


def test_general_patterns_have_names() -> None:
    assert compress.file_name(1, 4) == "model.sparse14.safetensors"
    assert compress.file_name(4, 16) == "model.sparse4of16.safetensors"
    assert all(compress.sources.COMPRESSED.fullmatch(compress.file_name(n, m)) for n, m in PATTERNS)


def test_the_main_command_refuses_what_cannot_be_packed(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["x/y", "--sparsity", "0.5", "--compressed"]) == 2
    assert "--compressed packs N:M" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    published.sources(place)
    published.prune(place, "vit", "out", "--compressed")
    return place


def test_verify_and_inspect_of_what_the_command_writes(pruned: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["verify", str(pruned / "out")]) == 0
    assert "verified" in capsys.readouterr().out
    assert cli.main(["inspect", str(pruned / "out" / "model.safetensors"), "--json"]) == 0
    seen = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    state = load_file(pruned / "out" / "model.safetensors")
    assert set(seen) == set(state)
    for layer in checkpoint.read(pruned / "out")["layers"]:
        each = seen[layer["checkpoint_name"]]
        assert each["entries"] - each["zeros"] == layer["kept"] and (layer["pattern"] in (None, each["pattern"]))


weights, config = vision.edit_weights, vision.edit_config
DAMAGE = {
    "a weight": ("sha256", lambda f: weights(f, lambda s: s["classifier.bias"].add_(1))),
    "a pattern": ("groups break", lambda f: weights(f, lambda s: s[QUERY].fill_(1.0))),
    "-0.0": ("-0.0", lambda f: weights(f, negate)),
    "a count": ("entries that are not zero", lambda f: edit_report(f, lambda r: first(r).update(kept=3))),
    "a recipe": ("recipe.yaml", lambda f: (f / "recipe.yaml").write_text("nm: '1:4'\n")),
    "a card": ("README.md", lambda f: flatter(f / "README.md")),
    "a missing tensor": ("missing", lambda f: weights(f, lambda s: s.pop("classifier.bias"))),
    "a claim": ("quantization_config", lambda f: config(f, quantization_config={"quant_method": "hf_prune"})),
    "packed bytes": ("is damaged", lambda f: flip(f / "model.sparse24.safetensors")),
}
QUERY = "vit.encoder.layer.0.attention.attention.query.weight"


def flatter(card: Path) -> None:
    card.write_text(card.read_text().replace("50.0 %", "90.0 %"))


def first(report: dict) -> dict:
    return next(layer for layer in report["layers"] if layer["pattern"])


def negate(state: dict) -> None:
    state[QUERY] = torch.where(state[QUERY] == 0, torch.tensor(-0.0), state[QUERY])


def edit_report(folder: Path, change) -> None:
    report = json.loads((folder / "hf_prune.json").read_text())
    change(report)
    (folder / "hf_prune.json").write_text(json.dumps(report))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_sees(what: str, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = vision.copy(pruned / "out", tmp_path / "copy")
    words, harm = DAMAGE[what]
    harm(folder)
    assert cli.main(["verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM" in said and words in said, said


def test_load_compares_hashes(pruned: Path, tmp_path: Path) -> None:
    folder = vision.copy(pruned / "out", tmp_path / "copy")
    flip(folder / "model.sparse24.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        hf_prune.load(folder)
    (folder / "model.sparse24.safetensors").unlink()
    assert not hf_prune.load(folder).training
    vision.edit_weights(folder, lambda s: s["classifier.bias"].add_(1))
    with pytest.raises(ValueError, match="does not match its sha256"):
        hf_prune.load(folder)


# ------------------------------------------------------------------------------------- formats nobody reads any more
@pytest.mark.parametrize("kind", compress.OLD)
def test_convert_what_compressed_tensors_wrote(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForImageClassification as Auto

    source = HERE / "data" / "compressed_tensors" / kind
    assert cli.main([str(source), "--nm", "2:4"]) == 2
    assert "hf-prune convert" in capsys.readouterr().err
    with pytest.raises(ValueError, match="hf-prune convert"):
        hf_prune.load(source)
    assert cli.main(["convert", str(source), str(tmp_path / "out")]) == 0
    dense = load_file(source.parent / "dense" / "model.safetensors")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), dense)
    model, info = Auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["compressed", "bitmask", "shape"])
def test_convert_refuses_damage(part: str, tmp_path: Path) -> None:
    folder = vision.copy(HERE / "data" / "compressed_tensors" / "sparse-24-bitmask", tmp_path / "old")
    stem = QUERY.removesuffix("weight")
    vision.edit_weights(folder, lambda s: s.pop(stem + part))
    with pytest.raises(ValueError, match="lacks"):
        compress.convert(folder, tmp_path / "out")
    folder = vision.copy(HERE / "data" / "compressed_tensors" / "sparse-24-bitmask", tmp_path / "old2")
    vision.edit_weights(folder, lambda s: s.update({stem + part: s[stem + part].flatten()[:1].clone()}))
    with pytest.raises(ValueError, match=r"does not belong|bits are set"):
        compress.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_back(pruned: Path, tmp_path: Path) -> None:
    folder = vision.copy(pruned / "out", tmp_path / "both")
    (folder / "model.safetensors").unlink()
    assert cli.main(["convert", str(folder), str(tmp_path / "dense")]) == 0
    assert cli.main(["verify", str(tmp_path / "dense"), "--quiet"]) == 0
    with pytest.raises(ValueError, match="is not compressed"):
        compress.convert(tmp_path / "dense", tmp_path / "more")


# --------------------------------------------------------------------------------------------------------------- fuzz
COUNT = int(os.environ.get("HF_PRUNE_FUZZ", "150"))  # examples per target; more by hand
ROUNDS = settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), derandomize=COUNT == 150)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("small")
    state = {"a.weight": random_bits((8, 16), torch.float32, 2, 4), "b": torch.arange(6.0)}
    save_file(state, folder / "model.safetensors")
    path = compress.write([folder / "model.safetensors"], folder, 2, 4)
    return path, path.read_bytes(), state


@ROUNDS
@given(data=st.data())
def test_fuzz_bytes_of_a_compressed_file(small: Any, data: Any) -> None:
    """Any damage ends in the same bits or in ValueError, never in other weights, never in another exception."""
    path, good, state = small
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.sampled_from([len(content), len(content), len(content) // 2, 7]))]
    target = path.parent / "model.sparse28.safetensors"
    target.write_bytes(content)
    try:
        found = dict(compress.read(target))
    except ValueError:
        return
    assert same(found, state)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@ROUNDS
@given(data=st.data())
def test_fuzz_the_list_of_a_compressed_file(small: Any, data: Any) -> None:
    path, good, state = small
    length = struct.unpack("<Q", good[:8])[0]
    header = json.loads(good[8 : 8 + length])
    told = json.loads(header["__metadata__"]["hf_prune"])
    where = data.draw(st.sampled_from(["format", "pattern", "tensors", "packed", "dtype", "shape", "sha256", "all"]))
    value = data.draw(JSON | st.sampled_from(["1:4", "2:4", "999:999", "2:1000000000"]))
    if where == "all":
        told = value
    elif where in told:
        told[where] = value
    else:
        told["tensors"]["a.weight"][where] = value
    header["__metadata__"]["hf_prune"] = json.dumps(told)
    text = json.dumps(header).encode()
    target = path.parent / "model.sparse18.safetensors"
    target.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
    try:
        found = dict(compress.read(target))
    except ValueError:
        return
    assert same(found, state)


def test_sizes_of_the_real_vit(shared_data: Path, tmp_path: Path) -> None:
    dense = load_file(shared_data / "vit-tiny-patch16-224-hf" / "model.safetensors")
    follow(dense)
    share = {}
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: tensor.to(dtype) for name, tensor in dense.items()}
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        path = compress.write([tmp_path / "model.safetensors"], tmp_path, 2, 4)
        assert same(dict(compress.read(path)), state)
        share[dtype] = path.stat().st_size / (tmp_path / "model.safetensors").stat().st_size
    assert share[torch.float32] < 0.57 and share[torch.bfloat16] < 0.61
