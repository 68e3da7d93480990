"""The model families that are tested, and those known not to work, with the reason."""

from __future__ import annotations

from satchel.export.errors import ExportError

PASSED: frozenset[str] = frozenset(
    """
    afmoe apertus arcee biogpt bitnet cohere cohere2 cohere2_moe dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe
    flex_olmo gemma gemma2 gemma3_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe
    granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 kolibri1
    laguna llama mellum minimax_m2 ministral ministral3 mistral mixtral modernbert-decoder nanochat nemotron olmo olmo2
    olmo3 olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma
    """.split()  # noqa: SIM905
)
"""`model_type`s for which an exported small random model matches the logits of transformers."""

_REFUSED_FOR = {
    "its attention is hard-coded, so its attention function cannot be replaced": (
        "codegen cpmant ctrl diffllama doge falcon gpt_neo gpt_neox_japanese gptj openai-gpt xglm xlm xlnet"
    ),
    "its attention adds a distance bias (ALiBi)": "bloom mpt",
    "its layers keep a recurrent or convolutional state instead of a KV cache": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba "
        "mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm "
        "zamba zamba2"
    ),
    "its attention uses compressed keys and values (multi-head latent attention)": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu"
    ),
    "it has attention sinks": "flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "its attention is chunked": "llama4_text reformer",
    "its layers have several residual streams and share KV caches": "gemma3n_text",
}
REFUSED: dict[str, str] = {family: reason for reason, families in _REFUSED_FOR.items() for family in families.split()}
"""Maps `model_type` to the reason that satchel cannot export it."""


def check_family(model_type: str, source: str) -> None:
    """Refuse a family that is known not to work; unknown families are exported if the graph passes `check_sound`.

    Raises:
        ExportError: The family is known not to work; the message has the reason.
    """
    reason = REFUSED.get(model_type)
    if reason is not None:
        raise ExportError(
            f"{source}: model_type {model_type} is not supported: {reason}; export a model of another family"
        )
