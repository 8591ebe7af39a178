"""Loading models: a tiny GGUF asset made here, local folders, and what cannot be trained."""

from __future__ import annotations

import errno
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from lpa import assets, models
from lpa.models import DEFAULT_MODEL, ModelError, adapter_base, context_length, load

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(chr(c) for c in range(ord("a"), ord("z") + 1)), "Ġ", "ab"]
WORDS += [f"w{i}" for i in range(64 - len(WORDS))]


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    core = Tokenizer(tokenizer_models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def test_a_local_folder_in_eval_mode_with_its_dtype_and_attention(tmp_path: Path, llama: Any) -> None:
    model, tokenizer = load(save(llama, tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert tokenizer.pad_token is None, "a tokenizer without a padding token is left without"
    assert load(tmp_path)[0].dtype == torch.float32
    assert context_length(model) == 128


def test_an_adapter_in_the_home_folder(tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = save(llama, tmp_path / "base")
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    assert isinstance(load("~/adapter")[0], PeftModel)


def test_an_adapter_of_an_asset_is_saved_under_the_assets_name_without_a_warning(
    tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(save(llama, tmp_path / "base"))
    monkeypatch.setattr(models, "_folder_of", lambda name: base)
    get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    models.name_base(tmp_path / "adapter")
    assert adapter_base(tmp_path / "adapter") == DEFAULT_MODEL
    adapted = load(tmp_path / "adapter")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft looks for the base's configuration where the adapter says
        adapted.save_pretrained(tmp_path / "again")
    models.name_base(tmp_path / "again")
    assert adapter_base(tmp_path / "again") == DEFAULT_MODEL


def test_context_length_by_other_names() -> None:
    assert (
        context_length(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, n_positions=77, vocab_size=9))) == 77
    )

    class Unlimited:
        """A model whose configuration says nothing of a length."""

        class config:
            @staticmethod
            def get_text_config() -> object:
                return object()

    assert context_length(Unlimited()) is None


def test_a_base_model_without_its_head(tmp_path: Path) -> None:
    base = LlamaModel(LlamaConfig(**SIZES, tie_word_embeddings=False))
    with pytest.raises(ModelError, match=r"saved without its LM head \(lm_head.weight is missing\)"):
        load(save(base, tmp_path))


def test_a_head_tied_to_the_embedding_need_not_be_saved(tmp_path: Path) -> None:
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    model, _ = load(save(tied, tmp_path))
    assert torch.equal(model.lm_head.weight, tied.lm_head.weight)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    with pytest.raises(ModelError, match="is not a causal language model"):
        load(save(T5ForConditionalGeneration(config), tmp_path))


def test_an_encoder_that_attends_in_both_directions(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ModelError, match=r"\(bert\) attends in both directions"):
        load(save(BertLMHeadModel(config), tmp_path))


def test_a_folder_that_holds_no_model_and_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load .*; give a folder, a hub name or one of smollm2-135m-instruct"):
        load(tmp_path)
    with pytest.raises(ModelError, match="the asset 'harmbench' is a data set, not a model"):
        load("harmbench")


def write_gguf(path: Path, model: Any) -> None:
    """The Llama as llama.cpp writes it, its linear weights quantised (Q8_0)."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.head_dim)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(WORDS)
    out.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    out.add_token_merges(["a b", "a b", "a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_chat_template(TEMPLATE)
    names = {"embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk."}
    names |= {f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"} | {"self_attn.o_proj": "attn_output"}
    names |= {f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, weight in model.state_dict().items():
        name = name.replace("model.embed_tokens", "embed_tokens")
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        data = weight.numpy()
        if data.ndim == 1:
            out.add_tensor(name, data)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quantize(data, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture
def gguf_asset(tmp_path: Path, llama: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The toy as an asset that is in the cache already."""
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path))
    asset = assets.Asset("toy", "toy", "1", "0" * 64, {"toy.gguf": ("toy.gguf", "0" * 64)}, 1, "MIT", "here", "a toy")
    monkeypatch.setitem(assets.ASSETS, "toy", asset)
    monkeypatch.setitem(models.GGUF_MODELS, "toy", "toy.gguf")
    assets.path("toy").mkdir(parents=True)
    write_gguf(assets.path("toy") / "toy.gguf", llama)
    return "toy"


def test_a_gguf_asset_is_dequantised_once_and_can_be_saved(
    gguf_asset: str, llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = load(gguf_asset)
    assert model.dtype == torch.float32
    assert getattr(model.config, "quantization_config", None) is None
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.eos_token_id == 2
    for name, weight in model.named_parameters():
        other = dict(llama.named_parameters())[name]
        scale = other.abs().max()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp keeps their rows in another order
            weight, other = weight.sort(0).values, other.sort(0).values
        assert (weight - other).abs().max() <= scale / 100, name

    def again(*_: Any) -> None:
        raise AssertionError("dequantised twice")

    monkeypatch.setattr(models, "_dequantise", again)
    load(gguf_asset)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path / "saved").lm_head.weight, model.lm_head.weight)


def test_a_full_disk_while_dequantising_leaves_nothing(
    gguf_asset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, file: str, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(models, "_dequantise", full)
    with pytest.raises(assets.AssetError, match=r"cannot keep toy: no space left.*about 540 MB"):
        load(gguf_asset)
    assert not list((tmp_path / "models").iterdir())


def test_the_embedded_model_is_the_default_and_answers() -> None:
    if not (assets.cache_dir() / "models").is_dir() or not assets.is_cached(models.DEFAULT_MODEL):
        pytest.skip("the embedded model is not in the cache; `lpa assets fetch` gets it")
    model, tokenizer = load()
    assert context_length(model) == 8192
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=2)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
