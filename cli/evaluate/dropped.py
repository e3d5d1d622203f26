"""The score of the same model without the experts of a dead rank, as in a system that masks a dead
rank and continues. One process beside the instance computes it."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cli.evaluate.documents import Document
from cli.evaluate.scoring import Score, score_of
from shared.errors import Unavailable


async def score_without_rank(
    model: Path, documents: Sequence[Document], *, dead_rank: int, num_ranks: int
) -> Score:
    """Experts have one replica each and are assigned to `num_ranks` ranks in turn; those of
    `dead_rank` contribute nothing. Raises Unavailable."""
    with tempfile.TemporaryDirectory(prefix="starfish-eval-") as folder:
        path = Path(folder) / "tokens.json"
        path.write_text(json.dumps([document.tokens for document in documents]))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gpu_worker.model_tools", "score", str(model), str(path)),
            *("--num-ranks", str(num_ranks), "--without-rank", str(dead_rank)),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
    if process.returncode:
        raise Unavailable(f"scoring in one process failed: {err.decode().strip()[-300:]}")
    return score_of(json.loads(out), documents)
