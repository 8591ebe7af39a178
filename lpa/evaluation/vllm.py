"""Generation by vLLM, where it is installed: greedy answers of the base model and of adapters on it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lpa.messages import one_line

from .bench import Tokens
from .subjects import BASE, EvaluationError, adapter_config, check_start

Generate = Callable[[Sequence[Tokens], int, Sequence[int]], list[Tokens]]


class VLLM:
    """One engine for all subjects, by vLLM's offline interface (`LLM.generate` with `LoRARequest`).

    It holds a second copy of the model, beside the one that attacks and scores need, in processes of its own until
    `close`: on a GPU in the memory that is free, on a CPU with 2 GiB for the keys and values of conversations, or what
    vLLM's VLLM_CPU_KVCACHE_SPACE says.

    Args:
        model: folder or hub name of the base model. dtype: of its weights, as "bfloat16".
        adapters: name -> folder or hub name.

    Attributes:
        context: the longest conversation in tokens, as the model and that memory allow.

    Raises:
        EvaluationError: vLLM is not installed, or cannot load this model or one of the adapters.
    """

    def __init__(self, model: str, adapters: Mapping[str, str], dtype: str) -> None:
        check_installed()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to where the table goes
        import vllm
        from vllm.lora.request import LoRARequest

        options: dict[str, Any] = {"kv_cache_memory_bytes": 2 << 30}
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            options = {"gpu_memory_utilization": 0.8 * free / total}
        if adapters:
            rank = 1 << (max(map(_rank, adapters.values())) - 1).bit_length()
            options |= {"enable_lora": True, "max_lora_rank": max(8, rank), "max_cpu_loras": len(adapters)}
        what = model
        try:
            # tokens go in and come out; -1 is the model's own length, or what the memory holds
            self.engine = vllm.LLM(
                model=model, dtype=dtype, skip_tokenizer_init=True, max_model_len=-1, seed=0, **options
            )
            self.requests = {
                name: LoRARequest(name, number, path) for number, (name, path) in enumerate(adapters.items(), 1)
            }
            for name, request in self.requests.items():  # an error at the first answer would say nothing of its cause
                what = f"the adapter {adapters[name]}"
                self.engine.llm_engine.add_lora(request)
        except Exception as error:  # of many kinds, by model and device
            self.close()
            raise EvaluationError(f"generator='vllm' cannot load {what}: {one_line(error)}") from error
        self.context = int(self.engine.llm_engine.model_config.max_model_len)

    def close(self) -> None:
        """End its processes, and give back its memory."""
        if hasattr(self, "engine"):
            self.engine.llm_engine.engine_core.shutdown()
            del self.engine

    def of(self, subject: str) -> Generate:
        """What gives a subject's greedy answers, as `Bench.generate`."""
        from vllm import SamplingParams

        request = None if subject == BASE else self.requests[subject]

        def generate(prompts: Sequence[Tokens], longest: int, ends: Sequence[int]) -> list[Tokens]:
            sampling = SamplingParams(temperature=0.0, max_tokens=longest, stop_token_ids=list(ends), detokenize=False)
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            found = self.engine.generate(asked, sampling, lora_request=request, use_tqdm=False)
            return [list(each.outputs[0].token_ids) for each in found]

        return generate


def _rank(adapter: str) -> int:
    """The largest rank in an adapter.

    Raises:
        EvaluationError: it is no LoRA.
    """
    config = adapter_config(adapter)
    if config.peft_type != "LORA":
        raise EvaluationError(f"generator='vllm' takes LoRA alone; the adapter {adapter} is {config.peft_type.value}")
    check_start(f"the adapter {adapter}", config)
    return max(config.r, *config.rank_pattern.values(), 1)


def check_installed() -> None:
    """Refuse at once where vLLM is not there.

    Raises:
        EvaluationError: it is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise EvaluationError("generator='vllm' needs a package that is not installed: pip install vllm")
