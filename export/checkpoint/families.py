"""The model families that are tested, and those known not to work, with the reason."""

from __future__ import annotations

from satchel.export.errors import ExportError

PASSED: frozenset[str] = frozenset(
    """
    afmoe apertus apertus1p5_text arcee aria_text axk1 bailing_hybrid bamba biogpt bitnet bloom codegen cohere
    cohere2 cohere2_moe cohere_compass_text cwm deepseek_v2 deepseek_v3 dots1 ernie4_5 ernie4_5_moe exaone exaone4
    exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text
    gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj
    granite granite_swa granitemoe granitemoe_swa granitemoehybrid granitemoeshared helium hunyuan_v1_dense
    hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder jais2 jamba kimi_linear kolibri1 laguna lara_mini lfm2
    lfm2_moe lfm3 llama llama4_text mamba mamba2 mellum mimo_v2_flash minicpm3 minimax_m2 ministral ministral3
    mistral mixtral modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe opt
    persimmon phi phi3 phi4_multimodal phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
    qwen3_next sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma youtu zamba2
    """.split()  # noqa: SIM905
)
"""`model_type`s for which an exported small random model matches the logits of transformers."""

_REFUSED_FOR = {
    "its attention is hard-coded, so its attention function cannot be replaced": (
        "cpmant ctrl diffllama doge gpt_neox_japanese openai-gpt xglm xlm xlnet"
    ),
    "its recurrence is hard-coded, so its functions cannot be replaced": "minimax recurrent_gemma rwkv xlstm",
    "each of its layers has several recurrences": "zamba",
    "the convolution of its queries and keys is hard-coded, so its functions cannot be replaced": "zaya",
    "its mixture of experts is hard-coded, so its experts function cannot be replaced": "dbrx jetmoe longcat_flash",
    "its experts have a gate of their own": "beam",
    "its attention chooses the tokens that it sees (sparse attention)": (
        "axk2 deepseek_v32 deepseek_v4 dots3_note_text glm_moe_dsa hy_v4 minimax_m3_vl_text qwen4_exp_text"
    ),
    "its attention adds a bias that each token computes for distances": "inkling2_text inkling_text",
    "its attention is chunked": "reformer",
    "its layers see patches of bytes in place of tokens": "blt",
    "its layers run several times, each time with a cache of its own": "dory hrm_text inkling2_loop_text",
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
