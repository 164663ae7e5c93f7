"""Generate docs/losses.md from the docstrings of `jaxdistill.losses`: `python -m docs.make_losses`.

Two things no docstring holds stand here, for every public function: the reduction its paper uses,
and the peers that have it. A loss without them makes this program, and the tests, fail.
"""

import inspect
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

from jaxdistill import losses

PAGE = pathlib.Path(__file__).with_name("losses.md")

PEERS = ("TRL", "verl", "Tunix", "torch", "optax", "transformers")

# The reductions papers use. The last three need no call: the result is of a row, or reduced.
TOKENS = "`token_mean`"
SEQUENCES = "`sequence_mean`"
PAIRS = "mean over pairs"
WITHIN = "inside"
NONE = "—"


class Facts(NamedTuple):
    """What a docstring does not say of a loss."""

    reduction: str
    peers: str = NONE


# fmt: off
FAMILIES: dict[str, dict[str, Facts]] = {
    "From logits to numbers": {
        "shift": Facts(NONE, "TRL, torch (inside)"),
        "log_probs": Facts(NONE, "TRL, verl, Tunix"),
        "entropy": Facts(TOKENS, "TRL, verl"),
        "sequence_log_prob": Facts(NONE, "TRL, Tunix"),
        "token_mean": Facts(NONE, "TRL, verl, Tunix"),
        "sequence_mean": Facts(NONE, "TRL, verl, Tunix"),
        "sequence_sum": Facts(NONE, "TRL, verl"),
    },
    "Cross-entropy": {
        "cross_entropy": Facts(TOKENS, "torch, optax, TRL, verl, Tunix"),
        "soft_cross_entropy": Facts(TOKENS, "torch, optax"),
        "top_k_accuracy": Facts(TOKENS, "TRL (k = 1)"),
    },
    "Divergences of a student from a teacher": {
        "forward_kl": Facts(TOKENS, "torch, optax, TRL, Tunix"),
        "reverse_kl": Facts(TOKENS, "torch, optax, TRL"),
        "symmetric_kl": Facts(TOKENS),
        "jensen_shannon": Facts(TOKENS, "TRL"),
        "skew_forward_kl": Facts(TOKENS),
        "skew_reverse_kl": Facts(TOKENS),
        "adaptive_kl": Facts(TOKENS),
        "total_variation": Facts(TOKENS),
        "log_acceptance": Facts(TOKENS),
        "tvd_plus_plus": Facts(TOKENS),
    },
    "Sparse and cross-vocabulary divergences": {
        "top_k_teacher": Facts(NONE, "Tunix (inside)"),
        "topk_forward_kl": Facts(TOKENS, "TRL (the bucket)"),
        "sample_teacher": Facts(NONE),
        "sampled_forward_kl": Facts(TOKENS),
        "first": Facts("`sequence_sum`", "TRL, Tunix (no bucket)"),
        "recalibrate_top_k": Facts(NONE),
        "universal_logit": Facts(SEQUENCES, "TRL"),
        "taid_target": Facts(NONE),
    },
    "Distillation of classifiers": {
        "decoupled_kd": Facts("mean over rows"),
        "standardize_logits": Facts(NONE),
        "dist": Facts(f"{WITHIN}: mean over rows and over classes"),
    },
    "Features: position by position": {
        "hidden_mse": Facts(TOKENS, "torch, optax, Tunix"),
        "hidden_cosine": Facts(TOKENS, "torch, optax, Tunix"),
        "dmae_alignment": Facts(TOKENS),
        "masked_reconstruction": Facts(f"{TOKENS}, removed patches", "transformers"),
        "attention_transfer": Facts("mean over images and positions"),
        "attention_kl": Facts(TOKENS, "torch"),
        "attention_mse": Facts(TOKENS),
        "self_attention_relation": Facts(TOKENS),
    },
    "Features: relations between examples": {
        "rkd_distance": Facts(f"{WITHIN}: {PAIRS}"),
        "rkd_angle": Facts(f"{WITHIN}: mean over triples"),
        "relation_cosine": Facts("mean over samples"),
        "linear_cka": Facts(NONE),
        "nt_xent": Facts("mean over rows", "optax"),
        "barlow_twins": Facts(WITHIN),
    },
    "Features: joint labels, several heads, teachers and experts": {
        "sla": Facts("mean over rows and transformations"),
        "sla_single": Facts(NONE),
        "sla_aggregate": Facts(NONE),
        "sla_distillation": Facts("mean over rows"),
        "ensemble_probabilities": Facts(NONE),
        "output_discrimination": Facts("mean over rows"),
        "reverse_gradient": Facts(NONE),
        "dho": Facts(f"one {TOKENS} each, labelled and not"),
        "dho_probabilities": Facts(NONE),
        "unfused": Facts("mean over rows"),
        "localized_balance": Facts(f"{WITHIN}, a value a layer"),
    },
    "Supervised fine-tuning": {
        "mask_thought": Facts(NONE),
        "linear_ramp": Facts(NONE, "optax (schedules)"),
        "dft": Facts(TOKENS, "TRL"),
        "asft": Facts(TOKENS),
        "one_token_rollout": Facts(TOKENS),
        "curio_sft": Facts(TOKENS),
        "temperature_for_entropy": Facts(NONE),
        "key_token_weights": Facts(SEQUENCES),
        "unlikelihood": Facts(TOKENS),
    },
    "Preference: log-probabilities of pairs": {
        "dpo": Facts(PAIRS, "TRL, Tunix"),
        "rpo": Facts(PAIRS, "TRL"),
        "kto": Facts("mean over answers", "TRL"),
        "orpo": Facts(PAIRS, "TRL, Tunix"),
        "simpo": Facts(PAIRS, "TRL"),
        "cpo": Facts(PAIRS, "TRL"),
        "redi": Facts(PAIRS),
    },
    "Rewards of pairs": {
        "bradley_terry": Facts(PAIRS, "TRL"),
        "token_bradley_terry": Facts(PAIRS),
        "divergence_mask": Facts(NONE),
    },
    "Diffusion": {
        "gaussian_log_prob": Facts(NONE),
        "pso_offline": Facts(PAIRS),
        "pso_online": Facts("mean over pairs and steps"),
        "pso_hinge": Facts(PAIRS),
    },
    "Policy: objectives": {
        "policy_gradient": Facts(WITHIN, "TRL, verl, Tunix"),
        "grpo": Facts(f"{WITHIN}: {SEQUENCES}", "TRL, verl, Tunix"),
        "dr_grpo": Facts(f"{WITHIN}: `sequence_sum`, longest length", "TRL, verl"),
        "dapo": Facts(f"{WITHIN}: {TOKENS}", "TRL, verl, Tunix"),
        "gspo": Facts(f"{WITHIN}: mean over sequences", "TRL, verl"),
        "cispo": Facts(f"{WITHIN}: {TOKENS}", "TRL, verl"),
        "rloo": Facts(f"{WITHIN}: mean over sequences", "TRL, verl"),
        "reinforce_plus_plus": Facts(f"{WITHIN}: {TOKENS}", "verl"),
        "ppo_policy": Facts(f"{WITHIN}: {TOKENS}", "verl, Tunix"),
        "ppo_value": Facts(f"{WITHIN}: {TOKENS}", "verl, Tunix"),
    },
    "Policy: advantages and terms": {
        "group_advantages": Facts(NONE, "TRL, verl, Tunix"),
        "gae": Facts(NONE, "verl, Tunix"),
        "reinforce_plus_plus_advantages": Facts(NONE, "verl"),
        "whiten": Facts(NONE, "verl"),
        "token_rewards": Facts(NONE, "verl"),
        "overlong_penalty": Facts(NONE, "TRL, verl, Tunix"),
        "filter_groups": Facts(NONE, "verl"),
        "policy_surrogate": Facts("as `policy_gradient`", "TRL, verl, Tunix"),
        "importance_weights": Facts(NONE, "TRL, verl"),
        "kl_estimate": Facts("as the objective", "TRL, verl, Tunix"),
        "entropy_bonus": Facts("as the objective", "TRL, verl"),
    },
    "Policy: distillation": {
        "on_policy_distillation": Facts(f"{WITHIN}: {TOKENS}", "TRL"),
        "distillation_advantages": Facts(NONE, "TRL"),
        "pi_distill": Facts(WITHIN),
        "opsd": Facts(WITHIN),
    },
    "Policy: with demonstrations": {
        "luffy": Facts(f"{WITHIN}: `sequence_sum`"),
        "policy_shaping": Facts(NONE),
        "srft": Facts(f"{WITHIN}: `sequence_sum`"),
        "hpt": Facts(f"{WITHIN}: `sequence_sum`"),
        "chord": Facts(f"{WITHIN}: one {TOKENS} each"),
        "uft": Facts(f"{WITHIN}: one {TOKENS} each"),
        "iw_sft": Facts(TOKENS),
    },
}
# fmt: on

