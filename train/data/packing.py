"""Which sequences share a row."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def best_fit(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Which sequences share a row: the longest first, each into the fullest row that still has room for it.

    Args:
        sizes: tokens of each sequence, 1 to `length`.

    Returns:
        Members of each row; every sequence is in one of them.
    """
    rows: list[list[int]] = []
    free: dict[int, list[int]] = {}  # rows by the room they have
    rooms: list[int] = []  # the keys of `free`, rising
    for member in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[member]
        found = bisect_left(rooms, size)
        if found == len(rooms):
            row, room = len(rows), length
            rows.append([])
        else:
            room = rooms[found]
            row = free[room].pop()
            if not free[room]:
                del free[room], rooms[found]
        rows[row].append(member)
        left = room - size
        if left:
            if left not in free:
                free[left] = []
                insort(rooms, left)
            free[left].append(row)
    return rows
