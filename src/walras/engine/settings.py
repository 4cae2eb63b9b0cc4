"""What an engine is: its limits, its memory, its workers and how requests find one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from walras.engine.steps import StepTimes
from walras.errors import SettingsError

FloatArray = NDArray[np.float64]
Order = Literal["fcfs", "shortest", "vtc", "priced"]


@dataclass(frozen=True, slots=True)
class Speculation:
    """Speculative decoding in expectation: `drafts` tokens are drafted a step, each right with probability `acceptance`
    given that those before it were. Every sequence emits (1 − αᵏ⁺¹)/(1 − α) tokens a step."""

    drafts: int
    acceptance: float
    draft_cost: float
    """Seconds to draft one token for all, per second of a step of the engine itself that only decodes."""

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise SettingsError(f"{self.drafts} drafts a step", key="drafts", hint="at least 1")
        if not 0 <= self.acceptance <= 1:
            raise SettingsError(f"{self.acceptance} is no probability", key="acceptance")
        if not (np.isfinite(self.draft_cost) and self.draft_cost >= 0):
            raise SettingsError(f"{self.draft_cost} is not finite and ≥ 0", key="draft_cost")

    @property
    def tokens_per_step(self) -> float:
        """Expected tokens of a sequence in a step, 1 to drafts + 1."""
        return sum(self.acceptance**k for k in range(self.drafts + 1))


@dataclass(frozen=True, slots=True)
class Disaggregation:
    """The first workers only prefill, the others decode; KV moves over one link for each prefilling worker, in order.

    The first token is emitted where the prompt is computed, the second after the transfer. The whole prompt moves, whatever the other
    worker has of it, and finds its room there when it has arrived.
    """

    prefill_workers: int
    bytes_per_token: float
    """Of KV cache."""
    bandwidth: float
    """Bytes per second of a link."""
    setup_s: float = 0.0
    """Seconds of every transfer whatever its size."""

    def __post_init__(self) -> None:
        if self.prefill_workers < 1:
            raise SettingsError(f"{self.prefill_workers} of them", key="prefill_workers", hint="at least 1")
        for key in ("bytes_per_token", "setup_s"):
            if not (np.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise SettingsError(f"{getattr(self, key)} is not finite and ≥ 0", key=key)
        if not self.bandwidth > 0:
            raise SettingsError(f"{self.bandwidth} bytes per second", key="bandwidth", hint="more than 0")


def _by_worker(rule: Routing | Schedule, names: tuple[str, ...], workers: int) -> FloatArray:
    table = np.empty((workers, len(names)))
    for k, key in enumerate(names):
        column = np.asarray(getattr(rule, key), dtype=np.float64)
        if column.shape not in {(), (workers,)} or not np.isfinite(column).all():
            raise SettingsError("one finite number, or one for each worker", key=key)
        table[:, k] = column
    return table


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which of those in line goes first, and who is let into it. Each number of the formulas is one for all workers, or (W,).

        prompt_s = prompt_token_s · p + pair_s · q
        work_s = prompt_s + output_token_s · o
        takes = prompt_token · p + pair · q + line · prompt_s² + (output_token + held_token · (P + o / 2)) · o
        worth = value − λ · (work_s of those ahead + prompt_s + token_s · o) − quote · takes

    P are a request's prompt tokens, p those of them that are not in the worker's memory when it arrives, q the pairs of one of
    these and a token it reads, o the output tokens the request is expected to have, λ its price of delay. An order is by a rank that is set on arrival, the least first, equals as they come:

    - `fcfs`: as they come.
    - `shortest`: takes + aging · arrival.
    - `priced`: −λ / takes + aging · arrival.
    - `vtc`: no rank; the first of the tenant with the least service, `prompt_weight` for a prompt token and `answer_weight` for
      an output token. A tenant that comes back is lifted to the least of those in line (arXiv 2401.00588, algorithm 2).

    With `aging` a > 0 nobody waits for one who comes (his rank − the least rank without aging) / a seconds later. With `admission`
    a request of negative worth is turned away. What was thrown out of the batch goes first in every order.
    """

    order: Order = "fcfs"
    admission: bool = False
    prompt_token: ArrayLike = 1.0
    pair: ArrayLike = 0.0
    line: ArrayLike = 0.0
    """For the squared seconds of the prompt: those who come meanwhile wait for the rest of it."""
    output_token: ArrayLike = 1.0
    held_token: ArrayLike = 0.0
    """For each token held while one token is emitted."""
    quote: ArrayLike = 0.0
    """USD."""
    prompt_token_s: ArrayLike = 0.0
    """Seconds of the engine's time for a prompt token, for a pair, and for an output token, its share of the steps."""
    pair_s: ArrayLike = 0.0
    output_token_s: ArrayLike = 0.0
    token_s: ArrayLike = 0.0
    """Seconds from one token of an answer to the next."""
    aging: float = 0.0
    prompt_weight: float = 1.0
    answer_weight: float = 2.0

    def __post_init__(self) -> None:
        if self.admission and self.order == "vtc":
            raise SettingsError("fair shares turn nobody away", key="admission", hint="another order")
        for key in ("aging", "prompt_weight", "answer_weight"):
            if not (np.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise SettingsError(f"{getattr(self, key)} is not finite and ≥ 0", key=key)

    @classmethod
    def of(
        cls,
        order: Order,
        steps: StepTimes,
        settings: EngineSettings,
        *,
        admission: bool = False,
        aging: float = 0.0,
    ) -> Schedule:
        """By seconds of work in full steps, for the prompt that is not in memory and for the expected answer; others are quoted nothing."""
        prompt, output = work_s(steps, settings, settings.max_sequences)
        return cls(
            order,
            admission,
            prompt_token=prompt,
            pair=steps.prefill_pair_s,
            output_token=output,
            prompt_token_s=prompt,
            pair_s=steps.prefill_pair_s,
            output_token_s=output,
            token_s=output * settings.max_sequences,
            aging=aging,
        )

    def weights(self, workers: int) -> FloatArray:
        """(W, 10). Raises SettingsError for a number that is negative, not finite, or not one per worker."""
        takes = ("prompt_token", "pair", "line", "output_token", "held_token", "quote")
        names = (*takes, "prompt_token_s", "pair_s", "output_token_s", "token_s")
        table = _by_worker(self, names, workers)
        for k, key in enumerate(names):
            if (table[:, k] < 0).any():
                raise SettingsError("at least 0", key=key)
        if not (table[:, 0] + table[:, 3] > 0).all():
            raise SettingsError("a request takes something", key="prompt_token", hint="more than 0")
        return table


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine of `workers` replicas, which all are alike. Defaults are vLLM's.

    Raises:
        SettingsError: a number out of range, or two that contradict each other.
    """

    kv_blocks: int
    """KV blocks of one worker. vLLM keeps one of its `num_gpu_blocks` to itself."""
    block_tokens: int = 16
    prefix_tokens: int = 0
    """Tokens that one prefix id names, a multiple of `block_tokens`; 0: the same."""
    max_batched_tokens: int = 8192
    max_sequences: int = 256
    chunked_prefill: bool = True
    prefix_caching: bool = True
    reserve_prompt: bool = True
    """Admit a request only while memory has room for all of its tokens so far, and not for its first chunk only."""
    schedule_ahead: bool = False
    """Compose each step while the one before it runs, so that what comes or ends meanwhile is seen one step later."""
    workers: int = 1
    disaggregation: Disaggregation | None = None
    speculation: Speculation | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        for key in ("kv_blocks", "block_tokens", "max_batched_tokens", "max_sequences", "workers"):
            if getattr(self, key) < 1:
                raise SettingsError(f"{getattr(self, key)} is less than 1", key=key)
        if self.prefix_tokens < 0 or self.prefix_tokens % self.block_tokens:
            raise SettingsError(
                f"{self.prefix_tokens} tokens are not whole blocks of {self.block_tokens}",
                key="prefix_tokens",
                hint="the tokens that one prefix id stands for, a multiple of block_tokens",
            )
        if self.max_sequences * self.verified_tokens > self.max_batched_tokens:
            raise SettingsError(
                f"{self.max_sequences} sequences of {self.verified_tokens} new token(s) exceed the step's {self.max_batched_tokens}",
                key="max_batched_tokens",
                hint="raise it, or lower max_sequences",
            )
        if self.disaggregation is not None and self.disaggregation.prefill_workers >= self.workers:
            raise SettingsError(
                f"{self.disaggregation.prefill_workers} of {self.workers} workers prefill, none decodes",
                key="prefill_workers",
                hint="at most workers − 1",
            )

    @property
    def chunk_tokens(self) -> int:
        """Tokens that one prefix id names."""
        return self.prefix_tokens or self.block_tokens

    @property
    def verified_tokens(self) -> int:
        """New tokens of one decoding sequence in a step."""
        return 1 + (self.speculation.drafts if self.speculation else 0)

    @property
    def prefilling(self) -> int:
        """Workers that only prefill."""
        return self.disaggregation.prefill_workers if self.disaggregation else 0

    def check_steps(self, steps: StepTimes) -> None:
        """Raises SettingsError where the step times do not reach this engine's limits."""
        if steps.most_tokens < self.max_batched_tokens:
            raise SettingsError(
                f"step times are known up to {steps.most_tokens} tokens",
                key="max_batched_tokens",
                hint=f"at most that, or step times up to {self.max_batched_tokens}",
            )
        if steps.most_sequences < self.max_sequences:
            raise SettingsError(
                f"step times are known up to {steps.most_sequences} sequences",
                key="max_sequences",
                hint=f"at most that, or step times up to {self.max_sequences}",
            )


@dataclass(frozen=True, slots=True)
class Routing:
    """How a request finds its worker: by turns, or where it costs least. Each number is one for all workers, or (W,).

        cost = w · (delay_s + token_delay_s · P + request_delay_s · R) + token_price · p + block_price · (B + b) + output_price · o

    w is the request's own price of delay in USD per second (1 where none is given). P are the prompt tokens sent to the worker and
    not yet computed, R the requests there, B the KV blocks of their prompts; p, b and o are what the request itself brings: prompt
    tokens that are not in the worker's memory (counted in P too), blocks that are not, output tokens. Equal costs go by turns.
    """

    by_turns: bool = False
    looks_at_memory: bool = True
    """Whether p and b leave out what the worker's memory holds."""
    delay_s: ArrayLike = 0.0
    token_delay_s: ArrayLike = 0.0
    request_delay_s: ArrayLike = 0.0
    token_price: ArrayLike = 0.0
    block_price: ArrayLike = 0.0
    output_price: ArrayLike = 0.0
    name: str = field(default="priced", compare=False)

    @classmethod
    def round_robin(cls) -> Routing:
        return cls(by_turns=True, looks_at_memory=False, name="round-robin")

    @classmethod
    def least_loaded(cls) -> Routing:
        """To the fewest requests in flight."""
        return cls(looks_at_memory=False, request_delay_s=1.0, name="least-loaded")

    @classmethod
    def kv(cls, block_tokens: int, overlap_weight: float = 1.0) -> Routing:
        """As Dynamo's KV router: prompt blocks to compute there, times a weight, and blocks held there."""
        return cls(token_delay_s=overlap_weight / block_tokens, block_price=1.0, name="kv")

    @classmethod
    def priced(
        cls, steps: StepTimes, settings: EngineSettings, *, token: float = 0.0, block: float = 0.0
    ) -> Routing:
        """By expected delay at the request's own price, and by prices of a prompt token computed and a KV block held (USD).

        A prompt token ahead delays by its share of a full step, a request ahead by what it adds to one step.
        """
        budget, most = settings.max_batched_tokens, settings.max_sequences
        return cls(
            token_delay_s=(steps.overhead_s + float(steps.dense_s[budget])) / budget,
            request_delay_s=float(steps.dense_s[most] + steps.decode_s[most]) / most,
            token_price=token,
            block_price=block,
        )

    def weights(self, workers: int) -> FloatArray:
        """(W, 6) in the order of the formula. Raises SettingsError where a number is not finite, or not one per worker."""
        names = ("delay_s", "token_delay_s", "request_delay_s", "token_price", "block_price", "output_price")
        return _by_worker(self, names, workers)


def work_s(
    steps: StepTimes, settings: EngineSettings, sequences: int, kv_tokens: float = 0.0
) -> tuple[float, float]:
    """Seconds of a worker's time for a prompt token, its share of a full step, and for an output token, its share of a step of so
    many sequences that read so many KV tokens."""
    budget, batch = settings.max_batched_tokens, sequences * settings.verified_tokens
    emitted = settings.speculation.tokens_per_step if settings.speculation else 1.0
    step = float(steps.dense_s[batch] + steps.decode_s[sequences] + steps.decode_kv_s[sequences] * kv_tokens)
    prompt = (steps.overhead_s + float(steps.dense_s[budget])) / budget
    return prompt, (steps.overhead_s + step) / (sequences * emitted)
