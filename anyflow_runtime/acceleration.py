"""`accelerate(pipe)`: a diffusers AnyFlow pipeline, the same object with the same weights, on our kernels.

The transformer, its blocks and the scheduler keep their parameters, hooks, adapters and names; only their class
changes, to one that is diffusers' and ours at once and takes `forward`, or `step`, from ours. So LoRA, offloading,
`.to()`, saving and every feature of the pipeline go on working, and `restore` has nothing to copy back.
"""

from __future__ import annotations

import types
import weakref
from typing import Any, TypeVar, Union

from torch import Tensor, nn

from .models import MODELS, AnyFlowModel
from .models.blocks import AnyFlowTransformerBlock

Pipeline = TypeVar("Pipeline")
_MERGED: dict[tuple[type, type], type] = {}
_SCHEDULER = "FlowMapEulerDiscreteScheduler"


def accelerate(
    pipe: Pipeline,
    *,
    match_diffusers_padding: bool = False,
    compile: bool | dict[str, Any] | None = None,
    backend: str = "auto",
    cuda_graphs: bool = True,
) -> Pipeline:
    """Run a diffusers AnyFlow pipeline or transformer on our kernels.

    Weights are shared, not copied: q, k and v of each self-attention move into one storage of which the original
    parameters become views. Calling it again changes the options.

    Args:
        pipe: an `AnyFlowPipeline`, an `AnyFlowFARPipeline`, or one of their transformers (diffusers >= 0.42).
        match_diffusers_padding: reproduce the zero keys that diffusers' FAR inference adds to every softmax, for
            comparing with it number by number; off, the softmax is the correct one.
        compile: True, or keywords of `torch.compile`, to compile each transformer block: once per kind of step, for all
            layers and lengths.
        backend: see `anyflow_kernels.load_ops`.
        cuda_graphs: on CUDA, capture each denoising step and prefill at its second run and replay it from then on, in
            later rollouts too; the model keeps the memory of the latest rollout for it (`release_memory`).

    Returns:
        The same object.

    Raises:
        TypeError: if it is neither, or the transformer is wrapped (`torch.compile`), or has hooks, blocks or attention
            processors that replace what our kernels fuse; offloading and casting hooks do not.
        RuntimeError: if the backend cannot run here.
    """
    transformer = _transformer_of(pipe)
    if not isinstance(transformer, AnyFlowModel):
        _adopt(transformer)
    if transformer is not pipe and type(transformer) in _MERGED.values():
        _admit(type(pipe), transformer)
    transformer._init_runtime(backend, match_diffusers_padding, cuda_graphs)
    scheduler: Any = getattr(pipe, "scheduler", None)
    kind = type(scheduler)
    if kind.__name__ == _SCHEDULER and kind.__module__.startswith("diffusers."):
        scheduler.__class__ = kind if kind in _MERGED.values() else _merged_scheduler(kind)
        scheduler._transformer = weakref.ref(transformer)  # a pipeline may drop its transformer for its memory
    for block in transformer.blocks:
        vars(block).pop("_compiled_call_impl", None)
        if compile:
            block.compile(**({} if compile is True else compile))
    return pipe


def restore(pipe: Pipeline) -> Pipeline:
    """Undo `accelerate`: the same object runs diffusers' code again. A pipeline that is not accelerated stays as it is.

    Raises:
        TypeError: if it is no AnyFlow pipeline or transformer.
    """
    transformer = _transformer_of(pipe)
    if isinstance(transformer, AnyFlowModel) and type(transformer) not in MODELS.values():
        for module in (transformer, *transformer.blocks):
            vars(module).pop("_compiled_call_impl", None)
            _change_class(module, type(module).__bases__[0])
        for block in transformer.blocks:
            for attention in (block.attn1, block.attn2):
                attention.__class__ = type(attention).__bases__[0]
        for name in AnyFlowModel.runtime_state:
            delattr(transformer, name)
    scheduler: Any = getattr(pipe, "scheduler", None)
    if type(scheduler) in _MERGED.values():
        scheduler.__class__ = type(scheduler).__bases__[0]
        del scheduler._transformer
    return pipe


def _transformer_of(pipe: Any) -> Any:
    transformer = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if hasattr(transformer, "_orig_mod"):
        raise TypeError("pipe: the transformer is wrapped by torch.compile; accelerate first, with compile=True")
    if type(transformer).__name__ not in MODELS:
        raise TypeError(
            f"pipe: got {type(pipe).__name__} with transformer {type(transformer).__name__}, expected a diffusers "
            f"AnyFlowPipeline, AnyFlowFARPipeline or one of {sorted(MODELS)}"
        )
    return transformer


def _adopt(transformer: Any) -> None:
    for name, module in transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        unknown = [] if registry is None else sorted(set(registry.hooks) - _KNOWN_HOOKS)
        if unknown:
            raise TypeError(f"pipe: {name or 'the transformer'} has the hook {unknown[0]!r}, which {_REPLACES}")
    for block in transformer.blocks:
        if not all(hasattr(block, part) for part in ("attn1", "attn2", "ffn", "scale_shift_table")):
            raise TypeError(f"pipe: a block is a {type(block).__name__}, which {_REPLACES}")
        for attention in (block.attn1, block.attn2):
            if type(attention.processor) not in attention._available_processors:
                raise TypeError(
                    f"pipe: a block has the processor {type(attention.processor).__name__}, which {_REPLACES}"
                )
    for block in transformer.blocks:
        for attention in (block.attn1, block.attn2):
            attention.__class__ = _merged(type(attention), object)
        _change_class(block, _merged(type(block), AnyFlowTransformerBlock))
    _change_class(transformer, _merged(type(transformer), MODELS[type(transformer).__name__]))


