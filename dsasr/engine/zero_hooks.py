"""Where DeepSpeed hangs its hooks on a module: on which children, and which it leaves behind."""

from __future__ import annotations

from torch import nn

from dsasr.model.encoders.conformer import Block


def blocks(module: nn.Module) -> list[nn.Module]:
    """The layers of encoder and LLM, which ZeRO-3 is to gather as one.

    Left alone, it hooks every Linear, LayerNorm and Dropout and gathers many small pieces. At the
    demo's size on two CPU ranks a step takes 0.13 s like this and 0.22 to 0.26 s otherwise. (Not
    so the subsampling: in the backward pass of a leaf whose input needs no gradient, DeepSpeed
    0.19 releases the weights before they are used.)
    """
    names = {Block.__name__}
    for child in module.modules():
        names |= set(getattr(child, "_no_split_modules", None) or ())
    return [child for child in module.modules() if type(child).__name__ in names]


_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
)


def present(module: nn.Module) -> dict[tuple[str, str], set[int]]:
    """The ids of all hooks in ``module``, by (submodule, table)."""
    return {
        (path, table): set(getattr(child, table))
        for path, child in module.named_modules()
        for table in _TABLES
    }


def remove_since(module: nn.Module, kept: dict[tuple[str, str], set[int]]) -> None:
    """Remove hooks that came after ``kept``: DeepSpeed 0.19's ``destroy`` leaves two a life."""
    for path, child in module.named_modules():
        for table in _TABLES:
            hooks = getattr(child, table)
            for number in set(hooks) - kept[path, table]:
                del hooks[number]
