"""Which files of a model are needed: from the Hub, and beside the weights that are saved."""

import json
import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file

from convert.masks_to_torch import save_pruned
from neuroal_jax.checkpoint.listing import PICKLED, SAFETENSORS, hub_patterns
from neuroal_jax.checkpoint.locate import locate
from neuroal_jax.checkpoint.opened import open_checkpoint
from neuroal_jax.checkpoint.saving import copy_side_files
from neuroal_jax.errors import UserError
from tests.run.test_pipeline import run

# Repositories as they are on the Hub: what is needed, and what is not.
REPOSITORIES = {
    "Mistral, with the maker's own form": (
        "config.json generation_config.json model-00001-of-00003.safetensors model-00002-of-00003.safetensors "
        "model-00003-of-00003.safetensors model.safetensors.index.json special_tokens_map.json tokenizer.json "
        "tokenizer.model tokenizer.model.v3 tokenizer_config.json",
        ".gitattributes README.md consolidated.safetensors params.json",
    ),
    "Mistral, that form in shards": (
        "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
        "tekken.json chat_template.jinja",
        "consolidated-00001-of-00002.safetensors consolidated-00002-of-00002.safetensors "
        "consolidated.safetensors.index.json params.json SYSTEM_PROMPT.txt processor_config.json",
    ),
    "Llama, with the maker's own form in a folder": (
        "LICENSE USE_POLICY.md config.json generation_config.json model-00001-of-00002.safetensors "
        "model-00002-of-00002.safetensors model.safetensors.index.json special_tokens_map.json tokenizer.json "
        "tokenizer_config.json",
        "README.md original/consolidated.00.pth original/params.json original/tokenizer.model",
    ),
    "GPT-2, in every form": (
        "config.json generation_config.json merges.txt model.safetensors tokenizer.json tokenizer_config.json "
        "vocab.json",
        "64-8bits.tflite 64.tflite README.md flax_model.msgpack onnx/config.json onnx/decoder_model.onnx "
        "onnx/generation_config.json onnx/merges.txt onnx/tokenizer.json onnx/vocab.json pytorch_model.bin "
        "rust_model.ot tf_model.h5 coreml/text-generation/float32_model.mlpackage/Manifest.json",
    ),
    "Qwen": (
        "LICENSE config.json generation_config.json merges.txt model-00001-of-00002.safetensors "
        "model-00002-of-00002.safetensors model.safetensors.index.json tokenizer.json tokenizer_config.json vocab.json",
        ".gitattributes README.md assets/logo.jpg assets/tokenizer.model",
    ),
    "Qwen, the first": (
        "LICENSE NOTICE config.json generation_config.json model-00001-of-00002.safetensors qwen.tiktoken "
        "model-00002-of-00002.safetensors model.safetensors.index.json tokenizer_config.json",
        "README.md cache_autogptq_cuda_256.cpp configuration_qwen.py modeling_qwen.py tokenization_qwen.py",
    ),
    "Gemma, with GGUF": (
        "config.json generation_config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors "
        "model.safetensors.index.json special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json",
        "README.md gemma-2b.gguf examples/example_fsdp.py examples/notebook.ipynb",
    ),
    "Phi": (
        "LICENSE NOTICE.md added_tokens.json config.json generation_config.json merges.txt "
        "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json "
        "special_tokens_map.json tokenizer.json tokenizer_config.json vocab.json",
        "CODE_OF_CONDUCT.md README.md SECURITY.md configuration_phi.py modeling_phi.py data_summary_card.md",
    ),
    "DeepSeek, whose shards are counted in six digits": (
        "LICENSE-MODEL config.json model-00001-of-000002.safetensors model-00002-of-000002.safetensors "
        "model.safetensors.index.json tokenizer.json tokenizer_config.json",
        "README.md figures/benchmark.jpg inference/config.json inference/model.py",
    ),
    "templates of its own": (
        "config.json model.safetensors chat_template.jinja additional_chat_templates/rag.jinja tokenizer.json "
        "additional_chat_templates/tool_use.jinja spiece.model sentencepiece.bpe.model vocab.txt adapter_config.json",
        "adapter_model.safetensors preprocessor_config.json tokenizer/spiece.model text_encoder/model.safetensors",
    ),
    "both copies": (
        "config.json model.safetensors tokenizer.json",
        "model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
    ),
    "variants": (
        "config.json model-00001-of-00002.safetensors model-00002-of-00002.safetensors model.safetensors.index.json",
        "model.fp16.safetensors model.fp16-00001-of-00002.safetensors model-00001-of-00002.fp16.safetensors "
        "model.safetensors.index.fp16.json pytorch_model.fp16.bin model_quantized.safetensors",
    ),
    "a run of Trainer": (
        "config.json generation_config.json model.safetensors tokenizer.json",
        "optimizer.pt scheduler.pt rng_state.pth trainer_state.json training_args.bin all_results.json "
        "checkpoint-500/model.safetensors checkpoint-500/tokenizer.json runs/Jan01/events.out.tfevents.1",
    ),
}
PICKLED_REPOSITORIES = {
    "OPT": (
        "LICENSE.md config.json generation_config.json merges.txt pytorch_model.bin special_tokens_map.json "
        "tokenizer_config.json vocab.json",
        "README.md flax_model.msgpack tf_model.h5",
    ),
    "OPT, in shards": (
        "config.json merges.txt pytorch_model-00001-of-00002.bin pytorch_model-00002-of-00002.bin vocab.json "
        "pytorch_model.bin.index.json",
        "flax_model-00001-of-00002.msgpack flax_model.msgpack.index.json tf_model-00001-of-00002.h5 "
        "tf_model.h5.index.json training_args.bin optimizer.bin",
    ),
    "both copies": (
        "config.json pytorch_model.bin",
        "pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json pytorch_model.fp16.bin "
        "pytorch_model.fp16-00001-of-00002.bin checkpoint-5/pytorch_model.bin",
    ),
}


