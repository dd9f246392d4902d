"""The options of `python -m infer.serve`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import DisallowNone, arg

from convert.options import GROUP, UNSET, Flag, ModelOptions, ProcessOptions, check_count, check_real
from domino_jax.runtime.command import UsageError
from domino_jax.runtime.pages import PAGE_SIZE, SIZES_OF_PAGES
from domino_jax.runtime.parsing import parse_bytes


@dataclass(frozen=True)
class KVOptions:
    """Memory for keys and values."""

    kv_cache: Literal["auto", "paged", "contiguous"] = "auto"
    """paged: requests take pages as they grow, and share those of equal beginnings; contiguous: each slot has room for
    the longest; auto: contiguous on a CPU, where it measured faster, and where the mesh divides the batch"""
    kv_memory: Annotated[str | None, DisallowNone, UNSET] = None
    """memory of all pages on each device, such as 4GiB; the default is what all slots can use, as far as it is free"""
    page_size: int = PAGE_SIZE
    """positions of a page; a power of two up to 128"""
    enable_prefix_caching: bool = True
    """run a beginning that requests share once"""

    @property
    def asked(self) -> bool:
        """Whether an option of pages is named."""
        return self != KVOptions(self.kv_cache)

    def check(self) -> None:
        """Raises: UsageError: a value is out of its range, or does nothing."""
        if self.page_size not in SIZES_OF_PAGES:
            raise UsageError(f"--page-size must be a power of two up to 128, found {self.page_size}.")
        if self.kv_memory is not None:
            try:
                parse_bytes(self.kv_memory)
            except ValueError as error:
                raise UsageError(f"--kv-memory: {error}.") from None
        if self.kv_cache == "contiguous" and self.asked:
            raise UsageError("--kv-cache contiguous has no pages: leave out --kv-memory, --page-size and the like.")


@dataclass(frozen=True)
class Serve:
    """Serve a model through OpenAI's API."""

    model: Annotated[ModelOptions, GROUP] = field(default_factory=ModelOptions)
    served_model_name: Annotated[str | None, DisallowNone, UNSET] = None
    """the name that clients use; the default is --model's"""
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 for all of this machine's"""
    port: int = 8000
    """port to listen at; 0 takes a free one"""
    api_key: Annotated[str | None, DisallowNone, UNSET] = None
    """what clients must send as Bearer, on every route; also from the environment, as DOMINO_API_KEY"""
    max_num_seqs: int = 8
    """requests that decode together"""
    max_queue: int = 64
    """requests that wait; further ones get 429"""
    kv: Annotated[KVOptions, GROUP] = field(default_factory=KVOptions)
    max_model_len: Annotated[int | None, DisallowNone, UNSET] = None
    """tokens of a prompt and its answer together; the default is what the model has"""
    max_body: int = 4 << 20
    """bytes of a request's body"""
    request_timeout: float = 600.0
    """seconds after which a request ends as it is, and a client that takes nothing of its answer is dropped"""
    shutdown_timeout: float = 30.0
    """seconds that running requests have after SIGTERM"""
    num_draft_tokens: Annotated[int | Literal["auto"], arg(name="num-draft-tokens")] = "auto"
    """draft tokens verified per cycle; auto chooses by measured time and acceptance"""
    generation_config: Literal["auto", "none"] = "auto"
    """sampling where a request is silent: as the checkpoint's generation_config.json says, or greedy"""
    thinking: Flag = False
    """think where a request is silent; public drafters are trained without, and fewer of their drafts are accepted"""
    warm_up: int = 512
    """positions up to which programs are compiled before the server is ready; 0 compiles at the first request"""
    profile: Annotated[Path | None, DisallowNone, UNSET] = None
    """folder for traces: POST /start_profile and /stop_profile"""
    processes: ProcessOptions = field(default_factory=ProcessOptions)

    def check(self) -> None:
        """Check the options before anything is loaded.

        Raises:
            UsageError: a value is out of its range.
        """
        self.model.check()
        self.processes.resolve()
        self.kv.check()
        for name in ("max_num_seqs", "max_queue", "max_body"):
            check_count(name, getattr(self, name))
        check_count("port", self.port, least=0, limit=1 << 16)
        check_count("warm_up", self.warm_up, least=0)
        if self.max_model_len is not None:
            check_count("max_model_len", self.max_model_len, least=2)
        for name in ("request_timeout", "shutdown_timeout"):
            check_real(name, getattr(self, name), "above 0")
        if self.num_draft_tokens != "auto" and self.num_draft_tokens < 1:
            raise UsageError("--num-draft-tokens must be at least 1; --draft none decodes without drafts.")
        if self.num_draft_tokens != "auto" and self.model.drafting.tree is not None:
            raise UsageError("--tree says how many drafts a cycle verifies: leave --num-draft-tokens out.")
