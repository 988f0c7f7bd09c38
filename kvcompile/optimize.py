"""optimize(): the model that a user already has, with a compressed cache behind generate()."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvcompile.backend.inductor import check_compiler
from kvcompile.cache import KVCache
from kvcompile.calibration.artefacts import Calibration
from kvcompile.checks.audit import audit
from kvcompile.checks.audit_report import Audit
from kvcompile.checks.self_check import self_check
from kvcompile.engine import Engine
from kvcompile.errors import KVCompileError, UnsupportedModelError
from kvcompile.own_cache import OwnCache
from kvcompile.program import Program, capture
from kvcompile.recipe import Recipe
from kvcompile.rule import Rule

log = logging.getLogger(__name__)


def optimize(model: PreTrainedModel, recipe: str | Recipe = "kivi(bits=4)", *,
             max_length: int | None = None, compile: bool = True,
             prefill_chunk: int | None = None,
             calibration: Tensor | Calibration | None = None, tokenizer: Any = None,
             verify: bool = False) -> PreTrainedModel:
    """A model of the same class family that shares `model`'s weights; K and V stored by `recipe`.

    max_length     tokens for which every cache is allocated in advance; more raise CacheFullError
    compile        compile the decode step with Inductor (else run the same graph eagerly)
    prefill_chunk  tokens of a prompt that are processed at a time; later chunks read what earlier
                   ones stored
    calibration    token ids [texts, tokens] for what looks at text first, such as kvtuner, or what
                   `calibrate` found; without it the model writes some text, with a fixed seed
    tokenizer      tells the token ids of separators and the like to methods that keep such tokens;
                   the model's own attribute `tokenizer` if there is one
    verify         check the laws (docs/laws.md) on the first prompt: its last tokens are decoded
                   and each layer's attention is compared with the oracle in fp64; the result is
                   `.kvcompile.audit`, or a LawError that names layer, store and kernel. Takes
                   another compilation

    `model` is left as it was; if it is itself an optimized model, its captured graph is used again.
    Raises RecipeError, or UnsupportedModelError if the model cannot be captured or mixes tokens by
    anything but attention.
    """
    Recipe.parse(recipe)
    for name, value in (("max_length", max_length), ("prefill_chunk", prefill_chunk)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise KVCompileError(f"{name}={value!r}: must be a positive whole number")
    if compile:
        check_compiler()
    if isinstance(calibration, Calibration):
        recipe, calibration = calibration.of(recipe, model), calibration.ids
    if isinstance(model, Optimized):
        model.kvcompile.check_weights(model)
        base, program = model.kvcompile.model, model.kvcompile.program.lower(
            recipe, calibration=calibration, tokenizer=tokenizer)
    elif not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model: it has "
                                    "no generate(); kvcompile.capture takes any PyTorch decoder")
    else:
        base, program = model, capture(model, recipe, calibration=calibration,
                                       tokenizer=tokenizer)
        self_check(base, program)
    for site in program.sites if prefill_chunk else ():
        if site.rule and (why := Rule.parse(site.rule).whole):
            raise KVCompileError(f"prefill_chunk={prefill_chunk}: "
                                 f"{Recipe.parse(recipe).brief}: layer {site.layer}: "
                                 f"{why}")
    cls: Any = type(type(base).__name__, (Optimized, type(base)), {  # pipelines know the name
        "__doc__": f"{type(base).__name__} with a KV cache compressed by kvcompile.",
        "__module__": __name__})
    out = cls.__new__(cls)
    out.__dict__.update(base.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):  # the same tensors in dicts of its own
        out.__dict__[name] = dict(base.__dict__[name])
    out.config = copy.deepcopy(base.config)
    out.generation_config = copy.deepcopy(base.generation_config)
    object.__setattr__(out, "kvcompile", State(base, program, Engine(program, compile), max_length,
                                               prefill_chunk, verify))
    out.training = False  # of its own: eval() would reach the shared modules
    return out


class State:
    """What an optimized model knows beyond its class: program, engine, limits and its weights."""

    def __init__(self, model: PreTrainedModel, program: Program, engine: Engine,
                 max_length: int | None, prefill_chunk: int | None, verify: bool = False) -> None:
        self.model, self.program, self.engine = model, program, engine
        self.max_length, self.prefill_chunk = max_length, prefill_chunk
        self.owner = f"{type(model).__name__}-{id(self):x}"
        self.weights, self.derived = _weights(model), _versions(program)
        self.warned, self.verify = False, verify
        self.audit: Audit | None = None

    def new_cache(self) -> OwnCache:
        return OwnCache(self.engine.sites, str(self.program.recipe), self.owner, self.max_length)

    def verify_on(self, ids: Tensor, positions: Tensor, valid: Tensor) -> None:
        """Check the laws on a prompt, once; one token is too few."""
        if not self.verify or ids.shape[1] < 2:
            return
        self.verify = False
        self.audit = audit(self.program, ids, positions, valid, chunk=self.prefill_chunk,
                           compile=self.engine.compile)
        log.info("the laws hold:\n%s", self.audit)

    def check_derived(self) -> None:
        """What other weights were computed from must not have changed, in place or otherwise."""
        stale = [n for n, version in _versions(self.program).items() if version != self.derived[n]]
        if stale:
            raise KVCompileError(f"{stale[0]} changed after optimize(), which computed other "
                                 "weights from it; call kvcompile.optimize again")

    def check_weights(self, model: PreTrainedModel) -> None:
        """Values changed in place are used as they are; replaced parameters are refused."""
        now = _weights(model)
        if now == self.weights:
            return
        changed = sorted(k for k in now.keys() | self.weights.keys()
                         if now.get(k) != self.weights.get(k))
        raise KVCompileError(f"{len(changed)} weights were replaced after optimize() (first: "
                             f"{changed[0]}); call kvcompile.optimize again")


def _weights(model: PreTrainedModel) -> dict[str, tuple]:
    return {n: (p.data_ptr(), p.dtype, p.device, tuple(p.shape), type(p))
            for n, p in model.named_parameters()}


def _versions(program: Program) -> dict[str, int]:
    """How often the parameters were changed that buffers of the graph were computed from."""
    gm, found = program.snapshots["capture"], dict[str, int]()
    for node in program.graph_module.graph.nodes:
        for name in node.meta.get("derived", ()):
            value: Any = gm
            for part in name.split("."):
                value = getattr(value, part, None)
            if isinstance(value, Tensor) and not value.is_inference():
                found[name] = value._version
    return found


class Optimized(PreTrainedModel):
    """Mixin of optimized models: forward over a KVCache; everything else is the model's own."""

    kvcompile: State

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
                position_ids: Tensor | None = None, past_key_values: KVCache | None = None,
                inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
                use_cache: bool | None = None, logits_to_keep: int | Tensor = 0,
                output_attentions: bool | None = None, output_hidden_states: bool | None = None,
                return_dict: bool | None = None, question_length: int = 0, **rest: Any) -> Any:
        """As the base model's forward; the cache in and out is a `kvcompile.KVCache`.

        `question_length`: tokens at the end of a prompt that are its question, which methods that
        choose tokens by the last queries then take for these (`Engine.asked`). It is of the call
        that fills an empty cache, and says nothing to later ones.
        """
        _refuse(self, output_attentions=output_attentions,
                output_hidden_states=output_hidden_states, **rest)
        if (input_ids is None) == (inputs_embeds is None):
            raise KVCompileError("give either input_ids or inputs_embeds")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        batch, tokens = given.shape[:2]
        if tokens == 0 or batch == 0:
            raise KVCompileError("the prompt is empty: input_ids has no tokens")
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = self._own_cache(past_key_values)
        past = 0 if cache is None else cache.get_seq_length()
        valid = _valid(attention_mask, cache, batch, tokens, past, given.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=given.device)[None]
        position_ids = position_ids.expand(batch, -1)
        keep = torch.arange(tokens, device=given.device)
        keep = keep[logits_to_keep] if isinstance(logits_to_keep, Tensor) else (
            keep[-logits_to_keep:])
        ids = input_ids if input_ids is not None else given.new_zeros(batch, tokens).long()
        if past == 0:
            self.kvcompile.check_weights(self)
            self.kvcompile.check_derived()
            if use_cache and inputs_embeds is None:
                self.kvcompile.verify_on(ids, position_ids, valid)
        with torch.no_grad():
            if cache is None and not use_cache:
                logits = self._stateless(ids, position_ids, valid, keep, inputs_embeds)
            else:
                cache = cache if cache is not None else self.kvcompile.new_cache()
                question = self.kvcompile.engine.asked(question_length, valid) if past == 0 else 0
                logits = self._chunks(cache, ids, position_ids, valid, keep, inputs_embeds,
                                      question)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels,
                                      vocab_size=self.config.get_text_config().vocab_size)
        out = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return out.to_tuple() if return_dict is False else out

    def _chunks(self, cache: OwnCache, ids: Tensor, positions: Tensor, valid: Tensor, keep: Tensor,
                embeds: Tensor | None, question: int) -> Tensor:
        """Run a call in pieces of `prefill_chunk` tokens."""
        size, tokens = self.kvcompile.prefill_chunk or ids.shape[1], ids.shape[1]
        whole, parts = valid.sum(1).tolist() if size < tokens else (), []
        for start in range(0, tokens, size):
            at = slice(start, min(start + size, tokens))
            wanted = keep[(keep >= at.start) & (keep < at.stop)] - at.start
            parts.append(self.kvcompile.engine.run(
                cache, ids[:, at], positions[:, at], valid[:, at], wanted,
                None if embeds is None else embeds[:, at], question, whole))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _stateless(self, ids: Tensor, positions: Tensor, valid: Tensor, keep: Tensor,
                   embeds: Tensor | None) -> Tensor:
        if not self.kvcompile.warned and str(self.kvcompile.program.recipe) != "full":
            self.kvcompile.warned = True
            log.warning("a forward without a cache is exact: it does not exercise the compressed "
                        "cache (%s)", self.kvcompile.program.recipe)
        return self.kvcompile.engine.stateless(ids, positions, valid, keep, embeds)

    def _own_cache(self, cache: Any) -> OwnCache | None:
        if cache is None:
            return None
        if not isinstance(cache, OwnCache):
            if cache.get_seq_length() == 0:
                return self.kvcompile.new_cache()
            raise KVCompileError(f"past_key_values is a {type(cache).__name__} that already holds "
                                 "tokens; start with the KVCache that this model returns")
        if cache.owner != self.kvcompile.owner:
            raise KVCompileError(f"the cache was made by another model or recipe ({cache.recipe}); "
                                 f"this model stores by {self.kvcompile.program.recipe}")
        return cache

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any,
                                      **kwargs: Any) -> None:
        """generate() starts with an empty KVCache instead of a DynamicCache."""
        if generation_config.cache_implementation is not None:
            raise KVCompileError("kvcompile brings its own cache: cache_implementation="
                                 f"{generation_config.cache_implementation!r} cannot be combined")
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.kvcompile.new_cache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True

    def __deepcopy__(self, memo: dict) -> Any:
        raise KVCompileError("an optimized model shares its weights and cannot be deep-copied; "
                             "copy the original and optimize that")


