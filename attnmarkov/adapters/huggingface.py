"""Causal language models of Hugging Face: generate in a batch, and diagnose."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from attnmarkov import _validate
from attnmarkov.adapters._torch import libraries, to_numpy
from attnmarkov.dynamics._sequences import padded_ids
from attnmarkov.dynamics.diagnostics import Diagnostics, diagnose

if TYPE_CHECKING:
    from collections.abc import Iterator

    import xarray as xr
    from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Generation:
    """What a language model generated after R prompts.

    Attributes:
        num_tokens: Vocabulary size K.
        prompts: (R, L) prompts, right-padded.
        prompt_lengths: (R,) tokens of each prompt.
        tokens: (R, T) generated tokens, right-padded where a sequence has ended.
        lengths: (R,) generated tokens, the one that ends a sequence included.
        log_prob: (R, T) log-probability in nats of each generated token under the model's own
            law, before temperature, penalty and truncation; NaN at padding. What a decoder gains
            in variety it pays here.
        decoded_log_prob: (R, T) the same under the law that was drawn from; None if nothing was
            drawn (``do_sample=False``).
    """

    num_tokens: int
    prompts: Int[np.ndarray, "replicate prompt_position"]
    prompt_lengths: Int[np.ndarray, " replicate"]
    tokens: Int[np.ndarray, "replicate step"]
    lengths: Int[np.ndarray, " replicate"]
    log_prob: Float[np.ndarray, "replicate step"]
    decoded_log_prob: Float[np.ndarray, "replicate step"] | None = None

    @property
    def mean_log_prob(self) -> Float[np.ndarray, " replicate"]:
        """(R,) mean of ``log_prob`` over each sequence; its perplexity is ``exp(-mean)``."""
        return np.nanmean(self.log_prob, axis=1)

    def whole(self) -> list[Int[np.ndarray, " position"]]:
        """The R sequences with their prompts."""
        return [
            np.concatenate([p[:m], x[:n]])
            for p, m, x, n in zip(
                self.prompts, self.prompt_lengths, self.tokens, self.lengths, strict=True
            )
        ]

    def diagnose(self, *, whole: bool = False, **options: Any) -> Diagnostics:
        """:func:`attnmarkov.dynamics.diagnose` of the generated part.

        Args:
            whole: Of prompts and generated part together; growth exponents need the whole
                history, since prompts count for the small counts.
            **options: As there.
        """
        if whole:
            return diagnose(self.whole(), self.num_tokens, **options)
        return diagnose(self.tokens, self.num_tokens, self.lengths, **options)

    def to_dataset(self) -> xr.Dataset:
        """The same as an ``xarray.Dataset`` with dims ``replicate``, ``step`` and ``position``."""
        import xarray as xr

        data = {
            "prompt": (("replicate", "position"), self.prompts),
            "prompt_length": ("replicate", self.prompt_lengths),
            "tokens": (("replicate", "step"), self.tokens),
            "length": ("replicate", self.lengths),
            "log_prob": (("replicate", "step"), self.log_prob),
        }
        if self.decoded_log_prob is not None:
            data["decoded_log_prob"] = (("replicate", "step"), self.decoded_log_prob)
        return xr.Dataset(data, attrs={"num_tokens": self.num_tokens})

    def __repr__(self) -> str:
        """The sizes and the mean log-likelihood."""
        total = np.nansum(self.log_prob) / self.lengths.sum()
        return (
            f"Generation({len(self.tokens)} sequences of up to {self.lengths.max()} tokens from a "
            f"vocabulary of {self.num_tokens}, {total:.3f} nats a token under the model)"
        )


def generate(
    model: Any,
    prompts: Any,
    max_new_tokens: int,
    *,
    num_trajectories: int = 1,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: bool = True,
    seed: int = 0,
) -> Generation:
    """Generate from a causal language model of ``transformers``, all prompts in one batch.

    The model's own ``generate`` does it, with its processors in the order repetition penalty,
    temperature, top-k, top-p, and with no other setting: the model's ``generation_config`` is
    put aside meanwhile, but for its end tokens. Neither that nor torch's global random state is
    changed. Draws depend on the seed and on the whole batch.

    Args:
        model: A ``transformers`` model that generates from its prompt alone (a decoder), in
            evaluation mode, on any device.
        prompts: Token ids of n prompts: (n, L), or (L,) for one, or a sequence of n sequences of
            different lengths. They are padded on the left, out of sight of attention.
        max_new_tokens: Most tokens to generate, at least 1.
        num_trajectories: Sequences per prompt; R is n times that, prompt by prompt.
        do_sample: Draw each token; otherwise take the likeliest.
        temperature: Divides the log-probabilities; positive.
        top_k: Draw among the k likeliest; None for all.
        top_p: Draw among the fewest likeliest with joint probability ``top_p``; None for all.
        repetition_penalty: Divides positive logits of tokens that stand in the history (prompt
            included) and multiplies negative ones (Keskar et al. 2019); 1 for none.
        stop: Whether a sequence ends with an end token of the model.
        seed: 0 to 2**32 - 1.

    Raises:
        ImportError: Without ``transformers`` and ``torch``.
        TypeError: If the model is no decoder of ``transformers`` that generates.
        ValueError: If it is in train mode, a prompt is empty or holds a bad id, prompts and new
            tokens are more than the model's positions, or an option is out of range.
    """
    torch, transformers = libraries()
    _check_model(model, torch)
    max_new_tokens = _validate.integer(max_new_tokens, "max_new_tokens", minimum=1)
    num_trajectories = _validate.integer(num_trajectories, "num_trajectories", minimum=1)
    seed = _validate.seed(seed)
    ids, sizes, _ = padded_ids(prompts, None, "prompts", "prompt")
    num_tokens = model.get_input_embeddings().num_embeddings
    _validate.token_range(ids, "prompts", num_tokens)
    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and sizes.max() + max_new_tokens > room:
        raise ValueError(
            f"max_new_tokens: {sizes.max()} tokens of the longest prompt and {max_new_tokens} new "
            f"ones are more than the model's {room} positions"
        )
    ids, sizes = (np.repeat(x, num_trajectories, axis=0) for x in (ids, sizes))
    own = _log_likelihood(transformers.LogitsProcessor, torch)
    decoded = _log_likelihood(transformers.LogitsProcessor, torch)
    processors = _processors(
        transformers, do_sample, temperature, top_k, top_p, repetition_penalty, ids.shape[1]
    )
    ends = _end_tokens(model) if stop else []
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **({"top_k": 0} if do_sample else {}),  # 50 if left out
    )
    # Padding repeats each prompt's first token: attention does not see it, and a repetition
    # penalty, which does not look at the mask, finds no token that the prompt does not hold.
    shift = (np.arange(ids.shape[1]) - ids.shape[1] + sizes[:, None]).astype(np.int64)
    left = np.take_along_axis(ids, np.maximum(shift, 0), axis=1).astype(np.int64)
    with _alone(model, torch, transformers, seed):
        out = model.generate(
            input_ids=torch.as_tensor(left, device=model.device),
            attention_mask=torch.as_tensor((shift >= 0).astype(np.int64), device=model.device),
            generation_config=config,
            logits_processor=transformers.LogitsProcessorList([own, *processors, decoded]),
        )
    tokens = out[:, ids.shape[1] :].cpu().numpy().astype(np.int32)
    ended = np.isin(tokens, ends)
    steps = tokens.shape[1]
    lengths = np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, steps)
    there = np.arange(steps) < lengths[:, None]
    log_probs = [np.where(there, x.values(out), np.nan) for x in (own, decoded)]
    return Generation(
        num_tokens,
        ids.astype(np.int32),
        sizes,
        tokens,
        lengths,
        log_probs[0],
        log_probs[1] if do_sample else None,
    )


def _check_model(model: Any, torch: Any) -> None:
    can = getattr(model, "can_generate", None)
    if not isinstance(model, torch.nn.Module) or can is None or not can():
        raise TypeError(
            "model: expected a transformers model that generates, such as an "
            f"AutoModelForCausalLM, got {type(model).__name__}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"model: {type(model).__name__} has an encoder; a decoder alone is expected"
        )
    if model.training:
        raise ValueError(
            "model: is in train mode, where dropout would change its laws; call model.eval()"
        )


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [int(i) for i in np.atleast_1d(ends)]


def _processors(
    transformers: Any,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    width: int,
) -> list[Any]:
    """The model's logits become those of the law that is drawn from."""
    for value, name in ((temperature, "temperature"), (repetition_penalty, "repetition_penalty")):
        number = _validate.finite(value, name)
        if number.ndim != 0 or not number > 0:
            raise ValueError(f"{name}: must be a positive number, got {value}")
    out = []
    if repetition_penalty != 1:
        out.append(transformers.RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
    if top_k is not None:
        top_k = _validate.integer(top_k, "top_k", minimum=1)
    if top_p is not None:
        number = _validate.finite(top_p, "top_p")
        if number.ndim != 0 or not 0 < number <= 1:
            raise ValueError(f"top_p: must lie in (0, 1], got {top_p}")
    if not do_sample:
        if temperature != 1 or top_k is not None or top_p is not None:
            raise ValueError(
                "do_sample: temperature, top_k and top_p are for drawing; without it the "
                "likeliest token is taken"
            )
        return out
    if temperature != 1:
        out.append(transformers.TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        out.append(transformers.TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1:
        out.append(transformers.TopPLogitsWarper(float(top_p)))
    return out


def _log_likelihood(base: type, torch: Any) -> Any:
    """A logits processor that only keeps the log-probability of each token that is taken."""

    class LogLikelihood(base):
        def __init__(self) -> None:
            self.taken, self.law = [], None

        def __call__(self, input_ids: Any, scores: Any) -> Any:
            self._take(input_ids)
            self.law = torch.log_softmax(scores.float(), dim=-1)
            return scores

        def _take(self, input_ids: Any) -> None:
            if self.law is not None:
                self.taken.append(self.law.gather(1, input_ids[:, -1:])[:, 0])

        def values(self, sequences: Any) -> np.ndarray:
            self._take(sequences)
            return to_numpy(torch.stack(self.taken, dim=1))

    return LogLikelihood()


@contextlib.contextmanager
def _alone(model: Any, torch: Any, transformers: Any, seed: int) -> Iterator[None]:
    """Nothing but what is asked for decides; the model and torch are left as they were."""
    kept = model.generation_config
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model.generation_config = transformers.GenerationConfig()
        try:
            yield
        finally:
            model.generation_config = kept
