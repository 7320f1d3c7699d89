"""The base of every MIRAS choice: a small frozen, validated value that JSON can name."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

Axis = TypeVar("Axis", bound="Choice")


class Choice(BaseModel):
    """One member of one of the four axes, e.g. ``Momentum()`` or ``MLP(depth=2)``.

    A direct subclass is an axis and owns a registry; a class below it that sets ``name`` is a member and is found
    under that name when a configuration is read back from JSON or YAML. Registering an own member is therefore
    nothing but defining the class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axis: ClassVar[str] = ""
    name: ClassVar[str] = ""
    members: ClassVar[dict[str, type[Choice]]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        if "axis" in cls.__dict__:
            cls.members = {}
        elif "name" in cls.__dict__:
            cls.members[cls.name] = cls

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": self.name, **handler(self)}

    @classmethod
    def parse(cls: type[Axis], value: Any) -> Axis:
        """Turn a member, its name, or a mapping with its name and arguments into the member.

        Raises:
            ValueError: the name is unknown, or the value is none of the three.
        """
        if isinstance(value, cls):
            return value
        arguments = {"name": value} if isinstance(value, str) else value
        if not isinstance(arguments, dict) or "name" not in arguments:
            raise ValueError(
                f"{cls.axis} must be one of {sorted(cls.members)} or a mapping with a 'name', got {value!r}"
            )
        arguments = dict(arguments)
        member = cls.members.get(name := arguments.pop("name"))
        if member is None:
            raise ValueError(f"{cls.axis} {name!r} is unknown; known: {', '.join(sorted(cls.members))}")
        return member(**arguments)  # type: ignore[return-value]