@pytest.mark.parametrize(
    ("weights", "needed", "others"),
    [(SAFETENSORS, *files) for files in REPOSITORIES.values()]
    + [(PICKLED, *files) for files in PICKLED_REPOSITORIES.values()],
    ids=[*REPOSITORIES, *(f"pickled {name}" for name in PICKLED_REPOSITORIES)],
)
def test_of_a_repository_what_belongs_to_the_model_is_downloaded(monkeypatch, weights, needed, others):
    names = [*needed.split(), *others.split()]
    asked = []
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, model: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, **options: asked.append(options) or "found")
    assert str(locate("owner/name", weights=weights)) == "found"
    assert sorted(filter_repo_objects(names, **asked[0])) == sorted(needed.split())


def test_the_patterns_alone_leave_only_second_copies_in():
    """Where the list of files is not known: offline, what is in the cache is taken."""
    for name, (needed, others) in REPOSITORIES.items():
        allowed, ignored = hub_patterns(SAFETENSORS)
        names = [*needed.split(), *others.split()]
        found = filter_repo_objects(names, allow_patterns=allowed, ignore_patterns=ignored)
        assert sorted(found) == sorted(names if name == "both copies" else needed.split())


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ("config.json pytorch_model.bin tf_model.h5", SAFETENSORS,
         r"only pickled weights \(pytorch_model.bin\).*python -m convert.to_safetensors --model owner/name --out DIR"),
        ("config.json pytorch_model-00001-of-00002.bin", SAFETENSORS, "convert.to_safetensors --model owner/name"),
        ("config.json model.gguf", SAFETENSORS, r"another form of weights \(model.gguf\): accepted are model.safetens"),
        ("params.json consolidated.00.pth", SAFETENSORS, r"\(consolidated.00.pth\): accepted are model.safetensors"),
        ("config.json consolidated.safetensors", SAFETENSORS, r"another form of weights \(consolidated.safetensors\)"),
        ("adapter_config.json adapter_model.safetensors", SAFETENSORS, "but an adapter: merge it"),
        ("config.json model-00001-of-00002.safetensors", SAFETENSORS, "not their index model.safetensors.index.json"),
        ("config.json", SAFETENSORS, "holds no model.safetensors and no model.safetensors.index.json: accepted are"),
        ("config.json pytorch_model.bin model.safetensors", PICKLED, "holds safetensors already .*: use it as it is"),
        ("config.json pytorch_model-00001-of-00002.bin", PICKLED, "not their index pytorch_model.bin.index.json"),
        ("config.json training_args.bin model.pt", PICKLED, "holds no pytorch_model.bin and no"),
    ],
)  # fmt: skip
def test_a_repository_and_a_directory_without_the_weights_are_refused_alike(
    monkeypatch, tmp_path, names, weights, message
):
    from neuroal_jax.checkpoint.safetensors import weight_files

    siblings = [SimpleNamespace(rfilename=name) for name in names.split()]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, model: SimpleNamespace(siblings=siblings))
    with pytest.raises(UserError, match=message) as of_hub:
        locate("owner/name", weights=weights)
    for name in names.split():
        (tmp_path / name).touch()
    with pytest.raises(UserError) as of_directory:
        weight_files(tmp_path, weights)
    assert str(of_directory.value) == str(of_hub.value).replace("owner/name", str(tmp_path))


