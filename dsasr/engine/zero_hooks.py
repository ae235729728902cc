"""DeepSpeed's hooks on a module: which submodules get them, and the removal of stale ones."""

from __future__ import annotations

from torch import nn

from dsasr.model.encoders.conformer import Block
from dsasr.model.encoders.pretrained import PretrainedEncoder


def leaf_modules(module: nn.Module) -> list[nn.Module]:
    """The layers of encoder and LLM, each of which ZeRO-3 is to gather as a whole.

    By default it hooks every Linear, LayerNorm and Dropout and gathers many small parameters. At
    the demo's size on two CPU ranks a step takes 0.13 s with whole layers, and 0.22 to 0.26 s by
    default. (The subsampling is left out: in the backward pass of a leaf whose input needs no
    gradient, DeepSpeed 0.19 releases the weights before they are used.)
    """
    names = {Block.__name__}
    for child in module.modules():
        names |= set(getattr(child, "_no_split_modules", None) or ())
        if isinstance(child, PretrainedEncoder):  # transformers has not named all families' blocks
            names |= {type(block).__name__ for block in child.blocks}
    return [child for child in module.modules() if type(child).__name__ in names]


_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def hook_ids(module: nn.Module) -> dict[tuple[str, str], set[int]]:
    """The ids of all hooks in ``module``, by (submodule, table)."""
    return {
        (path, table): set(getattr(child, table))
        for path, child in module.named_modules()
        for table in _TABLES
    }


def remove_hooks_since(module: nn.Module, earlier: dict[tuple[str, str], set[int]]) -> None:
    """Remove the hooks that were added after ``earlier`` (`hook_ids`).

    ``destroy`` of DeepSpeed 0.19 leaves two hooks for each engine.
    """
    for path, child in module.named_modules():
        for table in _TABLES:
            hooks = getattr(child, table)
            for hook in set(hooks) - earlier[path, table]:
                del hooks[hook]