INTRODUCTION = """# The losses

Pure functions on plain arrays. Generated from the docstrings by `python -m docs.make_losses`;
`help(losses.<name>)` says the rest: shapes, errors, stopped gradients, an example that runs.

```python
from jaxdistill import losses

labels, mask = losses.shift(tokens, loss_mask, segment_ids)
values = losses.cross_entropy(logits, labels)  # [batch, length], nats
loss = losses.token_mean(values, mask).mean()
weighted = losses.token_mean(values, mask * weights).mean()  # divided by the sum of the weights
```

- **Nothing shifts but `shift`.** `logits[:, t]` predicts `labels[:, t]` everywhere.
- **A mask enters where a reduction happens**, and only there. Losses return unreduced float32: a
  value per token `[...]`, or per sequence or pair `[B]`. Where a mask is 0 a value counts for
  nothing, be it NaN, and gets no gradient. Objectives that cannot be told from their reduction take
  the mask and return it reduced.
- **Reductions return `Weighted(sum, weight)`.** Add those of microbatches and devices and call
  `.mean()` at the very end: padding, packing and accumulation then change nothing. A weight per
  token is a mask that is not 0 or 1. An empty batch gives 0.
- **Nats**, computed in float32 from the logits as they come, bfloat16 included. Columns from
  `vocab_size` on are padding and do not exist.
- **Stopped gradients are inside the function**: teachers, references, old policies, advantages,
  rewards and weights are constants, whatever they were computed from.
- **Train with `losses.from_hidden`.** Names marked **H** have a form there that takes hidden states
  and a head instead of logits or log-probabilities, and never holds `[batch, length, vocabulary]`.
  Value and gradient are those of the form below.
- **Bad input raises** before anything is compiled. A label that is out of range can be seen outside
  jit only; inside it gives NaN, which a mask removes.

"Reduction" is what the paper does with the values; "inside" means that the result is reduced.
"Peers" are libraries that have the loss (TRL 1.16, Tunix 0.1.7, verl of mid-2026); parity tests
hold those of TRL, torch, optax and transformers that can be called to 1e-5.
"""