@pytest.fixture
def cached(llama, tmp_path, monkeypatch):
    """The Hub's cache with one model, whose files are links, and what else its folder holds."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / ("a" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot / "additional_chat_templates"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("a" * 40)
    extra = {"chat_template.jinja": "{{ x }}", "additional_chat_templates/tool.jinja": "{{ y }}", "merges.txt": "a b"}
    for number, (name, content) in enumerate(extra.items()):
        (repository / "blobs" / f"extra{number}").write_text(content)
        (snapshot / name).symlink_to(repository / "blobs" / f"extra{number}")
    for file in llama.iterdir():
        shutil.copy(file, repository / "blobs" / file.name.encode().hex())
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name.encode().hex()}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_offline_the_cache_is_used_and_its_links_are_copied_as_files(cached, llama, tmp_path):
    checkpoint = open_checkpoint("owner/name")
    assert checkpoint.path == cached
    assert checkpoint.hashes() == open_checkpoint(str(llama)).hashes()
    (tmp_path / "out").mkdir()
    copy_side_files(cached, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    own = {"config.json", "generation_config.json"}
    assert found == {*own, "chat_template.jinja", "merges.txt", "additional_chat_templates/tool.jinja"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_offline_the_weights_in_the_cache_are_enough(monkeypatch):
    """Whoever put them there may have wanted no more, which the Hub's client calls incomplete."""
    cache = ["config.json", "model.safetensors", "tokenizer.json"]

    def snapshot_download(model, allow_patterns, ignore_patterns, local_files_only):
        there = [*cache, "LICENSE"]
        wanted = filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        if not local_files_only or "LICENSE" in wanted:
            raise huggingface_hub.errors.LocalEntryNotFoundError("incomplete")
        return "found"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert str(locate("owner/name")) == "found"


def test_what_is_not_in_the_cache_is_one_line():
    with pytest.raises(UserError, match=r"^--model owner/none: no such directory, and the .* Hub says: .*offline"):
        locate("owner/none")


LEFT_OUT = [
    *"README.md notes.txt params.json trainer_state.json training_args.bin optimizer.pt scheduler.pt".split(),
    *"adapter_config.json adapter_model.bin consolidated.safetensors consolidated.safetensors.index.json".split(),
    *"model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json model.fp16.safetensors".split(),
    *"modeling_x.py quantize_config.json hf_quant_config.json model.gguf tf_model.h5 .gitattributes".split(),
    *"original/tokenizer.model onnx/tokenizer.json checkpoint-5/config.json additional_chat_templates/x.py".split(),
]
KEPT = [
    *"config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model merges.txt".split(),
    *"vocab.json added_tokens.json special_tokens_map.json chat_template.jinja qwen.tiktoken spiece.model".split(),
    *"LICENSE NOTICE.md USE_POLICY.md additional_chat_templates/tool_use.jinja tekken.json".split(),
]