def _refuse(model: PreTrainedModel, **options: Any) -> None:
    what = {"output_attentions": "attention weights are never formed",
            "output_hidden_states": "the compiled graph returns logits only"}
    for name, value in options.items():
        if value is None or value is False:
            continue
        if name in what:
            raise KVCompileError(f"{name}=True is not supported: {what[name]}")
        if name not in ("use_cache", "cache_position", "num_items_in_batch"):
            raise KVCompileError(f"forward got {name}, which {type(model).__name__} does not take")


def _valid(mask: Tensor | None, cache: OwnCache | None, batch: int, tokens: int, past: int,
           device: torch.device) -> Tensor:
    """bool [B, S]: which of this call's columns are tokens rather than padding."""
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.dim() != 2:
        raise KVCompileError(f"attention_mask has {mask.dim()} dimensions; kvcompile takes a 2-D "
                             "padding mask [batch, cached + new tokens]")
    if mask.shape != (batch, past + tokens):
        raise KVCompileError(f"attention_mask is {list(mask.shape)}, but {past} cached and "
                             f"{tokens} new tokens need {[batch, past + tokens]}")
    if past and tokens > 1 and cache is not None and not cache.same_columns(mask[:, :past]):
        raise KVCompileError("attention_mask hides or shows cached tokens differently from the "
                             "call that stored them")
    return mask[:, past:].bool()
