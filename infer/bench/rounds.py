"""One round of one mode: all prompts, batch after batch, with its times."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from domino_jax.errors import DominoError
from infer.bench.options import Bench
from infer.bench.rows import LEAN
from infer.engine import Decoding, Engine, Sequence, tau


def batches(items: list[Any], size: int) -> list[list[Any]]:
    """Whole batches of `size`; what is left over is not run."""
    return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]


def run_ours(engine: Engine, prompts: list[list[int]], options: Bench, batch: int, mode: str) -> dict[str, Any]:
    """One round of one of our modes: times and acceptance summed over its batches, cycles by their drafts."""
    seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
    accepted: list[int] = []
    tokens, cycles, outputs, used = 0, 0, [], Counter()
    for number, group in enumerate(batches(prompts, batch)):
        rows: list[Sequence] = []
        for i, prompt in enumerate(group):
            sequence, warnings = engine.sequence(prompt, options.new_tokens, row=number * batch + i)
            if warnings:
                raise DominoError(f"--new-tokens {options.new_tokens}: {warnings[0]}")
            rows.append(sequence)
        engine.generate(rows, Decoding(options.sampling.params(), mode != LEAN))
        for phase in seconds:
            seconds[phase] += engine.seconds[phase]
        accepted += [m for s in rows for m in s.accepted]
        tokens += sum(len(s.tokens) - 1 for s in rows)
        cycles += max(len(s.cycles) + s.steps for s in rows)
        used += sum((Counter({0: s.steps}) + Counter(len(c.drafts) for c in s.cycles) for s in rows), Counter())
        outputs += [s.tokens for s in rows]
    figures = {**seconds, "tokens": tokens, "cycles": cycles, "tau": tau(accepted), "outputs": outputs}
    return {**figures, "used": used}


def transformers_runner(
    folder: Path, options: Bench, dtype: str
) -> Callable[[list[list[int]], int], dict[str, Any]] | None:
    """A round of transformers' greedy generate on the same weights and kind of device, in the same dtype.

    None where that is not to be had: no torch, none for this device, a sampled run, or Orbax weights.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    if not options.sampling.greedy or not any(folder.glob("*.safetensors")):
        return None
    place = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if place is None or (place == "cuda" and not torch.cuda.is_available()):
        return None
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, trust_remote_code=False
    )
    model = model.to(place).eval()

    def generate(ids: Any, new: int) -> Any:
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new
            )
            return out.cpu()  # waits for the device

    def run(prompts: list[list[int]], batch: int) -> dict[str, Any]:
        prefill, whole, tokens = 0.0, 0.0, 0
        for group in batches(prompts, batch):
            ids = torch.tensor(group, device=place)
            began = time.perf_counter()
            generate(ids, 1)
            prefill += time.perf_counter() - began
            began = time.perf_counter()
            generate(ids, options.new_tokens)
            whole += time.perf_counter() - began
            tokens += len(group) * (options.new_tokens - 1)
        cycles = len(batches(prompts, batch)) * (options.new_tokens - 1)
        return {"compile": 0.0, "prefill": prefill, "decode": whole - prefill, "tokens": tokens, "cycles": cycles}

    return run
