"""The rows of the benchmarks' CSVs: one class per kind of CSV, with the units of its columns.

One row is what one process measured of one case.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.lib.cases import Case


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a row comes from: the columns that let somebody else repeat it."""

    date: str  # ISO, start of the run; equal in all rows of a run
    commit: str  # with "+dirty" if tracked files differed from it
    machine: str  # CPU or GPU model
    cores: int
    vllm: str
    torch: str
    vllm_delta: str
    python: str
    command: str


@dataclass(frozen=True, kw_only=True)
class Run(Provenance):
    """A row about vLLM with one backend."""

    shape: str
    dtype: str
    backend: str
    settings: str  # DELTA's, as JSON; "{}" are the defaults

    @property
    def arm(self) -> str:
        """The backend, with DELTA's settings where they are not the defaults."""
        return self.backend if self.settings in ("", "{}") else f"{self.backend} {self.settings}"


@dataclass(frozen=True, kw_only=True)
class EngineRun(Run):
    """What an engine of this process' own says of itself, and of the tokens that it attended to.

    Token counts are over the timed steps, all layers and all sequences; None of a backend that does not
    count.
    """

    kv_cache_dtype: str  # vLLM's name; "auto" is `dtype`
    kv_capacity_tokens: int | None  # that the KV cache has room for
    peak_memory_bytes: int | None  # RSS of the largest engine process, or used device memory
    attended_tokens: int | None
    context_tokens: int | None
    sparse_attended_tokens: int | None  # sparse layers alone
    sparse_context_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class Measurement(EngineRun):
    """One case of the decode benchmark in one process."""

    baseline: str  # the backend that speed-ups refer to
    round: int
    batch: int
    context: int
    prompt_tokens: int  # the context, less what the model's positions have no room for
    output_short: int
    output_long: int
    ms_per_step: float  # median of samples_ms
    tokens_per_second: float
    samples_ms: str  # every slope of this process, separated by spaces

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.batch, self.context)

    @property
    def spread(self) -> float:
        """How far the process's own samples lie apart, relative to their median."""
        samples = [float(sample) for sample in self.samples_ms.split()]
        return (max(samples) - min(samples)) / self.ms_per_step


@dataclass(frozen=True, kw_only=True)
class Drafted(EngineRun):
    """One case and rate of acceptance of the benchmark of speculation, in one process."""

    baseline: str  # the backend that speed-ups refer to
    batch: int
    context: int
    prompt_tokens: int  # the context, less what the model's positions have no room for
    output_short: int
    output_long: int
    ngram_tokens: int  # that vLLM drafts by n-grams, for all backends; 0: DELTA drafts, losslessly
    acceptance: float | None  # of a draft behind accepted ones, as given; None where nothing is drafted
    tokens_per_step: float  # of a sequence
    ms_per_token: float  # of a sequence: median of samples_ms
    tokens_per_second: float  # of all
    samples_ms: str  # separated by spaces

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.batch, self.context)


@dataclass(frozen=True, kw_only=True)
class Acceptance(Run):
    """What was accepted of the drafts of one text's prompts, in one process."""

    text: str  # or a family of problems
    prompts: int  # a batch
    context: int  # tokens of a prompt, about
    output: int  # tokens of an answer
    temperature: float
    ngram_tokens: int  # that vLLM drafts by n-grams; 0: DELTA drafts, losslessly
    drafts: int  # steps of a request in which drafts were verified
    accepted: str  # of these at each position, separated by spaces
    acceptance: float  # accepted drafts over those behind accepted ones only
    tokens_per_step: float  # of a request, in these steps


@dataclass(frozen=True, kw_only=True)
class Generation(EngineRun):
    """One part of the generation benchmark in one process.

    ======== ============================================ ================================================
    part     milliseconds                                 samples_ms
    ======== ============================================ ================================================
    generate all outputs of all requests, prompts included mean step per `bin_tokens` output tokens, in order
    ttft     median time to first token                   every time to first token
    prefill  median decode step after a real prefill,     one mean per repetition
             all requests decoding
    ======== ============================================ ================================================
    """

    part: str
    requests: int
    prompt: int
    output: int
    milliseconds: float
    tokens_per_second: float | None  # generated; None of "ttft"
    bin_tokens: int | None  # None except of "generate"
    samples_ms: str  # separated by spaces

    @property
    def samples(self) -> list[float]:
        """`samples_ms` as numbers."""
        return [float(sample) for sample in self.samples_ms.split()]


@dataclass(frozen=True, kw_only=True)
class StepProfile(EngineRun):
    """What the host does in a decode step: one of its parts, which `profile_steps` lists, in one process."""

    requests: int
    prompt: int  # tokens of each
    steps: int  # that were timed, one token of each request apiece
    part: str
    calls_per_step: float
    ms_per_step: float  # mean; what the part calls is in it
    cpu_ms_per_step: float  # mean time of the main thread on a processor


