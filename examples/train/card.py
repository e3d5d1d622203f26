"""Writes the model card and the loss curve from train.py's logs, with samples that it draws.

python card.py --model ../../models/starling-14m --log OUT/log.json --dense DENSE/log.json
               --data DATA --image ../../docs/img/starling-loss.png
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from sources import SOURCES
from transformers import AutoModelForCausalLM, AutoTokenizer

PLAIN = ["Once upon a time", "The king", "My dear Miss Elizabeth,", "KING HENRY.\n"]
CHAT = ["Define courage.", "What is a ship?", "What is another word for fear?", "Where is Norway?",
        "Tell me a story.", "Write some lines in the style of Shakespeare.", "Who are you?",
        "Continue the story: The old man opened the door and saw a stranger."]  # fmt: skip
TEMPLATE = Path(__file__).with_name("card.md")


def rows(log: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    return [row for row in log if row.get("stage") == stage and "bits_per_byte" in row]


def plot(log: list[dict[str, Any]], dense: list[dict[str, Any]], path: Path) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=110)
    for label, entries in (("mixture of experts", log), ("dense, same active size", dense)):
        millions = entries[0]["batch_tokens"] / 1e6
        points = rows(entries, "base")[1:]
        tokens = [(row["step"] + 1) * millions for row in points]
        axes.plot(tokens, [row["bits_per_byte"] for row in points], marker=".", label=label)
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def source_table(meta: dict[str, Any]) -> str:
    lines = [
        "| source | package | licence | MB | tokens, millions | share of training |",
        "|---|---|---|---|---|---|",
    ]
    total = sum(s["weight"] * (s["end"] - s["start"]) for s in meta["train"])
    for source, counts in zip(SOURCES, meta["train"], strict=True):
        tokens = counts["end"] - counts["start"]
        share = counts["weight"] * tokens / total
        lines.append(
            f"| {source.name} | {source.package} | {source.licence} "
            f"| {counts['num_bytes'] / 1e6:.1f} | {tokens / 1e6:.2f} | {share:.1%} |"
        )
    return "\n".join(lines)


def usage_table(shares: list[list[float]]) -> str:
    lines = [
        "| layer | entropy (1 is even) | largest share | smallest share |",
        "|---|---|---|---|",
    ]
    for layer, share in enumerate(shares):
        entropy = -sum(p * math.log(p) for p in share if p > 0) / math.log(len(share))
        lines.append(f"| {layer} | {entropy:.3f} | {max(share):.1%} | {min(share):.1%} |")
    return "\n".join(lines)


def quality_table(log: list[dict[str, Any]], dense: list[dict[str, Any]]) -> str:
    """The baseline's last evaluation, and the sparse model's at the same step."""
    last = rows(dense, "base")[-1]
    same = next(row for row in rows(log, "base") if row["step"] == last["step"])
    millions = (last["step"] + 1) * log[0]["batch_tokens"] / 1e6
    final = rows(log, "base")[-1]
    final_millions = (final["step"] + 1) * log[0]["batch_tokens"] / 1e6
    lines = [
        "| model | parameters (active) | tokens, millions | held-out bits per byte |",
        "|---|---|---|---|",
    ]
    sizes, dense_sizes = (
        f"{entries[0]['parameters'] / 1e6:.1f} M ({entries[0]['active'] / 1e6:.1f} M)"
        for entries in (log, dense)
    )
    bits = final["bits_per_byte"]
    lines += [
        f"| dense | {dense_sizes} | {millions:.0f} | {last['bits_per_byte']:.3f} |",
        f"| mixture, same step | {sizes} | {millions:.0f} | {same['bits_per_byte']:.3f} |",
        f"| mixture, end of base training | {sizes} | {final_millions:.0f} | {bits:.3f} |",
    ]
    for row in rows(log, "chat")[-1:]:
        more = (row["step"] + 1) * log[0]["batch_tokens"] / 1e6
        lines.append(
            f"| mixture, after the chat stage (this checkpoint) | {sizes} "
            f"| {final_millions:.0f} + {more:.0f} | {row['bits_per_byte']:.3f} |"
        )
    return "\n".join(lines)


def samples(folder: Path) -> str:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    parts = []
    for prompt, chat in [(p, False) for p in PLAIN] + [(p, True) for p in CHAT]:
        text = prompt
        if chat:
            message = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(
                message, tokenize=False, add_generation_prompt=True
            )
        ids = torch.tensor([tokenizer.encode(text)])
        out = model.generate(ids, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9)
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        quoted = answer.replace("\n", "\n> ")
        parts.append(f"**{prompt.strip()}**{'' if chat else ' …'}\n\n> {quoted}")
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True, nargs="+", help="base, then chat")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--image", type=Path, required=True)
    args = parser.parse_args()
    log = [row for path in args.log for row in json.loads(path.read_text())]
    dense = json.loads(args.dense.read_text())
    meta = json.loads((args.data / "meta.json").read_text())
    plot(log, dense, args.image)
    last = [row for row in log if row.get("expert_shares")][-1]
    card = TEMPLATE.read_text()
    for mark, text in {
        "SOURCES": source_table(meta),
        "QUALITY": quality_table(log, dense),
        "USAGE": usage_table(last["expert_shares"]),
        "SAMPLES": samples(args.model),
    }.items():
        card = card.replace(f"<!-- {mark} -->", text)
    (args.model / "README.md").write_text(card)


if __name__ == "__main__":
    main()
