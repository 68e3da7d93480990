"""Which model families are tested, and which are known not to work, with the reason."""

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
"""`model_type`s of which a small random model was exported and gave transformers' own logits."""

_REFUSED_FOR = {
    "it has attention code of its own, which takes no attention function from outside": (
        "codegen cpmant ctrl diffllama doge falcon gpt_neo gpt_neox_japanese gptj openai-gpt xglm xlm xlnet"
    ),
    "its attention adds a bias for the distance (ALiBi)": "bloom mpt",
    "its layers keep a recurrent or convolutional state in place of a KV cache": (
        "bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba "
        "mamba2 minimax nemotron_h olmo_hybrid qwen3_5_moe_text qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm "
        "zamba zamba2"
    ),
    "its attention works on compressed keys and values (multi-head latent attention)": (
        "axk1 axk2 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa minicpm3 youtu"
    ),
    "its attention has sinks": "flint gpt_oss granite_swa granitemoe_swa mimo_v2_flash",
    "its attention works in chunks": "llama4_text reformer",
    "its layers exchange several streams and share their caches": "gemma3n_text",
}
REFUSED: dict[str, str] = {family: reason for reason, families in _REFUSED_FOR.items() for family in families.split()}
"""`model_type` -> why satchel cannot export it."""


def check_family(model_type: str, source: str) -> None:
    """Refuse a family that is known not to work; one that is in neither table is exported if its graph proves sound.

    Raises:
        ExportError: The family is one of these; the message says why.
    """
    reason = REFUSED.get(model_type)
    if reason is not None:
        raise ExportError(
            f"{source}: model_type {model_type} is not supported: {reason}; export a model of another family"
        )