@pytest.fixture
def full(llama, tmp_path):
    """A model among files of all sorts."""
    model = shutil.copytree(llama, tmp_path / "full")
    for name in [*LEFT_OUT, *KEPT]:
        (model / name).parent.mkdir(exist_ok=True)
        if name not in ("config.json", "generation_config.json"):
            (model / name).write_bytes(name.encode())
    return model


@pytest.mark.parametrize("source", ["safetensors", "orbax"])
def test_a_saved_model_holds_what_belongs_to_it(full, llama, tokens, tmp_path, source):
    from convert.hf_to_flax import convert

    model = full
    if source == "orbax":
        model = tmp_path / "flax"
        convert(str(full), model)
        assert not (model / "adapter_config.json").exists()
        (model / "adapter_config.json").write_text("{}")
    result = run(model, tokens, tmp_path / "out", allocation="uniform", eval="none", save_model=str(tmp_path / "saved"))
    masks = result.out / "masks.safetensors"
    saved = [tmp_path / "saved"]
    if source == "safetensors":
        save_pruned(str(model), masks, tmp_path / "applied")
        saved.append(tmp_path / "applied")
    for directory in saved:
        found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
        assert found == {*KEPT, "model.safetensors"}
        assert all((directory / name).read_bytes() == (full / name).read_bytes() for name in KEPT)


def test_no_link_out_of_the_model_is_copied(llama, tmp_path, caplog):
    model = shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "secret").write_text("of the user")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    (model / "tokenizer.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(model / "vocab.json")
    (model / "chat_template.jinja").symlink_to("templates/chat")
    (model / "templates").mkdir()
    (model / "templates" / "chat").write_text("{{ x }}")
    (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jinja").write_text("{{ y }}")
    (tmp_path / "out").mkdir()
    copy_side_files(model, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").rglob("*")}
    assert found == {"config.json", "generation_config.json", "chat_template.jinja"}
    assert "LICENSE is not copied: it is a link out of the model's directory" in caplog.text


def test_a_model_of_links_to_one_other_directory_is_copied_whole(full, tmp_path):
    model = tmp_path / "links"
    model.mkdir()
    for path in full.iterdir():
        if path.is_file():
            (model / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    copy_side_files(model, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name for name in KEPT if "/" not in name}


def test_an_adapter_beside_the_weights_is_told_and_refused_where_transformers_would_add_it(full, monkeypatch, caplog):
    from neuroal_jax.checkpoint import safetensors

    open_checkpoint(str(full))
    assert "holds an adapter (adapter_config.json) beside its weights: it is left out" in caplog.text
    monkeypatch.setattr(safetensors, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"holds an adapter \(adapter_config.json\) .*: merge it first"):
        open_checkpoint(str(full))


def test_an_index_beside_one_file_is_not_copied_and_one_of_shards_is(make_llama, full, tokens, tmp_path):
    model = make_llama(shard="20KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())
    tensors = {name: load_file(model / shard)[name] for name, shard in index["weight_map"].items()}
    run(model, tokens, tmp_path / "out", allocation="uniform", eval="none", save_model=str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text()) == index
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    run(model, tokens, tmp_path / "out2", allocation="uniform", eval="none", save_model=str(tmp_path / "saved2"))
    assert {path.name for path in (tmp_path / "saved2").glob("model*")} == {"model.safetensors"}


def test_an_index_that_transformers_cannot_read_is_completed(make_llama, tmp_path):
    from tests.models.test_families import torch_states

    model = make_llama(shard="20KB")
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    (tmp_path / "saved").mkdir()
    open_checkpoint(str(model)).save_edited(tmp_path / "saved", lambda name, array: array)
    torch_states(tmp_path / "saved", np.arange(6)[None])
