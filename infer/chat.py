"""Conversations: what was said, and the slot whose caches each turn goes on from."""

from collections.abc import Generator, Iterator
from contextlib import closing, suppress

from convert.messages import Message
from convert.tokenizer import final_answer
from convert.values import json_kind
from domino_jax.runtime.command import UsageError, print_error
from infer.engine import Chunk, Decoding, Engine, Sequence
from infer.prompts import Encoder, Prompt


class Chat:
    """One conversation. The whole of it is the prompt of every turn; what an earlier turn has run is not run again.

    A model without a chat template, or with raw=True, continues each message by itself.

    Attributes:
        messages: what was said, as {"role": ..., "content": ...}.
        last: the newest turn, with its tokens and accepted drafts; None before the first.
    """

    def __init__(
        self, engine: Engine, encoder: Encoder, decoding: Decoding, max_new_tokens: int, stop: tuple[str, ...] = ()
    ):
        self.messages: list[Message] = []
        self.last: Sequence | None = None
        self._engine = engine
        self._encoder = encoder
        self._decoding = decoding
        self._limit, self._stop = max_new_tokens, stop
        self._slots = engine.slots(1, decoding.speculative)  # a row that holds what was said

    def send(self, message: str) -> str:
        """The answer to a message.

        Raises:
            DominoError: the message is empty, or the conversation has outgrown the model's positions. The conversation
                is as it was before the message.
        """
        return "".join(self.stream(message))

    def stream(self, message: str) -> Generator[str]:
        """The answer to a message, as it grows; see `send`. An answer that is not read to its end is cut there."""
        turn, _ = self.begin(message)
        with closing(self.decode(turn)) as chunks:
            for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    def begin(self, message: str) -> tuple[Sequence, list[str]]:
        """The next turn, to be given to `decode`, with warnings.

        Raises:
            DominoError: see `send`.
        """
        if not isinstance(message, str):
            raise UsageError(f"a message must be text, found {json_kind(message)}.")
        messages = [*self.messages, {"role": "user", "content": message}]
        prompt = Prompt(messages=messages) if self._encoder.is_chat else Prompt(text=message)
        found = self._engine.sequence(self._encoder.ids(prompt), self._limit, 0, self._stop)
        self.messages = messages
        return found

    def decode(self, turn: Sequence) -> Generator[Chunk]:
        """Generate a turn; what there is of the answer in the end, or when it is cut, joins the messages."""
        self.last = turn
        try:
            with closing(self._engine.stream([turn], self._decoding, self._slots)) as chunks:
                yield from chunks
        finally:
            if turn.finish_reason is None:  # it failed
                self.messages = self.messages[:-1]
            else:
                said = turn.text or ""
                answer = final_answer(said) if self._encoder.thinking else said
                self.messages.append({"role": "assistant", "content": answer})

    def start_over(self) -> None:
        """Forget what was said. The caches stay: what the next prompt shares with them is used."""
        self.messages = []


def read_lines() -> Iterator[str]:
    """The lines typed at the terminal, without empty ones, until Ctrl-D, or Ctrl-C instead of a line."""
    with suppress(ImportError):
        import readline  # noqa: F401  (line editing for input())
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeDecodeError as error:
            print_error(f"that line is not text: {error}.")
            continue
        if line:
            yield line