# A full stop ends a sentence, but not that of "Dr. GRPO".
SENTENCE_END = re.compile(r"(?<=\.)(?<!Dr\.)\s+(?=[A-Z\d\"`])")
TELLING = re.compile(
    rf"\b({'|'.join(PEERS)})\b(?!\.)|authors' code|authors do|\bbiased\b|common clamp"
)

DIFFERENCES = """
## Where peers are biased, or differ

In the words of the docstrings.

"""


def functions() -> dict[str, Callable]:
    """The public functions of `jaxdistill.losses`, without its containers and modules."""
    public = {name: getattr(losses, name) for name in losses.__all__}
    return {name: function for name, function in public.items() if inspect.isfunction(function)}


def description(function: Callable) -> str:
    """The docstring up to its first section."""
    return re.split(r"\n\n(?:Args|Returns):\n", inspect.getdoc(function) or "")[0]


def section(function: Callable, name: str) -> str:
    """One section of the docstring, or nothing."""
    found = re.search(rf"^{name}:(.*?)(?=\n\n|\Z)", inspect.getdoc(function) or "", re.S | re.M)
    return inspect.cleandoc(found[1]) if found else ""


def formula(function: Callable) -> list[str]:
    """The lines of the first indented block, with blocks that follow it; else the first line."""
    summary, *paragraphs = description(function).split("\n\n")
    lines: list[str] = []
    for paragraph in paragraphs:
        if paragraph.startswith("    "):
            lines += inspect.cleandoc(paragraph).splitlines()
        elif lines:
            break
    return lines or [summary]


