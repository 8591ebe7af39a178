"""Generation by vLLM, where it is installed: greedy answers of the base model and of adapters on it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lpa.messages import one_line

from .bench import Tokens
from .subjects import BASE, EvaluationError

Generate = Callable[[Sequence[Tokens], int, Sequence[int]], list[Tokens]]


class VLLM:
    """One engine for all subjects, by vLLM's offline interface (`LLM.generate` with `LoRARequest`).

    It holds a second copy of the model, beside the one that attacks and scores need, in the memory that is free.

    Args:
        model: folder or hub name of the base model. dtype: of its weights, as "bfloat16".
        adapters: name -> folder.
        context: the longest conversation in tokens.

    Raises:
        EvaluationError: vLLM is not installed, or cannot load this model.
    """

    def __init__(self, model: str, adapters: Mapping[str, str], dtype: str, context: int) -> None:
        check_installed()
        import vllm
        from peft import PeftConfig

        options: dict[str, Any] = {}
        if adapters:
            rank = max(int(PeftConfig.from_pretrained(path).r) for path in adapters.values())
            options = {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}  # what it takes
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            options["gpu_memory_utilization"] = 0.8 * free / total
        try:
            self.engine = vllm.LLM(model=model, dtype=dtype, max_model_len=context, seed=0, **options)
        except Exception as error:  # of many kinds, by model and device
            raise EvaluationError(f"generator='vllm' cannot load {model}: {one_line(error)}") from error
        self.adapters = {name: (number, path) for number, (name, path) in enumerate(adapters.items(), 1)}

    def of(self, subject: str) -> Generate:
        """What gives a subject's greedy answers, as `Bench.generate`."""
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        request = None if subject == BASE else LoRARequest(subject, *self.adapters[subject])

        def generate(prompts: Sequence[Tokens], longest: int, ends: Sequence[int]) -> list[Tokens]:
            sampling = SamplingParams(temperature=0.0, max_tokens=longest, stop_token_ids=list(ends))
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            found = self.engine.generate(asked, sampling, lora_request=request, use_tqdm=False)
            return [list(each.outputs[0].token_ids) for each in found]

        return generate


def check_installed() -> None:
    """Refuse at once where vLLM is not there.

    Raises:
        EvaluationError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EvaluationError("generator='vllm' needs a package that is not installed: pip install vllm")
