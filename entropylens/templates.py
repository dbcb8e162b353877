"""How a problem is put to a model: the paper's templates (A.3)."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["INSTRUCTION", "TEMPLATES"]

#: The system message of A.3.
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_CHATML = (
    f"<|im_start|>system\n{INSTRUCTION}<|im_end|>\n"
    "<|im_start|>user\n{problem}<|im_end|>\n<|im_start|>assistant\n"
)

#: Templates of A.3 as text with {problem}; `chat` is the tokenizer's own chat template.
TEMPLATES: Mapping[str, str | None] = {
    "chat": None,
    "qwen-math": _CHATML,
    "qwen3-nothinking": _CHATML + "<think>\n\n</think>\n\n",
    "octothinker": (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. User: You must put your answer inside \\boxed{} and "
        "Your final answer will be extracted automatically by the \\boxed{} tag.\n"
        "{problem}\nAssistant:"
    ),
    "plain": "{problem}",
}
