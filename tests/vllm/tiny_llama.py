# pyright: basic, reportMissingImports=false
# mypy: ignore-errors
# It runs in vLLM's environment, not in klatch's.
"""Makes a tiny random Llama (two layers), its tokenizer with a ChatML template, and a LoRA adapter that changes it.

python tiny_llama.py FOLDER      # FOLDER/model, FOLDER/adapter; seconds, no network
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

RANK = 4
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if not (loop.last and continue_final_message) %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "A small language model that was never trained says what comes to its mind.",
    "The quick brown fox jumps over the lazy dog; system, user, assistant and tool take turns.",
    '{"name": "weather", "arguments": {"city": "Ulm", "unit": "celsius"}}',
]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on a few sentences: every text has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(TEXT * 20, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")  # noqa: S106
    made.chat_template = CHATML
    return made


def main(folder: Path) -> None:
    """Write both."""
    torch.manual_seed(7)
    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    words.save_pretrained(folder / "model")
    adapter(folder / "adapter", config)


def adapter(folder: Path, config: LlamaConfig) -> None:
    """A LoRA adapter in PEFT's format, large enough to change every answer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer in range(config.num_hidden_layers):
        for part in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, config.hidden_size).to(torch.bfloat16)
            tensors[f"{name}.lora_B.weight"] = torch.randn(config.hidden_size, RANK).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "model",
        "r": RANK,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": ["q_proj", "v_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
