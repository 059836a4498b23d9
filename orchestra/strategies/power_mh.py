"""Power sampling by Metropolis-Hastings: draws from the sharpened distribution of whole texts, p(y)^alpha."""

from __future__ import annotations

from pydantic import Field

from orchestra.outcome import Outcome
from orchestra.runtime.engine import Capability
from orchestra.strategies.base import Strategy
from orchestra.strategies.continuation import Continuation, Standing, accepted, exact, forget, log_ratio
from orchestra.thread import BudgetCut, Thread

MAX_TOKENS = 3072
"""Where nobody has set a limit: the paper's."""


class PowerMh(Strategy):
    """A draw from p(y)^alpha over whole texts y, normalised, by a Markov chain (reasoning with sampling).

    The text grows block by block. After each block come moves: cut at a random token, draw the rest anew, and keep that
    by the Metropolis-Hastings ratio. Where the chain ends is the result; the candidates are the texts that it has been
    at since the last block, weighted by how long.

    Attributes:
        alpha: the exponent; 1 is plain sampling.
        blocks: in how many the longest text would grow.
        moves: after each block.
        temperature: of the proposals; None: 1 / alpha. It changes how fast the chain mixes, not where to.
        max_tokens: most tokens of the text; None: the run's, else 3072.
        early_stop: end after the block in which the text has ended, as the paper does; else all blocks have their
            moves, which may also lengthen a text that had ended.
        approximate: allow settings that truncate the distribution, which the outcome then says.
    """

    needs = frozenset({Capability.CONTINUE, Capability.CUT, Capability.LOGPROBS, Capability.TEMPERED})
    paper = "Karan & Du 2025, arXiv 2510.14901"

    alpha: float = Field(4, ge=1, le=100)
    blocks: int = Field(16, ge=1)
    moves: int = Field(10, ge=0)
    temperature: float | None = Field(None, gt=0, le=100)
    max_tokens: int | None = Field(None, ge=1)
    early_stop: bool = False
    approximate: bool = False

    async def __call__(self, thread: Thread) -> Outcome:
        """Walk the chain."""
        settings = thread.sampling()
        said = exact(self.name, settings, self.approximate, cuts=True)
        limit = self.max_tokens or settings.max_tokens or MAX_TOKENS
        sampling = {"temperature": self.temperature or 1 / self.alpha}
        rng = thread.random(self.name)
        state, standing = Continuation(thread.fork(1)[0]), Standing(thread)
        visits: dict[tuple[int, ...], tuple[Continuation, int]] = {}
        for block in range(1, self.blocks + 1):
            reach = -(-limit * block // self.blocks)
            try:
                state = await state.grow(reach - len(state), sampling)
            except BudgetCut as spent:
                standing.tell(spent.thread.candidate())
                raise
            standing.tell(await state.candidate())
            visits = {state.ids: (state, 1)}
            for _ in range(self.moves if state.ids else 0):
                cut = rng.randrange(len(state))
                new = await state.cut(cut).grow(reach - cut, sampling)
                if accepted(log_ratio(state, new, cut, self.alpha), rng):
                    state, new = new, state
                    standing.tell(await state.candidate())
                forget([new], [state])
                visits[state.ids] = (state, visits.get(state.ids, (state, 0))[1] + 1)
            if self.early_stop and state.ended and block < self.blocks:
                said.append(f"early_stop after block {block} of {self.blocks}")
                break
        total = sum(count for _, count in visits.values())
        end = await state.candidate()
        outcome = Outcome(
            text=end.text,
            answer=end.answer,
            finish_reason=end.finish_reason,
            candidates=[await visited.candidate(count / total) for visited, count in visits.values()],
            approximate=said,
        )
        outcome._thread = await state.thread()
        return outcome