# What diffusers adds to a module and our forward works with; its other hooks replace what is inside the module.
_KNOWN_HOOKS = {"group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading", "layerwise_casting"}
_REPLACES = "replaces what our kernels fuse; take that off before accelerate, or leave this pipeline to diffusers"
_REFUSED = {
    "set_attention_backend": "attention is ours: accelerate(pipe, backend=...) chooses",
    "set_attn_processor": "attention is ours, and calls no processor",
    "set_processor": "attention is ours, and calls no processor",
    "enable_parallelism": "several GPUs share a video by anyflow_runtime.parallel.context_parallel",
    "enable_cache": "a cache of block outputs skips what our kernels fuse, and at few steps there is little to skip",
}


def _merged(theirs: Any, ours: Any) -> type:
    """A class that is both: everything from diffusers' but `forward` and what only ours has. `object` stands for
    nothing of ours. What would be accepted and have no effect is refused."""
    if (theirs, ours) in _MERGED:
        return _MERGED[theirs, ours]
    namespace: dict[str, Any] = {"__module__": theirs.__module__, "__doc__": theirs.__doc__}
    namespace["__reduce__"] = lambda self: (_again, (theirs, ours), vars(self).copy())
    namespace |= {name: _refusing(name, why) for name, why in _REFUSED.items() if hasattr(theirs, name)}
    if ours is not object:
        namespace["forward"] = ours.forward
    if issubclass(ours, AnyFlowModel):
        from diffusers.utils import apply_lora_scale

        namespace["forward"] = apply_lora_scale("attention_kwargs")(ours.forward)
        namespace["from_config"] = classmethod(theirs.from_config.__func__)
        if hasattr(ours, "build_attention_mask"):
            namespace["build_attention_mask"] = ours.build_attention_mask
    bases = (theirs,) if ours is object else (theirs, ours)
    return _MERGED.setdefault((theirs, ours), type(theirs.__name__, bases, namespace))


def _again(theirs: type, ours: type) -> Any:
    """An empty instance of a merged class, for `pickle` and `copy`, which find no such class by its name."""
    merged: Any = _merged(theirs, ours)
    return merged.__new__(merged)


def _refusing(name: str, why: str) -> Any:
    def refuse(self: Any, *arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"{name}: has no effect on an accelerated transformer, for {why}; or restore first")

    return refuse


def _admit(pipeline: Any, transformer: Any) -> None:
    """Let `from_pipe`, which compares exact classes with the annotations of the constructor, take the merged class."""
    annotations = pipeline.__init__.__annotations__
    merged, theirs = type(transformer), type(transformer).__bases__[0]
    if merged not in getattr(annotations.get("transformer"), "__args__", ()):
        annotations["transformer"] = Union[theirs, merged]  # noqa: UP007  (of classes made at run time)


def _merged_scheduler(theirs: Any) -> type:
    """diffusers' scheduler with our step: the same result to the bit in one kernel instead of four passes."""
    from .schedulers import FlowMapEulerDiscreteScheduler  # it imports diffusers, which a pipeline has done already

    ours: Any = FlowMapEulerDiscreteScheduler

    def step(
        self: Any, model_output: Tensor, timestep: Any, sample: Tensor, r_timestep: Any = None, return_dict: bool = True
    ) -> Any:
        if any(isinstance(time, Tensor) and time.numel() > 1 for time in (timestep, r_timestep)):
            return theirs.step(self, model_output, timestep, sample, r_timestep, return_dict)
        return ours.step(self, model_output, timestep, sample, r_timestep, return_dict)

    def reduce(self: Any) -> tuple[Any, ...]:  # a pickle or a copy is diffusers' own: no module knows this class
        return _with_state, (theirs, {name: value for name, value in vars(self).items() if name != "_transformer"})

    step.__doc__ = theirs.step.__doc__
    names = {
        "step": step,
        "kernels": property(lambda self: getattr(self._transformer(), "ops", None)),
        "_sigmas_at": ours._sigmas_at,
        "__reduce__": reduce,
        "__module__": theirs.__module__,
    }
    if (theirs, ours) not in _MERGED:
        _MERGED[theirs, ours] = type(theirs.__name__, (theirs,), names)
    return _MERGED[theirs, ours]


def _with_state(cls: Any, state: dict[str, Any]) -> Any:
    made = cls.__new__(cls)
    vars(made).update(state)
    return made


def _change_class(module: Any, new: Any) -> None:
    module.__class__ = new
    forward = types.MethodType(new.forward, module)
    if "_old_forward" in vars(module):  # an accelerate hook calls the forward it found when it was attached
        module._old_forward = forward
    elif "_diffusers_hook" in vars(module) and module._diffusers_hook._fn_refs:  # and so does diffusers' innermost one
        module._diffusers_hook._fn_refs[0].forward = forward
    else:
        vars(module).pop("forward", None)  # what a hook that was taken off has left
