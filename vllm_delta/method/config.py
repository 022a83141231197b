"""DELTA's settings, as the user gives them: parsed and checked, without vLLM.

They come from ``--additional-config '{"delta": {...}}'``. What can be wrong about them without knowing the
model is found here; what depends on the model's layers in `vllm_delta.method.plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from vllm_delta.method.rows import SelectionRule

#: What chooses the tokens of sparse layers: DELTA, or one of `vllm_delta.plain.rivals`, to compare with.
POLICIES = ("delta", "quest", "lessismore", "streaming", "tidal", "oracle")

#: Whether a server calibrates before it starts, where nothing else says which layers select.
CALIBRATE = ("never", "auto")

#: Whose pages a sparse layer reads where drafts are made. When drafts are verified, each layer chooses its
#: own, or selection layers choose for the others; or these choose anew at every draft. "auto" changes between
#: the first and the last of these by what is accepted.
DRAFT_PAGES = ("auto", "own", "shared", "fresh")

#: How drafts are taken from what sparse layers say: at a request's temperature, or the likeliest token.
DRAFT_SAMPLING = ("probabilistic", "greedy")

#: In which steps tokens are drafted: where that saves time, or in all.
DRAFT_WHEN = ("pays", "always")

#: Tokens that may be drafted before they are verified, at most.
MOST_DRAFT_TOKENS = 15

#: Tokens or steps that a setting may name, at most: no model has as many, and they fit an int32.
MOST = 2**30


class DeltaConfigError(ValueError):
    """A setting, a model or an option that DELTA does not support; says which, and what is accepted."""


@dataclass(frozen=True)
class DeltaConfig:
    """DELTA's settings; the defaults are the documented ones.

    Raises:
        DeltaConfigError: a value out of range, or a combination that makes no sense.
    """

    #: how many initial layers stay full
    full_layers: int = 2
    #: indices of the selection layers, or "auto"
    selection_layers: Literal["auto"] | tuple[int, ...] = "auto"
    #: tokens that a sparse layer may attend to, per sequence, recent and sink tokens included
    budget_tokens: int = 2048
    #: tokens at the end of the sequence that are always kept, in whole pages
    recent_tokens: int = 128
    #: tokens at the start of the sequence that are always kept, in whole pages
    sink_tokens: int = 16
    #: consecutive tokens that are kept or left out together
    page_size: int = 16
    #: one of `POLICIES`
    policy: str = "delta"
    #: file or folder of a calibration, read where `selection_layers` is "auto"; None: the model's folder
    calibration: str | None = None
    #: one of `CALIBRATE`
    calibrate: str = "never"
    #: measure the recall of sparse layers in every so many steps; 0 for never
    recall_sample_steps: int = 0
    #: draft with sparse layers, verify with full attention: answers are full attention's
    lossless: bool = False
    #: tokens that are drafted before they are verified
    draft_tokens: int = 7
    #: one of `DRAFT_PAGES`
    draft_pages: str = "auto"
    #: one of `DRAFT_SAMPLING`
    draft_sampling: str = "probabilistic"
    #: one of `DRAFT_WHEN`
    draft_when: str = "pays"
    #: how many initial layers attend to everything in drafts, too
    draft_full_layers: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("full_layers", 0),
            ("budget_tokens", 1),
            ("recent_tokens", 0),
            ("sink_tokens", 0),
            ("page_size", 1),
            ("recall_sample_steps", 0),
            ("draft_tokens", 1),
            ("draft_full_layers", 0),
        ):
            value = getattr(self, name)
            if not _is_int(value) or not least <= value <= MOST:
                raise DeltaConfigError(
                    f"delta.{name} must be an integer of at least {least} and at most {MOST}, not {value!r}"
                )
        if self.policy not in POLICIES:
            raise DeltaConfigError(f"delta.policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        if self.calibrate not in CALIBRATE:
            raise DeltaConfigError(
                f"delta.calibrate must be one of {', '.join(CALIBRATE)}, not {self.calibrate!r}"
            )
        if self.calibration is not None and not isinstance(self.calibration, str):
            raise DeltaConfigError(f"delta.calibration must be a path, not {self.calibration!r}")
        self._check_selection_layers()
        for name in ("budget_tokens", "recent_tokens", "sink_tokens"):
            value = getattr(self, name)
            if value % self.page_size:
                raise DeltaConfigError(
                    f"delta.{name} must be a multiple of delta.page_size ({self.page_size}), not {value}"
                )
        if self.budget_tokens < self.recent_tokens + self.sink_tokens:
            raise DeltaConfigError(
                f"delta.budget_tokens ({self.budget_tokens}) must be at least "
                f"delta.recent_tokens + delta.sink_tokens "
                f"({self.recent_tokens} + {self.sink_tokens}), which it includes"
            )
        self._check_drafts()

    def _check_drafts(self) -> None:
        if not isinstance(self.lossless, bool):
            raise DeltaConfigError(f"delta.lossless must be true or false, not {self.lossless!r}")
        for name, accepted in (
            ("draft_pages", DRAFT_PAGES),
            ("draft_sampling", DRAFT_SAMPLING),
            ("draft_when", DRAFT_WHEN),
        ):
            value = getattr(self, name)
            if value not in accepted:
                raise DeltaConfigError(f"delta.{name} must be one of {', '.join(accepted)}, not {value!r}")
        if self.draft_tokens > MOST_DRAFT_TOKENS:
            raise DeltaConfigError(
                f"delta.draft_tokens must be at most {MOST_DRAFT_TOKENS}, not {self.draft_tokens}"
            )
        if not self.lossless:
            return
        if self.policy != "delta" or self.recall_sample_steps:
            key = "recall_sample_steps" if self.policy == "delta" else "policy"
            raise DeltaConfigError(f"delta.{key} does not go with delta.lossless; leave one of them out")
        least = self.draft_tokens + self.page_size
        if self.freezes_pages and self.recent_tokens < least:
            raise DeltaConfigError(
                f"delta.recent_tokens must be at least delta.draft_tokens + delta.page_size ({least}) "
                f"with delta.lossless, not {self.recent_tokens}"
            )

    def _check_selection_layers(self) -> None:
        layers = self.selection_layers
        if layers == "auto":
            return
        if not isinstance(layers, tuple) or not all(_is_int(layer) for layer in layers):
            raise DeltaConfigError(
                f'delta.selection_layers must be "auto" or a list of layer indices, not {layers!r}'
            )
        if len(set(layers)) != len(layers):
            raise DeltaConfigError(f"delta.selection_layers must name each layer once, not {list(layers)}")

    @classmethod
    def from_additional_config(cls, additional_config: object) -> DeltaConfig:
        """The settings in vLLM's ``additional_config``; the defaults where it has no ``"delta"``.

        Raises:
            DeltaConfigError: unknown key, wrong type, or value out of range.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        settings = additional_config.get("delta", {})
        if not isinstance(settings, Mapping):
            raise DeltaConfigError(f'"delta" must be an object of settings, not {settings!r}')
        known = [field.name for field in fields(cls)]
        for key in settings:
            if key not in known:
                raise DeltaConfigError(f"delta.{key} is not a setting; accepted: {', '.join(known)}")
        values = dict(settings)
        if isinstance(values.get("selection_layers"), list):
            values["selection_layers"] = tuple(values["selection_layers"])
        return cls(**values)

    @property
    def runs_kernels_alone(self) -> bool:
        """Whether decode steps of these settings need no Python in the attention call, as in CUDA graphs."""
        return self.policy == "delta" and not self.recall_sample_steps

    @property
    def budget_pages(self) -> int:
        """`budget_tokens` in pages."""
        return self.budget_tokens // self.page_size

    @property
    def recent_pages(self) -> int:
        """`recent_tokens` in pages."""
        return self.recent_tokens // self.page_size

    @property
    def sink_pages(self) -> int:
        """`sink_tokens` in pages."""
        return self.sink_tokens // self.page_size

    @property
    def rule(self) -> SelectionRule:
        """How pages are kept, apart from how many."""
        return SelectionRule(self.page_size, self.recent_pages, self.sink_pages, self.following_pages)

    @property
    def following_pages(self) -> int:
        """Pages that a sequence may begin before its pages are chosen again."""
        return -(-self.draft_tokens // self.page_size) if self.freezes_pages else 0

    @property
    def freezes_pages(self) -> bool:
        """Whether drafts may read the pages that were chosen when the last ones were verified."""
        return self.lossless and self.draft_pages != "fresh"

    @property
    def refreshes_pages(self) -> bool:
        """Whether selection layers may choose pages for the very token at hand: in drafts, or anywhere."""
        return not self.lossless or self.draft_pages in ("auto", "fresh")

    def most_kept_pages(self, max_model_len: int) -> int:
        """Entries of a row of a selection table: the budget, but no more than a sequence has pages.

        Beside the budget, the pages that begin before others are chosen.
        """
        return min(self.budget_pages, -(-max_model_len // self.page_size)) + self.following_pages


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
