"""Slots whose keys and values lie in pages: memory by what requests hold, beginnings that they share, and preemption.

A request takes pages as it grows. Where there are none left the newest one is set aside and runs again later from its
tokens: its state is then what it was, so that its sample goes on as if nothing had happened.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from domino_jax import cache, decode
from domino_jax.decode import DecodeConfig, DecodeState
from domino_jax.errors import DominoError
from domino_jax.paged import PagedKVCache, with_pages, with_table, without_pages, zero_pages
from domino_jax.processors import new_processors
from domino_jax.runtime.memory import free_bytes
from domino_jax.runtime.pages import PAGE_SIZE, SIZES_OF_PAGES, PagePool
from domino_jax.runtime.processes import broadcast_from_first
from domino_jax.runtime.slots import STEPS_PER_CYCLE, Completion, Prefill, Slots, rows_of
from domino_jax.runtime.timing import timed
from domino_jax.sharding import fetch, model_devices, shard_copy
from domino_jax.weights import Params


class Pages(NamedTuple):
    """The memory of `PagedSlots`."""

    count: int  # pages
    size: int = PAGE_SIZE  # positions of each
    share: bool = True  # the pages of equal beginnings

    def longest(self, configs: DecodeConfig) -> int:
        """Tokens of prompt and answer that they suffice for, where a request has them alone; the last is never run."""
        return self.count * self.size - configs.lookahead + 1


def plan_pages(
    configs: DecodeConfig, dtype: Any, rows: int, positions: int, memory: int | None = None, size: int = PAGE_SIZE
) -> int:
    """How many pages to have: for so many rows of so many positions, as far as the memory goes.

    Args:
        memory: bytes of keys and values on each device; what is free where None.

    Raises:
        DominoError: it does not suffice for one position more than a cycle writes.
    """
    per_page = decode.position_bytes(configs, dtype) * size // model_devices()
    wanted = rows * -(-(positions + configs.lookahead) // size)
    free = memory
    if memory is None and (known := free_bytes()) is not None:
        (free,) = map(int, broadcast_from_first([known]))  # all processes must have the same shapes
    count = wanted if free is None else min(wanted if memory is None else free, free // per_page - 1)
    if count * size <= configs.lookahead:
        raise DominoError(
            f"{free:,} bytes for keys and values hold {max(count, 0)} pages of {size} positions, too few for any "
            "request: give more --kv-memory."
        )
    return count


class PagedSlots(Slots):
    """`Slots` over a pool of pages. The mesh in context does not divide the batch."""

    def __init__(
        self,
        params: Params,
        configs: DecodeConfig,
        size: int,
        dtype: Any,
        *,
        pages: Pages,
        **options: Any,
    ):
        """Args:
        pages: of the pool. Their size is a power of two up to 128. Where they are shared, requests whose prompts begin
            alike have that beginning once, one after another too.
        options: of `Slots`.

        Raises:
            DominoError: the mesh divides the batch, the size is another one, or the pool is too small for any request.
        """
        super().__init__(params, configs, size, dtype, **options)
        if self._group > 1:
            raise DominoError("a KV cache in pages needs a mesh with data=1; with more it is contiguous.")
        if pages.size not in SIZES_OF_PAGES:
            raise DominoError(f"a page has a power of two of positions, up to 128, found {pages.size}.")
        self._memory, self._page_size = pages, pages.size
        self._share = pages.share and decode.shares_prefixes(configs)
        self._pool = PagePool(pages.count, pages.size)
        self._pages: dict[Completion, list[int]] = {}  # in the order of positions
        self._change = True  # requests have come or gone since the last dispatch
        if self.longest < 2:
            raise DominoError(f"{pages.count} pages of {pages.size} positions are too few for any request.")

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer that a request may have."""
        return self._memory.longest(self._configs)

    @property
    def reserved(self) -> int:
        """Positions that requests have memory for."""
        return self._pool.held * self._page_size

    @property
    def usage(self) -> float:
        return self._pool.held / self._memory.count

    def admit(self, completion: Completion) -> None:
        request = completion.request
        tokens = len(request.prompt) + request.params.max_tokens
        if tokens > self.longest:
            raise DominoError(
                f"the prompt's {len(request.prompt)} tokens and {request.params.max_tokens} new ones are {tokens}, "
                f"and the KV cache has pages for {self.longest}: ask for less, or give it more memory."
            )
        super().admit(completion)

    def _forget(self) -> None:
        super()._forget()
        self._prefill, self._pages, self._pool = None, {}, PagePool(self._memory.count, self._page_size)

    def _begin(self) -> list[Completion]:
        return self._run_prompts()

    def _start(self) -> bool:
        """Begin with the prompt of the first waiting request, if there are a slot and pages for it."""
        if not self._waiting or len(self._running) >= self.size:
            return False
        c = self._waiting[0]
        # What was set aside has tokens already, the last of which has not been run.
        run = c.ids[:-1] if c.tokens else c.ids
        known = self._pool.find(run[:-1]) if self._share else []
        needed = self._pool.pages_for(len(run) + self._configs.lookahead) - len(known)
        if self._pool.available < needed + len(self._running):  # each of the others may soon need one
            self._pool.give(known)
            return False
        self._waiting.popleft()
        self._pages[c] = known + self._pool.take(needed)
        held = len(known) * self._page_size
        if not c.tokens:
            c.reused = held
        offsets = _chunks(len(run), held)
        self._prefill = Prefill([c], self._steps(c, run, offsets), offsets.step)
        return True

    def _steps(self, c: Completion, run: list[int], offsets: range) -> decode.PrefillSteps:
        """Run these ids in the batch's pages, as `decode.prefill_steps`; what was set aside goes on where it was.

        Returns:
            The state of one row, without the pages.
        """
        capacity = cache.length_bucket(max(len(run) + self._configs.lookahead, offsets.stop))
        tokens = np.zeros((1, capacity), np.int32)
        tokens[0, : len(run)] = run
        state = self._prefill_state(c, len(run), capacity)
        if offsets.start:
            state = decode.recall(self._configs, state, shard_copy(tokens, "B T"))
        last = shard_copy(np.zeros((1, self._configs.target.hidden_size), self._params.target.norm.dtype), "B D")
        for offset in offsets:
            if offset > offsets.start:
                yield
            batch = self._state if self._state is not None else self._empty_batch()
            self._state = batch  # if what follows fails, it is seen by this
            piece = shard_copy(tokens[:, offset : offset + offsets.step], "B T")
            whole = with_pages(state, batch)
            whole, last = decode.prefill(self._params, self._configs, whole, piece, np.int32(offset), last)
            self._state, state = with_pages(batch, whole), without_pages(whole)
            jax.block_until_ready(last)  # what compiles next would hide its time
        if not c.tokens:
            return decode.first_token(self._params, self._with_logprobs([c.request]), state, last)
        token, emitted = np.array(c.tokens[-1:], np.int32), np.array([len(c.tokens)], np.int32)
        return state._replace(token=shard_copy(token, "B"), emitted=shard_copy(emitted, "B")), None

    def _prefill_state(self, c: Completion, length: int, capacity: int) -> DecodeState:
        """The state of one row whose text is going to be run."""
        request, processors = c.request, None
        if self._processors:
            masks = [c.guide.allowed() if c.guide else None]
            processors = new_processors([request.params], [request.prompt], self._vocab, masks, [c.tokens])
        caches = decode.init_paged_caches(self._configs, 1, capacity, self._dtype, 0, self._page_size)
        state = decode.begin(rows_of([request]), [length], caches, processors)
        return with_table(state, self._table({0: c}, 1, capacity))

    def _empty_batch(self) -> DecodeState:
        """A batch of free slots, with all pages."""
        rows = self.sizes[0]
        caches = decode.init_paged_caches(
            self._configs, rows, cache.SMALLEST_BUCKET, self._dtype, self._memory.count + 1, self._page_size
        )
        return self._free_rows(rows, caches)

    def _insert(self, found: list[Completion], new: DecodeState, logprobs: decode.Logprobs | None) -> list[Completion]:
        (c,), changed = found, []
        with timed("prefill", [self.seconds, c.seconds]):
            if not c.tokens:
                self._first(found, *fetch((new.token, new.finite, logprobs)))
                changed = found
            if c not in self._began:
                return changed
            assert self._state is not None and isinstance(new.cache, PagedKVCache)
            if self._share:
                self._pool.name(c.ids[:-1], self._pages[c])
            batch, rest = self._state, without_pages(self._state)
            width = max(batch.cache.capacity, new.cache.table.shape[1] * self._page_size)
            if (rows := self._size_for(len(self._running) + 1)) > self.rows:
                rest = self._with_rows(rest, rows)
            slot = min(set(range(rows)) - set(self._running))
            self._running[slot], self._change = c, True
            if width > batch.cache.capacity:
                rest = self._widened(rest, width)
            # The tables are written anew before the next dispatch.
            new = with_table(new, np.zeros((1, width // self._page_size), np.int32))
            rest = decode.insert(self._configs, rest, new, shard_copy(np.array([slot], np.int32), "-"))
            self._state = with_pages(rest, batch)
        return changed

    def _widened(self, rest: DecodeState, capacity: int) -> DecodeState:
        """A batch without its pages, for rows of so many positions."""
        rest = decode.grow_caches(self._configs, rest, capacity)
        return with_table(rest, np.zeros((rest.token.shape[0], capacity // self._page_size), np.int32))

    def _table(self, rows: dict[int, Completion], size: int, capacity: int) -> np.ndarray:
        """The page table of rows, [size, capacity / page_size]."""
        table = np.zeros((size, capacity // self._page_size), np.int32)
        for row, c in rows.items():
            table[row, : len(self._pages[c])] = self._pages[c]
        return table

    def _make_room(self) -> None:
        """Give every running row pages for its next cycle, setting the newest aside where there are too few."""
        lookahead = self._configs.lookahead
        for c in sorted(self._running.values(), key=self._began.__getitem__):
            while c in self._running.values():
                needed = self._pool.pages_for(len(c.ids) - 1 + lookahead) - len(self._pages[c])
                if needed <= self._pool.available:
                    self._pages[c] += self._pool.take(max(0, needed))
                    break
                beside = self._prefill.completions if self._prefill else []
                self._set_aside(max([*self._running.values(), *beside], key=self._began.__getitem__))
        # As far as a dispatch may come, so that it need not end early.
        ahead = self._cycles * max(STEPS_PER_CYCLE, self._configs.proposals + 1)
        for c in self._running.values():
            reach = min(len(c.ids) - 1 + ahead, len(c.request.prompt) + c.request.params.max_tokens) + lookahead
            needed = self._pool.pages_for(reach) - len(self._pages[c])
            self._pages[c] += self._pool.take(max(0, min(needed, self._pool.available)))

    def _set_aside(self, c: Completion) -> None:
        """Let a request wait again, before all others; its pages are free."""
        if self._prefill and c in self._prefill.completions:
            self._prefill = None
            self._pool.give(self._pages.pop(c))
        else:
            self._leave(c)
        c.preemptions += 1
        self._waiting.appendleft(c)

    def _leave(self, c: Completion) -> None:
        """Free the slot and the pages of a request; what they hold stays known for others."""
        for slot, other in list(self._running.items()):
            if other is c:
                del self._running[slot]
                self._over = True
        pages = self._pages.pop(c)
        if not c.finite and self._state is not None:
            # Attention multiplies what a page holds, even by zero. What is known was finite.
            self._state = zero_pages(self._state, self._pool.unknown(pages))
        elif self._share:
            self._pool.name(c.ids[:-1], pages)
        self._pool.give(pages)
        self._change = True

    def _prepare(self) -> DecodeState:
        assert self._state is not None
        state, needed = self._state, max(len(self._pages[c]) for c in self._running.values()) * self._page_size
        capacity = cache.length_bucket(needed)
        if not self._change:  # a smaller bucket only where requests change: what grows goes on growing
            capacity = max(capacity, state.cache.capacity)
        self._change = False
        rest = self._with_fewer_rows(without_pages(state))
        if capacity != state.cache.capacity:
            rest = self._widened(rest, capacity)
        self._state = state = with_pages(rest, state)
        return with_table(self._host_ends(state), self._table(self._running, self.rows, capacity))

    def _ended(self, completion: Completion) -> None:
        super()._ended(completion)
        if self._prefill and completion in self._prefill.completions:
            self._prefill = None
            self._pool.give(self._pages.pop(completion))
        elif completion in self._pages:
            self._leave(completion)


def _chunks(length: int, held: int) -> range:
    """The chunks of a text of so many ids, by their first positions, of which the first ones need not run.

    Of short rests two sizes are used, since each is a program to compile.
    """
    rest = length - held
    step = min(decode.LARGEST_CHUNK, max(decode.SMALLEST_CHUNK, 1 << (rest - 1).bit_length()))
    if held:
        step = decode.CONTINUED_CHUNK if rest <= decode.CONTINUED_CHUNK else decode.LARGEST_CHUNK
    return range(held, held + -(-rest // step) * step, step)
