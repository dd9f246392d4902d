"""One round of one mode: all prompts, batch after batch, with its times."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert.folders import GGUF, HF, folder_format
from convert.hf import read_json
from convert.quantized import QUANTIZATION
from convert.tensors import open_tensors
from domino_jax.errors import DominoError
from domino_jax.runtime.devices import own_devices
from infer.bench.options import Bench
from infer.bench.rows import LEAN
from infer.engine import Decoding, Engine, Sequence, tau


def batches(items: list[Any], size: int) -> list[list[Any]]:
    """Whole batches of `size`; what is left over is not run."""
    return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]


def run_ours(engine: Engine, prompts: list[list[int]], options: Bench, batch: int, mode: str) -> dict[str, Any]:
    """One round of one of our modes: times and acceptance summed over its batches, what auto chose."""
    seconds = {"compile": 0.0, "prefill": 0.0, "decode": 0.0}
    accepted: list[int] = []
    tokens, cycles, outputs = 0, 0, []
    before = Counter(engine.auto.used) if engine.auto else Counter()
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
        outputs += [s.tokens for s in rows]
    figures = {**seconds, "tokens": tokens, "cycles": cycles, "tau": tau(accepted), "outputs": outputs}
    return {**figures, "used": engine.auto.used - before if engine.auto else Counter()}


def transformers_model(folder: Path, dtype: str) -> Any:
    """transformers' model with a folder's weights; None where it can't have them.

    Of GGUF blocks and quantized weights it gets the values that we read: its own reading needs one more package.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    form, how = folder_format(folder), {"local_files_only": True, "trust_remote_code": False}
    quantized = read_json(folder / "config.json").get(QUANTIZATION) is not None
    if form == HF and not quantized:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **how)
    if form not in (HF, GGUF):
        return None
    config = AutoConfig.from_pretrained(folder, **how)
    if quantized:
        delattr(config, QUANTIZATION)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    files = open_tensors(folder)
    values = {name: np.asarray(files.read(stored)).astype(np.float32) for name, stored in files.stored.items()}
    missing, unexpected = model.load_state_dict({k: torch.from_numpy(v) for k, v in values.items()}, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:  # a mixture of experts, which it holds otherwise
        return None
    model.tie_weights()
    return model


def transformers_runner(
    folder: Path, options: Bench, dtype: str
) -> Callable[[list[list[int]], int], dict[str, Any]] | None:
    """A round of transformers' greedy generate on the same weights and kind of device, in the same dtype.

    None where that is not to be had: no torch, none for this device, a sampled run, or Orbax weights.
    """
    try:
        import torch
    except ImportError:
        return None
    if not options.sampling.greedy:
        return None
    place = {"cpu": "cpu", "gpu": "cuda"}.get(own_devices()[0].platform)
    if place is None or (place == "cuda" and not torch.cuda.is_available()):
        return None
    model = transformers_model(folder, dtype)
    if model is None:
        return None
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
