"""What transformers sees of a checkpoint: nothing by which it would load code, or wait for ever."""

import json
import os
import shutil

import pytest

from neuroal_jax.checkpoint.hugging_face import load_tokenizer, load_torch_model
from neuroal_jax.errors import UserError

CODE = "raise SystemExit('code of the checkpoint ran')"
FOREIGN = {
    "attention kernels of a repository": {"attn_implementation": "someone/kernel"},
    "by its inner name": {"_attn_implementation": "someone/kernel"},
    "of a part": {"attn_implementation": {"": "someone/kernel"}},
    "experts": {"experts_implementation": "someone/kernel"},
    "code beside a native model": {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}},
    "an auto_map of another type": {"auto_map": ["code.Config"]},
    "a way to generate": {"custom_generate": "someone/generate", "use_kernels": True},
}


@pytest.fixture
def model(llama, tmp_path):
    """A model with code beside it."""
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "model" / "code.py").write_text(CODE)
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text(CODE)
    return tmp_path / "model"


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


def logits(model):
    import torch

    with torch.no_grad():
        return load_torch_model(model)(torch.arange(8)[None]).logits


@pytest.mark.parametrize("changes", FOREIGN.values(), ids=FOREIGN)
def test_what_names_code_is_not_seen(model, llama, changes):
    edit(model / "config.json", **changes)
    assert logits(model).equal(logits(llama))


def test_an_adapter_beside_the_weights_is_not_loaded(model, monkeypatch):
    from transformers.models.auto import auto_factory

    edit(model / "adapter_config.json", base_model_name_or_path="someone/else", peft_type="LORA")
    seen = []
    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: True)
    monkeypatch.setattr(auto_factory, "find_adapter_config_file", lambda path, **_: seen.extend(os.listdir(path)))
    load_torch_model(model)
    assert "model.safetensors" in seen
    assert not {"adapter_config.json", "code.py", "custom_generate"} & set(seen)


def test_pickles_are_not_read(model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(ValueError, match=str(model)):
        load_torch_model(model)


def test_a_quantized_model_is_refused(model):
    edit(model / "config.json", quantization_config={"quant_method": "metal"})
    with pytest.raises(UserError, match="quantized"):
        load_torch_model(model)


def tokenizer_of(model):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(model)


@pytest.mark.parametrize("name", ["AutoProcessor", "AutoTokenizer", "LlamaForCausalLM", "pipeline", 3])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_class_that_is_no_tokenizer_is_refused(model, file, name):
    tokenizer_of(model)
    edit(model / file, tokenizer_class=name)
    with pytest.raises(UserError, match="which is no tokenizer"):
        load_tokenizer(model)


def test_what_is_no_plain_file_keeps_no_one_waiting(model):
    tokenizer_of(model)
    for name in ("generation_config.json", "added_tokens.json", "chat_template.jinja", "special_tokens_map.json"):
        (model / name).unlink(missing_ok=True)
    os.mkfifo(model / "generation_config.json")
    os.mkfifo(model / "added_tokens.json")
    (model / "chat_template.jinja").mkdir()
    (model / "special_tokens_map.json").symlink_to("nowhere")
    assert load_tokenizer(model)("a")["input_ids"] == [1]
    assert load_torch_model(model) is not None