@dataclass(frozen=True, kw_only=True)
class Serving(Run):
    """One request rate of the serving benchmark; the names are those of ``vllm bench serve``."""

    request_rate: float  # per second; inf: all at once
    prompts: int
    input: int  # tokens of a prompt
    output: int  # tokens of an answer
    duration: float  # seconds
    request_throughput: float  # per second
    output_throughput: float  # tokens per second
    mean_ttft_ms: float
    median_ttft_ms: float
    p99_ttft_ms: float
    mean_tpot_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float
    mean_itl_ms: float
    median_itl_ms: float
    p99_itl_ms: float
    attended_tokens: int | None  # warm-up included; None of a backend that does not count
    context_tokens: int | None


@dataclass(frozen=True, kw_only=True)
class AnswerRun(Run):
    """What a server answered under one setting; its token counts are those of `EngineRun`.

    Of a backend that does not count, and where no answer has a second token, they are None.
    """

    setting: str  # its name
    seed: int
    generated_tokens: int | None
    attended_tokens: int | None
    context_tokens: int | None
    sparse_attended_tokens: int | None
    sparse_context_tokens: int | None
    attended_share: float | None  # of all layers
    seconds: float  # from the first question to the last answer


@dataclass(frozen=True, kw_only=True)
class Accuracy(AnswerRun):
    """Answers to the reasoner's problems of one family and length.

    Commit, machine and versions are those of the answers, joined by "/" if some are from another run.
    """

    way: str  # "asked": a server wrote the answer; "forced": the right one was judged
    weights: str  # start of the SHA-256 of the model's files; of a server elsewhere, the model's name
    family: str
    length: int  # tokens of a problem with its answer, at most
    problems: int
    exact: int  # answers that are right to the last token
    accuracy: float
    accuracy_low: float  # 95% confidence (Wilson)
    accuracy_high: float
    right_share: float  # of an answer's steps, those before the first wrong one; mean
    first_wrong_step: float | None  # from 1 on; median of the answers that are not exact


@dataclass(frozen=True, kw_only=True)
class TaskAccuracy(AnswerRun):
    """One metric of one task of lm-evaluation-harness."""

    lm_eval: str  # its version
    task: str
    task_version: str
    fewshot: int | None
    sampling: str  # what was changed of the task's own, as JSON
    metric: str
    filter: str  # how the answer was found in the text; "none": the task's own way
    value: float
    stderr: float | None
    samples: int


@dataclass(frozen=True, kw_only=True)
class TextLoss(Run):
    """What a setting loses at some tokens of one document of the benchmark on real texts.

    A document has quotes, facts and prose; a place is where in it lies what is looked up, in quarters from 0
    on, or, of prose, which quarter of the scored tokens these are. Sums are over tokens.
    """

    setting: str  # its name
    weights: str  # start of the SHA-256 of the model's files, or the model's name
    text: str  # its name
    digest: str  # start of the SHA-256 of the text's tokens
    seed: int
    context: int  # tokens of the document
    part: int  # which of several documents
    family: str
    place: int
    tokens: int
    right: int  # that full attention gets right; of prose, all
    kept: int  # of these, that the setting gets right; of prose, where both expect the same token
    divergence: float  # from full attention's distributions, nats
    full_loss: float  # cross-entropy under full attention, nats
    loss: float  # cross-entropy under the setting, nats
    attended_tokens: int  # over all rows of the document, all layers
    context_tokens: int


@dataclass(frozen=True, kw_only=True)
class KernelTime(Provenance):
    """One kernel, or one way to run an attention layer, in one case.

    The dense kernel is "dense" on a CPU, and "fa3" (FlashAttention 3) on a GPU.
    """

    shape: str
    dtype: str
    batch: int
    context: int  # tokens of each sequence
    kernel: str
    microseconds: float  # median over rounds
    ratio: float  # of its time to the dense kernel's in the same run
    gb_per_second: float  # bytes of keys and values that it reads, in 10^9
    memory_gb_per_second: float  # CPU: of a plain read; GPU: of a copy, bytes read plus bytes written

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.batch, self.context)


@dataclass(frozen=True, kw_only=True)
class Comparison(Provenance):
    """One case of a benchmark at two commits, in one round; `commit` is that of the script which compares."""

    bench: str
    commit_a: str
    commit_b: str
    case: str
    metric: str  # the benchmark's column, with its unit; smaller is better
    round: int
    value_a: float
    value_b: float

    @property
    def ratio(self) -> float:
        """B's time / A's."""
        return self.value_b / self.value_a


@dataclass(frozen=True, kw_only=True)
class TrainingStep:
    """One logged step of a training of the reasoner, by ``python -m reasoner.train --log``."""

    step: int
    tokens: int  # seen until then
    seconds: float  # since the start
    rate: float  # the learning rate
    loss: float  # nats per token of an answer
    length_chase: int  # tokens of the family's longest problems by then
    right_chase: float  # share of the answers' tokens that is right, the right ones so far given
    length_trace: int
    right_trace: float
    length_needles: int
    right_needles: float
