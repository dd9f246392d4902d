"""Which page of a pool holds what: pages are given to requests, shared where texts begin alike, and used again.

This is bookkeeping on the host. The pages themselves are `paged.PagedKVCache`.
"""

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

PAGE_SIZE = 16  # positions of a page, as vLLM has it
SIZES_OF_PAGES = tuple(1 << power for power in range(8))  # a length bucket is whole pages


class PagePool:
    """Pages 1 ... count, each free, held by one request or several, or idle: without a holder, but its text is known.

    A page whose every position is run is found again by its text and all the text before it. A page that several hold
    is never written: rows write behind their last whole page.
    """

    def __init__(self, count: int, page_size: int):
        """Args:
        count: pages to give, without page 0.
        page_size: positions of a page.
        """
        self.count, self.page_size = count, page_size
        self._free = list(range(count, 0, -1))  # the last one is given first
        self._holders: Counter[int] = Counter()
        self._found: dict[bytes, int] = {}  # a page by its text and what is before it
        self._names: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # the first is used again first

    @property
    def available(self) -> int:
        """Pages that can be given: the free and the idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that requests hold; a shared one counts once."""
        return self.count - self.available

    def pages_for(self, positions: int) -> int:
        """How many pages so many positions need."""
        return -(-positions // self.page_size)

    def take(self, count: int) -> list[int]:
        """So many pages, of which there must be as many; idle ones lose their text, the longest idle first."""
        assert count <= self.available, "whoever takes pages looks first"
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                del self._found[self._names.pop(page)]
            self._holders[page] = 1
            pages.append(page)
        return pages

    def find(self, ids: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning of a text, for reading alone; they are held from now on."""
        pages = []
        for name in self._page_names(ids):
            page = self._found.get(name)
            if page is None:
                break
            self._holders[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def name(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Make the whole pages of a text that has been run known.

        Args:
            ids: the text; of its last page only where it is whole.
            pages: that hold it, the first positions first.
        """
        for name, page in zip(self._page_names(ids), pages, strict=False):
            if name not in self._found and page not in self._names:
                self._found[name], self._names[page] = page, name

    def unknown(self, pages: Sequence[int]) -> list[int]:
        """Those whose text is not known, which nobody shares."""
        return [page for page in pages if page not in self._names]

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back from a holder, in the order of their positions: of a text the end is used again first."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._names:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _page_names(self, ids: Sequence[int]) -> Iterator[bytes]:
        """A name for each whole page of a text: a digest of it and all before it."""
        name = b""
        for start in range(0, len(ids) - self.page_size + 1, self.page_size):
            text = np.asarray(ids[start : start + self.page_size], np.int64).tobytes()
            name = hashlib.sha256(name + text).digest()
            yield name
