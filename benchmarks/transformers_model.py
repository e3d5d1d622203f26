"""transformers' generate over a checkpoint, on one thread and in the stored dtype. Part of
`benchmarks.model`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import transformers


class TransformersModel:
    """Greedy, and ignores end tokens."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    @property
    def description(self) -> str:
        config = self._model.config
        return (
            f"transformers {transformers.__version__}, torch {torch.__version__}, "
            f"{self._model.dtype}, attention {config._attn_implementation}, "
            f"experts {config._experts_implementation}"
        )

    def generate_seconds(self, prompts_SC: np.ndarray, num_tokens: int) -> float:
        """The thread's CPU time for so many new tokens of each prompt."""
        ids = torch.from_numpy(prompts_SC)
        began = time.thread_time()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=0,
        )
        return time.thread_time() - began
