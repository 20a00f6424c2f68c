"""What TorchAir asks of the installed CANN while it lowers a graph, told to a listener as it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """Whether CANN has an operator at all, or knows optional inputs and attributes of one that are in use."""

    operator: str
    optional: tuple[str, ...]  # inputs, then attributes; none: whether there is the operator
    refusal: str  # "": yes


def listen(told: Callable[[Question], None]) -> None:
    """Calls `told` for each question and its answer from now on, and changes no answer. Called once per process, after
    torch-npu has been imported. TorchAir has no public way to learn this: two names of its modules, as torch-npu 2.13
    has them, are wrapped. Raises AttributeError or ImportError where another version has them no more."""
    from torchair._ge_concrete_graph import compat_ir  # pyright: ignore[reportMissingImports]
    from torchair.ge import ge_custom  # pyright: ignore[reportMissingImports]

    answer, extension = compat_ir.is_cann_compat, ge_custom._torchair
    assert callable(extension.get_registered_ir_def)

    def is_compatible(optype: str, runtime_optional_inputs: Any, runtime_optional_attrs: Any) -> str:
        refusal = answer(
            optype, runtime_optional_inputs=runtime_optional_inputs, runtime_optional_attrs=runtime_optional_attrs
        )
        if refusal or runtime_optional_inputs or runtime_optional_attrs:
            told(Question(optype, (*runtime_optional_inputs, *runtime_optional_attrs), str(refusal)))
        return refusal

    compat_ir.is_cann_compat = is_compatible
    ge_custom._torchair = _Listening(extension, told)


class _Listening:
    """TorchAir's C extension, with one of its functions overheard."""

    def __init__(self, extension: Any, told: Callable[[Question], None]) -> None:
        self._extension = extension
        self._told = told

    def __getattr__(self, name: str) -> Any:
        return getattr(self._extension, name)

    def get_registered_ir_def(self, operator: str) -> Any:
        found = self._extension.get_registered_ir_def(operator)
        self._told(Question(operator, (), "" if found[0] == "SUCCESS" else f"status {found[0]}"))
        return found