def arguments(function: Callable) -> list[str]:
    """What the docstring says of each argument, a line each: "name, name: ..."."""
    entries = re.split(r"\n(?=\w)", section(function, "Args"))
    return [" ".join(entry.split()) for entry in entries]


def shapes(function: Callable) -> dict[str, str]:
    """The shape of each argument whose docstring has one, or names the function that does."""
    found: dict[str, str] = {}
    for entry in arguments(function):
        names, _, told = entry.partition(": ")
        given, elsewhere = re.match(r"`(\[.*?\])`", told), re.match(r"as (?:for|in) `(\w+)`", told)
        known = shapes(getattr(losses, elsewhere[1])) if elsewhere else {}
        for name in names.split(", "):
            if shape := given[1] if given else known.get(name):
                found[name] = shape
    return found


def inputs(function: Callable) -> list[str]:
    """The positional arguments with their shapes."""
    known = shapes(function)
    parameters = inspect.signature(function).parameters.values()
    positional = [x.name for x in parameters if x.kind is x.POSITIONAL_OR_KEYWORD]
    return [f"{name} {known.get(name, '')}".rstrip() for name in positional]


def source(function: Callable) -> str:
    """Where it comes from, arXiv numbers linked; those in the formula if there is no section."""
    text = " ".join(section(function, "Source").split()).rstrip(".")
    if not text:
        numbers = re.findall(r"\b\d{4}\.\d{4,5}\b", "\n".join(formula(function)))
        text = ", ".join(dict.fromkeys(numbers))
    return re.sub(r"\b(\d{4}\.\d{4,5})\b", r"[\1](https://arxiv.org/abs/\1)", text) or NONE


def code(text: str) -> str:
    """A code span for a cell: no pipe ends it, and gaps that align survive."""
    return "`" + re.sub(r" {2,}", "\u2003", text.replace("|", r"\|")) + "`"


def row(name: str, function: Callable, facts: Facts) -> str:
    """The line of the table for one loss."""
    path = pathlib.Path(inspect.getfile(function)).relative_to(PAGE.parents[1]).as_posix()
    hidden = " **H**" if hasattr(losses.from_hidden, name) else ""
    cells = (
        f"[`{name}`](../{path}){hidden}",
        "<br>".join(code(line) for line in formula(function)),
        "<br>".join(code(line) for line in inputs(function)),
        facts.reduction,
        source(function),
        facts.peers,
    )
    return f"| {' | '.join(cells)} |\n"


def differences(function: Callable) -> str:
    """The sentences of a docstring, but for its first line, that name a peer or a bias."""
    paragraphs = description(function).split("\n\n")[1:]
    prose = [" ".join(x.split()) for x in paragraphs if not x.startswith("    ")]
    prose += [re.sub(r"^(\w[\w, ]*):", r"`\1`:", entry) for entry in arguments(function)]
    sentences = [sentence for text in prose for sentence in SENTENCE_END.split(text)]
    return " ".join(sentence for sentence in sentences if TELLING.search(sentence))


def page() -> str:
    """The whole page; a ValueError names the losses without facts and the facts without a loss."""
    public = functions()
    listed = [name for family in FAMILIES.values() for name in family]
    lacking, unknown = sorted(public.keys() - {*listed}), sorted({*listed} - public.keys())
    if lacking or unknown or len({*listed}) < len(listed):
        twice = sorted({name for name in listed if listed.count(name) > 1})
        raise ValueError(
            f"FAMILIES in docs/make_losses.py must hold every public loss once, but it lacks "
            f"{lacking} and has {unknown} besides and twice {twice}"
        )
    text = INTRODUCTION
    for title, family in FAMILIES.items():
        text += f"\n## {title}\n\n| name | formula | inputs | reduction | source | peers |\n"
        text += "|---|---|---|---|---|---|\n"
        text += "".join(row(name, public[name], facts) for name, facts in family.items())
    text += DIFFERENCES
    found = {name: differences(public[name]) for name in listed}
    return text + "".join(f"- `{name}`: {told}\n" for name, told in found.items() if told)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
